"""What an earlier life of a run leaves in its directory: nothing of it is mixed with what is written now."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from chatlearn.errors import RunError
from chatlearn.observability.journal import Journal
from chatlearn.observability.sinks import JournalSpec, WandbSpec, keep_until, last_step, metrics_path, wandb_id

QUIET = Console(file=io.StringIO())


def live(spec: JournalSpec, first: int, last: int) -> None:
    """Write these episodes, and answers of a size that tells them apart."""
    with Journal.open(spec, QUIET) as journal:
        for episode in range(first, last + 1):
            journal.write(episode, {"rollout/reward_mean": episode / 8 + (spec.resume_after or 0)})
            (spec.directory / "rollouts").mkdir(exist_ok=True)
            (spec.directory / "rollouts" / f"episode_{episode:06d}.jsonl").write_text(f"{first}\n")


def answers(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in sorted((directory / "rollouts").iterdir())}


def test_answers_go_with_the_numbers_of_their_episode(tmp_path: Path) -> None:
    live(JournalSpec(tmp_path, 9), 1, 5)
    (tmp_path / "rollouts" / "episode_notes.jsonl").write_text("mine\n")
    with Journal.open(JournalSpec(tmp_path, 9, resume_after=3), QUIET):
        pass
    kept = {f"episode_{episode:06d}.jsonl": "1" for episode in (1, 2, 3)}
    assert answers(tmp_path) == {**kept, "episode_notes.jsonl": "mine"}
    assert last_step(metrics_path(tmp_path)) == 3
    with Journal.open(JournalSpec(tmp_path, 9), QUIET):
        pass
    assert answers(tmp_path) == {"episode_notes.jsonl": "mine"}


def test_a_run_killed_before_its_first_checkpoint_leaves_no_point_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = JournalSpec(tmp_path, 4, tensorboard_dir=tmp_path / "tensorboard")
    live(spec, 0, 3)
    live(spec, 0, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("rollout/reward_mean")] == [0, 1, 2]


@pytest.mark.parametrize("damaged", [b'{"step": 2, "rew\n', b"\xff\n", b"[2]\n", b'{"step": "2"}\n', b"\n"])
def test_a_line_that_is_none_is_named_and_nothing_is_cut(tmp_path: Path, damaged: bytes) -> None:
    path = metrics_path(tmp_path)
    before = b'{"step": 1}\n' + damaged + b'{"step": 3}\n'
    path.write_bytes(before)
    with pytest.raises(RunError, match=rf"{path}, line 2: is not what a run writes.*mend or remove the line"):
        keep_until(path, 2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert last_step(path) == 3
    keep_until(path, None)
    assert path.read_bytes() == b""
    assert last_step(path) is None


def test_a_last_line_that_was_cut_by_a_crash_is_no_damage(tmp_path: Path) -> None:
    path = metrics_path(tmp_path)
    path.write_text('{"step": 1, "x": "ä"}\n{"step": 2', encoding="utf-8")
    keep_until(path, 2)
    assert json.loads(path.read_text("utf-8")) == {"step": 1, "x": "ä"}


def spec_of(directory: Path, run_id: str | None = None, resume: str = "allow") -> WandbSpec:
    return WandbSpec(project="tests", directory=directory / "wandb", name=None, run_id=run_id, resume=resume)


def test_a_run_keeps_its_identity_at_wandb_until_it_begins_anew(tmp_path: Path) -> None:
    first = wandb_id(tmp_path, spec_of(tmp_path), resumed=False)
    assert first
    assert wandb_id(tmp_path, spec_of(tmp_path), resumed=True) == first
    assert wandb_id(tmp_path, spec_of(tmp_path, "mine"), resumed=True) == "mine"
    assert wandb_id(tmp_path, spec_of(tmp_path, resume="never"), resumed=True) is None
    assert wandb_id(tmp_path, spec_of(tmp_path), resumed=True) == first
    second = wandb_id(tmp_path, spec_of(tmp_path), resumed=False)
    assert second not in (None, first)
