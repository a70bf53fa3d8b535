"""Measures word_gpt.py: a training step beside the plain softmax, and whole runs in "plain steps".

    python tests/benchmark_word.py                       training steps, 1 minute on 2 cores
    python tests/benchmark_word.py ARCHIVE run default   a whole run; ARCHIVE: aclImdb_v1.tar.gz
    python tests/benchmark_word.py --avx2 ...            as on a CPU without bfloat16 or AVX-512

The words of the step are drawn so that the n-th commonest comes 1/n as often as the commonest
(Zipf's law): 73% are among the first 2,000 then, of the reviews' 84%. Precision, optimizers and
memory handling are those of word_gpt.py for both. For plain steps, and how the figures are taken,
see benchmark.py. Each line of a run is printed with the seconds since the process was started.
"""

import sys
from pathlib import Path

import benchmark  # first: it reads --avx2 before torch is there
import torch
import torch.nn.functional as F

import word_gpt

V, B, T, C, H, L = 36_980, 32, 64, 256, 2, 2


def stepper(plain):
    """Return a function that takes one training step, with the plain softmax or with ours."""
    word_gpt.has_bfloat16 = lambda device: benchmark.native
    torch.manual_seed(0)
    model = word_gpt.LM(V, T, C, H, L, 0.0, () if plain else word_gpt.CUTOFFS)
    optimizers = word_gpt.make_optimizers(model)
    frequencies = 1 / torch.arange(1, V - 2)  # of the words: ids from 3 on
    x, y = 3 + torch.multinomial(frequencies, 2 * B * T, replacement=True).view(2, B, T)
    head = model.lm_head

    def loss(hidden, targets, each):
        logits = F.linear(hidden, head.weight, head.bias)
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    if plain:
        head.forward = loss
    return lambda: word_gpt.train_step(model, optimizers, x, y, 1e-4)


def steps():
    """Compare training steps."""
    contestants = {"ours": stepper(plain=False), "lm_head and cross_entropy": stepper(plain=True)}
    benchmark.compare(f"{B}x{T}, V = {V:,}", contestants, 3, rounds=6)


if __name__ == "__main__":
    archive = next((Path(word) for word in sys.argv[1:] if word.endswith(".tar.gz")), None)
    benchmark.main("word_gpt", archive, steps)
