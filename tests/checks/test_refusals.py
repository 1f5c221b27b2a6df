"""What install, verify and the choice of a model say no to, by its lasting name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kleinctl import install
from kleinctl.cli.options import with_variant
from kleinctl.cli.up import no_models
from kleinctl.home import manifests_folder
from kleinctl.plugins import Plugins
from kleinctl.problem import Misuse
from kleinctl.verify import verify_parts
from tests.checks.looking import PLUGINS
from tests.conftest import REPOSITORY

TINY = PLUGINS.models["klein-tiny"]


def verified(path: Path) -> str:
    part = next(each for each in TINY.parts if each.role == "vae")
    [verdict] = verify_parts([(path, part)])
    assert verdict.problem
    return verdict.problem.name


def test_a_file_of_another_length(tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(b"short")
    assert verified(tmp_path / "vae.safetensors") == "part-wrong-size"


def test_a_file_of_the_right_length_with_other_bytes(tmp_path):
    size = next(each.size for each in TINY.parts if each.role == "vae")
    (tmp_path / "vae.safetensors").write_bytes(b"\0" * size)
    assert verified(tmp_path / "vae.safetensors") == "part-wrong-hash"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it(tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(b"\0" * next(each.size for each in TINY.parts if each.role == "vae"))
    path.chmod(0)
    assert verified(path) == "part-unreadable"


def test_a_part_that_the_user_has_to_bring():
    parts = tuple(replace(part, sources=()) if part.role == "vae" else part for part in TINY.parts)
    plan = install.plan_files(replace(TINY, name="mine", parts=parts), "diffusers")
    assert "part-without-source" in [problem.name for problem in plan.problems]


def test_a_variant_that_nobody_made():
    with pytest.raises(Misuse) as error:
        with_variant(PLUGINS, TINY, "base")
    assert error.value.problem.name == "no-variant"


def test_a_second_manifest_of_the_same_name():
    manifests_folder().mkdir(parents=True)
    (manifests_folder() / "mine.toml").write_bytes((REPOSITORY / "manifests/klein-4b.toml").read_bytes())
    plugins = Plugins(frozenset())
    assert "klein-4b" in plugins.models
    assert [problem.name for problem in plugins.problems] == ["model-name-taken"]


def test_an_installation_without_models():
    assert no_models().name == "no-models"


def test_a_proxy_that_wants_a_password():
    from kleinctl import hub

    assert hub._proxy("huggingface.co").name == "proxy-refused"


def test_a_run_before_any_install(kleinctl):
    answer = kleinctl("run", "a red circle", "--model", "klein-tiny")
    assert answer.exit_code == 1
    assert "error[model-not-installed]: klein-tiny is not installed" in answer.stderr + answer.stdout
