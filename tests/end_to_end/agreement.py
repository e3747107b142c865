"""Run as a program: the largest differences between what trainer, transformers and vLLM make of one checkpoint.

``agreement.py OUTPUT_DIR WORK_DIR ITERATION`` prints one JSON line. It is a program because an engine must be started
in a process whose environment was set before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from chatlearn.rollout.engine import EngineSpec, Request, SamplingPlan, build_engine
from chatlearn.rollout.environment import engine_environment

BASE = Path("embedded/tiny_qwen3")
PROMPTS = 6
TOKENS = 24


def main(output: Path, work: Path, iteration: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from chatlearn.checkpoint.convert import convert

    checkpoints = output / "save_model" / "policy_trainer"
    convert(BASE, checkpoints, work / "float32", iteration, groupgemm=False, dtype="float32")
    answers = sampled(work / "float32")
    rounded = sampled(work / "bfloat16")
    scored = trainer_logprobs(checkpoints / str(iteration), [ids for ids, _ in answers])
    model = AutoModelForCausalLM.from_pretrained(work / "float32", dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(work / "bfloat16")  # as a user would: it must load
    gaps = {"trainer_transformers": 0.0, "trainer_vllm": 0.0, "bfloat16_vllm": 0.0}
    for (ids, engine), trainer, (other_ids, other) in zip(answers, scored, rounded, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0]
        table = torch.log_softmax(logits.float(), dim=-1)
        plain = table[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:].astype(np.int64))].numpy()
        num_sampled = len(engine)
        gaps["trainer_transformers"] = max(gaps["trainer_transformers"], largest(plain, trainer[1:]))
        gaps["trainer_vllm"] = max(gaps["trainer_vllm"], largest(engine, trainer[-num_sampled:]))
        if ids.tolist() == other_ids.tolist():
            gaps["bfloat16_vllm"] = max(gaps["bfloat16_vllm"], largest(engine, other))
    sys.stdout.write(json.dumps(gaps) + "\n")


def largest(left: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(left - right).max())


def sampled(model: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Greedy answers of vLLM to fixed prompts: all token ids, and the logprobs of the answer's."""
    spec = EngineSpec(str(model), max_model_len=128, kv_cache_bytes=2**28, cpu_cores=(0,))
    os.environ.update(engine_environment(spec))
    engine = build_engine("vllm", spec)
    prompts = np.random.default_rng(0).integers(10, 300, size=(PROMPTS, 16), dtype=np.int32)
    engine.submit(
        [Request(str(number), prompt) for number, prompt in enumerate(prompts)],
        SamplingPlan(temperature=0.0, max_tokens=TOKENS),
    )
    finished = {item.request_id: item.completion for item in engine.completions()}
    engine.close()
    ordered = [finished[str(number)] for number in range(PROMPTS)]
    return [
        (np.concatenate([prompt, answer.token_ids]), answer.logprobs)
        for prompt, answer in zip(prompts, ordered, strict=True)
    ]


def trainer_logprobs(checkpoint: Path, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """What the trainer computes after loading the sharded checkpoint, by token."""
    from chatlearn.batch.pack import pack, unpack
    from chatlearn.batch.plan import BatchLayout
    from chatlearn.checkpoint.sharded import load_shards
    from chatlearn.records import Sample
    from chatlearn.trainer.build import ModelSpec
    from chatlearn.trainer.optimizer import OptimizerSpec, build_optimizer
    from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
    from chatlearn.trainer.sharded_model import ShardedModel

    open_process_group(0, 1, Rendezvous(f"file://{checkpoint.parent.parent / 'meeting'}", "cpu"))
    model = ShardedModel.load(ModelSpec(BASE), ParallelPlan(1, 1), trainable=True)
    load_shards(checkpoint, model.module, build_optimizer(model.module.parameters(), OptimizerSpec(lr=0.0)))
    silence = [np.zeros(len(ids), np.float32) for ids in sequences]
    samples = [
        Sample("", ids, np.ones(len(ids), np.bool_), zeros, zeros)
        for ids, zeros in zip(sequences, silence, strict=True)
    ]
    batch = pack(samples, BatchLayout(1, packing=True, max_tokens=64, micro_batch_size=1))
    streams = unpack(batch, [model.logprobs(batch.ranks[0])])
    close_process_group()
    return streams


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
