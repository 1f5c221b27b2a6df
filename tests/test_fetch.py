"""Downloads that go wrong, against a hub on loopback that answers as the real one does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kleinctl.fetch import Event, Patience, arrived_bytes, fetch, fetch_all, partial_file, reachable
from kleinctl.home import downloads_folder, home, quarantine_folder
from kleinctl.manifest import Part, Source
from kleinctl.problem import KleinctlError, Problem
from tests.hub import SIGNATURE, Hub

REPO = "black-forest-labs/FLUX.2-klein-4B"
QUICK = Patience(connect=2, stall=0.4, retries=3, backoff=0.01, longest_wait=2)
ONCE = Patience(connect=2, stall=0.4, retries=0, backoff=0.01, longest_wait=2)
BYTES = random.Random(4).randbytes(700_000)
SECRET = "hf_thisIsASecretToken"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub.utils import close_session

    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


def part_of(data: bytes, *sources: Source, name: str = "vae.safetensors", size: bool = True, sha: bool = True) -> Part:
    return Part(
        id=name.split(".")[0],
        role="vae",
        name=name,
        to={"diffusers": name},
        sources=sources or (Source(path=name, repo=REPO, revision="main"),),
        size=len(data) if size else None,
        sha256=hashlib.sha256(data).hexdigest() if sha else None,
        model="klein-4b",
    )


@pytest.fixture
def vae(hub: Hub) -> Part:
    """A part that the hub has."""
    hub.add(REPO, "vae.safetensors", BYTES)
    return part_of(BYTES)


class Watch(list[Event]):
    """Collects progress."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def notes(self) -> str:
        return " ".join(event.note for event in self)


def got(part: Part, patience: Patience = QUICK, watch: Watch | None = None) -> bytes:
    return fetch(part, watch if watch is not None else Watch(), patience=patience)[0].read_bytes()


def refused(part: Part, patience: Patience = QUICK) -> Problem:
    with pytest.raises(KleinctlError) as caught:
        fetch(part, Watch(), patience=patience)
    problem = caught.value.problem
    assert problem.what and problem.why.endswith(".") and problem.fix
    return problem


# It works


def test_a_plain_download(hub: Hub, vae: Part):
    watch = Watch()
    path, sha256 = fetch(vae, watch, patience=QUICK)
    assert (path.read_bytes(), sha256) == (BYTES, vae.sha256)
    assert (watch[-1].stage, watch[-1].done, watch[-1].total) == ("done", len(BYTES), len(BYTES))
    assert [seen.host for seen in hub.requests] == ["hub", "cdn"]
    assert [file.name for file in downloads_folder().iterdir()] == [f"{vae.sha256}.partial"]


def test_a_small_file_that_is_not_in_lfs(hub: Hub):
    hub.add(REPO, "model_index.json", b"{}", lfs=False)
    assert got(part_of(b"{}", name="model_index.json")) == b"{}"
    assert [seen.host for seen in hub.requests] == ["hub", "hub"]


def test_an_empty_file(hub: Hub):
    assert got(part_of(b"")) == b""


def test_a_part_without_a_hash_is_held_to_the_one_the_hub_states(hub: Hub):
    hub.add(REPO, "vae.safetensors", BYTES)
    part = part_of(BYTES, size=False, sha=False)
    assert got(part) == BYTES
    partial_file(part).unlink()
    hub.misbehave("vae.safetensors", "wrong")
    assert refused(part).name == "wrong-hash"


def test_a_complete_partial_needs_no_request(hub: Hub, vae: Part):
    got(vae)
    hub.requests.clear()
    assert got(vae) == BYTES
    assert hub.requests == []


# Lines that break


def test_the_line_drops_twice_and_the_download_goes_on(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=200_000, times=2)
    watch = Watch()
    assert got(vae, watch=watch) == BYTES
    ranges = [seen.headers.get("range") for seen in hub.gets()]
    assert ranges == [None, "bytes=200000-", "bytes=400000-"]
    assert all(seen.headers["if-range"] == f'"{vae.sha256}"' for seen in hub.gets()[1:])
    assert "broke off; trying again" in watch.notes


def test_the_line_stays_down_and_the_next_run_goes_on(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=300_000)
    assert refused(vae, ONCE).name == "download-interrupted"
    assert partial_file(vae).stat().st_size == 300_000
    watch = Watch()
    assert got(vae, watch=watch) == BYTES
    assert hub.gets()[-1].headers["range"] == "bytes=300000-"
    assert watch[0].stage == "rehash"


def test_tries_that_bring_something_do_not_count(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=100_000, times=6)
    assert got(vae, QUICK) == BYTES  # 3 retries allowed, 6 needed


def test_a_server_that_ignores_ranges(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=300_000)
    hub.misbehave("vae.safetensors", "ignore-range")
    assert got(vae) == BYTES


def test_the_file_on_the_server_changed_meanwhile(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=300_000)
    hub.misbehave("vae.safetensors", "new-etag")
    assert got(vae) == BYTES
    assert len(hub.gets()) == 2  # 200 with everything, for If-Range no longer holds


def test_a_server_whose_name_of_a_version_is_no_header_is_resumed_without_it(hub: Hub, vae: Part):
    partial_file(vae).parent.mkdir(parents=True)
    partial_file(vae).write_bytes(BYTES[:300_000])
    note = {"url": f"{hub.url}/{REPO}/resolve/main/vae.safetensors", "etag": '"é"', "size": len(BYTES)}
    partial_file(vae).with_name(partial_file(vae).name + ".json").write_text(json.dumps(note), encoding="utf-8")
    assert got(vae) == BYTES


def test_bytes_left_by_another_version_are_cut_off(hub: Hub, vae: Part):
    downloads_folder().mkdir(parents=True)
    partial_file(vae).write_bytes(BYTES + b"more")
    assert got(vae) == BYTES


def test_all_was_there_but_nobody_knew(hub: Hub):
    hub.add(REPO, "LICENSE.md", b"text", lfs=False)
    part = part_of(b"text", name="LICENSE.md", size=False, sha=False)
    downloads_folder().mkdir(parents=True)
    partial_file(part).write_bytes(b"text")
    assert got(part) == b"text"
    assert [seen.headers.get("range") for seen in hub.requests] == ["bytes=4-"] * 2


def test_a_stall_is_noticed_and_overcome(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "stall", at=500_000)
    assert got(vae) == BYTES
    assert hub.gets()[-1].headers["range"] == "bytes=500000-"


def test_a_server_that_only_stalls(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "stall", at=0, times=None)
    problem = refused(vae, ONCE)
    assert (problem.name, problem.what) == ("download-stalled", "vae.safetensors does not arrive")
    assert "for 0.4 s" in problem.why


def test_too_many_requests_with_a_pause_that_is_kept(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "status", code=429, headers={"Retry-After": "1"})
    watch, start = Watch(), time.monotonic()
    assert got(vae, watch=watch) == BYTES
    assert time.monotonic() - start >= 1
    assert "trying again in 1.0 s" in watch.notes


def test_too_many_requests_with_a_pause_that_is_too_long(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "status", code=429, headers={"ratelimit": '"resolvers";r=0;t=270'})
    problem = refused(vae)
    assert (problem.name, problem.ref) == ("rate-limited", "B14")
    assert "wait 4 min 30 s" in problem.why


@pytest.mark.parametrize("said", [{"Retry-After": "9" * 400}, {"ratelimit": f"r=0;t={'9' * 400}"}])
def test_a_server_that_asks_to_wait_for_ever(hub: Hub, vae: Part, said: dict[str, str]):
    hub.misbehave("vae.safetensors", "status", times=None, code=429, headers=said)
    assert refused(vae, ONCE).name == "rate-limited"


@pytest.mark.parametrize(
    "place", ["http://a..b/x", f"http://{'a' * 70}.example/", "http://127.0.0.1:1/\x01", "http://\x7f/"]
)
def test_a_redirect_to_an_address_that_no_web_server_has(hub: Hub, vae: Part, place: str):
    hub.misbehave("vae.safetensors", "status", times=None, code=302, headers={"Location": place})
    assert "an address that no web server has" in refused(vae, ONCE).why


def test_the_hub_has_a_moment_of_weakness(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "status", code=503, times=2)
    assert got(vae) == BYTES


def test_the_hub_is_down(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "status", code=503, times=None)
    problem = refused(vae)
    assert (problem.name, "status 503" in problem.why) == ("hub-error", True)
    assert len(hub.requests) == 1 + QUICK.retries


def test_a_signed_address_runs_out_and_is_made_anew(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "drop", at=100_000)
    hub.misbehave("vae.safetensors", "status", code=403, host="cdn")
    assert got(vae) == BYTES


# Who may have it


def test_a_gated_file_without_a_token(hub: Hub):
    hub.add(REPO, "vae.safetensors", BYTES, gated=True)
    problem = refused(part_of(BYTES))
    assert (problem.name, problem.ref) == ("gated-repo", "B01")
    assert "no token was sent" in problem.why
    assert (
        f"https://huggingface.co/{REPO}" in problem.fix and "hf auth login" in problem.fix and "HF_TOKEN" in problem.fix
    )
    assert len(hub.requests) == 1  # no use in trying again


def test_a_gated_file_whose_licence_was_not_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.add(REPO, "vae.safetensors", BYTES, gated=True)
    hub.allow(SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    problem = refused(part_of(BYTES))
    assert (problem.name, "belongs to none" in problem.why) == ("gated-repo", True)


def test_a_token_that_is_unknown_or_mistyped(hub: Hub, vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert refused(vae).name == "token-rejected"
    monkeypatch.setenv("HF_TOKEN", "hf_with…ellipsis")
    problem = refused(vae)
    assert problem.name == "token-rejected" and "ellipsis" not in str(problem)


def test_the_token_stays_with_the_hub_and_out_of_everything(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    caplog.set_level(logging.DEBUG)
    hub.add(REPO, "vae.safetensors", BYTES, gated=True)
    hub.allow(SECRET, REPO)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.misbehave("vae.safetensors", "drop", at=300_000)
    watch = Watch()
    with pytest.raises(KleinctlError) as caught:
        fetch(part_of(BYTES), watch, patience=ONCE)
    everything = [repr(caught.value.problem), repr(list(watch)), caplog.text, *capfd.readouterr()]
    everything += [file.read_text("latin-1") for file in home().rglob("*") if file.is_file()]
    assert len(everything) > 5 and not any(SECRET in text for text in everything)
    assert not any(SIGNATURE in text for text in everything if text is not caplog.text)
    got(part_of(BYTES))
    assert [seen.headers.get("authorization") for seen in hub.gets("hub")] == [f"Bearer {SECRET}"] * 2
    assert hub.gets("cdn") and all("authorization" not in seen.headers for seen in hub.gets("cdn"))


def test_a_redirect_to_the_same_address_with_another_port_gets_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.allow(SECRET)
    hub.add(REPO, "vae.safetensors", BYTES)
    elsewhere = {"Location": f"{hub.cdn_url}/repos/{REPO}/main/vae.safetensors?{SIGNATURE}"}
    hub.misbehave("vae.safetensors", "status", code=307, headers=elsewhere)
    assert got(part_of(BYTES)) == BYTES
    assert "authorization" not in hub.gets("cdn")[0].headers


def test_the_password_of_a_mirror_is_written_nowhere(hub: Hub, vae: Part, monkeypatch: pytest.MonkeyPatch):
    hub.allow("Basic bWU6b3BlbnNlc2FtZQ==")  # me:opensesame
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:opensesame@"))
    hub.misbehave("vae.safetensors", "drop", at=300_000)
    problems = [refused(vae, ONCE)]
    hub.misbehave("vae.safetensors", "status", code=404)
    problems.append(refused(vae, ONCE))
    left = [file.read_text("latin-1") for file in home().rglob("*") if file.is_file()]
    assert len(left) == 2 and not any("opensesame" in text for text in [*left, *map(repr, problems)])
    assert got(vae) == BYTES


def test_a_token_without_the_right_to_read(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "status", code=403)
    assert refused(vae).name == "access-forbidden"


@pytest.mark.parametrize(
    ("repo", "revision", "path", "name", "what"),
    [
        (REPO, "main", "gone.safetensors", "hub-file-missing", "vae.safetensors is not on 127.0.0.1"),
        (REPO, "abc", "vae.safetensors", "hub-file-missing", "vae.safetensors is not on 127.0.0.1"),
        ("black-forest-labs/FLUX.3", "main", "vae.safetensors", "repo-missing", "black-forest-labs/FLUX.3 is not on"),
    ],
)
def test_a_name_that_is_not_on_the_hub(hub: Hub, vae: Part, repo: str, revision: str, path: str, name: str, what: str):
    problem = refused(part_of(BYTES, Source(path=path, repo=repo, revision=revision)))
    assert (problem.name, problem.what.startswith(what)) == (name, True)


# What came is not what was wanted


def test_wrong_bytes_are_quarantined_and_the_next_source_is_used(hub: Hub):
    hub.add(REPO, "vae.safetensors", BYTES)
    hub.add("mirror/klein", "vae.safetensors", BYTES)
    hub.misbehave("vae.safetensors", "wrong")
    mirror = Source(path="vae.safetensors", repo="mirror/klein", revision="main")
    part = part_of(BYTES, Source(path="vae.safetensors", repo=REPO, revision="main"), mirror)
    assert got(part) == BYTES
    [bad] = quarantine_folder().glob("vae.safetensors.????????")
    assert bad.stat().st_size == len(BYTES)
    reason = json.loads(bad.with_name(bad.name + ".json").read_text())
    assert reason["wanted"] == f"sha256 {part.sha256}"
    assert reason["found"] == f"sha256 {hashlib.sha256(bad.read_bytes()).hexdigest()}"
    assert reason["source"] == f"{hub.url}/{REPO}/resolve/main/vae.safetensors"
    assert reason["looks_like"]


def test_wrong_bytes_from_everywhere(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "wrong", times=None)
    problem = refused(vae)
    assert problem.name == "wrong-hash" and str(vae.sha256) in problem.why
    assert Path(str(problem.path)).parent == quarantine_folder()
    assert not partial_file(vae).exists()


def test_a_damaged_partial_is_set_aside_and_fetched_anew(hub: Hub, vae: Part):
    downloads_folder().mkdir(parents=True)
    partial_file(vae).write_bytes(bytes(300_000))  # what a power cut may leave
    assert got(vae) == BYTES
    assert len(list(quarantine_folder().glob("*.json"))) == 1


def test_a_file_cut_short_by_the_server(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "short", at=1234)
    problem = refused(vae)
    assert (problem.name, "700000 bytes wanted, 1234 offered" in problem.why) == ("wrong-size", True)


def test_the_hub_has_another_file_by_now(hub: Hub):
    hub.add(REPO, "vae.safetensors", BYTES[::-1])
    assert refused(part_of(BYTES)).name == "hub-file-changed"
    hub.add(REPO, "vae.safetensors", BYTES[:-1])
    assert refused(part_of(BYTES)).name == "hub-file-changed"
    assert arrived_bytes(part_of(BYTES)) == 0


def test_a_log_in_page_instead_of_weights(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "html")
    problem = refused(vae)
    assert (problem.name, problem.ref) == ("web-page-instead", "B04")
    assert not quarantine_folder().exists()


def test_each_source_that_failed_is_named(hub: Hub):
    sources = [Source(path="vae.safetensors", repo=repo, revision="main") for repo in ("one/gone", "two/gone")]
    problem = refused(part_of(BYTES, *sources))
    assert problem.what.startswith("one/gone") and "two/gone is not on" in problem.why


# No line at all


def test_the_hub_cannot_be_found(vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    problem = refused(vae)
    assert (problem.name, problem.ref, "no DNS" in problem.why) == ("hub-unreachable", "B12", True)


def test_nobody_listens(vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    problem = refused(vae)
    assert (problem.name, "refused" in problem.why) == ("hub-unreachable", True)
    unreachable = reachable()
    assert unreachable and unreachable.name == "hub-unreachable"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_no_encryption_where_it_should_be(hub: Hub, vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http:", "https:"))
    assert refused(vae).name == "tls-not-trusted"


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_proxy_reads_along_with_a_certificate_of_its_own(vae: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_with_tls, args=(server, context), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{server.getsockname()[1]}")
        problem = refused(vae)
    assert (problem.name, problem.ref) == ("tls-not-trusted", "B13")
    assert "signed by nobody" in problem.why and "SSL_CERT_FILE" in problem.fix


def answer_with_tls(server: socket.socket, context: ssl.SSLContext) -> None:
    try:
        while True:
            connection, _ = server.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()
    except OSError:
        pass


@pytest.mark.parametrize(
    ("variable", "address", "found"),
    [
        ("ALL_PROXY", "socks5://ann:secret@127.0.0.1:1080", "the kind socks5"),
        ("HTTPS_PROXY", "http://a:b:c", "malformed"),
    ],
)
def test_a_proxy_that_is_none_for_http(variable: str, address: str, found: str):
    code = "from kleinctl import hub; problem = hub.reachable('http://127.0.0.1:9'); print(problem.to_json())"
    env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    told = subprocess.run(
        [sys.executable, "-c", code], env={**env, variable: address}, capture_output=True, text=True, timeout=60
    )
    assert told.stderr == "" and "secret" not in told.stdout
    assert "proxy-refused" in told.stdout and found in told.stdout and f"unset {variable}" in told.stdout


def test_an_endpoint_that_is_no_address(vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    assert refused(vae).name == "endpoint-malformed"
    problem = reachable()
    assert problem and problem.name == "endpoint-malformed"


def test_offline_means_no_request(hub: Hub, vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    problem = refused(vae)
    assert (problem.name, problem.what) == ("offline", "offline, and not here: vae.safetensors (700 kB)")
    assert "KLEINCTL_OFFLINE" in problem.fix
    probed = reachable()
    assert probed and probed.name == "offline"
    assert hub.requests == []


def test_the_hub_answers(hub: Hub):
    assert reachable() is None
    assert reachable(hub.url + "/") is None


def test_a_hub_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        problem = reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    assert problem and problem.name == "download-stalled" and "does not answer" in problem.what
    assert time.monotonic() - start < 3


# The disk


IN_A_SMALL_DISK = """
set -e
mkdir -p "$KLEINCTL_HOME/downloads"
mount -t tmpfs -o size=256k none "$KLEINCTL_HOME/downloads"
exec "$0" -c "$1"
"""
FETCH_AND_TELL = """
import sys
sys.path.insert(0, {root!r})
from kleinctl import store
from kleinctl.fetch import arrived_bytes, fetch
from kleinctl.problem import KleinctlError
from tests.test_fetch import BYTES, QUICK, part_of
{before}
try:
    fetch(part_of(BYTES), print, patience=QUICK)
except KleinctlError as error:
    print("PROBLEM", error.problem.name, arrived_bytes(part_of(BYTES)))
"""
ROOT = str(Path(__file__).parent.parent)


def can_mount() -> bool:
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True
        ).returncode
    )


def on_a_small_disk(before: str) -> list[str]:
    script = FETCH_AND_TELL.format(root=ROOT, before=before)
    command = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_DISK, sys.executable, script]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    return told.stdout.split()[-3:]


@pytest.mark.skipif(not can_mount(), reason="mounts a small disk in a namespace of its own")
def test_a_disk_without_room_is_not_begun_to_fill(hub: Hub, vae: Part):
    assert on_a_small_disk("") == ["PROBLEM", "disk-full", "0"]


@pytest.mark.skipif(not can_mount(), reason="mounts a small disk in a namespace of its own")
def test_the_disk_fills_up_and_the_partial_stays(hub: Hub, vae: Part):
    # The check beforehand is told that there is room, as when another program fills the disk meanwhile.
    *problem, size = on_a_small_disk("store.free_bytes = lambda folder: 10**12")
    assert problem == ["PROBLEM", "disk-full"]
    assert 0 < int(size) <= 256 * 1024


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on file size")
def test_a_disk_that_does_not_hold_files_this_large(hub: Hub, vae: Part):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    script = FETCH_AND_TELL.format(root=ROOT, before=limit)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert told.stdout.split()[-3:] == ["PROBLEM", "file-too-large-for-disk", "300000"], told.stderr


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that not even root can write to")
def test_a_folder_that_cannot_be_written(vae: Part, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLEINCTL_HOME", "/sys/kernel/kleinctl")
    assert refused(vae).name == "folder-not-writable"


def test_a_file_where_the_folder_should_be(vae: Part):
    home().mkdir(parents=True)
    downloads_folder().write_text("in the way")
    assert refused(vae).name == "disk-error"


# From a package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "tiny_weights"
    (folder / "klein-tiny").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "klein-tiny" / "vae.safetensors").write_bytes(BYTES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder.name


def test_a_part_that_comes_in_a_package_needs_no_network(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLEINCTL_OFFLINE", "1")
    assert got(part_of(BYTES, Source(path="klein-tiny/vae.safetensors", package=package))) == BYTES


def test_a_package_with_another_file_in_it(package: str):
    problem = refused(part_of(BYTES[::-1], Source(path="klein-tiny/vae.safetensors", package=package)))
    assert (problem.name, f"package {package}/klein-tiny/vae.safetensors" in problem.why) == ("wrong-hash", True)


def test_a_package_that_is_not_installed_falls_back_to_the_hub(hub: Hub, vae: Part):
    absent = Source(path="vae.safetensors", package="no_such_package_anywhere")
    assert refused(part_of(BYTES, absent)).name == "package-incomplete"
    assert got(part_of(BYTES, absent, *vae.sources)) == BYTES


# Several at a time


def test_several_files_at_a_time_with_one_total(hub: Hub):
    files = {f"{number}.safetensors": random.Random(number).randbytes(200_000 + number) for number in range(6)}
    for name, data in files.items():
        hub.add(REPO, name, data)
        hub.misbehave(name, "slow", rate=600_000)
    parts = [part_of(data, name=name) for name, data in files.items()]
    arrived: dict[str, bytes] = {}
    watch, start = Watch(), time.monotonic()
    fetch_all(parts, lambda part, file, sha256: arrived.update({part.name: file.read_bytes()}), watch, patience=QUICK)
    assert arrived == files
    assert time.monotonic() - start < 6 * 0.33
    total = sum(map(len, files.values()))
    assert {event.all_total for event in watch} == {total} and watch[-1].all_done == total
    assert [event.all_done for event in watch] == sorted(event.all_done for event in watch)


def test_one_file_that_fails_stops_the_others_and_they_go_on_later(hub: Hub):
    hub.add(REPO, "large.safetensors", BYTES)
    hub.misbehave("large.safetensors", "slow", rate=400_000)
    hub.add(REPO, "gated.json", b"{}", gated=True)
    parts = [part_of(BYTES, name="large.safetensors"), part_of(b"{}", name="gated.json")]
    hub.misbehave("gated.json", "status", code=503)  # so that the large one has begun
    with pytest.raises(KleinctlError) as caught:
        fetch_all(parts, lambda *_: None, Watch(), patience=Patience(backoff=0.4))
    assert caught.value.problem.name == "gated-repo"
    time.sleep(0.3)
    arrived = partial_file(parts[0]).stat().st_size
    assert 0 < arrived < len(BYTES)
    time.sleep(0.3)
    assert partial_file(parts[0]).stat().st_size == arrived  # its thread has stopped


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_stops_at_once_even_when_the_line_stalls(hub: Hub, vae: Part):
    hub.misbehave("vae.safetensors", "stall", at=400_000, times=None)
    script = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from tests.test_fetch import BYTES, part_of\n"
        "from kleinctl.fetch import fetch_all\n"
        "fetch_all([part_of(BYTES)], print, lambda event: print(event, flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not partial_file(vae).exists() or partial_file(vae).stat().st_size < 400_000:
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - start < 3
    assert got(vae) == BYTES
    assert hub.gets()[-1].headers["range"] == "bytes=400000-"
