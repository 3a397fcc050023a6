"""Train and judge what a paper did, by one name, beside its published numbers.

A run trains every model of a setting, or the tasks of a continual one, goes on where it was
stopped, judges by exact metrics and by the paper's protocol, and writes one table.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from pandas import Timedelta

import diffad_ref as da
from diffad_ref.anomalies import texture_bank
from diffad_ref.checkpoints import (
    claimed,
    read_description,
    read_json,
    refuse_another,
    write_text,
)
from diffad_ref.continual import HARMLESS
from diffad_ref.detector import Detector, precision_on
from diffad_ref.metrics import METRICS
from diffad_ref.tools import tables
from diffad_ref.tools.plan import what_fits
from diffad_ref.tools.protocols import PROTOCOLS
from diffad_ref.tools.records import device_name, megabytes, versions
from diffad_ref.tools.settings import IMAGES, TESTED, Setting, only, recipe, setting_of
from diffad_ref.training import STATE, meet, plan_stages, processes


def seconds_of(text: str) -> float:
    """How long a budget such as 10min, 2h or 90s is, or ValueError."""
    try:
        seconds = 0 if text.strip().isdigit() else Timedelta(text).total_seconds()
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise ValueError(f"a budget is a time such as 90s, 10min or 2h, not {text!r}")
    return seconds


def check_data(setting: Setting, root: Path) -> None:
    """Refuse a folder that lacks a category of a setting, or some of its images."""
    wanted = [name for group in setting.groups for name in group]
    missing = [name for name in wanted if not (root / name).is_dir()]
    if missing:
        there = [name for name in wanted if name not in missing]
        way = f"--only {' '.join(there)} takes what is there" if there else "is it the right one?"
        raise ValueError(f"{root} lacks {', '.join(missing)} of {len(wanted)} categories; {way}")
    train, test = (
        da.AnomalyFolder(root, split, categories=wanted, cache=False).samples
        for split in ("train", "test")
    )
    for samples, stated, what in ((train, IMAGES, "training"), (test, TESTED, "test")):
        counts = Counter(sample.category for sample in samples)
        few = [f"{name} ({counts[name]} of {stated[name]})" for name in wanted
               if counts[name] < stated.get(name, 0)]  # fmt: skip
        if few:
            raise ValueError(f"{root} lacks {what} images of {', '.join(few)}: lay it out in full")
    bare = Counter(s.category for s in test if s.label and s.mask_path is None)
    if bare:
        lost = ", ".join(f"{name} ({count})" for name, count in bare.items())
        raise ValueError(f"{root} lacks masks of defective images of {lost}: lay it out in full")
    there = {(sample.category, sample.label) for sample in test}
    if lost := [name for name in wanted if not {(name, 0), (name, 1)} <= there]:
        raise ValueError(f"good and defective test images are needed, also of {', '.join(lost)}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A setting on someone's data, whole or in part.

    Raises ValueError for a setting, a category or images that are not there, a budget that is too
    short for an epoch, textures that are missing, and an `out` of another run.
    """

    paper: str
    name: str
    root: Path
    out: Path
    only: Sequence[str] | None = None
    budget: str | None = None
    profile: str = "paper"
    image_size: int | None = None
    changes: Sequence[str] = ()  # of the config, as of `options.changed`
    textures: Path | None = None
    imagenet: Path | None = None
    training: dict = field(default_factory=dict)  # arguments of `fit`

    def run(self, command: str = "") -> str:
        """Train and judge; gives the table, which is in `out` as well."""
        self._check()
        whole = setting_of(self.paper, self.name)
        setting = only(whole, self.only)
        check_data(setting, self.root)
        detector = self._detector(setting)
        maps = torch.zeros(2, *[detector.config.image_size] * 2)
        PROTOCOLS[self.paper].image_metrics(maps, None, [0, 1])  # or it would refuse in the end
        data = [detector.folder(self.root, "train", categories=g) for g in setting.groups]
        identity = self._identity(detector, setting, data)
        with claimed(self.out) if meet().is_main_process else nullcontext():
            return self._run(command, whole, setting, detector, data, identity)

    def _run(self, command, whole, setting, detector, data, identity) -> str:
        of_recipe = partial(_share, detector, data, self.budget, self.training)
        share = _share_of(self.out / "reproduce.json", identity, of_recipe)
        detector.stages = tuple(shortened(stage, share) for stage in detector.stages)
        judge, start = _continual if self.paper == "one_for_more" else _apart, time.time()
        places = self.root, self.out, PROTOCOLS[self.paper], self.training
        found = judge(detector, setting, data, *places)
        report = found.pop("report")
        facts = {
            "command": command,
            "categories": f"{sum(map(len, setting.groups))} of {sum(map(len, whole.groups))}",
            "images": _completeness(setting),
            "profile": self.profile,
            "share of the recipe": share if self.training.get("steps") is None else "see steps",
            "steps": found.pop("steps"),
            "minutes since the last start": round((time.time() - start) / 60, 1),
            "device": device_name(meet().device),
            "precision": precision_on(meet().device, self.training.get("precision", "auto")),
            "start": _start_of(detector),
            "published": setting.source or "no numbers are known to us",
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        }
        text = _text(f"{self.paper}, {self.name}", setting, facts, found)
        if meet().is_main_process:
            what = {"paper": self.paper, "setting": self.name}
            write_text(json.dumps(what | facts | found, indent=1), self.out / "table.json")
            entries = {"commands": [command], "versions": versions(), "cost": found["cost"]}
            entries |= {"report": tables.to_plain(report)}  # as `evaluate --save`, for `compare`
            write_text(json.dumps(entries, indent=1), self.out / "report.json")
            write_text(text + "\n", self.out / "table.md")
        return text

    def _check(self) -> None:
        for given, paper in ((self.textures, "diffusion_ad"), (self.imagenet, "deco_diff")):
            if given is not None and self.paper != paper:
                raise ValueError(f"{given} is for {paper}, not for {self.paper}")
        if self.budget is not None:
            seconds_of(self.budget)
            if processes()[0] > 1:
                raise ValueError("a budget is measured by one process; several take --steps")
            if self.training.get("steps") is not None:
                raise ValueError("give --budget or --steps, not both")

    def _detector(self, setting: Setting) -> Detector:
        torch.manual_seed(self.training.get("seed", 0))
        size = self.profile, self.image_size, self.changes
        detector = recipe(self.paper, setting, *size)
        if self.textures is not None:
            detector.textures = texture_bank(self.textures)
        if self.imagenet is not None:
            from diffad_ref.tools.official_deco_diff import start_from_imagenet  # slow to import

            kept = ", ".join(start_from_imagenet(detector, self.imagenet)) or "nothing"
            print(f"not in {self.imagenet}, or of another shape: {kept}", file=sys.stderr)
        return detector

    def _identity(self, detector: Detector, setting: Setting, data: list) -> dict:
        """What a run in the same folder must have in common with this one."""
        training = {k: v for k, v in self.training.items() if k not in HARMLESS}
        groups = setting.groups
        names = [g[0] if len(g) == 1 else f"group {n + 1}" for n, g in enumerate(groups)]
        tests = [detector.folder(self.root, "test", categories=g) for g in groups]
        return {
            **{"paper": self.paper, "setting": self.name, "profile": self.profile},
            **{"groups": groups, "budget": self.budget, "training": training},
            "config": asdict(detector.config),
            "data": dict(zip(names, (d.fingerprint() for d in data), strict=True)),
            "test": dict(zip(names, (d.fingerprint() for d in tests), strict=True)),
            **detector.identity(),
        }


def _completeness(setting: Setting) -> str:
    """Whether `check_data` could tell that no image is missing."""
    unknown = [name for group in setting.groups for name in group if name not in IMAGES]
    if unknown:
        return f"as found; how many there are of {', '.join(unknown)} is not known to us"
    return "complete, by the counts that the data set states"


def _start_of(detector: Detector) -> str:
    """What its networks know before the first step."""
    name, *_ = getattr(detector, "started_from", None) or [None]  # a file, and its size
    return name or getattr(detector.config, "start", None) or "from scratch"


def shortened(stage: da.Stage, share: float) -> da.Stage:
    """A stage of a share of its length, with its warm-ups."""
    if share == 1:
        return stage
    length = "epochs" if stage.steps is None else "steps"
    lr = {n: replace(r, warmup=round(r.warmup * share)) for n, r in stage.lr.items()}
    return replace(stage, **{length: max(1, round(getattr(stage, length) * share))}, lr=lr)


def _share_of(path: Path, identity: dict, share) -> float:
    """Write down what a folder's run is, with the share of its recipe; or refuse another's."""
    there = path.exists()
    meet().wait_for_everyone()  # before one of them writes it
    if there:
        before = read_json(path, identity=dict, share=float)
        refuse_another(path.parent, before["identity"], identity)
        return before["share"]
    found = share()
    if meet().is_main_process:
        write_text(json.dumps({"identity": identity, "share": found}, indent=1), path)
    return found


def _share(detector: Detector, data: list, budget: str | None, training: dict) -> float:
    """The share of the recipe that fits into a budget, from steps that are made for the purpose."""
    if budget is None:
        return 1.0
    wanted = seconds_of(budget)
    settings = {k: training.get(k) for k in ("batch_size", "accumulate", "checkpointing")}
    settings = {k: value for k, value in settings.items() if value}
    lengths = [plan_stages(detector.stages, len(d), **settings) for d in data]
    detector.to(meet().device).prepare(data[0])
    timed = partial(_seconds_a_step, detector, data[0], training.get("precision", "auto"))
    each = [timed(stage) for stage in lengths[0]]
    total = sum(
        stage.steps * seconds
        for stages in lengths
        for stage, seconds in zip(stages, each, strict=True)
    )
    share = min(1.0, wanted / total)
    for stages, d in zip(lengths, data, strict=True):
        steps = sum(stage.steps for stage in stages)
        epoch = math.ceil(len(d) / (stages[0].batch_size * stages[0].accumulate))
        if steps * share < min(epoch, steps):
            least = epoch / steps * total
            words = f"an epoch of {len(d)} images would take {least:.0f} s of this setting's time"
            raise ValueError(f"a budget of {budget} is too short: {words}")
    return share


def _seconds_a_step(detector: Detector, data, precision: str, stage: da.Stage) -> float:
    """What a step of a stage takes, once the first ones are made."""
    first, steps = (5, 25) if detector.device.type == "cuda" else (1, 4)
    trial, stamps = deepcopy(detector), []
    trial.stages = (stage,)

    def stamp(*_) -> None:
        if trial.device.type == "cuda":
            torch.cuda.synchronize(trial.device)
        stamps.append(time.perf_counter())

    with what_fits(trial, precision):
        da.fit(
            *(trial, data, steps),
            **{"precision": precision, "progress": False},
            on_optimizer=lambda optimizer: optimizer.register_step_post_hook(stamp),
        )
    return (stamps[-1] - stamps[first - 1]) / (steps - first)


def _apart(detector, setting, data, root, out, protocol, training) -> dict:
    """Models that are trained apart, each judged on its own categories."""
    found = []
    for group, train in zip(setting.groups, data, strict=True):
        folder = out / ("all" if len(group) > 1 else group[0])
        there = (folder / "result.json").exists()
        meet().wait_for_everyone()  # before one of them writes it
        if not there:
            _one_model(deepcopy(detector), group, train, root, folder, protocol, training)
            meet().wait_for_everyone()
        kinds = {"here": tables.REPORT, "protocol": tables.REPORT, "steps": int}
        found.append(read_json(folder / "result.json", megabytes=float, **kinds))
    reports = {
        way: tables.joined([tables.from_plain(r[way]) for r in found])
        for way in ("here", "protocol")
    }
    seconds = [r.get("training seconds") for r in found]
    cost = {"training seconds": None if None in seconds else sum(seconds)}
    cost["megabytes"] = sum(r["megabytes"] for r in found)
    steps = sum(r["steps"] for r in found)
    return _found(reports["here"], reports["protocol"].mean, cost, steps)


def _one_model(model, group, train, root, folder, protocol, training) -> None:
    """Train it and judge it; weights and results come to a folder."""
    resumed, start = (folder / STATE).exists(), time.time()
    with what_fits(model, training.get("precision", "auto")):
        history = da.fit(model, train, out=folder, **training)
    result = {"steps": len(history.rows), "megabytes": megabytes(model)}
    result["training seconds"] = None if resumed else time.time() - start  # of the whole run
    test = model.folder(root, "test", categories=list(group))
    for way, rule in {"here": None, "protocol": protocol}.items():
        result[way] = tables.to_plain(da.evaluate(model, test, protocol=rule))
    if meet().is_main_process:
        record = {"steps": result["steps"], "data": {"categories": list(group)}}
        da.save(model, folder / "weights", record, half=True)
        write_text(json.dumps(result), folder / "result.json")


def _continual(detector, setting, data, root, out, protocol, training) -> dict:
    """One model that learns task after task: means after the last, and what was forgotten."""
    resumed, start = (out / "task_1").exists(), time.time()
    with what_fits(detector, training.get("precision", "auto")):
        result = da.fit_continual(detector, root, setting.groups, out, **training)
    cost = {"training seconds": None if resumed else time.time() - start}  # judging included
    cost["megabytes"] = megabytes(detector)
    test = detector.folder(root, "test", categories=list(detector.categories))
    report = da.evaluate(detector, test)
    judged = da.evaluate(detector, test, protocol=protocol).mean
    tasks = [read_description(out / f"task_{k + 1}" / "weights") for k in range(len(data))]
    found = _found(report, judged, cost, sum(task["record"]["steps"] for task in tasks))
    several = len(setting.groups) > 1
    return found | {"forgetting": {m: result.forgetting(m) for m in METRICS} if several else {}}


def _found(report: da.Report, judged: dict, cost: dict, steps: int) -> dict:
    """What both kinds of runs tell, in types that JSON knows; the report as it is."""
    rows = tables.to_plain(report)["table"]
    means = {"here": report.mean, "protocol": judged}
    return {
        **{"report": report, "cost": cost, "steps": steps},
        "categories here": [row for row in rows if row["category"] != "mean"],
        "mean": {
            way: {m: None if mean[m] != mean[m] else mean[m] for m in METRICS}
            for way, mean in means.items()
        },
    }


def means(found: dict, setting: Setting) -> tables.Shown:
    """Means of a run, by exact metrics and the paper's protocol, beside the published ones.

    `found` is what a run's `table.json` holds.
    """
    rows = []
    for metric in METRICS:
        row = {"mean over categories": tables.HEADERS[metric]}
        row |= {"here": found["mean"]["here"][metric]}
        row |= {"by the paper's protocol": found["mean"]["protocol"][metric]}
        rows.append(row | {"published": setting.published.get(metric)})
        if found.get("forgetting"):
            rows[-1]["forgotten here"] = found["forgetting"][metric]
    return tables.rows(rows, percent=[key for key in rows[0] if key != "mean over categories"])


def _text(title: str, setting: Setting, facts: dict, found: dict) -> str:
    """The table for people: what was done, the means beside the published ones, and categories."""
    lines = [f"# {title}", ""]
    lines += [*(f"- {key}: {value}" for key, value in facts.items()), ""]
    by_category = [{m: row[m] for m in ("category", *METRICS)} for row in found["categories here"]]
    return "\n".join([*lines, repr(means(found, setting)), "", repr(tables.rows(by_category))])
