"""Draw the picture that opens the README and the book: `python book/story.py`."""

from pathlib import Path

import torch

import diffad_ref as da

SHOWN = {("gear", "missing", 0): "a tooth is missing", ("capsule", "print", 0): "a wrong letter"}
TITLES = ("what the camera sees", "under noise", "what should be there", "where they differ")


def main() -> Path:
    """Run the shipped detector on two toy products and save what it saw."""
    detector = da.pretrained("diffusion_ad_toy")
    pictures = [da.toy.draw_pair(category, "test", kind, i)[0] for category, kind, i in SHOWN]
    images = torch.stack([torch.from_numpy(p).movedim(-1, 0) / 255 for p in pictures])
    figure = da.plots.panels(detector.predict(images), images, names=None, size=2.2)
    for axis, title in zip(figure.axes, TITLES, strict=False):
        axis.set_title(title, fontsize=12)
    for row, words in enumerate(SHOWN.values()):
        figure.axes[row * len(TITLES)].set_ylabel(words, fontsize=12)
    path = Path(__file__).parent / "images" / "story.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


if __name__ == "__main__":
    print(main())
