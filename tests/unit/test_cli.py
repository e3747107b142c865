"""The command line: words in any order, exit statuses, one message per mistake, and a light import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chatlearn.beginning import FRESH
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest
from chatlearn.checkpoint.run_lock import hold_directory
from chatlearn.checkpoint.run_state import save_run_state
from chatlearn.cli import main
from chatlearn.config.environment import QUIET
from chatlearn.config.read import read_config

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINT = str(ROOT / "chatlearn" / "entrypoint.py")
RECORD = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A good command: the quickstart's configuration with a small model and data of its own."""
    for name in ("NNODES", "WORLD_SIZE", "RANK", "NODE_RANK", "GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    model, data = tmp_path / "model", tmp_path / "train.json"
    shutil.copytree(ROOT / "embedded" / "tiny_qwen3", model)
    data.write_text(json.dumps(RECORD) + "\n")
    return [
        "grpo",
        "-c",
        str(ROOT / "template" / "quickstart.yaml"),
        f"runtime_args.output_dir={tmp_path / 'output'}",
        f"models.policy_trainer.load={model}",
        f"runtime_args.data_path={data}",
        f"runtime_args.eval_data_path={data}",
    ]


def test_a_dry_run_prints_a_configuration_that_can_be_used_again(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run", "models.policy.max_new_tokens=64", "runtime_args.debug=True"]) == 0
    printed = capsys.readouterr()
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(printed.out)
    assert read_config(resolved).models.policy.max_response_tokens_length == 64
    assert "32 prompts, 256 answers" in printed.err
    assert "(all there will be): 3.8 MB; free" in " ".join(printed.err.replace("│", " ").split())
    assert "keys without effect here (see docs/config.md): runtime_args.debug" in printed.err
    assert not (tmp_path / "output").exists()


def test_options_and_overrides_come_in_any_order(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, option, file, *overrides = words
    plain = [command, option, file, *overrides, "--dry-run"]
    mixed = [command, overrides[0], "--dry-run", *overrides[1:], "--config-file", file]
    outputs: list[str] = []
    for order in (plain, mixed):
        assert main(order) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.policy.tempreature=1", "tempreature; did you mean models.policy.temperature?"),
        ("runtime_args.num_episode=abc", "runtime_args.num_episode=abc must be a whole number, not text"),
        ("models.policy.tensor_model_parallel_size=3", "=3 must divide num_gpu=1; use 1"),
        ("models.policy_trainer.load=/nowhere", "models.policy_trainer.load=/nowhere is not a directory"),
        ("runtime_args.data_path=/dev/null.json", "runtime_args.data_path: /dev/null.json does not exist"),
        ("runtime_args.advantage=gropo", "runtime_args.advantage=gropo is unknown; did you mean grpo?"),
        ("models.policy_trainer.loss=gsop", "models.policy_trainer.loss=gsop is unknown; did you mean gspo?"),
        ("runtime_args.rollout_backend=vlm", "runtime_args.rollout_backend=vlm is unknown; did you mean vllm?"),
        ("models.policy_trainer.groupgemm=True", "groupgemm=True is for mixtures of experts"),
        ("models.reward.function=boxd_math", "models.reward.function=boxd_math is unknown; did you mean boxed_math?"),
        ("models.reward.function=nonsense:foo", "models.reward.function=nonsense:foo: cannot import nonsense"),
        ("models.reward.function=math:fsumm", "math:fsumm: math has no fsumm; did you mean fsum?"),
        ("models.reward.function=math:pi", "models.reward.function=math:pi is float, not a function"),
        ("runtime_args.advantage=math:pi", "runtime_args.advantage=math:pi is float, not a function"),
        ("models.policy.max_prompt_tokens_length=3", "raise models.policy.max_prompt_tokens_length"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main([*words, "--dry-run", override]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("wrong configuration or command: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message with which a dry run refuses; nothing is printed and nothing is written."""
    assert main([*words, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (said,) = printed.err.splitlines()
    return said


def test_layers_to_adapt_are_looked_for_before_the_start(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ["models.policy_trainer.lora.rank=2", "models.policy_trainer.lora.target_modules=[q_proj,lm_head]"]
    said = refused([*words, *adapter], capsys)
    assert "models.policy_trainer.lora.target_modules: " in said
    assert "no linear layer called lm_head; they have down_proj" in said


def _cut(name: str) -> Callable[[Path], None]:
    """A download that stopped half way."""

    def act(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return act


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        (model / name).write_bytes(content)

    return act


def _remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _configure(**facts: object) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))

    return act


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (_cut("model.safetensors"), "model.safetensors", "has 538308 bytes, and its header speaks of 1076616"),
        (_write("model.safetensors", b"not a header at all"), "model.safetensors", "has no safetensors header"),
        (_write("model.safetensors", b"\2\0\0\0\0\0\0\0[]"), "model.safetensors", "has no safetensors header"),
        (_cut("config.json"), "config.json", "cannot be read as a JSON object"),
        (_configure(model_type="qwen99"), "config.json", "no model that transformers can build (ValueError: "),
        (_configure(hidden_size="wide"), "config.json", "no model that transformers can build (Strict"),
        (_cut("tokenizer.json"), "tokenizer.json", "cannot be read as part of a tokenizer"),
        (_write("tokenizer.json", b"{}"), "tokenizer.json", "cannot be read as part of a tokenizer"),
        (_write("tokenizer_config.json", b"[]"), "tokenizer_config.json", "cannot be read as part of a tokenizer"),
        (
            _write("tokenizer.json", b'{"model": {"type": "BPE"}, "added_tokens": [7]}'),
            "tokenizer.json",
            "cannot be read (AttributeError",
        ),
        (_remove("chat_template.jinja"), "chat_template.jinja", "no template argument was passed); copy"),
        (_write("chat_template.jinja", b"{% for"), "chat_template.jinja", "cannot be used ("),
        (_write("chat_template.jinja", b"{{ raise_exception('no') }}"), "chat_template.jinja", "cannot be used (no)"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_one_message_with_key_and_file(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    file: str,
    message: str,
) -> None:
    damage(tmp_path / "model")
    said = refused(words, capsys)
    assert said.startswith("wrong configuration or command: models.policy_trainer.load: ")
    assert str(tmp_path / "model") in said
    assert file in said
    assert message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("garbage\n", "train.json row 1: not valid JSON"),
        ("{}\n", "train.json row 1: no column data_source, prompt, reward_model"),
        (json.dumps({**RECORD, "data_source": "mine"}), "no reward function for data source 'mine'; set models.reward"),
    ],
)
def test_data_that_cannot_be_used_is_found_by_a_dry_run_and_before_a_run_writes(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "train.json").write_text(content)
    assert message in refused(words, capsys)
    written = tmp_path / "output" / "metrics.jsonl"
    written.parent.mkdir()
    written.write_text("earlier\n")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    found = {path.name: path.read_text() for path in written.parent.iterdir()}
    assert found == {"metrics.jsonl": "earlier\n", "run.lock": ""}


def test_a_directory_that_another_run_writes_into_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    with hold_directory(output, print):
        assert "is writing there (run.lock)" in refused(words, capsys)
        assert main(words) == 2
        assert f"the run with pid {os.getpid()} on host" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["run.lock"]


def test_a_resume_that_is_switched_off_is_found_by_a_dry_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "output" / "save_model" / "policy_trainer"
    save_run_state(begin(root, 7), replace(FRESH, episode=7, train_iteration=7))
    publish(root, Manifest(7, 7, "base", "Qwen3ForCausalLM", groupgemm=False, num_ranks=1, files=()))
    assert main([*words, "--dry-run"]) == 0
    capsys.readouterr()
    said = refused([*words, "runtime_args.enable_resume_training=False"], capsys)
    assert "holds the checkpoint 7 of an earlier run" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(:", "own_module.py:1 (SyntaxError: invalid syntax"),
        ("\nf = undefined", "own_module.py:2 (NameError: name 'undefined' is not defined)"),
        ("open('/nowhere')", "own_module.py:1 (FileNotFoundError: "),
        ("import absent_package", "cannot import own_module (No module named 'absent_package')"),
        ("raise SystemExit(0)", "its module ends the process when it is imported (status 0)"),
    ],
)
@pytest.mark.parametrize("key", ["models.reward.function", "runtime_args.advantage"])
def test_a_module_of_ones_own_that_cannot_be_imported_is_one_message(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    body: str,
    message: str,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text(body)
    said = refused([*words, f"{key}=own_module:f"], capsys)
    assert f"{key}=own_module:f" in said
    assert message in said


def test_nothing_asks_a_hub_even_where_a_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    assert main(["--help"]) == 0
    assert {name: os.environ.get(name) for name in QUIET} == QUIET


def test_an_empty_data_file_and_a_strange_model_are_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("")
    assert main([*words, f"runtime_args.data_path={tmp_path / 'empty.json'}"]) == 2
    assert "empty.json is empty; prepare it again" in capsys.readouterr().err
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": ["OtherModel"]}))
    assert main(words) == 2
    assert "architecture OtherModel is not supported" in capsys.readouterr().err


def test_several_mistakes_are_listed_below_a_heading(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "models.policy_trainer.load=/nowhere", "runtime_args.data_path=/nowhere.json"]) == 2
    heading, *lines = capsys.readouterr().err.splitlines()
    assert heading == "wrong configuration or command:"
    assert [line.split(":")[0].split("=")[0].strip() for line in lines] == [
        "models.policy_trainer.load",
        "runtime_args.data_path",
    ]


def test_only_node_0_starts_the_run(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*words, "--dry-run"]) == 2
    assert "the command runs on node 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["grpo"],
        ["grpoo", "-c", "x"],
        ["grpo", "--dryrun"],
        ["convert", "--iter", "1"],
        ["convert", "--groupgemm", "2"],
        ["prepare", "gms8k"],
        ["plan"],
        ["grpo", "-c", "/nowhere.yaml"],
        ["resume-check", "-c", str(ROOT / "template" / "quickstart.yaml")],
        ["resume-check", "-c", "/nowhere.yaml", "--episodes", "3", "--cut", "0"],
    ],
)
def test_a_wrong_command_is_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err


def test_a_missing_checkpoint_is_a_wrong_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"convert --hf_dir {tmp_path} --ckpt_dir {tmp_path}/none --save_dir {tmp_path}/out --iter 200 --groupgemm 0"
    assert main(words.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("wrong configuration or command: ")


def test_prepare_passes_its_arguments_on(tmp_path: Path) -> None:
    assert main(["prepare", "arithmetic", "--local_dir", str(tmp_path)]) == 0
    assert (tmp_path / "train.json").stat().st_size > 0
    assert (tmp_path / "test.json").stat().st_size > 0


def test_an_interrupt_is_status_130(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chatlearn.cli.check", interrupted)
    assert main(words) == 130


@pytest.mark.parametrize("launcher", [[ENTRYPOINT], ["-m", "chatlearn"], ["-m", "chatlearn.entrypoint"]])
def test_every_way_to_launch_helps(launcher: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, "grpo", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--config-file" in done.stdout


def test_the_documented_converter_command_helps(tmp_path: Path) -> None:
    shim = str(ROOT / "chatlearn" / "offline_ckpt_converter.py")
    done = subprocess.run([sys.executable, shim, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for argument in ("--hf_dir", "--ckpt_dir", "--save_dir", "--iter", "--groupgemm"):
        assert argument in done.stdout


def test_a_mistake_ends_the_process_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ENTRYPOINT, "grpo", "runtime_args.sed=1", "-c", str(ROOT / "template/grpo_fsdp.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr == "wrong configuration or command: unknown key runtime_args.sed; did you mean runtime_args.seed?\n"
    )


def test_the_package_folder_is_not_on_the_path_of_the_documented_command() -> None:
    script = (
        f"import runpy, sys; sys.argv=[{ENTRYPOINT!r}, '--help']; sys.path.insert(0, {str(ROOT / 'chatlearn')!r})\n"
    )
    script += f"try: runpy.run_path({ENTRYPOINT!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    script += f"assert {str(ROOT / 'chatlearn')!r} not in sys.path, sys.path\nassert sys.path[0] == {str(ROOT)!r}\n"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("module", ["chatlearn.cli", "chatlearn.config.read", "chatlearn.config.layout"])
def test_configuration_loads_no_engine(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'datasets', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
