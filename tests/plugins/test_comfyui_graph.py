"""Graphs for ComfyUI: the official templates', a user's own, and what a server says to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from kleinctl_plugins import comfyui_graph
from kleinctl_plugins.comfyui_graph import Files, Graph, Reference

from kleinctl import Job
from kleinctl.facts import workflow
from kleinctl.problem import KleinctlError

FIXTURES = Path(__file__).parent.parent / "fixtures"
FILES = Files("tiny-klein-4b.safetensors", "tiny-qwen3-4b.safetensors", "tiny-flux2-vae.safetensors")
JOB = Job("a red cube", 128, 96, 1, 4, 1.0)
BASE = replace(JOB, steps=20, guidance=5.0)
REFERENCE = Reference("ref.png", 128 * 96)


def template(name):
    return json.loads((FIXTURES / "workflows" / f"prompt_{name}.json").read_text(encoding="utf-8"))


def shape(api, key):
    """A node with everything that feeds it, whatever their ids."""
    inputs = api[key]["inputs"]
    return (
        api[key]["class_type"],
        {
            name: (shape(api, value[0]), value[1]) if isinstance(value, list) else value
            for name, value in inputs.items()
        },
    )


def whole(api):
    (end,) = [key for key, node in api.items() if node["class_type"] == "SaveImage"]
    return shape(api, end)


def offered(changes=None, files=FILES):
    """`/object_info` as it was recorded, with these files."""

    def ask(kind):
        file = FIXTURES / "comfyui" / "object_info" / f"{kind}.json"
        said = json.loads(file.read_text(encoding="utf-8"))[kind] if file.is_file() else {}
        names = {"UNETLoader": "unet_name", "CLIPLoader": "clip_name", "VAELoader": "vae_name"}
        if kind in names:
            said["input"]["required"][names[kind]] = [list(vars(files).values()), {}]
        return {**said, **(changes or {}).get(kind, {})} if kind not in (changes or {}).get("without", ()) else {}

    return ask


@pytest.mark.parametrize(("name", "job", "variant"), [("t2i_distilled", JOB, "distilled"), ("t2i_base", BASE, "base")])
def test_text_to_image_is_the_official_templates_graph(name, job, variant):
    assert whole(comfyui_graph.picture(FILES, job, variant, save="klein").api()) == whole(template(name))


@pytest.mark.parametrize(
    ("name", "job", "variant"), [("edit_distilled", JOB, "distilled"), ("edit_base", BASE, "base")]
)
def test_an_edit_is_the_official_templates_graph_but_for_the_size_which_the_job_says(name, job, variant):
    job = replace(job, prompt="make the cube blue")
    expected = template(name)
    for node in expected.values():
        node["inputs"] = {
            key: {"width": 128, "height": 96}.get(key, value) if value in (["16", 0], ["16", 1]) else value
            for key, value in node["inputs"].items()
        }
    expected["17"]["inputs"]["pixels"] = ["14", 0]  # a small picture is not scaled
    assert whole(comfyui_graph.picture(FILES, job, variant, [REFERENCE], save="klein").api()) == whole(expected)


def test_two_references_are_chained_and_a_large_one_is_scaled():
    large = Reference("large.png", 4000 * 3000)
    api = comfyui_graph.picture(FILES, JOB, "distilled", [REFERENCE, large]).api()
    guider = next(node for node in api.values() if node["class_type"] == "CFGGuider")
    for side in ("positive", "negative"):
        second = api[guider["inputs"][side][0]]
        first = api[second["inputs"]["conditioning"][0]]
        assert [first["class_type"], second["class_type"]] == ["ReferenceLatent", "ReferenceLatent"]
        pixels = [api[api[each["inputs"]["latent"][0]]["inputs"]["pixels"][0]] for each in (first, second)]
        assert [each["class_type"] for each in pixels] == ["LoadImage", "ImageScaleToTotalPixels"]


def test_a_piece_that_does_not_fit_is_refused_when_the_graph_is_built():
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name="a", type="flux2", device="default")
    with pytest.raises(TypeError, match=r"VAEDecode.vae takes VAE, and was given CLIP"):
        graph.add("VAEDecode", vae=clip, samples=clip)
    with pytest.raises(TypeError, match="CLIPTextEncode lacks clip"):
        graph.add("CLIPTextEncode", text="a")


# As the page has it


@pytest.mark.parametrize("references", [[], [REFERENCE, Reference("large.png", 2**22)]], ids=["text", "edit"])
def test_the_written_workflow_says_the_same_as_the_graph(tmp_path, references):
    graph = comfyui_graph.picture(FILES, JOB, "distilled", references, save="klein")
    for name, document in (("ui", comfyui_graph.write_workflow(graph)), ("api", graph.api())):
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    ui, api = (workflow.read(tmp_path / f"{name}.json") for name in ("ui", "api"))
    assert (ui.format, api.format, ui.error) == ("ui", "api", "")
    said = [
        {
            (node.id, node.type, tuple(sorted(node.links.items())), tuple(sorted(node.texts.items())))
            for node in each.nodes
        }
        for each in (ui, api)
    ]
    assert said[0] == said[1]
    for mine, theirs in zip(ui.nodes, api.nodes, strict=True):
        assert theirs.values.items() <= mine.values.items()


def test_every_output_of_the_written_workflow_names_its_links():
    page = comfyui_graph.write_workflow(comfyui_graph.picture(FILES, JOB, "distilled", save="klein"))
    nodes = {node["id"]: node for node in page["nodes"]}
    for number, source, slot, target, into, kind in page["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind == nodes[target]["inputs"][into]["type"]
        assert nodes[target]["inputs"][into]["link"] == number


# A user's own


@pytest.mark.parametrize("name", ["t2i_distilled", "t2i_base", "t2i_basicguider", "edit_distilled", "edit_base"])
def test_prompt_seed_and_size_are_put_into_a_users_workflow(name):
    job = replace(JOB, prompt="a green hill", seed=99, width=256, height=192)
    before = template(name)
    api = comfyui_graph.with_job(before, job)
    assert api["4"]["inputs"]["text"] == "a green hill"
    assert api["9"]["inputs"]["noise_seed"] == 99
    expected = before["10"]["inputs"]["width"] if "edit" in name else 256  # linked to the reference's own size
    assert api["10"]["inputs"]["width"] == api["8"]["inputs"]["width"] == expected
    assert api["8"]["inputs"]["steps"] == before["8"]["inputs"]["steps"]
    if "base" in name and "5" in api:
        assert api["5"]["inputs"]["text"] == ""
    assert before == template(name), "the workflow itself stays as it is"


def test_values_that_come_from_nodes_of_one_value_are_replaced_there():
    api = template("t2i_distilled")
    api["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    api["21"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "old"}}
    api["10"]["inputs"]["width"] = ["20", 0]
    api["8"]["inputs"]["width"] = ["20", 0]
    api["4"]["inputs"]["text"] = ["21", 0]
    replaced = comfyui_graph.with_job(api, replace(JOB, prompt="new", width=512))
    assert (replaced["20"]["inputs"]["value"], replaced["21"]["inputs"]["value"]) == (512, "new")


def put(api, **changes):
    """A workflow with a job in it, and what is said of it."""
    said = []
    return comfyui_graph.with_job(api, replace(JOB, **changes), say=said.append), said


def test_a_node_that_is_both_width_and_height_gives_way_where_they_differ():
    api = template("t2i_distilled")
    api["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    for key, name in ((key, name) for key in ("8", "10") for name in ("width", "height")):
        api[key]["inputs"][name] = ["20", 0]
    wide, said = put(api, width=512, height=256)
    assert [(wide[key]["inputs"]["width"], wide[key]["inputs"]["height"]) for key in ("8", "10")] == [(512, 256)] * 2
    assert (wide["20"]["inputs"]["value"], said) == (1, [])
    square, _ = put(api, width=512, height=512)
    assert (square["20"]["inputs"]["value"], square["10"]["inputs"]["width"]) == (512, ["20", 0])


def test_sizes_and_seeds_that_are_computed_are_put_where_they_arrive():
    api = template("t2i_distilled")
    api["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": 64}}
    api["21"] = {"class_type": "SimpleMath+", "inputs": {"value": "a*2", "a": ["20", 0]}}
    api["22"] = {"class_type": "Seed (rgthree)", "inputs": {"seed": 5}}
    api["23"] = {"class_type": "Reroute", "inputs": {"": ["22", 0]}}
    api["10"]["inputs"]["width"] = api["8"]["inputs"]["width"] = ["21", 0]
    api["9"]["inputs"]["noise_seed"] = ["23", 0]
    made, said = put(api, width=512, seed=8)
    assert made["10"]["inputs"]["width"] == made["8"]["inputs"]["width"] == 512
    assert (made["20"]["inputs"]["value"], made["22"]["inputs"]["seed"]) == (64, 8)
    assert made["9"]["inputs"]["noise_seed"] == ["23", 0]
    assert said == []


def test_a_text_that_is_put_together_gives_way_to_the_prompt_and_that_is_said():
    api = template("t2i_distilled")
    api["20"] = {"class_type": "StringConcatenate", "inputs": {"string_a": "oil,", "string_b": "old", "delimiter": ""}}
    api["4"]["inputs"]["text"] = ["20", 0]
    made, said = put(api, prompt="new")
    assert made["4"]["inputs"]["text"] == "new"
    assert said == ["the prompt takes the place of all that StringConcatenate made for CLIPTextEncode (node 4)"]


def test_a_size_that_follows_a_picture_stays_and_that_is_said():
    _, said = put(template("edit_distilled"), width=512)
    assert said == ["the size comes from a picture that the workflow loads, and stays so"]


def test_a_workflow_without_size_or_seed_is_run_and_that_is_said():
    api = template("t2i_distilled")
    api["10"] = {"class_type": "SomebodysLatents", "inputs": {"ratio": "3:2"}}
    api["9"]["inputs"] = {"noise_seed": "fixed"}
    _, said = put(api)
    assert [each.partition(":")[0] for each in said] == [
        "the workflow has no seed to replace",
        "the workflow begins with no empty latent that is known here",
    ]


def test_more_reference_pictures_than_a_workflow_loads_are_refused():
    with pytest.raises(KleinctlError, match="does not take so many reference pictures") as failure:
        comfyui_graph.with_job(template("edit_distilled"), JOB, [REFERENCE, REFERENCE])
    assert failure.value.problem.why == "It loads 1 (LoadImage), and 2 are given with --image."


def test_links_in_a_circle_and_to_nowhere_lead_to_no_value():
    api = template("t2i_distilled")
    api["20"] = {"class_type": "Reroute", "inputs": {"": ["21", 0]}}
    api["21"] = {"class_type": "Reroute", "inputs": {"": ["20", 0]}}
    api["10"]["inputs"].update(width=["20", 0], height=["99", 0])
    made, _ = put(api, width=512, height=256)
    assert (made["10"]["inputs"]["width"], made["10"]["inputs"]["height"]) == (512, 256)


def test_a_workflow_of_one_sampler_node():
    api = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "old"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "ugly"}},
        "4": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "negative": ["3", 0], "seed": 5}},
    }
    replaced = comfyui_graph.with_job(api, replace(JOB, prompt="new", seed=8))
    assert [replaced[key]["inputs"].get("text") for key in "23"] == ["new", "ugly"]
    assert replaced["4"]["inputs"]["seed"] == 8


def test_a_workflow_of_the_page_is_refused_and_says_how_to_export(tmp_path):
    path = tmp_path / "mine.json"
    page = comfyui_graph.write_workflow(comfyui_graph.picture(FILES, JOB, "distilled"))
    path.write_text(json.dumps(page), encoding="utf-8")
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.read_workflow(path)
    assert failure.value.problem.name == "workflow-not-api"
    assert "Export (API)" in failure.value.problem.fix


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "[" * 100_000])
def test_what_is_no_workflow_is_told_as_such(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.read_workflow(path)
    assert failure.value.problem.name == "workflow-unreadable"


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_exported_workflow_is_read(tmp_path, wrapped):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"prompt": template("t2i_base")} if wrapped else template("t2i_base")), encoding="utf-8")
    assert comfyui_graph.read_workflow(path) == template("t2i_base")


def test_a_workflow_that_has_no_prompt():
    api = template("t2i_distilled")
    api["6"]["inputs"]["positive"] = ["99", 0]
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.with_job(api, JOB)
    assert failure.value.problem.name == "workflow-without-prompt"


# Held against a server


def test_our_graphs_are_as_a_recorded_server_wants_them():
    for variant in ("distilled", "base"):
        for references in ([], [Reference("ref.png [temp]", 2**21)]):
            graph = comfyui_graph.picture(FILES, JOB, variant, references).api()
            assert comfyui_graph.validate(graph, offered()) == graph


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"without": ["Flux2Scheduler"]}, "comfyui-too-old", "came with 0.3.72"),
        ({"without": ["CFGGuider"]}, "node-missing", "CFGGuider"),
        ({"VAEDecode": {"input": {"required": {"new": ["MODEL"]}}}}, "prompt-rejected", "input new"),
        ({"CLIPLoader": {"output": ["MODEL"]}}, "prompt-rejected", "gives it MODEL"),
    ],
    ids=["an old server", "a node taken away", "a node with a new input", "a node that gives something else"],
)
def test_a_server_that_would_not_take_the_graph(changes, name, said):
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.validate(comfyui_graph.picture(FILES, JOB, "distilled").api(), offered(changes))
    problem = failure.value.problem
    assert problem.name == name
    assert said in f"{problem.what} {problem.why}"


def test_a_workflow_that_saves_nothing_is_refused_before_it_is_queued():
    api = comfyui_graph.picture(FILES, JOB, "distilled").api()
    kept = {key: node for key, node in api.items() if node["class_type"] != "PreviewImage"}
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.validate(kept, offered())
    assert failure.value.problem.name == "workflow-without-picture"


def test_a_file_that_the_server_does_not_list_is_named_with_those_that_it_does():
    graph = comfyui_graph.picture(replace(FILES, vae="ae.safetensors"), JOB, "distilled").api()
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.validate(graph, offered())
    problem = failure.value.problem
    assert (problem.name, problem.ref) == ("value-not-in-list", "E03")
    assert problem.what == "ae.safetensors is not offered by VAELoader as vae_name"
    assert "tiny-flux2-vae.safetensors" in problem.why


def test_bounds_that_are_no_numbers_are_none():
    odd = {"VAEDecode": {"input": {"required": {"tiles": ["INT", {"min": [1], "max": "9", "default": 3}]}}}}
    assert comfyui_graph.validate(comfyui_graph.picture(FILES, JOB, "distilled").api(), offered(odd))


def test_a_size_beyond_what_the_server_takes():
    graph = comfyui_graph.picture(FILES, replace(JOB, width=32768), "distilled").api()
    with pytest.raises(KleinctlError, match="width is 32768"):
        comfyui_graph.validate(graph, offered())


def test_an_input_that_came_later_gets_its_default():
    later = {"VAEDecode": {"input": {"required": {"tiles": ["INT", {"default": 3}], "way": [["a", "b"]]}}}}
    graph = comfyui_graph.validate(comfyui_graph.picture(FILES, JOB, "distilled").api(), offered(later))
    decode = next(node for node in graph.values() if node["class_type"] == "VAEDecode")
    assert (decode["inputs"]["tiles"], decode["inputs"]["way"]) == (3, "a")


def test_what_the_server_looks_at_when_the_job_runs_is_left_to_it():
    """A switch gives the type of what is connected to it; inputs that come as several have numbers."""
    switch = {"input": {"required": {"on_true": ["COMFY_MATCHTYPE_V3", {}]}}, "output": ["COMFY_MATCHTYPE_V3"]}
    several = {"input": {"required": {"values": ["COMFY_AUTOGROW_V3", {}]}}, "output": ["BOOLEAN"]}
    api = comfyui_graph.picture(FILES, JOB, "distilled").api()
    decode = next(node for node in api.values() if node["class_type"] == "VAEDecode")
    api["90"] = {"class_type": "ComfySwitchNode", "inputs": {"on_true": decode["inputs"]["vae"]}}
    api["91"] = {"class_type": "ComfyAndNode", "inputs": {"values.value0": True}}
    decode["inputs"]["vae"] = ["90", 0]
    graph = comfyui_graph.validate(api, offered({"ComfySwitchNode": switch, "ComfyAndNode": several}))
    assert graph["91"]["inputs"] == {"values.value0": True}


@pytest.mark.parametrize("inputs", [[1, 2], "text", 3], ids=["list", "text", "number"])
def test_inputs_of_another_shape_are_none(inputs):
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.with_job({"1": {"class_type": "KSampler", "inputs": inputs}}, JOB)
    assert failure.value.problem.name == "workflow-without-prompt"


def test_a_seed_that_comfyuis_page_would_change_is_not_written():
    from kleinctl.plugins import Plugins

    model = Plugins().models["klein-4b"]
    assert comfyui_graph.page(model, replace(JOB, seed=2**53 - 1))
    with pytest.raises(KleinctlError) as failure:
        comfyui_graph.page(model, replace(JOB, seed=2**53 + 5))
    assert failure.value.problem.fix == "--seed 5"


def test_a_model_without_files_for_comfyui_is_not_written():
    from kleinctl.plugins import Plugins

    with pytest.raises(KleinctlError, match="klein-tiny does not come for ComfyUI"):
        comfyui_graph.page(Plugins().models["klein-tiny"], JOB)


def test_a_job_is_written_with_the_files_of_the_models_manifest():
    from kleinctl.plugins import Plugins

    model = Plugins().models["klein-4b"]
    page = comfyui_graph.page(model, JOB)
    values = {node["type"]: node["widgets_values"] for node in page["nodes"]}
    assert values["UNETLoader"] == ["flux-2-klein-4b-fp8.safetensors", "default"]
    assert values["CLIPLoader"] == ["qwen_3_4b.safetensors", "flux2", "default"]
    assert values["RandomNoise"] == [1, "fixed"]
    bf16 = comfyui_graph.page(model, replace(JOB, precision="bf16"))
    assert bf16["nodes"][0]["widgets_values"][0] == "flux-2-klein-4b.safetensors"
