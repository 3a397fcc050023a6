"""On a real GPU, where there is one: what tests without one cannot show."""

from copy import deepcopy
from functools import partial

import pytest
import torch

import diffad_ref as da
from diffad_ref import training
from diffad_ref.continual import gather
from diffad_ref.data import Feed
from diffad_ref.gradient_projection import GradientProjectionMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
METHODS = [da.DiffusionAD, da.DecoDiff, da.OneForMore]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A toy of two products."""
    folder = tmp_path_factory.mktemp("toy")
    return da.toy_factory(folder, 64, 0, 20, 2, 2, progress=False)


def train(detector, root, steps=3, **settings):
    detector.stages = detector.stages[-1:]
    data = detector.folder(root, "train", categories=["gear", "gravel"])
    settings = {"batch_size": 4, "device": "cuda", "progress": False} | settings
    return da.fit(detector, data, steps, **settings)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_judges_as_on_the_cpu(method, precision, root):
    detector = method.tiny()
    history = train(detector, root, precision=precision)
    assert torch.isfinite(torch.tensor(history.column("loss"))).all()
    test = detector.folder(root, "test", categories=["gear"])
    x = torch.stack([test[i]["image"] for i in range(4)])
    index = torch.zeros(4, dtype=torch.long)
    there = detector.predict(x, index).anomaly_map.cpu()
    here = deepcopy(detector).cpu().predict(x, index).anomaly_map
    assert torch.allclose(there, here, atol=2e-3 * here.abs().max().item())


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_card(method, root, monkeypatch):
    detector = method.tiny()
    train(detector, root, 1)
    data = detector.folder(root, "train", categories=["gear", "gravel"])
    feed, device = Feed(data, torch.device("cuda")), torch.device("cuda")
    batch = next(feed.batches(training.batch_numbers(len(data), 4, 1, [0])))
    detector.train()
    generator = torch.Generator(device).manual_seed(0)
    detector(batch, generator)["loss"].backward()  # once: some matrices are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        detector(batch, generator)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_interrupted_ends_as_an_unbroken_one(method, root, tmp_path):
    torch.manual_seed(0)
    start = method.tiny()
    whole, broken = deepcopy(start), deepcopy(start)
    rows = train(whole, root, 4, precision="float32").column("loss")
    stop = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        real = broken.training_loss

        def loss(batch, generator, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == 3:
                raise stop
            return real(batch, generator)

        broken.training_loss = loss
        train(broken, root, 4, precision="float32", out=tmp_path, save_every=1)
    del broken.training_loss
    again = train(broken, root, 4, precision="float32", out=tmp_path, save_every=1)
    assert torch.allclose(torch.tensor(again.column("loss")), torch.tensor(rows), rtol=1e-2)


def test_a_run_from_a_gpu_goes_on_without_one(root, tmp_path):
    train(da.DecoDiff.tiny(), root, 2, out=tmp_path)
    again = da.DecoDiff.tiny()
    history = train(again, root, 2, out=tmp_path, device="cpu")
    assert len(history.rows) == 2 and again.device.type == "cpu"


def test_what_is_protected_on_the_card_stays(root):
    detector = da.OneForMore.tiny()
    train(detector, root, 1)
    memory = GradientProjectionMemory(detector, gamma=0.99)
    data = detector.folder(root, "train", categories=["gear", "gravel"])
    taken = gather(detector, memory, data, every=10, progress=False)
    assert any(0 < rank < features for rank, features in taken.values())
    before = {name: layer.weight.detach().clone() for name, layer in memory.layers.items()}
    train(detector, root, 3, on_optimizer=partial(memory.protect, rest="freeze"))
    for name, layer in memory.layers.items():
        moved = (layer.weight - before[name]).flatten(1)
        assert (moved @ memory.basis(name)).norm() <= 1e-3 * moved.norm() + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_report_from_the_card_is_that_of_the_cpu(method, root):
    detector = method.tiny()
    train(detector, root, 2)
    test = detector.folder(root, "test", categories=["gear"])
    there = da.evaluate(detector, test, progress=False)
    here = da.evaluate(detector.cpu(), test, progress=False)
    assert there.detector == here.detector and there.precision == "float32"
    scores = [torch.tensor(report.images["score"].to_numpy()) for report in (there, here)]
    assert torch.allclose(*scores, rtol=1e-2, atol=1e-3)


def test_a_compiled_training_follows_the_plain_one(root):
    torch.manual_seed(0)
    plain = da.DecoDiff.tiny()
    compiled = deepcopy(plain)
    rows = train(plain, root, precision="float32").column("loss")
    found = train(compiled, root, precision="float32", compile=True).column("loss")
    assert torch.allclose(torch.tensor(found), torch.tensor(rows), rtol=1e-2)
