"""Kernels that only a CUDA device has, against plain torch on the same device, and the memory of the head."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from chatlearn.algorithm.logprob import token_logprobs_and_entropy
from chatlearn.models.attention import PackedLayout, packed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (1, 200, 37, 512, 64)
HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 128


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def relative_difference(left: Tensor, right: Tensor) -> float:
    return ((left.float() - right.float()).norm() / right.float().norm()).item()


def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention within each sequence, in float32; [1, T, heads, head_dim]."""
    offsets = PackedLayout.of(LENGTHS, torch.device("cuda")).offsets.tolist()
    parts = [
        scaled_dot_product_attention(
            query[:, :, start:stop].float(),
            key[:, :, start:stop].float(),
            value[:, :, start:stop].float(),
            is_causal=True,
            enable_gqa=True,
        )
        for start, stop in pairwise(offsets)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What the trainer computes with, [1, T, heads, head_dim]."""
    layout = PackedLayout.of(LENGTHS, torch.device("cuda"))
    return packed_attention(torch.nn.Module(), query, key, value, None, scaling=HEAD_SIZE**-0.5, packed=layout)[0]


def random_streams() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a row of sequences."""
    num_tokens = sum(LENGTHS)
    query = normal(1, HEADS, num_tokens, HEAD_SIZE)
    return query, normal(1, KEY_HEADS, num_tokens, HEAD_SIZE), normal(1, KEY_HEADS, num_tokens, HEAD_SIZE)


def test_a_sequence_in_the_packed_kernel_sees_what_it_sees_alone() -> None:
    torch.manual_seed(0)
    query, key, value = (stream.requires_grad_() for stream in random_streams())
    pull = normal(1, sum(LENGTHS), HEADS, HEAD_SIZE)
    attended, expected = packed(query, key, value), alone(query, key, value)
    assert relative_difference(attended, expected) < 0.01
    gradients = torch.autograd.grad(attended, (query, key, value), pull)
    wanted = torch.autograd.grad(expected, (query, key, value), pull.float())
    for gradient, right in zip(gradients, wanted, strict=True):
        assert relative_difference(gradient, right) < 0.02


def test_a_neighbour_leaves_no_trace_in_the_packed_kernel() -> None:
    torch.manual_seed(0)
    start = sum(LENGTHS[:3])
    streams, others = random_streams(), random_streams()
    query, key, value = (
        torch.cat([other[:, :, :start], stream[:, :, start:]], dim=2)
        for stream, other in zip(streams, others, strict=True)
    )
    first, second = packed(*streams), packed(query, key, value)
    assert torch.equal(first[:, start:], second[:, start:])
    assert not torch.equal(first[:, :start], second[:, :start])


def mixture(implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model with 16 experts of which a token is sent to 4, the same weights at every call."""
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=implementation)
    return model.model.layers[0].mlp.to("cuda", dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_grouped_experts_compute_what_eager_ones_do(dtype: torch.dtype, tolerance: float) -> None:
    """The wide tolerance for float32 leaves room for TF32 products."""
    hidden, pull = normal(1, 300, 256, dtype=dtype), normal(1, 300, 256, dtype=dtype)
    outcomes = []
    for implementation in ("grouped_mm", "eager"):
        layer = mixture(implementation, dtype)
        given = hidden.clone().requires_grad_()
        answer = layer(given)
        answer.backward(pull)
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        outcomes.append({"answer": answer, "hidden": given.grad} | gradients)
    grouped, eager = outcomes
    assert len(grouped) > 3
    for name, wanted in eager.items():
        assert wanted is not None
        assert relative_difference(grouped[name], wanted) < tolerance, name


def test_the_head_in_half_precision_is_close_to_single() -> None:
    """Rounded logits would be off by 0.01 to 0.06 nats; rounding only what goes in costs less than 0.02 on average."""
    torch.manual_seed(0)
    hidden, weight = normal(1000, 512, dtype=torch.float32), normal(20_000, 512, dtype=torch.float32) * 0.05
    labels = torch.randint(0, 20_000, (1000,), device="cuda")
    half = token_logprobs_and_entropy(hidden.bfloat16(), weight.bfloat16(), labels, 0.8, chunk_rows=300)
    single = (hidden.double() @ weight.double().T / 0.8).log_softmax(-1)
    wanted = (single.gather(-1, labels[:, None]).squeeze(-1), -(single.exp() * single).sum(-1))
    for number, value in zip(half, wanted, strict=True):
        assert number.dtype == torch.float32
        assert (number - value).abs().mean() < 0.02
    rounded = (hidden.bfloat16().double() @ weight.bfloat16().double().T / 0.8).log_softmax(-1)
    assert (half[0] - rounded.gather(-1, labels[:, None]).squeeze(-1)).abs().max() < 1e-3


def test_the_head_never_holds_the_logits_of_all_tokens() -> None:
    """Of 16,384 tokens they would be 10 GB in float32, and as much again for each thing computed from them."""
    num_tokens, vocabulary, width = 16_384, 151_936, 256
    hidden, weight = normal(num_tokens, width).requires_grad_(), normal(vocabulary, width).requires_grad_()
    labels = torch.randint(0, vocabulary, (num_tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.cuda.max_memory_allocated() - before < num_tokens * vocabulary * 4 / 2
