"""However a run ends: the user is told why, the last finished state is kept, and no process stays behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from runs import Launcher, actors, descendants, finish, metrics, survivors, trained, wait_until

# The simple engine starts in half the time of vLLM, and what is tested here lies around the engine.
SMALL = (
    "runtime_args.rollout_backend=transformers",
    "runtime_args.sample_per_episode=32",
    "runtime_args.train_global_batch_size=32",
    "runtime_args.enable_eval_before_training=False",
    "runtime_args.eval_episode_interval=0",
)
GONE_WITHIN_S = 10.0


def test_ctrl_c_keeps_the_last_finished_state_and_the_same_command_continues(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Also: a resumed run goes on in the data, and a finished one says so."""
    long = (*SMALL, "runtime_args.num_episode=100", "runtime_args.save_episode_interval=100")
    run = launcher.start(tmp_path, *long)
    wait_until(trained(tmp_path, episode=2), run, "second episode")
    everybody = descendants(run)
    os.kill(run.pid, signal.SIGINT)
    ended = finish(run)

    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert survivors(everybody, GONE_WITHIN_S) == []
    last = max(metrics(tmp_path))
    assert last < 100
    assert (tmp_path / "save_model" / "policy_trainer" / str(last) / "checkpoint.json").exists()

    asked = {line["prompt_uid"] for line in answers(tmp_path, 1)}
    again = launcher.run(
        tmp_path, *SMALL, f"runtime_args.num_episode={last + 1}", "runtime_args.save_episode_interval=1"
    )
    assert again.returncode == 0, again.stderr
    assert max(metrics(tmp_path)) == last + 1
    assert metrics(tmp_path)[last + 1]["sync/version"] == last + 1
    assert not asked & {line["prompt_uid"] for line in answers(tmp_path, last + 1)}, "the data began anew"

    finished = launcher.run(tmp_path, *SMALL, f"runtime_args.num_episode={last + 1}")
    assert finished.returncode == 0
    assert f"finished at {last + 1}" in finished.stderr


def test_a_dead_rank_is_named_and_nobody_stays(launcher: Launcher, tmp_path: Path) -> None:
    run = launcher.start(tmp_path, *SMALL, "runtime_args.num_episode=100")
    wait_until(trained(tmp_path, episode=1), run, "first episode")
    everybody = descendants(run)
    victim = next(row for row in actors(tmp_path) if (row["role"], row["rank"]) == ("policy_trainer", 1))
    os.kill(victim["pid"], signal.SIGKILL)
    ended = finish(run)

    assert ended.returncode == 1, ended.stderr
    assert "policy_trainer rank 1" in ended.stderr
    assert str(victim["host"]) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert survivors(everybody, GONE_WITHIN_S) == []


def test_a_killed_driver_leaves_nobody(launcher: Launcher, tmp_path: Path) -> None:
    """SIGKILL gives the driver no chance to tidy up; the watchdog does."""
    run = launcher.start(tmp_path, *SMALL, "runtime_args.num_episode=100")
    wait_until(trained(tmp_path, episode=1), run, "first episode")
    everybody = descendants(run)
    assert len(everybody) > 5, "Ray, engine, ranks and graders should be there to be left behind"
    run.kill()
    run.communicate()

    assert survivors(everybody, GONE_WITHIN_S) == []


def answers(output: Path, episode: int) -> list[dict[str, object]]:
    """The lines of an episode's rollouts."""
    path = output / "rollouts" / f"episode_{episode:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
