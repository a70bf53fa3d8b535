"""A GPT in one file, character by character: it reads Shakespeare and learns to write more of it.

A GPT (generative pre-trained transformer) is a function. It takes a text and returns a probability
for every token that could come next. A token is the unit of text: here a character. The function,
the model, contains many numbers, its parameters. It is a neural network, a chain of layers that
multiply and add; a transformer's special one is attention (section 3). The parameters start random.
Training changes them, step by step:
- The model reads pieces of real text. At each place, it predicts the next token from those before.
- The loss is -ln p, where p is the probability that the model gave to the true next token: 0 for
  p = 1, and 0.69 for p = 1/2. Its unit is the nat. The probability of a whole text is the product
  of all p, so its -ln is the sum of the losses. We report their mean over many tokens.
- The gradient says, for each parameter, how fast the loss grows if that parameter grows. Each
  parameter is changed in the opposite direction. The learning rate says how far. In the plainest
  rule, with one parameter w = 2, the loss w², the gradient 2w = 4 and the rate 0.1, w becomes
  2 - 0.1 · 4 = 1.6, and the loss falls from 4 to 2.56.
- A step uses a few random pieces, a batch. Their gradient is an estimate of the gradient over the
  whole text, which would take too long. It is different for each batch.
To generate a text, we draw a token from the probabilities, append it to the text, and repeat.

    python char_gpt.py                                  train, then continue the PROMPT
    python char_gpt.py --sample --prompt "JULIET:"      no training: continue with what was learned
    python char_gpt.py --runs                           list what was trained in this folder
    python char_gpt.py --resume --max-iters 3000        train the newest run further
    python char_gpt.py --data mytext.txt --prompt "It"  train on another text; -h: all flags

Before training, all 65 characters are about equally likely. Such a guess costs -ln(1/65) = ln 65 =
4.17 nats. After training, the loss is 1.48 on text that was not used to change the parameters. The
model is then as unsure as if it chose among e^1.48 = 4.4 equally likely characters. (1.4828 in 2
minutes on 2 cores of an AMD EPYC; Linux, Python 3.11, torch 2.13.0, SEED 1337. It trained on a
million characters, and read each about 6.5 times.) It writes:

    ROMEO:
    Why, here's news a glazes as ear
    The captain that e'er this wits to be a fond
    To see self; and that my mouths, some slain,

PyTorch supplies tensors (arrays of numbers). The shapes of tensors have these letters (section 3):
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens
    N   tokens of a whole text

Paper: Vaswani et al. 2017, arXiv 1706.03762. Next: word_gpt.py (words) and gpt2.py (GPT-2 itself).
"""

# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "requests==2.34.2", "matplotlib==3.11.2"]
# ///

import argparse
import copy
import ctypes
import math
import numbers
import os
import re
import shutil
import sys
import time
from hashlib import sha256
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from torch import nn

# --- 1. Hyperparameters: numbers that you choose. Each is explained where it is used. -------------
NAME = "char_gpt"  # a run is a file: NAME-1.pt, the next one NAME-2.pt
# Where a line has an else, its first value is for a GPU of NVIDIA that computes in bfloat16
# (numbers of 16 bits). They are estimates: no GPU was at hand to try them (tests/RESULTS.md).
FAST_GPU = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
SEED = 1337  # where all random numbers start, 0 to 2**32 - 1; another one gives another model
# Data
DATA = "input.txt"  # any UTF-8 text; this one is in the repository, or is downloaded
DATA_URL = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9  # the first 90% of the text is for training, the rest for measuring
# Model
BLOCK_SIZE = 256 if FAST_GPU else 128  # T, tokens that the model sees; more: better, and slower
N_EMBED = 384 if FAST_GPU else 128  # C; twice as many take up to 4 times as long
N_LAYERS = 6 if FAST_GPU else 4  # blocks (see Block); more: better, and slower
N_HEADS = 6 if FAST_GPU else 4  # H; must divide N_EMBED; a head size of 32 to 128 is usual
DROPOUT = 0.2 if FAST_GPU else 0.0  # share of numbers set to 0 (see FeedForward)
# Optimization
BATCH_SIZE = 64 if FAST_GPU else 32  # B; more: a more exact gradient, and a slower step
MAX_ITERS = 2200 if FAST_GPU else 1600  # training steps
MUON = True  # a better optimizer for most matrices (after the lesson); False: AdamW alone
LEARNING_RATE = 1e-3 if FAST_GPU else 8e-3  # the peak; too high: the loss jumps; too low: it crawls
ADAMW_LEARNING_RATE = 1e-3 if FAST_GPU else 1.6e-2  # the peak in place of it if MUON = False
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 100  # steps until the peak; at most a tenth of the training
BETAS = (0.9, 0.99)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 100 squares of them
WEIGHT_DECAY = 0.1 if FAST_GPU else 0.5  # pulls matrices towards zero; more: less overfitting
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
EVAL_INTERVAL = 200  # steps between two evaluations, which also save the run
EVAL_ITERS = 10  # batches of 4,096 tokens in an evaluation; more: more exact, and slower
# Generation
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 500  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = None  # draw among this many most likely tokens only; None: among all
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all
# Where the tensors are: the fastest device that is there
if torch.cuda.is_available():
    DEVICE = "cuda"
elif torch.backends.mps.is_available():
    DEVICE = "mps"  # Apple's GPU
else:
    DEVICE = "cpu"


# --- 2. Data and tokenizer ------------------------------------------------------------------------
# check(condition, message), defined at the end of this file, raises a UserError with the message
# unless the condition holds. The script then ends with this message.


class Tokenizer:
    """Turns text into ids and back. The id of a character is its place in the sorted vocabulary.

    >>> tokenizer = Tokenizer("hello")
    >>> tokenizer.vocabulary, tokenizer.encode("hole"), tokenizer.decode([1, 3, 2, 0])
    ('ehlo', [1, 3, 2, 0], 'hole')
    """

    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        self.stoi = {character: i for i, character in enumerate(self.vocabulary)}

    def encode(self, text):
        """Return the ids of a string, a list of ints. UserError: it has unknown characters."""
        unknown = sorted(set(text) - set(self.vocabulary))
        check(not unknown, f"characters that are not in the vocabulary: {unknown}")
        return [self.stoi[character] for character in text]

    def decode(self, ids):
        """Return the string of a list of ids."""
        return "".join(self.vocabulary[i] for i in ids)


def split_text(text, tokenizer, train_share, block_size):
    """Return {"train": ids of the first `train_share` of the text, "val": of the rest}, int64.

    The model trains on the first part only. On the second, the validation part, a low loss means
    that it learned how such texts are written. On the first, it may just know the text by heart.
    This is overfitting: the training loss goes on falling, while the validation loss rises."""
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    cut = int(train_share * len(ids))
    check(block_size < cut < len(ids) - 1, f"{len(ids)} tokens: few for BLOCK_SIZE, TRAIN_SHARE")
    return {"train": ids[:cut], "val": ids[cut:]}


def get_batch(tokens, batch_size, block_size, device):
    """Return random windows of the tokens (N,), and for each position its target: the next token.

    >>> x, y = get_batch(torch.tensor([5, 6, 7, 8]), batch_size=1, block_size=3, device="cpu")
    >>> x.tolist(), y.tolist()
    ([[5, 6, 7]], [[6, 7, 8]])

    One window gives T examples: 5 -> 6 and 5 6 -> 7 and 5 6 7 -> 8. x and y are (B, T), int64."""
    check(len(tokens) > block_size, f"{len(tokens)} tokens: a window and its targets need more")
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))  # from 0 to N - T - 1
    # (B, 1) + (T + 1,) -> (B, T + 1): each start + 0, 1, ..., T. Indexing picks the tokens there.
    windows = tokens[starts + torch.arange(block_size + 1)].long().to(device)  # long: int64
    return windows[:, :-1], windows[:, 1:]


# --- 3. Model -------------------------------------------------------------------------------------
# The bricks, all from PyTorch:
# - A layer, nn.Linear(n, m), turns a vector x of n numbers into one of m numbers: y = x W + b. The
#   matrix W (n × m numbers) and the bias b (m numbers) are parameters. They start random, between
#   -1/√n and 1/√n (unless LM sets them, see below), and training changes them. For x = (1, 2), W
#   with the rows (3, 0) and (1, 1), and b = (10, 20): y = (1 · 3 + 2 · 1 + 10, 1 · 0 + 2 · 1 + 20),
#   which is (15, 22). PyTorch stores W with rows and columns exchanged, as `weight`, (m, n). A
#   tensor (B, T, n) becomes (B, T, m).
# - nn.Embedding(n, m) is a table of n rows with m numbers each. They are parameters, too. For the
#   number i, it returns row i.
# - A module is an object that holds layers and other modules. The classes below are modules. One
#   calls a module like a function: module(x) runs its method `forward`.
# - Training needs the gradient. PyTorch remembers how the loss was computed, step by step. From the
#   loss it goes back to the first layer, and multiplies the derivatives on its way (the chain
#   rule). Take y = w x and the loss y², with a parameter w = 3 and an input x = 2. Then y = 6 and
#   d loss / dy = 2 · 6 = 12. As dy / dw = x = 2, the gradient of w is d loss / dw = 12 · 2 = 24. As
#   dy / dx = w = 3, the layer before, which made x, gets d loss / dx = 12 · 3 = 36. For a number
#   that is used in several places, what comes back from them is added. Where a derivative is almost
#   0, the layers before it, nearer the input, hardly learn.
# - Softmax turns numbers into probabilities: p_i = exp(x_i) / (sum of exp(x_j) over all j). The
#   numbers 2, 1, 0 become 0.67, 0.24, 0.09: all positive, with sum 1. Adding the same number to all
#   of them changes nothing. Numbers that will go into a softmax are called logits, or scores.
#
# The whole model, from top to bottom, and one example on its way through it. LM is the language
# model, the class at the end of this section. The example is of a small one: V = 7, T = C = 4, one
# block with 2 heads. In 200 steps it has learned the line "to be or not to be", and now it reads
# "to b". The numbers are those of the last position, the b (rounded: a sum can be off by 0.01). A *
# marks what has parameters, and how many. Of the numbers at the right, only the two rows of
# embeddings are parameters; the others are computed from the text and the parameters.
#
#   LM      the ids of "t", "o", " " and "b" (B, T):     6      4      0      1
#           * token_embedding, 7 × 4: row 1, for "b"    -0.14  -0.87   0.06  -0.46
#           * position_embedding, 4 × 4: the last row   -0.15   0.33   0.00  -0.17
#             their sum, a vector of C numbers          -0.29  -0.54   0.06  -0.62
#   Block, N_LAYERS times:
#           * LayerNorm, 4 + 4: steady sizes, see Block
#           * MultiHead, 4 × 12 for q, k and v. Each position has 2 numbers v for each head. A head
#             averages those of "t", "o", " " and "b", with weights (how it gets them: see Head).
#             The weights of head 1:                     0.20   0.34   0.31   0.15
#             the weights of head 2:                     0.40   0.25   0.19   0.16
#             the averages, 2 numbers for each head:     0.29   0.45   0.03   0.15
#           * projection, 4 × 4 + 4: it mixes them.
#             This is what the position collects:        0.24  -0.52  -0.37  -0.08
#           * LayerNorm, 4 + 4
#           * FeedForward, 4 × 16 + 16 and 16 × 4 + 4: what the position computes
#             from all that it has                      -0.40   0.34   0.04  -0.02
#             a block adds both results to its input:   -0.45  -0.71  -0.26  -0.72
#   LM      * ln_f, 4 + 4, a LayerNorm. It makes
#             the mean 0 and the deviation 1:            0.45  -0.91   1.42  -0.97
#             then takes each number times a learned one, plus a
#             learned one (first 2.35 · 0.45 + 0.73):    1.79  -1.66   3.04  -2.17
#           * lm_head, 4 × 7: one logit for each possible next token, (B, T, V); softmax of them
#                                   " "    "b"    "e"    "n"    "o"    "r"    "t"
#             logits              -1.74   2.85   4.90   -0.45  -2.93   2.32  -0.23
#             probabilities        0.00   0.11   0.82    0.00   0.00   0.06   0.00
#             The true next character is "e": the loss is -ln 0.82 = 0.20.
#
# These are 312 parameters. With the constants of a CPU above there are 824,832: 8,320 for tokens,
# 16,384 for positions, 4 times 197,888 in blocks, 256 in ln_f and 8,320 in lm_head.


class Head(nn.Module):
    """Attention, softmax(q kᵀ / √hs) v: each position averages its own and earlier values.

    Linear layers (in MultiHead) give every position a query q (what it looks for), a key k (what it
    offers) and a value v (what it hands over), of hs numbers each. The score of two positions is
    q · k / √hs: large if q and k point the same way. Softmax turns a row of scores into weights.
    The result is the average of the values with these weights. (kᵀ is k with its rows and columns
    exchanged.) Three tokens, with B = H = hs = 1:

              scores, masked         weights            result
               k=2   k=0   k=1    v=10  v=20  v=30
        q=1      2  -inf  -inf    1.00  0     0         10     exp(-inf) = 0: it sees only itself
        q=0      0     0  -inf    0.50  0.50  0         15     both keys fit a query of 0 equally
        q=2      4     0     2   0.867 0.016 0.117      12.5   mostly the first: its key fits best

    >>> q = torch.tensor([1.0, 0, 2]).view(1, 1, 3, 1)  # B, H, T, hs = 1, 1, 3, 1
    >>> k = torch.tensor([2.0, 0, 1]).view(1, 1, 3, 1)
    >>> v = torch.tensor([10.0, 20, 30]).view(1, 1, 3, 1)
    >>> [round(result, 1) for result in Head()(q, k, v).flatten().tolist()]
    [10.0, 15.0, 12.5]
    """  # From Vaswani et al. 2017, equation 1.

    def forward(self, q, k, v):
        """Attend. q, k, v and the result are (B, H, T, hs); @ works on the last two dimensions."""
        T, hs = q.shape[-2:]
        # A score sums hs products, some positive, some negative. They partly cancel: 16 terms, at
        # random 1 or -1, sum to about 4 = √16 or to -4, seldom to 16. Divided by √hs, scores have
        # the same size for each hs. Large scores would push softmax to weights of 0 and 1. There
        # it hardly reacts to a change of the scores: its derivative is almost 0.
        # T × T scores for each head: for twice as many tokens, four times as much work. @ makes one
        # product of two matrices for each b and each head.
        scores = (q / hs**0.5) @ k.transpose(-2, -1)  # (B,H,T,hs) @ (B,H,hs,T) -> (B,H,T,T)
        # The mask hides the future. For T = 3 its rows are [0 -inf -inf], [0 0 -inf], [0 0 0]
        # (triu: -inf stays above the diagonal, the rest becomes 0). A score of -inf gets the weight
        # exp(-inf) = 0. Without the mask, position t sees its target, token t + 1, and learns to
        # copy it: a loss near 0. (Only the last position of a window does not see its target.)
        # Generation fails: it has no token t + 1 yet.
        mask = torch.full((T, T), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
        weights = F.softmax(scores + mask, dim=-1)  # (B, H, T, T), each row sums to 1
        return weights @ v  # (B, H, T, T) @ (B, H, T, hs) -> (B, H, T, hs)


# In the example "to b" above, hs = 2. In head 1, the query of "b" is (0.39, -0.71). The keys of
# "t", "o", " " and "b" are (-1.04, -0.01), (1.39, 0.30), (-0.02, -0.28) and (-0.50, 0.90). For "o",
# the score is (0.39 · 1.39 - 0.71 · 0.30) / √2 = 0.23. All four are -0.28, 0.23, 0.14 and -0.59.
# Softmax makes the weights of them. So "b" takes most from "o", whose key fits its query best.


class MultiHead(nn.Module):
    """H heads side by side, each with its own q, k and v (Vaswani et al. 2017, section 3.2.2).

    One head gives each position one average. H heads give H averages, of C / H numbers each: one
    head can look at the last few tokens, while another looks for a name further back. (They begin
    with different random numbers, so they learn different things.)"""

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        check(n_embed % n_heads == 0, f"N_HEADS = {n_heads} does not divide N_EMBED = {n_embed}")
        self.n_heads = n_heads
        # Three layers in one matrix: x W gives q, k and v of all heads, 3 C numbers. They have no
        # bias b, as in most newer models (measured: see tests/RESULTS.md, no difference).
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.head = Head()  # one object without parameters: it computes all H heads at once
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Let each position of x (B, T, C) collect from itself and those before it: (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).split(C, dim=-1)  # (B, T, C) @ (C, 3C) -> (B, T, 3C) -> three (B, T, C)
        # (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs): matrix products use the last two dimensions.
        # In view, -1 is the size that is left over: hs.
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in qkv)
        out = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        # So far each head has its own channels. The projection mixes them: (B, T, C) @ (C, C)
        return self.dropout(self.projection(out))


class FeedForward(nn.Module):
    """Two layers for each position on its own (Vaswani et al. 2017, section 3.3).

    Attention averages what there is; this computes something new from it. Each of the 4 C numbers
    between the two layers detects one pattern: it is x · (a column of W) + b, above 0 if x points
    enough like this column. relu, which is max(0, number), keeps that, and turns the rest into 0.
    (gpt2.py has gelu, which is almost the same.) The paper took 4 C, and so do we.

    In training, dropout sets a random part of the numbers to 0. With a part of 0.2, it multiplies
    the others by 1 / 0.8, so that sums keep their size. The model cannot rely on single numbers:
    less overfitting. When we measure or generate, it is switched off: all numbers are used."""

    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand = nn.Linear(n_embed, 4 * n_embed)
        self.shrink = nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Transform each position: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""
        # Without relu, two layers would be one (without biases, x A B = x (AB)), and one layer only
        # adds its inputs with fixed factors: it cannot say "if both are there". relu(a + b - 1)
        # can: of a and b that are 0 or 1, it makes 1 if both are 1, else 0.
        return self.dropout(self.shrink(F.relu(self.expand(x))))


class Block(nn.Module):
    """Attention, then feed-forward. The result of each is added to its input.

    These sums are residual connections (He et al. 2015, arXiv 1512.03385). Let f be one of the two,
    with its LayerNorm. For a single number x, the derivative of x + f(x) is 1 + f'(x). The chain
    rule multiplies all derivatives: thanks to the 1, the gradient reaches the first block. Products
    of small f' alone would make it vanish. With f' = 0.1 in 4 of them, 0.1⁴ = 0.0001 of it would be
    left; with the sums, it is 1.1⁴ = 1.46.

    LayerNorm shifts and scales the C numbers of each position to mean 0 and standard deviation 1
    (the mean of their squares is 1). For example, 1 3 1 3 and 10 30 10 30 both become -1 1 -1 1.
    Then it multiplies each channel by a learned number, which starts at 1, and adds a learned one,
    which starts at 0: training can give channels different sizes. So attention and feed-forward get
    numbers of a steady size, however large the sum x has grown. (Large ones would push the softmax
    of Head to weights of 0 and 1.) In a block, LayerNorm is applied inside f, not to the sum, so
    the derivative keeps its 1 (Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embed)
        self.attention = MultiHead(n_embed, n_heads, dropout)
        self.ln2 = nn.LayerNorm(n_embed)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x))


class LM(nn.Module):
    """The language model: token ids (B, T) -> for each position, logits of the next token.

    vocab_size is V, block_size the longest T, n_embed C, n_heads H, n_layers the blocks."""

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embed=n_embed,
                           n_heads=n_heads, n_layers=n_layers, dropout=dropout)  # fmt: skip
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # one row per token
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(n_embed, n_heads, dropout) for _ in range(n_layers)]
        self.blocks = nn.Sequential(*blocks)  # calls one after the other
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)  # no bias, as in GPT-2
        # Small parameters make small logits, so nearly equal probabilities: the loss starts near
        # ln V. It starts just above (4.18). For example, let two tokens come equally often. If one
        # gets 0.6 and not 0.5, the loss is 0.51 when it comes, but 0.92 when the other comes. The
        # mean, 0.71, is above ln 2 = 0.69.
        # With the larger numbers that nn.Linear begins with, it would start at 4.3.
        nn.init.normal_(self.lm_head.weight, std=0.02)  # random, deviation 0.02, as in GPT-2

    def forward(self, idx, targets=None):
        """Return the logits (B, T, V) for idx (B, T), and the loss for targets (B, T), or None.

        The loss is the mean of -ln(softmax(logits)[target]) in nats. Targets of -100 are no tokens,
        and do not count (see estimate_loss)."""
        T = idx.shape[1]
        check(0 < T <= self.block_size, f"T = {T} must be 1 to block_size = {self.block_size}")
        # autocast: matrix products in bfloat16, numbers of 16 bits that have 2 to 3 exact digits.
        # They are twice as fast if the hardware has them: has_bfloat16, at the end of this file,
        # says so. All else stays in float32, numbers of 32 bits with 7 exact digits.
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            # An average does not depend on the order of its terms: in the first block, the c of
            # "abc" would collect the same as that of "bac". (Later blocks could tell a little: the
            # b of "abc" has seen an a.) So each position adds its own vector.
            # (B, T, C) + (T, C) -> (B, T, C)
            x = self.token_embedding(idx) + self.position_embedding.weight[:T]
            x = self.ln_f(self.blocks(self.dropout(x)))
            logits = self.lm_head(x).float()  # (B, T, C) @ (C, V) -> (B, T, V), back in float32
        # cross_entropy contains the softmax. It takes (B·T, V) and (B·T,).
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# --- 4. Training ----------------------------------------------------------------------------------
@torch.no_grad()  # PyTorch need not remember how results were computed: it costs memory
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    """Return {"loss": nats per token}, the mean over all tokens (N,), except the first.

    The tokens are cut into windows side by side, so each is a target once. (The first ones of a
    window are predicted from few others, so this loss is a little too high.) With `eval_iters`, at
    most that many batches are used, evenly spread: of 10 windows, 5 are 0, 2, 4, 6 and 8. No random
    number is drawn. During training, evaluate (end of this file) calls it for both splits, with
    batches of 4,096 tokens."""
    model.eval()  # switches dropout off: the whole model is measured
    T = model.block_size
    device = next(model.parameters()).device
    n_windows = (len(tokens) + T - 2) // T  # N - 1 targets, T to a window, rounded up
    n_used = n_windows if eval_iters is None else min(n_windows, eval_iters * batch_size)
    starts = torch.tensor([(i * n_windows // n_used) * T for i in range(n_used)])
    total, count = 0.0, 0
    for some in starts.split(int(batch_size)):
        places = some[:, None] + torch.arange(T + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
        # The last window may reach beyond the end. There it gets the last token again (clamp), and
        # no targets: -100 is not counted.
        ids = tokens[places.clamp(max=len(tokens) - 1)].long()
        targets = ids.masked_fill(places >= len(tokens), -100)[:, 1:]
        _, loss = model(ids[:, :-1].to(device), targets.to(device))
        n = (targets != -100).sum().item()
        total += loss.item() * n  # the loss is a mean of n tokens
        count += n
    return {"loss": total / count}


def make_optimizers(model):
    """Return a list of optimizers, the rules that turn gradients into changes of the parameters.

    AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) keeps two averages for each parameter, of
    its gradients g and of their squares. In each step, an average becomes beta · average +
    (1 - beta) · new value. With beta = 0.9, an old value loses a tenth of its weight in each step,
    so about the last 10 count. (The averages start at 0. After n steps, AdamW divides them by
    1 - beta^n: after one step, the average is then g itself.) The parameter is moved by
    -rate · mean(g) / (√mean(g²) + 10⁻⁸). (10⁻⁸ prevents a division by 0.) If g is always 0.001, the
    quotient is 0.001 / 0.001 = 1. If g is always 0.1, it is 1 as well: where g hardly changes, all
    parameters learn at the same speed. If g is 1 and -1 in turn, mean(g) is about 0, and the
    parameter stays.

    Before that, matrices (those of nn.Embedding as well) are multiplied by 1 - rate · WEIGHT_DECAY.
    A matrix of small numbers turns a small difference of two inputs into a small difference of its
    results. To know single sentences by heart, a model must react to small differences. (This is a
    reason, no proof. That it helps was measured with char_gpt.py. Biases and LayerNorms only shift
    and scale: no decay.)"""
    by_muon = []
    # By default, Muon changes the matrices of the blocks. It averages gradients as well, but makes
    # the step equally large in all directions of a matrix: see section 6, after the lesson.
    if MUON:
        by_muon = [p for p in model.blocks.parameters() if p.dim() == 2]
    # `is`, as `in` would compare the numbers of two parameters.
    others = [p for p in model.parameters() if not any(p is matrix for matrix in by_muon)]
    decay = {"params": [p for p in others if p.dim() == 2], "weight_decay": WEIGHT_DECAY}
    no_decay = {"params": [p for p in others if p.dim() != 2], "weight_decay": 0.0}
    # fused: one pass over all parameters, which is faster. train_step sets the rate.
    adamw = torch.optim.AdamW([decay, no_decay], betas=BETAS, fused=True)
    return [adamw, Muon(by_muon, WEIGHT_DECAY)] if by_muon else [adamw]


def get_lr(step, max_iters, peak):
    """Return the learning rate of a step: a line up to the peak, then one down to FINAL_LR · peak.

    It rises because the optimizers' first averages are of few batches, and inexact. It falls
    because with large steps the parameters keep jumping around the minimum; small ones settle.
    With 100 steps and a peak of 1, the rates of steps 0, 9, 10 and 99 are:

    >>> [round(get_lr(step, 100, 1.0), 3) for step in (0, 9, 10, 99)]
    [0.1, 1.0, 0.989, 0.011]

    More steps make a longer line. So a run that is resumed with more of them goes on with a higher
    rate than it ended with."""
    warmup = max(1, min(WARMUP_ITERS, max_iters // 10))  # a short run has no time for more
    if step < warmup:
        return peak * ((step + 1) / warmup)
    left = (max_iters - step) / (max_iters - warmup + 1)  # just below 1 at first, near 0 at the end
    return peak * (FINAL_LR + (1 - FINAL_LR) * left)


def train_step(model, optimizers, x, y, lr):
    """Change the parameters once, to lower the loss on x, y (B, T). Return the loss before it."""
    model.train()  # switches dropout on
    _, loss = model(x, y)
    loss.backward()  # computes the gradient: d loss / d parameter, into `grad` of each parameter
    if GRADIENT_CLIP is not None:
        # The gradient is one long vector. If it is longer than GRADIENT_CLIP, it is scaled down to
        # this length. Otherwise, a single long one would rule AdamW's averages: mean(g) for about
        # 10 steps, √mean(g²) for about 100. So steps 10 to 100 after it would be too small.
        # (A precaution: char_gpt.py reaches the same loss without it.)
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # reads `grad`, and changes the parameters against it
        optimizer.zero_grad()  # otherwise the next gradient would be added to this one
    return loss.detach()  # the number alone, without what is remembered


def train(model, tokenizer, optimizers, splits, run):
    """Train up to step run["max_iters"]. Evaluate and save at every EVAL_INTERVAL steps.

    `run` is a dict with all that its file will hold. Among it are the seed, max_iters, the last
    saved step, the history {step: losses}, and the path of the file (None before the first save).
    There are two sets of parameters. "last", with the averages of the optimizers, is for --resume.
    "best" has the lowest validation loss, and is for generating. (The best of several measured
    losses is partly luck: on a new text, it would be a little higher.)

    Functions after the lesson print and save: evaluate, save_step, show_progress. After the last
    step, or Ctrl-C, main reads the best parameters from the file, measures them and continues the
    PROMPT. At Ctrl-C, the steps since the last save are lost. UserError: a loss is not finite."""
    device = next(model.parameters()).device
    peak = LEARNING_RATE if MUON else ADAMW_LEARNING_RATE
    start = time.perf_counter() - run["seconds"]  # a resumed run counts its earlier ones
    try:
        for step in range(run["step"], run["max_iters"] + 1):
            is_due = step % EVAL_INTERVAL == 0 or step == run["max_iters"]
            if is_due and step not in run["history"]:
                run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
                if step > run["step"]:  # not at the beginning: nothing has changed yet
                    save_step(run, step, model, optimizers, time.perf_counter() - start)
            if step == run["max_iters"]:
                break  # this round was for the last evaluation
            # The same step draws the same random numbers, also in a run that was resumed.
            torch.manual_seed(run["seed"] * 1_000_000 + step)
            x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
            loss = train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))
            show_progress(run, step, loss, time.perf_counter() - start)
    except KeyboardInterrupt:  # Ctrl-C: main goes on with the file
        if run["path"] is None:
            raise
        print(f"\nstopped at step {step}: going on with what is in {run['path']}", flush=True)


# --- 5. Generation --------------------------------------------------------------------------------
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Return the probabilities (V,) to draw the next token with, from logits (V,).

    temperature divides the logits: below 1, likely tokens become likelier; above 1, less so. 0 is
    greedy: always the most likely token. Of two tokens with logits 2 and 1, the first gets:

    >>> two = torch.tensor([2.0, 1.0])
    >>> [round(next_token_probabilities(two, t)[0].item(), 2) for t in (0, 0.5, 1, 2)]
    [1.0, 0.88, 0.73, 0.62]

    top_k keeps the k most likely tokens. top_p keeps the most likely ones until together they have
    the probability p: few tokens where the model is sure, many where it is not (Holtzman et al.
    2019, arXiv 1904.09751).

    >>> three = torch.tensor([0.5, 0.3, 0.2]).log()  # softmax gives 0.5, 0.3, 0.2
    >>> next_token_probabilities(three, top_k=2), next_token_probabilities(three, top_p=0.4)
    (tensor([0.6250, 0.3750, 0.0000]), tensor([1., 0., 0.]))
    """
    check(temperature >= 0, f"TEMPERATURE = {temperature} must be 0 or more")
    V = len(logits)
    logits = logits.float().cpu()  # on Apple's mps, draws were invalid
    if temperature == 0:
        return F.one_hot(logits.argmax(), V).float()  # 1 for the largest logit, 0 for all others
    # The largest logit becomes 0 first: the result is the same, and nothing can overflow.
    probabilities = F.softmax((logits - logits.max()) / temperature, dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    kept, ids = probabilities.topk(min(top_k or V, V))  # the most likely ones, in falling order
    if top_p is not None:
        before = kept.cumsum(0) - kept  # what the likelier tokens have together
        kept = kept.masked_fill(before >= top_p * kept.sum(), 0)  # sum: what top_k has left
    # Each goes back to its own place: result[ids[i]] = kept[i] / (sum of kept).
    return torch.zeros(V).scatter(0, ids, kept / kept.sum())


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    """Yield new token ids that continue the list `ids`. The model sees only the last T tokens."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    ids = [int(i) for i in ids]
    device = next(model.parameters()).device
    model.eval()  # switches dropout off
    for _ in range(max_new_tokens):
        idx = torch.tensor([ids[-model.block_size :]], device=device)
        logits, _ = model(idx)  # (1, T) -> (1, T, V); only the last position predicts a new token
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        yield ids[-1]


# Try this, one edit at a time, with --max-iters 400, and compare with --runs. Unedited, the loss on
# the validation text is 1.73, and with --seed 1 it is 1.75: a difference of 0.02 means nothing.
# - N_LAYERS = 1: 1.89. The later ones of four blocks can use what the earlier ones have found.
# - N_HEADS = 1: 1.73. A surprise: at this size, one head of 128 channels is as good as four of 32.
# - Delete "+ mask" in Head: the loss is 0.02. The model sees the answer, and has learned to copy
#   it. Generation has no answer to copy, and writes "ROMEO:ORERER:R:RROOREREEREREE".
# Many more edits are measured in tests/RESULTS.md, "What each part is worth".


# --- The lesson ends here. What follows: a better optimizer, files, flags and errors. -------------
# --- 6. Muon: for those who want to know ----------------------------------------------------------
# A matrix G turns a vector x into x G. It stretches some vectors more than others. For example, let
# G have the rows (5.5, 4.5) and (4.5, 5.5). Then (1, 1) G = (10, 10): in the direction of (1, 1),
# the factor is 10, the largest. And (1, -1) G = (1, -1): in that direction, at a right angle, it is
# 1, the smallest. A matrix of 128 × 384 numbers has 128 such directions, with factors in between.
# They are at right angles to each other, and so are their results (which we do not prove). The
# factors are called singular values.
#
# The gradient of a layer's matrix W is such a matrix G. In y = x W, y_j is the sum of all
# x_i · W_ij, so dy_j / dW_ij = x_i. Let d_j = d loss / dy_j. By the chain rule, one position of the
# batch adds the matrix x_i · d_j to the gradient. For x = (1, 1) and d = (3, 0), it has the rows
# (3, 0) and (3, 0). It turns (1, 1), the direction of x, into (6, 0), and (1, -1) into (0, 0). The
# gradient is the sum of these matrices: ten positions with this x and this d give (60, 0). So,
# unless their d cancel, a direction that many inputs have gets a large factor, a rare one a small.
# Three optimizers make different steps from the gradient G above:
#
#                plain gradient     AdamW, first step     Muon
#                5.5  4.5           1  1                  0.7  0.0
#                4.5  5.5           1  1                  0.0  0.7
#     factors    10 and 1           2 and 0               0.7 and 0.7 (orthogonalize says why 0.7)
#
# A plain step is 10 times as long for (1, 1) as for (1, -1). Does it need to go 10 times as far?
# Often not: where many positions add up, the gradient is large, and it also changes fast. Take two
# parameters a = b = 1, for a frequent and a rare direction, with the loss 5 a² + b² / 2, so with
# the gradient (10 a, b). Both should become 0, so both need the same step, -1. The rate 0.1 makes
# a = 1 - 0.1 · 10 = 0, and b = 0.9, which has hardly begun. The rate 1 would be right for b, and
# makes a = 1 - 10 = -9: it overshoots. So the rate must be low, and plain steps learn little for
# rare directions. AdamW makes equal steps for single numbers. It would help a and b. But most
# directions are mixtures of all numbers of a matrix: above, AdamW learns nothing for (1, -1). Muon
# makes the factors equal: it learns as much for rare directions as for frequent ones.
#
# In char_gpt.py, after 400 steps, the loss is 1.66 with Muon and 1.87 with AdamW alone, each at its
# best rate for so few steps, 0.016. (Muon's best rate over all 1,600 steps is 0.008, the default;
# with it, the loss after a run of 400 steps is 1.73.)
# Embeddings and lm_head stay with AdamW, which Jordan et al. found to be better.
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps for matrices.

    It averages the gradients of each matrix, and makes the factors of the average about equal."""

    def __init__(self, matrices, weight_decay):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})  # for each group

    @torch.no_grad()
    def step(self):
        """Change every matrix. `backward` has filled its `grad`; train_step has set "lr"."""
        for group in self.param_groups:  # a dict: the matrices, "lr" and "weight_decay"
            for p in group["params"]:
                if p.grad is None:  # not used, or excluded from training: left alone
                    continue
                state = self.state[p]  # a dict of our own for each matrix
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"]  # too small at first; orthogonalize divides by its norm
                average.lerp_(p.grad, 0.05)  # in place (_): 0.95 · old average + 0.05 · gradient
                # 0.95 · average + 0.05 · gradient: the newest gradient counts about twice, so the
                # step reacts sooner.
                update = orthogonalize(p.grad.lerp(average, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The sum of the squares of a matrix's numbers is that of its factors (see below).
                # 128 × 384 numbers have 128 factors. If all are 1, a square is 128 / (128 · 384)
                # on average, so a number is about 1/√384. AdamW's quotients are 1 at first, and
                # 0.2 to 0.4 later, when gradients change their signs (measured by Liu et al. 2025,
                # arXiv 2502.16982). So Liu et al. multiply Muon's step by 0.2 · √384: its numbers
                # are about 0.2, too, and one rate serves both optimizers.
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix):
    """Return the matrix with its factors (singular values) about equal, 0.7 to 1.2.

    (But a factor of 0 stays 0, and one below 1/100 of the norm stays smaller than the others.)

    >>> result = orthogonalize(torch.tensor([[5.5, 4.5], [4.5, 5.5]]))
    >>> result.mul(10).round().abs().tolist()  # abs makes 0 of -0
    [[7.0, 0.0], [0.0, 7.0]]

    First, the matrix M is divided by its norm, so that no factor is above 1. (The square of the
    norm is the sum of the squares of all numbers, and of all factors. Above, it is 101 = 10² + 1².)

    M Mᵀ M has the directions of M (which we do not prove). Each factor s becomes s³: above, (1, 1)
    is multiplied by 10 three times. So 3.4445 M - 4.775 M Mᵀ M + 2.0315 M Mᵀ M Mᵀ M turns each
    factor s into 3.4445 s - 4.775 s³ + 2.0315 s⁵, and one need not know the directions. Jordan et
    al. chose the three numbers so that a small s grows fast, to 3.4 s, and an s near 1 stays
    between 0.7 and 1.2. Five rounds of it (Newton-Schulz) are enough:

        s = 1       0.70  1.11  0.72  1.09  0.70
        s = 0.01    0.03  0.12  0.40  1.09  0.70
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # the same result, from smaller products
    x = matrix.bfloat16() if has_bfloat16(matrix.device) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.to(matrix.dtype)


# --- 7. Runs and other files ----------------------------------------------------------------------
# A run is a dict, and the file that holds it: NAME-1.pt, the next one NAME-2.pt. It has all that is
# needed to generate, to train further and to compare. No run overwrites the file of another one.


def find_runs():
    """Return {number: path} of this folder's files NAME-NUMBER.pt, the newest last."""
    found = {}
    for path in Path().glob("*.pt"):
        match = re.fullmatch(r"(.+)-([1-9][0-9]*)", path.stem)
        if match and match[1] == NAME:
            found[int(match[2])] = path
    return dict(sorted(found.items()))


def saved_runs():
    """Return the paths of this folder's runs, the newest last. UserError: there is none."""
    paths = [path for path in find_runs().values() if path.stat().st_size > 0]  # 0: a killed one
    check(paths, f"no run here: python {NAME}.py first")
    return paths


def take_number():
    """Create the next NAME-NUMBER.pt, still empty, and return its path."""
    path = Path(f"{NAME}-{max(find_runs(), default=0) + 1}.pt")
    try:
        path.touch(exist_ok=False)
    except FileExistsError:  # another run was faster
        return take_number()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path


def new_run(text, flags, device):
    """Return (run, model, tokenizer) at the beginning of a training."""
    run = {
        "script": NAME,
        "path": None,  # it gets a file at the first save
        "text_id": None,  # see name_text
        "seed": int(SEED if flags.seed is None else flags.seed),
        "max_iters": int(MAX_ITERS),
        "step": 0,  # the last one that was saved
        "best_step": None,  # the one with the lowest validation loss
        "history": {},  # {step: {split: {"loss": nats per token}}}
        "val_loss": None,  # exact, of the best parameters, after training
        "seconds": 0.0,  # of training, all parts added
        "constants": constants(),
    }
    torch.manual_seed(run["seed"])
    tokenizer = Tokenizer(text)
    model = LM(tokenizer.vocab_size, BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT).to(device)
    run["vocabulary"] = tokenizer.vocabulary
    run["config"] = {name: plain(value) for name, value in model.config.items()}
    return run, model, tokenizer


def plain(value):
    """Return a NumPy number as one of Python's: a run's file can hold no other."""
    return value.item() if hasattr(value, "item") else value


def constants():
    """Return {name: value as text} of the constants in force, and a hash of the code behind."""
    simple = (numbers.Number, str, tuple, type(None))
    found = {}
    for name, value in globals().items():
        if name.isupper() and isinstance(value, simple):
            found[name] = str(value)
    if os.path.isfile(globals().get("__file__", "")):  # a notebook has no __file__
        code = Path(__file__).read_text(encoding="utf-8").partition("\n# --- 2.")[2]
        found["code"] = sha256(code.encode()).hexdigest()
    return found


def differences(new, old):
    """Return {name: value} of what has another value in `old`."""
    return {name: value for name, value in new.items() if old.get(name) != value}


def resume(run, model, optimizers, flags):
    """Set up model and optimizers as they were at the last save. Say which constants differ."""
    model.load_state_dict(run["last"])
    if flags.seed is not None:
        run["seed"] = flags.seed
    if run["optimizer_names"] == [type(optimizer).__name__ for optimizer in optimizers]:
        for optimizer, state in zip(optimizers, run["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    else:
        print(f"the run had {run['optimizer_names']}: the averages of other optimizers start anew")
    edited = differences(constants(), run["constants"])
    # What the run has under the same name is kept: sizes, DROPOUT, SEED and MAX_ITERS.
    own = run | run["config"]
    kept = [name for name in edited if name.lower() in own and name != "PROMPT"]
    used = {name: value for name, value in edited.items() if name not in kept}
    if edited:
        print(f"edited since: {', '.join(kept) or 'nothing'} (the run's values are kept)", end="; ")
        print(f"{', '.join(used) or 'nothing'} (the script's are used from now on)")
    run["constants"] |= used


def name_text(run, path, text, cut):
    """Say in the run which text it is of. If it was another one, the run gets a new number."""
    text_id = f"{sha256(text.encode()).hexdigest()} {cut}"
    if run["text_id"] not in (None, text_id):
        print(f"{run['path']} is of another text, or another part of it: a new number")
        run |= {"path": None, "best_step": None, "history": {}}
    start = text.strip().partition("\n")[0]
    run |= {"text_id": text_id, "text": path.name, "start": start[:20]}


def save_step(run, step, model, optimizers, seconds):
    """Write the run with what it has reached in a step."""
    weights = model.state_dict()  # who compiles the model by hand gets names with a prefix
    weights = {name.removeprefix("_orig_mod."): p for name, p in weights.items()}
    run |= {"step": step, "seconds": seconds, "val_loss": None, "last": weights}
    run["optimizers"] = [optimizer.state_dict()["state"] for optimizer in optimizers]
    run["optimizer_names"] = [type(optimizer).__name__ for optimizer in optimizers]
    best = run["best_step"]
    if best is None or estimate(run, step) < estimate(run, best):
        run["best_step"] = step
        run["best"] = copy.deepcopy(weights)
    write_run(run)


def estimate(run, step):
    """Return the validation loss that was estimated at a step."""
    return run["history"][step]["val"]["loss"]


def write_run(run):
    """Write a run to its file, and draw its plot. The first time, it gets a number."""
    path = run["path"] or take_number()
    try:
        write_file(path, lambda part: torch.save(run | {"path": None}, part))
    finally:
        if path.exists() and path.stat().st_size == 0:  # its first save failed
            path.unlink()
    run["path"] = path
    try:
        draw_run(run)
    except Exception as error:  # a viewer holds the picture, matplotlib is broken: go on
        print(f"no picture of {path}: {error}")


def read_run(path, mmap=False):
    """Return the run of a file. With mmap, its tensors are read when they are used."""
    run = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # it can run no code
    check(run["script"] == NAME, f"it is of {run['script']}.py")
    return run | {"path": Path(path)}


def load_run(path, device, mmap=False):
    """Return (run, model with its best parameters, tokenizer). UserError: no run of this script."""
    check(os.path.isfile(path), f"there is no file {path}")
    try:
        run = read_run(path, mmap)
        tokenizer = Tokenizer(run["vocabulary"])
        model = LM(**run["config"])
        model.load_state_dict(run["best"])
    except Exception as error:  # a file can be damaged in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason.partition(". ")[0][:150]
        kinds = "does not fit this script (edited since?), is of another script, or damaged"
        raise UserError(f"{path} {kinds}: {reason}") from error
    return run, model.to(device).eval(), tokenizer


def summary(run):
    """Return steps, loss and time of a run as text. Its loss is exact, or an estimate: ~1.5."""
    loss = run["val_loss"]
    words = f"~{estimate(run, run['best_step']):.4f}" if loss is None else f"{loss:.4f}"
    return f"{run['step']:,} steps  {words:>7}  {run['seconds']:,.0f} s"


def list_runs():
    """Print a line for each run of this folder, with what differs from the first one."""
    first = None
    for path in saved_runs():
        try:
            run = read_run(path, mmap=True)
        except Exception as error:
            print(f"{path}  cannot be read: {error!r:.50}")
            continue
        now = {"SEED": str(run["seed"]), "MAX_ITERS": str(run["max_iters"])}  # flags can set these
        now = run["constants"] | now
        first = first or now
        changes = differences(now, first)
        edits = [f"{name} = {value}" for name, value in changes.items() if name != "code"]
        if "code" in changes and "code" in first:
            edits.append("code edited")
        size = path.stat().st_size / 1e6
        print(f"{path}  {run['text']}  {summary(run)}  {size:,.0f} MB  {', '.join(edits)}")


def draw_run(run):
    """Draw the losses of a run into a picture beside its file."""
    if "ipykernel" not in sys.modules:  # `!python` in a notebook inherits a backend, but not
        os.environ.pop("MPLBACKEND", None)  # the package that it is in
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for split, style in (("train", "--"), ("val", "-")):
        losses = [entry[split]["loss"] for entry in run["history"].values()]
        axes.plot(list(run["history"]), losses, style, label=f"{split} (estimated)")
    axes.axhline(math.log(run["config"]["vocab_size"]), color="gray", label="uniform guess: ln V")
    title = f"{run['path'].stem}: {summary(run)} (the loss is exact, unless marked ~)"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend()
    picture = run["path"].with_suffix(".png")
    write_file(picture, lambda part: figure.savefig(part, format="png", dpi=120))


def write_file(path, write):
    """Let `write` fill PATH.PID.part, then move it to `path`: a kill leaves no half of a file."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise UserError(f"cannot write {path} (a full disk?): {error}") from error
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(pattern):
    """Remove files PATH.PID.part whose process was killed, where /proc knows who is alive."""
    for part in Path().glob(pattern):
        pid = part.suffixes[-2][1:]
        if pid.isdecimal() and Path("/proc/self").exists() and not Path("/proc", pid).exists():
            part.unlink(missing_ok=True)


def find_data(path):
    """Return the path of the text: `path`, or for None DATA (here, beside the script, fetched)."""
    script = Path(globals().get("__file__", ""))  # a notebook has no __file__
    for folder in (Path(), script.parent, script.resolve().parent):
        if path is None and (folder / DATA).is_file():
            path = folder / DATA
    if path is None and DATA_URL.endswith(f"/{DATA}"):
        path = Path(DATA)
        try:
            content = requests.get(DATA_URL, timeout=30).content
            check(sha256(content).hexdigest() == DATA_SHA256, "it is not the expected file")
        except (OSError, ValueError) as error:
            raise UserError(f"put {DATA_URL} at {path.absolute()} by hand: {error}") from error
        write_file(path, lambda part: part.write_bytes(content))
    path = Path(path or DATA)
    check(os.path.isfile(path), f"there is no file {path}: name one with --data")
    return path


def read_text(path):
    """Return the text of a UTF-8 file. UserError: it is none, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark that Windows adds
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start:,}: save it so") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    check(text and "\0" not in text, f"{path} is empty, or UTF-16: save it as UTF-8")
    return text


# --- 8. Flags, errors, main -----------------------------------------------------------------------
class UserError(ValueError):
    """A mistake that the user can mend. The end of this file prints it as one line."""


def check(condition, message):
    """Raise UserError with the message, unless the condition holds."""
    if not condition:
        raise UserError(message)


def has_bfloat16(device):
    """Return whether the hardware itself computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.6
        names = ("avx512_bf16", "amx_bf16", "bf16")
        return any(torch.cpu.get_capabilities().get(name) for name in names)
    return False


def find_device(name):
    """Return the torch.device of a name. UserError: there is no such device here."""
    try:
        return torch.zeros(1, device=name).device
    except Exception as error:  # each kind of device has an error of its own
        reason, _, _ = str(error).partition("\n")
        raise UserError(f"device {name}: {reason}") from error


def keep_freed_memory():
    """Make glibc keep freed memory. By default, each step would get it from the kernel again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def show_progress(run, step, loss, seconds):
    """Tell how far the training is: on one line of a terminal, elsewhere in a line every 30 s."""
    if step % 10 > 0:  # printing the loss makes a GPU wait: not at every step
        return
    left = seconds / (step + 1) * (run["max_iters"] - step)
    speed = BATCH_SIZE * run["config"]["block_size"] * (step + 1) / seconds
    line = f"step {step:>5}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left:,.0f} s left"
    if sys.stdout and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(line.ljust(60)[:width], end="\r", flush=True)
    elif seconds > run.get("shown", 0) + 30:  # the second at which the last line was printed
        print(line, flush=True)
        run["shown"] = seconds


def evaluate(model, tokenizer, splits, prompt, step):
    """Print losses and a sample. Return {split: losses}. UserError: a loss is not finite."""
    batch_size = max(1, 4096 // model.block_size)  # not BATCH_SIZE, so that losses compare
    losses = {}
    words = f"step {step:>5}"
    for split, tokens in splits.items():
        losses[split] = estimate_loss(model, tokens, batch_size, EVAL_ITERS)
        for name, value in losses[split].items():
            check(math.isfinite(value), "the loss is not finite: lower the learning rate")
            words += f"  {split} {name} {value:.4f}"
    ids = generate(model, tokenizer.encode(prompt), 60, TEMPERATURE, TOP_K, TOP_P)
    print(f"{words:<60}\n            {tokenizer.decode(ids)!r}", flush=True)
    return losses


def printable(text):
    """Return the text with its control characters spelled: a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def write_sample(model, tokenizer, prompt):
    """Print the prompt, and its continuation while it is made. Return both as one string."""
    ids = tokenizer.encode(prompt)
    print(printable(prompt), end="", flush=True)
    for token in generate(model, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P):
        ids.append(token)
        print(printable(tokenizer.decode([token])), end="", flush=True)
    print(flush=True)
    return tokenizer.decode(ids)


def check_characters(text, what, run):
    """Raise UserError if a text has characters without an id in the run."""
    unknown = sorted(set(text) - set(run["vocabulary"]))
    words = ", ".join(map(repr, unknown))
    check(not unknown, f"{what} has characters that {run['text']} never shows: {words:.99}")


def choose_prompt(flags, run):
    """Return --prompt, or PROMPT, or the start of the text if it lacks characters of PROMPT."""
    if flags.prompt is None and set(PROMPT) - set(run["vocabulary"]):
        print(f"{run['text']} lacks characters of PROMPT: without --prompt it is {run['start']!r}")
        return run["start"]
    prompt = PROMPT if flags.prompt is None else flags.prompt
    check_characters(prompt, "the prompt", run)
    return prompt


def parse_flags(argv):
    """Return the flags of the command line, or of the list argv. A notebook has neither."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description="Train a GPT and let it write.")
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    either("--sample", action="store_true", help="no training: continue the prompt with a run")
    either("--resume", action="store_true", help="train a run further")
    either("--runs", action="store_true", help="list the runs of this folder")
    add("--run", metavar="FILE", help="the run for --sample and --resume (default: the newest)")
    add("--prompt", metavar="TEXT", help=f"text to continue (default: {PROMPT!r})")
    add("--max-iters", metavar="N", type=int, help=f"training steps in all (default: {MAX_ITERS})")
    add("--data", metavar="PATH", help=f"UTF-8 text to train on (default: {DATA})")
    add("--device", metavar="NAME", default=DEVICE, help="cpu, cuda, ... (default: %(default)s)")
    add("--seed", metavar="N", type=int, help=f"default: {SEED}; with --sample, another each time")
    in_notebook = argv is None and "kernel_launcher" in sys.argv[0]
    flags = parser.parse_args([] if in_notebook else argv)
    if flags.run and not (flags.sample or flags.resume):
        parser.error("--run needs --sample or --resume")
    return flags


def prepare(flags, device):
    """Return (run, model, tokenizer, optimizers, splits) of a new run, or of one to go on with."""
    path = find_data(flags.data)
    text = read_text(path)
    if flags.resume:
        run, model, tokenizer = load_run(flags.run or saved_runs()[-1], device)
    else:
        run, model, tokenizer = new_run(text, flags, device)
    if flags.max_iters is not None:
        run["max_iters"] = flags.max_iters
    done = f"{run['step']:,} of {run['max_iters']:,} steps are done"
    check(run["step"] < run["max_iters"], f"{done}: --max-iters N trains further")
    check(EVAL_INTERVAL > 0, f"EVAL_INTERVAL = {EVAL_INTERVAL} must be 1 or more")
    optimizers = make_optimizers(model)
    if flags.resume:
        check_characters(text, path, run)
        resume(run, model, optimizers, flags)
    splits = split_text(text, tokenizer, TRAIN_SHARE, model.block_size)
    name_text(run, path, text, len(splits["train"]))
    run["prompt"] = choose_prompt(flags, run)
    print(f"{path}: {len(text):,} characters, ln V = {math.log(tokenizer.vocab_size):.4f}")
    return run, model, tokenizer, optimizers, splits


def measure(run, model, splits):
    """Measure the best parameters exactly, print and save it. Return what `main` promises."""
    loss = estimate_loss(model, splits["val"], BATCH_SIZE)["loss"]
    bits = loss / math.log(2)
    print(f"{run['path']}: the best of {run['step']:,} steps is {run['best_step']:,}", end=", ")
    print(f"{loss:.4f} nats, {bits:.4f} bits a token on all of the validation text")
    run["val_loss"] = loss
    write_run(run)
    tokens = run["step"] * BATCH_SIZE * model.block_size
    results = {"val_loss": loss, "bits_per_character": bits, "steps": run["step"]}
    return results | {"seconds": run["seconds"], "tokens_per_second": tokens / run["seconds"]}


def main(argv=None):
    """Train and sample as the flags say (a list of strings; None: those of the command line).

    Return {"val_loss": nats per token over the whole validation split, "bits_per_character",
    "steps", "seconds", "tokens_per_second", "parameters", "text"}: after --sample, the last two."""
    flags = parse_flags(argv)
    check(Path(NAME).name == NAME, f"NAME = {NAME!r} must be a file's name, without a folder")
    seed = SEED if flags.seed is None else flags.seed
    check(0 <= seed < 2**32, f"SEED = {seed} must be 0 to 2**32 - 1")  # 32 bits are used
    if flags.runs:
        list_runs()
        return {}
    device = find_device(flags.device)
    if flags.sample:
        run, model, tokenizer = load_run(flags.run or saved_runs()[-1], device, mmap=True)
        run["prompt"] = choose_prompt(flags, run)
        run["seed"] = torch.seed() % 2**32 if flags.seed is None else flags.seed
    else:
        check(os.access(".", os.W_OK), "cannot write into this folder: a run needs a file in it")
        keep_freed_memory()
        remove_leftovers(f"{NAME}-*.*.part")
        run, model, tokenizer, optimizers, splits = prepare(flags, device)
    results = {"parameters": sum(p.numel() for p in model.parameters())}
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {run['seed']}", end="; ")
    print(f"{results['parameters']:,} parameters", flush=True)
    if not flags.sample:
        train(model, tokenizer, optimizers, splits, run)
        run, model, tokenizer = load_run(run["path"], device)
        results |= measure(run, model, splits)
    torch.manual_seed(run["seed"])
    return results | {"text": write_sample(model, tokenizer, run["prompt"])}


def is_out_of_memory(error):
    """Return whether an error says so: each kind of memory has words of its own."""
    if isinstance(error, MemoryError):
        return True
    return "out of memory" in str(error) or "allocate memory" in str(error)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has none
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks prints as ?
    try:
        main()
    except UserError as error:
        sys.exit(f"{NAME}.py: {error}")
    except BrokenPipeError:  # no error: `head`, for one, has seen enough
        sys.exit()
    except KeyboardInterrupt:
        if "kernel_launcher" in sys.argv[0]:  # a cell of a notebook was stopped
            raise
        print(f"{NAME}.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{NAME}.py: out of memory: halve BATCH_SIZE, or take a smaller model")
