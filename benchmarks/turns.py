"""Taking turns: blocks of real training steps with other work between them, and a partner process that waits."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from trainers.config import TrialConfig

Side = Callable[[], float]  # works through one block; its seconds


def train_in_turns(
    config: TrialConfig,
    folder: Path,
    others: Sequence[Side],
    *,
    blocks: int,
    steps: int,
    seconds: float,
    warm_up: int = 2,
) -> list[list[float]]:
    """Seconds [1 + number of others][blocks] of `steps` steps of `trainers.train.train` and of each other side.

    Training is the real thing: it is held up where it asks, at every step, whether it should stop. A step's time so
    contains data, augmentation, forward, backward, optimiser, token statistics and all that the loop does around
    them. One block of every other side, and `warm_up` steps of training, are not counted. After `seconds` there are
    no more blocks, so that a busy machine gives fewer of them rather than later.
    """
    from trainers.train import train

    turns = _Turns(others, blocks, steps, warm_up, time.perf_counter() + seconds)
    train(config, lambda _step, _metrics: None, folder / "trial", cache=folder / "cache", should_stop=turns)
    if not turns.rows:
        raise RuntimeError(f"there was not one block in {seconds:.0f} s")
    return [list(side) for side in zip(*turns.rows, strict=True)]


class _Turns:
    """`should_stop` of a training run: counts its steps and lets the others work between blocks."""

    def __init__(self, others: Sequence[Side], blocks: int, steps: int, warm_up: int, deadline: float) -> None:
        self._others, self._blocks, self._steps, self._deadline = others, blocks, steps, deadline
        self._left = warm_up
        self._warm = False
        self._since = 0.0
        self.rows: list[list[float]] = []

    def __call__(self) -> str | None:
        if self._left == 0:
            own = time.perf_counter() - self._since
            row = [own, *(other() for other in self._others)]
            if self._warm:
                self.rows.append(row)
            self._warm = True
            if len(self.rows) == self._blocks or (self.rows and time.perf_counter() > self._deadline):
                return "stopped"
            self._left = self._steps
            self._since = time.perf_counter()
        self._left -= 1
        return None


class Partner:
    """A process of its own that works when it is told to: `serve(connection, *arguments)` is run there."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        # not daemonic: DataLoader workers and Ray may start processes there
        self._process = context.Process(target=serve, args=(there, *arguments))
        self._process.start()
        there.close()

    def turn(self, what: object = None) -> Any:
        """Let it do one piece of work; what that returned, as a rule the seconds that it took.

        Raises:
            RuntimeError: the process has died; its traceback is on the error output.
        """
        try:
            self._here.send(what)
            returned = self._here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the partner process has died") from error
        return returned

    def __enter__(self) -> Partner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._here.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def serve_turns(connection: Connection, work: Callable[[Any], Any]) -> None:
    """The other end of a Partner: `work(what)` for every turn, until it is left."""
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        connection.send(work(what))
