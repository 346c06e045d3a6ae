"""exact.py against truths that do not use its tables: Python loops, formulas on paper,
finite differences, and direct minimisation."""

import itertools
import math

import pytest
import torch

from kdlib.divergences import forward_kl, reverse_kl, tvd
from kdlib.errors import ArgumentError
from kdlib.estimators import estimate, surrogate
from kdlib.exact import (
    ExactLM,
    context_floor,
    estimator_moments,
    on_policy_gradient,
    reverse_context_floor,
    sequence_entropy,
    sequence_forward_kl,
    sequence_reverse_kl,
    sequences,
    token_level,
)

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def two_models(vocab=4, length=3, contexts=2):
    teacher = ExactLM.random(vocab, length, contexts, scale=1.5, seed=1)
    return teacher, ExactLM.random(vocab, length, contexts, seed=2)


def probability(model, context, tokens):
    """Pr(tokens | context) by walking the tables, in plain Python."""
    product, prefix = 1.0, 0
    for t, token in enumerate(tokens):
        logits = model.tables[t][context, prefix].tolist()
        product *= math.exp(logits[token]) / sum(math.exp(z) for z in logits)
        prefix = prefix * model.vocab + token
    return product


def by_loop(model, other, context, summand):
    return sum(
        summand(probability(model, context, y), probability(other, context, y))
        for y in itertools.product(range(model.vocab), repeat=model.length)
    )


def test_sequences_are_numbered_as_the_tables_number_them():
    model, _ = two_models()
    listed = sequences(4, 3).tolist()
    assert listed == [list(y) for y in itertools.product(range(4), repeat=3)]
    walked = [[probability(model, c, y) for y in listed] for c in range(2)]
    torch.testing.assert_close(
        model.log_probs().exp(), torch.tensor(walked, dtype=torch.float64), **TOLERANCE
    )
    assert sequences(5, 1).shape == (5, 1)


def test_sequence_level_quantities_equal_the_sum_written_as_a_loop():
    teacher, student = two_models()
    for c in range(2):
        kl = by_loop(teacher, student, c, lambda p, q: p * math.log(p / q))
        reverse = by_loop(teacher, student, c, lambda p, q: q * math.log(q / p))
        entropy = by_loop(teacher, student, c, lambda p, q: -p * math.log(p))
        assert sequence_forward_kl(teacher, student)[c].item() == pytest.approx(
            kl, rel=1e-11
        )
        assert sequence_reverse_kl(teacher, student)[c].item() == pytest.approx(
            reverse, rel=1e-11
        )
        assert sequence_entropy(teacher)[c].item() == pytest.approx(entropy, rel=1e-11)
    assert abs(kl - reverse) > 0.1  # the two directions are told apart


def test_chain_rule_with_prefixes_of_the_first_argument():
    teacher, student = two_models(vocab=8, length=4)
    forward = token_level(teacher, student, prefixes_from=teacher)
    assert forward.shape == (4, 2)
    torch.testing.assert_close(
        forward.sum(0), sequence_forward_kl(teacher, student), **TOLERANCE
    )
    reverse = token_level(
        teacher, student, prefixes_from=student, divergence=reverse_kl
    )
    torch.testing.assert_close(
        reverse.sum(0), sequence_reverse_kl(teacher, student), **TOLERANCE
    )
    # with the other side's prefixes it is another quantity: exposure bias
    exposed = token_level(teacher, student, prefixes_from=student)
    assert (exposed.sum(0) - forward.sum(0)).abs().min() > 1e-3


def test_token_level_takes_any_divergence_and_a_student_without_context():
    teacher, _ = two_models()
    blind = ExactLM.random(4, 3, 1, seed=5)
    got = token_level(teacher, blind, prefixes_from=teacher, divergence=tvd)
    p, q = teacher.tables[0].softmax(-1), blind.tables[0].softmax(-1)
    torch.testing.assert_close(got[0], 0.5 * (p - q).abs().sum(-1)[:, 0], **TOLERANCE)


def test_on_policy_gradient_equals_finite_differences():
    teacher, student = two_models()
    gradient = on_policy_gradient(teacher, student)
    step = 1e-5
    for t, index in [(0, (0, 0, 1)), (1, (1, 2, 0)), (2, (0, 13, 3))]:
        values = []
        for sign in (1, -1):
            moved = ExactLM([table.clone() for table in student.tables])
            moved.tables[t][index] += sign * step
            values.append(sequence_reverse_kl(teacher, moved).sum().item())
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[t][index].item() == pytest.approx(difference, abs=1e-9)


def test_on_policy_gradient_equals_the_policy_gradient_theorem():
    """At a prefix: Pr(h) p (A - sum p A), A the log-ratio from there to the end."""
    teacher, student = two_models()
    gradient = on_policy_gradient(teacher, student)
    to_come = torch.zeros(2, 4**3, dtype=torch.float64)
    for t in (2, 1, 0):
        log_p = student.tables[t].log_softmax(-1)
        ratio = (
            log_p - teacher.tables[t].log_softmax(-1) + to_come.unflatten(1, (-1, 4))
        )
        to_come = (log_p.exp() * ratio).sum(-1)
        reached = student.log_probs(t).exp().unsqueeze(-1)
        expected = reached * log_p.exp() * (ratio - to_come.unsqueeze(-1))
        torch.testing.assert_close(gradient[t], expected, **TOLERANCE)


def test_gradient_does_not_run_between_tables_made_from_one_joint():
    joint = torch.randn(1, 27, dtype=torch.float64).requires_grad_()
    teacher, student = ExactLM.random(3, 3, seed=3), ExactLM.from_joint(joint, 3)
    apart = ExactLM([table.detach().clone() for table in student.tables])
    for a, b in zip(
        on_policy_gradient(teacher, student),
        on_policy_gradient(teacher, apart),
        strict=True,
    ):
        assert torch.equal(a, b)


ESTIMATORS = {
    "k1": lambda log_ps, log_pt: log_ps - log_pt,
    "k2": lambda log_ps, log_pt: 0.5 * (log_ps - log_pt).square(),
    "k3": lambda log_ps, log_pt: torch.expm1(log_pt - log_ps) - (log_pt - log_ps),
    "score_function": lambda log_ps, log_pt: (log_ps - log_pt).detach() * log_ps,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_moments_equal_those_of_every_single_sample(name):
    """Every sequence's value and gradient, one by one through autograd."""
    teacher, student = ExactLM.random(3, 2, seed=1), ExactLM.random(3, 2, seed=2)
    got = estimator_moments(ESTIMATORS[name], teacher, student)
    probabilities, values, gradients = [], [], []
    for y in range(9):
        leaves = student.leaves()
        log_ps = leaves.log_probs()[:, y]
        value = ESTIMATORS[name](log_ps, teacher.log_probs()[:, y])
        probabilities.append(log_ps.detach().exp())
        values.append(value.detach())
        grads = torch.autograd.grad(value, leaves.tables)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    p, v = torch.cat(probabilities), torch.cat(values)
    g = torch.stack(gradients)
    mean_g = p @ g
    torch.testing.assert_close(got.mean, (p @ v)[None], **TOLERANCE)
    variance = p @ (v - p @ v).square()
    torch.testing.assert_close(got.variance, variance[None], **TOLERANCE)
    got_gradient = torch.cat([t.flatten() for t in got.gradient])
    torch.testing.assert_close(got_gradient, mean_g, **TOLERANCE)
    spread = p @ (g - mean_g).square().sum(-1)
    torch.testing.assert_close(got.gradient_variance, spread[None], **TOLERANCE)


def test_what_each_estimator_estimates():
    """At full size: 4096 sequences, and the table in estimators.py holds to 1e-10."""
    teacher, student = (ExactLM.random(scale=0.7, seed=s) for s in (1, 2))
    truth = sequence_reverse_kl(teacher, student)
    reverse = on_policy_gradient(teacher, student)
    leaves = student.leaves()
    forward = torch.autograd.grad(
        sequence_forward_kl(teacher, leaves).sum(), leaves.tables
    )
    zero = [torch.zeros_like(g) for g in reverse]
    moments = {n: estimator_moments(f, teacher, student) for n, f in ESTIMATORS.items()}
    for name, gradient in [
        ("k1", zero),
        ("k2", reverse),
        ("k3", list(forward)),
        ("score_function", reverse),
    ]:
        for got, expected in zip(moments[name].gradient, gradient, strict=True):
            torch.testing.assert_close(got, expected, **TOLERANCE)
    for name in ("k1", "k3"):
        torch.testing.assert_close(moments[name].mean, truth, **TOLERANCE)
    assert abs(moments["k2"].mean - truth) > 0.05  # biased
    torch.testing.assert_close(
        moments["k2"].gradient_variance, moments["score_function"].gradient_variance
    )
    for name in ("k1", "k2", "k3"):  # kdlib's own functions are these formulas
        own = estimator_moments(
            lambda s, t, n=name: estimate(n, s, t), teacher, student
        )
        torch.testing.assert_close(own.mean, moments[name].mean, **TOLERANCE)
    own = estimator_moments(
        lambda s, t: surrogate("score_function", s, t), teacher, student
    )
    torch.testing.assert_close(own.gradient[0], reverse[0], **TOLERANCE)


def test_context_floor_is_mutual_information_written_as_a_loop():
    teacher = ExactLM.random(3, 2, 3, scale=2.0, seed=4)
    prior = [0.5, 0.3, 0.2]
    floor, _ = context_floor(teacher, prior)
    information = 0.0
    for y in itertools.product(range(3), repeat=2):
        joint = [w * probability(teacher, c, y) for c, w in enumerate(prior)]
        information += sum(
            pc * math.log(pc / (w * sum(joint)))
            for pc, w in zip(joint, prior, strict=True)
        )
    assert floor.item() == pytest.approx(information, abs=1e-10)
    assert floor > 0.2


@pytest.mark.parametrize(
    ("floor_of", "kl"),
    [
        (context_floor, sequence_forward_kl),
        (reverse_context_floor, sequence_reverse_kl),
    ],
)
def test_no_student_gets_below_the_floor_and_one_reaches_it(floor_of, kl):
    """Direct minimisation over every table of a student that sees only x'."""
    teacher = ExactLM.random(3, 2, 4, scale=1.5, seed=4)
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    simplified = [0, 0, 1, 0]
    floor, best = floor_of(teacher, prior.tolist(), simplified)
    student = ExactLM.random(3, 2, 2, seed=9).leaves()

    def loss_of(model):  # each context meets the row of its own x'
        seen = ExactLM([table[simplified] for table in model.tables])
        return prior @ kl(teacher, seen)

    optimiser = torch.optim.LBFGS(
        student.tables,
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = loss_of(student)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert loss_of(best).item() == pytest.approx(floor.item(), abs=1e-10)
    reached = loss_of(student).item()
    assert floor.item() - 1e-12 < reached < floor.item() + 1e-10
    torch.testing.assert_close(
        student.log_probs().exp(), best.log_probs().exp(), rtol=0, atol=1e-5
    )


def test_floor_is_zero_where_nothing_is_lost():
    teacher = ExactLM.random(3, 2, 3, scale=2.0, seed=4)
    floor, best = context_floor(teacher, simplified=[2, 0, 1])
    assert abs(floor.item()) < 1e-12
    torch.testing.assert_close(
        best.log_probs()[[2, 0, 1]], teacher.log_probs(), **TOLERANCE
    )
    same = ExactLM([table[:1].expand(3, -1, -1) for table in teacher.tables])
    assert abs(context_floor(same)[0].item()) < 1e-12
    assert abs(reverse_context_floor(same)[0].item()) < 1e-12


def test_every_joint_has_tables():
    joint = torch.randn(2, 4**3, dtype=torch.float64, generator=torch.manual_seed(0))
    model = ExactLM.from_joint(joint, 4)
    torch.testing.assert_close(model.log_probs(), joint.log_softmax(-1), **TOLERANCE)


def test_bimodal_teacher_and_what_a_memoryless_student_makes_of_it():
    modes = [(0, 0), (1, 1)]
    teacher = ExactLM.from_modes(modes, [0.6, 0.4], vocab=3, noise=0.03)
    p = teacher.log_probs().exp().view(3, 3)
    hit, miss = 0.97 + 0.01, 0.01
    assert p[0, 0].item() == pytest.approx(0.6 * hit**2 + 0.4 * miss**2, abs=1e-12)
    assert p[0, 1].item() == pytest.approx(hit * miss, abs=1e-12)

    def distil(kl):
        logits = torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
        logits = logits.repeat(1, 2, 1).requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.05)
        for _ in range(400):
            optimiser.zero_grad()
            kl(teacher, ExactLM.memoryless(logits)).sum().backward()
            optimiser.step()
        return ExactLM.memoryless(logits).log_probs().exp().view(3, 3).detach()

    covering, seeking = distil(sequence_forward_kl), distil(sequence_reverse_kl)
    # forward KL: the product of the teacher's marginals, so half of it means nothing
    marginals = p.sum(1)[:, None] * p.sum(0)
    torch.testing.assert_close(covering, marginals, rtol=0, atol=1e-3)
    assert covering[0, 1] > 0.2 and covering[1, 0] > 0.2
    assert seeking[0, 0] > 0.9  # reverse KL: one mode, and no nonsense


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ArgumentError, match=r"table 1.*\n.*\[2, 3, 3\]"):
        ExactLM([torch.zeros(2, 1, 3), torch.zeros(2, 2, 3)])
    with pytest.raises(ArgumentError, match="one number for each sequence"):
        ExactLM.from_joint(torch.zeros(1, 10), 3)
    with pytest.raises(ArgumentError, match="table 0 has a logit that is not finite"):
        ExactLM([torch.tensor([[[0.0, -math.inf]]])])
    with pytest.raises(ArgumentError, match="not finite"):
        ExactLM.from_modes([(0, 1)], vocab=2, noise=0.0)
    with pytest.raises(ArgumentError, match=r"\(2, 4\) and \(4, 2\)"):  # both have 16
        sequence_reverse_kl(ExactLM.random(4, 2), ExactLM.random(2, 4))
    two, three = ExactLM.random(2, 2, 2), ExactLM.random(2, 2, 3)
    with pytest.raises(ArgumentError, match="2 and 3 contexts"):
        sequence_forward_kl(two, three)
    with pytest.raises(ArgumentError, match="2 and 3 contexts"):
        token_level(two, two, prefixes_from=three)
    teacher, student = ExactLM.random(3, 2, 2), ExactLM.random(3, 2, 1)
    with pytest.raises(ArgumentError, match="as many contexts"):
        estimator_moments(ESTIMATORS["k1"], teacher, student)
    with pytest.raises(ArgumentError, match="2 contexts"):
        context_floor(teacher, [1.0])
    with pytest.raises(ArgumentError, match="sum 1"):
        context_floor(teacher, [0.5, 0.6])


def test_default_divergence_is_forward():
    teacher, student = two_models()
    assert torch.equal(
        token_level(teacher, student, prefixes_from=student),
        token_level(teacher, student, prefixes_from=student, divergence=forward_kl),
    )
