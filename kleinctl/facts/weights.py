"""The weights files on this machine: where they are, what was wanted there, what they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import documents
from kleinctl.facts import hub_cache
from kleinctl.identify import Identity, LfsPointer, identify
from kleinctl.units import MIB

if TYPE_CHECKING:
    from kleinctl.facts.comfyui import ComfyUI
    from kleinctl.manifest import Model, Part
    from kleinctl.plugins import Plugins

#: The roles that are weights.
ROLES = ("transformer", "text-encoder", "vae")
#: The folders in which a diffusers model keeps them.
FOLDERS = {"transformer": "transformer", "text_encoder": "text-encoder", "vae": "vae"}
#: The kinds of folder where a ComfyUI keeps them; of a folder of several kinds the one that fits its file is meant.
KINDS = {"transformer": "diffusion_models", "text-encoder": "text_encoders", "vae": "vae", "lora": "loras"}
ENDINGS = (".safetensors", ".sft", ".gguf")
#: Bounds of what is looked at in one place.
MAX_FILES, MAX_DEPTH, MAX_JSON = 2000, 6, 2**20
#: Bytes. Two copies of less are not worth a word.
COPY_FROM = 64 * MIB

#: Told the file that is being hashed, the bytes done, and its bytes in all.
Progress = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class FoundFile:
    """A weights file, what its header says it is, and what was wanted in its place.

    `place` is where it lies: "store" (kleinctl's), "hub-cache", "diffusers-folder", "folder" (any other that was
    named), or the name of a ComfyUI. `folder` is the kind of folder in a ComfyUI ("vae", "diffusion_models" ...), the
    name of its folder elsewhere. Where the place says what belongs there, `model`, `part`, `role`, `family`,
    `size_bytes` and `wanted_variant` do too, and `wanted_sha256` has every content that is right; a diffusers folder
    says the role alone; else these are empty. `set_name` is shared by files that would be loaded together; a file
    that is not what its place wants belongs to none. `sha256` is known where the file has been hashed.

    `content` is the part of a manifest that this is whatever its name, `content_by` how that is known: "sha256",
    "fingerprint", "size" (no other part has it), or "pointer" (Git LFS names the part it stands for); `variant` is
    that part's.
    `copy_of` is another file with the same bytes that takes room of its own. `fix` puts the right file there.
    """

    path: Path
    identity: Identity
    place: str
    folder: str = ""
    model: str = ""
    part: str = ""
    role: str = ""
    family: str = ""
    size_bytes: int | None = None
    sha256: str | None = None
    set_name: str = ""
    fix: str = ""
    wanted_sha256: tuple[str, ...] = ()
    wanted_variant: str = ""
    content: str = ""
    content_by: str = ""
    variant: str = ""
    copy_of: str = ""


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder that diffusers would load: its `model_index.json`, and how whole it is.

    `class_name` is the pipeline it asks for, `components` the class of each part, `missing` the files that are named
    and not there. `transformer` is the family of the transformer in it, `variant` that transformer's where its content
    is known. `unfinished_bytes` is what a broken download left in it.
    """

    path: Path
    class_name: str
    components: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_distilled: bool = False
    missing: tuple[str, ...] = ()
    transformer: str = "unknown"
    variant: str = ""
    unfinished: tuple[str, ...] = ()
    unfinished_bytes: int = 0


def gather(
    plugins: Plugins,
    comfyuis: Sequence[ComfyUI] = (),
    folders: Sequence[Path] = (),
    *,
    deep: bool = False,
    progress: Progress | None = None,
) -> tuple[FoundFile, ...]:
    """Every weights file of kleinctl's store, ComfyUI folders, other `folders` that were named, and the hub's cache.

    Headers are read, and nothing is hashed unless `deep`: then each file that could be a part of a manifest.
    """
    look = _Look(plugins, deep, progress)
    files = [
        *_of_the_store(look),
        *(each for comfyui in comfyuis for each in _of_comfyui(look, comfyui)),
        *(each for folder in folders for each in _of_folder(look, folder)),
        *_of_the_hub_cache(look),
    ]
    once = {each.path: each for each in reversed(files)}  # a folder that was named may be one of the others
    return tuple(_with_copies(look, list(reversed(once.values()))[: 2 * MAX_FILES]))


class _Look:
    """How files are looked at: the manifests they are compared with, and what is known of their hashes."""

    def __init__(self, plugins: Plugins, deep: bool, progress: Progress | None) -> None:
        from kleinctl.store import Stamps

        self.models = tuple(plugins.models.values())
        self.signatures = [offer.thing for offer in plugins.offers("kleinctl_signatures")]
        self.stamps = Stamps()
        self.deep, self.progress = deep, progress
        self.parts = [part for model in self.models for part in model.parts if part.role in ROLES]
        self.by_sha256 = {part.sha256: part for part in reversed(self.parts) if part.sha256}
        self.sizes = {part.size for part in self.parts}
        self.variants = {model.name: model.variant for model in self.models}

    def see(self, path: Path, place: str, folder: str, **wanted: Any) -> FoundFile:
        """The file at `path`; `wanted` is what its place says of it."""
        sha256 = self.sha256(path)
        identity = identify(path, self.models, sha256, self.signatures)
        found = FoundFile(path, identity, place, folder, **wanted, sha256=sha256)
        part, by = self.content(found)
        if part:
            variant = self.variants[part.model] if part.role == "transformer" else ""
            found = replace(found, content=part.ref, content_by=by, variant=variant)
        return found if _fits(found) else replace(found, set_name="")

    def sha256(self, path: Path) -> str | None:
        known = self.stamps.sha256(path)
        if known or not self.deep:
            return known
        from kleinctl.verify import hash_file

        with suppress(OSError):
            size = path.stat().st_size
            told = (lambda done: self.progress(path, done, size)) if self.progress else None  # type: ignore[misc]
            return hash_file(path, told) if size in self.sizes else None
        return None

    def content(self, found: FoundFile) -> tuple[Part | None, str]:
        """The part whose content a file has, and how that is known."""
        identity = found.identity
        if isinstance(identity.facts, LfsPointer):
            return self.by_sha256.get(identity.facts.sha256), "pointer"
        if found.sha256:
            return self.by_sha256.get(found.sha256), "sha256"
        if identity.sure == "fingerprint":
            return next(part for part in self.parts if part.ref == identity.part), "fingerprint"
        alike = [
            part
            for part in self.parts
            if part.size == identity.size_bytes and part.role == identity.role and part.family == identity.family
            if not (part.fingerprint and identity.whole)  # it would have been known by that
        ]
        return (alike[0], "size") if len({part.sha256 for part in alike}) == 1 else (None, "")


def _fits(found: FoundFile) -> bool:
    """Whether a file is of the kind that its place wants."""
    own = found.identity
    return own.role == found.role and own.family == (found.family or own.family)


def _wanted(model: Model, layout: str, part: Part) -> dict[str, Any]:
    """What the place of a part says of the file there."""
    return {
        "model": model.name,
        "part": part.id,
        "role": part.role,
        "family": part.family,
        "size_bytes": part.size,
        "wanted_sha256": tuple(each.sha256 for each in model.accepted(part, layout) if each.sha256),
        "wanted_variant": model.variant if part.role == "transformer" else "",
        "fix": f"kleinctl install --model {model.name}",
    }


def _parts(model: Model, layout: str) -> list[Part]:
    """The weights of a layout in all precisions, one for each destination."""
    places = {part.to[layout]: part for part in reversed(model.parts) if layout in part.to and part.role in ROLES}
    return list(reversed(places.values()))


def _of_the_store(look: _Look) -> Iterator[FoundFile]:
    from kleinctl import store

    for model in look.models:
        for layout in model.layouts:
            root = store.model_folder(model.name, layout)
            for part in _parts(model, layout) if root.is_dir() else ():
                path = root / part.to[layout]  # confined by the manifest
                if path.name.endswith(ENDINGS) and os.path.lexists(path):
                    own = {**_wanted(model, layout, part), "set_name": f"store/{model.name}/{layout}"}
                    yield look.see(path, "store", path.parent.name, **own)


def _of_comfyui(look: _Look, comfyui: ComfyUI) -> Iterator[FoundFile]:
    """The files in the folders that a ComfyUI reads; what their names promise counts in subfolders too."""
    found = _walk_kinds(comfyui)
    names = {path.name for path in found}
    places = _comfyui_places(look, names)
    fix = f'kleinctl doctor --fix --comfyui "{comfyui.path}"'
    for path, kinds in found.items():
        meant = [(kind, *places[kind, path.name]) for kind in kinds if (kind, path.name) in places][:1]
        for kind, model, part in meant:
            own = {**_wanted(model, "comfyui", part), "set_name": f"{comfyui.name}/{model.name}", "fix": fix}
            yield look.see(path, comfyui.name, kind, **own)
        if not meant:
            seen = look.see(path, comfyui.name, kinds[0])
            own_kind = KINDS.get(seen.identity.role, "")
            yield replace(seen, folder=own_kind) if own_kind in kinds else seen


def _comfyui_places(look: _Look, names: set[str]) -> dict[tuple[str, str], tuple[Model, Part]]:
    """What a kind of folder and a file's name promise. Of two models that share a part, the one whose transformer is
    here comes first."""
    models = [model for model in look.models if "comfyui" in model.layouts]
    here = {model.name: any(p.role == "transformer" and p.name in names for p in model.parts) for model in models}
    places: dict[tuple[str, str], tuple[Model, Part]] = {}
    for model in sorted(models, key=lambda model: not here[model.name]):
        for part in _parts(model, "comfyui"):
            kind, _, name = part.to["comfyui"].rpartition("/")
            places.setdefault((kind, name), (model, part))
    return places


def _walk_kinds(comfyui: ComfyUI) -> dict[Path, list[str]]:
    """Weights files of a ComfyUI, each with the kinds of folder that it lies in (one folder may serve as several)."""
    from kleinctl.facts.comfyui import model_folders

    kinds: dict[str, tuple[Path, list[str]]] = {}
    for kind, folder in model_folders(comfyui):
        _, known = kinds.setdefault(os.path.realpath(folder), (folder, []))
        known += [kind] if kind not in known else []
    found: dict[Path, list[str]] = {}
    for folder, own in kinds.values():
        for path in walk(folder):
            known = found.setdefault(path, [])
            known += [kind for kind in own if kind not in known]
        if len(found) >= MAX_FILES:
            break
    return found


def _of_folder(look: _Look, folder: Path) -> Iterator[FoundFile]:
    """The files in a folder that was named; where diffusers would load it, they are a set."""
    whole = os.path.isfile(folder / "model_index.json")  # noqa: PTH113 (False, too, in a folder that is closed)
    for path in walk(folder):
        inside = whole and path.parent.parent == folder
        role = FOLDERS.get(path.parent.name, "") if inside else ""
        own = {"role": role, "set_name": f"folder/{folder.name}"} if role else {}
        seen = look.see(path, "diffusers-folder" if whole else "folder", path.parent.name, **own)
        if whole and seen.identity.role == "lora":
            seen = replace(seen, role="lora", set_name=f"folder/{folder.name}")
        yield seen


def _of_the_hub_cache(look: _Look) -> Iterator[FoundFile]:
    sources = {
        (source.repo, source.path): (model, part, source)
        for model in reversed(look.models)
        for part in model.parts
        if part.role in ROLES
        for source in reversed(part.sources)
        if source.repo
    }
    for repo, folder in hub_cache.snapshots(look.models):
        for path in walk(folder):
            inside = path.relative_to(folder).as_posix()
            own: dict[str, Any] = {}
            if (repo, inside) in sources:
                model, part, source = sources[repo, inside]
                layout = next(iter(part.to))
                own = {**_wanted(model, layout, part), "fix": f"hf download {repo} {inside} --force-download"}
                if source.revision != folder.name:
                    own["wanted_sha256"] = ()  # another revision may have another content
                if layout == "diffusers":
                    own["set_name"] = f"hub-cache/{repo}/{folder.name[:8]}"
            yield look.see(path, "hub-cache", path.parent.name if "/" in inside else "", **own)


def walk(folder: Path) -> Iterator[Path]:
    """The weights files in `folder`, in order. Links are followed, loops are not, and hidden folders are left out."""
    seen: set[str] = set()
    waiting, count = [(str(folder), 0)], 0
    while waiting and count < MAX_FILES:
        here, depth = waiting.pop(0)
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as entries:
                for entry in sorted(entries, key=lambda each: each.name):
                    if entry.name.endswith(ENDINGS) and not entry.is_dir():
                        count += 1
                        yield Path(entry.path)
                    elif depth < MAX_DEPTH and not entry.name.startswith(".") and entry.is_dir():
                        waiting.append((entry.path, depth + 1))
        except OSError:
            continue


# The same bytes twice


def _with_copies(look: _Look, files: Sequence[FoundFile]) -> Iterator[FoundFile]:
    """The files, those marked whose bytes an earlier one has too, on room of its own."""
    sizes: dict[int, int] = {}
    for each in files:
        sizes[each.identity.size_bytes] = sizes.get(each.identity.size_bytes, 0) + 1
    first: dict[str, tuple[Path, tuple[int, int]]] = {}
    for each in files:
        size = each.identity.size_bytes
        content = _content(look, each) if size >= COPY_FROM and sizes[size] > 1 and each.identity.whole else ""
        if content:
            at = _room(each.path)
            before, room = first.setdefault(content, (each.path, at))
            if before != each.path and room != at:
                yield replace(each, copy_of=str(before))
                continue
        yield each


def _content(look: _Look, found: FoundFile) -> str:
    """What names a file's content: its sha256, as hashed, or as the hub's cache or a manifest gives it."""
    if found.sha256:
        return found.sha256
    if found.place == "hub-cache":
        with suppress(OSError):
            blob = Path(os.readlink(found.path)).name  # noqa: PTH115 (it raises where there is no link)
            if re.fullmatch(r"[0-9a-f]{64}", blob):
                return blob
    same = [part for part in look.parts if part.ref == found.content] if found.content_by == "size" else []
    return (same[0].sha256 or "") if same else ""


def _room(path: Path) -> tuple[int, int]:
    """Disk and inode: the same for two names of one file."""
    try:
        facts = path.stat()
    except OSError:
        return (0, 0)
    return facts.st_dev, facts.st_ino


# Folders of diffusers


def diffusers_folders(folders: Iterable[Path], files: Sequence[FoundFile] = ()) -> tuple[DiffusersFolder, ...]:
    """Those of the named `folders` that diffusers would load; `files` are what `gather` found in them."""
    read = ((folder, _json(folder / "model_index.json")) for folder in folders)
    return tuple(_diffusers_folder(folder, index, files) for folder, index in read if index)


def _diffusers_folder(folder: Path, index: Mapping[str, Any], files: Sequence[FoundFile]) -> DiffusersFolder:
    components = {
        name[:100]: str(value[1])[:100]
        for name, value in list(index.items())[:50]
        if isinstance(value, list) and len(value) == 2 and value[1]
    }
    own = [each for each in files if each.path.parent == folder / "transformer"]
    unfinished = hub_cache.unfinished(folder / ".cache" / "huggingface" / "download")
    return DiffusersFolder(
        path=folder,
        class_name=str(index.get("_class_name", ""))[:100],
        components=components,
        is_distilled=index.get("is_distilled") is True,
        missing=tuple(missing for name in components for missing in _missing(folder, name))[:100],
        transformer=own[0].identity.family if own else "unknown",
        variant=own[0].variant if own else "",
        unfinished=tuple(unfinished),
        unfinished_bytes=sum(unfinished.values()),
    )


def _missing(folder: Path, component: str) -> Iterator[str]:
    """What a component lacks: its folder, its weights, or shards that its index names."""
    try:
        names = {entry.name for entry in os.scandir(folder / component)}
    except OSError:
        yield component
        return
    if component in FOLDERS and not any(name.endswith((*ENDINGS, ".bin", ".index.json")) for name in names):
        yield f"{component}/*.safetensors"
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json"))[:1]:
        shards = _json(folder / component / index).get("weight_map")
        wanted = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
        yield from (f"{component}/{shard}" for shard in wanted if shard not in names)


def _json(path: Path) -> dict[str, Any]:
    """An object in a small JSON file; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(documents.start_of(path, MAX_JSON))
        return found if isinstance(found, dict) else {}
    return {}
