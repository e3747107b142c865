"""AdamW's groups, its rounded states, steps that are skipped, and what is said when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chatlearn.batch.pack import MicroBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.sharded import load_shards, save_shards
from chatlearn.errors import RunError
from chatlearn.records import Sample
from chatlearn.trainer.optimizer import OptimizerSpec, apply_gradients, build_optimizer, gradient_norm
from chatlearn.trainer.out_of_memory import advice_about, advice_about_update
from chatlearn.trainer.rounded_adamw import LOW_BITS, RoundedAdamW, round_at_random_
from chatlearn.trainer.schedule import Schedule

# torch remarks on every save and load that one process without a group saves alone; here that is the point.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

SPEC = OptimizerSpec(lr=1e-2, weight_decay=0.1, clip_grad=0.0)
ROUNDED = replace(SPEC, state_dtype="bfloat16")
ONE_GROUP, TWO_GROUPS = SPEC, replace(SPEC, decay_norms_and_biases=False)


class Network(nn.Module):
    """A matrix with a bias, a norm, a matrix: learns what another of its kind answers."""

    def __init__(self, seed: int, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.outer = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(self.inner(numbers)).tanh())


def train(network: Network, optimizer: torch.optim.Optimizer, spec: OptimizerSpec, steps: range) -> list[float]:
    """Losses of steps on fresh inputs that depend on the step's number only."""
    teacher, losses = Network(seed=100), []
    for iteration in steps:
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(iteration))
        loss = (network(inputs) - teacher(inputs).detach()).square().mean()
        loss.backward()
        apply_gradients(optimizer, spec, iteration)
        losses.append(loss.item())
    return losses


def trained(spec: OptimizerSpec, num_steps: int) -> tuple[Network, torch.optim.AdamW, list[float]]:
    network = Network(seed=1)
    optimizer = build_optimizer(network.parameters(), spec)
    return network, optimizer, train(network, optimizer, spec, range(1, num_steps + 1))


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_norms_and_biases_decay_only_when_asked_to() -> None:
    for spec, norms_decay in ((ONE_GROUP, True), (TWO_GROUPS, False)):
        network = Network(seed=1)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        apply_gradients(build_optimizer(network.parameters(), spec), spec, 1)
        shrunk = 1 - spec.lr * spec.weight_decay
        for name, parameter in network.named_parameters():
            expected = before[name] * (shrunk if norms_decay or parameter.ndim > 1 else 1)
            torch.testing.assert_close(parameter.detach(), expected)


def test_what_is_frozen_has_no_state() -> None:
    network = Network(seed=1)
    network.inner.requires_grad_(False)
    optimizer = build_optimizer(network.parameters(), SPEC)
    train(network, optimizer, SPEC, range(1, 3))
    assert set(optimizer.state) == {*network.norm.parameters(), *network.outer.parameters()}


def test_every_group_has_the_rate_of_the_step() -> None:
    spec = replace(TWO_GROUPS, schedule=Schedule("linear", 2, 0.0, 4))
    network, optimizer, _ = trained(spec, 2)
    for iteration, rate in ((1, spec.lr / 2), (3, spec.lr / 2), (4, 0.0)):
        train(network, optimizer, spec, range(iteration, iteration + 1))
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


@pytest.mark.parametrize("spec", [SPEC, ROUNDED])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(spec: OptimizerSpec, poison: float) -> None:
    network, optimizer, _ = trained(spec, 2)
    before, moments = flat(network), moment_bytes(optimizer)
    kept = [value.clone() for state in optimizer.state.values() for value in state.values()]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    assert not np.isfinite(apply_gradients(optimizer, spec, 3))
    assert torch.equal(flat(network), before)
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(kept, now, strict=True))
    assert moment_bytes(optimizer) == moments
    assert all(parameter.grad is None for parameter in network.parameters())


def test_clipping_scales_the_whole_gradient() -> None:
    network = Network(seed=1)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = gradient_norm(network.parameters())
    assert norm == pytest.approx(flat(network).numel() ** 0.5)
    spec = replace(SPEC, clip_grad=norm / 4, beta1=0.0)
    optimizer = build_optimizer(network.parameters(), spec)
    assert apply_gradients(optimizer, spec, 1) == norm
    for state in optimizer.state.values():
        torch.testing.assert_close(state["exp_avg"], torch.full_like(state["exp_avg"], 0.25))


def test_rounded_states_train_as_exact_ones_do_in_half_the_memory() -> None:
    """With beta2 = 0.999, where rounding to the nearest would stand still."""
    num_steps = 300
    exact, exact_optimizer, exact_losses = trained(SPEC, num_steps)
    rounded, optimizer, losses = trained(ROUNDED, num_steps)
    assert moment_bytes(optimizer) * 2 == moment_bytes(exact_optimizer)
    assert exact_losses[-1] < exact_losses[0] / 20, "the control has learned"
    assert np.array(losses) == pytest.approx(np.array(exact_losses), rel=0.015)
    way = flat(exact) - flat(Network(seed=1))
    assert (flat(rounded) - flat(exact)).norm() < 0.012 * way.norm()


def test_a_mean_follows_in_steps_that_the_format_cannot_tell_apart() -> None:
    """A gradient twice as large from one day on: its mean square must go from 1 to 4, by 1 / 1000 of the way a step."""
    weights = nn.Parameter(torch.zeros(4096))
    spec = replace(ROUNDED, beta1=0.0, weight_decay=0.0)
    optimizer = build_optimizer([weights], spec)
    assert isinstance(optimizer, RoundedAdamW)
    weights.grad = torch.full_like(weights, 1.0)
    apply_gradients(optimizer, spec, 1)
    optimizer.state[weights]["exp_avg_sq"].fill_(1.0)
    for iteration in range(2, 1002):
        weights.grad = torch.full_like(weights, 2.0)
        apply_gradients(optimizer, spec, iteration)
    expected = 4 - 3 * 0.999**1000
    assert optimizer.state[weights]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.005)
    assert torch.tensor(1.0).bfloat16() + 3 / 1000 == 1.0, "the nearest number is the one it started from"


@pytest.mark.parametrize("value", [1.003, -1.003, 3e-20, -7.7e12, 0.0, 1.0, -0.5])
def test_random_rounding_is_right_on_average(value: float) -> None:
    values = torch.full((20_000,), value)
    rounded = values.clone()
    generator = torch.Generator().manual_seed(0)
    round_at_random_(rounded, torch.randint(2**LOW_BITS, values.shape, generator=generator, dtype=torch.int32))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    assert neighbours.min() <= values[0] <= neighbours.max()
    assert rounded.double().mean().item() == pytest.approx(values[0].item(), rel=1e-4)


def test_chunks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number more than fits, and a step that is counted once."""
    _, one_piece, _ = trained(ROUNDED, 1)
    monkeypatch.setattr("chatlearn.trainer.rounded_adamw.CHUNK", 7)
    network, pieces, losses = trained(ROUNDED, 60)
    assert {int(state["step"]) for state in pieces.state.values()} == {60}
    assert losses == pytest.approx(trained(SPEC, 60)[2], rel=0.03)
    assert len(pieces.state) == len(one_piece.state) == len(list(network.parameters()))


def saved(root: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    files = save_shards(begin(root, 1), network, optimizer)
    return publish(root, Manifest(1, 1, "/base", "Network", groupgemm=False, num_ranks=1, files=files))


@pytest.mark.parametrize("spec", [ROUNDED, TWO_GROUPS, replace(ROUNDED, decay_norms_and_biases=False)])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, spec: OptimizerSpec) -> None:
    network, optimizer, _ = trained(spec, 3)
    folder = saved(tmp_path, network, optimizer)
    expected = train(network, optimizer, spec, range(4, 8))

    resumed = Network(seed=2)
    optimizer_there = build_optimizer(resumed.parameters(), spec)
    load_shards(folder, resumed, optimizer_there)
    assert train(resumed, optimizer_there, spec, range(4, 8)) == expected
    assert torch.equal(flat(resumed), flat(network))


@pytest.mark.parametrize(
    ("before", "after"),
    [(ONE_GROUP, TWO_GROUPS), (TWO_GROUPS, ONE_GROUP), (SPEC, ROUNDED), (ROUNDED, replace(TWO_GROUPS, lr=1e-3))],
)
def test_a_checkpoint_serves_other_wishes(tmp_path: Path, before: OptimizerSpec, after: OptimizerSpec) -> None:
    """Another grouping, another number format: moments are taken over, the rest is as it is asked for today."""
    network, optimizer, _ = trained(before, 3)
    folder = saved(tmp_path, network, optimizer)

    resumed = Network(seed=2)
    optimizer_there = build_optimizer(resumed.parameters(), after)
    load_shards(folder, resumed, optimizer_there)
    wanted = build_optimizer(Network(seed=3).parameters(), after)
    for group, expected in zip(optimizer_there.param_groups, wanted.param_groups, strict=True):
        assert {**group, "params": 0} == {**expected, "params": 0}
    dtype = torch.float32 if after.state_dtype == "float32" else torch.bfloat16
    for name, parameter in network.named_parameters():
        here, there = optimizer.state[parameter], optimizer_there.state[resumed.get_parameter(name)]
        assert here["step"] == there["step"] == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert there[moment].dtype == dtype
            torch.testing.assert_close(there[moment].float(), here[moment].float(), rtol=2**-8, atol=0)


def answer_of(length: int) -> Sample:
    zeros = np.zeros(length, np.float32)
    return Sample("", np.zeros(length, np.int32), np.arange(length) > 1, zeros, zeros)


def micro_batch_of(*lengths: int) -> MicroBatch:
    layout = BatchLayout(1, packing=True, max_tokens=sum(lengths), micro_batch_size=1)
    return pack([answer_of(length) for length in lengths], layout).ranks[0][0]


def fail_on_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB.\nGPU 0 has no more")


def fail_on_host() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def fail_in_the_driver() -> None:
    """As pinned memory does, which torch's allocator of the device knows nothing of."""
    raise RuntimeError("CUDA error: out of memory\nGPU 0 may report it late")


@pytest.mark.parametrize("fail", [fail_on_device, fail_on_host, fail_in_the_driver])
def test_too_large_a_micro_batch_names_what_to_change_in_order(fail: Callable[[], None]) -> None:
    with pytest.raises(RunError) as caught, advice_about(micro_batch_of(1200, 40)):
        fail()
    message = str(caught.value)
    assert "micro-batch of 1,240 tokens (2 answers, the longest with its prompt 1,200)" in message
    keys = ["max_token_in_packing", "train_micro_batch_size", "ulysses_sequence_parallel_size"]
    places = [message.index(key) for key in [*keys, "gradient_checkpointing", "num_gpu"]]
    assert places == sorted(places)
    assert "\nGPU 0" not in message


def test_an_answer_that_is_alone_is_not_told_to_be_alone() -> None:
    with pytest.raises(RunError, match="1 answer, the longest") as caught, advice_about(micro_batch_of(1200)):
        fail_on_device()
    assert "max_token_in_packing" not in str(caught.value)
    assert "1. raise models.policy_trainer.ulysses_sequence_parallel_size" in str(caught.value)


def test_an_update_that_does_not_fit_is_not_told_to_shrink_the_batch() -> None:
    with pytest.raises(RunError, match=r"optimizer's step.*9\.27 GiB") as caught, advice_about_update():
        fail_on_device()
    assert "optimizer.state_dtype=bfloat16" in str(caught.value)
    assert "packing" not in str(caught.value)


def test_other_failures_pass_through() -> None:
    for context in (advice_about(micro_batch_of(3)), advice_about_update()):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), context:
            torch.zeros(2, 3) @ torch.zeros(2, 3)
