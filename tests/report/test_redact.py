"""What tells who somebody is never leaves the machine, and what support needs does."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleinctl.hardware import facts as hardware_facts
from kleinctl.hardware import rates
from kleinctl.log_patterns import PATTERNS
from kleinctl.logs import explain
from kleinctl.problem import KleinctlError
from kleinctl.report import redact
from kleinctl.report.collect import Log
from kleinctl.report.owner import Owner, owner, telling
from kleinctl.report.redact import HARDWARE, LEFT_OUT, Redactor, brief, pattern, spellings
from tests.report import machines
from tests.report.machines import OWNER, TOKEN, UUID, owned, redactor, report


def members(data: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (r"File 'C:\Users\grete\ComfyUI\nodes.py', line 3", r"File '~\ComfyUI\nodes.py', line 3"),
        (r'"C:\\Users\\grete\\ComfyUI"', r'"~\\ComfyUI"'),
        ("c:/users/GRETE/x.log is there", "~/FILE_1.log is there"),
        ("/mnt/c/Users/otto/ComfyUI/models/vae", "/mnt/c/Users/USER_1/ComfyUI/models/vae"),
        ("Hermann, Grete", "USER_1, USER_2"),
        ("grete@gretes-pc:~$ ls", "USER_1@HOST_1:~$ ls"),
        ("mail grete.h@example.org", "mail EMAIL_1"),
        (f"token={TOKEN}", "token=TOKEN_"),
        ("Authorization: Bearer abcdef1234567890", "Authorization: Bearer TOKEN_"),
        ("password: 'pa55-word!'", "password: 'TOKEN_"),
        ("listening on 192.168.178.23:8188", "listening on ADDRESS_1:8188"),
        ("http://127.0.0.1:8188/prompt", "http://127.0.0.1:8188/prompt"),
        ("https://huggingface.co/black-forest-labs/FLUX.2-klein-4B", "https://huggingface.co/black-forest-labs/FLUX.2-"),
        ("https://me:pw12345@git.acme.com/x/y?key=1", "https://TOKEN_"),
        ("GET https://cdn.acme.com/a?Signature=abc", "GET https://HOST_1/…?…"),
        ("cached nvidia_cublas_cu12-12.8.4.1-py3-none.whl, numpy==1.2.3.4", "12.8.4.1-py3-none.whl, numpy==1.2.3.4"),
        (f"nvidia-smi -L: {UUID}", "nvidia-smi -L: ID_1"),
        ("HW F4:4D:30:AA:BB:CC", "HW ADDRESS_1"),
        ("loading 'my secret face.safetensors'", "loading 'FILE 1.safetensors'"),
        ("loading /data/ComfyUI/models/vae/flux2-vae.safetensors", "/data/ComfyUI/models/vae/flux2-vae.safetensors"),
        ("custom_nodes/ComfyUI-GGUF/nodes.py", "custom_nodes/ComfyUI-GGUF/nodes.py"),
        ('{"prompt": "a cat", "seed": 1}', '{"prompt": "PROMPT (5 characters)", "seed": 1}'),
        ("'text': 'it\\'s me'", "'text': 'PROMPT (8 characters)'"),
        ('kleinctl run -o x "my boss"', 'kleinctl run -o x "PROMPT (7 characters)"'),
        ("input was truncated because CLIP can only handle sequences up to 77 tokens: ['nude']", "77 tokens: PROMPT"),
        ("Prompt executed in 12.30 seconds", "Prompt executed in 12.30 seconds"),
        (r"loading C:\Users\Max Meyer\ComfyUI\x.txt now", r"loading C:\Users\USER 1\ComfyUI\FILE_1.txt now"),
        ("/mnt/c/Users/Ana de la Cruz/ComfyUI/main.py", "/mnt/c/Users/USER 1/ComfyUI/main.py"),
        ("copied /Users/anna to /Volumes/x", "copied /Users/USER_1 to /Volumes/FOLDER_1"),
        (r'{\"text\": \"my boss\", \"seed\": 1}', r'{\"text\": PROMPT (9 characters)\", \"seed\": 1}'),
        ("prompt=['one cat', 'my boss'], seed=1", "prompt=PROMPT (22 characters), seed=1"),
        ('"widgets_values": ["my boss", "fixed"]', '"widgets_values": PROMPT (20 characters)'),
        ("python make.py -p 'my boss' --seed 1", "python make.py -p 'PROMPT (7 characters)' --seed 1"),
        ("docker run -p 8188:8188", "docker run -p 8188:8188"),
        ("{'Authorization': 'Bearer opaque-1234567890'}", "{'Authorization': 'Bearer TOKEN_"),
        (r'{\"authorization\": \"Bearer opaque-1234567890\"}', r'{\"authorization\": \"Bearer TOKEN_'),
        ("Authorization: token opaque-1234567890", "Authorization: token TOKEN_"),
        ('"accessToken": "opaque-1234567890"', '"accessToken": "TOKEN_'),
        ("Set-Cookie: session=opaque-1234567890; Path=/", "Set-Cookie: TOKEN_"),
        ("GET /x?X-Amz-Signature=opaque1234567890&y=1 HTTP/1.1", "/x?X-Amz-Signature=TOKEN_"),
        ("using proxy me:opaque12@proxy:8080", "using proxy TOKEN_"),
        ("login --hf-token abcdef123456", "login --hf-token TOKEN_"),
        ("--max-tokens 1000000", "--max-tokens 1000000"),
        ("std::bad_alloc at 12:30:45, 100%|██| 4/4 [00:12<00:00]", "bad_alloc at 12:30:45, 100%|██| 4/4 [00:12<00:00]"),
    ],
)  # fmt: skip
def test_a_line_of_a_log(said, kept):
    told = redactor().text(said)
    assert kept in told
    assert "opaque" not in told


def test_the_same_thing_has_the_same_token_and_no_token_twice():
    hide = redactor()
    assert hide.text(f"{TOKEN} Hermann") == hide.text(f"{TOKEN} HERMANN")
    assert hide.text("x@example.org y@example.org x@example.org") == "EMAIL_1 EMAIL_2 EMAIL_1"
    assert hide.text(hide.text(f"grete /data/mine/a.png {TOKEN}")) == hide.text(f"grete /data/mine/a.png {TOKEN}")


def test_a_token_tells_nothing_without_the_salt():
    assert Redactor(OWNER).credential(TOKEN) != Redactor(OWNER).credential(TOKEN)


def test_a_user_called_al_is_not_found_in_half_the_words():
    assert redactor(Owner(user=("al",))).text("all alarms, al!") == "all alarms, USER_1!"


def test_names_that_tell_nothing_stay_but_their_home_is_hidden():
    assert not any(telling(name) for name in ("root", "user", "ai", "1000", "x", "ubuntu", "hardware", "driver"))
    assert redactor(Owner(home=("/root",))).text("root has /root/x.png") == "root has ~/FILE_1.png"


def test_a_home_with_a_space_and_an_umlaut_keeps_both_troubles():
    hide = redactor(Owner(user=("Jörg Müller",), home=("C:\\Users\\Jörg Müller",)))
    assert hide.path("C:\\Users\\Jörg Müller\\ComfyUI") == "C:\\Users\\USER 1_é\\ComfyUI"
    assert hide.text("C:\\Users\\J\\u00f6rg M\\u00fcller\\mine\\a") == "C:\\Users\\USER 1_é\\FOLDER_1\\FOLDER_2"


def test_hardware_goes_by_an_allow_list_and_every_field_has_been_decided_on():
    """A new fact about hardware is in no report before it stands in `HARDWARE` or `LEFT_OUT`."""
    for kind, names in HARDWARE.items():
        declared = {each.name for each in fields(getattr(rates if kind == "Speed" else hardware_facts, kind))}
        assert declared - set(names.split()) == set(LEFT_OUT.get(kind, "").split()), kind


def test_facts_of_a_machine_keep_what_checks_need():
    kept = redactor().facts(owned())
    assert kept.hardware.gpus[0].uuid is None
    assert kept.hardware.gpus[0].driver == machines.hardware().gpus[0].driver
    assert kept.hardware.gpus[0].processes[0].name == "PROGRAM_1"
    assert kept.system.home == "~/.local/share/kleinctl"
    assert kept.system.variables["HTTPS_PROXY"].startswith("http://TOKEN_")
    assert kept.environments[0].packages["nvidia-cublas"] == "12.8.4.1"
    assert [file.path.as_posix() for file in kept.files] == [
        "~/ComfyUI/models/vae/flux2-vae.safetensors",
        "~/ComfyUI/models/loras/FILE 1.safetensors",
    ]
    assert kept.workflow.nodes[0].values == {"text": "PROMPT (17 characters)"}
    assert kept.comfyuis[0].custom_nodes[0].name == "ComfyUI-GGUF"


def test_prompts_stay_where_the_user_wants_them_to():
    kept = redactor(keep_prompts=True).facts(owned(user="otto"))
    assert kept.workflow.nodes[0].values == {"text": "portrait of otto"}


def test_a_windows_path_read_on_linux_has_its_name():
    kept = redactor().facts(owned(home="C:\\Users\\grete"))
    assert kept.files[0].path.name == "flux2-vae.safetensors"


def test_redaction_keeps_what_a_log_proves():
    log = """Traceback (most recent call last):
  File "C:\\Users\\grete\\ComfyUI\\nodes.py", line 1, in <module>
RuntimeError: mat1 and mat2 shapes cannot be multiplied (512x12288 and 7680x3072)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
Value not in list: vae_name: 'grete secret.safetensors' not in ['ae.safetensors']
OSError: [Errno 28] No space left on device: '/home/grete/x'
"""
    names = [match.problem.name for match in explain(log, PATTERNS)]
    hidden = redactor().text(log)
    assert "grete" not in hidden
    assert [match.problem.name for match in explain(hidden, PATTERNS)] == names != []


# Fails closed.


@pytest.mark.parametrize(
    "left", [TOKEN, "GRETE", "gretes-pc", "C:\\\\Users\\\\grete", UUID, "192.168.178.23", "a@example.org"]
)
def test_a_report_with_something_left_in_it_is_not_written(left):
    from kleinctl.report import bundle

    with pytest.raises(KleinctlError) as caught:
        bundle.checked(bundle.pack({"report.json": f'{{"a": "x {left} y"}}'.encode()}), redactor())
    problem = caught.value.problem
    assert problem.name == "report-not-safe"
    assert "in report.json" in problem.why
    assert left.casefold() not in (problem.what + problem.why + problem.fix).casefold()


def test_a_rule_that_forgets_the_user_stops_the_report(monkeypatch):
    monkeypatch.setattr(Redactor, "people", lambda self, text: text)
    with pytest.raises(KleinctlError) as caught:
        report(owned(said="grete"))
    assert "a user in report.json" in caught.value.problem.why


NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCÄÖÜäöüßéñ张ø_-. 0123456789'", min_size=2, max_size=24).map(str.strip)
TOKENS = st.text("abcdefABCDEF0123456789_-", min_size=8, max_size=40)


@settings(max_examples=60, deadline=None)
@given(user=NAMES.filter(telling), token=TOKENS, host=NAMES.filter(telling))
def test_no_name_home_host_or_token_is_ever_in_a_report(user, token, host):
    home = f"/home/{user.replace('.', 'x')}"
    mine = owner_of(user, host, home, token)
    said = f"{user} on {host}: {home}/a, {json.dumps(home)}, {token}; C:\\Users\\{user}\\x and file://{home}/b.png"
    hide = Redactor(mine)
    log = Log(f"worker-{user}.log", "worker", f"{said}\nhf: {token}\n({home}) '{home}/models/x.safetensors' <{user}>")
    try:
        found = members(report(owned(home, user, token, said), (log,), hide, note=said, case=host))
    except KleinctlError as error:
        assert error.problem.name == "report-not-safe"  # refusing is safe too
        return
    searched = {kind: pattern(kind, values) for kind, values in vars(mine).items()}
    for name, text in found.items():
        for spelling in spellings(f"{name}\n{text}"):
            assert not [kind for kind, expression in searched.items() if expression.search(spelling)]
            assert token not in spelling
            assert home not in spelling


@settings(max_examples=60, deadline=None)
@given(
    user=st.sampled_from(
        ["anna", "jsmith", "Jörg Müller", "will", "o'neil", "max.k", "李雷", "torvalds", "page2", "bo"]
    )
)
def test_ordinary_people_get_their_report(user):
    mine = owner_of(user, f"{user}-PC".replace(" ", "-"), f"/home/{user}", TOKEN)
    log = Log("worker-1.log", "worker", f"{user} at /home/{user}/x\nC:\\Users\\{user}\\y '{user}'")
    assert report(owned(f"/home/{user}", user, TOKEN, f"hello {user}"), (log,), Redactor(mine))


def owner_of(user: str, host: str, home: str, token: str) -> Owner:
    return Owner((user,), (host,), (home,), (token,), ("1f2e3d4c-aaaa-bbbb-cccc-0123456789ab",))


# This machine.


def test_whose_machine_this_is(tmp_path, monkeypatch):
    home = tmp_path / "home" / "greta"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("hf_stored0123456789\n")
    (home / ".cache" / "huggingface" / "stored_tokens").write_text("[work]\nhf_token = hf_second0123456789\n")
    (home / ".git-credentials").write_text("https://greta:ghp_0123456789abcdef@github.com\n")
    (home / ".gitconfig").write_text("[user]\n\tname = Greta Garbo\n\temail = greta@example.org\n")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc" / "hostname").write_text("divine\n")
    monkeypatch.setenv("HOME", str(home))
    found = owner(["abc-123-def"], {"HOME": str(home), "HF_TOKEN": "secret-of-mine", "USER": "greta"}, root)
    assert {"greta", "Greta Garbo", "greta@example.org"} <= set(found.user)
    assert "divine" in found.host
    assert str(home) in found.home
    assert {"secret-of-mine", "hf_stored0123456789", "hf_second0123456789", "ghp_0123456789abcdef"} <= set(found.token)
    assert {"abc-123-def", "0123456789abcdef0123456789abcdef"} <= set(found.serial)


def test_a_crash_log_is_redacted_quickly(monkeypatch):
    monkeypatch.setenv("HOME", "/home/otto")
    assert brief(f"at {Path('/home/otto/x.py')}: {TOKEN}").startswith("at ~/x.py: TOKEN_")


def test_no_rule_takes_long_on_a_line_that_nearly_matches():
    import time

    start = time.perf_counter()
    for near in (
        "a/",
        '"prompt": "',
        "x@",
        "%2F",
        "1.1.",
        "aa:",
        "a.txt",
        "://",
        "/home/",
        "C:\\",
        "a.a",
        "prompt=['",
        "token=",
        "a:a",
        "cookie",
        "?sig=",
    ):
        line = (near * 2000)[:2000]  # `logs.readable` cuts lines there
        redact.Redactor(OWNER).text("\n".join([line] * 10))
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_a_row_of_slashes_as_long_as_the_end_of_a_log_does_not_hold_a_report_up(slash):
    import time

    start = time.perf_counter()
    assert "grete" not in redactor().text(slash * 2**16 + f" /home/grete/x and {slash * 9}home/grete/y")
    assert time.perf_counter() - start < 8


def test_every_word_of_a_persons_name_is_hidden(tmp_path):
    """A login with a space in it, as Windows makes them."""
    known = owner(environ={"USERNAME": "Jörg Müller", "USERPROFILE": str(tmp_path)}, root=tmp_path)
    text = Redactor(known).text("Müller asked; j%C3%B6rg answered on E:/Fotos Müller")
    assert not {"Müller", "Jörg"} & set(spellings(text)[-1].replace("/", " ").split())
    assert "rg" not in text


def test_a_file_with_a_space_keeps_its_extension_wherever_it_is_told():
    hide = redactor()
    told = [hide.text(f'loading "/data/my face.{end}"') for end in ("safetensors", "safetensors")]
    assert told == ['loading "/data/FILE 1.safetensors"'] * 2
