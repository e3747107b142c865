"""Who answers what. Where the same batch must be sampled in the same way, that is planned from the batch alone.

An engine repeats its samples exactly only for the same requests in the same order, so ``plan_dispatch`` looks neither
at the clock nor at which engine is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Item = TypeVar("Item")

SamplingPurpose = Literal["rollout", "evaluation"]

# Part of the seed: evaluating must not change what is sampled for training.
PURPOSE_KEYS: dict[SamplingPurpose, int] = {"rollout": 0, "evaluation": 1}


def plan_dispatch(groups: Sequence[Sequence[Item]], num_replicas: int) -> list[tuple[Item, ...]]:
    """The requests of each replica, in the order in which it must be given them.

    All requests of a group, which share a prompt, lie next to each other on one replica, where the prefix cache shares
    the prompt; groups go round the replicas, so that no replica has more than one group above another.
    """
    return [
        tuple(request for group in groups[replica::num_replicas] for request in group)
        for replica in range(num_replicas)
    ]


def engine_seed(run_seed: int, episode: int, replica: int, purpose: SamplingPurpose) -> int:
    """A seed of 32 bits of its own for every episode, replica and purpose of a run."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(PURPOSE_KEYS[purpose], episode, replica))
    return int(sequence.generate_state(1, np.uint32)[0])
