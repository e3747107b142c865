"""Builds the tokenizer of the embedded models: byte-level, single digits, the special tokens and turns of Qwen3."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embedded.lessons import draw_lesson

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN)
THINKING_TOKENS = ("<think>", "</think>")  # Qwen3 does not call them special: they stay in decoded text

# Contractions, words with the sign or space before them, single digits, runs of signs, line ends, spaces.
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Every word of the questions and lessons becomes one token; pairs rarer than this in the lessons stay bytes.
NUM_LESSONS = 4_000
MIN_PAIR_COUNT = 200

# Turns as Qwen3 writes them; without thinking the reply begins behind an empty thought. Thoughts of past turns go.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def build_tokenizer(seed: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learn merges from lessons; ``max_length`` is the longest sequence of the model, in tokens."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.NFC()
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000,  # never reached: the pair count ends the learning
        min_frequency=MIN_PAIR_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(_texts(seed), trainer)
    pieces.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    pieces.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one of the tokens above."""
    return tokenizer.get_vocab()[token]


def _texts(seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    for _ in range(NUM_LESSONS):
        lesson = draw_lesson(generator)
        yield f"user\n{lesson.question}"
        yield f"assistant\n\n{lesson.answer}"
