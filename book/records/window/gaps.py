"""How much of a pasted patch reaches the condition of trained detectors.

    python book/records/window/gaps.py toy WEIGHTS [WEIGHTS ...] > book/records/window/gaps.json

Good test images get patches; the squared distance of the condition to the features of the clean
image is a share of what these features vary by, over images and places. For CNN(x), for the
condition, for the condition without the neighbour mask, and for one whose attention hands every
cell the same mean: what is then lost is what attention knows of single places.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import diffad_ref as da
from diffad_ref.diffusion import seeded
from diffad_ref.one_for_more import paste
from diffad_ref.tools import options

DRAWS = 3  # of patches on each image


def same_for_all(module, inputs, output):
    """A forward hook: each token gets the mean of all tokens of its image."""
    return output.mean(1, keepdim=True).expand_as(output)


@torch.no_grad()
def gaps(detector, x: torch.Tensor) -> dict[str, list[float]]:
    """Shares of the features' variance, inside and outside of the patches."""
    network, always = detector.condition, replace(detector.config.pasting, share=1.0)
    truth, ways = network.features(x), {}
    variance, side = truth.var((0, 2, 3)).mean(), truth.shape[-1]
    for draw in range(DRAWS):
        x_tilde = paste(x, always, seeded("cpu", 0, draw))
        changed = ((x_tilde - x).abs().amax(1, keepdim=True) > 1 / 255).float()
        inside = F.adaptive_max_pool2d(changed, side)[:, 0].bool()
        seen = {"CNN": network.features(x_tilde), "AMN": network(x_tilde)}
        mask, network.mask = network.mask, None
        seen["AMN, mask off"] = network(x_tilde)
        network.mask = mask
        hooks = [layer.to_out.register_forward_hook(same_for_all) for layer in network.encoder]
        seen["AMN, attention the same for all"] = network(x_tilde)
        for hook in hooks:
            hook.remove()
        for name, found in seen.items():
            gap = (found - truth).square().mean(1) / variance
            ways.setdefault(name, []).append(
                [gap[inside].mean().item(), gap[~inside].mean().item()]
            )
    return {name: torch.tensor(values).mean(0).tolist() for name, values in ways.items()}


def main(data: str, *weights: str) -> None:
    """Print the gaps of each detector as JSON, with the command."""
    torch.set_num_threads(1)
    rows = []
    for path in weights:
        detector = da.load(path)
        root = options.root_of(data, detector.config.image_size)
        test = detector.folder(root, "test", categories=list(detector.categories))
        x = torch.stack([sample["image"] for sample in test if not sample["label"]])
        spread = detector.condition.features(x).var((0, 2, 3)).mean().item()
        row = {"weights": Path(path).as_posix(), "window": detector.config.window}
        rows.append(row | {"variance": spread, "inside, outside": gaps(detector, x)})
    command = "python book/records/window/gaps.py " + shlex.join([data, *weights])
    print(json.dumps({"command": command, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
