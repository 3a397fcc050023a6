"""The papers' experiments by their names: what is trained, at which cost, what was published.

`reproduce` runs them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

import diffad_ref as da
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector
from diffad_ref.metrics import METRICS
from diffad_ref.one_for_more import Pasting
from diffad_ref.tools import plan, tables
from diffad_ref.tools.options import changed
from diffad_ref.tools.protocols import MVTEC, ORDERS, VISA
from diffad_ref.training import plan_stages

PAPERS = {"diffusion_ad": da.DiffusionAD, "deco_diff": da.DecoDiff, "one_for_more": da.OneForMore}

# Training and test images of each category; those of MPDD and DAGM are not stated.
_OF_MVTEC = (209, 224, 219, 280, 264, 391, 245, 220, 267, 320, 230, 60, 213, 247, 240)
_OF_VISA = (900, 542, 450, 453, 450, 900, 900, 904, 901, 905, 904, 450)
IMAGES = dict(zip(MVTEC + VISA, _OF_MVTEC + _OF_VISA, strict=True))
_TESTS_OF_MVTEC = (83, 150, 132, 117, 78, 110, 124, 115, 167, 160, 117, 42, 100, 79, 151)
_TESTS_OF_VISA = (200, 160, 150, 150, 150, 200, 200, 200, 200, 201, 201, 150)
TESTED = dict(zip(MVTEC + VISA, _TESTS_OF_MVTEC + _TESTS_OF_VISA, strict=True))
MPDD = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")
DAGM = tuple(f"Class{i}" for i in range(1, 11))


@dataclass(frozen=True)
class Setting:
    """One experiment of a paper."""

    # Categories of each model; or of each task, if one model learns one after the other.
    groups: tuple[tuple[str, ...], ...]
    published: dict[str, float] = field(default_factory=dict)  # fractions; A after the last task
    source: str = ""  # of the published numbers
    changes: dict = field(default_factory=dict)  # of the config, on this data
    most: int | None = None  # training images of a category, the first by name


def each(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A model for each category."""
    return tuple((name,) for name in names)


def _as_metrics(*values: float) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(METRICS, values, strict=True)}


_ON_MVTEC = {"pasting": Pasting(source="itself")}
_ON_VISA = {"pasting": Pasting(share=2 / 3, source="class"), "stages_compared": (0, 2, 4)}
_VISA_TASKS = {"changes": _ON_VISA, "most": 200}
_README = "the README of the released code, for the weights that it provides"
SETTINGS = {
    ("diffusion_ad", "mvtec"): Setting(
        each(MVTEC), {"image_auroc": 0.997, "pixel_ap": 0.761}, "secondary notes on the paper"
    ),
    ("diffusion_ad", "visa"): Setting(
        each(VISA), {"image_auroc": 0.988, "pixel_auroc": 0.989}, "secondary notes on the paper"
    ),
    ("diffusion_ad", "mpdd"): Setting(each(MPDD)),
    ("diffusion_ad", "dagm"): Setting(each(DAGM)),
    ("deco_diff", "mvtec"): Setting(
        (MVTEC,), _as_metrics(99.2, 99.7, 98.7, 98.8, 76.8, 71.1, 95.1), _README
    ),
    ("deco_diff", "visa"): Setting(
        (VISA,),
        _as_metrics(96.2, 97.0, 92.6, 98.3, 57.5, 56.4, 91.5),
        _README,
        {"classes": len(VISA), "turned": 0.5},
    ),
    **{
        ("one_for_more", name): Setting(
            tasks, **(_VISA_TASKS if name.startswith("visa") else {"changes": _ON_MVTEC})
        )
        for name, tasks in ORDERS.items()
        if name != "toy"
    },
}
SETTINGS["one_for_more", "visa 11-1"] = replace(
    SETTINGS["one_for_more", "visa 11-1"],
    published={"image_auroc": 0.883, "pixel_auroc": 0.972},
    source="the paper, as quoted by a reader",
)


def setting_of(paper: str, name: str) -> Setting:
    """A setting by its paper and name, or ValueError."""
    if (paper, name) not in SETTINGS:
        known = ", ".join(repr(n) for p, n in SETTINGS if p == paper)
        raise ValueError(f"{paper} has no setting {name!r}; there are {known}")
    return SETTINGS[paper, name]


def only(setting: Setting, names: Sequence[str] | None) -> Setting:
    """A part of a setting: some of its categories, in its order."""
    if names is None:
        return setting
    known = {name for group in setting.groups for name in group}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--only {' '.join(unknown)}: the setting has {', '.join(sorted(known))}")
    groups = (tuple(name for name in group if name in names) for group in setting.groups)
    return replace(setting, groups=tuple(group for group in groups if group))


def recipe(
    paper: str,
    setting: Setting,
    profile: str = "paper",
    image_size: int | None = None,
    changes: Sequence[str] = (),
) -> Detector:
    """The detector of a setting, with a random start; `changes` as of `options.changed`."""
    own = dict(setting.changes)
    if paper == "deco_diff":
        own["classes"] = sum(map(len, setting.groups))
    size = {} if image_size is None else {"image_size": image_size}
    config = getattr(PAPERS[paper].Config, profile)(**size, **own)
    detector = PAPERS[paper](changed(config, tuple(changes)))
    counts = images_of(setting)
    if paper == "deco_diff" and detector.stages == DecoDiff.Config.paper().stages and counts:
        epoch = math.ceil(0.9 * sum(counts) / 256)  # a tenth is held out, though not from us
        (stage,) = detector.stages
        rate = replace(stage.lr["corrector"], warmup=10 * epoch)
        stage = replace(stage, steps=800 * epoch, lr={"corrector": rate})
        detector.stages = (stage,)
    if setting.most is not None:
        _take_at_most(detector, setting.most)
    return detector


def _take_at_most(detector: Detector, most: int) -> None:
    """Let a detector's training sets hold the first so many images of each category."""
    whole = detector.folder

    def folder(root, split: str = "train", **options):
        data, seen = whole(root, split, **options), Counter()
        if split == "train":
            kept = []
            for sample in data.samples:
                seen[sample.category] += 1
                kept += [sample] * (seen[sample.category] <= most)
            data.samples = kept
        return data

    detector.folder = folder


def images_of(setting: Setting) -> list[int] | None:
    """Training images of each group, as the data sets state them; None if one is not stated."""
    if any(name not in IMAGES for group in setting.groups for name in group):
        return None
    most = setting.most or math.inf
    return [sum(min(most, IMAGES[name]) for name in group) for group in setting.groups]


# ---------------------------------------------------------------------------------------- dry run


def plan_table(
    wanted: Sequence[tuple[str, str]] | None = None, names: Sequence[str] | None = None
) -> tables.Shown:
    """Models, steps, hours by card and disk of settings, by default all; needs no data.

    `names` are categories, of a single setting, that count alone.
    """
    parts_of = {key: only(SETTINGS[key], names) for key in wanted or SETTINGS}  # or refuse
    costs, found = dict(zip(PAPERS, plan.recipe_plans(), strict=True)), []
    for (paper, name), setting in parts_of.items():
        p, groups = costs[paper], len(setting.groups)
        row = {"paper": paper, "setting": name, "models": groups, "tasks": None}
        if paper == "one_for_more":
            row |= {"models": 1, "tasks": groups}
        disk = {"disk, GB": _disk(p, groups) / plan.GB}
        if (counts := images_of(setting)) is None:
            found.append(row | disk)
            continue
        with torch.device("meta"):
            detector = recipe(paper, setting)
        stages = [plan_stages(detector.stages, count) for count in counts]
        steps = [sum(s.steps for s in group) for group in stages]
        shown = [sum(s.steps * s.batch_size * s.accumulate for s in group) for group in stages]
        parts = [replace(p, steps=n, images=k) for n, k in zip(steps, shown, strict=True)]
        if p.protection:  # every tenth image is gathered
            gathered = [
                replace(p.protection, images=count // detector.config.every) for count in counts
            ]
            parts = [replace(q, protection=g) for q, g in zip(parts, gathered, strict=True)]
        row |= {"training images": sum(counts), "steps": sum(steps)}
        row |= {f"{gpu}, h": _hours(parts, gpu) for gpu in plan.GPUS}
        found.append(row | disk)
    return tables.rows(found, percent=(), labels=2)


def _hours(parts: list[plan.Plan], gpu: str) -> float:
    """Of models, or of tasks: each is gathered, and from the second on every step is projected."""
    if parts[0].protection is None:
        return sum(part.hours(gpu) for part in parts)
    first, *later = parts
    hours = first.hours(gpu) + first.gathering_hours(gpu)
    return hours + sum(part.protected_hours(gpu) for part in later)


def _disk(p: plan.Plan, parts: int) -> int:
    """Bytes of what a run leaves, and of Adam's averages while one model learns."""
    each = 4 * p.learning + 2 * p.weights  # a state to go on from, and weights in halves
    each += p.protection.basis_bytes if p.protection else 0
    return parts * each + 8 * p.learning
