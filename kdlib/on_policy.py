"""Who writes the responses of a step: the data, the student, or the teacher.

    with probability lmbda   the student, for its own prompt x'   on-policy
    else, sequence_level     the teacher, for its own prompt x    sequence-level
    else                     the data

The student then learns what the teacher says about the student's own prefixes, those
that it will stand on when it is used (Agarwal et al. 2023, GKD, arXiv 2306.13649,
algorithm 1; the die is cast once a step, as there). Answers of the teacher as data are
sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947).

No gradient flows through the writing: what is minimised is the divergence at prefixes
that are taken as given. Responses stay token ids; decoded and tokenised again they
could be others. One that does not end within max_new_tokens, or within the room that
its prompts leave in the collator's budgets, is kept without an end token: nothing is
learnt about an end that the writer did not choose.

Everything drawn depends on the seed, the step and the example's number, so that a
resumed run draws what an unbroken one would have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from kdlib.distributed import ALONE, Ranks
from kdlib.errors import ArgumentError
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.precision import Precision
from kdlib.sampling import complete
from kdlib.settings import TrainConfig
from kdlib.sharding import whole_model
from kdlib.teachers import CachedTeacher, LiveTeacher, Teacher

SIDES = ("student", "teacher")


class Author:
    """Writes the responses of a step.

    rewrite: a step's number and examples -> the examples to train on; None where the
             data writes all responses. All ranks together, also one without examples:
             of a sharded writer each gets a whole copy while it writes
    told: what it wrote last, for the metrics: `student_written` and `teacher_written`,
          shares of the step's responses, and `unfinished`, of those written

    Raises ArgumentError for a teacher that cannot be asked about new text, or to write,
    and for hard labels that the student would write itself.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        collator: PairCollator,
        student,
        teacher: Teacher | None,
        precision: Precision,
        ranks: Ranks = ALONE,
    ):
        _check(config, objective, teacher)
        self.ranks = ranks
        self.config, self.collator, self.precision = config, collator, precision
        self.student, self.teacher = student, teacher
        self.told: dict[str, float] = {}
        writes = config.lmbda > 0 or config.sequence_level
        self.rewrite = self._rewrite if writes else None

    def _rewrite(self, step: int, pairs: list[EncodedPair]) -> list[EncodedPair]:
        config = self.config
        die = random.Random(f"lmbda {config.seed} {step}").random()
        side = "teacher" if config.sequence_level else "data"
        if die < config.lmbda:
            side = "student"
        self.told = {f"{name}_written": float(side == name) for name in SIDES}
        if side == "data":
            return pairs
        # One program for a step's rows is compiled; a token at a time would be another.
        plain = torch.compiler.set_stance("force_eager") if config.compile else None
        own = self.precision.autocast() if side == "student" else None
        writer = self.student if side == "student" else self.teacher.model
        if self.ranks.shard:
            # Texts of unlike length: ranks could not gather block after block together.
            writer = whole_model(writer, self.ranks.device)
        with plain or nullcontext(), own or nullcontext():
            written = write_responses(
                writer,
                pairs,
                self.collator,
                side=side,
                max_new_tokens=config.max_new_tokens,
                temperature=config.sampling_temperature,
                seed=f"{config.seed} {step}",
                batch_size=config.micro_batch_size or config.batch_size,
            )
        end = self.collator.tokenizer.eos_token_id
        cut = [pair.response_ids[-1] != end for pair in written]
        self.told["unfinished"] = sum(cut) / max(1, len(cut))
        return written


def write_responses(
    model,
    pairs: Sequence[EncodedPair],
    collator: PairCollator,
    *,
    side: str,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int | str = 0,
    batch_size: int = 64,
) -> list[EncodedPair]:
    """The same prompts with responses by `model`, which reads the prompts of `side`.

    With the teacher, before training and once: sequence-level data, for which targets
    can be cached as for any other.

    A response ends with the end token if it ended within max_new_tokens and the room
    that both prompts leave in the collator's budgets; else it was cut there.
    temperature: of the sampling; 0 is greedy

    Raises ArgumentError for an unknown side and options as `complete`.
    """
    if side not in SIDES:
        raise ArgumentError(f"side={side!r}", f"use one of {', '.join(SIDES)}")
    completions = complete(
        model,
        collator.tokenizer,
        [getattr(pair, f"{side}_prompt_ids") for pair in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seeds=[f"{seed} {pair.example_id}" for pair in pairs],
        keep_end=True,
    )
    return [
        replace(pair, response_ids=ids[: _room(pair, collator)])
        for pair, ids in zip(pairs, completions, strict=True)
    ]


def _room(pair: EncodedPair, collator: PairCollator) -> int:
    """Response tokens that fit on both sides; the data's own response did."""
    return min(
        collator.teacher_side.max_length - len(pair.teacher_prompt_ids),
        collator.student_side.max_length - len(pair.student_prompt_ids),
    )


def _check(config: TrainConfig, objective: Objective, teacher: Teacher | None) -> None:
    kind = type(teacher).__name__
    if config.sequence_level and not isinstance(teacher, LiveTeacher):
        raise ArgumentError(
            f"sequence_level=True with teacher {kind}",
            "give a LiveTeacher, which can write; or write the responses once, with "
            "on_policy.write_responses, and train on those",
        )
    if config.lmbda == 0:
        return
    if teacher is None or isinstance(teacher, CachedTeacher):
        raise ArgumentError(
            f"lmbda={config.lmbda} with teacher {kind}",
            "give a LiveTeacher or a RemoteTeacher: it is asked about text that the "
            "student writes during training, for which no targets can be cached",
        )
    if objective.hard_weight > 0:
        raise ArgumentError(
            f"lmbda={config.lmbda} with hard_weight={objective.hard_weight}",
            "set hard_weight=0: labels that the student draws itself teach it nothing "
            "(the expected gradient of -log p_s(y) is 0 for y from p_s)",
        )
