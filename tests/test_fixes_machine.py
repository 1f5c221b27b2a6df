"""`doctor --fix` for what is around the model: Pythons, packages, variables, certificates, caches, files that are here
twice."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kleinctl import environment, environment_build, fixes, hub, journal
from kleinctl.checks import downloads, own_checks, run_checks
from kleinctl.checks import environment as environment_checks
from kleinctl.checks import machine as machine_checks
from kleinctl.facts import Facts, weights
from kleinctl.facts.hub_cache import CachedRepo, HubCache
from kleinctl.facts.system import System
from kleinctl.fetch import fetch, partial_file
from kleinctl.fixes import variables, windows
from kleinctl.hardware import Gpu, Hardware, Mig, MigInstance, Python
from kleinctl.home import config_file, downloads_folder, envs_folder, home, quarantine_folder
from kleinctl.hub import Patience
from kleinctl.install import install_files, plan_files
from kleinctl.logs import explain
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError, Problem, Remedy
from kleinctl.store import disk
from tests.conftest import REPOSITORY
from tests.hub import Hub
from tests.test_environment import index, machine, planned  # noqa: F401 (fixtures)
from tests.test_fixes import installed, packages, problem, python, refused, wheels  # noqa: F401 (fixtures)
from tests.test_install import FILES, REPO, TRANSFORMER, VAE, klein, part_of
from tests.test_install import hub as real_hub  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the programs in these tests are shell scripts")

NOTHING: Any = None
QUICK = Patience(connect=2, stall=1, retries=1, backoff=0.01, longest_wait=1)


def carried_out(found: Problem, plugins: Any = None, hardware: Any = None) -> fixes.Plan:
    made = fixes.plan(found, plugins or Plugins(), hardware)
    assert made.consent == "ask"
    fixes.carry_out(made)
    return made


def failure(call: Any, *arguments: Any) -> Problem:
    with pytest.raises(KleinctlError) as caught:
        call(*arguments)
    return caught.value.problem


def script(folder: Path, name: str, text: str) -> Path:
    """A program on the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_every_remedy_of_a_check_is_one_that_can_be_carried_out():
    asked = set()
    for path in (REPOSITORY / "kleinctl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Remedy" and node.args:
                asked |= {each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)}
    assert {"set-variable", "install-vc-runtime", "share-file"} <= asked
    assert {each for each in asked if isinstance(each, str)} <= set(fixes.ACTIONS)


# The Visual C++ runtime


@pytest.fixture
def without_runtime() -> Problem:
    """What doctor finds on a Windows without the runtime."""
    hardware = Hardware(platform="win32", os="Windows 11", machine="AMD64")
    [found] = [machine_checks.vc_runtime_missing.function(hardware, System(vc_runtime=""))]
    return replace(found, name="vc-runtime-missing")


def test_the_visual_c_runtime_is_installed_by_winget(without_runtime, tmp_path, monkeypatch):
    script(tmp_path, "winget", f'echo "$@" > {tmp_path}/told; echo Successfully installed')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = carried_out(without_runtime)
    assert (tmp_path / "told").read_text().startswith("install --id Microsoft.VCRedist.2015+.x64 --exact --silent")
    assert made.why_not_undoable == "It is part of Windows then; Settings, Apps takes it away."
    assert failure(journal.find, 1).name == "undo-impossible"


def test_winget_fails_or_is_not_there(without_runtime, tmp_path, monkeypatch):
    assert "winget, which would install it, is not on this machine" in refused(without_runtime)
    script(tmp_path, "winget", "echo No package found matching input criteria.; exit 20")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = failure(carried_out, without_runtime)
    assert (found.name, "status 20: No package found" in found.why) == ("install-failed", True)
    assert journal.entries() == []


# Packages that klein does not need


def test_an_xformers_of_another_torch_is_taken_away_and_brought_back(python, wheels):  # noqa: F811
    subprocess.run([python, "-m", "pip", "install", "-q", "addon==1.5"], check=True)
    found = packages(python, "addon")
    found = replace(found, remedy=Remedy("uninstall-packages", {**found.remedy.arguments}, "ask"))
    made = carried_out(found)
    assert made.sentences == (f"uninstall addon 1.5 from {python}",) and made.undoable
    assert installed(python) == {"tiny": "2.0"}
    journal.undo(journal.find(None))
    assert installed(python) == {"tiny": "2.0", "addon": "1.5"}
    assert "packages that are in" in refused(
        replace(found, remedy=Remedy("uninstall-packages", {"python": str(python), "packages": "absent"}, "ask"))
    )
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "addon", "tiny"], check=True)


def test_a_wheel_that_somebody_built_cannot_be_brought_back(tmp_path):
    executable = tmp_path / "bin" / "python"
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "sageattention-2.2.0+cu128torch2.8.0.dist-info").mkdir(parents=True)
    (site / "torch-2.13.0+cu130.dist-info").mkdir()
    (tmp_path / "pyvenv.cfg").write_text("version = 3.12.1\n")
    executable.parent.mkdir()
    executable.write_text("")
    found = environment.inspect(executable, "ComfyUI")
    [clash] = environment_checks.packages_clash.function(found, machine())
    made = fixes.plan(clash, Plugins(), NOTHING)
    assert made.sentences[0].startswith("uninstall sageattention 2.2.0+cu128torch2.8.0 from")
    assert made.why_not_undoable.startswith("No package index has sageattention 2.2.0+cu128torch2.8.0")


# A Python that nothing is made for


@pytest.fixture
def too_new(monkeypatch) -> Hardware:
    """A machine whose kleinctl runs on Python 3.15, and on whose PATH is the one that runs this."""
    monkeypatch.setattr(environment_build, "_interpreters", lambda: iter([Path(sys.executable)]))
    return machine(python=Python("3.15.0", "/usr/bin/python3.15"))


def found_by(hardware: Hardware) -> Problem:
    facts = {"hardware": hardware, "environments": ()}
    [result] = run_checks([machine_checks.torch_is_made_for_it], facts)
    return result.problems[0]


def test_another_python_on_this_machine_makes_the_environment(too_new, planned, monkeypatch):  # noqa: F811
    found = found_by(too_new)
    assert (found.name, found.ref, found.what) == ("no-torch-build", "A05", "Python 3.15.0 cannot run a model")
    real = environment.plan(["torch"], too_new, cuda=False)
    assert real.python.resolve() == Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    offered = replace(planned, python=real.python)
    monkeypatch.setattr(environment, "plan", lambda requires, hardware, cuda: offered)
    made = carried_out(found, hardware=too_new)
    assert made.sentences[0] == f"take {real.python}" and made.undoable
    [built] = environment.list_managed()
    assert built.name == planned.name
    journal.undo(journal.find(None))
    assert environment.names() == []


def test_no_python_is_here_and_uv_fetches_one(too_new, planned, tmp_path, monkeypatch):  # noqa: F811
    fetched = environment_build.pythons_folder() / "cpython-3.13.9-linux" / "bin" / "python3"
    monkeypatch.setattr(
        environment_build, "_interpreters", lambda: iter([Path(sys.executable)] if fetched.exists() else [])
    )
    monkeypatch.setattr(environment, "plan", lambda requires, hardware, cuda: planned)
    monkeypatch.setattr("kleinctl.fixes.packages.shutil.which", lambda name: None)
    found = failure(fixes.plan, found_by(too_new), Plugins(), too_new)
    assert found.name == "no-torch-build" and "install uv (https://docs.astral.sh/uv)" in found.fix
    uv = script(tmp_path / "bin", "uv", f'echo "$@" > {tmp_path}/told; mkdir -p {fetched.parent}; touch {fetched}')
    monkeypatch.setattr("kleinctl.fixes.packages.shutil.which", lambda name: str(uv))
    made = carried_out(found_by(too_new), hardware=too_new)
    assert made.sentences[0] == f"let uv fetch Python 3.13 to {home() / 'pythons'}"
    assert (tmp_path / "told").read_text() == f"python install --install-dir {home() / 'pythons'} 3.13\n"
    assert environment.names() == [planned.name]
    journal.undo(journal.find(None))
    assert environment.names() == [] and not (home() / "pythons").exists()


def test_uv_brings_nothing(too_new, tmp_path, monkeypatch):
    monkeypatch.setattr(environment_build, "_interpreters", lambda: iter([]))
    uv = script(tmp_path, "uv", "echo error: no network; exit 2")
    monkeypatch.setattr("kleinctl.fixes.packages.shutil.which", lambda name: str(uv))
    found = failure(carried_out, found_by(too_new), None, too_new)
    assert (found.name, "error: no network" in found.why) == ("install-failed", True)
    assert journal.entries() == [] and not envs_folder().exists()


def test_a_python_is_asked_before_it_is_taken(tmp_path, monkeypatch):
    for name, text in (("python3.14", "exit 1"), ("python3.13", f'exec {sys.executable} "$@"')):
        script(tmp_path, name, text)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment_build.another_python()
    assert found is not None and found.version == "{}.{}.{}".format(*sys.version_info)
    assert environment.usable(found)


# A file that is here twice


@pytest.fixture
def twice(tmp_path: Path) -> Problem:
    """The same bytes in two folders, as doctor tells of them."""
    first, second = tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"
    for path in (first, second):
        path.parent.mkdir()
        path.write_bytes(b"weights" * 100_000)
    os.utime(second, ns=(10**18, 10**18))
    remedy = Remedy("share-file", {"path": str(second), "with": str(first)}, "ask")
    why = f"the same bytes are at {first} and at {second}, and neither is a link."
    return replace(problem("share-file"), name="downloaded-twice", path=str(second), why=why, remedy=remedy)


def paths(found: Problem) -> tuple[Path, Path]:
    assert found.remedy is not None
    return Path(found.remedy.arguments["path"]), Path(found.remedy.arguments["with"])


def test_one_of_two_copies_becomes_another_name_of_the_other(twice):
    path, other = paths(twice)
    made = carried_out(twice)
    assert path.samefile(other) and "which frees 700 kB" in made.sentences[1]
    entry = journal.find(None)
    assert entry.steps[0].back == f"make {path} a file of its own again"
    journal.undo(entry)
    assert not path.samefile(other) and path.read_bytes() == other.read_bytes()
    assert path.stat().st_mtime_ns == 10**18
    assert sorted(each.name for each in path.parent.iterdir()) == ["x.safetensors"]


def test_the_first_copy_was_deleted_since(twice):
    path, other = paths(twice)
    carried_out(twice)
    other.unlink()
    journal.undo(journal.find(None))
    assert path.read_bytes() == b"weights" * 100_000 and path.stat().st_mtime_ns == 10**18


def test_the_shared_file_was_replaced_since(twice):
    path, _ = paths(twice)
    carried_out(twice)
    path.unlink()
    path.write_bytes(b"another")
    assert failure(journal.undo, journal.find(None)).name == "undo-file-changed"
    assert path.read_bytes() == b"another"


def test_files_of_one_length_with_other_bytes_stay_two(twice):
    path, other = paths(twice)
    path.write_bytes(b"WEIGHTS" * 100_000)
    found = failure(carried_out, twice)
    assert "have different contents" in found.why and not path.samefile(other) and journal.entries() == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="wants a second disk")
def test_copies_on_two_disks_cannot_share(twice):
    other = Path("/dev/shm") / f"kleinctl-{os.getpid()}.safetensors"
    if disk(other) == disk(paths(twice)[0]):
        pytest.skip("/dev/shm is on the same disk")
    other.write_bytes(b"weights" * 100_000)
    try:
        remedy = Remedy("share-file", {"path": str(paths(twice)[0]), "with": str(other)}, "ask")
        assert "are on two disks" in refused(replace(twice, why=f"it is at {other}", remedy=remedy))
    finally:
        other.unlink()


# Variables


def about(name: str, value: str = "") -> Problem:
    """A problem of a variable."""
    found = replace(problem("set-variable"), remedy=machine_checks.variable(name, value))
    return replace(found, what=f"{name} is set", fix=f"unset {name}")


@pytest.fixture
def bash(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The start file of a user of bash."""
    monkeypatch.setenv("SHELL", "/bin/bash")
    return empty_home / ".bashrc"


def after_start(file: Path, name: str) -> str:
    """What a variable is in a shell that has read the file."""
    told = subprocess.run(
        ["bash", "-c", f'. "{file}" && printf %s "${{{name}-unset}}"'], capture_output=True, text=True, env={}
    )
    assert told.stderr == ""
    return told.stdout


START = """\
alias ll='ls -l'
if true; then
  export HF_HUB_ENABLE_HF_TRANSFER=1  # of a guide
fi
HF_HUB_ENABLE_HF_TRANSFER=1 true
"""


def test_a_variable_of_an_old_guide_is_taken_out_of_the_start_file(bash, monkeypatch):
    bash.write_text(START)
    monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", "1")
    assert after_start(bash, "HF_HUB_ENABLE_HF_TRANSFER") == "1"
    made = carried_out(about("HF_HUB_ENABLE_HF_TRANSFER"))
    assert made.sentences[:3] == (
        f"write {bash}:",
        "  -   export HF_HUB_ENABLE_HF_TRANSFER=1  # of a guide",
        "  +   : # export HF_HUB_ENABLE_HF_TRANSFER=1  # of a guide",
    )
    assert after_start(bash, "HF_HUB_ENABLE_HF_TRANSFER") == "unset"
    assert "HF_HUB_ENABLE_HF_TRANSFER" not in os.environ  # what looks again sees it gone
    journal.undo(journal.find(None))
    assert bash.read_text() == START


def test_a_certificate_is_named_to_all_programs(bash, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "")
    company = tmp_path / "our company's.pem"
    company.write_text("")
    bash.write_text("export SSL_CERT_FILE=/gone.pem")
    carried_out(about("SSL_CERT_FILE", str(company)))
    assert after_start(bash, "SSL_CERT_FILE") == str(company) == os.environ["SSL_CERT_FILE"]
    journal.undo(journal.find(None))
    assert bash.read_text() == "export SSL_CERT_FILE=/gone.pem"


def test_a_start_file_that_is_a_link_stays_one(bash, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/opt")
    (tmp_path / "bashrc").write_text("export PYTHONHOME=/opt\n")
    bash.symlink_to(tmp_path / "bashrc")
    monkeypatch.setattr(os, "environ", {**os.environ})
    carried_out(about("PYTHONHOME"))
    assert bash.is_symlink() and (tmp_path / "bashrc").read_text() == ": # export PYTHONHOME=/opt\n"


def test_a_variable_that_only_this_shell_has(bash):
    assert "it comes from this shell or from the system" in refused(about("HF_ENDPOINT"))
    bash.write_text("HF_ENDPOINT=x python app.py\nunset HF_ENDPOINT\n# HF_ENDPOINT=x\nexport A=$HF_ENDPOINT\n")
    assert "it comes from this shell or from the system" in refused(about("HF_ENDPOINT"))
    bash.write_text("env \\\n  HF_ENDPOINT=x\n")  # a command that goes on
    assert "it comes from this shell or from the system" in refused(about("HF_ENDPOINT"))


@pytest.mark.parametrize(
    "line",
    [
        "export HF_ENDPOINT=$(cat /etc/mirror)",
        "if true; then export HF_ENDPOINT=x; fi",
        "HF_ENDPOINT=x; export HF_ENDPOINT",
        "export A=1 HF_ENDPOINT=2",
        "declare -x HF_ENDPOINT=x",
        "[ -f /x ] && HF_ENDPOINT='a b'",
    ],
)
def test_a_line_that_does_more_than_set_the_variable(line, bash):
    text = f"export HF_ENDPOINT=1\n{line}\n"
    bash.write_text(text)
    assert f"line 2 of {bash} sets HF_ENDPOINT in a way that kleinctl cannot change" in refused(about("HF_ENDPOINT"))
    assert bash.read_text() == text


def test_start_files_that_are_links_to_one(bash):
    bash.write_text("export HF_ENDPOINT=x\n")
    for name in (".profile", ".bash_profile"):
        (bash.parent / name).symlink_to(bash.name)
    carried_out(about("HF_ENDPOINT"))
    assert after_start(bash, "HF_ENDPOINT") == "unset"
    journal.undo(journal.find(None))
    assert bash.read_text() == "export HF_ENDPOINT=x\n" and (bash.parent / ".profile").is_symlink()


def test_a_shell_with_start_files_of_another_language(bash, monkeypatch):
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert "does not know where fish sets variables" in refused(about("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))


def test_what_no_check_may_set(bash, tmp_path):
    assert "is no variable that kleinctl changes" in refused(about("LD_PRELOAD", "/tmp/evil.so"))
    for name, value in (
        ("PYTHONPATH", "/tmp"),
        ("SSL_CERT_FILE", str(tmp_path / "absent.pem")),
        ("HF_ENDPOINT", "https://evil.example"),
        ("HF_HUB_CACHE", "relative"),
        ("CUDA_VISIBLE_DEVICES", "$(reboot)"),
    ):
        assert f"is no value for {name}" in refused(about(name, value))
    unnamed = replace(about("HF_ENDPOINT"), what="something", fix="")
    assert "HF_ENDPOINT is not a variable that the problem names" in refused(unnamed)


class Registry:
    """`winreg` with the variables of one user."""

    HKEY_CURRENT_USER, KEY_READ, KEY_SET_VALUE, REG_SZ = 1, 2, 4, 1

    def __init__(self, **values: str) -> None:
        self.values = values

    def OpenKey(self, root: int, path: str, reserved: int, access: int) -> Any:
        assert (root, path) == (1, "Environment")
        return Key()

    def QueryValueEx(self, key: Any, name: str) -> tuple[str, int]:
        if name not in self.values:
            raise FileNotFoundError(name)
        return self.values[name], 1

    def SetValueEx(self, key: Any, name: str, reserved: int, kind: int, value: str) -> None:
        self.values[name] = value

    def DeleteValue(self, key: Any, name: str) -> None:
        del self.values[name]


class Key:
    def __enter__(self) -> Key:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_variable_of_a_windows_user(monkeypatch):
    registry = Registry(PYTHONPATH=r"C:\old")
    monkeypatch.setitem(sys.modules, "winreg", registry)
    monkeypatch.setattr(variables, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setenv("PYTHONPATH", r"C:\old")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    made = carried_out(about("PYTHONPATH"))
    assert made.sentences[0] == r"unset PYTHONPATH for this user; it is C:\old"
    assert made.commands == (r"reg delete HKCU\Environment /v PYTHONPATH /f",) and registry.values == {}
    journal.undo(journal.find(None))
    assert registry.values == {"PYTHONPATH": r"C:\old"} and windows.variable("PYTHONPATH") == r"C:\old"
    carried_out(about("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))
    assert registry.values["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" == os.environ["CUDA_DEVICE_ORDER"]
    registry.values["CUDA_DEVICE_ORDER"] = "FASTEST_FIRST"
    assert failure(journal.undo, journal.find(None)).name == "undo-file-changed"
    assert "but by this terminal or for the whole computer" in refused(about("HF_HUB_OFFLINE"))


# A repository that is not whole in the cache


class Known:
    """Plugins that know one model, whose files are on the hub double."""

    def __init__(self) -> None:
        self.models = {"klein-4b": klein()}

    def model(self, name: str) -> Any:
        return self.models[name]


@pytest.fixture
def snapshot(empty_home: Path) -> Path:
    """A snapshot without its transformer, whose VAE leads nowhere and whose index is a web page."""
    repo = empty_home / "cache" / "huggingface" / "hub" / f"models--{REPO.replace('/', '--')}"
    folder = repo / "snapshots" / "abc"
    (folder / "vae").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (folder / VAE).symlink_to("../../../blobs/gone")
    (folder / "model_index.json").write_text("<!DOCTYPE html><html>Sign in</html>")
    left = repo / "blobs" / f"{hashlib.sha256(FILES[TRANSFORMER]).hexdigest()}.1f2e.incomplete"
    left.write_bytes(FILES[TRANSFORMER][:2_000_000])
    os.utime(left, (1, 1))
    return folder


def incomplete(folder: Path) -> Problem:
    found = replace(problem("complete-snapshot"), name="cache-incomplete", path=str(folder))
    return replace(found, remedy=Remedy("complete-snapshot", {"path": str(folder)}, "ask"))


def test_a_snapshot_in_the_cache_is_made_whole(snapshot, real_hub: Hub):  # noqa: F811
    found = incomplete(snapshot)
    made = carried_out(found, Known())
    for path, data in FILES.items():
        assert (path == "text_encoder/model.safetensors") or (snapshot / path).read_bytes() == data
    assert (snapshot / "text_encoder/model.safetensors").exists()
    assert made.fetch_bytes < 2_000_000 + 1_500_000 + 1_000_000 + 1000
    [resumed] = [seen for seen in real_hub.gets("cdn") if "transformer" in seen.path]
    assert resumed.headers["range"] == "bytes=2000000-"
    assert not list((snapshot.parent.parent / "blobs").glob("*.incomplete")) and list(quarantine_folder().iterdir())
    journal.undo(journal.find(None))
    assert not (snapshot / TRANSFORMER).exists() and (snapshot / VAE).is_symlink() and not (snapshot / VAE).exists()
    assert (snapshot / "model_index.json").read_text().startswith("<!DOCTYPE")
    assert len(list((snapshot.parent.parent / "blobs").glob("*.incomplete"))) == 1


def test_another_program_fetches_it_right_now(snapshot):
    [left] = (snapshot.parent.parent / "blobs").iterdir()
    os.utime(left, (time.time(), time.time()))
    assert "seems to be fetching it right now" in refused(incomplete(snapshot), Known())


def test_a_snapshot_of_another_revision_is_left_to_its_own_tools(snapshot):
    other = snapshot.rename(snapshot.with_name("def"))
    assert "of another revision" in refused(incomplete(other), Known())
    assert "is no snapshot of a model" in refused(incomplete(other.with_name("ghi")), Known())


def test_the_open_model_in_place_of_a_gated_one(real_hub: Hub):  # noqa: F811
    log = "Access to model black-forest-labs/FLUX.2-klein-9B is restricted and you are not in the authorized list"
    [match] = explain(log)
    assert match.problem.name == "gated-repo" and "kleinctl install --model klein-4b" in match.problem.fix
    carried_out(match.problem, Known())
    folder = home() / "models" / "klein-4b" / "diffusers"
    assert (folder / VAE).read_bytes() == FILES[VAE]
    journal.undo(journal.find(None))
    assert not folder.exists()
    other = "Access to model someone/private is restricted and you are not in the authorized list"
    assert explain(other)[0].problem.remedy is None


# Certificates


def openssl(*words: str, folder: Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a company's certificate, `ca.pem`, and a server's that it signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("authority")
    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=Company", "-keyout", "ca.key", "-out", "ca.pem", folder=folder)
    openssl(*new, "-subj", "/CN=hub", "-keyout", "server.key", "-out", "server.csr", folder=folder)
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    sign = ("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl(*sign, "-extfile", "names", "-out", "server.pem", folder=folder)
    return folder


@pytest.fixture
def behind_a_proxy(authority: Path, real_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    """The hub, as a company's proxy signs it. The company's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    server = real_hub._servers["hub"]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("HF_ENDPOINT", real_hub.url.replace("http:", "https:"))
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", *hub.OLDER):
        monkeypatch.delenv(name, raising=False)
    yield authority / "ca.pem"
    hub._trusting.cache_clear()


INDEX = "model_index.json"


def fetched() -> bytes:
    return fetch(part_of(INDEX, FILES[INDEX]), print, patience=QUICK)[0].read_bytes()


def test_a_proxy_whose_certificate_only_an_older_variable_names(behind_a_proxy, monkeypatch):
    assert failure(fetched).name == "tls-not-trusted"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(behind_a_proxy))
    assert fetched() == FILES[INDEX]


def test_a_proxy_whose_certificate_the_configuration_names(behind_a_proxy):
    remedy = Remedy("set-config", {"table": "hub", "key": "certificates", "value": str(behind_a_proxy)}, "ask")
    made = carried_out(replace(problem("set-config"), name="tls-not-trusted", remedy=remedy))
    assert made.commands == ()  # no command has this setting
    assert fetched() == FILES[INDEX]
    assert environment_build.trusting() == {"PIP_CERT": str(behind_a_proxy)}
    journal.undo(journal.find(None))
    downloads = list(downloads_folder().iterdir())
    for path in downloads:
        path.unlink()
    assert failure(fetched).name == "tls-not-trusted"


def test_a_log_of_a_proxy_and_what_the_system_trusts(behind_a_proxy):
    [match] = explain("ssl.SSLError: [SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate")
    carried_out(match.problem)
    assert config_file().read_text() == '[hub]\ncertificates = "system"\n'
    assert hub.certificates() == (f"certificates in {config_file()}", "")
    assert failure(fetched).name == "tls-not-trusted"  # nobody told the system of this one: it is still refused


def test_a_file_of_certificates_that_is_none(behind_a_proxy, tmp_path, monkeypatch):
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "absent.pem", tmp_path / "empty.pem"):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
        found = failure(fetched)
        assert (found.name, found.what) == ("tls-not-trusted", f"{path} cannot be used")
        assert "REQUESTS_CA_BUNDLE names it" in found.why and found.fix == "correct REQUESTS_CA_BUNDLE, or unset it"


def test_a_connection_that_fails_leaves_no_empty_file(real_hub: Hub, monkeypatch):  # noqa: F811
    part = part_of(VAE, FILES[VAE])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert failure(lambda: fetch(part, print, patience=QUICK)).name == "hub-unreachable"
    assert list(downloads_folder().iterdir()) == []
    partial_file(part).write_bytes(FILES[VAE][:1000])
    assert failure(lambda: fetch(part, print, patience=QUICK)).name == "hub-unreachable"
    assert partial_file(part).stat().st_size == 1000  # what has arrived is kept


# What a log shows


def told(log: str, hardware: Hardware | None = None, **set_here: str) -> Problem:
    facts = Facts(hardware or Hardware(), System(home="/k", variables=set_here))
    return explain(log, facts=facts)[0].problem


def test_the_card_was_full_and_what_asks_for_least_becomes_the_default():
    out = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
    found = told(out)
    assert found.name == "card-memory-full"
    carried_out(found)
    assert config_file().read_text() == '[run]\nbackend = "staged-decode"\n'
    assert told(f"got prompt\nRequested to load Flux2\n{out}").remedy is None  # ComfyUI's own


def test_logs_whose_cause_is_set_on_this_machine():
    offline = "Cannot find the requested files in the disk cache and outgoing traffic has been disabled."
    assert told(offline).remedy is None
    assert told(offline, HF_HUB_OFFLINE="1").remedy == machine_checks.variable("HF_HUB_OFFLINE")
    leftover = "ValueError: Fast download using 'hf_transfer' is enabled (HF_HUB_ENABLE_HF_TRANSFER=1)"
    assert told(leftover, HF_HUB_ENABLE_HF_TRANSFER="1").remedy.arguments["name"] == "HF_HUB_ENABLE_HF_TRANSFER"
    loading = 'OSError: [WinError 126] Error loading "torch\\lib\\fbgemm.dll" or one of its dependencies'
    assert told(loading).remedy is None
    assert told(loading, machine(platform="win32")).remedy == Remedy("install-vc-runtime", {}, "ask")
    no_torch = "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)"
    assert told(no_torch, machine()).remedy is None
    assert told(no_torch, machine(python=Python("3.15.0", "/p"))).remedy == Remedy("build-environment", {}, "ask")


def test_weights_that_make_pictures_black_are_replaced_when_they_are_hashed():
    made = plan_files(Plugins().models["klein-tiny"], "diffusers")
    install_files(made)
    path = made.folder / "vae/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit, of the last weight

    def look() -> list[Problem]:
        scenes = [{"found_file": each} for each in weights.gather(Plugins(), deep=True)]
        return [each for result in run_checks(own_checks(), {}, scenes) for each in result.problems]

    found = look()
    assert [each.name for each in found] == ["wrong-content"]
    outcomes, left = fixes.fix(
        found, Plugins(), NOTHING, ask=lambda plan: "", again=lambda: set(map(fixes.key, look()))
    )
    assert [each.status for each in outcomes] == ["fixed"] and left == []
    assert path.read_bytes() == whole


# What checks ask for is what a fix takes


def gpu(name: str, gib: int, **more: Any) -> Gpu:
    return Gpu(name, "8.9", gib * 2**30, gib * 2**30, driver="580.65.06", **more)


SMALL, LARGE = gpu("RTX 3050", 8), gpu("RTX 4090", 24)
UUID = "MIG-0a1b2c3d-1111-2222-3333-444455556666"
SLICED = gpu("H100", 80, mig=Mig(True, (MigInstance(UUID, 2**34, 2**34),)))
KLEIN = Plugins(frozenset()).models["klein-4b"]
NO_LINKS = System(home="/data/kleinctl", symlinks=False)


def set_here(**values: str) -> System:
    return System(home="/data/kleinctl", variables=values)


def asking(check: Any, **facts: Any) -> Problem:
    """The problem of a check, for which these facts are enough."""
    verdict = check.function(**{"hardware": machine(LARGE), **facts} if "hardware" in check.wants else facts)
    return replace(verdict, name=verdict.name or check.name)


@pytest.mark.parametrize(
    ("found", "name", "value"),
    [
        (
            asking(
                machine_checks.card_hidden,
                hardware=machine(SMALL, replace(LARGE, hidden=True)),
                system=set_here(CUDA_VISIBLE_DEVICES="1"),
            ),
            "CUDA_VISIBLE_DEVICES",
            "",
        ),
        (
            asking(
                machine_checks.several_cards,
                hardware=machine(LARGE, SMALL),
                system=set_here(CUDA_VISIBLE_DEVICES="0,1"),
            ),
            "CUDA_DEVICE_ORDER",
            "PCI_BUS_ID",
        ),
        (
            asking(machine_checks.mig_slice, hardware=machine(SLICED), system=set_here(CUDA_VISIBLE_DEVICES="0")),
            "CUDA_VISIBLE_DEVICES",
            UUID,
        ),
        (
            asking(
                machine_checks.cuda_malloc,
                hardware=machine(gpu("GTX 1650", 4)),
                system=set_here(PYTORCH_ALLOC_CONF="backend:cudaMallocAsync"),
            ),
            "PYTORCH_ALLOC_CONF",
            "",
        ),
        (asking(environment_checks.python_home, system=set_here(PYTHONHOME="/opt")), "PYTHONHOME", ""),
        (asking(downloads.endpoint_malformed, system=set_here(HF_ENDPOINT="mirror")), "HF_ENDPOINT", ""),
        (
            asking(downloads.offline, model=KLEIN, system=set_here(HF_HUB_OFFLINE="1"), files=()),
            "HF_HUB_OFFLINE",
            "",
        ),
        (asking(downloads.symlinks_not_allowed, system=NO_LINKS), "HF_HUB_DISABLE_SYMLINKS", "1"),
        (
            asking(downloads.certificates_known, system=set_here(CURL_CA_BUNDLE=__file__)),
            "SSL_CERT_FILE",
            __file__,
        ),
        (
            asking(
                downloads.cache_on_other_disk,
                hub_cache=HubCache(
                    "/home/a/.cache/huggingface/hub", None, False, (CachedRepo("a/b", "abc", "/p", ""),)
                ),
                system=set_here(),
            ),
            "HF_HUB_CACHE",
            "/data/huggingface/hub",
        ),
    ],
    ids=lambda each: each.name if isinstance(each, Problem) else None,
)
def test_the_variable_that_a_check_speaks_of_is_changed(found, name, value, bash, monkeypatch):
    monkeypatch.setenv(name, "old")
    bash.write_text(f"export {name}='old'\n")
    carried_out(found)
    assert after_start(bash, name) == (value or "unset")
    assert os.environ.get(name, "") == value
