"""How well the trainer uses one GPU: model FLOP utilisation and peak memory of whole optimizer steps.

    python benchmarks/gpu/trainer.py [--shapes qwen3-4b ...] [--tokens 16384 ...] [--checkpointing full selective]
    python benchmarks/gpu/trainer.py --device cpu --tiny     # a rehearsal of seconds, without figures worth keeping

Needs torch, transformers, safetensors and numpy only; from a copy of the repository that is not installed, set
``PYTHONPATH=.``. The table goes to standard output and to ``benchmarks/results/trainer_gpu.md`` (``--output``).

A step is what ``PolicyTrainer.step`` does: GRPO forward and backward of four micro-batches of packed sequences, in
bfloat16 with float32 masters, gradient norm, AdamW. Weights are random: speed does not depend on what a model knows.
"""

from __future__ import annotations

import argparse
import gc
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn import device
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.pack import TrainBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.errors import RunError
from chatlearn.models.family import family_of
from chatlearn.records import Sample
from chatlearn.trainer.build import Checkpointing, ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel

SHAPES = Path(__file__).parent / "shapes"
RESULTS = Path(__file__).parents[1] / "results" / "trainer_gpu.md"
REAL_SHAPES = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-30b-a3b-4-layers")
TINY_SHAPES = ("tiny", "tiny-moe")
SEQUENCES_PER_MICRO_BATCH = 8
NUM_WARM_UP_STEPS = 2  # kernels are chosen and memory is reserved in the first, optimizer states are made
NUM_STEPS = 5
NOISE_SIZE = 4_194_301  # a prime, so that repeating the noise does not repeat rows of a matrix
WEIGHT_SCALE = 0.02

EXPLANATION = """\
Model FLOP utilisation = operations of a step / (seconds of the step x dense bfloat16 peak of the device). Operations
of a step = `6 x N_active x tokens + 6 x layers x width x sum over sequences of length^2`: `N_active` are the weights a
token is multiplied with (with the head, without a looked-up embedding, of the experts those it is sent to), the width
is heads x size of a head, and causal attention sees half of each sequence on average. What checkpointing computes
again is not counted. The largest memory is what torch allocated on the device.

Published for other trainers on 8 GPUs: 13.9 % (4B, 16k tokens, reinforcement learning), 26.6 % (4B, 16k, supervised)
and 35.4 % (4B, 64k). The aim is to beat 26.6 % with 4B at 16k on one GPU; the horizon is 45 %.
"""


@dataclass(frozen=True)
class Case:
    """One row of the table: what is trained, and how."""

    shape: str
    num_tokens: int  # of a micro-batch
    checkpointing: Checkpointing


@dataclass(frozen=True)
class Measured:
    """What a case took; the median over steps."""

    step_s: float
    num_tokens: int
    flops: float
    peak_memory_gb: float


def write_model(shape: str, folder: Path) -> None:
    """A model directory of this shape, bfloat16, with random weights under their Hugging Face names."""
    folder.mkdir()
    shutil.copyfile(SHAPES / f"{shape}.json", folder / "config.json")
    family = family_of(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    noise = (torch.randn(NOISE_SIZE, generator=torch.Generator().manual_seed(0)) * WEIGHT_SCALE).bfloat16()
    stored = {
        name: torch.ones(piece.shape, dtype=noise.dtype)
        if name.endswith("norm.weight")
        else noise.repeat(-(-piece.numel() // NOISE_SIZE))[: piece.numel()].view(piece.shape)
        for parameter_name, parameter in model.named_parameters()
        for name, piece in family.export(parameter_name, parameter.detach())
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def random_batch(num_tokens: int, num_micro_batches: int, vocabulary: int) -> TrainBatch:
    """Micro-batches of exactly ``num_tokens``, each of sequences whose lengths differ up to threefold."""
    generator = np.random.default_rng(0)
    samples: list[Sample] = []
    for _ in range(num_micro_batches):
        shares = generator.uniform(0.5, 1.5, SEQUENCES_PER_MICRO_BATCH)
        ends = np.round(np.cumsum(shares) / shares.sum() * num_tokens).astype(int)
        for length in np.diff(ends, prepend=0).tolist():
            mask = np.arange(length) >= length // 8
            advantages = np.where(mask, generator.choice([-1.0, 1.0]), 0).astype(np.float32)
            token_ids = generator.integers(0, vocabulary, length).astype(np.int32)
            rollout_logprobs = np.where(mask, -np.log(vocabulary), 0).astype(np.float32)
            samples.append(Sample("", token_ids, mask, rollout_logprobs, advantages))
    # One sample after another instead of the planner's choice: then every micro-batch has the size it is named after.
    layout = BatchLayout(num_data_ranks=1, packing=True, max_tokens=num_tokens, micro_batch_size=1)
    starts = range(0, len(samples), SEQUENCES_PER_MICRO_BATCH)
    batches = [pack(samples[start : start + SEQUENCES_PER_MICRO_BATCH], layout) for start in starts]
    return TrainBatch(
        ranks=(tuple(micro_batch for batch in batches for micro_batch in batch.ranks[0]),),
        num_loss_tokens=sum(batch.num_loss_tokens for batch in batches),
        num_samples=len(samples),
    )


def step_flops(model: ShardedModel, batch: TrainBatch) -> float:
    """Operations of forward and backward over the whole batch; see ``EXPLANATION``."""
    config = model.module.model.config
    width = config.num_attention_heads * config.head_dim
    lengths = [length for micro_batch in batch.ranks[0] for length in micro_batch.lengths]
    attention = 6 * config.num_hidden_layers * width * sum(length**2 for length in lengths)
    return model.training_flops_per_token() * sum(lengths) + attention


def measure(case: Case, folder: Path, options: argparse.Namespace) -> Measured | None:
    """Train a few steps; ``None`` where the device has too little memory."""
    try:
        return train(case, folder, options)
    except torch.OutOfMemoryError:
        return None
    except RunError as error:  # what a step makes of running out of memory, for users
        if not isinstance(error.__cause__, RuntimeError):
            raise
        return None
    finally:
        gc.collect()
        device.empty_cache(options.device)


def train(case: Case, folder: Path, options: argparse.Namespace) -> Measured:
    """The steps themselves, and how long the median of them took."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spec = ModelSpec(
        folder,
        compute_dtype=device.compute_dtype(options.device),
        checkpointing=case.checkpointing,
        grouped_experts=True,
        meta_init=True,
    )
    clip = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
    trainer = PolicyTrainer(
        ShardedModel.load(spec, ParallelPlan(1, 1), trainable=True),
        OptimizerSpec(lr=1e-6),
        Objective(POLICY_LOSSES["grpo"], clip),
    )
    vocabulary = trainer.model.module.model.config.vocab_size
    batch = random_batch(case.num_tokens, options.micro_batches, vocabulary)
    seconds: list[float] = []
    for iteration in range(1, NUM_WARM_UP_STEPS + options.steps + 1):
        started = time.perf_counter()
        stats = trainer.step(
            batch.ranks[0], batch.num_loss_tokens, iteration
        )  # reads its numbers: waits for the device
        seconds.append(time.perf_counter() - started)
        assert np.isfinite(stats.grad_norm), "a step without a finite gradient is skipped, and would look fast"
    return Measured(
        step_s=median(seconds[NUM_WARM_UP_STEPS:]),
        num_tokens=sum(micro_batch.num_tokens for micro_batch in batch.ranks[0]),
        flops=step_flops(trainer.model, batch),
        peak_memory_gb=device.peak_memory_gb(options.device),
    )


def row(case: Case, measured: Measured | None, peak_flops: float | None) -> str:
    """One line of the table."""
    start = f"| {case.shape} | {case.num_tokens:,} | {case.checkpointing} |"
    if measured is None:
        return f"{start} out of memory | | | |"
    achieved = measured.flops / measured.step_s
    utilisation = "not known" if peak_flops is None else f"{100 * achieved / peak_flops:.1f} %"
    return (
        f"{start} {measured.num_tokens / measured.step_s:,.0f} | {achieved / 1e12:,.2f} | {utilisation} "
        f"| {measured.peak_memory_gb:.1f} |"
    )


def surroundings(kind: device.DeviceKind) -> list[str]:
    """When and on what this ran."""
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()} processor"
    peak = device.peak_flops(kind)
    return [
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- hardware: one {name}, peak {'not known' if peak is None else f'{peak / 1e12:,.0f} TFLOP/s'}",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {metadata.version('transformers')}",
    ]


def report(cases: Sequence[Case], options: argparse.Namespace) -> str:
    """Measure every case, and say everything about it."""
    lines = [
        "# The trainer on one GPU",
        "",
        *surroundings(options.device),
        f"- a step: {options.micro_batches} micro-batches of {SEQUENCES_PER_MICRO_BATCH} sequences; median of "
        f"{options.steps} steps",
        "",
        EXPLANATION,
        "| shape | tokens in a micro-batch | checkpointing | tokens/s | TFLOP/s | utilisation | largest memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        open_process_group(0, 1, Rendezvous(f"file://{temporary}/meeting", options.device))
        for shape in dict.fromkeys(case.shape for case in cases):
            folder = Path(temporary) / shape
            write_model(shape, folder)
            for case in (case for case in cases if case.shape == shape):
                lines.append(row(case, measure(case, folder, options), device.peak_flops(options.device)))
                print(lines[-1], flush=True)
            shutil.rmtree(folder)
        close_process_group()
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small shapes and short sequences")
    parser.add_argument("--shapes", nargs="+", choices=[*REAL_SHAPES, *TINY_SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "selective", "full"])
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/trainer_gpu.md; none for a rehearsal")
    options = parser.parse_args()
    shapes = options.shapes or (TINY_SHAPES if options.tiny else REAL_SHAPES)
    lengths = options.tokens or ([64, 128] if options.tiny else [4096, 16_384, 32_768])
    ways: list[Checkpointing] = options.checkpointing or ["full", "selective"]
    cases = [Case(shape, num_tokens, way) for shape in shapes for num_tokens in lengths for way in ways]
    text = report(cases, options)
    output = options.output or (None if options.tiny else RESULTS)
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
