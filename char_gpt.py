"""A GPT in one file, character by character: it reads Shakespeare and learns to write more of it.

A GPT is a function. It takes a text and returns a probability for every token that could come next.
A token is the unit of text: here a character. The function contains many numbers, its parameters.
Training chooses them, step by step:
- The model reads a piece of real text, and predicts each next token from those before it.
- The loss is -ln p, where p is the probability that the model gave to the true next token: 0 for
  p = 1, and 0.69 for p = 1/2. Its unit is the nat. We report the mean over many tokens.
- The gradient says, for each parameter, how fast the loss grows if that parameter grows. Each
  parameter is changed in the opposite direction. The learning rate says how far.
To generate, we draw a token from the probabilities, append it to the text, and repeat.

    python char_gpt.py                                  train, then continue the PROMPT
    python char_gpt.py --sample --prompt "JULIET:"      no training: continue with what was learned
    python char_gpt.py --resume --max-iters 3000        train further
    python char_gpt.py --data mytext.txt --prompt "It"  train on another text; -h: all flags

Before training, all 65 characters are about equally likely. Such a guess costs -ln(1/65) = ln 65 =
4.17 nats. After training (2 min 25 s on 2 cores of an Intel Xeon with bfloat16, Linux, Python
3.11, torch 2.13.0, SEED 1337) the loss is 1.4805 on text that was not used in training, or 2.1360
bits (nats / ln 2). The model writes, for example:

    First Gentleman:
    That instrument silver his since and sent soon
    And to provoke him not. If thou didst pain,

PyTorch supplies tensors (arrays), gradients, AdamW, layers. Calling one runs its forward. Shapes:
    B   batch: pieces of text processed in parallel   H   heads per block
    T   time: tokens in one piece                     hs  head size, C / H
    C   channels: numbers that represent one token    V   vocabulary: number of different tokens

Paper: Vaswani et al. 2017, arXiv 1706.03762. Next: word_gpt.py (words) and gpt2.py (GPT-2 itself).
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
import signal
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

# --- 1. Hyperparameters: edit them, and run again. Each is explained where it is used. ------------
NAME = "char_gpt"  # names of files: NAME.pt, NAME.resume.pt, NAME.png and NAME.lock
ON_GPU = torch.cuda.is_available()  # where a line has an else, the first value is for a CUDA GPU
DEVICES = ["cuda"] * ON_GPU + ["mps"] * torch.backends.mps.is_available() + ["cpu"]  # fastest first
DEVICE = DEVICES[0]  # where the tensors are
SEED = 1337  # where all random numbers start: any number; another one gives another model
# Data
DATA = "input.txt"  # any UTF-8 text; this one is in the repository, or is downloaded
DATA_URL = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9  # the first 90% of the text is for training, the rest for measuring
# Model
BLOCK_SIZE = 256 if ON_GPU else 128  # T, tokens that the model sees; more: better, and slower
N_EMBED = 384 if ON_GPU else 128  # C; twice as many take up to 4 times as long
N_LAYERS = 6 if ON_GPU else 4  # blocks; more: better, and slower
N_HEADS = 6 if ON_GPU else 4  # H; must divide N_EMBED; a head size of 32 or 64 is usual
DROPOUT = 0.2 if ON_GPU else 0.0  # share of numbers set to 0 (see FeedForward), against overfitting
# Optimization
BATCH_SIZE = 64 if ON_GPU else 32  # B; more: a more exact gradient, and a slower step
MAX_ITERS = 2200 if ON_GPU else 1600  # training steps
LEARNING_RATE = 1e-3 if ON_GPU else 8e-3  # the peak; too high: the loss jumps; too low: it crawls
FINAL_LR = 0.0  # share of the peak that is left at the end; 1: it never falls
WARMUP_ITERS = 100  # steps until the peak
BETAS = (0.9, 0.99)  # AdamW averages about 1 / (1 - beta) steps: 10 gradients, 100 squares of them
WEIGHT_DECAY = 0.1 if ON_GPU else 0.5  # pulls matrices towards zero; more: less overfitting
GRADIENT_CLIP = 1.0  # a longer gradient is cut to this length; None: never
EVAL_INTERVAL = 200  # steps between two evaluations
EVAL_ITERS = 10  # batches per evaluation; more: more exact, and slower
PROMPT = "ROMEO:"  # the text to continue
SAMPLE_TOKENS = 500  # length of the continuation, in tokens
TEMPERATURE = 0.8  # 0: always the most likely token; 1: the model's own probabilities
TOP_K = None  # draw among this many most likely tokens only; None: among all
TOP_P = None  # draw among the most likely tokens that have this probability together; None: all


# --- 2. Data and tokenizer ------------------------------------------------------------------------
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
        unknown = sorted(set(text) - set(self.vocabulary))  # check: if there are any, stop
        check(not unknown, f"characters that the text never shows: {str(unknown)[1:-1]:.99}")
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
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))  # from 0 to N - T - 1
    # (B, 1) + (T + 1,) -> (B, T + 1): each start + 0, 1, ..., T. Indexing picks the tokens there.
    windows = tokens[starts + torch.arange(block_size + 1)].to(device)
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


class LM(nn.Module):
    """The language model: token ids (B, T) -> for each position, logits of the next token.

    vocab_size is V, block_size the longest T, n_embed C, n_heads H, n_layers the blocks."""

    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embed=n_embed,
                           n_heads=n_heads, n_layers=n_layers, dropout=dropout)  # fmt: skip
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # a table: one row per token
        self.position_embedding = nn.Embedding(block_size, n_embed)  # one row per position
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embed, n_heads, dropout) for _ in range(n_layers)))
        self.ln_f = nn.LayerNorm(n_embed)  # f: final, before the output layer
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)  # no bias, as in GPT-2
        # Small parameters make small logits, so nearly equal probabilities: the loss starts just
        # above ln V, as the small differences are random. PyTorch's larger default starts at 4.3.
        nn.init.normal_(self.lm_head.weight, std=0.02)  # 0.02 as in GPT-2

    def forward(self, idx, targets=None):
        """Return the logits (B, T, V) for idx (B, T), and the loss for targets (B, T), or None.

        The loss is the mean of -ln(softmax(logits)[target]) in nats; it skips targets of -100."""
        check(0 < idx.shape[1] <= self.block_size, f"T must be 1 to block_size = {self.block_size}")
        # autocast: products in bfloat16 (8 bits of precision, not 24), twice as fast in hardware.
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            # An average does not depend on the order of its terms: without positions, block 1 would
            # give c the same result in a b c and b a c. (B, T, C) + (T, C) -> (B, T, C)
            x = self.token_embedding(idx) + self.position_embedding.weight[: idx.shape[1]]
            x = self.ln_f(self.blocks(self.dropout(x)))
            logits = self.lm_head(x).float()  # (B, T, C) @ (C, V) -> (B, T, V)
        # cross_entropy contains the softmax. It takes (B·T, V) and (B·T,).
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# --- 4. Training ----------------------------------------------------------------------------------
@torch.no_grad()  # gradients would take time and memory
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    """Return {"loss": nats per token}, the mean over all tokens (N,) but the first.

    With `eval_iters`, at most that many batches are used, evenly spread: no randomness."""
    model.eval()  # switches dropout off: the whole model is measured
    T, device = model.block_size, next(model.parameters()).device
    padding = -(len(tokens) - 1) % T  # empty places of the last window: targets -100
    x = F.pad(tokens[:-1], (0, padding)).view(-1, T)
    y = F.pad(tokens[1:], (0, padding), value=-100).view(-1, T)
    if eval_iters is not None and len(x) > eval_iters * batch_size:
        chosen = torch.linspace(0, len(x) - 1, eval_iters * batch_size).long()
        x, y = x[chosen], y[chosen]
    total = 0.0
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        total += model(xs.to(device), ys.to(device))[1].item() * (ys != -100).sum().item()
    return {"loss": total / (y != -100).sum().item()}


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
        probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(probabilities, 1).item())  # draws one id
        yield ids[-1]


# Try this, one edit at a time, with --max-iters 400 (unchanged, on a CPU: loss 1.7330 in 44 s):
# - N_LAYERS = 1: 1.8895 in 15 s. A second block can use what the first one has found.
# - BLOCK_SIZE = 16: 1.9521 in 21 s. Fewer tokens before each guess, and 1/8 of the guesses.
# - Delete "+ mask" in Head: 0.0206, but it writes "ROMEO:OMM:ddMOddddd": it learned to copy.


# --- 6. Files. The lesson ends here: what follows are files, flags and errors. --------------------
def find_data(path):
    """Return the path of the text: `path`, or for None DATA (here, beside the script, fetched)."""
    if path is None:
        script = Path(globals().get("__file__", ""))  # a notebook has no __file__
        places = [folder / DATA for folder in (Path(), script.parent, script.resolve().parent)]
        path = next(filter(Path.is_file, places), DATA)
        if path == DATA and DATA_URL.endswith(f"/{DATA}"):
            try:
                content = requests.get(DATA_URL, timeout=30).content
                check(sha256(content).hexdigest() == DATA_SHA256, "it is not the expected file")
            except (requests.RequestException, ValueError) as error:
                raise UserError(f"put {DATA_URL} at {path} by hand: {error}") from error
            write_file(path, lambda file: file.write(content))
    check(os.path.isfile(path), f"there is no file {path}: name one with --data")
    return Path(path)


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
    sizes = "BLOCK_SIZE N_EMBED N_LAYERS N_HEADS BATCH_SIZE MAX_ITERS EVAL_INTERVAL EVAL_ITERS"
    for names, low, high in (
        (f"{sizes} TOP_K", 1, 10**9),
        ("WARMUP_ITERS SAMPLE_TOKENS SEED", 0, 10**9),
        ("TRAIN_SHARE DROPOUT FINAL_LR TOP_P", 0, 1.0),
        ("LEARNING_RATE WEIGHT_DECAY GRADIENT_CLIP TEMPERATURE", 0, 1e9),
        ("NAME DATA DATA_URL DATA_SHA256 PROMPT", "", "\U0010ffff"),
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
    add("--data", metavar="PATH", help=f"UTF-8 text to train on (default: {DATA})")
    add("--device", metavar="NAME", default=DEVICE, help="cuda, mps or cpu (default: %(default)s)")
    add("--seed", metavar="N", type=int, help=f"default: {SEED}; with --sample, another each time")
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
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # -sig: Windows' first mark
        check(text and not {*"\0\ufffd"} & {*text}, f"{path} is empty, or not UTF-8: save it so")
    torch.manual_seed(flags.seed)
    if flags.sample or flags.resume:
        model, tokenizer = load_checkpoint(NAME + ".resume" * flags.resume + ".pt", device)
    else:
        tokenizer = Tokenizer(text)
        model = LM(tokenizer.vocab_size, BLOCK_SIZE, N_EMBED, N_HEADS, N_LAYERS, DROPOUT).to(device)
    if flags.prompt == PROMPT and set(PROMPT) - set(tokenizer.vocabulary):
        flags.prompt = (tokenizer.vocabulary[-1] if flags.sample else text.strip()).split("\n")[0]
        print(f"the text lacks parts of PROMPT; without --prompt it is {flags.prompt!r}")
    results, n = {}, sum(p.numel() for p in model.parameters())
    print(f"{device}, bfloat16: {has_bfloat16(device)}, seed {flags.seed}; {n:,} parameters")
    if not flags.sample:
        splits = split_text(text, tokenizer, TRAIN_SHARE, model.block_size)
        print(f"{path}: {len(text):,} characters, ln V = {math.log(tokenizer.vocab_size):.4f}")
        with lock_folder():
            results |= train(model, tokenizer, splits, flags, sha256(text.encode()).hexdigest())
        loss = estimate_loss(model, splits["val"], BATCH_SIZE)["loss"]
        results |= {"val_loss": loss, "bits_per_character": loss / math.log(2)}
        print("best: {val_loss:.4f} nats, {bits_per_character:.4f} bits a token".format(**results))
    torch.manual_seed(flags.seed)
    ids = tokenizer.encode(flags.prompt)
    print(flags.prompt, end="", flush=True)
    for token in generate(model, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, TOP_P):
        ids.append(token)
        print(tokenizer.decode([token]), end="", flush=True)
    print(flush=True)
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
