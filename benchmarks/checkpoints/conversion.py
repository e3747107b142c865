"""The converter against a plain copy of the same bytes, and its memory against the model.

Two processes save a random Qwen3 as two ranks would. A process of its own converts it, after it has converted a tiny
model, so that interpreter and libraries are there: what it then holds is taken off its peak resident memory. Before
every conversion the same shards are copied, each file followed by fsync, as the converter does with what it writes.
Both find the shards in the page cache.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.checkpoints.part import Part

EMBEDDED = Path(__file__).parents[2] / "embedded" / "tiny_qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
NUM_RANKS = 2
ITERATION = 1
REPEATS = 3
LEAST_RATIO = 0.5  # of the copy's speed
MOST_BEYOND_A_FILE = 1e9  # bytes of memory above the largest file that is written

SIZES: dict[str, Any] = {
    "vocab_size": 64_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
TINY = SIZES | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Measured:
    """Seconds of one copy and of the conversion after it, and what the conversion held at its peak."""

    copy_s: float
    conversion_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint to convert."""

    base: Path
    checkpoints: Path

    @property
    def shards(self) -> list[Path]:
        """The files with the model's numbers."""
        return sorted((self.checkpoints / str(ITERATION) / "model").iterdir())

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(path.stat().st_size for path in self.shards)


def measure(folder: Path, *, tiny: bool) -> Part:
    """Write the checkpoint below ``folder``, convert it ``REPEATS`` times, tell what came out."""
    warm_up = save(folder / "tiny", TINY)
    saved = warm_up if tiny else save(folder / "whole", SIZES)
    measured = [once(folder, warm_up, saved) for _ in range(1 if tiny else REPEATS)]
    largest = max(path.stat().st_size for path in (folder / "converted").glob("*.safetensors"))
    ratio = statistics.median(one.copy_s / one.conversion_s for one in measured)
    peak = max(one.peak_bytes for one in measured)
    lines = (
        f"A random model of {saved.num_bytes / 1e9:.2f} GB (float32) in the shards of {NUM_RANKS} ranks; its largest "
        f"bfloat16 file has {largest / 1e9:.2f} GB. Median: {ratio:.2f} of the speed of a copy (bound: at least "
        f"{LEAST_RATIO}); peak memory {peak / 1e9:.2f} GB (bound: the largest file and 1 GB). {load()}",
        "",
        "| run | plain copy, s | conversion, s | copy / conversion | peak memory, GB | / model | / largest file |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(number, one, saved.num_bytes, largest) for number, one in enumerate(measured, 1)),
    )
    return Part("Conversion", lines, tiny or (ratio >= LEAST_RATIO and peak <= largest + MOST_BEYOND_A_FILE))


def load() -> str:
    """How busy the machine was with other things, which slows what computes more than what copies."""
    niceness = os.nice(0)
    priority = f", this ran before other work (niceness {niceness})" if niceness < 0 else ""
    return f"The machine's load average was {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores{priority}."


def row(number: int, one: Measured, model_bytes: int, largest: int) -> str:
    """One line of the table."""
    cells = [
        str(number),
        f"{one.copy_s:.2f}",
        f"{one.conversion_s:.2f}",
        f"{one.copy_s / one.conversion_s:.2f}",
        f"{one.peak_bytes / 1e9:.2f}",
        f"{one.peak_bytes / model_bytes:.2f}",
        f"{one.peak_bytes / largest:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def save(folder: Path, sizes: dict[str, Any]) -> Saved:
    """A random model as two ranks save it, published as checkpoints are."""
    from transformers import Qwen3Config

    from chatlearn.checkpoint.layout import MODEL_FOLDER, begin, publish
    from chatlearn.checkpoint.manifest import Manifest

    base, checkpoints = folder / "base", folder / "save_model" / "policy_trainer"
    Qwen3Config(**sizes, architectures=[ARCHITECTURE]).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EMBEDDED / name, base / name)
    staging = begin(checkpoints, ITERATION)
    context = multiprocessing.get_context("spawn")
    meeting = f"file://{folder.resolve()}/meeting"
    ranks = [
        context.Process(target=save_rank, args=(rank, meeting, base, staging / MODEL_FOLDER))
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0, "a rank could not save"
    publish(checkpoints, Manifest(ITERATION, 1, str(base), ARCHITECTURE, groupgemm=False, num_ranks=NUM_RANKS))
    return Saved(base, checkpoints)


def save_rank(rank: int, meeting: str, base: Path, folder: Path) -> None:
    """The life of a rank: random rows of every parameter, saved as FSDP's are."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from chatlearn.checkpoint.architecture import parameter_shapes

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    state = {
        name: DTensor.from_local(torch.randn(shape[0] // NUM_RANKS, *shape[1:]) * 0.02, mesh, [Shard(0)])
        for name, shape in parameter_shapes(base).items()
    }
    state_dict_saver.save(state, storage_writer=FileSystemWriter(folder))
    dist.destroy_process_group()


def once(folder: Path, warm_up: Saved, saved: Saved) -> Measured:
    """A copy in this process, then a conversion in one of its own; the last conversion stays."""
    copied, target = folder / "copied", folder / "converted"
    copied.mkdir()
    begun = time.perf_counter()
    for path in saved.shards:
        shutil.copyfile(path, copied / path.name)
        descriptor = os.open(copied / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    copy_s = time.perf_counter() - begun
    shutil.rmtree(copied)
    shutil.rmtree(target, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=convert_alone, args=(there, warm_up, saved, target))
    process.start()
    there.close()  # so that the death of the process is seen here
    conversion_s, peak_bytes = here.recv()
    process.join()
    return Measured(copy_s, conversion_s, peak_bytes)


def convert_alone(pipe: Connection, warm_up: Saved, saved: Saved, target: Path) -> None:
    """The life of the process that converts: the tiny model to have all libraries, then the one that is measured."""
    import torch

    from chatlearn.checkpoint.convert import convert

    torch.set_num_threads(1)
    convert(warm_up.base, warm_up.checkpoints, target, ITERATION, groupgemm=False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    begun = time.perf_counter()
    convert(saved.base, saved.checkpoints, target, ITERATION, groupgemm=False)
    pipe.send((time.perf_counter() - begun, resident("VmHWM") - before))


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0
