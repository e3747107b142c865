"""Rebuilds an embedded model from a seed: ``python embedded/build.py --output DIR [--moe] [--compare SHIPPED]``.

On the kind of machine that the shipped ``build.json`` names the result equals the shipped model to the bit; on others
the rounding differs a little, and the losses tell that the model is equally good.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import tokenizers
import torch
import transformers

from embedded.vocabulary import build_tokenizer
from embedded.warm_up import FULL_STEPS, MAX_LENGTH, dense_config, moe_config, new_model, warm_up, weights_digest

RECORD = "build.json"
WEIGHTS = "model.safetensors"
MILESTONES = (40, FULL_STEPS)  # steps after which loss and weights are noted; a test rebuilds up to the first
NUM_THREADS = 1  # sums in another order round differently
LOSS_TOLERANCE = 0.05  # relative; another order of sums moves the loss less, a model that missed the columns doubles it


@dataclass(frozen=True)
class Milestone:
    """Where a training stood after ``step`` steps; ``loss`` is the mean of the ten last ones, in nats per token."""

    step: int
    loss: float
    weights_sha256: str


@dataclass(frozen=True)
class BuildRecord:
    """What went into a model and what came out, written beside its weights."""

    seed: int
    steps: int
    num_parameters: int
    cpu_seconds: float
    machine: dict[str, str]
    milestones: tuple[Milestone, ...]


def machine_kind() -> dict[str, str]:
    """All that decides how sums round: equal kinds build equal weights."""
    return {
        "processor": _processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": str(NUM_THREADS),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _processor() -> str:
    """Architecture, vendor, family and model of the processor, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().split("\n\n")[0].splitlines() if listing.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join([platform.machine(), *(facts.get(key, "-") for key in ("vendor_id", "cpu family", "model"))])


def build(output: Path, moe: bool, seed: int, num_steps: int) -> BuildRecord:
    """Train a model and write it with its tokenizer and its record; other files in ``output`` stay."""
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(seed, MAX_LENGTH)
    model = new_model(moe_config(tokenizer) if moe else dense_config(tokenizer), seed)
    milestones: list[Milestone] = []
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step in {*MILESTONES, num_steps}:
            recent = losses[-10:]
            milestones.append(Milestone(step, sum(recent) / len(recent), weights_digest(model)))
        if step % 40 == 0:
            print(f"step {step} of {num_steps}: loss {loss:.4f}", file=sys.stderr)

    start = time.process_time()
    warm_up(model, tokenizer, seed, num_steps, report)
    cpu_seconds = round(time.process_time() - start, 1)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    record = BuildRecord(seed, num_steps, num_parameters, cpu_seconds, machine_kind(), tuple(milestones))
    model.save_pretrained(output)
    (output / WEIGHTS).chmod(0o644)  # safetensors keeps new files to their owner; a model is shared
    tokenizer.save_pretrained(output)
    (output / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record


def read_record(model_dir: Path) -> BuildRecord:
    """The record that ``build`` left beside a model."""
    fields = json.loads((model_dir / RECORD).read_text())
    milestones = tuple(Milestone(**milestone) for milestone in fields.pop("milestones"))
    return BuildRecord(**fields, milestones=milestones)


def differences(rebuilt: BuildRecord, shipped: BuildRecord) -> list[str]:
    """Where a rebuilt model is not what it should be, one sentence each; two courses meet at their common milestones.

    Equal kinds of machine must agree to the bit, others in the loss.
    """
    expected = {milestone.step: milestone for milestone in shipped.milestones}
    same_kind = rebuilt.machine == shipped.machine
    found: list[str] = []
    for milestone in rebuilt.milestones:
        other = expected.get(milestone.step)
        if other is None:
            continue
        if same_kind and milestone.weights_sha256 != other.weights_sha256:
            found.append(f"step {milestone.step}: the weights differ on the same kind of machine")
        if abs(milestone.loss - other.loss) > LOSS_TOLERANCE * other.loss:
            found.append(f"step {milestone.step}: loss {milestone.loss:.4f}, expected {other.loss:.4f}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Build, and compare where asked to; the exit status is 1 if the comparison fails."""
    parser = argparse.ArgumentParser(description="Rebuild an embedded model from a seed.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--moe", action="store_true", help="the mixture of experts instead of the dense model")
    parser.add_argument("--steps", type=int, default=FULL_STEPS, help=f"stop after so many steps of {FULL_STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="the shipped models have seed 0")
    parser.add_argument("--compare", type=Path, help="a shipped model that the result must equal")
    options = parser.parse_args(arguments)
    if not 1 <= options.steps <= FULL_STEPS:
        parser.error(f"--steps={options.steps} must lie between 1 and {FULL_STEPS}")
    rebuilt = build(options.output, options.moe, options.seed, options.steps)
    if options.compare is None:
        return 0
    shipped = read_record(options.compare)
    found = differences(rebuilt, shipped)
    kind = "the same kind of machine" if rebuilt.machine == shipped.machine else "another kind of machine"
    print("\n".join(found) or f"agrees with {options.compare}, built on {kind}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
