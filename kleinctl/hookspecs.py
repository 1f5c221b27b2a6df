"""Every hook a plugin can implement, each with an example.

A plugin is a module (or package) registered under the entry-point group `kleinctl`. It says `kleinctl_api = 1` and
decorates functions named like the ones here with `kleinctl.hookimpl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kleinctl.backends import Backend
    from kleinctl.checks import Check
    from kleinctl.executors import Executor
    from kleinctl.identify import Signature
    from kleinctl.logs import LogPattern

hookspec = pluggy.HookspecMarker("kleinctl")


@hookspec
def kleinctl_backends() -> Sequence[Backend]:  # type: ignore[empty-body]
    """Offer ways to run a model.

    Example::

        @hookimpl
        def kleinctl_backends():
            return [MyBackend()]  # docs/plugins.md has a whole one
    """


@hookspec
def kleinctl_manifests() -> Sequence[Path]:  # type: ignore[empty-body]
    """Offer models: paths of manifest files (TOML).

    Example::

        @hookimpl
        def kleinctl_manifests():
            return [Path(__file__).with_name("my-model.toml")]
    """


@hookspec
def kleinctl_checks() -> Sequence[Check]:  # type: ignore[empty-body]
    """Offer questions that doctor asks. A check names the facts it wants as arguments and returns a Problem or None.

    Example::

        @check("card-is-not-on-fire")
        def card_is_not_on_fire(hardware):
            \"\"\"The card is below 95 °C.\"\"\"
            return None

        @hookimpl
        def kleinctl_checks():
            return [card_is_not_on_fire]
    """


@hookspec
def kleinctl_signatures() -> Sequence[Signature]:  # type: ignore[empty-body]
    """Offer ways to recognise a weights file by the names and shapes in its header.

    Example::

        @hookimpl
        def kleinctl_signatures():
            return [Signature(role="vae", family="my-vae", layout="diffusers",
                              shapes={"decoder.conv_in.weight": (512, 24, 3, 3)}, saw="24 latent channels")]
    """


@hookspec
def kleinctl_log_patterns() -> Sequence[LogPattern]:  # type: ignore[empty-body]
    """Offer explanations of log lines: a regular expression and the problem it proves.

    Example::

        @hookimpl
        def kleinctl_log_patterns():
            return [LogPattern("my-extension-missing", r"No module named 'my_extension'",
                               Problem("my_extension is missing", "It is not installed.", "pip install my-extension"))]
    """


@hookspec
def kleinctl_problem_pages() -> Sequence[Path]:  # type: ignore[empty-body]
    """Offer pages for `kleinctl explain`: Markdown files `NAME.md`, written like those in docs/problems.

    Example::

        @hookimpl
        def kleinctl_problem_pages():
            return sorted(Path(__file__).with_name("problems").glob("*.md"))
    """


@hookspec
def kleinctl_executors() -> Sequence[Executor]:  # type: ignore[empty-body]
    """Offer places where a worker can run (a process here is the built-in one).

    Example::

        @hookimpl
        def kleinctl_executors():
            return [MyContainerExecutor()]
    """
