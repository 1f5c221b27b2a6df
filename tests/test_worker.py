"""The worker process: real ones, with backends that paint, fail, crash and hang."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kleinctl.backends import Budget, Job
from kleinctl.executors import ProcessExecutor, WorkerDied, importable, worker_environment
from kleinctl.exits import exit_text, looks_like_no_memory
from kleinctl.home import logs_folder
from kleinctl.problem import KleinctlError
from kleinctl.units import GIB
from kleinctl.worker import protocol
from kleinctl.worker.log import LOGS_KEPT
from kleinctl.worker.looks import prompt_cut
from kleinctl.worker.main import Line, Stopwatch
from kleinctl.worker.protocol import Generate, Load, Loaded, Made, Prepare, Prepared
from tests.models import tiny_model

ECHO, MISBEHAVING = "tests.plugins.echo", "tests.plugins.misbehaving"
PYTHON = Path(sys.executable)
LINUX = sys.platform == "linux"


def nothing(progress):
    pass


def load(backend, plugin=MISBEHAVING):
    return Load(plugin, backend, tiny_model(), Path("/nowhere"), Budget(0, 2**30, "cpu"))


def generate(folder, seed=7, prompt="a red circle", **changes):
    job = Job(prompt, **{"width": 64, "height": 48, "seed": seed, "steps": 3, "guidance": 1.0, **changes})
    return Generate(job, folder / "out.png", folder / ".out.png.partial", {"prompt": prompt})


def problem_of(backend, folder, executor=None):
    """The problem that a backend ends with, loading or generating."""
    with pytest.raises(KleinctlError) as caught, (executor or ProcessExecutor()).start(PYTHON, MISBEHAVING) as worker:
        worker.ask(load(backend), nothing)
        worker.ask(generate(folder), nothing)
    return caught.value.problem


def gone(pid, seconds=3.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_picture_from_a_worker(tmp_path):
    stages = []
    with ProcessExecutor().start(PYTHON, ECHO) as worker:
        loaded = worker.ask(load("parrot", ECHO), nothing)
        made = worker.ask(generate(tmp_path), lambda progress: stages.append(progress.stage))
    assert isinstance(loaded, Loaded) and isinstance(made, Made)
    assert loaded.device == "cpu" and loaded.versions["python"] == sys.version.split()[0]
    assert list(dict.fromkeys(stages)) == ["encode", "denoise", "decode", "save"]
    assert (tmp_path / "out.png").exists() and not (tmp_path / ".out.png.partial").exists()
    assert made.peak_vram_bytes == 0 and 10 * 2**20 < made.peak_rss_bytes < 2**31
    assert set(made.seconds) == {"encode", "denoise", "decode", "save"}


def test_libraries_that_print_on_stdout_and_read_stdin(tmp_path):
    """A stray `{"is": "Close"}` must not pass for an answer, and a question must not eat the next request."""
    with ProcessExecutor().start(PYTHON, MISBEHAVING) as worker:
        worker.ask(load("noisy"), nothing)
        assert isinstance(worker.ask(generate(tmp_path), nothing), Made)
    log = worker.log.read_text()
    assert {"garbage on stdout", "garbage from C", "garbage from a child", '{"is": "Close"}'} <= set(log.splitlines())
    assert max(map(len, log.splitlines())) < 5000  # of a line of 100,000


@pytest.mark.parametrize(
    ("backend", "name", "says"),
    [
        ("import-error", "job-failed", "a_name_of_tomorrow"),
        ("missing-module", "module-missing", "a_module_nobody_has"),
        ("old-diffusers", "diffusers-too-old", "0.37.0"),
        ("card-full-later", "card-memory-full", "2.46 GiB"),
        ("memory-full", "memory-full", "RAM"),
        ("wrong-encoder-later", "text-encoder-width", "Qwen3 8B"),
        ("own-problem", "moon", "It has to be full."),
    ],
)
def test_a_backend_that_raises(backend, name, says, tmp_path):
    problem = problem_of(backend, tmp_path)
    assert problem.name == name
    assert says in problem.what + problem.why


def test_after_a_failed_picture_the_next_one_can_be_made(tmp_path):
    with ProcessExecutor().start(PYTHON, MISBEHAVING) as worker:
        worker.ask(load("card-full-later"), nothing)
        with pytest.raises(KleinctlError, match="drawing the picture"):
            worker.ask(generate(tmp_path), nothing)
        assert isinstance(worker.ask(generate(tmp_path, seed=1), nothing), Made)


def test_a_backend_that_does_nothing_ahead(tmp_path):
    with ProcessExecutor().start(PYTHON, ECHO) as worker:
        worker.ask(load("echo", ECHO), nothing)
        assert worker.ask(Prepare((generate(tmp_path).job,)), nothing) == Prepared()


def test_what_a_backend_does_ahead_is_timed_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("AHEAD_FILE", str(tmp_path / "told"))
    said = []
    with ProcessExecutor().start(PYTHON, "tests.plugins.ahead") as worker:
        worker.ask(load("ahead-notes", "tests.plugins.ahead"), nothing)
        jobs = tuple(generate(tmp_path, seed=seed).job for seed in (5, 3))
        prepared = worker.ask(Prepare(jobs), lambda progress: said.append((progress.stage, progress.done)))
        assert worker.ask(generate(tmp_path), nothing).warnings == ()
    assert set(prepared.seconds) == {"prepare", "encode"} and prepared.warnings == ("it was slow",)
    assert said == [("encode", 0), ("encode", 2)] and (tmp_path / "told").read_text() == "5 3\n"


def test_a_worker_that_cannot_write_removes_what_it_wrote(tmp_path):
    with ProcessExecutor().start(PYTHON, MISBEHAVING) as worker:
        worker.ask(load("disk-full"), nothing)
        with pytest.raises(KleinctlError, match="the disk is full"):
            worker.ask(generate(tmp_path), nothing)
        assert list(tmp_path.iterdir()) == []


def test_a_picture_that_found_no_room_on_the_disk_is_not_drawn_again(tmp_path):
    stages = []
    with ProcessExecutor().start(PYTHON, ECHO) as worker:
        worker.ask(load("echo", ECHO), nothing)
        with pytest.raises(KleinctlError):
            worker.ask(generate(tmp_path / "missing"), nothing)
        made = worker.ask(generate(tmp_path), lambda progress: stages.append(progress.stage))
        assert stages == ["save"] and (tmp_path / "out.png").exists()
        other = worker.ask(generate(tmp_path, seed=8), lambda progress: stages.append(progress.stage))
    assert "denoise" in stages and other.pixels_sha256 != made.pixels_sha256


def test_a_worker_that_crashes(tmp_path):
    problem = problem_of("exits-later", tmp_path)
    assert problem.what == "the worker crashed"
    assert "exit status 3 while drawing the picture" in problem.why
    assert "this is the last thing it said" in problem.why
    assert problem.fix == f"kleinctl doctor --log {problem.path}"
    assert Path(problem.path).is_file()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_crashes_in_native_code(tmp_path):
    problem = problem_of("segfault", tmp_path)
    assert "signal 11 (SIGSEGV, a crash in native code) while loading the model" in problem.why
    assert "in segfault" in Path(problem.path).read_text()  # the Python lines that led there


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_the_system_kills(tmp_path):
    problem = problem_of("killed-later", tmp_path)
    assert (problem.name, problem.ref) == ("worker-killed", "D03")
    assert "while drawing the picture" in problem.why and "memory (RAM) ran out" in problem.why


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_whose_library_gives_up_for_want_of_memory(tmp_path):
    problem = problem_of("no-memory-in-torch", tmp_path)
    assert problem.name == "memory-full" and "std::bad_alloc" in problem.why


def test_a_worker_that_hangs(tmp_path):
    problem = problem_of("hangs-later", tmp_path, ProcessExecutor(quiet_seconds=1))
    assert problem.name == "worker-silent"
    assert "Nothing came of it for 1 seconds while drawing the picture" in problem.why
    if os.name == "posix":
        assert "in hangs" in Path(problem.path).read_text()  # where it hung


def test_a_worker_of_another_version(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        'import sys\nprint(\'{"is": "Hello", "protocol": "kleinctl.worker/9", "kleinctl": "3", "pid": 1}\')'
    )
    with pytest.raises(KleinctlError) as caught:
        ProcessExecutor(bootstrap=other).start(PYTHON, ECHO)
    assert caught.value.problem.why == "This one speaks kleinctl.worker/5; the worker said kleinctl.worker/9."


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(KleinctlError, match="does not start"):
        ProcessExecutor().start(tmp_path / "python", ECHO)


def test_a_python_that_says_nothing(tmp_path):
    script = tmp_path / "sleeps.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(WorkerDied) as caught:
        ProcessExecutor(bootstrap=script, start_seconds=0.5).start(PYTHON, ECHO)
    assert "while starting" in caught.value.problem.why


def test_a_plugin_that_is_nowhere():
    with pytest.raises(KleinctlError, match="no_such_plugin"):
        importable("no_such_plugin.backend")


@pytest.mark.skipif(os.name == "nt", reason="process groups")
@pytest.mark.parametrize("stopped", [False, True])
def test_stopping_leaves_no_process_behind(stopped, tmp_path, monkeypatch):
    """While a backend that drives another program hangs, or is suspended: both are gone within three seconds."""
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "pids"))
    worker = ProcessExecutor().start(PYTHON, MISBEHAVING)

    def ask():
        with contextlib.suppress(WorkerDied):
            worker.ask(load("hangs-with-child"), nothing)

    asking = threading.Thread(target=ask)
    asking.start()
    pids = [int(pid) for pid in read_when_there(tmp_path / "pids").split()]
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    worker.stop()
    assert time.monotonic() - start < 3
    assert all(gone(pid) for pid in pids)
    asking.join()


@pytest.mark.skipif(os.name == "nt", reason="zombies")
def test_a_worker_that_another_thread_has_waited_for_can_be_stopped():
    worker = ProcessExecutor().start(PYTHON, ECHO)
    os.kill(worker._process.pid, signal.SIGKILL)
    os.waitpid(worker._process.pid, 0)
    worker.stop()


CONTROL = """
import threading
from tests.test_worker import *

def control():
    with ProcessExecutor().start(PYTHON, MISBEHAVING) as worker:
        worker.ask(load("hangs-with-child"), nothing)

if sys.argv[1] == "main":
    control()
thread = threading.Thread(target=control)
thread.start()
thread.join()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("thread", "signal_number"), [("main", signal.SIGINT), ("main", signal.SIGKILL), ("other", signal.SIGKILL)]
)
def test_a_control_process_that_ends_takes_its_worker_along(thread, signal_number, tmp_path):
    environment = {**os.environ, "CHILD_FILE": str(tmp_path / "pids"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CONTROL, thread]
    control = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    worker, child = map(int, read_when_there(tmp_path / "pids").split())
    control.send_signal(signal_number)
    assert gone(worker)
    if (thread, signal_number) != ("main", signal.SIGKILL):
        assert gone(child)
    elif not gone(child, 0.5):  # Linux is quicker than the worker, which would have ended its child
        os.kill(child, signal.SIGKILL)
    control.wait()


def read_when_there(path, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


def test_a_picture_half_written_that_cannot_be_removed_keeps_no_worker_alive(tmp_path, monkeypatch):
    """Windows removes no file that is being written; the worker would keep the card's memory for ever."""
    ended = threading.Event()
    monkeypatch.setattr(os, "getpgrp", lambda: 0, raising=False)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as requests:
        Line(requests, io.BytesIO()).partial = tmp_path  # a folder cannot be removed like a file
        os.close(writing)
        assert ended.wait(5)


def test_another_environment_gets_kleinctl_and_the_plugin_and_nothing_else(tmp_path, monkeypatch):
    """A managed environment has its own packages; the light program's must not leak into it."""
    import PIL

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    pillow = Path(PIL.__file__).parent
    for folder in (pillow, pillow.parent / "pillow.libs"):
        if folder.exists():
            shutil.copytree(folder, site / folder.name)
    plugin = tmp_path / "plugins" / "alone.py"
    plugin.parent.mkdir()
    plugin.write_text(Path(__file__).with_name("plugins").joinpath("echo.py").read_text() + LOOKS_AROUND)
    monkeypatch.syspath_prepend(plugin.parent)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    with ProcessExecutor().start(python, "alone", gpu="GPU-1234") as worker:
        loaded = worker.ask(load("looks-around", "alone"), nothing)
        made = worker.ask(generate(tmp_path), nothing)

    prefix, *seen = loaded.warnings
    assert Path(prefix) == tmp_path / "env"
    assert seen == ["no click", "no rich", "no tests", "HF_TOKEN=None", "CUDA_VISIBLE_DEVICES=GPU-1234"]
    assert isinstance(made, Made) and (tmp_path / "out.png").exists()


LOOKS_AROUND = """

class LooksAround(Echo):
    name = "looks-around"

    def load(self, model, budget):
        import importlib.util
        import os
        import sys

        session = super().load(model, budget)
        session.warnings = [sys.prefix]
        session.warnings += [f"no {name}" for name in ("click", "rich", "tests") if not importlib.util.find_spec(name)]
        session.warnings += [f"{name}={os.environ.get(name)}" for name in ("HF_TOKEN", "CUDA_VISIBLE_DEVICES")]
        return session


def kleinctl_backends():
    return [Echo(), LooksAround()]
"""


def test_secrets_and_proxies_stay_in_the_control_process():
    own = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "OPENAI_API_KEY": "x",
        "https_proxy": "http://me:pw@proxy",
        "TOKENIZERS_X": "1",
    }
    environment = worker_environment(own, None)
    assert environment.keys() & own.keys() == {"PATH", "TOKENIZERS_X"}
    assert environment["HF_HUB_OFFLINE"] == "1" and "CUDA_VISIBLE_DEVICES" not in environment


def test_variables_that_old_guides_set_do_not_reach_the_worker():
    """A leftover HF_HUB_ENABLE_HF_TRANSFER stops old versions of the hub's library (B15); user packages stay out."""
    environment = worker_environment({"HF_HUB_ENABLE_HF_TRANSFER": "1", "PATH": "/bin"}, None)
    assert "HF_HUB_ENABLE_HF_TRANSFER" not in environment
    assert environment["PYTHONNOUSERSITE"] == "1"


@pytest.mark.parametrize(
    "card", ["GPU-8a2f0f6e-1111-2222-3333-444455556666", "MIG-3d2f0f6e-1111-2222-3333-444455556666"]
)
def test_one_card_of_several_or_a_slice_is_chosen_by_its_uuid(card):
    """CUDA counts by speed, the driver by slot (A15); a slice can only be named (A14)."""
    environment = worker_environment({"CUDA_VISIBLE_DEVICES": "0,1"}, card)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["CUDA_DEVICE_ORDER"]) == (card, "PCI_BUS_ID")


@pytest.mark.skipif(not LINUX, reason="glibc and growing segments")
def test_settings_of_memory_are_set_for_a_card_and_the_users_own_stay():
    assert worker_environment({}, "GPU-1")["MALLOC_MMAP_THRESHOLD_"] == "1048576"  # D20
    assert "MALLOC_MMAP_THRESHOLD_" not in worker_environment({}, None)
    assert worker_environment({}, None)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = worker_environment(own, "GPU-1")
    assert found.keys() >= own.keys() and all(found[key] == value for key, value in own.items())
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found


def test_what_a_picture_took_is_told(tmp_path):
    with ProcessExecutor().start(PYTHON, ECHO) as worker:
        worker.ask(load("echo", ECHO), nothing)
        made = worker.ask(generate(tmp_path), nothing)
    assert set(made.stages) == set(made.seconds) and made.stages["decode"] == protocol.NO_USE  # no card
    assert len(made.pixels.channels) == 3 and 120 < made.pixels.channels[0].mean < 135  # it paints noise
    assert made.prompt_cut is None and made.tiling is None
    if os.name == "nt" or LINUX:
        assert 5 * 2**20 < made.rss_bytes < 2**31


def test_a_stage_that_comes_twice_keeps_its_largest_figures():
    uses = iter([protocol.StageUse(5, 3, 9, None), protocol.StageUse(1, 1, 1, 1), protocol.StageUse(4, 4, 4, 7)])
    watch = Stopwatch(lambda progress: None, lambda: None, measure=lambda: next(uses))
    for stage in ("load", "encode", "load"):
        watch(stage, 0, 1)
    watch.stop()
    assert watch.uses == {"load": protocol.StageUse(5, 4, 9, 7), "encode": protocol.StageUse(1, 1, 1, 1)}


class Words:
    """A tokenizer in the shape of Qwen's: a token is a word, and the template has three before and two after."""

    def apply_chat_template(self, messages, **options):
        return f"<s> user : {messages[0]['content']} </s> assistant"

    def __call__(self, text, return_offsets_mapping):
        found = list(re.finditer(r"\S+", text))
        return {"input_ids": found, "offset_mapping": [match.span() for match in found]}


@pytest.mark.parametrize(("words", "tail"), [(5, None), (97, None), (98, "w97"), (100, "w97 w98 w99")])
def test_the_words_of_a_prompt_that_were_not_read(words, tail):
    cut = prompt_cut(Words(), " ".join(f"w{number}" for number in range(words)), 100)
    assert (cut and cut.tail) == tail
    assert cut is None or (cut.tokens, cut.limit) == (words + 5, 100)


def test_a_session_without_a_tokenizer_or_with_a_strange_one():
    assert prompt_cut(None, "word " * 600, 512) is None
    assert prompt_cut(object(), "word " * 600, 512) is None


def test_logs_of_old_workers_do_not_pile_up(tmp_path):
    logs_folder().mkdir(parents=True)
    for number in range(30):
        (logs_folder() / f"worker-20200101-0000{number:02}-1.log").write_text("old")
    with ProcessExecutor().start(PYTHON, ECHO) as worker:
        pass
    assert len(list(logs_folder().glob("worker-*.log"))) == LOGS_KEPT
    assert worker.log.exists() and re.fullmatch(r"worker-\d{8}-\d{6}-\d+\.log", worker.log.name)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (3, "exit status 3"),
        (-11, "signal 11 (SIGSEGV, a crash in native code)"),
        (3221225477, "exit status 0xC0000005 (access violation, a crash in native code)"),
        (-1073741819, "exit status 0xC0000005 (access violation, a crash in native code)"),
        (0xC000012D, "exit status 0xC000012D (commitment limit: memory and paging file are full)"),
    ],
)
def test_how_a_process_ended_in_words(status, text):
    assert exit_text(status) == text
    assert looks_like_no_memory(status) == (status == 0xC000012D)


def test_messages_survive_the_pipe():
    request = load("echo")
    assert protocol.decode(protocol.encode(request)) == request
    asked = generate(Path("/a"), images=(Path("/b.png"),))
    assert protocol.decode(protocol.encode(asked)) == asked
    ahead = Prepare((asked.job, replace(asked.job, seed=8, images=(), precision="fp8")))
    assert protocol.decode(protocol.encode(ahead)) == ahead


@pytest.mark.parametrize("line", [b"", b"null", b"[]", b'{"is": 3}', b'{"is": "Progress"}', b"Loading: 3%", b"\xff{"])
def test_a_line_that_is_no_message(line):
    assert protocol.decode(line) is None


def test_each_stage_is_charged_with_the_work_it_queued():
    """A GPU runs behind: what was queued has to be waited for before the clock moves on to the next stage."""
    queued = []

    def synchronize():
        time.sleep(sum(queued))
        queued.clear()

    watch = Stopwatch(lambda progress: None, synchronize)
    queued.append(0.05)  # before the first call: the first stage's
    watch("encode", 0, 1)
    watch("denoise", 0, 2)
    queued.append(0.1)
    watch("denoise", 1, 2)
    watch("decode", 0, 1)
    seconds = watch.stop()
    assert 0.05 <= seconds["encode"] < 0.09 and 0.1 <= seconds["denoise"] < 0.14 and seconds["decode"] < 0.04


def test_a_backend_that_reports_every_token_does_not_flood_the_pipe():
    sent = []
    watch = Stopwatch(sent.append, lambda: None)
    for done in range(10_001):
        watch("denoise", done, 10_000)
    assert len(sent) < 50 and sent[0].done == 0 and sent[-1].done == 10_000


needs_card = pytest.mark.skipif(not (Path("/dev/nvidia0").exists() or os.name == "nt"), reason="no NVIDIA card")


@pytest.fixture
def card():
    """A worker with 4 GiB of a card."""
    request = replace(load("on-gpu", "tests.plugins.on_gpu"), budget=Budget(4 * GIB, 2**30, "cuda:0"))
    with ProcessExecutor().start(PYTHON, request.plugin) as worker:
        loaded = worker.ask(request, nothing)
        assert loaded.device.startswith("NVIDIA")
        yield worker


@pytest.mark.gpu
@needs_card
def test_a_limit_of_vram_is_real(card, tmp_path):
    """The card has more, and the job may not take it."""
    with pytest.raises(KleinctlError, match="the card's memory ran out"):
        card.ask(generate(tmp_path, prompt="3.6 GiB, 1 products"), nothing)
    made = card.ask(generate(tmp_path, prompt="2.8 GiB, 1 products"), nothing)
    assert isinstance(made, Made) and made.peak_vram_bytes < 4.2 * GIB  # libraries that CUDA loads late come on top


@pytest.mark.gpu
@needs_card
def test_the_peak_of_vram_counts_the_cuda_context(card, tmp_path):
    made = card.ask(generate(tmp_path, prompt="2 GiB, 1 products"), nothing)
    assert made.peak_vram_source == "torch, and the CUDA context by NVML"
    assert 2.3 * GIB < made.peak_vram_bytes < 3.2 * GIB


@pytest.mark.gpu
@needs_card
def test_a_stage_is_charged_with_the_kernels_it_queued(card, tmp_path):
    card.ask(generate(tmp_path, prompt="1 GiB, 1 products"), nothing)  # warm
    made = card.ask(generate(tmp_path, prompt="1 GiB, 200 products"), nothing)
    assert made.seconds["denoise"] > 0.2  # 200 products of 1.1 TFLOP, under 1 PFLOP/s
    assert made.seconds["encode"] < 0.1 and made.seconds["decode"] < 0.1


def test_a_processor_is_settled_where_torch_is_there_and_only_there():
    """Which race that ends is in docs/measurements.md; it comes up once in thousands of processes."""
    lines = "settle_processor(); print('torch' in sys.modules)"
    code = f"import sys; from kleinctl.worker.device import settle_processor; {lines}; import torch; {lines}"
    assert subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout == "False\nTrue\n"
