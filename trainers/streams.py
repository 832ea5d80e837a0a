"""Named random streams: one generator per purpose, so that what one part draws never shifts what another draws."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


class Streams:
    """Generators seeded by hash(seed, purpose); two trials with one seed share every stream of one purpose.

    All torch generators live on the CPU: tensors are drawn there and moved, so that every device sees equal draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._torch: dict[str, torch.Generator] = {}
        self._numpy: dict[str, np.random.Generator] = {}

    def seed_for(self, purpose: str) -> int:
        """A 63-bit seed for one purpose."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def torch(self, purpose: str) -> torch.Generator:
        """The CPU generator of one purpose, the same object at every call."""
        if purpose not in self._torch:
            self._torch[purpose] = torch.Generator().manual_seed(self.seed_for(purpose))
        return self._torch[purpose]

    def numpy(self, purpose: str) -> np.random.Generator:
        """The numpy generator of one purpose, the same object at every call."""
        if purpose not in self._numpy:
            self._numpy[purpose] = np.random.Generator(np.random.PCG64(self.seed_for(purpose)))
        return self._numpy[purpose]

    def state_dict(self) -> dict[str, Any]:
        """Where every stream used so far stands; made of tensors, strings and integers only."""
        return {
            "seed": self.seed,
            "torch": {name: generator.get_state() for name, generator in self._torch.items()},
            "numpy": {name: _pcg64_state(generator) for name, generator in self._numpy.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; streams that were not in use then start afresh."""
        if state["seed"] != self.seed:
            raise ValueError(f"the state belongs to seed {state['seed']}, these streams have seed {self.seed}")
        # Generators stay the same objects, since others hold them.
        for name, generator in self._torch.items():
            generator.manual_seed(self.seed_for(name))
        for name, random in self._numpy.items():
            random.bit_generator.state = np.random.PCG64(self.seed_for(name)).state
        for name, generator_state in state["torch"].items():
            self.torch(name).set_state(generator_state)
        for name, numpy_state in state["numpy"].items():
            inner = {key: int(value) for key, value in numpy_state["state"].items()}
            self.numpy(name).bit_generator.state = {**numpy_state, "state": inner}


def _pcg64_state(generator: np.random.Generator) -> dict[str, Any]:
    """PCG64's state with its 128-bit integers as text, which every serialiser keeps."""
    state: dict[str, Any] = dict(generator.bit_generator.state)
    return {**state, "state": {key: str(value) for key, value in state["state"].items()}}
