"""Run as a program: how far vLLM is from transformers on model directories, ``vllm_agreement.py FOLDER ...``.

Prints one JSON object: for each folder the largest difference of the log-probabilities of greedy answers, both computed
in float32 from the weights as they are stored. It is a program because an engine must be started in a process whose
environment was set before.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

from chatlearn.rollout.engine import EngineSpec, Request, SamplingPlan, build_engine
from chatlearn.rollout.environment import engine_environment


def main(folders: list[str]) -> None:
    sys.stdout.write(json.dumps({folder: largest_gap(folder) for folder in folders}) + "\n")


def largest_gap(folder: str) -> float:
    """Ask four random questions."""
    spec = EngineSpec(folder, max_model_len=64, kv_cache_bytes=2**26, max_num_seqs=4)
    os.environ.update(engine_environment(spec))
    engine = build_engine("vllm", spec)
    prompts = np.random.default_rng(0).integers(0, 97, size=(4, 9), dtype=np.int32)
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    engine.submit(requests, SamplingPlan(temperature=0.0, max_tokens=12))
    finished = {item.request_id: item.completion for item in engine.completions()}
    engine.close()
    gaps = []
    for number, prompt in enumerate(prompts):
        answer = finished[str(number)]
        gaps.append(np.abs(answer.logprobs - plain(folder, prompt, answer.token_ids)).max())
    return float(max(gaps))


def plain(folder: str, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """What transformers makes of the same answer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.concatenate([prompt, answer])).long()
    with torch.inference_mode():
        table = model(tokens[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return table[torch.arange(len(answer)), tokens[len(prompt) :]].numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
