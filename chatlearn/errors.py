"""The errors a user can meet. Each message says what, where, what was found, and what to do."""

from __future__ import annotations

from pathlib import Path


class ChatLearnError(Exception):
    """Anything that ChatLearn reports to a person as one readable message instead of a traceback."""


class ConfigError(ChatLearnError):
    """The command or the configuration is wrong; nothing was started (exit status 2).

    ``problems`` lists every fault that was found, one sentence each, so that one run shows them all.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return type(self), self.problems


class DataError(ConfigError):
    """A data file or model directory cannot be used; the message names the file and, where there is one, the row."""


class MissingExtraError(ConfigError):
    """An optional package is needed and absent.

    >>> raise MissingExtraError("wandb", extra="wandb")
    Traceback (most recent call last):
    chatlearn.errors.MissingExtraError: 'wandb' is not installed; run: pip install 'chatlearn[wandb]'
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"'{package}' is not installed; run: pip install 'chatlearn[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, ...]]:
        return type(self), (self.package, self.extra)


class RunError(ChatLearnError):
    """The run itself failed (exit status 1)."""


class WorkerError(RunError):
    """A process of the run failed or died; says which role and rank, on which host, and what it reported."""

    def __init__(self, role: str, rank: int, host: str, cause: str) -> None:
        self.role = role
        self.rank = rank
        self.host = host
        self.cause = cause
        super().__init__(f"{role} rank {rank} on {host} failed: {cause}")

    def __reduce__(self) -> tuple[type[WorkerError], tuple[str, int, str, str]]:
        return type(self), (self.role, self.rank, self.host, self.cause)


class EngineFaultError(RunError):
    """An engine returned what cannot be an answer; another one, newly started, may do better."""


class WeightTransferError(RunError):
    """Weights did not arrive as they were sent: a name is missing, unknown or mis-shaped."""


class CheckpointError(RunError):
    """A checkpoint is missing, incomplete or damaged; the message names the folder and what is wrong with it."""


class UnreadableError(CheckpointError):
    """The system cannot read what lies there now, which says nothing about what was saved: it is no damage."""


class DamagedCheckpointError(CheckpointError):
    """What lies in ``folder`` is not what was saved there; an earlier checkpoint may do."""

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder = folder
        self.reason = reason
        super().__init__(reason)

    def __reduce__(self) -> tuple[type[DamagedCheckpointError], tuple[Path, str]]:
        return type(self), (self.folder, self.reason)
