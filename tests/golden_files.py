"""Reads reference vectors of the official implementations; the folder is tests/golden or what GOLDEN_DIR names."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def folder() -> Path:
    """Where the reference vectors lie."""
    return Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


class Golden:
    """One file of vectors: `g["name"]` is a tensor (a float, int, bool or str where it holds a single value)."""

    def __init__(self, name: str) -> None:
        with np.load(folder() / f"{name}.npz", allow_pickle=False) as stored:
            self._arrays = {key: stored[key] for key in stored.files}

    def __getitem__(self, key: str) -> Any:
        array = self._arrays[key]
        if array.ndim == 0 or array.dtype.kind in "US":
            return array.item() if array.ndim == 0 else array.tolist()
        return torch.from_numpy(array)

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def keys(self) -> list[str]:
        return list(self._arrays)


def weights(name: str) -> dict[str, torch.Tensor]:
    """The state dict stored as NAME.safetensors, under the official key names."""
    return load_file(folder() / f"{name}.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Both agree as closely as probabilities, gradients and losses have to."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
