"""A ComfyUI that is started for a worker: it becomes ready, it ends, and it never outlives kleinctl."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kleinctl_plugins import comfyui_server
from kleinctl_plugins.comfyui_server import arguments, open_server, running_server

from kleinctl import comfyui
from kleinctl.backends import Budget
from kleinctl.comfyui import Checkout
from kleinctl.problem import KleinctlError
from kleinctl.units import GIB
from tests.comfyui_double import Double, checkout
from tests.conftest import REPOSITORY
from tests.plugins.comfyui_models import CPU


def known(folder, **more):
    return Checkout(folder, Path(sys.executable), owned=True, **more)


def started(folder):
    """The arguments and the process of each start."""
    lines = (folder / "starts.txt").read_text().splitlines() if (folder / "starts.txt").exists() else []
    return [(json.loads(line.rpartition(" ")[0]), int(line.rpartition(" ")[2])) for line in lines]


def wait_until(holds, seconds=15):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def failed(folder, **more):
    with pytest.raises(KleinctlError) as failure:
        open_server(known(folder, **more), CPU, None).close()
    return failure.value.problem


def test_it_is_started_on_loopback_and_ends_when_it_is_closed(tmp_path):
    folder = checkout(tmp_path / "ComfyUI")
    server = open_server(known(folder), CPU, tmp_path / "paths.yaml")
    ((given, pid),) = started(folder)
    assert server.version == "0.29.0"
    assert given[given.index("--listen") + 1] == "127.0.0.1"
    assert given[given.index("--port") + 1] == server.url.rpartition(":")[2]
    assert given[given.index("--extra-model-paths-config") + 1] == str(tmp_path / "paths.yaml")
    assert "--cpu" in given
    server.close()
    assert not psutil.pid_exists(pid)
    assert not Path(folder / "output").exists()


def test_one_checkout_runs_once_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui_server, "LOCK_SECONDS", 0.3)
    folder = checkout(tmp_path / "ComfyUI")
    first = open_server(known(folder), CPU, None)
    assert failed(folder).name == "comfyui-in-use"
    first.close()
    open_server(known(folder), CPU, None).close()
    assert len(started(folder)) == 2


def test_who_waits_for_a_checkout_and_is_stopped_starts_nothing(tmp_path):
    folder = checkout(tmp_path / "ComfyUI")
    first = open_server(known(folder), CPU, None)
    waiting = comfyui_server.Started(known(folder), CPU, None)
    time.sleep(0.3)
    began = time.monotonic()
    waiting.close()
    assert time.monotonic() - began < 2
    first.close()
    assert len(started(folder)) == 1


def test_temporary_files_are_a_checkouts_own_and_go_with_its_server(tmp_path):
    servers = [open_server(known(checkout(tmp_path / name)), CPU, None) for name in ("one", "two")]
    ((one, _),), ((two, _),) = started(tmp_path / "one"), started(tmp_path / "two")
    places = [Path(given[given.index("--temp-directory") + 1]) for given in (one, two)]
    assert places[0] != places[1]
    (places[0] / "temp").mkdir()
    (places[0] / "temp" / "reference.png").write_bytes(b"a picture")
    servers[0].close()
    assert [place.exists() for place in places] == [False, True]
    servers[1].close()


def test_what_the_log_said_of_an_earlier_job_explains_no_death(tmp_path):
    server = open_server(known(checkout(tmp_path / "ComfyUI")), CPU, None)
    server.log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    server.watch("job-2")
    os.kill(server.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    wait_until(lambda: server.ended)
    with pytest.raises(KleinctlError) as failure:
        server.alive()
    server.close()
    assert failure.value.problem.name != "card-memory-full"


def test_a_port_that_was_taken_meanwhile_is_not_the_end(tmp_path):
    folder = checkout(tmp_path / "ComfyUI", taken=1)
    open_server(known(folder), CPU, None).close()
    ports = [given[given.index("--port") + 1] for given, _ in started(folder)]
    assert len(set(ports)) == 2


def test_a_port_that_is_taken_each_time(tmp_path):
    assert failed(checkout(tmp_path / "ComfyUI", taken=99)).name == "port-in-use"


def test_another_comfyui_on_the_port_is_not_taken_for_ours(tmp_path):
    folder = checkout(tmp_path / "ComfyUI", strange=1)
    open_server(known(folder), CPU, None).close()
    assert len(started(folder)) == 2


def test_another_program_on_the_port_is_not_taken_for_comfyui(tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui_server, "PORTS_TRIED", 1)
    problem = failed(checkout(tmp_path / "ComfyUI", status={"/system_stats": 404}))
    assert problem.name == "port-in-use"
    assert "answers HTTP 404" in problem.why


@pytest.mark.parametrize("answer", [{}, [], {"system": 3}, {"system": {"argv": ["--port", "1"]}}], ids=str)
def test_an_answer_of_another_shape_is_not_comfyuis(monkeypatch, answer):
    assert not comfyui_server._started_with(answer, ["--port", "1"])
    monkeypatch.setattr(comfyui_server.Client, "ask", lambda *asked: answer)
    with pytest.raises(KleinctlError, match="not ComfyUI"):
        open_server(None, replace(CPU, server="http://127.0.0.1:1"), None)


def test_a_version_without_end_is_no_number():
    with Double(version="9" * 5000) as double:
        server = open_server(None, replace(CPU, server=double.url), None)
        server.close()
    assert len(server.version) == 40


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"fail": "SyntaxError: what is this"}, "comfyui-start", "SyntaxError: what is this"),
        ({"fail": "ModuleNotFoundError: No module named 'torchsde'"}, "module-missing", "torchsde"),
        ({"version": "0.9.1"}, "comfyui-too-old", "0.9.1"),
        ({"status": {"/system_stats": 403}}, "origin-mismatch", "403"),
    ],
    ids=["broken", "a requirement lacks", "from before klein", "it refuses"],
)
def test_a_comfyui_that_does_not_start_says_why(tmp_path, options, name, said):
    problem = failed(checkout(tmp_path / "ComfyUI", **options))
    assert problem.name == name
    assert said in f"{problem.what} {problem.why}"
    wait_until(lambda: not any(psutil.pid_exists(pid) for _, pid in started(tmp_path / "ComfyUI")))


def test_a_python_that_is_not_there(tmp_path):
    folder = checkout(tmp_path / "ComfyUI")
    with pytest.raises(KleinctlError) as failure:
        open_server(replace(known(folder), python=tmp_path / "python"), CPU, None)
    assert failure.value.problem.name == "comfyui-start"
    assert "No such file" in failure.value.problem.why


WORKER = """
import sys, time
from pathlib import Path
from kleinctl.backends import Budget
from kleinctl.comfyui import Checkout
from kleinctl_plugins.comfyui_server import open_server, running_server
folder, url = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
checkout = Checkout(folder, Path(sys.executable), True, url=url)
server = running_server(checkout) or open_server(checkout, Budget(0, 0, "cpu"), None)
server.watch("job-1")
print("ready", flush=True)
time.sleep(60)
"""


def worker(*arguments):
    """A process that holds a server with a job under way."""
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_nothing_is_left_when_the_worker_is_killed(tmp_path):
    folder = checkout(tmp_path / "ComfyUI")
    process = worker(folder)
    ((_, pid),) = started(folder)
    assert psutil.pid_exists(pid)
    process.kill()
    process.wait()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_job_is_taken_back_from_a_server_that_goes_on_when_the_worker_is_killed(tmp_path):
    with Double(folder=tmp_path) as double:
        process = worker(tmp_path, double.url)
        process.kill()
        process.wait()
        wait_until(lambda: double.asked("/interrupt"))
        assert double.asked("/queue") == [{"delete": ["job-1"]}]
        assert double.asked("/interrupt") == [{"prompt_id": "job-1"}]
        assert not double.asked("/free")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way, of Linux")
def test_a_server_does_not_outlive_what_watches_over_it(tmp_path):
    folder = checkout(tmp_path / "ComfyUI")
    server = open_server(known(folder), CPU, None)
    ((_, pid),) = started(folder)
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid))
    with pytest.raises(KleinctlError):
        server.alive()
    server.close()


def test_a_server_that_goes_on_is_freed_and_left(tmp_path):
    with Double(folder=tmp_path) as double:
        running_server(known(tmp_path, url=double.url)).close()
        assert double.asked("/free") == [{"unload_models": True, "free_memory": True}]
        server = running_server(known(tmp_path, url=double.url))
        assert (server.ours, server.ended) == (False, False)
    assert server.ended
    server.close()


@pytest.mark.parametrize("options", [{}, {"folder": "/x"}, {"status": {"/internal/folder_paths": 404}}], ids=str)
def test_a_server_of_another_checkout_is_not_used(tmp_path, options):
    with Double(**options) as double:
        assert running_server(known(tmp_path, url=double.url)) is None
        assert [path for path, _ in double.headers] == ["/internal/folder_paths"]
    assert running_server(known(tmp_path, url=double.url)) is None, "nothing answers there any more"
    assert running_server(known(tmp_path)) is None


def test_a_server_that_works_for_somebody_else_keeps_its_models(tmp_path):
    with Double(ahead=2, folder=tmp_path) as double:
        running_server(known(tmp_path, url=double.url)).close()
        assert not double.asked("/free")


def test_a_server_that_klein_cannot_be_drawn_with_is_left_as_it_is(tmp_path):
    with Double(version="0.9.1", folder=tmp_path) as double:
        with pytest.raises(KleinctlError, match="too old"):
            running_server(known(tmp_path, url=double.url))
        assert not double.asked("/free")


def test_what_watches_cleans_up_though_the_server_answers_nonsense():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        warden = subprocess.Popen(
            [sys.executable, "-I", str(comfyui_server.WARDEN)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        warden.stdin.write(json.dumps({"url": url}).encode() + b'\n{"prompt": "job-1"}\n')
        warden.stdin.close()
        for _ in ("/queue", "/interrupt"):
            listening.settimeout(10)
            asked, _ = listening.accept()
            asked.recv(4096)
            asked.sendall(b"nonsense\r\n\r\n")
            asked.close()
        assert (warden.wait(10), warden.stderr.read()) == (0, b"")
        warden.stderr.close()


@pytest.mark.parametrize(
    "said", [b"", b'{"url', b'{"url": "http://127.0.0.1:1"}\n{"prom'], ids=["nothing", "half", "more"]
)
def test_what_watches_ends_quietly_when_the_worker_is_killed_in_the_middle_of_a_word(said):
    command = [sys.executable, "-I", str(comfyui_server.WARDEN)]
    ended = subprocess.run(command, input=said, capture_output=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


# How it is started


def test_a_budget_leaves_the_rest_of_what_is_free(tmp_path):
    from kleinctl.hardware.catalogue import imagine

    hardware = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    free = hardware.gpus[0].vram_free_bytes
    given = arguments(known(tmp_path), 1, Budget(free - 3 * GIB, 0, "cuda:0", hardware), None, tmp_path)
    assert given[given.index("--reserve-vram") + 1] == "3.00"
    assert not {"--cpu", "--disable-dynamic-vram", "--lowvram", "--highvram"} & set(given)


def test_the_users_own_arguments_stay_but_for_those_that_are_ours(tmp_path):
    theirs = ("--port", "8188", "--listen", "--fast", "fp16_accumulation", "--auto-launch", "--output-directory=/x")
    given = arguments(known(tmp_path, arguments=theirs, base=tmp_path / "base"), 9000, CPU, None, tmp_path)
    assert given[:2] == ["--fast", "fp16_accumulation"]
    assert given.count("--port") == given.count("--listen") == 1
    assert "--output-directory=/x" not in given
    assert given[given.index("--base-directory") + 1] == str(tmp_path / "base")


def test_settings_of_the_worker_are_not_for_comfyui():
    worker = {"PYTHONPATH": "/x", "PYTORCH_CUDA_ALLOC_CONF": "y", "PATH": "/bin"}
    given = comfyui_server.environment(worker, owned=True)
    assert given == {"PATH": "/bin", "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1"}


def test_a_checkout_that_is_somebodys_own_is_left_as_it_was(tmp_path):
    """What ComfyUI writes to where it is started, and what its Python compiles, goes elsewhere."""
    program = checkout(tmp_path / "ComfyUI")
    (program / "helper.py").write_text("")
    code = (program / "main.py").read_text()
    (program / "main.py").write_text(f"import helper\nopen('comfyui_detail.log', 'w').close()\n{code}")
    before = set(program.rglob("*"))
    open_server(Checkout(program, Path(sys.executable), owned=False), CPU, None).close()
    assert {path.name for path in set(program.rglob("*")) - before} == {"starts.txt"}  # the double's own
    assert (comfyui.folder() / "run" / "comfyui_detail.log").is_file()
