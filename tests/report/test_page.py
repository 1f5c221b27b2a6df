"""The pages that doctor and triage write for people, looked at in a real browser where there is one."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from kleinctl.facts import Facts, weights
from kleinctl.hardware import Hardware
from kleinctl.plugins import Plugins
from kleinctl.problem import KleinctlError
from kleinctl.report import bundle, page, triage
from kleinctl.survey import judge
from tests import weights as files
from tests.conftest import REPOSITORY
from tests.report import machines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def document(empty_home: Path) -> dict:
    """What doctor says of a 16 GB card with FLUX.1's VAE in the place of FLUX.2's."""
    folder = empty_home / "kleinctl" / "models" / "klein-4b" / "diffusers"
    files.write(folder / "transformer/diffusion_pytorch_model.safetensors", files.flux2_diffusers(**files.KLEIN_4B))
    files.write(folder / "vae/diffusion_pytorch_model.safetensors", files.vae_diffusers(channels=16, statistics=False))
    recorded = json.loads((REPOSITORY / "tests/fixtures/hardware/rtx-4070-ti-super.json").read_text())
    facts = Facts(Hardware.from_json(recorded["hardware"]), files=weights.gather(Plugins()))
    return judge(Plugins(), facts).to_json()


@pytest.fixture
def many() -> dict:
    """What triage says of machines that are well, that are not, and of a file that is no report."""
    recorded = [machines.hardware(name) for name in ("rtx-4070-ti-super", "gtx-1080-ti")]
    found = [
        triage.judged(Plugins(), bundle.Report(Path(f"{'a-long-name-' * 9}{n}.zip"), Facts(machine)))
        for n, machine in enumerate(recorded)
    ]
    with pytest.raises(KleinctlError) as odd:
        bundle.read(Path(__file__))
    return triage.document(found, [odd.value.problem])


@pytest.fixture(params=["doctor", "triage"])
def text(request) -> str:
    """Each page."""
    if request.param == "doctor":
        return page.doctor(request.getfixturevalue("document"))
    return page.triage(request.getfixturevalue("many"))


def browse(folder: Path, text: str, *options: str) -> str:
    """The page's document after its script has run, and what the browser complained of."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            *(options or ("--dump-dom",)),
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def test_the_page_says_what_the_terminal_says(document):
    text = page.doctor(document)
    wrong = next(problem for problem in document["problems"] if problem["name"] == "wrong-vae")
    for words in (wrong["what"], wrong["why"], wrong["fix"], "RTX 4070 Ti SUPER", document["choice"]["why"]):
        assert escape(words) in text


def test_the_page_needs_nothing_from_anywhere(text):
    assert re.findall(r"(?:src|href)=|url\(|@import", text) == []
    assert "default-src 'none'" in text


def test_the_memory_picture_has_a_bar_for_what_each_backend_takes(document):
    text = page.doctor(document)
    fit = document["choice"]["fit"]
    free = document["hardware"]["gpus"][0]["vram_free_bytes"]
    share = 100 * fit["vram_bytes"] / max(free, *(each["fit"]["vram_bytes"] for each in document["alternatives"]))
    assert f'width="{share:.2f}"' in text
    assert f"{fit['vram_bytes'] / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free" in text


def test_a_card_whose_driver_is_not_known(document):
    for gpu in document["hardware"]["gpus"]:
        gpu["driver"] = None
    assert "driver unknown" in page.doctor(document, ()) and "None" not in page.doctor(document, ())


def test_a_file_name_that_is_html_stays_text(document):
    document["problems"][0]["what"] = "<script>alert(1)</script>"
    text = page.doctor(document)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_page_stays_as_it_was_where_the_disk_is_full(text, tmp_path, monkeypatch):
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(path)
    page.write(link, text, "kleinctl doctor --html PAGE.html")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == text

    def full(self: Path, said: str, **options: str) -> None:
        self.write_bytes(said[:100].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KleinctlError, match="cannot be written"):
        page.write(path, f"{text} ", "kleinctl doctor --html PAGE.html")
    assert path.read_text(encoding="utf-8") == text
    assert sorted(tmp_path.iterdir()) == [link, path]


@needs_browser
@pytest.mark.browser
def test_a_browser_shows_it_and_every_fix_has_a_button(text, tmp_path):
    seen = browse(tmp_path, text)
    assert seen.count('<button type="button">Copy</button>') == seen.count('<pre class="copy">') > 0


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1000])
def test_nothing_runs_out_of_a_phone_screen(text, tmp_path, width):
    inner = escape(text, quote=True)
    frame = f'<iframe id=f width={width} height=2000 srcdoc="{inner}"></iframe>'
    script = "onload = () => { const d = f.contentDocument.documentElement; document.title = d.scrollWidth; }"
    seen = browse(tmp_path, f"<!doctype html><title>?</title>{frame}<script>{script}</script>")
    assert int(re.search(r"<title>(\d+)</title>", seen)[1]) <= width


@needs_browser
@pytest.mark.browser
def test_light_and_dark_are_pictures_of_their_own(text, tmp_path):
    from PIL import Image, ImageStat

    def brightness(*options: str) -> float:
        shot = tmp_path / "shot.png"
        browse(tmp_path, text, f"--screenshot={shot}", "--window-size=800,1200", *options)
        picture = Image.open(shot).convert("L")
        assert picture.getextrema()[1] - picture.getextrema()[0] > 100  # something is drawn
        return ImageStat.Stat(picture).mean[0]

    assert brightness() > 180
    assert brightness("--blink-settings=preferredColorScheme=0") < 80


@needs_browser
@pytest.mark.browser
def test_it_prints(text, tmp_path):
    printed = tmp_path / "page.pdf"
    browse(tmp_path, text, f"--print-to-pdf={printed}")
    assert printed.read_bytes().startswith(b"%PDF")
