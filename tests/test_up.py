"""The whole road as a user goes it, in processes of its own, on klein-tiny."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kleinctl.cli import up
from kleinctl.hardware import imagine
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError
from kleinctl.records import read_record
from kleinctl.units import GIB
from tests.conftest import REPOSITORY
from tests.hub import Hub
from tests.test_cli import conforms

pytestmark = pytest.mark.slow

PROMPT = "a red circle on a blue background"
CLOSED = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}  # nothing listens on the discard port


@pytest.fixture
def run(kleinctl):
    return lambda *arguments, **env: kleinctl(*arguments, **CLOSED, **env)


def test_one_line_ends_in_a_picture_that_says_how_it_was_made_and_can_be_repeated(run, tmp_path):
    answer = run("up", PROMPT, "--seed", "5")
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout == f"{tmp_path / 'klein-5.png'}\n"
    assert "klein-4b needs an NVIDIA card, and none was found." in answer.stderr
    assert "127.0.0.1:9 cannot be reached" in answer.stderr
    assert "so klein-tiny runs instead" in answer.stderr
    record = read_record(tmp_path / "klein-5.png")
    named = {key: record[key] for key in ("prompt", "seed", "steps", "guidance", "width", "model", "backend")}
    assert named == {
        "prompt": PROMPT, "seed": 5, "steps": 4, "guidance": 1.0, "width": 256,
        "model": "klein-tiny", "backend": "staged-decode",
    }  # fmt: skip
    assert all(len(sha256) == 64 for sha256 in record["parts"].values())
    assert {"torch", "diffusers", "transformers", "kleinctl", "python"} <= set(record["versions"])

    again = run("run", "--from", "klein-5.png", "-o", "again.png", "--json")
    document = conforms(again.stdout)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "klein-5.png").read_bytes()
    assert document["images"][0]["seed"] == 5

    other = run("run", "--from", "klein-5.png", "-o", "other.png", "--backend", "diffusers", "--json")
    assert conforms(other.stdout)["images"][0]["pixels_sha256"] == document["images"][0]["pixels_sha256"]

    second = run("install", "--model", "klein-tiny", "--json")
    assert conforms(second.stdout)["complete"]
    assert conforms(run("verify", "--json").stdout)["problems"] == []
    assert conforms(run("doctor", "--json").stdout)["choice"]["model"] == "klein-tiny"


def test_several_pictures_an_edit_and_a_file_that_is_damaged_afterwards(run, tmp_path, empty_home):
    assert run("install", "--model", "klein-tiny").exit_code == 0
    made = run("run", PROMPT, "--count", "2", "--seed", "8", "-o", "folder", "--json")
    document = conforms(made.stdout)
    assert [image["seed"] for image in document["images"]] == [8, 9]
    first = tmp_path / "folder" / "klein-8.png"
    edit = run("run", "make the circle green", "--image", str(first), "--seed", "8", "-o", "edit.png")
    assert edit.stdout == f"{tmp_path / 'edit.png'}\n", edit.stderr
    assert read_record(tmp_path / "edit.png")["images"][0]["name"] == "klein-8.png"

    vae = empty_home / "kleinctl/models/klein-tiny/diffusers/vae/diffusion_pytorch_model.safetensors"
    whole = vae.read_bytes()
    vae.unlink()
    vae.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    answer = run("verify")
    assert answer.exit_code == 1
    assert "diffusion_pytorch_model.safetensors is not klein-tiny/vae" in answer.stdout
    assert "hint: kleinctl install --model klein-tiny" in answer.stdout
    assert run("install", "--model", "klein-tiny").exit_code == 0
    assert run("verify").exit_code == 0
    assert vae.read_bytes() == whole
    kept = list((empty_home / "kleinctl" / "quarantine").glob("*.json"))
    assert len(kept) == 1

    gone = run("uninstall", "klein-tiny", "--yes", "--json")
    assert conforms(gone.stdout)["left"] == []
    assert not vae.exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("run", "   "), 2, "the prompt is empty"),
        (("run", PROMPT, "--model", "klein-tiny"), 1, "klein-tiny is not installed"),
        (("run", PROMPT, "--model", "klein-tiny", "--image", "missing.png"), 2, "missing.png"),
        (("run", PROMPT, "--model", "klein-tiny", "--image", "text.txt"), 1, "text.txt"),
        (("run", PROMPT, "--model", "klein-tiny", "-o", "picture.gif"), 2, "picture.gif is no PNG"),
        (("run", PROMPT, "--model", "klein-tiny", "-o", "text.txt/picture.png"), 1, "cannot be written to"),
        (("run", PROMPT, "--model", "klein-4b"), 1, "needs an NVIDIA card"),
        (("run", "--from", "text.txt"), 1, "text.txt"),
        (("up", PROMPT, "--model", "klein-9b"), 1, "klein-9b"),
        (("up", PROMPT, "--backend", "comfortable"), 2, "there is no backend 'comfortable'"),
        (("install", "--model", "klein-tiny", "--variant", "base"), 2, "klein-tiny has no base variant"),
        (("verify", "klein-tiny"), 1, "nothing of klein-tiny is installed"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_lost(arguments, exit_code, words, run, tmp_path):
    (tmp_path / "text.txt").write_text("no picture")
    answer = run(*arguments)
    assert (answer.exit_code, answer.stdout) == (exit_code, "")
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_size_beyond_the_memory_names_one_that_fits(kleinctl):
    limits = ("plan", "--gpu", "RTX 4060", "--ram", "32", "--model", "klein-4b", "--json")
    rows = json.loads(kleinctl(*limits, "--size", "4096x4096").stdout)["rows"]
    assert not any(row["fit"]["fits"] for row in rows)
    from kleinctl import road

    plugins = Plugins(frozenset())
    error = road.no_way(
        plugins, plugins.model("klein-4b"), None, imagine("RTX 4060", 32 * GIB), {"width": 4096, "height": 4096}
    )
    assert error.problem.what == "klein-4b does not fit this machine at 4096x4096"
    assert error.problem.fix == "--size 2048x2048"


def test_of_models_that_do_not_run_the_one_that_lacks_the_least_is_told():
    from kleinctl.cli import options

    hardware = options.limited(imagine(None, 32 * GIB), None, "1GiB")
    with pytest.raises(KleinctlError) as raised:
        options.way(Plugins(frozenset()), hardware, None, None)
    problem = raised.value.problem
    assert (problem.name, problem.what) == ("does-not-fit", "klein-tiny does not fit this machine")
    assert " of RAM; 1.0 GiB are available" in problem.why


def test_a_driver_that_is_too_old_ends_with_the_hint_to_install_another():
    from dataclasses import replace

    from kleinctl import road

    plugins, hardware = Plugins(frozenset()), imagine("RTX 4090", 32 * GIB)
    old = replace(hardware, gpus=(replace(hardware.gpus[0], driver="450.80"),))
    problem = road.no_way(plugins, plugins.model("klein-4b"), None, old, {}).problem
    assert (problem.name, problem.ref) == ("no-torch-build", "A01")
    assert problem.fix.startswith("install driver")


def test_a_card_without_the_hub_says_that_the_hub_is_missing(monkeypatch, capsys):
    for name, value in CLOSED.items():
        monkeypatch.setenv(name, value)
    plugins, hardware = Plugins(frozenset()), imagine("RTX 4070 Ti SUPER", 32 * GIB)
    way, _ = up.choose(plugins, hardware, None, None, {}, False, accept=False)
    assert way.model.name == "klein-tiny"
    told = capsys.readouterr().err
    assert "cannot be reached" in told
    assert "so klein-tiny runs instead" in told
    with pytest.raises(KleinctlError) as caught:
        up.choose(plugins, hardware, "klein-4b", None, {}, False, accept=False)
    assert caught.value.problem.name == "hub-unreachable"


def test_a_card_and_no_network_allowed_runs_what_is_here(monkeypatch, capsys):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    way, _ = up.choose(Plugins(frozenset()), imagine("RTX 4090", 32 * GIB), None, None, {}, False, accept=False)
    assert way.model.name == "klein-tiny"
    assert "so klein-tiny runs instead" in capsys.readouterr().err


def test_what_would_help_is_told_before_the_miniature_runs_instead(monkeypatch, capsys):
    monkeypatch.setattr("kleinctl.fetch.reachable", lambda *given, **named: None)
    way, _ = up.choose(Plugins(frozenset()), imagine("GTX 1060", 16 * GIB), None, None, {}, False, accept=False)
    told = capsys.readouterr().err
    assert way.model.name == "klein-tiny" and "klein-4b does not fit this machine at 1024x1024" in told
    assert "hint: --size 256x256\nso klein-tiny runs instead" in told
    smaller = {"width": 256, "height": 256}
    way, _ = up.choose(Plugins(frozenset()), imagine("GTX 1060", 16 * GIB), None, None, smaller, False, accept=False)
    assert way.model.name == "klein-4b"


def test_room_for_the_files_and_not_for_the_environment_is_told_before_anything_is_fetched(monkeypatch, capsys):
    monkeypatch.setattr("kleinctl.fetch.reachable", lambda *given, **named: None)
    monkeypatch.setattr("kleinctl.store.free_bytes", lambda folder: 18 * 10**9)
    plugins, hardware = Plugins(frozenset()), imagine("RTX 4070", 16 * GIB)

    def chosen() -> str:
        return up.choose(plugins, hardware, "klein-4b", None, {}, False, accept=False)[0].model.name

    with monkeypatch.context() as fresh, pytest.raises(KleinctlError) as caught:
        fresh.setattr("kleinctl.environment.find", lambda *given, **named: None)
        chosen()
    assert caught.value.problem.name == "disk-full" and "18.0 GB free" in caught.value.problem.why
    with monkeypatch.context() as built:
        built.setattr("kleinctl.environment.find", lambda *given, **named: plugins)  # as good as one that is there
        assert chosen() == "klein-4b"


def test_a_hub_that_takes_its_time_is_no_reason_for_the_miniature(monkeypatch):
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(3.5)
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        way, _ = up.choose(Plugins(frozenset()), imagine("RTX 4070", 16 * GIB), None, None, {}, False, accept=False)
    finally:
        server.shutdown()
        server.server_close()
    assert way.model.name == "klein-4b"


def test_a_part_exchanged_for_one_of_the_same_size_is_found_before_it_is_used(run, tmp_path, empty_home):
    assert run("install", "--model", "klein-tiny").exit_code == 0
    part = empty_home / "kleinctl/models/klein-tiny/diffusers/transformer/diffusion_pytorch_model.safetensors"
    size = part.stat().st_size
    part.unlink()
    part.write_bytes(b"\0" * size)
    answer = run("run", PROMPT, "--model", "klein-tiny", "--seed", "1")
    assert answer.exit_code == 0, answer.stderr
    assert list((empty_home / "kleinctl" / "quarantine").glob("*.json"))
    assert read_record(tmp_path / "klein-1.png")["parts"]["transformer"] != "unknown"


def test_a_model_of_the_hub_is_fetched_verified_and_run(kleinctl, empty_home, tmp_path):
    """klein-tiny's files behind a server that answers as the hub does, under a manifest of the user's own."""
    source = REPOSITORY / "manifests" / "klein-tiny"
    text = (REPOSITORY / "manifests" / "klein-tiny.toml").read_text()
    text = text.replace('name = "klein-tiny"', 'name = "from-hub"', 1).replace("automatic = 2\n", "")
    text = text.replace(
        'package = "kleinctl_manifests", path = "klein-tiny/', 'repo = "me/model", revision = "main", path = "'
    )
    folder = empty_home / "kleinctl" / "manifests"
    folder.mkdir(parents=True)
    (folder / "from-hub.toml").write_text(text)
    with Hub() as hub:
        for path in source.rglob("*"):
            if path.is_file():
                hub.add("me/model", path.relative_to(source).as_posix(), path.read_bytes())
        env = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        dry = kleinctl("install", "--model", "from-hub", "--dry-run", **env)
        assert dry.exit_code == 0, dry.stderr
        assert not (empty_home / "kleinctl" / "models").exists()
        answer = kleinctl("up", PROMPT, "--model", "from-hub", "--seed", "1", **env)
        assert answer.exit_code == 0, answer.stderr
        assert answer.stdout == f"{tmp_path / 'klein-1.png'}\n"
        asked = len(hub.gets())
        assert kleinctl("install", "--model", "from-hub", **env).exit_code == 0
        assert len(hub.gets()) == asked
    offline = kleinctl("run", PROMPT, "--model", "from-hub", "--seed", "1", "-o", "b.png", KLEINCTL_OFFLINE="1")
    assert offline.exit_code == 0, offline.stderr
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "klein-1.png").read_bytes()


def long_run(folder: Path, home: Path) -> tuple[subprocess.Popen, int]:
    """A run that takes minutes, and the process id of its worker, once that has started."""
    options = ["--model", "klein-tiny", "--steps", "200", "-o", "x.png"]
    command = [sys.executable, "-m", "kleinctl", "run", PROMPT, *options]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, **CLOSED})
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for log in (home / "kleinctl" / "logs").glob("worker-*"):
            return process, int(log.stem.rpartition("-")[2])
        time.sleep(0.1)
    process.kill()
    raise AssertionError("no worker started")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_leaves_no_worker_and_no_half_picture(run, tmp_path, empty_home):
    assert run("install", "--model", "klein-tiny").exit_code == 0
    process, worker = long_run(tmp_path, empty_home)
    time.sleep(6)  # in the middle of importing or denoising
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_the_plugin_of_the_documentation_installs_and_draws_the_same_picture(run, tmp_path):
    site = tmp_path / "site"
    source = REPOSITORY / "docs" / "example-plugin"
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", source, copy], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        copy,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    assert run("install", "--model", "klein-tiny").exit_code == 0
    arguments = ("run", PROMPT, "--model", "klein-tiny", "--seed", "3", "--json")
    theirs = conforms(run(*arguments, "--backend", "resident", "-o", "a.png", PYTHONPATH=str(site)).stdout)
    ours = conforms(run(*arguments, "--backend", "staged", "-o", "b.png").stdout)
    assert theirs["backend"] == "resident"
    assert theirs["images"][0]["pixels_sha256"] == ours["images"][0]["pixels_sha256"]


def test_a_worker_killed_by_the_system_is_explained(run, tmp_path, empty_home):
    """What the kernel does where memory ends: SIGKILL."""
    assert run("install", "--model", "klein-tiny").exit_code == 0
    process, worker = long_run(tmp_path, empty_home)
    time.sleep(3)
    os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error[worker-killed]" in told
    assert "memory (RAM)" in told
    assert list(tmp_path.iterdir()) == []


def test_paths_in_a_picture_record_stay_private(run, tmp_path):
    assert run("up", PROMPT, "--seed", "2", "--model", "klein-tiny").exit_code == 0
    assert str(Path.home()) not in json.dumps(read_record(tmp_path / "klein-2.png"))
