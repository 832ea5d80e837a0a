"""Drivers of small sweeps in forked processes that have everything imported, and that kill themselves where told."""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, _GeneratorContextManager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from tests.orchestrator.sweeps import Small
from tests.orchestrator.sweeps import environment as user_environment

# Imported once, by the process that all drivers are forked from.
_PRELOADED = (
    *("torch", "timm", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "pyarrow.parquet", "matplotlib.pyplot"),
    *("pytest", "pandas", "sklearn.linear_model", "scipy.stats"),
    *("orchestrator.driver", "orchestrator.tracking", "trainers.train", "analysis.run", "analysis.report"),
)


@dataclass(frozen=True)
class Point:
    """A place in the program: just before or after the n-th call of a function, counted from the driver's start.

    Of a function that gives a context, `after` is when the block has ended, and `inside` just before.
    """

    function: str  # "module:function" or "module:Class.method", where the caller looks it up
    when: Literal["before", "inside", "after"] = "after"
    call: int = 1

    def __str__(self) -> str:
        module, _, name = self.function.partition(":")
        return f"{self.when}-{module.rpartition('.')[2]}.{name}-{self.call}"


@dataclass(frozen=True)
class Start:
    """All that a forked driver needs to know."""

    file: str
    storage: str
    output: str
    point: Point | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    setup: str | None = None  # "module:function", called before the driver with the folder of the sweep file
    environment: Mapping[str, str] = field(default_factory=dict)


def begin(
    small: Small,
    point: Point | None = None,
    *,
    setup: str | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> BaseProcess:
    """Start an in-process driver of `small`'s sweep; it dies by SIGKILL at `point`, if it gets there."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would have pytest's threads and locks
    context.set_forkserver_preload(list(_PRELOADED))
    said = str(small.folder / "output.txt")
    start = Start(str(small.folder / "small.yaml"), str(small.storage), said, point, options, setup, environment or {})
    process = context.Process(target=_drive, args=(start,))
    process.start()
    return process


def drive(small: Small, point: Point | None = None, **settings: Any) -> int:
    """The exit code of a driver of `small`'s sweep, -9 where it was killed; `settings` as `begin` takes them."""
    process = begin(small, point, **settings)
    process.join(180)
    assert process.exitcode is not None, "the driver did not end"
    return process.exitcode


def template(folder: Path) -> Small:
    """A storage in which data are decoded and MLflow has its tables, which takes longer than a small sweep."""
    small = Small(folder, steps=8)
    small.write(seeds=[0])
    code = drive(small, Point("orchestrator.tracking_store:Store.__init__"))
    assert code == -9, output(small)
    return small


def prepared(folder: Path, template: Small, **changes: Any) -> Small:
    """The sweep of `template` in `folder`, with data decoded and MLflow's schema made, and nothing else."""
    small = Small(folder, template.steps, template.registers)
    small.write(**{"seeds": [0], **changes})
    shutil.copytree(template.storage / "cache", small.storage / "cache")
    shutil.copy(template.storage / "mlflow.db", small.storage)
    return small


def output(small: Small) -> str:
    """What the last forked driver of `small` has written on its standard streams."""
    return (small.folder / "output.txt").read_text()


def _drive(start: Start) -> None:
    descriptor = os.open(start.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(start.environment)
    from orchestrator import driver

    if start.setup is not None:
        _resolve(start.setup)(Path(start.file).parent)
    if start.point is not None:
        die_at(start.point)
    folder = Path(start.storage)
    own = {"file": Path(start.file), "storage": folder, "state": folder, "in_process": True, "quiet": True}
    code = driver.sweep(driver.Options(**{**own, **start.options}))
    sys.stdout.flush()
    os._exit(code)


def begin_on_ray(small: Small, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a driver of `small`'s sweep that runs trials on a Ray of its own; a process group of its own too."""
    root = str(Path(__file__).parents[2])
    code = "import sys; from tests.reliability.drivers import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(small.folder / "small.yaml"), str(small.storage), json.dumps(options)]
    with (small.folder / "output.txt").open("a") as said:
        return subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**user_environment(), "PYTHONPATH": root, **environment},
        )


def main(file: str, storage: str, options: str) -> None:
    """What `begin_on_ray` runs."""
    from orchestrator import driver

    asked = {"quiet": True, **json.loads(options)}
    raise SystemExit(driver.sweep(driver.Options(file=Path(file), storage=Path(storage), state=Path(storage), **asked)))


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def die_at(point: Point) -> None:
    """From now on this process ends itself by SIGKILL at `point`."""
    module, _, path = point.function.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    real, calls, lock = getattr(owner, name), iter(range(1, 1_000_000)), threading.Lock()

    @functools.wraps(real)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with lock:
            is_here = next(calls) == point.call
        if is_here and point.when == "before":
            die()
        result = real(*arguments, **named)
        if is_here and isinstance(result, _GeneratorContextManager):
            return _DiesAtItsEnd(result, point.when)
        if is_here:
            die()
        return result

    setattr(owner, name, wrapped)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class _DiesAtItsEnd(AbstractContextManager[Any]):
    """A context that ends as the real one does, and the process just before or after it."""

    def __init__(self, real: AbstractContextManager[Any], when: str) -> None:
        self._real, self._when = real, when

    def __enter__(self) -> Any:
        return self._real.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._when == "inside":
            die()
        self._real.__exit__(*error)
        die()
