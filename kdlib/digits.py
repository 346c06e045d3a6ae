"""Hinton's experiment at small scale: 1,797 images of handwritten digits.

A teacher that saw shifted images and was trained with dropout, and students that see
neither. The images are 8 x 8 and the networks small, so a student takes seconds.

    split(seed)          images for training, validation and test
    network(width, ...)  two hidden layers of rectified linear units
    train_teacher(...)   on labels, shifted images and dropout
    fit(...)             a network by an Objective: teacher's logits, labels or both

The file is that of scikit-learn 1.9.1 (sklearn/datasets/data/digits.csv.gz, BSD-3-
Clause), unchanged: the test set of Alpaydin and Kaynak's "Optical Recognition of
Handwritten Digits", 1998, in the UCI Machine Learning Repository. It is written by 13
people. A split does not keep them apart.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from kdlib.errors import DataError
from kdlib.objective import Objective

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Images = Float[Tensor, "n 64"]
    Labels = Int[Tensor, " n"]
    Logits = Float[Tensor, "n 10"]

FILE = Path(__file__).parent / "data" / "digits.csv.gz"
SHA256 = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
TRAIN, VALIDATION = 1000, 300  # the other 497 are the test
TEACHER_WIDTH = 256
BATCH = 100


class Part(NamedTuple):
    """images: [n, 64], from 0 (paper) to 1 (ink); labels: [n]"""

    images: Images
    labels: Labels


@functools.cache
def _all() -> Part:
    try:
        text = gzip.decompress(FILE.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(
            f"the images {FILE} cannot be read: {error}",
            "get the file again (`git checkout -- kdlib/data`)",
        ) from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"the images {FILE} have checksum {digest[:12]}, not {SHA256[:12]}",
            "get the file again (`git checkout -- kdlib/data`)",
        )
    rows = [[int(x) for x in line.split(",")] for line in text.decode().split()]
    table = torch.tensor(rows)
    return Part(table[:, :64] / 16, table[:, 64])


def split(seed: int) -> tuple[Part, Part, Part]:
    """1,000 images for training, 300 for validation, 497 for the test."""
    images, labels = _all()
    order = torch.randperm(len(labels), generator=_generator(seed))
    parts = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return tuple(Part(images[rows], labels[rows]) for rows in parts)


def network(width: int, *, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """64 -> width -> width -> 10, in eval mode; torch's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, 10),
        )
    return model.eval()


def train_teacher(train: Part, *, steps: int = 3000, seed: int = 0) -> nn.Sequential:
    """A wide network taught by labels, with shifted images and dropout."""
    model = network(TEACHER_WIDTH, dropout=0.3, seed=seed)
    labels_alone = Objective(hard_weight=1.0)
    options = {"steps": steps, "learning_rate": 1e-3, "shifted": True, "seed": seed}
    return fit(model, train, None, labels_alone, **options)


def fit(
    model: nn.Module,
    data: Part,
    teacher_logits: Logits | None,
    objective: Objective,
    *,
    steps: int = 2000,
    learning_rate: float = 5e-3,
    shifted: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Train `model` in place, with Adam and a rate that falls to zero on a line.

    teacher_logits: for data.images; None where the objective's hard_weight is 1
    shifted:        move each image by up to one pixel before every step
    """
    generator = _generator(seed)

    def loss(rows):
        images = data.images[rows]
        if shifted:
            images = _shifted(images, generator)
        targets = None if teacher_logits is None else teacher_logits[rows]
        return objective(model(images), targets, data.labels[rows]).total

    return minimise(
        loss, model, len(data.labels), steps, learning_rate, generator, seed
    )


def minimise(loss, model, n, steps, learning_rate, generator, seed) -> nn.Module:
    """Step down loss(rows) over batches of row numbers, each epoch in a new order."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.empty(0, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout has no generator of its own
        model.train()
        for _ in range(steps):
            if len(order) < min(BATCH, n):
                order = torch.randperm(n, generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _shifted(images: Images, generator: torch.Generator) -> Images:
    """Each image moved by up to one pixel in both directions, paper flowing in."""
    n = len(images)
    wide = nn.functional.pad(images.view(n, 8, 8), (1, 1, 1, 1))
    down, right = torch.randint(3, (2, n), generator=generator)
    lines = torch.arange(8)
    rows = (down[:, None] + lines)[:, :, None]
    columns = (right[:, None] + lines)[:, None, :]
    return wide[torch.arange(n)[:, None, None], rows, columns].reshape(n, 64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
