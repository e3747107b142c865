"""Write a model directory that transformers and vLLM load: safetensors, configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from chatlearn.checkpoint.architecture import Shapes, stored_shapes
from chatlearn.checkpoint.documents import read_document, require_schema, texts
from chatlearn.checkpoint.durable import (
    discard_staging,
    failures_named,
    files_below,
    publish_folder,
    write_text,
)
from chatlearn.checkpoint.loaded_back import CONFIG_NAME, Written, require_loads
from chatlearn.checkpoint.room import free_bytes, in_words
from chatlearn.checkpoint.sole_staging import sole_staging
from chatlearn.checkpoint.weight_files import PlannedFile, WeightWriter, plan_files
from chatlearn.errors import CheckpointError, ConfigError

StoredDtype = Literal["bfloat16", "float32"]
DTYPES: dict[StoredDtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

MAX_FILE_BYTES = 5 * 10**9  # Hugging Face's usual size of one file

INDEX_NAME = "model.safetensors.index.json"
# Says that we wrote the folder and which files, so that a later conversion may replace exactly those.
MARKER_NAME = "chatlearn_conversion.json"
SCHEMA_VERSION = 1

WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"))
# The key of config.json that says how the base model's own weights are packed; the new ones are not.
QUANTIZATION = "quantization_config"
# The one folder of a model directory that belongs to its tokenizer.
TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class WrittenModel:
    """A published model directory: how many tensors, how many bytes of weights, in which files."""

    directory: Path
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]


def write_hugging_face(
    tensors: Iterable[tuple[str, Tensor]],
    base_dir: Path,
    save_dir: Path,
    dtype: StoredDtype = "bfloat16",
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    require_finite: bool = True,
) -> WrittenModel:
    """Write a stream of (Hugging Face name, whole tensor) as a model like ``base_dir``, published in one rename.

    Needs memory for one tensor. Every tensor that ``base_dir``'s configuration asks for must come exactly once, in its
    shape, with finite numbers; a head that is tied is left out. Raises ``CheckpointError`` otherwise and where there is
    no room, and ``ConfigError`` when ``save_dir`` holds something that is not an earlier conversion, or another process
    is writing there. ``require_finite=False`` is for keeping what is broken, to look into it later. What was written is
    loaded back before it gets its name.
    """
    save_dir = save_dir.resolve()
    _require_replaceable(save_dir)
    expected = stored_shapes(base_dir)
    plan = plan_files(expected, DTYPES[dtype], max_file_bytes)
    num_bytes = sum(len(file.header) + max(map(max, file.spans.values()), default=0) for file in plan)
    _require_room(save_dir, num_bytes)
    with failures_named(save_dir), sole_staging(save_dir) as staging:
        try:
            arriving = _checked(tensors, expected, DTYPES[dtype], require_finite=require_finite)
            with WeightWriter(staging, plan) as writer:
                for name, tensor in arriving:
                    writer.write(name, tensor)
            _require_all(writer.checksums, expected)
            _write_index(staging, plan)
            _write_companions(base_dir, staging, dtype)
            require_loads(staging, Written(plan, expected, DTYPES[dtype], writer.checksums), base_dir)
            _write_marker(staging)
            publish_folder(save_dir)
        finally:
            discard_staging(save_dir)  # Published it has gone; of what failed nothing should stay on the disk.
    return WrittenModel(save_dir, len(expected), num_bytes, tuple(file.name for file in plan))


def _require_replaceable(save_dir: Path) -> None:
    if not save_dir.exists():
        return
    if not save_dir.is_dir():
        raise ConfigError(f"{save_dir}: is a file; give a folder to write the model to")
    if save_dir.is_mount():
        raise ConfigError(
            f"{save_dir}: a disk is mounted there, so that no finished folder can take its place; give a folder on "
            f"that disk, such as {save_dir / 'NAME'}"
        )
    present = set(files_below(save_dir))
    if not present:
        return
    marker = save_dir / MARKER_NAME
    if not marker.is_file():
        raise ConfigError(
            f"{save_dir}: is not empty and not an earlier conversion; choose another folder or empty this one"
        )
    document = read_document(marker)
    require_schema(document, SCHEMA_VERSION, marker)
    foreign = sorted(present - set(texts(document, "files", marker)) - {MARKER_NAME})
    if foreign:
        raise ConfigError(
            f"{save_dir}: holds {foreign[0]}, which the earlier conversion did not write; move it away first"
        )


def _require_room(save_dir: Path, num_bytes: int) -> None:
    """The earlier conversion stays until the new one is complete, so both must have room."""
    free = free_bytes(save_dir)
    if free < num_bytes:
        raise CheckpointError(
            f"{save_dir}: the model needs {in_words(num_bytes)}, and {in_words(free)} are free on that disk; nothing "
            "of it was written. Make room there, or choose another disk"
        )


def _checked(
    tensors: Iterable[tuple[str, Tensor]], expected: Shapes, dtype: torch.dtype, *, require_finite: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream on the host in its final dtype, as long as every tensor is one we wait for."""
    waiting = dict(expected)
    for name, tensor in tensors:
        if name not in waiting:
            fault = "came twice" if name in expected else "is not a tensor of this model"
            raise CheckpointError(f"'{name}' {fault}; the checkpoint and the base model do not belong together")
        shape = waiting.pop(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"'{name}' has shape {tuple(tensor.shape)}; the base model's is {shape}")
        final = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if require_finite and not _is_finite(final):
            raise CheckpointError(f"'{name}' holds numbers that are not finite; this checkpoint cannot be used")
        yield name, final


def _is_finite(tensor: Tensor) -> bool:
    """Looks at the smallest and the largest number: one pass without copies, and both are NaN where one number is."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.view(-1).aminmax())


def _require_all(written: Mapping[str, int], expected: Shapes) -> None:
    missing = sorted(expected.keys() - written.keys())
    if missing:
        raise CheckpointError(f"{len(missing)} tensors of the model did not come, the first is '{missing[0]}'")


def _write_index(staging: Path, plan: tuple[PlannedFile, ...]) -> None:
    """Where there are several files, the index that finds a tensor; its size is that of all numbers."""
    if len(plan) == 1:
        return
    total = sum(end - begin for file in plan for begin, end in file.spans.values())
    weight_map = {tensor: file.name for file in plan for tensor in file.spans}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(staging / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _write_companions(base_dir: Path, staging: Path, dtype: StoredDtype) -> None:
    """Everything but the weights: all plain files of the base model, with the kind of the new weights declared."""
    for path in sorted(base_dir.iterdir()):
        if path.is_file() and _is_companion(path.name):
            shutil.copyfile(path, staging / path.name)
    if (base_dir / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(base_dir / TEMPLATE_FOLDER, staging / TEMPLATE_FOLDER)
    config = dict(read_document(base_dir / CONFIG_NAME))
    config.pop(QUANTIZATION, None)
    config["dtype"] = dtype
    if "torch_dtype" in config:  # the older name of the same key, which older readers prefer
        config["torch_dtype"] = dtype
    write_text(staging / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _is_companion(name: str) -> bool:
    weights = Path(name).suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")
    return not weights and not name.startswith(".") and name not in {CONFIG_NAME, MARKER_NAME}


def _write_marker(staging: Path) -> None:
    document = {"schema_version": SCHEMA_VERSION, "files": files_below(staging)}
    write_text(staging / MARKER_NAME, json.dumps(document, indent=1) + "\n")
