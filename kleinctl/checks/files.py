"""Is each weights file what its place says it is?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kleinctl.checks import check
from kleinctl.facts.weights import FoundFile
from kleinctl.identify import TextEncoder, Transformer, Vae, title
from kleinctl.manifest import Model
from kleinctl.problem import Evidence, Problem, Remedy, shell
from kleinctl.units import bytes_text

#: What can be there instead of a whole weights file: the problem's name, its words, and the catalogue's entry.
BROKEN = {
    "truncated": ("weights-truncated", "cut short", "B02"),
    "lfs-pointer": ("weights-lfs-pointer", "a Git LFS pointer, not the file it stands for", "B03"),
    "web-page": ("weights-web-page", "a web page that was saved instead of the file", "B04"),
    "json": ("weights-json", "a JSON document, most likely a hub's error message", "B04"),
    "zeros": (
        "weights-zeros",
        "zeros where its weights should be: a download that was prepared and never filled",
        "B04",
    ),
    "empty": ("weights-empty", "empty", "B04"),
    "pickle": ("weights-pickle", "a pickle, which can run code when it is loaded and is never opened", "B04"),
    "unreadable": ("weights-unreadable", "not readable", None),
    "other": ("weights-other", "no weights file", "B04"),
}
#: What a hub says of a repository whose licence wants to be accepted.
GATED = ("access to model", "access to this resource", "cannot access gated", "restricted")
REFS = {"qwen3-8b": "C01", "mistral-small": "C02", "t5-xxl": "C04", "qwen3-4b": "C05", "qwen3-vl": "C06"}
ROLES = {"vae": "VAE", "text-encoder": "text encoder", "transformer": "transformer"}
#: The models that a text encoder or VAE was made for.
BELONGS = {
    "qwen3-4b": "FLUX.2 [klein] 4B and Z-Image",
    "qwen3-8b": "FLUX.2 [klein] 9B",
    "mistral-small": "FLUX.2 [dev]",
    "t5-xxl": "FLUX.1 and SD3",
    "clip-l": "FLUX.1, SDXL and Stable Diffusion",
    "clip-g": "SDXL and SD3",
    "flux1-vae": "FLUX.1",
    "sd-vae": "Stable Diffusion",
    "wan-vae": "Wan and Qwen-Image",
    "flux2-vae": "FLUX.2, every size",
}
#: Places whose files diffusers loads.
DIFFUSERS = ("store", "hub-cache", "diffusers-folder")
DIFFUSERS_FOLDERS = ("transformer", "text_encoder", "vae")
#: The repository of diffusers' folders that each family is in.
REPOS = {
    "flux2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "qwen3-4b": "black-forest-labs/FLUX.2-klein-4B",
    "qwen3-8b": "black-forest-labs/FLUX.2-klein-9B",
}
#: Names that tell nothing without the folder they lie in.
GENERIC = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d{5}-of-\d{5})?\.safetensors")
QUANTISED = ("fp8", "fp8-e5m2", "int8", "nvfp4")


def called(path: Path) -> str:
    """A file's name, with its folder's where every model has files of that name: `vae/model.safetensors`."""
    return f"{path.parent.name}/{path.name}" if GENERIC.fullmatch(path.name) else path.name


@check("weights-readable")
def weights_readable(found_file: FoundFile) -> Problem | None:
    """Every weights file is complete and is a weights file."""
    identity = found_file.identity
    if identity.kind not in BROKEN:
        return None
    name, words, ref = BROKEN[identity.kind]
    too_long = "too long" in identity.saw
    return Problem(
        f"{called(found_file.path)} is {'longer than its header says' if too_long else words}",
        " ".join(filter(None, (_sentence(identity.saw), _size(found_file), *_stands_for(found_file)))),
        _fix(found_file),
        name=name,
        severity="error" if _matters(found_file) else "warning",
        path=str(found_file.path),
        ref="B01" if any(word in identity.saw.lower() for word in GATED) else ref,
        evidence=(Evidence(str(found_file.path), identity.saw, _wanted(found_file)),),
        remedy=None if identity.kind == "unreadable" else _fetch(found_file),
    )


def _matters(found: FoundFile) -> bool:
    """Whether klein needs the file: it lies in the place of a part, or is one, or what is left of it looks like one."""
    klein = found.identity.family.startswith("flux2") or found.identity.family in ("qwen3-4b", "qwen3-8b")
    return bool(found.part or found.role or found.content or klein)


def _size(found: FoundFile) -> str:
    there, wanted = found.identity.size_bytes, found.size_bytes
    if found.identity.kind == "unreadable":
        return f"Wanted are {bytes_text(wanted)}." if wanted else ""
    if wanted and there != wanted and bytes_text(there) == bytes_text(wanted):
        return f"It has {there:,} of {wanted:,} bytes."
    return f"It has {bytes_text(there)} of {bytes_text(wanted)}." if wanted else f"It has {bytes_text(there)}."


def _stands_for(found: FoundFile) -> Iterator[str]:
    saw = found.identity.saw.lower()
    if any(word in saw for word in GATED):
        yield "The repository it came from wants its licence accepted, or is another one than klein's."
    if found.identity.kind in ("lfs-pointer", "truncated") and found.content and found.content.lower() not in saw:
        yield f"The file itself is {found.content}."


def _fix(found: FoundFile) -> str:
    if found.identity.kind == "unreadable" and found.place != "hub-cache":
        return f"{shell('ls', '-l', found.path)}   # then let this user read it, or mend the link"
    if found.identity.kind == "lfs-pointer" and not found.fix:
        return f"{shell('git', '-C', found.path.parent, 'lfs', 'pull')}   # or fetch it from the hub again"
    repo = REPOS.get(found.identity.family)
    if found.place == "diffusers-folder" and repo and found.folder in DIFFUSERS_FOLDERS:
        folder = found.path.parent
        repo = repo.replace("klein-", "klein-base-") if "base" in folder.parent.name.lower() else repo
        name, place = f"{folder.name}/{found.path.name}", folder.parent
        return shell("hf", "download", repo, name, "--local-dir", place, "--force-download")
    return found.fix or "fetch it again from where it came (the hub's /resolve/ address), then: kleinctl doctor"


@check("wrong-vae")
def wrong_vae(found_file: FoundFile) -> Problem | None:
    """The VAE is the model's own."""
    return _wrong(found_file, "vae")


@check("wrong-text-encoder")
def wrong_text_encoder(found_file: FoundFile) -> Problem | None:
    """The text encoder is the one the transformer was trained with."""
    name = "text-encoder-vl" if found_file.identity.family == "qwen3-vl" else ""
    return _wrong(found_file, "text-encoder", name)


@check("wrong-transformer")
def wrong_transformer(found_file: FoundFile) -> Problem | None:
    """The transformer is the model's own."""
    return _wrong(found_file, "transformer")


def _wrong(found: FoundFile, role: str, name: str = "") -> Problem | None:
    if found.role != role or not _is_wrong(found):
        return None
    identity = found.identity
    wanted = title(found.family) if identity.role == role else f"a {ROLES[role]}, {title(found.family)}".rstrip(", ")
    belongs = f" It belongs to {BELONGS[identity.family]}." if identity.family in BELONGS else ""
    return Problem(
        f"{found.path.name} is not the {ROLES[role]} of {found.model or found.path.parent.parent.name}",
        f"Wanted is {wanted}; this file shows {identity.saw.rstrip('.')}.{belongs}",
        _fix(found),
        name=name,
        path=str(found.path),
        remedy=_fetch(found),
        ref=REFS.get(identity.family, "B16") if role == "text-encoder" else "C09" if role == "vae" else "B16",
        evidence=(Evidence(str(found.path), identity.saw, wanted),),
    )


def _is_wrong(found: FoundFile) -> bool:
    """Whether this is a file of another kind than its place wants."""
    identity = found.identity
    if identity.kind in BROKEN or identity.family == "unknown":
        return False
    if found.family:
        return identity.family != found.family
    return bool(found.role) and identity.role not in (found.role, "unknown")


@check("vae-decoder-only")
def vae_decoder_only(found_file: FoundFile) -> Problem | None:
    """The file in a VAE's place can read pictures as well as make them."""
    vae = found_file.identity.facts
    decoder = isinstance(vae, Vae) and vae.family == "flux2-vae" and not vae.encoder and found_file.identity.whole
    if not decoder or found_file.role != "vae":
        return None
    return Problem(
        f"{called(found_file.path)} is a decoder only, not a whole VAE",
        f"Wanted is the FLUX.2 VAE with encoder and decoder; this file shows {found_file.identity.saw.rstrip('.')}. "
        "Loading it as a VAE fails or, at best, pictures cannot be edited.",
        _fix(found_file),
        path=str(found_file.path),
        ref="C11",
        evidence=(Evidence(str(found_file.path), "no tensor named encoder.*", "encoder.* and decoder.*"),),
        remedy=_fetch(found_file),
    )


@check("wrong-content")
def wrong_content(found_file: FoundFile) -> Problem | None:
    """A file whose sha256 is known is the very file its place wants, not merely one of its kind."""
    found = found_file
    other = not found.sha256 or not found.wanted_sha256 or found.sha256 in found.wanted_sha256
    if other or _is_wrong(found) or _variant_differs(found) or found.identity.kind in BROKEN or _quantised(found):
        return None
    seen = f"This file is {found.content}" if found.content else f"This file shows {found.identity.saw.rstrip('.')}"
    wanted = " or ".join(f"{sha[:12]}…" for sha in found.wanted_sha256)
    return Problem(
        f"{found.path.name} is not {found.model}/{found.part}",
        f"Wanted is sha256 {wanted}; found is {found.sha256[:12] if found.sha256 else ''}…. {seen}.",
        _fix(found),
        path=str(found.path),
        # A ComfyUI may well have another build of the same weights under a known name.
        severity="error" if found.place == "store" else "warning",
        ref="B16",
        evidence=(Evidence(str(found.path), f"sha256 {found.sha256}", f"sha256 {wanted}"),),
        remedy=_fetch(found),
    )


@check("content-known")
def content_known(found_file: FoundFile) -> Problem | None:
    """What lies under the name of a part is something that is known."""
    found, identity = found_file, found_file.identity
    if (
        not found.part
        or not identity.whole
        or identity.family != "unknown"
        or identity.role not in (found.role, "unknown")
    ):
        return None
    if found.sha256 and found.sha256 in found.wanted_sha256:
        return None
    return Problem(
        f"{called(found.path)} is not known to be {title(found.family)}",
        f"Wanted is {title(found.family)}, as the name says; this file shows {identity.saw.rstrip('.')}. A build that "
        "kleinctl does not know may be right; any other model is not.",
        _fix(found),
        name="wrong-content",
        path=str(found.path),
        severity="error" if found.place == "store" else "warning",
        ref="B16",
        evidence=(Evidence(str(found.path), identity.saw, title(found.family)),),
        remedy=_fetch(found),
    )


@check("wrong-variant")
def wrong_variant(found_file: FoundFile) -> Problem | None:
    """No base weights lie where distilled ones are wanted, nor the reverse."""
    found = found_file
    wanted = _wanted_variant(found)
    if not _variant_differs(found):
        return None
    by = {
        "sha256": "its sha256, so this is certain",
        "fingerprint": "the first bytes of some of its tensors, so this is certain",
        "size": f"its length of {found.identity.size_bytes:,} bytes, which no other part has",
        "pointer": "the sha256 that the pointer names",
    }[found.content_by]
    named = f"the place of {found.model}/{found.part}" if found.wanted_variant else "its name"
    advice = "without guidance in 4 steps" if wanted == "distilled" else "with guidance in 20 to 50 steps"
    return Problem(
        f"{found.path.name} is the {found.variant} variant, not the {wanted} one",
        f"Wanted by {named} are {wanted} weights; this is {found.content}, known by {by}. "
        f"Run {advice}, as {wanted} weights are, it draws badly.",
        found.fix if found.part else f"rename {shell(found.path)} to what it is, and use it so",
        path=str(found.path),
        severity="error" if found.content_by in ("sha256", "fingerprint") else "warning",
        ref="C18",
        evidence=(Evidence(str(found.path), f"{found.content} by {found.content_by}", f"{wanted} weights"),),
        remedy=_fetch(found),
    )


def _wanted_variant(found: FoundFile) -> str:
    """The variant that a file's place asks for, or else its name."""
    words = found.path.name.lower()
    named = [variant for variant in ("base", "distilled") if variant in words]
    return found.wanted_variant or (named[0] if len(named) == 1 else "")


def _variant_differs(found: FoundFile) -> bool:
    if found.content_by == "sha256" and found.sha256 in found.wanted_sha256:
        return False
    return bool(found.variant and _wanted_variant(found)) and found.variant != _wanted_variant(found)


@check("fp8-in-diffusers")
def fp8_in_diffusers(found_file: FoundFile) -> Problem | None:
    """What diffusers is to load is in bf16 and in its own layout, not a file made for ComfyUI."""
    if not found_file.identity.whole or _is_wrong(found_file):
        return None
    if _quantised(found_file):
        return _for_comfyui(found_file)
    return _single_file(found_file) if _in_diffusers(found_file) else None


def _in_diffusers(found: FoundFile) -> bool:
    return found.place in DIFFUSERS and found.folder in DIFFUSERS_FOLDERS


def _quantised(found: FoundFile) -> bool:
    """Whether a file in a folder of diffusers has weights that only ComfyUI reads."""
    gguf = found.identity.kind == "gguf"
    return _in_diffusers(found) and (gguf or _scales(found) is not None or found.identity.dtype in QUANTISED)


def _scales(found: FoundFile) -> str | None:
    facts = found.identity.facts
    return facts.scales if isinstance(facts, (Transformer, TextEncoder)) else None


def _for_comfyui(found: FoundFile) -> Problem:
    identity = found.identity
    how = f"{'GGUF, ' if identity.kind == 'gguf' else ''}{identity.dtype}"
    for_comfyui = _scales(found) != "unmarked"
    move = f"move {shell(found.path.name)} to ComfyUI/models/{_kind(found)}"
    return Problem(
        f"{called(found.path)} is quantised ({how}) and lies where diffusers looks",
        f"Wanted is bf16; this file shows {identity.saw.rstrip('.')}. diffusers does not read such weights: noise, or "
        f"an error about unexpected keys.{' ComfyUI reads them.' if for_comfyui else ''}",
        found.fix or (f"{move}, and: kleinctl install" if for_comfyui else "kleinctl install"),
        name="fp8-in-diffusers",
        path=str(found.path),
        ref="C14",
        evidence=(Evidence(str(found.path), f"{how}", "bf16, without scales"),),
        remedy=_fetch(found),
    )


def _kind(found: FoundFile) -> str:
    return {"text_encoder": "text_encoders", "vae": "vae"}.get(found.folder, "diffusion_models")


def _single_file(found: FoundFile) -> Problem | None:
    """A transformer or VAE under Black Forest Labs' own names, which diffusers' `from_pretrained` does not know."""
    identity = found.identity
    if identity.layout != "single-file" or not identity.family.startswith("flux2"):
        return None
    if identity.role == "transformer" and found.folder == "transformer":
        effect = "which diffusers takes for FLUX.2 [dev]"
        wanted, seen, loader = "context_embedder", "txt_in, double_blocks", "Flux2Transformer2DModel"
    elif isinstance(identity.facts, Vae) and identity.facts.encoder and found.folder == "vae":
        effect = "and diffusers leaves its own at random values: pictures are noise"
        wanted, seen, loader = "decoder.up_blocks", "decoder.up", "AutoencoderKLFlux2"
    else:
        return None
    repo = REPOS.get(identity.family, REPOS["flux2-klein-4b"])
    by_hand = f'{loader}.from_single_file("{found.path}", config="{repo}", subfolder="{found.folder}")   # in Python'
    return Problem(
        f"{called(found.path)} has ComfyUI's layout and lies where diffusers looks",
        f"Wanted are diffusers' names of tensors; this file shows {identity.saw.rstrip('.')}. Its tensors have the "
        f"names of Black Forest Labs, {effect}.",
        found.fix or by_hand,
        name="single-file-config",
        path=str(found.path),
        ref="C13",
        evidence=(Evidence(str(found.path), f"{seen}: single file", f"{wanted}: diffusers"),),
        remedy=_fetch(found),
    )


@check("diffusers-file-in-comfyui")
def diffusers_file_in_comfyui(found_file: FoundFile) -> Problem | None:
    """No FLUX.2 transformer in a ComfyUI has the layout of diffusers."""
    found, identity = found_file, found_file.identity
    flux2 = identity.role == "transformer" and identity.family.startswith("flux2") and identity.whole
    if not flux2 or identity.layout != "diffusers" or found.folder != "diffusion_models" or _is_wrong(found):
        return None  # a ComfyUI's folder "diffusers" is for these
    return Problem(
        f"{called(found.path)} has diffusers' layout and lies in a ComfyUI",
        f"Wanted are Black Forest Labs' names of tensors; this file shows {identity.saw.rstrip('.')}. Its tensors have "
        "diffusers' names, and ComfyUI's loader stops with KeyError: 'x_embedder.bias'.",
        found.fix or f"{shell('kleinctl', 'identify', found.path)}   # and load a file whose layout is single-file",
        path=str(found.path),
        severity="error" if found.part else "warning",
        ref="B16",
        evidence=(Evidence(str(found.path), "transformer_blocks: diffusers", "double_blocks: single file"),),
        remedy=_fetch(found),
    )


@check("hash-known")
def hash_known(model: Model) -> Problem | None:
    """Every part of the model has a known sha256."""
    unknown = [part.name for layout in model.layouts[:1] for part in model.unverified(layout)]
    if not unknown:
        return None
    return Problem(
        f"{model.name} cannot be verified whole",
        f"No sha256 is known of {', '.join(unknown)}; nobody can tell a damaged or exchanged file there.",
        f"kleinctl install --model {model.name} --allow-unverified",
        severity="warning",
        evidence=(Evidence(f"the manifest of {model.name}", f"{len(unknown)} parts without sha256", "none"),),
    )


def _sentence(saw: str) -> str:
    return f"{saw[:1].upper()}{saw[1:].rstrip('.')}."


def _wanted(found: FoundFile) -> str:
    return f"{found.model}/{found.part}, {bytes_text(found.size_bytes or 0)}" if found.part else "a whole weights file"


def _fetch(found: FoundFile) -> Remedy | None:
    """Put the right file in the place of this one, which goes to quarantine; not in the hub's cache, all links."""
    if found.place == "hub-cache":
        return None
    part = f"{found.model}/{found.part}" if found.part else found.content if found.content_by == "pointer" else ""
    if not part:
        return None
    model, _, name = part.partition("/")
    arguments = {"model": model, "part": name, "path": str(found.path)}
    return Remedy("replace-file", arguments, "auto" if found.place == "store" else "ask")
