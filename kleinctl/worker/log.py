"""The log of a worker, as the control process keeps it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import IO

from kleinctl.home import logs_folder
from kleinctl.logs import readable
from kleinctl.problem import KleinctlError, Problem

#: Logs that are kept, the longest line in one, and the most that one worker may write, in bytes.
LOGS_KEPT, LINE_BYTES, FILE_BYTES = 20, 4000, 16 * 2**20


class WorkerLog:
    """Copies a worker's stderr to a file in the logs folder, in bounded lines, and remembers the last ones."""

    def __init__(self, source: IO[bytes], pid: int) -> None:
        folder = logs_folder()
        self.path = folder / f"worker-{time.strftime('%Y%m%d-%H%M%S')}-{pid}.log"
        self.tail: deque[str] = deque(maxlen=100)
        self._room = FILE_BYTES
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise KleinctlError(
                Problem(
                    f"{self.path} cannot be written",
                    f"It was to be the worker's log: {error.strerror}.",
                    "kleinctl doctor",
                    name="log-unwritable",
                    path=str(self.path),
                )
            ) from None
        for old in sorted(folder.glob("worker-*.log"), key=lambda path: path.name)[:-LOGS_KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()
        self._thread = threading.Thread(target=self._copy, args=(source,), daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Add one line; a disk that is full ends the file, but not the copying, or the worker would wait for ever."""
        with self._writing:
            self.tail.extend(readable(line.decode("utf-8", "replace").rstrip("\n")))
            if self._room > 0 and not self._file.closed:
                self._room -= len(line)
                try:
                    self._file.write(line if self._room > 0 else b"[this log is full]\n")
                except OSError:
                    self._room = 0

    def join(self) -> None:
        """Wait until all that the worker has said is in the file."""
        self._thread.join(1.0)  # longer only if something that escaped holds the pipe open

    def _copy(self, source: IO[bytes]) -> None:
        inside = False  # a line that was too long, and is cut
        while piece := source.readline(LINE_BYTES):
            cut = len(piece) == LINE_BYTES and not piece.endswith(b"\n")
            if not inside:
                self.write(piece + b" [cut]\n" if cut else piece)
            inside = cut
        with contextlib.suppress(OSError):
            self._file.close()
