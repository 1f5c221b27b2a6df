"""Other people's reports, judged here: one, many grouped by problem, two side by side, old ones by today's rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kleinctl import __version__
from kleinctl.facts import Facts
from kleinctl.hardware import Hardware
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Problem
from kleinctl.report import bundle
from kleinctl.report.bundle import Finding, Report
from kleinctl.report.collect import log_problems
from kleinctl.survey import Survey, judge

SCHEMA = "kleinctl.triage/1"
#: Amounts that change from minute to minute differ by more than this share of the larger to count.
NOISE = 0.15


@dataclass(frozen=True)
class Judged:
    """A report, and what is wrong by the rules of this kleinctl: from its facts, and from its logs."""

    report: Report
    survey: Survey
    from_logs: tuple[Problem, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What the facts show, then what the logs show besides."""
        names = {problem.name for problem in self.survey.problems}
        return (*self.survey.problems, *(problem for problem in self.from_logs if problem.name not in names))

    @property
    def machine(self) -> str:
        """The kind of machine: `RTX 4070 Ti SUPER, Windows`."""
        return machine_class(self.report.facts.hardware)

    @property
    def only_there(self) -> list[str]:
        """Names of problems that were told on the machine and cannot be judged from the report."""
        now = {problem.name for problem in self.problems}
        return [name for name in self.report.seen_there if name not in now]

    def to_json(self) -> dict[str, Any]:
        """One of `reports` in `kleinctl.triage/1`."""
        report, choice = self.report, self.survey.choice
        return {
            "file": report.title or report.path.name,
            "case": report.case,
            "note": report.note,
            "made": report.made,
            "kleinctl": report.kleinctl,
            "machine": self.machine,
            "problems": [problem.to_json() for problem in self.problems],
            "only_there": self.only_there,
            "choice": choice.to_json() if choice else None,
        }


@dataclass(frozen=True)
class Group:
    """One problem, and the machines that have it. `alone` counts those that have no other error."""

    name: str
    severity: str
    what: str
    fix: str
    ref: str | None
    labels: tuple[str, ...]
    machines: Mapping[str, int] = field(hash=False)
    alone: int

    def to_json(self) -> dict[str, Any]:
        """One of `problems` in `kleinctl.triage/1`."""
        told = {key: value for key, value in vars(self).items() if key not in ("labels", "machines", "ref")}
        ref = {"ref": self.ref} if self.ref else {}
        return {**told, **ref, "count": len(self.labels), "reports": list(self.labels), "machines": dict(self.machines)}


@dataclass(frozen=True)
class Difference:
    """A fact that is not the same on two machines, as people read it. `weight` 0 matters most."""

    name: str
    left: str
    right: str
    weight: int


@dataclass(frozen=True)
class Replayed:
    """How today's rules judge an old report: names of problems that are new, gone, or told in other words."""

    label: str
    kleinctl: str
    new: tuple[str, ...]
    gone: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing changed."""
        return not (self.new or self.gone or self.changed)


def judged(plugins: Plugins, report: Report) -> Judged:
    """Judge the facts of a report as those of this machine would be."""
    return Judged(report, judge(plugins, report.facts), tuple(log_problems(plugins, report.logs, report.facts)))


def read_all(plugins: Plugins, paths: Iterable[Path]) -> tuple[list[Judged], list[Problem]]:
    """Every report that can be read, judged; and a problem for each that cannot."""
    found, unreadable = [], []
    paths = list(paths)
    names = Counter(path.name for path in paths)
    for path in paths:
        title = f"{path.absolute().parent.name}/{path.name}" if names[path.name] > 1 else ""
        try:
            found.append(judged(plugins, replace(bundle.read(path), title=title)))
        except KleinctlError as error:
            unreadable.append(error.problem)
    return found, unreadable


def files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that were named, and the reports (.zip, .json) in the folders that were.

    Raises:
        KleinctlError: a folder cannot be read.
    """
    for path in paths:
        if path.is_dir():
            try:
                yield from sorted(each for each in path.iterdir() if each.suffix.lower() in (".zip", ".json"))
            except OSError as error:
                why, fix = f"{error.strerror or error}.", "kleinctl triage FILE..."
                raise KleinctlError(
                    Problem(f"{path} cannot be read", why, fix, name="report-unreadable", path=str(path))
                ) from None
        else:
            yield path


def machine_class(hardware: Hardware) -> str:
    """Card and system: `RTX 4070 Ti SUPER, Windows`, `2 x RTX 3090, Linux in WSL`, `no NVIDIA card, Linux`."""
    cards = Counter(re.sub(r"^(?:NVIDIA |GeForce )+", "", gpu.name) for gpu in hardware.gpus)
    named = " + ".join(f"{count} x {name}" if count > 1 else name for name, count in cards.items())
    system = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}.get(hardware.platform, hardware.platform)
    where = " in WSL" if hardware.wsl else f" in {hardware.container}" if hardware.container else ""
    return f"{named or 'no NVIDIA card'}, {system}{where}"


# Many


def grouped(found: Sequence[Judged]) -> list[Group]:
    """The problems of many machines, the one whose fix would help the most of them first."""
    by_name: dict[str, dict[str, tuple[Judged, Problem]]] = {}
    for each in found:
        whose = each.report.case or str(each.report.path)  # several reports of a case are one machine
        for problem in each.problems:
            by_name.setdefault(problem.name, {}).setdefault(whose, (each, problem))
    groups = [_group(name, list(having.values())) for name, having in by_name.items()]
    return sorted(groups, key=lambda group: (-len(group.labels), group.severity, -group.alone, group.name))


def _group(name: str, having: Sequence[tuple[Judged, Problem]]) -> Group:
    problems = [problem for _, problem in having]
    errors = [{problem.name for problem in each.problems if problem.severity == "error"} for each, _ in having]
    return Group(
        name=name,
        severity=min(problem.severity for problem in problems),
        what=_commonest(problem.what for problem in problems),
        fix=_commonest(problem.fix for problem in problems),
        ref=next((problem.ref for problem in problems if problem.ref), None),
        labels=tuple(each.report.label for each, _ in having),
        machines=dict(Counter(each.machine for each, _ in having).most_common()),
        alone=sum(names <= {name} for names in errors),
    )


def _commonest(texts: Iterable[str]) -> str:
    return Counter(texts).most_common(1)[0][0]


# Two

#: Facts by how often they are the reason, the most frequent first. What matches none comes last.
_WEIGHTS = tuple(
    re.compile(rule)
    for rule in (
        r"gpu\d*\.(?:name|driver|cuda_driver|hidden|mig|compute_capability)|gpus$|nvml\.|kernel_driver",
        r"\.(?:torch|torch_cuda|diffusers|transformers|accelerate|huggingface-hub|numpy|torchvision)$|environments$",
        r"^file |^files$",
        r"gpu\d*\.vram|ram_|swap|commit|disk_free|disks\.",
        r"platform|^(?:os|wsl|container|python)\b|^comfyui |comfyuis|workflow|variables|hub_cache",
        r"\.packages\.",
    )
)
#: Facts that differ between any two machines, or from minute to minute, and never matter.
_IDLE = re.compile(
    r"\.(?:pid|pcie_generation_now|temperature_celsius|executable|requires|uuid|saw|found_by|arch)(?:\.|$)"
    r"|^seconds|disks\.\w+\.path$"
)
_CHANGING = re.compile(r"free|available|^rates\.")
#: Measured rates, in bytes and in FLOP a second.
_BYTES_A_SECOND = re.compile(r"^rates\.(?:pinned|pageable|back|disk|cached)$")
_FLOP_A_SECOND = re.compile(r"^rates\.(?:encode|\w+\.flops)$")


def differences(left: Facts, right: Facts) -> list[Difference]:
    """What differs between two machines, what matters most first."""
    one, other = flat(left), flat(right)
    found = []
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        if a != b and not _IDLE.search(name) and not _is_noise(name, a, b):
            weight = next((at for at, rule in enumerate(_WEIGHTS) if rule.search(name)), len(_WEIGHTS))
            found.append(Difference(name, _words(name, a), _words(name, b), weight))
    return sorted(found, key=lambda each: each.weight)


def flat(facts: Facts) -> dict[str, Any]:
    """Facts by names that are the same on both machines: `gpu0.driver`, `file vae/flux2-vae.safetensors.kind`."""
    document = facts.to_json()
    hardware = document.pop("hardware")
    found = dict(_leaves("hardware", {key: value for key, value in hardware.items() if key != "gpus"}))
    for number, gpu in enumerate(hardware["gpus"]):
        found |= dict(_leaves(f"gpu{number}", gpu))
    for kind, title in (("environments", "environment"), ("files", "file"), ("comfyuis", "comfyui")):
        for entry in document.pop(kind):
            found |= dict(_leaves(_entry_name(title, entry), entry))
    return found | dict(_leaves("", document))


def _entry_name(title: str, entry: Mapping[str, Any]) -> str:
    if title == "file":
        name = re.split(r"[\\/]", str(entry["path"]))[-1]
        return f"file {entry['place']} {entry['folder']}/{name}"
    return f"{title} {entry['name']}"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, item)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(f"{name}{number}", item)
    else:
        yield name.removeprefix("hardware."), value


def _is_noise(name: str, a: Any, b: Any) -> bool:
    """Whether two amounts of something that always changes are about the same."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return bool(numbers and _CHANGING.search(name) and abs(a - b) <= NOISE * max(a, b))


def _words(name: str, value: Any) -> str:
    from kleinctl.units import bytes_text, gib, speed_text, work_text

    rates = ((_BYTES_A_SECOND, speed_text), (_FLOP_A_SECOND, work_text))
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_bytes"):
        return gib(value) if re.search(r"ram|swap|commit", name) else bytes_text(value)
    if isinstance(value, float) and (text := next((text for rule, text in rates if rule.search(name)), None)):
        return text(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# Old ones


def replayed(each: Judged) -> Replayed:
    """What today's rules say of a report, against what was said when it was made."""
    kept = set(each.report.seen_there)
    then, now = _by_name(each.report.findings), _by_name(each.problems)
    return Replayed(
        label=each.report.label,
        kleinctl=each.report.kleinctl,
        new=tuple(name for name in now if name not in then and name not in kept),
        gone=tuple(name for name in then if name not in now and name not in kept and name not in _NOT_JUDGED),
        changed=tuple(name for name in now if name in then and then[name] != now[name]),
    )


#: Problems of an installation of kleinctl, which no facts show.
_NOT_JUDGED = {"plugin-failed", "unknown-plugin", "plugin-name-taken", "model-name-taken", "environment-broken"}


def _by_name(problems: Iterable[Problem | Finding]) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for problem in problems:
        found.setdefault(problem.name, []).append((problem.severity, problem.what, problem.fix))
    return {name: sorted(set(told)) for name, told in found.items()}


def document(found: Sequence[Judged], unreadable: Sequence[Problem]) -> dict[str, Any]:
    """`kleinctl.triage/1`, without what `--diff` and `--replay` add."""
    return {
        "schema": SCHEMA,
        "kleinctl": __version__,
        "reports": [each.to_json() for each in found],
        "unreadable": [problem.to_json() for problem in unreadable],
        "problems": [group.to_json() for group in grouped(found)],
    }
