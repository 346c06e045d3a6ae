"""Weights in few bits: held to whole numbers worked out by hand, and to bounds."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch

from kdlib import models, phone
from kdlib.errors import ArgumentError
from kdlib.quantised import (
    FakeQuantised,
    dequantise,
    quantise,
    quantised,
    stored_bytes,
    straight_through,
)

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.fixture(scope="module")
def student():
    _, tokenizer = models.load("teacher")
    return models.build(tokenizer, **phone.STUDENT, seed=3).eval()


@pytest.fixture
def weight():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(7, 33, generator=rng, dtype=torch.float64)


# --- Whole numbers and scales ---


def test_whole_numbers_worked_out_by_hand():
    """3 bits: -4 to 3, seven steps, so s = max / 3.5 = 0.2 and 0.4 in the two rows.

    0.70 / 0.2 = 3.5 has no whole number above 3. -0.33 / 0.2 = -1.65.
    1.40 / 0.4 = 3.5 again; -1.4 / 0.4 = -3.5 is rounded to the even -4.
    """
    weight = torch.tensor([[0.70, -0.33, 0.09, 0.31], [1.40, -1.40, 0.50, -0.9]])
    whole, scale = quantise(weight.double(), 3)
    assert whole.tolist() == [[3, -2, 0, 2], [3, -4, 1, -2]]
    torch.testing.assert_close(
        scale, torch.tensor([[0.2], [0.4]], dtype=torch.float64), atol=1e-7, rtol=0
    )
    read = torch.tensor([[0.6, -0.4, 0.0, 0.4], [1.2, -1.6, 0.4, -0.8]]).double()
    torch.testing.assert_close(dequantise(whole, scale), read, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_weight_is_off_by_more_than_half_a_step(weight, bits):
    whole, scale = quantise(weight, bits)
    assert whole.dtype == torch.int8
    assert whole.min() >= -(2 ** (bits - 1)) and whole.max() <= 2 ** (bits - 1) - 1
    apart = (dequantise(whole, scale) - weight).abs()
    assert (apart <= scale / 2 * (1 + 1e-12)).all()
    assert (apart > scale / 4).any()  # the bound is not idle
    steps = weight.abs().amax(1) / scale[:, 0]
    torch.testing.assert_close(steps, torch.full_like(steps, (2**bits - 1) / 2))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_what_lies_on_the_grid_comes_back(bits):
    """Round trip: s k with every whole number, its largest weight half a step out."""
    whole = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).repeat(2, 1)
    scale = torch.tensor([[0.25], [3.0]], dtype=torch.float64)
    weight = whole * scale
    weight[:, 0] = -scale[:, 0] * (2**bits - 1) / 2  # read as the lowest, by rounding
    found, found_scale = quantise(weight, bits)
    torch.testing.assert_close(found_scale, scale)
    inner = slice(1, None)
    assert found[:, inner].tolist() == whole[:, inner].tolist()
    torch.testing.assert_close(
        dequantise(found, found_scale)[:, inner], weight[:, inner]
    )


def test_each_row_has_a_scale_of_its_own_and_zeros_stay_zeros(weight):
    weight[0] *= 1000
    weight[1] = 0
    whole, scale = quantise(weight, 4)
    others, other_scale = quantise(weight[2:], 4)
    assert whole[2:].tolist() == others.tolist()
    assert scale[2:].tolist() == other_scale.tolist()
    assert scale[1] == 1 and not whole[1].any()


@pytest.mark.parametrize("bits", (1, 9, 0))
def test_bits_that_do_not_exist_are_refused(weight, student, bits):
    for ask in (lambda: quantise(weight, bits), lambda: FakeQuantised(student, bits)):
        with pytest.raises(ArgumentError, match=f"bits={bits}(.|\n)*2 to 8"):
            ask()


def test_what_is_no_matrix_is_refused(weight):
    with pytest.raises(ArgumentError, match=r"\[7\]"):
        quantise(weight[:, 0], 8)


# --- The two int8 tools that chapter 13 measures, against the rule ---


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_torchao_s_weight_only_reads_the_same_weights(weight):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    for bits, kind in ((8, torch.int8), (4, torch.int4)):
        layer = torch.nn.Linear(33, 7, bias=False)
        layer.weight.data = weight.float()
        quantize_(layer, IntxWeightOnlyConfig(weight_dtype=kind))
        whole, scale = quantise(weight.float(), bits)
        assert layer.weight.qdata.tolist() == whole.tolist()
        torch.testing.assert_close(layer.weight.scale.view(-1, 1), scale)
        read = layer(torch.eye(33)).T
        torch.testing.assert_close(read, dequantise(whole, scale))


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_torchao_s_dynamic_int8_is_a_sum_of_whole_numbers(weight):
    """y = s t sum k m: weights and inputs both rounded by the rule, one scale a row."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    tokens = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Linear(33, 7, bias=False)
    layer.weight.data = weight.float()
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    k, s = quantise(weight.float(), 8)
    m, t = quantise(tokens, 8)
    by_hand = (m.long() @ k.long().T).float() * t * s.T
    # A number that lies half way may be rounded to either side: one step of an input.
    torch.testing.assert_close(layer(tokens), by_hand, atol=0.06, rtol=0)
    exact = tokens @ weight.float().T
    assert (by_hand - exact).abs().max() > 1e-3  # the two roundings are in it


# --- A whole model ---


def test_a_quantised_model_has_its_matrices_on_the_grid_and_its_norms_as_they_were(
    student,
):
    before = {name: p.clone() for name, p in student.named_parameters()}
    small = quantised(student, 3)
    for name, p in small.named_parameters():
        if p.dim() == 2:
            assert all(len(row.unique()) <= 8 for row in p[:20])
            assert not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name])
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    assert small.lm_head.weight is small.model.embed_tokens.weight  # still tied


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_fake_quantised_computes_what_the_quantised_model_computes(student, bits):
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        fake = FakeQuantised(student, bits)(ids, use_cache=False).logits
        real = quantised(student, bits)(ids, use_cache=False).logits
        plain = student(ids, use_cache=False).logits
    torch.testing.assert_close(fake, real, atol=1e-5, rtol=0)
    assert (fake - plain).abs().max() > (1e-2 if bits < 8 else 1e-5)


def test_straight_through_has_the_value_of_the_grid_and_the_slope_of_one(weight):
    weight = weight.requires_grad_()
    read = straight_through(weight, 3)
    torch.testing.assert_close(read, dequantise(*quantise(weight, 3)))
    upstream = torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
    (read * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_the_gradient_of_a_fake_quantised_model_is_taken_at_the_grid(student):
    """The float weights get what the quantised model's own weights would get."""
    ids = torch.arange(5, 17)[None]
    fake = copy.deepcopy(student)
    FakeQuantised(fake, 3)(ids, use_cache=False).logits.square().mean().backward()
    real = quantised(student, 3)
    real(ids, use_cache=False).logits.square().mean().backward()
    for (name, a), b in zip(fake.named_parameters(), real.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_bytes_are_counted_by_hand():
    """A matrix [3, 4], tied to a second name, and a norm of 5."""
    model = torch.nn.Module()
    model.first = torch.nn.Parameter(torch.zeros(3, 4))
    model.second = model.first
    model.norm = torch.nn.Parameter(torch.zeros(5))
    assert stored_bytes(model) == 4 * 12 + 4 * 5
    assert stored_bytes(model, 8) == 12 + 4 * 3 + 4 * 5
    assert stored_bytes(model, 3) == 4.5 + 4 * 3 + 4 * 5
