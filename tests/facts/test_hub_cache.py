"""What is found in Hugging Face's cache, and how whole it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kleinctl import documents
from kleinctl.facts import hub_cache, weights
from tests import weights as files
from tests.checks.looking import PLUGINS

REPO = "black-forest-labs/FLUX.2-klein-4B"
REVISION = "e7b7dc27f91deacad38e78976d1f2b499d76a294"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


class Cache:
    """A cache as huggingface-hub makes it: blobs, and snapshots of links to them."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / f"models--{REPO.replace('/', '--')}"
        self.snapshot = self.repo / "snapshots" / REVISION
        self.snapshot.mkdir(parents=True)
        (self.repo / "blobs").mkdir()
        (self.repo / "refs").mkdir()
        (self.repo / "refs/main").write_text(REVISION)

    def link(self, name: str, blob: str) -> Path:
        path = self.snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path("../" * (name.count("/") + 2)) / "blobs" / blob)
        return self.repo / "blobs" / blob

    def text(self, name: str, content: str = "{}") -> None:
        self.link(name, f"{abs(hash(name)):040x}"[:40]).write_text(content)

    def everything(self) -> None:
        model = PLUGINS.models["klein-4b"]
        for part in model.parts_for("diffusers"):
            path = part.sources[0].path
            if part.role == "transformer":
                files.write(self.link(path, part.sha256), files.flux2_diffusers(**files.KLEIN_4B))
            elif part.role == "text-encoder":
                files.write(self.link(path, part.sha256), files.qwen3(**files.QWEN3_4B))
            elif part.role == "vae":
                files.write(self.link(path, part.sha256), files.vae_diffusers())
            else:
                self.text(path)


@pytest.fixture
def cache(empty_home: Path) -> Cache:
    return Cache(empty_home / "cache" / "huggingface" / "hub")


def gather() -> hub_cache.HubCache:
    found = hub_cache.gather(PLUGINS)
    assert found is not None
    assert documents.read(hub_cache.HubCache, documents.plain(found), "cache") == found
    return found


def test_no_cache_is_no_fact():
    assert hub_cache.gather(PLUGINS) is None


def test_a_whole_snapshot(cache):
    cache.everything()
    [repo] = gather().repos
    assert (repo.repo, repo.revision, repo.model, repo.refs) == (REPO, REVISION, "klein-4b", ("main",))
    assert (repo.missing, repo.broken_links, repo.unfinished, repo.text_files) == ((), (), (), ())
    assert gather().same_disk_as_home
    assert gather().free_bytes


def test_its_weights_are_found_with_what_their_place_wants(cache):
    cache.everything()
    found = {each.part: each for each in weights.gather(PLUGINS)}
    assert set(found) == {"transformer", "text-encoder-1", "text-encoder-2", "vae"}
    assert {each.set_name for each in found.values()} == {f"hub-cache/{REPO}/e7b7dc27"}
    assert found["transformer"].wanted_variant == "distilled"
    assert found["vae"].place == "hub-cache"


def test_a_snapshot_that_was_named_as_a_folder_is_looked_at_once(cache):
    cache.everything()
    found = weights.gather(PLUGINS, folders=[cache.snapshot])
    assert len(found) == 4
    assert {each.place for each in found} == {"diffusers-folder"}


def test_a_download_that_was_broken_off(cache):
    cache.everything()
    (cache.snapshot / TRANSFORMER).unlink()
    (cache.repo / "blobs" / "abc.123.incomplete").write_bytes(b"x" * 1000)
    [repo] = gather().repos
    assert repo.missing == (TRANSFORMER,)
    assert repo.missing_bytes == 7751109744
    assert repo.unfinished == ("abc.123.incomplete",)
    assert repo.unfinished_bytes == 1000


def test_a_blob_that_somebody_removed(cache):
    cache.everything()
    (cache.snapshot / TRANSFORMER).resolve().unlink()
    [repo] = gather().repos
    assert repo.broken_links == (TRANSFORMER,)


def test_a_servers_answer_saved_as_a_configuration(cache):
    cache.everything()
    (cache.snapshot / "transformer/config.json").resolve().write_text("Entry not found")
    (cache.snapshot / "vae/config.json").resolve().write_text("<!DOCTYPE html><html></html>")
    assert gather().repos[0].text_files == ("transformer/config.json", "vae/config.json")


def test_one_file_that_a_program_took_is_not_incomplete(cache):
    cache.text("README.md")
    assert gather().repos[0].missing == ()


def test_a_first_download_without_any_snapshot(cache):
    cache.snapshot.rmdir()
    (cache.repo / "blobs" / "abc.incomplete").write_bytes(b"x")
    [repo] = gather().repos
    assert (repo.revision, repo.unfinished_bytes) == ("", 1)


def test_the_cache_is_where_the_variables_say(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two" / "hub").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "two"))
    assert gather().path == str(tmp_path / "two" / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "one"))
    assert gather().path == str(tmp_path / "one")
