"""Two runs compared to the bit: every planted fault is named, as the first of those that follow from it."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.run_state import RunState, save_run_state
from chatlearn.checkpoint.saved_tensors import open_shards
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.cli import main
from chatlearn.config.environment import Environment
from chatlearn.config.layout import TRAINER_CHECKPOINTS, layout_of
from chatlearn.config.read import read_config
from chatlearn.disk_room import size_of_checkpoint
from chatlearn.errors import ConfigError, RunError
from chatlearn.observability.describe import is_measured
from chatlearn.resume_check import command
from chatlearn.resume_check.child import Child, started
from chatlearn.resume_check.command import metrics_at_save, require_gone_on, require_proof
from chatlearn.resume_check.comparison import Kind, compare_runs
from chatlearn.resume_check.parting import Parting, parting
from chatlearn.resume_check.trial import OWNER_NAME, Trial, prepare_folder, trial_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "template" / "quickstart.yaml"
Fault = Callable[[Path], None]


def leave_run(output: Path, step_s: float) -> Path:
    """What a run of two episodes leaves, each of them saved; ``step_s`` is what its machine took for a step."""
    torch.manual_seed(5)
    module = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    (output / "rollouts").mkdir(parents=True)
    metrics = [{"step": 0, "time": step_s, "schema": 1, "eval/math/avg@1": 0.5}]
    for episode in (1, 2):
        module(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        lines = [
            {"prompt_uid": f"0_{episode}", "token_ids": [episode, 7], "rollout_logprobs": [-0.5, -1.0], "reward": row}
            for row in (0.0, 1.0)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (output / "rollouts" / f"episode_{episode:06d}.jsonl").write_text(text)
        numbers = {"policy_trainer/loss": 0.1 * episode, "policy_trainer/entropy": None, "time/train": step_s}
        metrics += [{"step": episode, "schema": 1, **numbers}, {"step": episode, "schema": 1, "time/save": step_s}]
        root = output / TRAINER_CHECKPOINTS
        staging = begin(root, episode)
        files = save_shards(staging, module, optimizer)
        save_run_state(staging, RunState(episode, episode, episode, 0, episode, metrics_bytes=int(1000 * step_s)))
        publish(root, Manifest(episode, episode, "base", "Any", groupgemm=False, num_ranks=1, files=files))
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_run(tmp_path_factory.mktemp("first") / "run", step_s=0.2)


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """The same on a slower machine."""
    return leave_run(tmp_path / "run", step_s=0.3)


def test_runs_that_differ_in_what_the_machine_says_alone_are_equal(uninterrupted: Path, resumed: Path) -> None:
    compared = compare_runs(uninterrupted, resumed)
    assert compared.difference is None
    assert compared.document() == {
        "equal": True,
        "compared": {
            "data_order": 4,
            "rollouts": 4,
            "metrics": 8,
            "checkpoints": 2,
            "run_state": 22,
            "weights": 4,
            "optimizer": 12,
            "random_states": 2,
        },
        "first_difference": None,
    }


def replaced(file: str, old: str, new: str) -> Fault:
    """A fault in a text."""

    def act(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new, 1))

    return act


def flipped(folder: str, name: str) -> Fault:
    """The lowest bit of a saved tensor's second number."""

    def act(run: Path) -> None:
        shards = run / TRAINER_CHECKPOINTS / "2" / folder
        values = open_shards(shards).read_as_saved(name)
        (file,) = shards.glob("*.distcp")
        content = bytearray(file.read_bytes())
        begin_of_values = content.find(values.numpy().tobytes())
        assert begin_of_values >= 0
        content[begin_of_values + 4] ^= 1
        file.write_bytes(content)

    return act


def redrawn(run: Path) -> None:
    """Another state of the random generators."""
    file = run / TRAINER_CHECKPOINTS / "2" / "random" / "rank_0.pt"
    states = torch.load(file, weights_only=True)
    states["torch"][17] ^= 1
    content = BytesIO()
    torch.save(states, content)
    file.write_bytes(content.getvalue())


def removed(run: Path) -> None:
    shutil.rmtree(run / TRAINER_CHECKPOINTS / "2")


def doubled(run: Path) -> None:
    """The line of an episode that ran twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[3]]))


EPISODE_2 = "rollouts/episode_000002.jsonl"
STATE_2 = f"{TRAINER_CHECKPOINTS}/2/run_state.json"


@pytest.mark.parametrize(
    ("fault", "kind", "episode", "place"),
    [
        (replaced("metrics.jsonl", "0.5", "0.25"), "metrics", 0, "eval/math/avg@1"),
        (replaced(EPISODE_2, '"0_2"', '"0_1"'), "data_order", 2, "prompt_uid in line 1"),
        (replaced(EPISODE_2, "[2, 7]", "[2, 8]"), "rollouts", 2, "line 1.token_ids[1]"),
        (replaced(EPISODE_2, "-0.5", "-0.5000001"), "rollouts", 2, "line 1.rollout_logprobs[0]"),
        (replaced(EPISODE_2, "[2, 7]", "[2, 7, 7]"), "rollouts", 2, "line 1.token_ids[2]"),
        (replaced("metrics.jsonl", '"policy_trainer/loss": 0.2', '"policy_trainer/loss": 0.20000000000000004'),
         "metrics", 2, "policy_trainer/loss"),
        (replaced("metrics.jsonl", "null", "1.0"), "metrics", 1, "policy_trainer/entropy"),
        (doubled, "metrics", 2, "schema"),
        (removed, "checkpoints", 2, "iteration"),
        (replaced(STATE_2, '"offset": 2', '"offset": 3'), "run_state", 2, "offset"),
        (flipped("model", "weight"), "weights", 2, "weight[0, 1] (1 of 12 elements differ)"),
        (flipped("optimizer", "state.weight.exp_avg"), "optimizer", 2,
         "state.weight.exp_avg[0, 1] (1 of 12 elements differ)"),
        (redrawn, "random_states", 2, "rank_0.pt.torch[17] (1 of 5056 elements differ)"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(
    uninterrupted: Path, resumed: Path, fault: Fault, kind: Kind, episode: int, place: str
) -> None:
    fault(resumed)
    found = compare_runs(uninterrupted, resumed).difference
    assert found is not None
    assert (found.kind, found.episode, found.place) == (kind, episode, place)


def test_of_several_faults_the_one_that_arose_first_is_named(uninterrupted: Path, resumed: Path) -> None:
    flipped("model", "weight")(resumed)
    replaced("rollouts/episode_000001.jsonl", "-1.0", "-1.5")(resumed)
    compared = compare_runs(uninterrupted, resumed)
    assert str(compared.difference) == (
        "rollouts of episode 1: line 1.rollout_logprobs[1] is -1.0 in the uninterrupted run and -1.5 in the resumed one"
    )
    assert compared.document()["first_difference"] == {
        "kind": "rollouts",
        "episode": 1,
        "place": "line 1.rollout_logprobs[1]",
        "uninterrupted": -1.0,
        "resumed": -1.5,
    }


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (math.nan, math.nan, None),
        (0.0, -0.0, Parting("", 0.0, -0.0)),
        (1, True, Parting("", 1, True)),
        ({"a": (1, [2])}, {"a": (1, [2])}, None),
        (torch.tensor(math.nan), torch.tensor(math.nan), None),
        (torch.tensor([0.0]), torch.tensor([-0.0]), Parting("[0] (1 of 1 elements differ)", 0.0, -0.0)),
        (torch.zeros(0, 3), torch.zeros(0, 3), None),
        (torch.ones((), dtype=torch.bfloat16), torch.ones((), dtype=torch.bfloat16), None),
    ],
)
def test_values_are_the_same_where_their_bits_are(first: object, second: object, found: Parting | None) -> None:
    assert repr(parting(first, second)) == repr(found)


def test_tensors_of_another_shape_or_dtype_differ_as_a_whole() -> None:
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        found = parting(torch.zeros(2, 3), other)
        assert found is not None
        assert found.place == ""


def test_what_measures_the_machine_is_told_by_its_name() -> None:
    measured = {
        "time", "time/episode", "time/save", "engine/timer_summary/tps_throughput", "rollout/engine_busy_s",
        "rollout/tokens_per_s", "rollout/replaced_engines", "rule_reward/replaced_graders", "sync/seconds",
        "sync/checksum_seconds", "sync/gigabytes_per_s", "policy_trainer/memory_gb", "policy_trainer/mfu",
    }  # fmt: skip
    computed = {
        "policy_trainer/loss", "policy_trainer/grad_norm", "policy_trainer/steps", "rollout/truncated_ratio",
        "rollout/response_tokens", "sync/version", "rule_reward/grader_errors", "numerics/rollout_kl", "schema",
        "rule_reward/uses_s", "eval/in_seconds", "engine/timers", "timely",
    }  # fmt: skip
    assert {name for name in measured | computed if is_measured(name)} == measured


def trial(output: Path, *overrides: str, episodes: int = 3, cut: int = 1) -> Trial:
    words = [f"runtime_args.output_dir={output}", *overrides]
    return trial_of(read_config(QUICKSTART, words), QUICKSTART, words, episodes, cut)


def test_both_runs_are_told_the_same_and_stay_in_the_folder_of_the_check(tmp_path: Path) -> None:
    mine = ("runtime_args.seed=7", f"runtime_args.data_checkpoint_path={tmp_path}/mine")
    going_back = "runtime_args.load_data_checkpoint_iteration=4"
    best = ("runtime_args.keep_best=eval/x/avg@1", "runtime_args.eval_episode_interval=20")  # the last of the file's
    check = trial(tmp_path, *mine, going_back, *best)
    configs = [
        read_config(QUICKSTART, check.command(output)[5:]) for output in (check.uninterrupted, check.interrupted)
    ]
    runtimes = [config.runtime_args for config in configs]
    assert [runtime.output_dir for runtime in runtimes] == [
        str(tmp_path / "resume_check" / name) for name in ("uninterrupted", "interrupted")
    ]
    for runtime in runtimes:
        assert (runtime.seed, runtime.num_episode, runtime.save_episode_interval, runtime.keep_checkpoints) == (
            7,
            3,
            1,
            0,
        )
        assert runtime.data_checkpoint_path == f"{runtime.output_dir}/data_checkpoint_path"
        assert not runtime.log_args_dict.enable_tensorboard
        assert (runtime.keep_best, runtime.load_data_checkpoint_iteration) == (None, None)


@pytest.mark.parametrize(
    ("overrides", "episodes", "cut", "message"),
    [
        ((), 3, 3, "--cut 3 must be at least 1 and less than --episodes 3"),
        (("runtime_args.num_episode=9",), 3, 1, "runtime_args.num_episode=9 cannot be chosen: the check sets"),
        (("runtime_args.max_data_ckpt_nums=1",), 3, 1, "sets runtime_args.keep_checkpoints itself"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], episodes: int, cut: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trial(tmp_path, *overrides, episodes=episodes, cut=cut)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "resume_check" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    words = ["resume-check", "-c", str(QUICKSTART), f"runtime_args.output_dir={tmp_path}"]
    assert main([*words, "--episodes", "3", "--cut", "1"]) == 2
    assert "is in the way, and no check of a resume made it" in capsys.readouterr().err
    assert mine.read_text() == "years of work"


def test_the_folder_of_an_earlier_check_is_replaced_and_that_of_one_in_progress_is_not(tmp_path: Path) -> None:
    root = tmp_path / "resume_check"
    prepare_folder(root)
    with pytest.raises(ConfigError, match=f"in use by another check, process {os.getpid()} on {socket.gethostname()}"):
        trial(tmp_path)
    owner = json.loads((root / OWNER_NAME).read_text())
    (root / OWNER_NAME).write_text(json.dumps(owner | {"begun": "earlier"}))
    (root / "leftover").touch()
    prepare_folder(trial(tmp_path).root)
    assert [path.name for path in root.iterdir()] == [OWNER_NAME]


def test_a_run_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    program = "import sys; print('reason'); sys.exit(3)"
    with (
        pytest.raises(RunError, match=r"status 3; the end of .*log:\nreason"),
        started([sys.executable, "-c", program], tmp_path / "log") as child,
    ):
        child.finish()


def test_a_run_that_is_over_before_it_is_killed_proves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="over before it could be killed"),
        started([sys.executable, "-c", ""], tmp_path / "log") as child,
    ):
        child.wait_for(lambda: False, "it never saved")


def test_a_run_that_ended_by_itself_was_not_killed(tmp_path: Path) -> None:
    """Also one that saved what was waited for, and was gone before the signal came."""
    with (
        pytest.raises(RunError, match="over before it could be killed"),
        started([sys.executable, "-c", ""], tmp_path / "log") as child,
    ):
        see_ended(child)
        child.kill()
        child.require_killed()


def see_ended(child: Child) -> None:
    while psutil.Process(child.process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_a_run_that_began_anew_is_no_resume(resumed: Path) -> None:
    metrics = resumed / "metrics.jsonl"
    begun = metrics_at_save(resumed)
    assert begun == metrics.read_bytes()[:300]
    require_gone_on(resumed, begun)
    metrics.write_text(metrics.read_text().replace('"time/train": 0.3', '"time/train": 0.31', 1))
    with pytest.raises(RunError, match="did not go on from its checkpoint, but began anew"):
        require_gone_on(resumed, begun)


def test_where_a_part_was_not_compared_nothing_is_proved(tmp_path: Path) -> None:
    check = trial(tmp_path, episodes=2, cut=1)
    for run in (check.uninterrupted, check.interrupted):
        leave_run(run, step_s=0.2)
    require_proof(compare_runs(check.uninterrupted, check.interrupted), check)
    for run in (check.uninterrupted, check.interrupted):
        shutil.rmtree(run / "rollouts")
        shutil.rmtree(run / TRAINER_CHECKPOINTS / "2")
    compared = compare_runs(check.uninterrupted, check.interrupted)
    assert compared.equal
    with pytest.raises(RunError, match="to compare of data order, rollouts, a checkpoint after episode 2"):
        require_proof(compared, check)


def test_room_for_the_checkpoints_of_both_runs_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = trial(tmp_path, episodes=5, cut=2)
    config = read_config(QUICKSTART, check.words(check.interrupted))
    layout = layout_of(config, Environment.read())
    size = size_of_checkpoint(config, layout).total
    monkeypatch.setattr(command, "free_bytes", lambda _: 6 * size)
    command.require_room(config, layout, check)
    monkeypatch.setattr(command, "free_bytes", lambda _: 6 * size - 1)
    with pytest.raises(ConfigError, match="for 3 checkpoints of each of two runs"):
        command.require_room(config, layout, check)
    check.root.mkdir()
    (check.root / "left by an earlier one").write_text(" ")
    command.require_room(config, layout, check)


def test_killing_takes_everybody_along(tmp_path: Path) -> None:
    sleeper = "import time; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); {sleeper}"
    with started([sys.executable, "-c", program], tmp_path / "log") as child:
        family = psutil.Process(child.process.pid)
        child.wait_for(lambda: bool(family.children()), "a grandchild")
        (grandchild,) = family.children()
    assert child.process.poll() == -9
    assert not grandchild.is_running()
