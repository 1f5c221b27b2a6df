"""Both backends on klein-tiny: the same bits, the colours that were asked for, and what they say of a wrong job."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kleinctl_plugins import holding

from kleinctl import Budget, InstalledModel, Job, KleinctlError, manifest, memory
from kleinctl.backends import Backend
from kleinctl.hardware import imagine
from kleinctl.plugins import Plugins
from kleinctl.units import GIB
from kleinctl.worker.device import settle_processor
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


def held(*ways: str, room: int, host: int = PLENTY) -> Any:
    """staged-decode with weights held in these ways, as it holds them on a card beside `host` bytes of RAM for them."""
    from kleinctl_plugins.staged_decode import Session

    session = Session(TINY, Budget(0, room + memory.PROCESS_BYTES, "cpu"), ways)
    session._host = host + holding.READER_BYTES
    return session


def on_device(session: Any) -> int:
    """Bytes of weights on the device."""
    units = [*session.encoder.units.values(), *session.transformer.units.values()]
    return sum(unit.bytes for unit in units if unit.device is not None)


def draw(session: Any, job: Job) -> Any:
    return session.generate(job, lambda stage, done, total: None)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """As in the worker, so that no first cosine of two threads has half of its digits."""
    import torch  # noqa: F401

    settle_processor()


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
        "from files": held("streamed", room=SOME, host=NOTHING),
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
    assert strategies == ["cpu", "resident", "staged", "streamed", "streamed", "resident", "streamed from files"]
    there = [unit.device is not None for unit in sessions["partly"].transformer.units.values()]
    assert any(there) and not all(there)


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


def fails(module: Any, times: int = 1, words: str = "") -> None:
    """Make a module run out of the card's memory the next times it is used."""
    import torch

    left = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB."), RuntimeError(words)]
    left = [left[bool(words)]] * times

    def hook(*given: Any) -> None:
        if left:
            raise left.pop()

    module.register_forward_pre_hook(hook)


def test_memory_that_runs_out_while_denoising_means_a_smaller_plan_and_the_same_bits(sessions):
    tight = held("resident", "staged", room=PLENTY)
    fails(tight.transformer.module.single_transformer_blocks[1])
    picture = draw(tight, CIRCLE)
    assert same([picture, draw(sessions["offload"], CIRCLE)])
    assert tight.warnings[0].startswith("VRAM ran out with a plan for ")
    quick = replace(CIRCLE, steps=1)
    strategies = []
    for _ in range(10):
        draw(tight, quick)
        strategies.append(tight.strategy)
    assert strategies[0] != "resident" and strategies[-1] == "resident"  # the memory may be there again
    tight.close()


@pytest.mark.parametrize("words", ["", "GET was unable to find an engine to execute this computation"])
def test_memory_that_runs_out_while_decoding_means_that_weights_make_way_and_the_same_bits(sessions, words):
    tight = held("resident", room=PLENTY)
    fails(tight.vae.decoder, words=words)
    there = []
    tight.vae.decoder.register_forward_pre_hook(lambda *given: there.append(on_device(tight)))
    picture = draw(tight, CIRCLE)
    assert same([picture, draw(sessions["offload"], CIRCLE)])
    assert (tight.tiling, there) == (None, [0])
    assert tight.warnings == ["VRAM ran out while the picture was decoded; weights made way for it"]
    assert on_device(tight)  # they came back
    tight.close()
    assert tight.encoder.host_bytes == tight.transformer.host_bytes == 0
    tight.close()


def test_memory_that_is_gone_when_the_weights_come_back_costs_no_picture(sessions, monkeypatch):
    import torch

    tight = held("resident", room=SOME)

    def gone(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB.")

    picture = tight.generate(
        CIRCLE, lambda stage, done, total: (stage, done) == ("decode", 1) and monkeypatch.setattr(tight, "_hold", gone)
    )
    monkeypatch.undo()
    assert same([picture, draw(sessions["offload"], CIRCLE)])
    tight.close()


def test_memory_that_runs_out_while_decoding_costs_no_finished_step():
    tight = held("resident", room=PLENTY)
    wide = replace(CIRCLE, width=528)
    fails(tight.vae.decoder, times=2)
    steps: list[int] = []
    tight.generate(wide, lambda stage, done, total: steps.append(done) if stage == "denoise" else None)
    assert steps == [0, 1, 2, 3, 4]  # each once
    assert tight.tiling == (512, 128)
    assert "decoded in tiles" in tight.warnings[1]
    draw(tight, CIRCLE)
    assert (tight.tiling, tight.warnings) == (None, [])
    tight.close()


def test_a_picture_that_is_one_tile_is_never_said_to_be_of_several():
    tight = held("resident", room=PLENTY)
    fails(tight.vae.decoder, times=2)
    picture = draw(tight, CIRCLE)
    assert tight.tiling is None and not any("tiles" in each for each in tight.warnings)
    assert same([picture, draw(tight, CIRCLE)])
    tight.close()


def test_a_prompt_that_was_drawn_before_is_not_encoded_again(sessions):
    job = replace(CIRCLE, prompt="a white hexagon on a black background")
    told: list[str] = []
    first = sessions["staged"].generate(job, lambda stage, done, total: None)
    again = sessions["staged"].generate(job, lambda stage, done, total: told.append(f"{stage} {done}"))
    assert same([first, again])
    assert "encode 0" not in told and "encode 1" in told


def remembering(cache: Path, **parts: str) -> InstalledModel:
    """klein-tiny with a folder for what can be made again."""
    return replace(TINY, parts={part.id: part.sha256 for part in TINY.manifest.parts} | parts, cache=cache)


def encodes(session: Any, job: Job) -> tuple[Any, bool]:
    """The picture, and whether the text encoder was needed for it."""
    told: list[str] = []
    picture = session.generate(job, lambda stage, done, total: told.append(f"{stage} {done}"))
    return picture, "encode 0" in told


def test_a_prompt_of_yesterday_is_not_encoded_again(sessions, tmp_path):
    pictures = []
    for expected in (True, False):
        new = session("staged-decode", NOTHING, remembering(tmp_path))
        picture, encoded = encodes(new, CIRCLE)
        assert encoded is expected
        assert (new.encoder.host_bytes, [unit for unit in new.encoder.units.values() if unit.device is not None]) == (
            0,
            [],
        )
        pictures.append(picture)
        new.close()
    assert same([*pictures, draw(sessions["offload"], CIRCLE)])


def test_another_text_encoder_does_not_take_the_embeddings_of_the_first(tmp_path):
    first = session("staged-decode", PLENTY, remembering(tmp_path))
    assert encodes(first, CIRCLE)[1]
    first.close()
    other = session("staged-decode", PLENTY, remembering(tmp_path, **{"text-encoder": "0" * 64}))
    assert encodes(other, CIRCLE)[1]
    other.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:1000],
        lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],  # one bit, and the form is right
    ],
    ids=["cut", "a-bit"],
)
def test_a_damaged_or_foreign_file_among_the_embeddings_is_encoded_anew(damage, sessions, tmp_path):
    first = session("staged-decode", PLENTY, remembering(tmp_path))
    draw(first, CIRCLE)
    first.close()
    [kept] = (tmp_path / "embeddings").glob("*.safetensors")
    kept.write_bytes(damage(kept.read_bytes()))
    again = session("staged-decode", PLENTY, remembering(tmp_path))
    picture, encoded = encodes(again, CIRCLE)
    again.close()
    assert encoded and same([picture, draw(sessions["offload"], CIRCLE)])


def test_embeddings_that_cannot_be_written_cost_no_picture_and_leave_nothing(tmp_path):
    import torch
    from kleinctl_plugins.embeddings import Embeddings

    (tmp_path / "embeddings").mkdir()
    other = tmp_path / "embeddings" / ".left.1.partial"
    other.write_bytes(b"of a worker that was killed")
    os.utime(other, (1, 1))
    remembered = Embeddings(remembering(tmp_path), "cpu")
    key = remembered._key("a red circle", "")
    (tmp_path / "embeddings" / f"{key}.safetensors").mkdir()  # stands in the way
    remembered.put("a red circle", torch.zeros(1, 2))
    remembered.put("a blue circle", torch.zeros(1, 2))
    remembered.close()
    assert not list((tmp_path / "embeddings").glob(".*"))
    assert torch.equal(Embeddings(remembering(tmp_path), "cpu").get("a blue circle"), torch.zeros(1, 2))


def test_a_batch_loads_the_encoder_and_the_transformer_once_each(sessions):
    jobs = [replace(CIRCLE, prompt=f"a {colour} square on a white background", seed=7) for colour in ("red", "blue")]
    batch = held("staged", room=NOTHING)
    loads: dict[str, list[str]] = {"encoder": [], "transformer": []}
    for name, component in (("encoder", batch.encoder), ("transformer", batch.transformer)):
        last = next(iter(component.units.values())).module
        last.register_forward_pre_hook(lambda *given, name=name: loads[name].append("forward"))
    told: list[tuple[str, int, int]] = []
    batch.prepare(jobs, lambda *event: told.append(event))
    assert told == [("encode", 1, 2), ("encode", 2, 2), ("denoise", 1, 2), ("denoise", 2, 2)]
    forwards = {name: len(seen) for name, seen in loads.items()}
    pictures = [draw(batch, job) for job in jobs]
    assert {name: len(seen) for name, seen in loads.items()} == forwards  # decoding alone was left
    assert same([pictures[1], draw(sessions["offload"], jobs[1])]) and not same(pictures)
    batch.close()


def test_a_large_batch_encodes_every_prompt_once():
    jobs = [replace(CIRCLE, prompt=f"{number} red circles", width=64, height=64, steps=1) for number in range(12)]
    batch = held("resident", room=PLENTY)
    batch.prepare(jobs, lambda *event: None)
    used: list[str] = []
    batch.encoder.module.register_forward_pre_hook(lambda *given: used.append("encoder"))
    for job in jobs:
        draw(batch, job)
    assert not used
    batch.close()


def test_a_finished_picture_waits_for_no_files_that_the_next_may_not_need(monkeypatch):
    """Of a prompt that comes again the text encoder is not needed; copies from host memory go on meanwhile."""
    from kleinctl_plugins.weights import Reader

    session, read = held("resident", room=SOME, host=NOTHING), []
    assert session._plan(CIRCLE).encoder.read

    def finished(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("decode", 1):
            monkeypatch.setattr(Reader, "_read", lambda self, layout, *given: read.append(layout.name))

    session.generate(CIRCLE, finished)
    assert not [name for name in read if name.startswith("layers.")]
    session.close()


def test_weights_that_were_read_before_torch_came_give_the_same_bits():
    from kleinctl_plugins.layout import EarlyReader
    from kleinctl_plugins.staged_decode import Session, _layouts

    half = replace(TINY, manifest=replace(TINY.manifest, dtype="float16"))  # as its files have them
    job = replace(CIRCLE, width=64, height=64, steps=1)
    early = EarlyReader()
    for name in ("transformer", "text_encoder"):
        early.read(name, list(_layouts(half, name).values()))
    ahead, plain = (Session(half, Budget(0, NOTHING, "cpu"), ("streamed",), each) for each in (early, None))
    assert ahead.transformer.host_bytes == sum(unit.bytes for unit in ahead.transformer.units.values())
    assert plain.transformer.host_bytes == 0
    assert same([draw(ahead, job), draw(plain, job)])
    ahead.close(), plain.close()


def test_what_a_plan_holds_on_the_host_is_read_ahead_and_the_rest_is_expected_as_it_will_be_read(monkeypatch):
    from kleinctl_plugins.layout import EarlyReader

    card, asked = imagine("RTX 3050", 16 * GIB), Budget(int(0.87 * GIB), 16 * GIB, "cuda:0")
    plan = holding.best(holding.Task.of(TINY.manifest, card, CIRCLE), asked.vram_bytes, 14 * GIB)
    assert plan.transformer.host and len(plan.transformer.kept) > 1
    read, expected = [], []
    monkeypatch.setattr(EarlyReader, "read", lambda self, name, units: read.append([each.name for each in units]))
    monkeypatch.setattr(EarlyReader, "expect", lambda self, units: expected.append([each.name for each in units]))
    backend = Plugins(frozenset()).backend("staged-decode").thing
    backend.prefetch(TINY, replace(asked, hardware=card), CIRCLE)
    assert read == [list(plan.encoder.host), list(plan.transformer.host)]
    assert expected == [[*plan.encoder.resident, "", *plan.transformer.kept]]


def test_no_more_is_read_ahead_than_ram_has_room_for(monkeypatch):
    """What is too much pushes out of the page cache what is needed first, and is then read again."""
    from kleinctl_plugins.layout import EarlyReader

    expected: list[Any] = []
    monkeypatch.setattr(EarlyReader, "expect", lambda self, units: expected.extend(units))
    backend = Plugins(frozenset()).backend("staged-decode").thing
    ram = memory.PROCESS_BYTES + holding.READER_BYTES + 10_000_000  # of 17 MB of weights
    budget = Budget(20 * GIB, ram, "cuda:0", hardware=imagine("RTX 4090", 4 * GIB))
    backend.prefetch(TINY, budget, CIRCLE)
    assert 8_000_000 < sum(each.bytes for each in expected) <= 10_000_000
    assert expected[0].name == "layers.0"


def test_fp8_gives_the_same_bits_however_it_is_held_and_nearly_the_picture_without_it(sessions):
    job = replace(CIRCLE, precision="fp8")
    fp8 = [held(way, room=NOTHING) for way in ("resident", "streamed", "staged")]
    pictures = [draw(each, job) for each in fp8]
    assert same(pictures)
    plain = draw(sessions["offload"], CIRCLE)
    assert pictures[0].tobytes() != plain.tobytes()
    middle, rim = (116, 116, 140, 140), (0, 0, 256, 12)
    assert [nearest(mean(pictures[0], box)) for box in (middle, rim)] == ["red", "blue"]
    whole = sum(unit.layout.bytes for unit in fp8[1].transformer.units.values())
    assert fp8[1].transformer.host_bytes < whole * 0.45  # a byte of four; what belongs to no block stays
    assert same([draw(fp8[0], CIRCLE), plain])  # and back
    for each in fp8:
        each.close()


def test_weights_cut_short_are_named_with_the_file(tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    for path in TINY.folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "transformer").unlink()
    (folder / "transformer").mkdir()
    for path in (TINY.folder / "transformer").iterdir():
        (folder / "transformer" / path.name).write_bytes(
            path.read_bytes()[: 2_000_000 if "config" not in path.name else None]
        )
    short = session("staged-decode", NOTHING, replace(TINY, folder=folder))
    with pytest.raises(OSError, match=r"safetensors ends at 2000000 bytes, in the middle of its weights"):
        draw(short, CIRCLE)
    short.close()


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
        if not TINY.manifest.parts_for(offer.thing.layout):
            continue
        fit = offer.thing.fit(TINY.manifest, imagine(None, 8 * GIB), CIRCLE)
        assert fit.fits
        assert fit.vram_bytes == 0


def test_a_disk_that_fails_once_leaves_no_half_read_weights(sessions, monkeypatch):
    """What was read by halves must not be taken for weights by the next picture of the same session."""
    from kleinctl_plugins import weights

    job = replace(CIRCLE, width=64, height=64, steps=1)
    left = [3]

    def flaky(path: Path, offset: int, target: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error", str(path))
        pread(path, offset, target)

    pread = weights.pread
    monkeypatch.setattr(weights, "pread", flaky)
    for way in ("resident", "streamed"):
        left[0] = 3
        session = held(way, room=NOTHING)
        with pytest.raises(OSError, match="Input/output error"):
            draw(session, job)
        assert (on_device(session), session.encoder.host_bytes, session.transformer.host_bytes) == (0, 0, 0)
        assert same([draw(session, job), draw(sessions["staged"], job)])
        session.close()


def test_what_could_not_be_read_ahead_is_read_later(monkeypatch):
    from kleinctl_plugins import layout
    from kleinctl_plugins.layout import EarlyReader
    from kleinctl_plugins.staged_decode import Session, _layouts

    def broken(path: Path, offset: int, target: memoryview) -> None:
        raise OSError(5, "Input/output error", str(path))

    half = replace(TINY, manifest=replace(TINY.manifest, dtype="float16"))  # as its files have them
    job = replace(CIRCLE, width=64, height=64, steps=1)
    monkeypatch.setattr(layout, "pread", broken)
    early = EarlyReader()
    early.read("transformer", list(_layouts(half, "transformer").values()))
    ahead, plain = (Session(half, Budget(0, NOTHING, "cpu"), ("streamed",), each) for each in (early, None))
    assert same([draw(ahead, job), draw(plain, job)])
    ahead.close(), plain.close()


def test_pinning_goes_on_up_to_what_was_refused_before(monkeypatch):
    """As WSL does it: so much and no more, but what was unpinned can be pinned again."""
    import torch
    from kleinctl_plugins.layout import host_memory
    from kleinctl_plugins.weights import Reader

    class Runtime:
        pinned: dict[int, int] = {}  # noqa: RUF012

        def cudaHostRegister(self, address: int, count: int, flags: int) -> int:
            if sum(self.pinned.values()) + count > 3 * 4096:
                return 2
            self.pinned[address] = count
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            return 0 if self.pinned.pop(address, 0) else 1

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: None)
    reader = Reader("cpu")
    reader.cuda = True
    memory = [reader.pinned(host_memory(4096)) for _ in range(5)]
    assert (reader.pinned_bytes, reader.pin_limit) == (3 * 4096, 3 * 4096)
    reader.free(memory[0])
    memory.append(reader.pinned(host_memory(4096)))
    assert memory[-1].data_ptr() in Runtime.pinned and reader.pinned_bytes == 3 * 4096
    reader.close(), reader.close()
    assert Runtime.pinned == {}


def weights_there(session: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Of every stage from now on, the bytes of weights that were on the device while it computed, rings included."""
    from kleinctl_plugins.weights import Ring

    seen: dict[str, list[int]] = {"encode": [], "denoise": [], "decode": []}
    rings: list[Ring] = []
    make = Ring.__init__

    def made(self: Any, *given: Any) -> None:
        make(self, *given)
        rings.append(self)

    monkeypatch.setattr(Ring, "__init__", made)

    def note(stage: str, component: Any = None) -> None:
        slots = sum(len(slot) for ring in rings for slot, _ in (*ring._free, *ring._ready.values()))
        scratch = [unit.layout.bytes for unit in component.units.values() if unit.packed] if component else []
        seen[stage].append(on_device(session) + slots + max(scratch, default=0))

    first = session.encoder.module.layers[0], session.transformer.module.single_transformer_blocks[0]
    first[0].register_forward_pre_hook(lambda *given: note("encode", session.encoder))
    first[1].register_forward_pre_hook(lambda *given: note("denoise", session.transformer))
    session.vae.decoder.register_forward_pre_hook(lambda *given: note("decode"))
    session.vae.encoder.register_forward_pre_hook(lambda *given: note("decode"))
    return seen


def test_jobs_of_changing_plans_hold_no_more_than_each_plan_says_and_give_the_same_bits(sessions, monkeypatch):
    """Also where a prompt is remembered, so that the text encoder of the plan before is not put away for its own."""
    from kleinctl_plugins.weights import Component

    steps = (  # what the first leaves of the encoder is in the way of the others
        ("resident", "staged", 2, 80_000_000, "a red circle", "", PLENTY),
        ("streamed", "staged", 2, 12_000_000, "a red circle", "", PLENTY),
        ("resident", "staged", 2, 80_000_000, "a red circle", "", PLENTY),
        ("streamed", "resident", 1, 21_600_000, "a blue circle", "", PLENTY),
        ("resident", "streamed", 2, 18_000_000, "a blue circle", "", PLENTY),
        ("streamed", "streamed", 2, 12_000_000, "a red circle", "fp8", PLENTY),
        ("streamed", "streamed", 1, 12_000_000, "a green circle", "fp8", PLENTY),
        ("streamed", "streamed", 1, 12_000_000, "a green circle", "", PLENTY),
        ("streamed", "streamed", 2, 18_000_000, "a white circle", "", holding.READER_BYTES + 2**30),
        ("streamed", "streamed", 1, 12_000_000, "a white circle", "", holding.READER_BYTES),
    )
    jobs = [
        replace(CIRCLE, prompt=prompt, width=64, height=64, steps=1, precision=precision)
        for *_, prompt, precision, _ in steps
    ]
    wanted = {job: draw(sessions["resident"], job).tobytes() for job in dict.fromkeys(jobs)}
    session = held("resident", "streamed", "staged", room=PLENTY)
    seen = weights_there(session, monkeypatch)
    most: list[int] = []
    bring = Component._bring

    def brought(self: Any, *given: Any) -> None:
        bring(self, *given)
        most.append(on_device(session))

    monkeypatch.setattr(Component, "_bring", brought)
    for job, (*ways, slots, room, _, _, host) in zip(jobs, steps, strict=True):
        for each in (*seen.values(), most):
            each.clear()
        plan = holding._plan(session._task(job), room, host, *ways, tiles=False, slots=slots)
        monkeypatch.setattr(holding, "best", lambda *given, plan=plan: plan)
        assert draw(session, job).tobytes() == wanted[job], ways
        stages = {stage.name: stage.weights_bytes - TINY.manifest.shape.vae_bytes for stage in plan.stages}
        slack = 200_000  # parameters begin at multiples of 512 bytes
        for name, found in seen.items():
            assert max(found, default=0) <= stages[name] + slack, (name, ways)
        assert max(most) <= max(stages["encode"], stages["denoise"]) + slack, ways
    session.close()


def test_embeddings_of_a_text_encoder_that_was_not_hashed_do_not_outlive_the_session(tmp_path):
    import torch
    from kleinctl_plugins.embeddings import Embeddings

    remembered = Embeddings(remembering(tmp_path, **{"text-encoder": "unknown"}), "cpu")
    remembered.put("a red circle", torch.zeros(1, 2))
    remembered.close()
    assert remembered.get("a red circle") is not None and not list(tmp_path.iterdir())
