"""An example of a private overlay: KD_PRIVATE names the folder that holds such files.

Copy it out of the repository before you change it: what stands here is public. It adds
hidden tests and a private bug to 4.1, and puts other questions in the place of 4.3
and 4.6.
"""

from __future__ import annotations

import torch

from instructor.overlay import Hidden, Variant, options
from kdlib.checks.frame import Bug, Choice, Code, Test


def _logits(rng, n, v):
    numbers = [[rng.gauss(0, 2) for _ in range(v)] for _ in range(n)]
    return torch.tensor(numbers, dtype=torch.float64)


def _rows(first, *_):
    return (len(first),)


# --- 4.1: more tests, and one more mistake to know by name ---


def _one_token(rng):
    """All but one token masked: the loss is 0 and no NaN."""
    student, teacher = _logits(rng, 2, 4), _logits(rng, 2, 4)
    student[:, 1:] = teacher[:, 1:] = float("-inf")
    yield student, teacher


def _many_tokens(rng):
    yield _logits(rng, 3, 40), _logits(rng, 3, 40)


def _clamped(student, teacher):
    """The student's probabilities kept above 1e-2, so that no logarithm is large."""
    v = min(student.shape[-1], teacher.shape[-1])
    p, q = teacher[:, :v].softmax(-1), student[:, :v].softmax(-1)
    return -(p * q.clamp(min=1e-2).log()).sum(-1)


HIDDEN = {
    "4.1": Hidden(
        tests=(
            Test("one token is left", 1, _one_token, _rows),
            Test("forty tokens", 1, _many_tokens, _rows),
        ),
        bugs=(Bug("clamped at 0.01", "It cuts off small probabilities.", _clamped),),
    )
}

# --- 4.3: another question of the same name and points ---


def _best(teacher_probs):
    return teacher_probs.square().sum(-1)


def _probs(rng):
    for n, v in ((1, 3), (4, 6)):
        yield (_logits(rng, n, v).softmax(-1),)


_AGREEMENT = Code(
    "4.3",
    "best_smoothing",
    ("teacher_probs",),
    (Test("any rows", 4, _probs, _rows),),
    _best,
    (
        Bug(
            "the largest probability",
            "Two draws may agree on any token, not on the likeliest alone.",
            lambda p: p.max(-1).values,
        ),
    ),
)

_TARGETS = """
**a.** A student is trained on the teacher's greedy answers. What is lost?

- **A** The teacher's doubt.
  > right: An answer does not say how sure the teacher was.
- **B** The teacher's favourite.
  > wrong: That is what is kept.

**b.** What do the teacher's distributions cost?

- **A** Nothing more than its answers.
  > wrong: There is a number for every token of the vocabulary.
- **B** A number for every token of the vocabulary.
  > right: Unless most of them are thrown away.

**c.** A label is drawn from the teacher. Its mean over many draws is

- **A** the teacher's distribution.
  > right: So the gradient has no bias.
- **B** the teacher's favourite.
  > wrong: Less likely tokens are drawn as well.

**d.** The cross-entropy of a perfect student is

- **A** zero.
  > wrong: Only where the teacher is certain.
- **B** the teacher's entropy.
  > right: The KL is zero, and the entropy is left.

**e.** The gradient by the student's logits is

- **A** the student's distribution minus the teacher's.
  > right: At temperature 1.
- **B** the teacher's distribution minus the student's.
  > wrong: That would lead uphill.
"""

VARIANTS = (
    Variant(
        _AGREEMENT,
        task="""
Two labels of one token are drawn from the teacher, independently. Write down the
probability that they **agree**, for each row of `teacher_probs`.
""",
        stub='''
def best_smoothing(teacher_probs: torch.Tensor) -> torch.Tensor:
    """The probability that two draws agree. teacher_probs [N, V] -> [N]"""
    raise NotImplementedError
''',
        solution="""
def best_smoothing(teacher_probs):
    return teacher_probs.square().sum(-1)
""",
    ),
    Variant(
        Choice("4.6", "which_target", "abcde", options(_TARGETS)),
        task="One option of each item is right.",
        stub="which_target = {'a': ..., 'b': ..., 'c': ..., 'd': ..., 'e': ...}",
        solution="which_target = {'a': 'A', 'b': 'B', 'c': 'A', 'd': 'B', 'e': 'A'}",
        options=_TARGETS,
    ),
)
