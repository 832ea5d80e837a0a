"""Moving what was drawn on the CPU to the device without holding up the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the CPU on `device`, without waiting for it.

    For a GPU it is pinned first: larger tensors that are not may wait for the device's work before they are copied.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
