"""What a model directory says must be sent: all of its tensors, except a tied head and computed buffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatlearn.errors import DataError
from chatlearn.weights.checkpoint_source import CheckpointSource, expected_tensors
from chatlearn.weights.wire import choose_wire


def write_model(folder: Path, tied: bool) -> None:
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}), encoding="utf-8")
    first = {"model.embed_tokens.weight": torch.randn(4, 2).bfloat16(), "lm_head.weight": torch.randn(4, 2)}
    second = {"model.norm.weight": torch.randn(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(3)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    places = {name: number for number, names in enumerate((first, second), 1) for name in names}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(("tied", "head"), [(True, set[str]()), (False, {"lm_head.weight"})])
def test_tied_heads_and_computed_buffers_are_not_sent(tmp_path: Path, tied: bool, head: set[str]) -> None:
    write_model(tmp_path, tied)
    assert expected_tensors(tmp_path).keys() == {"model.embed_tokens.weight", "model.norm.weight"} | head


def test_metadata_and_export_agree(tmp_path: Path) -> None:
    write_model(tmp_path, tied=False)
    source = CheckpointSource(tmp_path)
    exported = list(source.export_weights())
    assert [(meta.name, meta.shape) for meta in source.metadata()] == [(name, tuple(t.shape)) for name, t in exported]
    assert {tensor.dtype for _, tensor in exported} == {torch.float32}


def test_a_second_copy_of_the_weights_is_not_sent(tmp_path: Path) -> None:
    write_model(tmp_path, tied=False)
    expected = expected_tensors(tmp_path)
    save_file({"layers.0.norm.weight": torch.randn(2)}, tmp_path / "consolidated.safetensors")
    assert expected_tensors(tmp_path) == expected


def test_a_directory_without_weights_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.json: not found"):
        CheckpointSource(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"neither model.safetensors nor .* in it"):
        CheckpointSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(DataError, match=r"model.safetensors: not a readable safetensors file"):
        CheckpointSource(tmp_path)


def test_the_layout_chooses_the_wire() -> None:
    assert choose_wire("cpu", colocated=True) == choose_wire("cpu", colocated=False) == "shared_memory"
    assert choose_wire("cuda", colocated=True) == "ipc"
    assert choose_wire("cuda", colocated=False) == "nccl"
