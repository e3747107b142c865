"""What a sharded model sends is what arrives: in its dtype, from every rank, and a changed byte is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import transfer_cases
from cases import Setup
from gang import GangOf

LAYER = "model.layers.1."
# A model, whether it has an adapter, and a tensor of it.
VICTIMS = [
    ("untied", False, LAYER + "mlp.up_proj.weight"),
    ("tied", False, "model.embed_tokens.weight"),
    ("moe", False, LAYER + "mlp.experts.3.up_proj.weight"),
    ("tied", True, LAYER + "self_attn.q_proj.weight"),
]


@pytest.mark.parametrize(("model", "adapted", "victim"), VICTIMS)
def test_a_changed_byte_is_named_dense_tied_expert_or_merged(
    gang_of: GangOf, models: dict[str, Path], model: str, adapted: bool, victim: str
) -> None:
    setup = Setup(models[model], grouped_experts=model == "moe")
    complaints, nothing = gang_of(2).run(transfer_cases.sent_with_a_changed_byte, setup, adapted, victim)
    assert nothing == []
    (complaint,) = complaints
    assert complaint == f"{victim}: the bytes that arrived are not those that were sent (its checksum differs)"


@pytest.mark.parametrize(("model", "adapted"), [("tied", False), ("moe", False), ("untied", True)])
def test_nothing_is_gathered_or_sent_in_a_wider_dtype_than_the_engine_has(
    gang_of: GangOf, models: dict[str, Path], model: str, adapted: bool
) -> None:
    setup = Setup(models[model], compute_dtype="bfloat16", grouped_experts=model == "moe")
    gathered, arrived, declared, names = gang_of(2).run(transfer_cases.sent_in_the_compute_dtype, setup, adapted)[0]
    assert gathered["torch.bfloat16"] > 500
    # The factors of an adapter, of rank 2, are float32; what they are merged into is not gathered so.
    assert gathered.keys() == ({"torch.bfloat16", "torch.float32"} if adapted else {"torch.bfloat16"})
    assert gathered.get("torch.float32", 0) <= 2 * 64 / 2
    assert arrived == {"torch.bfloat16"}
    assert names == declared


def test_every_gpu_is_sent_its_own_bytes_and_one_that_differs_is_found(gang_of: GangOf) -> None:
    assert gang_of(2).run(transfer_cases.sent_from_every_gpu, []) == [[], []]
    (complaint,), nothing = gang_of(2).run(transfer_cases.sent_from_every_gpu, [1])
    assert nothing == []
    assert complaint.startswith("w2: the bytes that arrived are not those that were sent")
