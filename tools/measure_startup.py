"""How long commands take from process start to exit: median of several runs, in milliseconds.

    python tools/measure_startup.py [--runs 7]

Prints a line per command and the bare interpreter for comparison; exits with 1 when a command is over its budget.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

#: Seconds that a command may take on the two slow cores of continuous integration.
BUDGETS = {"--help": 0.25, "doctor": 0.5, "doctor --json": 0.5, "plan": 0.6}


def median_seconds(arguments: list[str], runs: int) -> float:
    """Median wall time of `python ARGUMENTS`, after one run that warms the disk cache."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    print(f"{'python -c pass':24} {median_seconds(['-c', 'pass'], runs) * 1000:6.0f} ms")
    over = False
    for command, budget in BUDGETS.items():
        seconds = median_seconds(["-m", "kleinctl", *command.split()], runs)
        over |= seconds > budget
        verdict = "" if seconds <= budget else f"  over its budget of {budget * 1000:.0f} ms"
        print(f"{'kleinctl ' + command:24} {seconds * 1000:6.0f} ms{verdict}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
