"""The pages about problems: one text file each, in docs/problems, which is installed with kleinctl."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kleinctl.problem import Misuse, Problem, did_you_mean

SCHEMA = "kleinctl.explain/1"
SECTIONS = ("Symptom", "Cause", "How it is found", "Fix", "Sources")
#: A page is a few thousand characters; those of plugins come from strangers.
MAX_PAGE = 2**16


@dataclass(frozen=True)
class Page:
    """What is known of a problem: entries of the failure catalogue, who can fix it, and the text by section.

    `fix` is `auto` (`doctor --fix` does it), `ask` (after asking), `guide` (people do it) or `none`. `words` are what
    people search for.
    """

    name: str
    title: str
    refs: tuple[str, ...]
    severity: str
    fix: str
    words: str
    sections: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """One of `pages` in `kleinctl.explain/1`."""
        return {**vars(self), "refs": list(self.refs), "sections": dict(self.sections)}


def parse(name: str, text: str) -> Page:
    """The page in a text file.

    Raises:
        ValueError: it has no head, no title, or lacks a section.
    """
    match = re.match(r"---\n((?:\w+:.*\n)+)---\n+# (.+)\n", text[:MAX_PAGE])
    if match is None:
        raise ValueError(f"the page of {name} does not start with a head and a title")
    head = dict(re.findall(r"^(\w+): *(.*)$", match[1], re.MULTILINE))
    found = re.split(r"^## (.+)$", text[match.end() : MAX_PAGE], flags=re.MULTILINE)
    sections = {title.strip(): body.strip() for title, body in zip(found[1::2], found[2::2], strict=True)}
    lacking = [title for title in SECTIONS if title not in sections and title != "Sources"]
    if lacking:
        raise ValueError(f"the page of {name} lacks {', '.join(lacking)}")
    refs = tuple(re.findall(r"[A-Z]\d\d", head.get("refs", "")))
    severity, fix, words = (head.get(key, "").strip() for key in ("severity", "fix", "words"))
    return Page(name, match[2].strip(), refs, severity, fix, words, sections)


@cache
def folder() -> Path:
    """Where kleinctl's own pages lie: installed as a package, or in the source tree."""
    import importlib.util

    spec = importlib.util.find_spec("kleinctl_problems")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else Path(__file__).parent.parent / "docs" / "problems"


def files(theirs: Iterable[Path] = ()) -> dict[str, Path]:
    """The page of each problem, by name; `theirs` are those of plugins."""
    own = (path for path in sorted(folder().glob("*.md")) if path.name != "README.md")
    return {path.stem: path for path in (*theirs, *own)}


def read(path: Path) -> Page:
    """The page in the file at `path`.

    Raises:
        ValueError: it is not as a page should be.
    """
    return parse(path.stem, path.read_text(encoding="utf-8"))


def pages(theirs: Iterable[Path] = ()) -> list[Page]:
    """Every page."""
    return [read(path) for path in files(theirs).values()]


def page(name: str, theirs: Iterable[Path] = ()) -> Page:
    """The page of a problem, by its name or an entry of the failure catalogue (`C09`).

    Raises:
        Misuse: there is none.
    """
    known = files(theirs)
    if name in known:
        return read(known[name])
    meant = [each for each in pages(theirs) if name.upper() in each.refs]
    if meant:
        return meant[0]
    near = did_you_mean(name, known) or f" {len(known)} are known."
    raise Misuse(
        Problem(
            f"there is no problem {name!r}",
            f"No page has that name.{near}",
            f'kleinctl explain --search "{name}"',
            name="unknown-problem",
        )
    )


#: Words that mean the same here, and endings that make no difference: what is said is not said in our words.
SAME = {
    **dict.fromkeys(("image", "photo", "photos", "img"), "picture"),
    **dict.fromkeys(("gpu", "graphics", "videocard"), "card"),
    **dict.fromkeys(("color", "colors", "colours"), "colour"),
    **dict.fromkeys(("gray", "greyish"), "grey"),
    **dict.fromkeys(("login", "signin"), "token"),
    **dict.fromkeys(("hang", "hangs", "hanging", "frozen", "freezes", "freeze"), "stuck"),
    **dict.fromkeys(("loras",), "lora"),
}
#: Words that say nothing of a symptom.
IDLE = " a an and are be but does do for get have how in is it its my of on or so that the this to very why with "
_ENDING = re.compile(r"(?<=\w{4})(?:ing|ed|es|er|s|y|e)$")


def search(words: str, among: Sequence[Page]) -> list[Page]:
    """The pages that have the words, best first.

    Rare words count more than common ones, and those in name, title and search words more than those in the text.
    """
    phrase = " ".join(words.lower().split())
    wanted = dict.fromkeys(_terms(words))
    told = [_terms(f"{each.name} {each.title} {each.words}") for each in among]
    rest = [_terms(" ".join(each.sections.values())) for each in among]
    found = list(zip(told, rest, strict=True))
    weight = {
        word: math.log((1 + len(among)) / (1 + sum(word in head or word in body for head, body in found)))
        for word in wanted
    }
    whole = sum(weight.values()) or 1

    def score(each: Page, head: set[str], body: set[str]) -> float:
        hits = [weight[word] * (3 * (word in head) + (word in body)) for word in wanted]
        met = sum(weight[word] for word in wanted if word in head or word in body) / whole
        title = f"{each.name.replace('-', ' ')} {each.title} {each.words}"
        said = 12 * _has(title, phrase) + 6 * _has(" ".join(each.sections.values()), phrase)
        return sum(hits) * met**2 + said

    ranked = sorted(
        ((score(*each), each[0]) for each in zip(among, told, rest, strict=True)), key=lambda pair: -pair[0]
    )
    best = ranked[0][0] if ranked else 0
    return [each for value, each in ranked if value > 0 and value >= best / 4][:10]


def _has(text: str, phrase: str) -> bool:
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase)}", " ".join(text.lower().split())) is not None


def _terms(text: str) -> set[str]:
    """The words of a text, without what makes no difference."""
    bare = text.lower().replace("over-", "over")
    words = (SAME.get(word, word) for word in re.findall(r"[^\W_]+", bare) if len(word) > 1 and f" {word} " not in IDLE)
    return {_ENDING.sub("", word) for word in words}
