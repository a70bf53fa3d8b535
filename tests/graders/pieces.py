"""The pieces of the lessons: what a student can write, and what the exercise says about it.

Needs no torch: exercise.py and grade.py read it."""

import ast
import difflib
import functools
import re
import textwrap
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
    if not match:
        return None, []
    return match[1], match[2].split(", ")


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


def more_hints(name, text):
    """Return the hints of a piece of char_gpt.py, and more."""
    (piece,) = (piece for piece in CHAR if piece.name == name)
    parts = [textwrap.dedent(part).strip() for part in (piece.hints, text)]
    return "\n".join(parts)


PIECES = {"char_gpt": CHAR}

# --- word_gpt.py ----------------------------------------------------------------------------------
WORD = [
    Piece(
        "clean",
        "a text -> its words, in lower case",
        "clean(text, cleaning) returns a string: words with one space between them",
        """
        For cleaning == "reference": return clean_as_published(text), which is there. Else:
        1. Lower case. Replace <...> (markup), http... and www... up to the next space, and
           words with @ and a dot behind it (addresses) by a space.
        2. unicodedata.normalize("NFC", text), then replacement(c), which is there, for each
           character c.
        3. Leave out words that are only digits (word.isnumeric()).
        """,
    ),
    Piece(
        "build_vocabulary",
        "count words, drop rare ones, sort",
        "build_vocabulary(documents, min_freq) returns a list of strings",
        """
        First "<pad>", "<unk>", "<eos>", then the words that come at least min_freq times in all
        documents together; the most frequent first, and equally frequent ones by the alphabet.
        """,
    ),
    Piece(
        "Tokenizer",
        "text -> ids of words, and back",
        "Tokenizer(vocabulary, cleaning) has vocabulary, cleaning, vocab_size, encode(text), "
        "encode_clean(text) and decode(ids): encode returns a list of ints, decode a string",
        """
        pad, unk, eos = 0, 1, 2 stay attributes of the class. encode cleans the text with
        clean(text, self.cleaning); encode_clean does not. A word that is not in the vocabulary
        gets the id unk.
        """,
    ),
    Piece(
        "split_documents",
        "shuffle the documents, cut them in three",
        'split_documents(documents, train_share, val_share) returns {"train": list, "val": list, '
        '"test": list}',
        """
        Shuffle with a seed of its own, so that the order is random and always the same. Sizes:
        round(train_share · n) for training, all others up to round((train_share + val_share) · n)
        for validation, the rest is the test. No document is torn, lost or used twice.
        """,
    ),
    Piece(
        "split_text",
        "documents -> ids, with <eos> at the end of each",
        "split_text(documents, tokenizer) returns a dict of int32 tensors (N,)",
        "The documents of a part are clean: use tokenizer.encode_clean.",
    ),
    Piece(
        "cut_windows",
        "starts and ends -> inputs and targets",
        "cut_windows(tokens, starts, ends, block_size) returns two int64 tensors x, y (B, T)",
        """
        x has the tokens at start, start + 1, ... (T of them), y those one place further. From
        `end` on, x has <pad>, and y has -100. Where x is <eos>, y is -100, too. A window may
        reach beyond the end of the tokens. `ends` is (B, 1), or one number for all.
        """,
    ),
    Piece(
        "get_batch",
        "draw starts, cut windows",
        "get_batch(tokens, batch_size, block_size, device) returns two tensors x, y of ids (B, T)",
        """
        Draw a start for each window, from 0 to N - 2 (any token that has a next one), and call
        cut_windows: a window ends at N, the end of all tokens. Both tensors must be on the device.
        """,
    ),
    shared("Head"),
    shared("MultiHead"),
    shared("FeedForward"),
    shared("Block"),
    Piece(
        "AdaptiveSoftmax",
        "the whole layer: rows, ln P, losses, hits",
        "AdaptiveSoftmax(vocab_size, n_embed, cutoffs) has weight, bias, embed, forward, losses",
        """
        self.weight (rows, C) and self.bias (rows,) are nn.Parameters, with the rows in the order
        of the docstring: groups first. The bias of a group starts at ln(its number of words),
        all others at 0. Cutoffs that are not below vocab_size are left out.
        Other methods than embed, forward, losses and hits may have other names.
        """,
        parts=tuple(
            f"AdaptiveSoftmax.{name}"
            for name in [
                "__init__",
                "place",
                "embed",
                "logits",
                "first_choice",
                "forward",
                "losses",
                "hits",
            ]
        ),
    ),
    Piece(
        "AdaptiveSoftmax.forward",
        "ln P of all words",
        "forward(x) returns ln P of all words, (..., V)",
        """
        ln P(word) = ln P(group) + ln P(word in its group); of a frequent word it is that of the
        first softmax. Words are in the order of their ids.
        """,
    ),
    Piece(
        "AdaptiveSoftmax.losses",
        "-ln P of targets",
        "losses(x, targets) returns -ln P of n targets, (n,)",
        "Right for frequent words and for words of every group.",
    ),
    Piece(
        "AdaptiveSoftmax.hits",
        "which targets are the most likely word",
        "hits(x, targets, losses) returns n bools, (n,)",
        "Of all V words, also those of the groups.",
    ),
    Piece(
        "LM",
        "the whole model: layers, hidden, logits or loss",
        "LM(vocab_size, block_size, n_embed, n_heads, n_layers, dropout, cutoffs) has config and "
        "block_size; model(idx) returns (logits, None), model(idx, targets) (None, loss)",
        """
        self.config: a dict of the seven arguments by their names. self.block_size: T, at most.
        Layers: an embedding of the positions, dropout, n_layers different Blocks, a LayerNorm,
        and self.lm_head, an AdaptiveSoftmax, which embeds the tokens as well (lm_head.embed).
        Its weight and the positions start with a standard deviation of 0.02.
        hidden(idx): token vectors + position vectors, dropout, blocks, LayerNorm. forward:
        self.lm_head of it, or the mean of self.lm_head.losses of the targets that are not -100.
        """,
    ),
    Piece(
        "LM.forward",
        "ids -> logits, or the loss",
        "model(idx) returns (logits, None), and model(idx, targets) returns (None, loss)",
        """
        hidden(idx): token vectors (lm_head.embed) + position vectors, dropout, blocks, ln_f.
        forward: self.lm_head of it, or the mean of self.lm_head.losses of the targets that are
        not -100.
        """,
        parts=("LM.hidden", "LM.forward"),
    ),
    Piece(
        "estimate_loss",
        "loss, known and accuracy of all tokens, or of some batches",
        'estimate_loss(model, tokens, batch_size, eval_iters) returns {"loss": number, "known": '
        'number, "accuracy": number}',
        """
        A document ends with <eos>. Each is cut into windows of at most T = model.block_size
        tokens, side by side: cut_windows(tokens, starts, ends, T), with the ends of the documents.
        For at most batch_size windows at a time: hidden = model.hidden(x)[y != -100];
        losses = model.lm_head.losses(hidden, targets);
        hits = model.lm_head.hits(hidden, targets, losses). All targets count equally.
        known: the mean loss of the targets that are not <unk>. accuracy: the share of hits.
        eval_iters: at most eval_iters · batch_size windows, from the beginning to the end.
        Evaluation mode, and no gradients.
        """,
    ),
    shared("make_optimizers"),
    shared("get_lr"),
    shared("train_step"),
    shared("train"),
    shared("next_token_probabilities"),
    Piece(
        "generate",
        "draw token after token, until <eos>",
        "generate(model, ids, max_new_tokens, temperature, top_k, top_p) yields ints",
        """
        As in char_gpt.py, and: <pad> and <unk> (Tokenizer.pad, Tokenizer.unk) are never drawn:
        their logits become -inf. If <eos> is drawn, the text ends: it is not yielded.
        """,
        lesson="char_gpt",
        changed=True,
    ),
    Piece(
        "beam_search",
        "keep the likeliest texts",
        "beam_search(model, ids, max_new_tokens, beams) returns (list of new ids, ln P of them)",
        """
        In each of max_new_tokens rounds, continue each kept text by its likeliest next tokens,
        and keep the `beams` likeliest of all results. <pad> and <unk> are never chosen: their
        logits are -inf, before the softmax. A text that ended with <eos> is kept as it is, and is
        a result, too; <eos> belongs to the new ids. If the likeliest text has ended, stop.
        The model sees the last block_size tokens. Evaluation mode, and no gradients.
        """,
    ),
    Piece(
        "attention_weights",
        "look at Head with another v",
        "attention_weights(model, ids) returns a list of tensors (H, T, T), one for each block",
        """
        Each block has its Head in block.attention.head. Afterwards the model is as before: no hooks
        are left. Evaluation mode, and no gradients.
        """,
    ),
    shared("Muon"),
    shared("orthogonalize"),
]
PIECES["word_gpt"] = WORD

# --- gpt2.py --------------------------------------------------------------------------------------
GPT2 = [
    Piece(
        "Tokenizer",
        "ids of any text, the text of ids",
        "Tokenizer() has vocabulary, encoding, encode(text) -> list of ints, decode(ids) -> string",
        """
        self.encoding = tiktoken.get_encoding(vocabulary). encode: <|endoftext|> in a text becomes
        its one id (allowed_special="all"). vocab_size stays an attribute of the class.
        """,
    ),
    Piece(
        "split_text",
        "training part, and validation part after it",
        'split_text(tokens, train_share, max_val_tokens, block_size) returns {"train": ids, '
        '"val": ids}',
        "The first int(train_share · N) tokens are for training, at most the next max_val_tokens "
        "for validation.",
    ),
    shared(
        "get_batch",
        hints=more_hints("get_batch", "The tokens are int32: x and y must be int64."),
    ),
    Piece(
        "Head",
        "attention in one function; new tokens see all earlier ones",
        "Head()(q, k, v) returns a tensor of the shape of q, (B, H, T, hs)",
        """
        q is of the T newest tokens, k and v are of all S: new token t has S - T earlier ones in
        front of it, sees them, and itself. T can be 1, S, or between.
        """,
        lesson="char_gpt",
        changed=True,
    ),
    Piece(
        "Cache",
        "keep keys and values, return all",
        "cache.append(k, v) returns two tensors (B, H, S, hs), of all tokens so far",
        """
        Cache(block_size); self.length: how many tokens are in it, 0 at first. k and v have any
        number of new tokens, at most block_size in all.
        """,
    ),
    shared(
        "MultiHead",
        hints=more_hints(
            "MultiHead",
            """
            forward(x, cache=None): with a Cache, k and v of all tokens are cache.append(k, v). q, k
            and v have biases. For load_pretrained, the layers must be named qkv and projection.
            """,
        ),
    ),
    Piece(
        "FeedForward",
        "GPT-2's gelu between two layers",
        "FeedForward(n_embed, dropout)(x) returns a tensor of the shape of x, (B, T, C)",
        """
        The layers are C -> 4 C and 4 C -> C, with gelu as GPT-2 has it (approximate="tanh") between
        them. Dropout comes last. For load_pretrained, they must be named expand and shrink.
        """,
    ),
    shared(
        "Block",
        hints=more_hints(
            "Block",
            """
            forward(x, cache=None): the cache is for MultiHead. For load_pretrained, the parts must
            be named ln1, attention, ln2 and feed_forward.
            """,
        ),
    ),
    Piece(
        "LM",
        "the whole model, tied; GPT-2's start; caches",
        "LM(vocab_size, block_size, n_embed, n_heads, n_layers, dropout, qkv_bias) has config and "
        "block_size; model(idx, targets, caches) returns (logits, loss)",
        """
        self.config: a dict of the seven arguments by their names. Layers: token_embedding,
        position_embedding, dropout, blocks (nn.Sequential), ln_f, lm_head (no bias). lm_head.weight
        and token_embedding.weight are one parameter (tie_weights). Without qkv_bias, the biases of
        block.attention.qkv are None.
        Start: matrices with a standard deviation of 0.02, but the last ones of attention and
        feed-forward (projection, shrink) with 0.02 / √(2 · n_layers); biases 0.
        forward: positions count on after the tokens in the caches (caches[0].length). Block i gets
        caches[i], or None. With caches, only the last position gets logits, (B, 1, V).
        """,
    ),
    Piece(
        "LM.forward",
        "ids -> logits, and the loss; with caches, what comes after them",
        "model(idx, targets, caches) returns (logits, loss); without targets the loss is None",
        """
        Token vectors + position vectors, dropout, blocks, ln_f, lm_head. Positions count on after
        the tokens in the caches (caches[0].length). Block i gets caches[i], or None. With caches,
        only the last position gets logits, (B, 1, V). autocast is not needed.
        """,
        lesson="char_gpt",
        changed=True,
    ),
    Piece(
        "openai_name",
        "our name of a parameter -> OpenAI's",
        "openai_name(name) returns a string",
        """
        token_embedding: wte, position_embedding: wpe, blocks: h, ln1: ln_1, ln2: ln_2,
        attention.qkv: attn.c_attn, attention.projection: attn.c_proj,
        feed_forward.expand: mlp.c_fc, feed_forward.shrink: mlp.c_proj. ln_f stays.
        """,
    ),
    Piece(
        "load_pretrained",
        "read, rename, transpose, fill an LM",
        "load_pretrained(path, **sizes) returns an LM",
        """
        read_safetensors(path) yields pairs (OpenAI's name, tensor). A name may begin with
        "transformer."; ".attn.bias", ".attn.masked_bias" and "lm_head.weight" are no parameters of
        ours. openai_name(our name) is theirs; where is_turned(their name, tensor), the tensor is
        transposed. Every parameter of LM(**sizes) must be filled; lm_head stays tied.
        A name that LM has not, or one that is missing: check(...) raises UserError.
        """,
    ),
    shared("estimate_loss"),
    shared(
        "make_optimizers",
        task="AdamW; weight decay for matrices only",
        hints="""
        One torch.optim.AdamW with betas=BETAS and two groups: matrices (dim() == 2), with the
        weight decay WEIGHT_DECAY, and other parameters (biases, LayerNorm), with 0.
        """,
    ),
    shared("get_lr"),
    shared(
        "train_step",
        task="add the gradients of batches, then one step",
        hints=more_hints(
            "train_step",
            """
            Send BATCH_SIZE windows at a time through the model. The result is the mean loss of all
            windows, and the gradient is that of this mean. N_RANKS is 1 in the exercise.
            """,
        ),
    ),
    shared(
        "train",
        hints=more_hints(
            "train",
            """
            Other than in char_gpt.py: get_batch gets TOKENS_PER_STEP // WINDOW and WINDOW in place
            of BATCH_SIZE and model.block_size. The peak is LEARNING_RATE if run["init"] is
            "pretrained", else SCRATCH_LEARNING_RATE. COMPILE is False and N_RANKS is 1 in the
            exercise: what they need may be left out.
            """,
        ),
    ),
    shared("next_token_probabilities"),
    Piece(
        "generate",
        "predict with caches, draw, yield; drop the older half",
        "generate(model, ids, max_new_tokens, temperature, top_k, top_p) yields ints",
        """
        model(idx, caches=caches) returns (logits (1, 1, V), None), for the tokens that are not in
        the caches yet; caches: a Cache(model.block_size) for each of model.blocks. If there are
        more than block_size tokens, only the newest block_size // 2 (at least 1) stay, with new
        caches. Logits of ids from Tokenizer.vocab_size on become -inf. The id
        Tokenizer.vocab_size - 1, <|endoftext|>, is yielded, and is the last.
        Use next_token_probabilities, and draw at random. The caller's list must not change.
        Evaluation mode, and no gradients.
        """,
    ),
    Piece(
        "stream",
        "the text of tokens, each character whole",
        "stream(tokenizer, tokens) yields strings",
        """
        tokenizer.encoding.decode_single_token_bytes(token) returns the bytes of a token. Yield
        characters as soon as they are complete. What is left at the end, or is no UTF-8, becomes
        the replacement character (errors "replace").
        """,
    ),
]
PIECES["gpt2"] = GPT2
