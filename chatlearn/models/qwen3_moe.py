"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the feed-forward layer."""

from __future__ import annotations

from chatlearn.models.naming import ExpertLayout, ModelFamily

QWEN3_MOE = ModelFamily(
    architecture="Qwen3MoeForCausalLM",
    block_class="Qwen3MoeDecoderLayer",
    experts=ExpertLayout(
        router="mlp.gate",
        gate_up="mlp.experts.gate_up_proj",
        down="mlp.experts.down_proj",
        stored_gate="mlp.experts.{expert}.gate_proj.weight",
        stored_up="mlp.experts.{expert}.up_proj.weight",
        stored_down="mlp.experts.{expert}.down_proj.weight",
    ),
)
