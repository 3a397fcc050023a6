"""The pictures of the book: images and maps side by side, charts, histograms.

Each function returns a figure and shows nothing by itself. Figures are drawn for a phone first:
`WIDTH` inches wide, with labels of at least 10 points.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffad_ref.checkpoints import write_whole
from diffad_ref.tools.pages import slider, source  # noqa: F401  (chapters take all from here)

# After Okabe and Ito, whom readers with any colour vision can follow; each colour has a contrast
# of at least 3 : 1 to a white page and to a dark one.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#C0629B", "#B07C00", "#3A8FC2", "#7F7F7F")
GOOD, DEFECTIVE, OUTLINE = PALETTE[0], PALETTE[1], "#56B4E9"
MAP_COLOURS = "inferno"  # dark to bright, even in lightness
WIDTH = 5.5  # inches
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "black",
    "legend.frameon": False,
    "figure.dpi": 100,
}


def chart(height: float = 2.8, rows: int = 1, columns: int = 1, **options):
    """Make a figure of one or more axes, in the style of the book.

    Parameters
    ----------
    height : float
        Inches of the whole figure; its width is `WIDTH`.
    rows, columns : int
        Axes below one another, and side by side.
    options
        Passed on to `matplotlib.pyplot.subplots`, such as ``sharey=True``.

    Returns
    -------
    Figure, and its axes as `matplotlib.pyplot.subplots` gives them
    """
    with plt.rc_context(STYLE):
        look = {"figsize": (WIDTH, height), "layout": "constrained"}
        fig, axes = plt.subplots(rows, columns, **look, **options)
        for axis in np.ravel(axes):
            axis.tick_params(labelsize=10)
    return _finished(fig), axes


def outside(axis, columns: int = 3) -> None:
    """Put the legend of an axis above it, where it covers no line."""
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=10,
        frameon=False, borderaxespad=0.3, columnspacing=1.2, handlelength=2.2,
    )  # fmt: skip


def show_images(images, titles=None, columns: int = 6, size: float | None = None) -> Figure:
    """Show images in a grid.

    Parameters
    ----------
    images : Tensor or array (N, 3, H, W), or a sequence of (3, H, W), (1, H, W) or (H, W)
        Values in [0, 1]; others are clipped.
    titles : sequence of str, optional
        One above each image; long ones are wrapped, a row without any takes no room for them.
    columns : int
        Images in a row.
    size : float, optional
        Side of an image in inches; by default so that a row is `WIDTH` wide, and at most 1.8.

    Returns
    -------
    Figure
    """
    pictures = [_picture(image) for image in images]
    if not pictures:
        raise ValueError("there is no image to show")
    columns = min(columns, len(pictures))
    size = size or min(1.8, WIDTH / columns)
    names = ["" if titles is None else str(title) for title in titles or pictures]
    letters = max(5, int(size * 72 / 5.6))  # of 10 points, that fit above an image
    names = [textwrap.fill(name, letters) for name in names]
    rows = [names[k : k + columns] for k in range(0, len(pictures), columns)]
    heads = [max(name.count("\n") + bool(name) for name in row) for row in rows]
    fig, axes = _grid(len(rows), columns, size, head=0.19 * sum(heads))
    for i, axis in enumerate(axes.flat):
        if i < len(pictures):
            _draw(axis, pictures[i])
            axis.set_title(names[i], fontsize=10, pad=3)
        else:
            axis.set_visible(False)
    return fig


def panels(
    prediction, images, masks=None, names=None, parts=("noised",), share_scale=True, size=None
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
    size : float, optional
        Side of an image in inches; by default so that a row is `WIDTH` wide.

    Returns
    -------
    Figure
    """
    maps = prediction.anomaly_map.detach().float().cpu().numpy()
    columns = {"image": images}
    columns |= {name: prediction.parts[name] for name in parts if name in prediction.parts}
    columns |= {"reconstruction": prediction.reconstruction, "map": maps}
    columns |= {} if masks is None else {"mask": masks}
    size = size or (WIDTH - 1.0) / len(columns)
    fig, axes = _grid(len(maps), len(columns), size, head=0.25, side=1.0)
    for j, (title, column) in enumerate(columns.items()):
        axes[0, j].set_title("rebuilt" if title == "reconstruction" else title, fontsize=10)
        for axis, picture in zip(axes[:, j], column, strict=True):
            if title != "map":
                _draw(axis, _picture(picture))
                continue
            shown = maps if share_scale else picture
            colours = axis.imshow(
                picture, MAP_COLOURS, vmin=shown.min(), vmax=shown.max(), interpolation="none"
            )
    for i, axis in enumerate(axes[:, 0]):
        name = str(names[i]).replace(" ", "\n") + "\n" if names is not None else ""
        words = f"{name}score {prediction.score[i]:.3g}"
        axis.set_ylabel(words, fontsize=10, rotation=0, ha="right", va="center")
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
    fig, axis = chart(3)
    for label, name, colour, hatch in ((0, "good", GOOD, ""), (1, "defective", DEFECTIVE, "//")):
        chosen = scores[labels == label]
        look = {"facecolor": (colour, 0.3), "edgecolor": colour, "hatch": hatch}
        look |= {"histtype": "stepfilled", "linewidth": 1.6}
        axis.hist(chosen, edges, label=f"{name} ({chosen.size})", **look)
    axis.set(xlabel="score of the image", ylabel="images", title=title)
    axis.legend()
    return fig


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


def _draw(axis, picture: np.ndarray) -> None:
    axis.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="none")


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
