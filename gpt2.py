"""GPT-2 in one file: it takes OpenAI's weights, or random ones, and trains them on any text.

Read char_gpt.py first. Most of it stands here again, so that this file can be used alone. In 2019,
OpenAI trained GPT-2 on 40 GB of text from the web. What it learned are its parameters; here they
are called weights, too (besides those of an average). Fine-tuning trains these weights further, on
a small text of another kind. It needs few steps: they know English already. What is new, in order:
- Tokenizer: tokens are pieces of words (byte pairs). input.txt has 338,025 of them, each of 3.3
  characters on average. So 1,024 tokens of a window are 3.3 times as much text as 1,024 characters.
- load_tokens: the text is encoded once, into a file; only the parts that are used are read.
- Head: the same attention, in one function of PyTorch that never stores all scores
- Cache: the keys and values of earlier tokens are kept (KV cache), so generation computes new ones
- FeedForward: gelu in place of relu. LM: the output layer is the table of token embeddings.
- openai_name, load_pretrained: OpenAI's weights, renamed, fit into LM
- make_optimizers: AdamW alone. Muon (section 6 of char_gpt.py) multiplies C × C matrices by each
  other, which takes C³ products, whatever the number of tokens. The model takes C² for each token.
  With its five rounds, Muon would add twice the model's work to a step of 1,024 tokens. (In
  char_gpt.py, it adds 12%. By arithmetic, it would add 6% to a step of 32,768 tokens on a GPU. We
  had no GPU to try it, and keep one recipe.)
- join_processes: several processes, each with a GPU, share a step
- train_step: the gradients of several small batches are added up (gradient accumulation)
- bits_per_character: what compares with char_gpt.py, whose tokens are shorter
- for_generation: weights of 16 bits. stream: a character can have several tokens.

    python gpt2.py                                  fine-tune OpenAI's weights, continue PROMPT
    python gpt2.py --sample --prompt "To be"        no training: continue with the newest run
    python gpt2.py --sample --init pretrained       no training: continue with OpenAI's weights
    python gpt2.py --init scratch --data my.txt     train random weights on a text; -h: all flags
    python gpt2.py --runs                           list what was trained in this folder
    python gpt2.py --resume --max-iters 200         train the newest run further
    torchrun --nproc_per_node=2 gpt2.py             train with two processes, on two GPUs

Measured with random weights (2 cores of an AMD EPYC, Linux, Python 3.11, torch 2.13.0): all logits
are those of another implementation, Hugging Face's transformers 5.23.0, to 0.000002. OpenAI's
weights (548 MB, fetched once; 50 MB of them are masks) were not at hand, so no loss of fine-tuning
is given here. A run's file has 2.0 GB: the last parameters and the best ones, 0.5 GB each, and
AdamW's averages, 1 GB. Saving needs twice the space for a moment. On a CPU, a run needs 6 GB of
memory.

A GPU needs about 5 GB, by arithmetic. Parameters, gradients, AdamW's averages and the best
parameters are five times 0.5 GB, a copy of the parameters in bfloat16 (see LM.forward) 0.25 GB.
Each of the BATCH_SIZE = 2 windows of 1,024 tokens adds 0.38 GB for what `backward` needs of the
blocks: 40 bytes for each of 12 · 768 · 1,024 numbers. (14 results have 2 bytes, as the next product
reads them in bfloat16: two of LayerNorm, q, k, v, one of attention, two times four of feed-forward.
Two sums have 4 bytes each, two masks of dropout 2 each.) And it adds 0.7 GB for 1,024 · 50,257
logits: 0.1 GB for them in bfloat16, and three times 0.2 GB for them in float32, their softmax, and
their gradient.

On a CPU, a run that was stopped and resumed ends with the same bits as an unbroken one of as many
steps. On a GPU, it does not quite: many processors add up the gradients of attention, in an order
that varies, and each sum is rounded.

Two lengths. The model can see BLOCK_SIZE = 1,024 tokens; evaluations and generation use all of
them. Training uses windows of WINDOW tokens, on a CPU 256: attention's work grows with T². So when
we fine-tune on a CPU, the estimated loss is of longer windows than the loss of a step. (From
scratch, positions beyond WINDOW would stay random. So there the model can see WINDOW tokens only.)

PyTorch supplies tensors (arrays of numbers), and more that is explained below. Letters of shapes:
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens
    N   tokens of a whole text

Papers: Radford et al. 2018 (GPT), Improving Language Understanding by Generative Pre-Training;
Radford et al. 2019 (GPT-2), Language Models are Unsupervised Multitask Learners; Brown et al. 2020
(GPT-3), arXiv 2005.14165.
"""

# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "requests==2.34.2", "matplotlib==3.11.2"]
# ///

import argparse
import copy
import ctypes
import json
import math
import numbers
import os
import re
import shutil
import sys
import time
from array import array
from codecs import getincrementaldecoder
from datetime import timedelta
from hashlib import file_digest, sha256
from pathlib import Path

import requests
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

# --- 1. Hyperparameters: numbers that you choose. Each is explained where it is used. -------------
NAME = "gpt2"  # a run is a file: NAME-1.pt, the next one NAME-2.pt
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
INIT = "pretrained"  # begin with OpenAI's weights; "scratch": with random ones
MODEL = "gpt2"  # which weights of OpenAI's: a name of SIZES; larger: better, and slower
SIZES = {  # C, blocks, H: Radford et al. 2019, table 2, and their weights
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
VOCAB_SIZE = 50_257  # V; a GPU takes 64 at a time: from scratch there, 50_304 = 64 · 786 is faster
BLOCK_SIZE = 1024  # the longest T: rows of the table of positions (from scratch: WINDOW)
WINDOW = 1024 if FAST_GPU else 256  # T in training, at most BLOCK_SIZE; more: better, and slower
N_EMBED = None  # C; None: as MODEL has it; twice as many take up to 4 times as long
N_LAYERS = None  # blocks; None: as MODEL has it; more: better, and slower
N_HEADS = None  # H; None: as MODEL has it; must divide N_EMBED; a head size of 64 is usual
QKV_BIAS = True  # biases on q, k and v: OpenAI's weights have them, most newer models do not
DROPOUT = 0.1  # share of numbers set to 0 (see FeedForward); 0.1 as in GPT-2
# Optimization
BATCH_SIZE = 2  # B, windows at a time; more: faster, as long as the memory lasts
TOKENS_PER_STEP = 32_768 if FAST_GPU else 1024  # more: a more exact gradient, and a slower step
MAX_ITERS = 100  # training steps
LEARNING_RATE = 5e-5  # the peak from OpenAI's weights; too high: they forget; too low: it crawls
SCRATCH_LEARNING_RATE = 6e-4  # the peak from scratch, as in GPT-3 for this size
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 100  # steps until the peak; at most a tenth of the training
BETAS = (0.9, 0.95)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 20 squares; as GPT-3
WEIGHT_DECAY = 0.1  # pulls matrices towards zero; more: less overfitting; 0.1 as in GPT-3
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
COMPILE = FAST_GPU  # let torch.compile make a faster program of the model; it takes a minute
EVAL_INTERVAL = 50  # steps between two evaluations, which also save the run
EVAL_ITERS = 10 if FAST_GPU else 2  # batches of 4,096 tokens in an evaluation; more: more exact
MAX_VAL_TOKENS = 1_000_000 if FAST_GPU else 50_000  # of a longer text, measuring uses so many
# Generation
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 500  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = 50  # draw among this many most likely tokens; None: among all, most of which do not fit
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all
HALF_WEIGHTS = True  # write with 16 bits per weight: faster, and precise to 3 digits (a GPU: 2)
# OpenAI's weights
WEIGHTS_URL = "https://huggingface.co/openai-community/{}/resolve/{}/model.safetensors"
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of gpt2
WEIGHTS_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
# torchrun starts several processes (see join_processes), and sets environment variables in each:
# how many processes there are, and the number of this one, from 0.
N_RANKS = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
RANK = int(os.environ["RANK"]) if N_RANKS > 1 else 0
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
    r"""Turns text into ids and back with GPT-2's byte-pair encoding (BPE). It knows any text.

    In UTF-8, a character is 1 to 4 bytes. Each of the 256 bytes is a token, so any text has ids.
    The other tokens are longer. OpenAI learned them from its text (Sennrich et al. 2015, arXiv
    1508.07909): count all pairs of neighbours, make one token of the most frequent pair, put it
    everywhere, and count again, 50,000 times. Three such merges, for "the thin the then":

        t·h·e ␣·t·h·i·n ␣·t·h·e ␣·t·h·e·n    t+h 4 times, h+e 3, ␣+t 3, ...: th gets id 256
        th·e ␣·th·i·n ␣·th·e ␣·th·e·n        th+e 3, ␣+th 3 (we take the first): the gets id 257
        the ␣·th·i·n ␣·the ␣·the·n           ␣+the 2, the+n 1, ...: ␣the gets id 258

    (␣ is a space.) A frequent word ends as one token, a rare word stays in several. Encoding makes
    the same merges in the same order. In ␣thin, only t+h is merged, so it has four tokens. Here,
    the id of a byte is the byte: space 32, i 105, n 110. (GPT-2 has another order of bytes.)

    >>> ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    >>> options = {"mergeable_ranks": ranks, "special_tokens": {}}
    >>> tiktoken.Encoding("example", pat_str=r" ?\w+", **options).encode("the thin the then")
    [257, 32, 256, 105, 110, 258, 258, 110]

    A pattern first splits the text into words, numbers, marks and white space, and no merge crosses
    a border. Otherwise "dog.", "dog!" and "dog?" would each use up a token. A space belongs to the
    word after it. With GPT-2's own merges, a sentence becomes 14 tokens:

        To   ␣be ,  ␣or ␣not ␣to ␣be :  ␣unquestion ably ␣Ham let  's  .
        2514 307 11 393 407  284 307 25 38766       1346 4345 1616 338 13

    The last id, 50256, is <|endoftext|>. It separates documents; one can write it into a text."""

    vocab_size = 50_257  # 256 bytes, 50,000 merges, and <|endoftext|>

    def __init__(self, vocabulary="gpt2"):
        check(vocabulary == "gpt2", f"its tokens are of {vocabulary!r:.50}")
        self.vocabulary = vocabulary
        try:
            self.encoding = tiktoken.get_encoding(vocabulary)
        except (OSError, ValueError) as error:  # no network, or a damaged copy
            way = "start once with a network, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            raise UserError(f"tiktoken cannot get GPT-2's vocabulary: {way}: {error}") from error

    def encode(self, text):
        """Return the ids of a string, a list of ints."""
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids):
        """Return the string of a list of ids."""
        return self.encoding.decode(list(ids))


def load_tokens(path, tokenizer):
    """Return the ids of a UTF-8 text, (N,), int32. They are in a file, not in memory.

    The first time, encode_text (after the lesson) writes them into a file in this folder, for
    input.txt into input.txt.gpt2.bin. Then the file is mapped: it looks like a tensor, and the
    system reads the parts that are used. So the text can be larger than the memory. An id has 4
    bytes, for 3.3 characters on average: the file is a little larger than the text. Its first 64
    bytes say of which version of the text it is."""
    check(os.access(path, os.R_OK), f"cannot read {path}")
    version = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}".encode().ljust(64)
    kept = Path(f"{path.name}.gpt2.bin")
    found = None
    if kept.exists():
        with open(kept, "rb") as file:
            found = file.read(64)
    if found != version:
        print(f"encoding {path} into {kept}, once", flush=True)
        write_file(kept, lambda part: encode_text(path, tokenizer, version, part))
    size = kept.stat().st_size // 4
    return torch.from_file(str(kept), shared=True, size=size, dtype=torch.int32)[64 // 4 :]


def split_text(tokens, train_share, max_val_tokens, block_size):
    """Return {"train": the first `train_share` of the tokens, "val": the next `max_val_tokens`}.

    The model trains on the first part only. On the second, the validation part, a low loss means
    that it learned how such texts are written. On the first, it may just know the text by heart.
    This is overfitting: the training loss goes on falling, while the validation loss rises."""
    cut = int(train_share * len(tokens))
    check(block_size < cut < len(tokens) - 1, f"{len(tokens)} tokens: few for WINDOW, TRAIN_SHARE")
    # A slice of a tensor is no copy: the tokens stay in the file.
    return {"train": tokens[:cut], "val": tokens[cut : cut + max_val_tokens]}


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
# The whole model, from top to bottom, with the parameters of GPT-2: V = 50,257, C = 768, 12 blocks.
# A * marks parameters, and how many there are.
#   token ids (B, T)
#   LM * token_embedding, 50,257 × 768                                          38,597,376
#      * position_embedding, 1,024 × 768                                           786,432
#   Block, 12 times 7,087,872:                                                  85,054,464
#      * MultiHead, 768 × 2,304 + 2,304 and 768 × 768 + 768           2,362,368
#      * FeedForward, 768 × 3,072 + 3,072 and 3,072 × 768 + 768       4,722,432
#      * LayerNorm, twice 768 + 768                                       3,072
#   LM * ln_f, 768 + 768                                                             1,536
#        lm_head: the numbers of token_embedding once more (see tie_weights)             0
#   logits (B, T, V)
# These are 124,439,808. From scratch on a CPU, the table of positions has WINDOW = 256 rows, and
# the model has 123,849,984.


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
        """Attend. q and the result are (B, H, T, hs), k and v are (B, H, S, hs).

        S = T, or with a Cache the T new tokens and those before them."""
        # This function computes what char_gpt.py writes out: scores / √hs, mask, softmax, average.
        # It never stores all T · S scores (Dao et al. 2022, arXiv 2205.14135): `backward` computes
        # them again. It takes a few keys at a time, and keeps two sums for each query. For the
        # query 2 of the table above:
        #
        #     score    exp(score)    sum of exp · v    sum of exp    result, their quotient
        #       4         54.6            546.0            54.6         10.0
        #       0          1.0            566.0            55.6         10.2
        #       2          7.4            787.7            63.0         12.5
        T, S = q.shape[-2], k.shape[-2]
        if T == 1 or T == S:
            # is_causal: with the mask of char_gpt.py. A single new token may see all: no mask.
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        # Several new tokens after some in the cache. (generate has no such case; a program that
        # continues a dialogue has.) For T = 2 and S = 4, the rows of the mask are [1 1 1 0] and
        # [1 1 1 1]: 1 may be seen.
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Cache:
    """The keys and values of one block for all tokens so far (a KV cache).

    In each block, the mask lets a position see itself and earlier ones only. So its numbers in all
    blocks, and its keys and values, do not change when a token is added. Its query was needed once,
    for its own result. For three tokens:

        new token    computed    kept before    scores               result: average of
        1            q1 k1 v1    -              q1·k1                v1
        2            q2 k2 v2    k1 v1          q2·k1 q2·k2          v1 v2
        3            q3 k3 v3    k1 v1 k2 v2    q3·k1 q3·k2 q3·k3    v1 v2 v3

    Without a cache, token 3 would need k1, v1, k2 and v2 again, and all layers for tokens 1 and 2.
    It costs memory: for each token 2 · C numbers in each block, in float32 2 · 768 · 12 · 4 bytes =
    73,728 bytes in all, and 75.5 MB for 1,024 tokens. On 2 cores of an AMD EPYC, with HALF_WEIGHTS,
    the token after 1,000 others takes 12 ms, and 970 ms without a cache; after 10 others, it takes
    9 and 45 ms.

    There is room for `block_size` tokens from the start. A tensor cannot grow: each token would
    make a copy of it all."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0  # how many tokens are in it

    def append(self, k, v):
        """Add those of T new tokens, (B, H, T, hs). Return those of all S, (B, H, S, hs)."""
        if self.length == 0:
            B, H, _, hs = k.shape
            self.k = k.new_empty(B, H, self.block_size, hs)
            self.v = v.new_empty(B, H, self.block_size, hs)
        start = self.length
        self.length += k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class MultiHead(nn.Module):
    """H heads side by side, each with its own q, k and v (Vaswani et al. 2017, section 3.2.2).

    One head gives each position one average. H heads give H averages, of C / H numbers each: one
    head can look at the last few tokens, while another looks for a name further back. (They begin
    with different random numbers, so they learn different things.)"""

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        check(n_embed % n_heads == 0, f"N_HEADS = {n_heads} does not divide N_EMBED = {n_embed}")
        self.n_heads = n_heads
        # Three layers in one matrix: x W + b gives q, k and v of all heads, 3 C numbers. GPT-2 has
        # a bias b here, most newer models have none.
        self.qkv = nn.Linear(n_embed, 3 * n_embed)
        self.head = Head()  # one object without parameters: it computes all H heads at once
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        """Let each position of x (B, T, C) collect from itself and those before it: (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).split(C, dim=-1)  # (B, T, C) @ (C, 3C) -> (B, T, 3C) -> three (B, T, C)
        # (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs): matrix products use the last two dimensions.
        # In view, -1 is the size that is left over: hs.
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in qkv)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, T, hs) -> (B, H, S, hs)
        out = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        # So far each head has its own channels. The projection mixes them: (B, T, C) @ (C, C)
        return self.dropout(self.projection(out))


class FeedForward(nn.Module):
    """Two layers for each position on its own (Vaswani et al. 2017, section 3.3).

    Attention averages what there is; this computes something new from it. Each of the 4 C numbers
    between the two layers detects one pattern: it is x · (a column of W) + b, above 0 if x points
    enough like this column. gelu keeps that, and turns the rest into numbers near 0. (char_gpt.py
    has relu, max(0, number), which is almost the same.) The paper took 4 C, and so do we.

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
        # gelu(x) is 3.00 for 3, 0.84 for 1, -0.16 for -1, and -0.00 for -3: relu with a smooth bend
        # (Hendrycks and Gimpel 2016, arXiv 1606.08415). It is x · P, where P is the share of random
        # numbers (of the bell curve with mean 0 and deviation 1) that are below x. OpenAI's weights
        # were trained with it, with P approximated by a formula with tanh. So they need it.
        return self.dropout(self.shrink(F.gelu(self.expand(x), approximate="tanh")))


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

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.ln1(x), cache)
        return x + self.feed_forward(self.ln2(x))


class LM(nn.Module):
    """The language model: token ids (B, T) -> for each position, logits of the next token.

    vocab_size is V, block_size the longest T, n_embed C, n_heads H, n_layers the blocks."""

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, qkv_bias=True):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embed=n_embed,
                           n_heads=n_heads, n_layers=n_layers, dropout=dropout)  # fmt: skip
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # one row per token
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(n_embed, n_heads, dropout) for _ in range(n_layers)]
        self.blocks = nn.Sequential(*blocks)  # a list of modules
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)  # no bias, as in GPT-2
        # Small parameters make small logits, so nearly equal probabilities: the loss starts near
        # ln V. nn.Embedding would start with a deviation of 1. As this table is the output layer as
        # well, logits would have a deviation of √C = 28 for C = 768.
        # Some matrices start smaller. Each block adds two results to its input. A sum of n results
        # of random sign is about √n times as large as one of them; here n is 2 · n_layers. So in
        # the layers that make these results, the numbers are divided by √n, for 12 blocks by
        # √24 = 4.9. Then the numbers of the sum after 12 blocks are about 0.3, otherwise 1.5
        # (measured). The vectors of token and position, together about 0.03, are a part of this
        # sum: a tenth, or a fiftieth. If this share is too small, the last layers hardly see which
        # token they read.
        for name, p in self.named_parameters():
            if name.endswith(("projection.weight", "shrink.weight")):
                nn.init.normal_(p, std=0.02 / (2 * n_layers) ** 0.5)  # Radford et al. 2019
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)  # 0.02: Radford et al. 2018
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.tie_weights()
        self.config["qkv_bias"] = qkv_bias
        if not qkv_bias:  # newer models; the layer is the same without its bias
            for block in self.blocks:
                block.attention.qkv.bias = None

    def tie_weights(self):
        """Let one matrix be the token embedding and the output layer.

        Row i of it (V, C) is the vector of token i. The embedding turns token i into row i. The
        output layer computes logit i = x · row i, large where x points like row i. So the vector of
        a token is learned once, from reading and from predicting it (weight tying, Press and Wolf
        2016, arXiv 1608.05859). As nn.Linear stores W with rows and columns exchanged, both are
        (V, C). With a matrix of its own, the output layer would add 38.6 million parameters."""
        self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx, targets=None, caches=None):
        """Return the logits (B, T, V) for idx (B, T), and the loss for targets (B, T), or None.

        The loss is the mean of -ln(softmax(logits)[target]) in nats. Targets of -100 are no tokens,
        and do not count (see estimate_loss).

        `caches` has one Cache for each block; idx are the tokens that are not in them yet. With
        caches, only the last position gets logits, (B, 1, V): the others predict known tokens."""
        past = caches[0].length if caches else 0
        end = past + idx.shape[1]
        check(past < end <= self.block_size, f"{end} tokens, block_size = {self.block_size}")
        # autocast: matrix products in bfloat16, numbers of 16 bits that have 2 to 3 exact digits.
        # They are twice as fast if the hardware has them: has_bfloat16, at the end of this file,
        # says so. All else stays in float32, numbers of 32 bits with 7 exact digits.
        # It converts the weights in each call: for a single token, this takes longer than it saves.
        enabled = has_bfloat16(idx.device) and not caches
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=enabled):
            # An average does not depend on the order of its terms: in the first block, the c of
            # "abc" would collect the same as that of "bac". (Later blocks could tell a little: the
            # b of "abc" has seen an a.) So each position adds its own vector.
            # (B, T, C) + (T, C) -> (B, T, C)
            x = self.token_embedding(idx) + self.position_embedding.weight[past:end]
            x = self.dropout(x)
            for i, block in enumerate(self.blocks):
                x = block(x, caches[i] if caches else None)
            x = self.ln_f(x[:, -1:] if caches else x)
            logits = self.lm_head(x).float()  # (B, T, C) @ (C, V) -> (B, T, V), back in float32
        # cross_entropy contains the softmax. It takes (B·T, V) and (B·T,).
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def openai_name(name):
    """Return OpenAI's name of a parameter of LM.

    >>> openai_name("blocks.3.feed_forward.shrink.weight")
    'h.3.mlp.c_proj.weight'
    """
    pairs = {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks": "h",
        "ln1": "ln_1",
        "ln2": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "feed_forward.expand": "mlp.c_fc",
        "feed_forward.shrink": "mlp.c_proj",
    }
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def is_turned(name, tensor):
    """Return whether OpenAI has the transpose of what nn.Linear has, by OpenAI's name.

    OpenAI stored the W of x W + b, nn.Linear stores Wᵀ. This concerns the blocks' layers, c_*."""
    return ".c_" in name and tensor.dim() == 2


def load_pretrained(path, **sizes):
    """Return an LM with OpenAI's weights. `sizes` are the arguments of LM, as in its config.

    UserError: the file is damaged, or of another model."""
    model = LM(**sizes)
    # A matrix that is in two places, as the embedding is, has one name here.
    missing = {openai_name(name): p for name, p in model.named_parameters()}
    for name, tensor in read_safetensors(path):
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue  # OpenAI's mask is called bias; the output layer is the embedding once more
        check(name in missing, f"{path} has {name}, this model has not: MODEL, QKV_BIAS, {sizes}")
        p = missing.pop(name)
        tensor = tensor.T if is_turned(name, tensor) else tensor
        check(tensor.shape == p.shape, f"{path}: {name} does not fit: MODEL, VOCAB_SIZE, {sizes}")
        p.data.copy_(tensor)  # if a file has numbers of 16 bits, they become float32
    check(not missing, f"{path} lacks {', '.join(missing):.99}: are its weights in several files?")
    return model


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
    params = list(model.parameters())
    decay = {"params": [p for p in params if p.dim() == 2], "weight_decay": WEIGHT_DECAY}
    no_decay = {"params": [p for p in params if p.dim() != 2], "weight_decay": 0.0}
    return [torch.optim.AdamW([decay, no_decay], betas=BETAS, fused=True)]  # fused: it is faster


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


def join_processes(device):
    """Join the processes that torchrun has started, if any. Return the device of this one.

    `torchrun --nproc_per_node=2 gpt2.py` starts the script twice. It tells each process how many
    there are, N_RANKS, and its own number, RANK. Each has the whole model. They draw the same
    windows, and each takes its share: with two, every second one. When each has the gradient of its
    share, all replace it by the mean: of 3 and 5, both get 4. They began with the same parameters
    and make the same step, so their parameters stay equal. Their dropout draws different numbers.
    Only rank 0 prints, evaluates and writes files; the others wait for it, when they next share a
    gradient."""
    if N_RANKS == 1:
        return device
    if device.type == "cuda":  # each process has a GPU of its own
        n_here = int(os.environ["LOCAL_WORLD_SIZE"])
        n_gpus = torch.cuda.device_count()
        check(n_here <= n_gpus, f"{n_here} processes, but {n_gpus} GPUs for them")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"  # the library that they talk by
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    return device


def average(tensor):
    """Replace a tensor by its mean over all processes."""
    torch.distributed.all_reduce(tensor)  # now each has the sum
    tensor /= N_RANKS


def train_step(model, optimizers, x, y, lr):
    """Change the parameters once, to lower the loss on x, y (B, T). Return the loss before it.

    `backward` needs the results of every layer. Until then they stay in memory, which may be too
    small for all windows of a step. So BATCH_SIZE of them at a time go through the model: on a CPU,
    TOKENS_PER_STEP / (BATCH_SIZE · WINDOW) = 1024 / (2 · 256) = 2 batches. The gradient of a mean
    is the mean of the gradients. If those of the two batches are 3 and 5, that of all windows is 4.
    But `backward` adds: 3 + 5 = 8, and a plain step would be twice as long. (AdamW divides by the
    size of the gradients, so a constant factor changes nothing. But GRADIENT_CLIP = 1 would cut a
    gradient whose true length is 0.6, as it would seem to have 1.2.) So each loss is first
    multiplied by its share, 1/2: 1.5 + 2.5 = 4. This is gradient accumulation."""
    model.train()  # switches dropout on
    loss = 0.0
    size = int(BATCH_SIZE)
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        _, part = model(xs, ys)
        part = part * (len(xs) / len(x))  # its share
        part.backward()  # computes d part / d parameter, and adds it to `grad` of each parameter
        loss = loss + part.detach()
    if N_RANKS > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for tensor in [loss, *gradients]:
            average(tensor)
    if GRADIENT_CLIP is not None:
        # The gradient is one long vector. If it is longer than GRADIENT_CLIP, it is scaled down to
        # this length. Otherwise, a single long one would rule AdamW's averages: mean(g) for about
        # 10 steps, √mean(g²) for about 20. So steps 10 to 20 after it would be too small.
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
    peak = LEARNING_RATE if run["init"] == "pretrained" else SCRATCH_LEARNING_RATE
    compiled = compile_model(model) if COMPILE else model  # the same parameters, faster steps
    start = time.perf_counter() - run["seconds"]  # a resumed run counts its earlier ones
    try:
        for step in range(run["step"], run["max_iters"] + 1):
            is_due = step % EVAL_INTERVAL == 0 or step == run["max_iters"]
            if is_due and step not in run["history"] and RANK == 0:
                run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
                if step > run["step"]:  # not at the beginning: nothing has changed yet
                    save_step(run, step, model, optimizers, time.perf_counter() - start)
            if step == run["max_iters"]:
                break  # this round was for the last evaluation
            # The same step draws the same random numbers, also in a run that was resumed.
            torch.manual_seed(run["seed"] * 1_000_000 + step)
            x, y = get_batch(splits["train"], TOKENS_PER_STEP // WINDOW, WINDOW, device)
            if N_RANKS > 1:  # all have drawn the same windows: each takes its own share
                x, y = x[RANK::N_RANKS], y[RANK::N_RANKS]
                seeds = torch.randint(2**32, (N_RANKS,))
                torch.manual_seed(seeds[RANK].item())  # for dropout: each draws its own numbers
            loss = train_step(compiled, optimizers, x, y, get_lr(step, run["max_iters"], peak))
            show_progress(run, step, loss, time.perf_counter() - start)
    except KeyboardInterrupt:  # Ctrl-C: main goes on with the file
        if run["path"] is None or N_RANKS > 1:
            raise
        print(f"\nstopped at step {step}: going on with what is in {run['path']}", flush=True)


def bits_per_character(loss, tokens, tokenizer):
    """Return a loss (nats per token) in bits per character: these compare, whatever the tokenizer.

    A bit is ln 2 = 0.69 nats. If 100 tokens of 330 characters were predicted with a loss of 4.6
    nats, they cost 460 nats = 664 bits: 2.0 bits per character. (The first token of a text is never
    predicted, so its characters do not count.)"""
    n_characters = len(tokenizer.decode(tokens[1:].tolist()))
    return loss * (len(tokens) - 1) / math.log(2) / n_characters


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
    """Yield new token ids that continue the list `ids`. The model sees at most BLOCK_SIZE of them.

    The caches keep the keys and values of the tokens so far, so only new ones go through the model.
    With BLOCK_SIZE = 1,024, there is no row of positions for token 1,025. Then the older half is
    dropped. The others move to positions 0, 1, ..., so their keys and values are computed again,
    and there is room for 512 more. To drop one token each time would compute all each time.

    <|endoftext|> ends a document, so it is the last token. What the model would write after it
    belongs to another document."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    ids = [int(i) for i in ids]
    device = next(model.parameters()).device
    model.eval()  # switches dropout off
    ids = ids[-model.block_size :]
    new = ids  # the tokens that are not in the caches yet
    caches = [Cache(model.block_size) for _ in model.blocks]
    for _ in range(max_new_tokens):
        idx = torch.tensor([new], device=device)
        logits, _ = model(idx, caches=caches)  # (1, T) -> (1, 1, V): first the prompt, then T = 1
        logits[..., Tokenizer.vocab_size :] = -math.inf  # ids of a larger VOCAB_SIZE are no tokens
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        yield ids[-1]
        if ids[-1] == Tokenizer.vocab_size - 1:  # <|endoftext|>
            return
        new = ids[-1:]
        if len(ids) > model.block_size:
            ids = ids[-max(1, model.block_size // 2) :]
            new = ids
            caches = [Cache(model.block_size) for _ in model.blocks]


def for_generation(model):
    """Return a copy of the model that writes faster, or the model itself if there is none.

    For one new token, each weight is read from memory and used in one product. The reading takes
    longer than the computing, so it sets the time. (In training, a weight once read serves many
    tokens.) Weights of 16 bits are half the bytes. There are two kinds:

                    exact digits    next number after 1    largest number
        float32        7                1.0000001             3e38
        float16        3                1.001                 65,504
        bfloat16       2                1.008                 3e38

    Weights are small (they start near 0.02), far below 65,504. On a CPU, HalfLinear (after the
    lesson) copies those of the layers to float16, beside the parameters in float32: 0.25 GB more.
    HalfLinear uses them for single tokens. What goes in and comes out is rounded to float16, too.
    (Logits may be about -100. There, float16 has steps of 1/16, so a logit can be off by 1/32, and
    a probability by e^(1/32) - 1 = 3%.) All else stays in float32.
    On a GPU there is a copy of the model with all its numbers in bfloat16, for which none is too
    large.

    Measured on 2 cores of an AMD EPYC: a token takes 31 ms with float32, and 9 ms with float16. Of
    the 9 ms, the products take 6, and read the weights at 80% of the speed that the memory allows.
    (In float32, the token as a whole reads them at 32% of that speed. So float16 gains more than
    the half that it saves in bytes.) Attention, the draw, and some 300 small operators (sums,
    copies, LayerNorm), each started by Python, take the other 3 ms."""
    device = next(model.parameters()).device
    if not HALF_WEIGHTS or device.type == "mps":
        return model
    if device.type == "cuda":
        return copy.deepcopy(model).bfloat16() if has_bfloat16(device) else model
    return with_half_layers(model)


def stream(tokenizer, tokens):
    """Yield the text of the tokens, piece by piece.

    A token is some bytes, and can end inside a character, which has up to 4 bytes. The decoder
    keeps such bytes until the rest of the character has come."""
    decoder = getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


# Try this. It needs neither OpenAI's weights nor a GPU.
# - SAMPLE_TOKENS = 100, and `python gpt2.py --sample --init scratch`: random weights write nonsense
#   at 106 tokens/s. Now, in generate, replace `if len(ids) > model.block_size:` by `if True:`. Each
#   token gets new caches, which help none: 13 tokens/s.
# - N_EMBED, N_LAYERS, N_HEADS = 128, 4, 4, and `python gpt2.py --init scratch`: after 100 steps (40
#   seconds), the loss is 6.72. With --seed 1 it is 6.65: smaller differences than 0.1 mean nothing.
#   SCRATCH_LEARNING_RATE = 6e-3 gives 6.42: when there are few steps, long ones are better.
# - The same without the line `self.tie_weights()` in LM: 6.75, no difference, with 13.7 million
#   parameters in place of 7.3. After 100 steps, a table of its own for predicting gains nothing.
# At first, the loss is near ln 50,257 = 10.82. 6.72 nats are 3.14 bits per character (in the
# validation part, a token has 3.085 characters). It has read a third of the training text. One of
# 256 channels that reads it 13 times comes to 4.69 nats, 2.19 bits (scratch-small in
# tests/RESULTS.md). char_gpt.py reaches 2.14 bits in 2 minutes: for a text of 338,025 tokens, a
# table of 50,257 is large. 38,551 of them never come in it.


# --- The lesson ends here. What follows: files, flags and errors. ---------------------------------
# --- 6. Runs and other files ----------------------------------------------------------------------
# A run is a dict, and the file that holds it: NAME-1.pt, the next one NAME-2.pt. It has all that is
# needed to generate, to train further and to compare. No run overwrites the file of another one.
#
# With QKV_BIAS, a run can go into Hugging Face's transformers. A test runs these lines:
#
#     run, model, tokenizer = gpt2.load_run("gpt2-1.pt", "cpu")
#     sizes = {"n_embd": model.config["n_embed"], "n_layer": model.config["n_layers"]}
#     sizes |= {"n_head": model.config["n_heads"], "n_positions": model.config["block_size"]}
#     config = transformers.GPT2Config(vocab_size=model.config["vocab_size"], **sizes)
#     theirs = transformers.GPT2LMHeadModel(config).eval()
#     weights = {gpt2.openai_name(name): p for name, p in model.named_parameters()}
#     turned = {n: p.T if gpt2.is_turned(n, p) else p for n, p in weights.items()}
#     theirs.transformer.load_state_dict(turned)


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


def new_run(flags, device):
    """Return (run, model, tokenizer) at the beginning of a training."""
    run = {
        "script": NAME,
        "path": None,  # it gets a file at the first save
        "text_id": None,  # see name_text
        "init": flags.init or INIT,
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
    tokenizer = Tokenizer()
    sizes = model_sizes(run["init"])
    if run["init"] == "pretrained":
        path = find_weights()
        print(f"OpenAI's weights: {path}")
        model = load_pretrained(path, **sizes).to(device)
    else:
        model = LM(**sizes).to(device)
    run["vocabulary"] = tokenizer.vocabulary
    run["config"] = {name: plain(value) for name, value in model.config.items()}
    return run, model, tokenizer


def plain(value):
    """Return a NumPy number as one of Python's: a run's file can hold no other."""
    return value.item() if hasattr(value, "item") else value


def model_sizes(init):
    """Return the arguments of LM: the constants, or where they are None, what MODEL has."""
    check(init in ("pretrained", "scratch"), f"INIT = {init!r} must be 'pretrained' or 'scratch'")
    check(MODEL in SIZES, f"MODEL = {MODEL!r} must be one of {', '.join(SIZES)}")
    smallest = Tokenizer.vocab_size
    check(smallest <= VOCAB_SIZE, f"VOCAB_SIZE = {VOCAB_SIZE} must be {smallest} or more")
    n_embed, n_layers, n_heads = SIZES[MODEL]
    return {
        "vocab_size": VOCAB_SIZE,
        "block_size": BLOCK_SIZE if init == "pretrained" else WINDOW,  # others are not trained
        "n_embed": N_EMBED or n_embed,
        "n_heads": N_HEADS or n_heads,
        "n_layers": N_LAYERS or n_layers,
        "dropout": DROPOUT,
        "qkv_bias": bool(QKV_BIAS),
    }


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


def name_text(run, path, tokens, cut):
    """Say in the run which text it is of. If it was another one, the run gets a new number."""
    start = tokens[:100_000].tolist()  # enough to know a text by; a long one takes minutes to read
    text_id = f"{sha256(str(start).encode()).hexdigest()} {len(tokens)} {cut}"
    if run["text_id"] not in (None, text_id):
        print(f"{run['path']} is of another text, or another part of it: a new number")
        run |= {"path": None, "best_step": None, "history": {}}
    run |= {"text_id": text_id, "text": path.name}


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
        now["INIT"] = run["init"]
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
        download(DATA_URL, path, DATA_SHA256)
    path = Path(path or DATA)
    check(os.path.isfile(path), f"there is no file {path}: name one with --data")
    return path


def download(url, path, digest):
    """Fetch a file whose SHA-256 is `digest`. What an earlier try has left in PATH.part is used.

    The SHA-256 is a number of 256 bits that is computed from all bytes of a file. If one byte is
    missing or other, it is another number. So what is fetched is the right file, or not kept.
    UserError: it cannot be fetched; the message tells where to put a copy by hand."""
    part = Path(f"{path}.part")
    print(f"downloading {url}", flush=True)
    for pause in (1, 3, 9, 27, 0):  # seconds until the next try
        try:
            fetch_rest(url, part)
            with open(part, "rb") as file:
                found = file_digest(file, "sha256").hexdigest()
            if found == digest:
                os.replace(part, path)
                return
            part.unlink()
            reason = f"its SHA-256 is {found}, not {digest}"
        except (OSError, ValueError) as error:
            reason = error
            if not can_pass(error):
                break
        time.sleep(pause)
    raise UserError(f"put {url} at {Path(path).absolute()} by hand: {reason}")


def fetch_rest(url, part):
    """Append to the file `part` what it still lacks of a URL. If the server cannot, fetch all."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416 and done > 0:  # there is no rest
            return
        response.raise_for_status()
        mode = "ab" if response.status_code == 206 else "wb"  # 206: the rest comes; 200: all
        with open(part, mode) as file:
            for piece in response.iter_content(1 << 16):
                file.write(piece)


def can_pass(error):
    """Return whether a download that failed with this error may succeed at the next try."""
    if not isinstance(error, requests.RequestException):  # a full disk, no file of certificates
        return False
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return getattr(error.response, "status_code", None) not in (401, 403, 404)


def find_weights():
    """Return the path of OpenAI's weights: MODEL.safetensors (here, beside the script, fetched)."""
    path = Path(f"{MODEL}.safetensors")
    script = Path(globals().get("__file__", ""))  # a notebook has no __file__
    for folder in (Path(), script.parent, script.resolve().parent):
        if (folder / path).is_file():
            return folder / path
    if MODEL == "gpt2":
        download(WEIGHTS_URL.format(MODEL, REVISION), path, WEIGHTS_SHA256)
        return path
    url = WEIGHTS_URL.format(MODEL, "main")
    try:  # of the larger models, the server says the digest
        digest = requests.head(url, timeout=30).headers["X-Linked-ETag"].strip('"')
    except (OSError, KeyError) as error:
        raise UserError(f"put {url} at {path.absolute()} by hand: {error!r}") from error
    download(url, path, digest)
    return path


def read_safetensors(path):
    """Yield (name, tensor) of a safetensors file. Nothing in it can run.

    It is 8 bytes with the length of its header, the header (JSON: {name: type, shape, place}), and
    the numbers. UserError: it is no such file, or is cut off."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    others = {  # how files begin that one can take for it
        b"version ": "a pointer of Git LFS: the file itself was not fetched",
        b"<": "a web page",
        b"PK": "a file of torch.save, with another name",
        b"\x80": "a file of torch.save, with another name",
    }
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        for begin, kind in others.items():
            check(not start.startswith(begin), f"{path} is {kind}. It must be a safetensors file")
        length = int.from_bytes(start, "little")
        check(0 < length < size, f"{path} is cut off, or no safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                content = bytearray(file.read(end - begin))
                tensor = torch.frombuffer(content, dtype=dtypes[entry["dtype"]])
                yield name, tensor.view(entry["shape"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} is cut off, or damaged: {error!r:.150}") from error


def encode_text(path, tokenizer, version, part):
    """Write into the file `part` the version (64 bytes), and the ids of a UTF-8 text."""
    with open(path, encoding="utf-8-sig") as text, open(part, "wb") as file:  # -sig: Windows' mark
        file.write(version)
        try:
            for piece in read_pieces(text, n_characters=1 << 18):
                check("\0" not in piece, f"{path} is UTF-16, or no text: save it as UTF-8")
                file.write(array("i", tokenizer.encode(piece)))  # i: 4 bytes
        except UnicodeDecodeError as error:
            place = text.buffer.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8 at byte {place:,}: save it so") from error


def read_pieces(file, n_characters):
    """Yield an open text in pieces. Encoded one by one, they give the ids of the whole text.

    In a token of GPT-2, a space comes first, or alone, never after a visible character. So a piece
    may end after a visible character that a space or a new line follows. If there is no such place,
    it ends with what was read. Then a word may be cut, and its ids may differ.

    >>> import io
    >>> list(read_pieces(io.StringIO("It is time to go"), n_characters=12))
    ['It is time', ' to', ' go']
    """
    rest = ""
    while more := file.read(n_characters):
        rest += more
        # As late as possible (.*): a visible character (\S) with a space or newline after it.
        place = re.match(r".*\S(?=[ \n])", rest, re.DOTALL)
        cut = place.end() if place else len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def compile_model(model):
    """Return the model compiled, with the same parameters, or itself where that fails."""
    try:
        compiled = torch.compile(model).train()
        n = min(BATCH_SIZE, TOKENS_PER_STEP // WINDOW // N_RANKS)
        x = torch.zeros(n, WINDOW + 1, dtype=torch.int64, device=model.lm_head.weight.device)
        # It compiles at this first call: a failure shows here. Slices, as in get_batch.
        _, loss = compiled(x[:, :-1], x[:, 1:])
        loss.backward()
    except Exception as error:  # no compiler, no triton, an old GPU
        print(f"COMPILE = True does not work here, going on without it: {error!r:.100}")
        compiled = model
    model.zero_grad()  # forget the gradients of this trial
    return compiled


def with_half_layers(model):
    """Return a copy of a model on a CPU whose layers have weights of 16 bits."""
    # The second argument of deepcopy tells it what need not be copied: the parameters.
    quick = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(quick.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, HalfLinear(child))
    return quick


class HalfLinear(nn.Module):
    """A layer nn.Linear that has a copy of its matrix in float16, and uses it for single tokens.

    Its results are rounded to float16 as well."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.half = linear.weight.detach().half()

    def forward(self, x):
        """Compute x W + b of x (B, T, n): (B, T, m)."""
        if x.shape[1] > 1:  # a prompt: each weight serves many tokens, so its reading hardly counts
            return self.linear(x)
        y = F.linear(x.half(), self.half).float()  # PyTorch sums the products in float32
        return y if self.linear.bias is None else y + self.linear.bias


# --- 7. Flags, errors, main -----------------------------------------------------------------------
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
    speed = TOKENS_PER_STEP * (step + 1) / seconds
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
    quick = for_generation(model)
    ids = tokenizer.encode(prompt)
    text = prompt
    times = []
    print(printable(prompt), end="", flush=True)
    tokens = generate(quick, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P)
    for piece in stream(tokenizer, tokens):
        times.append(time.perf_counter())
        text += piece
        print(printable(piece), end="", flush=True)
    if len(times) > 2:  # the first token needed the whole prompt; the last piece is no token
        print(f"\n{(len(times) - 2) / (times[-2] - times[0]):.1f} tokens/s", end="")
    print(flush=True)
    return text


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
    add("--init", choices=("pretrained", "scratch"), help=f"how to begin (default: {INIT})")
    in_notebook = argv is None and "kernel_launcher" in sys.argv[0]
    if RANK > 0:  # rank 0 says what is wrong
        parser.error = lambda message: sys.exit(2)
    flags = parser.parse_args([] if in_notebook else argv)
    if flags.run and not (flags.sample or flags.resume):
        parser.error("--run needs --sample or --resume")
    return flags


def prepare(flags, device):
    """Return (run, model, tokenizer, optimizers, splits) of a new run, or of one to go on with."""
    path = find_data(flags.data)
    if flags.resume:
        check(flags.init is None, "--resume goes on with a run: --init has no use")
        run, model, tokenizer = load_run(flags.run or saved_runs()[-1], device)
    else:
        run, model, tokenizer = new_run(flags, device)
    if flags.max_iters is not None:
        run["max_iters"] = flags.max_iters
    done = f"{run['step']:,} of {run['max_iters']:,} steps are done"
    check(run["step"] < run["max_iters"], f"{done}: --max-iters N trains further")
    check(EVAL_INTERVAL > 0, f"EVAL_INTERVAL = {EVAL_INTERVAL} must be 1 or more")
    T = model.block_size
    check(T >= WINDOW, f"WINDOW = {WINDOW}, but the model can see {T} tokens")
    share = WINDOW * N_RANKS  # at least one window for each process
    check(TOKENS_PER_STEP % share == 0, f"TOKENS_PER_STEP must be a multiple of {share}")
    optimizers = make_optimizers(model)
    if flags.resume:
        resume(run, model, optimizers, flags)
    tokens = load_tokens(path, tokenizer)
    splits = split_text(tokens, TRAIN_SHARE, MAX_VAL_TOKENS, WINDOW)
    name_text(run, path, tokens, len(splits["train"]))
    run["prompt"] = PROMPT if flags.prompt is None else flags.prompt
    print(f"{path}: {len(tokens):,} tokens, ln V = {math.log(tokenizer.vocab_size):.4f}")
    return run, model, tokenizer, optimizers, splits


def choose_model(flags, device):
    """Return (run, model, tokenizer) to sample from: a run, or what --init says."""
    path = flags.run
    if path is None and flags.init is None:
        try:
            path = saved_runs()[-1]
        except UserError as error:
            print(f"{error}; meanwhile, OpenAI's weights")
            flags.init = "pretrained"
    if path is None:
        return new_run(flags, device)
    return load_run(path, device, mmap=True)


def measure(run, model, tokenizer, splits):
    """Measure the best parameters exactly, print and save it. Return what `main` promises."""
    loss = estimate_loss(model, splits["val"], BATCH_SIZE)["loss"]
    bits = bits_per_character(loss, splits["val"], tokenizer)
    print(f"{run['path']}: the best of {run['step']:,} steps is {run['best_step']:,}", end=", ")
    print(f"{loss:.4f} nats a token, {bits:.4f} bits a character on all of the validation text")
    run["val_loss"] = loss
    write_run(run)
    tokens = run["step"] * TOKENS_PER_STEP
    results = {"val_loss": loss, "bits_per_character": bits, "steps": run["step"]}
    return results | {"seconds": run["seconds"], "tokens_per_second": tokens / run["seconds"]}


def main(argv=None):
    """Train and sample as the flags say (a list of strings; None: those of the command line).

    Return {"val_loss": nats per token over the whole validation split, "bits_per_character",
    "steps", "seconds", "tokens_per_second", "parameters", "text"}: after --sample, the last two."""
    if RANK > 0:  # one process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    flags = parse_flags(argv)
    check(Path(NAME).name == NAME, f"NAME = {NAME!r} must be a file's name, without a folder")
    seed = SEED if flags.seed is None else flags.seed
    check(0 <= seed < 2**32, f"SEED = {seed} must be 0 to 2**32 - 1")  # 32 bits are used
    if flags.runs:
        list_runs()
        return {}
    check(N_RANKS == 1 or not flags.sample, "one process is enough to write a sample")
    device = join_processes(find_device(flags.device))
    if flags.sample:
        run, model, tokenizer = choose_model(flags, device)
        run["prompt"] = PROMPT if flags.prompt is None else flags.prompt
        run["seed"] = torch.seed() % 2**32 if flags.seed is None else flags.seed
    else:
        check(os.access(".", os.W_OK), "cannot write into this folder: a run needs a file in it")
        keep_freed_memory()
        if RANK > 0:
            torch.distributed.barrier()  # rank 0 goes first: it downloads and encodes
        else:
            remove_leftovers(f"{NAME}-*.*.part")
            remove_leftovers("*.gpt2.bin.*.part")
        run, model, tokenizer, optimizers, splits = prepare(flags, device)
        if RANK == 0 and N_RANKS > 1:
            torch.distributed.barrier()  # now the others
    results = {"parameters": sum(p.numel() for p in model.parameters())}
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {run['seed']}", end="; ")
    print(f"{results['parameters']:,} parameters", flush=True)
    if not flags.sample:
        train(model, tokenizer, optimizers, splits, run)
        if N_RANKS > 1:
            torch.distributed.barrier()  # the others wait for the last evaluation
            torch.distributed.destroy_process_group()
        if RANK > 0:  # the rest is for rank 0
            return results
        path = run["path"]
        del run, model, optimizers  # the file has them all: not twice in memory
        run, model, tokenizer = load_run(path, device)
        results |= measure(run, model, tokenizer, splits)
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
        if RANK > 0:  # threads of gloo sometimes abort when Python takes itself down
            os._exit(0)
    except UserError as error:
        sys.exit(1 if RANK > 0 else f"{NAME}.py: {error}")  # one process speaks
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
