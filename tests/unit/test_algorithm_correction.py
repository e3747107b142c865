"""The weights that correct for another distribution: their formulas, what they are for, what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatlearn import recipe
from chatlearn.algorithm.correction import Correction, effective_sample_share, importance_weights
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange, LossInputs, clipped_surrogate
from chatlearn.batch.pack import MicroBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.config.read import read_config
from chatlearn.config.text import resolved_text
from chatlearn.records import Sample
from chatlearn.trainer.objective import Objective, Parts, objective_parts

TEMPLATE = Path(__file__).resolve().parents[2] / "template" / "quickstart.yaml"
CLIP = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
TOKEN_TRUNCATE = Correction(token="truncate", token_high=2.0)
TOKEN_MASK = Correction(token="mask", token_low=0.5, token_high=5.0)
SEQUENCE_TRUNCATE = Correction(sequence="truncate", sequence_high=2.0)
SEQUENCE_MASK = Correction(sequence="mask", sequence_low=0.9, sequence_high=1.1)
BOTH = replace(SEQUENCE_MASK, token="truncate", token_high=2.0)
CORRECTIONS = [TOKEN_TRUNCATE, TOKEN_MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK, BOTH]
laws = settings(max_examples=25, deadline=None, derandomize=True)

# (old logprob, rollout logprob, is it trained) of one token, and the tokens of some sequences
Token = tuple[float, float, bool]
TOKENS = st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.booleans())
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4)
Weigh = Callable[[LossInputs, Tensor, Correction], Tensor]


def weights_of(sequences: Sequence[Sequence[Token]], correction: Correction) -> list[list[float]]:
    old, rollout, mask = zip(*[token for sequence in sequences for token in sequence], strict=True)
    lengths = tuple(len(sequence) for sequence in sequences)
    old = torch.tensor(old, dtype=torch.float64)
    inputs = LossInputs(old.clone().requires_grad_(), old, torch.ones_like(old), torch.tensor(mask), lengths)
    weights = importance_weights(inputs, torch.tensor(rollout, dtype=torch.float64), correction)
    assert not weights.requires_grad
    return [part.tolist() for part in weights.split(lengths)]


def token_weight(ratio: float, correction: Correction) -> float:
    match correction.token:
        case "off":
            return 1.0
        case "truncate":
            return min(max(ratio, correction.token_low), correction.token_high)
        case "mask":
            return ratio if correction.token_low <= ratio <= correction.token_high else 0.0


def sequence_weight(ratios: Sequence[float], correction: Correction) -> float:
    low, high = correction.sequence_low, correction.sequence_high
    match correction.sequence:
        case "off":
            return 1.0
        case "truncate":
            return min(max(math.prod(ratios), low), high)
        case "mask":
            return 1.0 if low <= math.prod(ratios) ** (1 / max(len(ratios), 1)) <= high else 0.0


@pytest.mark.parametrize("correction", CORRECTIONS)
@laws
@given(SEQUENCES)
def test_weights_are_the_formulas_token_by_token(correction: Correction, sequences: list[list[Token]]) -> None:
    for sequence, weights in zip(sequences, weights_of(sequences, correction), strict=True):
        trained = [math.exp(old - rollout) for old, rollout, is_trained in sequence if is_trained]
        whole = sequence_weight(trained, correction)
        for (old, rollout, is_trained), weight in zip(sequence, weights, strict=True):
            if is_trained:
                expected = whole * token_weight(math.exp(old - rollout), correction)
                assert weight == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("correction", [SEQUENCE_TRUNCATE, SEQUENCE_MASK])
@laws
@given(SEQUENCES)
def test_a_sequence_has_one_weight_whatever_its_neighbours(
    correction: Correction, sequences: list[list[Token]]
) -> None:
    together = weights_of(sequences, correction)
    assert all(len(set(weights)) == 1 for weights in together)
    assert together == [weights_of([sequence], correction)[0] for sequence in sequences]


@pytest.mark.parametrize("correction", CORRECTIONS)
@laws
@given(SEQUENCES)
def test_where_engine_and_trainer_agree_every_weight_is_exactly_one(
    correction: Correction, sequences: list[list[Token]]
) -> None:
    agreeing = [[(old, old, is_trained) for old, _, is_trained in sequence] for sequence in sequences]
    assert {weight for weights in weights_of(agreeing, correction) for weight in weights} == {1.0}


def test_a_band_holds_its_ends_and_nothing_beyond() -> None:
    low, inside, high = math.log(0.5), 0.7, math.log(5.0)
    gaps = [low - 1e-6, low + 1e-12, inside, high - 1e-12, high + 1e-6]
    ((*weights,),) = weights_of([[(gap - 9, -9.0, True) for gap in gaps]], TOKEN_MASK)
    assert weights == pytest.approx([0.0, 0.5, math.exp(inside), 5.0, 0.0])
    assert (weights[0], weights[-1]) == (0.0, 0.0)


@pytest.mark.parametrize("gap", [-1e30, -3e38, -90.0, 90.0, 1e30, 3e38, -math.inf])
@pytest.mark.parametrize(
    "correction",
    [*CORRECTIONS, Correction(token="truncate"), Correction(sequence="truncate"), Correction(token="mask")],
)
def test_no_gap_is_too_wide_for_float32(correction: Correction, gap: float) -> None:
    old = torch.full((40,), gap)
    inputs = LossInputs(old, old, torch.ones(40), torch.ones(40, dtype=torch.bool), (30, 10))
    weights = importance_weights(inputs, torch.zeros(40), correction)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(weights.square().sum())
    assert weights.max() <= 1e-8 or gap > 0


def test_bounds_lie_around_one_and_nothing_is_corrected_twice() -> None:
    for wrong in ({"token_low": 1.1}, {"token_high": 0.9}, {"sequence_low": -0.1}, {"sequence_high": math.nan}):
        with pytest.raises(AssertionError):
            Correction(**wrong)
    with pytest.raises(AssertionError):
        Correction(token="truncate", sequence="truncate")


class Game:
    """Two moves out of three each, the second knowing the first: small enough to ask for every course it can take."""

    def __init__(self, num_moves: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.courses = torch.cartesian_prod(*[torch.arange(3)] * num_moves).view(-1, num_moves)  # [C, M]
        # The logits of each move, by what went before: the other move, or nothing.
        self.policy, self.sampler = torch.randn(2, num_moves, 3, 3, generator=generator, dtype=torch.float64)
        self.rewards = torch.randn(len(self.courses), generator=generator, dtype=torch.float64)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Of every move of every course, [C, M]."""
        before = torch.cat([torch.zeros_like(self.courses[:, :1]), self.courses[:, :-1]], dim=1)
        moves = torch.arange(self.courses.shape[1])
        return logits.log_softmax(-1)[moves, before, self.courses]

    def exact_gradient(self) -> Tensor:
        """Of the mean reward of the policy."""
        leaf = self.policy.clone().requires_grad_()
        mean = (self.logprobs(leaf).sum(1).exp() * self.rewards).sum()
        return torch.autograd.grad(mean, leaf)[0]

    def expected_gradient(self, correction: Correction, weigh: Weigh = importance_weights) -> Tensor:
        """What the weighted loss gives on average over the courses that the sampler takes."""
        leaf = self.policy.clone().requires_grad_()
        logprobs, sampled = self.logprobs(leaf), self.logprobs(self.sampler)
        num_courses, num_moves = self.courses.shape
        inputs = LossInputs(
            logprobs=logprobs.flatten(),
            old_logprobs=logprobs.detach().flatten(),
            advantages=self.rewards.repeat_interleave(num_moves),
            loss_mask=torch.ones(num_courses * num_moves, dtype=torch.bool),
            lengths=(num_moves,) * num_courses,
        )
        losses = weigh(inputs, sampled.flatten(), correction) * clipped_surrogate(inputs, CLIP)
        chances = sampled.sum(1).exp().repeat_interleave(num_moves)
        return -torch.autograd.grad((chances * losses).sum(), leaf)[0]

    def bias(self, correction: Correction, weigh: Weigh = importance_weights) -> float:
        return float((self.expected_gradient(correction, weigh) - self.exact_gradient()).norm())


PLAIN_TOKEN, PLAIN_SEQUENCE = Correction(token="truncate"), Correction(sequence="truncate")


def upside_down(inputs: LossInputs, rollout_logprobs: Tensor, correction: Correction) -> Tensor:
    """The fault of taking the engine's probability over the trainer's."""
    return importance_weights(replace(inputs, old_logprobs=rollout_logprobs), inputs.old_logprobs, correction)


def test_weights_without_bounds_make_the_expected_gradient_exact() -> None:
    assert Game(1).bias(PLAIN_TOKEN) < 1e-12
    assert Game(1).bias(PLAIN_SEQUENCE) < 1e-12
    assert Game(2).bias(PLAIN_SEQUENCE) < 1e-12


def test_the_law_of_exactness_can_fail() -> None:
    for moves, correction in ((1, PLAIN_TOKEN), (2, PLAIN_SEQUENCE)):
        assert Game(moves).bias(Correction()) > 0.1, "without weights"
        assert Game(moves).bias(correction, upside_down) > 0.1, "with the ratio upside down"
    assert Game(2).bias(PLAIN_TOKEN) > 0.01, "the weight of a token says nothing about what went before it"


def test_truncation_trades_bias_for_smaller_weights() -> None:
    biases = [Game(1).bias(Correction(token="truncate", token_high=high)) for high in (1.0, 1.5, 2.5, math.inf)]
    assert biases == sorted(biases, reverse=True)
    assert biases[0] < Game(1).bias(Correction())


def some_samples(seed: int, gap: float) -> list[Sample]:
    """Answers whose rollout log-probabilities are up to ``gap`` from the old ones; every other is nearer."""
    generator = np.random.default_rng(seed)
    samples = []
    for number in range(5):
        length = int(generator.integers(4, 12))
        mask = np.arange(length) >= 2
        old = np.where(mask, generator.uniform(-3, -1, length), 0).astype(np.float32)
        away = generator.uniform(-gap, gap, length) * (0.05 if number % 2 else 1.0)
        samples.append(
            Sample(
                prompt_uid=str(number),
                token_ids=generator.integers(0, 50, length).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, old - away, 0).astype(np.float32),
                advantages=np.where(mask, generator.normal(), 0).astype(np.float32),
                old_logprobs=old,
                ref_logprobs=np.where(mask, old + 0.3, 0).astype(np.float32),
            )
        )
    return samples


def parts_of(samples: Sequence[Sample], objective: Objective, max_tokens: int = 1000) -> tuple[Parts, Tensor]:
    """The numbers of a batch in rows of ``max_tokens``, and the gradients of the log-probabilities, sorted."""
    batch = pack(samples, BatchLayout(1, packing=True, max_tokens=max_tokens, micro_batch_size=1))
    sums, gradients = torch.zeros(()), []
    for micro_batch in batch.ranks[0]:
        parts, gradient = parts_of_row(micro_batch, objective, batch.num_loss_tokens)
        sums = sums + parts.stacked()
        gradients.append(gradient[micro_batch.loss_mask])
    return Parts(*sums.unbind()), torch.cat(gradients).sort().values


def parts_of_row(micro_batch: MicroBatch, objective: Objective, num_loss_tokens: int) -> tuple[Parts, Tensor]:
    assert micro_batch.old_logprobs is not None
    logprobs = (micro_batch.old_logprobs + 0.1 * micro_batch.labels.sin()).requires_grad_()
    parts = objective_parts(objective, micro_batch, logprobs, logprobs.square(), num_loss_tokens)
    return parts, torch.autograd.grad(parts.loss, logprobs)[0]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_where_engine_and_trainer_agree_a_correction_changes_nothing(loss: str, correction: Correction) -> None:
    plain = Objective(POLICY_LOSSES[loss], CLIP, kl_coef=0.1, entropy_coef=0.01)
    samples = some_samples(seed=1, gap=0.0)
    expected, expected_gradient = parts_of(samples, plain)
    found, gradient = parts_of(samples, replace(plain, correction=correction))
    assert torch.equal(found.stacked(), expected.stacked())
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_only_the_policy_loss_is_weighed(correction: Correction) -> None:
    plain = Objective(clipped_surrogate, CLIP, kl_coef=0.1, entropy_coef=0.01)
    samples = some_samples(seed=2, gap=1.5)
    expected, found = (parts_of(samples, objective)[0] for objective in (plain, replace(plain, correction=correction)))
    changed = {name for name, value in vars(found).items() if value != vars(expected)[name]}
    weighed = {"loss", "pg_loss", "correction_weight_mean", "correction_weight_square_mean"}
    assert changed - {"correction_masked_ratio"} == weighed
    whole = found.pg_loss + 0.1 * found.kl_loss - 0.01 * found.entropy
    assert float(found.loss) == pytest.approx(float(whole), rel=1e-5)


def test_what_is_masked_does_not_make_the_rest_louder() -> None:
    """The gradient of a token that stays is its own, whether its neighbours are dropped or not."""
    samples = some_samples(seed=3, gap=1.5)
    kept = Objective(clipped_surrogate, CLIP, correction=Correction(token="truncate"))
    masking = Objective(clipped_surrogate, CLIP, correction=Correction(token="mask", token_low=0.6, token_high=2.0))
    all_gradients, some_gradients = parts_of(samples, kept)[1], parts_of(samples, masking)[1]
    remaining = some_gradients[some_gradients != 0]
    assert 0 < len(remaining) < len(all_gradients)
    assert set(remaining.tolist()) <= set(all_gradients.tolist())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_numbers_are_those_of_all_weights_however_the_batch_is_cut(correction: Correction) -> None:
    samples = some_samples(seed=4, gap=1.5)
    weights = np.concatenate(
        weights_of(
            [
                [
                    (float(old), float(rollout), True)
                    for old, rollout, is_trained in zip(
                        sample.old_logprobs, sample.rollout_logprobs, sample.loss_mask, strict=True
                    )
                    if is_trained
                ]
                for sample in samples
            ],
            correction,
        )
    )
    for max_tokens in (1000, 12):
        parts, _ = parts_of(samples, Objective(clipped_surrogate, CLIP, correction=correction), max_tokens)
        mean, square = float(parts.correction_weight_mean), float(parts.correction_weight_square_mean)
        assert mean == pytest.approx(weights.mean(), rel=1e-5)
        assert float(parts.correction_masked_ratio) == pytest.approx((weights == 0).mean())
        ess = weights.sum() ** 2 / np.square(weights).sum() / len(weights)
        assert effective_sample_share(mean, square) == pytest.approx(ess, rel=1e-5)
        assert 0 < ess < 1


def test_nothing_is_effective_where_all_is_masked() -> None:
    assert effective_sample_share(0.0, 0.0) == 0.0
    assert effective_sample_share(1.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), None),
        (("token=off", "sequence=off"), None),
        (("token=truncate",), TOKEN_TRUNCATE),
        (("token=mask",), TOKEN_MASK),
        (("token=mask", "token_low=0.25", "token_high=.inf"), Correction(token="mask", token_low=0.25)),
        (("sequence=truncate",), SEQUENCE_TRUNCATE),
        (("token=truncate", "sequence=mask", "sequence_low=0.9", "sequence_high=1.1"), BOTH),
    ],
)
def test_keys_become_the_correction(tmp_path: Path, overrides: Sequence[str], expected: Correction | None) -> None:
    section = "models.policy_trainer.rollout_correction"
    config = read_config(TEMPLATE, [f"{section}.{override}" for override in overrides])
    assert recipe.objective(config).correction == expected
    again = tmp_path / "config.yaml"
    again.write_text(resolved_text(config))
    assert recipe.objective(read_config(again)).correction == expected
