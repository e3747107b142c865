"""Laws that trainers of this kind have broken, where no other test holds them; ``docs/laws.md`` has the whole list."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatlearn import specs
from chatlearn.algorithm.advantage import ADVANTAGES
from chatlearn.algorithm.logprob import token_logprobs_and_entropy
from chatlearn.beginning import FRESH, resume, state_found
from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.checkpoint.manifest import Provenance
from chatlearn.cluster.archive import Draft
from chatlearn.config.environment import Environment
from chatlearn.config.layout import Layout, layout_of
from chatlearn.config.read import read_config
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.text import resolved_text
from chatlearn.data.stream import StreamPosition
from chatlearn.episode import compare, state_after
from chatlearn.observability.journal import Journal
from chatlearn.records import Completion, Graded, Prompt, Rollout, Score, VersionRun
from chatlearn.saving import save
from chatlearn.team import Team

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "embedded" / "tiny_qwen3"
PROVENANCE = Provenance("data", "model", "prompts")


def configured(*overrides: str) -> tuple[GrpoConfig, Layout]:
    config = read_config(ROOT / "template" / "quickstart.yaml", [f"models.policy_trainer.load={MODEL}", *overrides])
    return config, layout_of(config, Environment(cores=4))


# --- W1: a run goes on from the weights it saved, also with several optimizer steps per episode ----------------------


@dataclass
class OneNumber:
    """Stands for a trainer: its weights are one number, saved in a file."""

    weights: int = 0

    @contextmanager
    def resident(self) -> Generator[None]:
        yield

    def load(self, folder: Path) -> SimpleNamespace:
        self.weights = int((folder / "weights").read_text())
        return SimpleNamespace(random_states=True, num_ranks_saved=1)


@dataclass
class ArchiveOfOne:
    """Stands for the archive: writes that number, and publishes at once."""

    trainer: OneNumber

    def settle(self) -> None:
        """Nothing is ever on its way."""

    def begin(self, draft: Draft) -> None:
        (draft.staging / "weights").write_text(str(self.trainer.weights))
        draft.complete(())


@dataclass
class SilentJournal:
    """Stands for a journal that nobody reads."""

    metrics_bytes: int = 0
    said: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, _name: str) -> Generator[None]:
        yield

    def say(self, text: str) -> None:
        self.said.append(text)

    def write(self, _step: int, _metrics: object) -> None:
        """Forget it."""


def team_of(config: GrpoConfig, layout: Layout, trainer: OneNumber) -> Team:
    """The part of a team that saving speaks to."""
    return cast(
        "Team",
        SimpleNamespace(
            args=config.runtime_args,
            layout=layout,
            trainer=trainer,
            archive=ArchiveOfOne(trainer),
            saves_hugging_face=False,
            lora=None,
            checkpoint_bytes=0,
            config_text=resolved_text(config),
            provenance=PROVENANCE,
        ),
    )


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_run_goes_on_from_the_weights_of_its_last_step(tmp_path: Path, num_epochs: int) -> None:
    """The original named a checkpoint by the step and looked for it by the episode: it went on from other weights."""
    config, layout = configured(
        f"runtime_args.output_dir={tmp_path}",
        "runtime_args.sample_per_episode=512",
        "runtime_args.train_global_batch_size=128",
        f"runtime_args.num_training_epoch={num_epochs}",
    )
    assert layout.steps_per_episode == 4 * num_epochs, "the test is to take several steps per episode"
    journal = cast("Journal", SilentJournal())
    trainer, state = OneNumber(), FRESH
    for episode in (1, 2, 3):
        state = replace(state, episode=episode, train_iteration=state.train_iteration + layout.steps_per_episode)
        trainer.weights = 100 * episode
        save(team_of(config, layout, trainer), state, journal)

    found, resumed = state_found(config, layout, PROVENANCE), OneNumber()
    resume(team_of(config, layout, resumed), found, journal)
    assert (found.episode, found.train_iteration) == (3, 3 * layout.steps_per_episode)
    assert resumed.weights == 300
    assert (layout.folders.save_model / str(found.train_iteration)).is_dir()


def test_an_episode_without_a_step_is_saved_in_the_place_of_the_one_with_the_same_weights(tmp_path: Path) -> None:
    """Partial rollout has such episodes; where the last one was not saved, the same command ran it again for ever."""
    config, layout = configured(f"runtime_args.output_dir={tmp_path}")
    team, journal = team_of(config, layout, OneNumber(7)), cast("Journal", SilentJournal())
    first = replace(FRESH, episode=1, train_iteration=1, offset=64, evaluation={"eval/x/avg@1": 0.5})
    second = state_after(first, 0, StreamPosition(0, 128, ()))
    for state in (first, first, second):
        save(team, state, journal)
    found = state_found(config, layout, PROVENANCE)
    assert (found.episode, found.train_iteration, found.offset) == (2, 1, 128)
    assert found.evaluation == first.evaluation, "what the best checkpoint is known by"
    assert state_after(first, 1, StreamPosition()).evaluation == {}
    published = (layout.folders.save_model / "1" / "checkpoint.json").stat().st_ino
    save(team, second, journal)
    assert (layout.folders.save_model / "1" / "checkpoint.json").stat().st_ino == published, "saved already"


# --- W3: an answer is compared with its siblings of this episode and nobody else --------------------------------------


def test_an_earlier_episode_does_not_take_part_in_a_comparison() -> None:
    """The original kept rewards by prompt until it had seen enough of them, and mixed epochs."""

    def group(*rewards: float) -> Graded:
        answer = Completion(np.array([1], np.int32), np.zeros(1, np.float32), "", "stop", (VersionRun(0, 1),))
        prompt = Prompt("the same prompt", np.array([5], np.int32), "?", "source", "1")
        scores = tuple(Score(reward) for reward in rewards)
        return Graded(Rollout(prompt, (answer,) * len(rewards)), scores)

    def advantages(*rewards: float) -> list[float]:
        return [float(sample.advantages[-1]) for sample in compare(group(*rewards), ADVANTAGES["grpo"])]

    assert advantages(0, 0, 0, 0) == [0, 0, 0, 0]
    assert advantages(1, 1, 0, 0) == pytest.approx([1, 1, -1, -1], abs=1e-4)
    assert advantages(1, 1, 1, 1) == [0, 0, 0, 0]


# --- W5: evaluation samples as evaluation is told to ------------------------------------------------------------------

SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 11,
    "min_p": 0.05,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
}


def test_evaluation_samples_with_its_own_parameters() -> None:
    """The original's rollout manager evaluated with the parameters of training."""
    config, _ = configured()
    evaluating, _ = configured(*(f"models.policy.eval_{name}={value}" for name, value in SAMPLING.items()))
    assert specs.sampling_plan(evaluating) == specs.sampling_plan(config)
    plan = specs.evaluation_plan(evaluating)
    assert {name: vars(plan)[name] for name in SAMPLING} == SAMPLING
    assert all(vars(specs.sampling_plan(config))[name] != value for name, value in SAMPLING.items())


# --- W7: log-probabilities are computed in float32 --------------------------------------------------------------------


def test_half_precision_models_have_single_precision_logprobs() -> None:
    """Logits and log-softmax in bfloat16 cost a hundredth of a nat a token, in policy, old and reference alike."""
    torch.manual_seed(0)
    hidden, head = torch.randn(256, 64).bfloat16(), (torch.randn(4096, 64) / 4).bfloat16()
    labels = torch.randint(4096, (256,))
    exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    rounded = (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    logprobs, _ = token_logprobs_and_entropy(hidden, head, labels)
    assert (rounded - exact).abs().mean() > 1e-2, "the test is to need single precision"
    assert (logprobs - exact).abs().max() < 1e-5


# --- W9: a Hugging Face folder holds what its config.json says --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hugging_face_folder_has_every_expert_in_the_dtype_it_declares(tmp_path: Path, dtype: str) -> None:
    """The original left out the experts that ran grouped, and called float32 weights bfloat16."""
    base, target = ROOT / "embedded" / "tiny_qwen3_moe", tmp_path / "huggingface"
    original = load_file(base / "model.safetensors")
    write_hugging_face(iter(original.items()), base, target, dtype)
    written = load_file(target / "model.safetensors")
    assert written.keys() == original.keys()
    assert sum(".experts." in name for name in written) == 4 * 8 * 3
    assert {str(weight.dtype) for weight in written.values()} == {f"torch.{dtype}"}
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype


# --- W13: every name in the program is defined ------------------------------------------------------------------------


def undefined_names(folder: Path) -> list[str]:
    """What ruff's F821 (an undefined name) and F405 (one that only a star import may define) find."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--isolated", "--select", "F821,F405",
         "--output-format", "concise", "--no-cache", "--quiet", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_every_name_is_defined(tmp_path: Path) -> None:
    """The original's patches called functions that nobody had imported; only the run found out."""
    assert undefined_names(ROOT / "chatlearn") == []
    (tmp_path / "patch.py").write_text("def forward(key):\n    return repeat_kv(key)\n")
    assert len(undefined_names(tmp_path)) == 1
