"""Numbers as students return them: ints, floats, fractions, arrays, tensors, lists.

Works by `dtype`, `shape` and `tolist`, so that neither torch nor numpy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real

# Relative error that another order of operations may cause.
TOLERANCE = {"float32": 1e-5}
EXACT = 1e-9  # float64 and whole numbers


class Unfit(Exception):
    """A value that cannot be compared: the bug's short name, and a sentence."""

    def __init__(self, bug: str, sentence: str):
        self.bug, self.sentence = bug, sentence
        super().__init__(sentence)


def read(value: object, shape: Sequence[int] = ()) -> tuple[list[float], float]:
    """A value's numbers, row after row, and the tolerance that its dtype calls for.

    Raises Unfit for None, another type, another shape, NaN, infinity, half precision.
    """
    kind = type(value).__name__
    if value is None:
        raise Unfit("no return", "It returned None. Did you forget `return`?")
    dtypes: set[str] = set()
    try:
        value = _plain(value, dtypes)
        numbers = _flat(value)
        found = _shape(value)
    except Exception:  # a list within itself, a class of the student's own
        numbers = [None]
    if dtypes & {"float16", "bfloat16"}:
        raise Unfit("half precision", "Half precision is too coarse: use float32.")
    if not all(_is_number(x) for x in numbers):
        raise Unfit("wrong type", f"It returned a {kind}; wanted: {_wanted(shape)}.")
    if found != tuple(shape):
        raise Unfit(
            "wrong shape", f"The shape is {list(found)}; wanted: {_wanted(shape)}."
        )
    try:
        numbers = [float(x) for x in numbers]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise Unfit("not finite", "It returned NaN or an infinity.")
    return numbers, _widest(dtypes)


def tolerance(value: object) -> float:
    """What the coarsest dtype in a value, or in a tuple of arguments, calls for."""
    dtypes: set[str] = set()
    _plain(value, dtypes)
    return _widest(dtypes)


def _widest(dtypes: set[str]) -> float:
    return max([EXACT, *(TOLERANCE.get(name, EXACT) for name in dtypes)])


def same(
    got: Sequence[float], wanted: Sequence[float], tolerance: float, zero: float = 0.0
) -> bool:
    """Whether all numbers agree within a relative tolerance, or differ by `zero`."""
    return len(got) == len(wanted) and all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=zero)
        for a, b in zip(got, wanted, strict=True)
    )


def ratio(
    got: Sequence[float], wanted: Sequence[float], tolerance: float
) -> float | None:
    """The one factor between two values; None where there is none."""
    if len(got) != len(wanted) or not all(wanted) or not all(got):
        return None
    factors = [a / b for a, b in zip(got, wanted, strict=True)]
    near = all(math.isclose(f, factors[0], rel_tol=tolerance) for f in factors)
    return factors[0] if near else None


def times(factor: float) -> str:
    """Such as "4 times too large"."""
    if factor < 0:
        return (
            "of the wrong sign"
            if math.isclose(factor, -1, rel_tol=1e-4)
            else f"{factor:.4g} times the right one"
        )
    if factor > 1:
        return f"{factor:.4g} times too large"
    return f"{1 / factor:.4g} times too small"


def show(value: object) -> str:
    """An input or a result in a message: short, and equal every time."""
    try:
        text = repr(_plain(value, set()))
        if getattr(value, "shape", ()) != ():
            text = f"tensor({text})"
    except Exception:
        text = " at 0x"
    if " at 0x" in text:  # an address says nothing, and differs every time
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:160] + " ..."


def _plain(value: object, dtypes: set[str]) -> object:
    """Tensors and arrays as lists and numbers; their dtypes go into `dtypes`."""
    if hasattr(value, "tolist"):
        dtypes.add(str(getattr(value, "dtype", "")).removeprefix("torch."))
        return (value.detach() if hasattr(value, "detach") else value).tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item, dtypes) for item in value]
    return value


def _is_number(x: object) -> bool:
    return isinstance(x, (Real, Decimal)) and not isinstance(x, bool)


def _shape(value: object) -> tuple[int, ...]:
    if isinstance(value, list):
        return (len(value), *(_shape(value[0]) if value else ()))
    return ()


def _flat(value: object) -> list:
    if not isinstance(value, list):
        return [value]
    return [x for item in value for x in _flat(item)]


def _wanted(shape: Sequence[int]) -> str:
    return f"numbers of shape {list(shape)}" if shape else "one number"
