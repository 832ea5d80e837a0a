"""Results of other tools as trials of a sweep: what is read, what is refused, and what becomes of it."""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import import_results, import_rows
from orchestrator.import_results import Request
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.problems import SpecError
from orchestrator.spec import read_sweep
from tests.orchestrator.sweeps import Small

WIDE = """\
model.num_registers,seed,test/top1,val/loss
0,0,0.50,1.0
0,1,0.52,
4,0,0.56,nan
4,1,0.60,0.25
"""


def write(folder: Path, text: str, name: str = "results.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def take(folder: Path, text: str, **options: Any) -> Request:
    """Import a CSV under `folder`/runs as the sweep `theirs`."""
    asked = Request(file=write(folder, text), storage=folder / "runs", state=folder / "runs", sweep="theirs", **options)
    import_results.import_results(asked)
    return asked


def ablation(folder: Path, sweep: str = "theirs") -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of the ablation table by the values of its axes and by metric."""
    rows = pq.read_table(folder / "runs" / sweep / "tables" / "ablation.parquet").to_pylist()
    axes = list(rows[0])[: list(rows[0]).index("metric")]
    return {(*(row[axis] for axis in axes), row["metric"]): row for row in rows}


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".db-wal", ".db-shm", ".lock")
    }


class TestTables:
    def test_wide_rows_become_an_ablation_table(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE, baseline=["model.num_registers=0"], primary=["test/top1"], question="Who wins?")
        rows = ablation(tmp_path)
        four = rows[4, "test/top1"]
        assert (four["n"], four["mean"], four["primary"]) == (2, pytest.approx(0.58), True)
        assert (four["n_paired"], four["delta"]) == (2, pytest.approx(0.07))
        assert four["flags"] == ["imported"]
        # What is missing is null, NaN is a value that is not finite, and neither is 0.
        zero, nan = rows[0, "val/loss"], rows[4, "val/loss"]
        assert (zero["n"], zero["n_missing"], zero["mean"]) == (1, 1, 1.0)
        assert (nan["n"], nan["mean"], "not_finite" in nan["flags"]) == (1, 0.25, True)

    def test_folders_describe_themselves(self, tmp_path: Path) -> None:
        asked = take(tmp_path, WIDE)
        plan = json.loads((tmp_path / "runs/theirs/plan.json").read_text())
        assert (plan["axes"], plan["seeds"]) == ({"model.num_registers": [0, 4]}, [0, 1])
        trial = next(t for t in plan["trials"] if t["cell"] == {"model.num_registers": 4} and t["seed"] == 0)
        folder = tmp_path / "runs/theirs/trials" / trial["trial_id"]
        assert json.loads((folder / "config.json").read_text()) == {
            "imported": True, "seed": 0, "model": {"num_registers": 4}, "program": {}, "execution": {},
        }  # fmt: skip
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["steps"]) == ("finished", None)
        sha = hashlib.sha256(asked.file.read_bytes()).hexdigest()
        assert result["imported"] == {"file": "results.csv", "sha256": sha}
        assert repr(pq.read_table(folder / "metrics.parquet").to_pylist()) == repr(
            [{"step": 0, "name": "test/top1", "value": 0.56}, {"step": 0, "name": "val/loss", "value": float("nan")}]
        )
        runs = pq.read_table(tmp_path / "runs/theirs/tables/runs.parquet").to_pylist()
        assert {row["imported"] for row in runs} == {True} and {row["device"] for row in runs} == {None}

    def test_long_rows_say_the_same(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        wide = ablation(tmp_path)
        long = "model.num_registers,seed,metric,value\n"
        for row in csv.DictReader(WIDE.splitlines()):
            head = f"{row['model.num_registers']},{row['seed']}"
            long += "".join(f"{head},{name},{row[name]}\n" for name in ("test/top1", "val/loss"))
        (tmp_path / "long").mkdir()
        take(tmp_path / "long", long)
        assert ablation(tmp_path / "long") == wide

    def test_steps_statuses_and_axes_of_any_name(self, tmp_path: Path) -> None:
        text = "learning rate,wd,seed,step,status,acc\n0.1,007,0,1,,5\n0.1,007,0,2,,7\n1e-3,x,0,1,diverged,\n"
        take(tmp_path, text, metrics=["acc=test/top1"])
        rows = ablation(tmp_path)
        assert rows[0.1, "007", "test/top1"]["mean"] == 7  # of the last step
        assert (rows[0.001, "x", "test/top1"]["n_diverged"], rows[0.001, "x", "test/top1"]["mean"]) == (1, None)
        plan = json.loads((tmp_path / "runs/theirs/plan.json").read_text())
        assert list(plan["axes"]) == ["program.learning_rate", "program.wd"]

    @pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.tsv"])
    def test_other_formats(self, tmp_path: Path, name: str) -> None:
        rows: list[dict[str, Any]] = [
            {"method": "dino", "model.reg_init_std": 0.5, "seed": 3, "test/top1": 0.5},
            {"method": "dino", "model.reg_init_std": None, "seed": 3, "test/top1": None},
        ]
        path = tmp_path / name
        if name == "t.jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        elif name == "t.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("method\tmodel.reg_init_std\tseed\ttest/top1\ndino\t0.5\t3\t0.5\ndino\t\t3\t\n")
        first, second = import_rows.read(path, {}, ())
        assert (first.cell, first.seed) == ({"method": "dino", "model.reg_init_std": 0.5}, 3)
        assert first.points == {(0, "test/top1"): 0.5}
        assert (second.cell["model.reg_init_std"], second.points) == (None, {})

    def test_line_breaks_of_unicode_and_marks_of_byte_order_are_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes("a,test/x\r\nx\u2028y,1\r\n\x85z,2\r\n".encode("utf-8-sig"))
        assert [row.cell for row in import_rows.read(tmp_path / "t.csv", {}, ())] == [
            {"program.a": "x\u2028y"},
            {"program.a": "z"},
        ]
        (tmp_path / "t.jsonl").write_bytes('{"a": 1, "test/x": 1}\n'.encode("utf-8-sig"))
        assert [row.cell for row in import_rows.read(tmp_path / "t.jsonl", {}, ())] == [{"program.a": 1}]

    def test_a_free_column_may_say_that_it_has_no_value(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a,model.reg_init_std,test/x\n1,,0\nnull,0.5,0\n")
        cells = [row.cell for row in import_rows.read(path, {}, ())]
        assert cells == [
            {"program.a": 1, "model.reg_init_std": None},
            {"program.a": None, "model.reg_init_std": 0.5},
        ]


class TestAgain:
    def test_the_same_file_changes_nothing(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE, baseline=["model.num_registers=0"])
        before = files(tmp_path / "runs")
        take(tmp_path, WIDE)
        assert files(tmp_path / "runs") == before

    def test_more_rows_extend_it(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        take(tmp_path, WIDE + "8,0,0.61,0.2\n")
        assert ablation(tmp_path)[8, "test/top1"]["mean"] == 0.61
        assert len(json.loads((tmp_path / "runs/theirs/plan.json").read_text())["trials"]) == 5

    def test_another_metric_is_added_to_known_trials(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        take(tmp_path, "model.num_registers,seed,test/miou\n4,0,0.3\n")
        rows = ablation(tmp_path)
        assert rows[4, "test/miou"]["n"] == 1 and rows[4, "test/top1"]["n"] == 2

    def test_a_metric_that_the_sweep_has_already_can_become_primary(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        take(tmp_path, "model.num_registers,seed,test/miou\n4,0,0.3\n", primary=["test/top1"])
        assert ablation(tmp_path)[4, "test/top1"]["primary"]

    def test_other_values_are_refused_unless_they_shall_replace(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        before = files(tmp_path / "runs")
        other = WIDE.replace("0.56", "0.57")
        with pytest.raises(SpecError) as caught:
            take(tmp_path, other)
        assert str(caught.value).endswith(
            "results.csv:4: test/top1 is 0.57 at step 0; the sweep has 0.56; --replace takes the new ones"
        )
        assert files(tmp_path / "runs") == before
        take(tmp_path, other, replace=True)
        assert ablation(tmp_path)[4, "test/top1"]["mean"] == pytest.approx(0.585)

    def test_an_import_that_was_cut_off_is_made_good(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = import_results.publish.trial
        calls: list[str] = []

        def dies(ledger: Ledger, layout: Any, trial_id: str) -> None:
            calls.append(trial_id)
            if len(calls) == 2:
                raise KeyboardInterrupt
            whole(ledger, layout, trial_id)

        monkeypatch.setattr(import_results.publish, "trial", dies)
        with pytest.raises(KeyboardInterrupt):
            take(tmp_path, WIDE)
        monkeypatch.undo()
        take(tmp_path, WIDE)
        assert ablation(tmp_path)[4, "test/top1"]["n"] == 2


class TestWrong:
    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("a,test/x\n1,2,3\n", {}, "results.csv:2: the row has 3 values; the head has 2 columns"),
            ('a,test/x\n"1,2\n', {}, "results.csv:2: it is no CSV: unexpected end of data"),
            ("a,test/x\n", {}, "results.csv:1: there are no rows"),
            ("a,b\n1,2\n", {}, "results.csv:1: no column is a metric, which has a name with /"),
            ("test/x\n1\n", {}, "results.csv:1: no column is an axis"),
            ("a,a,test/x\n1,1,2\n", {}, "results.csv:1: the column 'a' is there twice"),
            ("a b,a_b,test/x\n1,1,2\n", {}, "'a_b' would be the axis program.a_b, and so would another"),
            ("a,Val/Acc\n1,2\n", {}, "results.csv:1: 'Val/Acc' is no name of a metric"),
            ("a,test/x\n1,high\n", {}, "results.csv:2: test/x is 'high'; allowed: a number, or nothing"),
            ("a,seed,test/x\n1,-1,0\n", {}, "results.csv:2: seed is -1; allowed: a whole number from 0"),
            ("a,status,test/x\n1,crashed,0\n", {}, "results.csv:2: status is 'crashed'; allowed: finished, diverged"),
            ("a,test/x\n1,0\n2,0\n1,0\n", {}, "results.csv:4: test/x is given twice, first on line 2; give different"),
            ("model.num_registers,test/x\n99,0\n", {}, "results.csv:2: model.num_registers is 99; allowed: a whole"),
            ("execution.threads,test/x\n1,0\n", {}, "execution.threads is not an axis"),
            ("a,metric,value\n1,loss,0\n", {}, "results.csv:2: 'loss' is no name of a metric"),
            ("a,test/x\n1,0\n", {"metrics": ["b=test/y"]}, "there is no column 'b'; it has a, test/x"),
            ("a,test/x\n1,0\n", {"metrics": ["b"]}, "--metric b: write COLUMN=METRIC"),
            ("a,test/x\n1,0\n", {"baseline": ["b=1"]}, "--baseline b: the axes are program.a"),
            ("a,test/x\n1,0\n", {"baseline": ["a=2"]}, "--baseline a=2: program.a has the values [1]"),
            ("a,test/x\n1,0\n", {"primary": ["x"]}, "--primary x: it is no name of a metric"),
            ("a,test/top1\n1,0\n", {"primary": ["test/topp1"]}, "no values of test/topp1; did you mean test/top1?"),
            ("a,test/x\n1,0\n", {"primary": ["val/loss"]}, "has no values of val/loss; it has test/x"),
            ("a,test/x\n1,0\n ,0\n", {}, "results.csv:3: the column 'a' has no value"),
            ("model.num_registers,test/x\n0,0\n,0\n", {}, "results.csv:3: the column 'model.num_registers' has no"),
            ("model.num_registers,test/x\nnull,0\n", {}, "results.csv:2: the column 'model.num_registers' has no"),
            ("a;test/x\n1;0,5\n", {}, "results.csv:1: the head is one column, 'a;test/x'; it looks separated by semi"),
            ("a\ttest/x\n1\t0\n", {}, "separated by tabs, not by commas; save it with commas as .csv, or with"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, text: str, options: Mapping[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            take(tmp_path, text, **options)
        assert message in str(caught.value)
        assert not (tmp_path / "runs" / "theirs" / "ledger.db").exists()

    def test_everything_is_said_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError) as caught:
            take(tmp_path, "a,seed,test/x\n1,x,0\n1,0,y\n")
        assert len(caught.value.problems) == 2

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.xlsx", b"", "the type .xlsx is not known; .csv, .tsv, .jsonl, .ndjson, .parquet are"),
            ("t.csv", b"a,test/x\n\xff,1\n", "it is no UTF-8 text"),
            ("t.csv", "a,test/x\né,1\n".encode("latin-1"), "save it as UTF-8: it looks like Latin-1"),
            ("t.csv", "a,test/x\né,1\n".encode("utf-16"), "save it as UTF-8: it looks like UTF-16"),
            ("t.tsv", "a\ttest/x\n1\t1\n".encode("utf-16-le"), "save it as UTF-8: it looks like UTF-16"),
            ("t.parquet", b"no", "it is no readable parquet file"),
            ("t.jsonl", b'{"a": 1}\n[1]\n', "t.jsonl:2: '[1]' is no JSON object"),
        ],
    )
    def test_files_that_are_no_tables(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            import_rows.read(tmp_path / name, {}, ())
        assert message in str(caught.value)

    def test_other_axes_than_the_sweeps(self, tmp_path: Path) -> None:
        take(tmp_path, WIDE)
        with pytest.raises(ValueError, match=r"the axes of the sweep are model.num_registers; it lacks .* and it has"):
            take(tmp_path, "a,test/x\n1,0\n")


class TestBesideTrialsOfOurOwn:
    def test_rows_pair_up_with_the_sweeps_cells_and_survive_its_next_run(self, tmp_path: Path) -> None:
        file = Small(tmp_path).write(seeds=[0, 1])
        plan = build_plan(read_sweep(file))
        layout = SweepLayout(tmp_path / "runs", tmp_path / "runs", "small")
        layout.root.mkdir(parents=True)
        layout.sweep_file.write_text("as run")
        layout.plan.write_text(json.dumps(plan.to_json()))
        with Ledger.open(layout.ledger) as ledger:
            ledger.plan(plan.trials)
        # The same cells, another seed; one row stands for a trial that the sweep runs itself.
        text = "model.num_registers,seed,test/linear/top1\n0,2,0.5\n2,2,0.75\n"
        with pytest.raises(SpecError, match=r"results.csv:4: the sweep runs .* in that cell with that seed itself"):
            self.add(tmp_path, text + "2,1,0.9\n")
        with pytest.raises(ValueError, match="small is the sweep of a file, which says its question"):
            self.add(tmp_path, text, baseline=["model.num_registers=0"])
        self.add(tmp_path, text)
        rows = ablation(tmp_path, "small")
        row = rows[2, "test/linear/top1"]
        assert (row["n"], row["n_missing"], row["delta"], "imported" in row["flags"]) == (1, 2, 0.25, True)
        with Ledger.open(layout.ledger) as ledger:
            ledger.plan(plan.trials)  # as a run of the file begins
            assert len(ledger.rows()) == 4
            import_results.keep(ledger, plan)
            assert [row.state for row in ledger.rows()] == ["planned"] * 4 + ["finished"] * 2
            more = build_plan(read_sweep(Small(tmp_path).write(seeds=[0, 1, 2])))
            ledger.plan(more.trials)  # it runs these cells with that seed itself now
            import_results.keep(ledger, more)
            assert [row.state for row in ledger.rows()] == ["planned"] * 6

    def add(self, folder: Path, text: str, **options: Any) -> None:
        storage = folder / "runs"
        request = Request(file=write(folder, text), storage=storage, state=storage, sweep="small", **options)
        import_results.import_results(request)
