"""A training step and a prediction of each method, tiny profile, weights as they were drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.table import Row
from bench.timing import best
from diffad_ref import DecoDiff, DiffusionAD, OneForMore
from diffad_ref.anomalies import crop_textures, texture_bank
from diffad_ref.detector import Detector, Stage

LIMIT = 1.0  # second a training step, on two cores


def rows(
    device: torch.device,
    methods: tuple[type[Detector], ...] = (DiffusionAD, DecoDiff, OneForMore),
    rounds: int = 3,
) -> list[Row]:
    """One row for each stage, and one for the prediction of one image."""
    out = []
    for method in methods:
        torch.manual_seed(0)
        detector = method.tiny().to(device)
        images = crop_textures(
            texture_bank(), 64, detector.config.image_size, torch.Generator().manual_seed(0)
        )
        prepare(detector, images)
        images = images.to(device)
        out += [training_row(detector, stage, images, rounds) for stage in detector.stages]
        out.append(prediction_row(detector, images[:1], rounds))
    return out


def prepare(detector: Detector, images: Tensor) -> None:
    """Teach codec and features from a few photographs; `fit` would take a thousand and longer."""
    samples = [{"image": image} for image in images]
    for part in ("codec", "extractor"):
        if hasattr(detector, part):
            getattr(detector, part).prepare(samples)


def training_row(detector: Detector, stage: Stage, images: Tensor, rounds: int) -> Row:
    """Loss, gradients and a step of the optimiser."""
    detector.train().enter(stage)
    count = stage.batch_size
    batch = {
        "image": images[torch.arange(count) % len(images)],
        "texture": torch.zeros(count, dtype=torch.bool),
        "category_index": torch.zeros(count, dtype=torch.long, device=images.device),
    }
    optimizer = torch.optim.AdamW(detector.parameter_groups())

    def step():
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(0)
        detector.training_loss(batch, generator)["loss"].backward()
        optimizer.step()

    (seconds,) = best(step, rounds=rounds)
    what = f"{type(detector).__name__}: training step, {stage.name}, batch of {count}"
    return Row("steps", what, seconds, "s", "limit on two cores", LIMIT, 1)


def prediction_row(detector: Detector, image: Tensor, rounds: int) -> Row:
    """Map, score and reconstruction of one image (1, 3, H, W)."""
    detector.eval()
    index = torch.zeros(1, dtype=torch.long, device=image.device)
    (seconds,) = best(lambda: detector.predict(image, index), rounds=rounds)
    return Row("steps", f"{type(detector).__name__}: prediction of one image", seconds)
