"""Measures char_gpt.py: a training step beside other code, and whole runs in "plain steps".

    python tests/benchmark.py                    training steps, about 3 minutes on 2 cores
    python tests/benchmark.py run quick a100     whole runs of the README's presets, as processes
    python tests/benchmark.py run default        ... with the constants of the file
    python tests/benchmark.py parts              what each part of the model is worth, 25 minutes
    python tests/benchmark.py rates              three optimizers at several rates, 15 minutes
    python tests/benchmark.py --avx2 ...         as on a CPU without bfloat16 or AVX-512

A plain step is a training step of the model that most courses write: one module per head, float32,
dropout on the attention weights, AdamW; 12 windows of 64, 4 layers, 4 heads, 128 wide. It is the
unit of time that carries over from one machine to another. The peers of the other comparisons have
the sizes, the data and the optimizer (fused AdamW) of ours:
- plain: as above, at their sizes
- transformers: GPT2LMHeadModel, with its own choice of attention
- encoder: a stack of torch.nn.TransformerEncoderLayer with a causal mask
- sdpa: ours, with F.scaled_dot_product_attention in Head

Each figure is a median over rounds in which all take turns, and ratios are medians of the ratios
within a round. The plain step of a run is timed before and after it.
"""

import contextlib
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AVX2 = "--avx2" in sys.argv
if AVX2:  # before torch is imported: its kernels, oneDNN's and MKL's as on a CPU with AVX2 only
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    os.environ |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn

import char_gpt

native = char_gpt.has_bfloat16(torch.device("cpu")) and not AVX2
ROUNDS = 4
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


class Fused(nn.Module):
    """Stands where Head stands: PyTorch's own attention."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def build(name, T, dropout):
    """Return a function (x, y) -> loss, and the module behind it."""
    if name in ("ours", "sdpa"):
        model = char_gpt.LM(V, T, C, H, L, dropout)
        for block in model.blocks:
            block.attention.head = Fused() if name == "sdpa" else block.attention.head
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
    import transformers

    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)

    def loss(x, y):
        return F.cross_entropy(model(x).logits.flatten(0, 1).float(), y.flatten())

    return loss, model


def stepper(name, B, T, dropout, bfloat16, muon=False):
    """Return a function that takes one training step."""
    torch.manual_seed(0)
    loss, model = build(name, T, dropout)
    model.train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    if muon:
        optimizers = char_gpt.make_optimizers(model)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-4
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))

    def step():
        char_gpt.has_bfloat16 = lambda device: bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(x, y)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def compare(title, contestants, repeat, rounds=ROUNDS):
    """Time contestants {name: step}; print milliseconds per step, and ratios to the first."""
    for step in contestants.values():
        step()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            seconds[name].append((time.perf_counter() - start) / repeat)
    first = seconds[next(iter(contestants))]
    cells = []
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, first, strict=True))
        cells.append(f"{name} {statistics.median(times) * 1e3:7.1f} ms ({ratio:4.2f}x)")
    print(f"{title:34} " + "   ".join(cells), flush=True)


def steps():
    """Compare training steps."""
    sizes = ((64, 256, 0.2), (32, 128, 0.0), (64, 64, 0.0))
    for B, T, dropout in sizes:
        for bfloat16 in (True, False) if native else (False,):
            names = ("ours", "sdpa", "transformers", "encoder")
            contestants = {name: stepper(name, B, T, dropout, bfloat16) for name in names}
            contestants["plain, float32"] = stepper("plain", B, T, dropout, False)
            precision = "bfloat16" if bfloat16 else "float32"
            compare(f"{B}x{T} dropout {dropout} {precision}", contestants, max(1, 8192 // (B * T)))
    contestants = {
        "AdamW": stepper("ours", 32, 128, 0.0, native),
        "Muon": stepper("ours", 32, 128, 0.0, native, muon=True),
    }
    compare("32x128, ours, by optimizer", contestants, 2)


def plain_step(rounds=40):
    """Return the median seconds of a plain step."""
    step = stepper("plain", 12, 64, 0.0, False)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def presets(script):
    """Return {name: source} of the presets of a script."""
    texts = [path for path in (ROOT / "README.md", ROOT / "tests/RESULTS.md") if path.exists()]
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    block = rf"```python\n# preset ([\w-]+): {script}\.py\n(.*?)```"
    return dict(re.findall(block, text, flags=re.S))


def run(script, name, folder, edits=""):
    """Run a preset as a process of its own; print its lines, loss, time and memory."""
    source = "" if name == "default" else presets(script)[name]
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); import {script} as gpt\n"
        f"exec({source + edits!r}, vars(gpt))\n"
        + ("gpt.has_bfloat16 = lambda device: False\n" if not native else "")
        + "print(json.dumps(gpt.main([])), flush=True)\n"
    )
    before, start, line = plain_step(), time.perf_counter(), "{}"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE)
    for raw in child.stdout:
        line = raw.decode()
        print(f"{time.perf_counter() - start:7.1f} s  {line[:200].rstrip()}", flush=True)
    child.wait()
    seconds = time.perf_counter() - start
    after = plain_step()
    results = json.loads(line)
    plain = statistics.mean((before, after))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3  # the largest so far
    print(
        f"{name}: loss {results['val_loss']:.4f}, {seconds:.1f} s = {seconds / plain:,.0f} plain "
        f"steps of {before * 1e3:.1f} and {after * 1e3:.1f} ms, {memory:.0f} MB at most, "
        f"{results['tokens_per_second']:,.0f} tokens/s, training {results['seconds']:.1f} s",
        flush=True,
    )


# --- what each part is worth ----------------------------------------------------------------------
SEEDS = (1337, 1)
ADAMW = [("\nMUON = True", "\nMUON = False")]
SGD = [
    *ADAMW,
    (
        "    return [adamw, Muon(by_muon, WEIGHT_DECAY)] if by_muon else [adamw]",
        "    return [torch.optim.SGD(model.parameters(), lr=1.0)]",
    ),
]
ADAMW_RATE = "ADAMW_LEARNING_RATE = 1e-3 if FAST_GPU else 1.6e-2"
MUON_RATE = "LEARNING_RATE = 1e-3 if FAST_GPU else 8e-3  # the peak"
ATTENTION = "x = x + self.attention(self.ln1(x))"
FEED_FORWARD = "return x + self.feed_forward(self.ln2(x))"
N_LAYERS = "N_LAYERS = 6 if FAST_GPU else 4"
PARTS = {  # what is changed: [(text in char_gpt.py, text in its place)]
    "nothing": [],
    "no blocks": [(N_LAYERS, "N_LAYERS = 0")],
    "no attention": [(ATTENTION, "x = x")],
    "one head": [("N_HEADS = 6 if FAST_GPU else 4", "N_HEADS = 1")],
    "no positions": [(" + self.position_embedding.weight[:T]", "")],
    "no feed-forward": [(FEED_FORWARD, "return x")],
    "no residuals": [
        (ATTENTION, "x = self.attention(self.ln1(x))"),
        (FEED_FORWARD, "return self.feed_forward(self.ln2(x))"),
    ],
    "no LayerNorm": [
        ("self.ln1 = nn.LayerNorm(n_embed)", "self.ln1 = nn.Identity()"),
        ("self.ln2 = nn.LayerNorm(n_embed)", "self.ln2 = nn.Identity()"),
        ("self.ln_f = nn.LayerNorm(n_embed)", "self.ln_f = nn.Identity()"),
    ],
    "no scale": [("(q / hs**0.5) @", "q @")],
    "no mask": [("F.softmax(scores + mask, dim=-1)", "F.softmax(scores, dim=-1)")],
    "no warm-up": [("WARMUP_ITERS = 100", "WARMUP_ITERS = 0")],
    "a constant rate": [("FINAL_LR = 0.0", "FINAL_LR = 1.0")],
    "AdamW alone": ADAMW,
    "SGD alone": [*SGD, (ADAMW_RATE, "ADAMW_LEARNING_RATE = 3.0")],
    "one block": [(N_LAYERS, "N_LAYERS = 1")],
    "eight blocks": [(N_LAYERS, "N_LAYERS = 8")],
    "T = 16": [("BLOCK_SIZE = 256 if FAST_GPU else 128", "BLOCK_SIZE = 16")],
    "dropout 0.2": [("DROPOUT = 0.2 if FAST_GPU else 0.0", "DROPOUT = 0.2")],
    "biases on q, k, v": [("3 * n_embed, bias=False)", "3 * n_embed)")],
    "no clipping": [("GRADIENT_CLIP = 1.0", "GRADIENT_CLIP = None")],
    "no weight decay": [("WEIGHT_DECAY = 0.1 if FAST_GPU else 0.5", "WEIGHT_DECAY = 0.0")],
}
RATES = {
    "Muon": ([], MUON_RATE, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "AdamW": (ADAMW, ADAMW_RATE, (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)),
    "SGD": (SGD, ADAMW_RATE, (0.3, 1.0, 3.0, 6.0)),
}


def edited(edits):
    """Return the source of char_gpt.py with all edits made. ValueError: one has no place."""
    source = (ROOT / "char_gpt.py").read_text(encoding="utf-8")
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"char_gpt.py has {source.count(old)} places {old!r}")
        source = source.replace(old, new)
    return source


def train_edited(edits, seed, steps):
    """Train an edited char_gpt.py as a process of its own. Return its results."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "char_gpt.py").write_text(edited(edits), encoding="utf-8")
        flags = ["--data", str(ROOT / "input.txt"), "--max-iters", str(steps), "--seed", str(seed)]
        code = f"import char_gpt, json; print(json.dumps(char_gpt.main({flags!r})))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"val_loss": math.nan, "seconds": math.nan, "text": done.stderr.splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def simplest_models():
    """Print the loss of two models that only count, on the same validation text."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    splits = char_gpt.split_text(text, char_gpt.Tokenizer(text), 0.9, 128)
    train, val = splits["train"], splits["val"]
    pairs = torch.zeros(V, V).index_put_((train[:-1], train[1:]), torch.tensor(1.0), True)
    single = train.bincount(minlength=V) / len(train)
    after = (pairs + 0.1) / (pairs + 0.1).sum(1, keepdim=True)  # 0.1: no pair is impossible
    print(f"uniform: {math.log(V):.4f}")
    print(f"frequencies of characters: {-single[val[1:]].log().mean():.4f}")
    print(f"the character before: {-after[val[:-1], val[1:]].log().mean():.4f}", flush=True)


def parts(names, steps=400):
    """Print what each edit makes of the loss, with two seeds."""
    for edits in PARTS.values():
        edited(edits)  # all have their place
    simplest_models()
    for name in names or PARTS:
        runs = [train_edited(PARTS[name], seed, steps) for seed in SEEDS]
        losses = "  ".join(f"{run['val_loss']:.4f}" for run in runs)
        print(f"{name:20} {losses}  {runs[0]['seconds']:.0f} s", flush=True)
        if name == "no mask" or math.isnan(runs[0]["val_loss"]):
            print(f"    {runs[0]['text'][:80]!r}", flush=True)


def rates(names, steps=400):
    """Print the loss of each optimizer at several rates, with two seeds."""
    for name in names or RATES:
        edits, line, values = RATES[name]
        for rate in values:
            change = (line, line.partition("=")[0] + f"= {rate}  # the peak")
            runs = [train_edited([*edits, change], seed, steps) for seed in SEEDS]
            losses = "  ".join(f"{run['val_loss']:.4f}" for run in runs)
            print(f"{name:6} {rate:7}  {losses}", flush=True)


def main(script="char_gpt", data=ROOT / "input.txt", steps=steps):
    """Print the versions, the kind of machine, and what the command line asks for."""
    words = [word for word in sys.argv[1:] if word != "--avx2"]
    char_gpt.keep_freed_memory()  # helps the peers as well: what is compared is the code
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {platform.machine()}, {capability}, bfloat16: {native}")
    print(f"{torch.get_num_threads()} threads, plain step: {plain_step() * 1e3:.1f} ms")
    if "run" in words:
        for name in words[words.index("run") + 1 :]:
            name, _, edits = name.partition(":")  # as in default:MAX_ITERS=400
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / data.name).symlink_to(data.resolve())
                run(script, name, folder, edits)
    elif words[:1] == ["parts"]:
        parts(words[1:])
    elif words[:1] == ["rates"]:
        rates(words[1:])
    else:
        with contextlib.suppress(KeyboardInterrupt):
            steps()


if __name__ == "__main__":
    main()
