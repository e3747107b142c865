"""Where numbers go: the console, ``metrics.jsonl``, TensorBoard, Weights & Biases.

A sink is ``write(step, metrics)`` and ``close()``. To add one, write a class and a row in ``SINKS``. The packages of
the trackers are imported when they are chosen.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

from rich.console import Console
from rich.text import Text

from chatlearn.errors import MissingExtraError, RunError
from chatlearn.observability.episode_line import episode_lines
from chatlearn.observability.whole_file import replacing

SCHEMA_VERSION = 1
WANDB_ID_NAME: Final = "wandb_id.txt"


@dataclass(frozen=True)
class WandbSpec:
    """How a run is known at Weights & Biases; the fields are the ``wandb_*`` keys of ``log_args_dict``."""

    project: str | None
    directory: Path
    name: str | None
    run_id: str | None
    resume: str


@dataclass(frozen=True)
class JournalSpec:
    """What a journal needs to know of its run.

    ``resume_after`` is the last episode whose numbers stay; what an earlier process wrote after it is forgotten.
    ``None`` begins anew. A tracker that is ``None`` is not used. ``settings`` is the resolved configuration, which
    trackers show beside the curves.
    """

    directory: Path
    num_episodes: int
    resume_after: int | None = None
    save_rollouts: bool = True
    tensorboard_dir: Path | None = None
    wandb: WandbSpec | None = None
    settings: Mapping[str, object] = field(default_factory=dict[str, object])


class Sink(Protocol):
    """Takes the numbers of a step; steps never go backwards within a run. Raises ``RunError`` that names the sink."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """One line an episode on standard error."""

    def __init__(self, spec: JournalSpec, console: Console) -> None:
        self._num_episodes = spec.num_episodes
        self._console = console

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print what fits into the terminal; everything where the output is a file."""
        num_columns = self._console.width if self._console.is_terminal else sys.maxsize
        for line in episode_lines(step, self._num_episodes, metrics, num_columns):
            text = Text(line)
            text.highlight_regex(r"(?<![\w@])[-+]?\d[\d.,]*(e-?\d+)?%?(/\d+)?", "bold")
            text.highlight_regex(r"GRADER ERRORS \d+", "bold red")
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Nothing to give back."""


class JsonLinesSink:
    """``metrics.jsonl``: one JSON object a line, on the disk before ``write`` returns. Not-a-number becomes null."""

    def __init__(self, spec: JournalSpec, _console: Console) -> None:
        self._path = metrics_path(spec.directory)
        with blaming("jsonl", OSError):
            keep_until(self._path, spec.resume_after)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of ``step``."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": time.time(), "schema": SCHEMA_VERSION, **numbers})
        with blaming("jsonl", OSError, at=self._path):
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; everything is on the disk already, but for a line of which that was said."""
        with suppress(OSError):
            self._file.close()


class TensorBoardSink:
    """TensorBoard event files; points of an earlier process that will be written again are hidden."""

    def __init__(self, spec: JournalSpec, _console: Console) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        assert spec.tensorboard_dir is not None, "chosen without a folder"
        self._folder = spec.tensorboard_dir
        # A run that begins anew may find points too: of one that was killed before its first checkpoint.
        purge_step = 0 if spec.resume_after is None else spec.resume_after + 1
        with blaming("tensorboard", OSError):
            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per number, flushed so that a watching TensorBoard shows the episode at once."""
        with blaming("tensorboard", OSError, at=self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        with blaming("tensorboard", OSError):
            self._writer.close()


class WandbSink:
    """Weights & Biases; its own process keeps the numbers while the network is away."""

    def __init__(self, spec: JournalSpec, _console: Console) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise MissingExtraError("wandb", extra="wandb") from error
        assert spec.wandb is not None, "chosen without a specification"
        self._error = wandb.Error
        self._end_service = wandb.teardown
        # Any: wandb wants one of four words, which the configuration's schema has checked.
        resume: Any = spec.wandb.resume
        with blaming("wandb", self._error, OSError):
            spec.wandb.directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=spec.wandb.project,
                dir=spec.wandb.directory,
                name=spec.wandb.name,
                id=wandb_id(spec.directory, spec.wandb, resumed=spec.resume_after is not None),
                resume=resume,
                config=dict(spec.settings),
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the numbers over."""
        with blaming("wandb", self._error):
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Return when everything is handed over, or on the disk where wandb is offline."""
        with blaming("wandb", self._error):
            self._run.finish()
            self._end_service()  # finish() alone returns before an offline run's file is written


SinkFactory = Callable[[JournalSpec, Console], Sink]

SINKS: dict[str, SinkFactory] = {
    "console": ConsoleSink,
    "jsonl": JsonLinesSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def chosen_sinks(spec: JournalSpec) -> list[str]:
    """Names of the sinks that a run uses: console and file always, the trackers when asked for."""
    trackers = {"tensorboard": spec.tensorboard_dir, "wandb": spec.wandb}
    return ["console", "jsonl", *(name for name, asked in trackers.items() if asked is not None)]


def metrics_path(directory: Path) -> Path:
    """Where a run's numbers lie."""
    return directory / "metrics.jsonl"


def keep_until(path: Path, last_step: int | None) -> None:
    """Drop the lines of steps after ``last_step`` (``None``: all lines), and a last line that was cut by a crash.

    Raises ``RunError``, and changes nothing, where it meets a line that does not tell its step.
    """
    with replacing(path) as kept:
        if last_step is None or not path.exists():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and _required_step(path, number, line) <= last_step:
                    kept.write(line.decode())


def last_step(path: Path) -> int | None:
    """The last step that a file of metrics tells of; ``None`` where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return max((step for line in file if (step := _step_of(line)) is not None), default=None)


def _required_step(path: Path, number: int, line: bytes) -> int:
    step = _step_of(line)
    if step is None:
        raise RunError(
            f"{path}, line {number}: is not what a run writes, so that it cannot be told which lines come after the "
            "checkpoint; mend or remove the line, or move the file away: the curve then begins where the run goes on"
        )
    return step


def _step_of(line: bytes) -> int | None:
    try:
        found = json.loads(line)
    except ValueError:  # neither JSON nor, perhaps, text
        return None
    match found:
        case {"step": int(step)}:
            return step
        case _:
            return None


def wandb_id(directory: Path, spec: WandbSpec, *, resumed: bool) -> str | None:
    """Which run this is at Weights & Biases: what the user says, else what this output directory has been called.

    Without an identity every start would be a run of its own, with its piece of the curve. A run that begins anew gets
    another one, because the first number that was sent for a step stays.
    """
    if spec.run_id is not None or spec.resume != "allow":
        return spec.run_id
    path = directory / WANDB_ID_NAME
    if resumed and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    identity = uuid4().hex
    with replacing(path) as file:
        file.write(f"{identity}\n")
    return identity


@contextmanager
def blaming(sink: str, *errors: type[Exception], at: Path | None = None) -> Generator[None]:
    """Turn a sink's own errors into one that tells which sink it was, and where numbers of an episode are to go."""
    try:
        yield
    except errors as error:
        if at is None:
            raise RunError(f"the metrics sink '{sink}' failed: {error}") from error
        raise RunError(
            f"the metrics sink '{sink}' failed: {at}: {error}. No episode counts without its numbers on the disk, so "
            "the run ends here; make room there, and the same command goes on from the last checkpoint"
        ) from error
