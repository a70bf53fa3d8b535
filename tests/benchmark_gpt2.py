"""Measures gpt2.py at full size against transformers, with random weights, side by side in one run.

    python tests/benchmark_gpt2.py               everything for a CPU, several minutes
    python tests/benchmark_gpt2.py NAME ...      some of: equal generate cached parts position
                                                 start step tokens
    python tests/benchmark_gpt2.py --avx2 ...    as on a CPU without bfloat16 or AVX-512
    python tests/benchmark_gpt2.py gpu           on a CUDA GPU: training from scratch, and sampling

The weights are random ones of transformers, saved in OpenAI's format. Contestants take turns, so
that a machine that slows down slows them all. A figure is the median over the turns, a ratio the
median of the ratios within a turn. Reading speed is that of torch.sum over 240 MB of float32, the
best of five at each turn.
"""

import contextlib
import functools
import os
import platform
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
import transformers
from torch import nn

import gpt2

native = gpt2.has_bfloat16(torch.device("cpu")) and not AVX2
if AVX2:
    gpt2.has_bfloat16 = lambda device: False
SIZES = gpt2.model_sizes("pretrained")
OWN = gpt2.TEMPERATURE, gpt2.TOP_K, gpt2.TOP_P


@functools.cache
def folder():
    """Return a folder with gpt2.safetensors, a copy of gpt2.py, and the text."""
    place = tempfile.TemporaryDirectory()
    folder.keep = place
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(place.name)
    path = Path(place.name)
    (path / "model.safetensors").rename(path / "gpt2.safetensors")
    source = (ROOT / "gpt2.py").read_text(encoding="utf-8")
    if AVX2:
        insert = "has_bfloat16 = lambda device: False\n\n\nif __name__"
        source = source.replace("if __name__", insert)
    (path / "gpt2.py").write_text(source, encoding="utf-8")
    (path / "input.txt").symlink_to(ROOT / "input.txt")
    return path


def pair():
    """Return (GPT2LMHeadModel, LM) with the same random weights, both in eval mode."""
    ours = gpt2.load_pretrained(folder() / "gpt2.safetensors", **SIZES).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    values = {gpt2.openai_name(name): value for name, value in ours.state_dict().items()}
    turned = {n: v.t() if gpt2.is_turned(n, v) else v for n, v in values.items()}
    theirs.transformer.load_state_dict({n: v for n, v in turned.items() if n != "lm_head.weight"})
    return theirs, ours


def seconds(call):
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(contestants, turns):
    """Return {name: [seconds per turn]} of {name: call}, after a turn that does not count."""
    times = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, call in contestants.items():
            took = seconds(call)
            times[name] += [took] if turn else []
    return times


def ratio(times, slow, fast):
    """Return the median over the turns of slow / fast."""
    return statistics.median(s / f for s, f in zip(times[slow], times[fast], strict=True))


def reading_speed(numbers=torch.ones(60_000_000)):  # noqa: B008
    """Return GB/s of reading 240 MB, the best of five."""
    return numbers.nbytes / min(seconds(numbers.sum) for _ in range(5)) / 1e9


def equal():
    """Logits, loss, gradients and 200 greedy tokens against transformers, in float32."""
    gpt2.has_bfloat16, kept = lambda device: False, gpt2.has_bfloat16
    theirs, ours = pair()
    idx, targets = torch.randint(50257, (2, 2, 256))
    (logits, loss), their_logits = ours(idx, targets), theirs(idx).logits
    print(f"equal: largest difference of logits {(logits - their_logits).abs().max():.1e}")
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    print(f"equal: difference of losses {abs(loss.item() - their_loss.item()):.1e}")
    loss.backward()
    their_loss.backward()
    found = {gpt2.openai_name(name): p.grad for name, p in ours.named_parameters()}
    worst = 0.0
    for name, p in theirs.named_parameters():
        gradient = found[name.removeprefix("transformer.")]
        gradient = gradient.t() if gpt2.is_turned(name, gradient) else gradient
        worst = max(worst, ((gradient - p.grad).norm() / p.grad.norm()).item())
    print(f"equal: largest relative difference of a gradient {worst:.1e}")
    ids = idx[0, :32].tolist()
    options = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    reference = theirs.generate(torch.tensor([ids]), **options)[0, 32:].tolist()
    cached = list(gpt2.generate(ours, ids, 200, 0))
    print(f"equal: greedy, ours and transformers.generate: {cached == reference}")
    halves = list(gpt2.generate(gpt2.for_generation(ours), ids, 200, 0))
    print(f"equal: greedy, 16-bit weights and float32: {halves == cached}")
    gpt2.has_bfloat16 = kept


def generate():
    """Tokens per second, prompt 32, 200 new tokens, batch 1."""
    theirs, ours = pair()
    ids = torch.randint(50257, (32,)).tolist()
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    half = gpt2.for_generation(ours)
    print(f"generate: packing the weights takes {time.perf_counter() - start:.2f} s")
    contestants = {
        "transformers float32": lambda: theirs.generate(torch.tensor([ids]), **options),
        "float32": lambda: list(gpt2.generate(ours, ids, 200, 0)),
        "own default": lambda: list(gpt2.generate(half, ids, 200, *OWN)),
    }
    times, speeds = {name: [] for name in contestants}, []
    for turn in range(5):
        for name, call in contestants.items():
            took = seconds(call)
            times[name] += [took] if turn else []
        speeds.append(reading_speed())
    speed = statistics.median(speeds)
    weights = sum(p.numel() for n, p in ours.named_parameters() if "position" not in n)
    print(f"generate: reading runs at {speed:.1f} GB/s (best {max(speeds):.1f})")
    for name, its_times in times.items():
        rate = 200 / statistics.median(its_times)
        size = 2 if name == "own default" and half is not ours else 4
        print(
            f"generate: {name:>21} {rate:6.1f} tokens/s, "
            f"{ratio(times, 'transformers float32', name):.2f} x transformers float32, "
            f"{rate * weights * size / speed / 1e9:.0%} of the reading speed"
        )


@torch.no_grad()
def position():
    """The cost of a token at position 1,000 against one at 100."""
    _, ours = pair()
    for name, model in (("32 bits", ours), ("own default", gpt2.for_generation(ours))):
        costs = {}
        for place in (100, 1000):
            caches = [gpt2.Cache(1024) for _ in model.blocks]
            model(torch.randint(50257, (1, place)), caches=caches)
            token = torch.tensor([[5]])
            times = [seconds(functools.partial(model, token, caches=caches)) for _ in range(20)]
            costs[place] = statistics.median(times) * 1e3
        print(
            f"position: {name}: {costs[100]:.2f} ms at 100, {costs[1000]:.2f} ms at 1,000: "
            f"{costs[1000] / costs[100]:.2f} x"
        )


def start(turns=3):
    """Seconds from the start of --sample to its prompt and first token, the weights being there."""
    command, took = [sys.executable, "gpt2.py", "--sample", "--prompt", "START"], []
    for _ in range(turns):
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=folder(), stdout=subprocess.PIPE) as child:
            printed = b""
            while b"START" not in printed[:-1]:
                if not (byte := child.stdout.read(1)):
                    sys.exit("start: gpt2.py has ended without a sample")
                printed += byte
            took.append(time.perf_counter() - begin)
            print("start: " + child.stdout.read().decode().strip().split("\n")[-1])
    print(f"start: the first token after {statistics.median(took):.2f} s, of {turns} runs")


def step():
    """A fine-tuning step: 4 x 256 tokens, fused AdamW, dropout 0.1, clipping.

    transformers has all four windows in one batch; gpt2.py that, and two batches of two windows."""
    theirs, ours = pair()
    gpt2.keep_freed_memory()
    x, y = torch.randint(50257, (2, 4, 256))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, fused=True)
    optimizers = gpt2.make_optimizers(ours)
    theirs.train()

    def their_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=native):
            logits = theirs(x).logits
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def our_step(batch_size):
        gpt2.BATCH_SIZE = batch_size
        gpt2.train_step(ours, optimizers, x, y, 1e-5)

    times = take_turns(
        {
            "transformers": their_step,
            "gpt2.py, B=4": functools.partial(our_step, 4),
            "gpt2.py, B=2": functools.partial(our_step, 2),
        },
        turns=6,
    )
    flops = 6 * sum(p.numel() for p in ours.parameters()) * x.numel()
    for name, its_times in times.items():
        median = statistics.median(its_times)
        print(
            f"step: {name:>12} {'bfloat16' if native else 'float32'} {median:.2f} s, "
            f"{flops / median / 1e12:.2f} TFLOP/s, {ratio(times, 'transformers', name):.2f} x"
        )


MEMORY = """
import re, resource, sys, time
import gpt2
from pathlib import Path
def peak():  # VmHWM: the most memory this process has had, in KiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
tokenizer = gpt2.Tokenizer()
before, start = peak(), time.perf_counter()
tokens = gpt2.load_tokens(Path("large.txt"), tokenizer)
took = time.perf_counter() - start
after = peak()
gpt2.get_batch(tokens, 4, 256, "cpu")
print(len(tokens), took, after - before)
"""


def tokens(megabytes=1000):
    """Speed and memory of encoding 1 GB of text."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    with open(folder() / "large.txt", "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": folder(), "check": True, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, **options)
    n, took, memory = map(float, done.stdout.split("\n")[-2].split())
    print(f"tokens: {megabytes} MB, {n:,.0f} tokens in {took:.0f} s: {megabytes / took:.1f} MB/s")
    print(f"tokens: {memory:.0f} MB of memory above the start, mapped parts of files included")
    (folder() / "large.txt").unlink()


@torch.no_grad()
def cached():
    """Milliseconds for one more token after 10, 100 and 1,000, with and without a cache."""
    _, ours = pair()
    half = gpt2.for_generation(ours)
    for n in (10, 100, 1000):
        idx = torch.randint(50257, (1, n))
        full, one = [], []
        for _ in range(3):
            caches = [gpt2.Cache(1024) for _ in half.blocks]
            full.append(seconds(functools.partial(half, idx, caches=caches)))
        token = torch.tensor([[5]])
        one = [seconds(functools.partial(half, token, caches=caches)) for _ in range(10)]
        without, with_it = (statistics.median(times) * 1e3 for times in (full, one))
        print(f"cached: after {n:,} tokens {with_it:.1f} ms, without a cache {without:.0f} ms")


@torch.no_grad()
def parts():
    """Where one token's time goes: products, attention, norms and other operators, Python, draw."""
    _, ours = pair()
    half = gpt2.for_generation(ours)
    caches = [gpt2.Cache(1024) for _ in half.blocks]
    half(torch.randint(50257, (1, 100)), caches=caches)
    token = torch.tensor([[5]])
    call = functools.partial(half, token, caches=caches)
    times = [seconds(call) for _ in range(30)]
    whole = statistics.median(times[5:]) * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(20):
            call()
    groups = {"products": ("mm", "linear", "matmul", "mv"), "attention": ("scaled_dot_product",)}
    sums = dict.fromkeys((*groups, "other operators"), 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        own = [group for group, words in groups.items() if any(word in name for word in words)]
        sums[own[0] if own else "other operators"] += event.self_cpu_time_total / 20 / 1e3
    logits = torch.randn(50257)

    def draw():
        torch.multinomial(gpt2.next_token_probabilities(logits, *OWN), 1).item()

    drawn = statistics.median(seconds(draw) for _ in range(30)) * 1e3
    words = ", ".join(f"{group} {ms:.2f}" for group, ms in sums.items())
    print(f"parts: ms a token, with the profiler's own: {words}")
    print(f"parts: the model's call {whole:.2f} ms without the profiler, the draw {drawn:.2f} ms")


def gpu(steps=20):
    """On CUDA: model FLOPs utilisation of training from scratch, tokens/s of sampling."""
    device = torch.device("cuda")
    sizes = SIZES | {"vocab_size": 50_304, "dropout": 0.0}
    model = gpt2.LM(**sizes).to(device)
    compiled, optimizers = gpt2.compile_model(model), gpt2.make_optimizers(model)
    n_windows = gpt2.TOKENS_PER_STEP // gpt2.WINDOW
    x, y = torch.randint(50257, (2, n_windows, gpt2.WINDOW), device=device)
    for count in (3, steps):  # the first are not counted
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            gpt2.train_step(compiled, optimizers, x, y, 6e-4)
        torch.cuda.synchronize()
        rate = count * x.numel() / (time.perf_counter() - start)
    # 6 per parameter and token (Kaplan et al. 2020), and 12 T C per block for attention
    per_token = 6 * sum(p.numel() for p in model.parameters()) + 12 * 12 * 1024 * 768
    name = torch.cuda.get_device_name()
    print(f"gpu: {name}: training {rate:,.0f} tokens/s, {rate * per_token / 1e12:.0f} TFLOP/s")
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(f"gpu: compiled {compiled is not model}, {memory:.1f} GB")
    quick = gpt2.for_generation(model)
    list(gpt2.generate(quick, list(range(32)), 50, *OWN))
    took = seconds(lambda: list(gpt2.generate(quick, list(range(32)), 500, *OWN)))
    print(f"gpu: sampling {500 / took:.0f} tokens/s")


if __name__ == "__main__":
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, bfloat16: {native}"
    )
    every = ("equal", "generate", "cached", "parts", "position", "start", "step", "tokens")
    with contextlib.suppress(KeyboardInterrupt):
        for name in [word for word in sys.argv[1:] if word != "--avx2"] or every:
            globals()[name]()
            sys.stdout.flush()
