"""The record inside a picture, and the way back from it to the job."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import __version__
from kleinctl.backends import Job
from kleinctl.pngtext import read_text
from kleinctl.problem import KleinctlError, Misuse, Problem

if TYPE_CHECKING:
    from kleinctl.manifest import Model

RECORD_SCHEMA = "kleinctl.record/1"
#: What a record may ask for: it may come from a stranger.
MAX_SIDE, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 2**14, 1000, 100.0, 2**64 - 1


def begin(job: Job, model: Model, backend: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """What is known beforehand of how a picture is made; the worker adds the rest. `parts` are sha256 by id.

    Raises:
        OSError: a reference picture cannot be read.
    """
    if job.images or job.workflow:
        from kleinctl.verify import hash_file  # takes a hundredth of a second, like most that is imported late here

    return {
        "schema": RECORD_SCHEMA,
        "prompt": job.prompt,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
        **({} if job.workflow else {"steps": job.steps, "guidance": job.guidance}),
        "images": [_named(path, hash_file(path)) for path in job.images],
        "model": model.name,
        "variant": model.variant,
        "parts": dict(parts),
        "backend": backend,
        **({"precision": job.precision} if job.precision else {}),
        **({"workflow": _named(job.workflow, hash_file(job.workflow))} if job.workflow else {}),
    }


def _named(path: Path, digest: str) -> dict[str, str]:
    return {"name": path.name, "sha256": digest}


def is_picture_of(png: Path, begun: Mapping[str, Any]) -> bool:
    """Whether `png` has a record that goes on from `begun`: the same job, made in the same way.

    Names of reference pictures do not count, for their sha256 say more.
    """
    try:
        record = read_record(png)
        digests = [each["sha256"] for each in record["images"]]
    except (KleinctlError, KeyError, TypeError):
        return False
    same = all(record.get(key) == value for key, value in begun.items() if key != "images")
    alike = digests == [each["sha256"] for each in begun["images"]]
    return same and alike and record.get("precision", "") == begun.get("precision", "")


def numbered(path: Path) -> Iterator[Path]:
    """`path`, and with numbers from 2 on where that name is taken: `klein-7.png`, `klein-7-2.png`, …"""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def read_record(png: Path) -> dict[str, Any]:
    """The record in a picture that kleinctl made.

    Raises:
        KleinctlError: it cannot be read, is no PNG, is damaged, or has none.
    """
    text = read_text(png).get("kleinctl")
    if text is None:
        raise _no_record(
            png, "It is a PNG, but says nothing of how it was made; programs that edit pictures drop that."
        )
    try:
        record = json.loads(text)
        schema = record["schema"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _no_record(png, "What it says of how it was made is damaged.") from None
    if schema != RECORD_SCHEMA:
        raise _no_record(
            png, f"Its record is a {str(schema)[:40]!r}; this kleinctl ({__version__}) reads {RECORD_SCHEMA}."
        )
    return record


def _no_record(png: Path, why: str) -> KleinctlError:
    fix = "give a picture as kleinctl wrote it"
    return KleinctlError(Problem(f"{png.name} has no record", why, fix, name="record-missing", path=str(png)))


def job_from_record(record: Mapping[str, Any], images: Sequence[Path] = ()) -> Job:
    """The job of a record, whose `model` and `backend` are then known to be text.

    `images` are the reference pictures it was made from, in their order; where there were none they are new ones.

    Raises:
        KleinctlError: the record is damaged, or `images` are not those pictures.
    """
    own = {"steps": 1, "guidance": 1.0} if "workflow" in record else record  # a workflow has its own, which stay
    try:
        job = Job(
            prompt=_checked(record["prompt"], str),
            width=_checked(record["width"], int, 16, MAX_SIDE),
            height=_checked(record["height"], int, 16, MAX_SIDE),
            seed=_checked(record["seed"], int, 0, MAX_SEED),
            steps=_checked(own["steps"], int, 1, MAX_STEPS),
            guidance=float(_checked(own["guidance"], (int, float), 0, MAX_GUIDANCE)),
            images=tuple(images),
            precision=_checked(record.get("precision", ""), str),
        )
        wanted = [(str(each["name"]), str(each["sha256"])) for each in record["images"]]
        if job.width % 16 or job.height % 16:
            raise ValueError(f"{job.width}x{job.height}")
        for key in ("model", "backend"):
            _checked(record[key], str)
    except (KeyError, TypeError, ValueError) as error:
        raise KleinctlError(
            Problem(
                "the record of the picture is damaged",
                f"{error.args[0] if error.args else error} is missing or is not what it can be.",
                "give a picture as kleinctl wrote it",
                name="record-damaged",
            )
        ) from None
    _check_references(wanted, images)
    return job


def _checked(value: Any, kind: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    good = isinstance(value, kind) and not isinstance(value, bool)
    if not good or (not isinstance(value, str) and not least <= value <= most):
        raise ValueError(repr(value)[:60])
    return value


def _check_references(wanted: Sequence[tuple[str, str]], images: Sequence[Path]) -> None:
    if not wanted:
        return
    if len(wanted) != len(images):
        names = " ".join(f"--image {shlex.quote(name)}" for name, _ in wanted)
        raise Misuse(
            Problem(
                f"the picture was made from {len(wanted)} reference pictures",
                f"A record holds their names and sha256, not the pictures; {len(images)} were given.",
                names,
                name="references-missing",
            )
        )
    from kleinctl.verify import hash_file

    for (name, digest), path in zip(wanted, images, strict=True):
        if hash_file(path) != digest:
            raise KleinctlError(
                Problem(
                    f"{path.name} is not the reference picture {name}",
                    f"The picture was made from one with sha256 {digest[:12]}…; this file has another.",
                    f"--image {name}",
                    name="reference-differs",
                    path=str(path),
                )
            )
