"""What staged-decode holds where: which weights stay on the card, stream to it, or are read again for each picture.

Plain arithmetic on a model's shape and a budget, so that `fit` predicts by the same plan that the worker carries out.

Of each component: *resident* stays on the card; *streamed* waits in pinned host memory and comes block by block while
the blocks before it compute; *staged* is read from its file before its stage and dropped after it. Of the transformer
any number of blocks can be resident and the rest streamed. What is in the way of the VAE's decode is dropped before it
and comes back from host memory, so that the decode stays exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kleinctl import Hardware, Job, Model, memory

#: What a smaller plan may take of one that did not fit.
STEP = 0.95
#: Slots of the ring through which blocks stream.
SLOTS = 2
#: Pinned host memory of the readers, in bytes: four of them, two slots of 32 MiB each.
READER_BYTES = 4 * 2 * 32 * 2**20
#: How a component can be held on a card, and on a processor, where streaming gains nothing.
WAYS, CPU_WAYS = ("resident", "streamed", "staged"), ("resident", "staged")


@dataclass(frozen=True)
class Held:
    """One component: units on the device while it computes, those kept there while others do, and those on the host."""

    way: str
    resident: tuple[str, ...]
    kept: tuple[str, ...]
    host: tuple[str, ...]


@dataclass(frozen=True)
class Holding:
    """A plan. Stages in bytes of VRAM with the CUDA context, `host_bytes` pinned, `seconds` for one more picture."""

    encoder: Held
    transformer: Held
    encode_bytes: int
    denoise_bytes: int
    decode_bytes: int
    host_bytes: int
    seconds: float

    @property
    def vram_bytes(self) -> int:
        """The largest stage."""
        return max(self.encode_bytes, self.denoise_bytes, self.decode_bytes)

    @property
    def strategy(self) -> str:
        """How the weights are held, in a few words."""
        if self.encoder.way == self.transformer.way:
            return self.transformer.way
        return f"transformer {self.transformer.way}, encoder {self.encoder.way}"


@dataclass(frozen=True)
class Task:
    """A model and a job with what a plan goes by: seconds of each stage with every weight in place, rates in bytes a
    second (from pinned memory to the device; from a file in the page cache to it), and bytes on the device besides
    weights."""

    model: Model
    job: Job
    encode_seconds: float
    forward_seconds: float
    decode_seconds: float
    copy_rate: float
    read_rate: float
    base_bytes: int

    @classmethod
    def of(cls, model: Model, hardware: Hardware, job: Job) -> Task:
        """The task on a machine."""
        on_card = hardware.gpu is not None and "cuda" in model.devices
        copy = memory.copy_rate(hardware.gpu if on_card else None)
        context = memory.CONTEXT_BYTES if on_card else 0
        read = min(memory.CACHED_READ_RATE, copy)
        return cls(model, job, *memory.stage_seconds(model, hardware, job), copy, read, context + model.shape.vae_bytes)


def encoder_units(model: Model) -> dict[str, int]:
    """The layers of the text encoder whose states are read, with their bytes; its embedding stays on the host."""
    return {f"layers.{n}": model.shape.text_layer_bytes for n in range(model.shape.text_layers_read)}


def transformer_units(model: Model) -> dict[str, int]:
    """The transformer's blocks with their bytes, in the order of use; "" is what belongs to no block.

    A single block has 13 h² weights (linear1 9 h², linear2 4 h²) and two norms, a double block twice that.
    """
    shape = model.shape
    each = shape.transformer_bytes / shape.transformer_parameters
    single = round(each * (13 * memory.transformer_width(model) ** 2 + 2 * shape.head_dim))
    units = {f"transformer_blocks.{n}": 2 * single for n in range(shape.double_blocks)}
    units |= {f"single_transformer_blocks.{n}": single for n in range(shape.single_blocks)}
    return {"": shape.transformer_bytes - sum(units.values()), **units}


def fastest(task: Task, room: int, host: int, ways: Iterable[str] = WAYS) -> Holding | None:
    """The fastest way to hold the weights in `room` bytes on the device and `host` pinned; None if there is none."""
    fitting = (each for each in _plans(task, room, tuple(ways)) if each.vram_bytes <= room and each.host_bytes <= host)
    return min(fitting, key=lambda each: (round(each.seconds, 2), _moving(each), each.vram_bytes), default=None)


def smallest(task: Task, host: int, ways: Iterable[str] = WAYS) -> Holding:
    """The way that takes the least of the device; of the host at most `host` bytes where that is possible."""
    found = list(_plans(task, 0, tuple(ways)))
    within = [each for each in found if each.host_bytes <= host]
    return min(within or found, key=lambda each: (each.vram_bytes, each.host_bytes))


def best(task: Task, room: int, host: int, ways: Iterable[str] = WAYS) -> Holding:
    """The fastest plan that fits; where none does, the smallest."""
    return fastest(task, room, host, ways) or smallest(task, host, ways)


def smaller(task: Task, than: Holding, host: int, ways: Iterable[str] = WAYS) -> Holding | None:
    """The fastest plan that takes at least 5 % less of the device than one that did not fit; else one that takes less.

    None where nothing does, so that stepping down comes to an end.
    """
    found = best(task, int(than.vram_bytes * STEP), host, ways)
    return found if found.vram_bytes < than.vram_bytes else None


def _moving(plan: Holding) -> tuple[int, int]:
    """Of equally fast plans, one whose weights stay is better, then one that pins less."""
    return sum(held.way != "resident" for held in (plan.encoder, plan.transformer)), plan.host_bytes


def _plans(task: Task, room: int, ways: tuple[str, ...]) -> Iterator[Holding]:
    """One plan for each combination of ways, with as much on the device as `room` takes."""
    for encoder_way, transformer_way in itertools.product(ways, ways):
        yield _plan(task, room - task.base_bytes, encoder_way, transformer_way)


def _plan(task: Task, room: int, encoder_way: str, transformer_way: str) -> Holding:
    model, job = task.model, task.job
    encoder, transformer = encoder_units(model), transformer_units(model)
    blocks = {name: size for name, size in transformer.items() if name}
    denoising, decoding = memory.denoise_bytes(model, job), memory.decode_bytes(model, job)
    encoder_all, rest = sum(encoder.values()), transformer[""]
    beside = encoder_all if encoder_way == "resident" else 0  # of the encoder, while the transformer computes
    coming = SLOTS * max(encoder.values()) if encoder_way == "streamed" else encoder_all
    ring = SLOTS * max(blocks.values()) if transformer_way == "streamed" else 0

    resident = list(transformer)
    if transformer_way == "streamed":
        resident = ["", *_spread(blocks, room - denoising - rest - ring - beside)]
    elsewhere = min(room - memory.encode_bytes(model) - coming, room - decoding)  # for the transformer, in other stages
    kept = [] if transformer_way == "staged" or rest > elsewhere else _kept(transformer, resident, elsewhere)
    encoder_kept: list[str] = []
    if encoder_way == "resident":
        encoder_kept = _fill(encoder, room - decoding - _size(transformer, kept))
    encoder_host = [name for name in encoder if name not in encoder_kept] if encoder_way != "staged" else []
    transformer_host = [name for name in transformer if name not in kept] if transformer_way != "staged" else []

    streamed = sum(blocks.values()) - _size(blocks, [name for name in resident if name])
    forwards = memory.forwards(model, job)
    seconds = max(task.encode_seconds, encoder_all / task.copy_rate if encoder_way == "streamed" else 0)
    seconds += forwards * max(task.forward_seconds, streamed / task.copy_rate) + task.decode_seconds
    seconds += (encoder_all if encoder_way == "staged" else 0) / task.read_rate
    seconds += (sum(transformer.values()) if transformer_way == "staged" else 0) / task.read_rate
    again = _size(transformer, resident) - _size(transformer, kept) if transformer_way != "staged" else 0
    again += encoder_all - _size(encoder, encoder_kept) if encoder_way == "resident" else 0
    return Holding(
        Held(
            encoder_way, () if encoder_way == "streamed" else tuple(encoder), tuple(encoder_kept), tuple(encoder_host)
        ),
        Held(transformer_way, tuple(resident), tuple(kept), tuple(transformer_host)),
        encode_bytes=task.base_bytes + coming + _size(transformer, kept) + memory.encode_bytes(model),
        denoise_bytes=task.base_bytes + _size(transformer, resident) + ring + beside + denoising,
        decode_bytes=task.base_bytes + _size(transformer, kept) + _size(encoder, encoder_kept) + decoding,
        host_bytes=_size(encoder, encoder_host) + _size(transformer, transformer_host) + READER_BYTES,
        seconds=seconds + again / task.copy_rate,
    )


def _kept(units: Mapping[str, int], resident: Iterable[str], room: int) -> list[str]:
    """Of what is resident, the unit "" and as many blocks as `room` takes."""
    own = {name: units[name] for name in resident if name}
    return ["", *_fill(own, room - units[""])]


def _fill(units: Mapping[str, int], room: int) -> list[str]:
    return list(units) if _size(units, units) <= room else _spread(units, room)


def _spread(units: Mapping[str, int], room: int) -> list[str]:
    """Fewer than all units: as many as `room` bytes take, evenly over their order, so that copies hide behind work."""
    names = list(units)
    for count in range(len(names) - 1, 0, -1):
        taken = [names[int((n + 0.5) * len(names) / count)] for n in range(count)]
        if _size(units, taken) <= room:
            return taken
    return []


def _size(units: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(units[name] for name in names)
