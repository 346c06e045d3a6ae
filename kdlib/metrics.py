"""What a run tells about itself, at every step and in a file that outlives it.

FOLDER/metrics.jsonl has a line a step:

    step, loss, soft, hard   the loss and its parts (objective.py)
    kl                       KL(teacher || student) at temperature 1, nats a token
    agreement                share of tokens where both have the same likeliest token
    entropy_gap              H(p_s) - H(p_t), nats a token: below 0, the student is
                             surer of itself than its teacher is
    kl_quarter_1 .. _4       kl by position: in the first to the last quarter of each
                             response; null where the sample has no such token
    teacher_mass             the share of the teacher's probability that the top k of
                             sparse targets name
    off_support              the share of the student's probability on other tokens, at
                             the targets' temperature; 1 - teacher_mass is its teacher's
    grad_norm                before clipping
    learning_rate
    tokens, tokens_per_s     that the student read: prompts and responses, no padding
    mfu                      model FLOPs utilisation, where the GPU's peak is known: the
                             step's FLOPs over what the GPUs could do in its time
    peak_memory              bytes

On-policy and sequence-level runs add what on_policy.Author tells: student_written,
teacher_written and unfinished.

kl to off_support are measured every log_every steps, on at most SAMPLE tokens.
TensorBoard gets the same numbers, where it is installed.

What mfu counts, at flops_per_token: the student's forward and backward pass, a live
teacher's forward pass, and, of a response written in the step, one forward pass of its
writer over prompt and response (with a KV cache every token is computed once). Padding,
recomputed activations and rows that wait for a longer one take time and do not count. A
served teacher's FLOPs are another machine's.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from kdlib.divergences import forward_kl, tempered_log_softmax
from kdlib.errors import StorageError
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import SparseTargets

# Tokens are alike enough that more would cost time and tell little.
SAMPLE = 256
# Dense 16-bit tensor-core peaks in FLOP/s, from NVIDIA's data sheets. The first name
# that stands in the device's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
}


@torch.no_grad()
def fidelity(student_logits, targets, quarter=None) -> dict[str, torch.Tensor]:
    """kl to off_support, as far as the targets tell. Scalars that nothing waits for.

    student_logits: [N, V]
    targets:        [N, V] the teacher's logits, or SparseTargets. Sparse ones give the
                    KL of their own kind, at their own temperature, and no entropy
    quarter:        [N] of each token's response, see `quarters`; for kl_quarter_1 ..
    """
    few = sample(len(student_logits), student_logits.device)
    student_logits, targets = student_logits[few], targets[few]
    if isinstance(targets, SparseTargets):
        t = targets.temperature
        kl, found = sparse_divergence(student_logits, targets, temperature=t), {}
        if targets.weights is None:  # the likeliest first; sampled ones are in no order
            named = targets.indices.long()
            same = student_logits.argmax(-1) == named[:, 0]
            found["agreement"] = same.float().mean()
            found["teacher_mass"] = targets.log_probs.float().exp().sum(-1).mean()
            log_ps = tempered_log_softmax(student_logits[:, : targets.vocab_size], t)
            on_support = log_ps.gather(-1, named).exp().sum(-1)
            found["off_support"] = 1.0 - on_support.mean()
    else:
        vocab = min(student_logits.shape[-1], targets.shape[-1])
        student_logits, targets = student_logits[:, :vocab], targets[:, :vocab]
        same = student_logits.argmax(-1) == targets.argmax(-1)
        kl = forward_kl(student_logits, targets)
        found = {
            "agreement": same.float().mean(),
            "entropy_gap": (entropy(student_logits) - entropy(targets)).mean(),
        }
    return {"kl": kl.mean(), **found, **_by_quarter(kl, few, quarter)}


def _by_quarter(kl, few, quarter) -> dict[str, torch.Tensor]:
    """Masked sums, because a GPU would be waited for to select by a mask."""
    if quarter is None:
        return {}
    there = quarter[few] == torch.arange(4, device=kl.device)[:, None]  # [4, n]
    sums = kl.where(there, 0.0).sum(-1) / there.sum(-1)
    return {f"kl_quarter_{i + 1}": sums[i] for i in range(4)}


def quarters(row_ids) -> torch.Tensor:
    """[N] 0 to 3: the quarter of its response in which each token stands.

    row_ids: [N] the response of each token, ascending (PairedBatch.row_ids)
    """
    first = torch.searchsorted(row_ids, row_ids)
    length = torch.searchsorted(row_ids, row_ids, right=True) - first
    place = torch.arange(len(row_ids), device=row_ids.device) - first
    return 4 * place // length


def sample(n: int, device) -> torch.Tensor:
    """At most SAMPLE of the numbers 0 .. n - 1, evenly spread."""
    return torch.linspace(0, n - 1, min(SAMPLE, n), device=device).long()


def entropy(logits):
    """[N] of softmax(logits), in nats."""
    log_probs = tempered_log_softmax(logits, 1.0)
    p = log_probs.exp()
    return -(p * log_probs.where(p > 0, 0.0)).sum(-1)


def flops_per_token(model, length: float, *, training: bool) -> float:
    """FLOPs of a causal LM for each token of a row of `length` tokens.

    2 P + 4 L H length for a forward pass with P parameters in L layers of attention
    width H, and twice as much more for a backward pass (without the products for
    frozen weights). An embedding that is not also the head is a look-up and costs
    nothing. All experts of a mixture are counted, which is too many.

    Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), appendix B.
    """
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        parameters -= table.numel()
        trained -= table.numel() if table.requires_grad else 0
    heads = getattr(config, "num_attention_heads", 0)
    layers = getattr(config, "num_hidden_layers", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    attention = 4 * layers * heads * width * length
    forward = 2 * parameters + attention
    backward = 2 * parameters + 2 * trained + 2 * attention
    return forward + backward if training else forward


def step_flops(
    student, tokens: int, rows: int, teacher=None, teacher_tokens: int = 0
) -> float:
    """FLOPs of a training step: the student's forward and backward pass over `tokens`
    in `rows` rows, and the forward pass of a teacher that is a model."""
    flops = tokens * flops_per_token(student, tokens / rows, training=True)
    if teacher is not None:
        once = flops_per_token(teacher, teacher_tokens / rows, training=False)
        flops += teacher_tokens * once
    return flops


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's 16-bit peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return None
    words = status.read_text().split()
    return int(words[words.index("VmHWM:") + 1]) * 1024


class Record:
    """Writes a line a step to metrics.jsonl, and shows how far the run is.

    step: steps done already. Lines of later steps are from a run that was killed after
          its last checkpoint; they are dropped, and those steps come again.

    Raises StorageError where the file cannot be written.
    """

    def __init__(self, folder: Path, step: int, steps: int):
        self.path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is with the system, which outlives a kill, at once.
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(_end_of_step(self.path, step))
        except OSError as error:
            raise self._error(error) from error
        self._board = _tensorboard(folder / "tensorboard", step)
        # disable=None: no bar where nobody watches (a log file, a notebook's output).
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None)
        self._then = time.perf_counter()

    def write(
        self,
        step: int,
        numbers: dict[str, float | None],
        *,
        tokens: int,
        seconds_at_peak: float | None = None,
    ) -> None:
        """One line: numbers, and the speed since the line before.

        seconds_at_peak: how long the step's FLOPs take at the device's peak
        """
        now = time.perf_counter()
        seconds, self._then = now - self._then, now
        line = {"step": step, **numbers, "tokens": tokens}
        line["tokens_per_s"] = tokens / seconds
        if seconds_at_peak is not None:
            line["mfu"] = seconds_at_peak / seconds
        # JSON has no NaN: a step that overflowed in fp16 has no gradient norm.
        line = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in line.items()
        }
        try:
            text = json.dumps(line).encode() + b"\n"
            if self._file.write(text) != len(text):
                raise OSError("only a part of a line was written")
        except OSError as error:
            raise self._error(error) from error
        if self._board is not None:
            for name, value in line.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, step)
        self._bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
        self._bar.update()

    def flush(self) -> None:
        """Have the disk hold every line, as it does the checkpoint that follows."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _error(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write {self.path}: {error}",
            "free disk space, or name a folder that you may write; the same command "
            "goes on from the last checkpoint",
        )


def _end_of_step(path: Path, step: int) -> int:
    """The place in the file where the lines up to `step` end."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break  # cut off by a kill
            end += len(line)
    return end


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)
