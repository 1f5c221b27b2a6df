"""What a ComfyUI server does while a picture is drawn, and what the client makes of it."""

from __future__ import annotations

import json
import socket
import threading

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
    made = client.run(api, lambda *event: told.append(event))
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
        ({"drop": 6}, []),
        ({"deaf": True}, []),
        ({"run": "run_base"}, [1, 4, 7, 10, 12, 15, 18, 20]),
    ],
    ids=["steps left out", "steps out of order", "websocket dropped", "no websocket", "skipping by itself"],
)
def test_the_picture_comes_whatever_becomes_of_the_progress(trouble, told):
    with Double(**trouble) as double:
        kinds, png = drawn(double)
    assert png == b"\x89PNG"
    assert steps(kinds) == told if told is not None else sorted(steps(kinds)) == [1, 2, 3, 4]


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
    with Double(stuck=True) as double:
        with pytest.raises(KleinctlError) as failure:
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]
    assert failure.value.problem.name == "comfyui-hangs"
    assert "this job runs" in failure.value.problem.why


def test_a_custom_node_that_talks_all_the_time_does_not_hide_that_nothing_moves(monkeypatch):
    monkeypatch.setattr(comfyui_client, "HANG_SECONDS", 0.5)
    with Double(stuck=True, noisy=True) as double:
        with pytest.raises(KleinctlError, match="queue hangs"):
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]


def test_a_job_is_not_left_behind_when_the_server_no_longer_says_what_became_of_it():
    with Double(status={"/history/job-101": 500}, stuck=True) as double:
        with pytest.raises(Refused):
            Client(double.url).run(graph(), lambda *event: None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]


@pytest.mark.parametrize("answer", [{}, [], {"prompt_id": ""}, {"prompt_id": None}])
def test_without_an_id_nothing_is_interrupted_for_it_would_be_anybodys_job(monkeypatch, answer):
    with Double(stuck=True) as double:
        client, ask = Client(double.url), Client.ask
        monkeypatch.setattr(
            Client, "ask", lambda self, path, body=None: answer if path == "/prompt" else ask(self, path, body)
        )
        with pytest.raises(KleinctlError, match="does not answer"):
            client.run(graph(), lambda *event: None)
        assert not double.asked("/interrupt")


def test_the_picture_that_was_saved_comes_before_previews():
    shown = {"filename": "reference.png", "subfolder": "", "type": "temp"}
    saved = {"filename": "made.png", "subfolder": "a", "type": "output"}
    entry = {"status": {"status_str": "success"}, "outputs": {"3": {"images": [shown]}, "9": {"images": [saved]}}}
    assert vars(comfyui_client._picture(entry)) == saved


def test_what_bench_queued_is_taken_back_when_it_is_broken_off(monkeypatch):
    from kleinctl import against
    from kleinctl.plugins import Plugins

    def broken_off(url, queued):
        raise KeyboardInterrupt

    monkeypatch.setattr(against, "finished", broken_off)
    files = {"unet_name": ["flux-2-klein-4b.safetensors"], "clip_name": ["qwen_3_4b.safetensors"]}
    loaders = {"UNETLoader": files, "CLIPLoader": files, "VAELoader": {"vae_name": ["flux2-vae.safetensors"]}}
    model, job = Plugins().models["klein-4b"], Job("a red cube", 128, 96, 7, 4, 1.0)
    with Double(stuck=True, files=loaders) as double, against.comfyui(double.url, model) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.draw(job, None)
        assert double.asked("/interrupt") == [{"prompt_id": "job-101"}]


@pytest.mark.parametrize("said", [b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/x\r\n\r\n", b"nonsense\r\n\r\n"])
def test_bench_follows_no_server_elsewhere_and_no_nonsense(said):
    from kleinctl import against

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            asked, _ = listening.accept()
            asked.recv(4096)
            asked.sendall(said)
            asked.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(KleinctlError) as failure:
            against.ask(f"http://127.0.0.1:{listening.getsockname()[1]}", "/system_stats")
    assert failure.value.problem.name in ("comfyui-failed", "comfyui-silent")
    assert "127.0.0.1:1/x" not in failure.value.problem.why


def test_a_url_that_is_none_is_refused_in_words_by_bench():
    from kleinctl import against

    for url in ("http://[::1", "http://127.0.0.1:99999"):
        with pytest.raises(KleinctlError, match="no server on this machine"):
            against.check(url, {})


def test_a_queue_of_another_shape_is_no_queue(monkeypatch):
    monkeypatch.setattr(
        Client, "ask", lambda *asked: {"queue_running": 3, "queue_pending": [["a", "x"], [1, "y"], [{}, "job"]]}
    )
    assert Client("http://127.0.0.1:1")._place("job") in (0, 1, 2)


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
