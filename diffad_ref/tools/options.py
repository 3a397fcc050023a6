"""Words that several commands of the command line share; `tyro` shows the comments as help."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

import diffad_ref as da
from diffad_ref.checkpoints import config_of, load_weights
from diffad_ref.detector import PRECISIONS

METHODS = {kind.__name__: kind for kind in (da.DecoDiff, da.DiffusionAD, da.OneForMore)}
LAYOUT = "a folder in the MVTec layout (<category>/train/good, test/...), or the word toy"
CHANGE = "change a setting of the config, value as JSON: corruption.mask_ratio=[0,0.3]"


def _number(most: int = 2**31 - 1, least: int = 1):
    """How `tyro` reads a whole number from the least to the most that is allowed."""

    def read(words: list[str]) -> int:
        number = int(words[0])
        if not least <= number <= most:
            limit = f"at least {least}" if number < least else f"at most {most}"
            raise ValueError(f"must be {limit}, not {number}")
        return number

    return PrimitiveConstructorSpec(1, "N", read, lambda n: least <= n <= most, lambda n: [str(n)])


Count = Annotated[int, _number()]
Seed = Annotated[int, _number(2**31 - 1, 0)]
Threads = Annotated[int, _number(1024)]  # more, and the system may not give them
Root = Annotated[str, Positional, arg(metavar="DATA", help=LAYOUT)]
Weights = Annotated[str, Positional, arg(metavar="WEIGHTS")]
Names = Annotated[list[str] | None, arg(metavar="NAME [NAME ...]")]
Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=VALUE", help=CHANGE)]


@dataclass(frozen=True)
class Model:
    """What is trained."""

    method: Literal[tuple(METHODS)] = "DiffusionAD"  # which paper
    # for two CPU cores, for a GPU and little time, or the published size
    profile: Literal["tiny", "small", "paper"] = "tiny"
    image_size: Count | None = None  # pixels, instead of the profile's
    set: Settings = ()

    def config(self):
        """The profile of the method, with what the command line changes."""
        profile = getattr(METHODS[self.method].Config, self.profile)
        size = {"image_size": self.image_size} if self.image_size else {}
        return changed(profile(**size), self.set)

    def detector(self, config, classes: int, seed: int, kind: type | None = None) -> da.Detector:
        """A new detector for so many categories."""
        if self.method == "DecoDiff":
            config = replace(config, classes=classes)
        torch.manual_seed(seed)
        return (kind or METHODS[self.method])(config)


@dataclass(frozen=True)
class Training:
    """How it is trained: arguments of `fit`."""

    steps: Count | None = None  # instead of the recipe's
    batch_size: Count | None = None  # images at a time, instead of the recipe's
    accumulate: Count | None = None  # batches a step, instead of the recipe's
    checkpointing: bool = False  # keep less for the backward pass, and compute it again
    precision: Literal[PRECISIONS] = "auto"  # the fastest that the device has
    compile: bool = False  # compile the networks first: minutes, then faster steps
    ema: float | None = None  # decay of an average of the weights, such as 0.999
    # processes that load images; otherwise as many as are needed
    num_workers: Annotated[int | None, arg(name="workers")] = None
    save_every: Count = 500  # steps between checkpoints
    seed: Seed = 0  # of the first weights and of all noise


def changed(config, settings: tuple[str, ...]):
    """A config with some NAME=VALUE put into it."""
    plain = json.loads(json.dumps(asdict(config)))
    for setting in settings:
        _change(plain, setting)
    try:
        return config_of(type(config), plain)
    except ValueError as error:
        raise ValueError(f"--set {' '.join(settings)}: {error}") from error


def with_settings(detector: da.Detector, settings: tuple[str, ...], root: Path) -> da.Detector:
    """A trained detector with other settings; other features are loaded, or learn from `root`."""
    other = type(detector)(changed(detector.config, settings))
    other.categories, state = detector.categories, detector.state_dict()
    if isinstance(other, da.OneForMore) and other.config.features != detector.config.features:
        learned = other.config.features == "patches"
        names = {"categories": other.categories}
        other.extractor.prepare(other.folder(root, "train", **names) if learned else None)
        own = {f"extractor.{k}": v for k, v in other.extractor.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.startswith("extractor.")} | own
    load_weights(other, state, f"the file with --set {' '.join(settings)}")
    return other.eval()


def _change(plain: dict, setting: str) -> None:
    """Put NAME=VALUE into nested settings; a dot leads into them."""
    path, _, value = setting.partition("=")
    *outer, name = path.split(".")
    for part in outer:
        plain = plain.get(part)
        if not isinstance(plain, dict):
            raise ValueError(f"--set {setting}: there are no settings under {part!r}")
    try:
        plain[name] = json.loads(value)
    except (ValueError, RecursionError) as error:
        words = setting if len(setting) < 200 else f"{setting[:200]}..."
        raise ValueError(f"--set {words}: expected NAME=VALUE, value as JSON") from error


def root_of(data: str, size: int, seed: int = 0) -> Path:
    """The folder that is meant; the toy is drawn if it is not there."""
    if not data:
        raise ValueError("the name of the data is empty: give a folder, or the word toy")
    return da.toy_factory(size=size, seed=seed) if data == "toy" else Path(data)
