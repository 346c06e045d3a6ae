# %% [markdown]
# # 10 · The GPU loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/10_the_gpu_loop.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 2 minutes |
# | GPU | not needed (`KD_PROFILE=gpu` measures there: 5 minutes, 64 GiB) |
# | memory | 3 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Predict the bytes of a training step, name its peak, and count both.
# 2. Say what may be rounded to 16 bits, and what must not.
# 3. Split a batch so that neither loss nor gradient notices.
# 4. Derive the fused loss, and say how far it is from its floor.
# 5. Read tokens per second and MFU, and predict the latter.
# 6. Kill a run, resume it to the same bits, and spread it over processes.
#
# Nothing in this chapter changes the objective. It is about computing it.
#
# The next cell is the same in every chapter. In a clone it does nothing
# much; in Colab or Kaggle it fetches the course.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/kdlib/kdlib.git"
if importlib.util.find_spec("kdlib") is None:
    here = [Path.cwd(), *Path.cwd().parents, Path("kdlib-course")]
    clones = [p for p in here if (p / "kdlib" / "errors.py").exists()]
    if not clones:  # neither installed nor inside a clone
        source = os.environ.get("KD_REPO", REPOSITORY)
        command = f'git clone --depth=1 "{source}" kdlib-course'
        failed, said = subprocess.getstatusoutput(command)
        if failed:
            way_out = "Needed: git and a network (Kaggle: Settings, Internet)."
            way_out += " Delete kdlib-course if it is here. Run this again."
            raise SystemExit(f"{command}\n{said}\n{way_out}")
        clones = [Path("kdlib-course")]
    sys.path.insert(0, str(clones[0].resolve()))

import kdlib

PROFILE = os.environ.get("KD_PROFILE") or "cpu"

# %%
import copy
import inspect
import json
import random
import signal
import tempfile
import time
import weakref
from itertools import islice

import matplotlib.pyplot as plt
import torch
from kdlib import checkpoints, claims, gradients, localize, models, plots
from kdlib.batching import shuffled
from kdlib.divergences import forward_kl
from kdlib.fused import fused_divergence
from kdlib.heads import Head
from kdlib.metrics import PEAKS, flops_per_token
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, take_step, train
from kdlib.training_rows import PRESETS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# %%
models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
torch.set_num_threads(1)
DEVICE = "cuda" if PROFILE == "gpu" else "cpu"
GIB, MIB = 2**30, 2**20
root = Path(kdlib.__file__).parents[1]
results = root / "notebooks" / "results"
known = claims.load()
scratch = tempfile.TemporaryDirectory(prefix="kdlib-")


def lines_of(function, first, last):
    """Print a function from the line with `first` to that with `last`."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    count = next(i for i, line in enumerate(lines[start:]) if last in line)
    print("\n".join(lines[start : start + count + 1]))


# %% [markdown]
# ## 1 · One step, read aloud
#
# A step of distillation does six things. In plain torch, with the shipped
# teacher and a small student:

# %%
teacher, tokenizer = models.load("teacher")
live = LiveTeacher(teacher.to(DEVICE))
collator = PairCollator(
    tokenizer, teacher_max_length=128, student_max_length=128
)
examples = localize.examples(
    "train", locales=["fr"], formats=["long"], limit=48
)
pairs = [collator.encode(e, number) for number, e in enumerate(examples)]
config = TrainConfig(steps=4, batch_size=12, learning_rate=4e-3)


def new_student(width=64):
    built = models.build(tokenizer, hidden_size=width, layers=2, heads=4)
    return built.to(DEVICE)


# %%
def by_hand(student):
    optimizer = torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    order = shuffled(pairs, config.batch_size, random.Random(config.seed))
    losses = []
    for step, rows in zip(range(config.steps), order, strict=False):
        batch = collator.collate(rows).to(DEVICE)
        targets = live.targets(batch)  # 1. ask the teacher
        output = student(**batch.student.inputs(), use_cache=False)
        logits = batch.student.select(output.logits)  # 2. ask the student
        loss = forward_kl(logits, targets).sum() / len(targets)  # 3. compare
        loss.backward()  # 4. differentiate
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)  # 5. clip
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()  # 6. move
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% [markdown]
# `kdlib.train` does the same, in the same order. In float32 the two agree:

# %%
ours, theirs = new_student().train(), new_student()
by_us = by_hand(ours)
plain = TrainConfig(**{**vars(config), "precision": "fp32"})
by_kdlib = train(theirs, pairs, collator, Objective(), plain, teacher=live)
for one, two in zip(by_us, by_kdlib.loss, strict=True):
    print(f"by hand {one:.3f}   kdlib {two:.3f}")
    assert abs(one - two) < 1e-4
for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

# %% [markdown]
# The loop itself is a page. Its core, `take_step`:

# %%
lines_of(take_step, "for group in", "zero_grad")

# %% [markdown]
# Three things in it are not in ours: several `batches` make one step, a
# `scaler`, and a loss that is not finite ends the run *before* the weights
# move. Each comes up below.
#
# ## 2 · Where the bytes go
#
# ### Predict
#
# A student of 0.6 billion parameters learns from a teacher of 1.7 billion,
# 8 rows of 1,024 tokens a step, vocabulary 151,936 (the shapes of Qwen3-0.6B
# and Qwen3-1.7B). Computation is in bfloat16, the student's weights are
# float32. The loss is a KL of logits.
#
# Order by size, and put a number of GiB to each: the student's weights with
# AdamW's moments; the teacher's weights; what the student's layers keep for
# the backward pass; the loss.
#
# ### By hand
#
# For each trained parameter AdamW wants a weight, a gradient and two moments.
# In float32 that is $4 + 4 + 8 = 16$ bytes. A teacher in bfloat16 has 2.

# %%
preset = PRESETS["issue"]
P_s, P_t = 596_049_920, 1_720_574_976
V, rows = preset.vocab, preset.batch * (preset.length - preset.prompt)
print(f"student, weights and moments {12 * P_s / GIB:4.1f} GiB")
print(f"student, gradients           {4 * P_s / GIB:4.1f} GiB")
print(f"teacher                      {2 * P_t / GIB:4.1f} GiB")
print(f"N = {rows} response tokens, V = {V}")
print(f"one [N, V] in bfloat16       {2 * rows * V / GIB:4.1f} GiB")
print(f"one [N, V] in float32        {4 * rows * V / GIB:4.1f} GiB")

# %% [markdown]
# Two models make two of these matrices. A KL makes more: two log-softmaxes in
# float32, and autograd keeps what the backward pass will ask for. How many?
# torch tells of every tensor that it saves:


# %%
class Saved:
    """Distinct tensors that autograd keeps while the block runs."""

    def __enter__(self):
        self.kept = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            self.keep, lambda tensor: tensor
        )
        self.hooks.__enter__()
        return self

    def keep(self, tensor):
        self.kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


# %%
z_s = torch.randn(6, 50).bfloat16().requires_grad_()
z_t = torch.randn(6, 50).bfloat16()
with Saved() as saved:
    loss = forward_kl(z_s, z_t).mean()
large = [t for t in saved.kept.values() if t.shape == z_s.shape]
for tensor in large:
    print("kept: [N, V]", str(tensor.dtype).removeprefix("torch."))
kept = sum(t.element_size() for t in large) * rows * V
print(f"at full size {kept / GIB:.0f} GiB, beside the logits")

# %% [markdown]
# That is what stays. For a moment there is more: temporaries that come and go
# inside the loss. So let us count *every* tensor, from birth to death.
#
# ### A ledger that needs no memory
#
# A *fake tensor* of torch has a shape and a type and no numbers. Operations on
# it say what shape would come out. So a step of the full size can run here,
# on any laptop, in seconds. The ledger watches every operation. New storage is
# added; storage that is freed is taken off.


# %%
class Ledger(TorchDispatchMode):
    """Bytes of all tensors made in the block: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.open = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.open:
            self.open[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, storage._cdata)
        self.peak = max(self.peak, self.now)

    def remove(self, key):
        self.now -= self.open.pop(key)


# %% [markdown]
# The step to be counted: student, moments, teacher, then a forward and a
# backward pass with either loss. (`{"full_attention": None}` tells
# transformers that attention is causal and no row is padded.)

# %%
from transformers import AutoModelForCausalLM, Qwen3Config


def qwen3(preset, shape, dtype=torch.float32):
    config = Qwen3Config(
        vocab_size=preset.vocab, tie_word_embeddings=True, **shape
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def hidden(model, preset):
    """[N, H] of the positions that predict a response token."""
    ids = torch.zeros(preset.batch, preset.length, dtype=torch.long)
    mask = {"full_attention": None}
    out = model.model(ids, attention_mask=mask, use_cache=False)
    return out.last_hidden_state[:, preset.prompt - 1 : -1].flatten(0, 1)


def loss_of(fused, h_s, w_s, h_t, w_t, workspace=None):
    if not fused:
        return forward_kl(h_s @ w_s.T, h_t @ w_t.T).mean()
    weights = torch.full((len(h_s),), 1 / len(h_s))
    more = {"token_weights": weights, "workspace": workspace}
    return fused_divergence(h_s, Head(w_s), h_t, Head(w_t), **more).total


# %%
def one_step(preset, book, *, half, fused, workspace=None):
    """Bytes at each stage of a step, by whatever `book` counts."""
    cast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    dtype = torch.bfloat16 if half else torch.float32
    student = qwen3(preset, preset.student).train()
    moments = [torch.zeros_like(p) for p in student.parameters() for _ in "mv"]
    teacher = qwen3(preset, preset.teacher, dtype).requires_grad_(False)
    stages = {"weights and moments": book.now}
    with torch.no_grad():
        h_t = hidden(teacher, preset)
    with cast:
        h_s = hidden(student, preset)
    stages["layers"] = book.now - stages["weights and moments"]
    heads = student.lm_head.weight, h_t, teacher.lm_head.weight
    with cast:
        loss = loss_of(fused, h_s, *heads, workspace)
    loss.backward()
    stages["loss"] = book.peak - sum(stages.values())
    del moments  # they were there all the time
    return stages


# %% [markdown]
# Can the ledger be trusted? At a small size the step can also run for real,
# with real tensors, and torch's profiler can count what the allocator hands
# out. Two witnesses that know nothing of each other:

# %%
from types import SimpleNamespace

from kdlib.measuring import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

small = PRESETS["small"]
for fused in (False, True):
    with FakeTensorMode(), Ledger() as book:
        one_step(small, book, half=False, fused=fused)
    with PeakMemory("cpu") as witness:
        nobody = SimpleNamespace(now=0, peak=0)
        one_step(small, nobody, half=False, fused=fused)
    near = abs(witness.above / book.peak - 1) < 0.03
    name = "fused" if fused else "plain"
    print(f"{name}: {book.peak / MIB:.0f} MiB, both within 3 %: {near}")
    assert near

# %% [markdown]
# So the ledger is right, and now it counts the real size. The fused loss comes
# in section 6; here it is a name. It gets the workspace that it has on a GPU,
# and plain torch's temporaries, of which a GPU's kernel needs none.

# %%
from kdlib.fused import WORKSPACE
from kdlib.fused_gradient import SLICE

real = {}
slices = dict(SLICE)
SLICE["cpu"] = slices["cuda"]
for name, fused in (("plain loss", False), ("fused loss", True)):
    with FakeTensorMode(), Ledger() as book:
        options = {"half": True, "fused": fused}
        options |= {"workspace": WORKSPACE["cuda"]}
        real[name] = one_step(preset, book, **options)
SLICE.update(slices)
for name, stages in real.items():
    print(f"{name}: {sum(stages.values()) / GIB:.0f} GiB at most")
    for stage, size in stages.items():
        print(f"    {stage:20} {size / GIB:5.1f} GiB")

# %% [markdown]
# With the plain loss more than half of the memory is the loss: as much as
# seven $[N, V]$ in float32. It is gone again after a fraction of the step, and
# it decides whether the step fits.
#
# Gradients do not appear. They are made in the backward pass, while what the
# layers kept is given back, and after the step they are freed. The peak lies
# before.
#
# ### Measured
#
# `notebooks/experiments/gpu_loop.py` runs the same step on a card and reads
# CUDA's own count. With `KD_PROFILE=gpu` it runs here. Otherwise the cell
# shows what result files there are, each with its device; where there is
# none, the numbers above are a prediction and no more.

# %%
files = sorted(results.glob("gpu_loop_*.json"))
if PROFILE == "gpu":
    files = [Path(scratch.name) / "gpu_loop.json"]
    script = root / "notebooks" / "experiments" / "gpu_loop.py"
    subprocess.run(
        [sys.executable, script, "--device", "cuda", "--out", files[0]],
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
cards = [json.loads(file.read_text()) for file in files]
print("measured on a card:", [card["device"] for card in cards] or "not yet")
for card in cards:
    print(f"{card['date']}, torch {card['torch']}")
    for name, stages in real.items():
        found = card["stages"][name]["at most"] / 1024
        print(f"{name}: ledger {sum(stages.values()) / GIB:.0f} GiB", end=", ")
        print(f"the card {found:.0f} GiB")

# %%
figure, axes = plt.subplots(figsize=(7, 2.8))
for row, (name, stages) in enumerate(real.items()):
    start = 0.0
    for (stage, size), colour in zip(
        stages.items(), (plots.GREY, plots.BLUE, plots.ORANGE), strict=True
    ):
        label = stage if row == 0 else None
        axes.barh(row, size / GIB, 0.55, start, color=colour, label=label)
        start += size / GIB
    for card in cards:
        found = card["stages"][name]["at most"] / 1024
        label = f"measured, {card['device']}" if row == 0 else None
        axes.plot(found, row, "kD", markersize=7, label=label)
axes.set_yticks([0, 1], list(real))
axes.set_ylim(1.6, -0.5)
axes.set_xlabel("GiB at most in one step, counted without a GPU")
figure.suptitle("What fills the card is the loss, and it need not", x=0.5)
axes.legend(
    frameon=False, fontsize=9, ncols=2, loc="upper center",
    bbox_to_anchor=(0.45, -0.32),
)  # fmt: skip
plt.show()

# %% [markdown]
# ## 3 · What may be rounded
#
# Matrix products in bfloat16 are many times as fast as in float32, and half as
# large. Chapter 2 counted its bits: as many for the exponent as float32, and 7
# after the point. What is rounded where?
#
# ### Predict
#
# A weight is 1. A thousand updates add 0.003 to it. Where does it end in
# float32, and where in bfloat16?

# %%
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.tensor(1.0, dtype=dtype)
    for _ in range(1000):
        weight = weight + 0.003
    gap = torch.finfo(dtype).eps
    print(f"{dtype!s:15} ends at {weight.item():.3f}, gap after 1: {gap:.1g}")
assert weight == 1  # 0.003 is less than half of a gap of 1/128

# %% [markdown]
# *Why:* between 1 and 2 the numbers of bfloat16 are $2^{-7}$ apart, and a sum
# is rounded to the nearest. An update smaller than $2^{-8}$ of its weight is
# lost, however often it comes. AdamW's updates are about as large as the
# learning rate, and a schedule makes that small.
#
# So the **weights stay float32**, and the products run on copies: *autocast*.
# What has which type, in a step of kdlib?

# %%
from kdlib.precision import Precision

half = Precision("bf16", DEVICE)
batch = collator.collate(pairs[:12]).to(DEVICE)
student = new_student().train()
with half.autocast():
    output = student(**batch.student.inputs(), use_cache=False)
logits = batch.student.select(output.logits)
targets = live.targets(batch)
loss = forward_kl(logits, targets).sum() / len(targets)
loss.backward()
for name, tensor in {
    "weight": student.lm_head.weight,
    "logits": logits,
    "loss": loss,
    "gradient of a weight": student.lm_head.weight.grad,
}.items():
    print(f"{name:21} {str(tensor.dtype).removeprefix('torch.')}")

# %% [markdown]
# Logits arrive in bfloat16 and the loss is in float32: `forward_kl` casts
# before it does anything else. kdlib's `train` refuses a student in 16 bits.
# `Precision.choose` takes bf16 where the card has it (compute capability 8.0;
# a T4 says that it has, and emulates it), fp16 below, float32 on a CPU.
#
# Does it matter to a student? Three paired seeds of the quickstart's student,
# `notebooks/experiments/precision_and_split.py`:

# %%
trained = json.loads((results / "precision_and_split.json").read_text())
print(trained["device"], "·", trained["date"], end=" · ")
print(f"{trained['seeds']} seeds of {trained['steps']} steps")
print(f"{'':18}{'KL to the teacher':>24}{'exact match':>25}")
for name, row in trained["rows"].items():
    kl_found, exact = (
        f"{row[k]['mean']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]"
        for k in ("kl", "exact_match")
    )
    print(f"{name:18}{kl_found:>24}{exact:>25}")
print()
for name in ("bf16-weights", "bf16-computation"):
    print(known[name])

# %% [markdown]
# With its *weights* in bf16 a student stayed farther from its teacher, in
# every seed. With float32 weights, computing in bf16 is not shown to cost
# anything here; three seeds cannot rule out a small loss.
#
# ### What bf16 does to a KL
#
# Chapter 2 saw that logits which *arrive* in bfloat16 do a KL little harm, and
# that a log-softmax *computed* in it does much. Now we can say when. Let the
# student's log-probabilities be the teacher's plus a small $\delta_v$.
#
# $$\mathrm{KL}(p \,\|\, q) = -\sum_v p_v\, \delta_v
#   = \tfrac12 \sum_v p_v\, \delta_v^2 + O(\delta^3),$$
#
# because $\sum_v p_v e^{\delta_v} = 1$ makes the first-order terms cancel.
# The KL is of **second** order in the distance. Rounding $\log p_v$ to
# bfloat16 moves it by up to $2^{-8}$ of itself, and a sum of such errors is
# of **first** order: nothing makes it cancel.
#
# So there is a distance below which the computed KL is rounding.

# %%
with torch.no_grad():
    z = live.targets(collator.collate(pairs).to(DEVICE)).cpu() / 2  # at T = 2
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


def kl_in(dtype, student, teacher):
    """As a library does that takes its log-softmax in the logits' type."""
    log_s, log_t = (x.to(dtype).log_softmax(-1) for x in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1).double()


distances = [2.0**-k for k in range(0, 9)]
curves = {"second order": [], "float32": [], "bfloat16": []}
negative = []
for distance in distances:
    student = z + distance * noise
    p = z.double().softmax(-1)
    delta = student.double().log_softmax(-1) - z.double().log_softmax(-1)
    curves["second order"].append((p * delta**2).sum(-1).mean().item() / 2)
    for name in ("float32", "bfloat16"):
        found = kl_in(getattr(torch, name), student, z)
        curves[name].append(found.abs().mean().item())
    negative.append((found < 0).double().mean().item())

# %%
figure, axes = plt.subplots(figsize=(6.3, 3))
axes.plot(distances, curves["bfloat16"], "o-", color=plots.ORANGE)
axes.plot(distances, curves["float32"], "s-", color=plots.BLUE)
axes.plot(distances, curves["second order"], ":", color="black")
axes.text(0.005, 0.015, "computed in bfloat16", color=plots.ORANGE)
axes.text(
    0.02, 1e-5, "computed in float32,\nand the formula", color=plots.BLUE
)
axes.set(xscale="log", yscale="log")
axes.set_xlabel("distance of the student's logits from the teacher's")
axes.set_ylabel("mean |KL|, nats")
axes.set_title("Near the teacher, a KL in bfloat16 is noise", loc="left")
plt.show()
print("share of tokens with a negative KL, in bfloat16:")
print(f"far {negative[0]:.1f}, near {negative[-1]:.1f}")
assert curves["bfloat16"][-1] > 50 * curves["float32"][-1]

# %% [markdown]
# A student that becomes good walks to the left. At some point its loss stops
# falling, on paper, and many tokens have a negative divergence, which there is
# not. In kdlib every divergence casts to float32 first.
#
# ### fp16: small numbers vanish
#
# float16 has more digits and no exponent to spare. A token's gradient is
# divided by $N$ = 8,128; what is left may be too small:

# %%
gradient = torch.tensor([3e-4, -2e-8, 4e-9])
print("stored plainly", gradient.half().tolist()[1:])
scale = 2.0**14
back = (gradient * scale).half().float() / scale
print("scaled before ", [f"{value:.1g}" for value in back.tolist()[1:]])

# %% [markdown]
# Hence a *gradient scaler*: multiply the loss, and divide the gradients before
# they are used. "Before" includes clipping. By hand, a gradient of length 0.5
# with a limit of 1, which must not be clipped:

# %%
g, limit = torch.tensor([0.3, 0.4]), 1.0


def clipped(g):
    return g * (limit / g.norm()).clamp(max=1)


right = clipped((g * scale) / scale)
wrong = clipped(g * scale) / scale
print("unscale, clip", [round(v, 4) for v in right.tolist()])
print("clip, unscale", [f"{v:.1g}" for v in wrong.tolist()])
torch.testing.assert_close(right, g)
torch.testing.assert_close(wrong * scale, g / g.norm())

# %% [markdown]
# The wrong order shrinks this gradient to length `limit / scale`. Adam hides
# it, because it divides by the gradient's own size; the norm in the logs is
# wrong. In `take_step` above, `unscale_` stands before `clip_grad_norm_`.
#
# ## 4 · One step in several bites
#
# A batch that does not fit is cut into micro-batches; gradients add up.
# Chapters 3 and 6 gave the rule: everybody divides by the token count of the
# whole step. Here is what breaks it.
#
# ### By hand
#
# Two answers, one of 1 token with loss 3, one of 9 tokens with loss 1 each.

# %%
losses = [[3.0], [1.0] * 9]
whole = sum(map(sum, losses)) / sum(map(len, losses))
means = sum(sum(row) / len(row) for row in losses) / len(losses)
print("token mean", whole, "  mean of means", means)
weight = [1 / (len(losses) * len(row)) for row in losses]
print("weight of a token: 0.1;  in the mean of means:", end=" ")
print([round(value, 3) for value in weight])

# %% [markdown]
# In the mean of means a token counts nine times as much as another because it
# stands in a short answer. It is another objective, and its weights depend on
# how rows were thrown together.
#
# ### Predict
#
# Three ways to accumulate: divide by the step's tokens; average the
# micro-batches' means; clip each micro-batch's gradient before it is added.
# Which of them is right, and for which splits are the others right too? (What
# is printed is how far the gradient's *direction* turned, as a length.)


# %%
def gradient_of(batches, way):
    student = new_student(32).double()
    tokens = sum(len(batch.response_ids) for batch in batches)
    total = 0.0
    for batch in batches:
        logits = gradients.student_logits(student, batch)
        values = forward_kl(logits, live.targets(batch).double())
        share = values.mean() / len(batches)
        if way != "mean of means":
            share = values.sum() / tokens
        parts = torch.autograd.grad(share, list(student.parameters()))
        part = torch.cat([p.flatten() for p in parts])
        if way == "clipped each":
            part = part * (0.1 / part.norm()).clamp(max=1)
        total = total + part
    return total


# %%
step_rows = pairs[:12]


def split(rows, size):
    cut = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [collator.collate(part).to(DEVICE) for part in cut]


whole = gradient_of(split(step_rows, 12), "token count")
ways = ("token count", "mean of means", "clipped each")
print(f"{'':14}", *[f"{12 // size:>3} micro" for size in (12, 6, 3, 1)])
for way in ways:
    errors = []
    for size in (12, 6, 3, 1):
        found = gradient_of(split(step_rows, size), way)
        turned = found / found.norm() - whole / whole.norm()
        errors.append(turned.norm().item())
    print(f"{way:14}", *[f"{error:9.2f}" for error in errors])
    assert way != "token count" or max(errors) < 1e-5

# %% [markdown]
# kdlib's lines for it. The count is known before the first forward pass, and
# is summed over processes as well. Below them, what a mean of means does to a
# student: the same three seeds, as a difference to the token mean.

# %%
lines_of(gradients.add_gradient, "items = count_items", "parts.append")
print()
print(known["mean-of-means"])

# %% [markdown]
# The mean of means is another objective. That it makes a worse student is not
# shown here, by three seeds. What was shown above is that its gradient depends
# on the split, so that two runs with other micro-batches are not comparable.
#
# ### Rows of like length
#
# A batch is as long as its longest row; the rest is padding that computes
# nothing of use. kdlib sorts rows by length within windows of 16 batches, and
# shuffles the batches. How much padding is left?

# %%
many = localize.examples("train", locales=["fr"], limit=1600)
many = [collator.encode(e, number) for number, e in enumerate(many)]


def length(pair):
    return len(pair.student_prompt_ids) + len(pair.response_ids)


def padding(batches):
    real = sum(length(pair) for batch in batches for pair in batch)
    made = sum(max(map(length, batch)) * len(batch) for batch in batches)
    return 1 - real / made


order = random.Random(0).sample(many, len(many))
at_random = [order[i : i + 32] for i in range(0, len(order), 32)]
bucketed = list(islice(shuffled(many, 32, random.Random(0)), len(many) // 32))
print(f"padding at random {padding(at_random):.0%}", end=", ")
print(f"in windows {padding(bucketed):.0%}")

# %% [markdown]
# Buckets make batches alike inside and unlike each other: 32 short answers in
# one step, 32 long ones in the next. With a token mean each *step* has the
# same weight, whatever it holds. With a mean of means over devices that got
# different buckets, every step is wrong.
#
# ## 5 · Compile
#
# `torch.compile` traces a module into one graph and fuses its elementwise
# work. It costs a compilation for each *program*; a new shape may be a new
# program. kdlib compiles block by block, and leaves `dynamic` at torch's
# default, None. How many programs is that? A backend that only counts needs no
# compiler:


# %%
def programs(dynamic):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = models.build(tokenizer, hidden_size=32, layers=4, heads=4)
    for block in model.get_decoder().layers:
        block.compile(backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (9, 12, 17, 23):  # rows differ from step to step
            model(torch.ones(2, tokens, dtype=torch.long), use_cache=False)
    torch.compiler.reset()
    return len(seen)


for dynamic in (False, True, None):
    print(f"dynamic={dynamic!s:5} 4 blocks, 4 lengths: {programs(dynamic)}")

# %% [markdown]
# Blocks are alike, so one program serves all of them, and a dynamic one serves
# all lengths. The default makes one for the first length, the quickest where
# all rows are alike, and a dynamic one when it meets the second. The loss is
# not compiled: it has a kernel of its own, next. What compiling brings has to
# be measured on a card (section 8).

# %% [markdown]
# ## 6 · The fused loss, line by line
#
# The loss was the largest thing on the card. Can it be had without its
# matrices? Everything follows from one line of calculus. Let $h_n$ be the
# student's hidden state for token $n$, $W$ its output head, and
#
# $$z_n = W h_n, \qquad L = \sum_n w_n\, D(z_n, t_n),$$
#
# with $w_n = 1/N$ for a mean and $t_n$ the teacher's logits.
#
# **Line 1: two products.** $S = H_s W_s^\top$ and $T = H_t W_t^\top$, both
# $[N, V]$.
#
# **Line 2: the gradient of the logits.** Row $n$ of $G = \partial L/\partial
# S$ is $w_n\, \partial D/\partial z_n$. For the forward KL chapter 5 found
#
# $$G_n = w_n\, \big(p_s - p_t\big)_n .$$
#
# It needs row $n$ of $S$ and $T$ and nothing else.

# %% [markdown]
# **Line 3: two more products.** By the chain rule, with $z_{nv} = \sum_k
# H_{nk} W_{vk}$,
#
# $$\frac{\partial L}{\partial H_{nk}} = \sum_v G_{nv} W_{vk}, \qquad
#   \frac{\partial L}{\partial W_{vk}} = \sum_n G_{nv} H_{nk},$$
#
# so $\partial H = G\,W$ and $\partial W = G^\top H$.
#
# **Line 4: rows do not talk to each other.** So take a few rows, do lines 1 to
# 3, and forget them. $\partial H$ gets its rows, $\partial W$ is a sum over
# chunks. Never is there an $[N, V]$.
#
# By hand: one token, two words, one hidden number.

# %%
from math import exp

h, w, p_t = 2.0, [0.5, 0.0], [0.6, 0.4]
s = [h * v for v in w]
total = sum(exp(v) for v in s)
p_s = [exp(v) / total for v in s]
G = [a - b for a, b in zip(p_s, p_t, strict=True)]
d_h = sum(a * b for a, b in zip(G, w, strict=True))
d_w = [a * h for a in G]
print("G  ", [round(v, 4) for v in G])
print("d h", round(d_h, 4), "  d w", [round(v, 4) for v in d_w])

# %% [markdown]
# Vectorised, it is the whole method in a dozen lines:


# %%
@torch.no_grad()
def fused_by_hand(h_s, w_s, h_t, w_t, chunk):
    """Loss, d h_s and d w_s of the mean forward KL, some rows at a time."""
    weight = 1 / len(h_s)
    loss, d_h, d_w = 0.0, torch.empty_like(h_s), torch.zeros_like(w_s)
    for start in range(0, len(h_s), chunk):
        rows = slice(start, start + chunk)
        log_s = (h_s[rows] @ w_s.T).log_softmax(-1)  # product 1
        log_t = (h_t[rows] @ w_t.T).log_softmax(-1)  # product 2
        loss += weight * (log_t.exp() * (log_t - log_s)).sum()
        G = weight * (log_s.exp() - log_t.exp())
        d_h[rows] = G @ w_s  # product 3
        d_w += G.T @ h_s[rows]  # product 4, summed
    return loss, d_h, d_w


# %%
one = {"dtype": torch.float64}
tiny = fused_by_hand(
    torch.tensor([[h]], **one),
    torch.tensor(w, **one)[:, None],
    torch.ones(1, 1, **one),
    torch.tensor(p_t, **one).log()[:, None],
    chunk=1,
)
print([round(v, 4) for v in (tiny[1].item(), *tiny[2].flatten().tolist())])
assert abs(tiny[1].item() - d_h) < 1e-12

# %% [markdown]
# ### Equal, in value and gradient
#
# Three ways to one loss, in float64: logits and autograd; the lines above;
# `kdlib.fused`. Chunks of every size must agree.


# %%
def heads(n, v, width_s, width_t, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (n, width_s), (v, width_s), (n, width_t), (v, width_t)
    found = [torch.randn(shape, generator=draw, **one) for shape in shapes]
    found[1], found[3] = found[1] / 2, found[3] / 2
    h_s, w_s, h_t, w_t = (x.to(DEVICE, dtype) for x in found)
    return h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t


def naive(h_s, w_s, h_t, w_t, loss=forward_kl):
    value = loss(h_s @ w_s.T, h_t @ w_t.T).mean()
    return value.detach(), *torch.autograd.grad(value, (h_s, w_s))


def library(h_s, w_s, h_t, w_t, **options):
    wide = torch.promote_types(h_s.dtype, torch.float32)
    weights = torch.full_like(h_s[:, 0], 1 / len(h_s), dtype=wide).detach()
    options |= {"token_weights": weights}
    found = fused_divergence(h_s, Head(w_s), h_t, Head(w_t), **options)
    grads = torch.autograd.grad(found.total, (h_s, w_s))
    return found.total.detach(), *grads


# %%
x = heads(n=37, v=211, width_s=16, width_t=24)
wanted = naive(*x)
for chunk in (1, 5, 16, 37, 100):
    for one_of, two in zip(fused_by_hand(*x, chunk), wanted, strict=True):
        torch.testing.assert_close(one_of, two, rtol=1e-10, atol=1e-12)
for workspace in (1, 10**5, 10**8):
    found = library(*x, workspace=workspace)
    for one_of, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one_of, two, rtol=1e-10, atol=1e-12)
print(f"loss {wanted[0]:.6f}: by hand, by autograd and fused")

# %% [markdown]
# ### Other divergences
#
# Only line 2 knows the divergence. Each one of kdlib is a sum $D = \sum_v
# d(p_t, p_s)$. Through the softmax, whose slope is $\partial p_v/\partial z_u
# = p_v(\mathbb 1[u = v] - p_u)$,
#
# $$\frac{\partial D}{\partial z_u} = a_u - p_{s,u} \sum_v a_v, \qquad
#   a_v = p_{s,v}\, \frac{\partial d}{\partial p_{s,v}} .$$
#
# The table in `kdlib/fused_kernel.py` has $a$ and its sum. Two of its rows:
# forward KL, $a = -p_t$ with sum $-1$; reverse KL, $a = p_s \log(p_s/p_t)$ (a
# constant in $\partial d$ cancels) with sum $D$.

# %%
from kdlib.divergences import reverse_kl

z = torch.randn(5, 30, **one).requires_grad_()
t = torch.randn(5, 30, **one)
p_s, p_t = z.softmax(-1), t.softmax(-1)
for loss, a in (
    (forward_kl, -p_t),
    (reverse_kl, p_s * (p_s / p_t).log()),
):
    (slope,) = torch.autograd.grad(loss(z, t).sum(), z, retain_graph=True)
    formula = a - p_s * a.sum(-1, keepdim=True)
    torch.testing.assert_close(slope, formula, rtol=1e-9, atol=1e-12)
    print(f"{loss.__name__}: the table's row is its gradient")

# %% [markdown]
# ### What kdlib adds
#
# - $G$ **overwrites** $S$: there is no second buffer.
# - $S$ and $G$ have the model's type, as its own forward pass would have it
#   (`exact=True`: $S$ in float32); $\partial W$ is summed in **float32**.
# - On a card, line 2 is one Triton kernel that reads each logit twice.
# - Rows that are no response never reach the head.
#
# The loop of `kdlib/fused.py`, without its special cases:
#
# ```python
# for first in range(0, rows, panel):
#     for start in range(first, last, chunk):
#         _project(s, h_s[start:stop], w_s, bias)             # product 1
#         _project(t, h_t[start:stop], w_t, bias)             # product 2
#         differentiate(s, t, g_out, tokens.rows(here), job)  # G over S
#     _product(d_hidden[first:last], g_panel, w_s)            # product 3
#     _product(d_weight, g_panel.T, h_panel, add=first > 0)   # product 4
# ```
#
# A panel is several chunks: $\partial W$ is read and written once a panel.

# %% [markdown]
# ### The price
#
# The gradient exists before the backward pass. `backward` brings one number,
# whatever multiplies the whole loss, and that can be multiplied in late. A
# weight *per token* cannot. So weights go in. Predict: what happens to someone
# who takes the per-token losses out, and weighs them?

# %%
weights = torch.linspace(0.1, 2, len(x[0]), **one).to(DEVICE)
h_s, w_s, h_t, w_t = x
arguments = h_s, Head(w_s), h_t, Head(w_t)
inside = fused_divergence(*arguments, token_weights=weights)
(right,) = torch.autograd.grad(inside.total, h_s)
by_logits = (weights * forward_kl(h_s @ w_s.T, h_t @ w_t.T)).sum()
torch.testing.assert_close(right, torch.autograd.grad(by_logits, h_s)[0])
outside = (weights * fused_divergence(*arguments).per_token).sum()
print("values agree:     ", torch.allclose(inside.total, outside))
print("has a gradient:   ", outside.requires_grad)

# %% [markdown]
# The right value, and no gradient: torch refuses to train on it. A silent
# wrong gradient would be worse, and that is why the per-token values are
# detached.

# %% [markdown]
# ## 7 · The floor
#
# ### Predict
#
# Suppose line 2 cost nothing. How many floating-point operations are left? And
# what would recomputing the logits in the backward pass, as activation
# checkpointing does, add?
#
# Four products of $N \times V$ with a width, two operations a number:
#
# $$\text{floor} = 2NV\,(3 H_s + H_t).$$

# %%
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def into_a_sum(out, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


more = {torch.ops.aten.addmm_: into_a_sum}  # the counter does not know it


def flops_of(run, *arguments):
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run(*arguments)
    return counter.get_total_flops()


def recomputed(h_s, w_s, h_t, w_t):
    def head_and_loss(h_s, w_s):
        return forward_kl(h_s @ w_s.T, h_t @ w_t.T).mean()

    loss = checkpoint(head_and_loss, h_s, w_s, use_reentrant=False)
    torch.autograd.grad(loss, (h_s, w_s))


# %%
n, v, width_s, width_t = 37, 211, 16, 24
floor = 2 * n * v * (3 * width_s + width_t)
for name, run in {
    "naive": naive,
    "fused": library,
    "recomputed": recomputed,
}.items():
    print(f"{name:11} {flops_of(run, *x) / floor:.2f} floors")
assert flops_of(library, *x) == flops_of(naive, *x) == floor

# %% [markdown]
# The fused loss does no product twice; its gain is not bought with
# computation. Losses that recompute both sides' logits pay two products more.
#
# In seconds, at full size on an H100 (989 TFLOP/s and 3.35 TB/s, by NVIDIA's
# data sheet of the SXM card), and what has to be read and written if each pass
# over a chunk went to memory: $S$ and $T$ written, each read twice, $G$
# written, and read twice.

# %%
H_s, H_t = (side["hidden_size"] for side in (preset.student, preset.teacher))
floor = 2 * rows * V * (3 * H_s + H_t)
print(f"floor {floor / 1e12:.1f} TFLOP: {1e3 * floor / 989e12:.1f} ms at peak")
moved = (2 + 4 + 1 + 2) * 2 * rows * V
print(f"moved {moved / 1e9:.0f} GB: {1e3 * moved / 3.35e12:.1f} ms")

# %% [markdown]
# So a perfect kernel that moved all of it would need one and a half floors. A
# chunk that stays in the card's cache between passes needs less.
#
# ### How near are we?
#
# `python -m kdlib bench loss` times the four products alone, then each method,
# in one run. What follows is rendered from its files, and each says where it
# was measured.

# %%
for path in sorted(results.glob("bench_loss_*.json")):
    bench = json.loads(path.read_text())
    print(f"{bench['device']}, torch {bench['torch']}, {bench['date']}")
    size = bench["size"]
    print(f"N {size['rows']}, V {size['vocab']}, {size['dtype']}", end=", ")
    print(f"widths {size['student_width']} and {size['teacher_width']}")
    print(f"{'forward KL':27}{'x floor':>8}{'peak MiB':>10}{'grad error':>12}")
    for row in bench["rows"]:
        if row["divergence"] == "forward_kl" and "ratio" in row:
            print(f"{row['method']:27}{row['ratio']:8.2f}", end="")
            print(f"{row['peak_mib']:10,}{row['gradient_error']:12.0e}")
    print()

# %%
files = sorted(results.glob("bench_loss_*.json"))
figure, panels = plt.subplots(
    len(files), 1, figsize=(6.8, 2.5 * len(files)), squeeze=False
)
for axes, path in zip(panels.flat, files, strict=True):
    bench = json.loads(path.read_text())
    timed = [
        row
        for row in bench["rows"]
        if row["divergence"] == "forward_kl" and "ratio" in row
    ]
    ours = [row["method"].startswith("kdlib") for row in timed]
    colours = [plots.ORANGE if mine else plots.GREY for mine in ours]
    ratios = [row["ratio"] for row in timed]
    bars = axes.barh([row["method"] for row in timed], ratios, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" for value in ratios], padding=3)
    axes.axvline(1, color=plots.BLUE)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(ratios))
    axes.set_title(bench["device"], fontsize=10, loc="left")
panels.flat[-1].set_xlabel("time of forward and backward, in floors (blue)")
plt.show()

# %% [markdown]
# On a CPU the ratio is far from one: exponentials are slow there, the widths
# of that run are small, and line 2 is plain torch. What the fused loss brings
# a CPU is memory, and some speed. A ratio near one is what the kernel is for,
# and can be seen on a card alone.

# %% [markdown]
# ## 8 · Throughput and MFU
#
# *Model FLOPs utilisation*: the operations that the model needs for its
# tokens, over what the card could do in that time (Chowdhery et al. 2022,
# arXiv:2204.02311, appendix B). Padding and recomputing take time and count
# for nothing, so they lower it.
#
# For a forward pass over rows of $T$ tokens, with $P$ parameters, $L$ layers
# and attention width $H$, a token needs $2P + 4LHT$; training needs three
# times as much. Against torch's counter:

# %%
counted_on = models.build(
    tokenizer, hidden_size=64, layers=2, heads=4, seed=0
).train()
counted_on.set_attn_implementation("eager")
tokens = 2 * 96


def forward_and_backward():
    ids = torch.ones(2, 96, dtype=torch.long)
    counted_on(ids, use_cache=False).logits.sum().backward()


formula = tokens * flops_per_token(counted_on, 96, training=True)
counted = flops_of(forward_and_backward)
print(f"formula / counted: {formula / counted:.2f}")
assert abs(formula / counted - 1) < 0.02

# %% [markdown]
# ### Predict
#
# The step of section 2 at MFU 0.45 on an H100. The teacher only reads: $2P$ a
# token. How many of the student's tokens a second?

# %%
with FakeTensorMode():
    student = qwen3(preset, preset.student)
    teacher_at_size = qwen3(preset, preset.teacher)
    needs = flops_per_token(student, preset.length, training=True)
    asks = flops_per_token(teacher_at_size, preset.length, training=False)
peak = PEAKS["H100"]
print(f"student {needs / 1e9:.2f}, teacher {asks / 1e9:.2f} GFLOP a token")
print(f"at MFU 0.45: {0.45 * peak / (needs + asks):,.0f} tokens a second")
print(f"without a teacher: {0.45 * peak / needs:,.0f}")

# %% [markdown]
# The teacher costs less than the student that is smaller: it is not trained.
# With targets from a file it costs nothing, and chapter 11 is about that.
#
# ### Measured
#
# `python -m kdlib bench train` trains one student in several loops, each as
# its user would start it:

# %%
files = sorted(results.glob("bench_train_*.json"))
print(len(files), "result files of bench train")
for path in files:
    bench = json.loads(path.read_text())
    print(f"{bench['device']}, torch {bench['torch']}, {bench['date']}")
    print(f"{'':27}{'tokens/s':>10}{'x GKD':>7}{'peak GiB':>10}{'MFU':>6}")
    for row in bench["rows"]:
        if "skipped" in row:
            print(f"{row['row']:27} not measured")
            continue
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        mfu = f"{row['mfu']:.2f}" if row["mfu"] else "-"
        print(f"{row['row']:27}{row['tokens_per_s']:10,.0f}{ratio:>7}", end="")
        print(f"{row['peak_mib'] / 1024:10.1f}{mfu:>6}")
    print()

# %% [markdown]
# And each setting of `TrainConfig` by itself, from the script of section 2.
# Look for what a saved GiB costs:

# %%
print(len(cards), "result files of gpu_loop.py")
for card in cards:
    print(f"{card['device']}, {card['date']}, {card['steps']} timed steps")
    print(f"{'':34}{'tokens/s':>10}{'peak GiB':>10}{'MFU':>6}")
    for name, row in card["settings"].items():
        if "skipped" in row:
            print(f"{name:34} not measured")
            continue
        mfu = f"{row['mfu']:.2f}" if row["mfu"] else "-"
        print(f"{name:34}{row['tokens_per_s']:10,.0f}", end="")
        print(f"{row['peak_mib'] / 1024:10.1f}{mfu:>6}")

# %% [markdown]
# ## 9 · A run that can be killed
#
# Machines fail, and leases end. What does it take to go on as if nothing had
# happened? Everything that decides the next step has to be on the disk.
#
# ### Predict
#
# A run is saved after six steps of twelve and goes on. Leave out one thing
# each time: AdamW's moments; the position in the data; the state of the random
# generator, from which dropout draws; the number of the step, for the learning
# rate. Which of them changes the end?


# %%
on_cpu = LiveTeacher(copy.deepcopy(teacher).to("cpu"))


def fresh():
    torch.manual_seed(0)
    student = new_student(32).to("cpu")
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98))
    return student.train(), optimizer


def go(student, optimizer, data_from, count, rate_from):
    order = islice(shuffled(pairs, 12, random.Random(0)), data_from, None)
    for step, rows in zip(range(count), order, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(rate_from + step)
        batch = collator.collate(rows)
        logits = gradients.student_logits(student, batch)
        forward_kl(logits, on_cpu.targets(batch)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# %%
plan = TrainConfig(steps=12, batch_size=12, learning_rate=4e-3)
student, optimizer = fresh()
go(student, optimizer, 0, 12, 0)
undisturbed = copy.deepcopy(student.state_dict())
student, optimizer = fresh()
go(student, optimizer, 0, 6, 0)
saved = copy.deepcopy(
    (student.state_dict(), optimizer.state_dict(), torch.get_rng_state())
)
for left_out in ("nothing", "moments", "data", "random", "step"):
    student, optimizer = fresh()
    student.load_state_dict(saved[0])
    if left_out != "moments":
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    if left_out != "random":
        torch.set_rng_state(saved[2])
    at = {name: 0 if left_out == name else 6 for name in ("data", "step")}
    go(student, optimizer, at["data"], 6, at["step"])
    same = all(
        torch.equal(undisturbed[name], value)
        for name, value in student.state_dict().items()
    )
    print(f"left out: {left_out:8} the same bits: {same}")
    assert same == (left_out == "nothing")

# %% [markdown]
# Each of them does, and each of these runs goes on without a word. kdlib saves
# the
# moments, the random states (of Python, NumPy, torch and the device, on every
# process) and the history, whose length *is* the position: order of the data
# and learning rate are functions of seed and step.
#
# ### How it gets to the disk
#
# A kill may come at any instant, also while the checkpoint is written. The
# lines of `checkpoints.write`:

# %%
lines_of(checkpoints.write, "scratch = Path", "tidy(folder")

# %% [markdown]
# Scratch folder, files, a manifest with the hash of each file, flush, **one
# rename**, flush. Before the rename the old checkpoint is the newest; after it
# the new one is, whole. There is no moment in between.
#
# ### A real kill
#
# Now with the real command. `run.toml` describes a small run of 80 steps with
# a checkpoint every 10. Two processes start with it, in two folders. One may
# finish. The other gets SIGKILL, which no program can catch, in the middle.

# %%
place = Path(scratch.name)
with (place / "data.jsonl").open("w") as file:
    for e in examples:
        row = {"context": e.context, "user_input": e.user_input}
        file.write(json.dumps({**row, "response": e.response}) + "\n")
(place / "run.toml").write_text("""\
[train]
steps = 80
batch_size = 6
checkpoint_every = 10
[objective]
[data]
source = "data.jsonl"
[teacher]
model = "teacher"
[student]
build = { hidden_size = 32, layers = 2, heads = 4 }
""")
environment = os.environ | {
    "PYTHONPATH": str(root),
    "CUDA_VISIBLE_DEVICES": "",  # the same on every machine
    "OMP_NUM_THREADS": "1",
}


# %%
def start(*command, out):
    return subprocess.Popen(
        [sys.executable, "-m", *command, "run.toml", "--out", out],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def record(out):
    """The lines of metrics.jsonl, without one that a kill has cut off."""
    path = place / out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [line for line in text.splitlines(True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


# %%
quiet, doomed = (
    start("kdlib", "train", out=out) for out in ("quiet", "doomed")
)
while len(record("doomed")) < 25 and doomed.poll() is None:
    time.sleep(0.005)
doomed.send_signal(signal.SIGKILL)
doomed.communicate()
print("ended by SIGKILL:", doomed.returncode == -signal.SIGKILL)
print("not finished:    ", len(record("doomed")) < 80)
print("a student is there:", (place / "doomed" / "student").exists())
newest = checkpoints.newest_good(place / "doomed" / "checkpoints")
print("newest checkpoint is of step 20 or later:", newest.step >= 20)
print("files:", sorted(path.name for path in newest.folder.iterdir()))

# %% [markdown]
# The same command once more, and it goes on. Steps after the checkpoint are
# done again, and their lines in the record are written anew.

# %%
finish(start("kdlib", "train", out="doomed"))
finish(quiet)
for name in ("quiet", "doomed"):
    steps = [line["step"] for line in record(name)]
    assert steps == list(range(1, 81))


def weights_of(out):
    return (place / out / "student" / "model.safetensors").read_bytes()


losses = {n: [r["loss"] for r in record(n)] for n in ("quiet", "doomed")}
print("80 equal losses:", losses["quiet"] == losses["doomed"])
print("equal files, bit for bit:", weights_of("quiet") == weights_of("doomed"))
assert weights_of("quiet") == weights_of("doomed")

# %% [markdown]
# The tests of kdlib kill 26 runs at random moments, also between two calls to
# the operating system while a checkpoint is written, and compare the same way
# (`tests/faults`).
#
# Now watch one. The run below is a real one: the running example's student,
# with a checkpoint every 20 steps. **Predict before you press:** when you stop
# it between two checkpoints and resume it, where do the curves go on, and do
# they end anywhere else? Start, stop and resume, and find out what was lost.

# %%
from kdlib import phone
from kdlib.explorers.live_run import live_run

live_run(phone.Data())

# %% [markdown]
# Lost are the steps since the last checkpoint, and they come out the same when
# they are done again.
#
# ### A disk that lies
#
# A file can also go bad later. Change one byte of the newest checkpoint:

# %%
import warnings

folder = place / "doomed" / "checkpoints"
newest = checkpoints.newest_good(folder)
victim = newest.folder / "model.safetensors"
data = bytearray(victim.read_bytes())
data[-1] ^= 1
victim.write_bytes(data)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    earlier = checkpoints.newest_good(folder)
print(f"step {newest.step} is skipped, step {earlier.step} is taken:")
print(str(caught[0].message).partition(" is damaged: ")[2])

# %% [markdown]
# It is named, skipped and left for you to look at. To begin anew in silence
# would hide it.
#
# ## 10 · Two processes
#
# ### The factor that is forgotten
#
# Process $r$ of $R$ has $N_r$ of the step's $N = \sum_r N_r$ tokens. The loss
# is a sum, $L = \sum_r \frac1N \sum_{n \in r} D_n$. The engines *average*
# gradients over processes. So each process must hand in $R$ times its share:
#
# $$\frac1R \sum_r R \cdot \nabla \Big(\frac1N \sum_{n \in r} D_n\Big)
#   = \nabla L .$$
#
# The usual code takes each process's own mean instead, $\frac1R \sum_r
# \frac{1}{N_r} \sum_{n \in r} \nabla D_n$: section 4's mean of means, again.

# %%
ordered = sorted(step_rows, key=length)
shares = [split(part, 12)[0] for part in (ordered[:6], ordered[6:])]
counts = [len(batch.response_ids) for batch in shares]
right = gradient_of(split(ordered, 12), "token count")
alone = [gradient_of([batch], "token count") for batch in shares]
ours = sum(2 * g * n / sum(counts) for g, n in zip(alone, counts, strict=True))
ours, usual = ours / 2, sum(alone) / 2  # the engine's mean
print("tokens of both processes", counts)
for name, found in (("kdlib's", ours), ("usual", usual)):
    error = (found - right).norm() / right.norm()
    print(f"{name:8} gradient off by {error:.3f}")
assert (ours - right).norm() < 1e-5 * right.norm()

# %% [markdown]
# ### Two engines
#
# **DDP** (Li et al. 2020, arXiv:2006.15704): each process holds everything and
# gradients are averaged. **FSDP2** (after Zhao et al. 2023, arXiv:2304.11277):
# each holds $1/R$ of weights, gradients, moments and of the teacher; a block's
# weights are gathered while it computes. Predict the bytes a process holds
# between steps, for the models of section 2 on 8 cards:

# %%
for ranks in (1, 8):
    held = (12 * P_s + 2 * P_t) / GIB
    print(f"{ranks} processes: DDP {held:4.1f} GiB", end=", ")
    print(f"FSDP2 {held / ranks:4.1f} GiB each")

# %% [markdown]
# What the layers keep and what the loss needs stays: each process has its own
# rows. In code the two engines are a few lines each:

# %%
from kdlib import sharding

lines_of(sharding.replicated, "return Distributed", ")")
print()
lines_of(sharding.shard, "for block in", "fully_shard(model")

# %% [markdown]
# Now for real: `torchrun` starts two processes on this CPU, which talk by
# gloo. The same file, the same data.

# %%
ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
finish(start(*ranks, "-m", "kdlib", "train", out="ddp"))
finish(start(*ranks, "-m", "kdlib", "train", "--shard", out="fsdp"))
from safetensors.torch import load

alone = load(weights_of("quiet"))
for name in ("ddp", "fsdp"):
    found = [line["loss"] for line in record(name)]
    gap = max(abs(a - b) for a, b in zip(found, losses["quiet"], strict=True))
    print(f"{name:4}: 80 losses as of one process, within 1e-3: {gap < 1e-3}")
    assert gap < 1e-3
    facts = json.loads((place / name / "result.json").read_text())
    print(f"      ranks {facts['ranks']}, shard {facts['shard']}")

# %% [markdown]
# Equal up to the order of float32 sums, which 80 steps make larger. (In
# float64 kdlib's tests find 1e-12.) What does each engine leave on the disk?

# %%
for name in ("ddp", "fsdp"):
    saved = checkpoints.newest_good(place / name / "checkpoints")
    files = sorted(
        path.relative_to(saved.folder).as_posix()
        for path in saved.folder.rglob("*")
        if path.is_file()
    )
    print(name, "step", saved.step)
    for file in files:
        print("    ", file)

# %% [markdown]
# Every process writes its own part, and another number of processes can read
# them: a run stopped on two cards goes on with one. Both engines leave the
# same kind of student, in one file.
#
# ## 11 · When to move on
#
# One machine, a few cards: this loop. Beyond it others are better, and
# [`docs/past_one_node.md`](../docs/past_one_node.md) says which (TRL, verl,
# NeMo RL, Megatron Bridge, torchtitan), why, and what to try before. Three
# things go with you.
#
# **The objective** is a function of two logit tensors. It stands in anybody's
# loop, here a bare one:

# %%
batch = collator.collate(pairs[:4]).to(DEVICE)
student = new_student().train()
output = student(**batch.student.inputs(), use_cache=False)
logits = batch.student.select(output.logits)
loss = Objective("reverse_kl", temperature=2.0)(
    logits, live.targets(batch), batch.response_ids, num_items=200
)
loss.total.backward()
print(f"loss {loss.total:.2f} = {loss.n_tokens} tokens' share of 200")

# %% [markdown]
# (`notebooks/experiments/hf_trainer.py` puts it into `transformers.Trainer`.)
#
# **The denominator**, `num_items`: ask the engine whether it sums or averages
# over processes, and test it as above.
#
# **The laws.** Where a library brings its own loss, hold it to the laws before
# you trust it. What `python -m kdlib laws --peers` found:

# %%
found = json.loads((results / "laws_peers.json").read_text())
print(found["device"], "·", found["date"])
fused_law = "13"
print("law 13:", found["laws"][fused_law])
for library in dict.fromkeys(row["library"] for row in found["rows"]):
    mine = [row for row in found["rows"] if row["library"] == library]
    statuses = [v["status"] for row in mine for v in row["verdicts"]]
    asked = sum(status != "not_applicable" for status in statuses)
    print(f"{library:16} {statuses.count('passed'):4} of {asked} hold")

# %% [markdown]
# (Not all that does not hold is a bug: some is by design and documented. The
# command's table says which.)
#
# ## Exercises
#
# They are in [`exercises/ch10.ipynb`](../exercises/ch10.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** A run fits with the fused loss and not without it. A colleague says:
# "So the fused loss recomputes something." What do you answer?
#
# <details><summary>Answer</summary>
#
# No product is done twice: section 7 counted them. The logits of a row are
# needed only until the gradient of its own loss is known, and that is known at
# once, because the loss is the last thing in the network and its weights are
# known beforehand. Recomputing is what one pays where the gradient is *not*
# known at once, as for the layers.
#
# </details>

# %% [markdown]
# **2.** On one card the loss falls as it should. On eight, with the same batch
# in total, it falls a little differently, and more so where answers differ in
# length. Where do you look first?
#
# <details><summary>Answer</summary>
#
# At the denominator. Each process has divided by its own token count, and the
# engine has averaged the means. Divide by the count over all processes, and
# multiply by their number, because the engine averages.
#
# </details>
#
# **3.** MFU falls from 0.4 to 0.2 when activation checkpointing is switched on
# and rows become shorter. Has the card become slower?
#
# <details><summary>Answer</summary>
#
# Not necessarily. MFU counts what the *model* needs for real tokens.
# Recomputed activations and padding take time and count for nothing. Look at
# the padding, then at how long the card waits for data.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **A mean of means.** Found and repaired in one framework after another
#   ([torchtune#1875](https://github.com/meta-pytorch/torchtune/pull/1875),
#   [transformers#34242](https://github.com/huggingface/transformers/issues/34242),
#   [torchtitan#1842](https://github.com/pytorch/torchtitan/issues/1842),
#   [trl#4719](https://github.com/huggingface/trl/issues/4719)).
# - **Clipping scaled gradients**
#   ([pytorch-lightning#9599](https://github.com/Lightning-AI/pytorch-lightning/issues/9599),
#   [returnn#1590](https://github.com/rwth-i6/returnn/issues/1590)).
# - **A resume that reads the wrong data**
#   ([accelerate#4071](https://github.com/huggingface/accelerate/pull/4071),
#   [ms-swift#10050](https://github.com/modelscope/ms-swift/issues/10050)), or
#   draws other random numbers
#   ([transformers#46628](https://github.com/huggingface/transformers/pull/46628)).
# - **A fused loss that is another loss**
#   ([trl#5731](https://github.com/huggingface/trl/issues/5731)), or forgets
#   the soft cap
#   ([trl#6629](https://github.com/huggingface/trl/issues/6629)).
# - **The teacher's logits kept alive**, batch after batch
#   ([ms-swift#10097](https://github.com/modelscope/ms-swift/issues/10097),
#   [DistillKit#4](https://github.com/arcee-ai/DistillKit/issues/4)).

# %% [markdown]
# ## Summary
#
# - Bytes can be counted before there is a card. With logits of two models the
#   loss is the peak, and the fused loss removes it.
# - Weights, moments, sums and divergences stay in float32. Products and logits
#   may be rounded. A KL is of second order, its rounding of first.
# - One denominator for the whole step, over micro-batches and processes.
# - Four products are the floor. The fused loss does those and nothing twice.
# - MFU counts what the model needs, not what the machine did.
# - A checkpoint holds everything that decides the next step, and appears by
#   one rename. Then a kill changes no bit.
#
# Next, chapter 11: the teacher leaves the card as well.
