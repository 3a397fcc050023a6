"""The released codes' AUPRO: what it refuses. Its numbers are compared in the golden tests."""

import numpy as np
import pytest

from diffad_ref.diffusion_ad import top_k_mean
from diffad_ref.metrics import image_metrics, pixel_metrics
from diffad_ref.tools.protocols import PROTOCOLS as NAMED
from diffad_ref.tools.protocols import (
    aupro_deco_diff,
    aupro_diffusion_ad,
    metrics_one_for_more,
    pro_curve_deco_diff,
    pro_curve_diffusion_ad,
)

MAPS = np.linspace(0, 1, 32).reshape(2, 4, 4)
MASKS = (MAPS > 0.9).astype(np.uint8)
PROTOCOLS = [aupro_deco_diff, aupro_diffusion_ad, pro_curve_deco_diff, pro_curve_diffusion_ad]
SCORES = np.zeros(8)  # of a detector: the protocols score maps themselves
EVEN = "needs defective and normal pixels and finite maps that vary"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("maps", "masks", "words"),
    [
        (MAPS, 0 * MASKS, EVEN),
        (MAPS, 0 * MASKS + 1, EVEN),
        (0 * MAPS, MASKS, EVEN),
        (np.where(MAPS == 1, np.nan, MAPS), MASKS, "finite|NaN"),
        (np.where(MAPS == 1, np.inf, MAPS), MASKS, "finite|NaN"),
        (MAPS[:, :3], MASKS, r"\(2, 3, 4\).* \(2, 4, 4\)"),
    ],
    ids=["no defect", "no normal pixel", "no contrast", "NaN", "infinite", "other size"],
)
def test_maps_and_masks_that_give_no_curve_are_refused(protocol, maps, masks, words):
    with pytest.raises(ValueError, match=words):
        protocol(maps, masks)


@pytest.mark.parametrize("protocol", [aupro_deco_diff, pro_curve_deco_diff])
def test_soft_masks_are_refused_where_they_are_not_truncated(protocol):
    with pytest.raises(ValueError, match="masks"):
        protocol(MAPS, 0.5 * MASKS)


@pytest.mark.parametrize("protocol", [aupro_diffusion_ad, pro_curve_diffusion_ad])
def test_masks_that_are_truncated_to_nothing_are_refused(protocol):
    """A defect that is nowhere wholly covered does not exist for this protocol."""
    with pytest.raises(ValueError, match=EVEN):
        protocol(MAPS, 0.999 * MASKS)


def detector_maps(seed=0):
    """Maps (8, 64, 64) in which the first four images have a bright square."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((8, 64, 64), bool)
    masks[:4, 20:30, 20:40] = True
    return rng.random(masks.shape) + 0.4 * masks, masks


def test_each_named_protocol_takes_the_image_score_and_the_aupro_of_its_code():
    maps, masks = detector_maps()
    labels = masks.any((1, 2))
    ad, deco = NAMED["diffusion_ad"], NAMED["deco_diff"]
    assert ad.image_metrics(maps, SCORES, labels) == image_metrics(top_k_mean(maps), labels)
    assert deco.image_metrics(maps, SCORES, labels) == image_metrics(maps.max((1, 2)), labels)
    exact = pixel_metrics(maps, masks)
    assert ad.pixel_metrics(maps, masks) == exact | {"aupro": aupro_diffusion_ad(maps, masks)}
    assert deco.pixel_metrics(maps, masks) == exact | {"aupro": aupro_deco_diff(maps, masks)}


def test_protocol_of_one_for_more_equals_its_released_metrics():
    maps, masks = detector_maps()
    released = metrics_one_for_more(-maps, masks)
    found = NAMED["one_for_more"].image_metrics(-maps, SCORES, masks.any((1, 2)))
    found |= NAMED["one_for_more"].pixel_metrics(-maps, masks)
    names = {"image_auroc": "max", "image_ap": "apsp", "image_f1max": "f1sp"}
    names |= {"pixel_auroc": "pixel", "pixel_ap": "appx", "pixel_f1max": "f1px", "aupro": "pro"}
    assert found == {ours: released[theirs] for ours, theirs in names.items()}
    assert found["pixel_auroc"] > 0.5 > pixel_metrics(-maps, masks)["pixel_auroc"]
