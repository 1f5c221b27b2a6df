"""Compare manifests with the hub: sizes and sha256 of every part at every source.

    python tools/compare_manifest.py [MANIFEST ...]

Without arguments all of manifests/*.toml. `HF_ENDPOINT` names another hub, `HF_TOKEN` opens gated repositories. Prints
a line for each difference. Exits with 0 when all agree, 1 when something differs, and 2 when something could not be
looked at (no network, no access). Weights are never downloaded: the hub states their sha256 in a header.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from kleinctl.manifest import HUB, Part, Source, load

MANIFESTS = Path(__file__).parent.parent / "manifests"
#: Bytes. Files that are not in LFS have no sha256 in the header; they are small and are fetched to be hashed.
LARGEST_FETCH = 32 * 2**20
SECONDS = 30


class Unreachable(Exception):
    """The hub did not say."""


@dataclass(frozen=True)
class Remote:
    """What the hub says of a file; sha256 None when it says nothing and the file is too long to be fetched."""

    size: int | None
    sha256: str | None


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the hub, and stays at the one that leads to the file: its headers say what is wanted."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            return None
        return request(newurl, req.get_method())


def request(url: str, method: str) -> urllib.request.Request:
    """A request with the token, which stays behind when the answer leads to another host."""
    made = urllib.request.Request(url, method=method)
    if token := os.environ.get("HF_TOKEN"):
        made.add_unredirected_header("Authorization", f"Bearer {token}")
    return made


def ask(url: str, method: str = "HEAD") -> tuple[Message, bytes]:
    """Headers and body of the answer, or of the redirect to another host.

    Raises:
        Unreachable: no answer, or an error.
    """
    try:
        with urllib.request.build_opener(_SameHost).open(request(url, method), timeout=SECONDS) as answer:
            return answer.headers, answer.read(LARGEST_FETCH)
    except urllib.error.HTTPError as error:
        if error.code in (301, 302, 303, 307, 308):
            return error.headers, b""
        gated = error.headers.get("X-Error-Code") == "GatedRepo"
        raise Unreachable(f"HTTP {error.code}{', accept its licence and set HF_TOKEN' if gated else ''}") from error
    except OSError as error:
        raise Unreachable(str(getattr(error, "reason", error))) from error


def look(source: Source, endpoint: str) -> Remote:
    """Size and sha256 of a file on the hub."""
    url = source.url(endpoint)
    headers, _ = ask(url)
    tag = headers.get("X-Linked-Etag", headers.get("ETag", "")).strip('W/"')
    length = headers.get("X-Linked-Size") or headers.get("Content-Length")
    size = int(length) if length and length.isdigit() else None
    if len(tag) == 64:
        return Remote(size, tag)
    if size is not None and size > LARGEST_FETCH:
        return Remote(size, None)
    _, body = ask(url, "GET")
    return Remote(len(body), hashlib.sha256(body).hexdigest())


def compare(part: Part, source: Source, endpoint: str) -> tuple[list[str], bool]:
    """Differences of a part from one of its sources, and whether it could be looked at."""
    where = f"{part.ref} at {source.repo}/{source.path}"
    try:
        remote = look(source, endpoint)
    except Unreachable as error:
        return [f"{where}: not compared: {error}"], False
    found = [("size", part.size, remote.size), ("sha256", part.sha256, remote.sha256)]
    lines = [
        f"{where}: {what} {ours if ours is not None else 'not in the manifest'}, the hub has {theirs}"
        for what, ours, theirs in found
        if theirs is not None and ours != theirs
    ]
    return lines, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    files = parser.parse_args().manifests or sorted(MANIFESTS.glob("*.toml"))
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    pairs = [(part, source) for file in files for part in load(file).parts for source in part.sources if source.repo]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: compare(pair[0], pair[1], endpoint), pairs))
    for lines, _ in answers:
        print(*lines, sep="\n", end="\n" if lines else "")
    unseen = sum(not seen for _, seen in answers)
    different = sum(bool(lines) for lines, seen in answers if seen)
    print(f"{len(pairs)} sources at {endpoint}: {different} differ, {unseen} could not be compared")
    return 1 if different else 2 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
