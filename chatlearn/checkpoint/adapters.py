"""What a checkpoint says about the adapter in it: its kind, and the model that it was put on.

An adapter alone is no model: with another base, or multiplied by another factor, the same numbers mean something else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from chatlearn.checkpoint.documents import Document, inner, integer, number, text, texts
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.lora import LoraSpec
from chatlearn.models.stored_weights import StoredWeights, is_weight


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter, and the digest of the weights that it is added to."""

    lora: LoraSpec
    base_digest: str

    @staticmethod
    def of(lora: LoraSpec | None, base_dir: Path) -> AdapterRecord | None:
        """The record of a run that trains ``lora`` on the model in ``base_dir``; none where all weights are trained."""
        return None if lora is None else AdapterRecord(lora, base_digest(base_dir))


def base_digest(model_dir: Path) -> str:
    """A digest of names, shapes and first rows of all weights: a copy has the same, a model trained further another.

    Reads little, so that every rank can compute it at every start.
    """
    digest = hashlib.sha256()
    with StoredWeights(model_dir) as stored:
        for name in sorted(filter(is_weight, stored.files)):
            shape = stored.shape(name)
            first = stored.rows(name, shape, 0, 1)
            digest.update(f"{name}{shape}{first.dtype}".encode())
            digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def read_adapter(document: Document, path: Path) -> AdapterRecord | None:
    """The adapter that a manifest names; older manifests know none."""
    if document.get("adapter") is None:
        return None
    record = inner(document, "adapter", path)
    lora = inner(record, "lora", path)
    try:
        spec = LoraSpec(integer(lora, "rank", path), number(lora, "alpha", path), texts(lora, "target_modules", path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return AdapterRecord(spec, text(record, "base_digest", path))


def require_same_adapter(
    folder: Path, saved: AdapterRecord | None, wanted: AdapterRecord | None, base_model: str
) -> None:
    """Refuse to go on from ``saved`` as ``wanted``; ``base_model`` is where the saved run found its base.

    Which layers are adapted is seen from the tensors, since a configuration can say it in several ways.
    """
    if saved is not None and wanted is not None and saved.base_digest != wanted.base_digest:
        raise CheckpointError(
            f"{folder}: its adapter was trained on the model that was in {base_model}, and models.policy_trainer.load "
            "is another one; load that model, or choose another output_dir"
        )
    if _kind(saved) != _kind(wanted):
        raise CheckpointError(
            f"{folder}: holds {_kind(saved)}, but models.policy_trainer.lora asks for {_kind(wanted)}; set lora.rank "
            "and lora.alpha as in the run that saved it, or choose another output_dir"
        )


def require_same_layers(folder: Path, saved: set[str], wanted: set[str]) -> None:
    """Refuse a checkpoint whose adapter sits on other layers; both are names of parameters."""
    if saved != wanted:
        raise CheckpointError(
            f"{folder}: its adapter and the one that models.policy_trainer.lora.target_modules asks for sit on "
            f"different layers, the first difference is '{min(saved ^ wanted)}'; name the layers as the run that saved "
            "it did"
        )


def _kind(record: AdapterRecord | None) -> str:
    if record is None:
        return "a fully trained model (lora.rank=0)"
    return f"an adapter with lora.rank={record.lora.rank} and lora.alpha={record.lora.alpha:g}"
