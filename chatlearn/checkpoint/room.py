"""How many bytes a checkpoint takes, and whether the disk has them: known before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chatlearn.checkpoint.durable import failures_named
from chatlearn.errors import CheckpointError

BYTES_PER_GB: Final = 10**9
BYTES_PER_MB: Final = 10**6
SHARD_BYTES: Final = 4  # Trained weights are float32.
HUGGING_FACE_BYTES: Final = 2  # The copy for others is bfloat16.


@dataclass(frozen=True)
class CheckpointSize:
    """The bytes of a checkpoint, by what they are for; the small files beside them are not counted."""

    weights: int
    moments: int
    hugging_face: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.moments + self.hugging_face

    def __str__(self) -> str:
        parts = {"weights": self.weights, "moments": self.moments, "Hugging Face copy": self.hugging_face}
        return f"{in_words(self.total)} (" + ", ".join(f"{what} {in_words(size)}" for what, size in parts.items()) + ")"


def checkpoint_size(num_parameters: int, num_trained: int, moment_bytes: int, saves_hf: bool) -> CheckpointSize:
    """Of a model with so many numbers, of which some are trained; AdamW keeps two moments of each trained one."""
    return CheckpointSize(
        weights=SHARD_BYTES * num_trained,
        moments=2 * moment_bytes * num_trained,
        hugging_face=HUGGING_FACE_BYTES * num_parameters if saves_hf else 0,
    )


def free_bytes(root: Path) -> int:
    """What this user may still write on the disk where ``root`` is, or will be made."""
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(root: Path, num_bytes: int) -> None:
    """Raise ``CheckpointError`` where ``num_bytes`` do not fit beside what lies below ``root``."""
    with failures_named(root):
        free = free_bytes(root)
    if free < num_bytes:
        raise CheckpointError(
            f"{root}: the next checkpoint needs {in_words(num_bytes)}, and {in_words(free)} are free; nothing of it "
            "was written. Make room on that disk, or keep fewer (runtime_args.keep_checkpoints)"
        )


def in_words(num_bytes: int) -> str:
    """A size as people say it.

    >>> in_words(1_500_000), in_words(131_000_000_000)
    ('1.5 MB', '131.00 GB')
    """
    return f"{num_bytes / BYTES_PER_GB:.2f} GB" if num_bytes >= BYTES_PER_GB else f"{num_bytes / BYTES_PER_MB:.1f} MB"
