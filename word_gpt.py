"""A GPT in one file, word by word: it reads 50,000 film reviews and learns to write another one.

Read char_gpt.py first: the blocks and their training are the same. What is new comes with real
text, mostly in the order of the file:
- clean: reviews contain web markup, links, capitals; a model learns only what is frequent
- build_vocabulary, Tokenizer: tokens are words. The number of different words has no limit, so all
  rare ones share one token, <unk> (unknown). "Some rare word" is easier to predict than the word
  itself, so the loss looks too good. "known" skips <unk>, so all rare words: too good, too.
- split_documents, split_text: the text is many documents. Each ends with the token <eos> (end of
  sequence), so that the model learns when to stop. A document goes to one split as a whole:
  otherwise the model would already know one half of it when it is measured on the other.
- cut_windows, get_batch: a window is part of one document. A short window is filled with <pad> on
  its right. This needs no further mask: Head's mask already hides what is on the right.
  The loss must not count it: to predict <pad> after <pad> is easy, and useless.
- AdaptiveSoftmax: logits of 37,000 words would be most of a step; it computes only a part of them
- estimate_loss, measure: accuracy is the share of targets that had the highest probability;
  perplexity is e^loss: the model is as unsure as if choosing among this many equally likely tokens
- beam_search: looks for the likeliest text, which is dull
- attention_weights: finds which words each word looks at, for a picture
- download, read_archive: 84 MB, once

    python word_gpt.py                                train, then continue the PROMPT
    python word_gpt.py --sample --prompt "The worst"  no training: continue with what was learned
    python word_gpt.py --sample --beams 5             also look for the likeliest text
    python word_gpt.py --resume --max-iters 3000      train further
    python word_gpt.py --data mytext.txt              train on paragraphs of a text; -h: all flags

Measured with the defaults (2 cores of an Intel Xeon with bfloat16, Linux, Python 3.11, SEED 1337,
torch 2.13.0): 5 min 7 s; V = 36,980; 1.31% of the validation tokens are <unk>. Over all targets,
the loss is 5.3361 nats a token (5.3513 without <unk>; ln V = 10.5181), the accuracy 17.88%, the
perplexity 207.7. A word has many characters: its loss does not compare with that of one. It writes:

    i think this movie was as good as the young woman the moral of the greatest part of living dead

PyTorch supplies tensors (arrays), gradients, AdamW, layers. Calling one runs its forward. Shapes:
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens

The reviews: Maas et al. 2011, Learning Word Vectors for Sentiment Analysis. Next: gpt2.py.
"""

# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "requests==2.34.2", "matplotlib==3.11.2"]
# ///

import argparse
import ctypes
import math
import os
import re
import signal
import sys
import tarfile
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from hashlib import file_digest, sha256
from itertools import chain, islice, pairwise
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

# --- 1. Hyperparameters: edit them, and run again. Each is explained where it is used. ------------
NAME = "word_gpt"  # names of files: .pt, .resume.pt, .png, .lock, _attention.png
ON_GPU = torch.cuda.is_available()  # where a line has an else, the first value is for a CUDA GPU
DEVICES = ["cuda"] * ON_GPU + ["mps"] * torch.backends.mps.is_available() + ["cpu"]  # fastest first
DEVICE = DEVICES[0]  # where the tensors are
SEED = 1337  # where all random numbers start: any number; another one gives another model
# Data
DATA = "aclImdb_v1.tar.gz"  # or any UTF-8 text, with empty lines between its documents
DATA_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DATA_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
TRAIN_SHARE = 0.8  # 80% of the documents are for training, the rest for measuring
VAL_SHARE = 0.1  # 10% choose the best parameters; the last 10%, the test, are measured once
CLEANING = "spaced"  # "reference": cruder, as in many published experiments; see clean
MIN_FREQ = 5  # a word that is rarer in the training documents is <unk>; lower: slower
# Model
BLOCK_SIZE = 64  # T, tokens that the model sees; more: better, and slower
N_EMBED = 256  # C; twice as many take up to 4 times as long
N_LAYERS = 2  # blocks; more: better, and slower
N_HEADS = 2  # H; must divide N_EMBED; a head size of 32 to 128 is usual
CUTOFFS = (2000, 10000)  # ids where groups of rarer words begin; (): no groups, slower
DROPOUT = 0.1 if ON_GPU else 0.0  # raise it against overfitting
# Optimization
BATCH_SIZE = 128 if ON_GPU else 32  # B; more: a more exact gradient, and a slower step
MAX_ITERS = 10000 if ON_GPU else 1800  # training steps
LEARNING_RATE = 1e-3 if ON_GPU else 5e-3  # the peak; too high: the loss jumps; too low: it crawls
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 100  # steps until the peak
BETAS = (0.9, 0.99)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 100 squares of them
WEIGHT_DECAY = 0.1  # pulls matrices towards zero; more: less overfitting
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
EVAL_INTERVAL = 300  # steps between two evaluations
EVAL_ITERS = 10  # batches per evaluation; more: more exact, and slower
PROMPT = "I think this movie was"  # the text to continue
SAMPLE_TOKENS = 100  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = None  # draw among this many most likely tokens only; None: among all
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all
BEAMS = 0  # texts that beam_search follows; more: a likelier text, and slower; 0: no search
PICTURE_TOKENS = 32  # words in the picture of the attention


# --- 2. Data and tokenizer ------------------------------------------------------------------------
class Replacements(dict):
    """A table for str.translate: the replacement of a character. None removes it."""

    def __init__(self, cleaning):
        self.cleaning = cleaning

    def __missing__(self, code):
        """Decide about a code that the table lacks: Python calls this. The answer is stored."""
        character, kind = chr(code), unicodedata.category(chr(code))
        if self.cleaning == "reference":
            self[code] = character if "a" <= character <= "z" else " " * character.isspace()
        elif character in "'’`´\ufe0f" or kind == "Cf":  # dont, not don t; others: invisible
            self[code] = None
        else:  # L...: a letter, M...: a mark on it, N...: a digit
            self[code] = character if kind[0] in "LMN" else " "
        return self[code]


REPLACEMENTS = {cleaning: Replacements(cleaning) for cleaning in ("spaced", "reference")}


def clean(text, cleaning):
    """Return the words of a text, with one space between them: letters, their marks, and digits.

    The model learns what it sees often. So `Film`, `film,` and `film.` become one word. The price:
    it will never write a full stop. A number alone is dropped: most are rare.

    >>> clean("A well-made film.<br /><br />Don't miss the 80s, it's 10/10!", "spaced")
    'a well made film dont miss the 80s its'
    >>> clean("Clichés: www.example.com, me@example.com", "spaced")
    'clichés'

    "reference" keeps a to z and spaces, and removes the rest without a trace, even between words:

    >>> clean("A well-made film.<br /><br />Clichés", "reference")
    'a wellmade filmclichs'
    """
    check(cleaning in [*REPLACEMENTS], f"CLEANING = {cleaning!r} is none of {[*REPLACEMENTS]}")
    gap = " " if cleaning == "spaced" else ""
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", gap, text.lower())
    if "@" in text:
        text = re.sub(r"(?<!\S)\S+@\S+\.\S+", gap, text)  # (?<!\S): only at a word's start, fast
    text = unicodedata.normalize("NFC", text)  # é can be one character, or e and a mark: now one
    words = text.translate(REPLACEMENTS[cleaning]).split()
    return " ".join([word for word in words if not word.isnumeric()])


def build_vocabulary(documents, min_freq):
    """Return the special tokens and the words that come at least `min_freq` times, frequent first.

    Only training documents are counted: to the model, the other splits must be like new texts.

    >>> build_vocabulary(["the film the end", "a film"], min_freq=2)
    ['<pad>', '<unk>', '<eos>', 'film', 'the']
    """
    counts = Counter(chain.from_iterable(map(str.split, documents)))
    words = [word for word, count in counts.items() if count >= min_freq]
    check(words, f"no word comes MIN_FREQ = {min_freq} times: lower it, or use a longer text")
    return ["<pad>", "<unk>", "<eos>", *sorted(words, key=lambda word: (-counts[word], word))]


class Tokenizer:
    """Turns text into ids and back. The id of a word is its place in the vocabulary.

    >>> tokenizer = Tokenizer(["<pad>", "<unk>", "<eos>", "the", "film"])
    >>> tokenizer.encode("The film, the PLOT!"), tokenizer.decode([3, 4, 2])
    ([3, 4, 3, 1], 'the film <eos>')
    """

    pad, unk, eos = 0, 1, 2  # no words: an empty place, any unknown word, the end of a document

    def __init__(self, vocabulary):
        check(" ".join(vocabulary).startswith("<pad> <unk> <eos> "), "its vocabulary lacks tokens")
        self.vocabulary = vocabulary
        self.vocab_size = len(self.vocabulary)
        self.stoi = {word: i for i, word in enumerate(self.vocabulary)}

    def encode(self, text):
        """Return the ids of the words of a string, a list of ints. Unknown words become <unk>."""
        return [self.stoi.get(word, self.unk) for word in clean(text, CLEANING).split()]

    def decode(self, ids):
        """Return the string of a list of ids."""
        return " ".join(self.vocabulary[i] for i in ids)


def split_documents(documents, train_share, val_share):
    """Return {"train": a list of clean documents, "val": ..., "test": the rest}, shuffled.

    The archive ends with reviews that praise: unshuffled, validation and test would have no others.
    We keep the parameters with the lowest validation loss: partly luck. Therefore a third
    split, the test, is measured once, at the end."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(1337))
    documents = [documents[i] for i in order.tolist()]  # for all SEEDs: losses compare
    a, b = (round(share * len(documents)) for share in (train_share, train_share + val_share))
    check(0 < a < b < len(documents), "TRAIN_SHARE, VAL_SHARE: a split has no document")
    return {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}


def split_text(documents, tokenizer):
    """Return {"train": (tokens, edges), "val": ..., "test": ...} of what split_documents returns.

    The model trains on the first part only. On the second, the validation part, a low loss means
    that it learned how such texts are written. On the first, it may just know the text by heart.
    This is overfitting: the training loss goes on falling, while the validation loss rises.

    The tokens (N,) are all documents of a part, each with <eos> at its end. The edges are where
    each of them begins, and N. Documents a b, c: tokens a b <eos> c <eos>, edges 0 3 5."""
    splits, stoi, unk = {}, tokenizer.stoi, Tokenizer.unk
    for split, texts in documents.items():
        tokens, edges = array("i"), [0]
        for text in texts:
            tokens.extend([stoi.get(word, unk) for word in text.split()])
            tokens.append(Tokenizer.eos)
            edges.append(len(tokens))
        splits[split] = torch.tensor(tokens, dtype=torch.int32), torch.tensor(edges)
    return splits


def cut_windows(split, starts, block_size):
    """Return the windows that begin at the starts (B, 1), and for each position its target.

    A window never goes beyond its document: <pad> follows. Nothing comes after <eos>, so its target
    is -100, which means "do not count". The targets of <pad> are -100 too.

    >>> split = torch.tensor([5, 6, 7, 2, 8, 9, 2]), torch.tensor([0, 4, 7])  # 2 is <eos>
    >>> x, y = cut_windows(split, torch.tensor([[1]]), block_size=4)
    >>> x.tolist(), y.tolist()
    ([[6, 7, 2, 0]], [[7, 2, -100, -100]])

    x and y are (B, T), int64."""
    tokens, edges = split
    # bucketize returns d with edges[d - 1] <= start < edges[d]: the document, counted from 1.
    last = edges[torch.bucketize(starts, edges, right=True)] - 1  # the place of the <eos>, (B, 1)
    places = starts + torch.arange(block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    # Places after the <eos> become -100; in the input, clamp makes <pad> (0) of it.
    windows = tokens[places.minimum(last)].long().masked_fill(places > last, -100)
    return windows[:, :-1].clamp(min=Tokenizer.pad), windows[:, 1:]


def get_batch(split, batch_size, block_size, device):
    """Return random windows of the documents, and for each position its target: see cut_windows.

    A window that would reach beyond its document is moved back until its last target is <eos>: no
    place is wasted. This moves 28% of the reviews' windows. Only short documents leave <pad>."""
    tokens, edges = split
    starts = torch.randint(len(tokens), (batch_size, 1))  # from 0 to N - 1
    document = torch.bucketize(starts, edges, right=True)
    # Not beyond the end of the document (minimum), and not before its beginning (maximum).
    starts = starts.minimum(edges[document] - 1 - block_size).maximum(edges[document - 1])
    x, y = cut_windows(split, starts, block_size)
    return x.to(device), y.to(device)


# --- 3. Model -------------------------------------------------------------------------------------
# token ids (B, T)
#   -> LM: each token becomes a vector of C numbers; the vector of its position is added
#   -> Block, N_LAYERS times:
#        MultiHead    attention: each position collects what it needs from earlier positions
#        FeedForward  each position computes with what it has, on its own
#   -> AdaptiveSoftmax: one number for each possible next token: the logits (B, T, V)
#
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
        """Attend. q, k, v and the result are (B, H, T, hs); @ works on the last two dimensions."""
        T, hs = q.shape[-2:]
        # A score sums hs products of about ±1, which partly cancel: its typical size is √hs, and
        # the division makes it 1. Large scores push softmax to weights of 0 and 1, where it hardly
        # reacts to a change of the scores, so that the gradient is almost zero.
        scores = (q / hs**0.5) @ k.transpose(-2, -1)  # (B,H,T,hs) @ (B,H,hs,T) -> (B,H,T,T)
        # The mask hides the future. For T = 3 its rows are [0 -inf -inf], [0 0 -inf], [0 0 0]: a
        # score of -inf gets the weight exp(-inf) = 0. Without the mask, position t sees its target,
        # token t + 1, and learns to copy it: a loss near 0. Generation fails: it has no t + 1 yet.
        mask = torch.full((T, T), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
        weights = F.softmax(scores + mask, dim=-1)  # (B, H, T, T), each row sums to 1
        return weights @ v  # (B, H, T, T) @ (B, H, T, hs) -> (B, H, T, hs)


class MultiHead(nn.Module):
    """H heads side by side, each with its own q, k and v (Vaswani et al. 2017, section 3.2.2).

    One head gives each position one average. H heads give H averages, of C / H numbers each: one
    head can look at the last few tokens, while another looks for a name further back."""

    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        check(n_embed % n_heads == 0, f"N_HEADS = {n_heads} does not divide N_EMBED = {n_embed}")
        self.n_heads = n_heads
        # Three layers in one matrix, without biases. Softmax would ignore k's, since q · (k + b) =
        # q · k + q · b adds the same to a row. Weights sum to 1, so projection's can do v's.
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.head = Head()
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Let each position of x (B, T, C) collect from itself and those before it: (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).split(C, dim=-1)  # (B, T, C) @ (C, 3C) -> (B, T, 3C) -> three (B, T, C)
        # (B, T, C) -> (B, T, H, hs) -> (B, H, T, hs): matrix products use the last two dimensions.
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in qkv)
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
        # relu is max(0, x). Without it, two layers would be one: x A B = x (AB).
        return self.dropout(self.shrink(F.relu(self.expand(x))))


class Block(nn.Module):
    """Attention, then feed-forward. The result of each is added to its input.

    These sums are residual connections (He et al. 2015, arXiv 1512.03385). The derivative of
    x + f(x) is 1 + f'(x). The chain rule multiplies the derivatives of all blocks: thanks to the 1,
    the gradient reaches the first block; small f' alone would make it vanish. LayerNorm gives the C
    numbers of each position mean 0 and standard deviation 1: a steady size, however large the sum
    has grown. As a part of f, it leaves the 1 as it is (Xiong et al. 2020, arXiv 2002.04745)."""

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


class AdaptiveSoftmax(nn.Module):
    """The last layer, for a large V (Grave et al. 2016, arXiv 1609.04309).

    Logits of all words would be most of the work of a step, and most words are rare. A word
    takes two choices: a frequent word or a group of rarer ones; then, for a group, a word of it.
    P(rare word) = P(group) · P(word in its group). In a group, the second P sum to 1: its words
    get P(group) together, and all words 1. Word ids are sorted by frequency, so groups are ranges.
    For V = 7 and the cutoffs 3 and 5, where wi has the id i, and g0 means w3 or w4:

        row of the weight    0   1   2   3   4     5   6     7   8
        its logit is of     g0  g1  w0  w1  w2  |  w3  w4  |  w5  w6
                            one softmax            another    another

    A step needs the first softmax for each target, and another one only where the target is rare.
    The rows of words are the token embedding as well (weight tying, Press and Wolf 2016, arXiv
    1608.05859): one vector per word is learned, from reading and from predicting it."""

    def __init__(self, vocab_size, n_embed, cutoffs):
        super().__init__()
        ids = isinstance(cutoffs, tuple) and all(type(i) is int and i > 0 for i in cutoffs)
        rising = ids and list(cutoffs) == sorted(set(cutoffs))
        check(rising, f"CUTOFFS = {cutoffs!r} must be (), or rising ids above 0")
        edges = [*(cutoff for cutoff in cutoffs if cutoff < vocab_size), vocab_size]
        self.cutoffs = edges[:-1]
        sizes = [end - begin for begin, end in pairwise(edges)]  # of the groups
        self.rows = [len(sizes) + edges[0], *sizes]  # of each softmax: 5, 2 and 2 above
        self.weight = nn.Parameter(torch.empty(sum(self.rows), n_embed))  # LM fills it
        self.bias = nn.Parameter(torch.zeros(sum(self.rows)))
        for group, size in enumerate(sizes):  # at first, a group is as likely as `size` words
            nn.init.constant_(self.bias[group], math.log(size))

    def embed(self, idx):
        """Return the vectors of the tokens idx (B, T): (B, T, C). The rows of groups come first."""
        return F.embedding(idx + len(self.cutoffs) * (idx >= 0), self.weight)  # < 0 must fail

    def softmaxes(self):
        """Return one (weight, bias) per softmax: its own rows of the whole."""
        return [*zip(self.weight.split(self.rows), self.bias.split(self.rows), strict=True)]

    def logits(self, x, softmax):
        """Return the logits of one softmax: (N, C) @ (C, its rows) -> (N, its rows)."""
        # N varies: T, or the number of targets. PyTorch prepares a product anew for each new N,
        # which costs time and memory. Zero rows to a multiple of 64: fewer Ns.
        N = x.shape[-2]
        return F.linear(F.pad(x, (0, 0, 0, -N % 64)), *softmax)[..., :N, :].float()

    def forward(self, x, targets=None, each=False):
        """Return (logits (B, T, V), None); with targets (None, loss); with each (hits, losses)."""
        if targets is not None:
            hits, losses = self.score(x, targets, with_hits=each)
            return (hits, losses) if each else (None, losses.mean())
        softmax, *others = self.softmaxes()
        first = F.log_softmax(self.logits(x, softmax), dim=-1)
        groups, frequent = first.tensor_split([len(self.cutoffs)], dim=-1)
        # ln P(word) = ln P(group) + ln P(word in its group): (B, T, 1) + (B, T, words of the group)
        # These can serve as logits: softmax(ln P) = P / (sum of all P) = P.
        rare = [
            groups[..., [i]] + F.log_softmax(self.logits(x, other), dim=-1)
            for i, other in enumerate(others)
        ]
        return torch.cat([frequent, *rare], dim=-1), None

    def score(self, x, targets, with_hits=False):
        """Return (hits, losses) of the N targets that are not -100; hits is None unless asked for.

        A hit is a target that is the likeliest token of all. Both are (N,), bool and float32."""
        real = targets != -100
        x, targets, n_groups = x[real], targets[real], len(self.cutoffs)  # (N, C), (N,)
        group = torch.full_like(targets, -1)  # -1: a frequent word
        for cutoff in self.cutoffs:
            group += targets >= cutoff  # each cutoff that is reached adds 1
        softmax, *others = self.softmaxes()
        first = F.log_softmax(self.logits(x, softmax), dim=-1)  # (N, groups and frequent words)
        words = targets + n_groups * (targets >= 0)  # their rows; < 0 stays < 0, and fails
        chosen = torch.where(group < 0, words, group)  # the word, or its group
        losses = F.nll_loss(first, chosen, reduction="none")  # -first[chosen]: -ln P of it
        for g, cutoff in enumerate(self.cutoffs):
            rows = (group == g).nonzero().flatten()
            second = self.logits(x[rows], others[g])
            inside = F.cross_entropy(second, targets[rows] - cutoff, reduction="none")
            losses = losses.index_add(0, rows, inside)  # -ln P(word in its group)
        if not with_hits:
            return None, losses
        # Skip this at the first reading: it finds hits without most logits. A frequent target must
        # be the best frequent word. A rare one (-losses is ln P) must be likelier than that word.
        best, guess = first[:, n_groups:].max(-1)  # ln P of the likeliest word so far, and its id
        hits = torch.where(group < 0, guess == targets, -losses > best)
        for g, cutoff in enumerate(self.cutoffs):
            # Only a group that is likelier than any word so far can contain a likelier word.
            rows = (hits & (first[:, g] > best)).nonzero().flatten()
            inside, word = F.log_softmax(self.logits(x[rows], others[g]), dim=-1).max(-1)
            likelier = first[rows, g] + inside > best[rows]
            best[rows] = torch.where(likelier, first[rows, g] + inside, best[rows])
            guess[rows] = torch.where(likelier, cutoff + word, guess[rows])
        return hits & (guess == targets), losses


class LM(nn.Module):
    """The language model: token ids (B, T) -> for each position, logits of the next token.

    vocab_size is V, block_size the longest T, n_embed C, n_heads H, n_layers the blocks."""

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, cutoffs=()):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embed=n_embed,
                           n_heads=n_heads, n_layers=n_layers, dropout=dropout)  # fmt: skip
        self.config["cutoffs"] = cutoffs
        self.block_size = block_size
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embed, n_heads, dropout) for _ in range(n_layers)))
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = AdaptiveSoftmax(vocab_size, n_embed, cutoffs)  # embeds the tokens as well
        # Small parameters make small logits, so nearly equal probabilities: the loss starts just
        # above ln V, thanks to the groups' biases. Positions of std 1 would hide such small words.
        nn.init.normal_(self.lm_head.weight, std=0.02)  # 0.02 as in GPT-2
        nn.init.normal_(self.position_embedding.weight, std=0.02)  # by default 1

    def forward(self, idx, targets=None, each=False):
        """Return (logits (B, T, V), None) for idx (B, T), or with targets (B, T), (None, loss).

        For the loss, most logits are not computed at all. With `each`, it returns the hits and
        losses of real targets instead: see AdaptiveSoftmax.score.
        The loss is the mean of -ln(softmax(logits)[target]) in nats; it skips targets of -100."""
        check(0 < idx.shape[1] <= self.block_size, f"T must be 1 to block_size = {self.block_size}")
        # autocast: products in bfloat16 (8 bits of precision, not 24), twice as fast in hardware.
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            # An average does not depend on the order of its terms: without positions, block 1 would
            # give c the same result in a b c and b a c. (B, T, C) + (T, C) -> (B, T, C)
            x = self.lm_head.embed(idx) + self.position_embedding.weight[: idx.shape[1]]
            x = self.ln_f(self.blocks(self.dropout(x)))
            return self.lm_head(x, targets, each)


# --- 4. Training ----------------------------------------------------------------------------------
@torch.no_grad()  # gradients would take time and memory
def estimate_loss(model, split, batch_size, eval_iters=None):
    """Return {"loss": nats per token, "known": the same without <unk>, "accuracy"} for a split.

    Documents are cut into windows side by side. Each token but a document's first is a target once.
    With `eval_iters`, at most that many batches are used, evenly spread: no randomness."""
    model.eval()  # switches dropout off: the whole model is measured
    T, device = model.block_size, next(model.parameters()).device
    documents = pairwise(split[1].tolist())  # <eos>, at end - 1, begins no window
    starts = torch.tensor([[s] for begin, end in documents for s in range(begin, end - 1, T)])
    if eval_iters is not None and len(starts) > eval_iters * batch_size:
        starts = starts[torch.linspace(0, len(starts) - 1, eval_iters * batch_size).long()]
    (x, y), scores = cut_windows(split, starts, T), []
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        scores.append(model(xs.to(device), ys.to(device), each=True))
    hits, losses = (torch.cat(part).cpu().double() for part in zip(*scores, strict=True))
    known = losses[y[y != -100] != Tokenizer.unk]
    means = {"loss": losses.mean(), "known": known.mean(), "accuracy": hits.mean()}
    return {name: mean.item() for name, mean in means.items()}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps for matrices.

    A matrix stretches each direction of space by some factor. Its gradient, also a matrix, mostly
    has few large ones: steps along it learn in few directions. Muon makes them about equal."""

    @torch.no_grad()
    def step(self):
        """Change every matrix p. `backward` has filled p.grad; train_step sets the rate, "lr"."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 0.05)  # in place (_): 0.95 · old average + 0.05 · gradient
                update = orthogonalize(p.grad.lerp(average, 0.95))  # a little more of the new one
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # Entries are about 1/√max(shape): now 0.2 · lr (Liu et al. 2025, arXiv 2502.16982).
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix):
    """Return the matrix with its factors (singular values) about equal: 100, 10, 1 end near 0.7.

    >>> [round(x, 1) for x in orthogonalize(torch.tensor([100.0, 10, 1]).diag()).diag().tolist()]
    [0.7, 0.7, 0.7]

    A round (Newton-Schulz) maps s to 3.4445 s - 4.775 s³ + 2.0315 s⁵: small s grow, 1 falls."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # the same result, from smaller products
    x = matrix.bfloat16() if has_bfloat16(matrix.device) else matrix
    x = x / x.norm().clamp(min=1e-7)  # norm² is the sum of all factors²: now none is above 1
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.to(matrix.dtype)


def make_optimizers(model):
    """Return [AdamW, Muon]: the rules that turn gradients into changes of the parameters.

    AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) averages the gradients g of a parameter,
    and their squares, and moves it by -rate · mean(g) / √mean(g²): tiny gradients move it as far as
    large ones. Muon takes the matrices of the blocks. In char_gpt.py with 400 steps, the loss is
    1.73, and with AdamW alone 1.89. Both shrink matrices (WEIGHT_DECAY) against overfitting."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    decay = {"params": [p for p in others if p.dim() == 2], "weight_decay": WEIGHT_DECAY}
    no_decay = {"params": [p for p in others if p.dim() != 2], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decay, no_decay], betas=BETAS, fused=True)
    return [adamw, Muon(matrices, {"weight_decay": WEIGHT_DECAY})]


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
    2 - 0.1 · 4 = 1.6, and the loss falls from 4 to 2.56."""
    model.train()  # switches dropout on
    _, loss = model(x, y)
    loss.backward()  # computes the gradient: d loss / d parameter, for every parameter
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP or math.inf)  # limits its size
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # changes the parameters, against the gradient
        optimizer.zero_grad()  # otherwise the next gradient would be added to this one
    return loss.detach()


def train(model, tokenizer, splits, flags, text_id):
    """Train. Every EVAL_INTERVAL steps, print the losses of both `splits` and a sample, and save.

    --resume goes on; with the same --max-iters, to the same end, bit for bit. Then the model
    has the best of its saved parameters, by validation loss. Return {"steps", "seconds", ...}."""
    optimizers, device = make_optimizers(model), next(model.parameters()).device
    step, history = load_training_state(optimizers, text_id) if flags.resume else (0, {})
    check(step < flags.max_iters, f"{step:,} steps are done: raise --max-iters to go on")
    first_step, stop, speed, start = step, [], 0.0, time.perf_counter()
    # A fresh run that is stopped early must not replace what an earlier run saved.
    first_save = step + 1 if flags.resume else min(EVAL_INTERVAL, flags.max_iters)

    def on_ctrl_c(signum, frame):  # lets the step end, puts back what interrupts at once
        stop.append(signum)
        signal.signal(signal.SIGINT, previous)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it gets signals
    previous = signal.signal(signal.SIGINT, on_ctrl_c) if in_main_thread else None
    try:
        while True:
            done = stop or step >= flags.max_iters
            if done or step % EVAL_INTERVAL == 0 or not history:
                history[step] = evaluate(model, tokenizer, splits, flags.prompt, step)
                if step >= first_save:
                    save_run(model, tokenizer, optimizers, history, text_id, start)
            if done:
                break
            torch.manual_seed(flags.seed * 1_000_000 + step)  # same step, same random numbers
            x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
            loss = train_step(model, optimizers, x, y, get_lr(step, flags.max_iters, LEARNING_RATE))
            step += 1
            speed = (step - first_step) * y.numel() / (time.perf_counter() - start)
            show_progress(step, loss, speed, (flags.max_iters - step) * y.numel())
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
    if step >= first_save:
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
    """Yield new token ids that continue the list `ids`. The model sees only the last T tokens."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    ids = [int(i) for i in ids]
    model.eval()  # switches dropout off
    for _ in range(max_new_tokens):
        idx = torch.tensor([ids[-model.block_size :]], device=next(model.parameters()).device)
        logits, _ = model(idx)  # (1, T) -> (1, T, V); only the last position predicts a new token
        logits[..., [Tokenizer.pad, Tokenizer.unk]] = -math.inf  # no words: they are never drawn
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        if ids[-1] == Tokenizer.eos:
            return  # the document ends here
        yield ids[-1]


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams):
    """Return (new ids, ln of their probability): the likeliest continuation that the search finds.

    The likeliest next token can lead to unlikely texts. So the `beams` likeliest texts are all
    continued, and of all continuations the likeliest `beams` are kept. One beam is the greedy
    choice. A phrase that fits any film is likely, a special detail is not: the result is dull. It
    repeats itself: what was likely once is so again. People do not write what is likeliest
    (Holtzman et al. 2019). Short texts win: each token makes a text less likely."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    model.eval()  # switches dropout off
    kept = [(0.0, [])]  # (ln of the probability, new ids), the likeliest first
    for _ in range(max_new_tokens):
        candidates = [text for text in kept if text[1][-1:] == [Tokenizer.eos]]  # these have ended
        if kept[0] in candidates:
            break  # the others can only become less likely than they are
        for score, new in kept:
            if new[-1:] != [Tokenizer.eos]:
                idx = torch.tensor([[*ids, *new][-model.block_size :]])
                logits, _ = model(idx.to(next(model.parameters()).device))
                logits[0, -1, [Tokenizer.pad, Tokenizer.unk]] = -math.inf
                best = F.log_softmax(logits[0, -1], dim=-1).topk(min(beams, logits.shape[-1] - 2))
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    candidates.append((score + value, [*new, token]))
        kept = sorted(candidates, reverse=True)[:beams]
    return kept[0][1], kept[0][0]


@torch.no_grad()
def attention_weights(model, ids):
    """Return the weights of the attention for a list of at most T ids: for each block, (H, T, T).

    Row t tells how position t weighs the positions 0 to t; its sum is 1. Head returns weights @ v.
    With the identity matrix as v of all heads, that is the weights: Head need not change."""
    found = []

    # A hook: PyTorch calls look(head, inputs, output) after each call of a Head.
    def look(head, inputs, output):
        """Call a Head that has just worked on q, k, v (1, H, T, hs) once more, with another v."""
        q, k, _ = inputs
        identity = torch.eye(len(ids), device=q.device)
        # head(...) would call this function again, without end; head.forward(...) does not. No
        # bfloat16: it would round the weights to 2 digits.
        with torch.autocast(q.device.type, enabled=False):
            found.append(head.forward(q.float(), k.float(), identity)[0].cpu())

    model.eval()  # switches dropout off
    hooks = [block.attention.head.register_forward_hook(look) for block in model.blocks]
    model(torch.tensor([ids], device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return found


# Try this, one edit at a time, with --max-iters 300 (unchanged: a loss of 5.9435 in 1 min 43 s):
# - MIN_FREQ = 500: 4.3052 in 52 s. It looks better, but now 18% of the words are <unk>.
# - CUTOFFS = (): 5.9152 in 5 min 37 s. The loss is hardly lower, for three times the time.
# - TEMPERATURE = 0: "... i was a good movie i was a good movie i was ...": greedy is dull.


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


def read_archive(path, mode):
    """Return the reviews of an archive in the order of their names. Nothing is extracted."""
    texts, name = {}, re.compile(r"aclImdb/(train|test)/(pos|neg)/\d+_\d+\.txt")
    try:
        with tarfile.open(path, mode) as archive:
            for member in archive:
                if member.size < 10**6 and member.isfile() and name.fullmatch(member.name):
                    texts[member.name] = archive.extractfile(member).read().decode("utf-8")
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        why = "get it again, or unpack it first if it is a text"
        raise UserError(f"{path} is no whole archive of reviews ({error}): {why}") from error
    check(len(texts) == 50_000, f"{path} has {len(texts):,} of 50,000 reviews: get a whole copy")
    return [texts[name] for name in sorted(texts)]


def read_documents(path):
    """Return the clean documents of a file: the reviews of an archive, the paragraphs of a text.

    UserError: it is neither, or in a script that has no spaces between words."""
    with open(path, "rb") as file:
        start = file.read(262)
    if start[:2] == b"\x1f\x8b" or start[257:] == b"ustar":  # marks of gzip, and of tar
        texts = read_archive(path, "r:" if start[257:] == b"ustar" else "r:gz")
    else:
        named = Path(path).name.endswith((".gz", ".tgz", ".tar"))
        check(not named, f"{path} is no archive, it starts with {start[:30]!r}: get it again")
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")  # -sig: Windows' mark
        check(text and not {*"\0\ufffd"} & {*text}, f"{path} is empty, or not UTF-8: save it so")
        texts = re.split(r"\n\s*\n", unicodedata.normalize("NFC", text))
    sample = "\n".join(texts[:: len(texts) // 1000 + 1])  # some documents are enough to judge
    letters = sum(map(str.isalpha, sample))
    # Thai and Lao, Burmese, Khmer, Japanese, Chinese:
    unspaced = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    spaced = len(re.findall(unspaced, sample)) <= 0.1 * letters
    check(spaced, f"{path} has no spaces between words: take char_gpt.py or gpt2.py for it")
    dropped = letters - sum(map(str.isalpha, clean(sample, CLEANING)))
    if dropped > 0.1 * letters:
        print(f"CLEANING = {CLEANING!r} drops {dropped / letters:.0%} of the letters of {path}")
    documents = [text for text in (clean(text, CLEANING) for text in texts) if text]
    n = sum(text.count(" ") + 1 for text in documents)
    check(n > BLOCK_SIZE, f"{path}: {n} words: few for BLOCK_SIZE")
    check(len(documents) > 9, f"{path}: put empty lines between at least 10 paragraphs")
    return documents


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
    write_file(path, lambda file: torch.save(state | {"weights": model.state_dict()}, file))


def load_checkpoint(path, device):
    """Return the (model, tokenizer) of a checkpoint. UserError: it is missing or damaged."""
    check(os.path.exists(path), f"there is no {path} here: run `python {NAME}.py` first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # it cannot run code
        config, tokenizer = state["config"], Tokenizer(state["vocabulary"])
        check((state["name"], config["vocab_size"]) == (NAME, tokenizer.vocab_size), "another kind")
        check(config["n_layers"] <= len(state["weights"]), "it has too few weights")
        with torch.device("meta"):  # shapes without memory: wrong sizes cost nothing
            model = LM(**config)
        model.load_state_dict(state["weights"], assign=True)
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
    (axes, right), steps = Figure((12, 4.5), layout="constrained").subplots(1, 2), list(history)
    for split, style in (("train", "--"), ("val", "-")):
        losses = [entry[split]["loss"] for entry in history.values()]
        axes.plot(steps, losses, style, label=split)
        right.plot(steps, [entry[split]["accuracy"] for entry in history.values()], style)
    best = min(losses[1:])  # the first is of the beginning
    axes.plot(steps[losses.index(best)], best, "ko", label=f"best: {best:.4f}")
    axes.axhline(math.log(tokenizer.vocab_size), color="gray", label="uniform guess: ln V")
    n, seconds = sum(p.numel() for p in model.parameters()), time.perf_counter() - start
    axes.set(yscale="log", xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"{NAME}: {n:,} parameters, {seconds:,.0f} s, loss {best:.4f}")
    axes.yaxis.set(major_formatter="{x:.1f}", minor_formatter="{x:.1f}")
    right.set(xlabel="step", ylabel="accuracy (share of tokens)", title="dashed: train")
    axes.legend()
    for path in (f"{NAME}.resume.pt", f"{NAME}.pt", f"{NAME}.png", f"{NAME}_attention.png"):
        if len(history) == 2 and os.path.exists(path):  # the first save: it is of an earlier run
            os.replace(path, f"previous.{path}")
            print(f"the {path} of an earlier run is now previous.{path}")
    if losses[-1] == best or not os.path.exists(f"{NAME}.pt"):
        save_checkpoint(f"{NAME}.pt", model, tokenizer)
    more = {"optimizers": [o.state_dict() for o in optimizers], "history": history}
    save_checkpoint(f"{NAME}.resume.pt", model, tokenizer, text_id=text_id, **more)
    write_file(f"{NAME}.png", lambda file: axes.figure.savefig(file, format="png", dpi=120))


def draw_attention(model, tokenizer, ids):
    """Draw the weights of the attention, a square for each block (down) and head (across).

    Each row shows which words the model weighs, and how much, when it has read this one."""
    layers, words = attention_weights(model, ids), [tokenizer.decode([token]) for token in ids]
    rows, columns, side = len(layers), len(layers[0]), 1.5 + 0.16 * len(ids)  # inches
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    for row, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for column, axes in enumerate(line):
            axes.imshow(layers[row][column].tolist(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"block {row + 1}, head {column + 1}")
            axes.set_xticks(range(len(ids)), words, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(len(ids)), words, fontsize=7, parse_math=False)
    path = f"{NAME}_attention.png"
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


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


def measure(model, splits, documents):
    """Print the metrics of all of the validation and the test split, and return them for `main`.

    Bits per character count the characters of the clean documents, and a space after each word."""
    print("measuring all of the validation and the test split", flush=True)
    results = {}
    for split in ("val", "test"):
        tokens, characters = splits[split][0], sum(len(text) + 1 for text in documents[split])
        metrics = estimate_loss(model, splits[split], BATCH_SIZE)
        metrics["perplexity"] = math.exp(metrics["loss"])
        metrics["bits_per_character"] = metrics["loss"] / math.log(2) * len(tokens) / characters
        metrics["unknown"] = (tokens == Tokenizer.unk).double().mean().item()
        print(f"best, {split}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))
        results[split] = metrics
    best = results["val"]
    return results | {"val_loss": best["loss"], "bits_per_character": best["bits_per_character"]}


def check_constants():
    """Raise UserError when a constant makes no sense, before anything is read or written."""
    check(torch.__version__ >= (2, 13), f"PyTorch {torch.__version__} is too old: install 2.13.0")
    sizes = "BLOCK_SIZE N_EMBED N_LAYERS N_HEADS BATCH_SIZE MAX_ITERS EVAL_INTERVAL EVAL_ITERS"
    for names, low, high in (
        (f"{sizes} TOP_K", 1, 10**9),
        ("WARMUP_ITERS SAMPLE_TOKENS SEED", 0, 10**9),
        ("TRAIN_SHARE DROPOUT FINAL_LR TOP_P", 0, 1.0),
        ("LEARNING_RATE WEIGHT_DECAY GRADIENT_CLIP TEMPERATURE", 0, 1e9),
        ("NAME DATA DATA_URL DATA_SHA256 PROMPT", "", "\U0010ffff"),
        ("MIN_FREQ PICTURE_TOKENS", 1, 10**9),
        ("BEAMS", 0, 10**9),
        ("VAL_SHARE", 0, 1.0),
    ):
        for name, value in [(name, globals()[name]) for name in names.split()]:
            fits = type(value) in (type(low), type(high)) and low <= value <= high
            fits |= value is None and name in ("TOP_K", "TOP_P", "GRADIENT_CLIP")
            check(fits, f"{name} = {value!r} must be {type(high).__name__}, {low!r} to {high!r}")
    fits = type(BETAS) is tuple and [type(b) is float and 0 <= b < 1 for b in BETAS] == [True] * 2
    check(fits, f"BETAS = {BETAS!r} must be two numbers from 0 to below 1")


def parse_flags(argv):
    """Return the flags of the command line, or of the list argv. A notebook has neither."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description="Train a GPT and let it write.")
    add, add_either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_either("--sample", action="store_true", help=f"no training: continue with {NAME}.pt")
    add_either("--resume", action="store_true", help=f"train further, from {NAME}.resume.pt")
    add("--prompt", metavar="TEXT", default=PROMPT, help="text to continue (default: %(default)s)")
    add("--max-iters", metavar="N", type=int, default=MAX_ITERS, help="training steps in all")
    add("--data", metavar="PATH", help=f"archive, or UTF-8 text (default: {DATA})")
    add("--device", metavar="NAME", default=DEVICE, help="cuda, mps or cpu (default: %(default)s)")
    add("--seed", metavar="N", type=int, help=f"default: {SEED}; with --sample, another each time")
    add("--beams", metavar="N", type=int, default=BEAMS, help="search for a likely text with N")
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
    device = torch.device(flags.device)
    if not flags.sample:
        path = find_data(flags.data)
        documents = split_documents(read_documents(path), TRAIN_SHARE, VAL_SHARE)
    torch.manual_seed(flags.seed)
    if flags.sample or flags.resume:
        model, tokenizer = load_checkpoint(NAME + ".resume" * flags.resume + ".pt", device)
    else:
        tokenizer = Tokenizer(build_vocabulary(documents["train"], MIN_FREQ))
        sizes = BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT, CUTOFFS
        model = LM(tokenizer.vocab_size, *sizes).to(device)
    if flags.prompt == PROMPT and Tokenizer.unk in tokenizer.encode(PROMPT):
        flags.prompt = tokenizer.vocabulary[3]  # the most frequent word
        print(f"the text lacks parts of PROMPT; without --prompt it is {flags.prompt!r}")
    results, n = {}, sum(p.numel() for p in model.parameters())
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {flags.seed}; {n:,} parameters")
    if not flags.sample:
        splits = split_text(documents, tokenizer)
        print(f"{path}: V = {tokenizer.vocab_size:,}, ln V = {math.log(tokenizer.vocab_size):.4f}")
        test = splits.pop("test")  # not looked at before the end
        text_id = sha256(str(documents["val"]).encode()).hexdigest()
        with lock_folder():
            results |= train(model, tokenizer, splits, flags, text_id)
        results |= measure(model, splits | {"test": test}, documents)
    torch.manual_seed(flags.seed)
    ids = tokenizer.encode(flags.prompt)
    print(tokenizer.decode(ids), end="", flush=True)
    for token in generate(model, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P):
        ids.append(token)
        print(" " + tokenizer.decode([token]), end="", flush=True)
    print(flush=True)
    if flags.beams > 0:
        new, score = beam_search(model, tokenizer.encode(flags.prompt), SAMPLE_TOKENS, flags.beams)
        print(f"{flags.beams} beams: {tokenizer.decode(new)} (ln p = {score:.1f})")
    if flags.sample or flags.resume or results["steps"] >= min(EVAL_INTERVAL, flags.max_iters):
        draw_attention(model, tokenizer, ids[: min(PICTURE_TOKENS, model.block_size)])
    return results | {"parameters": n, "text": tokenizer.decode(ids)}


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
