"""Run a detector over a data set and put its numbers into tables.

Every method and baseline is judged here, by the same metrics over the same images. Numbers are
kept as fractions; tables for people show them in per cent.
"""

from __future__ import annotations

import html
import json
import math
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad_ref.checkpoints import write_text
from diffad_ref.memory import peak_memory
from diffad_ref.metrics import image_metrics, pixel_metrics
from diffad_ref.protocols import PROTOCOLS, Protocol
from diffad_ref.tables import METRICS, Table


def evaluate(
    detector,
    dataset,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    protocol: str = "exact",
) -> Report:
    """Judge a detector on a data set with good and defective images.

    Parameters
    ----------
    detector : Detector
        Anything with its `predict` contract. It is used in eval mode on its own device and left
        in the mode it came in. If it names its `categories`, each image is passed with the index
        that its category has *there*, so a test set with fewer categories is judged rightly.
    dataset : Dataset
        Gives samples as `AnomalyFolder` does. The masks of defective images may be empty or
        absent: then only image metrics are computed.
    batch_size : int
    seed : int
        Every batch draws its noise from a generator that follows from this and the batch's
        number, so the same seed and batch size give the same report on the same machine.
    progress : bool
        Show a bar.
    protocol : str
        "exact" judges by `metrics`, and is what every table of ours holds. "diffusion_ad",
        "deco_diff" and "one_for_more" judge the same maps as the released codes do
        (`protocols.PROTOCOLS`), to compare with a paper's table like with like.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Empty data set; no defective or no good image at all; unlabelled images; a category that
        the detector does not know; NaN or a wrong shape in what the detector returns; an unknown
        protocol.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there is nothing to evaluate")
    if protocol != "exact" and protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: choose exact, {', '.join(PROTOCOLS)}")
    with peak_memory(torch.device(detector.device)) as peak:
        images, maps, masks, seconds = _predict_all(detector, dataset, batch_size, seed, progress)
    rows, kinds = _tables(images, maps, masks, PROTOCOLS.get(protocol))
    return Report(
        detector=type(detector).__name__,
        rows=rows,
        kinds=kinds,
        images=images,
        seconds_per_image=seconds / len(images),
        peak_memory=peak.bytes,
        protocol=protocol,
        seed=seed,
        maps=maps,
        masks=masks,
    )


@dataclass(repr=False)
class Report:
    """What `evaluate` found. Metrics are fractions in [0, 1], or None where not defined.

    Attributes
    ----------
    detector : str
        Name of its class.
    rows : list of dict
        One per category: its name, its seven metrics, n_good and n_defective.
    kinds : list of dict
        The same for each kind of defect against the good images of its category.
    images : list of dict
        path (inside the data set), category, kind, label and score of each image, in its order.
    seconds_per_image : float
        Time spent in `predict`.
    seed : int
    maps, masks : Tensor (N, H, W) or None
        Anomaly maps (float32) and masks (bool) on the CPU; not saved.
    intervals : dict
        95 % confidence intervals of the means, from `bootstrap.intervals`; may be empty.
    peak_memory : int or None
        Bytes that PyTorch held on the GPU; on a CPU those of the whole process.
    protocol : str
        How the metrics were made, see `evaluate`.
    """

    detector: str
    rows: list[dict]
    kinds: list[dict]
    images: list[dict]
    seconds_per_image: float
    seed: int = 0
    maps: Tensor | None = field(default=None, compare=False)
    masks: Tensor | None = field(default=None, compare=False)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int | None = None
    protocol: str = "exact"

    @property
    def mean(self) -> dict:
        """Plain mean over the categories for which a metric is defined; image counts are sums."""
        row: dict = {"category": "mean"}
        for name in ("n_good", "n_defective"):
            row[name] = sum(category[name] for category in self.rows)
        for name in METRICS:
            values = [category[name] for category in self.rows if category[name] is not None]
            row[name] = math.fsum(values) / len(values) if values else None
        return row

    def table(self) -> Table:
        """One row per category, and the mean."""
        columns = ("category", *METRICS, "n_good", "n_defective")
        return Table(columns, [*self.rows, self.mean])

    def by_kind(self, columns=("image_auroc", "pixel_auroc", "pixel_ap")) -> Table:
        """Metrics of each kind of defect against the good images of its category."""
        return Table(("category", "kind", *columns, "n_defective"), self.kinds, labels=2)

    def to_markdown(self) -> str:
        """Table for people, in per cent."""
        return self.table().to_markdown()

    def to_csv(self) -> str:
        """Raw fractions."""
        return self.table().to_csv()

    def to_dict(self) -> dict:
        """Everything but maps and masks, in types that JSON knows."""
        names = ("detector", "protocol", "seed", "seconds_per_image", "peak_memory", "intervals")
        names += ("rows", "kinds", "images")
        return {"mean": self.mean} | {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """`to_dict` as text; `Report.from_dict(json.loads(text))` reads it again."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, record: dict) -> Report:
        """Make a report (without maps) from what `to_dict` gave."""
        return cls(**{name: value for name, value in record.items() if name != "mean"})

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.csv, report.md and kinds.csv; each appears whole or not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "report.json": self.to_json() + "\n",
            "report.csv": self.to_csv(),
            "report.md": f"{self.to_markdown()}\n\n{self.by_kind().to_markdown()}\n",
            "kinds.csv": self.by_kind(METRICS).to_csv(),
        }
        for name, text in texts.items():
            write_text(text, folder / name)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a report that `save` wrote."""
        return cls.from_dict(json.loads((Path(folder) / "report.json").read_text("utf-8")))

    def _repr_html_(self) -> str:
        return f"{self.table()._repr_html_()}<p><small>{html.escape(self._note())}</small></p>"

    def __repr__(self) -> str:
        return f"{self.to_markdown()}\n\n{self._note()}"

    def _note(self) -> str:
        parts = [self.detector, "in %", f"{self.seconds_per_image:.3g} s per image"]
        if self.peak_memory:
            parts.append(f"at most {self.peak_memory / 2**30:.2f} GB")
        if self.protocol != "exact":
            parts.append(f"judged as the released code of {self.protocol} does")
        return ", ".join(parts)


def compare(reports: dict[str, Report], columns=METRICS) -> Table:
    """One row per report: the means over its categories, the best of each column in bold.

    Raises
    ------
    ValueError
        The reports are not about the same images, so their means cannot be compared.
    """
    _require_same_images(reports)
    rows = []
    for name, report in reports.items():
        rows.append(report.mean | {"seconds_per_image": report.seconds_per_image, "method": name})
    return Table(("method", *columns), rows, best=len(rows) > 1)


def compare_kinds(reports: dict[str, Report], column: str = "image_auroc") -> Table:
    """One row per kind of defect, one column per report, for one metric; best in bold.

    Raises
    ------
    ValueError
        As for `compare`.
    """
    _require_same_images(reports)
    rows: dict[tuple, dict] = {}
    for name, report in reports.items():
        for kind in report.kinds:
            key = (kind["category"], kind["kind"])
            rows.setdefault(key, dict(zip(("category", "kind"), key, strict=True)))
            rows[key][name] = kind[column]
    columns = ("category", "kind", *reports)
    return Table(columns, list(rows.values()), best=len(reports) > 1, across=True, labels=2)


def _predict_all(detector, dataset, batch_size, seed, progress):
    """Collect records of all images, maps (N, H, W), masks (N, H, W) and the seconds it took."""
    device = detector.device
    loader = DataLoader(dataset, batch_size=batch_size)
    images, maps, masks, seconds = [], [], [], 0.0
    with _eval_mode(detector), torch.no_grad():
        for number, batch in enumerate(tqdm(loader, desc="evaluate", disable=not progress)):
            inputs = batch["image"].to(device)
            index = _category_index(detector, batch).to(device)
            generator = batch_generator(device, seed, number)
            _wait_for(device)
            start = time.perf_counter()
            prediction = detector.predict(inputs, category_index=index, generator=generator)
            _wait_for(device)
            seconds += time.perf_counter() - start
            _check_prediction(prediction, batch)
            maps.append(prediction.anomaly_map.detach().float().cpu())
            masks.append(_masks_of(batch))
            for i, score in enumerate(prediction.score.tolist()):
                record = {"path": _inside(dataset, batch["path"][i])} if "path" in batch else {}
                record |= {name: batch[name][i] for name in ("category", "kind")}
                images.append(record | {"label": int(batch["label"][i]), "score": score})
    return images, torch.cat(maps), torch.cat(masks), seconds


def _tables(
    images: list[dict], maps: Tensor, masks: Tensor, protocol: Protocol | None
) -> tuple[list[dict], list[dict]]:
    """Make one row for each category, and one for each of its kinds of defect."""
    names = ("category", "kind", "label", "score")
    category, kind, label, score = (np.array([image[n] for image in images]) for n in names)
    bad, masked = label == 1, masks.flatten(1).any(1).numpy()
    if bad.all() or not bad.any():
        lack = "good" if bad.all() else "defective"
        raise ValueError(
            f"no {lack} image among the {len(images)} of {', '.join(sorted(set(category)))}: "
            "evaluation needs both; is this the test split?"
        )
    _warn_about_masks(category, bad, masked)

    def judge(chosen: np.ndarray) -> dict:
        known = chosen & (~bad | masked)
        values = dict.fromkeys(METRICS)
        if bad[chosen].any() and not bad[chosen].all():
            if protocol is None:
                values |= image_metrics(score[chosen], bad[chosen])
            else:
                values |= protocol.image_metrics(maps[chosen], bad[chosen])
        if masks[known].any() and not masks[known].all():
            judge_pixels = pixel_metrics if protocol is None else protocol.pixel_metrics
            values |= judge_pixels(maps[known], masks[known])
        return values

    rows, kinds = [], []
    for name in sorted(set(category.tolist())):
        chosen = category == name
        good = chosen & ~bad
        counts = {"n_good": int(good.sum()), "n_defective": int((chosen & bad).sum())}
        rows.append({"category": name} | counts | judge(chosen))
        for defect in sorted(set(kind[chosen & bad].tolist())):
            those = chosen & bad & (kind == defect)
            row = {"category": name, "kind": defect, "n_defective": int(those.sum())}
            kinds.append(row | judge(good | those))
    return rows, kinds


def _warn_about_masks(category: np.ndarray, bad: np.ndarray, masked: np.ndarray) -> None:
    missing = bad & ~masked
    if missing.any() and masked.any():
        names = ", ".join(sorted(set(category[missing])))
        warnings.warn(
            f"{missing.sum()} of {bad.sum()} defective images have no mask ({names}): "
            "pixel metrics leave them out",
            stacklevel=4,
        )


def _inside(dataset, path: str) -> str:
    """Path below the data set's root, where it has one: a report may travel."""
    root = getattr(dataset, "root", None)
    return path if root is None else Path(path).relative_to(root).as_posix()


def _masks_of(batch: dict) -> Tensor:
    """Masks (B, H, W) as bool; nothing is marked where the data set has none."""
    if "mask" not in batch:
        return torch.zeros(batch["image"][:, 0].shape, dtype=torch.bool)
    return batch["mask"][:, 0] > 0.5


def _category_index(detector, batch: dict) -> Tensor:
    known = list(getattr(detector, "categories", ()))
    if not known:
        return torch.as_tensor(batch["category_index"])
    unknown = sorted(set(batch["category"]) - set(known))
    if unknown:
        raise ValueError(f"the detector never saw {unknown}; it knows {known}")
    return torch.tensor([known.index(category) for category in batch["category"]])


def _check_prediction(prediction, batch: dict) -> None:
    count, _, height, width = batch["image"].shape
    maps, scores = prediction.anomaly_map, prediction.score
    if maps.shape != (count, height, width) or scores.shape != (count,):
        raise ValueError(
            f"expected maps {(count, height, width)} and scores {(count,)}, the detector returned "
            f"{tuple(maps.shape)} and {tuple(scores.shape)}"
        )
    if "unlabelled" in batch["kind"]:
        raise ValueError("the images are unlabelled: they can be predicted, but not evaluated")
    broken = (maps.flatten(1).isnan().any(1) | scores.isnan()).tolist()
    if any(broken):
        names = sorted({c for c, b in zip(batch["category"], broken, strict=True) if b})
        raise ValueError(f"the detector returned NaN for images of {', '.join(names)}")


def batch_generator(device, seed: int, number: int) -> torch.Generator:
    """Mix seed and number well: neighbouring seeds must not share batches of noise."""
    mixed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return torch.Generator(device).manual_seed(mixed)


@contextmanager
def _eval_mode(detector):
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_same_images(reports: dict[str, Report]) -> None:
    if not reports:
        raise ValueError("there is no report to compare")
    counts = {
        name: {row["category"]: (row["n_good"], row["n_defective"]) for row in report.rows}
        for name, report in reports.items()
    }
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(f"{name!r} and {first!r} were not evaluated on the same images")
        if reports[name].protocol != reports[first].protocol:
            raise ValueError(
                f"{name!r} was judged by the protocol {reports[name].protocol}, {first!r} by "
                f"{reports[first].protocol}: such numbers cannot be compared"
            )
