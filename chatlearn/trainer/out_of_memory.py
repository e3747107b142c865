"""What to change when a step does not fit in memory, said by the program that knows what it was computing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from chatlearn.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from chatlearn.batch.pack import MicroBatch

# Of those who take memory past torch's allocator of the device, and whose complaints have no class of their own: the
# allocator of host memory; the driver, also for pinned memory, and the collectives; the libraries of products.
COMPLAINTS = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")

SMALLER_BATCH = (
    "with models.policy_trainer.packing=True, lower models.policy_trainer.max_token_in_packing",
    "with models.policy_trainer.packing=False, lower runtime_args.train_micro_batch_size",
)
SMALLER_SCORING = (
    "with models.policy_trainer.packing=True, lower models.policy_trainer.max_token_in_packing",
    "with models.policy_trainer.packing=False, lower models.policy_trainer.generation_batch_size",
)
SMALLER_SEQUENCE = (
    "raise models.policy_trainer.ulysses_sequence_parallel_size (a power of 2, not above the GPUs of one node)",
    "set models.policy_trainer.gradient_checkpointing=True, if it is not",
)
SMALLER_SHARE = (
    "raise models.policy_trainer.num_gpu: weights, gradients and optimizer shrink in proportion to the ranks that "
    "share them",
)
SMALLER_STATE = (
    "set models.policy_trainer.optimizer.state_dtype=bfloat16, or models.policy_trainer.optimizer.keep_on_host=True",
)


def advice_about(micro_batch: MicroBatch) -> AbstractContextManager[None]:
    """Forward and backward of a micro-batch: running out of memory becomes a ``RunError`` that says what to change.

    An answer that is alone already cannot be given fewer neighbours.
    """
    smaller = () if len(micro_batch.lengths) == 1 else SMALLER_BATCH
    return _advised(f"forward and backward of {_described(micro_batch)}", (*smaller, *SMALLER_SEQUENCE, *SMALLER_SHARE))


def advice_about_scoring(micro_batch: MicroBatch) -> AbstractContextManager[None]:
    """The same for a forward pass alone; a reference model has the same keys, and those of the trainer by default."""
    smaller = () if len(micro_batch.lengths) == 1 else SMALLER_SCORING
    return _advised(f"scoring {_described(micro_batch)}", (*smaller, *SMALLER_SEQUENCE[:1], *SMALLER_SHARE))


def advice_about_update() -> AbstractContextManager[None]:
    """The same for the optimizer's step, whose memory does not depend on the batch."""
    return _advised("the optimizer's step", (*SMALLER_STATE, *SMALLER_SHARE))


@contextmanager
def _advised(what: str, advice: tuple[str, ...]) -> Generator[None]:
    """``advice`` is in the order to try."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise RunError(_message(what, error, advice)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory, from the device or from the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(complaint in str(error) for complaint in COMPLAINTS)


def _described(micro_batch: MicroBatch) -> str:
    lengths = micro_batch.lengths
    return (
        f"a micro-batch of {micro_batch.num_tokens:,} tokens "
        f"({len(lengths)} {'answer' if len(lengths) == 1 else 'answers'}, the longest with its prompt {max(lengths):,})"
    )


def _message(what: str, error: RuntimeError, advice: tuple[str, ...]) -> str:
    steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(advice, start=1))
    reason = str(error).partition("\n")[0]
    return f"policy_trainer: out of memory in {what}: {reason}\nIn this order, until it fits:\n{steps}"
