"""Safetensors on disk -> parameters in memory, whole or as the shard of this rank.

Every rank reads the rows it holds and nothing else, so no rank ever needs the memory for a whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from chatlearn.errors import DataError
from chatlearn.models.lora import is_adapter
from chatlearn.models.naming import TIED_HEAD, ModelFamily, StoredPiece
from chatlearn.models.stored_weights import is_weight
from chatlearn.trainer.parallel import SHARD_AXIS

if TYPE_CHECKING:
    from chatlearn.models.stored_weights import StoredWeights


@torch.no_grad()
def fill(module: torch.nn.Module, family: ModelFamily, stored: StoredWeights) -> None:
    """Give every parameter of ``module``, sharded or not, the values that are stored for it; an adapter has none.

    Raises ``DataError`` when a tensor is missing, has another shape, or has no place in the module.
    """
    used: set[str] = set()
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            continue
        pieces = family.pieces(name, tuple(parameter.shape))
        used.update(piece.name for piece in pieces)
        _fill_parameter(parameter, pieces, stored)
    homeless = [name for name in stored.files if name not in used and name != TIED_HEAD and is_weight(name)]
    if homeless:
        raise DataError(
            f"{stored.model_dir}: the model described by config.json has no place for {len(homeless)} stored "
            f"tensors, the first is '{min(homeless)}'; the two do not belong together"
        )


def _fill_parameter(parameter: Tensor, pieces: tuple[StoredPiece, ...], stored: StoredWeights) -> None:
    local, start = held_rows(parameter)
    stop = start + len(local)
    whole = torch.empty(parameter.shape, device="meta")
    for piece in pieces:
        shape = tuple(piece.of(whole).shape)
        if piece.expert is None:
            local.copy_(stored.rows(piece.name, shape, start, stop))
        elif start <= piece.expert < stop:
            here = StoredPiece(piece.name, piece.expert - start, piece.rows)
            here.of(local).copy_(stored.rows(piece.name, shape, 0, shape[0]))


def held_rows(parameter: Tensor) -> tuple[Tensor, int]:
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


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, sharded or not, on the device that computes; collective."""
    if not isinstance(parameter, DTensor):
        return parameter
    # Shards that rest on the host cannot be gathered there: ranks are connected through their devices. What moves stays
    # the DTensor it was, which the annotation of ``to`` does not say.
    return cast("DTensor", parameter.to(parameter.device_mesh.device_type)).full_tensor()
