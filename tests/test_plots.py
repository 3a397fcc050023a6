"""Pictures: what stands in them, and that nothing is left open behind them."""

import base64
import io
import re

import matplotlib
import numpy as np
import pytest
import torch
from pandas import DataFrame
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from diffad_ref.detector import Prediction  # noqa: E402
from diffad_ref.evaluation import Report  # noqa: E402
from diffad_ref.tools.plots import (  # noqa: E402
    best_and_worst,
    curves,
    panels,
    save_heat_map,
    score_histogram,
    show_images,
    slider,
    source,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def prediction(count=2):
    maps = torch.rand(count, 8, 8)
    images = torch.rand(count, 3, 8, 8)
    return Prediction(maps, maps.amax((1, 2)), images, {"noised": images, "other": images}), images


def titles(fig):
    return [axis.get_title() for axis in fig.axes if axis.get_title()]


def test_panels_show_the_columns_in_reading_order():
    found, images = prediction()
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, 2:4, 2:4] = 1
    fig = panels(found, images, masks, ["a", "b"])
    assert titles(fig) == ["image", "noised", "reconstruction", "map", "mask"]
    assert fig.axes[0].get_ylabel() == f"a\nscore {found.score[0]:.3g}"


def test_panels_leave_out_what_is_not_there():
    found, images = prediction(1)
    found.parts = {}
    assert titles(panels(found, images)) == ["image", "reconstruction", "map"]


def test_panels_show_the_parts_asked_for():
    found, images = prediction(1)
    shown = titles(panels(found, images, parts=("other", "noised")))
    assert shown == ["image", "other", "noised", "reconstruction", "map"]


def test_maps_of_all_rows_share_one_scale_unless_told_otherwise():
    found, images = prediction()
    found.anomaly_map[1] += 5
    for share, count in ((True, 1), (False, 2)):
        fig = panels(found, images, share_scale=share)
        limits = {
            a.images[0].get_clim()
            for a in fig.axes
            if a.images and a.images[0].get_cmap().name == "inferno"
        }
        assert len(limits) == count


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(7, 3, 8, 8),
        torch.rand(7, 1, 8, 8),
        np.random.rand(7, 8, 8),
        [torch.rand(3, 8, 4)] * 7,
    ],
)
def test_every_image_gets_its_axis(images):
    fig = show_images(images, titles=range(7), columns=4)
    assert titles(fig) == [str(i) for i in range(7)]
    assert sum(axis.get_visible() for axis in fig.axes) == 7


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="no image"):
        show_images([])
    with pytest.raises(ValueError, match="expected an image"):
        show_images(torch.rand(2, 5, 8, 8))


def test_histogram_counts_every_score_once():
    fig = score_histogram(torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7]), torch.tensor([0, 0, 1, 1, 1]))
    legend = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert legend == ["good (2)", "defective (3)"]


def test_curves_state_area_and_average_precision():
    fig = curves({"m": ([3, 2, 1, 0], [1, 0, 1, 0])})
    texts = [axis.get_legend().get_texts()[0].get_text() for axis in fig.axes]
    assert texts == ["m (0.750)", "m (0.833)"]


def test_curves_of_one_class_are_refused():
    with pytest.raises(ValueError, match="defective and normal"):
        curves({"m": ([1, 2], [0, 0])})


def test_figures_have_a_white_ground_even_in_a_dark_style():
    with plt.style.context("dark_background"):
        fig = show_images(torch.rand(1, 3, 8, 8), ["x"])
    assert fig.get_facecolor() == (1, 1, 1, 1)


def test_slider_embeds_each_frame_and_shows_the_first():
    frames = torch.rand(3, 3, 8, 6)
    text = slider(frames, ["t = 0", "t = 1", "t = 2"], "noise")._repr_html_()
    pictures = [base64.b64decode(s) for s in re.findall(r"base64,([^\"]+)", text)]
    assert [Image.open(io.BytesIO(p)).size for p in pictures] == [(6, 8)] * 3
    shown = re.findall(r"display:(block|none)\"", text)
    assert shown == ["block", "none", "none"]
    assert 'max="2"' in text and 'alt="noise: t = 2"' in text and 'aria-label="noise"' in text


def test_slider_takes_figures_and_loads_nothing_from_elsewhere():
    figures = [show_images(torch.rand(1, 3, 8, 8)) for _ in range(2)]
    text = slider(figures, [0, 1])._repr_html_()
    assert text.count("<img") == 2
    assert "http" not in text and "<script" not in text and " id=" not in text


def test_slider_as_text_is_short():
    assert len(repr(slider(torch.rand(2, 3, 64, 64), ["a", "b"]))) < 50


def test_slider_escapes_its_labels():
    text = slider(torch.rand(1, 1, 4, 4), ['a"b<c>'], "<t>")._repr_html_()
    assert 'a"b' not in text and "<c>" not in text and "<t>" not in text


def test_slider_needs_one_label_for_each_frame():
    with pytest.raises(ValueError, match="2 frames, 1 labels"):
        slider(torch.rand(2, 3, 4, 4), ["a"])


def judged(scores, labels):
    """A report and its data set, two categories in turn."""
    count = len(scores)
    kinds = ["bad" if label else "good" for label in labels]
    images = {"category": ["ab"[i % 2] for i in range(count)], "kind": kinds}
    images = DataFrame(images | {"label": labels, "score": scores})
    masks = torch.zeros(count, 8, 8, dtype=torch.bool)
    masks[torch.tensor(labels) == 1, 2:4, 2:4] = True
    report = Report(None, None, images, "Red", maps=torch.rand(count, 8, 8), masks=masks)
    return report, [{"image": torch.full((3, 8, 8), i / 10)} for i in range(count)]


def test_best_and_worst_are_found_by_the_distance_from_good_images_of_their_category():
    #              a    b    a    b    a    b    a    b
    scores, labels = [0.1, 5.0, 0.3, 7.0, 0.9, 5.5, 0.2, 30.0], [0, 0, 0, 0, 1, 1, 1, 1]
    fig = best_and_worst(*judged(scores, labels), columns=2)
    shown = [axis.images[0].get_array() for axis in fig.axes]
    pixels = [round(10 * float(shown[i][0, 0, 0])) for i in (0, 1, 4, 5, 8, 9)]
    assert pixels[:4] == [7, 4, 5, 6]  # of b and of a; then the missed ones
    assert set(pixels[4:]) == {2, 3}
    assert [fig.axes[i].get_ylabel() for i in (0, 4, 8)] == ["found best", "missed", "false alarms"]
    assert fig.axes[0].get_title() == "b, bad" and fig.axes[8].get_title().endswith(", good")


def test_best_and_worst_need_the_maps():
    report, data = judged([0.1, 0.2], [0, 1])
    report.maps = None
    with pytest.raises(ValueError, match="evaluate again"):
        best_and_worst(report, data)


def test_heat_map_stands_beside_its_image_and_is_as_strong_as_its_limits_say(tmp_path):
    grey = torch.full((3, 4, 6), 0.5)
    heat = torch.zeros(4, 6)
    heat[0, 0], heat[0, 1] = 2.0, 9.0  # the upper limit, and beyond it
    save_heat_map(grey, heat, tmp_path / "map.png", (0.0, 2.0))
    pixels = np.asarray(Image.open(tmp_path / "map.png"))
    assert pixels.shape == (4, 12, 3)
    left, right = pixels[:, :6].astype(int), pixels[:, 6:].astype(int)
    assert (left == 128).all() and (right[1:] == 128).all()
    assert (right[0, 0] == right[0, 1]).all() and abs(right[0, 0] - 128).max() > 50


def test_source_is_the_text_of_the_functions_themselves():
    text = source(show_images, save_heat_map)._repr_html_()
    words = re.sub(r"<[^>]+>", "", text)
    assert "def show_images(" in words and "def save_heat_map(" in words
