"""What control process and worker say to each other: one JSON object a line, on the worker's stdin and stdout.

The control process writes a `Setup`, then requests (`Load`, `Prepare`, `Generate`, `Calibrate`, `Close`). The worker
says `Hello`, then answers each request with any number of `Progress` and one `Loaded`, `Prepared`, `Made`, `Calibrated`
or `Failed`. `"is"` names the message; what it carries are the fields of the dataclass of that name. Whoever changes a
message changes the number in `PROTOCOL`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from kleinctl.backends import Budget, Job
from kleinctl.manifest import Model
from kleinctl.problem import Problem

if TYPE_CHECKING:
    from kleinctl.hardware.rates import Rates

PROTOCOL = "kleinctl.worker/5"
#: Longest line in bytes: prompts and records are far below.
MAX_LINE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Setup:
    """Where to import from: for each top-level module its `origin` (a file) and `folders`. Read by bootstrap.py."""

    protocol: str
    modules: dict[str, dict[str, Any]]
    #: Whether the kernel may kill the worker when the thread that started it ends.
    die_with_control: bool


@dataclass(frozen=True)
class Hello:
    """The worker's first words."""

    protocol: str
    kleinctl: str
    pid: int


@dataclass(frozen=True)
class Load:
    """Load `model`, whose parts lie in `folder`, with a backend of the module `plugin`.

    `parts` are their sha256 by id, `cache` the folder for what a session can make again, `job` the first that comes.
    """

    plugin: str
    backend: str
    model: Model
    folder: Path
    budget: Budget
    parts: dict[str, str] = field(default_factory=dict)
    cache: Path | None = None
    job: Job | None = None


@dataclass(frozen=True)
class StageUse:
    """What one stage took of the card. Bytes; zero without a card.

    `vram_peak_bytes` is the most that the process held, `vram_rise_bytes` the most that tensors took beyond what was
    there when the stage began, `card_used_bytes` what every process together held at its end. `gpu_percent` is how
    busy the card then was, as the driver says; None where it does not.
    """

    vram_peak_bytes: int = 0
    vram_rise_bytes: int = 0
    card_used_bytes: int = 0
    gpu_percent: int | None = None


@dataclass(frozen=True)
class Channel:
    """One colour of a picture, 0 to 255: its mean, standard deviation, and the values at 1 % and 99 % of its pixels."""

    mean: float
    deviation: float
    low: int
    high: int


@dataclass(frozen=True)
class Pixels:
    """What a picture's pixels say: red, green and blue, and the share of pixels that are black. Empty: not known."""

    channels: tuple[Channel, ...] = ()
    black_share: float = 0.0


NO_USE, NO_PIXELS = StageUse(), Pixels()


@dataclass(frozen=True)
class PromptCut:
    """A prompt of `tokens` tokens, of which the model read `limit`; `tail` are the words that it did not."""

    tokens: int
    limit: int
    tail: str


@dataclass(frozen=True)
class Loaded:
    """A model is loaded. `device` is the card's name or `cpu`; `versions` of Python and the packages that matter.

    `card_bytes` is all of the card's VRAM, zero without a card.
    """

    strategy: str
    dtype: str
    device: str
    versions: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    stages: dict[str, StageUse] = field(default_factory=dict)
    card_bytes: int = 0


@dataclass(frozen=True)
class Prepare:
    """Do ahead what the backend can for `jobs`, which come next."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Prepared:
    """What was done ahead. Seconds and `stages` are by stage; `warnings` are what the backend said meanwhile."""

    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, StageUse] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generate:
    """Make the picture of `job`. It is written to `partial`, and renamed to `output` when it is whole.

    With `first` no file is replaced: where `output` is taken by then, the next free name is, counted from `first`.
    `record` is what the control process knows of how it was made; the worker adds what it knows.
    """

    job: Job
    output: Path
    partial: Path
    record: dict[str, Any]
    first: Path | None = None


@dataclass(frozen=True)
class Made:
    """A picture is written. Seconds and `stages` are by stage; peaks are the worker's, from its start until now.

    `sha256` is of the file, `pixels_sha256` of its rows of RGB bytes. `rss_bytes` is the memory of its own that the
    worker holds now. `tiling` is the side and the overlap of the decoder's tiles in pixels, where it had tiles. The
    file is called `output`.
    """

    sha256: str
    pixels_sha256: str
    record: dict[str, Any]
    seconds: dict[str, float]
    peak_vram_bytes: int
    peak_vram_source: str
    peak_rss_bytes: int
    warnings: tuple[str, ...]
    stages: dict[str, StageUse] = field(default_factory=dict)
    rss_bytes: int = 0
    pixels: Pixels = NO_PIXELS
    prompt_cut: PromptCut | None = None
    tiling: tuple[int, int] | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Calibrate:
    """Time pieces of `model`, whose parts lie in `folder` in the layout `diffusers`, on `device`."""

    model: Model
    folder: Path
    device: str


@dataclass(frozen=True)
class Calibrated:
    """What was measured; the control process adds of which machine."""

    rates: Rates


@dataclass(frozen=True)
class Failed:
    """A request failed, and the worker lives. The traceback is in its log. `problem` is set where a backend said it."""

    error: str
    message: str
    stage: str
    problem: Problem | None = None


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in a stage: `load`, `encode`, `denoise`, `decode`, `save`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Close:
    """Free everything and end."""


Request = Load | Prepare | Generate | Calibrate | Close
Reply = Hello | Loaded | Prepared | Made | Calibrated | Failed | Progress
Message = Request | Reply

_MESSAGES = {
    kind.__name__: kind
    for kind in (
        *(Load, Prepare, Generate, Calibrate, Close),
        *(Hello, Loaded, Prepared, Made, Calibrated, Failed, Progress),
    )
}


def encode(message: Message) -> bytes:
    """One line for the pipe."""
    return json.dumps({"is": type(message).__name__, **pack(message)}).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """The message in `line`; None where it is none, such as a line that something printed before the worker began."""
    try:
        data = json.loads(line)
        return unpack(_MESSAGES[data.pop("is")], data)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def pack(thing: Any) -> Any:
    """Dataclasses, mappings, sequences and paths as JSON has them."""
    if is_dataclass(thing):
        return {each.name: pack(getattr(thing, each.name)) for each in fields(thing)}
    if isinstance(thing, Mapping):
        return {key: pack(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [pack(value) for value in thing]
    return str(thing) if isinstance(thing, Path) else thing


#: Kinds that are imported when one comes: few messages have them, and a hundredth of a second is saved.
_MODULES = {"Hardware": "kleinctl.hardware", "Rates": "kleinctl.hardware.rates"}


class _Later(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return getattr(importlib.import_module(_MODULES[name]), name)


@cache
def _hint(kind: type, name: str) -> Any:
    """The type of a field. Not by `get_type_hints`, which would import what stands at all the others."""
    return eval(kind.__annotations__[name], vars(sys.modules[kind.__module__]), _Later())  # noqa: S307


def unpack(kind: Any, data: Any) -> Any:
    """What `pack` made of a `kind`, by its type annotations.

    Raises:
        TypeError, LookupError: the data are of another shape.
    """
    if data is None:
        return None
    if is_dataclass(kind):
        build: Any = kind
        values = {each.name: data[each.name] for each in fields(kind) if each.name in data}
        for name, value in values.items():
            values[name] = None if value is None else unpack(_hint(build, name), value)
        return build(**values)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return unpack(next(each for each in inner if each is not type(None)), data)
    if origin is tuple:
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else inner
        return tuple(unpack(each, value) for each, value in zip(kinds, data, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: unpack(inner[1], value) for key, value in data.items()}
    return Path(data) if kind is Path else data
