"""From data files to prompts: the chat template, the tokens, and a filter on length that says what it dropped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from jinja2 import TemplateError

from chatlearn.data.rows import Row, content_hash, place, raise_problems, read_rows
from chatlearn.errors import DataError
from chatlearn.records import Prompt

Message = Mapping[str, str]

# A fast tokenizer works on a whole list at once; so many texts at a time keep its copies small.
BATCH_SIZE = 4096


class ChatTokenizer(Protocol):
    """What is asked of a tokenizer; every tokenizer of transformers can do it."""

    @property
    def name_or_path(self) -> str:
        """The model directory it was read from."""
        ...

    def apply_chat_template(
        self,
        conversation: list[list[dict[str, str]]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> object:
        """With ``tokenize=False``: one text per conversation."""
        ...

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, object]:
        """``input_ids`` holds one list of token ids per text."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """How messages become tokens; ``enable_thinking`` is a variable of the model's chat template."""

    tokenizer: ChatTokenizer
    enable_thinking: bool


@dataclass(frozen=True, eq=False)
class PromptSet:
    """The prompts of some files, in the order of the files, without those that are too long.

    ``longest`` is the length of the longest prompt that was read, dropped or not. ``content_hash`` changes when the
    files change, ``tokens_digest`` when the prompts do, as with another tokenizer or chat template.
    """

    prompts: tuple[Prompt, ...]
    num_dropped: int
    longest: int  # tokens
    limit: int  # tokens; every prompt is shorter
    content_hash: str
    tokens_digest: str

    @property
    def summary(self) -> str:
        """One line for the operator."""
        total = len(self.prompts) + self.num_dropped
        return (
            f"{len(self.prompts)} of {total} prompts; {self.num_dropped} dropped for {self.limit} tokens or more; "
            f"the longest has {self.longest}"
        )


@dataclass(frozen=True)
class _Question:
    """A row after its columns were checked: ``prompt`` is a text to encode as it is, or messages."""

    uid: str
    prompt: str | list[dict[str, str]]
    source: str
    answer: str


def data_files(paths: str) -> list[Path]:
    """The files that comma-separated ``paths`` name."""
    return [Path(path.strip()).expanduser() for path in paths.split(",") if path.strip()]


def read_prompts(paths: str, chat: ChatFormat, max_prompt_tokens_length: int) -> PromptSet:
    """Read comma-separated files and keep the prompts with fewer than ``max_prompt_tokens_length`` tokens.

    A prompt's uid is ``{file}_{row}``, both counted from zero, so it does not depend on the length filter.
    """
    files = data_files(paths)
    if not files:
        raise DataError("no data file was given; set runtime_args.data_path")
    questions = [question for index, path in enumerate(files) for question in _read_questions(index, path)]
    texts = _render(questions, chat)
    token_ids = _tokenise(questions, texts, chat.tokenizer)
    prompts = tuple(
        Prompt(question.uid, np.array(ids, dtype=np.int32), text, question.source, question.answer)
        for question, text, ids in zip(questions, texts, token_ids, strict=True)
        if len(ids) < max_prompt_tokens_length
    )
    longest = max(map(len, token_ids))
    if not prompts:
        raise DataError(
            f"{paths}: all {len(questions)} prompts have {max_prompt_tokens_length} tokens or more (the longest has "
            f"{longest}); raise models.policy.max_prompt_tokens_length"
        )
    num_dropped = len(questions) - len(prompts)
    return PromptSet(
        prompts, num_dropped, longest, max_prompt_tokens_length, content_hash(files), _tokens_digest(prompts)
    )


def _tokens_digest(prompts: Sequence[Prompt]) -> str:
    """Equal as long as the same prompts, by uid, have the same tokens."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.uid} {len(prompt.token_ids)} ".encode())
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()[:32]


def _read_questions(file_index: int, path: Path) -> list[_Question]:
    questions: list[_Question] = []
    problems: list[str] = []
    for index, row in enumerate(read_rows(path)):
        try:
            questions.append(_to_question(f"{file_index}_{index}", row))
        except DataError as error:
            problems.append(f"{place(path, index)}: {error}")
    raise_problems(problems)
    return questions


def _to_question(uid: str, row: Row) -> _Question:
    missing = {"data_source", "prompt", "reward_model"} - row.keys()
    if missing:
        raise DataError(
            f"no column {', '.join(sorted(missing))}; found {', '.join(sorted(row))}; "
            "a raw data set is made ready with 'chatlearn prepare'"
        )
    source, reward_model = row["data_source"], row["reward_model"]
    if not isinstance(source, str):
        raise DataError(f"data_source is {source!r}, not text")
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise DataError("reward_model has no ground_truth")
    answer: object = cast("Mapping[str, object]", reward_model)["ground_truth"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"reward_model.ground_truth is {answer!r}, not text")
    return _Question(uid, _to_prompt(row["prompt"]), source, str(answer))


def _to_prompt(value: object) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise DataError("prompt is neither text nor a list of messages")
    messages: list[dict[str, str]] = []
    for message in cast("list[object]", value):
        fields = cast("Mapping[str, object]", message) if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"a message of prompt has no role and content of text: {message!r:.80}")
        messages.append({"role": role, "content": content})
    return messages


def _render(questions: Sequence[_Question], chat: ChatFormat) -> list[str]:
    conversations = [question.prompt for question in questions if not isinstance(question.prompt, str)]
    rendered = iter(_render_conversations(conversations, chat) if conversations else ())
    return [question.prompt if isinstance(question.prompt, str) else next(rendered) for question in questions]


def _render_conversations(conversations: list[list[dict[str, str]]], chat: ChatFormat) -> list[str]:
    try:
        rendered = chat.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True, enable_thinking=chat.enable_thinking
        )
    except (ValueError, TypeError, TemplateError) as error:  # there is none, it has a mistake, or it refuses a message
        reason = re.split("[.!] ", " ".join(str(error).split()))[0]  # transformers goes on with advice about itself
        raise DataError(
            f"models.policy_trainer.load: the chat template in {chat.tokenizer.name_or_path} (chat_template.jinja, or "
            f"chat_template in tokenizer_config.json) cannot be used ({reason}); copy the model again, use one that "
            "was trained to chat, or give prompts as text"
        ) from error
    return cast("list[str]", rendered)  # what tokenize=False returns for a list of conversations


def _tokenise(questions: Sequence[_Question], texts: Sequence[str], tokenizer: ChatTokenizer) -> list[list[int]]:
    token_ids: list[list[int]] = [[] for _ in texts]
    # The template has written the special tokens; a plain text gets those that the tokenizer adds by itself.
    for is_plain in (False, True):
        chosen = [index for index, question in enumerate(questions) if isinstance(question.prompt, str) == is_plain]
        for start in range(0, len(chosen), BATCH_SIZE):
            batch = chosen[start : start + BATCH_SIZE]
            encoded = tokenizer([texts[index] for index in batch], add_special_tokens=is_plain)
            for index, ids in zip(batch, cast("list[list[int]]", encoded["input_ids"]), strict=True):
                token_ids[index] = ids
    return token_ids
