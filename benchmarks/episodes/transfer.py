"""Weights into an engine against a plain copy of the same bytes, in one process that prints JSON.

The model is of random weights and larger than the embedded one, whose transfer is too short to tell bytes from calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.episodes.work import MODEL, NUM_THREADS
from benchmarks.trainer import write_model
from chatlearn.rollout.engine import EngineSpec, build_engine
from chatlearn.rollout.prove import OneEngine
from chatlearn.weights.checkpoint_source import CheckpointSource
from chatlearn.weights.shared_memory import SharedMemorySender
from chatlearn.weights.wire import TensorMeta

SHAPE = "dense"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Moved:
    """The same bytes sent and copied; one number of seconds for each repetition."""

    num_bytes: int
    sent_s: list[float]
    copied_s: list[float]


class WeightsInMemory:
    """A ``WeightSource`` that has everything ready, so that nothing but the transfer is timed."""

    def __init__(self, metadata: Sequence[TensorMeta], pairs: Sequence[tuple[str, Tensor]]) -> None:
        self._metadata = list(metadata)
        self._pairs = tuple(pairs)

    def metadata(self) -> list[TensorMeta]:
        return self._metadata

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._pairs


def measure(folder: Path, repetitions: int) -> Moved:
    """Take turns: send, copy."""
    model = write_model(SHAPE, folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL / name, model)
    stored = CheckpointSource(model)
    source = WeightsInMemory(stored.metadata(), list(stored.export_weights()))
    cores = tuple(sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    engine = build_engine("vllm", EngineSpec(str(model), max_model_len=512, cpu_cores=cores, max_num_seqs=8))
    sender = SharedMemorySender(source, OneEngine(engine), rank=0)
    tensors = [tensor for _, tensor in source.export_weights()]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    sent: list[float] = []
    copied: list[float] = []
    for version in range(1 + repetitions):
        sent.append(sender.send(version).seconds)
        started = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        copied.append(time.perf_counter() - started)
    engine.close()
    return Moved(sum(tensor.nbytes for tensor in tensors), sent[1:], copied[1:])


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asdict(measure(Path(folder), options.repetitions))))


if __name__ == "__main__":
    main()
