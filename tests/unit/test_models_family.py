"""Which family a directory belongs to, and how its weights are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from chatlearn.errors import DataError
from chatlearn.models.family import FAMILIES, family_of
from chatlearn.models.positions import require_fixed_frequencies

MOE = FAMILIES["Qwen3MoeForCausalLM"]


def test_a_directory_is_known_by_its_architecture(tmp_path: Path) -> None:
    for architecture, family in FAMILIES.items():
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert family_of(tmp_path) is family


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no config.json in it"),
        ("{", "not readable as JSON"),
        ("{}", "no 'architectures' in it"),
        ('{"architectures": []}', "no 'architectures' in it"),
        ('["Qwen3ForCausalLM"]', "no 'architectures' in it"),
        (
            '{"architectures": ["GPT2LMHeadModel"]}',
            "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
    ],
)
def test_a_directory_we_cannot_use_is_one_clear_error(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        family_of(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(caught.value.problems) == 1


def test_an_absent_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: there is no such model directory"):
        family_of(tmp_path / "nowhere")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(num_experts=st.integers(1, 5), inner=st.integers(1, 4), hidden=st.integers(1, 4))
def test_pieces_of_experts_cover_each_number_once(num_experts: int, inner: int, hidden: int) -> None:
    for name, shape in (
        ("model.layers.3.mlp.experts.gate_up_proj", (num_experts, 2 * inner, hidden)),
        ("model.layers.3.mlp.experts.down_proj", (num_experts, hidden, inner)),
    ):
        touched = torch.zeros(shape)
        for piece in MOE.pieces(name, shape):
            piece.of(touched).add_(1)
        assert torch.equal(touched, torch.ones(shape))


def test_experts_leave_under_the_names_of_the_checkpoint() -> None:
    parameter = torch.arange(2 * 4 * 3).view(2, 4, 3)
    stored = dict(MOE.export("model.layers.0.mlp.experts.gate_up_proj", parameter))
    assert list(stored) == [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.gate_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
    ]
    assert torch.equal(stored["model.layers.0.mlp.experts.1.up_proj.weight"], parameter[1, 2:])


def test_other_weights_keep_their_name() -> None:
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert [piece.name for piece in MOE.pieces(name, (4, 3))] == [name]


@pytest.mark.parametrize("kind", ["dynamic", "linear", "llama3", "yarn", "default"])
def test_frequencies_that_follow_the_longest_neighbour_are_refused(tmp_path: Path, kind: str) -> None:
    scaling = {
        "rope_type": kind,
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(rope_parameters=scaling)
    if kind != "dynamic":
        require_fixed_frequencies(config, tmp_path)
        return
    with pytest.raises(DataError, match="rope_type 'dynamic' change with the longest sequence of a batch"):
        require_fixed_frequencies(config, tmp_path)
