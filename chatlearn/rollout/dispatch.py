"""Who answers what, planned from the batch alone, so that the same batch is always sampled in the same way.

An engine repeats its samples exactly only for the same requests in the same order, so nothing here looks at the clock
or at which engine is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from chatlearn.errors import RunError
from chatlearn.records import Completion, Prompt, Rollout
from chatlearn.rollout.engine import Finished, Request

SamplingPurpose = Literal["rollout", "evaluation"]

# Part of the seed: evaluating must not change what is sampled for training.
PURPOSE_KEYS: dict[SamplingPurpose, int] = {"rollout": 0, "evaluation": 1}


def plan_dispatch(
    prompts: Sequence[Prompt], completions_per_prompt: int, num_replicas: int
) -> list[tuple[Request, ...]]:
    """The requests of each replica, in the order in which it must be given them.

    All answers of a prompt lie next to each other on one replica, where the prefix cache shares the prompt; prompts go
    round the replicas, so that no replica has more than one prompt above another.
    """
    return [
        tuple(
            Request(request_id(position, answer), prompts[position].token_ids)
            for position in range(replica, len(prompts), num_replicas)
            for answer in range(completions_per_prompt)
        )
        for replica in range(num_replicas)
    ]


def assemble(prompts: Sequence[Prompt], completions_per_prompt: int, finished: Iterable[Finished]) -> list[Rollout]:
    """Put answers, in whatever order they came, back into groups in the order of the prompts.

    Raises ``RunError`` where an answer is missing, came twice, or was never asked for.
    """
    answers: dict[str, Completion] = {}
    for item in finished:
        if item.request_id in answers:
            raise RunError(f"the engines answered request {item.request_id} twice")
        answers[item.request_id] = item.completion
    groups = [
        [request_id(position, answer) for answer in range(completions_per_prompt)] for position in range(len(prompts))
    ]
    asked = {name for group in groups for name in group}
    if answers.keys() != asked:
        missing, surplus = sorted(asked - answers.keys()), sorted(answers.keys() - asked)
        raise RunError(f"the engines left out {len(missing)} requests {missing[:3]} and made up {surplus[:3]}")
    return [
        Rollout(prompt, tuple(answers[name] for name in group)) for prompt, group in zip(prompts, groups, strict=True)
    ]


def request_id(position: int, answer: int) -> str:
    """The name of one answer: the prompt's place in the batch (a prompt may occur twice in it) and the answer's."""
    return f"{position}.{answer}"


def engine_seed(run_seed: int, episode: int, replica: int, purpose: SamplingPurpose) -> int:
    """A seed of 32 bits of its own for every episode, replica and purpose of a run."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(PURPOSE_KEYS[purpose], episode, replica))
    return int(sequence.generate_state(1, np.uint32)[0])
