"""DINOv2 on several ranks, here threads: the mean over ranks is what one rank gets with the whole batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainers.test_dinov2 import IMAGES, SHARED, SOFTMAX, STEPS, batch, config, method
from trainers import distributed
from trainers.methods import Progress
from trainers.methods.dinov2 import DinoV2


class Ranks:
    """Stands for a process group whose ranks are threads."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=20)
        self._local = threading.local()
        self._held: list[Tensor] = [torch.empty(0)] * count
        monkeypatch.setattr(distributed, "world_size", lambda: count if hasattr(self._local, "rank") else 1)
        monkeypatch.setattr(distributed, "rank", lambda: getattr(self._local, "rank", 0))
        monkeypatch.setattr(distributed, "sum_", lambda tensor: self._reduce(tensor, lambda all_: all_.sum(dim=0)))
        monkeypatch.setattr(distributed, "max_", lambda tensor: self._reduce(tensor, lambda all_: all_.amax(dim=0)))

    def _reduce(self, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if not hasattr(self._local, "rank"):
            return tensor
        self._held[self._local.rank] = tensor.clone()
        self._barrier.wait()
        result = reduce(torch.stack(self._held))
        self._barrier.wait()
        return tensor.copy_(result)

    def run(self, work: Callable[[int], None]) -> None:
        def on(rank: int) -> None:
            self._local.rank = rank
            try:
                work(rank)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                self._barrier.abort()

        failures: list[BaseException] = []
        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures


@pytest.mark.parametrize(
    "settings",
    [{"model.drop_path": 0.4}, {**SOFTMAX, **SHARED}, {**SOFTMAX, "model.drop_path": 0.5, "model.drop_path_group": 4}],
)
def test_the_mean_over_two_ranks_is_the_loss_of_one_with_the_whole_batch(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and centres of two steps, on ranks that hold different numbers of masked patches."""

    def work(rows: slice) -> tuple[DinoV2, list[dict[str, Tensor]], int]:
        trained, streams = method(trial)
        trained.train()
        losses, masked = [], 0
        for step in range(2):
            views = trained.views(batch(trained, step, rows), streams)
            losses.append(trained.losses(views, Progress(step, STEPS)))
            masked += len(views["masked"])
        torch.stack([loss for each in losses for loss in each.values()]).sum().backward()
        return trained, losses, masked

    trial = config(**settings)
    ranks = Ranks(2, monkeypatch)
    whole, losses, _ = work(slice(0, IMAGES))
    parts: list[Any] = [None, None]

    def on(rank: int) -> None:
        parts[rank] = work(slice(4 * rank, 4 * rank + 4))

    ranks.run(on)
    assert parts[0][2] != parts[1][2]
    for step, each in enumerate(losses):
        for name, loss in each.items():
            torch.testing.assert_close((parts[0][1][step][name] + parts[1][1][step][name]) / 2, loss)
    others = [dict(part[0].named_parameters()) for part in parts]
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            mean = (others[0][name].grad + others[1][name].grad) / 2
            torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-6)
    for name, buffer in whole.named_buffers():
        for part in parts:
            torch.testing.assert_close(dict(part[0].named_buffers())[name], buffer)
