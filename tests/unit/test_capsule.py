"""A capsule gives back what was put in; a damaged, foreign or hostile one is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import capsules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from chatlearn.checkpoint.capsule import (
    CapsuleFacts,
    begin_capsule,
    changed_versions,
    discard_capsule,
    read_capsule,
    verify_capsule,
)
from chatlearn.checkpoint.durable import files_below
from chatlearn.checkpoint.sample_file import STREAMS, read_samples, write_samples
from chatlearn.checkpoint.sharded import load_random_states
from chatlearn.errors import ChatLearnError, CheckpointError, ConfigError
from chatlearn.records import Sample, StepStats

BAD_STEP = StepStats(
    loss=0.5, pg_loss=0.5, kl_loss=0.0, entropy=1.0, grad_norm=float("nan"), clip_fraction=0.0, lr=1e-6, num_tokens=9,
    num_loss_tokens=5, rollout_logprob_diff_mean=0.0, rollout_logprob_diff_max=0.0, rollout_kl=0.0,
)  # fmt: skip
FACTS = CapsuleFacts(iteration=7, episode=3, reason="bad step", num_ranks=1, stats=BAD_STEP)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [capsules.one_sample("a", 4), capsules.one_sample("ä/b", 5)]
    return capsules.write_capsule(tmp_path_factory.mktemp("capsules"), FACTS, samples)


@pytest.fixture
def capsule(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Samples with any of the optional streams; experts are reported for some of the tokens of some samples."""
    has_old, has_ref, seed = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2**20))
    generator = np.random.default_rng(seed)

    def sample(number: int, length: int, num_routed: int | None) -> Sample:
        numbers = [generator.normal(size=length).astype(np.float32) for _ in range(4)]
        return Sample(
            prompt_uid=f"prompt {number}",
            token_ids=generator.integers(0, 99, length).astype(np.int32),
            loss_mask=generator.random(length) > 0.5,
            rollout_logprobs=numbers[0],
            advantages=numbers[1],
            old_logprobs=numbers[2] if has_old else None,
            ref_logprobs=numbers[3] if has_ref else None,
            routed_experts=None
            if num_routed is None
            else generator.integers(0, 8, (min(num_routed, length), 2, 3)).astype(np.uint8),
        )

    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(0, 6)), min_size=1, max_size=5))
    return [sample(number, *shape) for number, shape in enumerate(shapes)]


@given(batches())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_samples_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> None:
    file = tmp_path_factory.mktemp("samples") / "samples.safetensors"
    write_samples(file, samples)
    back = read_samples(file, [sample.prompt_uid for sample in samples])
    for written, read in zip(samples, back, strict=True):
        assert read.prompt_uid == written.prompt_uid
        for name in STREAMS:
            before, after = vars(written)[name], vars(read)[name]
            assert (before is None) == (after is None), name
            assert before is None or (before.dtype == after.dtype and np.array_equal(before, after)), name


def test_a_capsule_gives_back_what_was_put_in(whole: Path) -> None:
    capsule = read_capsule(whole)
    verify_capsule(capsule)
    assert (capsule.iteration, capsule.episode, capsule.reason, capsule.num_ranks) == (7, 3, "bad step", 1)
    assert [sample.prompt_uid for sample in capsule.samples] == ["a", "ä/b"]
    assert (capsule.stats["grad_norm"], capsule.stats["loss"]) == ("nan", 0.5)
    assert whole.name == "iteration_000007"
    assert changed_versions(capsule) == []
    document = json.loads((whole / "capsule.json").read_text())
    assert document["num_loss_tokens"] == 2 + 3
    assert {"python", "torch", "transformers"} <= document["versions"].keys()


def test_its_model_loads_everywhere(whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    written = AutoModelForCausalLM.from_pretrained(whole.parent / "base")
    assert model.dtype == torch.float32
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_weights_that_are_broken_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what somebody will want to look at."""
    real = AutoModelForCausalLM.from_config

    def broken(*arguments: object, **options: object) -> torch.nn.Module:
        model = real(*arguments, **options)
        model.model.norm.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", broken)
    folder = capsules.write_capsule(tmp_path, FACTS, [capsules.one_sample()])
    assert read_capsule(folder).iteration == 7


def test_every_missing_or_shorter_file_is_named(capsule: Path) -> None:
    names = files_below(capsule)
    assert len(names) >= 6
    for name in names:
        content = (capsule / name).read_bytes()
        (capsule / name).unlink()
        with pytest.raises(ChatLearnError, match=Path(name).name):
            read_capsule(capsule)
        if name != "config.yaml":  # which a person may edit
            (capsule / name).write_bytes(content[:-1] if name != "capsule.json" else content[: len(content) // 2])
            with pytest.raises(CheckpointError, match=Path(name).name):
                read_capsule(capsule)
        (capsule / name).write_bytes(content)
    read_capsule(capsule)


def test_a_flipped_bit_is_found(capsule: Path) -> None:
    weights = capsule / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has checksum"):
        verify_capsule(read_capsule(capsule))


def test_something_else_is_no_capsule(tmp_path: Path) -> None:
    file = tmp_path / "capsule.json"
    file.write_text("{}")
    others = {tmp_path / "nowhere": "does not exist", file: "is a file", tmp_path.parent: "capsule.json is missing"}
    for path, found in others.items():
        with pytest.raises(ConfigError, match=rf"{found}; give a folder such as"):
            read_capsule(path)


def test_a_capsule_of_another_version_is_refused(capsule: Path) -> None:
    file = capsule / "capsule.json"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(CheckpointError, match="schema_version is 2"):
        read_capsule(capsule)


def test_no_record_leads_out_of_the_folder(capsule: Path) -> None:
    (capsule.parent / "secret").write_text("1")
    file = capsule / "capsule.json"
    document = json.loads(file.read_text())
    document["files"].append({"name": "../secret", "num_bytes": 1, "crc32": ""})
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"\.\./secret is missing"):
        read_capsule(capsule)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("token_ids", np.zeros(9, np.float32)),
        ("advantages", np.zeros(8, np.float32)),
        ("lengths.loss_mask", np.array([4, 4], np.int64)),
        ("lengths.token_ids", np.array([9], np.int64)),
        ("lengths.token_ids", np.array([-1, 9], np.int64)),
        ("anything", np.zeros(9, np.float32)),
    ],
)
def test_streams_that_do_not_fit_are_refused(whole: Path, tmp_path: Path, name: str, spoilt: np.ndarray) -> None:
    streams = load_file(whole / "samples.safetensors")
    save_file({**streams, name: spoilt}, tmp_path / "samples.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        read_samples(tmp_path / "samples.safetensors", ["a", "b"])


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_random_states_are_not_unpickled(capsule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(capsule.parent)
    torch.save({"torch": Bomb()}, capsule / "random" / "rank_0.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="hostile"):
        load_random_states(capsule, torch.nn.Linear(1, 1))
    assert not Path("exploded").exists()


def test_random_states_go_on_where_they_were(capsule: Path) -> None:
    module = torch.nn.Linear(1, 1)
    load_random_states(capsule, module)
    first = (torch.rand(3), np.random.rand(2))
    load_random_states(capsule, module)
    assert torch.equal(first[0], torch.rand(3))
    assert np.array_equal(first[1], np.random.rand(2))


def test_a_capsule_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    staging = begin_capsule(tmp_path, 1)
    assert files_below(tmp_path) == []
    discard_capsule(tmp_path, 1)
    assert not staging.exists()
