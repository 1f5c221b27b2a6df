"""A saved ComfyUI workflow, as nodes with their values and links."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kleinctl import pngtext
from kleinctl.facts.comfyui import ENDINGS, catalogue
from kleinctl.problem import KleinctlError

#: Bounds of what is read: bytes of a file, nodes, subgraphs in all and inside each other, links followed in a row.
MAX_BYTES, MAX_NODES, MAX_SUBGRAPHS, MAX_DEPTH, MAX_STEPS = 20 * 2**20, 5000, 500, 12, 64
#: What the page draws and the server never sees.
DRAWN = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode", "GetNode", "SetNode")
#: Inputs whose text is the user's own: only its length is kept.
PRIVATE = ("text", "prompt", "clip_l", "t5xxl", "value", "image", "filename_prefix")
#: A weight in a prompt, as in `(red:1.3)`; (16:9) is a ratio and (at 10:30) a time.
WEIGHT = re.compile(r"\([^()]{0,200}[^()\d\s]\s*:\s*\d(?:\.\d+)?\s*\)")


@dataclass(frozen=True)
class Node:
    """A node: its type, its plain values as text, and its links by input as `node/slot`.

    The ids of nodes in subgraphs start with those of the node that stands for the subgraph, as in `75:70`. Of texts
    that a user wrote only the length is kept (`texts`, in characters), and whether one has weights in it (`weighted`).
    `muted` nodes are not run. `pack` is what the node says it comes from (`comfy-core`, `comfyui-gguf`), if it does.
    """

    id: str
    type: str
    values: Mapping[str, str] = field(default_factory=dict, hash=False)
    links: Mapping[str, str] = field(default_factory=dict, hash=False)
    muted: bool = False
    texts: Mapping[str, int] = field(default_factory=dict, hash=False)
    weighted: bool = False
    pack: str = ""
    pack_version: str = ""


@dataclass(frozen=True)
class Workflow:
    """A workflow file. `format` is `api` (what the server takes) or `ui` (what the page saves); `error` why neither."""

    path: str
    format: Literal["api", "ui", "unknown"]
    nodes: tuple[Node, ...] = ()
    error: str = ""


class _Unreadable(Exception):
    """Why a file holds no workflow that can be read."""


class _Link(NamedTuple):
    """An input that another node's output feeds."""

    node: str
    slot: int


class _Value(NamedTuple):
    """A plain value, and where in the document it stands: `holder[key]`."""

    holder: Any
    key: Any

    @property
    def plain(self) -> Any:
        return self.holder[self.key]


class _Found(NamedTuple):
    """A node of the document, with where its inputs come from."""

    id: str
    type: str
    raw: dict[str, Any]
    inputs: dict[str, _Link | _Value]
    muted: bool


def read(path: Path) -> Workflow:
    """The workflow in a JSON file, or in a PNG that ComfyUI saved; else what is wrong with it. Never raises."""
    try:
        document = _document(path)
        form, found = _nodes(document)
        return Workflow(str(path), form, tuple(_node(each) for each in found))
    except _Unreadable as error:
        return Workflow(str(path), "unknown", error=str(error))


def graph(path: Path) -> dict[str, dict[str, Any]]:
    """The graph of a workflow in the server's format, as the file has it: `{node id: {"class_type", "inputs"}}`.

    Raises:
        ValueError: there is none.
    """
    try:
        found = _unwrapped(_document(path))
    except _Unreadable as error:
        raise ValueError(f"{path.name}: {error}") from None
    return {str(key): dict(node) for key, node in found.items() if isinstance(node, dict) and "class_type" in node}


def edit(path: Path, node: str, name: str, value: str) -> str:
    """The text of the workflow in the JSON file at `path` with one input of a node set, or its type (`class_type`).

    Raises:
        ValueError: it cannot be read, or has no such node or input of its own.
    """
    try:
        document = json.loads(path.read_bytes()[:MAX_BYTES])
        _, nodes = _nodes(document)
    except (OSError, _Unreadable, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    found = next((each for each in nodes if each.id == node), None)
    if found is None:
        raise ValueError(f"{path.name} has no node {node}")
    if name == "class_type":
        found.raw["class_type" if "class_type" in found.raw else "type"] = value
    else:
        at = found.inputs.get(name)
        if not isinstance(at, _Value):
            raise ValueError(f"node {node} of {path.name} has no value {name} of its own")
        at.holder[at.key] = value if isinstance(at.plain, str) else json.loads(value)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


# The document


def _document(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES and path.suffix.lower() != ".png":
            raise _Unreadable(f"it is larger than {MAX_BYTES // 2**20} MiB")
        if not path.is_file() and not path.is_dir():
            raise _Unreadable("it is a pipe or a device, and no file")
        with path.open("rb") as file:
            start = file.read(len(pngtext.SIGNATURE))
            text = (
                _text_of_png(path) if start == pngtext.SIGNATURE else (start + file.read(MAX_BYTES)).decode("utf-8-sig")
            )
    except OSError as error:
        raise _Unreadable(f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise _Unreadable("it is neither JSON nor a PNG picture") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise _Unreadable(f"it is no valid JSON ({error})") from None
    except RecursionError:
        raise _Unreadable("its JSON is nested too deeply") from None


def _text_of_png(path: Path) -> str:
    """The graph that ran, or else the page's, as ComfyUI stores them in its pictures."""
    try:
        texts = pngtext.read_text(path)
    except KleinctlError as error:
        raise _Unreadable(error.problem.why.rstrip(".")) from None
    if "prompt" not in texts and "workflow" not in texts:
        raise _Unreadable("the picture has no workflow in it; sites and chat programs remove it")
    return texts.get("prompt") or texts["workflow"]


def _nodes(document: Any) -> tuple[Literal["api", "ui"], list[_Found]]:
    graph = _unwrapped(document)
    if isinstance(graph.get("nodes"), list):
        return "ui", _of_the_page(graph)
    entries = {str(key): entry for key, entry in graph.items() if isinstance(entry, dict) and "class_type" in entry}
    if not entries:
        raise _Unreadable("it has neither nodes nor class_type: no workflow of ComfyUI")
    if len(entries) > MAX_NODES:
        raise _Unreadable(f"it has more than {MAX_NODES} nodes")
    return "api", [_of_the_server(key, entry, entries) for key, entry in entries.items()]


def _unwrapped(document: Any) -> dict[str, Any]:
    """The graph itself, where it was saved together with something else."""
    for key in ("", "prompt", "output", "workflow"):
        graph = document.get(key) if key and isinstance(document, dict) else document
        graph = graph if isinstance(graph, dict) else {}
        if isinstance(graph.get("nodes"), list) or any(
            isinstance(e, dict) and "class_type" in e for e in graph.values()
        ):
            return graph
    if not isinstance(document, dict):
        raise _Unreadable("it is JSON, but no workflow of ComfyUI")
    return document


# The server's format


def _of_the_server(key: str, entry: dict[str, Any], entries: Mapping[str, dict[str, Any]]) -> _Found:
    inputs = _inputs(entry)
    found = {name: _given(inputs, name, entries) for name in inputs}
    return _Found(key, str(entry["class_type"]), entry, {name: at for name, at in found.items() if at}, False)


def _inputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    return entry["inputs"] if isinstance(entry.get("inputs"), dict) else {}


def _given(inputs: dict[str, Any], name: str, entries: Mapping[str, dict[str, Any]]) -> _Link | _Value | None:
    """Where an input comes from; nodes that only hold a value are looked into."""
    for _ in range(MAX_STEPS):
        value = inputs.get(name)
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)):
            return _Value(inputs, name) if name in inputs else None
        source = entries.get(str(value[0]), {})
        if not str(source.get("class_type", "")).startswith("Primitive") or "value" not in _inputs(source):
            return _Link(str(value[0]), value[1])
        inputs, name = _inputs(source), "value"
    return None


# The page's format


class _Page:
    """The definitions of subgraphs, and how many of them have been entered."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        defined = graph.get("definitions")
        subgraphs = _dicts(defined.get("subgraphs")) if isinstance(defined, dict) else []
        self.definitions = {str(each.get("id")): each for each in subgraphs}
        self.entered = 0

    def count(self) -> None:
        """Note that a subgraph is entered; they may hold each other."""
        self.entered += 1
        if self.entered > MAX_SUBGRAPHS:
            raise _Unreadable(f"it has more than {MAX_SUBGRAPHS} subgraphs")


class _Scope:
    """The page's graph, or one subgraph of it as the node `wrapper` of `outer` stands for it."""

    def __init__(self, graph: Mapping[str, Any], page: _Page, prefix: str = "", outer: Any = None) -> None:
        self.graph, self.page, self.prefix, self.outer = graph, page, prefix, outer
        self.nodes = {str(each.get("id")): each for each in _dicts(graph.get("nodes"))}
        self.inners: dict[str, _Scope | None] = {}
        self.origins: dict[int | str, tuple[str, int]] = {}
        self.ends: dict[tuple[str, int], int | str] = {}
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        links = graph.get("links")
        for link in links if isinstance(links, list) else ():
            told = [link.get(name) for name in names] if isinstance(link, dict) else link
            if isinstance(told, list) and len(told) >= 5 and all(isinstance(each, int | str) for each in told[:5]):
                self.origins[told[0]] = (str(told[1]), int(told[2]) if str(told[2]).isdigit() else 0)
                self.ends[str(told[3]), int(told[4]) if str(told[4]).isdigit() else 0] = told[0]

    def inner(self, node: Mapping[str, Any]) -> _Scope | None:
        """The subgraph that a node stands for."""
        key = str(node.get("id"))
        if key not in self.inners:
            definition = self.page.definitions.get(str(node.get("type")))
            self.inners[key] = None
            if definition is not None and self.prefix.count(":") < MAX_DEPTH:
                self.page.count()
                self.inners[key] = _Scope(definition, self.page, f"{self.prefix}{key}:", (self, node))
        return self.inners[key]

    def source(self, node: dict[str, Any], name: str, steps: int = 0) -> _Link | _Value | None:
        """Where an input of a node comes from."""
        for slot in _dicts(node.get("inputs")):
            if name in (slot.get("name"), _widget(slot)) and slot.get("link") is not None:
                found = self.follow(slot["link"], steps + 1)
                return found or _widgets(node, self.page.definitions).get(name)
        return _widgets(node, self.page.definitions).get(name)

    def follow(self, link: Any, steps: int) -> _Link | _Value | None:
        """What feeds a link, through what only the page knows."""
        if not isinstance(link, int | str) or link not in self.origins or steps > MAX_STEPS:
            return None
        origin, slot = self.origins[link]
        if origin not in self.nodes:
            return self._outside(slot, steps) if self.outer else None
        node = self.nodes[origin]
        kind = str(node.get("type"))
        if node.get("mode") in (2, 4):
            return self._past(node, slot, steps) if node["mode"] == 4 else None
        if kind == "PrimitiveNode" or (kind.startswith("Primitive") and self.source(node, "value", steps + 1)):
            values = node.get("widgets_values")
            return self.source(node, "value", steps + 1) or (
                _Value(values, 0) if isinstance(values, list) and values else None
            )
        if kind in ("Reroute", "GetNode"):
            node = node if kind == "Reroute" else self._set_by(node)
            return next(
                (self.follow(each["link"], steps + 1) for each in _dicts(node.get("inputs")) if "link" in each), None
            )
        inner = self.inner(node)
        if inner is None:
            return _Link(self.prefix + origin, slot)
        end = next((at for (to, number), at in inner.ends.items() if to not in inner.nodes and number == slot), None)
        return inner.follow(end, steps + 1)

    def _outside(self, slot: int, steps: int) -> _Link | _Value | None:
        """What the subgraph's own input is given."""
        scope, wrapper = self.outer
        inputs = _dicts(self.graph.get("inputs"))
        return scope.source(wrapper, str(inputs[slot].get("name")), steps + 1) if slot < len(inputs) else None

    def _past(self, node: Mapping[str, Any], slot: int, steps: int) -> _Link | _Value | None:
        """What a bypassed node passes on: its input of the output's type."""
        outputs = _dicts(node.get("outputs"))
        kind = outputs[slot].get("type") if slot < len(outputs) else None
        alike = (
            each for each in _dicts(node.get("inputs")) if each.get("type") == kind and each.get("link") is not None
        )
        return next((self.follow(each["link"], steps + 1) for each in alike), None)

    def _set_by(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """The SetNode of the same name as a GetNode."""
        name = node.get("widgets_values")
        return next(
            (n for n in self.nodes.values() if n.get("type") == "SetNode" and n.get("widgets_values") == name), {}
        )

    def found(self, muted: bool = False) -> Iterator[_Found]:
        """Every node, those of subgraphs in the place of the node that stands for them."""
        for key, node in self.nodes.items():
            off = muted or node.get("mode") in (2, 4)
            inner = self.inner(node)
            if inner is not None:
                yield from inner.found(off)
            elif node.get("type") not in DRAWN:
                names = [
                    *_widgets(node, self.page.definitions),
                    *(str(each.get("name")) for each in _dicts(node.get("inputs"))),
                ]
                inputs = {name: self.source(node, name) for name in dict.fromkeys(names)}
                known = {name: at for name, at in inputs.items() if at}
                yield _Found(self.prefix + key, str(node.get("type")), node, known, off)


def _of_the_page(graph: Mapping[str, Any]) -> list[_Found]:
    found = []
    for each in _Scope(graph, _Page(graph)).found():
        found.append(each)
        if len(found) > MAX_NODES:
            raise _Unreadable(f"it has more than {MAX_NODES} nodes")
    return found


def _widgets(node: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, _Value]:
    """The plain values of a node by name. They are saved in the order in which they are drawn."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return {str(key): _Value(values, key) for key in values}
    if not isinstance(values, list):
        return {}
    names = catalogue()["widgets"].get(str(node.get("type")))
    if names is None and str(node.get("type")) in definitions:
        names = _proxies(node)
    if names is None:
        names = [_widget(slot) for slot in _dicts(node.get("inputs")) if _widget(slot)]
        if len(names) != len(values):
            return {}
    return {
        name: _Value(values, at) for at, name in enumerate(names[: len(values)]) if name != "control_after_generate"
    }


def _proxies(node: Mapping[str, Any]) -> list[str]:
    """The names of a subgraph's values: inputs of its own (-1), or values of nodes inside, which keep them."""
    properties = node.get("properties")
    proxies = properties.get("proxyWidgets") if isinstance(properties, dict) else None
    if isinstance(proxies, list):
        return [
            str(each[1]) if str(each[0]) == "-1" else ":".join(map(str, each))
            for each in proxies
            if isinstance(each, list) and len(each) == 2
        ]
    return [name for slot in _dicts(node.get("inputs")) if (name := _widget(slot))]


def _widget(slot: Mapping[str, Any]) -> str:
    widget = slot.get("widget")
    return str(widget.get("name", "")) if isinstance(widget, dict) else ""


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# What is kept of it


def _node(found: _Found) -> Node:
    links = {
        name[:100]: f"{at.node[:100]}/{at.slot}"[:200] for name, at in found.inputs.items() if isinstance(at, _Link)
    }
    plain = {name: at.plain for name, at in found.inputs.items() if isinstance(at, _Value)}
    own = {name: value for name, value in plain.items() if isinstance(value, str) and _private(found.type, name, value)}
    kept = {name: value for name, value in plain.items() if name not in own and isinstance(value, (str, int, float))}
    told = found.raw.get("properties")
    told = told if isinstance(told, dict) else {}
    return Node(
        id=found.id[:100],
        type=found.type[:200],
        values={
            name[:100]: (value if isinstance(value, str) else json.dumps(value))[:500] for name, value in kept.items()
        },
        links=links,
        muted=found.muted,
        texts={name[:100]: len(value.strip()) for name, value in own.items()},
        weighted=any(WEIGHT.search(value[:100_000]) for value in own.values()),
        pack=str(told.get("cnr_id") or str(told.get("aux_id", "")).rpartition("/")[2]).lower()[:100],
        pack_version=str(told.get("ver", ""))[:50],
    )


def _private(kind: str, name: str, value: str) -> bool:
    """Whether a text is the user's own: all are but those of nodes known here, and names of weights."""
    return name in PRIVATE or (kind not in catalogue()["widgets"] and not value.lower().endswith(ENDINGS))
