"""What the system says of itself, from recorded inputs: files under a root, variables, registry values, a server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kleinctl import documents
from kleinctl.facts import system
from kleinctl.facts.system import LocalServer, System

WSL = {"proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2"}


def write(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_this_system_is_gathered_quickly_and_survives_a_report():
    begun = time.perf_counter()
    found = system.gather()
    assert time.perf_counter() - begun < 1.5
    assert found.home.endswith("kleinctl") and found.home_error == ""
    assert documents.read(System, documents.plain(found), "system") == found


def test_variables_are_kept_by_name_and_credentials_are_not():
    environ = {
        "CUDA_VISIBLE_DEVICES": "1",
        "HTTPS_PROXY": "http://me:hush@proxy:3128",
        "http_proxy": "me:hush@proxy:3128",
        "HF_TOKEN": "hf_hush",
        "KLEINCTL_HOME": "/x",
        "KLEINCTL_API_TOKEN": "hush",
        "MALLOC_ARENA_MAX": "2",
        "EDITOR": "vi",
        "PYTHONPATH": "/opt/python@3.12",
    }
    assert system.variables(environ) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "HTTPS_PROXY": "http://proxy:3128",
        "KLEINCTL_HOME": "/x",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": "/opt/python@3.12",
        "http_proxy": "proxy:3128",
    }
    whole = str(system.gather(environ=environ))
    assert "hush" not in whole and "'HF_TOKEN'" in whole


def test_linux_with_the_drivers_files(tmp_path):
    write(
        tmp_path,
        **{
            "dev/nvidiactl": "",
            "dev/nvidia0": "",
            "dev/nvidia-uvm": "",
            "proc/modules": "nvidia_uvm 1 0\nnvidia 2 1\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.07  Fri Mar\n",
            "opt/cuda/libcuda.so.1": "",
            "etc/ld.so.cache": b"glibc-ld.so.cache1.1\0libcuda.so.1\0/opt/cuda/libcuda.so.1\0",
        },
    )
    found = system.linux_facts(tmp_path, {})
    assert found["device_nodes"] == ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0")
    assert (found["libcuda"], found["nouveau"], found["kernel_driver"]) == (True, False, "570.133.07")
    (tmp_path / "opt/cuda/libcuda.so.1").unlink()  # the loader's cache remembers what is gone
    assert system.libcuda(tmp_path, {}) is False
    write(tmp_path, **{"home/me/lib/libcuda.so.1": ""})
    assert system.libcuda(tmp_path, {"LD_LIBRARY_PATH": "/nowhere:/home/me/lib"}) is True


def test_linux_with_nouveau(tmp_path):
    write(tmp_path, **{"proc/modules": "nouveau 2400256 3 - Live 0x0\n"})
    found = system.linux_facts(tmp_path, {})
    assert found["nouveau"] and not found["libcuda"] and found["device_nodes"] == ()


# .wslconfig


def test_wslconfig_of_the_windows_user(tmp_path):
    write(
        tmp_path,
        **WSL,
        **{
            "mnt/c/Users/Public/x": "",
            "mnt/c/Users/Default/x": "",
            "mnt/c/Users/Jo/.wslconfig": "[wsl2]\r\nMemory = 12GB\r\nswap=8192MB\r\n",
        },
    )
    found = system.linux_facts(tmp_path, {})["wslconfig"]
    assert found.path.endswith("mnt/c/Users/Jo/.wslconfig") and found.exists and found.encoding == "utf-8"
    assert (found.memory_bytes, found.swap_bytes) == (12 * 2**30, 8 * 2**30)
    assert found.lines == ("[wsl2]", "Memory = 12GB", "swap=8192MB")
    profile = {"USERPROFILE": "C:\\Users\\Jo"}
    assert system.linux_facts(tmp_path, profile)["wslconfig"] == found
    assert system.windows_home(tmp_path, {"USERPROFILE": "/mnt/c/Users/Jo"}) == tmp_path / "mnt/c/Users/Jo"


@pytest.mark.parametrize("raw", ["[wsl2]\nmemory=12GB\n".encode("utf-16"), "[wsl2]\nmemory=12GB\n".encode("utf-16-le")])
def test_wslconfig_that_powershell_wrote(raw, tmp_path):
    found = system.wslconfig(write(tmp_path, **{".wslconfig": raw}))
    assert found is not None and (found.encoding, found.memory_bytes) == ("utf-16", 12 * 2**30)


def test_wslconfig_whose_name_windows_hides(tmp_path):
    found = system.wslconfig(write(tmp_path, **{".wslconfig.txt": "[wsl2]\nmemory=12GB\n"}))
    assert found is not None and (found.exists, found.misnamed) == (False, (".wslconfig.txt",))


def test_several_windows_users_and_nobody_knows_whose_it_is(tmp_path):
    write(tmp_path, **WSL, **{"mnt/c/Users/Jo/x": "", "mnt/c/Users/Kim/x": ""})
    assert system.linux_facts(tmp_path, {})["wslconfig"] is None
    assert system.windows_home(tmp_path, {"USER": "kim"}) == tmp_path / "mnt/c/Users/Kim"


# Windows


@pytest.mark.parametrize(
    ("values", "version"),
    [
        ({"Version": "v14.40.33810.00", "Installed": 1, "Major": 14, "Minor": 40, "Bld": 33810}, "14.40.33810"),
        ({"Version": "v14.29.30133.00", "Installed": 1}, "14.29.30133"),
        ({"Version": "v14.29.30133.00", "Installed": 0}, ""),
        ({}, ""),
    ],
)
def test_the_visual_cpp_runtime_by_its_registry_key(values, version):
    assert system.vc_runtime(values) == version


def test_links_may_be_made_here(tmp_path):
    assert system.symlinks(tmp_path) is True and list(tmp_path.iterdir()) == []
    assert system.symlinks(tmp_path / "missing") is None


# What listens where ComfyUI would


class Server(BaseHTTPRequestHandler):
    answer: bytes = b""
    wait = 0.0

    def do_GET(self) -> None:
        time.sleep(self.wait)
        with contextlib.suppress(OSError):  # who asks may not wait, or not read it all
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer: bytes, wait: float = 0.0) -> int:
        handler = type("Answering", (Server,), {"answer": answer, "wait": wait})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def test_comfyui_listens_and_says_how_it_was_started(serve):
    stats = {"system": {"comfyui_version": "0.9.2", "argv": ["main.py", "--lowvram"]}, "devices": []}
    port = serve(json.dumps(stats).encode())
    assert system.servers((port,)) == (LocalServer(port, "0.9.2", ("main.py", "--lowvram")),)


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[]", b'{"system": {}}', b"x" * 200_000])
def test_something_else_listens_on_comfyuis_port(answer, serve):
    port = serve(answer)
    assert system.servers((port,)) == (LocalServer(port),)


def test_a_server_that_does_not_answer_costs_half_a_second(serve):
    port = serve(b"{}", wait=2.0)
    begun = time.perf_counter()
    assert system.servers((port,)) == (LocalServer(port),)
    assert time.perf_counter() - begun < 1.2


def test_nothing_listens_and_that_costs_nothing():
    begun = time.perf_counter()
    assert system.servers((1, 9)) == ()
    assert time.perf_counter() - begun < 0.3


def test_unfinished_downloads_are_counted(empty_home):
    downloads = empty_home / "kleinctl" / "downloads"
    write(downloads, **{"a.part": "12345", "b.part": "123"})
    assert system.gather().part_files_bytes == 8
