"""The metrics of a large test set: seconds and peak memory, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.maps import anomaly_maps
from bench.table import Row
from diffad_ref.metrics import pixel_metrics

IMAGES = 1725  # test images of all 15 categories of MVTec AD
LIMIT = 6.0  # GB


def rows(device: torch.device, count: int = IMAGES, size: int = 256) -> list[Row]:
    """One row of time, one of memory."""
    found, what = in_child(count, size), f"pixel metrics of {count} maps"
    note = "whole process, maps and masks too" if found["gigabytes"] else "not measured"
    limit = LIMIT if found["gigabytes"] else None
    return [
        Row("memory", f"{what}: time", found["seconds"]),
        Row("memory", f"{what}: peak memory", found["gigabytes"], "GB", "limit", limit, 1, note),
    ]


def in_child(count: int, size: int) -> dict:
    """Run `judge` in a fresh process, whose peak of memory is then its own."""
    command = [sys.executable, "-m", "bench.memory", json.dumps([count, size])]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def judge(count: int, size: int) -> dict:
    """Seconds of the metrics, and this process's peak of memory in GB."""
    maps, masks = anomaly_maps(count, size)
    start = time.perf_counter()
    pixel_metrics(maps, masks)
    return {"seconds": time.perf_counter() - start, "gigabytes": peak_of_this_process()}


def peak_of_this_process(status: Path = Path("/proc/self/status")) -> float | None:
    """Largest memory that this process ever held, in GB; None where the system does not say."""
    if not status.exists():
        return None
    for line in status.read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return None


if __name__ == "__main__":
    print(json.dumps(judge(*json.loads(sys.argv[1]))))
