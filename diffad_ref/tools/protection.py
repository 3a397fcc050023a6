"""What gradient projection memory costs, before it is gathered: arithmetic, bytes, walks.

Layers are watched while one image goes through them, which may happen on the meta device. So a
network of any size can be asked on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from diffad_ref.detector import Detector
from diffad_ref.gradient_projection import GradientProjectionMemory, square_of
from diffad_ref.tools.allocations import GB
from diffad_ref.tools.tables import Shown, rows


def memory_bill(
    layers: dict[str, nn.Module], run: Callable[[], object], images: int, itemsize: int = 4
) -> list[dict]:
    """What three ways to the singular vectors have to hold, and what a memory holds then, by layer.

    Parameters
    ----------
    layers : dict
        The layers to watch, by name; such as `GradientProjectionMemory.layers`.
    run : callable
        Sends one image through the network, as at inference.
    images : int
        Images of a task.
    itemsize : int
        Bytes a number.

    Returns
    -------
    list of dict
        For each layer its features, the columns that one image gives, and bytes: of the whole
        matrix ("plain"), of one image's chunk with the basis before it ("iterative"), of R Rᵀ
        ("square"), and of the largest basis that a memory keeps, of half the directions ("memory").
        "flops" are those of projecting a step on it.
    """
    columns = dict.fromkeys(layers, 0)

    def counter(name: str):
        def count(layer, inputs, output):
            columns[name] += output.numel() // layer.weight.shape[0]

        return count

    hooks = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    bill = []
    for name, layer in layers.items():
        features, chunk = layer.weight[0].numel(), columns[name]
        held = chunk + min(features, chunk * images)
        row = {"layer": name, "features": features, "columns": chunk}
        row["plain"] = features * chunk * images * itemsize
        row["iterative"] = features * min(held, chunk * images) * itemsize
        row["square"] = square_of(layer, "meta").nbytes
        row["memory"] = features * (features // 2) * itemsize
        bill.append(row | {"flops": 4 * layer.weight.numel() * (features // 2)})
    return bill


@dataclass(frozen=True)
class Protection:
    """What gradient projection memory costs: the arithmetic of its matrices, and their bytes.

    A layer with f features sees so many columns of an image. Their square costs 2 f² columns, and
    its eigenvectors about 9 f³ (the usual count of a symmetric decomposition). A gradient and a
    step are projected on r directions, or on the f - r others: half of them is the dearest case.

    Attributes
    ----------
    square_flops : int
        For one image, during all steps of the walk.
    decompose_flops, project_flops : int
        Once a task; in every training step, all bases half full.
    square_double, decompose_double : int
        What of the squares and decompositions is float64: that of all but the largest layers.
    square_bytes, basis_bytes : int
        Of the squares that are gathered at once, and of the bases.
    passes : int
        Times that the images are walked through, for one group of layers after the other.
    images : int
        That a task gathers: every tenth of the 3,389 of the first task of "mvtec 14-1".
    """

    square_flops: int
    decompose_flops: int
    project_flops: int
    square_bytes: int
    basis_bytes: int
    passes: int
    images: int = 339
    square_double: int = 0
    decompose_double: int = 0


def protection(detector: Detector) -> Protection:
    """Count what protecting all layers of a detector costs."""
    detector = deepcopy(detector).to("meta").eval()
    detector.enter(detector.stages[-1])
    memory = GradientProjectionMemory(detector)
    image = torch.zeros(1, 3, *[detector.config.image_size] * 2, device="meta")
    category = torch.zeros(1, dtype=torch.long, device="meta")

    def look():
        detector.judge(image, category, torch.Generator())

    with torch.no_grad():
        bill = {row["layer"]: row for row in memory_bill(memory.layers, look, 1)}
    groups, found = memory.groups(), bill.values()
    double = [row for row in found if row["square"] == 8 * row["features"] ** 2]  # bytes
    return Protection(
        *_eigen_flops(found),
        sum(2 * row["flops"] for row in found),
        max(sum(bill[name]["square"] for name in group) for group in groups),
        sum(row["memory"] for row in found),
        len(groups),
        **dict(zip(("square_double", "decompose_double"), _eigen_flops(double), strict=True)),
    )


def _eigen_flops(layers: Collection[dict]) -> tuple[int, int]:
    """Of the squares of one image, and of all eigenvectors, of layers of a bill."""
    squares = sum(2 * row["features"] ** 2 * row["columns"] for row in layers)
    return squares, sum(9 * row["features"] ** 3 for row in layers)


def protection_table(found: Protection) -> Shown:
    """What gradient projection adds to One-for-More, one row a kind of work."""
    n = found.images
    work = {
        f"squares of {n} images, in {found.passes} passes": (
            n * found.square_flops,
            found.square_bytes,
        ),
        "eigenvectors, once a task": (found.decompose_flops, found.square_bytes),
        "projecting a step, bases half full": (found.project_flops, found.basis_bytes),
    }
    return rows(
        [{"work": w, "TFLOP": flops / 1e12, "GB": size / GB} for w, (flops, size) in work.items()]
    )
