"""GPUs that CUDA cannot use: AMD's, Intel's, Apple's, and NVIDIA cards that run without NVIDIA's driver."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import OtherGpu, text_of

VENDORS = {"1002": "AMD", "8086": "Intel", "10de": "NVIDIA", "106b": "Apple", "5143": "Qualcomm"}
_PCI_IDS = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids", "var/lib/pciutils/pci.ids")
_APPLE_DRM = re.compile(r"^OF_COMPATIBLE_\d+=apple,agx", re.MULTILINE)


def other_gpu_facts() -> dict[str, Any]:
    """Every GPU the operating system knows, NVIDIA's included, by the name `Hardware` gives them."""
    finder = {"win32": windows_gpus, "darwin": apple_gpus}.get(sys.platform, linux_gpus)
    return {"other_gpus": tuple(finder())}


def linux_gpus(root: Path = Path("/")) -> Iterator[OtherGpu]:
    """Display devices on the PCI bus (class 03), with or without a driver, and Apple's GPU under Asahi Linux."""
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        vendor, number = _hexadecimal(device / "vendor"), _hexadecimal(device / "device")
        if _hexadecimal(device / "class").startswith("03") and vendor in VENDORS:
            link = device / "driver"
            driver = link.resolve().name if link.exists() else None
            found_by = "/" + device.relative_to(root).as_posix()
            yield OtherGpu(VENDORS[vendor], _pci_name(vendor, number, root), found_by, driver)
    for card in sorted(root.glob("sys/class/drm/card[0-9]")):
        if _APPLE_DRM.search(text_of(card / "device/uevent")):
            yield OtherGpu("Apple", "Apple silicon", "/" + card.relative_to(root).as_posix(), "asahi")


def _pci_name(vendor: str, device: str, root: Path) -> str:
    """`Raphael` out of the list of PCI names that most systems carry, else the numbers."""
    text = next(filter(None, (text_of(root / path) for path in _PCI_IDS)), "")
    section = re.search(rf"^{vendor}  .*\n((?:[\t#].*\n)*)", text, re.MULTILINE)
    name = re.search(rf"^\t{device}  (.+)$", section[1], re.MULTILINE) if section else None
    return f"{VENDORS[vendor]} {name[1]}" if name else f"{VENDORS[vendor]} graphics ({vendor}:{device})"


def apple_gpus() -> Iterator[OtherGpu]:
    """The GPU of an Apple silicon Mac, which has its processor's name."""
    from kleinctl.hardware.machine import macos_processor

    name = macos_processor()
    if name.startswith("Apple"):
        yield OtherGpu("Apple", name, "sysctl machdep.cpu.brand_string")


def windows_gpus() -> Iterator[OtherGpu]:
    """The display adapters Windows lists now, one for each although each of its outputs is listed."""
    seen = set()
    for name, device in _windows_adapters():
        match = re.match(r"PCI\\VEN_([0-9A-F]{4})&DEV_([0-9A-F]{4})", device, re.IGNORECASE)
        vendor = VENDORS.get(match[1].lower()) if match else None
        if vendor and device not in seen:
            seen.add(device)
            yield OtherGpu(vendor, name, f"EnumDisplayDevices {device.split('&SUBSYS')[0]}")


def _windows_adapters() -> Iterator[tuple[str, str]]:
    """Name and device id of each adapter (user32's EnumDisplayDevicesW, which does not need WMI)."""
    import ctypes

    class DisplayDevice(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_uint32),
            ("output", ctypes.c_wchar * 32),
            ("name", ctypes.c_wchar * 128),
            ("flags", ctypes.c_uint32),
            ("id", ctypes.c_wchar * 128),
            ("key", ctypes.c_wchar * 128),
        ]

    device = DisplayDevice(size=ctypes.sizeof(DisplayDevice))
    number = 0
    while ctypes.windll.user32.EnumDisplayDevicesW(None, number, ctypes.byref(device), 0):  # type: ignore[attr-defined]
        yield device.name, device.id
        number += 1


def _hexadecimal(path: Path) -> str:
    return text_of(path).strip().removeprefix("0x").lower()
