"""Times word_gpt.py: reading the reviews, and one training step with all 39,000 words.

    python tests/benchmark_word.py step                  about 2 minutes on 2 cores
    python tests/benchmark_word.py data ARCHIVE          about 1 minute; ARCHIVE: aclImdb_v1.tar.gz

step: the `small` experiment, 32 x 64 tokens, V = 39,194, against the same step with
`F.cross_entropy(lm_head(x))` in float32, AdamW alone, and the memory handled as it comes. The n-th
commonest word is drawn 1/n as often as the commonest (Zipf's law): 73% of the words are among the
first 2,000 then, of the reviews' 84%. Since how memory is handled belongs to a whole process, each
contestant has a process of its own; they take turns, and a round is a few steps of each. Figures
are medians of ROUNDS rounds; the ratio is the median of the ratios within a round.

data: the first load (read, clean, split, count, encode) and the second one, from the cache, each in
a fresh process, with its peak memory.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import word_gpt

ROUNDS, STEPS = 5, 3
V, B, T, C, H, L = 39_194, 32, 64, 256, 2, 2


def steps(plain):
    """Take STEPS steps for each line on stdin, and print the seconds of one."""
    torch.set_num_threads(2)
    if plain:
        word_gpt.has_bfloat16 = lambda device: False
    else:
        word_gpt.keep_freed_memory()
    torch.manual_seed(0)
    model = word_gpt.LM(V, T, C, H, L, dropout=0.0, cutoffs=() if plain else word_gpt.CUTOFFS)
    optimizers = word_gpt.make_optimizers(model, 1e-3, (0.9, 0.99), 0.1)
    frequencies = 1 / torch.arange(1, V - 2)  # of the words: ids from 3 on
    x, y = 3 + torch.multinomial(frequencies, 2 * B * T, replacement=True).view(2, B, T)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            with word_gpt.mixed_precision(x.device):
                if plain:
                    logits = model.lm_head(model.hidden(x))
                    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
                else:
                    _, loss = model(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        print((time.perf_counter() - start) / STEPS, flush=True)


def compare_steps():
    """Let the two take turns, and print what came of it."""
    runs = {}
    for name in ("word_gpt.py", "plain float32"):
        runs[name] = subprocess.Popen(
            [sys.executable, __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, process in runs.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
    for process in runs.values():
        process.stdin.close()
        process.wait()
    ours, theirs = (times[1:] for times in seconds.values())  # the first round warms up
    for name, times in (("word_gpt.py", ours), ("plain float32", theirs)):
        print(f"{name:15} {statistics.median(times) * 1000:6.0f} ms a step")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio           {statistics.median(ratios):6.2f}  ({spread})")


LOAD = """
import resource, sys, time
import word_gpt as w
path, cleaning = sys.argv[1:]
start = time.perf_counter()
w.load_corpus(path, None, None, cleaning=cleaning, min_freq=5, train_share=w.TRAIN_SHARE,
              val_share=w.VAL_SHARE, seed=w.SEED)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"           {cleaning}: {seconds:.1f} s, peak memory {peak:.2f} GB", flush=True)
"""


def time_loading(archive):
    """Load the archive twice for each cleaning: first without a cache, then with one."""
    environment = os.environ | {"PYTHONPATH": str(Path(word_gpt.__file__).parent)}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "aclImdb_v1.tar.gz"
        copy.write_bytes(Path(archive).read_bytes())
        for cleaning in ("reference", "spaced"):
            for _ in range(2):
                subprocess.run(
                    [sys.executable, "-c", LOAD, str(copy), cleaning], env=environment, check=True
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["word_gpt.py" | "plain float32" as name]:
            steps(plain=name != "word_gpt.py")
        case ["step"]:
            print(
                f"{platform.machine()}, torch {torch.__version__}, 2 threads, V = {V:,}, {B} x {T}"
            )
            compare_steps()
        case ["data", archive]:
            time_loading(archive)
        case _:
            sys.exit(__doc__)
