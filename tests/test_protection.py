"""What gradient projection memory costs, counted without memory."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffad_ref.gradient_projection
from diffad_ref.gradient_projection import (
    GradientProjectionMemory,
    project,
    representation,
    square_of,
)
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools.protection import memory_bill, protection


def test_the_memory_bill_counts_the_columns_that_representations_have():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Flatten(), nn.Linear(64, 5))
    layers, x = GradientProjectionMemory(network).layers, torch.zeros(1, 2, 8, 8)
    found = memory_bill(layers, lambda: network(x), images=10)
    bill = {row["layer"]: row for row in found}
    assert bill["0"]["columns"] == representation(network[0], x).shape[1] == 16
    assert bill["0"]["plain"] == 18 * 16 * 10 * 4
    assert bill["0"]["iterative"] == 18 * (16 + 18) * 4
    assert bill["2"]["features"] == 64 and bill["2"]["columns"] == 1
    assert bill["2"]["square"] == 64 * 64 * 8 and bill["2"]["memory"] == 64 * 32 * 4
    for name, layer in layers.items():
        step, half = layer.weight.detach(), bill[name]["features"] // 2
        with FlopCounterMode(display=False) as counted:
            project(step, torch.zeros(bill[name]["features"], half))
        assert bill[name]["flops"] == counted.get_total_flops()


def test_protection_is_counted_layer_by_layer():
    with torch.device("meta"):
        detector = OneForMore.tiny(image_size=32, width=8, window=(3, 3), condition_layers=1)
    found, squares, weights = protection(detector), [], 0
    for layer in GradientProjectionMemory(detector).layers.values():
        features = layer.weight[0].numel()
        squares.append(features**2)
        weights += layer.weight.numel() * (features // 2)
    assert found.square_bytes == 8 * sum(squares) and found.passes == 1
    assert found.decompose_flops == pytest.approx(9 * sum(n**1.5 for n in squares))
    assert found.project_flops == 2 * 4 * weights
    assert found.square_double == found.square_flops  # no layer here is large
    assert found.decompose_double == found.decompose_flops


def test_large_layers_are_not_float64(monkeypatch):
    with torch.device("meta"):
        detector = OneForMore.tiny(image_size=32, width=8, window=(3, 3), condition_layers=1)
    monkeypatch.setattr(diffad_ref.gradient_projection, "LARGE", 100)
    layers = GradientProjectionMemory(detector).layers.values()
    double = [x.weight[0].numel() for x in layers if square_of(x, "meta").dtype is torch.float64]
    found = protection(detector)
    assert found.decompose_double == sum(9 * n**3 for n in double)
    assert 0 < found.square_double < found.square_flops
