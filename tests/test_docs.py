"""Documentation that has fallen behind the program."""

from __future__ import annotations

import re
import subprocess
import sys

from kleinctl import problem
from tests.conftest import REPOSITORY


def test_generated_parts_of_the_documents_are_fresh():
    done = subprocess.run([sys.executable, "tools/refresh_docs.py", "--check"], cwd=REPOSITORY)
    assert done.returncode == 0, "run: python tools/refresh_docs.py"


def test_exit_codes_in_the_readme_are_the_programs():
    readme = (REPOSITORY / "README.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)}
    assert listed == {problem.OK, problem.PROBLEMS, problem.MISUSED, problem.BUG, problem.INTERRUPTED}


def test_the_example_plugin_in_the_docs_is_the_one_that_is_tested():
    source = (REPOSITORY / "docs" / "example-plugin" / "kleinctl_resident.py").read_text()
    assert source in (REPOSITORY / "docs" / "plugins.md").read_text()
    assert len(source.splitlines()) < 60


def test_every_dependency_has_its_reason():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    told = (REPOSITORY / "docs" / "architecture.md").read_text()
    wanted = project["dependencies"] + project["optional-dependencies"]["runtime"]
    names = [re.match(r"[a-z0-9-]+", line)[0] for line in wanted]
    assert [name for name in names if f"**{name}**" not in told] == []


def test_every_module_of_the_house_is_in_the_architecture():
    told = (REPOSITORY / "docs" / "architecture.md").read_text()
    modules = [path.stem for path in (REPOSITORY / "kleinctl").iterdir() if path.suffix == ".py" or path.is_dir()]
    assert [name for name in modules if name not in ("__main__", "__pycache__") and name not in told] == []


def test_links_between_documents_lead_somewhere():
    for document in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
