"""``rollouts/``: every answer of an episode in a readable file, a line per completion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from chatlearn.observability.whole_file import replacing
from chatlearn.records import Completion, FloatStream, Graded, Prompt, Sample, Score

# Log-probabilities are written to 1e-7, the step of float32 near one; more digits would double the file.
LOGPROB_DECIMALS = 7
ROLLOUTS_FOLDER: Final = "rollouts"
_NAME: Final = re.compile(r"episode_(\d{6,})\.jsonl", re.ASCII)


def rollouts_path(directory: Path, episode: int) -> Path:
    """Where the rollouts of ``episode`` lie below the run's directory."""
    return directory / ROLLOUTS_FOLDER / f"episode_{episode:06d}.jsonl"


def write_rollouts(directory: Path, episode: int, graded: Sequence[Graded], samples: Sequence[Sample]) -> Path:
    """Write the episode's file whole; ``samples`` has one entry for each completion of ``graded``, in that order."""
    path = rollouts_path(directory, episode)
    with replacing(path) as file:
        for (prompt, completion, score), sample in zip(answers(graded), samples, strict=True):
            line = describe_completion(prompt, completion, score, advantage_of(sample))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def forget_after(directory: Path, episode: int) -> None:
    """Remove the files of later episodes, which another process wrote: they go with the metrics that are cut."""
    for path in (directory / ROLLOUTS_FOLDER).glob("episode_*.jsonl"):
        name = _NAME.fullmatch(path.name)
        if name is not None and int(name[1]) > episode:
            path.unlink()


def answers(graded: Sequence[Graded]) -> Iterator[tuple[Prompt, Completion, Score]]:
    """Every completion with its prompt and score, group by group."""
    for group in graded:
        for completion, score in zip(group.rollout.completions, group.scores, strict=True):
            yield group.rollout.prompt, completion, score


def advantage_of(sample: Sample) -> float | None:
    """The advantage of the answer's tokens; ``None`` where nothing is learned from it."""
    trained: FloatStream = sample.advantages[sample.loss_mask]
    return float(trained[0]) if trained.size else None


def describe_completion(
    prompt: Prompt, completion: Completion, score: Score, advantage: float | None
) -> dict[str, object]:
    """One line of the file; a completion that could not be graded has the grader's error instead of a reward."""
    return {
        "prompt_uid": prompt.uid,
        "data_source": prompt.source,
        "prompt": prompt.text,
        "response": completion.text,
        "ground_truth": prompt.answer,
        "token_ids": completion.token_ids.tolist(),
        "rollout_logprobs": np.round(completion.logprobs.astype(np.float64), LOGPROB_DECIMALS).tolist(),
        "reward": None if score.error is not None else score.value,
        "reward_parts": dict(score.parts),
        "grader_error": score.error,
        "advantage": advantage,
        "finish_reason": completion.finish_reason,
        "policy_versions": [{"version": run.version, "count": run.num_tokens} for run in completion.versions],
    }
