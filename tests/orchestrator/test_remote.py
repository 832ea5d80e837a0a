"""Whole objects in a real S3-compatible server and in a folder: puts, pulls, lists, faults."""

import errno
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from orchestrator.remote import Remote, checked, is_remote
from tests.orchestrator.object_store import Store, running_store

MIB = 2**20


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as started:
        yield started


@pytest.fixture(params=["s3", "file"])
def remote(request: pytest.FixtureRequest, store: Store, tmp_path: Path) -> Remote:
    """An empty place of each kind: one where objects appear by themselves, one where a rename makes them."""
    if request.param == "s3":
        return Remote(store.uri(uuid.uuid4().hex), delays=())
    return Remote((tmp_path / "far").as_uri(), delays=())


def test_objects_come_back_as_they_were(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB: several parts
    remote.push(tmp_path / "in", "a/big")
    remote.put("a/empty", b"")
    remote.pull("a/big", tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out").read_bytes() == (tmp_path / "in").read_bytes()
    assert remote.read("a/empty") == b""
    assert remote.exists("a/big") and not remote.exists("a/bi") and not remote.exists("a")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_lists_are_of_what_lies_below(remote: Remote) -> None:
    for key in ("s/trials/1/result.json", "s/trials/2/x", "s/plan.json", "t/plan.json"):
        remote.put(key, key.encode())
    assert remote.sizes("s/trials") == {"s/trials/1/result.json": 22, "s/trials/2/x": 12}
    assert set(remote.sizes()) == {"s/trials/1/result.json", "s/trials/2/x", "s/plan.json", "t/plan.json"}
    assert remote.folders() == ["s", "t"]
    assert remote.folders("s/trials") == ["1", "2"]
    assert remote.sizes("nothing") == {} and remote.folders("nothing") == []


def test_a_put_replaces_and_a_removal_may_be_repeated(remote: Remote) -> None:
    remote.put("a", b"old")
    remote.put("a", b"new")
    assert remote.read("a") == b"new"
    remote.remove("a")
    remote.remove("a")
    assert not remote.exists("a")


def test_what_is_not_there_is_said_without_a_file_being_made(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        remote.pull("nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        remote.push(tmp_path / "absent", "a")
    assert list(tmp_path.glob("out*")) == list(tmp_path.glob(".out*")) == []
    assert remote.sizes() == {}


def test_what_our_own_side_cannot_read_to_its_end_leaves_no_part_of_it(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: IO[bytes]) -> Iterator[bytes]:
        yield file.read(5)
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr("orchestrator.remote._chunks", broken)
    (tmp_path / "in").write_bytes(b"0123456789")
    with pytest.raises(OSError, match="the disk is broken"):
        remote.push(tmp_path / "in", "a")
    assert remote.sizes() == {}


@pytest.mark.parametrize("key", ["../a", "/etc/passwd", "a/../../b"])
def test_no_key_leaves_its_place(remote: Remote, key: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        remote.put(key, b"")


def test_ages_are_by_the_clock_of_the_store(remote: Remote) -> None:
    remote.put("a", b"")
    remote.put("b", b"")
    assert 0 <= remote.age("a", "b") <= 1.0
    with pytest.raises(FileNotFoundError):
        remote.age("a", "c")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@bucket/x",
        "s3://bucket/x?secret_key=hunter2",
        "abfs://c@a.dfs.core.windows.net/x?sig=hunter2",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="from the environment") as refused:
        checked(uri)
    assert "hunter2" not in str(refused.value)


def test_a_container_in_a_uri_is_no_secret() -> None:
    uri = "abfs://container@account.dfs.core.windows.net/x"
    assert checked(uri) == uri


def test_an_unknown_kind_of_storage_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        Remote("s4://bucket/x")
    assert is_remote("s3://b/x") and not is_remote("runs") and not is_remote("/a:b/c")


def test_a_bucket_that_is_not_there_is_said_at_once(store: Store) -> None:
    remote = Remote(store.uri("x").replace("s3://trials", "s3://nobody"), delays=(20.0,))
    began = time.monotonic()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        remote.put("a", b"")
    assert time.monotonic() - began < 20, "there is no second try"


class Cutting:
    """Passes bytes on to the store and cuts every connection once `most` bytes have gone up."""

    def __init__(self, upstream: int, most: int) -> None:
        self._upstream, self._left = upstream, most
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                down, _ = self._listener.accept()
            except OSError:
                return
            up = socket.create_connection(("127.0.0.1", self._upstream))
            threading.Thread(target=self._pass, args=(down, up, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(up, down, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while chunk := source.recv(65_536):
                if counted:
                    self._left -= len(chunk)
                    if self._left < 0:
                        break
                target.sendall(chunk)
        except OSError:
            pass
        finally:
            for end in (source, target):
                end.close()


@pytest.mark.slow
def test_an_upload_that_the_network_cuts_leaves_the_old_object(store: Store, tmp_path: Path) -> None:
    prefix = uuid.uuid4().hex
    direct = Remote(store.uri(prefix), delays=())
    direct.put("checkpoint", b"old")
    (tmp_path / "big").write_bytes(b"x" * 24 * MIB)
    proxy = Cutting(store.port, most=12 * MIB)
    try:
        with pytest.raises(OSError, match="checkpoint"):
            Remote(store.uri(prefix, proxy.port), delays=()).push(tmp_path / "big", "checkpoint")
    finally:
        proxy.close()
    assert direct.read("checkpoint") == b"old"


PUSH = """
import sys
from pathlib import Path
from orchestrator.remote import Remote
Remote(sys.argv[1]).push(Path(sys.argv[2]), "k")
"""


@pytest.mark.parametrize("place", ["s3", "file"])
def test_an_upload_of_a_killed_process_leaves_no_object(place: str, store: Store, tmp_path: Path) -> None:
    uri = store.uri(uuid.uuid4().hex) if place == "s3" else (tmp_path / "far").as_uri()
    pipe = tmp_path / "pipe"
    subprocess.run(["mkfifo", str(pipe)], check=True)
    process = subprocess.Popen([sys.executable, "-c", PUSH, uri, str(pipe)])
    with pipe.open("wb") as file:
        file.write(b"x" * 20 * MIB)  # two chunks of 8 MiB are on their way once this returns
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert Remote(uri, delays=()).sizes() == {}


def _soon(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


@pytest.mark.slow
def test_a_store_that_comes_back_gets_what_was_tried_meanwhile(tmp_path: Path) -> None:
    with running_store() as store:
        remote = Remote(store.uri("x"), delays=(0.5, 0.5))
        remote.put("before", b"1")
        store.stop()
        back = _soon(8.0, store.start)  # pyarrow itself tries for 6 s
        try:
            remote.put("after", b"2")
        finally:
            back.join()
        assert remote.sizes() == {"before": 1, "after": 1}
        store.stop()
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            Remote(store.uri("x"), delays=()).read("before")
