"""Is there a Python environment that can run it, and do its packages belong together?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kleinctl.checks import CouldNotCheck, check
from kleinctl.checks.machine import chosen_card, known, variable, without
from kleinctl.environment import Environment, data, numbers, torch_build, unfit_torch
from kleinctl.facts.probe import PROBE_SECONDS, Probe
from kleinctl.facts.system import System
from kleinctl.hardware import Hardware, Python
from kleinctl.problem import Evidence, KleinctlError, Problem, Remedy, Severity, shell

#: Entries of the failure catalogue: what torch lacks for a card, and packages that do not go together.
TORCH_REFS = {
    "torch-without-cuda": "A02",
    "torch-lacks-card": "A03",
    "torch-dropped-card": "A04",
    "driver-too-old": "A01",
}
CLASH_REFS = {
    "optional-packages-mismatched": "A22",
    "transformers-clash": "A25",
    "hub-clash": "A26",
    "numpy-clash": "A27",
}

#: Packages that make things faster and that klein does not need.
OPTIONAL = ("xformers", "flash-attn", "sageattention", "triton", "triton-windows", "nunchaku")
#: What packages do not say in their metadata: a package and its versions, those that it wants of another, and why.
PAIRS = (
    (
        "diffusers",
        "<0.37",
        "transformers",
        "<5",
        "diffusers before 0.37 imports MT5Tokenizer, which transformers 5 lacks",
    ),
    ("diffusers", ">=0.37", "transformers", ">=4.51", "klein reads prompts with Qwen3, new in transformers 4.51"),
    ("comfyui-frontend-package", ">=0", "transformers", ">=4.50.3", "ComfyUI wants transformers 4.50.3 or newer"),
    ("torch", "<2.3", "numpy", "<2", "torch before 2.3 was compiled for NumPy 1"),
)
#: torchvision 0.15 was made for torch 2.0, and so on: https://github.com/pytorch/vision#installation
VISION_AHEAD = 15


# Whose environment it is


def _whose(environment: Environment) -> str:
    if environment.managed:
        return f"the environment {environment.name}"
    return "the Python beside kleinctl" if environment.name == "this" else f"the Python of {environment.name}"


def _others(environment: Environment) -> bool:
    """Whether it is neither kleinctl's own nor the one that kleinctl runs in."""
    return not environment.managed and environment.name != "this"


def _severity(environment: Environment) -> Severity:
    """kleinctl makes an environment of its own where "this" one does not do."""
    return "warning" if environment.name == "this" else "error"


def pip_line(environment: Environment, packages: str, index: str = "") -> tuple[str, Remedy | None]:
    """What to type to install packages, and what `doctor --fix` does."""
    if environment.managed:
        return "kleinctl install", Remedy("rebuild-environment", {"environment": environment.name})
    if environment.name == "this":
        return "kleinctl install   # makes an environment of its own", None
    if not packages:
        return "kleinctl doctor   # says what is in the way of another torch", None
    words = (environment.python, "-s", "-m", "pip", "install", *packages.split())
    line = shell(*words, *(("--index-url", index) if index else ()))
    arguments = {"python": str(environment.python), "packages": packages, "index": index}
    return line, Remedy("install-packages", arguments, "ask")


def torch_for(hardware: Hardware) -> tuple[str, str]:
    """What pip is asked for so that the three are for this card and driver, and where; nothing where there is no build.

    The tag of the build (`+cu130`) makes pip change a torch that has the right version and another tag.
    """
    try:
        # Whatever Python runs kleinctl: packages are for another.
        build = torch_build(replace(hardware, python=Python("unknown", "")), cuda=hardware.gpu is not None)
    except KleinctlError:
        return "", ""
    vision = f"0.{numbers(build.torch)[1] + VISION_AHEAD}.0"
    return f"torch=={build.torch}+{build.name} torchvision=={vision}+{build.name} torchaudio", build.index


def _problem(
    name: str,
    ref: str | None,
    environment: Environment,
    what: str,
    why: str,
    packages: str,
    wanted: str,
    index: str = "",
) -> Problem:
    fix, remedy = pip_line(environment, packages, index)
    return Problem(
        what,
        why,
        fix,
        name=name,
        severity=_severity(environment),
        path=str(environment.python),
        ref=ref,
        evidence=(Evidence(f"packages of {environment.python}", why.rstrip("."), wanted),),
        remedy=remedy,
    )


# torch and the card


@check("torch-without-cuda")
def torch_serves_the_card(environment: Environment, hardware: Hardware) -> Problem | None:
    """Each torch can use the card with its driver."""
    card = chosen_card(hardware).name
    if "torch" not in environment.packages:
        raise _nothing_of("torch", environment)
    unfit = unfit_torch(environment, hardware)
    if unfit is None:
        return None
    name, why = unfit
    torch = environment.packages["torch"]
    if name == "torch-dropped-card":
        why = why.replace("has no kernels for", "was not made for")
    what = {
        "torch-without-cuda": f"the torch {torch} of {_whose(environment)} cannot use {card}",
        "driver-too-old": f"the driver of {card} is too old for the torch of {_whose(environment)}",
    }.get(name, f"the torch {torch} of {_whose(environment)} does not cover {card}")
    packages, index = torch_for(hardware)
    own = " kleinctl makes an environment of its own with one that can." if environment.name == "this" else ""
    wanted = f"a torch from {index}" if index else "a torch for this card"
    return _problem(name, TORCH_REFS.get(name), environment, what, why + own, packages, wanted, index)


def _nothing_of(package: str, environment: Environment) -> CouldNotCheck:
    return CouldNotCheck(f"There is no {package} in {_whose(environment)}.")


# Packages among themselves


@check("torch-versions-differ")
def torch_versions(environment: Environment, hardware: Hardware) -> Iterator[Problem]:
    """torch, torchvision and torchaudio are of one build."""
    torch = environment.packages.get("torch")
    if torch is None:
        raise _nothing_of("torch", environment)
    if hardware.gpu and unfit_torch(environment, hardware):
        return  # all three are to be replaced
    packages, index = torch_for(hardware)
    for name in ("torchvision", "torchaudio"):
        found = environment.packages.get(name)
        clash = found and (_tags_differ(torch, found) or _not_a_pair(name, found, torch, environment))
        if clash:
            yield _problem(
                "torch-versions-differ",
                "A21",
                environment,
                f"{name} {found} does not belong to torch {torch} in {_whose(environment)}",
                clash,
                packages,
                "three of one build",
                index,
            )
            return


def _tags_differ(torch: str, other: str) -> str:
    tags = [version.partition("+")[2] for version in (torch, other)]
    return f"One was built for {tags[0]}, the other for {tags[1]}." if all(tags) and tags[0] != tags[1] else ""


def _not_a_pair(name: str, found: str, torch: str, environment: Environment) -> str:
    asked = [_requirement(line) for line in environment.requires.get(name, ())]
    wanted = next((each for each in asked if each and each.name == "torch" and each.specifier), None)
    if wanted is not None:
        return "" if wanted.specifier.contains(torch, prereleases=True) else f"It wants torch{wanted.specifier}."
    major, minor = (*numbers(found), 0, 0)[:2]
    told = name == "torchvision" and major == 0 and minor >= VISION_AHEAD and numbers(torch)[:1] == (2,)
    if told and numbers(torch)[1] != minor - VISION_AHEAD:
        return f"torchvision 0.{minor} was made for torch 2.{minor - VISION_AHEAD}."
    return ""


@check("packages-clash")
def packages_clash(environment: Environment, hardware: Hardware) -> Iterator[Problem]:
    """Packages have the versions of others that they ask for."""
    clashes: dict[str, list[tuple[str, str, str, str]]] = {}
    for owner, target, wanted, why in (*_unmet(environment, hardware), *_known_pairs(environment)):
        clashes.setdefault(_name(owner, target), []).append((owner, target, wanted, why))
    for name, found in clashes.items():
        owners = list(dict.fromkeys(owner for owner, *_ in found))
        targets = list(dict.fromkeys(target for _, target, *_ in found))
        optional = name == "optional-packages-mismatched"
        problem = _problem(
            name,
            CLASH_REFS.get(name),
            environment,
            f"{' and '.join(owners)} and {' and '.join(targets)} of {_whose(environment)} do not go together",
            " ".join(why for *_, why in found),
            _packages(name, found[0], environment),
            ", ".join(f"{target}{wanted}" for _, target, wanted, _ in found),
        )
        yield _without(problem, environment, owners) if optional else problem


def _without(problem: Problem, environment: Environment, owners: Sequence[str]) -> Problem:
    """klein does not need these packages; the way out is to do without. One that torch asks for is replaced."""
    unwanted = " ".join(owner for owner in owners if owner in OPTIONAL)
    if environment.managed or not unwanted:
        return replace(problem, severity="warning")
    line = f"{shell(environment.python)} -s -m pip uninstall {unwanted}   # klein does not need it"
    remedy = Remedy("uninstall-packages", {"python": str(environment.python), "packages": unwanted}, "ask")
    return replace(problem, severity="warning", fix=line, remedy=remedy)


def _packages(name: str, clash: tuple[str, str, str, str], environment: Environment) -> str:
    """What pip is asked for: the set that kleinctl's own environments have, or the version that is wanted."""
    together = ("diffusers", "transformers", "tokenizers", "huggingface-hub")
    if name in ("hub-clash", "transformers-clash"):
        pins = [pin.partition(";")[0].strip() for pin in data()["stack"]["pins"]]
        return " ".join(pin for pin in pins if pin.partition("==")[0] in set(together) & set(environment.packages))
    return f"{clash[1]}{clash[2]}"


def _name(owner: str, target: str) -> str:
    if owner in OPTIONAL or target in OPTIONAL:
        return "optional-packages-mismatched"
    by_target = {"huggingface-hub": "hub-clash", "numpy": "numpy-clash"}
    return by_target.get(target, "transformers-clash" if target in ("transformers", "tokenizers") else "packages-clash")


def _unmet(environment: Environment, hardware: Hardware) -> Iterator[tuple[str, str, str, str]]:
    """Who asks for what in vain: owner, target, the versions wanted, and a sentence."""
    from packaging.utils import canonicalize_name

    told = _marker_values(environment, hardware)
    for owner, lines in environment.requires.items():
        for wanted in filter(None, map(_requirement, lines)):
            target = canonicalize_name(wanted.name)
            version = environment.packages.get(target)
            if version is None or (wanted.marker and not wanted.marker.evaluate(told)):
                continue
            of_torch = target == "torch" and owner in ("torchvision", "torchaudio")
            if not of_torch and not _has(version, str(wanted.specifier)):
                asked = f"{owner} {environment.packages.get(owner, '')}".strip()
                yield (
                    owner,
                    target,
                    str(wanted.specifier),
                    f"{asked} wants {target}{wanted.specifier}; it is {version}.",
                )
    for owner in OPTIONAL:
        version, torch = environment.packages.get(owner, ""), environment.packages.get("torch")
        built = re.search(r"torch(\d+)\.?(\d+)", version)
        if torch and built and tuple(map(int, built.groups())) != numbers(torch)[:2]:
            made_for = f"{built[1]}.{built[2]}"
            yield owner, "torch", f"=={made_for}.*", f"{owner} {version} was built for torch {made_for}; it is {torch}."


def _known_pairs(environment: Environment) -> Iterator[tuple[str, str, str, str]]:
    for owner, owners, target, wanted, why in PAIRS:
        mine, theirs = environment.packages.get(owner), environment.packages.get(target)
        if mine and theirs and _has(mine, owners) and not _has(theirs, wanted):
            yield owner, target, wanted, f"{why}; it is {theirs}."


def _has(version: str, specifier: str) -> bool:
    """Whether a version is among those of a specifier. One that cannot be read is not judged."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def _requirement(line: str):  # type: ignore[no-untyped-def]
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def _marker_values(environment: Environment, hardware: Hardware) -> Mapping[str, str]:
    """What a requirement's marker is asked about, for the machine that the facts are of."""
    version = environment.python_version or hardware.python.version
    windows = hardware.platform == "win32"
    return {
        "python_version": ".".join(version.split(".")[:2]),
        "python_full_version": version,
        "implementation_name": "cpython",
        "implementation_version": version,
        "platform_python_implementation": "CPython",
        "os_name": "nt" if windows else "posix",
        "platform_system": {"win32": "Windows", "darwin": "Darwin"}.get(hardware.platform, "Linux"),
        "sys_platform": hardware.platform,
        "platform_machine": hardware.machine,
        "platform_release": "",
        "platform_version": "",
        "extra": "",
    }


@check("diffusers-too-old")
def diffusers_too_old(environment: Environment) -> Problem | None:
    """diffusers knows FLUX.2 [klein]."""
    found = environment.packages.get("diffusers")
    if found is None or _others(environment):
        raise _nothing_of("diffusers that kleinctl would use", environment)
    if _has(found, ">=0.37"):
        return None
    why = f"FLUX.2 [klein] came with diffusers 0.37.0; this is {found}."
    return _problem(
        "diffusers-too-old",
        "A24",
        environment,
        f"the diffusers of {_whose(environment)} is too old",
        why,
        "",
        "0.37.0 or newer",
    )


@check("accelerate-missing")
def accelerate_missing(environment: Environment) -> Problem | None:
    """diffusers has accelerate, which it needs to offload a model."""
    packages = environment.packages
    if _others(environment) or not {"torch", "diffusers"} <= set(packages):
        raise _nothing_of("diffusers that kleinctl would use", environment)
    if "accelerate" in packages:
        return None
    return _problem(
        "accelerate-missing",
        "A28",
        environment,
        f"accelerate is missing in {_whose(environment)}",
        f"diffusers {packages['diffusers']} needs it to keep parts of a model in RAM.",
        "accelerate",
        "accelerate",
    )


# Two Pythons


@check("packages-in-other-python")
def packages_elsewhere(environment: Environment, hardware: Hardware) -> Problem | None:
    """ComfyUI's Python has its own packages, and no other's."""
    if not _others(environment):
        raise CouldNotCheck("No ComfyUI's Python is known; kleinctl runs its workers with -I, past both ways.")
    if environment.packages and "torch" not in environment.packages:
        line = shell(environment.python, "-s", "-m", "pip", "install", "-r", "requirements.txt")
        fix = f"{line}   # in ComfyUI's folder"
        return _elsewhere(
            environment,
            f"{_whose(environment)} has no torch",
            f"{environment.python} is what runs it; what pip installed for another Python is not there.",
            fix,
            "error",
        )
    if not environment.leaks:
        return None
    mixed = "; ".join(f"{', '.join(names)} from {source}" for source, names in environment.leaks.items())
    unset = "PYTHONPATH" in environment.leaks
    return _elsewhere(
        environment,
        f"{_whose(environment)} takes packages from elsewhere",
        f"Mixed in are {mixed}; they may be of other versions than its own.",
        without("PYTHONPATH", hardware) if unset else shell(environment.python, "-s", "main.py"),
        "warning",
        variable("PYTHONPATH") if unset else None,
    )


def _elsewhere(
    environment: Environment, what: str, why: str, fix: str, severity: Severity, remedy: Remedy | None = None
) -> Problem:
    return Problem(
        what,
        why,
        fix,
        name="packages-in-other-python",
        severity=severity,
        path=str(environment.python),
        ref="A32",
        evidence=(Evidence(f"packages of {environment.python}", what, "its own packages, and no other's"),),
        remedy=remedy,
    )


@check("python-home-set")
def python_home(hardware: Hardware, system: System) -> Problem | None:
    """No variable sends Python to the library of another."""
    value = known(system).variables.get("PYTHONHOME")
    if not value:
        return None
    return Problem(
        "PYTHONHOME is set",
        f"Every Python on this machine takes its own library from {value}, and those of another version do not start.",
        without("PYTHONHOME", hardware),
        name="packages-in-other-python",
        severity="warning",
        ref="A32",
        evidence=(Evidence("PYTHONHOME", value, "not set"),),
        remedy=variable("PYTHONHOME"),
    )


# What torch said (`doctor --deep`)


@check("environment-crashes")
def torch_runs(probe: Probe, hardware: Hardware) -> Problem | None:
    """torch can be imported and calculates on the card."""
    where = "the Python beside kleinctl" if probe.environment == "this" else probe.environment
    proven = _explained(probe, where)
    if hardware.gpu is None and probe.torch is not None:
        return None  # it was imported; that it finds no card is another check's
    if probe.cu_init not in (None, 0):
        return _cuda_gone(probe, where, f"cuInit answers {probe.cu_init}")
    if proven is not None:
        return proven
    if probe.exit_status != 0:
        return _crashed(probe, where)
    if hardware.gpu and probe.architectures and not _covered(probe.architectures, hardware.gpu.capability):
        return _not_covered(probe, where, hardware)
    if hardware.gpu and probe.cuda and probe.cuda_available is False:
        return _cuda_gone(probe, where, "torch finds no card")
    if probe.computes is False:
        return replace(_crashed(probe, where), why="A product of two small matrices on the card came out wrong.")
    return None


def _explained(probe: Probe, where: str) -> Problem | None:
    """The problem that torch's last words prove."""
    from kleinctl.logs import explain

    # A report's documents hold no ends of lines.
    matches = explain(probe.error.replace("\N{REPLACEMENT CHARACTER}", "\n")) if probe.error else []
    if not matches:
        return None
    problem, line = matches[0].problem, matches[0].line
    told = Evidence(f"import torch in {where}", line, "no error")
    return replace(problem, what=f"{problem.what} ({where})", evidence=(*problem.evidence, told))


def _crashed(probe: Probe, where: str) -> Problem:
    from kleinctl.exits import exit_text

    status = probe.exit_status
    how = f"nothing for {PROBE_SECONDS:.0f} seconds"
    if status is not None:
        how = exit_text(128 - status if 128 < status <= 128 + 64 else status)
    said = probe.error.replace("\N{REPLACEMENT CHARACTER}", "\n").strip().splitlines()
    last = f" Its last words: {said[-1][:200]}" if said else ""
    return Problem(
        f"torch {probe.torch or ''}".strip() + f" does not run in {where}",
        f"Imported in a process of its own, it ended with {how}.{last}",
        _MEND.get(_kind(probe), "kleinctl explain environment-crashes"),
        severity="warning" if probe.environment == "this" else "error",
        evidence=(Evidence(f"import torch in {where}", how, "exit status 0"),),
        remedy=_rebuild(probe),
    )


_MEND = {"this": "kleinctl install   # makes an environment of its own", "managed": "kleinctl install"}


def _kind(probe: Probe) -> str:
    """Whose environment was probed: `this`, a `managed` one by its folder's name (`cu130-0a1b2c3d`), or `another`."""
    managed = re.fullmatch(r"(cu\d+|cpu)-[0-9a-f]{8}", probe.environment)
    return "managed" if managed else "this" if probe.environment == "this" else "another"


def _rebuild(probe: Probe) -> Remedy | None:
    managed = _kind(probe) == "managed"
    return Remedy("rebuild-environment", {"environment": probe.environment}) if managed else None


def _cuda_gone(probe: Probe, where: str, found: str) -> Problem:
    return Problem(
        "CUDA does not start",
        f"The driver knows the card, and {found} ({where}): its CUDA part is in a bad state, "
        "as after sleep or an unfinished update.",
        "sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm   # or restart the computer",
        name="cuda-gone",
        ref="A12",
        evidence=(Evidence(f"cuInit and torch in {where}", found, "cuInit answers 0"),),
    )


def _covered(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of these runs on the card: `sm_86` on 8.9; `compute_90`, compiled anew, on all later."""
    for kind, digits in re.findall(r"(sm|compute)_(\d{2,3})", " ".join(architectures)):
        made = (int(digits[:-1]), int(digits[-1]))
        if made <= capability and (kind == "compute" or made[0] == capability[0]):
            return True
    return False


def _not_covered(probe: Probe, where: str, hardware: Hardware) -> Problem:
    gpu = hardware.gpu
    assert gpu is not None
    newest = max(numbers(each)[-1] for each in probe.architectures)
    name = "torch-lacks-card" if numbers(gpu.arch)[-1] > newest else "torch-dropped-card"
    return Problem(
        f"the torch {probe.torch} of {where} does not cover {gpu.name}",
        f"It has code for {', '.join(probe.architectures)}; the card is {gpu.arch}.",
        _MEND.get(_kind(probe), "kleinctl doctor   # prints what to install"),
        name=name,
        severity="warning" if probe.environment == "this" else "error",
        ref=TORCH_REFS[name],
        evidence=(Evidence(f"torch.cuda.get_arch_list() in {where}", ", ".join(probe.architectures), gpu.arch),),
        remedy=_rebuild(probe),
    )


@check("home-writable")
def home_writable(system: System) -> Problem | None:
    """kleinctl's folder can be written to."""
    if not known(system).home_error:
        return None
    return Problem(
        f"{system.home} cannot be written to",
        f"{system.home_error}.",
        "set KLEINCTL_HOME to a folder of yours",
        path=system.home,
        evidence=(Evidence(system.home, system.home_error, "a folder that this user may write to"),),
    )
