"""The same picture from ComfyUI as from diffusers, and the controls without which that would mean nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kleinctl_plugins.comfyui_fp8 import Session

from kleinctl import store
from kleinctl.backends import InstalledModel, Job
from kleinctl.comfyui import Checkout, record
from tests.comfyui_real import files, parity
from tests.plugins.comfyui_models import CPU, NAMES, model

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(600)]

JOB = Job("a red cube", 128, 96, 1, 4, 1.0)
BASE = replace(JOB, steps=6, guidance=4.0)
SLIM = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", "slim_qwen3")
#: Levels of 255: the most that one pixel may differ, and the least that a control has to, on average.
SAME, OTHER = 2, 5.0


@pytest.fixture(autouse=True, scope="module")
def empty_home(request, tmp_path_factory):
    if not request.config.getoption("--comfyui"):
        pytest.skip("no --comfyui=DIR was given")
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("KLEINCTL_HOME", str(home / "kleinctl"))
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def pipe(request):
    return parity.pipeline(Path(request.config.getoption("--comfyui")) / "comfy" / "text_encoders" / "qwen25_tokenizer")


@pytest.fixture(scope="module")
def session(request, empty_home, pipe):
    parity.save(pipe, *(place(role) for role in ("transformer", "text-encoder", "vae")))
    checkout = Path(request.config.getoption("--comfyui")).absolute()
    python = Path(request.config.getoption("--comfyui-python")).absolute()
    base = files.base_directory(empty_home / "base")
    record.remember(Checkout(checkout, python, owned=False, base=base, arguments=SLIM))
    opened = Session(InstalledModel(model(), place("vae").parent.parent), CPU)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("reference") / "noise.png"
    Image.effect_noise((128, 96), 80).convert("RGB").save(path)
    return path


def place(role):
    return store.model_folder("klein-test", "comfyui") / NAMES[role]


def theirs(pipe, job):
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in job.images]
    return parity.picture(pipe, job.prompt, job.seed, job.steps, job.guidance, images)


def ours(session, job, variant="distilled"):
    session.model = InstalledModel(model(variant), session.model.folder)
    return session.generate(job, lambda *step: None).tobytes()


def differences(one, other):
    each = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(each), sum(each) / len(each)


def test_the_pictures_are_the_same_and_the_controls_are_not(session, pipe, reference):
    edit = replace(JOB, images=(reference,))
    jobs = {
        "text to image": (JOB, "distilled"),
        "another prompt": (replace(JOB, prompt="a green hill"), "distilled"),
        "another seed": (replace(JOB, seed=2), "distilled"),
        "base, guided": (BASE, "base"),
        "edit": (edit, "distilled"),
    }
    drawn = {name: ours(session, *job) for name, job in jobs.items()}
    for name, (job, _) in jobs.items():
        most, mean = differences(drawn[name], theirs(pipe, job))
        print(f"{name}: at most {most}, {mean:.4f} on average, of 255")
        assert most <= SAME, name
    for name in ("another prompt", "another seed", "base, guided", "edit"):
        _, mean = differences(drawn[name], drawn["text to image"])
        print(f"control, {name} against text to image: {mean:.1f} on average")
        assert mean >= OTHER, name


def test_weights_that_are_converted_wrongly_are_seen(session, pipe):
    parity.save_transformer(pipe, place("transformer"), swapped=False)
    _, mean = differences(ours(session, JOB), theirs(pipe, JOB))
    print(f"control, halves of the last modulation not swapped: {mean:.1f} on average")
    assert mean >= OTHER
    assert session.warnings, "ComfyUI was started again for the new file"
