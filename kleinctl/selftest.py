"""Does kleinctl work where it is installed, under the versions of its dependencies found there?

Each trial runs kleinctl as a user does, in a process of its own with an empty home, so a broken click or rich is found
by the tool and not by the user. This module imports the standard library alone, so that it runs where they are broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SCHEMA = "kleinctl.selftest/1"
#: How long one command may take, in seconds.
PATIENCE = 60.0

#: Commands that need no card, no model and no network, with the exit codes they may end with.
DOCUMENTS: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("doctor",), (0, 1)),
    (("plan", "--gpu", "RTX 4070 Ti SUPER", "--ram", "32"), (0,)),
    (("models",), (0,)),
    (("plugins",), (0,)),
    (("verify",), (0, 1)),
    (("identify", __file__), (0, 1)),
    (("explain", "wrong-vae"), (0,)),
    (("install", "--model", "klein-tiny", "--dry-run"), (0, 1)),
    (("run", ""), (2,)),
    (("serve", "--status"), (0,)),
    (("models", "--no-such-option"), (2,)),
)
#: How a command that was typed wrongly, and one that finds a problem, have to end.
EXIT_CODES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("--version",), 0),
    (("no-such-command",), 2),
    (("run", "--size", "wide", "a"), 2),
    (("explain", "no-such-problem"), 2),
    (("doctor", "--log", "no-such-file.log"), 1),
)


@dataclass(frozen=True)
class Trial:
    """One thing that was tried. `why` is what went wrong, empty where all is well."""

    name: str
    why: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it went as it should."""
        return not self.why


def run(on_trial: Callable[[Trial], None] = lambda trial: None) -> list[Trial]:
    """Try everything; `on_trial` hears of each as it ends."""
    with tempfile.TemporaryDirectory(prefix="kleinctl-selftest-") as folder, ThreadPoolExecutor(4) as pool:
        trials = []
        for trial in pool.map(_timed, *zip(*_questions(Path(folder)), strict=True)):
            trials.append(trial)
            on_trial(trial)
    return trials


def line(trial: Trial) -> str:
    """A trial as one line."""
    return f"{'ok' if trial.ok else 'FAILED':7} {trial.name}  {trial.why}".rstrip()


def document(trials: list[Trial]) -> dict[str, Any]:
    """`kleinctl.selftest/1`."""
    return {
        "schema": SCHEMA,
        "python": sys.version.split()[0],
        "versions": versions(),
        "trials": [{**vars(trial), "ok": trial.ok, "seconds": round(trial.seconds, 3)} for trial in trials],
    }


def versions() -> dict[str, str]:
    """What kleinctl stands on, and which version of each is here ("missing" where none is)."""
    found = {}
    for name in ("kleinctl", *_requirements()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _requirements() -> dict[str, str]:
    """The packages the light program requires, each with its range."""
    try:
        lines = importlib.metadata.requires("kleinctl") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return {}
    plain = [line for line in lines if "extra ==" not in line and "python_version" not in line]
    split = [line.replace(" ", "").partition(next((mark for mark in line if mark in "<>=!~"), ";")) for line in plain]
    return {name.strip(";"): mark + rest for name, mark, rest in split}


def _timed(name: str, ask: Callable[[], str]) -> Trial:
    start = time.perf_counter()
    try:
        why = ask()
    except Exception as error:  # whatever it is, the other trials still run
        why = f"{type(error).__name__}: {error}"
    return Trial(name, why.strip()[:2000], time.perf_counter() - start)


def _questions(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is tried: a name, and a function that returns what is wrong."""
    yield "versions", _wrong_versions
    yield "help", partial(_wrong_help, folder)
    for name in _commands():
        yield f"{name} --help", partial(_wrong_answer, folder, (name, "--help"), (0,), "Usage:")
    for words, codes in DOCUMENTS:
        yield f"{' '.join(words)} --json".replace(f" {__file__}", ""), partial(_wrong_document, folder, words, codes)
    for words, code in EXIT_CODES:
        yield f"exit code of {' '.join(words)}", partial(_wrong_answer, folder, words, (code,))
    yield "doctor without colour", partial(_wrong_answer, folder, ("doctor",), (0, 1), NO_COLOR="1", COLUMNS="80")
    yield "doctor on an old code page", partial(_wrong_answer, folder, ("doctor",), (0, 1), PYTHONIOENCODING="cp437")
    yield "plugins", partial(_wrong_plugins, folder)
    yield "completion", partial(_wrong_completion, folder)


def _commands() -> list[str]:
    """The names of commands, read from the source: importing it needs a click that works."""
    import ast

    tree = ast.parse(Path(__file__).with_name("cli").joinpath("__init__.py").read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "COMMANDS"]  # type: ignore[attr-defined]
    return list(ast.literal_eval(tables[0]))


def _kleinctl(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run kleinctl in a process of its own, with an empty home and without the network."""
    own = {"KLEINCTL_HOME": str(folder / "home"), "KLEINCTL_OFFLINE": "1", "PYTHONUTF8": "1", "COLUMNS": "100"}
    environ = {**os.environ, **own, **variables}
    if "PYTHONIOENCODING" in variables:
        del environ["PYTHONUTF8"]
    return subprocess.run(
        [sys.executable, "-m", "kleinctl", *words],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
    )


def _wrong_versions() -> str:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        return f"packaging cannot be imported: {error}"
    here = versions()
    wrong = [
        f"{name} is {here[name]}; wanted is {wanted}"
        for name, wanted in _requirements().items()
        if here[name] == "missing" or not SpecifierSet(wanted).contains(here[name], prereleases=True)
    ]
    return "; ".join(wrong)


def _wrong_answer(
    folder: Path, words: tuple[str, ...], codes: tuple[int, ...], text: str = "", **variables: str
) -> str:
    done = _kleinctl(folder, *words, **variables)
    if done.returncode not in codes or "Traceback" in done.stderr:
        wanted = " or ".join(map(str, codes))
        return f"exit code {done.returncode}, wanted {wanted}: {_said(done.stderr)}"
    return "" if text in done.stdout else f"no {text!r} in what it prints"


def _wrong_help(folder: Path) -> str:
    done = _kleinctl(folder, "--help")
    lacking = [name for name in _commands() if f"  {name} " not in done.stdout]
    return f"--help does not list {', '.join(lacking)}: {_said(done.stderr)}" if lacking else ""


def _wrong_document(folder: Path, words: tuple[str, ...], codes: tuple[int, ...]) -> str:
    done = _kleinctl(folder, *words, "--json")
    if done.returncode not in codes:
        return f"exit code {done.returncode}: {_said(done.stderr)}"
    try:
        said = json.loads(done.stdout)
    except ValueError:
        return f"stdout is no JSON document: {done.stdout[:80]!r}"
    return _against_schema(said)


def _against_schema(said: Mapping[str, Any]) -> str:
    import fastjsonschema

    name = str(said.get("schema", "")).removeprefix("kleinctl.").removesuffix("/1")
    schema = json.loads(Path(__file__).with_name("schemas").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    schema.pop("$id", None)  # a name, and fastjsonschema would resolve references against it
    try:
        fastjsonschema.validate(schema, said)
    except fastjsonschema.JsonSchemaException as error:
        return f"against the schema of {name}: {error}"
    return ""


def _wrong_plugins(folder: Path) -> str:
    done = _kleinctl(folder, "plugins", "--json")
    plugins = json.loads(done.stdout)["plugins"]
    broken = [f"{each['name']}: {each['problem']['what']}" for each in plugins if each.get("problem")]
    return "; ".join(broken) or ("" if plugins else "no plugin is installed")


def _wrong_completion(folder: Path) -> str:
    script = _kleinctl(folder, _KLEINCTL_COMPLETE="bash_source").stdout
    words = _kleinctl(folder, COMP_WORDS="kleinctl doc", COMP_CWORD="1", _KLEINCTL_COMPLETE="bash_complete").stdout
    if "complete" not in script:
        return "no script for bash is printed"
    return "" if "doctor" in words else f"'doc' is completed to {words.strip()!r}"


def _said(stderr: str) -> str:
    """What a command said before its hint; of a traceback the end."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("hint:")]
    return " ".join(lines[-2:]) or "nothing on stderr"


def main() -> int:
    """`python -m kleinctl.selftest`, for where the command line itself does not start."""
    trials = run(lambda trial: print(line(trial)))
    failed = [trial for trial in trials if not trial.ok]
    print(f"{len(trials) - len(failed)} passed, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
