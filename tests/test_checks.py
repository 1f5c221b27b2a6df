"""What doctor says of a wrong file, of a machine that lacks something, and of a healthy one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kleinctl.checks import check, own_checks, run_checks
from kleinctl.facts import System
from kleinctl.facts import weights as weights_facts
from kleinctl.hardware import Hardware
from kleinctl.problem import Problem
from tests import weights
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures" / "hardware"
KLEIN_4B = {"hidden": 3072, "text_width": 7680, "double": 5, "single": 20}
VAE = "vae/diffusion_pytorch_model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 168120878\n"
ENCODER = "text_encoder/model-00001-of-00002.safetensors"


@pytest.fixture
def model(empty_home: Path) -> Path:
    """The folder where klein-4b's parts go, with a right transformer and VAE in it (headers, no weights)."""
    folder = empty_home / "kleinctl" / "models" / "klein-4b" / "diffusers"
    weights.write(folder / TRANSFORMER, weights.flux2_diffusers(**KLEIN_4B))
    weights.write(folder / VAE, weights.vae_diffusers())
    return folder


@pytest.fixture
def problems(kleinctl) -> Callable[[], dict[str, dict]]:
    """What doctor finds wrong with files, by name."""

    def ask(*arguments: str) -> dict[str, dict]:
        found = json.loads(kleinctl("doctor", "--json", *arguments).stdout)["problems"]
        return {problem["name"]: problem for problem in found if "path" in problem}

    return ask


def test_the_right_files_are_no_problem(model, problems):
    weights.write(model / ENCODER, weights.qwen3(**weights.QWEN3_4B))
    assert problems() == {}


def test_a_flux1_vae_where_the_flux2_vae_belongs(model, problems, kleinctl):
    weights.write(model / VAE, weights.vae_diffusers(channels=16, statistics=False))
    found = problems()
    problem = found["wrong-vae"]
    assert problem["what"] == "diffusion_pytorch_model.safetensors is not the VAE of klein-4b"
    assert problem["why"].startswith("Wanted is the FLUX.2 VAE; this file shows 16 latent channels: FLUX.1 VAE")
    assert "16" in problem["why"]
    assert problem["fix"] == "kleinctl install --model klein-4b"
    assert (problem["ref"], problem["auto"]) == ("C09", True)
    assert problem["path"].endswith(VAE)
    assert "vae-channels" not in found  # the same file is not told of twice
    answer = kleinctl("doctor")
    assert answer.exit_code == 1
    assert "error[wrong-vae]: diffusion_pytorch_model.safetensors is not the VAE of klein-4b" in answer.stdout
    assert "hint: kleinctl install --model klein-4b" in answer.stdout


@pytest.mark.parametrize(
    ("shapes", "title", "name", "ref"),
    [
        (weights.qwen3(**weights.QWEN3_8B), "Qwen3 8B", "wrong-text-encoder", "C01"),
        (weights.mistral(), "Mistral Small 24B", "wrong-text-encoder", "C02"),
        (weights.t5(), "T5-XXL", "wrong-text-encoder", "C04"),
        (weights.qwen3_vl(), "Qwen3-VL", "text-encoder-vl", "C06"),
    ],
)
def test_another_models_text_encoder(shapes, title, name, ref, model, problems):
    weights.write(model / ENCODER, shapes)
    problem = problems()[name]
    assert problem["what"] == "model-00001-of-00002.safetensors is not the text encoder of klein-4b"
    assert problem["why"].startswith("Wanted is Qwen3 4B; this file shows ")
    assert title in problem["why"]
    assert problem["ref"] == ref


def test_an_8b_text_encoder_beside_a_4b_transformer_is_told_once(model, problems):
    weights.write(model / ENCODER, weights.qwen3(**weights.QWEN3_8B))
    assert list(problems()) == ["wrong-text-encoder"]


def test_a_9b_transformer_in_the_place_of_the_4b_one(model, problems):
    weights.write(model / TRANSFORMER, weights.flux2_diffusers(hidden=4096, text_width=12288, double=8, single=24))
    assert "FLUX.2 [klein] 9B" in problems()["wrong-transformer"]["why"]


def test_a_vae_saved_as_the_transformer(model, problems):
    weights.write(model / TRANSFORMER, weights.vae_diffusers())
    assert problems()["wrong-transformer"]["why"].startswith(
        "Wanted is a transformer, FLUX.2 [klein] 4B; this file shows"
    )


def test_a_download_that_was_cut_short(model, problems):
    weights.write(model / TRANSFORMER, weights.flux2_diffusers(**KLEIN_4B), missing=1_000_000)
    problem = problems()["weights-truncated"]
    assert problem["what"] == "transformer/diffusion_pytorch_model.safetensors is cut short"
    assert "1,000,000" in problem["why"] or "1.00 MB" in problem["why"]
    assert "It has 7,750,109,672 of 7,751,109,744 bytes." in problem["why"]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (LFS_POINTER, "weights-lfs-pointer", "Git LFS"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "weights-web-page", "web page"),
        (b"\0" * 4096, "weights-zeros", "zeros"),
        (b"", "weights-empty", "empty"),
        (b"PK\x03\x04" + b"\0" * 100, "weights-pickle", "pickle"),
    ],
)  # fmt: skip
def test_something_else_was_saved_under_the_vaes_name(content, name, words, model, problems):
    (model / VAE).write_bytes(content)
    assert words in problems()[name]["what"]


def test_a_wrong_vae_in_a_comfyui_folder(tmp_path, problems):
    models = tmp_path / "ComfyUI" / "models"
    weights.write(models / "vae" / "flux2-vae.safetensors", weights.vae(channels=4, statistics=False))
    weights.write(models / "diffusion_models" / "flux-2-klein-4b-fp8.safetensors", weights.flux2(**KLEIN_4B))
    weights.write(models / "text_encoders" / "qwen_3_4b.safetensors", weights.qwen3(**weights.QWEN3_4B))
    found = problems("--comfyui", str(tmp_path / "ComfyUI"))
    assert "flux2-vae.safetensors is not the VAE" in found["wrong-vae"]["what"]
    assert "wrong-text-encoder" not in found
    assert "wrong-transformer" not in found


def test_a_model_with_parts_of_unknown_hash_is_told_beforehand(kleinctl):
    found = json.loads(kleinctl("doctor", "--json", "--model", "klein-base-9b").stdout)["problems"]
    [problem] = [each for each in found if each["name"] == "hash-known"]
    assert problem["severity"] == "warning"
    assert "diffusion_pytorch_model-00001-of-00002.safetensors" in problem["why"]
    assert problem["fix"] == "kleinctl install --model klein-base-9b --allow-unverified"
    assert "hash-known" not in [each["name"] for each in json.loads(kleinctl("doctor", "--json").stdout)["problems"]]


# Machines.


def judged(hardware: Hardware) -> dict[str, Problem]:
    facts = {"hardware": hardware, "system": System(home="/home/user/kleinctl")}
    results = run_checks(own_checks(), facts)
    return {problem.name: problem for result in results for problem in result.problems}


def machine(name: str) -> Hardware:
    return Hardware.from_json(json.loads((FIXTURES / f"{name}.json").read_text())["hardware"])


def test_a_healthy_4070_ti_super():
    assert judged(machine("rtx-4070-ti-super")) == {}


def test_no_card_is_a_warning():
    problem = judged(machine("no-nvml"))["nvidia-card"]
    assert problem.severity == "warning"
    assert "still works" in problem.why


def test_a_driver_that_was_updated_and_not_restarted():
    problem = judged(machine("nvml-mismatch"))["driver-library-mismatch"]
    assert problem.ref == "A11"
    assert problem.fix.startswith("restart the computer")


def test_a_card_without_bf16():
    problem = judged(machine("gtx-1080-ti"))["no-bf16"]
    assert "sm_61" in problem.why


def test_vram_taken_by_a_game():
    hardware = machine("rtx-4070-ti-super")
    busy = replace(hardware.gpus[0], vram_free_bytes=hardware.gpus[0].vram_bytes // 3)
    problem = judged(replace(hardware, gpus=(busy,)))["vram-taken"]
    assert problem.severity == "warning"
    assert "of VRAM are taken" in problem.what


def test_a_fat32_disk():
    hardware = machine("rtx-4070-ti-super")
    disk = next(iter(hardware.disks.values()))
    small = replace(disk, filesystem="vfat", max_file_bytes=2**32 - 1)
    assert "vfat" in judged(replace(hardware, disks={"models": small}))["file-too-large-for-disk"].why


def test_a_home_that_is_read_only(kleinctl, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    answer = kleinctl("doctor", KLEINCTL_HOME=str(blocked / "home"))
    assert answer.exit_code == 1
    assert "cannot be written to" in answer.stdout
    assert "set KLEINCTL_HOME to a folder of yours" in answer.stdout


# The runner.


def test_a_check_that_lacks_a_fact_is_skipped_with_the_reason():
    [result] = run_checks([check("pairs")(lambda transformer, vae: None)], {})
    assert (result.status, result.why) == ("skipped", "Nothing is known of transformer and vae.")


def test_a_check_that_crashes_is_one_line():
    def crash(hardware):
        raise KeyError("x")

    tells = check("tells")(lambda hardware: "all is lost")
    own = [check("crashes")(crash), tells, check("fine")(lambda hardware: None)]
    results = run_checks(own, {"hardware": Hardware()})
    assert [each.status for each in results] == ["skipped", "skipped", "ok"]
    assert "returned str, and not Problem" in results[1].why


def test_check_names_are_lasting_words_and_said_once():
    names = [each.name for each in own_checks()]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and " " not in name for name in names)


def test_nothing_installed_is_no_scene(plugins=None):
    from kleinctl.plugins import Plugins

    assert weights_facts.gather(Plugins(frozenset())) == ()
