"""Checkpoints as the original ChatLearn leaves them: one ``torch.save`` for each rank, of a state dict of DTensors.

``{iteration}/model_world_size_{W}_rank_{r}.pt`` holds rank r's rows of every float32 tensor, under the names that are
usual in Hugging Face files; FSDP2 deals rows in order, and the last ranks may have fewer or none. With groupgemm the
experts of a layer lie one below the other in ``mlp.group_mlp.{gate,up,down}_proj.weight``. Files of the optimizer and
of random states lie beside and are not opened. Made after files that torch 2.6 wrote (``tests/fixtures``).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from chatlearn.checkpoint.architecture import Shapes
from chatlearn.checkpoint.blocks import Block, Shard
from chatlearn.checkpoint.export import TensorSource
from chatlearn.checkpoint.fit import require_fit
from chatlearn.checkpoint.saved_file import DescribedTensor, describe
from chatlearn.checkpoint.saved_tensors import SavedTensors
from chatlearn.errors import CheckpointError
from chatlearn.models.naming import StoredPiece

RANK_FILE = re.compile(r"model_world_size_([1-9]\d*)_rank_(\d+)\.pt")
EXPERT = re.compile(r"(?P<layer>.+\.mlp)\.experts\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")
GROUPED = ".group_mlp."


def is_original(folder: Path) -> bool:
    """Whether the folder holds model files of the original's."""
    return folder.is_dir() and any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir())


def open_original(folder: Path) -> SavedTensors:
    """The tensors in such a folder. Raises ``CheckpointError`` where a rank's file is missing, damaged or disagrees."""
    ranks = [_read_rank(path) for path in _rank_files(folder)]
    names = [set(rank) for rank in ranks]
    for rank, found in enumerate(names):
        if found != names[0]:
            raise CheckpointError(f"{folder}: only some ranks have '{min(found ^ names[0])}', not all, see rank {rank}")
    shapes = {name: part.sizes for name, part in ranks[0].items()}
    shards = {name: _shards(folder, name, [rank[name] for rank in ranks]) for name in shapes}
    return SavedTensors(folder, shapes, shards)


def _rank_files(folder: Path) -> list[Path]:
    """The files in the order of their ranks, if they are those of one save."""
    found = {match: path for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
    sizes = {int(match[1]) for match in found}
    if len(sizes) > 1:
        raise CheckpointError(
            f"{folder}: holds model files of {' and of '.join(map(str, sorted(sizes)))} ranks; move those of the other "
            "save away"
        )
    (num_ranks,) = sizes
    by_rank = {int(match[2]): path for match, path in found.items()}
    for rank in range(num_ranks):
        if rank not in by_rank:
            raise CheckpointError(
                f"{folder}: model_world_size_{num_ranks}_rank_{rank}.pt is missing; the checkpoint is incomplete"
            )
    return [by_rank[rank] for rank in range(num_ranks)]


@dataclass(frozen=True)
class _Part:
    """What a rank has of a tensor: the sizes of the whole, and its rows, or all of it where nothing was cut."""

    sizes: tuple[int, ...]
    local: DescribedTensor
    is_cut: bool


class _Placeholder:
    """Stands for an object that a DTensor brings along; takes whatever the file says about it."""

    def __new__(cls, *_: object) -> _Placeholder:
        return super().__new__(cls)


class _Cut(_Placeholder):
    """Stands for torch's ``Shard``; ``dim`` comes from the file."""

    dim: int = -1


class _Spec(_Placeholder):
    """Stands for torch's ``DTensorSpec``."""

    placements: tuple[object, ...] = ()


def _whole_sizes(_kind: object, _dtype: object, sizes: tuple[int, ...], *_: object) -> tuple[int, ...]:
    """Stands for the function that builds an empty DTensor."""
    return tuple(sizes)


def _part(rebuild: object, _kind: object, arguments: tuple[Any, ...], state: object) -> _Part:
    """Stands for the function that gives a DTensor its local part."""
    match state:
        case (None, {"_local_tensor": DescribedTensor() as local, "_spec": _Spec() as spec}) if rebuild is _whole_sizes:
            whole = _whole_sizes(*arguments)
        case _:
            raise ValueError("it holds a tensor of another kind than FSDP's")
    match spec.placements:
        case (_Cut(dim=0),):
            return _Part(whole, local, is_cut=True)
        case (_Placeholder() as placement,) if not isinstance(placement, _Cut):
            return _Part(whole, local, is_cut=False)
        case _:
            raise ValueError("it holds a tensor that is cut otherwise than along its rows")


def _itself(data: object, *_: object) -> object:
    """Stands for the function that makes a parameter of a tensor."""
    return data


def _text(value: object = "", *_: object) -> str:
    """Stands for devices and layouts."""
    return str(value)


_STAND_INS: dict[tuple[str, str], object] = {
    ("torch", "Size"): tuple,
    ("torch", "device"): _text,
    ("torch.serialization", "_get_layout"): _text,
    ("torch._utils", "_rebuild_parameter"): _itself,
    ("torch._utils", "_rebuild_wrapper_subclass"): _whole_sizes,
    ("torch._tensor", "_rebuild_from_type_v2"): _part,
    ("torch.distributed.tensor", "DTensor"): _Placeholder,
    ("torch.distributed.tensor._dtensor_spec", "DTensorSpec"): _Spec,
    ("torch.distributed.tensor._dtensor_spec", "TensorMeta"): _Placeholder,
    ("torch.distributed.tensor.placement_types", "Shard"): _Cut,
    ("torch.distributed.tensor.placement_types", "Replicate"): _Placeholder,
    ("torch.distributed.device_mesh", "DeviceMesh"): _Placeholder,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float32, torch.bfloat16, torch.float16)},
}


def _read_rank(path: Path) -> dict[str, _Part]:
    """Every tensor in a rank's file, by name."""
    try:
        with path.open("rb") as file:
            content = describe(file, 0, path.stat().st_size, path, _STAND_INS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no state dict; it is not a model file of the original's")
    parts: dict[str, _Part] = {}
    for name, value in cast("dict[object, object]", content).items():
        if isinstance(value, DescribedTensor):
            parts[str(name)] = _Part(value.sizes, value, is_cut=False)
        elif isinstance(value, _Part):
            parts[str(name)] = value
    return parts


def _shards(folder: Path, name: str, parts: list[_Part]) -> tuple[Shard, ...]:
    """Where each rank's rows of one tensor are."""
    sizes = parts[0].sizes
    if any(part.sizes != sizes or part.is_cut != parts[0].is_cut for part in parts):
        raise CheckpointError(f"{folder}: the ranks do not agree about the shape of '{name}'; the save is damaged")
    shards: list[Shard] = []
    row = 0
    for part in parts if parts[0].is_cut else parts[:1]:
        local, numbers = part.local.sizes, part.local.numbers
        if len(local) != len(sizes) or local[1:] != sizes[1:]:
            raise CheckpointError(f"{numbers.path}: has {local} of '{name}', which is {sizes}; the save is damaged")
        offsets = (row, *[0] * (len(local) - 1)) if local else ()
        shards.append(Shard(numbers.path, Block(offsets, local), lambda numbers=numbers: numbers))
        row += local[0] if local else 0
    if sizes and row != sizes[0]:
        raise CheckpointError(f"{folder}: all ranks have {row} rows of '{name}', which has {sizes[0]}")
    return tuple(shards)


def trained_grouped(tensors: SavedTensors) -> bool:
    """Whether experts lie in groups."""
    return any(GROUPED in name for name in tensors.shapes)


def original_sources(folder: Path, tensors: SavedTensors, wanted: Shapes, base_dir: Path) -> dict[str, TensorSource]:
    """Where each tensor of a model directory is found; ``wanted`` are their names and shapes, as ``base_dir`` asks.

    Raises ``ConfigError`` where the checkpoint holds others.
    """
    sources: dict[str, TensorSource] = {}
    needed: Shapes = {}
    grouped = Counter(group for name in wanted if (group := _group(name)))
    for name, shape in wanted.items():
        group = _group(name)
        if name in tensors.shapes or group is None or group not in tensors.shapes:
            sources[name], needed[name] = TensorSource(name), shape
            continue
        first = int(EXPERT.fullmatch(name)["expert"]) * shape[0]  # pyright: ignore[reportOptionalSubscript] - a group
        sources[name] = TensorSource(group, StoredPiece(name, rows=(first, first + shape[0])))
        needed[group] = (grouped[group] * shape[0], *shape[1:])
    require_fit(folder, tensors.shapes, needed, base_dir)
    return sources


def _group(name: str) -> str | None:
    """The tensor in which groupgemm keeps an expert's weight.

    >>> _group("model.layers.0.mlp.experts.3.up_proj.weight")
    'model.layers.0.mlp.group_mlp.up_proj.weight'
    """
    match = EXPERT.fullmatch(name)
    return None if match is None else f"{match['layer']}{GROUPED}{match['projection']}_proj.weight"
