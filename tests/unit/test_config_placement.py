"""Who gets which device: ranks packed by node, engines spread, none torn apart, and nothing refused that fits."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatlearn.config.placement import Arrangement, DeviceGroup, arrange, arrange_anywhere

SIZES = st.integers(1, 12)
WIDTHS = st.integers(1, 4)
NODES = st.integers(1, 4)
GPUS = st.integers(1, 8)


def together(**sizes: int) -> DeviceGroup:
    return DeviceGroup(tuple(sizes), tuple(sizes.values()))


def nodes_of(arrangement: Arrangement, role: str) -> list[int]:
    """The node of each process of a role."""
    return [arrangement.node_of(process[0]) for process in arrangement.processes[role]]


def check(arrangement: Arrangement, groups: list[DeviceGroup], width: int, gpus_per_node: int) -> None:
    assert max(arrangement.blocks) <= gpus_per_node
    used = [{slot for role in group.roles for own in arrangement.processes[role] for slot in own} for group in groups]
    assert sum(map(len, used)) == len(set[int]().union(*used)), "groups have devices of their own"
    for group in groups:
        for role, size in zip(group.roles, group.sizes, strict=True):
            processes = arrangement.processes[role]
            slots = [slot for process in processes for slot in process]
            assert len(slots) == len(set(slots)) == size
            assert {len(process) for process in processes} == {width if role == "policy" else 1}
            for process in processes:
                assert len({arrangement.node_of(slot) for slot in process}) == 1, "an engine lies inside one node"
            assert nodes_of(arrangement, role) == sorted(nodes_of(arrangement, role)), "in the order of the nodes"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ranks=SIZES, engines=st.integers(1, 6), width=WIDTHS, num_nodes=NODES, gpus=GPUS)
def test_apart_whatever_fits_behind_the_ranks_is_arranged(
    ranks: int, engines: int, width: int, num_nodes: int, gpus: int
) -> None:
    groups = [together(policy=engines * width), together(policy_trainer=ranks)]
    arrangement = arrange(groups, width, num_nodes, gpus)
    full, begun = divmod(ranks, gpus)
    left = [0] * full + ([gpus - begun] if begun else [])
    left += [gpus] * (num_nodes - len(left))
    fits = len(left) == num_nodes and sum(room // width for room in left) >= engines
    assert (arrangement is not None) == fits
    if arrangement is not None:
        check(arrangement, groups, width, gpus)
        assert len(set(nodes_of(arrangement, "policy_trainer"))) == -(-ranks // gpus), "on as few nodes as possible"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ranks=SIZES, engines=st.integers(1, 6), width=WIDTHS, num_nodes=NODES, gpus=GPUS, reference=SIZES)
def test_together_engines_live_beside_trainer_ranks(
    ranks: int, engines: int, width: int, num_nodes: int, gpus: int, reference: int
) -> None:
    assume(engines * width <= ranks)
    groups = [together(policy=engines * width, policy_trainer=ranks, ref_policy=reference)]
    arrangement = arrange(groups, width, num_nodes, gpus)
    full, begun = divmod(ranks, gpus)
    fits = max(ranks, reference) <= num_nodes * gpus and full * (gpus // width) + begun // width >= engines
    assert (arrangement is not None) == fits
    if arrangement is not None:
        check(arrangement, groups, width, gpus)
        slots = {role: {slot for own in processes for slot in own} for role, processes in arrangement.processes.items()}
        assert slots["policy"] <= slots["policy_trainer"], "each engine's weights come from a rank on its GPU"
        assert sum(arrangement.blocks) == max(ranks, reference), "they share"


def test_engines_spread_over_the_nodes_that_ranks_left() -> None:
    groups = [together(policy=8), together(policy_trainer=8)]
    arrangement = arrange(groups, 1, num_nodes=3, slots_per_node=8)
    assert arrangement is not None
    assert arrangement.blocks == (8, 4, 4)
    assert Counter(nodes_of(arrangement, "policy_trainer")) == {0: 8}
    assert Counter(nodes_of(arrangement, "policy")) == {1: 4, 2: 4}


def test_fewer_engines_than_ranks_spread_over_the_nodes_of_the_ranks() -> None:
    arrangement = arrange([together(policy=4, policy_trainer=16)], 2, num_nodes=2, slots_per_node=8)
    assert arrangement is not None
    assert arrangement.processes["policy"] == ((0, 1), (8, 9))


def test_engines_leave_a_device_out_rather_than_straddle_nodes() -> None:
    arrangement = arrange([together(policy=9, policy_trainer=12)], 3, num_nodes=2, slots_per_node=8)
    assert arrangement is not None
    assert arrangement.processes["policy"] == ((0, 1, 2), (3, 4, 5), (8, 9, 10))


def test_two_models_stand_on_one_node_each_unless_engines_need_the_whole_second() -> None:
    models = [together(policy_trainer=6), together(ref_policy=6)]
    tidy = arrange([*models, together(policy=4)], 2, num_nodes=2, slots_per_node=8)
    assert tidy is not None
    assert set(nodes_of(tidy, "policy_trainer")) == {0}
    assert set(nodes_of(tidy, "ref_policy")) == {1}
    dense = arrange([*models, together(policy=4)], 4, num_nodes=2, slots_per_node=8)
    assert dense is not None
    assert Counter(nodes_of(dense, "ref_policy")) == {0: 2, 1: 4}
    assert dense.processes["policy"] == ((12, 13, 14, 15),)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ranks=SIZES, engines=st.integers(1, 6), width=WIDTHS, num_nodes=NODES, shared=st.booleans())
def test_nodes_without_gpus_hold_any_run_and_share_it(
    ranks: int, engines: int, width: int, num_nodes: int, shared: bool
) -> None:
    sizes = {"policy_trainer": ranks, "policy": engines * width}
    groups = [together(**sizes)] if shared else [together(**{role: size}) for role, size in sizes.items()]
    arrangement = arrange_anywhere(groups, width, num_nodes)
    total = sum(arrangement.blocks)
    check(arrangement, groups, width, gpus_per_node=total)
    assert total == sum(group.num_devices for group in groups)
    if num_nodes == 1:
        assert arrangement.blocks == (total,)
