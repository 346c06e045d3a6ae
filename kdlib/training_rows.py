"""The rows of `bench train`: one student, one teacher, the same batches, many loops.

Knows: how each loop is started as its user would, and when a step is over. Does not
know how any of them works, nor how rows are compared (bench_train.py).

What is fair here. All tokens of a row but the first few are response tokens: long
prompts would favour kdlib, which projects responses alone. Nobody recomputes
activations, and all have a fused AdamW and a teacher in 16 bits on a GPU. kdlib trains
without a folder: no checkpoint, no metrics file. Weights and tokens are random, which
changes no product and no memory.

Float32 weights under autocast take 8 bytes a parameter more than weights in bfloat16,
and their residual stream twice the memory. kdlib keeps them, because an update too
small for 16 bits is lost. GKDTrainer's rows are in bfloat16, as quick and small as it
gets; one row has kdlib's float32 weights.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from kdlib import models
from kdlib.batching import shuffled
from kdlib.ledger import write_json
from kdlib.measuring import (
    LOGIT_STD,
    MIB,
    PeakMemory,
    Unavailable,
    peer,
    synchronize,
    tensor_bytes,
)
from kdlib.metrics import peak_flops, step_flops
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.precision import DTYPES, Precision
from kdlib.settings import TrainConfig
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import train

WARM_UP = 3  # steps: compilation, the choice of kernels, the optimiser's state


@dataclass(frozen=True)
class Preset:
    """Shapes: Qwen3Config's arguments for both models, rows of `length` tokens each, of
    which `prompt` are not trained on, and the k of cached targets. precision: as
    TrainConfig's."""

    student: dict
    teacher: dict
    vocab: int
    batch: int
    length: int
    prompt: int = 8
    k: int = 64
    steps: int = 20
    precision: str = "auto"


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
    }


PRESETS = {
    # The shapes of Qwen3-0.6B and Qwen3-1.7B, by their config.json.
    "issue": Preset(
        student=_qwen3(1024, 3072, 28, 16, 128),
        teacher=_qwen3(2048, 6144, 28, 16, 128),
        vocab=151_936,
        batch=8,
        length=1024,
    ),
    "small": Preset(
        student=_qwen3(128, 384, 4, 4, 32),
        teacher=_qwen3(256, 768, 6, 8, 32),
        vocab=32_000,
        batch=4,
        length=128,
        steps=5,
    ),
}


class Clock:
    """Called after every step with its loss: times those after the warm-up.

    Memory is that of the timed steps on CUDA, and on a CPU of one step more, because
    counting it there takes time.
    """

    def __init__(self, device: str, steps: int):
        self.device, self.last = device, WARM_UP + steps
        self.total = self.last + (device == "cpu")
        self.measure_from = self.last if device == "cpu" else WARM_UP
        self.done, self.first_loss, self.ms, self.peak = 0, None, [], None

    def __call__(self, loss) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self.done == 0:
            self.first_loss = float(loss)
        elif WARM_UP <= self.done < self.last:
            self.ms.append(1e3 * (now - self._then))
        self.done += 1
        if self.done == self.measure_from:
            before = tensor_bytes(self.device)
            self._memory, self._before = PeakMemory(self.device).__enter__(), before
        elif self.done == self.total:
            self._memory.__exit__(None, None, None)
            self.peak = self._before + self._memory.above
        self._then = time.perf_counter()


class Run:
    """What every row gets: models, batches and a clock, the same to the last bit."""

    def __init__(self, preset: Preset, device: str, steps: int):
        self.preset, self.device = preset, device
        self.precision = Precision.choose(preset.precision, torch.device(device))
        self.clock = Clock(device, steps)
        self.student = self._model(preset.student, seed=1)
        self.teacher = self._model(preset.teacher, seed=2)
        # Every tenth token's logit is spread as a trained model's: the teacher is sure
        # of itself, so that forward and reverse KL are two numbers that differ.
        head = self.teacher.get_output_embeddings().weight
        std = self.teacher.config.initializer_range * head.shape[1] ** 0.5
        with torch.no_grad():
            head[::10] *= LOGIT_STD / std
        half = DTYPES.get(self.precision.name, torch.float32)
        self.teacher = self.teacher.to(half).eval().requires_grad_(False)
        self.tokenizer = models.load_tokenizer("teacher")  # it has nothing to tokenise
        self.collator = PairCollator(self.tokenizer)
        self.config = TrainConfig(
            steps=self.clock.total,
            batch_size=preset.batch,
            learning_rate=1e-4,
            precision=preset.precision,
            fused=True,
        )
        rng = torch.Generator().manual_seed(0)
        count = self.clock.total * preset.batch
        ids = torch.randint(preset.vocab, (count, preset.length), generator=rng)
        cut = preset.prompt
        self.pairs = [
            EncodedPair(number, row[:cut], row[:cut], row[cut:])
            for number, row in enumerate(ids.tolist())
        ]
        order = shuffled(self.pairs, preset.batch, random.Random(self.config.seed))
        self.batches = list(islice(order, self.clock.total))

    def _model(self, shape: dict, seed: int):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=self.preset.vocab, tie_word_embeddings=True, **shape
        )
        torch.manual_seed(seed)
        with torch.device(self.device):
            return Qwen3ForCausalLM(config)


# ------------------------------------------------------ the rows: each trains a Run


def _plain(run: Run, folder: Path) -> None:
    """The loop that a careful user writes, with torch's own kl_div."""
    scaler = run.precision.scaler()
    optimizer = torch.optim.AdamW(
        run.student.parameters(), lr=run.config.learning_rate, fused=True
    )
    run.student.train()
    for pairs in run.batches:
        view = run.collator.collate(pairs).to(run.device).student
        inputs = {"input_ids": view.input_ids, "use_cache": False}
        inputs["attention_mask"] = view.attention_mask.long()
        answers = view.completion_mask[:, 1:]
        with torch.no_grad():
            teacher = run.teacher(**inputs).logits[:, :-1][answers]
        with run.precision.autocast():
            student = run.student(**inputs).logits[:, :-1][answers]
        loss = F.kl_div(
            F.log_softmax(student.float(), dim=-1),
            F.log_softmax(teacher.float(), dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        del student, teacher  # before the next ones are made
        run.clock(loss.detach())


def _kdlib(run: Run, folder: Path, **settings) -> None:
    train(
        run.student,
        run.pairs,
        run.collator,
        Objective(),
        replace(run.config, **settings),
        teacher=LiveTeacher(run.teacher),
        on_step=lambda step, loss: run.clock(loss),
    )


def _cached(run: Run, folder: Path, **settings) -> None:
    cache = write_cache(
        folder / "cache.safetensors",
        LiveTeacher(run.teacher),
        (run.collator.collate([pair]) for pair in run.pairs),
        run.tokenizer,
        k=run.preset.k,
    )
    run.teacher = None  # its memory is free for training
    if run.device == "cuda":
        torch.cuda.empty_cache()
    train(
        run.student,
        run.pairs,
        run.collator,
        Objective(),
        replace(run.config, **settings),
        teacher=CachedTeacher(cache, run.tokenizer, temperature=1.0),
        on_step=lambda step, loss: run.clock(loss),
    )


def _trl(run: Run, folder: Path, float32: bool = False, **settings) -> None:
    """GKDTrainer off-policy, with the forward KL, on rows that are tokenised already.

    Its own default recomputes activations and tokenises in the loop: slower, both.
    """
    if float32 and run.precision.name != "bf16":
        raise Unavailable("all rows have float32 weights here")
    if run.precision.name == "bf16" and not float32:
        run.student.to(torch.bfloat16)
    trainer_class = peer("trl.experimental.gkd", "GKDTrainer")
    arguments = peer("trl.experimental.gkd", "GKDConfig")(
        output_dir=str(folder),
        lmbda=0.0,
        beta=0.0,  # the forward KL: kdlib/peers/trl.py says where that stands
        per_device_train_batch_size=run.preset.batch,
        max_steps=run.clock.total,
        max_length=run.preset.length,
        train_sampling_strategy="sequential",
        learning_rate=run.config.learning_rate,
        weight_decay=run.config.weight_decay,
        max_grad_norm=run.config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=run.precision.name == "bf16",
        fp16=run.precision.name == "fp16",
        use_cpu=run.device == "cpu",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    rows = [pair for pairs in run.batches for pair in pairs]
    ignored = [-100] * run.preset.prompt
    dataset = peer("datasets", "Dataset").from_dict(
        {
            "input_ids": [row.student_prompt_ids + row.response_ids for row in rows],
            "labels": [ignored + row.response_ids for row in rows],
        }
    )

    def collate(rows: list[dict]) -> dict:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    class Trainer(trainer_class):
        def training_step(self, *args, **kwargs):
            self.loss_of_step = super().training_step(*args, **kwargs)
            return self.loss_of_step

    class Ticks(peer("transformers", "TrainerCallback")):
        def on_step_end(self, *_, **__):
            run.clock(trainer.loss_of_step)

    trainer = Trainer(
        model=run.student,
        teacher_model=run.teacher,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset.with_format("torch"),
        processing_class=run.tokenizer,
        callbacks=[Ticks()],
    )
    trainer.train()


def _liger(run: Run, folder: Path) -> None:
    peer("liger_kernel.transformers", "apply_liger_kernel_to_qwen3")
    if run.device != "cuda":
        raise Unavailable("Liger's kernels need CUDA")
    _trl(run, folder, use_liger_kernel=True)


@dataclass(frozen=True)
class Row:
    """train: runs a Run to its end, its clock called after every step
    dense: the objective is the forward KL over the whole vocabulary
    """

    train: Callable[[Run, Path], None]
    dense: bool = True


ROWS = {
    "plain torch": Row(_plain),
    "TRL GKDTrainer": Row(_trl),
    "TRL GKDTrainer, float32": Row(partial(_trl, float32=True)),
    "TRL GKDTrainer, Liger": Row(_liger),
    "TRL GKDTrainer, compiled": Row(partial(_trl, torch_compile=True)),
    "kdlib": Row(_kdlib),
    "kdlib, compiled": Row(partial(_kdlib, compile=True)),
    "kdlib, cached": Row(_cached, dense=False),
    "kdlib, cached, compiled": Row(partial(_cached, compile=True), dense=False),
}


def measure(row: str, preset: Preset, device: str, steps: int) -> dict:
    """What one row took: {"ms": [of each timed step], "first_loss", "peak_mib", ...}.

    Or {"skipped": reason}: a row that fails, in whatever way, is no reason for the
    others to stop.
    """
    try:
        run = Run(preset, device, steps)
        with tempfile.TemporaryDirectory(prefix="kdlib-bench-") as folder:
            ROWS[row].train(run, Path(folder))
        if run.clock.done != run.clock.total:
            raise Unavailable(f"ended after {run.clock.done} steps")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        known = isinstance(error, (Unavailable, torch.OutOfMemoryError))
        return {"skipped": reason if known else f"{type(error).__name__}: {reason}"}
    tokens = preset.batch * preset.length
    return {
        "first_loss": run.clock.first_loss,
        "ms": [round(ms, 3) for ms in run.clock.ms],
        "peak_mib": round(run.clock.peak / MIB),
        "precision": run.precision.name,
        "flops": step_flops(run.student, tokens, preset.batch, run.teacher, tokens),
        "peak_flops": peak_flops(torch.device(device), run.precision.name),
    }


if __name__ == "__main__":  # python -m kdlib.training_rows '{"row": ...}' OUT
    models.quiet_transformers()
    job = json.loads(sys.argv[1])
    job["preset"] = Preset(**job["preset"])
    write_json(sys.argv[2], measure(**job))
