"""Windows' own places: the variables of the user, and programs that winget installs."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from kleinctl.fixes.pip import run
from kleinctl.fixes.request import Plan, Request
from kleinctl.journal import Progress, Record, log_file
from kleinctl.problem import KleinctlError, Problem, shell

#: Microsoft's names in winget's own source, and the options that let it run without questions.
VC_RUNTIME = "Microsoft.VCRedist.2015+.x64"
QUIET = ("--exact", "--silent", "--accept-source-agreements", "--accept-package-agreements")
#: Bytes, about; and seconds, in which Windows asks the user for permission too.
VC_BYTES = 25_000_000
LONGEST_SECONDS = 1800


def install_vc_runtime(request: Request) -> Plan:
    """`install-vc-runtime`: the Visual C++ runtime, by winget. Windows itself asks for an administrator's yes."""
    winget = shutil.which("winget")
    if winget is None:
        raise request.refuse("winget, which would install it, is not on this machine")
    words = ("install", "--id", VC_RUNTIME, *QUIET)

    def work(record: Record, progress: Progress) -> None:
        log = log_file("fix")
        status, last = run((winget, *words), log, progress, LONGEST_SECONDS)
        if status:
            said = " ".join(line.strip() for line in last[-2:] if line.strip())
            raise KleinctlError(
                Problem(
                    f"winget could not install {VC_RUNTIME}",
                    f"It ended with status {status}: {said or 'it said nothing'}. All of it: {log}",
                    "install https://aka.ms/vs/17/release/vc_redist.x64.exe",
                    name="install-failed",
                    path=str(log),
                )
            )

    return request.plan(
        f"install {VC_RUNTIME}, Microsoft's Visual C++ runtime, into Windows; Windows asks for permission",
        work=work,
        commands=(shell("winget", *words),),
        fetch_bytes=VC_BYTES,
        disk_bytes=VC_BYTES,
        seconds=60.0,
        outside=True,
        why_not_undoable="It is part of Windows then; Settings, Apps takes it away.",
    )


# Variables of the user


def _key(access: str) -> Any:
    import winreg

    return winreg.OpenKey(winreg.HKEY_CURRENT_USER, "Environment", 0, getattr(winreg, access))  # type: ignore[attr-defined]


def variable(name: str) -> str | None:
    """A variable of this user, for programs that are started from now on; None where it is not set."""
    import winreg

    with contextlib.suppress(OSError), _key("KEY_READ") as key:
        return str(winreg.QueryValueEx(key, name)[0])  # type: ignore[attr-defined]
    return None


def set_variable(name: str, value: str | None) -> None:
    """Set a variable of this user, or with None unset it, and tell programs that run.

    Raises:
        KleinctlError: the registry does not take it.
    """
    import winreg

    try:
        with _key("KEY_SET_VALUE") as key:
            if value is None:
                with contextlib.suppress(FileNotFoundError):
                    winreg.DeleteValue(key, name)  # type: ignore[attr-defined]
            else:
                winreg.SetValueEx(key, name, 0, winreg.REG_SZ, value)  # type: ignore[attr-defined]
    except OSError as error:
        why = f"The registry answers: {error.strerror}."
        fix = "rundll32 sysdm.cpl,EditEnvironmentVariables"
        raise KleinctlError(Problem(f"{name} could not be changed", why, fix, name="folder-not-writable")) from None
    _tell()


def _tell() -> None:
    """Let Explorer know, so that new terminals have it: WM_SETTINGCHANGE to all windows, at most a second."""
    import ctypes

    windll = getattr(ctypes, "windll", None)
    if windll is not None:
        windll.user32.SendMessageTimeoutW(0xFFFF, 0x001A, 0, "Environment", 0x0002, 1000, None)
