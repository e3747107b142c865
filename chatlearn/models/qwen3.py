"""Qwen3: dense, with normalised queries and keys."""

from __future__ import annotations

from chatlearn.models.naming import ModelFamily

QWEN3 = ModelFamily(architecture="Qwen3ForCausalLM", block_class="Qwen3DecoderLayer")
