"""The parts of an episode without a framework around them, each in a process of its own that prints JSON.

    python benchmarks/episodes/bare.py generate --questions FILE --lengths long-tailed --answers FILE
    python benchmarks/episodes/bare.py train --questions FILE --lengths long-tailed --answers FILE

``generate``: ``vllm.LLM.generate`` on the same requests. ``train``: transformers' forward and backward and AdamW on
what ``generate`` wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import time
from itertools import cycle

import numpy as np

from benchmarks.episodes.work import (
    LENGTHS,
    MAX_PROMPT_TOKENS,
    MODEL,
    NUM_ANSWERS,
    NUM_THREADS,
    TEMPERATURE,
    Lengths,
    read_conversations,
)
from chatlearn.rollout.engine import SamplingPlan
from chatlearn.rollout.vllm_engine import sampling_params

# Sequences in one forward and backward pass, of neighbours in length: the fastest of 1, 2, 4, 8, 16 and 32 here.
NUM_ROWS = 16
CACHE_BYTES = 2**30  # All sequences fit.


def prompts(questions: Path) -> list[list[int]]:
    """The token ids of the prompts, each as often as it is answered."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rendered = tokenizer.apply_chat_template(
        read_conversations(questions), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return [list(ids) for ids in rendered for _ in range(NUM_ANSWERS)]


def generate(questions: Path, lengths: Lengths, answers: Path, repetitions: int) -> list[float]:
    """Seconds of each repetition; the first one, which warms up, is not among them."""
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(MODEL),
        dtype="float32",
        max_model_len=MAX_PROMPT_TOKENS + lengths.limit,
        max_num_seqs=256,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )
    asked = prompts(questions)
    parameters = [
        sampling_params(SamplingPlan(temperature=TEMPERATURE, max_tokens=length))
        for length, _ in zip(cycle(lengths.tokens()), asked, strict=False)
    ]
    for one in parameters:
        one.ignore_eos = True
    seconds: list[float] = []
    found: list[list[int]] = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], parameters, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        assert [len(ids) for ids in found] == [one.max_tokens for one in parameters], "lengths are forced"
    answers.write_text(json.dumps(found), encoding="utf-8")
    return seconds[1:]


def train(questions: Path, answers: Path, repetitions: int) -> list[float]:
    """Seconds of each optimizer step on what was generated; the first one is not among them."""
    import torch

    from benchmarks.trainer import BareLoop
    from chatlearn.records import Sample

    torch.set_num_threads(NUM_THREADS)
    samples: list[Sample] = []
    found: list[list[int]] = json.loads(answers.read_text(encoding="utf-8"))
    for prompt, answer in zip(prompts(questions), found, strict=True):
        token_ids = np.array([*prompt, *answer], np.int32)
        mask = np.arange(len(token_ids)) >= len(prompt)
        samples.append(Sample("", token_ids, mask, mask.astype(np.float32), mask.astype(np.float32)))
    samples.sort(key=lambda sample: len(sample.token_ids))
    loop = BareLoop(MODEL, "off")
    seconds: list[float] = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        loop.step(samples, NUM_ROWS, sum(map(len, found)))
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["generate", "train"])
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--lengths", choices=list(LENGTHS), required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if options.part == "generate":
        seconds = generate(options.questions, LENGTHS[options.lengths], options.answers, options.repetitions)
    else:
        seconds = train(options.questions, options.answers, options.repetitions)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
