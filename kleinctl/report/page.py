"""One page for people: what doctor or triage found, self-contained, readable without network or script, printable."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kleinctl import atomic
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.units import bytes_text, gib, seconds_text

Document = Mapping[str, Any]


def doctor(document: Document, sent: Iterable[tuple[str, str]] = ()) -> str:
    """The page of a `kleinctl.doctor/1` document; of a report, with what was `sent` with it (case, note, date)."""
    problems, logs = document["problems"], document.get("log", {}).get("problems", [])
    told = "".join(f"<p><b>{escape(head)}</b> {escape(text)}</p>" for head, text in sent if text)
    parts = [
        f'<section class="sent">{told}</section>' if told else "",
        _machine(document["hardware"]),
        _verdict(document),
        _section("Problems", _problems(problems)) if problems else "",
        _section("In the log", _problems(logs)) if "log" in document else "",
        _memory(document),
        _section("Checks", _checks(document["checks"])),
    ]
    every = [*problems, *logs]
    errors = sum(problem["severity"] == "error" for problem in every)
    return _page("kleinctl doctor", f"{_count(errors, 'error')}, {_count(len(every) - errors, 'warning')}", parts)


def triage(document: Document) -> str:
    """The page of a `kleinctl.triage/1` document: the problems of many machines, then the machines."""
    reports, groups = document["reports"], document["problems"]
    most = max((group["count"] for group in groups), default=0)
    parts = [
        _section("What differs", _differences(document, reports)) if "diff" in document else "",
        _section("Judged differently now", _replay(document["replay"])) if "replay" in document else "",
        _section(
            "Problems, the one whose fix would help the most machines first",
            "".join(_group(group, most) for group in groups) or "<p>None that kleinctl knows.</p>",
        ),
        _section("Machines", _machines(reports)) if reports else "",
        _section("Not readable", _unreadable(document["unreadable"])) if document["unreadable"] else "",
    ]
    errors = sum(any(problem["severity"] == "error" for problem in each["problems"]) for each in reports)
    well = sum(not each["problems"] for each in reports)
    return _page("kleinctl triage", f"{_count(len(reports), 'report')}: {errors} with errors, {well} well", parts)


def write(path: Path, text: str, command: str) -> None:
    """Write a page. A file that is there is written over when it is a page too, for a report is soon named by mistake.

    Raises:
        Misuse: the file is another one.
        KleinctlError: it cannot be written. `command` is what to type instead.
    """
    fix = f"{command}   # in a folder of yours"
    try:
        if path.exists() and path.stat().st_size and not _is_page(path):
            what, why = f"{path} is no page of kleinctl's", "Only such a page is written over."
            raise Misuse(Problem(what, why, command, name="usage", path=str(path)))
        atomic.write_text(path, text, errors="replace")
    except OSError as error:
        raise KleinctlError(
            Problem(f"{path} cannot be written", f"{error.strerror}.", fix, name="output-unwritable", path=str(path))
        ) from None


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


def _group(group: Document, most: int) -> str:
    """A problem that machines share: how many, which, and what helps."""
    severity, count = escape(group["severity"]), group["count"]
    having, colour = _count(count, "machine"), "over" if severity == "error" else "near"
    picture = (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{having}">'
        f'<rect class="room" width="100" height="10"/>'
        f'<rect class="{colour}" width="{100 * count / most:.2f}" height="10"/></svg>'
    )
    machines = "; ".join(f"{number} x {name}" if number > 1 else name for name, number in group["machines"].items())
    only = f"; the only error of {group['alone']}" if severity == "error" and count > 1 else ""
    example = "For example: " if count > 1 else ""
    which = (
        f"<details><summary>{_count(count, 'report')}</summary><p>{escape(', '.join(group['reports']))}</p></details>"
    )
    return (
        f'<article class="{severity}"><h3><span class="tag {severity}">{severity}</span> {escape(group["name"])}</h3>'
        f'<div class="bar many">{picture}<span>{having}{only}</span></div>'
        f"<p>{example}{escape(group['what'])}</p><p>{escape(machines)}</p>{_command(group['fix'])}{which}"
        f'<p class="hint"><code>kleinctl explain {escape(group["name"])}</code></p></article>'
    )


def _machines(reports: Iterable[Document]) -> str:
    """A row for each machine: what it is, what would run, what is wrong."""
    rows = [
        "<tr>"
        f"<td>{escape(each['case'] or each['file'])}</td><td>{escape(each['machine'])}</td>"
        f"<td>{escape(_runs(each['choice']))}</td><td>{_names(each['problems'])}</td></tr>"
        for each in reports
    ]
    return _table(("report", "machine", "would run", "problems"), rows)


def _runs(choice: Document | None) -> str:
    return f"{choice['model']} with {choice['backend']}" if choice else "nothing"


def _names(problems: Iterable[Document]) -> str:
    told = {problem["name"]: problem["severity"] for problem in problems}
    shown = (f'<span class="tag {escape(severity)}">{escape(name)}</span>' for name, severity in told.items())
    return ", ".join(shown) or "none"


def _differences(document: Document, reports: Sequence[Document]) -> str:
    heads = ("", *(each["case"] or each["file"] for each in reports))
    rows = [
        f"<tr><td>{escape(each['name'])}</td><td>{escape(each['left'])}</td><td>{escape(each['right'])}</td></tr>"
        for each in document["diff"]
    ]
    return _table(heads, rows) if rows else "<p>Nothing that matters.</p>"


def _replay(told: Iterable[Document]) -> str:
    keys = ("new", "gone", "changed")
    rows = [
        f"<tr><td>{escape(each['label'])}</td><td>{escape(each['kleinctl'])}</td>"
        + "".join(f"<td>{escape(', '.join(each[key]) or '-')}</td>" for key in keys)
        + "</tr>"
        for each in told
        if not each["same"]
    ]
    return _table(("report", "kleinctl then", *keys), rows) if rows else "<p>None.</p>"


def _unreadable(problems: Iterable[Document]) -> str:
    items = (f"<li>{escape(each['what'])}: {escape(each['why'])}</li>" for each in problems)
    return f"<ul>{''.join(items)}</ul>"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    return f'<div class="wide"><table class="list"><tr>{head}</tr>{"".join(rows)}</table></div>'


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
    return f"{gpu['arch']}, {free}, driver {gpu['driver'] or 'unknown'}"


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
