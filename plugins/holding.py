"""What staged-decode holds where: which weights stay on the card, stream to it, or are read again for each picture.

Plain arithmetic on a model's shape and a budget, so that `fit` predicts by the same plan that the worker carries out.

Of each component: *resident* stays on the card; *streamed* waits in pinned host memory and comes block by block while
the blocks before it compute; *staged* is read from its file before its stage and dropped after it. Of the transformer
any number of blocks can be resident and the rest streamed. What is in the way of the VAE's decode is dropped before it
and comes back from host memory, so that the decode stays exact. What the host has no room for streams and comes back
from its file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kleinctl_plugins.fp8 import FP8, SCALE_BYTES
from kleinctl_plugins.layout import ITEM_BYTES, READER_SLOTS, SLOT_BYTES

from kleinctl import Hardware, Job, Model, Stage, memory

#: What a smaller plan may take of one that did not fit, and how much longer one may take that is nearly as fast.
STEP, NEARLY = 0.95, 1.03
#: Work of a decode in tiles of 512 pixels that overlap by 128, of that of a whole one: (512 / 384)².
TILED = 1.78
#: Slots of the ring through which blocks stream: one is filled while another computes; with a single one they wait.
SLOTS = (2, 1)
#: On a card, bytes that are lost at the edges of what is free: torch maps memory in pieces of 20 MiB, and those that
#: something still lies in stay: by its allocator's rules at most 44 MiB of klein-4b's plans (docs/measurements.md).
EDGE_BYTES = 64 * 2**20
#: Host memory that is left to the page cache where weights are read again for each picture, in bytes.
PAGES_BYTES = 2**30
#: Pinned host memory of the readers, in bytes.
READER_BYTES = READER_SLOTS * SLOT_BYTES
#: Of copies from memory that is not pinned: their rate, of that from pinned memory (12.9-18.4 of 22.5-23.9 GB/s on an
#: RTX 4090, NVlabs/cuda-oxide#976).
PAGEABLE_SHARE = 0.6
#: What WSL lets a process pin (0.75 to 1.0 GiB measured, FreeToken#233).
WSL_PIN_BYTES = 768 * 2**20
#: How a component can be held on a card, and on a processor, where streaming gains nothing.
WAYS, CPU_WAYS = ("resident", "streamed", "staged"), ("resident", "staged")


@dataclass(frozen=True)
class Held:
    """One component: units on the device while it computes, those kept there while others do, and those on the host.

    What is resident stands in the order of `_staying`. What is neither kept nor on the host is `read` when needed.
    """

    way: str
    resident: tuple[str, ...]
    kept: tuple[str, ...]
    host: tuple[str, ...]
    read: tuple[str, ...]

    def __str__(self) -> str:
        """The way in a few words."""
        return f"{self.way} from files" if self.read and self.way != "staged" else self.way


@dataclass(frozen=True)
class Holding:
    """A plan: its stages with their peaks and seconds, and `host_bytes` of host memory that weights wait in.

    With `tiles` the picture is decoded in tiles, and differs a little from a whole decode. What streams goes through
    `slots`. `moved_bytes` of weights go to the device for each picture, those of the text encoder that stream through
    left out: a prompt that comes again does not need them. `disk_bytes` are read from the disk for each picture.
    """

    encoder: Held
    transformer: Held
    stages: tuple[Stage, ...]
    host_bytes: int
    tiles: bool
    moved_bytes: int
    slots: int
    disk_bytes: int

    @property
    def vram_bytes(self) -> int:
        """The largest stage, with the CUDA context."""
        return max(stage.vram_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """One more picture, until it is on the disk."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def strategy(self) -> str:
        """How the weights are held, in a few words."""
        transformer, encoder = str(self.transformer), str(self.encoder)
        ways = transformer if encoder == transformer else f"transformer {transformer}, encoder {encoder}"
        return f"{ways}, tiled decode" if self.tiles else ways


@dataclass(frozen=True)
class Task:
    """A model and a job with what a plan goes by.

    Seconds of each stage with every weight in place, of writing the picture and between stages; rates in bytes a second
    (from pinned and from pageable memory to the device; from a file in the page cache to it, and from one on the disk);
    bytes on the device besides weights, and how many can be pinned (None: no limit is known).
    """

    model: Model
    job: Job
    encode_seconds: float
    forward_seconds: float
    decode_seconds: float
    save_seconds: float
    between_seconds: float
    copy_rate: float
    pageable_rate: float
    cached_rate: float
    disk_rate: float
    base_bytes: int
    pin_bytes: int | None = None

    @classmethod
    def of(cls, model: Model, hardware: Hardware, job: Job) -> Task:
        """The task on a machine."""
        on_card = hardware.gpu is not None and "cuda" in model.devices
        rates = memory.rates_of(model, hardware)
        copy = memory.copy_rate(hardware.gpu if on_card else None, rates)
        context = memory.CONTEXT_BYTES + EDGE_BYTES if on_card else 0
        return cls(
            model,
            job,
            *memory.stage_seconds(model, hardware, job),
            memory.save_seconds(hardware, job),
            memory.BETWEEN_SECONDS if on_card else 0.0,
            copy,
            rates.pageable or copy * PAGEABLE_SHARE,
            min(memory.cached_rate(rates), copy),
            min(memory.disk_rate(hardware), memory.cached_rate(rates), copy),
            context + model.shape.vae_bytes,
            WSL_PIN_BYTES if hardware.wsl else None,
        )

    def rate(self, host: int) -> float:
        """Bytes a second to the device from `host` bytes of host memory, of which some may not be pinned."""
        can = host if self.pin_bytes is None else max(0, self.pin_bytes - READER_BYTES)  # the readers pin theirs first
        pinned = 1.0 if host <= can else can / host
        return 1 / (pinned / self.copy_rate + (1 - pinned) / self.pageable_rate)


def encoder_units(model: Model, precision: str = "") -> dict[str, int]:
    """The layers of the text encoder whose states are read, with their bytes; its embedding stays on the host."""
    each = _packed(model, model.shape.text_layer_bytes, model.shape.text_hidden, precision)
    return {f"layers.{n}": each for n in range(model.shape.text_layers_read)}


def _packed(model: Model, count: int, width: int, precision: str) -> int:
    """Bytes of a block whose weights take `count` when they are computed with: fp8 has a byte a weight, and SCALE_BYTES
    a row."""
    return count if precision != FP8 else int(count * (1 + SCALE_BYTES / width) / ITEM_BYTES[model.dtype])


def transformer_units(model: Model, precision: str = "") -> dict[str, int]:
    """The transformer's blocks with their bytes, in the order of use; "" is what belongs to no block.

    A single block has 13 h² weights (linear1 9 h², linear2 4 h²) and two norms, a double block twice that.
    """
    shape = model.shape
    each = shape.transformer_bytes / shape.transformer_parameters
    single = round(each * (13 * memory.transformer_width(model) ** 2 + 2 * shape.head_dim))
    rest = shape.transformer_bytes - (2 * shape.double_blocks + shape.single_blocks) * single
    single = _packed(model, single, memory.transformer_width(model), precision)
    units = {f"transformer_blocks.{n}": 2 * single for n in range(shape.double_blocks)}
    units |= {f"single_transformer_blocks.{n}": single for n in range(shape.single_blocks)}
    return {"": rest, **units}


def fastest(task: Task, room: int, host: int, ways: Iterable[str] = WAYS) -> Holding | None:
    """The fastest way to hold the weights in `room` bytes on the device and `host` pinned; None if there is none.

    Blocks stream through a single slot, and the picture is decoded in tiles, only where nothing else fits.
    """
    for tiles, slots in itertools.product((False, True), SLOTS):
        plans = _plans(task, room, host, tuple(ways), tiles, slots)
        fitting = [each for each in plans if each.vram_bytes <= room and each.host_bytes <= host]
        if fitting:
            enough = min(each.seconds for each in fitting) * NEARLY
            return min((each for each in fitting if each.seconds <= enough), key=_moving)
    return None


def smallest(task: Task, host: int, ways: Iterable[str] = WAYS) -> Holding:
    """The way that takes the least of the device; of the host at most `host` bytes where that is possible."""
    found = list(_plans(task, 0, host, tuple(ways), tiles=True, slots=min(SLOTS)))
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


def _moving(plan: Holding) -> tuple[int, float, int, bool]:
    """Of plans that are nearly as fast, one whose weights stay is better, then the fastest, then one that pins less.

    To make room and fill it again costs more than its copies: with 1.3 GiB to evict, 0.06 s of a decode's 0.20.
    """
    return plan.moved_bytes, round(plan.seconds, 2), plan.host_bytes, plan.encoder.way != "resident"


def _plans(task: Task, room: int, host: int, ways: tuple[str, ...], tiles: bool, slots: int) -> Iterator[Holding]:
    """One plan for each combination of ways, with as much on the device as `room` takes, and on the host."""
    if tiles and memory.tiled_decode_bytes(task.model, task.job) >= memory.decode_bytes(task.model, task.job):
        tiles = False  # a picture that is hardly larger than a tile
    for encoder_way, transformer_way in itertools.product(ways, ways):
        yield _plan(task, room - task.base_bytes, host, encoder_way, transformer_way, tiles, slots)


def _plan(task: Task, room: int, host: int, encoder_way: str, transformer_way: str, tiles: bool, slots: int) -> Holding:
    model, job = task.model, task.job
    encoder, transformer = encoder_units(model, job.precision), transformer_units(model, job.precision)
    blocks = {name: size for name, size in transformer.items() if name}
    units, stored = encoder | transformer, encoder_units(model) | transformer_units(model)  # as held, and in the files
    encoding, denoising = memory.encode_bytes(model), memory.denoise_bytes(model, job)
    decoding = (memory.tiled_decode_bytes if tiles else memory.decode_bytes)(model, job)
    decoding = max(decoding, memory.reference_bytes(model, job))  # with the same weights on the card
    encoder_all, rest = sum(encoder.values()), transformer[""]
    staying = _staying(encoder)
    beside = encoder_all if encoder_way == "resident" else 0  # of the encoder, while the transformer computes
    coming = slots * max(encoder.values()) if encoder_way == "streamed" else encoder_all
    ring = slots * max(blocks.values()) if transformer_way == "streamed" else 0
    if job.precision == FP8:  # what a block is expanded into
        coming += max(stored[name] for name in encoder)
        ring += max(stored[name] for name in blocks)

    left = room - denoising - rest - ring - beside if transformer_way == "streamed" else sum(blocks.values())
    resident = ["", *_fill(blocks, _staying(blocks), left)]
    elsewhere = min(room - encoding - coming, room - decoding)  # for the transformer, in other stages
    kept = [] if transformer_way == "staged" or rest > elsewhere else _fill(transformer, resident, elsewhere)
    held, computing = _size(transformer, kept), _size(transformer, resident) + ring
    encoder_kept: list[str] = []
    if encoder_way == "resident":
        encoder_kept = _fill(encoder, staying, room - decoding - held)
    elif encoder_way == "streamed":  # what never is in the way stays
        left = min(room - decoding - held, room - denoising - computing, room - encoding - coming - held)
        encoder_kept = _fill(encoder, staying, left)
        coming, beside = coming + _size(encoder, encoder_kept), _size(encoder, encoder_kept)
    encoder_out, transformer_out = _without(encoder, encoder_kept), _without(transformer, kept)
    streamed, evicted = _without(blocks, resident), _without(resident, kept)
    wanted = [*_staying(streamed), *evicted] if transformer_way != "staged" else []  # first: in every step
    wanted += _staying(encoder_out) if encoder_way != "staged" else []
    waiting = _waiting(units, wanted, host - READER_BYTES if job.precision != FP8 else _size(units, units))
    read = _without([*encoder_out, *transformer_out], waiting)
    pinned, read_bytes = _size(units, waiting), _size(stored, read)
    cached = host - READER_BYTES - pinned >= read_bytes
    rate, read_rate = task.rate(pinned), task.cached_rate if cached else task.disk_rate

    def bring(names: Sequence[str]) -> float:
        """Seconds until units are on the device."""
        files = [name for name in names if name in read]
        return _size(units, _without(names, files)) / rate + _size(stored, files) / read_rate

    encode, bringing = task.encode_seconds, bring(encoder_out)
    encode = _beside(encode, bringing, slots) if encoder_way == "streamed" else encode + bringing
    forwards = memory.forwards(model, job)
    denoise = forwards * _beside(task.forward_seconds, bring(streamed), slots) + bring(evicted)
    moved = forwards * _size(blocks, streamed) + _size(transformer, evicted)
    moved += _size(encoder, encoder_out) if encoder_way == "resident" else 0
    decode = task.decode_seconds * (TILED if tiles else 1)

    def stage(name: str, weights: int, activations: int, seconds: float) -> Stage:
        return Stage(name, task.base_bytes + weights + activations, weights + model.shape.vae_bytes, seconds)

    def held_so(way: str, own: Mapping[str, int], resident: Sequence[str], kept: Sequence[str]) -> Held:
        from_host, from_files = ([name for name in names if name in own] for names in (waiting, read))
        return Held(way, tuple(resident), tuple(kept), tuple(from_host), tuple(from_files))

    return Holding(
        held_so(encoder_way, encoder, encoder_kept if encoder_way == "streamed" else staying, encoder_kept),
        held_so(transformer_way, transformer, resident, kept),
        (
            stage("encode", coming + held, encoding, encode + task.between_seconds),
            stage("denoise", computing + beside, denoising, denoise),
            stage("decode", held + _size(encoder, encoder_kept), decoding, decode + task.save_seconds),
        ),
        pinned + READER_BYTES,
        tiles,
        moved,
        slots,
        0 if cached else read_bytes,
    )


def _waiting(units: Mapping[str, int], wanted: Sequence[str], host: int) -> list[str]:
    """Of units that should wait in host memory, those that `host` bytes take in this order, if they do not take all."""
    return _fill(units, wanted, host if _size(units, wanted) <= host else host - PAGES_BYTES)


def _without(units: Iterable[str], those: Iterable[str]) -> list[str]:
    others = set(those)
    return [name for name in units if name not in others]


def _beside(computing: float, copying: float, slots: int) -> float:
    """Seconds of work that copies go on beside: the longer of both, and more where they take about as long.

    Measured on an H100: a forward of 0.089 s with 0.057 s of copies takes 0.096 s, with 0.129 s of them 0.137. With a
    single slot neither goes on beside the other.
    """
    if slots == 1:
        return computing + copying
    return float((computing**3 + copying**3) ** (1 / 3))


def _staying(units: Iterable[str]) -> list[str]:
    """Units in the order in which they are the last to go.

    The first so many of them, however many, lie evenly among all, so that copies of the others hide behind work (van
    der Corput's sequence: numbers by their bits read backwards). And what goes for another plan was the last to come,
    and lies together: torch gives back to the card what is free in one piece.
    """
    names = list(units)
    width = max(1, (len(names) - 1).bit_length())
    return sorted(names, key=lambda name: int(f"{names.index(name):0{width}b}"[::-1], 2))


def _fill(units: Mapping[str, int], order: Iterable[str], room: int) -> list[str]:
    """As many units as `room` bytes take, in this order; after one that is too large, smaller ones may still fit."""
    taken = []
    for name in order:
        if units[name] <= room:
            taken.append(name)
            room -= units[name]
    return taken


def _size(units: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(units[name] for name in names)
