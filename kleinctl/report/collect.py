"""What goes into a report: facts, what doctor makes of them, headers' digests and the ends of logs, all redacted."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import __version__, header
from kleinctl.documents import MAX_TEXT
from kleinctl.facts import Facts
from kleinctl.problem import Evidence, Problem
from kleinctl.report.redact import Redactor
from kleinctl.survey import Survey, judge

if TYPE_CHECKING:
    from kleinctl.hardware import Hardware
    from kleinctl.logs import Match
    from kleinctl.plugins import Plugins

SCHEMA = "kleinctl.report/1"
#: Of each log the end is kept, in bytes; of each kind of log the newest few.
TAIL_BYTES, NEWEST = 2**16, 3
#: A GGUF file's header has no length of its own: its digest is that of the file's start, in bytes.
GGUF_START = 2**16


@dataclass(frozen=True)
class Log:
    """The end of a log. `kind` is `worker`, `install`, `crash`, `comfyui` or `given`; `name` that of its file."""

    name: str
    kind: str
    tail: str


def redactor_for(plugins: Plugins, facts: Facts, keep_prompts: bool = False) -> Redactor:
    """What hides this machine's owner."""
    from kleinctl.report.owner import owner

    parts = [part for model in plugins.models.values() for part in model.parts]
    names = [part.name for part in parts] + [place for part in parts for place in part.to.values()]
    return Redactor(
        owner(_serials(facts.hardware)),
        known_files=(name.rpartition("/")[2] for name in names),
        versions=_versions(facts),
        keep_prompts=keep_prompts,
    )


def _serials(hardware: Hardware) -> Iterator[str]:
    for gpu in hardware.gpus:
        yield from (uuid.partition("-")[2] for uuid in (gpu.uuid or "", *(each.uuid for each in gpu.mig.instances)))


def _versions(facts: Facts) -> Iterator[str]:
    """Version numbers, some of which look like addresses: `nvidia-cublas 12.8.4.1`."""
    for environment in facts.environments:
        yield from environment.packages.values()
    yield from (package.version or "" for package in facts.hardware.packages.values())
    yield facts.hardware.kernel.partition("-")[0]


def document(
    plugins: Plugins,
    facts: Facts,
    logs: Sequence[Log],
    redactor: Redactor,
    *,
    made: str,
    case: str = "",
    note: str = "",
) -> dict[str, Any]:
    """`kleinctl.report/1`. `made` is when, in UTC; `facts` and `logs` are as they are, the document is redacted.

    What doctor finds is judged from the redacted facts, as it will be elsewhere. What it finds here and not in them is
    listed by name under `seen_there`.
    """
    kept = Facts.from_json(json.loads(json.dumps(redactor.facts(facts).to_json())))
    tails = [Log(redactor.path(log.name), log.kind, redactor.text(log.tail)) for log in logs]
    told = judge(plugins, kept)
    return {
        "schema": SCHEMA,
        "kleinctl": __version__,
        "made": made,
        "case": redactor.text(case),
        "note": redactor.text(note),
        "versions": {redactor.people(name): version for name, version in versions().items()},
        "facts": kept.to_json(),
        "findings": _findings(plugins, facts, told, tails, redactor),
        "files": [
            {**digest, "path": str(file.path)}
            for file, digest in zip(kept.files, map(header_digest, (each.path for each in facts.files)), strict=False)
        ],
        "logs": [{**vars(log), "lines": log.tail.count("\n") + 1} for log in tails],
        "timings": {**facts.seconds, "checks": round(told.seconds, 4)},
        "redaction": dict(sorted(redactor.counts.items())),
    }


def _findings(plugins: Plugins, facts: Facts, told: Survey, logs: Sequence[Log], redactor: Redactor) -> dict[str, Any]:
    from kleinctl.environment import broken

    found = told.to_json()
    own = [problem.to_json() for problem in (*plugins.problems, *broken())]
    shown = {problem["name"] for problem in (*found["problems"], *own)}
    here = {problem.name for problem in judge(plugins, facts).problems}
    said = [problem.to_json() for problem in log_problems(plugins, logs, told.facts)]
    findings = {key: found[key] for key in ("checks", "choice", "alternatives")}
    findings |= {"problems": [*own, *found["problems"]], "log": {"problems": said}}
    return {**_cut(redactor.document(findings)), "seen_there": sorted(here - shown)}


def _cut(value: Any) -> Any:
    """A document whose texts are no longer than readers allow."""
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    return [_cut(item) for item in value] if isinstance(value, list) else value


def log_problems(plugins: Plugins, logs: Sequence[Log], facts: Facts) -> list[Problem]:
    """What logs prove, each problem once: all logs that were named or are ComfyUI's, the newest of kleinctl's own."""
    from kleinctl.log_patterns import PATTERNS
    from kleinctl.logs import explain

    theirs = [offer.thing for offer in plugins.offers("kleinctl_log_patterns")]
    found: dict[str, Problem] = {}
    kinds = {"crash"}
    for log in logs:
        if log.kind not in kinds:
            kinds |= {log.kind} - {"given", "comfyui"}
            for match in explain(log.tail, (*theirs, *PATTERNS), facts):
                found.setdefault(match.problem.name, _in_log(match, log))
    return list(found.values())


def _in_log(match: Match, log: Log) -> Problem:
    """The problem with the log's name beside the line that proves it."""
    line = Evidence(f"line {match.number} of {log.name}", match.line)
    return replace(match.problem, evidence=(line, *match.problem.evidence[1:]))


def versions() -> dict[str, str]:
    """Of Python, and of the packages that kleinctl itself needs."""
    import importlib.metadata
    import re

    found = {"python": "{}.{}.{}".format(*sys.version_info), "kleinctl": __version__}
    for line in importlib.metadata.requires("kleinctl") or ():
        name = re.split(r"[^\w.-]", line)[0]
        if "extra ==" not in line:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def header_digest(path: Path) -> dict[str, Any]:
    """Size in bytes, and sha256 of the header: of the length and the JSON of a safetensors file, else of the start.

    `header_sha256` is None where the file cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return {"size_bytes": 0, "header_sha256": None}
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            wanted = length if 2 <= length <= header.MAX_JSON and path.suffix == ".safetensors" else GGUF_START
            digest = hashlib.sha256(start + file.read(wanted))
            return {"size_bytes": size, "header_sha256": digest.hexdigest()}
    except OSError:
        return {"size_bytes": 0, "header_sha256": None}


# Logs


def gather_logs(facts: Facts, given: Iterable[Path] = ()) -> list[Log]:
    """The ends of kleinctl's newest logs, of each ComfyUI's, and of those that were named. Newest first in each kind.

    Raises:
        OSError: a log that was named cannot be read.
    """
    from kleinctl.home import logs_folder

    found = [_log(path, "given") for path in given]
    for kind in ("worker", "install", "crash"):
        newest = sorted(logs_folder().glob(f"{kind}-*.log"), key=_age)[:NEWEST]
        found += _readable(newest, kind)
    found += _readable((Path(each.log) for each in facts.comfyuis if each.log), "comfyui")
    return found


def _age(path: Path) -> float:
    with suppress(OSError):
        return -path.stat().st_mtime
    return 0.0


def _readable(paths: Iterable[Path], kind: str) -> Iterator[Log]:
    for path in paths:
        with suppress(OSError):
            yield _log(path, kind)


def _log(path: Path, kind: str) -> Log:
    from kleinctl.logs import readable

    with path.open("rb") as file:
        start = file.read(2)
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES) // 2 * 2)  # UTF-16 is read two bytes at a time
        raw = file.read(TAIL_BYTES)
    lines = readable(decoded(raw, start))
    return Log(path.name, kind, "\n".join(lines[1:] if size > TAIL_BYTES else lines))


def decoded(raw: bytes, start: bytes) -> str:
    """The text of a log, or of its end: UTF-8, or what PowerShell's `>` writes (UTF-16). `start` is how the log begins.

    In letters that are not Latin, only the mark at the start tells UTF-16; read as UTF-8, a name would not be found.
    """
    swapped, odd = start[:2] == b"\xfe\xff", raw[1:200:2]
    if swapped or start[:2] == b"\xff\xfe" or odd.count(0) > len(odd) // 2:
        return raw.decode("utf-16-be" if swapped else "utf-16-le", "replace").removeprefix("\ufeff")
    return raw.decode("utf-8-sig", "replace")


def readme(document: Mapping[str, Any]) -> str:
    """What the file is, for a person who opens it."""
    hidden = ", ".join(f"{count} x {kind}" for kind, count in document["redaction"].items()) or "nothing had to be"
    return README.format(kleinctl=document["kleinctl"], made=document["made"], hidden=hidden)


README = """\
A report on a machine, made by kleinctl {kleinctl} on {made} (UTC).

report.json  the machine (cards, memory, disks, driver, versions of Python packages), the weights files found with
             the digest of each header, what kleinctl doctor finds wrong, how long things took
logs/        the ends of logs, as they also stand in report.json

To look at it:   kleinctl triage FILE
What if:         kleinctl doctor --from FILE --set vram_free=6GiB

Hidden were: {hidden}. The same thing has the same token throughout this report (USER_1, FILE_3, TOKEN_A1B2).
It has no weights, no pictures, no serial numbers. Names of installed Python packages and of ComfyUI nodes are kept.
"""
