"""Checks of the Triton kernel of fused.py without a GPU; test_fused.py runs them.

python tests/fused_kernel.py interpret    (with TRITON_INTERPRET=1)
    the kernel's own arithmetic, on CPU tensors, against all logits at once
python tests/fused_kernel.py compile
    the kernel compiled to machine code of several GPUs, with its resources
"""

import itertools
import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parent))

if sys.argv[1] == "compile":
    torch.cuda.is_available = lambda: True  # so that fused.py defines its kernel

from kdlib import fused  # noqa: E402
from kdlib.divergences import get_divergence  # noqa: E402

# numpy, the interpreter's arithmetic, warns of inf - inf also where tl.where drops it.
warnings.filterwarnings("ignore", category=RuntimeWarning)

# Numbers that float32 holds exactly: Triton passes scalars in float32, and float64
# results are compared to 1e-10.
KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("cross_entropy", {}),
    ("kl_mix", {"lam": 0.25}),
    ("kl_mix", {"lam": 0.0}),
    ("kl_mix", {"lam": 1.0}),
    ("generalized_jsd", {"beta": 0.25}),
    ("generalized_jsd", {"beta": 0.0}),
    ("generalized_jsd", {"beta": 1.0}),
    ("skew_kl", {"alpha": 0.125}),
    ("skew_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.125}),
    ("skew_reverse_kl", {"alpha": 0.0}),
]


def check(name, params, s, t, tolerance, softcaps=(None, None), where="", **options):
    """The kernel on logits [N, V] against autograd: as if the heads were identities."""
    dtype, vocab = s.dtype, s.shape[1]
    eye = torch.eye(vocab, dtype=dtype)
    s = s.clone().requires_grad_()
    student = fused.Head(eye.clone().requires_grad_(), None, 0.5, softcaps[0])
    teacher = fused.Head(eye, None, 2.0, softcaps[1])
    weights = torch.linspace(0.25, 1, len(s), dtype=torch.float64)
    got = fused.fused_divergence(
        *(s, student, t, teacher),
        divergence=name,
        temperature=2.0,
        token_weights=weights,
        **options,
        **params,
    )
    d_s, d_w = torch.autograd.grad(got.total, (s, student.weight))
    with torch.no_grad():
        without = fused.fused_divergence(
            *(s, student, t, teacher), divergence=name, temperature=2.0, **params
        )

    wide = torch.promote_types(dtype, torch.float32)
    z, w = s.detach().to(wide).requires_grad_(), eye.to(wide).requires_grad_()
    per_token = get_divergence(name, **params)(
        fused.Head(w, None, 0.5, softcaps[0]).logits(z),
        teacher.shape(t.to(wide)),
        temperature=2.0,
    )
    wanted = torch.autograd.grad((per_token * weights).sum(), (z, w))
    for label, a, b in (
        ("value", got.per_token, per_token.detach()),
        ("value without gradient", without.per_token, per_token.detach()),
        ("d hidden", d_s, wanted[0]),
        ("d weight", d_w, wanted[1]),
    ):
        torch.testing.assert_close(
            a.to(wide),
            b,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, label=label: f"{name} {params} {where} {label}: {m}",
        )
    return 1


def interpret():
    assert fused.HAS_TRITON and fused._uses_triton(torch.device("cpu"))
    torch.manual_seed(0)
    done = 0
    for (name, params), softcaps in itertools.product(
        KINDS, [(None, None), (2.0, None), (4.0, 2.0)]
    ):
        s, t = torch.randn(2, 3, 37, dtype=torch.float64) * 4
        done += check(name, params, s, t, 1e-10, softcaps, "one block")
        fused.BLOCK_BYTES = 8 * 16  # a row is now three blocks, the last one not full
        done += check(name, params, s, t, 1e-10, softcaps, "three blocks")
        fused.BLOCK_BYTES = 16384
    fused.BLOCK_BYTES = 128
    for name, params in KINDS:
        s, t = torch.randn(2, 3, 33, dtype=torch.float64) * 4
        s[:, :20] = t[:, :20] = -torch.inf  # whole blocks masked, also the first
        done += elementwise(name, params, s, t, 1e-10)
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
    """Loss and gradient from logits, without the products, against autograd."""
    job, weights = make_job(name, params), torch.tensor([1.0, 0.5, 2.0], dtype=s.dtype)
    results = []
    for part in (fused._by_triton, fused._by_autograd):
        out, per_token = (
            torch.full_like(s, torch.nan),
            torch.full_like(s[:, 0], torch.nan),
        )
        part(s.clone(), t.clone(), out, per_token, weights, job)
        results.append((per_token, out))
        assert per_token.isfinite().all() and out.isfinite().all(), (name, params)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    return 1


def equal_sides(name, params):
    if name == "cross_entropy":
        return 0
    s = torch.randn(3, 33) * 4
    out, per_token = torch.empty_like(s), torch.empty(3)
    fused._by_triton(
        s, s.clone(), out, per_token, torch.ones(3), make_job(name, params)
    )
    assert per_token.eq(0).all(), (name, params, per_token)
    assert out.abs().max() < 2e-7, (name, params, out)
    return 1


def make_job(name, params):
    head = fused.Head(torch.empty(0))
    return fused._Job(
        student_head=head,
        teacher_head=head,
        teacher_hidden=None,
        student_dtype=None,
        teacher_dtype=None,
        exact=False,
        workspace=0,
        token_weights=None,
        temperature=1.0,
        function=get_divergence(name, **params),
        closed_form=fused._closed_form(name, params),
        wants_gradient=True,
    )


def compile_offline():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = fused._kernel
    constants = {"KIND", "S_CAPPED", "T_CAPPED", "WRITE", "DTYPE", "BLOCK"}
    types = {"per_token_ptr": "*fp32", "row_weight_ptr": "*fp32", "vocab": "i32"}
    for capability, kind, logits in (
        (75, "forward_kl", "fp16"),
        (89, "kl_mix", "fp32"),
        (90, "forward_kl", "bf16"),
        (90, "generalized_jsd", "bf16"),
        (90, "skew_reverse_kl", "fp32"),
        (100, "reverse_kl", "bf16"),
    ):
        block = fused.BLOCK_BYTES // (4 if logits == "fp32" else 2)
        values = {
            "KIND": kind,
            "S_CAPPED": kind == "kl_mix",
            "T_CAPPED": False,
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
        # What one multiprocessor of the smallest of these GPUs has for one program.
        assert binary.metadata.shared <= 99 * 1024, binary.metadata.shared
        ptx = binary.asm["ptx"]
        assert "ld.local" not in ptx and "st.local" not in ptx
        if capability >= 80:
            assert "cp.async" in ptx  # loads run ahead of the arithmetic
        print(f"compiled {kind} for {logits}, compute capability {capability}")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_offline}[sys.argv[1]]()
