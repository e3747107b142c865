"""Tensors of a checkpoint -> a Hugging Face model directory: read ahead in a thread, written as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.ahead import Stream, ahead
from chatlearn.checkpoint.architecture import Shapes, parameter_shapes, stored_shapes
from chatlearn.checkpoint.base_weights import open_base
from chatlearn.checkpoint.fit import misfit, require_fit, require_tied_head
from chatlearn.checkpoint.guarded_reader import METADATA_NAME
from chatlearn.checkpoint.hugging_face import DTYPES, StoredDtype, WrittenModel, write_hugging_face
from chatlearn.checkpoint.layout import MODEL_FOLDER
from chatlearn.checkpoint.manifest import FileRecord, verify_checksums
from chatlearn.checkpoint.saved_tensors import SavedTensors, open_shards
from chatlearn.errors import ChatLearnError, CheckpointError, ConfigError, DataError
from chatlearn.models.family import family_of
from chatlearn.models.lora import Factors, merged
from chatlearn.models.naming import ModelFamily, StoredPiece

Progress = Callable[[int, int], None]  # weights (numbers) converted so far, and in the whole model


def no_progress(done: int, total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor of the model directory comes from: a saved tensor, or a piece of one."""

    name: str
    piece: StoredPiece | None = None


def export(
    folder: Path,
    base_dir: Path,
    save_dir: Path,
    adapter: AdapterRecord | None = None,
    dtype: StoredDtype = "bfloat16",
    progress: Progress = no_progress,
) -> WrittenModel:
    """Write the shards in ``folder/model`` as the model directory ``save_dir``, with what else ``base_dir`` has in it.

    Asks for no manifest and compares no checksums: the folder may be a checkpoint that is still being made, and
    ``save_dir`` may lie in it. ``adapter`` describes what the shards hold where that is not the whole model; it must
    have been trained on ``base_dir``. Opens no process group, but transformers and torch keep settings of the whole
    process, so beside training it belongs in a process of its own.
    Raises ``CheckpointError`` for shards that are damaged, and ``ConfigError`` for those of another model and where
    ``save_dir`` holds something that is not an earlier conversion.
    """
    return export_verified(folder, (), base_dir, save_dir, adapter, dtype, progress)


def export_verified(
    folder: Path, files: tuple[FileRecord, ...], base_dir: Path, save_dir: Path, adapter: AdapterRecord | None,
    dtype: StoredDtype, progress: Progress,
) -> WrittenModel:  # fmt: skip
    """As ``export``, and nothing is published unless ``files`` have the bytes they were saved with."""
    shapes, family = parameter_shapes(base_dir), family_of(base_dir)
    # It says what lies where and how large it is; the numbers themselves are compared when they have been read.
    verify_checksums(folder, [record for record in files if record.name == f"{MODEL_FOLDER}/{METADATA_NAME}"])
    tensors = open_shards(folder / MODEL_FOLDER)
    if adapter is None:
        require_fit(folder, tensors.shapes, shapes, base_dir)
        with _damage_told(ConfigError, tensors, folder, files):
            require_tied_head(tensors, shapes, base_dir)
        stream = stored(tensors, own_sources(family, shapes), dtype)
    else:
        _require_factors(folder, tensors.shapes, shapes, adapter)
        stream = _merged(tensors, shapes, family, dtype, adapter, base_dir)
    with _damage_told(CheckpointError, tensors, folder, files):
        return write_stream(_then_verified(stream, tensors, folder, files), shapes, base_dir, save_dir, dtype, progress)


@contextmanager
def _damage_told(
    kind: type[ChatLearnError], tensors: SavedTensors, folder: Path, files: tuple[FileRecord, ...]
) -> Generator[None]:
    """A damaged shard looks like anything. So before such an error is believed, what it may come from is looked at."""
    try:
        yield
    except kind as error:
        if not isinstance(error.__cause__, OSError):  # The system's own refusals, as of a full disk, say enough.
            tensors.checksums.require(folder, files)
        raise


def write_stream(
    stream: Stream, shapes: Shapes, base_dir: Path, save_dir: Path, dtype: StoredDtype, progress: Progress
) -> WrittenModel:
    """Write a stream that is read while the tensor before is written; ``shapes`` are those of the whole model."""
    total = sum(map(prod, shapes.values()))
    with closing(ahead(stream)) as coming:  # ends the thread, also when writing fails
        return write_hugging_face(_counted(coming, total, progress), base_dir, save_dir, dtype)


def own_sources(family: ModelFamily, shapes: Shapes) -> dict[str, TensorSource]:
    """Our checkpoints hold parameters as they are in memory; ``shapes`` are theirs."""
    return {
        piece.name: TensorSource(name, piece) for name, shape in shapes.items() for piece in family.pieces(name, shape)
    }


def stored(tensors: SavedTensors, sources: Mapping[str, TensorSource], dtype: StoredDtype) -> Stream:
    """Every tensor under its stored name, read when it is asked for."""
    for name, source in sources.items():
        yield name, tensors.read(source.name, DTYPES[dtype], source.piece)


def _require_factors(
    folder: Path, found: Mapping[str, tuple[int, ...]], weights: Shapes, adapter: AdapterRecord
) -> None:
    """Refuse a checkpoint that holds anything but both factors of some weights; its base is known to be right."""
    wanted: Shapes = {}
    for name, shape in weights.items():
        factors = Factors.of(name)
        if factors.a in found:
            wanted |= {factors.a: (adapter.lora.rank, shape[1]), factors.b: (shape[0], adapter.lora.rank)}
    strangers = sorted(found.keys() - wanted.keys())
    if strangers:
        raise CheckpointError(f"{folder}: '{strangers[0]}' belongs to no weight of the base model")
    fault = misfit(found, wanted)
    if fault:
        raise CheckpointError(f"{folder}: {fault}")


def _merged(
    tensors: SavedTensors, shapes: Shapes, family: ModelFamily, dtype: StoredDtype, adapter: AdapterRecord,
    base_dir: Path,
) -> Stream:  # fmt: skip
    """The base's weights, one stored tensor at a time, each with its part of the adapter."""
    base = open_base(base_dir)
    fault = misfit(base.shapes, stored_shapes(base_dir))
    if fault:
        raise DataError(f"{base_dir}: among its weights, {fault}; an adapter is merged into unquantized weights")
    for name, shape in shapes.items():
        factors = Factors.of(name)
        if factors.a in tensors.shapes:
            a, b = tensors.read(factors.a, torch.float32), tensors.read(factors.b, torch.float32)
            yield name, merged(base.read(name, torch.float32), a, b, adapter.lora).to(DTYPES[dtype])
        else:
            for piece in family.pieces(name, shape):
                yield piece.name, base.read(piece.name, DTYPES[dtype])


def _then_verified(stream: Stream, tensors: SavedTensors, folder: Path, files: tuple[FileRecord, ...]) -> Stream:
    """The stream, which fails at its end where what was read is not what was saved."""
    yield from stream
    tensors.checksums.require(folder, files)


def _counted(stream: Stream, total: int, progress: Progress) -> Stream:
    """The stream, telling how many numbers went by whenever the next one is asked for."""
    done = 0
    for name, tensor in stream:
        yield name, tensor
        done += tensor.numel()
        progress(done, total)
