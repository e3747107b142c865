"""Three nodes of a real Ray, with GPUs that only Ray believes in: ranks are packed, engines spread, none torn apart."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster as RayCluster
from settler import Settler, Spot

from chatlearn import specs
from chatlearn.cluster.cluster import Cluster, ClusterSpec, Troupe
from chatlearn.cluster.crew import Blueprint, RolePlan, places
from chatlearn.cluster.placement import Demand
from chatlearn.config.environment import Environment, prepare_local_ray
from chatlearn.config.layout import Layout, layout_of
from chatlearn.config.read import read_config
from chatlearn.errors import ConfigError

# Ray leaves its own pipes and sockets to the interpreter's end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).resolve().parents[2]
NUM_NODES, GPUS_PER_NODE = 3, 3
THREE_NODES = Environment(num_nodes=NUM_NODES, gpus_per_node=GPUS_PER_NODE, cores=8)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    prepare_local_ray()
    enable_token_auth_by_default()
    node = {"num_cpus": 5, "num_gpus": GPUS_PER_NODE, "include_dashboard": False}
    nodes = RayCluster(initialize_head=True, head_node_args=node)
    for _ in range(NUM_NODES - 1):
        nodes.add_node(wait=False, **node)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


def planned(*overrides: str) -> tuple[Layout, Blueprint]:
    config = read_config(
        ROOT / "template" / "quickstart.yaml",
        [f"models.policy_trainer.load={ROOT / 'embedded' / 'tiny_qwen3'}", "runtime_args.device=cuda", *overrides],
    )
    layout = layout_of(config, THREE_NODES)
    return layout, specs.blueprint(config, layout, one_host=False)


@contextmanager
def joined(address: str, folder: Path, layout: Layout) -> Generator[Cluster]:
    """The run's own view of the three nodes, with its slots reserved."""
    demand = Demand(layout.arrangement.blocks, layout.device_kind == "cuda", num_cpus=2)
    with Cluster.open(ClusterSpec(address, demand, folder), heartbeat=ray.is_initialized) as cluster:
        yield cluster


def settle(cluster: Cluster, role: str, plan: RolePlan) -> list[Spot]:
    """Start the processes of a role and ask each where it is."""
    here = {"PYTHONPATH": str(Path(__file__).parent)}  # By which the actors find this module.
    homes = [replace(home, environment=home.environment | here) for home in places(cluster, plan)]
    return cluster.spawn([Troupe(role, Settler, homes)])[0].map("spot")


def test_ranks_are_packed_by_node_and_engines_are_spread_over_what_is_left(address: str, tmp_path: Path) -> None:
    layout, plan = planned(
        "models.policy_trainer.num_gpu=4", "models.policy.num_gpu=4", "models.policy.tensor_model_parallel_size=2"
    )
    with joined(address, tmp_path, layout) as cluster:
        ranks = settle(cluster, "policy_trainer", plan.trainer.sharded.plan)
        engines = settle(cluster, "policy", plan.policy.plan)
        assert len({spot.node for spot in ranks[:3]}) == 1
        assert ranks[0].node != ranks[3].node
        assert len({spot.node for spot in engines}) == 2, "one engine beside the last ranks, one where nobody is"
        assert ranks[0].node not in {spot.node for spot in engines}
        assert [len(spot.devices) for spot in engines] == [2, 2], "an engine sees the devices of its node it spans"
        devices = [(spot.node, device) for spot in (*ranks, *engines) for device in spot.devices]
        assert len(devices) == len(set(devices)) == 8, "apart, no device is seen by two"


def test_roles_that_take_turns_see_the_same_devices_and_leave_nothing_reserved(address: str, tmp_path: Path) -> None:
    layout, plan = planned(
        "runtime_args.colocation=[policy,policy_trainer,ref_policy]",
        "models.policy_trainer.num_gpu=5",
        "models.policy_trainer.kl_coef=0.1",
        "models.ref_policy.num_gpu=1",
        "models.policy.num_gpu=4",
        "models.policy.tensor_model_parallel_size=2",
    )
    with joined(address, tmp_path, layout) as cluster:
        engines = settle(cluster, "policy", plan.policy.plan)
        ranks = settle(cluster, "policy_trainer", plan.trainer.sharded.plan)
        assert plan.reference is not None
        references = settle(cluster, "ref_policy", plan.reference.plan)
        trained = {(spot.node, spot.devices[0]) for spot in ranks}
        assert len(trained) == 5
        assert {(spot.node, device) for spot in engines for device in spot.devices} < trained
        assert [spot.node for spot in engines] == [ranks[0].node, ranks[3].node]
        assert references == ranks[:1]
        assert ray.available_resources().get("GPU", 0) == NUM_NODES * GPUS_PER_NODE - 5


def test_engines_are_spread_also_where_one_node_would_hold_everything(address: str, tmp_path: Path) -> None:
    layout, _ = planned("models.policy_trainer.num_gpu=1", "models.policy.num_gpu=2")
    assert layout.arrangement.blocks == (1, 1, 1)
    with joined(address, tmp_path, layout) as cluster:
        reserved = ray.util.placement_group_table(cluster.placement.group)
        assert len(set(reserved["bundles_to_node_id"].values())) == 3


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ((3, 3, 3, 1), "needs 10 GPUs, but the Ray cluster has 9"),
        (
            (4, 4),
            r"needs 4 \+ 4 GPUs, each number on one node, but the nodes of the Ray cluster have 3, 3, 3; set NNODES",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused_and_nothing_waits_for_it(
    address: str, tmp_path: Path, blocks: tuple[int, ...], complaint: str
) -> None:
    spec = ClusterSpec(address, Demand(blocks, accelerated=True, num_cpus=0), tmp_path)
    with pytest.raises(ConfigError, match=complaint), Cluster.open(spec, heartbeat=ray.is_initialized):
        pass
