"""Checks of kdlib/fused_kernel.py without a GPU; test_fused.py runs them.

python tests/fused_kernel.py interpret    (with TRITON_INTERPRET=1)
    the kernel's own arithmetic, on CPU tensors, against all logits at once
python tests/fused_kernel.py compile
    the kernel compiled to machine code of several GPUs, with its resources
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parent))

if sys.argv[1] == "compile":
    torch.cuda.is_available = lambda: True  # so that the kernel is defined

from kdlib import fused, fused_gradient, fused_kernel  # noqa: E402
from kdlib.divergences import get_divergence  # noqa: E402
from kdlib.heads import Head  # noqa: E402

# numpy, the interpreter's arithmetic, warns of inf - inf also where tl.where drops it.
warnings.filterwarnings("ignore", category=RuntimeWarning)

# Numbers that float32 holds exactly: Triton passes scalars in float32, and float64
# results are compared to 1e-10.
KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("cross_entropy", {}),
    ("kl_mix", {"lam": 0.25}),
    ("generalized_jsd", {"beta": 0.25}),
    ("skew_kl", {"alpha": 0.125}),
    ("skew_reverse_kl", {"alpha": 0.125}),
]
ENDS = [  # where the kernel takes one of the first two instead
    ("kl_mix", {"lam": 0.0}),
    ("kl_mix", {"lam": 1.0}),
    ("generalized_jsd", {"beta": 0.0}),
    ("generalized_jsd", {"beta": 1.0}),
    ("skew_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.0}),
]


def check(
    name,
    params,
    s,
    t,
    tolerance,
    softcaps=(None, None),
    where="",
    hard=False,
    **options,
):
    """The kernel on logits [N, V] against autograd: as if the heads were identities."""
    dtype, rows = s.dtype, len(s)
    eye_s, eye_t = (torch.eye(x.shape[1], dtype=dtype) for x in (s, t))
    s = s.clone().requires_grad_()
    student = Head(eye_s.clone().requires_grad_(), None, 0.5, softcaps[0])
    teacher = Head(eye_t, None, 2.0, softcaps[1])
    weights = torch.linspace(0.25, 1, rows, dtype=torch.float64)
    options |= {"divergence": name, "temperature": 2.0, **params}
    labels = torch.linspace(0, s.shape[1] - 1, rows).long()  # the last token as well
    if hard:
        options |= {"labels": labels, "label_weights": 2 * weights.flip(0)}
    sides = s, student, t, teacher
    got = fused.fused_divergence(*sides, token_weights=weights, **options)
    d_s, d_w = torch.autograd.grad(got.total, (s, student.weight))
    with torch.no_grad():
        without = fused.fused_divergence(*sides, **options)

    wide = torch.promote_types(dtype, torch.float32)
    z, w = s.detach().to(wide).requires_grad_(), eye_s.to(wide).requires_grad_()
    logits = Head(w, None, 0.5, softcaps[0]).logits(z)
    per_token = get_divergence(name, **params)(
        logits, teacher.shape(t.to(wide)), temperature=2.0
    )
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    total = (per_token * weights).sum()
    if hard:
        total = total + (cross_entropy * 2 * weights.flip(0)).sum()
    wanted = torch.autograd.grad(total, (z, w))
    compared = [
        ("value", got.per_token, per_token.detach()),
        ("value without gradient", without.per_token, per_token.detach()),
        ("d hidden", d_s, wanted[0]),
        ("d weight", d_w, wanted[1]),
    ]
    if hard:
        compared += [
            ("hard", got.hard, cross_entropy.detach()),
            ("hard without gradient", without.hard, cross_entropy.detach()),
        ]
    for label, a, b in compared:
        torch.testing.assert_close(
            a.to(wide),
            b,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, label=label: f"{name} {params} {where} {label} {hard}: {m}",
        )
    return 1


def interpret():
    assert fused_kernel.HAS_TRITON and fused_kernel.uses_triton(torch.device("cpu"))
    torch.manual_seed(0)
    done = 0
    for name, params in KINDS:
        s, t = torch.randn(2, 3, 37, dtype=torch.float64) * 4
        done += check(name, params, s, t, 1e-10, where="one block")
        fused_kernel.BLOCK_BYTES = (
            8 * 16
        )  # a row is now three blocks, the last one not full
        done += check(name, params, s, t, 1e-10, where="three blocks")
        for softcaps in ((2.0, None), (None, 2.0), (4.0, 2.0)):
            done += check(name, params, s, t, 1e-10, softcaps, "softcap", hard=True)
        fused_kernel.BLOCK_BYTES = 16384
    for name, params in ENDS:
        done += check(name, params, s, t, 1e-10, where="end")
    fused_kernel.BLOCK_BYTES = 128
    for name, params in KINDS:
        s, t = torch.randn(2, 3, 33, dtype=torch.float64) * 4
        s[:, :20] = t[:, :20] = -torch.inf  # whole blocks masked, also the first
        done += elementwise(name, params, s, t, 1e-10)
        for v_s, v_t in (37, 70), (70, 37):  # one side alone has the last two blocks
            s, t = torch.randn(3, v_s).double() * 4, torch.randn(3, v_t).double() * 4
            done += check(name, params, s, t, 1e-10, where=f"{v_s} {v_t}", hard=True)
        s, t = torch.randn(2, 3, 33) * 1e4  # float32 rounds D to 1e4 * 6e-8
        done += elementwise(name, params, s, t, 5e-3)
        s, t = torch.randn(2, 3, 33)
        done += check(name, params, s, t, 3e-6, where="float32")
        s, t = (torch.randn(2, 3, 33) * 4).bfloat16()
        # Products of bfloat16 with an identity are exact: only G and the result round.
        done += check(name, params, s, t, 2e-2, where="bfloat16")
        done += check(name, params, s, t, 2e-2, where="bfloat16, exact", exact=True)
        s, t = (torch.randn(2, 3, 33) * 4).half()
        done += check(name, params, s, t, 3e-3, where="float16")
        done += equal_sides(name, params)
    print(f"{done} checks passed")


def elementwise(name, params, s, t, tolerance):
    """Losses and gradient from logits, without the products, against autograd."""
    results = []
    for part in (fused_kernel.by_triton, fused_gradient.by_autograd):
        per_token, hard = torch.full((2, len(s)), torch.nan, dtype=s.dtype)
        weights = torch.tensor([1.0, 0.5, 2.0], dtype=s.dtype)
        labels = torch.tensor([20, 25, 32])
        tokens = fused_gradient.Tokens(
            weights, per_token, weights.flip(0), labels, hard
        )
        out = torch.full_like(s, torch.nan)
        part(s.clone(), t.clone(), out, tokens, make_job(name, params))
        results.append((per_token, hard, out))
        assert all(x.isfinite().all() for x in results[-1]), (name, params)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    return 1


def equal_sides(name, params):
    if name == "cross_entropy":
        return 0
    s = torch.randn(3, 33) * 4
    out, per_token = torch.empty_like(s), torch.empty(3)
    tokens = fused_gradient.Tokens(torch.ones(3), per_token, None, None, None)
    fused_kernel.by_triton(s, s.clone(), out, tokens, make_job(name, params))
    assert per_token.eq(0).all(), (name, params, per_token)
    assert out.abs().max() < 1e-6, (name, params, out)
    return 1


def make_job(name, params):
    head = Head(torch.empty(0))
    return fused._Job(
        student_head=head,
        teacher_head=head,
        teacher_hidden=None,
        student_dtype=None,
        teacher_dtype=None,
        exact=False,
        workspace=0,
        token_weights=None,
        labels=None,
        label_weights=None,
        temperature=1.0,
        function=get_divergence(name, **params),
        closed_form=fused_kernel.closed_form(name, params),
        wants_gradient=True,
    )


def compile_offline():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = fused_kernel._kernel
    constants = {"KIND", "S_CAPPED", "T_CAPPED", "LABELS", "WRITE", "DTYPE", "BLOCK"}
    types = dict.fromkeys(
        ("per_token_ptr", "weight_ptr", "hard_ptr", "label_weight_ptr"), "*fp32"
    )
    types |= {"label_ptr": "*i64", "vocab": "i32", "s_vocab": "i32"}
    for capability, kind, logits, labels in (
        (75, "forward_kl", "fp16", True),
        (89, "kl_mix", "fp32", False),
        (90, "forward_kl", "bf16", False),
        (90, "generalized_jsd", "bf16", True),
        (90, "skew_reverse_kl", "fp32", False),
        (100, "reverse_kl", "bf16", True),
    ):
        block = fused_kernel.BLOCK_BYTES // (4 if logits == "fp32" else 2)
        values = {
            "KIND": kind,
            "S_CAPPED": kind == "kl_mix",
            "T_CAPPED": False,
            "LABELS": labels,
            "WRITE": True,
            "DTYPE": triton.language.float32,
            "BLOCK": block,
        }
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(
                name,
                "*" + (logits if name != "out_ptr" or logits != "fp32" else "bf16")
                if name.endswith("_ptr")
                else "i32"
                if name.endswith("_stride")
                else "fp32",
            )
            for name in kernel.arg_names
        }
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(kernel.arg_names.index(k),): v for k, v in values.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(kernel.arg_names)
                if name.endswith(("_ptr", "_stride"))  # not vocab, which may be odd
            },
        )
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": block // 256},
        )
        # What one multiprocessor has for one program: a T4, the smallest of the rest.
        kib = 64 if capability == 75 else 99
        assert binary.metadata.shared <= kib * 1024, binary.metadata.shared
        ptx = binary.asm["ptx"]
        assert "ld.local" not in ptx and "st.local" not in ptx
        if capability >= 80:
            assert "cp.async" in ptx  # loads run ahead of the arithmetic
        print(f"compiled {kind} for {logits}, compute capability {capability}")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_offline}[sys.argv[1]]()
