"""The command line: one file per command, each imported when it is typed."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any, NoReturn

import click

from kleinctl.problem import BUG, INTERRUPTED, MISUSED, PROBLEMS, KleinctlError, Problem, did_you_mean

#: Every command, with the line that `--help` and README's table show; the test suite holds them to the commands' own.
COMMANDS = {
    "up": "One line to a picture: doctor, choose, install, verify, run.",
    "doctor": "What is this machine, what is wrong, what would run and why.",
    "undo": "Reverse what `doctor --fix` did.",
    "plan": "Predicted VRAM, RAM, disk and seconds for every backend.",
    "install": "Fetch and verify a model's files and build its environment.",
    "run": "Make pictures from a prompt.",
    "serve": "Keep a model loaded, so that `run` starts at once.",
    "bench": "Time and memory of this machine, as a table, a file and a picture.",
    "explain": "One problem: symptom, cause, how it is found, fix, sources.",
    "report": "One redacted file that lets support see what you see.",
    "triage": "Diagnose machines from their reports.",
    "identify": "What a weights file really is, from its header.",
    "verify": "Check the sha256 of everything installed.",
    "models": "The models kleinctl knows, and what of them is here.",
    "plugins": "Who offers what; switch plugins off and on.",
    "uninstall": "Take away a model, or everything kleinctl made.",
    "selftest": "Does kleinctl work where it is installed?",
    "completion": "Print the line that completes commands in your shell.",
}


class Commands(click.Group):
    """Imports a command's module when it is asked for, so that `kleinctl --help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"kleinctl.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"There is no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _settings() -> dict[str, Any]:
    """The tables of config.toml.

    Raises:
        KleinctlError: it is broken, or a table in it is named after nothing.
    """
    from kleinctl.config import NO_COMMANDS, load_config
    from kleinctl.home import config_file

    settings, known = load_config(config_file()), (*COMMANDS, *NO_COMMANDS)
    for name in settings:
        if name not in known:
            what = f"{config_file()} has a table that belongs to no command"
            why = f"[{name}] is there; options stand below their command's name, as in [run]."
            raise _broken(what, f"{why}{did_you_mean(name, known)}")
    return settings


def _broken(what: str, why: str) -> KleinctlError:
    from kleinctl.home import config_file

    return KleinctlError(Problem(what, why, f"correct {config_file()}", name="config-broken"))


def _defaults(command: click.Command, table: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names that click has for the options: `vram-limit` and `vram_limit` are both --vram-limit.

    Raises:
        KleinctlError: the command has no such option.
    """
    from kleinctl.home import config_file

    options = [each for each in command.params if isinstance(each, click.Option)]
    known = {name.lstrip("-").replace("-", "_"): each.name for each in options for name in (*each.opts, each.name)}
    for key in table:
        if key.replace("-", "_") not in known:
            what = f"{config_file()} has a setting that `kleinctl {command.name}` does not know"
            why = f"[{command.name}] has {key!r}; options stand there.{did_you_mean(key, known)}"
            raise _broken(what, why)
    return {known[key.replace("-", "_")]: value for key, value in table.items()}


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from kleinctl import __version__

        click.echo(f"kleinctl {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--disable", multiple=True, metavar="PLUGIN", help="Leave a plugin out, for this command only.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def group(ctx: click.Context, disable: tuple[str, ...], debug: bool) -> None:
    """FLUX.2 [klein] pictures on your own NVIDIA card: set up, diagnosed and run.

    Start with:  kleinctl up "a red circle on a blue background"
    """
    if disable:
        import os

        os.environ["KLEINCTL_DISABLE"] = ",".join([*disable, os.environ.get("KLEINCTL_DISABLE", "")])
    if ctx.invoked_subcommand and not ctx.resilient_parsing:
        from kleinctl.home import config_file

        if config_file().exists():
            settings = _settings()
            name, typed = ctx.invoked_subcommand, ctx.command
            command = typed.get_command(ctx, name) if isinstance(typed, Commands) else None
            if command and name in settings:
                settings[name] = _defaults(command, settings[name])
            ctx.default_map = settings


def main() -> None:
    """Run the command that was typed and exit as README says."""
    from kleinctl.cli import output

    output.prepare_streams()
    try:
        sys.exit(group.main(prog_name="kleinctl", standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        output.remark("\ninterrupted")
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        if len(sys.argv) == 1:  # click raises this too, with all of help as its message
            click.echo(group.get_help(click.Context(group, info_name="kleinctl")), err=True)
        else:
            output.misuse(error)
        sys.exit(MISUSED)
    except KleinctlError as error:
        output.end_with_problem(error.problem)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        output.discard_stdout()
        sys.exit(0)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            _bug(error)
        output.discard_stdout()
        output.remark("error: the answer could not be written to the end, the disk it goes to is full")
        sys.exit(PROBLEMS)
    except Exception as error:
        _bug(error)


def _bug(error: Exception) -> NoReturn:
    from kleinctl.cli import output

    if "--debug" in sys.argv:
        raise error
    output.our_bug(error)
    sys.exit(BUG)
