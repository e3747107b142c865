"""Checksums of files read in pieces: whatever the order, the same as of the file read from front to back."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from chatlearn.checkpoint.manifest import FileRecord, record_file
from chatlearn.checkpoint.read_once import ReadOnce, joined
from chatlearn.errors import CheckpointError

CONTENT = random.Random(5).randbytes(50_000)


@pytest.mark.parametrize("cut", [0, 1, 255, 49_999, 50_000])
def test_checksums_of_pieces_join_to_that_of_the_whole(cut: int) -> None:
    first, second = CONTENT[:cut], CONTENT[cut:]
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(CONTENT)


@pytest.mark.parametrize("seed", range(5))
def test_order_gaps_and_repetition_do_not_matter(tmp_path: Path, seed: int) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    record, rng, reading = record_file(tmp_path, "shard"), random.Random(seed), ReadOnce()
    for _ in range(20):
        begin = rng.randrange(len(CONTENT))
        end = min(begin + rng.randrange(1, 5_000), len(CONTENT))
        reading.note(tmp_path / "shard", begin, memoryview(CONTENT)[begin:end])
    reading.require(tmp_path, [record])


def test_a_flipped_bit_is_found_where_it_was_read_and_where_nobody_looked(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    record = record_file(tmp_path, "shard")
    for position in (10, 40_000):
        damaged = bytearray(CONTENT)
        damaged[position] ^= 8
        (tmp_path / "shard").write_bytes(damaged)
        reading = ReadOnce()
        reading.note(tmp_path / "shard", 0, memoryview(damaged)[:20_000])
        with pytest.raises(CheckpointError, match=rf"{tmp_path}: shard has checksum \w+ instead of {record.crc32}"):
            reading.require(tmp_path, [record])


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    record, reading = record_file(tmp_path, "shard"), ReadOnce()
    reading.note(tmp_path / "shard", 0, memoryview(CONTENT))
    (tmp_path / "shard").unlink()
    reading.require(tmp_path, [record])
    with pytest.raises(FileNotFoundError):
        ReadOnce().require(tmp_path, [FileRecord("shard", len(CONTENT), record.crc32)])
