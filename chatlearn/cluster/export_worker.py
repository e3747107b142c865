"""The shell around what turns a checkpoint's shards into a Hugging Face directory.

It is a process of its own, because transformers sets things that hold for a whole process, and because it may need
memory for a large tensor: neither shall happen to a rank that trains.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from chatlearn.cluster.seat import Arrival, Seat, arrive, take_seat

if TYPE_CHECKING:
    from pathlib import Path

    from chatlearn.checkpoint.adapters import AdapterRecord
    from chatlearn.checkpoint.manifest import FileRecord


class ExportWorker:
    """Exports one checkpoint at a time."""

    def __init__(self, seat: Seat) -> None:
        take_seat(seat)

    def arrive(self) -> Arrival:
        """Tell where this process is."""
        return arrive()

    def prepare(self) -> None:
        """Load the libraries, so that the first checkpoint need not wait for that."""
        import_module("chatlearn.checkpoint.convert")

    def export(self, folder: Path, base_dir: Path, adapter: AdapterRecord | None) -> tuple[FileRecord, ...]:
        """Write ``folder/huggingface`` from the shards in ``folder``; returns its files."""
        from chatlearn.checkpoint.convert import export
        from chatlearn.checkpoint.durable import files_below
        from chatlearn.checkpoint.manifest import HUGGING_FACE_FOLDER, record_file

        save_dir = folder / HUGGING_FACE_FOLDER
        export(folder, base_dir, save_dir, adapter)
        return tuple(record_file(folder, f"{HUGGING_FACE_FOLDER}/{name}") for name in files_below(save_dir))

    def close(self) -> None:
        """Nothing to give back."""
