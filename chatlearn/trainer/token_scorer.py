"""A causal language model that answers with the log-probability of each label instead of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from chatlearn.algorithm.logprob import token_logprobs_and_entropy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from chatlearn.models.attention import PackedLayout
    from chatlearn.models.router_replay import Routes


# From hidden states, head, labels and temperature to the log-probability of each label and the entropy of each guess.
Reading = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class TokenScorer(nn.Module):
    """Backbone and head in one forward, so that sharding gathers the head's weight for as long as it is used.

    Parameters have the names they have in transformers' causal model. There is no ``lm_head`` where the head is tied:
    the embedding's weight is used, so the two cannot come apart.
    """

    def __init__(self, causal_model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        assert temperature > 0, "greedy sampling has no log-probabilities to train on"
        # transformers types sub-modules as Tensor | Module; in a causal model these are what their names say.
        self.model = cast("PreTrainedModel", causal_model.model)
        self.lm_head = None if causal_model.config.tie_word_embeddings else cast("nn.Linear", causal_model.lm_head)
        self.temperature = temperature
        self.read: Reading = token_logprobs_and_entropy

    def forward(
        self,
        token_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        packed: PackedLayout,
        routes: Routes | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy of each guess at the temperature, both float32 [T]; inputs [T]."""
        hidden = self.model(
            input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, packed=packed, routes=routes
        ).last_hidden_state[0]  # [T, H]
        logprobs, entropy = self.read(hidden, self.head_weight(), labels, self.temperature)
        # They may be rows of one tensor, and sharding hangs its backward hook on outputs that own their memory.
        return logprobs.clone(), entropy.clone()

    def head_weight(self) -> Tensor:
        """The matrix [V, H] that turns hidden states into logits."""
        if self.lm_head is not None:
            return self.lm_head.weight
        return cast("nn.Embedding", self.model.get_input_embeddings()).weight

    def rebuild_rotary_embedding(self, device: torch.device) -> None:
        """Compute the rotary frequencies anew: no checkpoint has them, nor has a module built without memory."""
        rotary = cast("nn.Module", self.model.rotary_emb)
        self.model.rotary_emb = type(rotary)(config=self.model.config).to(device)
