"""Times a training step of char_gpt.py against three peers, side by side, alternating in one run.

    python tests/benchmark.py            all sizes, both precisions: about 10 minutes on 2 cores
    python tests/benchmark.py classic    the classic sizes only

The peers have the same sizes, data and optimizer (fused AdamW):
- plain: how most courses write it: one module per head, dropout on the attention weights, float32
- transformers: GPT2LMHeadModel, with its own choice of attention
- encoder: a stack of torch.nn.TransformerEncoderLayer with a causal mask

Each figure is the median of ROUNDS rounds. In a round every contestant takes its turn, so that a
machine that slows down slows them all. Ratios are medians of the ratios within a round.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import char_gpt

ROUNDS = 7
V, C, H, L = 65, 128, 4, 4


class PlainHead(nn.Module):
    """One head with its own three projections and its own mask."""

    def __init__(self, T, dropout):
        super().__init__()
        self.key = nn.Linear(C, C // H, bias=False)
        self.query = nn.Linear(C, C // H, bias=False)
        self.value = nn.Linear(C, C // H, bias=False)
        self.register_buffer("allowed", torch.ones(T, T).tril())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        T = x.shape[1]
        q, k = self.query(x), self.key(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.allowed[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


class PlainBlock(nn.Module):
    """Pre-LayerNorm block over a list of heads."""

    def __init__(self, T, dropout):
        super().__init__()
        self.heads = nn.ModuleList(PlainHead(T, dropout) for _ in range(H))
        self.projection = nn.Linear(C, C)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(dropout)
        )
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.dropout(self.projection(torch.cat([head(y) for head in self.heads], dim=-1)))
        return x + self.feed_forward(self.norm2(x))


class Embedded(nn.Module):
    """Token and position embeddings, some blocks, LayerNorm, output layer, cross-entropy."""

    def __init__(self, T, blocks, mask=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V)
        self.mask = mask

    def forward(self, x, y):
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            if self.mask is None:
                hidden = block(hidden)
            else:
                hidden = block(hidden, src_mask=self.mask, is_causal=True)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def build(name, T, dropout):
    """Return a function (x, y) -> loss, and the module behind it."""
    if name == "ours":
        model = char_gpt.LM(V, T, C, H, L, dropout)
        return lambda x, y: model(x, y)[1], model
    if name == "plain":
        model = Embedded(T, [PlainBlock(T, dropout) for _ in range(L)])
        return model, model
    if name == "encoder":
        layers = [
            nn.TransformerEncoderLayer(C, H, 4 * C, dropout, batch_first=True, norm_first=True)
            for _ in range(L)
        ]
        model = Embedded(T, layers, nn.Transformer.generate_square_subsequent_mask(T))
        return model, model
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)

    def loss(x, y):
        return F.cross_entropy(model(x).logits.flatten(0, 1).float(), y.flatten())

    return loss, model


def stepper(name, B, T, dropout, bfloat16):
    """Return a function that takes one training step."""
    torch.manual_seed(0)
    loss, model = build(name, T, dropout)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(x, y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(title, contestants, repeat):
    """Time contestants {name: step}; print milliseconds per step, and ratios to "ours"."""
    for step in contestants.values():
        step()
    seconds = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, step in contestants.items():
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            seconds[name].append((time.perf_counter() - start) / repeat)
    cells = []
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, seconds["ours"], strict=True))
        cells.append(f"{name} {statistics.median(times) * 1e3:7.1f} ms ({ratio:4.2f}x)")
    print(f"{title:34} " + "   ".join(cells), flush=True)


def peak_rate(dtype):
    """Return what a large matrix product reaches here, in GFLOP/s: the machine's speed today."""
    a = torch.randn(1024, 1024).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    return 2 * 1024**3 * 10 / (time.perf_counter() - start) / 1e9


def main():
    """Print the versions, the speed of the machine, and the comparisons."""
    char_gpt.keep_freed_memory()  # helps the peers as well: what is compared is the code
    native = char_gpt.has_bfloat16(torch.device("cpu"))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    )
    print(f"{torch.get_num_threads()} threads, bfloat16 in hardware: {native}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products in {dtype}: {peak_rate(dtype):.0f} GFLOP/s")
    sizes = [(64, 256)] if sys.argv[1:] == ["classic"] else [(64, 256), (32, 128), (32, 64)]
    plain = stepper("plain", 64, 256, 0.2, False)
    contestants = {"ours": stepper("ours", 64, 256, 0.2, native), "plain": plain}
    compare("64x256 dropout 0.2, ours as it runs", contestants, 1)
    for B, T in sizes:
        for dropout in (0.2, 0.0):
            for bfloat16 in (True, False) if native else (False,):
                contestants = {
                    name: stepper(name, B, T, dropout, bfloat16)
                    for name in ("ours", "transformers", "encoder")
                }
                precision = "bfloat16" if bfloat16 else "float32"
                compare(f"{B}x{T} dropout {dropout} {precision}", contestants, 16384 // (B * T))


if __name__ == "__main__":
    main()
