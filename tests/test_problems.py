"""Names of problems that code, pages and tests disagree about; entries of the failure catalogue that nothing finds."""

from __future__ import annotations

import re
from functools import cache

import pytest

from kleinctl import explain
from kleinctl.checks import own_checks
from kleinctl.log_patterns import PATTERNS
from tests.conftest import REPOSITORY
from tools import refresh_docs

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
#: Names that the source makes from parts: `weights-{kind}`, `part-{status}`.
MADE = re.compile(
    r"weights-(truncated|lfs-pointer|web-page|json|zeros|empty|pickle|unreadable|other)"
    r"|part-(missing|unreadable|wrong-size|wrong-hash)"
)


@cache
def every_test() -> str:
    """The text of every test but this one."""
    files = (path for path in (REPOSITORY / "tests").rglob("*.py") if path.name not in ("test_problems.py",))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@cache
def named_in_code() -> frozenset[str]:
    """Every name a problem can have: those the source gives, and checks whose problems take the check's name."""
    import ast

    names = {pattern.name for pattern in PATTERNS}
    for path in [*(REPOSITORY / "kleinctl").rglob("*.py"), *(REPOSITORY / "plugins").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            called = getattr(getattr(node, "func", None), "id", "") or getattr(getattr(node, "func", None), "attr", "")
            if called == "Problem":
                names |= refresh_docs._problem_names(node)
    return frozenset(name for name in names if NAME.fullmatch(name))


def test_every_entry_of_the_catalogue_has_a_page_and_something_that_finds_it():
    finders = refresh_docs.found_by()
    pages = explain.pages()
    lacking = []
    for entry in refresh_docs.entries():
        ways = [way for page in pages if entry["id"] in page.refs for way in finders.get(page.name, ())]
        if not any(way.startswith(("check", "log")) for way in ways) and entry["fix"] != "none":
            lacking.append(f"{entry['id']} {entry['title']} ({entry['fix']}): {ways}")
    assert lacking == []


def test_every_name_in_the_code_has_a_page():
    assert sorted(named_in_code() - set(explain.files())) == []


def test_every_page_is_of_a_name_in_the_code():
    finders = refresh_docs.found_by()
    assert [name for name in explain.files() if name not in finders and not MADE.fullmatch(name)] == []


@pytest.mark.parametrize("page", explain.pages(), ids=lambda page: page.name)
def test_a_page_is_whole_and_its_problem_is_tested(page):
    assert page.severity in ("error", "warning")
    assert page.fix in ("auto", "ask", "guide", "none")
    assert all(page.sections[title] for title in ("Symptom", "Cause", "How it is found", "Fix"))
    known = {entry["id"] for entry in refresh_docs.entries()}
    assert set(page.refs) <= known
    named = f'"{page.name}"' in every_test() or f"[{page.name}]" in every_test()
    assert named or not page.refs or page.name in refresh_docs.GUARDED
    assert page.sections.get("Sources") or not page.refs


def test_a_check_has_a_name_of_its_own_and_says_what_holds():
    names = [check.name for check in own_checks()]
    assert len(names) == len(set(names))
    assert all(NAME.fullmatch(name) for name in names)
    assert all(check.sentence.endswith(".") for check in own_checks())
