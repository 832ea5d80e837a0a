"""One optimiser step: everything that a step changes, its losses, and what it tells of token norms; never waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers import distributed, optim, vit
from trainers.config import TrialConfig
from trainers.methods import Batch, Method, Progress, Views
from trainers.streams import Streams
from trainers.tokens.stream import TrainingStream

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Method, optimiser, loss scale and averaged weights, moved by one step at a call.

    With several ranks PyTorch's DistributedDataParallel averages the gradients.
    """

    def __init__(self, config: TrialConfig, method: Method, streams: Streams, device: torch.device) -> None:
        self.config, self.method, self.streams, self.device = config, method, streams, device
        self.backbone = method.backbone
        self.optimizer = optim.build_optimizer(method, config.optim)
        decay = cast("float | None", config.optim.ema_decay)
        self.ema = None if decay is None else optim.EMA(self.backbone, decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.token_stream = self._build_token_stream()
        self._losses = self._parallel(method)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def _build_token_stream(self) -> TrainingStream | None:
        if not (self.config.tokens.training_stream and isinstance(self.backbone, vit.ViT)):
            return None
        return TrainingStream(self.backbone.depth + 1, self.backbone.num_registers, self.device)

    def _parallel(self, method: Method) -> nn.Module:
        if distributed.world_size() == 1:
            return method
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are equal on all ranks by construction, since methods reduce what they hold in them.
        return DistributedDataParallel(method, device_ids=devices, forward_sync_buffers=False)

    def __call__(self, parts: Sequence[Batch], step: int) -> None:
        """The step after `step` steps, on the micro-batches `parts` of this rank."""
        settings = self.config.optim
        progress = Progress(step, settings.steps, 0, len(parts))
        scale = self.method.last_layer_lr_scale(progress)
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, settings), scale)
        optim.set_weight_decay(self.optimizer, optim.weight_decay(step, settings))
        for part, views in enumerate(self._views(parts, progress)):
            self._backward(views, Progress(step, settings.steps, part, len(parts)))
        self.scaler.unscale_(self.optimizer)
        self.method.before_update(progress)
        if settings.clip_grad is not None:
            self.method.clip_gradients(settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.backbone)
        self.method.after_step(progress)
        self._steps += 1

    def _views(self, parts: Sequence[Batch], progress: Progress) -> Iterator[Views]:
        """Views of each micro-batch, made when they are used unless the method has to see all of them first."""
        made = (self.method.views(part, self.streams) for part in parts)
        if len(parts) == 1 or self.method.accumulation == "mean":
            yield from made
            return
        if self.method.accumulation == "none":
            raise ValueError(f"method {self.config.method} cannot accumulate: its losses couple the whole batch")
        kept = list(made)
        with self._autocast():
            self.method.remember(kept, progress)
        yield from kept

    def _backward(self, views: Views, progress: Progress) -> None:
        last = progress.part == progress.parts - 1
        with self._unsynced() if not last else nullcontext():
            with self._tapped(), self._autocast():
                losses = self._losses(views, progress)
            total = torch.stack(list(losses.values())).sum()
            divisor = progress.parts if self.method.accumulation == "mean" else 1
            self.scaler.scale(total / divisor).backward()  # type: ignore[no-untyped-call]
        for name, loss in {"loss": total, **(losses if len(losses) > 1 else {})}.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach() / progress.parts

    def _unsynced(self) -> AbstractContextManager[Any]:
        parallel = self._losses
        return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        """Adds the token norms of the forward pass inside to the statistics of the training stream."""
        if self.token_stream is None:
            yield
            return
        backbone = cast(vit.ViT, self.backbone)
        norms: list[Tensor] = []
        backbone.tap = lambda _, x_BTD: norms.append(
            torch.linalg.vector_norm(x_BTD.detach(), dim=-1, dtype=torch.float32)
        )
        try:
            yield
        finally:
            backbone.tap = None
        self.token_stream.update(torch.stack(norms))

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self.config.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.precision != "fp32")

    def take_losses(self) -> dict[str, float]:
        """Mean losses of all ranks since they were last taken, in one transfer."""
        names = list(self._sums)
        mean = distributed.mean_(torch.stack([self._sums[name] for name in names]) / self._steps)
        self._sums, self._steps = {}, 0
        return {f"train/{name}": value for name, value in zip(names, mean.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on; with several ranks every rank must call this, and the first's counts."""
        if self.token_stream is not None:
            self.token_stream.reduce_to_first()
        sums = {name: distributed.mean_(loss.clone()) for name, loss in self._sums.items()}
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "token_stream": None if self.token_stream is None else self.token_stream.state_dict(),
            "losses": (sums, self._steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with any number of ranks."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.scaler.load_state_dict(state["scaler"])
        if self.token_stream is not None and distributed.rank() == 0:
            self.token_stream.load_state_dict(state["token_stream"])
        sums, self._steps = state["losses"]
        self._sums = {name: value.to(self.device) for name, value in sums.items()}
