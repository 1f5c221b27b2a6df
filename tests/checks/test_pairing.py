"""Sets that would be loaded together: every pair gets the right verdict from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kleinctl.store import Stamps
from tests import weights as files
from tests.checks.looking import PLUGINS, by_name, problems
from tests.facts.test_hub_cache import Cache

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
KLEIN = "Flux2KleinPipeline"

TRANSFORMERS = {"klein 4B": files.KLEIN_4B, "klein 9B": files.KLEIN_9B, "dev": files.FLUX2_DEV}
ENCODERS = {
    "Qwen3 0.6B": files.qwen3(**files.QWEN3_06B),
    "Qwen3 4B": files.qwen3(**files.QWEN3_4B),
    "Qwen3 8B": files.qwen3(**files.QWEN3_8B),
    "Qwen3-VL": files.qwen3_vl(),
    "T5-XXL": files.t5(),
    "Mistral": files.mistral(),
    "CLIP-L": files.clip(768, 3072, 12),
}
VAES = {
    "FLUX.1": files.vae_diffusers(channels=16, statistics=False),
    "FLUX.2": files.vae_diffusers(),
    "decoder only": files.vae(encoder=False, width=96),
    "SDXL": files.vae_diffusers(channels=4, statistics=False),
}
FITTING = {("klein 4B", "Qwen3 4B"), ("klein 9B", "Qwen3 8B"), ("dev", "Mistral")}
VAE_NAMES = {"FLUX.1": "vae-channels", "SDXL": "vae-channels", "decoder only": "vae-decoder-only", "FLUX.2": None}


def index(folder: Path, name: str = KLEIN, **more: object) -> None:
    about = {"_class_name": name, "transformer": ["diffusers", "Flux2Transformer2DModel"], **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(about))


def folder_of(path: Path, transformer: dict, encoder: dict | None = None, vae: dict | None = None) -> Path:
    """A diffusers folder of somebody's own, headers without weights."""
    files.write(path / TRANSFORMER, transformer)
    files.write(path / ENCODER, encoder or files.qwen3(**files.QWEN3_4B))
    files.write(path / VAE, vae or files.vae_diffusers())
    index(path)
    return path


def wanted_encoder(transformer: str, encoder: str) -> str | None:
    if (transformer, encoder) in FITTING:
        return None
    if encoder == "Qwen3-VL":
        return "text-encoder-vl"
    # T5 is as wide as Qwen3 8B: nothing but its family tells that it does not fit klein 9B
    return "wrong-text-encoder" if (transformer, encoder) == ("klein 9B", "T5-XXL") else "text-encoder-width"


@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("vae", VAES)
def test_every_pair_gets_the_right_verdict(transformer, encoder, vae, tmp_path):
    shapes = files.flux2_diffusers(**TRANSFORMERS[transformer])
    folder = folder_of(tmp_path / "set", shapes, ENCODERS[encoder], VAES[vae])
    found = [each for each in problems(folder) if each.path and not each.path.endswith("model_index.json")]
    assert {each.name for each in found} == {wanted_encoder(transformer, encoder), VAE_NAMES[vae]} - {None}
    assert len(found) == len({each.path for each in found})  # no file is told of twice
    for each in found:
        assert each.evidence
        assert each.path.endswith(ENCODER if "encoder" in each.name and "vae" not in each.name else VAE)


def test_an_8b_text_encoder_beside_a_4b_transformer(tmp_path):
    folder = folder_of(tmp_path, files.flux2_diffusers(**files.KLEIN_4B), files.qwen3(**files.QWEN3_8B))
    problem = by_name(folder)["text-encoder-width"]
    assert problem.what == "text_encoder/model.safetensors does not fit transformer/diffusion_pytorch_model.safetensors"
    assert problem.why == (
        "The transformer is FLUX.2 [klein] 4B and needs Qwen3 4B (2560 wide); this file is Qwen3 8B (4096 wide). "
        "It belongs to FLUX.2 [klein] 9B. Its VAE is not concerned."
    )
    assert problem.fix.startswith("kleinctl install --model klein-4b   # a whole copy")
    assert problem.ref == "C01"


def test_a_flux1_vae_beside_klein(tmp_path):
    folder = folder_of(tmp_path, files.flux2_diffusers(**files.KLEIN_4B), vae=VAES["FLUX.1"])
    problem = by_name(folder)["vae-channels"]
    assert "reads latents of 32 channels" in problem.why
    assert "makes 16" in problem.why
    assert problem.ref == "C09"
    assert problem.remedy.arguments["part"] == "vae"


def test_a_flux2_vae_beside_flux1(tmp_path):
    folder = folder_of(tmp_path, files.flux1_diffusers(), files.t5())
    problem = by_name(folder)["vae-channels"]
    assert problem.ref == "C10"
    assert "reads latents of 16 channels" in problem.why


def test_a_dc_ae_is_as_deep_and_still_wrong(tmp_path):
    shapes = {
        "decoder.conv_in.weight": (1024, 32, 3, 3),
        "decoder.up_blocks.0.0.conv.weight": (4, 4),
        "encoder.a": (1,),
    }
    folder = folder_of(tmp_path, files.flux2_diffusers(**files.KLEIN_4B), vae=shapes)
    assert "a DC-AE autoencoder" in by_name(folder)["wrong-vae"].why


def test_a_wrong_part_of_the_store_is_told_once(empty_home):
    folder = empty_home / "kleinctl/models/klein-4b/diffusers"
    files.write(folder / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_4B))
    files.write(folder / VAE, files.vae_diffusers(channels=16, statistics=False))
    files.write(folder / "text_encoder/model-00001-of-00002.safetensors", files.qwen3(**files.QWEN3_8B))
    assert sorted(each.name for each in problems()) == ["wrong-text-encoder", "wrong-vae"]


def test_a_snapshot_with_an_exchanged_text_encoder(empty_home):
    cache = Cache(empty_home / "cache/huggingface/hub")
    cache.everything()
    assert problems() == []
    path = (cache.snapshot / "text_encoder/model-00001-of-00002.safetensors").resolve()
    files.write(path, files.qwen3(**files.QWEN3_8B))
    [problem] = problems()
    assert problem.name == "wrong-text-encoder"
    assert problem.fix.startswith("hf download black-forest-labs/FLUX.2-klein-4B text_encoder/model-00001")
    assert problem.remedy is None


# LoRAs


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    files.write(folder / "models/diffusion_models/my-klein.safetensors", files.flux2(**files.KLEIN_4B))
    return folder


def lora(path: Path, shapes: dict) -> None:
    files.write(path, files.lora(files.matrices(shapes, "single_blocks", "double_blocks")))


def test_a_9b_lora_where_only_klein_4b_is(comfy):
    lora(comfy / "models/loras/style.safetensors", files.flux2(**files.KLEIN_9B))
    problem = by_name(comfy)["lora-mismatch"]
    assert problem.what == "style.safetensors is a LoRA for FLUX.2 [klein] 9B"
    assert "lora key not loaded" in problem.why
    assert (problem.ref, problem.severity) == ("C16", "warning")


def test_a_9b_lora_beside_both_sizes(comfy):
    lora(comfy / "models/loras/style.safetensors", files.flux2(**files.KLEIN_9B))
    files.write(comfy / "models/diffusion_models/large.safetensors", files.flux2(**files.KLEIN_9B))
    assert problems(comfy) == []


def test_flux1_loras_where_no_flux1_is_are_one_warning(comfy):
    for number in range(5):
        lora(comfy / f"models/loras/{number}.safetensors", files.flux1())
    problem = by_name(comfy)["lora-flux1"]
    assert problem.what == "0.safetensors, 1.safetensors, 2.safetensors and 2 more are LoRAs for FLUX.1"
    assert "spoil the picture" in problem.why
    assert problem.ref == "C17"
    files.write(comfy / "models/checkpoints/flux1.safetensors", files.flux1())
    assert problems(comfy) == []


def test_a_hundred_sdxl_loras_are_nobodys_business(comfy):
    for number in range(100):
        shapes = {
            f"lora_unet_down_blocks_1_attentions_0.{end}.weight": shape
            for end, shape in (("lora_down", (8, 640)), ("lora_up", (640, 8)))
        }
        files.write(comfy / f"models/loras/{number}.safetensors", shapes)
    lora(comfy / "models/loras/right.safetensors", files.flux2(**files.KLEIN_4B))
    assert problems(comfy) == []


def test_loras_without_any_klein(tmp_path):
    lora(tmp_path / "ComfyUI/models/loras/style.safetensors", files.flux2(**files.KLEIN_9B))
    (tmp_path / "ComfyUI/models/diffusion_models").mkdir()
    assert problems(tmp_path / "ComfyUI") == []


@pytest.mark.parametrize(
    ("shapes", "name"),
    [(files.flux2(**files.KLEIN_9B), "lora-mismatch"), (files.flux1(), "lora-flux1")],
)
def test_a_lora_in_the_folder_it_would_be_loaded_with(shapes, name, tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.KLEIN_4B))
    lora(folder / "pytorch_lora_weights.safetensors", shapes)
    assert by_name(folder)[name].severity == "error"


def test_a_lora_of_the_right_size(tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.KLEIN_4B))
    lora(folder / "pytorch_lora_weights.safetensors", files.flux2(**files.KLEIN_4B))
    assert problems(folder) == []


def test_the_small_decoder_as_the_only_vae(comfy):
    files.write(comfy / "models/vae/small_decoder.safetensors", files.vae(encoder=False, width=96))
    assert "is the only FLUX.2 VAE of ComfyUI" in by_name(comfy)["vae-decoder-only"].what
    files.write(comfy / "models/vae/whole.safetensors", files.vae())
    assert problems(comfy) == []


# Folders of diffusers


@pytest.mark.parametrize("name", ["Flux2Pipeline", "FluxPipeline"])
def test_klein_under_another_pipeline(name, tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.KLEIN_4B))
    index(folder, name, text_encoder=["transformers", "Qwen3ForCausalLM"])
    problem = by_name(folder)["wrong-pipeline-class"]
    assert problem.what == f"set asks for {name}, and klein is in it"
    assert '"_class_name": "Flux2KleinPipeline"' in problem.fix
    assert problem.ref == "C15"


def test_dev_under_its_own_pipeline(tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.FLUX2_DEV), files.mistral())
    index(folder, "Flux2Pipeline")
    assert problems(folder) == []


def test_a_folder_that_lacks_its_text_encoder(tmp_path):
    files.write(tmp_path / TRANSFORMER, files.flux2_diffusers(**files.KLEIN_4B))
    index(tmp_path, text_encoder=["transformers", "Qwen3ForCausalLM"])
    problem = by_name(tmp_path)["part-missing"]
    assert problem.what.endswith("lacks text_encoder")
    assert problem.ref == "C24"


def test_base_weights_in_a_folder_marked_as_distilled(tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.KLEIN_4B))
    index(folder, is_distilled=True)
    Stamps().put(folder / TRANSFORMER, PLUGINS.models["klein-base-4b"].part("transformer").sha256)
    problem = by_name(folder)["wrong-variant"]
    assert problem.what == "set has base weights and is marked as distilled"
    assert '"is_distilled": false' in problem.fix
    index(folder)
    assert problems(folder) == []


def test_a_folder_named_for_the_other_variant(tmp_path):
    folder = folder_of(tmp_path / "FLUX.2-klein-base-4B", files.flux2_diffusers(**files.KLEIN_4B))
    assert problems(folder) == []
    index(folder, is_distilled=True)
    problem = by_name(folder)["wrong-variant"]
    assert "the folder's name, which may err, says the base variant" in problem.why
    assert problem.severity == "warning"
    folder = folder_of(tmp_path / "FLUX.2-klein-4B", files.flux2_diffusers(**files.KLEIN_4B))
    assert '"is_distilled": true' in by_name(folder)["wrong-variant"].fix


def test_flux1_or_the_unknown_under_kleins_pipeline(tmp_path):
    folder = folder_of(tmp_path / "set", files.flux1_diffusers())
    problem = by_name(folder)["wrong-transformer"]
    assert problem.what == "transformer/diffusion_pytorch_model.safetensors is not a transformer of klein"
    files.write(folder / TRANSFORMER, {"some.weight": (4096, 512)})
    problem = by_name(folder)["wrong-content"]
    assert "some.weight [4096, 512]" in problem.why
    assert problem.severity == "warning"
    index(folder, "SomeOtherPipeline", transformer=["diffusers", "Other"])
    assert problems(folder) == []


def test_the_kv_variant(tmp_path):
    folder = folder_of(tmp_path / "set", files.flux2_diffusers(**files.KLEIN_9B), files.qwen3(**files.QWEN3_8B))
    index(folder, "Flux2KleinKVPipeline")
    assert by_name(folder)["kv-variant"].ref == "C25"
