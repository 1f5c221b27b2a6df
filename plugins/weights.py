"""Weights that come and go: the blocks of a model stay on the device, or stream to it just before they are used.

A component is built without weights. Each of its *units* (a transformer block, a layer of the text encoder; what is
left over is the unit "") is one flat buffer on the device while it is there, and its parameters are views into it. A
unit can also be held in host memory, pinned to its exact size, from where a streamed one is copied into a ring of slots
while the units before it compute. Weights are read-only: dropping them copies nothing back.

diffusers' group offloading does the same with torch's own pinned memory, which rounds every tensor up to a power of two
(the transformer's 7.75 GB take 11.92 GB), and it waits for the host at each block; see docs/measurements.md.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Bytes at which parameters start in a unit: as the allocator places tensors of their own, so kernels choose alike.
ALIGNMENT = 512
#: Readers, and the pinned slots of each through which weights go to the device, in bytes.
READERS, SLOT_BYTES = 4, 32 * 2**20
#: safetensors' names of dtypes, as torch has them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64"}


@dataclass(frozen=True)
class Piece:
    """One parameter of a unit: where its bytes lie in a file, and where they go in the unit."""

    parameter: Any
    path: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    stored: Any
    dtype: Any
    at: int

    @property
    def held_bytes(self) -> int:
        """Bytes in the precision that is computed in."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


@dataclass
class Unit:
    """A block of a component: its parameters lie in one buffer of `bytes`, on the device, on the host, or nowhere."""

    name: str
    module: Any
    pieces: list[Piece] = field(default_factory=list)
    bytes: int = 0
    device: Any = None
    host: Any = None

    def bind(self, buffer: Any) -> None:
        """Make the parameters views into `buffer`, a flat tensor of bytes."""
        for piece in self.pieces:
            raw = buffer[piece.at : piece.at + piece.held_bytes]
            piece.parameter.data = raw.view(piece.dtype).view(piece.shape)

    def unbind(self) -> None:
        """Let the parameters hold nothing."""
        for piece in self.pieces:
            piece.parameter.data = piece.parameter.data.new_empty(0)


class Component:
    """A model whose weights come and go. `names` are its units in the order in which a forward uses them.

    Build `module` with its parameters on the meta device; `files` are its safetensors, whose tensor names lose
    `prefix`. Tensors that the module has no parameter for are never read.
    """

    def __init__(
        self, module: Any, files: Sequence[Path], names: Sequence[str], device: str, dtype: Any, prefix: str = ""
    ) -> None:
        import torch

        self.module, self.device = module, torch.device(device)
        self.units = {name: Unit(name, module.get_submodule(name)) for name in names}
        self.units[""] = Unit("", module)
        self._take_parameters(files, dtype, prefix)

    def _take_parameters(self, files: Sequence[Path], dtype: Any, prefix: str) -> None:
        import torch
        from torch import nn

        found = {}
        for path in files:
            for name, (kind, shape, offset, count) in tensors(path).items():
                found[name.removeprefix(prefix)] = (path, kind, shape, offset, count)
        waiting: dict[str, list[tuple[tuple[str, int], Any, Any]]] = {name: [] for name in self.units}
        for name in [name for name, _ in self.module.named_parameters()]:
            path, kind, shape, offset, count = found[name]
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=False)
            self.module.get_submodule(owner)._parameters[leaf] = own
            unit = next((each for each in self.units if each and name.startswith(f"{each}.")), "")
            stored = getattr(torch, DTYPES[kind])
            waiting[unit].append(((str(path), offset), own, (path, offset, count, shape, stored)))
        for name, entries in waiting.items():
            at = 0
            for _, own, (path, offset, count, shape, stored) in sorted(entries, key=lambda entry: entry[0]):
                piece = Piece(own, path, offset, count, shape, stored, dtype, at)
                self.units[name].pieces.append(piece)
                at = -(-(at + piece.held_bytes) // ALIGNMENT) * ALIGNMENT
            self.units[name].bytes = at

    @property
    def bytes(self) -> int:
        """All its weights."""
        return sum(unit.bytes for unit in self.units.values())

    def resident_bytes(self) -> int:
        """What is on the device now, without the ring of slots."""
        return sum(unit.bytes for unit in self.units.values() if unit.device is not None)

    def hold(self, resident: Iterable[str], host: Iterable[str], reader: Reader) -> None:
        """Bring units onto the device and into host memory, and drop the others from the device.

        Those that are neither resident nor in host memory cannot be used until the next call.
        """
        wanted, kept = set(resident), set(host)
        self.drop(name for name in self.units if name not in wanted)
        missing = [self.units[name] for name in self.units if name in kept and self.units[name].host is None]
        arena = reader.arena(sum(unit.bytes for unit in missing))
        at = 0
        for unit in missing:
            unit.host = arena[at : at + unit.bytes]
            at += unit.bytes
        coming = [self.units[name] for name in self.units if name in wanted and self.units[name].device is None]
        reader.fill([(unit, unit.host) for unit in missing])
        for unit in coming:
            unit.device = reader.empty(unit.bytes)
            if unit.host is not None:
                unit.device.copy_(unit.host, non_blocking=True)
        reader.fill([(unit, unit.device) for unit in coming if unit.host is None])
        for unit in coming:
            unit.bind(unit.device)

    def drop(self, names: Iterable[str]) -> None:
        """Let units go from the device; what is in host memory stays there."""
        for name in names:
            unit = self.units[name]
            if unit.device is not None:
                unit.unbind()
                unit.device = None

    @contextlib.contextmanager
    def streaming(self, slots: int = 2) -> Iterator[None]:
        """While this lasts, units that are not on the device come and go through a ring of slots as they are used."""
        streamed = [unit for name, unit in self.units.items() if name and unit.device is None]
        ring = Ring(streamed, self.device, slots)
        try:
            yield
        finally:
            ring.close()


class Ring:
    """Slots on the device through which units stream, in the order of use and round again."""

    def __init__(self, units: Sequence[Unit], device: Any, slots: int) -> None:
        import torch

        self.units = list(units)
        self._hooks: list[Any] = []
        self._cuda = device.type == "cuda"
        self._free: deque[tuple[Any, Any]] = deque()
        self._ready: dict[str, tuple[Any, Any]] = {}
        if not self.units:
            return
        size = max(unit.bytes for unit in self.units)
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        start = self._event() if self._cuda else None
        if start is not None:
            start.record()
        for _ in range(min(slots, len(self.units))):
            self._free.append((torch.empty(size, dtype=torch.uint8, device=device), start))
        self._coming = deque(self.units)
        for unit in self.units:
            self._hooks.append(unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._before(unit)))
            self._hooks.append(unit.module.register_forward_hook(lambda *_, unit=unit: self._after(unit)))
        while self._free and self._coming:
            self._fetch()

    def _event(self) -> Any:
        import torch

        return torch.cuda.Event()

    def _fetch(self) -> None:
        """Copy the next unit into a free slot, once what computed from that slot has ended."""
        import torch

        unit, (slot, done) = self._coming.popleft(), self._free.popleft()
        if not self._cuda:
            slot[: unit.bytes].copy_(unit.host)
            self._ready[unit.name] = (slot, None)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(done)
            slot[: unit.bytes].copy_(unit.host, non_blocking=True)
            copied = self._event()
            copied.record()
        self._ready[unit.name] = (slot, copied)

    def _before(self, unit: Unit) -> None:
        import torch

        slot, copied = self._ready[unit.name]
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        unit.bind(slot)

    def _after(self, unit: Unit) -> None:
        slot, _ = self._ready.pop(unit.name)
        done = None
        if self._cuda:
            done = self._event()
            done.record()
        unit.unbind()
        self._free.append((slot, done))
        if not self._coming:
            self._coming.extend(self.units)
        self._fetch()

    def close(self) -> None:
        """Take the hooks off and let the slots go."""
        import torch

        for hook in self._hooks:
            hook.remove()
        if self._cuda and self.units:
            torch.cuda.current_stream().wait_stream(self._stream)
        for unit in self.units:
            unit.unbind()
        self._ready.clear()
        self._free.clear()


class Reader:
    """Reads weights from files: several threads at once, into host memory or through pinned slots to the device."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.pinned = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._local = threading.local()
        self._maps: list[Any] = []
        self._start: Any = None

    def empty(self, count: int) -> Any:
        """`count` bytes on the device."""
        import torch

        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def arena(self, count: int) -> Any:
        """`count` bytes of host memory, pinned where the device is a card and the system lets us."""
        import torch

        if not count:
            return torch.empty(0, dtype=torch.uint8)
        pages = mmap.mmap(-1, count)
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        if self.cuda:
            error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), count, 0)
            if int(error) == 0:
                self.pinned += count
                self._maps.append(memory)
        return memory

    def fill(self, jobs: Sequence[tuple[Unit, Any]]) -> None:
        """Read units into their buffers, and wait for it."""
        import torch

        runs = [(run, buffer) for unit, buffer in jobs for run in _runs(unit.pieces)]
        if not self.cuda:  # nothing to overlap with
            for run, buffer in runs:
                self._read(run, buffer)
            return
        self._start = torch.cuda.Event()  # what lay where the buffers are now may still be in use
        self._start.record()
        waiting: list[Future[None]] = [self._pool.submit(self._read, run, buffer) for run, buffer in runs]
        for each in waiting:
            each.result()

    def _read(self, run: Sequence[Piece], buffer: Any) -> None:
        first = run[0]
        count = sum(piece.bytes for piece in run)
        if first.stored != first.dtype:
            self._convert(run, buffer)
        elif buffer.device.type == "cpu":
            _pread(first.path, first.offset, buffer[first.at : first.at + count])
        else:
            self._through_slots(first.path, first.offset, buffer[first.at : first.at + count])

    def _convert(self, run: Sequence[Piece], buffer: Any) -> None:
        import torch

        for piece in run:
            raw = torch.empty(piece.bytes, dtype=torch.uint8)
            _pread(piece.path, piece.offset, raw)
            target = buffer[piece.at : piece.at + piece.held_bytes]
            target.copy_(raw.view(piece.stored).to(piece.dtype).view(torch.uint8))

    def _through_slots(self, path: Path, offset: int, target: Any) -> None:
        import torch

        if not hasattr(self._local, "slots"):
            memory = self.arena(2 * SLOT_BYTES)
            self._local.slots = deque(
                (memory[n * SLOT_BYTES : (n + 1) * SLOT_BYTES], torch.cuda.Event()) for n in (0, 1)
            )
            self._local.stream = torch.cuda.Stream(self.device)
        for start in range(0, len(target), SLOT_BYTES):
            part = target[start : start + SLOT_BYTES]
            slot, sent = self._local.slots[0]
            self._local.slots.rotate(-1)
            sent.synchronize()
            _pread(path, offset + start, slot[: len(part)])
            with torch.cuda.stream(self._local.stream):
                self._local.stream.wait_event(self._start)
                part.copy_(slot[: len(part)], non_blocking=True)
                sent.record()
        for _, sent in self._local.slots:
            sent.synchronize()

    def close(self) -> None:
        """Give the memory back."""
        import torch

        self._pool.shutdown()
        if self.cuda:
            torch.cuda.synchronize()
            for memory in self._maps:
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._maps.clear()


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that follow one another in the file and in the unit, at most a few slots long, read in one go."""
    run: list[Piece] = []
    for piece in pieces:
        last = run[-1] if run else None
        if last is not None and not (
            last.path == piece.path
            and last.offset + last.bytes == piece.offset
            and last.at + last.held_bytes == piece.at
            and last.stored == last.dtype == piece.stored
            and sum(each.bytes for each in run) < 2 * SLOT_BYTES
        ):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _pread(path: Path, offset: int, target: Any) -> None:
    """Fill a tensor of bytes in host memory from a file.

    Raises:
        OSError: the file is shorter than its header says.
    """
    view = memoryview(target.numpy())
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            if hasattr(os, "preadv"):
                count = os.preadv(file.fileno(), [view[done:]], offset + done)
            else:
                file.seek(offset + done)
                count = file.readinto(view[done:])
            if not count:
                raise OSError(f"{path} ends at {offset + done} bytes, in the middle of its weights")
            done += count


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


def Embedding(files: Sequence[Path], name: str, device: str, dtype: Any) -> Any:
    """A module that looks rows up in a table in its file: of 778 MB, a prompt needs 512 rows of 5 KB."""
    import numpy
    import torch
    from torch import nn

    path = next(path for path in files if name in tensors(path))
    kind, shape, offset, count = tensors(path)[name]
    table = torch.from_numpy(numpy.memmap(path, dtype=numpy.uint8, mode="c", offset=offset, shape=(count,)))
    rows = table.view(getattr(torch, DTYPES[kind])).view(shape)

    class Rows(nn.Module):
        def forward(self, ids: Any) -> Any:
            return rows[ids.cpu()].to(device=device, dtype=dtype)

    return Rows()
