"""Do the parts of a model belong together?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kleinctl.checks import check
from kleinctl.checks.files import BELONGS, REFS, called
from kleinctl.facts.comfyui import ComfyUI
from kleinctl.facts.weights import DiffusersFolder, FoundFile
from kleinctl.identify import Lora, TextEncoder, Transformer, Vae, encoder_title, title
from kleinctl.problem import Evidence, Problem, Remedy, shell

# klein reads its prompt from three layers of the text encoder, laid side by side.
LAYERS_READ = 3
# The transformer sees latents in patches of 2 x 2: 32 channels become 128.
PATCH = 4
#: The text encoder that each FLUX.2 was trained with.
ENCODERS = {"flux2-klein-4b": "qwen3-4b", "flux2-klein-9b": "qwen3-8b", "flux2-dev": "mistral-small"}
#: Pipelines of diffusers that read klein's folders.
KLEIN_PIPELINES = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")


@check("text-encoder-width")
def text_encoder_width(transformer: Transformer, text_encoder: TextEncoder) -> Problem | None:
    """The text encoder is the one this transformer was trained with."""
    if not transformer.family.startswith("flux2"):
        return None
    width = transformer.text_width // LAYERS_READ
    family = ENCODERS.get(transformer.family, text_encoder.family)
    if (text_encoder.width, text_encoder.family) == (width, family):
        return None
    name = "text-encoder-width" if text_encoder.width != width else "wrong-text-encoder"
    belongs = f" It belongs to {BELONGS[text_encoder.family]}." if text_encoder.family in BELONGS else ""
    return Problem(
        what=f"{called(text_encoder.path)} does not fit {called(transformer.path)}",
        why=f"The transformer is {title(transformer.family)} and needs {encoder_title(width)}; "
        f"this file is {text_encoder.title}.{belongs} Its VAE is not concerned.",
        fix=_fix(transformer),
        name="text-encoder-vl" if text_encoder.family == "qwen3-vl" else name,
        path=str(text_encoder.path),
        ref=REFS.get(text_encoder.family),
        evidence=(
            Evidence(str(transformer.path), f"text input {transformer.text_width} wide"),
            Evidence(str(text_encoder.path), text_encoder.title, encoder_title(width)),
        ),
        remedy=_fetch(transformer, "text-encoder", text_encoder.path),
    )


@check("vae-channels")
def vae_channels(transformer: Transformer, vae: Vae) -> Problem | None:
    """The VAE makes latents of the depth that this transformer reads."""
    wanted, found = transformer.image_channels // PATCH, vae.latent_channels
    flux2 = transformer.family.startswith("flux2")
    if found == wanted and not (flux2 and vae.family != "flux2-vae"):
        return None
    return Problem(
        what=f"{called(vae.path)} does not fit {called(transformer.path)}",
        why=f"The transformer is {title(transformer.family)} and reads latents of {wanted} channels; "
        f"this VAE is {title(vae.family)} and makes {found}.",
        fix=_fix(transformer),
        name="vae-channels" if found != wanted else "wrong-vae",
        path=str(vae.path),
        ref="C09" if flux2 else "C10",
        evidence=(
            Evidence(str(transformer.path), f"image input {transformer.image_channels} wide"),
            Evidence(str(vae.path), f"{found} latent channels", f"{wanted} latent channels"),
        ),
        remedy=_fetch(transformer, "vae", vae.path),
    )


def misfits(parts: Iterable[Any]) -> list[Problem]:
    """What does not belong together of weights that would be loaded together, by the `facts` of each `Identity`."""
    facts, found = list(parts), list[Any]()
    for transformer in (each for each in facts if isinstance(each, Transformer)):
        found += [text_encoder_width.function(transformer, each) for each in facts if isinstance(each, TextEncoder)]
        found += [vae_channels.function(transformer, each) for each in facts if isinstance(each, Vae)]
    return [each for each in found if each is not None]


@check("vae-with-encoder")
def vae_with_encoder(comfyui: ComfyUI, comfyui_files: tuple[FoundFile, ...]) -> Problem | None:
    """A ComfyUI that has klein has a whole FLUX.2 VAE, and not a decoder alone."""
    vaes = [each for each in comfyui_files if each.identity.family == "flux2-vae" and each.identity.whole]
    if not _kleins(comfyui_files) or not vaes or any(each.part for each in vaes):
        return None  # in the place of a part it is looked at by itself
    if any(not isinstance(each.identity.facts, Vae) or each.identity.facts.encoder for each in vaes):
        return None
    return Problem(
        what=f"{vaes[0].path.name} is the only FLUX.2 VAE of {comfyui.name}, and a decoder only",
        why="Wanted is a VAE with encoder and decoder; this file has no encoder. Loading it as a VAE fails, or "
        "pictures cannot be edited.",
        fix="hf download Comfy-Org/flux2-dev split_files/vae/flux2-vae.safetensors   # into models/vae",
        name="vae-decoder-only",
        severity="warning",
        path=str(vaes[0].path),
        ref="C11",
        evidence=(Evidence(str(vaes[0].path), "no tensor named encoder.*", "encoder.* and decoder.*"),),
    )


@check("lora-mismatch")
def lora_mismatch(transformer: Transformer, lora: Lora) -> Problem | None:
    """A LoRA was made for the transformer beside it."""
    if lora.family in ("unknown", "flux2-other", transformer.family) or not transformer.family.startswith("flux2"):
        return None
    return _lora_problem([lora.path], lora.family, title(transformer.family), str(lora.path.parent), "error")


@check("loras-of-comfyui")
def loras_of_comfyui(comfyui: ComfyUI, comfyui_files: tuple[FoundFile, ...]) -> Iterator[Problem]:
    """A ComfyUI with klein has no LoRAs of FLUX models whose transformer it lacks."""
    kleins = _kleins(comfyui_files)
    here = {each.identity.family for each in comfyui_files if each.identity.role == "transformer"}
    if not kleins:
        return
    loras = [each for each in comfyui_files if each.identity.role == "lora"]
    for family in ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev", "flux1"):
        own = [each.path for each in loras if each.identity.family == family]
        absent = not here & ({family} if family != "flux1" else {"flux1", "chroma"})  # Chroma takes FLUX.1's LoRAs
        if own and absent:
            yield _lora_problem(own, family, " and ".join(map(title, kleins)), comfyui.name, "warning")


def _kleins(files: Sequence[FoundFile]) -> list[str]:
    return sorted({each.identity.family for each in files if each.identity.family.startswith("flux2-klein")
                   and each.identity.role == "transformer"})  # fmt: skip


def _lora_problem(paths: Sequence[Path], family: str, present: str, where: str, severity: str) -> Problem:
    names = ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    one = len(paths) == 1
    effect = (
        "Its attention is as wide, so part of it would load and spoil the picture."
        if family == "flux1"
        else "Its layers would not load: hundreds of lines `lora key not loaded`, and a picture without it."
    )
    return Problem(
        what=f"{names} {'is a LoRA' if one else 'are LoRAs'} for {title(family)}",
        why=f"Wanted are LoRAs for {present}, the transformer of {where}; found {'is one' if one else 'are some'} for "
        f"{title(family)}. {effect}",
        fix=f"{shell('kleinctl', 'identify', paths[0])}   # and load only LoRAs that say {present}",
        name="lora-flux1" if family == "flux1" else "lora-mismatch",
        severity="error" if severity == "error" else "warning",
        path=str(paths[0]),
        ref="C17" if family == "flux1" else "C16",
        evidence=tuple(Evidence(str(path), title(family), present) for path in paths[:3]),
    )


@check("wrong-pipeline-class")
def wrong_pipeline_class(diffusers_folder: DiffusersFolder) -> Problem | None:
    """A diffusers folder with klein in it asks for klein's pipeline."""
    folder = diffusers_folder
    encoder = folder.components.get("text_encoder", "")
    klein = folder.transformer.startswith("flux2-klein") or (
        encoder.startswith("Qwen3") and folder.components.get("transformer") == "Flux2Transformer2DModel"
    )
    if not klein or not folder.class_name or folder.class_name in KLEIN_PIPELINES:
        return None
    index = folder.path / "model_index.json"
    return Problem(
        f"{folder.path.name} asks for {folder.class_name}, and klein is in it",
        f'Wanted is "_class_name": "Flux2KleinPipeline"; model_index.json says {folder.class_name}, whose text '
        f"encoder is another than klein's {encoder or 'Qwen3'}.",
        f'set "_class_name": "Flux2KleinPipeline" in {index}',
        path=str(index),
        ref="C15",
        evidence=(Evidence(str(index), folder.class_name, "Flux2KleinPipeline"),),
    )


@check("folder-variant")
def folder_variant(diffusers_folder: DiffusersFolder) -> Problem | None:
    """A diffusers folder says of its transformer what it is: distilled or base."""
    folder = diffusers_folder
    said = "distilled" if folder.is_distilled else "base"
    variant = folder.variant or _variant_by_name(folder.path.name)
    if not variant or variant == said or folder.class_name != "Flux2KleinPipeline":
        return None
    index, wanted = folder.path / "model_index.json", str(variant == "distilled").lower()
    known = (
        "the content of the transformer is known and is" if folder.variant else "the folder's name, which may err, says"
    )
    return Problem(
        f"{folder.path.name} {'has' if folder.variant else 'is named for'} {variant} weights and is marked as {said}",
        f'Wanted is "is_distilled": {wanted} in model_index.json, for {known} the {variant} variant; found is the '
        "opposite.",
        f'set "is_distilled": {wanted} in {index}',
        name="wrong-variant",
        severity="error" if folder.variant else "warning",
        path=str(index),
        ref="C18",
        evidence=(Evidence(str(index), said, variant),),
    )


def _variant_by_name(name: str) -> str:
    """What a folder called as the hub's repositories are has in it."""
    found = re.fullmatch(r"(?:.*[-_])?flux\.?2-klein-(base-)?[49]b", name.lower())
    return "" if not found else "base" if found[1] else "distilled"


@check("folder-transformer")
def folder_transformer(diffusers_folder: DiffusersFolder, files: tuple[FoundFile, ...]) -> Problem | None:
    """The transformer in a folder that asks for klein's pipeline is klein's."""
    folder = diffusers_folder
    if folder.class_name not in KLEIN_PIPELINES:
        return None
    own = [each for each in files if each.path.parent == folder.path / "transformer" and each.identity.whole]
    other = next((each for each in own if not each.identity.family.startswith("flux2")), None)
    if other is None or other.part:
        return None
    known = other.identity.family != "unknown"
    return Problem(
        f"{called(other.path)} is not {'' if known else 'known to be '}a transformer of klein",
        f"Wanted by {folder.class_name} is FLUX.2 [klein]; this file shows {other.identity.saw.rstrip('.')}.",
        "kleinctl install   # a whole copy in kleinctl's store; this folder stays as it is",
        name="wrong-transformer" if known else "wrong-content",
        severity="error" if known else "warning",
        path=str(other.path),
        ref="B16",
        evidence=(Evidence(str(other.path), other.identity.saw, "FLUX.2 [klein]"),),
    )


@check("folder-whole")
def folder_whole(diffusers_folder: DiffusersFolder) -> Problem | None:
    """A diffusers folder has every part that its model_index.json names."""
    folder = diffusers_folder
    if not folder.missing:
        return None
    left = f" A download left {len(folder.unfinished)} files half done." if folder.unfinished else ""
    return Problem(
        f"{folder.path.name} lacks {', '.join(folder.missing[:3])}",
        f"Wanted is every part that model_index.json names; {len(folder.missing)} of them "
        f"{'is' if len(folder.missing) == 1 else 'are'} not there.{left}",
        "kleinctl install   # or fetch the folder again with: hf download",
        name="part-missing",
        path=str(folder.path),
        ref="C24",
        evidence=(Evidence(str(folder.path), "missing: " + ", ".join(folder.missing[:10]), "all components"),),
    )


@check("folder-kv")
def folder_kv(diffusers_folder: DiffusersFolder) -> Problem | None:
    """A diffusers folder is not the KV variant of klein, which needs a pipeline of its own."""
    folder = diffusers_folder
    by_class = folder.class_name == "Flux2KleinKVPipeline"
    if not by_class and not folder.path.name.lower().endswith(("9b-kv", "4b-kv")):
        return None
    return Problem(
        f"{folder.path.name} is the KV variant of klein",
        "Wanted is klein itself; the KV variant keeps reference pictures in memory, needs far more VRAM, and runs with "
        f"Flux2KleinKVPipeline only. It is told by its {'pipeline class' if by_class else 'name'}.",
        "kleinctl install   # fetches the usual variant",
        name="kv-variant",
        severity="warning",
        path=str(folder.path),
        ref="C25",
        evidence=(Evidence(str(folder.path), folder.class_name or folder.path.name, "Flux2KleinPipeline"),),
    )


def _fix(transformer: Transformer) -> str:
    own = "   # a whole copy in kleinctl's store; this folder stays as it is"
    own = own if transformer.path.parent.name == "transformer" else ""
    return f"kleinctl install --model {transformer.model}{own}" if transformer.model else "kleinctl models"


def _fetch(transformer: Transformer, part: str, path: Path) -> Remedy | None:
    """Put the part of the transformer's model in the place of this file; a shard cannot be replaced alone."""
    if not transformer.model or part != "vae":
        return None
    return Remedy("replace-file", {"model": transformer.model, "part": part, "path": str(path)}, "ask")
