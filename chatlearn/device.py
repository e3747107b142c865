"""The machine under a process: which accelerator, how much memory, how many threads.

This is the only module that says ``cuda``. torch is imported inside the functions, so that the driver can plan and
set up child processes without loading it.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import torch

DeviceKind = Literal["cpu", "cuda"]
DtypeName = Literal["float32", "bfloat16"]

BYTES_PER_GB = 10**9

# Dense bfloat16 peaks from the vendors' data sheets, in floating-point operations per second. The first row whose name
# occurs in the device's name counts, so a longer name stands before the shorter one it contains.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


def backend_of(kind: DeviceKind) -> Literal["gloo", "cpu:gloo,cuda:nccl"]:
    """The collective libraries of a process group: devices of this kind, and tensors that stay on the host."""
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def kind_of(backend: str) -> DeviceKind:
    """The kind of device that collective libraries connect."""
    return "cuda" if "nccl" in backend else "cpu"


def compute_dtype(kind: DeviceKind) -> DtypeName:
    """The number format of forward and backward: bfloat16 where tensor cores make it fast, else float32."""
    return "bfloat16" if kind == "cuda" else "float32"


def rank_device(kind: DeviceKind, local_rank: int = 0) -> torch.device:
    """Make the device of this rank the process's current one and return it.

    ``local_rank`` counts the devices the process can see: 0 where each process is shown only its own.
    """
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def set_num_threads(num_threads: int) -> None:
    """Bound the threads of torch's operators in this process."""
    import torch

    torch.set_num_threads(num_threads)


def empty_cache(kind: DeviceKind) -> None:
    """Give memory that torch holds in reserve back to the device, for another process to use."""
    if kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a copy of ``tensor``, without values; page-locked where that makes the copy asynchronous."""
    import torch

    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was told to do."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of an accelerator, as plain values that another process on the same machine can open (CUDA IPC)."""

    unit: str  # the accelerator's own identifier: processes may count those they see differently
    handle: bytes
    num_bytes: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_is_waited_for: bool


def unit_of(device: torch.device) -> str:
    """The identifier of an accelerator that all processes of the machine agree on."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def share_memory(memory: torch.Tensor) -> DeviceMemory:
    """How other processes open ``memory``, which has a storage of its own and must outlive their use of it.

    Each time is good for one opening by one process: torch counts them, to know when the memory is free again.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

    values: tuple[Any, ...] = reduce_tensor(memory)[1]
    shared = dict(zip(signature(rebuild_cuda_tensor).parameters, values, strict=True))
    return DeviceMemory(
        unit=unit_of(memory.device),
        handle=shared["storage_handle"],
        num_bytes=shared["storage_size_bytes"],
        offset=shared["storage_offset_bytes"],
        counter=shared["ref_counter_handle"],
        counter_offset=shared["ref_counter_offset"],
        event=shared["event_handle"],
        event_is_waited_for=shared["event_sync_required"],
    )


def open_memory(shared: DeviceMemory, device: torch.device) -> torch.Tensor:
    """The memory another process shared, as bytes on ``device``, which is where it lies."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return rebuild_cuda_tensor(
        tensor_cls=torch.Tensor,
        tensor_size=(shared.num_bytes,),
        tensor_stride=(1,),
        tensor_offset=0,
        storage_cls=torch.UntypedStorage,
        dtype=torch.uint8,
        storage_device=device.index,
        storage_handle=shared.handle,
        storage_size_bytes=shared.num_bytes,
        storage_offset_bytes=shared.offset,
        requires_grad=False,
        ref_counter_handle=shared.counter,
        ref_counter_offset=shared.counter_offset,
        event_handle=shared.event,
        event_sync_required=shared.event_is_waited_for,
    )


def reclaim_shared_memory(device: torch.device) -> None:
    """Take back memory that was shared and that no process has open any more."""
    if device.type == "cuda":
        import torch

        torch.cuda.ipc_collect()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``. Nobody waits for the copy: a plain one waits for all the device still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def side_by_side_copies(kind: DeviceKind) -> Generator[None]:
    """Copies issued inside run on a stream of their own, after all earlier work; they are done when the block ends."""
    if kind == "cpu":
        yield
        return
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def peak_memory_gb(kind: DeviceKind) -> float:
    """The most memory that this process ever used, in GB: of the device what torch took, or else of the host."""
    if kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / BYTES_PER_GB
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / BYTES_PER_GB


def available_host_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that processes may still take: what is free or can be freed, within the limit of the container."""
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _numbers(meminfo)["MemAvailable:"] * 1024
    limit, used, parts = group / "memory.max", group / "memory.current", group / "memory.stat"
    if (
        not (limit.is_file() and used.is_file() and parts.is_file())
        or limit.read_text(encoding="ascii").strip() == "max"
    ):
        return free
    # The cache of files counts as used and is given up when memory is asked for.
    taken = int(used.read_text(encoding="ascii")) - _numbers(parts)["inactive_file"]
    return min(free, max(0, int(limit.read_text(encoding="ascii")) - taken))


def _numbers(file: Path) -> dict[str, int]:
    """The number behind the first word of each line."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def peak_flops(kind: DeviceKind) -> float | None:
    """Dense bfloat16 operations per second the current device can reach; ``None`` where it is not known."""
    if kind == "cpu":
        return None
    import torch

    return flops_of(torch.cuda.get_device_name())


def flops_of(device_name: str) -> float | None:
    """The row of ``PEAK_FLOPS`` for a name such as ``NVIDIA H100 80GB HBM3``."""
    return next((flops for name, flops in PEAK_FLOPS if name in device_name), None)


def visible_devices(names: Sequence[str]) -> dict[str, str]:
    """Environment of a child process that may use these accelerators of its node, and no others.

    Ray would show an actor only the one whose share it holds, which is too few for an engine that spans several.
    """
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(names),
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }


def worker_environment(kind: DeviceKind, num_threads: int, *, expandable_segments: bool = False) -> dict[str, str]:
    """Environment variables of a child process that computes with ``num_threads`` threads.

    Threads that wait must sleep: phases take turns on the same cores, and a spinning thread of an idle process takes
    the core from the one that works. Model hubs stay closed because nothing leaves the machine unasked.
    """
    environment = {
        "OMP_NUM_THREADS": str(num_threads),
        "KMP_BLOCKTIME": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if kind == "cuda" and expandable_segments:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return environment
