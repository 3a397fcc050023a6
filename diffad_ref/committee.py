"""A committee: several detectors judge the same images, and their maps are averaged.

What a network takes in at a glance is a matter of size. In a large image it sees a thin scratch and
little of what lies around it; in a small one a wide region together with its surroundings, and no
scratch. So one detector is trained for each size, and each is asked at its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from diffad_ref.detector import Detector, Prediction
from diffad_ref.maps import enlarge


class Committee(nn.Module):
    """Detectors of one method that judge together, at the size of the largest of them.

    Parameters
    ----------
    members : sequence of Detector
        Their maps must be on one scale: the same method with the same settings of its scoring.

    Raises
    ------
    ValueError
        No members; members of different methods, or that know different categories.
    """

    def __init__(self, members: Sequence[Detector]):
        super().__init__()
        if not members:
            raise ValueError("a committee needs members")
        for what, found in (
            ("methods", {type(m).__name__ for m in members}),
            ("categories", {tuple(m.categories) for m in members}),
        ):
            if len(found) > 1:
                raise ValueError(f"members of a committee have different {what}: {sorted(found)}")
        self.members = nn.ModuleList(members)
        self.categories = self.largest.categories

    @property
    def largest(self) -> Detector:
        """The member with the largest images."""
        return max(self.members, key=lambda member: member.config.image_size)

    @property
    def config(self):
        """Of the largest member."""
        return self.largest.config

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.largest.device

    @property
    def view(self) -> dict:
        """Arguments for `AnomalyFolder`: the images as the largest member wants them."""
        return self.largest.view

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        category_index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Judge images (B, 3, H, W) in [0, 1] of the largest member's size.

        Maps and scores are means; the reconstruction is the largest member's.
        """
        largest = self.largest
        largest.check(images)
        images, size = images.to(self.device), images.shape[-1]
        found = {}
        for member in self.members:
            own = member.config.image_size
            x = images if own == size else resize(images, [own, own], antialias=True)
            found[member] = member.predict(x, category_index, generator)
        maps = [enlarge(one.anomaly_map, size) for one in found.values()]
        maps = torch.stack(maps, 1)  # (B, members, H, W)
        return Prediction(
            anomaly_map=maps.mean(1),
            score=torch.stack([one.score for one in found.values()]).mean(0),
            reconstruction=found[largest].reconstruction,
            parts={"maps": maps},
        )
