"""A GPT in one file, word by word: it reads 50,000 film reviews and learns to write another one.

Read char_gpt.py first. Most of it stands here again, so that this file can be used alone: skip
whatever you know. New is what real text asks for, in the order of the file:
- clean, build_vocabulary, Tokenizer: tokens are words. Reviews contain web markup, links, capitals.
  There is no end of different words: those that come less than 5 times share one token, <unk>.
- split_documents, split_text: the text is many documents. Each ends with a token <eos> (end of
  sequence), so that the model learns when to stop. 10% of the documents are for a test at the end.
- cut_windows, get_batch: documents have different lengths. <pad> fills the places behind the end of
  a document, mostly when measuring.
- AdaptiveSoftmax: logits of 37,000 words would be most of the work; it computes only a part.
- estimate_loss: accuracy, perplexity, and what a good value is.
- beam_search looks for the likeliest text. attention_weights shows what the model looks at.
You can skip what stands in char_gpt.py to the letter. In section 3, this is the bricks, and Head to
Block; in section 4, all but estimate_loss; in section 5, next_token_probabilities; then section 6.

    python word_gpt.py                                train, then continue the PROMPT
    python word_gpt.py --sample --prompt "The worst"  no training: continue with what was learned
    python word_gpt.py --sample --beams 5             also look for the likeliest text
    python word_gpt.py --runs                         list what was trained in this folder
    python word_gpt.py --resume --max-iters 3000      train the newest run further
    python word_gpt.py --data mytext.txt              train on paragraphs of a text; -h: all flags

Before training, each of the 36,980 words costs about ln 36,980 = 10.52 nats. After training, the
loss is 5.31 on the validation part: the model is as unsure as if it chose among 203 equally likely
words, and 18.03% of its first guesses are right. (5.3117 there, 5.3219 on the test; 1.4 bits per
character. In 5 minutes on 2 cores of an AMD EPYC; Linux, Python 3.11, torch 2.13.0, SEED 1337.)
estimate_loss says what to compare this with. The model writes:

    i think this movie was stupid the movie was funny a decent little acting and the actors were
    beautiful and its never worth the wait for it to watch

It ended this review itself, after 29 words, with <eos>.

PyTorch supplies tensors (arrays of numbers). The shapes of tensors have these letters (section 3):
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens
    N   tokens of a whole text

The reviews: Maas et al. 2011, Learning Word Vectors for Sentiment Analysis. Next: gpt2.py.
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
import tarfile
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from functools import cache
from hashlib import file_digest, sha256
from itertools import pairwise
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from torch import nn

# --- 1. Hyperparameters: numbers that you choose. Each is explained where it is used. -------------
NAME = "word_gpt"  # a run is a file: NAME-1.pt, the next one NAME-2.pt
# Where a line has an else, its first value is for a GPU of NVIDIA that computes in bfloat16
# (numbers of 16 bits). They are estimates: no GPU was at hand to try them (tests/RESULTS.md).
FAST_GPU = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
SEED = 1337  # where all random numbers start, 0 to 2**32 - 1; another one gives another model
# Data
DATA = "aclImdb_v1.tar.gz"  # or any UTF-8 text, with empty lines between its documents
DATA_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DATA_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
TRAIN_SHARE = 0.8  # 80% of the documents are for training, the rest for measuring
VAL_SHARE = 0.1  # 10% choose the best parameters; the last 10%, the test, are measured once
CLEANING = "spaced"  # "reference": as in a published experiment, see clean_as_published
MIN_FREQ = 5  # a word that comes less often in the training documents is <unk>; lower: slower
# Model
BLOCK_SIZE = 64  # T, tokens that the model sees; more: better, and slower
N_EMBED = 256  # C; twice as many take up to 4 times as long
N_LAYERS = 2  # blocks (see Block); more: better, and slower
N_HEADS = 2  # H; must divide N_EMBED; a head size of 32 to 128 is usual
CUTOFFS = (2000, 10000)  # ids where groups of less frequent words begin; (): no groups, slower
DROPOUT = 0.1 if FAST_GPU else 0.0  # share of numbers set to 0 (see FeedForward)
# Optimization
BATCH_SIZE = 128 if FAST_GPU else 32  # B; more: a more exact gradient, and a slower step
MAX_ITERS = 10000 if FAST_GPU else 1800  # training steps
MUON = True  # a better optimizer for most matrices (after the lesson); False: AdamW alone
LEARNING_RATE = 1e-3 if FAST_GPU else 5e-3  # the peak; too high: the loss jumps; too low: it crawls
ADAMW_LEARNING_RATE = 1e-3 if FAST_GPU else 2e-3  # the peak in place of it if MUON = False
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 100  # steps until the peak; at most a tenth of the training
BETAS = (0.9, 0.99)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 100 squares of them
WEIGHT_DECAY = 0.1  # pulls matrices towards zero; more: less overfitting
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
EVAL_INTERVAL = 300  # steps between two evaluations, which also save the run
EVAL_ITERS = 10  # batches of 4,096 tokens in an evaluation; more: more exact, and slower
# Generation
PROMPT = "I think this movie was"  # the text to continue
SAMPLE_TOKENS = 100  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = None  # draw among this many most likely tokens only; None: among all
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all
BEAMS = 0  # texts that beam_search follows; more: a likelier text, and slower; 0: no search
PICTURE_TOKENS = 32  # words in the picture of the attention
PICTURE_HEADS = 6  # heads in that picture, at most
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
#
# One review on its way to the model, with T = 4. The vocabulary is <pad>, <unk>, <eos>, a, film,
# good, the, end. The id of a token is its place there, from 0 on.
#
#   raw            A GOOD film.<br /><br />The end isn't!
#   clean          a good film the end isnt
#   split_text     3 5 4 6 7 1 2                       "isnt" becomes <unk>, 1; <eos>, 2, is added
#   cut_windows    x = 3 5 4 6     y = 5 4 6 7         two windows side by side, as for measuring
#                  x = 7 1 2 0     y = 1 2 -100 -100   <pad> is 0; a target of -100 does not count


@cache  # computed once for each character
def replacement(character):
    """Return what `clean` makes of a character: the same one, nothing, or a space."""
    if character in "'’`´\ufe0f":
        return ""  # dont, not don t; the last one is invisible
    kind = unicodedata.category(character)
    if kind == "Cf":  # invisible ones
        return ""
    return character if kind[0] in "LMN" else " "  # L: letters, M: marks on letters, N: digits


def clean(text, cleaning="spaced"):
    """Return the words of a text, with one space between them: letters, their marks, and digits.

    The model learns what it sees often. So `Film`, `film,` and `film.` become one word, without
    punctuation. The price: it will never write a full stop. Words of digits alone are left out:
    there are many different ones, and few of them come often.

    >>> clean("A well-made film.<br /><br />Don't miss the 80s, it's 10/10!")
    'a well made film dont miss the 80s its'
    >>> clean("Clichés: www.example.com, me@example.com")
    'clichés'

    A word is what stands between spaces. Chinese, Japanese and Thai are written without them. For
    such a text take char_gpt.py or gpt2.py."""
    if cleaning == "reference":
        return clean_as_published(text)
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", " ", text.lower())
    if "@" in text:
        text = re.sub(r"(?<!\S)\S+@\S+\.\S+", " ", text)  # (?<!\S): only at a word's start, fast
    text = unicodedata.normalize("NFC", text)  # é can be one character, or e and a mark: now one
    table = str.maketrans({character: replacement(character) for character in set(text)})
    words = text.translate(table).split()
    return " ".join([word for word in words if not word.isnumeric()])


def build_vocabulary(documents, min_freq):
    """Return the special tokens and the words that come at least `min_freq` times, frequent first.

    Only training documents are counted: to the model, the other splits must be like new texts.

    >>> build_vocabulary(["the film the end", "a film"], min_freq=2)
    ['<pad>', '<unk>', '<eos>', 'film', 'the']
    """
    counts = Counter()
    for document in documents:
        counts.update(document.split())
    words = [word for word, count in counts.items() if count >= min_freq]
    check(words, f"no word comes MIN_FREQ = {min_freq} times: lower it, or use a longer text")
    words.sort(key=lambda word: (-counts[word], word))  # of equally frequent words, by the alphabet
    return ["<pad>", "<unk>", "<eos>", *words]


class Tokenizer:
    """Turns text into ids and back. The id of a word is its place in the vocabulary.

    >>> tokenizer = Tokenizer(["<pad>", "<unk>", "<eos>", "the", "film"])
    >>> tokenizer.encode("The film, the PLOT!"), tokenizer.decode([3, 4, 2])
    ([3, 4, 3, 1], 'the film <eos>')

    The price of <unk>: "some word that I do not know" is easier to predict than the word itself. So
    the more words are unknown, the lower the loss, and the less it says about real words. (For a
    figure, see estimate_loss.)"""

    pad, unk, eos = 0, 1, 2  # no words: an empty place, any unknown word, the end of a document

    def __init__(self, vocabulary, cleaning="spaced"):
        self.vocabulary = vocabulary
        self.cleaning = cleaning
        self.vocab_size = len(self.vocabulary)
        self.stoi = {word: i for i, word in enumerate(self.vocabulary)}

    def encode(self, text):
        """Return the ids of the words of a string, a list of ints. Unknown words become <unk>."""
        return self.encode_clean(clean(text, self.cleaning))

    def encode_clean(self, text):
        """Return the same for a text that is clean already: the documents are."""
        return [self.stoi.get(word, self.unk) for word in text.split()]

    def decode(self, ids):
        """Return the string of a list of ids."""
        return " ".join(self.vocabulary[i] for i in ids)


def split_documents(documents, train_share, val_share):
    """Return {"train": a list of clean documents, "val": ..., "test": the rest}, shuffled.

    No document is cut in two: the model would know one half when it is measured on the other. The
    documents are shuffled: in the archive's order (train/pos/0_9.txt is one name), the last 12,500
    all praise, so there would be no bad review in the test.

    Why three parts? We keep the parameters with the lowest validation loss. A lucky one wins, so
    that loss is a little too good. No decision uses the test. It is measured once, at the end."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(1337))
    documents = [documents[i] for i in order.tolist()]  # the same parts for every SEED
    a = round(train_share * len(documents))
    b = round((train_share + val_share) * len(documents))
    check(0 < a < b < len(documents), "TRAIN_SHARE, VAL_SHARE: a split has no document")
    return {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}


def split_text(documents, tokenizer):
    """Return {"train": ids of all documents of this part, "val": ..., "test": ...}, int32.

    Each document ends with <eos>. The documents "a b" and "c" become: a b <eos> c <eos>.

    The model trains on the first part only. On the second, the validation part, a low loss means
    that it learned how such texts are written. On the first, it may just know the text by heart.
    This is overfitting: the training loss goes on falling, while the validation loss rises."""
    splits = {}
    for split, texts in documents.items():
        ids = array("i")  # 4 bytes each; a list takes 8, and more for the numbers themselves
        for text in texts:
            ids.extend(tokenizer.encode_clean(text))
            ids.append(tokenizer.eos)
        splits[split] = torch.frombuffer(ids, dtype=torch.int32)  # the same memory as a tensor
    return splits


def cut_windows(tokens, starts, ends, block_size):
    """Return the windows that begin at the starts (B, 1), and for each position its target.

    From the place `ends` on, (B, 1) or one number for all, <pad> (0) fills the windows. A target of
    -100 means "do not count". Where <pad> would be the target, it is -100: <pad> after <pad> is
    easy to predict, and useless. What follows <eos> does not count either: the next document has
    nothing to do with this one. (Its words can still look back beyond <eos>, as in GPT-2's
    training: to prevent it would take a mask for each window.) Here 2 is <eos>, and T = 4:

    >>> tokens = torch.tensor([5, 6, 7, 2, 8, 9, 2])
    >>> x, y = cut_windows(tokens, torch.tensor([[1], [4]]), torch.tensor([[7], [7]]), block_size=4)
    >>> x.tolist(), y.tolist()
    ([[6, 7, 2, 8], [8, 9, 2, 0]], [[7, 2, -100, 9], [9, 2, -100, -100]])

    <pad> needs no mask of its own: it is on the right of all words, where Head's mask hides it.
    x and y are (B, T), int64."""
    places = starts + torch.arange(block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    windows = tokens[places.clamp(max=len(tokens) - 1)].long()
    windows = windows.masked_fill(places >= ends, Tokenizer.pad)
    x, y = windows[:, :-1], windows[:, 1:]
    return x, y.masked_fill((x == Tokenizer.eos) | (y == Tokenizer.pad), -100)


def get_batch(tokens, batch_size, block_size, device):
    """Return random windows of the tokens (N,), and for each position its target: the next token.

    A window can start anywhere. It runs on into the next document; <pad> is only needed where there
    is no next one. So at each position, the target is <eos> as often as in the text: reviews have
    230 words on average, so in 1 of 231 windows, 0.43%. There are two other ways to treat a window
    that reaches an <eos>. Let one of T = 4 begin at "end" in "... the end <eos> a good film <eos>":

        it runs on into the next document      end <eos> a good        (the default)
        it is filled up with <pad>             end <eos> <pad> <pad>
        it is moved back, until it ends there  ... the end <eos>, which is then the last target

    We trained 600 steps in each way. Then, on the validation part, windows of the first way started
    anywhere, and we took the mean of the probability that the model gave to <eos>:

        way           loss    at position 20   62      63   (its share is 0.43%)
        runs on       5.65    0.44%            0.44%   0.47%
        <pad>         5.71    0.51%            0.57%   0.55%
        moved back    5.68    0.02%            0.11%   14.4%

    <pad> would fill 14% of the places, and nothing is learned there: 64 / 231 = 28% of the windows
    meet an end, and lose half of their places on average. The same number of <eos> is then among
    86% as many words, so the model expects 0.43% / 0.86 = 0.50% on average (late positions lose
    more words, and expect more). Windows that are moved back lose no place. But they teach that
    reviews end at position 63, the last one, and never before: of 60 samples, 49 ended near their
    64th word. A model must meet in training what it will be asked later, at each position.

    To expect <eos> as often as it comes is not yet to know where it comes. After 900 steps of a run
    with the defaults, <eos> gets 3.4% on average where a review ends, and 0.40% elsewhere."""
    starts = torch.randint(len(tokens) - 1, (batch_size, 1))  # from 0 to N - 2
    x, y = cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)
    return x.to(device), y.to(device)


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
# The whole model, from top to bottom. A * marks parameters. The counts are for the constants of a
# CPU above, and V = 36,980. (char_gpt.py has an example in numbers on its way through it.)
#
#   LM      token ids (B, T)
#           * their rows in lm_head, which is at the end of this map (and counted there)
#           * position_embedding, 64 × 256                                             16,384
#             their sum, a vector of C numbers (B, T, C)
#   Block, N_LAYERS times:                                                        2 × 788,992
#           * LayerNorm, 256 + 256: steady sizes, see Block
#           * MultiHead, 256 × 768 for q, k and v (see Head), and 256 × 256 + 256: what the
#             position collects from itself and earlier ones
#           * LayerNorm, 256 + 256
#           * FeedForward, 256 × 1,024 + 1,024 and 1,024 × 256 + 256: what the position
#             computes from all that it has
#   LM      * ln_f, a LayerNorm, 256 + 256                                                512
#           * lm_head, AdaptiveSoftmax: a logit for each possible next token,
#             (B, T, V). 256 + 1 numbers for each of 36,980 tokens and 2 groups     9,504,374
#                                                                                  11,099,254
# With 37,000 words, 86% of the parameters are in lm_head. So its rows are used twice, for reading
# words and for predicting them: a token_embedding of its own would need 9.5 million more. And in
# training, it does not compute all logits: that would be 86% of the work of a step as well, since
# a layer multiplies by each of its numbers once for each position.


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


class AdaptiveSoftmax(nn.Module):
    """The last layer, for a large V (Grave et al. 2016, arXiv 1609.04309).

    It makes two choices. First: one of the most frequent words, or a group of other words. Then,
    if it is a group: a word of that group. Probabilities of two choices are multiplied:

        first choice (one softmax)                     second choice (one softmax per group)
        w0 0.4   w1 0.2   w2 0.1
        g0 0.2  ----------------------------------->   w3 0.5   w4 0.5   P(w3) = 0.2 · 0.5 = 0.1
        g1 0.1  ----------------------------------->   w5 0.8   w6 0.2   P(w5) = 0.1 · 0.8 = 0.08

    All P sum to 1: 0.4 + 0.2 + 0.1 + (0.1 + 0.1) + (0.08 + 0.02). Ids are sorted by frequency, so a
    group is a range of ids. Here V = 7, and the cutoffs 3 and 5 are where g0 and g1 begin. The
    weight has a row of C numbers for each word and each group. x are the C numbers of a position. A
    logit is x · row, plus the bias of the row, which learns how frequent the word is:

        row of the weight    0   1   2   3   4     5   6     7   8
        its logit is of     g0  g1  w0  w1  w2  |  w3  w4  |  w5  w6

    Of the targets in the reviews, 84% are among the first 2,000 ids. They need the first softmax
    only: 2,002 logits and not 36,980. 11% are in g0 and 4% in g1 (rounded). On average, a target
    needs 2,002 + 11% · 8,000 + 4% · 26,980 = about 4,000 logits.

    The rows of words are the token embedding as well (weight tying, Press and Wolf 2016, arXiv
    1608.05859). Words that can replace each other, such as film and movie, need similar rows for
    reading, since they mean nearly the same, and for predicting, since they are likely in the same
    places. So one row can serve both, and learns from both."""

    def __init__(self, vocab_size, n_embed, cutoffs):
        super().__init__()
        self.cutoffs = [cutoff for cutoff in cutoffs if cutoff < vocab_size]
        edges = [0, *self.cutoffs, vocab_size]
        n_frequent, *sizes = [end - begin for begin, end in pairwise(edges)]  # 3 above, and 2, 2
        check(n_frequent > 0 and min(sizes, default=1) > 0, f"CUTOFFS = {cutoffs} must rise from 1")
        self.rows = [len(sizes) + n_frequent, *sizes]  # of each softmax: 5, 2 and 2 above
        self.weight = nn.Parameter(torch.empty(sum(self.rows), n_embed))  # LM fills it
        self.bias = nn.Parameter(torch.zeros(sum(self.rows)))
        # At first, a word counts about e^0 = 1 in the softmax, so a group must count as all its
        # words together: e^(ln size) = size.
        with torch.no_grad():
            self.bias[: len(sizes)] = torch.tensor(sizes).log()

    def place(self, ids):
        """Return which row a word has: those of groups come first."""
        # An id below 0 (a target of -100) is a mistake. It must fail, not become a group's row.
        return torch.where(ids < 0, ids, ids + len(self.cutoffs))

    def embed(self, idx):
        """Return the rows of the tokens idx (B, T): (B, T, C)."""
        return F.embedding(self.place(idx), self.weight)

    def logits(self, x, i):
        """Return the logits of softmax i, 0 for the first choice: (..., C) -> (..., its rows)."""
        weight = self.weight.split(self.rows)[i]
        bias = self.bias.split(self.rows)[i]
        return multiply(x, weight, bias).float()  # x @ weight.T + bias: see section 8

    def first_choice(self, x):
        """Return ln P of the groups, (..., C) -> (..., groups), and of the frequent words."""
        first = F.log_softmax(self.logits(x, 0), dim=-1)  # ln of softmax
        return first.tensor_split([len(self.cutoffs)], dim=-1)

    def forward(self, x):
        """Return ln P of all words, (..., C) -> (..., V). As logits, they give P again: e^(ln P) is
        P, and all P sum to 1 already."""
        groups, frequent = self.first_choice(x)
        found = [frequent]
        for i in range(len(self.cutoffs)):
            inside = F.log_softmax(self.logits(x, i + 1), dim=-1)
            found.append(groups[..., [i]] + inside)  # ln(a · b) = ln a + ln b
        return torch.cat(found, dim=-1)

    def losses(self, x, targets):
        """Return -ln P of n targets (n,), for x (n, C). Most need the first softmax only.

        In the example above, the target w1 has row 3: its loss is -ln 0.2 = 1.61. The target w3 has
        the row of g0, 0, for the first choice, and is the first word of g0: its loss is
        -ln 0.2 - ln 0.5 = 1.61 + 0.69 = 2.30."""
        # group: 0 for a frequent word, 1 for a word of g0, 2 for one of g1.
        cutoffs = torch.tensor(self.cutoffs, device=x.device)
        group = torch.bucketize(targets, cutoffs, right=True)  # how many cutoffs are <= the id
        row = torch.where(group == 0, self.place(targets), group - 1)
        losses = F.cross_entropy(self.logits(x, 0), row, reduction="none")  # of the first choice
        for i, cutoff in enumerate(self.cutoffs):
            chosen = (group == i + 1).nonzero().flatten()  # which targets are in this group
            logits = self.logits(x[chosen], i + 1)
            second = F.cross_entropy(logits, targets[chosen] - cutoff, reduction="none")
            losses = losses.index_add(0, chosen, second)  # losses[chosen] + second
        return losses

    def hits(self, x, targets, losses):
        """Return for n targets (n,) whether each is the most likely word. -losses is its ln P.

        In the example above, w0 is the most likely word. For the target w3, this is known after the
        first choice: its P, 0.1, is below that of w0, 0.4. For the target w0 as well: a word has at
        most the P of its group, so no word of g0 (0.2) or g1 (0.1) is above 0.4. If g0 had 0.9 and
        w0 0.1, one would have to look into g0: w3 has 0.9 · 0.5 = 0.45."""
        groups, frequent = self.first_choice(x)
        best, word = frequent.max(-1)
        # After the first choice, two kinds of targets can still be hits: the best frequent word,
        # and a word of a group that is likelier than it. (A frequent one cannot be above the best.)
        hits = (word == targets) | (-losses > best)
        for i, cutoff in enumerate(self.cutoffs):
            # For those, look into this group if the group as a whole is likelier than the target.
            chosen = (hits & (groups[:, i] > -losses)).nonzero().flatten()
            inside = F.log_softmax(self.logits(x[chosen], i + 1), dim=-1)
            best, word = inside.max(-1)
            best = best + groups[chosen, i]
            hits[chosen] = (cutoff + word == targets[chosen]) | (-losses[chosen] > best)
        return hits


class LM(nn.Module):
    """The language model: token ids (B, T) -> for each position, logits of the next token.

    vocab_size is V, block_size the longest T, n_embed C, n_heads H, n_layers the blocks."""

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, cutoffs=()):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embed=n_embed,
                           n_heads=n_heads, n_layers=n_layers, dropout=dropout,
                           cutoffs=cutoffs)  # fmt: skip
        self.block_size = block_size
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(n_embed, n_heads, dropout) for _ in range(n_layers)]
        self.blocks = nn.Sequential(*blocks)  # calls one after the other
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = AdaptiveSoftmax(vocab_size, n_embed, cutoffs)  # embeds the tokens as well
        # Small parameters make small logits, so nearly equal probabilities: the loss starts just
        # above ln V. The rows are also the vectors of the tokens. PyTorch starts the positions with
        # a deviation of 1, 50 times as large: the sum of both would hardly show which token it is.
        nn.init.normal_(self.lm_head.weight, std=0.02)  # 0.02 as in GPT-2
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def hidden(self, idx):
        """Return what the output layer gets, for token ids (B, T): (B, T, C)."""
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
            x = self.lm_head.embed(idx) + self.position_embedding.weight[:T]
            return self.ln_f(self.blocks(self.dropout(x)))

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), None) for idx (B, T), or with targets (B, T), (None, loss).

        The loss is the mean of -ln(softmax(logits)[target]) in nats; it skips targets of -100. It
        does not need most logits, so they are not computed."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        counted = targets != -100
        return None, self.lm_head.losses(x[counted], targets[counted]).mean()


# --- 4. Training ----------------------------------------------------------------------------------
@torch.no_grad()  # PyTorch need not remember how results were computed: it costs memory
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    """Return {"loss": nats per token, "known", "accuracy"} of tokens (N,).

    "known" is the mean loss of all targets but <unk>. With the defaults it is 5.33 at the end, not
    5.31: 1.3% of the targets are <unk>, and cost 4.2 nats, less than a word. To tell which of the
    61,225 rare words of the training part it is would cost ln 61,225 = 11.0 nats more, if they were
    equally likely. (And some are none of them.) The mean would be 5.31 + 0.0131 · 11.0 = 5.46. So
    <unk> hides at least 0.14 nats.

    Two predictions, where the true next words got the probabilities 0.3 and 0.05:

        P of the true word     loss = -ln P     is it the most likely word?
        0.3                    1.20             yes
        0.05                   3.00             no
        both                   2.10, the mean   accuracy 1/2

    The accuracy asks only which word is first. The loss asks how much the true word got. e^loss is
    the perplexity: e^2.10 = 8.2, as unsure as if choosing among 8.2 equally likely words. What is a
    good value? On the validation part of the reviews (1,146,877 targets):

        predicted from                   loss     perplexity   accuracy
        nothing: all V equally likely    10.52    36,980       0.00%
        always "the", with P = 1         infinite infinite     5.82%     P = 0 for all other words
        how frequent each word is        6.90     994          5.82%     its first guess is "the"
        the word before (see below)      5.69     296          14.32%
        this model                       5.31     203          18.03%

    The word before: how often each word followed it in the training part. For a pair that never
    came, this would be P = 0. So it is mixed with how frequent each word is. (Witten-Bell: if the
    word before came n times, with m different words after it, then how frequent each word is counts
    for the part m / (n + m).)

    A loss per word and one per character do not compare: a word has 5.4 characters, with the space.
    Bits per character do, on the same text, with the same <unk>. A bit is ln 2 = 0.69 nats, so 5.31
    nats per word are 5.31 / (0.693 · 5.40) = 1.42 bits per character. (Those of the test part are
    1.42, too. Shakespeare in char_gpt.py, with 2.14, is another text, with capitals, punctuation
    and no <unk>.)

    Each document is cut into windows side by side, so each of its tokens but the first is a target
    once. With `eval_iters`, at most that many batches are used, evenly spread. No random number is
    drawn."""
    model.eval()  # switches dropout off: the whole model is measured
    T = model.block_size
    device = next(model.parameters()).device
    borders = (tokens == Tokenizer.eos).nonzero().flatten() + 1  # between the documents
    windows = []  # (where a window starts, where its document ends)
    for begin, end in pairwise([0, *borders.tolist()]):
        windows += [(start, end) for start in range(begin, end - 1, T)]  # end - 1 is the <eos>
    n_windows = len(windows)
    n_used = n_windows if eval_iters is None else min(n_windows, eval_iters * batch_size)
    used = torch.tensor([windows[i * n_windows // n_used] for i in range(n_used)])
    losses, hits, known = [], [], []
    for some in used.split(int(batch_size)):
        starts, ends = some.split(1, dim=1)  # (B, 2) -> two (B, 1)
        x, y = cut_windows(tokens, starts, ends, T)
        x, y = x.to(device), y.to(device)
        hidden = model.hidden(x)[y != -100]  # (B, T, C) -> (number of targets, C)
        targets = y[y != -100]
        losses.append(model.lm_head.losses(hidden, targets))
        hits.append(model.lm_head.hits(hidden, targets, losses[-1]))
        known.append(targets != Tokenizer.unk)
    losses = torch.cat(losses).cpu().double()
    known = torch.cat(known).cpu()
    accuracy = torch.cat(hits).float().mean()
    means = {"loss": losses.mean(), "known": losses[known].mean(), "accuracy": accuracy}
    return {name: mean.item() for name, mean in means.items()}


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
        logits[..., [Tokenizer.pad, Tokenizer.unk]] = -math.inf  # no words: they are never drawn
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        if ids[-1] == Tokenizer.eos:
            return  # the document ends here
        yield ids[-1]


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams):
    """Return (new ids, ln of their probability): the likeliest continuation that the search finds.

    The likeliest next word can lead to an unlikely text. Let the first word be a or c:

        a 0.6, then at best b 0.55    0.6 · 0.55 = 0.33    ln: -0.511 - 0.598 = -1.109
        c 0.4, then at best d 0.9     0.4 · 0.9  = 0.36    ln: -0.916 - 0.105 = -1.022

    One beam takes the likeliest word each time, and finds a b. Two beams continue the two likeliest
    texts, keep the two likeliest of all results, and find c d. ln turns products into sums. This is
    needed: 200 words with P = 0.01 have 10^-400 together, which Python rounds to 0; the sum of
    their ln is -921. (<unk> is never written: its probability is shared out among the others.)

    Is the likeliest text a good one? After "I think this movie was", generate drew "stupid the
    movie was funny a decent little acting and the actors were beautiful ...". 5 beams found "so bad
    that it was so bad that it was so bad that it was ...". A phrase that fits every film is likely,
    and likelier still once it is there. People do not write what is likeliest (Holtzman et al.
    2019)."""
    check(len(ids) > 0, "the prompt has no token: give some text to continue")
    device = next(model.parameters()).device
    model.eval()  # switches dropout off
    kept = [(0.0, [])]  # (ln P of the new ids together, new ids), the likeliest first
    for _ in range(max_new_tokens):
        candidates = []
        for score, new in kept:
            if new and new[-1] == Tokenizer.eos:  # this text has ended
                candidates.append((score, new))
                continue
            text = [*ids, *new]
            idx = torch.tensor([text[-model.block_size :]], device=device)
            logits, _ = model(idx)
            logits[..., [Tokenizer.pad, Tokenizer.unk]] = -math.inf
            n = min(beams, logits.shape[-1] - 2)  # 2: all words but <pad> and <unk>
            best = F.log_softmax(logits[0, -1], dim=-1).topk(n)
            for value, token in zip(best.values, best.indices, strict=True):
                # ln(a · b) = ln a + ln b
                candidates.append((score + value.item(), [*new, token.item()]))
        kept = sorted(candidates, reverse=True)[:beams]
        _, new = kept[0]
        if new[-1] == Tokenizer.eos:
            break  # the others can only become less likely than they are
    score, new = kept[0]
    return new, score


@torch.no_grad()
def attention_weights(model, ids):
    """Return the weights of the attention for a list of T ids: for each block, (H, T, T).

    Row t tells how position t weighs the positions 0 to t; its sum is 1. Head returns weights @ v.
    If v is the identity matrix, this is the weights themselves:

        1    0       1  0     1    0
        0.3  0.7  @  0  1  =  0.3  0.7      row 1: the second word weighs the first one with 0.3

    main draws them into NAME-1_attention.png, for the text that it has just written: the larger a
    weight, the darker. A row is what one word looks at. With the defaults, head 1 of block 1 has a
    dark diagonal: each word looks at itself. Head 2 is dark left of it: it looks at the word
    before. In head 2 of block 2, the columns of "movie", "stupid" and "funny" are grey far down:
    many later words look at them a little."""
    found = []

    # A hook: PyTorch calls look(head, inputs, output) after each call of a Head.
    def look(head, inputs, output):
        """Call a Head that has just worked on q, k, v (1, H, T, hs) once more, with another v."""
        q, k, _ = inputs
        identity = torch.eye(len(ids), device=q.device)  # (T, T), for each head
        # head(...) would call this function again, without end; head.forward(...) does not. In
        # bfloat16, the weights would have 2 digits only.
        with torch.autocast(q.device.type, enabled=False):
            weights = head.forward(q.float(), k.float(), identity)
        found.append(weights[0].cpu())

    device = next(model.parameters()).device
    model.eval()  # switches dropout off
    hooks = [block.attention.head.register_forward_hook(look) for block in model.blocks]
    try:
        model.hidden(torch.tensor([ids], device=device))
    finally:  # whatever happens, the model is left as it was
        for hook in hooks:
            hook.remove()
    return found


# Try this, one edit at a time. They need no training: python word_gpt.py --sample --seed 1337. Each
# of these texts continues "I think this movie was":
# - TEMPERATURE = 0: "a great movie but i was very disappointed with the story and the story is a
#   very good story and the story is very good and the story is". Greedy texts repeat themselves.
# - TEMPERATURE = 2: "social contain crappy animations tightly hostilities favourites moral". 35,000
#   words are unlikely, but each of them got a little more: now they win together.
# - TEMPERATURE = 1, TOP_P = 0.5: "good i dont think i was laughing at the time the whole movie is a
#   lot more fun than the first movie". The words that share the unlikely half are never drawn.


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


def new_run(documents, flags, device):
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
        "cleaning": CLEANING,
        "min_freq": MIN_FREQ,
    }
    torch.manual_seed(run["seed"])
    tokenizer = Tokenizer(build_vocabulary(documents["train"], MIN_FREQ), CLEANING)
    sizes = BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT, CUTOFFS
    model = LM(tokenizer.vocab_size, *sizes).to(device)
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
        tokenizer = Tokenizer(run["vocabulary"], run["cleaning"])
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


def read_reviews(path):
    """Return the reviews of an archive, or of the folder in it, in the order of their names."""
    texts = {}

    def keep(name, content):
        """Keep a review by the end of its name: copies differ in what stands in front of it."""
        match = re.search(r"(train|test)/(pos|neg)/\d+_\d+\.txt$", name)
        if match:
            texts[match[0]] = content.decode("utf-8")

    try:
        if path.is_dir():
            for file in path.rglob("*_*.txt"):
                keep(file.as_posix(), file.read_bytes())
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.size < 10**6:
                        keep(member.name, archive.extractfile(member).read())
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        reason = " ".join(str(error).split())[:99]
        why = "get it again, or unpack it first if it is a text"
        raise UserError(f"{path} is no whole archive of reviews ({reason}): {why}") from error
    check(len(texts) == 50_000, f"{path} has {len(texts):,} of 50,000 reviews: get a whole copy")
    return [texts[name] for name in sorted(texts)]


def read_documents(path, cleaning):
    """Return the clean documents of a file: the reviews of an archive, the paragraphs of a text.

    UserError: it is neither, or in a script that has no spaces between words."""
    if path.is_dir() or path.name.endswith((".gz", ".tgz", ".tar")):
        texts = read_reviews(path)
    else:
        check(path.suffix != ".zip", f"{path}: unpack it, and name the folder with --data")
        texts = re.split(r"\n\s*\n", read_text(path))
    sample = "\n".join(texts[:: len(texts) // 1000 + 1])  # some documents are enough to judge
    # Thai and Lao, Burmese, Khmer, Japanese, Chinese:
    unspaced = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    letters = sum(map(str.isalpha, sample))
    spaced = len(re.findall(unspaced, sample)) <= 0.1 * letters
    check(spaced, f"{path} has no spaces between words: take char_gpt.py or gpt2.py for it")
    documents = [clean(text, cleaning) for text in texts]
    documents = [text for text in documents if text]
    check(len(documents) > 9, f"{path}: put empty lines between at least 10 paragraphs")
    return documents


def clean_as_published(text):
    """Return the words of a text as many experiments with these reviews do: a to z, and spaces.

    All else is removed without a trace, even between words. With it, the preset "reference" of
    tests/RESULTS.md compares with a published loss.

    >>> clean_as_published("A well-made film.<br /><br />Clichés")
    'a wellmade filmclichs'
    """
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", "", text.lower())
    text = re.sub(r"(?<!\S)\S+@\S+\.\S+", "", text)
    return " ".join(re.sub(r"[^a-z\s]", "", text).split())


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


def draw_attention(model, tokenizer, ids, path):
    """Draw what the model weighs when it reads the ids: a square for each head, the sharpest first.

    A row is what one word looks at, and its darkest fields are what it weighs most. A head is sharp
    if few words have large weights. The first word does not count: heads that find nothing often
    give all their weight to it."""
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    heads = []
    for block, layer in enumerate(attention_weights(model, ids), 1):
        for head, weights in enumerate(layer, 1):
            sharpness = weights[:, 1:].square().sum().item()
            heads.append((sharpness, block, head, weights))
    heads = sorted(heads, key=lambda entry: entry[0], reverse=True)[:PICTURE_HEADS]
    words = [tokenizer.decode([token]) for token in ids]
    font = FontProperties(fname=find_font(set("".join(words))), size=7)
    rows = math.ceil(len(heads) / 2)
    side = 1.5 + 0.16 * len(ids)  # inches
    figure = Figure(figsize=(2 * side, rows * side), layout="constrained")
    for place, (_, block, head, weights) in enumerate(heads, 1):
        axes = figure.add_subplot(rows, 2, place)
        axes.imshow(weights.tolist(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"block {block}, head {head}")
        axes.set_xticks(range(len(ids)), words, rotation=90, font=font, parse_math=False)
        axes.set_yticks(range(len(ids)), words, font=font, parse_math=False)
    write_file(path, lambda part: figure.savefig(part, format="png", dpi=100))


def find_font(letters):
    """Return the file of a font that has all these letters. UserError: there is none."""
    from matplotlib import font_manager

    files = [
        font_manager.findfont("DejaVu Sans")
    ]  # comes with matplotlib; it has no Korean letters
    for font in font_manager.fontManager.ttflist:
        if "Last Resort" not in font.name:  # its letters are boxes
            files.append(font.fname)
    for file in files:
        codes = font_manager.get_font(file).get_charmap()
        if all(ord(letter) in codes for letter in letters):
            return file
    raise UserError(f"no font here has the letters {''.join(sorted(letters))!r:.60}")


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


def multiply(x, weight, bias):
    """Return x @ weight.T + bias, in bfloat16 where the hardware computes in it.

    PyTorch prepares a product anew for each new number of rows of x, and keeps what it prepared.
    The number of targets varies from batch to batch. So rows of zeros fill x up to a multiple of
    64, and there are few different numbers. Otherwise 150 steps would take 2.5 GB."""
    n = x.shape[-2]
    x = F.pad(x, (0, 0, 0, -n % 64))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bfloat16(x.device)):
        return F.linear(x, weight, bias)[..., :n, :]


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


def write_sample(model, tokenizer, prompt):
    """Print the prompt, and its continuation while it is made. Return both as one string."""
    ids = tokenizer.encode(prompt)
    print(tokenizer.decode(ids), end="", flush=True)
    for token in generate(model, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P):
        ids.append(token)
        print(" " + tokenizer.decode([token]), end="", flush=True)
    print(flush=True)
    return tokenizer.decode(ids)


def write_beams(model, tokenizer, prompt, beams):
    """Print the likeliest continuation that beam_search finds."""
    new, score = beam_search(model, tokenizer.encode(prompt), SAMPLE_TOKENS, beams)
    print(f"{beams} beams: {tokenizer.decode(new)} (ln P = {score:.1f})")


def write_attention(run, model, tokenizer, text):
    """Draw what the model looks at when it reads the text."""
    path = run["path"].with_name(f"{run['path'].stem}_attention.png")
    ids = tokenizer.encode(text)[: min(PICTURE_TOKENS, model.block_size)]
    try:
        draw_attention(model, tokenizer, ids, path)
    except Exception as error:  # a viewer holds the picture, matplotlib is broken: go on
        print(f"no picture {path}: {error}")


def choose_prompt(flags, run, tokenizer):
    """Return --prompt, or PROMPT, or the most frequent word if the text lacks words of PROMPT."""
    prompt = PROMPT if flags.prompt is None else flags.prompt
    words = clean(prompt, tokenizer.cleaning).split()
    unknown = [word for word in words if word not in tokenizer.stoi]
    if unknown and flags.prompt is None:
        prompt = tokenizer.vocabulary[3]
        print(f"{run['text']} lacks words of PROMPT: without --prompt it is {prompt!r}")
    elif unknown:
        print(f"words that {run['text']} hardly has, so that they become <unk>: {unknown}")
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
    add("--data", metavar="PATH", help=f"archive, its folder, or UTF-8 text (default: {DATA})")
    add("--device", metavar="NAME", default=DEVICE, help="cpu, cuda, ... (default: %(default)s)")
    add("--seed", metavar="N", type=int, help=f"default: {SEED}; with --sample, another each time")
    add("--beams", metavar="N", type=int, default=BEAMS, help="search for a likely text with N")
    in_notebook = argv is None and "kernel_launcher" in sys.argv[0]
    flags = parser.parse_args([] if in_notebook else argv)
    if flags.run and not (flags.sample or flags.resume):
        parser.error("--run needs --sample or --resume")
    return flags


def prepare(flags, device):
    """Return (run, model, tokenizer, optimizers, splits, documents): a new run, or one to go on."""
    is_folder = flags.data is not None and os.path.isdir(flags.data)
    path = Path(flags.data) if is_folder else find_data(flags.data)
    if flags.resume:
        run, model, tokenizer = load_run(flags.run or saved_runs()[-1], device)
    cleaning = run["cleaning"] if flags.resume else CLEANING
    documents = split_documents(read_documents(path, cleaning), TRAIN_SHARE, VAL_SHARE)
    if not flags.resume:
        run, model, tokenizer = new_run(documents, flags, device)
    if flags.max_iters is not None:
        run["max_iters"] = flags.max_iters
    done = f"{run['step']:,} of {run['max_iters']:,} steps are done"
    check(run["step"] < run["max_iters"], f"{done}: --max-iters N trains further")
    check(EVAL_INTERVAL > 0, f"EVAL_INTERVAL = {EVAL_INTERVAL} must be 1 or more")
    optimizers = make_optimizers(model)
    if flags.resume:
        resume(run, model, optimizers, flags)
    splits = split_text(documents, tokenizer)
    del documents["train"]  # 70 MB, which are not needed any more
    name_text(run, path, "\n".join(documents["val"]), len(splits["train"]))
    run["prompt"] = choose_prompt(flags, run, tokenizer)
    print(f"{path}: V = {tokenizer.vocab_size:,}, ln V = {math.log(tokenizer.vocab_size):.4f}")
    return run, model, tokenizer, optimizers, splits, documents


def measure(run, model, splits, documents):
    """Measure the best parameters exactly, print and save it. Return what `main` promises.

    Bits per character: a document's first word is no target, so its characters do not count. The
    others are those of the clean text, with the space in front of each word, and one for <eos>."""
    print(f"{run['path']}: the best of {run['step']:,} steps is {run['best_step']:,}", flush=True)
    results = {}
    for split in ("val", "test"):
        metrics = estimate_loss(model, splits[split], max(1, 4096 // model.block_size))
        texts = documents[split]
        n_targets = len(splits[split]) - len(texts)
        first_words = sum(len(text.partition(" ")[0]) for text in texts)
        characters = sum(map(len, texts)) + len(texts) - first_words
        metrics["perplexity"] = math.exp(metrics["loss"])
        metrics["bits_per_character"] = metrics["loss"] / math.log(2) * n_targets / characters
        n_unknown = (splits[split] == Tokenizer.unk).sum().item()
        metrics["unknown"] = n_unknown / len(splits[split])
        print(f"all of {split}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))
        results[split] = metrics
    run["val_loss"] = results["val"]["loss"]
    write_run(run)
    tokens = run["step"] * BATCH_SIZE * model.block_size
    results |= {"val_loss": run["val_loss"], "steps": run["step"], "seconds": run["seconds"]}
    results["bits_per_character"] = results["val"]["bits_per_character"]
    return results | {"tokens_per_second": tokens / run["seconds"]}


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
        run["prompt"] = choose_prompt(flags, run, tokenizer)
        run["seed"] = torch.seed() % 2**32 if flags.seed is None else flags.seed
    else:
        check(os.access(".", os.W_OK), "cannot write into this folder: a run needs a file in it")
        keep_freed_memory()
        remove_leftovers(f"{NAME}-*.*.part")
        run, model, tokenizer, optimizers, splits, documents = prepare(flags, device)
    results = {"parameters": sum(p.numel() for p in model.parameters())}
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {run['seed']}", end="; ")
    print(f"{results['parameters']:,} parameters", flush=True)
    if not flags.sample:
        test = splits.pop("test")  # not looked at before the end
        train(model, tokenizer, optimizers, splits, run)
        path = run["path"]
        del run, model, optimizers  # the file has them all: not twice in memory
        run, model, tokenizer = load_run(path, device)
        results |= measure(run, model, splits | {"test": test}, documents)
    torch.manual_seed(run["seed"])
    text = write_sample(model, tokenizer, run["prompt"])
    if flags.beams > 0:
        write_beams(model, tokenizer, run["prompt"], flags.beams)
    write_attention(run, model, tokenizer, text)
    return results | {"text": text}


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
