"""What can go wrong between a trainer that sends weights and an engine that receives them."""

from __future__ import annotations

from typing import Any

import numpy as np

from chatlearn.rollout.engine import RolloutEngine
from chatlearn.weights.wire import BeginUpdate, TransferMessage, UpdateWeights


class Tampering:
    """An ``EngineClient`` on a bad line: what ``change`` makes of a message is what arrives (None: nothing)."""

    def __init__(self, engine: RolloutEngine, change: Any) -> None:
        self._engine = engine
        self._change = change

    def send(self, message: TransferMessage) -> None:
        changed = self._change(message)
        if changed is not None:
            self._engine.load_weights(changed)


def drop_down_projection(message: TransferMessage) -> TransferMessage | None:
    if isinstance(message, UpdateWeights) and "model.layers.2.mlp.down_proj.weight" in message.info["names"]:
        index = message.info["names"].index("model.layers.2.mlp.down_proj.weight")
        lists = {key: value for key, value in message.info.items() if isinstance(value, list)}
        return UpdateWeights({**message.info, **{key: v[:index] + v[index + 1 :] for key, v in lists.items()}})
    return message


def rename_first(message: TransferMessage) -> TransferMessage:
    if isinstance(message, UpdateWeights):
        return UpdateWeights({**message.info, "names": ["model.nothing.weight", *message.info["names"][1:]]})
    return message


def flatten_first(message: TransferMessage) -> TransferMessage:
    if isinstance(message, UpdateWeights):
        first, *others = message.info["shapes"]
        return UpdateWeights({**message.info, "shapes": [[int(np.prod(first))], *others]})
    return message


def damage_third(message: TransferMessage) -> TransferMessage:
    if isinstance(message, UpdateWeights):
        sums = list(message.info["checksums"])
        sums[2] ^= 1
        return UpdateWeights({**message.info, "checksums": sums})
    return message


def end_too_early(message: TransferMessage) -> TransferMessage | None:
    return None if isinstance(message, BeginUpdate | UpdateWeights) else message
