"""Every key that has an effect, with its type, default and meaning. What else may be written is in ``fates.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from chatlearn.config.trainer_schema import ReferenceArgs, TrainerArgs
from chatlearn.config.value_types import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    Penalty,
    Positive,
    PositiveNumber,
    Role,
    Section,
    Text,
    TopK,
    as_absent,
    as_groups,
    as_switch,
    as_tuple,
)


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
    """Identity of the run at Weights & Biases; a run with the same one is continued. Where absent it has its own."""
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
    colocation: Annotated[tuple[tuple[Role, ...], ...], BeforeValidator(as_groups)] = ()
    """Roles that share GPUs and take turns: one list of roles, or a list of such lists. Others live apart."""
    output_dir: Text
    """Folder of the run; everything it writes is in there."""
    data_path: Text
    """Training data: files (`.json`, `.jsonl`, `.parquet`), separated by commas."""
    eval_data_path: Text | None = None
    """Evaluation data, written like `data_path`; absent: nothing is evaluated."""
    data_checkpoint_path: Text | None = None
    """Folder of the readable copy of the position in the data; `{output_dir}/data_checkpoint_path` where absent."""
    schedule: Literal["sync", "one_step_off", "async"] = "sync"
    """`sync`: engines answer, the trainer learns; `one_step_off`: they answer the next meanwhile; `async`: always."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Bound for `schedule=async`: a token may be so many versions older than the weights that learn from it."""
    over_sampling_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Ask so many times more prompts than needed, and stop the last ones; for `schedule=sync`."""
    use_partial_rollout: bool = False
    """Answers go on in the next episode, in the rounds of `models.partial_rollout_manager`; for `schedule=sync`."""
    engine_timeout_s: PositiveNumber = 300.0
    """Seconds without an answer after which an engine or a grader is replaced; no single step may take longer."""
    engine_restart_timeout_s: PositiveNumber = 600.0
    """Seconds that a replacement may take to start; three that fail within them end the run."""
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
    save_in_background: bool = True
    """Train on while a checkpoint is written; takes host memory for a copy of weights and moments."""
    capsule_interval: Count = 0
    """Write a capsule, which `chatlearn replay` runs again, every so many optimizer steps; 0 only of bad steps."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints are kept, and of the capsules of `capsule_interval`; 0 keeps all."""
    keep_best: Annotated[Text | None, BeforeValidator(as_absent)] = None
    """Keep the checkpoint with the highest value of this number too, such as `eval/openai/gsm8k/avg@8`."""
    enable_resume_training: bool = True
    """Continue from the newest complete checkpoint in `output_dir`, if there is one."""
    load_data_checkpoint_iteration: Positive | None = None
    """Go back to the checkpoint of this train iteration, once; the same command then goes on from there."""
    resume_anyway: bool = False
    """Continue although data, model, batch or order are not those of the checkpoint; what differs is said."""
    eval_episode_interval: Count = 0
    """Evaluate every so many episodes; 0 does not."""
    enable_eval_before_training: bool = False
    """Evaluate the untrained policy too (step 0)."""
    eval_samples_per_prompt: Positive = 1
    """Answers per evaluation prompt: the k of `avg@k` and `pass@k`."""
    numerics_gate: Annotated[Literal["stop", "warn", "off"], BeforeValidator(as_switch)] = "stop"
    """What a run does, once it named the cause, when engine and trainer disagree at its start or after a resume."""
    progress_timeout_s: NonNegative = 1800.0
    """Seconds in which nothing was finished, after which a report says who waits for whom; 0 never says it."""
    save_rollouts: bool = True
    """Write every answer with its reward to `rollouts/`."""
    log_args_dict: LogArgs = LogArgs()


class EngineMemory(Section):
    """GPU memory that an engine gives back while the trainer works."""

    offload_weights: bool = False
    """Free the engine's weights and cache between rollouts, where it shares its GPUs. No effect on the CPU."""


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
    """Smallest probability mass to sample from; training with less than 1 needs a `rollout_correction`."""
    top_k: TopK = -1
    """Number of likeliest tokens to sample from, -1 for all; training with fewer needs a `rollout_correction`."""
    min_p: BelowOne = 0.0
    """Least probability of a token, relative to the likeliest; training with one needs a `rollout_correction`."""
    presence_penalty: Penalty = 0.0
    """Penalty for tokens that occurred; training with one needs a `rollout_correction`."""
    frequency_penalty: Penalty = 0.0
    """Penalty for tokens by how often they occurred; training with one needs a `rollout_correction`."""
    repetition_penalty: PositiveNumber = 1.0
    """Factor against tokens that occurred, 1 for none; training with one needs a `rollout_correction`."""
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


class PartialRolloutArgs(Section):
    """The rounds in which answers are sampled, where `runtime_args.use_partial_rollout` is on."""

    max_rollout_round: Annotated[int, Field(ge=1)] = 2
    """Rounds, one in each episode, after which an answer is finished whatever it is."""
    rollout_ratio: Annotated[tuple[PositiveNumber, ...], BeforeValidator(as_tuple)] = (0.5, 0.5)
    """The share of `max_response_tokens_length` that an answer may use in each round; they add up to 1."""
    mini_response_per_prompt: Annotated[int, Field(ge=1)] = 16
    """A prompt's answers are learned from once more of them than this are finished, and later ones as they come."""


class ModelsArgs(Section):
    """The roles of a run."""

    policy: PolicyArgs
    policy_trainer: TrainerArgs
    ref_policy: ReferenceArgs = ReferenceArgs()
    reward: RewardArgs = RewardArgs()
    partial_rollout_manager: PartialRolloutArgs = PartialRolloutArgs()


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
