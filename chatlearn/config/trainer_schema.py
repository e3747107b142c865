"""The keys of the models that FSDP shards: the policy trainer and the reference model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from chatlearn.config.value_types import (
    AtLeastOne,
    AtMostOne,
    BelowOne,
    Count,
    NonNegative,
    Positive,
    PositiveNumber,
    Section,
    Text,
    Weighing,
    as_tuple,
)


class TrainerMemory(Section):
    """GPU memory that the trainer gives back while the engine works."""

    offload_weights: bool = False
    """Keep the weights in host memory between training phases, where GPUs are shared. No effect on the CPU."""
    offload_optimizer_states: bool = False
    """Keep the optimizer's state in host memory outside of optimizer steps. No effect on the CPU."""


class ReferenceMemory(Section):
    """GPU memory that the reference model gives back while others work."""

    offload_weights: bool = False
    """Keep the weights in host memory between its phases, where GPUs are shared. No effect on the CPU."""


class OptimizerArgs(Section):
    """AdamW on fp32 master weights."""

    lr: NonNegative = 2e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from `lr` to `min_lr`, which the last optimizer step of the run has."""
    warmup_iterations: Count = 0
    """Optimizer steps over which the learning rate rises to `lr`."""
    min_lr: NonNegative = 0.0
    """Where the schedules `linear` and `cosine` end."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    decay_norms_and_biases: bool = True
    """Decay one-dimensional parameters (norms, biases) too, as the original does."""
    adam_beta1: BelowOne = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: BelowOne = 0.95
    """Decay of the mean of squared gradients."""
    clip_grad: PositiveNumber = 1.0
    """Gradients are scaled down to this global L2 norm."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of AdamW's two moments; `bfloat16` halves their memory."""
    keep_on_host: bool = False
    """Keep master weights, gradients and moments in host memory also during the step. No effect on the CPU."""


class LoraArgs(Section):
    """Low-rank adapters (LoRA): only they are trained; engines and checkpoints for Hugging Face get merged weights."""

    rank: Count = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: PositiveNumber = 32.0
    """The adapter's product is multiplied by `alpha / rank`."""
    target_modules: Annotated[tuple[Text, ...], BeforeValidator(as_tuple)] = ()
    """Last names of the linear layers that get one, such as `q_proj`; empty: all of the decoder's."""


class CorrectionArgs(Section):
    """Weights for answers that the engine sampled from another distribution than the trainer scores."""

    token: Weighing = "off"
    """Weigh a token's policy loss by its ratio trainer/engine, cut to the bounds (`truncate`) or 0 outside (`mask`)."""
    token_low: AtMostOne | None = None
    """Lower bound of the ratio; absent: 0 for `truncate`, 0.5 for `mask`."""
    token_high: AtLeastOne | None = None
    """Upper bound of the ratio, `.inf` for none; absent: 2 for `truncate`, 5 for `mask`."""
    sequence: Weighing = "off"
    """Weigh an answer by the product of its ratios (`truncate`), or drop it by their geometric mean (`mask`)."""
    sequence_low: AtMostOne | None = None
    """Lower bound of product or mean; absent: 0 for `truncate`, 0.95 for `mask`."""
    sequence_high: AtLeastOne | None = None
    """Upper bound of product or mean, `.inf` for none; absent: 2 for `truncate`, 1.05 for `mask`."""


class TrainerArgs(Section):
    """The policy trainer: FSDP2 over `num_gpu` ranks."""

    num_gpu: Positive
    """Ranks of the trainer (on the CPU: processes)."""
    fsdp_size: Positive | None = None
    """Ranks that the model is sharded over; there are `num_gpu / fsdp_size` replicas. Absent: `num_gpu`."""
    ulysses_sequence_parallel_size: Positive = 1
    """Ranks that share each sequence; must divide `num_gpu` and the model's attention heads."""
    load: Text
    """Hugging Face directory of the base model: configuration, safetensors, tokenizer."""
    trust_remote_code: bool = True
    """Allow code that lies in the model directory to run."""
    loss: Text = "grpo"
    """Policy loss: `grpo` (clipped, per token), `gspo` (per sequence) or `package.module:function`."""
    packing: bool = True
    """Lay answers end to end without padding."""
    max_token_in_packing: Positive = 32768
    """Tokens in one forward and backward pass of a rank."""
    generation_batch_size: Positive = 1
    """Answers in one forward pass that only scores them; read only when packing is off."""
    meta_init: bool = False
    """Build the model without memory and load each shard straight into place."""
    groupgemm: bool = False
    """Compute the experts of a mixture-of-experts model with grouped matrix products."""
    use_expandable_segments: bool = False
    """Let CUDA's allocator grow its segments. No effect on the CPU."""
    gradient_checkpointing: Literal[True, False, "selective"] = True
    """Recompute activations in the backward pass instead of keeping them; `selective` keeps those of attention."""
    router_replay: Literal[True, False, "compare"] = False
    """Send tokens to the experts that the engine sent them to; `compare` only measures how often they would go."""
    pos_clip_ratio: NonNegative = 0.2
    """The probability ratio is clipped above 1 + this."""
    neg_clip_ratio: NonNegative = 0.2
    """The probability ratio is clipped below 1 - this."""
    diff_clip_ratio: PositiveNumber = 10.0
    """Upper bound of the difference of log-probabilities."""
    final_clip_ratio: Annotated[float, Field(gt=1)] = 3.0
    """Upper bound of the ratio where the advantage is negative (dual clip); the original bounds the loss instead."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegative = 0.0
    """Weight of the divergence from the reference model; with 0 no reference model is loaded."""
    save_hf: bool = True
    """Write a Hugging Face directory into every checkpoint."""
    optimizer: OptimizerArgs = OptimizerArgs()
    lora: LoraArgs = LoraArgs()
    rollout_correction: CorrectionArgs = CorrectionArgs()
    free_gpu_memory: TrainerMemory = TrainerMemory()


class ReferenceArgs(Section):
    """The frozen model that `kl_coef` keeps the policy near. What is absent is as for the policy trainer."""

    num_gpu: Positive | None = None
    """Ranks of the reference model."""
    fsdp_size: Positive | None = None
    """Ranks that the model is sharded over; absent: all of them."""
    ulysses_sequence_parallel_size: Positive | None = None
    """Ranks that share each sequence."""
    load: Text | None = None
    """Hugging Face directory of the reference model."""
    packing: bool | None = None
    """Lay answers end to end without padding."""
    max_token_in_packing: Positive | None = None
    """Tokens in one forward pass of a rank."""
    generation_batch_size: Positive | None = None
    """Answers in one forward pass of a rank; read only when packing is off."""
    meta_init: bool | None = None
    """Build the model without memory and load each shard straight into place."""
    groupgemm: bool | None = None
    """Compute experts with grouped matrix products."""
    use_expandable_segments: bool | None = None
    """Let CUDA's allocator grow its segments. No effect on the CPU."""
    free_gpu_memory: ReferenceMemory = ReferenceMemory()
