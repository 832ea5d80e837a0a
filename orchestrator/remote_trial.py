"""What of a trial travels between its local folder and remote storage: attempts, checkpoints, records, results."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.layout import TrialLayout
from orchestrator.publish import RECORDS
from orchestrator.remote import Remote, StorageAway
from trainers.checkpoint_files import CHECKSUM, by_step, checksum_path, is_name, name_of

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks for new checkpoints
_GENERATION = "generation"  # changes when a trial is run anew: what lies elsewhere of an earlier one is void


@dataclass(frozen=True)
class Mirror:
    """A local storage folder and the remote place that it stands for: the same names below both."""

    remote: Remote
    root: Path

    @classmethod
    def of_trial(cls, remote: Remote, trial: TrialLayout) -> Mirror:
        """The mirror that a trial's folder, ROOT/SWEEP/trials/ID, lies in."""
        return cls(remote, trial.root.parents[2])

    def key(self, local: Path) -> str:
        """The key of a local path."""
        return local.relative_to(self.root).as_posix()

    def local(self, key: str) -> Path:
        """The local path of a key."""
        return self.root / key

    def push(self, local: Path) -> None:
        """Copy a local file to its key."""
        self.remote.push(local, self.key(local))

    def pull_missing(self, keys: Iterable[str]) -> list[Path]:
        """Copy the objects of these keys that have no local file; the paths of what was copied.

        A local file stays as it is: where both differ, it is the one that was not pushed yet.
        """
        absent = [key for key in sorted(keys) if not self.local(key).is_file()]
        for key in absent:
            self.remote.pull(key, self.local(key))
        return [self.local(key) for key in absent]


# Attempts


def begin_attempt(
    trial: TrialLayout, remote: str | None, above: int, leaving: Callable[[], bool] = lambda: False
) -> int | None:
    """Claim the next number of an attempt, among all machines where the trial's storage is remote (its URI).

    While the store is away it waits; None once `leaving` is true meanwhile.

    Raises:
        OSError: the store does not let us in.
    """
    if remote is None:
        return trial.begin_attempt(above)
    mirror = Mirror.of_trial(Remote(remote, delays=()), trial)
    while True:
        try:
            return claim(mirror, trial, above)
        except StorageAway as error:
            log.warning("an attempt waits for its storage: %s", error)
            time.sleep(LOOK_SECONDS)
            if leaving():  # after a pause, since one that was told to stop is given out again until it can say so
                return None


def travel(
    trial: TrialLayout, remote: str | None, number: int, rank: int = 0
) -> contextlib.AbstractContextManager[None]:
    """`attempt` where the trial's storage is remote (its URI); else nothing."""
    if remote is None:
        return contextlib.nullcontext()
    return attempt(Mirror.of_trial(Remote(remote), trial), trial, number, rank)


def claim(mirror: Mirror, trial: TrialLayout, above: int) -> int:
    """The next number of an attempt, which no other process gets, on whichever machine; its local folder is made.

    Stores have no exclusive create. So each process puts a marker of its own and then lists: who sees no other's has
    the number, since of two processes the later to list sees both.
    """
    mine = f"begun-{uuid.uuid4().hex}"
    number = max([above, *trial.attempts(), *_begun(mirror, trial)])
    while True:
        number += 1
        folder = mirror.key(trial.attempt(number))
        mirror.remote.put(f"{folder}/{mine}", b"")
        if [key.rpartition("/")[2] for key in mirror.remote.sizes(folder)] == [mine]:
            trial.attempt(number).mkdir(parents=True, exist_ok=True)
            return number
        time.sleep(random.uniform(0.0, 0.2))  # two that saw each other both go on


def _begun(mirror: Mirror, trial: TrialLayout) -> list[int]:
    names = mirror.remote.folders(mirror.key(trial.attempt(0).parent))
    return [int(name) for name in names if name.isdigit()]


@contextlib.contextmanager
def attempt(mirror: Mirror, trial: TrialLayout, number: int, rank: int = 0) -> Iterator[None]:
    """One rank's attempt: the newest checkpoint is here before, and the first rank's files are there after.

    Raises:
        OSError: the store does not answer. What the attempt computed is then not accepted, and it is tried again.
    """
    trial.attempt(number).mkdir(parents=True, exist_ok=True)
    pull_checkpoint(mirror, trial)
    if rank == 0:
        with Uploader(mirror, trial, number):
            yield
        return
    try:
        yield
    finally:
        _push_files(mirror, [trial.log(number, rank)])


class Uploader:
    """A thread that pushes each new checkpoint of an attempt and removes those that it replaces; records at the end."""

    def __init__(self, mirror: Mirror, trial: TrialLayout, number: int, look_seconds: float = LOOK_SECONDS) -> None:
        self._mirror, self._trial, self._number = mirror, trial, number
        self._look_seconds = look_seconds
        self._folder = trial.attempt(number) / "checkpoints"
        self._pushed: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="uploader", daemon=True)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._push_checkpoints()
        folder = self._trial.attempt(self._number)
        _push_files(self._mirror, [*_records(folder), self._trial.log(self._number)])

    def _watch(self) -> None:
        while not self._over.wait(self._look_seconds):
            try:
                if self._push_checkpoints():
                    _push_files(self._mirror, [self._trial.log(self._number)])
            except OSError as error:  # tried again at the next look, and at the end where it counts
                log.warning("a checkpoint could not be copied: %s", error)

    def _push_checkpoints(self) -> bool:
        """Push what is new, newest first, then remove what is gone here; whether anything was new."""
        here = _checkpoints(self._folder)
        new = [path for path in here if path.name not in self._pushed]
        for path in new:
            with contextlib.suppress(FileNotFoundError):  # replaced by a newer one meanwhile
                self._push_checkpoint(path)
        gone = self._pushed - {path.name for path in _checkpoints(self._folder)}
        for name in gone - {max(self._pushed, default="")}:  # the newest stays until a newer one is there
            _remove_checkpoint(self._mirror, self._mirror.key(self._folder / name))
            self._pushed.discard(name)
        return bool(new)

    def _push_checkpoint(self, path: Path) -> None:
        """Push by second names of both files, which last when training replaces the checkpoint meanwhile."""
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".upload-") as held:
            for source in (checksum_path(path), path):
                os.link(source, Path(held) / source.name)
            for source in (checksum_path(path), path):  # in this order: without a checksum it counts as damaged
                self._mirror.remote.push(Path(held) / source.name, self._mirror.key(source))
        self._pushed.add(path.name)


def _push_files(mirror: Mirror, files: Sequence[Path]) -> None:
    for path in files:
        if path.is_file():
            mirror.push(path)


def _records(folder: Path) -> list[Path]:
    return sorted(path for pattern in RECORDS for path in folder.glob(pattern) if path.is_file())


# Checkpoints


def pull_checkpoint(mirror: Mirror, trial: TrialLayout) -> Path | None:
    """Have the newest whole checkpoint of any attempt in the local folder; its path, or None where there is none.

    One whose bytes do not have the checksum beside it is passed over for the one before. Checkpoints of an earlier
    generation of the trial, left on this machine, are removed. Ranks on one machine wait for each other.
    """
    trial.root.mkdir(parents=True, exist_ok=True)
    with (trial.root / ".pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = mirror.remote.sizes(mirror.key(trial.root))
        _drop_other_generations(mirror, trial, sizes)
        for key in _newest_first(sizes):
            if (path := _whole_here(mirror, trial, key)) is not None:
                return path
    return None


def pull_step(mirror: Mirror, trial_id: str, step: int | None = None) -> Path | None:
    """Have a checkpoint of another trial here, of `step` or the newest, whichever sweep it belongs to; its path."""
    for sweep in mirror.remote.folders():
        trial = TrialLayout(mirror.root / sweep / "trials" / trial_id)
        for key in _newest_first(mirror.remote.sizes(mirror.key(trial.root))):
            wanted = step is None or key.endswith(f"/{name_of(step)}")
            if wanted and (path := _whole_here(mirror, trial, key)) is not None:
                return path
    return None


def _newest_first(sizes: Collection[str]) -> list[str]:
    """Keys of checkpoints that have a checksum, newest step first."""
    found = [key for key in sizes if is_name(key.rpartition("/")[2]) and key + CHECKSUM in sizes]
    return sorted(found, key=lambda key: key.rpartition("/")[2], reverse=True)


def _whole_here(mirror: Mirror, trial: TrialLayout, key: str) -> Path | None:
    """The local file with the content of a remote checkpoint, pulled where need be, or None if that is damaged."""
    path = mirror.local(key)
    try:
        checksum = mirror.remote.read(key + CHECKSUM)
        for folder in trial.checkpoint_folders():
            if (folder / path.name).is_file() and _fits(folder / path.name, checksum):
                return folder / path.name
        mirror.remote.pull(key + CHECKSUM, checksum_path(path))
        mirror.remote.pull(key, path)
    except FileNotFoundError:  # whoever owns it has just replaced it
        return None
    if _fits(path, checksum):
        return path
    log.warning("checkpoint %s in %s is damaged; the one before is used", key, mirror.remote)
    path.unlink()
    checksum_path(path).unlink(missing_ok=True)
    return None


def _fits(path: Path, checksum: bytes) -> bool:
    """Whether a file has the SHA-256 that a line of sha256sum gives."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return checksum.decode(errors="replace").split(" ")[0] == digest


def _drop_other_generations(mirror: Mirror, trial: TrialLayout, sizes: Collection[str]) -> None:
    key = mirror.key(trial.root / _GENERATION)
    there = mirror.remote.read(key) if key in sizes else b""
    mine = trial.root / _GENERATION
    if (mine.read_bytes() if mine.is_file() else b"") != there:
        for folder in trial.checkpoint_folders():
            shutil.rmtree(folder, ignore_errors=True)
        mine.write_bytes(there)


def _checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a local folder, newest first."""
    return [path for path in by_step([folder]) if checksum_path(path).is_file()]


def _remove_checkpoint(mirror: Mirror, key: str) -> None:
    mirror.remote.remove(key)
    mirror.remote.remove(key + CHECKSUM)


# What the driver does


def pull_attempts(mirror: Mirror, trial: TrialLayout, number: int) -> None:
    """Have the records of attempt `number` and the logs of all attempts in the local folder."""
    folder = mirror.key(trial.attempt(number)) + "/"
    keys = mirror.remote.sizes(mirror.key(trial.attempt(number).parent))
    own = [key for key in keys if key.startswith(folder) or key.endswith("/log.txt")]
    mirror.pull_missing(key for key in own if "/checkpoints/" not in key and "/begun-" not in key)


def push_published(mirror: Mirror, trial: TrialLayout) -> None:
    """Push what the driver published of a trial, the result last: it says that the rest is there."""
    _push_files(mirror, [trial.config, trial.metrics, trial.log_file, *_records(trial.root), trial.result])


def settle(mirror: Mirror, trial: TrialLayout, keep_steps: Collection[int] = ()) -> None:
    """Remove all remote checkpoints of a trial that is over but the newest and those of `keep_steps`, one of each."""
    kept: set[str] = set()
    names = {name_of(step) for step in keep_steps}
    sizes = mirror.remote.sizes(mirror.key(trial.root))
    for key in _newest_first(sizes):
        name = key.rpartition("/")[2]
        if name not in kept and (not kept or name in names):
            kept.add(name)
        else:
            _remove_checkpoint(mirror, key)


def forget(mirror: Mirror, trial: TrialLayout) -> None:
    """Remove everything remote of a trial that is run anew from its first step, the result first.

    The numbers of its attempts are not used again, as the ledger knows them.
    """
    mirror.remote.remove(mirror.key(trial.result))
    mirror.remote.put(mirror.key(trial.root / _GENERATION), uuid.uuid4().hex.encode())
    for key in mirror.remote.sizes(mirror.key(trial.root)):
        if not key.endswith(f"/{_GENERATION}"):
            mirror.remote.remove(key)
