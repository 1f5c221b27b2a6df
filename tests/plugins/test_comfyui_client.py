"""What a ComfyUI server does while a picture is drawn, and what the client makes of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time

import pytest
from kleinctl_plugins import comfyui_client
from kleinctl_plugins.comfyui_client import Client, Failed, Refused
from kleinctl_plugins.comfyui_graph import Files, picture

from kleinctl import Job
from kleinctl.problem import KleinctlError
from tests.comfyui_double import Double


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(comfyui_client, "LOOK_SECONDS", 0.05)


def graph(steps=4):
    job = Job("a red cube", 128, 96, 7, steps, 1.0)
    return picture(Files("klein.safetensors", "qwen.safetensors", "vae.safetensors"), job, "distilled").api()


def drawn(double):
    """What the client was told while it drew, and the picture's first bytes."""
    told = []
    client, api = Client(double.url), graph()
    made, *_ = client.run(api, lambda *event: told.append(event))
    kinds = [(api[node]["class_type"], value) if node in api else ("queue", value) for node, value, _ in told]
    return kinds, client.picture(made)[:4]


def steps(kinds):
    return [int(value) for kind, value in kinds if kind == "SamplerCustomAdvanced" and value]


def test_the_nodes_and_steps_of_a_run_are_told_in_their_order():
    with Double() as double:
        kinds, png = drawn(double)
    assert png == b"\x89PNG"
    assert steps(kinds) == [1, 2, 3, 4]
    assert [kind for kind, _ in kinds][-2:] == ["VAEDecode", "PreviewImage"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ({"skip": True}, [1, 4]),
        ({"shuffle": True}, None),
        ({"deaf": True}, []),
        ({"run": "run_base"}, [1, 4, 7, 10, 12, 15, 18, 20]),
    ],
    ids=["steps left out", "steps out of order", "no websocket", "skipping by itself"],
)
def test_the_picture_comes_whatever_becomes_of_the_progress(trouble, told):
    with Double(**trouble) as double:
        kinds, png = drawn(double)
    assert png == b"\x89PNG"
    assert steps(kinds) == told if told is not None else sorted(steps(kinds)) == [1, 2, 3, 4]


def test_a_websocket_that_drops_is_opened_again():
    with Double(drop=6, slow=0.1) as double:
        kinds, png = drawn(double)
    assert png == b"\x89PNG"
    assert steps(kinds)[-1] == 4


def test_progress_takes_no_way_through_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    with Double() as double:
        kinds, _ = drawn(double)
    assert steps(kinds) == [1, 2, 3, 4]


def test_the_jobs_before_ours_are_counted():
    with Double(ahead=2) as double:
        kinds, _ = drawn(double)
    assert next(value for kind, value in kinds if kind == "queue") == 2


def test_a_queue_that_does_not_move_is_said_to_hang(monkeypatch):
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 0.5)
    with Double(stuck=True, numbers=True) as double:
        with pytest.raises(KleinctlError) as failure:
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]
    assert failure.value.problem.name == "comfyui-hangs"
    assert "this job runs" in failure.value.problem.why


def test_a_custom_node_that_talks_all_the_time_does_not_hide_that_nothing_moves(monkeypatch):
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 0.5)
    with Double(stuck=True, noisy=True, numbers=True) as double:
        with pytest.raises(KleinctlError, match="queue hangs"):
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]


def test_a_job_is_not_left_behind_when_the_server_no_longer_says_what_became_of_it():
    with Double(status={"/history/job-101": 500}, stuck=True, numbers=True) as double:
        with pytest.raises(Refused):
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]


@pytest.mark.parametrize("answer", [{}, [], {"prompt_id": ""}, {"prompt_id": None}])
def test_without_an_id_in_the_answer_nobody_elses_job_is_interrupted(monkeypatch, answer):
    with Double(stuck=True) as double:
        client, ask = Client(double.url), Client.ask
        monkeypatch.setattr(
            Client, "ask", lambda self, path, body=None: answer if path == "/prompt" else ask(self, path, body)
        )
        ids = []
        with pytest.raises(KleinctlError, match="does not answer"):
            client.run(graph(), lambda *event: None, ids.append)
        assert double.asked("/interrupt") == [{"prompt_id": ids[0]}], "without one it would end anybody's"


def test_a_job_has_its_id_before_it_is_sent_for_whoever_takes_it_back():
    """Between sending and the answer the worker may be killed."""
    with Double() as double:
        ids = []
        Client(double.url).run(graph(), lambda *event: None, lambda id: ids.append((id, len(double.asked("/prompt")))))
        assert ids == [(double.asked("/prompt")[0]["prompt_id"], 0), (None, 1)]


def test_an_older_server_gives_ids_of_its_own():
    with Double(numbers=True) as double:
        ids = []
        Client(double.url).run(graph(), lambda *event: None, ids.append)
    assert ids[1:] == ["job-101", None]


def test_a_server_that_was_started_anew_has_forgotten_our_job():
    with Double() as double:
        client = Client(double.url)
        assert not client.forgot()
        client.run(graph(), lambda *event: None)
        assert not client.forgot()
        double.history.clear()
        assert client.forgot()


def test_names_that_are_no_text_are_asked_for_all_the_same():
    with Double() as double, pytest.raises(Refused):
        Client(double.url).picture(comfyui_client.File("\ud800.png"))


def test_the_picture_that_was_saved_comes_before_previews():
    shown = {"filename": "reference.png", "subfolder": "", "type": "temp"}
    saved = {"filename": "made.png", "subfolder": "a", "type": "output"}
    entry = {"status": {"status_str": "success"}, "outputs": {"3": {"images": [shown]}, "9": {"images": [saved]}}}
    assert [vars(each) for each in comfyui_client._files(entry)] == [saved, shown]


def test_files_that_are_no_pictures_come_last():
    film = {"filename": "a.mp4", "subfolder": "", "type": "output"}
    outputs = {"3": {"images": [film], "animated": [True]}, "4": {"images": [{**film, "filename": "b.PNG"}]}}
    odd = {"5": {"text": ["a", "b"], "images": None}, "6": 3}
    found = comfyui_client._files({"status": {"status_str": "success"}, "outputs": {**outputs, **odd}})
    assert [each.filename for each in found] == ["b.PNG", "a.mp4"]


@pytest.mark.parametrize("said", [b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/x\r\n\r\n", b"nonsense\r\n\r\n"])
def test_no_server_elsewhere_and_no_nonsense_is_followed(said):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            asked, _ = listening.accept()
            asked.recv(4096)
            asked.sendall(said)
            asked.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises((Refused, KleinctlError)) as failure:
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}").ask("/system_stats")
    assert "127.0.0.1:1/x" not in str(failure.value)


@pytest.mark.parametrize("running", [3, [[1]], [[1, "z", {}, 3]], [[1, "z", 2, {"client_id": 4}]]], ids=str)
def test_a_queue_of_another_shape_is_no_queue(running):
    watch = comfyui_client._Watch("job", lambda *event: None)
    for _ in range(2):
        watch.look({"queue_running": running, "queue_pending": [["a", "x"], [1, "y"], [{}, "job"]]}, heard=True)
    assert (watch.before in (1, 2, 3), watch.gone) == (True, 0)


def waited(monkeypatch, seconds=1.0, **options):
    """What is told, and the problem if there is one, while another job is before ours; patience is half a second."""
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(comfyui_client, "QUIET_SECONDS", 0.3)
    told, end = [], time.monotonic() + seconds

    def tell(*event):
        told.append(event)
        if time.monotonic() > end:
            raise KeyboardInterrupt

    with Double(numbers=True, **options) as double:
        client = Client(double.url)
        with pytest.raises((KeyboardInterrupt, KleinctlError)) as failure:
            client.run(graph(), tell)
        assert double.asked("/queue") == [{"delete": ["job-101"]}]
        assert not [each for each in double.running if each[1] != "other-0"], "that of the other runs on"
    return told, getattr(failure.value, "problem", None)


def test_somebody_elses_long_job_is_waited_for_though_its_steps_are_not_told_to_us(monkeypatch):
    told, problem = waited(monkeypatch, before={"client_id": "their page"})
    assert problem is None
    assert told[0] == ("", 1, 0) and told[-1] == ("", 1, comfyui_client.UNSEEN)


def test_the_steps_of_a_job_before_ours_are_shown_where_comfyui_tells_them(monkeypatch):
    told, problem = waited(monkeypatch, before={}, steps=True)
    assert problem is None
    assert ("", 2, 99) in told


def test_a_job_before_ours_that_tells_everybody_its_steps_and_tells_none_hangs(monkeypatch):
    _, problem = waited(monkeypatch, seconds=10, before={})
    assert problem.name == "comfyui-hangs"
    assert "jobs before this one: 1" in problem.why


def test_without_a_websocket_a_long_run_is_no_hang(monkeypatch):
    told, end = [], time.monotonic() + 1
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 0.5)

    def tell(*event):
        told.append(event)
        if time.monotonic() > end:
            raise KeyboardInterrupt

    with Double(stuck=True, deaf=True) as double, pytest.raises(KeyboardInterrupt):
        Client(double.url).run(graph(), tell)
    assert told[-1] == ("", 0, 0), "kleinctl goes on saying that it is there"


def test_the_job_of_a_server_that_fell_silent_is_left_to_whoever_outlives_us(monkeypatch):
    """It may go on when the server wakes up."""
    queued = []

    async def late(self, request):
        await asyncio.sleep(0.5)

    with monkeypatch.context() as patch:
        patch.setattr(Double, "one_history", late)
        patch.setattr(comfyui_client, "ANSWER_SECONDS", 0.3)
        with Double() as double, pytest.raises(KleinctlError, match="timed out"):
            Client(double.url).run(graph(), lambda *event: None, queued.append)
    assert len(queued) == 1 and queued[0] is not None
    assert [path for path, _ in double.headers if path in ("/queue", "/interrupt")] == [], "it is not waited for twice"
    with Double() as double:
        Client(double.url).run(graph(), lambda *event: None, queued.append)
    assert queued[-1] is None, "one that has ended is over"


def test_a_job_that_someone_removed_from_the_queue():
    with Double(gone=True) as double, pytest.raises(Failed, match="no longer in its queue"):
        Client(double.url).run(graph(), lambda *event: None)


def test_a_browsers_origin_is_never_sent():
    with Double() as double:
        drawn(double)
    assert not [path for path, headers in double.headers if "Origin" in headers]
    assert {headers["Host"] for _, headers in double.headers} == {double.url.removeprefix("http://")}


@pytest.mark.parametrize(
    "url",
    [
        *("http://192.168.1.4:8188", "https://127.0.0.1:8188", "http://example.org", "file:///etc"),
        *("http://127.0.0.1:99999", "http://[::1"),
    ],
)
def test_a_server_elsewhere_is_not_asked(url):
    with pytest.raises(KleinctlError, match="not on this machine"):
        Client(url)


def test_a_server_that_is_gone():
    with Double() as double:
        url = double.url
    with pytest.raises(KleinctlError) as failure:
        Client(url).ask("/system_stats")
    assert failure.value.problem.name == "comfyui-silent"


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(comfyui_client, "MAX_JSON", 200)
    with Double() as double, pytest.raises(KleinctlError, match="more than 200 bytes"):
        Client(double.url).ask("/system_stats")


@pytest.mark.parametrize("piece", [b"\0" * 65536, b"\x89\0" * 9], ids=["a message without end", "pings alone"])
def test_a_websocket_that_never_lets_go_is_left(monkeypatch, piece):
    monkeypatch.setattr(comfyui_client, "MAX_JSON", 2**20)
    monkeypatch.setattr(comfyui_client, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def flood():
            asked, _ = listening.accept()
            key = re.search(rb"Sec-WebSocket-Key: (\S+)", asked.recv(4096))[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key).digest())
            upgrade = b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
            with contextlib.suppress(OSError):
                asked.sendall(upgrade + accept + b"\r\n\r\n" + (b"\x81\x7f" + b"\1" * 8 if piece[0] == 0 else b""))
                while True:
                    asked.sendall(piece)
            asked.close()

        threading.Thread(target=flood, daemon=True).start()
        events = comfyui_client._Events(f"ws://127.0.0.1:{listening.getsockname()[1]}/ws")
        assert events.open
        assert (events.next(0.2), events.open) == (None, False)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [(HEAD, b" "), (b"", b"HTTP/1.1 100 Continue\r\n\r\n")],
    ids=["a byte at a time", "always about to answer"],
)
def test_an_answer_that_never_ends_is_not_waited_for(monkeypatch, start, piece):
    monkeypatch.setattr(comfyui_client, "WHOLE_SECONDS", 0.3)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            asked, _ = listening.accept()
            with asked, contextlib.suppress(OSError):
                asked.sendall(start)
                while not over.wait(0.02):
                    asked.sendall(piece)

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        threading.Timer(5, over.set).start()
        began = time.monotonic()
        with pytest.raises(comfyui_client.Hung, match="gave no answer: it does not end"):
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}").ask("/queue")
        assert time.monotonic() - began < 3
        over.set()
        thread.join(5)


def test_a_refusal_keeps_its_status_and_its_text():
    with Double(error="missing-unet") as double, pytest.raises(Refused) as refused:
        Client(double.url).run(graph(), lambda *event: None)
    assert refused.value.status == 400
    assert json.loads(refused.value.text)["error"]["type"] == "prompt_outputs_failed_validation"


def test_a_job_is_taken_back_from_the_queue_and_ended():
    with Double() as double:
        Client(double.url).stop("job-7")
    assert double.asked("/queue") == [{"delete": ["job-7"]}]
    assert double.asked("/interrupt") == [{"prompt_id": "job-7"}]


@pytest.mark.parametrize("answer", [[], 3, "x", {"job-101": []}, {"job-101": {"status": {"status_str": "error"}}}])
def test_answers_of_another_shape_end_in_words(monkeypatch, answer):
    """A picture does not come of them, and no traceback either."""
    with Double() as double:
        client, ask = Client(double.url), Client.ask
        monkeypatch.setattr(
            Client, "ask", lambda self, path, body=None: ask(self, path, body) if "/prompt" in path else answer
        )
        with pytest.raises(Failed):
            client.run(graph(), lambda *event: None)
