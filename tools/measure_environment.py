"""Check and measure what `kleinctl/environments.toml` says. For whoever changes a pin.

    python tools/measure_environment.py check   can all pins be had, is the set complete, on every Python and system?
    python tools/measure_environment.py build   build the CPU environment here, from nothing: seconds and bytes

`check` asks pip for wheels of other systems without installing them, and reads what each wants from its metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kleinctl import environment

#: What pip calls a system, and what markers call it. Linux wheels carry the oldest glibc that they run with.
SYSTEMS = {
    "linux": (
        [f"manylinux_2_{glibc}_x86_64" for glibc in (28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014_x86_64"],
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    ),
    "win32": (
        ["win_amd64"],
        {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
    ),
}


def pythons() -> list[str]:
    """The minor versions that managed environments are made with."""
    oldest, newest = (environment.numbers(environment.data()["python"][key])[1] for key in ("oldest", "newest"))
    return [f"3.{minor}" for minor in range(oldest, newest + 1)]


def metadata(pins: list[str], python: str, platforms: list[str]) -> list[dict[str, Any]]:
    """The metadata of the wheels that pip would take for another Python and system."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        elsewhere = ["--python-version", python, *(f"--platform={name}" for name in platforms), "--target", folder]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary", ":all:", "--report", str(report), *elsewhere, *pins]
        subprocess.run(command, check=True)
        return [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]


def lacking(found: list[dict[str, Any]], markers: Mapping[str, str], torch: str) -> Iterator[str]:
    """What a pinned package wants, extras aside, and the set does not have."""
    versions = {canonicalize_name(each["name"]): each["version"] for each in found} | {"torch": torch}
    for each in found:
        for wanted in map(Requirement, each.get("requires_dist", [])):
            if wanted.marker and not wanted.marker.evaluate({**markers, "extra": ""}):
                continue
            version = versions.get(canonicalize_name(wanted.name))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                yield f"{each['name']} wants {wanted}; there is {version}"


def check() -> int:
    """Print a line for each Python and system, and what is wrong; the exit code."""
    wrong = 0
    for python in pythons():
        for system, (platforms, names) in SYSTEMS.items():
            markers = {**names, "python_version": python, "python_full_version": f"{python}.0"}
            pins = list(map(Requirement, environment.data()["stack"]["pins"]))
            here = [f"{pin.name}{pin.specifier}" for pin in pins if not pin.marker or pin.marker.evaluate(markers)]
            found = metadata(here, python, platforms)
            versions = {build["torch"] for build in environment.data()["builds"]}
            problems = sorted({line for torch in versions for line in lacking(found, markers, torch)})
            print(f"Python {python} {system}: {len(found)} wheels", *problems, sep="\n  ")
            wrong += len(problems)
    return 1 if wrong else 0


def build() -> int:
    """Build the CPU environment in an empty home with an empty cache, and measure it."""
    from kleinctl.hardware import Hardware

    requires = list(environment.SHOWN)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"KLEINCTL_HOME": home, "PIP_NO_CACHE_DIR": "1"}
        plan = environment.plan(requires, Hardware(platform=sys.platform), cuda=False)
        start = time.monotonic()
        built = environment.build(plan, lambda event: print(event.title) if not event.detail else None)
        seconds = time.monotonic() - start
        size = sum(file.lstat().st_size for file in plan.folder.rglob("*") if file.is_file() and not file.is_symlink())
        print(f"{plan.name}: {seconds:.0f} s, {size} bytes on disk; planned {plan.disk_bytes}")
        script = "from diffusers import Flux2KleinPipeline; print(Flux2KleinPipeline.__name__)"
        return subprocess.run([built.python, "-I", "-c", script]).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "build"))
    raise SystemExit(check() if parser.parse_args().what == "check" else build())
