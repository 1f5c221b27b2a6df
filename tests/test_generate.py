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
from types import SimpleNamespace

import jsonschema
import pytest
from PIL import Image

from kleinctl import generate, manifest
from kleinctl.backends import Budget, Fit, InstalledModel, Job
from kleinctl.checks.run import run_problems
from kleinctl.executors import ProcessExecutor
from kleinctl.facts.run import finished_run
from kleinctl.generate import (
    Finished,
    Output,
    Painter,
    Request,
    Step,
    check_outputs,
    choose_outputs,
    output_folder,
    run,
)
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


def request(*jobs, output=None, backend="echo", plugin="tests.plugins.echo", **changes):
    outputs = choose_outputs(jobs, output)
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
    document = run(request(job(), output=tmp_path), ignore).to_json()
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
    second = run(request(job(), job(8), output=tmp_path), ignore).images
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
    result = run(request(job(prompt="word " * 600), job(prompt="short"), output=tmp_path), ignore)
    assert result.warnings == ["prompt is 600 tokens, the model reads 512"]
    assert [read_record(image.path)["warnings"] for image in result.images] == [result.warnings, []]


@pytest.mark.slow
def test_the_unread_end_of_a_long_prompt_is_told_by_klein_tiny(tmp_path):
    """Counted with the model's own tokenizer, in the worker: the light program has none."""
    folder = REPOSITORY / "manifests" / "klein-tiny"
    model = manifest.load(folder.with_suffix(".toml"))
    asked = job(prompt="a very " * 300 + "large red circle", steps=1)
    offer = {"backend": "staged-decode", "plugin": "kleinctl_plugins.staged_decode"}
    wanted = replace(request(asked, output=tmp_path, **offer), model=model, folder=folder)
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


def test_outputs_are_looked_at_without_making_anything(tmp_path):
    check_outputs([Output(tmp_path / "new" / "folder" / "a.png")])
    assert files(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(KleinctlError, match="is no folder"):
        check_outputs([Output(tmp_path / "file" / "new" / "a.png")])


def test_a_folder_of_pictures_that_is_a_file(tmp_path):
    (tmp_path / "notes").write_text("")
    with pytest.raises(Misuse) as caught:
        output_folder(tmp_path / "notes")
    assert caught.value.problem.name == "output-not-a-folder"


def test_without_a_name_nothing_is_ever_replaced(tmp_path, monkeypatch):
    (tmp_path / "klein-7.png").write_text("precious")
    monkeypatch.chdir(tmp_path)
    for named in (None, tmp_path):
        chosen = choose_outputs([job(), job()], named)
        assert chosen == (Output(tmp_path / "klein-7-2.png"), Output(tmp_path / "klein-7-3.png"))


def test_two_runs_at_once_that_chose_the_same_name_keep_both_pictures(tmp_path):
    first, second = request(job(), output=tmp_path), request(job(prompt="a blue square"), output=tmp_path)
    assert first.outputs == second.outputs == (Output(tmp_path / "klein-7.png"),)
    with Painter(first, ignore) as painter, Painter(second, ignore) as other:
        painter.paint(first.jobs[0], first.outputs[0], ignore)
        assert other.paint(second.jobs[0], second.outputs[0], ignore).path == tmp_path / "klein-7-2.png"
    assert read_record(tmp_path / "klein-7.png")["prompt"] == "a red circle"
    assert read_record(tmp_path / "klein-7-2.png")["prompt"] == "a blue square"
    assert files(tmp_path) == ["klein-7-2.png", "klein-7.png"]


def test_a_name_that_another_run_takes_before_this_one_begins_is_not_replaced(tmp_path):
    for name in (tmp_path, tmp_path / "klein-7.png", tmp_path / "mine.png"):
        slow = request(job(), output=name)
        output = slow.outputs[0].path
        output.write_text("the other's")
        assert run(slow, ignore).images[0].path == output.with_stem(f"{output.stem}-2")
        assert output.read_text() == "the other's"
        output.unlink(), output.with_stem(f"{output.stem}-2").unlink()


def test_a_file_that_was_named_is_replaced_though_it_is_called_as_pictures_are(tmp_path):
    for prompt in ("a red circle", "a blue square"):
        run(request(job(prompt=prompt), output=tmp_path / "klein-7.png"), ignore)
    assert files(tmp_path) == ["klein-7.png"] and read_record(tmp_path / "klein-7.png")["prompt"] == "a blue square"


@pytest.mark.parametrize(
    ("output", "count", "fix"),
    [("cat.jpg", 1, "-o cat.png"), ("cat", 1, "-o cat.png"), ("cat.png", 4, "-o cat")],
)
def test_an_output_that_cannot_be_meant(output, count, fix):
    with pytest.raises(Misuse) as caught:
        choose_outputs([job()] * count, output)
    assert caught.value.problem.fix == fix


def test_an_output_folder_for_one_picture(tmp_path):
    assert choose_outputs([job()], tmp_path) == (Output(tmp_path / "klein-7.png"),)
    assert choose_outputs([job()], str(tmp_path / "new") + "/") == (Output(tmp_path / "new" / "klein-7.png"),)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "cannot be written" in problem_of(request(job(), output=tmp_path / "file" / "a.png")).what
    assert "It is a folder" in problem_of(replace(request(job()), outputs=(Output(tmp_path / "folder.png"),))).why
    with pytest.raises(Misuse, match="too long"):
        request(job(), output=tmp_path / ("a" * 300 + ".png"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_of_someone_else(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in problem_of(request(job(), output=tmp_path / "a.png")).why


def test_pictures_finished_before_a_failure_stay(tmp_path):
    wanted = request(job(1), job(2), output=tmp_path, backend="exits-later", plugin="tests.plugins.misbehaving")
    problem = problem_of(wanted, ProcessExecutor())
    assert "1 of 2 pictures were finished." in problem.why
    assert files(tmp_path) == ["klein-1.png"]


AHEAD = {"plugin": "tests.plugins.ahead"}


def origins(*jobs):
    return {"origins": tuple(f"jobs.jsonl:{number}" for number, _ in enumerate(jobs, 1))}


def test_jobs_are_told_ahead_several_at_a_time_those_of_one_size_together(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 16)
    monkeypatch.setenv("AHEAD_FILE", str(tmp_path / "told"))
    jobs = [job(seed, width=32 + 16 * (seed % 2), height=32, steps=1) for seed in range(19)]
    events = []
    result = run(request(*jobs, output=tmp_path / "out", backend="ahead-notes", **AHEAD), events.append)
    first, second = (tmp_path / "told").read_text().splitlines()
    assert first == "1 3 5 7 9 11 13 15 0 2 4 6 8 10 12 14" and second == "17 16 18"
    assert [image.job.seed for image in result.images] == list(range(19))
    assert [event.number for event in events if isinstance(event, Finished)] == list(range(1, 20))
    ahead = [(each.stage, each.total) for each in events if isinstance(each, Step) and each.number == 0]
    assert ahead == [("encode", 16), ("encode", 16), ("encode", 3), ("encode", 3)]
    assert result.remarks == ["it was slow"] and len(result.prepared) == 2
    jsonschema.validate(result.to_json(), json.loads(SCHEMA.read_text()))


def test_a_single_picture_is_not_told_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("AHEAD_FILE", str(tmp_path / "told"))
    run(request(job(), output=tmp_path / "a.png", backend="ahead-notes", **AHEAD), ignore)
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(("backend", "workers"), [("ahead-raises", 1), ("ahead-exits", 2)])
def test_what_fails_ahead_is_left_to_each_job(backend, workers, tmp_path):
    result = run(request(job(1), job(2), output=tmp_path, backend=backend, **AHEAD), ignore)
    assert [image.job.seed for image in result.images] == [1, 2] and result.prepared == ()
    logs = [path.read_text() for path in (Path(os.environ["KLEINCTL_HOME"]) / "logs").iterdir()]
    assert len(logs) == workers
    assert any("the stage that failed ahead" in log for log in logs) == (backend == "ahead-raises")


def test_a_line_of_a_batch_that_runs_out_of_memory_is_one_error_and_the_rest_runs(tmp_path):
    jobs = [job(1, prompt="one"), job(2), job(1, prompt="three")]
    events = []
    misbehaving = {"backend": "card-full-later", "plugin": "tests.plugins.misbehaving"}
    result = run(request(*jobs, output=tmp_path, **misbehaving, **origins(*jobs)), events.append)
    assert [image.job.prompt for image in result.images] == ["one", "three"]
    [failure] = result.failures
    assert (failure.index, failure.number, failure.count) == (1, 2, 3) and failure in events
    assert failure.problem.name == "card-memory-full" and failure.problem.what.startswith("jobs.jsonl:2: ")
    assert files(tmp_path) == ["klein-1-2.png", "klein-1.png"]


def test_a_disk_that_fills_in_a_batch_costs_no_more_painting(tmp_path, monkeypatch):
    jobs, events = [job(1), job(2), job(3)], []
    free = iter([2**40, 2**40, 0, 0])  # before the batch, and before each picture
    monkeypatch.setattr(generate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    result = run(request(*jobs, output=tmp_path, **origins(*jobs)), events.append)
    assert [image.job.seed for image in result.images] == [1]
    assert [failure.problem.name for failure in result.failures] == ["disk-full", "disk-full"]
    assert {event.number for event in events if isinstance(event, Step) and event.stage == "denoise"} <= {0, 1}


def test_a_line_of_a_batch_with_a_damaged_reference_is_one_error(tmp_path):
    cut = picture(tmp_path / "cut.jpg", "JPEG", (640, 480), quality=95)
    cut.write_bytes(cut.read_bytes()[:2000])
    jobs = [job(1, images=(cut,)), job(2)]
    result = run(request(*jobs, output=tmp_path / "out", **origins(*jobs)), ignore)
    assert [failure.problem.name for failure in result.failures] == ["reference-damaged"]
    assert files(tmp_path / "out") == ["klein-2.png"]


def test_a_reference_that_goes_away_before_its_line_comes_is_one_error(tmp_path):
    jobs = [job(1, images=(tmp_path / "gone.png",)), job(2)]
    result = run(request(*jobs, output=tmp_path / "out", **origins(*jobs)), ignore)
    assert [failure.problem.what for failure in result.failures] == [
        "jobs.jsonl:1: gone.png cannot be used as a reference picture"
    ]
    assert files(tmp_path / "out") == ["klein-2.png"]


def test_a_line_of_a_batch_that_kills_its_worker_twice_is_one_error_and_the_rest_runs(tmp_path):
    jobs = [job(1, prompt="one"), job(2), job(1, prompt="three")]
    misbehaving = {"backend": "killed-while-writing-later", "plugin": "tests.plugins.misbehaving"}
    result = run(request(*jobs, output=tmp_path, **misbehaving, **origins(*jobs)), ignore)
    assert [image.job.prompt for image in result.images] == ["one", "three"]
    assert [failure.problem.name for failure in result.failures] == ["worker-killed"]
    assert files(tmp_path) == ["klein-1-2.png", "klein-1.png"]  # and no half picture
    assert len(list((Path(os.environ["KLEINCTL_HOME"]) / "logs").iterdir())) == 3


def test_a_worker_of_a_batch_that_dies_once_costs_no_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("AHEAD_FILE", str(tmp_path / "died"))
    jobs = [job(1), job(2), job(3)]
    result = run(request(*jobs, output=tmp_path / "out", backend="dies-once", **AHEAD, **origins(*jobs)), ignore)
    assert len(result.images) == 3 and result.failures == () and (tmp_path / "died").exists()
    assert len(result.prepared) == 2  # the second worker is told what is left


def test_a_batch_of_which_every_line_failed(tmp_path):
    jobs = [job(2), job(3)]
    misbehaving = {"backend": "card-full-later", "plugin": "tests.plugins.misbehaving"}
    result = run(request(*jobs, output=tmp_path, **misbehaving, **origins(*jobs)), ignore)
    assert result.images == () and len(result.failures) == 2
    document = {**result.to_json(), "failed": [], "skipped": []}
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))


def test_a_warm_model_paints_on_after_a_failed_job(tmp_path):
    wanted = request(job(), backend="card-full-later", plugin="tests.plugins.misbehaving")
    with Painter(wanted, ignore) as painter:
        with pytest.raises(KleinctlError):
            painter.paint(job(2), Output(tmp_path / "a.png"), ignore)
        assert painter.paint(job(1), Output(tmp_path / "b.png"), ignore).job.seed == 1
    assert files(tmp_path) == ["b.png"]


CONTROL = """
from tests.test_generate import *
plugin = "tests.plugins.misbehaving"
run(request(job(1), job(2), output=Path(sys.argv[1]), backend="hangs-later", plugin=plugin), ignore)
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
    problem = problem_of(request(job(images=(path,)), output=tmp_path))
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
        {"precision": 8},
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


def test_a_precision_goes_into_the_record_and_comes_back(tmp_path):
    asked = job(precision="fp8")
    run(request(asked, job(), output=tmp_path), ignore)
    record = read_record(tmp_path / "klein-7.png")
    assert record["precision"] == "fp8" and job_from_record(record) == asked
    assert "precision" not in read_record(tmp_path / "klein-7-2.png")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(record, {"$defs": schema["$defs"], "$ref": "#/$defs/record"})


def test_a_record_whose_reference_is_not_given_or_is_another(tmp_path):
    one, other = picture(tmp_path / "one.png"), picture(tmp_path / "other.png", size=(64, 64))
    record = run(request(job(images=(one,)), output=tmp_path / "a.png"), ignore).images[0].record
    with pytest.raises(Misuse) as caught:
        job_from_record(record)
    assert caught.value.problem.fix == "--image one.png"
    with pytest.raises(KleinctlError, match=r"other\.png is not the reference picture one\.png"):
        job_from_record(record, [other])
