"""What it means for a resume that a key is not what it was: a verdict for every key of the schema, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from chatlearn.config.complaints import show
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.sections import SCHEMA_KEYS, default_leaves
from chatlearn.config.text import resolved_leaves, resolved_text

# "data": harmful, and the saved position in the data means another place or none. "harmful": the saved state would mean
# something else. "content": a name; what it stands for is compared by its content elsewhere. "harmless": listed.
# "answers": listed, and answers that are under way are given up, since they were sampled, judged or cut off otherwise.
# "start": about one start alone, so that nothing has changed.
Kind = Literal["data", "harmful", "content", "harmless", "answers", "start"]


@dataclass(frozen=True)
class Verdict:
    """What a changed value of ``key`` does to a resume, and why."""

    key: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Difference:
    """A key whose value was ``saved`` and is ``now``, both as one would write them."""

    verdict: Verdict
    saved: str
    now: str


RUNTIME: Final = "runtime_args"
LOG: Final = "runtime_args.log_args_dict"
POLICY: Final = "models.policy"
TRAINER: Final = "models.policy_trainer"
OPTIMIZER: Final = "models.policy_trainer.optimizer"
LORA: Final = "models.policy_trainer.lora"
REFERENCE: Final = "models.ref_policy"
PARTIAL: Final = "models.partial_rollout_manager"

_SHARDS: Final = "shards are read by any number of ranks, in any arrangement"
_SPEED: Final = "changes how it is computed, and not what"
_WISH: Final = "a wish for the steps to come, like the learning rate; the saved state means what it meant"
_SAMPLED: Final = "the trainer would take answers that were sampled with the old value for answers of the new one"
_MEASURES: Final = "changes what is measured, and nothing that is learned"
_WRITES: Final = "changes what is written, and when"
_CARE: Final = "changes when help comes, and no number"


def _verdicts(kind: Kind, reason: str, section: str, *names: str) -> tuple[Verdict, ...]:
    return tuple(Verdict(f"{section}.{name}", kind, reason) for name in names)


VERDICTS: Final[tuple[Verdict, ...]] = (
    # What the position in the data is made of.
    *_verdicts("data", "the position in the data would lie in other data", RUNTIME, "data_path"),
    *_verdicts("data", "the order of the prompts follows from it", RUNTIME, "seed", "data_shuffle"),
    *_verdicts("data", "it decides which prompts there are", POLICY, "max_prompt_tokens_length"),
    *_verdicts(
        "data", "it changes the prompts' tokens, and with their length which there are", POLICY, "enable_thinking"
    ),
    *_verdicts("data", "weights were trained from another model, and prompts cut into its tokens", TRAINER, "load"),
    # What the counters and the trained weights are of.
    *_verdicts("harmful", "prompts and steps of an episode follow from it", RUNTIME, "sample_per_episode"),
    *_verdicts("harmful", "steps of an episode follow from it", RUNTIME, "num_training_epoch"),
    *_verdicts("harmful", "it is the batch of an optimizer step", RUNTIME, "train_global_batch_size"),
    *_verdicts("harmful", "it is the group that is compared", POLICY, "num_inference_per_prompt"),
    *_verdicts("harmful", "the saved adapter is of another kind", LORA, "rank", "alpha"),
    *_verdicts("content", "the adapted layers are compared with those in the checkpoint", LORA, "target_modules"),
    # What the user wants of the episodes to come.
    *_verdicts(
        "harmless", "a run may become longer or shorter; decaying learning rates follow", RUNTIME, "num_episode"
    ),
    *_verdicts("harmless", _WISH, RUNTIME, "advantage"),
    *_verdicts(
        "harmless",
        _WISH,
        TRAINER,
        "loss",
        "pos_clip_ratio",
        "neg_clip_ratio",
        "diff_clip_ratio",
        "final_clip_ratio",
        "entropy_coef",
        "kl_coef",
    ),
    *_verdicts(
        "harmless",
        _WISH,
        f"{TRAINER}.rollout_correction",
        "token",
        "token_low",
        "token_high",
        "sequence",
        "sequence_low",
        "sequence_high",
    ),
    *_verdicts(
        "harmless",
        _WISH,
        OPTIMIZER,
        "lr",
        "schedule",
        "warmup_iterations",
        "min_lr",
        "weight_decay",
        "decay_norms_and_biases",
        "adam_beta1",
        "adam_beta2",
        "clip_grad",
    ),
    *_verdicts("harmless", "saved moments are rounded to it, or kept", OPTIMIZER, "state_dtype"),
    *_verdicts("harmless", "the policy is kept near another model from now on", REFERENCE, "load"),
    *_verdicts("harmless", "answers are graded with the new deadline from now on", "models.reward", "deadline_s"),
    *_verdicts("harmless", "answers that it does not allow are asked anew", RUNTIME, "max_staleness"),
    *_verdicts("harmless", "from now on so many siblings are waited for", PARTIAL, "mini_response_per_prompt"),
    # What answers under way were sampled, judged or cut off by.
    *_verdicts(
        "answers",
        "another schedule does not go on with what this one has begun",
        RUNTIME,
        "schedule",
        "over_sampling_ratio",
        "use_partial_rollout",
    ),
    *_verdicts(
        "answers",
        "the budgets of rounds before and after would not add up to one answer",
        PARTIAL,
        "max_rollout_round",
        "rollout_ratio",
    ),
    *_verdicts("answers", "siblings would be compared by two measures", "models.reward", "function"),
    *_verdicts("answers", "answers from before may not say which experts they went to", TRAINER, "router_replay"),
    *_verdicts("answers", "an answer may be longer than is allowed now", POLICY, "max_response_tokens_length"),
    *_verdicts(
        "answers",
        _SAMPLED,
        POLICY,
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ),
    *_verdicts("answers", "another engine computes other probabilities", RUNTIME, "rollout_backend"),
    # How it is computed.
    *_verdicts("harmless", "state is saved in float32 and moves to any device", RUNTIME, "device"),
    *_verdicts("harmless", _SPEED, RUNTIME, "colocation", "train_micro_batch_size"),
    *_verdicts(
        "harmless",
        "answers are dealt to other engines, with other random streams",
        POLICY,
        "num_gpu",
        "tensor_model_parallel_size",
    ),
    *_verdicts(
        "harmless",
        _SPEED,
        POLICY,
        "generation_batch_size",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "enforce_eager",
        "free_gpu_memory.offload_weights",
    ),
    *_verdicts("harmless", _SHARDS, TRAINER, "num_gpu", "fsdp_size", "ulysses_sequence_parallel_size"),
    *_verdicts("harmless", "experts are stored alike in both ways", TRAINER, "groupgemm"),
    *_verdicts(
        "harmless",
        _SPEED,
        TRAINER,
        "trust_remote_code",
        "packing",
        "max_token_in_packing",
        "generation_batch_size",
        "meta_init",
        "use_expandable_segments",
        "gradient_checkpointing",
        "optimizer.keep_on_host",
        "free_gpu_memory.offload_weights",
        "free_gpu_memory.offload_optimizer_states",
    ),
    *_verdicts(
        "harmless",
        _SPEED,
        REFERENCE,
        "num_gpu",
        "fsdp_size",
        "ulysses_sequence_parallel_size",
        "packing",
        "max_token_in_packing",
        "generation_batch_size",
        "meta_init",
        "groupgemm",
        "use_expandable_segments",
        "free_gpu_memory.offload_weights",
    ),
    *_verdicts("harmless", _SPEED, "models.reward", "num_cpu", "cpu_per_process"),
    *_verdicts("harmless", _CARE, RUNTIME, "engine_timeout_s", "engine_restart_timeout_s", "progress_timeout_s"),
    # What is measured and written.
    *_verdicts(
        "harmless",
        _MEASURES,
        RUNTIME,
        "eval_data_path",
        "eval_episode_interval",
        "enable_eval_before_training",
        "eval_samples_per_prompt",
        "numerics_gate",
    ),
    *_verdicts(
        "harmless",
        _MEASURES,
        POLICY,
        "eval_temperature",
        "eval_top_p",
        "eval_top_k",
        "eval_min_p",
        "eval_presence_penalty",
        "eval_frequency_penalty",
        "eval_repetition_penalty",
    ),
    *_verdicts(
        "harmless",
        _WRITES,
        RUNTIME,
        "exp_name",
        "output_dir",
        "data_checkpoint_path",
        "save_episode_interval",
        "save_in_background",
        "capsule_interval",
        "keep_checkpoints",
        "keep_best",
        "save_rollouts",
    ),
    *_verdicts("harmless", _WRITES, TRAINER, "save_hf"),
    *_verdicts(
        "harmless",
        _WRITES,
        LOG,
        "log_dir",
        "enable_tensorboard",
        "tensorboard_dir",
        "enable_wandb",
        "wandb_project",
        "wandb_dir",
        "wandb_name",
        "wandb_id",
        "wandb_resume",
    ),
    *_verdicts(
        "start",
        "says whether to go on, and from where",
        RUNTIME,
        "enable_resume_training",
        "resume_anyway",
        "load_data_checkpoint_iteration",
    ),
)

VERDICT_OF: Final[dict[str, Verdict]] = {verdict.key: verdict for verdict in VERDICTS}


def differences(saved_text: str, config: GrpoConfig) -> tuple[Difference, ...]:
    """Every key that is not what it was in the configuration that was saved as ``saved_text``, in the schema's order.

    A key that the saved text does not have meant its default; one that the schema does not have any more is left out.
    """
    saved: Mapping[str, object] = default_leaves() | resolved_leaves(saved_text)
    now = resolved_leaves(resolved_text(config))
    return tuple(
        Difference(VERDICT_OF[key], show(saved[key]), show(now[key]))
        for key in SCHEMA_KEYS
        if key in saved and saved[key] != now[key] and VERDICT_OF[key].kind != "start"
    )
