"""Random tiny models, written as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

VOCABULARY = 97

# Far larger than in real models, so that logits differ and a wrong attention or head cannot go unnoticed.
INITIALIZER_RANGE = 0.2

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": INITIALIZER_RANGE,
}
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


# Heads that are dealt to ranks in other ways: a key head for all, and as many key heads as no group of ranks has.
ONE_KEY_HEAD = SIZES | {"num_key_value_heads": 1}
THREE_KEY_HEADS = SIZES | {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}


def write_all(folder: Path) -> dict[str, Path]:
    """Dense with a tied head in one file, dense with a head of its own in several, a mixture, and other families."""
    logging.disable_progress_bar()
    return {
        "tied": write(Qwen3Config(**SIZES, tie_word_embeddings=True), folder / "tied", "1GB"),
        "untied": write(Qwen3Config(**SIZES, tie_word_embeddings=False), folder / "untied", "20KB"),
        "moe": write(Qwen3MoeConfig(**SIZES, **MIXTURE, tie_word_embeddings=False), folder / "moe", "1GB"),
        "qwen2": write(Qwen2Config(**THREE_KEY_HEADS, tie_word_embeddings=True), folder / "qwen2", "1GB"),
        "llama": write(LlamaConfig(**ONE_KEY_HEAD, tie_word_embeddings=False), folder / "llama", "1GB"),
    }


def write(config: PreTrainedConfig, folder: Path, max_shard_size: str) -> Path:
    """A random model of this configuration, the same at every call."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
