"""A GPT in one file, character by character: it reads Shakespeare and learns to write more of it.

Nothing of the model is hidden in a library or a second file, nor is its data or its training. Read
it from top to bottom; every line that is not obvious says why it is there.

    python char_gpt.py                                  train, then continue PROMPT
    python char_gpt.py --max-iters 500                  less training, a third of the time
    python char_gpt.py --sample --prompt "JULIET:"      no training: continue with what was learned
    python char_gpt.py --resume --max-iters 5000        train further
    python char_gpt.py --data mytext.txt --prompt "It"  on another text
    python char_gpt.py -h                               all flags; the constants below are the rest

What to expect, measured on a 2-core AMD EPYC (Zen 4, AVX-512 bfloat16), Linux, Python
3.11, torch 2.13.0, SEED 1337, `python char_gpt.py`:

- 824,897 parameters; 4 minutes in all (3 min 59 s), 0.97 GB of memory
- loss before training 4.19 (ln 65 = 4.17: it knows nothing), after it 1.4857 nats per token over
  the whole validation split, 2.1434 bits per character; on the training text 1.25
- `--sample` prints its first character after 2 seconds
- it writes:

    ROMEO:
    Why, here's now? I have such a waiting poor part
    Against it with this base now, my cousin;
    That is thy mouths, sometimes me some grace.

    RATCLIFF:
    The thoughts of a virtuous prayers hath speeds.

    ISABELLA:
    Ay, bid me, not be you hope;

Presets, to be typed in below (the loss is the exact one, over the whole validation split):

- "a100": MAX_ITERS 3000. Loss 1.4614 in 7 min 11 s, with SEED 1 1.4580 in 6 min 58 s: on two CPU
  cores below the 1.4697 that nanoGPT (Karpathy 2022) estimates after 3 minutes on an A100.
- "best": BLOCK_SIZE 256, BATCH_SIZE 16, N_EMBED 192, N_HEADS 3, WEIGHT_DECAY 1.0, MAX_ITERS 5000,
  EVAL_INTERVAL 500. Loss 1.4160 in 20 min 58 s (1.09 on the training text), with SEED 1 1.4215 in
  20 min 45 s; 1,851,713 parameters, 1.3 GB of memory.
- "classic", the sizes that most courses have: BATCH_SIZE 64, BLOCK_SIZE 256, MAX_ITERS 5000,
  EVAL_INTERVAL 500, LEARNING_RATE 3e-4, EVAL_ITERS 200, N_EMBED 128, N_LAYERS 4, N_HEADS 4,
  DROPOUT 0.2. A step takes 640 to 700 ms here, so the run would take about an hour; its loss was
  not measured.
- on a GPU: the values below for one are reasoned, and were not measured.

Without bfloat16 in hardware AdamW trains alone, in place of Muon (see `make_optimizers`): steps are
slower, and the losses higher (after 400 steps 1.9813, in place of 1.8325).

The letters of all shapes, here and in the other two files:
    B   batch: windows that go through at once
    T   time: tokens of a window
    C   channels: numbers that stand for a token
    H   heads of a block
    hs  head size: C / H
    V   vocabulary: how many different tokens there are

word_gpt.py does the same with words, and gpt2.py at the size of GPT-2; what two files share stands
in both to the letter.

Papers: Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762); Radford et al. 2018 and
2019, GPT and GPT-2. The text and the size of the task: Karpathy 2015, char-rnn.
"""

import argparse
import contextlib
import ctypes
import hashlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# 1. Hyperparameters
# ---------------------------------------------------------------------------------------------

NAME = "char_gpt"  # the files that a run writes are NAME.pt, NAME.resume.pt and NAME.png
ON_GPU = torch.cuda.is_available()  # where two values stand on a line, the first is for CUDA
DEVICE = "cuda" if ON_GPU else "mps" if torch.mps.is_available() else "cpu"  # fastest first
SEED = 1337  # same seed, machine and versions: same weights; another seed: another model and sample

# Data
DATA = "input.txt"  # any UTF-8 text; the default is looked for beside this file as well
DATA_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9  # the first 90% are for training, the rest is never trained on

# Model
BLOCK_SIZE = 256 if ON_GPU else 128  # tokens of context: more informs better, and takes more time
N_EMBED = 384 if ON_GPU else 128  # channels: more learn more; the time is quadratic
N_LAYERS = 6 if ON_GPU else 4  # blocks, one after another: deeper, and slower
N_HEADS = 6 if ON_GPU else 4  # heads per block: more see more, in fewer channels
DROPOUT = 0.2 if ON_GPU else 0.0  # share of activations zeroed in training: more delays overfitting

# Optimisation
BATCH_SIZE = 64 if ON_GPU else 32  # windows per step: more is a smoother, costlier gradient
MAX_ITERS = 2200 if ON_GPU else 1600  # steps: more learns more, until it learns the text by heart
LEARNING_RATE = 1e-3 if ON_GPU else 6e-3  # the peak; too high diverges, too low learns slowly
WARMUP_ITERS = 100  # steps to reach the peak: the optimizer's first averages are noisy
BETAS = (0.9, 0.99)  # memory of AdamW's averages of gradients and of their squares (10, 100 steps)
WEIGHT_DECAY = 0.1 if ON_GPU else 0.5  # pull of matrices to zero: more generalises, fits less
GRADIENT_CLIP = 1.0  # longer gradients are cut to it: one bad batch cannot throw the model far

# Evaluation
EVAL_INTERVAL = 200  # steps between two evaluations: fewer show more, and take more time
EVAL_ITERS = 10  # batches per evaluation: more are more exact, and slower

# Generation
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 500  # length of the continuation at the end
TEMPERATURE = 0.8  # 0: always the likeliest token; 1: the model's own odds; above: wilder
TOP_K = None  # draw among this many likeliest tokens only; None: among all
TOP_P = None  # draw among the likeliest tokens that make up this probability; None: all


# ---------------------------------------------------------------------------------------------
# 2. Data and tokenizer
# ---------------------------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can mend: run as a script, the file prints it as a single line."""


def load_text(path, url, sha256):
    """Return the text of a UTF-8 file; fetch it first when it is nowhere to be found.

    Args:
        path: the file.
        url, sha256: where to get it, and what its content must hash to. A file with a url is looked
            for beside this script as well. None: it has to be there.

    Raises:
        UserError: the file is missing, unreadable, or not UTF-8.
    """
    path = Path(path)
    if url is not None:
        beside_script = Path(__file__).parent / path
        if beside_script.exists():
            path = beside_script
        elif not path.exists() and path.name == url.rpartition("/")[2]:
            download(url, path, sha256)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: name one with --data") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): convert it, then try again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


class Tokenizer:
    """Turns text into numbers and back: the id of a character is its place in a sorted list.

    >>> tokenizer = Tokenizer("hello")
    >>> tokenizer.vocabulary, tokenizer.vocab_size
    ('ehlo', 4)
    >>> tokenizer.encode("hole")
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    """

    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        self.id_of = {character: i for i, character in enumerate(self.vocabulary)}

    def encode(self, text):
        """Return the ids of `text`, a list of ints. Raises UserError naming unknown characters."""
        unknown = sorted(set(text) - set(self.vocabulary))
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise UserError(
                f"characters that the training text never shows: {names}; leave them out"
            )
        return [self.id_of[character] for character in text]

    def decode(self, ids):
        """Return the text of a list of ids; the inverse of `encode`."""
        return "".join(self.vocabulary[i] for i in ids)


def split_text(text, tokenizer, train_share, block_size):
    """Return the ids of the first `train_share` of the text, and of the rest: two int64 vectors.

    The cut is at one place, not at random: a shuffled split would put each validation passage
    between two passages that the model has learned.

    Raises:
        UserError: the text is too short for one window to train on and two tokens to validate.
    """
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    cut = int(train_share * len(ids))
    if cut <= block_size or len(ids) - cut < 2:
        raise UserError(
            f"{len(ids):,} tokens are too few: TRAIN_SHARE = {train_share} of them must be more "
            f"than BLOCK_SIZE = {block_size}, with 2 left: take a longer text, or lower BLOCK_SIZE"
        )
    return ids[:cut], ids[cut:]


# ---------------------------------------------------------------------------------------------
# 3. Model
# ---------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Scaled dot-product attention: every position looks back, and takes what it needs.

        attention(Q, K, V) = softmax(Q Kᵀ / √hs) V          Vaswani et al. 2017, eq. 1

    A query says what a position looks for, a key what a position has to offer, and a value what it
    hands over when asked. Nothing in here is learned: the weights that make queries, keys and
    values are in `MultiHead`. Only the last two dimensions matter, so all heads of all texts of a
    batch go through at once, which is faster than one after the other.
    """

    def forward(self, queries, keys, values):
        """Attend. All three are (B, H, T, hs), and so is the result."""
        T, hs = queries.shape[-2:]
        # A sum of hs products grows like √hs. Undivided, it would drive the softmax to its ends,
        # where one weight is 1, the others are 0, and no gradient comes back.
        # (B, H, T, hs) @ (B, H, hs, T) -> (B, H, T, T): row t, how much position t wants each
        # (The queries are divided, not the scores: the same result, from fewer numbers.)
        scores = (queries * hs**-0.5) @ keys.transpose(-2, -1)
        # Position t must not see what comes after it, for that is what it has to predict. Above the
        # diagonal -inf is added, and exp(-inf) = 0: a weight of exactly zero.
        future = torch.full((T, T), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
        weights = F.softmax(scores + future, dim=-1)  # (B, H, T, T), each row sums to 1
        return weights @ values  # (B, H, T, T) @ (B, H, T, hs) -> (B, H, T, hs)


class MultiHead(nn.Module):
    """Several heads side by side, each on its own channels; then a mix of what they found.

    One head can look at one kind of thing: the last vowel, or who is speaking. H heads look at H
    things, each in hs = C / H channels, for about the price of one head that is C wide.
    Vaswani et al. 2017, section 3.2.2.

    Args:
        n_embed: C, channels in and out.
        n_heads: H; must divide `n_embed`.
        dropout: share of the outgoing channels zeroed in training.

    Raises:
        UserError: `n_embed` is not divisible by `n_heads`.
    """

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        if n_heads < 1 or n_embed % n_heads:
            raise UserError(f"N_EMBED = {n_embed} is not divisible by N_HEADS = {n_heads}")
        self.n_heads = n_heads
        # Three projections in one matrix. No bias: one on the keys would cancel in the softmax, and
        # that of the projection below does for the values.
        self.queries_keys_values = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.head = Head()
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Let every position of x (B, T, C) collect from itself and those before it: (B, T, C)."""
        B, T, C = x.shape
        # (B, T, C) @ (C, 3C) -> (B, T, 3C), cut into three (B, T, C)
        projected = self.queries_keys_values(x).split(C, dim=-1)
        # Each head gets its own hs channels: (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs)
        queries, keys, values = (
            part.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2) for part in projected
        )
        found = self.head(queries, keys, values)
        # Side by side again: (B, H, T, hs) -> (B, T, H, hs) -> (B, T, C)
        found = found.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.projection(found))  # (B, T, C) @ (C, C) -> (B, T, C)


class FeedForward(nn.Module):
    """Two layers that work on every position by itself: attention collects, this digests.

    In between it is 4 times as wide, the ratio of Vaswani et al. 2017, section 3.3 (512 and 2048).

    Args:
        n_embed: C, channels in and out.
        dropout: share of the outgoing channels zeroed in training.
    """

    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand = nn.Linear(n_embed, 4 * n_embed)
        self.shrink = nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Transform each position of x (B, T, C) alone: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""
        hidden = F.relu(self.expand(x))  # without a kink in between, two layers would be one
        return self.dropout(self.shrink(hidden))


class Block(nn.Module):
    """Attention, then feed-forward, each added to what was there.

    The sum is a road on which gradients reach the first layer undisturbed (residual connections, He
    et al. 2015, arXiv 1512.03385). LayerNorm brings each position to mean 0 and deviation 1, then
    scales and shifts each channel. It stands before each part, off the road, where training is more
    stable than with it on the road (pre-LayerNorm, Xiong et al. 2020, arXiv 2002.04745).

    Args:
        n_embed: C, channels. n_heads: H, heads. dropout: share zeroed in training.
    """

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embed)
        self.attention = MultiHead(n_embed, n_heads, dropout)
        self.norm2 = nn.LayerNorm(n_embed)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x):
        """Add to x (B, T, C) what attention and feed-forward make of it: (B, T, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class LM(nn.Module):
    """The language model: for every position, how likely each token is to come next.

    It says so in logits, one number per token, which softmax turns into probabilities.

    Args:
        vocab_size: V, how many tokens there are.
        block_size: the longest context, in tokens.
        n_embed: C, channels. n_heads: H, heads per block. n_layers: blocks.
        dropout: share of activations zeroed in training, 0 to 1.
    """

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.sizes = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "n_embed": n_embed,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "dropout": dropout,
        }
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embed, n_heads, dropout) for _ in range(n_layers)))
        self.final_norm = nn.LayerNorm(n_embed)
        self.lm_head = nn.Linear(n_embed, vocab_size)
        # Small logits are nearly equal odds for all tokens: the loss begins at ln V, like that of a
        # model that knows nothing. PyTorch's own, larger start has convictions, and they are wrong.
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, idx, targets=None):
        """Predict the next token at every position, and say how wrong that was.

        Args:
            idx: (B, T) token ids, int64, T at most `block_size`.
            targets: (B, T) the tokens that really came next, or None.

        Returns:
            logits (B, T, V), float32, and the loss: the mean of -ln(probability given to the
            target), in nats (the unit of the natural logarithm) per token; None without targets.
        """
        T = idx.shape[1]
        # Attention by itself sees a set, not a sequence: where a token stands has to be told. Both
        # are looked up in tables and added: (B, T, C) + (T, C) -> (B, T, C)
        positions = torch.arange(T, device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)
        x = self.blocks(self.dropout(x))
        # (B, T, C) @ (C, V) -> (B, T, V); float32, since bfloat16 is too coarse for the loss
        logits = self.lm_head(self.final_norm(x)).float()
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------
# 4. Batches and loss
# ---------------------------------------------------------------------------------------------


def get_batch(tokens, batch_size, block_size):
    """Cut windows at random places; the targets are the same windows, one token later.

    tokens [5, 6, 7, 8, 9], one window of 3, start 1: x = [[6, 7, 8]], y = [[7, 8, 9]]. That is
    three lessons in one: after 6 comes 7, after 6 7 comes 8, after 6 7 8 comes 9.

    Args:
        tokens: (N,) ids, N > block_size.

    Returns:
        x and y, both (B, T) with B = batch_size and T = block_size, on the device of `tokens`.
    """
    # Drawn on the CPU, so that every device gets the same batches.
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), device="cpu")
    offsets = torch.arange(block_size + 1)
    windows = tokens[(starts + offsets).to(tokens.device)]  # (B, 1) + (T + 1,) -> (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def has_bfloat16(device):
    """Say whether the hardware itself computes in bfloat16. Emulated, it would be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def mixed_precision(device):
    """Return a context in which matrix products run in bfloat16, where the hardware has it.

    bfloat16 has float32's range with 8 bits of precision in place of 24: half the bytes, matrix
    products at twice the speed, and gradients are noisy anyhow. Weights and their updates stay in
    float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


@contextlib.contextmanager
def evaluation(model):
    """Inside `with`: no dropout, no gradients, mixed precision. After it: the mode found before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed_precision(model.lm_head.weight.device):
            yield
    finally:
        model.train(was_training)


def estimate_loss(model, tokens, batch_size, eval_iters=None):
    """Return the mean loss over `tokens` in nats per token, without any randomness.

    The text is cut into windows side by side, so that every token but the first is a target once.
    The last window holds what is left, and is shorter.

    Args:
        tokens: (N,) ids, N > 1.
        batch_size: windows at a time; changes the speed, not the result.
        eval_iters: at most this many batches, evenly spread over the text; None: the whole text.
    """
    T = model.block_size
    n_targets = len(tokens) - 1
    n_windows = n_targets // T
    x = tokens[: n_windows * T].view(n_windows, T)
    y = tokens[1 : n_windows * T + 1].view(n_windows, T)
    if eval_iters is not None and n_windows > eval_iters * batch_size:
        chosen = torch.linspace(0, n_windows - 1, eval_iters * batch_size).long().to(tokens.device)
        batches = list(zip(x[chosen].split(batch_size), y[chosen].split(batch_size), strict=True))
    else:
        batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        rest = n_targets % T
        if rest:
            batches.append((tokens[None, -rest - 1 : -1], tokens[None, -rest:]))
    total = sum_of_targets = 0
    with evaluation(model):
        for xs, ys in batches:
            if ys.numel():
                total += model(xs, ys)[1].item() * ys.numel()
                sum_of_targets += ys.numel()
    return total / sum_of_targets


# ---------------------------------------------------------------------------------------------
# 5. Generation
# ---------------------------------------------------------------------------------------------


def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Turn logits (B, V) into the probabilities (B, V) to draw the next token with.

    Args:
        temperature: the logits are divided by it. 0 puts everything on the likeliest token.
        top_k: keep this many of the likeliest tokens (Fan et al. 2018, arXiv 1805.04833).
        top_p: keep the fewest likeliest tokens that together have this probability (nucleus
            sampling, Holtzman et al. 2019, arXiv 1904.09751).

    Returns:
        float32 on the CPU: some versions of the MPS backend drew token ids that do not exist.

    Raises:
        UserError: temperature below 0, top_k below 1, or top_p outside (0, 1].
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"TEMPERATURE = {temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"TOP_K = {top_k}: must be 1 or more, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"TOP_P = {top_p}: must be above 0 and at most 1, or None for no limit")
    logits = logits.float().cpu()
    if temperature < 1e-6:  # smaller numbers would overflow below, and mean the same
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    # The largest logit becomes 0 first, so that a small temperature makes no infinity.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return F.softmax(logits, dim=-1)
    V = logits.shape[-1]
    likeliest, order = logits.topk(min(top_k or V, V))  # in falling order
    probabilities = F.softmax(likeliest, dim=-1)
    if top_p is not None and top_p < 1:
        # Of each token, the probability that all likelier ones have together:
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities[likelier >= top_p] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order, probabilities)


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    """Continue a text: predict, draw, append, and again.

    Args:
        ids: the text so far, a list of at least one id. The model sees its last `block_size`.
        max_new_tokens: how many to add.
        temperature, top_k, top_p: see `next_token_probabilities`.

    Yields:
        the new token ids, ints, one at a time.

    Raises:
        UserError: `ids` is empty, or an option is out of its range.
    """
    if not ids:
        raise UserError("the prompt is empty: give some text to continue")
    device = model.lm_head.weight.device
    ids = list(ids)
    for _ in range(max_new_tokens):
        idx = torch.tensor([ids[-model.block_size :]], device=device)  # (1, T)
        with evaluation(model):
            logits, _ = model(idx)
        # Only the last position is news: (1, T, V) -> (1, V)
        probabilities = next_token_probabilities(logits[:, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, num_samples=1).item())
        yield ids[-1]


def stream(model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p):
    """Print the prompt and its continuation as it is made. Returns both as one string."""
    ids = tokenizer.encode(prompt)
    pieces = [prompt]
    print(prompt, end="", flush=True)
    for token in generate(model, ids, max_new_tokens, temperature, top_k, top_p):
        pieces.append(tokenizer.decode([token]))
        print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


# ---------------------------------------------------------------------------------------------
# 6. Training
# ---------------------------------------------------------------------------------------------


def make_optimizers(model, learning_rate, betas, weight_decay):
    """Return what moves the weights: Muon for the matrices of the blocks, AdamW for all else.

    AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) moves every weight by itself, and about as
    far, however large its gradient. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
    looks at a matrix as a whole. The gradients of most steps point along a few directions only;
    Muon moves about as far along each: in terms of linear algebra, their average is U S Vᵀ; it
    moves along U Vᵀ. It is for matrices that turn one vector into another; the rows of an embedding
    have little to do with each other. It computes in bfloat16; where the hardware lacks that, AdamW
    does all.

    Matrices (embeddings too) are what a model overfits with, so they are pulled towards zero. A
    bias, or the scale of a LayerNorm, hardly can, and a scale belongs near 1.
    """
    in_blocks = [p for p in model.blocks.parameters() if p.dim() >= 2]
    if not has_bfloat16(model.lm_head.weight.device):
        in_blocks = []
    others = [p for p in model.parameters() if not any(p is matrix for matrix in in_blocks)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    # fused: one pass over the memory for all that an update does
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if in_blocks:
        # Scaled to move as far as AdamW, it needs no learning rate and no weight decay of its own
        # (Liu et al. 2025, arXiv 2502.16982). Its momentum, 0.95, is PyTorch's.
        muon = torch.optim.Muon(
            in_blocks,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


def learning_rate_at(step, max_iters, peak, warmup_iters):
    """Return the learning rate of a step: up to the peak in a straight line, then down to zero.

    The way down lets the weights settle: at a constant rate they would keep jumping around the
    minimum. Step 0 already moves: a rate of zero would waste it.
    """
    warmup_iters = max(1, min(warmup_iters, max_iters // 10))  # a short run has no time for more
    warmup = min(1.0, (step + 1) / warmup_iters)
    return peak * warmup * (1 - step / max_iters)


class CtrlC:
    """Inside `with CtrlC() as ctrl_c`, Ctrl-C sets `ctrl_c.pressed`, and cuts no step in half.

    A second Ctrl-C interrupts at once, as usual.
    """

    pressed = False

    def __enter__(self):
        """Listen for Ctrl-C; give the object itself to `as`."""
        self.previous = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, signum, frame):
        """Note the first Ctrl-C, and let the next one through."""
        self.pressed = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *exception):
        """Leave Ctrl-C as it was found."""
        signal.signal(signal.SIGINT, self.previous)


def train(
    model,
    optimizers,
    train_tokens,
    val_tokens,
    on_evaluation,
    *,
    first_step,
    max_iters,
    batch_size,
    learning_rate,
    warmup_iters,
    gradient_clip,
    eval_interval,
    eval_iters,
    seed,
):
    """Train, and evaluate before the first step, every `eval_interval` steps, and after the last.

    Args:
        train_tokens, val_tokens: (N,) ids, on the device of the model.
        on_evaluation: a `Keeper`, called as on_evaluation(step, losses), losses = {"train": nats,
            "val": nats}.
        first_step: 0, or how many steps were done before a resumed run.
        The others are the constants of the same names.

    Returns:
        {"steps": done in all, "seconds": spent in this call, "tokens_per_second": of the steps}.

    Raises:
        UserError: the loss is not a number any more.
    """
    device = train_tokens.device
    start = time.perf_counter()
    training_seconds = 0.0
    step = first_step
    model.train()
    with CtrlC() as ctrl_c:
        while True:
            # Ctrl-C lets one step be taken, so that there is something to keep.
            stop = step >= max_iters or (ctrl_c.pressed and step > first_step)
            if stop or step % eval_interval == 0:
                losses = {
                    "train": estimate_loss(model, train_tokens, batch_size, eval_iters),
                    "val": estimate_loss(model, val_tokens, batch_size, eval_iters),
                }
                check_finite(losses["train"] + losses["val"], step, learning_rate)
                on_evaluation(step, losses)
            if stop:
                break

            step_start = time.perf_counter()
            # A seed for each step makes it depend on nothing but its number: neither on how often
            # one evaluates, nor on whether the run was resumed. (A million: up to so many steps, no
            # two runs of different seeds share one.)
            torch.manual_seed(seed * 1_000_000 + step)
            x, y = get_batch(train_tokens, batch_size, model.block_size)
            with mixed_precision(device):
                _, loss = model(x, y)
            loss.backward()  # d loss / d weight, for every weight
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, max_iters, learning_rate, warmup_iters)
                optimizer.step()  # every weight moves a little, so that the loss falls
                optimizer.zero_grad()  # or the next gradients would be added to these
            step += 1

            if step % 10 == 0:  # not each time: a GPU has to finish its queue to show a loss
                check_finite(loss.item(), step, learning_rate)
            training_seconds += time.perf_counter() - step_start
            if step % 10 == 0:
                rate = (step - first_step) / training_seconds
                show_progress(
                    f"step {step:,}/{max_iters:,}  loss {loss.item():.3f}  "
                    f"{rate * y.numel():,.0f} tokens/s  {(max_iters - step) / rate:,.0f} s left"
                )
    show_progress("")
    tokens = (step - first_step) * batch_size * model.block_size
    return {
        "steps": step,
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / training_seconds if training_seconds else 0.0,
    }


def check_finite(loss, step, learning_rate):
    """Raise UserError when the loss is NaN or infinite, before anything is kept of it."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss became {loss} at step {step}: lower LEARNING_RATE = {learning_rate}; "
            "what was kept before is untouched"
        )


def show_progress(line):
    """Rewrite the last line of a terminal; print nothing where the output is piped."""
    if sys.stdout.isatty():
        print(f"\r{line:<79}", end="\r" if not line else "", flush=True)


# ---------------------------------------------------------------------------------------------
# 7. Keeping results: checkpoints, plots, downloads
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path to write to, and move it to `path` only once it is whole.

    Raises:
        UserError: it could not be written; the file that stood at `path` is as it was.
    """
    temporary = Path(f"{path}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise UserError(f"cannot write {path}, and left it as it was: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, tokenizer, **more):
    """Write all that sampling needs (weights, sizes, vocabulary), and what else is given."""
    state = {
        "name": NAME,
        "sizes": model.sizes,
        "weights": model.state_dict(),
        "vocabulary": tokenizer.vocabulary,
        **more,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path):
    """Return the dict that `save_checkpoint` wrote. A file from a stranger can run no code here.

    Raises:
        UserError: there is none, it is damaged, or another script wrote it.
    """
    if not Path(path).exists():
        raise UserError(f"there is no {path} here: run `python {NAME}.py` first, which writes it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        name = state["name"]
    except Exception as error:  # torch.load raises what it likes
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): move it away"
        ) from error
    if name != NAME:
        raise UserError(f"{path} was written by {name!r}, not by {NAME!r}: move it away")
    return state


def load_checkpoint(path, device):
    """Return the (model, tokenizer) that `save_checkpoint` wrote, the model on `device`.

    Raises:
        UserError: there is no such file, or it is no checkpoint of this script.
    """
    state = read_checkpoint(path)
    try:
        sizes, weights = state["sizes"], state["weights"]
        tokenizer = Tokenizer(state["vocabulary"])
        if tokenizer.vocab_size != sizes["vocab_size"] or sizes["n_layers"] > len(weights):
            raise ValueError("its sizes contradict its contents")  # and might take forever to build
        # On the meta device a model has no memory and no values yet: those of the file move in.
        with torch.device("meta"):
            model = LM(**sizes)
        model.load_state_dict(weights, assign=True)
        model.eval().to(torch.float32)
        if not model(torch.zeros(1, 1, dtype=torch.int64))[0].isfinite().all():
            raise ValueError("its weights are not finite")
    except Exception as error:  # a file from a stranger can fail in any way
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} does not fit this {NAME}.py ({reason}): move it away") from error
    return model.to(device), tokenizer


class Keeper:
    """Shows and keeps what a training run reaches, at each evaluation.

    NAME.pt holds the best weights by validation loss, NAME.resume.pt all that --resume needs, and
    NAME.png the curves. All lie in the current folder.

    Args:
        sample: called without arguments, returns a short sample to show.
    """

    def __init__(self, model, optimizers, tokenizer, sample):
        self.model = model
        self.optimizers = optimizers
        self.tokenizer = tokenizer
        self.sample = sample
        self.history = []  # an entry per evaluation: {"step": int, "train": nats, "val": nats}
        self.start = time.perf_counter()

    def optimizer_names(self):
        """Return the kinds of the optimizers, which depend on the hardware."""
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def resume(self):
        """Bring back the state of NAME.resume.pt, and return how many steps had been done.

        Raises:
            UserError: it is missing or damaged, or has other sizes, words or optimizers.
        """
        path = f"{NAME}.resume.pt"
        state = read_checkpoint(path)
        for what, kept, now in (
            ("sizes", state.get("sizes"), self.model.sizes),
            ("vocabulary", state.get("vocabulary"), self.tokenizer.vocabulary),
            ("optimizers", state.get("optimizer_names"), self.optimizer_names()),
        ):
            if kept != now:
                raise UserError(
                    f"{path} has {what} {kept!r:.150}, this run has {now!r:.150}: edit the "
                    "constants, --data or --device, to be the same"
                )
        try:
            self.model.load_state_dict(state["weights"])
            # The averages come from the file, the settings from the constants: they may be edited.
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                settings = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(saved | {"param_groups": settings})
            self.history = state["history"]
            if not all(entry.keys() >= {"step", "train", "val"} for entry in self.history):
                raise ValueError("its history lacks losses")
            return int(self.history[-1]["step"])
        except Exception as error:
            raise UserError(f"{path} is damaged ({error!r}): move it away, train anew") from error

    def __call__(self, step, losses):
        """Keep weights and curves; then print the losses and a sample."""
        self.history = [entry for entry in self.history if entry["step"] < step]
        self.history.append({"step": step, **losses})
        if step:  # an untrained model is not worth keeping in place of an earlier run's
            self.keep()
        seconds = time.perf_counter() - self.start
        V = self.tokenizer.vocab_size
        note = f"knowing nothing: ln {V} = {math.log(V):.4f}" if step == 0 else f"{seconds:.0f} s"
        show_progress("")
        print(f"step {step:>5}  train {losses['train']:.4f}  val {losses['val']:.4f}  ({note})")
        print(f"            {self.sample()!r}", flush=True)

    def keep(self):
        """Write the best weights, all that --resume needs, and the curves."""
        best = min(entry["val"] for entry in self.history if entry["step"])
        if self.history[-1]["val"] <= best or not Path(f"{NAME}.pt").exists():
            save_checkpoint(f"{NAME}.pt", self.model, self.tokenizer, **self.history[-1])
        save_checkpoint(
            f"{NAME}.resume.pt",
            self.model,
            self.tokenizer,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            optimizer_names=self.optimizer_names(),
            history=self.history,
        )
        draw_losses(f"{NAME}.png", self.history)


def draw_losses(path, history):
    """Draw the two loss curves of a list of {"step": int, "train": nats, "val": nats}."""
    from matplotlib.figure import Figure  # here, since sampling need not wait for it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["train"] for entry in history], label="training")
    axes.plot(steps, [entry["val"] for entry in history], label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=NAME)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def download(url, path, sha256, tries=4, timeout=20.0):
    """Fetch a file, whole and unchanged, or not at all.

    Args:
        sha256: what its content must hash to.
        tries: attempts, with growing pauses between them.
        timeout: seconds without a byte after which an attempt has failed.

    Raises:
        UserError: it could not be had; says where to put a copy by hand.
    """
    import requests  # here, since only the first run needs it

    for attempt in range(tries):
        time.sleep(2**attempt - 1)
        try:
            with (
                replacing(path) as temporary,
                open(temporary, "wb") as file,
                requests.get(url, stream=True, timeout=timeout) as response,
            ):
                response.raise_for_status()
                digest = hashlib.sha256()
                for piece in response.iter_content(1 << 16):
                    file.write(piece)
                    digest.update(piece)
                    show_progress(f"downloading {path}: {file.tell() / 1e6:.1f} MB")
                if digest.hexdigest() != sha256:
                    raise OSError(f"sha256 is {digest.hexdigest()}, not {sha256}")
            show_progress("")
            return
        except UserError as error:
            reason = error.__cause__
        if getattr(reason, "response", None) is not None and reason.response.status_code < 500:
            break  # the server has no such file, and will not have it in a second
    raise UserError(f"cannot download {url} ({reason}): get it by hand, and put it at {path}")


def keep_freed_memory():
    """Make glibc keep freed memory for the next step. On other systems, do nothing.

    By default glibc gives large tensors back to the kernel when they are freed, and each step
    begins with page faults to get them again.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# ---------------------------------------------------------------------------------------------
# 8. main
# ---------------------------------------------------------------------------------------------


def parse_flags(argv):
    """Return the flags of the command line (or of the list argv); the constants are defaults."""
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=description)
    parser.add_argument("--prompt", metavar="TEXT", default=PROMPT, help="text to continue")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--sample", action="store_true", help=f"no training: continue the prompt with {NAME}.pt"
    )
    either.add_argument(
        "--resume", action="store_true", help=f"go on with the training kept in {NAME}.resume.pt"
    )
    parser.add_argument(
        "--max-iters", metavar="N", type=int, default=MAX_ITERS, help="steps to train in all"
    )
    parser.add_argument("--data", metavar="PATH", default=DATA, help="UTF-8 text to train on")
    parser.add_argument("--device", metavar="NAME", default=DEVICE, help="cpu, cuda, mps")
    flags = parser.parse_args(argv)
    if flags.max_iters < 1:
        parser.error(f"--max-iters {flags.max_iters}: must be 1 or more")
    return flags


def pick_device(name):
    """Return the torch.device of that name. Raises UserError where it cannot be used."""
    try:
        device = torch.empty(0, device=name).device
        with mixed_precision(device):
            return device
    except Exception as error:  # each kind of device that is not there raises its own
        raise UserError(f"--device {name} cannot be used here: try --device cpu") from error


def count_parameters(model):
    """Return how many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def print_setup(model, train_tokens, val_tokens, batch_size, max_iters, why):
    """Say what the run works with; `why` says why on this device."""
    device = train_tokens.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    native = "bfloat16 autocast" if has_bfloat16(device) else "float32, AdamW alone (no bfloat16)"
    tokens = batch_size * model.block_size
    print(f"device     {device}{threads}, {native}; {why}")
    print(f"model      {count_parameters(model):,} parameters: {model.sizes}")
    print(f"text       {len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate")
    print(
        f"training   {max_iters:,} steps of {batch_size} x {model.block_size} = {tokens:,} tokens: "
        f"{max_iters * tokens / len(train_tokens):.1f} times the training text"
    )


def main(argv=None):
    """Train and sample as the flags say (a list of strings; None: those of the command line).

    Returns:
        {"val_loss": nats per token over the whole validation split, "bits_per_character",
        "parameters", "steps", "seconds" of training, "tokens_per_second", "text": the sample}.
        After --sample, "steps" is 0, and what only training knows is None.

    Raises:
        UserError: some input is bad; says which, and the way out.
    """
    flags = parse_flags(argv)
    device = pick_device(flags.device)
    keep_freed_memory()
    sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    results = dict.fromkeys(("val_loss", "bits_per_character", "seconds", "tokens_per_second"))
    results["steps"] = 0

    if not flags.sample:
        text = load_text(flags.data, DATA_URL if flags.data == DATA else None, DATA_SHA256)
        tokenizer = Tokenizer(text)
        tokens = split_text(text, tokenizer, TRAIN_SHARE, BLOCK_SIZE)
        train_tokens, val_tokens = (part.to(device) for part in tokens)
        prompt_ids = tokenizer.encode(flags.prompt)  # a bad prompt is found before the training

        torch.manual_seed(SEED)
        model = LM(tokenizer.vocab_size, BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT).to(device)
        optimizers = make_optimizers(model, LEARNING_RATE, BETAS, WEIGHT_DECAY)
        why = "the fastest device found" if flags.device == DEVICE else "as --device says"
        print_setup(model, train_tokens, val_tokens, BATCH_SIZE, flags.max_iters, why)
        keeper = Keeper(
            model,
            optimizers,
            tokenizer,
            lambda: tokenizer.decode(generate(model, prompt_ids, 60, **sampling)),
        )
        results |= train(
            model,
            optimizers,
            train_tokens,
            val_tokens,
            keeper,
            first_step=keeper.resume() if flags.resume else 0,
            max_iters=flags.max_iters,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_iters=WARMUP_ITERS,
            gradient_clip=GRADIENT_CLIP,
            eval_interval=EVAL_INTERVAL,
            eval_iters=EVAL_ITERS,
            seed=SEED,
        )

    model, tokenizer = load_checkpoint(f"{NAME}.pt", device)  # the best weights
    if not flags.sample:
        results["val_loss"] = estimate_loss(model, val_tokens, BATCH_SIZE)
        results["bits_per_character"] = results["val_loss"] / math.log(2)  # a token is a character
        print(
            f"best model: loss {results['val_loss']:.4f} nats per token over the whole validation "
            f"split, {results['bits_per_character']:.4f} bits per character"
        )
    results["parameters"] = count_parameters(model)
    torch.manual_seed(SEED)
    results["text"] = stream(model, tokenizer, flags.prompt, SAMPLE_TOKENS, **sampling)
    return results


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a character that this terminal lacks prints as "?"
    try:
        main()
    except UserError as error:
        show_progress("")
        sys.exit(f"{NAME}.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{NAME}.py: interrupted")
    except BrokenPipeError:  # the reader of the output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RuntimeError as error:  # what torch.OutOfMemoryError and its relatives come from
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        sys.exit(f"{NAME}.py: out of memory: halve BATCH_SIZE, or BLOCK_SIZE, or N_EMBED")

# ---------------------------------------------------------------------------------------------
# Try this: one edit at a time to the constants, then `python char_gpt.py --max-iters 400`. On the
# machine of the header, the constants as they are reach a loss of 1.8325 in 56 s.
#
# N_LAYERS = 1           2.0354 in 18 s: with one look back, what was found cannot be looked for
# LEARNING_RATE = 3e-4   2.6998: what most courses use is too careful for a model so small
# BLOCK_SIZE = 16        1.9685 in 25 s: most of what it takes to guess a letter is close by
# ---------------------------------------------------------------------------------------------
