"""The other sides of the comparison, each measured in a process of its own that is started here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.episodes.transfer import Moved
from benchmarks.episodes.work import MODEL, NUM_THREADS, ROOT, Lengths
from chatlearn import device
from chatlearn.rollout.engine import EngineSpec
from chatlearn.rollout.environment import engine_environment

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Others:
    """How the other sides are measured: where the questions are, and how often each is asked.

    ``trl`` is the folder that TRL is installed in, if it is to be measured.
    """

    questions: Path
    repetitions: int
    trl: Path | None

    def generation(self, lengths: Lengths, num_threads: int) -> list[float]:
        """Seconds of ``vllm.LLM.generate``, in the environment of an engine of ours with so many cores."""
        cores = tuple(sorted(os.sched_getaffinity(0))[:num_threads])
        spec = EngineSpec(str(MODEL), max_model_len=lengths.limit, cpu_cores=cores)
        environment = device.worker_environment("cpu", num_threads) | engine_environment(spec)
        return _ask("bare.py", ["generate", *self._work(lengths), *self._answers(lengths)], environment)

    def training(self, lengths: Lengths) -> list[float]:
        """Seconds of a step of transformers and AdamW on what ``generation`` left."""
        environment = device.worker_environment("cpu", NUM_THREADS)
        return _ask("bare.py", ["train", *self._work(lengths), *self._answers(lengths)], environment)

    def peer(self, lengths: Lengths) -> list[float]:
        """Seconds of a step of TRL.

        Its threads spin while they wait, as is torch's default: one process on a quiet machine is twice as fast so.
        """
        assert self.trl is not None, "asked only where TRL is there"
        environment = {
            "OMP_NUM_THREADS": str(NUM_THREADS),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(self.trl), str(ROOT)]),
        }
        return _ask("peer.py", self._work(lengths), environment)

    def transfer(self) -> Moved:
        """Weights into an engine, and a copy of them."""
        cores = tuple(sorted(os.sched_getaffinity(0))[:NUM_THREADS])
        spec = EngineSpec(str(MODEL), max_model_len=512, cpu_cores=cores)
        environment = device.worker_environment("cpu", NUM_THREADS) | engine_environment(spec)
        return Moved(**_ask("transfer.py", [], environment))

    def _work(self, lengths: Lengths) -> list[str]:
        repetitions = str(self.repetitions)
        return ["--questions", str(self.questions), "--lengths", lengths.name, "--repetitions", repetitions]

    def _answers(self, lengths: Lengths) -> list[str]:
        return ["--answers", str(self.questions.with_name(f"answers_{lengths.name}.json"))]


def _ask(program: str, words: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Start a program; its last line is JSON."""
    command = [sys.executable, str(FOLDER / program), *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
