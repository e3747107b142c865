"""The replicas of the rollout engine: who answers which request, and what happens when one of them dies or hangs.

Law: every request that was asked comes out exactly once, whichever engines die meanwhile. An engine that is replaced
takes its unfinished requests with it; they are asked again, of others or of its successor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import ray

from chatlearn.cluster.fanout import Group, Member, Ticket, call
from chatlearn.cluster.posts import BrokenError, Patience, Post, Succeeding, Succession
from chatlearn.errors import WorkerError
from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan, WakePart

# An engine computes for so long before it looks at what else it is asked: abort, new requests, weights.
WORK_S = 0.1
# While one call is answered the next one waits in the engine's process, so that it never waits for the driver.
CALLS_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that is not answered yet."""

    request: Request
    plan: SamplingPlan


@dataclass(frozen=True)
class EngineCare:
    """What it takes to start an engine anew, and to be patient with one.

    ``proves``: a new engine shows that it uses what it is sent. ``gives_way``: its memory is for others between
    rollouts. ``tell`` says something to the person who watches.
    """

    engine: str
    replicas: tuple[EngineSpec, ...]
    proves: bool
    gives_way: bool
    patience: Patience
    tell: Callable[[str], None]


# Brings the weights of a version to newcomers: given the newcomer and everybody, the tickets to wait for, in turn.
Supply = Callable[[Member, Sequence[Member], int], Iterator[Sequence[Ticket]]]


class PolicyGroup:
    """The engines as the loop sees them: requests go in, answers come out.

    ``current_version`` names the weights that the trainer still has, so that they can be brought to an engine that was
    started anew; ``None`` while the trainer is changing them.
    """

    def __init__(self, engines: Group, cluster: Succeeding, care: EngineCare) -> None:
        self.current_version: int | None = None
        self.num_replaced = 0
        self._cluster = cluster
        self._care = care
        self._supply: Supply | None = None
        self._posts = [Post(member, care.patience) for member in engines.members]
        self._shares: list[dict[str, Asked]] = [{} for _ in engines.members]
        self._homeless: list[list[Asked]] = []
        self._held = False
        self._busy_s, self._looked_at = 0.0, time.monotonic()

    @property
    def num_in_flight(self) -> int:
        """Requests that are not answered yet."""
        return sum(map(len, self._shares)) + sum(map(len, self._homeless))

    def supplied_by(self, supply: Supply) -> None:
        """Tell from whom newcomers get their weights; known once trainer and engines are connected."""
        self._supply = supply

    def submit_planned(self, shares: Sequence[Sequence[Asked]], seeds: Sequence[int]) -> None:
        """Ask every replica what was planned for it, with its own seed: the same shares are answered the same way."""
        for number, (share, seed) in enumerate(zip(shares, seeds, strict=True)):
            for plan, neighbours in groupby(share, key=lambda one: one.plan):
                asked = [Asked(one.request, replace(plan, seed=seed)) for one in neighbours]
                if self._posts[number].is_manned and not self._held:
                    self._give(number, asked)
                else:
                    self._homeless += by_prompt(asked)
        self._keep_busy()

    def submit(self, requests: Sequence[Request], plan: SamplingPlan) -> None:
        """Ask one replica, the one with the least to do; requests that share a prompt belong together."""
        self._homeless.append([Asked(request, plan) for request in requests])
        self._deal()
        self._keep_busy()

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; they come out with the tokens that they have. Those that nobody has begun are forgotten."""
        unwanted = set(request_ids)
        kept = [[asked for asked in group if asked.request.request_id not in unwanted] for group in self._homeless]
        self._homeless = [group for group in kept if group]
        for post, share in zip(self._posts, self._shares, strict=True):
            ours = [name for name in share if name in unwanted]
            if ours:
                post.ask("abort", ours)

    def advance(self) -> list[Finished]:
        """What has come out since the last time; never waits. Engines that died or hang are replaced."""
        self._count_time()
        finished: list[Finished] = []
        for number, post in enumerate(self._posts):
            try:
                post.advance()
                for _, value in post.answers():
                    finished += self._received(number, value or ())
            except BrokenError as broken:
                self._replace(number, broken.error)
        self._deal()
        self._keep_busy()
        return finished

    def debtors(self) -> list[Member]:
        """Who has been asked something and has not answered."""
        return [post.member for post in self._posts if post.calls or post.awaited]

    def references(self) -> list[Any]:
        """What to wait for until ``advance`` has something to do."""
        return [reference for post in self._posts for reference in post.references()]

    @contextmanager
    def held(self) -> Generator[None]:
        """Inside, engines are given nothing new: their weights are being changed. An error ends the run."""
        self._held = True
        yield
        self._held = False

    def lose(self, lost: Sequence[tuple[int, int]]) -> None:
        """Replace engines, by rank and process number, that a transfer has lost, where that has not happened yet."""
        for number, post in enumerate(self._posts):
            member = post.member
            if post.is_manned and (member.rank, member.pid) in lost:
                words = "it died or did not answer during a transfer of weights"
                self._replace(number, WorkerError(member.role, member.rank, member.host, words))

    def wake(self, part: WakePart) -> None:
        """Take a part of the device's memory back, where it was given away."""
        self._everybody("wake", part)

    def sleep(self) -> None:
        """Give the device's memory to those who share it; the next transfer brings the weights again."""
        while self._care.gives_way and not all(post.is_manned for post in self._posts):
            self._wait_a_moment()  # An engine that is being started would take memory while others are at home there.
        self._everybody("sleep")

    def take_busy_s(self) -> float:
        """The seconds since this was asked before in which engines had something to do, the mean over all engines."""
        self._count_time()
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def _everybody(self, method: str, *arguments: Any) -> None:
        """Call those who work, and wait; nothing is in flight then."""
        if not self._care.gives_way:
            return
        assert self.num_in_flight == 0, f"engines cannot {method} while they answer"
        for post in self._posts:
            if post.is_manned:
                post.ask(method, *arguments)
        while any(post.calls for post in self._posts):
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        """For engines that have nothing in flight."""
        waited = self.references()
        if waited:
            ray.wait(waited, num_returns=1, timeout=WORK_S)
        self.advance()

    def _received(self, number: int, finished: Sequence[Finished]) -> Sequence[Finished]:
        post, share = self._posts[number], self._shares[number]
        for item in finished:  # All are looked at before any is taken: what is not taken is asked again.
            if item.request_id not in share:
                member, words = post.member, f"it answered request {item.request_id}, which nobody had asked of it"
                raise BrokenError(WorkerError(member.role, member.rank, member.host, words))
        for item in finished:
            post.failures.clear()  # Whoever answers can be replaced as often as it takes.
            del share[item.request_id]
        return finished

    def _give(self, number: int, asked: Sequence[Asked]) -> None:
        """Requests of one plan, to one replica."""
        self._shares[number] |= {one.request.request_id: one for one in asked}
        self._posts[number].ask("submit", [one.request for one in asked], asked[0].plan)

    def _deal(self) -> None:
        """Give what nobody answers yet to whoever has the least to do."""
        manned = [number for number, post in enumerate(self._posts) if post.is_manned]
        if self._held or not manned:
            return
        for asked in self._homeless:
            self._give(min(manned, key=lambda number: len(self._shares[number])), asked)
        self._homeless = []

    def _keep_busy(self) -> None:
        """Every engine that has something to do has its next calls waiting."""
        for post, share in zip(self._posts, self._shares, strict=True):
            while share and post.is_manned and not self._held and len(post.calls) < CALLS_AHEAD:
                post.ask("work", WORK_S)

    def _replace(self, number: int, error: WorkerError) -> None:
        """Bring another engine to a post, and find others for what its occupant was asked."""
        post, orphans = self._posts[number], list(self._shares[number].values())
        post.replace(error, self._succession(number))
        self._shares[number] = {}
        self._homeless += by_prompt(orphans)
        self.num_replaced += 1
        self._care.tell(f"{error}; another one is started, and {len(orphans)} unfinished requests are asked again")

    def _succession(self, number: int) -> Succession:
        """Start an engine in the place of another, as at the beginning of the run, and bring it the current weights."""
        post, care = self._posts[number], self._care
        spec = care.replicas[number]
        post.member = newcomer = self._cluster.replace(post.member)
        arriving = call(newcomer, "arrive")
        yield [(arriving, newcomer)]
        post.member = newcomer = self._cluster.introduce(newcomer, ray.get(arriving))
        if care.gives_way:  # The device is somebody else's until the trainer has left it.
            yield from self._until_there_are_weights()
        yield [(call(newcomer, "open", care.engine, spec), newcomer)]
        if care.proves:
            yield [(call(newcomer, "prove", spec.model_path), newcomer)]
        if care.gives_way:
            yield [(call(newcomer, "sleep"), newcomer)]
            yield [(call(newcomer, "wake", "weights"), newcomer)]
        version = yield from self._until_there_are_weights()
        assert self._supply is not None, "engines are replaced once trainer and engines are connected"
        yield from self._supply(newcomer, [other.member for other in self._posts], version)
        if care.gives_way:
            yield [(call(newcomer, "wake", "kv_cache"), newcomer)]
        self._cluster.settle(newcomer)

    def _until_there_are_weights(self) -> Generator[Sequence[Ticket], None, int]:
        while self.current_version is None:
            yield ()
        return self.current_version

    def _count_time(self) -> None:
        now = time.monotonic()
        num_busy = sum(bool(share) for share in self._shares)
        self._busy_s += (now - self._looked_at) * num_busy / len(self._posts)
        self._looked_at = now


def by_prompt(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Neighbours that share a prompt, and with it the name before the answer's number, stay together."""
    groups = groupby(asked, key=lambda one: one.request.request_id.rpartition(".")[0])
    return [list(group) for _, group in groups]
