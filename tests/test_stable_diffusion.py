"""What One-for-More takes from Stable Diffusion, from a small pipeline in a folder."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffad_ref.backbones import ControlledUNet
from diffad_ref.codecs import CodecConfig
from diffad_ref.one_for_more import Config, OneForMore
from diffad_ref.stable_diffusion import empty_prompt, start_from_stable_diffusion

SMALL = {"channels": 4, "width": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2}
TOKENS, CONTEXT = 7, 12


def small_unet(prompt=(TOKENS, CONTEXT), **changes):
    return ControlledUNet(**SMALL | changes, prompt=prompt, norm_groups=4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folders as `StableDiffusionPipeline.save_pretrained` writes them, with random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipeline")
    small_unet().unet.save_pretrained(root / "unet")
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


def test_empty_prompt_is_what_the_text_encoder_says_to_a_start_and_ends(pipeline):
    encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(torch.tensor([[1] + [2] * (TOKENS - 1)])).last_hidden_state
    assert torch.equal(empty_prompt(pipeline), expected)


def test_start_takes_over_every_weight_of_the_network_and_the_prompt(pipeline):
    unet = small_unet()
    start_from_stable_diffusion(unet, pipeline)
    loaded = UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in unet.unet.state_dict().items())
    assert torch.equal(unet.prompt, empty_prompt(pipeline))


def detector(pipeline):
    codec = CodecConfig(
        pretrained=str(pipeline), subfolder="vae", factor=2, widths=(8, 16), layers=1, norm_groups=4
    )
    tiny = Config.tiny(32, width=8, heads=2, norm_groups=4, prompt=(TOKENS, CONTEXT), blocks=1)
    strides = (1, 1, 2, 1, 1, 1, 1, 1)
    changes = {"start": str(pipeline), "codec": codec, "condition_strides": strides}
    return OneForMore(replace(tiny, **changes))


def test_detector_is_prepared_from_a_pipeline_once_and_keeps_what_it_learns(pipeline):
    cdad = detector(pipeline)
    cdad.prepare(None)
    with torch.no_grad():
        cdad.unet.unet.conv_in.weight.add_(1)
    before = {name: value.clone() for name, value in cdad.state_dict().items()}
    cdad.prepare(None)  # as at the start of the next task
    assert all(torch.equal(value, before[name]) for name, value in cdad.state_dict().items())
    prediction = cdad.predict(torch.rand(2, 3, 32, 32))
    assert prediction.anomaly_map.isfinite().all()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer"])
def test_missing_part_of_a_pipeline_is_named(pipeline, tmp_path, part):
    for folder in pipeline.iterdir():
        if folder.name != part:
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(FileNotFoundError, match=f"no {part} in '{tmp_path}'"):
        start_from_stable_diffusion(small_unet(), tmp_path)


def test_prompt_and_network_of_another_size_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"has \(7, 12\) tokens and channels.*for \(8, 12\)"):
        start_from_stable_diffusion(small_unet((8, CONTEXT)), pipeline)
    with pytest.raises(ValueError, match="is another than ours"):
        start_from_stable_diffusion(small_unet(width=16), pipeline)


def test_autoencoder_of_a_pipeline_without_its_folder_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no autoencoder: config.json"):
        from diffad_ref.codecs import KLCodec

        KLCodec.from_pretrained(tmp_path, "vae")
