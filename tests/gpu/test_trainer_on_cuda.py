"""The trainer on a real device: half-precision compute, packed kernels, moving to the host and back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.pack import TrainBatch, pack
from chatlearn.batch.plan import BatchLayout
from chatlearn.records import Sample
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan, Rendezvous, close_process_group, open_process_group
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.residency import Residency
from chatlearn.trainer.sharded_model import ShardedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
OBJECTIVE = Objective(POLICY_LOSSES["grpo"], ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0))
OPTIMIZER = OptimizerSpec(lr=1e-4)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank, over NCCL."""
    meeting = tmp_path_factory.mktemp("meeting") / "place"
    open_process_group(0, 1, Rendezvous(f"file://{meeting}", "cuda"))
    yield
    close_process_group()


@pytest.fixture(scope="module", params=["dense", "moe"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    torch.manual_seed(1)
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    config = Qwen3Config(**SIZES) if request.param == "dense" else Qwen3MoeConfig(**SIZES, **mixture)
    folder = Path(tmp_path_factory.mktemp(request.param))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return ModelSpec(folder, compute_dtype="bfloat16", meta_init=True, grouped_experts=True)


def random_batch() -> TrainBatch:
    generator = np.random.default_rng(0)
    samples = []
    for length in generator.integers(20, 200, 16):
        mask = np.arange(length) >= length // 3
        advantages = np.where(mask, generator.normal(), 0).astype(np.float32)
        token_ids = generator.integers(0, 512, length).astype(np.int32)
        samples.append(Sample("", token_ids, mask, np.where(mask, -6, 0).astype(np.float32), advantages))
    return pack(samples, BatchLayout(num_data_ranks=1, packing=True, max_tokens=1024, micro_batch_size=1))


def test_packed_kernel_in_half_precision_is_close_to_single(spec: ModelSpec) -> None:
    batch = random_batch().ranks[0]
    plan = ParallelPlan(1, 1)
    half = torch.cat(ShardedModel.load(spec, plan, trainable=False).logprobs(batch))
    single_spec = replace(spec, compute_dtype="float32")
    single = torch.cat(ShardedModel.load(single_spec, plan, trainable=False).logprobs(batch))
    assert (half - single).abs().mean() < 0.02
    assert not torch.equal(half, single)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("loss", sorted(POLICY_LOSSES))
def test_forward_and_backward_never_wait_for_the_device(spec: ModelSpec, loss: str) -> None:
    """While the device computes one micro-batch, the program has the next one ready."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before Hopper torch computes grouped products one by one, and asks the device for their sizes")
    objective = replace(OBJECTIVE, loss=POLICY_LOSSES[loss])
    trainer = PolicyTrainer(ShardedModel.load(spec, ParallelPlan(1, 1), trainable=True), OPTIMIZER, objective)
    batch = random_batch()
    trainer.accumulate(batch.ranks[0], batch.num_loss_tokens)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.accumulate(batch.ranks[0], batch.num_loss_tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_after_a_stay_on_the_host_is_the_same_step(spec: ModelSpec) -> None:
    batch = random_batch()
    norms = []
    for travels in (False, True):
        trainer = PolicyTrainer(ShardedModel.load(spec, ParallelPlan(1, 1), trainable=True), OPTIMIZER, OBJECTIVE)
        trainer.step(batch.ranks[0], batch.num_loss_tokens, iteration=1)
        if travels:
            residency = Residency(trainer.model, trainer.optimizer)
            gc.collect()  # models of earlier tests refer to themselves
            before = torch.cuda.memory_allocated()
            residency.send_optimizer_home()
            residency.send_weights_home()
            num_weights = sum(weight.numel() for weight in trainer.model.module.parameters())
            assert before - torch.cuda.memory_allocated() >= 3 * 4 * num_weights, "weights and both moments have left"
            residency.bring_weights()
            residency.bring_optimizer()
        norms.append(trainer.step(batch.ranks[0], batch.num_loss_tokens, iteration=1).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_a_stay_on_the_host_is_in_pinned_memory_that_is_used_again(spec: ModelSpec) -> None:
    batch = random_batch()
    trainer = PolicyTrainer(ShardedModel.load(spec, ParallelPlan(1, 1), trainable=True), OPTIMIZER, OBJECTIVE)
    residency = Residency(trainer.model, trainer.optimizer)
    trainer.step(batch.ranks[0], batch.num_loss_tokens, iteration=1)
    homes = []
    for _ in range(2):
        residency.send_optimizer_home()
        residency.send_weights_home()
        shards = [parameter.to_local() for parameter in trainer.model.module.parameters()]
        moments = [state["exp_avg"].to_local() for state in trainer.optimizer.state.values()]
        assert all(tensor.is_pinned() for tensor in (*shards, *moments))
        homes.append([tensor.data_ptr() for tensor in (*shards, *moments)])
        residency.bring_weights()
        residency.bring_optimizer()
        assert all(parameter.device.type == "cuda" for parameter in trainer.model.module.parameters())
    assert homes[0] == homes[1]


@pytest.mark.parametrize("meta_init", [False, True])
def test_weights_that_stay_on_the_host_learn_the_same(spec: ModelSpec, meta_init: bool) -> None:
    batch = random_batch()
    losses = []
    for on_host in (False, True):
        here = replace(spec, on_host=on_host, meta_init=meta_init, compute_dtype="float32")
        trainer = PolicyTrainer(ShardedModel.load(here, ParallelPlan(1, 1), trainable=True), OPTIMIZER, OBJECTIVE)
        losses.append([trainer.step(batch.ranks[0], batch.num_loss_tokens, n).loss for n in (1, 2, 3)])
        if on_host:
            assert {parameter.device.type for parameter in trainer.model.module.parameters()} == {"cpu"}
            assert {weight.device.type for _, weight in trainer.model.export_weights()} == {"cuda"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_is_computed_again_need_not_be_kept(spec: ModelSpec) -> None:
    micro_batch = random_batch().ranks[0][0].to(torch.device("cuda"))
    norms, kept_bytes = [], []
    for checkpointing in ("off", "selective", "full"):
        model = ShardedModel.load(replace(spec, checkpointing=checkpointing), ParallelPlan(1, 1), trainable=True)
        model.module.train()
        model.score(micro_batch)[0].sum().backward()  # what is allocated once for all steps does not count
        before = torch.cuda.memory_allocated()
        logprobs, _ = model.score(micro_batch)
        kept_bytes.append(torch.cuda.memory_allocated() - before)
        logprobs.sum().backward()
        norms.append(sum(weight.grad.to_local().square().sum().item() for weight in model.module.parameters()))
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-2)
    assert kept_bytes[0] > kept_bytes[1] > kept_bytes[2]
