"""What a resume does about prompts and answers that are not those of the checkpoint any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from earlier_runs import Runs

from chatlearn.beginning import FRESH
from chatlearn.checkpoint.manifest import read_manifest, write_manifest
from chatlearn.errors import ConfigError
from chatlearn.records import Completion, OpenGroup, Prompt, VersionRun


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_another_chat_template_is_another_order_of_prompts(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and data files are the same; what they are asked, and which prompts are short enough, is not."""
    runs.save(4, state=replace(FRESH, epoch=3, offset=1, open_groups=(OPEN,), schedule="async"))
    template = runs.folder / "model" / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    with pytest.raises(ConfigError) as caught:
        runs.rehearse()
    (problem,) = caught.value.problems
    assert f"models.policy_trainer.load={runs.folder / 'model'} does not hold what it did when checkpoint 4" in problem
    assert "its tokenizer or chat template is not that of the checkpoint" in problem
    found = runs.begin("runtime_args.resume_anyway=True")
    assert (found.episode, found.epoch, found.offset, found.open_groups) == (4, 3, 0, ())
    assert "pass 4 over the data begins anew" in capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:  # what explains other prompts is named, and nothing else
        runs.begin("models.policy.max_prompt_tokens_length=77")
    (problem,) = caught.value.problems
    assert problem.startswith("models.policy.max_prompt_tokens_length=77 was")


def test_where_prompts_were_not_recorded_that_is_said(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.save(4)
    manifest = read_manifest(runs.root / "4")
    assert manifest.provenance is not None
    write_manifest(runs.root / "4", replace(manifest, provenance=replace(manifest.provenance, prompts_digest=None)))
    (runs.folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert runs.begin().episode == 4
    assert "checkpoint 4 does not say which prompts its data made" in capsys.readouterr().err


ANSWER = Completion(np.array([9], np.int32), np.zeros(1, np.float32), "a", "stop", (VersionRun(4, 1),))
OPEN = OpenGroup(Prompt("0_1", np.array([5], np.int32), "?", "openai/gsm8k", "3"), (ANSWER,))


@pytest.mark.parametrize(
    ("word", "goes_on"),
    [
        ("models.policy.temperature=0.5", False),
        ("models.policy.max_response_tokens_length=7", False),
        ("models.reward.function=boxed_math", False),
        ("models.policy_trainer.optimizer.lr=0.5", True),
    ],
)
def test_answers_that_were_asked_for_in_another_way_are_given_up(
    runs: Runs, capsys: pytest.CaptureFixture[str], word: str, goes_on: bool
) -> None:
    """The trainer would score them at the new temperature, say, though they were sampled at the old one."""
    runs.save(4, state=replace(FRESH, schedule="one_step_off", open_groups=(OPEN,), offset=2))
    found = runs.begin(word)
    assert (found.offset, len(found.open_groups), found.schedule) == (2, 1, "one_step_off" if goes_on else "")
    said = capsys.readouterr().err
    assert word.split("=", maxsplit=1)[0] in said
    assert ("under way to 1 prompts are given up" in said) is not goes_on
