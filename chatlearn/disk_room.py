"""Whether the disk will do: from a configuration to the bytes of its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from chatlearn.budget import num_parameters
from chatlearn.checkpoint.room import SHARD_BYTES, CheckpointSize, checkpoint_size, free_bytes, in_words
from chatlearn.config.environment import visible_gpus
from chatlearn.config.layout import Layout
from chatlearn.config.schema import GrpoConfig
from chatlearn.errors import ConfigError
from chatlearn.models.lora import LoraSpec
from chatlearn.models.stored_weights import StoredWeights
from chatlearn.recipe import lora_spec

# A linear layer of the decoder as it is stored, with its last name. Experts and their router get no adapter.
_LINEAR: Final = re.compile(r"\.layers\.\d+\.(?!.*\.experts\.)(?!mlp\.gate\.)(?:.*\.)?(\w+)\.weight$")


def size_of_checkpoint(config: GrpoConfig, layout: Layout) -> CheckpointSize:
    """The bytes of one checkpoint of this run."""
    trainer, model_dir, lora = config.models.policy_trainer, Path(layout.trainer.load), lora_spec(config)
    count = num_parameters(model_dir)
    num_trained = count if lora is None else num_adapter_parameters(model_dir, lora)
    moment_bytes = 4 if trainer.optimizer.state_dtype == "float32" else 2
    return checkpoint_size(count, num_trained, moment_bytes, saves_hf=trainer.save_hf)


def capsule_bytes(config: GrpoConfig, layout: Layout) -> int:
    """The bytes of one capsule: the weights before the step, those of an adapter apart; answers are small beside it."""
    model_dir, lora = Path(layout.trainer.load), lora_spec(config)
    num_factors = 0 if lora is None else num_adapter_parameters(model_dir, lora)
    return SHARD_BYTES * (num_parameters(model_dir) + num_factors)


def num_adapter_parameters(model_dir: Path, lora: LoraSpec) -> int:
    """How many numbers the two factors of all adapted layers hold: ``rank`` for each row and each column of each."""
    with StoredWeights(model_dir) as stored:
        found = {name: match for name in stored.files if (match := _LINEAR.search(name))}
        shapes = [
            stored.shape(name)
            for name, match in found.items()
            if not lora.target_modules or match.group(1) in lora.target_modules
        ]
    return sum(lora.rank * sum(shape) for shape in shapes if len(shape) == 2)


def check_disk_room(config: GrpoConfig, layout: Layout) -> None:
    """Raise ``ConfigError`` where not even one checkpoint fits, or one capsule where steps are to be recorded.

    A plan for another machine is not measured here.
    """
    runtime, output = config.runtime_args, layout.folders.output
    if _is_for_another_machine(layout):
        return
    if runtime.save_episode_interval > 0:
        size, free = size_of_checkpoint(config, layout), free_bytes(layout.folders.save_model)
        if size.total > free:
            raise ConfigError(
                f"runtime_args.output_dir={runtime.output_dir}: one checkpoint needs {size}, and {in_words(free)} are "
                "free on that disk; choose an output_dir with more room, or make a checkpoint smaller with "
                "models.policy_trainer.save_hf=False or models.policy_trainer.optimizer.state_dtype=bfloat16"
            )
    if runtime.capsule_interval > 0 and capsule_bytes(config, layout) > free_bytes(output):
        raise ConfigError(
            f"runtime_args.capsule_interval={runtime.capsule_interval}: one capsule needs "
            f"{in_words(capsule_bytes(config, layout))}, and {in_words(free_bytes(output))} are free on the disk of "
            f"{output}; choose an output_dir with more room, or leave capsule_interval out"
        )


def disk_room_rows(config: GrpoConfig, layout: Layout) -> list[tuple[str, str]]:
    """What checkpoints and recorded steps take, in words."""
    runtime, is_here = config.runtime_args, not _is_for_another_machine(layout)
    rows = [("checkpoints", "none (runtime_args.save_episode_interval is 0)")]
    if runtime.save_episode_interval > 0:
        size, (count, words) = size_of_checkpoint(config, layout), _most_at_once(config)
        here = f"; free: {in_words(free_bytes(layout.folders.save_model))}" if is_here else ""
        rows = [
            ("a checkpoint", str(size)),
            ("  at most at once", f"{count} ({words}): {in_words(count * size.total)}{here}"),
        ]
    if runtime.capsule_interval > 0:
        size_of_one, (count, words) = capsule_bytes(config, layout), _most_capsules(config, layout)
        here = f"; free: {in_words(free_bytes(layout.folders.output))}" if is_here else ""
        rows += [
            ("a capsule", in_words(size_of_one)),
            ("  at most at once", f"{count} ({words}), and those of bad steps: {in_words(count * size_of_one)}{here}"),
        ]
    return rows


def _most_capsules(config: GrpoConfig, layout: Layout) -> tuple[int, str]:
    """How many capsules of the interval may lie on the disk at one time, and which."""
    runtime = config.runtime_args
    num_recorded = runtime.num_episode * layout.steps_per_episode // runtime.capsule_interval
    if not 0 < runtime.keep_checkpoints < num_recorded - 1:
        return num_recorded, "all there will be"
    return runtime.keep_checkpoints + 1, f"{runtime.keep_checkpoints} kept, one being written"


def _most_at_once(config: GrpoConfig) -> tuple[int, str]:
    """How many checkpoints may lie on the disk at one time, and which."""
    runtime = config.runtime_args
    num_saves = -(-runtime.num_episode // runtime.save_episode_interval)  # the last episode is saved in any case
    kept = num_saves if runtime.keep_checkpoints == 0 else min(runtime.keep_checkpoints, num_saves)
    best = 0 if runtime.keep_best is None else 1
    parts = [f"{kept} kept", *(["the best one"] if best else []), "one being written"]
    everything = kept + best + 1
    return (num_saves, "all there will be") if everything >= num_saves else (everything, ", ".join(parts))


def _is_for_another_machine(layout: Layout) -> bool:
    return layout.device_kind == "cuda" and visible_gpus() == 0
