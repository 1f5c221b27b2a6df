"""Backends that are told what comes next: one notes it, others fail at it, each in the way of its name."""

import os
from pathlib import Path

from kleinctl import Job
from tests.plugins.echo import Echo, Session


def notes(jobs: list[Job]) -> None:
    with Path(os.environ["AHEAD_FILE"]).open("a") as file:
        print(*(job.seed for job in jobs), file=file)


def raises(jobs: list[Job]) -> None:
    raise RuntimeError("the stage that failed ahead")


def exits(jobs: list[Job]) -> None:
    os._exit(3)


class Ahead(Echo):
    aliases = ()

    def __init__(self, does):
        self.does, self.name = does, f"ahead-{does.__name__}"

    def load(self, model, budget):
        return AheadSession(self.does)


class AheadSession(Session):
    def __init__(self, does):
        super().__init__(1000)
        self.does = does

    def prepare(self, jobs, progress):
        progress("encode", 0, len(jobs))
        self.does(jobs)
        progress("encode", len(jobs), len(jobs))
        self.warnings.append("it was slow")


class DiesOnce(Echo):
    """Takes the worker along at its first picture, and not again: the file `AHEAD_FILE` says whether it has."""

    name, aliases = "dies-once", ()

    def load(self, model, budget):
        return DiesOnceSession(1000)


class DiesOnceSession(Session):
    def generate(self, job, progress):
        if not Path(os.environ["AHEAD_FILE"]).exists():
            Path(os.environ["AHEAD_FILE"]).touch()
            os._exit(3)
        return super().generate(job, progress)


def kleinctl_backends():
    return [*map(Ahead, (notes, raises, exits)), DiesOnce()]
