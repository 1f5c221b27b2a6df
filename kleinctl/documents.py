"""Facts as JSON documents and back: the annotations of frozen dataclasses are the schema.

What is read comes from strangers, so sizes are bounded and characters that a terminal would act on are replaced.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kleinctl.problem import KleinctlError, Problem

#: Bounds of what is read.
MAX_TEXT, MAX_ITEMS, MAX_NUMBER = 2000, 4096, 2**63
#: How a path begins that was recorded on Windows; elsewhere its parts could not be told apart by its own separator.
_OF_WINDOWS = re.compile(r"(?:[A-Za-z]:|~)?\\")


def plain(value: Any) -> Any:
    """Facts as JSON's own types, in the order they are declared. A class may say more in a method `to_document`."""
    if hasattr(value, "to_document"):
        return value.to_document()
    if isinstance(value, PurePath):
        return str(value)
    if is_dataclass(value):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def start_of(path: Path, most: int) -> bytes:
    """The first `most` bytes of a small file of another program's.

    Raises:
        OSError: it cannot be read, or is no file: a pipe would keep us waiting.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        return file.read(most)


Fact = TypeVar("Fact")


def read(kind: type[Fact], value: Any, where: str) -> Fact:
    """`value`, as JSON gives it, as `kind`: a frozen dataclass, a tuple or mapping of one, or a plain value.

    Unknown keys are ignored. Of a union of dataclasses it is the first whose fields are there.

    Raises:
        KleinctlError: a value has the wrong type, is out of bounds or missing; `where` names the place.
    """
    found: Any
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = None if value is None else read(_member(inner, value), value, where)
    elif is_dataclass(kind):
        found = _read_fact(kind, value, where)
    elif origin is tuple:
        items = sized(value, list, where)
        found = tuple(read(inner[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    elif origin is Mapping:
        pairs = sized(value, dict, where).items()
        found = {read(str, key, where): read(inner[1], item, f"{where}.{key}"[:MAX_TEXT]) for key, item in pairs}
    elif origin is Literal:
        if value not in inner:
            raise unreadable(where, "one of " + ", ".join(inner), value)
        found = value
    else:
        found = _read_scalar(kind, value, where)
    return found


def _member(union: tuple[Any, ...], value: Any) -> Any:
    """The type of a union that `value` is of."""
    members = [each for each in union if each is not type(None)]
    given = value if isinstance(value, dict) else {}
    fitting = (each for each in members if is_dataclass(each) and {item.name for item in _required(each)} <= set(given))
    return members[0] if len(members) == 1 else next(fitting, members[0])


def _required(kind: Any) -> list[Any]:
    return [each for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]


def _read_fact(kind: Any, value: Any, where: str) -> Any:
    given = sized(value, dict, where)
    hints = _hints(kind)
    for wanted in _required(kind):
        if wanted.name not in given:
            raise unreadable(f"{where}.{wanted.name}", "a value", "nothing")
    return kind(**{key: read(hints[key], given[key], f"{where}.{key}") for key in hints if key in given})


def _read_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is Path:
        text = read(str, value, where)
        return Path(text.replace("\\", "/") if _OF_WINDOWS.match(text) else text)
    if kind is float and type(value) in (int, float) and abs(value) < MAX_NUMBER:
        return float(value)
    exactly = type(value) is kind and kind is not float  # True is no number here, and no float is endless
    if not exactly:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise unreadable(where, names[kind], value)
    if kind is str:
        if len(value) > MAX_TEXT:
            raise unreadable(where, f"text of at most {MAX_TEXT} characters", f"{len(value)} characters")
        return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value)
    if kind is int and not 0 <= value < MAX_NUMBER:
        raise unreadable(where, "a number from 0 to 2^63", value)
    return value


def sized(value: Any, kind: type, where: str) -> Any:
    """`value`, when it is a list or an object of bounded size.

    Raises:
        KleinctlError: it is not.
    """
    fits = isinstance(value, kind)
    if not fits:
        raise unreadable(where, "a list" if kind is list else "an object", value)
    if len(value) > MAX_ITEMS:
        raise unreadable(where, f"at most {MAX_ITEMS} entries", f"{len(value)} entries")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}


def unreadable(where: str, wanted: str, found: object) -> KleinctlError:
    """The error of a document that is not as it should be."""
    return KleinctlError(
        Problem(
            what=f"{where[:80]} in this report cannot be read",
            why=f"Wanted is {wanted}; found is {ascii(found)[:80]}.",
            fix="kleinctl doctor --json   # on the machine in question, to make a fresh one",
            name="report-unreadable",
        )
    )
