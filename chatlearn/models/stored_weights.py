"""The tensors in the safetensors files of a Hugging Face model directory, one file or many."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self, cast

from safetensors import SafetensorError, safe_open

from chatlearn.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

NUMBERED_FILE = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")

# Frequencies of the rotary embedding: old checkpoints hold them, but they follow from the configuration.
COMPUTED_SUFFIX = "rotary_emb.inv_freq"


class StoredWeights:
    """Opens files when they are first read and closes them all at the end; ``files`` tells where each tensor lies.

    The index decides where there is one: some directories hold the same weights a second time, in files of another
    layout. Raises ``DataError`` that names the file for a directory that is not as it should be.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.files = _files_by_name(model_dir)
        self._stack = ExitStack()
        self._readers: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor, from its file's header alone."""
        return tuple(self._reader(name).get_slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        """All of a stored tensor."""
        return self._reader(name).get_tensor(name)

    def rows(self, name: str, expected: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a stored tensor, which must have the ``expected`` shape."""
        stored = self._reader(name).get_slice(name)
        shape = tuple(stored.get_shape())
        if shape != expected:
            raise DataError(
                f"{self.model_dir / self.files[name]}: tensor '{name}' has shape {shape}, but config.json asks for "
                f"{expected}; the two do not belong together"
            )
        return stored[start:stop]

    def _reader(self, name: str) -> Any:
        if name not in self.files:
            raise DataError(f"{self.model_dir}: the checkpoint has no tensor '{name}'; the download may be incomplete")
        file = self.files[name]
        if file not in self._readers:
            reader = self._stack.enter_context(_open(self.model_dir / file))
            absent = {expected for expected, place in self.files.items() if place == file}.difference(reader.keys())
            if absent:
                raise DataError(
                    f"{self.model_dir / file}: has no tensor '{min(absent)}', which {INDEX_FILE} says is in it; "
                    "download both again"
                )
            self._readers[file] = reader
        return self._readers[file]


def _files_by_name(model_dir: Path) -> dict[str, str]:
    index = model_dir / INDEX_FILE
    if index.is_file():
        try:
            found: dict[object, object] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index}: not a readable index of weights ({error}); download it again") from error
        if not all(isinstance(file, str) and file for file in found.values()):
            raise DataError(f"{index}: does not name a file for every tensor; download it again")
        return cast("dict[str, str]", found)  # JSON's keys are always text
    if (model_dir / SINGLE_FILE).is_file():
        return dict.fromkeys(_names_in(model_dir / SINGLE_FILE), SINGLE_FILE)
    return {name: path.name for path in _numbered_files(model_dir) for name in _names_in(path)}


def _numbered_files(model_dir: Path) -> list[Path]:
    """All files of a directory whose index is missing: their names say how many they are."""
    found = {match: path for path in sorted(model_dir.iterdir()) if (match := NUMBERED_FILE.fullmatch(path.name))}
    if not found:
        raise DataError(f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} in it; only safetensors can be loaded")
    totals = {int(match[2]) for match in found}
    numbers = [int(match[1]) for match in found]
    if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
        raise DataError(
            f"{model_dir}: {INDEX_FILE} is missing, and so are some of the {max(totals)} files that it would list; "
            "download both again"
        )
    return list(found.values())


def _names_in(path: Path) -> list[str]:
    with _open(path) as reader:
        return list(reader.keys())


def _open(path: Path) -> Any:
    """An open file; it is a context manager, which its stubs do not say, hence ``Any``."""
    try:
        return cast("Any", safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); download it again") from error


def is_weight(name: str) -> bool:
    """Whether a stored tensor is learned, and not computed by every model for itself."""
    return not name.endswith(COMPUTED_SUFFIX)
