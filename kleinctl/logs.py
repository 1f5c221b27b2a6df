"""What a log says went wrong: patterns, the problem that each proves, and the line that proves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kleinctl.problem import Problem

#: Only the end of a log is read: 4 Mi characters. Longer lines are cut there.
MAX_CHARACTERS, MAX_LINE = 2**22, 2000

_ANSI = re.compile(r"\x1b\[[0-9;?]{0,20}[A-Za-z]|\x1b\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)")


@dataclass(frozen=True)
class LogPattern:
    """A regular expression and the problem that a log with such a text has.

    A space in `regex` stands for any white space, since terminals and web pages wrap lines; `.` ends at the line.
    `problem` may be a function of the match that returns the problem, or None when it proves nothing after all.
    Repetition has to be bounded (`.{0,99}` rather than `.*`): logs come from strangers.
    """

    name: str
    regex: str
    problem: Problem | Callable[[re.Match[str]], Problem | None]

    def explain(self, match: re.Match[str]) -> Problem | None:
        """The problem that `match` proves, with the pattern's name if it has none."""
        problem = self.problem(match) if callable(self.problem) else self.problem
        return problem and replace(problem, name=problem.name or self.name)


@dataclass(frozen=True)
class Match:
    """A problem, and the line of the log that proves it, counted from 1."""

    problem: Problem
    line: str
    number: int


def explain(text: str, patterns: Sequence[LogPattern] | None = None) -> list[Match]:
    """What the log `text` proves, the best match first; empty for a healthy log.

    Errors come before warnings, then patterns in their order, for the particular ones stand before the general. Each
    pattern is told once, at its last match, and a line is explained by the first pattern that knows it.
    """
    lines = readable(text)
    log = "\n".join(lines)
    starts = _starts(lines)
    found: list[Match] = []
    taken: set[int] = set()
    for pattern in PATTERNS if patterns is None else patterns:
        for match in reversed(list(_compiled(pattern.regex).finditer(log))):
            number = _line_at(starts, match.start())
            problem = None if number in taken else pattern.explain(match)
            if problem is not None:
                taken.add(number)
                found.append(Match(problem, lines[number].strip()[:300], number + 1))
                break
    return sorted(found, key=lambda match: match.problem.severity == "warning")


def readable(text: str) -> list[str]:
    """The lines of a log without colours, bare of what a progress bar has overwritten, each of bounded length."""
    lines = _ANSI.sub("", text[-MAX_CHARACTERS:]).split("\n")
    return [line.rstrip("\r").rsplit("\r", 1)[-1][:MAX_LINE] for line in lines]


@lru_cache(maxsize=512)
def _compiled(regex: str) -> re.Pattern[str]:
    return re.compile(regex.replace(" ", r"\s+"), re.MULTILINE)


def _starts(lines: Iterable[str]) -> list[int]:
    starts, position = [], 0
    for line in lines:
        starts.append(position)
        position += len(line) + 1
    return starts


def _line_at(starts: Sequence[int], position: int) -> int:
    import bisect

    return bisect.bisect_right(starts, position) - 1


# What a matrix product's operands tell (FAILURES.md 0.2). The left one's width is that of the text encoder's output.

_ENCODERS = {
    7680: "Qwen3 4B",
    12288: "Qwen3 8B",
    15360: "Mistral Small, which belongs to FLUX.2 dev",
    2560: "Qwen3 4B, read from one layer instead of three",
    4096: "T5-XXL, which belongs to FLUX.1",
    5120: "Mistral Small, read from one layer",
    768: "CLIP-L, which belongs to FLUX.1",
}
_WANTED = {
    (7680, 3072): "klein 4B takes 7680 numbers a token, those of Qwen3 4B",
    (12288, 4096): "klein 9B takes 12288 numbers a token, those of Qwen3 8B",
    (15360, 6144): "FLUX.2 dev takes 15360 numbers a token, those of Mistral Small",
    (4096, 3072): "FLUX.1 takes 4096 numbers a token, those of T5-XXL",
}
_ENCODER_REFS = {
    (12288, 7680): "C01",
    (15360, 7680): "C02",
    (2560, 7680): "C03",
    (2560, 12288): "C03",
    (4096, 7680): "C04",
    (7680, 12288): "C05",
}


def _shapes(match: re.Match[str]) -> Problem | None:
    given, rows, columns = int(match["given"]), int(match["rows"]), int(match["columns"])
    if (rows, columns) in _WANTED:
        return Problem(
            "the text encoder does not fit the transformer",
            f"{_WANTED[rows, columns]}; it was given {given}, those of {_ENCODERS.get(given, 'another encoder')}.",
            "kleinctl doctor",
            name="text-encoder-width",
            ref=_ENCODER_REFS.get((given, rows)),
        )
    if columns == 3072 and rows in (64, 128):
        return Problem(
            "the VAE or the empty latent does not fit the transformer",
            f"The transformer takes {rows} numbers an image token; it was given {given}.",
            "kleinctl doctor",
            name="vae-mismatch",
            ref="C10",
        )
    if (given, rows, columns) == (2560, 4096, 2560):
        return Problem(
            "the text encoder is Qwen3-VL",
            "klein needs the text-only Qwen3 4B; the picture-reading Qwen3-VL 4B has layers of another shape.",
            "kleinctl doctor",
            name="text-encoder-vl",
            ref="C06",
        )
    return None


def _missing_module(match: re.Match[str]) -> Problem:
    return Problem(
        f"the Python package {match['module']} is missing",
        f"A backend needs {match['module']}, and the Python that runs it does not have it.",
        "kleinctl install",
        name="module-missing",
        ref="A32",
    )


def _out_of_vram(match: re.Match[str]) -> Problem:
    wanted = match["wanted"]
    return Problem(
        "the card's memory ran out",
        (f"Another {wanted} was wanted, and " if wanted else "There was ")
        + "no room for it within the limit of this job and what other programs have taken.",
        "kleinctl plan",
        ref="D01",
    )


def _damaged(why: str, ref: str) -> Problem:
    return Problem("a weights file is damaged", why, "kleinctl verify", ref=ref)


#: What ends a worker. Particular texts before general ones.
PATTERNS: tuple[LogPattern, ...] = (
    LogPattern(
        "shapes-do-not-fit",
        r"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied "
        r"\(\d{1,9}x(?P<given>\d{1,9}) and (?P<rows>\d{1,9})x(?P<columns>\d{1,9})\)",
        _shapes,
    ),
    LogPattern(
        "weights-truncated",
        r"MetadataIncompleteBuffer|incomplete metadata, file not fully covered|InvalidHeaderLength"
        r"|invalid header length",
        _damaged("The safetensors file is shorter or longer than its header says: a download was cut off.", "B02"),
    ),
    LogPattern(
        "weights-not-safetensors",
        r"HeaderTooLarge|header too large",
        _damaged("It is no safetensors file, but a Git LFS pointer, a web page or another format.", "B03"),
    ),
    LogPattern(
        "weights-empty",
        r"HeaderTooSmall|header too small|InvalidHeaderDeserialization|invalid JSON in header",
        _damaged("The file is empty, or was set aside by a downloader and never filled.", "B04"),
    ),
    LogPattern(
        "disk-full",
        r"\[Errno 28\]|No space left on device|WinError 112\b",
        Problem("the disk is full", "A file could not be written to its end.", "kleinctl doctor", ref="B06"),
    ),
    LogPattern(
        "driver-too-old",
        r"NVIDIA driver on your system is too old",
        Problem(
            "the NVIDIA driver is too old for this torch",
            "The installed build of torch needs a newer driver than this machine has.",
            "kleinctl doctor",
            ref="A01",
        ),
    ),
    LogPattern(
        "torch-without-cuda",
        r"Torch not compiled with CUDA enabled",
        Problem(
            "torch was installed without CUDA",
            "A build of torch for processors alone is installed; it cannot use the card.",
            "kleinctl install",
            ref="A02",
        ),
    ),
    LogPattern(
        "torch-lacks-card",
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation",
        Problem(
            "torch has no code for this card",
            "The installed build of torch was made for other generations of cards.",
            "kleinctl install",
            ref="A03",
        ),
    ),
    LogPattern(
        "no-driver",
        r"Found no NVIDIA driver on your system|libcuda\.so\.1: cannot open shared object file",
        Problem("no NVIDIA driver was found", "torch asked for one, to use the card.", "kleinctl doctor", ref="A13"),
    ),
    LogPattern(
        "cuda-gone",
        r"CUDA unknown error - this may be due to an incorrectly set up environment",
        Problem(
            "CUDA does not start",
            "The card is visible, but its driver answers with an error, as after sleep or an unfinished update.",
            "restart the machine, then: kleinctl doctor",
            ref="A12",
        ),
    ),
    LogPattern(
        "page-file-too-small",
        r"os error 1455|WinError 1455|paging file is too small",
        Problem(
            "Windows has no memory left to promise",
            "Its paging file is too small (or fixed, or on a full drive) for what the model needs.",
            "let Windows manage the paging file's size, restart, then: kleinctl doctor",
            ref="A08",
        ),
    ),
    LogPattern(
        "vc-runtime-missing",
        r"WinError 126\b|WinError 1114\b",
        Problem(
            "a library of torch cannot be loaded",
            "The Microsoft Visual C++ runtime is missing or too old.",
            "winget install Microsoft.VCRedist.2015+.x64",
            ref="A20",
        ),
    ),
    LogPattern(
        "diffusers-too-old",
        r"cannot import name 'Flux2(?:Klein)?Pipeline'",
        Problem(
            "diffusers is too old",
            "FLUX.2 [klein] needs diffusers 0.37.0 or newer.",
            "kleinctl install",
            ref="A24",
        ),
    ),
    LogPattern(
        "accelerate-missing",
        r"requires `accelerate v",
        Problem("accelerate is missing", "diffusers needs it to offload a model.", "kleinctl install", ref="A28"),
    ),
    LogPattern("module-missing", r"No module named '(?P<module>[\w.]{1,100})'", _missing_module),
    LogPattern(
        "card-memory-full",
        r"(?:CUDA out of memory|Allocation on device|torch\.(?:cuda\.)?OutOfMemoryError)"
        r"(?:\. Tried to allocate (?P<wanted>[\d.]{1,9} [KMGT]iB))?",
        _out_of_vram,
    ),
    LogPattern(
        "memory-full",
        r"\bMemoryError\b|DefaultCPUAllocator: (?:can't allocate|not enough) memory|fatal : Memory allocation failure"
        r"|^Killed$|Out of memory: Killed process|std::bad_alloc",
        Problem(
            "the machine's memory (RAM) ran out",
            "A part of the model did not fit into what was free.",
            "kleinctl plan",
            ref="D03",
        ),
    ),
)
