"""Fixes of environment variables: of a Windows user, or as the start files of the user's shell set them.

No text of strangers gets there: a variable of the table below is unset, or has a value of the form that it wants. What
runs already keeps its variables; kleinctl itself goes by the new ones at once.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from kleinctl.fixes import windows
from kleinctl.fixes.request import Plan, Request
from kleinctl.fixes.texts import _read_bytes, _writing
from kleinctl.journal import Progress, Record, Variable


def _absolute(value: str) -> bool:
    return Path(value).is_absolute()


#: The variables that a fix may change, and what a value has to look like. All of them may be unset.
VARIABLES: dict[str, Callable[[str], object]] = {
    "SSL_CERT_FILE": lambda value: _absolute(value) and Path(value).is_file(),
    "HF_HUB_CACHE": _absolute,
    "HF_HUB_DISABLE_SYMLINKS": "1".__eq__,
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID".__eq__,
    "CUDA_VISIBLE_DEVICES": lambda value: re.fullmatch(r"(MIG|GPU)-[0-9a-f/-]{8,80}", value),
    **dict.fromkeys(
        (
            *("HF_ENDPOINT", "HF_HUB_OFFLINE", "KLEINCTL_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER"),
            *("PYTHONPATH", "PYTHONHOME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ),
        lambda value: False,
    ),
}
#: What shells read when a user starts them; the first takes new lines.
START_FILES = {
    "bash": (".bashrc", ".bash_profile", ".bash_login", ".profile"),
    "zsh": (".zshrc", ".zprofile", ".zshenv", ".profile"),
    "sh": (".profile",),
    "dash": (".profile",),
}
OTHERS = (".profile", ".xprofile")


def set_variable(request: Request) -> Plan:
    """`set-variable`: a variable of the user's set, or with an empty `value` unset."""
    name, value = request.text("name"), request.text("value")
    if name not in VARIABLES:
        raise request.refuse(f"{name[:80]!r} is no variable that kleinctl changes")
    if value and not VARIABLES[name](value):
        raise request.refuse(f"{value[:80]!r} is no value for {name}")
    if not request.names(name):
        raise request.refuse(f"{name} is not a variable that the problem names")
    plan = _of_windows(request, name, value) if sys.platform == "win32" else _of_shell(request, name, value)
    sentence = "programs that run already keep their variables: open a new terminal"

    def work(record: Record, progress: Progress) -> None:
        plan.work(record, progress)
        os.environ.pop(name, None) if not value else os.environ.update({name: value})

    return replace(plan, work=work, sentences=(*plan.sentences, sentence))


def _of_windows(request: Request, name: str, value: str) -> Plan:
    before = windows.variable(name)
    if before is None and not value:
        raise request.refuse(f"{name} is not set for this user, but by this terminal or for the whole computer")
    step = Variable("variable", name, before, value or None)
    by_hand = f'setx {name} "{value}"' if value else rf"reg delete HKCU\Environment /v {name} /f"
    return request.plan(
        f"set {name} to {value} for this user" if value else f"unset {name} for this user; it is {before}",
        work=lambda record, progress: record.perform(step),
        commands=(by_hand,),
        outside=True,
    )


def _of_shell(request: Request, name: str, value: str) -> Plan:
    """A plan that writes start files: lines that set the variable do nothing any more; one that sets it is added."""
    shell = Path(os.environ.get("SHELL", "sh")).name
    if value and shell not in START_FILES:
        raise request.refuse(f"kleinctl does not know where {shell} sets variables")
    files = [Path.home() / file for file in (*START_FILES.get(shell, ()), *OTHERS)]
    files += sorted(Path.home().glob(".config/environment.d/*.conf"))
    line = f"export {name}={shlex.quote(value)}"
    plans = []
    once = {path.resolve(): path for path in reversed(files)}  # one may be a link to another
    for path in sorted(once.values(), key=files.index):
        before = _text(request, path)
        if not value and (number := _beyond(before, name)):
            raise request.refuse(f"line {number} of {path} sets {name} in a way that kleinctl cannot change")
        after = _silenced(before, name, plain=path.suffix == ".conf")
        if value and path == files[0]:
            after += ("" if not after or after.endswith("\n") else "\n") + line + "\n"
        if after != before:
            real = path.resolve()
            plans.append(_writing(request, real, after, (f"write {path}:", *_lines(before, after))))
    if not plans:
        raise request.refuse(f"none of your start files sets {name}; it comes from this shell or from the system")

    def work(record: Record, progress: Progress) -> None:
        for each in plans:
            each.work(record, progress)

    sentences = tuple(sentence for each in plans for sentence in each.sentences)
    by_hand = line if value else f"unset {name}   # and take it out of the files above"
    total = sum(each.disk_bytes or 0 for each in plans)
    return replace(plans[0], sentences=sentences, work=work, commands=(by_hand,), disk_bytes=total, outside=True)


def _text(request: Request, path: Path) -> str:
    raw = _read_bytes(request, path) or b""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise request.refuse(f"{path} is no UTF-8") from None


def _silenced(text: str, name: str, *, plain: bool) -> str:
    """The text with `:` before lines that set the variable and nothing else: a shell reads it as "do nothing"."""
    value = r"""(?:"[^"\n`$\\]*"|'[^'\n]*'|[^\s;&|"'`$#\\]*)"""
    line = rf"(?<!\\\n)^([ \t]*)((?:export[ \t]+{name}(?:={value})?|{name}={value})[ \t]*(?:#.*)?)$"
    return re.sub(line, r"# \2" if plain else r"\1: # \2", text, flags=re.MULTILINE)


def _beyond(text: str, name: str) -> int | None:
    """The first line, from 1, that sets the variable for all that follows and is not one that can be silenced."""
    value = r"""(?:"[^"\n]*"|'[^'\n]*'|\$\([^()\n]*\)|\$(?!\()|[^\s;&|"'$])*"""
    found = re.search(
        rf"(?<!\\\n)^[^#\n]*(?:\b(?:export|declare|typeset|readonly)\b[^#;&|\n]*?(?<![\w$={{]){name}\b"
        rf"|(?:^|[;&|{{( \t]){name}={value}[ \t]*(?:[;#&|]|$))",
        text := _silenced(text, name, plain=False),
        re.MULTILINE,
    )
    return text.count("\n", 0, found.start()) + 1 if found else None


def _lines(before: str, after: str) -> Iterator[str]:
    """The lines that go and those that come."""
    old, new = before.splitlines(), after.splitlines()
    for was, now in zip(old, new, strict=False):
        if was != now:
            yield from (f"  - {was}", f"  + {now}")
    yield from (f"  + {line}" for line in new[len(old) :])
