"""What every method promises: a loss to train with, and a prediction to judge it by.

`fit`, `evaluate`, the notebooks and the command line know only what stands here, so that a
method's own file can hold nothing but the method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffad_ref.images import check_images


@dataclass
class Prediction:
    """What a detector says about a batch of images.

    Attributes
    ----------
    anomaly_map : Tensor (B, H, W)
        How abnormal each pixel is; larger is more abnormal, the scale is the method's own.
    score : Tensor (B,)
        How abnormal each image is.
    reconstruction : Tensor (B, 3, H, W)
        The image as the method believes it should look, in [0, 1].
    parts : dict of Tensor
        What the method looked at on the way (noised image, estimates, …), for pictures.
    """

    anomaly_map: Tensor
    score: Tensor
    reconstruction: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """A learning rate over the steps of a stage."""

    peak: float
    schedule: str = "constant"  # "constant", "cosine" (to 0 at the horizon), "cycle"
    warmup: int = 0  # steps of linear rise before it
    horizon: float = 1.0  # where a cosine would reach 0, in lengths of the stage

    def at(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) in a stage of `steps`.

        "cycle" swings between the peak and 0 with a half-period of 10 steps: what a cosine
        annealing of period 10 does when it is stepped every iteration, as DiffusionAD's is.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.peak
        if self.schedule == "cosine":
            share = (step - self.warmup) / max(1, self.horizon * steps - self.warmup)
        elif self.schedule == "cycle":
            share = step / 10
        else:
            raise ValueError(f"schedule is constant, cosine or cycle, not {self.schedule!r}")
        return self.peak * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Stage:
    """One stretch of a training recipe: which parts learn, for how long, how fast."""

    name: str  # shown in the progress bar and in checkpoints
    steps: int  # optimiser steps
    batch_size: int  # images a step, on each process
    lr: dict[str, Rate]  # every part that learns; parts not named are frozen
    optimizer: str = "adam"  # "adam" or "adamw"
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of the gradient


class Detector(nn.Module, ABC):
    """Base class of DiffusionAD, DeCo-Diff and One-for-More.

    A subclass defines ``Config`` (a frozen dataclass with `tiny()` and `paper()`), sets
    `self.config`, `self.stages` and `self.categories`, and implements `training_loss` and
    `predict`. Its direct children are the parts that a `Stage` names.
    """

    Config: type
    stages: tuple[Stage, ...]
    categories: tuple[str, ...] = ()

    @abstractmethod
    def training_loss(
        self, batch: dict, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Scalars of one training step; "loss" is the total that is minimised."""

    @abstractmethod
    def predict(
        self,
        images: Tensor,
        category_index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Judge images (B, 3, H, W) in [0, 1]; the same generator gives the same prediction."""

    def prepare(self, dataset) -> None:
        """Learn or load what must be known before the first step of a training run; mostly none."""

    def enter(self, stage: Stage) -> None:
        """Prepare for a stage: the parts that it names learn, all others are frozen."""
        unknown = set(stage.lr) - {name for name, _ in self.named_children()}
        if unknown:
            raise ValueError(f"stage {stage.name!r} trains unknown parts {sorted(unknown)}")
        self.stage = stage
        for name, part in self.named_children():
            part.requires_grad_(name in stage.lr)

    def parameter_groups(self) -> list[dict]:
        """What the optimiser trains in the current stage, each part with its rate."""
        parts = dict(self.named_children())
        return [
            {"name": name, "params": list(parts[name].parameters()), "lr": rate.peak}
            for name, rate in self.stage.lr.items()
        ]

    @property
    def training_view(self) -> dict:
        """Arguments for `AnomalyFolder`: how large training images must come."""
        return {"image_size": getattr(self.config, "resize", self.config.image_size)}

    @property
    def view(self) -> dict:
        """Arguments for `AnomalyFolder`: test images are resized, and perhaps their middle cut."""
        view, size = self.training_view, self.config.image_size
        return view | {"crop": size if view["image_size"] != size else None}

    def check(self, images: Tensor) -> None:
        """Refuse what is not a batch of images of the size that the detector was built for."""
        check_images(images)
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            got = f"{images.shape[-2]} x {images.shape[-1]}"
            raise ValueError(f"this model was built for {size} x {size} images, not {got}")

    def forward(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Same as `training_loss`, so that a data-parallel wrapper can call it."""
        return self.training_loss(batch, generator)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.parameters()).device


def check_categories(names: Sequence[str], classes: int) -> None:
    """Refuse a data set of more categories than the class table has rows."""
    if len(names) > classes:
        raise ValueError(
            f"{len(names)} categories do not fit into a table of {classes} classes; "
            "build the detector with classes=..."
        )


def class_indices(
    category_index: Tensor | None,
    count: int,
    classes: int,
    names: Sequence[str],
    device: torch.device,
) -> Tensor:
    """The classes (count,), long, of a batch, checked against a table of so many classes.

    Raises ValueError, with the names that are known, for a missing or wrong number of indices and
    for an index outside the table.
    """
    known = f"there are {classes} classes: {list(names)}"
    if category_index is None:
        raise ValueError(f"say which category each image is of (category_index); {known}")
    indices = torch.as_tensor(category_index, device=device)
    if indices.shape != (count,) or indices.is_floating_point():
        raise ValueError(f"expected {count} category indices, got {category_index}; {known}")
    if indices.min() < 0 or indices.max() >= classes:
        raise ValueError(f"a category index is unknown: {indices.tolist()}; {known}")
    return indices.long()
