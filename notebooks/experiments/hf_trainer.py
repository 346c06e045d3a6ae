"""kdlib's objective inside transformers.Trainer.

    python notebooks/experiments/hf_trainer.py [--steps 20]

Trainer brings its own loop: optimisers, callbacks, logging, several machines. All that
distillation adds to it is a collator that keeps both views and a loss. What the mean is
divided by, Trainer counts over all batches of a step (`num_items_in_batch`), so that
gradient accumulation does not change the loss.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from kdlib import localize, models
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.teachers import LiveTeacher


class DistillationTrainer(Trainer):
    """Trainer whose loss is an Objective against a teacher's targets.

    objective: its reduction must be "token_mean", the mean that Trainer counts for
    """

    loss_is_scaled_for_ga = True  # by num_items: Trainer must not divide once more

    def __init__(self, *args, objective: Objective, teacher, **options):
        super().__init__(*args, **options)
        self.objective, self.teacher = objective, teacher
        self.model_accepts_loss_kwargs = True  # have num_items_in_batch counted

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        batch = inputs["batch"]
        view = batch.student
        outputs = model(
            input_ids=view.input_ids, attention_mask=view.attention_mask.long()
        )
        loss = self.objective(
            view.select(outputs.logits),
            self.teacher.targets(batch),
            batch.response_ids,
            row_ids=batch.row_ids,
            num_items=num_items_in_batch,
        ).total
        if num_items_in_batch is not None:
            # Several processes average gradients; ours are shares of one sum.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class TrainerCollator:
    """Encoded pairs -> the batch, and labels, from which Trainer counts tokens."""

    def __init__(self, collator: PairCollator):
        self.collator = collator

    def __call__(self, pairs) -> dict:
        batch = self.collator.collate(pairs)
        view = batch.student
        labels = view.input_ids.masked_fill(~view.completion_mask, -100)
        return {"batch": batch, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer)
    examples = localize.examples("train", locales=["fr"], limit=320)
    pairs = [collator.encode(example, i) for i, example in enumerate(examples)]
    student = models.build(tokenizer, hidden_size=64, layers=2, heads=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            TrainingArguments(
                folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            data_collator=TrainerCollator(collator),
            train_dataset=pairs,
            objective=Objective("forward_kl"),
            teacher=LiveTeacher(teacher),
        )
        trainer.train()


if __name__ == "__main__":
    main()
