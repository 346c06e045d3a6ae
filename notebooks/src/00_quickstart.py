# %% [markdown]
# # 0 · The first distillation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/00_quickstart.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 2 minutes |
# | GPU | not needed (`KD_PROFILE=gpu` trains four times as long) |
# | memory | 1.5 GiB |
# | network, account, key | none |

# %% [markdown]
# ## What you will be able to do
#
# 1. Say what a teacher knows that a list of labels does not.
# 2. Write the objective of distillation with its two different inputs.
# 3. Compute a forward KL by hand, and check it against the library.
# 4. Distil a real teacher into a student nearly nine times smaller.
# 5. Judge the result against baselines that had the same budget.
#
# You need Python, and a first idea of what a language model and a gradient
# are. The chapters that follow derive everything that is only used here.

# %% [markdown]
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
import json
import tempfile

import matplotlib.pyplot as plt
import torch
from kdlib import localize, models, phone, plots
from kdlib.beside import Beside
from kdlib.divergences import forward_kl
from kdlib.evaluate import evaluate, parameter_count, teacher_reference
from kdlib.ledger import Interval
from kdlib.teachers import LiveTeacher

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
# Models this small are fastest with one thread.
torch.set_num_threads(1)
GPU = PROFILE == "gpu"
DEVICE, SHARE = ("cuda", 4.0) if GPU else ("cpu", 1.0)

# %% [markdown]
# ## The problem
#
# An app speaks its user's language. A date, a price or a list of countries is
# stored in English; a French user should read it in French.

# %%
test_set = phone.labels("test")
for number in (0, 4, 9, 12, 20):
    example = test_set[number]
    print(f"{example.user_input:40} {example.response}")

# %% [markdown]
# The strings come from the Unicode CLDR, the data behind the dates and
# prices that your own phone shows. Nothing here is invented.
#
# A model that can do this for six languages and two formats exists. It is
# called **the teacher**. It must be told what is wanted, in plain words:

# %%
print(example.context)

# %% [markdown]
# That instruction is the **context** $c$. The English string is the **user
# input** $z$, and the answer is $y$. The teacher's distribution is
#
# $$\Pr^t(y \mid c, z).$$
#
# On this phone the instruction is always the same. Reading it again for every
# price is a waste, and the teacher is too big anyway. So we want **a student**
# that is small and reads $z$ alone. Its input is *simplified*:
#
# $$x' = (c', z), \qquad c' = \text{nothing}.$$

# %% [markdown]
# ## The data and the teacher

# %%
data = phone.Data()
teacher = data.teacher
student = models.build(data.tokenizer, **phone.STUDENT, seed=0)
print(f"teacher {parameter_count(teacher):>9,} parameters")
print(f"student {parameter_count(student):>9,} parameters")
print(len(data.labelled), "labelled examples")
print(len(data.unlabelled), "inputs without a label")
print(len(data.test), "test inputs")

# %% [markdown]
# This is a common situation. A few hundred examples were paid for; thousands
# of inputs are simply there, because people used the app.

# %% [markdown]
# ### Predict
#
# The teacher gets the 1,000 test inputs twice: once after the instruction,
# once alone. How often does it answer exactly right? Write two numbers down
# before you run the next cell.

# %%
test = data.batches(data.test)
reference = teacher_reference(LiveTeacher(teacher), test)
told = evaluate(teacher, test, reference, side="teacher")
not_told = evaluate(teacher, test, reference, side="student")
print(f"with the instruction    {told.exact_match:.2f}")
print(f"without it              {not_told.exact_match:.2f}")

# %% [markdown]
# Without the instruction the teacher cannot know which of twelve tasks is
# meant, and guesses. So the student has two things to learn from it:
#
# - **skill**: how French dates and prices are written, and
# - **context**: that here it is always French, always the long form.

# %% [markdown]
# ## Two inputs, one answer
#
# The two models read different prompts but predict the same answer tokens.
# Position by position these tokens have to be lined up, and a silent slip
# here is the most common bug of the field. Look at one example:

# %%
encoded = data.test[4]
print("teacher reads ", data.tokenizer.decode(encoded.teacher_prompt_ids))
print("student reads ", data.tokenizer.decode(encoded.student_prompt_ids))
print("both predict  ", data.tokenizer.decode(encoded.response_ids))

# %% [markdown]
# `kdlib.pairs` builds one batch with two views. A view knows which positions
# predict an answer token; `select` picks them out. The claim is checked on
# real tokens, not on lengths:

# %%
batch = data.collator.collate(data.test[:8])
teacher_view, student_view = batch.teacher, batch.student
print("teacher's view", tuple(teacher_view.input_ids.shape))
print("student's view", tuple(student_view.input_ids.shape))

answers = [torch.tensor(p.response_ids) for p in data.test[:8]]
for view in (teacher_view, student_view):
    predicted = view.input_ids[:, 1:][view.completion_mask[:, 1:]]
    assert torch.equal(predicted, torch.cat(answers))
print("same answer tokens on both sides:", len(batch.response_ids))

# %% [markdown]
# ## What a teacher tells
#
# A label is one string. A teacher gives a whole distribution for every token.
# Here is one input that nobody labelled:

# %%
NUMBER = 377
unlabelled = localize.load_split("unlabelled")
print(unlabelled[NUMBER].english)
print(data.tokenizer.decode(data.cache.response_ids(NUMBER)[:-1]))

# %% [markdown]
# How sure was the teacher of each token? Its targets for all 6,000 inputs
# are in a file: the eight likeliest tokens of every position.

# %%
one = data.collator.collate([data.unlabelled[NUMBER]])
targets = data.cache.targets(one)
likeliest = targets.log_probs.exp()
for token, row in zip(one.response_ids, likeliest, strict=True):
    print(f"{data.tokenizer.decode([token])!r:12} {row[0]:.2f}")

# %% [markdown]
# It is sure of the number and of the currency, and unsure at one place:
# *dollar* or *dollars*?

# %%
unsure = int(likeliest[:, 1].argmax())
words = [data.tokenizer.decode([i]) for i in targets.indices[unsure][:3]]
figure, axes = plt.subplots(figsize=(6, 2.2))
axes.barh([repr(w) for w in words], likeliest[unsure][:3], color=plots.BLUE)
axes.invert_yaxis()
axes.set_xlabel("the teacher's probability for the next token")
axes.set_title("0.36 Australian dollars → 0,36 …", loc="left")
plt.show()

# %% [markdown]
# Which one is right? The corpus knows, though the app does not:

# %%
print(unlabelled[NUMBER].rendering(phone.LOCALE, phone.FORM))

# %% [markdown]
# French counts 0.36 as singular. The teacher's answer is wrong here, yet its
# distribution holds the right word. A label made from its answer would be
# plainly wrong; the distribution says "one of these two". This is what
# Hinton called **dark knowledge** in a talk of that title
# ([abstract](https://www.ttic.edu/dl/dark14.pdf), with Vinyals and Dean).

# %% [markdown]
# ## The loss
#
# The student should give every next token the teacher's probability. The
# distance is the **forward Kullback-Leibler divergence**,
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_v p_v \log \frac{p_v}{q_v},$$
#
# with $p$ the teacher's and $q$ the student's distribution over the
# vocabulary. Three tokens are enough to see it. By hand:

# %%
from math import log

p = [0.5, 0.4, 0.1]  # the teacher
q = [0.3, 0.3, 0.4]  # the student
terms = [a * log(a / b) for a, b in zip(p, q, strict=True)]
print([round(term, 4) for term in terms])
print(round(sum(terms), 4))

# %% [markdown]
# The same, as one line over vectors, and from the library. The library takes
# logits, because that is what models put out. It takes the student first.

# %%
p, q = torch.tensor(p), torch.tensor(q)
vectorised = (p * (p / q).log()).sum()
library = forward_kl(q.log()[None], p.log()[None])[0]
print(round(vectorised.item(), 4), round(library.item(), 4))
torch.testing.assert_close(vectorised, library)

# %% [markdown]
# ### Why it teaches
#
# Write the student's distribution as $q = \mathrm{softmax}(s)$. Then
# $\log q_v = s_v - \log \sum_u e^{s_u}$, and
#
# $$\frac{\partial}{\partial s_v} \mathrm{KL}(p \,\|\, q)
#   = -p_v + q_v \sum_u p_u = q_v - p_v .$$
#
# Every token's logit is pushed up where the student gives too little, and
# down where it gives too much. Check it:

# %%
logits = q.log().clone().requires_grad_(True)
forward_kl(logits[None], p.log()[None]).sum().backward()
print("gradient ", [round(g, 3) for g in logits.grad.tolist()])
print("q - p    ", [round(g, 3) for g in (q - p).tolist()])
torch.testing.assert_close(logits.grad, q - p)

# %% [markdown]
# A label is the special case where $p$ is 1 at one token and 0 elsewhere.
# Then the gradient pushes up one token and pushes down all others alike. With
# the teacher's $p$ the push has as many shades as the vocabulary has tokens.

# %% [markdown]
# ## The objective
#
# Now the one formula of this course. Over all inputs $x' = (c', z)$ of the
# data $D'$,
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big).$$
#
# - $\Pr^t(\cdot \mid c, z)$: the targets in the file.
# - $\Pr^s_\theta(\cdot \mid c', z)$: the student, which reads $z$ alone.
# - Loss: the forward KL, averaged over the answer's tokens.
#
# In code it is one object. `hard_weight=0` means: no labels.

# %%
from kdlib.objective import Objective

objective = Objective("forward_kl", hard_weight=0.0)
logits = student_view.select(
    student(student_view.input_ids, student_view.attention_mask).logits
)
loss = objective(logits, reference[0][: len(logits)], batch.response_ids)
print(f"loss {loss.total.item():.2f} nats a token, {loss.n_tokens} tokens")

# %% [markdown]
# It is the average of the forward KL over the answer's tokens, no more:

# %%
by_hand = forward_kl(logits, reference[0][: len(logits)]).mean()
torch.testing.assert_close(loss.total, by_hand)
print("equal")

# %% [markdown]
# ## A fair race
#
# A student that was distilled is only worth something beside students that
# were not. Each of the rivals gets the 300 labels. One may read as many
# tokens as the distilled student. The other gets as many floating-point
# operations (FLOPs), and the teacher's own work counts on our side.

# %%
plan = phone.budgets(data, SHARE)
for name, budget in plan.items():
    print(
        f"{name:26} {budget.steps:5} steps  "
        f"{budget.tokens / 1e6:.1f} M tokens  {budget.flops / 1e12:.1f} TFLOP"
    )

# %% [markdown]
# ### Predict
#
# Which row wins? By how much? And why does the third row get more steps than
# the other two?
#
# The longest row starts now, in a second process with a core of its own.

# %%
SEED = 0
scratch = tempfile.TemporaryDirectory(prefix="kdlib-")
folder = Path(scratch.name)
flops_row = phone.folder_of(phone.HARD_FLOPS, folder)
longest = plan[phone.HARD_FLOPS]
beside = Beside(phone.HARD_FLOPS, longest, SEED, flops_row)

# %% [markdown]
# ## Training
#
# `phone.fit` builds a student and hands it to `kdlib.train`. The loop is
# short enough to be read aloud. Without its arguments' names:
#
# ```python
# for batch in batches:
#     targets = teacher.targets(batch)          # from the file
#     logits = student_logits(student, batch)   # the student's view
#     loss = objective(logits, targets, batch.response_ids)
#     loss.total.backward()
#     optimizer.step()
# ```
#
# First the distilled student.

# %%
losses = []


def remember(step, loss):
    losses.append(loss)


students = {phone.UNTRAINED: student}
students[phone.DISTILLED] = phone.fit(
    phone.DISTILLED, data, plan[phone.DISTILLED], SEED, remember, DEVICE
)
print(len(losses), "steps")
print("the loss fell below a tenth:", losses[-1] < 0.1 * losses[0])

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(losses, color=plots.ORANGE, linewidth=0.8)
axes.set_yscale("log")
axes.set_xlabel("step")
axes.set_ylabel("forward KL, nats a token")
axes.set_title("The student approaches the teacher", loc="left")
plt.show()

# %% [markdown]
# Then its rival with equal tokens, on labels alone.

# %%
students[phone.HARD_TOKENS] = phone.fit(
    phone.HARD_TOKENS, data, plan[phone.HARD_TOKENS], SEED, device=DEVICE
)

# %% [markdown]
# And the one in the second process, which should be about done.

# %%
while not beside.done:
    beside.steps(wait=True)
beside.stop()
students[phone.HARD_FLOPS], _ = models.load(flops_row)

# %% [markdown]
# ## The verdict
#
# Exact match is strict: one wrong letter and the answer counts as wrong.
# Agreement is the share of tokens where both models have the same favourite.
# Trained numbers differ a little from machine to machine, so they stand in
# pictures, which the tests of this course do not compare.

# %%
verdict = {phone.TEACHER: told}
for name in phone.ROWS[1:]:
    verdict[name] = evaluate(students[name], test, reference)
rows = [
    {"name": name, "exact_match": found.exact_match}
    for name, found in verdict.items()
]
plots.exact_match_bars(rows)

# %%
plots.table(
    ["", "exact match", "agreement", "KL", "parameters"],
    [
        [
            name,
            f"{found.exact_match:.3f}",
            f"{found.agreement:.3f}",
            f"{found.kl:.3f}",
            f"{parameter_count(students.get(name, teacher)):,}",
        ]
        for name, found in verdict.items()
    ],
)

# %%
scores = {row["name"]: row["exact_match"] for row in rows}
distilled = scores[phone.DISTILLED]
for rival in (phone.HARD_TOKENS, phone.HARD_FLOPS):
    won = distilled - scores[rival] > 0.5
    print(f"ahead of {rival!r} by more than half: {won}")

# %% [markdown]
# The hard-label students learned their 300 examples by heart. More steps did
# not help them: there was nothing more to learn from.

# %% [markdown]
# ### What does the student answer?

# %%
from kdlib.sampling import complete

chosen = (0, 4, 9, 12, 20)
prompts = [data.test[n].student_prompt_ids for n in chosen]
best = students[phone.DISTILLED]
answered = complete(best, data.tokenizer, prompts)
plots.table(
    ["input", "student's answer", "wanted"],
    [
        [
            test_set[n].user_input,
            data.tokenizer.decode(ids),
            test_set[n].response,
        ]
        for n, ids in zip(chosen, answered, strict=True)
    ],
)

# %% [markdown]
# ## Is it chance?
#
# One seed proves little. The same race was run over several seeds by
# `notebooks/experiments/quickstart_seeds.py`, with three more rows. What
# follows is rendered from its result file.

# %%
results = Path(kdlib.__file__).parents[1] / "notebooks" / "results"
found = json.loads((results / "quickstart_seeds.json").read_text())
print(found["command"])
print(found["device"], "·", found["date"], "·", len(found["seeds"]), "seeds")
print()
print(f"{'exact match':28} mean [95 % interval]")
print(f"{phone.TEACHER:28} {found['teacher']['with context']:.3f}")
for name, value in found["exact_match"].items():
    print(f"{name:28} {Interval(**value)}")

# %% [markdown]
# A difference counts only if its interval, taken over paired seeds, stays
# away from zero.

# %%
print("the distilled student minus ...")
for name, value in found["distilled_minus"].items():
    difference = Interval(**value)
    print(f"  {name:26} {difference.claim()}")

# %% [markdown]
# ### What the teacher knew
#
# Be plain about it. The teacher was trained on 20,000 labelled values in six
# languages. The app's owner had 300. Distillation carried the difference
# over, through 6,000 inputs without labels. Nothing came from nowhere.
#
# ### Where distillation does not win
#
# Look at the last two rows. If somebody had labelled the same 6,000 inputs,
# plain training would have done as well with no teacher. And the teacher's
# answers alone, without its distributions, did as well too: each input has
# one right answer here, so most of the distribution is that answer. What won
# was the 6,000 inputs, not the dark knowledge. Where inputs have several right
# answers, or labels are noisy, the distribution matters more.

# %% [markdown]
# ## The student leaves the house
#
# A saved student is a Hugging Face folder. Any program that knows
# transformers can load it; kdlib is not needed any more.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

home = models.save(best, data.tokenizer, folder / "student")
loaded = AutoModelForCausalLM.from_pretrained(home)
tokenizer = AutoTokenizer.from_pretrained(home)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "12.5%"}],
    add_generation_prompt=True,
    return_tensors="pt",
)
output = loaded.generate(**prompt, max_new_tokens=16, do_sample=False)
print(sorted(path.name for path in home.iterdir()))
print("same model:", loaded.num_parameters() == parameter_count(best))

# %% [markdown]
# ## Quiz
#
# **1.** The student never sees the instruction. How can it know that French
# is wanted?
#
# <details><summary>Answer</summary>
#
# Its targets were made by a teacher that had read the instruction. All of them
# are French, so its weights say "French". The context moved from the prompt
# into the parameters.
#
# </details>

# %% [markdown]
# **2.** Why must the equal-FLOPs row count the teacher's forward passes?
#
# <details><summary>Answer</summary>
#
# They are part of what distillation costs. Without them the rival would get
# less computation than we spent, and the race would be unfair.
#
# </details>

# %% [markdown]
# **3.** The gradient is $q_v - p_v$. Where is it zero?
#
# <details><summary>Answer</summary>
#
# Where the student equals the teacher, and there alone. It does not matter
# whether the teacher is right.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **Views that slip by one token.** With two different prompts a fixed
#   offset is wrong; `pairs` proves the alignment by token identity and refuses
#   what does not match.
# - **A mean over the vocabulary.** torch's `kl_div` with
#   `reduction="mean"` also divides by the number of classes; its
#   documentation says so. The loss is then a thousand times too small here.
# - **A teacher in training mode.** Dropout makes its targets noise.
#   `LiveTeacher` puts the model in eval mode.
# - **Too few baselines.** A distilled student next to an untrained one looks
#   wonderful. Show the rival with the same budget.

# %% [markdown]
# ## Summary
#
# - The teacher reads $(c, z)$, the student $x' = (c', z)$; both predict the
#   same answer.
# - The loss is a divergence between their next-token distributions. Forward
#   KL has the gradient $q - p$.
# - Distillation carries over what the teacher knows and the labels do not.
#   Where labels are clean and plentiful there is nothing to carry.
# - A claim needs its rivals, several seeds and an interval.
#
# On a command line the whole chapter is `make quickstart`.
