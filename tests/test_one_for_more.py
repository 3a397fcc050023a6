"""One-for-More: where it starts, its training loss, its walk with perfect networks, its maps."""

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffad_ref import one_for_more
from diffad_ref.anomalies import crop_textures, texture_bank
from diffad_ref.checkpoints import SHIPPED, load, read_tensors, save
from diffad_ref.codecs import CodecConfig
from diffad_ref.detector import Rate, Stage
from diffad_ref.diffusion import Draw, add_noise, ddim_times, implied_noise
from diffad_ref.networks import stable_diffusion
from diffad_ref.one_for_more import Config, ControlledUNet, OneForMore, Pasting, learns
from diffad_ref.training import fit

SMALL = Config.tiny(
    32,
    start=None,
    width=8,
    norm_groups=4,
    window=(3, 3),
    feed_forward=16,
    condition_layers=1,
    walk=2,
    pasting=Pasting(share=1.0),
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@lru_cache
def photographs(count=60, seed=0):
    return crop_textures(texture_bank(), count, 32, seeded(seed))


def samples(count=60, seed=0):
    return [{"image": image} for image in photographs(count, seed)]


def build(seed=0, **changes):
    """A small detector whose codec and features have learned from photographs."""
    torch.manual_seed(seed)
    detector = OneForMore(replace(SMALL, **changes))
    detector.prepare(samples())
    return detector.eval()


def started():
    """One that has learned before, like the profiles' own."""
    detector = build()
    detector.config = replace(SMALL, start="folder")
    detector.unet.prompt.fill_(1)  # as if it had been read from there
    detector.enter(detector.stages[-1])
    return detector


def images(count=2):
    return photographs(20, 1)[:count]


def batch_of(count=4):
    return {"image": images(count)}


def unchanged(detector, before):
    """Whether all weights are those that were kept in `before`."""
    return all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def kept(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


# ------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition_strides": (1, 1, 2, 1, 2, 1, 2, 1)}, "product of condition_strides must be 4"),
        ({"image_size": 36}, "image_size must be a multiple of 8, not 36"),
        ({"image_size": 40, "multipliers": (1, 1, 1)}, "must be a multiple of 16, not 40"),
        ({"multipliers": (2, 2)}, "multipliers begin with 1, as the condition"),
        ({"window": (10**30, 1)}, "should be less than 2147483648"),
        ({"sigma": 1e308}, "should be less than or equal to 1000"),
        ({"predicts": "velocity"}, "should be 'noise' or 'latent'"),
        ({"features": "vgg"}, "of a timm model"),
        ({"pasting": {"source": "sky"}}, "should be 'batch', 'class' or 'itself'"),
        ({"schedule": "square"}, "unknown schedule 'square'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        OneForMore(replace(SMALL, **changes))


@pytest.mark.parametrize("walk", [0, 3, 9, 27, 1000, 1001])
def test_number_of_steps_that_leaves_the_schedule_is_refused(walk):
    """Every 333rd step of 1000, counted from 1, would end at step 1000: one too far."""
    with pytest.raises(ValueError, match=rf"1000.*{walk}|{walk}.*1000|equal to 1"):
        OneForMore(replace(SMALL, walk=walk))


def test_published_size_has_the_published_numbers_of_weights():
    with torch.device("meta"):
        detector = OneForMore.paper()
    assert sum(p.numel() for p in detector.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in detector.condition.parameters()) == 9_641_656


# ------------------------------------------------------------------------------------ what learns


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("unet.conv_in.weight", (8, 4, 3, 3), True),
        ("unet.conv_in.bias", (8,), False),
        ("unet.mid_block.attentions.0.norm.weight", (8,), False),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", (8, 8), True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight", (8, 32), True),
        ("unet.time_embedding.linear_1.weight", (32, 8), False),
        ("unet.mid_block.resnets.0.time_emb_proj.weight", (8, 32), False),
        ("unet.mid_block.resnets.0.conv1.weight", (8, 8, 3, 3), True),
    ],
)
def test_weights_of_convolutions_and_attention_learn_and_nothing_else(name, shape, expected):
    assert learns(name, nn.Parameter(torch.zeros(shape))) is expected


def test_parts_that_a_stage_does_not_name_are_frozen():
    detector = started()
    assert not any(p.requires_grad for p in detector.extractor.parameters())
    assert all(p.requires_grad for p in detector.condition.parameters())
    detector.enter(Stage("condition", 1, 1, {"condition": Rate(1e-3)}))
    assert not any(p.requires_grad for p in detector.unet.parameters())
    detector.enter(Stage("unet", 1, 1, {"unet": Rate(1e-3)}))
    assert not any(p.requires_grad for p in detector.condition.parameters())
    learning = {n for n, p in detector.unet.named_parameters() if p.requires_grad}
    assert learning and not any("bias" in n or "norm" in n or "time_emb" in n for n in learning)


def test_network_that_starts_from_scratch_learns_all_of_its_weights():
    assert all(p.requires_grad for p in build().unet.parameters())


def test_training_leaves_codec_features_and_frozen_weights_as_they_are():
    detector = started()
    before = kept(detector)
    fit(detector, samples(4), 2, 2, progress=False, device="cpu")
    moved = {n for n, value in detector.state_dict().items() if not torch.equal(value, before[n])}
    frozen = {name for name, p in detector.named_parameters() if not p.requires_grad}
    assert not moved & frozen
    assert not any(name.startswith(("codec", "extractor")) for name in moved)
    assert {"unet.unet.conv_in.weight", "condition.convolutions.0.weight"} <= moved


# --------------------------------------------------------------------------------------- the loss


def test_loss_is_the_weighted_sum_of_its_two_parts():
    detector = build(masked_weight=3.0)
    losses = detector.training_loss(batch_of(), seeded())
    assert set(losses) == {"loss", "noise", "masked"}
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    plain = build().training_loss(batch_of(), seeded())
    for found, weight in ((losses, 3), (plain, 1)):
        total = found["noise"] + weight * found["masked"]
        assert found["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert losses["noise"] == plain["noise"] and losses["masked"] == plain["masked"]


@pytest.mark.parametrize("part", ["noise", "masked"])
def test_condition_learns_from_both_losses_and_the_unet_from_one(part):
    detector = build()
    detector.training_loss(batch_of(), seeded())[part].backward()
    assert all(p.grad is not None and p.grad.any() for p in detector.condition.parameters())
    reached = [p.grad is not None for p in detector.unet.parameters()]
    assert any(reached) is (part == "noise")


def test_biases_norms_and_time_layers_of_the_unet_get_no_gradient():
    detector = started()
    detector.training_loss(batch_of(), seeded())["loss"].backward()
    for name, parameter in detector.unet.named_parameters():
        assert (parameter.grad is not None) is learns(name, parameter), name


def test_condition_sees_the_pasted_image_and_its_features_the_clean_one(monkeypatch):
    detector, seen = build(), []
    pasted, features = torch.rand(4, 3, 32, 32), detector.condition.features
    monkeypatch.setattr(one_for_more, "paste", lambda *rest: pasted)
    monkeypatch.setattr(detector.condition, "features", lambda x: seen.append(x) or features(x))
    detector.training_loss(batch_of(), seeded())
    assert len(seen) == 2  # within the condition, and for the masked loss
    assert torch.equal(seen[0], pasted) and torch.equal(seen[1], batch_of()["image"])


@pytest.mark.parametrize("predicts", ["latent", "noise"])
def test_unet_that_knows_the_clean_latent_has_no_loss(monkeypatch, predicts):
    """Of the image without patches, whatever the condition shows."""
    detector = build(predicts=predicts)
    z_0 = detector.codec.encode(batch_of()["image"])

    def exact(z_t, t, condition):
        if predicts == "latent":
            return z_0
        return implied_noise(z_t, z_0, detector.schedule.at(t))

    monkeypatch.setattr(detector.unet, "forward", exact)
    assert detector.training_loss(batch_of(), seeded())["noise"].item() < 1e-4


def test_training_visits_all_time_steps(monkeypatch):
    detector, seen = build(), []
    monkeypatch.setattr(detector.unet, "forward", lambda z, t, c: seen.extend(t.tolist()) or z)
    with torch.no_grad():
        for seed in range(15):
            detector.training_loss(batch_of(20), seeded(seed))
    assert min(seen) < 20 and max(seen) > 979 and len(set(seen)) > 200


# --------------------------------------------------------------------------------------- the walk


def calls(detector, monkeypatch):
    """The latents and time steps that the U-Net is asked about."""
    seen, real = [], detector.unet.forward

    def forward(z, t, condition):
        seen.append((z, t))
        return real(z, t, condition)

    monkeypatch.setattr(detector.unet, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("walk", "by"), [(1, "config"), (2, "config"), (7, "config"), (5, "argument")]
)
def test_unet_is_called_once_a_step_and_the_condition_once_a_walk(monkeypatch, walk, by):
    """No doubled batch either: there is no guidance."""
    own, argument = ({"walk": walk} if by == where else {} for where in ("config", "argument"))
    detector, conditions = build(**own), []
    detector.condition.register_forward_hook(lambda *rest: conditions.append(1))
    seen, times = calls(detector, monkeypatch), ddim_times(1000, walk)
    x = images(3)
    states = detector.reconstruct(x, detector.codec.encode(x), seeded(), **argument)
    assert len(states) == len(seen) == len(times) and len(conditions) == 1
    assert [t.tolist() for _, t in seen] == [[time] * 3 for time in times]
    assert all(state.shape == (3, 12, 8, 8) for state in states)


def noise_like(z):
    return Draw(seeded()).normal(*z.shape)


@pytest.mark.parametrize(
    ("level", "walk", "expected"), [(None, None, 501), (None, 10, 901), (999, None, 999), (0, 5, 0)]
)
def test_walk_starts_from_the_level_of_the_config_or_its_first_step(
    monkeypatch, level, walk, expected
):
    detector, x = build(level=level), images(2)
    z_0, seen = detector.codec.encode(x), calls(detector, monkeypatch)
    detector.reconstruct(x, z_0, seeded(), walk)
    noisy = add_noise(z_0, noise_like(z_0), detector.schedule.abar[expected].float())
    assert torch.allclose(seen[0][0], noisy, atol=1e-6)


def test_walk_ends_at_the_estimate_or_as_released_at_the_first_level(monkeypatch):
    estimate, found = torch.randn(2, 12, 8, 8, generator=seeded()), []
    for end_clean in (True, False):
        detector = build(end_clean=end_clean)
        monkeypatch.setattr(detector.unet, "forward", lambda z, t, condition: estimate)
        found.append(detector.reconstruct(images(), estimate, seeded())[-1])
    assert torch.allclose(found[0], estimate, atol=1e-4)
    noise, abar = noise_like(estimate), detector.schedule.abar[0].float()
    assert torch.allclose(found[1], add_noise(estimate, noise, abar), atol=1e-3)


def test_noise_is_what_the_unet_puts_out_or_what_its_latent_implies():
    z_t, t = torch.randn(2, 12, 8, 8, generator=seeded()), torch.tensor([10, 900])
    with torch.no_grad():
        for predicts in ("noise", "latent"):
            detector = build(predicts=predicts)
            condition = detector.condition(images(2))
            noise, output = detector.noise(z_t, t, condition), detector.unet(z_t, t, condition)
            if predicts == "noise":
                assert torch.equal(noise, output)
            else:
                again = add_noise(output, noise, detector.schedule.at(t))
                assert torch.allclose(again, z_t, atol=1e-5)


def test_condition_reaches_the_reconstruction():
    detector, x = build(), images(2)
    z_0 = detector.codec.encode(x)
    found = [detector.reconstruct(c, z_0, seeded())[-1] for c in (x, x.flip(0))]
    assert not torch.allclose(*found, atol=1e-4)


# ------------------------------------------------------------------------------------- prediction


def test_prediction_has_the_shapes_and_ranges_of_the_contract():
    found = build().predict(images(3))
    assert found.anomaly_map.shape == (3, 32, 32) and found.score.shape == (3,)
    assert found.reconstruction.shape == found.parts["decoded"].shape == (3, 3, 32, 32)
    assert torch.equal(found.score, found.anomaly_map.flatten(1).amax(1))
    assert found.anomaly_map.min() >= 0 and not found.anomaly_map.requires_grad
    for rebuilt in (found.reconstruction, found.parts["decoded"]):
        assert 0 <= rebuilt.min() and rebuilt.max() <= 1


def test_another_seed_gives_another_prediction():
    detector = build()
    a, b = (detector.predict(images(), generator=seeded(s)).anomaly_map for s in (0, 1))
    assert not torch.equal(a, b)


def test_category_index_is_not_looked_at():
    detector = build()
    found = [detector.predict(images(), c) for c in (None, torch.tensor([0, 1]), "anything")]
    assert torch.equal(found[0].anomaly_map, found[1].anomaly_map)
    assert torch.equal(found[0].anomaly_map, found[2].anomaly_map)


def test_perfect_unet_finds_no_defect(monkeypatch):
    detector, x = build(), images(2)
    z_0 = detector.codec.encode(x)
    monkeypatch.setattr(detector.unet, "forward", lambda z, t, condition: z_0)
    found = detector.predict(x)
    assert torch.allclose(found.reconstruction, found.parts["decoded"], atol=1e-3)
    assert found.score.max() < 0.05


def test_unet_that_rebuilds_the_normal_image_finds_the_defect_where_it_is(monkeypatch):
    detector, x = build(), images(2)
    z_0, defective = detector.codec.encode(x), x.clone()
    defective[..., 8:16, 20:28] = 1 - defective[..., 8:16, 20:28]
    monkeypatch.setattr(detector.unet, "forward", lambda z, t, condition: z_0)
    for heat in detector.predict(defective).anomaly_map:
        row, column = divmod(heat.argmax().item(), 32)
        assert 6 <= row <= 18 and 18 <= column <= 30
        assert heat[8:16, 20:28].mean() > 5 * heat[24:, :12].mean()


def test_map_is_zero_for_equal_images_and_the_same_in_both_directions():
    detector, (a, b) = build(), images(2).unsqueeze(1)
    assert not detector.compare(a, a).any()
    assert torch.allclose(detector.compare(a, b), detector.compare(b, a))


def test_smoothing_spreads_the_map():
    a, b = images(2).unsqueeze(1)
    sharp, smooth = (build(sigma=sigma).compare(a, b) for sigma in (0.0, 4.0))
    assert smooth.std() < sharp.std() and smooth.max() < sharp.max()


def test_saved_detector_predicts_as_before(tmp_path):
    detector = build(window=None, level=999)
    detector.categories = ("brick", "gear")
    save(detector, tmp_path / "weights")
    loaded = load(tmp_path / "weights", method="OneForMore")
    assert loaded.config == detector.config and loaded.categories == ("brick", "gear")
    found = [d.predict(images(), generator=seeded()).anomaly_map for d in (detector, loaded)]
    assert torch.equal(*found)


# --------------------------------------------------------------------------------- where it starts


def test_detector_must_be_prepared_before_it_predicts_or_learns():
    torch.manual_seed(0)
    detector = OneForMore(SMALL)
    for use in (lambda: detector.predict(images()), lambda: detector(batch_of())):
        with pytest.raises(ValueError, match="the codec knows nothing yet: call prepare"):
            use()


def test_from_scratch_codec_and_features_learn_from_the_first_task_alone():
    detector = build()
    before = kept(detector)
    detector.prepare(samples(60, 2))  # the second
    assert unchanged(detector, before)
    torch.manual_seed(0)
    other = OneForMore(SMALL)
    other.prepare(samples(60, 2))
    assert not torch.allclose(other.codec.components, detector.codec.components, atol=1e-3)
    assert not torch.allclose(other.extractor.filters, detector.extractor.filters, atol=1e-3)
    assert torch.equal(other.unet.unet.conv_in.weight, detector.unet.unet.conv_in.weight)


def test_tiny_profile_starts_from_shipped_photographs_and_then_keeps_what_it_learns():
    """Whatever the data of its first task are."""
    detector = OneForMore.tiny()
    detector.prepare([{"image": torch.rand(3, 64, 64)}])
    shipped = read_tensors(SHIPPED / "one_for_more_photographs.safetensors")
    for name, value in detector.state_dict().items():
        assert torch.equal(value, shipped[name].to(value.dtype)), name
    with torch.no_grad():
        detector.unet.unet.conv_in.weight.add_(1)
    before = kept(detector)
    detector.prepare(None)  # as at the start of the next task
    assert unchanged(detector, before)


def test_photographs_fit_no_other_network():
    with pytest.raises(ValueError, match="start=None begins from scratch.* of another shape"):
        OneForMore.tiny(width=16).prepare(samples(2))


TOKENS, CONTEXT = 7, 12


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folders as `StableDiffusionPipeline.save_pretrained` writes them, with random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipeline")
    unet = ControlledUNet(4, 8, (1, 2), 1, 2, (TOKENS, CONTEXT), norm_groups=4).unet
    unet.save_pretrained(root / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(root / "vae")
    words = root / "words"
    words.mkdir()
    vocabulary = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"))
    tokenizer.save_pretrained(root / "tokenizer")
    encoder = CLIPTextConfig(
        vocab_size=3,
        hidden_size=CONTEXT,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
    )
    CLIPTextModel(encoder).save_pretrained(root / "text_encoder")
    return root


def from_pipeline(root, **changes):
    """A detector that starts from a pipeline and whose codec is the pipeline's, too."""
    codec = CodecConfig(
        pretrained=str(root), subfolder="vae", factor=2, widths=(8, 16), layers=1, norm_groups=4
    )
    strides = (1, 1, 2, 1, 1, 1, 1, 1)
    changes = {"heads": 2, "prompt": (TOKENS, CONTEXT), "window": (7, 7)} | changes
    torch.manual_seed(1)
    return OneForMore(
        replace(SMALL, start=str(root), codec=codec, condition_strides=strides, **changes)
    )


def test_state_of_a_pipeline_is_its_unet_and_what_its_text_encoder_says_to_a_start_and_ends(
    pipeline,
):
    found = stable_diffusion(pipeline)
    encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(torch.tensor([[1] + [2] * (TOKENS - 1)])).last_hidden_state
    assert torch.equal(found.pop("prompt"), expected)
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
    assert found.keys() == {f"unet.{name}" for name in unet}
    assert all(torch.equal(value, found[f"unet.{name}"]) for name, value in unet.items())


def test_detector_starts_from_a_pipeline_once_and_keeps_what_it_learns(pipeline):
    detector = from_pipeline(pipeline)
    detector.prepare(samples())
    found = detector.unet.state_dict()
    expected = stable_diffusion(pipeline)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with torch.no_grad():
        detector.unet.unet.conv_in.weight.add_(1)
    before = kept(detector)
    detector.prepare(samples(60, 2))  # as at the start of the next task
    assert unchanged(detector, before)
    assert detector.predict(images()).anomaly_map.isfinite().all()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer"])
def test_missing_part_of_a_pipeline_is_named(pipeline, tmp_path, part):
    for folder in pipeline.iterdir():
        if folder.name != part:
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(FileNotFoundError, match=f"no {part} in '{tmp_path}'"):
        stable_diffusion(tmp_path)


@pytest.mark.parametrize("changes", [{"prompt": (8, CONTEXT)}, {"width": 16}, {"blocks": 2}])
def test_pipeline_of_another_size_is_refused(pipeline, changes):
    with pytest.raises(ValueError, match="weights in Stable Diffusion .* do not fit"):
        from_pipeline(pipeline, **changes).prepare(samples(2))


def test_pipeline_without_its_autoencoder_is_named(pipeline, tmp_path):
    for folder in pipeline.iterdir():
        if folder.name != "vae":
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(FileNotFoundError, match=f"no autoencoder in '{tmp_path}'"):
        from_pipeline(tmp_path).prepare(samples(2))
