"""The command line: words in any order, exit statuses, one message per mistake, and a light import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.cli import main
from chatlearn.config.read import read_config

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINT = str(ROOT / "chatlearn" / "entrypoint.py")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A good command: the quickstart's configuration with a small model directory and data of its own."""
    for name in ("NNODES", "WORLD_SIZE", "RANK", "NODE_RANK", "GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    model, data = tmp_path / "model", tmp_path / "train.json"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 4}))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    data.write_text("{}\n")
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
    ],
)
def test_a_wrong_command_is_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err


def test_a_missing_checkpoint_is_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"convert --hf_dir {tmp_path} --ckpt_dir {tmp_path}/none --save_dir {tmp_path}/out --iter 200 --groupgemm 0"
    assert main(words.split()) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("the run failed: ")


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
