"""What tensors a model directory's configuration asks for, in memory and in Hugging Face files."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn.errors import DataError
from chatlearn.models.family import family_of

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model_dir: Path) -> Shapes:
    """Every parameter as transformers has it in memory; one that is tied to another is named once.

    Built on the meta device: takes no memory, needs no weights.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(f"{model_dir / 'config.json'}: transformers cannot read it: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stored_shapes(model_dir: Path) -> Shapes:
    """Every tensor under its name in Hugging Face files: experts one by one, a tied head left out."""
    family = family_of(model_dir)
    return {
        piece.name: tuple(piece.of(torch.empty(shape, device="meta")).shape)
        for name, shape in parameter_shapes(model_dir).items()
        for piece in family.pieces(name, shape)
    }
