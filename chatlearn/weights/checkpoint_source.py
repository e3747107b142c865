"""The tensors of a Hugging Face model directory: what an engine expects to be sent, and a source that can send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatlearn.errors import DataError
from chatlearn.weights.wire import TensorMeta

# Buffers that old checkpoints store and every model computes for itself.
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)

TIED_HEAD = "lm_head.weight"


class CheckpointSource:
    """A ``WeightSource`` over safetensors files, in ``dtype``, without what a trainer does not send either.

    That is a head that is tied to the embedding, and buffers that are computed. Raises ``DataError`` for a directory
    without readable safetensors files.
    """

    def __init__(self, model_path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self._path = Path(model_path)
        self._dtype = dtype
        files = sorted(self._path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{self._path}: there are no *.safetensors files; point to a Hugging Face model directory")
        tied = is_tied(self._path)
        self._files: dict[Path, dict[str, tuple[int, ...]]] = {
            file: {name: shape for name, shape in read_shapes(file).items() if is_sent(name, tied)} for file in files
        }

    def metadata(self) -> list[TensorMeta]:
        """Names and shapes in the order of ``export_weights``, from the files' headers alone."""
        dtype = str(self._dtype).removeprefix("torch.")
        return [TensorMeta(name, dtype, shape) for names in self._files.values() for name, shape in names.items()]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor at a time; the whole model is never in memory."""
        for file, names in self._files.items():
            with open_safetensors(file) as tensors:
                for name in names:
                    yield name, tensors.get_tensor(name).to(self._dtype)


def expected_tensors(model_path: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor an update must bring to an engine that was started from ``model_path``."""
    return {meta.name: meta.shape for meta in CheckpointSource(model_path).metadata()}


def is_sent(name: str, tied: bool) -> bool:
    """Whether a trainer sends this tensor of the checkpoint."""
    return not name.endswith(COMPUTED_SUFFIXES) and not (tied and name == TIED_HEAD)


def is_tied(model_path: Path) -> bool:
    """Whether the head shares the embedding's weight; then only the embedding travels."""
    config_file = model_path / "config.json"
    if not config_file.is_file():
        raise DataError(f"{config_file}: not found; point to a Hugging Face model directory")
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", False))


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a file's header."""
    with open_safetensors(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def open_safetensors(file: Path) -> Any:
    """A safetensors file, opened lazily; it is a context manager (its stubs do not say so, hence ``Any``)."""
    try:
        return cast("Any", safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a readable safetensors file ({error})") from error
