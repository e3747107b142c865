"""Read a model directory as its users will, before it is published: every number, and all that is not weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import CRITICAL
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from chatlearn.checkpoint.architecture import Shapes
from chatlearn.checkpoint.weight_files import DTYPE_NAMES, PlannedFile
from chatlearn.errors import CheckpointError
from chatlearn.models.pretrained import FAULTS

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# What transformers reads, and would not name when it is no JSON.
JSON_NAMES = (
    CONFIG_NAME, GENERATION_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
READERS = 2  # the checksum takes the time, and the machine may have no more cores
QUESTION = ({"role": "user", "content": "1+1="},)


@dataclass(frozen=True)
class Written:
    """What must be found again: the shape and the CRC-32 of every tensor, all of one dtype."""

    plan: tuple[PlannedFile, ...]
    shapes: Shapes
    dtype: torch.dtype
    checksums: Mapping[str, int]


def require_loads(folder: Path, written: Written, base_dir: Path) -> None:
    """Raise ``CheckpointError`` that names the file, and the tensor if it is one, of the first thing that is wrong.

    What is not weights came from ``base_dir``, so faults in it are told of there. Nothing but ``folder`` is read.
    Needs no memory but the pages of the file that is being read, which are mapped.
    """
    for file in written.plan:
        _require_tensors(folder / file.name, file, written)
    for path in filter(Path.is_file, map(folder.joinpath, JSON_NAMES)):
        with _Loading(base_dir / path.name):
            json.loads(path.read_text(encoding="utf-8"))
    with _silence():
        with _Loading(base_dir / CONFIG_NAME):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _require_tokenizer(folder, base_dir)
        if (folder / GENERATION_NAME).is_file():
            with _Loading(base_dir / GENERATION_NAME):
                GenerationConfig.from_pretrained(folder, local_files_only=True)
        _require_names(folder, config)


def _require_tensors(path: Path, file: PlannedFile, written: Written) -> None:
    """Every tensor of one file has the shape, the dtype and the bytes it was written with."""
    try:
        with cast("Any", safe_open(path, framework="pt", device="cpu")) as reader:  # its stubs know no context manager
            strangers = sorted(set(reader.keys()) ^ set(file.spans))
            if strangers:
                fault = "was written and is missing" if strangers[0] in file.spans else "was never written"
                raise CheckpointError(f"{path}: read back, '{strangers[0]}' {fault}; try again on another disk")
            with ThreadPoolExecutor(max_workers=READERS) as threads:
                for fault in threads.map(partial(_fault, reader, written), file.spans):
                    if fault:
                        raise CheckpointError(f"{path}: read back, {fault}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read back ({error}); try again on another disk") from error


def _fault(reader: Any, written: Written, name: str) -> str:
    """What is wrong with a tensor; nothing where it is as it was written."""
    stored = reader.get_slice(name)
    kind = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
    wanted = f"{DTYPE_NAMES[written.dtype]} {written.shapes[name]}"
    if kind != wanted:
        return f"'{name}' is {kind}; it was written as {wanted}"
    content = reader.get_tensor(name).view(-1).view(torch.uint8).numpy()
    if zlib.crc32(content) != written.checksums[name]:
        return f"'{name}' has other bytes than were written; try again on another disk"
    return ""


def _require_tokenizer(folder: Path, base_dir: Path) -> None:
    """The tokenizer loads, and its chat template takes a question, where the base model has them."""
    present = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    if not present:
        return
    with _Loading(base_dir / present[0]):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is not None:
        place = TEMPLATE_NAME if (folder / TEMPLATE_NAME).is_file() else "tokenizer_config.json"
        with _Loading(base_dir / place):
            tokenizer.apply_chat_template(list(QUESTION), tokenize=False, add_generation_prompt=True)


def _require_names(folder: Path, config: PreTrainedConfig) -> None:
    """transformers finds every weight that the model has, and no other; it reads names and shapes only."""
    with _Loading(folder):
        load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained  # annotated as if it returned a model alone
        # The attention that config.json asks for may not be installed here, and has no part in the names.
        names_only = {"config": config, "device_map": "meta", "attn_implementation": "eager"}
        _, report = load(folder, output_loading_info=True, local_files_only=True, **names_only)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            names = ", ".join(sorted(map(str, report[fault]))[:3])
            raise CheckpointError(f"{folder}: loaded back, transformers reports {fault.replace('_', ' ')}: {names}")


class _Loading:
    """A part of the loading that names ``path`` when it fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The tokenizers library raises Exception itself, which no clause catches without catching everything.
        if isinstance(error, (*FAULTS, TemplateError)) or kind is Exception:
            raise CheckpointError(
                f"{self.path}: the converted model was loaded back and transformers cannot read this ({error}); "
                "copy the base model again"
            ) from error


@contextmanager
def _silence() -> Generator[None]:
    """Neither bars nor tables of transformers inside: what they tell is looked at here, and told once."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
