"""Losses of hidden states against closed forms and symmetries, and the probe."""

from __future__ import annotations

import math

import pytest
import torch

from kdlib import features
from kdlib.errors import ArgumentError


def states(n, h, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, h, dtype=torch.float64, generator=generator)


def rotation(h, seed=0):
    return torch.linalg.qr(states(h, h, seed)).Q


def test_hidden_mse_by_hand():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 4], [0, 0]])
    projection = torch.tensor([[1.0, 2.0]])
    # rows (1, 2) and (2, 4) against (1, 4) and (0, 0)
    assert features.hidden_mse(student, teacher, projection) == (0 + 4 + 4 + 16) / 4


def test_relational_distance_by_hand():
    """Three states on a line: gaps 1, 2, 3, mean 2. Against 1, 1, 2, mean 4/3."""
    student, teacher = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.0], [1], [2]])
    gaps = [1 / 2 - 3 / 4, 2 / 2 - 3 / 4, 3 / 2 - 3 / 2]
    wanted = 2 * sum(gap**2 / 2 for gap in gaps) / 9  # each pair twice, of nine
    got = features.relational_distance(student, teacher)
    assert got.item() == pytest.approx(wanted)


def test_relational_angle_by_hand():
    """A right isosceles triangle against three points on a line."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0], [1.0], [-1.0]])
    # cosines at the three corners: 0, r, r with r = 1 / sqrt(2), against -1, 1, 1
    r = math.sqrt(0.5)
    gaps = [1.0, 1 - r, 1 - r]
    wanted = 2 * sum(gap**2 / 2 for gap in gaps) / 27
    got = features.relational_angle(student, teacher)
    assert got.item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    "loss", [features.relational_distance, features.relational_angle]
)
def test_relations_do_not_see_a_move_a_turn_or_a_scale(loss):
    x, y = states(7, 5), states(7, 4, seed=1)
    moved = 3 * (x @ rotation(5)) + 2
    torch.testing.assert_close(loss(x, y), loss(moved, y))
    assert loss(moved, x) < 1e-20 < loss(x, y)
    stretched = x * torch.linspace(1, 3, 5, dtype=torch.float64)
    assert loss(stretched, x) > 1e-4


@pytest.mark.parametrize(
    "loss", [features.relational_distance, features.relational_angle]
)
def test_relations_have_right_and_finite_gradients(loss):
    y = states(5, 4, seed=1)
    x = states(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x)
    twins = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    loss(twins, y[:4]).backward()
    assert twins.grad.isfinite().all()


def test_a_probe_finds_what_is_linear_and_not_what_is_none():
    x, new = states(400, 6), states(400, 6, seed=1)
    direction = states(1, 6, seed=2)[0]

    def score(label):
        found = features.linear_probe(x, label(x), new)
        return (found == label(new)).double().mean().item()

    assert score(lambda s: (s @ direction > 0).long()) > 0.9
    assert 0.35 < score(lambda s: (s.prod(1) > 0).long()) < 0.65


def test_a_probe_is_ridge_regression_to_one_hot_labels():
    """Two states, one dimension: x = -1, 1 standardised by sqrt(2)."""
    x, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    # w = (x y) / (x x + ridge) > 0: the sign of the new state decides
    new = torch.tensor([[-0.1], [0.1]])
    assert features.linear_probe(x, labels, new).tolist() == [0, 1]
    # a far too strong ridge leaves the more frequent label
    labels = torch.tensor([0, 1, 1])
    x = torch.tensor([[-1.0], [1.0], [1.0]])
    found = features.linear_probe(x, labels, new, ridge=1e9)
    assert found.tolist() == [1, 1]


def test_a_probe_does_not_depend_on_scale_and_stands_dead_units():
    x, new = states(60, 5), states(60, 5, seed=1)
    labels = (x[:, 0] > 0).long()
    wanted = features.linear_probe(x, labels, new)
    scale = torch.tensor([1e-3, 1, 10, 1e4, 2], dtype=torch.float64)
    again = features.linear_probe(x * scale + 7, labels, new * scale + 7)
    assert torch.equal(again, wanted)
    dead = torch.zeros(60, 1, dtype=torch.float64)
    with_dead = features.linear_probe(
        torch.hstack([x, dead]), labels, torch.hstack([new, dead])
    )
    assert torch.equal(with_dead, wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda: features.hidden_mse(states(3, 2), states(3, 4), states(4, 2)),
        lambda: features.hidden_mse(states(3, 2), states(2, 4), states(2, 4)),
        lambda: features.relational_distance(states(1, 2), states(1, 2)),
        lambda: features.relational_angle(states(2, 2), states(2, 2)),
        lambda: features.relational_angle(states(4, 2)[0], states(4, 2)),
        lambda: features.linear_probe(states(3, 2), torch.tensor([0, 1]), states(1, 2)),
        lambda: features.linear_probe(states(2, 2), torch.tensor([0, 1]), states(1, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ArgumentError, match="give"):
        call()
