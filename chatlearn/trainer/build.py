"""From a model directory to a module that is split over ranks and holds the checkpoint's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn.models.attention import PACKED_ATTENTION, register_packed_attention
from chatlearn.models.lora import LoraSpec, is_adapter
from chatlearn.models.positions import require_fixed_frequencies
from chatlearn.models.router_replay import watch_routers
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.trainer.adapter import initialise, put_on
from chatlearn.trainer.load import fill
from chatlearn.trainer.parallel import ParallelPlan, device_mesh
from chatlearn.trainer.recompute import Checkpointing, checkpoint_blocks
from chatlearn.trainer.token_scorer import TokenScorer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig

    from chatlearn.device import DtypeName
    from chatlearn.models.naming import ModelFamily

HOST = torch.device("cpu")

DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how to compute with it.

    ``temperature`` divides the logits, as it does in the engine that samples. ``meta_init`` builds the module without
    memory and lets each rank read only its own shard; otherwise each rank builds the whole model on the host first.
    ``on_host`` leaves shards, their gradients and so the optimizer in host memory also during a step: each block comes
    to the device while it is used. With ``lora`` only an adapter is trained, and the model itself is frozen.
    A model smaller than ``whole_below_bytes`` stays gathered between forward and backward and between micro-batches:
    that costs a copy of weights and gradients, and saves most of the communication. With ``router_replay`` tokens go to
    the experts that the micro-batch names, where it names any.
    """

    path: Path
    compute_dtype: DtypeName = "float32"
    temperature: float = 1.0
    checkpointing: Checkpointing = "full"
    grouped_experts: bool = False
    meta_init: bool = False
    on_host: bool = False
    lora: LoraSpec | None = None
    router_replay: bool = False
    trust_remote_code: bool = False
    whole_below_bytes: int = 2**30  # one GiB: no matter on a GPU, and all of the time on a laptop's Gloo


def build(
    spec: ModelSpec, family: ModelFamily, plan: ParallelPlan, device: torch.device, *, trainable: bool
) -> TokenScorer:
    """The sharded module on ``device``, with the weights of ``spec.path``.

    Weights to train are float32 masters whatever the compute dtype; frozen ones are stored as they are computed with.
    """
    trains_all = trainable and spec.lora is None
    scorer = assemble(spec, family, torch.float32 if trains_all else DTYPES[spec.compute_dtype])
    for name, parameter in scorer.named_parameters():
        parameter.requires_grad_(trains_all or (trainable and is_adapter(name)))
    mesh = device_mesh(plan)
    with StoredWeights(spec.path) as stored:
        if spec.meta_init:
            shard(scorer, family, mesh, spec)
            materialise(scorer, HOST if spec.on_host else device)
            fill(scorer, family, stored)
        else:
            materialise(scorer, HOST)
            fill(scorer, family, stored)
            shard(scorer, family, mesh, spec)
    initialise(scorer)
    scorer.rebuild_rotary_embedding(device)  # which is where it is needed, wherever the shards are
    return scorer


def assemble(spec: ModelSpec, family: ModelFamily, dtype: torch.dtype) -> TokenScorer:
    """The module without memory for its weights: shapes and code only."""
    register_packed_attention()
    config: PreTrainedConfig = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    require_fixed_frequencies(config, spec.path)
    options: dict[str, str] = {}
    if family.experts is not None:
        options["experts_implementation"] = "grouped_mm" if spec.grouped_experts else "eager"
    with torch.device("meta"):
        causal_model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=PACKED_ATTENTION, **options
        )
        if spec.lora is not None:
            put_on(causal_model, family, spec.lora)
    if family.experts is not None:
        watch_routers(causal_model, family.experts)
    checkpoint_blocks(causal_model, spec.checkpointing)
    return TokenScorer(causal_model, spec.temperature)


def is_small(module: nn.Module, spec: ModelSpec) -> bool:
    """Whether the model is kept gathered during a step."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters()) < spec.whole_below_bytes


def materialise(scorer: TokenScorer, memory: torch.device) -> None:
    """Give parameters and buffers memory, with no values yet; a parameter that is sharded takes that of its shard."""
    scorer.to_empty(device=memory)
    unknown = [name for name, _ in scorer.named_buffers() if not name.startswith("model.rotary_emb.")]
    assert not unknown, f"buffers {unknown} have no values; teach TokenScorer to rebuild them"


def shard(scorer: TokenScorer, family: ModelFamily, mesh: DeviceMesh, spec: ModelSpec) -> None:
    """Split the module over the mesh, block by block, and let gradients be summed over all ranks.

    A block is gathered for its forward and again for its backward, but for the last one: its backward comes first, so
    it is not let go in between. What lies outside the blocks is gathered for a whole step, since the head is needed at
    its end; an embedding of its own only for the forward, because a look-up has no use for weights on the way back.
    """
    blocks = [module for module in scorer.modules() if type(module).__name__ == family.block_class]
    assert blocks, f"{family.architecture} has no {family.block_class}; correct the record of the family"
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[spec.compute_dtype], reduce_dtype=torch.float32)
    offload = _offload_policy(mesh, spec)
    let_go = not is_small(scorer, spec)
    for block in blocks:
        let_block_go = let_go and block is not blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=let_block_go)
    if scorer.lm_head is not None:  # a tied embedding is the head's weight and must be there for as long
        embedding = scorer.model.get_input_embeddings()
        fully_shard(embedding, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=let_go)
        cast("FSDPModule", embedding).set_unshard_in_backward(False)
    fully_shard(scorer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # The denominator is global, so gradients are summed, not averaged. Gloo can only sum; without the second
            # call FSDP would ask it for a scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)


def _offload_policy(mesh: DeviceMesh, spec: ModelSpec) -> OffloadPolicy:
    """Where shards live; only memory that is pinned reaches an accelerator while the program goes on."""
    return CPUOffloadPolicy(pin_memory=mesh.device_type != HOST.type) if spec.on_host else OffloadPolicy()
