"""A real engine beside a real trainer, with one fault planted in either: what the ranks of the gate's tests run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import numpy as np
import torch
from cases import Setup, mine, my_share
from torch import Tensor

from chatlearn.batch.pack import unpack
from chatlearn.checkpoint.architecture import parameter_shapes
from chatlearn.models import attention
from chatlearn.models.family import family_of
from chatlearn.numerics.bench import Bench, Facts
from chatlearn.numerics.change import Change, Distribution
from chatlearn.numerics.diagnosis import diagnose
from chatlearn.records import FloatStream, Sample
from chatlearn.rollout.engine import EngineSpec, Request, SamplingPlan
from chatlearn.rollout.tiny_engine import TransformersEngine, recorder_of, replace_weights
from chatlearn.trainer.rescore import Rescorer
from chatlearn.trainer.sharded_model import ShardedModel

EMBEDDED = Path(__file__).parents[2] / "embedded"
NUM_ANSWERS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 6, 24
END = 331  # the embedded tokenizer's end of a turn
TENSOR = "model.embed_tokens.weight"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Plant:
    """What is wrong, on which side; by default nothing is."""

    family: str = "tiny_qwen3"
    asked: float = 1.0
    plan: SamplingPlan | None = None  # what the engine really does
    engine_dtype: str = "float32"
    moved: bool = False  # whether the trainer has left the model directory's weights
    engine_weights: Callable[[Weights, Weights], Weights] | None = None  # of the trainer's and the stored ones
    mended_again: bool = False  # whether sending them again helps
    extra_token: int | None = None  # put in by the engine before the prompt
    report: Callable[[Sample, Plant], Sample] | None = None
    broken_attention: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # of the facts


@dataclass(frozen=True)
class Judged:
    """The verdict, as far as it can be sent."""

    cause: str | None
    text: str
    num_trials: int


def judge(plant: Plant) -> Judged:
    """Sample with the engine, score with the trainer, and see what the gate says."""
    setup = Setup(EMBEDDED / plant.family, temperature=plant.asked)
    model, stored = trainer(setup, plant.moved), stored_weights(setup.path)
    rescorer = Rescorer(model, setup.plan())
    engine = engine_of(setup.path, plant.engine_dtype)
    current = {name: weight.float().clone() for name, weight in model.export_weights()}
    sent = current if plant.engine_weights is None else plant.engine_weights(current, stored)
    samples = answers(engine, plant, sent)
    if plant.report is not None:
        samples = [plant.report(sample, plant) for sample in samples]

    def score(asked: Sequence[Sample], change: Change) -> list[FloatStream]:
        layout = replace(setup, packing=False, micro_batch_size=1) if change.plain_kernels else setup
        batch = mine(layout, asked)
        broken = patch.object(attention, "_one_by_one", leaking) if plant.broken_attention else patch.dict({})
        with broken:
            values = rescorer.logprobs(my_share(layout, batch), change)
        gathered: list[list[Tensor]] = [[] for _ in range(setup.plan().num_ranks)]
        torch.distributed.all_gather_object(gathered, values)
        return unpack(batch, gathered)

    def again() -> list[Sample]:
        return answers(engine, plant, current if plant.mended_again else sent)

    verdict = diagnose(Bench(facts(setup, plant), samples, score, again))
    return Judged(verdict.cause, str(verdict), len(verdict.trials))


def facts(setup: Setup, plant: Plant) -> Facts:
    shapes = parameter_shapes(setup.path)
    known = Facts(
        asked=Distribution(plant.asked),
        dtype="float32",
        tolerance=1e-5,
        vocabulary=shapes["model.embed_tokens.weight"][0],
        known_distributions=(("the plan of evaluation", Distribution(0.6, top_p=0.95, top_k=20)),),
        special_tokens=(END,),
        parameters=tuple(shapes),
        has_moved=plant.moved,
        is_mixture=family_of(setup.path).experts is not None,
    )
    return replace(known, **plant.changes)


@functools.cache
def engine_of(path: Path, dtype: str) -> TransformersEngine:
    is_mixture = family_of(path).experts is not None
    return TransformersEngine(EngineSpec(str(path), 128, dtype=dtype, return_routed_experts=is_mixture))


@functools.cache
def stored_weights(path: Path) -> Weights:
    model = ShardedModel.load(Setup(path).spec(), Setup(path).plan(), trainable=False)
    return {name: weight.clone() for name, weight in model.export_weights()}


@functools.cache
def trainer(setup: Setup, moved: bool) -> ShardedModel:
    """The model as it is stored, or after a step of training."""
    model = ShardedModel.load(setup.spec(), setup.plan(), trainable=True)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.module.parameters():
                local = parameter.to_local()
                local += 0.02 * local.abs().mean() * torch.randn(local.shape, generator=generator)
    return model


def answers(engine: TransformersEngine, plant: Plant, weights: Weights) -> list[Sample]:
    engine._model = replace_weights(engine._model, weights, engine._spec)
    engine._recorder = recorder_of(engine._model, engine._spec)
    plan = plant.plan or SamplingPlan(temperature=plant.asked)
    prompts = np.random.default_rng(1).integers(0, 300, size=(NUM_ANSWERS, PROMPT_TOKENS), dtype=np.int32)
    extra = [] if plant.extra_token is None else [plant.extra_token]
    requests = [Request(str(number), np.array([*extra, *prompt], np.int32)) for number, prompt in enumerate(prompts)]
    engine.submit(requests, replace(plan, max_tokens=ANSWER_TOKENS, seed=5))
    finished = {item.request_id: item.completion for item in engine.completions()}
    samples: list[Sample] = []
    for request in requests:
        completion = finished[request.request_id]
        silence = np.zeros(PROMPT_TOKENS, np.float32)
        samples.append(
            Sample(
                prompt_uid=request.request_id,
                token_ids=np.concatenate([request.prompt_token_ids[len(extra) :], completion.token_ids]),
                loss_mask=np.repeat([False, True], [PROMPT_TOKENS, len(completion.token_ids)]),
                rollout_logprobs=np.concatenate([silence, completion.logprobs]),
                advantages=np.zeros(PROMPT_TOKENS + len(completion.token_ids), np.float32),
                routed_experts=completion.routed_experts,
            )
        )
    return samples


# --- faults --------------------------------------------------------------------------------------------------------


def raw(sample: Sample, plant: Plant) -> Sample:
    """The numbers of temperature 1, of tokens that were sampled as asked."""
    model = cases.transformers_model(EMBEDDED / plant.family)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sample.token_ids)[None].long()).logits[0]
    logprobs = logits.log_softmax(-1)[:-1].gather(-1, torch.from_numpy(sample.token_ids[1:, None]).long())[:, 0]
    return replace(sample, rollout_logprobs=np.where(sample.loss_mask, np.append(0, logprobs), 0).astype(np.float32))


def late(sample: Sample, plant: Plant) -> Sample:
    """Every token has the number of the one before it."""
    return replace(sample, rollout_logprobs=np.roll(sample.rollout_logprobs, 1) * sample.loss_mask)


def logits(sample: Sample, plant: Plant) -> Sample:
    return replace(sample, rollout_logprobs=(sample.rollout_logprobs + 9) * sample.loss_mask)


def stored_only(current: Weights, stored: Weights) -> Weights:
    return stored


def one_stored(current: Weights, stored: Weights) -> Weights:
    return current | {TENSOR: stored[TENSOR]}


def layer_missing(current: Weights, stored: Weights) -> Weights:
    return current | {name: torch.zeros_like(tensor) for name, tensor in current.items() if ".layers.2." in name}


def embedding_damaged(current: Weights, stored: Weights) -> Weights:
    name = "model.embed_tokens.weight"
    noise = torch.randn(current[name].shape, generator=torch.Generator().manual_seed(1))
    return current | {name: current[name] + 0.3 * current[name].std() * noise}


def router_nudged(current: Weights, stored: Weights) -> Weights:
    """A router that breaks near ties in another way, and weighs nearly the same."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.01 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if name.endswith("mlp.gate.weight")
        else tensor
        for name, tensor in current.items()
    }


def leaking(query: Tensor, key: Tensor, value: Tensor, scaling: float, packed: attention.PackedLayout) -> Tensor:
    """Packed attention that lets a sequence see the ones before it."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
