"""The command line: help, errors, defaults from environment and configuration file, the UI on loopback."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import main
from orchestrator.ledger import Ledger
from tests.orchestrator.sweeps import ORCHESTRATE, Small, environment, imported_by, run


def test_help_names_every_command() -> None:
    done = run([*ORCHESTRATE, "--help"])
    assert done.returncode == 0
    for command in ("sweep", "plan", "status", "logs", "stop", "report", "export", "ui", "schema"):
        assert command in done.stdout


def test_help_and_plan_import_nothing_heavy(tmp_path: Path) -> None:
    Small(tmp_path).write()
    for arguments in (["--help"], ["plan", str(tmp_path / "small.yaml")]):
        assert imported_by(arguments, ("torch", "ray", "mlflow", "timm", "matplotlib", "pandas")) == "[]"


def test_plan_says_what_is_new_and_what_it_costs(tmp_path: Path) -> None:
    Small(tmp_path).write()
    file = str(tmp_path / "small.yaml")
    done = run([*ORCHESTRATE, "plan", file, "--storage", str(tmp_path / "runs")])
    assert done.returncode == 0, done.stderr
    assert "4 trials in 2 cells" in done.stdout
    assert "new: 4" in done.stdout
    assert "estimate:" in done.stdout
    listed = json.loads(run([*ORCHESTRATE, "plan", file, "--json"]).stdout)
    assert [trial["state"] for trial in listed["trials"]] == ["planned"] * 4
    assert not (tmp_path / "runs").exists(), "a plan leaves nothing behind"


def test_a_wrong_file_is_exit_2_with_file_and_line_and_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("name: wrong\naxes:\n  model.num_registers: [0, 17]\n")
    started = time.monotonic()
    done = run([*ORCHESTRATE, "sweep", str(file)])
    assert time.monotonic() - started < 2
    assert done.returncode == 2
    assert f"{file}:3: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_storage_may_come_from_a_configuration_file_and_the_environment_wins(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"storage": str(tmp_path / "from_file")}))
    command = [*ORCHESTRATE, "report", "nothing"]
    variables = {**environment(), "ORCHESTRATE_CONFIG": str(config)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert "from_file" in done.stderr
    variables["ORCHESTRATE_STORAGE"] = str(tmp_path / "from_environment")
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert "from_environment" in done.stderr
    config.write_text("storag: x\n")
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert done.returncode == 2
    assert "storag is not allowed" in done.stderr


def test_a_ledger_that_is_damaged_inside_is_exit_2_without_a_traceback(tmp_path: Path) -> None:
    ledger = tmp_path / "mine" / "ledger.db"
    with Ledger.open(ledger):
        (tmp_path / "mine" / "plan.json").write_text("{}")
    content = ledger.read_bytes()
    ledger.write_bytes(content[:4096] + b"\x5a" * (len(content) - 4096))
    done = run([*ORCHESTRATE, "status", "mine", "--storage", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "orchestrate doctor" in done.stderr
    assert "Traceback" not in done.stderr and str(ledger) in done.stderr


def test_results_are_not_imported_into_this_machines_copy_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,test/x\n1,0\n")
    command = [*ORCHESTRATE, "import", str(tmp_path / "t.csv"), "--storage", "s3://bucket/x", "--state"]
    done = run([*command, str(tmp_path / "state")])
    assert done.returncode == 2 and "import works on folders" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "x.yaml", "--max-concurrent", "x"], "--max-concurrent is x; allowed: a whole number of at least 1"),
        (["plan", "x.yaml", "--gpu-memory", "0"], "--gpu-memory is 0; allowed: a number of at least 0.1"),
        (["clean", "--older-than", "-1"], "--older-than is -1; allowed: a number of at least 0"),
        (["clean", "--keep", "lst"], "--keep is lst; allowed: none, last, kept; did you mean last?"),
        (["ui", "--port", "99999"], "--port is 99999; allowed: a whole number from 1 to 65535"),
        (["plan", "x.yaml", "--storage", "foo://x"], "storage foo://x cannot be used: foo:// is not known; allowed: a"),
        (["status", "--storage", "s3x://x"], "storage s3x://x cannot be used: s3x:// is not known; allowed: a folder"),
    ],
)
def test_values_of_options_are_refused_in_our_words(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["orchestrate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["plan", "status"])
def test_a_look_at_a_store_says_that_it_sees_this_machines_copy(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = [str(Small(tmp_path).write())] if command == "plan" else []
    at = ["--storage", "s3://bucket/x", "--state", str(tmp_path / "state")]
    monkeypatch.setattr("sys.argv", ["orchestrate", command, *file, *at])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr()
    copy = f"this is this machine's copy, {tmp_path / 'state'}, of s3://bucket/x; `sweep` and `report` bring what it"
    assert shown.err.startswith(copy) and "copy" not in shown.out


@pytest.mark.parametrize("module", ["orchestrator", "orchestrator.cli"])
def test_the_package_and_the_command_lines_module_run_as_the_command(module: str, tmp_path: Path) -> None:
    done = run([ORCHESTRATE[0], "-m", module, "status", "--storage", str(tmp_path)])
    assert (done.returncode, done.stdout.strip()) == (0, f"no sweeps under {tmp_path}")


@pytest.mark.slow
def test_the_ui_shows_the_runs_on_loopback(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write(axes={"model.num_registers": [0]})
    assert small.run("--in-process").returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*ORCHESTRATE, "ui", "--storage", str(small.storage), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    try:
        found = _post(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", {"max_results": 10})
        assert "small" in [experiment["name"] for experiment in found["experiments"]]
        ids = [experiment["experiment_id"] for experiment in found["experiments"] if experiment["name"] == "small"]
        runs = _post(f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search", {"experiment_ids": ids})["runs"]
        assert [one["info"]["status"] for one in runs] == ["FINISHED"] * 3
    finally:
        server.terminate()
        server.wait(timeout=30)


def _post(url: str, body: dict[str, object]) -> dict[str, list[dict[str, dict[str, str]]]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read())  # type: ignore[no-any-return]
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["file=/nowhere/w.pth"], "model.init_from.file /nowhere/w.pth is not there"),
        (["trial='0123456789abcdef'", "step=4"], "keeps no checkpoint of step 4; name the step in its execution.keep_"),
    ],
)
def test_weights_to_start_from_that_are_not_there_are_said_before_any_trial(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    small = Small(tmp_path)
    given = [part for setting in settings for part in ("--set", f"model.init_from.{setting}")]
    done = run([*ORCHESTRATE, "sweep", str(small.write()), "--storage", str(small.storage), *given])
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("attempts"))
