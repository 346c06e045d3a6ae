"""The fused loss of sparse targets against its meaning, worked out with all logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_fused import PARAMS, Recorder

from kdlib import fused, fused_gradient
from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import ArgumentError
from kdlib.fused import fused_sparse_divergence
from kdlib.heads import Head
from kdlib.sparse_targets import SparseTargets, sampled_targets, top_k_targets

PLAIN = {"bias": False, "scale": 1.0, "softcap": None, "temperature": 1.0}
SHAPED = {"bias": True, "scale": 0.5, "softcap": 3.0, "temperature": 1.5}
ROWS, WIDTH, VOCAB, TEACHER_VOCAB, K = 7, 5, 37, 33, 4


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """Random hidden states, a head and targets, and what must come out, in float64."""

    def __init__(self, tail, *, bias, scale, softcap, temperature, rows=ROWS, k=K):
        g = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.tail, self.temperature = tail, temperature
        self.hidden, self.weight = draw(rows, WIDTH), draw(VOCAB, WIDTH)
        self.bias = draw(VOCAB) if bias else None
        self.leaves = [
            x for x in (self.hidden, self.weight, self.bias) if x is not None
        ]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.head = Head(self.weight, self.bias, scale, softcap)
        self.teacher = draw(rows, TEACHER_VOCAB)
        if tail == "sampled":
            self.targets = sampled_targets(self.teacher, k, g, temperature=temperature)
        else:
            self.targets = top_k_targets(self.teacher, k, tail, temperature=temperature)
        self.weights = torch.rand(rows, generator=g, dtype=torch.float64)
        self.labels = torch.randint(VOCAB, (rows,), generator=g)
        self.label_weights = 3 * self.weights.flip(0) + 0.5

    def meaning(self, name, hard, **params):
        logits = self.head.logits(self.hidden)
        p_s = (logits[:, :TEACHER_VOCAB] / self.temperature).softmax(-1)
        ids, kept_t = self.targets.indices, self.targets.log_probs.exp()
        kept_s = p_s.gather(-1, ids)
        if self.tail == "bucket":
            kept_s, kept_t = (
                torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1)
                for x in (kept_s, kept_t)
            )
        if self.tail in ("bucket", "renormalize"):
            per_token = get_divergence(name, **params)(kept_s.log(), kept_t.log())
        else:
            w = kept_t if self.targets.weights is None else self.targets.weights
            entropy = kept_t.log() if name == "forward_kl" else 0.0
            per_token = (w * (entropy - kept_s.log())).sum(-1)
        total, of_labels = (self.weights * per_token).sum(), None
        if hard:
            of_labels = F.cross_entropy(logits, self.labels, reduction="none")
            total = total + (self.label_weights * of_labels).sum()
        return total, per_token, of_labels, torch.autograd.grad(total, self.leaves)

    def fused(self, name, hard, head=None, **options):
        if hard:
            options |= {"labels": self.labels, "label_weights": self.label_weights}
        return fused_sparse_divergence(
            self.hidden,
            head or self.head,
            self.targets,
            divergence=name,
            temperature=self.temperature,
            token_weights=self.weights,
            **options,
        )


def assert_its_meaning(problem, name, hard, **options):
    params = {k: v for k, v in options.items() if k != "workspace"}
    total, per_token, of_labels, gradients = problem.meaning(name, hard, **params)
    found = problem.fused(name, hard, **options)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.per_token, per_token.detach(), **close)
    torch.testing.assert_close(found.total, total, **close)
    if hard:
        torch.testing.assert_close(found.hard, of_labels.detach(), **close)
    for gradient, wanted in zip(
        torch.autograd.grad(found.total, problem.leaves), gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **close)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("hard", [False, True])
def test_the_tails_of_every_divergence(name, tail, shape, hard):
    assert_its_meaning(Problem(tail, **shape), name, hard, **PARAMS.get(name, {}))


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("tail", ["zero", "sampled"])
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("hard", [False, True])
def test_what_is_linear_in_the_teacher(name, tail, shape, hard):
    problem = Problem(tail, **shape)
    assert_its_meaning(problem, name, hard)
    if tail == "sampled":  # rows with fewer distinct tokens are padded
        assert (problem.targets.weights == 0).any()


@pytest.mark.parametrize("tail", ["bucket", "zero", "sampled"])
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_chunks_and_slices_change_nothing(tail, shape, monkeypatch):
    problem = Problem(tail, **shape)
    for rows in (1, 2, 3):
        workspace = 5 * rows * fused._padded(VOCAB) * 8
        assert_its_meaning(problem, "forward_kl", False, workspace=workspace)
    for slices in (fused_gradient.SLICE, fused_gradient.KEPT_SLICE):
        monkeypatch.setitem(slices, "cpu", 2 * VOCAB)
    assert_its_meaning(problem, "forward_kl", False)


@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_all_tokens_kept(shape):
    problem = Problem("bucket", **shape, k=TEACHER_VOCAB)
    problem.tail = "renormalize"  # there is no rest
    assert_its_meaning(problem, "forward_kl", False)


@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_a_student_that_rules_all_others_out(shape):
    """Finite where the teacher does, too, and without a gradient to those others."""
    problem = Problem("bucket", **(shape | {"softcap": None, "bias": True}), rows=1)
    kept = problem.targets.indices[0]
    mask = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
    mask[kept] = 0.0
    head = replace(problem.head, bias=mask.requires_grad_())
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    certain = replace(problem.targets, log_probs=p.log()[None])
    for targets, finite in ((certain, True), (problem.targets, False)):
        problem.targets = targets
        found = problem.fused("forward_kl", False, head=head)
        assert found.per_token.isfinite().all() == finite
        assert finite or found.per_token == torch.inf
    problem.targets = certain
    found = problem.fused("forward_kl", False, head=head)
    (gradient,) = torch.autograd.grad(found.total, mask)
    z = head.logits(problem.hidden).detach()[0, kept] / problem.temperature
    wanted = problem.weights * (z.softmax(-1) - p) / problem.temperature * head.scale
    torch.testing.assert_close(gradient[kept], wanted)
    gradient[kept] = 0.0
    assert not gradient.any()


@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_bfloat16_is_rounded_once(tail):
    problem = Problem(tail, **PLAIN, rows=64)
    wanted = problem.meaning("forward_kl", False)
    half = [x.detach().bfloat16().requires_grad_() for x in problem.leaves]
    problem.hidden, problem.head = half[0], replace(problem.head, weight=half[1])
    found = problem.fused("forward_kl", False)
    assert found.per_token.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), wanted[0], rtol=1e-2, atol=0)
    gradients = torch.autograd.grad(found.total, half)
    for gradient, right in zip(gradients, wanted[-1], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("hard", [False, True])
def test_nothing_of_the_size_of_the_logits_is_made(hard):
    problem = Problem("bucket", **PLAIN, rows=64)
    one_row = 5 * fused._padded(VOCAB) * 8
    with Recorder() as seen:
        problem.fused("forward_kl", hard, workspace=one_row).total.backward()
    # The head's gradient is the largest thing, or a panel of five rows.
    assert seen.largest <= max(VOCAB * WIDTH, 5 * fused._padded(VOCAB)) < 64 * VOCAB


def test_three_products_one_without_gradient():
    problem = Problem("bucket", **PLAIN)
    one = ROWS * TEACHER_VOCAB * WIDTH
    with Recorder() as seen:
        problem.fused("forward_kl", False).total.backward()
    assert seen.multiplications == 3 * one
    with torch.no_grad(), Recorder() as seen:
        found = problem.fused("forward_kl", False)
    assert seen.multiplications == one
    wanted = problem.meaning("forward_kl", False)[1].detach()
    torch.testing.assert_close(found.per_token, wanted)


def test_no_rows_give_zero():
    problem = Problem("bucket", **PLAIN)
    problem.hidden = problem.hidden[:0]
    problem.targets, problem.weights = problem.targets[:0], problem.weights[:0]
    found = problem.fused("forward_kl", False)
    found.total.backward()
    assert found.total == 0
    assert not problem.weight.grad.any()


@pytest.mark.parametrize(
    ("tail", "name", "change", "message"),
    [
        ("bucket", "forward", {}, "'forward' is unknown"),
        ("zero", "reverse_kl", {}, "'reverse_kl' with tail \"zero\""),
        ("bucket", "forward_kl", {"temperature": 2.0}, "temperature = 2.0, but"),
        ("bucket", "forward_kl", {"rows": 3}, "7 student rows, 3 targets"),
        ("bucket", "forward_kl", {"more": 40}, "target token ids from 4"),
    ],
)
def test_bad_input_is_named(tail, name, change, message):
    problem = Problem(tail, **PLAIN)
    problem.temperature = change.get("temperature", 1.0)
    problem.targets = problem.targets[: change.get("rows")]
    moved = problem.targets.indices + change.get("more", 0)
    problem.targets = replace(problem.targets, indices=moved)
    with pytest.raises(ArgumentError, match=message):
        problem.fused(name, False)


def test_small_storage_types():
    problem = Problem("bucket", **PLAIN)
    wanted = problem.fused("forward_kl", False).total
    small = SparseTargets(
        problem.targets.indices.to(torch.int16),
        problem.targets.log_probs.half(),
        vocab_size=TEACHER_VOCAB,
    )
    problem.targets = small
    found = problem.fused("forward_kl", False).total
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
