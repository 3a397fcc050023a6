"""Photographs as training data: what the tiny One-for-More learns to paint before any task."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from diffad_ref.anomalies import crop_textures, texture_bank


class Photographs(Dataset):
    """Crops of the built-in photographs, in the form of an `AnomalyFolder`.

    A network that learns to paint them knows no product. Every crop is another; equal arguments
    give equal ones.

    Parameters
    ----------
    size : int
        Side of the crops, in pixels.
    count : int
        How many.
    """

    categories = ("photographs",)

    def __init__(self, size: int, count: int = 6000):
        crops = crop_textures(texture_bank(), count, size, torch.Generator().manual_seed(0))
        self.crops = (crops * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> dict:
        crop = self.crops[i].float() / 255
        return {
            "image": crop,
            "mask": torch.zeros_like(crop[:1]),
            "label": 0,
            "category": self.categories[0],
            "category_index": 0,
            "texture": True,
            "kind": "good",
            "path": f"photographs/{i}",
        }
