"""The pieces of the lessons: what a student can write, and what the exercise says about it.

Needs no torch: exercise.py and grade.py read it."""

import ast
import difflib
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("char_gpt", "word_gpt", "gpt2")


@dataclass
class Piece:
    """A function or class that a student can write.

    `parts` are the functions that are left to write; by default the piece itself, or all methods
    of the class. `task` is one line for --list. `expects` ends the message about an exception.
    `hints` say what the docstring does not; they become comments in the exercise."""

    name: str
    task: str
    expects: str
    hints: str = ""
    parts: tuple = ()
    lesson: str = ""  # another script, whose mistakes are known here, too
    changed: bool = False  # whether it differs from the piece of that script

    @property
    def owner(self):
        """The name of the function or class in the script: LM for LM.forward."""
        return self.name.partition(".")[0]


@functools.cache
def read_original(script):
    """Return the text of a script."""
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


@functools.cache
def parse_original(script):
    """Return the tree of a script. Do not change it."""
    return ast.parse(read_original(script))


def original_functions(script):
    """Return the functions of a script, see `functions`."""
    return functions(parse_original(script))


def functions(tree):
    """Return {"get_batch": node, "Head.forward": node, ...} of a file, also inside if and try."""
    found = {}
    for node in all_statements(tree.body):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def all_statements(body):
    """Yield the statements of a file, and those inside its if, try, with and for."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from all_statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from all_statements(handler.body)


def body_of(function):
    """Return the statements of a function, without its docstring."""
    has_docstring = ast.get_docstring(function) is not None
    return function.body[1:] if has_docstring else function.body


def is_stub(function):
    """Return whether a function is still as exercise.py wrote it."""
    body = body_of(function)
    return bool(body) and ast.unparse(body[0]).startswith("raise NotImplementedError")


def parts_of(script, piece):
    """Return the names of the functions that a piece leaves to write, in the order of the file."""
    if piece.parts:
        return list(piece.parts)
    names = original_functions(script)
    return [name for name in names if name == piece.name or name.startswith(f"{piece.name}.")]


def find_piece(script, name):
    """Return the piece of this name. KeyError: there is none."""
    return {piece.name: piece for piece in PIECES[script]}[name]


def nearest(name, known):
    """Return the end of a sentence about a name that does not exist."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    return f". Did you mean {lower[close[0]]}?" if close else f". There are {', '.join(known)}"


# The first line of an exercise says what is left to write.
HEADER = re.compile(r"^# Exercise of (\w+)\.py\. Yours to write: (.*?)\.\r?\n", re.MULTILINE)


def read_header(source):
    """Return (the script, the names of the pieces) of an exercise, or (None, [])."""
    match = HEADER.search(source)
    return (match[1], match[2].split(", ")) if match else (None, [])


def write_header(source, script, names):
    """Return the source of an exercise with another first line."""
    line = f"# Exercise of {script}.py. Yours to write: {', '.join(names)}.\n"
    if HEADER.search(source):
        return HEADER.sub(lambda match: line, source, count=1)
    return line + source


# --- char_gpt.py ----------------------------------------------------------------------------------
CHAR = [
    Piece(
        "Tokenizer",
        "vocabulary, vocab_size; encode a text, decode ids",
        "Tokenizer(text) has vocabulary, vocab_size, encode(text) and decode(ids): encode returns "
        "a list of ints, decode a string",
        """
        self.vocabulary: the different characters of the text, sorted, in a string.
        self.vocab_size: how many they are. The first id is 0.
        Upper and lower case are different characters.
        """,
    ),
    Piece(
        "split_text",
        "the ids of a text, cut in two",
        'split_text(text, tokenizer, train_share, block_size) returns {"train": ids, "val": ids}, '
        "two int64 tensors",
        "All ids in their order, cut once: the first int(train_share · N) are for training.",
    ),
    Piece(
        "get_batch",
        "random windows, and the token after each",
        "get_batch(tokens, batch_size, block_size, device) returns two tensors x, y of ids (B, T)",
        """
        Each window starts at a random place of its own. All places are equally likely, from the
        first token to the last place that leaves room for T tokens and the target behind them.
        Both tensors must be on the device.
        """,
    ),
    Piece(
        "Head",
        "attention: softmax(q kᵀ / √hs) v, with a causal mask",
        "Head()(q, k, v) returns a tensor of the shape of v, (B, H, T, hs)",
        "Head() has no arguments and no parameters. F.scaled_dot_product_attention is allowed.",
    ),
    Piece(
        "MultiHead",
        "q, k, v of all heads; attention; projection; dropout",
        "MultiHead(n_embed, n_heads, dropout)(x) returns a tensor of the shape of x, (B, T, C)",
        """
        Layers for q, k and v (C -> C each; one for all three, or several, as you like), the class
        Head, and a projection (C -> C), then dropout. Names are free. Each head has C / H
        channels. A later position must not change an earlier one. nn.MultiheadAttention is
        allowed.
        """,
    ),
    Piece(
        "FeedForward",
        "two layers with relu between them, and dropout",
        "FeedForward(n_embed, dropout)(x) returns a tensor of the shape of x, (B, T, C)",
        "The layers are C -> 4 C and 4 C -> C, with relu between them. Dropout comes last.",
    ),
    Piece(
        "Block",
        "attention and feed-forward, each with LayerNorm and residual",
        "Block(n_embed, n_heads, dropout)(x) returns a tensor of the shape of x, (B, T, C)",
        """
        Use MultiHead, FeedForward and two nn.LayerNorm. With f for one of the two, a step is
        x + f(LayerNorm(x)).
        """,
    ),
    Piece(
        "LM",
        "the whole model: layers, logits and loss",
        "LM(vocab_size, block_size, n_embed, n_heads, n_layers, dropout) has config and block_size;"
        " model(idx, targets) returns (logits (B, T, V), loss)",
        """
        self.config: a dict of the six arguments by their names. self.block_size: T, at most.
        Layers: an embedding of the tokens (V, C), one of the positions (block_size, C), dropout,
        n_layers different Blocks, a LayerNorm, and a Linear C -> V without bias, with a matrix of
        its own. This last matrix starts with a standard deviation of 0.02.
        forward: token vectors + position vectors, dropout, blocks, LayerNorm, Linear. Logits are
        (B, T, V) with and without targets.
        """,
    ),
    Piece(
        "LM.forward",
        "ids -> logits, and the loss if there are targets",
        "model(idx, targets) returns (logits (B, T, V), loss); without targets the loss is None",
        """
        Token vectors + position vectors, dropout, blocks, ln_f, lm_head. Logits are (B, T, V) with
        and without targets. F.cross_entropy skips targets of -100. autocast is not needed.
        """,
    ),
    Piece(
        "estimate_loss",
        "the mean loss of all tokens, or of some batches",
        'estimate_loss(model, tokens, batch_size, eval_iters) returns {"loss": a number}',
        """
        Each call model(x, y) returns (logits, the mean loss of the targets that are not -100).
        Call it with at most batch_size windows of T = model.block_size tokens. Windows begin at 0,
        T, 2 T, ... The last one may be shorter; all N - 1 targets count equally, once each.
        eval_iters: at most eval_iters · batch_size windows, from the beginning to the end.
        Evaluation mode, and no gradients.
        """,
    ),
    Piece(
        "make_optimizers",
        "Muon for the matrices of the blocks, AdamW for the rest",
        "make_optimizers(model) returns a list of optimizers",
        """
        If MUON: [AdamW, Muon(matrices, WEIGHT_DECAY)]. Muon gets the parameters of model.blocks
        that are matrices (dim() == 2), AdamW all others. Else: [AdamW] with all parameters.
        torch.optim.AdamW gets betas=BETAS and two groups: matrices, with the weight decay
        WEIGHT_DECAY, and other parameters (biases, LayerNorm), with 0. train_step sets the rates.
        """,
    ),
    Piece(
        "get_lr",
        "a line up, then a line down",
        "get_lr(step, max_iters, peak) returns a number",
        """
        warmup = WARMUP_ITERS, but at most max_iters // 10, and at least 1.
        Up: in step s < warmup, the rate is peak · (s + 1) / warmup: step warmup - 1 has the peak.
        Down: a straight line from the peak at step warmup - 1 to FINAL_LR · peak at step max_iters
        (which is not trained any more).
        """,
    ),
    Piece(
        "train_step",
        "loss, gradient, clipping, rate, step, zero",
        "train_step(model, optimizers, x, y, lr) returns the loss before the step",
        """
        model(x, y) returns (logits, loss). Training mode. GRADIENT_CLIP: the largest length (norm)
        of the gradient of all parameters together; None: no limit. Every optimizer gets the rate
        lr in each of its param_groups, makes a step, and forgets its gradients.
        """,
    ),
    Piece(
        "train",
        "steps, evaluations, and saves",
        "train(model, tokenizer, optimizers, splits, run) returns nothing; it fills run",
        """
        For step = run["step"], ... up to run["max_iters"]:
        1. If the step is a multiple of EVAL_INTERVAL or is run["max_iters"], and is not yet in the
           dict run["history"]: run["history"][step] = evaluate(model, tokenizer, splits,
           run["prompt"], step). Then, if step > run["step"] (nothing is new at the beginning):
           save_step(run, step, model, optimizers, seconds). It changes run["step"]. `seconds` is
           run["seconds"] at the beginning + the time since then.
        2. At step run["max_iters"], end here.
        3. torch.manual_seed(run["seed"] * 1_000_000 + step): so a resumed run draws the same.
        4. x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, device of the model)
           loss = train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))
           The peak is LEARNING_RATE if MUON, else ADAMW_LEARNING_RATE.
           show_progress(run, step, loss, seconds)
        KeyboardInterrupt (Ctrl-C): raise it if run["path"] is None (nothing is saved), else end.
        """,
    ),
    Piece(
        "next_token_probabilities",
        "temperature, softmax, top_k, top_p",
        "next_token_probabilities(logits, temperature, top_k, top_p) returns probabilities (V,)",
        """
        The result has a place for each of the V tokens, in the order of the logits, and sum 1. Do
        not change the logits. top_k may be larger than V. top_p: of the most likely tokens, keep
        one if those before it have less than top_p together: so at least one is kept.
        """,
    ),
    Piece(
        "generate",
        "crop, predict, draw, append, yield",
        "generate(model, ids, max_new_tokens, temperature, top_k, top_p) yields ints",
        """
        model(idx) returns (logits (1, T, V), None). Use next_token_probabilities, and draw at
        random with these probabilities. The caller's list must not change. Evaluation mode, and
        no gradients.
        """,
    ),
    Piece(
        "Muon",
        "average, look ahead, orthogonalize, decay, step",
        "optimizer.step() changes every matrix that has a gradient, and returns nothing",
        """
        For every matrix p of every group in self.param_groups, unless p.grad is None, in this
        order. self.state[p] is a dict, empty at first: it keeps the average of this matrix.
        1. average = 0.95 · average + 0.05 · p.grad; the average starts at 0.
        2. look ahead: update = orthogonalize(0.95 · average + 0.05 · p.grad), the new average.
        3. p = p · (1 - group["lr"] · group["weight_decay"])
        4. p = p - group["lr"] · 0.2 · √(the larger number of rows or columns) · update
        Change p in place (p.mul_, p.sub_), without gradients. p.grad stays as it is.
        """,
        parts=("Muon.step",),
    ),
    Piece(
        "orthogonalize",
        "divide by the norm, then five rounds",
        "orthogonalize(matrix) returns a new matrix of the same shape",
        """
        x = matrix / its norm; five times x = 3.4445 x - 4.775 x xᵀ x + 2.0315 x xᵀ x xᵀ x. If the
        matrix has more rows than columns, work on its transpose. The argument must not change.
        """,
    ),
]


def shared(name, **changes):
    """Return a piece of char_gpt.py for another script.

    `changes` are what the other script says differently."""
    (piece,) = (piece for piece in CHAR if piece.name == name)
    return replace(piece, lesson="char_gpt", changed=bool(changes), **changes)


PIECES = {"char_gpt": CHAR}
