"""The endless stream of prompts: an order per epoch, and a position from which the same stream goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chatlearn.errors import DataError
from chatlearn.records import Prompt


@dataclass(frozen=True)
class StreamPosition:
    """Everything that determines the rest of a stream, given prompts, seed and shuffle.

    ``deferred`` are prompts of this epoch, as places in the prompt list, that were passed over at the epoch's border
    and come next.
    """

    epoch: int = 0
    offset: int = 0  # prompts of this epoch's order that were taken or deferred
    deferred: tuple[int, ...] = ()


class PromptStream:
    """Gives out prompts epoch after epoch; in every epoch each prompt once.

    One ``take`` never holds a prompt twice while there are enough: where it crosses the border of two epochs, prompts
    that it has already are deferred to the front of the next take. With ``shuffle`` the order of an epoch follows from
    seed and epoch alone; without, it is the order of the files.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, shuffle: bool, position: StreamPosition | None = None
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts to take from")
        position = position or StreamPosition()
        last = max(position.offset - 1, *position.deferred, -1)
        if last >= len(prompts):
            raise DataError(
                f"the saved position lies at prompt {last + 1} of an epoch, but there are {len(prompts)} prompts; "
                "the data or max_prompt_tokens_length has changed since it was saved"
            )
        self._prompts = prompts
        self._places = {prompt.uid: place for place, prompt in enumerate(prompts)}
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = position.epoch
        self._offset = position.offset
        self._deferred = position.deferred
        self._order = self._epoch_order(position.epoch)

    @property
    def position(self) -> StreamPosition:
        """Where the next ``take`` begins."""
        return StreamPosition(self._epoch, self._offset, self._deferred)

    def give_back(self, taken: Sequence[Prompt]) -> None:
        """Let the next ``take`` begin with these prompts, which nothing came of."""
        unknown = [prompt.uid for prompt in taken if prompt.uid not in self._places]
        if unknown:
            raise DataError(
                f"the prompt {unknown[0]}, which was being answered when the checkpoint was saved, is not among the "
                f"{len(self._prompts)} prompts; the data, the tokenizer or max_prompt_tokens_length has changed since"
            )
        self._deferred = (*(self._places[prompt.uid] for prompt in taken), *self._deferred)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        taken: list[int] = []
        round_members: set[int] = set()
        passed_over: list[int] = []
        waiting = deque(self._deferred)
        while len(taken) < count:
            if len(round_members) == len(self._prompts):  # more are asked for than there are: begin a second round
                round_members.clear()
                waiting.extendleft(reversed(passed_over))
                passed_over.clear()
            index = waiting.popleft() if waiting else self._advance()
            if index in round_members:
                passed_over.append(index)
            else:
                round_members.add(index)
                taken.append(index)
        self._deferred = (*passed_over, *waiting)
        return [self._prompts[index] for index in taken]

    def _advance(self) -> int:
        if self._offset == len(self._prompts):
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._epoch_order(self._epoch)
        self._offset += 1
        return self._order[self._offset - 1]

    def _epoch_order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        # numpy promises these raw numbers for all its versions; it does not promise what permutation() makes of them.
        keys = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(len(self._prompts))
        return np.argsort(keys, kind="stable").tolist()
