"""Measures word_gpt.py: a training step beside the plain softmax, whole runs, and its windows.

    python tests/benchmark_word.py                       training steps, 1 minute on 2 cores
    python tests/benchmark_word.py ARCHIVE run default   a whole run; ARCHIVE: aclImdb_v1.tar.gz
    python tests/benchmark_word.py ARCHIVE windows 1337  three kinds of windows, 5 minutes a seed
    python tests/benchmark_word.py ARCHIVE ends RUN.pt   does a trained run know where reviews end?
    python tests/benchmark_word.py --avx2 ...            as on a CPU without bfloat16 or AVX-512

The words of the step are drawn so that the n-th commonest comes 1/n as often as the commonest
(Zipf's law): 73% are among the first 2,000 then, of the reviews' 84%. Precision, optimizers and
memory handling are those of word_gpt.py for both. For plain steps, and how the figures are taken,
see benchmark.py. Each line of a run is printed with the seconds since the process was started.
"""

import sys
import time
from pathlib import Path

import benchmark  # first: it reads --avx2 before torch is there
import torch
import torch.nn.functional as F

import word_gpt

V, B, T, C, H, L = 36_980, 32, 64, 256, 2, 2
EOS = word_gpt.Tokenizer.eos


def stepper(plain):
    """Return a function that takes one training step, with the plain softmax or with ours."""
    word_gpt.has_bfloat16 = lambda device: benchmark.native
    torch.manual_seed(0)
    model = word_gpt.LM(V, T, C, H, L, 0.0, () if plain else word_gpt.CUTOFFS)
    optimizers = word_gpt.make_optimizers(model)
    frequencies = 1 / torch.arange(1, V - 2)  # of the words: ids from 3 on
    x, y = 3 + torch.multinomial(frequencies, 2 * B * T, replacement=True).view(2, B, T)
    head = model.lm_head

    def losses(hidden, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=benchmark.native):
            logits = F.linear(hidden, head.weight, head.bias)
        return F.cross_entropy(logits.float(), targets)

    if plain:
        head.losses = losses
    return lambda: word_gpt.train_step(model, optimizers, x, y, 1e-4)


def steps():
    """Compare training steps."""
    contestants = {"ours": stepper(plain=False), "lm_head and cross_entropy": stepper(plain=True)}
    benchmark.compare(f"{B}x{T}, V = {V:,}", contestants, 3, rounds=6)


# --- where windows begin and end ------------------------------------------------------------------
def run_on(tokens, batch_size, block_size, device):
    """Windows that start anywhere, and run on into the next document."""
    return word_gpt.get_batch(tokens, batch_size, block_size, device)


def fill_up(tokens, batch_size, block_size, device):
    """Windows that start anywhere, and end with their document: <pad> follows."""
    edges = torch.cat([torch.zeros(1).long(), (tokens == EOS).nonzero().flatten() + 1])
    starts = torch.randint(len(tokens) - 1, (batch_size, 1))
    ends = edges[torch.bucketize(starts, edges, right=True)]
    return word_gpt.cut_windows(tokens, starts, ends, block_size)


def move_back(tokens, batch_size, block_size, device):
    """Windows that would reach beyond their document are moved back, until <eos> is the last."""
    edges = torch.cat([torch.zeros(1).long(), (tokens == EOS).nonzero().flatten() + 1])
    starts = torch.randint(len(tokens), (batch_size, 1))
    document = torch.bucketize(starts, edges, right=True)
    starts = starts.minimum(edges[document] - 1 - block_size).maximum(edges[document - 1])
    return word_gpt.cut_windows(tokens, starts, edges[document], block_size)


def windows(archive, seed, n_steps=600):
    """Train with windows of each kind. Print the loss, P(<eos>) and how long samples become."""
    documents = word_gpt.read_documents(archive, "spaced")
    parts = word_gpt.split_documents(documents, 0.8, 0.1)
    tokenizer = word_gpt.Tokenizer(word_gpt.build_vocabulary(parts["train"], 5))
    splits = word_gpt.split_text(parts, tokenizer)
    for get_batch in (run_on, fill_up, move_back):
        torch.manual_seed(seed)
        model = word_gpt.LM(tokenizer.vocab_size, T, C, H, L, 0.0, word_gpt.CUTOFFS)
        optimizers = word_gpt.make_optimizers(model)
        start = time.perf_counter()
        for step in range(n_steps):
            torch.manual_seed(seed * 1_000_000 + step)
            x, y = get_batch(splits["train"], B, T, "cpu")
            lr = word_gpt.get_lr(step, n_steps, word_gpt.LEARNING_RATE)
            word_gpt.train_step(model, optimizers, x, y, lr)
        seconds = time.perf_counter() - start
        metrics = word_gpt.estimate_loss(model, splits["val"], 64)
        p, share = eos_by_position(model, splits["val"])
        shown = " ".join(f"{p[t]:.4f}" for t in (0, 10, 20, 30, 40, 50, 60, 62, 63))
        eighths = zip(p.split(T // 8), share.split(T // 8), strict=True)
        ratios = " ".join(f"{ours.sum() / true.sum():.2f}" for ours, true in eighths)
        torch.manual_seed(1)
        ids = tokenizer.encode(word_gpt.PROMPT)
        lengths = [len(list(word_gpt.generate(model, ids, 300, 0.8))) for _ in range(60)]
        near = sum(abs(length + len(ids) - T) <= 5 for length in lengths)
        print(f"{get_batch.__name__}, seed {seed}: {metrics}, {seconds:.0f} s", flush=True)
        print(f"    P(<eos>) at 0 10 20 30 40 50 60 62 63: {shown}; true share {share.mean():.4f}")
        print(f"    P(<eos>) / share, by eighths of the window: {ratios}")
        print(f"    lengths of 60 samples, {near} near T: {sorted(lengths)}", flush=True)


@torch.no_grad()
def ends(archive, path):
    """Print P(<eos>) of a run where a review of the validation part ends, and elsewhere."""
    run, model, tokenizer = word_gpt.load_run(path, "cpu")
    documents = word_gpt.read_documents(archive, run["cleaning"])
    parts = word_gpt.split_documents(documents, word_gpt.TRAIN_SHARE, word_gpt.VAL_SHARE)
    tokens = word_gpt.split_text({"val": parts["val"]}, tokenizer)["val"]
    found = {True: [], False: []}
    T = model.block_size
    for begin in range(0, len(tokens) - T * B - 1, T * B):
        starts = torch.arange(begin, begin + T * B, T)[:, None]
        x, y = word_gpt.cut_windows(tokens, starts, torch.tensor(len(tokens)), T)
        _, frequent = model.lm_head.first_choice(model.hidden(x))
        p = frequent[..., EOS].exp()
        for is_end in found:
            found[is_end].append(p[(y != -100) & ((y == EOS) == is_end)])
    for is_end, words in ((True, "where a review ends"), (False, "elsewhere")):
        p = torch.cat(found[is_end])
        print(f"P(<eos>) {words}: mean {p.mean():.4f}, median {p.median():.5f}, {len(p):,} places")


@torch.no_grad()
def eos_by_position(model, tokens):
    """Return the mean P(<eos>) and the true share of <eos> at each position, (T,) each."""
    torch.manual_seed(5)
    p, share, count = torch.zeros(T), torch.zeros(T), torch.zeros(T)
    for _ in range(120):
        x, y = run_on(tokens, B, T, "cpu")
        _, frequent = model.lm_head.first_choice(model.hidden(x))
        p += (frequent[..., EOS].exp() * (y != -100)).sum(0)
        share += (y == EOS).sum(0)
        count += (y != -100).sum(0)
    return p / count, share / count


if __name__ == "__main__":
    archive = next((Path(word) for word in sys.argv[1:] if word.endswith(".tar.gz")), None)
    if "windows" in sys.argv:
        for seed in sys.argv[sys.argv.index("windows") + 1 :] or ["1337"]:
            windows(archive, int(seed))
    elif "ends" in sys.argv:
        ends(archive, sys.argv[-1])
    else:
        benchmark.main("word_gpt", archive, steps)
