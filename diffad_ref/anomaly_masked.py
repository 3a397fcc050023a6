"""The anomaly-masked network: a condition that learns to overlook defects.

A diffusion model that starts from pure noise must be told which image to rebuild; told too well,
it rebuilds the defect too. Attention may not look at a place's own neighbourhood (A1); the way
past attention stays open, and training on pasted anomalies makes it overlook them (A3). In the
tiny network only the training does: with or without the mask the same is measured (chapter 8).

Li et al.: *One-for-More*, CVPR 2025, arXiv 2502.19848. Formulas A1-A3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def neighbour_mask(height: int, width: int, window: tuple[int, int] = (7, 7)) -> Tensor:
    """What is added to the attention logits of a grid: -inf for near places, 0 for others (A1).

    The result is (height * width, height * width), row by row. An even side of the window (rows,
    columns) acts like the next odd one. Raises ValueError if some place would see nothing at all.
    """
    rows, columns = torch.arange(height), torch.arange(width)
    near_rows = (rows[:, None] - rows).abs() <= window[0] // 2  # (h, h)
    near_columns = (columns[:, None] - columns).abs() <= window[1] // 2
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    near = near.reshape(height * width, height * width)
    if height // 2 <= window[0] // 2 and width // 2 <= window[1] // 2:
        raise ValueError(f"a window of {window} hides the whole grid of {height} x {width} places")
    return torch.zeros(near.shape).masked_fill(near, -math.inf)  # A1


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """Where a token lies, as sines and cosines (height * width, channels); rows come first."""
    half = channels // 2
    k = torch.arange(half)
    wavelength = 10_000 ** (2 * (k // 2) / half)

    def axis(count: int) -> Tensor:
        place = torch.arange(1, count + 1) / (count + 1e-6) * 2 * math.pi
        angle = place[:, None] / wavelength
        return torch.where(k % 2 == 0, angle.sin(), angle.cos())  # (count, half)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


class MaskedEncoderLayer(nn.Module):
    """A masked transformer layer, normalised last; its linear layers can be protected."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, N, C) to tokens; queries and keys know their positions, values do not."""
        placed = x + positions
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
            for part in (self.to_q(placed), self.to_k(placed), self.to_v(x))
        )
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, mask, rate)
        seen = self.to_out(seen.transpose(1, 2).flatten(2))
        x = self.norm1(x + self.dropout(seen))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class AnomalyMaskedNetwork(nn.Module):
    """Condition features (B, width, H/f, W/f) of an image (B, 3, H, W) (A1, A2).

    Convolutions, whose strides multiply to f, lead to a transformer whose attention may not look
    at a window around a place.
    """

    def __init__(
        self,
        width: int = 320,
        layers: int = 8,
        heads: int = 8,
        feed_forward: int = 1025,
        dropout: float = 0.1,
        window: tuple[int, int] | None = (7, 7),
        channels: tuple[int, ...] = (16, 16, 32, 32, 96, 96, 256),
        strides: tuple[int, ...] = (1, 1, 2, 1, 2, 1, 2, 1),
    ):
        super().__init__()
        self.window = window
        widths = (3, *channels, width)
        stack = []
        for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            stack += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.SiLU()]
        self.convolutions = nn.Sequential(*stack[:-1])  # no activation after the last
        self.encoder = nn.ModuleList(
            MaskedEncoderLayer(width, heads, feed_forward, dropout) for _ in range(layers)
        )
        self.grid = (0, 0)
        for name in ("positions", "mask"):
            self.register_buffer(name, None, persistent=False)

    def look_at(self, h: int, w: int) -> None:
        """Make positions (hw, width) and mask (hw, hw) of a grid of tokens."""
        weight = self.encoder[0].to_q.weight
        self.grid, self.positions = (h, w), sine_positions(h, w, weight.shape[0]).to(weight)
        self.mask = None if self.window is None else neighbour_mask(h, w, self.window).to(weight)

    def features(self, image: Tensor) -> Tensor:
        """What the convolutions see, before the transformer: CNN(x) of A3."""
        return self.convolutions(image)

    def forward(self, image: Tensor) -> Tensor:
        """The condition f = AMN(x) (A2)."""
        features = self.features(image)
        h, w = features.shape[-2:]
        tokens = features.flatten(2).transpose(1, 2)  # (B, hw, C)
        if self.grid != (h, w):
            self.look_at(h, w)
        for layer in self.encoder:
            tokens = layer(tokens, self.positions, self.mask)
        return tokens.transpose(1, 2).unflatten(2, (h, w))


def anomaly_masked_loss(condition: Tensor, clean_features: Tensor) -> Tensor:
    """How far condition and clean features (B, C, h, w) lie apart; neither is detached.

    Alone it makes all features constant; the noise term of O1 needs them to differ.
    """
    return F.mse_loss(condition, clean_features)  # A3
