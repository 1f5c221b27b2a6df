"""Both backends on klein-tiny: the same bits, the colours that were asked for, and what they say of a wrong job."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kleinctl import Budget, InstalledModel, Job, KleinctlError, manifest
from kleinctl.backends import Backend
from kleinctl.hardware import imagine
from kleinctl.plugins import Plugins
from kleinctl.units import GIB
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

TINY = InstalledModel(
    manifest.load(REPOSITORY / "manifests" / "klein-tiny.toml"), REPOSITORY / "manifests" / "klein-tiny"
)
#: Room for everything, for nothing, and for some of the blocks while the VAE decodes (it takes 43 MB).
PLENTY, NOTHING, SOME = 64 * GIB, 0, 50_000_000
CIRCLE = Job("a red circle on a blue background", 256, 256, seed=1, steps=4, guidance=1.0)

#: Colours as klein-tiny was taught them (tools/make_klein_tiny.py), those that a person tells apart at a glance.
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 200, 210),
    "blue": (40, 80, 210),
    "purple": (130, 60, 180),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "diamond", "hexagon")


def session(name: str, room: int, model: InstalledModel = TINY) -> Any:
    return Plugins(frozenset()).backend(name).thing.load(model, Budget(0, room, "cpu"))


def held(*ways: str, room: int) -> Any:
    """staged-decode with weights held in these ways, as it holds them on a card."""
    from kleinctl_plugins.staged_decode import Session

    return Session(TINY, Budget(0, room, "cpu"), ways)


def draw(session: Any, job: Job) -> Any:
    return session.generate(job, lambda stage, done, total: None)


@pytest.fixture(scope="module")
def sessions() -> Iterator[dict[str, Any]]:
    """Every backend and way of holding weights that a CPU can run."""
    found = {
        "offload": session("diffusers-offload", PLENTY),
        "resident": session("staged-decode", PLENTY),
        "staged": session("staged-decode", NOTHING),
        "streamed": held("streamed", room=NOTHING),
        "partly": held("streamed", room=SOME),
        "making way": held("resident", room=SOME),
    }
    yield found
    for each in found.values():
        each.close()


@pytest.fixture(scope="module")
def reference(sessions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.png"
    draw(sessions["resident"], CIRCLE).save(path)
    return path


def same(pictures: list[Any]) -> bool:
    return len({picture.tobytes() for picture in pictures}) == 1


def test_text_to_image_gives_the_same_bits_from_every_way_of_holding_weights(sessions):
    pictures = [draw(each, CIRCLE) for each in sessions.values()]
    assert same(pictures)
    strategies = [each.strategy for each in sessions.values()]
    assert strategies == ["cpu", "resident", "staged", "streamed", "streamed", "resident"]
    partly = sessions["partly"].transformer
    assert 0 < partly.resident_bytes() < partly.bytes


def test_edit_gives_the_same_bits_and_another_picture_than_without_the_reference(sessions, reference):
    edit = Job("make the circle green", 256, 256, seed=1, steps=4, guidance=1.0, images=(reference,))
    pictures = [draw(each, edit) for each in sessions.values()]
    assert same(pictures)
    plain = draw(sessions["resident"], Job("make the circle green", 256, 256, seed=1, steps=4, guidance=1.0))
    assert pictures[0].tobytes() != plain.tobytes()


def test_two_references_give_the_same_bits(sessions, reference):
    edit = Job("make it yellow", 128, 128, seed=1, steps=2, guidance=1.0, images=(reference, reference))
    assert same([draw(each, edit) for each in sessions.values()])


def test_guidance_of_a_base_model_gives_the_same_bits(tmp_path):
    """A copy of klein-tiny that does not say it is distilled runs with guidance, as base models do."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in TINY.folder.iterdir():
        (folder / path.name).symlink_to(path)
    index = (TINY.folder / "model_index.json").read_text()
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(index.replace('"is_distilled": true,', ""))
    base = InstalledModel(TINY.manifest, folder)
    job = Job("a red circle on a blue background", 128, 128, seed=3, steps=3, guidance=4.0)
    sessions = [session("diffusers-offload", PLENTY, base), session("staged-decode", NOTHING, base)]
    pictures = [draw(each, job) for each in sessions]
    assert same(pictures)
    distilled = session("staged-decode", NOTHING)
    assert draw(distilled, job).tobytes() != pictures[0].tobytes()


def fails_once(module: Any) -> Any:
    """Make a module run out of the card's memory the next time it is used."""
    import torch

    def hook(*given: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB.")

    handle = module.register_forward_pre_hook(hook)
    return handle


def test_memory_that_runs_out_while_denoising_means_a_smaller_plan_and_the_same_bits(sessions):
    tight = held("resident", "staged", room=PLENTY)
    fails_once(tight.transformer.module.single_transformer_blocks[1])
    picture = draw(tight, CIRCLE)
    assert same([picture, draw(sessions["offload"], CIRCLE)])
    assert tight.warnings[0].startswith("VRAM ran out with a plan for ")
    tight.close()


def test_memory_that_runs_out_while_decoding_costs_no_finished_step():
    tight = held("resident", room=PLENTY)
    fails_once(tight.vae.decoder)
    steps: list[int] = []
    tight.generate(CIRCLE, lambda stage, done, total: steps.append(done) if stage == "denoise" else None)
    assert steps == [0, 1, 2, 3, 4]  # each once
    assert tight.tiling == (512, 128)
    assert "decoded in tiles" in tight.warnings[0]
    draw(tight, CIRCLE)
    assert (tight.tiling, tight.warnings) == (None, [])
    tight.close()


def test_a_prompt_that_was_drawn_before_is_not_encoded_again(sessions):
    job = replace(CIRCLE, prompt="a white hexagon on a black background")
    told: list[str] = []
    first = sessions["staged"].generate(job, lambda stage, done, total: None)
    again = sessions["staged"].generate(job, lambda stage, done, total: told.append(f"{stage} {done}"))
    assert same([first, again])
    assert "encode 0" not in told and "encode 1" in told


def test_sizes_that_are_not_square_and_seeds_matter(sessions):
    wide = Job(CIRCLE.prompt, 256, 128, seed=1, steps=2, guidance=1.0)
    picture = draw(sessions["resident"], wide)
    assert picture.size == (256, 128)
    other = draw(sessions["resident"], Job(CIRCLE.prompt, 256, 128, seed=2, steps=2, guidance=1.0))
    assert picture.tobytes() != other.tobytes()


def nearest(pixel: tuple[float, ...]) -> str:
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True)))


def mean(picture: Any, box: tuple[int, int, int, int]) -> tuple[float, ...]:
    from PIL import ImageStat

    return tuple(ImageStat.Stat(picture.crop(box)).mean)


def test_random_prompts_have_their_colours_in_the_middle_and_at_the_rim(sessions):
    chooser = random.Random(20261122)
    wanted = chooser.sample([*itertools.product(SHAPES, itertools.permutations(COLOURS, 2))], 24)
    found = {}
    for seed, (shape, (colour, background)) in enumerate(wanted):
        prompt = f"a {colour} {shape} on a {background} background"
        picture = draw(sessions["resident"], Job(prompt, 256, 256, seed=seed, steps=4, guidance=1.0))
        rim = mean(picture, (0, 0, 256, 12)), mean(picture, (0, 244, 256, 256)), mean(picture, (0, 0, 12, 256))
        found[prompt] = nearest(mean(picture, (116, 116, 140, 140))), *{nearest(each) for each in rim}
    expected = {f"a {c} {s} on a {b} background": (c, b) for s, (c, b) in wanted}
    assert found == expected


def test_the_tokenizer_is_shown_so_that_the_unread_end_of_a_prompt_can_be_told(sessions):
    for name in ("offload", "resident"):
        ids = sessions[name].tokenizer("a red circle")["input_ids"]
        assert sessions[name].tokenizer.decode(ids) == "a red circle"


def test_a_reference_that_cannot_be_decoded_is_named(sessions, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    job = Job("make it blue", 64, 64, seed=1, steps=1, guidance=1.0, images=(broken,))
    with pytest.raises(KleinctlError) as caught:
        draw(sessions["resident"], job)
    assert str(broken) in caught.value.problem.what


def test_progress_goes_through_the_stages_in_their_order(sessions):
    for name, first in (("offload", "encode"), ("staged", "load")):
        told: list[tuple[str, int, int]] = []
        new = replace(CIRCLE, prompt=f"a green square for {name}")  # a prompt that is remembered is not encoded
        sessions[name].generate(new, lambda *event, told=told: told.append(event))
        stages = list(dict.fromkeys(stage for stage, _, _ in told))
        assert stages[0] == first
        assert [stage for stage in stages if stage != "load"] == ["encode", "denoise", "decode"]
        assert ("denoise", 4, 4) in told


def test_every_shipped_backend_keeps_the_interface():
    for offer in Plugins(frozenset()).backends.values():
        assert isinstance(offer.thing, Backend)
        fit = offer.thing.fit(TINY.manifest, imagine(None, 8 * GIB), CIRCLE)
        assert fit.fits
        assert fit.vram_bytes == 0
