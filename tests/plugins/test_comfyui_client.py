"""What a ComfyUI server does while a picture is drawn, and what the client makes of it."""

from __future__ import annotations

import json

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


def test_a_job_that_someone_removed_from_the_queue():
    with Double(gone=True) as double, pytest.raises(Failed, match="no longer in its queue"):
        Client(double.url).run(graph(), lambda *event: None)


def test_a_browsers_origin_is_never_sent():
    with Double() as double:
        drawn(double)
    assert not [path for path, headers in double.headers if "Origin" in headers]
    assert {headers["Host"] for _, headers in double.headers} == {double.url.removeprefix("http://")}


@pytest.mark.parametrize(
    "url", ["http://192.168.1.4:8188", "https://127.0.0.1:8188", "http://example.org", "file:///etc"]
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
