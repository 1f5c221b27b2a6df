"""What logs say when it goes wrong, and what that means: the table PATTERNS, and functions that read the numbers.

The texts are those of ComfyUI (0.3.64 to 0.29), diffusers, transformers, huggingface_hub, safetensors, PyTorch, pip,
InvokeAI and the system, as people have reported them; `ref` is the entry of the failure catalogue.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from kleinctl.checks import remedies
from kleinctl.logs import LogPattern, Sighting
from kleinctl.problem import Problem, Remedy
from kleinctl.units import GIB, KIB, MIB, gib

if TYPE_CHECKING:
    from kleinctl.facts import FoundFile
    from kleinctl.hardware import Gpu

Severity = Literal["error", "warning"]

DOCTOR, PLAN, INSTALL = "kleinctl doctor", "kleinctl plan", "kleinctl install"
LOOK = "kleinctl doctor --comfyui FOLDER   # the folder of your ComfyUI"
FETCH = "kleinctl install --model klein-4b --backend comfyui --comfyui FOLDER   # the folder of your ComfyUI"
UPDATE = (
    "git pull, then: python -s -m pip install -r requirements.txt   # in ComfyUI; portable: update\\update_comfyui.bat"
)


# Shapes. A transformer reads its text from three encoder layers side by side, and its latents in patches of 2 x 2.

ENCODERS = {
    7680: "Qwen3 4B",
    12288: "Qwen3 8B",
    15360: "Mistral Small, which belongs to FLUX.2 dev",
    2560: "one layer of Qwen3 4B instead of three",
    4096: "T5-XXL, which belongs to FLUX.1, or of one layer of Qwen3 8B",
    5120: "one layer of Mistral Small instead of three",
    768: "CLIP-L, for which ComfyUI takes any file that it does not know",
}
TRANSFORMERS = {
    7680: "klein 4B takes 7680 numbers a token, those of Qwen3 4B",
    12288: "klein 9B takes 12288 numbers a token, those of Qwen3 8B",
    15360: "FLUX.2 dev takes 15360 numbers a token, those of Mistral Small",
    4096: "FLUX.1 takes 4096 numbers a token, those of T5-XXL",
}
#: Widths of a transformer's hidden states. FLUX.1 shares klein 4B's.
HIDDEN = {3072: "klein 4B", 4096: "klein 9B", 6144: "FLUX.2 dev"}
#: The second operand's other number, which is the hidden width; 128 in the models of tests.
WIDTHS = (128, *HIDDEN)
REFS = {(12288, 7680): "C01", (15360, 7680): "C02", (4096, 7680): "C04", (768, 7680): "C04", (7680, 12288): "C05"}
#: Who takes so many numbers for each image token.
IMAGE_INPUTS = {64: "FLUX.1 does", 128: "FLUX.2 does (and FLUX.1 Depth and Canny)"}
#: What makes and reads latents of so many channels.
LATENTS = {
    4: "of SD or SDXL",
    16: "of FLUX.1, SD3 or Qwen-Image",
    32: "of FLUX.2",
    128: "of FLUX.2",
}


def _shapes(at: Sighting) -> Problem | None:
    given, rows, columns = int(at["given"]), int(at["rows"]), int(at["columns"])
    if (given, rows, columns) == (2560, 4096, 2560):
        return Problem(
            f"{_encoder_file(at, 0)} is Qwen3-VL",
            "klein needs the text-only Qwen3 4B; the picture-reading Qwen3-VL 4B has layers of another shape: "
            "2560 numbers met a layer for 4096.",
            FETCH,
            name="text-encoder-vl",
            ref="C06",
        )
    if columns not in WIDTHS or (rows == 4096 and columns != 3072):
        return None
    if rows in IMAGE_INPUTS:
        return Problem(
            "the VAE or the empty latent does not fit the transformer",
            f"The transformer takes {rows} numbers an image token, as {IMAGE_INPUTS[rows]};"
            f" it was given {given}{', as FLUX.2 has' if given in (128, 512) else ''}.",
            LOOK,
            name="vae-mismatch",
            ref="C10",
        )
    if rows not in TRANSFORMERS:
        return None
    one_layer = given * 3 == rows or (given, rows) == (2560, 12288)
    why = f"{TRANSFORMERS[rows]}; it was given {given}, those of {ENCODERS.get(given, 'another encoder')}."
    if one_layer:
        return Problem(
            "the text encoder was loaded for another model",
            f"{why} CLIPLoader's type is not flux2, or this ComfyUI is older than klein (0.9.2).",
            "set `type` of the CLIPLoader node to flux2; if it is not offered, update ComfyUI to 0.9.2 or newer",
            name="text-encoder-not-stacked",
            ref="C03",
        )
    return Problem(
        f"{_encoder_file(at, given)} does not fit the transformer",
        why,
        FETCH if at.setting("clip_name") or "Requested to load" in at.match.string else DOCTOR,
        name="text-encoder-width",
        ref=REFS.get((given, rows)),
    )


def _encoder_file(at: Sighting, given: int) -> str:
    """The text encoder that gave so many numbers: as the log names it, or as the machine has exactly one such."""
    wide = [
        each.path.name
        for each in (at.facts.files if at.facts else ())
        if each.identity.role == "text-encoder" and 3 * getattr(each.identity.facts, "width", 0) == given
    ]
    return _part(at, "clip_name", "qwen|t5|mistral|clip|encoder") or (wide[0] if len(wide) == 1 else "the text encoder")


def _vae_file(at: Sighting) -> str:
    return _part(at, "vae_name", "vae|ae[.]|decoder") or "the VAE"


def _part(at: Sighting, setting: str, like: str) -> str:
    """A part's file, which the log names nearby or in its workflow. Near an error any file may stand."""
    return at.file if re.search(like, at.file, re.IGNORECASE) else at.setting(setting)


def _variants(at: Sighting) -> Problem:
    wanted, found = at["wanted"], at["found"]
    return Problem(
        "the text encoder does not fit the transformer",
        f"{at['model'] or 'The transformer'} needs {wanted or 'another encoder'}; it was "
        f"given {found or 'a different one'}. klein 4B has Qwen3 4B, and klein 9B has Qwen3 8B.",
        "choose the Qwen3 encoder of the same size, or let it come from the model's own folder",
        name="text-encoder-width",
        ref="C05" if "8b" in wanted.lower() else "C01",
    )


def _convolution(at: Sighting) -> Problem | None:
    wanted, given = int(at["wanted"]), int(at["given"])
    if wanted not in LATENTS or given not in LATENTS:
        return None
    bare = " without its normalisation (bn.running_mean)" if (wanted, given) == (32, 128) else ""
    return _vae(
        f"{_vae_file(at)} does not read this model's latents",
        f"The model makes latents of {given} channels, those {LATENTS[given]}; this VAE reads {wanted}, those "
        f"{LATENTS[wanted]}{bare}.",
    )


def _reference_latent(at: Sighting) -> Problem:
    given = int(at["given"])
    return _vae(
        f"{_vae_file(at)} made the reference picture's latents for another model",
        f"The model reads latents of 128 channels, those of FLUX.2; the reference has {given}, those "
        f"{LATENTS.get(given, 'of another VAE')}.",
    )


def _latents(at: Sighting) -> Problem:
    """Latents of two models met: one of them was made for the other's VAE."""
    own, other = int(at["a"]), int(at["b"])
    return _vae(
        "the VAE made latents for another model",
        f"Latents of {own} channels, those {LATENTS[own]}, met some of {other}, those {LATENTS[other]}.",
    )


def _vae(what: str, why: str) -> Problem:
    return Problem(what, f"{why} klein needs flux2-vae.safetensors.", FETCH, name="vae-mismatch", ref="C09")


def _state_dict(at: Sighting) -> Problem | None:
    """`Error(s) in loading state_dict for X`: which part it is follows from the class, what it is from the shapes."""
    loader = at["loader"].lower()
    near = at.near(2, 8)
    size = re.search(
        r"size mismatch for (\S{1,120}): copying a param with shape torch\.Size\(\[([\d, ]{1,40})\]\) from checkpoint, "
        r"the shape in current model is torch\.Size\(\[([\d, ]{1,40})\]\)",
        near,
    )
    shapes = f" {size[1]} is [{size[2]}] in the file, and [{size[3]}] was expected." if size else ""
    for words, part, name, setting in (
        (("llama", "qwen", "mistral", "t5", "clip"), "text encoder", "wrong-text-encoder", "clip_name"),
        (("autoenc", "vae"), "VAE", "wrong-vae", "vae_name"),
        (("flux",), "transformer", "wrong-transformer", "unet_name"),
    ):
        if any(word in loader for word in words):
            file = at.file or at.setting(setting)
            if file.endswith(".gguf") or "gguf" in near.lower():
                return _gguf(file or "a GGUF file", f"The GGUF node is older than this model.{shapes}")
            return Problem(
                f"{file or f'the {part}'} is not the {part} that it was loaded as",
                f"It was loaded as {at['loader']}, and its layers have other shapes.{shapes}",
                f"kleinctl identify {file}" if file else LOOK,
                name=name,
                ref="B16",
            )
    return None


def _tokenizer(at: Sighting) -> Problem | None:
    if at.node != "CLIPLoader" and not re.search(r"load_clip|tekken|mistral", at.frames):
        return None
    return Problem(
        f"{at.file or at.setting('clip_name') or 'the text encoder'} is Mistral Small",
        "klein needs Qwen3; Mistral Small belongs to FLUX.2 dev, and this file lacks its tokenizer (tekken_model).",
        FETCH,
        name="wrong-text-encoder",
        ref="C02",
    )


# Files


#: What a file is that its name does not tell.
KINDS = {
    "truncated": "cut short",
    "lfs-pointer": "a Git LFS pointer, not the file it stands for",
    "web-page": "a web page that was saved instead of the file",
    "json": "a JSON document, most likely a hub's error message",
    "zeros": "nothing but zeros",
    "empty": "empty",
    "pickle": "a pickle",
}
KIND_REFS = {"truncated": "B02", "lfs-pointer": "B03", "pickle": "B03", "gguf": "C21"}


def _named(at: Sighting) -> FoundFile | None:
    """The file that the log speaks of, as this machine has it; else the only broken one it has."""
    files = at.facts.files if at.facts else ()
    named = [each for each in files if each.path.name == _loaded(at)]
    broken = [each for each in files if each.identity.kind in KINDS]
    return named[0] if named else broken[0] if len(broken) == 1 and not _loaded(at) else None


def _loaded(at: Sighting) -> str:
    """The file whose loading failed: as the log names it, or as the node that failed was told to load."""
    inputs = {"UNETLoader": "unet_name", "CLIPLoader": "clip_name", "VAELoader": "vae_name"}
    return at.file or (at.setting(inputs[at.node]) if at.node in inputs else "")


def _damaged(name: str, why: str, ref: str) -> Callable[[Sighting], Problem]:
    """A file whose header cannot be read. What it really is, the machine's own file tells."""

    def explain(at: Sighting) -> Problem:
        found = _named(at)
        kind = found.identity.kind if found else ""
        if found and kind == "gguf":
            return _gguf(
                found.path.name, "It is a GGUF file, whatever its name; a loader for safetensors was given it."
            )
        if found is None or kind not in KINDS:
            return Problem(
                f"{_loaded(at) or 'a weights file'} is damaged",
                why,
                "kleinctl doctor --fix   # with --comfyui FOLDER where it lies in a ComfyUI",
                name,
                ref=ref,
            )
        return Problem(
            f"{found.path.name} is {KINDS[kind]}",
            f"{why} This file: {found.identity.saw.rstrip('.')}.",
            found.fix or FETCH,
            name=f"weights-{kind}",
            path=str(found.path),
            ref=KIND_REFS.get(kind, "B04"),
            remedy=_replace(found),
        )

    return explain


def _replace(found: FoundFile) -> Remedy | None:
    if not found.part:
        return None
    arguments = {"model": found.model, "part": found.part, "path": str(found.path)}
    return Remedy("replace-file", arguments, "auto" if found.place == "store" else "ask")


def _header_too_large(at: Sighting) -> Problem:
    if _loaded(at).endswith(".gguf"):
        return _gguf(_loaded(at), "A loader for safetensors was given a GGUF file.")
    why = "It is no safetensors file, but a Git LFS pointer, a web page or another format."
    return _damaged("weights-not-safetensors", why, "B03")(at)


def _gguf(file: str, why: str) -> Problem:
    return Problem(
        f"{file} needs ComfyUI-GGUF, in a version that knows klein",
        why,
        "git clone https://github.com/city96/ComfyUI-GGUF custom_nodes/ComfyUI-GGUF   # or git pull in it",
        name="gguf-needs-node",
        ref="C21",
    )


def _gguf_architecture(at: Sighting) -> Problem:
    kind = at["architecture"]
    if kind.startswith(("qwen3vl", "qwen2vl")):
        return Problem(
            f"{at.file or 'the GGUF text encoder'} is {kind}, which reads pictures",
            f"klein needs the text-only Qwen3 4B (architecture qwen3); this file says {kind}.",
            "use a GGUF of Qwen3-4B, or: kleinctl install --model klein-4b --backend comfyui",
            name="text-encoder-vl",
            ref="C06",
        )
    return _gguf(at.file or "the GGUF file", f"The installed GGUF node does not know the architecture {kind}.")


def _not_detected(at: Sighting) -> Problem:
    file, path = at.file, re.split(r"(?<=\.safetensors)|(?<=\.gguf)|(?<=\.ckpt)", at["path"])[0]
    found = _named(at)
    if "checkpoints" in path or not path:
        return _in_checkpoints(file or "a file in checkpoints", "ComfyUI found no whole checkpoint in it")
    what = f" Here it is {found.identity.saw.rstrip('.')}." if found else ""
    return Problem(
        f"{file or 'a file'} is no transformer that this ComfyUI knows",
        f"ComfyUI could not detect a model in it: another part of a model, another format, or a newer one.{what}",
        f"kleinctl identify {_quoted(path)}",
        name="wrong-transformer",
        ref="B16",
    )


def _in_checkpoints(what: str, why: str) -> Problem:
    return Problem(
        f"{what} is a transformer alone, loaded as a whole checkpoint",
        f"{why}. klein's transformer, text encoder and VAE are three files, for three loaders.",
        "move it to models/diffusion_models and use the nodes UNETLoader, CLIPLoader (type flux2) and VAELoader",
        name="transformer-in-checkpoints",
        ref="C19",
    )


def _quoted(path: str) -> str:
    return f'"{path}"' if re.search(r"[^\w./\\:-]", path) else path


def _lora_shape(at: Sighting) -> Problem:
    """A LoRA's product has `size` numbers where `rows` x `columns` are wanted; both grow with the hidden width."""
    rows, columns, size = int(at["rows"]), int(at["columns"]), int(at["size"])
    key = at["key"] if "key" in at.match.re.groupindex else "One of its layers"
    wanted = f"{key} wants {rows} x {columns} = {rows * columns} numbers in {HIDDEN.get(columns, 'this model')}"
    if columns == 3072 and size in (12288 * 3072, 21504 * 3072, 3072 * 15360):
        return _flux1_lora(f"{wanted}; this LoRA has {size}, as FLUX.1.")
    width = math.isqrt(size * columns // rows)
    if width in HIDDEN:
        return _lora(f"{wanted}; this LoRA has {size} = {size // width} x {width}, so it is for {HIDDEN[width]}.")
    return _lora(f"{wanted}; this LoRA has {size}, for another model.")


def _square(at: Sighting) -> bool:
    """Whether the size is that of the same layer in a model of another width."""
    rows, columns, size = int(at["rows"]), int(at["columns"]), int(at["size"])
    width = math.isqrt(size * columns // rows)
    return width in HIDDEN and width != columns and size * columns == rows * width**2


def _lora_keys(at: Sighting) -> Problem:
    count = at.match.string.count("lora key not loaded")
    double, single = _highest("double_blocks", at), _highest("single_blocks", at)
    if double >= 8 or single >= 38:
        return _flux1_lora(f"{count} of its keys have no place in this model, as those of block {max(double, single)}.")
    which = "9B" if double >= 5 or single >= 20 else "another model or in another format"
    return _lora(
        f"{count} of its keys have no place in this model; it is for {'klein 9B' if which == '9B' else which}.",
        "error" if count >= 20 or which == "9B" else "warning",
    )


def _highest(blocks: str, at: Sighting) -> int:
    """The highest number of a block whose key was not loaded, -1 without one."""
    keys = re.findall(rf"lora key not loaded: \S{{0,80}}?{blocks}[._](\d{{1,3}})", at.match.string[-(2**18) :])
    return max(map(int, keys), default=-1)


def _lora(why: str, severity: Severity = "error") -> Problem:
    return Problem(
        "the LoRA does not fit the model",
        f"{why[:1].upper()}{why[1:]} What does not fit is left out, and the picture is made without it.",
        "use a LoRA for this very model; kleinctl identify LORA.safetensors says which it is for",
        name="lora-mismatch",
        severity=severity,
        ref="C16",
    )


def _flux1_lora(why: str) -> Problem:
    return Problem(
        "the LoRA is for FLUX.1",
        f"{why} FLUX.1 and klein 4B are both 3072 wide, so a part of it fits by accident.",
        "use a LoRA for FLUX.2 [klein] 4B",
        name="lora-flux1",
        ref="C17",
    )


# Memory


_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}
_AMOUNT = r"(\d{1,12}(?:\.\d{1,4})?) (bytes|[KMGT]iB)"
_MEMORY = {
    "wanted": rf"Tried to allocate {_AMOUNT}|Requested\s{{0,20}}: {_AMOUNT}",
    "total": rf"total capacity of {_AMOUNT}|; {_AMOUNT} total capacity|Device limit\s{{0,20}}: {_AMOUNT}",
    "free": rf"of which {_AMOUNT} is free|; {_AMOUNT} free|Free \(according to CUDA\)\s{{0,20}}: {_AMOUNT}",
    "torch": rf"{_AMOUNT} is allocated by PyTorch|{_AMOUNT} already allocated|Currently allocated\s{{0,20}}: {_AMOUNT}",
    "own": rf"this process has {_AMOUNT} memory in use|; {_AMOUNT} reserved in total",
}
#: Bytes a CUDA context takes beside what torch allocates, at most.
CONTEXT = 0.7 * GIB


def _out_of_vram(at: Sighting) -> Problem:
    text = re.sub(r"\s{1,99}", " ", at.match.string[at.match.start() : at.match.start() + 1200])
    amounts = {name: _amount(regex, text) for name, regex in _MEMORY.items()}
    total, free, wanted = amounts["total"], amounts["free"], amounts["wanted"]
    own = amounts["own"] or (amounts["torch"] or 0) + CONTEXT
    others = max(0.0, total - free - own) if total and free is not None and amounts["torch"] is not None else 0.0
    parts = [
        f"{gib(wanted)} more were wanted" if wanted else "There was no room for more",
        f"of {gib(total)} there were {gib(free)} free" if total and free is not None else "",
        f"{gib(amounts['torch'])} were this program's own" if amounts["torch"] is not None else "",
        f"about {gib(others)} other programs'" if others > 0.5 * GIB else "",
    ]
    why = f"{'; '.join(filter(None, parts))}."
    if total and others > total / 4:
        return Problem(
            "other programs have taken the card's memory",
            why,
            "nvidia-smi   # shows who has it: close browsers and other model servers, or POST /free to ComfyUI",
            name="vram-taken",
            ref="A16",
        )
    if re.search(r"\bvae\b|vae[./\\_]|VAEDecode|\bdecode\b|autoencoder", _last_frames(at)):
        return Problem(
            "the card's memory ran out while the picture was decoded",
            f"{why} Every step was done; decoding needs memory that grows with the picture's size.",
            "kleinctl run --backend staged   # or the node VAEDecodeTiled with tiles of 512 and overlap 64",
            name="decode-memory",
            ref="D02",
        )
    return Problem("the card's memory ran out", why, PLAN, name="card-memory-full", ref="D01", remedy=_least_memory(at))


def _least_memory(at: Sighting) -> Remedy | None:
    """`kleinctl run` with the backend that needs least; nothing that would help ComfyUI."""
    if re.search(r"got prompt|Requested to load |[Cc]omfy", at.match.string):
        return None
    return Remedy("set-config", {"table": "run", "key": "backend", "value": "staged-decode"}, "ask")


def _last_frames(at: Sighting) -> str:
    """The last frames of the traceback that ends here, but for torch's own."""
    files = [
        line for line in at.frames.split("\n") if 'File "' in line and "torch" + "/" not in line.replace("\\", "/")
    ]
    return "\n".join(files[-8:])


def _amount(regex: str, text: str) -> float | None:
    found = re.search(regex, text)
    if not found:
        return None
    number, unit = (each for each in found.groups() if each)
    return float(number) * _UNITS[unit]


def _out_of_ram(at: Sighting) -> Problem:
    text = at.match.string
    ram = re.search(r"total RAM (\d{3,8}) MB", text)
    has = f" ({gib(int(ram[1]) * MIB)} of it)" if ram else ""
    hardware = at.facts.hardware if at.facts else None
    if "microsoft-standard-WSL" in text or (hardware and hardware.wsl):
        has = has or (f" ({gib(hardware.ram_bytes)} of it)" if hardware else "")
        return Problem(
            "Linux in WSL ran out of memory (RAM)",
            f"A part of the model did not fit into what Windows lends to WSL{has}: by default half of the computer's.",
            "raise memory= and swap= under [wsl2] in %UserProfile%\\.wslconfig, then: wsl --shutdown",
            name="wsl-memory",
            ref="A06",
        )
    return Problem(
        "the machine's memory (RAM) ran out",
        f"A part of the model did not fit into what was free{has}, and the system ended the program.",
        PLAN,
        name="memory-full",
        ref="D03",
        remedy=_least_memory(at),
    )


#: What ComfyUI and others write as they begin to load or work.
_LOADING = re.compile(
    r"got prompt|Requested to load |[Ll]oading (?:pipeline|checkpoint|model|transformer|text)"
    r"|loaded (?:partially|completely)"
    r"|model weight dtype|model_type |load device: |attention in VAE|\d{1,3}%\|"
)


def _silent(at: Sighting) -> Problem | None:
    code = at["code"]
    status = int(code, 0) if code else 1
    above = [line for line in at.near(8, -1).split("\n") if line.strip() and not line.rstrip().endswith(">pause")]
    if status == 0 or not above or not _LOADING.search(above[-1]):
        return None
    from kleinctl.exits import exit_text

    how = f" ({exit_text(status)})" if code else ""
    return Problem(
        "the program ended without a word while it loaded a model",
        f"Its last line is {above[-1].strip()[:120]!r}, and no error follows{how}: mostly memory (RAM) and paging file "
        "are full, seldom a library or the driver crashed.",
        "kleinctl plan   # shows what fits; let Windows manage the paging file's size, close programs, try the fp8 "
        "files",
        name="silent-exit",
        ref="A09",
        remedy=_least_memory(at),
    )


# Drivers, torch and packages


def _driver_too_old(at: Sighting) -> Problem:
    number = at["version"]
    found = (
        f" The driver reaches CUDA {int(number) // 1000}.{int(number) % 1000 // 10} (it says {number})."
        if number
        else ""
    )
    card = at.facts.hardware.gpu if at.facts else None
    found += f" This machine's driver is {card.driver}." if card and card.driver else ""
    return Problem(
        "the NVIDIA driver is too old for this torch",
        f"The installed build of torch needs a newer driver.{found} CUDA 13 builds need driver 580, CUDA 12 builds "
        "525.",
        "install the newest driver from https://www.nvidia.com/drivers, or: kleinctl install   # takes a build that "
        "fits",
        name="driver-too-old",
        ref="A01",
    )


def _no_driver(at: Sighting) -> Problem:
    container = re.search(
        r"docker|/\.dockerenv|containerd|nvidia-container", at.match.string[-(2**18) :], re.IGNORECASE
    )
    if container or (at.facts and at.facts.hardware.container):
        return _no_card_in_container(
            "Inside the container there is no NVIDIA driver: the container was started without the card."
        )
    return Problem(
        "no NVIDIA driver was found", "torch asked for one, to use the card.", DOCTOR, name="no-driver", ref="A13"
    )


def _no_card_in_container(why: str) -> Problem:
    return Problem(
        "the container does not see the card",
        why,
        "sudo nvidia-ctk runtime configure && sudo systemctl restart docker   # then: docker run --gpus all",
        name="container-without-gpu",
        ref="A10",
    )


def _no_kernel(at: Sighting) -> Problem | None:
    """torch lacks code for a card: one too new for it, one too old, or it is an extension that does."""
    extension = re.search(r"site-packages[\\/]+(xformers|flash_attn\w{0,20}|sageattention|triton)\b", at.frames)
    if extension:
        return _extension(extension[1])
    around = at.near(60, 20)
    said = re.search(r"sm_(\d{2,3})\b|cuda capability \(?(\d{1,2})\.(\d)", around)
    card = at.facts.hardware.gpu if at.facts else None
    name = re.search(r"((?:NVIDIA|Tesla|Quadro) [\w .-]{2,50}?)(?: with CUDA capability| which is of)", around)
    named = name[1] if name else card.name if card else "this card"
    capability = _capability(said, card)
    if at["minimum"] and capability >= (7, 5):
        return None  # newer than the build by a minor number, which runs
    if (0, 0) < capability < (7, 5):
        return Problem(
            f"torch no longer has code for {named}",
            f"The card is sm_{capability[0]}{capability[1]}; builds for CUDA 12.8 and newer leave out what is older "
            "than "
            "sm_70, those for CUDA 13 what is older than sm_75.",
            "python -s -m pip install --force-reinstall torch torchvision --index-url "
            "https://download.pytorch.org/whl/cu126",
            name="torch-dropped-card",
            ref="A04",
        )
    sm = f"The card is sm_{capability[0]}{capability[1]}; " if capability > (0, 0) else ""
    return Problem(
        f"torch has no code for {named}",
        f"{sm}{'t' if sm else 'T'}he installed build of torch was made for other generations of cards; RTX 50 "
        "(sm_120) needs "
        "a build for CUDA 12.8 or newer.",
        "python -s -m pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cu130",
        name="torch-lacks-card",
        ref="A03",
    )


def _capability(said: re.Match[str] | None, card: Gpu | None) -> tuple[int, int]:
    if said and said[1]:
        return int(said[1][:-1]), int(said[1][-1])
    if said:
        return int(said[2]), int(said[3])
    major, _, minor = (card.compute_capability if card else "0.0").partition(".")
    return int(major or 0), int(minor or 0)


def _extension(package: str) -> Problem:
    return Problem(
        f"{package} was built for another torch or another card",
        "It is optional: klein runs without it, with torch's own attention.",
        f"python -s -m pip uninstall {package}",
        name="optional-packages-mismatched",
        ref="A22",
    )


def _no_build(at: Sighting) -> Problem:
    from kleinctl.environment import usable

    none = "none of any version" if "from versions: none" in at.near(0, 2) else "others, but not this one"
    python = at.facts.hardware.python if at.facts else None
    return Problem(
        f"pip finds no torch{at['version']} for this Python",
        f"The package index has {none} for this Python and system. klein's packages exist for 64-bit Python 3.10 to "
        "3.13.",
        "kleinctl doctor --fix   # where this Python is the reason; it makes an environment from another",
        name="no-torch-build",
        ref="A05",
        remedy=Remedy("build-environment", {}, "ask") if python and not usable(python) else None,
    )


def _dll(at: Sighting) -> Problem:
    library = re.search(r"([\w.-]{1,60}\.dll)", at.near(0, 3))
    return Problem(
        f"{library[1] if library else 'a library of torch'} cannot be loaded",
        "The Microsoft Visual C++ runtime is missing or too old; torch needs 14.40 or newer.",
        "winget install Microsoft.VCRedist.2015+.x64",
        name="vc-runtime-missing",
        ref="A20",
        remedy=Remedy("install-vc-runtime", {}, "ask") if _on_windows(at) else None,
    )


def _on_windows(at: Sighting) -> bool:
    return at.facts is not None and at.facts.hardware.platform == "win32"


def _unset(at: Sighting, variable: str) -> Remedy | None:
    """Unset a variable, where it is set on this machine."""
    there = at.facts is not None and at.facts.system.variables.get(variable)
    return Remedy("set-variable", {"name": variable, "value": ""}, "ask") if there else None


#: Packages whose absence is no failure: they make something faster.
OPTIONAL = {"triton", "xformers", "flash_attn", "sageattention", "onnxruntime", "insightface", "bitsandbytes", "hf_xet"}


def _missing_module(at: Sighting) -> Problem | None:
    module = at["module"]
    if module.partition(".")[0] in OPTIONAL or "module for custom nodes" in at.near(0, 4):
        return None
    return Problem(
        f"the Python package {module.partition('.')[0]} is missing",
        f"{module} is needed, and the Python that runs it does not have it. Perhaps another Python does.",
        f"python -s -m pip install {module.partition('.')[0]}   # with the very Python that failed; of kleinctl's: "
        f"{INSTALL}",
        name="module-missing",
        ref="A32",
    )


def _transformers_clash(at: Sighting) -> Problem:
    if at["old"]:
        why = f"{at['old']} is not in the installed transformers: it came with a newer version 4."
        return _packages("transformers is too old", why, '"transformers>=5,<6"', "transformers-clash", "A25")
    why = (
        f"transformers 5 removed or moved {at['name']}, which the installed diffusers (or a custom node) still imports."
    )
    return _packages(
        "transformers and diffusers do not fit",
        why,
        '-U "diffusers>=0.40" "transformers>=5,<6"',
        "transformers-clash",
        "A25",
    )


def _hub_clash(at: Sighting) -> Problem:
    said = re.sub(r"\s+", " ", at.near(0, 1)).strip()[:200]
    why = f"transformers 4 wants huggingface-hub below 1.0, diffusers 0.40 wants 1.23 or newer. pip says: {said}"
    return _packages(
        "huggingface-hub does not fit the packages that use it", why, '-U "transformers>=5,<6"', "hub-clash", "A26"
    )


def _packages(what: str, why: str, packages: str, name: str, ref: str) -> Problem:
    return Problem(
        what, why, f"python -s -m pip install {packages}   # of kleinctl's own: {INSTALL}", name=name, ref=ref
    )


def _moved(at: Sighting) -> Problem:
    sequential = bool(at["sequential"])
    return Problem(
        "a pipeline with offloading was moved to the card by hand",
        "Offloading moves each part to the card when it is its turn; `.to('cuda')` moves all at once"
        + (", which sequential offloading refuses." if sequential else ", so memory is as full as without it."),
        "remove `.to('cuda')` after `enable_model_cpu_offload()`",
        name="offload-undone",
        severity="error" if sequential else "warning",
        ref="A28",
    )


def _cuda_malloc(at: Sighting) -> Problem:
    guess = bool(at["guess"])
    return Problem(
        "this card or driver may lack CUDA's asynchronous allocator" if guess else "CUDA refuses an operation",
        "ComfyUI allocates with cudaMallocAsync, which older, mobile and virtual cards may not support.",
        "start ComfyUI with --disable-cuda-malloc",
        name="cuda-malloc-unsupported",
        severity="warning" if guess else "error",
        ref="A29",
    )


def _float32(at: Sighting) -> Problem | None:
    card = at.facts.hardware.gpu if at.facts else None
    if "Device: cpu" in at.match.string:
        return None
    return Problem(
        f"{card.name if card else 'this card'} does not compute in bf16",
        "It computes in float32 instead, which takes twice the memory and is slow; bf16 came with sm_80 (RTX 30).",
        "kleinctl plan   # shows what to expect",
        name="no-bf16",
        severity="warning",
        ref="A17",
    )


def _device(at: Sighting) -> Problem | None:
    """The card in use is the smaller one of several."""
    cards = [gpu for gpu in (at.facts.hardware.gpus if at.facts else ()) if gpu.vram_bytes]
    used = next((gpu for gpu in cards if gpu.name.lower() in at["card"].lower()), None)
    largest = max(cards, key=lambda gpu: gpu.vram_bytes, default=None)
    if used is None or largest is None or largest.vram_bytes < 1.2 * used.vram_bytes:
        return None
    return Problem(
        f"{used.name} is used, and {largest.name} is not",
        f"CUDA's first card has {gib(used.vram_bytes)}, the other {gib(largest.vram_bytes)}: CUDA orders by speed, "
        "nvidia-smi by slot.",
        f"set CUDA_VISIBLE_DEVICES={largest.uuid or 'the UUID that nvidia-smi -L shows'}",
        name="several-cards",
        severity="warning",
        ref="A15",
    )


# Downloads


def _gated(at: Sighting) -> Problem:
    repo = re.search(
        r"Access to model ([\w.-]{1,60}/[\w.-]{1,90}) is|huggingface\.co/(?:api/models/)?([\w.-]{1,60}/[\w.-]{1,90})",
        at.near(3, 4),
    )
    name = next(filter(None, repo.groups())) if repo else "a repository"
    other = (
        " klein 4B needs no permission; this is another model." if "9b" in name.lower() or "dev" in name.lower() else ""
    )
    page = f"https://huggingface.co/{name}" if repo else "its page on huggingface.co"
    open_one = "   # or: kleinctl install --model klein-4b" if other else ""
    return Problem(
        f"{name} is gated",
        f"The hub wants a person who accepted its licence, and a token that may read gated repositories.{other}",
        f"accept the licence at {page}, then: hf auth login{open_one}",
        name="gated-repo",
        ref="B01",
        remedy=Remedy("install-model", {"model": "klein-4b", "layout": "diffusers"}, "ask") if other else None,
    )


def _inconsistent(at: Sighting) -> Problem:
    return Problem(
        f"{at.file or 'a file'} arrived with another size than the hub announced",
        f"{at['wanted'] or 'Other'} bytes were announced, and {at['found'] or 'others'} came: a proxy, a mirror or a "
        "bad "
        "line; a few hundred bytes are an error page.",
        "HF_HUB_DISABLE_XET=1 kleinctl install   # again; it resumes",
        name="download-inconsistent",
        ref="B05",
    )


def _disk_full(at: Sighting) -> Problem:
    expected, path, free = at["expected"], at["path"], at["free"]
    if expected:
        why = f"The file has {expected} MB, and {path} only {free} MB free."
        return Problem("the disk has too little room", why, DOCTOR, name="disk-full", ref="B06")
    return Problem("the disk is full", "A file could not be written to its end.", DOCTOR, name="disk-full", ref="B06")


def _symlinks(at: Sighting) -> Problem:
    warned = bool(at["warned"])
    return Problem(
        "Windows does not let this user make links",
        "The hub's cache uses symbolic links; without Developer Mode "
        + ("it keeps a second copy of files." if warned else "the download fails."),
        "turn on Developer Mode in Windows settings, or: set HF_HUB_DISABLE_SYMLINKS=1",
        name="symlinks-not-allowed",
        severity="warning" if warned else "error",
        ref="B09",
        remedy=Remedy("set-variable", {"name": "HF_HUB_DISABLE_SYMLINKS", "value": "1"}, "ask")
        if _on_windows(at)
        else None,
    )


def _hf_transfer(at: Sighting) -> Problem:
    missing = bool(at["missing"])
    return Problem(
        "HF_HUB_ENABLE_HF_TRANSFER is left over from an old guide",
        "It asks for hf_transfer, which is "
        + ("not installed here." if missing else "no longer used by huggingface-hub 1, or failed."),
        "unset HF_HUB_ENABLE_HF_TRANSFER",
        name="hf-transfer-left-over",
        severity="error" if missing else "warning",
        ref="B15",
        remedy=_unset(at, "HF_HUB_ENABLE_HF_TRANSFER"),
    )


def _unreachable(at: Sighting) -> Problem:
    return Problem(
        "the hub cannot be reached, and the files are not here",
        "There is no connection to it, or HF_HUB_OFFLINE is set, and the cache lacks what is wanted.",
        "kleinctl doctor   # looks at the network settings and at what is in the cache",
        name="hub-unreachable",
        ref="B12",
        remedy=_unset(at, "HF_HUB_OFFLINE"),
    )


def _not_trusted(at: Sighting) -> Problem:
    return Problem(
        "a secure connection is not trusted",
        "A proxy or virus scanner puts its own certificate in between, and Python does not know it.",
        "set SSL_CERT_FILE to the certificate of your proxy; kleinctl doctor --fix lets kleinctl trust whom the system "
        "trusts",
        name="tls-not-trusted",
        ref="B13",
        remedy=Remedy("set-config", {"table": "hub", "key": "certificates", "value": "system"}, "ask"),
    )


# ComfyUI


#: Core nodes that klein's workflows use, with the version that brought the newest of them.
CORE_NODES: Mapping[str, str] = dict.fromkeys(
    (
        *("BasicGuider", "CFGGuider", "CLIPLoader", "CLIPTextEncode", "ConditioningZeroOut", "FluxGuidance"),
        *("GetImageSize", "ImageScaleToTotalPixels", "KSamplerSelect", "LoadImage", "LoraLoaderModelOnly"),
        *("PreviewImage", "RandomNoise", "ReferenceLatent", "SamplerCustomAdvanced", "SaveImage", "SaveImageWebsocket"),
        *("UNETLoader", "VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAELoader"),
    ),
    "0.9.2",
) | {"EmptyFlux2LatentImage": "0.3.72", "Flux2Scheduler": "0.3.72", "FluxKVCache": "0.17.0"}
FOLDERS = {
    "unet_name": "models/diffusion_models",
    "clip_name": "models/text_encoders",
    "vae_name": "models/vae",
    "lora_name": "models/loras",
    "ckpt_name": "models/checkpoints",
    "image": "input",
}


def _node_missing(at: Sighting) -> Problem:
    told = re.search(r'"class_type": ?"([^"\\\n]{1,100})"', at.near(0, 8)[:3000])
    node = told[1] if told else at["new"] or at["old"] or at["listed"]
    if node in CORE_NODES:
        return _comfyui_old(
            f"The node {node} is ComfyUI's own since {CORE_NODES[node]}; no custom node is missing. klein needs 0.9.2."
        )
    if "gguf" in node.lower():
        return _gguf(
            "a GGUF file", f"The node {node} belongs to the custom nodes ComfyUI-GGUF, which are not installed."
        )
    return Problem(
        f"ComfyUI has no node {node}",
        "It is none of ComfyUI's own; the custom nodes that have it are not installed, failed to start, or renamed it.",
        "install missing custom nodes with ComfyUI-Manager, or use klein's own template",
        name="node-missing",
        ref="E01",
    )


def _comfyui_old(why: str, ref: str = "E01", severity: Severity = "error") -> Problem:
    return Problem("this ComfyUI is too old", why, UPDATE, name="comfyui-too-old", severity=severity, ref=ref)


_NOT_IN_LIST = (
    r"(?P<input>\w{1,60}): '(?P<value>[^'\n]{1,300})' not in "
    r"(?P<choices>\[[^\]\n]{0,6000}\]?|\(list of length (?P<count>\d{1,6})\))"
)


def _not_in_list(at: Sighting) -> Problem:
    name, value = at["input"], at["value"].replace("\\\\", "\\")
    choices = re.findall(r"'([^'\n]{1,300})'", at["choices"])
    node = _node(at)
    if name == "type" and value == "flux2":
        return Problem(
            f"{node or 'CLIPLoader'} has no type flux2",
            "klein's text encoder is loaded with it; a ComfyUI (or a node that wraps its loader) without it is too "
            "old.",
            UPDATE,
            name="cliploader-lacks-flux2",
            ref="C08",
        )
    if value.lower().endswith(".gguf") and node in ("UNETLoader", "CLIPLoader", "VAELoader"):
        return _gguf(value, f"{node} lists no GGUF files; UnetLoaderGGUF and CLIPLoaderGGUF do.")
    near = "flux2" if name == "type" else _nearest(value, choices or _on_machine(at))
    count = len(choices) or int(at["count"] or 0)
    offered = f"{count} other{'s' if count > 1 else ''}" if count else "nothing"
    others = [
        f"{each[0]} {each[1]!r}" for each in re.findall(r"(\w{1,60}): '([^'\n]{1,300})' not in [\[(]", at.match.string)
    ]
    also = [each for each in dict.fromkeys(others) if each != f"{name} {at['value']!r}"]
    if near:
        fix = f"set {name} of {node or 'the node'} to {near}"
    else:
        fix = f"put {_basename(value)} into {FOLDERS[name]}, then press R; or: {FETCH}" if name in FOLDERS else LOOK
    return Problem(
        f"{value} is not offered by {node or 'the node'} as {name}",
        f"This ComfyUI offers {offered}{f'; the nearest is {near}' if near else ''}."
        + (f" The same holds for {', '.join(also[:4])}." if also else ""),
        fix,
        name="value-not-in-list",
        ref="E03",
    )


def _node(at: Sighting) -> str:
    """The class of the node that the validation speaks of: JSON has it below, the console above."""
    below = re.search(
        r'"class_type": ?"([^"\\\n]{1,100})"', at.match.string[at.match.start() : at.match.start() + 6000]
    )
    above = re.findall(r"^\s{0,20}\* (\S{1,100}) \S{1,40}:\s{0,9}$", at.near(8, -1), re.MULTILINE)
    return above[-1] if above else below[1] if below else ""


def _nearest(value: str, choices: list[str]) -> str:
    """The choice that was most likely meant: the same file in another folder, else one with a similar name.

    Names whose numbers differ are of different models: flux1-vae and flux2-vae, 4b and 9b.
    """
    same = [each for each in choices if _basename(each).lower() == _basename(value).lower()]
    wanted, stems = _stem(value), {_stem(each): each for each in reversed(choices)}
    alike = [stem for stem in stems if re.findall(r"\d|base", stem) == re.findall(r"\d|base", wanted)][:500]
    close = difflib.get_close_matches(wanted, alike, n=1, cutoff=0.7)
    return same[0] if same else stems[close[0]] if close else ""


def _stem(path: str) -> str:
    """A file's name without ending, precision and punctuation."""
    bare = re.sub(r"\.[a-z]{1,12}$|(?:fp|bf|nvfp|int)\d{1,2}(?:_?e4m3fn?)?|mixed|scaled", "", _basename(path).lower())
    return re.sub(r"[^a-z0-9]", "", bare)


def _basename(path: str) -> str:
    return re.split(r"[\\/]+", path)[-1]


def _on_machine(at: Sighting) -> list[str]:
    return [each.path.name for each in at.facts.files] if at.facts else []


_REJECTED = {
    "Required input is missing": "a required input is not connected",
    "Bad linked input": "a link is no [node, slot] pair",
    "Return type mismatch between linked nodes": "a link joins an output and an input of different types",
    "Failed to convert an input value to a": "an input's value has the wrong type",
    "smaller than min of": "an input's value is below its least",
    "bigger than max of": "an input's value is above its most",
    "Custom validation failed for node": "the node itself refused its inputs",
    "Exception when validating": "checking the node failed",
    "Prompt has no outputs": "no node of the workflow saves or shows anything",
    "No prompt provided": "the request had no workflow in it",
}


def _rejected(at: Sighting) -> Problem:
    said = re.sub(r"\s+", " ", at.match[0])
    meaning = next(value for key, value in _REJECTED.items() if key in said)
    details = re.search(r'"details": ?"([^"\\\n]{1,200})"', at.near(0, 3)) or re.search(
        r": ([^\"\n]{1,200})$", at.near(0, 0)
    )
    node = _node(at)
    return Problem(
        f"ComfyUI refuses {f'the node {node}' if node else 'the workflow'}: {meaning}",
        f"It says: {said}{f' ({details[1].strip()})' if details and details[1] not in said else ''}.",
        "mend that node in the workflow; kleinctl doctor --workflow FILE shows what else is wrong in it",
        name="prompt-rejected",
    )


def _port(at: Sighting) -> Problem:
    told = re.search(r"address \('[^'\n]{1,60}', (\d{1,5})", at.near(0, 1))
    port = told[1] if told else "8188"
    reserved = "13]" in at.match[0]
    why = (
        "The system keeps it for itself or does not let this user open it."
        if reserved
        else "Another program listens there, most likely a ComfyUI that is still running."
    )
    return Problem(
        f"port {port} {'is not allowed' if reserved else 'is in use'}",
        why,
        f"open http://127.0.0.1:{port}, or start with --port {int(port) + 1}",
        name="port-in-use",
        ref="E06",
    )


def _custom_node(at: Sighting) -> Problem:
    path = at["path"] or at["failed"]
    said = f"It says: {at['said'].strip()}. " if at["said"].strip() else ""
    return Problem(
        f"the custom node {_basename(path.strip().rstrip('/'))} does not start",
        f"{said}klein needs none; what it installed may have replaced torch, transformers or numpy.",
        "start ComfyUI once with --disable-all-custom-nodes; if that works, remove or update this one",
        name="custom-node-broken",
        severity="warning",
        ref="E07",
    )


def _origin(at: Sighting) -> Problem:
    host, origin = at["host"], at["origin"]
    pair = (
        f"The request was for {host}, from a page of {origin}." if host else "It says 403, which a workflow never gets."
    )
    return Problem(
        "ComfyUI refuses requests from another web page",
        f"{pair} A proxy that changes Host, or localhost beside 127.0.0.1, looks the same.",
        "use one and the same address; behind a proxy pass Host on; --enable-cors-header only if you know who asks",
        name="origin-mismatch",
        ref="E08",
    )


def _edit_fails(at: Sighting) -> Problem | None:
    below = at.near(0, 80)
    if "diffusion_model(" not in below and "ldm/flux/model" not in below.replace("\\", "/"):
        return None
    if not re.search(r"ref_latents|reference_latents|ReferenceLatent", below):
        return None
    return Problem(
        "editing fails inside the model",
        "Text alone works and a reference picture fails, as after an update of ComfyUI. Mostly the VAE is not "
        "FLUX.2's, or "
        "an old preview node is at work.",
        UPDATE,
        name="edit-fails-after-update",
        ref="E12",
    )


def _zimage(at: Sighting) -> Problem | None:
    if not re.search(r"Requested to load Flux2\b|model_type FLUX2?\b", at.match.string):
        return None
    return Problem(
        "the text encoder was loaded for another model",
        "It runs as Z-Image's, one layer instead of three: CLIPLoader's type is not flux2.",
        "set `type` of the CLIPLoader node to flux2",
        name="text-encoder-not-stacked",
        ref="C03",
    )


def _unexpected(at: Sighting) -> Problem:
    if re.search(r"comfy_quant|weight_scale|input_scale|scaled_fp8", at["keys"]):
        return Problem(
            f"the scales of {at.file or 'the fp8 transformer'} are not read",
            "ComfyUI left them out as unknown, so the weights are off and the picture is noise: it is too old for this "
            "kind of fp8 file, or the file does not announce its scales.",
            UPDATE,
            name="fp8-scales-unread",
            ref="C22",
        )
    return Problem(
        f"the transformer's file does not match its model ({at['how']} weights)",
        f"ComfyUI says: {at['keys'][:160]}",
        LOOK,
        name="loader-warnings",
        severity="warning",
        ref="E11",
    )


def _single_file(at: Sighting) -> Problem | None:
    said = re.sub(r"\s{1,99}", " ", at["said"])
    if not 0 <= said.find("expected shape") < said.find("but got"):
        return None
    return Problem(
        f"diffusers takes {at.file or 'this single file'} for FLUX.2 dev",
        "It recognises every FLUX.2 file as dev and builds that model, whose shapes differ from klein's.",
        'from_single_file(path, config="black-forest-labs/FLUX.2-klein-4B", subfolder="transformer")',
        ref="C13",
    )


def _wrong_pipeline(at: Sighting) -> Problem | None:
    wanted, _, found = at["said"].partition("got")
    if "Mistral3" not in wanted or "Qwen3" not in found[:200]:
        return None
    return Problem(
        "klein was opened with the pipeline of FLUX.2 dev",
        "Flux2Pipeline wants Mistral Small as text encoder; klein's folder has Qwen3.",
        "use Flux2KleinPipeline.from_pretrained(...), or DiffusionPipeline, which reads model_index.json",
        ref="C15",
    )


def _edit_dtype(at: Sighting) -> Problem | None:
    if "pipeline_flux2" not in at.frames:
        return None
    return Problem(
        "diffusers is too old for editing pictures in bf16",
        "Before 0.38.0 it leaves out a conversion of the reference's latents, and two kinds of numbers meet.",
        'python -s -m pip install -U "diffusers>=0.38"',
        name="diffusers-edit-dtype",
        ref="D21",
    )


def _plain(
    name: str, ref: str, regex: str, what: str, why: str, fix: str, severity: Severity = "error", *, alone: bool = False
) -> LogPattern:
    """A pattern whose problem is always the same; `{file}` in `what` is the file that the log names there."""

    def explain(at: Sighting) -> Problem:
        return Problem(what.format(file=at.file or "a weights file"), why, fix, name, severity, ref=ref)

    return LogPattern(name, regex, explain, alone)


#: Causes before consequences, and the particular before the general.
PATTERNS: tuple[LogPattern, ...] = (
    # Machine and driver
    _plain(
        "driver-library-mismatch",
        "A11",
        r"Driver/library version mismatch|NVML_ERROR_LIB_RM_VERSION_MISMATCH",
        "the NVIDIA driver was updated but not restarted",
        "Its library and its kernel module differ in version.",
        "restart the computer, then: kleinctl doctor",
    ),
    LogPattern(
        "container-without-gpu",
        r"could not select device driver",
        lambda at: _no_card_in_container(
            "Docker has no NVIDIA runtime: the NVIDIA Container Toolkit is not registered."
        ),
    ),
    LogPattern("no-driver", r"Found no NVIDIA driver on your system", _no_driver),
    LogPattern(
        "driver-too-old",
        r"NVIDIA driver on your system is too old(?: \(found version (?P<version>\d{4,6})\))?",
        _driver_too_old,
    ),
    _plain(
        "cuda-gone",
        "A12",
        r"CUDA unknown error - this may be due to an incorrectly set up environment|GPU is lost\b"
        r"|has fallen off the bus",
        "CUDA does not start",
        "The card is visible, but its driver answers with an error, as after sleep or an unfinished update.",
        "sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm   # or restart the computer; then: kleinctl doctor",
    ),
    LogPattern("no-driver", r"libcuda\.so\.1: cannot open shared object file", _no_driver),
    # torch and packages
    _plain(
        "torch-without-cuda",
        "A02",
        r"Torch not compiled with CUDA enabled",
        "torch was installed without CUDA",
        "A build of torch for processors alone is installed; it cannot use the card.",
        "python -s -m pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cu130",
    ),
    LogPattern(
        "torch-lacks-card",
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation"
        r"|which is of cuda (?P<minimum>capability)",
        _no_kernel,
    ),
    LogPattern(
        "no-torch-build",
        r"Could not find a version that satisfies the requirement torch(?P<version>[=<>!~][^\s(]{1,40})?",
        _no_build,
    ),
    LogPattern("vc-runtime-missing", r"WinError 12[67]\b|WinError 1114\b", _dll),
    _plain(
        "torch-versions-differ",
        "A21",
        r"operator torchvision::nms does not exist"
        r"|cannot import name 'AutoProcessor'|Could not import module 'AutoProcessor'",
        "torch, torchvision and transformers do not fit each other",
        "One of them was replaced alone, so what is built on it does not load.",
        "python -s -m pip install --force-reinstall torch torchvision torchaudio"
        " --index-url https://download.pytorch.org/whl/cu130",
    ),
    _plain(
        "numpy-clash",
        "A27",
        r"compiled using NumPy 1\.x|Numpy is not available|numpy\.core\.multiarray failed to import",
        "a package was built for another numpy",
        "numpy 2 cannot run what was built for numpy 1.",
        'python -s -m pip install "numpy<2"   # or update the package that the log names',
    ),
    _plain(
        "diffusers-too-old",
        "A24",
        r"cannot import name 'Flux2(?:Klein)?\w{0,20}Pipeline'|Did you mean: 'Flux2Pipeline'"
        r"|module '?diffusers'? has no attribute '?Flux2",
        "diffusers is too old",
        "FLUX.2 [klein] needs diffusers 0.37.0 or newer.",
        'python -s -m pip install -U "diffusers>=0.38"   # of kleinctl\'s own: kleinctl install',
    ),
    LogPattern(
        "transformers-clash",
        r"cannot import name '(?P<name>MT5Tokenizer|HybridCache|Qwen2TokenizerFast)'"
        r"|No module named '(?P<old>transformers\.modeling_layers)'",
        _transformers_clash,
    ),
    LogPattern(
        "hub-clash",
        r"huggingface[-_]hub[^\n]{0,80}(?:is required for|but you have huggingface|is required but found)"
        r"|huggingface[-_]hub[<>=!~][^\n]{1,40} is required\b",
        _hub_clash,
    ),
    _plain(
        "accelerate-missing",
        "A28",
        r"requires `accelerate v",
        "accelerate is missing",
        "diffusers needs it to offload a model.",
        "python -s -m pip install accelerate   # of kleinctl's own: kleinctl install",
    ),
    LogPattern("offload-undone", r"you have activated (?P<sequential>sequential )?model offloading by calling", _moved),
    LogPattern(
        "custom-node-broken",
        r"Cannot import (?P<path>[^\n]{1,300}?) module for custom nodes:(?P<said>[^\n]{0,200})"
        r"|\(IMPORT FAILED\): (?P<failed>[^\n]{1,300})",
        _custom_node,
    ),
    LogPattern("module-missing", r"No module named '(?P<module>[\w.]{1,100})'", _missing_module),
    _plain(
        "page-file-too-small",
        "A08",
        r"os error 1455|WinError 1455|paging file is too small",
        "Windows has no memory left to promise",
        "Its paging file is too small (or fixed, or on a full drive) for what the model needs.",
        "let Windows manage the paging file's size, restart, then: kleinctl doctor",
    ),
    LogPattern(
        "cuda-malloc-unsupported",
        r"CUDA error: operation not supported|this card most likely does not support (?P<guess>cuda-malloc)",
        _cuda_malloc,
    ),
    _plain(
        "cudnn-plans-missing",
        "A30",
        r"No valid execution plans built",
        "cuDNN has no way to compute this on the card",
        "The cuDNN that came with torch is too old for this card (seen on RTX 50).",
        "start ComfyUI with --use-split-cross-attention, or install the newest stable torch",
    ),
    _plain(
        "no-fp8-maths",
        "A18",
        r"only supported on (?:CUDA )?devices with compute capability (?:>=|>) ?(?:9\.0|8\.9)",
        "the card does not compute in fp8",
        "fp8 mathematics came with sm_89 (RTX 40); older cards read fp8 files and compute in bf16.",
        "start without --fast fp8_matrix_mult, or leave the wrapper's fp8 option off",
    ),
    _plain(
        "sage-attention-missing",
        "A23",
        r"feature, the `sageattention` package must be installed first",
        "ComfyUI was told to use SageAttention, which is not installed",
        "It ends at once. klein does not need it, and it can make pictures black.",
        "start ComfyUI without --use-sage-attention",
    ),
    _plain(
        "path-trouble",
        "A33",
        r"detected dubious ownership in repository",
        "git does not trust the folder of this installation",
        "It lies on a drive without owners (USB, exFAT, network) or belongs to another user.",
        "git config --global --add safe.directory FOLDER   # or move it to a local NTFS or ext4 drive",
    ),
    _plain(
        "path-trouble",
        "A33",
        r"Python \S{1,20} was not found and/or failed to install",
        "the installation's path gives Python trouble",
        "Special characters, spaces or a synchronised folder in the path stop the embedded Python.",
        "install into a short path of plain letters, such as C:\\AI",
    ),
    # Downloads
    LogPattern(
        "gated-repo",
        r"GatedRepoError|Cannot access gated repo|is restricted and you are not in the authorized list"
        r"|errorCode=24 Authorization failed|401 Client Error: Unauthorized for url: https://huggingface\.co/",
        _gated,
    ),
    LogPattern(
        "download-inconsistent",
        r"Consistency check failed: file should be of size(?: (?P<wanted>\d{1,15}) but has size (?P<found>\d{1,15}))?",
        _inconsistent,
    ),
    _plain(
        "file-too-large-for-disk",
        "B07",
        r"\[Errno 27\] File too large",
        "the disk cannot hold a file this large",
        "FAT32 ends at 4 GiB a file; klein's files have up to 8 GB.",
        "use a disk with NTFS, ext4 or exFAT",
    ),
    LogPattern(
        "disk-full",
        r"\[Errno 28\]|[Nn]o space left on device|WinError 112\b|Not enough free disk space to download the file"
        r"(?:\. The expected file size is: (?P<expected>[\d.]{1,15}) MB\."
        r" The target location (?P<path>\S{1,200}) only has (?P<free>[\d.]{1,15}) MB)?",
        _disk_full,
    ),
    LogPattern("symlinks-not-allowed", r"WinError 1314\b|cache-system uses symlinks by (?P<warned>default)", _symlinks),
    _plain(
        "path-too-long",
        "B11",
        r"WinError 206\b|No such file or directory: '[^'\n]{1,500}\.incomplete'",
        "a path is too long for Windows",
        "Windows ends at 260 characters unless long paths are on; a download's name adds about 135.",
        "install into a shorter folder, such as C:\\AI, or turn long paths on (LongPathsEnabled)",
    ),
    LogPattern(
        "hub-unreachable",
        r"LocalEntryNotFoundError|cannot find the requested files in the (?:local|disk) cache"
        r"|outgoing traffic has been disabled",
        _unreachable,
    ),
    LogPattern("tls-not-trusted", r"CERTIFICATE_VERIFY_FAILED", _not_trusted),
    _plain(
        "rate-limited",
        "B14",
        r"429 Client Error|HTTP Error 429|429 Too Many Requests|had to rate limit your IP",
        "the hub asks to wait",
        "Too many requests came from this address, as behind a VPN or shared connection.",
        "hf auth login   # people with an account may ask more often; then wait some minutes",
    ),
    LogPattern(
        "hf-transfer-left-over",
        r"Fast download using 'hf_transfer' is (?P<missing>enabled)|occurred while downloading using `?hf_transfer"
        r"|HF_HUB_ENABLE_HF_TRANSFER[^\n]{0,80}(?:deprecated|ignored|no longer|removed)",
        _hf_transfer,
    ),
    # Weights files
    LogPattern(
        "weights-truncated",
        r"MetadataIncompleteBuffer|incomplete metadata, file not fully covered|InvalidHeaderLength"
        r"|invalid header length|safetensors file is corrupt/incomplete|bytes, in the middle of its weights",
        _damaged(
            "weights-truncated",
            "The safetensors file is shorter or longer than its header says: a download was cut off.",
            "B02",
        ),
    ),
    LogPattern("weights-not-safetensors", r"HeaderTooLarge|header too large", _header_too_large),
    LogPattern("weights-not-safetensors", r"safetensors file is corrupt or invalid", _header_too_large),
    LogPattern(
        "weights-empty", r"HeaderTooSmall|header too small", _damaged("weights-empty", "The file is empty.", "B04")
    ),
    LogPattern(
        "weights-zeros",
        r"InvalidHeaderDeserialization|invalid JSON in header",
        _damaged(
            "weights-zeros",
            "It has the right size and nothing in it: a downloader set it aside and never filled it.",
            "B04",
        ),
    ),
    LogPattern(
        "gguf-needs-node",
        r"Unexpected (?:text model )?architecture type in GGUF file: '?(?P<architecture>[\w.-]{1,60})",
        _gguf_architecture,
    ),
    # What belongs together
    LogPattern("value-not-in-list", _NOT_IN_LIST, _not_in_list),
    LogPattern(
        "node-missing",
        r"Node '(?P<new>[^'\n]{1,100})' not found\. The custom node may not be installed"
        r"|Cannot execute because node (?P<old>\S{1,100}) does not exist"
        r"|node types were not found:? (?:[-*] ?)?(?P<listed>\w{1,100})",
        _node_missing,
    ),
    _plain(
        "workflow-not-api",
        "E02",
        r"missing the class_type property",
        "the workflow was saved for the page, not for the API",
        "A node has no class_type; the page's own format cannot be sent to the server.",
        "in ComfyUI: Workflow, Export (API)",
    ),
    LogPattern(
        "prompt-rejected",
        r"Required input is missing|Bad linked input|Return type mismatch between linked nodes"
        r"|Failed to convert an input value to a|Custom validation failed for node"
        r"|Exception when validating (?:inner )?node"
        r"|Value -?[\d.e+]{1,30} (?:smaller than min|bigger than max) of -?[\d.e+]{1,30}|Prompt has no outputs"
        r"|No prompt provided",
        _rejected,
    ),
    LogPattern(
        "comfyui-too-old",
        r"Got \[32, 32, 32, 32\] but expected positional dim 64",
        lambda at: _comfyui_old("It takes klein for FLUX.1, since it is older than klein; 0.9.2 is wanted.", "C07"),
    ),
    LogPattern(
        "text-encoder-vl",
        r"clip missing: \[[^\n]{0,3000}?layers\.(?:\d|1\d|2[0-6])\.self_attn\.[qkv]_proj",
        lambda at: Problem(
            f"{at.file or at.setting('clip_name') or 'the text encoder'} lacks layers that klein reads",
            "Its attention has other names or shapes than Qwen3 4B's: most likely it is Qwen3-VL, or another encoder.",
            FETCH,
            ref="C06",
        ),
    ),
    LogPattern(
        "text-encoder-width",
        r"\(\d{1,9}x(?P<given>\d{1,9}) and (?P<rows>\d{1,9})x(?P<columns>\d{1,9})\)",
        _shapes,
    ),
    LogPattern(
        "text-encoder-width",
        r"Qwen3 encoder variant mismatch:(?: (?P<model>FLUX\.2 Klein \S{1,40}) requires (?:an? )?"
        r"(?P<wanted>[\w-]{1,40})[^\n]{0,200}?(?:carries|but (?:got|found|is))(?: an?)? (?P<found>[\w-]{1,40}))?",
        _variants,
    ),
    LogPattern("wrong-text-encoder", r"Error\(s\) in loading state_dict for (?P<loader>\w{1,80})", _state_dict),
    LogPattern("wrong-text-encoder", r"the JSON object must be str, bytes or bytearray, not NoneType", _tokenizer),
    _plain(
        "wrong-text-encoder",
        "C04",
        r"KeyError: '(?:t5xxl|clip_l)'",
        "the prompt goes through a node of FLUX.1",
        "CLIPTextEncodeFlux wants T5-XXL and CLIP-L; klein has Qwen3 4B alone.",
        "use the node CLIPTextEncode, and CLIPLoader with type flux2",
    ),
    _plain(
        "diffusers-file-in-comfyui",
        "B16",
        r"\"'x_embedder\.bias'|KeyError: '?x_embedder\.bias",
        "the transformer has the layout of diffusers",
        "Its weights are named as in a diffusers folder; ComfyUI wants them named as in the original single file.",
        FETCH,
    ),
    LogPattern(
        "vae-mismatch",
        r"Given groups=1, weight of size \[[\d, ]{1,60}\], expected input\[[\d, ]{1,60}\] to have (?P<wanted>\d{1,6})"
        r" channels, but got (?P<given>\d{1,6}) channels",
        _convolution,
    ),
    LogPattern(
        "vae-mismatch",
        r"Sizes of tensors must match except in dimension 1\. Expected size 128 but got size (?P<given>\d{1,6})"
        r"|size of tensor a \((?P<a>128|32|16|4)\) must match the size of tensor b \((?P<b>128|32|16|4)\)"
        r" at non-singleton dimension 1\b",
        lambda at: _reference_latent(at) if at["given"] else _latents(at),
    ),
    _plain(
        "preview-crash",
        "D08",
        r"Expected size for first two dimensions of batch2 tensor to be: \[\d{1,6}, 128\] but got: \[\d{1,6}, 32\]",
        "the live preview does not know FLUX.2's latents",
        "A custom node (VideoHelperSuite) draws previews from 32 channels; FLUX.2 has 128 here.",
        "update ComfyUI-VideoHelperSuite, or start ComfyUI with --preview-method none",
    ),
    _plain(
        "decoder-mismatch",
        "D09",
        r"size of tensor a \(3\) must match the size of tensor b \(128\)",
        "the decoder is not the one of this VAE",
        "It gives 3 channels (pixels) where 128 (FLUX.2 latents) are wanted: a PiD or TAE decoder mixed with "
        "FLUX.2's VAE.",
        "decode with flux2-vae.safetensors; for a PiD decoder choose pixel_space as VAE",
    ),
    LogPattern("single-file-config", r"Cannot load (?P<said>[\s\S]{1,400})", _single_file),
    LogPattern("wrong-pipeline-class", r"Expected types for text_encoder:(?P<said>[\s\S]{1,900})", _wrong_pipeline),
    _plain(
        "fp8-in-diffusers",
        "C14",
        r"not used when initializing Flux2\w{0,40}:?[^\n]{0,20}\n?[^\n]{0,2000}?(?:weight_scale|input_scale"
        r"|comfy_quant)",
        "a ComfyUI fp8 file was given to diffusers",
        "diffusers ignores its scales, so the picture is noise.",
        "kleinctl install --model klein-4b --backend diffusers",
    ),
    LogPattern(
        "lora-mismatch",
        r"ERROR lora (?P<key>\S{1,200}) shape '\[(?P<rows>[1-9]\d{0,6}), (?P<columns>[1-9]\d{0,6})\]' is invalid for"
        r" input of size (?P<size>\d{1,12})",
        _lora_shape,
    ),
    LogPattern(
        "lora-mismatch",
        r"shape '\[(?P<rows>[1-9]\d{0,6}), (?P<columns>3072|4096|6144)\]' is invalid for"
        r" input of size (?P<size>\d{1,12})",
        lambda at: _lora_shape(at) if _square(at) else None,
    ),
    LogPattern("lora-mismatch", r"lora key not loaded:", _lora_keys),
    LogPattern(
        "lora-mismatch",
        r"^\s{0,20}ERROR lora \S|No LoRA keys associated to|^\s{0,20}NOT LOADED \S"
        r"|WARNING SHAPE MISMATCH \S{1,200} WEIGHT NOT MERGED",
        lambda at: _lora("nothing or only a part of it was applied."),
    ),
    LogPattern(
        "transformer-in-checkpoints", r"Could not detect model type of:? ?(?P<path>[^\"\n]{0,300})", _not_detected
    ),
    LogPattern(
        "transformer-in-checkpoints",
        r"ERROR: (?P<part>clip input|VAE) is invalid: None",
        lambda at: _in_checkpoints("the checkpoint", f"It has no {'VAE' if at['part'] == 'VAE' else 'text encoder'}"),
    ),
    LogPattern("fp8-scales-unread", r"unet (?P<how>unexpected|missing): (?P<keys>\[[^\]\n][^\n]{0,2500})", _unexpected),
    _plain(
        "other-program",
        "C23",
        r"You do not have CLIP state dict!",
        "Forge was not told of klein's text encoder",
        "It asks for CLIP, which klein does not have: its text encoder is Qwen3 4B.",
        "choose qwen_3_4b.safetensors and flux2-vae.safetensors under VAE / Text Encoder, and update Forge",
    ),
    _plain(
        "part-missing",
        "C24",
        r"No (?:VAE|Qwen3 Encoder) source provided",
        "the transformer was chosen alone",
        "A single file has neither text encoder nor VAE; InvokeAI wants both chosen beside it.",
        "choose Qwen3 4B as encoder and FLUX.2's VAE; kleinctl install --model klein-4b fetches all three",
    ),
    # Memory
    LogPattern(
        "card-memory-full",
        r"CUDA out of memory|Allocation on device|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory"
        r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
        _out_of_vram,
    ),
    LogPattern(
        "memory-full",
        r"(?<![A-Za-z])(?:_Array)?MemoryError\b|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
        r"|fatal : Memory allocation failure|Out of memory: Killed process|std::bad_alloc|exited with code 137\b"
        r"|^[^\n]{0,200}: line \d{1,6}: +\d{1,8} Killed\b",
        _out_of_ram,
    ),
    LogPattern(
        "memory-full", r"^[ \t]{0,20}Killed[ \t]{0,20}$|^zsh: killed |^\[\d{1,3}\] +\d{1,9} +killed ", _out_of_ram
    ),
    _plain(
        "dynamic-vram-trouble",
        "D10",
        r"HostBuffer\.read_file_slice failed|VRAM Allocation failed \(non OOM\)",
        "ComfyUI's dynamic VRAM fails",
        "Versions around 0.30 have faults in it, mostly in WSL and on slow disks.",
        "start ComfyUI with --disable-dynamic-vram",
    ),
    # While it runs
    _plain(
        "black-picture",
        "D07",
        r"invalid value encountered in cast",
        "the picture is black: the numbers overflowed",
        "The decoded picture holds what is no number: SageAttention, a VAE in fp16, or damaged weights.",
        "start without --use-sage-attention and --fp16-vae, then: kleinctl verify",
    ),
    _plain(
        "references-large",
        "D12",
        r"Image too small: \w{1,15}\b|Aspect ratio too extreme|Image must be a PIL",
        "a reference picture cannot be used as it is",
        "Both sides have to have at least 64 pixels, at most 8 to 1, as a PIL image.",
        "crop or resize the reference picture, best to about one megapixel",
    ),
    LogPattern(
        "diffusers-edit-dtype",
        r"same dtype, but got|expected scalar type \w{1,20} but found|bias type \([^\n]{1,60}\) should be the same",
        _edit_dtype,
    ),
    _plain(
        "devices-mixed",
        "D18",
        r"Expected all tensors to be on the same device",
        "two parts of the model are on different devices",
        "Two ways of offloading were combined, or a part was moved by hand.",
        "use one way: either enable_model_cpu_offload(), or layerwise casting, or .to('cuda')",
    ),
    # The server
    LogPattern(
        "port-in-use",
        r"Errno (?:98|48|10048|10013)\]|WinError (?:10048|10013)\]|Errno 13\] error while attempting to bind",
        _port,
    ),
    LogPattern(
        "origin-mismatch",
        r"non matching host and origin (?P<host>\S{1,100}) != (?P<origin>\S{1,100}),"
        r"|non matching host and origin|403(?: Client Error)?:? Forbidden for url: \S{0,100}/prompt",
        _origin,
    ),
    _plain(
        "database-locked",
        "E10",
        r"Could not acquire lock on database",
        "two ComfyUIs share one database",
        "Another one runs with the same user folder and holds it.",
        "end the other one, or start this one with --user-directory FOLDER --port 8189",
    ),
    _plain(
        "extra-paths-wrong",
        "E05",
        r"in \"[^\"\n]{0,300}extra_model_paths\.ya?ml\", line \d{1,6}",
        "extra_model_paths.yaml cannot be read",
        "It has an indentation, a tab or a character that YAML does not allow, in the line that the log names.",
        "mend that line (spaces, no tabs; quote Windows paths), then: " + LOOK,
    ),
    # Warnings
    _plain(
        "decode-memory",
        "D02",
        r"Ran out of memory when regular VAE decoding",
        "decoding the picture takes more memory than is free",
        "ComfyUI tries again in tiles, which is slower and may show seams, or may fail too.",
        "use the node VAEDecodeTiled (512, overlap 64), or kleinctl's staged backend",
        "warning",
    ),
    LogPattern(
        "comfyui-too-old",
        r"created with a newer version of ComfyUI(?: \((?P<version>[\d.]{1,20})\))?",
        lambda at: _comfyui_old(
            f"The workflow was made with {at['version'] or 'a newer one'}; its nodes are ComfyUI's own there.",
            severity="warning",
        ),
    ),
    _plain(
        "fp8-kernels-missing",
        "A19",
        r"You need pytorch with cu130 or higher|Failed to import comfy_kitchen",
        "ComfyUI computes fp8 the slow way",
        "Its fast kernels (comfy-kitchen) need a torch built for CUDA 13, and driver 580.",
        "python -s -m pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cu130",
        "warning",
    ),
    LogPattern("no-bf16", r"manual cast: torch\.float32|bf16 is only supported on A100", _float32),
    _plain(
        "optional-packages-mismatched",
        "A22",
        r"A matching Triton is not available|Need to compile C\+\+ extensions to use all xFormers",
        "xFormers or Triton does not fit this torch",
        "Both are optional: klein runs without, with torch's own attention.",
        "nothing, or: python -s -m pip uninstall xformers",
        "warning",
    ),
    _plain(
        "guidance-on-distilled",
        "C18",
        r"Guidance scale \S{1,20} is ignored for step-wise distilled models",
        "the distilled model was given a guidance scale",
        "It is ignored. The distilled model wants 4 steps and guidance 1; base wants 20 to 50 steps and 4 to 5.",
        "leave guidance_scale at 1 and num_inference_steps at 4",
        "warning",
    ),
    _plain(
        "size-rounded",
        "D13",
        r"have to be divisible by 16 but are",
        "the picture comes out smaller than asked for",
        "Width and height have to be multiples of 16; others are cut to one.",
        "ask for multiples of 16, such as 1024x1024",
        "warning",
    ),
    _plain(
        "gguf-needs-node",
        "C21",
        r"Falling back to numpy dequant",
        "the GGUF file has a kind of quantisation that is slow here",
        "The GGUF node unpacks it on the processor.",
        "use a Q4_K or Q8_0 file instead of an IQ one, or update ComfyUI-GGUF",
        "warning",
    ),
    LogPattern(
        "vae-decoder-only",
        r"Missing VAE keys \[[^\n]{0,300}?encoder\.",
        lambda at: Problem(
            f"{at.file or at.setting('vae_name') or 'the VAE'} has no encoder",
            "It decodes pictures and cannot read one: editing with it would use weights that were never set.",
            "for editing use flux2-vae.safetensors or full_encoder_small_decoder.safetensors",
            severity="warning",
            ref="C11",
        ),
    ),
    LogPattern("several-cards", r"Device: cuda:\d{1,2} (?P<card>[^\n:]{1,80})", _device),
    # What means something only where nothing else does
    _plain(
        "card-memory-full",
        "D01",
        r"Got an OOM, unloading",
        "the card's memory ran out",
        "ComfyUI unloaded every model to go on.",
        PLAN,
        alone=True,
    ),
    LogPattern("text-encoder-not-stacked", r"Requested to load ZImageTEModel_", _zimage, alone=True),
    _plain(
        "transformer-in-checkpoints",
        "C19",
        r"No VAE weights detected, VAE not init",
        "a file was loaded as a whole checkpoint, and has no VAE",
        "klein's transformer, text encoder and VAE are three files, for three loaders; a transformer has no VAE in it.",
        "move it to models/diffusion_models and use the nodes UNETLoader, CLIPLoader (type flux2) and VAELoader",
        "warning",
        alone=True,
    ),
    _plain(
        "wrong-pipeline-class",
        "C15",
        r"Cannot copy out of meta tensor; no data!",
        "a part of the pipeline has no weights",
        "Its file was not read: mostly the pipeline is another model's (Flux2Pipeline opened klein), or a file of the "
        "folder is missing.",
        "use Flux2KleinPipeline.from_pretrained(...), or DiffusionPipeline, which reads model_index.json",
        alone=True,
    ),
    _plain(
        "value-not-in-list",
        "E03",
        r"Value not in list|value_not_in_list",
        "a node was given a value that this ComfyUI does not offer",
        "Mostly a file that is not in its folder, or is there under another name; the log does not say which.",
        LOOK,
        alone=True,
    ),
    LogPattern("edit-fails-after-update", r"!!! Exception during processing !!!", _edit_fails, alone=True),
    _plain(
        "rejected-without-detail",
        "E04",
        r"prompt_outputs_failed_validation|400(?: Client Error)?:? Bad Request for url: \S{0,100}/prompt"
        r"|/prompt\S{0,3} [^\n]{0,60}400 Bad Request|400 Bad Request[^\n]{0,60}/prompt",
        "ComfyUI refused the workflow, and this log does not say why",
        "The client shows only the status; the answer's text names the node and the value.",
        "look in ComfyUI's own console below `Failed to validate prompt`, or: kleinctl doctor --workflow FILE",
        alone=True,
    ),
    LogPattern(
        "silent-exit",
        r"Press any key to continue|[Ee]xit(?:ed)? (?:with )?(?:code|status):? "
        r"(?P<code>-?\d{1,10}|0x[0-9A-Fa-f]{8})",
        _silent,
        alone=True,
    ),
)


def _in_comfyui(pattern: LogPattern) -> LogPattern:
    """The pattern, its problem with what can be done about it in the ComfyUI, where the facts have exactly one."""

    def explain(at: Sighting) -> Problem | None:
        problem, known = pattern.explain(at), at.facts.comfyuis if at.facts else ()
        remedy = remedies.of_log(problem.name, known[0]) if problem and len(known) == 1 else None
        if problem is None or remedy is None or problem.remedy is not None:
            return problem
        return replace(problem, path=remedy.arguments["path"], remedy=remedy)

    return replace(pattern, problem=explain)


PATTERNS = tuple(map(_in_comfyui, PATTERNS))
