"""Write the generated parts of README.md: the commands, the checks.

    python tools/refresh_readme.py [--check]

With `--check` nothing is written, and the exit code is 1 where README differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


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


def refreshed(text: str) -> str:
    """README with its generated parts as they should be."""
    for name, content in (("commands", commands()), ("checks", checks())):
        head, rest = text.split(f"<!-- {name} -->")
        tail = rest.split(f"<!-- /{name} -->")[1]
        text = f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = README.read_text(encoding="utf-8")
    wanted = refreshed(text)
    if parser.parse_args().check:
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
