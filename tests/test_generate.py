"""From a request to pictures: what lands on disk, what the JSON says, and what is refused before anything is loaded."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from kleinctl import manifest
from kleinctl.backends import Budget, Fit, InstalledModel, Job
from kleinctl.checks.run import run_problems
from kleinctl.executors import ProcessExecutor
from kleinctl.facts.run import finished_run
from kleinctl.generate import Finished, Painter, Request, Step, choose_outputs, run
from kleinctl.hardware import Hardware
from kleinctl.pictures import reference
from kleinctl.pngtext import plain_text, read_text, utf8_text, with_chunks
from kleinctl.problem import KleinctlError, Misuse
from kleinctl.records import job_from_record, read_record
from tests.conftest import REPOSITORY
from tests.models import tiny_model

SCHEMA = Path(__file__).parent.parent / "kleinctl" / "schemas" / "run.json"


class NoExecutor:
    """A place where no worker may start: whatever is refused must be refused before."""

    name = "none"

    def start(self, python, plugin, *, gpu=None):
        raise AssertionError("a worker was started")


def job(seed=7, **changes):
    values = {"prompt": "a red circle", "width": 64, "height": 48, "seed": seed, "steps": 3, "guidance": 1.0}
    return Job(**{**values, **changes})


def request(*jobs, output=None, backend="echo", plugin="tests.plugins.echo", folder=None, **changes):
    outputs = choose_outputs(jobs, output, folder=folder)
    values = {"parts": {"vae": "a" * 64}, **changes}
    python, budget = Path(sys.executable), Budget(0, 2**30, "cpu")
    return Request(tiny_model(), Path("/nowhere"), backend, plugin, python, budget, jobs, outputs, **values)


def ignore(event):
    pass


def problem_of(wanted, executor=None):
    with pytest.raises(KleinctlError) as caught:
        run(wanted, ignore, executor or NoExecutor())
    return caught.value.problem


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_and_its_json(tmp_path):
    result = run(request(job(), output=tmp_path / "new" / "circle.png"), ignore)
    document = json.loads(json.dumps(result.to_json()))
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(document)
    [image] = document["images"]
    assert (image["path"], image["seed"]) == (str(tmp_path / "new" / "circle.png"), 7)
    assert (document["backend"], document["model"], document["strategy"]) == ("echo", "klein-test", "echo")
    assert document["seconds"]["total"] >= sum(document["seconds"][stage] for stage in ("load", "encode", "denoise"))
    with Image.open(image["path"]) as picture:
        assert picture.size == (64, 48)
    assert files(tmp_path / "new") == ["circle.png"]


def test_the_schema_refuses_what_is_no_run(tmp_path):
    document = run(request(job(), folder=tmp_path), ignore).to_json()
    for wrong in ({"images": []}, {"peak_vram_bytes": -1}, {"schema": "kleinctl.run/2"}, {"extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, **wrong}, json.loads(SCHEMA.read_text()))


def test_the_picture_says_how_it_was_made(tmp_path):
    asked = job(prompt="ein Käfer, 日本 🐞\nsecond line", guidance=4.5)
    result = run(request(asked, output=tmp_path / "a.png"), ignore)
    record = read_record(tmp_path / "a.png")
    assert record == result.to_json()["record"]
    assert job_from_record(record) == asked
    assert record["parts"] == {"vae": "a" * 64} and record["dtype"] == "float32" and record["device"] == "cpu"
    assert set(record["versions"]) >= {"kleinctl", "python", "torch", "diffusers"}
    texts = read_text(tmp_path / "a.png")
    assert texts["Description"] == asked.prompt and texts["Software"].startswith("kleinctl ")


def test_the_same_job_gives_the_same_file(tmp_path):
    first = run(request(job(), output=tmp_path / "a.png"), ignore).images[0]
    second = run(request(job(), job(8), folder=tmp_path), ignore).images
    assert first.sha256 == second[0].sha256 != second[1].sha256
    assert (tmp_path / "a.png").read_bytes() == second[0].path.read_bytes()


def test_several_jobs_share_one_worker_and_keep_their_order(tmp_path):
    events = []
    result = run(request(job(3), job(1), job(3), output=tmp_path / "out"), events.append)
    assert [image.path.name for image in result.images] == ["klein-3.png", "klein-1.png", "klein-3-2.png"]
    assert files(tmp_path / "out") == ["klein-1.png", "klein-3-2.png", "klein-3.png"]
    finished = [event.number for event in events if isinstance(event, Finished)]
    assert finished == [1, 2, 3]
    assert {event.number for event in events if isinstance(event, Step)} == {1, 2, 3}
    assert len(list((Path(os.environ["KLEINCTL_HOME"]) / "logs").iterdir())) == 1


def test_a_prompt_longer_than_the_model_reads(tmp_path):
    result = run(request(job(prompt="word " * 600), job(prompt="short"), folder=tmp_path), ignore)
    assert result.warnings == ["prompt is 600 tokens, the model reads 512"]
    assert [read_record(image.path)["warnings"] for image in result.images] == [result.warnings, []]


@pytest.mark.slow
def test_the_unread_end_of_a_long_prompt_is_told_by_klein_tiny(tmp_path):
    """Counted with the model's own tokenizer, in the worker: the light program has none."""
    folder = REPOSITORY / "manifests" / "klein-tiny"
    model = manifest.load(folder.with_suffix(".toml"))
    asked = job(prompt="a very " * 300 + "large red circle", steps=1)
    offer = {"backend": "staged-decode", "plugin": "kleinctl_plugins.staged_decode"}
    wanted = replace(request(asked, folder=tmp_path, **offer), model=model, folder=folder)
    result = run(wanted, ignore)
    cut = result.images[0].prompt_cut
    assert cut.limit == 512 < cut.tokens and cut.tail.startswith(("a very", "very")) and cut.tail.endswith("red circle")
    [problem] = run_problems(finished_run(result, Fit(0, 0, 0, 9.0, 9.0, True, "staged"), "cpu"), Hardware())
    assert problem.name == "prompt-cut" and problem.why.endswith(cut.tail)
    document = replace(result, problems=(problem,)).to_json()
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["warnings"][-1] == f"{problem.what}: {problem.why}"


@pytest.mark.slow
def test_the_prompt_is_encoded_as_the_reference_does_it(monkeypatch):
    """The guard against embeddings-differ: the cut text encoder gives the bits of the whole one, padding and all."""
    import torch
    from diffusers import Flux2KleinPipeline

    from kleinctl.plugins import Plugins

    heard = []
    encode = Flux2KleinPipeline.encode_prompt

    def listening(self, *arguments, **options):
        heard.append(encode(self, *arguments, **options))
        return heard[-1]

    monkeypatch.setattr(Flux2KleinPipeline, "encode_prompt", listening)
    model = manifest.load(REPOSITORY / "manifests" / "klein-tiny.toml")
    for name in ("diffusers-offload", "staged-decode"):
        backend = Plugins(frozenset()).backend(name).thing
        session = backend.load(InstalledModel(model, REPOSITORY / "manifests" / "klein-tiny"), Budget(0, 2**33, "cpu"))
        session.generate(job(steps=1), lambda stage, done, total: None)
        session.close()
    reference, ours = heard[0][0], heard[1][0]
    assert reference.shape == ours.shape == (1, 512, 3 * model.shape.text_hidden) and torch.equal(reference, ours)


def test_a_file_that_is_there_is_replaced_only_by_a_whole_picture(tmp_path):
    taken = tmp_path / "mine.png"
    taken.write_text("precious")
    failing = request(job(), output=taken, backend="card-full-later", plugin="tests.plugins.misbehaving")
    assert problem_of(failing, ProcessExecutor()).name == "card-memory-full"
    assert taken.read_text() == "precious" and files(tmp_path) == ["mine.png"]
    run(request(job(), output=taken), ignore)
    assert read_record(taken)["seed"] == 7


@pytest.mark.parametrize(("backend", "name"), [("disk-full", "disk-full"), ("killed-while-writing", "worker-killed")])
def test_no_half_picture_stays_when_writing_fails(backend, name, tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    wanted = request(job(), output=tmp_path / "mine.png", backend=backend, plugin="tests.plugins.misbehaving")
    assert problem_of(wanted, ProcessExecutor()).name == name
    assert (tmp_path / "mine.png").read_text() == "precious" and files(tmp_path) == ["mine.png"]


def test_without_a_name_nothing_is_ever_replaced(tmp_path):
    (tmp_path / "klein-7.png").write_text("precious")
    assert choose_outputs([job(), job()], None, folder=tmp_path) == (
        tmp_path / "klein-7-2.png",
        tmp_path / "klein-7-3.png",
    )


@pytest.mark.parametrize(
    ("output", "count", "fix"),
    [("cat.jpg", 1, "-o cat.png"), ("cat", 1, "-o cat.png"), ("cat.png", 4, "-o cat")],
)
def test_an_output_that_cannot_be_meant(output, count, fix):
    with pytest.raises(Misuse) as caught:
        choose_outputs([job()] * count, output)
    assert caught.value.problem.fix == fix


def test_an_output_folder_for_one_picture(tmp_path):
    assert choose_outputs([job()], tmp_path) == (tmp_path / "klein-7.png",)
    assert choose_outputs([job()], str(tmp_path / "new") + "/") == (tmp_path / "new" / "klein-7.png",)
    assert choose_outputs([job()], tmp_path / "new", many=True) == (tmp_path / "new" / "klein-7.png",)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "cannot be written" in problem_of(request(job(), output=tmp_path / "file" / "a.png")).what
    assert "It is a folder" in problem_of(replace(request(job()), outputs=(tmp_path / "folder.png",))).why
    with pytest.raises(Misuse, match="too long"):
        request(job(), output=tmp_path / ("a" * 300 + ".png"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_of_someone_else(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in problem_of(request(job(), output=tmp_path / "a.png")).why


def test_pictures_finished_before_a_failure_stay(tmp_path):
    wanted = request(job(1), job(2), folder=tmp_path, backend="exits-later", plugin="tests.plugins.misbehaving")
    problem = problem_of(wanted, ProcessExecutor())
    assert "1 of 2 pictures were finished." in problem.why
    assert files(tmp_path) == ["klein-1.png"]


def test_a_warm_model_paints_on_after_a_failed_job(tmp_path):
    wanted = request(job(), backend="card-full-later", plugin="tests.plugins.misbehaving")
    with Painter(wanted, ignore) as painter:
        with pytest.raises(KleinctlError):
            painter.paint(job(2), tmp_path / "a.png", ignore)
        assert painter.paint(job(1), tmp_path / "b.png", ignore).job.seed == 1
    assert files(tmp_path) == ["b.png"]


CONTROL = """
from tests.test_generate import *
plugin = "tests.plugins.misbehaving"
run(request(job(1), job(2), folder=Path(sys.argv[1]), backend="hangs-later", plugin=plugin), ignore)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_the_middle(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CONTROL, tmp_path]
    control = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (tmp_path / "klein-1.png").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    control.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = control.communicate()
    assert time.monotonic() - start < 3 and said.strip().endswith("KeyboardInterrupt")
    assert files(tmp_path) == ["klein-1.png"]


# Reference pictures


def picture(path, kind="PNG", size=(80, 64), **options):
    Image.new("RGB", size, (10, 200, 10)).save(path, kind, **options)
    return path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_reference_pictures_go_into_the_record(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(Path("one.img"), kind)
    asked = job(images=(Path("one.img"),))
    result = run(request(asked, output=tmp_path / "a.png"), ignore)
    [known] = result.images[0].record["images"]
    assert known["name"] == "one.img" and len(known["sha256"]) == 64
    assert job_from_record(result.images[0].record, [Path("one.img")]) == asked


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + b"\xff" * 60_000}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": True, "exif": b"Exif\0\0II*\0"}),
    ],
)
def test_the_size_of_a_reference_picture(kind, options, tmp_path):
    found = reference(picture(tmp_path / "a", kind, (123, 77), **options))
    assert (found.kind, found.width, found.height) == (kind.lower(), 123, 77)


HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60000, 60000) + b"\0" * 9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("<!DOCTYPE html>"), "PNG, JPEG and WebP are read"),
        (lambda path: path.write_bytes(b""), "PNG, JPEG and WebP are read"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff" + b"\xff" * 5000), "PNG, JPEG and WebP are read"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\0"), "PNG, JPEG and WebP are read"),
        (lambda path: path.write_bytes(b"RIFF\0\0\0\0WEBPVP8L"), "PNG, JPEG and WebP are read"),
        (lambda path: picture(path, "GIF"), "PNG, JPEG and WebP are read"),
        (lambda path: picture(path, size=(900, 100)), "at most 8 times"),
        (lambda path: picture(path, size=(63, 63)), "needs 64 pixels"),
        (lambda path: path.write_bytes(HUGE), "one megapixel"),
    ],
)
def test_a_reference_that_is_no_picture(make, says, tmp_path):
    path = tmp_path / "reference.png"
    make(path)
    problem = problem_of(request(job(images=(path,)), folder=tmp_path))
    assert problem.what == "reference.png cannot be used as a reference picture"
    assert says.lower() in problem.why.lower()


def test_a_reference_that_was_cut_off(tmp_path):
    """Its header is well; that the rest is missing shows in the worker."""
    path = picture(tmp_path / "reference.jpg", "JPEG", (640, 480), quality=95)
    path.write_bytes(path.read_bytes()[:2000])
    problem = problem_of(request(job(images=(path,)), output=tmp_path / "out.png"), ProcessExecutor())
    assert problem.what == "reference.jpg cannot be used as a reference picture"
    assert "truncated" in problem.why
    assert files(tmp_path) == ["reference.jpg"]


# From a picture back to its job


def stranger(path, *chunks):
    path.write_bytes(with_chunks(picture(path).read_bytes(), *chunks))
    return path


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "says nothing"),
        ([plain_text("parameters", "a cat, Steps: 4")], "says nothing"),
        ([utf8_text("kleinctl", "{")], "damaged"),
        ([utf8_text("kleinctl", "[" * 100_000)], "damaged"),
        ([utf8_text("kleinctl", '"text"')], "damaged"),
        ([utf8_text("kleinctl", '{"schema": "kleinctl.record/2"}')], "kleinctl.record/2"),
    ],
)
def test_a_picture_without_our_record(chunks, says, tmp_path):
    with pytest.raises(KleinctlError) as caught:
        read_record(stranger(tmp_path / "a.png", *chunks))
    assert caught.value.problem.what == "a.png has no record" and says in caught.value.problem.why


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9},
        {"width": 100},
        {"height": "768"},
        {"seed": -1},
        {"seed": True},
        {"steps": 10**6},
        {"guidance": float("nan")},
        {"prompt": None},
        {"images": ["x"]},
        {"model": 3},
        {"backend": ["rm"]},
    ],
)
def test_a_record_that_asks_for_the_impossible(change, tmp_path):
    record = {"prompt": "x", "width": 64, "height": 64, "seed": 1, "steps": 4, "guidance": 1, "images": []}
    record |= {"model": "klein-4b", "backend": "echo"}
    assert job_from_record(record).guidance == 1.0
    with pytest.raises(KleinctlError) as caught:
        job_from_record({**record, **change})
    assert caught.value.problem.name == "record-damaged"


def test_a_record_whose_reference_is_not_given_or_is_another(tmp_path):
    one, other = picture(tmp_path / "one.png"), picture(tmp_path / "other.png", size=(64, 64))
    record = run(request(job(images=(one,)), output=tmp_path / "a.png"), ignore).images[0].record
    with pytest.raises(Misuse) as caught:
        job_from_record(record)
    assert caught.value.problem.fix == "--image one.png"
    with pytest.raises(KleinctlError, match=r"other\.png is not the reference picture one\.png"):
        job_from_record(record, [other])
