"""One store on disk: where a part goes, whether it is there and right, and how a copy gets there without a second copy.

A model lies in `KLEINCTL_HOME/models/<model>/<layout>/`, each part where its manifest wants it. What has been hashed is
remembered in `KLEINCTL_HOME/verified.json`, which is also the list of what kleinctl put there.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from kleinctl import atomic, manifest
from kleinctl.home import home, models_folder, quarantine_folder
from kleinctl.problem import KleinctlError, Problem, shell
from kleinctl.units import MIB, bytes_text

if TYPE_CHECKING:
    from kleinctl.manifest import Part

CHUNK = MIB
#: Bytes. Smaller files are copied: they cost nothing, and people edit them in place, which a link would carry over.
LINK_FROM = MIB
#: Bytes. The largest file FAT32 holds is one byte below 4 GiB (facts: a file's size has 32 bits).
FAT32_LIMIT = 2**32 - 1
#: Linux `ioctl` that shares a file's blocks, from <linux/fs.h>.
FICLONE = 0x40049409
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))

State = Literal["absent", "verified", "unchecked", "wrong"]
How = Literal["hardlink", "reflink", "symlink", "copy"]


# Where a part goes


def model_folder(model: str, layout: str) -> Path:
    """The folder of `model` in the form a backend reads.

    A link in its place, or in that of the folder above, is followed: no manifest makes one there, so it is the user's.
    """
    return confined(confined(models_folder(), model), layout)


def destination(model: str, layout: str, part: Part) -> Path:
    """Where `part` goes.

    Raises:
        KleinctlError: the manifest points out of the model's folder.
    """
    return confined(model_folder(model, layout), part.to[layout])


def confined(folder: Path, relative: str) -> Path:
    """`folder / relative`, for a path with forward slashes that came from a manifest.

    Raises:
        KleinctlError: it would lie outside `folder`, by `..`, a drive letter or a symbolic link.
    """
    refused = manifest.confined(relative)
    path = folder / relative
    if not refused and inside(path.parent, folder):
        return path
    what, why = f"{relative!r} points out of {folder}", "A path in a manifest has to stay in the model's own folder"
    if refused:
        why, fix = f"{why}; this has {refused}.", "report it to whoever wrote the manifest, and do not install it"
    else:
        why = f"{why}; a link on this disk leads from {path.parent} to {path.parent.resolve()}."
        fix = f"link {folder} as a whole, or set KLEINCTL_HOME to a folder on the other disk"
    raise KleinctlError(Problem(what, why, fix, name="path-outside-folder", path=str(path)))


def inside(path: Path, folder: Path) -> bool:
    """Whether `path` is in `folder` once symbolic links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


# What has been verified


@dataclass(frozen=True)
class Stamp:
    """What a file was like when it was hashed. Bytes, nanoseconds, inode number, hexadecimal sha256."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str


#: Of a file that has to be hashed again: no file is like this.
UNKNOWN = Stamp(-1, 0, 0, "")


class Stamps:
    """The memory of hashed files, so that 16 GB are not hashed twice. A file that has changed since is not known."""

    def __init__(self) -> None:
        self._file = home() / "verified.json"
        self._stamps = _read_stamps(self._file)

    def sha256(self, path: Path) -> str | None:
        """The hash of `path`, if it was hashed before and has not changed."""
        stamp = self._stamps.get(_key(path))
        return stamp.sha256 if stamp and stamp == _stamp(path, stamp.sha256) else None

    def put(self, path: Path, sha256: str) -> None:
        """Remember that `path` has this hash."""
        stamp = _stamp(path, sha256)
        if stamp:
            self._stamps[_key(path)] = stamp
        self.prune()

    def drop(self, path: Path) -> None:
        """Forget the hash of `path`, so that it is hashed again: for one who found that the file is not right.

        That kleinctl put it there is not forgotten.
        """
        if _key(path) in self._stamps:
            self._stamps[_key(path)] = UNKNOWN
        self.prune()

    def under(self, folder: Path) -> list[Path]:
        """The files in `folder` that were hashed, there or not."""
        return [path for path in map(_path, self._stamps) if path.is_relative_to(folder)]

    def having(self, sha256: str) -> list[Path]:
        """The unchanged files with this hash."""
        return [path for path in map(_path, self._stamps) if self.sha256(path) == sha256]

    def prune(self) -> None:
        """Forget files that are gone. A link to a disk that is not there now is kept: kleinctl made it."""
        self._stamps = {key: stamp for key, stamp in self._stamps.items() if os.path.lexists(_path(key))}
        files = {key: asdict(stamp) for key, stamp in sorted(self._stamps.items())}
        write_json(self._file, {"schema": "kleinctl.verified/1", "files": files})


def _read_stamps(file: Path) -> dict[str, Stamp]:
    """The stamps in `file`; none where it is missing or damaged, for then all is hashed again."""
    try:
        return {key: Stamp(**value) for key, value in read_json(file).get("files", {}).items()}
    except (TypeError, AttributeError):
        return {}


def _stamp(path: Path, sha256: str) -> Stamp | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return Stamp(facts.st_size, facts.st_mtime_ns, facts.st_ino, sha256)


def _key(path: Path) -> str:
    """How `verified.json` writes a path: relative to `KLEINCTL_HOME` where it can be, so that the folder may move."""
    return path.relative_to(home()).as_posix() if path.is_relative_to(home()) else str(path)


def _path(key: str) -> Path:
    return home() / key  # an absolute key stays as it is


def state(path: Path, accepted: Sequence[Part], stamps: Stamps) -> State:
    """Whether one of the `accepted` parts is at `path`. Opens nothing: `unchecked` has a right size and no stamp."""
    if not path.exists():
        return "absent"
    if not path.is_file() or not {None, path.stat().st_size} & {part.size for part in accepted}:
        return "wrong"
    known = stamps.sha256(path)
    if known is None:
        return "unchecked"
    return "verified" if {None, known} & {part.sha256 for part in accepted} else "wrong"


# A copy that is on this machine already


def copies(part: Part, stamps: Stamps, folders: Iterable[Path] = ()) -> Iterator[Path]:
    """Files that may be `part`: in our store, the hub's cache, and (large ones only) under `folders`.

    Likeliest first, each of the right size, none of them hashed here. None for a part whose size or sha256 is unknown.
    """
    if part.sha256 is None or part.size is None:
        return
    seen: set[Path] = set()
    for path in _places(part, stamps, folders):
        known = stamps.sha256(path)
        if path not in seen and known in (None, part.sha256) and _has_size(path, part.size):
            yield path
        seen.add(path)


def _places(part: Part, stamps: Stamps, folders: Iterable[Path]) -> Iterator[Path]:
    assert part.sha256
    yield from stamps.having(part.sha256)
    cache = hub_cache()
    for source in part.sources:
        if source.repo:
            snapshots = cache / f"models--{source.repo.replace('/', '--')}" / "snapshots"
            yield snapshots / (source.revision or "main") / source.path
            yield from snapshots.glob(f"*/{source.path}")
    yield from cache.glob(f"models--*/blobs/{part.sha256}")
    if (part.size or 0) >= LINK_FROM:
        names = {PurePosixPath(name).name for name in (part.name, *part.to.values())}
        found = [path for folder in folders for path in _files(folder)]
        yield from sorted(found, key=lambda path: path.name not in names)


def _files(folder: Path) -> Iterator[Path]:
    """Weights files below `folder`, links followed as ComfyUI does: people keep weights on another disk."""
    seen: set[str] = set()
    for parent, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder around it
            below.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in names if name.endswith((".safetensors", ".sft", ".gguf")))


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def hub_cache() -> Path:
    """The cache of huggingface-hub, found as that library finds it (its `constants.py`), read now and not at import."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(os.path.expandvars(given)).expanduser()
    hf_home = os.environ.get("HF_HOME")
    if hf_home:
        return Path(os.path.expandvars(hf_home)).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


# Getting a file into place


def place(source: Path, target: Path) -> How:
    """Put a verified file at `target` without a second copy, where the disk allows: hard link, reflink, symlink, copy.

    Linking is safe for large files: nobody of ours writes to a part, the hub's cache never changes a blob, removing one
    name leaves the other, and whatever else happens to the file shows in its stamp. Small files are copied. `target`
    appears whole or not at all.

    Raises:
        KleinctlError: the folder cannot be written, or the disk is full.
    """
    source = source.resolve()
    ways = (_hardlink, _reflink, _symlink, _copy) if source.stat().st_size >= LINK_FROM else (_copy,)
    make_folder(target.parent)
    with writing(target):
        beside = _beside(target)
        try:
            for way in ways:
                with contextlib.suppress(FileNotFoundError):
                    beside.unlink()
                try:
                    way(source, beside)
                    break
                except (OSError, NotImplementedError):
                    if way is _copy:
                        raise
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)  # renaming one hard link onto another leaves both
    sync_folder(target.parent)
    how: How = way.__name__.strip("_")  # type: ignore[assignment]
    return how


def _beside(target: Path) -> Path:
    """Where `target` is written until it is whole. What a kleinctl that was killed left there is removed: gigabytes."""
    import psutil

    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid == str(os.getpid()) or not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            left.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def can_link(source: Path, target: Path) -> bool:
    """Whether `place` will likely link. On POSIX it always can (symbolic links cross disks), on Windows on one disk."""
    return source.stat().st_size >= LINK_FROM and (os.name == "posix" or disk(source.resolve()) == disk(target))


def _hardlink(source: Path, target: Path) -> None:
    os.link(source, target)


def _reflink(source: Path, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        raise NotImplementedError from None
    with source.open("rb") as old, target.open("xb") as new:
        fcntl.ioctl(new, FICLONE, old.fileno())


def _symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, CHUNK)
        new.flush()
        os.fsync(new.fileno())


def move(source: Path, target: Path) -> None:
    """Move a verified file of ours to `target`, by renaming, or by a copy beside it where that is another disk.

    Raises:
        KleinctlError: the folder cannot be written, or the disk is full.
    """
    make_folder(target.parent)
    with writing(target):
        try:
            source.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            beside = _beside(target)
            try:
                if source.is_symlink():  # what it leads to stays where it is
                    beside.symlink_to(source.readlink())
                else:
                    _copy(source, beside)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
            source.unlink()
    sync_folder(target.parent)


def quarantine(path: Path, *, name: str, wanted: str, found: str, source: str) -> tuple[Path, str]:
    """Move a file that is not what it should be out of the way, with the reason in a JSON file beside it.

    `source` says where it came from, `wanted` and `found` what was expected and what it is. Returns its new place, and
    what its header looks like.

    Raises:
        KleinctlError: it cannot be moved.
    """
    from kleinctl.identify import identify

    looks = identify(path)
    folder = make_folder(quarantine_folder())
    tag = hashlib.sha256(f"{found} {source}".encode()).hexdigest()[:8]
    kept = folder / f"{PurePosixPath(name).name}.{tag}"
    with writing(kept):
        shutil.move(path, kept)
    reason = {
        "schema": "kleinctl.quarantine/1",
        "name": name,
        "wanted": wanted,
        "found": found,
        "source": source,
        "looks_like": looks.saw,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(kept.with_name(kept.name + ".json"), reason)
    return kept, looks.saw


# The disk


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk may answer while `path` is written into a Problem."""
    try:
        yield
    except OSError as error:
        raise KleinctlError(disk_problem(error, path)) from None


def disk_problem(error: OSError, path: Path) -> Problem:
    """What it means that `path` could not be written."""
    folder, reason = path.parent, os.strerror(error.errno) if error.errno else str(error.strerror)
    move = "set KLEINCTL_HOME to a folder on another disk"
    if error.errno in FULL or getattr(error, "winerror", None) in (39, 112):
        name, ref, what = "disk-full", "B06", f"the disk is full, {path.name} could not be written"
        free = bytes_text(free_bytes(folder))
        why = f"Room for all of it is wanted; {free} are free in {folder}. What is there is kept."
        fix = f"make room there, or {move}; then run the same command again: it goes on where it stopped"
    elif error.errno == errno.EFBIG:
        name, ref, what = "file-too-large-for-disk", "B07", f"{path.name} is too large for this disk"
        why = f"The disk of {folder} does not take files this large (FAT32 ends at 4 GiB)."
        fix = "set KLEINCTL_HOME to a folder on an NTFS, exFAT or ext4 disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        name, ref, what = "folder-not-writable", None, f"{path.name} cannot be written"
        why = f"{folder} has to be writable; the system says: {reason}."
        fix = f"check who owns {folder}, or set KLEINCTL_HOME to another folder"
    else:
        name, ref, what = "disk-error", None, f"{path.name} cannot be written"
        why = f"A working disk is wanted; the system says of {folder}: {reason}."
        fix = f"check the disk, or {move}"
    return Problem(what, why, fix, name=name, path=str(path), ref=ref)


def no_folder(folder: Path) -> Problem | None:
    """What is in the way of `folder`: a file, or a link to a disk that is not there now. None where nothing is."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if there.is_dir():
        return None
    what, why = f"{there} is no folder", "A folder is wanted there; it is a file."
    fix = shell("move" if os.name == "nt" else "mv", there, there.with_name(f"{there.name}.old"))
    if there.is_symlink() and not there.exists():
        why = f"A folder is wanted there; it is a link to {there.readlink()}, which is not there now."
        fix = "connect or mount the disk that it leads to, or remove the link; then run the same command again"
    return Problem(what, why, fix, name="disk-error", path=str(there))


def make_folder(folder: Path) -> Path:
    """`folder`, made where it is missing.

    Raises:
        KleinctlError: it cannot be made.
    """
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            blocked = no_folder(folder)
            if blocked is None:
                raise
            raise KleinctlError(blocked) from None
    return folder


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Bytes free for us on the disk that `folder` is or will be on."""
    return shutil.disk_usage(existing_parent(folder)).free


def disk(folder: Path) -> int:
    """The number of the disk that `folder` is or will be on."""
    return existing_parent(folder).stat().st_dev


def is_fat32(folder: Path) -> bool:
    """Whether the disk of `folder` is FAT32, and so holds no file above `FAT32_LIMIT`."""
    import psutil

    place = existing_parent(folder).resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=False) if place.is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype.lower() in ("vfat", "msdos", "fat32", "fat")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where the file is missing or damaged."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document` whole or not at all.

    Raises:
        KleinctlError: it cannot be written.
    """
    make_folder(path.parent)
    with writing(path):
        atomic.write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can (Windows cannot)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(handle)
        os.close(handle)


# One install at a time


@contextlib.contextmanager
def locked(waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `KLEINCTL_HOME`. Calls `waiting(sentence)` once if another process has it, then waits.

    The system frees the lock when its process ends, however it ends.

    Raises:
        KleinctlError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder = make_folder(home())
    lock, owner = FileLock(folder / "install.lock"), folder / "install.pid"
    with writing(folder / "install.lock"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting(f"waiting for another kleinctl{_pid(owner)} to finish")
            lock.acquire(poll_interval=0.1)
    try:
        with contextlib.suppress(OSError):  # a full disk must not keep an uninstall from making room
            owner.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _pid(owner: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (pid {int(owner.read_text(encoding='ascii'))})"
    return ""
