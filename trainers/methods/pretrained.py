"""No training: weights that exist already, measured as they are, with the trial's probes and measurements."""

from __future__ import annotations

from torch import Tensor

from trainers.methods import Batch, Method, Progress, Views
from trainers.streams import Streams


class Pretrained(Method):
    """The backbone of `model.weights`, or a user's own, which the loop evaluates at step 0 and never trains."""

    def views(self, batch: Batch, streams: Streams) -> Views:
        """Nothing is trained, so nothing is seen.

        Raises:
            ValueError: always.
        """
        raise ValueError("method pretrained trains nothing; optim.steps must be 0")

    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """Nothing is learned.

        Raises:
            ValueError: always.
        """
        raise ValueError("method pretrained trains nothing; optim.steps must be 0")
