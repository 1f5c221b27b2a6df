"""`doctor --deep`: import torch in a process of its own, and hear what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kleinctl.environment import Environment

#: How long torch may take to be imported and to use the card, in seconds, and how much of its last words is kept.
PROBE_SECONDS, MAX_ERROR = 60.0, 1900
#: The line that carries the answer; whatever else torch prints is no answer.
MARK = "kleinctl-probe "

# CUDA is asked before torch is: where the driver itself fails, torch only says "unknown error".
SCRIPT = """
import ctypes, json, sys
said = {}
def tell():
    print("\\nMARK" + json.dumps(said), flush=True)
try:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    said["cu_init"] = int(cuda.cuInit(0))
except OSError:
    pass
tell()
import torch
said["torch"] = torch.__version__
said["cuda"] = torch.version.cuda
said["cuda_available"] = bool(torch.cuda.is_available())
tell()
if said["cuda_available"]:
    said["architectures"] = torch.cuda.get_arch_list()
    said["device"] = torch.cuda.get_device_name(0)
    tell()
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    said["product"] = float((square @ square)[0, 0].item())
    tell()
elif said["cuda"]:
    torch.zeros(1, device="cuda")
""".replace("MARK", MARK)


@dataclass(frozen=True)
class Probe:
    """What torch said in one environment. `error` has the last lines where it died or could not use the card.

    `exit_status` is that of a shell: 128 and the signal's number where a signal ended it; None where it was stopped
    after `PROBE_SECONDS`. `cu_init` is the driver's own answer when CUDA is started (0 is well, 999 an error it cannot
    name; None without a driver), `cuda` the CUDA version torch was built for, `computes` whether a small product in
    bf16 came out of the card as it should.
    """

    environment: str
    exit_status: int | None
    seconds: float
    torch: str | None = None
    cuda_available: bool | None = None
    architectures: tuple[str, ...] = ()
    device: str | None = None
    error: str = ""
    cuda: str | None = None
    cu_init: int | None = None
    computes: bool | None = None


def probe(environment: Environment, gpu: str | None = None, seconds: float = PROBE_SECONDS) -> Probe:
    """Import torch with the Python of `environment`, in a process that may crash or hang.

    `gpu` is the UUID of the card to use (CUDA's default without it).
    """
    from kleinctl.executors import worker_environment

    start = time.monotonic()
    try:
        done = subprocess.run(
            [str(environment.python), "-I", "-X", "faulthandler", "-X", "utf8", "-c", SCRIPT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=worker_environment(os.environ, gpu),
            check=False,
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        status, out, err = None, late.stdout or b"", late.stderr or b""
    except OSError as error:
        return Probe(environment.name, 127, 0.0, error=f"{environment.python.name} does not start: {error.strerror}")
    answer = _answer(out.decode("utf-8", "replace"))
    product = answer.get("product")
    return Probe(
        environment=environment.name,
        exit_status=128 - status if status is not None and status < 0 else status,
        seconds=round(time.monotonic() - start, 2),
        torch=_text(answer.get("torch")),
        cuda_available=answer.get("cuda_available"),
        architectures=tuple(map(str, answer.get("architectures", ())))[:50],
        device=_text(answer.get("device")),
        error=last_words(err.decode("utf-8", "replace")) if status != 0 else "",
        cuda=_text(answer.get("cuda")),
        cu_init=answer.get("cu_init"),
        computes=None if product is None else product == 64.0,
    )


def last_words(error: str) -> str:
    """The end of what a process wrote as it died, with the user's folder as `~`."""
    words = error.replace(str(Path.home()), "~")
    words = re.sub(r"(?i)([\\/](?:home|users)[\\/])[^\\/\s\"']+", r"\1someone", words)
    return words.strip()[-MAX_ERROR:]


def _answer(out: str) -> dict[str, Any]:
    """The last answer that the script got to."""
    said = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
    try:
        answer = json.loads(said[-1]) if said else {}
    except ValueError:
        answer = {}
    return answer if isinstance(answer, dict) else {}


def _text(value: object) -> str | None:
    return None if value is None else str(value)[:200]
