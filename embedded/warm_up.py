"""Trains an embedded model from nothing on the lessons, the same way to the bit on the same kind of machine."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from embedded.lessons import Lesson, draw_lesson
from embedded.vocabulary import END_OF_TURN, PADDING, token_id

MAX_LENGTH = 4096  # tokens; its own lessons stay below 100, longer data can be tried on it
FULL_STEPS = 800
LESSONS_PER_STEP = 64
WARM_UP_STEPS = 40
PEAK_LR = 4e-3  # about the highest that trains smoothly at this size
NOT_TRAINED = -100  # the label that cross_entropy leaves out

ReportStep = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class LessonBatch:
    """Lessons as padded rows; labels are set on the answers alone, which end with the end of the turn."""

    token_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]


def dense_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """0.27 M parameters with tied embeddings, as the small Qwen3 models have; vLLM on the CPU needs head_dim >= 32."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=token_id(tokenizer, END_OF_TURN),
        pad_token_id=token_id(tokenizer, PADDING),
        dtype="float32",
    )


def moe_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """0.5 M parameters in 8 experts of which a token uses 2, with a head of its own, as Qwen3's MoE models have."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # pyright: ignore[reportCallIssue]  # the model reads it, though the configuration declares it not
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        eos_token_id=token_id(tokenizer, END_OF_TURN),
        pad_token_id=token_id(tokenizer, PADDING),
        dtype="float32",
    )


def new_model(config: Qwen3Config | Qwen3MoeConfig, seed: int) -> PreTrainedModel:
    """A model with random weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
    )
    return model


def warm_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int, report: ReportStep
) -> None:
    """Train for ``num_steps`` of the ``FULL_STEPS``; ``report`` hears the loss after each step, counted from one.

    The learning rate follows the full course, so a short training is the beginning of a long one, step by step.
    """
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        batch = to_batch([draw_lesson(generator) for _ in range(LESSONS_PER_STEP)], tokenizer)
        loss = _answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss.item())
    model.eval()


def to_batch(lessons: Sequence[Lesson], tokenizer: PreTrainedTokenizerFast) -> LessonBatch:
    """Lay the lessons out as chats without thinking; padding goes to the right, where no token looks at it."""
    end, padding = token_id(tokenizer, END_OF_TURN), token_id(tokenizer, PADDING)
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for lesson in lessons:
        prompt_ids = tokenizer.encode(chat_prompt(lesson.question, tokenizer))
        answer_ids = [*tokenizer.encode(lesson.answer), end]
        rows.append([*prompt_ids, *answer_ids])
        labels.append([NOT_TRAINED] * len(prompt_ids) + answer_ids)
    return LessonBatch(_padded(rows, padding), _padded(labels, NOT_TRAINED))


def chat_prompt(question: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text before an answer: one user's turn, and the reply begun behind an empty thought."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert isinstance(text, str)
    return text


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over names and bytes of all weights, a tied head once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _answer_loss(model: PreTrainedModel, batch: LessonBatch) -> Tensor:
    logits = model(input_ids=batch.token_ids, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=NOT_TRAINED)


def _learning_rate(step: int) -> float:
    """Rises in a line for ``WARM_UP_STEPS``, then falls along half a cosine to a hundredth of the peak."""
    if step <= WARM_UP_STEPS:
        return PEAK_LR * step / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / (FULL_STEPS - WARM_UP_STEPS)
    return PEAK_LR * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))
