"""An answer that is sampled in several parts, perhaps from several weights, is one answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from chatlearn.records import Completion, ExpertStream, IntStream, VersionRun


def continued(begun: Completion | None, more: Completion, decode: Callable[[IntStream], str]) -> Completion:
    """``begun`` with what was sampled after it; every token keeps the log-probability and the version it was born with.

    The text is decoded from all tokens together, because a character may lie across the seam.
    """
    if begun is None:
        return more
    token_ids = np.concatenate([begun.token_ids, more.token_ids])
    return Completion(
        token_ids=token_ids,
        logprobs=np.concatenate([begun.logprobs, more.logprobs]),
        text=decode(token_ids),
        finish_reason=more.finish_reason,
        versions=merged(begun.versions, more.versions),
        routed_experts=joined_routes(begun.routed_experts, more.routed_experts),
    )


def merged(first: tuple[VersionRun, ...], then: tuple[VersionRun, ...]) -> tuple[VersionRun, ...]:
    """Runs one after the other; neighbours of one version become one run."""
    if first and then and first[-1].version == then[0].version:
        seam = VersionRun(then[0].version, first[-1].num_tokens + then[0].num_tokens)
        return (*first[:-1], seam, *then[1:])
    return first + then


def joined_routes(first: ExpertStream | None, again: ExpertStream | None) -> ExpertStream | None:
    """``again`` begins at the prompt's first token; where both tell of a token, what it met first is what counts."""
    if first is None or again is None:
        return again
    return np.concatenate([first, again[len(first) :]])
