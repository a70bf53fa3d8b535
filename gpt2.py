"""GPT-2 in one file: it takes OpenAI's 124M weights, or none, and learns to write as a text does.

It downloads the weights (548 MB), shows how GPT-2 continues the prompt, fine-tunes it on a text,
and shows how it continues the same prompt afterwards. `char_gpt.py` explains the parts; here is
what it takes to run and train them at the size of the real thing.

    python gpt2.py                              fine-tune OpenAI's weights on input.txt, then sample
    python gpt2.py --sample                     continue the prompt with the fine-tuned weights
    python gpt2.py --sample --init gpt2         the same with OpenAI's own (or gpt2-medium, ...)
    python gpt2.py --init scratch --data a.txt  train from random weights, on any UTF-8 text
    torchrun --standalone --nproc_per_node=2 gpt2.py    train on two GPUs as on one, in less time

What to expect on a 2-core AMD EPYC (Zen 4, AVX-512 bfloat16), torch 2.13.0, measured with random
weights of the same sizes by `python tests/benchmark_gpt2.py` (on a GPU: not measured yet):
- 124,439,808 parameters; loading them takes 0.2 s (from a file just written), and 1.2 times
  the file's size of memory
- generation: 114 tokens/s, in float32 48 (transformers 5.23.0: 26, and 40 in bfloat16); at position
  1,000 a token takes 1.3 times as long as at 100
- a step of 4 x 256 tokens: 2.6 s (transformers: 3.1 s)
- encoding a text: 19 MB/s, with 40 MB of memory for 1 GB of text

The letters of all shapes, here and in the other two files:
    B   batch: windows that go through at once
    T   time: tokens of a window
    C   channels: numbers that stand for a token
    H   heads of a block
    hs  head size: C / H
    V   vocabulary: how many different tokens there are

What differs from `char_gpt.py`, and why (what `word_gpt.py` adds for reviews is not here):
- Tokenizer, stream: pieces of words in place of characters: 338,025 tokens for the 1,115,394
  characters of input.txt, so that a context of 1,024 holds 3.3 times the text.
- load_tokens, split_text, get_batch, estimate_loss: the text is encoded once into a file, and
  mapped from there; it may be larger than the memory.
- Head: written out where that is the fastest, PyTorch's fused form elsewhere.
- MultiHead, Block: biases on queries, keys and values, which OpenAI's weights have; a `Cache`.
- FeedForward: GELU, which those weights were trained with.
- LM: the output matrix is the token embedding; OpenAI's initialisation; the loss in slices, since
  50,257 columns of logits are the largest tensor of a step.
- generate: keys and values are kept, so that a token costs one position, not the whole text; on a
  CPU the weights are packed in 16 bits, since reading them is what takes the time.
- make_optimizers: AdamW alone, which the published settings of this size are meant for.
- learning_rate_at, train: a cosine; several batches per step, and several processes.
- download, load_pretrained, load_checkpoint, save_checkpoint: OpenAI's weights go on arriving where
  they broke off, are checked, and read without running anything; tied weights are one tensor.
- Keeper, draw_losses, print_setup, parse_flags, main: tokens as the x-axis, one process that
  writes, --init, and a look at what the weights write before they are trained further.

Left out of GPT-2: dropout on the attention weights, which the fused form is fast without.

Papers: Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762. Radford et al. 2018,
Improving Language Understanding by Generative Pre-Training (GPT). Radford et al. 2019, Language
Models are Unsupervised Multitask Learners (GPT-2). Brown et al. 2020, Language Models are Few-Shot
Learners (GPT-3), arXiv 2005.14165: the settings from scratch.
"""

import argparse
import array
import codecs
import contextlib
import copy
import ctypes
import datetime
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------
# 1. Hyperparameters
# ---------------------------------------------------------------------------------------------

NAME = "gpt2"  # the files that a run writes are NAME.pt, NAME.resume.pt and NAME.png
ON_GPU = torch.cuda.is_available()  # where two values stand on a line, the first is for CUDA
DEVICE = "cuda" if ON_GPU else "mps" if torch.mps.is_available() else "cpu"  # fastest first
SEED = 1337  # same seed, machine and versions: same weights; another seed: another model and sample

# Data
DATA = "input.txt"  # any UTF-8 text; the default is looked for beside this file as well
DATA_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOCUMENTS = False  # True: "<|endoftext|>" in a text is the token between documents, not plain text
TRAIN_SHARE = 0.9  # the first 90% are for training, the rest is never trained on
MAX_VAL_TOKENS = 1_000_000 if ON_GPU else 50_000  # of the rest, at most this: all of it is scored

# Model
INIT_FROM = "gpt2"  # weights to begin with: OpenAI's "gpt2" or one of LARGER; "scratch": none
VOCAB_SIZE = 50_257  # 256 bytes, 50,000 merges of BPE, and <|endoftext|>
BLOCK_SIZE = 1024  # tokens of context: more informs better, and takes more time
N_EMBED = 768  # channels: more learn more; the time is quadratic
N_LAYERS = 12  # blocks, one after another: deeper, and slower
N_HEADS = 12  # heads per block: more see more, in fewer channels
DROPOUT = 0.1  # share of activations zeroed in training: more delays overfitting
QKV_BIAS = True  # biases on queries, keys and values: GPT-2 has them, later models do not

# OpenAI's weights
HUB = "https://huggingface.co"  # HF_ENDPOINT in the environment names another one
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of openai-community/gpt2 on the hub
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"  # 548 MB
LARGER = {  # the other sizes differ in three constants (Radford et al. 2019, table 2)
    "gpt2-medium": {"n_embed": 1024, "n_layers": 24, "n_heads": 16},  # 355 million parameters
    "gpt2-large": {"n_embed": 1280, "n_layers": 36, "n_heads": 20},  # 774 million
    "gpt2-xl": {"n_embed": 1600, "n_layers": 48, "n_heads": 25},  # 1,558 million
}

# Optimisation
WINDOW = 1024 if ON_GPU else 256  # tokens per training window: more inform better, take memory
BATCH_SIZE = 16 if ON_GPU else 4  # windows at a time: more are faster, as long as memory lasts
TOKENS_PER_STEP = 32_768 if ON_GPU else 1024  # per update: more is a smoother, costlier gradient
MAX_ITERS = 100  # steps: more learns more, until it learns the text by heart
LEARNING_RATE = 5e-5  # the peak from OpenAI's weights; too high forgets, too low learns slowly
SCRATCH_LEARNING_RATE = 6e-4  # the peak from scratch: Brown et al. 2020, table 2.1, for this size
WARMUP_ITERS = 10  # steps to reach the peak: the optimizer's first averages are noisy
BETAS = (0.9, 0.95)  # memory of AdamW's averages of gradients and of their squares (10, 20 steps)
WEIGHT_DECAY = 0.1  # pull of matrices to zero: more generalises, fits less
GRADIENT_CLIP = 1.0  # longer gradients are cut to it: one bad batch cannot throw the model far

# Evaluation
EVAL_INTERVAL = 50  # steps between two evaluations: fewer show more, and take more time
EVAL_ITERS = 10 if ON_GPU else 2  # batches per evaluation: more are more exact, and slower

# Generation
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 200  # length of the continuation at the end
TEMPERATURE = 0.8  # 0: always the likeliest token; 1: the model's own odds; above: wilder
TOP_K = 50  # draw among this many likeliest tokens only; None: among all
TOP_P = None  # draw among the likeliest tokens that make up this probability; None: all
HALF_WEIGHTS = True  # generate with weights of 16 bits: twice as fast as 32, precise to 3 digits


# ---------------------------------------------------------------------------------------------
# 2. Data and tokenizer
# ---------------------------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can mend: run as a script, the file prints it as a single line."""


class Tokenizer:
    """Turns text into numbers and back by GPT-2's byte-pair encoding, which knows any text.

    It begins with the 256 bytes. The pair that was most frequent in OpenAI's text became a token of
    its own, then the next pair, 50,000 times (Sennrich et al. 2015, arXiv 1508.07909; on bytes:
    Radford et al. 2019, section 2.2). Common words are one token each, with the space before them.

    >>> tokenizer = Tokenizer()
    >>> tokenizer.encode("Hello, it is time"), tokenizer.vocab_size
    ([15496, 11, 340, 318, 640], 50257)
    >>> tokenizer.decode([15496, 11, 340, 318, 640])
    'Hello, it is time'

    Args:
        vocabulary: the name of its rules; there is only "gpt2".
        documents: "<|endoftext|>" in a text is the token that separates documents; False: it is
            plain text, like any other.

    Raises:
        UserError: the rules are not on this machine, and cannot be downloaded.
    """

    END = "<|endoftext|>"

    def __init__(self, vocabulary="gpt2", documents=False):
        import tiktoken  # here, since only this class needs it

        if vocabulary != "gpt2":
            raise UserError(f"there is no vocabulary {vocabulary!r} here, only 'gpt2'")
        try:
            self.encoding = tiktoken.get_encoding(vocabulary)
        except (OSError, ValueError) as error:  # no network, or a damaged cache
            source = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
            names = (  # tiktoken's cache names a file by the sha1 of its URL
                f"{source}{name} as {hashlib.sha1((source + name).encode()).hexdigest()}"
                for name in ("vocab.bpe", "encoder.json")
            )
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"tiktoken cannot get GPT-2's vocabulary ({reason}): put {' and '.join(names)} "
                "into a folder, and name it in the environment variable TIKTOKEN_CACHE_DIR"
            ) from error
        self.vocabulary = vocabulary
        self.vocab_size = self.encoding.n_vocab
        self.special = {self.END} if documents else set()

    def encode(self, text):
        """Return the ids of `text`, a list of ints."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Return the ids of each of a list of texts, computed on all cores: a list of lists."""
        return self.encoding.encode_batch(
            texts,
            num_threads=os.cpu_count(),
            allowed_special=self.special,
            disallowed_special=(),
        )

    def decode(self, ids):
        """Return the text of a list of ids; the inverse of `encode`."""
        return self.encoding.decode(ids)

    def bytes_of(self, token):
        """Return the UTF-8 bytes of one token: sometimes only a part of a character."""
        return self.encoding.decode_single_token_bytes(token)


def read_pieces(path, n_characters=1 << 18):
    """Yield a UTF-8 file in pieces whose encodings, side by side, are that of the whole text.

    No token of GPT-2 goes on from a visible character into white space: a space can only begin one.
    So every piece ends after a visible character that white space follows. Where there is none in a
    whole piece (262,144 characters without a space), it is cut where it ends.

    pieces of 12 characters, "It is time to go": "It is time", " to go"
    """
    rest = ""
    with open(path, encoding="utf-8") as file:
        while more := file.read(n_characters):
            rest += more
            cut = len(rest) - 1
            while cut > 0 and not (rest[cut] in " \n" and not rest[cut - 1].isspace()):
                cut -= 1
            cut = cut or len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def load_tokens(path, url, sha256, tokenizer):
    """Return the ids of a UTF-8 file; fetch it first when it is nowhere to be found.

    The text is encoded once, a few pieces at a time, into a file beside it, PATH.gpt2.bin: 64 bytes
    that say of which text, then the ids, 16 bits each. That file is not read into memory but mapped
    there: the system fetches what is looked at, so the text can be larger than the memory.

    Args:
        path: the file.
        url, sha256: where to get it, and what its content must hash to. A file with a url is looked
            for beside this script as well. None: it has to be there.

    Returns:
        (N,) ids, uint16, on the CPU.

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
    kept = Path(f"{path}.{tokenizer.vocabulary}.bin")
    try:
        state = path.stat()
        key = f"{state.st_size} bytes of {state.st_mtime_ns}, {sorted(tokenizer.special)}"
        key = key.encode().ljust(64)
        found = None
        if kept.exists():
            with open(kept, "rb") as file:
                found = file.read(64)
        if found != key:
            with replacing(kept) as temporary, open(temporary, "wb") as file:
                file.write(key)
                pieces = read_pieces(path)
                while some := list(itertools.islice(pieces, os.cpu_count())):
                    for ids in tokenizer.encode_batch(some):
                        array.array("H", ids).tofile(file)  # "H": unsigned, 16 bits
                    show_progress(f"encoding {path}: {file.tell() / 2e6:.1f} million tokens")
            show_progress("")
        # An id is two bytes; torch reads the 64 bytes of the key as 32 ids more.
        size = kept.stat().st_size // 2
        return torch.from_file(str(kept), size=size, dtype=torch.uint16)[32:]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: name one with --data") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): convert it, then try again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def split_text(tokens, train_share, max_val_tokens, block_size):
    """Return the first `train_share` of the tokens, and the rest, or as much of it as is allowed.

    The cut is at one place, not at random: a shuffled split would put each validation passage
    between two passages that the model has learned.

    Raises:
        UserError: the text is too short for one window to train on and two tokens to validate.
    """
    cut = int(train_share * len(tokens))
    if cut <= block_size or len(tokens) - cut < 2:
        raise UserError(
            f"{len(tokens):,} tokens are too few: TRAIN_SHARE = {train_share} of them must be more "
            f"than WINDOW = {block_size}, with 2 left: take a longer text, or lower WINDOW"
        )
    return tokens[:cut], tokens[cut : cut + max_val_tokens]


def count_characters(tokens, tokenizer):
    """Return how many characters (N,) tokens make, without making them.

    Each character of UTF-8 has one byte that is not of the form 10xxxxxx: these are counted.
    """
    of_token = torch.tensor(
        [
            sum(byte & 0xC0 != 0x80 for byte in tokenizer.bytes_of(token))
            for token in range(tokenizer.vocab_size)
        ]
    )
    return sum(of_token[part.long()].sum().item() for part in tokens.split(1 << 20))


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

    On a GPU, and for a single query, PyTorch's fused form is faster than the formula written out;
    it computes the same tile by tile, and never holds all scores (FlashAttention, Dao et al. 2022,
    arXiv 2205.14135). GPT-2 also zeroed a share of the weights in training. That would take the
    speed away, and is left out.
    """

    def forward(self, queries, keys, values):
        """Attend.

        Args:
            queries: (B, H, T, hs). keys, values: (B, H, S, hs), S positions, of which the queries
                are the last T: all of them (T = S), or the newest alone (T = 1).

        Returns:
            (B, H, T, hs).
        """
        T, hs = queries.shape[-2:]
        if T == 1 or queries.is_cuda:  # the newest position alone may see all
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=T > 1)
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


class Cache:
    """The keys and values that one block has made so far, so that they are made only once.

    Without it, each new token would send the whole text through the model again. The tensors have
    room for `size` positions from the start, and are written in place: none is copied to make room.
    """

    def __init__(self, size):
        self.size = size
        self.length = 0  # positions seen so far

    def append(self, keys, values):
        """Take those of T more positions, (B, H, T, hs); return those of all: (B, H, S, hs)."""
        if self.length == 0:
            B, H, _, hs = keys.shape
            self.keys = keys.new_empty(B, H, self.size, hs)
            self.values = values.new_empty(B, H, self.size, hs)
        start, self.length = self.length, self.length + keys.shape[-2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class MultiHead(nn.Module):
    """Several heads side by side, each on its own channels; then a mix of what they found.

    One head can look at one kind of thing: the last vowel, or who is speaking. H heads look at H
    things, each in hs = C / H channels, for about the price of one head that is C wide.
    Vaswani et al. 2017, section 3.2.2.

    Args:
        n_embed: C, channels in and out.
        n_heads: H; must divide `n_embed`.
        dropout: share of the outgoing channels zeroed in training.
        qkv_bias: whether queries, keys and values have a bias.

    Raises:
        UserError: `n_embed` is not divisible by `n_heads`.
    """

    def __init__(self, n_embed, n_heads, dropout, qkv_bias):
        super().__init__()
        if n_heads < 1 or n_embed % n_heads:
            raise UserError(f"N_EMBED = {n_embed} is not divisible by N_HEADS = {n_heads}")
        self.n_heads = n_heads
        # Three projections in one matrix. A bias on the keys cancels in the softmax, and that of
        # the projection below does for the values; but OpenAI's weights have them.
        self.queries_keys_values = nn.Linear(n_embed, 3 * n_embed, bias=qkv_bias)
        self.head = Head()
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        """Let every position of x (B, T, C) collect from itself and those before it: (B, T, C).

        With a `Cache`, the positions in it come before those of x, and those of x join them.
        """
        B, T, C = x.shape
        # (B, T, C) @ (C, 3C) -> (B, T, 3C), cut into three (B, T, C)
        projected = self.queries_keys_values(x).split(C, dim=-1)
        # Each head gets its own hs channels: (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs)
        queries, keys, values = (
            part.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2) for part in projected
        )
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, H, T, hs) -> (B, H, S, hs)
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
        # Without a bend in between, two layers would be one. GELU is a ReLU with a soft corner
        # (Hendrycks and Gimpel 2016, arXiv 1606.08415); "tanh" is the approximation that the
        # authors give there and GPT-2 was trained with.
        hidden = F.gelu(self.expand(x), approximate="tanh")
        return self.dropout(self.shrink(hidden))


class Block(nn.Module):
    """Attention, then feed-forward, each added to what was there.

    The sum is a road on which gradients reach the first layer undisturbed (residual connections, He
    et al. 2015, arXiv 1512.03385). LayerNorm brings each position to mean 0 and deviation 1, then
    scales and shifts each channel. It stands before each part, off the road, where training is more
    stable than with it on the road (pre-LayerNorm, Xiong et al. 2020, arXiv 2002.04745).

    Args:
        n_embed: C, channels. n_heads: H, heads. dropout: share zeroed in training.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, n_embed, n_heads, dropout, qkv_bias):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embed)
        self.attention = MultiHead(n_embed, n_heads, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(n_embed)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x, cache=None):
        """Add to x (B, T, C) what attention and feed-forward make of it: (B, T, C)."""
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))


class LM(nn.Module):
    """The language model: for every position, how likely each token is to come next.

    It says so in logits, one number per token, which softmax turns into probabilities.

    Args:
        vocab_size: V, how many tokens there are.
        block_size: the longest context, in tokens.
        n_embed: C, channels. n_heads: H, heads per block. n_layers: blocks.
        dropout: share of activations zeroed in training, 0 to 1.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, qkv_bias):
        super().__init__()
        self.sizes = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "n_embed": n_embed,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "dropout": dropout,
            "qkv_bias": qkv_bias,
        }
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(n_embed, n_heads, dropout, qkv_bias) for _ in range(n_layers))
        )
        self.final_norm = nn.LayerNorm(n_embed)
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)
        self.tie_weights()
        self.initialise()

    def tie_weights(self):
        """Let one matrix be the first layer and the last: how tokens are read, and foretold.

        It saves 38.6 of 163 million parameters, and each learns from both ends (Press and Wolf
        2016, arXiv 1608.05859).
        """
        self.lm_head.weight = self.token_embedding.weight

    @torch.no_grad()
    def initialise(self):
        """Draw the weights as GPT-2 does (Radford et al. 2018, section 4.1; 2019, section 2.3).

        Matrices are drawn from N(0, 0.02), so that products begin small; biases are 0. Every block
        adds two things to the road, so that after n layers a sum of 2n has grown by √(2n): what
        leads there is divided by that.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                added = name.endswith(("projection.weight", "shrink.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) ** added)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, caches=None):
        """Predict the next token at every position, or say how wrong that was.

        Args:
            idx: (B, T) token ids, int64, T at most `block_size`.
            targets: (B, T) the tokens that really came next, or None.
            caches: a `Cache` for each block; the positions of idx come after those in it. T is 1,
                or the caches are empty.

        Returns:
            Without targets, logits (B, T, V), float32, and None; with caches only the last
            position's, (B, 1, V). With targets, None and the loss: the mean of -ln(probability
            given to the target), in nats (the unit of the natural logarithm) per token. No logits
            then: they would be the largest tensor of a step.
        """
        T = idx.shape[1]
        past = caches[0].length if caches else 0
        # Attention by itself sees a set, not a sequence: where a token stands has to be told. Both
        # are looked up in tables and added: (B, T, C) + (T, C) -> (B, T, C)
        positions = torch.arange(past, past + T, device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)
        x = self.dropout(x)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache)
        x = self.final_norm(x)
        if targets is not None:
            return None, sliced_loss(self.lm_head, x.flatten(0, 1), targets.flatten())
        if caches:
            x = x[:, -1:]  # only the last position is news
        # (B, T, C) @ (C, V) -> (B, T, V); float32, since bfloat16 is too coarse for the loss
        return self.lm_head(x).float(), None


def sliced_loss(lm_head, x, targets, rows=1024):
    """Return the mean cross entropy of N positions, with at most `rows` rows of logits in memory.

    Logits are 50,257 columns wide, in float32, with their gradients: 1 GB for each 2,500 positions.
    So they are made for one slice after the other, and thrown away; for the gradients they are made
    again (checkpointing, Chen et al. 2016, arXiv 1604.06174). A single slice is kept as it is.

    Args:
        lm_head: maps (N, C) to (N, V). x: (N, C). targets: (N,) token ids.
    """

    def loss_of(x, targets):
        """Return the summed loss of one slice: (n, C) and (n,)."""
        return F.cross_entropy(lm_head(x).float(), targets, reduction="sum")

    slices = zip(x.split(rows), targets.split(rows), strict=True)
    if len(x) <= rows:
        return sum(loss_of(*one) for one in slices) / len(x)
    return sum(checkpoint(loss_of, *one, use_reentrant=False) for one in slices) / len(x)


# ---------------------------------------------------------------------------------------------
# 4. Batches and loss
# ---------------------------------------------------------------------------------------------


def get_batch(tokens, batch_size, block_size):
    """Cut windows at random places; the targets are the same windows, one token later.

    tokens [5, 6, 7, 8, 9], one window of 3, start 1: x = [[6, 7, 8]], y = [[7, 8, 9]]. That is
    three lessons in one: after 6 comes 7, after 6 7 comes 8, after 6 7 8 comes 9.

    Args:
        tokens: (N,) ids, N > block_size, on the CPU.

    Returns:
        x and y, both (B, T) with B = batch_size and T = block_size, int64, on the CPU.
    """
    # Drawn on the CPU, so that every device gets the same batches.
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), device="cpu")
    offsets = torch.arange(block_size + 1)
    windows = tokens[starts + offsets].long()  # (B, 1) + (T + 1,) -> (B, T + 1)
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
    device = model.lm_head.weight.device
    n_targets = len(tokens) - 1
    n_windows = n_targets // T
    x = tokens[: n_windows * T].view(n_windows, T)
    y = tokens[1 : n_windows * T + 1].view(n_windows, T)
    if eval_iters is not None and n_windows > eval_iters * batch_size:
        chosen = torch.linspace(0, n_windows - 1, eval_iters * batch_size).long()
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
                xs, ys = (part.to(device, torch.int64) for part in (xs, ys))
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


class HalfLinear(nn.Module):
    """nn.Linear for generating on a CPU: weights of 16 bits, sums of 32, packed by FBGEMM.

    One token at a time, every weight is read from memory to be used once, and the reading is what
    takes the time. float16 halves the bytes; its 11 bits of precision are 3 more than bfloat16's.
    """

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, x):
        """Transform x (..., inputs), float32: (..., outputs)."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class SingleLinear(nn.Module):
    """nn.Linear for generating on a CPU in float32, by oneDNN.

    For one row nn.Linear calls MKL, which reads the same weights at less than half the speed.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        """Transform x (..., inputs), float32: (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def for_generation(model, half_weights):
    """Return a copy of the model that shares what it can, and is quick for one token at a time.

    Args:
        half_weights: round the weights to 16 bits, where the device is fast with them. It takes a
            second for 124 million weights.
    """
    if not isinstance(model.lm_head, nn.Linear):
        return model  # it is one already
    device = model.lm_head.weight.device
    shared = {id(parameter): parameter for parameter in model.parameters()}
    if device.type == "cuda" and half_weights and has_bfloat16(device):
        return copy.deepcopy(model).bfloat16().eval()
    quick = copy.deepcopy(model, shared).eval()
    if device.type != "cpu":
        return quick
    if half_weights and "fbgemm" in torch.backends.quantized.supported_engines:
        kind = HalfLinear
    elif torch.backends.mkldnn.is_available():
        kind = SingleLinear
    else:
        return quick
    for module in list(quick.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return quick


@torch.inference_mode()
def generate(
    model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, half_weights=True
):
    """Continue a text: predict, draw, append, and again.

    The keys and values of what was seen are kept (`Cache`), so that a step computes one position.
    When the context is full, its later half stays. Every token in it then stands at a new position,
    so its keys and values are other ones, and are made again: once for all the room this gives.

    Args:
        ids: the text so far, a list of at least one id. The model sees its last `block_size`.
        max_new_tokens: how many to add.
        temperature, top_k, top_p: see `next_token_probabilities`.
        half_weights: see `for_generation`, which is called here unless the model comes from there.

    Yields:
        the new token ids, ints, one at a time.

    Raises:
        UserError: `ids` is empty, or an option is out of its range.
    """
    if not ids:
        raise UserError("the prompt is empty: give some text to continue")
    device = model.position_embedding.weight.device
    quick = for_generation(model, half_weights)
    context = news = ids[-model.block_size :]
    caches = [Cache(model.block_size) for _ in model.blocks]
    for _ in range(max_new_tokens):
        logits, _ = quick(torch.tensor([news], device=device), caches=caches)  # (1, T) -> (1, 1, V)
        probabilities = next_token_probabilities(logits[:, -1], temperature, top_k, top_p)
        # Side by side, the probabilities cover 0 to 1: the token that a random point falls on is
        # drawn. torch.multinomial would draw a number for each of the 50,257, in 20 times the time.
        ends = probabilities.double().cumsum(-1)  # (1, V)
        point = torch.rand(1, 1, dtype=torch.float64) * ends[:, -1:]
        token = torch.searchsorted(ends, point, right=True).item()
        context, news = [*context, token], [token]
        if len(context) > model.block_size:
            context = news = context[-max(1, model.block_size // 2) :]
            for cache in caches:
                cache.length = 0
        yield token


def stream(model, tokenizer, prompt, max_new_tokens, **sampling):
    """Print the prompt and its continuation as it is made. Returns both as one string.

    A token can end within a character of UTF-8: its bytes wait for those that make it whole.
    """
    ids = tokenizer.encode(prompt)
    pieces = [prompt]
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in generate(model, ids, max_new_tokens, **sampling):
        pieces.append(decoder.decode(tokenizer.bytes_of(token)))
        print(pieces[-1], end="", flush=True)
    pieces.append(decoder.decode(b"", final=True))
    print(pieces[-1])
    return "".join(pieces)


# ---------------------------------------------------------------------------------------------
# 6. Training
# ---------------------------------------------------------------------------------------------


def make_optimizers(model, learning_rate, betas, weight_decay):
    """Return what moves the weights: AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101).

    Matrices (embeddings too) are what a model overfits with, so they are pulled towards zero. A
    bias, or the scale of a LayerNorm, hardly can, and a scale belongs near 1.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over the memory for all that an update does
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]


def learning_rate_at(step, max_iters, peak, warmup_iters):
    """Return the learning rate of a step: up to the peak in a straight line, down along a cosine.

    The way down lets the weights settle: at a constant rate they would keep jumping around the
    minimum. It ends at a tenth of the peak (Brown et al. 2020, arXiv 2005.14165, appendix B).
    Step 0 already moves: a rate of zero would waste it.
    """
    warmup_iters = max(1, min(warmup_iters, max_iters // 10))  # a short run has no time for more
    warmup = min(1.0, (step + 1) / warmup_iters)
    return peak * warmup * (0.55 + 0.45 * math.cos(math.pi * step / max_iters))


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
    window,
    batch_size,
    tokens_per_step,
    learning_rate,
    warmup_iters,
    gradient_clip,
    eval_interval,
    eval_iters,
    seed,
    rank=0,
    n_ranks=1,
):
    """Train, and evaluate before the first step, every `eval_interval` steps, and after the last.

    The gradient of a step is the mean over `tokens_per_step` tokens. They are more than fit through
    the model at once, so their gradients are added up, batch after batch, and process beside
    process: the step is the same, however many there are of either.

    Args:
        train_tokens, val_tokens: (N,) ids, on the CPU.
        on_evaluation: a `Keeper`, called as on_evaluation(step, losses), losses = {"train": nats,
            "val": nats}.
        first_step: 0, or how many steps were done before a resumed run.
        rank, n_ranks: the number of this process, and of how many that train together.
        The others are the constants of the same names.

    Returns:
        {"steps": done in all, "seconds": spent in this call, "tokens_per_second": of the steps}.

    Raises:
        UserError: the loss is not a number any more, or the step cannot be divided evenly.
    """
    if window > model.block_size or tokens_per_step % (window * n_ranks):
        raise UserError(
            f"WINDOW = {window} must be at most BLOCK_SIZE = {model.block_size}, and "
            f"TOKENS_PER_STEP = {tokens_per_step} a multiple of it for each of {n_ranks} processes"
        )
    device = model.lm_head.weight.device
    parallel = model  # the same weights, compiled, or kept equal to those of the other processes
    if device.type == "cuda":
        parallel = torch.compile(parallel)
    if n_ranks > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel)
    start = time.perf_counter()
    training_seconds = 0.0
    step = first_step
    model.train()
    with CtrlC() as ctrl_c:
        while True:
            # Ctrl-C lets one step be taken, so that there is something to keep.
            pressed = any_process(ctrl_c.pressed, n_ranks, device)
            stop = step >= max_iters or (pressed and step > first_step)
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
            x, y = get_batch(train_tokens, tokens_per_step // window, window)
            # All processes drew the same windows, and each takes its own; dropout differs again.
            x, y = x[rank::n_ranks].to(device), y[rank::n_ranks].to(device)
            torch.manual_seed((seed * 1_000_000 + step) * n_ranks + rank)
            mean_loss = 0.0
            batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
            for i, (xs, ys) in enumerate(batches):
                last = i == len(batches) - 1  # only then do the processes average their gradients
                wait = contextlib.nullcontext() if last or n_ranks == 1 else parallel.no_sync()
                with wait, mixed_precision(device):
                    _, loss = parallel(xs, ys)
                    loss = loss * (len(xs) / len(x))  # the mean of the step, not the sum of means
                    loss.backward()  # d loss / d weight, for every weight
                mean_loss += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, max_iters, learning_rate, warmup_iters)
                optimizer.step()  # every weight moves a little, so that the loss falls
                optimizer.zero_grad()  # or the next gradients would be added to these
            step += 1

            if step % 10 == 0:  # not each time: a GPU has to finish its queue to show a loss
                check_finite(mean_loss.item(), step, learning_rate)
            training_seconds += time.perf_counter() - step_start
            if step % 10 == 0:
                rate = (step - first_step) / training_seconds
                show_progress(
                    f"step {step:,}/{max_iters:,}  loss {mean_loss.item():.3f}  "
                    f"{rate * tokens_per_step:,.0f} tokens/s  "
                    f"{(max_iters - step) / rate:,.0f} s left"
                )
    show_progress("")
    tokens = (step - first_step) * tokens_per_step
    return {
        "steps": step,
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / training_seconds if training_seconds else 0.0,
    }


def any_process(flag, n_ranks, device):
    """Return whether `flag` is true in any of the processes, which have to stop together."""
    if n_ranks == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, which speak nccl on GPUs and gloo on CPUs.

    Yields:
        (rank, how many, device): (0, 1, device) without torchrun. Only rank 0 prints.
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Some wait long: while one encodes the text, or writes a checkpoint.
    day = datetime.timedelta(days=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=day)
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank():
                stack.enter_context(
                    contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w")))
                )
            yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_first(n_ranks):
    """Let one process of each machine go in first (it downloads and encodes), then the others."""
    others = n_ranks > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if others:
        dist.barrier()
    yield
    if n_ranks > 1 and not others:
        dist.barrier()


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
        "documents": bool(tokenizer.special),
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
        tokenizer = Tokenizer(state["vocabulary"], state["documents"])
        if tokenizer.vocab_size != sizes["vocab_size"] or sizes["n_layers"] > len(weights):
            raise ValueError("its sizes contradict its contents")  # and might take forever to build
        # On the meta device a model has no memory and no values yet: those of the file move in.
        with torch.device("meta"):
            model = LM(**sizes)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.eval().to(torch.float32)
        if not model(torch.zeros(1, 1, dtype=torch.int64))[0].isfinite().all():
            raise ValueError("its weights are not finite")
    except Exception as error:  # a file from a stranger can fail in any way
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} does not fit this {NAME}.py ({reason}): move it away") from error
    return model.to(device), tokenizer


def hub_weights(weights):
    """Return the weights of an `LM` (its state_dict) under OpenAI's names and in their layout.

    OpenAI computed x @ W where nn.Linear computes x @ Wᵀ: the four matrices of a block lie the
    other way round. The output matrix is the token embedding, and not written twice.
    """
    renamed = {}
    for name, weight in weights.items():
        for ours, theirs in (
            ("token_embedding", "wte"),
            ("position_embedding", "wpe"),
            ("blocks.", "h."),
            ("norm1", "ln_1"),
            ("attention.queries_keys_values", "attn.c_attn"),
            ("attention.projection", "attn.c_proj"),
            ("norm2", "ln_2"),
            ("feed_forward.expand", "mlp.c_fc"),
            ("feed_forward.shrink", "mlp.c_proj"),
            ("final_norm", "ln_f"),
        ):
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":
            renamed[name] = weight.t() if ".c_" in name and weight.dim() == 2 else weight
    return renamed


def read_safetensors_header(file):
    """Return {name: {"dtype", "shape", "data_offsets"}} of a safetensors file, offsets in the file.

    The format: eight bytes that hold the length of the header, the lowest first; the header, JSON;
    then the numbers, without gaps (https://huggingface.co/docs/safetensors). Nothing is executed.

    Raises:
        ValueError and its like: the file is not what the format says.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"its header would be {length} bytes, the file has {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if start != end or stop < start:
            raise ValueError(f"{name} lies at {start} to {stop}, where {end} was to follow")
        entry["data_offsets"] = start, stop
        end = stop
    if end != size:
        raise ValueError(f"it ends at {size} bytes, not at {end}")
    return header


def load_pretrained(path, **sizes):
    """Return an `LM` of these sizes with the weights of a safetensors file of GPT-2.

    A few rows at a time are read into their place: the peak of memory is the model itself.

    Args:
        path: the file. sizes: the arguments of `LM`.

    Raises:
        UserError: the file is damaged, or holds another model.
    """
    with torch.device("meta"):  # no memory, no values yet: those of the file move in
        model = LM(**sizes)
    model.to_empty(device="cpu")
    model.tie_weights()
    places = hub_weights(model.state_dict())  # views of the model: what they get, it gets
    try:
        with open(path, "rb") as file:
            for name, entry in read_safetensors_header(file).items():
                name = name.removeprefix("transformer.")  # how transformers itself saves them
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # the mask of the future, not a parameter
                if name not in places:
                    raise ValueError(f"it has {name}, which this model lacks")
                place, shape = places.pop(name), tuple(entry["shape"])
                start, stop = entry["data_offsets"]
                if entry["dtype"] != "F32" or stop - start != 4 * math.prod(shape):
                    raise ValueError(f"{name} is {entry['dtype']} {shape} in {stop - start} bytes")
                if shape != place.shape:
                    raise ValueError(f"{name} is {shape}, this model has {tuple(place.shape)}")
                file.seek(start)
                for part in place.split(4096):  # rows at a time, or the largest would be held twice
                    buffer = bytearray(4 * part.numel())
                    file.readinto(buffer)
                    part.copy_(torch.frombuffer(buffer, dtype=torch.float32).view(part.shape))
        if places:
            raise ValueError(f"it lacks {', '.join(places)}")
    except Exception as error:  # a file from a stranger can fail in any way
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is not this GPT-2 ({reason}): move it away, or change {sizes}"
        ) from error
    return model.eval()


class Keeper:
    """Shows and keeps what a training run reaches, at each evaluation.

    NAME.pt holds the best weights by validation loss, NAME.resume.pt all that --resume needs, and
    NAME.png the curves. All lie in the current folder.

    Args:
        sample: called without arguments, returns a short sample to show.
        tokens_per_step: to count what was trained on.
    """

    def __init__(self, model, optimizers, tokenizer, sample, tokens_per_step):
        self.model = model
        self.optimizers = optimizers
        self.tokenizer = tokenizer
        self.sample = sample
        self.tokens_per_step = tokens_per_step
        self.history = []  # an entry per evaluation: {"step": int, "tokens": int, "train", "val"}
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
        self.history.append({"step": step, "tokens": step * self.tokens_per_step, **losses})
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
    """Draw the two loss curves of a list of {"tokens": int, "train": nats, "val": nats}."""
    from matplotlib.figure import Figure  # here, since sampling need not wait for it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [entry["tokens"] for entry in history]
    axes.plot(tokens, [entry["train"] for entry in history], label="training")
    axes.plot(tokens, [entry["val"] for entry in history], label="validation")
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=NAME)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def download(url, path, sha256, tries=4, timeout=20.0):
    """Fetch a file, whole and unchanged, or not at all.

    What an attempt got stays in PATH.part, and the next one, now or in a later run, asks for the
    rest (HTTP Range, RFC 9110, section 14). A server that cannot do this sends it all again.

    Args:
        sha256: what its content must hash to.
        tries: attempts, with growing pauses between them.
        timeout: seconds without a byte after which an attempt has failed.

    Raises:
        UserError: it could not be had; says where to put a copy by hand.
    """
    import requests  # here, since only the first run needs it

    partial = Path(f"{path}.part")
    for attempt in range(tries):
        time.sleep(2**attempt - 1)
        try:
            done = partial.stat().st_size if partial.exists() else 0
            headers = {"Accept-Encoding": "identity"}  # a range of a packed file would be no use
            if done:
                headers["Range"] = f"bytes={done}-"
            with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
                if response.status_code != 416:  # which says: there is no rest
                    response.raise_for_status()
                    mode = "ab" if response.status_code == 206 else "wb"
                    with open(partial, mode) as file:
                        for piece in response.iter_content(1 << 16):
                            file.write(piece)
                            show_progress(f"downloading {path}: {file.tell() / 1e6:.1f} MB")
            digest = hashlib.sha256()
            with open(partial, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            if digest.hexdigest() != sha256:
                partial.unlink()
                raise OSError(f"sha256 is {digest.hexdigest()}, not {sha256}")
            os.replace(partial, path)
            show_progress("")
            return
        except OSError as error:  # those of requests are among them
            reason = error
        if getattr(reason, "response", None) is not None and reason.response.status_code < 500:
            break  # the server has no such file, and will not have it in a second
    raise UserError(f"cannot download {url} ({reason}): get it by hand, and put it at {path}")


def fetch_pretrained(name, revision, sha256, hub):
    """Return the path of OpenAI's weights of that name, downloaded where they are not there yet.

    NAME.safetensors is looked for beside this script, then in the current folder; one that is there
    is taken as it is.

    Args:
        revision: which version. sha256: what it must hash to; None: what the hub says.
        hub: the URL of the hub; HF_ENDPOINT in the environment names another.

    Raises:
        UserError: it cannot be had.
    """
    path = Path(f"{name}.safetensors")
    beside_script = Path(__file__).with_name(path.name)
    if beside_script.exists():
        return beside_script
    if not path.exists():
        import requests  # here, since only the first run needs it

        hub = os.environ.get("HF_ENDPOINT") or hub
        url = f"{hub.rstrip('/')}/openai-community/{name}/resolve/{revision}/model.safetensors"
        if sha256 is None:
            try:
                answer = requests.head(url, timeout=20.0)  # not the file: only what is said of it
                answer.raise_for_status()
                sha256 = answer.headers["X-Linked-ETag"].strip('"')
            except (OSError, KeyError) as error:
                raise UserError(
                    f"cannot ask {url} for its checksum ({error!r}): get it by hand, and put it "
                    f"at {path}"
                ) from error
        download(url, path, sha256)
    return path


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
    parser.add_argument(
        "--init",
        choices=("gpt2", *LARGER, "scratch"),
        help=f"weights to begin with: {INIT_FROM} unless said",
    )
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


def print_setup(model, train_tokens, val_tokens, window, tokens_per_step, max_iters, n_ranks, why):
    """Say what the run works with; `why` says why on this device."""
    device = model.lm_head.weight.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    if n_ranks > 1:
        threads += f", {n_ranks} processes"
    native = "bfloat16 autocast" if has_bfloat16(device) else "float32 (no bfloat16 in hardware)"
    print(f"device     {device}{threads}, {native}; {why}")
    print(f"model      {count_parameters(model):,} parameters: {model.sizes}")
    print(f"text       {len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate")
    print(
        f"training   {max_iters:,} steps of {tokens_per_step // window} x {window} = "
        f"{tokens_per_step:,} tokens: "
        f"{max_iters * tokens_per_step / len(train_tokens):.1f} times the training text"
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
    init = flags.init or INIT_FROM
    keep_freed_memory()
    sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    sampling["half_weights"] = HALF_WEIGHTS
    results = dict.fromkeys(("val_loss", "bits_per_character", "seconds", "tokens_per_second"))
    results["steps"] = 0

    with process_group(pick_device(flags.device)) as (rank, n_ranks, device):
        if flags.init or not flags.sample:
            with one_first(n_ranks):
                tokenizer = Tokenizer("gpt2", DOCUMENTS)
                if not flags.sample:
                    url = DATA_URL if flags.data == DATA else None
                    tokens = load_tokens(flags.data, url, DATA_SHA256, tokenizer)
                    tokens = split_text(tokens, TRAIN_SHARE, MAX_VAL_TOKENS, WINDOW)
                sizes = {"n_embed": N_EMBED, "n_heads": N_HEADS, "n_layers": N_LAYERS}
                sizes |= LARGER.get(init, {})
                sizes |= {"vocab_size": VOCAB_SIZE, "block_size": BLOCK_SIZE}
                sizes |= {"dropout": DROPOUT, "qkv_bias": QKV_BIAS}
                torch.manual_seed(SEED)
                if init == "scratch":
                    model = LM(**sizes).to(device)
                else:
                    pinned = (GPT2_REVISION, GPT2_SHA256) if init == "gpt2" else ("main", None)
                    model = load_pretrained(fetch_pretrained(init, *pinned, HUB), **sizes)
                    model = model.to(device)
        if not flags.sample:
            train_tokens, val_tokens = tokens
            prompt_ids = tokenizer.encode(flags.prompt)  # a bad prompt is found before the training
            peak = SCRATCH_LEARNING_RATE if init == "scratch" else LEARNING_RATE
            optimizers = make_optimizers(model, peak, BETAS, WEIGHT_DECAY)
            why = "the fastest device found" if flags.device == DEVICE else "as --device says"
            print_setup(
                model,
                train_tokens,
                val_tokens,
                WINDOW,
                TOKENS_PER_STEP,
                flags.max_iters,
                n_ranks,
                why,
            )
            if init != "scratch":
                print(f"\nbefore training, {init} goes on like this:\n")
                if rank == 0:
                    torch.manual_seed(SEED)
                    stream(model, tokenizer, flags.prompt, SAMPLE_TOKENS, **sampling)
                print()
            keeper = Keeper(
                model,
                optimizers,
                tokenizer,
                lambda: tokenizer.decode(list(generate(model, prompt_ids, 60, **sampling))),
                TOKENS_PER_STEP,
            )
            results |= train(
                model,
                optimizers,
                train_tokens,
                val_tokens,
                keeper if rank == 0 else lambda step, losses: None,
                first_step=keeper.resume() if flags.resume else 0,
                max_iters=flags.max_iters,
                window=WINDOW,
                batch_size=BATCH_SIZE,
                tokens_per_step=TOKENS_PER_STEP,
                learning_rate=peak,
                warmup_iters=WARMUP_ITERS,
                gradient_clip=GRADIENT_CLIP,
                eval_interval=EVAL_INTERVAL,
                eval_iters=EVAL_ITERS,
                seed=SEED,
                rank=rank,
                n_ranks=n_ranks,
            )
        if rank > 0:
            return results  # the rest is for one

        if not (flags.sample and flags.init):
            model, tokenizer = load_checkpoint(f"{NAME}.pt", device)  # the best weights
        if not flags.sample:
            results["val_loss"] = estimate_loss(model, val_tokens, BATCH_SIZE)
            nats = results["val_loss"] * (len(val_tokens) - 1)
            characters = count_characters(val_tokens[1:], tokenizer)
            results["bits_per_character"] = nats / characters / math.log(2)
            print(
                f"best model: loss {results['val_loss']:.4f} nats per token over the whole "
                f"validation split, {results['bits_per_character']:.4f} bits per character"
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
# Try this: one edit at a time to the constants, on the machine of the header, random weights.
#
# HALF_WEIGHTS = False   generation in float32: 48 tokens/s in place of 114, and the same 200 greedy
#                        tokens
# DROPOUT = 0.0          a training step takes 6% less time: drawing the zeros is what is saved
# QKV_BIAS = False       with --init scratch: 124,412,160 parameters, 27,648 fewer
# ---------------------------------------------------------------------------------------------
