"""The files of deploy/: each against the schema or the shell that reads it, and all against what the program has."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCHEMAS = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())
NOTICED_SECONDS = 30  # for a dead node


def load(name: str) -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(content, dict)
    return content


def job_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    found: dict[str, Any] = spec.get("jobTemplate", spec)
    return found


def pods(name: str) -> list[dict[str, Any]]:
    """Specs of the pods of head and workers."""
    cluster = job_spec(name)["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


KUBERNETES = pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])


@KUBERNETES
def test_kubernetes_files_have_the_shape_of_their_resource(name: str) -> None:
    content = load(name)
    jsonschema.validate(content, {**SCHEMAS, "$ref": f"#/$defs/{content['kind']}"})


def test_the_schema_refuses_what_kubernetes_would() -> None:
    broken = load("rayjob.yaml")
    broken["spec"]["entrypont"] = "a typing error"
    with pytest.raises(jsonschema.ValidationError, match="entrypont"):
        jsonschema.validate(broken, {**SCHEMAS, "$ref": "#/$defs/RayJob"})


def test_both_kubernetes_files_run_the_same_job() -> None:
    assert job_spec("raycronjob.yaml") == job_spec("rayjob.yaml")


@KUBERNETES
def test_every_pod_has_the_token_as_a_file_and_is_not_root(name: str) -> None:
    for pod in (*pods(name), job_spec(name)["submitterPodTemplate"]["spec"]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["token"]["secret"]["defaultMode"] == 0o440
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        for container in pod["containers"]:
            given = {variable["name"]: variable["value"] for variable in container["env"]}
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert given["RAY_AUTH_MODE"] == "token"
            assert given["RAY_AUTH_TOKEN_PATH"] == f"{mounts['token']}/auth_token"
            assert not any(re.search("PASSWORD|SECRET|KEY", variable) for variable in given)
            assert set(mounts) <= set(volumes)


@KUBERNETES
def test_pods_have_time_to_leave_and_share_their_nodes_cache(name: str) -> None:
    for pod in pods(name):
        assert pod["terminationGracePeriodSeconds"] >= 60
        cache = next(volume for volume in pod["volumes"] if volume["name"] == "cache")
        assert cache["hostPath"]["type"] == "DirectoryOrCreate"
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["cache"] == f"{mounts['state']}/cache"


def noticed_seconds(variables: dict[str, str]) -> float:
    """The longest time until Ray takes a silent node for dead."""
    named = {name.removeprefix("RAY_health_check_"): int(value) for name, value in variables.items()}
    return named["failure_threshold"] * (named["period_ms"] + named["timeout_ms"]) / 1000


def health(text: str) -> dict[str, str]:
    return dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))


def test_a_dead_node_is_noticed_in_time_everywhere() -> None:
    from ray._raylet import Config

    found = [health((DEPLOY / name).read_text()) for name in ("slurm.sh", "ray_up.yaml")]
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        for pod in pods(name):
            variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
            found.append({key: value for key, value in variables.items() if key.startswith("RAY_health_check_")})
    assert len(found) == 6
    for variables in found:
        assert noticed_seconds(variables) < NOTICED_SECONDS
        for variable in variables:
            assert hasattr(Config, variable.removeprefix("RAY_"))  # Ray reads no other name


def test_the_sweep_of_a_pod_that_is_ended_is_told(tmp_path: Path) -> None:
    command = pods("rayjob.yaml")[0]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    (tmp_path / "sweep").mkdir()
    driver = subprocess.Popen(["sleep", "60"])
    (tmp_path / "sweep" / "ledger.lock").write_text(json.dumps({"pid": driver.pid, "host": "here", "started": "now"}))
    script = command[2].replace("/state", str(tmp_path)).replace("sleep 40", "true")
    subprocess.run([*command[:2], script], check=True, timeout=10)
    assert driver.wait(5) == -signal.SIGTERM


def entrypoints() -> list[list[str]]:
    """Every command line of ours in deploy/ and docs/cluster.md."""
    texts = [job_spec(name)["entrypoint"] for name in ("rayjob.yaml", "raycronjob.yaml")]
    document = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    texts += re.findall(r"^ {4}(orchestrate [^\n#]*)", document, re.M)
    return [shlex.split(text) for text in texts]


def test_documented_commands_have_only_options_that_exist() -> None:
    import typer

    from orchestrator.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    given = entrypoints()
    assert len(given) > 5
    for words in given:
        known = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


def test_sweep_files_that_are_named_exist() -> None:
    texts = [path.read_text() for path in DEPLOY.iterdir()] + [(ROOT / "docs" / "cluster.md").read_text()]
    named = {name for text in texts for name in re.findall(r"\bsweeps/\w+\.yaml", text)}
    named |= {name for text in texts for name in re.findall(r"\bdeploy/\w+(?:\.\w+)?", text)}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_image_copies_what_exists_and_installs_extras_that_exist() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "ray_up.yaml").read_text()
    for group in re.findall(r"\[([a-z,]+)\]['\"]", texts):
        assert set(group.split(",")) <= set(extras)


def test_ray_itself_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = load("ray_up.yaml")
    prepared = prepare_config(content)
    validate_config(prepared)
    for command in (*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    broken = {**content, "max_wrokers": 8}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(broken))


# Slurm: the script itself with stand-ins for what only a cluster has


RECORD = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
FAKES = {
    "srun": (
        '#!/bin/bash\ntrap "echo ended $* >> $CALLS; exit 0" TERM\necho "srun $*" >> "$CALLS"\n'
        "sleep 20 >/dev/null 2>&1 & wait\n"
    ),
    "ray": RECORD,
    "scontrol": RECORD + '[ "$1" != show ] || printf "n1\\nn2\\nn3\\n"\n',
    "python": RECORD,
    "orchestrate": RECORD
    + "leave() { sleep 0.5; echo left >> $CALLS; exit $1; }\n"  # once its trials have checkpointed
    + 'trap "leave 138" USR1\ntrap "leave 143" TERM\nsleep "${WORK:-0}" >/dev/null 2>&1 & wait $!\nexit "${CODE:-0}"\n',
}


def slurm(tmp_path: Path, **variables: str) -> subprocess.Popen[str]:
    (tmp_path / "bin").mkdir()
    for name, content in FAKES.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "USER": "me",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_PER_NODE": "a100:8",
        **variables,
    }
    command = ["bash", str(DEPLOY / "slurm.sh"), "sweeps/num_registers.yaml", "/shared/runs", "--max-concurrent", "4"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def wait_for_call(tmp_path: Path, beginning: str) -> None:
    deadline = time.monotonic() + 20
    while not any(call.startswith(beginning) for call in calls(tmp_path)):
        assert time.monotonic() < deadline, calls(tmp_path)
        time.sleep(0.02)


def test_slurm_starts_ray_on_every_node_and_the_sweep_on_the_first(tmp_path: Path) -> None:
    script = slurm(tmp_path, WORK="1")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0, output
    made = calls(tmp_path)
    starts = sorted(call for call in made if call.startswith("srun"))  # by node; who is first to write, chance decides
    assert [re.search(r"--nodelist=(\w+)", call)[1] for call in starts] == ["n1", "n2", "n3"]  # type: ignore[index]
    assert "--head --port=6379" in starts[0] and all("--address=n1:6379" in call for call in starts[1:])
    assert all("--num-cpus=16 --num-gpus=8" in call for call in starts)
    sweep = next(call for call in made if call.startswith("orchestrate"))
    assert sweep == (
        "orchestrate sweep sweeps/num_registers.yaml --address n1:6379 --storage /shared/runs "
        "--state /tmp/orchestrate-me --max-concurrent 4"
    )
    assert sum(call.startswith("ended") for call in made) == 3  # no step outlives the job
    assert not any("requeue" in call for call in made)
    assert made[0].startswith("python -c from orchestrator.ray_token")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurms_warning_reaches_the_sweep_and_the_job_is_queued_again(number: signal.Signals, tmp_path: Path) -> None:
    script = slurm(tmp_path, WORK="20")
    wait_for_call(tmp_path, "orchestrate")
    time.sleep(0.3)  # for its trap to be set
    script.send_signal(number)
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 128 + number, output
    made = calls(tmp_path)
    assert made.index("left") < made.index("scontrol requeue 7")
    assert made.index("left") < min(made.index(call) for call in made if call.startswith("ended"))


def test_a_sweep_that_failed_is_not_queued_again(tmp_path: Path) -> None:
    script = slurm(tmp_path, CODE="1")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 1, output
    assert not any("requeue" in call for call in calls(tmp_path))


def test_slurm_without_storage_says_what_is_missing() -> None:
    done = subprocess.run(["bash", str(DEPLOY / "slurm.sh"), "a.yaml"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and "STORAGE" in done.stderr


def test_slurm_warns_the_batch_shell_alone() -> None:
    text = (DEPLOY / "slurm.sh").read_text()
    assert "#SBATCH --signal=B:USR1@120" in text and "#SBATCH --requeue" in text
    assert os.access(DEPLOY / "slurm.sh", os.X_OK)
