"""The rules of the house that imports show: who may import what, how files begin, how long they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("orchestrator", "trainers", "analysis")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The only files that import these, so that a change of theirs touches one place.
ALONE = {
    "mlflow": {"orchestrator/tracking_store.py", "analysis/mlflow_store.py"},
    "ray": {
        "orchestrator/early.py",
        "orchestrator/ranks.py",
        "orchestrator/run.py",
        "orchestrator/submit.py",
        "orchestrator/trial.py",
        "orchestrator/tune_callback.py",
    },
    "optuna": {"orchestrator/search_sampler.py"},
    "timm": {
        "trainers/attention.py",
        "trainers/data/hugging_face.py",
        "trainers/data/imagenet.py",
        "trainers/optim.py",
        "trainers/vit.py",
        "trainers/weight_files.py",
    },
    "open_clip": {"trainers/data/imagenet.py", "trainers/methods/openclip.py", "trainers/text.py"},
    "analysis": {"orchestrator/inspect.py", "orchestrator/sweep_run.py"},  # besides analysis itself
    "trainers": {  # of the orchestrator: planning without torch, and the bridge to training
        "orchestrator/data.py",
        "orchestrator/data_sets.py",
        "orchestrator/driver.py",
        "orchestrator/evaluate.py",
        "orchestrator/export.py",
        "orchestrator/training.py",
    },
}
PLANNING = {
    "trainers",
    "trainers.config",
    "trainers.catalog",
    "trainers.checkpoint_files",
    "trainers.explain",
    "trainers.settings",
    "trainers.score_settings",
    "trainers.presets",
    "trainers.released",
    "trainers.files",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            if node.module == "trainers":
                yield from (f"trainers.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_owns_and_stays_small(path: Path) -> None:
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None and docstring.split("\n\n")[0].rstrip().endswith(".")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("package", ["mlflow", "ray", "optuna", "timm", "open_clip", "analysis"])
def test_a_package_is_imported_where_it_belongs_and_nowhere_else(package: str) -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] == package for name in imports(path)) and path.relative_to(ROOT).parts[0] != package
    }
    assert importing == ALONE[package]


def test_of_the_trainers_planning_sees_only_what_needs_no_torch() -> None:
    for path in (ROOT / "orchestrator").glob("*.py"):
        if str(path.relative_to(ROOT)) in ALONE["trainers"]:
            continue
        seen = {name for name in imports(path) if name.split(".")[0] == "trainers"}
        assert seen <= PLANNING, path.name
