"""A model that is split over the ranks of the open process group: it scores batches and exports its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from chatlearn import device
from chatlearn.models.attention import PackedLayout
from chatlearn.models.family import family_of
from chatlearn.models.naming import EMBEDDING
from chatlearn.trainer.build import DTYPES, ModelSpec, build, is_small
from chatlearn.trainer.parallel import group_device_kind
from chatlearn.weights.wire import TensorMeta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chatlearn.batch.pack import MicroBatch
    from chatlearn.device import DeviceKind
    from chatlearn.models.naming import ModelFamily
    from chatlearn.trainer.parallel import ParallelPlan
    from chatlearn.trainer.token_scorer import TokenScorer


class ShardedModel:
    """Every public method is collective: all ranks call it, in the same order, with equally many micro-batches."""

    def __init__(self, spec: ModelSpec, family: ModelFamily, module: TokenScorer, device_kind: DeviceKind) -> None:
        self.spec = spec
        self.family = family
        self.module = module
        self.device_kind: DeviceKind = device_kind
        self.device = device.rank_device(device_kind)
        self.stays_whole = is_small(module, spec)

    @staticmethod
    def load(spec: ModelSpec, plan: ParallelPlan, *, trainable: bool) -> ShardedModel:
        """Build the model on the device of the open process group, with the weights of ``spec.path``.

        Raises ``DataError`` when the directory holds no model we know or its files do not fit together.
        """
        plan.require_supported()
        family = family_of(spec.path)
        device_kind = group_device_kind()
        module = build(spec, family, plan, device.rank_device(device_kind), trainable=trainable)
        return ShardedModel(spec, family, module, device_kind)

    def score(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy of each guess, float32 [T], of a micro-batch on the device."""
        packed = PackedLayout.of(micro_batch.lengths, self.device)
        return self.module(micro_batch.token_ids, micro_batch.labels, micro_batch.position_ids, packed)

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of each label under the current weights, one float32 [T] on the host per micro-batch."""
        self.module.eval()
        scores = [self.score(micro_batch.to(self.device))[0].cpu() for micro_batch in micro_batches]
        self._release_gathered_weights()
        return scores

    def _release_gathered_weights(self) -> None:
        """Go back to shards: without a backward pass nothing else does, and an optimizer step would go unseen."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def training_flops_per_token(self) -> float:
        """Operations of forward and backward for one token: six for each weight that takes part in a product with it.

        Of the experts only those that a token is sent to count. The part of attention that grows with the length of
        the sequence is left out, as is usual for utilisation, and so is what gradient checkpointing computes twice.
        """
        return 6 * sum(parameter.numel() * self._share_used(name) for name, parameter in self.module.named_parameters())

    def _share_used(self, name: str) -> float:
        """The share of a parameter that a token meets: all, none of a looked-up embedding, or its experts' part."""
        if name == EMBEDDING and self.module.lm_head is not None:
            return 0.0
        if self.family.experts is not None and name.endswith((self.family.experts.gate_up, self.family.experts.down)):
            config = self.module.model.config
            return config.num_experts_per_tok / config.num_experts
        return 1.0

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and full shape of every tensor that ``export_weights`` yields, in its order."""
        return [
            TensorMeta(stored_name, self.spec.compute_dtype, tuple(piece.shape))
            for name, parameter in self.module.named_parameters()
            for stored_name, piece in self.family.export(name, torch.empty(parameter.shape, device="meta"))
        ]

    @torch.no_grad()
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, under its Hugging Face name, in the compute dtype, one parameter in memory at a time.

        A tied head is left out, as it is in checkpoints. Tensors may share memory with the model: copy what you keep.
        """
        dtype = DTYPES[self.spec.compute_dtype]
        for name, parameter in self.module.named_parameters():
            shard = parameter.to(dtype)
            assert isinstance(shard, DTensor), f"{name} is not sharded"
            yield from self.family.export(name, shard.full_tensor())
