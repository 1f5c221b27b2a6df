"""Graphs for ComfyUI: made of typed pieces, read from a user's workflow, held against what a server offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kleinctl import Job, KleinctlError, Model, Problem, comfyui, memory

#: What a graph may hold as `/prompt` takes it: `{node id: {"class_type", "inputs"}}`.
Api = Mapping[str, Mapping[str, Any]]

#: The nodes that are drawn with: their links in, and what comes out, as `/object_info` of ComfyUI 0.29 has them.
SIGNATURES: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "UNETLoader": ({}, ("MODEL",)),
    "CLIPLoader": ({}, ("CLIP",)),
    "VAELoader": ({}, ("VAE",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "LoadImage": ({}, ("IMAGE", "MASK")),
    "ImageScaleToTotalPixels": ({"image": "IMAGE"}, ("IMAGE",)),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "ReferenceLatent": ({"conditioning": "CONDITIONING", "latent": "LATENT"}, ("CONDITIONING",)),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}, ("GUIDER",)),
    "KSamplerSelect": ({}, ("SAMPLER",)),
    "Flux2Scheduler": ({}, ("SIGMAS",)),
    "RandomNoise": ({}, ("NOISE",)),
    "EmptyFlux2LatentImage": ({}, ("LATENT",)),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, ()),
    "PreviewImage": ({"images": "IMAGE"}, ()),
}
#: The stage of kleinctl that a node's work belongs to; other nodes belong to that of the one before.
STAGES: Mapping[str, str] = {
    **dict.fromkeys(("UNETLoader", "CLIPLoader", "VAELoader", "UnetLoaderGGUF", "CLIPLoaderGGUF"), "load"),
    **dict.fromkeys(("CLIPTextEncode", "ConditioningZeroOut", "LoadImage", "VAEEncode", "ReferenceLatent"), "encode"),
    **dict.fromkeys(("SamplerCustomAdvanced", "SamplerCustom", "KSampler", "KSamplerAdvanced"), "denoise"),
    **dict.fromkeys(("VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage"), "decode"),
}
#: Names of inputs that lead from a sampler to its prompt, and those that hold what a job replaces.
TO_PROMPT = ("guider", "positive", "conditioning")
PROMPTS, SEEDS, SIZES = ("text", "prompt"), ("noise_seed", "seed"), ("width", "height")
SCHEDULERS = ("Flux2Scheduler", "ModelSamplingFlux")
#: What a value may be that takes the place of another.
Kinds = type | tuple[type, ...]
TEXT: Kinds = str
NUMBER: Kinds = (int, float)
EXPORT = "in ComfyUI: Workflow > Export (API), and give that file"
#: Pixels between two nodes on the page, and how many stand in a column.
COLUMN, ROW, ROWS = 380, 200, 4
#: Types that the server itself looks at only when the job runs: that of what is connected elsewhere, and inputs that
#: come as several (`images.image0`).
MATCHING, DYNAMIC = "COMFY_MATCHTYPE_V3", ("COMFY_AUTOGROW_", "COMFY_DYNAMICSLOT_")
#: The largest whole number that the page's own language holds.
MAX_PAGE_SEED = 2**53 - 1
#: How deep values and links of a stranger's workflow are followed.
STEPS = 64


@dataclass(frozen=True)
class Output:
    """One output of a node, and its type."""

    node: str
    slot: int
    kind: str


@dataclass(frozen=True)
class Files:
    """The model's files, as a server lists them."""

    transformer: str
    text_encoder: str
    vae: str


@dataclass(frozen=True)
class Reference:
    """A reference picture of an edit: its name as LoadImage takes it, and its pixels."""

    name: str
    pixels: int


@dataclass
class Graph:
    """Nodes in the order in which they were added, each with an id from 1 on."""

    nodes: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> Output:
        """Add a node; its first output.

        Raises:
            TypeError: an input is given what it does not take.
        """
        wanted, outputs = SIGNATURES[kind]
        for name, value in inputs.items():
            found = value.kind if isinstance(value, Output) else None
            if found != wanted.get(name):
                raise TypeError(
                    f"{kind}.{name} takes {wanted.get(name, 'a value')}, and was given {found or repr(value)}"
                )
        if lacking := wanted.keys() - inputs.keys():
            raise TypeError(f"{kind} lacks {', '.join(sorted(lacking))}")
        key = str(len(self.nodes) + 1)
        self.nodes[key] = (kind, inputs)
        return Output(key, 0, outputs[0] if outputs else "")

    def api(self) -> dict[str, dict[str, Any]]:
        """The graph as `/prompt` takes it."""
        return {
            key: {"class_type": kind, "inputs": {name: _linked(value) for name, value in inputs.items()}}
            for key, (kind, inputs) in self.nodes.items()
        }


def _linked(value: Any) -> Any:
    return [value.node, value.slot] if isinstance(value, Output) else value


def picture(files: Files, job: Job, variant: str, references: Sequence[Reference] = (), save: str = "") -> Graph:
    """The graph of a job, from text or as an edit; the official templates' own.

    A base model has an empty negative prompt, a distilled one none. With `save` the picture goes to the server's output
    folder under that name; without, to the folder that it empties by itself.
    """
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=files.transformer, weight_dtype="default")
    clip = graph.add("CLIPLoader", clip_name=files.text_encoder, type="flux2", device="default")
    vae = graph.add("VAELoader", vae_name=files.vae)
    positive = graph.add("CLIPTextEncode", clip=clip, text=job.prompt)
    if variant == "base":
        negative = graph.add("CLIPTextEncode", clip=clip, text="")
    else:
        negative = graph.add("ConditioningZeroOut", conditioning=positive)
    for reference in references:
        latent = graph.add("VAEEncode", pixels=_reference(graph, reference), vae=vae)
        positive = graph.add("ReferenceLatent", conditioning=positive, latent=latent)
        negative = graph.add("ReferenceLatent", conditioning=negative, latent=latent)
    size = {"width": job.width, "height": job.height}
    latents = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=job.seed),
        guider=graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=job.guidance),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.add("Flux2Scheduler", steps=job.steps, **size),
        latent_image=graph.add("EmptyFlux2LatentImage", **size, batch_size=1),
    )
    image = graph.add("VAEDecode", samples=latents, vae=vae)
    if save:
        graph.add("SaveImage", images=image, filename_prefix=save)
    else:
        graph.add("PreviewImage", images=image)
    return graph


def _reference(graph: Graph, reference: Reference) -> Output:
    """A reference picture; one of more than a megapixel is made smaller, as diffusers does."""
    image = graph.add("LoadImage", image=reference.name)
    if reference.pixels <= memory.MAX_REFERENCE_PIXELS:
        return image
    scaled = {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": 1}
    return graph.add("ImageScaleToTotalPixels", image=image, **scaled)


# As ComfyUI's own page has it


def page(model: Model, job: Job, references: Sequence[Reference] = ()) -> dict[str, Any]:
    """The job as a workflow for ComfyUI's page, with the names that the model's files have in its manifest.

    Raises:
        KleinctlError: the model has no files for ComfyUI, or the page would make another seed of the job's.
    """
    if job.seed > MAX_PAGE_SEED:
        why = f"It holds whole numbers up to {MAX_PAGE_SEED}; {job.seed} would become another seed."
        raise _problem("the seed is too large for ComfyUI's page", why, f"--seed {job.seed % 2**53}", "usage")
    names = {part.role: part.name for part in reversed(model.parts_for("comfyui", job.precision or None))}
    if not {"transformer", "text-encoder", "vae"} <= names.keys():
        why = "Wanted are a transformer, a text encoder and a VAE in ComfyUI's layout; its manifest lists none."
        raise _problem(f"{model.name} does not come for ComfyUI", why, "--model klein-4b", "usage")
    files = Files(names["transformer"], names["text-encoder"], names["vae"])
    return write_workflow(picture(files, job, model.variant, references, save="kleinctl"))


def write_workflow(graph: Graph) -> dict[str, Any]:
    """The graph as a workflow that opens in ComfyUI's page."""
    links: list[list[Any]] = []
    nodes = [_drawn(number, key, *node, links) for number, (key, node) in enumerate(graph.nodes.items())]
    for number, source, slot, *_ in links:
        nodes[source - 1]["outputs"][slot]["links"].append(number)
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _drawn(number: int, key: str, kind: str, inputs: Mapping[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    """A node as the page saves it; its links in are added to `links`."""
    wanted, outputs = SIGNATURES[kind]
    slots = []
    for slot, (name, type_) in enumerate(wanted.items()):
        source = inputs[name]
        links.append([len(links) + 1, int(source.node), source.slot, int(key), slot, type_])
        slots.append({"name": name, "type": type_, "link": len(links)})
    extra = {"control_after_generate": "fixed", "upload": "image"}  # what the page itself adds
    return {
        "id": int(key),
        "type": kind,
        "pos": [number // ROWS * COLUMN, number % ROWS * ROW],
        "size": [COLUMN - 60, 90],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": each, "type": each, "links": [], "slot_index": at} for at, each in enumerate(outputs)],
        "properties": {"Node name for S&R": kind, "cnr_id": "comfy-core"},
        "widgets_values": [inputs.get(name, extra.get(name)) for name in comfyui.catalogue()["widgets"].get(kind, ())],
    }


# A user's own workflow


def read_workflow(path: Path) -> dict[str, dict[str, Any]]:
    """The graph in a workflow file in the server's format, or in a picture that ComfyUI saved.

    Raises:
        KleinctlError: it cannot be read, or is in the format of ComfyUI's page.
    """
    found = comfyui.workflow.read(path)
    if found.format == "unknown":
        why = f"Wanted is a workflow that ComfyUI exported; {found.error}."
        what = f"{path.name} is no workflow that can be read"
        raise KleinctlError(Problem(what, why, EXPORT, name="workflow-unreadable", path=str(path)))
    if found.format == "ui":
        why = "Wanted is the format that the server takes (nodes with class_type); this is the one that its page saves."
        what = f"{path.name} is not in API format"
        raise KleinctlError(Problem(what, why, EXPORT, name="workflow-not-api", path=str(path), ref="E02"))
    return comfyui.workflow.graph(path)


def with_job(
    api: Api,
    job: Job,
    references: Sequence[Reference] = (),
    path: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """A user's graph with the job's prompt, seed and size in it; reference pictures take the place of its own in turn.

    Steps and guidance stay as the workflow has them. `say` hears what stays besides, and what is left out.

    Raises:
        KleinctlError: it has no prompt that leads to a sampler, or takes fewer reference pictures than the job has.
    """
    graph = {key: {**node, "inputs": dict(_mapping(node.get("inputs")))} for key, node in api.items()}
    prompts = [at for key in graph if STAGES.get(_kind(graph, key)) == "denoise" for at in _prompts(graph, key)]
    if not prompts:
        why = "Wanted is a text that leads to a sampler, by its `positive` or by a guider; none was found."
        fix = "use a workflow with CLIPTextEncode and a sampler"
        raise _of_workflow(path, "has no prompt to replace", why, fix, "workflow-without-prompt")
    seeds = [(key, name) for key in graph for name in SEEDS if _takes(graph[key]["inputs"].get(name), NUMBER)]
    if not seeds:
        say("the workflow has no seed to replace: its pictures do not go by --seed")
    values = [(*at, job.prompt) for at in dict.fromkeys(prompts)] + [(*at, job.seed) for at in seeds]
    _put(graph, [*values, *_sizes(graph, job, say)], say)
    loaders = [key for key in graph if _kind(graph, key) == "LoadImage"]
    if len(loaders) < len(references):
        why = f"It loads {len(loaders)} (LoadImage), and {len(references)} are given with --image."
        fix = "add a LoadImage for each to the workflow, and export it again"
        raise _of_workflow(path, "does not take so many reference pictures", why, fix, "usage")
    for key, reference in zip(loaders, references, strict=False):
        graph[key]["inputs"]["image"] = reference.name
    return graph


def _of_workflow(path: Path | None, what: str, why: str, fix: str, name: str) -> KleinctlError:
    what = f"{path.name if path else 'the workflow'} {what}"
    return KleinctlError(Problem(what, why, fix, name=name, path=str(path) if path else None))


def _sizes(graph: Api, job: Job, say: Callable[[str], None]) -> list[tuple[str, str, int]]:
    """The inputs that say how large the picture becomes, with the job's size; one that follows a picture stays."""
    sized = [key for key in graph if _has_size(_kind(graph, key))]
    if not any(_kind(graph, key).startswith("Empty") for key in sized):
        say("the workflow begins with no empty latent that is known here: the size of its pictures stays as it has it")
    wanted = [
        (key, name, value)
        for key in sized
        for name, value in zip(SIZES, (job.width, job.height), strict=True)
        if _takes(graph[key]["inputs"].get(name), NUMBER)
    ]
    followed = {key for key, name, _ in wanted if _follows_picture(graph, graph[key]["inputs"][name])}
    if followed:
        say("the size comes from a picture that the workflow loads, and stays so")
    return [each for each in wanted if each[0] not in followed]


def _follows_picture(graph: Api, value: Any) -> bool:
    """Whether a value is made from a picture that is loaded, such as by GetImageSize."""
    waiting, seen = [_link(value)], set[str]()
    while waiting:
        key = waiting.pop()
        if key is None or key in seen or key not in graph:
            continue
        seen.add(key)
        if _kind(graph, key).startswith("LoadImage"):
            return True
        waiting += map(_link, graph[key]["inputs"].values())
    return False


def _put(graph: Api, wanted: Sequence[tuple[str, str, Any]], say: Callable[[str], None]) -> None:
    """Put each value where the plain one stands that feeds its input; at the input itself where there is no such place.

    Nor is there where one place would get two values: a node of one number that is both width and height.
    """
    places = [_holder(graph, key, name, _kinds(value)) for key, name, value in wanted]
    given: dict[tuple[str, str], set[Any]] = {}
    for place, (*_, value) in zip(places, wanted, strict=True):
        if place is not None:
            given.setdefault(place, set()).add(value)
    for place, (key, name, value) in zip(places, wanted, strict=True):
        if place is None and isinstance(value, str):
            source = _link(graph[key]["inputs"][name]) or ""
            made = _kind(graph, source) if source in graph else "another node"
            say(f"the prompt takes the place of all that {made} made for {_kind(graph, key)} (node {key})")
        at = (key, name) if place is None or len(given[place]) > 1 else place
        graph[at[0]]["inputs"][at[1]] = value


def _kind(graph: Api, key: str) -> str:
    return str(graph[key].get("class_type", ""))


def _has_size(kind: str) -> bool:
    return kind in SCHEDULERS or (kind.startswith("Empty") and "Latent" in kind)


def _link(value: Any) -> str | None:
    """The node that a link names; None for a plain value."""
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    return str(value[0]) if linked else None


def _kinds(value: Any) -> Kinds:
    return TEXT if isinstance(value, str) else NUMBER


def _plain(value: Any, kinds: Kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _takes(value: Any, kinds: Kinds) -> bool:
    """Whether an input is, or is fed with, such a value."""
    return _plain(value, kinds) or _link(value) is not None


def _holder(graph: Api, key: str, name: str, kinds: Kinds) -> tuple[str, str] | None:
    """The node and the input where the plain value stands: here, or in a node of one value that feeds this one.

    None where it is made from several.
    """
    for _ in range(STEPS):
        value = graph[key]["inputs"].get(name)
        source = _link(value)
        if source is None or source not in graph:
            return (key, name) if _plain(value, kinds) else None
        inputs = graph[source]["inputs"]
        links = [each for each in inputs if _link(inputs[each]) is not None]
        values = [each for each in inputs if _plain(inputs[each], kinds)]
        only = values if not links else links if len(inputs) == 1 else []
        if len(only) != 1:
            return None
        key, name = source, only[0]
    return None


def _prompts(graph: Api, sampler: str) -> Iterator[tuple[str, str]]:
    """The inputs with the texts that say to a sampler what is to be seen."""
    waiting, seen = [sampler], set[str]()
    while waiting:
        key = waiting.pop(0)
        if key in seen or key not in graph:
            continue
        seen.add(key)
        inputs = graph[key]["inputs"]
        texts = [(key, name) for name in PROMPTS if _takes(inputs.get(name), TEXT)]
        yield from texts
        waiting += [source for name in TO_PROMPT if not texts and (source := _link(inputs.get(name)))]


# Held against a server


def validate(api: Api, offered: Callable[[str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The graph as this server takes it: inputs that it wants and the graph lacks have their default.

    `offered` is what `/object_info` says of a node class.

    Raises:
        KleinctlError: a node, an input or a value is not as the server offers it.
    """
    graph = {key: {**node, "inputs": _inputs(api, key, offered)} for key, node in api.items()}
    if all(offered(_kind(graph, key)).get("output_node") is False for key in graph):
        why = "Wanted is one that saves or shows what was made; none of its nodes does."
        fix = "add a SaveImage node to the workflow, and export it again"
        raise _problem("the workflow has no output node", why, fix, "workflow-without-picture")
    return graph


def _inputs(api: Api, key: str, offered: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of a node, looked at one by one."""
    kind, given = str(api[key]["class_type"]), dict(api[key]["inputs"])
    said = offered(kind)
    if not said:
        since = comfyui.catalogue()["since"].get(kind)
        own = since or kind in comfyui.catalogue()["core"]
        why = f"It came with {since}; this server is older." if since else "Its /object_info has nothing of that name."
        fix = "kleinctl doctor --fix --comfyui DIR" if own else "install the custom nodes that have it, or use none"
        raise _problem(f"ComfyUI has no node {kind}", why, fix, "comfyui-too-old" if since else "node-missing", "E01")
    wanted = _mapping(said.get("input"))
    required, optional = _mapping(wanted.get("required")), _mapping(wanted.get("optional"))
    for name, spec in required.items():
        if name not in given and not _type(spec).startswith(DYNAMIC):
            default = _default(spec)
            if default is None:
                why = f"Wanted is its input {name} ({_type(spec)}), which kleinctl does not know; its node has changed."
                raise _problem(f"{kind} is another than it was", why, "kleinctl doctor --fix --comfyui DIR")
            given[name] = default
    for name, value in given.items():
        if spec := required.get(name) or optional.get(name):
            _check(api, kind, name, value, spec, offered)
    return given


def _check(api: Api, kind: str, name: str, value: Any, spec: Any, offered: Callable[[str], Mapping[str, Any]]) -> None:
    source, type_ = _link(value), _type(spec)
    if source is not None:
        outputs = offered(_kind(api, source)).get("output") if source in api else None
        found = outputs[value[1]] if isinstance(outputs, list) and 0 <= value[1] < len(outputs) else None
        if found is None or not _alike(str(found) if isinstance(found, str) else "COMBO", type_):
            why = f"It takes {type_}; node {source} gives it {found or 'nothing'}."
            raise _problem(f"{kind}.{name} is connected to the wrong node", why, "mend that link in the workflow")
        return
    choices, options = _choices(spec), _options(spec)
    if choices is not None and value not in choices and not _uploaded(spec, value):
        near = ", ".join(map(str, choices[:8])) or "nothing"
        raise _problem(
            f"{value!s:.100} is not offered by {kind} as {name}",
            f"This ComfyUI offers {near}{', …' if len(choices) > 8 else ''}.",
            "kleinctl doctor --comfyui DIR   # after a file was put there, ComfyUI's page reads the list again with R",
            "value-not-in-list",
            "E03",
        )
    if _is_number(value):
        low, high = (options[key] if _is_number(options.get(key)) else value for key in ("min", "max"))
        if not low <= value <= high:
            why = f"{kind} takes {low} to {high}; {name} is {value}."
            raise _problem(f"{name} is out of bounds", why, f"choose {name} from {low} to {high}")


def _problem(what: str, why: str, fix: str, name: str = "prompt-rejected", ref: str | None = None) -> KleinctlError:
    return KleinctlError(Problem(what, why, fix, name=name, ref=ref))


def choices(said: Mapping[str, Any], name: str) -> list[str]:
    """The values that a node offers for an input, as `/object_info` has them."""
    found = _mapping(_mapping(said.get("input")).get("required"))
    return [each for each in _choices(found.get(name)) or () if isinstance(each, str)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _type(spec: Any) -> str:
    kind = spec[0] if isinstance(spec, list) and spec else "*"
    return kind if isinstance(kind, str) else "COMBO"


def _options(spec: Any) -> Mapping[str, Any]:
    return spec[1] if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], dict) else {}


def _choices(spec: Any) -> list[Any] | None:
    """`[[names], {}]`, or newer `["COMBO", {"options": names}]`; None for what is no choice."""
    if isinstance(spec, list) and spec and isinstance(spec[0], list):
        return spec[0]
    options = _options(spec).get("options")
    return options if _type(spec) == "COMBO" and isinstance(options, list) else None


def _uploaded(spec: Any, value: Any) -> bool:
    """Whether it is a picture that was handed over: such are not in the list."""
    return bool(_options(spec).get("image_upload")) and isinstance(value, str) and value.endswith("[temp]")


def _default(spec: Any) -> Any:
    options = _options(spec)
    listed = _choices(spec)
    return options.get("default", listed[0] if listed else None)


def _alike(given: str, wanted: str) -> bool:
    """Whether an output may feed an input: types can be several, and `*` is any."""
    if {"*", MATCHING} & {given, wanted}:
        return True
    return bool({each.strip() for each in given.split(",")} & {each.strip() for each in wanted.split(",")})
