"""Whatever engines do in their processes, every request is answered exactly once, or the run ends with the reason."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from chatlearn.cluster.cluster import Cluster, ClusterSpec, Place, Troupe
from chatlearn.cluster.fanout import Group, Member, Ticket
from chatlearn.cluster.placement import Demand
from chatlearn.cluster.policy_group import EngineCare, PolicyGroup
from chatlearn.cluster.posts import MAX_FAILED_RESTARTS, Patience
from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat
from chatlearn.errors import DataError, WorkerError
from chatlearn.records import Completion, VersionRun
from chatlearn.rollout.assembly import request_ids
from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan

# Ray leaves its own pipes and sockets to the interpreter's end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

ANSWER_S = 0.01
PATIENCE = Patience(silence_s=2.0, restart_s=60.0)
PROMPT = np.array([1, 2], np.int32)


class Engine:
    """Answers slowly, in a process of its own, unless the model's path says that it does something else."""

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        return arrive()

    def open(self, engine: str, spec: EngineSpec) -> None:
        self._conduct = spec.model_path
        self._asked: dict[str, int] = {}

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        self._asked |= {request.request_id: os.getpid() for request in requests}

    def abort(self, request_ids: Sequence[str]) -> None:
        self._asked |= dict.fromkeys(request_ids, 0)

    def work(self, patience_s: float) -> list[Finished]:
        if self._conduct == "break":
            raise ValueError("no such kernel")
        if self._conduct == "refuse":
            raise DataError("model.safetensors: there is no such file")
        time.sleep(min(patience_s, ANSWER_S * len(self._asked)))
        names = list(self._asked)[: max(1, round(patience_s / ANSWER_S))]
        return [answer(name, self._asked.pop(name)) for name in names]

    def close(self) -> None:
        return None


def answer(name: str, pid: int) -> Finished:
    completion = Completion(
        np.array([pid], np.int32), np.zeros(1, np.float32), name, "stop" if pid else "abort", (VersionRun(0, 1),)
    )
    return Finished(name, completion)


def beat() -> None:
    """Nobody interrupts."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("policy")
    spec = ClusterSpec(address=None, demand=Demand(blocks=(2,), accelerated=False, num_cpus=0), output_dir=folder)
    with Cluster.open(spec, beat) as opened:
        yield opened


class Bench:
    """A policy group over two engines, and what it said."""

    def __init__(self, cluster: Cluster, num_engines: int = 2, conduct: str = "work") -> None:
        here = {"PYTHONPATH": str(Path(__file__).parent)}  # By which the actors find this module.
        places = [Place(slot, 0, 1, (), here) for slot in cluster.placement.slots[:num_engines]]
        group = cluster.spawn([Troupe("policy", Engine, places)])[0]
        specs = tuple(EngineSpec(conduct, max_model_len=64, replica=replica) for replica in range(num_engines))
        Group(group.members, beat).each("open", [("scripted", spec) for spec in specs])
        self.said: list[str] = []
        care = EngineCare("scripted", specs, False, False, PATIENCE, self.said.append)
        self.supplied: list[tuple[int, int]] = []
        self.policy = PolicyGroup(group, cluster, care)
        self.policy.supplied_by(self.supply)
        self.policy.current_version = 7

    def settle(self) -> list[Member]:
        """Who sits at the posts, once everybody is there."""
        while not all(post.is_manned for post in self.policy._posts):
            self.policy.advance()
            time.sleep(0.01)
        return [post.member for post in self.policy._posts]

    def supply(self, newcomer: Member, everybody: Sequence[Member], version: int) -> Iterator[Sequence[Ticket]]:
        assert newcomer in everybody
        self.supplied.append((newcomer.rank, version))
        yield ()

    def ask(self, num_groups: int) -> list[str]:
        names: list[str] = []
        for group in range(num_groups):
            names += request_ids(group, 4)
            self.policy.submit([Request(name, PROMPT) for name in request_ids(group, 4)], SamplingPlan())
        return names

    def run(self, hurt: Sequence[tuple[float, int, signal.Signals]] = ()) -> list[Finished]:
        """Until nothing is in flight; after so many seconds whoever sits at a post gets the signal."""
        members, begun, left = self.settle(), time.monotonic(), list(hurt)
        finished: list[Finished] = []
        while self.policy.num_in_flight:
            if left and time.monotonic() - begun > left[0][0]:
                _, rank, number = left.pop(0)
                os.kill(members[rank].pid, number)
            finished += self.policy.advance()
            time.sleep(0.01)
        return finished


@pytest.fixture(scope="module")
def bench(cluster: Cluster) -> Bench:
    return Bench(cluster)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_engine_had_not_answered_is_asked_again(bench: Bench, seed: int, number: signal.Signals) -> None:
    chance, num_before = random.Random(seed), bench.policy.num_replaced
    bench.settle()
    bench.said.clear()
    bench.supplied.clear()
    names = bench.ask(24)
    finished = bench.run([(chance.uniform(0.0, 0.4), chance.randrange(2), number)])
    assert Counter(item.request_id for item in finished) == Counter(names), "lost, or answered twice"
    assert bench.policy.num_replaced == num_before + 1
    (line,) = bench.said
    assert "another one is started" in line
    assert ("it has not answered for 2 s" in line) == (number is signal.SIGSTOP), line
    bench.settle()  # The other was quicker than the new one's start.
    assert [version for _, version in bench.supplied] == [7]


def test_both_engines_may_be_lost_at_once(bench: Bench) -> None:
    bench.supplied.clear()
    lost = {member.pid for member in bench.settle()}
    names = bench.ask(12)
    finished = bench.run([(0.1, 0, signal.SIGKILL), (0.1, 1, signal.SIGKILL)])
    assert Counter(item.request_id for item in finished) == Counter(names)
    assert {int(item.completion.token_ids[0]) for item in finished} - lost
    bench.settle()
    assert sorted(bench.supplied) == [(0, 7), (1, 7)]


def test_replacements_that_all_fail_end_the_run(cluster: Cluster) -> None:
    bench = Bench(cluster, num_engines=1, conduct="break")
    bench.ask(1)
    with pytest.raises(WorkerError, match=r"no such kernel.*3 replacements failed within 60 s"):
        bench.run()
    assert bench.policy.num_replaced == MAX_FAILED_RESTARTS


def test_what_another_engine_would_meet_too_ends_the_run_at_once(cluster: Cluster) -> None:
    bench = Bench(cluster, num_engines=1, conduct="refuse")
    bench.ask(1)
    with pytest.raises(WorkerError, match="there is no such file"):
        bench.run()
    assert bench.policy.num_replaced == 0


def test_nothing_is_given_to_engines_whose_weights_are_being_changed(bench: Bench) -> None:
    with bench.policy.held():
        names = bench.ask(2)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert bench.policy.advance() == []
    assert Counter(item.request_id for item in bench.run()) == Counter(names)


def test_an_aborted_request_comes_out_or_was_never_begun(bench: Bench) -> None:
    with bench.policy.held():
        names = bench.ask(24)
        bench.policy.abort(names[:2])
    bench.policy.advance()
    bench.policy.abort(names[-2:])
    reasons = {item.request_id: item.completion.finish_reason for item in bench.run()}
    assert reasons.keys() == set(names[2:]), "what nobody had begun is forgotten"
    assert {name for name, reason in reasons.items() if reason == "abort"} == set(names[-2:])


def test_prompts_go_to_the_engine_with_the_least_to_do_and_stay_together(bench: Bench) -> None:
    members = bench.settle()
    bench.ask(6)
    where: dict[str, set[int]] = {}
    for item in bench.run():
        where.setdefault(item.request_id.partition(".")[0], set()).add(int(item.completion.token_ids[0]))
    assert all(len(pids) == 1 for pids in where.values())
    assert Counter(pid for (pid,) in where.values()) == dict.fromkeys([member.pid for member in members], 3)
