"""Networks compile as a whole: no part of them falls back to Python, and the result is the same."""

import pytest
import torch

import diffad_ref as da

SMALL = {"norm_groups": 4, "multipliers": (1, 1), "width": 8}
SIZES = {
    da.DiffusionAD: SMALL | {"attention_levels": (1,), "heads": 2, "segmentation_width": 4},
    da.DecoDiff: SMALL | {"heads": 1, "context": 8},
    da.OneForMore: SMALL | {"start": None, "condition_layers": 1, "feed_forward": 8},
}


def ready(method):
    """A small detector whose networks have something to say."""
    torch.manual_seed(0)
    detector = method.tiny(**SIZES[method]).eval()
    for name, buffer in detector.named_buffers():
        if name.endswith(("components", "filters")):
            torch.nn.init.normal_(buffer, std=0.1)
    return detector


def parts(method):
    """Networks of a method by name, and what goes into them."""
    detector, t = ready(method), torch.tensor([3, 5])
    image, z = torch.rand(2, 3, 64, 64), torch.randn(2, 12, 16, 16)
    if method is da.DiffusionAD:
        return {
            "denoiser": (detector.denoiser, image, t),
            "segmenter": (detector.segmenter, torch.cat([image, image], 1)),
        }
    if method is da.DecoDiff:
        return {"corrector": (detector.corrector, z, t, torch.tensor([0, 1]))}
    f = torch.randn(2, detector.config.width, 16, 16)
    return {"unet": (detector.unet, z, t, f), "condition": (detector.condition, image)}


CASES = [
    pytest.param(da.DiffusionAD, "denoiser", marks=pytest.mark.long),
    (da.DiffusionAD, "segmenter"),
    pytest.param(da.DecoDiff, "corrector", marks=pytest.mark.long),
    pytest.param(da.OneForMore, "unet", marks=pytest.mark.long),
    (da.OneForMore, "condition"),
]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_network_is_one_graph_and_computes_what_it_computed(method, name):
    network, *inputs = parts(method)[name]
    torch._dynamo.reset()
    with torch.no_grad():
        plain = network(*inputs)
        network.compile(backend="eager", fullgraph=True)
        assert torch.allclose(network(*inputs), plain, atol=1e-6)


@pytest.mark.long
def test_a_compiled_detector_predicts_and_stores_as_before():
    detector, images = ready(da.DecoDiff), torch.rand(2, 3, 64, 64)
    names, plain = list(detector.state_dict()), detector.predict(images, torch.tensor([0, 1]))
    torch._dynamo.reset()
    detector.compile(backend="eager")
    again = detector.predict(images, torch.tensor([0, 1]))
    assert torch.allclose(again.anomaly_map, plain.anomaly_map, atol=1e-5)
    assert list(detector.state_dict()) == names


@pytest.mark.long
def test_compiled_networks_are_gathered_after_every_task(tmp_path):
    """A compiled graph does not call the hooks that gather."""
    torch._dynamo.reset()
    root = da.toy_factory(tmp_path / "toy", 64, 0, 8, 1, 1, progress=False)
    detector = ready(da.OneForMore)
    detector.compile(backend="eager")
    settings = {"steps": 1, "batch_size": 2, "device": "cpu", "progress": False}
    result = da.fit_continual(detector, root, [["gear"], ["brick"]], tmp_path / "run", **settings)
    first, second = result.share_taken()
    assert 0 < first < second


def kept(network, *inputs):
    """Bytes that a network's forward pass keeps for its backward pass, in bf16."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found = {}

    def note(x):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            network(*inputs)
    return sum(storage.nbytes() for place, storage in found.items() if place not in weights)


@pytest.mark.long
def test_a_compiled_denoiser_keeps_a_fifth_less_for_the_backward_pass():
    """What one operation makes of one tensor is computed again instead (torch.compile's cut)."""
    torch._dynamo.reset()
    network = da.DiffusionAD.tiny(built_in_textures=True).denoiser
    inputs = torch.rand(2, 3, 64, 64), torch.tensor([3, 5])
    plain = kept(network, *inputs)
    network.compile(backend="aot_eager_decomp_partition")
    network(*inputs)
    assert kept(network, *inputs) < 0.8 * plain
