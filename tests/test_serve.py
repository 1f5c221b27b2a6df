"""A model that stays loaded: who may use it, who waits, and what happens when somebody or something goes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kleinctl import serve
from kleinctl.home import server_file
from kleinctl.records import read_record
from kleinctl.server import _accept, only_one
from tests.test_cli import conforms

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

#: A backend that does what its prompt says.
MOODY = """
import os, random, time
from kleinctl import Fit, hookimpl
kleinctl_api = 1

class Moody:
    name, aliases, requires, layout, precisions = "moody", ("cross",), ("pillow",), "diffusers", ("mellow",)
    def fit(self, model, hardware, job):
        fits = job.width < 1024
        return Fit(0, 2**26, 0, 0.5, 0.1, fits, "moody", None if fits else "It is in no mood for large pictures.")
    def health(self, hardware, environment): return None
    def check_workflow(self, path, job): pass
    def load(self, model, budget): return Session()

class Session:
    strategy = "moody"
    def generate(self, job, progress):
        from PIL import Image
        progress("denoise", 0, job.steps)
        if job.prompt == "crash": os._exit(3)
        if job.prompt == "full": raise RuntimeError("CUDA out of memory. Tried to allocate 2.46 GiB.")
        if job.prompt == "hang": time.sleep(600)
        if job.prompt == "slow": time.sleep(2)
        progress("denoise", job.steps, job.steps)
        pixels = random.Random(job.seed).randbytes(job.width * job.height * 3)
        return Image.frombytes("RGB", (job.width, job.height), pixels)
    def close(self): pass

@hookimpl
def kleinctl_backends(): return [Moody()]
"""


@pytest.fixture
def moody(tmp_path_factory, monkeypatch, kleinctl):
    """klein-tiny, installed, and a backend that does what its prompt says."""
    site = tmp_path_factory.mktemp("site")
    (site / "moody.py").write_text(MOODY)
    info = site / "moody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kleinctl]\nmoody = moody\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    assert kleinctl("install", "--model", "klein-tiny").exit_code == 0


class Process:
    """A kleinctl that goes on running."""

    def __init__(self, folder, *arguments):
        self.log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "kleinctl", *map(str, arguments)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    @property
    def said(self):
        return self.log.read_text()

    def says(self, text, seconds=30):
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end and self.process.poll() is None, self.said
            time.sleep(0.02)
        return self

    def ends(self, seconds=10):
        return self.process.wait(seconds)


@pytest.fixture
def start(tmp_path_factory):
    """Start kleinctl and let it run; what is left of it at the end is ended."""
    folder, started = tmp_path_factory.mktemp("running"), []

    def starting(*arguments):
        started.append(Process(folder, *arguments))
        return started[-1]

    yield starting
    for each in started:
        each.process.terminate()
        each.ends()


@pytest.fixture
def server(moody, start):
    """A server that has loaded klein-tiny with the moody backend."""
    return start("serve", "--model", "klein-tiny", "--backend", "moody").says("waiting for jobs")


def state(kleinctl):
    return conforms(kleinctl("serve", "--status", "--json").stdout)


def until(**wanted):
    """Wait until the server's state is as wanted."""
    end = time.monotonic() + 15
    while True:
        server = serve.connect()
        now = vars(server.state)
        server.stop()
        if now | wanted == now:
            return
        assert time.monotonic() < end, now
        time.sleep(0.02)


def children(process):
    import psutil

    return psutil.Process(process.pid).children(recursive=True)


def pictures(folder):
    return sorted(path.name for path in folder.iterdir())


ANYWAY = ("--model", "klein-tiny", "--backend", "moody", "--size", "64", "--seed", "7")


def without_times(document):
    """A run's document without what differs from run to run."""
    document = json.loads(document)
    for part in (document, *document["images"]):
        del part["seconds"]
    return {key: value for key, value in document.items() if not key.startswith("peak")}


def test_a_run_with_the_server_is_the_run_without_it(server, kleinctl, tmp_path):
    with_server, without = tmp_path / "with", tmp_path / "without"
    with_server.mkdir(), without.mkdir()
    words = ("run", "a (red:1.3) circle", *ANYWAY[2:], "--count", "2", "-o", "folder", "--json")
    warm = kleinctl(*words, cwd=with_server)
    cold = kleinctl(*words, "--no-server", "--model", "klein-tiny", cwd=without)
    assert (warm.exit_code, cold.exit_code) == (0, 0), warm.stderr
    assert conforms(warm.stdout)["seconds"]["load"] == 0.0
    moved = cold.stdout.replace(str(without), str(with_server))
    assert without_times(warm.stdout) == without_times(moved)
    assert [line.rpartition(",")[0] for line in warm.stderr.splitlines()] == [
        line.rpartition(",")[0] for line in cold.stderr.splitlines()
    ]
    for name in pictures(with_server / "folder"):
        assert (with_server / "folder" / name).read_bytes() == (without / "folder" / name).read_bytes()
    server.says("klein-8.png  64x64")
    assert "klein-7.png" in server.said and server.said.count("seed") == 2  # the second run was not its


def test_what_goes_wrong_is_said_as_without_the_server(server, kleinctl, tmp_path):
    for words, exit_code, name in [
        (("full",), 1, "card-memory-full"),
        (("crash",), 1, "worker-crashed"),
        (("large", "--size", "1024"), 1, "does-not-fit"),
        (("a", "--image", "missing.png"), 2, "reference-unusable"),
        (("a", "-o", "picture.gif"), 2, "output-not-png"),
        ((" ",), 2, "prompt-empty"),
    ]:
        warm, cold = kleinctl("run", *ANYWAY, *words), kleinctl("run", *ANYWAY, *words, "--no-server")
        assert (warm.exit_code, cold.exit_code) == (exit_code, exit_code), words
        told = [[line for line in each.stderr.splitlines() if ".log" not in line] for each in (warm, cold)]
        assert told[0] == told[1] and f"error[{name}]" in warm.stderr
        assert pictures(tmp_path) == []
    assert server.said.count("failed:") == 2  # the others are refused before they are jobs
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0


def test_a_batch_uses_the_server_and_goes_on_after_a_crash(server, kleinctl, tmp_path):
    lines = [json.dumps({"prompt": prompt, "size": "64"}) for prompt in ("first", "crash", "last")]
    (tmp_path / "batch.jsonl").write_text("\n".join(lines))
    answer = kleinctl("run", "--batch", "batch.jsonl", "-o", "folder")
    assert answer.exit_code == 1 and "batch.jsonl:2: the worker crashed" in answer.stderr
    assert pictures(tmp_path / "folder") == ["klein-0001-1.png", "klein-0003-3.png"]
    assert server.said.count("64x64") == 4  # one that crashes is tried twice


def test_jobs_wait_for_each_other_in_their_order(server, kleinctl, start):
    first = start("run", "slow", *ANYWAY, "--seed", "1")
    until(working=True)
    second = start("run", "slow", *ANYWAY, "--seed", "2")
    second.says("1 run is before this one")
    third = start("run", "third", *ANYWAY, "--seed", "3")
    third.says("2 runs are before this one")
    assert kleinctl("serve", "--status").stdout.startswith(
        "klein-tiny with moody on the CPU: loaded, at work, 2 waiting"
    )
    assert [each.ends() for each in (first, second, third)] == [0, 0, 0]
    assert "1 run is before this one" in third.said
    assert [line.split()[1] for line in server.said.splitlines() if "64x64" in line] == [
        "klein-1.png", "klein-2.png", "klein-3.png",
    ]  # fmt: skip


@pytest.mark.parametrize(("how", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_client_that_goes_leaves_no_half_picture_and_a_server_that_goes_on(server, kleinctl, start, how, exit_code):
    running = start("run", "hang", *ANYWAY)
    running.says("klein-tiny with moody")
    until(working=True)
    waiting = start("run", "never", *ANYWAY).says("1 run is before")
    waiting.process.send_signal(how)
    assert waiting.ends() == exit_code
    until(working=True, waiting=0)
    time.sleep(0.3)
    running.process.send_signal(how)
    assert running.ends() == exit_code, running.said
    if how == signal.SIGINT:
        assert running.said.endswith("interrupted\n") and "Traceback" not in running.said
    until(working=False, loaded=False)
    assert not list(running.log.parent.glob("*.png")) and not list(running.log.parent.glob(".*partial"))
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0
    until(working=False, loaded=True)
    assert len(children(server.process)) == 1 and server.said.count("64x64") == 2
    assert "ended by its run" in server.said


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_is_replaced(server, kleinctl):
    [worker] = children(server.process)
    worker.kill()
    answer = kleinctl("run", "next", *ANYWAY)
    assert answer.exit_code == 0, answer.stderr
    assert state(kleinctl)["loaded"] and "failed" not in server.said


def test_memory_is_freed_when_asked_and_the_next_job_loads_again(server, kleinctl):
    assert conforms(kleinctl("serve", "--free", "--json").stdout)["loaded"] is False
    assert children(server.process) == [] and "memory freed as asked" in server.said
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0
    assert state(kleinctl)["loaded"] is True


def test_free_says_what_it_waits_for(server, start, kleinctl):
    start("run", "slow", *ANYWAY)
    until(working=True)
    answer = kleinctl("serve", "--free")
    assert "waiting: a run has the model" in answer.stderr and "not loaded" in answer.stdout
    assert "waiting" not in kleinctl("serve", "--free").stderr


def test_memory_is_freed_by_itself_after_a_while_without_a_job(moody, start, kleinctl):
    server = start("serve", "--model", "klein-tiny", "--backend", "moody", "--idle", "1").says("waiting for jobs")
    server.says("memory freed after 1 s without a job")
    assert children(server.process) == []
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0


def test_strangers_are_told_nothing_and_hold_nobody_up(server, kleinctl, empty_home):
    said = json.loads((empty_home / "kleinctl" / "serve.json").read_text())
    silent, slow = (socket.create_connection(("127.0.0.1", said["port"])) for _ in range(2))
    slow.sendall(said["token"][:9].encode())
    for first in (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"x" * 4096, b"\xff\0\n", said["token"][:-1].encode() + b"\n"):
        with socket.create_connection(("127.0.0.1", said["port"]), 5) as stranger:
            stranger.sendall(first)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0
    for each in (silent, slow):
        each.settimeout(5)
        assert each.recv(100) == b""
        each.close()
    with socket.create_connection(("127.0.0.1", said["port"]), 5) as garbled:
        garbled.sendall(said["token"].encode() + b"\n" + b"[" * 100_000 + b"\n")
        while garbled.recv(2**16):
            pass
    assert state(kleinctl)["running"]


def test_a_stranger_who_hangs_up_too_soon_does_not_make_the_server_deaf(monkeypatch):
    monkeypatch.setattr(serve, "SLICE_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    given = [ConnectionAbortedError(), OSError("too many open files"), ours]
    heard = threading.Event()

    class Listener:
        def fileno(self):
            return 3 if given else -1

        def accept(self):
            if isinstance(given[0], OSError):
                raise given.pop(0)
            return given.pop(0), None

    class Deaf:
        def hear(self, connection, token, proof):
            heard.set()

    with ours, theirs:
        _accept(Listener(), Deaf(), "token", "proof")
        assert heard.wait(5)


def test_a_second_server_is_refused_and_the_secrets_are_in_one_private_file_alone(server, kleinctl, empty_home):
    second = kleinctl("serve", "--model", "klein-tiny")
    assert second.exit_code == 1 and "error[server-running]: a server runs already" in second.stderr
    home = empty_home / "kleinctl"
    assert stat.S_IMODE((home / "serve.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "serve.lock").stat().st_mode) == 0o600  # who could read it could lock it
    assert kleinctl("run", "next", *ANYWAY).exit_code == 0
    token = json.loads((home / "serve.json").read_text())["token"]
    worker = children(server.process)[0]
    shown = [" ".join(worker.cmdline()), *worker.environ().values(), server.said, second.stderr]
    shown += [path.read_text() for path in (home / "logs").iterdir()]
    assert not [text for text in shown if token in text]


def test_a_server_that_died_is_forgotten_and_its_port_is_not_trusted(server, kleinctl, start, empty_home):
    worker = children(server.process)[0]
    server.process.kill()
    server.ends()
    worker.wait(5)
    file = empty_home / "kleinctl" / "serve.json"
    said = json.loads(file.read_text())
    with socket.create_server(("127.0.0.1", 0)) as listener:  # another program, that got the port
        file.write_text(json.dumps({**said, "port": listener.getsockname()[1]}))
        answer = kleinctl("run", "alone", *ANYWAY)
    assert answer.exit_code == 0 and "without the server" not in answer.stderr
    assert not file.exists()
    file.write_text(json.dumps(said))
    start("serve", "--model", "klein-tiny", "--backend", "moody").says("waiting for jobs")
    assert state(kleinctl)["running"] and json.loads(file.read_text())["token"] != said["token"]


def test_a_server_that_does_not_answer_is_done_without(server, kleinctl, empty_home):
    file = empty_home / "kleinctl" / "serve.json"
    whole = file.read_text()
    file.write_text(whole.replace("kleinctl.serve/2", "kleinctl.serve/0"))
    other = kleinctl("serve", "--status")
    assert other.exit_code == 1 and "It speaks kleinctl.serve/0 with" in other.stderr
    assert f"hint: kill {server.process.pid}" in other.stderr
    for port in ('"x"', "1e400", "-1", "99999999"):
        file.write_text(whole.replace(f'"port": {json.loads(whole)["port"]}', f'"port": {port}'))
        assert kleinctl("serve", "--status").exit_code in (0, 1)  # 3 would be a mistake of kleinctl's
    file.write_text(whole)
    server.process.send_signal(signal.SIGSTOP)
    try:
        answer = kleinctl("run", "alone", *ANYWAY)
        asked = kleinctl("serve", "--status")
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert answer.exit_code == 0 and "this runs without the server: It runs, and does not answer" in answer.stderr
    assert asked.exit_code == 1 and "[server-unreachable]" in asked.stderr


def test_what_the_loaded_model_cannot_answer_runs_without_the_server(server, kleinctl):
    for options, why in [
        (("--model", "klein-4b"), "It has klein-tiny with moody."),
        (("--backend", "staged-decode"), "It has klein-tiny with moody."),
        (("--precision", "int4"), "It has klein-tiny with moody, which cannot hold weights in 'int4'."),
        (("--ram-limit", "1GiB"), "for more memory than the limit"),
        (("--executor", "other"), "not where --executor other"),
    ]:
        answer = kleinctl("run", "a circle", "-o", "picture.gif", *options)  # which ends it before anything is loaded
        assert answer.exit_code in (1, 2)
        assert why in answer.stderr and answer.stderr.count("this runs without the server") == 1
    assert kleinctl("run", "a", "--backend", "cross", "--size", "64").exit_code == 0
    server.says("64x64")  # an alias of the backend it has


def test_a_precision_that_the_loaded_backend_can_hold_needs_no_other_worker(server, kleinctl, tmp_path):
    answer = kleinctl("run", "a", *ANYWAY[:2], "--size", "64", "--seed", "7", "--precision", "mellow", "-o", "a.png")
    assert answer.exit_code == 0 and "without the server" not in answer.stderr
    assert read_record(tmp_path / "a.png")["precision"] == "mellow" and server.says("a.png  64x64")


def test_a_workflow_is_run_by_the_server_that_can(server, kleinctl, tmp_path):
    (tmp_path / "w.json").write_text("{}")
    made = kleinctl("run", "x", *ANYWAY[:2], "--backend", "moody", "--workflow", "w.json", "-o", "a.png")
    assert made.exit_code == 0 and "without the server" not in made.stderr
    record = read_record(tmp_path / "a.png")
    assert record["workflow"]["name"] == "w.json" and "steps" not in record  # it has its own


def test_up_draws_with_the_model_that_is_loaded_or_says_why_it_loads_another(server, kleinctl, tmp_path):
    answer = kleinctl("up", "a circle", "--size", "64", "--seed", "7")
    assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path / 'klein-7.png'}\n"), answer.stderr
    assert "klein-tiny with moody" in answer.stderr and server.says("klein-7.png  64x64")
    other = kleinctl("up", "a circle", "--backend", "other")
    assert other.exit_code == 2 and "this runs without the server: It has klein-tiny with moody." in other.stderr
    refused = kleinctl("up", "a circle", "--size", "1024")
    assert refused.exit_code == 1 and "It is in no mood for large pictures." in refused.stderr


@pytest.mark.parametrize("how", ["--stop", "signal"])
def test_the_server_ends_and_leaves_nothing(server, kleinctl, start, how, empty_home):
    worker = children(server.process)[0]
    running = start("run", "hang", *ANYWAY)
    until(working=True)
    if how == "--stop":
        assert kleinctl("serve", "--stop").stdout == "no server runs\n"
    else:
        server.process.terminate()
    assert server.ends() == 0 and server.said.endswith("the server has ended\n")
    assert running.ends() == 1 and "error[server-ended]: the server has ended" in running.said
    worker.wait(5)
    assert not (empty_home / "kleinctl" / "serve.json").exists()
    assert not list(running.log.parent.glob("*.png")) and not list(running.log.parent.glob(".*partial"))
    assert state(kleinctl) == {"schema": "kleinctl.serve/1", "running": False}
    answer = kleinctl("serve", "--free")
    assert answer.exit_code == 1 and "error[server-not-running]: no server runs" in answer.stderr


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_server_outlives_whoever_read_what_it_says(moody, kleinctl, kind, tmp_path, empty_home):
    reading, writing = os.pipe() if kind == "pipe" else os.openpty()
    hidden = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `disown`
    try:
        command = [sys.executable, "-m", "kleinctl", "serve", "--model", "klein-tiny", "--backend", "moody"]
        serving = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing)
    finally:
        signal.signal(signal.SIGHUP, hidden)
        os.close(writing)
    try:
        said = b""
        while b"waiting for jobs" not in said:
            said += os.read(reading, 4096)
        os.close(reading)
        for seed in (1, 2):
            drawn = kleinctl("run", "a circle", "--seed", seed, "-o", tmp_path / f"{seed}.png")
            assert drawn.exit_code == 0 and "without the server" not in drawn.stderr
            assert state(kleinctl)["pid"] == serving.pid
        assert kleinctl("serve", "--stop").stdout == "no server runs\n"
        assert serving.wait(10) == 0
    finally:
        serving.kill()
        serving.wait()
    assert not list((empty_home / "kleinctl" / "logs").glob("crash-*"))


def test_a_model_that_is_not_installed_is_not_served(kleinctl, empty_home):
    answer = kleinctl("serve", "--model", "klein-tiny", KLEINCTL_OFFLINE="1")
    assert answer.exit_code == 1 and "[model-not-installed]" in answer.stderr
    assert not (empty_home / "kleinctl" / "serve.json").exists()


def test_options_that_do_not_go_together(kleinctl):
    for words in (("--free", "--stop"), ("--json",)):
        assert kleinctl("serve", *words).exit_code == 2


def test_a_run_that_finds_a_server_imports_little():
    """Each of these takes a hundredth of a second or more, of the three tenths that a warm run may cost."""
    code = "import sys, kleinctl.serve, kleinctl.cli.serve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"rich.console", "kleinctl.hardware", "kleinctl.identify", "kleinctl.logs", "kleinctl.plugins", "torch"}
    assert not heavy & set(done.stdout.split())


def test_a_private_file_is_private_from_its_first_moment(tmp_path, monkeypatch):
    modes = []
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda path, *a, **k: modes.append(path.stat().st_mode) or write(path, *a, **k)
    )
    os.umask(os.umask(0))
    serve.private_file(tmp_path / "secret", "x")
    assert [stat.S_IMODE(mode) for mode in modes] == [0o600]
    assert (tmp_path / "secret").read_text() == "x" and pictures(tmp_path) == ["secret"]


def test_a_private_file_that_cannot_be_put_in_place_leaves_no_secret(tmp_path):
    (tmp_path / "serve.json").mkdir()
    with pytest.raises(OSError):
        serve.private_file(tmp_path / "serve.json", "secret")
    assert [path.name for path in tmp_path.iterdir()] == ["serve.json"]


def test_on_windows_a_secret_is_the_users_alone_before_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "icacls").write_text('#!/bin/sh\nwc -c < "$1" > told\nprintf "%s\\n" "$*" >> told\n')
    (tmp_path / "icacls").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("USERDOMAIN", "DESK")
    monkeypatch.setenv("USERNAME", "ann lee")
    monkeypatch.setattr(serve.sys, "platform", "win32")
    serve.private_file(tmp_path / "secret", "x")
    size, told = (tmp_path / "told").read_text().splitlines()
    assert size.strip() == "0" and told.endswith(".tmp /inheritance:r /grant:r DESK\\ann lee:F")
    assert (tmp_path / "secret").read_text() == "x"


@pytest.mark.slow
def test_klein_tiny_stays_loaded_and_gives_the_same_file(kleinctl, start, tmp_path, monkeypatch):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    assert kleinctl("install", "--model", "klein-tiny").exit_code == 0
    server = start("serve").says("waiting for jobs", 60)
    words = ("run", "a red circle on a blue background", "--seed", "5")
    warm = conforms(kleinctl(*words, "-o", "a.png", "--json").stdout)
    cold = conforms(kleinctl(*words, "-o", "b.png", "--json", "--no-server").stdout)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert warm["record"] == cold["record"] and warm["strategy"] == cold["strategy"]
    assert server.said.count("256x256") == 1


def test_a_folder_where_the_servers_file_would_be(empty_home):
    server_file().mkdir(parents=True)
    with only_one():
        pass
