"""What a log says went wrong: how patterns (log_patterns.py) are sought in it, and what a match may look at.

A log comes from strangers and may be made to slow us down: only its end is read, every regular expression is bounded,
and one is tried only around the words that it cannot do without.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from kleinctl.problem import Evidence, Problem

if TYPE_CHECKING:
    from kleinctl.facts import Facts

#: Only the end of a log is read: 4 Mi characters in at most 256 Ki lines. Longer lines are cut there.
MAX_CHARACTERS, MAX_LINES, MAX_LINE = 2**22, 2**18, 2**16
#: A pattern is tried at so many places that have one of its words, each so many characters to both sides.
MAX_PLACES, REACH = 24, 2000
#: Lines of a traceback that are looked at, and of an explanation the characters of the line that proves it.
MAX_FRAMES, MAX_SHOWN = 120, 300


@dataclass(frozen=True)
class Sighting:
    """A match of a pattern, and what stands around it. `number` counts `lines` from 0; `facts` are the machine's."""

    match: re.Match[str]
    lines: Sequence[str]
    number: int
    facts: Facts | None = None

    def __getitem__(self, group: str) -> str:
        """The text of a group; empty where it took no part."""
        return self.match[group] or ""

    def near(self, before: int, after: int) -> str:
        """The lines from so many before the match to so many after it."""
        return "\n".join(self.lines[max(0, self.number - before) : self.number + after + 1])

    @property
    def frames(self) -> str:
        """The traceback that ends with this line, or an empty string."""
        above = self.near(MAX_FRAMES, 0)
        return above[above.rfind("Traceback (most recent call last)") :] if "Traceback (most" in above else ""

    @property
    def file(self) -> str:
        """The name of the weights file that the log speaks of here: at the match, else below it, else above."""
        at = self.match.start() - self.match.string.rfind("\n", 0, self.match.start())
        here = self.near(0, 0)[max(0, at - MAX_SHOWN) : at + len(self.match[0]) + MAX_SHOWN]
        for text, nearest in ((here, 0), (self.near(-1, 6), 0), (self.near(6, -1), -1)):
            if named := _FILE.findall(text):
                return re.split(r"[\\/]+", "".join(named[nearest]))[-1]
        return ""

    @property
    def node(self) -> str:
        """The class of the ComfyUI node that failed, where the log is JSON that says so; else empty."""
        said = re.findall(r'"node_type": ?"(\w{1,60})"', self.match.string[: self.match.start()][-MAX_LINE:])
        return said[-1] if said else ""

    def setting(self, name: str) -> str:
        """The value of an input of a ComfyUI node, where the log is JSON that has the prompt in it; else empty."""
        said = re.search(rf'"{name}": ?"([^"\\\n]{{1,300}})"', self.match.string)
        return said[1] if said else ""


_FILE = re.compile(
    r"""["']([^"'\n]{1,300}\.(?:safetensors|gguf|sft|ckpt))["']|([^\s"'<>|*?\[\](),=]{1,300}\.(?:safetensors|gguf|sft|ckpt))\b"""
)


@dataclass(frozen=True)
class LogPattern:
    """A regular expression and the problem that a log with such a text has.

    A space in `regex` stands for any white space, since terminals and web pages wrap lines; `.` ends at the line.
    `problem` may be a function of the sighting that returns the problem, or None when it proves nothing after all.
    Repetition has to be bounded (`.{0,99}` rather than `.*`): logs come from strangers. `alone` marks a pattern that
    only means something in a log that shows no error otherwise.
    """

    name: str
    regex: str
    problem: Problem | Callable[[Sighting], Problem | None]
    alone: bool = False

    def explain(self, sighting: Sighting) -> Problem | None:
        """The problem that `sighting` proves, with the pattern's name if it has none."""
        try:
            problem = self.problem(sighting) if callable(self.problem) else self.problem
            return problem and replace(problem, name=problem.name or self.name)
        except Exception as error:  # a stranger's pattern must not keep the others from being tried
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            what = f"the log pattern {self.name} failed"
            return Problem(what, why, "kleinctl plugins", name="plugin-failed", severity="warning")


@dataclass(frozen=True)
class Match:
    """A problem, and the line of the log that proves it, counted from 1."""

    problem: Problem
    line: str
    number: int


def explain(text: str, patterns: Sequence[LogPattern] | None = None, facts: Facts | None = None) -> list[Match]:
    """What the log `text` proves, the best match first; empty for a healthy log.

    Errors come before warnings, then patterns in their order, for causes stand before consequences and the particular
    before the general. Each problem is told once, at its last match, and a line is explained by the first pattern that
    knows it. `facts` of the machine that wrote the log decide what the text leaves open.
    """
    from kleinctl.log_patterns import PATTERNS

    lines = readable(text)
    skipped = text.count("\n") + 1 - len(lines)
    log = _bare("\n".join(lines))
    starts = [0, *accumulate(len(line) + 1 for line in log.split("\n"))]
    found: dict[str, Match] = {}
    taken: set[int] = set()
    for pattern in sorted(PATTERNS if patterns is None else patterns, key=lambda each: each.alone):
        if pattern.alone and any(match.problem.severity == "error" for match in found.values()):
            break
        for match in _places(pattern.regex, log):
            number = bisect.bisect_right(starts, match.start()) - 1
            sighting = Sighting(match, lines, number, facts)
            problem = None if number in taken else pattern.explain(sighting)
            if problem is not None:
                taken.add(number)
                line = _shown(lines[number], match.start() - starts[number])
                evidence = Evidence(f"line {number + skipped + 1} of the log", line)
                problem = replace(problem, evidence=(evidence, *problem.evidence))
                found.setdefault(problem.name, Match(problem, line, number + skipped + 1))
                break
    return sorted(found.values(), key=lambda match: match.problem.severity == "warning")


def readable(text: str) -> list[str]:
    """The lines of a log without colours and links, bare of what a progress bar has overwritten, of bounded length."""
    text = text[-MAX_CHARACTERS:].replace("\0", "").replace("\r\n", "\n")  # PowerShell's `>` writes UTF-16
    if "\x1b" in text:
        text = _ESCAPE.sub("", text)
    lines = _COLOUR.sub("", text).split("\n")[-MAX_LINES:]
    if "\r" in text:
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines]
    return lines if len(max(lines, key=len)) <= MAX_LINE else [line[:MAX_LINE] for line in lines]


_ESCAPE = re.compile(r"\x1b(?:\[[0-9;:?]{0,40}[ -/]?[@-~]|\][^\x07\x1b\n]{0,2000}(?:\x07|\x1b\\)|[()][0-9A-B]|[=>78])")
_COLOUR = re.compile(r"\[\d{1,3}(?:;\d{1,3}){0,5}m")  # of which a web page has swallowed the escape character


def _bare(log: str) -> str:
    """The log with as many lines, bare of what stands before each (times, containers, quotes) and of stack frames."""
    log = _PREFIX.sub("", log)
    if 'File \\"' in log:
        log = _JSON_FRAME.sub('""', log)
    if 'File "' in log:
        log = _FRAME.sub(lambda frame: "\n" * frame[0].count("\n"), log)
    return _BOX.sub("", log) if "│" in log else log


_PREFIX = re.compile(
    r"^(?:(?:> ?){1,4}"
    r"|[\w.-]{1,40} {1,20}\| ?"  # docker compose
    r"|\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?\]?[ \t]?"
    r"|\[?\d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]?[ \t]"
    r"|[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d [\w.-]{1,60} [\w./-]{1,40}(?:\[\d{1,9}\])?: ?"  # journald
    r"){1,3}",
    re.MULTILINE,
)
# A frame, and the lines of code below it, which stand further in.
_FRAME = re.compile(r'^([ \t]{0,40})File "[^"\n]{1,500}", line \d{1,7}.*(?:\n\1[ \t]+\S.*){0,20}', re.MULTILINE)
_JSON_FRAME = re.compile(r'" {1,8}File \\"(?:[^"\\\n]|\\.){0,4000}"')
_BOX = re.compile(r"^[ \t]{0,40}│.*", re.MULTILINE)  # tracebacks that rich draws


def _shown(line: str, at: int) -> str:
    """A line as it is shown: of a long one the part around the match."""
    if len(line.strip()) <= MAX_SHOWN:
        return line.strip()
    start = max(0, min(at - MAX_SHOWN // 4, len(line) - MAX_SHOWN))
    return line[start : start + MAX_SHOWN].strip()


def _places(regex: str, log: str) -> Iterator[re.Match[str]]:
    """The matches of a regex, the last one first; in long logs only those around its last words."""
    compiled, words = _compiled(regex), _words(regex)
    if not words:
        yield from reversed(list(compiled.finditer(log)))
        return
    last = {word: log.rfind(word) for word in words}
    for _ in range(MAX_PLACES):
        at = max(last.values())
        if at < 0:
            return
        yield from reversed(list(compiled.finditer(log, max(0, at - REACH), at + REACH)))
        end = at - REACH // 2
        last = {word: log.rfind(word, 0, max(0, end)) if found >= end else found for word, found in last.items()}


@lru_cache(maxsize=512)
def _compiled(regex: str) -> re.Pattern[str]:
    return re.compile(regex.replace(" ", r"\s+"), re.MULTILINE)


@lru_cache(maxsize=512)
def _words(regex: str) -> tuple[str, ...]:
    """Words of which every match has one: the longest plain one of each alternative; none where that is too short."""
    bare = _CLASS.sub("\0", regex)
    while (less := _GROUP.sub("\0", bare)) != bare:
        bare = less
    longest = [
        max((re.sub(r"\\(.)", r"\1", word) for word in _SYNTAX.split(each)), key=len)
        for each in re.split(r"(?<!\\)\|", bare)
    ]
    return () if "(?i" in regex or min(map(len, longest)) < 3 else tuple(dict.fromkeys(longest))


_QUANTIFIER = r"(?:[*+?]|\{\d{0,9}(?:,\d{0,9})?\})"
_CLASS = re.compile(rf"(?<!\\)\[(?:\\.|[^\]\\])*\]{_QUANTIFIER}?")
_GROUP = re.compile(rf"(?<!\\)\((?:[^()\\]|\\.)*\){_QUANTIFIER}?")
_SYNTAX = re.compile(rf"(?:\\.|.){_QUANTIFIER}|\\[A-Za-z]|(?<!\\)[.^$ \0]")
