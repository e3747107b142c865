"""Causes in the numbers and the tokens themselves: no log-probabilities, shifted streams, another prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chatlearn.numerics.bench import Bench
from chatlearn.numerics.change import NO_CHANGE
from chatlearn.numerics.gap import Gap, gap_between, gap_of
from chatlearn.numerics.verdict import Trial
from chatlearn.records import Sample


def no_logprobs(bench: Bench) -> Iterator[Trial]:
    """Numbers that no log-probability can be."""
    numbers = np.concatenate([sample.rollout_logprobs[sample.loss_mask] for sample in bench.samples])
    positive, broken = int((numbers > bench.facts.tolerance).sum()), int((~np.isfinite(numbers)).sum())
    if positive:
        yield Trial(
            "no log-probabilities", "",
            f"{positive} of the engine's {numbers.size} numbers are above 0, so they are logits or something else",
            "let the engine report log-probabilities of what it samples (vLLM: logprobs_mode=processed_logprobs)",
            bench.gap, proven=True,
        )  # fmt: skip
    elif broken:
        yield Trial(
            "no log-probabilities", "",
            f"{broken} of the engine's {numbers.size} numbers are infinite or no numbers at all",
            "look into the engine's log; weights with infinities, or a number format that is too narrow, end like this",
            bench.gap, proven=True,
        )  # fmt: skip


def shifted(bench: Bench) -> Iterator[Trial]:
    """The engine's numbers belong to the token before or after."""
    for offset, neighbour in ((1, "after"), (-1, "before")):
        parts = [
            _moved(sample.rollout_logprobs[sample.loss_mask], stream[sample.loss_mask], offset)
            for sample, stream in zip(bench.samples, bench.own, strict=True)
        ]
        yield Trial(
            "shifted tokens", f"compared with the token {neighbour} it",
            f"each of the engine's numbers is that of the token {neighbour} the one it came with",
            "align the engine's tokens and log-probabilities: one entry for every sampled token, the first included",
            gap_of(np.concatenate(parts)),
        )  # fmt: skip


def _moved(engine: NDArray[np.float32], trainer: NDArray[np.float32], offset: int) -> NDArray[np.float64]:
    """Engine minus trainer, where the trainer's entry is ``offset`` tokens further on."""
    ours = trainer.astype(np.float64)
    return engine[:-1] - ours[1:] if offset > 0 else engine[1:] - ours[:-1]


def other_prompt(bench: Bench) -> Iterator[Trial]:
    """The engine put a special token into the prompt, or left one of its tokens out."""
    for token_id in bench.facts.special_tokens:
        for place, where in ((0, "before the prompt"), (None, "between prompt and answer")):
            yield Trial(
                "another prompt", f"token {token_id} {where}",
                f"the engine puts the special token {token_id} {where}, and the trainer does not see it",
                "give the engine token ids and let it add nothing (add_special_tokens=False), or put the token into "
                "the chat template, which both sides see",
                _gap_with_token(bench, token_id, place),
            )  # fmt: skip
    for place, which in ((0, "first"), (None, "last")):
        yield Trial(
            "another prompt", f"prompts without their {which} token",
            f"the engine leaves out the {which} token of each prompt",
            "look for a limit on the prompt's length in the engine, and for a template that is applied twice",
            _gap_without_token(bench, place),
        )  # fmt: skip


def _gap_with_token(bench: Bench, token_id: int, place: int | None) -> Gap:
    """The gap when a token stands at ``place``, or where the answer begins."""
    places = [_answer_begins(sample) if place is None else place for sample in bench.samples]
    longer = [with_token(sample, at, token_id) for sample, at in zip(bench.samples, places, strict=True)]
    streams = bench.score(longer, NO_CHANGE)
    return gap_between(bench.samples, [np.delete(stream, at) for stream, at in zip(streams, places, strict=True)])


def _gap_without_token(bench: Bench, place: int | None) -> Gap:
    """The gap when the token at ``place``, or the last of the prompt, is not there; short prompts are left alone."""
    places = [_answer_begins(sample) - 1 if place is None else place for sample in bench.samples]
    fitting = [(sample, at) for sample, at in zip(bench.samples, places, strict=True) if _answer_begins(sample) > 1]
    streams = bench.score([without_token(sample, at) for sample, at in fitting], NO_CHANGE) if fitting else []
    restored = [np.insert(stream, at, np.float32(0)) for stream, (_, at) in zip(streams, fitting, strict=True)]
    return gap_between([sample for sample, _ in fitting], restored) if fitting else bench.gap


def _answer_begins(sample: Sample) -> int:
    return int(np.argmax(sample.loss_mask))


def with_token(sample: Sample, place: int, token_id: int) -> Sample:
    """The sample with one token more, which is no part of the answer."""
    return replace(
        sample,
        token_ids=np.insert(sample.token_ids, place, np.int32(token_id)),
        loss_mask=np.insert(sample.loss_mask, place, np.False_),
        rollout_logprobs=np.insert(sample.rollout_logprobs, place, np.float32(0)),
        advantages=np.insert(sample.advantages, place, np.float32(0)),
        routed_experts=None,  # Nobody routed the token that was put in.
    )


def without_token(sample: Sample, place: int) -> Sample:
    """The sample with one token less."""
    return replace(
        sample,
        token_ids=np.delete(sample.token_ids, place),
        loss_mask=np.delete(sample.loss_mask, place),
        rollout_logprobs=np.delete(sample.rollout_logprobs, place),
        advantages=np.delete(sample.advantages, place),
        routed_experts=None,
    )
