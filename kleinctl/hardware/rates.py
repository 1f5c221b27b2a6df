"""What was measured on this machine by `kleinctl bench --calibrate`, and the file that keeps it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import atomic, documents
from kleinctl.problem import KleinctlError

if TYPE_CHECKING:
    from kleinctl.hardware.facts import Hardware

SCHEMA = "kleinctl.calibration/1"
FILE = "calibration.json"
#: A calibration is a page of numbers; what is longer is something else.
MAX_BYTES = 2**16
#: Between these lies what any machine reaches, in bytes, FLOP, tokens or pixels a second, or takes, in seconds.
LEAST, MOST = 1e-15, 1e18


@dataclass(frozen=True)
class Speed:
    """FLOP a second that a piece of a model reaches at a size: tokens for the transformer, pixels for the VAE."""

    size: int
    flops: float


@dataclass(frozen=True)
class Rates:
    """Measured rates; None, or no points, where nothing was measured.

    `card` and `driver` (empty: a processor) and `cpu` name what was measured, `model` the model in whose shape, `date`
    the day. `pinned`, `pageable` and `back` are bytes a second from pinned memory to the card, from pageable memory,
    and from the card to fresh pageable memory; `disk` and `cached` bytes a second read from a weights file, `disk_note`
    what kept it from being cold. `encode`, `forward` and `decode` are FLOP a second of the text encoder, of the
    transformer by tokens and of the VAE by pixels, as kleinctl/memory.py counts FLOP. `save_seconds` is the time of
    hashing, describing and writing one pixel of a picture as PNG, `start_seconds` of starting a worker and importing.
    """

    card: str = ""
    driver: str = ""
    cpu: str = ""
    model: str = ""
    date: str = ""
    pinned: float | None = None
    pageable: float | None = None
    back: float | None = None
    disk: float | None = None
    disk_note: str = ""
    cached: float | None = None
    encode: float | None = None
    forward: tuple[Speed, ...] = ()
    decode: tuple[Speed, ...] = ()
    save_seconds: float | None = None
    start_seconds: float | None = None

    def __post_init__(self) -> None:
        numbers = [value for value in vars(self).values() if isinstance(value, float)]
        points = [number for each in (*self.forward, *self.decode) for number in (each.size, each.flops)]
        if not all(LEAST < number < MOST for number in (*numbers, *points)):
            raise documents.unreadable("rates", "numbers above zero that a machine can reach", [*numbers, *points])

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self.date)

    def of(self, card: str | None) -> Rates:
        """These rates where they are those of `card` (None: the processor); else only what no card has a part in."""
        if self.card == (card or ""):
            return self
        alike = replace(self, pinned=None, pageable=None, back=None, encode=None, forward=(), decode=())
        return alike if self else NO_RATES


NO_RATES = Rates()


def flops_at(points: Sequence[Speed], size: float) -> float | None:
    """FLOP a second at a size: linear between measured points, as at the last beyond them; None without points.

    Below the first it falls with the size: what keeps small work slow is what each kernel costs, however small.
    """
    ordered = sorted(points, key=lambda point: point.size)
    if not ordered:
        return None
    if size <= ordered[0].size:
        return ordered[0].flops * size / ordered[0].size
    for low, high in itertools.pairwise(ordered):
        if size <= high.size:
            return low.flops + (high.flops - low.flops) * (size - low.size) / (high.size - low.size)
    return ordered[-1].flops


def read(home: Path) -> Rates:
    """What `write` kept in `home`; nothing where there is no file.

    Raises:
        KleinctlError, OSError, ValueError: it is no calibration.
    """
    path = home / FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return NO_RATES
    if len(text) > MAX_BYTES:
        raise ValueError("it is too long")
    document = documents.sized(json.loads(text), dict, FILE)
    if document.get("schema") != SCHEMA:
        raise ValueError(f"it is not {SCHEMA}")
    return documents.read(Rates, document.get("rates"), "rates")


def write(home: Path, rates: Rates) -> Path:
    """Keep `rates` in `home`, in place of what was there.

    Raises:
        OSError: it cannot be written.
    """
    path = home / FILE
    home.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(document(rates), indent=1) + "\n")
    return path


def document(rates: Rates) -> dict[str, Any]:
    """`kleinctl.calibration/1`."""
    return {"schema": SCHEMA, "rates": documents.plain(rates)}


def facts(home: Path) -> dict[str, Any]:
    """The rates by the name `Hardware` gives them; of a file that cannot be read, a sentence instead."""
    try:
        return {"rates": read(home)}
    except OSError as error:
        why = str(error.strerror)
    except (KleinctlError, ValueError, RecursionError):
        why = "it is not what kleinctl wrote"
    return {"remarks": (f"{FILE} is ignored: {why}; kleinctl bench --calibrate makes a new one",)}


def current(hardware: Hardware) -> tuple[Rates, str]:
    """The machine's rates where they are still its own; else none, and a sentence on why."""
    rates = hardware.rates
    if not rates:
        return rates, ""
    cards = [(gpu.name, gpu.driver or "") for gpu in hardware.gpus]
    if rates.card and (rates.card, rates.driver) not in cards:
        here = " and ".join(f"{name} with driver {driver}" for name, driver in cards) or "no card"
        why = f"was made on {rates.card} with driver {rates.driver}, and here is {here}"
    elif rates.cpu != hardware.cpu:
        why = f"was made on {rates.cpu}, and this is {hardware.cpu}"
    else:
        return rates, ""
    return NO_RATES, f"{FILE} is ignored: it {why}; kleinctl bench --calibrate makes a new one"
