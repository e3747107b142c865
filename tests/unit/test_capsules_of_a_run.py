"""Which steps a run keeps, how many, and that neither a full disk nor an earlier life of the run changes its course."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from capsules import one_sample
from full_disk import no_file_beyond

from chatlearn.batch.plan import BatchLayout
from chatlearn.checkpoint.capsule import CAPSULES_FOLDER, INTERVAL, fault_of, prune, walk
from chatlearn.checkpoint.durable import STAGING_PREFIX, files_below
from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.cluster.groups import TrainerGroup
from chatlearn.cluster.workers import Luggage
from chatlearn.episode import learn
from chatlearn.errors import RunError
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.records import StepStats
from chatlearn.saving import MAX_BAD_STEPS

TINY = Path(__file__).resolve().parents[2] / "embedded" / "tiny_qwen3"
GOOD = StepStats(
    loss=0.5, pg_loss=0.5, kl_loss=0.0, entropy=1.0, grad_norm=1.0, clip_fraction=0.0, lr=1e-6, num_tokens=9,
    num_loss_tokens=5, rollout_logprob_diff_mean=0.0, rollout_logprob_diff_max=0.0, rollout_kl=0.0,
)  # fmt: skip
BAD = replace(GOOD, grad_norm=float("nan"))
WEIGHTS = "weights.bin"
NUM_BYTES = 100_000  # more than the descriptions of a capsule, so that a limit can be between them


@dataclass
class Ranks:
    """Stands for two processes: the second writes weights, if the disk takes them, and no step computes anything."""

    steps: list[StepStats]
    members: tuple[int, int] = (0, 1)

    def each(self, verb: str, arguments: Sequence[object]) -> list[StepStats]:
        return [self.steps.pop(0)] * 2

    def map(self, verb: str, base_dir: Path, staging: Path) -> list[str | None]:
        assert verb == "save_capsule"
        try:
            (staging / WEIGHTS).write_bytes(bytes(NUM_BYTES))
        except OSError as error:
            return [None, str(error)]
        return [None, None]


@dataclass
class Sheet:
    """Stands for a page: keeps what is said."""

    said: list[str] = field(default_factory=list[str])

    @contextmanager
    def phase(self, name: str) -> Any:
        yield

    def say(self, text: str) -> None:
        self.said.append(text)


class Life:
    """One process of a run that takes these steps."""

    def __init__(self, output: Path, steps: str, interval: int = 0, keep: int = 0) -> None:
        ranks = cast("Any", Ranks([{".": GOOD, "x": BAD}[step] for step in steps]))
        layout = BatchLayout(2, packing=True, max_tokens=8, micro_batch_size=1)
        self.team = SimpleNamespace(
            args=SimpleNamespace(capsule_interval=interval, keep_checkpoints=keep),
            trainer=TrainerGroup(ranks, layout, layout, Luggage(weights=False, optimizer=False)),
            layout=SimpleNamespace(
                folders=SimpleNamespace(output=output), trainer=SimpleNamespace(load="model", num_ranks=2)
            ),
            config_text="",
        )
        self.page = Sheet()

    def step(self, iteration: int) -> None:
        learn(cast("Any", self.team), cast("Any", self.page), [one_sample()], 1, iteration)

    def steps(self, first: int, last: int) -> None:
        for iteration in range(first, last + 1):
            self.step(iteration)


def kept(output: Path) -> dict[int, str]:
    """Iteration and reason of every capsule; nothing else may lie there."""
    folders = sorted((output / CAPSULES_FOLDER).iterdir())
    documents = [json.loads((folder / "capsule.json").read_text()) for folder in folders]
    assert all((folder / WEIGHTS).stat().st_size == NUM_BYTES for folder in folders)
    return {document["iteration"]: document["reason"] for document in documents}


def test_the_newest_of_the_interval_are_kept_and_every_bad_step(tmp_path: Path) -> None:
    Life(tmp_path, ".x....x...", interval=2, keep=2).steps(1, 10)
    assert kept(tmp_path) == {2: "bad step", 7: "bad step", 8: "interval", 10: "interval"}
    Life(tmp_path / "all", "....", interval=1).steps(1, 4)
    assert list(kept(tmp_path / "all")) == [1, 2, 3, 4]


def test_those_of_an_earlier_life_are_the_oldest(tmp_path: Path) -> None:
    Life(tmp_path, ".....x", interval=1, keep=3).steps(1, 6)
    assert list(kept(tmp_path)) == [3, 4, 5, 6]
    (tmp_path / CAPSULES_FOLDER / f"{STAGING_PREFIX}iteration_000007").mkdir()  # killed while it wrote this one
    Life(tmp_path, "..", interval=1, keep=3).steps(1, 2)
    assert kept(tmp_path) == {1: "interval", 2: "interval", 5: "interval", 6: "bad step"}


def test_what_is_no_capsule_of_the_interval_is_never_deleted(tmp_path: Path) -> None:
    recorded = json.dumps({"reason": INTERVAL})
    contents = {"iteration_000001": "{", "iteration_000003.copy": recorded, "elsewhere": recorded}
    for name, content in {**contents, "iteration_000005": recorded}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "capsule.json").write_text(content)
    (tmp_path / "iteration_000002").mkdir()
    (tmp_path / "iteration_000004").symlink_to(tmp_path / "elsewhere")
    before = files_below(tmp_path)
    prune(tmp_path, iteration=9, keep=1)
    assert files_below(tmp_path) == before


def test_steps_that_went_wrong_in_an_earlier_life_do_not_end_a_healthy_one(tmp_path: Path) -> None:
    bad = "x" * MAX_BAD_STEPS
    Life(tmp_path, f".{bad[1:]}").steps(1, MAX_BAD_STEPS)  # Killed here: it goes on from step 1, with better numbers.
    later = Life(tmp_path, "..." + bad[3:] + "x.")
    later.steps(2, MAX_BAD_STEPS + 3)
    assert not any("not finite" in said for said in later.page.said)


def test_steps_that_keep_going_wrong_end_the_run_also_where_nothing_can_be_kept(tmp_path: Path) -> None:
    life = Life(tmp_path, "x.xxxxx")
    with no_file_beyond(10):
        life.steps(1, MAX_BAD_STEPS + 1)
        with pytest.raises(RunError, match=rf"the last {MAX_BAD_STEPS} optimizer steps, up to step 7, are not finite"):
            life.step(7)
    assert sum("is not kept" in said for said in life.page.said) == 6


@pytest.mark.parametrize("room", [0, 1000, NUM_BYTES - 1])
def test_a_capsule_that_does_not_fit_is_told_of_takes_no_room_and_ends_nothing(tmp_path: Path, room: int) -> None:
    life = Life(tmp_path, "...", interval=1)
    life.step(1)
    with no_file_beyond(room):
        life.step(2)
    assert list(kept(tmp_path)) == [1]
    life.step(3)
    assert list(kept(tmp_path)) == [1, 3]
    (said,) = [said for said in life.page.said if "is not kept" in said]
    assert said.startswith("what step 2 consumed is not kept: ")


def test_a_rank_that_cannot_write_takes_part_in_gathering_to_the_end(tmp_path: Path) -> None:
    """Else the others would wait for ever: every tensor is gathered by all."""
    gathered: list[str] = []
    with StoredWeights(TINY) as stored:

        def stream() -> Any:
            for name in stored.files:
                gathered.append(name)
                yield name, stored.whole(name).to(torch.float32)

        base, adapter = stream(), iter(("factor",))
        with no_file_beyond(2000):
            fault = fault_of(
                lambda: walk([write_hugging_face(base, TINY, tmp_path / "model", "float32")]), base, adapter
            )
        assert fault is not None
        assert "cannot be written" in fault
        assert gathered == list(stored.files)
        assert list(adapter) == []
    assert list(tmp_path.iterdir()) == []
