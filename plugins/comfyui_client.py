"""What is said to a ComfyUI server on this machine, and what is heard: HTTP, and progress over a websocket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from kleinctl import KleinctlError, Problem

#: Longest answer that is read, in bytes (a list of files may be long; a picture is larger), and how long one may take.
MAX_JSON, MAX_PICTURE, ANSWER_SECONDS = 8 * 2**20, 512 * 2**20, 30.0
#: Seconds between two looks at the queue, and after which a queue that does not move is said to hang.
LOOK_SECONDS, HANG_SECONDS = 1.0, 600.0
#: So often in a row a prompt may be in neither queue nor history: for a moment it moves from one to the other.
GONE_LOOKS = 5

#: `told(node, value, most)`: a node runs (`most` 0: it has no steps); without a node, `value` jobs are before ours.
Told = Callable[[str, float, float], None]


class Refused(Exception):
    """The server answered with an HTTP status that is no success, and `text`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.text = status, text


class Failed(Exception):
    """A prompt failed; `said` is what the server tells of it: `node_type`, `exception_message`, `traceback` …"""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(str(said.get("exception_message", "")))
        self.said = said


@dataclass(frozen=True)
class Picture:
    """A picture as the server names it."""

    filename: str
    subfolder: str = ""
    type: str = "output"


class Client:
    """One server, by its URL. `alive` is asked when it does not answer, and raises where it knows why.

    Raises:
        KleinctlError: the URL is not of this machine.
    """

    def __init__(self, url: str, alive: Callable[[], None] = lambda: None) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 80
        except ValueError:  # a port that is none, a bracket that is not closed
            host, port = "", 0
        if host not in ("127.0.0.1", "localhost", "::1") or parts.scheme != "http":
            why = f"Found is {url[:80]}; kleinctl asks a ComfyUI on this machine alone."
            raise KleinctlError(
                Problem("the ComfyUI server is not on this machine", why, "http://127.0.0.1:8188", name="usage")
            )
        self.url, self.id = url.rstrip("/"), uuid.uuid4().hex
        self._host, self._port, self._alive = host, port, alive

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a GET (with `body`: a POST) as JSON; an empty mapping where it is empty.

        Raises:
            Refused: by its status.
            KleinctlError: there is no answer, or none that can be read.
        """
        data = None if body is None else json.dumps(body).encode()
        return self._json(self._request(path, data, "application/json", MAX_JSON), path)

    def node(self, kind: str) -> Mapping[str, Any]:
        """What `/object_info` says of a node class; empty where the server has none (it answers 200)."""
        return _mapping(_mapping(self.ask(f"/object_info/{quote(kind, safe='')}")).get(kind))

    def upload(self, name: str, png: bytes) -> str:
        """Put a picture into the server's folder for passing files; the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        fields = {"type": "temp", "overwrite": "true"}
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + png + f"\r\n--{boundary}--\r\n".encode()
        text = self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}", MAX_JSON)
        return f"{_mapping(self._json(text, '/upload/image')).get('name', name)} [temp]"

    def picture(self, picture: Picture) -> bytes:
        """The bytes of a picture."""
        return self._request(f"/view?{urlencode(vars(picture))}", None, "", MAX_PICTURE)

    def stop(self, prompt: str) -> None:
        """Take a prompt out of the queue, and end it where it runs."""
        self.ask("/queue", {"delete": [prompt]})
        self.ask("/interrupt", {"prompt_id": prompt})

    def idle(self) -> bool:
        """Whether nobody's job runs or waits."""
        queue = self.ask("/queue")
        return not _entries(queue, "queue_running") and not _entries(queue, "queue_pending")

    def free(self) -> None:
        """Let the server drop its models and what it has cached."""
        self.ask("/free", {"unload_models": True, "free_memory": True})

    def run(self, graph: Mapping[str, Any], told: Told, queued: Callable[[str], None] = lambda prompt: None) -> Picture:
        """Queue a graph, and wait for its first picture. `queued` hears the prompt's id as soon as it has one.

        What came of it is read from the history; the websocket tells no more than progress, so it may skip and drop.

        Raises:
            Refused: the graph is not taken.
            Failed: it was taken, and failed.
            KleinctlError: the server does not answer, or its queue hangs.
        """
        with self._events() as events:
            prompt = _mapping(self.ask("/prompt", {"prompt": graph, "client_id": self.id})).get("prompt_id")
            if not isinstance(prompt, str) or not prompt:  # without an id `/interrupt` would end anybody's job
                raise self._silent("/prompt gave no prompt_id")
            queued(prompt)
            try:
                return _picture(self._wait(prompt, events, told))
            except Failed:
                raise
            except Exception:
                with contextlib.suppress(Refused, KleinctlError):
                    self.stop(prompt)
                raise

    def _wait(self, prompt: str, events: _Events, told: Told) -> Mapping[str, Any]:
        """The prompt's entry in the history, once it is there; it is looked for though events come without end."""
        moved = looked = time.monotonic()
        gone, place = 0, None
        while True:
            event = events.next(LOOK_SECONDS)
            if event is not None and not _ends(event, prompt):
                moved = _tell(event, prompt, told) or moved
                if time.monotonic() - looked < LOOK_SECONDS:
                    continue
            looked = time.monotonic()
            entry = self._history(prompt)
            if entry:
                return entry
            now = self._place(prompt)
            gone = gone + 1 if now is None else 0
            if gone >= GONE_LOOKS:
                raise Failed({"exception_message": "the job is no longer in its queue: someone removed it"})
            if now is not None and now != place:
                place, moved = now, time.monotonic()
            if place:
                told("", place, 0)
            if time.monotonic() - moved > HANG_SECONDS:
                raise self._hangs(place or 0)

    def _history(self, prompt: str) -> Mapping[str, Any]:
        """What became of a prompt; empty as long as it has not ended."""
        entry = _mapping(_mapping(self.ask(f"/history/{quote(prompt, safe='')}")).get(prompt))
        return entry if _mapping(entry.get("status")).get("status_str") else {}

    def _place(self, prompt: str) -> int | None:
        """How many jobs are before a prompt in the queue, 0 where it runs; None where it is not there."""
        queue = self.ask("/queue")
        running = [entry[1] for entry in _entries(queue, "queue_running")]
        pending = [entry[1] for entry in sorted(_entries(queue, "queue_pending"), key=lambda entry: _number(entry[0]))]
        if prompt in running:
            return 0
        return len(running) + pending.index(prompt) if prompt in pending else None

    def _json(self, text: bytes, path: str) -> Any:
        try:
            return json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            raise self._silent(f"{path} gave no JSON") from None

    def _request(self, path: str, data: bytes | None, kind: str, most: int) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": kind} if kind and data is not None else {}
            connection.request("GET" if data is None else "POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read(most + 1)
        except (OSError, http.client.HTTPException) as error:
            self._alive()
            raise self._silent(f"{path.partition('?')[0]} gave no answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise Refused(answer.status, text[:65536].decode("utf-8", "replace"))
        if len(text) > most:
            raise self._silent(f"{path.partition('?')[0]} gave more than {most} bytes")
        return text

    @contextlib.contextmanager
    def _events(self) -> Iterator[_Events]:
        events = _Events(f"ws://{urlsplit(self.url).netloc}/ws?clientId={self.id}")
        try:
            yield events
        finally:
            events.close()

    def _silent(self, why: str) -> KleinctlError:
        fix = "start ComfyUI, or without it: kleinctl run --backend staged-decode"
        what = "the ComfyUI server does not answer"
        return KleinctlError(Problem(what, f"{self.url}{why}.", fix, name="comfyui-silent"))

    def _hangs(self, before: int) -> KleinctlError:
        waits = f"{before} jobs are before this one" if before else "this job runs"
        why = f"Nothing has moved for {HANG_SECONDS / 60:.0f} minutes; {waits}."
        fix = f"open {self.url} and cancel what runs, or start ComfyUI again"
        return KleinctlError(Problem("ComfyUI's queue hangs", why, fix, name="comfyui-hangs"))


class _Events:
    """The messages of a websocket as they come; none where it cannot be had, or has dropped."""

    def __init__(self, url: str) -> None:
        import websocket

        self._errors: tuple[type[Exception], ...] = (websocket.WebSocketException, OSError)
        self._timeout = websocket.WebSocketTimeoutException
        self._socket: Any = None
        with contextlib.suppress(*self._errors):
            # A browser's Origin is what ComfyUI compares with Host; a program sends none.
            # With a connection of our own no proxy that the environment names is asked.
            parts = urlsplit(url)
            connected = socket.create_connection((parts.hostname, parts.port or 80), ANSWER_SECONDS)
            self._socket = websocket.create_connection(
                url, ANSWER_SECONDS, socket=connected, suppress_origin=True, redirect_limit=0
            )

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after so many seconds. Previews, which are binary, are left out."""
        if self._socket is None:
            time.sleep(seconds)
            return None
        try:
            self._socket.settimeout(seconds)
            text = self._socket.recv()
            event = json.loads(text) if isinstance(text, str) and text else {}
            return event if isinstance(event, dict) else {}
        except self._timeout:
            return None
        except (ValueError, RecursionError):
            return {}
        except self._errors:
            self.close()
            return None

    def close(self) -> None:
        """Leave the websocket."""
        if self._socket is not None:
            with contextlib.suppress(*self._errors):
                self._socket.close(timeout=1)
            self._socket = None


def _ends(event: Mapping[str, Any], prompt: str) -> bool:
    """Whether an event says that the prompt has ended."""
    data = _mapping(event.get("data"))
    ended = event.get("type") in ("execution_success", "execution_error", "execution_interrupted")
    last = event.get("type") == "executing" and data.get("node") is None  # how older servers say it
    return data.get("prompt_id") == prompt and (ended or last)


def _tell(event: Mapping[str, Any], prompt: str, told: Told) -> float | None:
    """Pass on what an event says of the prompt; the time where it says something."""
    data = _mapping(event.get("data"))
    if data.get("prompt_id") != prompt:
        return None
    if event.get("type") == "executing":
        told(str(data.get("node")), 0, 0)
    elif event.get("type") == "progress":
        told(str(data.get("node")), _number(data.get("value")), _number(data.get("max")))
    return time.monotonic()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 2**31 else 0.0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _entries(queue: Any, key: str) -> list[Any]:
    return [each for each in _list(_mapping(queue).get(key)) if isinstance(each, list) and len(each) > 1]


def _picture(entry: Mapping[str, Any]) -> Picture:
    """The first picture of a prompt that has ended: one that was saved before those that were merely shown.

    Raises:
        Failed: it has none.
    """
    for message in _list(_mapping(entry.get("status")).get("messages")):
        name, said = message if isinstance(message, list) and len(message) == 2 else ("", {})
        if name == "execution_error":
            raise Failed(_mapping(said))
        if name == "execution_interrupted":
            raise Failed({**_mapping(said), "exception_message": "the job was interrupted, here or on ComfyUI's page"})
    shown = [
        image for output in _mapping(entry.get("outputs")).values() for image in _list(_mapping(output).get("images"))
    ]
    for image in sorted(map(_mapping, shown), key=lambda image: image.get("type") != "output"):
        return Picture(*(str(image.get(key, "")) for key in ("filename", "subfolder", "type")))
    raise Failed({"exception_message": "it gave no picture; is there a SaveImage node in the workflow?"})
