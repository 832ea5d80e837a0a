"""The token by which Ray's processes know each other: one file that only its user can read."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # as Ray's token loader reads them


def ray_token() -> None:
    """See to it that Ray has a token and asks for it, before a cluster is started here; what the user set stays.

    Ray makes the file readable by everyone under the usual umask. Where none can be written, this process and the
    cluster that it starts have a token of their own in their environment.
    """
    if os.environ.get(_MODE, "token").lower() != "token":
        return
    if _TOKEN not in os.environ:
        try:
            _make(token_file())
        except OSError as error:
            log.warning("%s cannot be written (%s); this cluster gets a token of its own", token_file(), error)
            os.environ[_TOKEN] = secrets.token_hex(32)
    _ask_for_it()


def use_ray_token() -> None:
    """Show the user's token, if there is one, to a cluster that is connected to; what the user set stays."""
    if _MODE in os.environ:
        return
    path = token_file()
    if _TOKEN in os.environ or path.is_file():
        if path.is_file():
            _tighten(path)
        _ask_for_it()


def token_file() -> Path:
    """Where Ray looks for a token: $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    named = os.environ.get(_PATH)
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def _make(path: Path) -> None:
    """A file with a token at `path`, whole or not at all; an existing one keeps its token and is tightened.

    Of several processes at once, one makes it and all have the same.
    """
    if path.is_file() and path.stat().st_size:
        _tighten(path)
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.stat().st_size:
            path.unlink()  # an empty one is none
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    _tighten(path)


def _tighten(path: Path) -> None:
    """Only the user reads the file, and only the user enters Ray's own folder in the home directory."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        if path.parent == Path.home() / ".ray" and path.parent.stat().st_mode & 0o077:
            path.parent.chmod(0o700)
    except OSError as error:  # mounted read-only, say
        log.warning("the token in %s is readable by others, and that cannot be changed: %s", path, error)


def _ask_for_it() -> None:
    """Set the mode, also in a Ray that is loaded already and has read it."""
    if os.environ.get(_MODE) is None:
        os.environ[_MODE] = "token"
        core: Any = sys.modules.get("ray._raylet")
        if core is not None:
            core.Config.initialize("")
