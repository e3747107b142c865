"""Checkpoints that torch 2.6 wrote in the original's layout: what comes out, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3MoeConfig

from chatlearn.checkpoint.convert import ConversionReport, convert
from chatlearn.checkpoint.original_layout import is_original, open_original
from chatlearn.errors import CheckpointError, ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures"
ITERATION = 20


def recipe() -> ModuleType:
    """The script that made the fixtures; it also knows what is in them."""
    spec = importlib.util.spec_from_file_location("original_checkpoint", FIXTURES / "original_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["original_checkpoint"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


MADE = recipe()
SIZES = {
    "vocab_size": MADE.VOCABULARY, "hidden_size": MADE.HIDDEN, "intermediate_size": MADE.INTERMEDIATE,
    "num_hidden_layers": 1, "num_attention_heads": MADE.HEADS, "num_key_value_heads": 1, "head_dim": MADE.HEAD_DIM,
}  # fmt: skip
MIXTURE = {"num_experts": MADE.EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": MADE.EXPERT_WIDTH}


def base_of(folder: Path, kind: str, *, tied: bool | None = None) -> Path:
    tied = MADE.CHECKPOINTS[kind].tied if tied is None else tied
    dense = Qwen3Config(**SIZES, tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"])
    mixture = Qwen3MoeConfig(**SIZES, **MIXTURE, tie_word_embeddings=tied, architectures=["Qwen3MoeForCausalLM"])
    (dense if kind == "dense" else mixture).save_pretrained(folder / "base")
    return folder / "base"


def checkpoints_of(folder: Path, kind: str) -> Path:
    root = folder / "save_model" / "policy_trainer"
    shutil.copytree(FIXTURES / "original" / kind, root / str(ITERATION))
    return root


def converted(folder: Path, kind: str, *, groupgemm: bool, tied: bool | None = None) -> ConversionReport:
    root = folder / "save_model" / "policy_trainer"
    if not root.exists():
        checkpoints_of(folder, kind)
    return convert(base_of(folder, kind, tied=tied), root, folder / "huggingface", ITERATION, groupgemm, "float32")


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(MADE.numbers(name, shape)).view(shape)


def test_a_dense_model_comes_out_whole_from_ranks_with_fewer_rows_and_none(tmp_path: Path) -> None:
    report = converted(tmp_path, "dense", groupgemm=False)
    stored = load_file(tmp_path / "huggingface" / "model.safetensors")
    shapes = {name: shape for name, shape in MADE.CHECKPOINTS["dense"].shapes.items() if name != "lm_head.weight"}
    assert stored.keys() == shapes.keys()
    assert all(torch.equal(stored[name], whole(name, shape)) for name, shape in shapes.items())
    assert report.iteration == ITERATION
    assert report.notes == (
        f"{tmp_path}/save_model/policy_trainer/20 is in the layout of the original ChatLearn, which has no checksums "
        "to compare",
    )
    last = open_original(tmp_path / "save_model" / "policy_trainer" / "20")._shards["model.layers.0.mlp.up_proj.weight"]
    assert [shard.block.sizes[0] for shard in last] == [2, 2, 1, 0], "the fixture no longer has a rank without rows"


@pytest.mark.parametrize("groupgemm", [True, False])
def test_grouped_experts_are_taken_apart(tmp_path: Path, groupgemm: bool) -> None:
    report = converted(tmp_path, "grouped", groupgemm=groupgemm)
    assert len(report.notes) == (1 if groupgemm else 2)
    stored = load_file(tmp_path / "huggingface" / "model.safetensors")
    layer = "model.layers.0.mlp"
    for name, shape in MADE.CHECKPOINTS["grouped"].shapes.items():
        if "group_mlp" not in name:
            assert torch.equal(stored.pop(name), whole(name, shape))
            continue
        projection = name.split(".")[-2]
        for expert, rows in enumerate(whole(name, shape).chunk(MADE.EXPERTS)):
            assert torch.equal(stored.pop(f"{layer}.experts.{expert}.{projection}.weight"), rows)
    assert not stored


def test_groupgemm_is_refused_for_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--groupgemm 1 is for mixtures of experts"):
        converted(tmp_path, "dense", groupgemm=True)


def test_a_head_of_its_own_is_not_dropped_silently(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ties the output head .* head of its own; .*tie_word_embeddings to false"):
        converted(tmp_path, "grouped", groupgemm=True, tied=True)


def test_all_files_of_one_save_must_be_there_and_agree(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path, "dense")
    third = root / "20" / "model_world_size_4_rank_2.pt"
    content = third.read_bytes()
    third.unlink()
    with pytest.raises(CheckpointError, match=r"20: model_world_size_4_rank_2\.pt is missing; .* incomplete"):
        converted(tmp_path, "dense", groupgemm=False)
    third.write_bytes(content[:-300])
    with pytest.raises(CheckpointError, match=r"rank_2\.pt: not readable \(BadZipFile"):
        converted(tmp_path, "dense", groupgemm=False)
    shutil.copy(root / "20" / "model_world_size_4_rank_3.pt", third)
    with pytest.raises(CheckpointError, match=r"20: all ranks have \d+ rows of 'model\.\S+', which has \d+"):
        converted(tmp_path, "dense", groupgemm=False)
    third.write_bytes(content)
    shutil.copy(third, root / "20" / "model_world_size_2_rank_1.pt")
    with pytest.raises(CheckpointError, match=r"holds model files of 2 and of 4 ranks"):
        converted(tmp_path, "dense", groupgemm=False)
    (root / "20" / "model_world_size_2_rank_1.pt").unlink()
    shutil.copy(FIXTURES / "original" / "grouped" / "model_world_size_2_rank_1.pt", third)
    with pytest.raises(CheckpointError, match=r"20: only some ranks have '"):
        converted(tmp_path, "dense", groupgemm=False)
    assert not (tmp_path / "huggingface").exists()


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hostile_code_ran",)


def test_a_pickle_that_wants_more_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = checkpoints_of(tmp_path, "dense")
    torch.save({"optimizer": Hostile()}, root / "20" / "optim_world_size_4_rank_0.pt")
    torch.save({"rng": Hostile()}, root / "20" / "extra_state_world_size_4_rank_0.pt")
    converted(tmp_path, "dense", groupgemm=False)  # they are not opened
    torch.save({"model.norm.weight": Hostile()}, root / "20" / "model_world_size_4_rank_1.pt")
    with pytest.raises(CheckpointError, match=r"rank_1\.pt: wants to load posix\.system, which no checkpoint"):
        converted(tmp_path, "dense", groupgemm=False)
    assert not (tmp_path / "hostile_code_ran").exists()


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, "dense")
    shutil.rmtree(tmp_path / "save_model" / "policy_trainer" / "20")
    shutil.copytree(FIXTURES / "original" / "grouped", tmp_path / "save_model" / "policy_trainer" / "20")
    with pytest.raises(ConfigError, match=r"20: has no 'model\.layers\.0\.mlp\.gate_proj\.weight'"):
        converted(tmp_path, "dense", groupgemm=False, tied=False)


def test_a_size_that_an_archive_only_claims_is_not_believed(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path, "dense")
    path = root / "20" / "model_world_size_4_rank_1.pt"
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_1\.pt: .*data\.pkl' is said to be longer than the file"):
        open_original(root / "20")


def test_a_flipped_bit_asks_for_no_gigabytes(tmp_path: Path) -> None:
    """Objects in a pickle have numbers; Python's reader in C makes a list as long as the highest that it meets."""
    root = checkpoints_of(tmp_path, "grouped")
    path = root / "20" / "model_world_size_2_rank_0.pt"
    content = bytearray(path.read_bytes())
    number = content.find(b"r\xbc\x01\x00\x00")  # LONG_BINPUT 444
    content[number + 4] = 8  # 134 million more
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open_original(root / "20")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_files_of_no_rank_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "model_world_size_0_rank_0.pt").touch()
    assert not is_original(tmp_path / "20")


@pytest.mark.parametrize("extra", ["model.layers.1.mlp.up_proj.weight", "model.rotary_emb.inv_freq"])
def test_a_tensor_that_the_base_does_not_ask_for_is_not_dropped_silently(tmp_path: Path, extra: str) -> None:
    root = tmp_path / "save_model" / "policy_trainer"
    (root / "20").mkdir(parents=True)
    tensors = {name: whole(name, shape) for name, shape in MADE.CHECKPOINTS["dense"].shapes.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors | {extra: torch.ones(3)}, root / "20" / "model_world_size_1_rank_0.pt")
    if "rotary" in extra:
        converted(tmp_path, "dense", groupgemm=False)
        return
    with pytest.raises(ConfigError, match=rf"holds '{extra}', which the base model's configuration does not ask for"):
        converted(tmp_path, "dense", groupgemm=False)
    assert not (tmp_path / "huggingface").exists()


def test_an_unknown_iteration_lists_the_originals_checkpoints_too(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path, "dense")
    with pytest.raises(ConfigError, match=r"no checkpoint of iteration 200; complete ones: 20$"):
        convert(base_of(tmp_path, "dense"), root, tmp_path / "huggingface", 200, groupgemm=False)
