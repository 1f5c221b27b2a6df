"""A real ComfyUI by `comfyui-fp8` beside `staged-decode`, with the same weights: time, memory, and what they draw.

    python tools/measure_comfyui.py [--free 16 8] [--size 1024x1024] [--runs 4] [--float32] [--out results.json]

Wants a model in both layouts (`python tools/make_full_size.py --comfyui DIR`), ComfyUI (`kleinctl install --backend
comfy --comfyui DIR`), and torch and diffusers in this Python. With --free other memory of the card is really taken, as
by `kleinctl bench`. For the pictures both get the same noise and the same way of cutting to 8 bits, which they
otherwise choose differently; with --float32 both programs also draw in that precision, which takes 40 GiB of the card.

Exit code 1 when a line failed, and when a picture of ComfyUI's is nearer to another of staged-decode's than to its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kleinctl import InstalledModel, Job, bench, generate, road, store
from kleinctl.cli.bench import HEAD, row
from kleinctl.cli.options import this_machine
from kleinctl.comfyui import record
from kleinctl.planner import default_job
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError
from kleinctl.units import GIB
from kleinctl.worker.model_card import ModelCard

if TYPE_CHECKING:
    from kleinctl.bench import Asked, Line
    from kleinctl.road import Way

STAGED, COMFYUI = "staged-decode", "comfyui-fp8"
#: Prompt, seed, and whether it is an edit of ComfyUI's first picture. All but the first are its controls.
JOBS: Mapping[str, tuple[str, int, bool]] = {
    "text to image": ("a red fox in the snow", 1, False),
    "another seed": ("a red fox in the snow", 2, False),
    "another prompt": ("a lighthouse at night, seen from the sea", 1, False),
    "edit": ("a red fox in the snow", 1, True),
}
FIRST = next(iter(JOBS))
BF16 = "ComfyUI bf16"
LOOK_SECONDS = 0.05


# Time and memory


class Resident:
    """Most bytes of RAM that this process's new children have held together, with mapped files (RSS)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._others, self._ended = set(self._children()), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._ended.set()
        self._thread.join(5)

    def _children(self) -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with contextlib.suppress(psutil.Error, OSError):
                own = [each.memory_info().rss for each in self._children() if each not in self._others]
                self.bytes = max(self.bytes, sum(own))


def lines(asked: Asked, free: int | None, precisions: Sequence[str]) -> Iterator[tuple[Line, int]]:
    """Each line and its RSS in bytes; where it fails, the line says why."""
    for backend, precision in ((STAGED, ""), *((COMFYUI, each) for each in precisions)):
        changes = {**asked.changes, "precision": precision} if precision else asked.changes
        who = f"{backend}, {precision}" if precision else backend
        with Resident() as resident:
            for line in bench.measure(replace(asked, backends=(backend,), changes=changes), quiet):
                yield replace(line, who=who, free_bytes=free), resident.bytes


def quiet(*progress: object) -> None:
    """Nobody looks at single steps."""


@contextlib.contextmanager
def held(asked: Asked, free: int | None) -> Iterator[None]:
    """Other memory of the card taken until `free` bytes are left; None for as it is.

    Raises:
        KleinctlError: there is no card, or it has not so much free.
    """
    if free is None:
        yield
        return
    card = asked.detect().gpu
    if card is None:
        raise bench.no_card()
    holder = bench.Holder(Path(sys.executable), card)
    try:
        holder.leave(free)
        yield
    finally:
        holder.close()


# Pictures


def jobs(asked: Asked, reference: Path) -> dict[str, Job]:
    """The jobs, by name."""
    width, height = asked.sizes[0]
    base = default_job(asked.model, width=width, height=height, **asked.changes)
    return {
        name: replace(base, prompt=prompt, seed=seed, images=(reference,) if edit else ())
        for name, (prompt, seed, edit) in JOBS.items()
    }


def by_comfyui(asked: Asked, folder: Path, precisions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Its pictures by title and name, with the transformer of a precision for each title."""
    way = way_of(asked, COMFYUI)
    hardware = asked.detect()
    wanted = jobs(asked, reference_in(folder))
    request = road.request(way, asked.environment(way, hardware), road.place(way, hardware), hardware)
    drawn: dict[str, dict[str, Any]] = {title: {} for title in precisions}
    with generate.Painter(replace(request, jobs=(wanted[FIRST],), parts={}), quiet) as painter:
        for title, precision in precisions.items():
            for name, job in wanted.items():
                output = folder / f"{title} {name}.png".replace(" ", "-")
                painter.paint(replace(job, precision=precision), generate.Output(output), quiet)
                drawn[title][name] = levels(output)
    return drawn


def reference_in(folder: Path) -> Path:
    """The picture that is edited: ComfyUI's first."""
    return folder / f"{BF16} {FIRST}.png".replace(" ", "-")


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """A ComfyUI that kleinctl starts meanwhile computes in float32."""
    used = record.known()
    assert used is not None, "lines were drawn by it"
    record.remember(replace(used, arguments=(*used.arguments, "--force-fp32", "--fp32-text-enc", "--fp32-vae")))
    try:
        yield
    finally:
        record.remember(used)


def by_diffusers(asked: Asked, folder: Path, *, float32: bool) -> dict[str, Any]:
    """What staged-decode draws, or plain diffusers in float32, with ComfyUI's noise and its way to 8 bits."""
    import torch

    way = way_of(asked, STAGED)
    hardware = asked.detect()
    budget = road.budget(road.place(way, hardware), hardware)
    files = store.model_folder(asked.model.name, way.backend.layout)
    if float32:
        torch.backends.cudnn.allow_tf32 = False
        session: Any = ModelCard("resident").load(InstalledModel(replace(asked.model, dtype="float32"), files), budget)
    else:
        session = way.backend.load(InstalledModel(asked.model, files), budget)
    as_comfyui(session.pipe)
    try:
        with torch.no_grad():
            wanted = jobs(asked, reference_in(folder))
            return {name: levels(session.generate(job, quiet)) for name, job in wanted.items()}
    finally:
        session.close()
        torch.cuda.empty_cache()  # for the one that draws next


def as_comfyui(pipe: Any) -> None:
    """ComfyUI's noise, float32 from the processor's generator, and its 8 bits, cut and not rounded."""
    import torch
    from PIL import Image

    prepare, finish = pipe.prepare_latents, pipe.image_processor.postprocess

    def prepared(**given: Any) -> Any:
        shape = (1, given["num_latents_channels"] * 4, given["height"] // 16, given["width"] // 16)
        source = torch.Generator().manual_seed(given["generator"].initial_seed())
        return prepare(**{**given, "latents": torch.randn(shape, generator=source)})

    def cut(decoded: Any, output_type: str) -> list[Any]:
        return [Image.fromarray((255.0 * finish(decoded, output_type="np")[0]).clip(0, 255).astype("uint8"))]

    pipe.prepare_latents = prepared
    pipe.image_processor.postprocess = cut


def way_of(asked: Asked, backend: str) -> Way:
    """How this backend would draw here.

    Raises:
        KleinctlError: it does not fit, or is not installed.
    """
    width, height = asked.sizes[0]
    changes = {**asked.changes, "width": width, "height": height}
    found = road.ways(asked.plugins, [asked.model], backend, asked.detect(), changes)
    if not found:
        raise road.no_way(asked.plugins, asked.model, backend, asked.detect(), changes)
    return found[0]


def levels(picture: Any) -> Any:
    """A picture's pixels, as whole numbers that can be subtracted."""
    import numpy
    from PIL import Image

    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            return numpy.asarray(opened.convert("RGB"), dtype=numpy.int16)
    return numpy.asarray(picture, dtype=numpy.int16)


def difference(one: Any, other: Any) -> dict[str, float]:
    """Of 255 levels: the most that one pixel differs, and what they do on average."""
    apart = abs(one - other)
    return {"max": int(apart.max()), "mean": round(float(apart.mean()), 4)}


def compared(drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Pairs of who drew, and the differences of their pictures by name; last each one's controls with its first."""
    names = list(drawn)
    pairs = [(one, other) for number, one in enumerate(names) for other in names[number + 1 :]]
    found = {
        f"{one} and {other}": {name: difference(drawn[one][name], drawn[other][name]) for name in JOBS}
        for one, other in pairs
    }
    controls = {
        f"control, {who}: {FIRST} and": {
            name: difference(drawn[who][FIRST], picture) for name, picture in drawn[who].items() if name != FIRST
        }
        for who in names
    }
    return {**found, **controls}


# All of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="klein-4b-random")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--free", nargs="*", type=float, default=[], metavar="GIB")
    parser.add_argument("--runs", type=int, default=4, help="new prompts that count, of each line")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], help="ComfyUI's; bf16 is one of them")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="keep ComfyUI's pictures")
    given = parser.parse_args()
    plugins = Plugins()
    width, _, height = given.size.partition("x")
    asked = bench.Asked(
        plugins=plugins,
        model=plugins.model(given.model),
        backends=(STAGED,),
        sizes=((int(width), int(height)),),
        free=(None,),
        runs=given.runs,
        changes={},
        detect=this_machine,
        environment=environment,
    )
    document = bench.document(asked, [], asked.detect(), shlex.join(sys.argv), datetime.now(timezone.utc).isoformat())
    del document["schema"]  # these lines say more than those of `kleinctl bench`
    failed = measured(asked, [int(each * GIB) for each in given.free] or [None], document, given)
    return int(drew_apart(asked, document, given) or failed)


def environment(way: Way, hardware: Any) -> Any:
    """The environment that is there for a backend.

    Raises:
        SystemExit: none is.
    """
    found = road.place(way, hardware).environment
    if found is None:
        raise SystemExit(f"no Python here has {', '.join(way.backend.requires)}")
    return found


def measured(asked: Asked, budgets: list[Any], document: dict[str, Any], given: argparse.Namespace) -> bool:
    """Whether a line failed; each is printed, and put into the document."""
    failed = False
    print(HEAD)
    for free in budgets:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(asked, free))
            except KleinctlError as error:
                print(f"[{error.problem.name}] {error.problem.what}: {error.problem.why}", flush=True)
                failed = True
                continue
            for line, rss in lines(asked, free, given.precisions):
                failed = failed or line.problem is not None
                print(f"{row(line)}  RSS {rss / GIB:.1f}", flush=True)
                document["lines"].append({**line.to_json(), "rss_bytes": rss})
                write(given.out, document)
    return failed


def drew_apart(asked: Asked, document: dict[str, Any], given: argparse.Namespace) -> bool:
    """Whether a picture of ComfyUI's is not that of staged-decode's same job; the differences are printed."""
    with tempfile.TemporaryDirectory(prefix="kleinctl-comfyui-") as temporary:
        folder = given.pictures or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        theirs = by_comfyui(asked, folder, {f"ComfyUI {each}": each for each in given.precisions})
        drawn = {STAGED: by_diffusers(asked, folder, float32=False), **theirs}
        show(document, given.out, compared(drawn))
        if given.float32:
            drawn["diffusers float32"] = by_diffusers(asked, folder, float32=True)
            show(document, given.out, compared(drawn))
            with in_float32():
                drawn |= by_comfyui(asked, folder, {"ComfyUI float32": "bf16"})
            show(document, given.out, compared(drawn))
    own = [nearest(name, drawn[BF16][name], drawn[STAGED]) for name in JOBS]  # each is told
    return not all(own)


def nearest(name: str, picture: Any, others: Mapping[str, Any]) -> bool:
    """Whether a picture is nearer to that of its own job than to those of all others."""
    apart = {each: difference(picture, other)["mean"] for each, other in others.items()}
    following = min((mean, each) for each, mean in apart.items() if each != name)
    print(
        f"{BF16}, {name}: {apart[name]:.3f} from {STAGED}'s; next is {following[1]} with {following[0]:.3f}", flush=True
    )
    return apart[name] < following[0]


def show(document: dict[str, Any], out: Path | None, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the differences that are new, and put them into the document."""
    for title in [each for each in found if each not in document.get("pictures", {})]:
        told = (
            f"  {name}: at most {each['max']}, {each['mean']:.3f} on average" for name, each in found[title].items()
        )
        print(title, *told, sep="\n", flush=True)
    document["pictures"] = found
    write(out, document)


def write(out: Path | None, document: Mapping[str, Any]) -> None:
    """Put the document into its file, where one was named."""
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
