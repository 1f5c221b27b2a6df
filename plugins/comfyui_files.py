"""The files that ComfyUI would load, judged by their headers before a run is spent.

ComfyUI notices a wrong VAE after sampling, a wrong text encoder in the sampler, and fp8 scales without a mark never.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kleinctl import KleinctlError, Model, Problem, comfyui, identify, misfits

ROLES = {"transformer": "transformer", "text-encoder": "text encoder", "vae": "VAE"}
#: Size, time of the last change in nanoseconds, and number of a file: another file under a name has others.
Mark = tuple[int, int, int]
#: So many pieces of so many bytes are compared of two files of one size, the header at its beginning among them.
PIECES, PIECE_BYTES = 64, 4096


@dataclass(frozen=True)
class Load:
    """A file that a node of a graph loads: the kind of folder it is listed from, its role, and its name there."""

    kind: str
    role: str
    name: str


def loads(api: Mapping[str, Mapping[str, Any]]) -> list[Load]:
    """The weights that a graph loads."""
    known = {each["node"]: each for each in comfyui.catalogue()["loader"] if each["role"] in ROLES}
    found = []
    for node in (each for each in api.values() if isinstance(each, dict)):
        loader, inputs = known.get(str(node.get("class_type"))), node.get("inputs")
        if loader is None or not isinstance(inputs, dict):
            continue
        for key in loader["inputs"]:
            name = inputs.get(key)
            if isinstance(name, str):
                found.append(Load(loader["kind"], loader["role"], name))
    return found


def marks(paths: Sequence[Path]) -> dict[Path, Mark]:
    """What tells these files from others under the same names."""
    facts = {path: path.stat() for path in paths if path.exists()}
    return {path: (each.st_size, each.st_mtime_ns, each.st_ino) for path, each in facts.items()}


def alike(one: Path, other: Path) -> bool:
    """Whether two files are the same, as far as a few pieces tell."""
    return one.samefile(other) or (one.stat().st_size == other.stat().st_size and _pieces(one) == _pieces(other))


def _pieces(path: Path) -> list[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        return [file.read(PIECE_BYTES) for number in range(PIECES) if file.seek(size * number // PIECES) >= 0]


def install(model: Model) -> str:
    """The command that puts the right files there."""
    return f"kleinctl install --model {model.name} --backend comfyui-fp8"


def check(found: Mapping[Load, Path], model: Model, *, editing: bool, own: bool) -> None:
    """Whether these files make klein's picture. `own` is whether the graph is ours: a user's may be for another model.

    Raises:
        KleinctlError: one is broken, or belongs to something else.
    """
    known = {load: identify.identify(path, [model]) for load, path in found.items()}
    fix = install(model)
    drawn = {load: each for load, each in known.items() if each.whole and load.role == each.role == "transformer"}
    if drawn and not any(each.family.startswith("flux2-klein") for each in drawn.values()):
        if not own:
            return
        raise KleinctlError(replace(_other(*next(iter(drawn.items()))), fix=fix))
    for problem in _problems(known, editing):
        raise KleinctlError(replace(problem, fix=fix, remedy=None))


def _problems(known: Mapping[Load, identify.Identity], editing: bool) -> list[Problem]:
    alone = (_broken, _role, _layout, _scales, _statistics, _decoder if editing else _nothing)
    found = [problem for load, each in known.items() for judge in alone if (problem := judge(load, each))]
    return found + misfits(each.facts for each in known.values())


Judge = Callable[[Load, identify.Identity], "Problem | None"]


def _nothing(load: Load, found: identify.Identity) -> Problem | None:
    return None


def _broken(load: Load, found: identify.Identity) -> Problem | None:
    if found.whole:
        return None
    name, path = f"weights-{found.kind}", str(found.path)
    ref = {"truncated": "B02", "lfs-pointer": "B03", "pickle": "B03"}.get(found.kind, "B04")
    return Problem(f"{load.name} is no whole weights file", f"It is {found.saw}.", "", name=name, path=path, ref=ref)


def _role(load: Load, found: identify.Identity) -> Problem | None:
    if found.role == load.role:
        return None
    names = {"transformer": "wrong-transformer", "text-encoder": "wrong-text-encoder", "vae": "wrong-vae"}
    what = f"{load.name} is not a {ROLES[load.role]} that is known here"
    why = f"It lies in {load.kind}; its header shows {found.saw.rstrip('.')}."
    return Problem(what, why, "", name=names[load.role], path=str(found.path), ref="B16")


def _other(load: Load, found: identify.Identity) -> Problem:
    what = f"{load.name} is the transformer of another model"
    why = f"Wanted is one of FLUX.2 [klein]; its header shows {found.saw.rstrip('.')}."
    return Problem(what, why, "", name="wrong-transformer", path=str(found.path), ref="B16")


def _layout(load: Load, found: identify.Identity) -> Problem | None:
    if found.role != "transformer" or found.layout != "diffusers":
        return None
    what = f"{load.name} has the layout of diffusers"
    why = "ComfyUI wants a transformer's weights named as in the original single file."
    return Problem(what, why, "", name="diffusers-file-in-comfyui", path=str(found.path), ref="B16")


def _scales(load: Load, found: identify.Identity) -> Problem | None:
    if getattr(found.facts, "scales", None) != "unmarked":
        return None
    what = f"ComfyUI would ignore the fp8 scales of {load.name}"
    why = "They have no mark that it looks for: it leaves them out without a word, and paints noise."
    return Problem(what, why, "", name="fp8-scales-unread", path=str(found.path), ref="C22")


def _statistics(load: Load, found: identify.Identity) -> Problem | None:
    if not isinstance(found.facts, identify.Vae) or found.family != "flux2-vae" or found.facts.statistics:
        return None
    what = f"{load.name} lacks the statistics of its latents"
    why = "Wanted are bn.running_mean and bn.running_var; without them ComfyUI takes it for another kind of VAE."
    return Problem(what, why, "", name="wrong-vae", path=str(found.path), ref="C09")


def _decoder(load: Load, found: identify.Identity) -> Problem | None:
    if not isinstance(found.facts, identify.Vae) or found.facts.encoder:
        return None
    what = f"{load.name} is a decoder only"
    why = "An edit encodes its reference pictures; ComfyUI would do that with weights that were never set."
    return Problem(what, why, "", name="vae-decoder-only", path=str(found.path), ref="C11")
