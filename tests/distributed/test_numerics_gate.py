"""The numerics gate: silent where engine and trainer agree, and right about the cause where a fault was planted."""

from __future__ import annotations

import numerics_cases as planted
import pytest
from gang import GangOf
from numerics_cases import Plant

from chatlearn.rollout.engine import SamplingPlan

FAULTS: dict[str, tuple[Plant, str, str]] = {
    "the engine ignores the temperature": (
        Plant(asked=0.5, plan=SamplingPlan(temperature=1.0)), "temperature", "and so were its answers sampled",
    ),
    "a temperature nobody wrote down": (Plant(plan=SamplingPlan(temperature=0.83)), "temperature", "temperature 0.83,"),
    "raw numbers": (Plant(asked=0.5, report=planted.raw), "raw log-probabilities", "sampled as asked"),
    "the plan of evaluation": (
        Plant(plan=SamplingPlan(temperature=0.6, top_p=0.95, top_k=20)), "truncated sampling", "plan of evaluation",
    ),
    "top_p": (Plant(plan=SamplingPlan(top_p=0.8)), "truncated sampling", "top_p 0.8"),
    "top_k": (Plant(plan=SamplingPlan(top_k=3)), "truncated sampling", "top_k 3 does"),
    "min_p": (Plant(plan=SamplingPlan(min_p=0.1)), "truncated sampling", "min_p 0."),
    "numbers of the token before": (Plant(report=planted.late), "shifted tokens", "before the one"),
    "a special token before the prompt": (Plant(extra_token=planted.END), "another prompt", "331 before the prompt"),
    "logits": (Plant(report=planted.logits), "no log-probabilities", "above 0"),
    "another number format": (Plant(engine_dtype="bfloat16"), "number format", "computes in bfloat16"),
    "weights of the model directory": (
        Plant(moved=True, engine_weights=planted.stored_only), "stale weights", "none that were sent",
    ),
    "other weights until they are sent again": (
        Plant(engine_weights=planted.embedding_damaged, mended_again=True), "stale weights", "sent again",
    ),
    "a version that is too old": (
        Plant(moved=True, engine_weights=planted.stored_only, changes={"other_versions": "from version 3"}),
        "stale weights", "from version 3",
    ),
    "a tensor that never arrives": (
        Plant(moved=True, engine_weights=planted.one_stored),
        "missing or corrupted tensors", f"the model directory's values in {planted.TENSOR}",
    ),
    "a layer of zeros": (
        Plant(engine_weights=planted.layer_missing), "missing or corrupted tensors", "zeros in layer 2",
    ),
    "an attention kernel that leaks": (Plant(broken_attention=True), "attention kernel", "transformers' own"),
    "a router that chooses otherwise": (
        Plant(family="tiny_qwen3_moe", engine_weights=planted.router_nudged), "router", "different experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(gang_of: GangOf, name: str) -> None:
    plant, cause, words = FAULTS[name]
    judged = gang_of(1).run(planted.judge, plant)[0]
    assert judged.cause == cause, judged.text
    assert words in judged.text
    assert "what to do: " in judged.text


@pytest.mark.parametrize("family", ["tiny_qwen3", "tiny_qwen3_moe"])
@pytest.mark.parametrize("asked", [1.0, 0.5])
def test_engine_and_trainer_that_agree_are_told_in_one_line(gang_of: GangOf, family: str, asked: float) -> None:
    judged = gang_of(1).run(planted.judge, Plant(family=family, asked=asked, moved=asked == 0.5))[0]
    assert judged.text.startswith("engine and trainer agree: mean gap "), judged.text
    assert "\n" not in judged.text
    assert judged.num_trials == 0


def test_what_nobody_knows_is_said_with_the_numbers(gang_of: GangOf) -> None:
    judged = gang_of(1).run(planted.judge, Plant(engine_weights=planted.embedding_damaged))[0]
    assert judged.cause is None, judged.text
    assert "none of the known causes explains it" in judged.text
    for tried in ("temperature", "transformers' own kernels", "bfloat16", "sent again", "zeros in"):
        assert tried in judged.text
    assert "further apart than the tolerance" in judged.text


@pytest.mark.parametrize("name", ["weights of the model directory", "an attention kernel that leaks"])
def test_the_cause_is_found_on_several_ranks(gang_of: GangOf, name: str) -> None:
    plant, cause, _ = FAULTS[name]
    assert {judged.cause for judged in gang_of(2).run(planted.judge, plant)} == {cause}
