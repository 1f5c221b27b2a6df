"""Weights that come and go: the blocks of a model stay on the device, or stream to it just before they are used.

A component is built without weights. Each of its units (`layout`) is one flat buffer on the device while it is there,
and its parameters are views into it. A unit can also be held in host memory, pinned to its exact size, from where a
streamed one is copied into a ring of slots while the units before it compute. Weights are read-only: dropping them
copies nothing back.

diffusers' group offloading does the same with torch's own pinned memory, which rounds every tensor up to a power of two
(the transformer's 7.75 GB take 11.92 GB), and it waits for the host at each block.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kleinctl_plugins.fp8 import expand, pack, packed_bytes
from kleinctl_plugins.layout import (
    DTYPES,
    READER_SLOTS,
    READERS,
    SLOT_BYTES,
    EarlyReader,
    Layout,
    Piece,
    host_memory,
    pread,
    tensors,
)


@dataclass
class Unit:
    """A block of a component: its parameters lie in one flat buffer, on the device, on the host, or nowhere.

    `coming` is host memory that is being filled and pinned. A unit that is `packed` is held as fp8, and expanded into
    `scratch` while it computes.
    """

    layout: Layout
    module: Any
    parameters: Mapping[str, Any]
    device: Any = None
    host: Any = None
    coming: Future[Any] | None = field(default=None, repr=False)
    packed: bool = False
    scratch: Any = None

    @property
    def name(self) -> str:
        """The name of its module in the component."""
        return self.layout.name

    @property
    def bytes(self) -> int:
        """Its size when it is held."""
        return packed_bytes(self.layout) if self.packed else self.layout.bytes

    def bind(self, buffer: Any) -> None:
        """Make the parameters views into `buffer`, a flat tensor of bytes, or into what it expands to."""
        if self.packed:
            expand(self.layout, buffer, self.scratch)
            buffer = self.scratch
        for piece in self.layout.pieces:
            own = self.parameters[piece.name]
            own.data = buffer[piece.at : piece.at + piece.held_bytes].view(own.dtype).view(piece.shape)

    def arrive(self) -> None:
        """Wait for what was read ahead. Where that failed it is as if it had not been tried: it can be read again."""
        coming, self.coming = self.coming, None
        if coming is not None:
            with contextlib.suppress(OSError, CancelledError):
                self.host = coming.result()

    def unbind(self) -> None:
        """Let the parameters hold nothing."""
        for own in self.parameters.values():
            own.data = own.data.new_empty(0)


class Component:
    """A model whose weights come and go. `layouts` are its units in the order in which a forward uses them.

    Build `module` with its parameters on the meta device; tensors that it has no parameter for are never read.
    """

    def __init__(self, module: Any, layouts: Mapping[str, Layout], device: str, dtype: Any) -> None:
        import torch
        from torch import nn

        self.module, self.device = module, torch.device(device)
        self.units: dict[str, Unit] = {}
        missing = {name for name, _ in module.named_parameters()}
        for name, layout in layouts.items():
            own = {}
            for piece in layout.pieces:
                owner, _, leaf = piece.name.rpartition(".")
                parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=False)
                module.get_submodule(owner)._parameters[leaf] = parameter
                own[piece.name] = parameter
            self.units[name] = Unit(layout, module.get_submodule(name), own)
            missing -= own.keys()
        if missing:
            raise LookupError(f"no file has the weights of {', '.join(sorted(missing)[:3])}")

    @property
    def host_bytes(self) -> int:
        """What is in host memory now, or on its way there."""
        return sum(unit.bytes for unit in self.units.values() if unit.host is not None or unit.coming is not None)

    def hold(self, resident: Iterable[str], host: Iterable[str], reader: Reader) -> None:
        """Bring units onto the device, in this order, and into host memory, and drop the others from the device.

        Where it fails, nothing is left that is half read.
        """
        resident = list(resident)
        wanted, kept = set(resident), set(host)
        self.drop(name for name in self.units if name not in wanted)
        for unit in self.units.values():
            if unit.name in kept or unit.name in wanted:
                unit.arrive()
        missing = [self.units[name] for name in self.units if name in kept and self.units[name].host is None]
        coming = [self.units[name] for name in resident if self.units[name].device is None]
        try:
            self._bring(missing, coming, reader)
        except BaseException:
            self.drop(unit.name for unit in coming)
            self.forget([unit.name for unit in missing], reader)
            raise

    def _bring(self, missing: Sequence[Unit], coming: Sequence[Unit], reader: Reader) -> None:
        """Read `missing` into host memory, and bring `coming` onto the device."""
        for unit in missing:
            unit.host = reader.pinned(host_memory(unit.bytes)) if unit.bytes else reader.nothing()
        reader.fill([(unit, unit.host) for unit in missing])
        for unit in coming:
            unit.device = reader.empty(unit.bytes)
            if unit.host is not None:
                unit.device.copy_(unit.host, non_blocking=True)
        reader.fill([(unit, unit.device) for unit in coming if unit.host is None])
        for unit in coming:
            if not unit.packed:
                unit.bind(unit.device)

    def drop(self, names: Iterable[str]) -> None:
        """Let units go from the device; what is in host memory stays there."""
        for name in names:
            unit = self.units[name]
            if unit.device is not None:
                unit.unbind()
                unit.device = None

    def forget(self, names: Iterable[str], reader: Reader) -> None:
        """Let units go from host memory."""
        for name in names:
            unit = self.units[name]
            unit.arrive()
            if unit.host is not None:
                reader.free(unit.host)
                unit.host = None

    def pack(self, packed: bool, reader: Reader) -> None:
        """Hold the blocks as fp8 from now on, or as they are computed with; what is held the other way goes."""
        changing = [unit for name, unit in self.units.items() if name and unit.packed != packed]
        self.drop(unit.name for unit in changing)
        self.forget([unit.name for unit in changing], reader)
        for unit in changing:
            unit.packed = packed

    @contextlib.contextmanager
    def streaming(self, slots: int, forwards: int, reader: Reader) -> Iterator[None]:
        """While this lasts, units that are not on the device come and go through a ring of slots as they are used.

        They come from host memory, or from their files where they are not held there. So many `forwards` are expected:
        after the last of them nothing comes for another. Units that are held as fp8 are expanded as they are used,
        wherever they are.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._expand_resident().close)
            streamed = [unit for name, unit in self.units.items() if name and unit.device is None]
            ring = Ring(streamed, reader, slots, forwards)
            stack.callback(ring.close)
            ring.begin()
            yield

    def _expand_resident(self) -> contextlib.ExitStack:
        """Give every packed unit the room to expand into, and hooks to those that are on the device; until closed."""
        import torch

        stack = contextlib.ExitStack()
        packed = [unit for unit in self.units.values() if unit.packed]
        size = max((unit.layout.bytes for unit in packed), default=0)
        scratch = torch.empty(size, dtype=torch.uint8, device=self.device) if packed else None
        for unit in packed:
            unit.scratch = scratch
            stack.callback(setattr, unit, "scratch", None)
            stack.callback(unit.unbind)
            if unit.device is not None:
                use = unit.module.register_forward_pre_hook(lambda *_, unit=unit: unit.bind(unit.device))
                stack.callback(use.remove)
        return stack


class Ring:
    """Slots on the device through which units stream, in the order of use, as often as there are `forwards`."""

    def __init__(self, units: Sequence[Unit], reader: Reader, slots: int, forwards: int) -> None:
        import torch

        self.units, self._reader, self._forwards = list(units), reader, forwards
        self._hooks: list[Any] = []
        self._cuda, device = reader.cuda, reader.device
        self._free: deque[tuple[Any, Any]] = deque()
        self._ready: dict[str, tuple[Any, Any]] = {}
        self._reading: dict[str, list[Future[None]]] = {}
        self._coming: deque[Unit] = deque()
        if not self.units:
            return
        size = max(unit.bytes for unit in self.units)
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        start = self._event() if self._cuda else None
        if start is not None:
            start.record()
        for _ in range(min(slots, len(self.units))):
            self._free.append((torch.empty(size, dtype=torch.uint8, device=device), start))
        for unit in self.units:
            self._hooks.append(unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._before(unit)))
            self._hooks.append(unit.module.register_forward_hook(lambda *_, unit=unit: self._after(unit)))

    def begin(self) -> None:
        """Let units come, as far as there are slots."""
        self._coming.extend(self.units * self._forwards)
        while self._free and self._coming:
            self._fetch()

    def _event(self) -> Any:
        import torch

        return torch.cuda.Event()

    def _fetch(self) -> None:
        """Copy the next unit into a free slot, once what computed from that slot has ended."""
        import torch

        unit, (slot, done) = self._coming.popleft(), self._free.popleft()
        if unit.host is None:
            self._reading[unit.name] = self._reader.begin(unit, slot[: unit.bytes], done)
            self._ready[unit.name] = (slot, None)
            return
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

        if not self._ready:  # one forward more than was expected
            self.begin()
        for future in self._reading.get(unit.name, ()):  # where one fails, `close` waits for the others
            future.result()
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
        if self._coming:
            self._fetch()

    def close(self) -> None:
        """Take the hooks off and let the slots go."""
        import torch

        for hook in self._hooks:
            hook.remove()
        wait([future for every in self._reading.values() for future in every])
        self._reading.clear()
        if self._cuda and self.units:
            torch.cuda.current_stream().wait_stream(self._stream)
        for unit in self.units:
            unit.unbind()
        self._ready.clear()
        self._free.clear()


class Reader:
    """Reads weights from files: several threads at once, into host memory or through pinned slots to the device.

    `pinned_bytes` are pinned now; `pin_limit` is how far pinning went where the system refused more (WSL, containers),
    and None as long as it did not; up to there memory is pinned again after other was let go. Memory that is not pinned
    works, and is copied more slowly.
    """

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.pinned_bytes = 0
        self.pin_limit: int | None = None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._early = ThreadPoolExecutor(1, thread_name_prefix="pin")
        self._lock = threading.Lock()
        self._pinned: dict[int, int] = {}
        self._ahead: EarlyReader | None = None
        self._slots: deque[Any] = deque()
        if self.cuda:  # before anything else is pinned: all reading goes through them
            self._slots.extend(self._slot() for _ in range(READER_SLOTS))

    def _slot(self) -> Any:
        import torch

        return self.pinned(host_memory(SLOT_BYTES)), torch.cuda.Event()

    def empty(self, count: int) -> Any:
        """`count` bytes on the device."""
        import torch

        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def nothing(self) -> Any:
        """No bytes on the host."""
        import torch

        return torch.empty(0, dtype=torch.uint8)

    def pinned(self, pages: mmap.mmap) -> Any:
        """Host memory as a tensor of bytes, pinned where the device is a card and as far as the system lets us."""
        import torch

        memory = torch.frombuffer(pages, dtype=torch.uint8)
        if self.cuda and (self.pin_limit is None or self.pinned_bytes + len(memory) <= self.pin_limit):
            error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))
            with self._lock:
                if error:
                    self.pin_limit = self.pinned_bytes
                else:
                    self.pinned_bytes += len(memory)
                    self._pinned[memory.data_ptr()] = len(memory)
            if error:
                self._take_back_error()
        return memory

    def _take_back_error(self) -> None:
        """CUDA keeps a refusal for the thread, and torch takes it for that of the next kernel: let it be this one."""
        import torch

        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)

    def free(self, memory: Any) -> None:
        """Unpin host memory that is not needed any more; it goes with its last reference."""
        import torch

        with self._lock:
            count = self._pinned.pop(memory.data_ptr(), 0)
            self.pinned_bytes -= count
        if count:
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def take(self, early: EarlyReader, components: Mapping[str, Component]) -> None:
        """Pin what `early` reads, as it comes, while the rest of the session is being made."""
        self._ahead = early
        for name, found in early.memory.items():
            for unit, filling in found.items():
                components[name].units[unit].coming = self._early.submit(self._pin_filled, filling)

    def _pin_filled(self, filling: Future[mmap.mmap]) -> Any:
        return self.pinned(filling.result())

    def fill(self, jobs: Sequence[tuple[Unit, Any]]) -> None:
        """Read units into their buffers, and wait for it."""
        for unit, buffer in (each for each in jobs if each[0].packed):
            plain = self.empty(unit.layout.bytes)
            self._fill([(unit, plain)])
            pack(unit.layout, plain, buffer)
        self._fill([each for each in jobs if not each[0].packed])

    def _fill(self, jobs: Sequence[tuple[Unit, Any]]) -> None:
        import torch

        start = None
        if self.cuda:
            start = torch.cuda.Event()  # what lay where the buffers are now may still be in use
            start.record()
        waiting = [future for unit, buffer in jobs for future in self.begin(unit, buffer, start)]
        wait(waiting)  # all of them: when one fails, the others still use their buffers
        for future in waiting:
            future.result()

    def begin(self, unit: Unit, buffer: Any, start: Any) -> list[Future[None]]:
        """Begin to read a unit that is not packed into `buffer`, which is written to once the event `start` is over.

        For a processor, where nothing can go on beside it, it is read now.
        """
        runs = unit.layout.runs()
        if self.cuda:
            return [self._pool.submit(self._read, unit.layout, run, buffer, start) for run in runs]
        for run in runs:
            self._read(unit.layout, run, buffer, start)
        return []

    def _read(self, layout: Layout, run: Sequence[Piece], buffer: Any, start: Any) -> None:
        first, count = run[0], sum(piece.bytes for piece in run)
        if not layout.as_stored:
            self._convert(layout, run, buffer)
        elif buffer.device.type == "cpu":
            pread(first.path, first.offset, memoryview(buffer[first.at : first.at + count].numpy()))
        else:
            self._through_slots(first.path, first.offset, buffer[first.at : first.at + count], start)

    def _convert(self, layout: Layout, run: Sequence[Piece], buffer: Any) -> None:
        import torch

        for piece in run:
            raw = torch.empty(piece.bytes, dtype=torch.uint8)
            pread(piece.path, piece.offset, memoryview(raw.numpy()))
            target = buffer[piece.at : piece.at + piece.held_bytes]
            stored, dtype = getattr(torch, piece.stored), getattr(torch, layout.dtype)
            target.copy_(raw.view(stored).to(dtype).view(torch.uint8))

    def _through_slots(self, path: Path, offset: int, target: Any, start: Any) -> None:
        import torch

        with torch.cuda.stream(torch.cuda.Stream(self.device)) as _:
            stream = torch.cuda.current_stream()
            stream.wait_event(start)
            try:
                for at in range(0, len(target), SLOT_BYTES):
                    self._through_slot(path, offset + at, target[at : at + SLOT_BYTES])
            finally:  # also where a read failed: what was sent before it is still being written to the buffer
                stream.synchronize()

    def _through_slot(self, path: Path, offset: int, part: Any) -> None:
        memory, sent = self._slots.popleft()
        try:
            sent.synchronize()
            pread(path, offset, memoryview(memory[: len(part)].numpy()))
            part.copy_(memory[: len(part)], non_blocking=True)
            sent.record()
        finally:
            self._slots.append((memory, sent))

    def close(self) -> None:
        """Give the memory back."""
        import torch

        if self._ahead is not None:
            self._ahead.close()
        self._early.shutdown(cancel_futures=True)
        self._pool.shutdown()
        if self.cuda:
            torch.cuda.synchronize()
            for address in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()
        self.pinned_bytes = 0


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
