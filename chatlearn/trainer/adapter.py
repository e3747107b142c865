"""LoRA on a decoder, through peft: put on, given its first values, switched off, carried from model to model.

The adapter's two factors are float32 whatever the base is stored in, and only they are trained. Their first values
follow from their names alone, so they are the same on any number of ranks and however the module was built.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.lora import is_adapter, starts_at_zero
from chatlearn.trainer.load import held_rows, whole

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from transformers import PreTrainedModel

    from chatlearn.models.lora import LoraSpec
    from chatlearn.models.naming import ModelFamily


def put_on(causal_model: PreTrainedModel, family: ModelFamily, spec: LoraSpec) -> None:
    """Wrap the chosen linear layers; nothing else changes, and ``initialise`` gives the adapter its values.

    Raises ``ConfigError`` for a name that no linear layer of the decoder's blocks has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType] - peft only divides it by the rank
        target_modules=_targets(causal_model, family, spec),
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, causal_model.model)
    for name, parameter in causal_model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def _targets(causal_model: PreTrainedModel, family: ModelFamily, spec: LoraSpec) -> list[str]:
    """The last names of the layers to adapt, after a look at what there is."""
    blocks = (module for module in causal_model.modules() if type(module).__name__ == family.block_class)
    present = sorted(
        {
            name.rpartition(".")[2]
            for block in blocks
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    unknown = [name for name in spec.target_modules if name not in present]
    if unknown:
        raise ConfigError(
            f"models.policy_trainer.lora.target_modules: the blocks of {family.architecture} have no linear layer "
            f"called {' or '.join(unknown)}; they have {', '.join(present)} (experts and routers cannot be adapted)"
        )
    return sorted(set(spec.target_modules)) or present


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Give the adapter of ``module``, sharded or not, its first values: this rank's rows of them."""
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            _take_rows(parameter, first_values(name, tuple(parameter.shape)))


def first_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a factor begins with, whole: ``B`` with zeros, ``A`` with uniform numbers, as peft draws them.

    The bound ``1 / sqrt(in)`` is that of a new linear layer of torch; the seed is the parameter's name.
    """
    if starts_at_zero(name):
        return torch.zeros(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def _take_rows(parameter: Tensor, whole: Tensor) -> None:
    local, start = held_rows(parameter)
    local.copy_(whole[start : start + len(local)])


@contextmanager
def adapter_off(module: nn.Module) -> Generator[None]:
    """Inside, the module is its base. Not for a backward pass."""
    _switch(module, enabled=False)
    try:
        yield
    finally:
        _switch(module, enabled=True)


def _switch(module: nn.Module, *, enabled: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    # peft freezes what it switches off, and thaws what it switches on. Who is trained is not its business here, and
    # FSDP looks at it in the first forward to decide what it will reduce ever after.
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)


@torch.no_grad()
def adapter_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every factor whole, float32 on the host, under its name in memory; collective."""
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            yield name, whole(parameter).float().cpu()


@torch.no_grad()
def load_adapter(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter the values that ``adapter_weights`` of the same kind of model yielded.

    Raises ``CheckpointError``, before anything changed, when they are not those of this adapter.
    """
    factors = {name: parameter for name, parameter in module.named_parameters() if is_adapter(name)}
    strangers = sorted(factors.keys() ^ tensors.keys())
    if strangers:
        raise CheckpointError(f"the adapter that was kept and the one of this model differ, first in '{strangers[0]}'")
    for name, parameter in factors.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"'{name}' was kept with shape {tuple(tensors[name].shape)}; this model's has {tuple(parameter.shape)}"
            )
    for name, parameter in factors.items():
        _take_rows(parameter, tensors[name])
