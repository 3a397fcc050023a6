"""Seconds of rivals that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best(*calls: Callable[[], object], rounds: int = 5) -> list[float]:
    """Seconds of each call: the best of some rounds, in which the calls take turns.

    One round more, which does not count, warms caches and allocators.
    """
    seconds = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for taken, call in zip(seconds, calls, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def wait() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
