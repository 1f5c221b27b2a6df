"""What doctor says of workflows with a slip in them; prompts that ran say nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kleinctl import documents
from kleinctl.checks import Check, run_checks
from kleinctl.checks import workflow as workflow_checks
from kleinctl.facts import comfyui, workflow
from kleinctl.facts.weights import FoundFile
from kleinctl.problem import Problem, shell
from tests import weights
from tests.checks.test_comfyui import gathered, version
from tests.facts.test_comfyui import checkout, write
from tests.facts.test_workflow import RECORDED, node, page, save

OWN = [each for each in vars(workflow_checks).values() if isinstance(each, Check)]
TRANSFORMER, ENCODER, VAE = "tiny-klein-4b.safetensors", "tiny-qwen3-4b.safetensors", "tiny-flux2-vae.safetensors"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A ComfyUI with the files that the recorded prompts name, in klein 4B's real shapes."""
    folder = checkout(tmp_path / "ComfyUI", "0.29.0")
    models = folder / "models"
    weights.write(models / "diffusion_models" / TRANSFORMER, weights.flux2(**weights.KLEIN_4B))
    weights.write(models / "text_encoders" / ENCODER, weights.qwen3(**weights.QWEN3_4B))
    weights.write(models / "vae" / VAE, weights.vae())
    return folder


@pytest.fixture
def judge(root: Path) -> Callable[..., list[Problem]]:
    """The problems of a workflow file with that ComfyUI, after the facts went through a report."""

    def problems(path: Path, with_comfyui: bool = True, files: tuple[FoundFile, ...] | None = None) -> list[Problem]:
        found = documents.read(workflow.Workflow, documents.plain(workflow.read(path)), "workflow")
        read = comfyui.read(root) if with_comfyui else None
        if read is not None:
            read = documents.read(comfyui.ComfyUI, documents.plain(comfyui.provided(read, _types(found))), "comfyui")
        own = gathered(read) if read and files is None else files or ()
        scene = {"workflow": found, "workflow_comfyui": read, "workflow_files": own}
        results = run_checks(OWN, {}, [scene])
        assert not [each.why for each in results if "crashed" in each.why]
        return [problem for each in results for problem in each.problems]

    return problems


def _types(found: workflow.Workflow) -> list[str]:
    return [each.type for each in found.nodes]


@pytest.fixture
def ask(judge, tmp_path: Path) -> Callable[..., dict[str, Problem]]:
    """The problems by name of a recorded prompt that was changed."""

    def problems(change: Change = lambda graph: None, prompt: str = "t2i_distilled", **more: Any) -> dict[str, Problem]:
        graph = json.loads((RECORDED / f"prompt_{prompt}.json").read_text())
        change(graph)
        return {each.name: each for each in judge(save(tmp_path / "mine.json", graph), **more)}

    return problems


def graph_of(prompt: str) -> dict[str, Any]:
    """A recorded prompt."""
    return json.loads((RECORDED / f"prompt_{prompt}.json").read_text())


def key_of(graph: dict[str, Any], kind: str) -> str:
    """The first node of a type."""
    return next(key for key, each in graph.items() if each["class_type"] == kind)


def put(key: str, name: str, value: Any) -> Change:
    """Set an input of a node; `class_type` is its type."""

    def change(graph: dict[str, Any]) -> None:
        (graph[key] if name == "class_type" else graph[key]["inputs"])[name] = value

    return change


def rename(root: Path, kind: str, old: str, new: str) -> None:
    target = root / "models" / kind / new
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / "models" / kind / old).rename(target)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_prompts_that_ran_are_no_problem(path, judge, root, tmp_path):
    graph = json.loads(path.read_text())
    if "base" in path.stem:  # the recorded file has no variant in its name
        rename(root, "diffusion_models", TRANSFORMER, "tiny-klein-base-4b.safetensors")
        put("1", "unet_name", "tiny-klein-base-4b.safetensors")(graph)
    assert judge(save(tmp_path / path.name, graph)) == []
    assert judge(save(tmp_path / path.name, graph), with_comfyui=False) == []


def test_a_file_that_is_no_workflow(judge, tmp_path):
    (problem,) = judge(save(tmp_path / "a.json", {"a": 1}))
    assert problem.name == "workflow-unreadable"
    assert problem.what == "a.json is no workflow that can be read"
    assert problem.why.endswith("; it has neither nodes nor class_type: no workflow of ComfyUI.")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_where_a_workflow_belongs_keeps_nobody_waiting(judge, tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (problem,) = judge(tmp_path / "a.json")
    assert problem.name == "workflow-unreadable" and "a pipe or a device" in problem.why


def test_what_the_page_saves_is_not_what_the_server_takes(judge, tmp_path):
    (problem,) = judge(save(tmp_path / "a.json", page(node(1, "UNETLoader", [TRANSFORMER, "default"]))))
    assert (problem.name, problem.ref, problem.severity) == ("workflow-not-api", "E02", "warning")
    assert problem.fix == "in ComfyUI: Workflow > Export (API); doctor reads both forms"


def test_a_core_node_that_is_newer_than_the_comfyui(ask, root):
    version(root, "0.3.64")
    problem = ask()["node-missing"]
    assert problem.what.startswith("ComfyUI has no node ")
    assert problem.why == "It is one of ComfyUI's own since 0.3.72, no custom node; this is 0.3.64."
    assert problem.fix.startswith("git -C ")


def test_the_page_says_how_new_a_core_node_is(judge, root, tmp_path):
    found = {**node(1, "BrandNewNode"), "properties": {"cnr_id": "comfy-core", "ver": "0.31.0"}}
    problems = {each.name: each for each in judge(save(tmp_path / "a.json", page(found)))}
    problem = problems["node-missing"]
    assert (problem.what, problem.severity) == ("ComfyUI may lack node BrandNewNode", "warning")
    assert "and the workflow is from 0.31.0, no custom node; this is 0.29.0" in problem.why
    version(root, "0.31.0")
    assert [each.name for each in judge(save(tmp_path / "a.json", page(found)))] == ["workflow-not-api"]


def test_a_custom_node_that_is_not_installed(ask, root):
    change = put("12", "class_type", "Somebodys Decode")
    problem = ask(change)["node-missing"]
    assert problem.what == "ComfyUI has no node Somebodys Decode"
    assert problem.ref == "E01"
    write(root / "custom_nodes" / "mine" / "nodes.py", 'NODE_CLASS_MAPPINGS = {"Somebodys Decode": Decode}')
    assert "node-missing" not in ask(change)
    (root / "custom_nodes" / "mine").rename(root / "custom_nodes" / "mine.disabled")
    assert "node-missing" in ask(change)
    assert ask(change)["node-missing"].remedy is None  # nobody knows where a stranger's node is to be had


def test_a_node_of_a_pack_that_is_known(ask):
    problem = ask(put("1", "class_type", "UnetLoaderGGUF"))["node-missing"]
    assert problem.why == "It is no node of ComfyUI's own, and ComfyUI-GGUF is not installed."
    assert problem.fix.startswith("git clone https://github.com/city96/ComfyUI-GGUF ")
    assert problem.remedy.action == "install-node"


def test_a_muted_node_does_not_count(judge, tmp_path):
    path = save(tmp_path / "a.json", page(node(1, "Somebodys Node", mode=2), node(2, "Other Node", mode=4)))
    assert [each.name for each in judge(path)] == ["workflow-not-api"]


@pytest.mark.parametrize(
    "typed", ["flux2\\tiny-klein-4b.safetensors", "TINY-klein-4b.safetensors", "tiny-klein-4b.safetensors"]
)
def test_a_file_under_another_spelling(typed, ask, root, tmp_path):
    rename(root, "diffusion_models", TRANSFORMER, f"flux2/{TRANSFORMER}")
    problem = ask(put("1", "unet_name", typed))["value-not-in-list"]
    assert problem.what == f"ComfyUI has no diffusion_models file {typed}"
    assert problem.why.startswith(f"ComfyUI lists it as flux2/{TRANSFORMER}:")
    assert (problem.remedy.action, problem.remedy.consent) == ("edit-workflow", "auto")
    arguments = dict(problem.remedy.arguments)
    assert arguments == {
        "path": str(tmp_path / "mine.json"), "node": "1", "input": "unet_name", "value": f"flux2/{TRANSFORMER}",
    }  # fmt: skip
    path = Path(arguments.pop("path"))
    path.write_text(workflow.edit(path, arguments["node"], arguments["input"], arguments["value"]))
    assert json.loads(path.read_text())["1"]["inputs"]["unet_name"] == f"flux2/{TRANSFORMER}"


def test_a_file_that_is_not_there_names_the_nearest(ask):
    problem = ask(put("3", "vae_name", "flux2-vae.safetensors"))["value-not-in-list"]
    assert problem.why == f"VAELoader lists 1 of vae; the nearest is {VAE}."
    assert problem.remedy is None
    assert problem.ref == "E03"


def test_a_file_in_another_loaders_folder(ask, root):
    (root / "models" / "vae" / VAE).rename(root / "models" / "checkpoints" / VAE)
    assert "It lies in checkpoints; VAELoader lists vae alone." in ask()["value-not-in-list"].why


def test_a_bare_transformer_named_as_a_checkpoint_is_not_sent_there(ask, root):
    def change(graph: dict[str, Any]) -> None:
        put("1", "class_type", "CheckpointLoaderSimple")(graph)
        graph["1"]["inputs"] = {"ckpt_name": TRANSFORMER}

    problem = ask(change)["value-not-in-list"]
    assert problem.why == "It lies in diffusion_models; CheckpointLoaderSimple lists checkpoints alone."
    assert problem.fix == "load it with UNETLoader in the place of node 1"


def test_flux_as_the_type_of_the_text_encoder_is_told_without_an_error_that_may_not_come(ask):
    problem = ask(put("2", "type", "flux"))["text-encoder-not-stacked"]
    assert "mat1" not in problem.why and "CLIPLoader does not offer" in problem.why


def test_without_a_comfyui_no_file_is_missed(ask):
    assert ask(put("3", "vae_name", "elsewhere.safetensors"), with_comfyui=False) == {}


def test_a_gguf_in_the_core_loader(ask, root):
    gguf = root / "models" / "diffusion_models" / "klein-4b.gguf"
    weights.write_gguf(gguf, weights.flux2(**weights.KLEIN_4B), "flux")
    problem = ask(put("1", "unet_name", "klein-4b.gguf"))["gguf-needs-node"]
    assert problem.what == "UNETLoader cannot load klein-4b.gguf"
    assert "UnetLoaderGGUF of ComfyUI-GGUF loads them" in problem.why


def test_the_9b_text_encoder_with_the_4b_transformer(ask, root):
    weights.write(root / "models" / "text_encoders" / ENCODER, weights.qwen3(**weights.QWEN3_8B))
    problem = ask()["text-encoder-width"]
    assert problem.what == f"{ENCODER} does not fit {TRANSFORMER}"
    assert "Qwen3 4B (2560 wide)" in problem.why and "Qwen3 8B (4096 wide)" in problem.why


def test_qwen3_vl_as_the_text_encoder(ask, root):
    weights.write(root / "models" / "text_encoders" / ENCODER, weights.qwen3_vl())
    assert "text-encoder-vl" in ask()


def test_the_flux1_vae_with_klein(ask, root):
    weights.write(root / "models" / "vae" / VAE, weights.vae(channels=16, statistics=False))
    problem = ask()["vae-channels"]
    assert problem.what == f"{VAE} does not fit {TRANSFORMER}"
    assert problem.ref == "C09"
    assert "vae-channels" in ask(prompt="edit_distilled")


def test_the_right_vae_is_chosen_where_it_is_there_and_the_wrong_one_left_alone(ask, root):
    weights.write(root / "models" / "vae" / "ae.safetensors", weights.vae(channels=16, statistics=False))
    loader = key_of(graph_of("t2i_distilled"), "VAELoader")
    problem = ask(put(loader, "vae_name", "ae.safetensors"))["vae-channels"]
    assert problem.fix.startswith("kleinctl doctor --fix --workflow ")
    assert problem.remedy is not None and problem.remedy.action == "edit-workflow"
    assert dict(problem.remedy.arguments)["value"] == VAE
    assert problem.remedy.consent == "auto"


def test_a_wrong_file_without_a_right_one_beside_it_is_never_replaced(ask, root):
    weights.write(root / "models" / "text_encoders" / ENCODER, weights.qwen3(**weights.QWEN3_8B))
    problem = ask()["text-encoder-width"]
    assert problem.remedy is None
    assert problem.fix.startswith(f"kleinctl install --model klein-4b --comfyui {shell(root)}   # then choose")


def test_a_decoder_alone_where_a_picture_is_encoded(ask, root):
    weights.write(root / "models" / "vae" / VAE, weights.vae(encoder=False))
    assert ask() == {}
    assert ask(prompt="edit_distilled")["vae-decoder-only"].severity == "error"


@pytest.mark.parametrize(
    ("kind", "name", "shapes", "found"),
    [
        ("diffusion_models", TRANSFORMER, weights.vae(), "wrong-transformer"),
        ("text_encoders", ENCODER, weights.vae(), "wrong-text-encoder"),
        ("vae", VAE, weights.qwen3(**weights.QWEN3_4B), "wrong-vae"),
    ],
)
def test_a_file_of_another_kind_behind_a_right_name(kind, name, shapes, found, ask, root):
    weights.write(root / "models" / kind / name, shapes)
    problem = ask()[found]
    assert f"is given {name}, which is a" in problem.what
    assert problem.path.endswith(name)


def test_flux1_under_kleins_name(ask, root):
    weights.write(root / "models" / "diffusion_models" / TRANSFORMER, weights.flux1())
    assert ask()["wrong-transformer"].what == f"{TRANSFORMER} is not FLUX.2 [klein]"


def test_a_bare_transformer_as_a_checkpoint(ask, root):
    rename(root, "diffusion_models", TRANSFORMER, f"../checkpoints/{TRANSFORMER}")

    def change(graph):
        graph["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": TRANSFORMER}}

    problem = ask(change)["transformer-in-checkpoints"]
    assert problem.what == f"CheckpointLoaderSimple is given {TRANSFORMER}, which is a transformer"
    assert problem.fix == "load it with UNETLoader in the place of node 1, from diffusion_models"


@pytest.mark.parametrize(
    ("shapes", "name"),
    [(weights.flux1(), "lora-flux1"), (weights.flux2(**weights.KLEIN_9B), "lora-mismatch")],
)
def test_a_lora_for_another_model(shapes, name, ask, root):
    layers = weights.matrices(shapes, "linear1", "linear2", "qkv")
    weights.write(root / "models" / "loras" / "style.safetensors", weights.lora(layers))

    def change(graph):
        graph["20"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 1.0},
        }
        graph["6"]["inputs"]["model"] = ["20", 0]

    assert "style.safetensors is a LoRA for" in ask(change)[name].what
    right = weights.matrices(weights.flux2(**weights.KLEIN_4B), "linear1", "linear2", "qkv")
    weights.write(root / "models" / "loras" / "style.safetensors", weights.lora(right))
    assert ask(change) == {}


@pytest.mark.parametrize("kind", ["qwen_image", "stable_diffusion", "flux"])
def test_the_wrong_type_in_the_text_encoders_loader(kind, ask, tmp_path):
    problem = ask(put("2", "type", kind))["text-encoder-not-stacked"]
    assert problem.what == f"CLIPLoader loads {ENCODER} as {kind}"
    assert problem.ref == "C03"
    assert problem.remedy.arguments["value"] == "flux2"
    assert problem.fix == shell("kleinctl", "doctor", "--fix", "--workflow", tmp_path / "mine.json")


def test_flux1s_two_text_encoders_and_its_text_node(ask, root):
    def change(graph):
        names = {"clip_name1": ENCODER, "clip_name2": ENCODER, "type": "flux", "device": "default"}
        graph["2"] = {"class_type": "DualCLIPLoader", "inputs": names}

    assert ask(change)["wrong-text-encoder"].what == "DualCLIPLoader is FLUX.1's node"

    def text(graph):
        inputs = {"clip": ["2", 0], "clip_l": "a cube", "t5xxl": "a cube", "guidance": 3.5}
        graph["4"] = {"class_type": "CLIPTextEncodeFlux", "inputs": inputs}

    problem = ask(text)["wrong-text-encoder"]
    assert (problem.ref, problem.fix) == ("C04", "replace node 4 with CLIPTextEncode")


def test_flux_guidance_on_klein(ask):
    def change(graph):
        graph["20"] = {"class_type": "FluxGuidance", "inputs": {"conditioning": ["4", 0], "guidance": 3.5}}
        graph["6"]["inputs"]["positive"] = ["20", 0]

    problem = ask(change)["flux-guidance-unused"]
    assert problem.what == "FluxGuidance does nothing with klein"
    assert problem.severity == "warning"


@pytest.mark.parametrize(
    ("kind", "channels"), [("EmptyLatentImage", "4 at an eighth"), ("EmptySD3LatentImage", "16 at")]
)
def test_another_models_empty_latent(kind, channels, ask):
    problem = ask(put("10", "class_type", kind))["wrong-empty-latent"]
    assert problem.what == f"{kind} is not klein's empty latent"
    assert f"it makes {channels}" in problem.why
    arguments = problem.remedy.arguments
    assert (arguments["node"], arguments["input"], arguments["value"]) == ("10", "class_type", "EmptyFlux2LatentImage")


def test_guidance_on_the_distilled_model(ask, judge, root, tmp_path):
    problem = ask(put("6", "cfg", 3.5))["guidance-on-distilled"]
    assert problem.what == f"{TRANSFORMER} is run with cfg 3.5"
    assert problem.why.startswith("By its name it is distilled: wanted is cfg 1.")
    assert problem.severity == "warning"  # a name proves little


def test_guidance_is_set_in_the_node_that_has_it(ask, root, tmp_path):
    rename(root, "diffusion_models", TRANSFORMER, "flux-2-klein-4b.safetensors")

    def change(graph: dict[str, Any]) -> None:
        put(key_of(graph, "UNETLoader"), "unet_name", "flux-2-klein-4b.safetensors")(graph)
        put(key_of(graph, "CFGGuider"), "cfg", 5)(graph)

    remedy = ask(change)["guidance-on-distilled"].remedy
    assert remedy is not None and remedy.consent == "ask"
    told = dict(remedy.arguments)
    workflow_now = json.loads(workflow.edit(Path(told["path"]), told["node"], told["input"], told["value"]))
    assert workflow_now[told["node"]]["inputs"]["cfg"] == 1


def test_what_is_known_by_its_content_is_an_error(ask, root):
    read = comfyui.read(root)
    files = tuple(replace(each, variant="base", content_by="sha256") for each in gathered(read))
    problem = ask(files=files)["steps-on-base"]
    assert problem.what == f"{TRANSFORMER} is run with 4 steps and cfg 1"
    assert problem.why.startswith("By its sha256 it is the base model:")
    assert problem.severity == "error"


def test_the_base_model_with_the_distilled_ones_steps(ask, root):
    rename(root, "diffusion_models", TRANSFORMER, "klein-base-4b.safetensors")
    change = put("1", "unet_name", "klein-base-4b.safetensors")
    assert ask(change)["steps-on-base"].what == "klein-base-4b.safetensors is run with 4 steps and cfg 1"
    assert "steps-on-base" in ask(change, prompt="t2i_basicguider")


def test_the_kv_variant_and_its_cache(ask, root):
    name = "flux-2-klein-9b-kv.safetensors"
    weights.write(root / "models" / "diffusion_models" / name, weights.flux2(**weights.KLEIN_9B))
    weights.write(root / "models" / "text_encoders" / ENCODER, weights.qwen3(**weights.QWEN3_8B))

    def cached(graph):
        graph["20"] = {"class_type": "FluxKVCache", "inputs": {"model": ["1", 0]}}
        graph["6"]["inputs"]["model"] = ["20", 0]

    def both(graph):
        put("1", "unet_name", name)(graph)
        cached(graph)

    assert ask(put("1", "unet_name", name))["kv-variant"].what == f"{name} is run without its cache"
    assert ask(both) == {}
    weights.write(root / "models" / "text_encoders" / ENCODER, weights.qwen3(**weights.QWEN3_4B))
    assert ask(cached)["kv-variant"].what == f"{TRANSFORMER} is run with FluxKVCache"


def test_a_size_that_is_no_multiple_of_16(ask):
    problem = ask(put("10", "width", 1000))["size-rounded"]
    assert problem.what == "the width of 1000 is no multiple of 16"
    assert problem.why == "The picture would come out 992 instead, without a word."
    assert problem.remedy.arguments["value"] == "992"


def test_small_tiles(ask):
    def change(graph):
        tiles = {"tile_size": 256, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
        graph["12"] = {"class_type": "VAEDecodeTiled", "inputs": {**graph["12"]["inputs"], **tiles}}

    problem = ask(change)["tile-seams"]
    assert problem.why.startswith("Tiles of 256 with an overlap of 32 show as seams")
    assert "tile-seams" not in ask(
        lambda graph: (change(graph), put("12", "tile_size", 512)(graph), put("12", "overlap", 64)(graph))
    )


def test_weights_in_the_prompt(ask):
    problem = ask(put("4", "text", "a (red:1.3) cube"))["prompt-weights"]
    assert problem.fix == "write it in words in node 4"
    assert ask(put("4", "text", "at (16:9), a red cube")) == {}


def test_a_negative_prompt_at_cfg_1(ask, root):
    def change(graph):
        graph["5"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "blurry"}}

    problem = ask(change)["negative-prompt-unused"]
    assert problem.why == "At cfg 1 ComfyUI leaves it out; node 5 has 6 characters."
    rename(root, "diffusion_models", TRANSFORMER, "klein-base-4b.safetensors")

    def base(graph):
        put("1", "unet_name", "klein-base-4b.safetensors")(graph)
        put("5", "text", "blurry")(graph)

    assert ask(base, prompt="t2i_base") == {}


def test_another_models_workflow_is_none_of_our_business(ask, root):
    weights.write(root / "models" / "diffusion_models" / "sdxl.safetensors", {"a": (1,)})

    def change(graph):
        put("1", "unet_name", "sdxl.safetensors")(graph)
        put("2", "type", "stable_diffusion")(graph)
        put("6", "cfg", 7)(graph)
        graph["8"] = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "steps": 20, "denoise": 1.0}}
        graph["10"]["class_type"] = "EmptyLatentImage"

    assert ask(change) == {}


def test_what_cannot_be_told_of_a_workflow_is_not_called_well(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    broken, empty = workflow.read(tmp_path / "broken.json"), workflow.Workflow("notes.json", "api")
    for each, why in ((broken, "The workflow cannot be read."), (empty, "No sampler in it is seen to run klein.")):
        found = {one.name: one for one in run_checks(OWN, {}, [{"workflow": each}])}
        assert (found["text-encoder-not-stacked"].status, found["text-encoder-not-stacked"].why) == ("skipped", why)
    assert found["workflow-unreadable"].status == "ok"
