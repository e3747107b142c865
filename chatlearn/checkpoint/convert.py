"""A sharded checkpoint -> a Hugging Face model directory, in one process, with the memory of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chatlearn.checkpoint.adapters import AdapterRecord, base_digest
from chatlearn.checkpoint.documents import read_document, text
from chatlearn.checkpoint.export import Progress, export, export_verified, no_progress
from chatlearn.checkpoint.hugging_face import StoredDtype
from chatlearn.checkpoint.layout import MODEL_FOLDER, checkpoint_folder, list_complete
from chatlearn.checkpoint.manifest import Manifest, verify_sizes
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.family import family_of
from chatlearn.models.naming import ModelFamily

__all__ = ["ConversionReport", "convert", "export"]

RUN_MANIFEST_NAME = "manifest.json"


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
    if manifest.adapter is not None:
        _require_base(base_dir, manifest, manifest.adapter)
    files = tuple(record for record in manifest.files if record.name.startswith(f"{MODEL_FOLDER}/"))
    written = export_verified(folder, files, base_dir, save_dir, manifest.adapter, dtype, progress)
    return ConversionReport(
        written.directory, base_dir, iteration, written.num_tensors, written.num_bytes, written.files, notes
    )


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


def _require_base(base_dir: Path, manifest: Manifest, adapter: AdapterRecord) -> None:
    if base_digest(base_dir) != adapter.base_digest:
        raise ConfigError(
            f"--hf_dir {base_dir}: its weights are not those that the adapter in the checkpoint was trained on (they "
            f"were in {manifest.base_model}); give that model"
        )
