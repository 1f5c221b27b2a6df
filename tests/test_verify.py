"""Verification: every way a file can be wrong, in the words a user reads, and how fast it goes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from kleinctl.manifest import Model, Part, Source, load
from kleinctl.problem import Problem
from kleinctl.verify import BUFFER, Stopped, Verdict, hash_file, summary, verify_parts
from tests import weights
from tests.conftest import REPOSITORY

INSTALL = "kleinctl install --model klein-4b"


@pytest.fixture(scope="module")
def models() -> list[Model]:
    return [load(REPOSITORY / "manifests" / f"{name}.toml") for name in ("klein-4b", "klein-base-4b")]


def part_of(data: bytes, name: str = "weights.safetensors", **changes: object) -> Part:
    known: dict = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    return Part(
        "vae", "vae", name, {"diffusers": f"vae/{name}"}, (Source(name, "o/r", "0" * 40),), **known, model="klein-4b"
    )


def verdict(path: Path, part: Part, models: list[Model] | None = None) -> Verdict:
    (found,) = verify_parts([(path, part)], models=models or [])
    return found


def told(found: Verdict) -> tuple[str, str, str]:
    problem = found.problem
    assert isinstance(problem, Problem)
    return problem.what, problem.why, problem.fix


def test_a_right_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"right")
    found = verdict(path, part_of(b"right"))
    assert (found.status, found.ok, found.problem, found.identity) == ("ok", True, None, None)
    assert found.found_sha256 == hashlib.sha256(b"right").hexdigest()


def test_a_missing_file(tmp_path):
    found = verdict(tmp_path / "gone.safetensors", part_of(b"right"))
    assert found.status == "missing"
    assert told(found) == (
        "gone.safetensors is missing",
        f"klein-4b/vae should be at {tmp_path / 'gone.safetensors'}.",
        INSTALL,
    )


def test_a_download_that_was_cut_short_is_not_hashed(tmp_path):
    whole = weights.write(tmp_path / "whole", weights.vae())
    size = whole.stat().st_size
    path = weights.write(tmp_path / "vae.safetensors", weights.vae(), missing=1000)
    found = verdict(path, part_of(b"", size=size, sha256="0" * 64))
    assert (found.status, found.found_size, found.found_sha256) == ("wrong-size", size - 1000, None)
    assert told(found) == (
        "vae.safetensors is not klein-4b/vae",
        f"Wanted {size:,} bytes, found {size - 1000:,} bytes. Inside: 32 latent channels, batch-norm statistics: "
        f"FLUX.2 VAE; cut short: 1,000 of {size:,} bytes are missing.",
        INSTALL,
    )


def test_a_web_page_in_place_of_the_file(tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(b"<!DOCTYPE html>")
    assert told(verdict(path, part_of(b"x" * 168_120_878)))[1] == (
        "Wanted 168,120,878 bytes, found 15 bytes. Inside: a web page saved in place of the file: '<!DOCTYPE html>'."
    )


def test_flux1s_vae_under_the_right_name_and_of_the_right_size(tmp_path):
    path = weights.write(tmp_path / "flux2-vae.safetensors", weights.vae(16, False), "F32")
    wrong = hash_file(path)
    found = verdict(path, part_of(b"", size=path.stat().st_size, sha256="d64f3a68" * 8))
    assert (found.status, found.identity.family) == ("wrong-hash", "flux1-vae")
    assert told(found) == (
        "flux2-vae.safetensors is not klein-4b/vae",
        f"Wanted sha256 d64f3a68d64f…, found {wrong[:12]}…, in {path.stat().st_size:,} bytes. "
        "Inside: 16 latent channels: FLUX.1 VAE (SD3 and Z-Image have its like).",
        INSTALL,
    )


def test_the_base_model_in_place_of_the_distilled_one(tmp_path, models):
    """Equally long, with the same tensors: only the hash tells, and it tells which it is."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(b"base")
    base = models[1].part("transformer")
    fake = {**base.__dict__, "sha256": hashlib.sha256(b"base").hexdigest(), "size": 4}
    other = Model(**{**models[1].__dict__, "parts": (Part(**fake),)})
    found = verdict(path, part_of(b"dist"), [models[0], other])
    assert told(found)[1].endswith("in 4 bytes. It is klein-base-4b/transformer.")


def test_the_other_file_called_flux2_vae_is_right_as_well(tmp_path):
    path = tmp_path / "flux2-vae.safetensors"
    path.write_bytes(b"the other one")
    first, second = part_of(b"one"), part_of(b"the other one")
    model = Model(**{**load(REPOSITORY / "manifests" / "klein-4b.toml").__dict__, "parts": (first, second)})
    assert verdict(path, first, [model]).status == "ok"
    assert verdict(path, first).status == "wrong-size"


def test_a_part_without_a_known_hash(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"something")
    found = verdict(path, part_of(b"something", sha256=None, size=None))
    assert (found.status, found.ok, found.problem.severity) == ("unverified", True, "warning")
    assert told(found)[:2] == (
        "a.bin could not be verified",
        "No sha256 is known for klein-4b/vae; 9 bytes were found.",
    )


def test_a_folder_in_place_of_the_file(tmp_path):
    found = verdict(tmp_path, part_of(b"", size=None))
    assert found.status == "unreadable"
    assert told(found)[1] == f"klein-4b/vae should be at {tmp_path}; it cannot be read: Is a directory."


def test_many_files_keep_their_order_and_are_summed_up(tmp_path):
    items = []
    for n in range(20):
        data = bytes([n]) * (n * 50_000)
        (tmp_path / str(n)).write_bytes(data if n % 5 else data + b"!")
        items.append((tmp_path / str(n), part_of(data)))
    seen: dict[int, int] = {}
    found = verify_parts(items, lambda part, done, total: seen.__setitem__(total, done))
    assert [one.status for one in found] == ["ok" if n % 5 else "wrong-size" for n in range(20)]
    assert [one.path.name for one in found] == [str(n) for n in range(20)]
    assert all(total == done for total, done in seen.items()) and len(seen) == 16
    assert summary(found) == "20 parts, 9.50 MB: 4 wrong or missing"
    assert summary([one for one in found if one.ok][:1]) == "1 part, 50.0 kB: all are as they should be"
    assert found[1].to_json()["part"] == "klein-4b/vae"


def test_hashing_is_told_to_stop(tmp_path):
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(2**36)  # 64 GiB of nothing: minutes, if it were read to its end
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.perf_counter()
    with pytest.raises(Stopped):
        hash_file(path, stop=stop)
    assert time.perf_counter() - start < 5


def test_ctrl_c_ends_all_threads(tmp_path):
    items = []
    for n in range(2):
        with (tmp_path / str(n)).open("wb") as file:
            file.truncate(2**36)
        items.append((tmp_path / str(n), part_of(b"", size=2**36, sha256="0" * 64)))

    def interrupt(part: Part, done: int, total: int) -> None:
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        verify_parts(items, interrupt)
    assert time.perf_counter() - start < 5


def test_hashing_a_file_is_about_as_fast_as_hashing_memory(tmp_path, capsys):
    size = 256 * BUFFER
    block = os.urandom(BUFFER)
    path = tmp_path / "model"
    with path.open("wb") as file:
        for _ in range(size // BUFFER):
            file.write(block)

    def gigabytes_per_second(work) -> float:
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            work()
            best = max(best, size / 1e9 / (time.perf_counter() - start))
        return best

    def memory() -> None:
        digest = hashlib.sha256()
        for _ in range(size // BUFFER):
            digest.update(block)

    plain, file = gigabytes_per_second(memory), gigabytes_per_second(lambda: hash_file(path))
    part = part_of(b"", size=size, sha256=hash_file(path))
    both = 2 * gigabytes_per_second(lambda: verify_parts([(path, part), (path, part)]))
    with capsys.disabled():
        print(f" sha256: {plain:.2f} GB/s in memory, {file:.2f} from a file, {both:.2f} for two files at once")
    assert file > plain / 3  # nine tenths of it on an idle machine; the bound is for busy ones
