"""Pictures through ComfyUI: what is drawn, what is refused before, and what is said after a failure."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kleinctl_plugins import comfyui_client, comfyui_fp8
from kleinctl_plugins.comfyui_fp8 import ComfyuiFp8, Session

from kleinctl import comfyui, generate, store
from kleinctl.backends import Job
from kleinctl.hardware.catalogue import imagine
from kleinctl.problem import KleinctlError
from kleinctl.units import GIB
from tests import weights
from tests.comfyui_double import ERRORS, RECORDED, Double, checkout
from tests.plugins import comfyui_models as models
from tests.plugins.comfyui_models import CPU, FILES, NAMES

JOB = Job("a red cube", 128, 96, 7, 4, 1.0)
#: That of the recorded server.
PYTHON = json.loads((RECORDED / "system_stats.json").read_text(encoding="utf-8"))["system"]["python_version"].split()[0]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(comfyui_client, "LOOK_SECONDS", 0.05)


@pytest.fixture
def open_session(tmp_path):
    """Sessions with a double that runs already."""
    opened = []

    def session(model=None, **options):
        double = Double(**{"files": FILES, "folder": tmp_path, **options}).__enter__()
        models.use(tmp_path, url=double.url)
        made = Session(model or models.installed(), CPU)
        opened.append((made, double))
        return made, double

    yield session
    for made, double in opened:
        made.close()
        double.__exit__()


def draw(session, job=JOB):
    told = []
    return session.generate(job, lambda *step: told.append(step)), told


def problem_of(session, job=JOB):
    with pytest.raises(KleinctlError) as failure:
        draw(session, job)
    return failure.value.problem


def place(role):
    return store.model_folder("klein-test", "comfyui") / NAMES[role]


# A picture


def test_a_job_is_written_as_a_workflow_and_its_path_is_the_answer(kleinctl, tmp_path):
    made = kleinctl("run", "a cat", "--write-workflow", "a.json", "--json")
    assert json.loads(made.stdout)["workflow"] == "a.json"
    assert "nodes" in json.loads((tmp_path / "a.json").read_text())
    for more in (("--count", "2"), ("--workflow", "a.json")):
        refused = kleinctl("run", "a cat", "--write-workflow", "b.json", *more)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"leave {more[0]} out" in refused.stderr
    assert not (tmp_path / "b.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="links want a right on Windows")
def test_a_workflow_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    from kleinctl import workflows

    class Full:
        def workflow(self, model, job):
            return {"nodes": ["\N{CAT}"]}

    def full(path, text, **_):
        path.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    file = tmp_path / "mine.json"
    file.write_text("mine")
    monkeypatch.setattr(workflows, "runner", lambda plugins, backend: Full())
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        with pytest.raises(KleinctlError) as failure:
            workflows.write(None, None, None, None, file)
    assert failure.value.problem.name == "output-unwritable"
    assert (file.read_text(), [path.name for path in tmp_path.iterdir()]) == ("mine", ["mine.json"])
    link = tmp_path / "link.json"
    link.symlink_to(file)
    workflows.write(None, None, None, None, link)
    assert link.is_symlink() and "nodes" in file.read_text()


@pytest.mark.parametrize("typed", [("--steps", "8"), ("--guidance", "2")], ids=lambda typed: typed[0])
def test_what_a_workflow_keeps_is_not_taken_and_then_left_out(kleinctl, tmp_path, typed):
    (tmp_path / "a.json").write_text("{}")
    refused = kleinctl("run", "a cat", "--workflow", "a.json", *typed)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"--workflow keeps its own {typed[0][2:]}: leave {typed[0]} out" in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows hands over text")
@pytest.mark.parametrize("more", [("--write-workflow", "a.json"), ("--model", "klein-tiny")], ids=lambda more: more[0])
def test_a_prompt_from_a_terminal_with_another_encoding_is_refused_in_words(kleinctl, more):
    refused = kleinctl("run", os.fsdecode(b"a caf\xe9"), *more)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error[prompt-not-text]: the prompt is not all text")
    assert "after 5 characters comes" in refused.stderr


@pytest.mark.parametrize(
    "entry",
    [
        *(3, {"prompt": 3}, {"prompt": [1, 2, {"1": 5}]}, {"status": {"messages": 1.5}}),
        {"status": {"messages": [["a", {"timestamp": []}]]}},
    ],
    ids=str,
)
def test_a_history_of_another_shape_tells_nothing(open_session, entry):
    graph = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "klein-test-fp8.safetensors"}}}
    if isinstance(entry, dict):
        entry = {"prompt": [1, "z", graph], **entry}
    session, _ = open_session(history={"z": entry})
    assert draw(session)[0].size == (128, 96)


def test_a_node_after_the_sampler_has_steps_of_its_own_and_does_not_begin_the_samplers_again():
    api = {"1": {"class_type": "KSampler"}, "2": {"class_type": "ImageInvert"}, "3": {"class_type": "VAEDecode"}}
    told = []
    tell = comfyui_fp8._Told(api, JOB, lambda *step: told.append(step))
    for event in (("1", 4, 4), ("2", 0, 0), ("2", 1, 9), ("3", 0, 0)):
        tell(*event)
    assert told == [("denoise", 4, 4), ("ImageInvert", 1, 9), ("decode", 0, 1)]


def test_a_picture_comes_with_its_stages(open_session):
    session, double = open_session()
    image, told = draw(session)
    assert image.size == (128, 96)
    assert image.getpixel((0, 0)) == tuple(random.Random(7).randbytes(3))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["load", "encode", "denoise", "decode"] or set(stages) == {"load", "encode", "denoise", "decode"}
    assert [done for stage, done, total in told if stage == "denoise" and total == 4][-1] == 4
    ((sent,),) = [double.asked("/prompt")]
    loaded = {node["class_type"]: node["inputs"] for node in sent["prompt"].values()}
    assert loaded["UNETLoader"]["unet_name"] == "klein-test-fp8.safetensors"
    assert loaded["CFGGuider"]["cfg"] == 1.0
    assert "SaveImage" not in loaded, "nothing is left in the user's output folder"
    assert session.dtype == "float8_e4m3fn"
    assert session.versions == {"comfyui": "0.29.0", "torch": "2.13.0+cpu", "python": PYTHON}


def test_a_base_model_has_an_empty_negative_prompt(open_session):
    session, double = open_session(models.installed("base"))
    draw(session, replace(JOB, steps=20, guidance=4.0))
    graph = double.asked("/prompt")[0]["prompt"]
    texts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert sorted(texts) == ["", "a red cube"]


def test_references_are_handed_over_in_their_order(open_session, tmp_path):
    from PIL import Image

    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    session, double = open_session()
    draw(session, replace(JOB, images=tuple(paths)))
    uploads = [each["name"] for each in double.asked("/upload/image")]
    graph = double.asked("/prompt")[0]["prompt"]
    names = [node["inputs"]["image"] for node in graph.values() if node["class_type"] == "LoadImage"]
    assert names == [f"{name} [temp]" for name in uploads]
    assert len(set(names)) == 2


def test_a_file_in_a_subfolder_is_named_as_the_server_names_it(open_session):
    files = {**FILES, "UNETLoader": {"unet_name": ["flux2\\klein-test-fp8.safetensors"]}}
    session, double = open_session(files=files)
    draw(session)
    graph = double.asked("/prompt")[0]["prompt"]
    assert next(iter(graph.values()))["inputs"]["unet_name"] == "flux2\\klein-test-fp8.safetensors"


def test_a_users_workflow_is_run_with_the_jobs_prompt(open_session, tmp_path):
    source = Path(__file__).parent.parent / "fixtures" / "workflows" / "prompt_t2i_base.json"
    graph = json.loads(source.read_text(encoding="utf-8"))
    for node in graph.values():
        for key, names in FILES.get(node["class_type"], {}).items():
            node["inputs"][key] = names[-1] if key == "clip_name" else names[0]
    (tmp_path / "mine.json").write_text(json.dumps(graph), encoding="utf-8")
    session, double = open_session()
    draw(session, replace(JOB, workflow=tmp_path / "mine.json"))
    sent = double.asked("/prompt")[0]["prompt"]
    assert sent["4"]["inputs"]["text"] == "a red cube"
    assert sent["6"]["inputs"]["cfg"] == 5.0


def test_a_file_that_a_workflow_names_and_comfyui_lacks_is_told_with_a_line_to_paste(open_session, tmp_path):
    source = Path(__file__).parent.parent / "fixtures" / "workflows" / "prompt_t2i_base.json"  # with its own file names
    session, _ = open_session()
    with pytest.raises(KleinctlError) as failure:
        draw(session, replace(JOB, workflow=source))
    assert failure.value.problem.name == "value-not-in-list"
    assert failure.value.problem.fix.startswith(f"kleinctl doctor --comfyui {tmp_path}   # ")


def test_the_whole_road_through_a_worker(tmp_path):
    model = models.installed()
    folder = checkout(tmp_path / "ComfyUI", files=FILES)
    models.use(folder)
    jobs = (JOB, replace(JOB, seed=8))
    outputs = tuple(generate.Output(tmp_path / f"{job.seed}.png") for job in jobs)
    plugin = "kleinctl_plugins.comfyui_fp8"
    request = generate.Request(
        model.manifest, model.folder, "comfyui-fp8", plugin, Path(sys.executable), CPU, jobs, outputs
    )
    steps = []
    result = generate.run(request, steps.append)
    assert [image.path for image in result.images] == [output.path for output in outputs]
    assert result.to_json()["strategy"] == "dynamic"
    assert result.images[0].record["dtype"] == "float8_e4m3fn"
    assert "denoise" in result.images[0].seconds
    (pid,) = {int(line.rpartition(" ")[2]) for line in (folder / "starts.txt").read_text().splitlines()}
    assert not psutil.pid_exists(pid)


def ask(worker, job):
    with pytest.raises(KleinctlError):
        worker.ask(job, lambda step: None)


@pytest.mark.parametrize("options", [{"stuck": True}, {"before": {"client_id": "x"}}], ids=["it runs", "it waits"])
def test_stopping_the_worker_takes_the_job_back(tmp_path, options):
    """What Ctrl-C does: the control process stops the worker in the middle of a picture, or behind somebody else's."""
    from kleinctl.executors import ProcessExecutor
    from kleinctl.worker.protocol import Generate, Load

    model = models.installed()
    with Double(files=FILES, folder=tmp_path, numbers=True, **options) as double:
        models.use(tmp_path, url=double.url)
        worker = ProcessExecutor().start(Path(sys.executable), "kleinctl_plugins.comfyui_fp8")
        load = Load("kleinctl_plugins.comfyui_fp8", "comfy", model.manifest, model.folder, CPU)
        worker.ask(load, lambda step: None)
        job = Generate(JOB, tmp_path / "a.png", tmp_path / "a.partial", {"prompt": "a red cube"})
        asking = threading.Thread(target=ask, args=(worker, job))
        asking.start()
        end = time.monotonic() + 15
        while not double.asked("/prompt") and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        worker.stop()
        asking.join(15)
        while not double.asked("/interrupt") and time.monotonic() < end:
            time.sleep(0.05)
        assert [each["prompt_id"] for each in double.asked("/interrupt")] == ["job-101"]
        assert double.asked("/queue") == [{"delete": ["job-101"]}]
        assert not [entry for entry in double.pending if entry[1] == "job-101"]
    assert not (tmp_path / "a.png").exists()


# Refused before a run is spent


def test_a_machine_without_comfyui_is_told_how_to_get_one(empty_home):
    problem = ComfyuiFp8().absent()
    assert (problem.name, comfyui.known()) == ("comfyui-not-installed", None)
    assert problem.fix.startswith("kleinctl install --backend comfy")
    with pytest.raises(KleinctlError, match="ComfyUI is not installed"):
        Session(models.installed(), CPU)


def encoder(shapes):
    return "text-encoder", lambda path: weights.write(path, shapes)


def vae(shapes, **more):
    return "vae", lambda path: weights.write(path, shapes, **more)


def transformer(shapes, *more, **dtypes):
    return "transformer", lambda path: weights.write(path, shapes, *more, **dtypes)


UNMARKED = {**weights.flux2(**weights.KLEIN_4B), "double_blocks.0.img_attn.qkv.weight_scale": ()}
WRONG = {
    "an 8B text encoder": (*encoder(weights.qwen3(**weights.QWEN3_8B)), "text-encoder-width", "C01"),
    "Qwen3-VL": (*encoder(weights.qwen3_vl()), "text-encoder-vl", "C06"),
    "T5-XXL": (*encoder(weights.t5()), "text-encoder-width", "C04"),
    "CLIP-L": (*encoder(weights.clip(768, 3072, 12)), "text-encoder-width", None),
    "Mistral Small": (*encoder(weights.mistral()), "text-encoder-width", "C02"),
    "what nobody knows": (*encoder({"a.weight": (4, 4)}), "wrong-text-encoder", "B16"),
    "FLUX.1's VAE": (*vae(weights.vae(16, statistics=False)), "vae-channels", "C09"),
    "SDXL's VAE": (*vae(weights.vae(4, statistics=False)), "vae-channels", "C09"),
    "a VAE without statistics": (*vae(weights.vae(32, statistics=False)), "wrong-vae", "C09"),
    "a cut file": (*vae(weights.vae(32), missing=1000), "weights-truncated", "B02"),
    "fp8 without marks": (*transformer(UNMARKED, "F8_E4M3", _scale="F32"), "fp8-scales-unread", "C22"),
    "diffusers names": (
        *transformer(weights.flux2_diffusers(**weights.KLEIN_4B)),
        "diffusers-file-in-comfyui",
        "B16",
    ),
    "FLUX.1": (*transformer(weights.flux1()), "wrong-transformer", "B16"),
    "FLUX.2 dev": (*transformer(weights.flux2(**weights.FLUX2_DEV)), "wrong-transformer", "B16"),
    "klein 9B": (*transformer(weights.flux2(**weights.KLEIN_9B)), "text-encoder-width", None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_before_the_run(open_session, wrong):
    role, write, name, ref = WRONG[wrong]
    session, double = open_session()
    write(place(role))
    problem = problem_of(session)
    assert (problem.name, problem.ref or None) == (name, ref or problem.ref)
    assert problem.path in (str(place(role)), str(place("text-encoder")))
    assert problem.fix == "kleinctl install --model klein-test --backend comfyui-fp8"
    assert double.asked("/prompt") == [], "nothing was queued"


def test_weights_in_nvfp4_that_lie_two_to_a_byte_are_kleins_all_the_same(open_session):
    shapes, dtypes = {}, {}
    for name, shape in weights.flux2(**weights.KLEIN_4B).items():
        if "_blocks." in name and len(shape) == 2:
            shapes |= {name: (shape[0], shape[1] // 2), f"{name}_scale": (shape[0], shape[1] // 16)}
            shapes[f"{name}_scale_2"] = ()
            dtypes |= {name: "U8", f"{name}_scale": "F8_E4M3", f"{name}_scale_2": "F32"}
        else:
            shapes[name] = shape
    session, _ = open_session()
    marked = {"_quantization_metadata": '{"format_version": "1.0", "layers": {}}'}
    weights.write(place("transformer"), shapes, metadata=marked, **dtypes)
    assert draw(session)[0].size == (128, 96)
    session, _ = open_session()
    weights.write(place("transformer"), shapes, **dtypes)
    assert problem_of(session).name == "fp8-scales-unread"


def test_a_decoder_alone_draws_and_does_not_edit(open_session, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    session, _ = open_session()
    weights.write(place("vae"), weights.vae(32, encoder=False))
    draw(session)
    session, _ = open_session()
    weights.write(place("vae"), weights.vae(32, encoder=False))
    assert problem_of(session, replace(JOB, images=(tmp_path / "a.png",))).name == "vae-decoder-only"


def test_a_file_that_the_server_does_not_list(open_session):
    session, double = open_session()
    double.options["files"] = {**FILES, "VAELoader": {"vae_name": ["ae.safetensors", "pixel_space"]}}
    problem = problem_of(session)
    assert problem.name == "comfyui-lacks-model"
    assert problem.what == "ComfyUI has no VAE of klein-test"
    assert "vae-test.safetensors" in problem.why and "ae.safetensors, pixel_space" in problem.why
    assert double.asked("/prompt") == []


def test_a_server_that_runs_without_the_models_files_is_left_and_another_is_started(tmp_path):
    folder = checkout(tmp_path / "ComfyUI", files=FILES)
    with Double(folder=folder, files={"VAELoader": {"vae_name": ["ae.safetensors"]}}) as double:
        models.use(folder, url=double.url)
        session = Session(models.installed(), CPU)
        try:
            assert draw(session)[0].size == (128, 96)
            assert session.server.ours and not double.asked("/prompt")
            assert session.warnings == [
                f"the ComfyUI at {double.url} lacks files of the model, so another was started beside it"
            ]
        finally:
            session.close()


def test_a_server_that_the_user_has_ended_meanwhile_gives_way_to_one_of_ours(tmp_path):
    folder = checkout(tmp_path / "ComfyUI", files=FILES)
    with Double(folder=folder, files=FILES) as double:
        models.use(folder, url=double.url)
        session = Session(models.installed(), CPU)
        draw(session)
        assert not session.server.ours
    try:
        assert draw(session)[0].size == (128, 96)
        assert session.server.ours
    finally:
        session.close()


def test_no_job_is_sent_that_nobody_would_take_back(open_session):
    """After a start that failed, or when what watches was killed."""
    session, _ = open_session()
    before = session.server
    before.close()
    draw(session)
    assert session.server is not before and session.server.url == before.url


def test_a_file_that_was_replaced_makes_our_server_start_again(tmp_path):
    folder = checkout(tmp_path / "ComfyUI", files=FILES)
    models.use(folder)
    session = Session(models.installed(), CPU)
    try:
        draw(session)
        draw(session)
        assert len((folder / "starts.txt").read_text().splitlines()) == 1
        models.transformer(place("transformer"), dtype="F16")
        draw(session)
        assert len((folder / "starts.txt").read_text().splitlines()) == 2
        assert session.warnings == ["klein-test-fp8.safetensors was replaced, so ComfyUI was started again"]
    finally:
        session.close()


def test_a_file_that_was_replaced_under_a_server_that_is_not_ours(open_session):
    session, _ = open_session()
    draw(session)
    os.utime(place("vae"), (2_000_000_000, 2_000_000_000))
    assert problem_of(session).name == "comfyui-file-replaced"


def test_a_server_of_the_users_that_was_started_again_has_read_the_new_file(open_session):
    session, double = open_session()
    draw(session)
    models.transformer(place("transformer"), dtype="F16")
    os.utime(place("transformer"), (2_000_000_000, 2_000_000_000))
    assert problem_of(session).fix == "start ComfyUI again, then the same command"
    double.history.clear()
    assert draw(session)[0].size == (128, 96)


def test_a_server_of_the_users_that_was_updated_meanwhile_is_recorded_as_it_is_now(open_session):
    session, double = open_session()
    draw(session)
    double.history.clear()
    double.options["version"] = "0.31.0"
    draw(session)
    assert session.versions["comfyui"] == "0.31.0"


def test_a_server_that_loads_another_file_of_the_same_name_is_told_of(open_session, tmp_path):
    """The record has the sha256 of kleinctl's own file."""
    session, double = open_session(folders={"diffusion_models": [str(tmp_path / "theirs")]})
    theirs = models.transformer(tmp_path / "theirs" / place("transformer").name)
    draw(session)
    assert session.warnings == [], "a copy is the same"
    with theirs.open("r+b") as file:
        file.seek(theirs.stat().st_size // 2)
        file.write(b"fine-tuned" * 2**16)
    double.history.clear()  # started again, so that it has read the new one
    draw(session)
    said = f"{theirs} is what ComfyUI loads; the sha256 in the record is that of another file, {place('transformer')}"
    assert session.warnings == [said]


def test_who_waits_behind_a_job_without_steps_is_told_so_without_a_time_in_the_stages_name():
    """Seconds are counted by that name."""
    told = []
    tell = comfyui_fp8._Told({}, JOB, lambda *step: told.append(step))
    for most in (0, comfyui_client.UNSEEN, comfyui_client.UNSEEN):
        tell("", 1, most)
    assert told == [("queue", 0, 2), (comfyui_fp8.HIDDEN, 0, 2), (comfyui_fp8.HIDDEN, 0, 2)]


def test_a_file_that_the_running_server_loaded_for_someone_before_it_was_replaced(open_session):
    messages = [["execution_start", {"timestamp": 1_000}]]
    graph = {"1": {"class_type": "VAELoader", "inputs": {"vae_name": "vae-test.safetensors"}}}
    entry = {
        "prompt": [1, "old", graph, {}, []],
        "outputs": {},
        "status": {"status_str": "success", "messages": messages},
    }
    session, _ = open_session(history={"old": entry})
    problem = problem_of(session)
    assert problem.name == "comfyui-file-replaced"
    assert problem.what == "vae-test.safetensors was replaced after ComfyUI had loaded it"


# What a user's workflow makes besides


def coded(kind, frames=1):
    import io

    from PIL import Image

    pictures = [Image.new("RGB", (128, 96), (200, 10 * n, 10)) for n in range(frames)]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(buffer, kind, quality=95, **more)
    return buffer.getvalue()


def made(*names, type="output"):
    return {"9": {"images": [{"filename": name, "subfolder": "", "type": type} for name in names]}}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.webp", coded("WEBP"), "the PNG has the pixels of a WEBP file; ComfyUI made it as output/a.webp"),
        ("a.jpg", coded("JPEG"), "the PNG has the pixels of a JPEG file; ComfyUI made it as output/a.jpg"),
        ("a.webp", coded("WEBP", 3), "the PNG has the first of 3 pictures; ComfyUI made them all as output/a.webp"),
        ("a.png", coded("PNG", 2), "the PNG has the first of 2 pictures; ComfyUI made them all as output/a.png"),
    ],
    ids=["WebP", "JPEG", "animated WebP", "animated PNG"],
)
def test_a_picture_of_another_kind_is_taken_and_that_is_said(open_session, name, data, said):
    session, _ = open_session(made={name: data}, outputs=made(name))
    red, green, _ = draw(session)[0].getpixel((5, 5))
    assert red > 190 and green < 20
    assert session.warnings == [said]


def test_other_files_of_a_workflow_are_named_and_previews_are_not(open_session):
    outputs = {**made("a.png", "b.png", "c.mp4"), "8": made("d.png", type="temp")["9"]}
    session, _ = open_session(made={"a.png": coded("PNG")}, outputs=outputs)
    draw(session)
    assert session.warnings == ["the workflow made 3 files; left where ComfyUI put them: output/b.png, output/c.mp4"]


def test_a_workflow_that_makes_a_film_alone(open_session):
    outputs = {"9": {"images": made("c.mp4")["9"]["images"], "animated": [True]}}
    session, _ = open_session(made={"c.mp4": b"film"}, outputs=outputs)
    problem = problem_of(session)
    assert (problem.name, problem.what) == ("workflow-without-picture", "the workflow made no picture")
    assert "it made output/c.mp4, which stays there" in problem.why


def test_files_are_looked_at_where_the_running_server_says_that_they_are(open_session, tmp_path):
    session, _ = open_session(folders={"vae": [str(tmp_path / "vaes")]})
    place("vae").unlink()
    draw(session)
    said = "not looked at before the run, for it was not found on the disk: vae-test.safetensors"
    assert session.warnings == [said]
    weights.write(tmp_path / "vaes" / "vae-test.safetensors", weights.vae(16, statistics=False))
    assert problem_of(session).name == "vae-channels"


# After a failure


@pytest.mark.parametrize("name", sorted(path.stem for path in ERRORS.glob("*.json")))
def test_every_recorded_error_is_explained_with_its_file_and_a_fix(open_session, name, capfd):
    session, _ = open_session(error=name)
    problem = problem_of(session)
    assert problem.name not in ("comfyui-failed", "")
    assert problem.ref or problem.name == "prompt-rejected"
    assert "FOLDER" not in problem.fix and "ComfyUI-base" not in problem.fix, "it can be pasted"
    if name.startswith(("te-c", "te-q", "te-t5", "te-m", "te-u")):
        assert problem.path == str(place("text-encoder"))
    if name.startswith("vae-") or name == "edit-flux1vae":
        assert problem.path == str(place("vae"))
    if name.startswith("unet-") and name != "unet-in64":
        assert problem.path == str(place("transformer"))
    if "missing" not in name and "bad" not in name and "offered" not in name:
        assert "Traceback" not in problem.why
        assert "lines cut" in capfd.readouterr().err, "the traceback is in the log"


def test_memory_that_runs_out_in_a_node(open_session):
    session, _ = open_session()
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.63 GiB."
    said = {"node_type": "VAEDecode", "exception_type": "torch.OutOfMemoryError", "exception_message": text}
    problem = session._failure({}, said).problem
    assert (problem.name, problem.ref) == ("card-memory-full", "D01")


def test_an_error_that_nobody_knows_says_what_comfyui_said(open_session, monkeypatch):
    session, _ = open_session(gone=True)
    problem = problem_of(session)
    assert problem.name == "comfyui-failed"
    assert "someone removed it" in problem.why


def test_another_program_than_the_comfyui_that_was_adopted_is_told_with_its_folder(open_session, tmp_path):
    session, _ = open_session(status={"/prompt": 502})
    problem = problem_of(session)
    assert (problem.name, problem.fix) == ("comfyui-failed", f"kleinctl doctor --comfyui {tmp_path}")


def test_a_request_that_is_forbidden(open_session):
    session, _ = open_session(status={"/prompt": 403})
    assert problem_of(session).name == "origin-mismatch"


def test_a_picture_that_comes_damaged(open_session):
    session, _ = open_session(cut=True)
    assert problem_of(session).name == "picture-damaged"


def test_a_picture_over_which_pillow_stumbles():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[-1] = 0x21  # an extension begins where the file ends: an IndexError in Pillow
    with pytest.raises(KleinctlError, match="came damaged"):
        comfyui_fp8._opened(bytes(data), "a.gif")


def test_a_picture_that_is_gone_before_it_was_fetched(open_session):
    session, _ = open_session(status={"/view": 404})
    problem = problem_of(session)
    assert (problem.name, problem.what) == ("picture-damaged", "the picture is gone")
    assert "answered HTTP 404" in problem.why


@pytest.mark.parametrize("traceback", [None, 5, "text", {"a": 1}, [1, None]], ids=str)
def test_a_traceback_of_another_shape_is_no_crash(open_session, traceback):
    session, _ = open_session()
    assert session._failure({}, {"exception_message": "so", "traceback": traceback}).problem.name == "comfyui-failed"


def test_a_refusal_that_nests_without_end(open_session):
    session, _ = open_session()
    assert session._rejected({}, comfyui_client.Refused(400, "[" * 60000)).problem.name == "comfyui-failed"


@pytest.mark.parametrize(
    ("say", "name"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "card-memory-full"),
        ("", "memory-full"),
    ],
    ids=["out of VRAM", "killed"],
)
def test_a_server_that_dies_in_the_middle_of_a_run(tmp_path, say, name):
    models.use(checkout(tmp_path / "ComfyUI", files=FILES, die=8, say=say))
    session = Session(models.installed(), CPU)
    try:
        problem = problem_of(session)
        assert problem.name == name
        assert problem.path.endswith(".log")
    finally:
        session.close()


def test_a_server_that_just_ends(tmp_path):
    options = {"die": 8, "code": 3, "say": "going home"}
    models.use(checkout(tmp_path / "ComfyUI", files=FILES, **options))
    session = Session(models.installed(), CPU)
    try:
        problem = problem_of(session)
        assert problem.name == "comfyui-ended"
        assert problem.why == "It ended with exit status 3.\nThe last lines of its log:\n  going home"
        assert problem_of(session).name == "comfyui-ended", "the next job gets another server"
        assert len((tmp_path / "ComfyUI" / "starts.txt").read_text().splitlines()) == 2
    finally:
        session.close()


# What it will take


@pytest.fixture(scope="module")
def klein():
    from kleinctl.plugins import Plugins

    return Plugins().models["klein-4b"]


def h100(free):
    hardware = imagine("H100", 64 * GIB)
    return replace(hardware, gpus=(replace(hardware.gpus[0], vram_free_bytes=int(free * GIB)),))


@pytest.mark.parametrize(
    ("precision", "free", "vram", "ram", "seconds"),
    [
        ("bf16", 16, 15.96, 17.2, 1.34),
        ("bf16", 8, 7.96, 17.3, 2.03),
        ("fp8", 16, 14.99, 13.8, 1.14),
        ("fp8", 8, 7.96, 13.8, 1.45),
    ],
)
def test_the_prediction_is_near_what_was_measured(klein, precision, free, vram, ram, seconds):
    """1024 x 1024 on an H100 whose other memory was taken (docs/measurements.md)."""
    fit = ComfyuiFp8().fit(klein, h100(free), Job("", 1024, 1024, 0, 4, 1.0, precision=precision))
    assert fit.fits
    assert fit.vram_bytes / GIB == pytest.approx(vram, rel=0.05)
    assert fit.ram_bytes / GIB == pytest.approx(ram, rel=0.05)
    assert fit.seconds_next == pytest.approx(seconds, rel=0.2)


def test_a_precision_that_cannot_be_had(klein):
    job = Job("", 1024, 1024, 0, 4, 1.0)
    nvfp4 = ComfyuiFp8().fit(klein, h100(70), replace(job, precision="nvfp4"))
    assert not nvfp4.fits and "sm_120" in (nvfp4.why_not or "")
    bare = replace(h100(70), gpus=())
    assert "there is none here" in (ComfyuiFp8().fit(klein, bare, replace(job, precision="nvfp4")).why_not or "")
    odd = ComfyuiFp8().fit(models.model(), h100(70), replace(job, precision="bf16"))
    assert odd.why_not == "klein-test comes as fp8 for ComfyUI; bf16 was asked for."


def test_a_card_that_cannot_hold_one_decode_is_told_the_figures(klein):
    hardware = imagine("GTX 1050 Ti", 32 * GIB)
    fit = ComfyuiFp8().fit(klein, hardware, Job("", 2048, 2048, 0, 4, 1.0))
    assert not fit.fits
    assert "of VRAM" in (fit.why_not or "")


# What was taken


def test_the_servers_memory_counts_and_not_the_workers(tmp_path):
    from kleinctl.worker.device import peak_rss_bytes

    backend = ComfyuiFp8()
    device = backend.open_device(CPU)
    assert (device.name, device.peak_vram()) == ("cpu", (0, "none"))
    assert device.peak_rss() == pytest.approx(peak_rss_bytes(), rel=0.05)
    models.use(checkout(tmp_path / "ComfyUI", files=FILES))
    session = backend.load(models.installed(), CPU)
    try:
        assert device.process == session.server.pid
        if sys.platform == "linux":
            assert 0 < device.peak_rss() != peak_rss_bytes()
    finally:
        session.close()


def test_the_card_is_watched_without_torch(monkeypatch):
    from kleinctl.worker import watched

    used = iter([10 * GIB, 12 * GIB, 17 * GIB, 11 * GIB])
    monkeypatch.setattr(watched, "nvml_used_bytes", lambda uuid: next(used, 11 * GIB))
    monkeypatch.setattr(watched, "nvml_busy_percent", lambda uuid: 90)
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.01)
    hardware = h100(70)
    hardware = replace(hardware, gpus=(replace(hardware.gpus[0], uuid="GPU-1"),))
    device = ComfyuiFp8().open_device(replace(CPU, device="cuda:0", hardware=hardware))
    end = time.monotonic() + 5
    while device.peak_vram()[0] < 7 * GIB and time.monotonic() < end:
        time.sleep(0.02)
    assert device.peak_vram() == (7 * GIB, "NVML, all processes together")
    assert device.measure().vram_peak_bytes == 7 * GIB
    assert device.measure().vram_peak_bytes == GIB, "of the next stage"
    assert device.name == hardware.gpus[0].name
    assert "torch" not in watched.__dict__


def limited(monkeypatch, folder, **more):
    """What the backend loads with 6 GiB as the limit, on a card of which 70 GiB are free."""
    from kleinctl.worker import watched

    monkeypatch.setattr(watched, "nvml_used_bytes", lambda uuid: h100(70).gpus[0].vram_bytes - 70 * GIB)
    monkeypatch.setattr(watched, "nvml_busy_percent", lambda uuid: 0)
    hardware = h100(6)
    hardware = replace(hardware, gpus=(replace(hardware.gpus[0], uuid="GPU-1"),))
    budget = replace(CPU, device="cuda:0", hardware=hardware, vram_bytes=comfyui_fp8.memory.usable_vram(hardware.gpu))
    models.use(folder, **more)
    backend = ComfyuiFp8()
    backend.open_device(budget)
    return backend.load(models.installed(), budget)


def test_a_limit_of_vram_is_kept_by_leaving_the_rest_alone(tmp_path, monkeypatch):
    folder = checkout(tmp_path / "ComfyUI", files=FILES)
    limited(monkeypatch, folder).close()
    given = json.loads((folder / "starts.txt").read_text().rpartition(" ")[0])
    assert float(given[given.index("--reserve-vram") + 1]) == pytest.approx(70 - 6 * 0.9, abs=0.1)


def test_a_limit_that_a_running_server_does_not_know_of_is_said(tmp_path, monkeypatch):
    with Double(folder=tmp_path, files=FILES) as double:
        session = limited(monkeypatch, tmp_path, url=double.url)
        session.close()
    assert session.warnings == [
        f"the ComfyUI at {double.url} runs as its user started it, and knows of no --vram-limit"
    ]


# Workflows


def test_the_backend_writes_a_job_as_a_workflow(klein, tmp_path):
    from PIL import Image

    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    page = ComfyuiFp8().workflow(klein, replace(JOB, images=(tmp_path / "large.png",)))
    kinds = [node["type"] for node in page["nodes"]]
    assert "ImageScaleToTotalPixels" in kinds and "SaveImage" in kinds
    assert next(node for node in page["nodes"] if node["type"] == "LoadImage")["widgets_values"] == [
        "large.png",
        "image",
    ]


def test_a_workflow_is_looked_at_before_a_server_is_started(klein, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ComfyuiFp8().workflow(klein, JOB)), encoding="utf-8")
    with pytest.raises(KleinctlError, match="not in API format"):
        ComfyuiFp8().check_workflow(path, JOB)
    ComfyuiFp8().check_workflow(Path(__file__).parent.parent / "fixtures/workflows/prompt_t2i_base.json", JOB)
