"""Redaction: what tells who somebody is becomes a token, the same value the same token throughout a report.

Hardware goes by an allow-list: a fact that is not in `HARDWARE` stays out. Text goes by rules, first for what this
machine is known by (`Owner`), then for what looks like a credential, an address, a path or a prompt. `leaks` searches
a finished report for all of it once more. Tokens keep what checks look at: a space, a letter outside ASCII, the
extension of a file.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from kleinctl.documents import MAX_ITEMS, MAX_TEXT
from kleinctl.report.known import (
    EXTENSIONS,
    FILES,
    FOLDER_SHAPES,
    FOLDERS,
    IS_FILE,
    PROGRAMS,
    PROMPTS,
    SERVERS,
    SOFTWARE,
    SYSTEM,
)
from kleinctl.report.owner import Owner, ordinary

if TYPE_CHECKING:
    from kleinctl.facts import Facts

Fact = TypeVar("Fact")
Match = re.Match[str]

#: The facts of hardware that a report has. What is not named here stays out until somebody has thought about it.
HARDWARE = {
    "Hardware": """gpus other_gpus nvml ram_bytes ram_available_bytes ram_limit_source swap_bytes commit_free_bytes
        disk_free_bytes disks platform os kernel wsl container machine cpu cpu_count python packages remarks
        rates""",
    "Gpu": """name compute_capability vram_bytes vram_free_bytes driver cuda_driver pcie_generation pcie_generation_now
        pcie_width pcie_width_now display_active mig processes hidden power_limit_watts power_default_watts throttled
        temperature_celsius""",
    "Mig": "enabled instances",
    "MigInstance": "uuid vram_bytes vram_free_bytes",
    "GpuProcess": "pid name vram_bytes",
    "OtherGpu": "vendor name found_by driver",
    "NvmlState": "status detail",
    "Disk": "path free_bytes total_bytes filesystem hard_links max_file_bytes rotational network",
    "Python": "version executable bits venv",
    "Package": "version location cuda",
    "Rates": """card driver cpu model date pinned pageable back disk disk_note cached encode forward decode save_seconds
        start_seconds""",
    "Speed": "size flops",
}
#: The facts of hardware that are known to tell who somebody is.
LEFT_OUT = {"Gpu": "uuid"}

#: Facts that are names of files or folders, whatever they look like.
_PATHS = frozenset(
    """
    broken_links copy_of file files folder folders log misnamed missing path text_files unfinished unread yaml_file
    """.split()  # noqa: SIM905
)

_KEY = r"(?:negative_|positive_|wildcard_|populated_)?(?:prompt|text|text_[gl]|t5xxl|clip_[gl]|caption|Description)"
_PROMPT_RULES = tuple(
    re.compile(rule, re.IGNORECASE | re.MULTILINE)
    for rule in (
        rf'(\\+"{_KEY}\\+"\s*:\s*)(\\+"(?:(?!\\+")[^\n]){{1,20000}})',  # JSON in JSON
        rf'(["\']{_KEY}["\']\s*:\s*)("(?:[^"\\\n]|\\.){{1,20000}}"|\'(?:[^\'\\\n]|\\.){{1,20000}}\')',
        r'(\b(?:(?:negative_)?prompts?|widgets_values)["\']?\s?[=:]\s?)(\[[^\]\n]{1,20000}\])',
        r"((?<!\S)-p\s+)(\"[^\"\n]{1,20000}\"|'[^'\n]{1,20000}')",
        r'(\b(?:negative_)?prompts?\s?=\s?\[?)("(?:[^"\\\n]|\\.){1,20000}"|\'(?:[^\'\\\n]|\\.){1,20000}\')',
        r'(--(?:negative-)?prompt[\s=]+)("[^"\n]{1,20000}"|\'[^\'\n]{1,20000}\'|[^\s"\'-]\S{0,2000})',
        r'(\bkleinctl(?:\.exe)?\s+(?:up|run)\b[^"\'\n]{0,200})("[^"\n]{1,20000}"|\'[^\'\n]{1,20000}\')',
        r"(\btruncated because [^\n]{0,160}?:\s*)(\S[^\n]{0,20000})",
        r"(^[^\S\n]*(?:(?:negative|positive|your|the|enhanced|user)\s)?prompt\s?:[^\S\n]*)(\S[^\n]{0,20000})",
    )
)

_CREDENTIALS = (
    re.compile(
        r"()\b((?:hf_(?!transfer\b)|api_org_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|AIza)[\w-]{8,255}"
        r"|eyJ[\w-]{8,2000}\.[\w-]{4,2000}(?:\.[\w-]{1,2000})?)"
    ),
    re.compile(
        r"(\bbearer\s+|(?:(?<![A-Za-z])|(?-i:(?<=[a-z])(?=[A-Z])))"
        r"(?:authorization|token|password|passwd|secret|api[-_ ]?key|pwd)\\*[\"']?\s?[=:]\s?"
        r"(?:b?\\*[\"'])?(?:(?:bearer|basic|token)\s)?)([^\s\"',;<>]{6,400})",
        re.IGNORECASE,
    ),
    re.compile(r"(\bcookie\\*[\"']?\s?[=:]\s?(?:b?\\*[\"'])?)([^\s\"'][^\n\"']{5,4000})", re.IGNORECASE),
    re.compile(r"([?&](?:x-amz-)?(?:signature|sig|credential|policy|key-pair-id)=)([^\s&\"'<>]{6,999})", re.IGNORECASE),
    re.compile(r"()(?<![\w/.:@-])([\w.+-]{1,64}:[^\s/@\"':]{4,200})(?=@(?!sha256:)[\w-])"),
    re.compile(
        r"((?<!\S)--(?:[a-z]+[-_])*(?:token|password|passwd|secret|api[-_]?key)\s+[\"']?)([^\s\"'-][^\s\"']{5,400})",
        re.IGNORECASE,
    ),
)
_URL = re.compile(r"\b([a-z][a-z0-9+.-]{1,20})://([^\s\"'<>|]{1,2000})", re.IGNORECASE)
_INTERNAL = re.compile(
    r"(?<![\w.-])(?:[\w-]{1,63}\.){1,8}(?:local|lan|internal|intra|intranet|corp|home|localdomain|private|arpa)(?![\w.-]*\w)",
    re.IGNORECASE,
)
_HOST_SAID = re.compile(r"(\b(?:host|hostname|server|resolve)\s?[=:]?\s?['\"])([\w.-]{1,253})(?=['\"])", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_UUID = re.compile(r"(?<![\w-])(?:GPU-|MIG-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![\w-])", re.IGNORECASE)
_MAC = re.compile(r"(?<![\w:-])(?:[0-9a-f]{2}([:-]))(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}(?![\w:-])", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\w.-])(?<![=<>~!]=)\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w|-\w|\+)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9a-f:]{0,38}\d)(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:])", re.IGNORECASE)
_INSIDE = r"[^\s\"'<>|*?:;,()\[\]{}=\\/]"
_PART = r"(?:(?:USER|FOLDER|FILE) \d+[^\s\\/]{0,20}|[^\s\"'<>|*?:;,()\[\]{}\\/]{1,255})"
_START = r"(?:[A-Za-z]:[\\/]{1,2}|~[\\/]{1,2}|\\\\+|/)"
_QUOTED_PATH = re.compile(rf"(?<=[\"']){_START}[^\"'\n<>|]{{1,400}}(?=[\"'])")
_PATH = re.compile(rf"(?<![\w/\\.~:<>-]){_START}{_PART}(?:[\\/]{{1,2}}{_PART}){{0,60}}[\\/]?")
_QUOTED_FILE = re.compile(rf"(?<=[\"'])[^\"'\n<>|*?:]{{1,200}}\.(?:{EXTENSIONS})(?=[\"'])", re.IGNORECASE)
_FILE = re.compile(
    rf"(?<!{_INSIDE})(?<!FILE )(?<!FOLDER )(?:{_PART}[\\/]{{1,2}}){{0,60}}{_INSIDE}{{1,200}}\.(?:{EXTENSIONS})(?!\w)",
    re.IGNORECASE,
)
_HOME_OF = re.compile(r"([\\/](?:Users|home)[\\/]+)([^\s\\/\"':;,<>|]+)", re.IGNORECASE)
#: A home folder of Windows whose name has spaces, in text without quotes: `C:\\Users\\Max Meyer\\ComfyUI`.
_SPACED_HOME = re.compile(
    r"([\\/]Users[\\/]+)([^\s\\/\"':;,<>|]{1,60}(?: [^\s\\/\"':;,<>|]{1,60}){1,3})(?=[\\/])", re.IGNORECASE
)
_ESCAPED = re.compile(r"[^\s\"']{0,400}%(?:2F|5C)[^\s\"']{0,2000}", re.IGNORECASE)
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:[\\/]|~[\\/]|\\\\|/)[^\n]*\Z|~\Z")
_TOKEN = re.compile(r"(?:USER|HOST|FOLDER|FILE|PROGRAM|ID|ADDRESS|EMAIL)[ _]\d+(?:_é)?|TOKEN_[0-9A-F]{4,}|PROMPT \(.*")


@dataclass(frozen=True)
class Leak:
    """What is left in a finished report: what kind of thing, and in which member."""

    kind: str
    member: str


class Redactor:
    """Hides things, and remembers which token it gave each. `counts` says how often, by kind.

    `known_files` are names of files that everybody may have (those of the manifests), `versions` are numbers that
    look like addresses and are none. With `keep_prompts` prompts stay. Without `salt` a new one is made; it is nowhere
    written, so a token of a credential cannot be found by trying.
    """

    def __init__(
        self,
        owner: Owner,
        *,
        known_files: Iterable[str] = (),
        versions: Iterable[str] = (),
        keep_prompts: bool = False,
        salt: bytes | None = None,
    ) -> None:
        self.owner = owner
        self.counts: Counter[str] = Counter()
        self.hidden: dict[str, dict[str, str]] = {}
        self._known_files = {name.casefold() for name in known_files}
        self._versions = frozenset(versions)
        self._keep_prompts = keep_prompts
        self._salt = salt or secrets.token_bytes(16)
        self._owned = {kind: pattern(kind, values) for kind, values in vars(owner).items()}
        self._spaced: re.Pattern[str] | None = None

    # Tokens

    def numbered(self, kind: str, value: str) -> str:
        """The token of a value: `USER_1`, `FILE 3.gguf`. What is a token already stays as it is."""
        if _TOKEN.match(value):
            return value
        known = self.hidden.setdefault(kind, {})
        value = spellings(value)[-1]
        key = value.casefold()
        if key not in known:
            known[key] = _shaped(f"{kind.upper()}_{len(known) + 1}", value)
            self._spaced = None
        self.counts[kind] += 1
        return known[key]

    def credential(self, value: str) -> str:
        """`TOKEN_A1B2`, the same for the same value in this report only."""
        if _TOKEN.match(value):
            return value
        self.counts["token"] += 1
        digest = hmac.new(self._salt, value.encode("utf-8", "replace"), hashlib.sha256).hexdigest().upper()
        return f"TOKEN_{digest[:4]}"

    def prompt(self, text: str) -> str:
        """`PROMPT (17 characters)`."""
        if self._keep_prompts:
            return self.text(text)
        if not text or text.startswith("PROMPT ("):
            return text
        self.counts["prompt"] += 1
        return f"PROMPT ({len(text)} characters)"

    # Text

    def text(self, text: str) -> str:
        """Text of any kind: a sentence, a line of a log, a setting's value."""
        text = _ESCAPED.sub(lambda match: unquote(match[0]), text)
        for rule in self._rules():
            text = rule(text)
        return text

    def _rules(self) -> Iterable[Callable[[str], str]]:
        yield partial(self._owned["token"].sub, lambda match: self.credential(match[0]))
        for expression in _CREDENTIALS:
            yield partial(expression.sub, lambda match: match[1] + self.credential(match[2]))
        if not self._keep_prompts:
            for expression in _PROMPT_RULES:
                yield partial(expression.sub, self._quoted_prompt)
        yield partial(_URL.sub, self._url)
        yield partial(_EMAIL.sub, partial(self._as, "email"))
        yield partial(_UUID.sub, partial(self._as, "id"))
        yield partial(self._owned["serial"].sub, partial(self._as, "id"))
        yield partial(_MAC.sub, partial(self._as, "address"))
        yield partial(self._owned["address"].sub, partial(self._as, "address"))
        yield partial(_IPV4.sub, self._ip)
        yield partial(_IPV6.sub, self._ip)
        yield partial(_INTERNAL.sub, partial(self._as, "host"))
        yield partial(_HOST_SAID.sub, lambda match: match[1] + self._host(match[2]))
        yield self._homes
        yield partial(_SPACED_HOME.sub, self._other_home)
        yield self._with_spaces
        yield partial(_QUOTED_PATH.sub, lambda match: self.path(match[0]))
        yield partial(_PATH.sub, self._path_in_text)
        yield partial(_QUOTED_FILE.sub, lambda match: self.path(match[0]))
        yield partial(_FILE.sub, lambda match: self.path(match[0]))
        yield partial(_HOME_OF.sub, self._other_home)
        yield self.people

    def people(self, text: str) -> str:
        """Text without the names of people and of this machine."""
        for kind in ("user", "host"):
            text = self._owned[kind].sub(partial(self._as, kind), text)
        return text

    def _other_home(self, match: Match) -> str:
        return match[1] + self.numbered("user", match[2]) if self.is_somebodys(match) else match[0]

    @staticmethod
    def is_somebodys(match: Match) -> bool:
        """Whether what follows `/home/` or `C:\\Users\\` is somebody's name."""
        return match[2].casefold() not in ordinary() and not _TOKEN.match(match[2])

    def _as(self, kind: str, match: Match) -> str:
        return self.numbered(kind, match[0])

    def _quoted_prompt(self, match: Match) -> str:
        said = match[2]
        mark = said[0] if said[0] in "\"'" else ""
        return f"{match[1]}{mark}{self.prompt(said.strip(mark) if mark else said)}{mark}"

    def _url(self, match: Match) -> str:
        authority, slash, path = match[2].partition("/")
        account, at, host = authority.rpartition("@")
        name, colon, port = host.rpartition(":")
        if not (colon and port.isdigit()):
            name, colon, port = host, "", ""
        account = f"{self.credential(account)}@" if at else ""
        known = SERVERS.fullmatch(name) or not name
        path, question, _ = path.partition("?")
        if match[1].lower() == "file":
            return f"file://{self.path('/' + path)}"
        tail = slash + (self.people(path) if known else "…" if path else "") + ("?…" if question else "")
        return f"{match[1]}://{account}{self._host(name)}{colon}{port}{tail}"

    def _host(self, name: str) -> str:
        if SERVERS.fullmatch(name) or not name:
            return name
        return self.numbered("host", name)

    def _ip(self, match: Match) -> str:
        with suppress(ValueError):
            address = ipaddress.ip_address(match[0])
            if match[0] not in self._versions and not address.is_loopback and not address.is_unspecified:
                return self.numbered("address", match[0])
        return match[0]

    def _homes(self, text: str) -> str:
        """Home folders as `~`; one whose name programs stumble over keeps that it has a space, or other letters."""

        def tilde(match: Match) -> str:
            self.counts["home"] += 1
            told = spellings(match[0])[-1]
            if told.isascii() and " " not in told:
                return "~"
            folder, separator, name = re.match(r"(?s)(.*?)([\\/]+)([^\\/]*)\Z", told).groups()  # type: ignore[union-attr]
            return folder + separator + self.numbered("user", name)

        return self._owned["home"].sub(tilde, text)

    def _with_spaces(self, text: str) -> str:
        """Names of files and folders with a space in them, where they are known from elsewhere."""
        if self._spaced is None:
            names = {name: token for kind in ("file", "folder") for name, token in self.hidden.get(kind, {}).items()}
            self._spaced = _any_of(re.escape(name) for name in names if " " in name and len(name) > 3)
        files = self.hidden.get("file", {})

        def token(match: Match) -> str:
            extension = IS_FILE.fullmatch(match[0]) if match[0].casefold() in files else None
            return self._file(match[0], extension[1]) if extension else self.numbered("folder", match[0])

        return self._spaced.sub(token, text)

    # Paths and names

    def path(self, text: str) -> str:
        """A path, or a name of a file or folder: each part that is not everybody's becomes a token."""
        text = self._homes(text)
        parts = re.split(r"([\\/]+)", text)
        names = parts[0::2]
        share = parts[0] == "" and len(parts) > 1 and parts[1].startswith("\\\\")
        parts[0::2] = [self._part(names, at, share) for at in range(len(names))]
        return self.people("".join(parts))

    def _part(self, names: list[str], at: int, share: bool) -> str:
        name, before = names[at], [each.casefold() for each in names[:at]]
        lower = name.casefold()
        if not name or _TOKEN.match(name):
            return name
        if share and at == 1 and not lower.startswith("wsl"):
            return self._host(name)
        if before and before[-1] in ("users", "home") and lower not in ordinary():
            return self.numbered("user", name)
        if SOFTWARE & set(before) or (len(before) > 1 and before[0] == "" and before[1] in SYSTEM and not share):
            return name
        if lower in FOLDERS or FOLDER_SHAPES.fullmatch(name):
            return name
        if lower.startswith("onedrive"):
            return "OneDrive"
        extension = IS_FILE.fullmatch(name)
        if extension:
            return self._file(name, extension[1])
        is_program = re.search(r"\.(?:py[cdw]?|so[\d.]*|dll|exe|cfg|lib|h|cu|cpp)\Z", lower)
        if at == len(names) - 1 and (is_program or re.fullmatch(r"python[\w.]*|\.wslconfig[\w.]*", lower)):
            return name
        return self.numbered("folder", name)

    def _file(self, name: str, extension: str) -> str:
        if name.casefold() in self._known_files or FILES.fullmatch(name) or _is_own_log(name):
            return name
        return f"{self.numbered('file', name).removesuffix('.' + extension)}.{extension}"

    def _path_in_text(self, match: Match) -> str:
        text = match[0]
        alone = text.startswith("/") and not re.search(r"[\\/]", text[1:].rstrip("\\/"))
        return text if alone else self.path(text)

    def program(self, name: str) -> str:
        """The name of a program that holds a card's memory, where it is a common one."""
        start = name.casefold()
        known = start in ("unknown", "") or any(start.startswith(each) for each in PROGRAMS)
        return self.people(name) if known else self.numbered("program", name)

    # Facts

    def facts(self, facts: Facts) -> Facts:
        """Facts as a report may carry them, within the bounds that readers of reports keep."""
        return self._fact(facts)

    def _fact(self, fact: Fact) -> Fact:
        kind = type(fact).__name__
        allowed = HARDWARE.get(kind)
        changes = {}
        for each in fields(fact):  # type: ignore[arg-type]
            if allowed is None or each.name in allowed.split():
                changes[each.name] = self._field(kind, each.name, getattr(fact, each.name), fact)
            else:
                changes[each.name] = each.default  # not thought about yet, or known to tell too much
        return replace(fact, **changes)  # type: ignore[type-var]

    def _field(self, kind: str, name: str, value: Any, fact: Any) -> Any:
        if f"{kind}.{name}" in ("Environment.packages", "Environment.requires", "Package.version", "Hardware.kernel"):
            return _mapped(value, self.people)
        if kind == "Node" and name == "values":
            return {key: self._node_value(key, item) for key, item in value.items()}
        if kind == "GpuProcess" and name == "name":
            return self.program(value)
        if kind == "MigInstance" and name == "uuid":
            return self.numbered("id", value)
        if kind == "Identity" and name == "saw" and fact.kind in ("other", "json", "unreadable"):
            value = re.sub(r"'[^']*'", lambda match: f"TEXT ({len(match[0]) - 2} characters)", value)
        if name in ("place", "set_name", "environment") or f"{kind}.{name}" in ("ComfyUI.name", "Environment.name"):
            return value and self.path(value)
        if name in PROMPTS - {"value", "description"} and isinstance(value, str):
            return self.prompt(value)
        return self._paths(value) if name in _PATHS else self._value(value)

    def _paths(self, value: Any) -> Any:
        """Names of files and folders, in whatever order they come."""
        if isinstance(value, str):
            return value and self.path(value)[:MAX_TEXT]
        if isinstance(value, tuple):
            return tuple(map(self._paths, value[:MAX_ITEMS]))
        if isinstance(value, Mapping):
            return {self.people(key): self._paths(item) for key, item in list(value.items())[:MAX_ITEMS]}
        return self._value(value)

    def _value(self, value: Any) -> Any:
        """A value of a fact, by its type."""
        if isinstance(value, PurePath):
            return Path(self.path(str(value)).replace("\\", "/"))
        if isinstance(value, str):
            return (self.path(value) if _ABSOLUTE.match(value) else self.text(value))[:MAX_TEXT]
        if is_dataclass(value) and not isinstance(value, type):
            return self._fact(value)
        if isinstance(value, tuple):
            return tuple(self._value(item) for item in value[:MAX_ITEMS])
        if isinstance(value, Mapping):
            return {self.people(key): self._value(item) for key, item in list(value.items())[:MAX_ITEMS]}
        return value

    def _node_value(self, key: str, value: str) -> str:
        """A value in a workflow: names of files and words of a menu stay; anything that may be a prompt does not."""
        if IS_FILE.fullmatch(value) and "\n" not in value and len(value) < 200:
            return self.path(value)
        number = re.fullmatch(r"-?\d+(?:\.\d+)?|true|false|none", value, re.IGNORECASE)
        if number or (key.casefold() not in PROMPTS and re.fullmatch(r"[\w.+/:-]{0,60}", value, re.ASCII)):
            return self.text(value)
        return self.prompt(value)[:MAX_TEXT]

    def document(self, value: Any) -> Any:
        """A JSON document of kleinctl's own making: keys stay, texts are redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.document(item) for key, item in value.items()}
        return [self.document(item) for item in value] if isinstance(value, (list, tuple)) else value


def brief(text: str) -> str:
    """`text` without the home folder, credentials and addresses: for a crash log, quickly."""
    home = str(Path.home())
    return Redactor(Owner(home=(home,) if len(Path(home).parts) > 1 else ())).text(text)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Every text in `value`, keys too, changed."""
    if isinstance(value, str):
        return change(value)[:MAX_TEXT]
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in list(value.items())[:MAX_ITEMS]}
    return tuple(_mapped(item, change) for item in value[:MAX_ITEMS]) if isinstance(value, tuple) else value


def _shaped(token: str, value: str) -> str:
    """`token` with what paths are judged by: a space where `value` has one, a letter outside ASCII where it has one."""
    token = token.replace("_", " ", 1) if " " in value else token
    return token if value.isascii() or token.endswith("é") else f"{token}_é"


def _is_own_log(name: str) -> bool:
    return re.fullmatch(r"(?:worker|install|crash|undo|fix|comfyui)[\w.-]{0,60}\.(?:log|txt)", name) is not None


# What the owner is known by, as expressions


def pattern(kind: str, values: Iterable[str]) -> re.Pattern[str]:
    """An expression that finds any of `values`, in every spelling they come in."""
    longest = sorted(values, key=len, reverse=True)
    make = {"home": _home, "user": _name, "host": _name, "address": _exactly, "serial": _exactly}.get(kind, _spelled)
    return _any_of(make(value) for value in longest)


def _any_of(expressions: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(expressions) or r"(?!)", re.IGNORECASE)


def _spelled(text: str) -> str:
    """An expression for `text` as it is, in JSON, in an address, and with composed or decomposed letters."""
    spellings = {text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))}
    spellings |= {form for each in spellings for form in (json.dumps(each)[1:-1], quote(each), quote(each, safe=""))}
    spellings |= {each.replace("\\", "\\\\") for each in spellings}
    return "(?:" + "|".join(re.escape(each) for each in sorted(spellings, key=lambda each: (-len(each), each))) + ")"


def _exactly(text: str) -> str:
    return rf"(?<![\w.:-]){_spelled(text)}(?![\w:-])"


def _home(path: str) -> str:
    lead = r"(?<![\\/])[\\/]+" if path[0] in "\\/" else ""  # a row of slashes is looked at once
    return lead + r"[\\/]+".join(map(_spelled, re.findall(r"[^\\/]+", path))) + r"(?![\w-])"


def _name(name: str) -> str:
    """A name between other things than letters; of two or three letters, between other things than letters and digits.

    A long one, and one with letters outside ASCII, is found anywhere: `jonathan` in `mrjonathan`.
    """
    spelled = r"[\s._+-]{0,2}".join(map(_spelled, name.split()))
    if not name.isascii() or (len(name) > 6 and not any(name.casefold() in word for word in ordinary())):
        return spelled
    around = r"\w" if len(name) < 4 else "A-Za-z"
    return rf"(?<![{around}]){spelled}(?![{around}])"


# The last look


def leaks(members: Mapping[str, bytes], redactor: Redactor) -> list[Leak]:
    """What of this machine's secrets, or of things that look like one, is left in the members of a finished report."""
    searched = {**{kind: [found] for kind, found in redactor._owned.items()}, **_looks_like()}
    files = [name for name in redactor.hidden.get("file", {}) if len(name.rpartition(".")[0]) > 3]
    searched["file name"] = [_any_of(rf"(?<!\w){re.escape(name)}(?!\w)" for name in files)]
    found = []
    for member, content in members.items():
        texts = spellings(f"{member}\n{content.decode('utf-8', 'replace')}")
        found += [
            Leak(kind, member)
            for kind, expressions in searched.items()
            if any(expression.search(text) for expression in expressions for text in texts)
        ]
        if any(redactor.is_somebodys(match) for text in texts for match in _HOME_OF.finditer(text)):
            found.append(Leak("home folder", member))
    return found


@cache
def _looks_like() -> dict[str, list[re.Pattern[str]]]:
    """Expressions for what no report has, whosever it is."""
    token = re.compile(
        r"\b(?:hf_(?!transfer\b)[A-Za-z0-9]{8}|gh[pousr]_[A-Za-z0-9]{8}|github_pat_\w{8}|glpat-[\w-]{8})"
    )
    account = re.compile(r"://(?!TOKEN_)[^/\s@\"']{1,200}@")
    return {"credential": [token, account], "e-mail address": [_EMAIL], "identifier": [_UUID, _MAC]}


def spellings(text: str) -> list[str]:
    """A text as it is, as JSON means it, and as an address means it."""
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    plain = re.sub(r"\\+([\"\\/])", r"\1", plain)
    found = (unicodedata.normalize("NFC", each) for each in (text, plain, unquote(plain)))
    return list(dict.fromkeys(found))
