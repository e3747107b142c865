"""The samples of one batch as a safetensors file: every stream end to end, and how much of it is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from chatlearn.errors import CheckpointError
from chatlearn.records import Sample

# Beside each stream: the entries that each sample has in it, in order; ABSENT where it has no such stream.
LENGTHS: Final = "lengths."
ABSENT: Final = -1

# Whether every sample must have the stream. The uid of the prompt is text and stays with the caller.
STREAMS: Final = {entry.name: entry.default is MISSING for entry in fields(Sample) if entry.name != "prompt_uid"}
# numpy's letters for the type of a stream; what is not named here is floating.
KINDS: Final = {"token_ids": "i", "loss_mask": "b", "routed_experts": "iu"}

Stream = NDArray[Any]  # by stream another type, which KINDS tells


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write all streams that the samples have."""
    tensors: dict[str, Stream] = {}
    for name in STREAMS:
        parts: list[Stream | None] = [vars(sample)[name] for sample in samples]
        present = [part for part in parts if part is not None]
        if present:
            tensors[name] = np.concatenate(present)
            tensors[LENGTHS + name] = np.array([ABSENT if part is None else len(part) for part in parts], np.int64)
    save_file(tensors, path)


def read_samples(path: Path, prompt_uids: Sequence[str]) -> tuple[Sample, ...]:
    """The samples that were written; ``CheckpointError`` where the file is not what ``write_samples`` makes."""
    try:
        tensors: dict[str, Stream] = load_file(path)
    except (OSError, SafetensorError, LookupError, ValueError) as error:  # the last two: a type that numpy lacks
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); the file is damaged") from None
    missing = sorted(name for name, required in STREAMS.items() if required and name not in tensors)
    strangers = sorted(name for name in tensors if name.removeprefix(LENGTHS) not in STREAMS)
    if missing or strangers or not prompt_uids:
        fault = f"'{strangers[0]}' is no stream of a sample" if strangers else "a stream or every sample is missing"
        raise CheckpointError(f"{path}: {fault}; the file is damaged or of another version")
    columns = {name: _parts(tensors, name, len(prompt_uids), path) for name in STREAMS if name in tensors}
    samples = tuple(
        Sample(prompt_uid=uid, **{name: parts[index] for name, parts in columns.items()})
        for index, uid in enumerate(prompt_uids)
    )
    for sample in samples:
        _require_aligned(sample, path)
    return samples


def _parts(tensors: dict[str, Stream], name: str, num_samples: int, path: Path) -> list[Any]:
    """One stream cut into the samples' parts, ``None`` where a sample has none."""
    whole, lengths = tensors[name], tensors.get(LENGTHS + name, np.zeros(0, np.int64))
    least = 1 if STREAMS[name] else ABSENT
    fits = lengths.dtype == np.int64 and lengths.shape == (num_samples,) and bool((lengths >= least).all())
    if not fits or whole.dtype.kind not in KINDS.get(name, "f") or len(whole) != int(lengths.clip(min=0).sum()):
        raise CheckpointError(
            f"{path}: '{name}', {whole.dtype} {whole.shape}, cannot be divided into {num_samples} samples; "
            "the file is damaged"
        )
    ends = np.cumsum(lengths.clip(min=0))
    return [
        None if length == ABSENT else whole[end - length : end]
        for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)
    ]


def _require_aligned(sample: Sample, path: Path) -> None:
    """Every stream has one entry per token, but for the experts: an engine reports those of the first tokens only."""
    num_tokens = len(sample.token_ids)
    for name in STREAMS:
        stream: Stream | None = vars(sample)[name]
        if stream is None:
            continue
        if len(stream) > num_tokens or (len(stream) < num_tokens and name != "routed_experts"):
            raise CheckpointError(
                f"{path}: '{name}' has {len(stream)} entries for {num_tokens} tokens; the file is damaged"
            )
