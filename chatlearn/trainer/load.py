"""Safetensors on disk -> parameters in memory, whole or as the shard of this rank.

Every rank reads the rows it holds and nothing else, so no rank ever needs the memory for a whole model.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from chatlearn.errors import DataError
from chatlearn.models.naming import TIED_HEAD, ModelFamily, StoredPiece
from chatlearn.trainer.parallel import SHARD_AXIS

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Frequencies of the rotary embedding: old checkpoints hold them, but they follow from the configuration.
DERIVED_SUFFIX = "rotary_emb.inv_freq"


class Checkpoint:
    """The stored tensors of a Hugging Face directory, one file or many, open for reading."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.files = _files_by_name(model_dir)
        self._stack = ExitStack()
        self._open: dict[str, safe_open] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def rows(self, name: str, expected: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a stored tensor, which must have the ``expected`` shape."""
        if name not in self.files:
            raise DataError(f"{self.model_dir}: the checkpoint has no tensor '{name}'; the download may be incomplete")
        file = self.files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_reader(self.model_dir / file))
        stored = self._open[file].get_slice(name)
        shape = tuple(stored.get_shape())
        if shape != expected:
            raise DataError(
                f"{self.model_dir / file}: tensor '{name}' has shape {shape}, but config.json asks for {expected}; "
                "the two do not belong together"
            )
        return stored[start:stop]


def _files_by_name(model_dir: Path) -> dict[str, str]:
    index = model_dir / INDEX_FILE
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError) as error:
            raise DataError(f"{index}: not a readable index of weights ({error}); download it again") from error
    if not (model_dir / SINGLE_FILE).is_file():
        raise DataError(f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} in it; only safetensors can be loaded")
    with _reader(model_dir / SINGLE_FILE) as reader:
        return dict.fromkeys(reader.keys(), SINGLE_FILE)


def _reader(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); download it again") from error


@torch.no_grad()
def fill(module: torch.nn.Module, family: ModelFamily, checkpoint: Checkpoint) -> None:
    """Give every parameter of ``module``, sharded or not, the values that the checkpoint has for it.

    Raises ``DataError`` when a tensor is missing, has another shape, or has no place in the module.
    """
    used: set[str] = set()
    for name, parameter in module.named_parameters():
        pieces = family.pieces(name, tuple(parameter.shape))
        used.update(piece.name for piece in pieces)
        _fill_parameter(parameter, pieces, checkpoint)
    homeless = [
        name
        for name in checkpoint.files
        if name not in used and name != TIED_HEAD and not name.endswith(DERIVED_SUFFIX)
    ]
    if homeless:
        raise DataError(
            f"{checkpoint.model_dir}: the model described by config.json has no place for {len(homeless)} stored "
            f"tensors, the first is '{min(homeless)}'; the two do not belong together"
        )


def _fill_parameter(parameter: Tensor, pieces: tuple[StoredPiece, ...], checkpoint: Checkpoint) -> None:
    local, start = _held_rows(parameter)
    stop = start + len(local)
    whole = torch.empty(parameter.shape, device="meta")
    for piece in pieces:
        shape = tuple(piece.of(whole).shape)
        if piece.expert is None:
            local.copy_(checkpoint.rows(piece.name, shape, start, stop))
        elif start <= piece.expert < stop:
            here = StoredPiece(piece.name, piece.expert - start, piece.rows)
            here.of(local).copy_(checkpoint.rows(piece.name, shape, 0, shape[0]))


def _held_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and the number of the first row of it.

    FSDP cuts along the rows, into parts of equal size as far as they go; the last ranks may have fewer or none.
    """
    if not isinstance(parameter, DTensor):
        return parameter, 0
    assert parameter.placements[-1] == Shard(0), "FSDP was asked to cut along the rows"
    mesh = parameter.device_mesh
    assert mesh.mesh_dim_names is not None, "device_mesh() names its axes"
    rows_per_rank = -(-parameter.shape[0] // mesh.size(mesh.mesh_dim_names.index(SHARD_AXIS)))
    start = min(mesh.get_local_rank(SHARD_AXIS) * rows_per_rank, parameter.shape[0])
    return parameter.to_local(), start
