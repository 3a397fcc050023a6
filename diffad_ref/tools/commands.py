"""What the commands of the command line do; their words stand in `__main__.py`."""

from __future__ import annotations

import csv
import io
import json
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import diffad_ref
from diffad_ref import evaluation
from diffad_ref import plan as planning
from diffad_ref.baselines import PCA, Template
from diffad_ref.bootstrap import intervals
from diffad_ref.checkpoints import (
    METHODS,
    add_to_record,
    from_plain,
    load_checkpoint,
    load_weights,
    read_description,
    save_checkpoint,
    write_text,
)
from diffad_ref.committee import Committee
from diffad_ref.continual import ORDERS, check_tasks, fit_continual, summarise
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.latents import CachedLatents
from diffad_ref.official_deco_diff import start_from_imagenet
from diffad_ref.one_for_more import OneForMore
from diffad_ref.sheet import write_sheet
from diffad_ref.tables import HEADERS
from diffad_ref.texture_sources import Photographs, texture_bank
from diffad_ref.toy import toy_factory
from diffad_ref.training import fit

BASELINES = {"template": Template, "PCA": PCA}


def data(arguments) -> None:
    """Say what a data set holds; make the toy if that is what is asked for."""
    root = _root(arguments.data, arguments.image_size, arguments.seed)
    train, test = (AnomalyFolder(root, split, cache=False) for split in ("train", "test"))
    found = {
        category: {
            "train": sum(sample.category == category for sample in train.samples),
            "test": Counter(s.kind for s in test.samples if s.category == category),
        }
        for category in train.categories
    }
    if arguments.json:
        print(json.dumps({"root": str(root), "categories": found}, indent=1))
        return
    print(root)
    for category, counts in found.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts["test"].items())
        print(f"  {category}: {counts['train']} train; test {kinds}")


def train(arguments) -> None:
    """Train a detector; weights and what is needed to go on come to `--out`."""
    config = _config(arguments)
    root = _root(arguments.data, config.image_size, 0)
    size = getattr(config, "resize", config.image_size)
    if arguments.data == "photographs":
        data = Photographs(size)
    else:
        data = AnomalyFolder(root, "train", size, arguments.categories)
    detector = _detector(arguments, config, len(data.categories))
    if arguments.latents:
        data = _latents(arguments, config, root, detector)
    start = time.time()
    history = fit(detector, data, out=arguments.out, **_training(arguments))
    record = {
        "command": arguments.command,
        "seed": arguments.seed,
        "steps": len(history.rows),
        "minutes_since_last_start": round((time.time() - start) / 60, 1),
        "data": {"name": Path(root).name, "images": len(data), "categories": list(data.categories)},
        "versions": versions(),
        "final_losses": history.ending(),
    }
    # Half the size; what a run needs to go on is kept in full beside it.
    path = save_checkpoint(detector, arguments.out / "weights", record, half=True)
    print(json.dumps({"weights": str(path)} | record, indent=1) if arguments.json else path)


def continual(arguments) -> None:
    """Train task by task; each task's weights, memory and results stand in a folder of `--out`."""
    tasks = ORDERS[arguments.order] if arguments.order else [t.split(",") for t in arguments.tasks]
    check_tasks(tasks)
    config = _config(arguments)
    root = _root(arguments.data, config.image_size, 0)
    result = fit_continual(
        _detector(arguments, config, sum(map(len, tasks))),
        root,
        tasks,
        arguments.out,
        protection=arguments.protection,
        gamma=arguments.gamma,
        energy=arguments.energy,
        every=arguments.every,
        later_rate=arguments.later_rate,
        later_steps=arguments.later_steps,
        **_training(arguments),
    )
    for number in range(len(tasks)):
        weights = arguments.out / f"task_{number + 1}" / "weights"
        add_to_record(weights, {"command": arguments.command, "versions": versions()})
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
        print(f"{HEADERS[metric]}\n\n{result.table(metric)}\n")
    print(summarise({arguments.protection: result}))
    if arguments.save:
        entries = {"commands": [arguments.command], "versions": versions()}
        entries |= {"gamma": arguments.gamma, "continual": result.to_dict()}
        write_text(json.dumps(entries, indent=1), arguments.save)


def _training(arguments) -> dict:
    """The arguments of `fit` that the command line knows."""
    return {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "accumulate": arguments.accumulate,
        "mixed_precision": arguments.mixed_precision,
        "ema": arguments.ema,
        "save_every": arguments.save_every,
        "num_workers": arguments.workers,
    }


def _config(arguments):
    """The profile of the method, with what the command line changes."""
    profile = getattr(METHODS[arguments.method].Config, arguments.profile)
    size = {"image_size": arguments.image_size} if arguments.image_size else {}
    config = profile(**size)
    config = _changed(config, arguments.set)
    if not getattr(arguments, "no_reconstruction", False):
        return config
    if not hasattr(config, "without_reconstruction"):
        raise ValueError(f"{arguments.method} is nothing without its reconstruction")
    return config.without_reconstruction()


def _changed(config, settings: list[str]):
    """A config with some NAME=VALUE put into it."""
    plain = json.loads(json.dumps(asdict(config)))
    for setting in settings:
        _change(plain, setting)
    try:
        return from_plain(type(config), plain)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--set {' '.join(settings)}: {error}") from error


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
    except ValueError as error:
        raise ValueError(f"--set {setting}: expected NAME=VALUE, value as JSON") from error


def _detector(arguments, config, classes: int):
    """A new detector for so many categories."""
    torch.manual_seed(arguments.seed)
    if arguments.method != "DiffusionAD":
        _refuse(arguments, "textures")
    if arguments.method != "DecoDiff":
        _refuse(arguments, "latents", "imagenet")
    if arguments.method == "OneForMore":
        return OneForMore(config)
    if arguments.method == "DiffusionAD":
        folder = getattr(arguments, "textures", None)
        return DiffusionAD(config, textures=texture_bank(folder) if folder else None)
    detector = DecoDiff(replace(config, classes=classes))
    if getattr(arguments, "imagenet", None):
        kept = start_from_imagenet(detector, arguments.imagenet)
        missing = (
            f"not in {arguments.imagenet}, or of another shape: {', '.join(kept) or 'nothing'}"
        )
        print(missing, file=sys.stderr)
    return detector


def _latents(arguments, config, root: Path, detector) -> CachedLatents:
    """The training images as latents, from a cache; their crops do not move then."""
    data = AnomalyFolder(
        root, "train", config.resize, arguments.categories, cache=False, crop=config.image_size
    )
    detector.to(Accelerator().device).prepare(data)
    return CachedLatents(data, detector.codec, arguments.latents)


def _refuse(arguments, *names: str) -> None:
    for name in names:
        if getattr(arguments, name, None):
            raise ValueError(f"--{name} is not for {arguments.method}")


def evaluate(arguments) -> None:
    """Measure weights, or a baseline, on test images."""
    if arguments.record and arguments.protocol != "exact":
        raise ValueError("--record keeps exact metrics: with --protocol use --save")
    commands = [arguments.command]
    if arguments.weights in BASELINES:
        if arguments.set or arguments.record or arguments.others:
            raise ValueError("--set, --with and --record are for weights, not for template and PCA")
        size = arguments.image_size or 64
        root = _root(arguments.data, size, 0)
        train = AnomalyFolder(root, "train", size, arguments.categories)
        options = {"adapt": arguments.adapt, "masking": arguments.masking}
        detector = BASELINES[arguments.weights](**options).fit(train)
        data = AnomalyFolder(root, "test", size, arguments.categories)
    else:
        if arguments.adapt or arguments.masking:
            raise ValueError(
                "--adapt and --masking are for template and PCA: weights have them in the config"
            )
        paths = [arguments.weights, *(arguments.others or ())]
        detectors = [_rebuilt(path, arguments) for path in paths]
        detector = Committee(detectors) if arguments.others else detectors[0]
        detector.to(Accelerator().device)
        records = [read_description(path)["record"] for path in paths]
        commands = [*(r["command"] for r in records if "command" in r), *commands]
        root = _root(arguments.data, detector.config.image_size, 0)
        data = AnomalyFolder(root, "test", categories=arguments.categories, **detector.view)
    report = evaluation.evaluate(
        detector,
        data,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        protocol=arguments.protocol,
    )
    report.intervals = intervals(report)
    print(report.to_json() if arguments.json else f"{report}\n\n{report.by_kind()}")
    if arguments.save:
        entries = {"commands": commands, "versions": versions(), "report": report.to_dict()}
        write_text(json.dumps(entries, indent=1), arguments.save)
    if arguments.record:
        summary = {name: part for name, part in report.to_dict().items() if name != "images"}
        add_to_record(arguments.weights, {"report": summary})
    if arguments.pictures:
        from diffad_ref.plots import best_and_worst  # matplotlib is slow to import

        best_and_worst(report, data).savefig(arguments.pictures, format="png", dpi=150)


def _rebuilt(weights: str, arguments):
    """A detector, perhaps under other settings; such as need other weights are refused."""
    detector = load_checkpoint(weights)
    if arguments.record and (arguments.set or arguments.others):
        raise ValueError(
            "--record is for the weights as they are: leave --set and --with out, or use --save"
        )
    if not arguments.set:
        return detector
    changed = type(detector)(_changed(detector.config, arguments.set))
    changed.categories = detector.categories
    load_weights(changed, detector.state_dict(), f"{weights} with --set")
    return changed.eval()


def plan(arguments) -> None:
    """Tables of weights, arithmetic, memory and hours at the papers' size."""
    plans = planning.paper_plans()
    share = f"{arguments.utilisation:.0%} of the peak in 16 bit"
    tables = {
        "size": planning.size_table(plans),
        "memory of a training step": planning.memory_table(plans, arguments.batch_sizes),
        f"the whole recipe at {share}": planning.hours_table(plans, arguments.utilisation),
    }
    if arguments.json:
        print(json.dumps({title: table.rows for title, table in tables.items()}, indent=1))
        return
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables.items()))


def predict(arguments) -> None:
    """Heat maps and scores for images without labels."""
    from diffad_ref.plots import save_heat_map  # matplotlib is slow to import

    detector = load_checkpoint(arguments.weights).to(Accelerator().device)
    image = arguments.images if arguments.images.is_file() else None
    folder = image.parent if image else arguments.images
    source = {"good": folder} if image else {"test": folder}  # an image alone has no kind
    data = AnomalyFolder.from_folders(**source, **detector.view)
    category = _category(detector, arguments.category)
    if image:
        data.samples = [sample for sample in data.samples if sample.path == image]
    if not data.samples:
        raise ValueError(f"{image} does not end as an image does")
    records, maps = [], []
    for number, batch in enumerate(tqdm(DataLoader(data, arguments.batch_size), "predict")):
        generator = evaluation.batch_generator(detector.device, arguments.seed, number)
        classes = None if category is None else torch.full((len(batch["image"]),), category)
        prediction = detector.predict(batch["image"], classes, generator=generator)
        maps.append(prediction.anomaly_map.half().cpu())
        for path, score in zip(batch["path"], prediction.score.tolist(), strict=True):
            name = Path(path).relative_to(folder)  # sub-folders may hold files of equal name
            heat_map = name.with_name(f"{name.name}_map.png")
            records.append({"path": path, "name": name, "score": score, "map": heat_map})
    maps = torch.cat(maps).float()
    limits = (0.0, max(1.0, maps.max().item()))  # one scale for all; most methods end at 1
    for record, sample, anomaly_map in zip(records, data, maps, strict=True):
        path = arguments.out / record["map"]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_heat_map(sample["image"], anomaly_map, path, limits)
    write_sheet(records, arguments.out / "sheet.html", f"{len(records)} images, {folder.name}")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "score"])
    rows.writerows([record["path"], f"{record['score']:.6f}"] for record in records)
    write_text(table.getvalue(), arguments.out / "scores.csv")
    if arguments.json:
        kept = ("path", "score", "map")
        plain = [{name: record[name] for name in kept} for record in records]
        print(json.dumps(plain, indent=1, default=str))
        return
    print(arguments.out / "scores.csv")
    print(arguments.out / "sheet.html")


def compare(arguments) -> None:
    """One table of several reports that `evaluate --save` wrote."""
    reports = {}
    for path in arguments.reports:
        name = path.stem.replace("_", " ")
        if name in reports:
            raise ValueError(f"two reports are called {name!r}: give the files different names")
        try:
            reports[name] = evaluation.Report.from_dict(json.loads(path.read_text())["report"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no report that `evaluate --save` wrote") from error
    table = evaluation.compare(reports)
    if arguments.json:
        print(json.dumps(table.rows, indent=1))
        return
    if arguments.csv:
        print(table.to_csv(), end="")
        return
    print(table)
    for metric in ("image_auroc", "pixel_ap"):
        print(f"\n{HEADERS[metric]} by kind of defect\n")
        print(evaluation.compare_kinds(reports, metric))


def _category(detector, name: str | None) -> int | None:
    """The index of a category that the user names."""
    if name is None:
        return None
    if name not in detector.categories:
        raise ValueError(f"unknown category {name!r}; known: {', '.join(detector.categories)}")
    return detector.categories.index(name)


def _root(data: str, size: int, seed: int) -> Path:
    return toy_factory(size=size, seed=seed) if data == "toy" else Path(data)


def versions() -> dict[str, str]:
    """Of everything that may change a number."""
    return {
        "diffad_ref": diffad_ref.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
