"""The anomaly-masked network: what a token may see of itself, and what the mask refuses."""

import math

import pytest
import torch
from torch import nn

from diffad_ref.anomaly_masked import (
    AnomalyMaskedNetwork,
    MaskedEncoderLayer,
    anomaly_masked_loss,
    neighbour_mask,
    sine_positions,
)


def network(window=(7, 7), layers=1, seed=0, **changes):
    """The paper's convolutions, with fewer channels: latents of 1/8, as with its autoencoder."""
    torch.manual_seed(seed)
    settings = {"width": 8, "heads": 2, "feed_forward": 16, "channels": (4,) * 7} | changes
    net = AnomalyMaskedNetwork(layers=layers, window=window, **settings).double().eval()
    for convolution in net.convolutions[::2]:
        nn.init.kaiming_normal_(convolution.weight)  # or what a pixel says would die out
    return net


def images(count=1, size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


# -------------------------------------------------------------------------------------- the mask


def test_mask_forbids_the_window_around_each_place_and_the_place_itself():
    height, width, mask = 9, 11, neighbour_mask(9, 11, (5, 3))
    for place in range(height * width):
        y, x = divmod(place, width)
        forbidden = {
            v * width + u
            for v in range(max(0, y - 2), min(height, y + 3))
            for u in range(max(0, x - 1), min(width, x + 2))
        }
        hidden = (mask[place] == -math.inf).nonzero().flatten().tolist()
        assert set(hidden) == forbidden and place in forbidden
    assert set(mask.unique().tolist()) == {-math.inf, 0}


@pytest.mark.parametrize(("even", "odd"), [((4, 6), (5, 7)), ((2, 2), (3, 3)), ((0, 0), (1, 1))])
def test_even_window_acts_like_the_next_odd_one(even, odd):
    assert torch.equal(neighbour_mask(9, 9, even), neighbour_mask(9, 9, odd))


@pytest.mark.parametrize(("side", "window"), [(3, (7, 7)), (6, (7, 7)), (7, (7, 7)), (5, (9, 5))])
def test_window_that_hides_everything_from_some_place_is_refused(side, window):
    words = rf"\({window[0]}, {window[1]}\) hides the whole grid of {side} x {side}"
    with pytest.raises(ValueError, match=words):
        neighbour_mask(side, side, window)


def test_smallest_grid_for_a_window_lets_every_place_see_something():
    mask = neighbour_mask(8, 8, (7, 7))
    assert (mask == 0).any(1).all()
    assert (mask[8 * 3 + 3] == 0).sum() == 15  # from next to the middle: a row and a column


def test_network_on_an_image_that_is_too_small_for_its_window_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 7\) hides the whole grid of 4 x 4"):
        network()(images(size=32))
    assert network(window=None)(images(size=32)).isfinite().all()


# ------------------------------------------------------------------------------- what a token sees


def watched(net, x, name):
    """What a linear layer of the first attention says of each token (12, 12, C)."""
    seen = []
    layer = getattr(net.encoder[0], name)
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        net(x)
    hook.remove()
    return seen[0].unflatten(0, (12, 12))


def with_another_pixel(x, place):
    other = x.clone()
    other[0, :, place[0], place[1]] = 1 - other[0, :, place[0], place[1]].round()
    return other


@pytest.mark.parametrize("pixel", [(40, 48), (47, 55), (43, 50), (0, 0), (95, 95)])
def test_pixel_of_a_token_moves_no_key_and_no_value_that_the_token_may_see(pixel):
    """The convolutions carry a pixel three tokens far at most: as far as the window hides."""
    net, x = network(), images()
    row, column = (place // 8 for place in pixel)
    seen = neighbour_mask(12, 12, (7, 7))[12 * row + column].view(12, 12) == 0
    for name in ("to_k", "to_v"):
        before, after = (watched(net, v, name) for v in (x, with_another_pixel(x, pixel)))
        moved = (before != after).any(-1)
        assert moved[row, column] and not (moved & seen).any()


def test_pixel_reaches_the_attention_of_its_token_through_the_question_alone():
    """With one question for all, nothing of its own window is left in what a token hears."""
    x, pixel = images(), (43, 50)
    for window, same in (((7, 7), True), (None, False)):
        net = network(window)
        nn.init.zeros_(net.encoder[0].to_q.weight)
        nn.init.zeros_(net.encoder[0].to_q.bias)
        before, after = (watched(net, v, "to_out") for v in (x, with_another_pixel(x, pixel)))
        assert torch.allclose(before[5, 6], after[5, 6], rtol=0, atol=1e-12) is same
        assert not torch.allclose(before[0, 0], after[0, 0], rtol=0, atol=1e-9)  # it sees it


def test_token_keeps_its_own_features_on_the_way_around_attention():
    """The residual: at its own token a pixel still makes the largest difference."""
    net, x = network(), images()
    with torch.no_grad():
        change = net(with_another_pixel(x, (43, 50))) - net(x)
    row, column = divmod(change[0].norm(dim=0).argmax().item(), 12)
    assert abs(row - 5) <= 1 and abs(column - 6) <= 1


def test_layer_does_not_hear_its_neighbours():
    torch.manual_seed(0)
    layer, x, positions = MaskedEncoderLayer(4, 1, 8, 0.0).eval(), torch.randn(1, 64, 4), 0.0
    mask, other = neighbour_mask(8, 8, (3, 3)), x.clone()
    place = 8 * 4 + 4
    near = (mask[place] != 0).nonzero().flatten()
    other[:, near[near != place]] += 1
    with torch.no_grad():
        before, after = layer(x, positions, mask), layer(other, positions, mask)
        assert torch.allclose(before[0, place], after[0, place], atol=1e-6)
        free = layer(x, positions, None), layer(other, positions, None)
        assert not torch.allclose(free[0][0, place], free[1][0, place], atol=1e-3)


def test_attention_mixes_the_tokens_that_it_may_see_by_their_similarity():
    """One head, by hand; values do not know their places."""
    torch.manual_seed(0)
    layer, x = MaskedEncoderLayer(4, 1, 8, 0.0).eval(), torch.randn(1, 16, 4)
    positions, mask, seen = sine_positions(4, 4, 4), neighbour_mask(4, 4, (3, 3)), []
    layer.to_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        layer(x, positions, mask)
        q, k, v = layer.to_q(x + positions)[0], layer.to_k(x + positions)[0], layer.to_v(x)[0]
    for place in range(16):
        allowed = mask[place] == 0
        weights = torch.softmax(k[allowed] @ q[place] / math.sqrt(4), 0)
        assert torch.allclose(seen[0][place], weights @ v[allowed], atol=1e-5)


def test_window_none_is_attention_without_a_mask():
    """And differs from every window; the weights are the same."""
    x, nets = images(), [network(window) for window in (None, (1, 1), (7, 7))]
    assert len({tuple(net.state_dict()) for net in nets}) == 1
    with torch.no_grad():
        found = [net(x) for net in nets]
        nets[0].load_state_dict(nets[1].state_dict())
        assert torch.equal(nets[0](x), found[0])
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[1], found[2], atol=1e-4)


def test_second_layer_carries_what_the_window_hides_back_to_its_token():
    """The mask holds within a layer; a detour over far places stays open."""
    net, x = network(layers=2), images()
    nn.init.zeros_(net.encoder[1].to_q.weight)  # no question: what changes was heard
    seen = []
    net.encoder[1].to_out.register_forward_hook(lambda module, i, output: seen.append(output[0]))
    with torch.no_grad():
        net(x)
        net(with_another_pixel(x, (43, 50)))
    assert not torch.allclose(seen[0][5 * 12 + 6], seen[1][5 * 12 + 6], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------- the whole


def test_condition_has_the_size_of_a_latent_and_the_width_of_the_first_level():
    with torch.no_grad():
        assert network()(images(2)).shape == (2, 8, 12, 12)
        assert network().features(images(2)).shape == (2, 8, 12, 12)
        strides = (1, 1, 2, 1, 2, 1, 1, 1)
        assert network((3, 3), strides=strides)(images(2, 32)).shape == (2, 8, 8, 8)


def test_images_need_not_be_square():
    with torch.no_grad():
        assert network()(images()[..., :64]).shape == (1, 8, 12, 8)


def test_dropout_acts_in_training_alone():
    net, x = network(dropout=0.5), images()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        assert not torch.allclose(net.train()(x), net.eval()(x))


def test_convolutions_have_no_bias_and_no_activation_after_the_last():
    net = network()
    convolutions = [m for m in net.convolutions if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 8 and all(m.bias is None for m in convolutions)
    assert net.convolutions[-1] is convolutions[-1]
    assert [type(m) for m in net.convolutions[1::2]] == [nn.SiLU] * 7


def test_published_size_has_the_published_number_of_weights():
    with torch.device("meta"):
        net = AnomalyMaskedNetwork()
    assert sum(p.numel() for p in net.parameters()) == 9_641_656


def test_number_of_strides_must_fit_the_number_of_convolutions():
    with pytest.raises(ValueError):
        network(strides=(1, 2, 2))


def test_positions_tell_all_places_apart_and_rows_come_first():
    positions = sine_positions(6, 7, 16).unflatten(0, (6, 7))
    distances = torch.cdist(positions.flatten(0, 1), positions.flatten(0, 1))
    assert distances.fill_diagonal_(1).min() > 0.05
    assert torch.equal(positions[:, 0, :8], positions[:, 6, :8])  # the row, in the first half
    assert torch.equal(positions[0, :, 8:], positions[5, :, 8:])


def test_loss_is_the_mean_square_and_pulls_on_both_sides():
    condition = torch.ones(1, 2, 3, 3, requires_grad=True)
    clean = torch.full((1, 2, 3, 3), 4.0, requires_grad=True)
    loss = anomaly_masked_loss(condition, clean)
    loss.backward()
    assert loss.item() == 9
    assert torch.allclose(condition.grad, torch.full((1, 2, 3, 3), -6 / 18))
    assert torch.allclose(clean.grad, torch.full((1, 2, 3, 3), 6 / 18))
