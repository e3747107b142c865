"""A process stopped in the middle of a call, on a real Ray: it is named, and the run goes on once it may."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from gang import GangOf

from chatlearn.cluster import lookout
from chatlearn.cluster.cluster import Cluster, ClusterSpec, Place, Troupe
from chatlearn.cluster.fanout import Group, Member
from chatlearn.cluster.lookout import Station, looking_out
from chatlearn.cluster.placement import Demand
from chatlearn.cluster.presence import Observer
from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat
from chatlearn.observability.standstill import is_in_collective
from chatlearn.observability.whereabouts import read_whereabouts, whereabouts_path

# Ray leaves its own pipes and sockets to the interpreter's end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

TIMEOUT_S = 1.5
PATIENCE_S = 30.0


class Worker:
    """Waits a little itself, or for another one that does."""

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        return arrive()

    def pause(self, seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    def ask_to_pause(self, other: Member, pauses: Sequence[float]) -> list[str]:
        group = Group([other], heartbeat=do_nothing)
        return [group.first("pause", seconds) for seconds in pauses]

    def close(self) -> None:
        return None


def do_nothing() -> None:
    return None


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    demand = Demand(blocks=(2,), accelerated=False, num_cpus=0)
    with Cluster.open(ClusterSpec(None, demand, tmp_path_factory.mktemp("run")), do_nothing) as opened:
        yield opened


@pytest.fixture(scope="module")
def group(cluster: Cluster) -> Group:
    here = {"PYTHONPATH": str(Path(__file__).parent)}  # By which the actors find this module.
    places = [Place(slot, 0, 1, (), here) for slot in cluster.placement.slots]
    return cluster.spawn([Troupe("worker", Worker, places)])[0]


def test_a_stopped_process_is_named_by_who_waits_for_it_and_the_run_goes_on(cluster: Cluster, group: Group) -> None:
    said: list[str] = []
    report_path = cluster.spec.output_dir / "stuck_report.txt"

    def stopped() -> list[str]:
        """Reports by somebody who looked twice while it was stopped; on a slow machine the first may come before."""
        return [text for text in said if "its process is stopped" in text]

    first, second = group.members
    answers: list[list[str]] = []

    def call() -> None:
        answers.append(group.first("ask_to_pause", second, [4.0]))

    with looking_out(Station(TIMEOUT_S, cluster.members, report_path, said.append)):
        caller = threading.Thread(target=call)
        caller.start()
        file = whereabouts_path(second.log_file)
        wait_until(lambda: (words := read_whereabouts(file)) is not None and words.call == "Worker.pause")
        os.kill(second.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: stopped() != [])
        finally:
            os.kill(second.pid, signal.SIGCONT)
        caller.join(PATIENCE_S)
        wait_until(lambda: said[-1].startswith("the run goes on"))
    assert answers == [["rested"]]
    report = stopped()[-1]
    assert "=> waited for by all who wait (driver, worker rank 0): worker rank 1" in report
    assert f"`kill -CONT {second.pid}`" in report
    assert f"worker rank 0 (pid {first.pid} on {first.host}): Worker.ask_to_pause" in report
    full = report_path.read_text()
    assert all(name in full for name in ("Worker.ask_to_pause", "Worker.pause", "collect", "main thread"))


def test_nothing_is_said_while_something_is_finished(cluster: Cluster, group: Group, tmp_path: Path) -> None:
    """Answers to the driver count, and answers that one actor gives to another while the driver waits for that one."""
    said: list[str] = []
    pauses = [0.5] * math.ceil((TIMEOUT_S + lookout.SILENCE_S + 2 * lookout.LOOK_EVERY_S) / 0.5)  # A report takes less.
    with looking_out(Station(TIMEOUT_S, cluster.members, tmp_path / "report.txt", said.append)):
        group.first("ask_to_pause", group.members[1], pauses)
        assert said == []
        for seconds in pauses:
            group.map("pause", seconds)
    assert said == []


def test_zero_keeps_no_lookout(cluster: Cluster, tmp_path: Path) -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    with looking_out(Station(0.0, cluster.members, tmp_path / "report.txt", [].append)):
        assert "lookout" not in threads()
    with looking_out(Station(60.0, cluster.members, tmp_path / "report.txt", [].append)):
        assert "lookout" in threads()
    assert "lookout" not in threads()


def meet(seen: Path) -> bool:
    """Rank 1 comes to a collective only when ``seen`` exists; rank 0 writes it when it sees itself wait in there."""
    import torch
    from torch import distributed

    observer = Observer("rank", distributed.get_rank())
    if distributed.get_rank() == 1:
        wait_until(seen.exists)
        was_in_collective = is_in_collective(observer.look().stack)
        distributed.all_reduce(torch.ones(1))
        return was_in_collective

    def look() -> None:
        wait_until(lambda: is_in_collective(observer.look().stack))
        seen.touch()

    looking = threading.Thread(target=look)
    looking.start()
    distributed.all_reduce(torch.ones(1))
    looking.join()
    return seen.exists()


def test_a_collective_is_recognised_from_its_real_stack(gang_of: GangOf, tmp_path: Path) -> None:
    assert gang_of(2).run(meet, tmp_path / "seen") == [True, False]


def test_an_idle_actor_says_so(group: Group) -> None:
    def idle(member: Member) -> bool:
        words = read_whereabouts(whereabouts_path(member.log_file))
        named = (member.role, member.rank, member.pid, None)
        return words is not None and (words.role, words.rank, words.pid, words.call) == named

    for member in group.members:
        wait_until(lambda member=member: idle(member))
