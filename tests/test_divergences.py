"""The divergences against closed forms: values, gradients, limits, hard numerics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import ArgumentError

# Every member of the family, with parameters inside and at the ends of their ranges.
CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("kl_mix", {"lam": 0.0}),
    ("kl_mix", {"lam": 0.3}),
    ("kl_mix", {"lam": 1.0}),
    ("generalized_jsd", {"beta": 0.0}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0.5}),
    ("generalized_jsd", {"beta": 1.0}),
    ("skew_kl", {"alpha": 0.0}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("adaptive_kl", {"alpha": 0.5}),
    ("tvd", {}),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.5}),
    ("alpha_beta", {"alpha": 0.3, "beta": 0.9}),
    ("alpha_beta", {"alpha": 1.2, "beta": 0.2}),
    ("alpha_beta", {"alpha": 0.7, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.7}),
    ("cross_entropy", {}),
]


def family_without(*names):
    cases = [case for case in CASES if case[0] not in names]
    ids = [f"{name}{tuple(params.values()) or ''}" for name, params in cases]
    return pytest.mark.parametrize(("name", "params"), cases, ids=ids)


family = family_without()


def test_every_divergence_is_tested():
    assert {name for name, _ in CASES} == set(DIVERGENCES)


def logits_pair(seed, shape=(6, 9), scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for _ in range(2)
    )
    return student.requires_grad_(), teacher


def probabilities(logits, temperature=1.0):
    x = logits.detach().double().numpy() / temperature
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def textbook(name, p, q, **params):
    """The formulas as printed in the papers, on probabilities: p teacher, q student."""

    def kl(a, b):
        return (a * np.log(a / b)).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "kl_mix":
        return (1 - params["lam"]) * kl(p, q) + params["lam"] * kl(q, p)
    if name == "generalized_jsd":
        beta = params["beta"]
        if beta in (0, 1):
            return kl(p, q) if beta == 0 else kl(q, p)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, params["alpha"] * p + (1 - params["alpha"]) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - params["alpha"]) * p + params["alpha"] * q)
    if name == "adaptive_kl":
        head, tail = head_and_tail_gap(p, q, params["alpha"])
        return (head * kl(p, q) + tail * kl(q, p)) / (head + tail)
    if name == "tvd":
        return 0.5 * np.abs(p - q).sum(-1)
    if name == "cross_entropy":
        return -(p * np.log(q)).sum(-1)
    a, b = params["alpha"], params["beta"]
    if b == 0:
        return (p**a * np.log(p**a / q**a) - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return (q**b * np.log(q**b / p**b) - q**b + p**b).sum(-1) / b**2
    s = a + b
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def head_and_tail_gap(p, q, alpha):
    """One row at a time, in plain loops."""
    gaps = []
    for p_row, q_row in zip(p, q, strict=True):
        head = tail = mass = 0.0
        for rank, v in enumerate(sorted(range(len(p_row)), key=lambda v: -p_row[v])):
            mass += p_row[v]
            if rank == 0 or mass <= alpha:
                head += abs(p_row[v] - q_row[v])
            else:
                tail += abs(p_row[v] - q_row[v])
        gaps.append((head, tail))
    return np.array(gaps).T


def closed_form_gradient(name, p, q, temperature, **params):
    """d/dz_s as the docstrings give it."""

    def through_softmax(d_dq):
        return q * (d_dq - (q * d_dq).sum(-1, keepdims=True)) / temperature

    forward = (q - p) / temperature
    reverse = through_softmax(np.log(q / p))
    if name in ("forward_kl", "cross_entropy"):
        return forward
    if name == "reverse_kl":
        return reverse
    if name == "kl_mix":
        return (1 - params["lam"]) * forward + params["lam"] * reverse
    if name == "generalized_jsd":
        beta = params["beta"]
        if beta in (0, 1):
            return forward if beta == 0 else reverse
        m = beta * p + (1 - beta) * q
        return (1 - beta) * through_softmax(np.log(q / m))
    if name == "skew_kl":
        m = params["alpha"] * p + (1 - params["alpha"]) * q
        return -through_softmax((1 - params["alpha"]) * p / m)
    if name == "skew_reverse_kl":
        m = (1 - params["alpha"]) * p + params["alpha"] * q
        return through_softmax(np.log(q / m) - params["alpha"] * q / m)
    if name == "adaptive_kl":
        head, tail = head_and_tail_gap(p, q, params["alpha"])[..., None]
        return (head * forward + tail * reverse) / (head + tail)
    if name == "tvd":
        return through_softmax(np.sign(q - p)) / 2
    a, b = params["alpha"], params["beta"]
    last = np.log(p / q) if a == 0 else (p**a - q**a) / a
    return -through_softmax(q ** (b - 1) * last)


# ---- values and gradients ------------------------------------------------------------


@family
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_value_is_the_textbook_formula(name, params, temperature):
    student, teacher = logits_pair(seed=1)
    got = get_divergence(name, **params)(student, teacher, temperature=temperature)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(
        got.detach(), textbook(name, p, q, **params), rtol=1e-10, atol=1e-12
    )


@family
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_gradient_is_the_closed_form(name, params, temperature):
    student, teacher = logits_pair(seed=2)
    divergence = get_divergence(name, **params)
    divergence(student, teacher, temperature=temperature).sum().backward()
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    expected = closed_form_gradient(name, p, q, temperature, **params)
    np.testing.assert_allclose(student.grad, expected, rtol=1e-9, atol=1e-12)


@family_without("adaptive_kl")  # its weights are constants: not the value's derivative
def test_gradcheck(name, params):
    student, teacher = logits_pair(seed=3, shape=(2, 5))
    teacher.requires_grad_()
    divergence = get_divergence(name, **params)
    assert torch.autograd.gradcheck(
        lambda s, t: divergence(s, t, temperature=1.7), (student, teacher)
    )


@family
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    leading=st.lists(st.integers(1, 3), max_size=2),
    vocab=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 0.3, 3.0, 8.0]),
    temperature=st.floats(0.5, 20.0),
)
def test_textbook_over_shapes_scales_and_temperatures(
    name, params, seed, leading, vocab, scale, temperature
):
    student, teacher = logits_pair(seed, (*leading, vocab), scale)
    got = get_divergence(name, **params)(student, teacher, temperature=temperature)
    assert got.shape == torch.Size(leading)
    p, q = (
        probabilities(x, temperature).reshape(-1, vocab) for x in (teacher, student)
    )
    if np.array_equal(p, q):  # one token: the adaptive weights are 0/0
        return
    expected = textbook(name, p, q, **params).reshape(leading)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-7, atol=1e-12)
    if name != "cross_entropy":
        assert (got >= -1e-12).all()


def test_a_pair_worked_by_hand():
    # p_t = (1/2, 1/2), p_s = (1/4, 3/4): no two of the family agree on it
    teacher = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    student = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    log = math.log
    forward = 0.5 * log(4 / 3)
    reverse = 0.25 * log(1 / 2) + 0.75 * log(3 / 2)
    by_hand = {
        ("forward_kl",): forward,
        ("reverse_kl",): reverse,
        ("kl_mix", ("lam", 0.25)): 0.75 * forward + 0.25 * reverse,
        # m = (3/8, 5/8)
        ("generalized_jsd", ("beta", 0.5)): 0.25 * (log(4 / 3) + log(4 / 5))
        + 0.5 * (0.25 * log(2 / 3) + 0.75 * log(6 / 5)),
        # m = 1/4 p_t + 3/4 p_s = (5/16, 11/16)
        ("skew_kl", ("alpha", 0.25)): 0.5 * (log(8 / 5) + log(8 / 11)),
        # m = 3/4 p_t + 1/4 p_s = (7/16, 9/16)
        ("skew_reverse_kl", ("alpha", 0.25)): 0.25 * log(4 / 7) + 0.75 * log(4 / 3),
        # the head is one token, the tail the other, and both gaps are 1/4
        ("adaptive_kl",): 0.5 * forward + 0.5 * reverse,
        ("tvd",): 0.25,
        ("alpha_beta", ("alpha", 1.0), ("beta", 1.0)): 0.5 * (1 / 16 + 1 / 16),
        ("cross_entropy",): 0.5 * log(4) + 0.5 * log(4 / 3),
    }
    assert {key[0] for key in by_hand} == set(DIVERGENCES)
    for (name, *params), expected in by_hand.items():
        got = get_divergence(name, **dict(params))(student, teacher)
        assert got.item() == pytest.approx(expected, abs=1e-14), name


@family
def test_temperature_divides_both_sides(name, params):
    student, teacher = logits_pair(seed=4)
    divergence = get_divergence(name, **params)
    hot = divergence(student, teacher, temperature=3.0)
    torch.testing.assert_close(hot, divergence(student / 3, teacher / 3))


# ---- invariances ---------------------------------------------------------------------


@family
@settings(max_examples=15, deadline=None)
@given(shifts=st.tuples(st.floats(-100, 100), st.floats(-100, 100)))
def test_a_constant_added_to_the_logits_changes_nothing(name, params, shifts):
    student, teacher = logits_pair(seed=5)
    divergence = get_divergence(name, **params)
    shifted = divergence(student + shifts[0], teacher + shifts[1])
    torch.testing.assert_close(
        shifted, divergence(student, teacher), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("copies", [2, 50])
@family_without("alpha_beta", "adaptive_kl", "cross_entropy")
def test_scale_does_not_depend_on_the_vocabulary(name, params, copies):
    # Each token split into equal copies: the same two distributions with finer labels.
    # (Powers of probabilities, the head's border and an entropy do see the copies.)
    student, teacher = logits_pair(seed=6)
    divergence = get_divergence(name, **params)
    torch.testing.assert_close(
        divergence(
            student.repeat_interleave(copies, -1), teacher.repeat_interleave(copies, -1)
        ),
        divergence(student, teacher),
    )


@family
def test_columns_that_one_side_pads_are_dropped_from_both(name, params):
    student, teacher = logits_pair(seed=7, shape=(4, 9))
    divergence = get_divergence(name, **params)
    expected = divergence(student[:, :6], teacher[:, :6])
    junk = torch.full((4, 3), 50.0, dtype=torch.float64)
    assert torch.equal(divergence(student[:, :6], teacher), expected)
    assert torch.equal(divergence(student, teacher[:, :6]), expected)
    padded = torch.cat([teacher[:, :6], junk], dim=1)
    assert torch.equal(divergence(student[:, :6], padded), expected)
    constant = torch.cat([student[:, :6] - 15, junk], dim=1)
    torch.testing.assert_close(divergence(constant, teacher[:, :6]), expected)


# ---- exact zeros ---------------------------------------------------------------------


@family
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([0.3, 1.0, 7.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_equal_logits_give_exactly_zero(name, params, seed, scale, temperature, dtype):
    _, teacher = logits_pair(seed, (3, 37), scale, dtype)
    teacher[0, 5] = -math.inf
    student = teacher.clone().requires_grad_()
    got = get_divergence(name, **params)(student, teacher, temperature=temperature)
    if name == "cross_entropy":
        p = probabilities(teacher, temperature)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
        np.testing.assert_allclose(got.detach(), entropy, rtol=1e-4, atol=1e-5)
    else:
        assert (got == 0).all()
        assert not got.signbit().any()
    got.sum().backward()
    assert student.grad.abs().max() < 1e-5 / temperature


@family_without("cross_entropy")
def test_equal_logits_in_a_wider_vocabulary_give_exactly_zero(name, params):
    _, teacher = logits_pair(seed=8, shape=(5, 40), dtype=torch.float32)
    padded = torch.cat([teacher, torch.randn(5, 11)], dim=1)
    assert (get_divergence(name, **params)(padded, teacher) == 0).all()


@family_without("cross_entropy")
def test_equal_logits_in_another_memory_layout_give_exactly_zero(name, params):
    _, teacher = logits_pair(seed=26, shape=(64, 4000), dtype=torch.float32)
    student = teacher.T.contiguous().T
    assert (get_divergence(name, **params)(student, teacher) == 0).all()


# ---- hard numerics -------------------------------------------------------------------


@family
def test_logits_of_ten_thousand(name, params):
    student, teacher = logits_pair(seed=9, shape=(40, 7), scale=1e4)
    student, teacher = student.detach().float(), teacher.float()
    # half of the rows are sure of the same token, for moderate values as well
    teacher[::2, 0], student[::2, 0] = 3e4, 3e4
    teacher[::4, 1], student[::4, 2] = 3e4 - 2, 3e4 - 1
    divergence = get_divergence(name, **params)
    exact_student = student.double().requires_grad_()
    exact = divergence(exact_student, teacher.double())
    exact.sum().backward()
    student.requires_grad_()
    got = divergence(student, teacher)
    got.sum().backward()
    assert got.isfinite().all() and student.grad.isfinite().all()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    # reverse KL's gradient is a product with log-ratios of 1e4
    bound = 1e-5 * max(1.0, exact.max().item())
    torch.testing.assert_close(
        student.grad.double(), exact_student.grad, rtol=1e-4, atol=bound
    )


@family
def test_a_token_masked_on_both_sides_is_not_there(name, params):
    student, teacher = logits_pair(seed=10, shape=(4, 6))
    divergence = get_divergence(name, **params)
    without = student.detach()[:, [0, 1, 3, 4, 5]].requires_grad_()
    expected = divergence(without, teacher[:, [0, 1, 3, 4, 5]], temperature=2.0)
    expected.sum().backward()

    masked = student.detach().clone()
    masked[:, 2] = -math.inf
    teacher[:, 2] = -math.inf
    masked.requires_grad_()
    got = divergence(masked, teacher, temperature=2.0)
    got.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert (masked.grad[:, 2] == 0).all()
    torch.testing.assert_close(masked.grad[:, [0, 1, 3, 4, 5]], without.grad)


@family
def test_a_token_masked_by_the_teacher_alone(name, params):
    student, teacher = logits_pair(seed=11, shape=(4, 6))
    teacher[:, 2] = -math.inf
    got = get_divergence(name, **params)(student, teacher)
    infinite = (
        name in ("reverse_kl", "adaptive_kl")
        or params in ({"lam": 0.3}, {"lam": 1.0}, {"beta": 1.0})
        or (name, params.get("alpha")) in (("skew_reverse_kl", 0), ("alpha_beta", 0))
    )
    if infinite:
        assert (got == math.inf).all()
        return
    p, q = probabilities(teacher), probabilities(student)
    limit = textbook(name, np.maximum(p, 1e-200), q, **params)  # 0 log 0 = 0
    np.testing.assert_allclose(got.detach(), limit, rtol=1e-9)
    got.sum().backward()
    assert student.grad.isfinite().all()
    if name in ("forward_kl", "cross_entropy"):
        np.testing.assert_allclose(student.grad, q - p, atol=1e-12)


@family
def test_a_token_masked_by_the_student_alone(name, params):
    student, teacher = logits_pair(seed=12, shape=(4, 6))
    with torch.no_grad():
        student[:, 2] = -math.inf
    got = get_divergence(name, **params)(student, teacher)
    infinite = (
        name in ("forward_kl", "adaptive_kl", "cross_entropy")
        or params in ({"lam": 0.0}, {"lam": 0.3}, {"beta": 0.0})
        or (name == "skew_kl" and params["alpha"] == 0)
        or (name == "alpha_beta" and params["beta"] == 0)
    )
    if infinite:
        assert (got == math.inf).all()
    else:
        p, q = probabilities(teacher), probabilities(student)
        limit = textbook(name, p, np.maximum(q, 1e-200), **params)
        np.testing.assert_allclose(got.detach(), limit, rtol=1e-9)
    got.sum().backward()
    assert not student.grad.isnan().any()


def test_where_the_student_underflows_the_teachers_minus_infinity_is_harmless():
    # p_s is 0 in float32, its logarithm is not: 0 * inf must not appear
    student = torch.tensor([[0.0, -500.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -math.inf]])
    got = DIVERGENCES["reverse_kl"](student, teacher)
    got.sum().backward()
    assert got.item() == 0.0 and (student.grad == 0).all()


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name, params, dtype):
    # the error is that of float32 arithmetic on the rounded logits
    student, teacher = logits_pair(seed=13, shape=(16, 500), scale=4.0, dtype=dtype)
    close = (teacher + 0.02 * student).detach()  # small divergences are the hard ones
    for logits in (student.detach(), close):
        divergence = get_divergence(name, **params)
        got = divergence(logits, teacher)
        exact = divergence(logits.double(), teacher.double())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-6)


@family
def test_float32_over_a_large_vocabulary(name, params):
    # Sums of 151,936 numbers: with torch.log_softmax on a CPU the values are off by
    # 1.5e-5 and the gradients by up to 7e-4.
    student, teacher = logits_pair(27, (2, 151_936), scale=3.0, dtype=torch.float32)
    exact_student = student.detach().double().requires_grad_()
    divergence = get_divergence(name, **params)
    exact = divergence(exact_student, teacher.double())
    (wanted,) = torch.autograd.grad(exact.sum(), exact_student)
    value = divergence(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=0)
    assert (gradient.double() - wanted).norm() < 3e-5 * wanted.norm()


@family
def test_autocast_does_not_lower_the_precision(name, params):
    student, teacher = logits_pair(seed=14, dtype=torch.bfloat16)
    divergence = get_divergence(name, **params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = divergence(student, teacher)
    assert torch.equal(got, divergence(student, teacher))


@family
def test_no_overflow_between_extremely_different_sides(name, params):
    student = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 0.0, 300.0]])
    got = get_divergence(name, **params)(student, teacher)
    got.sum().backward()
    assert got.isfinite().all() and student.grad.isfinite().all()
    exact = get_divergence(name, **params)(student.double(), teacher.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@family
def test_no_overflow_where_a_probability_is_just_representable(name, params):
    # in float32 e^-95 is not 0 yet, but e^95 is infinite already
    sure = torch.tensor([[0.0, -95.0]])
    unsure = torch.tensor([[0.0, 1.0]])
    divergence = get_divergence(name, **params)
    for student, teacher in ((sure, unsure), (unsure, sure)):
        exact = divergence(student.double(), teacher.double())
        student = student.clone().requires_grad_()
        got = divergence(student, teacher)
        got.sum().backward()
        assert student.grad.isfinite().all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


# ---- limits --------------------------------------------------------------------------


def test_the_interior_of_the_generalized_jsd_goes_to_zero_at_both_ends():
    student, teacher = logits_pair(seed=15)
    forward = DIVERGENCES["forward_kl"](student, teacher)
    reverse = DIVERGENCES["reverse_kl"](student, teacher)
    jsd = DIVERGENCES["generalized_jsd"]
    assert torch.equal(jsd(student, teacher, beta=0.0), forward)
    assert torch.equal(jsd(student, teacher, beta=1.0), reverse)
    for small in (1e-4, 1e-6):
        near_0 = jsd(student, teacher, beta=small)
        near_1 = jsd(student, teacher, beta=1 - small)
        assert (near_0 < 0.01 * forward).all() and (near_1 < 0.01 * reverse).all()
        torch.testing.assert_close(near_0 / small, forward, rtol=300 * small, atol=0)
        torch.testing.assert_close(near_1 / small, reverse, rtol=300 * small, atol=0)


def test_kl_mix_is_a_straight_line_from_forward_to_reverse():
    student, teacher = logits_pair(seed=16)
    ends = [
        DIVERGENCES[name](student, teacher) for name in ("forward_kl", "reverse_kl")
    ]
    mix = DIVERGENCES["kl_mix"]
    for lam in (0.0, 1e-9, 0.25, 1.0):
        torch.testing.assert_close(
            mix(student, teacher, lam=lam), (1 - lam) * ends[0] + lam * ends[1]
        )
    # at an end, the other end's infinity does not reach the value
    teacher[:, 0] = -math.inf
    assert mix(student, teacher, lam=0.0).isfinite().all()
    assert (mix(student, teacher, lam=0.01) == math.inf).all()


def test_upper_bounds_on_disjoint_supports():
    student = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[-math.inf, 0.0]], dtype=torch.float64)
    expected = {
        ("tvd",): 1.0,
        ("skew_kl", ("alpha", 0.1)): -math.log(0.1),
        ("skew_reverse_kl", ("alpha", 0.1)): -math.log(0.1),
        ("generalized_jsd", ("beta", 0.5)): math.log(2),
        ("generalized_jsd", ("beta", 0.1)): -0.1 * math.log(0.1) - 0.9 * math.log(0.9),
        ("alpha_beta", ("alpha", 0.5), ("beta", 0.5)): 4.0,
    }
    for (name, *params), bound in expected.items():
        got = get_divergence(name, **dict(params))(student, teacher)
        assert got.item() == pytest.approx(bound, rel=1e-12), name


def test_alpha_beta_contains_its_relatives():
    student, teacher = logits_pair(seed=17)
    ab = DIVERGENCES["alpha_beta"]
    p, q = (torch.from_numpy(probabilities(x)) for x in (teacher, student))
    relatives = {
        (1.0, 0.0): DIVERGENCES["forward_kl"](student, teacher),
        (0.0, 1.0): DIVERGENCES["reverse_kl"](student, teacher),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
        (1.0, 1.0): 0.5 * (p - q).square().sum(-1),
    }
    for (alpha, beta), expected in relatives.items():
        got = ab(student, teacher, alpha=alpha, beta=beta)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
        # and they are limits, not only ends
        near = ab(student, teacher, alpha=alpha + 1e-7, beta=beta + 1e-7)
        torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "limit"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")]
)
def test_a_small_skew_tends_to_the_kl_even_in_float32(name, limit):
    student, teacher = logits_pair(seed=18, dtype=torch.float32)
    got = DIVERGENCES[name](student, teacher, alpha=1e-7)
    expected = DIVERGENCES[limit](student, teacher)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # alpha itself, 1e-7, must not be lost in 1 - (1 - alpha): -log(alpha) bounds it
    student, teacher = torch.tensor([[0.0, -40.0]]), torch.tensor([[-40.0, 0.0]])
    got = DIVERGENCES[name](student, teacher, alpha=1e-7)
    assert got.item() == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_adaptive_kl_is_forward_where_only_the_head_differs_and_reverse_in_the_tail():
    p = torch.tensor([[0.30, 0.20, 0.25, 0.25]], dtype=torch.float64)
    head_off = torch.tensor([[0.20, 0.20, 0.35, 0.25]], dtype=torch.float64)
    tail_off = torch.tensor([[0.30, 0.10, 0.25, 0.35]], dtype=torch.float64)
    # The head at alpha = 0.6 is tokens 0 and 2 (0.55), at alpha = 0.3 token 0 alone.
    for q, name, alpha in (
        (head_off, "forward_kl", 0.6),
        (tail_off, "reverse_kl", 0.3),
    ):
        got = DIVERGENCES["adaptive_kl"](q.log(), p.log(), alpha=alpha)
        expected = DIVERGENCES[name](q.log(), p.log())
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_adaptive_kl_ignores_the_infinity_of_a_direction_without_weight():
    # the student's dead token is in the tail, and the head fits exactly
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    got = DIVERGENCES["adaptive_kl"](student, teacher)
    assert got.item() == pytest.approx(0.5 * math.log(2), rel=1e-12)


# ---- the registry, and bad input -----------------------------------------------------


def test_bad_names_parameters_and_values_are_refused_when_chosen():
    with pytest.raises(ArgumentError, match="did you mean 'forward_kl'"):
        get_divergence("foward_kl")
    with pytest.raises(ArgumentError, match="did you mean 'beta'"):
        get_divergence("generalized_jsd", betta=0.5)
    with pytest.raises(ArgumentError, match="no parameter 'temperature'"):
        get_divergence("forward_kl", temperature=2.0)
    with pytest.raises(ArgumentError, match=r"beta = 1.5"):
        get_divergence("generalized_jsd", beta=1.5)
    with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
        get_divergence("skew_kl", alpha=1.0)
    with pytest.raises(ArgumentError, match="lam = nan"):
        get_divergence("kl_mix", lam=math.nan)
    with pytest.raises(ArgumentError, match="at least one"):
        get_divergence("alpha_beta", alpha=0.0, beta=0.0)
    with pytest.raises(ArgumentError, match="alpha = -0.5"):
        get_divergence("alpha_beta", alpha=-0.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_temperature_is_refused(temperature):
    student, teacher = logits_pair(seed=19)
    with pytest.raises(ArgumentError, match="temperature"):
        DIVERGENCES["tvd"](student, teacher, temperature=temperature)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    student, teacher = logits_pair(seed=20)
    with pytest.raises(ArgumentError, match="differ before the vocabulary"):
        DIVERGENCES["forward_kl"](student, teacher[:-1])
    with pytest.raises(ArgumentError, match="differ before the vocabulary"):
        DIVERGENCES["forward_kl"](student, teacher[0])  # no silent broadcasting
    with pytest.raises(ArgumentError, match="token ids"):
        DIVERGENCES["forward_kl"](student, torch.ones(6, 9, dtype=torch.long))


def test_no_tokens_give_no_values():
    assert DIVERGENCES["forward_kl"](torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
