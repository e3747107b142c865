"""Write a model directory that transformers and vLLM load: safetensors, configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chatlearn.checkpoint.architecture import Shapes, stored_shapes
from chatlearn.checkpoint.documents import read_document, require_schema
from chatlearn.checkpoint.durable import failures_named, files_below, open_staging, publish_folder, write_text
from chatlearn.errors import CheckpointError, ConfigError

StoredDtype = Literal["bfloat16", "float32"]
DTYPES: dict[StoredDtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

MAX_FILE_BYTES = 5 * 10**9  # Hugging Face's usual size of one file
FINITE_BLOCK = 1 << 20  # numbers looked at together: the check makes copies several times that size

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Says that we wrote the folder and which files, so that a later conversion may replace exactly those.
MARKER_NAME = "chatlearn_conversion.json"
SCHEMA_VERSION = 1

WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"))
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

    Needs memory for one output file. Every tensor that ``base_dir``'s configuration asks for must come exactly once,
    in its shape, with finite numbers; a head that is tied is left out. Raises ``CheckpointError`` otherwise and
    ``ConfigError`` when ``save_dir`` holds something that is not an earlier conversion. ``require_finite=False`` is for
    keeping what is broken, to look into it later.
    """
    save_dir = save_dir.resolve()
    _require_replaceable(save_dir)
    expected = stored_shapes(base_dir)
    with failures_named(save_dir):
        staging = open_staging(save_dir)
        arriving = _checked(tensors, expected, DTYPES[dtype], require_finite=require_finite)
        files = _write_files(arriving, staging, max_file_bytes)
        _require_all(files, expected)
        weights = _number_files(staging, files)
        num_bytes = sum((staging / name).stat().st_size for name in weights)
        _write_companions(base_dir, staging, dtype)
        _verify_written(staging, weights, expected, DTYPES[dtype])
        _write_marker(staging)
        publish_folder(save_dir)
    return WrittenModel(save_dir, len(expected), num_bytes, tuple(weights))


def _require_replaceable(save_dir: Path) -> None:
    if not save_dir.exists():
        return
    if not save_dir.is_dir():
        raise ConfigError(f"{save_dir}: is a file; give a folder to write the model to")
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
    match document:
        case {"files": [*names]}:
            foreign = sorted(present - set(names) - {MARKER_NAME})
        case _:
            raise CheckpointError(f"{marker}: 'files' is missing; the file is damaged")
    if foreign:
        raise ConfigError(
            f"{save_dir}: holds {foreign[0]}, which the earlier conversion did not write; move it away first"
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
        if require_finite and not all(bool(block.isfinite().all()) for block in final.view(-1).split(FINITE_BLOCK)):
            raise CheckpointError(f"'{name}' holds numbers that are not finite; this checkpoint cannot be used")
        yield name, final


def _write_files(tensors: Iterator[tuple[str, Tensor]], staging: Path, max_file_bytes: int) -> list[list[str]]:
    """Fill files in order of arrival; returns the names of the tensors in each."""
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        save_file(pending, staging / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_file_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
    flush()
    return files


def _require_all(files: list[list[str]], expected: Shapes) -> None:
    missing = sorted(set(expected).difference(*files))
    if missing:
        raise CheckpointError(f"{len(missing)} tensors of the model did not come, the first is '{missing[0]}'")


def _number_files(staging: Path, files: list[list[str]]) -> dict[str, list[str]]:
    """Give the files their usual names and, where there are several, write the index that finds a tensor."""
    if len(files) == 1:
        (staging / "0.safetensors").rename(staging / SINGLE_NAME)
        return {SINGLE_NAME: files[0]}
    named = {f"model-{number:05d}-of-{len(files):05d}.safetensors": names for number, names in enumerate(files, 1)}
    for number, name in enumerate(named):
        (staging / f"{number}.safetensors").rename(staging / name)
    total = sum((staging / name).stat().st_size for name in named)
    weight_map = {tensor: name for name, names in named.items() for tensor in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(staging / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return named


def _write_companions(base_dir: Path, staging: Path, dtype: StoredDtype) -> None:
    """Everything but the weights: all plain files of the base model, with the dtype of the new weights declared."""
    for path in sorted(base_dir.iterdir()):
        if path.is_file() and _is_companion(path.name):
            shutil.copyfile(path, staging / path.name)
    if (base_dir / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(base_dir / TEMPLATE_FOLDER, staging / TEMPLATE_FOLDER)
    config = dict(read_document(base_dir / CONFIG_NAME))
    config["dtype"] = dtype
    if "torch_dtype" in config:  # the older name of the same key, which older readers prefer
        config["torch_dtype"] = dtype
    write_text(staging / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _is_companion(name: str) -> bool:
    weights = Path(name).suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")
    return not weights and not name.startswith(".") and name not in {CONFIG_NAME, MARKER_NAME}


def _verify_written(staging: Path, files: dict[str, list[str]], expected: Shapes, dtype: torch.dtype) -> None:
    """Read the headers back: names, shapes and dtype as they should be in every file."""
    for file, names in files.items():
        with safe_open(staging / file, framework="pt", device="cpu") as reader:
            if set(reader.keys()) != set(names):
                raise CheckpointError(f"{staging / file}: does not hold the tensors that were written to it")
            for name in names:
                stored = reader.get_slice(name)
                if tuple(stored.get_shape()) != expected[name] or stored.get_dtype() != _SAFETENSORS_NAME[dtype]:
                    raise CheckpointError(f"{staging / file}: '{name}' was not written as it should be")


_SAFETENSORS_NAME = {torch.bfloat16: "BF16", torch.float32: "F32"}


def _write_marker(staging: Path) -> None:
    document = {"schema_version": SCHEMA_VERSION, "files": files_below(staging)}
    write_text(staging / MARKER_NAME, json.dumps(document, indent=1) + "\n")
