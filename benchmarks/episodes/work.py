"""The work that all sides of the comparison do: model, prompts, lengths, threads. It is written here, once."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = ROOT / "embedded" / "tiny_qwen3"
NUM_PROMPTS = 16
NUM_ANSWERS = 8
NUM_SAMPLES = NUM_PROMPTS * NUM_ANSWERS
NUM_THREADS = 2  # of each side, all its processes together
MAX_PROMPT_TOKENS = 128
LEARNING_RATE = 1e-5
TEMPERATURE = 1.0
ANSWER = 72  # of every question

# A lognormal with this spread is cut at the limit; with this median a quarter of the limit is the mean.
SPREAD = 1.0
MEDIAN_SHARE = 0.165


@dataclass(frozen=True)
class Lengths:
    """How long the answers are: ``limit`` tokens at most, and those of the list, over and over."""

    name: str
    limit: int

    def tokens(self) -> tuple[int, ...]:
        """One length for each answer of an episode: the same numbers on every machine."""
        places = [(place + 0.5) / NUM_SAMPLES for place in range(NUM_SAMPLES)]
        drawn = [self.limit * MEDIAN_SHARE * math.exp(SPREAD * NormalDist().inv_cdf(place)) for place in places]
        lengths = [max(2, min(self.limit, round(length))) for length in drawn]
        random.Random(0).shuffle(lengths)
        return tuple(lengths)


LONG: Final = Lengths("long-tailed", 1024)
SHORT: Final = Lengths("short", 64)
LENGTHS: Final = {lengths.name: lengths for lengths in (LONG, SHORT)}


def write_questions(folder: Path) -> Path:
    """A data file with the prompts of an episode: sums of two numbers, no two alike."""
    rows = [
        {
            "data_source": "DigitalLearningGmbH/MATH-lighteval",
            "prompt": [{"role": "user", "content": question(11 + number, ANSWER - 11 - number)}],
            "reward_model": {"style": "rule", "ground_truth": str(ANSWER)},
        }
        for number in range(NUM_PROMPTS)
    ]
    file = folder / "questions.json"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


def question(first: int, second: int) -> str:
    """What the embedded model was warmed up on."""
    return f"What is ${first}+{second}$? Let's think step by step and output the final answer within \\boxed{{}}."


def read_conversations(file: Path) -> list[list[dict[str, str]]]:
    """The prompts of a data file, as messages."""
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
