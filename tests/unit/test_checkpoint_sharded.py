"""One process alone: what is saved comes back to the bit, and nothing in a checkpoint is executed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chatlearn.checkpoint.guarded_reader import GuardedReader
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest, record_file, write_manifest
from chatlearn.checkpoint.saved_tensors import open_shards
from chatlearn.checkpoint.sharded import Restored, load_shards, save_shards
from chatlearn.errors import CheckpointError

# torch remarks on every save and load that one process without a group saves alone; here that is the point.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Pair(nn.Module):
    """A model with a matrix, a scalar, a column-major parameter and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return (self.linear(numbers) * self.scale + self.turned.sum() + self.empty.sum()).square().mean()


class Trained:
    """A model after some steps, with an optimizer that has state."""

    def __init__(self, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.module = Pair()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.02)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.module(torch.randn(2, 5)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def numbers(self) -> list[torch.Tensor]:
        moments = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return [tensor.detach().clone() for tensor in [*self.module.parameters(), *moments]]


def saved(root: Path, trained: Trained) -> Path:
    files = save_shards(begin(root, 1), trained.module, trained.optimizer)
    return publish(root, Manifest(1, 1, "/base", "Pair", groupgemm=False, num_ranks=1, files=files))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("steps_before_loading", [0, 2])
def test_training_goes_on_to_the_bit(tmp_path: Path, steps_before_loading: int) -> None:
    original = Trained(seed=1, steps=3)
    folder = saved(tmp_path, original)
    original.step()  # draws from torch's generator
    original_draws = random.random(), float(np.random.random())

    other = Trained(seed=2, steps=steps_before_loading)
    assert load_shards(folder, other.module, other.optimizer) == Restored(num_ranks_saved=1, random_states=True)
    other.step()
    assert same(other.numbers(), original.numbers())
    assert (random.random(), float(np.random.random())) == original_draws


def test_a_resume_takes_moments_over_and_no_hyperparameters(tmp_path: Path) -> None:
    wishes = {"lr": 0.003, "betas": (0.7, 0.8), "weight_decay": 0.2, "eps": 1e-3}
    original = Trained(seed=1, steps=3)
    folder = saved(tmp_path, original)
    original.optimizer.param_groups[0].update(wishes)
    original.step()

    other = Trained(seed=2, steps=0)
    other.optimizer = torch.optim.AdamW(other.module.parameters(), **wishes)
    load_shards(folder, other.module, other.optimizer)
    assert {name: other.optimizer.param_groups[0][name] for name in wishes} == wishes
    other.step()
    assert same(other.numbers(), original.numbers())


def test_every_file_is_reported_by_the_rank_that_wrote_it(tmp_path: Path) -> None:
    trained = Trained(seed=1, steps=1)
    staging = begin(tmp_path, 1)
    reported = {record.name for record in save_shards(staging, trained.module, trained.optimizer)}
    assert reported == {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_flipped_byte_is_refused_before_anything_changes(tmp_path: Path, part: str) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1))
    shard = folder / part / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    other = Trained(seed=2, steps=1)
    before = other.numbers()
    with pytest.raises(CheckpointError, match=rf"{folder}: {part}/__0_0.distcp has checksum"):
        load_shards(folder, other.module, other.optimizer)
    assert same(other.numbers(), before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1))
    other = nn.Linear(7, 7)
    with pytest.raises(CheckpointError, match=r"/1/model: cannot be loaded into this model"):
        load_shards(folder, other, torch.optim.AdamW(other.parameters()))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    trained = Trained(seed=1, steps=1)
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/model: cannot be written"):
        save_shards(tmp_path, trained.module, trained.optimizer)


class Hostile:
    """A pickle of it creates a file when it is loaded the plain way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def republish(folder: Path) -> None:
    """An attacker repairs sizes and checksums too."""
    (folder / "checkpoint.json").unlink()
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    records = tuple(record_file(folder, name) for name in files)
    write_manifest(folder, Manifest(1, 1, "/base", "Pair", groupgemm=False, num_ranks=1, files=records))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_hostile_metadata_is_refused_by_the_name_of_its_class(tmp_path: Path, part: str) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1))
    (folder / part / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    republish(folder)
    other = Trained(seed=2, steps=1)
    with pytest.raises(CheckpointError, match=r"\.metadata: wants to load builtins\.exec.*refused"):
        load_shards(folder, other.module, other.optimizer)
    assert not (tmp_path / "owned").exists()


def test_a_hostile_object_in_the_place_of_a_tensor_is_not_executed(tmp_path: Path) -> None:
    trained = Trained(seed=1, steps=1)
    trained.optimizer.state[trained.module.scale]["step"] = Hostile(tmp_path / "owned")
    folder = saved(tmp_path, trained)
    other = Trained(seed=2, steps=1)
    with pytest.raises(
        CheckpointError, match=r"optimizer: cannot be loaded.*state\.scale\.step: wants to load builtins\.exec"
    ):
        load_shards(folder, other.module, other.optimizer)
    assert not (tmp_path / "owned").exists()


def test_hostile_random_states_are_not_executed(tmp_path: Path) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1))
    torch.save(Hostile(tmp_path / "owned"), folder / "random" / "rank_0.pt")
    republish(folder)
    other = Trained(seed=2, steps=1)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt: wants to load builtins\.exec"):
        load_shards(folder, other.module, other.optimizer)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "deep/er"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1)) / "model"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        GuardedReader(folder).read_metadata()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not readable"),
        (b"not a pickle", "not readable"),
        (pickle.dumps("text"), "holds str"),
        (pickle.dumps(torch.Size([1])), "holds Size"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=fault):
        GuardedReader(tmp_path).read_metadata()


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        open_shards(tmp_path)


@pytest.mark.parametrize("read_bytes", [1, 24, 1 << 20])
def test_saved_tensors_reads_every_tensor_whatever_its_form(
    tmp_path: Path, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatlearn.checkpoint.saved_tensors.READ_BYTES", read_bytes)
    trained = Trained(seed=1, steps=1)
    tensors = open_shards(saved(tmp_path, trained) / "model")
    parameters = dict(trained.module.named_parameters())
    assert tensors.shapes == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        assert torch.equal(tensors.read(name, torch.float32), parameter)
        assert torch.equal(tensors.read(name, torch.bfloat16), parameter.bfloat16())


def test_a_shard_that_ends_early_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, Trained(seed=1, steps=1)) / "model"
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:700])
    tensors = open_shards(folder)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: '.*' cannot be read"):
        for name in tensors.shapes:
            tensors.read(name, torch.float32)
