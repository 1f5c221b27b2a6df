"""What a model should be: its parts, their sizes, sha256 and sources. One TOML file per model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from kleinctl.problem import KleinctlError, Misuse, Problem, did_you_mean
from kleinctl.units import bytes_text

SCHEMA = "kleinctl.manifest/1"
ROLES = ("transformer", "text-encoder", "vae", "tokenizer", "scheduler", "config", "licence")
HUB = "https://huggingface.co"

#: A manifest is a page of text; what is longer is something else.
MAX_BYTES = 2**20

#: https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {port + number for port in ("com", "lpt") for number in "123456789¹²³"}
#: Bytes of a name, on the file systems in use.
_LONGEST = 255


def confined(path: str) -> str | None:
    """Why `path` must not be joined to a folder, or None when it stays inside on Linux and on Windows.

    Relative, `/` between segments, no `..`, drive, UNC share, backslash, control character, or Windows device name.
    """
    if "\\" in path:
        return "a backslash in it"
    if path.startswith("/"):
        return "an absolute path"
    if any(char < " " or char in '<>:"|?*' or char == "\x7f" for char in path):
        return "a character in it that file systems refuse"
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            return f"the segment {segment!r}"
        if segment[-1] in " ." or segment.split(".")[0].strip().lower() in _RESERVED:
            return f"{segment!r}, which Windows cannot store"
        if len(segment.encode("utf-8", "replace")) > _LONGEST:
            return f"a name of more than {_LONGEST} bytes"
    return None


@dataclass(frozen=True)
class Source:
    """Where a part can be had: a file of a hub repository at a revision, or one shipped inside a Python package."""

    path: str
    repo: str | None = None
    revision: str | None = None
    package: str | None = None

    def url(self, endpoint: str = HUB) -> str:
        """Where the hub serves the file. Only for sources with a `repo`."""
        from urllib.parse import quote

        revision = quote(self.revision or "main", safe="")
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{revision}/{quote(self.path)}"


@dataclass(frozen=True)
class Part:
    """One file of a model. `size` in bytes; a part without `sha256` is installed on request only.

    `to` says where each layout wants it: for `diffusers` below the model's folder, for `comfyui` below ComfyUI's
    `models`. `precision` tells alternatives of one role apart. `family` is what `identify` calls such a file (a
    transformer's is the model's), and `licence` and `gated` are the model's unless stated. `fingerprint` is the digest
    of a few of its tensors (tools/fingerprint.py), by which a repacked copy is known.
    """

    id: str
    role: str
    name: str
    to: Mapping[str, str] = field(hash=False)
    sources: tuple[Source, ...] = ()
    size: int | None = None
    sha256: str | None = None
    fingerprint: str | None = None
    licence: str = ""
    gated: bool = False
    dtype: str | None = None
    precision: str | None = None
    family: str = ""
    model: str = ""

    @property
    def ref(self) -> str:
        """The part's name in messages and JSON: `klein-4b/transformer`."""
        return f"{self.model}/{self.id}"


@dataclass(frozen=True)
class Defaults:
    """What a job takes where the user says nothing. Width and height in pixels."""

    steps: int
    guidance: float
    width: int
    height: int
    max_prompt_tokens: int


@dataclass(frozen=True)
class Shape:
    """Numbers for arithmetic of memory and time. `*_bytes` are weights in the model's dtype, without file headers.

    `text_layers_read` counts the layers whose output is used, `vae_channels` is the width at the decoder's full
    resolution.
    """

    transformer_bytes: int
    transformer_parameters: int
    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    text_encoder_bytes: int
    text_layers: int
    text_layers_read: int
    text_layer_bytes: int
    text_embedding_bytes: int
    text_hidden: int
    vae_bytes: int
    vae_channels: int


@dataclass(frozen=True)
class Model:
    """A model as its manifest describes it. `automatic` is its turn when `up` chooses; None when only by name."""

    name: str
    title: str
    family: str
    variant: str
    licence: str
    licence_url: str
    gated: bool
    accept_licence: bool
    devices: tuple[str, ...]
    dtype: str
    defaults: Defaults
    shape: Shape
    parts: tuple[Part, ...]
    automatic: int | None = None
    note: str | None = None

    def part(self, part_id: str) -> Part:
        """The part of that id.

        Raises:
            Misuse: the model has none.
        """
        for part in self.parts:
            if part.id == part_id:
                return part
        ids = [part.id for part in self.parts]
        raise Misuse(
            Problem(
                f"{self.name} has no part {part_id!r}",
                f"Its parts are {', '.join(ids)}.{did_you_mean(part_id, ids)}",
                "kleinctl models",
            )
        )

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts its parts can be placed in."""
        return tuple(dict.fromkeys(layout for part in self.parts for layout in part.to))

    def precisions(self, layout: str) -> tuple[str, ...]:
        """The precisions offered in a layout, the preferred one first; empty where there is no choice."""
        return tuple(dict.fromkeys(p.precision for p in self.parts if layout in p.to and p.precision))

    def parts_for(self, layout: str, precision: str | None = None) -> tuple[Part, ...]:
        """What to install for a layout: one part for each destination, of one precision (the first one listed).

        Raises:
            Misuse: the layout does not come in `precision`.
        """
        offered = self.precisions(layout)
        if precision and precision not in offered:
            raise Misuse(
                Problem(
                    f"{self.name} does not come as {precision!r} for {layout}",
                    f"It comes as {', '.join(offered) or 'one precision only'}.",
                    "kleinctl models",
                )
            )
        wanted = (None, precision or next(iter(offered), None))
        chosen: dict[str, Part] = {}
        for part in self.parts:
            if layout in part.to and part.precision in wanted:
                chosen.setdefault(part.to[layout], part)
        return tuple(chosen.values())

    def accepted(self, part: Part, layout: str) -> tuple[Part, ...]:
        """Every part that is right at the destination of `part`: itself, and files published under the same name."""
        return tuple(other for other in self.parts if other.to.get(layout) == part.to[layout])

    def bytes(self, layout: str, precision: str | None = None) -> int:
        """What the layout takes on disk, in bytes, as far as sizes are known."""
        return sum(part.size or 0 for part in self.parts_for(layout, precision))

    def size_text(self, layout: str, precision: str | None = None) -> str:
        """What the layout takes on disk: `16.0 GB`, or `over 16.6 GB` where not every size is known."""
        over = "over " if any(part.size is None for part in self.parts_for(layout, precision)) else ""
        return f"{over}{bytes_text(self.bytes(layout, precision))}"

    @property
    def is_packaged(self) -> bool:
        """Whether every part comes with an installed package, so that no network is needed."""
        return all(source.package for part in self.parts for source in part.sources)

    def unverified(self, layout: str, precision: str | None = None) -> tuple[Part, ...]:
        """Parts to install whose sha256 is not known."""
        return tuple(part for part in self.parts_for(layout, precision) if part.sha256 is None)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON: the keys of the TOML file. `from_json` reads it back."""
        document = _without_defaults(self)
        document["part"] = [_part_json(part, self) for part in document.pop("parts")]
        for table in ("defaults", "shape"):
            document[table] = _without_defaults(document[table])
        return {"schema": SCHEMA, **document, "devices": list(self.devices)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Model:
        """A model handed over as JSON, checked like a file.

        Raises:
            KleinctlError: it is no manifest.
        """
        return _build(document, "", _short(document.get("name", "")))


def _without_defaults(record: Any) -> dict[str, Any]:
    values = {one.name: (getattr(record, one.name), one.default) for one in fields(record)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _part_json(part: Part, model: Model) -> dict[str, Any]:
    document = {**_without_defaults(part), "to": dict(part.to), "sources": [_without_defaults(s) for s in part.sources]}
    del document["model"]
    for key, inherited in _inherited(vars(model), part.role).items():
        document[key] = getattr(part, key)
        if document[key] == inherited:
            del document[key]
    return document


def _inherited(model: Mapping[str, Any], role: str | None) -> dict[str, Any]:
    """What a part that is silent has from its model."""
    family = model.get("family") if role == "transformer" else ""
    return {"licence": model.get("licence"), "gated": model.get("gated"), "family": family}


# Reading: every value is checked by a function that returns it or raises ValueError with what is wanted.
# All issues of a file are gathered and told at once.

Checker = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 500:
        raise ValueError("some text")
    return value


def _matching(pattern: str, wanted: str) -> Checker:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(wanted)
        return value

    return check


def _one_of(*words: str) -> Checker:
    def check(value: Any) -> str:
        if value not in words:
            near = did_you_mean(value, words) if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(words)}.{near}")
        return value

    return check


def _count(low: int, high: int = 2**50) -> Checker:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number of at least {low}" + (f" and at most {high}" if high < 2**50 else ""))
        return value

    return check


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1000:
        raise ValueError("a number from 0 up")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _pixels(value: Any) -> int:
    if _count(16, 65536)(value) % 16:
        raise ValueError("a multiple of 16 pixels")
    return value


def _list_of(check: Checker) -> Checker:
    def check_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("a list of one or more")
        return tuple(check(one) for one in value)

    return check_all


def _file_name(value: Any) -> str:
    if "/" in _text(value):
        raise ValueError("a file name, without folders")
    return _inside(value)


def _inside(value: Any) -> str:
    reason = confined(_text(value))
    if reason:
        raise ValueError(f"a path inside its folder; {value!r} has {reason}")
    return value


def _destinations(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise ValueError('layouts and paths, as { diffusers = "vae/file.safetensors" }')
    return {_slug(layout): _inside(path) for layout, path in value.items()}


def _source(value: Any) -> Source:
    if not isinstance(value, dict):
        raise ValueError('tables, as { repo = "owner/name", revision = "<commit>", path = "file" }')
    if set(value) == {"package", "path"}:
        return Source(path=_inside(value["path"]), package=_package(value["package"]))
    if set(value) == {"repo", "revision", "path"}:
        return Source(path=_inside(value["path"]), repo=_repo(value["repo"]), revision=_revision(value["revision"]))
    raise ValueError(
        f"repo, revision and path, or package and path; this has {', '.join(map(_word, sorted(value))) or 'nothing'}"
    )


_slug = _matching(r"[a-z0-9][a-z0-9._-]{0,63}", "a lower-case word such as klein-4b")
_repo = _matching(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", "a repository as owner/name")
_revision = _matching(r"[A-Za-z0-9][\w.-]{0,99}", "a commit")
_package = _matching(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "a Python package's name")

_MODEL: dict[str, Checker] = {
    "name": _slug,
    "title": _text,
    "family": _slug,
    "variant": _one_of("distilled", "base"),
    "licence": _text,
    "licence_url": _matching(r"https://\S{1,400}", "an https:// address"),
    "gated": _flag,
    "accept_licence": _flag,
    "automatic": _count(1, 1000),
    "devices": _list_of(_one_of("cuda", "cpu")),
    "dtype": _one_of("bfloat16", "float16", "float32"),
    "note": _text,
}
_PART: dict[str, Checker] = {
    "id": _slug,
    "role": _one_of(*ROLES),
    "name": _file_name,
    "size": _count(0),
    "sha256": _matching(r"[0-9a-f]{64}", "64 lower-case hex digits"),
    "fingerprint": _matching(r"[0-9a-f]{64}", "64 lower-case hex digits"),
    "licence": _text,
    "gated": _flag,
    "to": _destinations,
    "sources": _list_of(_source),
    "dtype": _text,
    "precision": _slug,
    "family": _slug,
}
_DEFAULTS: dict[str, Checker] = {
    "steps": _count(1, 1000),
    "guidance": _number,
    "width": _pixels,
    "height": _pixels,
    "max_prompt_tokens": _count(1, 2**20),
}
_SHAPE: dict[str, Checker] = {one.name: _count(0 if one.name.endswith("_blocks") else 1) for one in fields(Shape)}


def load(path: Path) -> Model:
    """Read a manifest.

    Raises:
        KleinctlError: it cannot be read or is no manifest; the problem names the file, and line and key of each issue.
    """
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _invalid(str(path), [f"it is longer than {MAX_BYTES} bytes"])
        text = raw.decode("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise _invalid(str(path), [f"it cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise _invalid(str(path), [f"line {raw[: error.start].count(10) + 1}: not UTF-8 text"]) from error
    except (ValueError, RecursionError) as error:  # not TOML, or a number of thousands of digits
        raise _invalid(str(path), [f"not TOML: {error}"]) from error
    return _build(document, text, str(path))


def _invalid(file: str, issues: Sequence[str]) -> KleinctlError:
    return KleinctlError(
        Problem(
            what=f"{file} is no manifest that kleinctl can use",
            why="\n".join(issues[:20]),
            fix=f"correct {file}, then: kleinctl models",
            name="manifest-invalid",
            path=file,
        )
    )


def _build(document: Mapping[str, Any], text: str, file: str) -> Model:
    reader = _Reader(text)
    if document.get("schema") != SCHEMA:
        reader.note((), "schema", f"{document.get('schema')!r}, wanted {SCHEMA!r}")
    top = {key: value for key, value in document.items() if key not in ("schema", "defaults", "shape", "part")}
    known = reader.table(Model, top, _MODEL, (), also=("schema", "defaults", "shape", "part"))
    tables = {
        name: reader.table(kind, document.get(name), spec, (name,))
        for name, kind, spec in (("defaults", Defaults, _DEFAULTS), ("shape", Shape, _SHAPE))
    }
    listed = document.get("part")
    if not isinstance(listed, list) or not listed:
        reader.note((), "part", "missing: a manifest lists its files as [[part]]")
        listed = []
    own = [reader.table(Part, one, _PART, ("part", n)) for n, one in enumerate(listed)]
    parts: list[dict[str, Any]] = [
        {"model": known.get("name")} | _inherited(known, part.get("role")) | part for part in own
    ]
    reader.compare(parts)
    if reader.issues:
        raise _invalid(file, reader.told())
    return Model(
        **known,
        defaults=Defaults(**tables["defaults"]),
        shape=Shape(**tables["shape"]),
        parts=tuple(Part(**part) for part in parts),
    )


Place = tuple[Any, ...]  # () for the top, ("defaults",), or ("part", 3): the fourth [[part]]


class _Reader:
    """Checks tables and gathers what is wrong, with its line in `text`."""

    def __init__(self, text: str) -> None:
        self.lines = _lines_of_keys(text)
        self.issues: list[tuple[int, str]] = []

    def note(self, place: Place, key: str, issue: str) -> None:
        line = self.lines.get((*place, key)) or self.lines.get(place, 0)
        self.issues.append((line, f"{_label(place)}{_word(key)}: {issue}"))

    def told(self) -> list[str]:
        return [f"line {line}: {issue}" if line else issue for line, issue in sorted(self.issues)]

    def table(
        self, kind: type, table: Any, spec: Mapping[str, Checker], place: Place, also: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The checked values of one table, whose keys are fields of `kind`."""
        if not isinstance(table, Mapping):
            self.issues.append(
                (self.lines.get(place, 0), f"{_label(place).strip(', ')}: wanted a table with {', '.join(spec)}")
            )
            return {}
        values = {}
        for key, value in table.items():
            if key not in spec:
                self.note(place, key, f"unknown key.{did_you_mean(key, [*spec, *also])}")
                continue
            try:
                values[key] = spec[key](value)
            except ValueError as error:
                self.note(place, key, f"{_short(value)}, wanted {error}")
        for one in fields(kind):
            if one.name in spec and one.name not in table and one.default is MISSING:
                self.note(place, one.name, "missing")
        return values

    def compare(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Ids are said once, and two files with one destination are alternatives of one role."""
        ids: dict[str, int] = {}
        roles: dict[tuple[str, str], tuple[int, str]] = {}
        for n, part in enumerate(parts):
            first = ids.setdefault(part.get("id", n), n)
            if first != n:
                self.note(("part", n), "id", f"{part['id']!r} is the id of an earlier part as well")
            for place in part.get("to", {}).items():
                other, role = roles.setdefault((place[0], place[1].lower()), (n, part.get("role", "")))
                if role != part.get("role", ""):
                    self.note(("part", n), "to", f"{place[1]!r} is where part {parts[other].get('id')!r} goes")


def _label(place: Place) -> str:
    return "" if not place else f"[{place[0]}] " if len(place) == 1 else f"[[{place[0]}]] {place[1] + 1}, "


def _word(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _lines_of_keys(text: str) -> dict[Place, int]:
    """Where each header and key of a manifest stands, counted from 1."""
    lines: dict[Place, int] = {(): 0}
    place: Place = ()
    parts = 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)\s*([\w-]+)\s*\]", line):
            place = (header[2],) if header[1] == "[" else (header[2], parts)
            parts += header[1] == "[["
            lines.setdefault(place, number)
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*[=.]", line):
            lines.setdefault((*place, key[1]), number)
    return lines
