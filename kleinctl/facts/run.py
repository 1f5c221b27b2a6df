"""What a job asks for, and how a finished run went. Both concern one run and are no part of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kleinctl.pictures import reference
from kleinctl.units import SQUARE
from kleinctl.worker.protocol import NO_PIXELS, NO_USE, Pixels, PromptCut, StageUse

if TYPE_CHECKING:
    from kleinctl.backends import Fit, Job
    from kleinctl.generate import Image, Result

#: `(red hair:1.3)`: weights as other programs read them. Text before the colon ends in no digit, so that `(at 12:30)`
#: and `(16:9)` are none.
_WEIGHT = re.compile(r"\([^()]{0,80}[^\d\s():]\s?:\s?\d(?:\.\d{1,2})?\)")


@dataclass(frozen=True)
class Reference:
    """A reference picture; width and height in pixels."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class JobFacts:
    """What one picture asks for. Sizes in pixels.

    `asked_width` and `asked_height` are as they were typed. `weighted` are passages of the prompt that are written as
    weights are elsewhere; the rest of the prompt is not here.
    """

    width: int
    height: int
    steps: int
    guidance: float
    asked_width: int
    asked_height: int
    references: tuple[Reference, ...] = ()
    weighted: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the picture itself."""
        return self.width * self.height // SQUARE**2


@dataclass(frozen=True)
class FinishedPicture:
    """A picture and what it took: `seconds` and `stages` by stage; the rest as the worker measured it."""

    width: int
    height: int
    seconds: Mapping[str, float] = field(hash=False)
    stages: Mapping[str, StageUse] = field(default_factory=dict, hash=False)
    rss_bytes: int = 0
    pixels: Pixels = NO_PIXELS
    prompt_cut: PromptCut | None = None
    tiling: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended well: on which torch device, what was predicted, and what each picture took.

    `predicted_seconds` is for one more picture, `predicted_vram_bytes` the peak. `load` is what loading took of the
    card before the first picture. `card_bytes` is all VRAM of the card, zero without one.
    """

    model: str
    backend: str
    device: str
    predicted_seconds: float
    predicted_vram_bytes: int
    pictures: tuple[FinishedPicture, ...]
    load: StageUse = NO_USE
    card_bytes: int = 0


def job_facts(job: Job, asked: tuple[int, int] | None = None) -> JobFacts:
    """The facts of `job`, whose size was typed as `asked`; opens the headers of its reference pictures.

    Raises:
        KleinctlError: one of them cannot be used.
    """
    width, height = asked or (job.width, job.height)
    pictures = [reference(path) for path in job.images]
    return JobFacts(
        width=job.width,
        height=job.height,
        steps=job.steps,
        guidance=job.guidance,
        asked_width=width,
        asked_height=height,
        references=tuple(Reference(each.path.name, each.width, each.height) for each in pictures),
        weighted=tuple(_WEIGHT.findall(job.prompt)),
    )


def finished_run(result: Result, fit: Fit, device: str) -> FinishedRun:
    """The facts of a run that ended well, beside what was predicted for it."""
    return FinishedRun(
        model=result.model,
        backend=result.backend,
        device=device,
        predicted_seconds=fit.seconds_next,
        predicted_vram_bytes=fit.vram_bytes,
        pictures=tuple(_picture(image) for image in result.images),
        load=result.load_stages.get("load", NO_USE),
        card_bytes=result.card_bytes,
    )


def _picture(image: Image) -> FinishedPicture:
    return FinishedPicture(
        width=image.job.width,
        height=image.job.height,
        seconds=image.seconds,
        stages=image.stages,
        rss_bytes=image.rss_bytes,
        pixels=image.pixels,
        prompt_cut=image.prompt_cut,
        tiling=image.tiling,
    )
