"""How much host memory a node needs to load a model: python benchmarks/initialisation.py

Writes a random Qwen3 of 1.5 GB (float32; half of that as the bfloat16 file), loads it over 2 and 4 ranks with and
without ``meta_init``, to train and as a frozen reference, and writes benchmarks/results/initialisation.md. The number
that counts is anonymous memory, which must exist: pages of mapped files can be dropped and read again. It is sampled
for all ranks of the node at once, and what they have before they load (interpreter, torch, transformers) is taken off.
On the CPU the shards stay on the host; on a GPU machine they leave it as they are filled, so less is needed there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "initialisation.md"
NUM_RANKS = (2, 4)
BYTES_PER_NUMBER = 4  # float32, as weights are trained
SAMPLE_EVERY_S = 0.002
ALLOWED_BEYOND_ONE_COPY = 2e9

SIZES: dict[str, Any] = {
    "vocab_size": 64_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """One way to load the model."""

    num_ranks: int
    meta_init: bool
    trainable: bool


@dataclass(frozen=True)
class Measured:
    """Anonymous bytes of all ranks together, above what they had before; seconds until the last rank was done."""

    peak_bytes: int
    final_bytes: int
    seconds: float


def write_model(folder: Path) -> int:
    """A random model in bfloat16; the result is its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() for parameter in model.parameters())


def load(pipe: Connection, folder: Path, case: Case, rank: int, meeting: str) -> None:
    """The life of a rank: join, tell, load when told, tell, stay until told to leave."""
    import torch

    from chatlearn.trainer.build import ModelSpec
    from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
    from chatlearn.trainer.sharded_model import ShardedModel

    torch.set_num_threads(1)
    open_process_group(rank, case.num_ranks, Rendezvous(meeting, "cpu"))
    # Collectives need memory once; that is not the model's.
    torch.distributed.barrier()
    pipe.send("ready")
    pipe.recv()
    plan = ParallelPlan(case.num_ranks, case.num_ranks)
    model = ShardedModel.load(ModelSpec(folder, meta_init=case.meta_init), plan, trainable=case.trainable)
    pipe.send("loaded")
    pipe.recv()
    close_process_group()
    del model


def measure(folder: Path, case: Case) -> Measured:
    """Load in fresh processes and watch them from outside, so that watching does not wait for them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        pipes: list[Any] = []  # of a kind that depends on the platform
        processes = []
        for rank in range(case.num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=load, args=(there, folder, case, rank, f"file://{meeting}/place"))
            process.start()
            pipes.append(here)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        pids = [process.pid for process in processes if process.pid is not None]
        before = sum(map(anonymous_bytes, pids))
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send("load")
        peak = before
        while not all(pipe.poll() for pipe in pipes):
            peak = max(peak, sum(map(anonymous_bytes, pids)))
            time.sleep(SAMPLE_EVERY_S)
        seconds = time.perf_counter() - started
        final = sum(map(anonymous_bytes, pids))
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("leave")
            process.join()
    return Measured(max(peak, final) - before, final - before, seconds)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not backed by a file."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Measure all cases; the exit status is 1 where ``meta_init`` takes more than a copy of the model and 2 GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    asked = parser.parse_args()
    cases = [Case(n, meta, trainable=True) for n in NUM_RANKS for meta in (True, False)]
    cases += [Case(n, meta_init=True, trainable=False) for n in NUM_RANKS]
    with tempfile.TemporaryDirectory() as folder:
        model_bytes = write_model(Path(folder)) * BYTES_PER_NUMBER
        measured = [(case, measure(Path(folder), case)) for case in cases]
    lines = [
        "# Host memory of a node while it loads a model",
        "",
        f"`python benchmarks/initialisation.py`: one copy of the model in float32 is {model_bytes / 1e9:.2f} GB.",
        "",
        "| ranks | model | initialisation | peak, GB | peak / copy | after, GB | after / copy | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(case, found, model_bytes) for case, found in measured),
    ]
    asked.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    most = max(found.peak_bytes for case, found in measured if case.meta_init)
    return 1 if most > model_bytes + ALLOWED_BEYOND_ONE_COPY else 0


def row(case: Case, found: Measured, model_bytes: int) -> str:
    """One line of the table."""
    cells = [
        str(case.num_ranks),
        "trained" if case.trainable else "reference",
        "meta" if case.meta_init else "plain",
        f"{found.peak_bytes / 1e9:.2f}",
        f"{found.peak_bytes / model_bytes:.2f}",
        f"{found.final_bytes / 1e9:.2f}",
        f"{found.final_bytes / model_bytes:.2f}",
        f"{found.seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
