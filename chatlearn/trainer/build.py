"""From a model directory to a module that is split over ranks and holds the checkpoint's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn.models.attention import PACKED_ATTENTION, register_packed_attention
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.trainer.load import fill
from chatlearn.trainer.parallel import ParallelPlan, device_mesh
from chatlearn.trainer.token_scorer import TokenScorer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig

    from chatlearn.device import DtypeName
    from chatlearn.models.naming import ModelFamily

# Which activations the backward pass finds again by computing them anew.
Checkpointing = Literal["off", "selective", "full"]

DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how to compute with it.

    ``temperature`` divides the logits, as it does in the engine that samples. ``meta_init`` builds the module without
    memory and lets each rank read only its own shard; otherwise each rank builds the whole model on the host first.
    A model smaller than ``whole_below_bytes`` stays gathered between forward and backward and between micro-batches:
    that costs a copy of weights and gradients, and saves most of the communication.
    """

    path: Path
    compute_dtype: DtypeName = "float32"
    temperature: float = 1.0
    checkpointing: Checkpointing = "full"
    grouped_experts: bool = False
    meta_init: bool = False
    trust_remote_code: bool = False
    whole_below_bytes: int = 2**30  # one GiB: no matter on a GPU, and all of the time on a laptop's Gloo


def build(
    spec: ModelSpec, family: ModelFamily, plan: ParallelPlan, device: torch.device, *, trainable: bool
) -> TokenScorer:
    """The sharded module on ``device``, with the weights of ``spec.path``.

    Weights to train are float32 masters whatever the compute dtype; frozen ones are stored as they are computed with.
    """
    compute_dtype = DTYPES[spec.compute_dtype]
    scorer = assemble(spec, family, torch.float32 if trainable else compute_dtype)
    scorer.requires_grad_(trainable)
    mesh = device_mesh(plan)
    keep_whole = is_small(scorer, spec)
    with StoredWeights(spec.path) as stored:
        if spec.meta_init:
            shard(scorer, family, mesh, compute_dtype, keep_whole=keep_whole)
            materialise(scorer, device)
            fill(scorer, family, stored)
        else:
            materialise(scorer, torch.device("cpu"))
            fill(scorer, family, stored)
            shard(scorer, family, mesh, compute_dtype, keep_whole=keep_whole)
    return scorer


def assemble(spec: ModelSpec, family: ModelFamily, dtype: torch.dtype) -> TokenScorer:
    """The module without memory for its weights: shapes and code only."""
    register_packed_attention()
    config: PreTrainedConfig = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    options: dict[str, str] = {}
    if family.experts is not None:
        options["experts_implementation"] = "grouped_mm" if spec.grouped_experts else "eager"
    with torch.device("meta"):
        causal_model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=PACKED_ATTENTION, **options
        )
    if spec.checkpointing != "off":
        # Nothing in the model is random, so no generator's state need be kept for the second forward.
        causal_model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return TokenScorer(causal_model, spec.temperature)


def is_small(module: nn.Module, spec: ModelSpec) -> bool:
    """Whether the model is kept gathered during a step."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters()) < spec.whole_below_bytes


def materialise(scorer: TokenScorer, device: torch.device) -> None:
    """Give parameters memory, with no values yet, and buffers their values."""
    scorer.to_empty(device=device)
    scorer.rebuild_rotary_embedding(device)
    unknown = [name for name, _ in scorer.named_buffers() if not name.startswith("model.rotary_emb.")]
    assert not unknown, f"buffers {unknown} have no values; teach TokenScorer to rebuild them"


def shard(
    scorer: TokenScorer, family: ModelFamily, mesh: DeviceMesh, compute_dtype: torch.dtype, *, keep_whole: bool
) -> None:
    """Split the module over the mesh, block by block, and let gradients be summed over all ranks.

    Whatever lies outside the blocks is gathered for the whole of a step, since the head is needed at its end.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    blocks = [module for module in scorer.modules() if type(module).__name__ == family.block_class]
    assert blocks, f"{family.architecture} has no {family.block_class}; correct the record of the family"
    if scorer.lm_head is not None:  # a tied embedding is the head's weight and must be there for as long
        blocks.append(scorer.model.get_input_embeddings())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_whole)
    fully_shard(scorer, mesh=mesh, mp_policy=policy)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # The denominator is global, so gradients are summed, not averaged. Gloo can only sum; without the second
            # call FSDP would ask it for a scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)
