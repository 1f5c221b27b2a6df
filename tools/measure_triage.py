"""How long `kleinctl triage` takes for many reports: makes them from the recorded machines, and reads and judges them.

    python tools/measure_triage.py [--reports 500]

Each report has a machine, 20 weights files, an environment, and the logs of two runs (64 KiB each). Exits with 1 when
it takes longer than its budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from kleinctl.environment import Environment
from kleinctl.facts import Facts, FoundFile
from kleinctl.hardware import Hardware
from kleinctl.identify import Identity, Vae
from kleinctl.plugins import Plugins
from kleinctl.report import bundle, collect, triage
from kleinctl.report.collect import TAIL_BYTES, Log
from kleinctl.report.owner import Owner
from kleinctl.report.redact import Redactor

#: Seconds for 500 reports on the two slow cores of continuous integration.
BUDGET = 20.0
FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "hardware"
LINE = (
    "[2026-01-01 12:00:00.123] loading 'models/vae/flux2-vae.safetensors' 100%|##########| 4/4 [00:01<00:00, 3.1it/s]"
)


def machines() -> Iterator[Facts]:
    """The recorded machines, over and over, with files and an environment."""
    recorded = [json.loads(path.read_text())["hardware"] for path in sorted(FIXTURES.glob("*.json"))]
    environment = Environment(Path("~/venv/bin/python"), {f"package-{n}": f"1.{n}" for n in range(150)})
    for hardware in cycle(recorded):
        files = tuple(_file(number) for number in range(20))
        yield Facts(Hardware.from_json(hardware), files=files, environments=(environment,))


def _file(number: int) -> FoundFile:
    path = Path(f"~/ComfyUI/models/vae/vae-{number}.safetensors")
    facts = Vae(path, "flux2-vae", "single-file", "BF16", 32, 512, True, True)
    identity = Identity(
        path, "safetensors", "32 latent channels", "vae", "flux2-vae", "single-file", "BF16", 9, None, facts
    )
    return FoundFile(path, identity, "ComfyUI", "vae")


def make(folder: Path, count: int) -> list[Path]:
    """That many reports in files. Those of one machine are alike."""
    plugins = Plugins(frozenset())
    tail = "\n".join([LINE] * (TAIL_BYTES // len(LINE)))
    logs = [Log("worker-1.log", "worker", tail), Log("comfyui.log", "comfyui", tail)]
    different = len(list(FIXTURES.glob("*.json")))
    made = []
    for facts in islice(machines(), min(count, different)):
        hide = Redactor(Owner())
        document = collect.document(plugins, facts, logs, hide, made="2026-01-01T00:00:00Z")
        made.append(bundle.pack(bundle.members(document, hide)))
    paths = [folder / f"{number:04}.zip" for number in range(count)]
    for path, data in zip(paths, cycle(made), strict=False):
        path.write_bytes(data)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=500)
    count = parser.parse_args().reports
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), count)
        size = sum(path.stat().st_size for path in paths)
        start = time.perf_counter()
        found, unreadable = triage.read_all(Plugins(frozenset()), paths)
        document = triage.document(found, unreadable)
        seconds = time.perf_counter() - start
    budget = BUDGET * count / 500
    print(f"{count} reports ({size / 1e6:.1f} MB): {seconds:.1f} s, {seconds / count * 1000:.1f} ms each")
    print(f"{len(document['problems'])} different problems, {len(unreadable)} reports that cannot be read")
    if seconds > budget:
        print(f"over the budget of {budget:.0f} s")
    return int(seconds > budget)


if __name__ == "__main__":
    sys.exit(main())
