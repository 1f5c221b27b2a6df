"""What doctor says of files that are not what their place or name says. Each test is a mistake that users make."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from kleinctl.problem import shell
from kleinctl.store import Stamps
from tests import weights as files
from tests.checks.looking import PLUGINS, by_name
from tests.facts.test_weights import sized

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model-00001-of-00002.safetensors"
GATED = (
    "Access to model black-forest-labs/FLUX.2-klein-9B is restricted. You must have access to it and be authenticated"
)


@pytest.fixture
def store(empty_home: Path) -> Path:
    """klein-4b as kleinctl keeps it: the right parts, headers without weights."""
    folder = empty_home / "kleinctl" / "models" / "klein-4b" / "diffusers"
    files.write(folder / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_4B))
    files.write(folder / VAE, files.vae_diffusers())
    files.write(folder / ENCODER, files.qwen3(**files.QWEN3_4B))
    return folder


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A ComfyUI with klein 4B in it."""
    models = tmp_path / "ComfyUI" / "models"
    files.write(models / "diffusion_models/flux-2-klein-4b-fp8.safetensors", files.flux2(**files.KLEIN_4B))
    files.write(models / "text_encoders/qwen_3_4b.safetensors", files.qwen3(**files.QWEN3_4B))
    files.write(models / "vae/flux2-vae.safetensors", files.vae())
    return tmp_path / "ComfyUI"


def about_files(*folders: Path, **more) -> dict:
    """The problems of these checks by name."""
    return {name: each for name, each in by_name(*folders, **more).items() if each.path}


def test_the_right_files_everywhere_are_no_problem(store, comfy):
    assert about_files(comfy) == {}


@pytest.mark.skipif(os.name == "nt", reason="no file has a quote in its name")
def test_a_quote_in_the_name_of_a_folder_stays_within_the_word_that_is_pasted(tmp_path):
    folder = tmp_path / 'mine" && touch "owned' / "vae"
    folder.mkdir(parents=True)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 168120878\n"
    (folder / "klein.safetensors").write_text(pointer)
    fix = about_files(folder.parent)["weights-lfs-pointer"].fix
    assert shlex.split(fix, comments=True) == ["git", "-C", str(folder), "lfs", "pull"]


def test_a_path_of_windows_is_quoted_as_windows_reads_it():
    assert shell("git", "-C", r"C:\my models\klein", "pull") == r'git -C "C:\my models\klein" pull'
    assert shell("git", "-C", r"C:\klein", "pull") == r"git -C C:\klein pull"
    assert shell("dir", r"~\ComfyUI & co") == r'dir "~\ComfyUI & co"'
    forged = shell("git", "-C", 'C:\\klein" && calc "', "pull")
    assert forged.count('"') == 2 and forged.index('"') < forged.index("&&") < forged.rindex('"')


# B02, B03, B04


def test_a_download_that_stopped_under_its_final_name(comfy):
    path = comfy / "models/text_encoders/qwen_3_4b.safetensors"
    files.write(path, files.qwen3(**files.QWEN3_4B), missing=5_000_000)
    problem = about_files(comfy)["weights-truncated"]
    assert problem.what == "qwen_3_4b.safetensors is cut short"
    assert "5,000,000 of 8,044," in problem.why
    assert (problem.ref, problem.severity) == ("B02", "error")
    assert problem.fix == f'kleinctl doctor --fix --comfyui "{comfy}"'
    assert problem.remedy.action == "replace-file"
    assert problem.remedy.arguments == {"model": "klein-4b", "part": "text-encoder-comfyui", "path": str(path)}
    assert problem.remedy.consent == "ask"


def test_a_broken_file_of_another_model_is_a_warning(comfy):
    files.write(comfy / "models/checkpoints/sdxl.safetensors", {"a.b": (4, 4)}, missing=3)
    problem = about_files(comfy)["weights-truncated"]
    assert (problem.severity, problem.remedy) == ("warning", None)


def test_a_file_that_is_longer_than_its_header_says(store):
    with (store / VAE).open("ab") as file:
        file.write(b"0" * 10)
    assert about_files()["weights-truncated"].what.endswith("is longer than its header says")


def test_a_header_and_then_nothing_but_zeros(comfy):
    path = comfy / "models/diffusion_models/flux-2-klein-4b.safetensors"
    size = files.write(path, files.flux2(**files.KLEIN_4B)).stat().st_size
    path.write_bytes(files.header(files.flux2(**files.KLEIN_4B)))
    os.truncate(path, size)
    problem = about_files(comfy)["weights-zeros"]
    assert "blocks 3072 wide: FLUX.2 [klein] 4B" in problem.why
    assert "zeros in 16 of 16 places of its weights" in problem.why
    assert problem.remedy.arguments["part"] == "transformer-bf16"


def test_a_file_of_a_diffusers_folder_is_fetched_into_it(tmp_path):
    files.write(tmp_path / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_9B), missing=7)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert about_files(tmp_path)["weights-truncated"].fix == (
        f"hf download black-forest-labs/FLUX.2-klein-9B {TRANSFORMER} {shell('--local-dir', tmp_path)} --force-download"
    )


def test_a_git_clone_without_lfs(store, tmp_path):
    vae = PLUGINS.models["klein-4b"].part("vae")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{vae.sha256}\nsize {vae.size}\n"
    (store / VAE).write_text(pointer)
    problem = about_files()["weights-lfs-pointer"]
    assert problem.what == "vae/diffusion_pytorch_model.safetensors is a Git LFS pointer, not the file it stands for"
    assert "168 MB" in problem.why
    assert f"sha256 {vae.sha256[:12]}" in problem.why
    assert problem.why.count("klein-4b/vae") == 1
    assert (problem.ref, problem.remedy.consent) == ("B03", "auto")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/vae.safetensors").write_text(pointer)
    found = [each for each in [about_files(tmp_path / "clone")["weights-lfs-pointer"]] if "clone" in each.path]
    assert found[0].remedy.arguments["part"] == "vae"
    assert found[0].fix.startswith("git -C")


@pytest.mark.parametrize(
    ("content", "name", "ref", "words"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "weights-web-page", "B04", "a web page"),
        (b"Entry not found", "weights-web-page", "B04", "a server's answer"),
        (GATED.encode(), "weights-web-page", "B01", "wants its licence accepted"),
        (b'{"error":"Repository not found"}', "weights-json", "B04", "a server's error"),
        (b"\0" * 4096, "weights-zeros", "B04", "reserved by a download that did not happen"),
        (b"", "weights-empty", "B04", "0 bytes"),
        (b"PK\x03\x04" + b"\0" * 100, "weights-pickle", "B04", "zip archive"),
        (b"just some words that somebody wrote", "weights-other", "B04", "text, no weights"),
    ],
)  # fmt: skip
def test_something_else_was_saved_under_the_vaes_name(content, name, ref, words, comfy):
    path = comfy / "models/vae/flux2-vae.safetensors"
    path.write_bytes(content)
    problem = about_files(comfy)[name]
    assert words.lower() in problem.why.lower()
    assert problem.ref == ref
    assert problem.evidence[0].looked_at == str(path)
    assert problem.remedy.arguments["part"] == "vae-comfyui"


@pytest.mark.skipif(os.name == "nt", reason="making links wants a privilege there")
def test_a_link_to_a_disk_that_is_away(comfy):
    path = comfy / "models/vae/flux2-vae.safetensors"
    path.unlink()
    path.symlink_to("/nowhere/flux2-vae.safetensors")
    problem = about_files(comfy)["weights-unreadable"]
    assert problem.remedy is None
    assert problem.fix.startswith("ls -l")


# B16, C01 to C11


@pytest.mark.parametrize(
    ("shapes", "name", "words", "ref"),
    [
        (files.qwen3(**files.QWEN3_8B), "wrong-text-encoder", "It belongs to FLUX.2 [klein] 9B", "C01"),
        (files.mistral(), "wrong-text-encoder", "It belongs to FLUX.2 [dev]", "C02"),
        (files.t5(), "wrong-text-encoder", "It belongs to FLUX.1", "C04"),
        (files.qwen3_vl(), "text-encoder-vl", "Qwen3-VL", "C06"),
    ],
)
def test_another_models_text_encoder_under_the_right_name(shapes, name, words, ref, comfy):
    files.write(comfy / "models/text_encoders/qwen_3_4b.safetensors", shapes)
    found = about_files(comfy)
    assert list(found) == [name]  # told once, and not again for its width
    assert found[name].what == "qwen_3_4b.safetensors is not the text encoder of klein-4b"
    assert words in found[name].why
    assert found[name].ref == ref


def test_the_right_content_under_another_name_is_fine(comfy):
    vae = comfy / "models/vae/flux2-vae.safetensors"
    vae.rename(vae.with_name("model (1).safetensors"))
    assert about_files(comfy) == {}


def test_qwen3_4b_for_klein_9b(comfy):
    files.write(comfy / "models/text_encoders/qwen_3_8b.safetensors", files.qwen3(**files.QWEN3_4B))
    problem = about_files(comfy)["wrong-text-encoder"]
    assert problem.ref == "C05"
    assert "It belongs to FLUX.2 [klein] 4B" in problem.why


def test_flux1s_ae_renamed_to_flux2_vae(comfy):
    files.write(comfy / "models/vae/flux2-vae.safetensors", files.vae(channels=16, statistics=False))
    problem = about_files(comfy)["wrong-vae"]
    assert "16 latent channels" in problem.why
    assert problem.ref == "C09"
    assert problem.evidence[0].wanted == "the FLUX.2 VAE"


def test_a_text_encoder_saved_as_the_vae(comfy):
    files.write(comfy / "models/vae/flux2-vae.safetensors", files.qwen3(**files.QWEN3_4B))
    assert about_files(comfy)["wrong-vae"].ref == "C09"


def test_klein_9b_in_the_place_of_4b(store):
    files.write(store / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_9B))
    found = about_files()
    assert list(found) == ["wrong-transformer"]  # and the text encoder is not blamed
    assert found["wrong-transformer"].ref == "B16"


def test_a_vae_in_the_transformers_folder_of_a_diffusers_folder(tmp_path):
    files.write(tmp_path / TRANSFORMER, files.vae_diffusers())
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    problem = about_files(tmp_path)["wrong-transformer"]
    assert problem.why.startswith("Wanted is a transformer; this file shows 32 latent channels")


def test_the_small_decoder_saved_as_the_vae(comfy):
    files.write(comfy / "models/vae/flux2-vae.safetensors", files.vae(encoder=False, width=96))
    problem = about_files(comfy)["vae-decoder-only"]
    assert "decoder only" in problem.what
    assert problem.ref == "C11"
    assert problem.evidence[0].found == "no tensor named encoder.*"


def test_a_damaged_or_exchanged_file_that_was_hashed(store):
    Stamps().put(store / VAE, "b" * 64)
    problem = about_files()["wrong-content"]
    assert problem.what == "diffusion_pytorch_model.safetensors is not klein-4b/vae"
    assert "Wanted is sha256 ca70d2202afe…; found is bbbbbbbbbbbb…" in problem.why
    assert (problem.ref, problem.severity) == ("B16", "error")
    Stamps().put(store / VAE, PLUGINS.models["klein-4b"].part("vae").sha256)
    assert about_files() == {}


def test_either_of_the_two_files_called_flux2_vae_is_right(comfy):
    path = comfy / "models/vae/flux2-vae.safetensors"
    Stamps().put(path, PLUGINS.models["klein-4b"].part("vae-comfyui-2").sha256)
    assert about_files(comfy) == {}


# C18


def test_base_weights_where_distilled_ones_belong_by_hash(store):
    Stamps().put(store / TRANSFORMER, PLUGINS.models["klein-base-4b"].part("transformer").sha256)
    found = about_files()
    assert list(found) == ["wrong-variant"]
    problem = found["wrong-variant"]
    assert problem.what == "diffusion_pytorch_model.safetensors is the base variant, not the distilled one"
    assert "klein-base-4b/transformer, known by its sha256, so this is certain" in problem.why
    assert (problem.ref, problem.severity) == ("C18", "error")


def test_base_fp8_saved_under_the_distilled_name_by_length(comfy):
    base = PLUGINS.models["klein-base-4b"].part("transformer-fp8")
    sized(comfy / "models/diffusion_models/flux-2-klein-4b-fp8.safetensors", base.size, files.flux2(**files.KLEIN_4B))
    problem = about_files(comfy)["wrong-variant"]
    assert "known by its length of 4,089,498,488 bytes" in problem.why
    assert problem.severity == "warning"


def test_distilled_weights_that_somebody_named_base(comfy):
    part = PLUGINS.models["klein-4b"].part("transformer-fp8")
    path = comfy / "models/diffusion_models/my-klein-base.safetensors"
    sized(path, part.size, files.flux2(**files.KLEIN_4B))
    problem = about_files(comfy)["wrong-variant"]
    assert "is the distilled variant, not the base one" in problem.what
    assert problem.fix.startswith("rename")


# C13, C14


def test_comfyuis_fp8_file_in_a_diffusers_folder(tmp_path):
    shapes = {**files.flux2_diffusers(**files.KLEIN_4B), "proj_out.weight_scale": ()}
    files.write(tmp_path / TRANSFORMER, shapes, "F8_E4M3", {"_quantization_metadata": "{}"}, _scale="F32")
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    problem = about_files(tmp_path)["fp8-in-diffusers"]
    assert problem.what.endswith("is quantised (fp8) and lies where diffusers looks")
    assert "ComfyUI/models/diffusion_models" in problem.fix
    assert problem.ref == "C14"
    files.write(tmp_path / TRANSFORMER, shapes, "F8_E4M3", _scale="F32")
    problem = about_files(tmp_path)["fp8-in-diffusers"]
    assert "ComfyUI would ignore them" in problem.why
    assert "ComfyUI reads them" not in problem.why
    assert problem.fix == "kleinctl install"


def test_an_eight_bit_file_that_diffusers_reads(tmp_path):
    shapes = {**files.flux2_diffusers(**files.KLEIN_4B), "transformer_blocks.0.attn.to_q.SCB": (3072,)}
    files.write(tmp_path / TRANSFORMER, shapes, "I8", SCB="F32")
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert about_files(tmp_path) == {}


def test_a_gguf_file_in_a_diffusers_folder(tmp_path):
    (tmp_path / "transformer").mkdir()
    files.write_gguf(tmp_path / "transformer/klein.gguf", files.flux2(**files.KLEIN_4B), "flux")
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert "GGUF" in about_files(tmp_path)["fp8-in-diffusers"].what


def test_an_fp8_file_in_the_store_is_replaced(store):
    files.write(store / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_4B), "F8_E4M3")
    problem = about_files()["fp8-in-diffusers"]
    assert problem.remedy.arguments["part"] == "transformer"
    assert problem.fix == "kleinctl install --model klein-4b"


def test_a_single_file_transformer_in_a_diffusers_folder(tmp_path):
    files.write(tmp_path / TRANSFORMER, files.flux2(**files.KLEIN_4B))
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    problem = about_files(tmp_path)["single-file-config"]
    assert problem.ref == "C13"
    assert 'config="black-forest-labs/FLUX.2-klein-4B"' in problem.fix
    files.write(tmp_path / TRANSFORMER, files.flux2(**files.KLEIN_9B))
    assert 'config="black-forest-labs/FLUX.2-klein-9B"' in about_files(tmp_path)["single-file-config"].fix


def test_comfyuis_vae_in_a_diffusers_folder(tmp_path):
    files.write(tmp_path / VAE, files.vae())
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    problem = about_files(tmp_path)["single-file-config"]
    assert problem.what == "vae/diffusion_pytorch_model.safetensors has ComfyUI's layout and lies where diffusers looks"
    assert problem.fix.startswith("AutoencoderKLFlux2.from_single_file(")


# B16: a transformer of diffusers for ComfyUI, and what nobody knows


def test_diffusers_transformer_under_comfyuis_name(comfy):
    path = comfy / "models/diffusion_models/flux-2-klein-4b.safetensors"
    files.write(path, files.flux2_diffusers(**files.KLEIN_4B))
    problem = about_files(comfy)["diffusers-file-in-comfyui"]
    assert "KeyError: 'x_embedder.bias'" in problem.why
    assert (problem.ref, problem.severity) == ("B16", "error")
    assert problem.remedy.arguments["part"] == "transformer-bf16"
    (comfy / "models/diffusers").mkdir()
    path.rename(comfy / "models/diffusers/model.safetensors")  # a folder for such files
    assert about_files(comfy) == {}


def test_an_unknown_model_under_a_known_name(store, comfy):
    path = comfy / "models/diffusion_models/flux-2-klein-4b.safetensors"
    files.write(path, {"some.weight": (4096, 512)})
    problem = about_files(comfy)["wrong-content"]
    assert problem.what == "flux-2-klein-4b.safetensors is not known to be FLUX.2 [klein] 4B"
    assert "some.weight [4096, 512]" in problem.why
    assert (problem.ref, problem.severity) == ("B16", "warning")
    path.rename(path.with_name("my-own.safetensors"))
    assert about_files(comfy) == {}
    files.write(store / TRANSFORMER, {"some.weight": (4096, 512)})
    assert about_files()["wrong-content"].severity == "error"


def test_an_fp8_file_in_a_comfyui_is_where_it_belongs(comfy):
    shapes = {**files.flux2(**files.KLEIN_4B), "img_in.weight_scale": (), "img_in.comfy_quant": (10,)}
    path = comfy / "models/diffusion_models/flux-2-klein-4b-fp8.safetensors"
    files.write(path, shapes, "F8_E4M3", _scale="F32", comfy_quant="U8")
    assert "fp8-in-diffusers" not in about_files(comfy)


def test_hashes_that_nobody_knows(store):
    problem = by_name(model="klein-base-9b")["hash-known"]
    assert problem.severity == "warning"
    assert "hash-known" not in by_name(model="klein-4b")
