"""How much of a model one token meets: what utilisation and the balance of micro-batches are computed from."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from chatlearn.models.naming import EMBEDDING, ModelFamily

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig


def share_met(name: str, family: ModelFamily, described: PreTrainedConfig) -> float:
    """The share of a parameter that multiplies a token: all, none of a looked-up embedding, or its experts' part."""
    if name == EMBEDDING and not described.tie_word_embeddings:
        return 0.0
    if family.experts is not None and name.endswith((family.experts.gate_up, family.experts.down)):
        return described.num_experts_per_tok / described.num_experts
    return 1.0


def parameters_met(shapes: Mapping[str, tuple[int, ...]], family: ModelFamily, described: PreTrainedConfig) -> int:
    """How many weights multiply one token; ``shapes`` are those of all parameters, by their names in memory."""
    return round(sum(prod(shape) * share_met(name, family, described) for name, shape in shapes.items()))


def attention_width(described: PreTrainedConfig) -> int:
    """Numbers of all heads of one token in one layer."""
    known = described.to_dict()  # Not every family declares a head's size.
    return known["num_attention_heads"] * (
        known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
    )
