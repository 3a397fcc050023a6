"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Peak:
    """Largest number of bytes seen so far."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device, every: float = 0.01):
    """Watch memory while the block runs; gives a `Peak`, complete once the block has ended.

    On a GPU that is what PyTorch held there. On a CPU it is what the whole process held, Python
    and libraries included, looked at every so many seconds.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()

    def watch():
        while True:
            peak.bytes = max(peak.bytes, process.memory_info().rss)
            if done.wait(every):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
