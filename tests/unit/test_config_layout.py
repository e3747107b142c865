"""What follows from a configuration on a machine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.config.checks import choices
from chatlearn.config.environment import Environment
from chatlearn.config.layout import Layout, device_kind_of, layout_of
from chatlearn.config.read import read_config
from chatlearn.config.summary import summary_rows
from chatlearn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "template" / "grpo_fsdp.yaml"
EIGHT_GPUS = Environment(gpus_per_node=8, cores=64)
TWO_NODES = Environment(num_nodes=2, gpus_per_node=8, cores=64)


def planned(environment: Environment, *overrides: str) -> Layout:
    return layout_of(read_config(TEMPLATE, overrides), environment)


@cache
def planned_once() -> Layout:
    return planned(Environment())


def test_the_quickstart_takes_turns_on_two_cores() -> None:
    layout = layout_of(read_config(ROOT / "template" / "quickstart.yaml"), Environment(cores=2))
    assert (layout.device_kind, layout.colocated) == ("cpu", False)
    assert (layout.prompts_per_episode, layout.samples_per_episode, layout.steps_per_episode) == (32, 256, 1)
    assert (layout.trainer.num_ranks, layout.trainer.cores_per_process) == (2, 1)
    assert (layout.policy.num_replicas, layout.policy.cores_per_process) == (1, 2)
    assert layout.reference is None


def test_eight_gpus_are_shared_by_engines_and_trainer() -> None:
    layout = planned(EIGHT_GPUS, "models.policy_trainer.num_gpu=8", "models.policy.tensor_model_parallel_size=2")
    assert layout.device_kind == "cuda"
    assert layout.colocated
    assert layout.num_devices == 8
    assert (layout.policy.num_replicas, layout.policy.tensor_parallel_size) == (4, 2)
    assert layout.policy.max_sequence_tokens == 3072
    assert layout.trainer.cores_per_process == 8
    assert (layout.policy.offload_weights, layout.trainer.offload_weights) == (True, True)
    assert layout.trainer.offload_optimizer_states
    assert layout.training.max_tokens == 32768


def test_a_reference_model_is_planned_only_when_asked_for() -> None:
    assert planned(EIGHT_GPUS).reference is None
    reference = planned(
        EIGHT_GPUS, "models.policy_trainer.kl_coef=0.1", "models.policy_trainer.max_token_in_packing=9000"
    ).reference
    assert reference is not None
    assert reference.load == "your_hf_model_path"
    assert reference.scoring.max_tokens == 9000


def test_roles_apart_add_up() -> None:
    layout = planned(EIGHT_GPUS, "runtime_args.colocation=[]", "models.policy.num_gpu=6")
    assert not layout.colocated
    assert layout.num_devices == 8


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        (EIGHT_GPUS, ["models.policy.num_gpu=4"],
         "models.policy.num_gpu=4 is more than models.policy_trainer.num_gpu=2, with which it shares GPUs "
         "(runtime_args.colocation): an engine takes its weights from a trainer rank on the same GPU; use at most 2, "
         "or leave policy out of the list, and it has GPUs of its own"),
        (EIGHT_GPUS, ["models.policy_trainer.num_gpu=16"], "the run needs 16 GPUs (policy + policy_trainer: 16), but "
         "1 node(s) with 8 GPUs have 8; lower models.*.num_gpu, let roles share GPUs with runtime_args.colocation, "
         "or add nodes"),
        (TWO_NODES, ["models.policy_trainer.num_gpu=16", "models.policy.tensor_model_parallel_size=16"],
         "models.policy.tensor_model_parallel_size=16 is more than the GPUs of a node (GPUS_PER_NODE=8), and an engine "
         "lies inside one; use 1, 2, 4 or 8"),
        (TWO_NODES, ["models.policy_trainer.num_gpu=12", "models.policy.tensor_model_parallel_size=3"],
         "models.policy.num_gpu=12 with tensor_model_parallel_size=3 makes 4 engines, each inside one node, and with "
         "the other roles on 2 node(s) with 8 GPUs not all of them find 3 GPUs beside each other; use a size that "
         "divides the GPUs of a node (1, 2, 4 or 8), lower num_gpu, or add nodes"),
        (Environment(), ["runtime_args.device=cuda"], "runtime_args.device=cuda needs GPUs and this machine shows "
         "none; set runtime_args.device=cpu, or GPUS_PER_NODE to plan for another machine with --dry-run"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_machine_is_said(environment: Environment, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(environment, *overrides)
    assert message in caught.value.problems


def test_on_the_cpu_ranks_need_not_be_equal() -> None:
    layout = planned(Environment(cores=4), "models.policy.num_gpu=1", "models.policy_trainer.num_gpu=3")
    assert layout.device_kind == "cpu"
    assert layout.trainer.cores_per_process == 1


def with_schedule(schedule: str, environment: Environment, *overrides: str) -> Layout:
    config = read_config(TEMPLATE, overrides)
    runtime = config.runtime_args.model_copy(update={"schedule": schedule})
    return layout_of(config.model_copy(update={"runtime_args": runtime}), environment)


def test_who_works_at_the_same_time_divides_the_cores_and_who_takes_turns_has_them_all() -> None:
    ranks = ("models.policy.num_gpu=2", "models.policy_trainer.num_gpu=3", "models.policy_trainer.kl_coef=0.1")
    machine = Environment(cores=13)
    turns, overlap = with_schedule("sync", machine, *ranks), with_schedule("async", machine, *ranks)
    assert (turns.policy.cores_per_process, turns.trainer.cores_per_process) == (6, 4)
    assert (overlap.policy.cores_per_process, overlap.trainer.cores_per_process) == (3, 2)
    assert overlap.reference is not None
    assert overlap.reference.cores_per_process == 2, "it takes turns with the trainer"
    split = overlap.share_cores(range(13))
    assert (split.learners, split.engines) == (tuple(range(6)), tuple(range(6, 13)))
    assert turns.share_cores(range(13)).engines == turns.share_cores(range(13)).learners == tuple(range(13))
    assert with_schedule("async", Environment(cores=1)).trainer.cores_per_process == 1


def test_engines_that_never_rest_cannot_share_gpus() -> None:
    with pytest.raises(ConfigError) as caught:
        with_schedule("one_step_off", EIGHT_GPUS)
    assert caught.value.problems == (
        "runtime_args.schedule=one_step_off keeps the engines busy while others compute, so policy cannot share the "
        "GPUs of policy_trainer (runtime_args.colocation): leave policy out of the list, or use schedule=sync",
    )
    assert with_schedule("one_step_off", EIGHT_GPUS, "runtime_args.colocation=[]").overlaps


def test_a_gpus_part_of_the_cores_is_that_of_everybody_on_it() -> None:
    apart = planned(EIGHT_GPUS, "runtime_args.colocation=[]", "models.policy.num_gpu=6")
    assert (apart.policy.cores_per_process, apart.trainer.cores_per_process) == (8, 8)


def test_a_base_that_is_the_reference_takes_no_devices() -> None:
    adapter = ("models.policy_trainer.kl_coef=0.1", "models.policy_trainer.lora.rank=8")
    adapter += ("runtime_args.colocation=[policy,policy_trainer]",)
    assert planned(EIGHT_GPUS, *adapter).num_devices == 2
    assert planned(EIGHT_GPUS, *adapter, "models.ref_policy.load=another").num_devices == 4


def test_auto_takes_gpus_where_the_launcher_tells_of_them() -> None:
    config = read_config(TEMPLATE)
    assert device_kind_of(config, Environment()) == "cpu"
    assert device_kind_of(config, EIGHT_GPUS) == "cuda"
    assert device_kind_of(read_config(TEMPLATE, ["runtime_args.device=cpu"]), EIGHT_GPUS) == "cpu"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(0, 60), num_parts=st.integers(1, 8), num_epochs=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_every_epoch_trains_on_every_sample_once(num_samples: int, num_parts: int, num_epochs: int, seed: int) -> None:
    layout = replace(planned_once(), num_minibatches=num_parts, num_training_epoch=num_epochs)
    samples = list(range(num_samples))
    parts = list(layout.batches(samples, seed))
    assert len(parts) == layout.steps_per_episode == num_parts * num_epochs
    for epoch in range(num_epochs):
        own = parts[epoch * num_parts : (epoch + 1) * num_parts]
        assert sorted(sample for part in own for sample in part) == samples
        assert max(map(len, own)) - min(map(len, own)) <= 1
    assert [sample for part in parts[:num_parts] for sample in part] == samples
    assert parts == list(layout.batches(samples, seed))


def test_choices_name_divisors_near_the_wrong_number() -> None:
    assert choices(8, 3) == "1, 2, 4 or 8"
    assert choices(1, 3) == "1"
    assert choices(512, 32) == "1, 2, 4, 8, 16, 32, 64 or 128"


def test_the_summary_speaks_of_every_group() -> None:
    rows = dict(summary_rows(planned(EIGHT_GPUS, "models.policy_trainer.num_gpu=8")))
    assert rows["policy + policy_trainer"] == "8 GPUs"
    assert rows["from each node"] == "8"
    assert rows["reference model"] == "none (kl_coef is 0)"
    assert rows["engines"] == "8 with tensor parallel size 1"


@pytest.mark.parametrize(
    ("variables", "num_nodes", "node_rank"),
    [
        ({}, 1, 0),
        ({"NNODES": "2", "RANK": "1"}, 2, 1),
        ({"WORLD_SIZE": "4", "NODE_RANK": "3"}, 4, 3),
        ({"WORLD_SIZE": "2", "NNODES": "2", "RANK": "0", "NODE_RANK": "0"}, 2, 0),
    ],
)
def test_the_launch_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], num_nodes: int, node_rank: int
) -> None:
    _set(monkeypatch, {**variables, "GPUS_PER_NODE": "8"})
    environment = Environment.read()
    assert (environment.num_nodes, environment.node_rank, environment.gpus_per_node) == (num_nodes, node_rank, 8)
    assert environment.cores >= 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2", "WORLD_SIZE": "16"}, "NNODES=2 and WORLD_SIZE=16 say different things; set one of them"),
        ({"NNODES": "two"}, "the environment variable NNODES='two' must be a whole number of at least 1"),
        ({"NNODES": "2", "RANK": "2"}, "the node's rank 2 (NODE_RANK or RANK) must be below NNODES=2"),
    ],
)
def test_a_contradictory_launch_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Environment.read()


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("NNODES", "WORLD_SIZE", "RANK", "NODE_RANK", "GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
