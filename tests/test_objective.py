"""The objective: weights, T^2, reductions, and the same loss under any split."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import ArgumentError
from kdlib.objective import Objective
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import sampled_targets, top_k_targets


def tokens(seed=0, n=7, vocab=9, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, vocab, generator=generator, dtype=torch.float64) * scale
    ids = torch.randint(vocab, (n,), generator=generator)
    return logits[0].requires_grad_(), logits[1], ids


def gradient(loss, logits):
    return torch.autograd.grad(loss.total, logits)[0]


# ---- what is summed ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params"),
    [("forward_kl", {}), ("reverse_kl", {}), ("generalized_jsd", {"beta": 0.3})],
)
@pytest.mark.parametrize("hard_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scale_by_t2", [True, False])
def test_total_is_the_formula(name, params, hard_weight, scale_by_t2):
    student, teacher, ids = tokens()
    objective = Objective(name, 3.0, scale_by_t2, hard_weight, divergence_params=params)
    got = objective(student, teacher, ids)
    soft = get_divergence(name, **params)(student, teacher, temperature=3.0)
    hard = -torch.log_softmax(student, -1)[torch.arange(7), ids]  # at temperature 1
    scale = 9.0 if scale_by_t2 else 1.0
    expected = (1 - hard_weight) * scale * soft + hard_weight * hard
    torch.testing.assert_close(got.per_token, expected.detach())
    torch.testing.assert_close(got.total, expected.sum() / 7)
    assert got.n_tokens == 7
    torch.testing.assert_close(got.parts["soft"], soft.mean().detach())
    torch.testing.assert_close(got.parts["hard"], hard.mean().detach())
    assert got.total.requires_grad
    assert not any(x.requires_grad for x in (got.per_token, *got.parts.values()))


def test_the_gradient_of_a_hand_worked_token():
    # p_s = (1/4, 3/4), p_t = (1/2, 1/2), y = 0, one token
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    got = Objective(hard_weight=0.5)(student, teacher, torch.tensor([0]))
    expected = 0.5 * 0.5 * math.log(4 / 3) + 0.5 * math.log(4)
    assert got.total.item() == pytest.approx(expected, rel=1e-14)
    # 1/2 (p_s - p_t) + 1/2 (p_s - onehot)
    by_hand = torch.tensor([[-0.125 - 0.375, 0.125 + 0.375]], dtype=torch.float64)
    torch.testing.assert_close(gradient(got, student), by_hand)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_hard_weight_one_is_cross_entropy(with_teacher):
    student, teacher, ids = tokens(1)
    teacher[0, 3] = -math.inf  # an infinite soft term of weight 0 must not matter
    objective = Objective("reverse_kl", 2.0, hard_weight=1)
    got = objective(student, teacher if with_teacher else None, ids)
    expected = F.cross_entropy(student, ids)
    torch.testing.assert_close(got.total, expected, rtol=1e-15, atol=0)
    assert torch.equal(got.per_token, F.cross_entropy(student, ids, reduction="none"))
    torch.testing.assert_close(
        gradient(got, student), torch.autograd.grad(expected, student)[0]
    )
    assert set(got.parts) == ({"soft", "hard"} if with_teacher else {"hard"})


def test_hard_weight_zero_does_not_see_the_labels():
    student, teacher, ids = tokens(2)
    with torch.no_grad():
        student[0, 4] = -math.inf  # an infinite hard term of weight 0 must not matter
    teacher[0, 4] = -math.inf
    losses = [
        Objective(temperature=2.0)(student, teacher, labels)
        for labels in (ids, (ids + 1) % 9, torch.full_like(ids, 4))
    ]
    assert losses[0].parts["hard"] != losses[1].parts["hard"]
    gradients = [gradient(loss, student) for loss in losses]
    for loss, grad in zip(losses, gradients, strict=True):
        assert torch.equal(loss.total, losses[0].total)
        assert torch.equal(grad, gradients[0])
        assert grad.isfinite().all()


def test_equal_logits_give_exactly_zero():
    student, _, ids = tokens(3)
    got = Objective(temperature=2.0)(student, student.detach(), ids)
    assert got.total.item() == 0.0
    assert gradient(got, student).abs().max() < 1e-15


def test_a_perturbed_teacher_changes_the_loss():
    student, teacher, ids = tokens(4)
    objective = Objective(hard_weight=0.9)
    before = objective(student, teacher, ids).total
    teacher[3, 2] += 0.5
    assert objective(student, teacher, ids).total != before


# ---- temperature ---------------------------------------------------------------------


def test_t2_multiplies_the_soft_gradient_alone():
    student, teacher, ids = tokens(5)
    scaled = gradient(Objective(temperature=5.0)(student, teacher, ids), student)
    plain = Objective(temperature=5.0, scale_by_t2=False)(student, teacher, ids)
    torch.testing.assert_close(scaled, 25 * gradient(plain, student))
    hard = [
        Objective(temperature=5.0, scale_by_t2=flag, hard_weight=1.0)(
            student, None, ids
        ).total
        for flag in (True, False)
    ]
    assert torch.equal(*hard)


def test_in_the_limit_of_high_temperature_logits_are_matched():
    # Hinton et al. 2015, section 2.1: the gradient tends to the centred difference of
    # the logits over V; the loss to half the variance of that difference.
    student, teacher, ids = tokens(6)
    got = Objective(temperature=1e4)(student, teacher, ids)
    difference = (student - teacher).detach()
    difference -= difference.mean(-1, keepdim=True)
    torch.testing.assert_close(
        gradient(got, student), difference / 9 / 7, rtol=2e-3, atol=1e-5
    )
    limit = 0.5 * difference.square().mean(-1)
    torch.testing.assert_close(got.per_token, limit, rtol=2e-3, atol=0)


# ---- reductions ----------------------------------------------------------------------


def test_reductions_by_hand():
    # sequences of 1, 2 and 4 tokens, mixed together
    student, teacher, ids = tokens(7)
    row_ids = torch.tensor([5, 0, 5, 3, 5, 0, 5])
    d = DIVERGENCES["forward_kl"](student, teacher).tolist()
    by_hand = {
        "sum": sum(d),
        "token_mean": sum(d) / 7,
        "sequence_mean": ((d[0] + d[2] + d[4] + d[6]) / 4 + (d[1] + d[5]) / 2 + d[3])
        / 3,
    }
    for reduction, expected in by_hand.items():
        got = Objective(reduction=reduction)(student, teacher, ids, row_ids=row_ids)
        assert got.total.item() == pytest.approx(expected, rel=1e-13)
        assert got.parts["soft"].item() == pytest.approx(expected, rel=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    cuts=st.sets(st.integers(1, 11), max_size=6),
    hard_weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_token_mean_under_any_micro_batch_split(seed, cuts, hard_weight, temperature):
    student, teacher, ids = tokens(seed, n=12)
    objective = Objective(temperature=temperature, hard_weight=hard_weight)
    whole = objective(student, teacher, ids)
    edges = [0, *sorted(cuts), 12]
    total, grad, soft = 0.0, torch.zeros_like(student), 0.0
    for a, b in zip(edges, edges[1:], strict=False):
        part = objective(student[a:b], teacher[a:b], ids[a:b], num_items=12)
        total, soft = total + part.total, soft + part.parts["soft"]
        grad += gradient(part, student)
    torch.testing.assert_close(total, whole.total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(soft, whole.parts["soft"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, gradient(whole, student), rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    batch_of=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_sequence_mean_under_any_split_of_whole_sequences(seed, lengths, batch_of):
    row_ids = torch.repeat_interleave(torch.tensor(lengths))
    student, teacher, ids = tokens(seed, n=len(row_ids))
    objective = Objective(temperature=2.0, hard_weight=0.3, reduction="sequence_mean")
    whole = objective(student, teacher, ids, row_ids=row_ids)
    total = 0.0
    for batch in set(batch_of[: len(lengths)]):
        mine = torch.tensor(batch_of)[row_ids] == batch
        total += objective(
            student[mine],
            teacher[mine],
            ids[mine],
            row_ids=row_ids[mine],
            num_items=len(lengths),
        ).total
    torch.testing.assert_close(total, whole.total, rtol=1e-12, atol=1e-14)


def test_means_of_micro_batches_without_num_items_do_depend_on_the_split():
    # the failure that num_items is for
    student, teacher, ids = tokens(8, n=10)
    objective = Objective()
    halves = [
        objective(student[a:b], teacher[a:b], ids[a:b]).total
        for a, b in ((0, 1), (1, 10))
    ]
    whole = objective(student, teacher, ids).total
    assert abs(sum(halves) / 2 - whole) > 0.01 * whole


def test_num_items_may_be_a_tensor():
    student, teacher, ids = tokens(9)
    as_int = Objective()(student, teacher, ids, num_items=21).total
    as_tensor = Objective()(student, teacher, ids, num_items=torch.tensor(21)).total
    assert torch.equal(as_int, as_tensor)


@pytest.mark.parametrize("copies", [3, 200])
def test_the_vocabulary_is_not_averaged_over(copies):
    student, teacher, ids = tokens(10)
    wide = [x.repeat_interleave(copies, -1) for x in (student, teacher)]
    torch.testing.assert_close(
        Objective()(*wide, ids * copies).total, Objective()(student, teacher, ids).total
    )


def test_repeated_tokens_do_not_change_a_mean():
    student, teacher, ids = tokens(11)
    twice = [torch.cat([x, x]) for x in (student, teacher, ids)]
    objective = Objective(hard_weight=0.5)
    torch.testing.assert_close(
        objective(*twice).total, objective(student, teacher, ids).total
    )


# ---- targets and precision -----------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_sparse_targets(name):
    student, teacher, ids = tokens(12)
    params = {"beta": 0.3} if name == "generalized_jsd" else {}
    targets = top_k_targets(teacher, 4, temperature=2.0)
    objective = Objective(name, 2.0, hard_weight=0.25, divergence_params=params)
    got = objective(student, targets, ids)
    soft = sparse_divergence(student, targets, name, temperature=2.0, **params)
    expected = 0.75 * 4 * soft.mean() + 0.25 * F.cross_entropy(student, ids)
    torch.testing.assert_close(got.total, expected)

    full = objective(student, top_k_targets(teacher, 9, temperature=2.0), ids)
    torch.testing.assert_close(full.total, objective(student, teacher, ids).total)


def test_sampled_targets_and_a_temperature_that_does_not_fit():
    student, teacher, ids = tokens(13)
    targets = sampled_targets(teacher, 3, torch.Generator().manual_seed(0))
    got = Objective()(student, targets, ids)
    torch.testing.assert_close(got.total, sparse_divergence(student, targets).mean())
    with pytest.raises(ArgumentError, match="targets were made at 1.0"):
        Objective(temperature=2.0)(student, targets, ids)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_logits_are_computed_in_float32(autocast):
    student, teacher, ids = tokens(14, n=64, vocab=300)
    student, teacher = student.detach().bfloat16(), teacher.bfloat16()
    student.requires_grad_()
    objective = Objective(temperature=2.0, hard_weight=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = objective(student, teacher, ids)
    exact = objective(student.double(), teacher.double(), ids)
    assert got.total.dtype == got.per_token.dtype == torch.float32
    torch.testing.assert_close(
        got.per_token.double(), exact.per_token, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(got.total.double(), exact.total, rtol=1e-5, atol=0)
    assert gradient(got, student).dtype == torch.bfloat16


def test_a_wider_teacher_vocabulary_is_cut():
    student, teacher, ids = tokens(15)
    wide = torch.cat([teacher, torch.full((7, 5), 30.0, dtype=torch.float64)], dim=1)
    assert torch.equal(
        Objective()(student, wide, ids).total, Objective()(student, teacher, ids).total
    )


def test_under_no_grad_nothing_is_recorded():
    student, teacher, ids = tokens(16)
    with torch.no_grad():
        assert not Objective(hard_weight=0.5)(student, teacher, ids).total.requires_grad


# ---- the settings as an object -------------------------------------------------------


def test_an_objective_can_be_printed_compared_and_hashed():
    a = Objective("generalized_jsd", 2.0, divergence_params={"beta": 0.3})
    b = Objective("generalized_jsd", 2.0, divergence_params={"beta": 0.3})
    c = Objective("generalized_jsd", 2.0, divergence_params={"beta": 0.4})
    assert a == b and hash(a) == hash(b) and a != c
    assert eval(repr(a)) == a  # what a checkpoint keeps is enough to rebuild it
    with pytest.raises(AttributeError):
        a.temperature = 3.0


def test_the_callers_dict_of_parameters_is_copied():
    params = {"beta": 0.3}
    objective = Objective("generalized_jsd", divergence_params=params)
    params["beta"] = 0.9
    assert objective.divergence_params == {"beta": 0.3}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"divergence": "forwrd_kl"}, "did you mean 'forward_kl'"),
        ({"divergence_params": {"beta": 0.5}}, "no parameter 'beta'"),
        ({"divergence": "skew_kl", "divergence_params": {"alpha": 2}}, "alpha = 2"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"hard_weight": 1.5}, "hard_weight = 1.5"),
        ({"hard_weight": math.nan}, "hard_weight = nan"),
        ({"reduction": "mean"}, "token_mean"),
        ({"reduction": "batchmean"}, "reduction = 'batchmean'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings_, message):
    with pytest.raises(ArgumentError, match=message):
        Objective(**settings_)


def test_arguments_that_do_not_fit_are_refused():
    student, teacher, ids = tokens(17)
    objective = Objective()
    with pytest.raises(ArgumentError, match="no response token"):
        objective(student[:0], teacher[:0], ids[:0])
    with pytest.raises(ArgumentError, match="no ignore_index"):
        objective(student, teacher, torch.where(ids == ids[0], -100, ids))
    with pytest.raises(ArgumentError, match="to 9, but the student's vocabulary has 9"):
        objective(student, teacher, torch.full_like(ids, 9))
    with pytest.raises(ArgumentError, match="teacher_targets is None"):
        objective(student, None, ids)
    with pytest.raises(ArgumentError, match="targets for 6 tokens"):
        objective(student, teacher[:-1], ids)
    with pytest.raises(ArgumentError, match=r"response_ids \[6\]"):
        objective(student, teacher, ids[:-1])
    with pytest.raises(ArgumentError, match="row_ids"):
        Objective(reduction="sequence_mean")(student, teacher, ids)
    with pytest.raises(ArgumentError, match="no denominator"):
        Objective(reduction="sum")(student, teacher, ids, num_items=7)
    with pytest.raises(ArgumentError, match="num_items = 0"):
        objective(student, teacher, ids, num_items=0)
