"""Would this workflow run, and give klein's picture?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kleinctl.checks import CouldNotCheck, check, pairing, remedies
from kleinctl.checks.comfyui import PARTS, gguf_problem, is_kv, older, update
from kleinctl.facts.comfyui import ComfyUI, catalogue
from kleinctl.facts.weights import FoundFile
from kleinctl.facts.workflow import Node, Workflow
from kleinctl.identify import Lora, TextEncoder, Transformer, Vae
from kleinctl.problem import Evidence, Problem, Remedy, Severity, shell

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
#: Latents that FLUX.2 is not made for: the number of their channels.
LATENTS = {"EmptyLatentImage": 4, "EmptySD3LatentImage": 16}
LATENT = "EmptyFlux2LatentImage"
#: Inputs that lead to pictures and noise, not to the files that a sampler uses.
ASIDE = ("latent_image", "latent", "samples", "pixels", "image", "images", "noise", "sampler", "mask")
#: Steps below which a base model leaves noise, and guidance above which a distilled one burns.
BASE_STEPS, DISTILLED_GUIDANCE = 10, 1.0
#: Pixels: sizes are multiples of 16, tiles should have 512 and overlap by 64.
GRID, TILE, OVERLAP = 16, 512, 64
#: What `identify` calls klein's transformers; `unknown` is one it cannot tell.
KLEINS = ("flux2-klein-4b", "flux2-klein-9b", "unknown")
ROLES = {"transformer": "transformer", "text-encoder": "text encoder", "vae": "VAE", "lora": "LoRA"}
LOADERS = {"transformer": "UNETLoader", "text-encoder": "CLIPLoader", "vae": "VAELoader", "lora": "LoraLoader"}
WRONG = {
    "transformer": "wrong-transformer",
    "text-encoder": "wrong-text-encoder",
    "vae": "wrong-vae",
    "lora": "lora-mismatch",
}
EXPORT = "in ComfyUI: Workflow > Export (API); doctor reads both forms"


@dataclass(frozen=True)
class Loaded:
    """A file that a node names: the node, its input, the name as it stands there, and what the loader wants."""

    node: Node
    input: str
    name: str
    kind: str
    role: str


@dataclass(frozen=True)
class Run:
    """What one sampler of a workflow uses."""

    sampler: Node
    nodes: tuple[Node, ...]
    loads: tuple[Loaded, ...]

    def of(self, role: str) -> list[Loaded]:
        """The files of a role."""
        return [each for each in self.loads if each.role == role]

    def value(self, name: str) -> float | None:
        """A number that the sampler or what steers it is given; None where it is not told."""
        found = [each.values[name] for each in (self.sampler, *self.nodes) if name in each.values]
        if name == "cfg" and any(each.type == "BasicGuider" for each in self.nodes):
            return 1.0  # it leaves the negative side out
        return _number(found[0]) if found else None


def readable(workflow: Workflow) -> Workflow:
    """The workflow; of one that cannot be read nothing else can be said."""
    if workflow.error:
        raise CouldNotCheck("The workflow cannot be read.")
    return workflow


class Graph:
    """The nodes of a workflow that are run, and how they hang together."""

    def __init__(self, workflow: Workflow) -> None:
        readable(workflow)
        self.path = workflow.path
        self.nodes = {each.id: each for each in workflow.nodes if not each.muted}

    def source(self, node: Node, name: str) -> Node | None:
        """The node that feeds an input."""
        return self.nodes.get(node.links.get(name, "").rpartition("/")[0])

    def above(self, node: Node, aside: Iterable[str] = ASIDE) -> list[Node]:
        """The nodes that feed a node, directly or not, the nearest first; what comes in by inputs `aside` left out."""
        found: dict[str, Node] = {}
        queue = [node]
        while queue:
            at = queue.pop(0)
            for name in at.links:
                near = None if name in aside else self.source(at, name)
                if near is not None and near.id not in found:
                    found[near.id] = near
                    queue.append(near)
        return list(found.values())

    def loads(self) -> list[Loaded]:
        """Every file that a node names."""
        return [each for node in self.nodes.values() for each in _loads(node)]

    def runs(self) -> Iterator[Run]:
        """What each sampler uses; its VAE is that of the nodes that decode its latents or make its references."""
        for sampler in (each for each in self.nodes.values() if each.type in SAMPLERS):
            above = self.above(sampler)
            loads = [each for node in above for each in _loads(node) if each.role != "vae"]
            users = [each for each in self.nodes.values() if "vae" in each.links and self._with(each, sampler)]
            vaes = [near for each in users for near in self._vae(each)]
            yield Run(sampler, tuple(above), (*loads, *dict.fromkeys(vaes)))

    def _with(self, user: Node, sampler: Node) -> bool:
        """Whether a node decodes what a sampler made, or encodes what it starts from or refers to."""
        decodes = user.type.startswith("VAEDecode") and sampler in self.above(user, aside=("vae",))
        return decodes or (user.type.startswith("VAEEncode") and user in self.above(sampler, aside=("vae",)))

    def _vae(self, user: Node) -> list[Loaded]:
        near = self.source(user, "vae")
        return [each for each in _loads(near) if each.role == "vae"] if near else []


# The file itself


@check("workflow-unreadable")
def workflow_unreadable(workflow: Workflow) -> Problem | None:
    """The workflow can be read."""
    if not workflow.error:
        return None
    return Problem(
        f"{_last(workflow.path)} is no workflow that can be read",
        f"Wanted is a workflow that ComfyUI saved, as JSON or in a PNG picture; {workflow.error}.",
        "in ComfyUI: Workflow > Export, then name that file",
        path=workflow.path,
        evidence=(Evidence(workflow.path, workflow.error, "a workflow of ComfyUI"),),
    )


@check("workflow-not-api")
def workflow_not_api(workflow: Workflow) -> Problem | None:
    """The workflow is in the form that ComfyUI's server takes."""
    if readable(workflow).format != "ui":
        return None
    return Problem(
        f"{_last(workflow.path)} is in the form that the page saves",
        "ComfyUI's page opens it; its server wants the API form and complains that class_type is missing.",
        EXPORT,
        severity="warning",
        path=workflow.path,
        ref="E02",
        evidence=(Evidence(workflow.path, "nodes and links", "class_type and inputs"),),
    )


@check("node-missing")
def node_missing(workflow: Workflow, workflow_comfyui: ComfyUI) -> Iterator[Problem]:
    """This ComfyUI has every node of the workflow."""
    seen: dict[str, Node] = {}
    for node in readable(workflow).nodes:
        if not node.muted:
            seen.setdefault(node.type, node)
    for node in seen.values():
        lack = _lack(node, workflow_comfyui)
        if lack:
            why, fix, remedy = lack
            guessed = node.pack == "comfy-core" and node.type not in catalogue()["since"]
            yield Problem(
                f"{workflow_comfyui.name} {'may lack' if guessed else 'has no'} node {node.type}",
                why,
                fix,
                severity="warning" if guessed else "error",
                path=workflow.path,
                ref="E01",
                evidence=(Evidence(f"node {node.id} of {_last(workflow.path)}", node.type, "a node that is there"),),
                remedy=remedy,
            )


def _lack(node: Node, comfyui: ComfyUI) -> tuple[str, str, Remedy | None] | None:
    """Why ComfyUI has no such node, what gives it one by hand, and by --fix; None where it has it or nothing tells."""
    known = catalogue()
    if node.type in known["core"] or node.type in comfyui.nodes:
        return None
    since = known["since"].get(node.type)
    if since or node.pack == "comfy-core":
        told = f"since {since}" if since else f"and the workflow is from {node.pack_version}"
        why = f"It is one of ComfyUI's own {told}, no custom node; this is {comfyui.version}."
        lacks = older(comfyui.version, since or node.pack_version)
        return (why, update(comfyui), remedies.update(comfyui)) if lacks else None
    pack = next((each for each in known["pack"] if node.type in each["nodes"] or each["id"] == node.pack), None)
    title_, address = (pack["title"], pack["address"]) if pack else (node.pack, "")
    there = next((e for e in comfyui.custom_nodes if title_ and title_.lower() in (e.id, e.name.lower())), None)
    if there and (there.disabled or there.failure):
        why = "is switched off" if there.disabled else f"could not be imported ({there.failure.rstrip('.')})"
        remedy = remedies.switch_node(comfyui, there) if there.disabled else None
        fix = f"mend or switch on {there.name} in ComfyUI's Manager"
        return f"{there.name}, which has it, {why}.", remedies.renaming(remedy) or fix, remedy
    if there or not (title_ or node.type in comfyui.sought or not comfyui.custom_nodes):
        return None
    fix = (
        shell("git", "clone", address, f"{comfyui.path}/custom_nodes/{title_}")
        if address
        else "install it with ComfyUI's Manager"
    )
    why = f"It is no node of ComfyUI's own, and {title_ or 'the custom node that has it'} is not installed."
    return why, fix, remedies.install_node(comfyui, pack) if pack else None


# The files that it names


@check("value-not-in-list")
def value_not_in_list(
    workflow: Workflow, workflow_comfyui: ComfyUI, workflow_files: Sequence[FoundFile]
) -> Iterator[Problem]:
    """Every file that the workflow names is one that ComfyUI lists."""
    for load in Graph(workflow).loads():
        listed = workflow_comfyui.files.get(load.kind)
        gguf = load.name.lower().endswith(".gguf")
        if gguf and "GGUF" not in load.node.type:
            yield _gguf_in_core(workflow, load)
        elif gguf and (problem := gguf_problem(workflow_comfyui, load.name)):
            yield problem
        elif listed is not None and load.name not in listed and not _built_in(load):
            yield _not_listed(workflow, workflow_comfyui, load, listed, workflow_files)


def _not_listed(
    workflow: Workflow, comfyui: ComfyUI, load: Loaded, listed: Sequence[str], files: Sequence[FoundFile]
) -> Problem:
    same = [name for name in listed if _plain(name) == _plain(load.name)]
    same = same or [name for name in listed if _last(_plain(name)) == _last(_plain(load.name))]
    near = same or difflib.get_close_matches(load.name, listed, 1, 0.5)
    elsewhere = [kind for kind, names in comfyui.files.items() for name in names if _last(name) == _last(load.name)]
    if same:
        why = f"ComfyUI lists it as {same[0]}: separators, folders and capitals have to be the same."
    elif elsewhere:
        why = f"It lies in {elsewhere[0]}; {load.node.type} lists {load.kind} alone."
    else:
        why = f"{load.node.type} lists {len(listed)} of {load.kind}" + (f"; the nearest is {near[0]}." if near else ".")
    remedy = _edit(workflow, load.node, load.input, same[0], "auto") if len(same) == 1 else None
    own = next((e.identity.role for e in files if e.place == comfyui.name and e.path.name == _last(load.name)), "")
    place = f"choose another file in node {load.node.id}, or put this one into {load.kind}"
    if elsewhere and own in LOADERS and own != load.role:
        place = f"load it with {LOADERS[own]} in the place of node {load.node.id}"
    return Problem(
        f"{comfyui.name} has no {load.kind} file {load.name}",
        why,
        _fix(workflow) if remedy else place,
        path=workflow.path,
        ref="E03",
        evidence=(
            Evidence(f"node {load.node.id}, {load.input}", load.name, near[0] if near else f"one of {load.kind}"),
        ),
        remedy=remedy,
    )


def _gguf_in_core(workflow: Workflow, load: Loaded) -> Problem:
    wanted = {"UNETLoader": "UnetLoaderGGUF", "CLIPLoader": "CLIPLoaderGGUF"}.get(load.node.type, "a GGUF loader")
    return Problem(
        f"{load.node.type} cannot load {load.name}",
        f"ComfyUI's own loaders leave .gguf files out; {wanted} of ComfyUI-GGUF loads them.",
        f"replace node {load.node.id} with {wanted}",
        name="gguf-needs-node",
        path=workflow.path,
        ref="C21",
        evidence=(Evidence(f"node {load.node.id}", load.node.type, wanted),),
    )


@check("workflow-files")
def workflow_files_right(
    workflow: Workflow, workflow_comfyui: ComfyUI, workflow_files: Sequence[FoundFile]
) -> Iterator[Problem]:
    """The files that the workflow loads are what their nodes want, and fit each other."""
    graph = Graph(workflow)
    files = {load: found for load in graph.loads() if (found := _file(load, workflow_comfyui, workflow_files))}
    if not files:
        raise CouldNotCheck(f"None of the files that it names was found in {workflow_comfyui.name}.")
    wrong = set()
    for load, found in files.items():
        problem = _other_role(workflow, load, found)
        if problem:
            wrong.add(load)
            yield problem
    told = set[tuple[str, str | None]]()
    for run in graph.runs():
        right = {load: each for load, each in files.items() if load not in wrong}
        for load, problem in _run_problems(graph, run, right):
            if (problem.name, problem.path) not in told:
                told.add((problem.name, problem.path))
                transformer = next(right[each].identity.facts for each in run.of("transformer") if each in right)
                yield _repointed(problem, workflow, workflow_comfyui, load, transformer, workflow_files)


def _other_role(workflow: Workflow, load: Loaded, found: FoundFile) -> Problem | None:
    """A file that is something else than its node loads."""
    role = found.identity.role
    if (
        role in ("unknown", load.role)
        or found.identity.checkpoint
        or (load.role == "checkpoint" and role != "transformer")
    ):
        return None
    if load.role == "checkpoint":
        name, ref, wanted = "transformer-in-checkpoints", "C19", "a checkpoint with its text encoder and VAE"
        fix = f"load it with UNETLoader in the place of node {load.node.id}, from diffusion_models"
    else:
        name, ref, wanted = WRONG[load.role], "B16", f"a {ROLES[load.role]}"
        fix = f"choose {wanted} in node {load.node.id}"
    return Problem(
        f"{load.node.type} is given {load.name}, which is a {ROLES.get(role, role)}",
        f"Wanted is {wanted}; this file shows {found.identity.saw.rstrip('.')}.",
        fix,
        name=name,
        path=str(found.path),
        ref=ref,
        evidence=(Evidence(f"node {load.node.id} of {_last(workflow.path)}", found.identity.saw, wanted),),
    )


def _repointed(
    problem: Problem,
    workflow: Workflow,
    comfyui: ComfyUI,
    load: Loaded,
    transformer: object,
    files: Sequence[FoundFile],
) -> Problem:
    """The same problem with a way out that leaves the file alone, which other workflows may be right to use."""
    if load.role not in ("text-encoder", "vae") or not isinstance(transformer, Transformer):
        return problem
    fitting = (
        name
        for name in comfyui.files.get(load.kind, ())
        if (found := _file(replace(load, name=name), comfyui, files)) is not None
        and (found.identity.role, found.identity.whole) == (load.role, True)
        and _pair_problem(transformer, found.identity.facts) is None
        and getattr(found.identity.facts, "encoder", True)
    )
    name = next(fitting, None)
    if name is None:
        model = PARTS.get(transformer.family, ("klein-4b",))[0]
        place = f"# then choose its {ROLES[load.role]} in node {load.node.id}"
        fix = f"{shell('kleinctl', 'install', '--model', model, '--comfyui', comfyui.path)}   {place}"
        return replace(problem, fix=fix, remedy=None)
    remedy = _edit(workflow, load.node, load.input, name, "auto")
    return replace(problem, fix=_fix(workflow) if remedy else f"choose {name} in node {load.node.id}", remedy=remedy)


def _run_problems(graph: Graph, run: Run, files: dict[Loaded, FoundFile]) -> Iterator[tuple[Loaded, Problem]]:
    """What does not fit the transformer of one sampler, each with the load that is wrong."""
    chosen = next((each for each in run.of("transformer") if each in files), None)
    transformer = files[chosen] if chosen else None
    if chosen is None or transformer is None or not isinstance(transformer.identity.facts, Transformer):
        return
    own = transformer.identity.facts
    if own.family not in KLEINS and _says_klein(transformer.path.name):
        yield chosen, _not_klein(transformer)
    for load, found in ((each, files[each]) for each in run.loads if each in files):
        problem = _pair_problem(own, found.identity.facts)
        if problem:
            yield load, problem
        elif isinstance(found.identity.facts, Vae) and not found.identity.facts.encoder and _encodes(graph, load):
            yield load, _decoder_alone(load, found)


def _pair_problem(own: Transformer, facts: object) -> Problem | None:
    """The verdict on two files that are loaded together."""
    verdict: object = None
    if isinstance(facts, TextEncoder):
        verdict = pairing.text_encoder_width.function(own, facts)
    elif isinstance(facts, Vae):
        verdict = pairing.vae_channels.function(own, facts)
    elif isinstance(facts, Lora):
        verdict = pairing.lora_mismatch.function(own, facts)
    return verdict if isinstance(verdict, Problem) else None


def _not_klein(found: FoundFile) -> Problem:
    """Another model under klein's name."""
    return Problem(
        f"{found.path.name} is not FLUX.2 [klein]",
        f"Its name says klein; the file shows {found.identity.saw.rstrip('.')}.",
        "kleinctl install --model klein-4b",
        name="wrong-transformer",
        path=str(found.path),
        ref="B16",
        evidence=(Evidence(found.path.name, found.identity.saw, "FLUX.2 [klein]"),),
    )


def _decoder_alone(load: Loaded, found: FoundFile) -> Problem:
    """A VAE without the half that reads pictures."""
    return Problem(
        f"{found.path.name} has no encoder, and this workflow encodes a picture",
        "Wanted is a VAE with both halves; the weights of the missing one would be random.",
        f"choose flux2-vae.safetensors in node {load.node.id}",
        name="vae-decoder-only",
        path=str(found.path),
        ref="C11",
        evidence=(Evidence(found.path.name, "no tensor named encoder.*", "encoder.* and decoder.*"),),
    )


def _encodes(graph: Graph, load: Loaded) -> bool:
    """Whether pictures are encoded with the VAE that a node loads."""
    encoders = (each for each in graph.nodes.values() if each.type.startswith("VAEEncode"))
    return any(graph.source(each, "vae") == load.node for each in encoders)


# How its nodes are set


@check("text-encoder-not-stacked")
def text_encoder_not_stacked(workflow: Workflow) -> Iterator[Problem]:
    """The text encoder is loaded as FLUX.2's."""
    for run in _klein_runs(workflow):
        for load in run.of("text-encoder"):
            kind = load.node.values.get("type", "flux2")
            if len(_loads(load.node)) == 1 and kind != "flux2":
                remedy = _edit(workflow, load.node, "type", "flux2", "ask")
                # Versions differ in what they make of it: comfy/sd.py of newer ones takes both.
                follows = f"with {kind} the sampler ends in `mat1 and mat2 shapes cannot be multiplied`."
                if kind == "flux":
                    follows = "flux is FLUX.1's, which CLIPLoader does not offer, and older versions take for another."
                yield Problem(
                    f"{load.node.type} loads {load.name} as {kind}",
                    f"Wanted is the type flux2, which lays three layers side by side; {follows}",
                    _fix(workflow),
                    path=workflow.path,
                    ref="C03",
                    evidence=(Evidence(f"node {load.node.id}, type", kind, "flux2"),),
                    remedy=remedy,
                )


@check("flux1-nodes")
def flux1_nodes(workflow: Workflow) -> Iterator[Problem]:
    """No node is FLUX.1's own."""
    for run in _klein_runs(workflow):
        for node in run.nodes:
            two = len(_loads(node)) > 1
            if two or node.type == "CLIPTextEncodeFlux":
                wanted = "CLIPLoader with qwen_3_4b and the type flux2" if two else "CLIPTextEncode"
                yield Problem(
                    f"{node.type} is FLUX.1's node",
                    f"klein has one text encoder, without T5 and CLIP-L; wanted is {wanted}.",
                    f"replace node {node.id} with {wanted.split()[0]}",
                    name="wrong-text-encoder",
                    path=workflow.path,
                    ref="C04",
                    evidence=(Evidence(f"node {node.id} of {_last(workflow.path)}", node.type, wanted),),
                )


@check("flux-guidance-unused")
def flux_guidance_unused(workflow: Workflow) -> Iterator[Problem]:
    """No node sets a guidance that klein does not read."""
    for run in _klein_runs(workflow):
        for node in run.nodes:
            if node.type == "FluxGuidance":
                yield Problem(
                    "FluxGuidance does nothing with klein",
                    "It sets the guidance that FLUX.1 [dev] and FLUX.2 [dev] read; klein has no input for it.",
                    f"take node {node.id} out; a base model is guided by the cfg of CFGGuider",
                    severity="warning",
                    path=workflow.path,
                    evidence=(Evidence(f"node {node.id} of {_last(workflow.path)}", node.type, "no such node"),),
                )


@check("wrong-empty-latent")
def wrong_empty_latent(workflow: Workflow) -> Iterator[Problem]:
    """The sampler starts from a latent of FLUX.2's shape."""
    graph = Graph(workflow)
    for run in _klein_runs(workflow):
        node = graph.source(run.sampler, "latent_image")
        if node is not None and node.type in LATENTS:
            yield Problem(
                f"{node.type} is not klein's empty latent",
                f"Wanted are 128 channels at a sixteenth of the size; it makes {LATENTS[node.type]} at an eighth, "
                "which ends in an error or, in newer versions, is quietly replaced.",
                _fix(workflow),
                path=workflow.path,
                ref="D14",
                evidence=(Evidence(f"node {node.id} of {_last(workflow.path)}", node.type, LATENT),),
                remedy=_edit(workflow, node, "class_type", LATENT, "ask"),
            )


@check("guidance-and-steps")
def guidance_and_steps(workflow: Workflow, workflow_files: Sequence[FoundFile]) -> Iterator[Problem]:
    """Guidance and steps suit the variant of the model: distilled or base."""
    for run in _klein_runs(workflow):
        told = next((_variant(load, workflow_files) for load in run.of("transformer")), ("", ""))
        variant, how = told
        cfg, steps = run.value("cfg"), run.value("steps")
        evidence = (
            Evidence(f"{how} of {_model(run)}", variant),
            Evidence(f"node {run.sampler.id}", f"cfg {cfg}, {steps} steps"),
        )
        if variant == "distilled" and cfg is not None and cfg > DISTILLED_GUIDANCE:
            yield Problem(
                f"{_model(run)} is run with cfg {cfg:g}",
                f"By its {how} it is distilled: wanted is cfg 1. More burns the picture and takes twice the time.",
                _fix(workflow) if (remedy := _set(workflow, run, "cfg", "1")) else "set cfg to 1",
                name="guidance-on-distilled",
                severity=_sure(how),
                path=workflow.path,
                ref="C18",
                evidence=evidence,
                remedy=remedy,
            )
        elif variant == "base" and ((steps or BASE_STEPS) < BASE_STEPS or (cfg or 2.0) <= 1.0):
            yield Problem(
                f"{_model(run)} is run with {_setting(steps, cfg)}",
                f"By its {how} it is the base model: wanted are 20 to 50 steps and cfg 4 to 5. Less leaves noise.",
                "set steps to 20 and cfg to 5, or choose the distilled model",
                name="steps-on-base",
                severity=_sure(how),
                path=workflow.path,
                ref="C18",
                evidence=evidence,
            )


def _set(workflow: Workflow, run: Run, name: str, value: str) -> Remedy | None:
    """Set a number of a sampler, in the node that has it."""
    node = next((each for each in (run.sampler, *run.nodes) if name in each.values), None)
    return _edit(workflow, node, name, value, "ask") if node else None


@check("kv-in-workflow")
def kv_in_workflow(workflow: Workflow) -> Iterator[Problem]:
    """The KV variant is run with its cache, and no other model is."""
    for run in _klein_runs(workflow):
        cached = any(node.type == "FluxKVCache" for node in run.nodes)
        model = _model(run)
        if is_kv(model) and not cached:
            why = "By its name it is the KV variant; without the node FluxKVCache it is no faster."
            yield _kv_problem(
                workflow, run, f"{model} is run without its cache", why, "put FluxKVCache behind its loader"
            )
        elif cached and model and not is_kv(model):
            why = "FluxKVCache is for the KV variant alone; by its name this is another."
            yield _kv_problem(workflow, run, f"{model} is run with FluxKVCache", why, "take FluxKVCache out")


def _kv_problem(workflow: Workflow, run: Run, what: str, why: str, fix: str) -> Problem:
    evidence = (
        Evidence(f"node {run.sampler.id} of {_last(workflow.path)}", _model(run), "a KV model with FluxKVCache"),
    )
    return Problem(
        what, why, fix, name="kv-variant", severity="warning", path=workflow.path, ref="C25", evidence=evidence
    )


@check("workflow-size")
def size_rounded(workflow: Workflow) -> Iterator[Problem]:
    """Width and height are multiples of 16."""
    graph = Graph(workflow)
    for run in _klein_runs(workflow):
        node = graph.source(run.sampler, "latent_image")
        sizes = (
            {name: _number(node.values[name]) for name in ("width", "height") if name in node.values} if node else {}
        )
        for name, size in sizes.items():
            if node is not None and size is not None and size > GRID and size % GRID:
                yield Problem(
                    f"the {name} of {size:g} is no multiple of {GRID}",
                    f"The picture would come out {size // GRID * GRID:g} instead, without a word.",
                    f"set {name} to {size // GRID * GRID:g} in node {node.id}",
                    name="size-rounded",
                    severity="warning",
                    path=workflow.path,
                    ref="D13",
                    evidence=(Evidence(f"node {node.id}, {name}", f"{size:g}", f"a multiple of {GRID}"),),
                    remedy=_edit(workflow, node, name, f"{size // GRID * GRID:g}", "ask"),
                )


@check("workflow-tiles")
def tile_seams(workflow: Workflow) -> Iterator[Problem]:
    """Tiles are large enough, and overlap enough, to leave no seams."""
    for node in Graph(workflow).nodes.values():
        tile, overlap = (_number(node.values.get(name, "")) for name in ("tile_size", "overlap"))
        small = (tile is not None and tile < TILE) or (overlap is not None and overlap < OVERLAP)
        if node.type == "VAEDecodeTiled" and small:
            yield Problem(
                f"the tiles of node {node.id} are small",
                f"Tiles of {tile or 0:g} with an overlap of {overlap or 0:g} show as seams and shifts of colour; "
                f"wanted are {TILE} and {OVERLAP}.",
                f"set tile_size to {TILE} and overlap to {OVERLAP} in node {node.id}",
                name="tile-seams",
                severity="warning",
                path=workflow.path,
                ref="D06",
                evidence=(Evidence(f"node {node.id}", f"{tile or 0:g}, {overlap or 0:g}", f"{TILE}, {OVERLAP}"),),
            )


@check("workflow-prompt-weights")
def prompt_weights(workflow: Workflow) -> Iterator[Problem]:
    """No prompt has weights, which klein does not read."""
    for node in {node.id: node for run in _klein_runs(workflow) for node in run.nodes if node.weighted}.values():
        yield Problem(
            "the prompt has weights in it",
            "klein's text encoder does not read them: `(word:1.2)` reaches it as it is typed.",
            f"write it in words in node {node.id}",
            name="prompt-weights",
            severity="warning",
            path=workflow.path,
            ref="D16",
            evidence=(Evidence(f"node {node.id} of {_last(workflow.path)}", "(…:number)", "plain words"),),
        )


@check("negative-prompt-unused")
def negative_prompt_unused(workflow: Workflow) -> Iterator[Problem]:
    """A negative prompt is given only where it has an effect."""
    graph = Graph(workflow)
    for run in _klein_runs(workflow):
        steered = next((each for each in (run.sampler, *run.nodes) if "negative" in each.links), None)
        near = graph.source(steered, "negative") if steered else None
        texts = [near, *graph.above(near, (*ASIDE, "clip"))] if near else []
        written = next((each for each in texts if sum(each.texts.values())), None)
        zeroed = any(each.type == "ConditioningZeroOut" for each in texts)
        if written and not zeroed and run.value("cfg") == DISTILLED_GUIDANCE:
            yield Problem(
                "the negative prompt has no effect",
                f"At cfg 1 ComfyUI leaves it out; node {written.id} has {sum(written.texts.values())} characters.",
                "say what is wanted in the prompt itself; negative prompts work with a base model at cfg 4 to 5",
                severity="warning",
                path=workflow.path,
                ref="D16",
                evidence=(Evidence(f"node {run.sampler.id}", "cfg 1", "cfg above 1"),),
            )


# What these share


def _klein_runs(workflow: Workflow) -> list[Run]:
    """The runs of klein: by the name of the transformer, or by FLUX.2's nodes where the name tells nothing."""
    runs = [run for run in Graph(workflow).runs() if _is_klein(run)]
    if not runs:
        raise CouldNotCheck("No sampler in it is seen to run klein.")
    return runs


def _is_klein(run: Run) -> bool:
    names = [each.name for each in run.loads if each.role in ("transformer", "checkpoint")]
    if any(_says_klein(name) for name in names):
        return True
    encoders = [each.name.lower() for each in run.of("text-encoder")]
    own = any(node.type in ("Flux2Scheduler", LATENT) for node in run.nodes)
    return own and any("qwen" in name for name in encoders) and not any("dev" in name.lower() for name in names)


def _says_klein(name: str) -> bool:
    return "klein" in name.lower()


def _loads(node: Node) -> list[Loaded]:
    """The files that a node names."""
    loader = next((each for each in catalogue()["loader"] if each["node"] == node.type), None)
    if loader is None:
        return []
    named = [(name, node.values[name]) for name in loader["inputs"] if node.values.get(name)]
    return [Loaded(node, name, value, loader["kind"], loader["role"]) for name, value in named]


def _file(load: Loaded, comfyui: ComfyUI, files: Sequence[FoundFile]) -> FoundFile | None:
    """The file behind a name."""
    places = {_plain(f"{folder}/{load.name}") for folder in comfyui.folders.get(load.kind, ())}
    return next((each for each in files if each.place == comfyui.name and _plain(str(each.path)) in places), None)


def _variant(load: Loaded, files: Sequence[FoundFile]) -> tuple[str, str]:
    """Base or distilled, and by what that is known."""
    known = [each for each in files if _last(_plain(str(each.path))) == _last(_plain(load.name)) and each.variant]
    if known:
        return known[0].variant, known[0].content_by or "content"
    if not _says_klein(load.name):
        return "", ""
    return ("base" if "base" in load.name.lower() else "distilled"), "name"


def _sure(how: str) -> Severity:
    return "warning" if how == "name" else "error"


def _model(run: Run) -> str:
    loads = [*run.of("transformer"), *run.of("checkpoint")]
    return _last(loads[0].name) if loads else ""


def _setting(steps: float | None, cfg: float | None) -> str:
    said = [f"{steps:g} steps" if steps is not None else "", f"cfg {cfg:g}" if cfg is not None else ""]
    return " and ".join(each for each in said if each)


def _built_in(load: Loaded) -> bool:
    """What VAELoader offers besides files: small previewers, and no VAE at all."""
    return load.kind == "vae" and (load.name.startswith("tae") or load.name == "pixel_space")


def _edit(workflow: Workflow, node: Node, name: str, value: str, consent: str) -> Remedy | None:
    """Set a value in the file itself, which a picture cannot be."""
    if not workflow.path.lower().endswith(".json"):
        return None
    arguments = {"path": workflow.path, "node": node.id, "input": name, "value": value}
    return Remedy("edit-workflow", arguments, "auto" if consent == "auto" else "ask")


def _fix(workflow: Workflow) -> str:
    return shell("kleinctl", "doctor", "--fix", "--workflow", workflow.path)


def _plain(name: str) -> str:
    return re.sub(r"[\\/]+", "/", name).lower()


def _last(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
