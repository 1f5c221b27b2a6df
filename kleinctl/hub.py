"""The hub: its address, who we are to it, one GET through its redirects, and what its answers mean."""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import os
import queue
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from kleinctl import __version__, store
from kleinctl.config import load_config
from kleinctl.home import config_file, offline
from kleinctl.manifest import HUB
from kleinctl.problem import KleinctlError, Problem
from kleinctl.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from kleinctl.manifest import Part, Source

REDIRECTS = 10
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
SETTINGS = "https://huggingface.co/settings/tokens"
#: Variables of programs before huggingface-hub 1.0 that name a company's certificates; a folder will do too.
OLDER = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@dataclass(frozen=True)
class Patience:
    """How long to put up with a bad line. Seconds, but for `retries`: fruitless tries in a row before giving up."""

    connect: float = 10
    stall: float = 30
    retries: int = 5
    backoff: float = 1
    longest_wait: float = 300


PATIENT = Patience()


class Failed(Exception):
    """A source did not give the file. `temporary` is worth another try, after `wait` seconds if the server says so."""

    def __init__(self, problem: Problem, *, temporary: bool = False, wait: float | None = None) -> None:
        super().__init__(problem.what)
        self.problem, self.temporary, self.wait = problem, temporary, wait


@dataclass(frozen=True)
class Answer:
    """A response at the end of its redirects, and what the hub said about the file on the way."""

    response: Any
    linked: Mapping[str, str]
    foreign: bool
    authenticated: bool

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    @property
    def linked_sha256(self) -> str | None:
        etag = self.linked.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
        return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None

    @property
    def linked_size(self) -> int | None:
        return _number(self.linked.get("x-linked-size"))

    @property
    def length(self) -> int | None:
        return _number(self.headers.get("content-length"))

    @property
    def range_start(self) -> int | None:
        return _number(self._range()[0])

    @property
    def range_total(self) -> int | None:
        return _number(self._range()[1])

    def _range(self) -> tuple[str | None, str | None]:
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("content-range", ""))
        return (match[1], match[2]) if match else (None, None)

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives."""
        yield from self.response.iter_raw()


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) < 20 else None


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT` as it is now (huggingface-hub reads it once, at import), else the public one.

    Raises:
        KleinctlError: it is no address.
    """
    address = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if _is_address(address):
        return address
    raise KleinctlError(
        Problem(
            "HF_ENDPOINT is no web address",
            f"An address like {HUB} is wanted, with http:// or https://; HF_ENDPOINT holds something else.",
            "unset HF_ENDPOINT",
            name="endpoint-malformed",
        )
    )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def identity() -> dict[str, str]:
    """Our headers: user agent, and the token if the user has one."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="kleinctl", library_version=__version__)
    token = headers.get("authorization", "").removeprefix("Bearer ")
    if token.isascii() and token.isprintable() and " " not in token:
        return headers
    raise Failed(_token_rejected("it has characters that no token has"))


@contextlib.contextmanager
def opened(url: str, headers: dict[str, str], patience: Patience, name: str) -> Iterator[Answer]:
    """GET `url`, redirects followed by hand: the token goes to the host it is for, and to no other."""
    try:
        client = _client()
    except (Failed, KleinctlError, OSError):  # certificates that cannot be used
        raise
    except Exception:  # ImportError of a SOCKS proxy, ValueError or InvalidURL of one that is misspelt
        raise Failed(_proxy_unusable()) from None
    http = sys.modules[type(client).__module__.partition(".")[0]]  # httpx with huggingface-hub 1.x, httpx2 with 2.x
    timeout = http.Timeout(patience.stall, connect=patience.connect)
    at = url
    linked: dict[str, str] = {}
    try:
        for _ in range(REDIRECTS):
            with client.stream("GET", at, headers=headers, timeout=timeout, follow_redirects=False) as response:
                linked = {**response.headers, **linked} if _origin(at) == _origin(url) else linked
                if response.status_code not in (301, 302, 303, 307, 308):
                    foreign = _origin(at) != _origin(url)
                    yield Answer(response, linked, foreign, "authorization" in headers)
                    return
                location = response.headers.get("location", "")
            headers, at = _redirected(at, location, headers)
        raise Failed(_hub_error(host_of(url), "redirects without end", name))
    except http.TransportError as error:
        raise _line_failure(error, at, name, patience) from None
    except (http.InvalidURL, UnicodeError):  # a redirect to such a place, or HF_ENDPOINT
        raise Failed(_hub_error(host_of(url), "an address that no web server has", name)) from None


def _client() -> Any:
    """The hub library's own HTTP client, or one like it that trusts whom the user named besides.

    Raises:
        Failed: the certificates that were named cannot be read.
    """
    from huggingface_hub.utils import get_session

    trusted = certificates()
    return get_session() if trusted is None else _trusting(*trusted)


@cache
def _trusting(source: str, file: str) -> Any:
    """A client that trusts whom the system trusts, and the certificates in `file`."""
    context = ssl.create_default_context()  # the system's, on Windows those of its store
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # what Python 3.13 is strict about, companies' certificates lack
    try:
        if file:
            context.load_verify_locations(**{"capath" if os.path.isdir(file) else "cafile": file})  # noqa: PTH112
    except OSError as error:  # ssl.SSLError is one
        raise Failed(_no_certificates(source, file, error.strerror or "it holds no certificate")) from None
    from huggingface_hub.utils import get_session

    return type(get_session())(verify=context, timeout=None)


def certificates() -> tuple[str, str] | None:
    """Whom to trust besides: what says so, and a file or folder of certificates; an empty one means the system's own.

    That is `certificates` below [hub] in config.toml, or the variables of older programs where `SSL_CERT_FILE`, which
    the hub's library reads, is not set. None: whom that library trusts.
    """
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return None
    found = load_config(config_file()).get("hub", {}).get("certificates")
    if isinstance(found, str) and found:
        return f"certificates in {config_file()}", "" if found == "system" else os.path.expanduser(found)  # noqa: PTH111
    return next(((name, value) for name in OLDER if (value := os.environ.get(name))), None)


def _redirected(at: str, location: str, headers: dict[str, str]) -> tuple[dict[str, str], str]:
    """Headers and address of the next request. Another host gets no token, and encryption is not given up."""
    target = urljoin(at, location) if _is_address(at) and "[" not in location else ""
    if not _is_address(target):
        raise Failed(_hub_error(host_of(at), "a redirect to no web address", ""))
    if urlsplit(at).scheme == "https" and urlsplit(target).scheme != "https":
        raise Failed(_untrusted(host_of(at), "it redirects to an address without encryption"))
    if _origin(target) != _origin(at):
        headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
    return headers, target


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def host_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "the hub"


def public(url: str) -> str:
    """`url` as it may be shown and stored: without password, signature and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, host_of(url), parts.path, "", ""))


def where(source: Source) -> str:
    return f"package {source.package}/{source.path}" if source.package else public(source.url(endpoint()))


def reachable(address: str | None = None, timeout: float = 3) -> Problem | None:
    """Whether the hub at `address` (default: `endpoint()`) answers within `timeout` seconds. None: it does."""
    if offline():
        return offline_problem([])
    try:
        address = address or endpoint()
    except KleinctlError as error:
        return error.problem
    importlib.import_module("huggingface_hub.utils")  # takes its time, which is not the hub's
    answers: queue.SimpleQueue[Problem | None] = queue.SimpleQueue()
    # In a thread, because looking up a name has no time limit of its own.
    threading.Thread(target=lambda: answers.put(_probe(address, timeout)), daemon=True).start()
    try:
        return answers.get(timeout=timeout + 2)
    except queue.Empty:
        return _unreachable(host_of(address), f"no answer within {seconds_text(timeout)}")


def _probe(address: str, timeout: float) -> Problem | None:
    try:
        with opened(address + "/", {}, Patience(connect=timeout, stall=timeout), "") as answer:
            if answer.status == 407:
                return _proxy(host_of(address))
            return _hub_error(host_of(address), f"status {answer.status}", "") if answer.status >= 500 else None
    except Failed as failure:
        return failure.problem


# What can go wrong


def offline_problem(parts: Sequence[Part]) -> Problem:
    """The network is forbidden, and these parts would have to come from it. None: it is the network itself we miss."""
    names = ", ".join(f"{part.name}{f' ({bytes_text(part.size)})' if part.size else ''}" for part in parts)
    variable = "HF_HUB_OFFLINE" if os.environ.get("KLEINCTL_OFFLINE", "0") in ("", "0") else "KLEINCTL_OFFLINE"
    copy = f", or copy the files into the hub's cache ({store.hub_cache()})"
    return Problem(
        f"offline, and not here: {names}" if parts else "the network is switched off",
        f"{variable} is set, so nothing is fetched{', and no copy was found on this machine' if parts else ''}.",
        f"unset {variable}{copy if parts else ''}",
        name="offline",
        ref="B12",
    )


def _line_failure(error: Exception, url: str, name: str, patience: Patience) -> Failed:
    """What a transport error of httpx means. Its text is not shown, for it may hold headers."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    causes = list(_causes(error))
    host = host_of(url)
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        untrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
        return Failed(_untrusted(host, "it is signed by nobody this computer trusts" if untrusted else "there is none"))
    if "ProxyError" in kinds:
        return Failed(_proxy(host))
    if "ConnectTimeout" in kinds:
        return Failed(_unreachable(host, f"no answer within {seconds_text(patience.connect)}"), temporary=True)
    if "ConnectError" in kinds:
        unknown = any(isinstance(cause, socket.gaierror) for cause in causes)
        reason = "the name is unknown (no DNS)" if unknown else "the connection was refused"
        return Failed(_unreachable(host, reason), temporary=True)
    if "TimeoutException" in kinds:
        return Failed(_stalled(name, host, patience.stall), temporary=True)
    return Failed(interrupted(name, url), temporary=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def refusal(answer: Answer, source: Source, name: str, url: str) -> Failed:
    """What a status that is no success means."""
    status, code, repo, host = answer.status, answer.headers.get("x-error-code"), source.repo or "", host_of(url)
    if status == 429:
        wait = _retry_after(answer.headers)
        return Failed(_rate_limited(host, wait), temporary=True, wait=wait)
    if status in TEMPORARY or answer.foreign:  # a signed address that has run out is made anew by the next try
        return Failed(_hub_error(host, f"status {status}", name), temporary=True, wait=_retry_after(answer.headers))
    if status == 407:
        return Failed(_proxy(host))
    if code == "GatedRepo":
        return Failed(_gated(repo, name, answer.authenticated))
    if status == 401 and answer.authenticated and code != "RepoNotFound":
        return Failed(_token_rejected("the hub answered 401"))
    if status == 403:
        return Failed(_forbidden(repo, name))
    if status in (401, 404, 410):
        return Failed(_missing(code if status == 404 else "RepoNotFound", source, name, host))
    return Failed(_hub_error(host, f"status {status}", name))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` (a number or a date) or the hub's `ratelimit` header asks for."""
    text = headers.get("retry-after", "").strip()
    if (seconds := _number(text)) is not None:
        return float(seconds)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    reset = re.search(r";\s*t=(\d{1,9})(?!\d)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset else None


def _unreachable(host: str, reason: str) -> Problem:
    return Problem(
        f"{host} cannot be reached",
        f"A connection is wanted; {reason}.",
        "check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror you trust",
        name="hub-unreachable",
        ref="B12",
    )


def _stalled(name: str, host: str, stall: float) -> Problem:
    return Problem(
        f"{name or host} does not arrive" if name else f"{host} does not answer",
        f"Bytes are wanted; none came from {host} for {seconds_text(stall)}. What has arrived is kept.",
        "run the same command again: it goes on where it stopped",
        name="download-stalled",
    )


def interrupted(name: str, url: str) -> Problem:
    return Problem(
        f"{name} broke off" if name else f"{host_of(url)} broke off",
        f"{host_of(url)} closed the connection before the end. What has arrived is kept.",
        "run the same command again: it goes on where it stopped",
        name="download-interrupted",
    )


def _untrusted(host: str, reason: str) -> Problem:
    return Problem(
        f"{host} does not prove who it is",
        f"A valid certificate is wanted; {reason}. Proxies and virus scanners that read along cause this.",
        "export SSL_CERT_FILE=/path/to/your-company-ca.pem   "
        f'# or write certificates = "system" below [hub] in {config_file()}',
        name="tls-not-trusted",
        ref="B13",
    )


def _no_certificates(source: str, file: str, reason: str) -> Problem:
    return Problem(
        f"{file} cannot be used",
        f"{source} names it as a file of certificates; {reason}.",
        f"correct {source}, or unset it" if source in OLDER else f"correct {source}",
        name="tls-not-trusted",
        path=file,
        ref="B13",
    )


def _proxy(host: str) -> Problem:
    return Problem(
        f"the proxy does not let kleinctl through to {host}",
        "A proxy that accepts us is wanted; the one in HTTPS_PROXY or HTTP_PROXY refused or does not answer.",
        "check HTTPS_PROXY and HTTP_PROXY (http://user:password@host:port)",
        name="proxy-refused",
    )


def _proxy_unusable() -> Problem:
    """Of a proxy that is no HTTP one. Its address is not told, for it may hold a password."""
    kinds = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    kept = {name: value.partition("://") for name, value in os.environ.items() if name.upper() in kinds}
    odd = [name for name, (scheme, there, _) in kept.items() if there and scheme.lower() not in ("http", "https")]
    name = next(iter(odd or kept), "HTTPS_PROXY")
    scheme = kept[name][0] if odd else ""
    found = f"it names one of the kind {scheme[:20]}" if scheme.isalnum() else "its address is malformed"
    return Problem(
        f"the proxy of {name} cannot be used",
        f"An HTTP proxy is wanted, as http://host:port, which most proxy programs have on a port of its own; {found}.",
        f"unset {name}   # or let it name the HTTP port",
        name="proxy-refused",
    )


def _hub_error(host: str, found: str, name: str) -> Problem:
    return Problem(
        f"{host} has trouble" + (f" with {name}" if name else ""),
        f"The file is wanted; the answer is {found}.",
        "try again later: https://status.huggingface.co tells how the hub is",
        name="hub-error",
    )


def _rate_limited(host: str, wait: float | None) -> Problem:
    asked = f"it asks to wait {seconds_text(wait)}" if wait else "it does not say for how long"
    return Problem(
        f"{host} gets too many requests from this address",
        f"A pause is wanted (status 429); {asked}. People who are logged in are limited less.",
        "hf auth login",
        name="rate-limited",
        ref="B14",
    )


def _gated(repo: str, name: str, authenticated: bool) -> Problem:
    found = (
        "the token that was sent belongs to none, or may not read gated repositories"
        if authenticated
        else "no token was sent"
    )
    return Problem(
        f"{name} is not given out: {repo} is gated",
        f"The token of an account that has accepted the licence is wanted; {found}.",
        f"accept the licence at {HUB}/{repo}, then: hf auth login   (or set HF_TOKEN)",
        name="gated-repo",
        ref="B01",
    )


def _forbidden(repo: str, name: str) -> Problem:
    return Problem(
        f"{name} is not given out by {repo}",
        "A token that may read it is wanted; the hub answered 403.",
        f"give your token the right to read this repository at {SETTINGS}",
        name="access-forbidden",
    )


def _token_rejected(reason: str) -> Problem:
    return Problem(
        "the hub does not accept your token",
        f"A valid token or none is wanted; {reason}.",
        f"hf auth login   (tokens are made at {SETTINGS}; HF_TOKEN, where set, comes first)",
        name="token-rejected",
    )


def _missing(code: str | None, source: Source, name: str, host: str) -> Problem:
    if code == "RepoNotFound":
        return Problem(
            f"{source.repo} is not on {host}",
            f"A public repository is wanted for {name}; there is none, or it is private.",
            "hf auth login   (if it is private and yours); otherwise the manifest needs mending: kleinctl models",
            name="repo-missing",
        )
    place = f"revision {source.revision} of {source.repo}" if code == "RevisionNotFound" else source.repo
    return Problem(
        f"{name} is not on {host}",
        f"{source.path} is wanted; {place} is not there or does not have it (404).",
        "pip install --upgrade kleinctl   (for manifests that know where it is now)",
        name="hub-file-missing",
    )
