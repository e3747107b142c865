"""Moving a trainer's memory between the device and the host, so that roles which share a device can take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from chatlearn import device

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatlearn.trainer.sharded_model import ShardedModel

    Tensors = dict[str, Tensor]  # by name
    Places = Callable[[Tensors], Tensors]  # memory, still without values, for each of some tensors


class Residency:
    """Where a model and its optimizer are; at first, on the device.

    Weights and optimizer move independently, because a run may ask for either. Gradients need no moving: none exist
    between steps. Nothing moves (``moves``) where there is one memory only, nor where weights live on the host anyway.

    Host memory is pinned, so that copies run at the speed of the bus and side by side. To pin memory takes longer than
    to fill it: what was sent home once keeps its place there for the rest of the run.
    """

    def __init__(self, model: ShardedModel, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.moves = model.device_kind != "cpu" and not model.spec.on_host
        self._weights_at_home = False
        self._optimizer_at_home = False
        self._weight_places = HostPlaces()
        self._optimizer_places = HostPlaces()

    def bring_weights(self) -> None:
        """To the device: enough for scoring and for publishing weights."""
        if self.moves and self._weights_at_home:
            self._move_weights(self._fresh)
            self._weights_at_home = False

    def send_weights_home(self) -> None:
        """To the host, and give the memory back to the device for others: also what a step left of a model at home."""
        if self.moves and not self._weights_at_home:
            self._move_weights(self._weight_places.of)
            self._weights_at_home = True
        device.empty_cache(self.model.device_kind)

    def bring_optimizer(self) -> None:
        """To the device: needed, with the weights, for a step."""
        if self.moves and self._optimizer_at_home:
            self._move_optimizer(self._fresh)
            self._optimizer_at_home = False

    def send_optimizer_home(self) -> None:
        """To the host, and give the memory back to the device for others."""
        if self.moves and not self._optimizer_at_home:
            self._move_optimizer(self._optimizer_places.of)
            self._optimizer_at_home = True
            device.empty_cache(self.model.device_kind)

    def _move_weights(self, places: Places) -> None:
        """Parameters and buffers; only shards, which are all there is between steps."""
        module = self.model.module
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        arrived = self._copied(tensors, places)
        by_identity = {id(tensor): arrived[name] for name, tensor in tensors.items()}

        def replacement(tensor: Tensor) -> Tensor:
            return by_identity[id(tensor)]

        # What Module.to() is made of: parameters stay the objects that the optimizer knows, and FSDP takes note.
        module._apply(replacement)  # pyright: ignore[reportPrivateUsage]

    def _move_optimizer(self, places: Places) -> None:
        """All tensors of its state."""
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        tensors = {
            f"{number}.{name}": value
            for number, state in enumerate(states)
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        arrived = self._copied(tensors, places)
        for number, state in enumerate(states):
            state.update({name: arrived[f"{number}.{name}"] for name in state if f"{number}.{name}" in arrived})

    @torch.no_grad()
    def _copied(self, tensors: Tensors, places: Places) -> Tensors:
        """Copies in new places. All are under way at once, and done at the end: FSDP may pad what has arrived."""
        arrived = places(tensors)
        with device.side_by_side_copies(self.model.device_kind):
            for name, tensor in tensors.items():
                arrived[name].copy_(tensor, non_blocking=True)
        return arrived

    def _fresh(self, tensors: Tensors) -> Tensors:
        return {name: torch.empty_like(tensor, device=self.model.device) for name, tensor in tensors.items()}


class HostPlaces:
    """Pinned host memory for tensors by name, allocated when a tensor first comes and kept for its next stay."""

    def __init__(self) -> None:
        self._places: Tensors = {}

    def of(self, tensors: Tensors) -> Tensors:
        """A place for each; a tensor of another shape or dtype than last time gets a new one."""
        for name, tensor in tensors.items():
            place = self._places.get(name)
            if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                self._places[name] = device.pinned_like(tensor)
        return {name: self._places[name] for name in tensors}
