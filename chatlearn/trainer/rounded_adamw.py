"""AdamW whose moments rest in bfloat16, which halves the memory of its state, and are computed with in float32."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for the means of gradients and of their squares

# Numbers of which both moments are in float32 at a time: with the noise 32 MB, however large a parameter is.
CHUNK = 2**21

LOW_BITS = 16  # that bfloat16 has less than float32


class RoundedAdamW(torch.optim.AdamW):
    """Moments are rounded at random after each step, up or down by how near they are, so that none is lost on average.

    Rounding to the nearest would stand still: bfloat16 tells numbers apart that differ by 1 / 128, and a mean with
    ``beta2 = 0.999`` moves by 1 / 1000 of the difference. The draws follow from the number of the step alone: replicas
    of a shard draw the same, and a resumed run goes on exactly. Every chunk of a step uses the same draws: it does no
    harm when two weights are rounded up together, and random numbers cost more than the rest of the step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; there is no closure to evaluate anything again."""
        due: list[tuple[dict[str, Any], Tensor]] = []
        for group in self.param_groups:
            due.extend((group, parameter) for parameter in group["params"] if parameter.grad is not None)
        for _, parameter in due:
            if not self.state[parameter]:
                self.state[parameter] = _first_state(parameter)
        if due:
            noise = _noise(self.state[due[0][1]]["step"], max(_flat(parameter).numel() for _, parameter in due))
            for group, parameter in due:
                _update(parameter, self.state[parameter], group, noise)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would widen the moments to the parameters' dtype: here they stay, or become, bfloat16."""
        saved = state_dict["state"]
        counts = {key: {"step": state["step"]} for key, state in saved.items()}
        super().load_state_dict({**state_dict, "state": counts})
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            if key in saved:
                for name in MOMENTS:
                    self.state[parameter][name] = saved[key][name].to(device=parameter.device, dtype=torch.bfloat16)


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS}}


def _noise(step: Tensor, longest: int) -> Tensor:
    """The draws of a step, [moment, number]."""
    generator = torch.Generator(step.device).manual_seed(int(step))
    shape = (len(MOMENTS), min(longest, CHUNK))
    return torch.randint(0, 2**LOW_BITS, shape, generator=generator, dtype=torch.int32, device=step.device)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], noise: Tensor) -> None:
    """One step of one parameter, in chunks; all numbers of it are independent of each other."""
    assert parameter.grad is not None, "only parameters with a gradient are due"
    stored = (parameter, parameter.grad, *(state[name] for name in MOMENTS))
    beta1, beta2 = group["betas"]
    for weights, gradient, *moments in zip(*(_flat(tensor).split(CHUNK) for tensor in stored), strict=True):
        wide = [moment.float() for moment in moments]
        adamw(
            [weights],
            [gradient],
            wide[:1],
            wide[1:],
            [],
            [state["step"].clone()],  # it is counted up once for each call
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for moment, exact, draws in zip(moments, wide, noise, strict=True):
            round_at_random_(exact, draws[: len(exact)])
            moment.copy_(exact)
    state["step"] += 1


def _flat(tensor: Tensor) -> Tensor:
    """All numbers that this rank holds, as a view [n]."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def round_at_random_(values: Tensor, draws: Tensor) -> None:
    """Turn float32 in place into numbers that bfloat16 has: one of the two neighbours, each as likely as it is near.

    In a float the bits below the cut are the distance from the lower neighbour: a random number of as many bits added
    to them carries over exactly that often.
    """
    values.view(torch.int32).add_(draws).bitwise_and_(-(2**LOW_BITS))
