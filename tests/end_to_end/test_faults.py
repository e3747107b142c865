"""However a run ends: the user is told why, the last finished state is kept, and no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import Launcher, actors, descendants, finish, metrics, survivors, trained, wait_until
from torch.distributed.checkpoint import FileSystemReader

from chatlearn.checkpoint.run_lock import hold_directory

# The simple engine starts in half the time of vLLM, and what is tested here lies around the engine.
SMALL = (
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=32",
    "runtime_args.train_global_batch_size=32",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
    "runtime_args.save_episode_interval=100",
    "models.policy_trainer.save_hf=False",
    "models.reward.num_cpu=1",
)
# A loss of one's own whose gradient is infinite.
POISON = """
def poisoned(inputs, clip):
    return inputs.logprobs * float("inf")
"""
GONE_WITHIN_S = 10.0
TOLD_WITHIN_S = 30.0
AFTER_THE_STEP_S = 4.0  # A step of 32 short answers takes less than one, the evaluation that follows takes many.


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_continues(launcher: Launcher, tmp_path: Path) -> None:
    """First in an evaluation, when the optimizer has stepped: the episode counts. Then anywhere. Then to the end.

    The weights that are saved must be those that the saved counters speak of, and the data must go on.
    """
    evaluating = ("runtime_args.eval_episode_interval=1", "runtime_args.eval_samples_per_prompt=64")
    run = launcher.start(tmp_path, *SMALL, *evaluating, "runtime_args.num_episode=100")
    wait_until((tmp_path / "rollouts" / "episode_000001.jsonl").exists, run, "answers of the first episode")
    time.sleep(AFTER_THE_STEP_S)
    assert 1 not in metrics(tmp_path), "it was too late to interrupt"
    interrupt(run)
    assert metrics(tmp_path)[1]["policy_trainer/steps"] == 1
    assert saved_state(tmp_path, 1)["train_iteration"] == 1
    steps = optimizer_steps(tmp_path / "save_model" / "policy_trainer" / "1")
    assert steps == {1.0}, "the moments belong to another number of steps than the counters"

    run = launcher.start(tmp_path, *SMALL, "runtime_args.num_episode=100")
    wait_until(trained(tmp_path, episode=3), run, "third episode")
    interrupt(run)
    last = max(metrics(tmp_path))
    assert 3 <= last < 100
    assert saved_state(tmp_path, last)["episode"] == last
    assert metrics(tmp_path)[last]["sync/version"] == last
    asked = [{line["prompt_uid"] for line in answers(tmp_path, episode)} for episode in (1, 2, 3)]
    assert not asked[0] & asked[1], "the data began anew"
    assert not asked[1] & asked[2]

    finished = launcher.run(tmp_path, *SMALL, f"runtime_args.num_episode={last}")
    assert finished.returncode == 0
    assert f"finished at {last}" in finished.stderr


def interrupt(run: subprocess.Popen[str]) -> None:
    """Press Ctrl-C once; the run must leave with the right status, no traceback and no process."""
    everybody = descendants(run)
    os.kill(run.pid, signal.SIGINT)
    ended = finish(run)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert survivors(everybody, GONE_WITHIN_S) == []


def saved_state(output: Path, iteration: int) -> dict[str, int]:
    """The counters of a published checkpoint."""
    checkpoint = output / "save_model" / "policy_trainer" / str(iteration)
    assert (checkpoint / "checkpoint.json").exists()
    state: dict[str, int] = json.loads((checkpoint / "run_state.json").read_text())
    return state


def test_a_dead_rank_is_named_and_nobody_stays(launcher: Launcher, tmp_path: Path) -> None:
    """The ranks train an adapter here, and are their own reference with the adapter off: no further process."""
    adapter = ("models.policy_trainer.lora.rank=4", "models.policy_trainer.kl_coef=0.1")
    run = launcher.start(tmp_path, *SMALL, *adapter, "runtime_args.num_episode=100")
    wait_until(trained(tmp_path, episode=2), run, "second episode")
    assert metrics(tmp_path)[1]["policy_trainer/kl_loss"] == 0.0, "a new adapter changes nothing"
    assert metrics(tmp_path)[2]["policy_trainer/kl_loss"] > 0.0
    assert metrics(tmp_path)[2]["numerics/rollout_logprob_diff_mean"] < 1e-5, "engines get the merged weights"
    assert "ref_policy" not in {row["role"] for row in actors(tmp_path)}
    everybody = descendants(run)
    victim = next(row for row in actors(tmp_path) if (row["role"], row["rank"]) == ("policy_trainer", 1))
    os.kill(victim["pid"], signal.SIGKILL)
    killed = time.monotonic()
    ended = finish(run)

    assert time.monotonic() - killed < TOLD_WITHIN_S
    assert ended.returncode == 1, ended.stderr
    assert "policy_trainer rank 1" in ended.stderr
    assert str(victim["host"]) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert survivors(everybody, GONE_WITHIN_S) == []


def test_a_killed_driver_leaves_nobody(launcher: Launcher, tmp_path: Path) -> None:
    """SIGKILL gives the driver no chance to tidy up; the watchdog does. Before that, every step goes wrong."""
    (tmp_path / "poison.py").write_text(POISON)
    output = tmp_path / "run"
    overrides = (*SMALL, "models.policy_trainer.loss=poison:poisoned", "runtime_args.num_episode=100")
    run = launcher.start(output, *overrides, PYTHONPATH=str(tmp_path))
    wait_until(trained(output, episode=1), run, "first episode")
    assert metrics(output)[1]["policy_trainer/skipped_steps"] == 1.0
    capsule = json.loads((output / "capsules" / "iteration_000001" / "capsule.json").read_text())
    assert capsule["reason"] == "bad step"
    assert capsule["stats"]["grad_norm"] in ("inf", "nan")
    everybody = descendants(run)
    assert len(everybody) > 5, "Ray, engine, ranks and graders should be there to be left behind"
    run.kill()
    run.communicate()
    said: list[str] = []
    with hold_directory(output, said.append):  # while the run's other processes are still leaving
        assert f"the run with pid {run.pid} on host {socket.gethostname()} is gone" in said[0]

    assert survivors(everybody, GONE_WITHIN_S) == []


def answers(output: Path, episode: int) -> list[dict[str, object]]:
    """The lines of an episode's rollouts."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def optimizer_steps(checkpoint: Path) -> set[float]:
    """How often the optimizer has stepped, as its own state in a checkpoint says, over all parameters."""
    folder = checkpoint / "optimizer"
    names = [name for name in FileSystemReader(folder).read_metadata().state_dict_metadata if name.endswith(".step")]
    state = {name: torch.zeros(()) for name in names}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {float(value) for value in state.values()}
