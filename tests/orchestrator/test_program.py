"""Programs of others as trials: what they are told, what they report, how they end, and that nothing outlives them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import program, program_guard, program_records, program_report, publish
from orchestrator.program_report import ProgramReport, WrongReports
from tests.orchestrator.programs import Trial, is_alive, line, wait_until
from trainers.config import resolve
from trainers.evaluate import _PER_IMAGE, _PROBES
from trainers.tokens.statistics import SCHEMA as TOKEN_STATISTICS
from trainers.tokens.table import SCHEMA as TOKEN_NORMS


class TestWhatAProgramIsTold:
    def test_configuration_environment_and_words(self, tmp_path: Path) -> None:
        body = """
            printf '%s\\n' "$@" > "$ORCHESTRATE_DIRECTORY/words"
            env > "$ORCHESTRATE_DIRECTORY/environment"
            pwd > "$ORCHESTRATE_DIRECTORY/pwd"
        """
        trial = Trial(tmp_path, body, **{"program.a.b": [1, 0.5, "x"], "model.num_registers": 4})
        words = ["{program.a.b}", "{model.num_registers}", "{seed}", "{config}", "{directory}", "{not ours} {0}"]
        trial.config = resolve({**trial.config.model_dump(), "command": ["sh", str(trial.script), *words]})
        outcome = trial.run()
        assert (outcome.status, outcome.threads) == ("finished", 3)
        config = trial.folder / "config.json"
        told = json.loads(config.read_text())
        assert told == {"seed": 7, "program": {"a.b": [1, 0.5, "x"]}, "model": {"num_registers": 4}}
        shown = (trial.folder / "words").read_text().splitlines()
        assert shown == ["1,0.5,x", "4", "7", str(config), str(trial.folder), "{not ours} {0}"]
        environment = dict(
            entry.split("=", 1) for entry in (trial.folder / "environment").read_text().splitlines() if "=" in entry
        )
        assert environment["ORCHESTRATE_TRIAL_CONFIG"] == str(config)
        assert (environment["ORCHESTRATE_SEED"], environment["ORCHESTRATE_THREADS"]) == ("7", "3")
        assert (environment["ORCHESTRATE_RESUME_FROM"], environment["CUDA_VISIBLE_DEVICES"]) == ("", "")
        assert (trial.folder / "pwd").read_text().strip() == str(Path.cwd())

    def test_a_folder_for_the_program(self, tmp_path: Path) -> None:
        (tmp_path / "code").mkdir()
        trial = Trial(tmp_path, "", **{"execution.program_root": str(tmp_path / "code")})
        (tmp_path / "code" / "go.sh").write_text('#!/bin/sh\necho "in $(pwd)"\n')
        trial.config = resolve({**trial.config.model_dump(), "command": ["./go.sh"]})
        assert (trial.run().error or {})["message"].endswith("or name what runs it, as in [sh, ./go.sh]")
        (tmp_path / "code" / "go.sh").chmod(0o755)
        assert trial.run().status == "finished"
        assert f"in {tmp_path / 'code'}\n" in trial.log and "go.sh has sha256" in trial.log

    def test_settings_have_values_that_come_back_from_json(self, tmp_path: Path) -> None:
        for value in (float("nan"), float("inf"), {"a": object()}):
            with pytest.raises(ValueError, match="program"):
                Trial(tmp_path, "", program={"x": value})

    @pytest.mark.parametrize(
        ("command", "message"),
        [("no-such-program", "there is no program no-such-program on the PATH"), ("./no.sh", "no.sh is not in ")],
    )
    def test_a_program_that_is_not_there_is_final(self, tmp_path: Path, command: str, message: str) -> None:
        trial = Trial(tmp_path, "")
        trial.config = resolve({**trial.config.model_dump(), "command": [command]})
        outcome = trial.run()
        assert (outcome.status, outcome.retryable) == ("failed", False)
        assert message in (outcome.error or {})["message"]
        assert (outcome.error or {})["type"] == "NoProgram"
        assert (outcome.error or {})["traceback"] == "" and "Traceback" not in trial.log

    def test_only_the_first_rank_reports(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trial = Trial(tmp_path, f"echo '{line(1, a__b=1)}' >> \"$ORCHESTRATE_REPORT\"")
        monkeypatch.setenv("RANK", "1")
        assert trial.run(ranks=2).status == "finished"
        assert trial.reports == [] and (trial.folder / "report.rank1.jsonl").is_file()
        monkeypatch.setenv("RANK", "0")
        assert trial.run(ranks=2).status == "finished"
        assert trial.reports == [(1, {"a/b": 1.0})]


class TestReports:
    def test_lines_are_heard_while_it_runs(self, tmp_path: Path) -> None:
        body = f"""
            echo '{line(1, train__loss=2, val__top1=None)}' >> "$ORCHESTRATE_REPORT"
            until [ -e {tmp_path}/heard ]; do sleep 0.02; done
            printf '{{"step": 2, "metrics": {{"train/loss": NaN' >> "$ORCHESTRATE_REPORT"
            sleep 0.3
            printf '}}}}\\n\\n{{"step": 3, "metrics": {{"train/loss": -Infinity}}}}' >> "$ORCHESTRATE_REPORT"
        """
        trial = Trial(tmp_path, body)
        outcome = trial.run(on_report=lambda _step: (tmp_path / "heard").touch())
        assert (outcome.status, outcome.steps) == ("finished", 3)
        assert repr(trial.reports) == (
            "[(1, {'train/loss': 2.0}), (2, {'train/loss': nan}), (3, {'train/loss': -inf})]"
        )
        assert "left out" not in trial.log

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            ("no json", "'no json' is no JSON"),
            ("\\377\\376", "is no JSON (UnicodeDecodeError)"),
            ("[1]", "it is [1]; allowed:"),
            (line("1", a__b=1), "its step is '1'; allowed: a whole number from 0"),
            (line(-1, a__b=1), "its step is -1"),
            (line(2**70, a__b=1), "its step is 1180591620717411303424"),
            (line(True, a__b=1), "its step is true"),
            (line(1, a__b="x"), "its a/b is 'x'; allowed: a number"),
            (line(1, a__b=True), "its a/b is true"),
            (line(1, Top1=1), "it has the metric 'Top1'; allowed: small letters"),
            (line(1, a__b=10**400), "its a/b is larger than any number"),
            ('{"step": 1, "metrics": 3}', "its metrics are 3"),
            ('{"status": "paused"}', "its status is 'paused'; allowed: diverged or finished"),
            ("[" * 5000, "is no JSON (RecursionError)"),
        ],
    )
    def test_a_wrong_line_is_left_out_and_named(self, tmp_path: Path, wrong: str, reason: str) -> None:
        path = tmp_path / "report.jsonl"
        path.write_bytes(f"{line(1, a__b=1)}\n".encode() + wrong.encode().replace(b"\\377\\376", b"\xff\xfe") + b"\n")
        report = ProgramReport(path)
        try:
            assert list(report.new()) == [(1, {"a/b": 1.0})]
            with path.open("a") as file:
                file.write(line(2, a__b=1) + "\n")
            assert list(report.new()) == [(2, {"a/b": 1.0})]
        finally:
            report.close()
        assert report.wrong == 1 and report.first_wrong.startswith("report.jsonl:2: ") and reason in report.first_wrong

    def test_a_line_without_end_is_dropped_before_it_fills_the_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "report.jsonl"
        path.write_bytes(b"x" * (3 * program_report.MOST_BYTES) + b"\n" + line(1, a__b=1).encode() + b"\n")
        report = ProgramReport(path)
        try:
            assert list(report.new(at_end=True)) == [(1, {"a/b": 1.0})]
        finally:
            report.close()
        assert (report.wrong, report.first_wrong) == (1, "report.jsonl:1: it has more than 1,048,576 bytes")

    def test_a_report_that_is_written_anew_is_read_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "report.jsonl"
        report = ProgramReport(path)
        try:
            path.write_text(line(1, a__b=1) + "\n" + line(2, a__b=1) + "\n")
            assert len(list(report.new())) == 2
            path.write_text(line(3, a__b=1) + "\n")
            assert list(report.new()) == [(3, {"a/b": 1.0})]
        finally:
            report.close()

    def test_a_hundred_wrong_lines_end_the_trial_for_good(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, 'while :; do echo garbage; done >> "$ORCHESTRATE_REPORT"')
        outcome = trial.run()
        assert (outcome.status, outcome.retryable, (outcome.error or {})["type"]) == ("failed", False, "WrongReports")
        assert (
            "100 lines of the report are wrong, the first is report.jsonl:1: 'garbage' is no JSON"
            in ((outcome.error or {})["message"])
        )

    def test_a_flood_of_right_lines_does_not_keep_it_from_being_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(program, "TERM_SECONDS", 0.2)
        # 1 MB a second, more than what is read and recorded in that time
        body = f"""
            lines=$(yes '{line(1, a__b=1)}' | head -c 100000)
            while :; do echo "$lines" >> "$ORCHESTRATE_REPORT"; sleep 0.1; done
        """
        trial = Trial(tmp_path, body)
        asked = lambda: "stopped" if trial.reports else None  # noqa: E731
        began = time.monotonic()
        assert trial.run(asked=asked, on_report=lambda _step: time.sleep(1e-5)).status == "stopped"
        assert time.monotonic() - began < 30

    def test_a_report_that_outgrows_all_use_ends_the_trial(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, f"exec yes '{line(1, a__b=1)}' >> \"$ORCHESTRATE_REPORT\"")
        outcome = trial.run()
        assert (outcome.status, (outcome.error or {})["type"]) == ("failed", "WrongReports")
        assert (outcome.error or {})["message"] == "the report has more than 67,108,864 bytes"

    def test_wrong_reports_is_raised_at_the_hundredth(self, tmp_path: Path) -> None:
        path = tmp_path / "report.jsonl"
        path.write_text("x\n" * 99)
        report = ProgramReport(path)
        try:
            assert list(report.new()) == [] and report.wrong == 99
            with path.open("a") as file:
                file.write("x\n")
            with pytest.raises(WrongReports):
                list(report.new())
        finally:
            report.close()


class TestEnds:
    @pytest.mark.parametrize(
        ("body", "status", "kind", "message", "retryable"),
        [
            ("exit 0", "finished", None, "", False),
            ("echo hello; echo 'it is broken' >&2; exit 3", "failed", "ProgramFailed", "code 3: it is broken", False),
            ("exit 75", "failed", "ProcessLost", "ended with code 75: it printed nothing", True),
            ("kill -9 $$", "failed", "ProcessLost", "was killed by SIGKILL", True),
            ("kill -40 $$", "failed", "ProcessLost", "was killed by signal 40", True),
            ("kill -SEGV $$", "failed", "ProcessLost", "was killed by SIGSEGV", True),
            ("sh -c 'kill -9 $$'", "failed", "ProcessLost", "ended with code 137", True),
            ("sh -c 'kill -TERM $$'", "failed", "ProcessLost", "ended with code 143", True),
        ],
    )
    def test_exit_codes(
        self, tmp_path: Path, body: str, status: str, kind: str | None, message: str, retryable: bool
    ) -> None:
        outcome = Trial(tmp_path, body).run()
        error = outcome.error or {}
        assert (outcome.status, error.get("type"), outcome.retryable) == (status, kind, retryable)
        assert message in error.get("message", "")
        assert status == "finished" or "hello" in error["traceback"] or "hello" not in body

    def test_divergence_is_said_by_a_line(self, tmp_path: Path) -> None:
        said = '{"status": "diverged", "message": "loss is NaN"}'
        body = f"echo '{line(4, train__loss=1)}\n{said}' >> \"$ORCHESTRATE_REPORT\"; exit 1"
        outcome = Trial(tmp_path, body).run()
        assert (outcome.status, outcome.steps, (outcome.error or {})["message"]) == ("diverged", 4, "loss is NaN")

    def test_one_that_neither_reports_nor_prints_is_taken_for_hung(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, "echo begins; sleep 60", **{"execution.no_progress_seconds": 0.6})
        outcome = trial.run()
        assert (outcome.status, outcome.retryable, (outcome.error or {})["type"]) == ("failed", True, "Hung")

    def test_output_has_a_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(program, "MOST_LOG_BYTES", 100_000)
        outcome = Trial(tmp_path, "exec yes").run()
        assert (outcome.error or {})["type"] == "TooMuchOutput"


class TestLeaving:
    POLITE = """
        i=0
        while [ $i -lt 500 ]; do
            if [ -e "$ORCHESTRATE_STOP" ]; then
                echo $i > "$ORCHESTRATE_DIRECTORY/checkpoints/state"
                exit 0
            fi
            i=$((i + 1)); sleep 0.02
        done
    """

    def test_a_polite_one_saves_and_is_resumed_from_what_it_saved(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, self.POLITE)
        assert trial.run(asked=lambda: "interrupted").status == "interrupted"
        saved = trial.folder / "checkpoints"
        assert (saved / "state").is_file()
        trial.script.write_text('echo "from $ORCHESTRATE_RESUME_FROM"')
        assert trial.run().status == "finished"
        assert f"from {saved}\n" in trial.log
        assert not (trial.folder / "checkpoints").exists()  # an empty folder is no checkpoint

    def test_of_several_attempts_the_newest_checkpoints_are_kept(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, 'echo "$1" > "$ORCHESTRATE_DIRECTORY/checkpoints/state"; exit 75')
        for number in ("one", "two", "three"):
            trial.config = resolve({**trial.config.model_dump(), "command": ["sh", str(trial.script), number]})
            trial.run()
        trial.script.write_text("")  # one that writes none leaves those before
        trial.run()
        publish._settle_checkpoints(trial.layout, ())
        assert (trial.layout.checkpoints / "state").read_text() == "three\n"
        assert [folder for folder in trial.layout.checkpoint_folders() if folder.exists()] == [trial.layout.checkpoints]

    @pytest.mark.parametrize("reason", ["stopped", "pruned"])
    def test_one_that_does_not_look_gets_sigterm(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
    ) -> None:
        monkeypatch.setattr(program, "TERM_SECONDS", 0.2)
        body = "trap 'echo got it; kill $sleeping; exit 9' TERM\nsleep 60 & sleeping=$!\nwait $sleeping"
        trial = Trial(tmp_path, body)
        assert trial.run(asked=lambda: reason).status == reason
        assert "got it" in trial.log

    def test_a_stubborn_one_is_killed_with_all_its_children(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(program, "TERM_SECONDS", 0.2)
        monkeypatch.setattr(program, "KILL_SECONDS", 0.6)
        body = f"""
            trap '' TERM
            sh -c 'trap "" TERM; echo $$ > {tmp_path}/child; while :; do sleep 0.1; done' &
            setsid sh -c 'echo $$ > {tmp_path}/daemon; while :; do sleep 0.1; done' &
            while :; do sleep 0.1; done
        """
        trial = Trial(tmp_path, body)
        began = time.monotonic()
        asked = lambda: "stopped" if (tmp_path / "child").exists() and (tmp_path / "daemon").exists() else None  # noqa: E731
        assert trial.run(asked=asked).status == "stopped"
        assert time.monotonic() - began < 10
        for name in ("child", "daemon"):
            assert not is_alive(int((tmp_path / name).read_text()))

    def test_one_that_was_done_when_it_was_asked_says_so(self, tmp_path: Path) -> None:
        body = """
            until [ -e "$ORCHESTRATE_STOP" ]; do sleep 0.02; done
            echo '{"status": "finished"}' >> "$ORCHESTRATE_REPORT"
        """
        assert Trial(tmp_path, body).run(asked=lambda: "interrupted").status == "finished"


class TestNothingOutlivesAnAttempt:
    DAEMON = "setsid sh -c 'echo $$ > {0}/daemon.partial; mv {0}/daemon.partial {0}/daemon; sleep 300' &\n"

    def test_what_it_leaves_in_the_background_ends_with_it(self, tmp_path: Path) -> None:
        body = self.DAEMON.format(tmp_path) + f"until [ -e {tmp_path}/daemon ]; do sleep 0.02; done"
        assert Trial(tmp_path, body).run().status == "finished"
        assert not is_alive(int((tmp_path / "daemon").read_text()))

    @pytest.mark.parametrize("children_first", [False, True])
    def test_it_ends_with_the_process_that_runs_the_attempt(self, tmp_path: Path, children_first: bool) -> None:
        body = f"trap '' TERM INT\n{self.DAEMON.format(tmp_path)}sleep 300 & echo $! > {tmp_path}/child\n"
        (tmp_path / "script").write_text(f"{body}echo $$ > {tmp_path}/program\nsleep 300\n")
        driver = f"""
            import sys
            from pathlib import Path
            from tests.orchestrator.test_program import Trial
            folder = Path({str(tmp_path)!r})
            Trial(folder, (folder / "script").read_text()).run()
        """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(driver)], cwd=Path(__file__).parents[2])
        try:
            pids = [tmp_path / name for name in ("daemon", "child", "program")]
            wait_until(lambda: all(path.exists() and path.read_text().strip() for path in pids), 60)
            assert all(is_alive(int(path.read_text())) for path in pids)
            if children_first:  # as Ray does with the children of a worker whose driver is gone
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: not any(is_alive(int(path.read_text())) for path in pids))
        finally:
            process.kill()
            process.wait()

    def test_a_guard_that_is_killed_when_nobody_else_is_left_takes_the_program_with_it(self, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        words = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 300"]
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", program_guard.__file__, str(reading), *words], pass_fds=(reading,)
        )
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
            guard.kill()
            wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))
        finally:
            guard.kill()
            guard.wait()
            os.close(reading)
            os.close(writing)

    @pytest.mark.parametrize("inner", [False, True])
    def test_either_process_of_the_guard_killed_takes_everything_with_it(self, tmp_path: Path, inner: bool) -> None:
        body = f"{self.DAEMON.format(tmp_path)}echo $PPID > {tmp_path}/guard\necho $$ > {tmp_path}/program\nsleep 300"
        trial = Trial(tmp_path, body)

        def kill_the_guard() -> None:
            pids = [tmp_path / name for name in ("daemon", "program")]
            wait_until(lambda: all(path.exists() and path.read_text() != "" for path in pids))
            guard = int((tmp_path / "guard").read_text())
            outer = int(Path(f"/proc/{guard}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(guard if inner else outer, signal.SIGKILL)

        killer = threading.Thread(target=kill_the_guard)
        killer.start()
        outcome = trial.run()
        killer.join()
        assert (outcome.status, outcome.retryable) == ("failed", True)
        assert not any(is_alive(int((tmp_path / name).read_text())) for name in ("daemon", "program"))


class TestRecords:
    def test_ours_are_taken_and_others_are_set_aside_and_named(self, tmp_path: Path) -> None:
        schemas = {
            "token_norms": TOKEN_NORMS,
            "token_statistics": TOKEN_STATISTICS,
            "probes": _PROBES,
            "per_image": _PER_IMAGE,
        }
        for name, schema in schemas.items():
            path = tmp_path / f"{name}.parquet"
            pq.write_table(schema.empty_table(), path)
            assert program_records.wrong(path) is None
            pq.write_table(pa.table({"step": ["1"]}), path)
            assert program_records.wrong(path) is not None
        pq.write_table(pa.table({"step": pa.array([1]), "name": ["x"], "value": [1]}), tmp_path / "probes.parquet")
        np.savez(tmp_path / "map.npz", values=np.zeros(3))
        (tmp_path / "other.npz").write_text("no")
        (tmp_path / "link.npz").symlink_to(tmp_path / "map.npz")
        program_records.sort_out(tmp_path)
        assert sorted(path.name for path in (tmp_path / "refused").iterdir()) == [
            "link.npz", "other.npz", "per_image.parquet", "token_norms.parquet", "token_statistics.parquet",
        ]  # fmt: skip
        assert sorted(path.name for path in tmp_path.glob("*.*")) == ["map.npz", "probes.parquet"]

    def test_the_log_names_what_was_set_aside(self, tmp_path: Path) -> None:
        trial = Trial(tmp_path, 'echo no > "$ORCHESTRATE_DIRECTORY/token_norms.parquet"')
        assert trial.run().status == "finished"
        assert "token_norms.parquet is not published: it cannot be read" in trial.log
