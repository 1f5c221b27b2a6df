"""Is what was downloaded whole, and is there room and a way for what is to come?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from kleinctl.checks import CouldNotCheck, check
from kleinctl.checks.machine import variable, without
from kleinctl.environment import Environment
from kleinctl.facts.hub_cache import CachedRepo, HubCache
from kleinctl.facts.system import System
from kleinctl.facts.weights import ROLES, FoundFile
from kleinctl.hardware import Hardware
from kleinctl.manifest import HUB, Model, Part
from kleinctl.problem import Evidence, Problem, Remedy, shell
from kleinctl.units import bytes_text

#: What is wanted free beyond the files themselves, as a share of them.
SPARE = 0.1
#: Bytes. Less is not worth a word.
LEFT_OVER = 100_000_000
#: Bytes. klein 4B's longest part, its text encoder for ComfyUI; FAT32 ends at 4 GiB.
LARGEST_PART = 8_044_982_048
#: Windows without long paths: the longest path of a file, and of a folder with room for a short name in it.
#: https://learn.microsoft.com/windows/win32/fileio/maximum-file-path-limitation
MAX_PATH, MAX_FOLDER = 259, 247
#: What the store and Hugging Face's tools add to their folders at most, in characters: a model's longest part with the
#: name it has while it is written; `.cache\huggingface\download\`, a hash, a 64-digit etag and `.incomplete`.
STORE_ADDS, HUB_ADDS = 110, 135
#: The first hf-xet without the stalls: huggingface/xet-core#850.
XET = "1.5.2"
LONG_PATHS = (
    "New-ItemProperty HKLM:\\SYSTEM\\CurrentControlSet\\Control\\FileSystem -Name LongPathsEnabled -Value 1 "
    "-PropertyType DWORD -Force   # in PowerShell as administrator, then restart"
)


@check("disk-room")
def disk_room(model: Model, hardware: Hardware, system: System, files: tuple[FoundFile, ...]) -> Problem | None:
    """The disk of the models has room for what is still to come of the model."""
    disk = hardware.disks.get("models")
    if disk is None or (hardware.gpu is None and "cpu" not in model.devices):
        return None  # a model that cannot run here is not fetched
    wanted = min(sum(part.size or 0 for part in _lacking(model, layout, files)) for layout in model.layouts)
    need = max(0, wanted - system.part_files_bytes)
    if not need or disk.free_bytes >= need * (1 + SPARE):
        return None
    return Problem(
        f"not enough room for {model.name} on the disk of {disk.path}",
        f"{bytes_text(need * (1 + SPARE))} wanted for what is still to be fetched, {bytes_text(disk.free_bytes)} free.",
        f"make {bytes_text(need * (1 + SPARE) - disk.free_bytes)} of room there, or set KLEINCTL_HOME to a folder on "
        "another disk",
        name="disk-full",
        path=disk.path,
        ref="B06",
        evidence=(Evidence(disk.path, f"{bytes_text(disk.free_bytes)} free", bytes_text(need * (1 + SPARE))),),
    )


@check("downloads-left-over")
def downloads_left_over(model: Model, system: System, files: tuple[FoundFile, ...]) -> Problem | None:
    """No unfinished downloads of kleinctl lie about once a model is whole."""
    whole = any(not _lacking(model, layout, files) for layout in model.layouts)
    if model.is_packaged or not whole or system.part_files_bytes < LEFT_OVER:
        return None
    return Problem(
        f"kleinctl's unfinished downloads take {bytes_text(system.part_files_bytes)}",
        f"{model.name} is here whole and wants nothing of them; another model's download may go on with them.",
        "kleinctl doctor --fix",
        severity="warning",
        path=f"{system.home}/downloads",
        ref="B06",
        evidence=(Evidence("downloads", bytes_text(system.part_files_bytes), "nothing unfinished"),),
        remedy=Remedy("remove-partial-downloads", {}, "ask"),
    )


@check("file-too-large-for-disk")
def file_too_large_for_disk(hardware: Hardware) -> Problem | None:
    """The disk of the models can hold files of 8 GB."""
    disk = hardware.disks.get("models")
    if disk is None:
        raise CouldNotCheck("Nothing is known of the disk of the models.")
    if disk.max_file_bytes is None or disk.max_file_bytes > LARGEST_PART:
        return None
    return Problem(
        f"{disk.path} cannot hold the model's files",
        f"Its filesystem, {disk.filesystem}, ends at {bytes_text(disk.max_file_bytes)} a file; "
        f"one of {bytes_text(LARGEST_PART)} is wanted.",
        "set KLEINCTL_HOME to a folder on an NTFS, exFAT or ext4 disk",
        path=disk.path,
        ref="B07",
        evidence=(Evidence(disk.path, disk.filesystem, "a filesystem for files of 8 GB"),),
    )


@check("cache-room")
def cache_room(hub_cache: HubCache) -> Iterator[Problem]:
    """The disk of Hugging Face's cache has room for the rest of what is in it."""
    for repo in hub_cache.repos:
        need = max(0, repo.missing_bytes - repo.unfinished_bytes) * (1 + SPARE)
        if hub_cache.free_bytes is not None and need > hub_cache.free_bytes:
            yield Problem(
                f"not enough room for the rest of {repo.repo} in Hugging Face's cache",
                f"{bytes_text(need)} wanted, {bytes_text(hub_cache.free_bytes)} free on the disk of {hub_cache.path}. "
                "The hub's tools only warn of this, and then fail.",
                "set HF_HOME to a folder on another disk, before the program starts",
                name="disk-full",
                severity="warning",
                path=hub_cache.path,
                ref="B06",
                evidence=(Evidence(hub_cache.path, f"{bytes_text(hub_cache.free_bytes)} free", bytes_text(need)),),
            )


def _lacking(model: Model, layout: str, files: Sequence[FoundFile]) -> list[Part]:
    """The weights of a layout that neither the store nor the hub's cache has whole, from which they would be linked."""
    whole = [each for each in files if each.place in ("store", "hub-cache") and each.identity.whole]
    here = {each.content or f"{each.model}/{each.part}" for each in whole}
    here |= {f"{each.model}/{each.part}" for each in whole if each.part}
    sizes = {each.identity.size_bytes for each in whole if each.place == "hub-cache"}
    return [
        part
        for part in model.parts_for(layout)
        if part.role in ROLES and part.ref not in here and part.size not in sizes
    ]


@check("size-unknown")
def size_unknown(model: Model) -> Problem | None:
    """The size of every part is known before anything is fetched."""
    unknown = [part.name for layout in model.layouts for part in model.parts_for(layout) if part.size is None]
    if not unknown:
        return None
    return Problem(
        f"it is not known how much {model.name} takes",
        f"Wanted is the size of every part; the manifest has none for {', '.join(unknown[:3])}"
        f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}, so what is said of its size is too little.",
        f"kleinctl install --model {model.name} --dry-run   # shows what is known",
        severity="warning",
        ref="B17",
        evidence=(Evidence(f"the manifest of {model.name}", f"{len(unknown)} parts without a size", "none"),),
    )


@check("cache-on-other-disk")
def cache_on_other_disk(hub_cache: HubCache, hardware: Hardware, system: System) -> Problem | None:
    """Hugging Face's cache, where it has klein, is on the same disk as kleinctl's store."""
    if hub_cache.same_disk_as_home is not False or not any(repo.revision for repo in hub_cache.repos):
        return None
    windows = hardware.platform.lower().startswith("win")
    effect = "are copied, and take room twice" if windows else "are only linked to, and gone where that disk is away"
    beside = re.sub(r"[^\\/]+[\\/]*$", "", system.home)
    other = beside + (r"huggingface\hub" if windows else "huggingface/hub") if beside else "FOLDER"
    line = f'setx HF_HUB_CACHE "{other}"' if windows else shell("export", f"HF_HUB_CACHE={other}")
    return Problem(
        "Hugging Face's cache is on another disk than kleinctl's models",
        f"One disk is wanted, so that a file can be in both at no cost; the cache is {hub_cache.path}, and files taken "
        f"from it {effect}.",
        f"{line}   # then move what is in {hub_cache.path} there, or it is fetched again",
        severity="warning",
        path=hub_cache.path,
        ref="B08",
        evidence=(Evidence(hub_cache.path, "another disk than KLEINCTL_HOME", "the same disk"),),
        remedy=variable("HF_HUB_CACHE", other) if beside else None,
    )


@check("downloaded-twice")
def downloaded_twice(found_file: FoundFile) -> Problem | None:
    """No weights are on this machine twice."""
    found = found_file
    if not found.copy_of:
        return None
    return Problem(
        f"{found.path.name} is here twice, {bytes_text(found.identity.size_bytes)} each",
        f"One copy is wanted; the same bytes are at {found.copy_of} and at {found.path}, and neither is a link.",
        _remove(found),
        severity="warning",
        path=str(found.path),
        ref="B08",
        evidence=(Evidence(str(found.path), f"the content of {found.copy_of}", "one file, or two names of one"),),
        remedy=Remedy("share-file", {"path": str(found.path), "with": found.copy_of}, "ask"),
    )


def _remove(found: FoundFile) -> str:
    if found.place == "hub-cache":
        repo = re.search(r"models--([^/\\]+)", str(found.path))
        name = repo[1].replace("--", "/", 1) if repo else ""
        return f"hf cache rm model/{name}   # where no other program of yours reads it there"
    if "\\" in str(found.path):
        made = shell("mklink", "/H", found.path, found.copy_of, windows=True)
        return f"{shell('del', found.path, windows=True)} && {made}   # where both are on one disk"
    return f"{shell('ln', '-f', found.copy_of, found.path)}   # one file under both names, where both are on one disk"


@check("cache-incomplete")
def cache_incomplete(hub_cache: HubCache) -> Iterator[Problem]:
    """What Hugging Face's cache has of klein is whole."""
    for repo in hub_cache.repos:
        if lacks := list(_lacks(repo)):
            yield Problem(
                f"{repo.repo} is not whole in Hugging Face's cache",
                f"Wanted is every file of it; {'; '.join(lacks)}. Programs that load it offline stop at this.",
                _again(repo),
                severity="warning",
                path=repo.path,
                ref="B03" if repo.text_files else "B12" if repo.missing and not repo.unfinished else "B02",
                evidence=(Evidence(repo.path, "; ".join(lacks), "a whole snapshot"),),
                remedy=Remedy("complete-snapshot", {"path": repo.path}, "ask")
                if repo.revision and repo.model
                else None,
            )


def _again(repo: CachedRepo) -> str:
    """What fetches it: a file that is there is kept by the hub's tools, whatever it holds, unless they are forced."""
    whole, names = f"hf download {repo.repo}", shell(*repo.text_files)
    again = f"{whole} {names} --force-download"
    rest = repo.missing or repo.broken_links or repo.unfinished
    return f"{again} && {whole}" if names and rest else again if names else whole


def _lacks(repo: CachedRepo) -> Iterator[str]:
    if repo.missing:
        size = f" ({bytes_text(repo.missing_bytes)})" if repo.missing_bytes else ""
        yield f"{_some(repo.missing)} {'is' if len(repo.missing) == 1 else 'are'} missing{size}"
    if repo.broken_links:
        yield f"{_some(repo.broken_links)} {'leads' if len(repo.broken_links) == 1 else 'lead'} nowhere"
    if repo.unfinished:
        yield f"{len(repo.unfinished)} unfinished download{'s' * (len(repo.unfinished) > 1)} of " + bytes_text(
            repo.unfinished_bytes
        )
    if repo.text_files:
        yield f"{_some(repo.text_files)} hold{'s' * (len(repo.text_files) == 1)} a web page, a pointer or nothing"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@check("symlinks-not-allowed")
def symlinks_not_allowed(system: System) -> Problem | None:
    """This user may make symbolic links, which Hugging Face's cache is made of."""
    if system.symlinks is None:
        raise CouldNotCheck("Whether this user may make symbolic links is not known.")
    if system.symlinks or _on(system, "HF_HUB_DISABLE_SYMLINKS"):
        return None
    return Problem(
        "Windows does not let this user make symbolic links",
        "Hugging Face's cache wants them; without, it stops with WinError 1314 or keeps files twice. kleinctl's own "
        "store does without.",
        "setx HF_HUB_DISABLE_SYMLINKS 1   # or switch Developer Mode on: Settings, System, For developers",
        severity="warning",
        ref="B09",
        evidence=(Evidence("symbolic links", "refused", "allowed, or HF_HUB_DISABLE_SYMLINKS=1"),),
        remedy=variable("HF_HUB_DISABLE_SYMLINKS", "1"),
    )


@check("xet-stalls")
def xet_stalls(environment: Environment, system: System) -> Problem | None:
    """The hub's transfer library does not hang."""
    from packaging.version import InvalidVersion, Version

    found = environment.packages.get("hf-xet")
    if found is None:
        raise CouldNotCheck(f"hf-xet is not installed in {environment.name}.")
    try:
        if Version(found) >= Version(XET) or _on(system, "HF_HUB_DISABLE_XET"):
            return None
    except InvalidVersion:
        return None
    return Problem(
        f"hf-xet {found} of {environment.name} can hang while it downloads",
        f"{XET} or newer is wanted; {found} is known to stop at 0 % or 99 % without an error. kleinctl's own downloads "
        "do not use it.",
        f"{shell(environment.python, '-s', '-m', 'pip', 'install', f'hf-xet>={XET}')}   # or set HF_HUB_DISABLE_XET=1",
        severity="warning",
        path=str(environment.python),
        ref="B10",
        evidence=(Evidence("hf-xet", found, f">= {XET}"),),
        remedy=Remedy(
            "install-packages",
            {"python": str(environment.python), "packages": f"hf-xet>={XET}", "index": ""},
            "ask",
        ),
    )


@check("path-too-long")
def path_too_long(system: System) -> Problem | None:
    """Windows can hold the paths of kleinctl's files."""
    _on_windows(system)
    if system.long_paths or len(system.home) + STORE_ADDS <= MAX_PATH:
        return None
    return _too_long(system.home, STORE_ADDS, "set KLEINCTL_HOME to a shorter folder, such as C:\\klein")


@check("cache-path-too-long")
def cache_path_too_long(system: System, hub_cache: HubCache) -> Problem | None:
    """Windows can hold the paths of Hugging Face's cache."""
    _on_windows(system)
    if system.long_paths or len(hub_cache.path) + HUB_ADDS <= MAX_FOLDER:
        return None
    return _too_long(hub_cache.path, HUB_ADDS, "set HF_HOME to a shorter folder, such as C:\\hf")


def _on_windows(system: System) -> None:
    if system.long_paths is None:
        raise CouldNotCheck("Paths have this limit on Windows alone.")


def _too_long(folder: str, adds: int, shorter: str) -> Problem:
    return Problem(
        f"paths in {folder} are too long for Windows",
        f"At most {MAX_PATH} characters are wanted; the folder has {len(folder)}, files in it add up to {adds}, and "
        "long paths are switched off.",
        f"{shorter}; or: {LONG_PATHS}",
        name="path-too-long",
        path=folder,
        ref="B11",
        evidence=(Evidence("LongPathsEnabled", "0", "1"), Evidence(folder, f"{len(folder)} characters")),
    )


@check("endpoint-malformed")
def endpoint_malformed(system: System, hardware: Hardware) -> Problem | None:
    """HF_ENDPOINT, where it is set, is a web address."""
    address = system.variables.get("HF_ENDPOINT", "")
    if not address or _is_address(address):
        return None
    return Problem(
        "HF_ENDPOINT is no web address",
        f"An address like {HUB} is wanted, with http:// or https://; it holds {address[:80]!r}.",
        without("HF_ENDPOINT", hardware),
        ref="B12",
        evidence=(Evidence("HF_ENDPOINT", address[:80], "https://…"),),
        remedy=variable("HF_ENDPOINT"),
    )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@check("offline")
def offline(model: Model, system: System, files: tuple[FoundFile, ...], hardware: Hardware) -> Problem | None:
    """The network is not switched off while files are missing."""
    named = next((name for name in ("KLEINCTL_OFFLINE", "HF_HUB_OFFLINE") if _on(system, name)), None)
    lacking = min((_lacking(model, layout, files) for layout in model.layouts), key=len)
    lacking = [part for part in lacking if not any(source.package for source in part.sources)]
    if named is None or not lacking:
        return None
    return Problem(
        f"offline, and not here: {_some([part.name for part in lacking])}",
        f"{model.name} wants {len(lacking)} more file{'s' * (len(lacking) > 1)}; {named} keeps them from coming.",
        without(named, hardware),
        severity="warning",
        ref="B12",
        evidence=(Evidence(named, system.variables[named], "unset"),),
        remedy=variable(named),
    )


@check("certificates-known")
def certificates_known(system: System) -> Problem | None:
    """A certificate of one's own is told to every program that downloads."""
    bundle = next((n for n in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if system.variables.get(n)), None)
    if bundle is None or system.variables.get("SSL_CERT_FILE") or system.variables.get("SSL_CERT_DIR"):
        return None
    return Problem(
        f"{bundle} is set and SSL_CERT_FILE is not",
        "Connections of this network seem to be signed by a certificate of its own. kleinctl reads both variables; "
        "huggingface-hub reads SSL_CERT_FILE alone, and without it 1.x trusts nobody new, 2.x whom the system trusts.",
        f"export SSL_CERT_FILE={system.variables[bundle]}",
        name="tls-not-trusted",
        severity="warning",
        ref="B13",
        evidence=(Evidence("SSL_CERT_FILE", "unset", f"as {bundle}"),),
        remedy=variable("SSL_CERT_FILE", system.variables[bundle]),
    )


@check("hf-transfer-left-over")
def hf_transfer_left_over(environment: Environment, system: System) -> Problem | None:
    """HF_HUB_ENABLE_HF_TRANSFER, of old guides, is not set."""
    hub = environment.packages.get("huggingface-hub", "")
    if not hub or not _on(system, "HF_HUB_ENABLE_HF_TRANSFER"):
        return None
    stops = hub.startswith("0.") and "hf-transfer" not in environment.packages
    effect = "and every download stops, for that is not installed" if stops else "which newer ones ignore"
    return Problem(
        f"HF_HUB_ENABLE_HF_TRANSFER is set, and {environment.name} has huggingface-hub {hub}",
        f"The variable is wanted unset; it asks for the package hf_transfer, {effect}. Xet has taken its place.",
        "unset HF_HUB_ENABLE_HF_TRANSFER   # and take it out of your start scripts",
        severity="error" if stops else "warning",
        path=str(environment.python),
        ref="B15",
        evidence=(Evidence("HF_HUB_ENABLE_HF_TRANSFER", system.variables["HF_HUB_ENABLE_HF_TRANSFER"], "unset"),),
        remedy=variable("HF_HUB_ENABLE_HF_TRANSFER"),
    )


def _on(system: System, variable: str) -> bool:
    return system.variables.get(variable, "").lower() in ("1", "true", "yes", "on")
