"""What a checkpoint takes is known before it is written, and a disk that is too small is said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.checkpoint.room import checkpoint_size, free_bytes, in_words, require_room
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.config.environment import Environment
from chatlearn.config.layout import layout_of
from chatlearn.config.read import read_config
from chatlearn.disk_room import check_disk_room, disk_room_rows, num_adapter_parameters, size_of_checkpoint
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.models.family import family_of
from chatlearn.models.lora import LoraSpec, is_adapter
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.trainer.adapter import put_on

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "embedded" / "tiny_qwen3"


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_estimate_is_what_is_written(tmp_path: Path) -> None:
    model = nn.Linear(1000, 500, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    save_shards(tmp_path, model, optimizer)
    size = checkpoint_size(500_000, 500_000, moment_bytes=4, saves_hf=False)
    assert size.weights == pytest.approx(bytes_below(tmp_path / "model"), rel=0.01)
    assert size.moments == pytest.approx(bytes_below(tmp_path / "optimizer"), rel=0.01)


def test_the_hugging_face_copy_is_as_large_as_expected(tmp_path: Path) -> None:
    with StoredWeights(TINY) as stored:
        written = write_hugging_face(((name, stored.whole(name)) for name in stored.files), TINY, tmp_path / "copy")
    config = read_config(ROOT / "template" / "quickstart.yaml", [f"models.policy_trainer.load={TINY}"])
    size = size_of_checkpoint(config, layout_of(config, Environment.read()))
    assert size.hugging_face == pytest.approx(written.num_bytes, rel=0.01)  # but for the header


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_qwen3_moe"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_an_adapter_is_counted_as_it_is_put_on(name: str, targets: tuple[str, ...]) -> None:
    folder, spec = ROOT / "embedded" / name, LoraSpec(4, 8.0, targets)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        put_on(model, family_of(folder), spec)
    expected = sum(value.numel() for parameter, value in model.named_parameters() if is_adapter(parameter))
    assert num_adapter_parameters(folder, spec) == expected


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "run" / "save_model"
    assert free_bytes(root) > 0
    require_room(root, 1)
    with pytest.raises(CheckpointError, match=rf"{root}: the next checkpoint needs \d+\.\d\d GB, and .* are free"):
        require_room(root, 10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_keep_a_single_checkpoint_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"models.policy_trainer.load={TINY}", f"runtime_args.output_dir={tmp_path / 'output'}"]
    config = read_config(ROOT / "template" / "quickstart.yaml", words)
    layout = layout_of(config, Environment.read())
    monkeypatch.setattr("chatlearn.disk_room.free_bytes", lambda _: size_of_checkpoint(config, layout).total)
    check_disk_room(config, layout)
    monkeypatch.setattr("chatlearn.disk_room.free_bytes", lambda _: size_of_checkpoint(config, layout).total - 1)
    with pytest.raises(ConfigError, match=r"one checkpoint needs .* \(weights .*choose an output_dir with more room"):
        check_disk_room(config, layout)
    never = read_config(ROOT / "template" / "quickstart.yaml", [*words, "runtime_args.save_episode_interval=0"])
    check_disk_room(never, layout)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("keep_checkpoints=2", "3 (2 kept, one being written)"),
        ("keep_checkpoints=2 keep_best=eval/arithmetic/avg@1", "4 (2 kept, the best one, one being written)"),
        ("keep_checkpoints=0", "10 (all there will be)"),
        ("keep_checkpoints=20", "10 (all there will be)"),
    ],
)
def test_the_plan_says_how_many_checkpoints_there_may_be_at_once(overrides: str, words: str) -> None:
    asked = [f"runtime_args.{word}" for word in (*overrides.split(), "num_episode=20", "save_episode_interval=2")]
    config = read_config(
        ROOT / "template" / "quickstart.yaml",
        [*asked, f"models.policy_trainer.load={TINY}", "runtime_args.eval_episode_interval=2"],
    )
    (_, size), (_, at_once) = disk_room_rows(config, layout_of(config, Environment.read()))
    assert "Hugging Face copy" in size
    assert at_once.startswith(f"{words}: ")
    assert "; free: " in at_once


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("capsule_interval=2 keep_checkpoints=2", "3 (2 kept, one being written)"),
        ("capsule_interval=2 keep_checkpoints=0", "10 (all there will be)"),
        ("capsule_interval=5 keep_checkpoints=3", "4 (all there will be)"),
        ("capsule_interval=2 save_episode_interval=0", "3 (2 kept, one being written)"),
    ],
)
def test_the_plan_says_how_many_recorded_steps_there_may_be_at_once(overrides: str, words: str) -> None:
    asked = [f"runtime_args.{word}" for word in ("num_episode=20", *overrides.split())]
    config = read_config(ROOT / "template" / "quickstart.yaml", [*asked, f"models.policy_trainer.load={TINY}"])
    *_, (_, size), (_, at_once) = disk_room_rows(config, layout_of(config, Environment.read()))
    with StoredWeights(TINY) as stored:
        num_bytes = sum(4 * stored.whole(name).numel() for name in stored.files)
    assert size == in_words(num_bytes)
    assert at_once.startswith(f"{words}, and those of bad steps: ")


def test_a_run_that_cannot_keep_the_steps_it_is_to_record_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"models.policy_trainer.load={TINY}", f"runtime_args.output_dir={tmp_path}"]
    words += ["runtime_args.save_episode_interval=0", "runtime_args.capsule_interval=2"]
    config = read_config(ROOT / "template" / "quickstart.yaml", words)
    layout = layout_of(config, Environment.read())
    check_disk_room(config, layout)
    monkeypatch.setattr("chatlearn.disk_room.free_bytes", lambda folder: 100)
    with pytest.raises(ConfigError, match=r"capsule_interval=2: one capsule needs \d+\.\d MB, and 0\.0 MB are free"):
        check_disk_room(config, layout)
