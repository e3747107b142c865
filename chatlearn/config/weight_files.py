"""Whether safetensors files are whole, told from their headers and sizes; no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

PREFIX_BYTES: Final = 8  # the length of the header, as a little-endian integer
MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the format; a larger number is no length but something else


def weight_file_problem(file: Path) -> str | None:
    """What is wrong with one file, or None. A download that stopped early is shorter than its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(PREFIX_BYTES), "little")
            text = stream.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    if size == 0:
        return f"{file} is empty; copy the model again"
    expected = _data_bytes(text) if len(text) == header_bytes else None
    if expected is None:
        return f"{file} has no safetensors header; copy the model again"
    if size != PREFIX_BYTES + header_bytes + expected:
        return (
            f"{file} has {size} bytes, and its header speaks of {PREFIX_BYTES + header_bytes + expected}; "
            "copy the model again"
        )
    return None


def _data_bytes(header: bytes) -> int | None:
    """Bytes of all tensors together; None where this is no header."""
    try:
        tensors: object = json.loads(header)
    except ValueError:  # not JSON, or not text
        return None
    if not isinstance(tensors, dict):
        return None
    end = 0
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        match tensor:
            case {"data_offsets": [int(), int(stop)]}:
                end = max(end, stop)
            case _:
                return None
    return end
