"""Hidden states: matched, related, read. The contrast to matching responses.

    hidden_mse             the student's states against the teacher's, projected
    relational_distance    the distances between examples, so no projection is needed
    relational_angle       the angles between triples of examples
    linear_probe           what a linear map can read from states

Knows: states [N, H] of the same N tokens or images on both sides. Does not know where
in a model they were taken. These losses are for comparison; the course trains by
responses (kdlib/objective.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    StudentStates = Float[Tensor, "n h_s"]
    TeacherStates = Float[Tensor, "n h_t"]
    Projection = Float[Tensor, "h_s h_t"]
    Scalar = Float[Tensor, ""]


def hidden_mse(
    student_states: StudentStates,
    teacher_states: TeacherStates,
    projection: Projection,
) -> Scalar:
    """Mean over tokens and teacher's dimensions of (h_s W - h_t)^2.

    projection: W, trained with the student and thrown away afterwards

    Source: the hints of Romero et al. 2014, FitNets (arXiv 1412.6550), with a linear
            map for their regressor.
    Raises ArgumentError where the shapes do not fit.
    """
    _check(student_states, teacher_states, 1)
    wanted = (student_states.shape[1], teacher_states.shape[1])
    if tuple(projection.shape) != wanted:
        raise ArgumentError(
            f"projection {list(projection.shape)}", f"give one of {list(wanted)}"
        )
    return F.mse_loss(student_states @ projection, teacher_states)


def relational_distance(
    student_states: StudentStates, teacher_states: TeacherStates
) -> Scalar:
    """Huber loss between the distances of all pairs, each side's in units of its mean.

    Shifting, turning or scaling all states of a side changes nothing.

    Source: Park et al. 2019 (arXiv 1904.05068), distance-wise loss.
    Raises ArgumentError for fewer than two states.
    """
    _check(student_states, teacher_states, 2)
    return F.smooth_l1_loss(_distances(student_states), _distances(teacher_states))


def relational_angle(
    student_states: StudentStates, teacher_states: TeacherStates
) -> Scalar:
    """Huber loss between the cosines of the angles i-j-k of all triples; N^3 numbers.

    Source: Park et al. 2019 (arXiv 1904.05068), angle-wise loss.
    Raises ArgumentError for fewer than three states.
    """
    _check(student_states, teacher_states, 3)
    return F.smooth_l1_loss(_cosines(student_states), _cosines(teacher_states))


def linear_probe(
    states: Float[Tensor, "n h"],
    labels: Int[Tensor, " n"],
    new_states: Float[Tensor, "m h"],
    *,
    ridge: float = 1.0,
) -> Int[Tensor, " m"]:
    """The labels that a linear map, fitted to states and labels, gives new states.

    Ridge regression to one-hot labels, solved in float64. States are standardised
    first, so that their scale does not decide how strong the ridge is.

    Source: Alain & Bengio 2016 (arXiv 1610.01644), who fit the probe by gradient.
    Raises ArgumentError where states and labels do not go together.
    """
    if len(states) != len(labels) or states.shape[1:] != new_states.shape[1:]:
        raise ArgumentError(
            f"states {list(states.shape)}, labels {list(labels.shape)}, new_states "
            f"{list(new_states.shape)}",
            "give states [n, H] with labels [n], and new_states [m, H]",
        )
    x, new = states.double(), new_states.double()
    mean, scale = x.mean(0), x.std(0)
    scale = scale.where(scale > 0, 1.0)  # a unit that is never on tells nothing
    x, new = (x - mean) / scale, (new - mean) / scale
    y = F.one_hot(labels).double()
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ y)
    return (new @ weights + y.mean(0)).argmax(-1)


def _distances(states) -> Float[Tensor, "n n"]:
    n = len(states)
    # cdist's slope is 0 where two states meet, as every state meets itself; and not by
    # a matrix product, which loses small distances
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(states, states, compute_mode=exact)
    mean = distances.sum() / (n * (n - 1))
    return distances / mean.where(mean > 0, 1.0)


def _cosines(states) -> Float[Tensor, "n n n"]:
    """[j, i, k]: of the angle at j between i and k; 0 where two of them are one."""
    unit = F.normalize(states - states[:, None], dim=-1)
    return unit @ unit.mT


def _check(student_states, teacher_states, least) -> None:
    n = len(student_states)
    if student_states.ndim != 2 or teacher_states.ndim != 2 or len(teacher_states) != n:
        raise ArgumentError(
            f"student_states {list(student_states.shape)}, teacher_states "
            f"{list(teacher_states.shape)}",
            "give [N, H_s] and [N, H_t], a row for each token on both sides",
        )
    if n < least:
        raise ArgumentError(f"{n} states", f"give at least {least} of them")
