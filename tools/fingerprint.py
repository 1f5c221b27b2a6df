"""Print the line of a manifest that lets `identify` know repacked copies of a file.

    python tools/fingerprint.py FILE...

Each FILE is a whole safetensors file of a transformer, text encoder or VAE. A few tensors are read, well under 1 MB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kleinctl.fingerprint import of_file
from kleinctl.identify import identify


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    failed = 0
    for path in parser.parse_args().files:
        found = identify(path)
        digest = of_file(path, found.role) if found.kind == "safetensors" else None
        failed += digest is None
        print(f"# {path.name}: {found.saw}")
        print(f'fingerprint = "{digest}"' if digest else "# no fingerprint")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
