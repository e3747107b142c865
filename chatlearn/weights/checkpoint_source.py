"""The weights of a Hugging Face model directory: what an engine expects to be sent, and a source that can send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatlearn.errors import DataError
from chatlearn.models.naming import TIED_HEAD
from chatlearn.models.stored_weights import StoredWeights, is_weight
from chatlearn.weights.wire import TensorMeta


class CheckpointSource:
    """A ``WeightSource`` over safetensors files, in ``dtype``, without what a trainer does not send either.

    That is a head that is tied to the embedding, and buffers that are computed. Raises ``DataError`` for a directory
    without readable safetensors files.
    """

    def __init__(self, model_path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self._path = Path(model_path)
        self._dtype = dtype
        tied = is_tied(self._path)
        with StoredWeights(self._path) as stored:
            self._shapes = {name: stored.shape(name) for name in stored.files if is_sent(name, tied)}

    def metadata(self) -> list[TensorMeta]:
        """Names and shapes in the order of ``export_weights``, from the files' headers alone."""
        dtype = str(self._dtype).removeprefix("torch.")
        return [TensorMeta(name, dtype, shape) for name, shape in self._shapes.items()]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor at a time; the whole model is never in memory."""
        with StoredWeights(self._path) as stored:
            for name in self._shapes:
                yield name, stored.whole(name).to(self._dtype)


def expected_tensors(model_path: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor an update must bring to an engine that was started from ``model_path``."""
    return {meta.name: meta.shape for meta in CheckpointSource(model_path).metadata()}


def is_sent(name: str, tied: bool) -> bool:
    """Whether a trainer sends this tensor of the checkpoint."""
    return is_weight(name) and not (tied and name == TIED_HEAD)


def is_tied(model_path: Path) -> bool:
    """Whether the head shares the embedding's weight; then only the embedding travels."""
    config_file = model_path / "config.json"
    if not config_file.is_file():
        raise DataError(f"{config_file}: not found; point to a Hugging Face model directory")
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", False))
