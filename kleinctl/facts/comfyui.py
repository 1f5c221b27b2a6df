"""A ComfyUI folder, read without importing or running anything of it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import documents

if TYPE_CHECKING:
    from kleinctl.environment import Environment

#: Kinds of model folder that matter here, and the folders below `models` that each is read from, as folder_paths.py
#: of ComfyUI has them.
KINDS: Mapping[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("unet", "diffusion_models"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
    "controlnet": ("controlnet", "t2i_adapter"),
    "upscale_models": ("upscale_models",),
    "latent_upscale_models": ("latent_upscale_models",),
    "clip_vision": ("clip_vision",),
    "model_patches": ("model_patches",),
}
#: Old names of kinds, still read in `extra_model_paths.yaml`.
OLD_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}
#: Kinds that ComfyUI also looks for in its output folder, where its own nodes save them.
SAVED = ("checkpoints", "text_encoders", "vae", "diffusion_models", "loras")
#: Endings that loaders list; `.gguf` is listed by the nodes of ComfyUI-GGUF alone.
ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")

#: Bounds of what is read: bytes of a small text, of a log, of custom nodes' code; files of a kind, levels of folders.
MAX_SMALL, MAX_LOG, MAX_CODE, MAX_FILES, MAX_LEVELS = 2**18, 2**19, 2**25, 4000, 8
#: An `extra_model_paths.yaml` has a page of text, and no brackets; its parser takes long for more.
MAX_YAML, MAX_BRACKETS = 2**15, 100
#: What the section is called that names a models folder which the arguments lead away from.
OWN = "own_models"
#: The longest text that facts carry in a report.
MAX_FACT = 2000


@dataclass(frozen=True)
class ExtraPath:
    """A line of `extra_model_paths.yaml`: the kind of folder it names, where that is, and whether it is there."""

    file: str
    line: int
    kind: str
    path: str
    exists: bool


@dataclass(frozen=True)
class CustomNode:
    """A folder in `custom_nodes`. `version` and `id` as its pyproject.toml has them.

    `current`: its code knows what klein needs of it (None: no such thing is known of this pack). `failure` is why it
    could not be imported, by the newest log.
    """

    name: str
    version: str | None = None
    id: str = ""
    disabled: bool = False
    current: bool | None = None
    failure: str = ""


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI folder. `name` tells several apart and is the `place` of its files; `path` holds its `models`.

    `version` as `comfyui_version.py` or else the log has it. `layout` is `checkout`, `portable` (the Windows one),
    `base-directory` (models and settings without the program, as the Desktop app keeps them) or `models`.
    `extra_paths` is what `extra_model_paths.yaml` adds (`yaml_file`), with `yaml_error` where that cannot be read and
    `yaml_patch` lines of it that could be; `unlisted` are folders with weights beside those it names that it does
    not name. `arguments` are those of the script that starts it, or of the Desktop app's settings. `nodes` are those
    node types of `sought` that its custom nodes have. `environment` names its Python (`python`) among the
    environments. `log` is its newest log's path, `dynamic_vram` whether that says it is on.
    `folders` are the folders that are searched for each kind, `files` the names that its loaders list, and `unread`
    weights in its own `models` that it does not read, because its arguments name another folder: then `yaml_patch` has
    the lines that name it too. `script` is the file that has the arguments, and `git` tells a git checkout.
    """

    name: str
    path: str
    version: str | None = None
    layout: str = "checkout"
    extra_paths: tuple[ExtraPath, ...] = ()
    yaml_error: str = ""
    custom_nodes: tuple[CustomNode, ...] = ()
    arguments: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    environment: str | None = None
    log: str | None = None
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    unread: tuple[str, ...] = ()
    unlisted: tuple[ExtraPath, ...] = ()
    yaml_file: str = ""
    yaml_patch: tuple[str, ...] = ()
    python: str | None = None
    dynamic_vram: bool | None = None
    sought: tuple[str, ...] = ()
    script: str | None = None
    git: bool = False

    def argument(self, flag: str) -> str | None:
        """What follows `flag` among the arguments; an empty string where nothing does, None where it is absent."""
        return argument(self.arguments, flag)


def argument(arguments: tuple[str, ...], flag: str) -> str | None:
    """What follows `flag` among `arguments`; an empty string where nothing does, None where it is absent."""
    for at, word in enumerate(arguments):
        if word == flag:
            following = arguments[at + 1] if at + 1 < len(arguments) else ""
            return "" if following.startswith("--") else following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


@cache
def catalogue() -> dict[str, Any]:
    """`comfyui_nodes.toml`: core nodes, the order of their saved values, loaders, and packs of custom nodes."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib.loads(Path(__file__).parent.with_name("comfyui_nodes.toml").read_text(encoding="utf-8"))


def read(
    folder: Path,
    settings: Path | None = None,
    *,
    arguments: tuple[str, ...] | None = None,
    python: Path | None = None,
) -> ComfyUI | None:
    """The ComfyUI in `folder` (a checkout, a portable's, a base directory, or models); None where there is none.

    `settings` is where the Desktop app keeps its own, by default this user's. `arguments` and `python` are what it is
    started with where that is not what its own script says.
    """
    try:
        given = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 (links keep the name people know)
        found = _locate(given)
        if found is None:
            return None
        reading = _Reading(given, *found, settings or _desktop_settings(), arguments)
        own = reading.comfyui()
        return replace(own, python=str(python), environment=own.name) if python else own
    except OSError:
        return None


def model_folders(comfyui: ComfyUI) -> Iterator[tuple[str, Path]]:
    """Every folder that ComfyUI searches for models and that exists, with its kind, in ComfyUI's order."""
    for kind, folders in comfyui.folders.items():
        yield from ((kind, Path(folder)) for folder in folders if Path(folder).is_dir())


def environments(comfyui: ComfyUI) -> tuple[Environment, ...]:
    """The Python that runs it, named after it, where it was found and is not a managed one."""
    if comfyui.python is None or comfyui.environment != comfyui.name:
        return ()
    from kleinctl.environment import import_folders, inspect

    try:
        python = Path(comfyui.python)
        return (inspect(python, comfyui.name, import_folders(python)),)
    except OSError:
        return ()


def provided(comfyui: ComfyUI, types: Iterable[str]) -> ComfyUI:
    """The same ComfyUI with `nodes`: those of the node `types` that the code of its custom nodes names."""
    wanted = tuple(dict.fromkeys(types))
    found, whole = set[str](), True
    for pack in comfyui.custom_nodes:
        if not pack.disabled and not (found.issuperset(wanted)):
            more, all_read = _named_in(Path(comfyui.path, "custom_nodes", pack.name), wanted)
            found, whole = found | more, whole and all_read
    known = tuple(each for each in wanted if each in found)
    return replace(comfyui, nodes=known, sought=wanted if whole else known)


def _named_in(pack: Path, types: tuple[str, ...]) -> tuple[set[str], bool]:
    """Which types a pack's Python files name in quotes, and whether all of its code was read."""
    found: set[str] = set()
    left = MAX_CODE
    for path in (pack,) if pack.is_file() else _walk(pack, (".py",)):
        with suppress(OSError):
            code = path.read_bytes()[:left]
            left -= len(code)
            found |= {each for each in types if any(f"{q}{each}{q}".encode() in code for q in "\"'")}
        if left <= 0:
            return found, False
    return found, True


def _walk(folder: Path, endings: tuple[str, ...], levels: int = MAX_LEVELS) -> Iterator[Path]:
    """Files below `folder` with one of those endings, links followed, hidden folders left out."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.lower().endswith(endings) and entry.is_file():
            yield Path(entry.path)
        elif levels and not entry.name.startswith((".", "__")) and entry.is_dir():
            yield from _walk(Path(entry.path), endings, levels - 1)


# Where things are


def _locate(folder: Path) -> tuple[str, Path] | None:
    """The layout, and the folder that has the program or the models."""
    if folder.name == "models" and _is_program(folder.parent):
        folder = folder.parent
    for root in (folder, folder / "ComfyUI"):
        if _is_program(root):
            return "portable" if (root.parent / "python_embeded").is_dir() else "checkout", root
    if (folder / "model_index.json").exists():  # a model as diffusers keeps it
        return None
    models = folder / "models"
    if _kinds_in(models) or (models.is_dir() and any((folder / each).is_dir() for each in ("custom_nodes", "user"))):
        return "base-directory", folder
    enough = 1 if folder.name == "models" else 2
    return ("models", folder) if len(_kinds_in(folder)) >= enough else None


def _is_program(folder: Path) -> bool:
    return (folder / "main.py").is_file() and ((folder / "comfy").is_dir() or (folder / "comfyui_version.py").is_file())


def _kinds_in(folder: Path) -> list[str]:
    return [name for names in KINDS.values() for name in names if (folder / name).is_dir()]


def _desktop_settings() -> Path:
    """The folder where the Desktop app keeps `extra_models_config.yaml`, as Electron chooses it."""
    if os.name == "nt":
        return Path(os.environ.get("APPDATA", ""), "ComfyUI")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "ComfyUI")


class _Reading:
    """One folder being read. `root` has the program (or what there is), `base` the models, nodes and logs it uses."""

    def __init__(
        self, given: Path, layout: str, root: Path, settings: Path, arguments: tuple[str, ...] | None = None
    ) -> None:
        self.given, self.layout, self.root, self.settings = given, layout, root, settings
        self.script, said = self._start()
        self.arguments = said if arguments is None else arguments
        self.base = self._named("--base-directory") or root
        self.models = self._named("--models-directory") or (root if layout == "models" else self.base / "models")

    def comfyui(self) -> ComfyUI:
        log = _newest_log(self._named("--user-directory") or self.base / "user")
        said = _text(log, MAX_LOG) if log else ""
        extra = [_Yaml(path) for path in self._configs() if path.is_file()]
        named = tuple(each for one in extra for each in one.paths)
        folders = self._folders([each for one in extra for each in one.defaults], named)
        nodes = [self.base / "custom_nodes", *(Path(each.path) for each in named if each.kind == "custom_nodes")]
        failures = dict(re.findall(r"Cannot import (\S.*?) module for custom nodes: (.*)", said))
        python = self._python()
        broken = next((one for one in extra if one.error), None)
        lacking = [(one, each) for one in extra for each in one.unlisted(folders)]
        unread = self._unread(folders)
        if broken:
            file, patch = str(broken.file), broken.mended()
        elif lacking:
            file, patch = str(lacking[0][0].file), lacking[0][0].with_lines(lacking)
        elif unread and self.layout in ("checkout", "portable"):
            own = self.root / "extra_model_paths.yaml"
            file, patch = str(own), _with_folder(own, self.root / "models", unread)
        else:
            file, patch = str(extra[0].file) if extra else "", ()
        return ComfyUI(
            name=self.given.name or self.root.name,
            path=str(self.root),
            version=_version(self.root) or _first(r"ComfyUI version: v?([\d.]+)", said),
            layout=self.layout,
            extra_paths=named[:MAX_FILES],
            yaml_error=broken.error if broken else "",
            yaml_file=file,
            yaml_patch=patch,
            unlisted=tuple(each for _, each in lacking),
            custom_nodes=tuple(_custom_nodes(nodes, {_last(path): why for path, why in failures.items()}))[:MAX_FILES],
            arguments=self.arguments,
            environment=(self.given.name or self.root.name) if python else None,
            python=str(python) if python else None,
            log=str(log) if log else None,
            dynamic_vram=_dynamic_vram(said),
            folders={kind: tuple(paths) for kind, paths in folders.items()},
            files=_listings(folders),
            unread=unread,
            script=str(self.script) if self.script else None,
            git=(self.root / ".git").exists(),
        )

    def _named(self, flag: str) -> Path | None:
        """The folder that an argument names, relative to where the script runs."""
        value = argument(self.arguments, flag)
        start = self.root.parent if self.layout == "portable" else self.root
        return Path(os.path.normpath(start / value)) if value else None

    def _start(self) -> tuple[Path | None, tuple[str, ...]]:
        """The file that says how it is started, and the arguments in it."""
        if self.layout == "models":
            return None, ()
        scripts = [*self.root.glob("*.bat"), *self.root.glob("*.sh")]
        scripts += self.root.parent.glob("*.bat") if self.layout == "portable" else []
        if self.layout == "base-directory":
            scripts = [self.root / "user" / "default" / "comfy.settings.json"]
        found = ((path, arguments_in(path.name, _text(path))) for path in sorted(scripts, key=_likely)[:30])
        return next(((path, arguments) for path, arguments in found if arguments is not None), (None, ()))

    def _configs(self) -> list[Path]:
        """The files with more model paths that would be read."""
        paths = [self.root / "extra_model_paths.yaml"] if self.layout in ("checkout", "portable") else []
        start = self.root.parent if self.layout == "portable" else self.root
        for at, word in enumerate(self.arguments):
            if word == "--extra-model-paths-config":
                following = self.arguments[at + 1 :]
                ends = next((n for n, each in enumerate(following) if each.startswith("--")), len(following))
                paths += [start / each for each in following[:ends]]
        desktop = self.settings / "extra_models_config.yaml"
        if self.layout == "base-directory" and desktop.is_file() and _Yaml(desktop).names_base(self.root):
            paths.append(desktop)
        return paths

    def _folders(self, defaults: list[ExtraPath], named: tuple[ExtraPath, ...]) -> dict[str, list[str]]:
        """The folders of each kind, in the order in which ComfyUI searches them."""
        folders = {kind: [str(self.models / name) for name in names] for kind, names in KINDS.items()}
        for each in named:
            kind = OLD_NAMES.get(each.kind, each.kind)
            if kind in folders and each.path not in folders[kind]:
                folders[kind].insert(0 if each in defaults else len(folders[kind]), each.path)
        output = self._named("--output-directory") or self.base / "output"
        if self.layout != "models":
            for kind in SAVED:
                folders[kind].append(str(output / ("clip" if kind == "text_encoders" else kind)))
        return folders

    def _unread(self, folders: Mapping[str, list[str]]) -> tuple[str, ...]:
        """Weights in the program's own models folder, where its arguments name another one."""
        own = self.root / "models"
        if self.models == own or self.layout == "models":
            return ()
        named = {folder for paths in folders.values() for folder in paths}
        places = [own / name for names in KINDS.values() for name in names if str(own / name) not in named]
        return tuple(str(path) for place in places for path in _walk(place, ENDINGS[:3]))[:100]

    def _python(self) -> Path | None:
        homes = [self.base / ".venv", self.root / "venv", self.root / ".venv", self.root.parent / "venv"]
        choices = [home / part for home in homes for part in (Path("Scripts", "python.exe"), Path("bin", "python"))]
        return next(
            (path for path in (self.root.parent / "python_embeded" / "python.exe", *choices) if path.exists()), None
        )


def _likely(script: Path) -> tuple[bool, bool, int, str]:
    """Which script people start it with: the one for NVIDIA cards, the shortest name first."""
    name = script.name.lower()
    return ("cpu" in name or "amd" in name, "nvidia" not in name, len(name), name)


def _script_arguments(script: str) -> tuple[str, ...] | None:
    """What a start script passes to `main.py`; None where it starts no such thing."""
    lines = re.sub(r"[\^\\]\r?\n", " ", script).splitlines()
    variables = {
        name.upper(): value
        for line in lines
        for name, value in re.findall(r"^\s*(?:set|export)?\s*\"?(\w+)=(.*)", line, re.I)
    }
    for line in lines:
        started = re.search(r"\bmain\.py[\"']?(?P<rest>.*)", line)
        if started and not re.match(r"\s*(?:#|rem\b|::)", line, re.IGNORECASE):
            words = re.sub(
                r"%(\w+)%|\$\{?(\w+)\}?", lambda m: variables.get((m[1] or m[2]).upper(), ""), started["rest"]
            )
            words = re.split(r"\s(?:&&?|\|\|?|>>?|2>|#)", f" {words}")[0]
            with suppress(ValueError):
                parts = (part.strip("\"'") for part in shlex.split(words, posix=False))
                return tuple(part[:500] for part in parts if part not in ("", "%*", "$@", "@"))[:100]
    return None


def arguments_in(name: str, text: str) -> tuple[str, ...] | None:
    """The arguments that a start script passes on, or the Desktop app's settings; None where `text` is neither."""
    return _desktop_arguments(text) if name.endswith(".json") else _script_arguments(text)


def _desktop_arguments(settings: str) -> tuple[str, ...] | None:
    """The server's arguments among the Desktop app's settings."""
    try:
        found = json.loads(settings).get("Comfy.Server.LaunchArgs", {})
        pairs = [(str(key), str(value)) for key, value in found.items()]
    except (ValueError, AttributeError, RecursionError):
        return None
    return tuple(word for key, value in pairs[:50] for word in (f"--{key}", value[:500]) if word)


def _version(root: Path) -> str | None:
    found = _first(r"__version__ = [\"']v?([\d.]+)", _text(root / "comfyui_version.py"))
    return found or _first(r"(?m)^version = [\"']v?([\d.]+)", _text(root / "pyproject.toml"))


def _newest_log(user: Path) -> Path | None:
    logs = [path for path in user.glob("comfyui*.log") if ".prev" not in path.name] if user.is_dir() else []
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _dynamic_vram(log: str) -> bool | None:
    if "DynamicVRAM support detected and enabled" in log:
        return True
    return False if "ComfyUI version:" in log else None


def _custom_nodes(folders: Iterable[Path], failures: Mapping[str, str]) -> Iterator[CustomNode]:
    """What is in `custom_nodes`, and in the folder where ComfyUI-Manager keeps what it has disabled."""
    for folder in folders:
        for place, off in ((folder, False), (folder / ".disabled", True)):
            with suppress(OSError):
                for entry in sorted(os.scandir(place), key=lambda entry: entry.name)[:500]:
                    if entry.is_dir() and not entry.name.startswith((".", "__")):
                        yield _custom_node(Path(entry.path), off or entry.name.endswith(".disabled"), failures)


def _custom_node(folder: Path, disabled: bool, failures: Mapping[str, str]) -> CustomNode:
    project = _text(folder / "pyproject.toml")
    name = folder.name.removesuffix(".disabled").partition("@")[0] if disabled else folder.name
    own = _first(r"(?m)^name\s*=\s*[\"']([^\"'\n]+)", project) or name
    pack: dict[str, str] = next((each for each in catalogue()["pack"] if each["id"] in (own.lower(), name.lower())), {})
    code = _text(folder / pack["file"]) if "file" in pack else ""
    version = _first(r"(?m)^version\s*=\s*[\"']v?([^\"'\n]+)", project)
    why = failures.get(folder.name, "")[:300]
    return CustomNode(folder.name, version, own.lower(), disabled, pack["needs"] in code if code else None, why)


def _listings(folders: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The names that loaders list, by kind: relative to their folder, each once. A kind with too many is left out."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, places in folders.items():
        names: dict[str, None] = {}
        for place in places:
            for path in _walk(Path(place), ENDINGS):
                names[os.path.relpath(path, place)] = None
                if len(names) > MAX_FILES:
                    break
        if len(names) <= MAX_FILES:
            found[kind] = tuple(names)
    return found


# extra_model_paths.yaml


class _Yaml:
    """A file with more model paths: `paths` it names, those put first (`defaults`), and `error` where it is broken."""

    def __init__(self, file: Path) -> None:
        self.file, self.text = file, _text(file)
        self.paths: list[ExtraPath] = []
        self.defaults: list[ExtraPath] = []
        self.bases: list[tuple[int, Path]] = []  # line and path of each base_path
        self.error = ""
        try:
            self._read()
        except _Broken as broken:
            self.error = str(broken)[:300]

    def _read(self) -> None:
        top = _composed(self.text)
        for key, section in _pairs(top, "the file", 1):
            if not _is_null(section):
                self._section(key.value, section)

    def _section(self, name: str, section: Any) -> None:
        pairs = {key.value: (key, value) for key, value in _pairs(section, name, section.start_mark.line + 1)}
        base = None
        if "base_path" in pairs:
            key, value = pairs.pop("base_path")
            named = os.path.expanduser(_scalar(value, "base_path"))  # noqa: PTH111 (as ComfyUI does, and never raises)
            base = Path(os.path.expandvars(named))
            base = Path(os.path.normpath(self.file.parent / base))
            self.bases.append((key.start_mark.line + 1, base))
        first = _scalar(pairs.pop("is_default")[1], "is_default") if "is_default" in pairs else ""
        for kind, (_, value) in pairs.items():
            block = value.start_mark.line + (2 if getattr(value, "style", None) in ("|", ">") else 1)
            for at, words in enumerate(_scalar(value, kind).split("\n")):
                if words:
                    path = os.path.normpath((base or self.file.parent) / words)
                    found = ExtraPath(str(self.file), block + at, kind[:100], path[:MAX_FACT], Path(path).is_dir())
                    self.paths.append(found)
                    if first.lower() in ("true", "yes", "on"):
                        self.defaults.append(found)

    def names_base(self, folder: Path) -> bool:
        return any(base == folder for _, base in self.bases)

    def unlisted(self, folders: Mapping[str, list[str]]) -> list[ExtraPath]:
        """Folders of weights below a `base_path` that no line names."""
        found = []
        for line, base in self.bases:
            for kind in ("diffusion_models", "text_encoders", "vae"):
                for place in (base / part / name for part in ("", "models") for name in KINDS[kind]):
                    known = {os.path.normcase(each) for each in folders[kind]}
                    if os.path.normcase(place) not in known and next(_walk(place, ENDINGS[:3], 1), None):
                        found.append(ExtraPath(str(self.file), line, kind, str(place), True))
        return found

    def mended(self) -> tuple[str, ...]:
        """The text with the usual slips put right (tabs, backslashes in double quotes), if it can be read then."""
        quoted = re.sub(r'"([^"\n]*\\[^"\n]*)"', r"'\1'", self.text)
        for text in (self.text.expandtabs(4), quoted, quoted.expandtabs(4)):
            with suppress(_Broken):
                _composed(text)
                return _lines(text.splitlines())
        return ()

    def with_lines(self, lacking: Iterable[tuple[_Yaml, ExtraPath]]) -> tuple[str, ...]:
        """The text with a line for each folder it does not name; none where one would take the place of another."""
        lines = self.text.splitlines()
        for found in sorted((each for one, each in lacking if one is self), key=lambda each: -each.line):
            base = next(path for line, path in self.bases if line == found.line)
            start = lines[found.line - 1]
            indent = start[: len(start) - len(start.lstrip())]
            if any(each.kind == found.kind for each in self.paths):
                return ()
            lines.insert(found.line, f"{indent}{found.kind}: {os.path.relpath(found.path, base)}".replace("\\", "/"))
        return _lines(lines)


def _with_folder(file: Path, models: Path, weights: Iterable[str]) -> tuple[str, ...]:
    """The text of `file` with a section for the folder `models`, which has these `weights`; none where it has one."""
    text = _text(file)
    lines = text.splitlines()
    if "\ufffd" in text or any(line.startswith(f"{OWN}:") for line in lines):
        return ()
    used = dict.fromkeys(Path(path).relative_to(models).parts[0] for path in weights)
    named = {kind: [name for name in names if name in used] for kind, names in KINDS.items()}
    base = "'" + str(models).replace("'", "''") + "'"
    section = [f"{OWN}:", f"    base_path: {base}"]
    for kind, names in named.items():
        section += [f"    {kind}: |", *(f"        {name}" for name in names)] if names else []
    return _lines([*lines, *section])


def _lines(lines: list[str]) -> tuple[str, ...]:
    """Lines that facts can carry; none where they are too many or too long."""
    return tuple(lines) if len(lines) <= MAX_FILES and all(len(line) <= MAX_FACT for line in lines) else ()


class _Broken(Exception):
    """Why ComfyUI could not read such a file, with the line."""


def _composed(text: str) -> Any:
    import yaml

    if len(text) > MAX_YAML or sum(map(text.count, "[{")) > MAX_BRACKETS:
        raise _Broken("line 1: it is too large to be a list of model folders")
    try:
        found = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _Broken(f"line {line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise _Broken(f"line 1: {type(error).__name__}") from None
    if found is None:
        raise _Broken("line 1: the file is empty, and ComfyUI stops on that")
    return found


def _pairs(node: Any, about: str, line: int) -> list[tuple[Any, Any]]:
    if node.id != "mapping":
        raise _Broken(
            f"line {line}: {about} is no list of names and paths; a line there lacks a colon or its indentation"
        )
    return [(key, value) for key, value in node.value if key.id == "scalar"]


def _is_null(node: Any) -> bool:
    return node.id == "scalar" and node.tag.endswith(":null")


def _scalar(node: Any, about: str) -> str:
    if node.id != "scalar" or _is_null(node):
        raise _Broken(f"line {node.start_mark.line + 1}: {about} must be text; several paths go below `{about}: |`")
    return str(node.value)


# Small things


def _text(path: Path, most: int = MAX_SMALL) -> str:
    """The start of a text file; empty where it cannot be read."""
    try:
        return documents.start_of(path, most).decode("utf-8", "replace").removeprefix("\ufeff")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
