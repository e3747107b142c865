"""What the gate does with a verdict, and what it knows of the two sides before it compares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from chatlearn.algorithm.truncation import Truncation, truncated
from chatlearn.checkpoint.run_state import RunState
from chatlearn.config.read import read_config
from chatlearn.errors import ConfigError, RunError
from chatlearn.gate import check_numerics, generation_distributions, other_versions, special_tokens
from chatlearn.numerics.bench import Bench, Facts
from chatlearn.numerics.change import Change, Distribution
from chatlearn.numerics.diagnosis import diagnose
from chatlearn.numerics.gap import Gap
from chatlearn.numerics.verdict import Trial, Verdict
from chatlearn.observability.journal import Page
from chatlearn.records import Completion, FloatStream, Prompt, Rollout, Sample, VersionRun
from chatlearn.rollout.engine import SamplingPlan
from chatlearn.team import Team

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "embedded" / "tiny_qwen3"
TEMPLATE = ROOT / "template" / "quickstart.yaml"
STATE = RunState(episode=0, train_iteration=0, policy_version=0, epoch=0, offset=0, deferred=(), metrics_bytes=0)
PLAIN = SamplingPlan()
PROMPT = Prompt("0_0", np.array([1, 2], np.int32), "?", "source", "1")


def sample(*engine: float) -> Sample:
    length = 2 + len(engine)
    return Sample(
        prompt_uid="0_0",
        token_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.arange(length) >= 2,
        rollout_logprobs=np.array([0, 0, *engine], np.float32),
        advantages=np.zeros(length, np.float32),
    )


@dataclass
class Trainer:
    """Says the same of every token, whatever is changed."""

    logprob: float
    num_passes: int = 0

    def weights_resident(self) -> nullcontext[None]:
        return nullcontext()

    def changed_logprobs(self, samples: Sequence[Sample], change: Change) -> list[FloatStream]:
        self.num_passes += 1
        return [np.full(len(sample.token_ids), self.logprob, np.float32) for sample in samples]

    def forget_changes(self) -> None: ...


@dataclass
class Sheet:
    """What was said on the page of an episode."""

    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)


def checked(gate: str, trainer: Trainer, sampling: SamplingPlan = PLAIN) -> list[str]:
    """What the gate says of an engine that gives every token -1."""
    plan = SimpleNamespace(load=str(MODEL), sequence_parallel_size=1)
    team = SimpleNamespace(
        args=SimpleNamespace(numerics_gate=gate),
        layout=SimpleNamespace(trainer=plan, device_kind="cpu", policy=SimpleNamespace(num_replicas=1)),
        trainer=trainer,
        asking=SimpleNamespace(plan=sampling),
        evaluation_asking=SimpleNamespace(plan=SamplingPlan(temperature=0.6)),
        replays_routes=False,
    )
    completion = Completion(np.array([2, 3], np.int32), np.float32([-1, -1]), "", "stop", (VersionRun(0, 2),))
    page, samples = Sheet(), [sample(-1.0, -1.0)]
    rollouts = [Rollout(PROMPT, (completion,))]
    check_numerics(cast("Team", team), cast("Page", page), STATE, rollouts, samples, lambda _: samples)
    return page.said


@pytest.mark.parametrize("gate", ["stop", "warn"])
def test_agreement_is_one_line(gate: str) -> None:
    (line,) = checked(gate, Trainer(-1.0))
    assert line == "engine and trainer agree: mean gap 0e+00 nats, largest 0e+00, over 2 tokens; tolerance 1e-05"


def test_stop_ends_the_run_and_warn_says_the_same() -> None:
    with pytest.raises(RunError, match="none of the known causes explains it") as caught:
        checked("stop", Trainer(-1.2))
    (warning,) = checked("warn", Trainer(-1.2))
    assert str(caught.value) == f"{warning}\nnothing was learned; runtime_args.numerics_gate=warn goes on nevertheless"


def test_off_compares_nothing() -> None:
    trainer = Trainer(-1.2)
    assert checked("off", trainer) == []
    assert trainer.num_passes == 0


@pytest.mark.parametrize("sampling", [SamplingPlan(top_p=0.9), SamplingPlan(repetition_penalty=1.1)])
def test_a_run_that_asks_for_another_distribution_is_not_compared(sampling: SamplingPlan) -> None:
    """The numbers of its answers are right, and are not those that the trainer has."""
    trainer = Trainer(-1.2)
    (line,) = checked("stop", trainer, sampling)
    assert "not compared" in line
    assert trainer.num_passes == 0


def test_numbers_that_are_none_never_agree() -> None:
    facts = Facts(Distribution(1.0), "float32", 1e-5, vocabulary=10)
    bench = Bench(facts, [sample(-1.0, np.nan)], Trainer(-1.0).changed_logprobs, again=list)
    verdict = diagnose(bench)
    assert not verdict.agrees
    assert verdict.cause == "no log-probabilities"


def test_a_small_change_of_a_gap_at_the_tolerance_explains_nothing() -> None:
    before, after = Gap(0.031, 0.2, 100), Gap(0.029, 0.2, 100)
    assert not Trial("attention kernel", "", "", "", after).explains(before, tolerance=0.03)
    assert Trial("attention kernel", "", "", "", after).explains(Gap(0.3, 2.0, 100), tolerance=0.03)
    assert not Verdict(Gap(0.0, 0.0, 0), 0.03).agrees, "nothing was compared"


def test_where_rounding_blurs_the_values_the_one_that_fits_best_is_named() -> None:
    near, right = Distribution(0.7), Distribution(0.8)
    says = {near: -1.02, right: -1.005}

    def score(samples: Sequence[Sample], change: Change) -> list[FloatStream]:
        logprob = says.get(change.distribution, -1.2) if change.distribution else -1.2
        return [np.full(len(sample.token_ids), logprob, np.float32) for sample in samples]

    facts = Facts(Distribution(1.0), "bfloat16", 0.03, 10, known_distributions=(("here", near), ("there", right)))
    verdict = diagnose(Bench(facts, [sample(-1.0, -1.0)], score, again=list))
    assert verdict.cause == "temperature"
    assert "as there says" in str(verdict)


def test_tokens_of_other_versions_are_counted() -> None:
    def rollout(*runs: VersionRun) -> Rollout:
        return Rollout(PROMPT, (Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), "", "stop", runs),))

    assert other_versions([rollout(VersionRun(4, 3))], expected=4) == ""
    told = other_versions([rollout(VersionRun(3, 1), VersionRun(4, 2)), rollout(VersionRun(3, 3))], expected=4)
    assert "4 tokens from version 3; the trainer has version 4" in told


def test_what_a_model_directory_says_of_sampling_is_known(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert generation_distributions(file) == []
    file.write_text(json.dumps({"eos_token_id": 1}))
    assert generation_distributions(file) == []
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95}))
    assert generation_distributions(file) == [(str(file), Distribution(0.6, top_p=0.95, top_k=20))]


def test_the_special_tokens_are_those_of_the_tokenizer() -> None:
    assert 331 in special_tokens(MODEL / "tokenizer.json")
    assert special_tokens(MODEL / "absent.json") == ()


def test_a_truncated_distribution_keeps_what_an_engine_keeps() -> None:
    import torch

    from chatlearn.rollout.sampling import processed_logits

    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(0, dtype=torch.int64)
    for top_p, top_k, min_p in ((0.8, 0, 0.0), (1.0, 7, 0.0), (1.0, 0, 0.2), (0.9, 10, 0.05)):
        plan = SamplingPlan(top_p=top_p, top_k=top_k, min_p=min_p)
        expected = torch.stack([processed_logits(row, nothing, nothing, plan) for row in logits])
        assert torch.equal(truncated(logits, Truncation(top_p, top_k, min_p)), expected)


def test_the_key_takes_what_yaml_makes_of_off() -> None:
    def gate(written: str) -> str:
        overrides = [f"models.policy_trainer.load={MODEL}", f"runtime_args.numerics_gate={written}"]
        return read_config(TEMPLATE, overrides).runtime_args.numerics_gate

    assert [gate(written) for written in ("off", "False", "warn", "stop")] == ["off", "off", "warn", "stop"]
    with pytest.raises(ConfigError, match="numerics_gate"):
        gate("loud")
