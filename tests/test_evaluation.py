"""Reports on small made-up data sets whose numbers can be worked out by hand."""

from math import nan

import pytest
import torch

from diffad_ref.detector import Prediction
from diffad_ref.evaluation import evaluate
from diffad_ref.metrics import METRICS
from diffad_ref.tools.protocols import PROTOCOLS


class Samples(torch.utils.data.Dataset):
    """Images whose red channel is the map that a perfect detector would give."""

    def __init__(self, rows, masks=True):
        self.rows, self.masks = rows, masks
        self.categories = sorted({category for category, _, _ in rows})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        category, kind, level = self.rows[i]
        mask = torch.zeros(1, 8, 8)
        if kind != "good":
            mask[:, 2:5, 2:5] = 1
        sample = {
            "image": level * mask.expand(3, 8, 8).clone() + 0.01,
            "label": int(kind != "good"),
            "category": category,
            "category_index": self.categories.index(category),
            "kind": kind,
            "path": f"{category}/{kind}/{i}.png",
        }
        return sample | ({"mask": mask} if self.masks else {})


class Red:
    """Calls an image as abnormal as it is red; remembers the classes with which it was called."""

    device = torch.device("cpu")

    def __init__(self, categories=(), noise=0.0):
        self.categories, self.noise, self.calls = categories, noise, []

    def predict(self, images, category_index=None, generator=None):
        self.calls.append(category_index.tolist())
        maps = images[:, 0] + self.noise * torch.rand(images[:, 0].shape, generator=generator)
        return Prediction(maps, maps.amax((1, 2)), images)


GOOD = [("nut", "good", 0)] * 3 + [("bolt", "good", 0)] * 2
ROWS = GOOD + [("nut", "bent", 0.8), ("bolt", "crack", 0.5), ("bolt", "bent", 0.9)]


def run(detector=None, rows=ROWS, masks=True, **options):
    return evaluate(detector or Red(), Samples(rows, masks), progress=False, **options)


def test_report_has_a_row_for_each_category_and_their_mean():
    report = run()
    assert report.table.index.tolist() == ["bolt", "nut", "mean"]
    assert report.table[["n_good", "n_defective"]].values.tolist() == [[2, 2], [3, 1], [5, 3]]
    assert all(report.mean[name] == 1 for name in METRICS)
    assert report.mean == report.table.loc["mean"].to_dict()


def test_mean_is_over_categories_and_not_over_images():
    rows = ROWS + [("nut", "bent", 0.0)]  # a defect that cannot be seen: nut has AUROC 3/4
    report = run(rows=rows)
    expected = {"bolt": 1.0, "nut": 0.75, "mean": 0.875}
    assert report.table["image_auroc"].to_dict() == pytest.approx(expected)


def test_kind_is_judged_against_the_good_images_of_its_category():
    rows = GOOD + [("bolt", "bent", 0.9), ("bolt", "crack", 0.0), ("nut", "bent", 0.0)]
    kinds = run(rows=rows).kinds
    assert kinds.index.tolist() == [("bolt", "bent"), ("bolt", "crack"), ("nut", "bent")]
    assert kinds["image_auroc"].tolist() == [1, 0.5, 0.5]
    assert kinds["pixel_auroc"].tolist() == [1, 0.5, 0.5]
    assert kinds["n_good"].tolist() == [2, 2, 3] and kinds["n_defective"].tolist() == [1, 1, 1]


def test_same_seed_same_report_and_another_seed_another():
    first, again, other = (run(Red(noise=1.0), batch_size=3, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.maps, again.maps)
    assert not torch.equal(first.maps, other.maps)


def test_noise_differs_between_neighbouring_seeds():
    detector = Red(noise=1.0)
    first, second = (run(detector, batch_size=1, seed=s) for s in (0, 1))
    assert not torch.equal(first.maps, second.maps)


def test_progress_bar_and_global_seed_do_not_change_the_result(capsys):
    torch.manual_seed(1)
    quiet = run(Red(noise=1.0))
    torch.manual_seed(2)
    loud = evaluate(Red(noise=1.0), Samples(ROWS), progress=True)
    assert torch.equal(quiet.maps, loud.maps)
    assert "judge" in capsys.readouterr().err


def test_category_index_is_the_one_that_the_detector_learned():
    detector = Red(categories=("washer", "nut", "bolt"))
    run(detector)
    assert detector.calls[0] == [1, 1, 1, 2, 2, 1, 2, 2]


def test_unknown_category_is_named():
    with pytest.raises(ValueError, match=r"never saw \['bolt'\]"):
        run(Red(categories=("nut",)))


def test_maps_and_scores_are_kept_at_image_resolution():
    report = run(batch_size=3)
    assert report.maps.shape == report.masks.shape == (8, 8, 8)
    assert report.maps.dtype == torch.float32 and report.masks.dtype == torch.bool
    assert report.images["kind"].tolist() == [kind for _, kind, _ in ROWS]
    assert report.images["label"].tolist() == [0] * 5 + [1] * 3
    assert report.images["score"].iloc[-1] == pytest.approx(0.91)


def test_paths_in_a_report_are_relative_to_the_data_set():
    data = Samples(ROWS)
    data.root = "nut"
    data.rows = [row for row in ROWS if row[0] == "nut"]
    report = evaluate(Red(), data, progress=False)
    assert report.images["path"][0] == "good/0.png"


def test_without_masks_image_metrics_remain_and_pixel_metrics_are_not_defined():
    report = run(masks=False)
    for table in (report.table, report.kinds):
        assert (table[list(METRICS[:3])] == 1).all(axis=None)
        assert table[list(METRICS[3:])].isna().all(axis=None)


def test_defective_image_without_a_mask_is_left_out_of_pixel_metrics_only():
    class OneMaskLost(Samples):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample | ({"mask": torch.zeros(1, 8, 8)} if i == 5 else {})

    with pytest.warns(UserWarning, match="1 of 3 defective images have no mask .nut."):
        report = evaluate(Red(), OneMaskLost(ROWS), progress=False)
    assert report.table["image_auroc"].tolist() == [1, 1, 1]
    assert report.table["pixel_auroc"].tolist() == pytest.approx([1, nan, 1], nan_ok=True)


def test_category_without_defects_has_no_metrics_and_does_not_enter_the_mean():
    report = run(rows=GOOD + [("bolt", "bent", 0.9)])
    assert report.table.loc["nut", list(METRICS)].isna().all()
    assert all(report.mean[name] == report.table.loc["bolt", name] == 1 for name in METRICS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "empty"),
        (GOOD, "no defective image among the 5 of bolt, nut"),
        (ROWS[5:], "no good image"),
        (ROWS + [("nut", "unlabelled", 0)], "unlabelled"),
    ],
)
def test_data_that_cannot_be_judged_is_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        run(rows=rows)


def test_nan_in_a_map_names_the_category():
    class Broken(Red):
        def predict(self, images, category_index=None, generator=None):
            prediction = super().predict(images, category_index, generator)
            prediction.anomaly_map[category_index == 0, 1, 1] = float("nan")
            return prediction

    with pytest.raises(ValueError, match="NaN or infinity for images of bolt"):
        run(Broken())


def test_map_of_another_size_is_refused():
    class Small(Red):
        def predict(self, images, category_index=None, generator=None):
            return super().predict(images[..., ::2, ::2], category_index, generator)

    with pytest.raises(ValueError, match=r"expected maps \(8, 8, 8\)"):
        run(Small())


class Large(Samples):
    """The same pictures, smooth, at a size that the released evaluations can average."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        wide = {name: sample[name].repeat_interleave(8, 1) for name in ("image", "mask")}
        return sample | {name: value.repeat_interleave(8, 2) for name, value in wide.items()}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_changes_the_metrics_and_the_report_says_so(name):
    data, detector = Large(ROWS), Red(noise=1.5)
    exact = evaluate(detector, data, progress=False)
    report = evaluate(detector, data, progress=False, protocol=PROTOCOLS[name])
    assert torch.equal(report.maps, exact.maps)
    assert report.mean["aupro"] != exact.mean["aupro"]
    assert exact.protocol == "exact" and report.protocol == name


class Scored(Red):
    """Scores images by the opposite of what its maps say."""

    def predict(self, images, category_index=None, generator=None):
        prediction = super().predict(images, category_index, generator)
        return Prediction(prediction.anomaly_map, -prediction.score, prediction.reconstruction)


def test_protocol_scores_images_by_their_maps_and_exact_metrics_by_their_scores():
    assert run(Scored()).mean["image_auroc"] == 0
    protocol, noisy = PROTOCOLS["deco_diff"], Scored(noise=0.2)
    report = evaluate(noisy, Large(ROWS), progress=False, protocol=protocol)
    assert report.mean["image_auroc"] == 1


def test_report_shows_its_table_in_a_shell_and_in_a_notebook():
    report = run(rows=ROWS + [("nut", "bent", 0.0)])
    for text in (repr(report), report._repr_html_()):
        assert "0.750" in text and "nut" in text and "mean" in text
