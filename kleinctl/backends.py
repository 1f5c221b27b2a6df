"""What a backend can do: the interface a plugin implements, and what it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kleinctl.environment import Environment
    from kleinctl.hardware import Hardware
    from kleinctl.manifest import Model
    from kleinctl.problem import Problem

#: Version of the plugin interface. A plugin module says which it was written for: `kleinctl_api = 1`.
API_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One picture to make, with every choice made.

    Sizes are in pixels and multiples of 16. `images` are reference pictures for an edit, in their order. `precision` is
    how weights are held where that is not as the manifest says, such as `fp8`; the picture is then a little another.
    `workflow` is a user's own, for a backend that runs such: prompt, seed and size are put into it.
    """

    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: float
    images: tuple[Path, ...] = ()
    precision: str = ""
    workflow: Path | None = None


@dataclass(frozen=True)
class Budget:
    """What a job may use on this machine: bytes of VRAM and of RAM, and the torch device it runs on.

    `hardware` is what was known of the machine when the job was planned, with the rates of its card. `server` is the
    URL of a program that runs already, for a backend that would otherwise start or look for one.
    """

    vram_bytes: int
    ram_bytes: int
    device: str = "cuda:0"
    hardware: Hardware | None = None
    server: str | None = None


@dataclass(frozen=True)
class Stage:
    """What one stage (`encode`, `denoise`, `decode`) is predicted to take: a peak in bytes of VRAM, and seconds.

    `weights_bytes` of the peak are weights; the rest is activations and the CUDA context.
    """

    name: str
    vram_bytes: int
    weights_bytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A backend's prediction for a model, a machine and a job.

    `vram_bytes` and `ram_bytes` are peaks, `disk_bytes` what all parts take on disk, `seconds_first` a picture from
    process start, `seconds_next` one more with a new prompt. `why_not` is a sentence where `fits` is false. `stages`
    are those of the next picture, in their order, where the backend can tell them apart.
    """

    vram_bytes: int
    ram_bytes: int
    disk_bytes: int
    seconds_first: float
    seconds_next: float
    fits: bool
    strategy: str
    why_not: str | None = None
    stages: tuple[Stage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fit as JSON documents carry it."""
        return {
            "vram_bytes": self.vram_bytes,
            "ram_bytes": self.ram_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds_first": round(self.seconds_first, 2),
            "seconds_next": round(self.seconds_next, 2),
            "fits": self.fits,
            "strategy": self.strategy,
            "stages": [{**vars(each), "seconds": round(each.seconds, 3)} for each in self.stages],
        }


@dataclass(frozen=True)
class InstalledModel:
    """A model as a worker finds it: its manifest and the folder that holds its parts in the backend's layout.

    `parts` are their sha256 by id, as far as they are known. `cache` is a folder of kleinctl's where a session may keep
    what it can make again; it may be emptied at any time.
    """

    manifest: Model
    folder: Path
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    cache: Path | None = None


#: `progress(stage, done, total)` with stage `load`, `encode`, `denoise` or `decode`; kleinctl times the stages by it.
Progress = Callable[[str, int, int], None]


class Session(Protocol):
    """A loaded model that makes pictures, in the worker process.

    It may have `warnings`, a list of sentences about the last picture (kleinctl shows and empties it), `dtype`, the
    precision it computes in where that is not the manifest's, `tokenizer` (kleinctl says what of a long prompt was not
    read) and `tiling`, side and overlap in pixels of the tiles that the last picture was decoded in. It may have
    `prepare(jobs, progress)`, which is told the jobs that come next, in their order: it can do a stage of all of them
    while that stage's weights are at hand. What it cannot do for a job it leaves to `generate`.
    """

    #: How the weights are held, in one or two words; goes into the record of each picture.
    strategy: str

    def generate(self, job: Job, progress: Progress) -> Any:
        """The picture of `job`, as a `PIL.Image.Image` in RGB."""

    def close(self) -> None:
        """Free what the session holds."""


@runtime_checkable
class Backend(Protocol):
    """One way to run a model. `kleinctl_backends` returns instances of such a class.

    It may have `prefetch(model, budget, job)`, which the worker calls before torch is imported, with the first job: it
    can begin to read weights meanwhile. `precisions` are the values of `Job.precision` that it knows besides "".
    `open_device(budget)` gives what the worker measures by, a `Device`, where that is not a card that this process uses
    by torch. `workflow(model, job)` is the job in the form of another program's page, and `check_workflow(path, job)`
    refuses a user's workflow that it cannot run. `absent()` looks on this machine for what it needs beside hardware and
    packages, such as a program, and is the problem of what is not there; of other machines that is then not known.
    `check_server(url)` refuses a URL that cannot be its `Budget.server`.
    """

    name: str
    aliases: tuple[str, ...]
    #: Python packages that `load` needs, as requirement strings with ranges; kleinctl finds or builds an environment.
    requires: tuple[str, ...]
    #: The layout of model files it reads: a key of `part.to` in manifests.
    layout: str

    def fit(self, model: Model, hardware: Hardware, job: Job) -> Fit:
        """Predict peaks and seconds: arithmetic on manifest numbers, without opening a file."""

    def health(self, hardware: Hardware, environment: Environment | None) -> Problem | None:
        """What keeps this backend from running, by these facts alone: they may be another machine's.

        `environment` is None when none is made yet.
        """

    def load(self, model: InstalledModel, budget: Budget) -> Session:
        """Load `model` within `budget`. Runs in the worker, the only place that imports torch."""
