"""Installing a model: what is planned, what survives a crash, what is shared, and what an uninstall leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kleinctl import store
from kleinctl.fetch import Event, arrived_bytes, partial_file
from kleinctl.home import downloads_folder, home, quarantine_folder
from kleinctl.hub import Patience
from kleinctl.install import (
    InstallPlan,
    accept_licence,
    install_files,
    licence_accepted,
    plan_files,
    uninstall,
)
from kleinctl.manifest import Model, Part, Source
from kleinctl.problem import KleinctlError, shell
from tests.hub import Hub
from tests.models import tiny_model

ROOT = str(Path(__file__).parent.parent)
REPO = "black-forest-labs/FLUX.2-klein-4B"
QUICK = Patience(connect=2, stall=1, retries=2, backoff=0.01, longest_wait=2)
# Every file of the model on the hub: large ones are linked, small ones copied.
FILES = {
    "transformer/diffusion_pytorch_model.safetensors": random.Random(1).randbytes(3_000_000),
    "text_encoder/model.safetensors": random.Random(2).randbytes(2_000_000),
    "vae/diffusion_pytorch_model.safetensors": random.Random(3).randbytes(1_500_000),
    "model_index.json": b'{"_class_name": "Flux2KleinPipeline"}',
}
TRANSFORMER, TEXT_ENCODER, VAE, INDEX = FILES


def part_of(path: str, data: bytes, repo: str = REPO, model: str = "klein-4b", **more: Any) -> Part:
    role = path.partition("/")[0].replace("_", "-")
    values: dict[str, Any] = {
        "id": role if "/" in path else "model-index",
        "role": role if "/" in path else "config",
        "name": Path(path).name,
        "to": {"diffusers": path},
        "sources": (Source(path=path, repo=repo, revision="abc"),),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "model": model,
    }
    return Part(**{**values, **more})


def klein(files: dict[str, bytes] = FILES, name: str = "klein-4b", repo: str = REPO, **more: Any) -> Model:
    parts = tuple(part_of(path, data, repo, name) for path, data in files.items())
    return replace(tiny_model(), name=name, parts=parts, **more)


def publish(hub: Hub, files: dict[str, bytes] = FILES, repo: str = REPO) -> None:
    for path, data in files.items():
        hub.add(repo, path, data, revision="abc", lfs=path.endswith(".safetensors"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub.utils import close_session

    with Hub() as hub:
        publish(hub)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


class Watch(list[Event]):
    def __call__(self, event: Event) -> None:
        self.append(event)

    def parts(self, stage: str) -> set[str]:
        return {event.part.rpartition("/")[2] for event in self if event.stage == stage}


def install(model: Model, **choices: Any) -> Watch:
    watch = Watch()
    install_files(plan_files(model, "diffusers", **choices), watch, patience=QUICK)
    return watch


def actions(plan: InstallPlan) -> dict[str, str]:
    return {step.part.id: step.action for step in plan.steps}


def problems(plan: InstallPlan) -> list[str]:
    return [problem.name for problem in plan.problems]


def there(model: str = "klein-4b") -> dict[str, bytes]:
    folder = store.model_folder(model, "diffusers")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# The plan


def test_the_plan_says_what_comes_from_where(hub: Hub):
    plan = plan_files(klein(), "diffusers")
    assert set(actions(plan).values()) == {"download"}
    assert plan.fetch_bytes == plan.disk_bytes == sum(map(len, FILES.values()))
    assert not plan.complete and not plan.problems and plan.free_bytes > plan.disk_bytes
    document = json.loads(json.dumps(plan.to_json()))
    assert document["schema"] == "kleinctl.install/1"
    assert document["parts"][0] == {
        "part": "klein-4b/transformer",
        "name": "diffusion_pytorch_model.safetensors",
        "role": "transformer",
        "action": "download",
        "source": REPO,
        "to": str(home() / "models" / "klein-4b" / "diffusers" / TRANSFORMER),
        "bytes": 3_000_000,
        "sha256": hashlib.sha256(FILES[TRANSFORMER]).hexdigest(),
    }
    assert hub.requests == [] and not home().exists()


def test_no_room_is_said_before_anything_is_fetched(hub: Hub):
    model = klein()
    model = replace(model, parts=(*model.parts, replace(part_of("huge", b""), size=10**16)))
    plan = plan_files(model, "diffusers")
    assert problems(plan) == ["disk-full"]
    with pytest.raises(KleinctlError) as caught:
        install_files(plan)
    assert caught.value.problem.name == "disk-full"
    assert hub.requests == []


def test_a_home_on_a_stick_that_is_fat32(monkeypatch: pytest.MonkeyPatch):
    import psutil

    mount = namedtuple("mount", "device mountpoint fstype opts")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [mount("D:", "/", "FAT32", "")])
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10**12)
    big = replace(part_of("transformer/x", b""), size=7_751_109_744)
    plan = plan_files(replace(klein(), parts=(big, part_of(VAE, b"vae"))), "diffusers")
    assert problems(plan) == ["file-too-large-for-disk"]
    assert "7.75 GB" in plan.problems[0].why


def test_a_part_that_nobody_can_verify(hub: Hub):
    model = replace(klein(), parts=(part_of(INDEX, FILES[INDEX], sha256=None, size=None),))
    assert problems(plan_files(model, "diffusers")) == ["part-unverified"]
    install(model, allow_unverified=True)
    assert there() == {INDEX: FILES[INDEX]}
    hub.requests.clear()
    install(model)  # it is there, so there is nothing to allow
    assert hub.requests == []


def test_a_licence_that_has_to_be_accepted_first(hub: Hub):
    model = klein(accept_licence=True, licence="FLUX Non-Commercial License v2.1")
    assert problems(plan_files(model, "diffusers")) == ["licence-not-accepted"]
    accept_licence(model)
    assert licence_accepted(model) and not problems(plan_files(model, "diffusers"))
    assert not licence_accepted(replace(model, licence="FLUX Non-Commercial License v3"))


def test_offline_names_everything_that_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    plan = plan_files(klein(), "diffusers")
    assert problems(plan) == ["offline"]
    assert (
        "diffusion_pytorch_model.safetensors (3.00 MB)" in plan.problems[0].what
        and "model_index.json" in plan.problems[0].what
    )
    with pytest.raises(KleinctlError):
        install_files(plan)
    assert hub.requests == []


def test_alternatives_are_chosen_by_precision(hub: Hub):
    parts = tuple(part_of(f"transformer/{name}.safetensors", b"x", precision=name) for name in ("fp8", "bf16"))
    model = replace(klein(), parts=parts)
    assert [step.part.precision for step in plan_files(model, "diffusers").steps] == ["fp8"]
    assert [step.part.precision for step in plan_files(model, "diffusers", precision="bf16").steps] == ["bf16"]


def test_a_manifest_that_writes_elsewhere():
    part = part_of("../../../.bashrc", b"x")
    with pytest.raises(KleinctlError) as caught:
        plan_files(replace(klein(), parts=(part,)), "diffusers")
    assert caught.value.problem.name == "path-outside-folder"


# Installing, again and again


def test_installing_twice_asks_and_hashes_nothing_the_second_time(hub: Hub):
    install(klein())
    assert there() == FILES
    assert list(downloads_folder().iterdir()) == []
    hub.requests.clear()
    watch = install(klein())
    assert plan_files(klein(), "diffusers").complete
    assert (hub.requests, list(watch)) == ([], [])


def test_a_file_that_changed_is_noticed_and_replaced(hub: Hub):
    install(klein())
    changed = store.model_folder("klein-4b", "diffusers") / VAE
    time.sleep(0.01)
    changed.write_bytes(FILES[VAE][::-1])
    hub.requests.clear()
    install(klein())
    assert there() == FILES
    assert len(hub.gets("cdn")) == 1
    assert len(list(quarantine_folder().glob("diffusion_pytorch_model.safetensors.*.json"))) == 1


def test_a_cut_file_in_place_is_replaced(hub: Hub):
    install(klein())
    with (store.model_folder("klein-4b", "diffusers") / TRANSFORMER).open("r+b") as file:
        file.truncate(1000)
    assert actions(plan_files(klein(), "diffusers"))["transformer"] == "download"
    install(klein())
    assert there() == FILES


def test_files_without_their_memory_are_hashed_and_not_fetched(hub: Hub):
    install(klein())
    (home() / "verified.json").unlink()
    hub.requests.clear()
    assert set(actions(plan_files(klein(), "diffusers")).values()) == {"adopt"}
    watch = install(klein())
    assert watch.parts("verify") == {"transformer", "text-encoder", "vae", "model-index"}
    assert hub.requests == [] and plan_files(klein(), "diffusers").complete


SCRIPT = f"""
import sys
sys.path.insert(0, {ROOT!r})
from kleinctl.install import install_files, plan_files
from tests.test_install import klein
install_files(plan_files(klein(), "diffusers"), lambda event: print(event.stage, event.note, flush=True))
"""


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_the_middle_and_started_again(hub: Hub):
    hub.misbehave(TRANSFORMER, "slow", rate=1_000_000)
    part = klein().part("transformer")
    process = start()
    deadline = time.monotonic() + 20
    while arrived_bytes(part) < 1_000_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    here = arrived_bytes(part)
    assert 1_000_000 <= here < 3_000_000
    plan = plan_files(klein(), "diffusers")
    assert [step.fetch_bytes for step in plan.steps if step.part.id == "transformer"] == [3_000_000 - here]
    hub.requests.clear()
    install(klein())
    assert there() == FILES
    [resumed] = [seen for seen in hub.gets("cdn") if TRANSFORMER in seen.path]
    assert resumed.headers["range"] == f"bytes={here}-"


def test_killed_after_the_last_byte(hub: Hub):
    downloads_folder().mkdir(parents=True)
    for part in klein().parts:
        partial_file(part).write_bytes(FILES[part.to["diffusers"]])
    install(klein())
    assert there() == FILES and hub.requests == []


def test_two_installs_at_once_fetch_once(hub: Hub):
    for path in FILES:
        hub.misbehave(path, "slow", rate=3_000_000)
    both = [start(), start()]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert there() == FILES
    assert len(hub.gets("cdn")) == 3
    assert sum("waiting for another kleinctl" in text for text in said) == 1


def test_a_failure_leaves_what_arrived_in_place(hub: Hub):
    del hub.files[REPO, "abc", TRANSFORMER]
    hub.misbehave(TRANSFORMER, "status", code=503, headers={"Retry-After": "1"})  # time for the others
    with pytest.raises(KleinctlError) as caught:
        install(klein())
    assert caught.value.problem.name == "hub-file-missing"
    publish(hub)
    hub.requests.clear()
    install(klein())
    assert there() == FILES
    assert sum(INDEX in seen.path for seen in hub.requests) == 0


# One copy on this machine


def test_the_parts_that_two_models_share_are_fetched_once(hub: Hub):
    base_files = {**FILES, TRANSFORMER: FILES[TRANSFORMER][::-1]}
    publish(hub, base_files, "black-forest-labs/FLUX.2-klein-base-4B")
    base = klein(base_files, "klein-base-4b", "black-forest-labs/FLUX.2-klein-base-4B")
    install(klein())
    hub.requests.clear()
    plan = plan_files(base, "diffusers")
    assert actions(plan) == {"transformer": "download", "text-encoder": "adopt", "vae": "adopt", "model-index": "adopt"}
    assert plan.disk_bytes == 3_000_000 + len(FILES[INDEX])
    install(base)
    assert there("klein-base-4b") == base_files
    assert len(hub.gets("cdn")) == 1
    ours, theirs = (store.model_folder(name, "diffusers") / VAE for name in ("klein-4b", "klein-base-4b"))
    assert ours.samefile(theirs)
    assert uninstall(klein()).freed_bytes == 3_000_000 + len(FILES[INDEX])
    assert there("klein-base-4b") == base_files and plan_files(base, "diffusers").complete


def test_two_parts_that_are_the_same_file(hub: Hub):
    twin = replace(part_of(VAE, FILES[VAE]), id="twin", to={"diffusers": "vae/twin.safetensors"})
    install(replace(klein(), parts=(*klein().parts, twin)))
    assert there() == {**FILES, "vae/twin.safetensors": FILES[VAE]}
    assert len(hub.gets("cdn")) == 3


def fill_cache(files: dict[str, bytes] = FILES) -> None:
    for path, data in files.items():
        link = store.hub_cache() / f"models--{REPO.replace('/', '--')}" / "snapshots" / "abc" / path
        blob = link.parents[len(Path(path).parts) + 1] / "blobs" / hashlib.sha256(data).hexdigest()
        for file in (link, blob):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(blob)


def test_a_full_hub_cache_installs_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    fill_cache()
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    plan = plan_files(klein(), "diffusers")
    assert set(actions(plan).values()) == {"adopt"} and not plan.problems
    assert plan.disk_bytes == len(FILES[INDEX])
    watch = install(klein())
    assert there() == FILES and hub.requests == []
    assert watch.parts("verify") == {"transformer", "text-encoder", "vae", "model-index"}


def test_a_bad_file_in_the_hub_cache_is_left_there_and_not_used(hub: Hub):
    fill_cache({VAE: FILES[VAE]})
    [blob] = store.hub_cache().glob("models--*/blobs/*")
    blob.write_bytes(FILES[VAE][::-1])  # named after a hash that it does not have
    install(klein())
    assert there() == FILES and blob.read_bytes() == FILES[VAE][::-1]
    assert not quarantine_folder().exists()


def test_a_comfyui_folder_with_the_base_model_of_the_same_size(hub: Hub, tmp_path: Path):
    folder = tmp_path / "ComfyUI" / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    (folder / "flux-2-klein-base-4b.safetensors").write_bytes(FILES[TRANSFORMER][::-1])
    (folder / "mine.safetensors").write_bytes(FILES[TEXT_ENCODER])
    watch = install(klein(), comfyui=tmp_path / "ComfyUI")
    assert there() == FILES
    assert {"transformer", "text-encoder"} <= watch.parts("verify")
    assert not any(TEXT_ENCODER in seen.path for seen in hub.requests)
    uninstall(klein())
    assert len(list(folder.iterdir())) == 2
    plan = plan_files(klein(), "diffusers", comfyui=tmp_path / "ComfyUI")
    assert actions(plan)["transformer"] == "download"  # looked at before, and remembered
    assert actions(plan)["text-encoder"] == "adopt"


@pytest.mark.skipif(os.name != "posix", reason="links want a right on Windows")
def test_a_copy_behind_a_link_in_comfyuis_folder_is_found(hub: Hub, tmp_path: Path):
    folder, disk = tmp_path / "ComfyUI" / "models" / "diffusion_models", tmp_path / "disk"
    folder.mkdir(parents=True)
    disk.mkdir()
    (disk / "klein.safetensors").write_bytes(FILES[TRANSFORMER])
    (disk / "round").symlink_to(folder)
    (folder / "disk").symlink_to(disk)
    assert actions(plan_files(klein(), "diffusers", comfyui=tmp_path / "ComfyUI"))["transformer"] == "adopt"


@pytest.mark.skipif(os.name != "posix", reason="links want a right on Windows")
def test_a_disk_that_is_not_mounted_is_told_before_anything_is_fetched(hub: Hub, tmp_path: Path):
    store.make_folder(home())
    (home() / "models").symlink_to(tmp_path / "disk")
    [problem] = plan_files(klein(), "diffusers").problems
    assert problem.what == f"{home() / 'models'} is no folder" and problem.name == "disk-error"
    assert f"it is a link to {tmp_path / 'disk'}, which is not there now" in problem.why
    with pytest.raises(KleinctlError):
        install(klein())
    assert not hub.requests
    (tmp_path / "disk").mkdir()
    install(klein())
    assert there() == FILES


def test_a_file_where_a_folder_has_to_be(hub: Hub):
    file = store.model_folder("klein-4b", "diffusers") / "vae"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    [problem] = plan_files(klein(), "diffusers").problems
    assert (problem.what, problem.fix) == (f"{file} is no folder", shell("mv", file, f"{file}.old"))


def test_another_file_published_under_the_same_name_is_right_too(hub: Hub):
    other = random.Random(9).randbytes(1_500_100)
    twin = replace(part_of(VAE, other), id="vae-2")
    model = replace(klein(), parts=(*klein().parts, twin))
    target = store.model_folder("klein-4b", "diffusers") / VAE
    target.parent.mkdir(parents=True)
    target.write_bytes(other)
    install(model)
    assert target.read_bytes() == other and plan_files(model, "diffusers").complete


def test_a_model_that_comes_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path, data in FILES.items():
        file = tmp_path / "tiny_model_weights" / "klein-tiny" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "tiny_model_weights" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    parts = tuple(
        replace(part, sources=(Source(path=f"klein-tiny/{part.to['diffusers']}", package="tiny_model_weights"),))
        for part in klein().parts
    )
    model = replace(klein(), parts=parts)
    plan = plan_files(model, "diffusers")
    assert set(actions(plan).values()) == {"package"} and plan.fetch_bytes == 0 and not plan.problems
    install(model)
    assert there() == FILES


# Undoing it


def test_an_uninstall_takes_what_kleinctl_put_there_and_no_more(hub: Hub):
    fill_cache({VAE: FILES[VAE]})
    install(klein())
    folder = store.model_folder("klein-4b", "diffusers")
    (folder / "transformer" / "my-lora.safetensors").write_bytes(b"mine")
    partial_file(klein().parts[0]).write_bytes(b"1234")
    removed = uninstall(klein())
    assert len(removed.files) == 4
    assert removed.left == (folder / "transformer" / "my-lora.safetensors",)
    assert there() == {"transformer/my-lora.safetensors": b"mine"}
    assert removed.freed_bytes == sum(map(len, FILES.values())) - len(FILES[VAE]) + 4
    assert (store.hub_cache() / f"models--{REPO.replace('/', '--')}" / "snapshots" / "abc" / VAE).read_bytes() == FILES[
        VAE
    ]
    assert list(downloads_folder().iterdir()) == []
    assert json.loads(json.dumps(removed.to_json()))["schema"] == "kleinctl.uninstall/1"
    assert uninstall(klein()).files == ()


def test_an_uninstall_does_not_follow_a_link_out_of_the_home_folder(hub: Hub, tmp_path: Path):
    install(klein())
    folder = store.model_folder("klein-4b", "diffusers")
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    uninstall(klein())
    assert (tmp_path / "vae" / Path(VAE).name).read_bytes() == FILES[VAE]


def test_an_uninstall_takes_what_verify_found_to_be_wrong_as_well(hub: Hub):
    install(klein())
    folder = store.model_folder("klein-4b", "diffusers")
    (folder / VAE).write_bytes(FILES[VAE][::-1])
    store.Stamps().drop(folder / VAE)
    assert plan_files(klein(), "diffusers").steps[2].action == "adopt"  # it has to be hashed
    removed = uninstall(klein())
    assert (len(removed.files), removed.left) == (4, ())


def test_an_uninstall_takes_a_link_that_leads_nowhere_any_more(hub: Hub, tmp_path: Path):
    install(klein())
    place = store.model_folder("klein-4b", "diffusers") / VAE
    other = place.rename(tmp_path / "vae.safetensors")
    place.symlink_to(other)
    store.Stamps().put(place, hashlib.sha256(FILES[VAE]).hexdigest())
    other.unlink()
    store.Stamps().prune()
    assert uninstall(klein()).left == () and not os.path.lexists(place)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants a disk that is full")
def test_a_full_disk_does_not_keep_an_uninstall_from_making_room(hub: Hub):
    install(klein())
    (home() / "install.pid").symlink_to("/dev/full")
    assert len(uninstall(klein()).files) == 4 and there() == {}


def test_an_uninstall_of_what_was_never_there():
    removed = uninstall(klein())
    assert (removed.files, removed.freed_bytes, removed.left) == ((), 0, ())


def test_imports_stay_light():
    code = f"import sys; sys.path.insert(0, {ROOT!r}); import kleinctl.install; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"huggingface_hub", "httpx", "httpx2", "filelock", "psutil", "torch"} & set(loaded)
    assert os.environ["KLEINCTL_HOME"]
