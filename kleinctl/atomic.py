"""Text files that are written whole or not at all: on a full disk, what was there stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 over what is at `path`; a link is followed, and a device or a pipe takes the text as it comes.

    Raises:
        OSError: it cannot be written.
    """
    if is_stream(path):
        path.write_text(text, encoding="utf-8", errors=errors)
        return
    target = path.resolve()
    unfinished = beside(target)
    try:
        unfinished.write_text(text, encoding="utf-8", errors=errors)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def try_writing(path: Path) -> None:
    """Make the folder of `path` and see whether the file can be written, without touching what is there.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if is_stream(path):
        return
    unfinished = beside(path.resolve())
    unfinished.write_bytes(b"")
    unfinished.unlink()


def is_stream(path: Path) -> bool:
    """Whether something is there that is no file, as /dev/stdout."""
    return path.exists() and not path.is_file()


def beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
