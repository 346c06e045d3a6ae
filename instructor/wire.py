"""Values on their way to a student's process and back, as JSON.

Nothing that comes back is unpickled or executed. What this format does not know arrives
as a Strange, which bears the type's name and looks like the original in a message.

Knows: the types of kdlib.checks' arguments and of what students return.
Does not know: what any of it means.
"""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from kdlib.checks import values

LARGEST = 2**24  # bytes of one message
NUMBERS = 2**20  # of one tensor or array


def dumps(message: dict) -> bytes:
    return json.dumps(message).encode()


def loads(raw: bytes) -> dict:
    """Raises ValueError for anything but a message."""
    try:
        message = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def encode(value: object) -> object:
    """Something that JSON can hold; never raises for a value of whatever kind."""
    try:
        return _encode(value)
    except Exception:  # a list within itself, a class with a faulty method
        return _strange(value)


def _encode(value: object) -> object:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is int:
        return {"int": hex(value)}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, (list, tuple)):  # torch.Size and named tuples too
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if kind is Fraction:
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if kind is Decimal:
        return {"decimal": str(value)}
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        if value.size > NUMBERS:
            return _strange(value)
        scalar = isinstance(value, np.generic)
        whole = np.array(value, order="C")
        kept = [_packed(whole.tobytes()), whole.dtype.str, list(whole.shape)]
        return {"numpy": [*kept, scalar]}
    return _strange(value)


def _tensor(value: torch.Tensor) -> object:
    if value.numel() > NUMBERS:
        return _strange(value)
    plain = value.detach().to_dense().cpu() if value.is_sparse else value.detach().cpu()
    plain = plain.as_subclass(torch.Tensor)
    flat = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.reshape(-1))
    raw = flat.view(torch.uint8).numpy().tobytes()
    dtype = str(plain.dtype).removeprefix("torch.")
    return {"tensor": [_packed(raw), dtype, list(plain.shape)]}


def _packed(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _strange(value: object) -> object:
    name = type(value).__name__
    try:
        size = value.numel() if isinstance(value, torch.Tensor) else 0
        size = value.size if isinstance(value, np.ndarray) else size
        shown = f"a {name} of {size} numbers" if size > NUMBERS else values.show(value)
    except Exception:
        shown = f"a {name}"
    return {"strange": [name[:60], shown[:200]]}


class Strange:
    """A value that stayed where it was."""


def decode(item: object) -> object:
    """Raises ValueError for what `encode` does not write."""
    if item is None or isinstance(item, (bool, str)):
        return item
    try:
        ((kind, held),) = item.items()
        return _DECODERS[kind](held)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a value ({type(error).__name__})") from None


def _to_tensor(held: list) -> torch.Tensor:
    raw, name, shape = held
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no such dtype")
    raw = bytearray(base64.b64decode(raw))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def _to_numpy(held: list) -> object:
    raw, dtype, shape, scalar = held
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        raise ValueError("no such dtype")
    found = np.frombuffer(bytearray(base64.b64decode(raw)), dtype).reshape(shape)
    return found[()] if scalar else found


def _to_strange(held: list) -> Strange:
    name, shown = map(str, held)
    return type(name, (Strange,), {"__repr__": lambda self: shown})()


_DECODERS = {
    "float": float.fromhex,
    "int": lambda held: int(held, 16),
    "ellipsis": lambda held: ...,
    "list": lambda held: [decode(item) for item in held],
    "tuple": lambda held: tuple(decode(item) for item in held),
    "dict": lambda held: {decode(k): decode(v) for k, v in held},
    "fraction": lambda held: Fraction(*(int(x, 16) for x in held)),
    "decimal": Decimal,
    "tensor": _to_tensor,
    "numpy": _to_numpy,
    "strange": _to_strange,
}
