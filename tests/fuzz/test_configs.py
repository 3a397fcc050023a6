"""Random settings: one clear refusal, or a detector that trains a step and predicts."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from damage import places
from hypothesis import given, settings, target
from hypothesis import strategies as st

import diffad_ref as da
from diffad_ref.checkpoints import config_of
from diffad_ref.evaluation import judged

pytestmark = pytest.mark.fuzz
METHODS = {kind.__name__: kind for kind in (da.DiffusionAD, da.DecoDiff, da.OneForMore)}

# What would take minutes or gigabytes if it were large, and is right to be accepted.
MOST = {"image_size": 64, "resize": 96, "width": 64, "multipliers": 4, "blocks": 2, "classes": 64}
MOST |= {"segmentation_width": 32, "patch_size": 64, "draws": 3, "context": 64, "channels": 64}
MOST |= {"factor": 16, "widths": 512, "layers": 2, "prompt": 64, "condition_layers": 3}
MOST |= {"feed_forward": 64, "condition_channels": 64, "steps": 2000, "walk": 20}
MOST |= {"batch_size": 4, "accumulate": 2, "most": 8}
FIXED = {"start", "kind"}  # others ask the network
WORDS = "linear cosine scaled_linear bicubic antialiased constant cycle adam adamw batch group"
WORDS += " noise image latent grid strips class itself whole estimate geometric arithmetic patches"
NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, 1.5, 1e-30, 1e30, 1e308]
NUMBERS += [math.nan, math.inf, -math.inf]
OTHERS = ["", "x", "\n", None, True, False, [], {}, [1], [0, 0], [1, 2, 3], [2.5], [[]], {"x": 1}]


def plain_tiny(name: str) -> dict:
    """The tiny config as JSON knows it; its batches are smaller, for the time they take."""
    start = {"start": None} if name == "OneForMore" else {}
    plain = json.loads(json.dumps(asdict(METHODS[name].Config.tiny(**start))))
    for stage in plain["stages"]:
        stage["batch_size"] = 2
    return plain


def near(value, most: int):
    """What may well be accepted in place of a value."""
    if isinstance(value, bool) or value is None:
        return st.booleans() | st.integers(0, 8)
    if isinstance(value, int):
        close = st.sampled_from([value // 2, value - 1, value + 1, 2 * value])
        return (close | st.integers(0, 100)).map(lambda n: min(n, most))
    if isinstance(value, float):
        return st.floats(0, 1) | st.sampled_from([value / 2, 2 * value, 10 * value, 1e30])
    if isinstance(value, str):
        return st.sampled_from(WORDS.split())
    if isinstance(value, list):
        inner = near(value[0], most) if value else st.integers(0, 8)
        kept = st.sampled_from([value[1:], value[:-1], value[::-1], value + value[-1:]])
        return kept | st.lists(inner, min_size=len(value), max_size=len(value)) | st.just([])
    return st.just({name: value[name] for name in list(value)[1:]})


def values(name: str, value):
    """Half of the time what may be accepted, else anything that JSON knows."""
    most = MOST.get(name, 10**30)
    numbers = [n for n in NUMBERS if not isinstance(n, int) or n <= most]
    anything = st.sampled_from([*numbers, *OTHERS])
    return near(value, most) | anything


@st.composite
def configs(draw):
    """A method, and the settings of its tiny config with one to three others among them."""
    name = draw(st.sampled_from(sorted(METHODS)))
    plain = plain_tiny(name)
    for _ in range(draw(st.integers(1, 3))):
        all_but_fixed = [place for place in places(plain) if place[2] not in FIXED]
        holder, key, inner = draw(st.sampled_from(all_but_fixed))
        holder[key] = draw(values(inner, holder[key]))
    return name, plain


def two_images(detector) -> list[dict]:
    """A data set in memory, of an object and a texture."""
    size = detector.view("train")["image_size"]
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, size, size, generator=generator),
            "texture": texture,
            "category_index": 0,
            "category": "images",
        }
        for texture in (False, True)
    ]


def use(name: str, plain: dict) -> None:
    """Build it, train it a step in each stage, predict; an error if any is refused."""
    detector = METHODS[name](config_of(METHODS[name].Config, plain))
    data = two_images(detector)
    steps = len(detector.stages)
    da.fit(detector, data, steps, progress=False)
    size = detector.config.image_size
    data = [sample | {"image": sample["image"][:, :size, :size]} for sample in data]
    classes = torch.zeros(2, dtype=torch.long)
    for _, found, _ in judged(detector, data, index_of=lambda _: classes, progress=False):
        assert found.score.isfinite().all() and found.anomaly_map.isfinite().all()
        assert found.reconstruction.shape == (2, 3, size, size)


@settings.get_profile("fuzz")
@given(configs())
def test_any_settings_are_refused_in_one_line_or_train_and_predict(given):
    name, plain = given
    try:
        use(name, plain)
        target(1.0)  # more of those that are accepted: what is wrong in them shows late
    except (ValueError, FileNotFoundError) as error:  # the latter of weights from elsewhere
        assert str(error) and "\n" not in str(error)
        target(0.0)
