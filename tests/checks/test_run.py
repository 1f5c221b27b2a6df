"""Runs that ended, and not as they should have."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw, ImageEnhance

from kleinctl import documents, manifest
from kleinctl.checks import run_checks
from kleinctl.checks.run import run_problems, slow_disk
from kleinctl.facts.run import FinishedPicture, FinishedRun
from kleinctl.hardware import Disk, Hardware
from kleinctl.units import GIB, MIB
from kleinctl.worker.looks import pixels_of
from kleinctl.worker.protocol import NO_PIXELS, PromptCut, StageUse
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures" / "hardware"
KLEIN = manifest.load(REPOSITORY / "manifests" / "klein-4b.toml")
SECONDS = {"load": 4.0, "encode": 0.4, "denoise": 3.0, "decode": 0.6, "save": 0.1}
STAGES = {
    "load": StageUse(8 * GIB, 8 * GIB, 9 * GIB, 5),
    "encode": StageUse(6 * GIB, 300 * MIB, 7 * GIB, 80),
    "denoise": StageUse(9 * GIB, 700 * MIB, 10 * GIB, 99),
    "decode": StageUse(9 * GIB, 2 * GIB, 10 * GIB, 90),
}


def machine(name: str) -> Hardware:
    return Hardware.from_json(json.loads((FIXTURES / f"{name}.json").read_text())["hardware"])


CARD = machine("rtx-4070-ti-super")
FINE = FinishedPicture(1024, 1024, SECONDS, STAGES, rss_bytes=2 * GIB)


def found(*pictures, hardware=CARD, **changes):
    values = {"predicted_seconds": 4.0, "predicted_vram_bytes": 9 * GIB, "card_bytes": 16 * GIB, **changes}
    run = FinishedRun("klein-4b", "staged-decode", values.pop("device", "cuda:0"), pictures=pictures, **values)
    assert documents.read(FinishedRun, json.loads(json.dumps(documents.plain(run))), "run") == run
    problems = run_problems(run, hardware)
    assert all(problem.evidence and problem.ref and problem.severity == "warning" for problem in problems)
    return {problem.name: problem for problem in problems}


def looks(image: Image.Image) -> FinishedPicture:
    return replace(FINE, pixels=pixels_of(image.convert("RGB")))


def test_a_run_as_it_should_be():
    assert found(FINE, FINE) == {}


# The picture


@pytest.mark.parametrize(("colour", "word"), [((0, 0, 0), "black"), ((127, 127, 127), "one single colour")])
def test_a_picture_of_broken_numbers(colour, word):
    """NaN is cast to black; a decoder that clips it may give grey."""
    problem = found(looks(Image.new("RGB", (64, 64), colour)))["black-picture"]
    assert problem.what == f"the picture is {word}"
    assert "(NaN)" in problem.why
    assert problem.fix.startswith("kleinctl doctor --deep --fix")


def test_several_black_pictures_and_one_that_is_well():
    black = looks(Image.new("RGB", (64, 64)))
    assert found(black, FINE, black)["black-picture"].what == "2 pictures are black"


def test_a_picture_decoded_without_the_vaes_statistics():
    """Its contrast and colour are gone: everything is drawn towards grey."""
    photo = Image.effect_mandelbrot((128, 128), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    pale = Image.blend(photo, Image.new("RGB", photo.size, (128, 128, 128)), 0.8)
    problem = found(looks(pale))["washed-out"]
    assert problem.what == "the picture looks washed out"
    assert "statistics undone" in problem.why
    assert found(looks(photo)) == {}


def test_pictures_that_are_plain_and_meant_so():
    """Shapes of klein-tiny's colours on any ground, even their own; night, snow and noise."""
    colours = {"red": (220, 40, 40), "yellow": (250, 220, 50), "cyan": (60, 200, 210), "blue": (40, 80, 210)}
    colours |= {"purple": (130, 60, 180), "black": (20, 20, 20), "white": (250, 250, 250), "green": (40, 160, 70)}
    random.seed(1)
    for ground in colours.values():
        for colour in colours.values():
            image = Image.new("RGB", (64, 64), ground)
            ImageDraw.Draw(image).ellipse((16, 16, 48, 48), colour)
            image.putpixel((0, 0), (ground[0] + 1, ground[1], ground[2]))  # a model's ground is never quite even
            assert found(looks(image)) == {}, (ground, colour)
    night = Image.new("RGB", (64, 64))
    ImageDraw.Draw(night).ellipse((2, 2, 8, 8), (250, 250, 220))
    noise = Image.frombytes("RGB", (64, 64), random.randbytes(64 * 64 * 3))
    dull = ImageEnhance.Contrast(noise).enhance(0.5)
    assert found(looks(night), looks(noise), looks(dull)) == {}


def test_the_shipped_picture_of_klein_tiny():
    with Image.open(REPOSITORY / "docs" / "klein-tiny.png") as image:
        assert found(looks(image)) == {}


def test_pixels_in_figures():
    image = Image.new("RGB", (10, 10), (0, 0, 0))
    image.paste((100, 200, 0), (0, 0, 10, 5))
    pixels = pixels_of(image)
    assert pixels.black_share == 0.5
    red, green, blue = pixels.channels
    assert (red.mean, red.deviation, red.low, red.high) == (50, 50, 0, 100)
    assert (green.mean, blue.high) == (100, 0)


def test_a_picture_decoded_in_small_tiles():
    problem = found(replace(FINE, tiling=(256, 32)))["tile-seams"]
    assert problem.what == "tiles may show in the picture"
    assert "tiles of 256 pixels that overlap by 32" in problem.why
    assert found(replace(FINE, tiling=(512, 128))) == {}


def test_a_prompt_that_was_cut():
    cut = PromptCut(600, 512, "and a small red boat at the horizon")
    problem = found(replace(FINE, prompt_cut=cut))["prompt-cut"]
    assert problem.what == "the end of the prompt was not read"
    assert problem.why == (
        "The prompt is 600 tokens long; the model reads 512. Not read was: and a small red boat at the horizon"
    )


# Time


def slow(**stages):
    return replace(FINE, seconds={**SECONDS, "denoise": 300.0}, stages={**STAGES, **stages})


def test_a_windows_driver_that_pages_vram_to_memory():
    problem = found(slow(denoise=StageUse(15 * GIB, GIB, int(15.8 * GIB), 100)))["slow-run"]
    assert problem.what == "the picture took 75 times as long as predicted"
    assert "5 min 1 s instead of 4.0 s. The card was full (15.8 GiB of 16.0 GiB)" in problem.why
    assert problem.fix.startswith("--vram-limit 14GiB") and "Prefer No Sysmem Fallback" in problem.fix


def test_a_laptop_without_its_charger():
    gpu = replace(CARD.gpus[0], throttled=("power",))
    problem = found(slow(), hardware=replace(CARD, gpus=(gpu,)))["slow-run"]
    assert "The card was held back by power." in problem.why


def test_weights_that_are_read_from_a_hard_disk_in_every_step():
    disk = Disk("/models", 10**12, 10**12, rotational=True)
    problem = found(slow(), hardware=replace(CARD, disks={"models": disk}))["slow-run"]
    assert "the models lie on a hard disk: what RAM has no room for is read from there again" in problem.why
    assert "SSD" in problem.fix and "another program" not in problem.why


def test_a_card_that_something_else_keeps_busy():
    assert "another program" in found(slow())["slow-run"].why


def test_only_the_first_picture_waited_for_the_disk():
    first = replace(FINE, seconds={**SECONDS, "load": 200.0})
    assert found(first, FINE) == {}
    assert found(slow(), FINE) == {}  # the next one was as fast as it should be
    assert found(slow(), device="cpu", card_bytes=0) == {}


def test_a_decoder_left_on_the_cpu():
    idle = replace(FINE, seconds={**SECONDS, "decode": 18.0}, stages={**STAGES, "decode": StageUse(9 * GIB, 0, 0, 0)})
    problem = found(idle)["stage-on-cpu"]
    assert problem.what == "decode did not run on the card"
    assert "slow-run" not in found(replace(idle, seconds={**SECONDS, "decode": 200.0}))  # one cause, one problem
    assert problem.why == "It took 18 s, in which the card had next to nothing to do; wanted was cuda:0."
    assert found(idle, device="cpu", card_bytes=0) == {}


def test_an_encoder_left_on_the_cpu_whose_result_is_moved_to_the_card():
    use = StageUse(6 * GIB, 2 * 512 * 7680 * 2, 7 * GIB, 0)
    idle = replace(FINE, seconds={**SECONDS, "encode": 25.0}, stages={**STAGES, "encode": use})
    assert found(idle)["stage-on-cpu"].what == "encode did not run on the card"
    busy = replace(FINE, seconds={**SECONDS, "encode": 25.0}, stages={**STAGES, "encode": replace(use, gpu_percent=97)})
    assert "stage-on-cpu" not in found(busy)


# Memory


def test_a_loader_that_takes_more_than_drawing_does():
    spike = {**STAGES, "load": StageUse(15 * GIB, 15 * GIB, 16 * GIB, 5)}
    problem = found(replace(FINE, stages=spike))["load-spike"]
    assert problem.what == "loading with staged-decode takes more VRAM than drawing"
    assert "It held 15.0 GiB while loading and 9.0 GiB later" in problem.why
    assert "load-spike" in found(FINE, load=StageUse(15 * GIB))


def test_memory_that_grows_over_many_pictures():
    grows = [replace(FINE, rss_bytes=int((2 + number * 0.4) * GIB)) for number in range(12)]
    problem = found(*grows)["memory-grows"]
    assert problem.what == "the worker's memory (RAM) grows with every picture"
    assert "After the third picture it held 2.8 GiB, after the last 6.4 GiB" in problem.why
    assert found(*grows[:8]) == {}
    rises_once = [replace(FINE, rss_bytes=(2 if number < 6 else 6) * GIB) for number in range(12)]
    assert found(*rises_once) == {}
    smaller_plan = [replace(FINE, rss_bytes=(6 if number < 6 else 9) * GIB + number * 4096) for number in range(12)]
    assert found(*smaller_plan) == {}
    for many, sizes in ((13, 2), (14, 2), (12, 4)):
        in_turn = [replace(FINE, rss_bytes=(2 + 3 * (number % sizes)) * GIB) for number in range(many)]
        assert found(*in_turn) == {}


# The disk


def disks(hardware=CARD, **changes):
    disk = replace(Disk("/models", 10**12, 10**12), **changes)
    [result] = run_checks([slow_disk], {"hardware": replace(hardware, disks={"models": disk}), "model": KLEIN})
    return [(problem.name, problem.what, problem.why) for problem in result.problems]


def test_weights_on_a_disk_that_is_slow():
    [(name, what, why)] = disks(rotational=True)
    assert (name, what) == ("slow-disk", "klein-4b will load slowly")
    assert why == ("Its 16.0 GB of weights lie on a hard disk, and may take minutes to read before the first step.")
    assert "network drive" in disks(network=True)[0][2]
    assert disks() == disks(rotational=False) == []


def test_a_disk_of_which_nothing_is_known_is_not_called_fast():
    [result] = run_checks([slow_disk], {"hardware": replace(CARD, disks={}), "model": KLEIN})
    assert (result.status, result.why) == ("skipped", "The system does not say what kind of disk the models are on.")


def test_less_memory_than_weights():
    [(_, _, why)] = disks(replace(CARD, ram_bytes=8 * GIB))
    assert "16.0 GB of weights are more than the 8.0 GiB of memory" in why
    assert why.endswith("; what the card has no room for either, each picture.")
    assert disks(replace(CARD, ram_bytes=0)) == []


def test_pixels_that_nobody_counted_are_no_black_picture():
    assert found(replace(FINE, pixels=NO_PIXELS)) == {}
