"""Generate through a real ComfyUI: one that kleinctl installed, or the user's own."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kleinctl_plugins import comfyui_client, comfyui_files, comfyui_graph
from kleinctl_plugins.comfyui_client import UNSEEN, Client, Failed, File, Refused
from kleinctl_plugins.comfyui_files import Load, Mark
from kleinctl_plugins.comfyui_graph import STAGES, Api, Files, Reference
from kleinctl_plugins.comfyui_server import Server, open_server, quoted, running_server
from kleinctl_plugins.pipeline import open_references

from kleinctl import (
    Budget,
    Environment,
    Fit,
    Hardware,
    InstalledModel,
    Job,
    KleinctlError,
    Model,
    Part,
    Problem,
    WatchedDevice,
    comfyui,
    hookimpl,
    logs,
    memory,
    pictures,
)

kleinctl_api = 1

#: Measured on an H100 with ComfyUI 0.29 and full-size random weights (docs/measurements.md): its start, of the time in
#: which a worker of kleinctl's starts there (11 to 17 s, 9 to 10); RAM beside the weights (17.2 GiB in all, fp8 13.8).
START_TIMES, RAM_BYTES = 1.5, 2 * 2**30
#: What a picture takes beside its arithmetic: fixed, and each time one is packed or unpacked on its way as PNG.
TURN_SECONDS, PACKINGS = 0.35, 2
#: Weights that are not on the card come to it each time, and push others out: bytes moved for each that lacks, and the
#: share of the link's rate that is reached (1.34 and 2.03 s at 1024 x 1024 with 16 and 8 GiB free; fp8 1.14 and 1.45).
MOVES, RATE_SHARE = 2, 0.35
#: How the node of a role names its file.
INPUTS = {
    "transformer": ("UNETLoader", "unet_name"),
    "text-encoder": ("CLIPLoader", "clip_name"),
    "vae": ("VAELoader", "vae_name"),
}
#: VRAM that may come free between the plan and the start, without a limit.
ODD_BYTES = 2**30
#: What is shown while somebody else's job is before ours: with its steps, or where ComfyUI does not tell them.
BEFORE = "queue, the job before this one"
HIDDEN = "queue, behind a job that shows its steps to its own page alone (Ctrl-C ends this one alone)"
#: The oldest compute capability with arithmetic in four bits.
NVFP4 = (12, 0)


@hookimpl
def kleinctl_backends() -> list[ComfyuiFp8]:
    return [ComfyuiFp8()]


class ComfyuiFp8:
    """ComfyUI with its dynamic memory, over its own API. The server is a process of its own, with its own Python."""

    name = "comfyui-fp8"
    aliases = ("comfy", "comfyui")
    #: What its client needs; torch is ComfyUI's own matter.
    requires = ("filelock>=3.15", "pillow>=11", "websocket-client>=1.7,<2")
    layout = "comfyui"
    precisions = ("fp8", "bf16", "nvfp4")

    def __init__(self) -> None:
        self._device: WatchedDevice | None = None

    def health(self, hardware: Hardware, environment: Environment | None) -> Problem | None:
        return None

    def absent(self) -> Problem | None:
        """What is lacking of the ComfyUI that kleinctl knows of."""
        checkout = comfyui.known()
        return comfyui.trouble(checkout) if checkout is not None else not_installed()

    def fit(self, model: Model, hardware: Hardware, job: Job) -> Fit:
        """ComfyUI takes all that is free, up to all weights with the largest activations, and moves what lacks.

        What --reserve-vram leaves alone its weights do; its activations and what it keeps of them do not (measured:
        15.96 GiB with 16.0 free and 1.55 to reserve).
        """
        weights = _weights(model, job)
        working = max(
            memory.denoise_bytes(model, job), memory.decode_bytes(model, job), memory.reference_bytes(model, job)
        )
        held = memory.CONTEXT_BYTES + weights
        least = memory.CONTEXT_BYTES + working + model.shape.vae_bytes
        free, room = (hardware.gpu.vram_free_bytes, memory.usable_vram(hardware.gpu)) if hardware.gpu else (held, held)
        following = self._seconds(model, hardware, job, weights, max(0, held - max(least, room)))
        why_not = _unoffered(model, hardware, job) or memory.lacking(
            model, hardware, vram_bytes=least, ram_bytes=weights + RAM_BYTES
        )
        start = START_TIMES * memory.start_seconds(hardware)
        return Fit(
            vram_bytes=max(least, min(free, held + working)),
            ram_bytes=weights + RAM_BYTES,
            disk_bytes=sum(part.size or 0 for part in _parts(model, job)),
            seconds_first=start + memory.read_seconds(weights, hardware, warm=False) + following,
            seconds_next=following,
            fits=why_not is None,
            strategy="dynamic",
            why_not=why_not,
        )

    def _seconds(self, model: Model, hardware: Hardware, job: Job, weights: int, lacks: int) -> float:
        """One more picture with a new prompt; all layers of the text encoder are run."""
        encode, forward, decode = memory.stage_seconds(model, hardware, job)
        encode *= model.shape.text_layers / model.shape.text_layers_read
        arithmetic = encode + forward * memory.forwards(model, job) + decode
        saving = memory.save_seconds(hardware, job)
        rate = memory.copy_rate(hardware.gpu, hardware.rates) * RATE_SHARE
        return arithmetic + saving * (1 + PACKINGS) + TURN_SECONDS + min(weights, MOVES * lacks) / rate

    def open_device(self, budget: Budget) -> WatchedDevice:
        """What the worker measures: the card that the server computes on."""
        self._device = WatchedDevice(budget)
        return self._device

    def workflow(self, model: Model, job: Job) -> dict[str, Any]:
        """The job as a workflow for ComfyUI's own page; reference pictures are named as they are, for `input`."""
        sizes = [pictures.reference(path) for path in job.images]
        return comfyui_graph.page(model, job, [Reference(e.path.name, e.width * e.height) for e in sizes])

    def check_workflow(self, path: Path, job: Job) -> None:
        """Whether a user's workflow can be run with a job, as far as that shows without a server.

        Raises:
            KleinctlError: it cannot be read, is in the page's format, or has no prompt.
        """
        references = [Reference(each.name, 0) for each in job.images]
        comfyui_graph.with_job(comfyui_graph.read_workflow(path), job, references, path)

    def check_server(self, url: str) -> None:
        """Whether a server can be `Budget.server`, as far as its URL tells.

        Raises:
            KleinctlError: it is not on this machine.
        """
        Client(url)

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        session = Session(model, self._as_it_is(budget))
        if self._device is not None:
            self._device.process = session.server.pid
        return session

    def _as_it_is(self, budget: Budget) -> Budget:
        """The budget with what is free of the card now: a limit that was typed is all that a plan knows as free."""
        gpu = budget.hardware.gpu if budget.hardware else None
        used = self._device.measure().card_used_bytes if self._device else 0
        if budget.hardware is None or gpu is None or not used:
            return budget
        now = replace(gpu, vram_free_bytes=max(0, gpu.vram_bytes - used))
        return replace(budget, hardware=replace(budget.hardware, gpus=(now,)))


def not_installed() -> Problem:
    """The problem of a machine without a ComfyUI that kleinctl knows of."""
    return Problem(
        "ComfyUI is not installed",
        "kleinctl knows of none: neither one that it installed, nor one of yours that it was told of.",
        "kleinctl install --backend comfy   # or with yours: kleinctl install --comfyui DIR",
        name="comfyui-not-installed",
    )


# What it takes


def _parts(model: Model, job: Job) -> Sequence[Part]:
    precision = job.precision if job.precision in model.precisions(ComfyuiFp8.layout) else None
    return model.parts_for(ComfyuiFp8.layout, precision)


def _weights(model: Model, job: Job) -> int:
    """Weights as they are held: files' sizes, but for the VAE, which is computed in the model's precision."""
    sizes, shape = {part.role: part.size for part in _parts(model, job) if part.size}, model.shape
    transformer = sizes.get("transformer", shape.transformer_bytes)
    return transformer + sizes.get("text-encoder", shape.text_encoder_bytes) + shape.vae_bytes


def _unoffered(model: Model, hardware: Hardware, job: Job) -> str | None:
    """Why the job's precision cannot be had."""
    offered = model.precisions(ComfyuiFp8.layout)
    if job.precision and job.precision not in offered:
        return f"{model.name} comes as {', '.join(offered) or 'one file'} for ComfyUI; {job.precision} was asked for."
    gpu = hardware.gpu
    if job.precision == "nvfp4" and (gpu is None or gpu.capability < NVFP4):
        return f"nvfp4 wants an sm_120 card; {f'{gpu.name} is {gpu.arch}' if gpu else 'there is none here'}."
    return None


# In the worker


@dataclass(frozen=True)
class Drawn:
    """A graph as it is queued, and the files that it loads, as far as they are found on this machine."""

    api: Api
    files: Mapping[Load, Path]


class Session:
    """A server that draws one job after another. It is started anew where one of its files was replaced."""

    strategy = "dynamic"

    def __init__(self, model: InstalledModel, budget: Budget) -> None:
        #: None for a server that was named: of its files nothing is known but what it lists.
        self.checkout = None if budget.server else comfyui.known()
        if self.checkout is None and not budget.server:
            raise KleinctlError(not_installed())
        self.model, self.budget = model, budget
        self.warnings: list[str] = []
        self._loaded: dict[Path, Mark] = {}
        self._offers: dict[str, Mapping[str, Any]] = {}
        self.dtype = next((part.dtype for part in self._wanted("transformer") if part.dtype), model.manifest.dtype)
        self.server = self._open()

    def _open(self) -> Server:
        self._offers, self._loaded = {}, {}
        if self.checkout is None:
            server = open_server(None, self.budget, None)
            server.empty()  # so that it begins as one that is started now
            return server
        running = running_server(self.checkout)
        if running is not None and self._has_model(running):
            gpu = self.budget.hardware.gpu if self.budget.hardware else None
            if gpu is not None and memory.usable_vram(gpu) > self.budget.vram_bytes + ODD_BYTES:
                self._say(f"the ComfyUI at {running.url} runs as its user started it, and knows of no --vram-limit")
            return running
        self._offers = {}
        return open_server(self.checkout, self.budget, comfyui.paths_file())

    def _has_model(self, server: Server) -> bool:
        """Whether a server that runs lists the model's files; one that does not is left."""
        self.server = server
        try:
            self._names()
        except KleinctlError as error:
            server.close()
            if error.problem.name != "comfyui-lacks-model":
                raise
            self._say(f"the ComfyUI at {server.url} lacks files of the model, so another was started beside it")
            return False
        return True

    def _reopen(self) -> None:
        self.server.close()
        self.server = self._open()

    @property
    def versions(self) -> dict[str, str]:
        """What decides how a picture looks: the server's packages, and not this worker's."""
        return {"comfyui": self.server.version, "torch": self.server.torch, "python": self.server.python}

    def generate(self, job: Job, progress: Any) -> Any:
        progress("load", 0, 1)
        if self.server.ended:
            self._reopen()
        elif self._started_anew():
            self._offers, self._loaded = {}, {}
            self.server.meet()  # it may have been updated
        drawn = self._drawn(job)
        comfyui_files.check(drawn.files, self.model.manifest, editing=bool(job.images), own=not job.workflow)
        if self._replaced(drawn):
            self._reopen()
            drawn = self._drawn(job)  # its temporary folder was emptied as well
        self._loaded.update(comfyui_files.marks(list(drawn.files.values())))
        return self._run(drawn.api, job, progress)

    def _run(self, api: Api, job: Job, progress: Any) -> Any:
        """The picture of a graph, fetched and looked at."""
        try:
            made, *others = self.server.client.run(api, _Told(api, job, progress), self.server.watch)
            if not made.pictured:
                raise KleinctlError(self._no_picture([made, *others]))
            picture = self._fetched(made)
        except Refused as error:
            raise self._rejected(api, error) from None
        except Failed as error:
            raise self._failure(api, error.said) from None
        progress("decode", 1, 1)
        saved = [file for file in others if file.type == "output"]
        if saved:
            self._say(f"the workflow made {1 + len(saved)} files; left where ComfyUI put them: {self._places(saved)}")
        image, kind, frames = _opened(picture, made.filename)
        if frames > 1:
            self._say(f"the PNG has the first of {frames} pictures; ComfyUI made them all as {self._places([made])}")
        elif kind != "PNG":
            self._say(f"the PNG has the pixels of a {kind} file; ComfyUI made it as {self._places([made])}")
        return image

    def _started_anew(self) -> bool:
        """Whether a server that is not ours has forgotten our last job, and so what it had loaded."""
        try:
            return not self.server.ours and self.server.client.forgot()
        except (Refused, KleinctlError):  # what comes next will tell
            return False

    def _fetched(self, made: File) -> bytes:
        try:
            return self.server.client.picture(made)
        except Refused as error:
            if error.status == 403:
                raise
            why = f"ComfyUI named {self._places([made])}, and answered HTTP {error.status} when it was to hand it over."
            fix = "draw it again: something took it out of ComfyUI's folder"
            raise KleinctlError(Problem("the picture is gone", why, fix, name="picture-damaged")) from None

    def _places(self, files: Sequence[File]) -> str:
        """Where files of the server lie, as far as that is known."""
        own = comfyui.folder() / "run" if self.server.ours else Path()
        named = [(own if each.type == "output" else Path(), each) for each in files[:4]]
        paths = [str(folder / each.type / each.subfolder / each.filename)[:300] for folder, each in named]
        return ", ".join(paths) + (f" and {len(files) - 4} more" if len(files) > 4 else "")

    def _no_picture(self, files: Sequence[File]) -> Problem:
        ends = ", ".join(comfyui_client.PICTURES)
        why = f"Wanted is a file that ends in {ends}; it made {self._places(files)}, which stays there."
        fix = "add a SaveImage node to the workflow, and export it again"
        return Problem("the workflow made no picture", why, fix, name="workflow-without-picture")

    def close(self) -> None:
        self.server.close()

    # The graph

    def _drawn(self, job: Job) -> Drawn:
        """The graph of a job, as this server takes it."""
        references = self._references(job)
        workflow = job.workflow
        if workflow:
            own = Path(workflow)
            given = comfyui_graph.read_workflow(own)
            api: Api = comfyui_graph.with_job(given, job, references, own, self._say)
        else:
            api = comfyui_graph.picture(self._names(job.precision), job, self.model.manifest.variant, references).api()
        try:
            api = comfyui_graph.validate(api, self._offered)
        except KleinctlError as error:
            raise KleinctlError(self._at_home(error.problem)) from None
        places = {load: self._where(load) for load in comfyui_files.loads(api)}
        unseen = [load.name for load, path in places.items() if path is None and Path(load.name).suffix]
        if unseen and self.checkout is not None:
            self._say(f"not looked at before the run, for it was not found on the disk: {', '.join(unseen)}")
        files = {load: path for load, path in places.items() if path is not None}
        for load, path in files.items() if not workflow else ():
            own = self.model.folder / load.kind / path.name
            if own.is_file() and not comfyui_files.alike(path, own):
                self._say(f"{path} is what ComfyUI loads; the sha256 in the record is that of another file, {own}")
        return Drawn(api, files)

    def _at_home(self, problem: Problem) -> Problem:
        """The problem with a fix that names this checkout's folder, where it is known."""
        return replace(problem, fix=problem.fix.replace("--comfyui DIR", f"--comfyui {self.server.place}"))

    def _say(self, text: str) -> None:
        """Warn, once for a picture."""
        if text not in self.warnings:
            self.warnings.append(text)

    def _offered(self, kind: str) -> Mapping[str, Any]:
        """What the server says of a node. Lists of files change, so those of loaders are asked for each time."""
        if kind not in self._offers or kind in {node for node, _ in INPUTS.values()}:
            try:
                self._offers[kind] = self.server.client.node(kind)
            except Refused as error:
                raise self.server.forbidden(error) from None
        return self._offers[kind]

    def _names(self, precision: str = "") -> Files:
        """The model's files, those of a precision or those that are here, as the server lists them.

        Raises:
            KleinctlError: one is not there.
        """
        names = {}
        for role, (node, key) in INPUTS.items():
            listed = comfyui_graph.choices(self._offered(node), key)
            wanted = self._wanted(role, precision)
            names[role] = next((name for part in wanted for name in listed if _base(name) == part.name), "")
            if not names[role]:
                raise KleinctlError(self._lacks(role, wanted, listed))
        return Files(names["transformer"], names["text-encoder"], names["vae"])

    def _wanted(self, role: str, precision: str = "") -> list[Part]:
        """The parts that would do, the best first: those of a precision, else those that are here."""
        manifest, layout = self.model.manifest, ComfyuiFp8.layout
        if role == "transformer" and precision:
            return [part for part in manifest.parts_for(layout, precision) if part.role == role]
        every = [part for part in manifest.parts if part.role == role and layout in part.to]
        here = [part for part in every if self.checkout and (self.model.folder / part.to[layout]).is_file()]
        return here or every

    def _lacks(self, role: str, wanted: Sequence[Part], listed: Sequence[str]) -> Problem:
        names = " or ".join(dict.fromkeys(part.name for part in wanted)) or "a file"
        install = comfyui_files.install(self.model.manifest)
        fix = install if self.server.ours else f"{install}   # then start ComfyUI again"
        fix = fix if self.checkout else "kleinctl doctor --comfyui DIR   # the folder of that server"
        why = f"Wanted is {names}; it lists {', '.join(listed[:8]) or 'none'}{', …' if len(listed) > 8 else ''}."
        what = f"ComfyUI has no {comfyui_files.ROLES[role]} of {self.model.manifest.name}"
        return Problem(what, why, fix, name="comfyui-lacks-model", ref="E03")

    def _where(self, load: Load) -> Path | None:
        """The file behind a name: ours come first in a server that we start, the user's own in one that runs."""
        if self.checkout is None:
            return None
        own = [self.model.folder, *comfyui.places()]
        ours = [folder / load.kind for folder in own]
        theirs = [Path(folder) for folder in (self.server.folders or self._their_folders).get(load.kind, ())]
        folders = ours + theirs if self.server.ours else theirs + ours
        return next((path for folder in folders if (path := folder / load.name).is_file()), None)

    @cached_property
    def _their_folders(self) -> Mapping[str, Sequence[str]]:
        """The folders that the checkout itself searches, by kind."""
        found = comfyui.read(self.checkout.base or self.checkout.path) if self.checkout else None
        return found.folders if found else {}

    def _references(self, job: Job) -> list[Reference]:
        """The reference pictures, handed to the server."""
        handed = []
        for image in open_references(job.images) or ():
            buffer = io.BytesIO()
            image.save(buffer, "PNG", compress_level=1)
            png = buffer.getvalue()
            name = f"kleinctl-{hashlib.sha256(png).hexdigest()[:16]}.png"
            try:
                handed.append(Reference(self.server.client.upload(name, png), image.width * image.height))
            except Refused as error:
                raise self.server.forbidden(error) from None
        return handed

    # What goes wrong

    def _replaced(self, drawn: Drawn) -> bool:
        """Whether the server holds another file than the one that lies there now.

        Raises:
            KleinctlError: it does, and it is not ours to start again.
        """
        now = comfyui_files.marks(list(drawn.files.values()))
        changed = [path for path in drawn.files.values() if self._loaded.get(path, now.get(path)) != now.get(path)]
        if not changed and not self.server.ours:
            changed = [path for load, path in drawn.files.items() if self._used_before(load, path)]
        if changed and not self.server.ours:
            what = f"{changed[0].name} was replaced after ComfyUI had loaded it"
            why = "It keeps what it has loaded under a name for as long as it runs, and does not look again."
            fix = "start ComfyUI again, then the same command"
            raise KleinctlError(Problem(what, why, fix, name="comfyui-file-replaced", path=str(changed[0])))
        if changed:
            self.warnings.append(f"{changed[0].name} was replaced, so ComfyUI was started again")
        return bool(changed)

    def _used_before(self, load: Load, path: Path) -> bool:
        """Whether a job that the server remembers used the name before the file was written."""
        try:
            history = self.server.client.ask("/history?max_items=64")
        except (Refused, KleinctlError):  # it is too long, for one
            return False
        written = path.stat().st_mtime * 1000
        for entry in history.values() if isinstance(history, dict) else ():
            prompt = entry.get("prompt") if isinstance(entry, dict) else None
            graph = prompt[2] if isinstance(prompt, list) and len(prompt) > 2 and isinstance(prompt[2], dict) else {}
            if load in comfyui_files.loads(graph) and _begun(entry) < written:
                return True
        return False

    def _rejected(self, api: Api, error: Refused) -> KleinctlError:
        """The problem of a graph that the server did not take."""
        if error.status != 400:
            return self.server.forbidden(error)
        try:
            said = json.loads(error.text)
        except (ValueError, RecursionError):
            said = None
        said = said if isinstance(said, dict) else {"error": error.text[:300]}
        told = said.get("error")
        told = told if isinstance(told, dict) else {"message": told}
        return self._explained(api, said, f"It refused the graph: {told.get('message')}")

    def _failure(self, api: Api, said: Mapping[str, Any]) -> KleinctlError:
        """The problem of a run that failed; the traceback goes to the log."""
        traceback = said.get("traceback")
        sys.stderr.write("".join(map(str, traceback if isinstance(traceback, list) else [traceback or ""])) + "\n")
        node = str(said.get("node_type") or "")
        message = " ".join(str(said.get("exception_message") or "it does not say why").split("TIPS:")[0].split())
        kept = {key: said.get(key) for key in ("node_id", "node_type", "exception_type", "exception_message")}
        text = {**kept, "traceback": traceback}
        return self._explained(api, text, f"{node + ': ' if node else ''}{message}")

    def _explained(self, api: Api, said: Mapping[str, Any], message: str) -> KleinctlError:
        """What is known of such an answer, with the file that it comes from."""
        text = json.dumps({"prompt": api, **said}, indent=1)
        for match in logs.explain(text):
            problem = match.problem
            meant = problem.path or self._meant(api, problem, str(said.get("node_type") or ""))
            return KleinctlError(replace(problem, path=meant, fix=self._fix(problem.fix, meant)))
        log = getattr(self.server, "log", None)
        fix = f"kleinctl doctor --log {quoted(log)}" if log else "look at ComfyUI's own log"
        path = str(log) if log else None
        return KleinctlError(
            Problem("ComfyUI drew no picture", f"{message[:500]}.", fix, name="comfyui-failed", path=path)
        )

    def _fix(self, fix: str, meant: str | None) -> str:
        """A fix that can be pasted: a log alone does not tell ComfyUI's folder, nor where a file lies."""
        if "FOLDER" in fix and self.checkout is not None:
            return comfyui_files.install(self.model.manifest)
        return f"kleinctl identify {quoted(Path(meant))}" if meant and fix.startswith("kleinctl identify ") else fix

    def _meant(self, api: Api, problem: Problem, node: str) -> str | None:
        """The file that a problem speaks of: the one that the failed node loads, else one of the graph."""
        own = comfyui_files.loads({key: each for key, each in api.items() if each.get("class_type") == node})
        text, every = f"{problem.what} {problem.why}", comfyui_files.loads(api)
        named = [load for load in every if _base(load.name) in text]
        meant = [load for load in every if f"the {comfyui_files.ROLES[load.role]}" in problem.what]
        found = (self._where(load) for load in (*own, *named, *meant))
        return next((str(path) for path in found if path is not None), None)


class _Told:
    """What a server tells, as kleinctl's progress."""

    def __init__(self, api: Api, job: Job, progress: Any) -> None:
        self._api, self._job, self._progress, self._stage = api, job, progress, "load"
        self._jobs = 0

    def __call__(self, node: str, value: float, most: float) -> None:
        if not node:
            self._waits(int(value), int(most))
            return
        kind = str(self._api.get(node, {}).get("class_type", ""))
        if kind not in STAGES and most > 1:  # somebody's own, which takes its time
            self._progress(kind or "load", int(value), int(most))
            return
        if kind not in STAGES and self._stage == "denoise":
            return  # the steps are done: a node after the sampler does not begin them again
        self._stage = STAGES.get(kind, self._stage)
        if self._stage == "denoise":
            self._progress("denoise", int(value), int(most) or self._job.steps)
        else:
            self._progress(self._stage, 0, 1)

    def _waits(self, value: int, most: int) -> None:
        """Jobs before ours, as those of them that have ended; or steps of the one that runs."""
        if most > 0:
            self._progress(BEFORE, value, most)
        elif not value:
            self._progress(self._stage, 0, 1)
        else:
            self._jobs = max(self._jobs, value)
            self._progress(HIDDEN if most == UNSEEN else "queue", self._jobs - value, self._jobs + 1)


def _base(name: str) -> str:
    """A file's own name in one that may have folders before it, as Linux or Windows write them."""
    return name.replace("\\", "/").rpartition("/")[2]


def _begun(entry: Mapping[str, Any]) -> float:
    """When a job of the history began, in milliseconds; infinite where it does not say."""
    status = entry.get("status")
    messages = status.get("messages") if isinstance(status, dict) else None
    for message in messages if isinstance(messages, list) else ():
        told = message[1] if isinstance(message, list) and len(message) == 2 else None
        at = told.get("timestamp") if isinstance(told, dict) else None
        if isinstance(at, (int, float)):
            return at
    return float("inf")


def _opened(given: bytes, name: str) -> tuple[Any, str, int]:
    """The picture in what the server gave, the kind of its file, and how many pictures that has.

    Raises:
        KleinctlError: it is none, or not whole.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(given), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
            kind, frames = str(image.format), int(getattr(image, "n_frames", 1))
            return image.convert("RGB"), kind, frames
    except Exception as error:  # of a damaged file Pillow raises whatever it stumbles over
        why = f"ComfyUI gave {len(given)} bytes as {name}, which are no whole picture: {error}."
        fix = "draw it again; if it stays so: kleinctl doctor"
        raise KleinctlError(Problem("the picture came damaged", why, fix, name="picture-damaged")) from None
