"""How old answers may become while weights go on: a bound that is never exceeded, kept by counting.

A group that was begun while version b was published may be in the batch that turns version b + ``bound`` into the next,
and in none after that: this is its last chance. Two rules keep it, whatever engines and graders do:

1. while version v is published, at most v + 1 + ``bound`` batches of groups have been begun since the beginning: all
   that wait fit into the batches up to the last chance of the newest;
2. a batch leaves no more groups whose last chance comes by version d than the batches up to d can hold. It takes the
   oldest groups that are ready, and waits where those are not enough for that.

When all groups are ready the oldest are always enough: a run never stands still.
"""

from __future__ import annotations

from collections.abc import Sequence


class StalenessBound:
    """Counts groups by their numbers. ``first_version`` is where counting begins, ``last_version`` where the run ends:
    nothing is begun that nothing would be learned from."""

    def __init__(self, bound: int, groups_per_batch: int, first_version: int, last_version: int) -> None:
        self._bound = bound
        self._groups_per_batch = groups_per_batch
        self._first_version = first_version
        self._last_version = last_version
        self._num_begun = 0
        self._last_chance: dict[int, int] = {}

    def num_allowed(self, version: int) -> int:
        """How many more groups may be begun while ``version`` is published."""
        num_batches = min(version + 1 + self._bound, self._last_version) - self._first_version
        return num_batches * self._groups_per_batch - self._num_begun

    def begin(self, number: int, version: int) -> None:
        """A group is asked while ``version`` is published; its tokens come from that version or later ones."""
        assert self.num_allowed(version) > 0, "more groups are begun than the bound allows"
        self._num_begun += 1
        self._last_chance[number] = version + self._bound

    def admits(self, born: int, version: int) -> bool:
        """Whether a group that was asked while ``born`` was published may be taken up, now that ``version`` is."""
        return born <= version <= born + self._bound and self.num_allowed(born) > 0

    def born(self, number: int) -> int:
        """The version that was published when the group was asked."""
        return self._last_chance[number] - self._bound

    def choose(self, version: int, ready: Sequence[int]) -> list[int] | None:
        """The batch that turns ``version`` into the next, from the groups that are ready; ``None``: not yet."""
        waiting = sorted(set(ready) & self._last_chance.keys())  # Numbers count up: these are the oldest first.
        batch = waiting[: self._groups_per_batch]
        if len(batch) < self._groups_per_batch or not self._leaves_room(version, batch):
            return None
        return batch

    def _leaves_room(self, version: int, batch: Sequence[int]) -> bool:
        """Whether the batches after this one can hold every other group by its last chance."""
        others = sorted(chance for number, chance in self._last_chance.items() if number not in batch)
        return all(count <= (chance - version) * self._groups_per_batch for count, chance in enumerate(others, start=1))

    def learn(self, numbers: Sequence[int]) -> None:
        """These groups have become a batch."""
        for number in numbers:
            del self._last_chance[number]
