"""Which weights files are found, where they lie, and what is said of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from kleinctl import documents
from kleinctl.facts import comfyui, weights
from kleinctl.facts.weights import FoundFile
from kleinctl.store import Stamps
from tests import weights as files
from tests.checks.looking import PLUGINS
from tests.conftest import REPOSITORY

LONG = "text_encoders/qwen_3_4b.safetensors"


@pytest.fixture
def store(empty_home: Path) -> Path:
    return empty_home / "kleinctl" / "models" / "klein-4b" / "diffusers"


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A ComfyUI with klein's fp8 transformer in it."""
    folder = tmp_path / "ComfyUI"
    files.write(folder / "models/diffusion_models/flux-2-klein-4b-fp8.safetensors", files.flux2(**files.KLEIN_4B))
    return folder


def gather(*folders: Path, **more) -> list[FoundFile]:
    found = [comfyui.read(folder) for folder in folders]
    others = [folder for folder, each in zip(folders, found, strict=True) if each is None]
    return list(weights.gather(PLUGINS, [each for each in found if each], others, **more))


def test_nothing_on_this_machine():
    assert gather() == []


def test_a_file_of_the_store_has_what_its_place_wants(store):
    files.write(store / "vae/diffusion_pytorch_model.safetensors", files.vae_diffusers())
    [found] = gather()
    assert (found.place, found.folder, found.model, found.part) == ("store", "vae", "klein-4b", "vae")
    assert (found.role, found.family, found.size_bytes) == ("vae", "flux2-vae", 168120878)
    assert found.wanted_sha256 == ("ca70d2202afe6415bdbcb8793ba8cd99fd159cfe6192381504d6c4d3036e0f04",)
    assert found.set_name == "store/klein-4b/diffusers"


def test_a_file_of_another_kind_belongs_to_no_set(store):
    files.write(store / "vae/diffusion_pytorch_model.safetensors", files.vae_diffusers(channels=16, statistics=False))
    assert gather()[0].set_name == ""


def test_every_folder_of_a_comfyui_and_each_file_once(comfy):
    files.write(comfy / "models" / LONG, files.qwen3(**files.QWEN3_4B))
    files.write(
        comfy / "models/loras/people/mine.safetensors",
        files.lora(files.matrices(files.flux2(**files.KLEIN_4B), "single_blocks")),
    )
    files.write(comfy / "models/checkpoints/sdxl/some.safetensors", {"input_blocks.0.0.weight": (320, 4, 3, 3)})
    (comfy / "models/loras/people/notes.txt").write_text("mine")
    found = {each.path.name: each for each in gather(comfy)}
    assert len(found) == 4 == len(gather(comfy))
    assert found["qwen_3_4b.safetensors"].part == "text-encoder-comfyui"
    assert found["mine.safetensors"].folder == "loras"
    assert (found["mine.safetensors"].role, found["mine.safetensors"].family) == ("", "")
    assert found["some.safetensors"].folder == "checkpoints"


def test_a_name_promises_as_much_in_a_subfolder(comfy):
    files.write(comfy / "models/vae/flux/flux2-vae.safetensors", files.vae())
    assert [each.part for each in gather(comfy) if each.folder == "vae"] == ["vae-comfyui"]


def test_all_precisions_have_places(comfy):
    folder = comfy / "models/diffusion_models"
    files.write(folder / "flux-2-klein-base-4b.safetensors", files.flux2(**files.KLEIN_4B))
    found = {each.part: each for each in gather(comfy)}
    assert found["transformer-bf16"].model == "klein-base-4b"
    assert found["transformer-bf16"].wanted_variant == "base"
    assert found["transformer-fp8"].wanted_variant == "distilled"


def test_a_shared_text_encoder_belongs_to_the_model_that_is_here(tmp_path):
    folder = tmp_path / "ComfyUI"
    files.write(folder / "models/diffusion_models/flux-2-klein-base-4b-fp8.safetensors", files.flux2(**files.KLEIN_4B))
    files.write(folder / "models" / LONG, files.qwen3(**files.QWEN3_4B))
    assert {each.model for each in gather(folder)} == {"klein-base-4b"}
    assert {each.set_name for each in gather(folder)} == {"ComfyUI/klein-base-4b"}


@pytest.mark.skipif(os.name == "nt", reason="making links wants a privilege there")
def test_links_are_followed_and_loops_are_not(comfy, tmp_path):
    disk = tmp_path / "disk"
    files.write(disk / "big.safetensors", files.vae())
    (comfy / "models/vae").mkdir()
    (comfy / "models/vae/elsewhere").symlink_to(disk)
    (disk / "back").symlink_to(comfy / "models/vae")
    (comfy / "models/vae/gone.safetensors").symlink_to(tmp_path / "nowhere")
    names = sorted(each.path.name for each in gather(comfy) if each.folder == "vae")
    assert names == ["big.safetensors", "gone.safetensors"]


def test_a_diffusers_folder_says_the_role_and_no_more(tmp_path):
    folder = tmp_path / "my-klein"
    files.write(folder / "transformer/model.safetensors", files.flux2_diffusers(**files.KLEIN_4B))
    files.write(folder / "vae/model.safetensors", files.vae_diffusers())
    files.write(
        folder / "pytorch_lora_weights.safetensors",
        files.lora(files.matrices(files.flux2(**files.KLEIN_9B), "single_blocks")),
    )
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    found = {each.role: each for each in gather(folder)}
    assert set(found) == {"transformer", "vae", "lora"}
    assert {each.set_name for each in found.values()} == {"folder/my-klein"}
    assert found["transformer"].place == "diffusers-folder"
    assert found["transformer"].family == ""


def test_a_folder_of_downloads(tmp_path):
    files.write(tmp_path / "some/thing.safetensors", files.vae())
    [found] = gather(tmp_path)
    assert (found.place, found.folder, found.set_name) == ("folder", "some", "")


def test_what_was_hashed_before_is_known_by_its_content(store, empty_home):
    path = files.write(
        store / "transformer/diffusion_pytorch_model.safetensors", files.flux2_diffusers(**files.KLEIN_4B)
    )
    base = PLUGINS.models["klein-base-4b"].part("transformer")
    Stamps().put(path, base.sha256)
    [found] = gather()
    assert (found.sha256, found.content, found.content_by) == (base.sha256, "klein-base-4b/transformer", "sha256")
    assert (found.variant, found.wanted_variant) == ("base", "distilled")


def test_deep_hashes_what_could_be_a_part_and_tells_of_it(tmp_path):
    model = PLUGINS.models["klein-tiny"]
    part = next(each for each in model.parts if each.role == "vae")
    source = Path(__file__).parents[2] / "manifests" / part.sources[0].path
    copy = tmp_path / "vae-of-mine.safetensors"
    copy.write_bytes(source.read_bytes())
    files.write(tmp_path / "other.safetensors", files.clip(768, 3072, 1))
    told = []
    found = {each.path.name: each for each in gather(tmp_path, deep=True, progress=lambda *at: told.append(at))}
    assert found[copy.name].content == "klein-tiny/" + part.id
    assert found[copy.name].content_by == "sha256"
    assert found["other.safetensors"].sha256 is None
    assert told[-1] == (copy, part.size, part.size)


def test_a_pointer_names_the_part_it_stands_for(tmp_path):
    vae = PLUGINS.models["klein-4b"].part("vae")
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{vae.sha256}\nsize {vae.size}\n"
    (tmp_path / "some.safetensors").write_text(text)
    [found] = gather(tmp_path)
    assert (found.content, found.content_by) == ("klein-4b/vae", "pointer")


def test_repacked_weights_are_known_by_their_fingerprint_and_others_of_that_length_are_not(tmp_path):
    part = PLUGINS.models["klein-tiny"].part("transformer")
    own = REPOSITORY / "manifests/klein-tiny/transformer/diffusion_pytorch_model.safetensors"
    raw = bytearray(own.read_bytes())
    (tmp_path / "mine.safetensors").write_bytes(raw)
    [found] = gather(tmp_path)
    assert (found.content, found.content_by, found.variant) == (part.ref, "fingerprint", "distilled")
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = bytes(byte ^ 1 for byte in raw[start:])
    (tmp_path / "mine.safetensors").write_bytes(raw)
    [found] = gather(tmp_path)
    assert found.identity.size_bytes == part.size
    assert (found.content, found.variant) == ("", "")


def sized(path: Path, size: int, shapes: dict) -> Path:
    """An fp8 file of exactly `size` bytes: one more tensor fills what the others leave."""
    filler = 1
    for _ in range(4):
        front = files.header({**shapes, "filler": (filler,)}, "F8_E4M3")
        filler = size - len(front) - json.loads(front[8:])["filler"]["data_offsets"][0]
    return files.write(path, {**shapes, "filler": (filler,)}, "F8_E4M3")


def test_the_same_bytes_in_two_places_are_noticed(comfy, tmp_path):
    part = PLUGINS.models["klein-4b"].part("transformer-fp8")
    one = comfy / "models/diffusion_models" / part.name
    sized(one, part.size, files.flux2(**files.KLEIN_4B))
    assert one.stat().st_size == part.size
    two = tmp_path / "downloads" / "renamed.safetensors"
    sized(two, part.size, files.flux2(**files.KLEIN_4B))
    found = {each.path: each.copy_of for each in gather(comfy, two.parent)}
    assert found == {one: "", two: str(one)}
    two.unlink()
    os.link(one, two)
    assert not any(each.copy_of for each in gather(comfy, two.parent))


def test_what_a_diffusers_folder_lacks(tmp_path):
    folder = tmp_path / "half"
    files.write(folder / "transformer/diffusion_pytorch_model.safetensors", files.flux2_diffusers(**files.KLEIN_4B))
    (folder / "text_encoder").mkdir()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    files.write(folder / "text_encoder/model-00001-of-00002.safetensors", files.qwen3(**files.QWEN3_4B))
    part = folder / ".cache/huggingface/download/text_encoder"
    part.mkdir(parents=True)
    (part / "abc.incomplete").write_bytes(b"x" * 10)
    about = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": True,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(about))
    [found] = weights.diffusers_folders([folder, tmp_path], gather(folder))
    assert found.class_name == "Flux2KleinPipeline"
    assert found.is_distilled
    assert found.transformer == "flux2-klein-4b"
    assert found.missing == ("text_encoder/model-00002-of-00002.safetensors", "vae")
    assert found.unfinished == ("text_encoder/abc.incomplete",)
    assert found.unfinished_bytes == 10
    assert "safety_checker" not in found.components
    assert documents.read(weights.DiffusersFolder, documents.plain(found), "folder") == found


def test_two_hundred_files_are_found_in_a_moment(tmp_path):
    models = tmp_path / "ComfyUI" / "models"
    for number in range(200):
        files.write(models / "loras" / f"{number // 20}" / f"{number}.safetensors", {"a.weight": (8, 8)})
    start = time.perf_counter()
    assert len(gather(tmp_path / "ComfyUI")) == 200
    assert time.perf_counter() - start < 1
