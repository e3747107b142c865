"""The only place that reads and sets the environment variables of a launch."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from chatlearn.errors import ConfigError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # A process that is replaced leaves answers that nobody wants to hear.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

MARK = "CHATLEARN_RUN"


@dataclass(frozen=True)
class Environment:
    """Where this process stands: nodes, devices and accounts as the launcher describes them.

    ``gpus_per_node`` is 0 where neither the launcher nor the machine tells of a GPU. ``cores`` counts what this process
    may use on this node.
    """

    num_nodes: int = 1
    node_rank: int = 0
    gpus_per_node: int = 0
    cores: int = 1
    ray_address: str | None = None
    has_wandb_account: bool = False

    @classmethod
    def read(cls) -> Environment:
        """Read NNODES or WORLD_SIZE (both count nodes), NODE_RANK or RANK, GPUS_PER_NODE and the rest."""
        num_nodes = _agreed("NNODES", "WORLD_SIZE", absent=1, least=1)
        node_rank = _agreed("NODE_RANK", "RANK", absent=0, least=0)
        if node_rank >= num_nodes:
            raise ConfigError(f"the node's rank {node_rank} (NODE_RANK or RANK) must be below NNODES={num_nodes}")
        gpus = _number("GPUS_PER_NODE", least=0)
        return cls(
            num_nodes=num_nodes,
            node_rank=node_rank,
            gpus_per_node=visible_gpus() if gpus is None else gpus,
            cores=usable_cores(),
            ray_address=os.environ.get("RAY_ADDRESS") or None,
            has_wandb_account=_has_wandb_account(),
        )


@dataclass(frozen=True)
class Launcher:
    """This process among those that ``torchrun`` started together; alone where it was started without.

    ``meeting`` is where they find each other, as torch's ``init_method``; None for a process alone.
    """

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    meeting: str | None = None

    @classmethod
    def read(cls) -> Launcher:
        """Read what torchrun sets. Without LOCAL_RANK there is no torchrun: WORLD_SIZE and RANK then count nodes."""
        local_rank = _number("LOCAL_RANK", least=0)
        if local_rank is None:
            return cls()
        rank, num_ranks = _required("RANK", least=0), _required("WORLD_SIZE", least=1)
        port = _required("MASTER_PORT", least=1)
        if rank >= num_ranks:
            raise ConfigError(f"the environment variable RANK={rank} must be below WORLD_SIZE={num_ranks}")
        return cls(rank, local_rank, num_ranks, f"tcp://{os.environ.get('MASTER_ADDR') or 'localhost'}:{port}")


def _required(name: str, least: int) -> int:
    number = _number(name, least)
    if number is None:
        raise ConfigError(
            f"the environment variable LOCAL_RANK is set and {name} is not; use torchrun, which sets both, or unset it"
        )
    return number


def show_one_gpu(local_rank: int) -> None:
    """Let this process see only the device that is its own among those the launcher shows to all of its node."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(visible_gpus())] if shown is None else shown.split(",")
    if local_rank >= len(names):
        raise ConfigError(f"local rank {local_rank} has no GPU: this node shows {len(names)}; start fewer ranks")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank].strip()


def stay_on_loopback() -> None:
    """Let the ranks of one machine talk over its loopback interface; Gloo would take the first network it finds."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"the environment variable {name}={text!r} must be a whole number of at least {least}")
    return int(text)


def _agreed(first: str, second: str, absent: int, least: int) -> int:
    """Two names of one number; both set and different is an error, for nobody can tell which was meant."""
    values = {name: value for name in (first, second) if (value := _number(name, least)) is not None}
    if len(set(values.values())) > 1:
        raise ConfigError(
            f"{first}={values[first]} and {second}={values[second]} say different things; set one of them"
        )
    return next(iter(values.values()), absent)


def visible_gpus() -> int:
    """Number of NVIDIA device files, cut down by CUDA_VISIBLE_DEVICES; tells without loading a GPU library."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, sum(1 for name in visible.split(",") if name.strip() and name.strip() != "-1"))


def usable_cores() -> int:
    """Cores that the scheduler lets this process use: its affinity, cut down by a container's quota."""
    allowed = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if not quota_file.is_file():
        return allowed
    quota, period, *_ = [*quota_file.read_text().split(), "max", "1"]
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def wandb_run_id() -> str | None:
    """The identity of the run that wandb itself would take from its variable."""
    return os.environ.get("WANDB_RUN_ID") or None


def _has_wandb_account() -> bool:
    """A key, an offline mode, or a login of earlier: without one wandb would stop and ask."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in {"offline", "disabled", "dryrun"}:
        return True
    return (Path.home() / ".netrc").is_file()


def prepare_local_ray() -> None:
    """Set what a Ray that this process starts must know: a token that only its own processes have, and silence.

    Ray asks for a token by default (2.59 and later) and would write one into the home directory if it found none. It
    would also start a process for every core in advance; ours have variables of their own, and are none of those.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    keep_to_ourselves()


def mark_descendants() -> str:
    """Give every process that is started from now on, directly or by others, a variable by which it is known as ours.

    Returns the variable and its value as the kernel lists them.
    """
    os.environ[MARK] = secrets.token_hex(16)
    return f"{MARK}={os.environ[MARK]}"


def keep_to_ourselves() -> None:
    """Nothing leaves the machine unasked: no usage statistics of Ray or vLLM, no look at a model hub."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
