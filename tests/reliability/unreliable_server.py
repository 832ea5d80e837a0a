"""A real MLflow server on loopback, and the proxy before it that takes it away, holds on, or loses what it says."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from orchestrator.tracking import default_tracking_uri, prepare_store
from orchestrator.tracking_records import ui_command
from tests.reliability.paced import wait_for

Mode = Literal["up", "down", "hung", "errors", "lossy"]
LOST = 0.3  # of the replies of a lossy server, and of those to the making of runs every second


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(state: Path) -> Iterator[int]:
    """`orchestrate ui` on the store of `state`; the port, once it answers."""
    prepare_store(default_tracking_uri(state), state)
    port = free_port()
    command, extra = ui_command(default_tracking_uri(state), port)
    with (state / "server.log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **extra}, cwd=state, stdout=log, stderr=log)
        try:
            wait_for(lambda: _answers(port) or process.poll() is not None, 90)
            assert process.poll() is None, (state / "server.log").read_text()
            yield port
        finally:
            process.terminate()
            process.wait(30)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Proxy:
    """Passes requests on to `upstream` while its `mode` is up; any thread may change the mode."""

    def __init__(self, upstream: int, seed: int = 0) -> None:
        self.port, self._upstream = free_port(), upstream
        self._random = random.Random(seed)
        self.mode: Mode = "up"
        self._creates = 0
        self.lost: list[str] = []  # paths of requests that were done and whose replies were lost
        self.met = 0  # requests that met with anything but "up"
        self._server: http.server.ThreadingHTTPServer | None = None
        self._released = threading.Event()  # ends what hangs
        self.become("up")

    def become(self, mode: Mode) -> None:
        """From now on behave so; a server that is down does not even listen."""
        self.mode = mode
        self._released.set()
        self._released = threading.Event()
        if mode == "down":
            self.close()
        elif self._server is None:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop to listen."""
        self._released.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer a request, or not."""
        request.close_connection = True
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.met += self.mode != "up"
        if self.mode == "hung":
            self._released.wait(600)
            return
        if self.mode == "errors":
            request.send_error(500)
            return
        reply, content = self._ask(request, body)
        self._creates += request.path.endswith("runs/create")
        is_create = request.path.endswith("runs/create") and self._creates % 2 == 1  # the worst to lose
        if self.mode == "lossy" and (is_create or self._random.random() < LOST):
            self.lost.append(request.path)
            return
        request.send_response(reply.status)
        for key, value in reply.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _ask(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            host = {"Host": f"127.0.0.1:{self._upstream}"}
            upstream.request(request.command, request.path, body, {**headers, **host})
            reply = upstream.getresponse()
            return reply, reply.read()
        finally:
            upstream.close()


def _handler(proxy: Proxy) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client has given up
                proxy.handle(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler
