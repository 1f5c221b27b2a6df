"""Plugins that fail, that clash, and that are written for something else."""

from __future__ import annotations

import ast
import errno
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kleinctl as public
from kleinctl import Problem, hookimpl
from kleinctl.hardware import Hardware, imagine
from kleinctl.planner import compare, default_job
from kleinctl.plugins import Plugins
from kleinctl.survey import best
from kleinctl.units import GIB

REPOSITORY = Path(__file__).parent.parent
OURS = [*(REPOSITORY / "plugins").glob("*.py"), *(REPOSITORY / "docs/example-plugin").glob("*.py")]
DESCRIBED = (REPOSITORY / "docs/plugins.md").read_text(encoding="utf-8")

BACKEND = """
from kleinctl import hookimpl
kleinctl_api = 1

class Backend:
    name, aliases, requires, layout = {name!r}, {aliases!r}, (), "none"
    def fit(self, model, hardware, job): raise AssertionError
    def health(self, hardware, environment): return None
    def load(self, model, budget): raise AssertionError

@hookimpl
def kleinctl_backends():
    return [Backend()]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of installed packages that this process sees too. `add(distribution, plugin, source)` installs one."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def add(distribution: str, plugin: str, source: str) -> None:
        module = distribution.replace("-", "_")
        sys.modules.pop(module, None)  # of another test
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kleinctl]\n{plugin} = {module}\n")

    return add


def test_a_plugin_that_crashes_on_import_is_one_problem_and_doctor_goes_on(site, kleinctl):
    site("broken-plugin", "broken", "import does_not_exist")
    answer = kleinctl("doctor", "--json")
    assert answer.exit_code == 0, answer.stderr  # a warning alone
    [problem] = [p for p in json.loads(answer.stdout)["problems"] if p["name"] == "plugin-failed"]
    assert problem["what"] == "plugin broken does not start"
    assert problem["why"] == "ModuleNotFoundError: No module named 'does_not_exist'"
    assert problem["fix"] == "kleinctl plugins --disable broken"


def test_a_plugin_that_calls_exit_on_import_does_not_end_kleinctl(site):
    site("exiting-plugin", "exiting", "raise SystemExit(7)")
    plugins = Plugins(frozenset())
    assert "staged-decode" in plugins.backends
    assert [p.what for p in plugins.problems] == ["plugin exiting does not start"]


def test_a_plugin_that_raises_in_a_hook(site):
    site(
        "raising-plugin",
        "raising",
        "from kleinctl import hookimpl\nkleinctl_api = 1\n\n@hookimpl\ndef kleinctl_backends():\n    return 1 / 0\n",
    )
    plugins = Plugins(frozenset())
    assert {"diffusers-offload", "staged-decode"} <= set(plugins.backends)
    [problem] = plugins.problems
    assert (problem.what, problem.why) == (
        "plugin raising failed in kleinctl_backends",
        "ZeroDivisionError: division by zero",
    )


HOOK = """
from pathlib import Path
from kleinctl import LogPattern, Problem, Signature, hookimpl
kleinctl_api = 1

def card_is_fast(hardware):
    "The card is fast."

class Backend:
    name, aliases, requires, layout = "mine", (), (), "none"
    def fit(self, model, hardware, job): raise AssertionError
    def health(self, hardware, environment): return None
    def load(self, model, budget): raise AssertionError

class Nicknamed(Backend):
    aliases = ("blue")

class Needing(Backend):
    requires = ("pillow")

class Unnamed(Backend):
    aliases = None

@hookimpl
def {hook}():
    {body}
"""


@pytest.mark.parametrize(
    ("hook", "body", "why"),
    [
        ("kleinctl_backends", "raise SystemExit(3)", "SystemExit: 3"),
        ("kleinctl_backends", "[Backend()]", "TypeError: it returned None, and a list is wanted"),
        ("kleinctl_backends", "return [Backend]", "It is the class Backend; wanted is an instance: Backend()."),
        ("kleinctl_backends", "return [Nicknamed()]", 'aliases is the text "blue"; wanted is a tuple: ("blue",).'),
        ("kleinctl_backends", "return [Needing()]", 'requires is the text "pillow"; wanted is a tuple: ("pillow",).'),
        ("kleinctl_backends", "return [Unnamed()]", "aliases is None; wanted is a tuple of texts."),
        ("kleinctl_manifests", "return 'my.toml'", "TypeError: it returned 'my.toml', and a list is wanted"),
        ("kleinctl_manifests", "return [None]", "Wanted is a pathlib.Path; this is None."),
        (
            "kleinctl_checks",
            "return [card_is_fast]",
            'Wanted is a function with @check("a-name") above it; this is <fun',
        ),
        ("kleinctl_signatures", "return ['vae']", "Wanted is a Signature; this is 'vae'."),
        ("kleinctl_log_patterns", "return ['oops']", "Wanted is a LogPattern; this is 'oops'."),
        (
            "kleinctl_log_patterns",
            "return [LogPattern('mine', 'No module (', Problem('a', 'b', 'c'))]",
            "mine is no regular expression: missing ), unterminated subpattern",
        ),
        ("kleinctl_problem_pages", "return ['mine.md']", "Wanted is a pathlib.Path; this is 'mine.md'."),
        (
            "kleinctl_problem_pages",
            "return [Path('/nowhere/mine.md')]",
            f"{Path('/nowhere/mine.md')} cannot be read: No such file or directory.",
        ),
        ("kleinctl_problem_pages", "return [Path(__file__)]", "does not start with a head and a title."),
        ("kleinctl_executors", "return ['here']", "Wanted is an executor with a name; this is 'here'."),
    ],
)
def test_a_plugin_that_offers_what_cannot_be_used_is_one_problem(site, hook, body, why):
    site("odd-plugin", "odd", HOOK.format(hook=hook, body=body))
    plugins = Plugins(frozenset())
    [state] = [each for each in plugins.overview() if each.name == "odd"]
    [problem] = plugins.problems
    assert state.problem == problem
    assert problem.name == "plugin-failed"
    assert why in problem.why
    assert "staged-decode" in plugins.backends


def test_doctor_goes_on_beside_a_check_that_is_none(site, kleinctl):
    site("odd-plugin", "odd", HOOK.format(hook="kleinctl_checks", body="return [card_is_fast]"))
    answer = kleinctl("doctor", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert "plugin-failed" in [problem["name"] for problem in json.loads(answer.stdout)["problems"]]


def test_pages_and_signatures_of_a_plugin_are_listed(site, kleinctl):
    page = REPOSITORY / "docs/problems/wrong-vae.md"
    offered = 'return [Signature("vae", "my-vae", "diffusers", {"decoder.conv_in.weight": (512, 24, 3, 3)}, "24")]'
    pages = f"\n\n@hookimpl\ndef kleinctl_problem_pages():\n    return [Path({str(page)!r})]\n"
    site("seeing-plugin", "seeing", HOOK.format(hook="kleinctl_signatures", body=offered) + pages)
    [row] = [each for each in json.loads(kleinctl("plugins", "--json").stdout)["plugins"] if each["name"] == "seeing"]
    assert row["offers"] == {"kleinctl_signatures": ["my-vae"], "kleinctl_problem_pages": ["wrong-vae"]}


def test_a_plugin_for_another_api(site):
    site("future-plugin", "future", "kleinctl_api = 2")
    plugins = Plugins(frozenset())
    _ = plugins.backends
    [problem] = plugins.problems
    assert problem.why == "This kleinctl offers version 1; `kleinctl_api` in future_plugin says 2."


def test_a_misspelled_hook_is_reported(site):
    site(
        "typo-plugin",
        "typo",
        "from kleinctl import hookimpl\nkleinctl_api = 1\n\n@hookimpl\ndef kleinctl_backend():\n    return []\n",
    )
    plugins = Plugins(frozenset())
    assert "staged-decode" in plugins.backends
    [problem] = plugins.problems
    assert problem.what == "plugin typo implements a hook that does not exist"
    assert "kleinctl_backend" in problem.why


def test_two_plugins_with_one_name(site):
    site("other-staged", "staged-decode", "kleinctl_api = 1")
    plugins = Plugins(frozenset())
    assert plugins.backend("staged").thing.name == "staged-decode"
    [problem] = plugins.problems
    assert problem.what == "two plugins are named staged-decode"
    assert problem.fix == "pip uninstall other-staged"


def test_two_backends_with_one_alias(site):
    site("alias-plugin", "alias", BACKEND.format(name="mine", aliases=("staged",)))
    plugins = Plugins(frozenset())
    assert "mine" not in plugins.backends
    assert [p.what for p in plugins.problems] == ["plugin alias offers a second backend named staged"]


def test_a_disabled_plugin_stays_disabled_until_it_is_enabled(site, kleinctl):
    site("extra-plugin", "extra", BACKEND.format(name="extra", aliases=()))
    assert "extra" in Plugins(frozenset()).backends
    assert kleinctl("plugins", "--disable", "extra").exit_code == 0
    state = {row["name"]: row for row in json.loads(kleinctl("plugins", "--json").stdout)["plugins"]}
    assert state["extra"]["disabled"]
    assert state["extra"]["offers"] == {}
    kleinctl("plugins", "--enable", "extra")
    state = {row["name"]: row for row in json.loads(kleinctl("plugins", "--json").stdout)["plugins"]}
    assert state["extra"]["offers"]["kleinctl_backends"] == ["extra"]


def test_a_plugin_that_was_disabled_and_then_uninstalled(site, kleinctl):
    """Its name is off still, and the fix that doctor names takes it away."""
    from kleinctl.home import disabled_file

    disabled_file().parent.mkdir(parents=True, exist_ok=True)
    disabled_file().write_text("gone\nmy plugin\n", encoding="utf-8")
    fixes = {problem["fix"] for problem in json.loads(kleinctl("doctor", "--json").stdout)["problems"]}
    assert {"kleinctl plugins --enable gone", "kleinctl plugins --enable 'my plugin'"} <= fixes
    assert kleinctl("plugins", "--enable", "gone").exit_code == 0
    assert kleinctl("plugins", "--enable", "my plugin").exit_code == 0
    assert "unknown-plugin" not in kleinctl("plugins").stderr
    assert kleinctl("plugins", "--enable", "gone").exit_code == 2


@pytest.mark.parametrize("text", ["\ufeffextra\r\n".encode(), b"extra \n"])
def test_the_list_of_disabled_plugins_edited_by_hand(site, kleinctl, text):
    from kleinctl.home import disabled_file

    site("extra-plugin", "extra", BACKEND.format(name="extra", aliases=()))
    disabled_file().parent.mkdir(parents=True, exist_ok=True)
    disabled_file().write_bytes(text)
    answer = kleinctl("plugins", "--json")
    assert [row["name"] for row in json.loads(answer.stdout)["plugins"] if row["disabled"]] == ["extra"]


def test_a_list_of_disabled_plugins_that_is_no_text_takes_nothing_down(kleinctl):
    from kleinctl.home import disabled_file

    disabled_file().parent.mkdir(parents=True, exist_ok=True)
    disabled_file().write_bytes("staged-decode\n".encode("utf-16"))
    assert kleinctl("plugins").exit_code == 0


def test_a_plugin_stays_disabled_where_the_disk_is_full(site, monkeypatch):
    from kleinctl import KleinctlError
    from kleinctl.plugins import disabled_names, switch

    switch("one", on=False)

    def full(path: Path, *arguments: object, **options: object) -> None:
        path.touch()  # as `open` leaves it
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(KleinctlError):
            switch("two", on=False)
    assert disabled_names() == {"one"}


def test_disabling_for_one_command_changes_nothing_for_the_next(kleinctl):
    first = json.loads(kleinctl("--disable", "staged-decode", "plan", "--gpu", "RTX 4090", "--json").stdout)
    assert {row["backend"] for row in first["rows"]} == {"comfyui-fp8", "diffusers-offload"}
    second = json.loads(kleinctl("plan", "--gpu", "RTX 4090", "--json").stdout)
    assert {row["backend"] for row in second["rows"]} == {"comfyui-fp8", "diffusers-offload", "staged-decode"}


def test_disabling_a_plugin_that_is_not_there_names_the_nearest(kleinctl):
    answer = kleinctl("plugins", "--disable", "staged-decoder")
    assert answer.exit_code == 2
    assert "Did you mean staged-decode?" in answer.stderr


def test_an_executor_and_log_patterns_of_a_plugin_are_used(site):
    from kleinctl import road
    from kleinctl.problem import Misuse

    site(
        "place-plugin",
        "place",
        "from kleinctl import LogPattern, Problem, hookimpl\nkleinctl_api = 1\n\n"
        "class Elsewhere:\n    name = 'elsewhere'\n\n"
        "@hookimpl\ndef kleinctl_executors():\n    return [Elsewhere()]\n\n"
        "@hookimpl\ndef kleinctl_log_patterns():\n"
        "    return [LogPattern('mine', 'it broke', Problem('it broke', 'It does.', 'mend it'))]\n",
    )
    plugins = Plugins(frozenset())
    assert road.executor(plugins, "elsewhere").name == "elsewhere"
    assert "mine" in [pattern.name for pattern in road.executor(plugins, None).patterns]
    with pytest.raises(Misuse) as caught:
        road.executor(plugins, "elsewere")
    assert "Did you mean elsewhere?" in caught.value.problem.why


def test_every_hook_has_an_example():
    from kleinctl import hookspecs

    hooks = [function for name, function in vars(hookspecs).items() if name.startswith("kleinctl_")]
    assert len(hooks) == 7
    assert all("Example::" in function.__doc__ and "@hookimpl" in function.__doc__ for function in hooks)


def test_a_problem_offered_by_a_plugin_check_reaches_doctor(site, kleinctl):
    site(
        "check-plugin",
        "checking",
        "from kleinctl import Problem, check, hookimpl\nkleinctl_api = 1\n\n"
        '@check("always-wrong")\ndef always_wrong(hardware):\n    """Never holds."""\n'
        '    return Problem("it is wrong", "It always is.", "do nothing")\n\n'
        '@check("crashes")\ndef crashes(hardware):\n    """Crashes."""\n    raise ValueError("oops")\n\n'
        "@hookimpl\ndef kleinctl_checks():\n    return [always_wrong, crashes]\n",
    )
    answer = kleinctl("doctor", "--json")
    document = json.loads(answer.stdout)
    assert answer.exit_code == 1
    assert "it is wrong" in [p["what"] for p in document["problems"] if p["name"] == "always-wrong"]
    [crashed] = [c for c in document["checks"] if c["name"] == "crashes"]
    assert (crashed["status"], crashed["why"]) == ("skipped", "The check crashed: ValueError: oops")


def test_the_check_in_the_docs_runs_and_its_facts_are_those_there_are(site, kleinctl):
    from kleinctl.checks import own_checks
    from kleinctl.survey import OF_A_JOB

    section = DESCRIBED.split("## A check\n")[1].split("\n## ")[0]
    site("small-plugin", "small", section.split("```python\n")[1].split("```")[0])
    row = next(c for c in json.loads(kleinctl("doctor", "--json").stdout)["checks"] if c["name"] == "card-small")
    assert (row["status"], row["why"]) == ("skipped", "There is no card.")
    [offer] = Plugins(frozenset()).offers("kleinctl_checks")
    small = offer.thing.function(imagine("RTX 3050 6GB Laptop GPU", 16 * GIB))
    assert (small.what, small.why) == ("the card is small", "Wanted are more than 6 GiB; it has 6.0.")
    assert offer.thing.function(imagine("RTX 4090", 16 * GIB)) is None
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))
    asked = {want for each in own_checks() if not OF_A_JOB & set(each.wants) for want in each.wants}
    assert described == asked


# What strangers may import


def test_public_names_are_all_there_and_described():
    assert all(getattr(public, name) is not None for name in public.__all__)
    assert hookimpl is public.hookimpl
    assert Problem is public.Problem
    assert [name for name in public.__all__ if f"`{name}`" not in DESCRIBED] == []


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_a_plugin_of_ours_uses_only_what_strangers_may(path):
    """When it needs something private, the public interface is missing something."""
    assert private(path.read_text(encoding="utf-8")) == []


def private(source: str) -> list[str]:
    """What of a plugin's source reaches past the names that docs/plugins.md describes."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "kleinctl"]
    names = {each.name for node in imports for each in node.names}
    modules = {name for name in names & set(public.__all__) if isinstance(getattr(public, name), ModuleType)}
    found = names - set(public.__all__)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names if re.match(r"kleinctl(\.|$)", each.name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if (node.module or "").startswith("kleinctl.") else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # for importlib
            found |= {node.value} if re.fullmatch(r"kleinctl(\.\w+)+", node.value) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            name = f"{node.value.id}.{node.attr}"
            described = f"`{name}" in DESCRIBED or (node.value.id == "memory" and not node.attr.startswith("_"))
            found |= set() if described else {name}
    return sorted(found)


@pytest.mark.parametrize(
    "line",
    [
        *("import kleinctl", "import kleinctl.home", "from kleinctl.home import home", "from kleinctl import store"),
        *("def f():\n    from kleinctl.facts import comfyui", "importlib.import_module('kleinctl.logs')"),
        "from kleinctl import comfyui\ncomfyui.record.remember(checkout)",
    ],
)
def test_every_way_past_the_public_interface_is_seen(line):
    assert private(line) != []


# What a backend looks for beside hardware and packages


def test_a_program_is_looked_for_on_the_machine_in_question_alone(tmp_path):
    """What is installed here says nothing of the machine of a report, or of one that is imagined."""
    from kleinctl.comfyui import Checkout, record

    plugins = Plugins(frozenset())
    klein, machine = plugins.model("klein-4b"), imagine("RTX 4090", 64 * GIB)

    def verdict(here: bool) -> str | None:
        offers = [plugins.backend("comfyui-fp8")]
        [candidate] = compare(offers, klein, machine, default_job(klein), [], here=here)
        return candidate.why_not

    assert "ComfyUI is not installed" in (verdict(here=True) or "")
    unknown = verdict(here=False) or ""
    assert unknown.startswith("comfyui-fp8 could not be checked: ")
    (tmp_path / "main.py").touch()
    record.remember(Checkout(tmp_path, tmp_path / "main.py", owned=True))
    assert (verdict(here=True), verdict(here=False)) == (None, unknown)


@pytest.mark.parametrize(
    ("method", "answer", "why"),
    [
        ("health", "it is broken", "its health() returned str, and not Problem"),
        ("absent", ["a program"], "its absent() returned list, and not Problem"),
        ("fit", 8 * GIB, "int"),
    ],
)
def test_a_backend_that_answers_something_odd_cannot_take_doctor_down(monkeypatch, method, answer, why):
    plugins = Plugins(frozenset())
    offer, klein = plugins.backend("staged-decode"), plugins.model("klein-tiny")
    monkeypatch.setattr(type(offer.thing), method, lambda *given: answer, raising=False)
    [candidate] = compare([offer], klein, Hardware(), default_job(klein), [], here=True)
    assert candidate.problem and candidate.problem.name == "plugin-failed" and why in candidate.problem.why
    assert not candidate.runs


def test_what_could_not_be_checked_is_not_chosen():
    plugins = Plugins(frozenset())
    machine = imagine("RTX 4070 Ti SUPER", 32 * GIB)
    found, choice = best(list(plugins.backends.values()), [plugins.model("klein-4b")], machine, {}, [], here=False)
    assert choice.candidate.backend != "comfyui-fp8"
    assert all(each.fit.fits for each in found if each.backend == "comfyui-fp8"), "its figures are told"
