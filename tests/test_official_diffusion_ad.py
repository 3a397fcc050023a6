"""Import of checkpoints in the format of the authors' released code.

Their layout is {unet_model_state_dict, seg_model_state_dict, other objects}, by `torch.save`. The
networks are the recorded ones of `tests/golden`; everything else is written here.
"""

import argparse
import collections
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import OWN, arrays, close, settings, weights
from PIL import Image
from safetensors.torch import save_file

from diffad_ref.diffusion_ad import Config
from diffad_ref.tools.foreign_pickles import read_foreign, weights_under
from diffad_ref.tools.official_diffusion_ad import SEGMENTER_KEY, UNET_KEY, import_diffusion_ad

UNET, SEGMENTER = "diffusionad_1b_unet_d", "diffusionad_1c_seg"


@pytest.fixture(scope="module")
def networks():
    """Both state dicts, as they lie in a checkpoint."""
    return {UNET_KEY: weights(UNET, OWN), SEGMENTER_KEY: weights(SEGMENTER, OWN)}


# A checkpoint with a weight or two, for what does not depend on there being whole networks.
SMALL = {
    UNET_KEY: {"w": torch.arange(3.0), "b": torch.ones(2)},
    SEGMENTER_KEY: {"w": torch.ones(1)},
}


def holds_small(path):
    """Whether the weights of a checkpoint are read as they were written."""
    read = weights_under(read_foreign(path), UNET_KEY, path)
    return all(torch.equal(read[name], value) for name, value in SMALL[UNET_KEY].items())


@pytest.fixture
def write(tmp_path):
    """Saves an object the way that the authors' code does; returns the path."""

    def save(content, **options):
        torch.save(content, tmp_path / "params-best.pt", **options)
        return tmp_path / "params-best.pt"

    return save


class Trap(list):
    """Remembers whenever one of its methods is called to rebuild it."""

    sprung = []

    def __init__(self, path):
        super().__init__([1])
        self.path = str(path)

    def append(self, item):
        Trap.sprung.append(item)

    extend = append

    def __setstate__(self, state):
        os.makedirs(state["path"], exist_ok=True)


class Call:
    """Calls any function with any arguments when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# ----------------------------------------------------------------------------------- what comes out


def test_imported_networks_compute_the_recorded_numbers(networks, write):
    detector = import_diffusion_ad(write({**networks, "n_epoch": 3000}))
    assert settings(UNET, OWN)["n_heads"] == detector.config.heads == 4
    recorded = arrays(f"{UNET}_io", OWN)
    with torch.no_grad():
        noise = detector.denoiser(torch.tensor(recorded["x"]), torch.tensor(recorded["t"]))
        close(noise, recorded["output"], atol=5e-5)
        recorded = arrays(f"{SEGMENTER}_io", OWN)
        close(detector.segmenter(torch.tensor(recorded["x"])), recorded["output_eval"])


def test_sizes_are_read_from_the_weights_and_the_rest_is_the_papers(networks, write):
    detector = import_diffusion_ad(write(networks))
    assert detector.config == Config.paper(
        image_size=64,  # attention on the second level, which is taken for the one of 32 pixels
        width=32,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(1,),
        segmentation_width=8,
    )
    assert not detector.training


def test_imported_detector_judges_images(networks, write):
    detector = import_diffusion_ad(write(networks))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prediction = detector.predict(images)
    assert prediction.anomaly_map.shape == (2, 64, 64) and prediction.score.isfinite().all()


def test_a_config_of_ones_own_may_change_what_weights_do_not_show(networks, write):
    path = write(networks)
    config = replace(import_diffusion_ad(path).config, image_size=32, t_s=150)
    assert import_diffusion_ad(path, config).config == config


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_both_formats_of_torch_save_and_both_kinds_of_dict_are_read(networks, write, zipped, kind):
    state = kind((key, kind(value)) for key, value in networks.items())
    detector = import_diffusion_ad(write(state, _use_new_zipfile_serialization=zipped))
    expected = networks[SEGMENTER_KEY]["decoder_segment.fin_out.0.bias"]
    assert torch.equal(detector.segmenter.head.bias, expected)


def test_parameters_and_half_precision_are_read_as_plain_float32(networks, write):
    changed = {
        UNET_KEY: {k: torch.nn.Parameter(v) for k, v in networks[UNET_KEY].items()},
        SEGMENTER_KEY: {
            k: v.half() if v.is_floating_point() else v for k, v in networks[SEGMENTER_KEY].items()
        },
    }
    detector = import_diffusion_ad(write(changed))
    assert {p.dtype for p in detector.parameters()} == {torch.float32}
    assert torch.equal(detector.denoiser.unet.conv_in.weight, networks[UNET_KEY]["down.0.0.weight"])


# ---------------------------------------------------------------------------------- foreign objects


def foreign_objects():
    """What training code leaves in a checkpoint: none of it is a tensor."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    arguments = collections.defaultdict(str, {"img_size": [64, 64]})
    return {
        "args": arguments,
        "namespace": argparse.Namespace(lr=1e-4),
        "optimizer_state_dict": optimizer.state_dict(),
        "auroc": np.float64(0.99),
        "curve": np.arange(3.0),
        "path": Path("runs"),
        "function": os.getcwd,
        "generator": np.random.default_rng(0),
        "odd": {frozenset({1}), (2, 3)},
        "network": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", foreign_objects())
def test_object_beside_the_weights_does_not_matter(write, name, zipped):
    content = {name: foreign_objects()[name], **SMALL}
    assert holds_small(write(content, _use_new_zipfile_serialization=zipped))


def payloads(path):
    path = str(path)
    return {
        "system": Call(os.system, f"mkdir {path}"),
        "mkdir": Call(os.mkdir, path),
        "eval": Call(eval, f"__import__('os').mkdir({path!r})"),
        "exec": Call(exec, f"import os; os.mkdir({path!r})"),
        "nested": Call(os.mkdir, Call(os.path.join, path)),
        "hidden in a set": {Call(os.mkdir, path)},
        "state": Trap(path),
    }


@pytest.fixture
def mark(tmp_path):
    """A folder that appears if a payload runs."""
    Trap.sprung.clear()
    yield tmp_path / "ran"
    assert Trap.sprung == []


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", payloads(""))
def test_payload_beside_the_weights_does_not_run(write, mark, name, zipped):
    content = {"args": payloads(mark)[name], **SMALL}
    assert holds_small(write(content, _use_new_zipfile_serialization=zipped))
    assert not mark.exists()


def test_whole_checkpoint_with_foreign_objects_and_payloads_is_imported(networks, write, mark):
    path = write({**foreign_objects(), **networks, "payloads": list(payloads(mark).values())})
    detector = import_diffusion_ad(path)
    assert not mark.exists()
    assert torch.equal(detector.denoiser.unet.conv_in.weight, networks[UNET_KEY]["down.0.0.weight"])


@pytest.mark.parametrize("name", ["system", "mkdir", "eval", "exec", "nested"])
def test_these_payloads_do_run_where_pickle_is_trusted(write, mark, name):
    """Otherwise the tests around this one would prove nothing."""
    path = write({"args": payloads(mark)[name]})
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", payloads(""))
@pytest.mark.parametrize("place", ["whole file", "network", "weight", "key"])
def test_payload_in_place_of_weights_does_not_run_and_is_refused(write, mark, name, place):
    payload = payloads(mark)[name]
    unet = SMALL[UNET_KEY]
    if place == "whole file":
        content = payload
    elif place == "network":
        content = {**SMALL, UNET_KEY: payload}
    elif place == "weight":
        content = {**SMALL, UNET_KEY: {**unet, "w": payload}}
    else:
        key = frozenset(payload) if isinstance(payload, set) else (payload,)
        key = "a list has no hash" if isinstance(payload, Trap) else key
        content = {**SMALL, UNET_KEY: {**unet, key: payload}}
    path = write(content)
    with pytest.raises(ValueError, match=f"{path.name} (holds no checkpoint|has no weights under)"):
        import_diffusion_ad(path)
    assert not mark.exists()


def test_plain_pickle_is_refused_and_does_not_run(tmp_path, mark):
    path = tmp_path / "params.pt"
    path.write_bytes(pickle.dumps({"args": Call(os.mkdir, str(mark))}))
    with pytest.raises(ValueError, match="params.pt"):
        import_diffusion_ad(path)
    assert not mark.exists()


# ------------------------------------------------------------------- what a pickle leaves behind


def opcodes(content):
    """The pickle of an object, without its beginning and its end."""
    return pickle.dumps(content, 2)[2:-1]


def write_opcodes(path, code):
    """A checkpoint without storages, as torch before 1.6 wrote it, around a pickle by hand."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + b"\x80\x02" + code)
    with open(path, "ab") as file:
        pickle.dump([], file, 2)  # the names of its storages
    return path


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_foreign_pickle_cannot_change_the_functions_that_torch_rebuilds_with(
    tmp_path, write, monkeypatch, name
):
    function = getattr(torch._utils, name)
    before = function.__doc__, function.__defaults__
    for attribute, value in zip(("__doc__", "__defaults__"), before, strict=True):
        monkeypatch.setattr(function, attribute, value)  # put back, whatever the file does
    state = (None, {"__doc__": "foreign", "__defaults__": (1, 2, 3)})
    code = f"ctorch._utils\n{name}\n".encode() + opcodes(state) + b"b"
    path = write_opcodes(tmp_path / "foreign.pt", b"}" + opcodes("args") + code + b"s.")
    assert list(read_foreign(path)) == ["args"]
    assert (function.__doc__, function.__defaults__) == before
    assert holds_small(write(SMALL))


def test_sparse_tensor_of_a_damaged_file_does_not_spoil_the_next_load(write):
    """Torch keeps sparse tensors in a list until the end of a load, whoever's they are."""
    wrong = torch.tensor([[5]]), torch.ones(1), torch.Size([2]), False
    sparse = Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, wrong)
    damaged = Call(torch._utils._rebuild_tensor_v2, 1, 2)
    with pytest.raises(ValueError, match=r"params-best\.pt is damaged"):
        read_foreign(write([sparse, damaged]))
    assert torch.load(write(SMALL), weights_only=True).keys() == SMALL.keys()


class Overwritten:
    """Becomes an OrderedDict, some of whose methods are hidden by attributes."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        hidden = dict.fromkeys(("items", "keys", "values", "get", "__iter__"), 1)
        return collections.OrderedDict, (), hidden, None, iter(self.content.items())


@pytest.mark.parametrize("beside", [{}, {"args": argparse.Namespace()}], ids=["alone", "with args"])
def test_dict_with_overwritten_methods_is_read_as_a_plain_one(write, beside):
    small = {key: Overwritten(value) for key, value in SMALL.items()}
    path = write(Overwritten({**small, **beside}))
    assert holds_small(path)
    assert type(read_foreign(path)) is type(read_foreign(path)[UNET_KEY]) is dict


@pytest.mark.parametrize("beside", [{}, {"args": argparse.Namespace()}], ids=["alone", "with args"])
def test_parameter_is_read_as_a_plain_tensor_without_its_hooks(write, beside):
    hook = Call(collections.OrderedDict, [(0, 1)])
    weight = Call(torch._utils._rebuild_parameter, torch.ones(2), True, hook)
    read = read_foreign(write({"w": weight, **beside}))["w"]
    assert type(read) is torch.Tensor and not read.requires_grad and not read._backward_hooks


def test_dict_that_holds_itself_or_others_a_billion_times_is_read_at_once(write):
    shared = itself = {}
    itself["itself"] = itself
    for _ in range(60):
        shared = {"left": shared, "right": shared}
    read = read_foreign(write(shared))
    assert read["left"] is read["right"]


# ------------------------------------------------------------------------------ other kinds of file


def picture(path):
    Image.new("RGB", (8, 8)).save(path, "png")


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


OTHER_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("unet_model_state_dict"),
    "picture": picture,
    "safetensors": lambda path: save_file({UNET_KEY: torch.ones(2)}, path),
    "tensor": lambda path: torch.save(torch.ones(2), path),
    "list": lambda path: torch.save([1, 2], path),
    "bare state dict": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "whole network": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "TorchScript": script,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_another_kind_of_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "file.pt"
    OTHER_FILES[kind](path)
    with pytest.raises(ValueError, match=r"file\.pt (is damaged|holds no|has no weights)"):
        import_diffusion_ad(path)


@pytest.mark.parametrize("key", [UNET_KEY, SEGMENTER_KEY])
def test_checkpoint_without_one_network_says_which_and_what_it_holds(write, key):
    content = {"n_epoch": 3, **SMALL}
    del content[key]
    with pytest.raises(ValueError, match=rf"no weights under '{key}'; it holds \['n_epoch'"):
        import_diffusion_ad(write(content))


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99])
def test_truncated_checkpoint_is_named(networks, write, share):
    path = write(networks)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"params-best\.pt is damaged"):
        import_diffusion_ad(path)


@pytest.mark.parametrize("name", ["nothing.pt", "."])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        import_diffusion_ad(tmp_path / name)


# -------------------------------------------------------------------------- weights that do not fit


@pytest.mark.parametrize(
    ("key", "lost"),
    [
        (UNET_KEY, "down.0.0.bias"),
        (UNET_KEY, "middle.0.in_layers.2.weight"),
        (UNET_KEY, "up.0.0.out_layers.3.bias"),
        (SEGMENTER_KEY, "encoder_segment.block1.0.bias"),
        (SEGMENTER_KEY, "decoder_segment.fin_out.0.weight"),
    ],
)
def test_lost_weight_is_a_clear_error(networks, write, key, lost):
    state = dict(networks[key])
    del state[lost]
    with pytest.raises(ValueError, match=r"params-best\.pt.*(lack|do not fit: 1 missing)"):
        import_diffusion_ad(write({**networks, key: state}))


@pytest.mark.parametrize("key", [UNET_KEY, SEGMENTER_KEY])
@pytest.mark.parametrize("name", ["extra.weight", "module.down.0.0.weight", "down.0.0.gain"])
def test_weight_that_no_such_network_has_is_named(networks, write, key, name):
    state = {**networks[key], name: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"params-best\.pt: .*'{name}'"):
        import_diffusion_ad(write({**networks, key: state}))


def test_weight_of_another_shape_is_named(networks, write):
    state = {**networks[UNET_KEY], "out.2.bias": torch.ones(6)}
    with pytest.raises(ValueError, match=r"1 of another shape \['denoiser\.unet\.conv_out\.bias"):
        import_diffusion_ad(write({**networks, UNET_KEY: state}))


def test_empty_networks_are_refused(write):
    with pytest.raises(
        ValueError, match=r"params-best\.pt: the U-Net has weights in its up entries"
    ):
        import_diffusion_ad(write({UNET_KEY: {}, SEGMENTER_KEY: {}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation_width": 16}, "of another shape"),
        ({"attention_levels": ()}, "unexpected"),
        ({"heads": 5}, "heads must divide the widths"),
        ({"predicts": "image"}, "predicts noise"),
    ],
)
def test_config_that_does_not_fit_is_refused(networks, write, change, message):
    path = write(networks)
    config = import_diffusion_ad(path).config
    with pytest.raises(ValueError, match=message):
        import_diffusion_ad(path, replace(config, **change))
