"""Latents computed once, any autoencoder as a codec, and what a codec loses.

The codec of the papers costs more than the network that is trained on its latents, and it gives
the same answer in every epoch. So latents are computed once and kept in one file, with a
fingerprint of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffad_ref.checkpoints import read_metadata, read_tensors, write_tensors
from diffad_ref.codecs import Codec, CodecConfig
from diffad_ref.data import AnomalyFolder
from diffad_ref.networks import load_part
from diffad_ref.training import processes


class CachedLatents(Dataset):
    """The samples of a data set with the posteriors of their latents instead of their images.

    Parameters
    ----------
    dataset : AnomalyFolder
        Its images have the size that the detector was built for: a cache cannot be cropped anew.
    codec : Codec
        Ready for use. Its own device does the work.
    path : path
        File that keeps them (.safetensors); written if it is not there.
    batch_size : int
    progress : bool
        Show a bar while they are computed.

    Raises
    ------
    ValueError
        The file was made with other codec weights, another image size or other images. It says
        which; delete the file to compute it anew.
    """

    raw = False  # they have no pictures; but `Feed` may hold them all

    def __init__(
        self,
        dataset: AnomalyFolder,
        codec: Codec,
        path: str | os.PathLike,
        batch_size: int = 32,
        progress: bool = True,
    ):
        self.dataset, self.path, self.codec = dataset, Path(path), codec
        self.categories = dataset.categories
        self._wanted = wanted = fingerprint(dataset, codec)
        if self.path.exists():
            found = read_metadata(self.path)
            stale = [name for name in wanted if found.get(name) != wanted[name]]
            if stale:
                raise ValueError(
                    f"{self.path} holds latents of other {' and '.join(stale)}; "
                    "delete it to compute them anew"
                )
        elif processes()[1] == 0:
            posteriors = _posteriors(dataset, codec, batch_size, progress)
            write_tensors({"posterior": posteriors.contiguous()}, self.path, wanted)
        if processes()[0] > 1:
            torch.distributed.barrier()  # one of them has computed
        self.posteriors = read_tensors(self.path).get("posterior")
        if self.posteriors is None or len(self.posteriors) != len(dataset):
            raise ValueError(f"{self.path} holds no latents of {len(dataset)} images; delete it")

    def __len__(self) -> int:
        return len(self.posteriors)

    def fingerprint(self) -> dict[str, str]:
        """What tells these latents from others."""
        return self._wanted

    def __getitem__(self, i: int) -> dict:
        record = self.dataset.samples[i]
        return {
            "posterior": self.posteriors[i],
            "label": record.label,
            "category": record.category,
            "category_index": self.categories.index(record.category),
            "path": str(record.path),
        }


def fingerprint(dataset: AnomalyFolder, codec: Codec) -> dict[str, str]:
    """What latents depend on: the codec's weights and the images, as short hashes."""
    weights, images = hashlib.sha256(repr(codec.config).encode()), hashlib.sha256()
    for name, value in sorted(codec.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for record in dataset.samples:
        images.update(str(record.path.relative_to(dataset.root)).encode())
        images.update(record.path.read_bytes())
    return {
        "codec weights": weights.hexdigest()[:16],
        "images": images.hexdigest()[:16],
        "image size": f"{dataset.image_size}, {dataset.resample}, cropped to {dataset.crop}",
    }


@torch.no_grad()
def _posteriors(dataset, codec: Codec, batch_size: int, progress: bool) -> torch.Tensor:
    """Posteriors (N, 2C, h, w) of all images, on the CPU."""
    device = next(codec.buffers()).device
    batches = DataLoader(dataset, batch_size)
    return torch.cat(
        [
            codec.posterior(batch["image"].to(device)).cpu()
            for batch in tqdm(batches, "latents", disable=not progress)
        ]
    )


def codec_config_of(source: str | os.PathLike, subfolder: str = "") -> CodecConfig:
    """The config of any autoencoder, by its name on the hub or from a local folder."""
    from diffusers import AutoencoderKL

    vae = load_part(AutoencoderKL, source, subfolder, "autoencoder").config
    return CodecConfig(
        channels=vae.latent_channels,
        factor=2 ** (len(vae.block_out_channels) - 1),
        pretrained=str(source),
        subfolder=subfolder,
        widths=tuple(vae.block_out_channels),
        layers=vae.layers_per_block,
        norm_groups=vae.norm_num_groups,
        scale=vae.scaling_factor,
    )


@torch.no_grad()
def rebuild(codec: Codec, dataset, batch_size: int = 32, progress: bool = True) -> float:
    """PSNR in dB of what the codec rebuilds, over all pixels of a data set."""
    errors, device = [], next(codec.buffers()).device
    for batch in tqdm(DataLoader(dataset, batch_size), "rebuild", disable=not progress):
        x = batch["image"].to(device)
        error = x - codec.picture(codec.decode(codec.encode(x)))
        errors.append(error.square().mean((1, 2, 3)))
    return -10 * torch.cat(errors).mean().log10().item()
