"""The ladder: the ways of computing a step that must all give the same loss and the same gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

from chatlearn.models.family import family_of
from chatlearn.models.pretrained import read_configuration
from chatlearn.replay.trial import Trial
from chatlearn.trainer.parallel import ParallelPlan, sequence_parallel_problem
from chatlearn.trainer.recompute import Checkpointing

SPREADS: Final = (2, 4)  # ranks; four is the least that has replicas of shards
MICRO_BATCHES: Final = (1, 3)  # one sequence at a time, and a number that divides few batches evenly


@dataclass(frozen=True)
class Rung:
    """One way, with a name for people."""

    name: str
    trial: Trial


@dataclass(frozen=True)
class LeftOut:
    """A way that is not tried here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Ladder:
    """``variants`` must agree with ``base`` closely, ``precision`` as well as its number format allows."""

    base: Rung
    variants: tuple[Rung, ...]
    precision: tuple[Rung, ...]
    left_out: tuple[LeftOut, ...]

    def rungs(self) -> tuple[Rung, ...]:
        """All that is compared with the base."""
        return self.variants + self.precision


def ladder(trial: Trial, num_devices: int | None) -> Ladder:
    """Everything that a step must not depend on, around ``trial`` in float32 in one process.

    Ways that need more than ``num_devices`` (None: no limit), or that the model does not allow, are left out.
    """
    base = spread(replace(trial, model=replace(trial.model, compute_dtype="float32")), 1)
    found: list[Rung] = []
    left_out: list[LeftOut] = []
    for rung in (*_one_process(base), *_several_ranks(base)):
        reason = _impossible(rung.trial, num_devices)
        if reason is None:
            found.append(rung)
        else:
            left_out.append(LeftOut(rung.name, reason))
    return Ladder(
        base=Rung("base", base),
        variants=tuple(found),
        precision=(Rung("bfloat16", replace(base, model=replace(base.model, compute_dtype="bfloat16"))),),
        left_out=tuple(left_out),
    )


def spread(trial: Trial, num_ranks: int, fsdp_size: int | None = None, sequence_parallel_size: int = 1) -> Trial:
    """The same over ``num_ranks``, the model in one copy unless ``fsdp_size`` says otherwise."""
    plan = ParallelPlan(num_ranks, fsdp_size or num_ranks, sequence_parallel_size)
    return replace(trial, plan=plan, layout=replace(trial.layout, num_data_ranks=plan.data_size))


def _one_process(base: Trial) -> Iterator[Rung]:
    layout, model = base.layout, base.model
    if not layout.packing:
        yield Rung("packing on", replace(base, layout=replace(layout, packing=True)))
    for size in dict.fromkeys((layout.micro_batch_size, *MICRO_BATCHES)):
        if layout.packing or size != layout.micro_batch_size:
            yield Rung(
                f"packing off, micro-batch {size}",
                replace(base, layout=replace(layout, packing=False, micro_batch_size=size)),
            )
    for checkpointing in get_args(Checkpointing):
        if checkpointing != model.checkpointing:
            yield Rung(
                f"checkpointing {checkpointing}", replace(base, model=replace(model, checkpointing=checkpointing))
            )
    how = "plain" if model.meta_init else "meta"
    yield Rung(f"{how} initialisation", replace(base, model=replace(model, meta_init=not model.meta_init)))
    if family_of(model.path).experts is not None:
        how = "eager" if model.grouped_experts else "grouped"
        yield Rung(f"{how} experts", replace(base, model=replace(model, grouped_experts=not model.grouped_experts)))


def _several_ranks(base: Trial) -> Iterator[Rung]:
    for num_ranks in SPREADS:
        yield Rung(f"{num_ranks} ranks", spread(base, num_ranks))
    for num_ranks in SPREADS:
        yield Rung(f"sequence parallel {num_ranks}", spread(base, num_ranks, sequence_parallel_size=num_ranks))
    yield Rung("2 replicas of 2 shards", spread(base, 4, fsdp_size=2))


def _impossible(trial: Trial, num_devices: int | None) -> str | None:
    if num_devices is not None and trial.plan.num_ranks > num_devices:
        return f"needs {trial.plan.num_ranks} devices, and this machine has {num_devices}"
    if trial.plan.sequence_parallel_size == 1:
        return None
    described = read_configuration("the capsule", trial.model.path, trust_remote_code=trial.model.trust_remote_code)
    num_heads: int = described.num_attention_heads
    return sequence_parallel_problem(trial.plan.sequence_parallel_size, trial.plan.num_ranks, num_heads)


def by_ranks(rungs: Sequence[Rung]) -> dict[int, list[Rung]]:
    """Rungs by the size of the group that computes them, in ascending order, so that each group starts once."""
    sizes = sorted({rung.trial.plan.num_ranks for rung in rungs})
    return {size: [rung for rung in rungs if rung.trial.plan.num_ranks == size] for size in sizes}
