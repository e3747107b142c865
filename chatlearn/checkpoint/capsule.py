"""A capsule: all that one optimizer step consumed, in a folder that any machine can run again.

``output_dir/capsules/`` (here: the root) holds one folder per recorded step::

    iteration_000003/capsule.json         facts, versions, and every file with its checksum; written last
    iteration_000003/config.yaml          the run's resolved configuration; may be edited by hand
    iteration_000003/samples.safetensors  the streams of the step's samples, end to end
    iteration_000003/model/               the weights before the step, float32, a Hugging Face model directory
    iteration_000003/adapter.safetensors  only with LoRA: the adapter, apart from the model, which is its base
    iteration_000003/random/rank_0.pt     random states of each rank

Writing is ``begin_capsule`` on the driver, ``write_weights`` and ``sharded.save_random_states`` on the ranks, and
``publish_capsule`` on the driver: the folder gets its name in one rename. The optimizer's moments are not in it:
neither loss nor gradient depends on them, and they are twice as large as the weights. Nothing in a capsule is pickled
but random states, which load weights-only.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatlearn.checkpoint.documents import inner, integer, objects, read_document, require_schema, text, texts
from chatlearn.checkpoint.durable import (
    STAGING_PREFIX,
    discard_staging,
    failures_named,
    files_below,
    open_staging,
    publish_folder,
    staging_of,
    write_text,
)
from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.checkpoint.layout import RANDOM_FOLDER
from chatlearn.checkpoint.manifest import FileRecord, record_file, verify_checksums
from chatlearn.checkpoint.sample_file import read_samples, write_samples
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.observability.manifest import package_versions
from chatlearn.records import Sample, StepStats

CAPSULES_FOLDER: Final = "capsules"
CAPSULE_NAME: Final = "capsule.json"
CONFIG_NAME: Final = "config.yaml"
SAMPLES_NAME: Final = "samples.safetensors"
ADAPTER_NAME: Final = "adapter.safetensors"
MODEL_FOLDER: Final = "model"
SCHEMA_VERSION: Final = 1

# What can change loss or gradient of a step. A replay on other versions is told so.
PACKAGES: Final = ("chatlearn", "torch", "transformers", "safetensors", "numpy", "peft")

Reason = Literal["interval", "bad step"]
BAD_STEP: Final[Reason] = "bad step"
INTERVAL: Final[Reason] = "interval"

_NAME: Final = re.compile(r"iteration_\d{6,}", re.ASCII)


@dataclass(frozen=True)
class CapsuleFacts:
    """Which step it was, why it was kept, how many ranks took it, and what it reported, if that is known."""

    iteration: int
    episode: int
    reason: Reason
    num_ranks: int
    stats: StepStats | None = None


@dataclass(frozen=True, eq=False)
class Capsule:
    """A published capsule. ``stats`` and ``versions`` are as they were recorded, for people to read."""

    directory: Path
    iteration: int
    episode: int
    reason: str
    num_ranks: int
    stats: Mapping[str, object]
    versions: Mapping[str, object]
    files: tuple[FileRecord, ...]
    samples: tuple[Sample, ...]

    @property
    def model_dir(self) -> Path:
        """The weights before the step."""
        return self.directory / MODEL_FOLDER

    @property
    def adapter_file(self) -> Path | None:
        """The adapter before the step, if there was one."""
        return self.directory / ADAPTER_NAME if ADAPTER_NAME in {record.name for record in self.files} else None

    @property
    def config_file(self) -> Path:
        """The configuration of the run."""
        return self.directory / CONFIG_NAME


def capsule_folder(root: Path, iteration: int) -> Path:
    """The folder of one training iteration, whether or not it exists."""
    return root / f"iteration_{iteration:06d}"


def begin_capsule(root: Path, iteration: int) -> Path:
    """Make the staging folder of a capsule; the ranks write into what is returned.

    What a killed process had begun goes: there is one at a time.
    """
    folder = capsule_folder(root, iteration)
    with failures_named(folder):
        for begun in root.glob(f"{STAGING_PREFIX}iteration_*"):
            discard_staging(root / begun.name.removeprefix(STAGING_PREFIX))
        return open_staging(folder)


def discard_capsule(root: Path, iteration: int) -> None:
    """Give up a capsule that was begun and cannot be finished, so that it takes no room."""
    with suppress(OSError):  # On a disk that can only be read it stays; the next one of that step clears it.
        discard_staging(capsule_folder(root, iteration))


def write_weights(
    staging: Path, base: Iterable[tuple[str, Tensor]], adapter: Iterable[tuple[str, Tensor]], base_dir: Path
) -> None:
    """Write the weights, whole and float32: those of the model without its adapter, and the adapter if it has one.

    One rank calls this and the others ``walk`` both streams, in this order: to gather is a collective. ``base_dir`` is
    a model directory of the same architecture, whose configuration and tokenizer are copied. Weights need not be
    finite.
    """
    write_hugging_face(base, base_dir, staging / MODEL_FOLDER, "float32", require_finite=False)
    factors = {name: factor.contiguous() for name, factor in adapter}
    if factors:
        with failures_named(staging):
            save_file(factors, staging / ADAPTER_NAME)


def fault_of(write: Callable[[], None], *streams: Iterable[object]) -> str | None:
    """Why ``write`` could not write, if so; what it left of the ``streams``, this rank walks all the same.

    Returned and not raised: a rank that leaves would keep the others waiting for what they gather together.
    """
    fault = None
    try:
        write()
    except CheckpointError as error:
        fault = str(error)
    walk(*streams)
    return fault


def walk(*streams: Iterable[object]) -> None:
    """Take part in gathering what another rank writes."""
    for stream in streams:
        for _ in stream:
            pass


def read_adapter(file: Path) -> dict[str, Tensor]:
    """The adapter that was written, by name; ``CheckpointError`` where the file is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); the capsule is damaged") from None


def publish_capsule(root: Path, facts: CapsuleFacts, samples: Sequence[Sample], config_text: str) -> Path:
    """Add what the driver knows, and let the folder appear; returns it. One of the same iteration is replaced."""
    folder = capsule_folder(root, facts.iteration)
    staging = staging_of(folder)
    with failures_named(folder):
        write_samples(staging / SAMPLES_NAME, samples)
        records = [record_file(staging, name) for name in files_below(staging)]
        write_text(staging / CONFIG_NAME, config_text)
        document = {
            "schema_version": SCHEMA_VERSION,
            "iteration": facts.iteration,
            "episode": facts.episode,
            "reason": facts.reason,
            "num_ranks": facts.num_ranks,
            "num_samples": len(samples),
            "num_loss_tokens": sum(int(sample.loss_mask[1:].sum()) for sample in samples),
            "stats": {} if facts.stats is None else readable_numbers(vars(facts.stats)),
            "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
            "prompt_uids": [sample.prompt_uid for sample in samples],
            "files": [asdict(record) for record in records],
        }
        write_text(staging / CAPSULE_NAME, json.dumps(document, indent=1, allow_nan=False) + "\n")
        publish_folder(folder)
    return folder


def prune(root: Path, iteration: int, keep: int) -> None:
    """Delete all capsules of the interval but the newest ``keep`` (0 keeps all); those of bad steps stay.

    What is called as a step after ``iteration``, the last one taken, is of an earlier life of the run: the oldest.
    """
    recorded = [folder for folder in numbered(root) if _reason(folder) == INTERVAL]
    by_age = sorted(recorded, key=lambda folder: (_iteration(folder) <= iteration, _iteration(folder)))
    for folder in by_age[:-keep] if keep > 0 else ():
        folder.rename(staging_of(folder))  # A capsule is there whole or not at all.
        discard_staging(folder)


def numbered(root: Path) -> list[Path]:
    """Every folder below ``root`` that is called as a capsule is; a link is somebody else's."""
    return [path for path in root.glob("iteration_*") if _NAME.fullmatch(path.name) and not path.is_symlink()]


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration_"))


def _reason(folder: Path) -> object:
    """Why it was kept; a folder that does not say so is left to people."""
    path = folder / CAPSULE_NAME
    try:
        return read_document(path).get("reason") if path.is_file() else None
    except CheckpointError:
        return None


def read_capsule(directory: Path) -> Capsule:
    """Read a capsule, after checking that every file is there in full length; weights are not read yet.

    Raises ``ConfigError`` for a folder that is no capsule, and ``CheckpointError`` for an incomplete or damaged one.
    """
    path = directory / CAPSULE_NAME
    if not path.is_file():
        raise ConfigError(
            f"{directory}: {_no_capsule(directory)}; give a folder such as "
            f"output/{CAPSULES_FOLDER}/iteration_000001 of a run"
        )
    document = read_document(path)
    require_schema(document, SCHEMA_VERSION, path)
    files = tuple(
        FileRecord(text(entry, "name", path), integer(entry, "num_bytes", path), text(entry, "crc32", path))
        for entry in objects(document, "files", path)
    )
    num_ranks = integer(document, "num_ranks", path)
    random_files = [f"{RANDOM_FOLDER}/rank_{rank}.pt" for rank in range(num_ranks)]
    _require_files(directory, files, [SAMPLES_NAME, f"{MODEL_FOLDER}/config.json", *random_files])
    return Capsule(
        directory=directory,
        iteration=integer(document, "iteration", path),
        episode=integer(document, "episode", path),
        reason=text(document, "reason", path),
        num_ranks=num_ranks,
        stats=inner(document, "stats", path),
        versions=inner(document, "versions", path),
        files=files,
        samples=read_samples(directory / SAMPLES_NAME, texts(document, "prompt_uids", path)),
    )


def verify_capsule(capsule: Capsule) -> None:
    """Compare every byte with its checksum; raises ``CheckpointError`` that names the damaged file."""
    verify_checksums(capsule.directory, capsule.files)


def changed_versions(capsule: Capsule) -> list[str]:
    """Packages whose version is not that of the recorded step, one line each."""
    today: dict[str, object] = {"python": platform.python_version(), **package_versions(PACKAGES)}
    return [
        f"{name}: {then} then, {today.get(name, 'absent')} now"
        for name, then in capsule.versions.items()
        if then != today.get(name)
    ]


def readable_numbers(numbers: Mapping[str, object]) -> dict[str, object]:
    """JSON knows neither infinity nor NaN: those become the texts ``"inf"``, ``"-inf"`` and ``"nan"``."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }


def _no_capsule(directory: Path) -> str:
    """What somebody gave instead of a capsule."""
    if not directory.exists():
        return "does not exist"
    return f"is no capsule, {CAPSULE_NAME} is missing" if directory.is_dir() else "is a file"


def _require_files(directory: Path, records: Sequence[FileRecord], needed: Sequence[str]) -> None:
    """Only names that a walk through the folder finds are ever opened: no record can lead out of it."""
    present, recorded = set(files_below(directory)), {record.name for record in records}
    for name in needed:
        if name not in recorded:
            raise CheckpointError(f"{directory}: {CAPSULE_NAME} does not list {name}; the capsule is damaged")
    for name in (CONFIG_NAME, *sorted(recorded)):
        if name not in present:
            raise CheckpointError(f"{directory}: {name} is missing; the capsule is incomplete")
    for record in records:
        size = (directory / record.name).stat().st_size
        if size != record.num_bytes:
            raise CheckpointError(
                f"{directory}: {record.name} has {size} bytes instead of {record.num_bytes}; the capsule is damaged"
            )
