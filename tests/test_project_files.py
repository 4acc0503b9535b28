"""What surrounds the code: releases, citation, the public checks, templates."""

import re
import shutil
import subprocess
import tomllib

import pytest
import release_notes
import yaml
from helpers import ROOT

import models

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text())


def test_release_notes(refuses, capsys, tmp_path):
    tag = f"v{models.__version__}"
    assert release_notes.main([tag]) == 0
    text = capsys.readouterr().out
    assert "## " not in text and text.startswith("The first version.") and len(text.splitlines()) > 5
    assert "v9.9.9 is not the version" in refuses(release_notes, "v9.9.9")

    for name in ("CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("\n## ", "\n## 9.0.0 (2030-01-01)\nLater.\n\n## ", 1))
    assert release_notes.notes(tag, tmp_path) == text
    changes.write_text("# Changes\n")
    with pytest.raises(ValueError, match="no part about"):
        release_notes.notes(tag, tmp_path)
    citation = tmp_path / "CITATION.cff"
    citation.write_text(citation.read_text().replace("\nversion: ", "\nversion: 7"))
    with pytest.raises(ValueError, match="CITATION"):
        release_notes.notes(tag, tmp_path)


def test_citation():
    """The fields that version 1.2.0 of the format requires, and the same facts as elsewhere."""
    citation, project = load(ROOT / "CITATION.cff"), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"] and citation["title"]
    assert (citation["version"], citation["license"]) == (models.__version__, project["license"])
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {citation['version']} ({citation['date-released']})" in changes
    for reference in citation["references"]:
        assert reference["type"] and reference["title"] and reference["authors"]


def test_public_checks_run_what_is_run_here():
    jobs = load(ROOT / ".github/workflows/checks.yml")["jobs"]["test"]
    assert any(step.get("run", "").startswith("bash scripts/test.sh") for step in jobs["steps"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = {name.rsplit(" ", 1)[1] for name in project["classifiers"] if "Python :: 3." in name}
    assert set(jobs["strategy"]["matrix"]["python"]) == supported


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path):
    """A job may write no more than it says, takes actions of a fixed version, and runs files that are here."""
    workflow = load(path)
    # YAML 1.1 reads the word "on" as true
    assert workflow.keys() >= {"name", True, "permissions", "jobs"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))
            for script in re.findall(r"(?:bash|python) (scripts/\S+)", step.get("run", "")):
                assert (ROOT / script).is_file()
            subprocess.run(["bash", "-n", "-c", re.sub(r"\$\{\{.*?\}\}", "x", step.get("run", ""))], check=True)


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.name)
def test_issue_form(path):
    form = load(path)
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("value") or part["attributes"]["label"]
