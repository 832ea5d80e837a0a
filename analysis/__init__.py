"""Published records of trials in, parquet tables, statistics, figures and a report out; and all of it in a notebook.

    import analysis

    sweep = analysis.load("runs/num_registers")
    sweep                                                # in a notebook: the answer and the table of primary metrics
    sweep.ablation                                       # a pandas DataFrame, as are runs, metrics, token_norms …
    sweep.pivot("test/linear/top1", rows=["method"])     # means, registers in the columns
    sweep.table("test/linear/top1").to_latex()
    sweep.figure("outlier_fraction")
    sweep.compare(analysis.load("runs/num_registers_again"))

Importing it is quick: what a call needs is imported when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import os

    from analysis.api import Sweep, Sweeps

__all__ = ["load", "load_mlflow"]


@overload
def load(folder: str | os.PathLike[str], /) -> Sweep: ...
@overload
def load(
    folder: str | os.PathLike[str], another: str | os.PathLike[str], /, *more: str | os.PathLike[str]
) -> Sweeps: ...
def load(*folders: str | os.PathLike[str]) -> Sweep | Sweeps:
    """What a sweep has published in its folder, such as runs/num_registers, finished or still running; or of several.

    Nothing is written but what makes the next time quicker (FOLDER/.analysis).

    Raises:
        ValueError: a folder is not a sweep's.
    """
    from analysis import api

    return api.load(folders)


def load_mlflow(uri: str, name: str, *, storage: str | None = None) -> Sweep:
    """What a sweep has tracked, from an MLflow server or database alone; token norms and maps are not there.

    Args:
        uri: MLflow's tracking URI, such as http://127.0.0.1:5000 or sqlite:///runs/mlflow.db.
        name: the sweep's name, which is that of its experiment.
        storage: where several storages have a sweep of this name, the one that is meant.

    Raises:
        ValueError: the server has no such sweep, or cannot be reached.
    """
    from analysis import api

    return api.load_mlflow(uri, name, storage)
