"""The released codes' AUPRO: what it refuses. Its numbers are compared in the golden tests."""

import numpy as np
import pytest

from diffad_ref.protocols import (
    aupro_deco_diff,
    aupro_diffusion_ad,
    pro_curve_deco_diff,
    pro_curve_diffusion_ad,
)

MAPS = np.linspace(0, 1, 32).reshape(2, 4, 4)
MASKS = (MAPS > 0.9).astype(np.uint8)
PROTOCOLS = [aupro_deco_diff, aupro_diffusion_ad, pro_curve_deco_diff, pro_curve_diffusion_ad]
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
