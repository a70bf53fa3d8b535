"""GPT-2 in one file: it takes OpenAI's weights, or random ones, and trains them on any text.

Read char_gpt.py first: the model and its training work the same way. In 2019, OpenAI trained
GPT-2 on 40 GB of text from the web. Fine-tuning trains these weights further, on a small text of
another kind. It needs few steps: they know English already. What is new, by class or function:
- Tokenizer: tokens are pieces of words (BPE). 338,025 of them are the 1,115,394 characters of
  input.txt: a context of 1,024 tokens holds 3.3 times as much text.
- load_tokens, get_batch, estimate_loss: the text is encoded once, into a file. Its parts are read
  when they are used. So the text can be larger than the memory.
- Head: the same attention, in one function of PyTorch that never stores all T x T scores
- Cache: keeps the keys and values of earlier tokens, so that for a new token only its own position
  is computed
- MultiHead: biases on q, k and v, because OpenAI's weights have them (QKV_BIAS)
- FeedForward: GELU, because OpenAI's weights were trained with it
- LM: the output layer is the token embedding. 38.6 million numbers are stored once, not twice.
- load_pretrained: OpenAI's weights fit into LM: rename them, transpose some
- make_optimizers: AdamW alone, as in OpenAI's first GPT, so that published settings fit. In the
  small steps of a CPU, Muon's products would take longer than all the rest.
- train_step: adds up the gradients of several batches: all at once would not fit in memory
- parallelize, join_processes: a compiled model; several GPUs that share each step
- for_generation: weights of 16 bits, because a new token takes as long as reading all weights
- write_sample, stream: a character can have several tokens; it is printed when it is whole
- download: 548 MB, once

    python gpt2.py                                 fine-tune OpenAI's weights, then continue PROMPT
    python gpt2.py --sample --prompt "To be"       no training: continue with what was learned
    python gpt2.py --sample --init pretrained      no training: continue with OpenAI's weights
    python gpt2.py --init scratch --data my.txt    train random weights on a text; -h: all flags
    python gpt2.py --resume --max-iters 200        train further
    torchrun --nproc_per_node=2 gpt2.py            train on two GPUs

Measured with random weights (2 cores of an Intel Xeon with bfloat16, Linux, Python 3.11, torch
2.13.0): 124,439,808 parameters; a step of 4 x 256 tokens takes 1.43 s, and 1.94 s in Hugging Face's
transformers 5.23.0; it writes 51.7 tokens per second, transformers (float32) 35.8. How far
fine-tuning lowers the loss was not measured: OpenAI's weights were not at hand. Losses per token do
not compare with those of char_gpt.py, as a token is 3.3 characters here: bits per character do.

PyTorch supplies tensors (arrays), gradients, AdamW, layers. Calling one runs its forward. Shapes:
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens

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
import codecs
import contextlib
import copy
import ctypes
import json
import math
import os
import re
import signal
import sys
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path

import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as HalfLinear

# --- 1. Hyperparameters: edit them, and run again. Each is explained where it is used. ------------
NAME = "gpt2"  # names of files: NAME.pt, NAME.resume.pt, NAME.png and NAME.lock
ON_GPU = torch.cuda.is_available()  # where a line has an else, the first value is for a CUDA GPU
DEVICES = ["cuda"] * ON_GPU + ["mps"] * torch.backends.mps.is_available() + ["cpu"]  # fastest first
DEVICE = DEVICES[0]  # where the tensors are
SEED = 1337  # where all random numbers start: any number; another one gives another model
IN_GROUP = "TORCHELASTIC_RUN_ID" in os.environ  # has torchrun started this?
N_RANKS = int(os.environ["WORLD_SIZE"]) if IN_GROUP else 1  # copies of it that train together
RANK = int(os.environ["RANK"]) if IN_GROUP else 0  # the number of this copy
# Data
DATA = "input.txt"  # any UTF-8 text; this one is in the repository, or is downloaded
DATA_URL = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9  # the first 90% of the text is for training, the rest only for measuring
MAX_VAL_TOKENS = 1_000_000 if ON_GPU else 50_000  # at most so many tokens of the rest
# Model
INIT = "pretrained"  # begin with OpenAI's weights; "scratch": with random ones
MODEL = "gpt2"  # which weights of OpenAI's: a name of SIZES; larger: better, and slower
SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20)}
SIZES["gpt2-xl"] = (1600, 48, 25)  # C, blocks, H: Radford et al. 2019, table 2, and their weights
VOCAB_SIZE = 50_257  # V; from scratch on a GPU, 50_304 is faster: 64 divides it
BLOCK_SIZE = 1024  # T, tokens that the model sees; more: better, and slower
N_EMBED = SIZES.get(MODEL, (0, 0, 0))[0]  # C; twice as many take up to 4 times as long
N_LAYERS = SIZES.get(MODEL, (0, 0, 0))[1]  # blocks; more: better, and slower
N_HEADS = SIZES.get(MODEL, (0, 0, 0))[2]  # H; must divide N_EMBED; a head size of 64 is usual
QKV_BIAS = True  # biases on q, k and v: OpenAI's weights have them, most newer models do not
DROPOUT = 0.1  # share of numbers set to 0 (see FeedForward), against overfitting
# Optimization
WINDOW = 1024 if ON_GPU else 256  # tokens of a training window; from scratch, it is T as well
BATCH_SIZE = 16 if ON_GPU else 4  # windows at a time; more: faster, as long as the memory lasts
TOKENS_PER_STEP = 32_768 if ON_GPU else 1024  # more: a more exact gradient, and a slower step
MAX_ITERS = 100  # training steps
LEARNING_RATE = 5e-5  # the peak from OpenAI's weights; too high: they forget; too low: it crawls
SCRATCH_LEARNING_RATE = 6e-4  # the peak from scratch, as in GPT-3 for this size
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 10  # steps until the peak
BETAS = (0.9, 0.95)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 20 squares of them
WEIGHT_DECAY = 0.1  # pulls matrices towards zero; more: less overfitting
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
COMPILE = ON_GPU  # let torch.compile make a faster program of the model; it takes a minute
EVAL_INTERVAL = 50  # steps between two evaluations
EVAL_ITERS = 10 if ON_GPU else 2  # batches per evaluation; more: more exact, and slower
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 200  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = 50  # draw among this many most likely tokens only; None: among all
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all
HALF_WEIGHTS = True  # write with 16 bits per weight: faster, and precise to 2 or 3 digits
# OpenAI's weights
WEIGHTS_URL = "https://huggingface.co/openai-community/{}/resolve/{}/model.safetensors"
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of gpt2
WEIGHTS_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"


# --- 2. Data and tokenizer ------------------------------------------------------------------------
class Tokenizer:
    r"""Turns text into ids and back with GPT-2's byte-pair encoding (BPE). It knows any text.

    In UTF-8, a character is 1 to 4 bytes. Each of the 256 bytes is a token, so any text has ids.
    OpenAI learned the other tokens from its text: the most frequent pair of neighbours became one
    token everywhere, then pairs were counted again, 50,000 times (Sennrich et al. 2015, arXiv
    1508.07909). Encoding merges in the same order. In a frequent word, each of its pairs was
    frequent, until the word was one token. A rare word stays in several.

    A pattern first splits the text into words, numbers, marks and white space, and no merge crosses
    a border. Otherwise "dog.", "dog!" and "dog?" would each use up a token. A space belongs to the
    word after it: "It is 12." becomes "It", " is", " 12", ".".

    An example with three merges, in the order of their ids: t + h, th + e, and space + the. The id
    of a byte is the byte: space 32, i 105, n 110. In " thin" only t + h is a merge: four tokens.

    >>> ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    >>> options = {"mergeable_ranks": ranks, "special_tokens": {}}
    >>> tiktoken.Encoding("example", pat_str=r" ?\w+", **options).encode("the thin the")
    [257, 32, 256, 105, 110, 258]

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


def read_pieces(file, n_characters):
    """Yield an open text in pieces. Encoded one by one, they give the ids of the whole text.

    In a token of GPT-2, white space never follows a visible character: it comes first, or alone.
    So a piece may end where white space follows a visible character. If there is no such place, it
    ends with what was read, and a word may be cut: its ids may differ.

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


def load_tokens(path, tokenizer):
    """Return the ids of a UTF-8 text, (N,), uint16. They are in a file, not in memory.

    The first time, the text is encoded into PATH.gpt2.bin, a few pieces at a time. An id has two
    bytes, enough for 65,536. Then the file is mapped: it looks like a tensor, and the system reads
    the parts that are used. Its first 64 bytes say which version of the text it is of."""
    check(path.stat().st_size > 0, f"{path} is empty")
    check(str(path).isprintable(), f"rename {path}: PyTorch cannot open a file of this name")
    key = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}".encode().ljust(64)
    for kept in (Path(f"{path}.gpt2.bin"), Path(f"{path.name}.gpt2.bin")):
        found = b""
        if kept.exists():
            with kept.open("rb") as file:
                found = file.read(64)
        if found == key or os.access(path.parent, os.W_OK):
            break  # else: no right to write there, so the file comes here

    def write(file):
        """Write the file: the key, and the ids."""
        file.write(key)
        with open(path, encoding="utf-8-sig") as text:  # -sig: Windows' mark
            pieces, cores = read_pieces(text, 1 << 18), min(os.cpu_count() or 1, 8)
            while some := list(islice(pieces, cores)):
                check("\0" not in "".join(some), f"{path} is not UTF-8: save it so")
                encode = tokenizer.encoding.encode_batch
                for ids in encode(some, num_threads=cores, allowed_special="all"):
                    file.write(array("H", ids))  # H: two bytes each

    if found != key:
        print(f"encoding {path} into {kept}, once", flush=True)
        own = f"{kept}.{os.getpid()}"  # another run may be writing the same
        try:
            write_file(own, write)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: save it as UTF-8") from error
        os.replace(own, kept)
    # The key has the length of 32 ids. With shared=True, changes would go to the
    # file: this needs the right to write it. Otherwise they go to memory: the map must fit there.
    size, shared = kept.stat().st_size // 2, os.access(kept, os.W_OK)
    return torch.from_file(str(kept), shared=shared, size=size, dtype=torch.uint16)[32:]


def split_text(tokens, train_share, max_val_tokens, block_size):
    """Return {"train": the first `train_share` of the tokens, "val": the next `max_val_tokens`}.

    The model trains on the first part only. On the second, the validation part, a low loss means
    that it learned how such texts are written. On the first, it may just know the text by heart.
    This is overfitting: the training loss goes on falling, while the validation loss rises."""
    cut = int(train_share * len(tokens))
    check(block_size < cut < len(tokens) - 1, f"{len(tokens)} tokens: few for WINDOW, TRAIN_SHARE")
    return {"train": tokens[:cut], "val": tokens[cut : cut + max_val_tokens]}


def get_batch(tokens, batch_size, block_size, device):
    """Return random windows of the tokens (N,), and for each position its target: the next token.

    >>> x, y = get_batch(torch.tensor([5, 6, 7, 8]), batch_size=1, block_size=3, device="cpu")
    >>> x.tolist(), y.tolist()
    ([[5, 6, 7]], [[6, 7, 8]])

    One window gives T examples: 5 -> 6 and 5 6 -> 7 and 5 6 7 -> 8. x and y are (B, T), int64."""
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))  # from 0 to N - T - 1
    # (B, 1) + (T + 1,) -> (B, T + 1): each start + 0, 1, ..., T. Indexing picks the tokens there.
    windows = tokens[starts + torch.arange(block_size + 1)].to(device, torch.int64)
    return windows[:, :-1], windows[:, 1:]


# --- 3. Model -------------------------------------------------------------------------------------
# token ids (B, T)
#   -> LM: each token becomes a vector of C numbers; the vector of its position is added
#   -> Block, N_LAYERS times:
#        MultiHead    attention: each position collects what it needs from earlier positions
#        FeedForward  each position computes with what it has, on its own
#   -> LM: one number for each possible next token: the logits (B, T, V)
# Softmax turns logits into probabilities: p_i = exp(logit_i) / (sum of exp(logit_j) over all j).
# The logits 2, 1, 0 become 0.67, 0.24, 0.09: all positive, with sum 1. Adding the same number to
# all logits changes nothing. Attention uses softmax too, to make the weights of an average.


class Head(nn.Module):
    """Attention, softmax(q kᵀ / √hs) v: each position averages its own and earlier values.

    Linear layers (in MultiHead) give every position a query q (what it looks for), a key k (what it
    offers) and a value v (what it hands over), of hs numbers each. The score of two positions is
    q · k / √hs: large if the key fits. Softmax turns a row of scores into weights, and the
    result is the average of the values with these weights. Three tokens, B = H = hs = 1:

              scores, masked         weights            result
               k=2   k=0   k=1    v=10  v=20  v=30
        q=1      2  -inf  -inf    1.00  0     0         10     exp(-inf) = 0: it sees only itself
        q=0      0     0  -inf    0.50  0.50  0         15     both keys fit a query of 0 equally
        q=2      4     0     2   0.867 0.016 0.117      12.5   mostly the first: its key fits best

    >>> q, k, v = torch.tensor([[1.0, 0, 2], [2, 0, 1], [10, 20, 30]]).view(3, 1, 1, 3, 1)
    >>> [round(result, 1) for result in Head()(q, k, v).flatten().tolist()]
    [10.0, 15.0, 12.5]
    """  # From Vaswani et al. 2017, equation 1.

    def forward(self, q, k, v):
        """Attend. q and the result are (B, H, T, hs). Without a Cache, k and v are too.

        With a Cache that has earlier tokens, q is of the newest, k and v are of all S tokens."""
        # This function computes what char_gpt.py writes out: scores / √hs, mask, softmax, average.
        # An average is one running sum, of exp(score) · v, divided by another, of exp(score). So it
        # works in small squares of the scores, and never stores all T x T of them (Dao et al. 2022,
        # arXiv 2205.14135). is_causal adds the mask. A single new token may see all: no mask.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


class Cache:
    """The keys and values of one block for all tokens so far.

    In every block, the mask lets a position see itself and earlier ones only. So its key and value
    do not change when a token is added. (Its query was needed once, for its own result.) Without
    them, each new token would send the whole text through the model again: token 1,000 would take
    1,000 times the work. There is room for `block_size` tokens from the start: a tensor cannot
    grow, it would be copied for each token."""

    def __init__(self, block_size):
        self.block_size, self.length = block_size, 0  # length: how many tokens are in it

    def append(self, k, v):
        """Add those of T new tokens, (B, H, T, hs). Return those of all S, (B, H, S, hs)."""
        if self.length == 0:
            B, H, _, hs = k.shape
            self.k, self.v = (k.new_empty(B, H, self.block_size, hs) for _ in "kv")
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class MultiHead(nn.Module):
    """H heads side by side, each with its own q, k and v (Vaswani et al. 2017, section 3.2.2).

    One head gives each position one average. H heads give H averages, of C / H numbers each: one
    head can look at the last few tokens, while another looks for a name further back."""

    def __init__(self, n_embed, n_heads, dropout, qkv_bias):
        super().__init__()
        check(n_embed % n_heads == 0, f"N_HEADS = {n_heads} does not divide N_EMBED = {n_embed}")
        self.n_heads = n_heads
        # Three layers in one matrix. GPT-2 has biases. Softmax ignores k's, since q · (k + b) =
        # q · k + q · b adds the same to a row. Weights sum to 1, so projection's could do v's.
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=qkv_bias)
        self.head = Head()
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        """Let each position of x (B, T, C) collect from itself and those before it: (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).split(C, dim=-1)  # (B, T, C) @ (C, 3C) -> (B, T, 3C) -> three (B, T, C)
        # (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs): matrix products use the last two dimensions.
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in qkv)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, T, hs) -> (B, H, S, hs)
        out = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        # So far each head has its own channels. The projection mixes them: (B,T,C) @ (C,C)
        return self.dropout(self.projection(out))


class FeedForward(nn.Module):
    """Two layers for each position on its own. Between them are 4 C numbers (also section 3.3).

    Attention only averages; here the model computes. In training, dropout sets a random part of the
    numbers to 0, so that the model cannot rely on single ones: less overfitting."""

    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand = nn.Linear(n_embed, 4 * n_embed)
        self.shrink = nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Transform each position: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""
        # gelu(x) = x · P(normal number < x), a smooth relu: 3.00 for 3, 0.84 for 1, -0.16 for -1.
        # Below 0, relu has gradient 0 and cannot learn, gelu can (Hendrycks and Gimpel 2016, arXiv
        # 1606.08415). GPT-2 computes P approximately, by tanh.
        return self.dropout(self.shrink(F.gelu(self.expand(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then feed-forward. The result of each is added to its input.

    These sums are residual connections (He et al. 2015, arXiv 1512.03385). The derivative of
    x + f(x) is 1 + f'(x). The chain rule multiplies the derivatives of all blocks: thanks to the 1,
    the gradient reaches the first block; small f' alone would make it vanish. LayerNorm gives the C
    numbers of each position mean 0 and standard deviation 1: a steady size, however large the sum
    has grown. As a part of f, it leaves the 1 as it is (Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, n_embed, n_heads, dropout, qkv_bias):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embed)
        self.attention = MultiHead(n_embed, n_heads, dropout, qkv_bias)
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
        self.config["qkv_bias"] = qkv_bias
        self.init = "scratch"  # where the weights began; load_pretrained changes it
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # a table: one row per token
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        sizes = n_embed, n_heads, dropout, qkv_bias
        self.blocks = nn.Sequential(*(Block(*sizes) for _ in range(n_layers)))
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)  # no bias, as in GPT-2
        self.tie_weights()
        # Small parameters make small logits, so nearly equal probabilities: the loss starts just
        # above ln V, as the small differences are random. Each block adds two results to its input.
        # A sum of n results of random sign is about √n times as large as one; n is 2 · n_layers. So
        # the matrices that make them start smaller by this factor.
        for name, p in self.named_parameters():
            if p.dim() == 2:  # 0.02 and the square root: Radford et al. 2018 and 2019
                is_last = name.endswith(("projection.weight", "shrink.weight"))
                nn.init.normal_(p, std=0.02 / (2 * n_layers) ** 0.5 if is_last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def tie_weights(self):
        """Let one matrix be the token embedding and the output layer.

        Row i of it (V, C) is the vector of token i. The embedding turns token i into row i. The
        output layer computes logit i = x · row i, large where x points like row i. So the vector of
        a token is learned once, from reading and from predicting it (weight tying, Press and Wolf
        2016, arXiv 1608.05859)."""
        self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx, targets=None, caches=None):
        """Return the logits (B, T, V) for idx (B, T), and the loss for targets (B, T), or None.

        `caches` has one for each block. If they are empty, idx is all tokens kept so far, otherwise
        one new token. With caches, only the last position gets logits, (B, 1, V): it predicts.
        The loss is the mean of -ln(softmax(logits)[target]) in nats; it skips targets of -100."""
        past = caches[0].length if caches else 0
        end = past + idx.shape[1]
        check(past < end <= self.block_size, f"T must be 1 to block_size = {self.block_size}")
        # autocast: products in bfloat16 (8 bits of precision, not 24), twice as fast in hardware.
        # autocast converts the weights in each call: for one token, that costs more than it saves.
        enabled = has_bfloat16(idx.device) and not caches
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=enabled):
            # An average does not depend on the order of its terms: without positions, block 1 would
            # give c the same result in a b c and b a c. (B, T, C) + (T, C) -> (B, T, C)
            x = self.token_embedding(idx) + self.position_embedding.weight[past:end]
            x = self.dropout(x)
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
                x = block(x, cache)
            x = self.ln_f(x[:, -1:] if caches else x)
            logits = self.lm_head(x).float()  # (B, T, C) @ (C, V) -> (B, T, V)
        # cross_entropy contains the softmax. It takes (B·T, V) and (B·T,).
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def openai_name(name):
    """Return OpenAI's name of a parameter of LM.

    >>> openai_name("blocks.3.feed_forward.shrink.weight")
    'h.3.mlp.c_proj.weight'
    """
    for ours, theirs in (
        ("token_embedding", "wte"), ("position_embedding", "wpe"), ("blocks", "h"), ("ln1", "ln_1"),
        ("attention.qkv", "attn.c_attn"), ("attention.projection", "attn.c_proj"), ("ln2", "ln_2"),
        ("feed_forward.expand", "mlp.c_fc"), ("feed_forward.shrink", "mlp.c_proj"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def load_pretrained(path, **sizes):
    """Return an LM with OpenAI's weights. `sizes` are the arguments of LM, as in its config.

    OpenAI computed x @ W, nn.Linear computes x @ Wᵀ: the matrices of the blocks are transposed. A
    safetensors file is 8 bytes with the length of its header, the header (JSON: {name: type, shape,
    place}), and the numbers. It is mapped, see load_tokens. Nothing in it can run.

    UserError: the file is damaged, or of another model."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length :]
        with torch.device("meta"):  # shapes without memory: the numbers of the file replace them
            model = LM(**sizes)
        ours, weights = {openai_name(name): name for name in model.state_dict()}, {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            name = name.removeprefix("transformer.")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the mask: no parameter
                check(name in ours, f"{name:.50} is of another model")
                check(entry["dtype"] == "F32", f"{name} has the type {entry['dtype']}")
                begin, end = entry["data_offsets"]
                # view: 4 bytes are one float32. It must begin at a multiple of 4: so clone.
                part = data[begin:end].clone().view(torch.float32).view(entry["shape"])
                check(part.sum().isfinite(), f"{name} is not finite")
                is_turned = ".c_" in name and part.dim() == 2  # c_: the matrices of the blocks
                weights[ours[name]] = part.t().contiguous() if is_turned else part
        weights["lm_head.weight"] = weights["token_embedding.weight"]
        model.load_state_dict(weights, assign=True)
        model.tie_weights()  # assign=True put two new parameters in the place of one
        model.init = "pretrained"
        return model
    except Exception as error:  # a file from a stranger can be wrong in any way
        raise UserError(f"{path} does not fit: {error!r:.150}; MODEL, {sizes}") from error


# --- 4. Training ----------------------------------------------------------------------------------
@torch.no_grad()  # gradients would take time and memory
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    """Return {"loss": nats per token}, the mean over all tokens (N,) but the first.

    With `eval_iters`, at most that many batches are used, evenly spread: no randomness."""
    model.eval()  # switches dropout off: the whole model is measured
    T, device = model.block_size, next(model.parameters()).device
    chosen = torch.arange(-(-(len(tokens) - 1) // T))  # numbers of windows; rounded up
    if eval_iters is not None and len(chosen) > eval_iters * batch_size:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, eval_iters * batch_size).long()]
    total, count = 0.0, 0
    for windows in chosen.split(batch_size):
        places = windows[:, None] * T + torch.arange(T + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
        ids = tokens[places.clamp(max=len(tokens) - 1)].to(device, torch.int64)
        targets = ids.masked_fill((places >= len(tokens)).to(device), -100)[:, 1:]  # after the end
        n = (targets != -100).sum().item()
        total, count = total + model(ids[:, :-1], targets)[1].item() * n, count + n
    return {"loss": total / count}


def make_optimizers(model):
    """Return [AdamW]: the rule that turns gradients into changes of the parameters.

    AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) averages the gradients g of a parameter,
    and their squares, and moves it by -rate · mean(g) / √mean(g²): tiny gradients move it as far as
    large ones. It shrinks matrices (WEIGHT_DECAY) against overfitting."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    decay = {"params": matrices, "weight_decay": WEIGHT_DECAY}
    no_decay = {"params": others, "weight_decay": 0.0}
    return [torch.optim.AdamW([decay, no_decay], betas=BETAS, fused=True)]


def get_lr(step, max_iters, peak):
    """Return the learning rate of a step: a line up to the peak, then one down to FINAL_LR · peak.

    It rises because the optimizers' first averages cover few gradients, and are noisy. It falls
    because with large steps the parameters keep jumping around the minimum; small ones settle."""
    warmup = max(1, min(WARMUP_ITERS, max_iters // 10))  # a short run has no time for more
    left = (max_iters - step) / (max_iters - warmup + 1)  # from 1, at the peak, towards 0
    return peak * min((step + 1) / warmup, FINAL_LR + (1 - FINAL_LR) * left)


def train_step(model, optimizers, x, y, lr):
    """Change the parameters once, to lower the loss on x, y (B, T). Return the loss before it.

    The plainest rule, with one parameter w = 2, loss w², gradient 2w = 4 and rate 0.1: w becomes
    2 - 0.1 · 4 = 1.6, and the loss falls from 4 to 2.56.

    x, y are this process's part of a step. The gradient of a sum is the sum of the gradients. So
    those of one batch after another are added: the same step. `backward` needs the results of
    every layer, so they stay in memory until then, but now those of one batch only."""
    model.train()  # switches dropout on
    total, batches = 0.0, list(zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True))
    for i, (xs, ys) in enumerate(batches):
        # Processes average (see parallelize) at the last batch: it takes time. no_sync: not yet.
        wait = N_RANKS > 1 and i < len(batches) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = model(xs, ys)[1] * (len(xs) / len(x))  # its share of the mean of all windows
            loss.backward()  # computes the gradient, and adds it to that of the batches before
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP or math.inf)  # limits its size
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # changes the parameters, against the gradient
        optimizer.zero_grad()  # otherwise the next gradient would be added to this one
    return total


def parallelize(model):
    """Return the model as train_step calls it: compiled if COMPILE, and joined to its copies.

    Each process has a copy of the model, and its own share of the windows. DistributedDataParallel
    averages their gradients in `backward`. From one seed or file, with equal steps, the copies
    stay equal. What is returned shares its parameters with `model`: a step changes both."""
    parallel = model
    if COMPILE:
        try:
            parallel = torch.compile(model).train()
            n = min(BATCH_SIZE, TOKENS_PER_STEP // WINDOW // N_RANKS)
            x = model.lm_head.weight.new_zeros(n, WINDOW + 1, dtype=torch.int64)
            # It compiles at this first call: a failure shows here. Slices, as in get_batch.
            parallel(x[:, :-1], x[:, 1:])[1].backward()
        except Exception as error:  # no compiler, no triton, an old GPU
            print(f"COMPILE = True does not work here, going on without it: {error!r:.100}")
            parallel = model
        model.zero_grad()  # forget the gradients of this trial
    return nn.parallel.DistributedDataParallel(parallel) if N_RANKS > 1 else parallel


def train(model, tokenizer, splits, flags, text_id):
    """Train. Every EVAL_INTERVAL steps, print the losses of both `splits` and a sample, and save.

    --resume goes on; with the same --max-iters, to the same end, bit for bit. Then the model
    has the best of its saved parameters, by validation loss. Return {"steps", "seconds", ...}."""
    optimizers, device = make_optimizers(model), next(model.parameters()).device
    step, history = load_training_state(optimizers, text_id) if flags.resume else (0, {})
    check(step < flags.max_iters, f"{step:,} steps are done: raise --max-iters to go on")
    parallel = parallelize(model)
    first_step, stop, speed, start = step, [], 0.0, time.perf_counter()
    peak = LEARNING_RATE if model.init == "pretrained" else SCRATCH_LEARNING_RATE
    # A fresh run that is stopped early must not replace what an earlier run saved.
    first_save = step + 1 if flags.resume else min(EVAL_INTERVAL, flags.max_iters)

    def on_ctrl_c(signum, frame):  # lets the step end, puts back what interrupts at once
        stop.append(signum)
        signal.signal(signal.SIGINT, previous)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it gets signals
    in_main_thread &= N_RANKS == 1  # several processes are stopped by torchrun
    previous = signal.signal(signal.SIGINT, on_ctrl_c) if in_main_thread else None
    try:
        while True:
            done = stop or step >= flags.max_iters
            if RANK == 0 and (done or step % EVAL_INTERVAL == 0 or not history):
                history[step] = evaluate(model, tokenizer, splits, flags.prompt, step)
                if step >= first_save:
                    save_run(model, tokenizer, optimizers, history, text_id, start)
            if done:
                break
            torch.manual_seed(flags.seed * 1_000_000 + step)  # same step, same random numbers
            x, y = get_batch(splits["train"], TOKENS_PER_STEP // WINDOW, WINDOW, device)
            x, y = x[RANK::N_RANKS], y[RANK::N_RANKS]  # all drew the same; each takes its own share
            loss = train_step(parallel, optimizers, x, y, get_lr(step, flags.max_iters, peak))
            step += 1
            speed = (step - first_step) * TOKENS_PER_STEP / (time.perf_counter() - start)
            show_progress(step, loss, speed, (flags.max_iters - step) * TOKENS_PER_STEP)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
    if step >= first_save:
        if RANK == 0:
            model.load_state_dict(load_checkpoint(f"{NAME}.pt", device)[0].state_dict())
    else:
        print("stopped before the first save: no file was written, the sample is of this model")
    return {"steps": step, "seconds": time.perf_counter() - start, "tokens_per_second": speed}


# --- 5. Generation --------------------------------------------------------------------------------
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Return the probabilities (V,) to draw the next token with, from logits (V,).

    temperature divides the logits: below 1, likely tokens become likelier; above 1, less so. 0 is
    greedy: always the most likely token. Of two tokens with logits 2 and 1, the first gets:

    >>> two = torch.tensor([2.0, 1.0])
    >>> [round(next_token_probabilities(two, t)[0].item(), 2) for t in (0, 0.5, 1, 2)]
    [1.0, 0.88, 0.73, 0.62]

    top_k keeps the k most likely tokens. top_p keeps the first of these until their share is p:
    few where the model is sure, many where it is not (Holtzman et al. 2019, arXiv 1904.09751).

    >>> three = torch.tensor([0.5, 0.3, 0.2]).log()  # softmax gives 0.5, 0.3, 0.2
    >>> next_token_probabilities(three, top_k=2), next_token_probabilities(three, top_p=0.4)
    (tensor([0.6250, 0.3750, 0.0000]), tensor([1., 0., 0.]))
    """
    V, logits = len(logits), logits.float().cpu()  # on the CPU: on Apple's mps, draws were invalid
    # The largest logit becomes 0 first: the result is the same, and nothing can overflow.
    probabilities = F.softmax((logits - logits.max()) / max(temperature, 1e-9), dim=-1)
    kept, ids = probabilities.topk(min(top_k or V, V))  # the most likely ones, in falling order
    if top_p is not None:
        # Drop a token if those before it reach top_p. kept[1:] is a view: kept changes.
        kept[1:][kept.cumsum(0)[:-1] >= top_p * kept.sum()] = 0
    return torch.zeros(V).scatter(0, ids, kept / kept.sum())  # each back to its own place


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    """Yield new token ids that continue the list `ids`. The model sees at most the last T tokens.

    The caches keep the keys and values of the tokens so far, so only new ones go through the model.
    The table of positions has T rows, so there is none for token T + 1. Then the older half is
    dropped. The others move to positions 0, 1, ..., so their keys and values are computed again,
    and there is room for T / 2 more. To drop one token each time would compute all each time."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    ids = [int(i) for i in ids][-model.block_size :]
    model.eval()  # switches dropout off
    new, caches = ids, [Cache(model.block_size) for _ in model.blocks]
    for _ in range(max_new_tokens):
        idx = torch.tensor([new], device=next(model.parameters()).device)
        logits, _ = model(idx, caches=caches)  # (1, T) -> (1, 1, V); then T is 1
        logits[..., Tokenizer.vocab_size :] = -math.inf  # ids of a larger VOCAB_SIZE are no tokens
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        new = ids[-1:]
        if len(ids) > model.block_size:
            ids = new = ids[-max(1, model.block_size // 2) :]
            caches = [Cache(model.block_size) for _ in model.blocks]
        yield ids[-1]


def for_generation(model):
    """Return a copy of the model that writes faster, or the model itself if there is none.

    For one new token, each weight is read from memory and used in one multiplication. The reading
    takes longer, so it sets the time. (In training, a weight once read serves many tokens.) Weights
    of 16 bits have half the bytes. On a CPU, float16 (to 65,504, 11 bits of precision) for weights
    only. On CUDA all numbers are bfloat16 (8 bits), with float32's range: none is too large."""
    device = next(model.parameters()).device
    if not HALF_WEIGHTS or device.type == "mps":
        return model
    if device.type == "cuda":
        return copy.deepcopy(model).bfloat16() if has_bfloat16(device) else model
    if "fbgemm" not in torch.backends.quantized.supported_engines:  # a library for such weights
        return model
    # What this dict holds, deepcopy does not copy. halve then replaces each nn.Linear of the copy.
    quick = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    places = [
        (module, name, child)
        for module in quick.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]

    def halve(place):
        """Replace one nn.Linear: float16 weights, sums in float32."""
        module, name, linear = place
        half = HalfLinear(1, 1, dtype=torch.float16)  # of any size: its weights are replaced
        half.set_weight_bias(linear.weight.detach(), linear.bias)
        setattr(module, name, half)

    with ThreadPoolExecutor() as pool:  # it takes a second or two: all cores work
        list(pool.map(halve, places))
    return quick


def stream(tokenizer, tokens):
    """Yield the text of the tokens, piece by piece.

    A token is some bytes, and can end inside a character, which has up to 4 bytes. The decoder
    keeps such bytes until the rest of the character has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def write_sample(model, tokenizer, prompt):
    """Print the prompt, and its continuation while it is made. Return both as one string."""
    quick, ids, text, times = for_generation(model), tokenizer.encode(prompt), prompt, []
    print(prompt, end="", flush=True)
    tokens = generate(quick, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P)
    for piece in stream(tokenizer, tokens):
        times.append(time.perf_counter())
        text += piece
        print(piece, end="", flush=True)
    if len(times) > 2:  # the first token needed the whole prompt; the last piece is no token
        speed = (len(times) - 2) / (times[-1] - times[0])
        size = sum(p.numel() for p in model.parameters()) * (4 if quick is model else 2) / 1e9
        print(f"\n{speed:.1f} tokens/s: weights read at {speed * size:.1f} GB/s", end="")
    print(flush=True)
    return text


# Try this, one edit at a time, with the constants of the README's preset scratch-small, --max-iters
# 200, and EVAL_INTERVAL = 200 (unchanged: a loss of 5.5482 in 1 min 54 s):
# - QKV_BIAS = False: 5.5336. These biases are not needed; most newer models have none.
# - BATCH_SIZE = 2: 5.6089. The gradients are the same sums, but dropout draws other numbers.
# - HALF_WEIGHTS = False, with --sample: 286 tokens/s rather than 320. Large models gain more.


# --- 6. Files. The lesson ends here: what follows are files, flags and errors. --------------------
def find_data(path):
    """Return the path of the text: `path`, or for None DATA (here, beside the script, fetched)."""
    if path is None:
        script = Path(globals().get("__file__", ""))  # a notebook has no __file__
        places = [folder / DATA for folder in (Path(), script.parent, script.resolve().parent)]
        path = next(filter(Path.is_file, places), DATA)
        if path == DATA and DATA_URL.endswith(f"/{DATA}"):
            download(DATA_URL, path, DATA_SHA256)
    check(os.path.isfile(path), f"there is no file {path}: name one with --data")
    return Path(path)


def download(url, path, digest):
    """Fetch a file whose SHA-256 is `digest`. What an earlier try has left in PATH.part is used.

    UserError: it cannot be fetched; the message tells where to put a copy by hand."""
    part = Path(f"{path}.part")
    print(f"downloading {url}", flush=True)
    for pause in (1, 3, 9, 27, 0):  # seconds until the next try
        done = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                if response.status_code != 416 or not done:  # 416: we have all of it
                    response.raise_for_status()
                    # 206: only the rest comes, as asked; 200: the server sends all again.
                    with open(part, "ab" if response.status_code == 206 else "wb") as file:
                        for piece in islice(response.iter_content(1 << 14), 500_000):  # 8 GB
                            file.write(piece)
            with open(part, "rb") as file:
                found = file_digest(file, "sha256").hexdigest()
            if found == digest:
                os.replace(part, path)
                return
            part.unlink()
            reason = f"its SHA-256 is {found}, not {digest}"
        except (OSError, ValueError) as error:  # those of requests are OSErrors without errno
            reason, answer = error, getattr(error, "response", None)
            if getattr(error, "errno", 1) or getattr(answer, "status_code", 0) in (401, 403, 404):
                break  # a full disk, say; or the server will not send it at the next try either
        time.sleep(pause)
    raise UserError(f"put {url} at {path} by hand: {reason}")


def find_weights():
    """Return the path of OpenAI's weights: MODEL.safetensors (here, beside the script, fetched)."""
    path = Path(f"{MODEL}.safetensors")
    script = Path(globals().get("__file__", ""))  # a notebook has no __file__
    for folder in (Path(), script.parent, script.resolve().parent):
        if (folder / path).exists():
            return folder / path
    is_pinned = MODEL == "gpt2"  # of the larger models, the server says the digest
    url, digest = WEIGHTS_URL.format(MODEL, REVISION if is_pinned else "main"), WEIGHTS_SHA256
    if not is_pinned:
        try:
            digest = requests.head(url, timeout=30).headers["X-Linked-ETag"].strip('"')
        except (requests.RequestException, KeyError) as error:
            raise UserError(f"put {url} at {path} by hand: {error!r}") from error
    download(url, path, digest)
    return path


def write_file(path, write):
    """Let `write` fill PATH.part, and move it to `path` once it is whole: a kill leaves no half."""
    try:
        with open(f"{path}.part", "wb") as file:
            write(file)
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise UserError(f"cannot write {path} (a full disk?): {error}") from error
    finally:
        Path(f"{path}.part").unlink(missing_ok=True)


def save_checkpoint(path, model, tokenizer, **more):
    """Save the model (its config and weights), the vocabulary, and what else is given."""
    state = {"name": NAME, "config": model.config, "vocabulary": tokenizer.vocabulary} | more
    state["init"] = model.init
    write_file(path, lambda file: torch.save(state | {"weights": model.state_dict()}, file))


def load_checkpoint(path, device):
    """Return the (model, tokenizer) of a checkpoint. UserError: it is missing or damaged."""
    check(os.path.exists(path), f"there is no {path} here: run `python {NAME}.py` first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # it cannot run code
        config, tokenizer = state["config"], Tokenizer(state["vocabulary"])
        check(state["name"] == NAME, f"it is of {state['name']!r:.50}")
        check(config["n_layers"] <= len(state["weights"]), "it has too few weights")
        check(config["vocab_size"] >= tokenizer.vocab_size, "its vocabulary has another size")
        with torch.device("meta"):  # shapes without memory: wrong sizes cost nothing
            model = LM(**config)
        model.load_state_dict(state["weights"], assign=True)
        model.tie_weights()
        model.init = state["init"]
        model.float().eval()(torch.zeros(1, 1, dtype=torch.int64))  # do the sizes fit?
        check(all(p.sum().isfinite() for p in model.parameters()), "its weights are not finite")
    except Exception as error:  # a file from a stranger can be wrong in any way
        raise UserError(f"{path} is no checkpoint of {NAME}.py: {error!r:.60}") from error
    return model.to(device), tokenizer


def load_training_state(optimizers, text_id):
    """Restore the optimizers from NAME.resume.pt. Return (steps done, history on this text)."""
    try:
        state = torch.load(f"{NAME}.resume.pt", map_location="cpu", weights_only=True)
        for o, saved in zip(optimizers, state["optimizers"], strict=True):  # edited constants hold
            o.load_state_dict(saved | {"param_groups": o.state_dict()["param_groups"]})
            for p, averages in o.state.items():
                check(all(x.shape in (p.shape, ()) for x in averages.values()), "wrong shape")
        check(all(e["val"]["loss"] > 0 * n for n, e in state["history"].items()), "its history")
        return max(state["history"]), state["history"] if state["text_id"] == text_id else {}
    except Exception as error:  # a file from a stranger can be wrong in any way
        raise UserError(f"{NAME}.resume.pt cannot be resumed: {error!r:.60}") from error


def save_run(model, tokenizer, optimizers, history, text_id, start):
    """Save NAME.pt if the last evaluation is the best, NAME.resume.pt, and the plot NAME.png."""
    axes, steps = Figure(figsize=(7, 4.5), layout="constrained").subplots(), list(history)
    for split, style in (("train", "--"), ("val", "-")):
        losses = [entry[split]["loss"] for entry in history.values()]
        axes.plot(steps, losses, style, label=split)
    best = min(losses[1:])  # the first is of the beginning
    axes.plot(steps[losses.index(best)], best, "ko", label=f"best: {best:.4f}")
    axes.axhline(math.log(tokenizer.vocab_size), color="gray", label="uniform guess: ln V")
    n, seconds = sum(p.numel() for p in model.parameters()), time.perf_counter() - start
    axes.set(yscale="log", xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"{NAME}: {n:,} parameters, {seconds:,.0f} s, loss {best:.4f}")
    axes.yaxis.set(major_formatter="{x:.1f}", minor_formatter="{x:.1f}")
    axes.legend()
    for path in (f"{NAME}.resume.pt", f"{NAME}.pt", f"{NAME}.png"):
        if len(history) == 2 and os.path.exists(path):  # the first save: it is of an earlier run
            os.replace(path, f"previous.{path}")
            print(f"the {path} of an earlier run is now previous.{path}")
    if losses[-1] == best or not os.path.exists(f"{NAME}.pt"):
        save_checkpoint(f"{NAME}.pt", model, tokenizer)
    else:
        print(f"the validation loss rises: {NAME}.pt keeps step {steps[losses.index(best)]}")
    if best > losses[0]:
        print(f"it was lower before training, {losses[0]:.4f}: lower the learning rate, or stop")
    more = {"optimizers": [o.state_dict() for o in optimizers], "history": history}
    save_checkpoint(f"{NAME}.resume.pt", model, tokenizer, text_id=text_id, **more)
    write_file(f"{NAME}.png", lambda file: axes.figure.savefig(file, format="png", dpi=120))


# --- 7. Flags, errors, main -----------------------------------------------------------------------
class UserError(ValueError):
    """A mistake that the user can mend. The end of this file prints it as one line."""


def check(condition, message):
    """Raise UserError with the message, unless the condition holds."""
    if not condition:
        raise UserError(message)


def has_bfloat16(device, names=("avx512_bf16", "amx_bf16", "bf16")):
    """Return whether the hardware itself computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(map(torch.cpu.get_capabilities().get, names))


def memory_used(device):
    """Return how many bytes the run has used at most: of the GPU, or of the computer."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Windows has none

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        return math.nan


def join_processes(device):
    """Join the processes that torchrun has started, if any. Return the device of this one.

    On GPUs they talk by nccl, on CPUs by gloo. Rank 0 alone prints, and writes files."""
    if N_RANKS == 1:
        return device
    place = int(os.environ["LOCAL_RANK"])
    n = torch.cuda.device_count() if device.type == "cuda" else N_RANKS * (device.type == "cpu")
    check(place < n, f"{N_RANKS} processes, but {n} devices {device} for them")
    if device.type == "cuda":
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    # The others wait while rank 0 fetches, encodes, evaluates and saves.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    return device


def get_model(flags, device):
    """Return (model, tokenizer): of a checkpoint, with OpenAI's weights, or new, as flags say."""
    path, init = NAME + ".resume" * flags.resume + ".pt", flags.init or INIT
    check(not (flags.resume and flags.init), f"--resume goes on with {path}, so --init has no use")
    tokenizer = Tokenizer()
    trained = os.path.exists(path) or init == "scratch"  # if not there, load_checkpoint says so
    if flags.resume or (flags.sample and not flags.init and trained):
        print(f"weights: {path}")
        return load_checkpoint(path, device)
    fits = init == "pretrained" or not flags.sample
    check(fits, "random weights write nonsense: --sample continues with trained ones")
    block_size = BLOCK_SIZE if init == "pretrained" else WINDOW  # others would not be trained
    sizes = dict(vocab_size=VOCAB_SIZE, block_size=block_size, n_embed=N_EMBED, n_heads=N_HEADS,
                 n_layers=N_LAYERS, dropout=DROPOUT, qkv_bias=bool(QKV_BIAS))  # fmt: skip
    fits = init == "scratch" or (QKV_BIAS and Tokenizer.vocab_size == VOCAB_SIZE)
    check(fits, f"OpenAI's weights need QKV_BIAS = True, VOCAB_SIZE = {Tokenizer.vocab_size}")
    file = find_weights() if init == "pretrained" else "random"
    print(f"weights: {file}")
    model = LM(**sizes) if file == "random" else load_pretrained(file, **sizes)
    return model.to(device), tokenizer


def keep_freed_memory():
    """Make glibc keep freed memory. By default, each step would get it from the kernel again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def lock_folder():
    """Return NAME.lock, open: one run at a time can have it. UserError: another one has it."""
    lock = open(f"{NAME}.lock", "w")  # noqa: SIM115
    try:
        os.lockf(lock.fileno(), os.F_TLOCK, 0)
    except (AttributeError, OSError) as error:  # Windows and some network disks have no locks
        check(not isinstance(error, BlockingIOError), "another run is training in this folder")
    return lock


def show_progress(step, loss, speed, left):
    """Rewrite the last line of a terminal; print nothing where the output is piped."""
    if step % 10 == 0 and sys.stdout and sys.stdout.isatty():  # a GPU must finish to show a loss
        line = f"step {step}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left / speed:.0f} s left  "
        print(line[: os.get_terminal_size().columns - 1], end="\r", flush=True)


def evaluate(model, tokenizer, splits, prompt, step):
    """Print losses and a sample. Return {split: losses}. UserError: a loss is not finite."""
    losses = {k: estimate_loss(model, v, BATCH_SIZE, EVAL_ITERS) for k, v in splits.items()}
    line = "  ".join(f"{k} {name} {x:.4f}" for k, v in losses.items() for name, x in v.items())
    check("nan" not in line and "inf" not in line, "the loss is not finite: lower LEARNING_RATE")
    ids = generate(model, tokenizer.encode(prompt), 60, TEMPERATURE, TOP_K, TOP_P)
    print(f"step {step:>5}  {line:<60}\n            {tokenizer.decode(ids)!r}", flush=True)
    return losses


def check_constants():
    """Raise UserError when a constant makes no sense, before anything is read or written."""
    check(torch.__version__ >= (2, 13), f"PyTorch {torch.__version__} is too old: install 2.13.0")
    check(MODEL in SIZES, f"MODEL = {MODEL!r} must be one of {', '.join(SIZES)}")
    check(INIT in ("pretrained", "scratch"), f"INIT = {INIT!r} must be 'pretrained' or 'scratch'")
    sizes = "BLOCK_SIZE N_EMBED N_LAYERS N_HEADS BATCH_SIZE MAX_ITERS EVAL_INTERVAL EVAL_ITERS"
    for names, low, high in (
        (f"{sizes} TOP_K WINDOW TOKENS_PER_STEP", 1, 10**9),
        ("MAX_VAL_TOKENS", 2, 10**9),
        ("VOCAB_SIZE", Tokenizer.vocab_size, 10**9),
        ("WARMUP_ITERS SAMPLE_TOKENS SEED", 0, 10**9),
        ("TRAIN_SHARE DROPOUT FINAL_LR TOP_P", 0, 1.0),
        ("LEARNING_RATE WEIGHT_DECAY GRADIENT_CLIP TEMPERATURE", 0, 1e9),
        ("NAME DATA DATA_URL DATA_SHA256 PROMPT", "", "\U0010ffff"),
        ("SCRATCH_LEARNING_RATE", 0, 1e9),
    ):
        for name, value in [(name, globals()[name]) for name in names.split()]:
            fits = type(value) in (type(low), type(high)) and low <= value <= high
            fits |= value is None and name in ("TOP_K", "TOP_P", "GRADIENT_CLIP")
            check(fits, f"{name} = {value!r} must be {type(high).__name__}, {low!r} to {high!r}")
    fits = type(BETAS) is tuple and [type(b) is float and 0 <= b < 1 for b in BETAS] == [True] * 2
    check(fits, f"BETAS = {BETAS!r} must be two numbers from 0 to below 1")
    fits = WINDOW <= BLOCK_SIZE and TOKENS_PER_STEP % (WINDOW * N_RANKS) == 0
    more = f"TOKENS_PER_STEP = {TOKENS_PER_STEP} a multiple of it, for each of {N_RANKS} processes"
    check(fits, f"WINDOW = {WINDOW} must be at most BLOCK_SIZE = {BLOCK_SIZE}, and {more}")


def parse_flags(argv):
    """Return the flags of the command line, or of the list argv. A notebook has neither."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description="Train a GPT and let it write.")
    add, add_either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_either("--sample", action="store_true", help=f"no training: continue with {NAME}.pt")
    add_either("--resume", action="store_true", help=f"train further, from {NAME}.resume.pt")
    add("--prompt", metavar="TEXT", default=PROMPT, help="text to continue (default: %(default)s)")
    add("--max-iters", metavar="N", type=int, default=MAX_ITERS, help="training steps in all")
    add("--data", metavar="PATH", help=f"UTF-8 text to train on (default: {DATA})")
    add("--device", metavar="NAME", default=DEVICE, help="cuda, mps or cpu (default: %(default)s)")
    add("--seed", metavar="N", type=int, help=f"default: {SEED}; with --sample, another each time")
    add("--init", choices=("pretrained", "scratch"), help=f"how to begin (default: {INIT})")
    flags = parser.parse_args([] if argv is None and "kernel_launcher" in sys.argv[0] else argv)
    default = torch.seed() if flags.sample else SEED
    flags.seed = (default if flags.seed is None else flags.seed) % 2**40  # `train` takes 2**20 more
    return flags


def main(argv=None):
    """Train and sample as the flags say (a list of strings; None: those of the command line).

    Return {"val_loss": nats per token over the whole validation split, "bits_per_character",
    "steps", "seconds", "tokens_per_second", "parameters", "text"}: after --sample, the last two."""
    check_constants()
    flags = parse_flags(argv)
    keep_freed_memory()
    check(flags.device in DEVICES, f"device {flags.device}: here it can be {', '.join(DEVICES)}")
    device = join_processes(torch.device(flags.device))
    if RANK > 0:
        dist.barrier()  # rank 0 goes first: it fetches and encodes
    if not flags.sample:
        path = find_data(flags.data)
        tokens = load_tokens(path, Tokenizer())
        splits = split_text(tokens, TRAIN_SHARE, MAX_VAL_TOKENS, WINDOW)
    torch.manual_seed(flags.seed)
    model, tokenizer = get_model(flags, device)
    if RANK == 0 and N_RANKS > 1:
        dist.barrier()  # now the others
    results, n = {}, sum(p.numel() for p in model.parameters())
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {flags.seed}; {n:,} parameters")
    if not flags.sample:
        print(f"{path}: {len(tokens):,} tokens, ln V = {math.log(tokenizer.vocab_size):.4f}")
        text_id = sha256(str((len(tokens), tokens[:100_000].tolist())).encode()).hexdigest()
        with lock_folder() if RANK == 0 else contextlib.nullcontext():
            results |= train(model, tokenizer, splits, flags, text_id)
        if N_RANKS > 1:
            dist.destroy_process_group()  # the rest is for rank 0
            if RANK > 0:
                return results
        loss = estimate_loss(model, splits["val"], BATCH_SIZE)["loss"]
        characters = len(tokenizer.decode(splits["val"][1:].tolist()))
        bits = loss * (len(splits["val"]) - 1) / characters / math.log(2)
        results |= {"val_loss": loss, "bits_per_character": bits}
        print(f"best: {loss:.4f} nats a token, {bits:.4f} bits a character")
        seen = results["steps"] * TOKENS_PER_STEP
        print(f"{seen:,} tokens seen, {results['tokens_per_second']:,.0f} a second", end=", ")
        print(f"at most {memory_used(device) / 1e9:.2f} GB of memory")
    torch.manual_seed(flags.seed)
    return results | {"parameters": n, "text": write_sample(model, tokenizer, flags.prompt)}


if __name__ == "__main__":
    # A character that the terminal lacks prints as "?". A notebook's stdout has no reconfigure.
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")
    try:
        main()
    except BrokenPipeError:  # no error: `head`, for one, has seen enough
        sys.exit()
    except (KeyboardInterrupt, UserError, OSError) as error:
        sys.exit(f"{NAME}.py: {str(error) or 'interrupted'}")
    except (RuntimeError, MemoryError) as error:
        if not any(words in repr(error) for words in ("out of memory", "allocate", "MemoryError")):
            raise
        sys.exit(f"{NAME}.py: out of memory: halve BATCH_SIZE, or take a smaller model")
