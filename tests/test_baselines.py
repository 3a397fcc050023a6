"""Baselines on data whose template and principal components are known."""

import pytest
import torch

from diffad_ref.baselines import PCA, Template
from diffad_ref.evaluation import evaluate
from diffad_ref.masking import visibility


class Plates(torch.utils.data.Dataset):
    """Grey plates ("dark" or "light") that vary along one pattern; defects are white squares."""

    def __init__(self, count=12, defects=0, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        pattern = torch.linspace(-1, 1, 16).expand(3, 16, 16)
        self.items = []
        for i in range(2 * count):
            category, level = (("dark", 0.3), ("light", 0.6))[i % 2]
            image = level + 0.1 * torch.randn((), generator=self.rng) * pattern
            mask = torch.zeros(1, 16, 16)
            if i < defects:
                mask[:, 6:10, 6:10] = 1
            image = (image + 0.3 * mask).clamp(0, 1)
            index = ("dark", "light").index(category)
            self.items.append(
                {
                    "image": image,
                    "mask": mask,
                    "label": int(mask.any()),
                    "category": category,
                    "category_index": index,
                    "kind": "square" if mask.any() else "good",
                    "path": f"{i}.png",
                }
            )

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


BASELINES = pytest.mark.parametrize("make", [Template, PCA])


@BASELINES
def test_a_white_square_is_found(make):
    report = evaluate(make().fit(Plates()), Plates(defects=12, seed=1), progress=False)
    assert report.mean["pixel_auroc"] > 0.95 and report.mean["image_auroc"] > 0.8


def test_template_learns_mean_and_deviation_of_each_category():
    data = Plates()
    template = Template().fit(data)
    dark = torch.stack([data[i]["image"] for i in range(0, len(data), 2)])
    assert template.categories == ("dark", "light")
    assert torch.allclose(template.mean[0], dark.mean(0))
    assert torch.allclose(template.std[0], dark.std(0, unbiased=False), atol=1e-6)


def test_template_map_is_the_deviation_in_units_of_the_spread():
    template = Template(eps=0.1, sigma=0.01).fit(Plates())
    images = (template.mean[:1] + 0.2).clamp(0, 1)
    found = template.predict(images, torch.tensor([0])).anomaly_map
    expected = (0.2 / (template.std[:1] + 0.1)).mean(1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_pca_rebuilds_what_varies_in_training_and_nothing_else():
    pca = PCA().fit(Plates())
    good, bad = Plates(seed=3)[0]["image"], Plates(seed=3, defects=1)[0]["image"]
    found = pca.predict(torch.stack([good, bad]), torch.tensor([0, 0]))
    assert found.anomaly_map[0].max() < 1e-6
    assert found.anomaly_map[1, 7, 7] > 0.01
    assert torch.allclose(found.reconstruction[0], good, atol=1e-4)


def test_one_model_for_all_categories_needs_no_index():
    pca = PCA(per_category=False).fit(Plates())
    images = torch.stack([Plates(seed=3)[i]["image"] for i in (0, 1)])
    assert pca.predict(images).anomaly_map.max() < 1e-6


@BASELINES
def test_each_image_is_judged_by_its_own_category(make):
    model = make().fit(Plates())
    images = torch.stack([Plates(seed=3)[i]["image"] for i in (0, 1)])
    right = model.predict(images, torch.tensor([0, 1])).score
    swapped = model.predict(images, torch.tensor([1, 0])).score
    assert (swapped > right).all()


@BASELINES
def test_image_score_is_the_mean_of_the_50_largest_pixels(make):
    found = make().fit(Plates()).predict(Plates(defects=1)[0]["image"][None], torch.tensor([0]))
    expected = found.anomaly_map.flatten().sort(descending=True).values[:50].mean()
    assert found.score.item() == pytest.approx(expected.item(), rel=1e-6)


@BASELINES
def test_prediction_keeps_the_shapes_of_the_contract(make):
    found = make().fit(Plates()).predict(torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 1]))
    assert found.anomaly_map.shape == (3, 16, 16) and found.score.shape == (3,)
    assert found.reconstruction.shape == (3, 3, 16, 16)
    assert found.reconstruction.min() >= 0 and found.reconstruction.max() <= 1


def test_fewer_images_than_components_are_enough():
    assert PCA(n_components=80).fit(Plates(count=3)).mean.shape == (2, 3, 16, 16)


@BASELINES
def test_prediction_before_fit_is_refused(make):
    with pytest.raises(ValueError, match="call fit"):
        make().predict(torch.rand(1, 3, 16, 16), torch.tensor([0]))


@BASELINES
def test_defective_training_images_are_refused(make):
    with pytest.raises(ValueError, match="good images only"):
        make().fit(Plates(defects=1))


@BASELINES
@pytest.mark.parametrize(
    ("images", "index", "words"),
    [
        (torch.rand(1, 3, 8, 8), [0], "fitted on images"),
        (torch.rand(1, 3, 16, 16), None, "which category"),
        (torch.rand(1, 3, 16, 16), [2], "unknown"),
        (torch.rand(1, 3, 16, 16) * 255, [0], "255"),
        (torch.full((1, 3, 16, 16), float("nan")), [0], "NaN"),
    ],
)
def test_input_that_does_not_fit_is_named(make, images, index, words):
    model = make().fit(Plates())
    with pytest.raises(ValueError, match=words):
        model.predict(images, None if index is None else torch.tensor(index))


@BASELINES
def test_baseline_that_adapts_judges_an_image_the_same_in_any_light(make):
    x, index = 0.2 + 0.6 * torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    model = make(adapt=True).fit(Plates())
    bright, dim = (model.predict(light * x, index) for light in (1, 0.25))
    assert torch.allclose(bright.anomaly_map, dim.anomaly_map, atol=1e-4)
    assert torch.allclose(0.25 * bright.reconstruction, dim.reconstruction, atol=1e-3)
    plain = make().fit(Plates())
    a, b = (plain.predict(light * x, index).anomaly_map for light in (1, 0.25))
    assert not torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize(("make", "power"), [(Template, 1), (PCA, 2)], ids=["template", "pca"])
def test_masking_takes_away_from_a_difference_what_the_normal_image_hides(make, power):
    x, index = 0.2 + 0.6 * torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    plain, masked = (make(masking=m, sigma=0.01).fit(Plates()).predict(x, index) for m in (0, 0.01))
    share = visibility(2 * plain.reconstruction - 1, 0.01)[:, 0]
    assert share.min() < 0.9
    assert torch.allclose(masked.anomaly_map, share**power * plain.anomaly_map, rtol=1e-3)
    assert torch.equal(plain.reconstruction, masked.reconstruction)
