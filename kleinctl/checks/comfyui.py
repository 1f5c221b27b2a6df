"""Is this ComfyUI one that can run klein: its version, its folders, its custom nodes, its arguments?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from kleinctl.checks import CouldNotCheck, check, remedies
from kleinctl.checks.environment import pip_line, torch_for
from kleinctl.checks.machine import DRIVERS, NO_CUDA_MALLOC, chosen_card, known, with_arguments
from kleinctl.environment import Environment
from kleinctl.facts.comfyui import KINDS, OLD_NAMES, ComfyUI, CustomNode, ExtraPath, argument, catalogue
from kleinctl.facts.system import System
from kleinctl.facts.weights import FoundFile
from kleinctl.hardware import Hardware
from kleinctl.identify import title
from kleinctl.problem import Evidence, Problem, Remedy, shell
from kleinctl.units import GIB, gib

#: The first versions of ComfyUI with the nodes of FLUX.2, with Qwen3 as its text encoder, with marked fp8 scales, with
#: klein's KV cache, and with dynamic VRAM by default (Comfy-Org/ComfyUI#10879, #11890, #12658).
FLUX2, KLEIN, MARKED_SCALES, KV_CACHE, DYNAMIC = "0.3.72", "0.9.2", "0.4.0", "0.17.0", "0.16.0"
#: The release whose dynamic VRAM people report trouble with.
TROUBLED = "0.30"
#: The oldest driver for CUDA 13.
KERNEL_DRIVER = "580"
#: What switches dynamic VRAM off, as `enables_dynamic_vram` of ComfyUI's cli_args.py has it.
STATIC = ("--disable-dynamic-vram", "--disable-smart-memory", "--highvram", "--gpu-only", "--novram", "--cpu")
#: Where a file belongs by what it is, and what it is called.
HOMES = {"transformer": "diffusion_models", "text-encoder": "text_encoders", "vae": "vae", "lora": "loras"}
ROLES = {"transformer": "transformer", "text-encoder": "text encoder", "vae": "VAE", "lora": "LoRA"}
#: Families of files that klein is run with: of others' scales nothing is said.
READ = ("flux2-klein-4b", "flux2-klein-9b", "qwen3-4b", "qwen3-8b")
#: What belongs to each klein transformer: the model, and by role the family, the manifest's part, and the file.
PARTS = {
    "flux2-klein-4b": (
        "klein-4b",
        {
            "text-encoder": ("qwen3-4b", "text-encoder-comfyui", "text_encoders/qwen_3_4b.safetensors"),
            "vae": ("flux2-vae", "vae-comfyui", "vae/flux2-vae.safetensors"),
        },
    ),
    "flux2-klein-9b": (
        "klein-9b",
        {
            "text-encoder": ("qwen3-8b", "text-encoder-comfyui", "text_encoders/qwen_3_8b.safetensors"),
            "vae": ("flux2-vae", "vae-comfyui", "vae/flux2-vae.safetensors"),
        },
    ),
}


def older(version: str | None, than: str) -> bool:
    """Whether a version is known and older than another."""
    return version is not None and _numbers(version) < _numbers(than)


def update(comfyui: ComfyUI) -> str:
    """How to update a ComfyUI, as a line to paste."""
    if comfyui.layout == "portable":
        script = re.split(r"[\\/][^\\/]*$", comfyui.path)[0] + r"\update\update_comfyui.bat"
        return shell(script, windows=True)
    if comfyui.layout == "base-directory":
        return "update ComfyUI in its app (Help, Check for updates), then start it again"
    words = comfyui.python or "python", "-s", "-m", "pip", "install", "-r", f"{comfyui.path}/requirements.txt"
    return f"{shell('git', '-C', comfyui.path, 'pull')} && {shell(*words)}"


def _doctor(comfyui: ComfyUI) -> str:
    return shell("kleinctl", "doctor", "--fix", "--comfyui", comfyui.path)


def version_of(comfyui: ComfyUI) -> str:
    """Its version; nothing can be said of what depends on it where it is not known."""
    if comfyui.version is None:
        raise CouldNotCheck(f"Nothing says which version of ComfyUI {comfyui.name} is of.")
    return comfyui.version


def gguf_problem(comfyui: ComfyUI, name: str) -> Problem | None:
    """What keeps ComfyUI from loading the GGUF file `name`."""
    pack = _pack(comfyui, "comfyui-gguf")
    there = f"{comfyui.path}/custom_nodes/{pack.name if pack else 'ComfyUI-GGUF'}"
    if pack is None:
        own = next(each for each in catalogue()["pack"] if each["id"] == "comfyui-gguf")
        state, found = "is not installed", "no ComfyUI-GGUF"
        fix, remedy = shell("git", "clone", own["address"], there), remedies.install_node(comfyui, own)
    elif pack.disabled:
        state, found = "is switched off", pack.name
        fix, remedy = f"switch on {pack.name} in ComfyUI's Manager", remedies.switch_node(comfyui, pack)
        fix = remedies.renaming(remedy) or fix
    elif pack.current is False:
        state, found = "is from before Qwen3, klein's text encoder", f"{pack.name} {pack.version or ''}".strip()
        fix, remedy = shell("git", "-C", there, "pull"), remedies.update_node(comfyui, pack)
    else:
        return None
    return Problem(
        f"{_last(name)} cannot be loaded by {comfyui.name}",
        f"ComfyUI's own nodes do not list .gguf files, and ComfyUI-GGUF {state}.",
        f"{fix}   # then start ComfyUI again",
        name="gguf-needs-node",
        ref="C21",
        evidence=(Evidence(f"{comfyui.path}/custom_nodes", found, "ComfyUI-GGUF that knows Qwen3"),),
        remedy=remedy,
    )


# Its version


@check("comfyui-too-old")
def comfyui_too_old(comfyui: ComfyUI) -> Problem | None:
    """ComfyUI is recent enough for klein."""
    if not older(version_of(comfyui), KLEIN):
        return None
    return Problem(
        f"{comfyui.name} is too old for klein",
        f"Wanted is ComfyUI {KLEIN} or newer; this is {comfyui.version}, which takes klein for another model.",
        update(comfyui),
        path=comfyui.path,
        ref="C07",
        evidence=(_version(comfyui, f"{KLEIN} or newer"),),
        remedy=remedies.update(comfyui),
    )


@check("cliploader-lacks-flux2")
def cliploader_lacks_flux2(comfyui: ComfyUI) -> Problem | None:
    """The CLIPLoader of this ComfyUI has the type flux2."""
    if not older(version_of(comfyui), FLUX2):
        return None
    return Problem(
        f"the CLIPLoader of {comfyui.name} has no type flux2",
        f"The type came with ComfyUI {FLUX2}; this is {comfyui.version}.",
        update(comfyui),
        path=comfyui.path,
        ref="C08",
        evidence=(_version(comfyui, f"{FLUX2} or newer"),),
        remedy=remedies.update(comfyui),
    )


# Its files


@check("transformer-in-checkpoints")
def transformer_in_checkpoints(comfyui: ComfyUI, comfyui_files: Sequence[FoundFile]) -> Iterator[Problem]:
    """No bare transformer lies among the checkpoints."""
    for found in comfyui_files:
        bare = found.identity.role == "transformer" and not found.identity.checkpoint
        if found.folder == "checkpoints" and bare:
            yield _misplaced(
                comfyui,
                found,
                f"{found.path.name} is a transformer among the checkpoints",
                "CheckpointLoaderSimple wants a text encoder and a VAE in the file as well and finds none.",
                "C19",
            )


@check("file-in-wrong-folder")
def file_in_wrong_folder(comfyui: ComfyUI, comfyui_files: Sequence[FoundFile]) -> Iterator[Problem]:
    """Every weights file lies in the folder that its loader lists."""
    for found in comfyui_files:
        role, home = found.identity.role, HOMES.get(found.identity.role)
        sound = found.identity.whole and not found.identity.checkpoint
        if sound and home and home != found.folder and found.folder in HOMES.values():
            yield _misplaced(
                comfyui,
                found,
                f"{found.path.name} is in the wrong folder",
                f"It is a {ROLES[role]} ({title(found.identity.family)}) and lies in {found.folder}; "
                f"the loader of a {ROLES[role]} lists {home} alone.",
                "C20",
            )


@check("gguf-needs-node")
def gguf_needs_node(comfyui: ComfyUI) -> Problem | None:
    """ComfyUI-GGUF is there for the GGUF files."""
    kinds = ("diffusion_models", "text_encoders", "checkpoints")
    ggufs = [name for kind in kinds for name in comfyui.files.get(kind, ()) if name.lower().endswith(".gguf")]
    return gguf_problem(comfyui, ggufs[0]) if ggufs else None


@check("fp8-scales-unread")
def fp8_scales_unread(comfyui: ComfyUI, comfyui_files: Sequence[FoundFile]) -> Iterator[Problem]:
    """The scales of every fp8 file are ones that this ComfyUI reads."""
    for found in comfyui_files:
        scales = getattr(found.identity.facts, "scales", None)
        if scales == "unmarked" and found.identity.family in READ:
            why = "Its scales have no mark that ComfyUI looks for: it leaves them out and paints noise without a word."
            line = shell("kleinctl", "install", "--model", "klein-4b", "--comfyui", comfyui.path)
            fix = f"{line}   # the official file has the marks"
            remedy = _official(found)
        elif scales in ("metadata", "comfy_quant") and older(version_of(comfyui), MARKED_SCALES):
            why = f"Its scales are marked in a way that ComfyUI reads since {MARKED_SCALES}; this is {comfyui.version}."
            fix, remedy = update(comfyui), remedies.update(comfyui)
        else:
            continue
        yield Problem(
            f"{comfyui.name} would ignore the fp8 scales of {found.path.name}",
            why,
            fix,
            path=str(found.path),
            ref="C22",
            evidence=(
                Evidence(found.path.name, f"scales: {scales}", "scales that are marked and read"),
                _version(comfyui, f"{MARKED_SCALES} or newer"),
            ),
            remedy=remedy,
        )


@check("part-missing")
def part_missing(comfyui: ComfyUI, comfyui_files: Sequence[FoundFile]) -> Iterator[Problem]:
    """Each klein transformer has its text encoder and its VAE beside it."""
    own = {each.identity.family: each for each in reversed(comfyui_files) if each.identity.role == "transformer"}
    for family, (model, parts) in PARTS.items():
        for role, (wanted, part, place) in parts.items() if family in own else ():
            alike = [each for each in comfyui_files if each.identity.role == role]
            if any(each.identity.family == wanted for each in alike):
                continue
            if any(each.role == role and each.model == model for each in comfyui_files):
                continue  # something stands in its place: another check says what
            near = ", ".join(f"{each.path.name} ({title(each.identity.family)})" for each in alike[:3])
            path = f"{_folder(comfyui, HOMES[role])}/{_last(place)}"
            yield Problem(
                f"{own[family].path.name} has no {ROLES[role]} beside it",
                f"Wanted is {title(wanted)} in {HOMES[role]}; there is {near or 'none'}.",
                _doctor(comfyui),
                path=path,
                ref="C24",
                evidence=(Evidence(HOMES[role], near or f"no {ROLES[role]}", title(wanted)),),
                remedy=Remedy("fetch-part", {"model": model, "part": part, "path": path}, "ask"),
            )


@check("kv-variant")
def kv_variant(comfyui: ComfyUI) -> Problem | None:
    """A KV transformer is there only where ComfyUI has the node that it needs."""
    names = [name for name in comfyui.files.get("diffusion_models", ()) if is_kv(name)]
    if not names or not older(version_of(comfyui), KV_CACHE):
        return None
    return Problem(
        f"{_last(names[0])} needs a newer ComfyUI",
        f"By its name it is the KV variant, which needs the node FluxKVCache of {KV_CACHE}; this is {comfyui.version}.",
        update(comfyui),
        severity="warning",
        ref="C25",
        evidence=(_version(comfyui, f"{KV_CACHE} or newer"),),
        remedy=remedies.update(comfyui),
    )


def is_kv(name: str) -> bool:
    """Whether a file's name says that it is klein's KV variant; nothing in the file does."""
    return re.search(r"klein.*[-_]kv(?![a-z])", name.lower()) is not None


# Its custom nodes


@check("preview-crash")
def preview_crash(comfyui: ComfyUI) -> Problem | None:
    """Custom nodes that draw previews know FLUX.2's latents."""
    pack = _pack(comfyui, "comfyui-videohelpersuite")
    if pack is None or pack.disabled or pack.current is not False:
        return None
    return Problem(
        f"{pack.name} is too old for previews of FLUX.2",
        "Its animated previews expect latents of 32 channels and get 128; with them switched on the run stops.",
        f"{shell('git', '-C', f'{comfyui.path}/custom_nodes/{pack.name}', 'pull')}   "
        "# or start ComfyUI with --preview-method none",
        severity="warning",
        ref="D08",
        evidence=(Evidence(f"{pack.name}/videohelpersuite/latent_preview.py", "no latent_rgb_factors_reshape", "it"),),
        remedy=remedies.update_node(comfyui, pack),
    )


@check("custom-node-broken")
def custom_node_broken(comfyui: ComfyUI) -> Iterator[Problem]:
    """Every custom node could be imported when ComfyUI last started."""
    if comfyui.log is None:
        raise CouldNotCheck(f"{comfyui.name} has no log of a start.")
    for pack in comfyui.custom_nodes:
        if pack.failure and not pack.disabled:
            yield Problem(
                f"the custom node {pack.name} could not be imported",
                f"ComfyUI's log says: {pack.failure.rstrip('.')}.",
                f'start ComfyUI with --disable-all-custom-nodes to go without, or rename it "{pack.name}.disabled"',
                severity="warning",
                path=f"{comfyui.path}/custom_nodes/{pack.name}",
                ref="E07",
                evidence=(Evidence(comfyui.log or "the log", pack.failure[:200], "no failed import"),),
                remedy=remedies.switch_node(comfyui, pack),
            )


# Its arguments


@check("dynamic-vram-trouble")
def dynamic_vram_trouble(comfyui: ComfyUI, hardware: Hardware) -> Problem | None:
    """Dynamic VRAM is off where it is known to give trouble."""
    troubled = (comfyui.version or "").startswith(f"{TROUBLED}.")
    in_wsl = bool(hardware.wsl) and comfyui.dynamic_vram is True
    if not _dynamic(comfyui) or not (troubled or in_wsl):
        return None
    where = f"ComfyUI {comfyui.version}" if troubled else "WSL"
    return Problem(
        f"dynamic VRAM is on in {comfyui.name}",
        f"With {where} people report runs that hang, fail to allocate, or load the model again each time.",
        "start ComfyUI with --disable-dynamic-vram if that happens, or update it",
        severity="warning",
        ref="D10",
        evidence=(
            _version(comfyui, f"no {TROUBLED}.x"),
            _dynamic_evidence(comfyui),
            _arguments(comfyui, "--disable-dynamic-vram"),
        ),
        remedy=remedies.start_with(comfyui, add="--disable-dynamic-vram"),
    )


@check("lowvram-does-nothing")
def lowvram_does_nothing(comfyui: ComfyUI) -> Problem | None:
    """Each memory argument does what it says."""
    if with_arguments(comfyui).argument("--lowvram") is None or not _dynamic(comfyui):
        return None
    return Problem(
        f"--lowvram does nothing in {comfyui.name}",
        "With dynamic VRAM, which is on, ComfyUI ignores it.",
        "leave --lowvram out; --reserve-vram 1 or --vram-headroom 1 keep room free, and an fp8 file needs half",
        severity="warning",
        ref="D11",
        evidence=(_arguments(comfyui, "no --lowvram"), _dynamic_evidence(comfyui)),
    )


@check("black-picture-arguments")
def black_picture(comfyui: ComfyUI) -> Problem | None:
    """No argument is set that is known for black pictures."""
    reasons = {
        "--fp16-vae": "The VAE overflows in fp16; ComfyUI's own help says that it might cause black images.",
        "--use-sage-attention": "SageAttention gives black or broken pictures with some models and cards.",
        "--force-fp16": "klein is made for bf16; in fp16 its numbers overflow.",
    }
    flag = next((flag for flag in reasons if with_arguments(comfyui).argument(flag) is not None), None)
    if flag is None:
        return None
    return Problem(
        f"{comfyui.name} is started with {flag}",
        reasons[flag],
        f"leave {flag} out of the arguments if pictures come out black",
        name="black-picture",
        severity="warning",
        ref="D07",
        evidence=(_arguments(comfyui, f"no {flag}"),),
        remedy=remedies.start_with(comfyui, flag),
    )


@check("sage-attention-missing")
def sage_attention_missing(comfyui: ComfyUI, comfyui_environment: Environment) -> Problem | None:
    """SageAttention is installed where ComfyUI is told to use it."""
    if (
        with_arguments(comfyui).argument("--use-sage-attention") is None
        or "sageattention" in comfyui_environment.packages
    ):
        return None
    return Problem(
        f"{comfyui.name} is told to use SageAttention, which is not installed",
        "With --use-sage-attention and without the package ComfyUI ends at once.",
        "leave --use-sage-attention out of the arguments",
        ref="A23",
        evidence=(_arguments(comfyui, "no --use-sage-attention"),),
        remedy=remedies.start_with(comfyui, "--use-sage-attention"),
    )


@check("cuda-malloc-unsupported")
def cuda_malloc_unsupported(comfyui: ComfyUI, hardware: Hardware) -> Problem | None:
    """cudaMallocAsync is not forced on a card that lacks it."""
    cards = [gpu.name for gpu in hardware.gpus if not gpu.hidden and NO_CUDA_MALLOC.search(gpu.name)]
    if not cards or with_arguments(comfyui).argument("--cuda-malloc") is None:
        return None
    return Problem(
        f"{comfyui.name} is told to use cudaMallocAsync, which {cards[0]} lacks",
        "With --cuda-malloc such a card ends in `CUDA error: operation not supported`.",
        "start ComfyUI with --disable-cuda-malloc in the place of --cuda-malloc",
        ref="A29",
        evidence=(_arguments(comfyui, "--disable-cuda-malloc"),),
        remedy=remedies.start_with(comfyui, "--cuda-malloc", "--disable-cuda-malloc"),
    )


@check("fp8-kernels-missing")
def fp8_kernels_missing(
    comfyui: ComfyUI, comfyui_environment: Environment, comfyui_files: Sequence[FoundFile], hardware: Hardware
) -> Problem | None:
    """ComfyUI has its fast kernels for the fp8 files."""
    cuda, gpu = comfyui_environment.torch_cuda, chosen_card(hardware)
    fp8 = [found for found in comfyui_files if getattr(found.identity.facts, "scales", None)]
    if cuda is None:
        raise CouldNotCheck(f"No torch for CUDA was found in the Python of {comfyui.name}.")
    if not fp8 or _numbers(cuda) >= (13,) or gpu.capability < (7, 5):
        return None
    old = gpu.driver is not None and older(gpu.driver, KERNEL_DRIVER)
    packages, index = torch_for(hardware)
    line, remedy = pip_line(comfyui_environment, packages, index)
    return Problem(
        f"{comfyui.name} has no fast kernels for {fp8[0].path.name}",
        f"They need torch for CUDA 13{f', and that driver {KERNEL_DRIVER}' if old else ''}; this torch is for CUDA "
        f"{cuda}{f', the driver {gpu.driver}' if old else ''}. Pictures come out the same, more slowly.",
        f"install driver {KERNEL_DRIVER} from {DRIVERS}, then: kleinctl doctor" if old else line,
        severity="warning",
        ref="A19",
        evidence=(Evidence("torch", f"CUDA {cuda}", "CUDA 13.0"), Evidence(gpu.name, f"driver {gpu.driver}")),
        remedy=None if old else remedy,
    )


# Where it looks


@check("extra-paths-wrong")
def extra_paths_wrong(comfyui: ComfyUI) -> Iterator[Problem]:
    """Every folder in extra_model_paths.yaml is there, under a name that ComfyUI knows."""
    file = _last(comfyui.yaml_file)
    if comfyui.yaml_error:
        yield _yaml_problem(
            comfyui,
            f"{file} cannot be read",
            f"ComfyUI stops or leaves it out: {comfyui.yaml_error.rstrip('.')}.",
            comfyui.yaml_error,
        )
    for each in comfyui.unlisted:
        yield _yaml_problem(
            comfyui,
            f"{file} leaves out {each.path}",
            f"Weights lie there, and no line names it; wanted is a line `{each.kind}: ...` below line {each.line}.",
            f"no {each.kind} line for {each.path}",
            severity="warning",
        )
    kinds = dict.fromkeys((each.file, OLD_NAMES.get(each.kind, each.kind)) for each in comfyui.extra_paths)
    for path, kind in kinds:
        lines = [e for e in comfyui.extra_paths if e.file == path and OLD_NAMES.get(e.kind, e.kind) == kind]
        meant = difflib.get_close_matches(kind.lower(), KINDS, 1, 0.8) if kind not in KINDS else []
        if meant and kind != meant[0]:
            yield _line_problem(lines[0], f"names {kind}, which no loader reads", f"Wanted is `{meant[0]}`.")
        elif kind in HOMES.values() and not any(each.exists for each in lines):
            yield _line_problem(lines[0], "names a folder that is not there", _why_absent(lines[0]))


@check("other-base-directory")
def other_base_directory(comfyui: ComfyUI, system: System) -> Problem | None:
    """ComfyUI reads the models folder that people put their files in."""
    if comfyui.unread:
        base = comfyui.argument("--models-directory") or comfyui.argument("--base-directory")
        count = len(comfyui.unread)
        named = bool(comfyui.yaml_patch) and not (comfyui.yaml_error or comfyui.unlisted)
        text = "\n".join((*comfyui.yaml_patch, ""))
        return Problem(
            f"{comfyui.name} does not read its own models folder",
            f"Its arguments name {base}; {count} weights file{'s' * (count > 1)} lie in {comfyui.path}/models instead.",
            f"name {comfyui.path}/models in {comfyui.path}/extra_model_paths.yaml, or move the files to {base}",
            path=comfyui.unread[0],
            ref="E09",
            evidence=(_arguments(comfyui, "the folder with the files"),),
            remedy=Remedy("write-text", {"path": comfyui.yaml_file, "text": text}, "ask") if named else None,
        )
    for server in system.servers:
        base = argument(server.arguments, "--base-directory")
        if base and comfyui.layout in ("base-directory", "models") and not _same(base, comfyui.path):
            return Problem(
                f"the ComfyUI that runs at port {server.port} does not read {comfyui.path}",
                f"It was started with --base-directory {base}.",
                shell("kleinctl", "doctor", "--comfyui", base),
                severity="warning",
                ref="E09",
                evidence=(Evidence(f"port {server.port}", f"--base-directory {base}", comfyui.path),),
            )
    return None


# The server


@check("port-in-use")
def port_in_use(system: System) -> Iterator[Problem]:
    """ComfyUI's port is free, or ComfyUI has it."""
    for server in known(system).servers:
        if server.comfyui is None:
            yield Problem(
                f"port {server.port} is taken by another program",
                "ComfyUI wants it and would end with `error while attempting to bind on address`.",
                f"start ComfyUI with --port {server.port + 1}",
                severity="warning",
                ref="E06",
                evidence=(Evidence(f"port {server.port}", "an answer that is not ComfyUI's", "ComfyUI or nothing"),),
            )


@check("memory-held-by-comfyui")
def memory_held_by_comfyui(system: System, hardware: Hardware) -> Problem | None:
    """A running ComfyUI leaves the card's memory to others."""
    gpu = chosen_card(hardware)
    server = next((each for each in known(system).servers if each.comfyui is not None), None)
    if server is None:
        raise CouldNotCheck("No ComfyUI answers on this machine.")
    held = gpu.vram_bytes - gpu.vram_free_bytes
    if held < 4 * GIB:
        return None
    return Problem(
        f"the ComfyUI that runs at port {server.port} holds the card's memory",
        f"{gib(held)} of {gib(gpu.vram_bytes)} are taken; ComfyUI keeps its models after a run.",
        remedies.free_line(server.port),
        severity="warning",
        ref="E13",
        evidence=(Evidence(gpu.name, f"{gib(gpu.vram_free_bytes)} free", "the card's memory free"),),
        remedy=Remedy("free-comfyui", {"url": f"http://127.0.0.1:{server.port}"}, "ask"),
    )


# What these share


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _last(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _same(one: str, other: str) -> bool:
    plain = [re.sub(r"[\\/]+", "/", each).rstrip("/").lower() for each in (one, other)]
    return plain[0] == plain[1]


def _pack(comfyui: ComfyUI, name: str) -> CustomNode | None:
    """The pack of custom nodes of that id; one that is switched off only where there is no other."""
    packs = [each for each in comfyui.custom_nodes if name in (each.id, each.name.lower().removesuffix(".disabled"))]
    return min(packs, key=lambda each: each.disabled, default=None)


def _folder(comfyui: ComfyUI, kind: str) -> str:
    """The folder of a kind to put files in: the one that bears its name."""
    folders = comfyui.folders.get(kind, ())
    return next((each for each in folders if _last(each) == kind), f"{comfyui.path}/models/{kind}")


def _version(comfyui: ComfyUI, wanted: str) -> Evidence:
    return Evidence(f"ComfyUI in {comfyui.path}", comfyui.version or "unknown", wanted)


def _arguments(comfyui: ComfyUI, wanted: str) -> Evidence:
    looked_at = comfyui.script or f"arguments of {comfyui.name}"
    return Evidence(looked_at, " ".join(comfyui.arguments)[:300], wanted)


def _official(found: FoundFile) -> Remedy | None:
    """Put the manifest's file in the place of this one, where its place says which that is."""
    arguments = {"model": found.model, "part": found.part, "path": str(found.path)}
    return Remedy("replace-file", arguments, "ask") if found.part else None


def _dynamic(comfyui: ComfyUI) -> bool:
    """Whether dynamic VRAM is on: its newest log says so, or its version does, unless its arguments switch it off."""
    if any(comfyui.argument(flag) is not None for flag in STATIC):
        return False
    if comfyui.dynamic_vram is not None:
        return comfyui.dynamic_vram
    return comfyui.version is not None and not older(comfyui.version, DYNAMIC)


def _dynamic_evidence(comfyui: ComfyUI) -> Evidence:
    if comfyui.dynamic_vram:
        return Evidence(comfyui.log or "the log", "DynamicVRAM support detected and enabled")
    return Evidence("ComfyUI's version", f"{comfyui.version}: on by default since {DYNAMIC}")


def _misplaced(comfyui: ComfyUI, found: FoundFile, what: str, why: str, ref: str) -> Problem:
    to = f"{_folder(comfyui, HOMES[found.identity.role])}/{found.path.name}"
    return Problem(
        what,
        why,
        f"{_doctor(comfyui)}   # moves it to {HOMES[found.identity.role]}",
        path=str(found.path),
        ref=ref,
        evidence=(Evidence(found.path.name, found.identity.saw, f"in {HOMES[found.identity.role]}"),),
        remedy=Remedy("move-file", {"path": str(found.path), "to": to}, "ask"),
    )


def _yaml_problem(comfyui: ComfyUI, what: str, why: str, found: str, **more: str) -> Problem:
    remedy = Remedy("write-text", {"path": comfyui.yaml_file, "text": "\n".join((*comfyui.yaml_patch, ""))}, "ask")
    fix = _doctor(comfyui) if comfyui.yaml_patch else f"edit {comfyui.yaml_file}"
    return Problem(
        what,
        why,
        fix,
        path=comfyui.yaml_file,
        ref="E05",
        evidence=(Evidence(comfyui.yaml_file, found, "lines that ComfyUI reads"),),
        remedy=remedy if comfyui.yaml_patch else None,
        severity="warning" if more.get("severity") == "warning" else "error",
    )


def _line_problem(line: ExtraPath, what: str, why: str) -> Problem:
    return Problem(
        f"{_last(line.file)}, line {line.line}, {what}",
        why,
        f"edit line {line.line} of {line.file}",
        severity="warning",
        path=line.file,
        ref="E05",
        evidence=(Evidence(f"{line.file}:{line.line}", f"{line.kind}: {line.path}", "a folder that is there"),),
    )


def _why_absent(line: ExtraPath) -> str:
    """Which slip keeps a folder from being found."""
    if "~" in line.path:
        return f"`~` stands for the home folder in base_path alone; ComfyUI looks for {line.path}."
    if re.search(r"%\w+%|\$\w+", line.path):
        return f"A variable in it has no value; ComfyUI looks for {line.path}."
    if "\\" in line.path and not re.match(r"[A-Za-z]:|\\\\", line.path):
        return f"A backslash separates no folders here; ComfyUI looks for {line.path}."
    return f"ComfyUI looks for {line.path} for {line.kind}, and there is no such folder."
