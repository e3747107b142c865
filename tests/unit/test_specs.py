"""From keys to records: what each process is told, and where it is put."""

from __future__ import annotations

import os
from pathlib import Path

from chatlearn import specs
from chatlearn.cluster.crew import Blueprint
from chatlearn.config.environment import Environment
from chatlearn.config.layout import layout_of
from chatlearn.config.read import read_config
from chatlearn.models.pretrained import cache_bytes_per_token, read_configuration

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "embedded" / "tiny_qwen3"
DESCRIBED = read_configuration("models.policy_trainer.load", MODEL, trust_remote_code=False)
GPU_NODE = Environment(gpus_per_node=8, cores=64)
TWO_GPU_NODES = Environment(num_nodes=2, gpus_per_node=4, cores=64)


def blueprint(*overrides: str, environment: Environment, one_host: bool = False) -> Blueprint:
    config = read_config(ROOT / "template" / "quickstart.yaml", [f"models.policy_trainer.load={MODEL}", *overrides])
    return specs.blueprint(config, layout_of(config, environment), one_host=one_host)


EIGHT_GPUS = (
    "runtime_args.device=cuda",
    "runtime_args.colocation=[policy,policy_trainer,ref_policy]",
    "models.policy_trainer.num_gpu=8",
    "models.policy.num_gpu=8",
    "models.policy.tensor_model_parallel_size=2",
    "models.policy_trainer.kl_coef=0.1",
    "models.policy_trainer.free_gpu_memory.offload_weights=True",
    "models.policy_trainer.free_gpu_memory.offload_optimizer_states=True",
    "models.policy.free_gpu_memory.offload_weights=True",
)


def test_colocated_roles_share_the_same_slots_and_engines_span_theirs() -> None:
    plan = blueprint(*EIGHT_GPUS, environment=GPU_NODE)
    assert plan.policy.plan.slots == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert plan.trainer.sharded.plan.slots == tuple((slot,) for slot in range(8))
    assert plan.reference is not None
    assert plan.reference.plan.slots == plan.trainer.sharded.plan.slots


def test_colocated_roles_take_turns_with_what_the_keys_say() -> None:
    plan = blueprint(*EIGHT_GPUS, environment=GPU_NODE)
    assert plan.takes_turns
    assert plan.policy.gives_way
    assert (plan.trainer.sharded.luggage.weights, plan.trainer.sharded.luggage.optimizer) == (True, True)
    assert plan.policy.wire == "ipc"
    stays = blueprint(
        *EIGHT_GPUS, "models.policy_trainer.free_gpu_memory.offload_weights=False", environment=GPU_NODE
    ).trainer.sharded.luggage
    assert (stays.weights, stays.optimizer) == (False, True)


def test_roles_apart_have_slots_of_their_own_and_speak_nccl() -> None:
    apart = ("runtime_args.colocation=[]", "models.policy.num_gpu=4", "models.policy_trainer.num_gpu=4")
    plan = blueprint(*EIGHT_GPUS[:1], *EIGHT_GPUS[4:5], *apart, environment=GPU_NODE)
    engines = {slot for slots in plan.policy.plan.slots for slot in slots}
    trainers = {slot for slots in plan.trainer.sharded.plan.slots for slot in slots}
    assert not engines & trainers
    assert not plan.takes_turns
    assert not plan.policy.gives_way
    assert plan.policy.wire == "nccl"


def test_a_smaller_policy_wakes_beside_some_of_the_trainer_and_hands_over_by_ipc() -> None:
    plan = blueprint(*EIGHT_GPUS, "models.policy.num_gpu=4", environment=TWO_GPU_NODES)
    assert plan.policy.plan.slots == ((0, 1), (4, 5)), "one engine on each node of the trainer"
    assert (plan.policy.wire, plan.policy.gives_way, plan.trainer.sharded.luggage.weights) == ("ipc", True, True)


def test_whoever_shares_moves_and_whoever_does_not_stays() -> None:
    """Models that score share GPUs with the trainer; the engines, elsewhere, need not sleep for it."""
    apart = (*EIGHT_GPUS, "models.policy.num_gpu=4", "models.policy_trainer.num_gpu=4")
    plan = blueprint(*apart, "runtime_args.colocation=[policy_trainer,ref_policy]", environment=GPU_NODE)
    assert plan.trainer.sharded.luggage.weights
    assert not plan.takes_turns
    assert not plan.policy.gives_way
    plan = blueprint(*apart, "runtime_args.colocation=[policy,ref_policy]", environment=GPU_NODE)
    assert plan.policy.gives_way, "for the reference model"
    assert plan.takes_turns
    assert plan.policy.wire == "nccl"
    assert not plan.trainer.sharded.luggage.weights


def test_an_overlapped_schedule_binds_engines_and_ranks_to_cores_of_their_own() -> None:
    config = read_config(ROOT / "template" / "quickstart.yaml", [f"models.policy_trainer.load={MODEL}"])
    runtime = config.runtime_args.model_copy(update={"schedule": "one_step_off"})
    overlapped = config.model_copy(update={"runtime_args": runtime})
    cores = sorted(os.sched_getaffinity(0))
    machine = Environment(cores=len(cores))
    plan = specs.blueprint(overlapped, layout_of(overlapped, machine), one_host=True)
    engines = [core for spec in plan.policy.replicas for core in spec.cpu_cores]
    assert sorted({*engines, *plan.trainer.sharded.plan.cores}) == cores
    assert len(cores) == 1 or not set(engines) & set(plan.trainer.sharded.plan.cores)
    in_turns = specs.blueprint(config, layout_of(config, machine), one_host=True)
    assert in_turns.trainer.sharded.plan.cores == ()
    assert in_turns.policy.replicas[0].cpu_cores == tuple(cores)
    joined = specs.blueprint(overlapped, layout_of(overlapped, machine), one_host=False)
    assert joined.trainer.sharded.plan.cores == (), "of other machines we do not know which cores are ours"


def test_on_the_cpu_nothing_moves_and_cores_are_dealt_out() -> None:
    plan = blueprint("models.policy.num_gpu=2", environment=Environment(cores=4), one_host=True)
    assert not plan.policy.gives_way
    assert not plan.trainer.sharded.luggage.weights
    assert plan.policy.wire == "shared_memory"
    assert plan.trainer.sharded.plan.num_threads == 2
    for environment in plan.trainer.sharded.plan.environments:
        assert environment["OMP_NUM_THREADS"] == "2"
        assert environment["GLOO_SOCKET_IFNAME"] == "lo", "one machine: nothing listens outside"


def test_trainer_and_engine_speak_of_the_same_distribution() -> None:
    plan = blueprint("models.policy.temperature=0.7", environment=Environment())
    assert plan.trainer.sharded.model.temperature == 0.7
    config = read_config(ROOT / "template" / "quickstart.yaml", ["models.policy.temperature=0.7"])
    assert specs.sampling_plan(config).temperature == 0.7
    assert specs.evaluation_plan(config).temperature == 1.0


def test_an_engine_on_the_cpu_has_room_for_at_least_one_whole_sequence() -> None:
    spec = blueprint(
        "models.policy.generation_batch_size=1",
        "models.policy.max_response_tokens_length=3900",
        environment=Environment(),
    ).policy.replicas[0]
    assert spec.kv_cache_bytes >= cache_bytes_per_token(DESCRIBED) * spec.max_model_len


def test_the_size_of_the_cache_follows_from_the_model() -> None:
    assert cache_bytes_per_token(DESCRIBED) == 2 * 4 * 4 * 2 * 32  # keys and values, fp32, 4 layers, 2 heads of 32
