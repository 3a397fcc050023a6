"""Import of DeCo-Diff checkpoints and of ImageNet weights in the formats of their authors.

A checkpoint is {model, ema, opt, args, ...} by `torch.save`. The network is the recorded one of
`tests/golden`; everything else is written here.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import OWN, arrays, close, settings, weights

from diffad_ref.codecs import CodecConfig
from diffad_ref.deco_diff import Config, Corruption, DecoDiff
from diffad_ref.tools.official_deco_diff import (
    LDM_UNET,
    MVTEC,
    TABLE,
    VISA,
    import_deco_diff,
    start_from_imagenet,
)

UNET = "deco_2e_unet_b"


@pytest.fixture(scope="module")
def network():
    """The recorded state dict, as it lies in a checkpoint."""
    return weights(UNET, OWN)


@pytest.fixture(scope="module")
def config():
    """Settings of the recorded network, on images of 32 pixels."""
    given = settings(UNET, OWN)
    return Config.paper(
        image_size=32,
        corruption=Corruption.of_side(8),
        codec=CodecConfig("pca", channels=4, factor=4),
        width=given["model_channels"],
        multipliers=tuple(given["channel_mult"]),
        blocks=given["num_res_blocks"],
        heads=given["num_heads"],
        context=given["context_dim"],
        classes=given["ncls"],
    )


@pytest.fixture
def write(tmp_path):
    """Saves an object the way that the authors' code does; returns the path."""

    def save(content):
        torch.save(content, tmp_path / "last.pt")
        return tmp_path / "last.pt"

    return save


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def published(size):
    """A state dict with the shapes of a published size, made of a single number."""
    recorded = json.loads((OWN / "deco_names_official.json").read_text())["UNet_L"]
    shrink, zero = {"L": 1, "XS": 4}[size], torch.zeros(())  # not latents, kernels, classes
    return {
        k: zero.expand([n // shrink if n >= 64 else n for n in shape])
        for k, shape in recorded.items()
    }


# ----------------------------------------------------------------------------------- what comes out


def test_imported_network_computes_the_recorded_numbers(network, config, write):
    detector = import_deco_diff(write({"model": network}), config)
    recorded = {k: torch.from_numpy(v) for k, v in arrays(f"{UNET}_io", OWN).items()}
    with torch.no_grad():
        classes = recorded["context"][:, 0].long()
        close(detector.corrector(recorded["x"], recorded["t"], classes), recorded["output"], 5e-5)
    assert torch.equal(detector.corrector.embedding.weight, network[TABLE])
    assert not detector.training and detector.config == config


def test_objects_beside_the_network_do_not_matter_and_code_does_not_run(
    network, config, write, tmp_path
):
    beside = {
        "args": argparse.Namespace(lr=1e-4, data=Path("mvtec")),
        "opt": {"state": {0: {"step": 7, "m": np.float64(0.5)}}},
        "curve": np.arange(3.0),
        "function": os.getcwd,
        "ema": {"input_blocks.0.0.weight": torch.ones(1)},
        "code": Call(os.mkdir, str(tmp_path / "ran")),
    }
    detector = import_deco_diff(write({**beside, "model": network}), config)
    found = detector.corrector.unet.conv_in.weight
    assert torch.equal(found, network["input_blocks.0.0.weight"])
    assert not (tmp_path / "ran").exists()


def test_classes_have_the_places_of_the_published_tables():
    """They were given with the recorded numbers; neither order is alphabetical."""
    mvtec = "capsule bottle grid leather metal_nut tile transistor zipper cable carpet hazelnut"
    visa = "candle cashew fryum macaroni2 pcb2 pcb4 capsules chewinggum macaroni1 pcb1 pcb3"
    assert MVTEC == (*mvtec.split(), "pill", "screw", "toothbrush", "wood") and len(MVTEC) == 15
    assert VISA == (*visa.split(), "pipe_fryum") and len(VISA) == 12


@pytest.mark.parametrize(("classes", "names"), [(15, MVTEC), (12, VISA), (7, ())])
def test_number_of_classes_tells_which_data_set_they_are_of(network, config, write, classes, names):
    state = {**network, TABLE: torch.rand(classes, config.context)}
    detector = import_deco_diff(write({"model": state}), replace(config, classes=classes))
    assert detector.categories == names


@pytest.mark.filterwarnings("ignore:.*which is a no-op:UserWarning")
@pytest.mark.parametrize("size", ["XS", "L"])
def test_sizes_are_read_from_the_weights_and_the_rest_is_the_papers(write, size):
    path = write({"model": published(size)})
    with torch.device("meta"):  # shapes only
        detector = import_deco_diff(path)
    assert detector.config == Config.paper(size) and detector.categories == MVTEC


def test_imported_detector_judges_images_once_its_codec_is_ready(network, config, write):
    detector = import_deco_diff(write({"model": network}), config)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="knows nothing yet"):
        detector.predict(images, torch.zeros(8, dtype=torch.long))
    detector.codec.prepare([{"image": image} for image in images])
    found = detector.predict(images, torch.arange(8))
    assert found.anomaly_map.shape == (8, 32, 32) and found.score.isfinite().all()


# ------------------------------------------------------------------------------------------ refused


def test_checkpoint_without_a_model_says_what_it_holds(network, config, write):
    with pytest.raises(ValueError, match=r"last\.pt has no weights under 'model'; it holds \['ema"):
        import_deco_diff(write({"ema": network, "epoch": 3}), config)


@pytest.mark.parametrize("name", ["module.out.2.bias", "decoder.conv_in.weight", "extra"])
def test_names_that_no_such_network_has_are_named(network, config, write, name):
    state = {**network, name: torch.ones(4)}
    with pytest.raises(ValueError, match=rf"last\.pt (holds no|.* do not fit).*{name}"):
        import_deco_diff(write({"model": state}), config)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint_is_named(network, config, write, share):
    path = write({"model": network})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        import_deco_diff(path, config)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*nothing.pt"):
        import_deco_diff(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    "lost",
    [
        TABLE,
        "input_blocks.0.0.weight",
        "input_blocks.2.0.op.bias",
        "output_blocks.1.2.conv.bias",
        "middle_block.1.norm.weight",
        "out.2.bias",
        "time_embed.0.weight",
    ],
)
def test_lost_weight_is_a_clear_error(network, config, write, lost):
    state = {name: value for name, value in network.items() if name != lost}
    with pytest.raises(ValueError, match=r"last\.pt (holds no network|do not fit: 1 missing)"):
        import_deco_diff(write({"model": state}), config)


@pytest.mark.parametrize(
    "lost",
    [
        TABLE,
        "input_blocks.0.0.weight",
        "input_blocks.1.0.out_layers.3.bias",
        "input_blocks.3.0.op.bias",
    ],
)
def test_lost_weight_that_tells_a_size_is_a_clear_error(write, lost):
    state = {name: value for name, value in published("XS").items() if name != lost}
    with pytest.raises(ValueError, match=r"last\.pt (holds no network|do not fit)"):
        with torch.device("meta"):
            import_deco_diff(write({"model": state}))


def test_width_that_was_never_published_asks_for_a_config(network, write):
    with pytest.raises(ValueError, match="width 32 with tokens of 24 is no published size"):
        import_deco_diff(write({"model": network}))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 64},
        {"multipliers": (1, 1)},
        {"context": 8},
        {"classes": 15},
        {"codec": CodecConfig("pca", channels=3, factor=4)},
        {"blocks": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_of_another_network_is_refused(network, config, write, change):
    with pytest.raises(ValueError, match=r"last\.pt do not fit"):
        import_deco_diff(write({"model": network}), replace(config, **change))


# ----------------------------------------------------------------------------------------- ImageNet


@pytest.fixture(scope="module")
def imagenet(network):
    """A latent-diffusion model: the U-Net under its prefix, a larger table, other parts."""
    unet = {LDM_UNET + name: value for name, value in network.items() if name != TABLE}
    return {**unet, TABLE: torch.ones(1001, 24), "first_stage_model.conv.weight": torch.ones(2)}


def started(config, path, **changes):
    """A new detector, what it was before, and what start_from_imagenet says."""
    torch.manual_seed(0)
    detector = DecoDiff(replace(config, **changes))
    before = {name: value.clone() for name, value in detector.corrector.state_dict().items()}
    return detector.corrector.state_dict(), before, start_from_imagenet(detector, path)


@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
def test_imagenet_weights_are_taken_over_exactly_and_the_table_is_the_first_rows_of_theirs(
    network, config, imagenet, write, wrapped
):
    content = {"state_dict": imagenet, "callbacks": {"path": Path("x")}} if wrapped else imagenet
    own, _, kept = started(config, write(content))
    assert kept == [] and own["embedding.weight"].eq(1).all()
    expected = import_deco_diff(write({"model": network}), config).corrector.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in own if name != "embedding.weight")


def test_latents_of_another_codec_keep_the_first_and_the_last_convolution(config, imagenet, write):
    codec = CodecConfig("pca", channels=5, factor=4)
    own, before, kept = started(config, write({"state_dict": imagenet}), codec=codec)
    ends = ["unet.conv_in.weight", "unet.conv_out.bias", "unet.conv_out.weight"]
    assert kept == ends
    assert all(torch.equal(own[name], before[name]) for name in kept)
    assert torch.equal(own["unet.conv_in.bias"], imagenet[LDM_UNET + "input_blocks.0.0.bias"])


def test_weight_that_the_file_lacks_is_named_as_kept(config, imagenet, write):
    state = {name: value for name, value in imagenet.items() if "middle_block.1.norm" not in name}
    _, _, kept = started(config, write({"state_dict": state}))
    norm = "unet.mid_block.attentions.0.norm"
    assert kept == [f"{norm}.bias", f"{norm}.weight"]


def test_a_run_is_another_one_if_it_started_from_imagenet(config, imagenet, write):
    detector = DecoDiff(config)
    assert detector.identity() == {"imagenet": None}
    start_from_imagenet(detector, path := write({"state_dict": imagenet}))
    assert detector.identity() == {"imagenet": [path.name, path.stat().st_size]}


@pytest.mark.parametrize("change", [{"width": 64}, {"context": 8, "width": 64}, {"blocks": 3}])
def test_network_of_another_size_is_refused_and_left_alone(config, imagenet, write, change):
    torch.manual_seed(0)
    detector = DecoDiff(replace(config, **change))
    before = {name: value.clone() for name, value in detector.corrector.state_dict().items()}
    with pytest.raises(ValueError, match=r"only \d+ of \d+ weights in .*last\.pt fit"):
        start_from_imagenet(detector, write({"state_dict": imagenet}))
    after = detector.corrector.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no weights whose names begin with 'model.diffusion_model.'"),
        ({"state_dict": {}}, "has no weights whose names begin"),
        ({"state_dict": {"out.2.bias": torch.ones(4)}}, "has no weights whose names begin"),
        ({"state_dict": [1]}, "has no weights under 'state_dict'"),
        ({"state_dict": {LDM_UNET + "out.2.bias": "text"}}, "has no weights under 'state_dict'"),
        ({LDM_UNET + "out.2.bias": "text"}, "has no weights whose names begin"),
        ({LDM_UNET + "out.2.bias": torch.ones(4)}, "holds no network|only 1 of"),
        ({LDM_UNET + "odd": torch.ones(4)}, "holds no network of latent diffusion.*odd"),
    ],
    ids=str,
)
def test_file_without_such_a_network_is_refused_by_name(config, write, content, words):
    with pytest.raises(ValueError, match=rf"last\.pt.*({words})|({words}) .*last\.pt"):
        start_from_imagenet(DecoDiff(config), write(content))


def test_file_that_lost_half_of_a_pair_is_refused_by_name(config, imagenet, write):
    """The converter looks for both, and its own error names no file."""
    state = {name: v for name, v in imagenet.items() if not name.endswith("2.0.op.bias")}
    with pytest.raises(ValueError, match=r"last\.pt holds no network of latent diffusion"):
        start_from_imagenet(DecoDiff(config), write({"state_dict": state}))
