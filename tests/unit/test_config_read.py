"""YAML, interpolation, overrides, aliases; and every mistake said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.config.read import config_of, read_config
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.text import resolved_text
from chatlearn.config.tree import flatten, nest
from chatlearn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "template" / "grpo_fsdp.yaml"

MINIMAL = """
runtime_args:
  output_dir: output
  data_path: train.json
  num_episode: 2
  sample_per_episode: 64
  train_global_batch_size: 32
  save_episode_interval: 1
models:
  policy_trainer: {num_gpu: 2, load: model}
  policy: {num_gpu: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def problems_of(file: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_config(file, overrides)
    return caught.value.problems


def test_overrides_are_yaml_scalars_and_the_last_one_counts(file: Path) -> None:
    config = read_config(
        file,
        [
            "models.policy_trainer.optimizer.lr=1e-6",
            "runtime_args.data_shuffle=false",
            "runtime_args.colocation=[policy,policy_trainer]",
            "runtime_args.exp_name=8",
            "runtime_args.data_path=a.json,b.json",
            "runtime_args.num_episode=5",
            "runtime_args.num_episode=7",
            "runtime_args.log_args_dict={wandb_project: mine}",
        ],
    )
    assert config.models.policy_trainer.optimizer.lr == 1e-6
    assert config.runtime_args.data_shuffle is False
    assert config.runtime_args.colocation == (("policy", "policy_trainer"),)
    assert config.runtime_args.exp_name == "8"
    assert config.runtime_args.data_path == "a.json,b.json"
    assert config.runtime_args.num_episode == 7
    assert config.runtime_args.log_args_dict.wandb_project == "mine"


def test_the_configuration_is_frozen(file: Path) -> None:
    config = read_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.runtime_args.num_episode = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_all_mistakes_are_reported_at_once(file: Path) -> None:
    said = problems_of(
        file,
        "models.policy_trainer.num_gpus=4",
        "runtime_args.num_episode=abc",
        "models.policy.tensor_model_parallel_size=3",
        "runtime_args.raw_chat=True",
        "models.policy.gpu_memory_utilization=1.5",
        "nonsense",
    )
    assert said == (
        "'nonsense' is not an override; write key=value, for example runtime_args.num_episode=10",
        "unknown key models.policy_trainer.num_gpus; did you mean models.policy_trainer.num_gpu?",
        "runtime_args.raw_chat=True is refused: untemplated prompts (agent tasks) are not supported in this version; "
        "remove it or use False",
        "runtime_args.num_episode=abc must be a whole number, not text",
        "models.policy.gpu_memory_utilization=1.5 must be at most 1.0",
    )
    # num_episode is required, so the laws between keys could not be tried; without that mistake they are.
    assert "models.policy.tensor_model_parallel_size=3 must divide num_gpu=8; use 1, 2, 4 or 8" in problems_of(
        file, "models.policy.tensor_model_parallel_size=3", "runtime_args.seed=abc"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime_args.data_shuffle=1", "runtime_args.data_shuffle=1 must be True or False, not a whole number"),
        ("models.policy.temperature=warm", "models.policy.temperature=warm must be a number, not text"),
        ("models.policy.temperature=0", "models.policy.temperature=0 must be above 0.0"),
        ("models.policy.num_gpu=2.5", "models.policy.num_gpu=2.5 must be a whole number, not a number"),
        ("models.policy.num_gpu=0", "models.policy.num_gpu=0 must be at least 1"),
        ("runtime_args.seed=null", "runtime_args.seed=null must be a whole number, not empty"),
        ("runtime_args.device=tpu", "runtime_args.device=tpu must be 'auto', 'cpu' or 'cuda'"),
        ("runtime_args.data_path=[a,b]", "runtime_args.data_path=['a', 'b'] must be text, not a list"),
        ("runtime_args.enable_wandb=True", "unknown key runtime_args.enable_wandb; did you mean "
         "runtime_args.log_args_dict.enable_wandb?"),
        ("runtime_args.rollout_engine=vllm", "unknown key runtime_args.rollout_engine; did you mean "
         "runtime_args.rollout_backend?"),
        ("models.policy_trainer.lora.dropout=0.1", "unknown key models.policy_trainer.lora.dropout; the keys of "
         "models.policy_trainer.lora are alpha, rank, target_modules"),
        ("qqq=1", "unknown key qqq; docs/config.md lists all keys"),
        ("models.ref_policy=null", "models.ref_policy=null must be a section with keys of its own; "
         "docs/config.md lists them"),
        ("runtime_args.rollout_backend=sglang", "runtime_args.rollout_backend=sglang is refused: "
         "SGLang is not supported in this version"),
        ("runtime_args.profiler_dir=traces", "runtime_args.profiler_dir=traces is refused: writing profiler traces is "
         "not supported in this version; remove it"),
        ("models.policy_trainer.rollout_correction=tis", "models.policy_trainer.rollout_correction=tis must be a "
         "section with keys of its own; docs/config.md lists them"),
        ("models.policy_trainer.rollout_correction.token_low=1.5", "models.policy_trainer.rollout_correction."
         "token_low=1.5 must be at most 1.0"),
        ("models.policy_trainer.rollout_correction.sequence_high=.nan", "models.policy_trainer.rollout_correction."
         "sequence_high=nan must be at least 1.0"),
        ("models.policy.top_p=0.9", "models.policy.top_p=0.9: the trainer scores the distribution that temperature "
         "alone shapes, and would learn from answers of another one; leave it out, or set "
         "models.policy_trainer.rollout_correction.token=truncate"),
        ("models.policy_trainer.ulysses_sequence_parallel_size=3", "models.policy_trainer."
         "ulysses_sequence_parallel_size=3 must divide num_gpu=2; use 1 or 2"),
        ("models.policy_trainer.fsdp_size=16", "models.policy_trainer.fsdp_size=16 must divide num_gpu=2; "
         "use 1 or 2"),
        ("models.policy_trainer.gradient_checkpointing=some", "models.policy_trainer.gradient_checkpointing=some must "
         "be True, False or 'selective'"),
        ("models.policy_trainer.lora.target_modules=q_proj", "models.policy_trainer.lora.target_modules=[q_proj] "
         "has no effect with models.policy_trainer.lora.rank=0, which trains all weights; set "
         "models.policy_trainer.lora.rank, or leave it out"),
        ("models.policy_trainer.rollout_correction.token_low=0.5", "models.policy_trainer.rollout_correction.token_low "
         "and models.policy_trainer.rollout_correction.token_high have no effect with "
         "models.policy_trainer.rollout_correction.token=off; use truncate or mask"),
        ("models.policy_trainer.optimizer.min_lr=1e-7", "models.policy_trainer.optimizer.min_lr=1e-07 has no effect "
         "with models.policy_trainer.optimizer.schedule=constant; choose linear or cosine, or leave min_lr out"),
        ("models.policy_trainer.optimizer.warmup_iterations=100000",
         "models.policy_trainer.optimizer.warmup_iterations=100000 is more than the 4 optimizer steps of the run "
         "(runtime_args.num_episode times the steps of an episode); the learning rate would never arrive"),
        ("runtime_args.seed=${runtime_args.sed}", "runtime_args.seed refers to something that cannot be found: "
         "Interpolation key 'runtime_args.sed' not found"),
        ("runtime_args.sample_per_episode=100", "models.policy.num_inference_per_prompt=32 must divide "
         "runtime_args.sample_per_episode=100; use 1, 2, 4, 5, 10, 20, 25 or 50"),
        ("runtime_args.eval_episode_interval=5", "runtime_args.eval_episode_interval=5 needs "
         "runtime_args.eval_data_path; name a file or switch evaluation off"),
        ("runtime_args.colocation=[[policy],[policy]]", "runtime_args.colocation names policy 2 times; "
         "a role lives in one place"),
        ("models.reward.cpu_per_process=3", "models.reward.cpu_per_process=3 is more than num_cpu=2; use at most 2"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_key_what_was_found_and_the_cure(file: Path, override: str, message: str) -> None:
    assert message in problems_of(file, override)


@pytest.mark.parametrize(
    "sampling",
    ["top_p=0.9", "top_k=20", "min_p=0.1", "presence_penalty=-1", "frequency_penalty=1", "repetition_penalty=2"],
)
def test_what_is_sampled_may_differ_where_its_answers_are_weighed(file: Path, sampling: str) -> None:
    override, correction = f"models.policy.{sampling}", "models.policy_trainer.rollout_correction"
    for weighing in ("token=truncate", "token=mask", "sequence=truncate"):
        read_config(file, [override, f"{correction}.{weighing}"])
    for not_weighing in ("token=off", "sequence=mask"):
        (said,) = problems_of(file, override, f"{correction}.{not_weighing}")
        assert said.startswith(override.partition("=")[0])


def test_samplers_that_need_a_correction_are_named_in_one_message(file: Path) -> None:
    (said,) = problems_of(file, "models.policy.top_p=0.9", "models.policy.min_p=0.1")
    assert said.startswith("models.policy.top_p=0.9, models.policy.min_p=0.1: the trainer scores ")


def test_a_product_and_its_factors_are_not_corrected_both(file: Path) -> None:
    correction = "models.policy_trainer.rollout_correction"
    read_config(file, [f"{correction}.token=truncate", f"{correction}.sequence=mask"])
    (said,) = problems_of(file, f"{correction}.token=mask", f"{correction}.sequence=truncate")
    assert said == (
        f"{correction}.token=mask and {correction}.sequence=truncate would correct twice: the weight of a sequence "
        "contains the ratios of its tokens; switch one of them off"
    )


def test_missing_keys_are_named_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    said = problems_of(path)
    assert len(said) == 9
    assert (
        "models.policy.num_gpu is missing; set it in the configuration file or as models.policy.num_gpu=value" in said
    )


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"a: [1", "is not YAML"),
        (b"- a\n- b\n", "must hold sections with keys"),
        (b"\xff\xfe\xfa", "it is not text"),
        (b"a: 1\na: 2\n", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (said,) = problems_of(path)
    assert str(path) in said
    assert fragment in said


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "nope.yaml") == (
        f"the configuration file {tmp_path / 'nope.yaml'} cannot be read: No such file or directory",
    )


def test_two_spellings_that_disagree_are_an_error(file: Path) -> None:
    (said,) = problems_of(file, "runtime_args.num_inference_per_prompt=4", "models.policy.num_inference_per_prompt=8")
    assert said == (
        "models.policy.num_inference_per_prompt=8 and runtime_args.num_inference_per_prompt=4 speak of the same fact "
        "and disagree; keep one of them"
    )


@pytest.mark.parametrize("spelling", ["runtime_args", "models.policy", "models.policy_trainer", "models.reward"])
def test_an_override_outranks_the_file_in_any_spelling(spelling: str) -> None:
    """The template says 32 in one place and refers to it in another; scripts override either."""
    config = read_config(TEMPLATE, [f"{spelling}.num_inference_per_prompt=8"])
    assert config.models.policy.num_inference_per_prompt == 8


def test_references_follow_an_alias() -> None:
    leaves = {
        "runtime_args.output_dir": "out",
        "runtime_args.data_path": "a.json",
        "runtime_args.num_episode": 1,
        "runtime_args.sample_per_episode": "${models.policy.num_inference_per_prompt}",
        "runtime_args.train_global_batch_size": "${runtime_args.sample_per_episode}",
        "runtime_args.save_episode_interval": 0,
        "models.policy_trainer.num_gpu": 4,
        "models.policy_trainer.load": "m",
        "models.policy.num_gpu": 4,
        "models.policy.generation_batch_size": "${runtime_args.max_data_ckpt_nums}",
    }
    config = config_of(leaves, {"runtime_args.max_data_ckpt_nums": 8})
    assert config.runtime_args.keep_checkpoints == 8
    assert config.models.policy.generation_batch_size == 8
    assert config.runtime_args.train_global_batch_size == 32  # a default that nobody wrote can be referred to


def test_a_mistake_in_an_alias_is_said_in_the_spelling_that_was_written(file: Path) -> None:
    (said,) = problems_of(file, "models.policy.max_new_tokens=many")
    assert said == "models.policy.max_new_tokens=many must be a whole number, not text"


def test_the_switch_of_the_original_chooses_the_loss(file: Path) -> None:
    switch = "models.policy_trainer.use_group_sequence_policy"
    assert read_config(file, [f"{switch}=True"]).models.policy_trainer.loss == "gspo"
    assert read_config(file, [f"{switch}=False"]).models.policy_trainer.loss == "grpo"
    assert read_config(file, [f"{switch}=True", "models.policy_trainer.loss=gspo"]).models.policy_trainer.loss == "gspo"
    (said,) = problems_of(file, f"{switch}=True", "models.policy_trainer.loss=grpo")
    assert said.endswith("means models.policy_trainer.loss=gspo, but models.policy_trainer.loss=grpo is set; keep one")
    assert problems_of(file, f"{switch}=maybe") == (f"{switch}=maybe must be True or False",)


def test_the_resolved_file_says_the_same_again_and_can_be_moved(tmp_path: Path) -> None:
    config = read_config(TEMPLATE, ["runtime_args.output_dir=here", "models.policy_trainer.num_gpu=4"])
    path = tmp_path / "config.yaml"
    path.write_text(resolved_text(config))
    assert "${runtime_args.output_dir}" in path.read_text()
    assert read_config(path).model_dump() == config.model_dump()
    assert resolved_text(read_config(path)) == path.read_text()
    moved = read_config(path, ["runtime_args.output_dir=there"])
    assert moved.runtime_args.log_args_dict.log_dir == "there"
    assert moved.models.policy.num_gpu == 4


def test_the_resolved_file_of_a_changed_configuration_says_the_change(file: Path, tmp_path: Path) -> None:
    config = read_config(file, ["runtime_args.log_args_dict.log_dir=${runtime_args.output_dir}"])
    moved = config.runtime_args.model_copy(update={"output_dir": "elsewhere"})
    changed: GrpoConfig = config.model_copy(update={"runtime_args": moved})
    path = tmp_path / "config.yaml"
    path.write_text(resolved_text(changed))
    assert read_config(path).model_dump() == changed.model_dump()


names = st.text("abc", min_size=1, max_size=3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.recursive(st.integers(), lambda below: st.dictionaries(names, below, min_size=1, max_size=3), max_leaves=8))
def test_flatten_and_nest_are_inverse(tree: object) -> None:
    wrapped = {"root": tree}
    assert nest(flatten(wrapped)) == wrapped
