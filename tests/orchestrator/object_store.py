"""A real S3-compatible server on loopback, moto's, that tests can stop and start again."""

import contextlib
import logging
import socket
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "trials"


class Store:
    """A server with one bucket; what it holds outlives a stop."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._server: ThreadedMotoServer | None = None

    def uri(self, prefix: str, port: int | None = None) -> str:
        """The storage URI of a prefix in the bucket, by way of `port` where one is given."""
        endpoint = f"127.0.0.1:{port or self.port}"
        return f"s3://{BUCKET}/{prefix}?scheme=http&endpoint_override={endpoint}&region=us-east-1"

    def start(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """A store that answers, with its bucket, and credentials for it in the environment."""
    from pyarrow import fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        store = Store()
        store.start()
        try:
            system, _ = fs.FileSystem.from_uri(store.uri("") + "&allow_bucket_creation=true")
            system.create_dir(BUCKET)
            yield store
        finally:
            store.stop()
