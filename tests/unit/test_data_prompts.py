"""From data files to prompts: template, tokens, filter, and what a faulty file says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from chatlearn.data.prompts import ChatFormat, read_prompts
from chatlearn.data.rows import content_hash
from chatlearn.errors import DataError

TEMPLATE = (
    "<s>{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer that adds <s> to every plain text, and whose template writes <s> itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: index for index, letter in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=TEMPLATE)


TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER, enable_thinking=False)


def record(prompt: object, answer: object = "2") -> dict[str, object]:
    return {"data_source": "openai/gsm8k", "prompt": prompt, "reward_model": {"style": "rule", "ground_truth": answer}}


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("thinking", "tail"), [(False, "a:<think></think>"), (True, "a:")])
def test_messages_go_through_the_template_with_one_start_token(tmp_path: Path, thinking: bool, tail: str) -> None:
    path = write_lines(tmp_path / "train.json", [record(user("1+1?"))])
    (prompt,) = read_prompts(str(path), ChatFormat(TOKENIZER, thinking), 1000).prompts
    assert prompt.text == "<s>user:1+1?;" + tail
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist().count(0) == 1
    assert TOKENIZER.decode(prompt.token_ids.tolist()) == prompt.text
    assert (prompt.uid, prompt.source, prompt.answer) == ("0_0", "openai/gsm8k", "2")


def test_a_plain_text_is_encoded_as_it_is(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [record("1+1?"), record(user("1+1?"), answer=2)])
    plain, messages = read_prompts(str(path), CHAT, 1000).prompts
    assert plain.text == "1+1?"
    assert plain.token_ids.tolist() == TOKENIZER("1+1?")["input_ids"]
    assert plain.token_ids[0] == 0
    assert messages.answer == "2"


def test_only_messages_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    chat = ChatFormat(tokenizer, enable_thinking=False)
    texts = write_lines(tmp_path / "texts.json", [record("1+1?")])
    assert [prompt.text for prompt in read_prompts(str(texts), chat, 1000).prompts] == ["1+1?"]
    messages = write_lines(tmp_path / "messages.json", [record("1+1?"), record(user("1+1?"))])
    with pytest.raises(DataError, match=r"no template argument was passed\); .* give prompts as text"):
        read_prompts(str(messages), chat, 1000)


def test_the_filter_is_strict_and_tells_what_it_dropped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.json", [record("x" * length) for length in (9, 3, 8, 4)])
    found = read_prompts(str(path), CHAT, 9)  # a text of 8 letters has 9 tokens with <s>
    assert [prompt.uid for prompt in found.prompts] == ["0_1", "0_3"]
    assert (found.num_dropped, found.longest, found.limit) == (2, 10, 9)
    assert found.summary == "2 of 4 prompts; 2 dropped for 9 tokens or more; the longest has 10"


def test_nothing_left_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.json", [record("long enough")])
    with pytest.raises(
        DataError, match=r"all 1 prompts have 3 tokens or more .*raise models\.policy\.max_prompt_tokens_length"
    ):
        read_prompts(str(path), CHAT, 3)


def test_files_follow_one_another_and_all_formats_agree(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [record(user("first")), record(user("second \u2028 line"))]
    lines = write_lines(tmp_path / "lines.jsonl", rows)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, indent=1))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    found = read_prompts(f"{lines}, {array},{table}", CHAT, 1000)
    assert [prompt.uid for prompt in found.prompts] == ["0_0", "0_1", "1_0", "1_1", "2_0", "2_1"]
    assert len({prompt.text for prompt in found.prompts}) == 2


def test_the_hash_tells_whether_the_data_changed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.json", [record("one")])
    before = content_hash([path])
    assert read_prompts(str(path), CHAT, 100).content_hash == before
    write_lines(path, [record("two")])
    assert content_hash([path]) != before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([record("fine"), {"prompt": "x"}], r"row 2: no column data_source, reward_model; found prompt"),
        ([record("fine"), record([{"role": "user"}])], r"row 2: a message of prompt has no role and content"),
        ([record("")], r"row 1: prompt is neither text nor a list"),
        ([record([])], r"row 1: prompt is neither text nor a list"),
        ([record("x", answer=["2"])], r"row 1: reward_model.ground_truth is \['2'\], not text"),
        ([{**record("x"), "reward_model": {}}], r"row 1: reward_model has no ground_truth"),
        ([{**record("x"), "data_source": 1}], r"row 1: data_source is 1, not text"),
        ([{"problem": "raw"}], r"chatlearn prepare"),
        ([], r"train\.json is empty"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write_lines(tmp_path / "train.json", rows)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(str(path), CHAT, 100)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("data.csv", r"data\.csv: files of this kind"),
        ("absent.json", r"absent\.json: there is no"),
        (" , ", "data_path"),
    ],
)
def test_a_file_that_cannot_be_data_is_named(paths: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(paths, CHAT, 100)
