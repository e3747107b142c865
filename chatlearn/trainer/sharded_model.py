"""A model that is split over the ranks of the open process group: it scores batches and exports its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from chatlearn import device
from chatlearn.errors import ConfigError
from chatlearn.models.attention import PackedLayout
from chatlearn.models.family import family_of
from chatlearn.models.lora import Factors, LoraSpec, is_adapter, merged
from chatlearn.models.pretrained import read_configuration
from chatlearn.models.router_replay import RouterTally, Routes
from chatlearn.models.ulysses import gather_tokens
from chatlearn.models.work import share_met
from chatlearn.trainer.adapter import adapter_off
from chatlearn.trainer.build import DTYPES, ModelSpec, build, is_small
from chatlearn.trainer.load import whole
from chatlearn.trainer.out_of_memory import advice_about_scoring
from chatlearn.trainer.parallel import group_device_kind, sequence_group, sequence_parallel_problem
from chatlearn.weights.wire import TensorMeta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.device import DeviceKind, DtypeName
    from chatlearn.models.naming import ModelFamily
    from chatlearn.models.ulysses import SequenceGroup
    from chatlearn.trainer.parallel import ParallelPlan
    from chatlearn.trainer.token_scorer import TokenScorer


class ShardedModel:
    """Every public method is collective: all ranks call it, in the same order, with equally many micro-batches."""

    def __init__(
        self, spec: ModelSpec, family: ModelFamily, module: TokenScorer, sequence: SequenceGroup | None = None
    ) -> None:
        self.spec = spec
        self.family = family
        self.module = module
        self.sequence = sequence
        self.device_kind: DeviceKind = group_device_kind()
        self.device = device.rank_device(self.device_kind)
        self.stays_whole = is_small(module, spec)
        # Ranks that work on the same sequences have the same numbers, and one of them speaks for all in sums.
        self.counts = sequence is None or sequence.rank == 0

    @staticmethod
    def load(spec: ModelSpec, plan: ParallelPlan, *, trainable: bool) -> ShardedModel:
        """Build the model on the device of the open process group, with the weights of ``spec.path``.

        Raises ``DataError`` when the directory holds no model we know or its files do not fit together, and
        ``ConfigError`` when its attention heads cannot be dealt to the ranks of a sequence.
        """
        family = family_of(spec.path)
        _require_divisible_heads(spec, plan)
        module = build(spec, family, plan, device.rank_device(group_device_kind()), trainable=trainable)
        return ShardedModel(spec, family, module, sequence_group(plan))

    def score(self, micro_batch: MicroBatch, tally: RouterTally | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy of each guess, float32 [T], of a micro-batch on the device.

        Ranks of a sequence group must give the same micro-batch, and all get all of the result. The ``tally`` learns
        how the routers agree with the experts that the micro-batch names.
        """
        routes = self._routes(micro_batch, tally)
        streams = (micro_batch.token_ids, micro_batch.labels, micro_batch.position_ids)
        if self.sequence is None:
            return self.module(*streams, PackedLayout.of(micro_batch.lengths, self.device), routes)
        # The slices are of one length, so a short sequence that nobody looks at may have to follow the others.
        num_tokens = micro_batch.num_tokens
        num_padding = self.sequence.num_padding(num_tokens)
        lengths = (*micro_batch.lengths, num_padding) if num_padding else micro_batch.lengths
        packed = PackedLayout.of(lengths, self.device, self.sequence)
        ours = self.module(*(self.sequence.padded_share(stream) for stream in streams), packed, routes)
        logprobs, entropy = gather_tokens(self.sequence, *ours)
        return logprobs[:num_tokens], entropy[:num_tokens]

    def _routes(self, micro_batch: MicroBatch, tally: RouterTally | None) -> Routes | None:
        """The experts of our slice of the tokens, to be replayed or only to be compared."""
        if micro_batch.routed_experts is None or not (self.spec.router_replay or tally is not None):
            return None
        streams = (micro_batch.routed_experts, micro_batch.loss_mask)
        if self.sequence is not None:
            streams = tuple(self.sequence.padded_share(stream) for stream in streams)
        routes = Routes(*streams, replayed=self.spec.router_replay)
        if tally is not None:
            tally.add(routes)
        return routes

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of each label under the current weights, one float32 [T] on the host per micro-batch."""
        self.module.eval()
        scores: list[Tensor] = []
        for micro_batch in micro_batches:
            with advice_about_scoring(micro_batch):
                scores.append(self.score(micro_batch.to(self.device))[0])
        self._release_gathered_weights()
        return [score.cpu() for score in scores]  # only now: to read one is to wait for the device

    def base_logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The same under the weights that the adapter was put on: this model is then its own reference."""
        assert self.spec.lora is not None, "a model that trains all its weights keeps no others beside them"
        with adapter_off(self.module):
            return self.logprobs(micro_batches)

    def _release_gathered_weights(self) -> None:
        """Go back to shards: without a backward pass nothing else does, and an optimizer step would go unseen."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def training_flops_per_token(self) -> float:
        """Operations of forward and backward for one token: six for each weight that takes part in a product with it.

        A frozen weight has no gradient and takes four. Of the experts only those that a token is sent to count. The
        part of attention that grows with the length of the sequence is left out, as is usual for utilisation, and so is
        what gradient checkpointing computes twice.
        """
        described = self.module.model.config
        return sum(
            (6 if parameter.requires_grad else 4) * parameter.numel() * share_met(name, self.family, described)
            for name, parameter in self.module.named_parameters()
        )

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and full shape of every tensor that ``export_weights`` yields, in its order."""
        return [
            TensorMeta(stored_name, self.spec.compute_dtype, tuple(piece.shape))
            for name, parameter in self.module.named_parameters()
            if not is_adapter(name)
            for stored_name, piece in self.family.export(name, torch.empty(parameter.shape, device="meta"))
        ]

    @torch.no_grad()
    def export_weights(self, as_dtype: DtypeName | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, under its Hugging Face name, in the compute dtype or in another, one parameter at a time.

        An adapter is merged into what it adapts. A tied head is left out, as it is in checkpoints. Tensors may share
        memory with the model: copy what you keep.
        """
        yield from self._export(as_dtype, self.spec.lora)

    @torch.no_grad()
    def export_base(self, as_dtype: DtypeName | None = None) -> Iterator[tuple[str, Tensor]]:
        """The same without the adapter: the weights it was put on."""
        yield from self._export(as_dtype, None)

    def _export(self, as_dtype: DtypeName | None, lora: LoraSpec | None) -> Iterator[tuple[str, Tensor]]:
        dtype = DTYPES[as_dtype or self.spec.compute_dtype]
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            if is_adapter(name):
                continue
            factors = Factors.of(name)
            if lora is None or factors.a not in parameters:
                yield from self.family.export(name, whole(parameter.to(dtype)))
            else:
                a, b = whole(parameters[factors.a]), whole(parameters[factors.b])
                yield from self.family.export(name, merged(whole(parameter), a, b, lora).to(dtype))


def _require_divisible_heads(spec: ModelSpec, plan: ParallelPlan) -> None:
    if plan.sequence_parallel_size > 1:
        config = read_configuration("model", spec.path, trust_remote_code=spec.trust_remote_code)
        num_heads: int = config.num_attention_heads
        problem = sequence_parallel_problem(plan.sequence_parallel_size, plan.num_ranks, num_heads)
        if problem is not None:
            raise ConfigError(problem)
