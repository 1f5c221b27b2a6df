"""Cards that are not here: rates of known ones, and machines imagined from a name (`kleinctl plan --gpu`)."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kleinctl.hardware.facts import Gpu, Hardware, NvmlState
from kleinctl.hardware.rates import NO_RATES
from kleinctl.problem import Misuse, Problem
from kleinctl.units import GIB, MIB

#: VRAM that a desktop with a browser holds, in bytes: an estimate. Public nvidia-smi printouts of cards with a display
#: show 272 to 1,621 MiB, and large or several screens take "1 GB or more" (Comfy-Org/ComfyUI#11331). Imagined cards
#: have their total less this free.
DESKTOP_VRAM = 768 * MIB
#: RAM that the same desktop holds (an estimate), and what a PC is taken to have where nobody says.
DESKTOP_RAM, COMMON_RAM = 3 * GIB, 16 * GIB
#: Sold sizes and NVML's differ: 24 GB are 23,034 MiB on an L4 (memory for error correction), 16 are 15,360 on a T4.
_SIZE_TOLERANCE = 0.08

# What people write or leave out. Dropped words carry no meaning; the rest become one spelling.
_DROPPED = re.compile(r"nvidia|geforce|tesla|rtx|gtx|generation|edition|graphics|gpu|card|design|with|[^a-z0-9]")
_SPELLINGS = ((r"mobile|notebook", "laptop"), (r"(\d(?:ti)?)s(?=$|laptop)", r"\1super"))
_SIZE = re.compile(r"(?<![a-z0-9])(\d{1,3})\s*(?:gib|gb|g)(?![a-z])")


@dataclass(frozen=True)
class Performance:
    """A card's rates as its data sheet has them, dense, at boost clock.

    `bf16_tflops` is with fp32 accumulation, and 0 where the card has no bf16; `memory_gb_s` is in 10^9 bytes a
    second. `convolution_share` is how much of that the VAE's convolutions reach, which depends on the architecture.
    `estimated` is true for a card the catalogue does not have.
    """

    fp32_tflops: float
    bf16_tflops: float
    memory_gb_s: float
    pcie_generation: int
    pcie_width: int
    convolution_share: float = 0.4
    estimated: bool = False

    @property
    def tflops(self) -> float:
        """The rate of the maths klein would use: bf16, or fp32 where there is no bf16 (torch then computes in fp32)."""
        return self.bf16_tflops or self.fp32_tflops


@dataclass(frozen=True)
class Card:
    """An entry of gpus.toml. `vram_bytes` is what NVML reports; `also` are other names people use."""

    name: str
    compute_capability: str
    vram_bytes: int
    performance: Performance
    also: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name people use: `RTX 4070 Ti SUPER`, `A100`."""
        return self.also[0] if self.also else re.sub(r"^(NVIDIA |GeForce )+", "", self.name)

    @property
    def size(self) -> int:
        """VRAM as it is sold, in GiB."""
        return round(self.vram_bytes / GIB)


@cache
def cards() -> tuple[Card, ...]:
    """The catalogue, in the order of gpus.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = (Path(__file__).parent.parent / "gpus.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    return tuple(_card(entry, document["convolution_share"]) for entry in document["cards"])


def _card(entry: dict[str, Any], shares: dict[str, float]) -> Card:
    generation, width = map(int, entry["pcie"].split("x"))
    share = shares.get(entry["capability"].split(".")[0], shares["other"])
    rates = Performance(entry["fp32_tflops"], entry["bf16_tflops"], entry["memory_gb_s"], generation, width, share)
    return Card(entry["name"], entry["capability"], entry["vram_mib"] * MIB, rates, tuple(entry.get("also", ())))


def performance_of(gpu: Gpu) -> Performance:
    """The rates of a card: the catalogue's, else those of the slowest card it is likely to equal.

    That is the slowest with the same compute capability (else the same generation, else of all with, or without,
    bf16) among those with at least 3/4 of its memory: an estimate that errs on the slow side.
    """
    named = [card for card in _by_name().get(_key(gpu.name), ()) if card.compute_capability == gpu.compute_capability]
    if named:
        return min(named, key=lambda card: abs(card.vram_bytes - gpu.vram_bytes)).performance
    same = (
        [card for card in cards() if card.compute_capability == gpu.compute_capability]
        or [card for card in cards() if card.compute_capability.split(".")[0] == str(gpu.capability[0])]
        or [card for card in cards() if bool(card.performance.bf16_tflops) == gpu.bf16]
    )
    large = [card for card in same if card.vram_bytes >= gpu.vram_bytes * 3 // 4]
    return replace(min((card.performance for card in large or same), key=lambda rates: rates.tflops), estimated=True)


#: How a card is named on the command line.
PLAN = 'plan --gpu "{}"'


def imagine(gpu_name: str | None, ram_bytes: int | None, base: Hardware | None = None, command: str = PLAN) -> Hardware:
    """A machine with this card and this much RAM, in bytes; what is None stays as in `base`.

    Without a `base` the machine is a PC of which nothing else is known: its disk is not judged. Spelling is forgiven
    ("4070tis"), a size may follow the name ("3060 12GB"). `remarks` of the result say what was assumed. `command` is
    how the user named the card.

    Raises:
        Misuse: no card of the catalogue has this name, or none has this much memory.
    """
    remarks = []
    machine = base or Hardware(platform=sys.platform, cpu_count=8, ram_bytes=COMMON_RAM)
    if ram_bytes is None and base is None:
        ram_bytes = COMMON_RAM
        remarks.append(f"{COMMON_RAM // GIB} GiB of RAM are assumed")
    if gpu_name is not None:
        card, remark = find_card(gpu_name, command)
        remarks += [remark] if remark else []
        machine = replace(machine, gpus=(_unused(card),), nvml=NvmlState("ok", "imagined"), rates=NO_RATES)
    if ram_bytes is not None:
        free = max(ram_bytes - DESKTOP_RAM, ram_bytes // 2)
        machine = replace(machine, ram_bytes=ram_bytes, ram_available_bytes=free, ram_limit_source=None)
    return replace(machine, remarks=(*machine.remarks, *remarks))


def find_card(text: str, command: str = PLAN) -> tuple[Card, str]:
    """The card a person means, and a sentence on the choice where one was made for them.

    Raises:
        Misuse: no such card, or not with this much memory.
    """
    size = _SIZE.search(text.lower())
    found = _by_name().get(_key(text), ())
    if not found:
        raise _unknown(text, command)
    fitting = [card for card in found if not size or _sold_as(card, int(size[1]))]
    if not fitting:
        raise Misuse(
            Problem(
                what=f"there is no {found[0].title} with {size[1] if size else '?'} GB",
                why=f"It comes with {_sizes(found)} GB.",
                fix=f"kleinctl {command.format(found[0].title)}",
                name="unknown-gpu",
            )
        )
    smallest = min(fitting, key=lambda card: card.vram_bytes)
    if len({card.size for card in fitting}) == 1:
        return smallest, ""
    other = max(fitting, key=lambda card: card.vram_bytes)
    return smallest, (
        f"{smallest.title} comes with {_sizes(fitting)} GB: {smallest.size} GB are assumed, "
        f"{command.format(_spelled(other)).partition(' ')[2]} means the other"
    )


def _unknown(text: str, command: str) -> Misuse:
    import difflib

    near = difflib.get_close_matches(_key(text), list(_by_name()), n=1, cutoff=0.7)
    card = _by_name()[near[0]][0] if near else _by_name()["4070"][0]
    nearest = f"the nearest name is {card.title}" if near else "none has a name like it"
    return Misuse(
        Problem(
            what=f"{text[:60]!r} is no NVIDIA card that kleinctl knows",
            why=f"Of the {len(cards())} in its list, {nearest}.",
            fix=f"kleinctl {command.format(card.title)}",
            name="unknown-gpu",
        )
    )


def _unused(card: Card) -> Gpu:
    """The card with a desktop on it and nothing else."""
    return Gpu(
        name=card.name,
        compute_capability=card.compute_capability,
        vram_bytes=card.vram_bytes,
        vram_free_bytes=card.vram_bytes - DESKTOP_VRAM,
        pcie_generation=card.performance.pcie_generation,
        pcie_width=card.performance.pcie_width,
    )


@cache
def _by_name() -> dict[str, tuple[Card, ...]]:
    """The catalogue by every name a card goes by, in one spelling; several cards where sizes differ."""
    found: dict[str, list[Card]] = {}
    for card in cards():
        for key in dict.fromkeys(_key(name) for name in (card.name, *card.also)):
            found.setdefault(key, []).append(card)
    return {key: tuple(same) for key, same in found.items()}


def _key(name: str) -> str:
    """A name in one spelling: "NVIDIA GeForce RTX 4070 Ti SUPER" and "4070tis" are both `4070tisuper`."""
    key = _DROPPED.sub("", _SIZE.sub(" ", name.lower()))
    for pattern, spelling in _SPELLINGS:
        key = re.sub(pattern, spelling, key)
    return key


def _sold_as(card: Card, size: int) -> bool:
    return abs(card.vram_bytes / GIB - size) <= size * _SIZE_TOLERANCE


def _sizes(found: Any) -> str:
    return " or ".join(str(size) for size in sorted({card.size for card in found}))


def _spelled(card: Card) -> str:
    """A name that finds this card and no other size of it."""
    return f"{card.title} {card.size}GB"
