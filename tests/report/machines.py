"""A machine with an owner, and the report on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kleinctl.environment import Environment
from kleinctl.facts import ComfyUI, Facts, FoundFile, System, Workflow
from kleinctl.facts.comfyui import CustomNode
from kleinctl.facts.workflow import Node
from kleinctl.hardware import GpuProcess, Hardware
from kleinctl.identify import Identity
from kleinctl.plugins import Plugins
from kleinctl.report import bundle, collect
from kleinctl.report.collect import Log
from kleinctl.report.owner import Owner
from kleinctl.report.redact import Redactor
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures" / "hardware"
GGUF = CustomNode("ComfyUI-GGUF")
MADE = "2026-03-04T05:06:07Z"
UUID = "GPU-1f2e3d4c-aaaa-bbbb-cccc-0123456789ab"
CUBLAS = "12.8.4.1"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
OWNER = Owner(
    user=("grete", "Grete Hermann", "Hermann"),
    host=("gretes-pc", "gretes-pc.example.lan"),
    home=("C:\\Users\\grete", "/home/grete"),
    token=(TOKEN, "pa55-word!"),
    serial=("1f2e3d4c-aaaa-bbbb-cccc-0123456789ab", "PF3X7K2Q"),
    address=("192.168.178.23", "f4:4d:30:aa:bb:cc"),
)


def hardware(name: str = "rtx-4070-ti-super") -> Hardware:
    """A recorded machine."""
    return Hardware.from_json(json.loads((FIXTURES / f"{name}.json").read_text())["hardware"])


def weights_file(path: str, **known: str) -> FoundFile:
    """A file that was found."""
    identity = Identity(Path(path), "safetensors", "a test", size_bytes=9)
    return FoundFile(Path(path), identity, known.pop("place", "ComfyUI"), **known)


def owned(home: str = "/home/grete", user: str = "grete", token: str = TOKEN, said: str = "") -> Facts:
    """Facts that tell whose machine it is, in every place that can."""
    machine = hardware()
    card = replace(machine.gpus[0], uuid=UUID, processes=(GpuProcess(7, f"{user}-tool.exe", 2**30),))
    return Facts(
        hardware=replace(machine, gpus=(card,), remarks=(f"disks: {home}/x is not there",)),
        system=System(
            home=f"{home}/.local/share/kleinctl",
            variables={"HF_HOME": f"{home}/hf", "HTTPS_PROXY": f"http://{user}:{token}@proxy.example.lan:3128"},
        ),
        environments=(Environment(Path(home, "venv/bin/python"), {"torch": "2.9.0+cu128", "nvidia-cublas": CUBLAS}),),
        files=(
            weights_file(f"{home}/ComfyUI/models/vae/flux2-vae.safetensors", folder="vae"),
            weights_file(f"{home}/ComfyUI/models/loras/my secret face.safetensors", folder="loras"),
        ),
        comfyuis=(ComfyUI("ComfyUI", f"{home}/ComfyUI", custom_nodes=(GGUF,), arguments=(said,)),),
        workflow=Workflow(f"{home}/w.json", "api", (Node("6", "CLIPTextEncode", {"text": f"portrait of {user}"}),)),
        remarks=(f"{user} said {said}",),
    )


def redactor(owner: Owner = OWNER, **options: Any) -> Redactor:
    """A redactor that always gives the same tokens."""
    return Redactor(owner, salt=b"salt", **options)


def report(facts: Facts, logs: tuple[Log, ...] = (), hide: Redactor | None = None, **said: str) -> bytes:
    """A finished report, as `kleinctl report` writes it."""
    hide = hide or redactor(versions=collect._versions(facts))
    document = collect.document(Plugins(frozenset()), facts, logs, hide, made=MADE, **said)
    return bundle.checked(bundle.pack(bundle.members(document, hide)), hide)


def write(path: Path, facts: Facts, logs: tuple[Log, ...] = (), **said: str) -> Path:
    """A report in a file."""
    path.write_bytes(report(facts, logs, **said))
    return path
