"""A GPT in one file, word by word: it reads 50,000 film reviews and learns to write another.

The model is that of char_gpt.py, but for its last step, the choice of a word out of 37,000. New is
what real text from the internet brings: a download, cleaning, words that the model does not know,
texts of unequal length, more metrics than the loss, and a look at what attention attends to.

    pip install torch requests matplotlib
    python word_gpt.py                               downloads 84 MB once, trains, writes a review
    python word_gpt.py --sample --prompt "The worst" continues another beginning, without training
    python word_gpt.py --sample --beams 5            looks for the likeliest review as well
    python word_gpt.py --data my.txt                 learns from paragraphs of a UTF-8 text
    python word_gpt.py -h

What to expect of `python word_gpt.py`, measured on a 2-core AMD EPYC (Zen 4, AVX-512 bfloat16) with
torch 2.13.0 and seed 1337: 7 min 44 s in all, 10 s of them to read and clean the reviews the first
time; 2.1 GB of memory; 11,061,218 parameters; V = 36,832, and 1.29% of the words of the validation
text unknown. Over the whole validation split: loss 5.3424 nats per token (5.3559 without <unk>),
accuracy 17.83%, perplexity 209.0, 1.4287 bits per character; over the test split: 5.3534 and
17.71%. (A run of 80 minutes reaches 4.8805 and 21.29%: see the README.) It writes:

    i think this movie was good for a good movie about anyone else the directing and editing are
    good but it was worse than a short plot the tale was very good and very difficult to believe
    using more than a small budget films than the average horror flick i am not sure it was a very
    good episode in a typical way of animation

What differs from char_gpt.py, and why:
- Tokenizer: words. There is no end of them, so the rare ones share the token <unk>.
- read_archive ... load_corpus: many documents from an archive, cleaned, dealt out, and cached.
- get_batch: a window belongs to one review; where it is too short, <pad> fills the window.
- LM: a word is chosen in two steps, since a logit for every word would be most of the work
  (`score`); the same matrix reads words and predicts them; with targets `forward` gives no logits;
  padding is left out of the loss; positions begin near zero, as words do. (Head, MultiHead,
  FeedForward and Block are the same.)
- estimate_loss: accuracy, and the loss without <unk>, which flatters it; both leave padding out.
- generate: stops at <eos>, the end of a review, and never draws <unk> or <pad>.
- beam_search, attention_weights, draw_attention, print_vocabulary, print_metrics: new.
- learning_rate_at: SCHEDULE may keep the rate constant, as one of the two experiments needs.
- stream: a space between words. parse_flags: --beams.
- train, Keeper, draw_losses, main: pass on, print and draw the further metrics.

The two experiments are EXPERIMENT = "small" (2 layers, 2 heads, 256 wide, one-cycle) and "large" (4
layers, 8 heads, 512 wide, constant). Their values for a GPU are reasoned, not measured yet.

The letters of all shapes, here and in the other two files:
    B   batch: windows that go through at once
    T   time: tokens of a window
    C   channels: numbers that stand for a token
    H   heads of a block
    hs  head size: C / H
    V   vocabulary: how many different tokens there are

Papers: Vaswani et al. 2017 (arXiv 1706.03762), attention; Maas et al. 2011 (Learning Word Vectors
for Sentiment Analysis), the reviews; Holtzman et al. 2019 (arXiv 1904.09751), why likely text is
dull; others stand where they are used.
"""

import argparse
import contextlib
import ctypes
import hashlib
import inspect
import math
import os
import re
import signal
import sys
import tarfile
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# 1. Hyperparameters
# ---------------------------------------------------------------------------------------------

NAME = "word_gpt"  # the files that a run writes are NAME.pt, NAME.resume.pt and NAME*.png
ON_GPU = torch.cuda.is_available()  # where two values stand on a line, the first is for CUDA
DEVICE = "cuda" if ON_GPU else "mps" if torch.mps.is_available() else "cpu"  # fastest first
SEED = 1337  # same seed, machine and versions: same weights; another seed: another model and sample

# Data
DATA = "data/aclImdb_v1.tar.gz"  # or UTF-8 text; the default is looked for beside this file as well
DATA_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"  # 84 MB
DATA_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
TRAIN_SHARE = 0.8  # 80% of the reviews are for training, the rest is never trained on
VAL_SHARE = 0.1  # 10% choose the best weights; what is left, 10%, is looked at once, at the end
CLEANING = "spaced"  # "reference": cruder rules, that glue words together; see `clean`
MIN_FREQ = 5  # a rarer word is <unk>: lower knows more words, at more time a step

# Model
EXPERIMENT = "small"  # or "large": sets the four constants that name it below
BLOCK_SIZE = 64  # tokens of context: more informs better, and takes more time
N_EMBED = 512 if EXPERIMENT == "large" else 256  # channels: more learn more; the time is quadratic
N_LAYERS = 4 if EXPERIMENT == "large" else 2  # blocks, one after another: deeper, and slower
N_HEADS = 8 if EXPERIMENT == "large" else 2  # heads per block: more see more, in fewer channels
CUTOFFS = (2000, 10000)  # ids where groups of rarer words begin; (2000,): one; (): none, slower
DROPOUT = 0.1 if ON_GPU else 0.0  # share of activations zeroed in training: more delays overfitting

# Optimisation
BATCH_SIZE = 128 if ON_GPU else 32  # windows per step: more is a smoother, costlier gradient
MAX_ITERS = 10000 if ON_GPU else 1800  # steps: more learns more, until it learns the text by heart
SCHEDULE = "constant" if EXPERIMENT == "large" else "one-cycle"  # see `learning_rate_at`
LEARNING_RATE = 1e-3 if ON_GPU else 5e-3  # the peak; too high diverges, too low learns slowly
WARMUP_ITERS = 100  # steps to reach the peak: the optimizer's first averages are noisy
BETAS = (0.9, 0.99)  # memory of AdamW's averages of gradients and of their squares (10, 100 steps)
WEIGHT_DECAY = 0.1  # pull of matrices to zero: more generalises, fits less
GRADIENT_CLIP = 1.0  # longer gradients are cut to it: one bad batch cannot throw the model far

# Evaluation
EVAL_INTERVAL = 300  # steps between two evaluations: fewer show more, and take more time
EVAL_ITERS = 10  # batches per evaluation: more are more exact, and slower

# Generation
PROMPT = "I think this movie was"  # the text to continue
SAMPLE_TOKENS = 100  # length of the continuation at the end, where no <eos> ends it before
TEMPERATURE = 0.8  # 0: always the likeliest token; 1: the model's own odds; above: wilder
TOP_K = None  # draw among this many likeliest tokens only; None: among all
TOP_P = None  # draw among the likeliest tokens that make up this probability; None: all
PICTURE_TOKENS = 32  # words in the picture of attention: more are harder to read
BEAMS = 0  # texts that the search for the likeliest text follows at once; 0: no search


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


def read_archive(path):
    """Return the 50,000 reviews of the archive, a list of str, in the order of their file names.

    It is read from front to back, member by member, and never extracted: what a strange archive
    calls its files can then do no harm. The order of its members is an accident of whoever packed
    it, so the reviews are sorted. What else lies in it (unlabelled reviews, counts) is skipped.

    Raises:
        UserError: it is damaged or cut off, lacks reviews, or has members that no archive of
            reviews should have.
    """
    texts = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{path} has a member {member.name!r} that is a link, or points out of the "
                        "archive: get a clean copy"
                    )
                if re.fullmatch(r"aclImdb/(train|test)/(pos|neg)/\d+_\d+\.txt", member.name):
                    texts[member.name] = archive.extractfile(member).read().decode("utf-8")
    except (OSError, EOFError, zlib.error, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and get it again") from error
    for part in ("train", "test"):
        found = sum(name.startswith(f"aclImdb/{part}/") for name in texts)
        if found != 25_000:
            raise UserError(f"{path} has {found:,} {part} reviews, not 25,000: get a whole copy")
    return [texts[name] for name in sorted(texts)]


def load_reviews(path):
    """Return the reviews of an archive, or the paragraphs of a UTF-8 text file: a list of str.

    Raises:
        UserError: the file is missing, unreadable, damaged, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"  # how every gzip file begins
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return read_archive(path) if is_gzip else re.split(r"\n\s*\n", load_text(path, None, None))


def clean(text, cleaning):
    """Reduce a text to words of the letters a to z, with one space between two of them.

    A model can learn only what it sees often: `Film`, `film,` and `film.` are one word to it, so
    that it sees that word more often. What it costs: it will never write a full stop.

    Args:
        cleaning: "spaced", where a removed mark leaves a space wherever one belongs, or
            "reference", which removes marks without a trace, as many published notebooks do.

    >>> clean("A well-made film.<br /><br />The END", "spaced")  # markup and hyphens
    'a well made film the end'
    >>> clean("A well-made film.<br /><br />The END", "reference")
    'a wellmade filmthe end'
    >>> clean("Don't miss it: 10/10! www.example.com me@example.com", "spaced")
    'dont miss it'
    >>> clean("The cliché of the 1980's", "spaced"), clean("The cliché of the 1980's", "reference")
    ('the cliche of the s', 'the clich of the s')

    Raises:
        UserError: there is no such cleaning.
    """
    if cleaning not in ("spaced", "reference"):
        raise UserError(f'CLEANING = {cleaning!r}: must be "spaced" or "reference"')
    gap = " " if cleaning == "spaced" else ""
    text = re.sub(r"<.*?>", gap, text).lower()  # <br />
    text = re.sub(r"http\S+|www\.\S+", gap, text)  # http://example.com/a?b=c
    text = re.sub(r"\S+@\S+\.\S+", gap, text)  # someone@example.com
    if cleaning == "spaced":
        text = re.sub(r"['’`´]", "", text)  # don't -> dont: an apostrophe joins
        if not text.isascii():  # é -> e and an accent of its own -> e
            text = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    text = re.sub(r"[^a-z\s]+", gap, text)  # digits and punctuation
    return " ".join(text.split())


class Tokenizer:
    """Turns text into numbers and back: each word is its place in a list, frequent words first.

    Three places stand for no word: `<pad>` fills what is empty, `<unk>` is any word that is not in
    the list, and `<eos>` is the end of a review.

    Args:
        vocabulary: {"cleaning": see `clean`, "words": list of str, the three above left out}.

    >>> tokenizer = Tokenizer({"cleaning": "spaced", "words": ["the", "film"]})
    >>> tokenizer.vocab_size
    5
    >>> tokenizer.encode("The film, the PLOT!")
    [3, 4, 3, 1]
    >>> tokenizer.decode([3, 4, 3, 1])
    'the film the <unk>'
    """

    pad, unk, eos = 0, 1, 2

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.words = ["<pad>", "<unk>", "<eos>", *vocabulary["words"]]
        self.vocab_size = len(self.words)
        self.id_of = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        """Return the ids of the words of `text`, a list of ints. Any text will do."""
        words = clean(text, self.vocabulary["cleaning"]).split()
        return [self.id_of.get(word, self.unk) for word in words]

    def decode(self, ids):
        """Return the text of a list of ids; the inverse of `encode` for clean, known words."""
        return " ".join(self.words[i] for i in ids)


def build_vocabulary(texts, cleaning, min_freq):
    """Return the vocabulary of a list of clean texts: the words seen at least `min_freq` times.

    They are sorted by count, and by spelling where the counts are equal, so that the same texts
    make the same ids on every machine.

    >>> build_vocabulary(["b a b", "c a b"], "spaced", min_freq=2)
    {'cleaning': 'spaced', 'words': ['b', 'a']}
    """
    counts = Counter()
    for text in texts:
        counts.update(text.split())
    words = [word for word, count in counts.items() if count >= min_freq]
    return {"cleaning": cleaning, "words": sorted(words, key=lambda word: (-counts[word], word))}


def make_corpus(reviews, cleaning, min_freq, train_share, val_share, seed):
    """Clean the reviews, deal them out, and turn them into numbers.

    They are shuffled first: the archive has them sorted by star rating and set, and no part should
    have only bad ones. A review goes to one part as a whole. The vocabulary is made of the training
    reviews alone: a word that only the others have would be no surprise otherwise.

    Args:
        reviews: list of str. cleaning: see `clean`. min_freq: see `build_vocabulary`.
        train_share, val_share: of the reviews; the rest is for the test.

    Returns:
        {"vocabulary", "train", "val", "test"}: the last three are {"tokens": (N,) int32 ids, with
        <eos> behind each review, "characters": how many the clean text has, with one behind each
        word}.

    Raises:
        UserError: there are too few reviews, or too few words that are frequent enough.
    """
    texts = [text for text in (clean(review, cleaning) for review in reviews) if text]
    generator = torch.Generator().manual_seed(seed)
    texts = [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]
    cuts = [0, int(train_share * len(texts)), int((train_share + val_share) * len(texts))]
    parts = dict(
        zip(("train", "val", "test"), zip(cuts, [*cuts[1:], None], strict=True), strict=True)
    )
    corpus = {}
    for part, (begin, end) in parts.items():
        chosen = texts[begin:end]
        if not chosen:
            raise UserError(
                f"{len(texts):,} documents are too few: none is left for {part}; documents are "
                "paragraphs with an empty line between two of them"
            )
        if part == "train":
            corpus["vocabulary"] = build_vocabulary(chosen, cleaning, min_freq)
            id_of = Tokenizer(corpus["vocabulary"]).id_of
            if not corpus["vocabulary"]["words"]:
                raise UserError(
                    f"no word comes MIN_FREQ = {min_freq} times: lower it, or use a longer text"
                )
        ids = array("i")
        for text in chosen:
            ids.extend([id_of.get(word, Tokenizer.unk) for word in text.split()])
            ids.append(Tokenizer.eos)
        corpus[part] = {
            "tokens": torch.tensor(ids, dtype=torch.int32),
            "characters": sum(len(text) + 1 for text in chosen),
        }
    return corpus


def load_corpus(path, url, sha256, **settings):
    """Return what `make_corpus` makes of a file, from a cache where one is there already.

    The cache lies beside the file; where that folder cannot be written, in data/ of the current
    one. Its name holds a hash of all that it depends on: the content of the file, the settings, and
    the source of the functions above. Change one, and another cache is made.

    Args:
        path: an archive of reviews or a UTF-8 text.
        url, sha256: where to get it, and what its content must hash to. A file with a url is looked
            for beside this script as well. None: it has to be there.
        settings: the further arguments of `make_corpus`.

    Raises:
        UserError: the file is missing and cannot be downloaded, or is bad; see above.
    """
    path = Path(path)
    if url is not None:
        beside_script = Path(__file__).parent / path
        if beside_script.exists():
            path = beside_script
        elif not path.exists() and path.name == url.rpartition("/")[2]:
            path.parent.mkdir(parents=True, exist_ok=True)
            download(url, path, sha256)
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for function in (read_archive, load_reviews, clean, build_vocabulary, make_corpus):
        digest.update(inspect.getsource(function).encode())
    try:
        digest.update(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: name one with --data") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    # A folder that is marked read-only is left alone even by root, who could write there.
    folder = path.parent
    if not (folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK)):
        folder = Path("data")
    cache = folder / f"{path.name.partition('.')[0]}.{digest.hexdigest()[:8]}.pt"
    start = time.perf_counter()
    with contextlib.suppress(Exception):  # no cache, or a damaged one: it is made anew
        corpus = torch.load(cache, weights_only=True)
        print(f"reviews    from {cache} in {time.perf_counter() - start:.1f} s")
        return corpus
    corpus = make_corpus(load_reviews(path), **settings)
    folder.mkdir(exist_ok=True)
    with replacing(cache) as temporary:
        torch.save(corpus, temporary)
    print(f"reviews    {path} cleaned in {time.perf_counter() - start:.1f} s, kept in {cache}")
    return corpus


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
        cutoffs: ids, rising, at each of which a group of rarer words begins; see `score`.

    Raises:
        UserError: `cutoffs` is no tuple, does not rise, or has one below 1.
    """

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, cutoffs=()):
        super().__init__()
        rising = isinstance(cutoffs, tuple | list) and list(cutoffs) == sorted(set(cutoffs))
        if not rising or min(cutoffs, default=1) < 1:
            raise UserError(f"CUTOFFS = {cutoffs}: must be () or rising ids, like (2000, 10000)")
        self.sizes = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "n_embed": n_embed,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "dropout": dropout,
            "cutoffs": tuple(cutoffs),
        }
        self.block_size = block_size
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embed, n_heads, dropout) for _ in range(n_layers)))
        self.final_norm = nn.LayerNorm(n_embed)
        # One row a word, and in front of them one for each group of rare words; see `score`.
        edges = [*(cutoff for cutoff in cutoffs if cutoff < vocab_size), vocab_size]
        self.cutoffs = edges[:-1]
        group_sizes = [end - begin for begin, end in pairwise(edges)]
        self.parts = [len(group_sizes) + edges[0], *group_sizes]  # how many rows each part has
        # There is no token embedding: the rows that predict words are looked up to read them, too
        # (weight tying, Press and Wolf 2016, arXiv 1608.05859). What a word means is the same at
        # both ends, and half as many numbers for rare words can learn less by heart.
        self.lm_head = nn.Linear(n_embed, sum(self.parts))
        # Small logits are nearly equal odds for all tokens: the loss begins at ln V, like that of a
        # model that knows nothing. PyTorch's own, larger start has convictions, and they are wrong.
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)
        for group, size in enumerate(group_sizes):  # a group begins as likely as its words together
            nn.init.constant_(self.lm_head.bias[group], math.log(size))
        nn.init.normal_(self.position_embedding.weight, std=0.02)  # must not drown out the words

    def hidden(self, idx):
        """Return what the blocks make of idx (B, T): (B, T, C), ready for `lm_head`."""
        T = idx.shape[1]
        # Attention by itself sees a set, not a sequence: where a token stands has to be told. Both
        # are looked up in tables and added: (B, T, C) + (T, C) -> (B, T, C)
        positions = torch.arange(T, device=idx.device)
        words = F.embedding(idx + len(self.cutoffs), self.lm_head.weight)  # the groups are in front
        x = self.dropout(words + self.position_embedding(positions))
        return self.final_norm(self.blocks(x))

    def score(self, idx, targets, with_best=True):
        """Say how likely the targets were, without a logit for every word.

        Logits for 39,000 words are most of the work of a step, and most of them are for words that
        hardly ever come. So a word is chosen in two steps (adaptive softmax, Grave et al. 2016,
        arXiv 1609.04309): a common word or a group of rare ones, and then, in that case only, a
        word of the group. The more frequent a word, the lower its id (see `build_vocabulary`), so
        the words below the first cutoff are the common ones. The probabilities of all words still
        sum to 1:

            P(rare word) = P(its group) P(the word, given its group)

        Args:
            idx, targets: see `forward`.
            with_best: also find out which token is the likeliest, at some more work.

        Returns:
            for each of the N targets that are not `<pad>`, in reading order: its loss,
            -ln(probability), (N,) float32, and whether it is the token thought likeliest (the first
            of equal ones), (N,) bool, or None without `with_best`.
        """
        real = targets != Tokenizer.pad
        x, targets = self.hidden(idx)[real], targets[real]  # (N, C), (N,)
        weights = self.lm_head.weight.split(self.parts)  # (rows of the part, C) each
        biases = self.lm_head.bias.split(self.parts)
        group_of = torch.full_like(targets, -1)  # -1: a common word
        for cutoff in self.cutoffs:
            group_of += targets >= cutoff
        # The groups, then the common words: (N, C) @ (C, parts[0]) -> (N, parts[0]), in float32,
        # since bfloat16 is too coarse for the loss
        first = F.log_softmax(F.linear(x, weights[0], biases[0]).float(), dim=-1)
        n_groups = len(self.cutoffs)
        chosen = torch.where(group_of < 0, targets + n_groups, group_of)
        losses = F.nll_loss(first, chosen, reduction="none")
        if with_best:
            best, guess = first[:, n_groups:].detach().max(-1)  # ln(probability), and id
        for group, cutoff in enumerate(self.cutoffs):
            inside = group_of == group
            # A group that is likelier than any word so far may hold a word that is so, too.
            looked_at = inside | (first[:, group] > best) if with_best else inside
            rows = looked_at.nonzero().flatten()  # M of the N
            second = F.linear(x[rows], weights[group + 1], biases[group + 1])
            second = F.log_softmax(second.float(), dim=-1)  # (M, size of the group)
            place = torch.where(inside, targets - cutoff, 0)[rows, None]  # (M, 1), in the group
            losses = losses.index_add(0, rows, -second.gather(1, place)[:, 0] * inside[rows])
            if with_best:
                likeliest, word = (first[rows, group, None] + second).detach().max(-1)
                guess[rows] = torch.where(likeliest > best[rows], cutoff + word, guess[rows])
                best[rows] = best[rows].maximum(likeliest)
        return losses, guess == targets if with_best else None

    def forward(self, idx, targets=None):
        """Predict the next token at every position, or say how wrong that was.

        Args:
            idx: (B, T) token ids, int64, T at most `block_size`.
            targets: (B, T) the tokens that really came next, `<pad>` where none came, or None.

        Returns:
            Without targets, logits (B, T, V), float32, and None; they are ln(probability) already,
            so that softmax only takes the exponential. With targets, None and the loss: the mean of
            -ln(probability given to the target), in nats (the unit of the natural logarithm) per
            token. No logits then: they would be the largest tensor of a step.
        """
        if targets is not None:
            losses, _ = self.score(idx, targets, with_best=False)
            return None, losses.mean()
        # (B, T, C) @ (C, groups + V) -> (B, T, groups + V), in parts; float32, since bfloat16 is
        # too coarse for the loss
        first, *inside = self.lm_head(self.hidden(idx)).float().split(self.parts, dim=-1)
        first = F.log_softmax(first, dim=-1)
        of_group, common = first.tensor_split([len(inside)], dim=-1)
        # ln P(its group) + ln P(word, given its group): (B, T, 1) + (B, T, size of the group)
        rare = [of_group[..., [i]] + F.log_softmax(part, dim=-1) for i, part in enumerate(inside)]
        return torch.cat([common, *rare], dim=-1), None  # (B, T, V)


# ---------------------------------------------------------------------------------------------
# 4. Batches and loss
# ---------------------------------------------------------------------------------------------


def window_of(tokens, starts, block_size):
    """Return the block_size + 1 ids from each of the starts (B,) on: (B, T + 1), int64.

    Outside of `tokens`, there is `<eos>`: before the first review as before any other.
    """
    offsets = torch.arange(block_size + 1, device=tokens.device)
    places = starts[:, None] + offsets  # (B, 1) + (T + 1) -> (B, T + 1)
    outside = (places < 0) | (places >= len(tokens))
    return tokens[places.clamp(0, len(tokens) - 1)].long().masked_fill(outside, Tokenizer.eos)


def cut_windows(tokens, starts, block_size):
    """Cut windows at the given places; the targets are the same windows, one token later.

    A window ends where its review ends, and the rest is filled with `<pad>`. No mask has to keep
    attention from it: padding stands on the right, and every position looks to the left only. What
    is computed at the padding itself is ignored, for there is no target.

    With <pad> = 0 and <eos> = 2, tokens [5, 6, 7, 2, 8, 9, 2], one window of 4, start 1:
    x = [[6, 7, 2, 0]], y = [[7, 2, 0, 0]]. After 6 comes 7, after 6 7 comes the end, and no more.

    Args:
        tokens: (N,) ids, the last of which is `<eos>`. starts: (B,) places in it, int64.

    Returns:
        x and y, both (B, T) with T = block_size, int64, on the device of `tokens`.
    """
    windows = window_of(tokens, starts, block_size)
    is_end = windows == Tokenizer.eos
    windows[is_end.cumsum(1) - is_end.long() > 0] = Tokenizer.pad  # an <eos> came before
    return windows[:, :-1], windows[:, 1:]


def get_batch(tokens, batch_size, block_size):
    """Cut windows at random places, each of a single review; see `cut_windows`.

    A window that would run over the end of its review is moved back, so that it ends there. Only
    reviews that are shorter than a window are left with padding.

    Args:
        tokens: (N,) ids, `<eos>` behind each review.

    Returns:
        x and y, both (B, T) with B = batch_size and T = block_size, on the device of `tokens`.
    """
    # Drawn on the CPU, so that every device gets the same batches.
    starts = torch.randint(len(tokens), (batch_size,), device="cpu").to(tokens.device)
    # Back by as many places as lie behind the first <eos>; then the <eos> is the last of T + 1.
    is_end = window_of(tokens, starts, block_size) == Tokenizer.eos
    starts -= ((is_end.cumsum(1) > 0).sum(1) - 1).clamp(min=0)
    # Forward again over what is of the review before: all up to the last <eos> but that one.
    is_end = window_of(tokens, starts, block_size)[:, :-1] == Tokenizer.eos
    starts += (is_end.flip(1).cumsum(1) > 0).sum(1)
    return cut_windows(tokens, starts, block_size)


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
    """Return how well the model predicts `tokens`, without any randomness.

    Reviews are cut into windows side by side, so that every token but a first is a target once.
    The last window holds what is left, and is filled up with padding, which counts for nothing.

    Args:
        tokens: (N,) ids, `<eos>` behind each review.
        batch_size: windows at a time; changes the speed, not the result.
        eval_iters: at most this many batches, evenly spread over the text; None: the whole text.

    Returns:
        {"loss": mean nats per token, "accuracy": share of targets that were thought the likeliest
        token, 0 to 1, "known_loss": mean nats per target that is not `<unk>`}. The last is there
        because to guess "some rare word" is easier than to guess which: `<unk>` flatters the loss.
    """
    T = model.block_size
    ends = (tokens == Tokenizer.eos).nonzero().flatten().tolist()
    begins = [0, *(end + 1 for end in ends[:-1])]
    starts = torch.cat([torch.arange(*part, T) for part in zip(begins, ends, strict=True)])
    if eval_iters is not None and len(starts) > eval_iters * batch_size:
        starts = starts[torch.linspace(0, len(starts) - 1, eval_iters * batch_size).long()]
    total = unknown_total = n_targets = n_unknown = n_correct = 0
    with evaluation(model):
        for some in starts.split(batch_size):
            x, y = cut_windows(tokens, some.to(tokens.device), T)
            losses, correct = model.score(x, y)  # of the real targets: padding counts for nothing
            unknown = y[y != Tokenizer.pad] == Tokenizer.unk
            total += losses.sum().item()
            unknown_total += losses[unknown].sum().item()
            n_targets += len(losses)
            n_unknown += unknown.sum().item()
            n_correct += correct.sum().item()
    return {
        "loss": total / n_targets,
        "accuracy": n_correct / n_targets,
        "known_loss": (total - unknown_total) / max(1, n_targets - n_unknown),
    }


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
        max_new_tokens: how many to add at most; a review that ends before is not continued.
        temperature, top_k, top_p: see `next_token_probabilities`.

    Yields:
        the new token ids, ints, one at a time, without the `<eos>`.

    Raises:
        UserError: `ids` is empty, or an option is out of its range.
    """
    if not ids:
        raise UserError("the prompt is empty: give some text to continue")
    device = model.lm_head.weight.device
    not_words = torch.tensor([Tokenizer.pad, Tokenizer.unk], device=device)  # never to be drawn
    ids = list(ids)
    for _ in range(max_new_tokens):
        idx = torch.tensor([ids[-model.block_size :]], device=device)  # (1, T)
        with evaluation(model):
            logits, _ = model(idx)
        # Only the last position is news: (1, T, V) -> (1, V)
        logits = logits[:, -1].index_fill(-1, not_words, -math.inf)
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, num_samples=1).item())
        if ids[-1] == Tokenizer.eos:
            return
        yield ids[-1]


def stream(model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p):
    """Print the prompt and its continuation as it is made. Returns both as one string."""
    ids = tokenizer.encode(prompt)
    pieces = [tokenizer.decode(ids)]  # what the model reads of the prompt
    print(pieces[0], end="", flush=True)
    for token in generate(model, ids, max_new_tokens, temperature, top_k, top_p):
        pieces.append(" " + tokenizer.decode([token]))
        print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


def beam_search(model, ids, max_new_tokens, beams):
    """Look for the likeliest continuation, following several texts at once.

    Drawing word by word takes a likely word at each step; the likeliest text as a whole may begin
    with a less likely word. So the best `beams` beginnings are all carried on. With one beam this
    is greedy; with more beams than there are texts it finds the best of all.

    The likeliest text is dull, though: it says what could be said of any film, and soon says it
    again. People do not write what is likeliest, or they would not write (Holtzman et al. 2019,
    arXiv 1904.09751, figure 2). For a translation, where one text is right, beam search is useful.

    Args:
        ids: the text so far, a list of at least one id. The model sees its last `block_size`.
        max_new_tokens: how many to add at most; `<eos>` ends a text before.
        beams: how many texts to follow, 1 or more.

    Returns:
        the new token ids, a list of ints, with `<eos>` where it ended, and the log-probability of
        all of them together.

    Raises:
        UserError: `ids` is empty, or `beams` is below 1.
    """
    if not ids:
        raise UserError("the prompt is empty: give some text to continue")
    if beams < 1:
        raise UserError(f"BEAMS = {beams}: must be 1 or more")
    device = model.lm_head.weight.device
    not_words = torch.tensor([Tokenizer.pad, Tokenizer.unk], device=device)
    kept = [(0.0, [])]  # (log-probability, new ids), the best first
    for _ in range(max_new_tokens):
        growing = [(score, new) for score, new in kept if new[-1:] != [Tokenizer.eos]]
        if kept[0] not in growing:
            break  # the best has ended, and the others can only lose
        idx = torch.tensor([(ids + new)[-model.block_size :] for _, new in growing], device=device)
        with evaluation(model):
            logits, _ = model(idx)  # (beams, T) -> (beams, T, V)
        logits = logits[:, -1].index_fill(-1, not_words, -math.inf)
        best = F.log_softmax(logits, dim=-1).topk(min(beams, logits.shape[-1] - 2))
        kept = [text for text in kept if text not in growing]
        for (score, new), values, tokens in zip(
            growing, *map(torch.Tensor.tolist, best), strict=True
        ):
            kept += [
                (score + value, [*new, token]) for value, token in zip(values, tokens, strict=True)
            ]
        kept = sorted(kept, key=lambda text: -text[0])[:beams]
    return kept[0][1], kept[0][0]


def attention_weights(model, ids):
    """Return what each position attends to: a list with a tensor (H, T, T) for each layer.

    Row t of a head says how its position t shares out its attention over positions 0 to t. `Head`
    gives its values in these shares; so when the values are the rows of the identity matrix, it
    gives the shares themselves. Nothing has to be changed in it.

    Args:
        ids: a list of 1 to `block_size` ids.
    """
    found = []

    def look(head, inputs, output):
        """Note the shares of a head that has just worked on these inputs."""
        queries, keys, _ = inputs  # both (1, H, T, hs)
        identity = torch.eye(queries.shape[-2], dtype=queries.dtype, device=queries.device)
        found.append(head.forward(queries, keys, identity)[0].float().cpu())

    device = model.lm_head.weight.device
    hooks = [block.attention.head.register_forward_hook(look) for block in model.blocks]
    try:
        # bfloat16 would round the shares to three digits: they would not sum to 1.
        with evaluation(model), torch.autocast(device.type, enabled=False):
            model.hidden(torch.tensor([ids], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


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


def learning_rate_at(step, max_iters, peak, warmup_iters, schedule):
    """Return the learning rate of a step: up to the peak in a straight line, then down to zero.

    The way down lets the weights settle: at a constant rate they would keep jumping around the
    minimum. Step 0 already moves: a rate of zero would waste it.

    Args:
        schedule: "one-cycle", the above (Smith 2018, arXiv 1803.09820, with a shorter way up), or
            "constant", which stays at the peak: one can stop at any time, or go on, but never
            settles.

    Raises:
        UserError: there is no such schedule.
    """
    if schedule not in ("one-cycle", "constant"):
        raise UserError(f'SCHEDULE = {schedule!r}: must be "one-cycle" or "constant"')
    warmup_iters = max(1, min(warmup_iters, max_iters // 10))  # a short run has no time for more
    warmup = min(1.0, (step + 1) / warmup_iters)
    return peak * warmup * (1 - step / max_iters if schedule == "one-cycle" else 1)


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
    schedule,
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
        on_evaluation: a `Keeper`, called as on_evaluation(step, losses), losses = {"train", "val"},
            each what `estimate_loss` returns.
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
                check_finite(losses["train"]["loss"] + losses["val"]["loss"], step, learning_rate)
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
                    group["lr"] = learning_rate_at(
                        step, max_iters, learning_rate, warmup_iters, schedule
                    )
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
        self.history = []  # an entry per evaluation: {"step", "train", "val"}, see `train`
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
        train, val = losses["train"], losses["val"]
        print(
            f"step {step:>5}  train {train['loss']:.4f}, {train['accuracy']:.2%} right  val "
            f"{val['loss']:.4f}, {val['accuracy']:.2%} right, perplexity "
            f"{math.exp(val['loss']):.0f}, without <unk> {val['known_loss']:.4f}  ({note})"
        )
        print(f"            {self.sample()!r}", flush=True)

    def keep(self):
        """Write the best weights, all that --resume needs, and the curves."""
        best = min(entry["val"]["loss"] for entry in self.history if entry["step"])
        if self.history[-1]["val"]["loss"] <= best or not Path(f"{NAME}.pt").exists():
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
    """Draw loss and accuracy of a list of {"step": int, "train", "val"}, see `train`."""
    from matplotlib.figure import Figure  # here, since sampling need not wait for it

    figure = Figure(figsize=(10, 4), layout="constrained")
    steps = [entry["step"] for entry in history]
    panels = (("loss", "loss (nats per token)"), ("accuracy", "accuracy (share of tokens)"))
    for axes, (what, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(steps, [entry["train"][what] for entry in history], label="training")
        axes.plot(steps, [entry["val"][what] for entry in history], label="validation")
        axes.set(xlabel="step", ylabel=label, title=NAME)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_attention(path, words, layers):
    """Draw which words each word looked at: a picture for each layer (down) and head (across).

    Args:
        words: T strings. layers: a list of (H, T, T), what `attention_weights` returns.
    """
    from matplotlib.figure import Figure

    rows, columns = len(layers), len(layers[0])
    side = 1.5 + 0.16 * len(words)  # inches: room for a word at each row
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    figure.suptitle("each row: the words that the model looked at when it had read this one")
    for row, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for column, axes in enumerate(line):
            axes.imshow(layers[row][column].tolist(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {row + 1}, head {column + 1}")
            axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
            axes.set_yticks(range(len(words)), words, fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


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
    parser.add_argument(
        "--data", metavar="PATH", default=DATA, help="archive of reviews, or UTF-8 text"
    )
    parser.add_argument("--device", metavar="NAME", default=DEVICE, help="cpu, cuda, mps")
    parser.add_argument(
        "--beams", metavar="N", type=int, default=BEAMS, help="also search, following N texts"
    )
    flags = parser.parse_args(argv)
    if flags.beams < 0:
        parser.error(f"--beams {flags.beams}: must be 0 or more")
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


def print_vocabulary(tokenizer, corpus):
    """Say how many words the model knows, and what share of each part it does not know."""
    unknown = {
        part: (corpus[part]["tokens"] == Tokenizer.unk).float().mean().item()
        for part in ("train", "val")
    }
    print(
        f"words      {tokenizer.vocab_size:,} in the vocabulary; unknown: {unknown['train']:.2%} "
        f"of the training text, {unknown['val']:.2%} of the validation text"
    )


def print_metrics(part, metrics):
    """Say how good the model is on a part of the reviews; see `main`."""
    print(
        f"{part:<5} loss {metrics['loss']:.4f} nats per token ({metrics['known_loss']:.4f} without "
        f"<unk>), accuracy {metrics['accuracy']:.2%}, perplexity {metrics['perplexity']:.1f}, "
        f"{metrics['bits_per_character']:.4f} bits per character"
    )


def main(argv=None):
    """Train and sample as the flags say (a list of strings; None: those of the command line).

    Returns:
        {"val_loss": nats per token over the whole validation split, "bits_per_character",
        "parameters", "steps", "seconds" of training, "tokens_per_second", "text": the sample}.
        After --sample, "steps" is 0, and what only training knows is None. After training also
        "train" (a sample of it), "val" and "test" (all of them): what `estimate_loss` returns, with
        "perplexity" (among how many equally likely tokens the model might as well choose) and
        "bits_per_character". These compare models whose tokens differ in length, here with a grain
        of salt: the text is the clean one, and an unknown word costs what `<unk>` costs, however
        long it is.

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
        corpus = load_corpus(
            flags.data,
            DATA_URL if flags.data == DATA else None,
            DATA_SHA256,
            cleaning=CLEANING,
            min_freq=MIN_FREQ,
            train_share=TRAIN_SHARE,
            val_share=VAL_SHARE,
            seed=SEED,
        )
        tokenizer = Tokenizer(corpus["vocabulary"])
        print_vocabulary(tokenizer, corpus)
        prompt_ids = tokenizer.encode(flags.prompt)
        train_tokens, val_tokens, test_tokens = (
            corpus[part]["tokens"].to(device) for part in ("train", "val", "test")
        )

        torch.manual_seed(SEED)
        model = LM(
            tokenizer.vocab_size, BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT, CUTOFFS
        ).to(device)
        optimizers = make_optimizers(model, LEARNING_RATE, BETAS, WEIGHT_DECAY)
        why = "the fastest device found" if flags.device == DEVICE else "as --device says"
        print_setup(model, train_tokens, val_tokens, BATCH_SIZE, flags.max_iters, why)
        keeper = Keeper(
            model,
            optimizers,
            tokenizer,
            lambda: tokenizer.decode(generate(model, prompt_ids, 20, **sampling)),
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
            schedule=SCHEDULE,
            learning_rate=LEARNING_RATE,
            warmup_iters=WARMUP_ITERS,
            gradient_clip=GRADIENT_CLIP,
            eval_interval=EVAL_INTERVAL,
            eval_iters=EVAL_ITERS,
            seed=SEED,
        )

    model, tokenizer = load_checkpoint(f"{NAME}.pt", device)  # the best weights
    if not flags.sample:
        for part, tokens, eval_iters in (
            ("train", train_tokens, EVAL_ITERS),
            ("val", val_tokens, None),
            ("test", test_tokens, None),
        ):
            metrics = estimate_loss(model, tokens, BATCH_SIZE, eval_iters)
            bits_per_token = metrics["loss"] / math.log(2)
            metrics["perplexity"] = math.exp(metrics["loss"])
            metrics["bits_per_character"] = (
                bits_per_token * len(tokens) / corpus[part]["characters"]
            )
            print_metrics(part, metrics)
            results[part] = metrics
        results["val_loss"] = results["val"]["loss"]
        results["bits_per_character"] = results["val"]["bits_per_character"]
    results["parameters"] = count_parameters(model)
    torch.manual_seed(SEED)
    results["text"] = stream(model, tokenizer, flags.prompt, SAMPLE_TOKENS, **sampling)
    if flags.beams:
        ids = tokenizer.encode(flags.prompt)
        found, score = beam_search(model, ids, SAMPLE_TOKENS, flags.beams)
        print(f"likeliest of {flags.beams} beams (log-probability {score:.1f}):")
        print(tokenizer.decode(ids + found))
    words = results["text"].split()[: min(PICTURE_TOKENS, model.block_size)]
    weights = attention_weights(model, [tokenizer.id_of[word] for word in words])
    draw_attention(f"{NAME}_attention.png", words, weights)
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
# Try this: one edit at a time to the constants, then `python word_gpt.py --sample`. Measured with
# the model of the header.
#
# TEMPERATURE = 0     only the likeliest word, and soon a circle: "i think this movie was a great
#                     movie and i was very disappointed with the movie i was very disappointed with
#                     the original version of the original version of the original version ..."
# TEMPERATURE = 1.3   rare words, and no sentence holds: "i think this movie was potential for me
#                     tho in restricts on days the fly across unemployed cliched use of wheaton ..."
# BEAMS = 5           the text that five beams find is likelier, and duller, than one that is drawn:
#                     "i think this movie was so bad that it was so bad that it was so bad that it
#                     was so bad that it was so bad that it was so bad that it was so bad ..."
# ---------------------------------------------------------------------------------------------
