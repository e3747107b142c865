"""Write safetensors files one tensor after the other, in any order, with the memory of one tensor.

The library's own writer wants all tensors of a file at once. The format is simple: the length of the header (8 bytes,
little-endian), the header (JSON: for each tensor its dtype, shape, and place in what follows), the numbers. Names,
shapes and dtype are known before the first tensor comes, so the headers are written first. See
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from chatlearn.checkpoint.architecture import Shapes

SINGLE_NAME = "model.safetensors"
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
HEADER_ALIGNMENT = 8
BLOCK_BYTES = 1024 * 1024  # written at once: its checksum finds it in the processor's cache
SYNC_EVERY_BYTES = 128 * 1024 * 1024  # given to the disk in the background, so that little is left to wait for


@dataclass(frozen=True)
class PlannedFile:
    """A file that is to be: the beginning and the end of each tensor, counted from the end of the header."""

    name: str
    header: bytes
    spans: Mapping[str, tuple[int, int]]


def plan_files(shapes: Shapes, dtype: torch.dtype, max_file_bytes: int) -> tuple[PlannedFile, ...]:
    """Deal tensors to files in their order; a tensor larger than ``max_file_bytes`` gets a file of its own."""
    groups: list[dict[str, tuple[int, int]]] = [{}]
    end = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * dtype.itemsize
        if groups[-1] and end + num_bytes > max_file_bytes:
            groups.append({})
            end = 0
        groups[-1][name] = (end, end + num_bytes)
        end += num_bytes
    names = [SINGLE_NAME]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return tuple(
        PlannedFile(name, _header(spans, shapes, dtype), spans) for name, spans in zip(names, groups, strict=True)
    )


def _header(spans: Mapping[str, tuple[int, int]], shapes: Shapes, dtype: torch.dtype) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, span in spans.items():
        document[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shapes[name], "data_offsets": span}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class WeightWriter:
    """Puts every tensor in its place in ``plan``; ``checksums`` has the CRC-32 of those that are written.

    At its end every file has reached the disk. Names must be those of the plan, and each come once.
    """

    def __init__(self, folder: Path, plan: tuple[PlannedFile, ...]) -> None:
        self.checksums: dict[str, int] = {}
        self._folder = folder
        self._place = {name: file for file in plan for name in file.spans}
        self._left = {file.name: len(file.spans) for file in plan}
        self._open: dict[str, BinaryIO] = {}
        self._unsynced = 0
        self._syncing: list[Future[None]] = []
        self._background = ThreadPoolExecutor(max_workers=1)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.shutdown()
        self._stack.close()
        if error is None:
            for future in self._syncing:
                future.result()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that lies in host memory and has the shape and dtype that were planned."""
        planned = self._place[name]
        file = self._opened(planned)
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        file.seek(len(planned.header) + planned.spans[name][0])
        value = 0
        for begin in range(0, len(content), BLOCK_BYTES):
            block = content[begin : begin + BLOCK_BYTES]
            value = zlib.crc32(block, value)
            file.write(block)
        self.checksums[name] = value
        self._left[planned.name] -= 1
        self._unsynced += len(content)
        if self._left[planned.name] == 0 or self._unsynced >= SYNC_EVERY_BYTES:
            file.flush()
            self._unsynced = 0
            self._syncing.append(self._background.submit(os.fsync, file.fileno()))

    def _opened(self, planned: PlannedFile) -> BinaryIO:
        if planned.name not in self._open:
            file = self._stack.enter_context((self._folder / planned.name).open("wb"))
            file.write(planned.header)
            self._open[planned.name] = file
        return self._open[planned.name]
