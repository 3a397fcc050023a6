"""Reports on small made-up data sets whose numbers can be worked out by hand."""

import pytest
import torch
from torch import nn

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


class Red(nn.Module):
    """Calls an image as abnormal as it is red; remembers how it was called."""

    device = torch.device("cpu")

    def __init__(self, categories=(), noise=0.0):
        super().__init__()
        self.layer = nn.Dropout()
        self.categories, self.noise, self.calls = categories, noise, []

    def predict(self, images, category_index=None, generator=None):
        self.calls.append((category_index.tolist(), self.training))
        maps = images[:, 0] + self.noise * torch.rand(images[:, 0].shape, generator=generator)
        return Prediction(maps, maps.amax((1, 2)), images)


GOOD = [("nut", "good", 0)] * 3 + [("bolt", "good", 0)] * 2
ROWS = GOOD + [("nut", "bent", 0.8), ("bolt", "crack", 0.5), ("bolt", "bent", 0.9)]


def run(detector=None, rows=ROWS, masks=True, **options):
    return evaluate(detector or Red(), Samples(rows, masks), progress=False, **options)


def test_report_has_a_row_for_each_category_and_their_mean():
    report = run()
    assert [row["category"] for row in report.rows] == ["bolt", "nut"]
    assert [(row["n_good"], row["n_defective"]) for row in report.rows] == [(2, 2), (3, 1)]
    assert all(report.mean[name] == 1 for name in METRICS)
    assert (report.mean["n_good"], report.mean["n_defective"]) == (5, 3)


def test_mean_is_over_categories_and_not_over_images():
    rows = ROWS + [("nut", "bent", 0.0)]  # a defect that cannot be seen: nut has AUROC 3/4
    report = run(rows=rows)
    by_name = {row["category"]: row["image_auroc"] for row in report.rows}
    assert by_name == {"bolt": 1.0, "nut": 0.75}
    assert report.mean["image_auroc"] == pytest.approx(0.875)


def test_kind_is_judged_against_the_good_images_of_its_category():
    rows = GOOD + [("bolt", "bent", 0.9), ("bolt", "crack", 0.0), ("nut", "bent", 0.0)]
    kinds = {(k["category"], k["kind"]): k for k in run(rows=rows).kinds}
    assert kinds["bolt", "bent"]["image_auroc"] == 1
    assert kinds["bolt", "crack"]["image_auroc"] == 0.5
    assert kinds["nut", "bent"]["pixel_auroc"] == 0.5
    assert kinds["nut", "bent"]["n_defective"] == 1


def test_same_seed_same_report_and_another_seed_another():
    first, again, other = (run(Red(noise=1.0), batch_size=3, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.maps, again.maps)
    assert not torch.equal(first.maps, other.maps)


def test_noise_differs_between_batches_and_between_neighbouring_seeds():
    detector = Red(noise=1.0)
    first, second = (
        run(detector, rows=ROWS[:1] * 2 + ROWS[-1:], batch_size=1, seed=s) for s in (0, 1)
    )
    assert not torch.equal(first.maps[0], first.maps[1])
    assert not torch.equal(first.maps[1], second.maps[0])


def test_progress_bar_and_global_seed_do_not_change_the_result(capsys):
    torch.manual_seed(1)
    quiet = run(Red(noise=1.0))
    torch.manual_seed(2)
    loud = evaluate(Red(noise=1.0), Samples(ROWS), progress=True)
    assert torch.equal(quiet.maps, loud.maps)
    assert "evaluate" in capsys.readouterr().err


def test_detector_predicts_in_eval_mode_and_each_part_returns_to_its_own_mode():
    detector = Red()
    detector.train()
    detector.layer.eval()
    run(detector)
    assert not any(training for _, training in detector.calls)
    assert detector.training and not detector.layer.training


def test_category_index_is_the_one_that_the_detector_learned():
    detector = Red(categories=("washer", "nut", "bolt"))
    run(detector)
    assert detector.calls[0][0] == [1, 1, 1, 2, 2, 1, 2, 2]


def test_unknown_category_is_named():
    with pytest.raises(ValueError, match=r"never saw \['bolt'\]"):
        run(Red(categories=("nut",)))


def test_maps_and_scores_are_kept_at_image_resolution():
    report = run(batch_size=3)
    assert report.maps.shape == report.masks.shape == (8, 8, 8)
    assert report.maps.dtype == torch.float32 and report.masks.dtype == torch.bool
    assert [image["kind"] for image in report.images] == [kind for _, kind, _ in ROWS]
    assert report.images[-1]["score"] == pytest.approx(0.91)


def test_paths_in_a_report_are_relative_to_the_data_set():
    data = Samples(ROWS)
    data.root = "nut"
    data.rows = [row for row in ROWS if row[0] == "nut"]
    report = evaluate(Red(), data, progress=False)
    assert report.images[0]["path"] == "good/0.png"


def test_without_masks_image_metrics_remain_and_pixel_metrics_are_blank():
    report = run(masks=False)
    assert report.mean["image_auroc"] == 1 and report.mean["aupro"] is None
    assert "| bolt | 100.0 | 100.0 | 100.0 |  |  |  |  | 2 | 2 |" in report.to_markdown()
    assert json.loads(report.to_json())["rows"][0]["pixel_ap"] is None


def test_defective_image_without_a_mask_is_left_out_of_pixel_metrics_only():
    class OneMaskLost(Samples):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample | ({"mask": torch.zeros(1, 8, 8)} if i == 5 else {})

    with pytest.warns(UserWarning, match="1 of 3 defective images have no mask .nut."):
        report = evaluate(Red(), OneMaskLost(ROWS), progress=False)
    nut = report.rows[1]
    assert nut["image_auroc"] == 1 and nut["pixel_auroc"] is None
    assert report.mean["pixel_auroc"] == report.rows[0]["pixel_auroc"] == 1


def test_category_without_defects_has_blank_cells_and_does_not_enter_the_mean():
    report = run(rows=GOOD + [("bolt", "bent", 0.9)])
    assert report.rows[1]["category"] == "nut" and report.rows[1]["image_auroc"] is None
    assert report.mean["image_auroc"] == 1


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

    with pytest.raises(ValueError, match="NaN for images of bolt"):
        run(Broken())


def test_map_of_another_size_is_refused():
    class Small(Red):
        def predict(self, images, category_index=None, generator=None):
            return super().predict(images[..., ::2, ::2], category_index, generator)

    with pytest.raises(ValueError, match=r"expected maps \(8, 8, 8\)"):
        run(Small())


def test_report_survives_json_and_files(tmp_path):
    report = run()
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert Report.load(report.save(tmp_path / "new" / "report")) == report


def test_save_leaves_only_whole_files(tmp_path):
    run().save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["kinds.csv", "report.csv", "report.json", "report.md"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    report = run()
    report.save(tmp_path)
    old = (tmp_path / "report.json").read_text()
    report.seed = 1

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        report.save(tmp_path)
    assert (tmp_path / "report.json").read_text() == old
    assert len(list(tmp_path.iterdir())) == 4


def test_tables_show_per_cent_and_files_hold_fractions():
    report = run(rows=ROWS + [("nut", "bent", 0.0)])
    assert "| nut | 75.0 |" in str(report)
    assert "nut,0.75," in report.to_csv()
    assert json.loads(report.to_json())["rows"][1]["image_auroc"] == 0.75
    assert '<td style="text-align:right">75.0</td>' in report._repr_html_()


def test_by_kind_shows_the_columns_asked_for():
    lines = run().by_kind(("aupro",)).to_markdown().splitlines()
    assert lines[0] == "| category | kind | AUPRO | defective |"
    assert lines[2] == "| bolt | bent | 100.0 | 1 |"


def test_compare_sets_the_best_of_each_column_in_bold():
    rows = ROWS + [("nut", "bent", 0.0)]
    table = compare(
        {"red": run(rows=rows), "noise": run(Red(noise=9.0), rows=rows)}, ["pixel_auroc"]
    )
    lines = table.to_markdown().splitlines()
    assert lines[2].startswith("| red | **") and "**" not in lines[3]
    assert table._repr_html_().count("<b>") == 1


def test_compare_kinds_sets_the_best_of_each_row_in_bold():
    table = compare_kinds({"red": run(), "noise": run(Red(noise=9.0))}, "pixel_ap")
    lines = table.to_markdown().splitlines()
    assert lines[0] == "| category | kind | red | noise |"
    assert len(lines) == 5 and all("| **100.0** |" in line for line in lines[2:])


def test_reports_on_different_images_are_not_compared():
    with pytest.raises(ValueError, match="same images"):
        compare({"all": run(), "fewer": run(rows=ROWS[:-1])})


def test_unknown_column_is_named():
    with pytest.raises(ValueError, match="pixel_rocauc"):
        run().by_kind(("pixel_rocauc",))


def test_names_cannot_break_a_table():
    table = Table(("method",), [{"method": "a|b <i>"}])
    assert table.to_markdown().splitlines()[2] == "| a\\|b <i> |"
    assert "a|b &lt;i&gt;" in table._repr_html_()


class Large(Samples):
    """The same pictures, smooth, at a size that the released evaluations can average."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        wide = {name: sample[name].repeat_interleave(8, 1) for name in ("image", "mask")}
        return sample | {name: value.repeat_interleave(8, 2) for name, value in wide.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocol_changes_the_metrics_and_the_report_says_so(protocol):
    data, detector = Large(ROWS), Red(noise=1.5)
    exact = evaluate(detector, data, progress=False)
    report = evaluate(detector, data, progress=False, protocol=protocol)
    assert torch.equal(report.maps, exact.maps)
    assert report.mean["aupro"] != exact.mean["aupro"]
    assert report.protocol == protocol and f"released code of {protocol}" in repr(report)
    assert Report.from_dict(json.loads(report.to_json())).protocol == protocol
    with pytest.raises(ValueError, match=f"protocol {protocol}.* exact: such numbers cannot"):
        compare({"ours": exact, "theirs": report})


def test_unknown_protocol_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="unknown protocol 'paper': choose exact, diffusion_ad"):
        run(protocol="paper")


class Hungry(Red):
    """Holds 200 MB while it predicts."""

    def predict(self, images, category_index=None, generator=None):
        self.held = torch.ones(50_000_000)
        time.sleep(0.1)
        return super().predict(images, category_index, generator)


def test_peak_memory_covers_what_a_detector_held_for_a_moment():
    before = psutil.Process().memory_info().rss
    report = run(Hungry())
    assert report.peak_memory > before + 150e6
    assert f"at most {report.peak_memory / 2**30:.2f} GB" in repr(report)
