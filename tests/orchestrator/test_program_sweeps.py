"""Programs of others in sweep files and configurations, and a shell script from its file to its table."""

import os
import signal
import sqlite3
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator import doctor_processes
from orchestrator.estimate import estimate
from orchestrator.plan import build_plan
from orchestrator.schema import sweep_schema
from orchestrator.spec import SpecError, dump, read_sweep
from orchestrator.sweep import Sweep
from tests.orchestrator.programs import wait_until
from tests.orchestrator.sweeps import ORCHESTRATE, environment, run
from trainers.config import TrialConfig, identity, resolve, trial_id

EXAMPLE = Path(__file__).parents[2] / "sweeps" / "programs" / "descent.yaml"


class TestConfiguration:
    def test_only_what_was_given_exists(self) -> None:
        config = resolve({"command": ["a"], "program.lr": 0.1, "model.num_registers": 4, "seed": 1})
        known = {k: v for k, v in config.model_dump(mode="json").items() if k != "execution"}
        assert known == {"seed": 1, "command": ["a"], "program": {"lr": 0.1}, "model": {"num_registers": 4}}
        assert TrialConfig.model_validate(config.model_dump(mode="json")).model_dump() == config.model_dump()

    def test_everything_that_is_handed_over_is_in_the_identity(self) -> None:
        settings: dict[str, Any] = {"command": ["a"], "seed": 0}
        ids = {trial_id(resolve(settings))}
        for name, value in (
            ("program.x", 1), ("program.x", 2), ("program.x", [1, 2]), ("program.x", None), ("program.y", 1),
            ("model.num_registers", 0),  # the default, yet given
            ("compile", False), ("optim.clip_grad", None), ("command", ["b"]), ("seed", 1),
        ):  # fmt: skip
            ids.add(trial_id(resolve({**settings, name: value})))
        assert len(ids) == 11
        assert trial_id(resolve({**settings, "execution.threads": 2})) in ids

    def test_trials_of_our_own_trainers_keep_their_ids(self) -> None:
        assert trial_id(resolve({})) == "b215fc68f3559f08"
        assert "program" not in resolve({}).model_dump() and "command" not in identity(resolve({}))


class TestSweepFile:
    def test_the_example_is_six_trials_whose_cost_is_not_known(self) -> None:
        plan = build_plan(read_sweep(EXAMPLE))
        assert [trial.name for trial in plan.trials] == [
            f"descent lr{lr} seed{seed}" for lr in ("0.1", "0.3") for seed in (0, 1, 2)
        ]
        cost = estimate(plan.trials).to_json()
        assert (cost["trials"], cost["not_known"], cost["gpu_hours"], cost["flops"]) == (6, 6, None, None)

    def test_a_dumped_sweep_reads_back_equal(self, tmp_path: Path) -> None:
        path = tmp_path / "again.yaml"
        path.write_text(dump(read_sweep(EXAMPLE)))
        assert read_sweep(path) == read_sweep(EXAMPLE)

    def test_editors_know_free_settings(self) -> None:
        schema = jsonschema.Draft202012Validator(sweep_schema())
        sweep = yaml.safe_load(EXAMPLE.read_text())
        assert schema.is_valid(sweep)
        assert schema.is_valid({**sweep, "trial": {"command": ["x"], "program": {"a": [1, "b"], "c.d": None}}})
        for wrong in ({"command": []}, {"program": {}}, {"program": {"a": {}}}, {"program.a b": 1}, {"program": 3}):
            assert not schema.is_valid({**sweep, "trial": wrong}), wrong

    def read(self, folder: Path, text: str) -> Sweep:
        path = folder / "s.yaml"
        path.write_text(textwrap.dedent(text))
        return read_sweep(path)

    def test_settings_of_a_program_may_stand_wherever_others_may(self, tmp_path: Path) -> None:
        sweep = self.read(
            tmp_path,
            """
            name: s
            trial: {command: [x, "{program.net.depth}"], program: {net: {depth: 3}, fast: true}}
            axes:
              program.rule: [none, [1, 2], 0.5]
              model.num_registers: [0, 4]
            when:
              - {if: {program.rule: 0.5}, set: {program.net.depth: 5}}
            exclude:
              - {program.rule: none, model.num_registers: 4}
            baseline: {model.num_registers: 0}
            primary: [score/anything]
            """,
        )
        configs = [trial.config for trial in build_plan(sweep).trials]
        assert [config.program for config in configs] == [
            {"net.depth": depth, "fast": True, "rule": rule}
            for depth, rule in ((3, "none"), (3, (1, 2)), (3, (1, 2)), (5, 0.5), (5, 0.5))
        ]
        names = [trial.name for trial in build_plan(sweep).trials]
        assert names[:2] == ["x rule=none reg0 seed0", "x rule=1,2 reg0 seed0"]

    def test_what_is_wrong_is_named_with_its_line(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError) as caught:
            self.read(
                tmp_path,
                """
                name: s
                trial:
                  command: [x, "{program.ratee}"]
                  program: {rate: .nan, "a b": 1}
                  preset: short
                axes: {program.rate: [1, 1], model.num_registers: [99]}
                """,
            )
        said = str(caught.value)
        for part in (
            "s.yaml:5: program.rate is .nan; allowed: true or false, a number, a text, null, or a list of these",
            "s.yaml:5: program.a b is not a setting",
            "s.yaml:7: program.rate has 1 twice",
            "s.yaml:7: model.num_registers is 99",
        ):
            assert part in said
        with pytest.raises(
            SpecError, match=r"s.yaml:4: command has \{program.ratee\} in it, .* did you mean program.rate"
        ):
            self.read(tmp_path, "\nname: s\ntrial:\n  command: [x, '{program.ratee}']\naxes: {program.rate: [1]}\n")
        with pytest.raises(SpecError, match=r"program.rate is a setting of a program; give the program as command"):
            self.read(tmp_path, "name: s\naxes: {program.rate: [1]}\n")


class TestSweep:
    def test_a_shell_script_becomes_an_ablation_table(self, tmp_path: Path) -> None:
        storage = tmp_path / "runs"
        options = ("sweep", str(EXAMPLE), "--storage", str(storage), "--in-process")
        done = run([*ORCHESTRATE, *options], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "token_norms" not in done.stdout
        rows = pq.read_table(storage / "descent" / "tables" / "ablation.parquet").to_pylist()
        found = {(row["program.lr"], row["metric"]): row for row in rows}
        slow, fast = found[0.1, "test/objective"], found[0.3, "test/objective"]
        assert (slow["n"], fast["n"], fast["n_paired"]) == (3, 3, 3)
        # f(x) = x² / 2 after 10 steps of x ← (1 - lr) x: both come from the same start.
        assert fast["mean"] / slow["mean"] == pytest.approx((0.7 / 0.9) ** 20, rel=1e-5)
        before = {path: path.read_bytes() for path in (storage / "descent" / "tables").rglob("*") if path.is_file()}
        runs = pq.read_table(storage / "descent" / "tables" / "runs.parquet").to_pylist()
        assert {row["steps"] for row in runs} == {10} and {row["program.steps"] for row in runs} == {10}
        assert not {name for name in runs[0] if name.startswith(("optim.", "tokens.", "model."))}
        with sqlite3.connect(storage / "mlflow.db") as mlflow:
            statuses = mlflow.execute("SELECT status FROM runs").fetchall()
            lr = mlflow.execute("SELECT value FROM params WHERE key = 'program.lr'").fetchall()
        assert statuses == [("FINISHED",)] * 7 and sorted(lr) == [("0.1",)] * 3 + [("0.3",)] * 3
        again = run([*ORCHESTRATE, *options], 120)
        assert again.returncode == 0 and before == {path: path.read_bytes() for path in before}
        status = run([*ORCHESTRATE, "status", "descent", "--storage", str(storage)], 60)
        assert status.stdout.count("finished  attempts") == 6, status.stderr

    @pytest.mark.slow
    def test_a_sweep_that_is_interrupted_goes_on_where_it_was(self, tmp_path: Path) -> None:
        storage = tmp_path / "runs"
        command = [*ORCHESTRATE, "sweep", str(EXAMPLE), "--storage", str(storage), "--in-process"]
        command += ["--set", "seeds=[0]", "--set", "axes.program.lr=[0.3]", "--set", "baseline=null"]
        slow = {**environment(), "DESCENT_PAUSE": "0.5"}
        process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_until(lambda: any(storage.glob("descent/trials/*/attempts/1/checkpoints/state")), 60)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
            assert process.returncode == 143, output
        finally:
            process.kill()
        left = int(next(storage.glob("descent/trials/*/attempts/1/checkpoints/state")).read_text().split()[0])
        assert run(command, 120).returncode == 0
        log = next(storage.glob("descent/trials/*/log.txt")).read_text()
        assert f"begins at step {left} with x" in log and 0 < left < 10
        kept = next(storage.glob("descent/trials/*/checkpoints/state"))
        assert kept.read_text().split()[0] == "10"

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [(), ("--in-process",)])
    def test_nothing_of_a_program_outlives_a_killed_driver(self, tmp_path: Path, options: tuple[str, ...]) -> None:
        sleeping = 'trap "" TERM INT; sleep 300 & setsid sleep 300 & sleep 300; sleep 300'
        sweep = {"name": "stubborn", "trial": {"command": ["sh", "-c", sleeping]}, "axes": {"program.x": [1]}}
        (tmp_path / "stubborn.yaml").write_text(yaml.safe_dump({**sweep, "resources": {"cpus": 1}}))
        storage = tmp_path / "runs"
        command = [*ORCHESTRATE, "sweep", str(tmp_path / "stubborn.yaml"), "--storage", str(storage), *options]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: len(sleepers(storage)) == 3, 120)
            process.kill()
            wait_until(lambda: not doctor_processes.of_programs(storage), 60)
        finally:
            process.kill()
            process.wait()
            for left in doctor_processes.of_programs(storage):
                os.kill(left.pid, signal.SIGKILL)


def sleepers(storage: Path) -> list[doctor_processes.Process]:
    return [process for process in doctor_processes.of_programs(storage) if process.command == "sleep 300"]
