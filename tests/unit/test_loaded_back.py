"""A model directory is read as its users will before it gets its name; every planted fault is named."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import EMBEDDED, Run, loaded, make_run
from safetensors.torch import load_file, save_file

from chatlearn.checkpoint.architecture import stored_shapes
from chatlearn.checkpoint.hugging_face import MAX_FILE_BYTES
from chatlearn.checkpoint.loaded_back import Written, require_loads
from chatlearn.checkpoint.weight_files import plan_files
from chatlearn.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

NORM = "model.norm.weight"


def written_to(folder: Path, base: Path) -> Written:
    """What a conversion in float32 that has just written ``folder`` knows."""
    shapes = stored_shapes(base)
    tensors = load_file(folder / "model.safetensors")
    checksums = {name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    return Written(plan_files(shapes, torch.float32, MAX_FILE_BYTES), shapes, torch.float32, checksums)


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Run, Written]:
    run = make_run(tmp_path, "moe")
    run.convert()
    written = written_to(run.save_dir, run.base)
    require_loads(run.save_dir, written, run.base)
    return run, written


def change(folder: Path, name: str, tensor: torch.Tensor | None, new_name: str | None = None) -> None:
    """Write the weights again with one tensor replaced, renamed, or left out."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[new_name or name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip(folder: Path, position: int) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


WEIGHT_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, r"model\.safetensors: cannot be read back"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: cannot be read back"),
    "a byte": (lambda folder: flip(folder, -3), r"read back, '\S+' has other bytes than were written"),
    "renamed": (
        lambda folder: change(folder, NORM, torch.zeros(16), "model.x"),
        f"'{NORM}' was written and is missing",
    ),
    "invented": (lambda folder: change(folder, NORM, torch.zeros(16), "a"), "'a' was never written"),
    "missing": (lambda folder: change(folder, NORM, None), f"'{NORM}' was written and is missing"),
    "shape": (lambda folder: change(folder, NORM, torch.zeros(17)), rf"'{NORM}' is F32 \(17,\); .*as F32 \(16,\)"),
    "dtype": (lambda folder: change(folder, NORM, torch.zeros(16).bfloat16()), rf"'{NORM}' is BF16 \(16,\)"),
}


@pytest.mark.parametrize("fault", list(WEIGHT_FAULTS))
def test_weights_that_do_not_read_back_are_named(converted: tuple[Run, Written], fault: str) -> None:
    run, written = converted
    damage, message = WEIGHT_FAULTS[fault]
    damage(run.save_dir)
    with pytest.raises(CheckpointError, match=message):
        require_loads(run.save_dir, written, run.base)


def test_a_model_that_lacks_a_weight_is_named_by_transformers_own_loader(converted: tuple[Run, Written]) -> None:
    """The files hold what was meant to be written, but the configuration asks for more: nobody else would see it."""
    run, written = converted
    config = json.loads((run.save_dir / "config.json").read_text())
    deeper = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (run.save_dir / "config.json").write_text(json.dumps(config | deeper))
    with pytest.raises(CheckpointError, match=r"transformers reports missing keys: model\.layers\.2\."):
        require_loads(run.save_dir, written, run.base)
    flatter = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (run.save_dir / "config.json").write_text(json.dumps(config | flatter))
    with pytest.raises(CheckpointError, match=r"transformers reports unexpected keys: model\.layers\.1\."):
        require_loads(run.save_dir, written, run.base)


def edited(name: str, **changes: object) -> str:
    return json.dumps(json.loads((EMBEDDED / name).read_text()) | changes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", edited("tokenizer.json", model={"type": "BPE", "vocab": 3})),  # raises Exception itself
        ("tokenizer_config.json", "[1]"),
        ("special_tokens_map.json", "{"),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "{{ raise_exception('no') }}"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
    ],
)
def test_a_base_that_does_not_load_is_named_and_the_earlier_conversion_stays(
    tmp_path: Path, name: str, content: str
) -> None:
    run = make_run(tmp_path, "tied")
    run.convert()
    (run.base / name).write_text(content)
    with pytest.raises(CheckpointError, match=r": the converted model was loaded back and transformers") as found:
        run.convert()
    named = str(found.value).partition(": ")[0]
    assert named == str(run.base / name) or (name, named) == ("tokenizer_config.json", str(run.base / "tokenizer.json"))
    assert loaded(run.save_dir).config.vocab_size == 50
    assert sorted(path.name for path in run.save_dir.parent.iterdir()) == ["huggingface", "policy_trainer"]


def test_a_base_without_tokenizer_or_generation_config_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path, "untied")
    for path in run.base.iterdir():
        if path.name not in {"config.json", "model.safetensors"}:
            path.unlink()
    run.convert()
    assert {path.name for path in run.save_dir.iterdir()} == {
        "config.json", "model.safetensors", "chatlearn_conversion.json",
    }  # fmt: skip
