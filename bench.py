"""How fast the parts are that have a target: `make bench`.

Machines are noisy, so every figure is the best of several rounds, and every claim a ratio of two
things measured in turn, in one run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import rotate

from diffad_ref import DiffusionAD
from diffad_ref.anomalies import perlin_masks
from diffad_ref.diffusion import iterative_x0
from diffad_ref.metrics import pixel_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads\n")
    synthesis(device)
    denoising(device)
    training(device)
    metrics()


def best(*calls: Callable[[], object], rounds: int = 5) -> list[float]:
    """Seconds of each call: the best of some rounds, in which the calls take turns."""
    seconds = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for taken, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def synthesis(device: torch.device, batch: int = 32, size: int = 256) -> None:
    """Perlin masks: a batch at once against a numpy loop over images."""
    generator, rng = torch.Generator(device).manual_seed(0), np.random.default_rng(0)
    few = 8
    batched, looped = best(
        lambda: perlin_masks(batch, size, generator, device),
        lambda: [mask_by_numpy(size, rng) for _ in range(few)],
    )
    fast, slow = batch / batched, few / looped
    print(f"Perlin masks {size} x {size}: {fast:.0f} images/s in batches of {batch},")
    print(f"  {slow:.0f} images/s in a numpy loop; ratio {fast / slow:.1f} (target 10)\n")


def mask_by_numpy(size: int, rng: np.random.Generator, threshold: float = 0.5) -> np.ndarray:
    """One mask as it is usually made: gradients spread over all pixels, then a rotation."""
    while True:
        noise = np.zeros((size, size))
        cells = 2 ** rng.integers(0, 6, 2)
        angle = 2 * np.pi * rng.random(cells + 1)
        gradient = np.stack([np.cos(angle), np.sin(angle)], -1)
        y, x = (np.arange(size) * c / size for c in cells)
        row, column = y.astype(int), x.astype(int)
        v, u = np.meshgrid(y - row, x - column, indexing="ij")
        fade_v, fade_u = (w**3 * (w * (6 * w - 15) + 10) for w in (v, u))
        for i in (0, 1):
            for j in (0, 1):
                corner = gradient[row + i][:, column + j]
                weight = (fade_v if i else 1 - fade_v) * (fade_u if j else 1 - fade_u)
                noise += weight * (corner[..., 0] * (v - i) + corner[..., 1] * (u - j))
        turned = rotate(noise * 2**0.5, rng.uniform(-90, 90), reshape=False, order=1)
        mask = turned > threshold
        if mask.any():
            return mask


def denoising(device: torch.device, batch: int = 8) -> None:
    """One guided step against many, untrained tiny network: time does not depend on weights."""
    detector = DiffusionAD(DiffusionAD.Config.tiny()).to(device).eval()
    images = torch.rand(batch, 3, 64, 64, device=device)

    def seeded():
        return torch.Generator().manual_seed(0)

    @torch.no_grad()
    def one():
        detector.reconstruct(images, seeded())

    def many(method):
        return lambda: iterative_x0(
            detector.denoiser, images, 400, detector.schedule, seeded(), method
        )

    step, ddim, ddpm = best(one, many("ddim"), many("ddpm"), rounds=2)
    print(f"Reconstruction, 64 pixels, one guided step: {1000 * step / batch:.1f} ms an image,")
    print(
        f"  DDIM with 50 calls {ddim / step:.0f} times, DDPM from t = 400 {ddpm / step:.0f} times"
    )
    print("  as long (target 100)\n")


def training(device: torch.device) -> None:
    """A step of each stage of the tiny recipe, forward and backward."""
    detector = DiffusionAD(DiffusionAD.Config.tiny()).to(device).train()
    for stage in detector.config.stages:
        detector.enter(stage)
        batch = {
            "image": torch.rand(stage.batch_size, 3, 64, 64, device=device),
            "category": ["gear"] * stage.batch_size,
        }

        def step(batch=batch):
            generator = torch.Generator(device).manual_seed(0)
            detector.training_loss(batch, generator)["loss"].backward()

        (seconds,) = best(step, rounds=3)
        print(f"Training step, tiny, stage {stage.name}: {seconds:.2f} s, batch {stage.batch_size}")
    print()


def metrics(count: int = 100, size: int = 256) -> None:
    """All pixel metrics, exact, ties included."""
    rng = np.random.default_rng(0)
    maps = rng.random((count, size, size), dtype=np.float32)
    masks = np.zeros((count, size, size), bool)
    masks[: count // 2, 100:140, 60:120] = True
    (seconds,) = best(lambda: pixel_metrics(maps, masks), rounds=3)
    print(f"Pixel AUROC, AP, F1max, AUPRO of {count} maps {size} x {size}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
