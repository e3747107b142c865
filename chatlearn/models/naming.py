"""How a model family calls its weights in memory and in a Hugging Face checkpoint.

Most parameters are stored under the name they have in memory. Experts are not: transformers keeps all experts of a
layer in one tensor, checkpoints and engines know one matrix per expert. ``ModelFamily.pieces`` says which stored tensor
is which block of a parameter, and loading and exporting both follow it, so they cannot disagree. The base of an adapted
layer is stored as if it had no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.models.lora import without_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class StoredPiece:
    """A tensor of the checkpoint and the block of the parameter that it is.

    ``expert`` picks one matrix of a ``[E, rows, columns]`` parameter, ``rows`` a range of rows of it.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The block as a view of the whole parameter."""
        block = parameter if self.expert is None else parameter[self.expert]
        return block if self.rows is None else block[slice(*self.rows)]


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts of a mixture are, in memory and stored.

    ``gate_up`` ``[E, 2I, H]`` holds the gate's rows above the up projection's, ``down`` is ``[E, H, I]``. The stored
    names have ``{expert}`` in the place of the expert's number; all are relative to the decoder layer. ``router`` is
    the module that chooses: it answers ``(logits [T, E], weights [T, K], experts [T, K])``, where the weights are
    the softmax over all experts at the chosen ones.
    """

    router: str
    gate_up: str
    down: str
    stored_gate: str
    stored_up: str
    stored_down: str


@dataclass(frozen=True)
class ModelFamily:
    """All we know about one family: its Hugging Face architecture, its repeated block, and its experts if any."""

    architecture: str
    block_class: str
    experts: ExpertLayout | None = None

    def pieces(self, name: str, shape: tuple[int, ...]) -> tuple[StoredPiece, ...]:
        """The stored tensors that together are the parameter ``name`` of this shape, in the order of the checkpoint.

        >>> ModelFamily("LlamaForCausalLM", "LlamaDecoderLayer").pieces("model.norm.weight", (64,))
        (StoredPiece(name='model.norm.weight', expert=None, rows=None),)
        """
        if self.experts is not None and name.endswith("." + self.experts.gate_up):
            layer = name.removesuffix(self.experts.gate_up)
            middle = shape[1] // 2
            return tuple(
                piece
                for expert in range(shape[0])
                for piece in (
                    StoredPiece(layer + self.experts.stored_gate.format(expert=expert), expert, (0, middle)),
                    StoredPiece(layer + self.experts.stored_up.format(expert=expert), expert, (middle, shape[1])),
                )
            )
        if self.experts is not None and name.endswith("." + self.experts.down):
            layer = name.removesuffix(self.experts.down)
            return tuple(
                StoredPiece(layer + self.experts.stored_down.format(expert=expert), expert)
                for expert in range(shape[0])
            )
        return (StoredPiece(without_adapter(name)),)

    def export(self, name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameter under its stored names, as views."""
        for piece in self.pieces(name, tuple(parameter.shape)):
            yield piece.name, piece.of(parameter)
