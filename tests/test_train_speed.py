"""What costs a GPU its time, shown on a CPU: waiting, masks, one program for many."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdlib import localize, models
from kdlib import train as loop
from kdlib.batching import batches_of_steps
from kdlib.gradients import StudentLoss
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sharding import blocks_of
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import TrainConfig, TrainingState, train
from kdlib.training_state import History
from kdlib.views import View

CONFIG = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("teacher")


@pytest.fixture(scope="module")
def collator(tokenizer):
    return PairCollator(tokenizer)


@pytest.fixture(scope="module")
def pairs(collator):
    examples = localize.examples("train", locales=["fr"], limit=8)
    return [collator.encode(e, i) for i, e in enumerate(examples)]


@pytest.fixture
def teacher(tokenizer):
    return models.build(tokenizer, hidden_size=16, layers=2, heads=2, seed=1)


@pytest.fixture
def student(tokenizer):
    return models.build(tokenizer, hidden_size=16, layers=2, heads=2)


# --- Waiting: a GPU does its work later, unless a number of it is asked for ---

# What copies numbers to the CPU, or makes a tensor whose size they decide.
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"}
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense"}


class Waits(TorchFunctionMode):
    """The names of all that would wait for a GPU, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.below = Below(self.seen)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
            with torch._C._DisableTorchDispatch():  # counted already
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.below.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.below.__exit__(*error)


class Below(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in args[1] or () if x is not None] if name == "index" else ()
        if name in SIZES or any(mask.dtype == torch.bool for mask in masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_are_seen():
    x = torch.arange(4.0)
    with Waits() as waits:
        x.sum().item()
        x.tolist()
        if x[0] == 0:
            x[x > 1]
        x.nonzero()
        x[torch.tensor([0, 1])] + 1
    assert waits.seen == ["item", "tolist", "__bool__", "index", "nonzero"]


def prepared(student, teacher, pairs, collator, objective, config):
    """A StudentLoss, its state, and the batches of one step, as `train` makes them."""
    loss_of = StudentLoss(student.train(), objective, teacher, fused=config.fused)
    optimizer = loop.adamw(student, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(student, optimizer, scaler, History())
    ask = teacher.targets if isinstance(teacher, CachedTeacher) else None
    steps = batches_of_steps(pairs, collator, config, torch.device("cpu"), ask=ask)
    return loss_of, state, next(steps)


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_a_fused_step_waits_once(student, teacher, pairs, collator, hard_weight):
    config = TrainConfig(steps=3, batch_size=8, micro_batch_size=4, fused=True)
    objective = Objective(hard_weight=hard_weight)
    loss_of, state, batches = prepared(
        student, LiveTeacher(teacher), pairs, collator, objective, config
    )
    assert len(batches) == 2
    loop.take_step(loss_of, batches, state, config, False)  # the optimiser's first
    with Waits() as waits:
        found, norm = loop.take_step(loss_of, batches, state, config, False)
    # With labels each micro-batch proves them to be in the vocabulary.
    proofs = 2 * (hard_weight > 0)
    assert waits.seen == ["tolist"] * (1 + proofs)
    assert math.isfinite(found.loss) and norm > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_measured_step_waits_no_more_than_another(
    student, teacher, pairs, collator, fused
):
    config = TrainConfig(steps=3, batch_size=8, micro_batch_size=4, fused=fused)
    loss_of, state, batches = prepared(
        student, LiveTeacher(teacher), pairs, collator, Objective(), config
    )
    loop.take_step(loss_of, batches, state, config, False)  # the optimiser's first
    seen = {}
    for measure in (False, True):
        with Waits() as waits:
            found, _ = loop.take_step(loss_of, batches, state, config, measure)
        seen[measure] = waits.seen
    assert seen[True] == seen[False]
    assert found.fidelity["kl"] > 0 and len(found.fidelity) == 7
    assert all(type(x) is float for x in found.fidelity.values())


def test_a_step_from_the_cache_waits_for_its_proof_and_its_numbers(
    student, teacher, pairs, collator, tokenizer, tmp_path
):
    path = write_cache(
        tmp_path / "cache", LiveTeacher(teacher), [collator.collate(pairs)], tokenizer
    )
    cached = CachedTeacher(path, tokenizer)
    config = TrainConfig(steps=3, batch_size=8, fused=True)
    loss_of, state, batches = prepared(
        student, cached, pairs, collator, Objective(), config
    )
    assert batches[0].targets is not None
    loop.take_step(loss_of, batches, state, config, False)
    with Waits() as waits:
        loop.take_step(loss_of, batches, state, config, False)
    assert waits.seen == ["tolist"] * 2


# --- Masks: causal attention needs none where padding is at the end ---


def ids_and_mask(rows):
    mask = torch.tensor(rows).bool()
    ids = torch.arange(5, 5 + mask.numel()).reshape(mask.shape)
    return View(ids, mask, torch.zeros_like(mask))


def test_padding_at_the_end_needs_no_mask(student):
    view = ids_and_mask([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert view.inputs()["attention_mask"] is None
    student.double().eval()
    masked = student(view.input_ids, attention_mask=view.attention_mask.long()).logits
    bare = student(**view.inputs()).logits
    real = view.attention_mask
    torch.testing.assert_close(bare[real], masked[real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [[[0, 1, 1]], [[1, 1, 1], [1, 0, 1]]])
def test_other_padding_keeps_its_mask(rows):
    view = ids_and_mask(rows)
    assert view.inputs()["attention_mask"].tolist() == rows
    assert view.to("cpu").inputs()["attention_mask"].tolist() == rows


def test_what_is_known_of_a_view_moves_with_it(collator, pairs):
    view = collator.collate(pairs).student
    with Waits() as waits:
        moved = view.map(torch.clone)
    assert waits.seen.count("nonzero") == 1  # found out here, on the CPU
    with Waits() as waits:
        moved.inputs()
        moved.select(torch.zeros(*view.input_ids.shape, 3))
        assert moved.n_tokens == view.attention_mask.sum()
        again = moved.map(torch.clone)
    assert waits.seen == ["__bool__"]  # this test's own
    assert torch.equal(again.positions, view.positions)
    assert again.positions is not view.positions


# --- Compiling: blocks are alike, so one program does for all ---


def test_few_programs_for_all_blocks_and_no_mask_in_them(
    student, teacher, pairs, collator, monkeypatch
):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_block(self, backend=backend, **options),
    )
    torch.compiler.reset()
    seen = {}
    for compiled in (False, True):
        model = models.build(collator.tokenizer, hidden_size=16, layers=3, heads=2)
        config = TrainConfig(
            steps=6, batch_size=2, learning_rate=1e-2, fused=True, compile=compiled
        )
        history = train(
            model, pairs, collator, Objective(), config, teacher=LiveTeacher(teacher)
        )
        seen[compiled] = history.loss
        for part in (*blocks_of(model), *blocks_of(teacher)):
            assert part._compiled_call_impl is None
    assert seen[True] == pytest.approx(seen[False], rel=1e-6)
    # Student in train mode, teacher without gradient: each has a program for all
    # lengths and perhaps one for the first.
    assert 2 <= len(graphs) <= 4
    for graph in graphs:
        calls = [n for n in graph.graph.nodes if "scaled_dot" in str(n.target)]
        assert [call.kwargs["attn_mask"] for call in calls] == [None]
        assert [call.kwargs["is_causal"] for call in calls] == [True]
