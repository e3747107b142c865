"""What tensors a model directory's configuration asks for, in memory and in Hugging Face files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn.errors import DataError
from chatlearn.models.family import family_of
from chatlearn.models.pretrained import FAULTS

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model_dir: Path) -> Shapes:
    """Every parameter as transformers has it in memory; one that is tied to another is named once.

    Built on the meta device: takes no memory, needs no weights, and no attention but transformers' own. Raises
    ``DataError`` where ``config.json`` describes no model.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except (*FAULTS, ArithmeticError) as error:  # the last where a size is 0
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{model_dir / 'config.json'}: describes no model that transformers can build ({reason}); copy it again "
            "from where the model comes from"
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stored_shapes(model_dir: Path) -> Shapes:
    """Every tensor under its name in Hugging Face files: experts one by one, a tied head left out."""
    family = family_of(model_dir)
    return {
        piece.name: tuple(piece.of(torch.empty(shape, device="meta")).shape)
        for name, shape in parameter_shapes(model_dir).items()
        for piece in family.pieces(name, shape)
    }
