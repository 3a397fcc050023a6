"""What every method promises: a config, a loss to train with, a prediction to judge it by.

Settings and batches are checked here, at the border, so that a method's file can hold nothing but
the method.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from diffad_ref.data import AnomalyFolder
from diffad_ref.diffusion import Schedule, seeded
from diffad_ref.networks import lean

# What settings may be. A `@checked` class refuses all else, whoever makes it and from what.
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]  # more, and sums would not fit
Natural = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Sigma = Annotated[Number, Field(ge=0, le=1000)]  # pixels: the larger, the longer the filter


def _in_order(pair: tuple) -> tuple:
    if pair[0] > pair[1]:
        raise ValueError(f"a range ends above where it begins, not as {pair} does")
    return pair


ordered = AfterValidator(_in_order)
Range = Annotated[tuple[Share, Share], ordered]
Resample = Literal["antialiased", "bicubic", "linear"]  # how images shrink: `data.FILTERS`
Levels = Annotated[tuple[Count, ...], Field(min_length=1)]
checked = partial(pydantic_dataclass, frozen=True, config=ConfigDict(extra="forbid"))

PRECISIONS = ("auto", "float32", "tf32", "bf16", "fp16")


def precision_on(device: torch.device, wanted: str = "auto") -> str:
    """What "auto" is on a device: bf16 on a GPU that has it, fp16 on an older one, else float32.

    ValueError for a precision that does not exist, or not there.
    """
    if wanted not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {wanted!r}")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not has_bf16:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16: take fp16, or auto")
    best = "fp16" if not has_bf16 else "bf16" if device.type == "cuda" else "float32"
    return best if wanted == "auto" else wanted


@contextmanager
def tf32_unless(precision: str):
    """Products of float32 may be rounded to TF32's 10 bits of mantissa, but not in "float32"."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [s.allow_tf32 for s in settings]
    try:
        for s in settings:
            s.allow_tf32 = precision != "float32"
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.allow_tf32 = value


@contextmanager
def arithmetic(detector: Detector, precision: str):
    """Networks compute at this precision: 16 bits by autocast, or as `tf32_unless` says."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is not None:
        lean(detector)
    autocast = torch.autocast(detector.device.type, dtype) if dtype else nullcontext()
    with tf32_unless(precision), autocast:
        yield


@dataclass
class Prediction:
    """What a detector says about a batch of images; the scale of "abnormal" is its own."""

    anomaly_map: Tensor  # (B, H, W) how abnormal each pixel is
    score: Tensor  # (B,) how abnormal each image is
    reconstruction: Tensor  # (B, 3, H, W) in [0, 1]: as the image should look
    parts: dict[str, Tensor] = field(default_factory=dict)  # what it saw on the way, for pictures


@checked
class Rate:
    """A learning rate over the steps of a stage."""

    peak: NotNegative
    schedule: Literal["constant", "cosine", "cycle"] = "constant"  # cosine: to 0 at the horizon
    warmup: Natural = 0  # steps of linear rise before it
    horizon: Positive = 1.0  # where a cosine would reach 0, in lengths of the stage

    def at(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) in a stage of `steps`.

        "cycle" swings to 0 and back in 20 steps: what a cosine annealing of period 10 does when it
        is stepped every iteration, as DiffusionAD's is.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        length = max(1, self.horizon * steps - self.warmup)
        shares = {"constant": 0, "cosine": (step - self.warmup) / length, "cycle": step / 10}
        return self.peak * 0.5 * (1 + math.cos(math.pi * shares[self.schedule]))


@checked
class Stage:
    """One stretch of a training recipe: which parts learn, for how long, how fast."""

    name: str  # shown in the progress bar and in checkpoints
    steps: Natural | None  # optimiser steps; None: what `epochs` take, see `counted`
    batch_size: Count  # images at a time, on each process
    lr: Annotated[dict[str, Rate], Field(min_length=1)]  # of every part that learns; others rest
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: NotNegative = 0.0
    clip: Positive | None = None  # largest norm of the gradient
    accumulate: Count = 1  # batches a step: more images than memory holds
    checkpointing: bool = False  # keep less for the backward pass, and compute it again
    epochs: Natural = 0  # instead of steps
    drop_last: bool = False  # an epoch leaves out images that fill no batch

    def __post_init__(self):
        if self.steps is None and not self.epochs:
            raise ValueError(f"stage {self.name!r} has neither steps nor epochs")

    def counted(self, images: int, processes: int = 1) -> Stage:
        """The same with epochs as steps, for so many training images."""
        if self.steps is not None:
            return self
        whole, at_once = math.floor if self.drop_last else math.ceil, self.batch_size * processes
        return replace(self, steps=self.epochs * max(1, whole(images / at_once / self.accumulate)))


Stages = Annotated[tuple[Stage, ...], Field(min_length=1)]


def network_fits(config, multiple: int, parts: Sequence[str]) -> None:
    """Refuse a config whose sizes its networks cannot take, or whose stages train other parts."""
    if config.image_size % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple}, not {config.image_size}")
    Schedule.named(config.schedule, config.steps)
    divide([config.width * m for m in config.multipliers], norm_groups=config.norm_groups)
    if config.heads > config.width:
        raise ValueError(f"a width of {config.width} cannot be shared by {config.heads} heads")
    for stage in config.stages:
        if unknown := sorted(stage.lr.keys() - set(parts)):
            raise ValueError(f"stage {stage.name!r} trains unknown parts {unknown}")


def divide(widths: Sequence[int], **numbers: int) -> None:
    """Refuse numbers, by their names, that do not divide all widths of a network."""
    for name, number in numbers.items():
        if any(width % number for width in widths):
            raise ValueError(f"{name} must divide the widths {widths}, and {number} does not")


class Detector(nn.Module, ABC):
    """Base class of DiffusionAD, DeCo-Diff and One-for-More.

    A subclass defines `Config`, a `@checked` dataclass with `image_size: int`, `stages: Stages`,
    and what else it needs; builds its networks, and implements `training_loss` and `judge`. Its
    direct children are the parts that a `Stage` names.
    """

    Config: type
    methods: dict[str, type[Detector]] = {}  # every subclass by name: what a checkpoint may hold
    categories: tuple[str, ...] = ()  # of the training set, in the order of `category_index`

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Detector.methods[cls.__name__] = cls

    def __init__(self, config=None):
        super().__init__()
        if not isinstance(config, self.Config):
            name = type(self).__name__
            sizes = f"{name}.tiny() is for two CPU cores, {name}.paper() the published size"
            raise TypeError(f"how large? {sizes}; {name}(config) takes any {name}.Config")
        if not all(isinstance(stage, Stage) for stage in config.stages):
            raise ValueError("stages must be `Stage`s; a @checked config makes them so")
        self.config = config

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The recipe of its config, which may be set."""
        return self.config.stages

    @stages.setter
    def stages(self, stages: Sequence[Stage]) -> None:
        self.config = replace(self.config, stages=tuple(stages))

    @classmethod
    def tiny(cls, *sizes, **changes) -> Detector:
        """The size for two CPU cores; arguments are those of `Config.tiny`."""
        return cls(cls.Config.tiny(*sizes, **changes))

    @classmethod
    def small(cls, *sizes, **changes) -> Detector:
        """The size for a GPU and little time; arguments are those of `Config.small`."""
        return cls(cls.Config.small(*sizes, **changes))

    @classmethod
    def paper(cls, *sizes, **changes) -> Detector:
        """The published size; arguments are those of `Config.paper`."""
        return cls(cls.Config.paper(*sizes, **changes))

    @abstractmethod
    def training_loss(self, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of one training step; "loss" is the total that is minimised."""

    @abstractmethod
    def judge(self, x: Tensor, category_index, generator) -> Prediction:
        """What `predict` does with images that are checked, in evaluation mode.

        Noise comes from `Draw(generator)`, which may be one generator, or one for each image.
        """

    def prepare(self, dataset) -> None:
        """Learn or load what must be known before the first step of a training run; mostly none."""

    def identity(self) -> dict:
        """What a training run depends on besides the config and its images; mostly nothing."""
        return {}

    def forward(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Check a batch of training images, values on the CPU only, and compute its loss."""
        if "image" in batch:
            sizes = self.view("train")["image_size"], self.config.image_size
            check_images(batch["image"], *sizes, wait=False)
            batch = batch | {"image": batch["image"].float()}
        elif "posterior" not in batch:
            demand(batch, "image")
        count = len(batch["posterior" if "posterior" in batch else "image"])
        index = self.classes_of(batch.get("category_index"), count, wait=False)
        generator = generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        try:
            losses = self.training_loss(batch | {"category_index": index}, generator)
        except KeyError as error:
            demand(batch, *filter(lambda name: isinstance(name, str), error.args))
            raise
        if not isinstance(losses, dict) or not isinstance(losses.get("loss"), Tensor):
            raise ValueError(f'training_loss gives a dict of scalars with "loss", not {losses!r}')
        return losses

    @torch.no_grad()
    def predict(
        self, images: Tensor, category_index=None, generator=None, precision: str = "float32"
    ) -> Prediction:
        """Judge images (B, 3, H, W) in [0, 1], in evaluation mode whatever the mode was.

        `category_index` (B,), long, is the class of each image, as in `categories`, for methods
        that must know. An image's noise comes from a seed, which the `generator` draws (by
        default one of seed 0), and from its own pixels: what stands beside it changes nothing.
        """
        check_images(images, self.config.image_size)
        images, training = images.float(), self.training
        index = self.classes_of(category_index, len(images))
        generators = for_each(images, generator or seeded("cpu", 0))
        try:
            with arithmetic(self, precision_on(self.device, precision)):
                x = images.to(self.device, non_blocking=True)
                found = self.eval().judge(x, index, generators)
        finally:
            self.train(training)
        if not isinstance(found, Prediction):
            raise ValueError(f"judge gives a Prediction, not a {type(found).__name__}")
        names = ("anomaly_map", "score", "reconstruction")
        return replace(found, **{name: getattr(found, name).float() for name in names})

    def compile(self, **options) -> None:
        """Compile every network but the codec, in place; "reduce-overhead" is for single images."""
        for part in self.children():
            if next(part.parameters(), None) is not None:
                part.compile(**options)

    def classes_of(self, category_index, count: int, wait: bool = True) -> Tensor | None:
        """The classes (count,), long, of a batch, if `config.classes` says how many there are."""
        if (classes := getattr(self.config, "classes", None)) is None:
            return category_index
        known = f"there are {classes} classes: {list(self.categories)}"
        if category_index is None:
            raise ValueError(f"say which category each image is of (category_index); {known}")
        index = torch.as_tensor(category_index)
        if index.shape != (count,) or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"expected {count} category indices, got {category_index}; {known}")
        if (wait or index.device.type == "cpu") and (index.min() < 0 or index.max() >= classes):
            raise ValueError(f"a category index is unknown: {index.tolist()}; {known}")
        return index.to(self.device, torch.long, non_blocking=True)

    def view(self, split: str) -> dict:
        """Arguments for `AnomalyFolder`: how the images of "train" or "test" must come."""
        config, size = self.config, self.config.image_size
        resize = getattr(config, "resize", size)
        resample = getattr(config, "resample", "antialiased")
        crop = size if split == "test" and resize > size else None
        return {"image_size": resize, "crop": crop, "resample": resample}

    def folder(self, root, split: str = "train", **options) -> AnomalyFolder:
        """A data set in the MVTec layout, at this detector's size: see `AnomalyFolder`."""
        return AnomalyFolder(root, split, **self.view(split) | options)

    def from_folders(self, good=None, test=None, **options) -> AnomalyFolder:
        """A plain folder of images, at this detector's size: see `AnomalyFolder.from_folders`."""
        options = self.view("train" if test is None else "test") | options
        return AnomalyFolder.from_folders(good, test, **options)

    def enter(self, stage: Stage) -> None:
        """Prepare for a stage: the parts that it names learn, all others are frozen."""
        parts = dict(self.named_children())
        if unknown := sorted(stage.lr.keys() - parts):
            raise ValueError(f"stage {stage.name!r} trains unknown parts {unknown}")
        self.stage = stage
        for name, part in parts.items():
            part.requires_grad_(name in stage.lr)
        for module in self.modules():
            if switch := getattr(module, "enable_gradient_checkpointing", None):
                switch() if stage.checkpointing else module.disable_gradient_checkpointing()

    def parameter_groups(self) -> list[dict]:
        """What the optimiser trains in the current stage, each part with its rate."""
        parts, rates = dict(self.named_children()), self.stage.lr
        groups = {name: {"name": name, "lr": rate.peak} for name, rate in rates.items()}
        return [group | {"params": list(parts[n].parameters())} for n, group in groups.items()]

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(chain(self.parameters(), self.buffers())).device


def said_by(dataset: Dataset, name: str, default=None):
    """What a data set says of itself; a `Subset` says what the whole says."""
    while isinstance(dataset, Subset) and not hasattr(dataset, name):
        dataset = dataset.dataset
    return getattr(dataset, name, default)


def demand(sample: dict, *names: str) -> None:
    """Refuse what is no sample or batch with these entries, as those of `AnomalyFolder` are."""
    if not isinstance(sample, dict) or not sample.keys() >= set(names):
        found = sorted(sample) if isinstance(sample, dict) else type(sample)
        raise ValueError(f"a sample is a dict with {', '.join(names)}, not {found}")


def for_each(images: Tensor, generator: torch.Generator) -> list[torch.Generator]:
    """A generator for each of some images (B, 3, H, W), of a drawn number and its pixels."""
    drawn = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    levels = (images * 255).round().to("cpu", torch.uint8).numpy()  # rounding moves no seed
    return [seeded(generator.device, drawn, zlib.crc32(image.tobytes())) for image in levels]


def check_images(images: Tensor, *sizes: int, wait: bool = True) -> None:
    """Refuse what is no batch (B, 3, H, W), floating point, in [0, 1] (to 1e-4, for resampling).

    If sizes are given, height and width must be one of them.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images: expected a tensor (B, 3, H, W), got {type(images).__name__}")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"images: expected shape (B, 3, H, W), got {shape}{hint}")
    if images.numel() == 0:
        raise ValueError(f"images: the batch is empty, shape {shape}")
    if sizes and (shape[2] != shape[3] or shape[3] not in sizes):
        wanted = " or ".join(f"{size} x {size}" for size in dict.fromkeys(sizes))
        raise ValueError(f"this model was built for {wanted} images, not {shape[2]} x {shape[3]}")
    if not images.is_floating_point():
        hint = "convert with images.float() / 255 if these are bytes"
        raise ValueError(f"images: expected float32 in [0, 1], got {images.dtype}; {hint}")
    if not wait and images.device.type != "cpu":
        return  # values would have to be fetched
    low, high = torch.stack(images.aminmax()).tolist()
    if not math.isfinite(high - low):
        bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
        raise ValueError(f"images: NaN or infinite pixels in image(s) {bad} of the batch")
    if low < -1e-4 or high > 1 + 1e-4:
        hint = "; divide by 255" if high > 1.5 else "; is it still in [-1, 1]?" if low < 0 else ""
        raise ValueError(f"images: values must lie in [0, 1], found [{low:.4g}, {high:.4g}]{hint}")
