"""The MLflow sink against a real server behind a proxy that loses replies, delays, answers 500 and goes down."""

import http.client
import http.server
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.ledger import Ledger
from orchestrator.tracking import Sink, default_tracking_uri, prepare_store
from orchestrator.tracking_records import ui_command

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

NUM_TRIALS, NUM_STEPS = 6, 40


class FakeConfig:
    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return {"method": "deit3"}


@dataclass
class FakeTrial:
    trial_id: str
    name: str = "deit3"
    cell: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    config: FakeConfig = field(default_factory=FakeConfig)
    role: Literal["cell", "search"] = "cell"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(port: int, path: str, host: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def _server(state: Path) -> Iterator[int]:
    """`orchestrate ui` on a free port, until it answers."""
    prepare_store(default_tracking_uri(state), state)
    port = _free_port()
    argv, extra = ui_command(default_tracking_uri(state), port)
    log = (state / "server.log").open("w")
    process = subprocess.Popen(argv, env={**os.environ, **extra}, cwd=state, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 45
        while True:
            try:
                assert _ask(port, "/health") == 200
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, (state / "server.log").read_text()
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(15)
        log.close()


class Proxy:
    """Passes requests on to `upstream`; of the replies it loses, delays or replaces some, drawn from a fixed seed."""

    def __init__(self, upstream: int) -> None:
        self.port, self._upstream = _free_port(), upstream
        self._random = random.Random(0)
        self.lossy = False
        self.creates = self.lost_creates = 0
        self._server: http.server.ThreadingHTTPServer | None = None

    def up(self) -> None:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        fate = self._random.random() if self.lossy else 1.0
        handler.close_connection = True
        if fate < 0.1:
            handler.send_error(500)
            return
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection")}
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=20)
        upstream.request(handler.command, handler.path, body, {**headers, "Host": f"127.0.0.1:{self._upstream}"})
        reply = upstream.getresponse()
        content = reply.read()
        upstream.close()
        creates = self.lossy and handler.path.endswith("runs/create")
        self.creates += creates
        if fate < 0.4 or (creates and self.creates % 2):  # done, but nobody is told
            self.lost_creates += creates
            return
        if fate < 0.5:
            time.sleep(0.3)
        handler.send_response(reply.status)
        for key, value in reply.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


def _value(trial: int, step: int) -> float:
    return trial + 1 / (step + 1)


def test_no_run_is_doubled_and_no_point_lost_by_a_server_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _server(tmp_path) as port, Ledger.open(tmp_path / "sweep" / "ledger.db") as ledger:
        assert _ask(port, "/api/2.0/mlflow/experiments/get?experiment_id=0", host="evil.example") == 403
        proxy = Proxy(port)
        proxy.up()
        proxy.lossy = True
        ids = [f"{trial:016x}" for trial in range(NUM_TRIALS)]
        ledger.plan([FakeTrial(trial_id, name=f"trial {i}") for i, trial_id in enumerate(ids)])
        sink = Sink(ledger, f"http://127.0.0.1:{proxy.port}", "sweep", "storage", state=tmp_path, request_timeout_s=3.0)
        slowest_notify = slowest_change = 0.0
        sink.start()
        for step in range(NUM_STEPS):
            for trial, trial_id in enumerate(ids):
                start = time.perf_counter()
                if step == 0:
                    ledger.start_attempt(trial_id, 1, "host", 1)
                ledger.record(trial_id, 1, step, {"train/loss": _value(trial, step)})
                recorded = time.perf_counter()
                sink.notify()
                slowest_change = max(slowest_change, recorded - start)
                slowest_notify = max(slowest_notify, time.perf_counter() - recorded)
            time.sleep(0.15)
            if step == NUM_STEPS // 2:
                proxy.down()
            if step == NUM_STEPS - 10:
                proxy.up()
        for trial_id in ids:
            ledger.finish(trial_id, 1, "finished", {}, None)
        (tmp_path / "report.html").write_text("<html>")
        sink.log_artifacts([tmp_path / "report.html"])
        start = time.monotonic()
        lacking = sink.close(45)
        assert capsys.readouterr().out == ""  # MLflow prints an address for every run that ends
        print(
            f"close {time.monotonic() - start:.1f} s, notify at most {slowest_notify * 1e3:.2f} ms, ledger "
            f"{slowest_change * 1e3:.1f} ms, replies to runs/create lost: {proxy.lost_creates}"
        )
        proxy.down()
        assert lacking == 0
        assert slowest_notify < 0.1  # microseconds, but for the scheduler of a busy machine
        assert proxy.lost_creates >= 3
        _check(f"http://127.0.0.1:{port}", ids)


def _check(uri: str, ids: list[str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("sweep").experiment_id
    runs = {run.data.tags.get("trial_id", "sweep"): run for run in client.search_runs([experiment])}
    assert len(client.search_runs([experiment])) == len(runs) == NUM_TRIALS + 1
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for trial, trial_id in enumerate(ids):
        history = client.get_metric_history(runs[trial_id].info.run_id, "train/loss")
        assert sorted((m.step, m.value) for m in history) == [(s, _value(trial, s)) for s in range(NUM_STEPS)]
    assert [f.path for f in client.list_artifacts(runs["sweep"].info.run_id)] == ["report.html"]
