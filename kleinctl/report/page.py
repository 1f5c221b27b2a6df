"""One page for people: what doctor or triage found, self-contained, readable without network or script, printable."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from kleinctl.units import bytes_text, gib, seconds_text

Document = Mapping[str, Any]


def doctor(document: Document) -> str:
    """The page of a `kleinctl.doctor/1` document."""
    problems = document["problems"]
    parts = [
        _machine(document["hardware"]),
        _verdict(document),
        _section("Problems", _problems(problems)) if problems else "",
        _section("In the log", _problems(document["log"]["problems"])) if document.get("log") else "",
        _memory(document),
        _section("Checks", _checks(document["checks"])),
    ]
    errors = sum(problem["severity"] == "error" for problem in problems)
    return _page("kleinctl doctor", f"{_count(errors, 'error')}, {_count(len(problems) - errors, 'warning')}", parts)


def triage(document: Document) -> str:
    """The page of a `kleinctl.triage/1` document."""
    rows = [
        f'<tr><td><span class="tag {escape(each["severity"])}">{escape(each["severity"])}</span></td>'
        f"<td><code>{escape(each['name'])}</code><br>{escape(each['what'])}</td>"
        f'<td class="number">{len(each["reports"])}</td>'
        f"<td>{escape(', '.join(each['reports']))}</td><td>{_command(each['fix'])}</td></tr>"
        for each in document["problems"]
    ]
    head = "<tr><th></th><th>problem</th><th>machines</th><th>which</th><th>fix</th></tr>"
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    unreadable = [f"<li>{escape(each['file'])}: {escape(each['why'])}</li>" for each in document.get("unreadable", [])]
    parts = [
        _section("Problems, the most frequent first", table),
        _section("Not readable", f"<ul>{''.join(unreadable)}</ul>") if unreadable else "",
    ]
    return _page("kleinctl triage", _count(len(document["reports"]), "report"), parts)


def _page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The document around `parts`. Its policy allows its own style and script, and nothing from anywhere."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}" if number else f"no {word}s"


def _machine(hardware: Document) -> str:
    cards = [(str(gpu["name"]), _card(gpu)) for gpu in hardware["gpus"]] or [
        ("no NVIDIA card", ", ".join(gpu["name"] for gpu in hardware.get("other_gpus", [])))
    ]
    free = hardware["disk_free_bytes"]
    python = (hardware.get("python") or {}).get("version", "unknown")
    tiles = [
        *cards,
        (f"{gib(hardware['ram_bytes'])} RAM", f"{gib(hardware['ram_available_bytes'])} available"),
        (bytes_text(free) if free is not None else "unknown", "of disk free"),
        (str(hardware.get("os", hardware["platform"])), f"Python {python}, {hardware.get('cpu_count', '?')} cores"),
    ]
    shown = "".join(f"<div class=tile><b>{escape(head)}</b><span>{escape(text)}</span></div>" for head, text in tiles)
    return f'<section class="tiles">{shown}</section>'


def _card(gpu: Document) -> str:
    free = f"{gib(gpu['vram_free_bytes'])} of {gib(gpu['vram_bytes'])} VRAM free"
    return f"{gpu['arch']}, {free}, driver {gpu['driver']}"


def _verdict(document: Document) -> str:
    choice = document["choice"]
    if choice is None:
        return '<section class="verdict bad"><h2>Nothing would run here</h2></section>'
    head = f"{choice['model']} with {choice['backend']} would run"
    return f'<section class="verdict good"><h2>{escape(head)}</h2><p>{escape(choice["why"])}</p></section>'


def _memory(document: Document) -> str:
    """What each backend would take of VRAM and RAM, against what there is."""
    hardware, choice = document["hardware"], document["choice"]
    card = max(hardware["gpus"], key=lambda gpu: gpu["vram_free_bytes"], default=None)
    rows = [*([{**choice, "chosen": True}] if choice else []), *document["alternatives"]]
    rows = [row for row in rows if row["fit"]["ram_bytes"]]
    if not rows:
        return ""
    limits = {"VRAM": card["vram_free_bytes"] if card else 0, "RAM": hardware["ram_available_bytes"]}
    most = {kind: max(limit, *(row["fit"][f"{kind.lower()}_bytes"] for row in rows)) for kind, limit in limits.items()}
    content = []
    for row in rows:
        fit, why = row["fit"], row.get("why_not", "")
        bars = "".join(
            _bar(kind, fit[f"{kind.lower()}_bytes"], limit, most[kind])
            for kind, limit in limits.items()
            if fit[f"{kind.lower()}_bytes"]
        )
        time = f", about {seconds_text(fit['seconds_next'])} a picture" if fit["seconds_next"] else ""
        label = f"<b>{escape(row['model'])}</b> with {escape(row['backend'])} ({escape(fit['strategy'])}{escape(time)})"
        note = f"<p>{escape(why)}</p>" if why else ""
        content.append(f'<div class="plan{" chosen" if row.get("chosen") else ""}"><p>{label}</p>{bars}{note}</div>')
    hint = "<p class=hint>The line in each bar is what is free now.</p>"
    return _section("Memory: what each would take", hint + "".join(content))


def _bar(kind: str, used: int, limit: int, most: int) -> str:
    share, edge = (100 * value / most if most else 0 for value in (used, limit))
    state = "over" if used > limit else "near" if used > 0.9 * limit else "well"
    words = f"{gib(used)} of {gib(limit)} free"
    picture = (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{kind}: {words}">'
        f'<rect class="room" width="100" height="10"/><rect class="{state}" width="{share:.2f}" height="10"/>'
        f'<rect class="edge" x="{max(0.0, edge - 0.5):.2f}" width="0.5" height="10"/></svg>'
    )
    return f'<div class="bar"><span>{kind}</span>{picture}<span>{escape(words)}</span></div>'


def _problems(problems: Iterable[Document]) -> str:
    return "".join(map(_problem, problems)) or "<p>None that kleinctl knows.</p>"


def _problem(problem: Document) -> str:
    severity = escape(problem["severity"])
    evidence = "".join(
        f"<li>{escape(each['looked_at'])}: {escape(each['found'])}"
        + (f" (wanted: {escape(each['wanted'])})" if each.get("wanted") else "")
        + "</li>"
        for each in problem.get("evidence", [])
    )
    return (
        f'<article class="{severity}"><h3><span class="tag {severity}">{severity}</span> {escape(problem["what"])}</h3>'
        f"<p>{escape(problem['why'])}</p>{_command(problem['fix'])}"
        + (f"<ul>{evidence}</ul>" if evidence else "")
        + f'<p class="hint"><code>kleinctl explain {escape(problem["name"])}</code></p></article>'
    )


def _command(text: str) -> str:
    """A line to paste; the script puts a button beside it."""
    return f'<pre class="copy"><code>{escape(text)}</code></pre>'


def _checks(checks: Iterable[Document]) -> str:
    words = {"ok": "ok", "problem": "problem", "skipped": "could not check"}
    rows = [
        f'<tr class="{escape(each["status"])}"><td>{words.get(each["status"], "?")}</td>'
        f"<td><code>{escape(each['name'])}</code></td><td>{escape(each['why'])}</td></tr>"
        for each in checks
    ]
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return f"<details><summary>{len(rows)} checks</summary>{table}</details>"
