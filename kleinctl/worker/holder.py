"""Holds VRAM, so that a card seems smaller: `<python> -I -u holder.py`, with torch in that Python.

Each line on stdin is a number of bytes to take more of the card; each is answered by `held BYTES`, or `no` and why. It
ends, and gives everything back, when its stdin closes.
"""

import sys


def main():
    import torch

    taken, total = [], 0
    torch.zeros(1, device="cuda")  # makes the CUDA context, which takes memory as well
    print("held 0", flush=True)
    for line in sys.stdin:
        try:
            taken.append(torch.empty(int(line), dtype=torch.uint8, device="cuda"))
            total += int(line)
            print(f"held {total}", flush=True)
        except RuntimeError as error:
            print("no", " ".join(str(error).split())[:500], flush=True)


if __name__ == "__main__":
    main()
