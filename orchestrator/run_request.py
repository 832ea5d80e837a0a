"""What a trial asks of the cluster, and how that is cut to what there is; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEAD_CPUS = 0.01  # what the thin trial itself takes of the trial's CPUs


@dataclass(frozen=True)
class Request:
    """CPUs and GPUs of all ranks of a trial together, and how many ranks there are."""

    cpus: float
    gpus: float
    ranks: int = 1

    def __str__(self) -> str:
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs{ranks}"

    def bundles(self) -> list[dict[str, float]]:
        """What the trial's placement group holds: a sliver for the thin trial, and a share for each rank."""
        cpus = max(self.cpus / self.ranks - HEAD_CPUS, HEAD_CPUS)
        rank = {"CPU": round(cpus, 4), "GPU": self.gpus / self.ranks}
        return [{"CPU": HEAD_CPUS}, *[{name: n for name, n in rank.items() if n > 0}] * self.ranks]


def clip(request: Request, nodes: Sequence[Mapping[str, Any]]) -> Request:
    """`request` cut so that each rank fits on some node, and all of them on the cluster.

    A rank's share is cut to the largest node: of a request for GPUs the one with most GPUs, else with most CPUs. Where
    the cluster has fewer GPUs than ranks, there are as many ranks as GPUs. Where all ranks do not fit at once, each
    has fewer CPUs: a placement group that never fits would wait for ever.
    """

    def size(node: Mapping[str, Any]) -> tuple[float, float]:
        return (node.get("GPU", 0.0) if request.gpus else 0.0, node.get("CPU", 0.0))

    largest = max(nodes, key=size, default={"CPU": 1.0})
    kind = "GPU" if request.gpus >= 1 else "CPU"
    places = sum(int(node.get(kind, 0.0)) for node in nodes)
    ranks = max(1, min(request.ranks, places)) if request.ranks > 1 else 1
    cpus = min(request.cpus / request.ranks, max(largest.get("CPU", 1.0), 0.1))
    gpus = min(request.gpus / request.ranks, largest.get("GPU", 0.0))
    shares = {cpus, *(node.get("CPU", 0.0) / k for node in nodes for k in range(1, ranks + 1))}
    fitting = (share for share in sorted(shares, reverse=True) if 0 < share <= cpus)
    cpus = next((share for share in fitting if _places(nodes, share, gpus) >= ranks), cpus)
    return Request(cpus=cpus * ranks, gpus=gpus * ranks, ranks=ranks)


def _places(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many ranks of so many CPUs and GPUs find room at once."""
    wanted = {"CPU": cpus, "GPU": gpus}
    return sum(min(int(node.get(name, 0.0) / n + 1e-9) for name, n in wanted.items() if n > 0) for node in nodes)
