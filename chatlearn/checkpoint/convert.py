"""A sharded checkpoint -> a Hugging Face model directory, in one process, with the memory of one output file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from chatlearn.checkpoint.adapters import AdapterRecord, base_digest
from chatlearn.checkpoint.architecture import Shapes, parameter_shapes
from chatlearn.checkpoint.documents import read_document, text
from chatlearn.checkpoint.hugging_face import DTYPES, StoredDtype, WrittenModel, write_hugging_face
from chatlearn.checkpoint.layout import MODEL_FOLDER, checkpoint_folder, list_complete
from chatlearn.checkpoint.manifest import Manifest, verify_checksums, verify_sizes
from chatlearn.checkpoint.saved_tensors import SavedTensors
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.family import family_of
from chatlearn.models.lora import Factors, merged
from chatlearn.models.naming import ModelFamily
from chatlearn.models.stored_weights import StoredWeights

RUN_MANIFEST_NAME = "manifest.json"

Progress = Callable[[int, int], None]  # weights (numbers) converted so far, and in the whole model


def no_progress(done: int, total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class ConversionReport:
    """What was converted: ``base_dir`` gave configuration and tokenizer; ``notes`` are sentences a user should see."""

    save_dir: Path
    base_dir: Path
    iteration: int
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    hf_dir: Path,
    ckpt_dir: Path,
    save_dir: Path,
    iteration: int,
    groupgemm: bool,
    dtype: StoredDtype = "bfloat16",
    progress: Progress = no_progress,
) -> ConversionReport:
    """Convert ``ckpt_dir/iteration`` into ``save_dir``; arguments are those of the documented command.

    ``hf_dir`` is the base model; where it does not exist, the one that the run's manifest names is used and noted. An
    adapter is merged into its weights.
    Raises ``ConfigError`` for arguments that do not fit and ``CheckpointError`` for a checkpoint that is missing,
    incomplete or damaged. ``save_dir`` keeps what it holds until the new model is complete.
    """
    folder = _checkpoint(ckpt_dir, iteration)
    manifest = verify_sizes(folder)
    base_dir, notes = _base_model(hf_dir, ckpt_dir, manifest)
    family = _family(base_dir, manifest)
    notes += _groupgemm_notes(family, manifest, groupgemm)
    verify_checksums(folder, [record for record in manifest.files if record.name.startswith(f"{MODEL_FOLDER}/")])
    if manifest.adapter is not None:
        _require_base(base_dir, manifest, manifest.adapter)
    written = export(folder, base_dir, save_dir, manifest.adapter, dtype, progress)
    return ConversionReport(
        written.directory, base_dir, iteration, written.num_tensors, written.num_bytes, written.files, notes
    )


def export(
    folder: Path,
    base_dir: Path,
    save_dir: Path,
    adapter: AdapterRecord | None = None,
    dtype: StoredDtype = "bfloat16",
    progress: Progress = no_progress,
) -> WrittenModel:
    """Write the shards in ``folder/model`` as the model directory ``save_dir``, with what else ``base_dir`` has in it.

    Asks for no manifest and compares no checksums: the folder may be a checkpoint that is still being made, and
    ``save_dir`` may lie in it. ``adapter`` describes what the shards hold where that is not the whole model; it must
    have been trained on ``base_dir``. Opens no process group, but transformers and torch keep settings of the whole
    process, so beside training it belongs in a process of its own.
    Raises ``CheckpointError`` for shards that are damaged or of another model, and ``ConfigError`` where ``save_dir``
    holds something that is not an earlier conversion.
    """
    shapes = parameter_shapes(base_dir)
    family = family_of(base_dir)
    tensors = SavedTensors(folder / MODEL_FOLDER)
    if adapter is None:
        _require_shapes(folder, tensors.shapes, shapes)
        stream = _stored(tensors, shapes, family, dtype, progress)
    else:
        _require_shapes(folder, tensors.shapes, _factor_shapes(folder, tensors.shapes, shapes, adapter))
        stream = _merged(tensors, shapes, family, dtype, progress, adapter, base_dir)
    return write_hugging_face(stream, base_dir, save_dir, dtype)


def _checkpoint(ckpt_dir: Path, iteration: int) -> Path:
    if not ckpt_dir.is_dir():
        raise CheckpointError(f"{ckpt_dir}: no such folder; give the run's save_model/policy_trainer")
    folder = checkpoint_folder(ckpt_dir, iteration)
    if not folder.is_dir():
        present = ", ".join(path.name for path in list_complete(ckpt_dir)) or "none"
        raise CheckpointError(f"{ckpt_dir}: no checkpoint of iteration {iteration}; complete ones: {present}")
    return folder


def _base_model(hf_dir: Path, ckpt_dir: Path, manifest: Manifest) -> tuple[Path, tuple[str, ...]]:
    if hf_dir.is_dir():
        return hf_dir, ()
    candidates = [manifest.base_model]
    run_manifest = ckpt_dir.resolve().parent.parent / RUN_MANIFEST_NAME
    if run_manifest.is_file():
        candidates.append(text(read_document(run_manifest), "model_path", run_manifest))
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate), (f"{hf_dir} does not exist; taking the run's base model {candidate} instead",)
    raise ConfigError(
        f"--hf_dir {hf_dir}: no such folder, and the base model of this run is not at "
        f"{' or '.join(candidates)} either; give the folder of the model that training started from"
    )


def _family(base_dir: Path, manifest: Manifest) -> ModelFamily:
    family = family_of(base_dir)
    if family.architecture != manifest.architecture:
        raise ConfigError(
            f"--hf_dir {base_dir}: is a {family.architecture}, but the checkpoint holds a {manifest.architecture}; "
            "give the model that training started from"
        )
    return family


def _groupgemm_notes(family: ModelFamily, manifest: Manifest, groupgemm: bool) -> tuple[str, ...]:
    if family.experts is None:
        if groupgemm:
            raise ConfigError(f"--groupgemm 1 is for mixtures of experts; {family.architecture} is dense: use 0")
        return ()
    if groupgemm == manifest.groupgemm:
        return ()
    return (
        f"--groupgemm {int(groupgemm)} although training ran with {int(manifest.groupgemm)}; "
        "experts are stored alike either way, so the result is the same",
    )


def _require_shapes(folder: Path, found: Shapes, wanted: Shapes) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{folder}: has no '{name}', which the base model's configuration asks for")
        if found[name] != shape:
            raise CheckpointError(f"{folder}: '{name}' has shape {found[name]}; the base model's is {shape}")


def _stored(
    tensors: SavedTensors, shapes: Shapes, family: ModelFamily, dtype: StoredDtype, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its stored names, read only when the writer asks for it."""
    total = sum(prod(shape) for shape in shapes.values())
    done = 0
    for name, shape in shapes.items():
        yield from family.export(name, tensors.read(name, DTYPES[dtype]))
        done += prod(shape)
        progress(done, total)


def _require_base(base_dir: Path, manifest: Manifest, adapter: AdapterRecord) -> None:
    if base_digest(base_dir) != adapter.base_digest:
        raise ConfigError(
            f"--hf_dir {base_dir}: its weights are not those that the adapter in the checkpoint was trained on (they "
            f"were in {manifest.base_model}); give that model"
        )


def _factor_shapes(folder: Path, found: Shapes, weights: Shapes, adapter: AdapterRecord) -> Shapes:
    """What the factors of every adapted weight must be; raises when the checkpoint holds anything else."""
    wanted: Shapes = {}
    for name, shape in weights.items():
        factors = Factors.of(name)
        if factors.a in found:
            wanted |= {factors.a: (adapter.lora.rank, shape[1]), factors.b: (shape[0], adapter.lora.rank)}
    strangers = sorted(found.keys() - wanted.keys())
    if strangers:
        raise CheckpointError(f"{folder}: '{strangers[0]}' belongs to no weight of the base model")
    return wanted


def _merged(
    tensors: SavedTensors, shapes: Shapes, family: ModelFamily, dtype: StoredDtype, progress: Progress,
    adapter: AdapterRecord, base_dir: Path,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The base's weights, one stored tensor at a time, each with its part of the adapter."""
    total = sum(prod(shape) for shape in shapes.values())
    done = 0
    with StoredWeights(base_dir) as base:
        for name, shape in shapes.items():
            factors = Factors.of(name)
            if factors.a in tensors.shapes:
                a, b = tensors.read(factors.a, torch.float32), tensors.read(factors.b, torch.float32)
                yield name, merged(base.whole(name), a, b, adapter.lora).to(DTYPES[dtype])
            else:
                for piece in family.pieces(name, shape):
                    yield piece.name, base.whole(piece.name).to(DTYPES[dtype])
            done += prod(shape)
            progress(done, total)
