"""The words for a run that stands still: who does what, who waits for whom, and what can be done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chatlearn.observability.standstill import (
    DRIVER,
    Bottleneck,
    Edges,
    Name,
    Presence,
    bottlenecks,
    innermost,
    is_in_collective,
    who_waits,
)
from chatlearn.observability.whereabouts import Frame, Stack, Whereabouts

KEY = "runtime_args.progress_timeout_s"
MOVES_S = 5.0  # A stack that was another one so shortly ago belongs to a process that is slow rather than stuck.

# What the system's word for a process means for the one who looks after the run.
STATES = {
    "stopped": "was stopped by a signal; `kill -CONT {pid}` on {host} lets it go on",
    "tracing-stop": "is held by a debugger",
    "disk-sleep": "waits for a disk or a network file system",
    "zombie": "has ended",
    "gone": "has ended",
}


def short_report(presences: Sequence[Presence], quiet_s: float, full_report: str) -> str:
    """What fits into a console; ``full_report`` is the file that has the rest."""
    edges = who_waits(presences)
    lines = [f"nothing was finished for {quiet_s:.0f} s ({KEY}). The run goes on. Who waits for whom:"]
    for one in presences:
        lines.append(f"  {describe(one, edges)}")
        if one.words is not None and not _is_idle(one):
            at = "at" if one.runs else "was last at"
            lines.append(f"      {at} {_innermost(one.words.stack)}")
    lines += conclusions(presences, edges)
    lines.append(f"whole stacks: {full_report}")
    return "\n".join(lines)


def long_report(presences: Sequence[Presence], quiet_s: float, at: str) -> str:
    """Everything that is known, with whole stacks; ``at`` is the time."""
    edges = who_waits(presences)
    lines = [f"{at}: nothing was finished for {quiet_s:.0f} s ({KEY})", *conclusions(presences, edges)]
    for one in presences:
        lines += ["", describe(one, edges)]
        if one.words is None:
            continue
        lines += _listed("main thread", one.words.stack)
        for thread in one.words.threads:
            lines += _listed(f"thread {thread.name}", thread.stack)
    return "\n".join([*lines, ""])


def describe(one: Presence, edges: Edges) -> str:
    """One process in one line."""
    who = f"{name_of(one.name)} (pid {one.pid} on {one.host})" if one.pid else name_of(one.name)
    parts = [_activity(one)]
    if one.silent_s is not None:
        parts.append(f"has said nothing for {one.silent_s:.0f} s")
    if one.state is not None and not one.runs:
        parts.append(f"its process is {one.state}")
    waits = one.words.waits if one.words is not None else ()
    since = {(wait.role, wait.rank): f" for {wait.for_s:.0f} s" for wait in waits}
    awaited = sorted(edges[one.name])
    if awaited:
        parts.append("waits for " + ", ".join(name_of(name) + since.get(name, "") for name in awaited))
    return f"{who}: {'; '.join(parts)}"


def conclusions(presences: Sequence[Presence], edges: Edges) -> list[str]:
    """Who is waited for by all, and what can be done about it."""
    seen = {one.name: one for one in presences}
    lines: list[str] = []
    for names, waiters in _together(bottlenecks(edges)).items():
        lines.append(_conclusion(names, waiters, edges))
        lines += [f"  {name_of(name)} {_condition(seen.get(name))}" for name in sorted(names)]
    if not lines:
        lines = ["nobody waits for anybody: the driver is at work itself"]
    ends = "replaced, or the run ends with an error and can be resumed"
    return [*lines, f"if it is only slow, raise {KEY}; if not, end the process (kill -9): it is {ends}"]


def name_of(name: Name) -> str:
    """How people call a process."""
    role, rank = name
    return role if name == DRIVER else f"{role} rank {rank}"


def _together(found: Sequence[Bottleneck]) -> dict[frozenset[Name], frozenset[Name]]:
    """Who is waited for, and by whom; those that the same processes wait for belong into one sentence."""
    names: dict[frozenset[Name], frozenset[Name]] = {}
    for bottleneck in found:
        names[bottleneck.waiters] = names.get(bottleneck.waiters, frozenset()) | bottleneck.those
    return {those: waiters for waiters, those in names.items()}


def _conclusion(those: frozenset[Name], waiters: frozenset[Name], edges: Edges) -> str:
    waiting = {name for name, awaited in edges.items() if awaited}
    outside = waiters - those
    names = _names(those)
    if those & waiting:
        by = f", and {_names(outside)} for them" if outside else ""
        return f"=> {names} wait for one another{by}: compare their stacks, they disagree about what comes next"
    if waiting <= waiters:
        return f"=> waited for by all who wait ({_names(outside)}): {names}"
    return f"=> waited for by {_names(outside)}: {names}"


def _condition(one: Presence | None) -> str:
    """What ails a process that others wait for."""
    if one is None or one.words is None:
        state = f" (its process is {one.state})" if one is not None and one.state is not None else ""
        return f"has not been heard of{state}: it has not started, or its host does not see the run's output_dir"
    if one.runs:
        return "is idle: what it was asked for has not reached it" if _is_idle(one) else _place(one.words)
    if one.state in STATES:
        return STATES[one.state].format(pid=one.pid, host=one.host)
    return "does not let Python run: a library holds it, or its host is gone"


def _place(words: Whereabouts) -> str:
    place = _innermost(words.stack)
    if words.same_stack_s < MOVES_S:
        return f"is at work, just now at {place}"
    collective = " in a collective" if is_in_collective(words.stack) else ""
    return f"has been{collective} for {words.same_stack_s:.0f} s at {place}"


def _is_idle(one: Presence) -> bool:
    return one.words is not None and one.words.call is None and one.name != DRIVER


def _activity(one: Presence) -> str:
    words = one.words
    if words is None:
        return "not heard of"
    if one.name == DRIVER:
        return "the loop"
    if _is_idle(one):
        return "idle"
    collective = ", in a collective" if is_in_collective(words.stack) else ""
    since = f", at the same place for {words.same_stack_s:.0f} s" if one.runs else ""
    return f"{words.call}{collective}{since}"


def _names(names: Iterable[Name]) -> str:
    return ", ".join(name_of(name) for name in sorted(names))


def _innermost(stack: Stack) -> str:
    return " < ".join(_short(frame) for frame in innermost(stack))


def _short(frame: Frame) -> str:
    """With the folder, because several libraries have a ``worker.py``."""
    return f"{'/'.join(frame.path.split('/')[-2:])}:{frame.line} {frame.function}"


def _listed(title: str, stack: Stack) -> list[str]:
    """Outermost first, as Python prints them."""
    return [f"  {title}:", *(f"    {frame.path}:{frame.line} {frame.function}" for frame in stack)]
