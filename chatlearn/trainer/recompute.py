"""Which activations the backward pass keeps, and which it finds again by computing a block anew."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.utils.checkpoint import SelectiveCheckpointContext
    from transformers import PreTrainedModel

# "full" keeps the input of each block, "selective" also the result of its attention, "off" everything.
Checkpointing = Literal["off", "selective", "full"]

# Every kernel that attention may end in. Per byte of its result, attention over n tokens costs about n/2 operations,
# growing with the sequence; a product with a weight of k columns costs k, whatever the sequence. For the long responses
# that need checkpointing at all, attention is the dearest to repeat, and its result is small: as wide as the hidden
# state, where the results of the products of a block together are some ten times as wide. So no product is kept. The
# exchanges of sequence parallelism are not either: they write into a given tensor, and what is kept must be returned.
KEPT: Final = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_varlen_forward",
        "torch_attn::_varlen_attn",
    }
)


def checkpoint_blocks(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Let training's forward keep of each block what ``checkpointing`` names, and its backward compute the rest."""
    if checkpointing == "off":
        return
    # Nothing in the model is random, so no generator's state need be kept for the second forward.
    options: dict[str, object] = {"use_reentrant": False, "preserve_rng_state": False}
    if checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
    model.gradient_checkpointing_enable(options)


def keep_attention(
    _context: SelectiveCheckpointContext, operator: OpOverload, *_inputs: object, **_options: object
) -> CheckpointPolicy:
    """Keep the results of attention; it alone is worth its memory."""
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
