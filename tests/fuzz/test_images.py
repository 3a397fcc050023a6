"""Damaged and odd images: 8-bit RGB, a mask of 0 and 1, or a refusal that names the file."""

import io
import subprocess

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffad_ref.data import SUFFIXES, read_image, read_mask

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]  # of Pillow, about damage
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "EPS", "PDF", "PPM", "ICO", "TGA")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")


@st.composite
def pictures(draw) -> bytes:
    """A picture in a mode and a format, which need not be one that is read; or any bytes."""
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    mode = draw(st.sampled_from(MODES))
    image = Image.fromarray(pixels).convert(
        "I" if mode == "I;16" else "L" if mode == "PA" else mode
    )
    try:
        image.convert(mode).save(file := io.BytesIO(), draw(st.sampled_from(FORMATS)))
    except (OSError, ValueError):  # no such mode in this format
        return draw(st.binary(max_size=100))
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which nothing may start a program."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(autouse=True)
def _no_program(monkeypatch):
    def start(*words, **_):
        raise AssertionError(f"a program was started: {words}")

    monkeypatch.setattr(subprocess, "Popen", start)


@settings.get_profile("fuzz")
@given(st.data(), st.sampled_from(sorted(SUFFIXES)))
def test_any_bytes_are_an_image_and_a_mask_or_refused_by_name(folder, data, suffix):
    path = folder / f"image{suffix}"
    path.write_bytes(data.draw(damaged(data.draw(pictures()))))
    try:
        image = read_image(path)
        assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8
        mask = read_mask(path)
        assert mask.shape == image.size[::-1] and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
