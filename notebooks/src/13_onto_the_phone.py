# %% [markdown]
# # 13 · Onto the phone
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/13_onto_the_phone.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 2 minutes |
# | GPU | not needed |
# | memory | 1.5 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Store a student's weights in few bits, and say what that costs.
# 2. Distil into the quantised student, and name the rival that makes it fair.
# 3. Export a student to ONNX, and prove that nothing changed on the way.
# 4. Read latency, memory, file and quality side by side, and decide.
# 5. Let the student draft for its teacher, and predict from the total
#    variation how much of a draft is kept.
#
# The student of this chapter is the quickstart's. We take it from a training
# script to something that a phone can load.
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

# %% [markdown]
# This chapter needs four packages that no other chapter needs. The
# requirements of the course bring them. Where they are missing, the next cell
# says what to type.

# %%
NEEDED = ("torchao", "onnx", "onnxscript", "onnxruntime")
missing = [n for n in NEEDED if importlib.util.find_spec(n) is None]
if missing:
    packages = " ".join(missing)
    raise SystemExit(f"Run this, then go on here: %pip install {packages}")
print("all there")

# %%
import copy
import inspect
import itertools
import json
import tempfile

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)  # a phone is not a cluster

# %%
from kdlib import claims, models, phone, plots
from kdlib.divergences import tvd
from kdlib.evaluate import evaluate, response_logits, teacher_reference
from kdlib.exact import ExactLM, sequences
from kdlib.ledger import Interval
from kdlib.objective import Objective
from kdlib.onnx_model import OnnxModel, export
from kdlib.quantised import (
    FakeQuantised,
    dequantise,
    quantise,
    quantised,
    stored_bytes,
    straight_through,
)
from kdlib.settings import TrainConfig
from kdlib.speculative import overlap, residual, speculate, verify
from kdlib.teachers import LiveTeacher
from kdlib.train import train
from safetensors.torch import load_file

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)

# %% [markdown]
# ## 1 · What is to be shipped
#
# The student was trained by `phone_students.py`, by the quickstart's recipe.
# Its weights lie beside the result file.

# %%
RESULTS = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
data = phone.Data()
teacher, tokenizer = data.teacher, data.tokenizer
student = models.build(tokenizer, **phone.STUDENT).eval()
weights = load_file(RESULTS / "phone_student.safetensors")
found = student.load_state_dict(weights, strict=False)
print("not in the file:", found.missing_keys)
assert student.lm_head.weight is student.model.embed_tokens.weight

# %% [markdown]
# The head is not in the file because it is the embedding: both are one
# matrix, tied. Keep that in mind. Three tools of this chapter have an opinion
# on it.

# %%
test = data.batches(data.test)
reference = teacher_reference(LiveTeacher(teacher), test)
whole = evaluate(student, test, reference)
print(f"float32 student: {whole.exact_match:.2f} of 1,000 inputs exact")
print(f"KL {whole.kl:.2f} nats a token")
print(f"weights {stored_bytes(student) / 1e6:.2f} MB", end=", ")
print(f"the teacher's {stored_bytes(teacher) / 1e6:.2f} MB")

# %% [markdown]
# ### Predict
#
# You may do four things to this student before it ships: store weights in 8
# bits, in 4, in 3; or run it by another program than transformers. Put them
# in the order of what they save in *file*, then of what they save in *time*.
# Write it down.
#
# ## 2 · Whole numbers for weights
#
# ### By hand
#
# A matrix is stored as whole numbers of $b$ bits, and one scale $s$ for each
# of its rows:
#
# $$k = \mathrm{round}(w / s), \qquad \hat w = s\,k, \qquad
#   s = \frac{\max_j |w_j|}{(2^b - 1) / 2}.$$
#
# The divisor is half of the number of steps: with 3 bits there are the eight
# numbers $-4, \dots, 3$ and seven steps between them.

# %%
row, bits = [0.70, -0.33, 0.04, -0.70], 3
scale = max(abs(w) for w in row) / ((2**bits - 1) / 2)
lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
by_hand = [min(max(round(w / scale), lowest), highest) for w in row]
print("scale ", round(scale, 2))
print("stored", by_hand)
print("read  ", [round(scale * k, 2) for k in by_hand])

# %% [markdown]
# $0.70 / 0.2 = 3.5$ is rounded to 4, and there is no 4: it is clamped to 3.
# So the largest weight may be off by half a step, as any other.
#
# Vectorised, and from the library:

# %%
matrix = torch.tensor([row])
s = matrix.abs().amax(1, keepdim=True) / 3.5
vectorised = (matrix / s).round().clamp(-4, 3)
from_library, library_scale = quantise(matrix, 3)
print(vectorised.int().tolist(), from_library.tolist())
assert from_library.tolist() == vectorised.int().tolist() == [by_hand]
assert abs(library_scale.item() - scale) < 1e-6

# %% [markdown]
# ### Why a scale a row
#
# A row of a weight $[\text{out}, \text{in}]$ makes one output. Its scale can
# be taken out of the sum over inputs:
#
# $$y_i = \sum_j s_i k_{ij} x_j = s_i \sum_j k_{ij} x_j .$$
#
# A scale for each *input* $j$ could not. One scale for the whole matrix could,
# but the largest row would set it for all:

# %%
W = student.model.layers[0].mlp.down_proj.weight.detach()
x = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0))
k, s = quantise(W, 4)
left = dequantise(k, s) @ x
right = s[:, 0] * (k.float() @ x)
torch.testing.assert_close(left, right, atol=1e-4, rtol=0)
one_scale = W.abs().max() / 7.5
coarse = (W / one_scale).round().clamp(-8, 7) * one_scale
for name, read in (("a scale a row", dequantise(k, s)), ("one", coarse)):
    print(f"{name:14} error {(read - W).norm() / W.norm():.2f} of the weights")
assert ((dequantise(k, s) - W).abs() <= 0.5001 * s).all()

# %% [markdown]
# ### Predict
#
# Chapter 1 rounded the *teacher*: nothing was lost at 8 bits, hardly anything
# at 4. The student has a ninth of the numbers for the same task. Will it bear
# rounding better or worse?

# %%
rounded = {}
for bits in (8, 4, 3, 2):
    rounded[bits] = evaluate(quantised(student, bits), test, reference)
print(f"float32 {whole.exact_match:.2f} exact, KL {whole.kl:.2f}")
for bits, facts in rounded.items():
    print(f"{bits} bits  {facts.exact_match:.2f} exact, KL {facts.kl:.2f}")
assert abs(rounded[8].exact_match - whole.exact_match) < 0.01
assert rounded[3].exact_match < rounded[4].exact_match - 0.1

# %% [markdown]
# Worse. A small model has no numbers to spare. That is one seed; the result
# file has more, and the teacher beside them:

# %%
facts = json.loads((RESULTS / "phone_students.json").read_text())
print(facts["command"], "·", facts["device"], "·", facts["date"])
print(facts["seeds"], "paired seeds,", facts["test"], "test inputs")
print(f"{'exact match':9} {'teacher':>9}   student, mean [95 % interval]")


def exact_match(row, measure="exact"):
    return Interval(**facts["rows"][row][measure])


print(f"{'float32':11} {facts['teacher']['float32']['exact']:9.3f}", end="   ")
print(exact_match(phone.DISTILLED))
for bits in (8, 4, 3, 2):
    name = f"rounded, {bits} bits"
    print(
        f"{bits} bits      {facts['teacher'][name]['exact']:9.3f}", end="   "
    )
    print(exact_match(name))

# %% [markdown]
# And the five rows that this course always shows, from the same runs. The
# students are in float32; *kept* is for section 7.

# %%
print(f"{'':26} exact match            kept")
for row in (
    phone.UNTRAINED,
    phone.HARD_TOKENS,
    phone.HARD_FLOPS,
    phone.DISTILLED,
):
    print(f"{row:26} {exact_match(row)}", end="   ")
    print(f"{exact_match(row, 'accepted').mean:.3f}")
alone = facts["teacher"]["float32"]
print(f"{'teacher':26} {alone['exact']:.3f}", end=17 * " ")
print(f"{alone['accepted']:.3f}")

# %% [markdown]
# ## 3 · The same by torchao
#
# Which tool should one use? torch's own `torch.ao.quantization`, with
# `quantize_dynamic`, is deprecated. Its documentation sends users to
# torchao's `quantize_`
# ([docs.pytorch.org](https://docs.pytorch.org/docs/stable/quantization.html)).
# So we take torchao. First, does it round as we do?

# %%
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

by_torchao = copy.deepcopy(student)
quantize_(by_torchao, IntxWeightOnlyConfig(weight_dtype=torch.int4))
theirs = by_torchao.model.layers[0].mlp.down_proj.weight
print(type(theirs).__name__)
k, s = quantise(W, 4)
same = (theirs.qdata == k).float().mean().item()
print(f"the same whole numbers: {same:.1%}")
torch.testing.assert_close(theirs.scale.flatten(), s.flatten())
assert same > 0.999

# %% [markdown]
# ### Predict
#
# `quantize_` with `Int8WeightOnlyConfig` changes every linear layer from 4
# bytes a weight to 1. The student has 0.67 MB of weights. How large is it
# afterwards?


# %%
def held_bytes(model):
    """Bytes of all tensors; one that has two names counts once."""
    total = {}
    for tensor in model.state_dict().values():
        parts = [tensor]
        if hasattr(tensor, "qdata"):
            parts = [tensor.qdata, tensor.scale]
        for part in parts:
            total[part.data_ptr()] = part.numel() * part.element_size()
    return sum(total.values())


weight_only = copy.deepcopy(student)
quantize_(weight_only, Int8WeightOnlyConfig())
print(f"float32           {held_bytes(student):>9,} bytes")
print(f"by the formula    {stored_bytes(student, 8):>9,.0f}")
print(f"torchao           {held_bytes(weight_only):>9,}")
assert held_bytes(student) == stored_bytes(student)

# %% [markdown]
# Twice and more what the formula promised. Look at the two ends of the model:

# %%
head = weight_only.lm_head.weight
embedding = weight_only.model.embed_tokens.weight
print("head     ", type(head).__name__)
print("embedding", type(embedding).__name__, embedding.dtype)
print("still tied:", head is embedding)
extra = 4 * embedding.numel() - 4 * len(embedding)
both = stored_bytes(student, 8) + extra + 4 * len(embedding)
print(f"formula and a second, float32 embedding: {both:,.0f}")
assert both == held_bytes(weight_only)

# %% [markdown]
# An embedding is no linear layer, so it stays as it was. The head gets whole
# numbers of its own. What was one matrix is now two, and one of them is
# float32. In a small model the vocabulary is the largest matrix (chapter 1),
# so this is most of the file.
#
# torchao can be told to take embeddings, too. Both copies are 8 bits then, and
# still two:


# %%
def linear_or_embedding(module, name):
    return isinstance(module, torch.nn.Linear | torch.nn.Embedding)


both_ends = copy.deepcopy(student)
quantize_(both_ends, IntxWeightOnlyConfig(), filter_fn=linear_or_embedding)
print(f"torchao, embedding too {held_bytes(both_ends):>9,} bytes")
for name, model in (("linear", weight_only), ("both", both_ends)):
    facts_of = evaluate(model, test[:2], reference[:2])
    print(f"{name:7} {facts_of.exact_match:.2f} of the first 500 exact")

# %% [markdown]
# ### int8 dynamic
#
# Weight-only models multiply in float: each weight is read as $s\,k$ first. To
# multiply whole numbers, the *inputs* have to be whole numbers as well. Their
# range is not known before they are there, so each token gets its scale when
# it comes: **dynamic** quantisation.
#
# $$y_i = \sum_j \hat w_{ij} \hat x_j
#   = s_i\, t \sum_j k_{ij}\, m_j, \qquad
#   m_j = \mathrm{round}(x_j / t).$$
#
# The sum runs over whole numbers. By hand, and then by torchao:

# %%
layer = torch.nn.Linear(64, 3, bias=False)
rng = torch.Generator().manual_seed(1)
layer.weight.data = torch.randn(3, 64, generator=rng)
token = torch.randn(1, 64, generator=rng)
k, s = quantise(layer.weight, 8)
m, t = quantise(token, 8)
whole_sum = (m.long() @ k.T.long()).float()
by_hand = whole_sum * s.T * t
quantize_(layer, Int8DynamicActivationInt8WeightConfig())
print("sums of whole numbers", whole_sum.int().tolist()[0])
print("by hand", [round(v, 2) for v in by_hand[0].tolist()])
print("torchao", [round(v, 2) for v in layer(token)[0].tolist()])
torch.testing.assert_close(layer(token), by_hand, atol=0.02, rtol=0)

# %%
dynamic = copy.deepcopy(student)
quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
ways = {"float32": student, "weights": weight_only, "dynamic": dynamic}
print("first 500 test inputs")
for name, model in ways.items():
    found = evaluate(model, test[:2], reference[:2])
    print(f"{name:8} {found.exact_match:.2f} exact, KL {found.kl:.2f}")

# %% [markdown]
# Nothing to see at 8 bits. Whether it is *faster* is another question, and we
# ask the clock in section 6.
#
# ## 4 · Distil into few bits
#
# At 3 bits most answers are lost. The student was trained as if its weights
# were exact, then it was moved to the nearest point of a coarse grid. Could it
# have been trained *on the grid*?
#
# ### The gradient that is not there
#
# Put the rounding into the forward pass, and let autograd have it:

# %%
w = torch.tensor([0.30, -0.80], requires_grad=True)
target = torch.tensor([0.5, -0.5])
loss = ((0.25 * (w / 0.25).round() - target) ** 2).sum()
loss.backward()
print("gradient through round:", w.grad.tolist())
assert (w.grad == 0).all()

# %% [markdown]
# A staircase is flat almost everywhere. The **straight-through estimator**
# takes the rounding for the identity in the backward pass, and only there
# (Bengio et al. 2013, arXiv:1308.3432):
#
# $$\hat w = w + \mathrm{stop}\big(s\,\mathrm{round}(w / s) - w\big), \qquad
#   \frac{\partial \hat w}{\partial w} := 1 .$$
#
# The value is the quantised one, the gradient that of $\hat w$. It is handed
# to the float weight behind.

# %%
w = torch.tensor([0.30, -0.80], requires_grad=True)
rounded_w = w + (0.25 * (w / 0.25).round() - w).detach()
loss = ((rounded_w - target) ** 2).sum()
loss.backward()
slope_at_rounded = 2 * (rounded_w - target)
print("value   ", [round(v, 2) for v in rounded_w.tolist()])
print("gradient", [round(v, 2) for v in w.grad.tolist()])
torch.testing.assert_close(w.grad, slope_at_rounded.detach())

# %% [markdown]
# It is no gradient of any loss. It is a rule that works because small steps of
# $w$ add up until $\hat w$ jumps. Both, in twenty steps:

# %%
for name in ("round", "straight-through"):
    w = torch.tensor([0.30, -0.80], requires_grad=True)
    for _ in range(20):
        on_grid = 0.25 * (w / 0.25).round()
        if name == "straight-through":
            on_grid = w + (on_grid - w).detach()
        loss = ((on_grid - target) ** 2).sum()
        (slope,) = torch.autograd.grad(loss, w)
        w = (w - 0.1 * slope).detach().requires_grad_()
    print(f"{name:17} {[round(v, 2) for v in on_grid.tolist()]}")

# %% [markdown]
# ### kdlib's lines, read aloud
#
# `FakeQuantised` runs the student with every matrix rounded. A tied head is
# the same parameter, so it is rounded once.

# %%
print(inspect.getsource(straight_through).split('"""')[2])
print(inspect.getsource(FakeQuantised.forward))

# %%
with_few = FakeQuantised(student, 3)
ids = torch.tensor([data.test[0].student_prompt_ids])
with torch.no_grad():
    fake = with_few(ids, use_cache=False).logits
    real = quantised(student, 3)(ids, use_cache=False).logits
torch.testing.assert_close(fake, real, atol=1e-4, rtol=0)
print("FakeQuantised computes what the quantised student computes")

# %% [markdown]
# ### Quantisation-aware distillation
#
# The objective stays as it is. Only the student in it is the quantised one:
#
# $$\min_\theta \sum_{x' \in D'} \mathrm{KL}\big(\Pr^t(\cdot \mid c, z)
#   \,\|\, \Pr^s_{Q(\theta)}(\cdot \mid c', z)\big).$$
#
# Where the labels ran out, the teacher still has 6,000 inputs to offer. Thirty
# steps at 3 bits, live:

# %%
trained = copy.deepcopy(student)
config = TrainConfig(steps=30, batch_size=32, learning_rate=1e-3)
train(
    FakeQuantised(trained, 3),
    data.unlabelled[:2000],
    data.collator,
    Objective("forward_kl"),
    config,
    teacher=data.cache,
)
before = evaluate(quantised(student, 3), test[:1], reference[:1])
after = evaluate(quantised(trained, 3), test[:1], reference[:1])
print("first 250 test inputs, 3 bits")
print(f"rounded            KL {before.kl:.1f}")
print(f"30 steps on grid   KL {after.kl:.1f}")
assert after.kl < 0.7 * before.kl

# %% [markdown]
# ### Predict
#
# The script trained a quarter as long as the student's first training. Three
# rivals read the same tokens:
#
# - **longer**: trained on in float32, then rounded. It shows what the
#   further steps alone are worth.
# - **labels into 3 bits**: on the grid, but on the 300 labels.
# - **distilled into $b$ bits**: on the grid, with the teacher.
#
# The teacher's distributions for these steps were already paid for in the
# first training, so equal tokens are equal FLOPs. Put the rows in order for 4,
# 3 and 2 bits.

# %%
first = facts["steps"][phone.DISTILLED]
print(f"{first:,} steps, then {facts['further']} more")
kinds = ("rounded, {}", "longer, {}", "labels into {}", "distilled into {}")
for bits in (4, 3, 2):
    print(f"\n{bits} bits               exact match")
    for kind in kinds:
        name = kind.format(f"{bits} bits")
        if name in facts["rows"]:
            print(f"{name:22} {exact_match(name)}")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4))
series = {
    "distilled into the bits": ("distilled into {} bits", plots.ORANGE, "o-"),
    "trained longer, then rounded": ("longer, {} bits", plots.BLUE, "s-"),
    "on labels into the bits": ("labels into {} bits", plots.GREY, "^"),
}
for label, (kind, colour, style) in series.items():
    at = [b for b in (4, 3, 2) if kind.format(b) in facts["rows"]]
    found = [exact_match(kind.format(b)) for b in at]
    middle = [f.mean for f in found]
    reach = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
    axes.errorbar(at, middle, yerr=reach, fmt=style, color=colour,
                  capsize=3, label=label)  # fmt: skip
level = exact_match(phone.DISTILLED).mean
axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
axes.text(1.9, level + 0.02, "float32 student", fontsize=9, ha="right")
axes.set_xlim(4.15, 1.85)
axes.set_ylim(-0.05, 1.05)
axes.set_xticks([4, 3, 2])
axes.set_xlabel("bits a weight")
axes.set_ylabel("exact match")
axes.legend(frameon=False, fontsize=9, loc="lower left")
plt.show()

# %%
for name in (
    "eight-bits-cost-nothing",
    "four-bits-cost",
    "three-bits-cost-most",
    "distilled-into-four-bits",
    "distilled-into-three-bits",
    "distilled-into-two-bits",
    "four-bits-against-float",
    "teacher-over-labels-in-three-bits",
):
    print(claims.find(name), end="\n\n")

# %% [markdown]
# How much of what rounding lost comes back? 0 is the rounded student, 1 is the
# float32 student that both began as.

# %%
print(f"{'':8} longer   distilled into")
for bits in (4, 3, 2):
    low = exact_match(f"rounded, {bits} bits").mean
    lost = exact_match(phone.DISTILLED).mean - low
    print(f"{bits} bits", end="")
    for kind in ("longer, {} bits", "distilled into {} bits"):
        won = exact_match(kind.format(bits)).mean - low
        print(f"{won / lost:9.2f}", end="")
    print()

# %% [markdown]
# What *longer* wins has nothing to do with the grid. Only what *distilled
# into* wins beyond it belongs to the quantised forward pass, and the claims
# above are about that part alone.
#
# ## 5 · Out of Python
#
# A phone has no transformers and no torch. It has a runtime that reads a
# graph. **ONNX** is a format for such graphs, and `torch.onnx.export` with
# `dynamo=True` is torch's way to write one: `torch.export` records the forward
# pass, and each operation is translated.
#
# What is recorded is *one* pass, over ids and a mask. The next cell takes some
# seconds.

# %%
scratch = tempfile.TemporaryDirectory(prefix="kdlib-")
path = export(student, Path(scratch.name) / "student.onnx")
on_phone = OnnxModel(path)
print(inspect.getsource(OnnxModel.forward))

# %% [markdown]
# ### The same function?
#
# Not on one example: on the whole test split, every token of every answer.

# %%
worst, tokens = 0.0, 0
for batch in test:
    with torch.no_grad():
        ours = response_logits(student, batch)
        theirs = response_logits(on_phone, batch)
    worst = max(worst, (ours - theirs).abs().max().item())
    tokens += len(ours)
print(f"{tokens:,} tokens; all logits within 1e-4: {worst < 1e-4}")
assert worst < 1e-4
found = evaluate(on_phone, test, reference)
print("the same answers right:", found.hits == whole.hits)

# %% [markdown]
# ### Axes that move
#
# The example in `export` has batch 2 and length 7. If the axes are not named
# as dynamic, these numbers become constants of the graph. So try sizes that
# the example did not have, above all 1:

# %%
for shape in ((1, 1), (1, 12), (3, 40), (1, 200)):
    ids = torch.randint(5, 900, shape, generator=rng)
    with torch.no_grad():
        apart = (on_phone(ids).logits - student(ids).logits).abs().max()
    print(shape, "within 1e-4:", bool(apart < 1e-4))
    assert apart < 1e-4

# %% [markdown]
# ### What is in the file

# %%
import onnx

graph = onnx.load(path).graph
sizes = {t.name: len(t.raw_data) for t in graph.initializer}
largest = max(sizes, key=sizes.get)
print(f"file {path.stat().st_size / 1e6:.2f} MB")
print(f"numbers {sum(sizes.values()) / 1e6:.2f} MB")
print(f"more than {len(graph.node) // 100 * 100} operations")
vocabulary = [t for t in graph.initializer if len(tokenizer) in t.dims]
print("matrices with a row for each token:", len(vocabulary))
assert len(vocabulary) == 1

# %% [markdown]
# One matrix for embedding and head: this exporter kept them tied. Older ones
# did not, and people noticed by the size of the file (see below). Count it in
# yours.
#
# Our `export` also throws something away. The exporter notes for every
# operation which line of Python it came from. For a large model that is
# nothing; here it was a third of the file.
#
# ### int8 under ONNX Runtime
#
# The runtime has a dynamic quantiser of its own. It works on the graph:

# %%
import logging

from onnxruntime.quantization import QuantType, quantize_dynamic

logging.disable(logging.WARNING)  # it would like a cleaning step before
small_path = path.with_name("student-int8.onnx")
quantize_dynamic(path, small_path, weight_type=QuantType.QInt8)
logging.disable(logging.NOTSET)
on_phone_int8 = OnnxModel(small_path)
found = evaluate(on_phone_int8, test, reference)
print(f"float32 {path.stat().st_size / 1e6:.2f} MB", end=", ")
print(f"{whole.exact_match:.2f} exact")
print(f"int8    {small_path.stat().st_size / 1e6:.2f} MB", end=", ")
print(f"{found.exact_match:.2f} exact")
operations = {node.op_type for node in onnx.load(small_path).graph.node}
print("multiplies whole numbers:", "MatMulInteger" in operations)

# %% [markdown]
# ## 6 · Side by side
#
# ### Predict
#
# Look at your list from the beginning. A pass of the student over one request,
# alone, on one core. What is the order in time: torch, torchao's int8, ONNX
# Runtime, its int8?
#
# The clock belongs to a machine and a moment, so what follows is rendered from
# a result file. All variants took turns in every round. The ratios are taken
# round by round.

# %%
clock = json.loads((RESULTS / "phone_latency.json").read_text())
print(clock["command"], "·", clock["date"])
print(clock["device"], "·", f"{clock['rounds']} rounds", end=" · ")
print(f"torch {clock['torch']}, torchao {clock['torchao']}", end=", ")
print(f"onnxruntime {clock['onnxruntime']}")
WAYS = list(clock["draft"])


def ratio(value):
    return f"{value['mean']:6.1f} [{value['low']:.1f}, {value['high']:.1f}]"


print(f"\n{'one request':31} {'file':>7}   exact  times faster than the first")
for name in ("teacher", "student"):
    for way in WAYS:
        row = clock["rows"][f"{name}, {way}"]
        print(f"{name}, {way:22} {row['file'] / 1e6:4.2f} MB", end="   ")
        print(f"{row['exact']:.3f}", end=" ")
        print(ratio(row["times faster than teacher, torch"]))

# %%
rows = []
for name in ("teacher", "student"):
    for way in WAYS:
        row = clock["rows"][f"{name}, {way}"]
        memory, ms = row["memory"], row["ms"]
        own = memory["peak"] - memory["before"]
        rows.append([
            f"{name}, {way}",
            f"{ms['mean']:.2f} [{ms['low']:.2f}, {ms['high']:.2f}]",
            f"{memory['peak']:.0f} MB",
            f"{own:.0f} MB",
        ])  # fmt: skip
plots.table(["", "ms a pass", "process, peak", "beyond imports"], rows)

# %% [markdown]
# Does time go where the weights are? Then the teacher would take as many times
# longer as it has more weights.

# %%
more = stored_bytes(teacher) / stored_bytes(student)
print(f"the teacher has {more:.1f} times the weights, and takes")
for way in WAYS:
    share = clock["draft"][way]
    print(f"{1 / share['mean']:4.1f} times as long in {way}")
    assert 1 / share["low"] < more

# %% [markdown]
# The teacher also has more layers and a longer prompt to read, and still no
# line reaches the first. What is missing was spent on what both do alike:
# starting an operation, and handing it its inputs. A runtime that reads a
# whole graph does less of that than Python.
#
# ### Fewer bits, less time?

# %%
print("int8 against float32 of the same program, times faster")
for name in ("teacher", "student"):
    for way in WAYS:
        if "int8" in way:
            value = clock["rows"][f"{name}, {way}"]
            value = value["times faster than float32"]
            verdict = "faster" if value["low"] > 1 else "not shown"
            verdict = "slower" if value["high"] < 1 else verdict
            print(f"{name}, {way:21}{ratio(value)}  {verdict}")

# %% [markdown]
# Whole numbers have to be paid for: the inputs are rounded, the outputs are
# scaled, and each is an operation more. On large products that is little. On
# products as small as these it may cost more than it saves. torchao ran as it
# is, without `torch.compile`, so Python started each of those operations.
#
# So "int8" alone is no answer to "how fast?". Name the program, the processor
# and the size of the request, and measure.
#
# What is not in the table: a cache. Every pass reads its whole prefix, in all
# variants alike. With a cache a request would need one long pass and then many
# short ones, and the start of an operation would weigh even more.

# %% [markdown]
# ## 7 · The student as a draft
#
# The student may also help the teacher that it came from. A large model that
# writes alone needs one pass a token. It can *read* many tokens in one pass.
# So let the student write a few tokens ahead, and the teacher read them all at
# once: **speculative decoding** (Leviathan et al. 2022, arXiv:2211.17192).
#
# What it must not do is change what the teacher says.
#
# ### By hand
#
# Teacher $p$, student $q$, three words. The student has drawn $x$ from $q$.
# **Keep it with probability $\min(1, p(x)/q(x))$. If it is not kept, draw
# from $\max(0, p - q)$, made to sum to one.**

# %%
p = [0.7, 0.2, 0.1]
q = [0.5, 0.5, 0.0]
keep = [min(1.0, a / b) if b else 1.0 for a, b in zip(p, q, strict=True)]
kept = [b * a for a, b in zip(keep, q, strict=True)]
missing = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
print("kept by word     ", [round(v, 2) for v in kept], end=" ")
print("together", round(sum(kept), 2))
print("rejected         ", round(1 - sum(kept), 2))
print("missing from p   ", [round(v, 2) for v in missing])
out = [a + b for a, b in zip(kept, missing, strict=True)]
print("what comes out   ", [round(v, 2) for v in out])
assert all(abs(a - b) < 1e-12 for a, b in zip(out, p, strict=True))

# %% [markdown]
# ### The two lines of proof
#
# **What is kept.** The student says $x$ with probability $q(x)$, and it is
# kept with $\min(1, p(x) / q(x))$. Together $\min(p(x), q(x))$, so
#
# $$\Pr(\text{kept}) = \sum_x \min\big(p(x), q(x)\big)
#   = 1 - \tfrac12 \sum_x |p(x) - q(x)| = 1 - \mathrm{TVD}(p, q),$$
#
# because $\min(a, b) = \frac{a + b}{2} - \frac{|a - b|}{2}$.
#
# **What comes out.** Rejections happen with probability $\mathrm{TVD}$. That
# is also $\sum_x \max(0, p - q)$, the divisor of the second draw. So the
# second draw adds $\max(0, p(x) - q(x))$, and
# $\min(p, q) + \max(0, p - q) = p$.

# %%
P, Q = torch.tensor([p, q], dtype=torch.float64)
print("1 - TVD by the sum  ", round((1 - 0.5 * (P - Q).abs().sum()).item(), 4))
print("overlap, kdlib      ", round(overlap(P, Q).item(), 4))
logits = [(v + 1e-12).log() for v in (Q, P)]
print("1 - tvd, divergences", round(1 - tvd(*logits).item(), 4))
assert abs(overlap(P, Q) - sum(kept)) < 1e-12
torch.testing.assert_close(
    torch.minimum(P, Q) + (1 - overlap(P, Q)) * residual(P, Q), P
)

# %% [markdown]
# So the total variation of chapter 5 has a price tag: it is the share of
# drafted tokens that is thrown away. And no rule can do better. A rule that
# kept more of $x$ than $\min(p(x), q(x))$ would say $x$ more often than the
# teacher, or more often than the student drew it.
#
# The picture to remember:

# %%
words = ["mai", "Mai", "mars", "avril", "juin"]
p_bar = torch.tensor([0.45, 0.25, 0.15, 0.10, 0.05])
q_bar = torch.tensor([0.25, 0.20, 0.10, 0.30, 0.15])
both = torch.minimum(p_bar, q_bar)
figure, axes = plt.subplots(figsize=(7, 3.4))
places = torch.arange(5)
axes.bar(places, both, color=plots.GREY,
         label=f"in both: drafted and kept ({both.sum():.0%})")  # fmt: skip
axes.bar(places, q_bar - both, bottom=both, color=plots.ORANGE, hatch="//",
         edgecolor="white",
         label=f"too much in the draft: rejected ({(q_bar - both).sum():.0%})",
         )  # fmt: skip
axes.bar(places, p_bar - both, bottom=both, color=plots.BLUE,
         label=f"missing: the teacher draws it ({(p_bar - both).sum():.0%})",
         )  # fmt: skip
axes.set_xticks(places, words)
axes.set_ylim(0, 0.62)
axes.set_ylabel("probability")
axes.set_xlabel("next token")
axes.set_title("What a draft saves is the overlap, 1 − TVD", loc="left")
axes.legend(frameon=False, fontsize=9, loc="upper right")
plt.show()

# %% [markdown]
# Grey and orange are what the student draws. Grey and blue are what comes out:
# exactly the teacher. Orange and blue are equally large, and each is the TVD.
#
# ### More tokens, by enumeration
#
# With several drafted tokens the first rejection ends the round. The rest is
# thrown away, though it may have been good. If all are kept, the teacher's
# pass has one more distribution to give, free of charge. kdlib's lines:

# %%
print(inspect.getsource(verify).split('"""')[2])

# %% [markdown]
# Two small models whose every answer can be listed: three tokens, three words.
# The next cell walks through *all* drafts and *all* decisions, each with its
# probability. Nothing is sampled.

# %%
V, LENGTH, AHEAD = 3, 3, 2
large = ExactLM.random(vocab=V, length=LENGTH, scale=1.5, seed=1)
small = ExactLM.random(vocab=V, length=LENGTH, scale=1.5, seed=2)


def after(model, prefix):
    place = 0
    for token in prefix:
        place = place * V + token
    return model.tables[len(prefix)][0, place].softmax(-1)


def walk(prefix, chance, out, count):
    """All that may follow `prefix`, which was reached with `chance`."""
    if len(prefix) == LENGTH:
        out[prefix] = out.get(prefix, 0.0) + chance
        return
    count["passes"] += chance
    k = min(AHEAD, LENGTH - len(prefix))
    for drafted in itertools.product(range(V), repeat=k):
        judge(prefix, drafted, chance, out, count)


# %%
def judge(prefix, drafted, chance, out, count):
    """One draft: each place at which it may end."""
    so_far = prefix
    for token in drafted:  # chance: of this draft, and of all being kept
        q = after(small, so_far)
        chance = chance * q[token]
        so_far = so_far + (token,)
    so_far = prefix
    for token in drafted:
        p, q = after(large, so_far), after(small, so_far)
        a = (p[token] / q[token]).clamp(max=1)
        count["kept"] += chance * a
        count["overlap"] += chance * overlap(p, q)
        for word in range(V):
            new = chance * (1 - a) * residual(p, q)[word]
            if new > 0:
                walk(so_far + (word,), new, out, count)
        chance, so_far = chance * a, so_far + (token,)
    if len(so_far) == LENGTH:
        walk(so_far, chance, out, count)
        return
    for word in range(V):  # all kept: one token more
        p = after(large, so_far)
        walk(so_far + (word,), chance * p[word], out, count)


# %%
out, count = {}, {"passes": 0.0, "kept": 0.0, "overlap": 0.0}
walk((), torch.tensor(1.0, dtype=torch.float64), out, count)
answers = [tuple(row) for row in sequences(V, LENGTH).tolist()]
found = torch.stack([out[answer] for answer in answers])
wanted = large.log_probs()[0].exp()
print(
    f"{len(answers)} answers, largest difference from the teacher's", end=" "
)
print(f"below 1e-12: {(found - wanted).abs().max().item() < 1e-12}")
print(f"passes of the teacher {count['passes']:.3f} for {LENGTH} tokens")
print(f"tokens kept           {count['kept']:.4f}")
print(f"sum of 1 - TVD        {count['overlap']:.4f}")
torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
assert abs(count["kept"] - count["overlap"]) < 1e-12

# %% [markdown]
# Two identities to the last digit. The answers are the teacher's, although
# another model wrote most of their tokens. And the expected number of kept
# tokens is the sum of $1 - \mathrm{TVD}$ over the places that are judged.
#
# ### On the real pair
#
# The teacher reads the instruction and the input, the student the input alone.
# Both are sampled at temperature 1. Four tokens are drafted at a time.
#
# Predict: the student's answers are right nine times in ten. How many of its
# tokens does the teacher keep?

# %%
total = {"judged": 0, "kept": 0, "expected": 0.0, "passes": 0, "tokens": 0}
asked = data.test[::40]
for seed, pair in enumerate(asked):
    said = speculate(
        teacher,
        student,
        pair.teacher_prompt_ids,
        pair.student_prompt_ids,
        ahead=4,
        end=tokenizer.eos_token_id,
        seed=seed,
    )
    for name in ("judged", "kept", "expected", "passes"):
        total[name] += getattr(said, name)
    total["tokens"] += len(said.ids)
share = total["kept"] / total["judged"]
promised = total["expected"] / total["judged"]
print(f"{len(asked)} requests, {total['tokens']} tokens")
print(
    f"kept {share:.2f} of the judged tokens, 1 - TVD promised {promised:.2f}"
)
print(f"{total['tokens'] / total['passes']:.1f} tokens a pass of the teacher")
noise = (total["judged"] - total["expected"]) ** 0.5
assert abs(total["kept"] - total["expected"]) < 4 * noise + 1

# %% [markdown]
# The last line is a test with a reason: each decision is a coin with a known
# chance, and the variance of their sum is at most the expected number of
# rejections.
#
# ### Which student is the best draft?
#
# One that is near the teacher in total variation. Distillation makes it so,
# labels do not ask for it. Would training by the TVD itself be better still?
# For each seed, $1 - \mathrm{TVD}$ over the tokens of the test answers:

# %%
for row in (
    phone.UNTRAINED,
    phone.HARD_TOKENS,
    phone.HARD_FLOPS,
    phone.DISTILLED,
    "distilled by TVD",
    "rounded, 4 bits",
    "rounded, 3 bits",
    "distilled into 3 bits",
):
    print(f"{row:26} kept {exact_match(row, 'accepted')}")
print()
print(claims.find("distilled-drafts-are-kept"), end="\n\n")
print(claims.find("drafts-by-tvd"))

# %% [markdown]
# The measure itself need not be the best loss to train by. Where a student
# gives the teacher's words no probability, the gradient of the total variation
# is nearly zero (chapter 5), and that is where every student begins. Hold this
# against the last claim.
#
# Published at scale: DistillSpec (Zhou et al. 2023, arXiv:2310.08461) reports
# speedups of 10 to 45 % over standard speculative decoding from distilling the
# draft. That is time; here it is acceptance.
#
# ### What it saves
#
# With the same overlap $a$ at every place, a pass of the teacher gives
#
# $$1 + a + a^2 + \dots + a^k = \frac{1 - a^{k+1}}{1 - a}$$
#
# tokens for $k$ drafted ones. A round takes $k$ passes of the student and one
# of the teacher. If a student's pass takes the share $r$ of a teacher's,
#
# $$\text{times faster} = \frac{1 - a^{k+1}}{(1 - a)(k\,r + 1)} .$$
#
# (This takes the teacher's pass over $k + 1$ tokens to be as long as over
# one.) Check the sum, then put the measured numbers in.

# %%
a = exact_match(phone.DISTILLED, "accepted").mean
for k in (1, 4):
    summed = sum(a**i for i in range(k + 1))
    assert abs(summed - (1 - a ** (k + 1)) / (1 - a)) < 1e-9
print(f"kept {a:.3f} at every place")
print(f"{'':22} r      times faster with k = 1, 2, 4, 8 drafted tokens")
for way in ("torch", "ONNX Runtime"):
    r = clock["draft"][way]["mean"]
    gains = [
        (1 - a ** (k + 1)) / ((1 - a) * (k * r + 1)) for k in (1, 2, 4, 8)
    ]
    print(f"{way:20} {r:.2f}  ", *[f"{gain:6.2f}" for gain in gains])

# %% [markdown]
# A number below 1 is a loss. The drafts are the same in both lines, and so are
# the kept tokens. Only $r$ differs, and with it how far ahead it pays to
# draft. A draft must be cheap in *time*. Its number of parameters is not in
# the formula.
#
# ## 8 · The decision
#
# A product team has one table and has to take one line of it. Quality and
# file are measured; where no kernel for so few bits was at hand, the time is
# left open.

# %%
lines = []
for what, key in (
    ("teacher as it is", "teacher, torch"),
    ("teacher, ONNX Runtime", "teacher, ONNX Runtime"),
    ("teacher, ONNX Runtime int8", "teacher, ONNX Runtime int8"),
    ("student, torch", "student, torch"),
    ("student, ONNX Runtime", "student, ONNX Runtime"),
    ("student, ONNX Runtime int8", "student, ONNX Runtime int8"),
):
    row = clock["rows"][key]
    faster = row["times faster than teacher, torch"]["mean"]
    lines.append((what, row["file"] / 1e6, row["exact"], f"{faster:.0f} x"))
for bits in (4, 3):
    share = exact_match(f"distilled into {bits} bits").mean
    size = facts["bytes"]["student"][f"{bits} bits"] / 1e6
    lines.append((f"student, distilled into {bits} bits", size, share, "open"))
print(f"{'':32} {'file':>7}  exact  faster")
for what, size, share, faster in lines:
    print(f"{what:32} {size:4.2f} MB  {share:.3f} {faster:>7}")

# %% [markdown]
# | what counts | take | not |
# |---|---|---|
# | the teacher's answers | the teacher, 8 bits, in a runtime | a student |
# | the same, sooner | the teacher with drafts, if cheap | a slow draft |
# | time on the phone | the student in a runtime | fewer bits |
# | the file | the student, 8 bits; fewer if section 4 shows it | a guess |
# | next week, with nobody to train | the teacher, 8 bits | distillation |
# | several tasks in one app | one teacher for all | a student for each |
#
# The last two lines are no defeat. They are what chapter 1 said: distillation
# is worth its trouble where requests are many and the task is one.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch13.ipynb`](../exercises/ch13.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** Your student in 3 bits is bad. You distil on with quantised weights in
# the forward pass, and it is good. A colleague says: "You trained it longer,
# no wonder." What do you show?
#
# <details><summary>Answer</summary>
#
# The row that was trained as much longer in float32 and rounded afterwards.
# Only the grid in the forward pass differs between the two. And the row on
# labels, to show that the teacher is needed for it.
#
# </details>

# %% [markdown]
# **2.** The exported graph gives the right logits for your example. What do
# you try before it ships?
#
# <details><summary>Answer</summary>
#
# Other shapes than the example's, batch 1 and length 1 among them, with
# padding in the mask. The whole test split, every token, with a bound on the
# difference. The size of the file against the bytes that the weights need: a
# tied matrix may be in it twice.
#
# </details>

# %% [markdown]
# **3.** Somebody drafts with a student that was trained on another task. Will
# the answers be wrong?
#
# <details><summary>Answer</summary>
#
# No. Their distribution is the teacher's for any draft. Its total variation
# from the teacher is large, so nearly every token is rejected, and each round
# gives little more than one token for $k + 1$ passes. It is slow.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **A softmax for a sum.** What is missing, $\max(0, p - q)$, was put through
#   a softmax, and words that were covered came out again
#   ([transformers#28508](https://github.com/huggingface/transformers/pull/28508)).
# - **The draft's distribution is lost.** Then a token is kept with $p(x)$
#   alone: right answers, fewer tokens kept
#   ([sglang#10308](https://github.com/sgl-project/sglang/issues/10308)).
#   To keep it only where an independent draw agrees has the chance $\sum p\,q$
#   ([mlx-lm#1709](https://github.com/ml-explore/mlx-lm/pull/1709)).
# - **Drawn from one distribution, judged by another.** bfloat16 for the draw
#   and float32 for the ratio break the proof
#   ([DeepSpec#31](https://github.com/deepseek-ai/DeepSpec/issues/31)). So do
#   logits that are cut to the likeliest words for the draw alone
#   ([transformers#47932](https://github.com/huggingface/transformers/issues/47932)).
# - **A tied matrix stored twice** by an exporter
#   ([optimum#1326](https://github.com/huggingface/optimum/pull/1326),
#   [transformers#12985](https://github.com/huggingface/transformers/issues/12985)).
# - **Shapes of the example in the graph**
#   ([pytorch#148886](https://github.com/pytorch/pytorch/issues/148886)).

# %% [markdown]
# ## Summary
#
# - Rounding to 8 bits is free here, and cheap to try. Below that, a small
#   student loses more than a large teacher.
# - Distilling with the quantised weights in the forward pass trains the very
#   student that ships. Its fair rival was trained as long, off the grid.
# - An export is the same function if it says so on the whole test split, at
#   shapes that it has not seen.
# - In a small model, much of the time goes into starting operations: change
#   the program before you change the bits.
# - A draft is kept with probability $1 - \mathrm{TVD}$ and never changes the
#   answer. It pays where its pass is cheap in time.
#
# Next, chapter 14: a task of your own.
