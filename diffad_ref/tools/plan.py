"""What a run will cost, before it is started: weights, arithmetic, memory, hours.

On PyTorch's meta device a tensor has a shape and no numbers, so a network of any size can be sent
through a training step on any machine. The arithmetic is counted operation by operation, and so
is what is kept for the backward pass. Only the hours are an estimate: nobody reaches a GPU's peak,
and which share is reached has to be assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tables import Table

# Dense 16-bit matrix arithmetic in TFLOP/s, and memory in GB, as the maker states them.
GPUS = {"T4": (65, 16), "A100 80 GB": (312, 80), "H100 SXM": (989, 80)}
UTILISATION = 0.25  # share of the peak; a guess, better measured on the machine at hand


@dataclass(frozen=True)
class Plan:
    """The cost of one method at one size.

    Attributes
    ----------
    weights, learning : int
        Numbers in all networks, and those that are trained.
    step_flops, predict_flops : int
        Arithmetic for one image: of a training step, forward and backward, and of a prediction.
        A multiplication and an addition are two.
    kept_bytes : int
        What one image leaves in memory between forward and backward, in float32.
    images : int
        Images that the whole recipe shows the network, repetitions counted.
    batch_size : int
        Of the recipe's last stage.
    """

    method: str
    weights: int
    learning: int
    step_flops: int
    predict_flops: int
    kept_bytes: int
    images: int
    batch_size: int

    def memory(self, batch_size: int | None = None, half: bool = False) -> float:
        """GB of a training step: weights, gradients, Adam's two averages, and what is kept.

        Parameters
        ----------
        batch_size : int, optional
            Images a step; by default the recipe's.
        half : bool
            bf16 autocast: what is kept counts half. Weights and averages stay float32.
        """
        kept = self.kept_bytes * (batch_size or self.batch_size) * (0.5 if half else 1)
        return (4 * self.weights + 12 * self.learning + kept) / 1e9

    def hours(self, gpu: str, utilisation: float = UTILISATION) -> float:
        """Of the whole recipe on one of `GPUS`."""
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation is a share in (0, 1], not {utilisation}")
        return self.step_flops * self.images / (GPUS[gpu][0] * 1e12 * utilisation) / 3600


def plan(detector: Detector) -> Plan:
    """Count what a detector costs in the last stage of its recipe; it may lie on "meta".

    What is not a network costs nothing here: synthesis of anomalies, metrics, loading.
    """
    detector.enter(detector.stages[-1])
    detector.train()
    step, predict = WORK[type(detector)](detector)
    weights = list(detector.parameters())
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in weights}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # else its storage's name could be given to another
        return tensor

    alive: list[Tensor] = []
    with FlopCounterMode(display=False) as training, saved_tensors_hooks(keep, lambda x: x):
        step()
    for parameter in weights:
        parameter.grad = None
    detector.eval()
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        predict()
    return Plan(
        type(detector).__name__,
        sum(p.numel() for p in weights),
        sum(p.numel() for p in weights if p.requires_grad),
        training.get_total_flops(),
        inference.get_total_flops(),
        sum(kept.values()),
        sum(stage.steps * stage.batch_size for stage in detector.stages),
        detector.stages[-1].batch_size,
    )


# ------------------------------------------------------------------------- what a method has to do

Work = tuple[Callable[[], object], Callable[[], object]]


def _diffusion_ad(detector: DiffusionAD) -> Work:
    """Two scales and one comparison, in training and for each draw of noise in prediction."""
    x, t = _image(detector), torch.zeros(1, dtype=torch.long, device=detector.device)

    def compare(draws: int = 1):
        x0 = torch.zeros_like(x)
        if detector.config.reconstruct:
            with torch.set_grad_enabled("denoiser" in detector.stage.lr and detector.training):
                x0 = sum(detector.denoiser(x, t) for _ in range(2 * draws))
        return detector.segmenter(torch.cat([x, x0], 1)) if _has("segmenter", detector) else x0

    return lambda: compare().sum().backward(), lambda: compare(detector.config.draws)


def _deco_diff(detector: DecoDiff) -> Work:
    """One encoding; one call of the network to learn, one a step to correct."""
    config, z = detector.config, _latent(detector)
    t, category = (torch.zeros(1, dtype=torch.long, device=z.device) for _ in range(2))

    def step():
        _encode(detector)
        detector.corrector(z, t, category).sum().backward()

    def predict():
        _encode(detector)
        for _ in config.times:
            detector.corrector(z, t, category)
        detector.codec.decode(torch.cat([z, z]))

    return step, predict


def _one_for_more(detector: OneForMore) -> Work:
    """The condition once, the U-Net once to learn and ten times to walk, features of two images."""
    x, z = _image(detector), _latent(detector)
    t = torch.zeros(1, dtype=torch.long, device=z.device)

    def step():
        _encode(detector)
        condition = detector.condition(x)
        output = detector.unet(z, t, condition)
        (output.sum() + (condition - detector.condition.features(x)).sum()).backward()

    def predict():
        _encode(detector)
        condition = detector.condition(x)
        for _ in range(detector.config.walk):
            detector.unet(z, t, condition)
        detector.codec.decode(torch.cat([z, z]))
        detector.extractor(torch.cat([x, x]))

    return step, predict


WORK = {DiffusionAD: _diffusion_ad, DecoDiff: _deco_diff, OneForMore: _one_for_more}


def _has(part: str, detector: Detector) -> bool:
    return part in detector.stage.lr or not detector.training


def _image(detector: Detector) -> Tensor:
    size = detector.config.image_size
    return torch.zeros(1, 3, size, size, device=detector.device)


def _latent(detector: Detector) -> Tensor:
    codec = detector.config.codec
    side = detector.config.image_size // codec.factor
    return torch.zeros(1, codec.channels, side, side, device=detector.device)


def _encode(detector: Detector) -> None:
    with torch.no_grad():
        detector.codec.posterior(_image(detector))


# ------------------------------------------------------------------------------------------ tables


def paper_plans() -> list[Plan]:
    """The three methods at the size of their papers, on the meta device."""
    with torch.device("meta"):
        detectors = [kind(kind.Config.paper()) for kind in WORK]
    return [plan(detector) for detector in detectors]


def size_table(plans: list[Plan]) -> Table:
    """Weights and arithmetic, one row a method."""
    rows = [
        {
            "method": p.method,
            "weights, M": p.weights / 1e6,
            "that learn, M": p.learning / 1e6,
            "TFLOP a training image": p.step_flops / 1e12,
            "TFLOP a predicted image": p.predict_flops / 1e12,
            "training images, M": p.images / 1e6,
        }
        for p in plans
    ]
    return Table(tuple(rows[0]), rows)


def memory_table(plans: list[Plan], batches: tuple[int, ...] = (1, 4, 16)) -> Table:
    """GB of a training step by batch size and precision, one row a method and precision."""
    rows = []
    for p in plans:
        for half in (False, True):
            row = {"method": p.method, "precision": "bf16 autocast" if half else "float32"}
            sizes = sorted({*batches, p.batch_size})
            rows.append(row | {f"batch {n}, GB": p.memory(n, half) for n in sizes})
    columns = sorted({c for row in rows for c in row if c.startswith("batch")}, key=_number)
    return Table(("method", "precision", *columns), rows, labels=2)


def hours_table(plans: list[Plan], utilisation: float = UTILISATION) -> Table:
    """Hours of the whole recipe by GPU, one row a method."""
    rows = [
        {"method": p.method} | {f"{gpu}, h": p.hours(gpu, utilisation) for gpu in GPUS}
        for p in plans
    ]
    return Table(tuple(rows[0]), rows)


def _number(column: str) -> int:
    return int(column.split()[1].rstrip(","))
