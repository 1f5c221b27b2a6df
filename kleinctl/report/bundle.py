"""A report as a file: written once it has been searched for what must not be in it, and read within bounds.

What is read comes from strangers. Nothing is extracted to disk, one member of a zip is read, and whatever the bytes
are, reading ends in a `Report` or in a problem that names the file.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleinctl import documents
from kleinctl.facts import Facts
from kleinctl.hardware import Hardware
from kleinctl.header import BadHeader, json_object
from kleinctl.problem import KleinctlError, Misuse, Problem
from kleinctl.report.collect import SCHEMA, Log, readme
from kleinctl.report.redact import Redactor, leaks

#: Bounds of what is read: bytes of the file, members of a zip, bytes of a member, times a member may grow.
MAX_FILE, MAX_MEMBERS, MAX_MEMBER, MAX_RATIO = 64 * 2**20, 200, 16 * 2**20, 200
#: Bounds of the JSON: commas, brackets, logs, and characters of a log.
MAX_COMMAS, MAX_BRACKETS, MAX_LOGS, MAX_LOG = 500_000, 250_000, 50, 2**18
#: A member smaller than this may grow as it likes.
_SMALL = 2**20
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Finding:
    """A problem as it was recorded."""

    name: str
    severity: str = "error"
    what: str = ""
    why: str = ""
    fix: str = ""
    ref: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Report:
    """A machine at one time, as somebody sent it.

    `findings` are the problems that were told then, `seen_there` names of those that redaction keeps from being found
    again. A report of `doctor --json` has the hardware alone.
    """

    path: Path
    facts: Facts
    kleinctl: str = "unknown"
    made: str = ""
    case: str = ""
    note: str = ""
    findings: tuple[Finding, ...] = ()
    seen_there: tuple[str, ...] = ()
    logs: tuple[Log, ...] = ()
    title: str = ""

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """What came with it, each with its head: the case, the note, when and by which kleinctl it was made."""
        made = " by ".join(filter(None, (self.made, f"kleinctl {self.kleinctl}")))
        return [("case", self.case), ("note", self.note), ("made", made)]

    @property
    def label(self) -> str:
        """What tells reports apart: the case, else the file's name, with its folder's where that is not enough."""
        return self.case or self.title or self.path.name


# Writing


def members(document: Mapping[str, Any], redactor: Redactor) -> dict[str, bytes]:
    """The members of a report's zip, by name, in their order."""
    found = {
        "README.txt": redactor.people(readme(document)),
        "report.json": json.dumps(document, indent=1, ensure_ascii=False) + "\n",
    }
    for number, log in enumerate(document["logs"], 1):
        name = re.sub(r"[^\w.-]+", "_", log["name"], flags=re.ASCII).removesuffix(".log")[:80]
        found[f"logs/{number:02}-{log['kind']}-{name}.txt"] = log["tail"] + "\n"
    return {name: text.encode("utf-8", "replace") for name, text in found.items()}


def pack(parts: Mapping[str, bytes]) -> bytes:
    """The members as a zip; the same members are the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(info, content)
    return buffer.getvalue()


def checked(data: bytes, redactor: Redactor) -> bytes:
    """A finished report, once it has been opened again and searched.

    Raises:
        KleinctlError: something that must not be in it is; the problem says what kind of thing, never the thing.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = leaks({info.filename: archive.read(info) for info in archive.infolist()}, redactor)
    if not found:
        return data
    told = ", ".join(dict.fromkeys(f"a {leak.kind} in {leak.member}" for leak in found[:8]))
    raise KleinctlError(
        Problem(
            "the report is not safe to send, and was not written",
            f"Redaction missed something of yours: {told}.",
            "kleinctl doctor --json   # and read it before you send it; please tell us, this is a mistake of ours",
            name="report-not-safe",
        )
    )


def write(path: Path, data: bytes) -> None:
    """Write a report to a new file, whole or not at all.

    Raises:
        Misuse: there is a file of that name.
        KleinctlError: the folder cannot be written to, or the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with path.open("xb"):
            pass
        try:
            beside.write_bytes(data)
            beside.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except FileExistsError:
        why = "A report is never written over another file."
        fix = f"kleinctl report -o {free_name(path).name}"
        raise Misuse(Problem(f"{path} exists", why, fix, name="report-exists", path=str(path))) from None
    except OSError as error:
        why = f"{error.strerror or error}."
        fix = "kleinctl report -o FILE.zip   # in a folder of yours"
        raise KleinctlError(
            Problem(f"{path} cannot be written", why, fix, name="output-unwritable", path=str(path))
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or the first of `NAME-2.zip`, `NAME-3.zip` ... that is free."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 10_000))
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))


# Reading


def read(path: Path) -> Report:
    """The report in a zip, a bare `report.json`, or what `doctor --json` printed.

    Raises:
        KleinctlError: it is none of these, is damaged, or is past a bound.
    """
    try:
        document = json_object(_bounded_json(_content(path)))
        return _report(path, document)
    except KleinctlError as error:
        raise KleinctlError(_unreadable(path, f"{error.problem.what}: {error.problem.why}")) from None
    except BadHeader as error:
        raise KleinctlError(_unreadable(path, f"Its text {error}.")) from None
    except _Refused as error:
        raise KleinctlError(_unreadable(path, str(error))) from None
    except OSError as error:
        raise KleinctlError(_unreadable(path, f"{error.strerror or error}.")) from None


class _Refused(Exception):
    """The file is past a bound, or no report."""


def _unreadable(path: Path, why: str) -> Problem:
    return Problem(
        f"{documents.read(str, path.name[: documents.MAX_TEXT], 'name')} is no report that can be read",
        why,
        "kleinctl report   # on the machine in question, to make a fresh one",
        name="report-unreadable",
        path=str(path),
    )


def _content(path: Path) -> bytes:
    """The JSON: of a zip the member report.json, else the file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _Refused("It is no regular file.")
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise _Refused(f"It is larger than {MAX_FILE >> 20} MiB.")
    if data.startswith(b"PK"):
        return _member(data, "report.json")
    if len(data) > MAX_MEMBER:
        raise _Refused(f"It is JSON of more than {MAX_MEMBER >> 20} MiB.")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # PowerShell's `>` writes UTF-16
        return data.decode("utf-16", "replace").encode("utf-8", "replace")
    return data.removeprefix(b"\xef\xbb\xbf")


def _member(data: bytes, name: str) -> bytes:
    """One member of a zip; the others are not looked into."""
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:  # before zipfile makes an object of each
        raise _Refused(f"It has more than {MAX_MEMBERS} members.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = _info(archive, name)
            with archive.open(info) as file:
                content = file.read(MAX_MEMBER + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise _Refused(f"The zip is damaged: {type(error).__name__}.") from None
    if len(content) > MAX_MEMBER:
        raise _Refused(f"{name} in it is larger than {MAX_MEMBER >> 20} MiB.")
    return content


def _info(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The entry of a member, when the zip is one that kleinctl could have written."""
    names = [info.filename for info in archive.infolist()]
    if len(set(names)) < len(names):
        raise _Refused("It has two members of the same name.")
    if name not in names:
        raise _Refused(f"It has no {name}.")
    if any(stat.S_ISLNK(info.external_attr >> 16) for info in archive.infolist()):
        raise _Refused("It has a symbolic link in it.")
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise _Refused(f"{name} in it is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Refused(f"{name} in it is compressed in a way that reports are not.")
    if info.file_size > MAX_MEMBER:
        raise _Refused(f"{name} in it is larger than {MAX_MEMBER >> 20} MiB.")
    if info.file_size > max(_SMALL, info.compress_size * MAX_RATIO):
        raise _Refused(f"{name} in it would grow more than {MAX_RATIO} times.")
    return info


def _bounded_json(text: bytes) -> bytes:
    if text.count(b",") > MAX_COMMAS or text.count(b"{") + text.count(b"[") > MAX_BRACKETS:
        raise _Refused("Its JSON has more entries than any report.")
    return text


def _report(path: Path, document: Mapping[str, Any]) -> Report:
    schema = document.get("schema")
    if schema == "kleinctl.doctor/1":
        return Report(
            path=path,
            facts=Facts(Hardware.from_json(document.get("hardware"))),
            kleinctl=_text(document, "kleinctl"),
            findings=_recorded(document),
        )
    if schema != SCHEMA:
        named = "It has no schema" if schema is None else f"Its schema is {ascii(schema)[:60]}"
        raise _Refused(f"{named}; wanted is {SCHEMA} or kleinctl.doctor/1.")
    findings = documents.sized(document.get("findings", {}), dict, "findings")
    log = documents.sized(findings.get("log", {}), dict, "findings.log")
    return Report(
        path=path,
        facts=Facts.from_json(document.get("facts")),
        kleinctl=_text(document, "kleinctl"),
        made=_text(document, "made"),
        case=_text(document, "case"),
        note=_text(document, "note"),
        findings=(*_recorded(findings), *_recorded(log)),
        seen_there=documents.read(tuple[str, ...], findings.get("seen_there", []), "findings.seen_there"),
        logs=tuple(_logs(document.get("logs", []))),
    )


def _text(document: Mapping[str, Any], key: str) -> str:
    return documents.read(str, document.get(key) or "", key)


def _recorded(document: Mapping[str, Any]) -> tuple[Finding, ...]:
    return documents.read(tuple[Finding, ...], document.get("problems", []), "problems")


def _logs(given: Any) -> list[Log]:
    found = []
    for number, entry in enumerate(documents.sized(given, list, "logs")[:MAX_LOGS]):
        log = documents.sized(entry, dict, f"logs[{number}]")
        tail = log.get("tail", "")
        if not isinstance(tail, str):
            raise documents.unreadable(f"logs[{number}].tail", "text", tail)
        found.append(Log(_text(log, "name"), _text(log, "kind"), _plain(tail[-MAX_LOG:])))
    return found


def _plain(text: str) -> str:
    """The text of a log without characters that a terminal would act on."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
