"""Jobs that cannot come out well, as people ask for them, and what they read before anything runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kleinctl import manifest
from kleinctl.backends import Fit, Job
from kleinctl.checks.job import job_problems
from kleinctl.cli import options, steps
from kleinctl.environment import Environment
from kleinctl.facts.run import job_facts
from kleinctl.hardware import Hardware, imagine
from kleinctl.planner import default_job
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.units import GIB, asked_size, nearest_size, parse_size
from tests.conftest import REPOSITORY
from tests.test_cli import conforms

KLEIN, BASE = (manifest.load(REPOSITORY / "manifests" / f"{name}.toml") for name in ("klein-4b", "klein-base-4b"))
CARD = Hardware.from_json(
    json.loads((REPOSITORY / "tests/fixtures/hardware/rtx-4070-ti-super.json").read_text())["hardware"]
)
PROMPT = "a lighthouse (stormy sea) at 12:30, in 16:9 (John 3:16)"


def asked(model=KLEIN, hardware=CARD, asked=None, fit=None, environment=None, **changes):
    job = default_job(model, **{"prompt": PROMPT, **changes})
    found = job_problems(job_facts(job, asked), job, model, hardware, fit, environment)
    assert all(problem.evidence and problem.ref for problem in found)
    return {problem.name: problem for problem in found}


def picture(path: Path, width: int, height: int) -> Path:
    Image.new("1", (width, height)).save(path, "PNG")
    return path


@pytest.mark.parametrize("model", [KLEIN, BASE])
def test_a_job_with_the_models_own_settings(model, tmp_path):
    environment = Environment(Path("/env/bin/python"), {"diffusers": "0.42.1"}, managed=True)
    fit = Fit(8 * GIB, 2 * GIB, 0, 30.0, 10.0, True, "staged")
    reference = picture(tmp_path / "one.png", 1024, 1024)
    assert asked(model, fit=fit, environment=environment, images=(reference,)) == {}


# Size


@pytest.mark.parametrize(
    ("typed", "drawn"),
    [
        ("1000x700", (992, 704)),
        ("1920x1080", (1920, 1088)),
        ("100", (96, 96)),
        ("5x5", (16, 16)),
        ("1024x768", (1024, 768)),
        ("1024×760", (1024, 768)),
    ],
)
def test_a_size_that_the_model_cannot_draw_is_rounded(typed, drawn):
    assert parse_size(nearest_size(typed)) == drawn


@pytest.mark.parametrize("typed", ["banana", "0x64", "0", "-16x16", "99999999", "64x64x64", "1e3"])
def test_what_is_no_size_stays_a_misuse(typed):
    with pytest.raises(Misuse):
        parse_size(nearest_size(typed))


@pytest.mark.parametrize("typed", ["123456x16", "1e3x5", "512 by 512"])
def test_what_is_no_size_is_told_as_it_was_typed(typed):
    with pytest.raises(Misuse) as raised:
        parse_size(nearest_size(typed))
    assert repr(typed) in raised.value.problem.what


def test_the_longest_side_of_five_digits_stays_one():
    assert nearest_size("99999x16") == "99984x16"


def test_a_full_hd_picture_is_told_to_be_rounded():
    problem = asked(asked=asked_size("1920x1080"), width=1920, height=1088)["size-rounded"]
    assert problem.what == "1920x1080 is drawn as 1920x1088"
    assert "squares of 16 pixels" in problem.why
    assert (problem.fix, problem.severity) == ("--size 1920x1088", "warning")


def test_a_square_typed_as_one_number():
    assert asked_size("1024") == (1024, 1024)
    assert asked(asked=(1024, 1024), width=1024, height=1024) == {}


# Prompt


@pytest.mark.parametrize("weight", ["(red hair:1.3)", "(masterpiece: 1.2)", "(blurry:0)"])
def test_weights_as_in_stable_diffusion(weight):
    problem = asked(prompt=f"a portrait, {weight}, outdoors")["prompt-weights"]
    assert problem.what == f"{weight} in the prompt is no weight here"
    assert "reads them as words" in problem.why
    assert problem.fix.startswith(f'write "{weight[1:].split(":")[0]}" without')


@pytest.mark.parametrize("plain", [PROMPT, "(at 12:30)", "(16:9)", "(a sign: 20 % off)", ":-) (", "(" * 5000 + ":1"])
def test_brackets_and_colons_that_are_no_weights(plain):
    assert asked(prompt=plain) == {}


# Settings of the other variant


def test_guidance_with_the_distilled_model():
    problem = asked(guidance=4.0)["guidance-on-distilled"]
    assert problem.what == "--guidance 4 does nothing good with klein-4b"
    assert "diffusers ignores" in problem.why and "burns the colours" in problem.why
    assert problem.fix == "--guidance 1"
    assert asked(BASE, guidance=4.0) == {}


@pytest.mark.parametrize("wrong", [{"steps": 4}, {"guidance": 1.0}, {"steps": 4, "guidance": 1.0}])
def test_the_distilled_models_settings_with_the_base_model(wrong):
    problem = asked(BASE, **wrong)["steps-on-base"]
    assert problem.what.endswith("are too little for klein-base-4b")
    assert problem.why.endswith("28 steps at guidance 4 are its own.")
    assert problem.fix == "--steps 28 --guidance 4"


# Reference pictures


def test_a_photo_of_a_phone_as_reference(tmp_path):
    problem = asked(images=(picture(tmp_path / "photo.png", 4032, 3024),))["references-large"]
    assert problem.what == "photo.png is large"
    assert problem.why.startswith("photo.png (4032x3024) is shrunk to one megapixel, all that the model sees.")
    assert "4096 tokens of reference pictures beside the picture's 4096" in problem.why
    assert "1.9 times as long" in problem.why


def test_several_references_for_a_small_picture(tmp_path):
    images = tuple(picture(tmp_path / f"{number}.png", 1024, 1024) for number in range(2))
    problem = asked(images=images, width=512, height=512)["references-large"]
    assert problem.what == "the reference pictures are large"
    assert "6.3 times as long" in problem.why
    assert asked(images=tuple(picture(tmp_path / f"{n}.png", 256, 256) for n in range(2)), width=512, height=512) == {}


@pytest.mark.parametrize("managed", [True, False])
def test_an_edit_with_a_diffusers_that_mixes_dtypes(managed, tmp_path):
    old = Environment(Path("/env/bin/python"), {"diffusers": "0.37.1"}, managed=managed, name="other")
    job = {"images": (picture(tmp_path / "a.png", 64, 64),)}
    problem = asked(environment=old, **job)["diffusers-edit-dtype"]
    assert problem.what == "diffusers 0.37.1 cannot edit pictures in bf16"
    assert "0.38.0 or newer" in problem.why and problem.severity == "error"
    assert problem.remedy.action == ("rebuild-environment" if managed else "install-packages")
    assert asked(environment=old) == {}
    for fine in ("0.38.0", "0.42.1", "of my own"):
        assert asked(environment=replace(old, packages={"diffusers": fine}), **job) == {}


# Memory


def test_a_picture_too_large_to_be_decoded():
    problem = asked(hardware=imagine("GTX 1650", 8 * GIB, None), width=8192, height=8192)["decode-memory"]
    assert problem.what == "decoding 8192x8192 takes more VRAM than is free"
    assert "the VAE's, needs 3" in problem.why and "even in tiles" in problem.why and "can be used" in problem.why
    assert asked(width=1536, height=1536) == {}


def test_a_card_of_4_gb_that_decodes_in_tiles_is_not_told_that_it_cannot():
    assert asked(hardware=imagine("GTX 1650", 8 * GIB, None)) == {}


def test_what_does_not_fit_says_which_stage_could_never(capsys):
    error = KleinctlError(Problem("klein-4b does not fit", "It needs more.", "kleinctl plan", name="does-not-fit"))
    steps.show_misfit(error, KLEIN, imagine("GTX 1650", 8 * GIB, None), {"width": 8192, "height": 8192})
    assert "error[decode-memory]: decoding 8192x8192 takes more VRAM than is free" in capsys.readouterr().err
    steps.show_misfit(error, KLEIN, CARD, {"width": 1024, "height": 1024})
    assert capsys.readouterr().err == ""


def test_a_plan_that_fills_memory_without_swap():
    fit = Fit(8 * GIB, int(CARD.ram_available_bytes * 0.95), 0, 30.0, 10.0, True, "offload")
    problem = asked(fit=fit, hardware=replace(CARD, swap_bytes=0))["memory-full"]
    assert problem.what == "memory (RAM) will be nearly full" and problem.severity == "warning"
    assert "there is no swap" in problem.why
    assert asked(fit=fit, hardware=replace(CARD, swap_bytes=GIB)) == {}


@pytest.mark.parametrize("available", [12, 14])
def test_the_hint_for_memory_that_is_nearly_full_helps_where_staged_decode_fills_it(available):
    [staged] = [offer.thing for offer in Plugins().backends_for("staged-decode")]
    full = replace(imagine("GTX 1650", 16 * GIB, None), ram_available_bytes=available * GIB, swap_bytes=0)
    full = replace(full, ram_available_bytes=int(staged.fit(KLEIN, full, default_job(KLEIN)).ram_bytes / 0.95))
    fix = asked(fit=staged.fit(KLEIN, full, default_job(KLEIN)), hardware=full)["memory-full"].fix
    [limit] = re.findall(r"^--backend staged-decode --ram-limit (\S+) ", fix)
    limited = options.limited(full, None, limit)
    assert asked(fit=staged.fit(KLEIN, limited, default_job(KLEIN)), hardware=limited) == {}


def test_the_rest_of_the_prompt_stays_out_of_the_facts():
    job = Job("a secret (wish:1.2)", 64, 64, 1, 4, 1.0)
    assert "secret" not in repr(job_facts(job))


# As a user sees it


@pytest.mark.slow
def test_everything_odd_about_a_job_is_told_and_the_picture_made(kleinctl, tmp_path):
    assert kleinctl("install", "--model", "klein-tiny").exit_code == 0
    prompt = "a (red circle:1.3) on a blue background"
    odd = ("--size", "100x70", "--guidance", "4", "--seed", "3", "--model", "klein-tiny")
    answer = kleinctl("run", prompt, *odd, "--json")
    assert answer.exit_code == 0, answer.stderr
    assert "warning[size-rounded]: 100x70 is drawn as 96x64" in answer.stderr
    assert "hint: --size 96x64" in answer.stderr
    assert "warning[prompt-weights]: (red circle:1.3) in the prompt is no weight here" in answer.stderr
    assert "warning[guidance-on-distilled]: --guidance 4 does nothing good with klein-tiny" in answer.stderr
    document = conforms(answer.stdout)
    sizes, weights, guidance = document["warnings"]
    assert sizes.startswith("100x70 is drawn as 96x64: The model draws squares of 16 pixels;")
    assert weights.startswith("(red circle:1.3)") and guidance.startswith("--guidance 4")
    assert (document["record"]["width"], document["record"]["height"]) == (96, 64)
    plain = kleinctl("run", "a red circle on a blue background", "--size", "96x64", "--model", "klein-tiny")
    assert plain.exit_code == 0 and "warning" not in plain.stderr
