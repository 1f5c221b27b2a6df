"""Starts kleinctl, and says so where it cannot start for a dependency that is broken or missing."""

import sys


def main() -> None:
    """Run the command that was typed. `selftest` also runs where the command line does not."""
    try:
        from kleinctl.cli import main as command_line
    except Exception as error:  # click is the only thing imported there that is not ours
        if sys.argv[1:] == ["selftest"]:  # not with --help, which selftest itself runs
            from kleinctl.selftest import main as selftest

            sys.exit(selftest())
        sys.stderr.write(
            "error[cannot-start]: kleinctl cannot start\n\n"
            f"  {type(error).__name__}: {error}. A package it stands on is broken or missing.\n\n"
            "hint: kleinctl selftest   # says which; then: pip install --force-reinstall kleinctl\n"
        )
        sys.exit(1)
    command_line()


if __name__ == "__main__":
    main()
