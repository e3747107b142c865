"""AdamW over sharded parameters, and the clipping of gradients by their global norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (arXiv:1711.05101) with a constant learning rate; weight decay applies to all parameters.

    ``clip_grad`` bounds the L2 norm of the whole gradient; 0 leaves it as it is.
    """

    lr: float
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_grad: float = 1.0


def build_optimizer(parameters: Iterable[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW whose state is sharded as the parameters are."""
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        weight_decay=spec.weight_decay,
        fused=True,  # one kernel for all parameters; the default dispatches ten operators for each
    )


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """L2 norm of the whole gradient over all ranks, the same number on each; collective."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def apply_gradients(optimizer: torch.optim.Optimizer, spec: OptimizerSpec) -> float:
    """Clip, take one step, forget the gradients; the result is the norm before clipping. Collective.

    A gradient with an infinite or undefined norm would destroy weights and moments: then no step is taken, on any
    rank, and the returned norm says so.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = gradient_norm(parameters)
    if math.isfinite(norm):
        if 0 < spec.clip_grad < norm:
            clip_grads_with_norm_(parameters, spec.clip_grad, torch.tensor(norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
