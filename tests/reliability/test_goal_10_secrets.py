"""Goal 10: no secret of the environment or of a URI is written down, and no server of ours is open to others."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers
from tests.reliability.paced import PAUSE, reported, wait_for
from tests.reliability.unreliable_server import server

pytestmark = pytest.mark.slow

# None of them may be found anywhere; each is unlike anything that could be there by chance.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAQ7PLANTED0KEY1ID",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/aws+secret/Zk3",
    "AWS_SESSION_TOKEN": "pl4nted-session-Wx9",
    "MLFLOW_TRACKING_USERNAME": "pl4nted-user-Qn5",
    "MLFLOW_TRACKING_PASSWORD": "pl4nted-password-Tr8",
    "MLFLOW_TRACKING_TOKEN": "",
    "HF_TOKEN": "hf_pl4ntedHuggingFace",
    "WANDB_API_KEY": "pl4nted-wandb-Lm2",
    "SOME_SETTING_OF_OURS": "pl4nted-anything-Vc6",
}
URI_PASSWORD = "pl4nted-in-the-uri-Hd7"

# Ray's services, each by a call that says something about it; a server that asks for a token refuses them.
_SERVICES = (
    *("NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys", "NodeManagerService/GetNodeStats"),
    *("CoreWorkerService/GetCoreWorkerStats", "ReporterService/GetTraceback", "ObjectManagerService/Pull"),
)


@dataclass(frozen=True)
class Listener:
    """A socket of the sweep's processes on which others may call."""

    host: str
    port: int
    command: str

    @property
    def is_open(self) -> bool:
        """Whether it can be reached from another machine."""
        return self.host not in ("127.0.0.1", "::1")

    def answers(self, token: str | None) -> dict[str, str]:
        """What each of Ray's services answers here: a gRPC code, OK, or nothing where it is no gRPC server."""
        address = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        found = {}
        with grpc.insecure_channel(f"{address}:{self.port}") as channel:
            for service in _SERVICES:
                try:
                    channel.unary_unary(f"/ray.rpc.{service}")(b"", timeout=5, metadata=metadata)
                    found[service] = "OK"
                except grpc.RpcError as error:
                    found[service] = error.code().name
                if found[service] in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):  # it speaks something else
                    break
        return found

    def page(self, method: str, path: str) -> tuple[int, bytes]:
        """What an HTTP request without a token gets; status 0 where no HTTP is spoken."""
        address = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        connection = http.client.HTTPConnection(address, self.port, timeout=5)
        try:
            connection.request(method, path, headers={"Host": "elsewhere.example"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def listeners(pid: int) -> Iterator[Listener]:
    """All listening sockets of a process and of those that it has started."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            command = " ".join(one.cmdline())
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield Listener(connection.laddr.ip, connection.laddr.port, command)


@dataclass(frozen=True)
class Ran:
    """A sweep on Ray with secrets all around it, and what could be seen while it ran."""

    small: Small
    places: tuple[Path, ...]  # folders where something may have been written down
    unguarded: dict[str, dict[str, str]]  # open listeners: what their services answer without a token
    guarded: dict[str, dict[str, str]]  # the same with it
    pages: dict[str, tuple[int, bytes]]  # open listeners that speak HTTP
    orders: dict[str, list[int]]  # their answers to requests that would change something
    others: tuple[Listener, ...]  # those on loopback


@pytest.fixture(scope="module")
def ran(template: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("secrets")
    home, state = folder / "home", folder / "server"
    home.mkdir()
    state.mkdir()
    ray_folder = Path(tempfile.mkdtemp(prefix="r"))  # of a short name: sockets lie in it
    small = drivers.prepared(folder / "sweep", template, resources={"cpus": 1})
    environment = {**SECRETS, "HOME": str(home), "RAY_TMPDIR": str(ray_folder), PAUSE: "0.6"}
    with server(state) as port:
        driver = drivers.begin_on_ray(
            small,
            environment,
            train="tests.reliability.paced:run",
            tracking_uri=f"http://somebody:{URI_PASSWORD}@127.0.0.1:{port}",
        )
        try:
            wait_for(lambda: reported(small.root) >= 4 or driver.poll() is not None)
            assert driver.poll() is None, drivers.output(small)
            found = list(listeners(driver.pid))
            token = (home / ".ray" / "auth_token").read_text()
            open_ones = {f"{one.port} {one.command[:80]}": one for one in found if one.is_open}
            paths = ("/", "/get_or_create_runtime_env", "/api/jobs/")
            orders = list(itertools.product(("POST", "PUT", "DELETE"), paths))
            seen: dict[str, Any] = {
                "unguarded": {name: one.answers(None) for name, one in open_ones.items()},
                "guarded": {name: one.answers(token) for name, one in open_ones.items() if "ObjectManager" not in name},
                "pages": {name: one.page("GET", "/") for name, one in open_ones.items()},
                "orders": {name: [one.page(*order)[0] for order in orders] for name, one in open_ones.items()},
                "others": tuple(one for one in found if not one.is_open),
            }
            assert driver.wait(180) == 0, drivers.output(small)
        finally:
            driver.kill()
            driver.wait()
    yield Ran(small, (small.folder, state, ray_folder, home), **seen)


def test_no_secret_is_written_down(ran: Ran) -> None:
    """In no file: ledger, databases, artifacts, logs of the sweep, of its trials, of Ray and of the server, reports."""
    secrets = [value.encode() for value in (*SECRETS.values(), URI_PASSWORD) if value]
    files = [path for place in ran.places for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"ledger.db", "mlflow.db", "report.html", "log.txt", "output.txt", "gcs_server.out", "raylet.out"} <= names
    found = [(str(path), secret) for path in files for secret in secrets if secret in path.read_bytes()]
    assert found == []


def test_the_secret_that_was_used_was_used(ran: Ran) -> None:
    """The tracking server got its runs through the URI with the password."""
    runs = (ran.places[1] / "mlflow.db").read_bytes()
    assert b"deit3 nano reg2 seed0" in runs


def test_what_others_can_reach_asks_for_a_token(ran: Ran) -> None:
    """Ray's services listen on all interfaces; each of them refuses whoever does not show the token."""
    answers = {name: set(answered.values()) for name, answered in ran.unguarded.items()}
    assert not any("OK" in answered for answered in answers.values()), ran.unguarded
    services = [name for name, answered in answers.items() if "UNAUTHENTICATED" in answered]
    assert len(services) >= 4, "of the head, of the node, and of processes that run something"
    with_token = {code for name in services for code in ran.guarded[name].values()}
    assert "OK" in with_token, "the same calls are answered to those who show it"
    no_service = set(answers) - set(services)
    for name in no_service:
        status, content = ran.pages[name]
        is_refused, counts = status in (401, 403), status == 200 and content.startswith(b"# HELP ")
        assert is_refused or counts, f"{name} is open to others and answers {status} {content[:60]!r}"
        assert all(code in (0, 401, 403, 404, 405) or counts for code in ran.orders[name]), ran.orders[name]


def test_what_others_can_reach_is_rays_own(ran: Ran) -> None:
    ours = [name for name in ran.pages if "mlflow" in name]
    assert ours == []


def test_pages_of_counters_say_no_secret(ran: Ran) -> None:
    said = b"".join(content for _, content in ran.pages.values())
    assert not any(value.encode() in said for value in (*SECRETS.values(), URI_PASSWORD) if value)


def test_the_token_is_the_users_alone(ran: Ran) -> None:
    path = ran.places[3] / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
