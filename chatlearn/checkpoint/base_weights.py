"""The weights of a base model, read as a checkpoint's are: piece by piece, nothing mapped, nothing kept open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath

import torch

from chatlearn.checkpoint.blocks import Block, Numbers, Shard, row_strides
from chatlearn.checkpoint.documents import Document, inner, integers, text
from chatlearn.checkpoint.saved_tensors import SavedTensors
from chatlearn.errors import CheckpointError, DataError
from chatlearn.models.stored_weights import StoredWeights

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def open_base(model_dir: Path) -> SavedTensors:
    """The tensors of a directory's safetensors files under their stored names.

    Raises ``DataError`` where a file is missing or not what its header says.
    """
    with StoredWeights(model_dir) as weights:
        files = sorted(set(weights.files.values()))
    shards: dict[str, tuple[Shard, ...]] = {}
    for file in files:
        if len(PurePosixPath(file).parts) != 1:
            raise DataError(f"{model_dir}: the index of its weights names {file!r}, which leads out of the folder")
        for name, shard in _shards(model_dir / file):
            if weights.files.get(name) == file:
                shards[name] = (shard,)
    absent = sorted(weights.files.keys() - shards.keys())
    if absent:
        raise DataError(
            f"{model_dir / weights.files[absent[0]]}: has no tensor '{absent[0]}' of a kind that an adapter is merged "
            f"into ({', '.join(DTYPES)}); download it again, or give the model that is not quantized"
        )
    shapes = {name: shard.block.sizes for name, (shard,) in shards.items()}
    return SavedTensors(model_dir, shapes, shards)


def _shards(path: Path) -> Iterator[tuple[str, Shard]]:
    """Every tensor of one file, whole, and where it lies; see ``weight_files`` for the format."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: Document = json.loads(file.read(min(header_bytes, path.stat().st_size)))
        for name in header.keys() - {"__metadata__"}:
            entry = inner(header, name, path)
            sizes, span = integers(entry, "shape", path), integers(entry, "data_offsets", path)
            dtype = DTYPES.get(text(entry, "dtype", path))
            if dtype is None:
                continue  # computed ones may be of any kind; a weight of such a kind is missed by whoever needs it
            if len(span) != 2 or span[1] - span[0] != prod(sizes) * dtype.itemsize:
                raise DataError(f"{path}: the header contradicts itself about '{name}'; download it again")
            numbers = Numbers(path, 8 + header_bytes + span[0], dtype, row_strides(sizes))
            yield name, Shard(path, Block.of(sizes), lambda numbers=numbers: numbers)
    except (OSError, ValueError, CheckpointError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); download it again") from error
