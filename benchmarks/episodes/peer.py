"""TRL's ``GRPOTrainer`` on the work of the comparison, timed from inside; prints the seconds of each step as JSON.

    PYTHONPATH=FOLDER python benchmarks/episodes/peer.py --questions FILE --lengths long-tailed

TRL generates with transformers: its vLLM mode does not run on a CPU. A step answers all prompts, in one call or in
several, whatever is fastest, and learns from them in one optimizer step; no gradient checkpointing, no reference model,
float32, nothing reported or saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import cycle, islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks.episodes.work import (
    ANSWER,
    LEARNING_RATE,
    LENGTHS,
    LONG,
    MODEL,
    NUM_ANSWERS,
    NUM_SAMPLES,
    NUM_THREADS,
    SHORT,
    TEMPERATURE,
    Lengths,
    read_conversations,
)

# Sequences in one call of ``generate`` and in one forward and backward pass. On long tails more share what every token
# costs, and fewer keep transformers' cache, which it copies for every token, within the processor's; 16 were fastest of
# generation alone on a busy machine. Whole steps with other numbers were not compared.
NUM_ROWS = {LONG.name: 16, SHORT.name: 128}


class ForcedEnds(LogitsProcessor):
    """Every row ends at its own length and not before."""

    def __init__(self, lengths: Sequence[int], num_prompt_tokens: int, end: int) -> None:
        self._last = torch.tensor(lengths) - 1
        self._num_prompt_tokens = num_prompt_tokens
        self._end = end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ends = self._last == input_ids.shape[1] - self._num_prompt_tokens
        scores[:, self._end] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self._end] = 0.0
        return scores


class StepClock(TrainerCallback):
    """The seconds of each step, from its beginning to the next one's."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *_: object, **_more: object) -> None:
        self.begun.append(time.perf_counter())

    def on_train_end(self, *_: object, **_more: object) -> None:
        self.begun.append(time.perf_counter())


def force_lengths(model: Any, lengths: Lengths, end: int) -> None:
    """Let calls of ``model.generate`` make answers of these lengths, one part of the list after the other."""
    plain, wanted = model.generate, cycle(lengths.tokens())

    def generate(input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        now = list(islice(wanted, len(input_ids)))
        ends = ForcedEnds(now, input_ids.shape[1], end)
        found = plain(input_ids=input_ids, logits_processor=LogitsProcessorList([ends]), **arguments)
        assert found.shape[1] == input_ids.shape[1] + max(now), "lengths are forced"
        return found

    model.generate = generate


def rewards(completions: Sequence[list[dict[str, str]]], **_columns: object) -> list[float]:
    """Right answers; all questions have the same one."""
    return [float(f"boxed{{{ANSWER}}}" in completion[0]["content"]) for completion in completions]


def steps(questions: Path, lengths: Lengths, repetitions: int, num_rows: int, cache: str | None) -> list[float]:
    """Seconds of each step but the first."""
    trl, datasets = import_module("trl"), import_module("datasets")
    torch.set_num_threads(NUM_THREADS)
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=num_rows,
        gradient_accumulation_steps=NUM_SAMPLES // num_rows,
        steps_per_generation=1,
        num_generations=NUM_ANSWERS,
        max_completion_length=lengths.limit,
        max_steps=1 + repetitions,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        temperature=TEMPERATURE,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        cache_implementation=cache,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        shuffle_dataset=False,
        logging_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    force_lengths(model, lengths, tokenizer.eos_token_id)
    clock = StepClock()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": read_conversations(questions)}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    seconds = [after - begun for begun, after in zip(clock.begun, clock.begun[1:], strict=False)]
    return seconds[1:]


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--lengths", choices=list(LENGTHS), required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, help="sequences in a call; the fastest known number where absent")
    parser.add_argument("--cache", help="transformers' cache_implementation, such as static")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    warnings.simplefilter("ignore")  # TRL warns of versions of things that are not used here.
    rows = options.rows or NUM_ROWS[options.lengths]
    seconds = steps(options.questions, LENGTHS[options.lengths], options.repetitions, rows, options.cache)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
