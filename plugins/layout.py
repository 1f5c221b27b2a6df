"""Where weights lie: in their files, in the units that come and go, and in host memory. Without torch.

A *unit* is what comes and goes at once: a transformer block, a layer of the text encoder; what is left over is the unit
"". Headers alone say where the bytes of each lie and how large it is, so that reading into host memory can begin while
torch and its libraries are still being imported, which takes seconds (`EarlyReader`).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Bytes at which parameters start in a unit: as the allocator places tensors of their own, so kernels choose alike.
ALIGNMENT = 512
#: Readers at a time, and the most that one of them reads in one go, in bytes.
READERS, RUN_BYTES = 4, 64 * 2**20
#: Pinned slots through which they send weights to a card, two for each, and their bytes.
READER_SLOTS, SLOT_BYTES = 2 * READERS, 16 * 2**20
#: safetensors' names of dtypes, as torch has them, and their bytes.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64"}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": 8}


@dataclass(frozen=True)
class Piece:
    """One parameter of a unit: where its bytes lie in a file, and from which byte of the unit on they go.

    `stored` is the dtype of the file, `held_bytes` its size in the dtype that is computed in.
    """

    name: str
    path: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    stored: str
    at: int
    held_bytes: int


@dataclass(frozen=True)
class Layout:
    """A unit: its parameters in the order of the file, and its bytes when it is held."""

    name: str
    pieces: tuple[Piece, ...]
    bytes: int
    dtype: str

    @property
    def as_stored(self) -> bool:
        """Whether its bytes are those of the file, so that reading them is all there is to do."""
        return all(piece.stored == self.dtype for piece in self.pieces)

    def runs(self) -> Iterator[list[Piece]]:
        """Pieces that follow one another in the file and in the unit, at most `RUN_BYTES` long, read in one go."""
        run: list[Piece] = []
        for piece in self.pieces:
            if run and not (_follows(run[-1], piece) and sum(each.bytes for each in run) < RUN_BYTES):
                yield run
                run = []
            run.append(piece)
        if run:
            yield run


def _follows(last: Piece, piece: Piece) -> bool:
    together = last.path == piece.path and last.offset + last.bytes == piece.offset
    return together and last.at + last.held_bytes == piece.at and last.bytes == last.held_bytes == piece.held_bytes


def layouts(
    files: Sequence[Path], units: Sequence[str], dtype: str, *, prefix: str = "", rest: bool = True
) -> dict[str, Layout]:
    """The units of a component whose safetensors are `files`; tensor names lose `prefix`.

    What belongs to none of `units` is the unit "", or with `rest` false is left out and never read.
    """
    waiting: dict[str, list[tuple[str, Path, Any]]] = {name: [] for name in (*units, "")}
    for path in files:
        for name, found in tensors(path).items():
            own = name.removeprefix(prefix)
            unit = next((each for each in units if own.startswith(f"{each}.")), "")
            if unit or rest:
                waiting[unit].append((own, path, found))
    return {name: _layout(name, entries, dtype) for name, entries in waiting.items()}


def _layout(name: str, entries: list[tuple[str, Path, Any]], dtype: str) -> Layout:
    pieces, at = [], 0
    for own, path, (kind, shape, offset, count) in sorted(entries, key=lambda each: (str(each[1]), each[2][2])):
        held = math.prod(shape) * ITEM_BYTES[dtype]
        pieces.append(Piece(own, path, offset, count, shape, DTYPES[kind], at, held))
        at = -(-(at + held) // ALIGNMENT) * ALIGNMENT
    return Layout(name, tuple(pieces), at, dtype)


def tensors(path: Path) -> Mapping[str, tuple[str, tuple[int, ...], int, int]]:
    """The tensors of a safetensors file: dtype, shape, offset in the file and length in bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], tuple(each["shape"]), 8 + length + each["data_offsets"][0], _length(each["data_offsets"]))
        for name, each in header.items()
    }


def _length(offsets: Sequence[int]) -> int:
    return offsets[1] - offsets[0]


def host_memory(count: int) -> mmap.mmap:
    """`count` bytes of zeroed memory of this process, in large pages where the system has them: those pin faster."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, count)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def pread(path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` from a file.

    Raises:
        OSError: the file is shorter than its header says.
    """
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(target):
            if hasattr(os, "preadv"):
                count = os.preadv(file.fileno(), [target[done:]], offset + done)
            else:
                file.seek(offset + done)
                count = file.readinto(target[done:])
            if not count:
                raise OSError(f"{path} ends at {path.stat().st_size} bytes, in the middle of its weights")
            done += count


class EarlyReader:
    """Reads units into host memory in threads, and asks the system to read ahead what will be read later.

    `memory` has, by component and unit, a future of the memory that is filled.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="early")
        self.memory: dict[str, dict[str, Future[mmap.mmap]]] = {}

    def read(self, component: str, layouts: Sequence[Layout]) -> None:
        """Begin to read these units; those that have to be converted are left for later."""
        waiting = self.memory.setdefault(component, {})
        for each in layouts:
            if each.as_stored and each.bytes:
                waiting[each.name] = self._pool.submit(_read, each)

    def expect(self, layouts: Sequence[Layout]) -> None:
        """Let the system read these units into its page cache, where it can be asked to."""
        if hasattr(os, "posix_fadvise"):
            for each in layouts:
                self._pool.submit(_expect, each)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _read(layout: Layout) -> mmap.mmap:
    memory = host_memory(layout.bytes)
    whole = memoryview(memory)
    for run in layout.runs():
        pread(run[0].path, run[0].offset, whole[run[0].at : run[0].at + sum(piece.bytes for piece in run)])
    return memory


def _expect(layout: Layout) -> None:
    for run in layout.runs():
        with run[0].path.open("rb") as file:
            count = sum(piece.bytes for piece in run)
            os.posix_fadvise(file.fileno(), run[0].offset, count, os.POSIX_FADV_WILLNEED)
