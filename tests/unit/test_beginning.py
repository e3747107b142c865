"""Where a run begins: what it compares, what it refuses, what it says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from earlier_runs import ROOT, Runs, record

from chatlearn.beginning import FRESH
from chatlearn.checkpoint.layout import begin, prune, publish, set_aside
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.run_state import save_run_state
from chatlearn.cli import main
from chatlearn.errors import CheckpointError, ConfigError


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_a_run_goes_on_from_the_newest_checkpoint_and_says_nothing(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.begin() == FRESH
    runs.save(4)
    runs.save(7)
    assert runs.begin().episode == runs.rehearse().episode == 7
    assert capsys.readouterr().err == ""


def test_a_run_that_begins_anew_where_another_saved_nothing_says_so(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.start()
    assert capsys.readouterr().err == ""
    metrics = runs.folder / "output" / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    runs.start()
    assert capsys.readouterr().err == (
        f"{metrics.parent} holds 2 episodes of a run that saved no checkpoint; they are begun anew\n"
    )
    assert metrics.read_text() == ""


def test_a_damaged_one_is_put_aside_and_said_and_a_dry_run_only_says_it(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (4, 7):
        runs.save(iteration)
    (runs.root / "7" / "run_state.json").write_text("{}")
    assert runs.rehearse().episode == 4
    (said,) = capsys.readouterr().err.splitlines()
    assert "checkpoint" in said
    assert "/7 is damaged, and a run would put it aside" in said
    assert (runs.root / "7").is_dir()
    assert runs.begin().episode == 4
    (said,) = capsys.readouterr().err.splitlines()
    assert "put aside as" in said
    assert "7.damaged" in said
    assert "run_state.json" in said
    assert (runs.root / "7.damaged").is_dir()


def test_a_model_for_others_that_was_moved_away_is_said_and_the_checkpoint_is_as_good(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.save(4, file="huggingface/config.json")
    assert runs.begin().episode == 4
    assert capsys.readouterr().err == ""
    (folder / "huggingface").rename(runs.folder / "served")
    for attempt in (runs.rehearse, runs.begin, lambda: runs.begin(BACK)):
        assert attempt().episode == 4
        (said,) = capsys.readouterr().err.splitlines()
        assert f"{folder}/huggingface/config.json is not there as it was saved" in said
    assert runs.present() == ["4"]


def test_a_folder_in_the_way_of_a_later_checkpoint_is_named_before_the_start(runs: Runs) -> None:
    for name in ("3", "5"):
        (runs.root / name).mkdir(parents=True)
        (runs.root / name / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"{runs.root / '3'}, {runs.root / '5'}; move them away"):
        runs.rehearse()
    runs.save(4)
    with pytest.raises(ConfigError, match=rf"none themselves: {runs.root / '5'}; move"):
        runs.begin()
    (runs.root / "5").rename(runs.folder / "5")
    assert runs.begin().episode == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(runs: Runs) -> None:
    (runs.save(4) / "run_state.json").unlink()
    for attempt, name in ((runs.rehearse, "4"), (runs.begin, "4.damaged"), (runs.begin, "4.damaged")):
        with pytest.raises(CheckpointError, match=rf"no complete checkpoint is left.*damaged: {name}\. Put back"):
            attempt()
    (runs.root / "4.damaged").rename(runs.folder / "elsewhere")
    assert runs.begin() == FRESH


def test_harmful_differences_are_all_named_with_both_values_and_nothing_is_started(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.save(4)
    command = ["grpo", "-c", str(ROOT / "template" / "quickstart.yaml"), *runs.words("runtime_args.seed=7")]
    other = ["models.policy.num_inference_per_prompt=4", "models.policy_trainer.lora.rank=2"]
    for words in ([*command, *other, "--dry-run"], [*command, *other]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "runtime_args.seed=7 was 1234 when checkpoint 4 was saved: the order of the prompts" in said
        assert "models.policy.num_inference_per_prompt=4 was 8 when" in said
        assert "models.policy_trainer.lora.rank=2 was 0 when" in said
        assert said.count("runtime_args.resume_anyway=True") == 3
    assert not (runs.folder / "output" / "metrics.jsonl").exists()
    assert main([*command, "--dry-run", "runtime_args.resume_anyway=True"]) == 0
    said = capsys.readouterr().err
    assert "going on although runtime_args.seed=7 was 1234" in said
    assert "a run would go on from checkpoint 4, after episode 4" in said


def test_harmless_differences_are_listed_once(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.save(4)
    words = ("models.policy_trainer.num_gpu=1", "models.policy_trainer.optimizer.lr=0.5", "runtime_args.num_episode=99")
    assert runs.begin(*words).episode == 4
    heading, *lines = capsys.readouterr().err.splitlines()
    assert heading == "other than in the run that saved checkpoint 4:"
    assert lines == [
        "  runtime_args.num_episode: 20 -> 99",
        "  models.policy_trainer.num_gpu: 2 -> 1",
        "  models.policy_trainer.optimizer.lr: 0.0002 -> 0.5",
    ]


def test_data_and_model_count_by_what_they_hold(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    state = replace(FRESH, epoch=3, offset=1, deferred=(1,))
    runs.save(4, state=state)
    moved = (
        f"runtime_args.data_path={runs.folder / 'moved.json'}",
        f"models.policy_trainer.load={runs.folder / 'moved'}",
    )
    shutil.copytree(runs.folder / "model", runs.folder / "moved")
    shutil.copy(runs.folder / "train.json", runs.folder / "moved.json")
    found = runs.begin(*moved)
    assert (found.epoch, found.offset, found.deferred) == (3, 1, (1,))
    assert "moved.json" in capsys.readouterr().err

    (runs.folder / "train.json").write_text(record(3) + record(2))
    with pytest.raises(ConfigError, match=r"data_path=.*train.json does not hold what it did when checkpoint 4"):
        runs.rehearse()
    found = runs.begin("runtime_args.resume_anyway=True")
    assert (found.episode, found.epoch, found.offset, found.deferred) == (4, 3, 0, ())
    assert "pass 4 over the data begins anew" in capsys.readouterr().err
    shutil.rmtree(runs.folder / "moved")
    shutil.copytree(ROOT / "embedded" / "tiny_qwen3_moe", runs.folder / "moved")
    with pytest.raises(ConfigError) as caught:
        runs.begin(*moved)
    (problem,) = caught.value.problems
    assert (
        f"models.policy_trainer.load={runs.folder / 'moved'} does not hold what {runs.folder / 'model'} did" in problem
    )


def test_a_checkpoint_of_an_older_version_is_not_compared_and_that_is_said(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run_state(begin(runs.root, 4), replace(FRESH, episode=4, train_iteration=4))
    publish(runs.root, Manifest(4, 4, "base", "A", groupgemm=False, num_ranks=2))
    assert runs.begin("runtime_args.seed=7").episode == 4
    assert "holds no config.yaml" in capsys.readouterr().err


def test_a_resume_that_is_switched_off_refuses_a_directory_of_another_run(runs: Runs) -> None:
    runs.save(4)
    with pytest.raises(ConfigError, match="holds the checkpoint 4 of an earlier run"):
        runs.begin("runtime_args.enable_resume_training=False")


BACK = "runtime_args.load_data_checkpoint_iteration=4"


def test_a_run_goes_back_once_and_the_same_command_goes_on_after_a_crash(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (2, 4, 6, 8):
        runs.save(iteration)
    assert runs.rehearse(BACK).episode == 4
    assert "going back to checkpoint 4; newer ones are put aside when the run starts: 6, 8" in capsys.readouterr().err
    assert runs.present() == ["2", "4", "6", "8"]
    state = runs.start(BACK)
    assert (state.episode, state.gone_back_to) == (4, 4)
    assert runs.present() == ["2", "4", "6.abandoned", "8.abandoned"]

    capsys.readouterr()  # A crash before anything was saved: neither way to start again leads anywhere else.
    assert (runs.start(BACK).episode, runs.start().episode) == (4, 4)
    assert capsys.readouterr().err == ""

    runs.save(6, state=state)
    again = runs.start(BACK)
    assert (again.episode, again.gone_back_to) == (6, 4)
    assert "has gone back to checkpoint 4 before" in capsys.readouterr().err
    runs.save(8, state=again)
    assert (runs.start(BACK).episode, runs.start().episode) == (8, 8)
    assert runs.present() == ["2", "4", "6", "8", "6.abandoned", "8.abandoned"]


def test_a_crash_in_the_middle_of_going_back_leaves_the_newest_one_to_go_on_from(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones are put aside first: without the key the run goes on from its end, with it it goes back."""
    for iteration in (2, 4, 6, 8):
        runs.save(iteration)

    def crash_at_the_last(folder: Path, ending: str) -> Path:
        if folder.name == "8":
            raise KeyboardInterrupt
        return set_aside(folder, ending)

    monkeypatch.setattr("chatlearn.beginning.set_aside", crash_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        runs.start(BACK)
    monkeypatch.undo()
    assert runs.present() == ["2", "4", "8", "6.abandoned"]
    assert runs.begin().episode == 8
    assert runs.start(BACK).episode == 4
    assert runs.present() == ["2", "4", "6.abandoned", "8.abandoned"]


def test_one_that_was_given_up_and_gets_its_number_back_is_a_checkpoint_again(runs: Runs) -> None:
    for iteration in (2, 4, 6):
        runs.save(iteration)
    runs.save(5, state=runs.start(BACK))
    (runs.root / "6.abandoned").rename(runs.root / "6")
    assert runs.begin().episode == 6


def test_a_run_can_go_back_to_the_same_place_after_it_went_elsewhere(runs: Runs) -> None:
    for iteration in (2, 4, 6):
        runs.save(iteration)
    runs.save(6, state=runs.start(BACK))
    runs.save(8, state=runs.start())
    elsewhere = runs.start("runtime_args.load_data_checkpoint_iteration=6")
    assert (elsewhere.episode, elsewhere.gone_back_to) == (6, 6)
    runs.save(8, state=elsewhere)
    assert runs.start(BACK).episode == 4
    assert runs.present() == ["2", "4", "6.abandoned", "8.abandoned", "6.abandoned.2", "8.abandoned.2"]


def test_what_was_given_up_is_pruned_first_and_never_taken(runs: Runs) -> None:
    for iteration in (2, 4, 6):
        runs.save(iteration)
    state = runs.start(BACK)
    prune(runs.root, keep=3)
    assert runs.present() == ["2", "4", "6.abandoned"]
    runs.save(5, state=state)
    assert runs.begin().episode == 5
    prune(runs.root, keep=3)
    assert runs.present() == ["2", "4", "5"]


def test_a_damaged_one_that_was_given_up_is_left_to_people_and_the_best_is_no_longer_one_of_them(runs: Runs) -> None:
    for iteration, score in ((2, 0.1), (4, 0.2), (6, 0.9)):
        runs.save(iteration, state=replace(FRESH, evaluation={"eval/x/avg@1": score}))
    prune(runs.root, 0, "eval/x/avg@1")
    assert (runs.root / "best").read_text() == "6\n"
    state = runs.start(BACK)
    assert not (runs.root / "best").exists()
    (runs.root / "6.abandoned" / "checkpoint.json").write_text("{")
    runs.save(6, state=replace(state, evaluation={}))
    prune(runs.root, 1, "eval/x/avg@1")
    assert (runs.root / "best").read_text() == "4\n"
    assert runs.present() == ["4", "6", "6.abandoned"]


def test_an_iteration_that_is_not_there_is_refused_with_those_that_are(runs: Runs) -> None:
    for attempt in (runs.rehearse, runs.begin):
        with pytest.raises(ConfigError, match="has no such checkpoint; complete ones: none"):
            attempt(BACK)
    runs.save(2)
    runs.save(6)
    with pytest.raises(ConfigError, match=r"load_data_checkpoint_iteration=4: .* complete ones: 2, 6"):
        runs.begin(BACK)
    with pytest.raises(ConfigError, match="enable_resume_training=False not to; leave one of them out"):
        runs.config(BACK, "runtime_args.enable_resume_training=False")


def test_a_run_does_not_give_up_newer_checkpoints_for_a_damaged_one(runs: Runs) -> None:
    folder = runs.save(4, file="model/shard")
    runs.save(6)
    (folder / "model" / "shard").write_text("weighty")
    with pytest.raises(CheckpointError, match="model/shard has checksum"):
        runs.start(BACK)
    assert runs.present() == ["4", "6"]
    assert runs.begin().episode == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime_args.save_episode_interval=0"], "needs checkpoints; set runtime_args.save_episode_interval"),
        (["runtime_args.eval_episode_interval=0"], "needs evaluations; set runtime_args.eval_data_path and"),
        (
            [
                f"runtime_args.{name}"
                for name in ("save_episode_interval=4", "eval_episode_interval=7", "num_episode=20")
            ],
            "none of the 20 episodes is both saved and evaluated",
        ),
        (
            ["runtime_args.eval_samples_per_prompt=4"],
            "use one of eval/openai/gsm8k/avg@4, eval/eval_openai/gsm8k, eval",
        ),
        (["runtime_args.keep_best=eval/arithmetic/avg@1"], "is no number that this run's evaluation has"),
    ],
)
def test_the_best_checkpoint_can_only_be_kept_by_a_number_that_there_will_be(
    runs: Runs, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    command = ["grpo", "-c", str(ROOT / "template" / "quickstart.yaml"), "--dry-run"]
    asked = [*runs.words(), "runtime_args.keep_best=eval/openai/gsm8k/avg@1", "runtime_args.eval_samples_per_prompt=1"]
    assert main([*command, *asked, *overrides]) == 2
    assert message in capsys.readouterr().err
    assert main([*command, *asked]) == 0


@pytest.mark.parametrize("word", ["False", "null", "0"])
def test_the_best_checkpoint_is_not_kept_where_that_is_switched_off(runs: Runs, word: str) -> None:
    config, _ = runs.config(f"runtime_args.keep_best={word}")
    assert config.runtime_args.keep_best is None
