"""Llama and models of its architecture: dense, no biases."""

from __future__ import annotations

from chatlearn.models.naming import ModelFamily

LLAMA = ModelFamily(architecture="LlamaForCausalLM", block_class="LlamaDecoderLayer")
