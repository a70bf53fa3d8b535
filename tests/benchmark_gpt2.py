"""Measures gpt2.py at full size against transformers, with random weights, side by side in one run.

    python tests/benchmark_gpt2.py             everything for a CPU, in minutes
    python tests/benchmark_gpt2.py NAME...     some of: equal, generate, position, step, parts,
                                               loading, encoding
    python tests/benchmark_gpt2.py gpu         on a CUDA GPU: training from scratch, and sampling

Contestants take turns, so that a machine that slows down slows them all. A figure is the median
over the turns, a ratio the median of the ratios within a turn. Reading speed is that of torch.sum
over 240 MB of float32, the best of five at each turn.
"""

import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import gpt2

SIZES = {
    "vocab_size": gpt2.VOCAB_SIZE,
    "block_size": gpt2.BLOCK_SIZE,
    "n_embed": gpt2.N_EMBED,
    "n_heads": gpt2.N_HEADS,
    "n_layers": gpt2.N_LAYERS,
    "dropout": gpt2.DROPOUT,
    "qkv_bias": gpt2.QKV_BIAS,
}
GREEDY = {"temperature": 0}
OWN = {"temperature": gpt2.TEMPERATURE, "top_k": gpt2.TOP_K, "top_p": gpt2.TOP_P}


def pair():
    """Return (GPT2LMHeadModel with its own random weights, LM with the same), both in eval mode."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = gpt2.load_pretrained(f"{folder}/model.safetensors", **SIZES)
    return theirs, ours


def seconds(call):
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(contestants, turns, warm_up=1):
    """Return {name: [seconds per turn]} of {name: call}."""
    for _ in range(warm_up):
        for call in contestants.values():
            call()
    times = {name: [] for name in contestants}
    for _ in range(turns):
        for name, call in contestants.items():
            times[name].append(seconds(call))
    return times


def ratio(times, slow, fast):
    """Return the median over the turns of slow / fast."""
    return statistics.median(s / f for s, f in zip(times[slow], times[fast], strict=True))


def reading_speed(numbers=torch.ones(60_000_000)):  # noqa: B008
    """Return GB/s of reading 240 MB, the best of five."""
    return numbers.nbytes / min(seconds(numbers.sum) for _ in range(5)) / 1e9


def equal():
    """Logits, loss, gradients and 200 greedy tokens against transformers, in float32."""
    theirs, ours = pair()
    idx, targets = torch.randint(50257, (2, 2, 256))
    with torch.no_grad():
        logits = ours(idx)[0], theirs(idx).logits
    print(f"equal: largest difference of logits {(logits[0] - logits[1]).abs().max():.1e}")
    loss = ours(idx, targets)[1]
    their_loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    print(f"equal: difference of losses {abs(loss.item() - their_loss.item()):.1e}")
    loss.backward()
    their_loss.backward()
    gradients = gpt2.hub_weights({n: p.grad for n, p in ours.named_parameters()})
    worst = max(
        ((gradients[n.removeprefix("transformer.")] - p.grad).norm() / p.grad.norm()).item()
        for n, p in theirs.named_parameters()
    )
    print(f"equal: largest relative difference of a gradient {worst:.1e}")
    ids = idx[0, :32].tolist()
    reference = theirs.generate(
        torch.tensor([ids]), max_new_tokens=200, do_sample=False, pad_token_id=0
    )[0, 32:].tolist()
    cached = list(gpt2.generate(ours, ids, 200, **GREEDY, half_weights=False))
    halves = list(gpt2.generate(ours, ids, 200, **GREEDY, half_weights=True))
    uncached = list(ids)
    with torch.no_grad():
        for _ in range(200):
            uncached.append(ours(torch.tensor([uncached]))[0][0, -1].argmax().item())
    print(f"equal: greedy, cached and transformers.generate: {cached == reference}")
    print(f"equal: greedy, cached and uncached: {cached == uncached[32:]}")
    print(f"equal: greedy, 16-bit weights and float32: {halves == cached}")


def generate():
    """Tokens per second, prompt 32, 200 new tokens, batch 1."""
    theirs, ours = pair()
    ids = torch.randint(50257, (32,)).tolist()
    prompt = torch.tensor([ids])

    def peer(model):
        model.generate(
            prompt, max_new_tokens=200, min_new_tokens=200, do_sample=False, pad_token_id=0
        )

    start = time.perf_counter()
    half = gpt2.for_generation(ours, half_weights=True)
    print(f"generate: packing the weights takes {time.perf_counter() - start:.2f} s")
    single = gpt2.for_generation(ours, half_weights=False)
    theirs_bfloat16 = transformers.GPT2LMHeadModel(theirs.config).bfloat16().eval()
    contestants = {
        "transformers float32": lambda: peer(theirs),
        "transformers bfloat16": lambda: peer(theirs_bfloat16),
        "float32": lambda: list(gpt2.generate(single, ids, 200, **GREEDY)),
        "own defaults": lambda: list(gpt2.generate(half, ids, 200, **OWN)),
    }
    speeds = [reading_speed()]
    times = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(5):
        for name, call in contestants.items():
            times[name].append(seconds(call))
        speeds.append(reading_speed())
    speed = statistics.median(speeds)
    weights = sum(p.numel() for n, p in ours.named_parameters() if "position" not in n)
    print(f"generate: reading runs at {speed:.1f} GB/s (best {max(speeds):.1f})")
    for name, its_times in times.items():
        rate = 200 / statistics.median(its_times)
        size = 2 if name in ("own defaults", "transformers bfloat16") else 4
        print(
            f"generate: {name:>21} {rate:6.1f} tokens/s, "
            f"{ratio(times, 'transformers float32', name):.2f} x transformers float32, "
            f"{rate * weights * size / speed / 1e9:.0%} of the reading speed"
        )


def position():
    """The cost of a token at position 1,000 against one at 100."""
    _, ours = pair()
    for half_weights in (True, False):
        quick = gpt2.for_generation(ours, half_weights)
        costs = {}
        for place in (100, 1000):
            caches = [gpt2.Cache(1024) for _ in quick.blocks]
            with torch.inference_mode():
                quick(torch.randint(50257, (1, place)), caches=caches)
                token = torch.tensor([[5]])
                times = [seconds(functools.partial(quick, token, caches=caches)) for _ in range(20)]
            costs[place] = statistics.median(times)
        print(
            f"position: {'16' if half_weights else '32'} bits: {costs[100] * 1e3:.2f} ms at 100, "
            f"{costs[1000] * 1e3:.2f} ms at 1,000: {costs[1000] / costs[100]:.2f} x"
        )


def step():
    """A fine-tuning step: 4 x 256 tokens, bfloat16 autocast, fused AdamW, dropout 0.1."""
    theirs, ours = pair()
    gpt2.keep_freed_memory()
    x, y = torch.randint(50257, (2, 4, 256))
    optimizers = {}

    def update(model, loss_of):
        model.train()
        if model not in optimizers:
            optimizers[model] = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        with gpt2.mixed_precision(x.device):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[model].step()
        optimizers[model].zero_grad()

    def their_loss():
        return F.cross_entropy(theirs(x).logits.flatten(0, 1).float(), y.flatten())

    times = take_turns(
        {
            "transformers": lambda: update(theirs, their_loss),
            "gpt2.py": lambda: update(ours, lambda: ours(x, y)[1]),
        },
        turns=5,
    )
    flops = 6 * gpt2.count_parameters(ours) * x.numel()
    for name, its_times in times.items():
        median = statistics.median(its_times)
        print(
            f"step: {name:>12} {median:.2f} s, {flops / median / 1e12:.2f} TFLOP/s, "
            f"{ratio(times, 'transformers', name):.2f} x transformers"
        )


def parts():
    """What was compared to choose the forms of the attention, the loss and a linear layer."""
    gpt2.keep_freed_memory()
    T, hs, V, C = 256, 64, 50257, 768

    def written(queries, keys, values):
        scores = (queries * hs**-0.5) @ keys.transpose(-2, -1)
        future = torch.full((T, T), float("-inf"), dtype=scores.dtype).triu(1)
        return F.softmax(scores + future, dim=-1) @ values

    def fused(queries, keys, values):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    def attend(form, precision):
        x = torch.randn(4, T, 3 * C).to(precision).requires_grad_()
        parts = (part.view(4, T, 12, hs).transpose(1, 2) for part in x.split(C, dim=-1))
        form(*parts).transpose(1, 2).reshape(4, T, C).sum().backward()

    bf16, f32 = torch.bfloat16, torch.float32
    times = take_turns(
        {
            f"{form.__name__} {precision}": lambda f=form, p=precision: attend(f, p)
            for form in (written, fused)
            for precision in (bf16, f32)
        },
        turns=7,
    )
    for name, its_times in times.items():
        print(f"parts: attention {name:>22} {statistics.median(its_times) * 1e3:7.1f} ms")

    weight = nn.Parameter(torch.randn(V, C) * 0.02)
    features, targets = torch.randn(1024, C), torch.randint(V, (1024,))
    head = nn.Linear(C, V, bias=False)
    head.weight = weight

    def loss(form):
        weight.grad = None
        x = features.clone().requires_grad_()
        with gpt2.mixed_precision(x.device):
            form(x).backward()

    def chunked(x):
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, targets, options=options)

    times = take_turns(
        {
            "F.cross_entropy": lambda: loss(lambda x: F.cross_entropy(head(x).float(), targets)),
            "slices of 512": lambda: loss(lambda x: gpt2.sliced_loss(head, x, targets, 512)),
            "slices of 256": lambda: loss(lambda x: gpt2.sliced_loss(head, x, targets, 256)),
            "linear_cross_entropy": lambda: loss(
                lambda x: F.linear_cross_entropy(x, weight, targets)
            ),
            "linear_cross_entropy, chunked": lambda: loss(chunked),
        },
        turns=3,
    )
    for name, its_times in times.items():
        print(f"parts: loss {name:>30} {statistics.median(its_times):6.2f} s")

    weights = [torch.randn(3072, C) for _ in range(24)]
    halves = [w.half() for w in weights]
    thin = [w.bfloat16() for w in weights]
    turned = [w.t().contiguous() for w in weights]
    packed = [torch.ops.quantized.linear_prepack_fp16(w, None) for w in weights]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w, 1) for w in thin]
    row = torch.randn(1, C)
    half_row, thin_row = row.half(), row.bfloat16()
    direct = torch.ops.mkldnn._linear_pointwise

    @torch.no_grad()
    def each(call, matrices):
        for matrix in matrices:
            call(matrix)

    forms = {
        "F.linear float32": (4, lambda w: F.linear(row, w), weights),
        "x @ W float32": (4, lambda w: row @ w, turned),
        "oneDNN float32": (4, lambda w: direct(row, w, None, "none", [], ""), weights),
        "F.linear bfloat16": (2, lambda w: F.linear(thin_row, w), thin),
        "oneDNN packed bfloat16": (
            2,
            lambda w: direct(thin_row, w, None, "none", [], ""),
            reordered,
        ),
        "F.linear float16": (2, lambda w: F.linear(half_row, w), halves),
        "FBGEMM packed float16": (
            2,
            lambda p: torch.ops.quantized.linear_dynamic_fp16(row, p),
            packed,
        ),
    }
    times = take_turns(
        {name: lambda f=form: each(f[1], f[2]) for name, form in forms.items()}, turns=11
    )
    print(f"parts: one row, weights of 3072 x 768; reading runs at {reading_speed():.1f} GB/s")
    for name, its_times in times.items():
        numbers = forms[name][0] * 24 * 3072 * C
        print(f"parts: linear {name:>24} {numbers / statistics.median(its_times) / 1e9:5.1f} GB/s")


PEAK = """
import resource, sys
import torch
{before}
def peak():  # VmHWM: the most memory this process has had, in KiB
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1e3
start = peak()
{what}
print(f"{{peak() - start:.0f}}")
"""


def peak_memory(before, what, cwd):
    """Return the MB by which `what` raises the peak of a fresh interpreter, after `before`."""
    program = PEAK.format(before=before, what=what)
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return float(finished.stdout.split()[-1])


def loading():
    """Peak memory of loading the weights, above the bare interpreter with torch."""
    with tempfile.TemporaryDirectory() as folder:
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
        size = Path(folder, "model.safetensors").stat().st_size / 1e6
        what = f"import gpt2; model = gpt2.load_pretrained('model.safetensors', **{SIZES!r})"
        peak = peak_memory("", what, folder)
        start = time.perf_counter()
        gpt2.load_pretrained(f"{folder}/model.safetensors", **SIZES)
    print(
        f"loading: {time.perf_counter() - start:.1f} s; peak {peak:.0f} MB for a file of "
        f"{size:.0f} MB: {peak / size:.2f} x"
    )


def encoding(megabytes=1000):
    """Peak memory and speed of preparing 1 GB of text."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/large.txt", "w", encoding="utf-8") as file:
            while file.tell() < megabytes * 1e6:
                file.write(text)
        start = time.perf_counter()
        peak = peak_memory(
            "",
            "import gpt2; print(len(gpt2.load_tokens('large.txt', None, None, gpt2.Tokenizer())))",
            folder,
        )
        duration = time.perf_counter() - start
    print(
        f"encoding: {megabytes} MB in {duration:.0f} s: {megabytes / duration:.1f} MB/s, "
        f"peak {peak:.0f} MB above the start"
    )


def gpu(steps=10, batch_size=16):
    """On CUDA: model FLOPs utilisation of training from scratch, tokens/s of sampling."""
    device = torch.device("cuda")
    model = gpt2.LM(**SIZES).to(device)
    compiled = torch.compile(model)
    (optimizer,) = gpt2.make_optimizers(model, 6e-4, (0.9, 0.95), 0.1)
    x, y = torch.randint(50257, (2, batch_size, gpt2.BLOCK_SIZE), device=device)

    def update():
        with gpt2.mixed_precision(device):
            loss = compiled(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        update()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        update()
    torch.cuda.synchronize()
    rate = steps * x.numel() / (time.perf_counter() - start)
    # 6 per parameter and token (Kaplan et al. 2020), and 12 T C per block for attention
    per_token = 6 * gpt2.count_parameters(model) + 12 * gpt2.N_LAYERS * 1024 * gpt2.N_EMBED
    print(f"gpu: training {rate:,.0f} tokens/s, {rate * per_token / 790e12:.0%} of 790 TFLOP/s")
    quick = gpt2.for_generation(model, half_weights=True)
    ids = list(range(32))
    list(gpt2.generate(quick, ids, 50, **OWN))
    took = seconds(lambda: list(gpt2.generate(quick, ids, 500, **OWN)))
    print(f"gpu: sampling {500 / took:.0f} tokens/s")


if __name__ == "__main__":
    torch.set_num_threads(min(2, os.cpu_count()))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    every = (equal, generate, position, step, parts, loading, encoding)
    chosen = [globals()[name] for name in sys.argv[1:]] or every
    for measure in chosen:
        measure()
        sys.stdout.flush()
