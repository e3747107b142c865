"""Which rotary position embeddings a packed row can have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chatlearn.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

# transformers computes the frequencies of these anew from the largest position of each row.
MOVING_KINDS: Final = ("dynamic", "longrope")


def require_fixed_frequencies(config: PreTrainedConfig, model_dir: Path) -> None:
    """Raise ``DataError`` where a sequence's frequencies would depend on its neighbours in a packed row.

    Scaling that is the same at every length (linear, YaRN, Llama 3's) is as good as none.
    """
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind in MOVING_KINDS:
        raise DataError(
            f"{model_dir / 'config.json'}: rotary embeddings of rope_type '{kind}' change with the longest sequence of "
            "a batch, so the same answer would be scored differently beside other answers; "
            "use a model with fixed scaling (default, linear, yarn or llama3), or set rope_type to 'default'"
        )
