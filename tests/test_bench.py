"""`kleinctl bench`: what is measured, what is taken meanwhile, and what it says when something is missing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kleinctl import bench, store
from kleinctl.backends import Fit, Job
from kleinctl.cli.bench import check_files, row, written
from kleinctl.environment import Environment
from kleinctl.hardware import Gpu, imagine
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Misuse
from kleinctl.road import Way
from kleinctl.units import GIB
from kleinctl.worker.chart import most, panels
from tests.comfyui_double import Double
from tests.test_cli import conforms

CARD = Gpu("A card", "8.9", 16 * GIB, 15 * GIB)


@pytest.fixture(scope="module")
def klein():
    return Plugins(frozenset()).model("klein-4b")


def figures(seconds: float = 0.5, pixels: tuple[str, ...] = ("a", "b")) -> bench.Figures:
    return bench.Figures("streamed", 3.0, (seconds,), 0.4, 8 * GIB, 2 * GIB, pixels)


@pytest.mark.slow
def test_the_miniature_is_measured_beside_plain_diffusers(kleinctl, tmp_path):
    assert kleinctl("install", "--model", "klein-tiny").exit_code == 0
    words = ("--runs", "1", "--sizes", "128", "--against", "diffusers", "-o", "bench.json", "--chart", "chart.png")
    answer = kleinctl("bench", "--model", "klein-tiny", *words)
    assert answer.exit_code == 0, answer.stdout + answer.stderr
    document = conforms((tmp_path / "bench.json").read_text())
    [theirs, own] = document["lines"]
    assert (theirs["who"], own["who"]) == ("diffusers", "staged-decode")
    assert own["same"] is True and own["share"] > 0
    assert own["measured"]["seconds_first"] > own["measured"]["seconds_next"] > 0
    assert own["measured"]["host_bytes"] > 50_000_000
    assert own["predicted"]["seconds_next"] > 0
    assert "128x128" in answer.stdout and "staged-decode" in answer.stdout
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_of_vram_where_there_is_no_card(kleinctl):
    answer = kleinctl("bench", "--model", "klein-tiny", "--free", "8", "6", "--json")
    assert answer.exit_code == 1
    assert conforms(answer.stdout)["problem"]["name"] == "bench-no-card"


def test_a_model_that_is_not_installed(kleinctl):
    answer = kleinctl("bench", "--model", "klein-tiny", "--json")
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["problem"]["name"] == "model-not-installed"


def test_several_values_follow_one_option(kleinctl):
    answer = kleinctl("bench", "--model", "klein-tiny", "--sizes", "256", "wide", "--runs", "2")
    assert answer.exit_code == 2
    assert "'wide' is no picture size" in answer.stderr and "hint: --sizes 1024x768\n" in answer.stderr


def test_a_size_of_nothing_is_told_by_the_option_that_it_was_given_for(kleinctl):
    answer = kleinctl("bench", "--model", "klein-tiny", "--sizes", "0")
    assert answer.exit_code == 2 and "hint: --sizes 16x16\n" in answer.stderr


# What is taken of the card

HOLDER = """
import sys
print("held 0", flush=True)
total = 0
for line in sys.stdin:
    if "{said}" == "no":
        print("no memory left", flush=True)
    else:
        total += int(line)
        open({path!r}, "w").write(str(total))
        print("held", total, flush=True)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A holder that notes how much it was told to take, of a card that has 15 GiB free."""

    def make(said: str = "held") -> bench.Holder:
        script, noted = tmp_path / "holder.py", tmp_path / "taken"
        script.write_text(HOLDER.format(said=said, path=str(noted)))

        def memory(gpu: Gpu) -> tuple[int, int]:
            taken = int(noted.read_text()) if noted.exists() else 0
            return taken, 15 * GIB - taken

        monkeypatch.setattr(bench, "HOLDER", script)
        monkeypatch.setattr(bench, "_memory", memory)
        return bench.Holder(Path(sys.executable), CARD)

    return make


def test_memory_is_taken_until_only_so_much_is_free(holder):
    holding = holder()
    try:
        holding.leave(8 * GIB)
        assert bench._memory(CARD)[1] == 8 * GIB
    finally:
        holding.close()


@pytest.mark.parametrize(
    ("said", "free", "words"), [("held", 16 * GIB, "15.0 GiB are free as it is"), ("no", 8 * GIB, "no memory left")]
)
def test_memory_that_cannot_be_taken(holder, said, free, words):
    holding = holder(said)
    try:
        with pytest.raises(KleinctlError, match=words) as raised:
            holding.leave(free)
        assert raised.value.problem.name == "bench-holder"
    finally:
        holding.close()


# Lines


def asked(model: Any, **changes: Any) -> bench.Asked:
    def nothing(*arguments: Any) -> Any:
        raise ZeroDivisionError("a mistake")

    given = {
        "plugins": Plugins(frozenset()), "model": model, "backends": (None,), "sizes": ((512, 512), (1024, 1024)),
        "free": (None,), "runs": 2, "changes": {}, "detect": nothing, "environment": nothing,
    }  # fmt: skip
    return bench.Asked(**{**given, **changes})


def test_a_line_that_fails_does_not_cost_the_others(klein):
    lines = list(bench.measure(asked(klein, against="diffusers"), lambda *said: None))
    assert [(line.who, line.width) for line in lines] == [
        ("diffusers", 512),
        ("diffusers", 1024),
        ("kleinctl", 512),
        ("kleinctl", 1024),
    ]
    assert {line.problem.name for line in lines} == {"bench-line-failed"}
    assert "ZeroDivisionError: a mistake" in row(lines[0])


def test_a_budget_that_cannot_be_had_is_told_in_each_of_its_lines(klein):
    found = asked(klein, free=(8 * GIB,), backends=("staged", "diffusers"), detect=lambda: imagine("none", GIB))
    found = replace(found, detect=lambda: replace(imagine("RTX 4090", 32 * GIB), gpus=()), sizes=((512, 512),))
    lines = list(bench.measure(found, lambda *said: None))
    assert [line.who for line in lines] == ["staged", "diffusers"]
    assert {line.problem.name for line in lines} == {"bench-no-card"}


def test_a_line_stands_beside_plain_diffusers():
    reference = {(1024, 1024): figures(0.5)}
    line = bench.Line("staged-decode", 1024, 1024, 8 * GIB, figures(0.6), Fit(8 * GIB, 0, 0, 3, 0.55, True, "streamed"))
    compared = bench._compared(line, reference)
    assert (compared.share, compared.same) == (pytest.approx(1.2), True)
    assert bench._compared(replace(line, figures=figures(0.6, ("a", "c"))), reference).same is False
    told = row(compared).split()
    assert told[:4] == ["1024x1024", "8.0", "staged-decode", "3.00"]
    assert "0.60 (0.55)  1.20   0.40" in row(compared) and "8.00 (8.00)" in row(compared)
    assert row(compared).endswith("yes  streamed")


def test_new_prompts_and_the_last_once_more(klein, monkeypatch):
    drawn: list[tuple[str, int]] = []

    def draw(job: Job, output: Path) -> tuple[str, dict[str, float]]:
        drawn.append((job.prompt, job.seed))
        return job.prompt, {"denoise": 1.0}

    opened, line = bench.Opened(draw, lambda: "so"), bench.Line("x", 512, 512)

    def measured(first: float | None) -> bench.Figures:
        found = bench._drawn(asked(klein), line, opened, bench.Watch(None), first, lambda *said: None).figures
        assert found is not None
        return found

    found = measured(0.0)
    assert len(drawn) == 5 and len(set(drawn)) == 4 and drawn[-1] == drawn[-2]
    assert len(found.seconds_new) == 2 and len(found.pixels) == 4 and found.seconds_first > 0
    monkeypatch.setattr(bench, "LINE_SECONDS", 0.0)
    drawn.clear()
    found = measured(None)
    assert len(found.seconds_new) == 1 and drawn[-1] == drawn[-2] and found.seconds_first is None


def test_one_session_draws_every_size(klein):
    """A budget that starts torch anew for each size takes minutes more."""
    opened: list[str] = []

    @contextlib.contextmanager
    def start() -> Iterator[bench.Opened]:
        opened.append("start")
        yield bench.Opened(lambda job, output: (job.prompt, {}), lambda: "so")
        opened.append("end")

    machine = replace(imagine("RTX 4090", 32 * GIB), gpus=())
    found = asked(klein, detect=lambda: machine)
    ready = lambda line, hardware: (line, "a key", start)  # noqa: E731
    lines = list(bench._lines(found, None, ready, "x", found.sizes, lambda *said: None))
    assert opened == ["start", "end"]
    assert [line.figures.seconds_first is None for line in lines] == [False, True]


def test_what_a_warm_server_lets_go_of_counts_when_it_takes_it_again(monkeypatch):
    used = [12 * GIB, 12 * GIB, 2 * GIB, 11 * GIB, 0]  # the driver does not always answer
    monkeypatch.setattr(bench, "used_bytes", lambda gpu: used.pop(0) if len(used) > 1 else used[0])
    end = time.monotonic() + 5
    with bench.Watch(CARD) as watch:
        while len(used) > 1 and time.monotonic() < end:
            time.sleep(0.01)
    assert watch.vram_bytes == 9 * GIB


def test_a_chart_that_cannot_be_drawn(tmp_path):
    with pytest.raises(KleinctlError) as raised:
        bench.chart(tmp_path / "missing.json", tmp_path / "chart.png", Path(sys.executable))
    assert raised.value.problem.name == "bench-chart"


@pytest.mark.parametrize("option", ["-o", "--chart"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(option, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KleinctlError) as raised:
        check_files({"-o": None, "--chart": None, option: tmp_path / "file" / "x"})
    assert raised.value.problem.name == "output-unwritable"
    assert f" {option} bench." in raised.value.problem.fix
    check_files({"-o": None, "--chart": tmp_path / "new" / "chart.png"})
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_that_is_written_to_stays_one(tmp_path):
    """As /dev/null and /dev/stdout do, which root could put a file in the place of."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_files({"-o": pipe})
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as reader:
        written(pipe, {"schema": bench.SCHEMA})
        assert json.load(reader) == {"schema": bench.SCHEMA}
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(Misuse) as raised:
        check_files({"-o": tmp_path})
    assert raised.value.problem.name == "output-unwritable"
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_longer_than_its_bar_is_on_the_chart():
    assert most([[0.2, 0.4], [0.2, 0.3]]) == 0.4
    assert most([[0.2, 40.0]]) == pytest.approx(0.6), "but leaves something of the bar"


def test_budgets_asked_for_in_any_order_stand_by_size_on_the_chart():
    asked_for = [(1024, None), (512, None), (1024, 4 * GIB), (512, 4 * GIB), (1024, 16 * GIB), (512, 16 * GIB)]
    drawn = panels([{"width": side, "height": side, "free_bytes": free} for side, free in asked_for])
    assert list(drawn) == [(512, 512), (1024, 1024)]
    assert [[line["free_bytes"] for line in lines] for lines in drawn.values()] == [[None, 16 * GIB, 4 * GIB]] * 2


def test_a_chart_of_lines_that_failed_and_lines_that_did_not(tmp_path, klein):
    problem = bench.no_card().problem
    lines = [
        bench.Line("diffusers", 512, 512, None, figures(9.0)),
        bench.Line("staged-decode", 512, 512, 8 * GIB, figures(), Fit(8 * GIB, 0, 0, 3, 0.55, True, "streamed")),
        bench.Line("staged-decode", 512, 512, 4 * GIB, problem=problem),
    ]
    machine = imagine("RTX 4090", 32 * GIB)
    document = bench.document(asked(klein), lines, machine, "kleinctl bench", "2026-11-23T00:00:00+00:00")
    conforms(json.dumps(document))
    (tmp_path / "bench.json").write_text(json.dumps(document))
    bench.chart(tmp_path / "bench.json", tmp_path / "chart.png", Path(sys.executable))
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


# ComfyUI

FILES = {
    "UNETLoader": {"unet_name": ["flux-2-klein-4b-fp8.safetensors", "flux-2-klein-4b.safetensors"]},
    "CLIPLoader": {"clip_name": ["qwen_3_8b.safetensors", "qwen_3_4b.safetensors"]},
    "VAELoader": {"vae_name": ["ae.safetensors", "flux2-vae.safetensors"]},
}


def beside(model: Any, url: str, **changes: Any) -> list[bench.Line]:
    """The lines of the ComfyUI at `url` alone, drawn by a worker of this Python."""
    own = Environment(Path(sys.executable), {})
    machine = replace(imagine("RTX 4090", 32 * GIB), gpus=())
    found = asked(model, against="comfyui", url=url, backends=(), runs=1, sizes=((128, 96),), detect=lambda: machine)
    return list(bench.measure(replace(found, environment=lambda *way: own, **changes), lambda *said: None))


def drawn(double: Double) -> list[dict[str, Any]]:
    """The graphs that were queued, each as the inputs of its nodes by their class."""
    graphs = [body["prompt"].values() for body in double.asked("/prompt")]
    return [{node["class_type"]: node["inputs"] for node in graph} for graph in graphs]


def test_comfyui_draws_the_same_jobs_by_the_way_of_its_backend(klein, empty_home):
    with Double(files=FILES) as double:
        [line] = beside(klein, double.url)
        assert [path for path, _ in double.seen] == ["/free", *["/prompt"] * 4, "/free"], "the first one loads"
        first, *_, last = drawn(double)
    assert (line.who, line.problem) == ("comfyui", None)
    assert len(set(line.figures.pixels)) == 3 and line.figures.stages["decode"] > 0
    assert line.figures.versions["comfyui"] == "0.29.0"
    assert first["UNETLoader"]["unet_name"] == "flux-2-klein-4b.safetensors", "in the precision that kleinctl draws in"
    assert first["CLIPLoader"]["clip_name"] == "qwen_3_4b.safetensors"
    assert first["Flux2Scheduler"] == {"steps": 4, "width": 128, "height": 96}
    assert (first["RandomNoise"]["noise_seed"], last["RandomNoise"]["noise_seed"]) == (0, 2)


def test_comfyui_draws_in_the_precision_that_is_asked_for_and_edits_too(klein, empty_home, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    with Double(files=FILES) as double:
        [line] = beside(klein, double.url, changes={"precision": "fp8", "images": (tmp_path / "cat.png",)})
        assert line.problem is None
        assert drawn(double)[0]["UNETLoader"]["unet_name"] == "flux-2-klein-4b-fp8.safetensors"
        assert "ReferenceLatent" in drawn(double)[0]


def test_files_of_kleinctls_own_say_nothing_of_a_server_that_is_named(klein, empty_home):
    """It may have other files under these names, and may have loaded them before ours came."""
    for part in klein.parts_for("comfyui", "fp8"):
        place = store.destination(klein.name, "comfyui", part)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"other")
    with Double(files=FILES) as double:
        assert beside(klein, double.url)[0].problem is None


def test_a_server_without_the_models_files_is_told_what_is_missing(klein, empty_home):
    files = {**FILES, "CLIPLoader": {"clip_name": ["t5xxl_fp16.safetensors"]}}
    with Double(files=files) as double:
        [line] = beside(klein, double.url)
    assert line.problem.name == "comfyui-lacks-model"
    assert "it lists t5xxl_fp16.safetensors" in line.problem.why


def test_a_picture_that_comfyui_fails_at(klein, empty_home):
    with Double(files=FILES, error="vae-flux1") as double:
        [line] = beside(klein, double.url)
    assert (line.problem.name, line.figures) == ("vae-mismatch", None)


def test_no_server_there(klein, empty_home):
    [line] = beside(klein, "http://127.0.0.1:9")
    assert line.problem.name == "comfyui-silent"


def test_a_model_that_does_not_come_for_comfyui(empty_home):
    [line] = beside(Plugins(frozenset()).model("klein-tiny"), "http://127.0.0.1:9")
    assert line.problem.name == "no-backend"


@pytest.mark.parametrize(
    "url", ["http://example.com:8188", "file:///etc/passwd", "https://127.0.0.1", "8188", "http://[::1"]
)
def test_a_server_elsewhere_is_not_asked(klein, url):
    from kleinctl.cli.bench import _asked

    way = Way(klein, Plugins(frozenset()).backend("staged-decode"), None)
    with pytest.raises(Misuse, match="asks a ComfyUI on this machine alone"):
        _asked(Plugins(frozenset()), way, lambda: None, {}, (), (), (), 1, "comfyui", url)
