"""Which roles share devices."""

from __future__ import annotations

from dataclasses import dataclass

from chatlearn.config.schema import GrpoConfig


@dataclass(frozen=True)
class DeviceGroup:
    """Roles that live on the same devices and take turns; ``sizes`` are the ``num_gpu`` of each, in the same order."""

    roles: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices of the group: as many as its largest role needs (they are equal in a legal layout on GPUs)."""
        return max(self.sizes)


def device_sizes(config: GrpoConfig) -> dict[str, int]:
    """``num_gpu`` of every role that runs and holds a model."""
    models = config.models
    sizes = {"policy": models.policy.num_gpu, "policy_trainer": models.policy_trainer.num_gpu}
    if models.policy_trainer.kl_coef > 0:
        asked = models.ref_policy.num_gpu
        sizes["ref_policy"] = models.policy_trainer.num_gpu if asked is None else asked
    return sizes


def device_groups(config: GrpoConfig) -> tuple[DeviceGroup, ...]:
    """Roles by ``runtime_args.colocation``; a role that no list names has devices of its own.

    >>> # colocation=[policy,policy_trainer] with kl_coef=0.1: the reference model stands apart
    >>> # (DeviceGroup(("policy", "policy_trainer"), (8, 8)), DeviceGroup(("ref_policy",), (8,)))
    """
    sizes = device_sizes(config)
    named = [tuple(role for role in group if role in sizes) for group in config.runtime_args.colocation]
    placed = {role for group in named for role in group}
    alone = [(role,) for role in sizes if role not in placed]
    return tuple(DeviceGroup(roles, tuple(sizes[role] for role in roles)) for roles in [*named, *alone] if roles)
