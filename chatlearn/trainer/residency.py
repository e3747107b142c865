"""Moving a trainer's memory between the device and the host, so that roles which share a device can take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chatlearn import device

if TYPE_CHECKING:
    from chatlearn.trainer.sharded_model import ShardedModel

HOST = torch.device("cpu")


class Residency:
    """Where a model and its optimizer are. On the CPU they are at home always, and every method does nothing.

    Weights and optimizer move independently, because a run may ask for either. Gradients need no moving: none exist
    between steps.
    """

    def __init__(self, model: ShardedModel, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def bring_weights(self) -> None:
        """To the device: enough for scoring and for publishing weights."""
        self._move_weights(self.model.device)

    def send_weights_home(self) -> None:
        """To the host, and give the memory back to the device for others."""
        self._move_weights(HOST)
        device.empty_cache(self.model.device_kind)

    def bring_optimizer(self) -> None:
        """To the device: needed, with the weights, for a step."""
        self._move_optimizer(self.model.device)

    def send_optimizer_home(self) -> None:
        """To the host, and give the memory back to the device for others."""
        self._move_optimizer(HOST)
        device.empty_cache(self.model.device_kind)

    def _move_weights(self, target: torch.device) -> None:
        if self.model.device_kind != "cpu":
            self.model.module.to(target)

    def _move_optimizer(self, target: torch.device) -> None:
        if self.model.device_kind == "cpu" or self.optimizer is None:
            return
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(target)
