"""Importance weights for answers that another distribution sampled than the one the trainer scores.

Engine and trainer compute the same model with other kernels and number formats; the engine's weights may be some
versions old; truncation and penalties change what is sampled. Three policies take part (decoupled PPO,
arXiv:2110.00641): ``q``, which sampled; ``p``, the trainer's before the first step of the episode; and the one that is
trained. The ratio in the loss leads from ``p`` to the last; the weight here, made of ``p / q``, leads from ``q`` to
``p``. It carries no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from chatlearn.algorithm.loss import LossInputs, sequence_mean, sequence_sum

Level = Literal["token", "sequence"]
Mode = Literal["off", "truncate", "mask"]

# e**20 is half a billion: far beyond any bound with a meaning, and its square is far below float32's largest number.
MAX_LOG_RATIO: Final = 20.0

# Bounds where a user names none. Truncated at 2: what TIS (see ``Correction``) is mostly used with. The band of tokens
# is IcePop's. That of sequences is about the mean per token: at its ends one of the two finds an answer of 100 tokens
# more than 100 times likelier than the other does.
BOUNDS: Final[dict[tuple[Level, Mode], tuple[float, float]]] = {
    ("token", "off"): (0.0, math.inf),
    ("token", "truncate"): (0.0, 2.0),
    ("token", "mask"): (0.5, 5.0),
    ("sequence", "off"): (0.0, math.inf),
    ("sequence", "truncate"): (0.0, 2.0),
    ("sequence", "mask"): (0.95, 1.05),
}


@dataclass(frozen=True)
class Correction:
    """What a token's policy loss is multiplied by: its token weight times its sequence's weight.

    Token, by the ratio ``r = p / q`` of the token:

    - ``truncate``: ``r`` cut to ``[low, high]``. With ``low`` 0 it is truncated importance sampling, TIS (Ionides,
      "Truncated Importance Sampling", 2008; for engine and trainer: Yao et al., "Your Efficient RL Framework Secretly
      Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl).
    - ``mask``: ``r`` inside ``[low, high]``, 0 outside (IcePop, arXiv:2510.18855).

    Sequence, by all loss tokens of the answer:

    - ``truncate``: the product of their ratios, cut to ``[low, high]``. Only the product makes the expected gradient of
      a whole answer right, where tokens change what comes after them (Liu, Li et al., "When Speed Kills Stability",
      https://richardli.xyz/rl-collapse). It contains the tokens' ratios, so ``token`` must be off.
    - ``mask``: 1 where the geometric mean of their ratios is inside ``[low, high]``, 0 outside. The mean, because the
      spread of the product grows with the length: a band for it would drop the long answers (as above, part 3;
      DeepSeek-V3.2 drops answers by the mean too, arXiv:2512.02556). It only admits answers, and weighs none: together
      with a token weight, both do what they are for.
    """

    token: Mode = "off"
    token_low: float = 0.0
    token_high: float = math.inf
    sequence: Mode = "off"
    sequence_low: float = 0.0
    sequence_high: float = math.inf

    def __post_init__(self) -> None:
        # Otherwise answers of the trainer's own distribution would be dropped, or weigh other than 1.
        assert 0 <= self.token_low <= 1 <= self.token_high, "the token bounds must lie around 1"
        assert 0 <= self.sequence_low <= 1 <= self.sequence_high, "the sequence bounds must lie around 1"
        assert self.sequence != "truncate" or self.token == "off", "the product contains the tokens' ratios"


def importance_weights(inputs: LossInputs, rollout_logprobs: Tensor, correction: Correction) -> Tensor:
    """The weight of every token, [T], without gradient; exactly 1 where engine and trainer agree.

    ``rollout_logprobs`` [T] are the engine's, of the distribution that was sampled. What stands where the loss mask is
    False means nothing.
    """
    difference = (inputs.old_logprobs - rollout_logprobs).masked_fill(~inputs.loss_mask, 0.0)
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _token_weights(log_ratio, correction) * _sequence_weights(log_ratio, inputs, correction)


def _token_weights(log_ratio: Tensor, correction: Correction) -> Tensor:
    low, high = correction.token_low, correction.token_high
    ratio = log_ratio.exp()
    match correction.token:
        case "off":
            return torch.ones_like(ratio)
        case "truncate":
            return ratio.clamp(low, high)
        case "mask":
            return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def _sequence_weights(log_ratio: Tensor, inputs: LossInputs, correction: Correction) -> Tensor:
    low, high = correction.sequence_low, correction.sequence_high
    match correction.sequence:
        case "off":
            return torch.ones_like(log_ratio)
        case "truncate":
            total = sequence_sum(log_ratio, inputs.lengths)
            return total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(low, high)
        case "mask":
            ratio = sequence_mean(log_ratio, inputs).exp()
            return torch.ones_like(ratio).masked_fill((ratio < low) | (ratio > high), 0.0)


def effective_sample_share(weight_mean: float, weight_square_mean: float) -> float:
    """Kish's effective sample size, ``(sum w)**2 / sum w**2``, as a share of the number of tokens; 0 if all w are 0.

    Means over the same tokens are sums that were divided by one number, so parts of them may be added up first.

    >>> effective_sample_share(weight_mean=0.5, weight_square_mean=0.5)  # half of the tokens weigh 1, half 0
    0.5
    """
    return weight_mean**2 / weight_square_mean if weight_square_mean > 0 else 0.0
