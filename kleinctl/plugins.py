"""Finds plugins, remembers which one offered what, and survives those that fail."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from kleinctl import atomic
from kleinctl.backends import API_VERSION
from kleinctl.home import disabled_file, manifests_folder
from kleinctl.problem import KleinctlError, Misuse, Problem, did_you_mean, shell

if TYPE_CHECKING:
    from kleinctl.logs import LogPattern
    from kleinctl.manifest import Model

GROUP = "kleinctl"
#: Hooks beside those of backends and models.
OTHER_HOOKS = (
    "kleinctl_checks",
    "kleinctl_signatures",
    "kleinctl_log_patterns",
    "kleinctl_problem_pages",
    "kleinctl_executors",
)

#: Marks a function of a plugin as the implementation of the hook of that name.
hookimpl = pluggy.HookimplMarker("kleinctl")


@dataclass(frozen=True)
class Plugin:
    """One entry point: a name, the package that brings it, its state, and what it offered, by hook."""

    name: str
    module: str
    distribution: str
    version: str
    disabled: bool = False
    problem: Problem | None = None
    offers: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """A thing that a plugin offered, and the plugin's module."""

    thing: Any
    plugin: str
    module: str


class Plugins:
    """All plugins of this installation. Nothing is imported before it is asked for."""

    def __init__(self, disabled: frozenset[str] | None = None) -> None:
        self.disabled = disabled_names() if disabled is None else disabled
        self.problems: list[Problem] = []
        self._entries: dict[str, Plugin] = {}
        self._answers: dict[str, list[Offer]] = {}
        self._manager = pluggy.PluginManager("kleinctl")

    @cached_property
    def manager(self) -> pluggy.PluginManager:
        """The pluggy manager with every plugin that imports registered."""
        from kleinctl import hookspecs

        self._manager.add_hookspecs(hookspecs)
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=_ours_first):
            self._register(entry)
        for name in sorted(self.disabled - set(self._entries)):
            known = ", ".join(self._entries)
            why = f"Installed are {known}.{did_you_mean(name, self._entries)}"
            fix = shell("kleinctl", "plugins", "--enable", name) if name in switched_off() else "kleinctl plugins"
            self.problems.append(
                Problem(f"there is no plugin {name} to disable", why, fix, "unknown-plugin", "warning")
            )
        while True:
            try:
                self._manager.check_pending()
                return self._manager
            except pluggy.PluginValidationError as error:
                name = self._manager.get_name(error.plugin) or "?"
                self._fail(name, "implements a hook that does not exist", str(error))
                self._manager.unregister(error.plugin)

    def _register(self, entry: importlib.metadata.EntryPoint) -> None:
        distribution = entry.dist.metadata["Name"] if entry.dist else "?"
        version = entry.dist.version if entry.dist else "?"
        plugin = Plugin(entry.name, entry.value, distribution, version, disabled=entry.name in self.disabled)
        if entry.name in self._entries:
            other = self._entries[entry.name].distribution
            self.problems.append(
                Problem(
                    f"two plugins are named {entry.name}",
                    f"One comes from {other}, one from {distribution}; the second is not used.",
                    f"pip uninstall {distribution}",
                    name="plugin-name-taken",
                )
            )
            return
        self._entries[entry.name] = plugin
        if plugin.disabled:
            return
        try:
            module = entry.load()
            wanted = getattr(module, "kleinctl_api", None)
            if wanted != API_VERSION:
                said = "does not say" if wanted is None else f"says {wanted}"
                self._fail(
                    entry.name,
                    "was written for another plugin API",
                    f"This kleinctl offers version {API_VERSION}; `kleinctl_api` in {entry.value} {said}.",
                )
                return
            self._manager.register(module, name=entry.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a stranger's module raises, SystemExit too, is one problem
            self._fail(entry.name, "does not start", _in_words(error))

    def _fail(self, name: str, what: str, why: str) -> None:
        problem = Problem(
            f"plugin {name} {what}",
            why,
            shell("kleinctl", "plugins", "--disable", name),
            name="plugin-failed",
            severity="warning",
        )
        self.problems.append(problem)
        if name in self._entries:
            self._entries[name] = Plugin(**{**vars(self._entries[name]), "problem": problem})

    def offers(self, hook: str) -> list[Offer]:
        """What every plugin answers to `hook`; one that raises is a problem, and the others go on. Asked once."""
        if hook in self._answers:
            return self._answers[hook]
        found: list[Offer] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            name = implementation.plugin_name
            try:
                things = _listed(implementation.function())
                wrong = next(filter(None, (_unfit(hook, thing) for thing in things)), None)
                labels = [_label(thing) for thing in things]
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too
                self._fail(name, f"failed in {hook}", _in_words(error))
                continue
            if wrong:
                self._fail(name, f"offers something in {hook} that cannot be used", wrong)
                continue
            module = implementation.plugin.__name__ if isinstance(implementation.plugin, ModuleType) else ""
            found += [Offer(thing, name, module) for thing in things]
            self._entries[name].offers[hook] = labels
        self._answers[hook] = found
        return found

    @cached_property
    def backends(self) -> dict[str, Offer]:
        """Backends by name; of two with one name the first stays."""
        found: dict[str, Offer] = {}
        for offer in self.offers("kleinctl_backends"):
            wrong = _no_backend(offer.thing)
            if wrong:
                self._fail(offer.plugin, "offers something that is no backend", wrong)
                continue
            names = (offer.thing.name, *offer.thing.aliases)
            taken = next((n for n in names for o in found.values() if n in (o.thing.name, *o.thing.aliases)), None)
            if taken:
                self._fail(offer.plugin, f"offers a second backend named {taken}", "The first one stays in use.")
                continue
            found[offer.thing.name] = offer
        return found

    def backend(self, name: str) -> Offer:
        """The backend called `name`, or by that alias.

        Raises:
            Misuse: there is none.
        """
        for offer in self.backends.values():
            if name in (offer.thing.name, *offer.thing.aliases):
                return offer
        known = [n for offer in self.backends.values() for n in (offer.thing.name, *offer.thing.aliases)]
        raise Misuse(
            Problem(
                f"there is no backend {name!r}",
                f"This installation has {', '.join(sorted(self.backends)) or 'none'}.{did_you_mean(name, known)}",
                "kleinctl plugins",
                name="unknown-backend",
            )
        )

    def backends_for(self, name: str | None) -> list[Offer]:
        """The backend called `name`, or all of them.

        Raises:
            Misuse: there is none of that name.
        """
        return [self.backend(name)] if name else list(self.backends.values())

    @cached_property
    def models(self) -> dict[str, Model]:
        """Models by name. A broken manifest is a problem; the others stay usable."""
        from kleinctl import manifest

        found: dict[str, Model] = {}
        offered = [Path(offer.thing) for offer in self.offers("kleinctl_manifests")]
        for path in [*offered, *sorted(manifests_folder().glob("*.toml"))]:
            try:
                model = manifest.load(path)
            except KleinctlError as error:
                self.problems.append(error.problem)
                continue
            if model.name in found:
                self.problems.append(
                    Problem(
                        f"{path} describes a second model named {model.name}",
                        "The first one stays in use.",
                        f"give it another name in {path}",
                        name="model-name-taken",
                        severity="warning",
                        path=str(path),
                    )
                )
                continue
            found[model.name] = model
        return found

    def model(self, name: str) -> Model:
        """The model called `name`.

        Raises:
            Misuse: there is none.
        """
        if name in self.models:
            return self.models[name]
        known = ", ".join(sorted(self.models)) or "none"
        raise Misuse(
            Problem(
                f"there is no model {name!r}",
                f"This installation knows {known}.{did_you_mean(name, self.models)}",
                "kleinctl models",
                name="unknown-model",
            )
        )

    def models_for(self, name: str | None) -> list[Model]:
        """The model called `name`, or the ones to consider where none is named, the preferred one first.

        Raises:
            Misuse: there is none of that name.
        """
        if name:
            return [self.model(name)]
        return sorted((m for m in self.models.values() if m.automatic is not None), key=lambda m: m.automatic or 0)

    def overview(self) -> list[Plugin]:
        """Every plugin with all it offers, for `kleinctl plugins`."""
        _ = self.backends, self.models
        for hook in OTHER_HOOKS:
            self.offers(hook)
        return list(self._entries.values())


def disabled_names() -> frozenset[str]:
    """Plugins that are off: in the file that `kleinctl plugins --disable` writes, and in `KLEINCTL_DISABLE`."""
    named = os.environ.get("KLEINCTL_DISABLE", "").split(",")
    return switched_off() | {name.strip() for name in named if name.strip()}


def switched_off() -> frozenset[str]:
    """The plugins that `kleinctl plugins --disable` switched off, installed or not."""
    with contextlib.suppress(OSError):
        text = disabled_file().read_text(encoding="utf-8-sig", errors="replace")
        return frozenset(name.strip() for name in text.splitlines() if name.strip())
    return frozenset()


def switch(name: str, on: bool) -> None:
    """Switch a plugin on or off for every later command."""
    names = (switched_off() - {name}) if on else (switched_off() | {name})
    from kleinctl.store import make_folder, writing

    make_folder(disabled_file().parent)
    with writing(disabled_file()):
        atomic.write_text(disabled_file(), "".join(f"{each}\n" for each in sorted(names)))


def _ours_first(entry: importlib.metadata.EntryPoint) -> tuple[bool, str]:
    return entry.dist is None or entry.dist.metadata["Name"] != "kleinctl", entry.name


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _label(thing: Any) -> str:
    return thing.stem if isinstance(thing, Path) else str(getattr(thing, "name", getattr(thing, "family", thing)))


def _listed(answer: Any) -> list[Any]:
    """What a hook answered, as a list. Letters of a word are none, and an answer that was forgotten is told as that."""
    if answer is None or isinstance(answer, str | bytes):
        raise TypeError(f"it returned {answer!r}, and a list is wanted")
    return list(answer)


def _unfit(hook: str, thing: Any) -> str | None:
    """Why a thing that was offered in `hook` cannot be used, in a sentence; what backends are is looked at apart."""
    if hook in ("kleinctl_manifests", "kleinctl_problem_pages") and not isinstance(thing, Path):
        return _wanted("a pathlib.Path", thing)
    if hook == "kleinctl_problem_pages":
        return _unfit_page(thing)
    if hook == "kleinctl_checks":
        from kleinctl.checks import Check

        return None if isinstance(thing, Check) else _wanted('a function with @check("a-name") above it', thing)
    if hook == "kleinctl_signatures":
        from kleinctl.identify import Signature

        return None if isinstance(thing, Signature) else _wanted("a Signature", thing)
    if hook == "kleinctl_log_patterns":
        from kleinctl.logs import LogPattern

        return _unfit_pattern(thing) if isinstance(thing, LogPattern) else _wanted("a LogPattern", thing)
    if hook == "kleinctl_executors" and not isinstance(getattr(thing, "name", None), str):
        return _wanted("an executor with a name", thing)
    return None


def _unfit_page(path: Path) -> str | None:
    from kleinctl.explain import read

    try:
        read(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    except ValueError as error:
        return f"{path}: {error}."
    return None


def _unfit_pattern(pattern: LogPattern) -> str | None:
    try:
        re.compile(pattern.regex.replace(" ", r"\s+"))  # as it is searched for
    except re.error as error:
        return f"{pattern.name} is no regular expression: {error}."
    return None


def _wanted(what: str, thing: Any) -> str:
    return f"Wanted is {what}; this is {thing!r}."[:300]


def _no_backend(thing: Any) -> str | None:
    """Why something is no backend, in a sentence."""
    from kleinctl.backends import Backend

    if isinstance(thing, type):
        return f"It is the class {thing.__name__}; wanted is an instance: {thing.__name__}()."
    if not isinstance(thing, Backend):
        wanted = ("name", "aliases", "requires", "layout", "fit", "health", "load")
        return f"{type(thing).__name__} lacks {', '.join(name for name in wanted if not hasattr(thing, name))}."
    for name in ("name", "layout"):
        if not isinstance(getattr(thing, name), str):
            return f"{name} is {getattr(thing, name)!r}; wanted is a text."
    for name in ("aliases", "requires"):
        value = getattr(thing, name)
        if isinstance(value, str):
            return f'{name} is the text "{value}"; wanted is a tuple: ("{value}",).'
        if not (isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)):
            return f"{name} is {value!r}; wanted is a tuple of texts."
    return None
