"""Sparse targets held to the dense truth: what each tail keeps, and what it hides."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import ArgumentError
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import (
    SparseTargets,
    concatenate,
    sampled_targets,
    top_k_targets,
)

F_DIVERGENCES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("kl_mix", {"lam": 0.3}),
    ("generalized_jsd", {"beta": 0.5}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("tvd", {}),
]


def logits_pair(seed, n=5, vocab=12, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, n, vocab, generator=generator, dtype=torch.float64) * scale
    return pair[0].requires_grad_(), pair[1]


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits)[0]


# ---- making targets ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_targets_are_the_largest_log_probabilities(temperature):
    _, teacher = logits_pair(0)
    targets = top_k_targets(teacher, 4, temperature=temperature)
    dense = (teacher / temperature).exp()
    dense = (dense / dense.sum(-1, keepdim=True)).log()
    for row, ids, kept in zip(dense, targets.indices, targets.log_probs, strict=True):
        assert ids.tolist() == sorted(range(12), key=lambda v: -row[v])[:4]
        torch.testing.assert_close(kept, row[ids])
    assert (targets.tail, targets.temperature) == ("bucket", temperature)


def test_targets_are_data_without_a_gradient():
    teacher = torch.randn(3, 8, requires_grad=True)
    assert not top_k_targets(teacher, 2).log_probs.requires_grad
    assert not sampled_targets(teacher, 2).log_probs.requires_grad


def test_sampled_targets_count_their_draws():
    _, teacher = logits_pair(1, n=200, vocab=4)
    targets = sampled_targets(teacher, 9, torch.Generator().manual_seed(0))
    assert targets.indices.shape == (200, 4)  # k = min(n_samples, V)
    counts = targets.weights * 9
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(-1), torch.full((200,), 9.0).double())
    for ids, weight in zip(targets.indices, targets.weights, strict=True):
        used = ids[weight > 0].tolist()
        assert len(used) == len(set(used))  # a token is drawn twice, but listed once
    again = sampled_targets(teacher, 9, torch.Generator().manual_seed(0))
    assert torch.equal(again.weights, targets.weights)
    assert torch.equal(again.indices, targets.indices)


# ---- bucket --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params"), F_DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    k=st.integers(1, 12),
    temperature=st.sampled_from([0.6, 1.0, 3.0]),
)
def test_bucket_is_between_zero_and_the_dense_divergence(
    name, params, seed, k, temperature
):
    # merging events loses information: the data-processing inequality
    student, teacher = logits_pair(seed)
    dense = get_divergence(name, **params)(student, teacher, temperature=temperature)
    targets = top_k_targets(teacher, k, temperature=temperature)
    got = sparse_divergence(student, targets, name, temperature=temperature, **params)
    # 1 minus the kept mass has lost digits where the rest is 1e-9
    assert (got >= -1e-12).all()
    assert (got <= dense + 1e-6).all()


@pytest.mark.parametrize(("name", "params"), F_DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_full_support_is_the_dense_divergence(name, params, tail):
    student, teacher = logits_pair(2)
    dense = get_divergence(name, **params)(student, teacher, temperature=2.0)
    targets = top_k_targets(teacher, 12, tail, temperature=2.0)
    got = sparse_divergence(student, targets, name, temperature=2.0, **params)
    torch.testing.assert_close(got, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(got, student), gradient(dense, student))


def test_bucket_worked_by_hand():
    # kept: p_t 1/2 against p_s 1/4; the rest: 1/2 against 3/4
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.05, 0.7]], dtype=torch.float64).log()
    targets = top_k_targets(teacher, 1)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert sparse_divergence(student, targets).item() == pytest.approx(forward)
    assert sparse_divergence(student, targets, "reverse_kl").item() == pytest.approx(
        reverse
    )
    entropy = math.log(2)
    assert sparse_divergence(student, targets, "cross_entropy").item() == pytest.approx(
        forward + entropy
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradcheck_of_the_top_k_tails(name, tail):
    student, teacher = logits_pair(3, n=2, vocab=6)
    targets = top_k_targets(teacher, 3, tail, temperature=1.5)
    assert torch.autograd.gradcheck(
        lambda s: sparse_divergence(s, targets, name, temperature=1.5), (student,)
    )


def test_bucket_of_a_student_that_masks_everything_else():
    # the student has no rest, the teacher's is a rounding error: finite, no NaN
    teacher = torch.tensor([[1.0, 0.3, -0.2, -math.inf, -math.inf]])
    student = torch.tensor([[0.1, 0.2, 0.3, -math.inf, -math.inf]], requires_grad=True)
    got = sparse_divergence(student, top_k_targets(teacher, 3))
    dense = DIVERGENCES["forward_kl"](student, teacher)
    torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(got, student), gradient(dense, student))
    # a rest that is truly there costs an infinity, as it does in the dense divergence
    teacher[0, 3] = 0.0
    got = sparse_divergence(student, top_k_targets(teacher, 3))
    assert got.item() == math.inf
    assert not gradient(got, student).isnan().any()


def test_bucket_survives_logits_of_ten_thousand():
    student, teacher = logits_pair(4, n=20, scale=1e4)
    student, teacher = student.detach().float().requires_grad_(), teacher.float()
    got = sparse_divergence(student, top_k_targets(teacher, 3))
    exact = sparse_divergence(student.double(), top_k_targets(teacher.double(), 3))
    assert got.isfinite().all() and gradient(got, student).isfinite().all()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


# ---- the named biases ----------------------------------------------------------------


def off_support_pair():
    """A student with 98.8% of its mass where the teacher has almost none."""
    p = torch.tensor([[0.6, 0.3, 0.06, 0.04]], dtype=torch.float64)
    q = torch.tensor([[0.008, 0.004, 0.488, 0.5]], dtype=torch.float64)
    return q.log().requires_grad_(), p.log()


def test_renormalize_is_blind_to_the_tail_and_bucket_is_not():
    student, teacher = off_support_pair()
    dense = DIVERGENCES["forward_kl"](student, teacher)
    blind = sparse_divergence(student, top_k_targets(teacher, 2, "renormalize"))
    seeing = sparse_divergence(student, top_k_targets(teacher, 2, "bucket"))
    assert dense.item() > 3
    assert blind.item() == pytest.approx(0, abs=1e-12)
    assert gradient(blind, student).abs().max() < 1e-12  # nothing would be learnt
    assert seeing.item() > 0.95 * dense.item()
    assert gradient(seeing, student)[0, 2:].min() > 0.4  # the stray mass goes down


def test_zero_is_no_kl_it_is_negative_and_its_minimum_is_too_sharp():
    _, teacher = logits_pair(5, n=1)
    targets = top_k_targets(teacher, 3, "zero")
    mass = targets.log_probs.exp().sum().item()
    # At the teacher itself the loss is 0, but it is not the minimum ...
    at_teacher = teacher.clone().requires_grad_()
    loss = sparse_divergence(at_teacher, targets)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, at_teacher).abs().max() > 0.01
    # ... which is m log m < 0, at the teacher renormalised on its top k.
    sharp = torch.full_like(teacher, -math.inf)
    sharp.scatter_(1, targets.indices, targets.log_probs)
    sharp.requires_grad_()
    loss = sparse_divergence(sharp, targets)
    assert loss.item() == pytest.approx(mass * math.log(mass), rel=1e-12)
    assert loss.item() < -0.01
    assert gradient(loss, sharp).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_zero_gradient_is_the_closed_form_and_biased(name):
    student, teacher = logits_pair(6)
    targets = top_k_targets(teacher, 3, "zero", temperature=2.0)
    got = gradient(sparse_divergence(student, targets, name, temperature=2.0), student)
    p_s, p_t = (torch.softmax(z.detach() / 2, -1) for z in (student, teacher))
    kept = torch.zeros_like(p_t).scatter(1, targets.indices, 1.0) * p_t
    expected = (p_s * kept.sum(-1, keepdim=True) - kept) / 2
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    dense = (p_s - p_t) / 2
    assert (got - dense).norm() > 0.2 * dense.norm()


# ---- sampled targets -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_sampled_targets_are_unbiased_by_enumeration(
    monkeypatch, n_samples, temperature
):
    """Every possible outcome of the draw, weighted by its probability."""
    student, teacher = logits_pair(7, n=1, vocab=4, scale=1.0)
    outcomes = torch.tensor(list(itertools.product(range(4), repeat=n_samples)))
    p_t = torch.softmax(teacher[0] / temperature, -1)
    probability = p_t[outcomes].prod(-1)
    assert probability.sum().item() == pytest.approx(1)

    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: outcomes)
    rows = len(outcomes)
    targets = sampled_targets(
        teacher.expand(rows, -1), n_samples, temperature=temperature
    )
    for name in ("forward_kl", "cross_entropy"):
        dense = DIVERGENCES[name](student, teacher, temperature=temperature)
        losses = sparse_divergence(
            student.expand(rows, -1), targets, name, temperature=temperature
        )
        mean = (probability * losses).sum()
        assert mean.item() == pytest.approx(dense.item(), rel=1e-12)
        torch.testing.assert_close(
            gradient(mean, student), gradient(dense, student), rtol=1e-10, atol=1e-12
        )


def test_sampling_beats_top_k_in_the_gradients_bias():
    # 12 kept tokens of 400, flat teacher: the mean over 400 draws against one top 12
    student, teacher = logits_pair(8, n=1, vocab=400, scale=0.7)
    dense = gradient(DIVERGENCES["forward_kl"](student, teacher), student)
    generator = torch.Generator().manual_seed(0)
    targets = sampled_targets(teacher.expand(4000, -1), 12, generator)
    losses = sparse_divergence(student.expand(4000, -1), targets)
    sampled = gradient(losses / 4000, student)
    top = gradient(
        sparse_divergence(student, top_k_targets(teacher, 12, "renormalize")), student
    )
    assert (sampled - dense).norm() < 0.15 * dense.norm()
    assert (top - dense).norm() > 0.5 * dense.norm()


def test_sampled_targets_refuse_what_is_not_linear_in_the_teacher():
    student, teacher = logits_pair(9)
    for targets in (sampled_targets(teacher, 3), top_k_targets(teacher, 3, "zero")):
        for name in ("reverse_kl", "generalized_jsd", "tvd"):
            with pytest.raises(ArgumentError, match='tail="bucket"'):
                sparse_divergence(student, targets, name)


# ---- storage -------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["bucket", "zero", "renormalize"])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_small_storage_types_are_accepted(tail, k):
    # float16 has 11 significant bits: log p is off by 2^-11 of itself at most
    student, teacher = logits_pair(10, n=50)
    targets = top_k_targets(teacher, k, tail)
    small = SparseTargets(targets.indices.int(), targets.log_probs.half(), tail)
    got = sparse_divergence(student, small)
    expected = sparse_divergence(student, targets)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)
    assert gradient(got, student).isfinite().all()


def test_rows_can_be_selected_moved_and_joined():
    student, teacher = logits_pair(11, n=6)
    for targets in (top_k_targets(teacher, 3), sampled_targets(teacher, 5)):
        whole = sparse_divergence(student, targets)
        mask = torch.tensor([True, False, True, True, False, False])
        assert len(targets[mask]) == 3
        got = sparse_divergence(student[mask], targets[mask].to("cpu"))
        torch.testing.assert_close(got, whole[mask])
        joined = concatenate([targets[:2], targets[2:]])
        torch.testing.assert_close(sparse_divergence(student, joined), whole)
        assert joined.vocab_size == 12
    with pytest.raises(ArgumentError, match="2 kinds"):
        concatenate([top_k_targets(teacher, 3), top_k_targets(teacher, 3, "zero")])
    with pytest.raises(ArgumentError, match="at least one"):
        concatenate([])


def test_student_columns_beyond_the_teachers_vocabulary_are_dropped():
    student, teacher = logits_pair(12)
    padded = torch.cat([student, torch.full((5, 3), 40.0)], dim=1)
    for targets in (top_k_targets(teacher, 4), sampled_targets(teacher, 4)):
        assert torch.equal(
            sparse_divergence(padded, targets), sparse_divergence(student, targets)
        )


# ---- bad input -----------------------------------------------------------------------


def test_another_temperature_is_refused_and_would_be_wrong():
    student, teacher = logits_pair(13)
    targets = top_k_targets(teacher, 4)
    with pytest.raises(ArgumentError, match="made at 1.0"):
        sparse_divergence(student, targets, temperature=2.0)
    # re-tempered as one event, the rest gets another share than its tokens together
    p = torch.softmax(teacher, -1).sort(-1, descending=True).values
    rest = p[:, 4:].sum(-1)
    as_one = rest.sqrt() / (p[:, :4].sqrt().sum(-1) + rest.sqrt())
    truth = p[:, 4:].sqrt().sum(-1) / p.sqrt().sum(-1)
    assert (truth > 1.3 * as_one).all()


def test_arguments_that_do_not_fit_are_refused():
    student, teacher = logits_pair(14)
    targets = top_k_targets(teacher, 4)
    ids, log_probs = targets.indices, targets.log_probs
    with pytest.raises(ArgumentError, match="tail = 'buckets'"):
        SparseTargets(ids, log_probs, "buckets")
    with pytest.raises(ArgumentError, match=r"\[N, k\]"):
        SparseTargets(ids, log_probs[:, :2])
    with pytest.raises(ArgumentError, match="integer indices"):
        SparseTargets(log_probs, log_probs)
    with pytest.raises(ArgumentError, match='tail="zero"'):
        SparseTargets(ids, log_probs, "bucket", weights=log_probs.exp())
    with pytest.raises(ArgumentError, match="one row of logits"):
        sparse_divergence(student[:-1], targets)
    with pytest.raises(ArgumentError, match="vocabulary has 3"):
        sparse_divergence(student[:, :3], targets)
    with pytest.raises(ArgumentError, match="k = 13"):
        top_k_targets(teacher, 13)
    with pytest.raises(ArgumentError, match="n_samples = 0"):
        sampled_targets(teacher, 0)
    with pytest.raises(ArgumentError, match=r"shape \[N, V\]"):
        top_k_targets(teacher[0], 2)
    with pytest.raises(ArgumentError, match="did you mean"):
        sparse_divergence(student, targets, "reverse_k")
