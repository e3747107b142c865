"""vLLM as in a run, except that every answer has the length that a list gives it.

Named in ``runtime_args.rollout_backend``, so that whole runs do work that is known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.episodes.work import LONG, NUM_ANSWERS, SHORT, Lengths
from chatlearn.records import Completion
from chatlearn.rollout.engine import EngineSpec, Finished, Request, SamplingPlan
from chatlearn.rollout.vllm_engine import VllmEngine

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput


class LengthBook:
    """Which answer has which length.

    Rounds number their requests anew, and any engine may go on with an answer: one that is begun gets a length of the
    list among those that are longer, so that all lengths together are distributed like the list.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)
        self._promised: dict[str, int] = {}

    def begin(self, request: Request) -> int | None:
        """The length that the whole answer shall have; ``None`` for what is no answer of a run, such as a probe."""
        group, _, answer = request.request_id.partition(".")
        if not group.isdigit():
            return None
        num_begun = 0 if request.begun is None else len(request.begun.token_ids)
        longer = [length for length in self._lengths if length > num_begun]
        length = longer[(int(group) * NUM_ANSWERS + int(answer)) % len(longer)]
        self._promised[request.request_id] = length
        return length

    def end(self, request_id: str, completion: Completion) -> Completion:
        """The answer as it would have ended by itself, if it has its length."""
        length = self._promised.pop(request_id, None)
        if length is None or len(completion.token_ids) < length:
            return completion
        return replace(completion, finish_reason="stop")


class ForcedLengthEngine(VllmEngine):
    """Answers of given lengths; the model's own end of a sequence is a token like others."""

    def __init__(self, spec: EngineSpec, lengths: Lengths) -> None:
        super().__init__(spec)
        self._book = LengthBook(lengths.tokens())

    def _parameters(self, request: Request, plan: SamplingPlan) -> SamplingParams:
        length = self._book.begin(request)
        if length is None:
            return super()._parameters(request, plan)
        num_begun = 0 if request.begun is None else len(request.begun.token_ids)
        # A plan of partial rollout bounds what this round may add.
        capped = replace(plan, max_tokens=min(plan.max_tokens, length - num_begun))
        parameters = super()._parameters(request, capped)
        parameters.ignore_eos = True
        return parameters

    def _take(self, output: RequestOutput) -> Finished:
        finished = super()._take(output)
        return replace(finished, completion=self._book.end(finished.request_id, finished.completion))


class LongTailedEngine(ForcedLengthEngine):
    """The engine of runs with long-tailed lengths."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec, LONG)


class ShortEngine(ForcedLengthEngine):
    """The engine of runs with short lengths."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec, SHORT)
