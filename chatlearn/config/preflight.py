"""What can be checked on disk before anything starts; every function returns all problems it finds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final, cast

from chatlearn.config.checks import choices
from chatlearn.config.environment import Environment
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.weight_files import weight_file_problem

DATA_SUFFIXES: Final = (".json", ".jsonl", ".parquet")
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = f"{WEIGHTS}.index.json"
_TOKENIZERS: Final = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
# The algorithms that the tokenizers library knows; of others it complains with a bare Exception, which is nobody's to
# catch. Old files leave the name out.
_TOKENIZER_MODELS: Final = ("BPE", "Unigram", "WordLevel", "WordPiece", None)


def disk_problems(config: GrpoConfig, environment: Environment) -> list[str]:
    """Model directories, data files, the output directory and the trackers that the configuration names."""
    runtime, models = config.runtime_args, config.models
    problems = model_problems("models.policy_trainer.load", models.policy_trainer.load)
    if models.policy_trainer.kl_coef > 0 and models.ref_policy.load is not None:
        problems += model_problems("models.ref_policy.load", models.ref_policy.load)
    problems += data_problems("runtime_args.data_path", runtime.data_path)
    if runtime.eval_data_path is not None:
        problems += data_problems("runtime_args.eval_data_path", runtime.eval_data_path)
    problems += _capacity_problems(config)
    return [*problems, *_output_problems(runtime.output_dir), *_tracker_problems(config, environment)]


def model_problems(key: str, load: str) -> list[str]:
    """What keeps ``load`` from being a Hugging Face model directory: configuration, safetensors, tokenizer."""
    directory = Path(load)
    if not directory.is_dir():
        return [f"{key}={load} is not a directory; download or copy the model there first"]
    return [
        *_config_problems(key, directory),
        *_weight_problems(key, directory),
        *_tokenizer_problems(key, directory),
    ]


def _config_problems(key: str, directory: Path) -> list[str]:
    file = directory / "config.json"
    if not file.is_file():
        return [f"{key}={directory} has no config.json; is it a Hugging Face model directory?"]
    found = _json_object(file)
    return [] if found is not None else [f"{key}: {file} cannot be read as a JSON object; copy the model again"]


def _tokenizer_problems(key: str, directory: Path) -> list[str]:
    if not any(all((directory / name).is_file() for name in names) for names in _TOKENIZERS):
        return [f"{key}={directory} has no tokenizer (tokenizer.json)"]
    present = [file for name in ("tokenizer.json", "tokenizer_config.json") if (file := directory / name).is_file()]
    damaged = [file for file in present if not _is_tokenizer_part(file)]
    return [f"{key}: {file} cannot be read as part of a tokenizer; copy the model again" for file in damaged]


def _is_tokenizer_part(file: Path) -> bool:
    match _json_object(file):
        case {"model": {**model}, "added_tokens": [*_]}:
            return model.get("type") in _TOKENIZER_MODELS
        case {}:
            return file.name != "tokenizer.json"
        case _:
            return False


def _capacity_problems(config: GrpoConfig) -> list[str]:
    """What the model's own configuration cannot do: attention heads that do not divide, sequences that are too long."""
    policy = config.models.policy
    model = _json_object(Path(config.models.policy_trainer.load) / "config.json") or {}
    heads, positions = model.get("num_attention_heads"), model.get("max_position_embeddings")
    tokens = policy.max_prompt_tokens_length + policy.max_response_tokens_length
    problems: list[str] = []
    if isinstance(heads, int) and heads % policy.tensor_model_parallel_size != 0:
        problems.append(
            f"models.policy.tensor_model_parallel_size={policy.tensor_model_parallel_size} must divide the model's "
            f"num_attention_heads={heads}; use {choices(heads, policy.tensor_model_parallel_size)}"
        )
    if isinstance(positions, int) and tokens > positions:
        problems.append(
            f"models.policy.max_prompt_tokens_length + max_response_tokens_length = {tokens} tokens, but the model's "
            f"max_position_embeddings={positions}; shorten one of them"
        )
    return problems


def _weight_problems(key: str, directory: Path) -> list[str]:
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            return [f"{key}={directory} has no weights ({WEIGHTS}, or {WEIGHTS_INDEX} and its parts)"]
        return _damage(key, [directory / WEIGHTS])
    weight_map = (_json_object(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        return [f"{key}: {index} has no weight_map; copy the model again"]
    names = sorted({str(name) for name in cast("Mapping[str, object]", weight_map).values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        return [f"{key}={directory} lacks {', '.join(missing)}, which {index.name} names"]
    return _damage(key, [directory / name for name in names])


def _damage(key: str, files: Sequence[Path]) -> list[str]:
    return [f"{key}: {problem}" for file in files if (problem := weight_file_problem(file)) is not None]


def _json_object(file: Path) -> Mapping[str, object] | None:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("Mapping[str, object]", found) if isinstance(found, dict) else None


def data_problems(key: str, paths: str) -> list[str]:
    """What keeps comma-separated ``paths`` from being data files."""
    files = [Path(part.strip()) for part in paths.split(",") if part.strip()]
    if not files:
        return [f"{key} names no file"]
    return [problem for file in files for problem in _file_problems(key, file)]


def _file_problems(key: str, file: Path) -> list[str]:
    if file.suffix not in DATA_SUFFIXES:
        return [f"{key}: {file} must end in {', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}"]
    if not file.is_file():
        return [f"{key}: {file} does not exist; prepare it first (chatlearn prepare --help)"]
    if not os.access(file, os.R_OK):
        return [f"{key}: {file} cannot be read; check its permissions"]
    with file.open("rb") as stream:
        is_empty = not any(line.strip() for line in stream)
    return [f"{key}: {file} is empty; prepare it again (chatlearn prepare --help)"] if is_empty else []


def _output_problems(output_dir: str) -> list[str]:
    """The output directory, or the nearest folder above it that exists, must be a folder we may write to."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [f"runtime_args.output_dir={output_dir}: {folder} is a file; choose another folder"]
    return (
        [] if os.access(folder, os.W_OK) else [f"runtime_args.output_dir={output_dir}: no permission to write {folder}"]
    )


def _tracker_problems(config: GrpoConfig, environment: Environment) -> list[str]:
    log = config.runtime_args.log_args_dict
    problems: list[str] = []
    if log.enable_wandb and find_spec("wandb") is None:
        problems.append("runtime_args.log_args_dict.enable_wandb=True: run pip install 'chatlearn[wandb]'")
    if log.enable_wandb and not environment.has_wandb_account:
        problems.append(
            "runtime_args.log_args_dict.enable_wandb=True needs an account; set WANDB_API_KEY, or WANDB_MODE=offline"
        )
    if log.enable_tensorboard and find_spec("tensorboard") is None:
        problems.append("runtime_args.log_args_dict.enable_tensorboard=True: run pip install tensorboard")
    return problems
