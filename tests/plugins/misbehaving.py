"""Backends that fail, each in the way of its name, while loading or (`…-later`) while making a picture."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kleinctl import KleinctlError, Problem
from tests.plugins.echo import Echo, Session


def import_error(job=None):
    from json import a_name_of_tomorrow  # noqa: F401


def missing_module(job=None):
    import a_module_nobody_has  # noqa: F401


def old_diffusers(job=None):
    raise ImportError("cannot import name 'Flux2KleinPipeline' from 'diffusers' (/env/diffusers/__init__.py)")


def segfault(job=None):
    ctypes.string_at(0)


def exits(job=None):
    print("this is the last thing it said", file=sys.stderr)
    os._exit(3)


def killed(job=None):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(job=None):
    time.sleep(600)


def hangs_with_child(job=None):
    """Starts a process as a backend that drives a server does, says its id, and hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["CHILD_FILE"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def killed_while_writing(job=None):
    os.fsync = killed


def disk_full(job=None):
    def fsync(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def card_full(job=None):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.46 GiB. GPU 0 has a total capacity of 15.56 GiB")


def memory_full(job=None):
    raise MemoryError


def no_memory_in_torch(job=None):
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr)
    os.abort()


def wrong_encoder(job=None):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (512x12288 and 7680x3072)")


def own_problem(job=None):
    raise KleinctlError(Problem("the moon is in the wrong house", "It has to be full.", "wait two weeks", name="moon"))


def noisy(job=None):
    print("garbage on stdout", flush=True)
    print('{"is": "Close"}', flush=True)
    os.write(1, b"garbage from C\n")
    subprocess.run([sys.executable, "-c", "print('garbage from a child')"], check=True)
    print("x" * 100_000, file=sys.stderr)
    assert sys.stdin.read() == ""
    os.write(1, b"and no end of line")


FAILURES = [value for value in list(globals().values()) if callable(value) and value.__module__ == __name__]


class Misbehaving(Echo):
    aliases = ()

    def __init__(self, failure, later):
        self.failure, self.later = failure, later
        self.name = failure.__name__.replace("_", "-") + ("-later" if later else "")

    def load(self, model, budget):
        session = LaterSession(1000, self.failure if self.later else None)
        if not self.later:
            self.failure()
        return session


class LaterSession(Session):
    def __init__(self, max_tokens, failure):
        super().__init__(max_tokens)
        self.failure = failure

    def generate(self, job, progress):
        progress("denoise", 0, job.steps)
        if self.failure and job.seed != 1:
            self.failure(job)
        return super().generate(job, progress)


def kleinctl_backends():
    return [Misbehaving(failure, later) for failure in FAILURES for later in (False, True)]
