"""The pieces of char_gpt.py: how each is graded, mistakes that must be named, other solutions."""
# ruff: noqa: E731
# Formulas, explanations, and planted code are easier to read as tables.
# fmt: off

import argparse
import ast
import itertools
import math
import signal

import torch
import torch.nn.functional as F
from lessons import Piece, Wrong, close, diagnose, numbers, randomize, require
from torch import nn

INF = math.inf


# --- Data -----------------------------------------------------------------------------------------
def grade_tokenizer(gpt):
    text, right = "to be, or not", sorted(set("to be, or not"))
    tokenizer = gpt.Tokenizer(text)
    got = list(tokenizer.vocabulary)
    require(len(got) == len(set(got)), f"duplicates: a character has two ids: {''.join(got)!r}")
    require(got == sorted(got), f"vocabulary not sorted: {''.join(got)!r}. The order of a set "
            "changes from run to run, so a saved model would get other ids")
    require(got == right, f"vocabulary: {''.join(got)!r} instead of {''.join(right)!r}")
    diagnose(tokenizer.vocab_size, len(right), what="vocab_size")
    diagnose(tokenizer.encode("bet"), [right.index(c) for c in "bet"], what="encode('bet')")
    decoded = tokenizer.decode(tokenizer.encode(text))
    require(decoded == text, f"decode: {decoded!r:.60} comes back from the ids of {text!r}")
    try:
        ids = tokenizer.encode("bét")
    except gpt.UserError as error:
        require("é" in str(error), f"message: it does not name the unknown character é: {error}")
    except (KeyError, ValueError, IndexError) as error:
        raise Wrong(f"unknown characters: {error!r}, not a UserError that names them") from error
    else:
        raise Wrong(f"unknown characters dropped: encode('bét') gives {ids}, without a UserError. "
                    "The model would answer another prompt than the one typed")


def grade_split_text(gpt):
    text = "".join(map(chr, range(40, 100)))  # 60 different characters: their ids are 0 to 59
    splits = gpt.split_text(text, gpt.Tokenizer(text), 0.75, 4)
    train, val = (torch.as_tensor(splits[name]) for name in ("train", "val"))
    require(train.dtype == val.dtype == torch.int64, f"dtype: {train.dtype} instead of int64")
    a, b = train.tolist(), val.tolist()
    both = len(set(a) & set(b))
    require(not both, f"validation overlaps training: {both} tokens are in both. Then the "
            "validation loss also falls when the model learns the text by heart")
    require(len(a + b) == 60, f"tokens left out: {len(a)} + {len(b)} of 60")
    require(min(a, b) == a and len(a) > 30, f"split the wrong way round: training has {len(a)} "
            f"tokens, from number {a[0]} on; it should have the first 45 of 60")
    diagnose(train, torch.arange(45), what="training part")
    diagnose(val, torch.arange(45, 60), what="validation part")


def grade_get_batch(gpt):
    T, call = 4, lambda n, size=64: gpt.get_batch(torch.arange(n), size, 4, "cpu")
    x, y = call(10_000)
    shapes = tuple(x.shape), tuple(y.shape)
    require(shapes == ((64, T), (64, T)), f"shape: x and y are {shapes}; each must be (64, {T})")
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}, {y.dtype} instead of int64")
    require((x.diff() == 1).all(), f"windows: {x[0].tolist()} is not a piece of the text")
    example = f"x = {x[0].tolist()}, y = {y[0].tolist()}"
    diagnose(y, x + 1, {
        "targets not shifted": (x, f"{example}. The model learns to repeat its input"),
        "targets shifted twice": (x + 2, f"{example}. The model never learns the next token"),
        "targets shifted the wrong way": (x - 1, f"{example}. The model already sees its targets"),
    }, what="target")
    require(len(set(x[:, 0].tolist())) > 1, "one window: all rows of the batch are the same")
    try:
        late = max(int(call(6, 8)[1].max()) for _ in range(20))
        require(late <= 5, "windows past the end: the last token has no target")
        starts = {i for _ in range(20) for i in call(30)[0][:, 0].tolist()}
    except (IndexError, RuntimeError) as error:
        raise Wrong(f"windows past the end: with 6 tokens, T = 4: {error}") from error
    left = sorted(set(range(26)) - starts)
    require(not left, f"windows left out: of 30 tokens, none starts at {left}: 0 to N - T - 1")
    batches = [(torch.manual_seed(5), call(30)[0])[1] for _ in range(2)]
    require(close(*batches), "random numbers not from torch: no seed can repeat the run")


# --- Model ----------------------------------------------------------------------------------------
def attention(q, k, v, scale=None, mask="causal", dim=-1):
    """Attention in plain steps. The options are the mistakes."""
    T, hs = q.shape[-2:]
    scores = torch.einsum("...qd,...kd->...qk", q, k) * (hs**-0.5 if scale is None else scale)
    future = torch.arange(T) > torch.arange(T).view(T, 1)
    hidden = {"causal": future, "transposed": future.T, "itself": future | torch.eye(T).bool()}
    scores = scores.masked_fill(hidden.get(mask, torch.tensor(False)), -INF)
    scores = scores.masked_fill(future & torch.tensor(mask == "zero"), 0)
    return scores.softmax(dim).masked_fill(future & torch.tensor(mask == "after"), 0) @ v


def grade_head(gpt):
    q, k, v = numbers(3, 2, 3, 5, 4)
    one = torch.eye(5).expand(2, 3, 5, 5)  # as values, they show the weights
    weights = lambda *scale, mask: attention(q, k, one, *scale, mask=mask)
    first = lambda mask: weights(mask=mask)[0, 0, 0]  # the weights of position 0
    sharp, usual = (weights(s, mask="causal")[..., -1, :].amax(-1).mean() for s in (1.0, 0.5))
    diagnose(gpt.Head()(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), {
        "mask missing": (attention(q, k, v, mask=None), "position 0 gives "
            f"{first(None)[1:].sum():.2f} of its weight to later positions: in "
            "training, it copies its target"),
        "mask transposed": (attention(q, k, v, mask="transposed"), "each position sees itself and "
            "the future, but not the past. -inf belongs above the diagonal: triu(1)"),
        "mask after the softmax": (attention(q, k, v, mask="after"), "the weights of a row must "
            f"have sum 1; at position 0 it is {first('after').sum():.2f}. Mask the scores first"),
        "mask hides the token itself": (attention(q, k, v, mask="itself"), "position 0 sees "
            "nothing: its weights are nan. The diagonal must remain: triu(1)"),
        "mask of 0 instead of -inf": (attention(q, k, v, mask="zero"), "exp(0) = 1: position 0 "
            f"still gives {first('zero')[1:].sum():.2f} of its weight to later positions"),
        "scale missing": (attention(q, k, v, 1.0), f"the last row's largest weight is {sharp:.2f} "
            f"on average, and {usual:.2f} with scores / √hs. Too sharp: the gradient vanishes"),
        "scale by C": (attention(q, k, v, 12**-0.5), "you divide by √C = √12. A score sums hs "
            "products, not C: divide by √hs = √4"),
        "scale hs instead of √hs": (attention(q, k, v, 0.25), "you divide by hs = 4, not √hs = 2: "
            "the scores become too small, and all weights nearly equal"),
        "scale multiplied": (attention(q, k, v, 2.0), "you multiply by √hs = 2. Divide by it"),
        "softmax over the wrong dimension": (tuple(attention(q, k, v, dim=i) for i in (0, 1, 2)),
            "a row holds the weights of one query; its sum must be 1: dim=-1"),
        "q and k swapped": (attention(k, q, v), "row t must hold the scores of query t: q @ kᵀ"),
    })


def check_dropout(make, *inputs):
    """Require that dropout acts in training, as strong as asked, and never in evaluation."""
    first = lambda out: out[0] if isinstance(out, tuple) else out
    same = lambda layer: close(first(layer(*inputs)), first(layer(*inputs)))
    layer = make(0.5)
    require(not same(layer.train()), "dropout missing: in training, two calls do not differ")
    require(same(layer.eval()), "dropout on in evaluation: two calls differ after model.eval(). "
            "Use nn.Dropout, or F.dropout with self.training")
    require(same(make(0.0).train()), "dropout ignores its argument: 0.0 still drops numbers")


def multi_head(x, weights, bias, output, mistake=None):
    """Attention of weights (3, H, hs, C), bias (3, H, hs); `output` is a layer."""
    (B, T, C), (_, H, hs, _) = x.shape, weights.shape
    q, k, v = torch.einsum("btc,rhdc->rbhtd", x, weights) + bias.view(3, 1, H, 1, hs)
    if mistake in ("split", "split only"):
        q, k, v = (part.transpose(1, 2).reshape(B, H, T, hs) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=mistake != "mask")
    out = out.reshape(B, T, C) if mistake in ("join", "split") else out.transpose(1, 2).flatten(2)
    return out if mistake == "projection" else output(out)


def readings(layer, C, H):
    """Yield (weights, bias, output layer): all ways in which linear layers may hold q, k and v."""
    layers = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    for output in (m for m in layers if m.weight.shape == (C, C)):
        parts = [m for m in layers if m is not output]
        if sum(m.out_features for m in parts) == 3 * C and {m.in_features for m in parts} == {C}:
            bias = [m.weight[:, :1] * 0 if m.bias is None else m.bias[:, None] for m in parts]
            both = torch.cat([torch.cat([m.weight for m in parts]), torch.cat(bias)], 1)
            for shape, dim in (((3, H, -1, C + 1), 0), ((H, 3, -1, C + 1), 1)):
                for order in map(list, itertools.permutations(range(3))):
                    qkv = both.view(shape).movedim(dim, 0)[order]
                    yield qkv[..., :C], qkv[..., C], output


def grade_multi_head(gpt, *more):
    """`more` are arguments that other scripts have."""
    C, H, x = 12, 3, numbers(2, 5, 12)
    make = lambda dropout: randomize(gpt.MultiHead(C, H, dropout, *more))
    layer = make(0.0).eval()
    got, n = layer(x), sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    require(n == 4 * C * C, f"wrong width: the matrices have {n} numbers; q, k, v and the "
            f"projection have C · C = {C * C} each")
    ways = list(readings(layer, C, H))
    forms = lambda *mistakes: tuple(multi_head(x, *way, m) for m in mistakes for way in ways)
    right = [form for form in forms(None) if close(got, form)] or [*forms(None), got]
    diagnose(got, right[0], {
        "heads in the wrong axis": (forms("join"), "(B, H, T, hs) became (B, T, C) without "
            "transpose(1, 2): the channels of a position then come from several positions"),
        "heads split in the wrong axis": (forms("split", "split only"), "view(B, H, T, hs) cuts "
            "the text in pieces, not the channels: first view(B, T, H, hs), then transpose(1, 2)"),
        "projection missing": (forms("projection"), "the results of the heads are not mixed"),
        "mask missing": (forms("mask"), "each position sees later ones"),
    })
    changed = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    require(close(layer(changed)[:, :-1], got[:, :-1]), "mask missing: positions see later ones")
    check_dropout(make, x)


def grade_feed_forward(gpt, activation=F.relu):
    C, x, f, name = 6, numbers(2, 3, 6), activation, activation.__name__
    make = lambda dropout: randomize(gpt.FeedForward(C, dropout))
    layer = make(0.0).eval()
    got, shapes = layer(x), {tuple(p.shape): p for p in layer.parameters()}
    require({(4 * C, C), (C, 4 * C)} <= set(shapes), f"wrong width: they are {[*shapes]}; the "
            f"inner layer has 4 C = {4 * C} numbers")
    A, B = shapes[4 * C, C], shapes[C, 4 * C]
    a, b = shapes.get((4 * C,), torch.zeros(4 * C)), shapes.get((C,), torch.zeros(C))
    none = lambda x: x
    forms = lambda f, g: tuple(g(f(x @ p + a) @ q + b) for p, q in ((A.T, B.T), (B, A)))
    right = [form for form in forms(f, none) if close(got, form)] or forms(f, none)
    diagnose(got, right[0], {
        f"{name} missing": (forms(none, none), "two linear layers in a row are one linear layer"),
        f"{name} on the result": (forms(none, f) + forms(f, f), "it belongs between the layers"),
    })
    check_dropout(make, x)


def grade_block(gpt, *more):
    """`more` are arguments that other scripts have."""
    make = lambda dropout: randomize(gpt.Block(12, 3, dropout, *more))
    block, x = make(0.0).eval(), numbers(2, 5, 12)
    got, kinds = block(x), (nn.LayerNorm, gpt.MultiHead, gpt.FeedForward)
    norms, fs, gs = ([m for m in block.modules() if isinstance(m, kind)] for kind in kinds)
    n = [len(norms), len(fs), len(gs)]
    require(n == [2, 1, 1], f"parts: {n} of LayerNorm, MultiHead, FeedForward, not [2, 1, 1]")
    (f,), (g,) = fs, gs

    def forms(*ways):  # a way: the two halves, functions of x, f and norm
        pairs = ((norms[0], norms[1]), (norms[1], norms[0]))
        return tuple(second(first(x, f, a), g, b) for first, second in ways for a, b in pairs)

    step, bare = (lambda x, f, ln: x + f(ln(x))), (lambda x, f, ln: x + f(x))
    lost = lambda x, f, ln: f(ln(x))
    on_sum, after = (lambda x, f, ln: ln(x + f(x))), (lambda x, f, ln: x + ln(f(x)))
    late = lambda x, f, ln: ln(x) + f(ln(x))
    right = [form for form in forms((step, step)) if close(got, form)] or forms((step, step))
    diagnose(got, right[0], {
        "LayerNorm on the sum": (forms((on_sum, on_sum)), "you compute ln(x + f(x)). Then the "
            "gradient no longer has the 1 of x + f(x). It is x + f(ln(x))"),
        "LayerNorm after": (forms((after, after)), "you compute x + ln(f(x)). It is x + f(ln(x)): "
            "f needs an input of steady size"),
        "LayerNorm missing": (forms((bare, bare), (bare, step), (step, bare)), "attention or "
            "feed-forward gets numbers of any size. It is x + f(ln(x))"),
        "one LayerNorm twice": (tuple(step(step(x, f, a), g, a) for a in norms), "each has one"),
        "residual left out": (forms((lost, lost), (lost, step), (step, lost)), "you compute "
            "f(ln(x)), so x is lost, and in deep models the gradient vanishes. It is x + f(ln(x))"),
        "residual after LayerNorm": (forms((late, late)), "you add ln(x); add x as it came"),
        "side by side": (tuple(x + f(a(x)) + g(b(x)) for a, b in (norms, norms[::-1])), "feed-"
            "forward must see x with what attention has found, not the block's input"),
    })
    check_dropout(make, x)


def grade_lm_init(gpt):
    V, T, C, layers = 65, 7, 32, 2
    config = dict(vocab_size=V, block_size=T, n_embed=C, n_heads=4, n_layers=layers, dropout=0.5)
    model = gpt.LM(**config)
    require(model.config == config, f"config: it is {model.config}, and should be {config}")
    diagnose(model.block_size, T, what="block_size")
    own = {"token_embedding": (V, C), "position_embedding": (T, C), "ln_f": (C,), "lm_head": (V, C)}
    for name, shape in own.items():
        got = tuple(getattr(model, name).weight.shape)
        require(got == shape, f"wrong width: {name} is {got}, and should be {shape}")
    blocks = [m for m in model.modules() if isinstance(m, gpt.Block)]
    require(len(blocks) == layers, f"blocks: {len(blocks)} different ones instead of {layers}. "
            "Note: `[Block(...)] * n` is n times the same block")
    n = sum(p.numel() for p in model.parameters())
    right = 2 * V * C + T * C + 2 * C + sum(p.numel() for b in blocks for p in b.parameters())
    require(n == right, f"parameters: {n:,} instead of {right:,}. Has lm_head a bias?")
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    require(rates == {0.5}, f"dropout missing: the rates are {rates}; 0.5 was asked for")
    std, loss = model.lm_head.weight.std().item(), model.eval()(*torch.randint(V, (2, 64, T)))[1]
    require(0.018 < std < 0.022, f"initialisation: lm_head has the standard deviation {std:.3f}, "
            f"not 0.02. The loss starts at {loss:.2f}, not just above ln V = {math.log(V):.2f}")


def grade_lm_forward(gpt):
    B, T, C, V = 3, 4, 8, 11
    model = randomize(gpt.LM(V, 6, C, 2, 1, 0.0)).eval()
    idx, targets = torch.randint(V, (2, B, T))
    tokens, positions = model.token_embedding.weight[idx], model.position_embedding.weight
    norm = lambda x: F.layer_norm(x, (C,), model.ln_f.weight, model.ln_f.bias)
    head, x = (lambda x: x @ model.lm_head.weight.T), tokens + positions[:T]
    end = lambda x: head(norm(model.blocks(x)))
    right, output = end(x), model(idx)
    require(isinstance(output, tuple) and len(output) == 2, "type: it must return (logits, loss)")
    require(output[1] is None, "loss without targets: it must be None")
    diagnose(output[0], right, {
        "position left out": (end(tokens), "to the first block, c has the same place in 'abc' and "
            "'bac': add position_embedding"),
        "positions by token": (end(tokens + positions[idx.clamp(max=5)]), "they are 0 to T - 1"),
        "final LayerNorm left out": (head(model.blocks(x)), "ln_f comes before lm_head"),
        "blocks left out": (head(norm(x)), "no token sees another one"),
        "softmax in the logits": ((right.softmax(-1), right.log_softmax(-1)), "logits are what "
            "lm_head gives; cross_entropy and generate apply softmax themselves"),
    }, what="logits")
    logits, loss = model(idx, targets)
    diagnose(logits, right, what="logits with targets")
    mean = lambda p, y: -p.log().flatten(0, 1)[range(y.numel()), y.flatten()].mean()
    p, other = right.softmax(-1), "row i of the logits meets the target of another token. Flatten "
    true = mean(p, targets)
    diagnose(loss, true, {
        "loss summed": (true * B * T, f"the mean of {B * T} tokens is {true:.2f}. A sum grows with "
            "the batch, and so does the gradient"),
        "softmax before cross_entropy": (mean(p.softmax(-1), targets), "cross_entropy contains the "
            f"softmax. Twice, the loss is {mean(p.softmax(-1), targets):.2f}, not {true:.2f}"),
        "logits and targets flattened in different orders": ((mean(p.transpose(0, 1), targets),
            mean(p, targets.T)), f"{other}both from (B, T)"),
        "targets shifted twice": (mean(p[:, :-1], targets[:, 1:]), "get_batch has shifted them"),
        "loss in bits": (true / math.log(2), "nats are asked for: the natural logarithm"),
        "loss negative": (-true, "the loss is -ln p"),
    }, what="loss")
    require(loss.requires_grad, "gradient lost: the loss must be a tensor that has a gradient")
    padded, known = targets.clone(), mean(p[:, :2], targets[:, :2])
    padded[:, 2:] = -100
    diagnose(model(idx, padded)[1], known, {
        "padding counted": (known / 2, "-100 is neither in the sum nor in the count"),
    }, what="loss with targets of -100")
    check_dropout(lambda rate: randomize(gpt.LM(V, 6, C, 2, 0, rate)), idx)


# --- Training -------------------------------------------------------------------------------------
class Bigram(nn.Module):
    """A model of one table: logits[last token]. It notes what it sees, and how it is called."""

    def __init__(self, table, block_size=4):
        super().__init__()
        self.table, self.block_size = nn.Parameter(table), block_size
        self.config = {"block_size": block_size, "vocab_size": len(table)}
        self.seen, self.modes, self.gradients = [], [], []

    def forward(self, idx, targets=None):
        self.seen.append(idx)
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        logits = self.table[idx]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def check_evaluation(self):
        require(not any(self.modes), "dropout on in evaluation: call model.eval() first")
        require(not any(self.gradients), "gradients in evaluation: recording them costs memory and "
                "time. Put @torch.no_grad() above the function")


def grade_estimate_loss(gpt):
    table, tokens = numbers(23, 23), torch.arange(23)  # 22 targets: 5 windows of 4, one of 2
    model = Bigram(table.clone()).train()
    got = gpt.estimate_loss(model, tokens, 2)
    require(isinstance(got, dict) and "loss" in got, f'type: {got!r:.40}, not {{"loss": ...}}')
    model.check_evaluation()
    require(model.table.equal(table), "evaluation that trains: the parameters have changed")
    costs = -table.log_softmax(-1)
    each = costs[tokens[:-1], tokens[1:]]
    right, batches = each.mean(), torch.stack([part.mean() for part in each.split(8)])
    padded = tuple((each.sum() + extra) / 24 for extra in (0, 2 * costs[0, 0], 2 * costs[22, 0]))
    diagnose(got["loss"], right.item(), {
        "end left out": (each[:20].mean(), "the last, shorter window belongs to the text, too"),
        "beginning left out": ((each[1:].mean(), each[4:].mean()), "the first target is token 1"),
        "padding counted": (padded, "22 tokens were divided by 24 places. The 2 empty places of "
            "the last window are no tokens"),
        "mean of means": (batches.mean(), "the last batch has fewer tokens, and counts as much as "
            "the others: weight each mean with its number of tokens"),
        "not divided": ((each.sum(), batches.sum()), "this is a sum, not the mean over the tokens"),
        "targets not shifted": (costs.diagonal()[:22].mean(), "each token was its own target"),
        "loss in bits": (right / math.log(2), "nats are asked for"),
    }, what="loss")
    table, tokens = numbers(402, 402), torch.arange(402)
    few = [Bigram(table) for _ in range(2)]
    losses = [gpt.estimate_loss(model, tokens, 2, 3)["loss"] for model in few]
    seen = torch.cat([idx[:, 0] for idx in few[0].seen])
    require(len(seen) <= 6, f"eval_iters ignored: {len(seen)} windows; 3 batches of 2 are 6")
    require(len(seen) > 2 and seen.max() > 300 and seen.min() < 100, "not spread: of 402 tokens, "
            f"with eval_iters, windows start at {seen.tolist()}. The rest is never measured")
    require(losses[0] == losses[1], "random: two evaluations of one model differ")


def grade_orthogonalize(gpt):
    def polar(shape, rounds=5, norm=torch.linalg.norm):
        u, s, v = torch.linalg.svd(numbers(*shape, seed=1).double(), full_matrices=False)
        s = s / norm(s)
        for _ in range(rounds):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return ((u * s) @ v).float()

    for shape in ((4, 6), (6, 4)):
        exact = torch.linalg.svd(numbers(*shape, seed=1), full_matrices=False)
        diagnose(gpt.orthogonalize(numbers(*shape, seed=1)), polar(shape), {
            **{f"{n} rounds": (polar(shape, n), f"{n} instead of 5") for n in (1, 2, 3, 4, 6)},
            "not normalized": (polar(shape, norm=lambda s: 1), "divide by the norm: factors above "
                "1 explode"),
            "normalized by the largest factor": (polar(shape, norm=torch.max), "use x.norm()"),
            "exact": (exact[0] @ exact[2], "all factors are 1; the five rounds give 0.7 to 1.2"),
            "not transposed back": (polar(shape).T, "a tall matrix must come back tall"),
        }, rtol=0.03, atol=0.03, what="orthogonalized matrix")
        zeros = gpt.orthogonalize(torch.zeros(shape))
        require(zeros.isfinite().all(), "nan: a matrix of zeros has norm 0; divide by 1e-7 or more")


def grade_muon(gpt):
    cut = lambda row: [row[:24].view(4, 6), row[24:].view(5, 3)]
    start, gradients = numbers(39, seed=9), numbers(3, 39)

    def steps(mistake=None, lr=0.1, decay=0.5):
        result, averages = cut(start), [0.0, 0.0]
        for gradient in gradients:
            for i, g in enumerate(cut(gradient)):
                averages[i] = 0.95 * averages[i] + 0.05 * g
                mixed = 0.95 * averages[i] + 0.05 * g
                mixed = {"plain": g, "nesterov": averages[i]}.get(mistake, mixed)
                update = mixed if mistake == "as it is" else gpt.orthogonalize(mixed)
                length = lr * (1 if mistake == "length" else 0.2 * max(g.shape) ** 0.5)
                length = -length if mistake == "sign" else length
                result[i] = result[i] * (1 - lr * decay) - update * length
        return torch.cat([p.flatten() for p in result])

    matrices = [nn.Parameter(p.clone()) for p in cut(start)]
    optimizer = gpt.Muon(matrices, {"lr": 0.1, "weight_decay": 0.5})
    for gradient in gradients:
        for p, g in zip(matrices, cut(gradient), strict=True):
            p.grad = g.clone()
        optimizer.step()
    diagnose(torch.cat([p.flatten() for p in matrices]), steps(), {
        "weight decay missing": (steps(decay=0), "first multiply p by 1 - lr · weight_decay"),
        "average missing": (steps("plain"), "each step follows the last gradient alone, which is "
            "noisy. Keep an average in self.state[p]"),
        "last gradient missing": (steps("nesterov"), "the update is 0.95 average + 0.05 gradient"),
        "not orthogonalized": (steps("as it is"), "the update is orthogonalize(...)"),
        "step length": (steps("length"), "multiply by 0.2 · √max(shape): so AdamW's rate fits"),
        "wrong direction": (steps("sign"), "you added the update, so the loss grows: subtract it"),
    }, what="matrices after 3 steps")


def grade_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, gpt.BETAS = 0.25, (0.8, 0.9)
    model, owner = gpt.LM(11, 6, 8, 2, 2, 0.0), {}
    optimizers = gpt.make_optimizers(model)
    names = {p: name for name, p in model.named_parameters()}
    for optimizer, group in ((o, group) for o in optimizers for group in o.param_groups):
        for p in group["params"]:
            kind, decay = type(optimizer).__name__, group["weight_decay"]
            require(p not in owner, f"parameter twice: {names[p]} would get two steps")
            owner[p], inside = kind, p.dim() == 2 and names[p].startswith("blocks")
            right = "Muon" if inside else "AdamW"
            require(kind == right, f"wrong optimizer: {names[p]}, {tuple(p.shape)}, is in {kind}, "
                    f"and should be in {right}")
            right = 0.25 * (p.dim() == 2)
            require(decay == right, f"weight decay: {names[p]}, {tuple(p.shape)}, has {decay}, and "
                    f"should have {right}: it is for matrices only")
            betas = group.get("betas", gpt.BETAS)
            require(betas == gpt.BETAS, f"betas: {betas} instead of BETAS = {gpt.BETAS}")
    left = [name for p, name in names.items() if p not in owner]
    require(not left, f"parameters left out: {', '.join(left[:3])} never change")
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    require(kinds == ["AdamW", "Muon"], f"order: {kinds} instead of [AdamW, Muon]")


def grade_get_lr(gpt):
    gpt.WARMUP_ITERS, gpt.FINAL_LR = 4, 0.1
    rates = lambda n: torch.tensor([float(gpt.get_lr(step, n, 2.0)) for step in range(n)])
    line, join = torch.linspace, lambda rise, fall: 2 * torch.cat([rise, fall])
    up, zero, down = line(0.25, 1, 4), line(0, 0.75, 4), line(1, 0.1, 48)[1:-1]
    diagnose(rates(50), join(up, down), {
        "off by one": ((join(line(0, 1, 5), down[1:]), join(zero, line(1, 0.1, 48)[:-2]),
            join(zero, down), join(up[:3], line(1, 0.1, 48)[1:]), join(zero, line(1, 0.1, 47)[:-1]),
            join(up, line(1, 0.1, 47)[1:]), join(up, line(1, 0.1, 47)[:-1])),
            "step 0 has the rate peak / warmup, step warmup - 1 "
            "the peak, and step max_iters, which is not made, would have FINAL_LR · peak"),
        "never falls": (join(up, torch.ones(46)), "the parameters keep jumping around the minimum"),
        "no warm-up": ((2 * line(1, 0.1, 51)[:-1], join(torch.ones(4), down), join(1 + torch.arange(
            3, -1, -1) * 0.9 / 47, down)), "the first steps are as large as the peak or larger, "
            "though the optimizers' averages cover few gradients"),
        "FINAL_LR ignored": (join(up, line(1, 0, 48)[1:-1]), "it ends at FINAL_LR · peak, not 0"),
        "cosine": (join(up, 0.55 + 0.45 * line(0, math.pi, 48).cos()[1:-1]), "a line is asked for"),
    }, what="rate by step")
    diagnose(rates(20), join(line(0.5, 1, 2), line(1, 0.1, 20)[1:-1]), {
        "warm-up too long": (join(up, line(1, 0.1, 18)[1:-1]), "20 steps warm up for 2, a tenth"),
    }, what="rate by step of 20")
    diagnose(rates(1), torch.tensor([2.0]), what="rate of a run of one step")


class Watched(torch.optim.SGD):
    """Gradient descent that notes, at each call, (kind, rate, gradient)."""

    def __init__(self, parameter, events):
        super().__init__([parameter], lr=123.0)
        self.events, self.parameter = events, parameter

    def note(self, kind):
        grad = self.parameter.grad
        grad = torch.zeros_like(self.parameter) if grad is None else grad.clone()
        self.events.append((kind, self.param_groups[0]["lr"], grad))

    def step(self):
        self.note("step")
        super().step()

    def zero_grad(self, set_to_none=True):
        self.note("zero")
        super().zero_grad(set_to_none)


def grade_train_step(gpt):
    gpt.GRADIENT_CLIP, lr = 0.1, 0.5
    x, y = torch.randint(7, (2, 3, 4))
    model, twin, events, others = Bigram(numbers(7, 7)).eval(), Bigram(numbers(7, 7)), [], []
    model.other = nn.Parameter(numbers(3))  # has no part in the loss, and a second optimizer
    optimizers = [Watched(model.table, events), Watched(model.other, others)]
    gradient = lambda: torch.autograd.grad(twin(x, y)[1], twin.table)[0]
    cut = lambda g: g * min(1, 0.1 / g.norm())
    before, g = twin(x, y)[1].item(), gradient()
    got = gpt.train_step(model, optimizers, x, y, lr)
    kinds = [kind for kind, _, _ in events]
    require("step" in kinds, "step missing: without optimizer.step(), the parameters never change")
    at = kinds.index("step")
    (_, rate, seen), later = events[at], [part.norm() for _, _, part in events[at + 1 :]]
    require(all(model.modes), "dropout off in training: call model.train() first")
    cleared = any(kind == "zero" and part.any() for kind, _, part in events[:at])
    require(not cleared, "gradients zeroed before the step: the optimizer sees zeros")
    require(seen.any(), "step before backward: at the step there is no gradient yet")
    require(not later or later[0] == 0 or later[0] > 0.11 or seen.norm() < 0.11, "clipping after "
            f"the step: the step used a gradient of length {seen.norm():.2f}, not 0.1")
    diagnose(seen, cut(g), {
        "clipping missing": (g, f"the gradient's length is {g.norm():.2f}, GRADIENT_CLIP is 0.1"),
        "clipping by value": (g.clamp(-0.1, 0.1), "each number was cut, which turns the gradient: "
            "cut its length, with clip_grad_norm_"),
    }, what="gradient")
    for used in (rate, *(rate for kind, rate, _ in others if kind == "step")):
        require(used == lr, f"learning rate not set: an optimizer uses {used} instead of {lr}: "
                'set group["lr"] of every group of every optimizer, before its step')
    require("step" in [kind for kind, _, _ in others], "step missing: only one optimizer steps")
    twin.table.data -= lr * cut(g)
    second = gradient()
    diagnose(got, before, {
        "loss after the step": (twin(x, y)[1], "the loss before the step was asked for"),
    }, what="loss")
    gpt.train_step(model, optimizers, x, y, lr)
    diagnose([part for kind, _, part in events if kind == "step"][1], cut(second), {
        "gradients not zeroed": ((cut(cut(g) + second), cut(g + second)), "at the second step, the "
            "first gradient is still there, and the new one is added to it"),
    }, what="gradient of the second step")
    gpt.GRADIENT_CLIP = None
    gpt.train_step(model, optimizers, x, y, lr)
    last = [part.norm() for kind, _, part in events if kind == "step"][-1]
    require(last > 0.11, "GRADIENT_CLIP = None: it means no clipping")


def grade_train(gpt):
    best, handler = Bigram(torch.full((9, 9), 42.0)), signal.getsignal(signal.SIGINT)

    def run(first, last):
        log = {name: [] for name in ("lr", "batch", "text", "eval", "save")}
        entry = lambda step: {"val": {"loss": 9.0 - step}, "train": {"loss": 9.0 - step}}
        history, model = {step: entry(step) for step in range(first + 1)}, Bigram(numbers(9, 9))

        def evaluate(model, tokenizer, splits, prompt, step):
            log["eval"].append(step)
            torch.rand(1)  # a sample is drawn
            return entry(step)

        def train_step(model, optimizers, x, y, lr):
            log["batch"].append(x.tolist())
            log["lr"].append(lr)
            return torch.tensor(1.0)

        def get_batch(tokens, batch_size, block_size, device):
            log["text"].append(len(tokens))
            return torch.randint(1000, (2, batch_size, block_size))

        gpt.evaluate, gpt.train_step, gpt.get_batch = evaluate, train_step, get_batch
        gpt.get_lr = lambda *arguments: arguments
        gpt.make_optimizers = lambda model: ["optimizer"]
        gpt.save_run = lambda *a: log["save"].extend(max(x) for x in a if isinstance(x, dict))
        gpt.load_checkpoint = lambda path, device: (best, "tokenizer")
        gpt.load_training_state = lambda optimizers, text_id: (first, history)
        gpt.EVAL_INTERVAL, gpt.BATCH_SIZE = 2, 3
        flags = argparse.Namespace(max_iters=last, resume=first > 0, seed=7, prompt="a")
        splits = {"train": torch.arange(5), "val": torch.arange(6)}
        result = gpt.train(model, "tokenizer", splits, flags, "text")
        require(model.table.equal(best.table), "best parameters: at the end, the model must get "
                "those of NAME.pt; the last ones may be overfitted")
        require(result["steps"] == last, f"steps: returned {result['steps']} instead of {last}")
        require({"seconds", "tokens_per_second"} <= set(result), f"result: it has {set(result)}")
        return log

    log = run(0, 5)
    steps = [lr[0] for lr in log["lr"]]
    require(len(steps) == 5, f"steps: {len(steps)} instead of max_iters = 5")
    require(steps == [0, 1, 2, 3, 4], f"learning rate of another step: get_lr got {steps}")
    require(log["lr"][0][1:] == (5, gpt.LEARNING_RATE), f"get_lr: called with {log['lr'][0]}")
    require(log["text"] == [5] * 5, "validation text: the model must never train on it")
    require(log["eval"] == [0, 2, 4, 5], f"evaluation: at steps {log['eval']}; with EVAL_INTERVAL "
            "= 2 and 5 steps, it is at 0, 2, 4 and 5")
    require(log["save"] == [2, 4, 5], f"saving: after steps {log['save']} instead of 2, 4, 5. A "
            "save at step 0 would replace what an earlier run has learned")
    require(run(3, 5)["batch"] == log["batch"][3:], "not resumed to the bit: a run that goes on "
            "from step 3 gets other batches. Seed each step with the seed and its number")
    require(signal.getsignal(signal.SIGINT) is handler, "Ctrl-C: its handler was not put back")


# --- Generation -----------------------------------------------------------------------------------
def grade_next_token_probabilities(gpt):
    p, call = torch.tensor([0.15, 0.5, 0.05, 0.3]), gpt.next_token_probabilities
    logits, one, zero = p.log() + 3, lambda kept: kept / kept.sum(), "temperature 0 divides by zero"
    keep = lambda *kept: p * torch.tensor([i in kept for i in range(4)])
    sort = lambda kept: (kept.sort(descending=True)[0],
        "the result is sorted; place i must hold the probability of token i")
    diagnose(call(logits), p, {
        "softmax missing": ((logits, p.log()), "these are logits or logarithms"),
        "not back in place": sort(p),
    }, what="probabilities")
    diagnose(call(logits, temperature=0.5), one(p**2), {
        "temperature multiplied": (one(p**0.5), f"0.5 must make the likely token likelier, "
            f"{one(p**2)[1]:.2f}; you have {one(p**0.5)[1]:.2f}. Divide the logits by it"),
        "temperature ignored": ((p, p / 0.5), "it must divide the logits, before the softmax"),
    }, what="probabilities at temperature 0.5")
    try:
        diagnose(call(logits, temperature=0), torch.tensor([0.0, 1, 0, 0]), {
            zero: (torch.full((4,), INF - INF), "all are nan. 0 means: the most likely token"),
            "temperature 0 ignored": (p, "it means: always the most likely token"),
        }, what="probabilities at temperature 0")
    except ZeroDivisionError as error:
        raise Wrong(f"{zero}: it means: always the most likely token") from error
    diagnose(call(logits, top_k=2), one(keep(1, 3)), {
        "top-k keeps k + 1": (one(keep(0, 1, 3)), "top_k=2 kept 3 tokens"),
        "top-k keeps k - 1": (one(keep(1)), "top_k=2 kept 1 token"),
        "sum is not 1": (keep(1, 3), "0.8 is left of the probabilities: divide by it"),
        "not back in place": sort(one(keep(1, 3))),
        "top-k ignored": (p, "tokens that are not among the 2 most likely must get 0"),
    }, what="probabilities with top_k = 2")
    diagnose(call(logits, top_k=9), p, what="probabilities with top_k = 9 of 4 tokens")
    for limit, kept, dropped, more in ((0.6, (1, 3), (1,), (0, 1, 3)), (0.4, (1,), (), (1, 3))):
        diagnose(call(logits, top_p=limit), one(keep(*kept)), {
            "first token over the threshold dropped": ((one(keep(*dropped)), keep(*dropped)), "of "
                f"0.5, 0.3, 0.15, 0.05, top_p = {limit} keeps {len(kept)}: the fewest that reach "
                f"it. You keep {len(dropped)}"),
            "top-p keeps one too many": (one(keep(*more)), f"{len(kept)} reach {limit} together"),
            "sum is not 1": (keep(*kept), "divide by the sum of those that are left"),
            "not back in place": sort(one(keep(*kept))),
            "top-p ignored": (p, "unlikely tokens must get 0"),
        }, what=f"probabilities with top_p = {limit}")
    huge = call(torch.tensor([1e5, 2e5]), temperature=1e-3)
    diagnose(huge, torch.tensor([0.0, 1.0]), what="probabilities of huge logits")


def grade_generate(gpt):
    V, T, ids = 30, 4, [3, 7, 8, 20, 21, 22]
    table = torch.full((V, V), -50.0)
    table[range(V), [(i + 1) % V for i in range(V)]] = 50.0  # after token i comes i + 1
    model, prompt = Bigram(table, T).train(), list(ids)
    tokens = gpt.generate(model, prompt, 3)
    require(hasattr(tokens, "__iter__"), f"type: {tokens!r:.40} cannot be iterated: yield tokens")
    got = [int(token) for token in tokens]
    seen = [idx.flatten().tolist() for idx in model.seen]
    require(got[:3] != ids[:3], f"prompt yielded: {got} begins with the prompt {ids}")
    require(prompt == ids, f"caller's list changed: the prompt has become {prompt}. Work on a copy")
    require(len(seen) == 3, f"calls: the model was called {len(seen)} times for 3 tokens")
    require(len(seen[0]) <= T, f"context not cropped: the model got {len(seen[0])} tokens, its "
            f"block_size is {T}")
    require(seen[0] != ids[:T], f"context cropped at the wrong end: of {ids}, the model saw "
            f"{seen[0]}; the next token follows the last ones")
    require(seen[0] == ids[-T:], f"prompt lost: of {ids}, the model saw {seen[0]}")
    require(seen[1] != seen[0], "token not appended: the model sees the same text again")
    require(len(seen[1]) == T, f"context lost: at the second token, the model saw {seen[1]} only")
    wrong = {"wrong position": ([9, 21, 22], "the last position predicts the next token")}
    diagnose(got, [23, 24, 25], wrong, what="tokens")
    model.check_evaluation()
    short = Bigram(table, T)
    list(gpt.generate(short, [5, 6], 2))
    seen = [idx.flatten().tolist() for idx in short.seen]
    require(seen == [[5, 6], [5, 6, 7]], f"prompt lost: after [5, 6], the model saw {seen}")
    flat = Bigram(torch.arange(8.0).expand(8, 8) / 8)
    draw = lambda n=40, **options: {int(token) for token in gpt.generate(flat, [0], n, **options)}
    require(draw() != {7}, "always argmax: 40 tokens are all the most likely one, of probability "
            "0.2. Draw: torch.multinomial")
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        require(draw(**options) == {7}, f"options ignored: {options} gives other tokens than the "
                "most likely one")
    require(draw(0) == set(), "max_new_tokens = 0: it must give no token")


PIECES = [Piece(*row) for row in (
    ("Tokenizer", "Tokenizer.__init__ Tokenizer.encode Tokenizer.decode", grade_tokenizer,
     "vocabulary, vocab_size, stoi; ids of a text, text of ids"),
    ("split_text", "split_text", grade_split_text, "two parts of the text, in order"),
    ("get_batch", "get_batch", grade_get_batch, "random windows, and the token after each"),
    ("Head", "Head.forward", grade_head, "softmax(q kᵀ / √hs) v, with a causal mask"),
    ("MultiHead", "MultiHead.__init__ MultiHead.forward", grade_multi_head,
     "q, k, v, cut into heads; Head; heads side by side; projection; dropout"),
    ("FeedForward", "FeedForward.__init__ FeedForward.forward", grade_feed_forward,
     "two layers with relu between them, and dropout"),
    ("Block", "Block.__init__ Block.forward", grade_block,
     "MultiHead, then FeedForward, each with LayerNorm and residual"),
    ("LM", "LM.__init__", grade_lm_init,
     "the layers that forward uses, config, block_size; lm_head with std 0.02"),
    ("LM.forward", "LM.forward", grade_lm_forward,
     "embeddings, blocks, ln_f, lm_head; the loss if there are targets"),
    ("estimate_loss", "estimate_loss", grade_estimate_loss,
     "the mean loss of all tokens, or of eval_iters batches"),
    ("orthogonalize", "orthogonalize", grade_orthogonalize, "divide by the norm, then five rounds"),
    ("Muon", "Muon.step", grade_muon, "average, orthogonalize, weight decay, step"),
    ("make_optimizers", "make_optimizers", grade_make_optimizers,
     "Muon for the blocks' matrices, AdamW for the rest"),
    ("get_lr", "get_lr", grade_get_lr, "a line up, then a line down"),
    ("train_step", "train_step", grade_train_step, "loss, gradient, clipping, rate, step, zero"),
    ("train", "train", grade_train, "steps, evaluations, saves, and the best model at the end"),
    ("next_token_probabilities", "next_token_probabilities", grade_next_token_probabilities,
     "temperature, softmax, top_k, top_p"),
    ("generate", "generate", grade_generate, "crop, predict, draw, append, yield"),
)]

# Comments may be left out of what is replaced: (diagnosis, in the original, instead of it).
STEP = """    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
"""
CLIP = "    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP or math.inf)\n"
EDITS = {
    "Tokenizer": [
        ("vocabulary not sorted", "sorted(set(text)))", "dict.fromkeys(text))"),
        ("duplicates", "sorted(set(text)))", "sorted(text))"),
        ("unknown characters", "check(not unknown,", "str("),
        ("unknown characters dropped", "check(not unknown,", "text = text.replace('é', ''); str("),
        ("decode", '"".join(self.vocabulary[i]', '" ".join(self.vocabulary[i]')],
    "split_text": [
        ("split the wrong way round", '"train": ids[:cut], "val"', '"val": ids[:cut], "train"'),
        ("validation overlaps training", "ids[cut:]}", "ids}"),
        ("tokens left out", "ids[cut:]}", "ids[cut + 4:]}")],
    "get_batch": [
        ("targets not shifted", "windows[:, 1:]", "windows[:, :-1]"),
        ("targets shifted twice", "[starts + torch.arange(block_size + 1)].to(device)\n"
         "    return windows[:, :-1], windows[:, 1:]", "[starts + torch.arange(block_size + 2)]\n"
         "    return windows[:, :-2], windows[:, 2:]"),
        ("windows left out", "len(tokens) - block_size,", "len(tokens) - block_size - 1,"),
        ("windows past the end", "len(tokens) - block_size,", "len(tokens) - block_size + 1,"),
        ("one window", "(batch_size, 1))", "(1, 1)).expand(batch_size, 1)")],
    "Head": [
        ("mask missing", "scores + mask", "scores"),
        ("mask transposed", ".triu(1)", ".tril(-1)"),
        ("mask hides the token itself", ".triu(1)", ".triu(0)"),
        ("mask after the softmax", "F.softmax(scores + mask, dim=-1)",
         "F.softmax(scores, dim=-1).masked_fill(mask < 0, 0)"),
        ("mask of 0 instead of -inf", "scores + mask", "scores.tril()"),
        ("scale missing", "q / hs**0.5", "q"),
        ("scale by C", "q / hs**0.5", "q / (q.shape[1] * hs)**0.5"),
        ("scale hs instead of √hs", "hs**0.5", "hs"),
        ("scale multiplied", "q / hs**0.5", "q * hs**0.5"),
        ("softmax over the wrong dimension", "mask, dim=-1)", "mask, dim=-2)"),
        ("q and k swapped", "(q / hs**0.5) @ k.transpose", "(k / hs**0.5) @ q.transpose")],
    "MultiHead": [
        ("heads in the wrong axis", "self.head(q, k, v).transpose(1, 2)", "self.head(q, k, v)"),
        ("heads split in the wrong axis", "part.view(B, T, self.n_heads, -1).transpose(1, 2)",
         "part.reshape(B, self.n_heads, T, -1)"),
        ("projection missing", "self.projection(out)", "out"),
        ("dropout missing", "self.dropout(self.projection(out))", "self.projection(out)"),
        ("dropout on in evaluation", "self.dropout(self.projection(out))",
         "F.dropout(self.projection(out), self.dropout.p)"),
        ("wrong width", "nn.Linear(n_embed, n_embed)", "nn.Linear(n_embed, n_embed); "
         "self.projection = nn.Sequential(nn.Linear(n_embed, 99), nn.Linear(99, n_embed))")],
    "FeedForward": [
        ("relu missing", "F.relu(self.expand(x))", "self.expand(x)"),
        ("relu on the result", "self.shrink(F.relu(self.expand(x)))",
         "F.relu(self.shrink(self.expand(x)))"),
        ("wrong width", "4 * n_embed)\n        self.shrink = nn.Linear(4 * n_embed",
         "2 * n_embed)\n        self.shrink = nn.Linear(2 * n_embed"),
        ("dropout ignores its argument", "nn.Dropout(dropout)", "nn.Dropout(0.1)")],
    "Block": [
        ("residual left out", "return x + ", "return "),
        ("residual after LayerNorm", "x = x + self.attention(self.ln1(x))\n        return x + "
         "self.feed_forward(self.ln2(x))", "x = self.ln1(x)\n        x = self.ln2(x + "
         "self.attention(x))\n        return x + self.feed_forward(x)"),
        ("LayerNorm after", "self.attention(self.ln1(x))\n        return x + self.feed_forward("
         "self.ln2(x))", "self.ln1(self.attention(x))\n        return x + self.ln2("
         "self.feed_forward(x))"),
        ("LayerNorm on the sum", "x + self.attention(self.ln1(x))\n        return x + "
         "self.feed_forward(self.ln2(x))", "self.ln1(x + self.attention(x))\n        return "
         "self.ln2(x + self.feed_forward(x))"),
        ("LayerNorm missing", "self.feed_forward(self.ln2(x))", "self.feed_forward(x)"),
        ("one LayerNorm twice", "self.ln2(x)", "self.ln1(x)"),
        ("side by side", "x = x + self.attention(self.ln1(x))\n        return x",
         "return x + self.attention(self.ln1(x))")],
    "LM": [
        ("initialisation", "std=0.02", "std=0.2"),
        ("blocks", "(Block(n_embed, n_heads, dropout) for _ in range(n_layers))",
         "[Block(n_embed, n_heads, dropout)] * n_layers"),
        ("wrong width", "nn.Embedding(block_size,", "nn.Embedding(vocab_size,"),
        ("parameters", "vocab_size, bias=False)", "vocab_size)"),
        ("dropout missing", "Block(n_embed, n_heads, dropout)", "Block(n_embed, n_heads, 0.0)")],
    "LM.forward": [
        ("position left out", " + self.position_embedding.weight[: idx.shape[1]]", ""),
        ("positions by token", "weight[: idx.shape[1]]", "weight[idx.clamp(max=5)]"),
        ("final LayerNorm left out", "self.ln_f(self.blocks(self.dropout(x)))",
         "self.blocks(self.dropout(x))"),
        ("softmax in the logits", "self.lm_head(x).float()", "self.lm_head(x).softmax(-1)"),
        ("softmax before cross_entropy", "entropy(logits.", "entropy(logits.softmax(-1)."),
        ("loss summed", "targets.flatten())", "targets.flatten(), reduction='sum')"),
        ("logits and targets flattened in different orders", "cross_entropy(logits.",
         "cross_entropy(logits.transpose(0, 1)."),
        ("targets shifted twice", "F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
         "F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())"),
        ("padding counted", "targets.flatten())", "targets.flatten(), reduction='sum') / 12"),
        ("dropout missing", "self.dropout(x)", "x")],
    "estimate_loss": [
        ("dropout on in evaluation", "model.eval()", "model.train()"),
        ("gradients in evaluation", "@torch.no_grad()\n", ""),
        ("evaluation that trains", "model.eval()", "model.eval(); model.table.sub_(0.1)"),
        ("padding counted", "total / (y != -100).sum().item()", "total / y.numel()"),
        ("end left out", "total = 0.0", "total, x, y = 0.0, x[:-1], y[:-1]"),
        ("mean of means", "total / (y != -100).sum().item()", "sum(model(a, b)[1] for a, b in zip("
         "x.split(batch_size), y.split(batch_size))).item() / len(x.split(batch_size))"),
        ("targets not shifted", "F.pad(tokens[1:]", "F.pad(tokens[:-1]"),
        ("not spread", "torch.linspace(0, len(x) - 1, eval_iters * batch_size).long()",
         "torch.arange(eval_iters * batch_size)")],
    "orthogonalize": [
        ("4 rounds", "range(5)", "range(4)"),
        ("not normalized", "x / x.norm().clamp(min=1e-7)", "x"),
        ("not transposed back", "(matrix.T).T", "(matrix.T)")],
    "Muon": [
        ("average missing", "p.grad.lerp(average, 0.95)", "p.grad"),
        ("average missing", 'self.state[p].setdefault("average", torch.zeros_like(p))', "p * 0"),
        ("weight decay missing", 'p.mul_(1 - group["lr"] * group["weight_decay"])', "pass"),
        ("wrong direction", "p.sub_(", "p.add_(")],
    "make_optimizers": [
        ("parameters left out", "[decay, no_decay]", "[decay]"),
        ("weight decay", '"weight_decay": 0.0', '"weight_decay": WEIGHT_DECAY'),
        ("wrong optimizer", "model.blocks.parameters()", "model.parameters()")],
    "get_lr": [
        ("off by one", "(step + 1)", "step"),
        ("off by one", "(max_iters - step)", "(max_iters - step - 1)"),
        ("never falls", "FINAL_LR + (1 - FINAL_LR) * left", "1"),
        ("no warm-up", "min((step + 1) / warmup, FINAL_LR", "min(1, FINAL_LR"),
        ("FINAL_LR ignored", "FINAL_LR + (1 - FINAL_LR) * left", "left"),
        ("warm-up too long", "min(WARMUP_ITERS, max_iters // 10)", "WARMUP_ITERS")],
    "train_step": [
        ("gradients not zeroed", "optimizer.zero_grad()", "pass"),
        ("gradients zeroed before the step", "optimizer.step()",
         "optimizer.zero_grad(); optimizer.step()"),
        ("step before backward", "    loss.backward()\n" + CLIP + STEP, STEP + "        if "
         "optimizer is optimizers[-1]:\n            loss.backward()\n"),
        ("learning rate not set", "group[\"lr\"] = lr", "pass"),
        ("clipping missing", CLIP[4:-1], "pass"),
        ("clipping after the step", CLIP + STEP, STEP + "    " + CLIP),
        ("dropout off in training", "model.train()", "model.eval()"),
        ("loss after the step", "return loss.detach()", "return model(x, y)[1].detach()")],
    "train": [
        ("validation text", 'splits["train"], BATCH', 'splits["val"], BATCH'),
        ("learning rate of another step", "get_lr(step, ", "get_lr(step + 1, "),
        ("not resumed to the bit", "torch.manual_seed(flags.seed * 1_000_000 + step)", "pass"),
        ("saving", "if step >= first_save:\n                    save_run", "if True:\n"
         "                    save_run")],
    "next_token_probabilities": [
        ("temperature multiplied", "(logits - logits.max()) / max(temperature, 1e-9)",
         "logits * temperature"),
        ("temperature 0 divides by zero", "max(temperature, 1e-9)", "temperature"),
        ("first token over the threshold dropped", "kept[1:][kept.cumsum(0)[:-1] >=",
         "kept[kept.cumsum(0) >="),
        ("top-k keeps k + 1", "min(top_k or V, V)", "min((top_k or V) + 1, V)"),
        ("not back in place", "torch.zeros(V).scatter(0, ids, kept / kept.sum())",
         "F.pad(kept / kept.sum(), (0, V - len(kept)))"),
        ("sum is not 1", "ids, kept / kept.sum())", "ids, kept)")],
    "generate": [
        ("prompt lost", "ids[-model.block_size :]", "ids[-1:]"),
        ("prompt yielded", "    for _ in range(max_new_tokens)",
         "    yield from ids\n    for _ in range(max_new_tokens)"),
        ("context not cropped", "ids[-model.block_size :]", "ids"),
        ("context cropped at the wrong end", "ids[-model.block_size :]", "ids[: model.block_size]"),
        ("always argmax", "torch.multinomial(probabilities, 1)", "probabilities.argmax()"),
        ("caller's list changed", "[int(i) for i in ids]", "ids"),
        ("wrong position", "logits[0, -1]", "logits[0, 0]"),
        ("options ignored", "logits[0, -1], temperature, top_k, top_p", "logits[0, -1]"),
        ("dropout on in evaluation", "model.eval()", "model.train()"),
        ("gradients in evaluation", "@torch.no_grad()\n", "")],
}
MISTAKES = [(piece, *edit) for piece, edits in EDITS.items() for edit in edits]

SOURCES = '''
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = sorted({*text})
        self.vocab_size = len(self.vocabulary)
        self.stoi = dict(zip(self.vocabulary, range(self.vocab_size)))
---
class Tokenizer:
    def encode(self, text):
        try:
            return list(map(self.stoi.__getitem__, text))
        except KeyError as error:
            raise UserError(f"unknown: {error}")
---
class Tokenizer:
    def decode(self, ids):
        text = ""
        for i in ids:
            text += self.vocabulary[i]
        return text
---
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.LongTensor(tokenizer.encode(text))
    n = round(train_share * len(ids))
    return dict(zip(["train", "val"], ids.split([n, len(ids) - n])))
---
def split_text(text, tokenizer, train_share, block_size):
    n = int(len(text) * train_share)
    val, train = tokenizer.encode(text[n:]), tokenizer.encode(text[:n])
    return {"val": torch.tensor(val), "train": torch.tensor(train)}
---
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor([tokenizer.stoi[c] for c in text])
    first = torch.arange(len(ids)) < train_share * len(ids)
    return {"train": ids[first], "val": ids[~first]}
---
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return x.to(device), y.to(device)
---
def get_batch(tokens, batch_size, block_size, device):
    pairs = tokens.unfold(0, block_size + 1, 1)
    w = pairs[torch.randint(0, len(pairs), [batch_size])].to(device)
    return [w[:, :block_size], w[:, 1:]]
---
def get_batch(data, B, T, device):
    x = torch.empty(B, T, dtype=torch.long)
    y = torch.empty_like(x)
    for row in range(B):
        start = int(torch.rand(1) * (len(data) - T))
        for t in range(T):
            x[row, t], y[row, t] = data[start + t], data[start + t + 1]
    return x, y
---
class Head:
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
---
class Head:
    def forward(self, q, k, v):
        T = q.size(2)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * k.size(-1) ** -0.5
        scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(3), v)
---
class Head:
    def forward(self, q, k, v):
        rows = []
        for t in range(q.shape[2]):
            w = ((k[:, :, : t + 1] * q[:, :, t : t + 1]).sum(-1) / math.sqrt(q.shape[3])).exp()
            rows.append((w[..., None] * v[:, :, : t + 1]).sum(2) / w.sum(-1, keepdim=True))
        return torch.stack(rows, 2)
---
class MultiHead:
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.h = n_heads
        self.query, self.key, self.value = (nn.Linear(n_embed, n_embed) for _ in range(3))
        self.out, self.drop = nn.Linear(n_embed, n_embed), nn.Dropout(dropout)
    def forward(self, x):
        parts = self.query(x), self.key(x), self.value(x)
        q, k, v = (p.unflatten(-1, (self.h, -1)).permute(0, 2, 1, 3) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.out(torch.cat(y.unbind(1), dim=-1)))
---
class OneHead(nn.Module):
    def __init__(self, C, hs):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, hs, bias=False) for _ in range(3))
    def forward(self, x):
        w = self.query(x) @ self.key(x).mT * self.key.out_features**-0.5
        return (w + torch.full_like(w, -math.inf).triu(1)).softmax(-1) @ self.value(x)
class MultiHead:
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.heads = nn.ModuleList([OneHead(n_embed, n_embed // n_heads) for _ in range(n_heads)])
        self.proj, self.p = nn.Linear(n_embed, n_embed), dropout
    def forward(self, x):
        out = self.proj(torch.cat([h(x) for h in self.heads], dim=-1))
        return F.dropout(out, self.p, self.training)
---
class MultiHead:
    def forward(self, x):
        w = self.qkv.weight.view(3, self.n_heads, -1, x.shape[-1])
        heads = self.head(*torch.einsum("btc,rhdc->rbhtd", x, w))
        p = self.projection
        out = torch.einsum("bhtd,chd->btc", heads, p.weight.view(len(p.weight), self.n_heads, -1))
        return self.dropout(out + p.bias)
---
class FeedForward:
    def __init__(self, n_embed, dropout):
        super().__init__()
        wide, narrow = nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed)
        self.net = nn.Sequential(wide, nn.ReLU(), narrow, nn.Dropout(dropout))
    def forward(self, x):
        return self.net(x)
---
class FeedForward:
    def forward(self, x):
        x = torch.einsum("btc,dc->btd", x, self.expand.weight) + self.expand.bias
        x = torch.where(x > 0, x, 0) @ self.shrink.weight.T + self.shrink.bias
        return self.dropout(x)
---
class FeedForward:
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n_embed, 4 * n_embed))
        self.b = nn.Parameter(torch.randn(4 * n_embed, n_embed))
        self.dropout = dropout
    def forward(self, x):
        return F.dropout((x @ self.a).clamp(min=0) @ self.b, self.dropout, self.training)
---
class Block:
    def forward(self, x):
        x = self.attention(self.ln1(x)) + x
        x += self.feed_forward(self.ln2(x))
        return x
---
class Block:
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        parts = [FeedForward(n_embed, dropout), MultiHead(n_embed, n_heads, dropout)]
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(map(nn.LayerNorm, [n_embed] * 2))
    def forward(self, x):
        for part, norm in zip(reversed(self.parts), reversed(self.norms)):
            x = x + part(norm(x))
        return x
---
def add(x, f, norm):
    return x + f(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias))
class Block:
    def forward(self, x):
        return add(add(x, self.attention, self.ln1), self.feed_forward, self.ln2)
---
class LM:
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.block_size, self.dropout = block_size, nn.Dropout(dropout)
        self.token_embedding = nn.Embedding(vocab_size, n_embed)
        self.position_embedding = nn.Embedding(block_size, n_embed)
        blocks = [Block(n_embed, n_heads, dropout) for _ in range(n_layers)]
        self.blocks, self.ln_f = nn.Sequential(*blocks), nn.LayerNorm(n_embed)
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)
        self.apply(self.start)
    def start(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
--- LM.forward
class LM:
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(T))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.reshape(-1))
--- LM.forward
class LM:
    def forward(self, idx, targets=None):
        one_hot = F.one_hot(idx, len(self.token_embedding.weight)).float()
        places = self.position_embedding.weight[None, : idx.shape[1]]
        x = self.blocks(self.dropout(one_hot @ self.token_embedding.weight + places))
        logits, loss = F.linear(self.ln_f(x), self.lm_head.weight), None
        if targets is not None:
            loss = F.cross_entropy(logits.transpose(1, 2), targets)
        return logits, loss
--- LM.forward
class LM:
    def forward(self, idx, targets=None):
        x = self.token_embedding(idx)
        x = self.dropout(x + self.position_embedding.weight[: x.shape[1]])
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        known = targets >= 0
        losses = logits.logsumexp(-1) - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return logits, (losses * known).sum() / known.sum()
---
@torch.inference_mode()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    T, total, count = model.block_size, 0, 0
    starts = list(range(0, len(tokens) - 1, T))
    n = (eval_iters or 0) * batch_size
    if 0 < n < len(starts):
        starts = [starts[i * (len(starts) - 1) // (n - 1)] for i in range(n)]
    full = [i for i in starts if i + T < len(tokens)]
    groups = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    for group in groups + [[i] for i in starts if i not in full]:
        x = torch.stack([tokens[i : i + T + 1] for i in group])
        total += model(x[:, :-1], x[:, 1:])[1] * x[:, 1:].numel()
        count += x[:, 1:].numel()
    return {"loss": (total / count).item()}
---
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.train(False)
    T, n = model.block_size, len(tokens) - 1
    rows = torch.arange(0, n, T)
    if eval_iters is not None and len(rows) > eval_iters * batch_size:
        rows = rows[torch.linspace(0, len(rows) - 1, eval_iters * batch_size).round().int()]
    at = rows[:, None] + torch.arange(T)
    losses = []
    with torch.no_grad():
        for i in at.split(batch_size):
            logits, _ = model(tokens[i.clamp(max=n)], None)
            each = F.cross_entropy(logits.mT, tokens[(i + 1).clamp(max=n)], reduction="none")
            losses.append(each[i < n])
    return {"loss": float(torch.cat(losses).mean())}
---
def orthogonalize(matrix):
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrix.bfloat16() / (matrix.norm() + 1e-7)
    if matrix.size(0) > matrix.size(1):
        X = X.T
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return (X.T if matrix.size(0) > matrix.size(1) else X).float()
---
def orthogonalize(matrix):
    x = matrix / max(float((matrix**2).sum() ** 0.5), 1e-7)
    for _ in range(5):
        s = torch.einsum("ij,kj->ik", x, x)
        x = 3.4445 * x - 4.775 * s @ x + 2.0315 * s @ (s @ x)
    return x
---
def orthogonalize(matrix):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (torch.linalg.norm(s) + 1e-7)
    for _ in range(5):
        s = s * (3.4445 + s**2 * (2.0315 * s**2 - 4.775))
    return u @ torch.diag(s) @ v
---
class Muon:
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "buffer" not in self.state[p]:
                    self.state[p]["buffer"] = torch.zeros_like(p)
                self.state[p]["buffer"].mul_(0.95).add_(p.grad)
                update = orthogonalize(p.grad + 0.95 * self.state[p]["buffer"])
                p *= 1 - group["lr"] * group["weight_decay"]
                p -= group["lr"] * 0.2 * math.sqrt(max(p.shape)) * update
---
class Muon:
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    m = self.state[p]["m"] = 0.95 * self.state[p].get("m", 0) + 0.05 * p.grad
                    turned = orthogonalize(0.05 * p.grad + 0.95 * m) * 0.2 * max(p.size()) ** 0.5
                    p.copy_(p - group["lr"] * (group["weight_decay"] * p + turned))
---
def make_optimizers(model):
    groups = {"muon": [], "decay": [], "plain": []}
    for name, p in model.named_parameters():
        kind = "plain" if p.ndim < 2 else "muon" if name.startswith("blocks.") else "decay"
        groups[kind].append(p)
    plain = {"params": groups["plain"], "weight_decay": 0.0}
    rest = [plain, {"params": groups["decay"]}]
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return [adamw, Muon(groups["muon"], dict(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY))]
---
def make_optimizers(model):
    inside = [p for p in model.blocks.parameters() if p.dim() > 1]
    rest = {*model.parameters()} - {*inside}
    each = [{"params": [p], "weight_decay": WEIGHT_DECAY * (p.dim() > 1)} for p in rest]
    return torch.optim.AdamW(each, betas=BETAS), Muon(inside, {"weight_decay": WEIGHT_DECAY})
---
def get_lr(step, max_iters, peak):
    warmup = max(1, min(WARMUP_ITERS, max_iters // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - (warmup - 1)) / (max_iters - (warmup - 1))
    return peak + done * (FINAL_LR * peak - peak)
---
def get_lr(step, max_iters, peak):
    warmup = max(min(WARMUP_ITERS, int(0.1 * max_iters)), 1)
    rise = torch.linspace(peak / warmup, peak, warmup).tolist()
    fall = torch.linspace(peak, FINAL_LR * peak, max_iters - warmup + 2).tolist()
    return (rise + fall[1:])[step]
---
def train_step(model, optimizers, x, y, lr):
    model.train()
    model.zero_grad()
    logits, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = lr
    for o in optimizers:
        o.step()
    return loss.item()
---
def train_step(model, optimizers, x, y, lr):
    model.train(True)
    [o.zero_grad(set_to_none=False) for o in optimizers]
    loss = model(x, y)[-1]
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum((g**2).sum() for g in grads) ** 0.5
    for g in grads:
        g *= min(1, (GRADIENT_CLIP or math.inf) / norm)
    [group.update(lr=lr) for o in optimizers for group in o.param_groups]
    [o.step() for o in optimizers]
    return loss.detach()
---
def train(model, tokenizer, splits, flags, text_id):
    optimizers, begin = make_optimizers(model), time.perf_counter()
    device = next(model.parameters()).device
    first, history = load_training_state(optimizers, text_id) if flags.resume else (0, {})
    for step in range(first, flags.max_iters + 1):
        if step % EVAL_INTERVAL == 0 or step == flags.max_iters or not history:
            history[step] = evaluate(model, tokenizer, splits, flags.prompt, step)
            if step > first or step == flags.max_iters:
                save_run(model, tokenizer, optimizers, history, text_id, begin)
        if step < flags.max_iters:
            torch.manual_seed(hash((flags.seed, step)))
            batch = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
            train_step(model, optimizers, *batch, get_lr(step, flags.max_iters, LEARNING_RATE))
    model.load_state_dict(load_checkpoint(NAME + ".pt", device)[0].state_dict())
    return {"steps": step, "seconds": time.perf_counter() - begin, "tokens_per_second": 0.0}
---
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.sort()[0][-top_k:][0], -math.inf)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -math.inf)
    return logits.softmax(-1)
---
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = [math.exp((x - max(logits.tolist())) / max(temperature, 1e-8)) for x in logits.tolist()]
    p = [x / sum(p) for x in p]
    order, kept, total = sorted(range(len(p)), key=lambda i: -p[i])[:top_k], [], 0.0
    for i in order:
        if top_p is None or total < top_p:
            kept.append(i)
            total += p[i]
    return torch.tensor([x / total if i in kept else 0.0 for i, x in enumerate(p)])
---
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = ((logits.double() - logits.max()) / (temperature or 1e-12)).softmax(0)
    if top_k and top_k < len(p):
        p[p < p.sort()[0][-top_k]] = 0
    if top_p:
        p[torch.stack([p[p > x].sum() for x in p]) >= top_p * p.sum()] = 0
    return (p / p.sum()).float()
---
@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    x = torch.tensor(ids)[None]
    for _ in range(max_new_tokens):
        logits = model(x[:, -model.block_size :])[0][:, -1, :]
        p = next_token_probabilities(logits[0], temperature, top_k, top_p)
        x = torch.cat([x, torch.multinomial(p, num_samples=1)[None]], dim=1)
        yield x[0, -1].item()
---
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.train(False)
    window, result = [*ids][-model.block_size :], []
    while len(result) < max_new_tokens:
        last = model(torch.tensor(window).view(1, -1))[0].squeeze(0)[-1]
        p = next_token_probabilities(last, temperature, top_k, top_p)
        result.append(int(torch.distributions.Categorical(p).sample()))
        window = (window + result[-1:])[-model.block_size :]
    return result
---
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    text = tuple(ids)
    model.eval()
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits, _ = model(torch.tensor([text[max(0, len(text) - model.block_size) :]]))
        p = next_token_probabilities(logits[0][-1], temperature, top_k, top_p)
        text += (int((p.cumsum(0) < torch.rand(1)).sum().clamp(max=len(p) - 1)),)
        yield text[-1]
'''
VARIANTS = []
for part in SOURCES.split("\n---"):
    label, _, source = part.partition("\n")
    last = [node.name for node in ast.parse(source).body][-1]  # a helper may come before
    VARIANTS.append((label.strip() or last, source))
