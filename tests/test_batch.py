"""`run --batch`: what a line may say, what is wrong with one that says otherwise, and going on where a run stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kleinctl import batch, records, road
from kleinctl.batch import changes, demands, parse, read, tasks
from kleinctl.cli import output
from kleinctl.cli.progress import Bars, Pace
from kleinctl.cli.steps import shown_on, stage_text
from kleinctl.generate import CHUNK, Failure, Output, Step
from kleinctl.hardware import Hardware, imagine
from kleinctl.planner import compare, default_job, precisions
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.units import GIB, seconds_text
from tests.models import tiny_model
from tests.test_cli import conforms
from tests.test_generate import ignore, job, request, run

PROMPT = '{"prompt": "a red circle"}'


def parsed(*lines: str, folder: Path = Path("/nowhere")) -> batch.Batch:
    return parse("\n".join(lines).encode("utf-8", "surrogatepass"), "jobs.jsonl", folder)


def problem_of(line: str, folder: Path = Path("/nowhere")) -> Problem:
    found = parsed(PROMPT, line, folder=folder)
    [fault] = found.faults
    assert fault.line == 2 and len(found.lines) == 1
    return fault.problem


def test_what_a_line_can_say(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    [one, other] = parsed(
        '{"prompt": "x", "seed": 9, "size": "1000x700", "steps": 8, "guidance": 3, "image": "a.png"}',
        '{"prompt": "ein Käfer 🐞", "size": 512, "image": ["a.png", "a.png"]}',
        folder=tmp_path,
    ).lines
    sizes = {"width": 992, "height": 704}
    assert one.says == {"prompt": "x", "seed": 9, "steps": 8, "guidance": 3.0, "images": (tmp_path / "a.png",), **sizes}
    assert one.asked == (1000, 700)
    assert other.says["images"] == (tmp_path / "a.png",) * 2 and other.says["width"] == other.says["height"] == 512


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf%s\r\n\r\n%s", b"%s\n  \n%s\n\n", b"\n%s\n%s"])
def test_a_mark_at_the_beginning_and_empty_lines_do_no_harm(data):
    assert len(parse(data % ((PROMPT.encode(),) * 2), "jobs.jsonl", Path()).lines) == 2


def test_lines_are_counted_as_an_editor_does():
    found = parsed("", PROMPT, "", "nonsense")
    assert [line.number for line in found.lines] == [2]
    assert found.faults[0].problem.what == "jobs.jsonl:4: the line is no JSON" and found.origin(2) == "jobs.jsonl:2"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'prompt': 'x'}", "no JSON"),
        ('{"prompt": "x",}', "no JSON"),
        ('["a red circle"]', "no JSON object"),
        ("[" * 60_000, "nested too deeply"),
        ("{}", "there is no prompt"),
        ('{"promt": "x"}', "Did you mean prompt?"),
        ('{"prompt": "x", "images": "a.png"}', "Did you mean image?"),
        ('{"prompt": "  "}', "prompt cannot be"),
        ('{"prompt": 3}', "prompt cannot be 3"),
        ('{"prompt": "\\ud800"}', "prompt cannot be"),
        ('{"prompt": "x", "seed": -1}', "a whole number from 0"),
        ('{"prompt": "x", "seed": true}', "seed cannot be true"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "seed cannot be"),
        ('{"prompt": "x", "seed": 1.5}', "seed cannot be 1.5"),
        ('{"prompt": "x", "seed": %s}' % ("9" * 5000), ""),
        ('{"prompt": "x", "steps": 201}', "from 1 to 200"),
        ('{"prompt": "x", "guidance": NaN}', "a number from 0 to 30"),
        ('{"prompt": "x", "guidance": 1e999}', "a number from 0 to 30"),
        ('{"prompt": "x", "size": "wide"}', "up to 16384"),
        ('{"prompt": "x", "size": "0x64"}', "up to 16384"),
        ('{"prompt": "x", "size": "64x20000"}', "up to 16384"),
        ('{"prompt": "x", "size": [64, 64]}', "up to 16384"),
        ('{"prompt": "x", "image": ""}', "the path of a picture"),
        ('{"prompt": "x", "image": [1]}', "the path of a picture"),
        ('{"prompt": "x", "image": "a\\u0000b"}', "the path of a picture"),
        ('{"prompt": "%s"}' % ("x" * 2**16), "too long"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_job(line, says):
    problem = problem_of(line)
    assert problem.name == "batch-line" and problem.what.startswith("jobs.jsonl:2: ")
    assert says in f"{problem.what} {problem.why}" and problem.fix
    assert len(problem.what) < 150


def test_a_line_in_another_encoding():
    assert "another encoding" in parse(b'{"prompt": "K\xe4fer"}', "a", Path()).faults[0].problem.why


def test_a_reference_picture_that_is_missing_or_none(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, why in (("text.png", "its first bytes"), ("missing.png", "no such file"), (".", "directory")):
        problem = problem_of(json.dumps({"prompt": "x", "image": name}), tmp_path)
        assert problem.name == "reference-unusable" and why in problem.why
        assert problem.what.startswith("jobs.jsonl:2: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
near_lines = st.dictionaries(st.sampled_from([*batch.EXAMPLE, "promt"]), json_values).map(json.dumps)


@given(st.text() | near_lines | st.sampled_from([PROMPT, '{"prompt": "x", "size": "12']))
def test_whatever_a_line_holds_it_is_a_job_or_an_error(text):
    try:
        found = parsed(text)
    except Misuse as error:
        assert error.problem.name == "batch-unreadable"
        return
    assert found.lines or found.faults
    for line in found.lines:
        made = default_job(tiny_model(), **changes(line, {}))
        assert made.prompt.strip() and 0 <= made.seed < 2**63 and made.width % 16 == made.height % 16 == 0
        made.prompt.encode()


@given(st.binary())
def test_whatever_a_file_holds_it_is_a_batch_or_an_error(data):
    try:
        assert parse(data, "jobs.jsonl", Path("/nowhere")).faults
    except Misuse as error:
        assert error.problem.name == "batch-unreadable"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "It is empty"),
        (b"\n \n", "It is empty"),
        (PROMPT.encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "no text"),
        ((PROMPT + "\n").encode() * 10_001, "more than 10000 lines"),
        (b"x" * (2**26 + 1), "larger than"),
    ],
    ids=["empty", "blank", "utf-16", "binary", "lines", "bytes"],
)
def test_a_file_that_is_no_batch(data, why, tmp_path):
    (tmp_path / "jobs.jsonl").write_bytes(data)
    with pytest.raises(Misuse) as caught:
        read(str(tmp_path / "jobs.jsonl"))
    assert caught.value.problem.name == "batch-unreadable" and why in caught.value.problem.why


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(Misuse, match="no batch of jobs"):
            read(str(path))


def test_options_go_for_lines_that_do_not_say_and_a_line_keeps_its_seed():
    [one, other] = parsed(PROMPT, '{"prompt": "x", "steps": 2, "seed": 3, "image": []}').lines
    defaults = {"steps": 9, "seed": 100, "images": (Path("a.png"),)}
    assert changes(one, defaults) == {**defaults, "prompt": "a red circle", "seed": 101}
    assert changes(other, defaults) == {"steps": 2, "seed": 3, "images": (), "prompt": "x"}
    assert changes(one, {})["seed"] == 1
    assert [len(own) for _, own in demands([one, other], {})] == [1, 1]


# Going on


def placed(wanted, folder, parts=None):
    return tasks(
        {3: wanted}, folder, lambda each: records.begin(each, tiny_model(), "echo", parts or {"vae": "a" * 64})
    )


def test_a_picture_that_is_there_is_not_made_again_but_another_jobs_is_left_alone(tmp_path):
    reference = tmp_path / "reference.png"
    Image.new("RGB", (64, 64)).save(reference)
    wanted = job(7, images=(reference,), precision="fp8")
    [task] = placed(wanted, tmp_path)
    assert (task.path, task.done) == (tmp_path / "klein-0003-7.png", False)
    run(replace(request(wanted), outputs=(Output(task.path),)), ignore)
    assert placed(wanted, tmp_path)[0].done
    assert placed(replace(wanted, images=(reference.rename(tmp_path / "moved.png"),)), tmp_path)[0].done
    wanted = replace(wanted, images=(tmp_path / "moved.png",))
    other = {"prompt": "blue", "width": 80, "height": 80, "steps": 4, "guidance": 2.0, "precision": "", "images": ()}
    for name, value in other.items():
        [task] = placed(replace(wanted, **{name: value}), tmp_path)
        assert (task.path.name, task.done) == ("klein-0003-7-2.png", False), name
    assert placed(wanted, tmp_path, {"vae": "b" * 64})[0].path.name == "klein-0003-7-2.png"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "moved.png")
    assert not placed(wanted, tmp_path)[0].done


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_under_that_name_is_left_alone(content, tmp_path):
    (tmp_path / "klein-0003-7.png").write_bytes(content)
    assert placed(job(7), tmp_path)[0].path.name == "klein-0003-7-2.png"


HOLDING = """
import sys, time
from pathlib import Path
from kleinctl.batch import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_batch_into_the_same_folder_is_told_who_draws_there_until_that_one_is_gone(tmp_path, monkeypatch):
    other = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KleinctlError) as caught, batch.only_one(Path("out")):
        raise AssertionError("both draw")
    problem = caught.value.problem
    assert (
        problem.name == "batch-running" and f"(pid {other.pid})" in problem.why and problem.fix.startswith("-o out-2")
    )
    with batch.only_one(tmp_path / "elsewhere"):
        other.kill()
        other.wait()
    with batch.only_one(tmp_path / "out"):  # what died holds nothing
        pass
    assert not list(tmp_path.iterdir())


# What is shown


def test_stages_in_words():
    assert stage_text(Step("denoise", 1, 4, 1, 1)) == "denoise"
    assert stage_text(Step("denoise", 1, 4, 3, 16)) == "picture 3 of 16: denoise"
    assert stage_text(Step("encode", 3, 16, 0, 16)) == "prompts"


def test_a_terminal_without_a_cursor_gets_lines_as_a_log_does(monkeypatch):
    from rich.console import Console

    said = io.StringIO()
    console = Console(file=said, force_terminal=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(output, "err_console", lambda: console)
    with Bars() as bars:
        bars.show("stage", "denoise", 4, 4)
    assert said.getvalue() == "  denoise 4 of 4\n"


def test_what_waits_for_others_is_shown_with_the_time_since_when(monkeypatch):
    shown, clock = [], iter(["14:03", "14:05", "14:09"])
    monkeypatch.setattr(time, "strftime", lambda form: next(clock))
    bars = SimpleNamespace(show=lambda key, text, *rest: shown.append(text))
    show = shown_on(bars, 1)
    for stage in ("queue", "queue", "denoise", "queue"):
        show(Step(stage, 0, 4, 1, 1))
    assert shown[1:] == ["since 14:03: queue", "since 14:03: queue", "denoise", "since 14:09: queue"]


def test_the_time_that_is_left_counts_what_is_done_ahead_for_those_that_have_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(2 * CHUNK)
    problem = Problem("a", "b", "c")
    count = 2 * CHUNK
    for passed, event in (
        (50, Step("load", 1, 1, 0, count)),
        (16, Step("encode", CHUNK, CHUNK, 0, count)),
        (0.5, Step("denoise", 1, 4, 1, count)),
        (0.5, Failure(0, problem, 1, count)),
    ):
        now[0] += passed
        pace.hear(event)
    left = seconds_text(count - 1 + 16)  # pictures at a second each, and the prompts of as many as have been encoded
    assert pace.note == f", about {left} left"
    pace.hear(Failure(count - 1, problem, count, count))
    assert pace.note == ""


# Precisions


class Fine:
    name, layout, precisions = "fine", "diffusers", ("fp8",)


def test_without_a_backend_only_those_that_can_hold_weights_so_are_considered():
    plugins = Plugins(frozenset())
    klein, card = plugins.models["klein-4b"], imagine("RTX 4090", 64 * GIB)
    can = {name for name, offer in plugins.backends.items() if "fp8" in precisions(offer.thing)}
    found = compare(plugins.backends.values(), klein, card, default_job(klein, precision="fp8"), [])
    assert {each.backend for each in found} == can != set(plugins.backends)


def test_a_precision_that_a_backend_does_not_have():
    plugins = Plugins(frozenset())
    offers = plugins.backends_for("diffusers")
    road.check_precision(plugins, offers, "")
    for asked, fix in (("fp8", "--backend staged-decode"), ("fp9", "leave --precision out")):
        with pytest.raises(Misuse) as caught:
            road.check_precision(plugins, offers, asked)
        assert caught.value.problem.name == "precision-unknown" and caught.value.problem.fix == fix
    fine = [replace(offers[0], thing=Fine())]
    road.check_precision(plugins, fine, "fp8")
    with pytest.raises(Misuse, match="Did you mean fp8"):
        road.check_precision(plugins, fine, "fp9")


@pytest.mark.parametrize(
    ("asked", "backend", "what", "words"),
    [
        ("bf16", None, "no backend here draws klein-tiny in 'bf16'", "klein-tiny runs in fp32"),
        (
            "bf16",
            "diffusers-offload",
            "diffusers-offload does not draw klein-tiny in 'bf16'",
            "klein-tiny runs in fp32",
        ),
        ("nvfp4", None, "no backend here draws klein-tiny in 'nvfp4'", "staged-decode"),
    ],
)
def test_a_precision_that_a_model_does_not_have_is_no_matter_of_the_machine(asked, backend, what, words):
    plugins = Plugins(frozenset())
    machine = Hardware(ram_bytes=16 * GIB, ram_available_bytes=16 * GIB)
    problem = road.no_way(plugins, plugins.models["klein-tiny"], backend, machine, {"precision": asked}).problem
    assert (problem.what, problem.name, problem.fix) == (what, "precision-unknown", "leave --precision out")
    assert words in problem.why


def test_files_that_no_backend_reads(monkeypatch):
    plugins = Plugins(frozenset())
    monkeypatch.setattr(plugins, "backends_for", lambda name: [plugins.backend("comfyui")])
    problem = road.no_way(plugins, plugins.models["klein-tiny"], None, Hardware(), {}).problem
    assert (problem.what, problem.name) == ("no backend can run klein-tiny", "no-backend")


# As it is typed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "jobs.jsonl", "a cat"), "leave PROMPT out"),
        (("--batch", "jobs.jsonl", "--count", "2"), "leave --count out"),
        (("--batch", "jobs.jsonl", "-o", "x.png"), "error[output-not-a-folder]"),
        (("--batch", "nowhere.jsonl"), "error[batch-unreadable]"),
        (("--batch", "bad.jsonl"), "error[batch-empty]"),
        (("a cat", "--precision", "fp99"), "error[precision-unknown]"),
    ],
)
def test_a_batch_that_cannot_be_meant(arguments, words, kleinctl, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(PROMPT)
    (tmp_path / "bad.jsonl").write_text("a red circle\na blue star\n")
    answer = kleinctl("run", "--model", "klein-tiny", *arguments)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert words in answer.stderr and "Traceback" not in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "jobs.jsonl"]


def test_a_model_that_is_not_installed_leaves_no_folder_behind(kleinctl, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(PROMPT)
    for arguments in (("a cat", "-o", "new/x.png"), ("--batch", "jobs.jsonl")):
        answer = kleinctl("run", "--model", "klein-tiny", *arguments)
        assert answer.exit_code == 1 and "error[model-not-installed]" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.jsonl"]


@pytest.mark.slow
def test_a_batch_with_bad_lines_is_drawn_and_goes_on_when_it_is_typed_again(kleinctl, tmp_path):
    assert kleinctl("install", "--model", "klein-tiny", KLEINCTL_OFFLINE="1").exit_code == 0
    lines = ['{"prompt": "a red circle", "seed": 5}', '{"promt": "x"}', '{"prompt": "a blue star", "size": "120x64"}']
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    first = kleinctl("run", "--batch", "jobs.jsonl", "--model", "klein-tiny", "--steps", "2")
    made = [tmp_path / "klein-jobs" / name for name in ("klein-0001-5.png", "klein-0003-3.png")]
    assert (first.exit_code, first.stdout.splitlines()) == (1, list(map(str, made))), first.stderr
    assert first.stderr.count("jobs.jsonl:2: there is no key") == 2  # before, and at the end once more
    assert "120x64 is drawn as 128x64" in first.stderr and "Did you mean prompt?" in first.stderr

    lines[1] = '{"prompt": "a green square"}'
    second = kleinctl(
        "run", "--batch", "-", "-o", "klein-jobs", "--model", "klein-tiny", "--steps", "2", "--json",
        stdin="\n".join(lines),
    )  # fmt: skip
    document = conforms(second.stdout)
    assert [Path(image["path"]).name for image in document["images"]] == ["klein-0002-2.png"]
    assert (second.exit_code, document["failed"]) == (0, []) and "2 lines skipped" in second.stderr
    assert document["skipped"] == [{"line": line, "path": str(path)} for line, path in zip((1, 3), made, strict=True)]

    (tmp_path / "jobs.jsonl").write_text("\n".join([lines[0], "[]"]))
    third = kleinctl("run", "--batch", "jobs.jsonl", "--model", "klein-tiny", "--steps", "2", "--json")
    document = conforms(third.stdout)
    assert (third.exit_code, document["images"], len(document["skipped"])) == (1, [], 1)
    assert document["failed"][0]["line"] == 2 and document["failed"][0]["problem"]["name"] == "batch-line"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_a_batch_keeps_what_is_made_and_says_how_to_go_on(kleinctl, tmp_path):
    assert kleinctl("install", "--model", "klein-tiny", KLEINCTL_OFFLINE="1").exit_code == 0
    lines = ['{"prompt": "a red circle", "steps": 1}', *['{"prompt": "a blue star", "steps": 200}'] * 16]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "kleinctl", "run", "--batch", "jobs.jsonl", "--model", "klein-tiny"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    first, end = tmp_path / "klein-jobs" / "klein-0001-1.png", time.monotonic() + 60
    while not first.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in told
    assert "1 of 17 pictures are in" in told and "the same command goes on with the rest" in told
    assert [path.name for path in (tmp_path / "klein-jobs").iterdir()] == [first.name]


def test_every_size_that_is_rounded_is_told_though_it_is_drawn_as_another_is():
    from kleinctl.cli.run import Here, Wanted, judged, way_of_batch

    wanted = Wanted("klein-4b", None, {"width": 512, "height": 512}, (515, 515), None, None, (None, None))
    wanted.__dict__["hardware"] = imagine("RTX 4060", 32 * GIB)
    found = parsed(*(f'{{"prompt": "x", "size": "{size}"}}' for size in ("512x512", "510x510", "513x510")), PROMPT)
    _, odd = judged(wanted, Here(wanted, way_of_batch(wanted, found)), found)
    assert [each.what for each in odd] == [f"{size} is drawn as 512x512" for size in ("510x510", "513x510", "515x515")]


@pytest.mark.parametrize("made", [1, 2])
def test_ctrl_c_after_the_last_picture_promises_no_rest(made, tmp_path, capsys):
    from kleinctl.cli.run import batch_pictures

    left = [batch.Task(line, job(line), tmp_path / f"{line}.png", done=False) for line in (1, 2)]

    def pictures(*arguments: object) -> None:
        for task in left[:made]:
            task.path.touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_pictures(SimpleNamespace(pictures=pictures), parsed(PROMPT, PROMPT), left, tmp_path)
    told = capsys.readouterr().err.replace("\n", " ")
    assert f"{made} of 2 pictures are in" in told and ("goes on with the rest" in told) == (made < 2)


def test_a_line_too_large_for_the_machine_is_one_error(monkeypatch):
    from kleinctl.cli.run import Here, Wanted, judged, way_of_batch

    wanted = Wanted("klein-4b", None, {}, None, None, None, (None, None))
    wanted.__dict__["hardware"] = imagine("RTX 4060", 32 * GIB)
    found = parsed(PROMPT, '{"prompt": "x", "size": 8192}', '{"prompt": "x", "size": 512}')
    way = way_of_batch(wanted, found)
    faults, _ = judged(wanted, Here(wanted, way), found)
    assert [fault.line for fault in faults] == [2] and faults[0].problem.name == "does-not-fit"
    with pytest.raises(KleinctlError):
        way_of_batch(wanted, parsed('{"prompt": "x", "size": 8192}'))
