"""Which experts the tokens are sent to: recorded in an engine, compared in a trainer, and replayed where wanted.

Engine and trainer round differently, and near a tie a router then sends a token elsewhere: the probability of the next
token jumps though the weights are the same. A trainer that replays takes the engine's choice of experts and weighs
them by its own router's probabilities, so the router is trained still (arXiv:2510.11370).

The routes of a forward travel through it as the keyword ``routes``. Every decoder layer hands them to its router, also
when checkpointing computes the layer a second time; every forward brings its own, or none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.models.naming import ExpertLayout
    from chatlearn.records import ExpertStream

# Stands in a micro-batch where the engine told no expert; the trainer's router then chooses.
UNKNOWN = -1

# The largest number of experts whose numbers fit into one byte.
MAX_EXPERTS_IN_A_BYTE = 256


class Routes:
    """The experts an engine chose for the T tokens of one forward, and how often the routers that see them agree.

    ``experts`` [T, L, K] counts layers over all decoder layers. ``counted`` [T] tells which tokens are compared.
    Without ``replayed`` the routers do what they would have done. No record, because sharding hands its modules copies
    of the records they are called with, and what the routers find would stay in the copy.
    """

    def __init__(self, experts: Tensor, counted: Tensor, *, replayed: bool) -> None:
        self.experts = experts
        self.counted = counted
        self.replayed = replayed
        # By layer, so that a layer that is computed again for the backward pass counts once.
        self.agreement_of_layer: dict[int, Tensor] = {}


class RouterTally:
    """How many of the engine's choices the routers of this rank made too, over the micro-batches of a step.

    Choices are those for loss tokens, in all layers with experts, in all places; where they are replayed, a router
    chooses on what the replayed layers before it made of the token.
    """

    def __init__(self) -> None:
        self._forwards: list[dict[int, Tensor]] = []

    def add(self, routes: Routes) -> None:
        """Count what a forward with these routes finds."""
        self._forwards.append(routes.agreement_of_layer)

    def sums(self, device: torch.device) -> Tensor:
        """The choices that agree, and all that were compared: float64 [2], to be summed over all ranks."""
        counts = [count for by_layer in self._forwards for count in by_layer.values()]
        return torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.float64, device=device)


def share_agreeing(sums: Tensor) -> float | None:
    """From the sums over all ranks, the share; ``None`` where nothing was compared."""
    agreeing, compared = sums.tolist()
    return agreeing / compared if compared else None


class RouterPost:
    """Stands between a decoder layer and its router, and applies the routes of the forward that runs."""

    def __init__(self, layer: int, *, normalised: bool) -> None:
        self._layer = layer
        self._normalised = normalised
        self._routes: Routes | None = None

    def enter_layer(self, _block: nn.Module, _arguments: object, keywords: dict[str, Any]) -> None:
        """Take the routes out of the keywords of the layer; a hook before its forward."""
        self._routes = keywords.get("routes")

    def leave_router(
        self, _router: nn.Module, _arguments: object, choice: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compare the router's choice with the given one, and replace it where asked; a hook after its forward."""
        if self._routes is None:
            return None
        logits, weights, own = choice
        given = self._routes.experts[:, self._layer].to(own.dtype)  # [T, K]
        assert given.shape == own.shape, f"routes {tuple(given.shape)} for a router of {tuple(own.shape)}"
        self._routes.agreement_of_layer[self._layer] = agreement(given, own, self._routes.counted)
        if not self._routes.replayed:
            return None
        experts = torch.where(given == UNKNOWN, own, given)
        return logits, weights_of(experts, logits, normalised=self._normalised).to(weights.dtype), experts


def weights_of(experts: Tensor, logits: Tensor, *, normalised: bool) -> Tensor:
    """What a softmax router weighs the given experts [T, K] with, float32, differentiable in the logits [T, E]."""
    weights = logits.softmax(-1, dtype=torch.float32).gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights


@torch.no_grad()
def agreement(given: Tensor, own: Tensor, counted: Tensor) -> Tensor:
    """How many of the given experts [T, K] are among a router's own, in any order, and of how many; float64 [2].

    >>> agreement(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0, 2], [1, 0]]), torch.tensor([True, True])).tolist()
    [3.0, 4.0]
    """
    compared = (given != UNKNOWN) & counted[:, None]
    agreed = (given[:, :, None] == own[:, None, :]).any(-1) & compared
    return torch.stack([agreed.sum(), compared.sum()]).double()


def watch_routers(causal_model: nn.Module, layout: ExpertLayout) -> None:
    """Let the routers of the model heed the keyword ``routes`` of its forward."""
    for layer, (block, router) in routers_of(causal_model, layout).items():
        # The routers of transformers declare it; the record of the family says that this is one.
        post = RouterPost(layer, normalised=cast("Any", router).norm_topk_prob)
        block.register_forward_pre_hook(post.enter_layer, with_kwargs=True)
        router.register_forward_hook(post.leave_router)


def routers_of(causal_model: nn.Module, layout: ExpertLayout) -> dict[int, tuple[nn.Module, nn.Module]]:
    """The number of each decoder layer that has experts, with the layer and its router."""
    name_of_router = re.compile(rf"(.+\.(\d+))\.{re.escape(layout.router)}")
    places = {name: match for name, _ in causal_model.named_modules() if (match := name_of_router.fullmatch(name))}
    assert places, f"no module is called {layout.router}; correct the record of the family"
    return {
        int(match[2]): (causal_model.get_submodule(match[1]), causal_model.get_submodule(name))
        for name, match in places.items()
    }


class RouteRecorder:
    """Keeps what the routers of a model chose in its latest forward."""

    def __init__(self, causal_model: nn.Module, layout: ExpertLayout) -> None:
        config: Any = cast("Any", causal_model).config
        self._shape: tuple[int, int] = (config.num_hidden_layers, config.num_experts_per_tok)
        self._dtype = expert_dtype(config.num_experts)
        self._choices: dict[int, Tensor] = {}
        for layer, (_, router) in routers_of(causal_model, layout).items():
            router.register_forward_hook(self._keep_of(layer))

    def latest(self, num_rows: int) -> ExpertStream:
        """The choices of the latest forward, whose tokens lie in rows: [rows, tokens per row, L, K]; zero for dense."""
        num_tokens = len(next(iter(self._choices.values())))
        chosen = np.zeros((num_tokens, *self._shape), dtype=self._dtype)
        for layer, experts in self._choices.items():
            chosen[:, layer] = experts.cpu().numpy()
        return chosen.reshape(num_rows, -1, *self._shape)

    def joined(self, pieces: Sequence[ExpertStream]) -> ExpertStream:
        """Pieces [tokens, L, K] end to end; without any, the routes of no token."""
        return np.concatenate([np.zeros((0, *self._shape), dtype=self._dtype), *pieces])

    def _keep_of(self, layer: int) -> Any:
        """The hook of one router; torch wants any callable."""

        def keep(_router: nn.Module, _arguments: object, choice: tuple[Tensor, Tensor, Tensor]) -> None:
            self._choices[layer] = choice[2]

        return keep


def expert_dtype(num_experts: int) -> type[np.uint8] | type[np.int16]:
    """The smallest type that holds the number of every expert."""
    return np.uint8 if num_experts <= MAX_EXPERTS_IN_A_BYTE else np.int16
