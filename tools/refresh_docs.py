"""Write the generated parts of the documents: README's commands, the table of docs/problems/README.md.

    python tools/refresh_docs.py [--check]

With `--check` nothing is written, and the exit code is 1 where a document differs.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROBLEMS = ROOT / "docs" / "problems"
#: Problems that only another program can have; what keeps kleinctl from having them.
GUARDED = {"embeddings-differ": "`tests/test_backends.py`, bit for bit against diffusers"}


def commands() -> str:
    """The table of commands."""
    from kleinctl.cli import COMMANDS

    rows = [f"| `kleinctl {name}` | {line} |" for name, line in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def checks() -> str:
    """The checks by name, each with the sentence that holds when all is well."""
    from kleinctl.checks import own_checks

    rows = [f"| `{check.name}` | {check.sentence} |" for check in own_checks()]
    return "\n".join(["| check | what holds when all is well |", "|---|---|", *rows])


def entries() -> list[dict[str, str]]:
    """The failure catalogue: `id`, `fix` (who can fix it) and `title` of each entry."""
    with (PROBLEMS / "entries.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def covered() -> str:
    """Every entry of the failure catalogue with the problems that stand for it, and what finds each."""
    from kleinctl import explain

    finders = found_by()
    rows = []
    for entry in entries():
        pages = [page for page in explain.pages() if entry["id"] in page.refs]
        names = "<br>".join(f"[{page.name}]({page.name}.md)" for page in pages)
        ways = "<br>".join(", ".join(finders.get(page.name, [])) for page in pages)
        rows.append(f"| {entry['id']} | {entry['title'].replace('|', '/')} | {names} | {ways} |")
    return "\n".join(["| entry | failure | problem | found by |", "|---|---|---|---|", *rows])


def others() -> str:
    """The problems that stand for no entry: what kleinctl itself refuses or fails at."""
    from kleinctl import explain

    finders = found_by()
    pages = [page for page in explain.pages() if not page.refs]
    rows = [
        f"| [{page.name}]({page.name}.md) | {page.title} | {', '.join(finders.get(page.name, []))} |" for page in pages
    ]
    return "\n".join(["| problem | what it says | found by |", "|---|---|---|", *rows])


def found_by() -> dict[str, list[str]]:
    """What finds each problem: names of checks, `log`, and modules of kleinctl. Read from the source."""
    finders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "kleinctl").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for name, words in _finders(path, where):
            for word in sorted(words & _known()):
                ways = finders.setdefault(word, [])
                if name not in ways:
                    ways.append(name)
    for name, guard in GUARDED.items():
        finders.setdefault(name, []).append(guard)
    for path in sorted((ROOT / "plugins").glob("*.py")):
        for word in sorted(_strings(ast.parse(path.read_text(encoding="utf-8"))) & _known()):
            finders.setdefault(word, []).append(f"`plugins/{path.name}`")
    return finders


def _known() -> set[str]:
    from kleinctl import explain

    return set(explain.files())


def _finders(path: Path, where: str) -> Iterator[tuple[str, set[str]]]:
    """Names of what finds problems in a module, each with the strings it can name one by."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if where == "kleinctl/log_patterns.py":
        yield "log", _strings(tree)
    elif not where.startswith("kleinctl/checks/"):
        plain = {word for word in _strings(tree) if "-" in word}
        yield f"`{where}`", plain | {word for node in ast.walk(tree) for word in _problem_names(node)}
    else:
        parts = {name: node for node in tree.body for name in _defined(node)}
        for node in parts.values():
            if isinstance(node, ast.FunctionDef) and (name := _check_name(node)):
                yield f"check `{name}`", {name} | _reachable(node, parts)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _check_name(function: ast.FunctionDef) -> str | None:
    for call in function.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "check":
            return str(ast.literal_eval(call.args[0]))
    return None


def _reachable(node: ast.stmt, parts: dict[str, ast.stmt]) -> set[str]:
    """The strings in a function and in what it uses of its module."""
    seen: dict[str, ast.stmt] = {}
    waiting = [node]
    while waiting:
        now = waiting.pop()
        used = {each.id for each in ast.walk(now) if isinstance(each, ast.Name)}
        for name in used & set(parts) - set(seen):
            seen[name] = parts[name]
            waiting.append(parts[name])
    return set().union(_strings(node), *map(_strings, seen.values()))


def _strings(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _problem_names(node: ast.AST) -> set[str]:
    """The names in `name=…` of a call, and strings that stand alone as a problem's fourth argument."""
    if not isinstance(node, ast.Call):
        return set()
    named = [word.value for word in node.keywords if word.arg == "name"]
    fourth = node.args[3:4] if isinstance(node.func, ast.Name) and node.func.id == "Problem" else []
    return {word for each in (*named, *fourth) for word in _values(each)}


def _values(node: ast.AST) -> set[str]:
    """The strings an expression can be: not those it looks something up by."""
    if isinstance(node, ast.Subscript):
        return _values(node.value)
    if isinstance(node, ast.IfExp):
        return _values(node.body) | _values(node.orelse)
    if isinstance(node, ast.Dict):
        return set().union(*map(_values, node.values))
    return _strings(node)


def refreshed(text: str, parts: dict[str, str]) -> str:
    """A document with its generated parts as they should be."""
    for name, content in parts.items():
        head, rest = text.split(f"<!-- {name} -->")
        tail = rest.split(f"<!-- /{name} -->")[1]
        text = f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args().check
    documents = {
        ROOT / "README.md": {"commands": commands()},
        PROBLEMS / "README.md": {"entries": covered(), "others": others(), "checks": checks()},
    }
    stale = 0
    for path, parts in documents.items():
        text = path.read_text(encoding="utf-8")
        wanted = refreshed(text, parts)
        stale += text != wanted
        if not only_check:
            path.write_text(wanted, encoding="utf-8")
    return int(bool(stale) and only_check)


if __name__ == "__main__":
    sys.exit(main())
