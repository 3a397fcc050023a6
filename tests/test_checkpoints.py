"""Weights on disk: what comes back, what is refused, and what a failure leaves behind."""

import dataclasses
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diffad_ref import checkpoints
from diffad_ref.checkpoints import (
    config_of,
    load,
    pretrained,
    read_description,
    save,
    write_text,
)
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import Config, DiffusionAD
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools.baselines import without_denoiser
from diffad_ref.tools.records import add_to_record

RECORD = {"command": "by hand", "seed": 3, "metrics": {"image_auroc": 0.75}}


@pytest.fixture
def detector(small_config):
    """A detector that also has integers to keep: the counters of batch normalisation."""
    torch.manual_seed(0)
    detector = DiffusionAD(replace(small_config, segmentation_norm="batch"))
    detector.categories = ("gear", "brick")
    for name, buffer in detector.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(70_001)  # half precision would make this infinite
    return detector


@pytest.fixture
def saved(detector, tmp_path):
    """Path of that detector's weights, in a folder of their own."""
    return save(detector, tmp_path / "saved" / "weights", RECORD)


def names(folder):
    return sorted(os.listdir(folder))


# ----------------------------------------------------------------------------------- there and back


def test_full_precision_comes_back_bit_for_bit_with_config_and_categories(detector, saved):
    loaded = load(saved)
    state = detector.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])
    assert loaded.config == detector.config
    assert loaded.categories == ("gear", "brick")  # in this order: it is what an index means
    assert not loaded.training


def test_half_precision_rounds_each_weight_once_and_leaves_integers_alone(detector, tmp_path):
    loaded = load(save(detector, tmp_path / "half", half=True))
    for name, value in detector.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_half_precision_takes_half_the_space(detector, saved, tmp_path):
    half = save(detector, tmp_path / "half", half=True)
    numbers = sum(p.numel() for p in detector.parameters())
    assert saved.stat().st_size - half.stat().st_size == pytest.approx(2 * numbers, rel=0.02)


def test_saving_does_not_change_the_detector_that_is_saved(detector, tmp_path):
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    detector.train()
    save(detector, tmp_path / "half", half=True)
    assert detector.training
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_json_beside_the_weights_says_what_they_are_and_how_they_came_to_be(detector, saved):
    description = json.loads(saved.with_suffix(".json").read_text())
    assert description["method"] == "DiffusionAD"
    assert description["categories"] == ["gear", "brick"]
    assert description["record"] == RECORD
    assert description["config"]["image_size"] == 32
    peak = detector.config.stages[0].lr["denoiser"].peak
    assert description["config"]["stages"][0]["lr"]["denoiser"]["peak"] == peak
    assert read_description(saved) == description


CONFIGS = {
    f"{method.__name__} {profile.__name__}": profile()
    for method in (DiffusionAD, DecoDiff, OneForMore)
    for profile in (method.Config.paper, method.Config.tiny)
}
CONFIGS |= {"tiny 128": Config.tiny(128), "ablation": without_denoiser(Config.tiny())}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_survives_json_with_its_tuples_and_nested_parts(name):
    config = CONFIGS[name]
    text = json.dumps(dataclasses.asdict(config))
    assert config_of(type(config), json.loads(text)) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [({"width": "wide"}, "width"), ({"wheels": 4}, "wheels"), ({"stages": [{}]}, "stages")],
    ids=str,
)
def test_setting_that_no_config_has_is_named(change, words):
    plain = json.loads(json.dumps(dataclasses.asdict(Config.tiny())))
    with pytest.raises(ValueError, match=words):
        config_of(Config, plain | change)


@pytest.mark.parametrize("name", ["weights", "weights.safetensors", "weights.json"])
def test_either_file_or_their_common_name_means_both(saved, name):
    assert load(saved.with_name(name)).categories == ("gear", "brick")
    assert load(str(saved.with_name(name))).categories == ("gear", "brick")


def test_a_name_with_a_dot_keeps_all_of_it(detector, tmp_path):
    for w in ("0.5", "0.7"):
        assert save(detector, tmp_path / f"w-{w}").name == f"w-{w}.safetensors"
    assert names(tmp_path) == [
        f"w-{w}.{e}" for w in ("0.5", "0.7") for e in ("json", "safetensors")
    ]
    load(tmp_path / "w-0.5")


def test_an_entry_in_the_record_leaves_half_precision_weights_as_they_are(detector, tmp_path):
    path = save(detector, tmp_path / "w-0.5", RECORD, half=True)
    before, description = path.read_bytes(), read_description(path)
    add_to_record(path, {"seed": 4, "steps": 2})
    assert path.read_bytes() == before
    assert read_description(path) == {**description, "record": {**RECORD, "seed": 4, "steps": 2}}
    assert names(tmp_path) == ["w-0.5.json", "w-0.5.safetensors"]


def test_others_may_read_what_was_saved(detector, tmp_path):
    """As far as the umask allows, that is: temporary files are for their owner alone."""
    (tmp_path / "plain").write_text("")
    path = save(detector, tmp_path / "weights")
    usual = (tmp_path / "plain").stat().st_mode
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode == usual


# ---------------------------------------------------------------------------------- refused by name


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_missing_half_of_a_pair_is_named(saved, suffix):
    saved.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"weights\{suffix}"):
        load(saved)


@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.999])
def test_truncated_weights_are_named(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        load(saved)


def test_damaged_header_of_the_weights_is_named(saved):
    content = bytearray(saved.read_bytes())
    content[9:20] = b"\xff" * 11  # the first eight bytes are the header's length
    saved.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        load(saved)


@pytest.mark.parametrize("byte", [-1, -50_000])
def test_a_bit_of_a_number_that_changed_on_the_disk_is_noticed(saved, byte):
    content = bytearray(saved.read_bytes())
    content[byte] ^= 1
    saved.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: its checksum"):
        load(saved)


def test_a_tensor_under_another_name_is_noticed(saved):
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b'"segmenter.head.bias"', b'"segmenter.head.bird"'))
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: its checksum"):
        load(saved)


def test_weights_without_a_checksum_are_read_as_others_wrote_them(detector, saved):
    save_file(detector.state_dict(), saved)
    assert load(saved).state_dict().keys() == detector.state_dict().keys()


@pytest.mark.parametrize(
    "content", [b"", b'{"method": "Diff', b"\xff\xfe\x00", b"[]", b"7", b"null", b'{"method": 1}']
)
def test_damaged_description_is_named(saved, content):
    saved.with_suffix(".json").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.json is damaged"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": None},
        {"categories": None},
        {"config": {"schedule": "zigzag"}},
        {"config": {"predicts": "weather"}},
        {"config": {"stages": []}},
        {"config": {"multipliers": 5}},
        {"config": {"width": "32"}},
        {"config": {"number_of_wheels": 4}},
    ],
    ids=str,
)
def test_description_that_makes_no_detector_is_named(saved, change):
    description = read_description(saved)
    if isinstance(change.get("config"), dict):
        change = {"config": {**description["config"], **change["config"]}}
    write_text(json.dumps({**description, **change}), saved.with_suffix(".json"))
    with pytest.raises(ValueError, match=r"weights\.json (describes no DiffusionAD|is damaged)"):
        load(saved)


@pytest.mark.parametrize("name", ["t_s", "top_k", "synthesis"])
def test_a_setting_that_a_description_lacks_is_named_and_not_taken_from_the_defaults(saved, name):
    description = read_description(saved)
    del description["config"][name]
    write_text(json.dumps(description), saved.with_suffix(".json"))
    with pytest.raises(ValueError, match=f"it does not say {name}, and a default may be another"):
        load(saved)


@pytest.mark.parametrize("method", ["PatchCore", ["DiffusionAD"], None])
def test_unknown_method_is_named_with_the_known_ones(saved, method):
    write_text(
        json.dumps({**read_description(saved), "method": method}), saved.with_suffix(".json")
    )
    words = "of methods, only .*DiffusionAD.* are imported|method: Input should be .* string"
    with pytest.raises(ValueError, match=words):
        load(saved)


def test_weights_of_another_method_than_the_caller_needs_are_refused(saved):
    assert load(saved, method="DiffusionAD").categories
    with pytest.raises(ValueError, match="holds weights of DiffusionAD, not of OneForMore"):
        load(saved, method="OneForMore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation_width": 8}, r"fit: \d+ of another shape \['segmenter"),
        ({"segmentation_norm": "group"}, r"fit: \d+ unexpected \['segmenter"),
        ({"blocks": 2}, r"fit: \d+ missing \['denoiser"),
    ],
)
def test_weights_under_the_description_of_another_network_are_refused(
    detector, saved, tmp_path, change, message
):
    other = save(DiffusionAD(replace(detector.config, **change)), tmp_path / "other")
    other.with_suffix(".json").replace(saved.with_suffix(".json"))
    with pytest.raises(ValueError, match=rf"weights in .*weights\.safetensors do not {message}"):
        load(saved)


# ---------------------------------------------------------------------------------- shipped weights


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """An empty folder in place of the shipped weights."""
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "shop")
    return tmp_path / "shop"


def test_pretrained_loads_what_lies_in_the_folder_of_shipped_weights(detector, shop):
    save(detector, shop / "diffusion_ad_toy", half=True)
    assert pretrained("diffusion_ad_toy").categories == ("gear", "brick")


def test_unknown_pretrained_name_is_answered_with_all_names(detector, shop):
    for name in ("tile", "diffusion_ad_toy"):
        save(detector, shop / name)
    with pytest.raises(ValueError, match="'toy' are shipped; there are diffusion_ad_toy, tile$"):
        pretrained("toy")


def test_pretrained_name_is_no_path_out_of_the_folder(detector, shop, tmp_path):
    save(detector, shop / "toy")
    save(detector, tmp_path / "foreign")
    for name in ("../foreign", str(tmp_path / "foreign"), "toy.safetensors", ""):
        with pytest.raises(ValueError, match="there are toy$"):
            pretrained(name)


@pytest.mark.parametrize("exists", [False, True])
def test_package_without_shipped_weights_says_so(shop, exists):
    if exists:
        shop.mkdir()
    with pytest.raises(ValueError, match="no weights 'diffusion_ad_toy' are shipped"):
        pretrained("diffusion_ad_toy")


# --------------------------------------------------------------------------- failures in the middle


def half_a_file(state, path, metadata=None):
    """Stands for `save_file` on a disk that fills up."""
    with open(path, "wb") as file:
        file.write(b"half of it")
    raise OSError("no space left on device")


def test_full_disk_leaves_no_new_file(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_file", half_a_file)
    with pytest.raises(OSError, match="no space left"):
        save(detector, tmp_path / "weights")
    assert names(tmp_path) == []


def test_full_disk_leaves_the_old_pair_whole(detector, saved, monkeypatch):
    before = {name: (saved.parent / name).read_bytes() for name in names(saved.parent)}
    monkeypatch.setattr(checkpoints, "save_file", half_a_file)
    with pytest.raises(OSError, match="no space left"):
        save(detector, saved, {"seed": 4})
    assert {name: (saved.parent / name).read_bytes() for name in names(saved.parent)} == before


def test_weights_never_stand_under_their_name_while_they_are_written(
    detector, tmp_path, monkeypatch
):
    seen, real = [], checkpoints.save_file

    def watched(state, path, metadata=None):
        real(state, path, metadata)
        seen.append((os.fspath(path), names(tmp_path)))

    monkeypatch.setattr(checkpoints, "save_file", watched)
    save(detector, tmp_path / "weights")
    [(path, present)] = seen
    assert os.path.dirname(path) == str(tmp_path)  # a rename is only safe within a file system
    assert "weights.safetensors" not in present and len(present) == 1
    assert names(tmp_path) == ["weights.json", "weights.safetensors"]


def test_record_that_json_cannot_hold_leaves_the_old_pair_whole(detector, saved):
    before = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    with torch.no_grad():
        next(detector.parameters()).add_(1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(detector, saved, {"seed": object()})
    assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == before
    assert names(saved.parent) == ["weights.json", "weights.safetensors"]


def test_interrupted_text_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_text("old", tmp_path / "a.json") or tmp_path / "a.json"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text("new", path)
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


# ---------------------------------------------------------------------------------------- no pickle


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_pickle_in_place_of_either_file_is_refused_and_does_not_run(saved, tmp_path, dump, suffix):
    with open(saved.with_suffix(suffix), "wb") as file:
        dump({"x": Payload(tmp_path / "ran")}, file)
    with pytest.raises(ValueError, match=rf"weights\{suffix} is damaged"):
        load(saved)
    assert not (tmp_path / "ran").exists()


def test_loading_never_asks_pickle_or_torch_load(saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    load(saved)
