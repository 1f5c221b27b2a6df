"""What is said to a ComfyUI server on this machine, and what is heard: HTTP, and progress over a websocket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from kleinctl import KleinctlError, Problem

#: Longest answer that is read, in bytes (a list of files may be long; a picture is larger), and how long one may pause.
MAX_JSON, MAX_PICTURE, ANSWER_SECONDS = 8 * 2**20, 512 * 2**20, 30.0
#: Seconds in which an answer is there to its end, and the most bytes that stand before it.
WHOLE_SECONDS, MAX_HEAD = 300.0, 2**20
#: Seconds between two looks at the queue, and after which a queue that does not move is said to hang.
LOOK_SECONDS, HANG_SECONDS = 1.0, 600.0
#: Seconds for which a job before ours may show no steps before that is told.
QUIET_SECONDS = 30.0
#: How names of pictures end.
PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".gif")
#: So often in a row a prompt may be in neither queue nor history: for a moment it moves from one to the other.
GONE_LOOKS = 5

#: `told(node, value, most)`: a node runs (`most` 0: it has no steps). Without a node, of what is before ours: `value`
#: jobs (`most` 0), steps of the one that runs, or jobs (`most` UNSEEN) of which the one that runs shows us no steps.
Told = Callable[[str, float, float], None]
UNSEEN = -1.0


class Refused(Exception):
    """The server answered with an HTTP status that is no success, and `text`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.text = status, text


class Hung(KleinctlError):
    """The server was asked, and gave no answer in time."""


class Failed(Exception):
    """A prompt failed; `said` is what the server tells of it: `node_type`, `exception_message`, `traceback` …"""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(str(said.get("exception_message", "")))
        self.said = said


@dataclass(frozen=True)
class File:
    """A file as the server names it; `type` is the kind of its folder."""

    filename: str
    subfolder: str = ""
    type: str = "output"

    @property
    def pictured(self) -> bool:
        """Whether it is a picture by its name."""
        return self.filename.lower().endswith(PICTURES)


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
        self._last = ""

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

    def picture(self, file: File) -> bytes:
        """The bytes of a picture."""
        return self._request(f"/view?{urlencode(vars(file), errors='replace')}", None, "", MAX_PICTURE)

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

    def run(
        self, graph: Mapping[str, Any], told: Told, queued: Callable[[str | None], None] = lambda prompt: None
    ) -> list[File]:
        """Queue a graph, and wait for its files; the first is its picture, if there is one.

        `queued` hears the prompt's id before the server does, so that whoever outlives us can take it back at any time,
        and None when it is over; not where the server fell silent, for there it may go on.

        What came of it is read from the history; the websocket tells no more than progress, so it may skip and drop.

        Raises:
            Refused: the graph is not taken.
            Failed: it was taken, and failed.
            KleinctlError: the server does not answer, or its queue hangs.
        """
        with self._events() as events:
            prompt = str(uuid.uuid4())  # without an id `/interrupt` would end anybody's job
            queued(prompt)
            try:
                body = {"prompt": graph, "client_id": self.id, "prompt_id": prompt}
                given = _mapping(self.ask("/prompt", body)).get("prompt_id")
                if not isinstance(given, str) or not given:
                    raise self._silent("/prompt gave no prompt_id")
                if given != prompt:  # a server that numbers jobs by itself
                    prompt = given
                    queued(prompt)
                files = _files(self._wait(prompt, events, told))
                self._last = prompt
            except Failed:
                queued(None)
                raise
            except Hung:  # nor would it hear that it is to stop
                raise
            except BaseException:
                with contextlib.suppress(Refused, KleinctlError):
                    self.stop(prompt)
                    queued(None)
                raise
            queued(None)
            return files

    def _wait(self, prompt: str, events: _Events, told: Told) -> Mapping[str, Any]:
        """The prompt's entry in the history, once it is there; it is looked for though events come without end."""
        watch, looked = _Watch(prompt, told), time.monotonic()
        while True:
            event = events.next(LOOK_SECONDS)
            if event is not None and not _ends(event, prompt):
                watch.hear(event)
                if time.monotonic() - looked < LOOK_SECONDS:
                    continue
            looked = time.monotonic()
            entry = self._history(prompt)
            if entry:
                return entry
            watch.look(self.ask("/queue"), heard=events.open)
            if watch.gone >= GONE_LOOKS:
                raise Failed({"exception_message": "the job is no longer in its queue: someone removed it"})
            if time.monotonic() - watch.moved > HANG_SECONDS:
                raise self._hangs(watch.before)

    def forgot(self) -> bool:
        """Whether the server knows no more of the last job that it did for us: it was started anew, most likely."""
        return self._last != "" and not self._history(self._last)

    def _history(self, prompt: str) -> Mapping[str, Any]:
        """What became of a prompt; empty as long as it has not ended."""
        path = f"/history/{quote(prompt, safe='', errors='replace')}"
        entry = _mapping(_mapping(self.ask(path)).get(prompt))
        return entry if _mapping(entry.get("status")).get("status_str") else {}

    def _json(self, text: bytes, path: str) -> Any:
        try:
            return json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            raise self._silent(f"{path} gave no JSON") from None

    def _request(self, path: str, data: bytes | None, kind: str, most: int) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": kind} if kind and data is not None else {}
            connection.connect()
            connection.sock = _Bounded(connection.sock, most + MAX_HEAD, WHOLE_SECONDS)
            connection.request("GET" if data is None else "POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read(most + 1)
        except (OSError, http.client.HTTPException) as error:
            self._alive()
            why = f"{path.partition('?')[0]} gave no answer: {error or type(error).__name__}"
            raise self._silent(why, Hung if isinstance(error, TimeoutError) else KleinctlError) from None
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

    def _silent(self, why: str, kind: type[KleinctlError] = KleinctlError) -> KleinctlError:
        fix = "start ComfyUI, or without it: kleinctl run --backend staged-decode"
        what = "the ComfyUI server does not answer"
        return kind(Problem(what, f"{self.url}{why}.", fix, name="comfyui-silent"))

    def _hangs(self, before: int) -> KleinctlError:
        waits = f"jobs before this one: {before}" if before else "this job runs"
        why = f"Nothing has moved for {HANG_SECONDS / 60:.0f} minutes; {waits}."
        fix = f"open {self.url} and cancel what runs, or start ComfyUI again"
        return KleinctlError(Problem("ComfyUI's queue hangs", why, fix, name="comfyui-hangs"))


class _Watch:
    """What moves while a prompt waits and runs.

    ComfyUI tells steps to the client alone that queued the job, and to all of one that was queued without a client. So
    of somebody else's nobody here can know whether it hangs: it is waited for.
    """

    def __init__(self, prompt: str, told: Told) -> None:
        #: When something moved last, or could have moved unseen; jobs before ours; looks that did not find ours.
        self.moved, self.before, self.gone = time.monotonic(), 0, 0
        self._prompt, self._told = prompt, told
        self._last: tuple[str, float, float] = ("", 0, 0)
        self._queue: tuple[str, int] | None = None
        self._changed = time.monotonic()

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in an event, and pass on what it says of the prompt, or of the one that runs before it."""
        data = _mapping(event.get("data"))
        ours, steps = data.get("prompt_id") == self._prompt, event.get("type") == "progress"
        if not ours and (self._queue is None or data.get("prompt_id") != self._queue[0]):
            return
        self.moved = time.monotonic()
        if ours and event.get("type") == "executing":
            self._tell(str(data.get("node")), 0, 0)
        elif steps and (ours or _number(data.get("max")) > 0):
            self._tell(str(data.get("node")) if ours else "", _number(data.get("value")), _number(data.get("max")))

    def look(self, queue: Any, *, heard: bool) -> None:
        """Take in the queue; `heard` is whether events come at all."""
        running = _entries(queue, "queue_running")
        waiting = sorted(_entries(queue, "queue_pending"), key=lambda entry: _number(entry[0]))
        jobs = [entry[1] for entry in (*running, *waiting)]
        if self._prompt not in jobs:
            self.gone += 1
            return
        runs = any(entry[1] == self._prompt for entry in running)
        self.gone, self.before = 0, 0 if runs else jobs.index(self._prompt)
        first = running[0] if running and not runs else None
        now, state = time.monotonic(), (str(first[1]) if first else "", self.before)
        if state != self._queue:
            self._queue, self.moved, self._changed = state, now, now
            if self.before:
                self._tell("", self.before, 0)
        elif not heard or (first is not None and _private(first)):
            self.moved = now
            unseen = self.before > 0 and now - self._changed > QUIET_SECONDS
            self._tell(*(("", self.before, UNSEEN) if unseen else self._last))  # it is not we who fell silent

    def _tell(self, node: str, value: float, most: float) -> None:
        self._last = (node, value, most)
        self._told(node, value, most)


class _Bounded(socket.socket):
    """A connection that breaks where one message has more than `room` bytes, or comes for longer than `seconds`."""

    def __init__(self, connected: socket.socket, room: int, seconds: float) -> None:
        super().__init__(fileno=connected.detach())
        self.settimeout(ANSWER_SECONDS)
        self._bounds = (room, seconds)
        self.begin()

    def begin(self) -> None:
        """Count anew."""
        self._room, self._end = self._bounds[0], time.monotonic() + self._bounds[1]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Some of what has come."""
        data = super().recv(size, flags)
        if self._past(len(data)):
            raise OSError("it does not end")
        return data

    def recv_into(self, *given: Any) -> int:
        """Some of what has come, as the standard library's HTTP asks for it."""
        count = super().recv_into(*given)
        if self._past(count):
            raise TimeoutError("it does not end")
        return count

    def _past(self, count: int) -> bool:
        self._room -= count
        return self._room < 0 or time.monotonic() > self._end


class _Events:
    """The messages of a websocket as they come; none where it cannot be had, or for as long as it has dropped."""

    def __init__(self, url: str) -> None:
        import websocket

        self._errors: tuple[type[Exception], ...] = (websocket.WebSocketException, OSError)
        self._timeout = websocket.WebSocketTimeoutException
        self._url, self._connect = url, websocket.create_connection
        self._socket: Any = None
        self._bounds: Callable[[], None] = lambda: None
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(*self._errors):
            # A browser's Origin is what ComfyUI compares with Host; a program sends none.
            # With a connection of our own no proxy that the environment names is asked.
            parts = urlsplit(self._url)
            plain = socket.create_connection((parts.hostname, parts.port or 80), ANSWER_SECONDS)
            connected = _Bounded(plain, MAX_JSON, ANSWER_SECONDS)
            self._socket = self._connect(
                self._url, ANSWER_SECONDS, socket=connected, suppress_origin=True, redirect_limit=0
            )
            self._bounds = connected.begin

    @property
    def open(self) -> bool:
        """Whether messages can come."""
        return self._socket is not None

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after so many seconds. Previews, which are binary, are left out."""
        if self._socket is None:
            time.sleep(seconds)
            self._open()
            return None
        try:
            self._bounds()
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


def _private(entry: Sequence[Any]) -> bool:
    """Whether the steps of a job in the queue are told to its own client alone."""
    return len(entry) > 3 and _mapping(entry[3]).get("client_id") is not None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 2**31 else 0.0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _entries(queue: Any, key: str) -> list[Any]:
    return [each for each in _list(_mapping(queue).get(key)) if isinstance(each, list) and len(each) > 1]


def _files(entry: Mapping[str, Any]) -> list[File]:
    """The files of a prompt that has ended: pictures first, and those that were saved before those merely shown.

    Raises:
        Failed: it did not end well, or has none.
    """
    for message in _list(_mapping(entry.get("status")).get("messages")):
        name, said = message if isinstance(message, list) and len(message) == 2 else ("", {})
        if name == "execution_error":
            raise Failed(_mapping(said))
        if name == "execution_interrupted":
            raise Failed({**_mapping(said), "exception_message": "the job was interrupted, here or on ComfyUI's page"})
    shown = [
        _mapping(each)
        for output in _mapping(entry.get("outputs")).values()
        for several in _mapping(output).values()  # `images`; custom nodes have `gifs`, `audio` and others
        for each in _list(several)
    ]
    keys = ("filename", "subfolder", "type")
    found = [File(*(str(each.get(key, "")) for key in keys)) for each in shown if each.get("filename")]
    if not found:
        raise Failed({"exception_message": "it gave no picture; is there a SaveImage node in the workflow?"})
    return sorted(found, key=lambda file: (not file.pictured, file.type != "output"))
