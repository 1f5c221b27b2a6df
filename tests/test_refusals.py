"""What kleinctl says no to: each refusal by the name under which `kleinctl explain` knows it."""

from __future__ import annotations

import errno
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kleinctl import config, generate, manifest, road
from kleinctl.cli import output
from kleinctl.executors import ProcessExecutor, importable
from kleinctl.explain import files
from kleinctl.facts import Facts
from kleinctl.generate import Output, choose_outputs, prepare_outputs
from kleinctl.hardware import Hardware, imagine
from kleinctl.home import logs_folder
from kleinctl.pictures import reference
from kleinctl.planner import default_job
from kleinctl.plugins import Plugins
from kleinctl.pngtext import read_text
from kleinctl.problem import KleinctlError
from kleinctl.records import job_from_record, read_record
from kleinctl.worker.log import WorkerLog
from kleinctl.worker.main import _decode_reference
from tests.conftest import REPOSITORY

TINY = manifest.load(REPOSITORY / "manifests" / "klein-tiny.toml")
JOB = default_job(TINY, prompt="x", seed=1)
RECORD = {"prompt": "x", "width": 64, "height": 64, "seed": 1, "steps": 4, "guidance": 1, "model": "m", "backend": "b"}


def picture(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size).save(path, "PNG")
    return path


def text(path: Path, content: str = "no picture") -> Path:
    path.write_text(content)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(picture(path).read_bytes()[:60])
    return path


def edited(path: Path) -> list[dict[str, str]]:
    return [{"name": path.name, "sha256": "0" * 64}]


def another_python(path: Path) -> Path:
    path.write_text('print(\'{"is": "Hello", "protocol": "kleinctl.worker/9", "kleinctl": "3", "pid": 1}\')')
    return path


def test_a_log_on_a_full_disk_ends_but_the_worker_is_still_heard(empty_home, monkeypatch):
    """Nobody would empty the pipe otherwise, and the worker would stand still at 64 KiB."""

    class Full(io.BytesIO):
        def write(self, line: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda *given, **options: Full())
    source = io.BytesIO(b"first\n" * 9 + b"last\n")
    log = WorkerLog(source, 1)
    log.join()
    assert source.read() == b"" and list(log.tail) == ["first"] * 9 + ["last"]


def no_log() -> None:
    logs_folder().parent.mkdir(parents=True)
    text(logs_folder())
    WorkerLog(io.BytesIO(), 1)


def unreadable_reference(path: Path) -> None:
    from kleinctl_plugins.pipeline import open_references

    open_references([path])


def nothing_for(backend: str) -> None:
    plugins = Plugins(frozenset())
    model = replace(TINY, parts=tuple(replace(part, to={"comfyui": "x"}) for part in TINY.parts))
    raise road.no_way(plugins, model, backend, Hardware(), {})


def too_large() -> None:
    plugins = Plugins(frozenset())
    klein = plugins.models["klein-4b"]
    raise road.no_way(plugins, klein, None, imagine("RTX 4060", 32 * 2**30), {"width": 8192, "height": 8192})


REFUSALS = {
    "bad-reference": lambda tmp: unreadable_reference(text(tmp / "a.png")),
    "config-broken": lambda tmp: config.load_config(text(tmp / "config.toml", "[run\n")),
    "config-unreadable": lambda tmp: config.load_config(tmp),
    "does-not-fit": lambda tmp: too_large(),
    "log-unwritable": lambda tmp: no_log(),
    "no-backend": lambda tmp: nothing_for("staged-decode"),
    "not-a-png": lambda tmp: read_text(text(tmp / "a.png")),
    "output-not-a-folder": lambda tmp: choose_outputs([JOB, JOB], "out.png"),
    "output-not-png": lambda tmp: choose_outputs([JOB], "out.jpg"),
    "output-unwritable": lambda tmp: prepare_outputs([JOB], [Output(tmp)]),
    "picture-damaged": lambda tmp: read_text(cut(tmp / "a.png")),
    "picture-unreadable": lambda tmp: read_text(tmp / "nowhere.png"),
    "plugin-not-importable": lambda tmp: importable("builtins"),
    "prompt-empty": lambda tmp: generate.check_prompt("  "),
    "record-damaged": lambda tmp: job_from_record({}),
    "record-missing": lambda tmp: read_record(picture(tmp / "a.png")),
    "reference-damaged": lambda tmp: _decode_reference(cut(tmp / "a.png")),
    "reference-differs": lambda tmp: job_from_record(
        {**RECORD, "images": edited(tmp / "a.png")}, [picture(tmp / "a.png")]
    ),
    "reference-unusable": lambda tmp: reference(text(tmp / "a.heic")),
    "references-missing": lambda tmp: job_from_record({**RECORD, "images": edited(tmp / "a.png")}),
    "report-unreadable": lambda tmp: Facts.from_json({"hardware": {"gpus": []}}),
    "unknown-backend": lambda tmp: Plugins(frozenset()).backends_for("comfortable"),
    "unknown-executor": lambda tmp: road.executor(Plugins(frozenset()), "moon"),
    "unknown-gpu": lambda tmp: imagine("RTX 9999 of tomorrow", None),
    "worker-protocol": lambda tmp: ProcessExecutor(bootstrap=another_python(tmp / "x.py")).start(
        Path(sys.executable), "tests.plugins.echo"
    ),
    "worker-start": lambda tmp: ProcessExecutor().start(tmp / "python", "tests.plugins.echo"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_its_name_and_a_page(name, tmp_path):
    with pytest.raises(KleinctlError) as caught:
        REFUSALS[name](tmp_path)
    problem = caught.value.problem
    assert problem.name == name
    assert problem.what and problem.why and problem.fix
    assert name in files()


@pytest.mark.parametrize(
    ("name", "arguments", "exit_code"),
    [
        ("log-unreadable", ("doctor", "--log", "nowhere.log"), 1),
        ("unknown-plugin", ("plugins", "--disable", "nobody"), 2),
        ("usage", ("run", "--no-such-option"), 2),
    ],
)
def test_a_command_that_refuses(name, arguments, exit_code, kleinctl):
    answer = kleinctl(*arguments)
    assert f"error[{name}]" in answer.stderr and answer.exit_code == exit_code
    assert name in files()


def test_our_own_mistake_is_kept_in_a_file(capsys):
    output.our_bug(RuntimeError("a bug"))
    said = capsys.readouterr().err
    assert "error[bug]: kleinctl made a mistake" in said and "RuntimeError: a bug" in said
    [kept] = logs_folder().glob("crash-*.log")
    assert "RuntimeError: a bug" in kept.read_text()


def test_names_that_other_tests_bring_about_have_a_page():
    for name in (
        "worker-crashed",
        "worker-killed",
        "worker-silent",
        "job-failed",
        "plugin-failed",
        "plugin-name-taken",
    ):
        assert name in files()
