"""Samples answers from a model and counts the right ones: ``python embedded/measure.py --model DIR``.

Needs transformers only, so that the numbers of the embedded models do not depend on the engine they are tried with.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from chatlearn.data.data_preprocess.arithmetic import Problem, draw_split
from chatlearn.data.data_preprocess.records_file import INSTRUCTION
from embedded.lessons import is_right
from embedded.vocabulary import END_OF_TURN, token_id
from embedded.warm_up import chat_prompt

MAX_NEW_TOKENS = 64  # the longest right answer has 49


@dataclass(frozen=True)
class PassRates:
    """Shares of test questions: answered right by one answer on average, and by at least one of ``num_answers``.

    ``truncated`` is the share of answers that did not end within ``MAX_NEW_TOKENS``.
    """

    num_prompts: int
    num_answers: int
    pass_at_1: float
    pass_at_k: float
    truncated: float
    mean_tokens: float


def pass_rates(model_dir: Path, num_prompts: int, num_answers: int, seed: int) -> PassRates:
    """Sample at temperature 1 on test questions of all levels; only the last box of an answer counts, to the letter."""
    torch.set_num_threads(1)  # such small matrices gain nothing from more
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir)
    problems = draw_split("test", num_prompts, seed)
    rounds = [_answers(model, tokenizer, problems) for _ in range(num_answers)]
    tokens = [ids for answers in rounds for ids in answers]
    right = torch.tensor(
        [
            [is_right(text, problem) for text, problem in zip(tokenizer.batch_decode(answers), problems, strict=True)]
            for answers in rounds
        ]
    ).float()  # [answers, prompts]
    return PassRates(
        num_prompts=num_prompts,
        num_answers=num_answers,
        pass_at_1=right.mean().item(),
        pass_at_k=right.amax(dim=0).mean().item(),
        truncated=sum(ids[-1] != token_id(tokenizer, END_OF_TURN) for ids in tokens) / len(tokens),
        mean_tokens=sum(len(ids) for ids in tokens) / len(tokens),
    )


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> list[list[int]]:
    """One sampled answer for each problem, as token ids up to the end of the turn, which is included."""
    prompts = [chat_prompt(problem.question + INSTRUCTION, tokenizer) for problem in problems]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    sequences = model.generate(  # pyright: ignore[reportCallIssue]  # the annotation of AutoModel hides the mixin
        **encoded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
    )
    rows: list[list[int]] = sequences[:, encoded["input_ids"].shape[1] :].tolist()
    end = token_id(tokenizer, END_OF_TURN)
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def main(arguments: Sequence[str]) -> None:
    """Print the rates as one JSON object."""
    parser = argparse.ArgumentParser(description="Measure pass@1 and pass@k of a model on arithmetic questions.")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--prompts", type=int, default=200, help="number of test questions")
    parser.add_argument("--answers", type=int, default=8, help="answers sampled for each, the k of pass@k")
    parser.add_argument("--seed", type=int, default=0, help="which questions, and which answers")
    options = parser.parse_args(arguments)
    print(json.dumps(asdict(pass_rates(options.model, options.prompts, options.answers, options.seed))))


if __name__ == "__main__":
    main(sys.argv[1:])
