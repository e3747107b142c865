"""How long training stands still for a save in the background, against a save that is waited for and a plain copy.

Two ranks hold a random Qwen3 in shards, with the moments of AdamW. In turn each saves and waits, saves in the
background while it multiplies matrices, and copies the same bytes into memory that it has had before. The slower rank
counts. The first save of a process also gets its memory, and has a row of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints.part import Part

if TYPE_CHECKING:
    from torch import Tensor

    from chatlearn.checkpoint.background import BackgroundSaver
    from chatlearn.checkpoint.sharded import ShardState

NUM_RANKS = 2
REPEATS = 5
MOST_RATIO = 0.2  # of the time of a save that is waited for

SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = SIZES | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}

MATRIX, PRODUCTS = 384, 40


@dataclass(frozen=True)
class Measured:
    """Seconds of one rank in one round, and the bytes that it holds.

    ``slower`` compares matrix products while a checkpoint is written with the same ones before.
    """

    waiting_s: float
    standing_s: float
    written_s: float
    copy_s: float
    slower: float
    num_bytes: int


def measure(folder: Path, *, tiny: bool) -> Part:
    """Save below ``folder`` in rounds, tell what came out; the bound is kept by the median of all but the first."""
    write_model(folder / "model", TINY if tiny else SIZES)
    rounds = run_ranks(folder, 2 if tiny else 1 + REPEATS)
    later = rounds[1:]
    ratio = statistics.median(one.standing_s / one.waiting_s for one in later)
    copy = statistics.median(one.standing_s / one.copy_s for one in later)
    lines = (
        f"Weights and moments of {NUM_RANKS * rounds[0].num_bytes / 1e9:.2f} GB in the shards of {NUM_RANKS} ranks. "
        f"Median after the first save: training stands still for {ratio:.3f} of the time of a save that is waited for "
        f"(bound: at most {MOST_RATIO}), and {copy:.2f} times as long as a plain copy of the same bytes in memory.",
        "",
        "| save | waited for, s | standstill in the background, s | written after, s | plain copy, s "
        "| standstill / waited for | standstill / copy | products meanwhile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(number, one) for number, one in enumerate(rounds, 1)),
    )
    return Part("Standstill of training", lines, tiny or ratio <= MOST_RATIO)


def row(number: int, one: Measured) -> str:
    """One line of the table."""
    cells = [
        str(number),
        f"{one.waiting_s:.2f}",
        f"{one.standing_s:.3f}",
        f"{one.written_s:.2f}",
        f"{one.copy_s:.3f}",
        f"{one.standing_s / one.waiting_s:.3f}",
        f"{one.standing_s / one.copy_s:.2f}",
        f"x {one.slower:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A random model in bfloat16, from which the ranks begin."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=torch.bfloat16).save_pretrained(folder)


def run_ranks(folder: Path, num_rounds: int) -> list[Measured]:
    """What the slower rank needed in each round."""
    context = multiprocessing.get_context("spawn")
    meeting = f"file://{folder.resolve()}/meeting"
    pipes: list[Any] = []
    processes: list[Any] = []
    for rank in range(NUM_RANKS):
        here, there = context.Pipe()
        processes.append(context.Process(target=live, args=(there, folder, rank, meeting, num_rounds)))
        processes[-1].start()
        there.close()  # so that the death of the process is seen here
        pipes.append(here)
    told: list[list[Measured]] = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return [slowest(ranks) for ranks in zip(*told, strict=True)]


def slowest(ranks: Sequence[Measured]) -> Measured:
    """Everybody waits for the last."""
    return Measured(
        waiting_s=max(one.waiting_s for one in ranks),
        standing_s=max(one.standing_s for one in ranks),
        written_s=max(one.written_s for one in ranks),
        copy_s=max(one.copy_s for one in ranks),
        slower=max(one.slower for one in ranks),
        num_bytes=max(one.num_bytes for one in ranks),
    )


def live(pipe: Connection, folder: Path, rank: int, meeting: str, num_rounds: int) -> None:
    """The life of a rank: load, make moments, measure every round, tell."""
    import torch

    from chatlearn.checkpoint.background import BackgroundSaver
    from chatlearn.checkpoint.sharded import shard_state
    from chatlearn.trainer.build import ModelSpec
    from chatlearn.trainer.parallel import (
        ParallelPlan,
        Rendezvous,
        close_process_group,
        open_process_group,
        saving_group,
    )
    from chatlearn.trainer.sharded_model import ShardedModel

    torch.set_num_threads(1)
    open_process_group(rank, NUM_RANKS, Rendezvous(meeting, "cpu"))
    plan = ParallelPlan(NUM_RANKS, NUM_RANKS)
    spec = ModelSpec(folder / "model", compute_dtype="float32", temperature=1.0)
    module = ShardedModel.load(spec, plan, trainable=True).module
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    saver = BackgroundSaver(rank, saving_group(), on_accelerator=False)
    copies: list[Tensor] = []
    rounds: list[Measured] = []
    for number in range(num_rounds):
        state = shard_state(module, optimizer)
        rounds.append(measure_round(folder / str(number), saver, state, copies))
    saver.close()
    close_process_group()
    pipe.send(rounds)


def measure_round(folder: Path, saver: BackgroundSaver, state: ShardState, copies: list[Tensor]) -> Measured:
    """The three ways, one after the other, all ranks at once."""
    import shutil

    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    saver.begin(folder / "waited", state, in_background=False)
    waiting_s = time.perf_counter() - begun
    copy_s = plain_copy(state, copies)
    alone_s = products_s()
    dist.barrier()
    begun = time.perf_counter()
    saver.begin(folder / "background", state, in_background=True)
    standing_s = time.perf_counter() - begun
    meanwhile_s = products_s()
    saver.wait()
    written_s = time.perf_counter() - begun
    assert saver.fault() is None, saver.fault()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    num_bytes = sum(copy.nbytes for copy in copies)
    return Measured(waiting_s, standing_s, written_s, copy_s, meanwhile_s / alone_s, num_bytes)


def plain_copy(state: ShardState, copies: list[Tensor]) -> float:
    """Seconds to copy all tensors of the state into ``copies``, which get their memory before that."""
    import torch

    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors_in(state)]
    if not copies:
        copies.extend(torch.zeros_like(tensor) for tensor in tensors)
    begun = time.perf_counter()
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return time.perf_counter() - begun


def tensors_in(state: ShardState) -> list[Any]:
    """All tensors, sharded ones as they are."""
    import torch

    moments = [value for per_parameter in state.moments["state"].values() for value in per_parameter.values()]
    return [tensor for tensor in (*state.weights.values(), *moments) if isinstance(tensor, torch.Tensor)]


def products_s() -> float:
    """Seconds of some matrix products, as a rank that trains would compute them."""
    import torch

    matrix = torch.ones(MATRIX, MATRIX) / MATRIX
    begun = time.perf_counter()
    for _ in range(PRODUCTS):
        matrix = matrix @ matrix
    return time.perf_counter() - begun
