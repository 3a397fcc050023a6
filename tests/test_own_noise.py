"""An image's noise is its own: its score does not depend on what stands beside it."""

import csv
from dataclasses import replace

import pytest
import torch
from torch.utils.data import default_collate

from diffad_ref import DiffusionAD, evaluate, pretrained, save
from diffad_ref.__main__ import main
from diffad_ref.detector import for_each
from diffad_ref.diffusion import Draw, seeded
from diffad_ref.tools.photographs import Photographs

COUNT = 20


def one_draw():
    """DiffusionAD as shipped, but for the seven further draws, which cost their time."""
    shipped = pretrained("diffusion_ad_toy")
    detector = DiffusionAD(replace(shipped.config, draws=1))
    detector.load_state_dict(shipped.state_dict())
    return detector.eval()


DETECTORS = {
    "DiffusionAD": one_draw,
    "DeCo-Diff": lambda: pretrained("deco_diff_toy"),
    "One-for-More": lambda: pretrained("one_for_more_toy_3"),
}


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield DETECTORS[request.param]()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return default_collate([Photographs(64, COUNT)[i]["image"] for i in range(COUNT)])


def predicted(detector, images, size, seed=0):
    """Scores and maps of images that are judged so many at a time."""
    index = torch.zeros(len(images), dtype=torch.long)
    parts = [
        detector.predict(x, c, torch.Generator().manual_seed(seed))
        for x, c in zip(images.split(size), index.split(size), strict=True)
    ]
    return torch.cat([p.score for p in parts]), torch.cat([p.anomaly_map for p in parts])


def gap(a, b):
    """Largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def test_scores_and_maps_are_the_same_whatever_the_batch(detector, images):
    scores, maps = predicted(detector, images, 1)
    for size in (7, 32):
        found = predicted(detector, images, size)
        print(f"batches of {size}: {gap(found[0], scores):.1e}, {gap(found[1], maps):.1e}")
        assert (found[0] / scores - 1).abs().max() <= 1e-5 and gap(found[1], maps) <= 1e-5


def test_another_order_gives_the_same_scores(detector, images):
    scores, turned = predicted(detector, images, 7)[0], predicted(detector, images.flip(0), 7)[0]
    assert torch.allclose(turned.flip(0), scores, rtol=1e-5, atol=0)


def test_an_image_and_its_folder_give_the_same_score(detector, images, tmp_path, write):
    detector.categories = detector.categories or ("photographs",)
    category = ["--category", detector.categories[0]]
    save(detector, tmp_path / "weights")
    for number, image in enumerate((images[:8] * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        write(tmp_path / "in" / ("deep" * (number % 2)) / f"{number}.png", image)

    def scores(source, out):
        words = ["predict", tmp_path / "weights", source, "--out", tmp_path / out, *category]
        assert main([str(word) for word in words]) == 0
        with open(tmp_path / out / "scores.csv", newline="") as file:
            return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}

    whole = scores(tmp_path / "in", "all")
    assert len(whole) == 8
    for number, path in enumerate(sorted(whole)[::3]):
        (alone,) = scores(path, f"alone_{number}").values()
        assert alone == pytest.approx(whole[path], rel=1e-5, abs=1e-6)  # six digits are written


def test_a_report_is_the_same_whatever_the_batch(small_config, mvtec_root):
    torch.manual_seed(0)
    detector = DiffusionAD(small_config)
    data = detector.folder(mvtec_root, "test")
    one, many = (evaluate(detector, data, size, progress=False) for size in (1, 32))
    assert torch.allclose(one.maps, many.maps, rtol=1e-5, atol=1e-6)
    assert one.images["score"].to_numpy() == pytest.approx(many.images["score"].to_numpy(), 1e-5)


# -------------------------------------------------------------------------------- the noise itself


def noise(images, seed=0):
    return Draw(for_each(images, torch.Generator().manual_seed(seed))).normal(len(images), 5)


def test_noise_follows_the_seed_and_the_pixels_and_nothing_else(images):
    whole = noise(images)
    assert torch.equal(noise(images[3:4])[0], whole[3])
    assert len({tuple(row.tolist()) for row in whole}) == COUNT  # no two share theirs
    assert not torch.equal(noise(images, 1), whole)
    near = (images + 1e-4).clamp(0, 1)  # no level of 255 changes
    assert torch.equal(noise(near.clamp(max=1)), whole)


def test_several_generators_draw_what_each_would_draw_alone():
    alone = [Draw(seeded("cpu", k)).normal(1, 2, 3) for k in range(3)]
    assert torch.equal(Draw([seeded("cpu", k) for k in range(3)]).normal(3, 2, 3), torch.cat(alone))
    whole = Draw([seeded("cpu", k) for k in range(3)]).integers(0, 9, 3, 4)
    assert whole.shape == (3, 4)
    with pytest.raises(ValueError, match="3 images cannot share a draw of 4 rows"):
        Draw([seeded("cpu", k) for k in range(3)]).normal(4, 2)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_other_precisions_are_judged_as_float32(detector, images, kind):
    exact = (images[:2] * 255).round() / 255
    index = torch.zeros(2, dtype=torch.long)
    found, expected = (detector.predict(x, index).score for x in (exact.to(kind), exact))
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=0.2)
