"""A ComfyUI that draws nothing: it answers as a recorded one did (0.29.0), and misbehaves on demand.

As a thread of a test: `with Double(skip=True) as double: Client(double.url)`. As the main.py of a checkout:
`checkout(folder)` writes one that takes ComfyUI's own arguments; its `double.json` has the same options.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = FIXTURES / "comfyui"
ERRORS = FIXTURES / "logs" / "comfyui"


class Double:
    """The server. What was asked of it is in `seen`.

    `run` is the recorded run whose events are sent, `error` the recorded error that is answered (`te-clip-l`), `files`
    what the loaders list. `slow` waits so many seconds before each event, `skip` leaves out steps, `shuffle` reorders
    them, `drop` closes the websocket after so many events, `deaf` refuses it. `die` ends the process after so many
    events, with the exit status `code` or else killed, and prints `say` before. `stuck` never ends a job, `ahead` has
    so many jobs of others in the queue, `numbers` gives jobs ids of its own as older ones do (`job-101`), `gone`
    forgets the job, `noisy` tells of other things without end. `before` is the extra data of somebody's job that runs
    before ours and never ends, with `steps` it tells its steps to all.
    `status` answers a path with an HTTP status, `cut` cuts the picture short. `folder` is the checkout that it says it
    runs from, `folders` what it searches besides, `argv` its arguments; of a process that was started the first
    `strange` times say others than their own. `made` has the bytes of files that a job makes besides its picture by
    their names, `outputs` what the history says of them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.seen: list[tuple[str, Any]] = []
        self.headers: list[tuple[str, dict[str, str]]] = []
        self.history: dict[str, Any] = dict(options.get("history", {}))
        self.running: list[Any] = [[0, "other-0", {}, {}, []]] if options.get("ahead") else []
        if "before" in options:
            self.running = [[0, "other-0", {}, options["before"], []]]
        self.pending: list[Any] = [[n, f"other-{n}", {}, {}, []] for n in range(1, options.get("ahead", 0))]
        self.pictures: dict[str, bytes] = {}
        self.sockets: list[web.WebSocketResponse] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.number = 100

    # Running it

    def __enter__(self) -> Double:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def start() -> None:
            self._runner = web.AppRunner(self.app())
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            started.set()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *failure: object) -> None:
        async def stop() -> None:
            for task in self.tasks:
                task.cancel()
            for socket in self.sockets:
                await socket.close()
            await self._runner.cleanup()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware], client_max_size=2**26)
        app.add_routes(
            [
                web.get("/ws", self.ws),
                web.get("/system_stats", self.system_stats),
                web.get("/internal/folder_paths", self.folder_paths),
                web.get("/object_info/{node}", self.object_info),
                web.get("/queue", self.queue),
                web.get("/history", self.all_history),
                web.get("/history/{id}", self.one_history),
                web.get("/view", self.view),
                web.post("/prompt", self.prompt),
                web.post("/queue", self.delete),
                web.post("/interrupt", self.interrupt),
                web.post("/free", self.free),
                web.post("/upload/image", self.upload),
            ]
        )
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> Any:
        self.headers.append((request.path, dict(request.headers)))
        status = self.options.get("status", {}).get(request.path)
        return web.Response(status=status) if status else await handler(request)

    def asked(self, path: str) -> list[Any]:
        """The bodies of the requests to a path."""
        return [body for each, body in self.seen if each == path]

    # Answers

    async def system_stats(self, request: web.Request) -> web.Response:
        stats = json.loads((RECORDED / "system_stats.json").read_text(encoding="utf-8"))
        stats["system"]["comfyui_version"] = self.options.get("version", "0.29.0")
        stats["system"]["argv"] = self.options.get("argv", ["main.py"])
        return web.json_response(stats)

    async def folder_paths(self, request: web.Request) -> web.Response:
        folder = self.options.get("folder")
        own = {"custom_nodes": [str(Path(folder) / "custom_nodes")]} if folder else {}
        return web.json_response({**own, **self.options.get("folders", {})})

    async def object_info(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        file = RECORDED / "object_info" / f"{node}.json"
        if node in self.options.get("without", ()) or not file.is_file():
            return web.json_response({})
        said = json.loads(file.read_text(encoding="utf-8"))
        for key, names in self.options.get("files", {}).get(node, {}).items():
            said[node]["input"]["required"][key] = [names, {}]
        for key, spec in self.options.get("inputs", {}).get(node, {}).items():
            said[node]["input"]["required"][key] = spec
        return web.json_response(said)

    async def queue(self, request: web.Request) -> web.Response:
        return web.json_response({"queue_running": self.running, "queue_pending": self.pending})

    async def all_history(self, request: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def one_history(self, request: web.Request) -> web.Response:
        entry = self.history.get(request.match_info["id"])
        return web.json_response({request.match_info["id"]: entry} if entry else {})

    async def view(self, request: web.Request) -> web.Response:
        png = self.pictures.get(request.query["filename"])
        return web.Response(body=png, content_type="image/png") if png else web.Response(status=404)

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        self.seen.append(("/upload/image", {"name": form["image"].filename, "type": form["type"]}))
        return web.json_response({"name": form["image"].filename, "subfolder": "", "type": form["type"]})

    async def free(self, request: web.Request) -> web.Response:
        self.seen.append(("/free", await request.json()))
        return web.Response()

    async def delete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(("/queue", body))
        self.pending = [each for each in self.pending if each[1] not in body.get("delete", ())]
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        self.seen.append(("/interrupt", await request.json()))
        return web.Response()

    async def ws(self, request: web.Request) -> web.StreamResponse:
        if self.options.get("deaf"):
            return web.Response(status=500)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        await socket.send_json({"type": "status", "data": {"status": {}, "sid": request.query["clientId"]}})
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        self.sockets.remove(socket)
        return socket

    async def prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(("/prompt", body))
        error = self._error()
        if error is not None and "prompt" not in next(iter(error.values())):
            return web.json_response(error, status=400)
        self.number += 1
        number = f"job-{self.number}" if self.options.get("numbers") else body["prompt_id"]
        entry = [self.number, number, body["prompt"], {}, []]
        if not self.options.get("gone"):
            (self.pending if self.running else self.running).append(entry)
        task = asyncio.get_running_loop().create_task(self._run(number, body["prompt"], error))
        self.tasks.add(task)
        return web.json_response({"prompt_id": number, "number": self.number, "node_errors": {}})

    def _error(self) -> dict[str, Any] | None:
        name = self.options.get("error")
        return json.loads((ERRORS / f"{name}.json").read_text(encoding="utf-8")) if name else None

    # A job

    async def _run(self, number: str, graph: dict[str, Any], error: dict[str, Any] | None) -> None:
        if self.options.get("gone"):
            return
        if self.options.get("noisy"):
            self.tasks.add(asyncio.get_running_loop().create_task(self._chatter()))
        done = 0
        while self.running and self.running[0][1] != number:
            await asyncio.sleep(0.1)  # others are before it
            if self.options.get("steps"):
                done += 1
                data = {"node": "1", "prompt_id": "other-0", "value": done, "max": 99}
                await self._send({"type": "progress", "data": data})
            if self.options.get("ahead"):
                self.running = self.pending[:1]
                self.pending = self.pending[1:]
        for count, event in enumerate(self._events(number, graph), 1):
            await asyncio.sleep(self.options.get("slow", 0.001))
            await self._send(event)
            if count == self.options.get("drop"):
                for socket in self.sockets:
                    await socket.close()
            if count == self.options.get("die"):
                print(self.options.get("say", ""), file=sys.stderr, flush=True)
                if "code" in self.options:
                    os._exit(self.options["code"])
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        if self.options.get("stuck"):
            return
        self._finish(number, graph, error)
        await self._send({"type": "executing", "data": {"node": None, "prompt_id": number}})

    async def _chatter(self) -> None:
        """What custom nodes tell: the load of the card, for one."""
        while True:
            await self._send({"type": "crystools.monitor", "data": {"cpu_utilization": 3}})
            await asyncio.sleep(0.005)

    def _events(self, number: str, graph: dict[str, Any]) -> list[dict[str, Any]]:
        """The recorded events, at the nodes of this graph that have the recorded classes."""
        recorded = json.loads((RECORDED / f"{self.options.get('run', 'run_t2i')}.json").read_text(encoding="utf-8"))
        nodes = {node["class_type"].replace("PreviewImage", "SaveImage"): key for key, node in graph.items()}
        events = []
        for event in recorded["events"]:
            data = {**event["data"], "prompt_id": number}
            if event["type"] == "status" or event["type"] == "execution_error":
                continue
            if "node" in data:
                data["node"] = nodes.get(recorded["classes"].get(str(data["node"]), ""), "99")
            events.append({"type": event["type"], "data": data})
        steps = [each for each in events if each["type"] == "progress"]
        if self.options.get("skip"):
            events = [each for each in events if each not in steps[1:-1]]
        if self.options.get("shuffle"):
            random.Random(1).shuffle(steps)
            order = iter(steps)
            events = [next(order) if each["type"] == "progress" else each for each in events]
        return events

    async def _send(self, event: dict[str, Any]) -> None:
        for socket in list(self.sockets):
            if not socket.closed:
                await socket.send_bytes(b"\0\0\0\1preview")
                await socket.send_json(event)

    def _finish(self, number: str, graph: dict[str, Any], error: dict[str, Any] | None) -> None:
        self.running = [each for each in self.running if each[1] != number]
        if error is not None:
            (entry,) = error.values()
            self.history[number] = {**entry, "prompt": [1, number, graph, {}, []]}
            return
        recorded = json.loads((RECORDED / "run_t2i.json").read_text(encoding="utf-8"))
        self.pictures |= {f"{number}.png": self._png(graph), **self.options.get("made", {})}
        image = {"filename": f"{number}.png", "subfolder": "", "type": "temp"}
        save = next(key for key, node in graph.items() if node["class_type"] in ("SaveImage", "PreviewImage"))
        self.history[number] = {
            "prompt": [self.number, number, graph, {}, [save]],
            "outputs": self.options.get("outputs") or {save: {"images": [image]}},
            "status": recorded["status"],
        }

    def _png(self, graph: dict[str, Any]) -> bytes:
        """One colour, made from the seed, in the size of the empty latent."""
        from PIL import Image

        latent = next(node["inputs"] for node in graph.values() if node["class_type"] == "EmptyFlux2LatentImage")
        seed = next(node["inputs"]["noise_seed"] for node in graph.values() if node["class_type"] == "RandomNoise")
        colour = tuple(random.Random(seed).randbytes(3))
        size = self.options.get("size") or (latent["width"] // 16 * 16, latent["height"] // 16 * 16)
        buffer = io.BytesIO()
        Image.new("RGB", tuple(size), colour).save(buffer, "PNG")
        return buffer.getvalue()[: -40 if self.options.get("cut") else None]


def checkout(folder: Path, **options: Any) -> Path:
    """A folder whose main.py is the double."""
    folder.mkdir(parents=True, exist_ok=True)
    repository = Path(__file__).parent.parent
    code = f"import sys\nsys.path.insert(0, {str(repository)!r})\nfrom tests.comfyui_double import main\nmain()\n"
    (folder / "main.py").write_text(code, encoding="utf-8")
    (folder / "double.json").write_text(json.dumps(options), encoding="utf-8")
    return folder


def main() -> None:
    """Run as ComfyUI's main.py does; what it is to do, and what it was started with, stand beside it."""
    os.chdir(Path(sys.argv[0]).parent)
    options = json.loads(Path("double.json").read_text(encoding="utf-8"))
    Path("starts.txt").open("a").write(json.dumps(sys.argv[1:]) + f" {os.getpid()}\n")  # noqa: SIM115
    if options.get("fail"):
        print(options["fail"], file=sys.stderr, flush=True)
        sys.exit(options.get("exit", 1))
    if options.get("taken") and len(Path("starts.txt").read_text().splitlines()) <= options["taken"]:
        print("Port 1 is already in use on address 127.0.0.1. Please close the other application", file=sys.stderr)
        sys.exit(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen")
    parser.add_argument("--port", type=int)
    known, _ = parser.parse_known_args()
    if len(Path("starts.txt").read_text().splitlines()) > options.get("strange", 0):
        options.setdefault("argv", sys.argv)
    web.run_app(Double(**options).app(), host=known.listen, port=known.port, print=lambda *words: None)
