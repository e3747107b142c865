"""Every key of the original and of ours has exactly one fate, and none vanishes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from minimal import MINIMAL

from chatlearn.config.aliases import SPELLINGS
from chatlearn.config.fates import FATE_OF, FATES
from chatlearn.config.read import config_of
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.sections import SCHEMA_KEYS
from chatlearn.config.summary import inert_line
from chatlearn.config.tree import flatten
from chatlearn.errors import ConfigError

ENV = "excludes platform pip py_modules working_dir"
RUNTIME = """train_backend rollout_backend task_type use_rollout_manager use_partial_rollout exp_name colocation
concurrent_setup debug nsys output_dir profiler_dir data_path eval_data_path data_checkpoint_path num_episode
sample_per_episode num_training_epoch train_micro_batch_size train_global_batch_size num_inference_per_prompt
save_episode_interval enable_resume_training raw_chat data_ratio data_shuffle data_rerank max_replay_episode
replay_episode_offset consumed_samples max_data_ckpt_nums load_data_checkpoint_iteration stream_data_loader_type
model_type eval_episode_interval enable_eval_before_training bucket_size_mb_in_memory_manager cpu_schedule_strategy
policy_to_regroup_queue"""
LOG = """log_dir enable_tensorboard tensorboard_dir enable_wandb wandb_dir wandb_project wandb_id wandb_name
wandb_resume"""
EVERY_MODEL = """num_gpu num_cpu gpu_per_process cpu_per_process trainable packing max_token_in_packing
generation_batch_size sync_frequency free_gpu_memory.offload_weights free_gpu_memory.free_grad_buffers
free_gpu_memory.offload_optimizer_states load seed replica_dp_size num_replica trust_remote_code
num_inference_per_prompt enable_thinking max_prompt_tokens_length max_response_tokens_length"""
POLICY = """is_sync_mode tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size temperature
top_p top_k presence_penalty frequency_penalty repetition_penalty eval_temperature eval_top_p eval_top_k
eval_presence_penalty eval_frequency_penalty eval_repetition_penalty vllm_prompt_key vllm_input_ids_key
max_num_batched_tokens max_seq_len_to_capture gpu_memory_utilization enforce_eager seq_length enable_stage_resume"""
FSDP = "fsdp_size ulysses_sequence_parallel_size meta_init groupgemm use_expandable_segments"
TRAINER = """optimizer.lr optimizer.min_lr optimizer.weight_decay optimizer.adam_beta1 optimizer.adam_beta2
optimizer.clip_grad entropy_coef kl_coef pos_clip_ratio neg_clip_ratio diff_clip_ratio final_clip_ratio
use_group_sequence_policy train_micro_batch_size gradient_checkpointing save_hf"""
MODELS = ("policy", "policy_trainer", "ref_policy", "reward", "partial_rollout_manager", "rollout_manager")
SEED_ERA = ("runtime_args.log_interval", "models.policy.max_new_tokens")
OURS = """runtime_args.device runtime_args.seed runtime_args.advantage runtime_args.save_rollouts
runtime_args.save_in_background
runtime_args.capsule_interval runtime_args.keep_checkpoints runtime_args.schedule runtime_args.max_staleness
runtime_args.over_sampling_ratio runtime_args.engine_timeout_s runtime_args.engine_restart_timeout_s
runtime_args.numerics_gate runtime_args.progress_timeout_s runtime_args.resume_anyway
runtime_args.keep_best models.policy_trainer.loss models.policy_trainer.optimizer.decay_norms_and_biases
models.policy_trainer.optimizer.state_dtype models.policy_trainer.optimizer.keep_on_host models.reward.function
models.reward.deadline_s
models.policy_trainer.rollout_correction.token models.policy_trainer.rollout_correction.token_low
models.policy_trainer.rollout_correction.token_high models.policy_trainer.rollout_correction.sequence
models.policy_trainer.rollout_correction.sequence_low models.policy_trainer.rollout_correction.sequence_high
models.policy_trainer.router_replay
models.policy_trainer.lora.rank models.policy_trainer.lora.alpha models.policy_trainer.lora.target_modules
models.policy_trainer.optimizer.schedule models.policy_trainer.optimizer.warmup_iterations models.policy.min_p
models.policy.eval_min_p runtime_args.eval_samples_per_prompt"""


def _under(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


ORIGINAL = [
    *_under("env_args", ENV),
    *_under("runtime_args", RUNTIME),
    *_under("runtime_args.log_args_dict", LOG),
    *(f"models.{model}.{name}" for model, name in product(MODELS, EVERY_MODEL.split())),
    *_under("models.policy", POLICY),
    *_under("models.policy_trainer", FSDP),
    *_under("models.policy_trainer", TRAINER),
    *_under("models.ref_policy", FSDP),
    *_under("models.partial_rollout_manager", "max_rollout_round mini_response_per_prompt rollout_ratio"),
    *_under("models.rollout_manager", "use_dynamic_load_blance max_concurrent_per_engine"),
]


def test_every_key_has_exactly_one_fate() -> None:
    assert [key for key, times in Counter(row.key for row in FATES).items() if times > 1] == []
    assert sorted({*ORIGINAL, *SEED_ERA, *OURS.split()} - set(FATE_OF)) == []


def test_every_row_is_about_a_key_that_somebody_knows() -> None:
    assert sorted(set(FATE_OF) - {*ORIGINAL, *SEED_ERA, *OURS.split()}) == []


def test_the_schema_holds_exactly_what_can_have_an_effect() -> None:
    honoured = {row.key for row in FATES if row.kind == "honoured"}
    refused = {row.key for row in FATES if row.kind == "refused"}
    assert honoured <= set(SCHEMA_KEYS)
    assert set(SCHEMA_KEYS) - honoured <= refused


def test_every_row_says_why() -> None:
    for row in FATES:
        if row.kind in ("inert", "refused"):
            assert len(row.reason) > 10, row.key
        if row.kind == "refused":
            assert row.allowed, row.key
        if row.kind == "alias":
            assert FATE_OF[row.of].kind == "honoured", row.key


def test_refused_keys_are_accepted_where_they_ask_for_nothing() -> None:
    rows = [row for row in FATES if row.kind == "refused"]
    for turn in range(max(len(row.allowed) for row in rows)):
        harmless = {row.key: row.allowed[turn] for row in rows if turn < len(row.allowed)}
        config_of({**MINIMAL, **{key: list(v) if isinstance(v, tuple) else v for key, v in harmless.items()}}, {})


def test_refused_keys_are_refused_where_they_ask_for_something() -> None:
    keys = [row.key for row in FATES if row.kind == "refused"]
    with pytest.raises(ConfigError) as caught:
        config_of(MINIMAL, dict.fromkeys(keys, 12345))
    for key in keys:
        assert any(problem.startswith(f"{key}=12345 is refused: ") for problem in caught.value.problems), key


def test_inert_keys_are_accepted_at_any_value_and_named() -> None:
    keys = [row.key for row in FATES if row.kind == "inert"]
    config = config_of({**MINIMAL, **dict.fromkeys(keys, "whatever")}, {})
    assert sorted(config.origin.inert_keys) == sorted(keys)
    line = inert_line(config)
    assert line is not None
    for key in keys:
        assert key in line or ".".join(key.split(".")[:2]) + ".*" in line or key.split(".")[0] + ".*" in line
    assert inert_line(config_of(MINIMAL, {})) is None


def test_keys_of_partial_rollout_are_named_where_it_is_off() -> None:
    wish = {"models.partial_rollout_manager.mini_response_per_prompt": 4}
    assert inert_line(config_of({**MINIMAL, **wish}, {})) == (
        "keys without effect here (see docs/config.md): models.partial_rollout_manager.*"
    )
    default = config_of(MINIMAL, {}).models.partial_rollout_manager.mini_response_per_prompt
    assert inert_line(config_of({**MINIMAL, **dict.fromkeys(wish, default)}, {})) is None, "as a run itself writes it"
    keys = {**wish, "models.partial_rollout_manager.num_gpu": 1}
    used = config_of(
        {**MINIMAL, **keys}, {"runtime_args.use_partial_rollout": True, "models.policy.num_inference_per_prompt": 32}
    )
    assert inert_line(used) == "keys without effect here (see docs/config.md): models.partial_rollout_manager.num_gpu"


def test_no_key_that_was_written_vanishes() -> None:
    """Whatever is written ends up in the configuration, in another key, in the list of inert keys, or is refused."""
    plain = flatten(config_of(MINIMAL, {}).model_dump())
    for row in FATES:
        if row.kind == "honoured":
            assert row.key in plain
        if row.kind == "alias" and not row.meanings:
            said = plain[row.of]
            other = {bool: not said, int: 64, float: 0.25, str: "elsewhere"}.get(type(said), 64)
            file = {key: value for key, value in MINIMAL.items() if key not in SPELLINGS[row.of]}
            assert _asked(file, row.key, other)[row.of] == other, row.key


def _asked(file: dict[str, object], key: str, value: object) -> dict[str, object]:
    config: GrpoConfig = config_of(file, {key: value})
    return flatten(config.model_dump())
