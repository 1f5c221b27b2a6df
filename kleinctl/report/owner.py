"""What this machine and the people on it could be recognised by. None of it may be in a report.

A name is *ordinary* where it cannot be told from kleinctl's own words or says nothing about a person: `root`, `user`,
`ubuntu`, `system`, names without a letter, names of one character. Such names stay, for else no report could be made on
these machines; the path of their home folder is hidden all the same. Every other name is hidden and searched for.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

#: Accounts that come with systems and images, makers, and words that every report has.
_COMMON = """
admin administrator ai amd app arch bin boot build builder card cards characters ckpt cloud cloudshell comfy comfyui
computer
container content ctx cuda data debian default defaultuser0 desktop dev developer diffusers dll docker driver email
error etc exe false fedora file files flux folder geforce gguf gpu guest home host http https id intel jetson jovyan
jpg json klein kleinctl laptop lib linux local localhost localuser location log logs machine main media microsoft mnt
model models my name nan no none null nvidia official ok opt other owner path pc pi pip png problem proc program
prompt pt pth public py python python3 root rtx run runner safetensors server service skipped so src super sys system
temp test tester testuser text ti tmp token toml torch transformers true txt ubuntu unknown user username users usr
vagrant var vscode warning win win32 windows work worker workspace wsl www-data yaml yes zip
"""
#: Environment variables whose value is a credential.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL|(?:^|_)PWD_|ACCESS_?KEY")
#: A credential shorter than this is a placeholder: searching for it would find everything.
SHORTEST_TOKEN = 6
_FILE_BYTES = 2**16


@dataclass(frozen=True)
class Owner:
    """By kind: names of people, names of the machine, home folders, credentials, serial numbers, addresses."""

    user: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    home: tuple[str, ...] = ()
    token: tuple[str, ...] = ()
    serial: tuple[str, ...] = ()
    address: tuple[str, ...] = ()

    def secrets(self) -> Iterator[tuple[str, str]]:
        """Each kind and value, the longest value first."""
        found = [(kind, value) for kind, values in vars(self).items() for value in values]
        yield from sorted(found, key=lambda pair: (-len(pair[1]), pair))


@cache
def ordinary() -> frozenset[str]:
    """Words that are no one's name, in lower case: common accounts, and what kleinctl calls its facts and problems."""
    from kleinctl import explain
    from kleinctl.checks import own_checks
    from kleinctl.facts import Facts

    names = [check.name for check in own_checks()]
    with suppress(Exception):  # pages that cannot be read leave their names out, no more
        names += list(explain.files())
    told = {word for name in names for word in name.split("-")}
    return frozenset({*_COMMON.split(), *told, *_field_names(Facts, set()), *_schema_words()})


def _schema_words() -> Iterator[str]:
    """The keys of a report, as its schema and doctor's name them."""
    folder = Path(__file__).parent.parent / "schemas"
    for name in ("report.json", "doctor.json"):
        keys = re.findall(r'"(\w+)": *\{', _text(folder / name))
        yield from (word for key in keys for word in _parts(key))


def _parts(name: str) -> tuple[str, ...]:
    """A name, and the words in it by which people's names could be taken for it; short ones are looked for alone."""
    return (name, *(word for word in name.split("_") if len(word) > 3))


def _field_names(kind: Any, seen: set[Any]) -> Iterator[str]:
    """The names of a dataclass's fields and of those in it."""
    if kind in seen:
        return
    seen.add(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        for each in fields(kind):
            yield from _parts(each.name)
        for hint in get_type_hints(kind).values():
            yield from _field_names(hint, seen)
    for inner in get_args(kind):
        yield from _field_names(inner, seen)


def telling(name: str) -> bool:
    """Whether `name` tells who somebody is, or which machine this is."""
    return len(name) > 1 and re.search(r"[^\W\d_]", name) is not None and name.casefold() not in ordinary()


def owner(serials: Iterable[str] = (), environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Owner:
    """Of this machine, as it is now. Asks no server but the resolver, for a second. `serials` are those of the cards.

    `root` is where /etc and /sys lie.
    """
    homes = tuple(dict.fromkeys(_answers(lambda: _homes(environ))))
    folders = [Path(home) for home in homes]
    people = [*_answers(lambda: _logins(environ)), *(re.split(r"[\\/]", home)[-1] for home in homes)]
    people += [name for folder in folders for name in _answers(partial(_git_names, folder))]
    people += [part for name in people for part in name.split() if len(part) > 2]
    hosts = [*_answers(lambda: _hosts(environ, root)), *_fqdn()]
    hosts += [name.partition(".")[0] for name in hosts]
    tokens = [value for name, value in environ.items() if SECRET.search(name.upper())]
    tokens += [token for value in environ.values() for token in _in_urls(value)]
    tokens += [token for folder in folders for token in _answers(partial(_stored, folder, environ))]
    return Owner(
        user=_kept(people, telling),
        host=_kept(hosts, telling),
        home=_kept(homes, lambda home: len(re.findall(r"[^\\/]+", home)) > (1 if home[1:2] == ":" else 0)),
        token=_kept(tokens, _is_token),
        serial=_kept((*serials, *_answers(lambda: _machine_ids(root))), lambda text: len(text) > 5),
        address=_kept(_answers(_addresses), lambda text: True),
    )


def _kept(values: Iterable[str], wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.strip() for value in values if value and wanted(value.strip())))


def _answers(ask: Callable[[], Iterable[str | None]]) -> list[str]:
    """What `ask` yields until it fails: a machine that does not answer has one secret less to find."""
    found: list[str] = []
    with suppress(Exception):
        found.extend(each for each in ask() if each)
    return found


def _is_token(text: str) -> bool:
    is_path = re.match(r"(?:[A-Za-z]:)?[\\/]|~", text) and len(re.findall(r"[\\/]", text)) > 1
    return len(text) >= SHORTEST_TOKEN and not is_path and not text.isalpha() and not text.isdigit()


def _logins(environ: Mapping[str, str]) -> Iterator[str | None]:
    """Login names, and the full name."""
    for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER", "NB_USER"):
        yield environ.get(name)
    if sys.platform == "win32":
        full = _windows_full_name()
    else:
        import pwd

        entry = pwd.getpwuid(os.getuid())
        yield entry.pw_name
        full = entry.pw_gecos.partition(",")[0]
    yield full


def _windows_full_name() -> str:
    import ctypes

    size = ctypes.c_ulong(256)
    buffer = ctypes.create_unicode_buffer(size.value)
    name_display = 3  # https://learn.microsoft.com/windows/win32/api/secext/ne-secext-extended_name_format
    ctypes.windll.secur32.GetUserNameExW(name_display, buffer, ctypes.byref(size))  # type: ignore[attr-defined]
    return buffer.value


def _homes(environ: Mapping[str, str]) -> Iterator[str | None]:
    yield str(Path.home())
    yield str(Path.home().resolve())
    yield environ.get("HOME")
    yield environ.get("USERPROFILE")
    yield (environ.get("HOMEDRIVE") or "") + (environ.get("HOMEPATH") or "")
    if sys.platform != "win32":
        import pwd

        yield pwd.getpwuid(os.getuid()).pw_dir


def _git_names(home: Path) -> Iterator[str]:
    """Name and e-mail address that commits are signed with."""
    for value in re.findall(r"^\s*(?:name|email|user)\s*=\s*(\S.{0,200}?)\s*$", _text(home / ".gitconfig"), re.M):
        yield value.strip('"')


def _hosts(environ: Mapping[str, str], root: Path) -> Iterator[str | None]:
    for name in ("COMPUTERNAME", "HOSTNAME", "HOST", "USERDOMAIN"):
        yield environ.get(name)
    yield socket.gethostname()
    yield _text(root / "etc" / "hostname").strip()


def _fqdn() -> list[str]:
    """The full name that the resolver gives this machine, where it answers within a second."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(socket.getfqdn()), daemon=True)
    thread.start()
    thread.join(1.0)
    return [name for name in found if not name.startswith("localhost") and not name[:1].isdigit()]


def _stored(home: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Credentials in the files where hub, git and curl keep them."""
    hub = Path(environ.get("HF_HOME") or home / ".cache" / "huggingface")
    for path in (Path(environ.get("HF_TOKEN_PATH") or hub / "token"), home / ".huggingface" / "token"):
        yield _text(path).strip()
    yield from re.findall(r"=\s*(\S+)\s*$", _text(hub / "stored_tokens"), re.M)
    for path in (home / ".git-credentials", home / ".config" / "git" / "credentials"):
        yield from _in_urls(_text(path))
    yield from re.findall(r"\bpassword\s+(\S+)", _text(home / ".netrc"))


def _in_urls(text: str) -> list[str]:
    """User names and passwords in addresses."""
    return [part for pair in re.findall(r"://([^/\s@:]{1,200}):([^/\s@]{1,400})@", text) for part in pair]


def _machine_ids(root: Path) -> Iterator[str]:
    yield _text(root / "etc" / "machine-id").strip()
    for name in ("product_uuid", "product_serial", "board_serial", "chassis_serial"):
        text = _text(root / "sys" / "class" / "dmi" / "id" / name).strip()
        if any(letter.isdigit() for letter in text):  # not "To be filled by O.E.M."
            yield text


def _addresses() -> Iterator[str]:
    """Addresses of this machine's network cards, except those that every machine has."""
    import psutil

    for cards in psutil.net_if_addrs().values():
        for card in cards:
            text = card.address.partition("%")[0]
            if not re.fullmatch(r"127\..*|::1|0\.0\.0\.0|(?:00[:-]?){6}|", text):
                yield text


def _text(path: Path) -> str:
    """The start of a small file, or an empty string."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        return file.read(_FILE_BYTES).decode("utf-8", "replace")
    return ""
