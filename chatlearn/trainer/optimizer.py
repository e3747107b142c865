"""AdamW over sharded parameters, the clipping of gradients by their global norm, and one step of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from chatlearn.trainer.rounded_adamw import RoundedAdamW
from chatlearn.trainer.schedule import CONSTANT, Schedule, learning_rate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatlearn.device import DtypeName


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (arXiv:1711.05101) with a learning rate that ``schedule`` leads from and to.

    ``clip_grad`` bounds the L2 norm of the whole gradient; 0 leaves it as it is. ``state_dtype`` is that of the two
    moments between steps. Without ``decay_norms_and_biases`` one-dimensional parameters are not drawn to zero.
    """

    lr: float
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_grad: float = 1.0
    decay_norms_and_biases: bool = True
    state_dtype: DtypeName = "float32"
    schedule: Schedule = CONSTANT


def build_optimizer(parameters: Iterable[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW for those of the parameters that are trained; its state is sharded as they are."""
    optimizer_class = torch.optim.AdamW if spec.state_dtype == "float32" else RoundedAdamW
    return optimizer_class(
        parameter_groups(parameters, spec),
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        fused=True,  # one kernel for all parameters; the default dispatches ten operators for each
    )


def parameter_groups(parameters: Iterable[torch.nn.Parameter], spec: OptimizerSpec) -> list[dict[str, object]]:
    """Parameters that decay and, apart from them, those that do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decays = [spec.decay_norms_and_biases or parameter.ndim > 1 for parameter in trained]
    decaying = [parameter for parameter, decay in zip(trained, decays, strict=True) if decay]
    resting = [parameter for parameter, decay in zip(trained, decays, strict=True) if not decay]
    groups = ((decaying, spec.weight_decay), (resting, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """L2 norm of the whole gradient over all ranks, the same number on each; collective."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not isinstance(norm, DTensor):
        return float(norm)
    # Gradients may rest on the host, where the ranks' connection does not reach.
    here = norm.to_local().to(norm.device_mesh.device_type)
    return float(DTensor.from_local(here, norm.device_mesh, norm.placements).full_tensor())


def apply_gradients(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, iteration: int) -> float:
    """Clip, take step ``iteration`` of the schedule, forget the gradients; the result is the norm before clipping.

    Collective. A gradient with an infinite or undefined norm would destroy weights and moments: then no step is taken,
    on any rank, and the returned norm says so.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(spec.lr, spec.schedule, iteration)
    norm = gradient_norm(parameters)
    if math.isfinite(norm):
        if 0 < spec.clip_grad < norm:
            clip_grads_with_norm_(parameters, spec.clip_grad, torch.tensor(norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
