# %% [markdown]
# # 14 · Capstone
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/14_capstone.ipynb)
#
# | what it costs | |
# |---|---|
# | two CPU cores | 2 minutes |
# | GPU | not needed (`KD_PROFILE=gpu` takes Qwen3 from the hub instead) |
# | memory | 1.5 GiB |
# | network, account, key | none (the hub, with `KD_PROFILE=gpu`) |

# %% [markdown]
# ## What you will be able to do
#
# 1. Turn a wish into a question that a result file can answer.
# 2. Write a prediction that can turn out wrong, before the run.
# 3. Run five rows with paired seeds and one budget, on a task of your own.
# 4. Say what the intervals show, and what they do not.
# 5. Write the page that a decision can be taken from.
# 6. Enter a leaderboard that checks what you claim.
#
# This notebook is a template. It runs from top to bottom as it is, with a
# small task. Cells that begin with `# YOURS` are for you to change.

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
import copy
import inspect
import json
import re
import tempfile
import textwrap

import matplotlib.pyplot as plt
import torch
from kdlib import capstone, claims, class_leaderboard, localize, models, plots
from kdlib.doctor import examine_batch, examine_run, report
from kdlib.errors import KdlibError
from kdlib.evaluate import fidelity_report, parameter_count
from kdlib.ledger import Interval, mean_interval, provenance, t95, write_json
from kdlib.pairs import PairCollator, PairedExample
from kdlib.phone import DISTILLED, HARD_FLOPS, HARD_TOKENS
from kdlib.sampling import complete
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher

models.quiet_transformers()
plt.rcParams.update(plots.STYLE)
plt.switch_backend(plt.get_backend())  # now, for pictures made without plt
torch.set_num_threads(1)

# %% [markdown]
# ## What you hand in
#
# | | written | where |
# |---|---|---|
# | a question and predictions | **before** the run | section 1 |
# | five rows, paired seeds, a result file | by the run | sections 2 to 5 |
# | the doctor's report, a look at the errors | after it | section 6 |
# | one page: the memo | at the end | section 7 |
# | a line on the class's board | if you like | section 10 |
#
# Section 8 is a study that was handed in, run in full. Section 9 is how it
# is graded. Read both before you begin your own.

# %% [markdown]
# ## 1 · The question
#
# "Does distillation work?" has no answer. A question names the task, the
# rival, the measure and the budget, and two people who read it would run the
# same experiment.
#
# The task of this template: a phone sold in Poland shows dates, prices and
# units in a long or a short form. The shipped teacher reads an instruction.
# The student shall read one word, "long" or "short".
#
# A prediction is a number with a direction. "It will improve" cannot turn out
# wrong by enough to teach you anything.

# %%
# YOURS
QUESTION = (
    "A Polish phone, two forms, one word of context, 100 labelled values. "
    "At equal FLOPs, does a student that learns from the teacher answer more "
    "test inputs exactly than one that learns from the labels?"
)
PREDICTIONS = (
    "Distilled minus hard labels at equal FLOPs, exact match: above 0.05.",
    "Recovery of the context: above 0.3.",
)
for text in (QUESTION, *PREDICTIONS):
    print(textwrap.fill(text, 76, subsequent_indent="    "))

# %% [markdown]
# ### Predict
#
# Write your own numbers beside these. Which kind of input will be hardest?
# They are in the file before any student is trained, and nobody may change
# them afterwards: that would be the commonest way to be always right.

# %% [markdown]
# ## 2 · The models
#
# Offline, the teacher is the shipped one, and the student starts as its first
# three layers of four. With `KD_PROFILE=gpu` both come from the hub: Qwen3 by
# default. `KD_TEACHER` and `KD_STUDENT` name others, by hub id or folder, say
# `HuggingFaceTB/SmolLM2-1.7B-Instruct` and
# `HuggingFaceTB/SmolLM2-135M-Instruct`. They must have the same tokenizer.

# %%
# YOURS
if PROFILE == "gpu":
    TEACHER = os.environ.get("KD_TEACHER", "Qwen/Qwen3-1.7B")
    STUDENT = os.environ.get("KD_STUDENT", "Qwen/Qwen3-0.6B")
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    SIZES = {"train": 150, "unlabelled": 1000, "test": 200}
    SEEDS, LENGTH, K = 5, 512, 64
    CONFIG = TrainConfig(steps=200, batch_size=16, learning_rate=1e-5)
else:
    TEACHER, STUDENT, DEVICE = "teacher", None, "cpu"
    SIZES = {"train": 100, "unlabelled": 300, "test": 60}
    SEEDS, LENGTH, K = 2, 128, 8
    CONFIG = TrainConfig(steps=60, batch_size=16, learning_rate=1e-3)


# %%
def loaded(name):
    """A model and its tokenizer; a model that thinks aloud is told not to."""
    model, tokenizer = models.load(name)
    if "enable_thinking" in (tokenizer.chat_template or ""):
        off = "{% set enable_thinking = false %}"
        tokenizer.chat_template = off + tokenizer.chat_template
    return model.to(DEVICE), tokenizer


teacher, teacher_tokenizer = loaded(TEACHER)
start, tokenizer = loaded(STUDENT or TEACHER)
if STUDENT is None:
    start = models.first_layers(start, 3)
collator = PairCollator(
    tokenizer,
    teacher_tokenizer=teacher_tokenizer,
    teacher_max_length=LENGTH,
    student_max_length=LENGTH,
)
print(f"teacher {parameter_count(teacher):,} parameters")
print(f"student {parameter_count(start):,} parameters")

# %% [markdown]
# A collator refuses two tokenizers that differ: the same id would mean two
# things, and no loss could be computed (chapter 3).
#
# A seed fixes the order of the examples here, not the first weights, because
# all students start from the same ones. A student with random weights would
# be `models.build(tokenizer, ..., seed=seed)`, and the seed would fix both.

# %% [markdown]
# ## 3 · The data
#
# A `PairedExample` has a context $c$ for the teacher, a simplified context
# $c'$ for the student, the user input $z$ and a response. Your own data may
# come from a JSONL file: `kdlib.examples.read_examples(path)`.
#
# A model from the hub does not know this corpus's instructions, so it reads
# six worked examples instead.

# %%
# YOURS
LOCALE = "pl"


def example(datum, form):
    if PROFILE == "gpu":
        shown = localize.load_split("validation")[::97][:6]
        context = localize.worked_examples(shown, LOCALE, form)
    else:
        context = localize.instruction(LOCALE, form)
    answer = datum.rendering(LOCALE, form)
    return PairedExample(datum.english, answer, context, form)


def part(split):
    """SIZES[split] values, evenly spread over the split, in both forms."""
    data = localize.load_split(split)
    data = data[:: len(data) // SIZES[split]][: SIZES[split]]
    return [example(d, form) for d in data for form in localize.FORMATS]


# %%
data = {split: part(split) for split in SIZES}
for one in data["test"][:6]:
    print(f"c  {one.context!r}")
    print(f"c' {one.simplified_context!r}, z {one.user_input!r}")
    print(f"y  {one.response!r}")

# %% [markdown]
# ### Nothing of the test set may be read
#
# The most expensive mistake is also the easiest to check. By input, not by
# row: the same value in its other form would give away half of the answer.

# %%
inputs = {split: {one.user_input for one in data[split]} for split in data}
for split in ("train", "unlabelled"):
    print(f"{split:10} {len(inputs[split])} values", end=", ")
    print(f"{len(inputs[split] & inputs['test'])} of them in the test set")
    assert not inputs[split] & inputs["test"]

# %% [markdown]
# What this check cannot see: the teacher was trained on the `train` split of
# all locales. It has seen the labelled values, and the student starts from
# its layers. That is in its favour and in its rivals', for they start alike.
# Say such things in the memo.

# %% [markdown]
# ### The teacher answers what nobody labelled
#
# `answered` throws the labels away and lets the teacher write. Here the
# labels exist, so we can see how good it is where they are missing in real
# life.

# %%
print(inspect.getsource(capstone.answered).split('"""')[2])

# %%
unlabelled = capstone.answered(
    teacher, collator, data["unlabelled"], max_new_tokens=LENGTH // 3
)
said = [tokenizer.decode(pair.response_ids[:-1]) for pair in unlabelled]
right = [
    text == data["unlabelled"][pair.example_id].response
    for text, pair in zip(said, unlabelled, strict=True)
]
print(f"{len(unlabelled)} answers of {len(data['unlabelled'])} inputs ended")
print("at least nine tenths are right:", sum(right) > 0.9 * len(right))


# %%
def labelled(split):
    pairs = (collator.encode(one, i) for i, one in enumerate(data[split]))
    return list(pairs)


task = capstone.Task(
    teacher=teacher,
    collator=collator,
    student=lambda seed: copy.deepcopy(start),
    labelled=labelled("train"),
    unlabelled=unlabelled,
    test=labelled("test"),
    config=CONFIG,
    groups={
        form: range(n, 2 * SIZES["test"], 2)
        for n, form in enumerate(localize.FORMATS)
    },
    k=K,
    batch_size=50,
)

# %% [markdown]
# ## 4 · Before the run
#
# ### The doctor sees one batch
#
# It takes a second, and finds the mistakes that cost a week: labels shifted
# by one, a truncated context, a loss with a factor in it (chapter 9).

# %%
batch = collator.collate(unlabelled[:8])
findings = examine_batch(
    copy.deepcopy(start).train(), batch, teacher=LiveTeacher(teacher)
)
print(report(findings))

# %% [markdown]
# ### How much is there to gain?
#
# The teacher is measured twice on the test set, with its context and with
# the student's. The KL between the two is the **gain** that a student can
# take in. If it is nothing, then the context says nothing, and there is
# nothing to distil from it.

# %%
fixed = capstone.fixed_rows(task)
for name, row in fixed.items():
    print(f"{name:30} exact {row['exact_match']:.2f}  KL {row['kl']:.2f}")
assert fixed[capstone.WITHOUT]["kl"] > 0.05

# %% [markdown]
# ### Budgets
#
# By hand: a forward pass costs 2 FLOPs a parameter and token, a training step
# three times that. The distilled student reads `steps` batches, and the
# teacher each unlabelled example once. The same from kdlib:

# %%
plan = capstone.budgets(task)
rows = len(unlabelled)
by_student = [p.student_prompt_ids + p.response_ids for p in unlabelled]
by_teacher = [p.teacher_prompt_ids + p.response_ids for p in unlabelled]
mean_student, mean_teacher = (
    sum(map(len, side)) / rows for side in (by_student, by_teacher)
)
read = CONFIG.steps * CONFIG.batch_size * mean_student
by_hand = 6 * parameter_count(start) * read
by_hand += 2 * parameter_count(teacher) * rows * mean_teacher
print("as by hand:", abs(plan[DISTILLED].flops / by_hand - 1) < 1e-9)
for name, budget in plan.items():
    print(f"{name:26} {budget.steps:4} steps", end="")
    print(f" {budget.tokens:8,} tokens {budget.flops / 1e12:6.2f} TFLOP")
assert abs(plan[HARD_FLOPS].flops / plan[DISTILLED].flops - 1) < 0.02

# %% [markdown]
# ### Predict
#
# The row of equal FLOPs takes more steps than the others. It reads the same
# labels again and again. Will it be better than the row of equal tokens, or
# worse?

# %% [markdown]
# ## 5 · The run
#
# All rows of a seed start from the same weights. So a difference between two
# rows is taken seed by seed, and what a seed does to both falls out.

# %%
scratch = tempfile.TemporaryDirectory(prefix="kdlib-")
folder, students, runs = Path(scratch.name), {}, []
for seed in range(SEEDS):
    runs += capstone.run_seed(
        task,
        seed,
        device=DEVICE,
        folder=folder / f"seed-{seed}",
        keep=students.__setitem__,
    )
print(len(runs), "rows,", SEEDS, "seeds")

# %%
found = {
    **provenance(f"notebooks/14_capstone.ipynb, KD_PROFILE={PROFILE}"),
    **capstone.result(
        task,
        question=QUESTION,
        predictions=PREDICTIONS,
        fixed=fixed,
        runs=runs,
    ),
}
write_json(folder / "result.json", found)
print(*sorted(found), sep=", ")


# %% [markdown]
# Trained numbers differ a little from machine to machine, so they stand in
# pictures, which the tests of this course do not compare.


# %%
def five_rows(found):
    lines = [
        [name, *(f"{row[m]:.3f}" for m in capstone.MEASURES)]
        for name, row in found["fixed"].items()
    ]
    for name, row in found["rows"].items():
        means = (f"{row[m]['mean']:.3f}" for m in capstone.MEASURES)
        lines.append([name, *means])
    return plots.table(["", "exact match", "agreement", "KL"], lines)


five_rows(found)

# %% [markdown]
# ### Two seeds are not enough
#
# The interval of a mean is $\bar d \pm t\, s / \sqrt n$. With two seeds $t$
# has one degree of freedom. By hand, for differences of 0.20 and 0.24:

# %%
d = [0.20, 0.24]
mean = sum(d) / 2
s = (sum((x - mean) ** 2 for x in d) / 1) ** 0.5
half = 12.706 * s / 2**0.5
print(f"by hand {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")
print("kdlib  ", mean_interval(d))
print("t for 2 to 6 seeds:", [round(t95(n - 1), 2) for n in range(2, 7)])

# %% [markdown]
# Two seeds that nearly agree leave an interval that covers zero. Five such
# seeds would settle it: the factor $t / \sqrt n$ falls from 9 to 1.2. So run
# five, unless a seed costs days, and say how many you ran.
#
# What this run shows, as a picture again:


# %%
def differences(found):
    lines = []
    for name, row in found["distilled_minus"].items():
        value = Interval(**row["exact_match"])
        lines.append([f"distilled minus {name}", value.claim()])
    lines.append(["recovery", str(Interval(**found["recovery"]))])
    return plots.table(["exact match", "mean [95 % interval]"], lines)


differences(found)

# %% [markdown]
# ## 6 · After the run
#
# ### The fidelity report

# %%
last = fidelity_report(
    students[DISTILLED], LiveTeacher(teacher), collator, task.test
)
plots.table(
    ["", "exact match", "agreement", "KL", "parameters"],
    [
        [side, *(f"{row[m]:.3f}" for m in capstone.MEASURES)]
        + [f"{row['parameters']:,}"]
        for side, row in last.items()
    ],
)

# %% [markdown]
# ### The doctor's report
#
# The distilled student's run left its metrics in a folder. The doctor reads
# them. Here we give its findings by name, without the numbers, which differ
# between machines. `python -m kdlib doctor FOLDER` prints all of it.

# %%
findings = examine_run(folder / f"seed-{SEEDS - 1}")
names = [finding.name for finding in findings]
plots.table(["the doctor's findings"], [[n] for n in names or ["none"]])

# %% [markdown]
# ### Look at the errors
#
# A mean hides what goes wrong. Read at least twenty wrong answers of yours;
# most good questions are born there.

# %%
prompts = [pair.student_prompt_ids for pair in task.test]
answers = complete(
    students[DISTILLED], tokenizer, prompts, max_new_tokens=LENGTH // 3
)
wrong = []
for one, ids in zip(data["test"], answers, strict=True):
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if text != one.response:
        told = f"{one.simplified_context}: {one.user_input}"
        wrong.append([told, text, one.response])
plots.table(["input", "student", "wanted"], wrong[:6] or [["-"] * 3])

# %% [markdown]
# Is the label right? Is the teacher wrong there too? Is it one kind of input?
# Is it a matter of form, which a user would not mind? Write the answers down.

# %% [markdown]
# ## 7 · The memo
#
# One page, for somebody who decides and has not read this notebook. The
# numbers come from the result file, so that they cannot be copied wrongly.


# %%
def rendered(found, verdicts):
    """The part of a memo that a program can write."""
    over = found["distilled_minus"][HARD_FLOPS]["exact_match"]
    tokens = found["distilled_minus"][HARD_TOKENS]["exact_match"]
    recovery = Interval(**found["recovery"])
    lines = [
        f"Question. {found['question']}",
        "Answer. Distilled minus hard labels, exact match: at equal FLOPs "
        f"{Interval(**over).claim()}, at equal tokens "
        f"{Interval(**tokens).claim()}. Recovery of the context {recovery}. "
        f"{found['seeds']} paired seeds, {found['examples']['test']} inputs.",
    ]
    for prediction, verdict in zip(
        found["predictions"], verdicts, strict=True
    ):
        lines.append(f"Predicted. {prediction} {verdict}")
    lines.append(f"Made by. {found['command']}, {found['device']}.")
    wrap = [textwrap.fill(x, 76, subsequent_indent="    ") for x in lines]
    return "\n".join(wrap)


# %%
def judged(interval, bound):
    """A prediction 'above bound' against an interval."""
    if interval["low"] > bound:
        return "It came out."
    if interval["high"] < bound:
        return "It did not come out."
    return "These seeds do not decide."


over = found["distilled_minus"][HARD_FLOPS]["exact_match"]
verdicts = [judged(over, 0.05), judged(found["recovery"], 0.3)]  # YOURS
memo = rendered(found, verdicts)
(folder / "memo.md").write_text(memo)
figure, axes = plt.subplots(figsize=(7, 2.0))
axes.text(0, 1, memo, va="top", family="monospace", fontsize=8)
axes.axis("off")
plt.show()

# %% [markdown]
# What a program cannot write, and you must:
#
# - **Recommendation.** One sentence with a verb.
# - **Why.** Your best explanation, and what else would explain the same
#   numbers.
# - **Where it fails.** From the errors that you read.
# - **What it costs.** Minutes, memory, labels, the teacher's licence.
# - **What would change your mind.** The experiment that comes next.

# %% [markdown]
# ## 8 · A study that was handed in
#
# `notebooks/experiments/capstone_example.py` asked more of the same task:
# five seeds, 2,000 unlabelled values, 250 steps, a student of two
# layers. Its question and predictions stand in the result file as they were
# before the run.

# %%
clone = Path(kdlib.__file__).parents[1]
path = clone / "notebooks" / "results" / "capstone_example.json"
study = json.loads(path.read_text())
for text in (study["question"], *study["predictions"]):
    print(textwrap.fill(text, 76, subsequent_indent="    "))

# %%
print(capstone.table(study))
print()
print(f"{study['examples']['labelled']} labels", end=", ")
print(f"{study['examples']['unlabelled']} answers of the teacher", end=", ")
print(f"{study['examples']['test']} test inputs, {study['seeds']} seeds")

# %% [markdown]
# The figure to steal: one dot a seed, the interval of the mean, and the
# prediction as a line that was drawn before.

# %%
of = {(run["row"], run["seed"]): run["exact_match"] for run in study["runs"]}
names = list(study["distilled_minus"])[1:]
figure, axes = plt.subplots(figsize=(7, 2.2))
for y, name in enumerate(names):
    dots = [
        of[DISTILLED, seed] - of[name, seed] for seed in range(study["seeds"])
    ]
    value = study["distilled_minus"][name]["exact_match"]
    axes.plot(dots, [y] * len(dots), "o", color=plots.BLUE, alpha=0.5)
    span = [value["low"], value["high"]]
    axes.plot(span, [y - 0.25] * 2, color=plots.ORANGE, linewidth=3)
    axes.plot(value["mean"], y - 0.25, "d", color=plots.ORANGE)
axes.axvline(0, color="black", linewidth=0.8)
axes.axvline(0.1, color=plots.GREY, linestyle="--", linewidth=1)
axes.text(0.102, len(names) - 0.5, "predicted: above", va="center", fontsize=9)
axes.set(yticks=range(len(names)), ylim=(-0.6, len(names) - 0.2))
axes.set_yticklabels([f"minus {name}" for name in names])
axes.set_xlabel("exact match, distilled minus the row; a dot a seed")
plt.show()

# %%
for name, claim in claims.load().items():
    if name.startswith("capstone-"):
        print(claim, end="\n\n")

# %% [markdown]
# ### Its memo
#
# The numbers first, by the function of section 7:

# %%
over = study["distilled_minus"][HARD_FLOPS]["exact_match"]
more = study["more_where_counted"]
verdicts = [
    judged(over, 0.1),
    judged(more, 0.0),
    judged(study["recovery"], 0.5),
]
print(rendered(study, verdicts))

# %% [markdown]
# And what its author wrote:
#
# - **Recommendation.** Distil, and collect values rather than labels. Read the
#   share of wrong answers before you ship: this student is half the teacher.
# - **Why.** The rival read 150 values many times, the distilled student 2,000.
#   What else would explain it: 2,000 values with *labels* might do as well, as
#   they did in chapter 0. The table does not part the two.
# - **Where it fails.** The result file has the exact match of two groups. The
#   question suspected the grammar of numbers; the second prediction was about
#   that, and its verdict above stands, whether the author likes it or not.
# - **What it costs.** No label beyond 150. The teacher has to be run once, and
#   its FLOPs were counted. It had seen the labelled values itself.
# - **What would change our mind.** A row with labels for the 2,000; another
#   language; a student with random weights.

# %% [markdown]
# ## 9 · How it is graded
#
# | | points | full marks | no marks |
# |---|---|---|---|
# | question | 15 | names task, rival, measure and budget | "does it work?" |
# | predictions | 10 | numbers, written before, with a reason | after the run |
# | rows, budget | 20 | five rows, the teacher's FLOPs counted | one baseline |
# | seeds | 15 | five pairs, "not shown" where due | the best seed |
# | doctor, errors | 15 | findings explained, twenty errors read | a mean |
# | memo | 15 | recommends, names a rival explanation | a list of numbers |
# | reproduction | 10 | one command makes the file again | screenshots |
#
# A negative result costs no points. A claim that the file does not bear costs
# ten, each time.

# %% [markdown]
# ### Model sentences
#
# - *Question.* "At equal FLOPs, does X answer more of these 800 inputs
#   exactly than Y?" **Not** "How good is distillation?"
# - *Finding.* "Distilled minus labels: 0.12 [0.08, 0.16], five paired seeds."
#   **Not** "Distillation is significantly better."
# - *Nothing found.* "Not shown here (0.01 [-0.02, 0.04]); a difference above
#   0.04 is unlikely." **Not** "There is no difference."
# - *Cause.* "The gain is largest on units, as it would be if labels were too
#   few for the plural; a teacher that has seen units more often would look
#   the same." **Not** "because of dark knowledge".
# - *Limit.* "One language, one teacher, greedy decoding."
#
# The second number in "not shown" is the upper end of the interval: it says
# what was ruled out.

# %% [markdown]
# ## 10 · A leaderboard that checks
#
# A class keeps one file, `board.jsonl`, beside the result files. A line is an
# entry: a name, a result file, its checksum and three numbers. They are not
# typed in:
#
# ```
# python -m kdlib leaderboard board.jsonl --add ada.json --name Ada
# python -m kdlib leaderboard board.jsonl
# ```
#
# The second command reads every line, computes the numbers again from each
# file's runs, and prints the table. Three seeds at least; so this notebook's
# own two are refused:


# %%
def refused(attempt):
    try:
        attempt()
    except KdlibError as error:
        print(textwrap.fill(error.what, 76))
        print("    remedy:", error.remedy)
    else:
        raise AssertionError("it was not refused")


board = folder / "board.jsonl"
if SEEDS < class_leaderboard.MIN_SEEDS:
    own = folder / "result.json"
    refused(lambda: class_leaderboard.add(board, "template", own))

# %%
(folder / "study.json").write_bytes(path.read_bytes())
entry = class_leaderboard.add(
    board, "the worked example", folder / "study.json"
)
good, bad = class_leaderboard.check(board)
print(class_leaderboard.table(good))
print(len(bad), "problems")

# %% [markdown]
# ### Break it
#
# Somebody adds five points to an entry; somebody else, to the runs behind it;
# a third enters the same result twice. Predict which of them is found.

# %%
line = json.loads(board.read_text())
better = {**line, "over_hard_flops": line["over_hard_flops"] + 0.05}
board.write_text(json.dumps(better) + "\n")
for problem in class_leaderboard.check(board)[1]:
    print(textwrap.fill(re.sub(r"-?\d+\.\d+", "N", problem), 76))

# %%
altered = json.loads(path.read_text())
for run in altered["runs"]:
    if run["row"] == DISTILLED:
        run["exact_match"] = min(1.0, run["exact_match"] + 0.05)
(folder / "altered.json").write_text(json.dumps(altered))
refused(
    lambda: class_leaderboard.add(board, "altered", folder / "altered.json")
)

# %%
board.write_text((json.dumps(line) + "\n") * 2)
for problem in class_leaderboard.check(board)[1]:
    print(textwrap.fill(problem, 76))

# %% [markdown]
# What no checker finds: runs that were made up, with a summary that fits
# them. The file names its command, its versions and its device. Somebody else
# runs it again; that is what reproduction is for.

# %%
scratch.cleanup()

# %% [markdown]
# ## 11 · On real models
#
# Set `KD_PROFILE=gpu` before the kernel starts, in Colab with a GPU, and run
# all cells. The code is the same. What changes:
#
# - **Memory.** Weights are loaded in float32: 4 bytes a parameter for the
#   teacher; 16 for the student, with its gradient and AdamW's two moments
#   (chapter 10).
# - **Logits.** Qwen3 has 151,936 tokens. The evaluation keeps one batch's
#   logits at a time, and training reads a cache of `K` entries a token, with
#   a bucket for the rest (chapter 11).
# - **The rate.** A pretrained student wants a hundredth of the rate of a
#   small new one. Try three on a validation set, never on the test set, and
#   give the rivals the same three.
# - **The teacher.** Measure it first. If it answers half of the test inputs
#   wrongly, the student will learn that too.

# %% [markdown]
# ## Exercises
#
# They are in [`exercises/ch14.ipynb`](../exercises/ch14.ipynb), each with its
# own check, two hints and a solution. Do them before the quiz.

# %% [markdown]
# ## Quiz
#
# **1.** Your distilled student wins by 0.06 in the mean of three seeds, and
# the interval is [-0.01, 0.13]. Two more seeds would make it narrower. May you
# run them?
#
# <details><summary>Answer</summary>
#
# Yes, if you say so and keep all five, whatever they show. What you may not do
# is stop as soon as the interval leaves zero: with enough looks it will, by
# chance. Fix the number of seeds before you look.
#
# </details>

# %% [markdown]
# **2.** The rival of equal FLOPs has the learning rate that was tuned for the
# distilled student. Is the race fair?
#
# <details><summary>Answer</summary>
#
# No. Tune both, with the same number of tries, on data that is neither's test
# set. Otherwise part of what you measure is your own effort.
#
# </details>

# %% [markdown]
# **3.** The gain is 0.002 nats a token, and the recovery 0.4. What does the
# recovery say?
#
# <details><summary>Answer</summary>
#
# Next to nothing: it is a share of almost nothing, and small errors of the KL
# move it by a lot. Look at the gain first. Here the context hardly matters on
# these inputs.
#
# </details>

# %% [markdown]
# ## What breaks in practice
#
# - **The test stands in the data.** It happened to a published mixture
#   ([MAmmoTH#11](https://github.com/TIGER-AI-Lab/MAmmoTH/issues/11)).
#   Section 3 compares inputs before anything is trained.
# - **The evaluation measures something else than training.** A trainer showed
#   an evaluation loss a thousand times the training loss: one was a sum, the
#   other a mean
#   ([axolotl#3271](https://github.com/axolotl-ai-cloud/axolotl/pull/3271)).
#   Section 5 measures all rows by one function.
# - **The teacher is not the one you mean.** A published result did not come
#   out; a likely cause was that student and teacher wrote the chat in
#   different templates
#   ([tinker-cookbook#796](https://github.com/thinking-machines-lab/tinker-cookbook/issues/796)).
#   So measure the teacher first, by the same code.

# %% [markdown]
# ## Summary
#
# - A question names task, rival, measure and budget. A prediction is a number
#   that was written before.
# - Five rows, one budget, paired seeds. A difference whose interval covers
#   zero is "not shown here", and its ends say what was ruled out.
# - A doctor before the run, a doctor and twenty errors after it.
# - A memo recommends, gives a rival explanation, and says what would change
#   its author's mind.
# - A result is what somebody else can make again.
#
# That was the course. Its one formula is now yours to fill in:
#
# $$\hat\theta = \arg\min_\theta \sum_{x' \in D'}
#   \mathrm{Loss}\big(\Pr^t(\cdot \mid c, z),\;
#   \Pr^s_\theta(\cdot \mid c', z),\; x'\big)$$
