"""A sharded checkpoint -> a Hugging Face model directory, in one process, with the memory of one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chatlearn.checkpoint.adapters import AdapterRecord, base_digest
from chatlearn.checkpoint.architecture import stored_shapes
from chatlearn.checkpoint.documents import read_document, text
from chatlearn.checkpoint.export import Progress, export, export_verified, no_progress, stored, write_stream
from chatlearn.checkpoint.fit import require_tied_head
from chatlearn.checkpoint.hugging_face import QUANTIZATION, StoredDtype, WrittenModel
from chatlearn.checkpoint.layout import MODEL_FOLDER, MOST_DIGITS, checkpoint_folder, list_complete
from chatlearn.checkpoint.loaded_back import CONFIG_NAME
from chatlearn.checkpoint.manifest import MANIFEST_NAME, Manifest, verify_sizes
from chatlearn.checkpoint.original_layout import (
    is_original,
    open_original,
    original_sources,
    trained_grouped,
)
from chatlearn.errors import CheckpointError, ConfigError, DataError
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
    Raises ``ConfigError`` for arguments that do not fit, also with each other, and ``CheckpointError`` for a checkpoint
    that is incomplete or damaged. ``save_dir`` keeps what it holds until the new model is complete.
    """
    folder = _checkpoint(ckpt_dir, iteration)
    _require_outside(save_dir, ckpt_dir)
    if hf_dir.is_file():
        raise ConfigError(f"--hf_dir {hf_dir}: is a file; give the folder of the model that training started from")
    conversion = _convert_original if is_original(folder) and not (folder / MANIFEST_NAME).exists() else _convert_ours
    return conversion(hf_dir, folder, save_dir, groupgemm, dtype, progress)


def _convert_ours(
    hf_dir: Path, folder: Path, save_dir: Path, groupgemm: bool, dtype: StoredDtype, progress: Progress
) -> ConversionReport:
    manifest = verify_sizes(folder)
    base_dir, notes = _base_model(hf_dir, folder.parent, manifest)
    for place in {base_dir, Path(manifest.base_model or base_dir)}:
        _require_apart(save_dir, place)
    notes += _groupgemm_notes(_family(base_dir, manifest), manifest.groupgemm, groupgemm) + _quantization_notes(
        base_dir
    )
    if manifest.adapter is None:
        notes += _base_notes(base_dir, manifest)
    else:
        _require_base(base_dir, manifest, manifest.adapter)
    files = tuple(record for record in manifest.files if record.name.startswith(f"{MODEL_FOLDER}/"))
    written = export_verified(folder, files, base_dir, save_dir, manifest.adapter, dtype, progress)
    return _report(written, base_dir, folder, notes)


def _convert_original(
    hf_dir: Path, folder: Path, save_dir: Path, groupgemm: bool, dtype: StoredDtype, progress: Progress
) -> ConversionReport:
    family = family_of(hf_dir)
    _require_apart(save_dir, hf_dir)
    tensors, shapes = open_original(folder), stored_shapes(hf_dir)
    notes = (f"{folder} is in the layout of the original ChatLearn, which has no checksums to compare",)
    notes += _groupgemm_notes(family, trained_grouped(tensors), groupgemm) + _quantization_notes(hf_dir)
    sources = original_sources(folder, tensors, shapes, hf_dir)
    require_tied_head(tensors, shapes, hf_dir)
    stream = stored(tensors, sources, dtype)
    written = write_stream(stream, shapes, hf_dir, save_dir, dtype, progress)
    return _report(written, hf_dir, folder, notes)


def _report(written: WrittenModel, base_dir: Path, folder: Path, notes: tuple[str, ...]) -> ConversionReport:
    iteration = int(folder.name)
    return ConversionReport(
        written.directory, base_dir, iteration, written.num_tensors, written.num_bytes, written.files, notes
    )


def _require_outside(save_dir: Path, ckpt_dir: Path) -> None:
    """A model among the checkpoints would be taken for a part of one, or stand where the next one is to go."""
    root = ckpt_dir.resolve()
    if save_dir.resolve().is_relative_to(root):
        raise ConfigError(
            f"--save_dir {save_dir} lies in --ckpt_dir {ckpt_dir}, among the checkpoints; choose a folder outside, "
            f"such as {root.parent / 'huggingface'}"
        )


def _require_apart(save_dir: Path, base_dir: Path) -> None:
    """The base model is what training and every later conversion start from: nothing is written over or into it."""
    place, base = save_dir.resolve(), base_dir.resolve()
    if place.is_relative_to(base) or base.is_relative_to(place):
        how = "is" if place == base else "lies in" if place.is_relative_to(base) else "holds"
        raise ConfigError(
            f"--save_dir {save_dir} {how} the base model {base_dir}, which must stay as it is; choose a folder apart "
            f"from it, such as {base.parent / (base.name + '-trained')}"
        )


def _checkpoint(ckpt_dir: Path, iteration: int) -> Path:
    if not ckpt_dir.is_dir():
        raise ConfigError(f"--ckpt_dir {ckpt_dir}: no such folder; give the run's save_model/policy_trainer")
    folder = checkpoint_folder(ckpt_dir, iteration)
    if len(folder.name) <= MOST_DIGITS and folder.is_dir():
        return folder
    complete = [path for path in ckpt_dir.iterdir() if path in list_complete(ckpt_dir) or is_original(path)]
    if complete:
        present = ", ".join(sorted((path.name for path in complete), key=lambda name: (len(name), name)))
        raise ConfigError(f"{ckpt_dir}: no checkpoint of iteration {iteration}; complete ones: {present}")
    for meant in (ckpt_dir.parent, ckpt_dir / "save_model" / "policy_trainer", ckpt_dir / "policy_trainer"):
        if list_complete(meant):
            raise ConfigError(f"{ckpt_dir}: no checkpoints in it; --ckpt_dir {meant} has some")
    raise ConfigError(
        f"{ckpt_dir}: no checkpoint of iteration {iteration}; complete ones: none; give the run's "
        "save_model/policy_trainer"
    )


def _base_model(hf_dir: Path, ckpt_dir: Path, manifest: Manifest) -> tuple[Path, tuple[str, ...]]:
    if hf_dir.is_dir():
        return hf_dir, ()
    named: list[str] = []
    for candidate in _named_by_run(ckpt_dir, manifest):
        if Path(candidate).is_dir():
            return Path(candidate), (f"{hf_dir} does not exist; taking the run's base model {candidate} instead",)
        named.append(candidate)
    places = f"and the base model of this run is not at {' or '.join(named)} either" if named else "nor is any named"
    raise ConfigError(
        f"--hf_dir {hf_dir}: no such folder, {places}; give the folder of the model that training started from"
    )


def _named_by_run(ckpt_dir: Path, manifest: Manifest) -> Iterator[str]:
    """Where the run says that its base model was; its own file is asked last, and only if the checkpoint's is gone."""
    if manifest.base_model:
        yield manifest.base_model
    path = ckpt_dir.resolve().parent.parent / RUN_MANIFEST_NAME
    with suppress(CheckpointError):  # The checkpoint is whole all the same; without this file --hf_dir must do.
        yield text(read_document(path), "model_path", path)


def _family(base_dir: Path, manifest: Manifest) -> ModelFamily:
    family = family_of(base_dir)
    if family.architecture != manifest.architecture:
        raise ConfigError(
            f"--hf_dir {base_dir}: is a {family.architecture}, but the checkpoint holds a {manifest.architecture}; "
            "give the model that training started from"
        )
    return family


def _groupgemm_notes(family: ModelFamily, trained_with: bool, groupgemm: bool) -> tuple[str, ...]:
    if family.experts is None:
        if groupgemm:
            raise ConfigError(f"--groupgemm 1 is for mixtures of experts; {family.architecture} is dense: use 0")
        return ()
    if groupgemm == trained_with:
        return ()
    return (
        f"--groupgemm {int(groupgemm)} although training ran with {int(trained_with)}; "
        "the checkpoint itself tells how its experts lie, so the result is the same",
    )


def _base_notes(base_dir: Path, manifest: Manifest) -> tuple[str, ...]:
    """To a model that was trained as a whole the base gives no weights: another one is worth a word and no error."""
    if manifest.provenance is None:
        return ()
    try:
        digest = base_digest(base_dir)
    except DataError:  # Its configuration and its tokenizer are enough.
        return ()
    if digest == manifest.provenance.base_digest:
        return ()
    return (
        f"the weights in {base_dir} are not those that training started from ({manifest.base_model}): "
        "configuration and tokenizer are taken from there, so see that they are those of the trained model",
    )


def _quantization_notes(base_dir: Path) -> tuple[str, ...]:
    if QUANTIZATION not in read_document(base_dir / CONFIG_NAME):
        return ()
    return (f"'{QUANTIZATION}' in {base_dir / CONFIG_NAME} is left out: the weights written here are not quantized",)


def _require_base(base_dir: Path, manifest: Manifest, adapter: AdapterRecord) -> None:
    if base_digest(base_dir) != adapter.base_digest:
        raise ConfigError(
            f"--hf_dir {base_dir}: its weights are not those that the adapter in the checkpoint was trained on (they "
            f"were in {manifest.base_model}); give that model"
        )
