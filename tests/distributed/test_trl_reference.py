"""Our trainer's loss and gradients are those of another project, TRL, on the batch that it was asked about.

``benchmarks/trl_reference.py`` recorded the figures; nothing of TRL is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import Setup
from gang import GangOf
from reference_case import Described, accumulated, samples_of

from benchmarks.trl_reference import CASES, CLIP, FOLDER, ROOT, Reference, read_reference
from chatlearn.records import Sample

RELATIVE = 1e-5
# A gradient that is nearly zero beside the whole one is measured by the whole one.
SMALL = 1e-3

NAMES = [case.name for case in CASES]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one micro-batch": (1, {"checkpointing": "off"}),
    "two ranks, small bins, grouped experts": (2, {"max_tokens": 48, "meta_init": True, "grouped_experts": True}),
    "two ranks a sequence": (2, {"sequence_parallel_size": 2}),
}


@cache
def reference(name: str) -> Reference:
    return read_reference(FOLDER / f"{name}.json")


def setup_of(name: str) -> Setup:
    case = reference(name).case
    return Setup(
        ROOT / "embedded" / case.model,
        loss=case.loss,
        kl_coef=case.kl_coef,
        entropy_coef=case.entropy_coef,
        temperature=case.temperature,
    )


def worst_differences(loss: float, gradients: Described, expected: Reference) -> tuple[float, float]:
    """The relative difference of the loss, and the largest of a gradient's norm or projections."""
    assert gradients.keys() == expected.gradients.keys()
    floor = SMALL * expected.grad_norm
    worst = 0.0
    for name, (norm, *projections) in gradients.items():
        expected_norm, *expected_projections = expected.gradients[name]
        # The root mean square over random signs is the norm of the difference of the two gradients.
        apart = float(np.sqrt(np.square(np.subtract(projections, expected_projections)).mean()))
        worst = max(worst, max(abs(norm - expected_norm), apart) / max(expected_norm, floor))
    return abs(loss - expected.loss) / abs(expected.loss), worst


def test_the_recorded_cases_are_the_ones_that_are_asked_for() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    for case in CASES:
        assert reference(case.name).case == case
        assert setup_of(case.name).objective().clip == CLIP
        assert reference(case.name).versions["trl"].startswith("1.16.")


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_batch_says_something(name: str) -> None:
    """Advantages of both signs, answers of several lengths, and a gradient for whatever is not an unused expert."""
    answers = reference(name).answers
    advantages = [answer.advantage for answer in answers]
    assert min(advantages) < -0.1
    assert max(advantages) > 0.1
    assert len({len(answer.old_logprobs) for answer in answers}) > 2
    norms = {parameter: norm for parameter, (norm, *_) in reference(name).gradients.items()}
    assert all(norm > 0 for parameter, norm in norms.items() if ".experts." not in parameter)
    norms = list(norms.values())
    assert np.count_nonzero(norms) > 0.8 * len(norms)
    assert np.sqrt(np.square(norms).sum()) == pytest.approx(reference(name).grad_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_those_of_trl(gang_of: GangOf, name: str, layout: str) -> None:
    num_ranks, changes = LAYOUTS[layout]
    setup = replace(setup_of(name), **changes)
    for loss, gradients in gang_of(num_ranks).run(accumulated, setup, samples_of(reference(name).answers)):
        assert max(worst_differences(loss, gradients, reference(name))) < RELATIVE


def shifted(sample: Sample) -> Sample:
    """The first token of the answer taken for one of the prompt's."""
    mask = sample.loss_mask.copy()
    mask[np.argmax(mask)] = False
    return replace(sample, loss_mask=mask)


FAULTS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "one loss token too many": ({}, {"miscount": 1}),
    "no KL": ({"kl_coef": 0.0}, {}),
    "no entropy": ({"entropy_coef": 0.0}, {}),
    "another temperature": ({"temperature": 1.29}, {}),
    "another level of the ratio": ({"loss": "gspo"}, {}),
    "no dual clip": ({}, {"dual": 100.0}),
}


@pytest.mark.parametrize("fault", [*FAULTS, "the first token left out"])
def test_a_planted_fault_is_seen(gang_of: GangOf, fault: str) -> None:
    name = "tiny_qwen3-grpo-kl0.1-t1.3"
    changes, arguments = FAULTS.get(fault, ({}, {}))
    samples = samples_of(reference(name).answers)
    if fault not in FAULTS:
        samples = [shifted(sample) for sample in samples]
    setup = replace(setup_of(name), checkpointing="off", **changes)
    ((loss, gradients),) = gang_of(1).run(accumulated, setup, samples, *arguments_in_order(arguments))
    loss_differs, gradient_differs = worst_differences(loss, gradients, reference(name))
    assert gradient_differs > 100 * RELATIVE
    assert loss_differs > 100 * RELATIVE


def arguments_in_order(arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """A gang hands on no keywords."""
    return arguments.get("miscount", 0), arguments.get("dual")
