"""Chapter 1, "Why distil": what a model costs, and what each side reads."""

from __future__ import annotations

from kdlib.checks.frame import Bug, Choice, Code, Predict, Test

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__


# --- 1.1: bytes of the KV cache ---


def _config(layers, width, heads, **more):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        **more,
    }


def _layout(config):
    """Layers, query heads, stored heads, a head's width, and the width if derived."""
    heads = config["num_attention_heads"]
    derived = config["hidden_size"] // heads
    stored = config.get("num_key_value_heads") or heads
    return (
        config["num_hidden_layers"],
        heads,
        stored,
        config.get("head_dim") or derived,
        derived,
    )


def _kv(count):
    """A count of numbers a token -> a function of the question's arguments."""
    return lambda config, tokens, size: count(*_layout(config)) * tokens * size


def _all_stored(rng):
    yield _config(32, 4096, 32, num_key_value_heads=32), 1, 2
    for _ in range(3):
        heads = rng.choice([2, 4, 8, 12])
        config = _config(rng.randint(2, 40), 64 * heads, heads)
        config |= {"num_key_value_heads": heads, "head_dim": 64}
        yield config, rng.randint(2, 4000), rng.choice([1, 2, 4])


def _few_stored(rng):
    yield _config(32, 4096, 32, num_key_value_heads=8), 8192, 2
    for _ in range(3):
        stored, group = rng.choice([1, 2, 3]), rng.choice([5, 7])
        heads = stored * group
        config = _config(rng.randint(2, 40), 32 * heads, heads)
        config |= {"num_key_value_heads": stored}
        yield config, rng.randint(2, 4000), rng.choice([1, 2, 4])


def _own_head_dim(rng):
    yield _config(40, 5120, 32, num_key_value_heads=8, head_dim=128), 1000, 2
    for _ in range(3):
        heads = rng.choice([4, 8])
        config = _config(rng.randint(2, 40), 96 * heads, heads, head_dim=256)
        yield config | {"num_key_value_heads": 2}, rng.randint(2, 4000), 4


def _left_out(rng):
    yield _config(12, 768, 12), 1024, 4
    yield _config(12, 768, 12, num_key_value_heads=None, head_dim=None), 1024, 4
    yield _config(30, 576, 9, num_key_value_heads=3, head_dim=None), 100, 2


_KV_CACHE = Code(
    "1.1",
    "kv_cache_bytes",
    ("config", "tokens", "bytes_per_number"),
    (
        Test("as many stored heads as query heads", 1, _all_stored),
        Test("fewer stored heads than query heads", 1, _few_stored),
        Test("a head_dim that is not hidden_size / heads", 1, _own_head_dim),
        Test("entries that are missing or None", 1, _left_out),
    ),
    _kv(lambda n, h, kv, d, derived: 2 * n * kv * d),
    (
        Bug(
            "query heads counted",
            "the heads that ask are counted, not the heads that are stored. A model "
            "with grouped queries stores fewer.",
            _kv(lambda n, h, kv, d, derived: 2 * n * h * d),
            "vllm-project/vllm#29736 and meta-pytorch/torchtune#38",
        ),
        Bug(
            "head_dim derived",
            "head_dim is computed although the config states it. Models may choose it "
            "freely.",
            _kv(lambda n, h, kv, d, derived: 2 * n * kv * derived),
            "LMCache/LMCache#688 and NVIDIA/Model-Optimizer#2482",
        ),
        Bug(
            "hidden_size for the stored width",
            "the model's width stands in for the width of what is stored.",
            _kv(lambda n, h, kv, d, derived: 2 * n * h * derived),
            "KolosalAI/model-memory-calculator#2",
        ),
        Bug(
            "heads counted twice",
            "hidden_size already holds all heads, and is multiplied by them again.",
            _kv(lambda n, h, kv, d, derived: 2 * n * h * h * derived),
            "jranaraki/vllm-fit#2",
        ),
        Bug(
            "stored heads taken for a divisor",
            "num_key_value_heads is a number of heads, not the size of a group.",
            _kv(lambda n, h, kv, d, derived: 2 * n * (h // kv) * d),
            "rasbt/LLMs-from-scratch#922",
        ),
        Bug(
            "one head only",
            "the bytes of one head are taken for those of a layer.",
            _kv(lambda n, h, kv, d, derived: 2 * n * d),
            "rohitg00/ai-engineering-from-scratch#57",
        ),
        Bug(
            "keys or values only",
            "a layer stores two vectors for every stored head.",
            _kv(lambda n, h, kv, d, derived: n * kv * d),
        ),
        Bug(
            "one layer only",
            "every layer has a cache of its own.",
            _kv(lambda n, h, kv, d, derived: 2 * kv * d),
        ),
        Bug(
            "bits for bytes",
            "the result is in bits.",
            _kv(lambda n, h, kv, d, derived: 16 * n * kv * d),
        ),
        Bug(
            "one token only",
            "every token of the sequence stays in the cache.",
            lambda config, tokens, size: _KV_CACHE.truth(config, 1, size),
        ),
        Bug(
            "numbers for bytes",
            "it counts numbers; bytes_per_number is not used.",
            lambda config, tokens, size: _KV_CACHE.truth(config, tokens, 1),
        ),
    ),
)


# --- 1.2: FLOPs of a distillation ---


def _lengths(rng, n):
    import torch

    return torch.tensor([rng.randint(2, 90) for _ in range(n)])


def _plain_kd(rng):
    """c' = c: both sides read the same."""
    for n in (1, 4):
        c = rng.randint(3, 60)
        sizes = 10**9 * rng.randint(2, 9), 10**8 * rng.randint(1, 9)
        yield *sizes, c, c, _lengths(rng, n), _lengths(rng, n), 1


def _without_context(rng):
    for n in (1, 5):
        sizes = 10**9 * rng.randint(2, 9), 10**8 * rng.randint(1, 9)
        c, short = rng.randint(200, 900), rng.randint(1, 9)
        yield *sizes, c, short, _lengths(rng, n), _lengths(rng, n), 1


def _many_epochs(rng):
    for n in (2, 6):
        sizes = 10**9 * rng.randint(2, 9), 10**8 * rng.randint(1, 9)
        c, epochs = rng.randint(200, 900), rng.randint(3, 12)
        yield *sizes, c, 0, _lengths(rng, n), _lengths(rng, n), epochs


def _flops(
    teacher_pass=2,
    student_pass=6,
    teacher_epochs=lambda epochs: 1,
    teacher_context=lambda c, short, n: c * n,
    student_context=lambda c, short, n: short * n,
    answers=1,
):
    def compute(teacher, student, c, short, inputs, outputs, epochs):
        n = len(inputs)
        shared = sum(inputs.tolist()) + answers * sum(outputs.tolist())
        read = teacher_context(c, short, n) + shared
        trained = student_context(c, short, n) + shared
        asked = teacher_pass * teacher * read * teacher_epochs(epochs)
        return asked + student_pass * student * trained * epochs

    return compute


def _mean(compute):
    return lambda *arguments: compute(*arguments) / len(arguments[4])


_DISTILLATION = Code(
    "1.2",
    "distillation_flops",
    (
        "teacher_parameters",
        "student_parameters",
        "context",
        "simplified",
        "inputs",
        "answers",
        "epochs",
    ),
    (
        Test("the student reads what the teacher reads", 1, _plain_kd),
        Test("the student reads less", 2, _without_context),
        Test("several epochs", 1, _many_epochs),
    ),
    _flops(),
    (
        Bug(
            "multiply-adds counted",
            "a multiplication and an addition are two operations.",
            _flops(teacher_pass=1, student_pass=3),
            "Lyken17/pytorch-OpCounter#46 and facebookresearch/fvcore#69",
        ),
        Bug(
            "no backward pass",
            "the student is trained, and a backward pass costs too.",
            _flops(student_pass=2),
            "baidu-research/DeepBench#48",
        ),
        Bug(
            "backward pass as cheap as forward",
            "a backward pass has two products for each one of the forward pass.",
            _flops(student_pass=4),
        ),
        Bug("teacher left out", "the teacher is not free.", _flops(teacher_pass=0)),
        Bug(
            "teacher trained",
            "the teacher only reads: nothing flows back through it.",
            _flops(teacher_pass=6),
        ),
        Bug(
            "teacher reads every epoch",
            "the targets are kept, so the teacher reads each example once.",
            _flops(teacher_epochs=lambda epochs: epochs),
        ),
        Bug(
            "student reads the context",
            "the student is charged for c. It reads c' and z.",
            _flops(student_context=lambda c, short, n: c * n),
        ),
        Bug(
            "teacher reads the simplified input",
            "the teacher is charged for c'. It reads c and z.",
            _flops(teacher_context=lambda c, short, n: short * n),
            "thinking-machines-lab/tinker-cookbook#796, where the teacher was given "
            "the student's prompt",
        ),
        Bug(
            "context counted once",
            "every example has its context in front of it, not only the first.",
            _flops(
                teacher_context=lambda c, short, n: c,
                student_context=lambda c, short, n: short,
            ),
        ),
        Bug(
            "answers left out",
            "the answer's tokens run through both models too.",
            _flops(answers=0),
        ),
        Bug(
            "mean over the examples",
            "it is the cost of the average example.",
            _mean(_flops()),
        ),
    ),
)


# --- 1.3: the batch at which arithmetic takes over ---


def _plain(rng):
    yield 1e12, 5e10, 2
    for _ in range(4):
        peak, rate = rng.uniform(1e11, 1e15), rng.uniform(1e10, 3e12)
        yield peak, rate, rng.choice([0.5, 1, 2, 4])


def _many(rng):
    import torch

    for dtype in (torch.float64, torch.float32):
        peak = torch.tensor([rng.uniform(1e11, 1e14) for _ in range(5)], dtype=dtype)
        rate = torch.tensor([rng.uniform(1e10, 1e12) for _ in range(5)], dtype=dtype)
        size = torch.tensor([0.5, 1, 2, 4, 4], dtype=dtype)
        yield peak, rate, size


def _as_many(peak, rate, size):
    return tuple(peak.shape)


_BATCH = Code(
    "1.3",
    "critical_batch",
    ("flops_per_second", "bytes_per_second", "bytes_per_number"),
    (
        Test("one device", 2, _plain),
        Test("several devices at once", 1, _many, _as_many),
    ),
    lambda peak, rate, size: size * peak / (2 * rate),
    (
        Bug(
            "multiply-adds counted",
            "a weight costs each sequence a multiplication and an addition.",
            lambda peak, rate, size: size * peak / rate,
            "facebookresearch/fvcore#69",
        ),
        Bug(
            "upside down",
            "it is the inverse. A faster processor needs a larger batch to be busy.",
            lambda peak, rate, size: 2 * rate / (size * peak),
        ),
        Bug(
            "bytes forgotten",
            "memory moves bytes, and bytes_per_number of them make one weight.",
            lambda peak, rate, size: peak / (2 * rate),
        ),
        Bug(
            "bytes on the wrong side",
            "smaller numbers take less time to read, so a smaller batch suffices.",
            lambda peak, rate, size: peak / (2 * rate * size),
        ),
        Bug(
            "training counted",
            "this model serves; it runs forward only.",
            lambda peak, rate, size: size * peak / (6 * rate),
        ),
        Bug(
            "bits for bytes",
            "bytes_per_second is in bytes already.",
            lambda peak, rate, size: 8 * size * peak / (2 * rate),
        ),
    ),
)


# --- 1.4: predictions ---

_NUMBERS = {
    "users": (64, 16, 24, 256),
    "answers answers_word": (
        (1e6, "one million"),
        (2e6, "two million"),
        (5e6, "five million"),
        (20e6, "twenty million"),
    ),
    "kept": (8, 16, 32, 50),
}

_SHAPE = _config(32, 4096, 32, num_key_value_heads=8)
_WEIGHTS, _VOCABULARY, _TOKENS = 8.03e9, 128_256, 8192
_GB = 1e9


def _gigabytes(n):
    cache = _KV_CACHE.truth(_SHAPE, _TOKENS, 2) * n.users
    return {
        "weights": 2 * _WEIGHTS / _GB,
        "cache": cache / _GB,
        "all_targets": 2 * _VOCABULARY * n.answers / _GB,
        "kept_targets": (4 + 2) * n.kept * n.answers / _GB,
    }


def _off(key, factor):
    return lambda n: _gigabytes(n)[key] * factor


_PREDICTION = Predict(
    "1.4",
    "gigabytes",
    _gigabytes,
    {
        "weights": (
            Bug("one byte a number", "bfloat16 has 16 bits.", _off("weights", 1 / 2)),
            Bug("float32", "bfloat16 is not float32.", _off("weights", 2)),
            Bug("bits for bytes", "That is in bits.", _off("weights", 8)),
        ),
        "cache": (
            Bug(
                "one user only",
                "There are {users} users.",
                lambda n: _gigabytes(n)["cache"] / n.users,
            ),
            Bug(
                "query heads counted",
                "Only 8 heads are stored.",
                _off("cache", 4),
                "vllm-project/vllm#29736",
            ),
            Bug("keys or values only", "Keys and values.", _off("cache", 1 / 2)),
            Bug("one layer only", "All 32 layers.", _off("cache", 1 / 32)),
        ),
        "all_targets": (
            Bug("float32", "bfloat16 is not float32.", _off("all_targets", 2)),
            Bug(
                "one number a token",
                "Every answer token has a whole distribution.",
                _off("all_targets", 1 / _VOCABULARY),
            ),
        ),
        "kept_targets": (
            Bug(
                "indices forgotten",
                "Which tokens they are must be kept as well.",
                _off("kept_targets", 1 / 3),
            ),
            Bug(
                "whole vocabulary",
                "Only the {kept} likeliest tokens are kept.",
                lambda n: _gigabytes(n)["kept_targets"] * _VOCABULARY / n.kept / 3,
            ),
        ),
    },
    _NUMBERS,
    (
        "the KV caches of {users} users",
        "for each of {answers_word} answer tokens",
        "only the {kept} likeliest tokens",
    ),
)

QUESTIONS = (
    _KV_CACHE,
    _DISTILLATION,
    _BATCH,
    _PREDICTION,
    Choice("1.5", "where_the_gain_lies", "abcd"),
)
