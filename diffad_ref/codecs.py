"""From images to latents and back: the space in which latent methods work.

The papers' codec is the variational autoencoder of Stable Diffusion; for tiny it is principal
components of patches. Codecs see images in [-1, 1], and no other file does.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from diffad_ref.detector import Count, Levels, Positive, Share, checked, divide
from diffad_ref.diffusion import Draw
from diffad_ref.maps import Prepared
from diffad_ref.networks import load_part


@checked
class CodecConfig:
    """Which codec, and how large; the defaults are Stable Diffusion's autoencoder."""

    kind: Literal["kl", "pca"] = "kl"  # variational autoencoder; principal components of patches
    channels: Count = 4  # of a latent
    factor: Count = 8  # image side over latent side
    # Of the autoencoder.
    pretrained: str = "stabilityai/sd-vae-ft-ema"  # name on the hub, or a local folder
    subfolder: str = ""  # where in it, for the autoencoder of a whole pipeline: "vae"
    widths: Levels = (128, 256, 512, 512)  # channels of each level
    layers: Count = 2  # residual blocks a level
    norm_groups: Count = 32  # of the group normalisation
    scale: Positive = 0.18215  # of its latents, so that their variance is about 1
    # Of the principal components.
    equalise: Share = 0.5  # 0 keeps the variances of the components, 1 makes them all equal

    def __post_init__(self):
        levels, values = len(self.widths), 3 * self.factor**2  # numbers in a patch
        if self.kind == "pca" and self.channels > values:
            raise ValueError(f"a patch of {self.factor} pixels has 1 to {values} components")
        if self.kind == "kl" and self.factor != 2 ** (levels - 1):
            raise ValueError(f"{levels} levels make latents of 1/{2 ** (levels - 1)} of the side")
        divide(self.widths, norm_groups=self.norm_groups)


class Codec(Prepared):
    """What latent methods need of a codec. It is frozen: no gradient reaches its weights.

    Images are (B, 3, H, W) in [0, 1]; latents are (B, C, H/f, W/f) with a variance of about 1. A
    kind of codec says how it learns or loads what it must know (`_learn`), what the `_posterior`
    of images in [-1, 1] is, and how to `decode` latents to images about in [-1, 1], not clamped.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config

    def posterior(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images, stacked: (B, 2C, H/f, W/f)."""
        if not self.is_ready():
            raise ValueError("the codec knows nothing yet: call prepare(dataset), or fit")
        return self._posterior(self._centred(images))

    def encode(self, images: Tensor) -> Tensor:
        """The mean latent (B, C, H/f, W/f) of images: what inference starts from."""
        return self.posterior(images).chunk(2, 1)[0]

    def sample(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A sample (B, C, H/f, W/f) of the posterior: what training sees."""
        return draw_latent(self.posterior(images), generator)

    def _centred(self, images: Tensor) -> Tensor:
        """Images of whole cells, in [-1, 1]."""
        shape, cell = tuple(images.shape), self.config.factor
        if any(side % cell for side in shape[-2:]):
            raise ValueError(f"images {shape} do not divide into cells of {cell} pixels")
        return images * 2 - 1

    def picture(self, decoded: Tensor) -> Tensor:
        """What `decode` gives, as pictures in [0, 1]."""
        return ((decoded + 1) / 2).clamp(0, 1)


def draw_latent(posterior: Tensor, generator: torch.Generator) -> Tensor:
    """A sample (B, C, h, w) of a posterior (B, 2C, h, w)."""
    mean, std = posterior.chunk(2, 1)
    return mean + std * Draw(generator, mean.device).normal(*mean.shape)


def build_codec(config: CodecConfig) -> Codec:
    """The codec of a config, not yet trained or loaded: see `Codec.prepare`."""
    return {"kl": KLCodec, "pca": PatchPCA}[config.kind](config)


class PatchPCA(Codec):
    """Principal components of the f x f patches of normal images: a linear codec.

    Each latent cell holds the first C components of its patch. Components are divided by a power
    of their spread: the first carry nearly all the variance, and noise of equal strength would
    drown the others.
    """

    known_by = "components"

    def __init__(self, config: CodecConfig):
        super().__init__(config)
        values = 3 * config.factor**2  # numbers in a patch
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(config.channels, values))
        self.register_buffer("spread", torch.ones(config.channels))

    def _learn(self, dataset) -> None:
        """The components of all patches of a data set's images (float64, one pass)."""
        count, total, square = 0, 0.0, 0.0
        for batch in DataLoader(dataset, batch_size=64):
            x = self._centred(batch["image"].to(self.mean.device))
            patches = F.pixel_unshuffle(x, self.config.factor)
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

    def _posterior(self, x: Tensor) -> Tensor:
        weights = self.components / self.spread[:, None]
        patches = F.pixel_unshuffle(x, self.config.factor)  # as channels (B, 3f², H/f, W/f)
        z = F.conv2d(patches - self.mean[:, None, None], weights[..., None, None])
        return torch.cat([z, torch.zeros_like(z)], 1)  # nothing is left to chance

    def decode(self, z: Tensor) -> Tensor:
        weights = self.components.T * self.spread
        patches = F.conv2d(z, weights[..., None, None], self.mean)
        return F.pixel_shuffle(patches, self.config.factor)


class KLCodec(Codec):
    """A variational autoencoder as latent diffusion uses it (diffusers' `AutoencoderKL`)."""

    borrowed = True

    def __init__(self, config: CodecConfig):
        from diffusers import AutoencoderKL

        super().__init__(config)
        levels = len(config.widths)
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

    def _learn(self, dataset) -> None:
        """Load the published weights; ValueError if they are not what the config says."""
        name, own = self.config.pretrained, self.vae.config
        loaded = load_part(type(self.vae), name, self.config.subfolder, "autoencoder")
        try:
            for key in ("scaling_factor", "norm_num_groups"):  # the shapes do not show them
                if loaded.config[key] != own[key]:
                    raise RuntimeError(f"its {key} is {loaded.config[key]}")
            self.vae.load_state_dict(loaded.state_dict())
        except RuntimeError as error:  # names are missing, or shapes differ
            raise ValueError(f"{name!r} is another autoencoder than the config: {error}") from error
        self.ready.fill_(True)

    def _posterior(self, x: Tensor) -> Tensor:
        latent = self.vae.encode(x).latent_dist
        return self.config.scale * torch.cat([latent.mean, latent.std], 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.config.scale).sample
