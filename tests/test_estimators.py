"""Estimators of on-policy reverse KL, by summation over every token.

With V tokens, E over y ~ p_s is a sum of V terms weighted by p_s: means, gradients and
variances are exact, and no test here draws a sample.
"""

import math

import pytest
import torch

from kdlib.errors import ArgumentError
from kdlib.estimators import estimate, surrogate

V = 7


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, V, generator=generator, dtype=torch.float64) * 1.5
    return logits[0].requires_grad_(), logits[1]


def distributions(pair):
    log_ps, log_pt = (torch.log_softmax(z, -1) for z in pair)
    return log_ps, log_pt, log_ps.detach().exp()


def reverse_kl_gradient(pair):
    """p_s (r - sum p_s r), r = log(p_s / p_t)."""
    log_ps, log_pt, p = distributions(pair)
    ratio = log_ps.detach() - log_pt
    return p * (ratio - (p * ratio).sum())


def expected_gradient(pair, losses):
    """E over y ~ p_s of d loss(y) / d logits: p_s is the sampler, so it is constant."""
    p = distributions(pair)[2]
    return torch.autograd.grad((p * losses).sum(), pair[0])[0]


def test_k1_and_k3_estimate_reverse_kl_without_bias(pair):
    log_ps, log_pt, p = distributions(pair)
    pairs = zip(log_ps.tolist(), log_pt.tolist(), strict=True)
    reverse_kl = sum(math.exp(s) * (s - t) for s, t in pairs)
    for name in ("k1", "k3"):
        values = estimate(name, log_ps, log_pt)
        assert (p * values).sum().item() == pytest.approx(reverse_kl, rel=1e-12)
        assert not values.requires_grad


def test_k2_is_biased_and_accurate_near_equality(pair):
    student, teacher = pair
    bias = {}
    for distance in (1.0, 0.01):
        log_ps, log_pt, p = distributions((teacher + distance * student, teacher))
        reverse_kl = (p * (log_ps - log_pt).detach()).sum()
        mean = (p * estimate("k2", log_ps, log_pt)).sum()
        bias[distance] = abs(mean / reverse_kl - 1).item()
    assert bias[1.0] > 0.05
    assert bias[0.01] < 0.01


def test_k3_is_never_negative_and_k1_is(pair):
    log_ps, log_pt, p = distributions(pair)
    assert (estimate("k3", log_ps, log_pt) >= 0).all()
    assert (estimate("k1", log_ps, log_pt) < 0).any()
    # values worked by hand: r = log(p_t / p_s) = log 2
    a, b = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    assert estimate("k1", a, b).item() == pytest.approx(-math.log(2))
    assert estimate("k2", a, b).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert estimate("k3", a, b).item() == pytest.approx(1 - math.log(2))


def test_all_estimates_are_exactly_zero_where_the_two_agree(pair):
    log_ps = distributions(pair)[0]
    for name in ("k1", "k2", "k3"):
        assert (estimate(name, log_ps, log_ps.detach()) == 0).all()


def test_a_token_that_the_teacher_rules_out_costs_infinity():
    log_ps, log_pt = torch.tensor([-1.0]), torch.tensor([-math.inf])
    for name in ("k1", "k2", "k3"):
        assert estimate(name, log_ps, log_pt).item() == math.inf


@pytest.mark.parametrize("name", ["score_function", "k2"])
def test_the_surrogates_expected_gradient_is_that_of_reverse_kl(pair, name):
    log_ps, log_pt, _ = distributions(pair)
    got = expected_gradient(pair, surrogate(name, log_ps, log_pt))
    torch.testing.assert_close(got, reverse_kl_gradient(pair), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["score_function", "k2"])
def test_each_samples_gradient_is_the_log_ratio_times_the_score(pair, name):
    # An undetached ratio has the same mean but another, larger, gradient per sample.
    log_ps, log_pt, p = distributions(pair)
    losses = surrogate(name, log_ps, log_pt)
    for y in range(V):
        got = torch.autograd.grad(losses[y], pair[0], retain_graph=True)[0]
        score = torch.nn.functional.one_hot(torch.tensor(y), V) - p
        expected = (log_ps[y] - log_pt[y]).detach() * score
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_k1_differentiated_has_expected_gradient_zero_and_is_refused(pair):
    log_ps, log_pt, _ = distributions(pair)
    as_some_libraries_do = expected_gradient(pair, log_ps - log_pt)
    assert as_some_libraries_do.abs().max() < 1e-14
    assert reverse_kl_gradient(pair).abs().max() > 0.1
    with pytest.raises(ArgumentError, match="expected gradient is zero"):
        surrogate("k1", log_ps, log_pt)
    with pytest.raises(ArgumentError, match="expected gradient is zero"):
        surrogate("k1", log_ps, log_pt, accept_forward_kl=True)


def test_k3_differentiated_is_forward_kl_and_needs_consent(pair):
    log_ps, log_pt, p = distributions(pair)
    with pytest.raises(ArgumentError, match="FORWARD KL"):
        surrogate("k3", log_ps, log_pt)
    losses = surrogate("k3", log_ps, log_pt, accept_forward_kl=True)
    got = expected_gradient(pair, losses)
    forward_kl_gradient = p - log_pt.exp()
    torch.testing.assert_close(got, forward_kl_gradient, rtol=1e-10, atol=1e-12)
    cosine = torch.cosine_similarity(got, reverse_kl_gradient(pair), dim=0)
    assert cosine < 0.99  # on this pair the two directions differ


@pytest.mark.parametrize("name", ["score_function", "k2", "k3"])
def test_the_teacher_receives_no_gradient(pair, name):
    log_ps, log_pt, _ = distributions(pair)
    log_pt.requires_grad_()
    surrogate(name, log_ps, log_pt, accept_forward_kl=True).sum().backward()
    assert pair[0].grad is not None and log_pt.grad is None


def test_bfloat16_log_probs_are_computed_in_float32():
    log_ps = torch.tensor([-3.0], dtype=torch.bfloat16)
    log_pt = torch.tensor([-3.0 + 2**-6], dtype=torch.bfloat16)
    got = estimate("k3", log_ps, log_pt)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(math.expm1(2**-6) - 2**-6, rel=1e-4)


def test_bad_names_and_shapes_are_refused(pair):
    log_ps, log_pt, _ = distributions(pair)
    with pytest.raises(ArgumentError, match=r"surrogate\(\) gives losses"):
        estimate("score_function", log_ps, log_pt)
    with pytest.raises(ArgumentError, match="score_function"):
        surrogate("k4", log_ps, log_pt)
    with pytest.raises(ArgumentError, match="same sampled tokens"):
        estimate("k1", log_ps, log_pt[:1])
