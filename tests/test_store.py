"""One store on disk: paths that stay inside, files that changed behind our back, copies found and shared."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from kleinctl import store
from kleinctl.home import downloads_folder, home, models_folder, quarantine_folder
from kleinctl.manifest import Part, Source
from kleinctl.problem import KleinctlError
from kleinctl.store import Stamps

ROOT = str(Path(__file__).parent.parent)
LARGE = bytes(range(256)) * (store.LINK_FROM // 256)
REPO = "black-forest-labs/FLUX.2-klein-4B"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part_of(data: bytes, to: str = "vae/vae.safetensors", **more: object) -> Part:
    values = {"size": len(data), "sha256": sha256(data), "model": "klein-4b", **more}
    source = Source(path="vae/vae.safetensors", repo=REPO, revision="abc")
    return Part("vae", "vae", Path(to).name, {"diffusers": to}, (source,), **values)  # type: ignore[arg-type]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refused(call: object, *arguments: object) -> str:
    with pytest.raises(KleinctlError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.problem.name


# Where a part goes


def test_a_part_goes_below_its_model_and_layout():
    place = home() / "models" / "klein-4b" / "diffusers" / "vae" / "vae.safetensors"
    assert store.destination("klein-4b", "diffusers", part_of(b"x")) == place


@pytest.mark.parametrize(
    "path", ["../x", "vae/../../x", "/etc/x", "C:/x", "C:\\x", "vae\\..\\..\\x", "", "vae/\0", "~/x/.."]
)
def test_a_manifest_that_points_out_of_the_folder(path: str):
    assert refused(store.destination, "klein-4b", "diffusers", part_of(b"x", to=path)) == "path-outside-folder"


def test_a_link_that_leads_out_of_the_folder(tmp_path: Path):
    folder = store.model_folder("klein-4b", "diffusers")
    folder.mkdir(parents=True)
    (folder / "vae").symlink_to(tmp_path)
    with pytest.raises(KleinctlError) as caught:
        store.destination("klein-4b", "diffusers", part_of(b"x"))
    problem = caught.value.problem
    assert problem.name == "path-outside-folder" and str(tmp_path) in problem.why
    assert "KLEINCTL_HOME" in problem.fix and "report it" not in problem.fix


@pytest.mark.parametrize("linked", ["klein-4b", "klein-4b/diffusers"])
def test_a_model_that_its_user_keeps_on_another_disk_behind_a_link(tmp_path: Path, linked: str):
    link = home() / "models" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    source, target = tmp_path / "source", store.destination("klein-4b", "diffusers", part_of(b"x"))
    source.write_bytes(b"x")
    store.place(source, target)
    assert target.resolve().is_relative_to(tmp_path) and target.read_bytes() == b"x"
    assert refused(store.destination, "klein-4b", "diffusers", part_of(b"x", to="../x")) == "path-outside-folder"
    assert refused(store.model_folder, "klein-4b/..", "diffusers") == "path-outside-folder"


def test_a_model_whose_name_climbs():
    assert refused(store.model_folder, "..", "diffusers") == "path-outside-folder"


# What has been verified


def test_a_file_edited_after_it_was_verified(tmp_path: Path):
    file = write(tmp_path / "a", b"first")
    Stamps().put(file, sha256(b"first"))
    assert Stamps().sha256(file) == sha256(b"first")
    time.sleep(0.01)
    file.write_bytes(b"other")
    assert Stamps().sha256(file) is None


def test_a_file_swapped_for_one_of_the_same_size_and_time(tmp_path: Path):
    file = write(tmp_path / "a", b"first")
    facts = file.stat()
    Stamps().put(file, sha256(b"first"))
    other = write(tmp_path / "b", b"other")
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(file)
    assert Stamps().sha256(file) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {"size": 1}}}', '{"files": {"a": 1}}']
)
def test_a_damaged_memory_means_hashing_again(text: str):
    home().mkdir(parents=True)
    (home() / "verified.json").write_text(text)
    stamps = Stamps()
    stamps.put(write(home() / "b", b"x"), sha256(b"x"))
    assert Stamps().having(sha256(b"x")) == [home() / "b"]


def test_the_home_folder_moves_with_its_memory(monkeypatch: pytest.MonkeyPatch):
    Stamps().put(write(models_folder() / "a", b"x"), sha256(b"x"))
    moved = home().rename(home().with_name("moved"))
    monkeypatch.setenv("KLEINCTL_HOME", str(moved))
    assert Stamps().sha256(models_folder() / "a") == sha256(b"x")


def test_a_file_found_to_be_bad_is_hashed_again(tmp_path: Path):
    file = write(tmp_path / "a", b"x")
    Stamps().put(file, sha256(b"x"))
    Stamps().drop(file)
    assert Stamps().sha256(file) is None


def test_what_stands_in_the_place_of_a_part(tmp_path: Path):
    part, file = part_of(b"right"), tmp_path / "file"
    assert store.state(file, [part], Stamps()) == "absent"
    file.symlink_to(tmp_path / "removed from the cache")
    assert store.state(file, [part], Stamps()) == "absent"
    file.unlink()
    file.mkdir()
    assert store.state(file, [part], Stamps()) == "wrong"
    file.rmdir()
    write(file, b"longer than it should be")
    assert store.state(file, [part], Stamps()) == "wrong"
    write(file, b"wrong")
    assert store.state(file, [part], Stamps()) == "unchecked"
    stamps = Stamps()
    stamps.put(file, sha256(b"wrong"))
    assert store.state(file, [part], stamps) == "wrong"
    assert store.state(file, [part, part_of(b"wrong")], stamps) == "verified"
    assert store.state(file, [part_of(b"wrong", sha256=None)], stamps) == "verified"


# Copies on this machine


def cached(cache: Path, data: bytes, revision: str = "abc", etag: str = "") -> Path:
    """A file in the hub's cache, as huggingface-hub lays it out: a blob, and a link to it in a snapshot."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    blob = write(repo / "blobs" / (etag or sha256(data)), data)
    link = repo / "snapshots" / revision / "vae" / "vae.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    return link


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_a_file_in_the_hub_cache_wherever_that_is(
    variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    link = cached(tmp_path / below, LARGE)
    monkeypatch.setenv(variable, str(tmp_path))
    assert next(store.copies(part_of(LARGE), Stamps())) == link


def test_small_files_and_other_revisions_in_the_hub_cache():
    link = cached(store.hub_cache(), b"{}", revision="newer", etag="0123")
    assert list(store.copies(part_of(b"{}"), Stamps())) == [link]


def test_an_incomplete_file_in_the_hub_cache_is_no_copy():
    cached(store.hub_cache(), LARGE[:-1], etag=sha256(LARGE))
    assert list(store.copies(part_of(LARGE), Stamps())) == []


def test_a_comfyui_file_under_any_name_and_the_likeliest_first(tmp_path: Path):
    other = write(tmp_path / "vae" / "a.safetensors", LARGE[::-1])
    renamed = write(tmp_path / "vae" / "my flux2 (1).safetensors", LARGE)
    named = write(tmp_path / "vae" / "sub" / "vae.safetensors", LARGE)
    write(tmp_path / "vae" / "short.safetensors", LARGE[1:])
    write(tmp_path / "vae" / "picture.png", LARGE)
    found = list(store.copies(part_of(LARGE), Stamps(), [tmp_path]))
    assert found[0] == named and set(found) == {named, renamed, other}
    stamps = Stamps()
    stamps.put(other, sha256(LARGE[::-1]))  # looked at once, never again
    assert set(store.copies(part_of(LARGE), stamps, [tmp_path])) == {named, renamed}


def test_a_part_without_a_hash_is_never_adopted(tmp_path: Path):
    write(tmp_path / "vae.safetensors", LARGE)
    assert list(store.copies(part_of(LARGE, sha256=None), Stamps(), [tmp_path])) == []


# Into place


def elsewhere() -> Path | None:
    """A folder on another disk."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) and shm.stat().st_dev != Path("/tmp").stat().st_dev else None


def test_a_large_file_takes_no_room_twice(tmp_path: Path):
    source, target = write(tmp_path / "blob", LARGE), tmp_path / "models" / "vae.safetensors"
    assert store.place(source, target) == "hardlink"
    assert target.samefile(source) and target.stat().st_nlink == 2
    assert store.place(source, target) == "hardlink"  # onto itself
    assert [file.name for file in target.parent.iterdir()] == ["vae.safetensors"]


def test_a_link_of_the_hub_cache_is_followed_to_its_blob(tmp_path: Path):
    source = cached(tmp_path / "cache", LARGE)
    target = tmp_path / "vae.safetensors"
    store.place(source, target)
    assert not target.is_symlink() and target.samefile(source.resolve())


def test_editing_a_small_file_of_somebody_else_does_not_change_ours(tmp_path: Path):
    source, target = write(tmp_path / "config.json", b"{}"), tmp_path / "ours" / "config.json"
    assert store.place(source, target) == "copy"
    source.write_bytes(b"[]")
    assert target.read_bytes() == b"{}"


def test_a_damaged_file_in_the_way_is_replaced(tmp_path: Path):
    target = write(tmp_path / "b", b"old")
    store.place(write(tmp_path / "a", LARGE), target)
    assert target.read_bytes() == LARGE


def test_what_a_killed_install_left_beside_is_removed_and_what_another_writes_is_not(tmp_path: Path):
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    target = tmp_path / "vae [1].safetensors"
    left, other = (write(tmp_path / f".{target.name}.{pid}.tmp", b"half") for pid in (died.pid, os.getppid()))
    store.place(write(tmp_path / "a", LARGE), target)
    assert target.read_bytes() == LARGE
    assert (left.exists(), other.exists()) == (False, True)


@pytest.mark.skipif(not elsewhere(), reason="needs two disks")
def test_a_copy_on_another_disk_is_linked_and_ours_is_moved(tmp_path: Path):
    folder = elsewhere()
    assert folder
    source = write(folder / f"kleinctl-test-{os.getpid()}", LARGE)
    try:
        assert store.can_link(source, tmp_path / "a")
        assert store.place(source, tmp_path / "a") == "symlink"
        assert (tmp_path / "a").read_bytes() == LARGE
        store.move(source, tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == LARGE and not source.exists()
    finally:
        source.unlink(missing_ok=True)


def test_a_bad_file_is_kept_with_the_reason(tmp_path: Path):
    for text in (b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"):
        bad = write(tmp_path / "vae.safetensors", text)
        kept, looks = store.quarantine(bad, name="vae.safetensors", wanted="w", found=sha256(text), source="here")
        assert not bad.exists() and kept.read_bytes() == text
        reason = json.loads(kept.with_name(kept.name + ".json").read_text())
        assert (reason["wanted"], reason["found"], reason["looks_like"]) == ("w", sha256(text), looks)
    assert len(list(quarantine_folder().iterdir())) == 4


# The disk


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EFBIG, "file-too-large-for-disk"),
        (errno.EROFS, "folder-not-writable"),
        (errno.EACCES, "folder-not-writable"),
        (errno.EIO, "disk-error"),
    ],
)
def test_what_the_disk_says(number: int, name: str, tmp_path: Path):
    problem = store.disk_problem(OSError(number, os.strerror(number)), tmp_path / "vae.safetensors")
    assert problem.name == name and "vae.safetensors" in problem.what and str(tmp_path) in problem.why
    assert problem.fix


def test_a_stick_formatted_as_fat32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import psutil

    mount = namedtuple("mount", "device mountpoint fstype opts")
    mounts = [mount("/dev/sda1", "/", "ext4", ""), mount("/dev/sdb1", str(tmp_path / "stick"), "vfat", "")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    (tmp_path / "stick").mkdir()
    assert store.is_fat32(tmp_path / "stick" / "not" / "yet")
    assert not store.is_fat32(tmp_path)


# One at a time


@pytest.mark.skipif(os.name == "nt", reason="links want a right on Windows")
def test_a_link_that_moves_to_another_disk_stays_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, link, target = write(tmp_path / "file", b"x"), tmp_path / "a" / "link", tmp_path / "b" / "link"
    link.parent.mkdir()
    link.symlink_to(file)
    replace = Path.replace

    def over(path: Path, to: Path) -> Path:
        if path.parent != to.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", over)
    store.move(link, target)
    assert target.readlink() == file and not os.path.lexists(link) and file.read_bytes() == b"x"


HOLD = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from kleinctl.store import locked
with locked(print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_an_install_waits_for_another_and_outlives_its_death():
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    notes: list[str] = []
    timer = threading.Timer(0.5, holder.send_signal, [signal.SIGKILL])
    timer.start()
    start = time.monotonic()
    with store.locked(notes.append):
        assert 0.3 < time.monotonic() - start < 5
    assert notes == [f"waiting for another kleinctl (pid {holder.pid}) to finish"]
    with store.locked(notes.append):
        assert len(notes) == 1
    holder.wait()


def test_downloads_lie_in_the_home_folder():
    assert downloads_folder().parent == home()
