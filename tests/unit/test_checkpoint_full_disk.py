"""A disk that is full at any byte of a checkpoint is told of in its own words, and by nothing but ``CheckpointError``.

The kernel refuses what goes beyond a size here, as a full disk does: in the middle of a write, by an ``OSError``.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from chatlearn.beginning import FRESH
from chatlearn.checkpoint.background import BackgroundSaver, take_reports
from chatlearn.checkpoint.capsule import CapsuleFacts, begin_capsule, publish_capsule
from chatlearn.checkpoint.durable import staging_of
from chatlearn.checkpoint.layout import begin, list_complete, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.run_state import save_config, save_run_state
from chatlearn.checkpoint.sharded import save_random_states, shard_state
from chatlearn.cluster.archive import Draft
from chatlearn.errors import CheckpointError
from chatlearn.observability.journal import Journal
from chatlearn.records import Completion, OpenGroup, Prompt, Sample, VersionRun
from chatlearn.saving import save
from chatlearn.team import Team

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

PLENTY = 1_000_000  # bytes in a file: more than any of these has
THE_DISKS_WORDS = "File too large"
# Between two sizes; the smallest file is larger.
STEP_BYTES = 1201


@contextmanager
def room(num_bytes: int) -> Generator[None]:
    """No file may grow beyond so many bytes inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes(folder: Path) -> list[int]:
    """Rooms from none to just too little for the largest file below ``folder``."""
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [*range(0, largest, STEP_BYTES), largest - 1]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose shards are smaller than random states, its moments between the two."""
    module = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("in_background", [True, False])
def test_a_rank_reports_what_the_disk_says_wherever_it_is_full(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], in_background: bool
) -> None:
    saver, told = BackgroundSaver(0, None, on_accelerator=False), set[str]()
    saver.begin(tmp_path / "whole", shard_state(*trained), in_background=in_background)
    saver.wait()
    for size in sizes(tmp_path / "whole"):
        staging = tmp_path / str(size)
        staging.mkdir()
        with room(size):
            saver.begin(staging, shard_state(*trained), in_background=in_background)
            saver.wait()
            fault = saver.fault()
        assert fault is not None, size
        assert THE_DISKS_WORDS in fault, size
        told.add(fault.removeprefix(str(staging)).split(":")[0])
        try:
            assert take_reports(staging, 1) is None, "not even its report could be written"
        except CheckpointError as error:
            assert THE_DISKS_WORDS in str(error)
    saver.close()
    assert told == {"/model", "/optimizer", ""}, "every kind of file should have been the first one that did not fit"


def save_what_the_driver_knows(root: Path) -> Path:
    """The driver's part in a checkpoint, with an answer that nothing was learned from yet."""
    answer = Completion(np.arange(300, dtype=np.int32), np.zeros(300, np.float32), "x", "stop", (VersionRun(1, 300),))
    group = OpenGroup(Prompt("uid", np.arange(9, dtype=np.int32), "?", "source", "1"), (answer,), (), (), 1, 0)
    staging = begin(root, 3)
    save_run_state(staging, replace(FRESH, episode=3, train_iteration=3, open_groups=(group,)))
    save_config(staging, "runtime_args: {}\n" * 20)
    return publish(root, Manifest(3, 3, "/base", "A", groupgemm=False, num_ranks=1))


def keep_a_step(root: Path) -> Path:
    """A capsule but for its weights."""
    nothing = np.zeros(300, np.float32)
    samples = [Sample("uid", np.arange(300, dtype=np.int32), np.ones(300, np.bool_), nothing, nothing)]
    staging = begin_capsule(root, 3)
    save_random_states(staging, nn.Linear(1, 1))
    return publish_capsule(root, CapsuleFacts(3, 3, "interval", 1), samples, "runtime_args: {}\n")


@pytest.mark.parametrize("write", [save_what_the_driver_knows, keep_a_step])
def test_the_driver_and_a_capsule_name_the_folder_wherever_the_disk_is_full(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    for size in sizes(write(tmp_path / "whole")):
        root = tmp_path / str(size)
        with room(size), pytest.raises(CheckpointError, match=rf"^{root}.*{THE_DISKS_WORDS}"):
            write(root)
        assert list_complete(root) == ()
    with room(PLENTY):
        assert write(tmp_path / "again").is_dir()
    assert not staging_of(tmp_path / "again" / "3").exists()


class Driver:
    """What ``save`` sees of a run, its archive and its journal too: it keeps what they are told."""

    metrics_bytes = 0

    def __init__(self, folder: Path) -> None:
        self.root = folder / "save_model"
        self.drafts: list[Draft] = []
        self.mourned: list[str] = []
        self.said: list[str] = []
        folders = SimpleNamespace(save_model=self.root, data_checkpoint=folder / "data_checkpoint")
        base = Path(__file__).resolve().parents[2] / "embedded" / "tiny_qwen3"
        team = SimpleNamespace(
            layout=SimpleNamespace(
                folders=folders, trainer=SimpleNamespace(load=str(base), groupgemm=False, num_ranks=1)
            ),
            args=SimpleNamespace(keep_checkpoints=1, keep_best=None),
            archive=self,
            lora=None,
            provenance=None,
            checkpoint_bytes=1,
            config_text="runtime_args: {}\n",
            saves_hugging_face=False,
        )
        self.team = cast("Team", cast("Any", team))

    def save(self, iteration: int) -> None:
        """Up to the moment in which the ranks would write."""
        state = replace(FRESH, episode=iteration, train_iteration=iteration)
        save(self.team, state, cast("Journal", cast("Any", self)))

    def settle(self) -> None: ...

    def begin(self, draft: Draft) -> None:
        self.drafts.append(draft)

    def mourn(self, _iteration: int, error: CheckpointError) -> None:
        self.mourned.append(str(error))

    def phase(self, _name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def say(self, text: str) -> None:
        self.said.append(text)

    def write(self, _episode: int, _numbers: dict[str, float]) -> None: ...


def test_a_checkpoint_that_is_published_is_saved_whatever_the_disk_says_then(tmp_path: Path) -> None:
    """Neither the file for people nor the copy of the counters fits: both are said, and room is made all the same."""
    driver = Driver(tmp_path)
    for iteration in (1, 2):
        driver.save(iteration)
        (draft,) = driver.drafts
        driver.drafts.clear()
        if iteration == 2:
            (driver.root / ".latest.writing").mkdir()
            (tmp_path / "data_checkpoint" / "run_state.json").unlink()
            (tmp_path / "data_checkpoint").rmdir()
            (tmp_path / "data_checkpoint").write_text("a file in its place")
        draft.complete(())
    assert driver.mourned == []
    assert [line.split("; but")[0] for line in driver.said] == ["checkpoint 2 is complete"] * 2
    assert [folder.name for folder in list_complete(driver.root)] == ["2"]
    assert (driver.root / "latest").read_text() == "1\n", "it is of use to people only"


def test_what_the_driver_could_not_write_leaves_nothing(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    with room(100):
        driver.save(1)
    assert driver.drafts == []
    assert THE_DISKS_WORDS in driver.mourned[0]
    assert list(driver.root.iterdir()) == []
