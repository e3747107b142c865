"""The journal of a run: a page per episode, phases with their times, numbers into every sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console

from chatlearn.observability.curve import draw_curve, read_curve
from chatlearn.observability.describe import (
    Capacity,
    Transfer,
    derived,
    describe_steps,
    describe_transfer,
    describe_use,
)
from chatlearn.observability.progress import Display, Update, open_display
from chatlearn.observability.rollouts import ROLLOUTS_FOLDER, forget_after, write_rollouts
from chatlearn.observability.sinks import SINKS, JournalSpec, Sink, chosen_sinks, metrics_path
from chatlearn.records import Graded, Sample, StepStats

CURVE_COLUMNS = 80  # wider curves show no more than their points, and logs are read in narrow windows


class Journal:
    """What a person can see of a run. Open it with ``Journal.open``, write an episode with ``page``."""

    def __init__(self, spec: JournalSpec, sinks: Sequence[Sink], console: Console) -> None:
        self._spec = spec
        self._sinks = tuple(sinks)
        self._console = console
        self._display = open_display(console)

    @classmethod
    @contextmanager
    def open(cls, spec: JournalSpec, console: Console | None = None) -> Generator[Journal]:
        """Open every chosen sink, and close all of them at the end, also after an error.

        What an earlier process wrote after ``resume_after`` is forgotten, its answers with its numbers.
        """
        spec.directory.mkdir(parents=True, exist_ok=True)
        forget_after(spec.directory, spec.resume_after or 0)
        console = console or Console(stderr=True, highlight=False)
        with ExitStack() as opened:
            sinks: list[Sink] = []
            for name in chosen_sinks(spec):
                sinks.append(SINKS[name](spec, console))
                opened.callback(sinks[-1].close)
            yield cls(spec, sinks, console)

    @contextmanager
    def page(self, step: int) -> Generator[Page]:
        """The page of an episode; its numbers are written when the block ends well, and not after an error."""
        title = f"episode {step}/{self._spec.num_episodes}"
        page = Page(title, self._display, self._keeper(step), self.say, time.perf_counter)
        yield page
        self.write(step, page.numbers())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the numbers, and what follows from them, to every sink; they are on the disk when this returns.

        A step may be written more than once: what is known only after its page, such as ``time/save``, follows it.
        """
        numbers = {**metrics, **derived(metrics)}
        for sink in self._sinks:
            sink.write(step, numbers)

    def say(self, text: str) -> None:
        """Tell the person who watches one thing in words."""
        self._console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def phase(self, title: str) -> Generator[None]:
        """Show that something goes on which belongs to no page."""
        with self._display.phase(title):
            yield

    def curve(self) -> None:
        """Draw the mean reward of all episodes, earlier processes' included; nothing before the second episode."""
        points = read_curve(metrics_path(self._spec.directory), "rollout/reward_mean")
        drawing = draw_curve(points, "mean reward", min(CURVE_COLUMNS, self._console.width))
        if drawing:
            self.say(drawing)

    @property
    def metrics_bytes(self) -> int:
        """The length of ``metrics.jsonl``, all of it on the disk."""
        return metrics_path(self._spec.directory).stat().st_size

    def _keeper(self, step: int) -> Keeper:
        """What a page does with its rollouts."""

        def keep(graded: Sequence[Graded], samples: Sequence[Sample]) -> None:
            if not self._spec.save_rollouts:
                return
            try:
                write_rollouts(self._spec.directory, step, graded, samples)
            except OSError as error:  # They are for people; nothing that the run does depends on them.
                self.say(
                    f"the answers of episode {step} were not written to {ROLLOUTS_FOLDER}/: {error}. The run goes on"
                )

        return keep


Keeper = Callable[[Sequence[Graded], Sequence[Sample]], None]


class Page:
    """What happens in one episode.

    The seconds of a phase are written as ``time/<name>``, without those of phases inside it, so that all phases and
    ``time/idle``, the time that belongs to none, add up to ``time/episode``. A phase entered again adds to its time.
    """

    def __init__(
        self, title: str, display: Display, keep: Keeper, say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._keep = keep
        self._say = say
        self._title = title
        self._display = display
        self._clock = clock
        self._begun = clock()
        self._seconds: dict[str, float] = {}
        self._running: list[tuple[str, Update]] = []
        self._metrics: dict[str, float] = {}
        self._steps: list[StepStats] = []
        self._capacity: Capacity | None = None

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time a block and show its progress."""
        begun = self._clock()
        with self._display.phase(f"{self._title} {name.replace('_', ' ')}") as update:
            self._running.append((name, update))
            try:
                yield
            finally:
                self._running.pop()
                seconds = self._clock() - begun
                self._seconds[name] = self._seconds.get(name, 0.0) + seconds
                if self._running:
                    outer, _ = self._running[-1]
                    self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def progress(self, done: int, total: int) -> None:
        """Tell how far the innermost running phase has come."""
        if self._running:
            _, update = self._running[-1]
            update(done, total)

    def say(self, text: str) -> None:
        """Tell the person who watches one thing in words, that it happened in this episode."""
        self._say(f"{self._title}: {text}")

    def keep(self, graded: Sequence[Graded], samples: Sequence[Sample]) -> None:
        """Write the episode's answers to ``rollouts/``, where asked for: one sample per completion, in order."""
        self._keep(graded, samples)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Write these numbers on the page; a name that is there already gets the newer value."""
        self._metrics.update(metrics)

    def add_step(self, stats: StepStats) -> None:
        """One optimizer step; the page shows the mean over all steps of the episode."""
        self._steps.append(stats)

    def add_transfer(self, transfer: Transfer) -> None:
        """The transfer that published the episode's weights."""
        self.add(describe_transfer(transfer))

    def add_capacity(self, capacity: Capacity) -> None:
        """What the trainer's hardware could do, so that the page can say how much of it was used."""
        self._capacity = capacity

    def numbers(self) -> dict[str, float]:
        """Everything on the page, and the times of its phases."""
        episode = self._clock() - self._begun
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        times |= {"time/episode": episode, "time/idle": episode - sum(self._seconds.values())}
        numbers = self._metrics | describe_steps(self._steps) | times
        return numbers | describe_use(numbers, self._capacity)
