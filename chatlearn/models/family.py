"""Which model families we know, and which of them a model directory belongs to.

To support a model, copy ``qwen3.py``, change its record, and add it to ``FAMILIES``; the family contract test then
checks names, shapes and numbers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chatlearn.errors import DataError
from chatlearn.models.llama import LLAMA
from chatlearn.models.naming import ModelFamily
from chatlearn.models.qwen2 import QWEN2
from chatlearn.models.qwen3 import QWEN3
from chatlearn.models.qwen3_moe import QWEN3_MOE

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES: dict[str, ModelFamily] = {family.architecture: family for family in (QWEN3, QWEN3_MOE, QWEN2, LLAMA)}


def family_of(model_dir: Path) -> ModelFamily:
    """The family of a Hugging Face model directory, by the architecture that its ``config.json`` names."""
    architecture = _architecture(model_dir)
    if architecture not in FAMILIES:
        raise DataError(
            f"{model_dir / 'config.json'}: architecture {architecture} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]


def _architecture(model_dir: Path) -> str:
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise DataError(f"{model_dir}: there is no such model directory; download the model or correct the path")
    if not path.is_file():
        raise DataError(f"{model_dir}: no config.json in it; give the directory of a Hugging Face model")
    try:
        match json.loads(path.read_text(encoding="utf-8")):
            case {"architectures": [str(architecture), *_]}:
                return architecture
            case _:
                raise DataError(f"{path}: no 'architectures' in it; it does not describe a Hugging Face model")
    except ValueError as error:  # not JSON, or not text
        raise DataError(f"{path}: not readable as JSON ({error}); download the model again") from error
