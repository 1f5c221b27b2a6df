"""The server: it keeps a model loaded in a worker, and lends it to one client after another.

The main thread has the worker and does the jobs; a thread for each client hears what it says, and notices when it goes.
How clients find the server, and what is said, is in `kleinctl.serve`.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleinctl import generate, road, serve, store
from kleinctl.executors import Executor, OnProgress, WorkerDied, WorkerHandle
from kleinctl.facts.run import FinishedPicture
from kleinctl.home import home, server_file
from kleinctl.planner import compare, precisions
from kleinctl.problem import KleinctlError, Problem
from kleinctl.serve import Ask, Ended, Free, Line, State, Stop, Told, Waiting
from kleinctl.worker.protocol import NO_USE, Close, Failed, Generate, Load, Loaded, Made, Progress, Reply

if TYPE_CHECKING:
    from kleinctl.backends import Fit, Job
    from kleinctl.environment import Environment
    from kleinctl.hardware import Hardware
    from kleinctl.plugins import Plugins

#: Clients that are heard at one time; one more is hung up on.
MOST_CLIENTS = 64
#: Seconds that a client which has the model may say nothing between its pictures; then the next one gets it.
TURN_SECONDS = 30.0


@dataclass(frozen=True)
class Ready:
    """All that a worker needs to be started."""

    way: road.Way
    environment: Environment
    where: road.Place
    hardware: Hardware

    @property
    def device(self) -> str:
        """What people call the device."""
        gpu = self.hardware.gpu
        return gpu.name if self.where.cuda and gpu is not None else "the CPU"

    def request(self) -> generate.Request:
        """How pictures are made with it, without any yet."""
        return road.request(self.way, self.environment, self.where, self.hardware)


@dataclass(frozen=True)
class Done:
    """A client's picture is there after `seconds`, or is not: `why` says so in a few words."""

    output: Path
    job: Job
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Freed:
    """The worker has ended, and its memory is free. `why` is a few words."""

    why: str


OnEvent = Callable[[Done | Freed], None]


class Client:
    """One connection: what it has said and nobody has read, and whether it is still there.

    `before` is how many it knows to be before it; `pictures` and `load` are what its run took until now.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gone = False
        self.before = 0
        self.pictures: list[FinishedPicture] = []
        self.load = NO_USE

    def say(self, message: Any) -> None:
        """Send a message, if somebody is there to hear it."""
        with contextlib.suppress(OSError):
            self._line.send(message)

    def hear(self) -> Any:
        """What it says next; None when it is gone."""
        return self._line.receive()

    def next(self) -> Any:
        """What it wants of the model next; None when it is gone or says nothing."""
        end = time.monotonic() + TURN_SECONDS
        while time.monotonic() < end and not self.gone:
            with contextlib.suppress(queue.Empty):
                return self.inbox.get(timeout=serve.SLICE_SECONDS)
        return None

    def close(self) -> None:
        """Hang up."""
        self._line.close()


class Server:
    """Keeps the model that `prepare` chooses. Used in the main thread; `run` returns when the server is to end.

    `prepare` is asked again whenever a worker is started, since what is free changes. Without a job for `idle_seconds`
    the worker ends. `on_event` hears of each picture.
    """

    def __init__(
        self,
        plugins: Plugins,
        prepare: Callable[[], Ready],
        executor: Executor,
        idle_seconds: float,
        on_event: OnEvent,
    ) -> None:
        self._plugins, self._prepare, self._executor = plugins, prepare, executor
        self._idle_seconds, self._on_event = idle_seconds, on_event
        self._worker: WorkerHandle | None = None
        self._loaded: Loaded | None = None
        self._changed = threading.Condition(threading.RLock())
        self._queue: list[Client] = []
        self._clients: set[Client] = set()
        self._current: Client | None = None  # who has the model
        self._asking: Client | None = None  # for whom the worker is at work
        self._free_wanted = False
        self._rested = False  # whether the worker has been asked nothing in this turn
        self._since = time.monotonic()
        self.ready = prepare()
        self._request = self.ready.request()

    @property
    def state(self) -> State:
        """What the server has and does. The model's parts and the budget's hardware concern nobody else."""
        request = self._request
        slim = replace(request, model=replace(request.model, parts=()), budget=replace(request.budget, hardware=None))
        backend, gpu = self.ready.way.backend, self.ready.hardware.gpu
        with self._changed:
            return State(
                pid=os.getpid(),
                request=slim,
                names=(backend.name, *backend.aliases),
                precisions=precisions(backend),
                device=self.ready.device,
                vram_bytes=gpu.vram_free_bytes if gpu is not None and self.ready.where.cuda else 0,
                ram_bytes=self.ready.hardware.ram_available_bytes,
                loaded=self._worker is not None,
                working=self._current is not None,
                waiting=len(self._queue),
            )

    def load(self, on_progress: OnProgress) -> Loaded:
        """Load the model, if it is not.

        Raises:
            KleinctlError: it does not load, or does not fit any more.
        """
        return self._load(self._own_load(), on_progress)

    def _own_load(self) -> Load:
        wanted = self._request
        cache = home() / "cache"
        return Load(wanted.plugin, wanted.backend, wanted.model, wanted.folder.absolute(), wanted.budget, cache=cache)

    def _load(self, load: Load, on_progress: OnProgress) -> Loaded:
        if self._worker is not None and self._loaded is not None:
            self._rested = True
            return replace(self._loaded, seconds={}, stages={})
        self.ready = self._prepare()
        self._request = wanted = self.ready.request()
        worker = self._executor.start(wanted.python, wanted.plugin, gpu=wanted.gpu)
        try:
            own = replace(load, plugin=wanted.plugin, backend=wanted.backend, model=wanted.model)
            reply = worker.ask(replace(own, budget=wanted.budget, parts=dict(wanted.parts)), on_progress)
        except BaseException:
            worker.stop()
            raise
        assert isinstance(reply, Loaded)
        with self._changed:
            self._worker, self._loaded, self._since = worker, reply, time.monotonic()
        return reply

    def run(self) -> None:
        """Lend the model until somebody types Ctrl-C, or the system or a client ends the server."""
        try:
            while True:
                client = self._next()
                if client is not None:
                    self._lend(client)
                elif self._free_wanted:
                    self._free("as asked")
                elif self._worker is not None and time.monotonic() - self._since > self._idle_seconds:
                    self._free(f"after {self._idle_seconds:g} s without a job")
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._hang_up()

    def _next(self) -> Client | None:
        """The client whose turn it is; None after a moment without one, or when memory is to be freed first."""
        with self._changed:
            if not self._queue:
                self._changed.wait(serve.SLICE_SECONDS)
            if not self._queue or self._free_wanted:
                return None
            self._current = self._queue.pop(0)
            self._tell_queue()
            return self._current

    def _lend(self, client: Client) -> None:
        """Do what a client wants of the model until it gives it back or is gone."""
        while not isinstance(request := client.next(), Close | None):
            client.say(self._answer(client, request))
        if request is None:
            client.close()
        with self._changed:
            self._current = None
            if not client.gone and not client.inbox.empty():  # it wants the model again
                self._queue.append(client)
            self._tell_queue()
        self._since = time.monotonic()

    def _answer(self, client: Client, request: Any) -> Reply:
        try:
            reply = self._load(request, client.say) if isinstance(request, Load) else self._work(client, request)
        except KleinctlError as error:
            if isinstance(request, Generate):
                why = "ended by its run" if client.gone else f"failed: {error.problem.what}"
                self._on_event(Done(request.output, request.job, why=why))
            return Failed(type(error).__name__, str(error), "", error.problem)
        if isinstance(reply, Loaded):
            client.load = reply.stages.get("load", NO_USE)
        elif isinstance(reply, Made):
            client.pictures.append(_picture(request.job, reply))
            self._on_event(Done(request.output, request.job, sum(reply.seconds.values())))
        return reply

    def _work(self, client: Client, request: Any) -> Reply:
        """The worker's answer. A worker that ended while nobody asked anything of it is replaced once."""
        rested, self._rested = self._rested, False
        heard: list[Progress] = []

        def on_progress(said: Progress) -> None:
            heard[:] = [said]
            client.say(said)

        try:
            return self._ask(client, request, on_progress)
        except WorkerDied:
            if not rested or heard or client.gone:
                raise
        self._load(self._own_load(), client.say)
        return self._ask(client, request, client.say)

    def _ask(self, client: Client, request: Any, on_progress: OnProgress) -> Reply:
        worker = self._worker
        if worker is None:  # it asks for a picture without the model
            raise WorkerDied(serve.gone())
        with self._changed:
            self._asking = client
        alive = False
        try:
            reply = worker.ask(request, on_progress)
            alive = True
            return reply
        except KleinctlError as error:
            alive = not isinstance(error, WorkerDied)
            raise
        except ChildProcessError:  # the client is gone, and its thread saw the worker end first
            raise WorkerDied(serve.gone()) from None
        finally:
            with self._changed:  # a thread that ends the worker has this lock until it has
                self._asking = None
                if not alive or client.gone:
                    self._worker = None
            if self._worker is None:
                worker.stop()
                if isinstance(request, Generate):
                    request.partial.unlink(missing_ok=True)

    def _free(self, why: str) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
            self._on_event(Freed(why))
        with self._changed:
            self._free_wanted = False
            self._changed.notify_all()

    def _hang_up(self) -> None:
        worker, self._worker = self._worker, None
        with self._changed:
            clients = list(self._clients)
        if worker is not None:
            worker.stop()
        for client in clients:
            client.close()

    # What threads do

    def hear(self, connection: socket.socket, token: str, proof: str) -> None:
        """Hear a client until it is gone; one that does not know the token is told nothing."""
        line = Line(connection)
        client = Client(line)
        try:
            if not serve.greeted(line, token.encode()):
                return
            line.write(proof.encode())
            line.send(self.state)
            with self._changed:
                self._clients.add(client)
            while (message := client.hear()) is not None:
                self._take(client, message)
        except OSError:  # it is gone
            pass
        finally:
            self._lose(client)
            line.close()

    def _take(self, client: Client, message: Any) -> None:
        if isinstance(message, Ask | Ended):
            client.say(self._judged(client, message))
        elif isinstance(message, Free):
            with self._changed:
                self._free_wanted = True
                self._changed.wait_for(lambda: not self._free_wanted)
            client.say(self.state)
        elif isinstance(message, Stop):
            _thread.interrupt_main(signal.SIGTERM)
        else:
            with self._changed:
                client.inbox.put(message)
                if isinstance(message, Load) and client is not self._current:
                    self._queue.append(client)
                    self._changed.notify_all()
                self._tell_queue()

    def _lose(self, client: Client) -> None:
        """A client is gone: it waits no more, and a worker that is at work for it ends."""
        with self._changed:
            client.gone = True
            client.inbox.put(None)  # wakes the main thread
            self._clients.discard(client)
            if client in self._queue:
                self._queue.remove(client)
            self._tell_queue()
            if self._asking is client and self._worker is not None:
                with contextlib.suppress(ChildProcessError):  # the main thread saw it end first
                    self._worker.stop()

    def _tell_queue(self) -> None:
        """Tell those who wait how many are before them, where that has changed."""
        having = self._current is not None and not self._current.gone
        for place, client in enumerate(self._queue):
            before = place + having
            if client.before != before:
                client.before = before
                client.say(Waiting(before))

    def _judged(self, client: Client, question: Ask | Ended) -> Told | Failed:
        try:
            if isinstance(question, Ask):
                return self._judge(question.job, question.asked)
            return self._review(client, question.fit)
        except KleinctlError as error:
            return Failed(type(error).__name__, str(error), "", error.problem)

    def _judge(self, job: Job, asked: tuple[int, int] | None) -> Told:
        from kleinctl.checks.job import job_problems
        from kleinctl.facts.run import job_facts

        way, hardware, environment = self.ready.way, self.ready.hardware, self.ready.environment
        facts = job_facts(job, asked)
        for each in compare([way.offer], way.model, hardware, job, [environment]):
            if each.runs:
                odd = job_problems(facts, job, way.model, hardware, each.fit, environment)
                return Told(tuple(odd), each.fit)
        odd = [each for each in job_problems(facts, job, way.model, hardware) if each.severity == "error"]
        error = road.no_way(self._plugins, way.model, way.backend.name, hardware, vars(job))
        return Told(tuple(odd), refused=error.problem)

    def _review(self, client: Client, fit: Fit) -> Told:
        from kleinctl.checks.run import run_problems
        from kleinctl.facts.run import FinishedRun

        run = FinishedRun(
            model=self._request.model.name,
            backend=self._request.backend,
            device=self.ready.where.device,
            predicted_seconds=fit.seconds_next,
            predicted_vram_bytes=fit.vram_bytes,
            pictures=tuple(client.pictures),
            load=client.load,
            card_bytes=self._loaded.card_bytes if self._loaded is not None else 0,
        )
        return Told(tuple(run_problems(run, self.ready.hardware)))


def _picture(job: Job, made: Made) -> FinishedPicture:
    return FinishedPicture(
        width=job.width,
        height=job.height,
        seconds=made.seconds,
        stages=made.stages,
        rss_bytes=made.rss_bytes,
        pixels=made.pixels,
        prompt_cut=made.prompt_cut,
        tiling=made.tiling,
    )


def end_on_signals() -> None:
    """Have the system's ways to end a program do what Ctrl-C does; a closed terminal not under `nohup`."""
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Be the only server of this KLEINCTL_HOME.

    Raises:
        KleinctlError: there is one already, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    store.make_folder(serve.server_lock().parent)
    lock = FileLock(serve.server_lock(), mode=0o600)
    with store.writing(serve.server_lock()):
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            raise _running() from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is a folder, or the disk is read-only now
            server_file().unlink(missing_ok=True)
        lock.release()


def _running() -> KleinctlError:
    why = f"A server has {serve.server_lock()} locked; one folder has one server."
    return KleinctlError(Problem("a server runs already", why, "kleinctl serve --stop", name="server-running"))


@contextlib.contextmanager
def listening(server: Server) -> Iterator[None]:
    """Take clients for `server` in threads of their own, and say in `serve.json` where.

    Raises:
        KleinctlError: the file cannot be written.
    """
    token, proof = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if sys.platform == "win32":  # else another program could listen on the same port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    with listener:
        listener.bind((serve.ADDRESS, 0))
        listener.listen()
        port = listener.getsockname()[1]
        said = {"speaks": serve.SPEAKS, "pid": os.getpid(), "port": port, "token": token, "proof": proof}
        with store.writing(server_file()):
            serve.private_file(server_file(), json.dumps(said))
        threading.Thread(target=_accept, args=(listener, server, token, proof), daemon=True).start()
        yield


def _accept(listener: socket.socket, server: Server, token: str, proof: str) -> None:
    seats = threading.BoundedSemaphore(MOST_CLIENTS)

    def hear(connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                server.hear(connection, token, proof)
        finally:
            seats.release()

    while listener.fileno() >= 0:  # until it is closed
        try:
            connection, _ = listener.accept()
        except OSError:  # a stranger hung up too soon, or there are too many open files
            time.sleep(serve.SLICE_SECONDS)
            continue
        if seats.acquire(blocking=False):
            threading.Thread(target=hear, args=(connection,), daemon=True).start()
        else:
            connection.close()
