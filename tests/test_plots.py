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
from diffad_ref.tools.pages import picture  # noqa: E402
from diffad_ref.tools.plots import (  # noqa: E402
    best_and_worst,
    chart,
    outside,
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
    assert titles(fig) == ["image", "noised", "rebuilt", "map", "mask"]
    assert fig.axes[0].get_ylabel() == f"a\nscore {found.score[0]:.3g}"


def test_panels_leave_out_what_is_not_there():
    found, images = prediction(1)
    found.parts = {}
    assert titles(panels(found, images)) == ["image", "rebuilt", "map"]


def test_panels_show_the_parts_asked_for():
    found, images = prediction(1)
    shown = titles(panels(found, images, parts=("other", "noised")))
    assert shown == ["image", "other", "noised", "rebuilt", "map"]


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


def test_figures_have_a_white_ground_even_in_a_dark_style():
    with plt.style.context("dark_background"):
        fig = show_images(torch.rand(1, 3, 8, 8), ["x"])
    assert fig.get_facecolor() == (1, 1, 1, 1)


def test_long_titles_are_wrapped_and_take_room():
    fig = show_images(torch.rand(16, 3, 8, 8), ["what should be there"] * 8 + [""] * 8, columns=8)
    assert all("\n" in title for title in titles(fig))
    assert fig.get_figwidth() == pytest.approx(5.5) and fig.get_figheight() > 2 * 5.5 / 8 + 0.3


def test_a_legend_outside_covers_no_line():
    fig, axis = chart(3)
    axis.plot([0, 1], [0, 1], label="line")
    outside(axis)
    fig.canvas.draw()
    below = axis.get_window_extent().y1
    assert axis.get_legend().get_window_extent().y0 >= below - 1


def test_slider_embeds_each_frame_and_shows_one():
    frames = torch.rand(3, 3, 8, 6)
    text = slider(frames, ["t = 0", "t = 1", "t = 2"], "noise", start=1)._repr_html_()
    pictures = [base64.b64decode(s) for s in re.findall(r"base64,([^\"]+)", text)]
    assert [Image.open(io.BytesIO(p)).size for p in pictures] == [(6, 8)] * 3
    assert re.findall(r'data-label="([^"]+)"( hidden)?', text) == [
        ("t = 0", " hidden"), ("t = 1", ""), ("t = 2", " hidden"),
    ]  # fmt: skip
    assert 'max="2"' in text and 'value="1"' in text
    assert 'alt="noise: t = 2"' in text and 'aria-label="noise"' in text


def test_slider_takes_figures_and_loads_nothing_from_elsewhere():
    figures = [show_images(torch.rand(1, 3, 8, 8), [name]) for name in "ab"]
    text = slider(figures, [0, 1])._repr_html_()
    assert text.count("<svg") == 2 and "<script" not in text
    assert re.findall(r'http[^"]*', text) == ["http://www.w3.org/2000/svg",
                                              "http://www.w3.org/1999/xlink"] * 2  # fmt: skip
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_figure_on_a_page_takes_its_colours_and_names_itself():
    fig, axis = chart(2)
    axis.plot([0, 1], [0, 1], "k")
    text = picture(fig, "a line")
    assert 'aria-label="a line"' in text and "currentColor" in text
    assert "#000000" not in text and "#ffffff" not in text and "<metadata" not in text


def test_pictures_in_a_figure_are_small_and_sharp():
    noise, steps = torch.rand(3, 64, 64), (torch.arange(64) // 16 / 3).expand(3, 64, 64)
    for image in (noise, steps):
        text = picture(show_images([image]), "x")
        assert len(text) < 12000 and "pixelated" in text
        (data,) = re.findall(r"data:image/\w+;base64,([^\"]+)", text)
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) / 255.0
        assert found.shape == (64, 64, 3)
    found = found if (found[0, 0, 0] < 0.5) else found[::-1]
    assert abs(found - steps.permute(1, 2, 0).numpy()).max() < 0.01  # few colours stay exact


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


def test_slider_starts_at_a_frame_that_is_there():
    with pytest.raises(ValueError, match="from 0 to 1"):
        slider(torch.rand(2, 3, 4, 4), ["a", "b"], start=2)


def test_source_is_the_text_of_the_functions_themselves_and_says_where_they_stand():
    text = source(show_images, save_heat_map, slider)._repr_markdown_()
    assert text.startswith("```python\n# diffad_ref/tools/plots.py\ndef show_images(")
    assert "\n\n\ndef save_heat_map(" in text
    assert "\n\n\n# diffad_ref/tools/pages.py\ndef slider(" in text
