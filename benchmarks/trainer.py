"""What the trainer costs beside the plainest program that does the same: one table, one run, on a CPU.

    python benchmarks/trainer.py [--threads 1] [--repetitions 5] [--output FILE]

(a) A step against a bare loop of transformers' forward and backward and AdamW on the same tokens; (b) log-probability
and entropy against log_softmax and autograd; (c) how full and how even the planner's bins are, and how long it plans;
(d) grouped against eager experts. Repetitions of what is compared take turns, and ratios are medians over pairs: a
machine that others use too slows both alike. Writes ``benchmarks/results/trainer_cpu.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from chatlearn.algorithm.logprob import token_logprobs_and_entropy
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.pack import TrainBatch, pack
from chatlearn.batch.plan import BatchLayout, bin_cost, cost, plan
from chatlearn.records import Sample
from chatlearn.trainer.build import Checkpointing, ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

RESULTS = Path(__file__).parent / "results" / "trainer_cpu.md"

SHAPES = Path(__file__).parent / "shapes"
VOCABULARY = 8192  # of both shapes; in "dense" the head is a quarter of the weights, as in Qwen3-0.6B
SHORTEST, LONGEST = 50, 500
NUM_SAMPLES = 8
PADDED_ROWS = 4  # sequences in a micro-batch of the padded loop
CLIP = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
LR = 1e-5

HEAD_ROWS = 2048
HEAD_ROWS_LONG = 8192  # the naive way would need more than 20 GiB
HEAD_VOCABULARY = 151_936
HEAD_WIDTH = 256
GIB = 2**30

Timed = Callable[[], object]


@dataclass(frozen=True)
class Seconds:
    """How long each repetition took: on the clock, and of the processor's time."""

    wall: tuple[float, ...]
    processor: tuple[float, ...]


@dataclass(frozen=True)
class Contest:
    """Two ways to do the same work, measured in turns."""

    ours: Seconds
    other: Seconds

    def ratios(self) -> tuple[float, float]:
        """How many times faster ours is, by the clock and by the processor's time."""
        wall = median(other / ours for ours, other in zip(self.ours.wall, self.other.wall, strict=True))
        processor = median(other / ours for ours, other in zip(self.ours.processor, self.other.processor, strict=True))
        return wall, processor


def contest(ours: Timed, other: Timed, repetitions: int) -> Contest:
    """Do both once without counting, then in turns."""
    for work in (ours, other):
        work()
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for _ in range(repetitions):
        for work, kept in zip((ours, other), times, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            work()
            kept.append((time.perf_counter() - wall, time.process_time() - processor))
    mine, theirs = (Seconds(*(tuple(column) for column in zip(*kept, strict=True))) for kept in times)
    return Contest(mine, theirs)


# --- (a), (d): steps -------------------------------------------------------------------------------------------------


def random_samples() -> list[Sample]:
    """Answers to prompts of a quarter of their length."""
    generator = np.random.default_rng(0)
    samples: list[Sample] = []
    for length in generator.integers(SHORTEST, LONGEST + 1, NUM_SAMPLES).tolist():
        mask = np.arange(length) >= length // 4
        token_ids = generator.integers(0, VOCABULARY, length).astype(np.int32)
        rollout_logprobs = np.where(mask, -9, 0).astype(np.float32)
        samples.append(
            Sample("", token_ids, mask, rollout_logprobs, np.where(mask, generator.normal(), 0).astype(np.float32))
        )
    return samples


def write_model(shape: str, parent: Path) -> Path:
    """A model directory with random weights."""
    folder = parent / shape
    config = AutoConfig.from_pretrained(SHAPES / f"{shape}.json")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def trainer_of(folder: Path, checkpointing: Checkpointing, *, grouped_experts: bool = False) -> PolicyTrainer:
    """What is measured."""
    spec = ModelSpec(folder, checkpointing=checkpointing, grouped_experts=grouped_experts)
    model = ShardedModel.load(spec, ParallelPlan(1, 1), trainable=True)
    return PolicyTrainer(model, OptimizerSpec(lr=LR), Objective(POLICY_LOSSES["grpo"], CLIP))


class BareLoop:
    """What one would write without a framework: transformers, its own attention, AdamW."""

    def __init__(self, folder: Path, checkpointing: Checkpointing) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        self.model.train()
        if checkpointing != "off":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def step(self, samples: Sequence[Sample], num_rows: int, num_loss_tokens: int) -> float:
        """One optimizer step, ``num_rows`` sequences at a time, padded to the longest of them."""
        loss = 0.0
        for start in range(0, len(samples), num_rows):
            part = self._loss(samples[start : start + num_rows]) / num_loss_tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _loss(self, samples: Sequence[Sample]) -> Tensor:
        token_ids, mask, advantages = (
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(stream) for stream in streams], batch_first=True)
            for streams in zip(*((one.token_ids, one.loss_mask, one.advantages) for one in samples), strict=True)
        )  # [B, T]
        lengths = torch.tensor([len(sample.token_ids) for sample in samples])
        is_token = None if len(samples) == 1 else torch.arange(token_ids.shape[1]) < lengths[:, None]
        labels = token_ids[:, 1:, None].long()
        logits = self.model(input_ids=token_ids.long(), attention_mask=is_token, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        ratio = (logprobs - logprobs.detach()).exp()  # the step is on-policy
        pull = -advantages[:, 1:]
        surrogate = torch.maximum(pull * ratio, pull * ratio.clamp(1 - CLIP.low, 1 + CLIP.high))
        return (surrogate * mask[:, 1:]).sum()


def step_rows(folder: Path, repetitions: int) -> list[str]:
    """(a): packed steps against the bare loop, unpadded and padded."""
    samples = random_samples()
    layout = BatchLayout(num_data_ranks=1, packing=True, max_tokens=2048, micro_batch_size=1)
    batch = pack(samples, layout)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    model = write_model("dense", folder)
    padding = padded_tokens(samples) / num_tokens
    rows: list[str] = []
    contests: tuple[tuple[Checkpointing, str, int, float], ...] = (
        ("off", "one sequence at a time", 1, 0.9),
        ("off", f"padded {padding:.2f} times", PADDED_ROWS, 0.9 * padding),
        ("full", "one sequence at a time", 1, 0.9),
    )
    for checkpointing, name, num_rows, target in contests:
        trainer, bare = trainer_of(model, checkpointing), BareLoop(model, checkpointing)
        outcome = contest(
            lambda trainer=trainer: train_once(trainer, batch),
            lambda bare=bare, num_rows=num_rows: bare.step(samples, num_rows, batch.num_loss_tokens),
            repetitions,
        )
        rows.append(speed_row(f"checkpointing {checkpointing}: {name}", num_tokens, outcome, f"{target:.2f}"))
    return rows


def expert_rows(folder: Path, repetitions: int) -> list[str]:
    """(d): the same step with a grouped matrix product for all experts, and with a loop over them."""
    batch = pack(random_samples(), BatchLayout(num_data_ranks=1, packing=True, max_tokens=2048, micro_batch_size=1))
    model = write_model("mixture", folder)
    grouped, eager = (trainer_of(model, "off", grouped_experts=choice) for choice in (True, False))
    outcome = contest(lambda: train_once(grouped, batch), lambda: train_once(eager, batch), repetitions)
    num_tokens = sum(micro_batch.num_tokens for micro_batch in batch.ranks[0])
    return [speed_row("64 experts, 8 for a token: grouped against eager", num_tokens, outcome, "")]


def train_once(trainer: PolicyTrainer, batch: TrainBatch) -> object:
    """One step of the trainer."""
    return trainer.step(batch.ranks[0], batch.num_loss_tokens, iteration=1)


def padded_tokens(samples: Sequence[Sample]) -> int:
    """How many positions the padded loop computes."""
    lengths = [len(sample.token_ids) for sample in samples]
    rows = [lengths[start : start + PADDED_ROWS] for start in range(0, len(lengths), PADDED_ROWS)]
    return sum(max(row) * len(row) for row in rows)


def speed_row(name: str, num_tokens: int, outcome: Contest, target: str) -> str:
    """One line of the tables of steps."""
    wall, processor = outcome.ratios()
    ours, other = (num_tokens / median(side.wall) for side in (outcome.ours, outcome.other))
    return f"| {name} | {ours:,.0f} | {other:,.0f} | {wall:.2f} | {processor:.2f} | {target} |"


# --- (b): the head ---------------------------------------------------------------------------------------------------


def naive_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy as a textbook has them."""
    distribution = (hidden @ weight.T).log_softmax(-1)
    return distribution.gather(-1, labels[:, None]).squeeze(-1), -(distribution.exp() * distribution).sum(-1)


HEADS = {"ours": token_logprobs_and_entropy, "naive": naive_head}


def measure_head(name: str, num_rows: int) -> None:
    """In a process of its own: print seconds and the memory that one forward and backward took beyond its start."""
    weight = (torch.randn(HEAD_VOCABULARY, HEAD_WIDTH) * 0.05).requires_grad_()

    def work(num_rows: int) -> None:
        hidden, labels = torch.randn(num_rows, HEAD_WIDTH), torch.randint(0, HEAD_VOCABULARY, (num_rows,))
        logprobs, entropy = HEADS[name](hidden.requires_grad_(), weight, labels)
        (logprobs.sum() + entropy.sum()).backward()
        weight.grad = None

    work(4)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest memory so far
    before = status_bytes("VmRSS")
    wall, processor = time.perf_counter(), time.process_time()
    work(num_rows)
    seconds = (time.perf_counter() - wall, time.process_time() - processor)
    print(json.dumps([*seconds, status_bytes("VmHWM") - before]))


def status_bytes(entry: str) -> int:
    """A figure of this process from the kernel."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"the kernel tells no {entry}"
    return int(found[1]) * 1024


def head_rows(num_threads: int, repetitions: int) -> list[str]:
    """(b): ours, naive, and ours where naive would not fit."""

    def child(name: str, num_rows: int) -> list[float]:
        command = [sys.executable, __file__, "--threads", str(num_threads), "--head", name, str(num_rows)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pairs = [(child("ours", HEAD_ROWS), child("naive", HEAD_ROWS)) for _ in range(repetitions)]
    ours, naive = ([median(column) for column in zip(*side, strict=True)] for side in zip(*pairs, strict=True))
    wall, processor, memory = (
        median(mine[place] / theirs[place] for mine, theirs in pairs) for place in range(len(ours))
    )
    long = child("ours", HEAD_ROWS_LONG)
    return [
        f"| naive, {HEAD_ROWS:,} tokens | {naive[0]:.1f} | {naive[1]:.1f} | {naive[2] / GIB:.2f} |",
        f"| ours, {HEAD_ROWS:,} tokens | {ours[0]:.1f} | {ours[1]:.1f} | {ours[2] / GIB:.2f} |",
        f"| ratio, to be at most 1.5, 1.5 and 0.15 | {wall:.2f} | {processor:.2f} | {memory:.3f} |",
        f"| ours, {HEAD_ROWS_LONG:,} tokens | {long[0]:.1f} | {long[1]:.1f} | {long[2] / GIB:.2f} |",
    ]


# --- (c): plans ------------------------------------------------------------------------------------------------------


def length_distributions(num_samples: int) -> dict[str, list[int]]:
    """Three kinds of answers."""
    generator = np.random.default_rng(0)
    short, long = generator.normal(400, 120, num_samples), generator.normal(6500, 800, num_samples)
    bimodal = np.where(generator.random(num_samples) < 0.75, short.clip(50, 1000), long.clip(4000, 8192))
    return {
        "uniform 50 to 3,072": generator.integers(50, 3073, num_samples).tolist(),
        "lognormal, long tail": generator.lognormal(6.5, 0.9, num_samples).clip(20, 8192).astype(int).tolist(),
        "short, a quarter long": bimodal.astype(int).tolist(),
    }


def plan_rows() -> list[str]:
    """(c): 8 ranks with 512 samples each, and the time for 100,000 samples."""
    rows: list[str] = []
    for name, lengths in length_distributions(100_000).items():
        for max_tokens in (8192, 32_768):
            layout = BatchLayout(num_data_ranks=8, packing=True, max_tokens=max_tokens, micro_batch_size=1)
            started = time.process_time()
            plan(lengths, layout)
            seconds = time.process_time() - started
            few = lengths[: 8 * 512]
            ranks = plan(few, layout)
            costs = [cost(length, layout.attention_crossover_tokens) for length in few]
            work = np.array([[bin_cost(members, costs) for members in bins] for bins in ranks], dtype=float)
            num_long = sum(length > max_tokens / 2 for length in few)
            fewest = max(-(-sum(few) // (8 * max_tokens)), -(-num_long // 8))
            rows.append(
                f"| {name} | {max_tokens:,} | {len(ranks[0])} | {fewest} "
                f"| {100 * sum(few) / (8 * len(ranks[0]) * max_tokens):.1f} % "
                f"| {work.sum(axis=1).max() / work.sum(axis=1).mean():.4f} "
                f"| {work.max(axis=0).sum() / work.sum(axis=1).mean():.4f} | {seconds:.2f} |"
            )
    return rows


# --- the report ------------------------------------------------------------------------------------------------------

STEP_HEADER = ["| step | ours, tokens/s | other, tokens/s | ratio | ratio of processor time | at least |"]
HEAD_HEADER = ["| log-probability and entropy | seconds | processor seconds | memory, GiB |"]
PLAN_HEADER = [
    "| lengths | cap | micro-batches on a rank | no plan has fewer than | full | highest/mean rank "
    "| with waiting | s for 100,000 |"
]


def table(title: str, header: Sequence[str], rows: Sequence[str]) -> str:
    """A markdown table under a heading."""
    rule = "| --- " * (header[0].count("|") - 1) + "|"
    return "\n".join([f"## {title}", "", *header, rule, *rows, ""])


def report(num_threads: int, repetitions: int) -> str:
    """Everything, measured now."""
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        open_process_group(0, 1, Rendezvous(f"file://{folder}/meeting", "cpu"))
        steps, experts = step_rows(folder, repetitions), expert_rows(folder, repetitions)
        close_process_group()
    introduction = [
        "# The trainer on a CPU",
        "",
        f"`python benchmarks/trainer.py --threads {num_threads} --repetitions {repetitions}`",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- hardware: {platform.machine()}, {os.cpu_count()} cores, {num_threads} in use",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {metadata.version('transformers')}",
        f"- repetitions take turns; medians of {repetitions}; ratios are medians over pairs",
        "",
    ]
    return "\n".join(
        [
            *introduction,
            table("(a) A step against a bare loop", STEP_HEADER, steps),
            table(
                f"(b) {HEAD_VOCABULARY:,} tokens of vocabulary, forward and backward",
                HEAD_HEADER,
                head_rows(num_threads, max(1, repetitions // 2)),
            ),
            table("(c) Plans for 8 ranks with 512 samples each", PLAN_HEADER, plan_rows()),
            table("(d) Experts", STEP_HEADER, experts),
        ]
    )


def main() -> None:
    """Measure everything, or one head in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--head", nargs=2, metavar=("WAY", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.head is not None:
        torch.set_num_threads(options.threads)
        measure_head(options.head[0], int(options.head[1]))
        return
    text = report(options.threads, options.repetitions)
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
