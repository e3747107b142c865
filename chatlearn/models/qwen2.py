"""Qwen2 and Qwen2.5: dense, with biased queries, keys and values."""

from __future__ import annotations

from chatlearn.models.naming import ModelFamily

QWEN2 = ModelFamily(architecture="Qwen2ForCausalLM", block_class="Qwen2DecoderLayer")
