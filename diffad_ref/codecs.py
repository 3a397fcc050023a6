"""From images to latents and back: the space in which latent methods work.

A latent is a small image with a few channels that keeps what matters of a large one. The paper's
codec is the variational autoencoder of Stable Diffusion. Where it is too large, the principal
components of 4 x 4 patches stand in for it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad_ref.light import adapted, unadapted


@dataclass(frozen=True)
class CodecConfig:
    """Which codec, and how large; the defaults are Stable Diffusion's autoencoder."""

    kind: str = "kl"  # "kl": a variational autoencoder; "pca": principal components of patches
    channels: int = 4  # of a latent
    factor: int = 8  # image side over latent side
    adapted: bool = False  # see images as an eye that has adapted to their brightness
    # Of the autoencoder.
    pretrained: str = "stabilityai/sd-vae-ft-ema"  # name on the hub, or a local folder
    subfolder: str = ""  # where in it, for the autoencoder of a whole pipeline: "vae"
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level
    layers: int = 2  # residual blocks a level
    norm_groups: int = 32  # of the group normalisation
    scale: float = 0.18215  # of its latents, so that their variance is about 1
    # Of the principal components.
    equalise: float = 0.5  # 0 keeps the variances of the components, 1 makes them all equal


class Codec(nn.Module, ABC):
    """What latent methods need of a codec. It is frozen: no gradient reaches its weights.

    Images are (B, 3, H, W) in [-1, 1] here, as autoencoders have them; latents are
    (B, C, H/f, W/f) with a variance of about 1.
    """

    config: CodecConfig

    def seen(self, x: Tensor) -> Tensor:
        """What the codec sees of images, and rebuilds: themselves, or the adapted eye's view."""
        return adapted((x + 1) / 2) * 2 - 1 if self.config.adapted else x

    @abstractmethod
    def posterior(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images, stacked: (B, 2C, H/f, W/f)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images of latents (B, C, h, w) as in `seen`, about in [-1, 1]: not clamped."""

    @abstractmethod
    def prepare(self, dataset) -> None:
        """Learn or load what the codec needs to know before it is used, if it does not yet."""

    def picture(self, decoded: Tensor, images: Tensor | None = None) -> Tensor:
        """What was decoded, as pictures in [0, 1] in the light of the images, if they are given."""
        seen = ((decoded + 1) / 2).clamp(0, 1)
        return seen if images is None or not self.config.adapted else unadapted(seen, images)

    def encode(self, x: Tensor) -> Tensor:
        """The mean latent (B, C, H/f, W/f) of images: what inference starts from."""
        return self.posterior(x).chunk(2, 1)[0]

    def check(self, size: int) -> None:
        """Refuse an image side that does not divide into latent cells."""
        if size % self.config.factor:
            raise ValueError(
                f"an image of {size} pixels does not divide into latent cells of "
                f"{self.config.factor} pixels"
            )


def draw_latent(posterior: Tensor, generator: torch.Generator) -> Tensor:
    """A sample (B, C, h, w) of a posterior (B, 2C, h, w): what training sees."""
    mean, std = posterior.chunk(2, 1)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + std * noise.to(mean.device)


def build_codec(config: CodecConfig) -> Codec:
    """The codec of a config, not yet trained or loaded: see `Codec.prepare`."""
    kinds = {"kl": KLCodec, "pca": PatchPCA}
    if config.kind not in kinds:
        raise ValueError(f"unknown codec {config.kind!r}; there are {', '.join(kinds)}")
    return kinds[config.kind](config)


class PatchPCA(Codec):
    """Principal components of the f x f patches of normal images: a linear codec.

    Each latent cell holds the first C components of its patch. Components are divided by a power
    of their spread: the first carry nearly all the variance, and noise of equal strength would
    drown the others.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        values = 3 * config.factor**2  # numbers in a patch
        if not 1 <= config.channels <= values:
            raise ValueError(f"a patch of {config.factor} pixels has 1 to {values} components")
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(config.channels, values))
        self.register_buffer("spread", torch.ones(config.channels))

    @torch.no_grad()
    def prepare(self, dataset) -> None:
        """Learn the components from all patches of a data set's images (float64, one pass)."""
        if self.components.any():
            return
        count, total, square = 0, 0.0, 0.0
        for batch in DataLoader(dataset, batch_size=64):
            patches = self._cut(batch["image"].to(self.mean.device) * 2 - 1)
            patches = patches.transpose(0, 1).flatten(1).double()  # (3f², patches)
            count += patches.shape[1]
            total = total + patches.sum(1)
            square = square + patches @ patches.T
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean.outer(mean))
        values = values.flip(0)[: self.config.channels].clamp(min=1e-8)
        vectors = vectors.flip(1)[:, : self.config.channels].T
        vectors[vectors.sum(1) < 0] *= -1  # a sign is arbitrary: fix it
        spread = values ** (self.config.equalise / 2)
        self.mean.copy_(mean)
        self.components.copy_(vectors)
        self.spread.copy_(spread * (values / spread**2).mean().sqrt())  # latents of variance 1

    def posterior(self, x: Tensor) -> Tensor:
        self._check_ready()
        weights = self.components / self.spread[:, None]
        z = F.conv2d(self._cut(x) - self.mean[:, None, None], weights[..., None, None])
        return torch.cat([z, torch.zeros_like(z)], 1)  # nothing is left to chance

    def decode(self, z: Tensor) -> Tensor:
        self._check_ready()
        weights = self.components.T * self.spread
        patches = F.conv2d(z, weights[..., None, None], self.mean)
        return F.pixel_shuffle(patches, self.config.factor)

    def _cut(self, x: Tensor) -> Tensor:
        """Patches as channels: (B, 3f², H/f, W/f)."""
        for side in x.shape[-2:]:
            self.check(side)
        return F.pixel_unshuffle(self.seen(x), self.config.factor)

    def _check_ready(self) -> None:
        if not self.components.any():
            raise ValueError("the codec has learned no components yet: call prepare(dataset)")


class KLCodec(Codec):
    """A variational autoencoder as latent diffusion uses it (diffusers' `AutoencoderKL`)."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        levels = len(config.widths)
        if config.factor != 2 ** (levels - 1):
            raise ValueError(f"{levels} levels make latents of 1/{2 ** (levels - 1)} of the side")
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            latent_channels=config.channels,
            norm_num_groups=config.norm_groups,
            scaling_factor=config.scale,
        )
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, subfolder: str = "") -> KLCodec:
        """Load an autoencoder of any size by its name on the hub, or from a local folder.

        Parameters
        ----------
        subfolder : str
            Where in it, for the autoencoder of a whole pipeline.

        Raises
        ------
        FileNotFoundError
            A folder that lacks `config.json` or the weights, or a name that cannot be reached.
        ValueError
            Some weights are missing, or the autoencoder is built in another way.
        """
        if Path(name).is_dir() or Path(name).is_absolute():
            folder = Path(name) / subfolder
            weights = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            if "config.json" not in found or not set(weights) & set(found):
                raise FileNotFoundError(
                    f"{folder} is no autoencoder: config.json and {weights[0]} belong in it, "
                    f"found {found}"
                )
        try:
            vae = AutoencoderKL.from_pretrained(str(name), subfolder=subfolder or None)
        except OSError as error:
            raise FileNotFoundError(f"no autoencoder {str(name)!r}: {error}") from error
        settings = vae.config
        codec = cls(
            CodecConfig(
                channels=settings.latent_channels,
                factor=2 ** (len(settings.block_out_channels) - 1),
                pretrained=str(name),
                subfolder=subfolder,
                widths=tuple(settings.block_out_channels),
                layers=settings.layers_per_block,
                norm_groups=settings.norm_num_groups,
                scale=settings.scaling_factor,
            )
        )
        try:
            codec.vae.load_state_dict(vae.state_dict())
        except RuntimeError as error:  # weights are missing, or it is built in another way
            raise ValueError(f"{str(name)!r} is no autoencoder of this kind: {error}") from error
        codec.ready.fill_(True)
        return codec

    def prepare(self, dataset) -> None:
        """Load the published weights; the data set plays no part."""
        if self.ready:
            return
        loaded = KLCodec.from_pretrained(self.config.pretrained, self.config.subfolder)
        same = {"pretrained": "", "adapted": False}  # of these it knows nothing
        if replace(loaded.config, **same) != replace(self.config, **same):
            raise ValueError(
                f"the autoencoder {self.config.pretrained!r} is another than the config says: "
                f"{loaded.config}, not {self.config}"
            )
        self.load_state_dict(loaded.state_dict())

    def posterior(self, x: Tensor) -> Tensor:
        self._check_ready()
        latent = self.vae.encode(self.seen(x)).latent_dist
        return self.config.scale * torch.cat([latent.mean, latent.std], 1)

    def decode(self, z: Tensor) -> Tensor:
        self._check_ready()
        return self.vae.decode(z / self.config.scale).sample

    def _check_ready(self) -> None:
        if not self.ready.is_meta and not self.ready:
            raise ValueError(
                "the autoencoder has no weights yet: call prepare(dataset), or "
                "KLCodec.from_pretrained(name or folder)"
            )


def psnr(x: Tensor, x_hat: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all pixels of the batch."""
    return -10 * ((x - x_hat).square().mean() / 4).log10().item()


@torch.no_grad()
def rebuild(codec: Codec, dataset, batch_size: int = 32, progress: bool = True) -> float:
    """PSNR in dB of what the codec rebuilds of what it sees, clamped, over a data set."""
    errors, device = [], next(codec.buffers()).device
    for batch in tqdm(DataLoader(dataset, batch_size), "rebuild", disable=not progress):
        x = batch["image"].to(device) * 2 - 1
        error = codec.seen(x) - codec.decode(codec.encode(x)).clamp(-1, 1)
        errors.append(error.square().mean((1, 2, 3)))
    return -10 * (torch.cat(errors).mean() / 4).log10().item()
