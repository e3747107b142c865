"""A layout in words, for people who want to see what a run will do."""

from __future__ import annotations

from chatlearn.config.fates import FATES, PARTIAL
from chatlearn.config.layout import Layout, PackingRule, ShardedPlan
from chatlearn.config.schema import GrpoConfig


def summary_rows(layout: Layout) -> list[tuple[str, str]]:
    """What follows from a configuration, as pairs of a name and a sentence."""
    device = "GPUs" if layout.device_kind == "cuda" else "processes on the CPU"
    engines, epochs = layout.policy, layout.num_training_epoch
    nodes = f"{layout.num_nodes} node(s)" + (f" with {layout.gpus_per_node} GPUs each" if layout.gpus_per_node else "")
    return [
        ("device", f"{layout.device_kind}, {nodes}"),
        *((" + ".join(group.roles), f"{group.num_devices} {device}") for group in layout.groups),
        ("from each node", " + ".join(map(str, layout.arrangement.blocks))),
        ("episode", f"{layout.prompts_per_episode} prompts, {layout.samples_per_episode} answers"),
        ("steps per episode", f"{layout.steps_per_episode} ({layout.num_minibatches} mini-batches, {epochs} epochs)"),
        ("old log-probabilities", "scored before the first step" if layout.steps_per_episode > 1 else "from the step"),
        ("engines", f"{engines.num_replicas} with tensor parallel size {engines.tensor_parallel_size}"),
        ("longest sequence", f"{engines.max_sequence_tokens} tokens"),
        ("trainer", _sharded(layout.trainer)),
        ("micro-batches", _packing(layout.training)),
        ("reference model", _reference(layout)),
        ("cores per process", f"engine {engines.cores_per_process}, trainer {layout.trainer.cores_per_process}"),
        ("graders", f"{layout.num_graders} processes"),
        ("output", str(layout.folders.output)),
    ]


def _sharded(plan: ShardedPlan) -> str:
    replicas = f", {plan.num_ranks // plan.fsdp_size} replicas" if plan.fsdp_size < plan.num_ranks else ""
    shared = f", {plan.sequence_parallel_size} ranks to a sequence" if plan.sequence_parallel_size > 1 else ""
    return f"{plan.load} in {plan.fsdp_size} shards over {plan.num_ranks} ranks{replicas}{shared}"


def _reference(layout: Layout) -> str:
    if layout.base_is_reference:
        return "the trainer's own base, with the LoRA adapter off"
    return "none (kl_coef is 0)" if layout.reference is None else _sharded(layout.reference)


def _packing(rule: PackingRule) -> str:
    if rule.packing:
        return f"packed, at most {rule.max_tokens} tokens, on {rule.num_data_ranks} data ranks"
    return f"{rule.micro_batch_size} answers, on {rule.num_data_ranks} data ranks"


def inert_line(config: GrpoConfig) -> str | None:
    """One line that names the keys that were written and have no effect; None when there are none.

    Keys of a role that does not run at all are named together: ``models.rollout_manager.*``.
    """
    speaking = {_section(row.key) for row in FATES if row.kind == "honoured"}
    written = list(config.origin.inert_keys)
    if not config.runtime_args.use_partial_rollout:
        speaking.discard(PARTIAL)
        # At its default a key says nothing; the configuration that a run writes has them all.
        section = config.models.partial_rollout_manager
        wishes = section.model_dump(exclude_unset=True, exclude_defaults=True)
        written += [f"{PARTIAL}.{name}" for name in sorted(wishes)]
    names: dict[str, None] = {}
    for key in written:
        section = _section(key)
        names[key if section in speaking else f"{section}.*"] = None
    return f"keys without effect here (see docs/config.md): {', '.join(names)}" if names else None


def _section(key: str) -> str:
    """The first two names of a model's key (``models.policy``), the first of any other."""
    depth = 2 if key.startswith("models.") else 1
    return ".".join(key.split(".")[:depth])
