"""Copies between the host and the device that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor


class Transfer:
    """Copies to and from one device. On a CPU nothing is copied.

    On CUDA the two directions have a stream each, so that the pixels of the next batch arrive and
    the results of the last one leave while a batch is scored. Page-locked memory comes from torch's
    cache, which gives it out again only when the copies out of it or into it are over.

    ahead: how many batches to launch before the results of the first are asked for.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self.ahead = 1 if self._cuda else 0
        if self._cuda:
            self._up, self._down = (torch.cuda.Stream(self._device) for _ in range(2))

    def host_pixels(self, count: int, height: int, width: int) -> Tensor:
        """Uninitialised uint8 [count, height, width, 3] that :meth:`to_device` copies fastest."""
        return torch.empty((count, height, width, 3), dtype=torch.uint8, pin_memory=self._cuda)

    def to_device(self, host: Tensor) -> Tensor:
        """The tensor on the device; what is launched after this call waits for the copy."""
        if not self._cuda:
            return host
        with torch.cuda.stream(self._up):
            copy = host.to(self._device, non_blocking=True)
        scoring = torch.cuda.current_stream(self._device)
        scoring.wait_stream(self._up)
        copy.record_stream(scoring)
        return copy

    def to_host(self, arrays: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
        """Starts copying results of the device; the function returned waits until they are here."""
        if not self._cuda:
            return lambda: {path: value.numpy() for path, value in arrays.items()}
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        host: dict[str, Tensor] = {}
        with torch.cuda.stream(self._down):
            for path, value in arrays.items():
                pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                host[path] = pinned.copy_(value, non_blocking=True)
                value.record_stream(self._down)
            arrived = self._down.record_event()

        def wait() -> dict[str, np.ndarray]:
            arrived.synchronize()
            return {path: value.numpy() for path, value in host.items()}

        return wait
