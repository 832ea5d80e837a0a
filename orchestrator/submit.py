"""A sweep as a Ray job: working tree, settings and allowed environment go out, log and exit code come back."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import spec, working_tree
from orchestrator.ray_token import use_ray_token
from orchestrator.remote import checked, is_remote
from orchestrator.tracking_records import check_tracking_uri, redact

STOP_SECONDS = 40  # for trials to checkpoint when the job is stopped; Ray's own default is 3
_FOLLOW_AGAIN_SECONDS = 2.0
_READY_SECONDS = 60.0  # for a head to take jobs after it was started
_LOST_SECONDS = 120.0  # without an answer of the server, after which the job is left to itself
_INTERRUPTED, _STOPPED = 130, 143

# What a job may need and is no secret. Whatever else it needs is named with --env or set on the cluster's machines.
ENVIRONMENT = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_CLOUD_PROJECT"),
    *("HF_HUB_OFFLINE", "HF_ENDPOINT"),
)
_SECRET = re.compile(r"pass|secret|token|key|credential|auth", re.I)

# The working tree comes first on the job's path, whether or not its image has this program installed too.
_PROGRAM = ("python", "-c", "from orchestrator.cli import main; main()")


@dataclass(frozen=True)
class Submission:
    """What the command line says about a job."""

    file: Path
    storage: str  # a folder that all machines of the cluster share, or a URI
    address: str  # of the cluster's job server
    state: str  # on a local disk of the machine that runs the job
    tracking_uri: str | None = None
    overrides: Sequence[str] = ()
    name: str | None = None
    environment: Sequence[str] = ()  # names of further variables to hand over
    wait: bool = True
    system_metrics: bool = False


def submit(asked: Submission, say: Callable[[str], None], folder: Path | None = None) -> int:
    """Start the sweep on the cluster from the working tree at `folder` (here), and follow it; its exit code.

    Raises:
        SpecError: the sweep file is wrong.
        ValueError: the file, the storage or the environment cannot go to a cluster, or no job server answers.
    """
    folder = (folder or Path.cwd()).resolve()
    spec.read_sweep(asked.file, asked.overrides, asked.name)  # wrong input is said here, not in a job's log
    command = entrypoint(asked, folder)
    variables = handed_over(asked.environment, os.environ)
    client = _client(asked.address)
    with tempfile.TemporaryDirectory(prefix="orchestrate-submit-") as scratch:
        archive = Path(scratch) / "working_tree.zip"
        files = working_tree.pack(folder, archive)
        if asked.file.resolve().relative_to(folder) not in files:
            raise ValueError(f"{asked.file} is not sent, as .gitignore or its name leaves it out")
        job = _start(client, command, {"working_dir": str(archive), "env_vars": variables})
    how = f"ray job stop {job} --address {redact(asked.address)}"
    say(f"job {job} has {len(files)} files of {folder}; end it, resumable, with: {how}")
    if not asked.wait:
        say(f"follow it with: ray job logs --follow {job} --address {redact(asked.address)}")
        return 0
    say("its log follows; Ctrl-C stops following, not the job")
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        say(f"\nthe job goes on; end it, resumable, with: {how}")
        return _INTERRUPTED


def entrypoint(asked: Submission, folder: Path) -> str:
    """The command line of the job.

    Raises:
        ValueError: the sweep file lies outside the working tree, or results would lie where nobody finds them.
    """
    file = asked.file.resolve()
    if not file.is_relative_to(folder):
        raise ValueError(f"{asked.file} lies outside {folder}, which is the working tree that is sent")
    if not is_remote(asked.storage) and not Path(asked.storage).is_absolute():
        raise ValueError(
            f"--storage {asked.storage} would lie in the job's temporary folder; allowed: an absolute path that all "
            "machines of the cluster share (NFS), or a URI such as s3://BUCKET/PREFIX"
        )
    if is_remote(asked.storage):
        checked(asked.storage)
    if not Path(asked.state).is_absolute():
        raise ValueError(f"--state {asked.state} is relative; allowed: an absolute path on the cluster's machines")
    options = ["--address", "auto", "--storage", asked.storage, "--state", asked.state]
    if asked.tracking_uri is not None:
        options += ["--tracking-uri", _without_secret(asked.tracking_uri)]
    if asked.name is not None:
        options += ["--name", asked.name]
    if asked.system_metrics:
        options.append("--system-metrics")
    for setting in asked.overrides:
        options += ["--set", setting]
    return shlex.join([*_PROGRAM, "sweep", file.relative_to(folder).as_posix(), *options])


def handed_over(named: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that go with the job: those of a fixed list that are set here, and those that the user named.

    Raises:
        ValueError: a named one is not set, or looks like a secret: Ray keeps a job's variables and logs them.
    """
    for name in named:
        if _SECRET.search(name):
            raise ValueError(
                f"--env {name}: Ray writes the variables of a job into its logs, so secrets are not handed over; "
                "set it on the cluster's machines (a Kubernetes secret, the environment of `ray start`)"
            )
        if name not in environment:
            raise ValueError(f"--env {name}: it is not set here")
    chosen = {name: environment[name] for name in (*ENVIRONMENT, *named) if name in environment}
    for name, value in chosen.items():
        if redact(value) != value:
            raise ValueError(f"{name} holds a secret, which Ray would log; set it on the cluster's machines")
    return {**chosen, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


def _without_secret(uri: str) -> str:
    if redact(check_tracking_uri(uri)) != uri:
        raise ValueError(
            f"tracking URI {redact(uri)} carries a secret, which Ray would log; set ORCHESTRATE_TRACKING_URI, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, on the cluster's machines"
        )
    return uri


def _client(address: str) -> Any:
    """A client of the job server at `address`.

    Raises:
        ValueError: nothing answers there, or it does not let us in.
    """
    use_ray_token()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # what it uploads and closes we say ourselves
    try:
        return JobSubmissionClient(address)
    except (RayError, RuntimeError, OSError) as error:
        raise ValueError(f"no Ray job server at {redact(address)}: {redact(str(error)).splitlines()[0]}") from error


def _start(client: Any, command: str, runtime_env: Mapping[str, Any]) -> str:
    """The id of the job. A head that has only just been started is waited for.

    Raises:
        ValueError: the server does not take the job.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=dict(runtime_env)))
        except (RuntimeError, OSError) as error:
            if "try again later" in str(error) and time.monotonic() < deadline:
                time.sleep(_FOLLOW_AGAIN_SECONDS)
                continue
            raise ValueError(f"the job was not accepted: {redact(str(error)).splitlines()[0]}") from error


class _Log:
    """A job's log as it comes, each character once, although the server tells it from the start at every connection."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job = client, job
        self._printed = 0

    async def print_on(self) -> None:
        """Print what comes until the server ends the connection, as it does when the job is over."""
        seen = 0
        async for text in self._client.tail_job_logs(self._job):
            sys.stdout.write(text[max(0, self._printed - seen) :])
            sys.stdout.flush()
            seen += len(text)
            self._printed = max(self._printed, seen)


def _follow(client: Any, job: str) -> int:
    """Print the job's log until it is over; its exit code. A connection that is lost is made again.

    Raises:
        ValueError: the job server did not answer for two minutes.
    """
    import asyncio

    from aiohttp import ClientError  # of a server that goes while it is asked, some are no OSError

    log = _Log(client, job)
    heard = time.monotonic()
    while True:
        try:
            asyncio.run(log.print_on())
            info = client.get_job_info(job)
        except (RuntimeError, OSError, ClientError) as error:
            if time.monotonic() - heard > _LOST_SECONDS:
                raise ValueError(f"the server of job {job} does not answer any more: {error}") from error
        else:
            heard = time.monotonic()
            if info.status.is_terminal():
                return exit_code(info)
        time.sleep(_FOLLOW_AGAIN_SECONDS)


def exit_code(info: Any) -> int:
    """The exit code of a job that is over: its command's, where it has one."""
    if info.driver_exit_code is not None:
        code = int(info.driver_exit_code)
        return 128 - code if code < 0 else code
    return {"SUCCEEDED": 0, "STOPPED": _STOPPED}.get(str(info.status.value), 1)
