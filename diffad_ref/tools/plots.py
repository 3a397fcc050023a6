"""The pictures of the book: images and maps side by side, histograms, curves, a slider.

Each function returns a figure (or an HTML object) and shows nothing by itself. Figures have a
white ground, so they can be read on a dark page too.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from diffad_ref.checkpoints import write_whole
from diffad_ref.metrics import Ranking

# Okabe and Ito's colours, which readers with any colour vision can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GOOD, DEFECTIVE, OUTLINE = PALETTE[0], PALETTE[1], PALETTE[5]
MAP_COLOURS = "inferno"  # dark to bright, even in lightness
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "black",
    "legend.frameon": False,
    "figure.dpi": 100,
}


def show_images(images, titles=None, columns: int = 6, size: float = 1.6) -> Figure:
    """Show images in a grid.

    Parameters
    ----------
    images : Tensor or array (N, 3, H, W), or a sequence of (3, H, W), (1, H, W) or (H, W)
        Values in [0, 1]; others are clipped.
    titles : sequence of str, optional
        One above each image.
    columns : int
        Images in a row.
    size : float
        Side of an image in inches.

    Returns
    -------
    Figure
    """
    pictures = [_picture(image) for image in images]
    if not pictures:
        raise ValueError("there is no image to show")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    fig, axes = _grid(rows, columns, size, head=0.25 * rows if titles is not None else 0)
    for i, axis in enumerate(axes.flat):
        if i < len(pictures):
            _draw(axis, pictures[i])
            axis.set_title("" if titles is None else str(titles[i]), fontsize=9)
        else:
            axis.set_visible(False)
    return fig


def panels(
    prediction, images, masks=None, names=None, parts=("noised",), share_scale=True, size=1.6
) -> Figure:
    """Show what a detector saw, one row an image: image, parts, reconstruction, map, mask.

    Parameters
    ----------
    prediction : Prediction
    images : Tensor (B, 3, H, W)
        What was predicted, in [0, 1].
    masks : Tensor (B, 1, H, W), optional
        Adds the column of true masks, and their outline on the image.
    names : sequence of str, optional
        One for each row; the score stands below it.
    parts : sequence of str
        Which of `prediction.parts` to show; those that it lacks are left out.
    share_scale : bool
        One colour scale for all maps, so that rows can be compared; else each map has its own,
        from its smallest to its largest value, and a good image looks as lively as a bad one.
    size : float
        Side of an image in inches.

    Returns
    -------
    Figure
    """
    maps = prediction.anomaly_map.detach().float().cpu().numpy()
    columns = {"image": images}
    columns |= {name: prediction.parts[name] for name in parts if name in prediction.parts}
    columns |= {"reconstruction": prediction.reconstruction, "map": maps}
    columns |= {} if masks is None else {"mask": masks}
    fig, axes = _grid(len(maps), len(columns), size, head=0.25, side=1.0)
    for j, (title, column) in enumerate(columns.items()):
        axes[0, j].set_title(title)
        for axis, picture in zip(axes[:, j], column, strict=True):
            if title != "map":
                _draw(axis, _picture(picture))
                continue
            shown = maps if share_scale else picture
            colours = axis.imshow(picture, MAP_COLOURS, vmin=shown.min(), vmax=shown.max())
    for i, axis in enumerate(axes[:, 0]):
        name = f"{names[i]}\n" if names is not None else ""
        axis.set_ylabel(f"{name}score {prediction.score[i]:.3g}", fontsize=9)
        if masks is not None and masks[i].any() and not masks[i].all():
            axis.contour(_picture(masks[i]), [0.5], colors=[OUTLINE], linewidths=1.2)
    if share_scale:
        bar = fig.colorbar(colours, ax=axes, shrink=min(1.0, 2 / len(maps)), aspect=15, pad=0.01)
        bar.set_label("map")
    return fig


def best_and_worst(report, dataset, columns: int = 6, size: float = 1.3) -> Figure:
    """Show the defects that were found best, those that were missed, and the false alarms.

    Images are put in order by how far their score lies from the good ones of their own category,
    in standard deviations; maps are coloured from the smallest to the largest of the category.

    Parameters
    ----------
    report : Report
        With its maps, as `evaluate` returns it.
    dataset : Dataset
        What was evaluated.
    columns : int
        Images of each group.
    size : float
        Side of an image in inches.
    """
    if report.maps is None:
        raise ValueError("the report has no maps: they are not saved, evaluate again")
    category, kind, score = (report.images[c].to_numpy() for c in ("category", "kind", "score"))
    bad, distance = report.images["label"].to_numpy() == 1, np.zeros(len(score))
    for name in set(category):
        mine = category == name
        usual = score[mine & ~bad] if (mine & ~bad).any() else score[mine]
        distance[mine] = (score[mine] - usual.mean()) / max(usual.std(), 1e-12)
    order = np.argsort(-distance, kind="stable")
    groups = {
        "found best": order[bad[order]][:columns],
        "missed": order[bad[order]][::-1][:columns],
        "false alarms": order[~bad[order]][:columns],
    }
    fig, axes = _grid(2 * len(groups), columns, size, head=0.6, side=0.4)
    for above, below, (title, chosen) in zip(axes[::2], axes[1::2], groups.items(), strict=True):
        above[0].set_ylabel(title, fontsize=9)
        for image, heat, i in zip(above, below, chosen, strict=False):
            _draw(image, _picture(dataset[int(i)]["image"]))
            image.set_title(f"{category[i]}, {kind[i]}", fontsize=7)
            if report.masks[i].any() and not report.masks[i].all():
                image.contour(_picture(report.masks[i]), [0.5], colors=[OUTLINE], linewidths=1.2)
            scale = report.maps[torch.from_numpy(category == category[i])]
            heat.imshow(
                _picture(report.maps[i]),
                MAP_COLOURS,
                vmin=scale.min().item(),
                vmax=scale.max().item(),
            )
    return fig


def score_histogram(scores, labels, bins: int = 30, title: str | None = None) -> Figure:
    """Show how far the scores of good and defective images lie apart.

    Parameters
    ----------
    scores : Tensor or array (N,)
    labels : Tensor or array (N,) in {0, 1}
    bins : int
        Bars over the common range of both.
    title : str, optional

    Returns
    -------
    Figure
    """
    scores, labels = np.asarray(_numpy(scores), dtype=float), _numpy(labels)
    edges = np.histogram_bin_edges(scores, bins)
    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
        for label, name, colour, hatch in (
            (0, "good", GOOD, ""),
            (1, "defective", DEFECTIVE, "//"),
        ):
            chosen = scores[labels == label]
            look = {"facecolor": (colour, 0.3), "edgecolor": colour, "hatch": hatch}
            look |= {"histtype": "stepfilled", "linewidth": 1.6}
            axis.hist(chosen, edges, label=f"{name} ({chosen.size})", **look)
        axis.set(xlabel="score of the image", ylabel="images", title=title)
        axis.legend()
    return _finished(fig)


def curves(results: dict, title: str | None = None) -> Figure:
    """Draw ROC and precision-recall curves of one or more methods.

    Parameters
    ----------
    results : dict
        Name of a method → (scores, labels), of any shape: images, or the pixels of all maps.
    title : str, optional

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Where one of the two classes is missing.
    """
    lines = ("-", "--", "-.", ":")
    rankings = {name: Ranking.of(scores, labels) for name, (scores, labels) in results.items()}
    corners = [_thin(*ranking.roc()) for ranking in rankings.values()]
    with plt.rc_context(STYLE):
        fig, (roc, pr) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
        for i, (name, ranking) in enumerate(rankings.items()):
            look = {"linestyle": lines[i % 4], "linewidth": 1.8}
            roc.plot(*corners[i], label=f"{name} ({ranking.auroc():.3f})", **look)
            precision, recall = ranking.precision_recall()
            label = f"{name} ({ranking.average_precision():.3f})"
            recall, precision = np.append(0, recall), np.append(precision[:1], precision)
            pr.step(*_thin(recall, precision), label=label, **look)
            share = ranking.positives / (ranking.positives + ranking.negatives)
            pr.axhline(share, color="grey", linewidth=0.8, linestyle=":")
        roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        roc.set(xlabel="false-positive rate", ylabel="true-positive rate", title="ROC (area)")
        pr.set(xlabel="recall", ylabel="precision", title="precision and recall (AP)")
        for axis in (roc, pr):
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axis.legend(loc="lower right" if axis is roc else "best", fontsize=9)
        fig.suptitle(title)
    return _finished(fig)


@dataclass(frozen=True)
class Page:
    """A piece of HTML that notebooks and the book display."""

    text: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.text


def slider(frames, labels, title: str = "", height: int = 320) -> Page:
    """Leaf through pictures with a slider that works in a page without a kernel.

    Parameters
    ----------
    frames : sequence of Figure, or of images (3, H, W), (1, H, W) or (H, W) in [0, 1]
        All are embedded as PNG, so keep them small.
    labels : sequence of str
        What each frame shows, such as "t = 200"; also its text for screen readers.
    title : str
        Stands above, and names the slider for screen readers.
    height : int
        Height of a frame in CSS pixels.

    Returns
    -------
    Page
        Displays itself at the end of a cell. Arrow keys move the slider; there is no script
        beyond the slider's own handler, and without it the first frame is shown.

    Raises
    ------
    ValueError
        No frames, or not one label for each.
    """
    frames, labels = list(frames), [str(label) for label in labels]
    if not frames or len(frames) != len(labels):
        raise ValueError(
            f"need one label for each frame: {len(frames)} frames, {len(labels)} labels"
        )
    pictures = []
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        look = f"height:{height}px;max-width:100%;object-fit:contain;margin:0 auto;"
        look += "" if isinstance(frame, Figure) else "image-rendering:pixelated;"
        look += "display:block" if i == 0 else "display:none"
        text = html.escape(f"{title}: {label}" if title else label)
        source = f"data:image/png;base64,{_png(frame)}"
        pictures.append(
            f'<img src="{source}" alt="{text}" data-label="{html.escape(label)}" style="{look}">'
        )
    name = html.escape(title or "frame")
    first = html.escape(labels[0])
    heading = f'<div style="text-align:center;font-weight:600">{html.escape(title)}</div>'
    return Page(
        '<div class="diffad-slider" style="max-width:100%;margin:0.5em 0">'
        f"{heading if title else ''}"
        f'<div class="frames">{"".join(pictures)}</div>'
        '<div style="display:flex;gap:1em;align-items:center;max-width:640px;margin:0.4em auto">'
        f'<input type="range" min="0" max="{len(frames) - 1}" step="1" value="0" '
        f'autocomplete="off" aria-label="{name}" aria-valuetext="{first}" style="flex:1" '
        f'oninput="{_HANDLER}">'
        f'<output style="min-width:7em;font-variant-numeric:tabular-nums">{first}</output>'
        "</div></div>"
    )


# `this` is the slider: it finds its own frames, so any number of them can stand on a page.
_HANDLER = (
    "const box=this.closest('.diffad-slider'),shown=+this.value;"
    "box.querySelectorAll('.frames img').forEach((img,i)=>{"
    "img.style.display=i===shown?'block':'none';"
    "if(i===shown){this.setAttribute('aria-valuetext',img.dataset.label);"
    "box.querySelector('output').textContent=img.dataset.label;}});"
)


def source(*objects) -> Page:
    """Show the source of functions or classes: a page that shows it cannot drift from it."""
    text = "\n\n".join(inspect.getsource(thing).rstrip() for thing in objects)
    return Page(highlight(text, PythonLexer(), HtmlFormatter(noclasses=True, wrapcode=True)))


def save_heat_map(image, anomaly_map, path, limits: tuple[float, float] = (0.0, 1.0)) -> None:
    """Write an image (3, H, W) and its anomaly map (H, W), laid over it, side by side as PNG.

    `limits` are the map's values that get the darkest and the brightest colour.
    """
    picture = np.atleast_3d(_picture(image).clip(0, 1)) * np.ones(3)
    low, high = limits
    heat = ((_numpy(anomaly_map) - low) / (high - low)).clip(0, 1)[..., None]
    colours = plt.get_cmap(MAP_COLOURS)(heat[..., 0])[..., :3]
    overlay = picture * (1 - 0.75 * heat) + colours * 0.75 * heat
    both = (np.concatenate([picture, overlay], 1) * 255).round()
    both = Image.fromarray(both.astype(np.uint8))
    write_whole(Path(path), lambda unfinished: both.save(unfinished, "PNG"))


def _numpy(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _picture(image) -> np.ndarray:
    """Bring one image to (H, W, 3) or (H, W), as matplotlib wants it."""
    image = _numpy(image).astype(np.float32)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise ValueError(f"expected an image (3, H, W), (1, H, W) or (H, W), got {image.shape}")
    return image


def _thin(x: np.ndarray, y: np.ndarray, points: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Keep no more corners of a curve than a picture can show."""
    kept = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
    return x[kept], y[kept]


def _draw(axis, picture: np.ndarray) -> None:
    axis.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _grid(rows: int, columns: int, size: float, head: float = 0.0, side: float = 0.0):
    """Make axes without ticks, `size` inches each, with `head` above all and `side` beside them."""
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            rows, columns, squeeze=False, layout="constrained",
            figsize=(columns * size + side, rows * size + head),
        )  # fmt: skip
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return _finished(fig), axes


def _finished(fig: Figure) -> Figure:
    """Take the figure out of pyplot's hands: it shows once, where it is returned."""
    plt.close(fig)
    return fig


def _png(frame) -> str:
    """Encode a figure or an image as base64 PNG."""
    buffer = io.BytesIO()
    if isinstance(frame, Figure):
        frame.savefig(buffer, format="png")
    else:
        picture = (_picture(frame).clip(0, 1) * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
