"""Does this job ask for something that cannot come out well?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kleinctl import memory
from kleinctl.checks import Check, check, run_checks
from kleinctl.problem import Evidence, Problem, Remedy
from kleinctl.units import GIB, gib

if TYPE_CHECKING:
    from kleinctl.backends import Fit, Job
    from kleinctl.environment import Environment
    from kleinctl.facts.run import JobFacts, Reference
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model

#: A base model makes mush of fewer steps, and of less guidance (20 to 50 steps at 4 to 5 are usual).
BASE_STEPS, BASE_GUIDANCE = 15, 1.0
#: Times as long as without reference pictures that a step may take before it is told.
SLOWER = 2.5
#: Share of the free memory (RAM) that a plan may take where there is no swap behind it.
TIGHT = 0.9
#: Share that the hint then limits a plan to.
LEAVING = 0.7


def job_problems(
    facts: JobFacts,
    job: Job,
    model: Model,
    hardware: Hardware,
    fit: Fit | None = None,
    environment: Environment | None = None,
) -> list[Problem]:
    """What is odd about a job before it runs. Without `fit` and `environment` less is asked."""
    known = {"job_facts": facts, "job": job, "model": model, "hardware": hardware}
    known |= {"fit": fit, "job_environment": environment}
    own = [each for each in globals().values() if isinstance(each, Check)]
    return [problem for result in run_checks(own, known) for problem in result.problems]


@check("size-rounded")
def size_rounded(job_facts: JobFacts) -> Problem | None:
    """The picture's sides are multiples of 16 pixels."""
    asked, drawn = (
        f"{job_facts.asked_width}x{job_facts.asked_height}",
        f"{job_facts.width}x{job_facts.height}",
    )
    if asked == drawn:
        return None
    return Problem(
        what=f"{asked} is drawn as {drawn}",
        why=f"The model draws squares of 16 pixels; {drawn} is the nearest size that is made of them.",
        fix=f"--size {drawn}",
        severity="warning",
        ref="D13",
        evidence=(Evidence("--size", asked, "multiples of 16 pixels"),),
    )


@check("prompt-weights")
def prompt_weights(job_facts: JobFacts) -> Problem | None:
    """The prompt is plain language, without weights in brackets."""
    if not job_facts.weighted:
        return None
    first = job_facts.weighted[0]
    plain = first[1:].rpartition(":")[0].strip()
    return Problem(
        what=f"{first} in the prompt is no weight here",
        why="Stable Diffusion programs read such brackets as emphasis; FLUX.2 reads them as words and may draw them.",
        fix=f'write "{plain}" without brackets and number, and say in words what matters',
        severity="warning",
        ref="D16",
        evidence=(Evidence("the prompt", ", ".join(job_facts.weighted)[:200], "plain words"),),
    )


@check("guidance-on-distilled")
def guidance_on_distilled(job_facts: JobFacts, model: Model) -> Problem | None:
    """A distilled model is asked for without guidance."""
    if model.variant != "distilled" or job_facts.guidance <= 1:
        return None
    return Problem(
        what=f"--guidance {job_facts.guidance:g} does nothing good with {model.name}",
        why=f"{model.name} is distilled: made for guidance {model.defaults.guidance:g}. diffusers ignores another "
        "value; ComfyUI takes twice as long with it and burns the colours.",
        fix=f"--guidance {model.defaults.guidance:g}",
        severity="warning",
        ref="C18",
        evidence=(Evidence("--guidance", f"{job_facts.guidance:g}", f"{model.defaults.guidance:g}"),),
    )


@check("steps-on-base")
def steps_on_base(job_facts: JobFacts, model: Model) -> Problem | None:
    """A base model gets the steps and the guidance that it needs."""
    asked, wanted = _settings(job_facts.steps, job_facts.guidance), _settings(*_defaults(model))
    if model.variant != "base" or (job_facts.steps >= BASE_STEPS and job_facts.guidance > BASE_GUIDANCE):
        return None
    return Problem(
        what=f"{asked} are too little for {model.name}",
        why=f"{model.name} is a base model: at {asked} it leaves noise or mush; {wanted} are its own.",
        fix=f"--steps {model.defaults.steps} --guidance {model.defaults.guidance:g}",
        severity="warning",
        ref="C18",
        evidence=(Evidence("--steps and --guidance", asked, wanted),),
    )


def _defaults(model: Model) -> tuple[int, float]:
    return model.defaults.steps, model.defaults.guidance


def _settings(steps: int, guidance: float) -> str:
    return f"{steps} steps at guidance {guidance:g}"


@check("references-large")
def references_large(job_facts: JobFacts) -> Problem | None:
    """The reference pictures add no more than the model sees of them, and little time."""
    tokens = sum(_tokens_of(each) for each in job_facts.references)
    without = memory.TEXT_TOKENS + job_facts.tokens
    times = (without + tokens) / without
    shrunk = [each for each in job_facts.references if each.width * each.height > memory.MAX_REFERENCE_PIXELS]
    if not shrunk and times < SLOWER:
        return None
    sizes = ", ".join(f"{each.name} ({each.width}x{each.height})" for each in shrunk[:4])
    told = f"{sizes} is shrunk to one megapixel, all that the model sees. " if shrunk else ""
    return Problem(
        what="the reference pictures are large" if len(job_facts.references) > 1 else f"{_names(job_facts)} is large",
        why=f"{told}With {tokens} tokens of reference pictures beside the picture's {job_facts.tokens}, "
        f"a step takes about {times:.1f} times as long and more VRAM.",
        fix="crop each reference picture to what matters, and shrink it to 1024x1024 or less",
        severity="warning",
        ref="D12",
        evidence=(Evidence("reference pictures", f"{tokens} tokens", f"at most {int(without * (SLOWER - 1))}"),),
    )


def _names(facts: JobFacts) -> str:
    return ", ".join(each.name for each in facts.references)


def _tokens_of(picture: Reference) -> int:
    """Tokens that a reference picture adds: one for each 16 x 16 pixels of at most a megapixel."""
    return min(picture.width * picture.height, memory.MAX_REFERENCE_PIXELS) // 256


@check("diffusers-edit-dtype")
def diffusers_edit_dtype(job_facts: JobFacts, job_environment: Environment) -> Problem | None:
    """The diffusers that edits pictures can do so in bf16."""
    from packaging.version import InvalidVersion, Version

    found = job_environment.packages.get("diffusers")
    try:
        if not job_facts.references or found is None or Version(found) >= Version("0.38.0"):
            return None
    except InvalidVersion:
        return None
    managed = job_environment.managed
    pip = f"{job_environment.python} -s -m pip install"
    arguments = {"python": str(job_environment.python), "packages": "diffusers>=0.40,<0.43", "index": ""}
    return Problem(
        what=f"diffusers {found} cannot edit pictures in bf16",
        why=f"It needs diffusers 0.38.0 or newer, which casts the VAE's statistics; {found} stops at mixed dtypes.",
        fix="kleinctl doctor --fix" if managed else f'{pip} "diffusers>=0.40,<0.43"',
        ref="D21",
        evidence=(Evidence(f"diffusers of {job_environment.name}", found, "0.38.0 or newer"),),
        remedy=Remedy("rebuild-environment", {"environment": job_environment.name})
        if managed
        else Remedy("install-packages", arguments, "ask"),
    )


@check("decode-memory")
def decode_memory(job: Job, model: Model, hardware: Hardware) -> Problem | None:
    """Decoding a picture of this size fits the card by itself, in tiles at the least."""
    if hardware.gpu is None or "cuda" not in model.devices or "cpu" in model.devices:
        return None
    decoding = min(memory.decode_bytes(model, job), memory.tiled_decode_bytes(model, job))
    needed = decoding + model.shape.vae_bytes + memory.CONTEXT_BYTES
    free = memory.usable_vram(hardware.gpu)
    if needed <= free:
        return None
    size = f"{job.width}x{job.height}"
    return Problem(
        what=f"decoding {size} takes more VRAM than is free",
        why=f"The last stage, the VAE's, needs {gib(needed)} at {size} even in tiles; {gib(free)} can be used.",
        fix="kleinctl plan   # shows the sizes that fit",
        severity="error",
        ref="D02",
        evidence=(Evidence(hardware.gpu.name, f"{gib(free)} can be used", gib(needed)),),
    )


@check("memory-full")
def memory_full(fit: Fit, hardware: Hardware) -> Problem | None:
    """The plan leaves room in memory (RAM), or there is swap behind it."""
    has = hardware.ram_available_bytes
    if not fit.fits or hardware.swap_bytes or not has or fit.ram_bytes <= has * TIGHT:
        return None
    return Problem(
        what="memory (RAM) will be nearly full",
        why=f"This plan takes {gib(fit.ram_bytes)} of the {gib(has)} that are available, and there is no swap: "
        "whatever else starts meanwhile may get the worker killed.",
        fix=f"--backend staged-decode --ram-limit {has * LEAVING / GIB:.1f}GiB   # slower; or close other programs",
        severity="warning",
        ref="D03",
        evidence=(Evidence("memory available", gib(has), f"{gib(fit.ram_bytes / TIGHT)} without swap"),),
    )
