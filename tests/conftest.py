"""A tiny data set in the MVTec layout, and the place where the scripts are."""

import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each would wait
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # to the last bit; a GPU has test_card.py

import numpy as np
import pytest
import torch
from PIL import Image

from diffad_ref.diffusion_ad import Config

# Scripts are run from their folder, not installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))


def write_image(path, pixels):
    """Save an array as an image, and make the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


@pytest.fixture
def awake():
    """Gives a network's layers that start at zero random weights, as a trained one has."""

    def wake(network):
        for layer in network.modules():
            if getattr(layer, "weight", None) is not None and not layer.weight.any():
                torch.nn.init.normal_(layer.weight, std=0.2)
        return network

    return wake


@pytest.fixture
def start():
    """Starts a function of a test's module in a process of its own, without what this one did.

    Where there is a GPU, gradients that were computed before would not survive a plain fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffad_ref"])  # once for all: it takes seconds

    def run(work, *arguments):
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        return process

    return run


@pytest.fixture
def both(start):
    """Runs a function of a test's module, (rank, ...), in two processes, to the end."""

    def run(work, *arguments):
        processes = [start(work, rank, *arguments) for rank in (0, 1)]
        for process in processes:
            process.join(60)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0]

    return run


@pytest.fixture
def write():
    """The function that saves an array as an image file."""
    return write_image


@pytest.fixture
def mvtec_root(tmp_path):
    """Two categories of 20 x 24 pixels: bottle (defects crack and hole), and carpet (cut)."""
    rng = np.random.default_rng(0)
    root = tmp_path / "mvtec"
    for category, kinds in {"bottle": ("crack", "hole"), "carpet": ("cut",)}.items():
        folders = ["train/good"] * 3 + ["test/good"] * 2
        folders += [f"test/{kind}" for kind in kinds for _ in range(2)]
        for i, folder in enumerate(folders):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            write_image(root / category / folder / f"{i:03}.png", pixels)
            if folder.startswith("test/") and not folder.endswith("good"):
                mask = np.zeros((20, 24), np.uint8)
                mask[5:10, 8:14] = 255
                truth = folder.replace("test", "ground_truth")
                write_image(root / category / truth / f"{i:03}_mask.png", mask)
    return root


@pytest.fixture
def small_config():
    """The tiny profile made smaller still: 32 x 32 pixels, 133 000 weights, three stages."""
    return Config.tiny(
        32,
        width=8,
        norm_groups=4,
        multipliers=(1, 1),
        attention_levels=(1,),
        heads=2,
        segmentation_width=4,
    )


@pytest.fixture
def fails(capsys):
    """Runs a command line that must fail as one fails for people; returns its message."""
    from diffad_ref.__main__ import main

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("diffad_ref: ") == 1
        return said[said.index("diffad_ref: ") :]

    return run


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals from 10 draws instead of 1000, where nobody looks at them."""
    from diffad_ref.tools import commands

    draw = partial(commands.intervals, draws=10)
    monkeypatch.setattr(commands, "intervals", draw)


@pytest.fixture(scope="session")
def noise_root(tmp_path_factory):
    """Three images of noise to learn from in each of two categories, as in `mvtec_root`."""
    root, rng = tmp_path_factory.mktemp("noise") / "data", np.random.default_rng(0)
    for category in ("bottle", "carpet"):
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            write_image(root / category / "train" / "good" / f"{i}.png", pixels)
    return root
