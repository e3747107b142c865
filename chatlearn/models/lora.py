"""What a low-rank adapter is (LoRA, arXiv:2106.09685), and how peft calls its weights beside those it adapts.

An adapted layer computes with ``W + (alpha / rank) B A``: ``W`` is the frozen base, ``A`` ``[rank, in]`` and ``B``
``[out, rank]`` are trained. Everybody outside the trainer sees the sum, under the name that ``W`` is stored by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".weight"
_BASE_WEIGHT = ".base_layer.weight"
_BASE_BIAS = ".base_layer.bias"
_A = ".lora_A.default.weight"
_B = ".lora_B.default.weight"


@dataclass(frozen=True)
class LoraSpec:
    """Which layers get an adapter, and of what rank.

    ``target_modules`` are last names of linear layers in the decoder's blocks (``q_proj``); none means all of them. The
    experts of a mixture and its router are not linear layers, so there only attention is adapted. There is no dropout:
    a step must not depend on how its batch was cut.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"lora.{name}={value} must be {wanted}"
            for name, value, wanted, right in (
                ("rank", self.rank, "at least 1", self.rank >= 1),
                ("alpha", self.alpha, "more than 0", self.alpha > 0),
            )
            if not right
        ]
        if problems:
            raise ConfigError(*problems)

    @property
    def scaling(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Factors:
    """The names of the two factors that belong to one weight."""

    a: str
    b: str

    @staticmethod
    def of(weight_name: str) -> Factors:
        """Those of a weight, whether it is called as in memory or as it is stored.

        >>> Factors.of("model.layers.0.self_attn.q_proj.base_layer.weight").a
        'model.layers.0.self_attn.q_proj.lora_A.default.weight'
        """
        layer = without_adapter(weight_name).removesuffix(_WEIGHT)
        return Factors(layer + _A, layer + _B)


def without_adapter(name: str) -> str:
    """A base parameter's name as it would be without the adapter around it.

    >>> without_adapter("model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    for adapted, plain in ((_BASE_WEIGHT, _WEIGHT), (_BASE_BIAS, ".bias")):
        if name.endswith(adapted):
            return name.removesuffix(adapted) + plain
    return name


def is_adapter(name: str) -> bool:
    """Whether this parameter belongs to the adapter."""
    return name.endswith((_A, _B))


def starts_at_zero(name: str) -> bool:
    """Whether this parameter of the adapter is zero at first: ``B``, so that training starts at the base."""
    return name.endswith(_B)


def merged(weight: Tensor, a: Tensor, b: Tensor, spec: LoraSpec) -> Tensor:
    """``W + (alpha / rank) B A`` in float32; all whole."""
    return weight.float().addmm(b.float(), a.float(), alpha=spec.scaling)
