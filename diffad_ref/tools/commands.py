"""What the shell can ask for: data, train, continual, evaluate, compare, plan, reproduce, predict.

Each command is a class. Its fields are the words that may follow it, and `tyro` shows their
comments as help; `run` does what they say.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group

import diffad_ref as da
from diffad_ref.anomalies import texture_bank
from diffad_ref.checkpoints import (
    claimed,
    read_description,
    read_json,
    sweep,
    try_writing,
    weights_path,
    write_text,
    write_whole,
)
from diffad_ref.continual import GAMMA, PROTECTIONS, check_tasks
from diffad_ref.detector import PRECISIONS, precision_on
from diffad_ref.tools import baselines, options, own_images, plan, reproduce, settings, tables
from diffad_ref.tools.intervals import intervals
from diffad_ref.tools.latents import CachedLatents
from diffad_ref.tools.memory import peak_memory
from diffad_ref.tools.options import (
    Count,
    Model,
    Names,
    Root,
    Seed,
    Settings,
    Threads,
    Training,
    Weights,
)
from diffad_ref.tools.photographs import Photographs
from diffad_ref.tools.protection import protection_table
from diffad_ref.tools.protocols import ORDERS, PROTOCOLS
from diffad_ref.tools.records import add_to_record, megabytes, versions
from diffad_ref.training import STATE, meet

BASELINES = {"template": baselines.Template, "PCA": baselines.PCA}
BASELINES["nearest"] = baselines.NearestFeatures
WHICH = create_mutex_group(required=True, title="tasks")
FORM = create_mutex_group(required=False, title="form")


@dataclass(kw_only=True)
class Command:
    """What all commands know."""

    threads: Threads | None = None  # CPU threads; fewer can be faster

    def show(self, plain, *texts) -> None:
        """Print JSON if the command was asked for it, else the texts."""
        print(json.dumps(plain, indent=1, default=str) if self.json else "\n".join(map(str, texts)))


@dataclass(kw_only=True)
class Data(Command):
    """Make the toy data set, or say what a folder holds."""

    data: Root
    image_size: Count = 64  # pixels, for the toy
    seed: Seed = 0  # for the toy
    json: bool = False  # print JSON

    def run(self, command: str) -> None:
        root = options.root_of(self.data, self.image_size, self.seed)
        train, test = (da.AnomalyFolder(root, split, cache=False) for split in ("train", "test"))
        counts = Counter(sample.category for sample in train.samples)
        found, lines = {}, [root]
        for name in train.categories:
            kinds = Counter(sample.kind for sample in test.samples if sample.category == name)
            found[name] = {"train": counts[name], "test": kinds}
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"  {name}: {counts[name]} train; test {listed}")
        self.show({"root": root, "categories": found}, *lines)


@dataclass(kw_only=True)
class Train(Command):
    """Train a detector on the good images of a folder, or of no product: the word photographs."""

    data: Root
    out: Path  # folder for checkpoints and weights
    model: Model = Model()
    categories: Names = None  # only these
    textures: Path | None = None  # DiffusionAD: folder of foreign textures, such as dtd/images
    no_reconstruction: bool = False  # DiffusionAD: the segmentation-only ablation
    latents: Path | None = None  # DecoDiff: compute latents once, and keep them in this file
    imagenet: Path | None = None  # DecoDiff: start from this latent-diffusion checkpoint
    training: Training = Training()
    json: bool = False  # print what the weights' .json records

    def run(self, command: str) -> None:
        for name in ("textures", "no_reconstruction", "latents", "imagenet"):
            method = "DecoDiff" if name in ("latents", "imagenet") else "DiffusionAD"
            if getattr(self, name) and self.model.method != method:
                raise ValueError(f"--{name.replace('_', '-')} is not for {self.model.method}")
        config = self.model.config()
        root = options.root_of(self.data, config.image_size)
        detector, data = self._detector_and_data(config, root)
        resumed, start, path = (self.out / STATE).exists(), time.time(), self.out / "weights"
        there = path.with_suffix(".json").exists()
        known = (read_description(path).get("record") if there else None) or {}
        with plan.what_fits(detector, self.training.precision):
            history = da.fit(detector, data, out=self.out, **vars(self.training))
        record = {
            "command": command,
            "seed": self.training.seed,
            "steps": len(history.rows),
            "precision": precision_on(detector.device, self.training.precision),
            "training_seconds": known.get("training_seconds"),  # of the whole run
            "data": {"name": root.name, "images": len(data), "categories": list(data.categories)},
            "versions": versions(),
            "final_losses": history.ending(),
        }
        if not resumed:
            record["training_seconds"] = round(time.time() - start)
        # Half the size; what a run needs to go on is kept in full beside it.
        path = da.save(detector, path, record, half=True)
        self.show({"weights": path} | record, path)

    def _detector_and_data(self, config, root: Path):
        photographs, only = self.data == "photographs", {"categories": self.categories}
        found = Photographs if photographs else da.AnomalyFolder(root, cache=False, **only)
        kind = baselines.SegmentationOnly if self.no_reconstruction else None
        detector = self.model.detector(config, len(found.categories), self.training.seed, kind)
        if self.textures:
            detector.textures = texture_bank(self.textures)
        if self.imagenet:
            from diffad_ref.tools.official_deco_diff import start_from_imagenet  # slow to import

            kept = ", ".join(start_from_imagenet(detector, self.imagenet)) or "nothing"
            print(f"not in {self.imagenet}, or of another shape: {kept}", file=sys.stderr)
        if self.latents:
            still = detector.folder(root, "train", crop=config.image_size, cache=False, **only)
            detector.to(meet().device).prepare(still)
            return detector, CachedLatents(still, detector.codec, self.latents)
        if photographs:
            return detector, Photographs(detector.view("train")["image_size"])
        return detector, detector.folder(root, "train", **only)


@dataclass(kw_only=True)
class Continual(Command):
    """Train on categories task by task, and measure forgetting; a folder of `--out` for each."""

    data: Root
    out: Path  # folder for checkpoints and weights
    model: Model = Model("OneForMore")
    order: Annotated[Literal[tuple(ORDERS)] | None, WHICH] = None  # a paper's tasks by their name
    # your own: categories of a task by commas
    tasks: Annotated[Names, WHICH, arg(metavar="A,B [C ...]")] = None
    protection: Literal[tuple(PROTECTIONS)] = "update"  # of old tasks
    gamma: float | None = None  # share of energy that is protected; else the method's
    every: Count | None = None  # gather every so-manyth image; else the method's
    later_rate: float = 1.0  # learning rate after task 1, as a share
    later_steps: Count | None = None  # steps of each task after task 1
    textures: Path | None = None  # DiffusionAD: folder of foreign textures, such as dtd/images
    training: Training = Training()
    save: Path | None = None  # write results and command as JSON

    def run(self, command: str) -> None:
        tasks = ORDERS[self.order] if self.order else [task.split(",") for task in self.tasks]
        check_tasks(tasks)
        if self.textures and self.model.method != "DiffusionAD":
            raise ValueError(f"--textures is not for {self.model.method}")
        check_writable(self.save)
        folders = [self.out / f"task_{number + 1}" for number in range(len(tasks))]
        _keep([self.save], [self.out / "run.json", *folders])
        new = [folder for folder in folders if not (folder / "result.json").exists()]
        config = self.model.config()
        names = ("protection", "gamma", "every", "later_rate", "later_steps")
        settings = {name: getattr(self, name) for name in names} | vars(self.training)
        detector = self.model.detector(config, sum(map(len, tasks)), self.training.seed)
        if self.textures:
            detector.textures = texture_bank(self.textures)
        root = options.root_of(self.data, config.image_size)
        with plan.what_fits(detector, self.training.precision):
            result = da.fit_continual(detector, root, tasks, self.out, **settings)
        for folder in new:
            add_to_record(folder / "weights", {"command": command, "versions": versions()})
        for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
            print(f"{tables.HEADERS[metric]}\n\n{tables.after_tasks(result, metric)}\n")
        print(tables.summarise({self.protection: result}))
        if self.save:
            entries = {"commands": [command], "versions": versions()}
            gamma = getattr(config, "gamma", GAMMA) if self.gamma is None else self.gamma
            entries |= {"gamma": gamma, "continual": asdict(result)}
            write_text(json.dumps(entries, indent=1), self.save)


@dataclass(kw_only=True)
class Evaluate(Command):
    """Measure a detector on the test images of a folder."""

    weights: Weights  # a .safetensors file with its .json; or template, PCA or nearest
    data: Root
    categories: Names = None  # only these
    image_size: Count = 64  # pixels, for template, PCA and nearest
    set: Settings = ()
    batch_size: Count = 32  # images at a time
    seed: Seed = 0  # of the noise
    precision: Literal[PRECISIONS] = "float32"  # of the networks
    protocol: Literal[("exact", *PROTOCOLS)] = "exact"  # or metrics as a released code makes them
    pictures: Path | None = None  # draw best and worst images, as PNG
    save: Path | None = None  # write the report and its commands as JSON
    record: bool = False  # write its tables beside the weights
    json: bool = False  # print JSON instead of tables

    def run(self, command: str) -> None:
        if self.record and self.protocol != "exact":
            raise ValueError("--record keeps exact metrics: with --protocol use --save")
        beside = weights_path(self.weights).with_suffix(".json") if self.record else None
        check_writable(self.save, self.pictures, beside)
        if self.weights not in BASELINES:
            path = weights_path(self.weights)
            _keep([self.save, self.pictures], [path, path.with_suffix(".json")])
        prepare = self._baseline if self.weights in BASELINES else self._loaded
        detector, data, commands, learned = prepare()
        protocol = PROTOCOLS.get(self.protocol)
        with peak_memory(detector.device) as peak:
            report = da.evaluate(
                *(detector, data, self.batch_size, self.seed),
                protocol=protocol,
                precision=self.precision,
            )
        found = {"report": tables.to_plain(report), "intervals": intervals(report)}
        note = f"{report.detector}, in %, {report.seconds_per_image:.3g} s per image, "
        note += f"{report.protocol} metrics, at most {peak.bytes / 2**30:.2f} GB of memory"
        self.show(
            found["report"] | {"intervals": found["intervals"]},
            *(tables.by_category(report), "", note, "", tables.by_kind(report)),
        )
        if self.save:
            entries = {"commands": [*commands, command], "versions": versions(), **found}
            entries["cost"] = {"megabytes": megabytes(detector), "training seconds": learned}
            write_text(json.dumps(entries, indent=1), self.save)
        if self.record:
            del found["report"]["images"]
            add_to_record(self.weights, found)
        if self.pictures:
            figure = da.plots.best_and_worst(report, data)
            write_whole(self.pictures, lambda path: figure.savefig(path, format="png", dpi=150))

    def _baseline(self):
        """A baseline that has learned, its test set, no commands, and seconds to learn."""
        if self.set or self.record:
            raise ValueError("--set and --record are for weights, not for a baseline")
        settings = {"image_size": self.image_size, "categories": self.categories}
        if self.image_size < 16:
            raise ValueError(f"a baseline needs 16 pixels or more, not {self.image_size}")
        root = options.root_of(self.data, self.image_size)
        train, test = (da.AnomalyFolder(root, split, **settings) for split in ("train", "test"))
        start = time.time()
        return BASELINES[self.weights]().fit(train), test, [], time.time() - start

    def _loaded(self):
        """A detector, its test set, the commands behind it, and seconds to learn, if known."""
        if self.record and self.set:
            raise ValueError("--record is for the weights as they are: with --set use --save")
        detector = da.load(self.weights)
        root = options.root_of(self.data, detector.config.image_size)
        if self.set:
            detector = options.with_settings(detector, self.set, root)
        detector.to(meet().device)
        record = read_description(self.weights).get("record") or {}
        commands = [record["command"]] if "command" in record else []
        data = detector.folder(root, "test", categories=self.categories)
        return detector, data, commands, record.get("training_seconds")


@dataclass(kw_only=True)
class Compare(Command):
    """Put several reports into one table."""

    # files of `evaluate --save`; their names name the rows
    reports: Annotated[list[Path], Positional, arg(metavar="REPORT [REPORT ...]")]
    json: Annotated[bool, FORM] = False  # print JSON, fractions in [0, 1]
    csv: Annotated[bool, FORM] = False  # print CSV, fractions in [0, 1]

    def run(self, command: str) -> None:
        reports: dict[str, da.Report] = {}
        for path in self.reports:
            name = path.stem.replace("_", " ")
            if name in reports:
                raise ValueError(f"two reports are called {name!r}: give the files different names")
            try:
                found = read_json(path, report=tables.REPORT)["report"]
            except ValueError as error:
                words = f"{path} is no report that `evaluate --save` wrote"
                raise ValueError(f"{words}: {error}") from error
            reports[name] = tables.from_plain(found)
        table = tables.compare(reports)
        texts = [table]
        for metric in ("image_auroc", "pixel_ap"):
            texts += ["", f"{tables.HEADERS[metric]} by kind of defect", ""]
            texts.append(tables.compare_kinds(reports, metric))
        self.show(_rows(table), *([table.frame.to_csv().rstrip()] if self.csv else texts))


@dataclass(kw_only=True)
class Plan(Command):
    """Say what training at the papers' size costs; needs no GPU, and a minute."""

    utilisation: float | None = None  # share of a GPU's peak in 16 bit; else as measured
    batch_sizes: tuple[Count, ...] = (1, 4, 16)  # for the memory table
    json: bool = False  # print JSON

    def run(self, command: str) -> None:
        plans, share = plan.paper_plans(), self.utilisation
        reached = "the measured shares" if share is None else f"{share:.0%}"
        found = {
            "size": plan.size_table(plans),
            "memory of a training step": plan.memory_table(plans, self.batch_sizes),
            "the most images of a step, by a card's memory": plan.room_table(plans),
            f"the whole recipe at {reached} of the peak in 16 bit": plan.hours_table(plans, share),
        }
        for p in plans:
            if p.protection:
                title = f"protecting old tasks in {p.method}"
                found[title] = protection_table(p.protection)
        text = "\n\n".join(f"{title}\n\n{table}" for title, table in found.items())
        self.show({title: _rows(table) for title, table in found.items()}, text)


@dataclass(kw_only=True)
class Reproduce(Command):
    """Train and judge what a paper did, beside its published numbers; goes on where it stopped."""

    paper: Annotated[Literal[tuple(settings.PAPERS)] | None, Positional] = None
    setting: Annotated[str | None, Positional] = None  # mvtec, visa, "mvtec 10-5", ...
    data: Path | None = None  # folder of the data set, in the MVTec layout
    out: Path | None = None  # folder for checkpoints and table; by default under runs/
    plan: bool = False  # only say what it takes: models, steps, hours by card, disk
    only: Names = None  # only these categories
    budget: str | None = None  # time for all steps, such as 10min: shortens the recipe
    profile: Literal["tiny", "small", "paper"] = "paper"  # a smaller size than the paper's
    image_size: Count | None = None  # pixels, instead of the profile's
    set: Settings = ()
    textures: Path | None = None  # DiffusionAD: folder of foreign textures, such as dtd/images
    imagenet: Path | None = None  # DecoDiff: start from this latent-diffusion checkpoint
    training: Training = Training()

    def run(self, command: str) -> None:
        if self.paper and self.setting:
            settings.setting_of(self.paper, self.setting)  # or say which there are
        if self.plan:
            own = ("paper", "setting", "only", "plan", "data", "out")
            if replace(self, threads=None) != Reproduce(**{n: getattr(self, n) for n in own}):
                raise ValueError("--plan counts the paper's recipe: besides it there is --only")
            wanted = [
                key
                for key in settings.SETTINGS
                if self.paper in (None, key[0]) and self.setting in (None, key[1])
            ]
            print(settings.plan_table(wanted, self.only))
            return
        if None in (self.paper, self.setting, self.data):
            raise ValueError("say what: reproduce PAPER SETTING --data FOLDER, or --plan")
        name = f"{self.paper}-{self.setting.replace(' ', '-')}"
        experiment = reproduce.Experiment(
            **{"paper": self.paper, "name": self.setting, "root": self.data},
            **{"out": self.out or Path("runs") / name, "only": self.only, "budget": self.budget},
            **{"profile": self.profile, "image_size": self.image_size, "changes": self.set},
            **{"textures": self.textures, "imagenet": self.imagenet},
            training=vars(self.training),
        )
        print(experiment.run(command))


@dataclass(kw_only=True)
class Predict(Command):
    """Write heat maps and scores for your own images."""

    weights: Weights  # a .safetensors file with its .json
    # an image or a folder of images
    images: Annotated[Path, Positional, arg(metavar="IMAGES")]
    out: Path  # folder for heat maps, scores.csv, sheet.html
    category: str | None = None  # what they show, for a model that must know
    batch_size: Count = 32  # images at a time
    precision: Literal[PRECISIONS] = "float32"  # of the networks
    seed: Seed = 0  # of the noise
    json: bool = False  # print scores and files as JSON

    def run(self, command: str) -> None:
        detector = da.load(self.weights).to(meet().device)
        data, folder = own_images.images_to_judge(detector, self.images, self.out)
        table, sheet = self.out / "scores.csv", self.out / "sheet.html"
        check_writable(table, sheet)
        places = own_images.places_of_maps(data, folder, self.out)
        way = {"batch_size": self.batch_size, "seed": self.seed, "precision": self.precision}
        with claimed(self.out):
            for inner in {place.parent for place in places}:
                sweep(inner)
            found = own_images.maps_and_scores(detector, data, self.category, **way)
            rows = own_images.write_about(data, *found, places, table, sheet)
        self.show(rows, f"judged: {len(rows)}", table, sheet)


def check_writable(*paths: Path | None) -> None:
    """Refuse, before the work, to begin what could not be written: OSError."""
    real = [Path(os.path.realpath(path)) for path in paths if path is not None]
    for path in real:
        if path.is_dir() or path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "device"
            raise OSError(f"cannot write {path}: it is a {kind}")
        if real.count(path) > 1:
            raise OSError(f"cannot write {path}: it would be two files at once")
        try_writing(path.parent)


def _keep(written: list[Path | None], kept: list[Path]) -> None:
    """Refuse to write a result over, or into, what a command reads or trains."""
    kept = {os.path.realpath(path) for path in kept}
    for path in filter(None, written):
        if kept & {os.path.realpath(place) for place in (path, *path.absolute().parents)}:
            raise ValueError(f"cannot write {path}: what belongs to weights lies there")


def _rows(table: tables.Shown) -> list[dict]:
    """Its cells as JSON knows them, fractions as they are."""
    frame = table.frame.reset_index()
    return json.loads(frame.to_json(orient="records", double_precision=15))
