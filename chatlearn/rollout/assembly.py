"""Answers come out one by one, in any order and from any engine; here they become groups again.

Law: every answer that was asked for belongs to exactly one group, and a group is whole exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chatlearn.errors import RunError
from chatlearn.records import Completion, OpenGroup, Prompt, Rollout
from chatlearn.rollout.engine import Finished, Request


@dataclass
class Growing:
    """A group some of whose answers are still missing."""

    prompt: Prompt
    num_completions: int
    answers: dict[str, Completion] = field(default_factory=dict[str, Completion])

    def missing(self, number: int) -> list[str]:
        """The names of the requests without an answer."""
        return [name for name in request_ids(number, self.num_completions) if name not in self.answers]


class Assembly:
    """The groups that are being answered. Their numbers count up and are never used again."""

    def __init__(self) -> None:
        self._next = 0
        self._growing: dict[int, Growing] = {}
        self._unwanted: set[str] = set()

    def expect(self, prompt: Prompt, num_completions: int) -> tuple[int, list[Request]]:
        """A new group: its number, and what to ask for it."""
        number, self._next = self._next, self._next + 1
        self._growing[number] = Growing(prompt, num_completions)
        return number, [Request(name, prompt.token_ids) for name in request_ids(number, num_completions)]

    def take_up(
        self, prompt: Prompt, num_completions: int, answers: Sequence[Completion]
    ) -> tuple[int, list[Request], Rollout | None]:
        """A group that has these answers already: its number, what to ask for the others, and itself where it is whole.

        There may be more answers than ``num_completions``: then all of them count.
        """
        number, requests = self.expect(prompt, max(num_completions, len(answers)))
        names = [request.request_id for request in requests]
        if len(answers) == len(requests):
            del self._growing[number]
            return number, [], Rollout(prompt, tuple(answers))
        self._growing[number].answers.update(zip(names, answers, strict=False))
        return number, requests[len(answers) :], None

    def enter(self, finished: Finished) -> tuple[int, Rollout] | None:
        """Put an answer into its group; the group comes out when it is whole.

        Raises ``RunError`` for an answer that came twice or that nobody asked for.
        """
        name = finished.request_id
        if name in self._unwanted:
            self._unwanted.remove(name)
            return None
        number = int(name.partition(".")[0])
        group = self._growing.get(number)
        if group is None or name in group.answers or name not in group.missing(number):
            raise RunError(f"the engines answered request {name}, which was answered before or never asked")
        group.answers[name] = finished.completion
        if group.missing(number):
            return None
        del self._growing[number]
        names = request_ids(number, group.num_completions)
        return number, Rollout(group.prompt, tuple(group.answers[name] for name in names))

    def give_up(self, numbers: Sequence[int]) -> tuple[dict[int, Prompt], list[str]]:
        """Forget those of these groups that are not whole; returns their prompts, and the requests without an answer.

        Such an answer need not come any more, and is dropped where it does.
        """
        groups = {number: self._growing.pop(number) for number in numbers if number in self._growing}
        names = [name for number, group in groups.items() for name in group.missing(number)]
        self._unwanted.update(names)
        return {number: group.prompt for number, group in groups.items()}, names

    def open_groups(self) -> dict[int, OpenGroup]:
        """The groups that are not whole yet, with the answers they have."""
        return {
            number: OpenGroup(group.prompt, tuple(answer for _, answer in sorted(group.answers.items(), key=_place)))
            for number, group in self._growing.items()
        }

    def prompts(self) -> dict[int, Prompt]:
        """The groups that are not whole yet."""
        return {number: group.prompt for number, group in self._growing.items()}


def _place(entry: tuple[str, Completion]) -> int:
    name, _ = entry
    return int(name.partition(".")[2])


def request_ids(number: int, num_completions: int) -> list[str]:
    """The names of a group's answers: what stands before the point says which requests share a prompt."""
    return [f"{number}.{answer}" for answer in range(num_completions)]
