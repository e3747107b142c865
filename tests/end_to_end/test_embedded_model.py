"""The embedded models: a rebuild gives what is shipped, and that leaves GRPO room to improve."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chatlearn.data.data_preprocess.records_file import INSTRUCTION
from embedded.build import LOSS_TOLERANCE, MILESTONES, BuildRecord, Milestone, differences, read_record
from embedded.warm_up import chat_prompt, weights_digest

ROOT = Path(__file__).resolve().parents[2]
DENSE = ROOT / "embedded" / "tiny_qwen3"
MOE = ROOT / "embedded" / "tiny_qwen3_moe"
BOTH = pytest.mark.parametrize("shipped", [DENSE, MOE], ids=["dense", "moe"])


@BOTH
def test_the_first_steps_of_a_rebuild_agree_with_the_shipped_model(shipped: Path, tmp_path: Path) -> None:
    command = [sys.executable, "embedded/build.py", "--output", str(tmp_path), "--steps", str(MILESTONES[0])]
    command += ["--compare", str(shipped), *(["--moe"] if shipped == MOE else [])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "agrees with" in run.stdout
    assert read_record(tmp_path).milestones[-1].step == MILESTONES[0]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(shipped).get_vocab()


@BOTH
def test_the_shipped_weights_are_those_of_the_record(shipped: Path) -> None:
    record = read_record(shipped)
    model = AutoModelForCausalLM.from_pretrained(shipped)
    assert weights_digest(model) == record.milestones[-1].weights_sha256
    assert record.milestones[-1].step == MILESTONES[-1]
    assert model.config.tie_word_embeddings == (shipped == DENSE)
    assert model.num_parameters() == record.num_parameters


@pytest.mark.long
@BOTH
def test_the_shipped_model_solves_about_a_third_and_nearly_all_in_eight_tries(shipped: Path) -> None:
    command = [sys.executable, "embedded/measure.py", "--model", str(shipped), "--prompts", "60"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rates = json.loads(run.stdout)
    assert 0.28 < rates["pass_at_1"] < 0.48
    assert rates["pass_at_k"] > 0.85
    assert rates["truncated"] < 0.02


def test_a_rebuild_that_differs_is_told() -> None:
    shipped = BuildRecord(0, 40, 1, 1.0, {"torch": "1"}, (Milestone(40, 2.0, "a"),))
    other_weights = dataclasses.replace(shipped, milestones=(Milestone(40, 2.0, "b"),))
    elsewhere = dataclasses.replace(other_weights, machine={"torch": "2"})
    worse = dataclasses.replace(elsewhere, milestones=(Milestone(40, 2.0 * (1 + 2 * LOSS_TOLERANCE), "b"),))
    assert differences(shipped, shipped) == []
    assert len(differences(other_weights, shipped)) == 1
    assert differences(elsewhere, shipped) == []
    assert len(differences(worse, shipped)) == 1


@BOTH
def test_prompts_follow_qwen3_and_skip_the_thought(shipped: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    assert chat_prompt("hi", tokenizer) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nho"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nho<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer.encode(INSTRUCTION)) <= 16
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|><think></think>")) == 5


@pytest.fixture(scope="module")
def dense_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DENSE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer_and_digits_stay_single(
    dense_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    normal = unicodedata.normalize("NFC", text)
    ids = dense_tokenizer.encode(text)
    assert dense_tokenizer.decode(ids) == normal
    assert len(dense_tokenizer.encode("1234567890")) == 10
