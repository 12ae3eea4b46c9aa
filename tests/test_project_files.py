"""The files of an open project agree: one version, commands that exist, forms that GitHub understands."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import keras_sd

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml"))


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "schema, paths",
    [
        ("citation-file-format", [ROOT / "CITATION.cff"]),
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_follow_their_published_schemas(schema, paths):
    assert paths
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?([\d.]+)", changelog, re.MULTILINE)[1]
    assert newest == keras_sd.__version__ == str(read_yaml("CITATION.cff")["version"])


def targets_of(text):
    return set(re.findall(r"\bmake ([a-z][a-z-]*)", text))


def test_workflows_run_what_continuous_integration_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    matrix = read_yaml(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]
    run_by_jobs = {*matrix["target"], *(job["target"] for job in matrix["include"])}
    for workflow in WORKFLOWS:
        for job in read_yaml(workflow)["jobs"].values():
            run_by_jobs |= targets_of("\n".join(step.get("run", "") for step in job["steps"]))
    assert targets_of((ROOT / ".ci/run").read_text(encoding="utf-8")) <= run_by_jobs <= targets


def test_workflows_run_the_versions_of_python_that_are_named():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"]))
    matrix = read_yaml(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]
    assert {*matrix["python"], *(job["python"] for job in matrix["include"])} == named


def test_commits_are_checked_by_the_versions_that_lint_takes():
    pins = dict(re.findall(r"^    (\w+)==([\d.]+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    hooks = {}
    for repository in read_yaml(".pre-commit-config.yaml")["repos"]:
        hooks |= {hook["id"].split("-")[0]: repository["rev"] for hook in repository["hooks"]}
    assert hooks == {name: f"v{pins[name]}" for name in ("ruff", "codespell")}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert all(f"-m {name}" in lint for name in hooks)
