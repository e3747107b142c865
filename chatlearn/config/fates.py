"""The table of fates: a row for every key of the original ChatLearn's FSDP path, and for every key of ours."""

from __future__ import annotations

from typing import Final

from chatlearn.config.fate import Fate, alias, honoured, honoured_except, inert, refused

POLICY: Final = "models.policy"
TRAINER: Final = "models.policy_trainer"
REFERENCE: Final = "models.ref_policy"
REWARD: Final = "models.reward"
PARTIAL: Final = "models.partial_rollout_manager"
MANAGER: Final = "models.rollout_manager"
RUNTIME: Final = "runtime_args"
LOG: Final = "runtime_args.log_args_dict"

_NOT_YET: Final = "not supported in this version"
_COMPUTED: Final = "computed from num_gpu and the parallel sizes"
_BATCHED: Final = "the whole episode is graded as answers come in"
_BASE_INTEGERS: Final = ("num_inference_per_prompt", "max_prompt_tokens_length", "max_response_tokens_length")

_ENVIRONMENT: Final = (
    *inert("env_args", "nothing is packaged: every node uses its own installation", "excludes"),
    *inert("env_args", "several nodes start through RANK, NNODES and MASTER_ADDR on every platform", "platform"),
    refused("env_args.pip", ((), None), "packages are installed on every node before the run, not by it"),
    refused("env_args.py_modules", ((), None), "modules are installed on every node before the run, not by it"),
    refused("env_args.working_dir", (None,), "every process works in the directory of the command"),
)

_RUNTIME: Final = (
    *honoured(
        RUNTIME,
        "exp_name",
        "device",
        "seed",
        "colocation",
        "output_dir",
        "data_path",
        "eval_data_path",
        "data_checkpoint_path",
        "num_episode",
        "sample_per_episode",
        "num_training_epoch",
        "train_micro_batch_size",
        "train_global_batch_size",
        "save_episode_interval",
        "save_in_background",
        "capsule_interval",
        "keep_checkpoints",
        "keep_best",
        "enable_resume_training",
        "resume_anyway",
        "load_data_checkpoint_iteration",
        "data_shuffle",
        "eval_episode_interval",
        "enable_eval_before_training",
        "eval_samples_per_prompt",
        "advantage",
        "save_rollouts",
        "numerics_gate",
        "schedule",
        "max_staleness",
        "over_sampling_ratio",
        "use_partial_rollout",
        "engine_timeout_s",
        "engine_restart_timeout_s",
        "progress_timeout_s",
    ),
    honoured_except(f"{RUNTIME}.rollout_backend", {"sglang": f"SGLang is {_NOT_YET}"}),
    alias(f"{RUNTIME}.num_inference_per_prompt", of=f"{POLICY}.num_inference_per_prompt"),
    alias(f"{RUNTIME}.max_data_ckpt_nums", of=f"{RUNTIME}.keep_checkpoints"),
    refused(f"{RUNTIME}.train_backend", ("fsdp",), "only FSDP trains here; Megatron is not supported"),
    refused(f"{RUNTIME}.task_type", ("chat",), f"agent tasks are {_NOT_YET}"),
    refused(f"{RUNTIME}.model_type", ("llm",), f"models that see images are {_NOT_YET}"),
    refused(f"{RUNTIME}.use_rollout_manager", (False,), f"the rollout manager (agent tasks) is {_NOT_YET}"),
    refused(f"{RUNTIME}.raw_chat", (False,), f"untemplated prompts (agent tasks) are {_NOT_YET}"),
    refused(f"{RUNTIME}.data_ratio", ((), None, (1,)), "all files of data_path are one data set"),
    refused(f"{RUNTIME}.replay_episode_offset", (0,), "every episode trains on its own answers only"),
    refused(f"{RUNTIME}.consumed_samples", (0,), "the position in the data is read from the checkpoint"),
    refused(f"{RUNTIME}.stream_data_loader_type", ("fixed",), "an episode has a fixed number of samples"),
    refused(f"{RUNTIME}.policy_to_regroup_queue", ("global_barrier",), "the original knows no other value"),
    refused(f"{RUNTIME}.nsys", (False,), f"profiling with nsys is {_NOT_YET}"),
    refused(f"{RUNTIME}.profiler_dir", (None,), f"writing profiler traces is {_NOT_YET}"),
    *inert(RUNTIME, "only the current episode is ever trained on, as in the original", "max_replay_episode"),
    *inert(RUNTIME, "how answers are dealt to the engines is planned from the batch alone", "data_rerank"),
    *inert(RUNTIME, "the order of the start is fixed; results never depended on it", "concurrent_setup"),
    *inert(RUNTIME, "has no effect in the original either", "debug"),
    *inert(RUNTIME, "belongs to Megatron", "bucket_size_mb_in_memory_manager"),
    *inert(RUNTIME, "processes are placed from the layout", "cpu_schedule_strategy"),
    *inert(RUNTIME, "every step is logged", "log_interval"),
    *honoured(
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
)

_POLICY: Final = (
    *honoured(
        POLICY,
        "num_gpu",
        "tensor_model_parallel_size",
        "num_inference_per_prompt",
        "max_prompt_tokens_length",
        "max_response_tokens_length",
        "enable_thinking",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "eval_temperature",
        "eval_top_p",
        "eval_top_k",
        "eval_min_p",
        "eval_presence_penalty",
        "eval_frequency_penalty",
        "eval_repetition_penalty",
        "generation_batch_size",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "enforce_eager",
    ),
    *honoured(f"{POLICY}.free_gpu_memory", "offload_weights"),
    alias(f"{POLICY}.load", of=f"{TRAINER}.load"),
    alias(f"{POLICY}.trust_remote_code", of=f"{TRAINER}.trust_remote_code"),
    alias(f"{POLICY}.max_new_tokens", of=f"{POLICY}.max_response_tokens_length"),
    refused(f"{POLICY}.is_sync_mode", (True,), f"the asynchronous SGLang engine is {_NOT_YET}"),
    refused(f"{POLICY}.pipeline_model_parallel_size", (1,), "engines are split by tensor parallelism only"),
    refused(f"{POLICY}.expert_model_parallel_size", (1,), "engines are split by tensor parallelism only"),
    refused(f"{POLICY}.enable_stage_resume", (False,), "broken in the original; a run resumes from checkpoints"),
    refused(f"{POLICY}.trainable", (False,), "the policy's weights come from policy_trainer"),
    *inert(POLICY, "prompts reach the engine as token ids", "vllm_prompt_key", "vllm_input_ids_key"),
    *inert(
        POLICY,
        "the longest sequence is max_prompt_tokens_length + max_response_tokens_length; set those",
        "seq_length",
        "max_seq_len_to_capture",
    ),
    *inert(POLICY, "the engine batches by itself", "packing", "max_token_in_packing"),
    *inert(f"{POLICY}.free_gpu_memory", "an engine has neither", "free_grad_buffers", "offload_optimizer_states"),
)

_TRAINER: Final = (
    *honoured(
        TRAINER,
        "num_gpu",
        "fsdp_size",
        "ulysses_sequence_parallel_size",
        "load",
        "trust_remote_code",
        "loss",
        "packing",
        "max_token_in_packing",
        "generation_batch_size",
        "meta_init",
        "groupgemm",
        "use_expandable_segments",
        "gradient_checkpointing",
        "router_replay",
        "pos_clip_ratio",
        "neg_clip_ratio",
        "diff_clip_ratio",
        "final_clip_ratio",
        "entropy_coef",
        "kl_coef",
        "save_hf",
    ),
    *honoured(
        f"{TRAINER}.optimizer",
        "lr",
        "schedule",
        "warmup_iterations",
        "min_lr",
        "weight_decay",
        "decay_norms_and_biases",
        "adam_beta1",
        "adam_beta2",
        "clip_grad",
        "state_dtype",
        "keep_on_host",
    ),
    *honoured(f"{TRAINER}.lora", "rank", "alpha", "target_modules"),
    *honoured(
        f"{TRAINER}.rollout_correction",
        "token",
        "token_low",
        "token_high",
        "sequence",
        "sequence_low",
        "sequence_high",
    ),
    *honoured(f"{TRAINER}.free_gpu_memory", "offload_weights", "offload_optimizer_states"),
    alias(f"{TRAINER}.train_micro_batch_size", of=f"{RUNTIME}.train_micro_batch_size"),
    Fate(
        f"{TRAINER}.use_group_sequence_policy",
        "alias",
        reason=f"True says `{TRAINER}.loss=gspo`; False says nothing",
        of=f"{TRAINER}.loss",
        meanings={True: "gspo", False: None},
    ),
    refused(f"{TRAINER}.trainable", (True,), "the policy trainer is what trains"),
    *inert(f"{TRAINER}.free_gpu_memory", "gradients never outlive a step", "free_grad_buffers"),
)

_REFERENCE: Final = (
    *honoured(
        REFERENCE,
        "num_gpu",
        "fsdp_size",
        "ulysses_sequence_parallel_size",
        "load",
        "packing",
        "max_token_in_packing",
        "generation_batch_size",
        "meta_init",
        "groupgemm",
        "use_expandable_segments",
    ),
    *honoured(f"{REFERENCE}.free_gpu_memory", "offload_weights"),
    alias(f"{REFERENCE}.trust_remote_code", of=f"{TRAINER}.trust_remote_code"),
    refused(f"{REFERENCE}.trainable", (False,), "the reference model is frozen"),
    *inert(
        f"{REFERENCE}.free_gpu_memory",
        "a frozen model has neither",
        "free_grad_buffers",
        "offload_optimizer_states",
    ),
)

_REWARD: Final = (
    *honoured(REWARD, "num_cpu", "cpu_per_process", "function", "deadline_s"),
    refused(f"{REWARD}.num_gpu", (0,), "rewards are rules and run on the CPU"),
    refused(f"{REWARD}.gpu_per_process", (None, 0), "rewards are rules and run on the CPU"),
    refused(f"{REWARD}.load", (None,), f"reward models are {_NOT_YET}"),
    refused(f"{REWARD}.trainable", (False,), "rewards are rules"),
    *inert(REWARD, _BATCHED, "generation_batch_size", "packing", "max_token_in_packing", "trust_remote_code"),
)

_UNUSED_MANAGER_KEYS: Final = (
    "num_gpu",
    "num_cpu",
    "gpu_per_process",
    "cpu_per_process",
    "trainable",
    "packing",
    "max_token_in_packing",
    "generation_batch_size",
    "load",
    "trust_remote_code",
)
_MANAGERS: Final = (
    *honoured(PARTIAL, "max_rollout_round", "mini_response_per_prompt", "rollout_ratio"),
    *inert(PARTIAL, "partial rollout has no process of its own: the loop keeps its books", *_UNUSED_MANAGER_KEYS),
    *inert(
        MANAGER,
        "read only by the rollout manager, which runtime_args.use_rollout_manager refuses",
        *_UNUSED_MANAGER_KEYS,
        "use_dynamic_load_blance",
        "max_concurrent_per_engine",
    ),
)


def _of_every_model(section: str) -> tuple[Fate, ...]:
    """The rows that the original declares once for all models and that mean the same in each."""
    facts = tuple(alias(f"{section}.{name}", of=f"{POLICY}.{name}") for name in (*_BASE_INTEGERS, "enable_thinking"))
    return (
        *(facts if section != POLICY else ()),
        alias(f"{section}.seed", of=f"{RUNTIME}.seed"),
        refused(f"{section}.sync_frequency", (1,), "the policy gets new weights after every episode"),
        *inert(section, _COMPUTED, "replica_dp_size", "num_replica"),
    )


def _of_every_gpu_model(section: str) -> tuple[Fate, ...]:
    return (
        refused(f"{section}.gpu_per_process", (None, 1), "a process drives one GPU"),
        *inert(section, "cores are shared out from the layout", "num_cpu", "cpu_per_process"),
    )


def _without_gpu(section: str) -> tuple[Fate, ...]:
    names = ("offload_weights", "free_grad_buffers", "offload_optimizer_states")
    return inert(f"{section}.free_gpu_memory", "this role holds no GPU memory", *names)


FATES: Final[tuple[Fate, ...]] = (
    *_RUNTIME,
    *_POLICY,
    *_of_every_model(POLICY),
    *_of_every_gpu_model(POLICY),
    *_TRAINER,
    *_of_every_model(TRAINER),
    *_of_every_gpu_model(TRAINER),
    *_REFERENCE,
    *_of_every_model(REFERENCE),
    *_of_every_gpu_model(REFERENCE),
    *_REWARD,
    *_of_every_model(REWARD),
    *_without_gpu(REWARD),
    *_MANAGERS,
    *(row for section in (PARTIAL, MANAGER) for row in (*_of_every_model(section), *_without_gpu(section))),
    *_ENVIRONMENT,
)

FATE_OF: Final[dict[str, Fate]] = {row.key: row for row in FATES}
