"""Where the random numbers of a process come from: run, episode, role and rank, and nothing else.

So an episode draws the same numbers in a run that was never interrupted and in one that goes on before it, also on
another number of ranks for those that are in both.
"""

from __future__ import annotations

import random
from typing import Final, Literal

import numpy as np
import torch

GeneratorRole = Literal["driver", "policy_trainer"]

# Part of the seed. 0 and 1 belong to the engines, which sample with seeds of their own (``rollout/dispatch.py``).
ROLE_KEYS: Final[dict[GeneratorRole, int]] = {"driver": 2, "policy_trainer": 3}


def generator_seeds(run_seed: int, episode: int, role: GeneratorRole, rank: int) -> tuple[int, int, int]:
    """Seeds of 32 bits for the generators of torch, numpy and Python in one process, for one episode."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(ROLE_KEYS[role], episode, rank))
    of_torch, of_numpy, of_python = (int(word) for word in sequence.generate_state(3, np.uint32))
    return of_torch, of_numpy, of_python


def seed_generators(run_seed: int, episode: int, role: GeneratorRole, rank: int) -> None:
    """Let every generator of this process begin the episode; torch's are those of all devices."""
    of_torch, of_numpy, of_python = generator_seeds(run_seed, episode, role, rank)
    torch.manual_seed(of_torch)
    np.random.seed(of_numpy)
    random.seed(of_python)
