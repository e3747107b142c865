"""Model directories, data files and accounts are looked at before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chatlearn.config.environment import Environment
from chatlearn.config.preflight import data_problems, disk_problems, model_problems
from chatlearn.config.read import read_config

ROOT = Path(__file__).resolve().parents[2]


HEADER = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    facts = {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 8, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "added_tokens": []}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.json"
    file.write_text("{}\n")
    return file


def found(model: Path, data: Path, *overrides: str, environment: Environment | None = None) -> list[str]:
    places = [
        f"runtime_args.output_dir={model.parent / 'output' / 'run'}",
        f"runtime_args.data_path={data}",
        f"runtime_args.eval_data_path={data}",
        f"models.policy_trainer.load={model}",
    ]
    config = read_config(ROOT / "template" / "grpo_fsdp.yaml", [*places, *overrides])
    return disk_problems(config, environment or Environment())


def test_a_good_start_has_no_problems(model: Path, data: Path) -> None:
    assert found(model, data) == []


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_text(text)

    return act


def _keep_bytes(num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "model.safetensors", num_bytes)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), "has no config.json; is it a Hugging Face model directory?"),
        (_write("config.json", "{"), "config.json cannot be read as a JSON object; copy the model again"),
        (_write("config.json", "[]"), "config.json cannot be read as a JSON object; copy the model again"),
        (_remove("model.safetensors"), f"has no weights (model.safetensors, or {INDEX} and its parts)"),
        (_write("model.safetensors", ""), "model.safetensors is empty; copy the model again"),
        (_write("model.safetensors", "short"), "model.safetensors has no safetensors header; copy the model again"),
        (_write("model.safetensors", "words" * 9), "model.safetensors has no safetensors header; copy the model again"),
        (_keep_bytes(40), "model.safetensors has no safetensors header; copy the model again"),
        (_keep_bytes(72), "model.safetensors has 72 bytes, and its header speaks of 73; copy the model again"),
        (_write("tokenizer.json", '{"model":'), "tokenizer.json cannot be read as part of a tokenizer; "
         "copy the model again"),
        (_write("tokenizer.json", '{"model": {"type": "New"}, "added_tokens": []}'), "tokenizer.json cannot be read as "
         "part of a tokenizer; copy the model again"),
        (_write("tokenizer_config.json", ""), "tokenizer_config.json cannot be read as part of a tokenizer; "
         "copy the model again"),
        (_remove("tokenizer.json"), "has no tokenizer (tokenizer.json)"),
        (_write(INDEX, '{"weight_map": {"w": "part.safetensors"}}'), f"lacks part.safetensors, which {INDEX} names"),
        (_write(INDEX, "{}"), f"{INDEX} has no weight_map; copy the model again"),
    ],
)  # fmt: skip
def test_a_damaged_model_directory_is_named(model: Path, damage: Callable[[Path], None], message: str) -> None:
    assert model_problems("models.policy_trainer.load", str(model)) == []
    damage(model)
    (said,) = model_problems("models.policy_trainer.load", str(model))
    assert said.startswith("models.policy_trainer.load")
    assert str(model) in said
    assert said.endswith(message)


def test_a_damaged_part_of_a_model_is_named(model: Path) -> None:
    for part in ("one", "two"):
        (model / f"{part}.safetensors").write_bytes(WEIGHTS)
    (model / INDEX).write_text('{"weight_map": {"w": "one.safetensors", "v": "two.safetensors"}}')
    assert model_problems("key", str(model)) == []
    os.truncate(model / "two.safetensors", 10)
    (said,) = model_problems("key", str(model))
    assert said == f"key: {model / 'two.safetensors'} has no safetensors header; copy the model again"


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    said = f"key={absent} is not a directory; download or copy the model there first"
    assert model_problems("key", absent) == [said]


def test_data_files_are_named_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("\n \n")
    (tmp_path / "full.jsonl").write_text("{}\n")
    (tmp_path / "table.csv").write_text("a,b\n")
    paths = ", ".join(str(tmp_path / name) for name in ("empty.json", "full.jsonl", "table.csv", "absent.parquet"))
    assert data_problems("key", paths) == [
        f"key: {tmp_path / 'empty.json'} is empty; prepare it again (chatlearn prepare --help)",
        f"key: {tmp_path / 'table.csv'} must end in .json, .jsonl or .parquet",
        f"key: {tmp_path / 'absent.parquet'} does not exist; prepare it first (chatlearn prepare --help)",
    ]
    assert data_problems("key", " , ") == ["key names no file"]


def test_what_the_model_cannot_do_is_said(model: Path, data: Path) -> None:
    said = found(
        model,
        data,
        "models.policy.max_response_tokens_length=8000",
        "models.policy.num_gpu=3",
        "models.policy.tensor_model_parallel_size=3",
    )
    assert said == [
        "models.policy.tensor_model_parallel_size=3 must divide the model's num_attention_heads=8; use 1, 2, 4 or 8",
        "models.policy.max_prompt_tokens_length + max_response_tokens_length = 9024 tokens, but the model's "
        "max_position_embeddings=4096; shorten one of them",
    ]


def test_a_reference_model_of_its_own_is_looked_at_when_it_is_loaded(model: Path, data: Path) -> None:
    absent = "models.ref_policy.load=/absent"
    assert found(model, data, absent) == []
    (said,) = found(model, data, absent, "models.policy_trainer.kl_coef=0.1")
    assert said.startswith("models.ref_policy.load=/absent is not a directory")


def test_an_output_directory_below_a_file_is_said(model: Path, data: Path) -> None:
    (said,) = found(model, data, f"runtime_args.output_dir={data}/run")
    assert said == f"runtime_args.output_dir={data}/run: {data} is a file; choose another folder"


def test_wandb_needs_an_account(model: Path, data: Path) -> None:
    ask = "runtime_args.log_args_dict.enable_wandb=True"
    assert found(model, data, ask, environment=Environment(has_wandb_account=True)) == []
    assert found(model, data, ask) == [f"{ask} needs an account; set WANDB_API_KEY, or WANDB_MODE=offline"]
