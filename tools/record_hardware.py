"""Record this machine as a test fixture: NVML's raw answers, and the facts kleinctl makes of them.

    python tools/record_hardware.py > tests/fixtures/hardware/h100.json

Whose machine it is stays out: paths, programs on the card, the card's UUID.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from kleinctl.hardware import Hardware, LiveNvml, RecordedNvml, detect
from kleinctl.hardware.nvml import nvidia_facts


def record() -> dict[str, Any]:
    """The fixture. Its cards are made from the answers in it, as the test does."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    live = LiveNvml()
    nvidia_facts(live)
    answers = {question: anonymous(question, answer) for question, answer in live.answers.items()}
    state, gpus = nvidia_facts(RecordedNvml(answers))
    return {
        "origin": "recorded on a machine by tools/record_hardware.py",
        "nvml": answers,
        "hardware": impersonal(replace(detect(), nvml=state, gpus=gpus)).to_json(),
    }


def anonymous(question: str, answer: Any) -> Any:
    """No running programs, and UUIDs that tell the cards apart and nothing else."""
    if "RunningProcesses" in question and isinstance(answer, list):
        return []
    if question.startswith("nvmlDeviceGetUUID") and isinstance(answer, str):
        card = question.partition("(")[2].rstrip(")").replace("/", "")
        return f"{answer[:4]}00000000-0000-0000-0000-{card:0>12}"
    return answer


def impersonal(hardware: Hardware) -> Hardware:
    """The facts without this machine's paths."""
    return replace(
        hardware,
        disks={name: replace(disk, path=f"/home/someone/kleinctl/{name}") for name, disk in hardware.disks.items()},
        packages={name: replace(package, location=None) for name, package in hardware.packages.items()},
        python=replace(hardware.python, executable="/usr/bin/python3"),
        ram_limit_source=hardware.ram_limit_source and "/sys/fs/cgroup/memory.max",
    )


if __name__ == "__main__":
    print(json.dumps(record(), indent=1))
