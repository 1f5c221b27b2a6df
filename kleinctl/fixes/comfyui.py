"""Fixes of a ComfyUI: its version, its custom nodes, the arguments it is started with, the memory that it holds."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kleinctl.checks.remedies import free_line
from kleinctl.facts import comfyui as facts
from kleinctl.fixes import git, texts
from kleinctl.fixes.pip import command, versions
from kleinctl.fixes.request import UNKNOWN, Plan, Request
from kleinctl.home import quarantine_folder
from kleinctl.journal import Cloned, Commit, Moved, Packages, Progress, Record, log_file
from kleinctl.problem import KleinctlError, shell

#: ComfyUI's own repository, which was renamed.
REPOSITORIES = ("https://github.com/Comfy-Org/ComfyUI", "https://github.com/comfyanonymous/ComfyUI")
#: What may be taken out of a start script or put into one: arguments of ComfyUI's comfy/cli_args.py.
ARGUMENTS = (
    "--cache-classic",
    "--cuda-malloc",
    "--disable-cuda-malloc",
    "--disable-dynamic-vram",
    "--fast fp8_matrix_mult",
    "--force-fp16",
    "--fp16-vae",
    "--supports-fp8-compute",
    "--use-sage-attention",
    "--use-split-cross-attention",
    "fp8_matrix_mult",
)
#: Seconds that a server may take to answer, and to let its memory go after that; bytes of an answer that are read.
ANSWER, RELEASE, MAX_ANSWER = 5.0, 10.0, 2**16
RESTART = "ComfyUI has to be started again to notice"


# Its code, and that of its custom nodes


def update_comfyui(request: Request, repositories: Sequence[str] = REPOSITORIES) -> Plan:
    """`update-comfyui`: a git checkout forward to the newest commit, and what its requirements.txt lists then."""
    folder = request.path("path")
    found = facts.read(folder)
    if found is None or Path(found.path) != folder or found.layout not in ("checkout", "portable"):
        raise request.refuse(f"{folder} is not where a ComfyUI's program lies")
    if found.layout == "portable":
        script = folder.parent / "update" / "update_comfyui.bat"
        raise request.refuse(f"a portable ComfyUI is updated by its own script, {script}")
    return _forward(request, folder, repositories, found, f" (ComfyUI {found.version})" if found.version else "")


def update_node(request: Request, packs: Iterable[Mapping[str, Any]] | None = None) -> Plan:
    """`update-node`: the git checkout of a known pack of custom nodes, in the same way."""
    folder, found = _node(request, "path")
    if not folder.is_dir():
        raise request.refuse(f"{folder} is not there")
    addresses = [pack["address"] for pack in _packs(packs) if _is(pack, folder)]
    if not addresses:
        raise request.refuse(f"{folder.name} is no pack that kleinctl knows the repository of")
    return _forward(request, folder, addresses, found, "")


def _forward(request: Request, folder: Path, addresses: Sequence[str], found: facts.ComfyUI, version: str) -> Plan:
    """The plan to move a checkout forward along its branch."""
    branch = _branch(request, folder, addresses)
    commit = git.newest(branch.remote, branch.ref, folder)
    if commit == branch.commit:
        raise request.refuse(f"{folder} is at {branch.address}'s newest commit already, {commit[:10]}")
    python = _python(found)

    def work(record: Record, progress: Progress) -> None:
        if _branch(request, folder, addresses) != branch:
            raise request.refuse(f"{folder} was changed meanwhile")
        progress(f"fetching {branch.address}")
        step = Commit("commit", str(folder), branch.name, branch.commit, commit)
        record.perform(step, branch.remote, branch.ref)
        _require(record, step, folder, python, progress)

    return request.plan(
        f"move {folder}{version} forward on {branch.name}, from commit {branch.commit[:10]} to {commit[:10]}"
        f" of {branch.address}",
        *_told(folder, python),
        work=work,
        commands=(shell("git", "-C", folder, "pull", "--ff-only"), *_pip_by_hand(folder, python)),
        **UNKNOWN,
    )


def _branch(request: Request, folder: Path, addresses: Sequence[str]) -> git.Branch:
    try:
        return git.branch(folder, addresses)
    except ValueError as error:
        raise request.refuse(str(error)) from None


def install_node(request: Request, packs: Iterable[Mapping[str, Any]] | None = None) -> Plan:
    """`install-node`: a pack of kleinctl's own table cloned into `custom_nodes`, and what it requires."""
    folder, found = _node(request, "path")
    address = request.text("repository")
    if not any(pack["address"] == address and _is(pack, folder) for pack in _packs(packs)):
        raise request.refuse(f"{address} is no repository that kleinctl knows for {folder.name}")
    if os.path.lexists(folder):
        raise request.refuse(f"{folder} exists already")
    if not folder.parent.is_dir():
        raise request.refuse(f"{folder.parent} is not there")
    commit, python = git.newest(address, "HEAD"), _python(found)
    kept = quarantine_folder() / f"{folder.name}-{commit[:8]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"

    def work(record: Record, progress: Progress) -> None:
        progress(f"cloning {address}")
        step = Cloned("cloned", str(folder), str(kept))
        record.perform(step, address)
        _require(record, step, folder, python, progress)

    return request.plan(
        f"clone {address}, at commit {commit[:10]}, into {folder}",
        *_told(folder, python),
        work=work,
        commands=(shell("git", "clone", address, folder), *_pip_by_hand(folder, python)),
        **UNKNOWN,
    )


def switch_node(request: Request) -> Plan:
    """`switch-node`: a pack of custom nodes switched off by its folder's name, or on again."""
    (folder, _), (to, _) = _node(request, "path"), _node(request, "to")
    off = to.name == f"{folder.name}.disabled"
    if folder.parent != to.parent or not (off or folder.name == f"{to.name}.disabled"):
        raise request.refuse(f"{to} is not {folder} with .disabled behind its name, or without")
    if not folder.is_dir():
        raise request.refuse(f"{folder} is not there")
    if os.path.lexists(to):
        raise request.refuse(f"{to} exists already")
    step = Moved("moved", str(folder), str(to))
    return request.plan(
        f"rename {folder} to {to.name}, which ComfyUI {'leaves out' if off else 'loads'}; {RESTART}",
        work=lambda record, progress: record.perform(step, None),
        commands=(shell("move" if os.name == "nt" else "mv", folder, to),),
    )


def _node(request: Request, name: str) -> tuple[Path, facts.ComfyUI]:
    """An argument that is a folder in a ComfyUI's `custom_nodes`, and that ComfyUI."""
    folder = request.path(name)
    root = folder.parent.parent
    found = facts.read(root) if folder.parent.name == "custom_nodes" else None
    if folder.is_symlink():
        raise request.refuse(f"{folder} is a link, to {folder.resolve()}")
    if found is None or found.layout == "models" or Path(found.path) != root:
        raise request.refuse(f"{folder} is no place of a custom node of a ComfyUI")
    return folder, found


def _packs(packs: Iterable[Mapping[str, Any]] | None) -> Iterable[Mapping[str, Any]]:
    return facts.catalogue()["pack"] if packs is None else packs


def _is(pack: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder has the name of a pack; its letters' case is the user's."""
    return folder.name.lower() in (pack["id"], pack["title"].lower())


# What they require


def _python(found: facts.ComfyUI) -> Path | None:
    return Path(found.python) if found.python else None


def _require(record: Record, step: Commit | Cloned, folder: Path, python: Path | None, progress: Progress) -> None:
    """Install what is listed. Where that fails, `step` is undone: new code with old packages would not start."""
    listed = folder / "requirements.txt"
    if python is None or not listed.is_file():
        return
    packages = Packages("packages", str(python), versions(python))
    try:
        record.perform(packages, ("install", "-r", str(listed)), log_file("fix"), progress)
    except KleinctlError:
        step.undo(progress)
        raise


def _told(folder: Path, python: Path | None) -> tuple[str, str]:
    """What the plan says of packages."""
    if python is None:
        return f"leave what its requirements.txt lists to you: no Python was found beside {folder}", RESTART
    return f"install what its requirements.txt lists, where it has one, into {python}", RESTART


def _pip_by_hand(folder: Path, python: Path | None) -> tuple[str, ...]:
    return (shell(*command(python or Path("python"), "install", "-r", str(folder / "requirements.txt"))),)


# The arguments it is started with


def edit_start_script(request: Request) -> Plan:
    """`edit-start-script`: an argument out of the script that starts ComfyUI (or the Desktop app's settings), or in."""
    path = request.path("path")
    remove, add = request.text("remove"), request.text("add")
    if {remove, add} - {"", *ARGUMENTS} or remove == add:
        raise request.refuse(f"{remove or 'nothing'} for {add or 'nothing'} is no change of arguments that is known")
    settings = path.name == "comfy.settings.json"
    found = facts.read(path.parents[2] if settings and len(path.parents) > 2 else path.parent)
    if path.is_symlink():
        raise request.refuse(f"{path} is a link, to {path.resolve()}")
    if found is None or found.script != str(path):
        raise request.refuse(f"{path} is not what starts a ComfyUI")
    raw = texts._read_bytes(request, path) or b""
    try:
        before = raw.decode("utf-8")
        after = (_in_settings if settings else _in_script)(before, remove, add)
    except ValueError:
        raise request.refuse(f"{path} is written in a way that kleinctl cannot change") from None
    wanted = _wanted(found.arguments, remove, add, last=settings)
    if wanted is None or after == before or facts.arguments_in(path.name, after) != wanted:
        raise request.refuse(f"{path} is written in a way that kleinctl cannot change")
    return texts._writing(request, path, after, (f"write {path}:", *texts._changes(raw, after), RESTART))


def _wanted(arguments: tuple[str, ...], remove: str, add: str, last: bool) -> tuple[str, ...] | None:
    """The arguments as they should be then; None where what should go is not among them."""
    words = tuple(remove.split())
    at = next((at for at in range(len(arguments)) if arguments[at : at + len(words)] == words), None)
    if words and at is None:
        return None
    left = arguments[:at] + arguments[(at or 0) + len(words) :] if words else arguments
    return (*left, *add.split()) if last else (*add.split(), *left)


def _in_script(script: str, remove: str, add: str) -> str:
    """The text with the argument gone from every line that is no comment, and the other behind `main.py`."""
    words = r"[ \t]+".join(map(re.escape, remove.split()))
    gone = re.compile(rf"(?:[ \t]+|(?<=[=\"'])){words}(?![^\s\"'])")
    lines = script.splitlines(keepends=True)
    for at, line in enumerate(lines):
        if not re.match(r"\s*(?:#|rem\b|::)", line, re.IGNORECASE):
            line = gone.sub("", line) if remove else line
            lines[at] = re.sub(r"(\bmain\.py[\"']?)", rf"\1 {add}", line, count=1) if add else line
    return "".join(lines)


def _in_settings(text: str, remove: str, add: str) -> str:
    """The Desktop app's settings with the argument gone and the other there.

    Raises:
        ValueError: they are no settings.
    """
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("no settings")
    arguments = document.setdefault("Comfy.Server.LaunchArgs", {})
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    key, _, value = remove.removeprefix("--").partition(" ")
    if remove and arguments.get(key) == value:
        del arguments[key]
    if add:
        arguments[add.removeprefix("--")] = ""
    return texts._laid_out(json.dumps(document, indent=4, ensure_ascii=False), text.encode("utf-8"))


# The memory it holds


def free_comfyui(request: Request) -> Plan:
    """`free-comfyui`: a ComfyUI on this machine, which does nothing, lets its models go."""
    url = request.text("url")
    found = re.fullmatch(r"http://(?:127\.0\.0\.1|localhost):([0-9]{1,5})", url)
    port = int(found[1]) if found else 0
    if not 0 < port < 2**16:
        raise request.refuse(f"{url} is no server on this machine")
    _idle(request, port)

    def work(record: Record, progress: Progress) -> None:
        held = _idle(request, port)
        _ask(request, port, "POST", "/free", {"unload_models": True, "free_memory": True})
        progress("waiting for its memory")
        end = time.monotonic() + RELEASE
        while _free(request, port) <= held and time.monotonic() < end:
            time.sleep(0.25)

    return request.plan(
        f"ask the ComfyUI at {url} to unload its models, which it loads again when it next runs",
        work=work,
        commands=(free_line(port),),
        seconds=RELEASE,
        why_not_undoable="ComfyUI loads its models again by itself when it next runs.",
        outside=True,
    )


def _idle(request: Request, port: int) -> int:
    """The bytes that are free on its card, when what answers is a ComfyUI without work."""
    free, told = _free(request, port), _ask(request, port, "GET", "/prompt").get("exec_info")
    waiting = told.get("queue_remaining") if isinstance(told, dict) else None
    if waiting != 0:
        raise request.refuse(f"the ComfyUI at port {port} is at work ({waiting} in its queue)")
    return free


def _free(request: Request, port: int) -> int:
    answer = _ask(request, port, "GET", "/system_stats")
    if not isinstance(answer.get("system"), dict) or "comfyui_version" not in answer["system"]:
        raise request.refuse(f"what answers at port {port} is no ComfyUI")
    devices = answer.get("devices")
    return sum(int(each.get("vram_free") or 0) for each in devices or () if isinstance(each, dict))


def _ask(request: Request, port: int, method: str, path: str, body: object = None) -> dict[str, Any]:
    """What a server on this machine answers, never by a proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        raw = answer.read(MAX_ANSWER)
        if answer.status >= 300:
            raise request.refuse(f"the server at port {port} answers {path} with {answer.status}")
        found = json.loads(raw) if method == "GET" else {}
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise request.refuse(f"the server at port {port} does not answer {path} ({type(error).__name__})") from None
    finally:
        connection.close()
    return found if isinstance(found, dict) else {}
