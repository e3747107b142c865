"""Processes on a real Ray: who fails is named, and waiting can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from chatlearn.checkpoint.durable import write_text
from chatlearn.cluster.archive import Archive, Draft
from chatlearn.cluster.cluster import Cluster, ClusterSpec, Place, Troupe, start_ray
from chatlearn.cluster.fanout import Group
from chatlearn.cluster.interruption import Interrupted, Interruption
from chatlearn.cluster.placement import Demand
from chatlearn.cluster.seat import Arrival, Seat, arrive, forget_meetings, meeting_place, take_seat
from chatlearn.errors import ConfigError, DataError, RunError, WorkerError

# Ray leaves its own pipes and sockets to the interpreter's end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Worker:
    """Does what a test wants to see done in another process."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        take_seat(seat)

    def arrive(self) -> Arrival:
        return arrive()

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def cores(self) -> set[int]:
        return os.sched_getaffinity(0)

    def rank_times(self, factor: int) -> int:
        return self.seat.rank * factor

    def raise_on(self, rank: int, error: Exception) -> None:
        if self.seat.rank == rank:
            raise error

    def die_on(self, rank: int) -> None:
        """The others complain at once, as ranks of a broken collective do."""
        if self.seat.rank == rank:
            time.sleep(0.3)
            os._exit(1)
        raise RuntimeError("connection closed by peer")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def begin_save(self, staging: Path, in_background: bool) -> None:
        """The test writes in our place."""

    def saving_fault(self) -> str | None:
        return None

    def close(self) -> None:
        return None


class Broken:
    """Cannot be built."""

    def __init__(self, seat: Seat) -> None:
        raise ValueError(f"{seat.role} has no such thing")

    def arrive(self) -> Arrival:
        return arrive()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def interruption() -> Interruption:
    return Interruption()


@pytest.fixture(scope="module")
def cluster(folder: Path, interruption: Interruption) -> Iterator[Cluster]:
    spec = ClusterSpec(address=None, demand=Demand(blocks=(2,), accelerated=False, num_cpus=0), output_dir=folder)
    with Cluster.open(spec, interruption.check) as opened:
        yield opened


@pytest.fixture(scope="module")
def group(cluster: Cluster) -> Group:
    return spawned(cluster)


def spawned(cluster: Cluster) -> Group:
    """Two workers, each in a slot."""
    here = {"PYTHONPATH": str(Path(__file__).parent)}  # By which the actors find this module.
    slots = cluster.placement.slots
    cores = [(), (min(os.sched_getaffinity(0)),)]
    places = [Place(slot, 0, 1, cores[rank], here | {"TOLD": f"rank {rank}"}) for rank, slot in enumerate(slots)]
    return cluster.spawn([Troupe("worker", Worker, places)])[0]


def test_answers_come_in_the_order_of_the_ranks(group: Group) -> None:
    assert group.map("rank_times", 10) == [0, 10]
    assert group.each("rank_times", [(1,), (2,)]) == [0, 2]
    assert group.first("rank_times", 5) == 0
    assert group.map("variable", "TOLD") == ["rank 0", "rank 1"]


def test_threads_stay_on_the_cores_of_their_seat_where_it_names_some(group: Group) -> None:
    assert group.map("cores") == [os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}]


def test_an_exception_is_one_sentence_and_its_traceback_is_in_the_log(group: Group) -> None:
    with pytest.raises(WorkerError, match=r"worker rank 1 on .* failed: ValueError: no such luck") as caught:
        group.map("raise_on", 1, ValueError("no such luck"))
    assert (caught.value.role, caught.value.rank) == ("worker", 1)
    log = Path(group.members[1].log_file).read_text()
    assert "in raise_on" in log
    assert "no such luck" in log


def test_an_error_of_ours_keeps_its_words(group: Group) -> None:
    with pytest.raises(WorkerError, match=r"worker rank 0 .*: x.json: row 3 is empty"):
        group.map("raise_on", 0, DataError("x.json: row 3 is empty"))


def test_the_dead_are_named_before_those_who_complain_of_it(cluster: Cluster) -> None:
    with pytest.raises(WorkerError, match=r"worker rank 1 on .* failed: its process \(pid \d+\) died"):
        spawned(cluster).map("die_on", 1)


def test_an_actor_that_cannot_be_built_says_why(cluster: Cluster) -> None:
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    place = Place(cluster.placement.slots[0], 0, 1, (), here)
    with pytest.raises(WorkerError, match=r"broken rank 0 .* failed: its start failed: .*no such thing"):
        cluster.spawn([Troupe("broken", Broken, [place])])


def test_a_checkpoint_arrives_although_the_run_ends_by_an_error_and_nobody_waits_for_the_dead(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatlearn.cluster.archive.SEE_OUT_S", 60.0)
    trainers, done, said = spawned(cluster), list[str](), list[str]()
    archive = Archive(trainers, None, said.append, in_background=True)
    archive.see_out(RunError("no engine is left"), cluster.heartbeat)
    assert said == [], "nothing was being written"
    for name, end in (("first", trainers.members), ("second", trainers.members[:1])):
        staging = tmp_path / name
        archive.begin(Draft(7, staging, None, lambda _, name=name: done.append(name)))
        for member in end:
            write_text(staging / "reports" / f"rank_{member.rank}.json", '{"files": []}')
        if len(end) == 1:
            os.kill(trainers.members[1].pid, signal.SIGKILL)
        begun = time.monotonic()
        archive.see_out(RunError("no engine is left"), cluster.heartbeat)
        assert time.monotonic() - begun < 30
    assert done == ["first"]
    assert said == ["the run ends: no engine is left. Checkpoint 7 is being written, and gets its time for that"] * 2


def test_only_the_files_that_ranks_met_by_are_forgotten(tmp_path: Path) -> None:
    for rank in range(2):
        seat = Seat("policy_trainer", rank, 2, 1, (), str(tmp_path / f"policy_trainer_{rank}.log"), one_host=True)
        Path(meeting_place(seat).removeprefix("file://")).touch()
        Path(seat.log_file).touch()
    assert len(list(tmp_path.iterdir())) == 4
    forget_meetings(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy_trainer_0.log", "policy_trainer_1.log"]


def test_actors_json_tells_who_is_there(cluster: Cluster, group: Group, folder: Path) -> None:
    rows = json.loads((folder / "actors.json").read_text())["actors"]
    pids = {row["pid"] for row in rows if row["role"] == "worker" and row["state"] == "running"}
    assert {member.pid for member in group.members} <= pids


def test_too_large_a_demand_is_refused_with_the_numbers(cluster: Cluster) -> None:
    from chatlearn.cluster.placement import Placement

    with pytest.raises(ConfigError, match=r"needs 4 GPUs, but the Ray cluster has 0"):
        Placement.open(Demand(blocks=(4,), accelerated=True, num_cpus=0), heartbeat=ray.is_initialized)


def test_waiting_can_be_interrupted_where_it_was_said_so(group: Group, interruption: Interruption) -> None:
    interruption.requested = True
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        Group(group.members, interruption.check).map("sleep", 60.0)
    assert time.monotonic() - begun < 10
    interruption.requested = False


def test_an_address_where_nobody_answers_is_said_at_once(tmp_path: Path) -> None:
    """Ray itself would try for minutes, and say nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, so that nobody else is there, and not listening
        begun = time.monotonic()
        with pytest.raises(RunError, match=rf"RAY_ADDRESS={address}: nobody answers there"):
            start_ray(ClusterSpec(address, Demand(blocks=(1,), accelerated=False, num_cpus=0), tmp_path))
        assert time.monotonic() - begun < 20
