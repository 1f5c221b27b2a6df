"""Is each weights file what its place says it is?"""

from __future__ import annotations

from kleinctl.checks import check
from kleinctl.facts.weights import FoundFile
from kleinctl.identify import title
from kleinctl.manifest import Model
from kleinctl.problem import Problem, Remedy
from kleinctl.units import bytes_text

BROKEN = {
    "truncated": "cut short",
    "lfs-pointer": "a Git LFS pointer, not the file it stands for",
    "web-page": "a web page that was saved instead of the file",
    "json": "a JSON document, most likely a hub's error message",
    "zeros": "nothing but zeros: a download that was prepared and never filled",
    "empty": "empty",
    "pickle": "a pickle, which can run code when it is loaded and is never opened",
    "unreadable": "not readable",
    "other": "no weights file",
}
REFS = {"qwen3-8b": "C01", "mistral-small": "C02", "t5-xxl": "C04", "qwen3-4b": "C05", "qwen3-vl": "C06"}
ROLES = {"vae": "VAE", "text-encoder": "text encoder", "transformer": "transformer"}


@check("weights-readable")
def weights_readable(found_file: FoundFile) -> Problem | None:
    """Every weights file is complete and is a weights file."""
    identity = found_file.identity
    if identity.kind not in BROKEN:
        return None
    size = f" It has {bytes_text(identity.size_bytes)}"
    size += f" of {bytes_text(found_file.size_bytes)}." if found_file.size_bytes else "."
    return Problem(
        f"{found_file.path.name} is {BROKEN[identity.kind]}",
        f"{identity.saw[:1].upper()}{identity.saw[1:].rstrip('.')}.{size}",
        found_file.fix,
        name=f"weights-{identity.kind}",
        path=str(found_file.path),
        remedy=_fetch(found_file),
    )


@check("wrong-vae")
def wrong_vae(found_file: FoundFile) -> Problem | None:
    """The VAE is the model's own."""
    return _wrong(found_file, "vae")


@check("wrong-text-encoder")
def wrong_text_encoder(found_file: FoundFile) -> Problem | None:
    """The text encoder is the one the transformer was trained with."""
    return _wrong(found_file, "text-encoder")


@check("wrong-transformer")
def wrong_transformer(found_file: FoundFile) -> Problem | None:
    """The transformer is the model's own."""
    return _wrong(found_file, "transformer")


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
    )


def _wrong(found: FoundFile, role: str) -> Problem | None:
    identity = found.identity
    if (
        found.role != role
        or identity.kind in BROKEN
        or identity.family in (found.family, "unknown")
        or not found.family
    ):
        return None
    wanted = f"{title(found.family)}" if identity.role == role else f"a {ROLES[role]}, {title(found.family)}"
    return Problem(
        f"{found.path.name} is not the {ROLES[role]} of {found.model}",
        f"Wanted is {wanted}; this file shows {identity.saw.rstrip('.')}.",
        found.fix,
        path=str(found.path),
        remedy=_fetch(found),
        ref=REFS.get(identity.family, "C09" if role == "vae" else None),
    )


def _fetch(found: FoundFile) -> Remedy | None:
    """Put the right file in the place of this one, which goes to quarantine."""
    if not found.part:
        return None
    arguments = {"model": found.model, "part": found.part, "path": str(found.path)}
    return Remedy("replace-file", arguments, "auto" if found.place == "store" else "ask")
