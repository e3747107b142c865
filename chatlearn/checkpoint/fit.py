"""Whether the tensors of a checkpoint are those that a base model's configuration asks for: no fewer, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from chatlearn.checkpoint.architecture import Shapes
from chatlearn.checkpoint.loaded_back import CONFIG_NAME
from chatlearn.checkpoint.saved_tensors import SavedTensors
from chatlearn.errors import ConfigError
from chatlearn.models.naming import EMBEDDING, TIED_HEAD, StoredPiece
from chatlearn.models.stored_weights import is_weight

COMPARED_NUMBERS: Final = 1024 * 1024  # of head and embedding at a time: a head alone may be larger than an output file


def misfit(found: Mapping[str, tuple[int, ...]], wanted: Shapes) -> str:
    """The first tensor that is missing or has another shape; nothing where all are there."""
    for name, shape in wanted.items():
        if name not in found:
            return f"has no '{name}', which the base model's configuration asks for"
        if found[name] != shape:
            return f"'{name}' has shape {found[name]}; the base model's is {shape}"
    return ""


def require_fit(folder: Path, found: Mapping[str, tuple[int, ...]], wanted: Shapes, base_dir: Path) -> None:
    """Raise ``ConfigError`` unless the checkpoint of a whole model holds exactly the tensors that ``base_dir`` wants.

    A tensor too many is a part of the trained model that would be lost. Two kinds are none: what a model computes for
    itself, and the head of a tied model, which is saved too (see ``require_tied_head``).
    """
    fault = misfit(found, wanted) or _too_many(found, wanted)
    if fault:
        raise ConfigError(
            f"{folder}: {fault} ({base_dir / CONFIG_NAME}); give the model that training started from as --hf_dir"
        )


def _too_many(found: Iterable[str], wanted: Shapes) -> str:
    known = wanted.keys() | ({TIED_HEAD} if _is_tied(wanted) else set())
    strangers = sorted(filter(is_weight, set(found) - known))
    if not strangers:
        return ""
    others = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
    return f"holds '{strangers[0]}'{others}, which the base model's configuration does not ask for"


def _is_tied(wanted: Shapes) -> bool:
    return EMBEDDING in wanted and TIED_HEAD not in wanted


def require_tied_head(tensors: SavedTensors, wanted: Shapes, base_dir: Path) -> None:
    """Refuse a head that is not the embedding where the base model says it is; without one it would be lost.

    The original made such heads, all zeros, of tied models that it loaded with ``meta_init``.
    """
    if not _is_tied(wanted) or TIED_HEAD not in tensors.shapes:
        return
    pairs = zip(_parts(tensors, TIED_HEAD), _parts(tensors, EMBEDDING), strict=True)
    if tensors.shapes[TIED_HEAD] == tensors.shapes[EMBEDDING] and all(torch.equal(*pair) for pair in pairs):
        return
    is_empty = not any(part.any() for part in _parts(tensors, TIED_HEAD))
    zeros = " (all zeros: meta_init lost it when training began)" if is_empty else ""
    raise ConfigError(
        f"--hf_dir {base_dir}: ties the output head to the embedding, but the checkpoint has a head of its own"
        f"{zeros}; to keep it, set tie_word_embeddings to false in the config.json of a copy of the base model"
    )


def _parts(tensors: SavedTensors, name: str) -> Iterable[Tensor]:
    """A matrix in its order, some rows at a time."""
    num_rows, *width = tensors.shapes[name]
    step = max(COMPARED_NUMBERS // max(prod(width), 1), 1)
    for begin in range(0, num_rows, step):
        rows = (begin, min(begin + step, num_rows))
        yield tensors.read(name, torch.float32, StoredPiece(name, rows=rows))
