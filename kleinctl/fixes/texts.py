"""Fixes that write small text files: settings, workflows, kleinctl's own configuration. What was there is kept."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from kleinctl.config import NO_COMMANDS, load_config, tomllib
from kleinctl.fixes.request import MAX_TEXT, Plan, Request
from kleinctl.home import config_file, home
from kleinctl.journal import Progress, Put, Record, Seen, missing_folders, spare_file
from kleinctl.problem import shell
from kleinctl.store import inside, writing

#: What a fix may write: settings, never something that is run.
WRITABLE = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".conf", ".txt")
WRITABLE_NAMES = (".wslconfig",)
#: Bytes that a file to be changed may have: those of a large workflow.
MAX_BYTES = 20 * 2**20
#: Lines that may change: they are shown before anybody says yes.
MAX_LINES = 200


def write_text(request: Request) -> Plan:
    """`write-text`: a small file as it should be."""
    path = _settled(request, request.path("path"))
    text = request.text("text", longest=MAX_TEXT, lines=True)
    lines = _changes(_read_bytes(request, path), text)
    if len(lines) > MAX_LINES:
        raise request.refuse(f"it changes {len(lines)} lines of {path}, more than anyone would read")
    return _writing(request, path, text, (f"write {path}:", *lines))


def _changes(before: bytes | None, text: str) -> list[str]:
    """The lines that go and those that come; all come where the file was no UTF-8."""
    try:
        former = (before or b"").decode("utf-8").splitlines()
    except UnicodeDecodeError:
        former = []
    differing = difflib.ndiff(former, text.splitlines())
    return [f"  {line}".replace("\t", "<tab>")[:500] for line in differing if line.startswith(("+", "-"))]


def _settled(request: Request, path: Path) -> Path:
    """Where a link leads to, when it is a file that may be written."""
    if path.suffix not in WRITABLE and path.name not in WRITABLE_NAMES:
        raise request.refuse(f"{path} is no file of settings")
    if path.is_dir():
        raise request.refuse(f"{path} is a folder")
    return path.resolve() if path.is_symlink() else path


def _writing(request: Request, path: Path, text: str, sentences: tuple[str, ...], *commands: str) -> Plan:
    """The plan to write `text`: with the ends of lines and the rights that the file had."""
    before, made = _read_bytes(request, path), missing_folders(path)
    raw = (text.replace("\n", "\r\n") if b"\r\n" in (before or b"") and "\r" not in text else text).encode("utf-8")

    def work(record: Record, progress: Progress) -> None:
        if _read_bytes(request, path) != before:
            raise request.refuse(f"{path} was changed meanwhile")
        new, former = spare_file(f"new-{path.name}"), spare_file(path.name)
        with writing(new):
            new.write_bytes(raw)
        if before is not None:
            shutil.copymode(path, new)
        kept = str(former) if before is not None else None
        sha256 = hashlib.sha256(raw).hexdigest()
        try:
            record.perform(Put("put", str(path), sha256, kept, None, made, Seen.of(path)), new)
        finally:
            new.unlink(missing_ok=True)

    more = ("keep what it was in kleinctl's journal",) if before is not None else ()
    outside = not inside(path.parent, home())  # of a link, where it leads to
    return request.plan(*sentences, *more, work=work, commands=commands, disk_bytes=len(raw), outside=outside)


def _read_bytes(request: Request, path: Path) -> bytes | None:
    """What is in a file that is to be changed; None where there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise request.refuse(f"{path} is too large")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise request.refuse(f"{path} cannot be read ({error.strerror})") from None


def edit_workflow(request: Request) -> Plan:
    """`edit-workflow`: one input of a node, or its type."""
    from kleinctl.facts import workflow

    path = _settled(request, request.path("path"))
    node, name, value = (request.text(each) for each in ("node", "input", "value"))
    try:
        text = workflow.edit(path, node, name, value)
    except ValueError as error:
        raise request.refuse(f"{path.name} cannot be edited: {error}".rstrip(".")) from None
    text = _laid_out(text, _read_bytes(request, path) or b"")
    return _writing(request, path, text, (f"set {name} of node {node} in {path} to {value!r}",))


def _laid_out(text: str, before: bytes) -> str:
    """The JSON `text` as the former was laid out, where that is known: nothing but the value changes."""
    former = before.decode("utf-8", "replace").replace("\r\n", "\n")
    document, end = json.loads(former), former[len(former.rstrip()) :]
    for indent, plain, marks in product((None, 1, 2, 4, "\t"), (False, True), ((",", ":"), (", ", ": "), (",", ": "))):
        style: dict[str, Any] = {"indent": indent, "ensure_ascii": plain, "separators": marks}
        if json.dumps(document, **style) == former.rstrip():
            return json.dumps(json.loads(text), **style) + end
    return text


# kleinctl's own configuration


def set_config(request: Request) -> Plan:
    """`set-config`: a default in `config.toml`."""
    table, key, value = (request.text(each) for each in ("table", "key", "value"))
    if not all(re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", word) for word in (table, key)):
        raise request.refuse(f"{table}.{key} is no setting")
    path = config_file().resolve()
    settings = load_config(path)
    raw = path.read_text(encoding="utf-8") if path.exists() else ""
    literal = value if re.fullmatch(r"true|false|-?\d{1,15}(\.\d+)?", value) else json.dumps(value, ensure_ascii=False)
    text = with_setting(raw, table, key, literal)
    wanted = {**settings, table: {**settings.get(table, {}), key: tomllib.loads(f"x = {literal}")["x"]}}
    try:
        understood = tomllib.loads(text) == wanted
    except ValueError:
        understood = False
    if not understood:
        raise request.refuse(
            f"{path} is written in a way that kleinctl cannot change; add {key} = {literal} to [{table}]"
        )
    sentence = f"set {key} = {literal} below [{table}] in {path}"
    by_hand = shell("kleinctl", table, f"--{key}", value)
    return _writing(request, path, text, (sentence,), *(() if table in NO_COMMANDS else (by_hand,)))


def with_setting(text: str, table: str, key: str, literal: str) -> str:
    """TOML with one key set: its line changed, or one added below its table, or the table added at the end."""
    lines = text.splitlines()
    line = f"{key} = {literal}"
    heads = [number for number, each in enumerate(lines) if re.match(r"\s*\[", each)]
    head = next((number for number in heads if re.match(rf"\s*\[\s*{re.escape(table)}\s*\]", lines[number])), None)
    if head is None:
        lines += [*([""] if lines else []), f"[{table}]", line]
    else:
        end = next((number for number in heads if number > head), len(lines))
        own = (number for number in range(head + 1, end) if re.match(rf"\s*{re.escape(key)}\s*=", lines[number]))
        number = next(own, None)
        lines[head + 1 : head + 1] = [line] if number is None else []
        if number is not None:
            lines[number] = line
    return "\n".join(lines) + "\n"
