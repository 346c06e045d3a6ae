"""The fused loss against its meaning: all logits at once, plain autograd, float64."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdlib import fused, fused_gradient
from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import ArgumentError, ModelError
from kdlib.fused import fused_divergence
from kdlib.heads import Head
from kdlib.objective import Objective
from kdlib.views import View


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty returns NaN in this mode: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PARAMS = {
    "kl_mix": {"lam": 0.25},
    "generalized_jsd": {"beta": 0.25},
    "skew_kl": {"alpha": 0.125},
    "skew_reverse_kl": {"alpha": 0.125},
    "alpha_beta": {"alpha": 0.75, "beta": 0.5},
}


class Problem:
    """Random hidden states and heads, and what the fused loss must return for them."""

    def __init__(
        self,
        rows=7,
        widths=(5, 6),
        vocabs=(37, 33),
        bias=True,
        scales=(0.5, 2.0),
        softcaps=(3.0, 4.0),
        dtype=torch.float64,
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.h_s, self.h_t = draw(rows, widths[0]), draw(rows, widths[1])
        self.w_s, self.w_t = draw(vocabs[0], widths[0]), draw(vocabs[1], widths[1])
        self.b_s, self.b_t = draw(vocabs[0]), draw(vocabs[1])
        self.weights = torch.rand(rows, generator=g, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(vocabs[0], (rows,), generator=g)
        self.label_weights = 3 * self.weights.flip(0) + 0.5
        self.bias, self.scales, self.softcaps = bias, scales, softcaps
        for leaf in self.leaves:
            leaf.requires_grad_()

    @property
    def leaves(self):
        return (self.h_s, self.w_s, self.b_s) if self.bias else (self.h_s, self.w_s)

    @property
    def heads(self):
        return (
            Head(
                self.w_s,
                self.b_s if self.bias else None,
                self.scales[0],
                self.softcaps[0],
            ),
            Head(
                self.w_t,
                self.b_t if self.bias else None,
                self.scales[1],
                self.softcaps[1],
            ),
        )

    def naive(self, name="forward_kl", temperature=1.0, hard=False, **params):
        student, teacher = self.heads
        divergence = get_divergence(name, **params)
        logits = student.logits(self.h_s)
        per_token = divergence(
            logits, teacher.logits(self.h_t), temperature=temperature
        )
        total, of_labels = (self.weights * per_token).sum(), None
        if hard:
            of_labels = F.cross_entropy(logits, self.labels, reduction="none")
            total = total + (self.label_weights * of_labels).sum()
        gradients = torch.autograd.grad(total, self.leaves)
        return total, per_token, of_labels, gradients

    def fused(self, name="forward_kl", hard=False, **options):
        student, teacher = self.heads
        if hard:
            options |= {"labels": self.labels, "label_weights": self.label_weights}
        return fused_divergence(
            *(self.h_s, student, self.h_t, teacher),
            divergence=name,
            token_weights=self.weights,
            **options,
        )

    def chunks_of(self, rows):
        """A workspace with room for so many rows of logits."""
        vocab = max(len(self.w_s), len(self.w_t))
        return 5 * rows * fused._padded(vocab) * self.h_s.dtype.itemsize


def assert_equal_to_naive(problem, tolerance, name="forward_kl", **options):
    where = {k: v for k, v in options.items() if k not in ("workspace", "exact")}
    total, per_token, of_labels, gradients = problem.naive(name, **where)
    got = problem.fused(name, **options)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(got.per_token, per_token.detach(), **close)
    if of_labels is None:
        assert got.hard is None
    else:
        torch.testing.assert_close(got.hard, of_labels.detach(), **close)
    torch.testing.assert_close(got.total, total, **close)
    for g, wanted in zip(
        torch.autograd.grad(got.total, problem.leaves), gradients, strict=True
    ):
        torch.testing.assert_close(g, wanted, **close)


# ------------------------------------------------------------------ equal to the naive


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("softcaps", [(None, None), (3.0, 4.0)])
@pytest.mark.parametrize("hard", [False, True])
def test_every_divergence_equals_the_naive_one_in_float64(name, softcaps, hard):
    problem = Problem(rows=13, softcaps=softcaps)  # two panels, seven chunks
    options = {"temperature": 2.0, "workspace": problem.chunks_of(2), "hard": hard}
    assert_equal_to_naive(problem, 1e-10, name, **options, **PARAMS.get(name, {}))


options = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 9),
        "widths": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "vocabs": st.tuples(st.integers(2, 70), st.integers(2, 70)),
        "bias": st.booleans(),
        "scales": st.tuples(*[st.sampled_from([0.0625, 1.0, 3.0])] * 2),
        "softcaps": st.tuples(*[st.sampled_from([None, 0.5, 30.0])] * 2),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=80)
@given(
    options=options,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    name=st.sampled_from(sorted(DIVERGENCES)),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    chunk=st.integers(1, 10),
    exact=st.booleans(),
    hard=st.booleans(),
)
def test_equals_the_naive_one(options, dtype, name, temperature, chunk, exact, hard):
    problem = Problem(dtype=dtype, **options)
    assert_equal_to_naive(
        problem,
        1e-10 if dtype == torch.float64 else 2e-4,
        name,
        temperature=temperature,
        workspace=problem.chunks_of(chunk),
        exact=exact,
        hard=hard,
        **PARAMS.get(name, {}),
    )


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_hard_labels_are_those_of_the_objective(reduction):
    problem = Problem(vocabs=(40, 33))  # labels among the student's own columns as well
    problem.labels[:2] = torch.tensor([39, 35])
    student, teacher = problem.heads
    objective = Objective(
        "skew_kl", temperature=2.0, hard_weight=0.25, reduction=reduction
    )
    row_ids = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    wanted = objective(
        *(student.logits(problem.h_s), teacher.logits(problem.h_t), problem.labels),
        row_ids=row_ids,
    )
    gradients = torch.autograd.grad(wanted.total, problem.leaves)
    share = {
        "token_mean": torch.full((7,), 1 / 7, dtype=torch.float64),
        "sequence_mean": (1 / 3 / row_ids.bincount().double())[row_ids],
        "sum": torch.ones(7, dtype=torch.float64),
    }[reduction]
    got = fused_divergence(
        *(problem.h_s, student, problem.h_t, teacher),
        divergence="skew_kl",
        temperature=2.0,
        token_weights=0.75 * 4 * share,
        labels=problem.labels,
        label_weights=0.25 * share,
    )
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(got.total, wanted.total, **close)
    torch.testing.assert_close(share @ got.per_token, wanted.parts["soft"], **close)
    torch.testing.assert_close(share @ got.hard, wanted.parts["hard"], **close)
    for g, w in zip(
        torch.autograd.grad(got.total, problem.leaves), gradients, strict=True
    ):
        torch.testing.assert_close(g, w, **close)


def test_label_weights_are_1_by_default():
    problem = Problem()
    problem.weights = torch.zeros(7, dtype=torch.float64)
    problem.label_weights = torch.ones(7, dtype=torch.float64)
    _, _, of_labels, gradients = problem.naive(hard=True)
    student, teacher = problem.heads
    total, _, hard = fused_divergence(
        *(problem.h_s, student, problem.h_t, teacher),
        token_weights=problem.weights,
        labels=problem.labels.int(),
    )
    torch.testing.assert_close(total, of_labels.sum())
    assert not hard.requires_grad
    torch.testing.assert_close(torch.autograd.grad(total, problem.leaves), gradients)


def test_slices_smaller_than_a_chunk_change_nothing(monkeypatch):
    monkeypatch.setitem(fused_gradient.SLICE, "cpu", 2 * 37)
    assert_equal_to_naive(Problem(), 1e-10, "generalized_jsd")
    assert_equal_to_naive(Problem(), 1e-10, "generalized_jsd", hard=True)


def test_columns_of_one_side_alone_get_no_gradient():
    problem = Problem(vocabs=(40, 33))
    total, _, _ = problem.fused()
    _, d_weight, d_bias = torch.autograd.grad(total, problem.leaves)
    assert d_weight[33:].eq(0).all() and d_bias[33:].eq(0).all()
    assert d_weight[:33].ne(0).all()


def test_columns_masked_with_minus_infinity():
    problem = Problem(softcaps=(None, None), vocabs=(33, 33))
    with torch.no_grad():
        problem.b_s[30:] = problem.b_t[30:] = -torch.inf
    assert_equal_to_naive(problem, 1e-10, "forward_kl")
    assert_equal_to_naive(problem, 1e-10, "generalized_jsd", beta=0.25)
    problem.labels %= 30
    assert_equal_to_naive(problem, 1e-10, "generalized_jsd", beta=0.25, hard=True)


def test_equal_sides_give_exactly_zero():
    problem = Problem(scales=(1.0, 1.0), softcaps=(None, None), vocabs=(33, 33))
    student, _ = problem.heads
    for name in set(DIVERGENCES) - {"cross_entropy"}:
        got = fused_divergence(
            *(problem.h_s, student, problem.h_s, student), divergence=name
        )
        assert got.per_token.eq(0).all(), name
        gradients = torch.autograd.grad(got.total, problem.leaves)
        assert max(g.abs().max() for g in gradients) < 1e-12, name


def test_no_rows_give_zero_and_zero_gradients():
    problem = Problem(rows=0)
    total, per_token, _ = problem.fused()
    assert total == 0 and per_token.shape == (0,)
    for g, leaf in zip(
        torch.autograd.grad(total, problem.leaves), problem.leaves, strict=True
    ):
        assert g.shape == leaf.shape and g.eq(0).all()


# ----------------------------------------------------------------------------- autograd


def test_total_is_differentiable_and_per_token_is_not():
    total, per_token, _ = Problem().fused()
    assert total.requires_grad and not per_token.requires_grad


def test_any_function_of_the_total_has_the_right_gradient():
    problem = Problem()
    total, _, _, gradients = problem.naive()
    wanted = [3 * total * total * g for g in gradients]
    got = torch.autograd.grad(problem.fused().total ** 3, problem.leaves)
    torch.testing.assert_close(list(got), wanted, rtol=1e-10, atol=1e-10)


def test_twice_in_one_backward():
    problem = Problem()
    options = {"workspace": problem.chunks_of(2), "temperature": 2.0}
    forward, _, _, first = problem.naive()
    _, _, _, second = problem.naive("reverse_kl", temperature=2.0)
    loss = problem.fused() + problem.fused("reverse_kl", **options)
    (loss[0] * 2 - loss[3] * 5).backward()
    for leaf, a, b in zip(problem.leaves, first, second, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * a - 5 * b, rtol=1e-10, atol=1e-10)


def test_backward_again_through_a_kept_graph():
    problem = Problem()
    _, _, _, gradients = problem.naive()
    total = problem.fused().total
    total.backward(retain_graph=True)
    (total * 4).backward()
    for leaf, g in zip(problem.leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, 5 * g, rtol=1e-10, atol=1e-10)


def test_accumulated_micro_batches_equal_the_full_batch():
    problem = Problem(rows=9)
    _, _, _, (_, *gradients) = problem.naive()
    student, teacher = problem.heads
    for rows in torch.arange(9).split(4):
        fused_divergence(
            *(problem.h_s[rows], student, problem.h_t[rows], teacher),
            token_weights=problem.weights[rows],
        ).total.backward()
    for leaf, g in zip(problem.leaves[1:], gradients, strict=True):
        torch.testing.assert_close(leaf.grad, g, rtol=1e-10, atol=1e-10)


def test_teacher_gets_no_gradient():
    problem = Problem()
    teacher_side = (problem.h_t, problem.w_t, problem.b_t)
    for tensor in teacher_side:
        tensor.requires_grad_()
    problem.fused().total.backward()
    assert all(tensor.grad is None for tensor in teacher_side)
    assert all(leaf.grad is not None for leaf in problem.leaves)


def test_what_needs_no_gradient_gets_none():
    problem = Problem()
    _, _, _, (d_hidden, _, _) = problem.naive()
    student, teacher = problem.heads
    frozen = Head(student.weight.detach(), student.bias.detach(), *student_numbers())
    total, _, _ = fused_divergence(
        *(problem.h_s, frozen, problem.h_t, teacher), token_weights=problem.weights
    )
    total.backward()
    torch.testing.assert_close(problem.h_s.grad, d_hidden, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not problem.fused().total.requires_grad
        torch.testing.assert_close(problem.fused().total, total)


def student_numbers():
    student, _ = Problem().heads
    return student.scale, student.softcap


def test_there_is_no_second_derivative():
    # Without the guard, the part that runs through the factor alone would come back.
    problem = Problem()
    total = problem.fused().total ** 2
    (g,) = torch.autograd.grad(total, problem.h_s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# --------------------------------------------------------------------- work and memory


class Recorder(TorchDispatchMode):
    """The largest tensor made, and the multiplications of the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.multiplications = 0, 0
        self.dtypes, self.names = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
            self.dtypes.add(a.dtype)
        return out


BIG = {"rows": 64, "widths": (3, 4), "vocabs": (500, 500), "bias": False}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("hard", [False, True])
def test_nothing_of_the_size_of_the_logits_is_made(name, hard):
    problem = Problem(**BIG)
    with Recorder() as naive:
        problem.naive(name, hard=hard)
    with Recorder() as seen:
        options = {"workspace": problem.chunks_of(1), "hard": hard}
        problem.fused(name, **options).total.backward()
    assert naive.largest == 64 * 500
    # The head's gradient is the largest thing; the logits are padded to 64 columns.
    assert seen.largest <= max(500 * 3, 5 * 512)


def test_four_products_three_without_the_head_two_without_gradient():
    problem = Problem(**BIG)
    student, teacher = problem.heads
    one = 64 * 500  # times a hidden size: one product
    for hard in (False, True):  # labels need no product of their own
        with Recorder() as seen:
            options = {"workspace": problem.chunks_of(3), "hard": hard}
            problem.fused(**options).total.backward()
        assert seen.multiplications == one * (3 + 4 + 3 + 3)
    with Recorder() as seen:
        frozen = Head(student.weight.detach(), None, student.scale, student.softcap)
        fused_divergence(problem.h_s, frozen, problem.h_t, teacher).total.backward()
    assert seen.multiplications == one * (3 + 4 + 3)
    with torch.no_grad(), Recorder() as seen:
        problem.fused()
    assert seen.multiplications == one * (3 + 4)
    assert not any("backward" in name for name in seen.names)


def test_masked_rows_are_never_projected():
    torch.manual_seed(0)
    mask = torch.rand(4, 8) < 0.5
    mask[:, 0] = False
    view = View(torch.zeros(4, 8, dtype=torch.long), torch.ones(4, 8).bool(), mask)
    h_s, h_t = torch.randn(4, 8, 3), torch.randn(4, 8, 3)
    h_s[:, :-1][~mask[:, 1:]] = torch.nan  # a projected one would show
    h_s = h_s.requires_grad_()
    head, teacher = (
        Head(torch.randn(50, 3, requires_grad=True)),
        Head(torch.randn(50, 3)),
    )
    with Recorder() as seen:
        total, per_token, _ = fused_divergence(
            *(view.select(h_s), head, view.select(h_t), teacher)
        )
        total.backward()
    n = int(mask.sum())
    assert per_token.shape == (n,)
    assert seen.multiplications == 4 * n * 50 * 3
    assert total.isfinite() and head.weight.grad.isfinite().all()
    assert h_s.grad.isfinite().all()
    assert h_s.grad.abs().sum(-1).ne(0).sum() == n


# --------------------------------------------------------------------------- precision


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def half_precision_errors(dtype, **options):
    """Errors of the gradients against float64 on the same rounded inputs."""
    shape = {"rows": 48, "widths": (32, 32), "vocabs": (600, 600), "bias": False}
    plain = {"scales": (0.5, 0.5), "softcaps": (None, None)}
    low, high = Problem(dtype=dtype, **shape, **plain), Problem(**shape, **plain)
    for name in ("h_s", "h_t", "w_s", "w_t"):
        setattr(high, name, getattr(low, name).detach().double().requires_grad_())
    low.weights = high.weights = torch.full((48,), 1e-6, dtype=torch.float64)
    low.label_weights = high.label_weights = low.weights / 2
    hard = options.get("hard", False)
    _, per_token, _, wanted = high.naive(hard=hard)
    got = low.fused(workspace=low.chunks_of(7), **options)
    gradients = torch.autograd.grad(got.total, low.leaves)
    assert got.per_token.dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype, dtype]
    return max(map(relative, gradients, wanted)), relative(got.per_token, per_token)


def test_bfloat16_error_bounds():
    # Logits have a standard deviation of 2.8. Rounding to 8 bits moves each by up to
    # 2^-9 of itself: the large ones, and with them probabilities, by about 1%. With
    # exact logits, what is left is the rounding of G and of the result.
    fast, fast_value = half_precision_errors(torch.bfloat16)
    exact, exact_value = half_precision_errors(torch.bfloat16, exact=True)
    assert fast < 2e-2 and fast_value < 1e-2
    assert exact < 2.5e-3 and exact_value < 1e-5
    assert exact < fast / 2
    with_labels, _ = half_precision_errors(torch.bfloat16, exact=True, hard=True)
    assert with_labels < 2.5e-3


def test_float16_gradients_do_not_vanish():
    # Weights of 1e-6 put most of the gradient below float16's smallest number, 6e-8.
    # They come back through the result's own dtype, so it is asked for in float32.
    problem = Problem(rows=8, vocabs=(300, 300), bias=False, softcaps=(None, None))
    _, _, _, wanted = problem.naive()
    low = Problem(rows=8, vocabs=(300, 300), bias=False, softcaps=(None, None))
    for name in ("h_s", "h_t", "w_s", "w_t"):
        setattr(low, name, getattr(low, name).detach().float().requires_grad_())
    low.weights = problem.weights.float() * 1e-6
    with torch.autocast("cpu", torch.float16):
        total, _, _ = low.fused(exact=True)
    got = torch.autograd.grad(total * 1e6, low.leaves)
    assert max(map(relative, got, wanted)) < 5e-3
    # Labels of weight 1 beside them must not overflow.
    problem.weights = low.weights.double()
    wanted_total, _, _, wanted = problem.naive(hard=True)
    with torch.autocast("cpu", torch.float16):
        total, _, _ = low.fused(exact=True, hard=True)
    assert relative(total, wanted_total) < 5e-3
    got = torch.autograd.grad(total, low.leaves)
    assert max(map(relative, got, wanted)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(dtype):
    problem = Problem(dtype=torch.float32, bias=False)
    with torch.no_grad():
        problem.h_t, problem.w_t = problem.h_t.to(dtype), problem.w_t.to(dtype)
    assert_equal_to_naive(problem, 1e-4 if dtype == torch.float64 else 2e-2)


def test_autocast():
    problem = Problem(dtype=torch.float32, rows=32, vocabs=(200, 200))
    _, per_token, _, wanted = problem.naive()
    with Recorder() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            got = problem.fused(workspace=problem.chunks_of(5))
        gradients = torch.autograd.grad(got.total, problem.leaves)
    assert torch.bfloat16 in seen.dtypes
    assert got.total.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients)
    # Both hidden states and head are rounded to 8 bits on the way into each product.
    assert max(map(relative, gradients, wanted)) < 3e-2
    assert relative(got.per_token, per_token) < 3e-2


def test_the_head_gradient_is_summed_in_float32():
    # 2000 equal rows. A sum kept in bfloat16 stops growing once an addend is less than
    # 2^-9 of it, after some 500 of them.
    one = Problem(rows=1, dtype=torch.bfloat16, bias=False, softcaps=(None, None))
    many = Problem(rows=1, dtype=torch.bfloat16, bias=False, softcaps=(None, None))
    many.h_s = one.h_s.detach().repeat(2000, 1).requires_grad_()
    many.h_t, many.weights = one.h_t.repeat(2000, 1), torch.ones(2000)
    one.weights = torch.ones(1)
    _, single = torch.autograd.grad(one.fused().total, one.leaves)
    total, _, _ = many.fused(workspace=many.chunks_of(1))
    _, summed = torch.autograd.grad(total, many.leaves)
    torch.testing.assert_close(summed, single * 2000, rtol=2**-7, atol=0)


# ----------------------------------------------------------------------- torch.compile


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50)
        self.h_t, self.w_t = torch.randn(6, 4), torch.randn(50, 4)

    def forward(self, ids):
        hidden = torch.tanh(self.embed(ids)) * 2
        head = Head(self.head.weight, self.head.bias)
        return 3 * fused_divergence(hidden, head, self.h_t, Head(self.w_t)).total


def graphs_of(backend, tolerance):
    """Compile the model around the loss; compare gradients; return the graphs' code."""
    model, ids, code = TinyModel(), torch.arange(6), []

    def recording(graph, inputs):
        code.append(graph.code)
        return graph if backend is None else backend(graph, inputs)

    model(ids).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(model, backend=recording)(ids).backward()
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=tolerance, atol=tolerance)
    torch.compiler.reset()
    return code


def test_torch_compile_takes_the_model_around_it():
    code = "".join(graphs_of(None, 1e-6))
    assert "tanh" in code and "log_softmax" not in code


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))),
    reason="torch.compile's default backend needs a C++ compiler",
)
@pytest.mark.skipif(
    any(" " in path for path in (torch.__file__, sys.base_prefix)),
    reason="torch.compile does not quote paths for the linker; here one has a space",
)
def test_torch_compile_with_its_default_backend():
    from torch._inductor.compile_fx import compile_fx

    assert graphs_of(compile_fx, 1e-5)


# ------------------------------------------------------------------------- model heads


def tiny(name, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "options", "scale", "softcap"),
    [
        ("Llama", {}, 1.0, None),
        ("Gemma2", {"final_logit_softcapping": 0.5}, 1.0, 0.5),
        ("Cohere", {"logit_scale": 0.25}, 0.25, None),
        ("Granite", {"logits_scaling": 8.0}, 0.125, None),
    ],
)
def test_head_of_a_model(name, options, scale, softcap):
    model, teacher = tiny(name, **options), tiny("Llama", initializer_range=0.5)
    head = Head.of(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    assert head.weight is model.get_output_embeddings().weight
    ids = torch.arange(10)[None]
    student, taught = (m(ids, output_hidden_states=True) for m in (model, teacher))
    wanted = get_divergence("forward_kl")(student.logits[0], taught.logits[0])
    got = fused_divergence(
        *(student.hidden_states[-1][0], head),
        *(taught.hidden_states[-1][0], Head.of(teacher)),
    )
    torch.testing.assert_close(got.per_token, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.min() > 1e-3  # else the comparison would say little


def test_a_model_whose_logits_are_made_otherwise_is_refused():
    model = tiny("Llama")
    model.lm_head.register_forward_hook(lambda module, inputs, out: out * 3)
    with pytest.raises(ModelError, match="logits differ"):
        Head.of(model)


# -------------------------------------------------------------------------- the kernel


def run_kernel_checks(*arguments, **environment):
    script = Path(__file__).with_name("fused_kernel.py")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=script.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (there is one for Linux alone): kernel not checked",
)


# In processes of their own: whether Triton interprets or compiles is settled when it is
# imported, and torch.compile may have imported it.
@needs_triton
def test_triton_kernel_in_the_interpreter():
    assert "checks passed" in run_kernel_checks("interpret", TRITON_INTERPRET="1")


@needs_triton
def test_triton_kernel_compiles_for_gpus_that_are_not_here():
    assert "compiled" in run_kernel_checks("compile", TRITON_INTERPRET="0")


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h_s": torch.zeros(2, 7, 5)}, r"student_hidden \[2, 7, 5\]"),
        ({"h_s": torch.zeros(7, 4)}, r"student_hidden \[7, 4\]"),
        ({"h_t": torch.zeros(6, 6)}, "7 student rows, 6 teacher rows"),
        ({"h_t": torch.zeros(7, 6).double()}, "teacher_hidden .* torch.float64"),
        ({"h_t": torch.zeros(7, 6).long()}, "teacher_hidden .* torch.int64"),
        ({"b_s": torch.zeros(36)}, r"student_head.bias \[36\]"),
        ({"weights": torch.zeros(8)}, r"token_weights \[8\] for 7 rows"),
        ({"hard": True, "labels": torch.zeros(8).long()}, r"labels \[8\] torch.int64"),
        ({"hard": True, "labels": torch.zeros(7)}, r"labels \[7\] torch.float32"),
        ({"hard": True, "labels": torch.arange(-1, 6)}, "labels from -1 to 5"),
        ({"hard": True, "labels": torch.arange(31, 38)}, "vocabulary has 37"),
        ({"hard": True, "labels": None}, "label_weights without labels"),
        ({"hard": True, "label_weights": torch.ones(7, 1)}, r"label_weights \[7, 1\]"),
        ({"softcaps": (0.0, None)}, "student_head.softcap = 0.0"),
        ({"scales": (1.0, -1.0)}, "teacher_head.scale = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"workspace": -1}, "workspace = -1"),
        ({"name": "forward_k"}, "'forward_k' is unknown"),
        ({"alpha": 0.1}, "no parameter 'alpha'"),
    ],
)
def test_bad_input_is_named(change, message):
    problem = Problem(dtype=torch.float32)
    options = {k: v for k, v in change.items() if not hasattr(problem, k)}
    for name in change.keys() - options.keys():
        setattr(problem, name, change[name])
    with pytest.raises(ArgumentError, match=message):
        problem.fused(**options)
