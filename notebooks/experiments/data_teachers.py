"""Teachers that are wrong, weak or too strong, and what their students make of it.

    OMP_NUM_THREADS=1 python notebooks/experiments/data_teachers.py [--workers 5]

Writes notebooks/results/data_teachers.json after every seed, and goes on from it. (For
a short trial: `--seeds 2 --share 0.1 --out FILE`.) The images are those of
kdlib/digits.py: small enough for many students, and the true labels are known. A seed
has one thread and random states of its own, so the workers change no result.

A seed fixes the split, what is drawn, every network's first weights and the order of
the images; differences are taken seed by seed. Students see the teacher's logits at
temperature 1 and no label. All have two hidden layers and are measured on the 797
images that are not for training. The plan, made
before any run (for eight seeds; five were run):

    weak, n      200 images are labelled, a fifth of them wrongly, by chance. A network
                 of width 64 learns them by heart: the teacher. Its student has its
                 width, and n = 50, 200 or 800 other images (Stanton et al. 2021: is
                 more like the teacher better?)
    weak, 800, near start   the student starts half way between the teacher's weights
                 and random ones: can fidelity be had if the optimiser is helped?
    weak, 800, strong   a student of width 256; `..., shifted`: it sees each image moved
                 by up to a pixel, and the target of the image that was not moved
    strong, the 200 labels (..., shifted) / strong, 800 true labels   what a network of
                 its width reaches without a teacher
    good, n      the teacher of chapter 6 (width 256, 1,000 labels, shifts, dropout) and
                 students of width 64 on the same 50, 200 or 800 images
    good, 200 and 600 mixed / noise   the 200 images, and 600 that no camera saw:
                 mixtures of two of them; their pixels in random order
    teacher w, student v   capacity gap (Busbridge et al. 2025): teachers of width w
                 taught by 1,000 labels and shifts, students of width v on those images
    student v, labels   the same student on the 1,000 labels

    error, nll          share answered wrongly; -log p(true label), mean
    agreement, kl       with its teacher: share of equal answers; KL(teacher || student)
    agreement_train, kl_train   the same on the images of its transfer set
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from parallel import runs_of

from kdlib import digits
from kdlib.digits import Part
from kdlib.divergences import cross_entropy, forward_kl
from kdlib.ledger import mean_interval, provenance, resume, write_json
from kdlib.objective import Objective

RESULT = Path(__file__).parents[1] / "results" / "data_teachers.json"
SEEDS = 5
STEPS, TEACHER_STEPS = 2000, 3000
LABELLED, WRONG = 200, 0.2
SIZES = (50, 200, 800)
WIDTH, STRONG = 64, 256
TEACHERS = (4, 8, 16, 32, 128)
STUDENTS = (6, 32)
SOFT, HARD = Objective(), Objective(hard_weight=1.0)
WEAK, GOOD = "weak teacher", "good teacher"
DIFFERENCES = (
    ("weak, 800", "weak, 50"),
    ("weak, 800", "weak, 200"),
    ("weak, 800", WEAK),
    ("weak, 800, near start", "weak, 800"),
    ("weak, 800, strong", "weak, 800"),
    ("weak, 800, strong", WEAK),
    ("weak, 800, strong", "strong, the 200 labels"),
    ("weak, 800, strong, shifted", "weak, 800, strong"),
    ("weak, 800, strong, shifted", WEAK),
    ("weak, 800, strong, shifted", "strong, the 200 labels, shifted"),
    ("good, 800", "good, 50"),
    ("good, 800", "good, 200"),
    ("good, 800", GOOD),
    ("good, 200 and 600 mixed", "good, 200"),
    ("good, 200 and 600 noise", "good, 200"),
    ("good, 800", "good, 200 and 600 mixed"),
    *(
        (f"teacher {ours}, student {v}", f"teacher {theirs}, student {v}")
        for v in STUDENTS
        for ours, theirs in ((128, 16), (16, 4), (128, 4))
    ),
    ("teacher 128, student 6", "student 6, labels"),
    ("teacher 16, student 6", "student 6, labels"),
    ("teacher 4, student 32", "teacher 4"),
    ("teacher 8, student 32", "teacher 8"),
)


class Bench:
    """One seed's data, networks and what was measured of them."""

    def __init__(self, seed: int, share: float):
        self.seed, self.share = seed, share
        self.train, validation, test = digits.split(seed)
        self.held_out = Part(*map(torch.cat, zip(validation, test, strict=True)))
        self.found: dict[str, dict[str, float]] = {}

    def steps(self, n: int) -> int:
        return max(2, round(self.share * n))

    def generator(self, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * offset + self.seed)

    def taught(self, name, width, data, *, steps=STEPS, shifted=False):
        """A network taught by labels."""
        model = digits.network(width, seed=self.seed)
        options = {"steps": self.steps(steps), "shifted": shifted, "seed": self.seed}
        digits.fit(model, data, None, HARD, **options)
        self.found[name] = self.measured(model)
        return model

    def student(self, name, width, teacher, images, *, start=None, shifted=False):
        """A network that sees a teacher's logits on images."""
        model = start or digits.network(width, seed=self.seed + 100)
        with torch.no_grad():
            logits = teacher(images)
        unread = torch.zeros(len(images), dtype=torch.long)  # the labels
        options = {"steps": self.steps(STEPS), "shifted": shifted, "seed": self.seed}
        digits.fit(model, Part(images, unread), logits, SOFT, **options)
        self.found[name] = self.measured(model, teacher, images)

    @torch.no_grad()
    def measured(self, model, teacher=None, images=None) -> dict[str, float]:
        logits, labels = model(self.held_out.images), self.held_out.labels
        one_hot = torch.full_like(logits, -1e4).scatter(1, labels[:, None], 0.0)
        found = {
            "error": rate(logits.argmax(1) != labels),
            "nll": cross_entropy(logits, one_hot).double().mean().item(),
        }
        if teacher is not None:
            for end, x in (("", self.held_out.images), ("_train", images)):
                ours, theirs = model(x), teacher(x)
                found[f"agreement{end}"] = rate(ours.argmax(1) == theirs.argmax(1))
                found[f"kl{end}"] = forward_kl(ours, theirs).double().mean().item()
        return found


def rate(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


def partly_wrong(data: Part, share: float, generator) -> Part:
    """The data with a share of the labels moved to another class, by chance."""
    n = len(data.labels)
    chosen = torch.randperm(n, generator=generator)[: round(share * n)]
    move = torch.zeros(n, dtype=torch.long)
    move[chosen] = torch.randint(1, 10, (len(chosen),), generator=generator)
    return Part(data.images, (data.labels + move) % 10)


def mixed(images: torch.Tensor, n: int, generator) -> torch.Tensor:
    """n images, each a mixture of two, in a share drawn evenly from 0 to 1."""
    one, two = torch.randint(len(images), (2, n), generator=generator)
    share = torch.rand(n, 1, generator=generator)
    return share * images[one] + (1 - share) * images[two]


def noise(images: torch.Tensor, n: int, generator) -> torch.Tensor:
    """n images with the pixels of real ones in an order of their own."""
    rows = torch.randint(len(images), (n,), generator=generator)
    order = torch.rand(n, images.shape[1], generator=generator).argsort(1)
    return images[rows].gather(1, order)


def half_way(model, other):
    """`other` with weights half way to those of `model`."""
    with torch.no_grad():
        pairs = zip(other.parameters(), model.parameters(), strict=True)
        for theirs, ours in pairs:
            theirs.lerp_(ours, 0.5)
    return other


def of_a_weak_teacher(bench: Bench) -> None:
    labelled = Part(*(part[:LABELLED] for part in bench.train))
    rest = Part(*(part[LABELLED:] for part in bench.train))
    labelled = partly_wrong(labelled, WRONG, bench.generator(1))
    teacher = bench.taught(WEAK, WIDTH, labelled)
    for n in SIZES:
        bench.student(f"weak, {n}", WIDTH, teacher, rest.images[:n])
    start = half_way(teacher, digits.network(WIDTH, seed=bench.seed + 100))
    bench.student("weak, 800, near start", WIDTH, teacher, rest.images, start=start)
    for end, shifted in (("", False), (", shifted", True)):
        name = f"weak, 800, strong{end}"
        bench.student(name, STRONG, teacher, rest.images, shifted=shifted)
    for end, shifted in (("", False), (", shifted", True)):
        name = f"strong, the 200 labels{end}"
        bench.taught(name, STRONG, labelled, shifted=shifted)
    bench.taught("strong, 800 true labels", STRONG, rest)


def of_a_good_teacher(bench: Bench) -> None:
    images = bench.train.images[LABELLED:]
    steps = bench.steps(TEACHER_STEPS)
    teacher = digits.train_teacher(bench.train, steps=steps, seed=bench.seed)
    bench.found[GOOD] = bench.measured(teacher)
    for n in SIZES:
        bench.student(f"good, {n}", WIDTH, teacher, images[:n])
    real, more = images[:200], SIZES[-1] - 200
    for offset, (name, make) in enumerate((("mixed", mixed), ("noise", noise)), 2):
        invented = make(real, more, bench.generator(offset))
        row = f"good, 200 and {more} {name}"
        bench.student(row, WIDTH, teacher, torch.cat([real, invented]))


def of_teachers_by_width(bench: Bench) -> None:
    for v in STUDENTS:
        bench.taught(f"student {v}, labels", v, bench.train)
    for w in TEACHERS:
        options = {"steps": TEACHER_STEPS, "shifted": True}
        teacher = bench.taught(f"teacher {w}", w, bench.train, **options)
        for v in STUDENTS:
            name = f"teacher {w}, student {v}"
            bench.student(name, v, teacher, bench.train.images)


def run(seed: int, share: float) -> dict:
    torch.set_num_threads(1)
    start = time.process_time()
    bench = Bench(seed, share)
    of_a_weak_teacher(bench)
    of_a_good_teacher(bench)
    of_teachers_by_width(bench)
    minutes = (time.process_time() - start) / 60
    return {"seed": seed, "minutes": minutes, "rows": bench.found}


def summary(runs: list[dict]) -> dict:
    """Intervals over the seeds of every row, and of the planned differences."""
    rows = [r["rows"] for r in runs]

    def minus(ours, theirs, name):
        return vars(mean_interval([r[ours][name] - r[theirs][name] for r in rows]))

    first = rows[0]
    return {
        "rows": {
            row: {m: vars(mean_interval([r[row][m] for r in rows])) for m in found}
            for row, found in first.items()
        },
        "minus": {
            f"{ours} - {theirs}": {
                m: minus(ours, theirs, m) for m in first[ours] if m in first[theirs]
            }
            for ours, theirs in DIFFERENCES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "steps": max(2, round(arguments.share * STEPS)),
        "labelled": [LABELLED, WRONG],
        "widths": {"teachers": TEACHERS, "students": STUDENTS},
    }
    runs, _ = resume(arguments.out, settings, seeds=arguments.seeds)
    done = {r["seed"] for r in runs}
    seeds = [seed for seed in range(arguments.seeds) if seed not in done]
    about = {
        **provenance(
            "python notebooks/experiments/data_teachers.py "
            f"--seeds {arguments.seeds} --share {arguments.share:g}"
        ),
        **settings,
        "seeds": arguments.seeds,
    }
    for found in runs_of(run, [(s, arguments.share) for s in seeds], arguments.workers):
        runs.append(found)
        runs.sort(key=lambda r: r["seed"])
        minutes = round(sum(r["minutes"] for r in runs), 1)
        result = {**about, "core_minutes": minutes, "runs": runs}
        if len(runs) > 1:
            result |= summary(runs)
        write_json(arguments.out, result)
        print(f"seed {found['seed']}: {found['minutes']:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
