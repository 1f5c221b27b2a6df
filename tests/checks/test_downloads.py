"""Room and ways for downloads, and what they left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kleinctl.environment import Environment
from kleinctl.facts import hub_cache as hub_cache_facts
from kleinctl.facts.hub_cache import HubCache
from kleinctl.facts.system import System
from kleinctl.hardware import Hardware
from kleinctl.hardware.facts import Disk, Gpu
from tests import weights as files
from tests.checks import looking
from tests.checks.looking import PLUGINS, by_name
from tests.conftest import REPOSITORY
from tests.facts.test_hub_cache import Cache
from tests.facts.test_weights import sized

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(empty_home: Path) -> Cache:
    return Cache(empty_home / "cache" / "huggingface" / "hub")


def disk(free: int, **more) -> Hardware:
    card = Gpu("NVIDIA GeForce RTX 4070 Ti SUPER", "8.9", 16 * 2**30, 15 * 2**30)
    return Hardware(gpus=(card,), disks={"models": Disk("/data/models", free, 10**12, "ext4", **more)})


def variables(**given: str) -> System:
    return System(variables=given)


# B06, B07


def test_a_disk_without_room_for_klein():
    problem = by_name(hardware=disk(9 * 10**9), model="klein-4b")["disk-full"]
    assert problem.what == "not enough room for klein-4b on the disk of /data/models"
    assert problem.why == "13.7 GB wanted for what is still to be fetched, 9.00 GB free."
    assert problem.fix.startswith("make 4.7")
    assert (problem.ref, problem.remedy) == ("B06", None)
    assert by_name(hardware=disk(20 * 10**9), model="klein-4b") == {}
    assert by_name(hardware=replace(disk(9 * 10**9), gpus=()), model="klein-4b") == {}  # it cannot run there anyway


def test_what_is_here_already_needs_no_room(empty_home):
    model = PLUGINS.models["klein-4b"]
    folder = empty_home / "kleinctl/models/klein-4b/comfyui"
    for part in model.parts_for("comfyui"):
        if part.role == "text-encoder":
            files.write(folder / part.to["comfyui"], files.qwen3(**files.QWEN3_4B))
    assert by_name(hardware=disk(9 * 10**9), model="klein-4b") == {}


def test_a_download_that_is_nearly_there_wants_room_for_the_rest_only():
    system = System(part_files_bytes=11 * 10**9)
    assert "1.60 GB wanted" in by_name(hardware=disk(10**9), system=system, model="klein-4b")["disk-full"].why
    assert by_name(hardware=disk(2 * 10**9), system=system, model="klein-4b") == {}


def test_unfinished_downloads_of_long_ago(cache):
    cache.everything()
    problem = by_name(system=System(part_files_bytes=3 * 10**9), model="klein-4b")["downloads-left-over"]
    assert problem.what == "kleinctl's unfinished downloads take 3.00 GB"
    assert (problem.remedy.action, problem.remedy.consent) == ("remove-partial-downloads", "ask")
    assert by_name(system=System(part_files_bytes=3 * 10**9), model="klein-tiny") == {}
    assert by_name(system=System(), model="klein-4b") == {}


def test_no_room_for_the_rest_of_the_hubs_cache(cache, monkeypatch):
    cache.everything()
    (cache.snapshot / TRANSFORMER).unlink()
    found = hub_cache_facts.gather(PLUGINS)
    monkeypatch.setattr(looking.hub_cache, "gather", lambda plugins: replace(found, free_bytes=10**9))
    problem = by_name()["disk-full"]
    assert "8.53 GB wanted, 1.00 GB free" in problem.why


def test_a_usb_stick_with_fat32():
    problem = by_name(hardware=disk(64 * 10**9, max_file_bytes=2**32 - 1))["file-too-large-for-disk"]
    assert "ends at 4.29 GB a file; one of 8.04 GB is wanted" in problem.why
    assert problem.ref == "B07"


# B08


def test_the_cache_is_on_another_disk(cache, monkeypatch):
    cache.everything()
    assert by_name() == {}
    found = hub_cache_facts.gather(PLUGINS)
    monkeypatch.setattr(looking.hub_cache, "gather", lambda plugins: replace(found, same_disk_as_home=False))
    problem = by_name()["cache-on-other-disk"]
    assert "only linked to" in problem.why
    assert "copied, and take room twice" in by_name(hardware=Hardware(platform="windows"))["cache-on-other-disk"].why
    assert (problem.ref, problem.severity) == ("B08", "warning")


def test_the_same_file_in_the_cache_and_in_comfyui(cache, tmp_path):
    part = PLUGINS.models["klein-4b"].part("transformer-fp8")
    repo = cache.repo.parent / "models--black-forest-labs--FLUX.2-klein-4b-fp8"
    snapshot = repo / "snapshots" / part.sources[0].revision
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob = sized(repo / "blobs" / part.sha256, part.size, files.flux2(**files.KLEIN_4B))
    (snapshot / part.name).symlink_to(blob)
    sized(tmp_path / "ComfyUI/models/diffusion_models" / part.name, part.size, files.flux2(**files.KLEIN_4B))
    problem = by_name(tmp_path / "ComfyUI")["downloaded-twice"]
    assert problem.what == "flux-2-klein-4b-fp8.safetensors is here twice, 4.07 GB each"
    assert problem.fix.startswith("hf cache rm model/black-forest-labs/FLUX.2-klein-4b-fp8")
    assert problem.severity == "warning"


def test_a_cache_that_is_not_whole(cache):
    cache.everything()
    assert by_name() == {}
    (cache.snapshot / TRANSFORMER).unlink()
    (cache.repo / "blobs/abc.incomplete").write_bytes(b"x" * 5000)
    (cache.snapshot / "vae/config.json").resolve().write_text("Entry not found")
    problem = by_name()["cache-incomplete"]
    assert f"{TRANSFORMER} is missing (7.75 GB)" in problem.why
    assert "1 unfinished download of 5.00 kB" in problem.why
    assert "vae/config.json holds a web page" in problem.why
    assert problem.fix == (
        "hf download black-forest-labs/FLUX.2-klein-4B vae/config.json --force-download "
        "&& hf download black-forest-labs/FLUX.2-klein-4B"
    )


# B09, B11


def test_windows_without_developer_mode():
    problem = by_name(system=System(symlinks=False))["symlinks-not-allowed"]
    assert "WinError 1314" in problem.why
    assert problem.ref == "B09"
    assert by_name(system=System(symlinks=False, variables={"HF_HUB_DISABLE_SYMLINKS": "1"})) == {}
    assert by_name(system=System(symlinks=True)) == {}


def test_a_home_folder_with_a_long_path(monkeypatch):
    home = "C:\\Users\\somebody\\" + "very-long-name\\" * 10
    problem = by_name(system=System(home=home, long_paths=False))["path-too-long"]
    assert "LongPathsEnabled" in problem.fix
    assert (problem.ref, problem.path) == ("B11", home)
    assert by_name(system=System(home=home, long_paths=True)) == {}
    assert by_name(system=System(home="C:\\klein", long_paths=False)) == {}
    deep = HubCache("D:\\" + "projects\\" * 14)
    monkeypatch.setattr(looking.hub_cache, "gather", lambda plugins: deep)
    assert "HF_HOME" in by_name(system=System(home="C:\\klein", long_paths=False))["path-too-long"].fix


# B10, B15


def environment(**packages: str) -> Environment:
    named = {name.replace("_", "-"): version for name, version in packages.items()}
    return Environment(Path("/venv/bin/python"), named, name="mine")


def test_an_hf_xet_that_hangs():
    problem = by_name(environments=[environment(hf_xet="1.1.5")])["xet-stalls"]
    assert problem.what == "hf-xet 1.1.5 of mine can hang while it downloads"
    assert problem.remedy.action == "install-packages"
    assert problem.remedy.arguments["packages"] == "hf-xet>=1.5.2"
    assert problem.ref == "B10"
    assert by_name(environments=[environment(hf_xet="1.5.2")]) == {}
    off = variables(HF_HUB_DISABLE_XET="1")
    assert by_name(environments=[environment(hf_xet="1.1.5")], system=off) == {}


def test_a_variable_from_an_old_guide():
    system = variables(HF_HUB_ENABLE_HF_TRANSFER="1")
    problem = by_name(environments=[environment(huggingface_hub="0.36.0")], system=system)["hf-transfer-left-over"]
    assert (problem.severity, problem.ref) == ("error", "B15")
    assert "every download stops" in problem.why
    newer = by_name(environments=[environment(huggingface_hub="1.23.0")], system=system)["hf-transfer-left-over"]
    assert newer.severity == "warning"
    both = environment(huggingface_hub="0.36.0", hf_transfer="0.1.9")
    assert by_name(environments=[both], system=system)["hf-transfer-left-over"].severity == "warning"
    assert by_name(environments=[both]) == {}


# B12, B13


@pytest.mark.parametrize("address", ["huggingface.co", "htps://hub", "https://", "//hub"])
def test_an_endpoint_that_is_no_address(address):
    problem = by_name(system=variables(HF_ENDPOINT=address))["endpoint-malformed"]
    assert problem.fix == "unset HF_ENDPOINT"
    assert repr(address) in problem.why


def test_a_mirror_is_a_good_endpoint():
    assert by_name(system=variables(HF_ENDPOINT="https://hub.example.org:8443/api")) == {}


def test_offline_with_files_missing(empty_home):
    problem = by_name(system=variables(HF_HUB_OFFLINE="1"), model="klein-4b")["offline"]
    assert problem.what.startswith("offline, and not here: ")
    assert problem.fix == "unset HF_HUB_OFFLINE"
    assert problem.ref == "B12"
    assert by_name(system=variables(HF_HUB_OFFLINE="1"), model="klein-tiny") == {}
    assert by_name(system=variables(HF_HUB_OFFLINE="0"), model="klein-4b") == {}


def test_offline_with_everything_in_the_cache(cache):
    cache.everything()
    assert by_name(system=variables(HF_HUB_OFFLINE="1"), model="klein-4b") == {}


def test_a_company_certificate_that_only_requests_knows():
    problem = by_name(system=variables(REQUESTS_CA_BUNDLE="/etc/company.pem"))["tls-not-trusted"]
    assert problem.fix == "export SSL_CERT_FILE=/etc/company.pem"
    assert problem.ref == "B13"
    both = variables(REQUESTS_CA_BUNDLE="/etc/company.pem", SSL_CERT_FILE="/etc/company.pem")
    assert by_name(system=both) == {}


# B17


def test_a_model_whose_size_is_told_too_small():
    problem = by_name(model="klein-base-9b")["size-unknown"]
    assert "diffusion_pytorch_model-00001-of-00002.safetensors" in problem.why
    assert (problem.ref, problem.severity) == ("B17", "warning")
    assert "size-unknown" not in by_name(model="klein-4b")


def test_a_healthy_machine():
    recorded = REPOSITORY / "tests/fixtures/hardware/rtx-4070-ti-super.json"
    hardware = Hardware.from_json(json.loads(recorded.read_text())["hardware"])
    system = System(home="/home/user/.local/share/kleinctl", symlinks=True, long_paths=True)
    assert by_name(hardware=hardware, system=system, environments=[environment(huggingface_hub="1.23.0")]) == {}
