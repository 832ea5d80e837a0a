"""The token file: who may read it, that all have the same one, and what the user set stays."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.ray_token import ray_token, token_file, use_ray_token


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of one's own, nothing set, and the usual umask."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    before = os.umask(0o022)
    yield tmp_path / "home"
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_that_only_its_user_can_read(home: Path) -> None:
    ray_token()
    path = home / ".ray" / "auth_token"
    assert len(path.read_text()) == 64
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == ["auth_token"]
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_existing_token_is_kept_and_tightened(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o755)
    path.write_text("a" * 64)
    assert mode(path) == 0o644
    ray_token()
    assert path.read_text() == "a" * 64
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)


def test_an_empty_token_is_none(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch()
    ray_token()
    assert len(path.read_text()) == 64


def test_all_processes_that_start_at_once_have_the_same_token(home: Path) -> None:
    code = "from orchestrator.ray_token import *; ray_token(); print(token_file().read_text())"

    def start(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(8)))) == 1
    assert [entry.name for entry in (home / ".ray").iterdir()] == ["auth_token"]


def test_what_the_user_set_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_token()
    use_ray_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert not (home / ".ray").exists()
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    ray_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert not (home / ".ray").exists()


def test_a_token_elsewhere_is_used_and_its_folder_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mounted" / "token"
    path.parent.mkdir(mode=0o755)
    path.write_text("b" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert token_file() == path
    use_ray_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert (mode(path), mode(path.parent)) == (0o600, 0o755)


def test_connecting_without_a_token_asks_for_none(home: Path) -> None:
    use_ray_token()
    assert "RAY_AUTH_MODE" not in os.environ
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_written_gives_a_token_in_the_environment(home: Path) -> None:
    (home / ".ray").write_text("a file where the folder should be")
    ray_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.slow
def test_ray_asks_for_the_token_that_was_made(home: Path) -> None:
    start = (
        "from orchestrator.ray_token import ray_token; ray_token(); import ray; "
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False); "
        "from ray._private.authentication.authentication_utils import is_token_auth_enabled; "
        "print(is_token_auth_enabled()); ray.shutdown()"
    )
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True"], done.stderr
    assert mode(home / ".ray" / "auth_token") == 0o600
