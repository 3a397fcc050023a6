"""The command line: `python -m diffad_ref data|train|continual|evaluate|compare|plan|predict`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from diffad_ref import commands
from diffad_ref.checkpoints import METHODS
from diffad_ref.continual import ENERGY, GAMMA, ORDERS, PROTECTIONS
from diffad_ref.plan import UTILISATION
from diffad_ref.protocols import PROTOCOLS

DATA = "a folder in the MVTec layout (<category>/train/good, test/…), or the word toy"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 with a message when the input is at fault, 130 after Ctrl-C."""
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
    except KeyboardInterrupt:
        print("diffad_ref: stopped; a training goes on where it was saved", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffad_ref",
        description="Find defects with diffusion models.",
        epilog="Exit codes: 0 done, 2 the input is at fault (a message says how), 130 interrupted.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, help):
        sub = subparsers.add_parser(
            run.__name__,
            help=help,
            description=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.add_argument("--threads", type=positive, help="CPU threads; fewer can be faster")
        sub.set_defaults(run=run)
        return sub

    sub = command(commands.data, "make the toy data set, or say what a folder holds")
    sub.add_argument("data", help=DATA)
    sub.add_argument("--image-size", type=positive, default=64, help="pixels, for the toy")
    sub.add_argument("--seed", type=int, default=0, help="for the toy")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(commands.train, "train a detector on the good images of a folder")
    _add_model(sub, "DiffusionAD", f"{DATA}, or photographs")
    sub.add_argument("--categories", nargs="+", help="only these")
    sub.add_argument("--textures", help="folder of foreign textures, such as dtd/images")
    sub.add_argument(
        "--no-reconstruction", action="store_true", help="DiffusionAD's segmentation-only ablation"
    )
    sub.add_argument(
        "--latents", type=Path, help="DecoDiff: compute latents once, and keep them in this file"
    )
    sub.add_argument(
        "--imagenet", type=Path, help="DecoDiff: start from this latent-diffusion checkpoint"
    )
    _add_training(sub)
    sub.add_argument("--json", action="store_true", help="print what the weights' .json records")

    sub = command(commands.continual, "train on categories task by task, and measure forgetting")
    _add_model(sub, "OneForMore")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--order", choices=ORDERS, help="a paper's tasks by their name")
    which.add_argument(
        "--tasks", nargs="+", metavar="A,B", help="your own: categories of a task by commas"
    )
    sub.add_argument("--protection", choices=PROTECTIONS, default="update", help="of old tasks")
    sub.add_argument("--gamma", type=float, default=GAMMA, help="share of energy that is protected")
    sub.add_argument(
        "--energy", type=float, default=ENERGY, help="share that the running SVD keeps"
    )
    sub.add_argument("--every", type=positive, default=1, help="gather every so-manyth image")
    sub.add_argument(
        "--later-rate", type=float, default=1.0, help="learning rate after task 1, as a share"
    )
    sub.add_argument("--later-steps", type=positive, help="steps of each task after task 1")
    sub.add_argument("--save", type=Path, help="write results and command as JSON")
    _add_training(sub)

    sub = command(commands.evaluate, "measure a detector on the test images of a folder")
    sub.add_argument("weights", help="a .safetensors file with its .json; or template or PCA")
    sub.add_argument("data", help=DATA)
    sub.add_argument(
        "--with", nargs="+", dest="others", metavar="WEIGHTS", help="average the maps of these, too"
    )
    sub.add_argument("--categories", nargs="+", help="only these")
    sub.add_argument("--image-size", type=positive, help="pixels, for template and PCA")
    sub.add_argument(
        "--adapt", action="store_true", help="template and PCA: see images in equal light"
    )
    sub.add_argument(
        "--masking",
        type=float,
        default=0.0,
        help="template and PCA: contrast that halves a difference",
    )
    _add_set(sub)
    sub.add_argument("--batch-size", type=positive, default=32, help="images at a time")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    sub.add_argument(
        "--protocol",
        choices=["exact", *PROTOCOLS],
        default="exact",
        help="metrics as they should be, or as a released code computes them",
    )
    sub.add_argument("--pictures", type=Path, metavar="PNG", help="best and worst images")
    sub.add_argument("--save", type=Path, help="write the report and its commands as JSON")
    sub.add_argument("--record", action="store_true", help="write its tables beside the weights")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")

    sub = command(commands.compare, "put several reports into one table")
    sub.add_argument(
        "reports",
        nargs="+",
        type=Path,
        help="files of `evaluate --save`; their names name the rows",
    )
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, fractions in [0, 1]")
    form.add_argument("--csv", action="store_true", help="print CSV, fractions in [0, 1]")

    sub = command(commands.plan, "what training at the papers' size costs; needs no GPU")
    sub.add_argument("--utilisation", type=float, default=UTILISATION, help="share of a GPU's peak")
    sub.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 4, 16], help="for the memory table"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(commands.predict, "write heat maps and scores for your own images")
    sub.add_argument("weights", help="a .safetensors file with its .json")
    sub.add_argument("images", type=Path, help="an image or a folder of images")
    sub.add_argument("--category", help="what they show, for a model that must know")
    sub.add_argument(
        "--out", required=True, type=Path, help="folder for heat maps, scores.csv, sheet.html"
    )
    sub.add_argument("--batch-size", type=positive, default=32, help="images at a time")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    sub.add_argument("--json", action="store_true", help="print scores and files as JSON")
    return parser


def _add_model(sub, method: str, data: str = DATA) -> None:
    """On what, and which model, is trained."""
    sub.add_argument("data", help=data)
    sub.add_argument("--out", required=True, type=Path, help="folder for checkpoints and weights")
    sub.add_argument("--method", choices=sorted(METHODS), default=method, help="which paper")
    sub.add_argument("--profile", choices=["tiny", "paper"], default="tiny", help="CPU or GPU size")
    sub.add_argument("--image-size", type=positive, help="pixels, instead of the profile's")
    _add_set(sub)


def _add_training(sub) -> None:
    """How it is trained."""
    sub.add_argument("--steps", type=positive, help="instead of the recipe's")
    sub.add_argument("--batch-size", type=positive, help="instead of the recipe's")
    sub.add_argument("--accumulate", type=positive, default=1, help="batches a step")
    sub.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help=" ")
    sub.add_argument("--ema", type=float, help="decay of an average of the weights, such as 0.999")
    sub.add_argument("--workers", type=int, default=0, help="processes that load images")
    sub.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    sub.add_argument("--seed", type=int, default=0, help=" ")


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


if __name__ == "__main__":
    sys.exit(main())
