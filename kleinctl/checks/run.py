"""Did a finished run go as it should? And will the disk keep up?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kleinctl import memory
from kleinctl.checks import Check, CouldNotCheck, check, run_checks
from kleinctl.problem import Evidence, Problem
from kleinctl.units import GIB, MIB, bytes_text, gib, seconds_text

if TYPE_CHECKING:
    from kleinctl.facts.run import FinishedPicture, FinishedRun
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.worker.protocol import Channel

#: A picture is slow that takes so many times the prediction, and so many seconds more.
SLOW_TIMES, SLOW_SECONDS = 5.0, 20.0
#: Share of a card's VRAM from which it counts as full.
FULL = 0.95
#: Tiles and overlaps of fewer pixels show seams.
TILE, OVERLAP = 512, 64
#: A stage of so many seconds that took no more VRAM than this for its work did it elsewhere.
IDLE_SECONDS, IDLE_BYTES = 2.0, 16 * MIB
#: Memory grows when it is so much larger after the last picture than after the third, and would be so if every picture
#: had added as much as the one in the middle: a plan that moves more of the weights to RAM takes it once. And the
#: least of the second half has to be above that of the first by half as much: where sizes take turns it is not.
GROWN_BYTES, GROWN_SHARE, GROWING_PICTURES = GIB, 0.2, 8
#: Colours between these bounds, so close together, and so alike in red, green and blue are washed out (0 to 255).
PALE_LOW, PALE_HIGH, PALE_RANGE, PALE_TINT = 32, 224, 64, 48
#: A picture so much of which is pure black shows nothing.
BLACK = 0.999
#: The hint where the models lie on a slow disk.
ON_AN_SSD = "KLEINCTL_HOME=/a/folder/on/an/SSD kleinctl install"


def run_problems(finished_run: FinishedRun, hardware: Hardware) -> list[Problem]:
    """What was odd about a run. `hardware` is as it was before."""
    known = {"finished_run": finished_run, "hardware": hardware}
    own = [each for each in globals().values() if isinstance(each, Check) and "finished_run" in each.wants]
    return [problem for result in run_checks(own, known) for problem in result.problems]


@check("black-picture")
def black_picture(finished_run: FinishedRun) -> Problem | None:
    """The pictures show something."""
    empty = [each for each in finished_run.pictures if _is_empty(each)]
    if not empty:
        return None
    colour = "black" if empty[0].pixels.black_share >= BLACK else "one single colour"
    return Problem(
        what=f"the picture is {colour}" if len(empty) == 1 else f"{len(empty)} pictures are {colour}",
        why="So it is when the model computes with broken numbers (NaN): damaged weights, or a precision that the "
        "card or a flag such as --fp16-vae or --use-sage-attention does not bear.",
        fix="kleinctl doctor --deep --fix   # hashes the files and replaces a damaged one; another seed may do as well",
        severity="warning",
        ref="D07",
        evidence=(Evidence("the picture's pixels", colour, "more than one colour"),),
    )


def _is_empty(picture: FinishedPicture) -> bool:
    pixels = picture.pixels
    flat = bool(pixels.channels) and all(each.deviation == 0 for each in pixels.channels)
    return flat or pixels.black_share >= BLACK


@check("washed-out")
def washed_out(finished_run: FinishedRun) -> Problem | None:
    """The pictures have contrast."""
    pale = [each for each in finished_run.pictures if _is_pale(each.pixels.channels)]
    if not pale:
        return None
    low = min(each.low for each in pale[0].pixels.channels)
    high = max(each.high for each in pale[0].pixels.channels)
    return Problem(
        what="the picture looks washed out" if len(pale) == 1 else f"{len(pale)} pictures look washed out",
        why=f"Nearly all of it lies between {low} and {high} of 0 to 255, without colour: so it is when latents reach "
        "the VAE without its statistics undone, or a VAE that is not the model's. Fog looks so too.",
        fix=f"kleinctl verify {finished_run.model}",
        severity="warning",
        ref="C12",
        evidence=(Evidence("the picture's pixels", f"{low} to {high}", f"a range over {PALE_RANGE}"),),
    )


def _is_pale(channels: tuple[Channel, ...]) -> bool:
    if not channels or all(each.deviation == 0 for each in channels):
        return False
    means = [each.mean for each in channels]
    return max(means) - min(means) <= PALE_TINT and all(
        each.low >= PALE_LOW and each.high <= PALE_HIGH and each.high - each.low <= PALE_RANGE for each in channels
    )


@check("prompt-cut")
def prompt_cut(finished_run: FinishedRun) -> Problem | None:
    """The model reads the whole prompt."""
    cut = next((each.prompt_cut for each in finished_run.pictures if each.prompt_cut is not None), None)
    if cut is None:
        return None
    return Problem(
        what="the end of the prompt was not read",
        why=f"The prompt is {cut.tokens} tokens long; the model reads {cut.limit}. Not read was: {cut.tail}",
        fix="shorten the prompt, or move what matters to its beginning",
        severity="warning",
        ref="D15",
        evidence=(Evidence("the prompt", f"{cut.tokens} tokens", f"at most {cut.limit}"),),
    )


@check("slow-run")
def slow_run(finished_run: FinishedRun, hardware: Hardware) -> Problem | None:
    """A picture takes about as long as this card needs for it."""
    seconds = min(
        (_work_seconds(each, first=not number) for number, each in enumerate(finished_run.pictures)), default=0
    )
    predicted = finished_run.predicted_seconds
    expected = seconds < max(predicted * SLOW_TIMES, predicted + SLOW_SECONDS)
    if finished_run.device == "cpu" or expected or any(_idle_stages(each) for each in finished_run.pictures):
        return None
    used = max((use.card_used_bytes for each in finished_run.pictures for use in each.stages.values()), default=0)
    full = finished_run.card_bytes and used >= finished_run.card_bytes * FULL
    cause, fix = _spilled(used, finished_run.card_bytes) if full else _held_back(hardware)
    return Problem(
        what=f"the picture took {seconds / max(predicted, 0.1):.0f} times as long as predicted",
        why=f"{seconds_text(seconds)} instead of {seconds_text(predicted)}. {cause}",
        fix=fix,
        severity="warning",
        ref="D05",
        evidence=(Evidence("seconds for a picture", seconds_text(seconds), f"about {seconds_text(predicted)}"),),
    )


def _work_seconds(picture: FinishedPicture, *, first: bool) -> float:
    """Seconds that a prediction counts: the first picture's reading of a cold disk, and the saving, are not."""
    without = ("save", "load") if first else ("save",)
    return sum(seconds for stage, seconds in picture.seconds.items() if stage not in without)


def _spilled(used: int, total: int) -> tuple[str, str]:
    return (
        f"The card was full ({gib(used)} of {gib(total)}): on Windows and WSL the driver then pages VRAM to memory "
        "(RAM) instead of saying so.",
        f"--vram-limit {max(1, int((total - 1.5 * GIB) / GIB))}GiB, or in the NVIDIA Control Panel, 3D settings: "
        "CUDA - Sysmem Fallback Policy, Prefer No Sysmem Fallback",
    )


def _held_back(hardware: Hardware) -> tuple[str, str]:
    throttled = hardware.gpu.throttled if hardware.gpu is not None else ()
    if throttled:
        return f"The card was held back by {' and '.join(throttled)}.", "plug in the charger, or let the card cool down"
    kind = _slow_kind(hardware)
    if kind:
        again = "what RAM has no room for is read from there again for each picture"
        return f"The card's memory was not full, and the models lie on {kind}: {again}.", ON_AN_SSD
    return "The card's memory was not full, so something else held it up: another program, heat or power.", "nvidia-smi"


@check("stage-on-cpu")
def stage_on_cpu(finished_run: FinishedRun) -> Iterator[Problem]:
    """Every stage runs on the card that was chosen."""
    if finished_run.device == "cpu":
        return
    idle = {stage: seconds for each in finished_run.pictures for stage, seconds in _idle_stages(each).items()}
    for stage, seconds in idle.items():
        yield Problem(
            what=f"{stage} did not run on the card",
            why=f"It took {seconds_text(seconds)}, in which the card had next to nothing to do; wanted was "
            f"{finished_run.device}.",
            fix=f"kleinctl run --backend staged-decode, and report it to the maker of {finished_run.backend}",
            severity="warning",
            ref="D19",
            evidence=(Evidence(f"the card during {stage}", "idle", f"work on {finished_run.device}"),),
        )


def _idle_stages(picture: FinishedPicture) -> dict[str, float]:
    """The stages that left the card idle, and their seconds."""
    found = {}
    for stage, seconds in picture.seconds.items():
        use = picture.stages.get(stage)
        works = stage in ("encode", "denoise", "decode") and seconds >= IDLE_SECONDS
        if works and use is not None and use.vram_rise_bytes < IDLE_BYTES and not use.gpu_percent:
            found[stage] = seconds
    return found


@check("load-spike")
def load_spike(finished_run: FinishedRun) -> Problem | None:
    """Loading the model takes no more VRAM than drawing with it."""
    uses = [each.stages for each in finished_run.pictures]
    loading = [finished_run.load, *(each["load"] for each in uses if "load" in each)]
    spike = max(use.vram_peak_bytes for use in loading)
    steady = max((use.vram_peak_bytes for each in uses for stage, use in each.items() if stage != "load"), default=0)
    if spike <= max(steady, finished_run.predicted_vram_bytes) * 1.1:
        return None
    return Problem(
        what=f"loading with {finished_run.backend} takes more VRAM than drawing",
        why=f"It held {gib(spike)} while loading and {gib(steady)} later; {gib(finished_run.predicted_vram_bytes)} "
        "were predicted. A smaller card runs out of memory before the first step.",
        fix="kleinctl run --backend staged-decode",
        severity="warning",
        ref="D04",
        evidence=(Evidence("VRAM while loading", gib(spike), f"at most {gib(steady)}"),),
    )


@check("tile-seams")
def tile_seams(finished_run: FinishedRun) -> Problem | None:
    """Tiles of the decoder are large enough, and overlap, so that their borders do not show."""
    tiling = next((each.tiling for each in finished_run.pictures if each.tiling), None)
    if tiling is None or (tiling[0] >= TILE and tiling[1] >= OVERLAP):
        return None
    return Problem(
        what="tiles may show in the picture",
        why=f"It was decoded in tiles of {tiling[0]} pixels that overlap by {tiling[1]}; seams and colour jumps stay "
        f"invisible from {TILE} and {OVERLAP} on.",
        fix="a smaller --size, which is decoded whole",
        severity="warning",
        ref="D06",
        evidence=(Evidence("tiles", f"{tiling[0]} px, overlap {tiling[1]}", f"{TILE} px, overlap {OVERLAP}"),),
    )


@check("memory-grows")
def memory_grows(finished_run: FinishedRun) -> Problem | None:
    """The worker's memory (RAM) stays as it is from picture to picture."""
    held = [each.rss_bytes for each in finished_run.pictures][2:]  # two to warm up
    if len(held) + 2 <= GROWING_PICTURES:
        return None
    steps = [later - earlier for earlier, later in itertools.pairwise(held)]
    half = len(held) // 2
    lasting = min(held[half:]) - min(held[:half])
    grown = min(held[-1] - held[0], 2 * lasting, sorted(steps)[len(steps) // 2] * len(steps))
    if grown < max(GROWN_BYTES, held[0] * GROWN_SHARE):
        return None
    return Problem(
        what="the worker's memory (RAM) grows with every picture",
        why=f"After the third picture it held {gib(held[0])}, after the last {gib(held[-1])}: memory that comes and "
        "goes leaves holes that the C library does not give back.",
        fix=f"--count {GROWING_PICTURES}, several times: each run starts a fresh worker",
        severity="warning",
        ref="D20",
        evidence=(Evidence("the worker's memory", gib(held[-1]), f"about {gib(held[0])}"),),
    )


@check("slow-disk")
def slow_disk(hardware: Hardware, model: Model) -> Problem | None:
    """The disk reads weights fast, and memory (RAM) keeps them for the next run."""
    disk, weights, kind = hardware.disks.get("models"), memory.weight_bytes(model), _slow_kind(hardware)
    if disk is not None and kind and weights > GIB:
        return _slow(
            model,
            f"Its {bytes_text(weights)} of weights lie on {kind}, and may take minutes to read before the first step.",
            ON_AN_SSD,
            Evidence(disk.path, kind, "an SSD"),
        )
    if GIB < hardware.ram_bytes < weights:
        return _slow(
            model,
            f"Its {bytes_text(weights)} of weights are more than the {gib(hardware.ram_bytes)} of memory (RAM), so "
            "each run reads them from the disk again; what the card has no room for either, each picture.",
            'kleinctl run --count 4 "a cat"   # starts once for several pictures',
            Evidence("memory (RAM)", gib(hardware.ram_bytes), gib(weights)),
        )
    if disk is None or (disk.rotational is None and not disk.network):
        raise CouldNotCheck("The system does not say what kind of disk the models are on.")
    return None


def _slow_kind(hardware: Hardware) -> str:
    """What the models lie on, where that is slow: a hard disk or a network drive; else nothing."""
    disk = hardware.disks.get("models")
    if disk is None:
        return ""
    return "a hard disk" if disk.rotational else "a network drive" if disk.network else ""


def _slow(model: Model, why: str, fix: str, evidence: Evidence) -> Problem:
    what = f"{model.name} will load slowly"
    return Problem(what, why, fix, severity="warning", ref="D22", evidence=(evidence,))
