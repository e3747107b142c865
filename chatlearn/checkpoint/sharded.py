"""Save and load what every rank holds: its part of the model and the optimizer, and its random states.

Both functions are collectives. They take transformers' module (names as it has them in memory) and its optimizer, both
sharded or not; a checkpoint of any number of ranks loads into any other number. What is frozen is not saved: it is in
the model directory that training started from.

Of the optimizer its state is kept: moments and step counts. Learning rate, betas and weight decay are not state but the
user's wishes, so they are neither saved nor loaded: after a resume those hold that the optimizer was built with.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from chatlearn.checkpoint.adapters import AdapterRecord, require_same_adapter, require_same_layers
from chatlearn.checkpoint.durable import failures_named, sync
from chatlearn.checkpoint.guarded_reader import METADATA_NAME, GuardedPlanner, GuardedReader, load_plain
from chatlearn.checkpoint.layout import MODEL_FOLDER, OPTIMIZER_FOLDER, RANDOM_FOLDER
from chatlearn.checkpoint.manifest import FileRecord, Manifest, record_file, verify_checksums, verify_sizes
from chatlearn.errors import CheckpointError, DamagedCheckpointError, UnreadableError

# torch's name for the moments in an optimizer's state dict; what lies beside it are the hyperparameters.
STATE = "state"

TRAINED = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True)
class Restored:
    """What a load brought back besides weights and optimizer: by how many ranks it had been saved, and whether the
    random states came back too, which they cannot when that number has changed."""

    num_ranks_saved: int
    random_states: bool


@dataclass(frozen=True, eq=False)
class ShardState:
    """What one rank puts into a checkpoint: its parts of the trained weights and of the optimizer's moments, by name,
    and the states of its random generators."""

    weights: dict[str, Any]
    moments: dict[str, Any]
    random_states: dict[str, Any]


def shard_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> ShardState:
    """This rank's part as it is now. Its tensors are the live ones: the next step changes them."""
    moments = get_optimizer_state_dict(module, optimizer, options=TRAINED)
    weights = get_model_state_dict(module, options=TRAINED)
    return ShardState(weights, {STATE: moments[STATE]}, _random_states(module))


def save_shards(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[FileRecord, ...]:
    """Write this rank's part below ``directory`` (a staging folder); returns the files this rank wrote.

    Collective. Raises ``CheckpointError`` on every rank when one of them cannot write.
    """
    return write_shards(directory, shard_state(module, optimizer))


def write_shards(directory: Path, state: ShardState, group: dist.ProcessGroup | None = None) -> tuple[FileRecord, ...]:
    """Write ``state`` below ``directory``, all of it on the disk when this returns; returns the files of this rank.

    Collective over ``group``, the default one where it is ``None``. Raises ``CheckpointError`` on every rank when one
    of them cannot write a shard.
    """
    rank, _ = _place()
    _write(state.weights, directory / MODEL_FOLDER, group)
    _write(state.moments, directory / OPTIMIZER_FOLDER, group)
    with failures_named(directory):
        shards = [
            *directory.glob(f"*/__{rank}_*.distcp"),
            _write_random_states(directory, state.random_states),
            *(directory.glob(f"*/{METADATA_NAME}") if rank == 0 else ()),
        ]
        return tuple(record_file(directory, path.relative_to(directory).as_posix()) for path in sorted(shards))


def load_shards(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, adapter: AdapterRecord | None = None
) -> Restored:
    """Load a published checkpoint into ``module`` and ``optimizer``, after checking every byte of its shards.

    ``adapter`` describes what is trained where it is not the whole module. Collective. Raises on every rank, before
    anything was changed: ``DamagedCheckpointError`` when the folder is incomplete or damaged, ``UnreadableError`` when
    it cannot be read now, any other ``CheckpointError`` when its adapter is another one or on another base, or when its
    tensors do not fit the module.
    """
    weights = get_model_state_dict(module, options=TRAINED)
    manifest = _verify_together(directory)
    random_states = _open_together(directory, manifest, adapter, set(weights))
    _read(weights, directory / MODEL_FOLDER)
    moments = get_optimizer_state_dict(module, optimizer, options=TRAINED)
    _read({STATE: moments[STATE]}, directory / OPTIMIZER_FOLDER)
    set_model_state_dict(module, weights, options=StateDictOptions(strict=adapter is None))  # names are compared above
    set_optimizer_state_dict(module, optimizer, moments, options=TRAINED)
    if random_states is None:
        return Restored(manifest.num_ranks, random_states=False)
    _set_random_states(random_states, module)
    return Restored(manifest.num_ranks, random_states=True)


def save_random_states(directory: Path, module: nn.Module) -> Path:
    """Write the state of every random generator of this rank below ``directory``; returns the file.

    Weights-only: it consists of tensors and plain numbers. ``module`` tells which kind of device computes.
    """
    with failures_named(directory):
        return _write_random_states(directory, _random_states(module))


def _write_random_states(directory: Path, states: dict[str, Any]) -> Path:
    rank, _ = _place()
    file = directory / RANDOM_FOLDER / f"rank_{rank}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch's own file hides what a full disk says behind a complaint about positions
    torch.save(states, content)
    file.write_bytes(content.getbuffer())
    sync(file)  # from the machine that wrote it: on a shared file system no other one can
    return file


def load_random_states(directory: Path, module: nn.Module) -> None:
    """Let this rank's generators go on from what ``save_random_states`` wrote below ``directory``."""
    rank, _ = _place()
    file = directory / RANDOM_FOLDER / f"rank_{rank}.pt"
    _set_random_states(load_plain(file, str(file)), module)


def _place() -> tuple[int, int]:
    """This process's rank and the number of ranks; one process alone needs no group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _PlainWriter(FileSystemWriter):
    """torch's writer of a folder of shards, with the disk's own words where the disk refuses."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # The end of a tensor complains of its position: the disk refused before.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    writer, alone = _PlainWriter(folder), not dist.is_initialized()
    try:
        state_dict_saver.save(state, storage_writer=writer, process_group=group, no_dist=alone)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {_cause(error)}") from error


def _read(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of ``state`` in place; plain values in it are replaced."""
    reader, planner = GuardedReader(folder), GuardedPlanner()
    try:
        state_dict_loader.load(state, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded into this model: {_cause(error)}") from error


def _cause(error: CheckpointException | OSError) -> str:
    """What the first failing rank said; torch's own message is a traceback of each."""
    if isinstance(error, CheckpointException):
        rank, (failure, _) = min(error.failures.items())
        return f"rank {rank}: {failure}"
    return str(error)


def _verify_together(directory: Path) -> Manifest:
    """Read the whole folder through, each rank a share of the bytes, and compare it with its manifest."""
    rank, num_ranks = _place()
    unseen = f"{directory}: rank {rank} cannot see this folder; all ranks must share one file system"
    _raise_together(None if directory.is_dir() else CheckpointError(unseen))  # no damage: others may see it
    manifest: Manifest | None = None
    fault: CheckpointError | None = None
    try:
        manifest = verify_sizes(directory)
        verify_checksums(directory, manifest.needed[rank::num_ranks])
    except UnreadableError as error:
        fault = error
    except CheckpointError as error:
        fault = DamagedCheckpointError(directory, str(error))
    _raise_together(fault)
    assert manifest is not None, "this rank has found no fault"
    return manifest


def _open_together(
    directory: Path, manifest: Manifest, adapter: AdapterRecord | None, names: set[str]
) -> dict[str, Any] | None:
    """Check that the checkpoint is of what is trained now; this rank's random states if they were saved by as many
    ranks as there are today.

    ``names`` are those of the tensors that an adapter's checkpoint must hold.
    """
    rank, num_ranks = _place()
    fault, random_states = None, None
    try:
        require_same_adapter(directory, manifest.adapter, adapter, manifest.base_model)
        if adapter is not None:
            saved = GuardedReader(directory / MODEL_FOLDER).read_metadata().state_dict_metadata
            require_same_layers(directory, set(saved), names)
        if manifest.num_ranks == num_ranks:
            path = directory / RANDOM_FOLDER / f"rank_{rank}.pt"
            random_states = load_plain(path, str(path))
    except CheckpointError as error:
        fault = error
    _raise_together(fault)
    return random_states


def _raise_together(fault: CheckpointError | None) -> None:
    """A fault that one rank has found is raised by all of them, so that none waits for the others."""
    _, num_ranks = _place()
    faults: list[CheckpointError | None] = [fault]
    if num_ranks > 1:
        faults = [None] * num_ranks
        dist.all_gather_object(faults, fault)
    for found in faults:
        if found is not None:
            raise found


def _accelerator(module: nn.Module) -> str:
    """The kind of device that computes; parameters may rest on the host, so the mesh is asked first."""
    parameter = next(module.parameters())
    return parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type


def _random_states(module: nn.Module) -> dict[str, Any]:
    """Every generator of this process, made of tensors and plain numbers alone, so that it loads weights-only."""
    name, keys, *counters = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *counters),
    }
    kind = _accelerator(module)
    if kind != "cpu":
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def _set_random_states(states: dict[str, Any], module: nn.Module) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, keys, *counters = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *counters))
    kind = _accelerator(module)
    if kind != "cpu" and kind in states:  # absent where the checkpoint was made on another kind of device
        torch.get_device_module(kind).set_rng_state(states[kind])
