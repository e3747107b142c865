"""Reading safetensors: every fault of a model directory is one message that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatlearn.errors import DataError
from chatlearn.models.qwen3 import QWEN3
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.trainer.load import fill

WEIGHTS = {"first.weight": torch.arange(6.0).view(2, 3), "second.weight": torch.arange(4.0).view(2, 2)}


def module() -> torch.nn.Module:
    return torch.nn.ModuleDict(
        {"first": torch.nn.Linear(3, 2, bias=False), "second": torch.nn.Linear(2, 2, bias=False)}
    )


def fill_from(folder: Path) -> torch.nn.Module:
    target = module()
    with StoredWeights(folder) as stored:
        fill(target, QWEN3, stored)
    return target


def test_one_file_and_several_files_hold_the_same(tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    save_file(WEIGHTS, one / "model.safetensors")
    for name, weight in WEIGHTS.items():
        save_file({name: weight}, several / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in WEIGHTS}}
    (several / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (one, several):
        state = fill_from(folder).state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in WEIGHTS.items())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    save_file({name: weight.bfloat16() for name, weight in WEIGHTS.items()}, tmp_path / "model.safetensors")
    assert torch.equal(fill_from(tmp_path).state_dict()["first.weight"], WEIGHTS["first.weight"])


def test_a_tied_head_and_old_frequencies_have_no_place_and_need_none(tmp_path: Path) -> None:
    extra = {"lm_head.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(WEIGHTS | extra, tmp_path / "model.safetensors")
    assert torch.equal(fill_from(tmp_path).state_dict()["first.weight"], WEIGHTS["first.weight"])


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"first.weight": WEIGHTS["first.weight"]}, "no tensor 'second.weight'"),
        (WEIGHTS | {"second.weight": torch.zeros(2, 5)}, r"'second.weight' has shape \(2, 5\), .* asks for \(2, 2\)"),
        (WEIGHTS | {"third.bias": torch.zeros(2)}, "no place for 1 stored tensors, the first is 'third.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, weights: dict[str, torch.Tensor], complaint: str) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=complaint):
        fill_from(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        fill_from(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"model\.safetensors: not a readable safetensors file"):
        fill_from(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "absent.safetensors")}))
    with pytest.raises(DataError, match=r"absent\.safetensors: not a readable safetensors file"):
        fill_from(tmp_path)
    save_file({"first.weight": WEIGHTS["first.weight"]}, tmp_path / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")}))
    with pytest.raises(DataError, match=r"model\.safetensors: has no tensor 'second.weight', which .*index\.json"):
        fill_from(tmp_path)
    index.write_text("{}")
    with pytest.raises(DataError, match=r"index\.json: not a readable index"):
        fill_from(tmp_path)
