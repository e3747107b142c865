"""Who waits for whom when a run stands still: waiting is followed to its end, and the end is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from chatlearn.observability.standstill import Presence, bottlenecks, is_in_collective, who_waits
from chatlearn.observability.standstill_report import long_report, short_report
from chatlearn.observability.whereabouts import (
    Frame,
    Stack,
    Thread,
    Wait,
    Whereabouts,
    read_whereabouts,
    write_whereabouts,
)

TORCH = "/env/lib/python3.11/site-packages/torch"
STEP = (Frame("/project/chatlearn/cluster/workers.py", 96, "TrainerWorker.step"),)
COLLECTIVE = (*STEP, Frame(f"{TORCH}/distributed/distributed_c10d.py", 2805, "all_reduce"))
BACKWARD = (*STEP, Frame(f"{TORCH}/autograd/graph.py", 841, "_engine_run_backward"))


def words(role: str, rank: int, stack: Stack = (), waits: tuple[tuple[str, int], ...] = ()) -> Whereabouts:
    return Whereabouts(
        role=role,
        rank=rank,
        host="here",
        pid=100 + rank,
        written_s=1.0,
        call=stack[0].function if stack and role != "driver" else None,
        has_peers=role == "policy_trainer",
        same_stack_s=16.0,
        quiet_s=20.0,
        waits=tuple(Wait(*debtor, for_s=17.0) for debtor in waits),
        stack=stack,
        threads=(),
    )


def running(role: str, rank: int, stack: Stack = (), waits: tuple[tuple[str, int], ...] = ()) -> Presence:
    return Presence(role, rank, "here", 100 + rank, words(role, rank, stack, waits), None, "sleeping")


def silent(one: Presence, state: str) -> Presence:
    return replace(one, silent_s=16.0, state=state)


def driver(*waits: tuple[str, int]) -> Presence:
    return running("driver", 0, (Frame("/project/chatlearn/grpo.py", 86, "live"),), waits)


def ends(*presences: Presence) -> list[tuple[set[tuple[str, int]], int]]:
    """The bottlenecks, and how many wait for each."""
    return [(set(found.those), len(found.waiters)) for found in bottlenecks(who_waits(presences))]


T0, T1, T2 = ("policy_trainer", 0), ("policy_trainer", 1), ("policy_trainer", 2)
E0, E1 = ("policy", 0), ("policy", 1)


def test_a_stopped_rank_is_what_its_peers_and_the_driver_wait_for() -> None:
    stopped = silent(running(*T1, COLLECTIVE), "stopped")
    assert ends(driver(T0, T1), running(*T0, COLLECTIVE), stopped, running(*E0)) == [({T1}, 2)]


def test_a_peer_that_does_not_run_is_waited_for_where_no_collective_is_seen() -> None:
    """An accelerator's queue is waited for outside of torch.distributed."""
    assert ends(driver(T0, T1), running(*T0, BACKWARD), silent(running(*T1, BACKWARD), "stopped")) == [({T1}, 2)]


def test_a_rank_that_works_while_another_is_in_a_collective_is_waited_for() -> None:
    assert ends(driver(T0, T1), running(*T0, COLLECTIVE), running(*T1, BACKWARD)) == [({T1}, 2)]


def test_ranks_in_a_collective_wait_for_those_who_are_missing_and_not_for_each_other() -> None:
    here = (driver(T0, T1, T2), running(*T0, COLLECTIVE), running(*T2, COLLECTIVE))
    for missing in (running(*T1, BACKWARD), silent(running(*T1, COLLECTIVE), "stopped")):
        edges = who_waits([*here, missing])
        assert (edges[T0], edges[T2], edges[T1]) == ({T1}, {T1}, set())


def test_all_ranks_in_collectives_wait_for_one_another() -> None:
    presences = (driver(T0, T1), running(*T0, COLLECTIVE), running(*T1, COLLECTIVE))
    assert ends(*presences) == [({T0, T1}, 3)]
    assert "policy_trainer rank 0, policy_trainer rank 1 wait for one another, and driver for them" in short_report(
        presences, 20.0, "file"
    )


def test_a_chain_through_a_transfer_ends_at_the_engine() -> None:
    """Rank 0 waits for an engine, the others for rank 0: in a collective here, between two of them elsewhere."""
    chain = (driver(T0, T1), running(*T0, STEP, (E1,)), running(*T1, COLLECTIVE), running(*E0), running(*E1, BACKWARD))
    assert ends(*chain) == [({E1}, 3)]


def test_ranks_without_a_common_call_do_not_wait_for_one_another() -> None:
    """An idle rank has nothing to wait for, and engines never meet."""
    assert ends(driver(E0), running(*T0), silent(running(*T1), "stopped"), running(*E0, BACKWARD)) == [({E0}, 1)]
    assert ends(driver(E0, E1), running(*E0, COLLECTIVE), silent(running(*E1, COLLECTIVE), "stopped")) == [
        ({E0}, 1),
        ({E1}, 1),
    ]


def test_who_is_waited_for_by_most_comes_first() -> None:
    presences = (driver(E0, T0, T1), running(*E0, BACKWARD), running(*T0, COLLECTIVE), running(*T1, BACKWARD))
    assert ends(*presences) == [({T1}, 2), ({E0}, 1)]


def test_a_process_that_does_not_run_waits_for_nobody_whatever_it_said_last() -> None:
    assert ends(driver(T0), silent(running(*T0, STEP, (E0,)), "stopped"), running(*E0)) == [({T0}, 1)]


def test_one_who_never_arrived_is_waited_for_too() -> None:
    stranger = Presence("policy", 0, "", 0, None, None, None)
    assert ends(driver(E0), stranger) == [({E0}, 1)]
    assert "policy rank 0 has not been heard of: it has not started" in short_report(
        (driver(E0), stranger), 9.0, "file"
    )


def test_a_driver_that_waits_for_nobody_is_at_work_itself() -> None:
    assert ends(driver(), running(*E0)) == []
    report = short_report((driver(), running(*E0)), 9.0, "file")
    assert "nobody waits for anybody: the driver is at work itself" in report
    assert "at chatlearn/grpo.py:86 live" in report


def test_files_of_a_checkpoint_are_no_collective_but_what_meets_others_there_is() -> None:
    inside = Frame(f"{TORCH}/distributed/checkpoint/filesystem.py", 300, "_write_item")
    assert not is_in_collective((*STEP, inside))
    assert is_in_collective((*STEP, inside, COLLECTIVE[-1]))
    further_in = tuple(Frame(f"{TORCH}/nn/modules/linear.py", line, "forward") for line in range(20))
    assert not is_in_collective((*COLLECTIVE, *further_in))


def test_those_who_keep_the_same_processes_waiting_share_a_sentence() -> None:
    slow = running(*E1, BACKWARD)
    assert slow.words is not None
    slow = replace(slow, words=replace(slow.words, same_stack_s=1.0))
    report = short_report((driver(E0, E1), running(*E0, BACKWARD), slow), 9.0, "file")
    assert "=> waited for by all who wait (driver): policy rank 0, policy rank 1\n" in report
    assert "  policy rank 0 has been for 16 s at autograd/graph.py:841" in report
    assert "  policy rank 1 is at work, just now at autograd/graph.py:841" in report


def test_the_reports_name_everybody_and_what_can_be_done() -> None:
    stopped = silent(running(*T1, COLLECTIVE), "stopped")
    presences = (driver(T0, T1), running(*T0, COLLECTIVE), stopped, running(*E0))
    assert short_report(presences, 20.4, "out/stuck_report.txt").splitlines() == [
        "nothing was finished for 20 s (runtime_args.progress_timeout_s). The run goes on. Who waits for whom:",
        "  driver (pid 100 on here): the loop; "
        "waits for policy_trainer rank 0 for 17 s, policy_trainer rank 1 for 17 s",
        "      at chatlearn/grpo.py:86 live",
        "  policy_trainer rank 0 (pid 100 on here): TrainerWorker.step, in a collective, at the same place for 16 s; "
        "waits for policy_trainer rank 1",
        "      at distributed/distributed_c10d.py:2805 all_reduce < cluster/workers.py:96 TrainerWorker.step",
        "  policy_trainer rank 1 (pid 101 on here): TrainerWorker.step, in a collective; "
        "has said nothing for 16 s; its process is stopped",
        "      was last at distributed/distributed_c10d.py:2805 all_reduce < cluster/workers.py:96 TrainerWorker.step",
        "  policy rank 0 (pid 100 on here): idle",
        "=> waited for by all who wait (driver, policy_trainer rank 0): policy_trainer rank 1",
        "  policy_trainer rank 1 was stopped by a signal; `kill -CONT 101` on here lets it go on",
        "if it is only slow, raise runtime_args.progress_timeout_s; if not, end the process (kill -9): "
        "it is replaced, or the run ends with an error and can be resumed",
        "whole stacks: out/stuck_report.txt",
    ]
    report = long_report(presences, 20.4, "2026-12-01 10:00:00")
    for presence in presences:
        assert presence.words is not None
        for frame in presence.words.stack:
            assert f"{frame.path}:{frame.line} {frame.function}" in report


def test_what_a_process_says_survives_its_file(tmp_path: Path) -> None:
    said = replace(words(*T0, COLLECTIVE, (E0, E1)), threads=(Thread("autograd", BACKWARD),))
    path = tmp_path / "policy_trainer_0.where.json"
    assert read_whereabouts(path) is None
    write_whereabouts(path, said)
    assert read_whereabouts(path) == said
    path.write_text(path.read_text()[:40])
    assert read_whereabouts(path) is None
    assert list(tmp_path.iterdir()) == [path]
