"""A real ComfyUI on a processor, with tiny files: `pytest -m comfyui --comfyui=DIR --comfyui-python=PYTHON`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kleinctl_plugins import comfyui_client, comfyui_files, comfyui_fp8, comfyui_graph
from kleinctl_plugins.comfyui_fp8 import Session
from kleinctl_plugins.comfyui_graph import Files, Reference

from kleinctl import generate, store
from kleinctl.backends import InstalledModel, Job
from kleinctl.comfyui import Checkout, record
from kleinctl.problem import KleinctlError
from tests.comfyui_real import browser, files
from tests.conftest import REPOSITORY
from tests.plugins.comfyui_models import CPU, NAMES, model

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(600)]

JOB = Job("a red cube", 128, 96, 1, 4, 1.0)
SLIM = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", "slim_qwen3")


@pytest.fixture(autouse=True, scope="module")
def empty_home(request, tmp_path_factory):
    """One home for all tests here, with the model in it: a start takes a while."""
    if not request.config.getoption("--comfyui"):
        pytest.skip("no --comfyui=DIR was given")
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("KLEINCTL_HOME", str(home / "kleinctl"))
    patch.setenv("HOME", str(home))
    files.transformer(place("transformer"))
    files.text_encoder(place("text-encoder"))
    files.vae(place("vae"))
    checkout = Path(request.config.getoption("--comfyui")).absolute()
    python = Path(request.config.getoption("--comfyui-python")).absolute()
    base = files.base_directory(home / "base")
    record.remember(Checkout(checkout, python, owned=False, base=base, arguments=SLIM))
    yield home
    patch.undo()


@pytest.fixture(scope="module")
def session(empty_home):
    opened = Session(InstalledModel(model(), place("vae").parent.parent), CPU)
    yield opened
    opened.close()


def place(role):
    return store.model_folder("klein-test", "comfyui") / NAMES[role]


def draw(session, job=JOB, told=None):
    image = session.generate(job, lambda *step: told.append(step) if told is not None else None)
    return image.size, image.tobytes()


def difference(one, other):
    return sum(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) / len(one[1])


def failed(session, job=JOB):
    with pytest.raises(KleinctlError) as failure:
        draw(session, job)
    return failure.value.problem


def servers(home):
    """The processes that were started from this home."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(home) in " ".join(each.info["cmdline"] or ())
            and any(word.endswith("main.py") for word in each.info["cmdline"] or ())]  # fmt: skip


def reference(folder, name, colour):
    from PIL import Image

    Image.new("RGB", (128, 96), colour).save(folder / name)
    return folder / name


def test_text_to_image(session):
    told = []
    picture = draw(session, told=told)
    assert picture[0] == (128, 96)
    assert len(set(picture[1])) > 50, "it is no flat colour"
    assert draw(session) == picture, "the same job gives the same picture"
    assert difference(draw(session, replace(JOB, seed=2)), picture) > 5
    assert difference(draw(session, replace(JOB, prompt="a green hill")), picture) > 5
    assert {"load", "encode", "denoise", "decode"} <= {stage for stage, _, _ in told}
    assert [done for stage, done, _ in told if stage == "denoise"][-1] == 4


@pytest.mark.parametrize("size", [(16, 16), (256, 64)])
def test_other_sizes(session, size):
    assert draw(session, replace(JOB, width=size[0], height=size[1]))[0] == size


def test_an_edit_with_one_and_with_two_references(session, tmp_path):
    red, blue = reference(tmp_path, "red.png", "red"), reference(tmp_path, "blue.png", "blue")
    plain, one = draw(session), draw(session, replace(JOB, images=(red,)))
    two = draw(session, replace(JOB, images=(red, blue)))
    assert difference(plain, one) > 0.3  # the same job twice: 0
    assert difference(one, two) > 0.3


def test_a_large_reference_is_scaled_by_the_server(session, tmp_path):
    from PIL import Image

    Image.effect_noise((1400, 1000), 60).convert("RGB").save(tmp_path / "large.png")
    assert draw(session, replace(JOB, steps=1, images=(tmp_path / "large.png",)))[0] == (128, 96)


def test_a_base_model_with_guidance(session):
    distilled = session.model
    try:
        session.model = InstalledModel(model("base"), distilled.folder)
        weak, strong = (draw(session, replace(JOB, steps=6, guidance=each)) for each in (1.0, 5.0))
    finally:
        session.model = distilled
    assert difference(weak, strong) > 2


def test_a_job_that_is_interrupted_leaves_the_server_able_to_draw(session):
    watched = []
    session.server.watch, before = watched.append, session.server.watch
    stopper = threading.Thread(target=lambda: (wait_for(watched), session.server.client.stop(watched[0])))
    stopper.start()
    try:
        problem = failed(session, replace(JOB, steps=2000))
    finally:
        session.server.watch = before
        stopper.join()
    assert "interrupted" in problem.why
    assert draw(session)[0] == (128, 96)


def wait_for(watched):
    while not watched:
        time.sleep(0.05)
    time.sleep(1)


@pytest.mark.parametrize(
    ("role", "write", "names"),
    [
        ("vae", lambda path: files.vae(path, 16), {"vae-channels", "vae-mismatch"}),
        ("text-encoder", lambda path: files.text_encoder(path, 4096), {"text-encoder-width"}),
        ("transformer", lambda path: files.write(path, {"a.weight": (8, 8)}), {"wrong-transformer"}),
        ("transformer", lambda path: path.write_bytes(path.read_bytes()[:-4096]), {"weights-truncated"}),
    ],
    ids=["FLUX.1's VAE", "Qwen3 8B", "an unknown file", "a cut file"],
)
def test_a_wrong_file_is_refused_before_and_explained_after(session, monkeypatch, role, write, names):
    kept = place(role).with_suffix(".kept")
    place(role).rename(kept)
    try:
        place(role).write_bytes(kept.read_bytes()) if "cut" in os.environ["PYTEST_CURRENT_TEST"] else None
        write(place(role))
        before = failed(session)
        monkeypatch.setattr(comfyui_files, "check", lambda *found, **more: None)
        after = failed(session)
    finally:
        kept.replace(place(role))
    assert {before.name, after.name} <= names
    assert before.path == after.path == str(place(role))
    assert after.ref
    assert draw(session)[0] == (128, 96), "and once the file is right again, it draws"


def test_a_file_that_is_not_there(session):
    kept = place("vae").with_suffix(".kept")
    place("vae").rename(kept)
    try:
        assert failed(session).name == "comfyui-lacks-model"
    finally:
        kept.replace(place("vae"))


def test_a_users_own_workflow(session, tmp_path):
    source = REPOSITORY / "tests" / "fixtures" / "workflows" / "prompt_t2i_distilled.json"
    text = source.read_text(encoding="utf-8")
    for theirs, role in (("klein-4b", "transformer"), ("qwen3-4b", "text-encoder"), ("flux2-vae", "vae")):
        text = text.replace(f"tiny-{theirs}.safetensors", place(role).name)
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    picture = draw(session, replace(JOB, workflow=tmp_path / "mine.json"))
    assert difference(picture, draw(session)) == 0, "the template's graph is ours"


def test_a_users_workflow_that_puts_its_text_together_shares_a_size_and_saves_a_webp(session, tmp_path):
    names = Files(*(place(role).name for role in ("transformer", "text-encoder", "vae")))
    api = comfyui_graph.picture(names, JOB, "distilled").api()
    inputs = {node["class_type"]: node["inputs"] for node in api.values()}
    api["90"] = {"class_type": "PrimitiveInt", "inputs": {"value": 64}}
    for kind in ("Flux2Scheduler", "EmptyFlux2LatentImage"):
        inputs[kind].update(width=["90", 0], height=["90", 0])
    api["91"] = {"class_type": "StringConcatenate", "inputs": {"string_a": "a", "string_b": "b", "delimiter": ", "}}
    inputs["CLIPTextEncode"]["text"] = ["91", 0]
    shown = next(node for node in api.values() if node["class_type"] == "PreviewImage")
    shown["class_type"] = "SaveAnimatedWEBP"
    shown["inputs"] |= {"filename_prefix": "a", "fps": 6.0, "lossless": True, "quality": 80, "method": "default"}
    (tmp_path / "mine.json").write_text(json.dumps(api), encoding="utf-8")
    session.warnings.clear()  # those of the tests before
    picture = draw(session, replace(JOB, workflow=tmp_path / "mine.json"))
    said, session.warnings[:] = list(session.warnings), []
    assert difference(picture, draw(session)) == 0
    assert [each.partition(" (")[0].partition(";")[0] for each in said] == [
        "the prompt takes the place of all that StringConcatenate made for CLIPTextEncode",
        "the PNG has the pixels of a WEBP file",
    ]


def test_somebody_elses_job_is_waited_for(session, monkeypatch):
    monkeypatch.setattr(comfyui_client, "QUIET_SECONDS", 1.0)
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 2.0)
    names = Files(*(place(role).name for role in ("transformer", "text-encoder", "vae")))
    client = session.server.client
    body = {"prompt": comfyui_graph.picture(names, replace(JOB, steps=4000), "distilled").api(), "client_id": "theirs"}
    theirs = client.ask("/prompt", body)["prompt_id"]
    ends = threading.Timer(6, lambda: client.stop(theirs))
    ends.start()
    told = []
    picture = draw(session, told=told)
    ends.join()
    stages = list(dict.fromkeys(stage for stage, _, _ in told if stage.startswith("queue")))
    assert stages[0] == "queue" and stages[1].startswith(comfyui_fp8.HIDDEN.partition("{")[0])
    assert len(stages) == 2, "since when is told once, and stays"
    assert picture[0] == (128, 96)


@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("variant", ["distilled", "base", "edit"])
def test_a_written_workflow_opens_in_comfyuis_own_page(session, tmp_path, variant):
    names = Files(*(place(role).name for role in ("transformer", "text-encoder", "vae")))
    references = [Reference("one.png", 100), Reference("large.png", 2**22)] if variant == "edit" else []
    graph = comfyui_graph.picture(names, JOB, variant, references, save="klein")
    load = f"window.app.loadGraphData({json.dumps(comfyui_graph.write_workflow(graph))})"
    with browser.page(session.server.url, tmp_path / "profile") as evaluate:
        browser.wait_for(evaluate, "!!(window.app && window.app.graph && window.app.extensionManager)")
        time.sleep(3)  # it then loads the workflow that was open last
        code = f"(async () => {{ await {load}; return (await window.app.graphToPrompt()).output }})()"
        read = evaluate(code)
    said = {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in read.items()}
    assert said == graph.api()


def test_several_jobs_through_a_worker(empty_home, tmp_path, session):
    session.close()  # one checkout runs once at a time
    jobs = tuple(replace(JOB, seed=seed) for seed in (1, 2, 3))
    outputs = tuple(generate.Output(tmp_path / f"{job.seed}.png") for job in jobs)
    plugin, folder = "kleinctl_plugins.comfyui_fp8", place("vae").parent.parent
    request = generate.Request(model(), folder, "comfyui-fp8", plugin, Path(sys.executable), CPU, jobs, outputs)
    result = generate.run(request, lambda event: None)
    assert [output.path.is_file() for output in outputs] == [True] * 3
    assert len({image.pixels_sha256 for image in result.images}) == 3
    assert servers(empty_home) == []


def test_the_server_is_killed_in_the_middle(empty_home):
    session = Session(InstalledModel(model(), place("vae").parent.parent), CPU)
    try:
        (server,) = servers(empty_home)
        threading.Timer(3, lambda: os.kill(server.pid, signal.SIGKILL)).start()
        problem = failed(session, replace(JOB, steps=4000))
        assert problem.name == "memory-full"
        assert problem.what == "the system ended ComfyUI"
    finally:
        session.close()


def test_nothing_is_left_when_kleinctl_is_killed(empty_home):
    code = (
        "import sys, time\nfrom kleinctl.backends import Budget\nfrom kleinctl import comfyui\n"
        "from kleinctl_plugins.comfyui_server import open_server\n"
        "open_server(comfyui.known(), Budget(0, 0, 'cpu'), comfyui.paths_file())\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert len(servers(empty_home)) == 1
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    while servers(empty_home) and time.monotonic() < end:
        time.sleep(0.2)
    assert servers(empty_home) == []


def test_it_is_used_while_it_runs_and_left_running(empty_home, tmp_path):
    known = record.known()
    assert known is not None
    session = Session(InstalledModel(model(), place("vae").parent.parent), CPU)
    try:
        record.remember(replace(known, url=session.server.url))
        second = Session(InstalledModel(model(), place("vae").parent.parent), CPU)
        assert not second.server.ours
        assert draw(second) == draw(session)
        second.close()
        assert json.loads(json.dumps(session.server.client.ask("/queue")))["queue_running"] == []
    finally:
        record.remember(known)
        session.close()
