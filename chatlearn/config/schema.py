"""Every key that has an effect, with its type, default and meaning. What else may be written is in ``fates.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr


def _number_as_text(value: object) -> object:
    """YAML reads ``exp_name=8`` as a number; where a text is wanted, a number is its own spelling."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _groups(value: object) -> object:
    """A flat list of roles is one group; lists become tuples, because configurations are frozen."""
    if not isinstance(value, list | tuple):
        return value
    nested = [item if isinstance(item, list | tuple) else None for item in value]
    if all(group is None for group in nested):
        return (tuple(value),) if value else ()
    return tuple(tuple(group) if group is not None else (item,) for item, group in zip(value, nested, strict=True))


def _tuple(value: object) -> object:
    """Lists become tuples, because configurations are frozen; one name is a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, BeforeValidator(_number_as_text)]
Role = Literal["policy", "policy_trainer", "ref_policy", "reward", "partial_rollout_manager", "rollout_manager"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopK = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """A group of keys: frozen, closed, strict about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class LogArgs(Section):
    """Where metrics go besides ``metrics.jsonl`` and the console."""

    log_dir: Text | None = None
    """Folder that the folders of the trackers lie in; the output directory where absent."""
    enable_tensorboard: bool = False
    """Write TensorBoard event files."""
    tensorboard_dir: Text | None = None
    """Folder of the event files; `{log_dir}/tensorboard` where absent."""
    enable_wandb: bool = False
    """Send metrics to Weights & Biases (`WANDB_API_KEY`, or `WANDB_MODE=offline`)."""
    wandb_project: Text | None = None
    """Project at Weights & Biases."""
    wandb_dir: Text | None = None
    """Folder of wandb's local files; `{log_dir}/wandb` where absent."""
    wandb_name: Text | None = None
    """Name of the run at Weights & Biases; `exp_name` where absent."""
    wandb_id: Text | None = None
    """Identity of the run at Weights & Biases; a run with the same one is continued."""
    wandb_resume: Literal["allow", "never", "must", "auto"] = "allow"
    """What to do when a run with this identity exists."""


class RuntimeArgs(Section):
    """The run as a whole: data, length, batches, evaluation, saving."""

    exp_name: Text = "CHATLEARN"
    """Name of the experiment."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models live. `auto` takes CUDA where there is a GPU; on the CPU `num_gpu` counts ranks (processes)."""
    seed: Count = 1234
    """Everything random derives from it: the order of prompts, sampling, initialisation."""
    rollout_backend: Text = "vllm"
    """Engine that generates: `vllm`, `transformers` (slow, for tests and understanding) or `package.module:Class`."""
    colocation: Annotated[tuple[tuple[Role, ...], ...], BeforeValidator(_groups)] = ()
    """Roles that share GPUs and take turns: one list of roles, or a list of such lists."""
    output_dir: Text
    """Folder of the run; everything it writes is in there."""
    data_path: Text
    """Training data: files (`.json`, `.jsonl`, `.parquet`), separated by commas."""
    eval_data_path: Text | None = None
    """Evaluation data, written like `data_path`; absent: nothing is evaluated."""
    data_checkpoint_path: Text | None = None
    """Folder of the readable copy of the position in the data; `{output_dir}/data_checkpoint_path` where absent."""
    data_shuffle: bool = True
    """Draw prompts in an order that is shuffled anew for each pass over the data."""
    num_episode: Positive
    """Length of the run; an episode is one round of generation and training."""
    sample_per_episode: Positive
    """Answers per episode: prompts times `num_inference_per_prompt`."""
    num_training_epoch: Positive = 1
    """Passes over the answers of an episode."""
    train_global_batch_size: Positive
    """Answers per optimizer step, over all ranks; must divide `sample_per_episode`."""
    train_micro_batch_size: Positive = 1
    """Answers in one forward and backward pass of a rank; read only when packing is off."""
    advantage: Text = "grpo"
    """How an answer is compared with its siblings: `grpo`, `dr_grpo`, `rloo` or `package.module:function`."""
    save_episode_interval: Count
    """Save every so many episodes, and at the end; 0 never saves."""
    capsule_interval: Count = 0
    """Write a capsule, which `chatlearn replay` runs again, every so many optimizer steps; 0 only of bad steps."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints are kept; 0 keeps all."""
    enable_resume_training: bool = True
    """Continue from the newest complete checkpoint in `output_dir`, if there is one."""
    eval_episode_interval: Count = 0
    """Evaluate every so many episodes; 0 does not."""
    enable_eval_before_training: bool = False
    """Evaluate the untrained policy too (step 0)."""
    eval_samples_per_prompt: Positive = 1
    """Answers per evaluation prompt: the k of `avg@k` and `pass@k`."""
    save_rollouts: bool = True
    """Write every answer with its reward to `rollouts/`."""
    log_args_dict: LogArgs = LogArgs()


class EngineMemory(Section):
    """GPU memory that an engine gives back while the trainer works."""

    offload_weights: bool = False
    """Free the engine's weights and cache between rollouts, where it shares its GPUs. No effect on the CPU."""


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


class PolicyArgs(Section):
    """The engines that answer prompts."""

    num_gpu: Positive
    """GPUs of all engines together (on the CPU: processes)."""
    tensor_model_parallel_size: Positive = 1
    """GPUs per engine; there are `num_gpu / tensor_model_parallel_size` engines."""
    num_inference_per_prompt: Annotated[int, Field(ge=2)] = 32
    """Answers per prompt: the group that is compared."""
    max_prompt_tokens_length: Positive = 1024
    """Prompts of this many tokens or more are left out."""
    max_response_tokens_length: Positive = 2048
    """Answers are cut off after so many tokens."""
    enable_thinking: bool = False
    """Passed to the chat template."""
    temperature: PositiveNumber = 1.0
    """Sampling temperature; the trainer divides its logits by it too."""
    top_p: Fraction = 1.0
    """Smallest probability mass to sample from."""
    top_k: TopK = -1
    """Number of likeliest tokens to sample from; -1 for all."""
    min_p: BelowOne = 0.0
    """Least probability of a token, relative to the likeliest."""
    presence_penalty: Penalty = 0.0
    """Penalty for tokens that occurred."""
    frequency_penalty: Penalty = 0.0
    """Penalty for tokens by how often they occurred."""
    repetition_penalty: PositiveNumber = 1.0
    """Factor against tokens that occurred; 1 for none."""
    eval_temperature: NonNegative = 0.6
    """Temperature of evaluation; 0 takes the likeliest token."""
    eval_top_p: Fraction = 0.95
    """As `top_p`, for evaluation."""
    eval_top_k: TopK = 20
    """As `top_k`, for evaluation."""
    eval_min_p: BelowOne = 0.0
    """As `min_p`, for evaluation."""
    eval_presence_penalty: Penalty = 0.0
    """As `presence_penalty`, for evaluation."""
    eval_frequency_penalty: Penalty = 0.0
    """As `frequency_penalty`, for evaluation."""
    eval_repetition_penalty: PositiveNumber = 1.0
    """As `repetition_penalty`, for evaluation."""
    generation_batch_size: Positive = 256
    """Answers that an engine works on at the same time."""
    max_num_batched_tokens: Positive = 32768
    """Tokens that an engine works on in one step."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of the GPU's memory that an engine may take. No effect on the CPU."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs: starts sooner, generates slower."""
    free_gpu_memory: EngineMemory = EngineMemory()


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
    target_modules: Annotated[tuple[Text, ...], BeforeValidator(_tuple)] = ()
    """Last names of the linear layers that get one, such as `q_proj`; empty: all of the decoder's."""


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


class RewardArgs(Section):
    """The graders: processes on the CPU."""

    num_cpu: Positive = 2
    """Cores for grading."""
    cpu_per_process: Positive = 1
    """Cores per grader; there are `num_cpu / cpu_per_process` graders."""
    function: Text | None = None
    """Reward function: a name or `package.module:function`; absent: chosen by each record's data source."""
    deadline_s: PositiveNumber = 10.0
    """Seconds that grading one answer may take."""


class ModelsArgs(Section):
    """The roles of a run."""

    policy: PolicyArgs
    policy_trainer: TrainerArgs
    ref_policy: ReferenceArgs = ReferenceArgs()
    reward: RewardArgs = RewardArgs()


@dataclass(frozen=True)
class Origin:
    """What a configuration's text said beyond its values.

    ``interpolations`` maps keys to the ``${...}`` text they were written with; ``inert_keys`` are the keys that were
    written and have no meaning here, to be named once at the start of a run.
    """

    interpolations: Mapping[str, str] = field(default_factory=dict[str, str])
    inert_keys: tuple[str, ...] = ()


class GrpoConfig(Section):
    """What a user asked for. Numbers that follow from it are in ``Layout``."""

    runtime_args: RuntimeArgs
    models: ModelsArgs
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """What the text said beyond the values; empty for a configuration built in Python."""
        return self._origin

    def written_as(self, origin: Origin) -> GrpoConfig:
        """The same configuration, knowing what its text said."""
        twin = self.model_copy()
        twin._origin = origin
        return twin
