"""Golden cases 1a-1e, 1g and 1i: the mathematics and networks of DiffusionAD."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from golden_files import (
    FOLDER,
    arrays,
    close,
    matching,
    names,
    numbered,
    settings,
    shifted,
    weights,
)

from diffad_ref.anomalies import blend, perlin_noise, shuffle_strips
from diffad_ref.diffusion import Schedule, predict_x0
from diffad_ref.diffusion_ad import (
    Denoiser,
    SegmentationNet,
    focal_loss,
    mask_loss,
    noise_loss,
    noise_to_norm,
)
from diffad_ref.networks import adm_unet
from diffad_ref.tools.official_diffusion_ad import (
    denoiser_state,
    segmenter_state,
    unet_from_settings,
)
from diffad_ref.tools.sampling import posterior

pytestmark = pytest.mark.golden


# ---------------------------------------------------------------------------------- 1a schedules

QUANTITIES = {
    "betas": lambda s: s.betas,
    "alphas_cumprod": lambda s: s.abar,
    "alphas_cumprod_prev": lambda s: shifted(s.abar),
    "sqrt_alphas_cumprod": lambda s: s.abar.sqrt(),
    "sqrt_one_minus_alphas_cumprod": lambda s: (1 - s.abar).sqrt(),
    "sqrt_recip_alphas_cumprod": lambda s: (1 / s.abar).sqrt(),
    "sqrt_recipm1_alphas_cumprod": lambda s: (1 / s.abar - 1).sqrt(),
    "posterior_variance": lambda s: posterior(s)[0],
    "posterior_mean_coef1": lambda s: posterior(s)[1],
    "posterior_mean_coef2": lambda s: posterior(s)[2],
}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_schedules(quantity):
    for match, recorded in matching("diffusionad_1a_schedules", rf"([a-z]+)(\d+)_{quantity}"):
        schedule = Schedule.named(match[1], int(match[2]))
        close(QUANTITIES[quantity](schedule), recorded, atol=0, rtol=1e-9)


# ----------------------------------------------------------------------------------- 1b denoiser

NETWORKS = names("diffusionad_1b_unet_*")
WITHOUT_CONVOLUTION = [
    name
    for name in NETWORKS
    if (FOLDER / f"{name}.safetensors").exists()
    and not settings(name).get("conv_resample", True)
    and not settings(name).get("biggan_updown", True)
]


def build(name):
    """Our network with the recorded weights, converted."""
    given = settings(name)
    width = given.get("n_head_channels", -1)
    denoiser = Denoiser(unet_from_settings(given))
    state = denoiser_state(weights(name), given.get("n_heads", 1), None if width == -1 else width)
    denoiser.load_state_dict(state)
    return denoiser.eval()


def run(denoiser, x, t, pos_embedding=None):
    """Output and the intermediate results that are recorded; may replace the sinusoid."""
    unet, seen = denoiser.unet, {}
    first = unet.down_blocks[0]
    parts = {
        "pos_embedding": unet.time_proj,
        "time_embedding": unet.time_embedding,
        "middle": unet.mid_block,
        "down1": getattr(first, "attentions", first.resnets)[0],
    }
    if pos_embedding is not None:
        unet.time_proj.register_forward_hook(lambda *_: torch.as_tensor(pos_embedding))
    for name, part in parts.items():
        part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        seen["output"] = denoiser(x, t)
    return seen


@pytest.fixture(scope="module", params=[n for n in NETWORKS if n not in WITHOUT_CONVOLUTION])
def network(request):
    """Name and recorded numbers of a denoiser that the paper's family contains."""
    return request.param, arrays(f"{request.param}_io")


def test_denoiser_in_float32(network):
    name, recorded = network
    seen = run(build(name), torch.tensor(recorded["x"]), torch.tensor(recorded["t"]))
    tolerances = {"pos_embedding": (1e-4, 0), "middle": (1e-3, 1e-3)}
    expected = set(recorded.keys()) - {"x", "t", "output_float64"}
    assert {"output", "pos_embedding", "time_embedding"} <= expected
    for part in expected:
        atol, rtol = tolerances.get(part, (5e-5, 1e-4))
        close(seen[part], recorded[part], atol, rtol)


def test_denoiser_in_float64(network):
    name, recorded = network
    x, t = torch.tensor(recorded["x"]).double(), torch.tensor(recorded["t"])
    seen = run(build(name).double(), x, t, recorded["pos_embedding"])
    close(seen["output"], recorded["output_float64"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", WITHOUT_CONVOLUTION or ["a network without convolution"])
def test_denoiser_that_resamples_without_weights_is_refused(name):
    with pytest.raises(ValueError, match="no network of the paper"):
        unet_from_settings(settings(name))
    with pytest.raises(ValueError, match="no network of the paper"):
        denoiser_state(weights(name))


# --------------------------------------------------------------------------------- 1c segmentation


@pytest.fixture
def segmenter():
    """Our network with the recorded weights, converted; in training mode."""
    given = settings("diffusionad_1c_seg")
    net = SegmentationNet(given["in_channels"], given["base_channels"])
    net.load_state_dict(segmenter_state(weights("diffusionad_1c_seg")))
    return net


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segmentation(segmenter, mode, dtype):
    recorded = arrays("diffusionad_1c_seg_io")
    x = torch.tensor(recorded["x"]).to(dtype)
    found = segmenter.to(dtype).train(mode == "train")(x)
    if dtype == torch.float32:
        close(found, recorded[f"output_{mode}"])
    else:
        close(found, recorded[f"output_{mode}_float64"], atol=1e-8, rtol=0)


def test_segmentation_features(segmenter):
    recorded = arrays("diffusionad_1c_seg_io")
    stages = {f"b{n}_eval": n for n in range(1, 7) if f"b{n}_eval" in recorded}
    assert {5, 6} <= set(stages.values())
    for name, n in stages.items():
        features = []
        segmenter.encoder[n - 1].register_forward_hook(lambda _, i, o, f=features: f.append(o))
        segmenter.eval()(torch.tensor(recorded["x"]))
        close(features[0], recorded[name])


def test_batch_statistics_after_one_training_step(segmenter):
    expected = segmenter_state(weights("diffusionad_1c_seg_buffers_after_train_forward"))
    segmenter.train()(torch.tensor(arrays("diffusionad_1c_seg_io")["x"]))
    buffers = dict(segmenter.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, value in expected.items():
        close(buffers[name], value)


# ------------------------------------------------------------------------------ 1d noise to norm


def fake_model(scale=1.0, d=100):
    """The closed form that stands for the denoiser, times a number."""
    return lambda x, t: scale * torch.tanh(0.5 * x) * torch.cos(t / d)[:, None, None, None]


class GuidedCase:
    """Case 1d: inputs as tensors, and one call of our function."""

    def __init__(self):
        self.recorded = arrays("diffusionad_1d_norm_guided")
        self.schedule = Schedule.named("linear", 1000)

    def __getitem__(self, name):
        return torch.tensor(self.recorded[name])

    def times(self, mode):
        prefix = "eval_" if mode == "eval" else ""
        return self[f"{prefix}t_normal"], self[f"{prefix}t_noisier"]

    def steps(self, mode, w=1.0, model=None):
        noise = self["noise_first"], self["noise_second"]
        model = model or fake_model()
        return noise_to_norm(model, self["x0"], *self.times(mode), *noise, self.schedule, w)

    def noise_loss(self, mode, label, model=None):
        s = self.steps(mode, model=model)
        return noise_loss(s.eps_s, s.eps_b, self["noise_first"], self["noise_second"], label)

    @property
    def guidance(self):
        """Each weight with the prefix of its arrays: 0.5 -> "w0p5"."""
        return [
            (w, "w" + f"{w:g}".replace(".", "p")) for w in self.recorded["condition_w"].tolist()
        ]

    @property
    def label_names(self):
        return [name.removeprefix("labels_") for name in self.recorded if "labels_" in name]


@pytest.fixture
def guided():
    """Case 1d."""
    return GuidedCase()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_steps_before_guidance(guided, mode):
    prefix = "eval_" if mode == "eval" else ""
    steps = guided.steps(mode)
    found = {
        "x_t_normal": steps.x_s,
        "x_t_noisier": steps.x_b,
        "eps_normal": steps.eps_s,
        "eps_noisier": steps.eps_b,
        "pred_x0_noisier": steps.x0_b,
        "x_t_from_noisier": steps.xtilde,
        "pred_x0_normal": predict_x0(
            steps.x_s, steps.eps_s, guided.schedule.at(guided.times(mode)[0])
        ).clamp(-1, 1),
    }
    recorded = {name: value for name, value in found.items() if prefix + name in guided.recorded}
    assert len(recorded) >= 5
    for name, value in recorded.items():
        close(value, guided.recorded[prefix + name])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_guided_reconstruction_and_its_closed_form(guided, mode):
    for w, prefix in guided.guidance:
        s = guided.steps(mode, w)
        expected = guided.recorded[f"{prefix}_{mode}_guided"]
        close(s.x0_g, expected)
        abar_s, abar_b = map(guided.schedule.at, guided.times(mode))
        x0_s = predict_x0(s.x_s, s.eps_s, abar_s)
        x0_b = predict_x0(s.x_b, s.eps_b, abar_b).clamp(-1, 1)
        close((x0_s + w * (1 - abar_s) * (x0_b - x0_s)).clamp(-1, 1), expected)


def test_guided_noise(guided):
    for w, prefix in guided.guidance:
        close(guided.steps("train", w).eps_g, guided.recorded[f"{prefix}_train_eps_hat"])


def test_gradient_reaches_the_model_through_both_predictions(guided):
    for w, prefix in guided.guidance:
        scale = torch.ones((), requires_grad=True)
        x0_g = guided.steps("train", w, fake_model(scale)).x0_g
        (x0_g * guided["grad_probe"]).sum().backward()
        close(scale.grad, guided.recorded[f"{prefix}_train_grad_guided_dot_R"], atol=0, rtol=1e-3)


def test_noise_loss_of_each_label_vector_and_its_gradient(guided):
    assert guided.label_names
    for name in guided.label_names:
        scale = torch.ones((), requires_grad=True)
        loss = guided.noise_loss("train", guided[f"labels_{name}"], fake_model(scale))
        close(loss, guided.recorded[f"train_loss_{name}"])
        loss.backward()
        close(scale.grad, guided.recorded[f"train_grad_loss_{name}"], atol=0)


def test_noise_loss_of_each_sample(guided):
    expected = (
        guided.recorded["loss_normal_per_sample"] + guided.recorded["loss_noisier_per_sample"]
    )
    for i, value in enumerate(expected):
        label = torch.ones(len(expected))
        label[i] = 0
        close(guided.noise_loss("train", label), value)


def test_noise_loss_in_evaluation_is_over_all_samples(guided):
    label = torch.zeros(len(guided["x0"]))
    close(guided.noise_loss("eval", label), guided.recorded["eval_loss"])


# -------------------------------------------------------------------------------------- 1e losses


@pytest.mark.parametrize("kind", ["binary", "soft"])
def test_mask_losses(kind):
    recorded = arrays("diffusionad_1e_losses")
    prediction = torch.tensor(recorded["pred"], requires_grad=True)
    mask = torch.tensor(recorded[f"mask_{kind}"])
    focal = focal_loss(prediction, mask)
    close(focal, recorded[f"focal_elem_{kind}"])
    close(focal.mean(), recorded[f"focal_{kind}"])
    loss = mask_loss(prediction, mask)
    close(loss - 5 * focal.mean(), recorded[f"smooth_l1_{kind}"])
    total = torch.tensor(recorded["noise_loss"]) + loss
    close(total, recorded[f"total_{kind}"])
    total.backward()
    close(prediction.grad, recorded[f"grad_total_{kind}"], atol=1e-6, rtol=1e-3)
    assert prediction.grad.isfinite().all()


# -------------------------------------------------------------------------------- 1g Perlin noise


def perlin_cases():
    """Names of the cases of 1g, such as "case3"."""
    recorded = arrays("diffusionad_1g_perlin")
    return [name.removesuffix("_noise") for name in recorded if name.endswith("_noise")]


@pytest.mark.parametrize("padding", [0, 3])
def test_perlin_noise_whatever_lies_beyond_its_own_lattice(padding):
    recorded = arrays("diffusionad_1g_perlin")
    cases = perlin_cases()
    assert cases
    for case in cases:
        uniform = np.pad(recorded[f"{case}_uniform"], (0, padding), constant_values=0.3)
        angles = torch.tensor(2 * np.pi * uniform)[None]
        cells = torch.tensor(recorded[f"{case}_res"])[None]
        found = perlin_noise(angles, cells, *recorded[f"{case}_shape"].tolist())
        close(found[0], recorded[f"{case}_noise"], atol=1e-10, rtol=0)


def test_perlin_noise_of_a_batch_with_different_lattices():
    recorded = arrays("diffusionad_1g_perlin")
    batches = defaultdict(list)
    for case in perlin_cases():
        batches[tuple(recorded[f"{case}_shape"].tolist())].append(case)
    for shape, cases in batches.items():
        points = max(max(recorded[f"{case}_uniform"].shape) for case in cases)
        angles = torch.zeros(len(cases), points, points, dtype=torch.float64)
        for angle, case in zip(angles, cases, strict=True):
            uniform = recorded[f"{case}_uniform"]
            angle[: uniform.shape[0], : uniform.shape[1]] = torch.tensor(2 * np.pi * uniform)
        cells = torch.tensor(np.stack([recorded[f"{case}_res"] for case in cases]))
        found = perlin_noise(angles, cells, *shape)
        close(found, np.stack([recorded[f"{c}_noise"] for c in cases]), atol=1e-10, rtol=0)


# ------------------------------------------------------------------------ 1i synthetic anomalies


def resize_as_opencv(image, height, width):
    """Bilinear resize of uint8 (H, W, 3) with OpenCV's integer arithmetic."""

    def neighbours(source, target):
        position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
        first = position.astype(int)
        weight = np.rint((position - first) * 2048).astype(int)
        return first, (first + 1).clip(max=source - 1), 2048 - weight[:, None], weight[:, None]

    left, right, a, b = neighbours(image.shape[1], width)
    image = image.astype(int)
    rows = (image[:, left] * a + image[:, right] * b) >> 4
    up, down, a, b = neighbours(image.shape[0], height)
    return ((a[..., None] * rows[up] >> 16) + (b[..., None] * rows[down] >> 16) + 2) >> 2


def as_tensor(image):
    """(H, W, C) in 0..255 to (1, C, H, W) in [0, 1]."""
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("mode", ["normal", "texture_class", "object_texture", "object_self"])
def test_synthetic_anomaly(mode):
    recorded = arrays("diffusionad_1i_synthesis")
    image = as_tensor(recorded["image_u8"])
    height, width = image.shape[-2:]
    draws = recorded[f"{mode}_rand"]
    label = float(draws[0] <= 0.5)
    source, mask = torch.zeros_like(image), torch.zeros(1, 1, height, width)
    if label:
        cells = torch.tensor(2 ** recorded[f"{mode}_log2res"])[None]
        angles = torch.tensor(2 * np.pi * recorded[f"{mode}_uniform"])[None]
        noise = perlin_noise(angles, cells, height, width)[:, None]
        mask = (noise > 0.5) * torch.tensor(recorded["foreground"])
        if f"{mode}_shuffle0" in recorded:
            orders = [recorded[name] for name in numbered(recorded, rf"{mode}_shuffle(\d+)")]
            source = shuffle_strips(image, None, 8, [torch.tensor(order) for order in orders])
        else:
            source = as_tensor(resize_as_opencv(recorded["texture_u8"], height, width))
    beta = torch.full((1, 1, 1, 1), 0.2 + 0.6 * float(draws[-1]))
    found = blend(image, source, mask, beta)
    close(found[0].permute(1, 2, 0), recorded[f"{mode}_augmented"])
    close(mask[0].permute(1, 2, 0), recorded[f"{mode}_mask"], atol=1e-6, rtol=0)
    assert label == recorded[f"{mode}_label"].item()


# --------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(
    ("official", "build", "convert", "count"),
    [
        ("unet_256_base128", lambda: Denoiser(adm_unet()), denoiser_state, "unet"),
        ("seg_base64", SegmentationNet, segmenter_state, "seg"),
    ],
)
def test_every_weight_of_the_released_networks_has_its_place(official, build, convert, count):
    recorded = json.loads((FOLDER / "diffusionad_names_official.json").read_text())
    with torch.device("meta"):
        net = build()
        theirs = {name: torch.empty(shape) for name, shape in recorded[official].items()}
    converted = {name: value.shape for name, value in convert(theirs).items()}
    assert converted == {name: value.shape for name, value in net.state_dict().items()}
    joint = sum("to_qkv" in name for name in theirs)  # one weight there is three here
    assert len(converted) == len(theirs) + 2 * joint
    assert sum(p.numel() for p in net.parameters()) == recorded["n_params"][count]
