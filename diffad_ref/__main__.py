"""The command line: `python -m diffad_ref data|train|evaluate|predict`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import diffad_ref
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
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.evaluation import batch_generator, evaluate
from diffad_ref.latents import CachedLatents
from diffad_ref.official_deco_diff import start_from_imagenet
from diffad_ref.texture_sources import texture_bank
from diffad_ref.toy import toy_factory
from diffad_ref.training import fit

BASELINES = {"template": Template, "PCA": PCA}
DATA = "a folder in the MVTec layout (<category>/train/good, test/…), or the word toy"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 with a message when the input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    arguments.command = "python -m diffad_ref " + shlex.join(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"diffad_ref: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffad_ref", description="Find defects with diffusion models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, help):
        sub = commands.add_parser(
            run.__name__.strip("_"),
            help=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.add_argument("--threads", type=positive, help="CPU threads; fewer can be faster")
        sub.set_defaults(run=run)
        return sub

    sub = command(_data, "make the toy data set, or say what a folder holds")
    sub.add_argument("data", help=DATA)
    sub.add_argument("--image-size", type=positive, default=64, help="pixels, for the toy")
    sub.add_argument("--seed", type=int, default=0, help="for the toy")

    sub = command(_train, "train a detector on the good images of a folder")
    sub.add_argument("data", help=DATA)
    sub.add_argument("--out", required=True, type=Path, help="folder for checkpoints and weights")
    sub.add_argument("--method", choices=sorted(METHODS), default="DiffusionAD", help="which paper")
    sub.add_argument("--profile", choices=["tiny", "paper"], default="tiny", help="CPU or GPU size")
    sub.add_argument(
        "--image-size", type=positive, default=None, help="pixels, instead of the profile's"
    )
    sub.add_argument("--categories", nargs="+", help="only these")
    sub.add_argument("--textures", help="folder of foreign textures, such as dtd/images")
    sub.add_argument(
        "--no-reconstruction", action="store_true", help="DiffusionAD's segmentation-only ablation"
    )
    _add_set(sub)
    sub.add_argument(
        "--latents", type=Path, help="DecoDiff: compute latents once, and keep them in this file"
    )
    sub.add_argument(
        "--imagenet", type=Path, help="DecoDiff: start from this latent-diffusion checkpoint"
    )
    sub.add_argument("--steps", type=positive, help="instead of the recipe's")
    sub.add_argument("--batch-size", type=positive, help="instead of the recipe's")
    sub.add_argument("--accumulate", type=positive, default=1, help="batches a step")
    sub.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help=" ")
    sub.add_argument("--ema", type=float, help="decay of an average of the weights, such as 0.999")
    sub.add_argument("--workers", type=int, default=0, help="processes that load images")
    sub.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    sub.add_argument("--seed", type=int, default=0, help=" ")

    sub = command(_evaluate, "measure a detector on the test images of a folder")
    sub.add_argument("weights", help="a .safetensors file with its .json; or template or PCA")
    sub.add_argument("data", help=DATA)
    sub.add_argument("--categories", nargs="+", help="only these")
    sub.add_argument("--image-size", type=positive, help="pixels, for template and PCA")
    _add_set(sub)
    sub.add_argument("--batch-size", type=positive, default=32, help="images at a time")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    sub.add_argument("--save", type=Path, help="write the report and its commands as JSON")
    sub.add_argument("--record", action="store_true", help="write it into the weights' .json")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")

    sub = command(_predict, "write heat maps and scores for your own images")
    sub.add_argument("weights", help="a .safetensors file with its .json")
    sub.add_argument("images", type=Path, help="an image or a folder of images")
    sub.add_argument("--category", help="what they show, for a model that must know")
    sub.add_argument("--out", required=True, type=Path, help="folder for heat maps and scores.csv")
    sub.add_argument("--batch-size", type=positive, default=32, help="images at a time")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


def _add_set(sub) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the config, value as JSON: corruption.mask_ratio=[0,0.3]",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _data(arguments) -> None:
    root = _root(arguments.data, arguments.image_size, arguments.seed)
    print(root)
    train, test = (AnomalyFolder(root, split, cache=False) for split in ("train", "test"))
    for category in train.categories:
        kinds = {}
        for sample in test.samples:
            if sample.category == category:
                kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
        n = sum(sample.category == category for sample in train.samples)
        print(f"  {category}: {n} train; test " + ", ".join(f"{k} {v}" for k, v in kinds.items()))


def _train(arguments) -> None:
    config = _config(arguments)
    root = _root(arguments.data, config.image_size, 0)
    data = AnomalyFolder(
        root, "train", getattr(config, "resize", config.image_size), arguments.categories
    )
    detector = _detector(arguments, config, data)
    if arguments.latents:
        data = _latents(arguments, config, root, detector)
    start = time.time()
    history = fit(
        detector,
        data,
        arguments.steps,
        arguments.batch_size,
        out=arguments.out,
        seed=arguments.seed,
        accumulate=arguments.accumulate,
        mixed_precision=arguments.mixed_precision,
        ema=arguments.ema,
        save_every=arguments.save_every,
        num_workers=arguments.workers,
    )
    record = {
        "command": arguments.command,
        "seed": arguments.seed,
        "steps": len(history.rows),
        "minutes_since_last_start": round((time.time() - start) / 60, 1),
        "data": {"name": Path(root).name, "images": len(data), "categories": data.categories},
        "versions": versions(),
        "final_losses": {
            name: sum(history.column(name)[-100:]) / len(history.column(name)[-100:])
            for name in history.rows[-1]
            if name not in ("step", "stage")
        },
    }
    # Half the size; what a run needs to go on is kept in full beside it.
    print(save_checkpoint(detector, arguments.out / "weights", record, half=True))


def _config(arguments):
    """The profile of the method, with what the command line changes."""
    profile = getattr(METHODS[arguments.method].Config, arguments.profile)
    size = {"image_size": arguments.image_size} if arguments.image_size else {}
    config = profile(**size)
    config = _changed(config, arguments.set)
    if not arguments.no_reconstruction:
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


def _detector(arguments, config, data):
    """A new detector, sized for the data."""
    torch.manual_seed(arguments.seed)
    if arguments.method == "DiffusionAD":
        _refuse(arguments, "latents", "imagenet")
        textures = texture_bank(arguments.textures) if arguments.textures else None
        return DiffusionAD(config, textures=textures)
    _refuse(arguments, "textures")
    detector = DecoDiff(replace(config, classes=len(data.categories)))
    if arguments.imagenet:
        kept = start_from_imagenet(detector, arguments.imagenet)
        print(f"not in {arguments.imagenet}, or of another shape: {', '.join(kept) or 'nothing'}")
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
        if getattr(arguments, name):
            raise ValueError(f"--{name} is not for {arguments.method}")


def _view(config) -> dict:
    """How a detector's config wants to see an image: resized, and perhaps its middle only."""
    resize = getattr(config, "resize", config.image_size)
    return {
        "image_size": resize,
        "crop": config.image_size if resize != config.image_size else None,
    }


def _evaluate(arguments) -> None:
    commands = [arguments.command]
    if arguments.weights in BASELINES:
        if arguments.set or arguments.record:
            raise ValueError("--set and --record are for weights, not for template and PCA")
        size = arguments.image_size or 64
        root = _root(arguments.data, size, 0)
        train = AnomalyFolder(root, "train", size, arguments.categories)
        detector = BASELINES[arguments.weights]().fit(train)
        data = AnomalyFolder(root, "test", size, arguments.categories)
    else:
        detector = _rebuilt(load_checkpoint(arguments.weights), arguments)
        detector.to(Accelerator().device)
        trained = read_description(arguments.weights)["record"]
        root = _root(arguments.data, detector.config.image_size, 0)
        commands = [trained["command"], *commands] if "command" in trained else commands
        data = AnomalyFolder(
            root, "test", categories=arguments.categories, **_view(detector.config)
        )
    report = evaluate(detector, data, batch_size=arguments.batch_size, seed=arguments.seed)
    report.intervals = intervals(report)
    print(report.to_json() if arguments.json else f"{report}\n\n{report.by_kind()}")
    if arguments.save:
        entries = {"commands": commands, "versions": versions(), "report": report.to_dict()}
        write_text(json.dumps(entries, indent=1), arguments.save)
    if arguments.record:
        add_to_record(arguments.weights, {"report": report.to_dict()})


def _rebuilt(detector, arguments):
    """The same weights under other settings; settings that would need other weights are refused."""
    if not arguments.set:
        return detector
    if arguments.record:
        raise ValueError("--record is for the weights as they are: leave --set out, or use --save")
    changed = type(detector)(_changed(detector.config, arguments.set))
    changed.categories = detector.categories
    load_weights(changed, detector.state_dict(), f"{arguments.weights} with --set")
    return changed.eval()


def _predict(arguments) -> None:
    from diffad_ref.plots import save_heat_map  # matplotlib is slow to import

    detector = load_checkpoint(arguments.weights).to(Accelerator().device)
    image = arguments.images if arguments.images.is_file() else None
    folder = image.parent if image else arguments.images
    source = {"good": folder} if image else {"test": folder}  # an image alone has no kind
    data = AnomalyFolder.from_folders(**source, **_view(detector.config))
    category = _category(detector, arguments.category)
    if image:
        data.samples = [sample for sample in data.samples if sample.path == image]
    if not data.samples:
        raise ValueError(f"{image} does not end as an image does")
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "score"])
    loader = DataLoader(data, arguments.batch_size)
    for number, batch in enumerate(tqdm(loader, "predict")):
        generator = batch_generator(detector.device, arguments.seed, number)
        classes = None if category is None else torch.full((len(batch["image"]),), category)
        prediction = detector.predict(batch["image"], classes, generator=generator)
        for i, path in enumerate(batch["path"]):
            name = Path(path).relative_to(folder)  # sub-folders may hold files of equal name
            heat_map = arguments.out / name.with_name(f"{name.name}_map.png")
            heat_map.parent.mkdir(parents=True, exist_ok=True)
            save_heat_map(batch["image"][i], prediction.anomaly_map[i], heat_map)
            rows.writerow([path, f"{prediction.score[i]:.6f}"])
    write_text(table.getvalue(), arguments.out / "scores.csv")
    print(arguments.out / "scores.csv")


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


if __name__ == "__main__":
    sys.exit(main())
