"""Runs with one checkpoint to convert, tiny and real, and what transformers makes of the result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.utils import logging

from chatlearn.checkpoint.adapters import AdapterRecord
from chatlearn.checkpoint.convert import ConversionReport, convert
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.models.family import FAMILIES
from chatlearn.models.lora import LoraSpec, is_adapter
from chatlearn.trainer.adapter import put_on

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONFIGS = {
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "untied": Qwen3Config(**SIZES, tie_word_embeddings=False),
    "moe": Qwen3MoeConfig(**SIZES, **MIXTURE, tie_word_embeddings=False),
}
ADAPTED = {"biases": Qwen2Config(**SIZES, tie_word_embeddings=False), "moe": CONFIGS["moe"]}
EMBEDDED = Path(__file__).parents[2] / "embedded" / "tiny_qwen3"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TOKENS = torch.arange(12).reshape(2, 6)


@dataclass(frozen=True)
class Run:
    """A run's output directory with one checkpoint, the base model it names, and the weights that were saved."""

    output: Path
    base: Path
    model: PreTrainedModel

    @property
    def checkpoints(self) -> Path:
        return self.output / "save_model" / "policy_trainer"

    @property
    def save_dir(self) -> Path:
        return self.output / "save_model" / "huggingface"

    def convert(self, groupgemm: bool = False, **changes: Path) -> ConversionReport:
        places = {"hf_dir": self.base, "ckpt_dir": self.checkpoints, "save_dir": self.save_dir, **changes}
        return convert(**places, iteration=7, groupgemm=groupgemm, dtype="float32")


def make_run(folder: Path, kind: str, groupgemm: bool = False) -> Run:
    logging.disable_progress_bar()
    torch.manual_seed(3)
    base = folder / "pretrained" / kind
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    model.save_pretrained(base)
    for name in COMPANIONS:
        shutil.copyfile(EMBEDDED / name, base / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    run = Run(folder / "output", base, model)
    files = save_shards(begin(run.checkpoints, 7), model, torch.optim.AdamW(model.parameters()))
    publish(run.checkpoints, Manifest(7, 7, str(base), type(model).__name__, groupgemm, num_ranks=1, files=files))
    return run


def make_adapted_run(folder: Path, kind: str, recorded: LoraSpec) -> Run:
    """A run that trained an adapter of rank 2, whatever its manifest says."""
    logging.disable_progress_bar()
    torch.manual_seed(4)
    base = folder / "pretrained" / kind
    model = AutoModelForCausalLM.from_config(ADAPTED[kind], dtype=torch.float32)
    architecture = type(model).__name__
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    put_on(model, FAMILIES[architecture], LoraSpec(rank=2, alpha=6.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3)
    run = Run(folder / "output", base, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    files = save_shards(begin(run.checkpoints, 7), model, torch.optim.AdamW(trained))
    adapter = AdapterRecord.of(recorded, base)
    publish(run.checkpoints, Manifest(7, 7, str(base), architecture, False, 1, files, adapter=adapter))
    return run


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
