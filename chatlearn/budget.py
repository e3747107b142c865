"""How much memory a run needs on the host of its first node: computed before the start, from numbers alone.

Every line is a sum that a reader can check; none is measured. Estimates lean to what is surely needed: a run that is
refused could not have worked, while one that is let through may still meet a longer answer or a greedier engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from chatlearn.models.stored_weights import StoredWeights, is_weight

BYTES_PER_GB: Final = 10**9
FLOAT32_BYTES: Final = 4

# Anonymous memory of a process that has imported torch, transformers and Ray before it does anything; what an engine's
# process has more; and Ray's own services. Measured on x86-64.
PROCESS_BYTES: Final = 300 * 10**6
ENGINE_BYTES: Final = 300 * 10**6
RAY_BYTES: Final = 315 * 10**6

# Of one token of an answer as the engine returns it: its number, its log-probability, and about four letters.
ROLLOUT_TOKEN_BYTES: Final = 4 + 4 + 4
# Of one token of a sample: its number, the mask, the engine's log-probability and the advantage.
SAMPLE_TOKEN_BYTES: Final = 4 + 1 + 4 + 4
# Of one token that is packed: three 8-byte numbers (token, label, position), the mask, two 4-byte numbers.
PACKED_TOKEN_BYTES: Final = 3 * 8 + 1 + 2 * 4
# Old or reference log-probabilities, once in the sample and once packed.
EXTRA_STREAM_BYTES: Final = 4

# A batch exists in the driver and, as what was sent, in Ray's object store.
COPIES_OF_A_BATCH: Final = 2

# A message names so many lines, and none that is a smaller part of the whole: nobody is helped by shrinking it.
LARGEST_LINES: Final = 3
SMALLEST_PART: Final = 0.05

# "start": only while the models load; "episode": only later; "always": both.
When = Literal["start", "episode", "always"]


@dataclass(frozen=True)
class ShardedLoad:
    """A trained or frozen model: what of it is on this node.

    ``num_trained`` of its parameters have gradients and moments. ``num_ranks`` counts this node's ranks, ``fsdp_size``
    the ranks that hold the model once. ``weight_bytes`` and ``moment_bytes`` are those of one number of the weights and
    of one of the two moments. The ``*_on_host`` fields tell what is in host memory at some time of an episode: on the
    CPU everything, else what is offloaded or kept there. ``stays_gathered`` tells that every rank on the CPU holds all
    weights and gradients during a step, as it does of a small model; ``copied_for_saving`` that checkpoints are written
    from a copy, while training goes on.
    """

    role: str
    num_parameters: int
    num_trained: int
    num_ranks: int
    fsdp_size: int
    weight_bytes: int
    moment_bytes: int
    meta_init: bool
    weights_on_host: bool
    gradients_on_host: bool
    moments_on_host: bool
    stays_gathered: bool
    copied_for_saving: bool

    @property
    def share(self) -> float:
        """How many times the model is on this node."""
        return self.num_ranks / self.fsdp_size


@dataclass(frozen=True)
class EngineLoad:
    """The engines of this node. ``cache_bytes`` is one engine's cache of keys and values, 0 where a GPU holds it."""

    num_parameters: int
    num_engines: int
    weight_bytes: int
    weights_on_host: bool
    cache_bytes: int


@dataclass(frozen=True)
class EpisodeLoad:
    """What the driver of a run holds of an episode, at its largest: every answer as long as it may become.

    ``expert_bytes`` are those that tell one token's experts (layers x choices x size of a number), 0 without router
    replay.
    """

    num_samples: int
    prompt_tokens: int
    response_tokens: int
    num_steps: int
    has_old_logprobs: bool
    has_reference: bool
    expert_bytes: int


@dataclass(frozen=True)
class HostLoad:
    """Everything on one node. ``transfer_bytes`` is the segment through which weights reach the engines."""

    sharded: tuple[ShardedLoad, ...]
    engine: EngineLoad
    episode: EpisodeLoad
    transfer_bytes: int
    num_processes: int


@dataclass(frozen=True)
class BudgetLine:
    """One need: for what, how much, when, as which sum, and which keys make it smaller."""

    what: str
    num_bytes: int
    when: When
    formula: str
    keys: tuple[str, ...]


def num_parameters(model_dir: Path) -> int:
    """How many numbers the safetensors files of a model hold, from their headers alone.

    Raises ``DataError`` where a file cannot be read. A tied head that is stored all the same counts twice.
    """
    with StoredWeights(model_dir) as stored:
        return sum(math.prod(stored.shape(name)) for name in stored.files if is_weight(name))


def host_budget(load: HostLoad) -> tuple[BudgetLine, ...]:
    """All lines that are not zero, in the order of the records."""
    lines = [
        *(line for sharded in load.sharded for line in _sharded_lines(sharded)),
        *_engine_lines(load.engine),
        *_episode_lines(load.episode),
        BudgetLine("weight transfer", load.transfer_bytes, "episode", "one segment of shared memory", ()),
        BudgetLine(
            "processes",
            load.num_processes * PROCESS_BYTES + load.engine.num_engines * ENGINE_BYTES + RAY_BYTES,
            "always",
            f"{load.num_processes} x {PROCESS_BYTES / BYTES_PER_GB} GB for the interpreter and its libraries, "
            f"{load.engine.num_engines} x {ENGINE_BYTES / BYTES_PER_GB} GB more for an engine, "
            f"{RAY_BYTES / BYTES_PER_GB} GB for Ray",
            ("models.reward.num_cpu",),
        ),
    ]
    return tuple(line for line in lines if line.num_bytes > 0)


def needed_bytes(lines: Sequence[BudgetLine]) -> int:
    """The most that is needed at one time."""
    return max(sum(line.num_bytes for line in _at(lines, when)) for when in ("start", "episode"))


def budget_problem(lines: Sequence[BudgetLine], available_bytes: int) -> str | None:
    """What to tell a user whose node has less memory than the lines ask for, or None."""
    for when, words in (("start", "while the models load"), ("episode", "during an episode")):
        present = _at(lines, when)
        needed = sum(line.num_bytes for line in present)
        if needed > available_bytes:
            worth_naming = [line for line in present if line.num_bytes >= SMALLEST_PART * needed]
            largest = sorted(worth_naming, key=lambda line: -line.num_bytes)[:LARGEST_LINES]
            parts = "; ".join(f"{line.what} {_gb(line.num_bytes)} ({line.formula})" for line in largest)
            keys = list(dict.fromkeys(key for line in largest for key in line.keys))
            cure = f"change {', '.join(keys)}, or " if keys else ""
            return (
                f"host memory: the run needs about {_gb(needed)} on this node {words}, and {_gb(available_bytes)} are "
                f"available. The largest parts: {parts}. To need less, {cure}use a node with more memory"
            )
    return None


def _at(lines: Sequence[BudgetLine], when: str) -> list[BudgetLine]:
    return [line for line in lines if line.when in ("always", when)]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_GB:.1f} GB"


def _count(num_parameters: int) -> str:
    scaled = f"{num_parameters / 1e9:.2f} G" if num_parameters >= 10**8 else f"{num_parameters / 1e6:.2f} M"
    return f"{scaled} parameters"


def _sharded_lines(load: ShardedLoad) -> list[BudgetLine]:
    key, share = f"models.{load.role}", f"{load.share:g} x "
    all_weights, trained = f"{_count(load.num_parameters)} x {load.weight_bytes} bytes", _count(load.num_trained)
    weights = load.num_parameters * load.weight_bytes
    shards = round(load.share * weights) if load.weights_on_host else 0
    gradients = load.num_trained * FLOAT32_BYTES if load.gradients_on_host else 0
    moments = load.num_trained * 2 * load.moment_bytes if load.moments_on_host else 0
    # Each rank builds all of it before it cuts out its part; where parts stay on the host they take its place.
    excess = 0 if load.meta_init else load.num_ranks * weights - shards
    gathered = load.num_ranks * (weights + gradients) if load.stays_gathered else 0
    copied = load.num_trained * (load.weight_bytes + 2 * load.moment_bytes) if load.copied_for_saving else 0
    offload = () if load.gradients_on_host else (f"{key}.free_gpu_memory.offload_weights",)
    whole = f"{load.num_ranks} ranks x {all_weights}"
    return [
        BudgetLine(f"{load.role}: weights", shards, "always", share + all_weights, offload),
        BudgetLine(
            f"{load.role}: whole models until they are sharded",
            excess,
            "start",
            f"{whole}, less the shards that stay" if shards else whole,
            (f"{key}.meta_init=True",),
        ),
        BudgetLine(
            f"{load.role}: gradients",
            round(load.share * gradients),
            "episode",
            f"{share}{trained} x {FLOAT32_BYTES} bytes",
            (f"{key}.lora.rank",),
        ),
        BudgetLine(
            f"{load.role}: moments of the optimizer",
            round(load.share * moments),
            "episode",
            f"{share}2 x {trained} x {load.moment_bytes} bytes",
            (f"{key}.optimizer.state_dtype=bfloat16", f"{key}.lora.rank"),
        ),
        BudgetLine(
            f"{load.role}: copy of weights and moments while they are saved",
            round(load.share * copied),
            "episode",
            f"{share}{trained} x ({load.weight_bytes} + 2 x {load.moment_bytes}) bytes",
            ("runtime_args.save_in_background=False",),
        ),
        BudgetLine(
            f"{load.role}: gathered weights and gradients",
            gathered,
            "episode",
            f"{whole} and {trained} x {FLOAT32_BYTES if gradients else 0} bytes",
            (f"{key}.num_gpu",),
        ),
    ]


def _engine_lines(load: EngineLoad) -> list[BudgetLine]:
    model = f"{load.num_engines} x {_count(load.num_parameters)} x {load.weight_bytes} bytes"
    weights = load.num_engines * load.num_parameters * load.weight_bytes if load.weights_on_host else 0
    return [
        BudgetLine("engines: weights", weights, "always", model, ("models.policy.num_gpu",)),
        BudgetLine(
            "engines: keys and values",
            load.num_engines * load.cache_bytes,
            "always",
            f"{load.num_engines} x {_gb(load.cache_bytes)}",
            ("models.policy.generation_batch_size", "models.policy.max_response_tokens_length"),
        ),
    ]


def _episode_lines(load: EpisodeLoad) -> list[BudgetLine]:
    """Answers lie in Ray's object store as long as they are used; samples in the driver; batches in both."""
    keys = ("runtime_args.sample_per_episode", "models.policy.max_response_tokens_length")
    tokens = load.prompt_tokens + load.response_tokens
    extra = EXTRA_STREAM_BYTES * (load.has_old_logprobs + load.has_reference)
    sample_bytes = SAMPLE_TOKEN_BYTES + extra
    packed_bytes = PACKED_TOKEN_BYTES + extra + 2 * load.expert_bytes  # packed experts are 16-bit numbers at the least
    # The log-probabilities of all samples are computed in one go; a step takes its own part only.
    scores_all = load.has_old_logprobs or load.has_reference
    batch = load.num_samples if scores_all else -(-load.num_samples // load.num_steps)
    answers = load.num_samples * (load.response_tokens * ROLLOUT_TOKEN_BYTES + tokens * load.expert_bytes)
    return [
        BudgetLine(
            "answers of an episode (object store)",
            answers,
            "episode",
            f"{load.num_samples} x ({load.response_tokens} tokens x {ROLLOUT_TOKEN_BYTES} bytes"
            + (f" + {tokens} tokens x {load.expert_bytes} bytes)" if load.expert_bytes else ")"),
            keys,
        ),
        BudgetLine(
            "samples of an episode (driver)",
            load.num_samples * tokens * sample_bytes,
            "episode",
            f"{load.num_samples} x {tokens} tokens x {sample_bytes} bytes",
            keys,
        ),
        BudgetLine(
            "packed batch (driver and object store)",
            COPIES_OF_A_BATCH * batch * tokens * packed_bytes,
            "episode",
            f"{COPIES_OF_A_BATCH} x {batch} x {tokens} tokens x {packed_bytes} bytes",
            keys,
        ),
    ]
