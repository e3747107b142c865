"""What a run is in the middle of: answers that nothing was learned from yet, and those that are to be gone on with.

``open_groups.json`` has what is said of each, ``open_groups.safetensors`` their numbers, end to end: for every group
the prompt's, then those of its finished answers, then those of the begun ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from chatlearn.checkpoint.documents import (
    Document,
    inner,
    integer,
    integers,
    number,
    objects,
    read_document,
    require_schema,
    text,
)
from chatlearn.checkpoint.durable import ABSENT, failures_named, refusals_named, sync, write_text
from chatlearn.errors import CheckpointError
from chatlearn.records import Completion, ExpertStream, FinishReason, OpenGroup, Prompt, Score, VersionRun

GROUPS_NAME = "open_groups.json"
STREAMS_NAME = "open_groups.safetensors"
SCHEMA_VERSION = 1
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "abort")

TOKENS, LOGPROBS, EXPERTS = "token_ids", "logprobs", "routed_experts"


def save_open_groups(directory: Path, groups: Sequence[OpenGroup]) -> None:
    """Write them below ``directory``, a staging folder; nothing where there are none."""
    if not groups:
        return
    answers = [answer for group in groups for answer in (*group.finished, *group.begun)]
    streams: dict[str, NDArray[Any]] = {
        TOKENS: np.concatenate([stream for group in groups for stream in _token_streams(group)]),
        LOGPROBS: np.concatenate([np.zeros(0, np.float32), *(answer.logprobs for answer in answers)]),
    }
    routed = [answer.routed_experts for answer in answers if answer.routed_experts is not None]
    if routed:
        streams[EXPERTS] = np.concatenate(routed)
    document = {"schema_version": SCHEMA_VERSION, "groups": [_described(group) for group in groups]}
    with failures_named(directory):
        save_file(streams, directory / STREAMS_NAME)
        sync(directory / STREAMS_NAME)
        write_text(directory / GROUPS_NAME, json.dumps(document, indent=1) + "\n")


def _token_streams(group: OpenGroup) -> Iterator[NDArray[np.int32]]:
    yield group.prompt.token_ids
    yield from (answer.token_ids for answer in (*group.finished, *group.begun))


def _described(group: OpenGroup) -> dict[str, object]:
    prompt = group.prompt
    return {
        "prompt": {
            "uid": prompt.uid,
            "text": prompt.text,
            "source": prompt.source,
            "answer": prompt.answer,
            "num_tokens": len(prompt.token_ids),
        },
        "finished": [_described_answer(answer) for answer in group.finished],
        "begun": [_described_answer(answer) for answer in group.begun],
        "scores": [{"value": score.value, "parts": dict(score.parts), "error": score.error} for score in group.scores],
        "version": group.version,
        "round": group.round,
    }


def _described_answer(answer: Completion) -> dict[str, object]:
    experts = answer.routed_experts
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": len(answer.token_ids),
        "versions": [run.version for run in answer.versions],
        "tokens_of_versions": [run.num_tokens for run in answer.versions],
        "num_routed": 0 if experts is None else len(experts),
    }


def load_open_groups(directory: Path) -> tuple[OpenGroup, ...]:
    """Read them back; raises ``CheckpointError`` where the files are not what ``save_open_groups`` makes."""
    path = directory / GROUPS_NAME
    if not path.exists():
        return ()
    document = read_document(path)
    require_schema(document, SCHEMA_VERSION, path)
    reader = _Reader(path, _read_streams(directory / STREAMS_NAME))
    groups = tuple(reader.group(entry) for entry in objects(document, "groups", path))
    reader.require_end()
    return groups


def _read_streams(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with refusals_named(path):
            streams = load_file(path)
    except (*ABSENT, SafetensorError, LookupError, ValueError) as error:  # the last two: a type that numpy lacks
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); the file is damaged") from None
    if TOKENS not in streams or LOGPROBS not in streams:
        raise CheckpointError(f"{path}: holds no tokens or no log-probabilities; the file is damaged")
    return streams


@dataclass
class _Reader:
    """Walks along the streams, group by group."""

    path: Path
    streams: dict[str, NDArray[Any]]

    def group(self, entry: Document) -> OpenGroup:
        prompt = inner(entry, "prompt", self.path)
        return OpenGroup(
            prompt=Prompt(
                uid=text(prompt, "uid", self.path),
                token_ids=self._next(TOKENS, integer(prompt, "num_tokens", self.path)),
                text=text(prompt, "text", self.path),
                source=text(prompt, "source", self.path),
                answer=text(prompt, "answer", self.path),
            ),
            finished=tuple(self._answer(answer) for answer in objects(entry, "finished", self.path)),
            begun=tuple(self._answer(answer) for answer in objects(entry, "begun", self.path)),
            scores=tuple(self._score(score) for score in objects(entry, "scores", self.path)),
            version=integer(entry, "version", self.path),
            round=integer(entry, "round", self.path),
        )

    def _answer(self, entry: Document) -> Completion:
        num_tokens, num_routed = integer(entry, "num_tokens", self.path), integer(entry, "num_routed", self.path)
        versions = integers(entry, "versions", self.path)
        counts = integers(entry, "tokens_of_versions", self.path)
        if len(versions) != len(counts) or sum(counts) != num_tokens:
            raise CheckpointError(f"{self.path}: the versions of an answer do not cover its tokens: it is damaged")
        reason = text(entry, "finish_reason", self.path)
        if reason not in FINISH_REASONS:
            raise CheckpointError(f"{self.path}: an answer ended by {reason!r}; the file is damaged")
        experts: ExpertStream | None = self._next(EXPERTS, num_routed) if num_routed else None
        return Completion(
            token_ids=self._next(TOKENS, num_tokens),
            logprobs=self._next(LOGPROBS, num_tokens),
            text=text(entry, "text", self.path),
            finish_reason=reason,
            versions=tuple(VersionRun(*run) for run in zip(versions, counts, strict=True)),
            routed_experts=experts,
        )

    def _score(self, entry: Document) -> Score:
        parts = inner(entry, "parts", self.path)
        error = None if entry.get("error") is None else text(entry, "error", self.path)
        values = {name: number(parts, name, self.path) for name in parts}
        return Score(number(entry, "value", self.path), values, error)

    def _next(self, name: str, count: int) -> NDArray[Any]:
        """The next ``count`` entries of a stream."""
        stream = self.streams.get(name, np.zeros(0))
        if len(stream) < count:
            raise CheckpointError(f"{self.path}: speaks of more {name} than there are; the files do not fit together")
        self.streams[name] = stream[count:]
        return stream[:count]

    def require_end(self) -> None:
        left = {name: len(stream) for name, stream in self.streams.items() if len(stream) > 0}
        if left:
            raise CheckpointError(f"{self.path}: leaves {left} over; the files do not fit together")
