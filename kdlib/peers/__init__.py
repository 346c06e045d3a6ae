"""Other libraries' losses, made ready for the laws: a file for each library.

Knows: how each library's trainer calls its own loss function. An adapter runs the live
code of the installed library and copies none of it; what the trainer does around the
function (the causal shift, the mask) is done here in the same way. The imports are made
when losses() is called, and may fail.

An adapter declares what the library documents, and may not make the library fail:

- where its source states a departure, the verdict is "by design", with the line;
- what the function alone cannot show, such as what a trainer does with many
  micro-batches, is not applicable, with the reason.

CREDIT says what was read or seen to be right, which a table of bugs does not show.
"""

from __future__ import annotations

from collections.abc import Callable

from kdlib.loss_under_test import LossUnderTest
from kdlib.peers import liger, modelopt, swift, trl, verl

PEERS = {  # library: its name on PyPI
    "TRL": "trl",
    "Liger-Kernel": "liger-kernel",
    "ms-swift": "ms-swift",
    "verl": "verl",
    "NVIDIA ModelOpt": "nvidia-modelopt",
}
_FILES = dict(zip(PEERS, (trl, liger, swift, verl, modelopt), strict=True))
ADAPTERS: dict[str, Callable[[], list[LossUnderTest]]] = {
    library: file.losses for library, file in _FILES.items()
}
CREDIT: dict[str, tuple[str, ...]] = {
    library: file.CREDIT for library, file in _FILES.items()
}
