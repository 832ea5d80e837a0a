"""Goal 10: of 10,000 hostile names none makes a file outside of the storage folder."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from analysis.run import analyse
from orchestrator import import_results, inspect, overrides, publish, spec, status
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.overrides import parse
from orchestrator.plan import build_plan
from orchestrator.problems import SpecError
from orchestrator.sweep import sweep_name
from orchestrator.tracking_records import entity_name
from tests.orchestrator.sweeps import Small
from trainers.files import write_whole

pytestmark = pytest.mark.slow

NUM_NAMES = 10_000
_PIECES = (
    *("..", ".", "/", "//", "\\", "..\\", "../", "../..", "/etc", "/tmp", "~", "~root", "$HOME", "${HOME}"),
    *(
        "%2e%2e%2f",
        "\0",
        "\n",
        "\r",
        "\t",
        " ",
        "\x1b[2J",
        "\u202e",
        "\u2025",
        "．．／",
        "é",
        "e\u0301",
        "🙂",
        "\ud800",
    ),
    *("-rf", "--", "@", "@12345678", ":", "::$DATA", "C:", "CON", "NUL", "*", "?", "[a-z]", "{a,b}", "|", ";", "&"),
    *("`id`", "$(touch x)", "'", '"', "<", ">", "#", "!", "mlflow.db", "mlartifacts", "cache", "other", "ledger.db"),
    *("trials", "a", "small", "_", "x" * 300, "." * 50, "file:///tmp/x", "s3://bucket/x", "name.yaml", "&a", "*a"),
    *("0", "1e3", "null"),
)


def names(outside: Path, count: int = NUM_NAMES) -> Iterator[str]:
    """Hostile names, among them ways to `outside`; the same ones every time."""
    draw = random.Random(10)
    ways = (str(outside), f"../{outside.name}", f"../../{outside.name}/x", f"a/../../{outside.name}", "../runs2", "..")
    yield from _PIECES
    for _ in range(count - len(_PIECES)):
        if draw.random() < 0.2:
            yield draw.choice(ways) + draw.choice(_PIECES)
        else:
            yield "".join(draw.choices((*_PIECES, *ways), k=draw.randint(1, 5)))


class Watched:
    """A folder with a storage in it, of which only the storage may change, and there no other sweep."""

    def __init__(self, folder: Path) -> None:
        self.outside, self.storage, self._root = folder / "outside", folder / "here" / "runs", folder
        for place in (self.outside, self.storage, self.storage / "other"):
            place.mkdir(parents=True)
        (self.outside / "kept").write_text("untouched")
        (self.storage / "other" / "kept").write_text("untouched")
        self.begin()

    def begin(self) -> None:
        """What is there now is what must stay."""
        self._before = self._found()

    def _found(self) -> dict[str, str | None]:
        """All but what the storage holds, the other sweep's folder included."""
        here = self.storage.parent
        paths = [*self._root.iterdir(), *self.outside.rglob("*"), *here.iterdir(), *(here / "work").rglob("*")]
        paths += (self.storage / "other").rglob("*")
        return {str(path): path.read_text() if path.is_file() else None for path in paths}

    def check(self) -> None:
        """Nothing outside has come, gone or changed."""
        assert self._found() == self._before


@pytest.fixture
def watched(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Folders of which one is where the process stands and one is the user's home."""
    (tmp_path / "here" / "work").mkdir(parents=True)
    made = Watched(tmp_path)
    monkeypatch.chdir(tmp_path / "here" / "work")
    monkeypatch.setenv("HOME", str(made.outside))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))  # else its cache is at home
    return made


def use(watched: Watched, name: str) -> None:
    """Write what a sweep of this name writes."""
    layout = SweepLayout(watched.storage, watched.storage, name)
    assert layout.root.parent == watched.storage
    assert layout.root.resolve().parent == watched.storage.resolve()
    layout.root.mkdir(exist_ok=True)
    for path in (layout.sweep_file, layout.plan, layout.mlflow_map):
        write_whole(path, b"x")
    for path in layout.root.iterdir():
        path.unlink()
    layout.root.rmdir()


def test_a_sweeps_name_never_leaves_its_folder(watched: Watched) -> None:
    taken = 0
    for name in names(watched.outside):
        with contextlib.suppress(ValueError):
            sweep_name(name)
            taken += 1
            if name != "other":
                use(watched, name)
    watched.check()
    assert 10 < taken < NUM_NAMES / 2


def test_names_and_values_in_sweep_files_never_leave_the_folder(watched: Watched, tmp_path: Path) -> None:
    """Whole sweep files with a hostile name, question, setting, axis or value, and the same on the command line."""
    file = tmp_path / "here" / "hostile.yaml"
    base = {"name": "fine", "trial": {"method": "deit3"}, "axes": {"model.num_registers": [0, 1]}, "seeds": [0]}
    read = 0
    for number, name in enumerate(names(watched.outside, 400)):
        places = (
            {"name": name},
            {"question": name},
            {"axes": {name: [0]}},
            {"trial": {"data": {"train": name}}},
            {"trial": {"data": {"train": "image_folder", "name": name}}},
            {"trial": {"execution": {"data_root": name}}},
            {"axes": {"model.factory": [name]}},
        )
        content = {**base, **places[number % len(places)]}
        with contextlib.suppress(yaml.YAMLError, UnicodeError):
            file.write_text(yaml.safe_dump(content))
        for settings, given in (((), None), ((f"{name}={name}",), None), ((f"question={name}",), None), ((), name)):
            with contextlib.suppress(SpecError):
                sweep = spec.read_sweep(file, settings, given)
                read += 1
                if sweep.name != "other":
                    use(watched, sweep.name)
    file.unlink()
    watched.check()
    assert read > 100


def test_hostile_overrides_are_settings_or_problems(watched: Watched) -> None:
    for name in names(watched.outside):
        for text in (name, f"{name}={name}", f"optim.lr={name}"):
            path, value, problems = parse(text)
            assert path or problems or value is None
        assert sweep_name(overrides.renamed("fine", {"optim.lr": name}, {})).startswith("fine@")
    watched.check()


def test_names_of_trials_and_sweeps_on_the_command_line_never_leave_the_folder(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Small(watched.outside.parent / "sweep")
    plan = build_plan(spec.read_sweep(small.write(axes={"model.num_registers": [0]}, seeds=[0])))
    watched.begin()
    layout = SweepLayout(watched.storage, watched.storage, "small")
    with Ledger.open(layout.ledger) as ledger:
        ledger.plan(plan.trials)
        ledger.start_attempt(plan.trials[0].trial_id, 1, "host", 1)
    write_whole(layout.plan, json.dumps({**plan.to_json(None), "name": "small"}).encode())
    for name in names(watched.outside, 1_000):
        for act in (
            lambda name=name: inspect.stop(name, watched.storage, watched.storage),
            lambda name=name: inspect.logs(name, watched.storage, watched.storage),
            lambda name=name: status.status(status.Asked(name, watched.storage, watched.storage, failures=True)),
            lambda name=name: inspect.report([name], watched.storage),
        ):
            with contextlib.suppress(ValueError):
                act()
    watched.check()


def test_names_of_imported_results_never_leave_the_folder(watched: Watched) -> None:
    table = watched.storage / "results.csv"
    table.write_text("model.num_registers,seed,test/top1\n0,0,0.5\n4,0,0.6\n")
    import_results.import_results(import_results.Request(table, watched.storage, watched.storage, "imported"))
    assert (watched.storage / "imported" / "report.html").is_file()
    for name in set(names(watched.outside, 300)) - {"other"}:
        for asked in (
            import_results.Request(table, watched.storage, watched.storage, sweep=name),
            import_results.Request(table, watched.storage, watched.storage, "x", baseline=[f"{name}={name}"]),
        ):
            with contextlib.suppress(ValueError, UnicodeError):
                import_results.import_results(asked)
    watched.check()


def test_metrics_and_experiments_have_names_that_stay_below_mlflows_artifacts(watched: Watched) -> None:
    for name in names(watched.outside):
        path = (watched.storage / "mlartifacts" / entity_name(name)).resolve()
        assert path.is_relative_to((watched.storage / "mlartifacts").resolve())


def test_a_plan_that_somebody_has_tampered_with_is_read_and_written_inside(watched: Watched) -> None:
    """Ids of trials in plan.json lead to folders; those of another form are refused."""
    layout = SweepLayout(watched.storage, watched.storage, "tampered")
    trial = {"trial_id": "", "name": "x", "cell": {}, "seed": 0}
    for name in ("0123456789abcdef", *names(watched.outside, 200)):
        plan = {"sweep": name, "question": name, "axes": {}, "baseline": None, "primary": [], "trials": []}
        plan["trials"] = [{**trial, "trial_id": name}]
        write_whole(layout.plan, json.dumps(plan).encode())
        with contextlib.suppress(ValueError):
            analyse(layout.root)
        assert layout.report.is_file(), "the first one is as it should be"
    watched.check()


def test_records_that_a_trial_leaves_are_published_into_its_own_folder(watched: Watched) -> None:
    """Whatever an attempt calls its files: only those of known names are taken, and each keeps its name."""
    trial = SweepLayout(watched.storage, watched.storage, "sweep").trial("0123456789abcdef")
    attempt = trial.attempt(1)
    attempt.mkdir(parents=True)
    for name in names(watched.outside, 2_000):
        with contextlib.suppress(OSError, ValueError):
            (attempt / f"{name.replace('/', '_')[:200]}.npz").write_bytes(b"x")
    (attempt / "attention").mkdir()
    (attempt / "attention" / "..png").write_bytes(b"x")
    publish.records(trial, 1)
    watched.check()
    published = [path for path in trial.root.rglob("*") if path.is_file() and attempt not in path.parents]
    assert len(published) > 1_000
    assert {path.parent for path in published} == {trial.root, trial.root / "attention"}
