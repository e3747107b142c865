"""A capsule of a random tiny model, written as a run writes it, but for the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from chatlearn.checkpoint.capsule import CapsuleFacts, begin_capsule, publish_capsule, write_weights
from chatlearn.checkpoint.sharded import save_random_states
from chatlearn.config.read import read_config
from chatlearn.config.text import resolved_text
from chatlearn.records import Sample

ROOT = Path(__file__).resolve().parents[2]
TINY = Qwen3Config(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


def one_sample(uid: str = "a", length: int = 5) -> Sample:
    """An answer of all but two of the tokens."""
    mask = np.arange(length) >= 2
    numbers = np.where(mask, np.linspace(-2, -1, length), 0).astype(np.float32)
    return Sample(uid, np.arange(length, dtype=np.int32), mask, numbers, np.where(mask, 0.5, 0).astype(np.float32))


def write_capsule(root: Path, facts: CapsuleFacts, samples: Sequence[Sample], words: Sequence[str] = ()) -> Path:
    """Record a step of a run with the quickstart's configuration and these overrides."""
    logging.disable_progress_bar()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(TINY, dtype=torch.float32)
    base = root / "base"
    model.save_pretrained(base)
    staging = begin_capsule(root, facts.iteration)
    write_weights(staging, model.named_parameters(), (), base)
    save_random_states(staging, model)
    config = read_config(ROOT / "template" / "quickstart.yaml", [f"models.policy_trainer.load={base}", *words])
    return publish_capsule(root, replace(facts, num_ranks=1), samples, resolved_text(config))
