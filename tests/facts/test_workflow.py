"""Workflows as people have them: for the server, from the page with subgraphs, in a picture, and broken ones."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from kleinctl import documents, pngtext
from kleinctl.facts import workflow
from kleinctl.facts.workflow import Node, Workflow
from tests.conftest import REPOSITORY

RECORDED = REPOSITORY / "tests" / "fixtures" / "workflows"


def read(path: Path) -> Workflow:
    """What is read, as it would come out of a report."""
    return documents.read(Workflow, documents.plain(workflow.read(path)), "workflow")


def nodes(path: Path) -> dict[str, Node]:
    found = read(path)
    assert not found.error
    return {each.id: each for each in found.nodes}


def save(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def node(
    key: int, kind: str, values: Any = (), mode: int = 0, outputs: str = "", **inputs: int | None
) -> dict[str, Any]:
    """A node as the page saves it; `inputs` are links by name, `outputs` the types of its outputs."""
    slots = [{"name": name, "type": name.upper(), "link": link} for name, link in inputs.items()]
    outs = [{"name": each, "type": each} for each in outputs.split()]
    return {"id": key, "type": kind, "mode": mode, "inputs": slots, "outputs": outs, "widgets_values": list(values)}


def page(*found: dict[str, Any], links: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "last_node_id": 99,
        "nodes": list(found),
        "links": [[*link, "ANY"] for link in links],
        "version": 0.4,
        **more,
    }


def widget(name: str, link: int | None = None) -> dict[str, Any]:
    return {"name": name, "type": "COMBO", "widget": {"name": name}, "link": link}


def subgraphs(definition: dict[str, Any]) -> dict[str, Any]:
    return {"definitions": {"subgraphs": [definition]}}


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_prompts_that_ran_are_read_whole(path):
    found = nodes(path)
    assert len(found) == len(json.loads(path.read_text()))
    assert found["1"].values == {"unet_name": "tiny-klein-4b.safetensors", "weight_dtype": "default"}
    assert read(path).format == "api"


def test_what_a_user_wrote_is_not_kept(tmp_path):
    text = "my secret (garden:1.3)"
    path = save(
        tmp_path / "a.json",
        {
            "1": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["2", 0]}},
            "2": {"class_type": "Somebodys Node", "inputs": {"words": "private", "file": "a.safetensors", "n": 3}},
        },
    )
    found = nodes(path)
    assert found["1"].texts == {"text": len(text)}
    assert found["1"].weighted
    assert found["1"].links == {"clip": "2/0"}
    assert found["2"].values == {"file": "a.safetensors", "n": "3"}
    assert "secret" not in repr(found) and "private" not in repr(found)


def test_a_prompt_wrapped_as_it_is_posted(tmp_path):
    document = {"client_id": "x", "prompt": json.loads((RECORDED / "prompt_t2i_base.json").read_text())}
    assert len(nodes(save(tmp_path / "a.json", document))) == 13


def test_values_of_the_page_are_in_the_order_they_are_drawn(tmp_path):
    sampler = node(3, "KSampler", [42, "randomize", 4, 1.0, "euler", "simple", 1.0], model=1)
    path = save(
        tmp_path / "a.json",
        page(node(1, "UNETLoader", ["klein.safetensors", "default"]), sampler, links=[(1, 1, 0, 3, 0)]),
    )
    found = nodes(path)
    assert read(path).format == "ui"
    assert found["3"].values == {
        "seed": "42", "steps": "4", "cfg": "1.0", "sampler_name": "euler", "scheduler": "simple", "denoise": "1.0",
    }  # fmt: skip
    assert found["3"].links == {"model": "1/0"}


def test_muted_nodes_are_marked_and_bypassed_ones_passed_through(tmp_path):
    path = save(
        tmp_path / "a.json",
        page(
            node(1, "UNETLoader", ["klein.safetensors", "default"], outputs="MODEL"),
            node(2, "LoraLoaderModelOnly", ["a.safetensors", 1.0], mode=4, outputs="MODEL", model=1),
            node(3, "Reroute", outputs="MODEL", any=2),
            node(4, "BasicGuider", model=3),
            node(5, "SaveImage", ["x"], mode=2),
            node(6, "MarkdownNote", ["a note"]),
            links=[(1, 1, 0, 2, 0), (2, 2, 0, 3, 0), (3, 3, 0, 4, 0)],
        ),
    )
    found = nodes(path)
    assert found["4"].links == {"model": "1/0"}
    assert [key for key, each in found.items() if each.muted] == ["2", "5"]
    assert "6" not in found and "3" not in found


def test_a_subgraph_with_its_values_outside(tmp_path):
    inner = {
        "id": "7b34ab90",
        "inputs": [{"name": "text"}, {"name": "unet_name"}, {"name": "value"}],
        "outputs": [{"name": "IMAGE"}],
        "nodes": [
            {**node(70, "UNETLoader", ["inside.safetensors", "default"]), "inputs": [widget("unet_name", 3)]},
            {**node(68, "PrimitiveInt", [512, "fixed"]), "inputs": [widget("value", 4)]},
            {**node(66, "EmptyFlux2LatentImage", [1024, 1024, 1]), "inputs": [widget("width", 5)]},
            {**node(74, "CLIPTextEncode", [""]), "inputs": [widget("text", 6)]},
            node(65, "VAEDecode", outputs="IMAGE", samples=7),
        ],
        "links": [
            {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 70, "target_slot": 0},
            {"id": 4, "origin_id": -10, "origin_slot": 2, "target_id": 68, "target_slot": 0},
            {"id": 5, "origin_id": 68, "origin_slot": 0, "target_id": 66, "target_slot": 0},
            {"id": 6, "origin_id": -10, "origin_slot": 0, "target_id": 74, "target_slot": 0},
            {"id": 7, "origin_id": 66, "origin_slot": 0, "target_id": 65, "target_slot": 0},
            {"id": 8, "origin_id": 65, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }
    wrapper = node(75, "7b34ab90", ["", "outside.safetensors", 1000])
    wrapper["properties"] = {
        "proxyWidgets": [["-1", "text"], ["-1", "unet_name"], ["-1", "value"], ["73", "noise_seed"]]
    }
    wrapper["inputs"] = [widget("text", 1)]
    prompt = node(76, "PrimitiveStringMultiline", ["a hedgehog"])
    document = page(
        prompt,
        wrapper,
        node(9, "SaveImage", ["x"], images=2),
        links=[(1, 76, 0, 75, 0), (2, 75, 0, 9, 0)],
        **subgraphs(inner),
    )
    path = save(tmp_path / "a.json", document)
    found = nodes(path)
    assert found["75:70"].values["unet_name"] == "outside.safetensors"
    assert found["75:66"].values["width"] == "1000"
    assert found["75:74"].texts == {"text": len("a hedgehog")}
    assert found["9"].links == {"images": "75:65/0"}
    edited = json.loads(workflow.edit(path, "75:70", "unet_name", "flux-2-klein-4b.safetensors"))
    assert edited["nodes"][1]["widgets_values"][1] == "flux-2-klein-4b.safetensors"


def test_get_and_set_nodes_stand_for_a_link(tmp_path):
    document = page(
        node(1, "VAELoader", ["flux2-vae.safetensors"]),
        node(2, "SetNode", ["VAE"], vae=1),
        node(3, "GetNode", ["VAE"]),
        node(4, "VAEDecode", vae=2),
        links=[(1, 1, 0, 2, 0), (2, 3, 0, 4, 0)],
    )
    assert nodes(save(tmp_path / "a.json", document))["4"].links == {"vae": "1/0"}


def picture(path: Path, **texts: str) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    png = pngtext.SIGNATURE + head + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    path.write_bytes(pngtext.with_chunks(png, *(pngtext.plain_text(key, text) for key, text in texts.items())))
    return path


def test_the_workflow_in_a_picture(tmp_path):
    prompt = (RECORDED / "prompt_t2i_distilled.json").read_text()
    path = picture(tmp_path / "a.png", workflow=json.dumps(page()), prompt=prompt)
    assert len(nodes(path)) == 13


def test_numbers_and_types_can_be_set(tmp_path):
    path = save(tmp_path / "a.json", json.loads((RECORDED / "prompt_t2i_distilled.json").read_text()))
    changed = json.loads(workflow.edit(path, "6", "cfg", "1"))
    assert changed["6"]["inputs"]["cfg"] == 1
    assert json.loads(workflow.edit(path, "10", "class_type", "EmptyFlux2LatentImage"))["10"]["inputs"]["width"] == 128
    with pytest.raises(ValueError, match=r"node 6 of a\.json has no value model of its own"):
        workflow.edit(path, "6", "model", "x")
    with pytest.raises(ValueError, match="has no node 77"):
        workflow.edit(path, "77", "model", "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is no valid JSON"),
        (b"{", "it is no valid JSON"),
        (b"[1, 2]", "it is JSON, but no workflow of ComfyUI"),
        (b'{"a": 1}', "it has neither nodes nor class_type"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xd8\xff\xe0 a photo", "it is neither JSON nor a PNG picture"),
        (pngtext.SIGNATURE + b"\0\0", "it ends before its last chunk"),
        (json.dumps({str(n): {"class_type": "A", "inputs": {}} for n in range(5001)}).encode(), "more than 5000 nodes"),
    ],
)
def test_what_is_no_workflow(content, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert words in read(path).error
    assert read(path).format == "unknown"


def test_a_file_that_is_not_there_and_a_picture_that_lost_its_workflow(tmp_path):
    assert "it cannot be read" in read(tmp_path / "a.json").error
    assert "the picture has no workflow in it" in read(picture(tmp_path / "a.png")).error


def test_subgraphs_inside_themselves_end(tmp_path):
    inner = {"id": "loop", "nodes": [node(1, "loop")], "links": []}
    assert read(save(tmp_path / "a.json", page(node(1, "loop"), **subgraphs(inner)))).nodes
    many = {"id": "loop", "nodes": [node(n, "loop") for n in range(9)], "links": []}
    found = read(save(tmp_path / "a.json", page(node(1, "loop"), **subgraphs(many))))
    assert "more than 500 subgraphs" in found.error


def test_a_workflow_with_names_beyond_reason_goes_into_a_report(tmp_path):
    nodes = {"6": {"class_type": "X", "inputs": {"n" * 3000: ["9" * 3000, 0]}}}
    (tmp_path / "w.json").write_text(json.dumps(nodes))
    found = workflow.read(tmp_path / "w.json")
    assert documents.read(workflow.Workflow, json.loads(json.dumps(documents.plain(found))), "workflow") == found


@pytest.mark.parametrize("links", [[(1, 2, 0, 2, 0)], "none", [[1]], None, [{"id": []}], [[[], {}, 0, 2, []]]])
def test_links_that_make_no_sense(links, tmp_path):
    document = {"nodes": [node(2, "Reroute", any=1), node(3, "VAEDecode", vae=1), {"id": None}, 7], "links": links}
    assert read(save(tmp_path / "a.json", document)).format == "ui"
