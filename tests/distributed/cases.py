"""What the ranks of a gang do in the trainer's tests: functions with picklable arguments and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from chatlearn.algorithm.correction import Correction
from chatlearn.algorithm.loss import POLICY_LOSSES, ClipRange
from chatlearn.batch.pack import MicroBatch, TrainBatch, pack, unpack
from chatlearn.batch.plan import BatchLayout
from chatlearn.errors import ConfigError
from chatlearn.records import Sample, StepStats
from chatlearn.trainer.build import ModelSpec
from chatlearn.trainer.objective import Objective
from chatlearn.trainer.optimizer import OptimizerSpec
from chatlearn.trainer.parallel import ParallelPlan
from chatlearn.trainer.policy_trainer import PolicyTrainer
from chatlearn.trainer.sharded_model import ShardedModel
from chatlearn.weights.wire import TensorMeta

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Setup:
    """All that may vary in a test; everything but the model should leave the result as it is."""

    path: Path
    loss: str = "grpo"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    correction: Correction | None = None
    clip_grad: float = 1.0
    lr: float = 1e-4
    temperature: float = 1.3
    fsdp_size: int | None = None  # all ranks
    sequence_parallel_size: int = 1
    packing: bool = True
    max_tokens: int = 4096
    micro_batch_size: int = 4
    meta_init: bool = False
    checkpointing: str = "full"
    grouped_experts: bool = False
    whole_below_bytes: int = 2**30
    compute_dtype: str = "float32"
    num_steps: int = 3

    def spec(self) -> ModelSpec:
        return ModelSpec(
            path=self.path,
            compute_dtype=self.compute_dtype,
            temperature=self.temperature,
            checkpointing=self.checkpointing,
            grouped_experts=self.grouped_experts,
            meta_init=self.meta_init,
            whole_below_bytes=self.whole_below_bytes,
        )

    def plan(self) -> ParallelPlan:
        num_ranks = dist.get_world_size()
        return ParallelPlan(num_ranks, self.fsdp_size or num_ranks, self.sequence_parallel_size)

    def layout(self) -> BatchLayout:
        return BatchLayout(self.plan().data_size, self.packing, self.max_tokens, self.micro_batch_size)

    def objective(self) -> Objective:
        clip = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
        return Objective(POLICY_LOSSES[self.loss], clip, self.kl_coef, self.entropy_coef, self.correction)

    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(self.lr, weight_decay=0.1, beta1=0.9, beta2=0.95, clip_grad=self.clip_grad)


def random_samples(num_samples: int, seed: int = 0, *, with_old: bool = False, with_ref: bool = False) -> list[Sample]:
    """Answers of 2 to 20 tokens to prompts of 1 to 9, with advantages of both signs."""
    generator = np.random.default_rng(seed)
    samples = []
    for number in range(num_samples):
        num_prompt, num_answer = int(generator.integers(1, 10)), int(generator.integers(2, 21))
        length = num_prompt + num_answer
        mask = np.arange(length) >= num_prompt

        def stream(
            low: float, high: float, length: int = length, mask: NDArray[np.bool_] = mask
        ) -> NDArray[np.float32]:
            return np.where(mask, generator.uniform(low, high, length), 0).astype(np.float32)

        samples.append(
            Sample(
                prompt_uid=str(number),
                token_ids=generator.integers(0, VOCABULARY, length).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=stream(-6, -3),
                advantages=np.where(mask, generator.normal(), 0).astype(np.float32),
                old_logprobs=stream(-6, -3) if with_old else None,
                ref_logprobs=stream(-6, -3) if with_ref else None,
            )
        )
    return samples


def trainer_of(setup: Setup) -> PolicyTrainer:
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    return PolicyTrainer(model, setup.optimizer(), setup.objective())


def mine(setup: Setup, samples: Sequence[Sample]) -> TrainBatch:
    """The batch as the driver packs it; each rank takes its own row, ``my_share``."""
    return pack(samples, setup.layout())


def my_share(setup: Setup, batch: TrainBatch) -> tuple[MicroBatch, ...]:
    """What this rank works on; ranks that share sequences have the same."""
    return batch.ranks[setup.plan().data_rank(dist.get_rank())]


def step(trainer: PolicyTrainer, setup: Setup, samples: Sequence[Sample]) -> StepStats:
    batch = mine(setup, samples)
    return trainer.step(my_share(setup, batch), batch.num_loss_tokens, iteration=1)


def exported(model: ShardedModel) -> Weights:
    return {name: weight.float().numpy().copy() for name, weight in model.export_weights()}


def train(setup: Setup, samples: Sequence[Sample]) -> tuple[list[StepStats], Weights]:
    """Load, step, export."""
    trainer = trainer_of(setup)
    stats = [step(trainer, setup, samples) for _ in range(setup.num_steps)]
    return stats, exported(trainer.model)


def score(setup: Setup, samples: Sequence[Sample], trainable: bool) -> list[NDArray[np.float32]]:
    """Log-probabilities by token, in the order of samples; every rank answers for all."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=trainable)
    return scores_of(model, setup, samples)


def scores_of(model: ShardedModel, setup: Setup, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
    """What the first rank of every sequence group answers."""
    batch = mine(setup, samples)
    return unpack(batch, gathered_scores(model, setup, batch)[:: setup.sequence_parallel_size])


def gathered_scores(model: ShardedModel, setup: Setup, batch: TrainBatch) -> list[list[torch.Tensor]]:
    """What every rank answers."""
    gathered: list[list[torch.Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, model.logprobs(my_share(setup, batch)))
    return gathered


def all_scores(setup: Setup, samples: Sequence[Sample]) -> list[list[NDArray[np.float32]]]:
    """Log-probabilities of a frozen model by token: what the first, the second, ... rank of every group answers."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=False)
    batch = mine(setup, samples)
    gathered = gathered_scores(model, setup, batch)
    size = setup.sequence_parallel_size
    return [unpack(batch, gathered[member::size]) for member in range(size)]


def score_around_a_step(setup: Setup, samples: Sequence[Sample]) -> tuple[list[NDArray[np.float32]], Weights]:
    """Score, step, score again: the second scores, and the weights they must belong to."""
    trainer = trainer_of(setup)
    scores_of(trainer.model, setup, samples)
    step(trainer, setup, samples)
    return scores_of(trainer.model, setup, samples), exported(trainer.model)


def export_untouched(setup: Setup) -> tuple[Weights, list[TensorMeta]]:
    """What leaves the trainer when nothing was trained."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    return exported(model), model.metadata()


def step_on_poison(setup: Setup, samples: Sequence[Sample]) -> tuple[Weights, Weights, StepStats, StepStats]:
    """Weights before and after a step on an infinite advantage, its statistics, and those of a healthy step after."""
    trainer = trainer_of(setup)
    before = exported(trainer.model)
    advantages = np.where(samples[0].loss_mask, np.inf, 0).astype(np.float32)
    poisoned = step(trainer, setup, [replace(samples[0], advantages=advantages), *samples[1:]])
    after = exported(trainer.model)
    return before, after, poisoned, step(trainer, setup, samples)


def master_dtypes(setup: Setup, trainable: bool) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """How weights are stored, and how they leave."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=trainable)
    stored = {parameter.dtype for parameter in model.module.parameters()}
    return stored, {weight.dtype for _, weight in model.export_weights()}


def flops_per_token(setup: Setup) -> float:
    """What utilisation is computed from."""
    return ShardedModel.load(setup.spec(), setup.plan(), trainable=True).training_flops_per_token()


def load_error(setup: Setup) -> str:
    """The error that loading raises."""
    try:
        ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    except ConfigError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def transformers_scores(path: Path, samples: Sequence[Sample], temperature: float) -> list[NDArray[np.float32]]:
    """Log-probabilities by token as plain transformers gives them, one sequence at a time."""
    model = transformers_model(path)
    with torch.no_grad():
        return [np.concatenate([[0], reference_scores(model, s, temperature)[0].numpy()]) for s in samples]


def scores_of_weights(
    path: Path, weights: Weights, samples: Sequence[Sample], temperature: float
) -> list[NDArray[np.float32]]:
    """The same for a model of the configuration in ``path`` with these weights."""
    folder = path.parent / f"{path.name}_moved"
    transformers_model(path).save_pretrained(folder)
    save_file({name: torch.from_numpy(weight) for name, weight in weights.items()}, folder / "model.safetensors")
    return transformers_scores(folder, samples, temperature)


def transformers_model(path: Path) -> torch.nn.Module:
    """A model as everybody loads it."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def reference_scores(
    model: torch.nn.Module, sample: Sample, temperature: float, pad_to: int = 40
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T - 1] of the next tokens and entropies, of one padded sequence."""
    length = len(sample.token_ids)
    token_ids = torch.zeros(1, pad_to, dtype=torch.int64)
    token_ids[0, :length] = torch.from_numpy(sample.token_ids)
    attention_mask = (torch.arange(pad_to) < length)[None].long()
    logits = model(input_ids=token_ids, attention_mask=attention_mask).logits[0, : length - 1]
    distribution = (logits / temperature).log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution[torch.arange(length - 1), token_ids[0, 1:length]], entropy


def reference_training(setup: Setup, samples: Sequence[Sample]) -> tuple[list[float], list[float], Weights]:
    """Losses, gradient norms and final weights of GRPO written down plainly: padded, one sequence at a time."""
    model = transformers_model(setup.path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.95), weight_decay=0.1)
    num_loss_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    losses, norms = [], []
    for _ in range(setup.num_steps):
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:
            loss = reference_loss(model, sample, setup) / num_loss_tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip_grad).item())
        optimizer.step()
    return losses, norms, named_weights(model, setup.path)


def reference_loss(model: torch.nn.Module, sample: Sample, setup: Setup) -> torch.Tensor:
    """The objective summed over the loss tokens of one sample."""
    mask = torch.from_numpy(sample.loss_mask[1:])
    logprobs, entropy = (values[mask] for values in reference_scores(model, sample, setup.temperature))
    advantages = torch.from_numpy(sample.advantages[1:])[mask]
    old = logprobs.detach() if sample.old_logprobs is None else torch.from_numpy(sample.old_logprobs[1:])[mask]
    ratio = torch.exp(logprobs - old)
    gains = torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.28))
    gains = torch.where(advantages < 0, torch.maximum(gains, 3.0 * advantages), gains)
    loss = -gains - setup.entropy_coef * entropy
    if sample.ref_logprobs is not None:
        gap = torch.from_numpy(sample.ref_logprobs[1:])[mask] - logprobs
        loss = loss + setup.kl_coef * (gap.exp() - gap - 1).clamp(max=10)
    return loss.sum()


def named_weights(model: torch.nn.Module, path: Path) -> Weights:
    """The weights under the names and in the shapes of the checkpoint, as transformers itself saves them."""
    folder = path.parent / f"{path.name}_trained"
    model.save_pretrained(folder)
    return {name: weight.numpy() for name, weight in load_file(folder / "model.safetensors").items()}


def worst_difference(left: Mapping[str, NDArray[np.float32]], right: Mapping[str, NDArray[np.float32]]) -> float:
    """The largest absolute difference of two sets of weights, which must have the same names."""
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)
