"""Whatever happens to a checkpoint on its disk, a run goes on from exactly what was saved, or from the one before."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from chatlearn.beginning import FRESH
from chatlearn.checkpoint.layout import DAMAGED, begin, called, publish, recover, set_aside
from chatlearn.checkpoint.manifest import Manifest, verify_checksums
from chatlearn.checkpoint.run_state import RunState, save_run_state
from chatlearn.checkpoint.selection import choose, read_saved
from chatlearn.checkpoint.sharded import load_shards, save_shards
from chatlearn.errors import DamagedCheckpointError, UnreadableError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Fault = Callable[[Path], None]


def saved(root: Path, iteration: int) -> Path:
    """A checkpoint whose weights, moments and state all tell its iteration, with a file of every kind."""
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        module.weight.fill_(iteration)
    optimizer.state[module.weight]["exp_avg"].fill_(iteration)
    staging = begin(root, iteration)
    files = save_shards(staging, module, optimizer)
    save_run_state(staging, replace(FRESH, episode=iteration, train_iteration=iteration, offset=10 * iteration))
    (staging / "config.yaml").write_text("runtime_args: {}\n")
    (staging / "huggingface").mkdir()
    (staging / "huggingface" / "model.safetensors").write_bytes(b"weights for others")
    return publish(root, Manifest(iteration, iteration, "/base", "A", groupgemm=False, num_ranks=1, files=files))


def resume(root: Path) -> RunState | None:
    """What a run does at its start, and what it then holds; the weights must be those of the state."""
    recover(root)
    while True:
        choice = choose(root)
        for damage in choice.damaged:
            set_aside(damage.folder, DAMAGED)
        if choice.newest is None:
            return None
        module = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters())
        try:
            load_shards(choice.newest.folder, module, optimizer)
        except DamagedCheckpointError as damage:
            set_aside(damage.folder, DAMAGED)
            continue
        state = choice.newest.state
        assert state.offset == 10 * state.train_iteration == 10 * state.episode
        assert torch.all(module.weight == state.train_iteration)
        assert torch.all(optimizer.state[module.weight]["exp_avg"] == state.train_iteration)
        return state


def flip(place: float) -> Fault:
    def act(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return act


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


FAULTS: dict[str, Fault] = {
    "first byte": flip(0),
    "some byte": flip(0.37),
    "last byte": flip(1),
    "cut": cut,
    "empty": empty,
    "missing": Path.unlink,
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy")
    for iteration in (1, 2):
        saved(root, iteration)
    return root


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_of_any_file_makes_a_wrong_resume(healthy: Path, tmp_path: Path, name: str) -> None:
    files = files_of(healthy / "2")
    assert {"checkpoint.json", "run_state.json", "config.yaml", "model/.metadata", "random/rank_0.pt"} < set(files)
    for number, file in enumerate(files):
        root = tmp_path / str(number)
        shutil.copytree(healthy, root)
        FAULTS[name](root / "2" / file)
        state = resume(root)
        # A byte of the manifest may stand between two values, where it means nothing; the model for others is not read.
        means_nothing = file == "checkpoint.json" and state is not None and state.episode == 2
        is_whole = means_nothing or file.startswith("huggingface/")
        assert state is not None, file
        assert state.episode == (2 if is_whole else 1), file
        assert [path.name for path in called(root, DAMAGED)] == ([] if is_whole else ["2.damaged"]), file


@pytest.mark.parametrize("file", ["run_state.json", "config.yaml"])
def test_the_driver_believes_no_small_file_that_is_not_what_was_saved(healthy: Path, tmp_path: Path, file: str) -> None:
    """It decides by them before a rank has read anything: whether the run is finished, and with what it is compared."""
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    path = root / "2" / file
    path.write_text(path.read_text().replace('"offset": 20', '"offset": 21').replace("runtime_args", "runtime_argz"))
    choice = choose(root)
    assert choice.newest is not None
    assert choice.newest.folder == root / "1"
    (damage,) = choice.damaged
    assert f"{file} has checksum" in damage.reason


@pytest.mark.parametrize("content", ["", "1", "2\n", "17", "-1", "two", "\x00", "9" * 5000, None])
def test_no_content_of_latest_makes_a_wrong_resume(healthy: Path, tmp_path: Path, content: str | None) -> None:
    """Also an older one, as a crash between a checkpoint and its pointer leaves it."""
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    if content is not None:
        (root / "latest").write_text(content)
    state = resume(root)
    assert state is not None
    assert state.episode == 2
    assert called(root, DAMAGED) == ()


def test_when_all_are_damaged_there_is_none_and_all_stay_for_people(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    cut(root / "2" / "run_state.json")
    flip(0.5)(root / "1" / "model" / "__0_0.distcp")
    assert resume(root) is None
    assert [path.name for path in called(root, DAMAGED)] == ["1.damaged", "2.damaged"]
    assert resume(root) is None
    shutil.copytree(healthy / "2", root / "2")
    cut(root / "2" / "run_state.json")
    assert resume(root) is None
    assert [path.name for path in called(root, DAMAGED)] == ["1.damaged", "2.damaged", "2.damaged.2"]


def test_a_folder_of_somebody_elses_and_one_being_deleted_are_no_damage(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    (root / "9" / "model").mkdir(parents=True)
    (root / "9" / "model" / "notes.txt").write_text("mine")
    shutil.copytree(root / "2", root / "3")
    (root / "3" / "checkpoint.json").rename(root / "3" / "checkpoint.deleted.json")
    (root / "latest").write_text("9")
    choice = choose(root)
    assert choice.newest is not None
    assert choice.newest.folder == root / "2"
    assert choice.damaged == ()


def test_a_damaged_one_will_not_be_in_the_way_of_the_next_save(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    (root / "2" / "checkpoint.json").write_text("{")
    state = resume(root)
    assert state is not None
    assert state.episode == 1
    assert begin(root, 2).is_dir()


def test_a_folder_that_was_renamed_is_damage(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    (root / "2").rename(root / "3")
    (damage,) = choose(root).damaged
    assert "speaks of iteration 2" in damage.reason


@contextmanager
def no_more_open_files() -> Generator[None]:
    """The system opens nothing inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_cannot_be_read_now_is_no_damage(healthy: Path, tmp_path: Path) -> None:
    """Whoever looks at it and at whatever moment: the run ends with the system's words, and all stays as it is."""
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    files = read_saved(root / "2").manifest.files
    looks: tuple[Callable[[], object], ...] = (
        lambda: choose(root),
        lambda: read_saved(root / "2"),
        lambda: verify_checksums(root / "2", files),
        lambda: load_shards(root / "2", module, optimizer),
    )
    for look in looks:
        with no_more_open_files(), pytest.raises(UnreadableError, match=r"cannot be read now: .*Too many open files"):
            look()
    assert resume(root) is not None
    assert called(root, DAMAGED) == ()


def test_the_newest_one_is_not_passed_over_because_it_cannot_be_read_now(healthy: Path, tmp_path: Path) -> None:
    """A socket stands for a file on a disk that fails: it is there, and the system refuses to open it."""
    root = tmp_path / "root"
    shutil.copytree(healthy, root)
    manifest = root / "2" / "checkpoint.json"
    manifest.unlink()
    os.mknod(manifest, stat.S_IFSOCK | 0o600)
    with pytest.raises(UnreadableError, match=rf"{manifest}: cannot be read now"):
        resume(root)
    assert called(root, DAMAGED) == ()
