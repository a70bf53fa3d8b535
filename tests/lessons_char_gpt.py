"""The pieces of char_gpt.py: how each is graded, mistakes that must be named, other solutions."""

# ruff: noqa: E731
# fmt: off
import argparse
import itertools
import math
from collections import defaultdict
from contextlib import suppress

import torch
import torch.nn.functional as F
from lessons import Piece, Wrong, close, diagnose, numbers, randomize, require, table
from torch import nn


# --- Data -----------------------------------------------------------------------------------------
def grade_tokenizer(gpt):
    text, right = "to be, or not", " ,benort"
    tokenizer = gpt.Tokenizer(text)
    got = "".join(tokenizer.vocabulary)
    unsorted = sorted(got) == [*right] != [*got]
    require(not unsorted, f"vocabulary not sorted: {got!r}. A saved model would get other ids")
    got = [tokenizer.vocab_size, *tokenizer.encode("bet")]
    diagnose(got, [8, 2, 3, 7], what="vocab_size and ids of 'bet'")
    back = tokenizer.decode(tokenizer.encode(text))
    require(back == text, f"decode: {back!r} comes back from the ids of {text!r}")
    with suppress(gpt.UserError):
        raise Wrong(f"unknown characters dropped: encode('bét') gives {tokenizer.encode('bét')}, "
                    "without a UserError. The model would answer another prompt")


def grade_split_text(gpt):
    text, ids = "".join(map(chr, range(40, 100))), torch.arange(60)  # 60 different characters
    parts = gpt.split_text(text, gpt.Tokenizer(text), 0.75, 4)
    both = len({*map(int, parts["train"])} & {*map(int, parts["val"])})
    require(not both, f"validation overlaps training: it shares {both} tokens, known by heart")
    wrong = (ids[45:], ids[:15], ids[15:]), "training has the first 45 of 60, not the others"
    diagnose(parts["train"], ids[:45], {"split the wrong way round": wrong}, what="training part")
    diagnose(parts["val"], ids[45:], what="validation part")


def grade_get_batch(gpt):
    call = lambda n: gpt.get_batch(torch.arange(n), 64, 4, "cpu")
    x, y = call(10_000)
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}, {y.dtype} instead of int64")
    diagnose(x, x[:, :1] + torch.arange(4), what="window")
    example = f"x = {x[0].tolist()}, y = {y[0].tolist()}. The model "
    diagnose(y, x + 1, {
        "targets not shifted": (x, example + "learns to repeat its input"),
        "targets shifted twice": (x + 2, example + "never learns the next token"),
    }, what="target")
    left = {*range(26)} - {i for _ in range(20) for i in call(30)[0][:, 0].tolist()}
    require(not left, f"windows left out: of 30 tokens, none starts at {left}. Draw 0 to N - T - 1")


# --- Model ----------------------------------------------------------------------------------------
def attention(q, k, v, mask="causal", scale=None, dim=-1):
    """Attention in plain steps. The options are the mistakes."""
    scores = torch.einsum("...qd,...kd->...qk", q, k) * (scale or q.shape[-1] ** -0.5)
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    hide = {"causal": future, "transposed": future.T}.get(mask, future & False)
    weights = (scores.tril() if mask == "zero" else scores.masked_fill(hide, -1e9)).softmax(dim)
    return (weights.tril() if mask == "after" else weights) @ v


def grade_head(gpt):
    q, k, v = numbers(3, 2, 3, 5, 4)
    rows = (
        ("mask missing", "mask", [None], "position t sees token t + 1, its target, and copies it"),
        ("mask transposed", "mask", ["transposed"], "positions see the future only: use triu(1)"),
        ("mask after the softmax", "mask", ["after"], "the weights of a row no longer have sum 1"),
        ("mask of 0 instead of -inf", "mask", ["zero"], "exp(0) = 1: the future keeps a weight"),
        ("scale missing", "scale", [1.0], "scores are too large: one token gets almost all weight"),
        ("scale by the wrong root", "scale", [12**-0.5, 0.25], "divide by √hs = 2, not √C or hs"),
        ("softmax over the wrong dimension", "dim", [0, 1, 2], "each row must have sum 1: dim=-1"),
    )
    diagnose(gpt.Head()(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), {
        name: (tuple(attention(q, k, v, **{option: value}) for value in values), why)
        for name, option, values, why in rows})


def check_dropout(make, *inputs):
    """Require that dropout acts in training, and never in evaluation."""
    first = lambda out: out[0] if isinstance(out, tuple) else out
    differ = lambda layer: not close(first(layer(*inputs)), first(layer(*inputs)))
    require(differ(make(0.5).train()), "dropout missing: in training, two calls do not differ")
    require(not differ(make(0.5).eval()), "dropout on in evaluation: two calls differ after "
            "model.eval(). Use nn.Dropout, or F.dropout with self.training")
    require(not differ(make(0.0).train()), "dropout ignores its argument: 0.0 drops numbers, too")


def multi_heads(layer, x, H, mistake=""):
    """Return the results of MultiHead, for each way in which its layers may hold q, k and v."""
    (B, T, C), results = x.shape, []
    layers = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features == C]
    for output, at in itertools.product([m for m in layers if m.out_features == C], (2, 3)):
        parts = torch.cat([m(x) for m in layers if m is not output], -1)
        parts = parts.unflatten(-1, (3, H, -1) if at == 2 else (H, 3, -1)).unbind(at)
        for qkv in itertools.permutations(parts):
            cut = lambda p: p.reshape(B, H, T, -1) if mistake == "split" else p.transpose(1, 2)
            out = F.scaled_dot_product_attention(*map(cut, qkv), is_causal=True)
            out = (out if mistake == "join" else out.transpose(1, 2)).reshape(B, T, C)
            results.append(out if mistake == "mix" else output(out))
    return tuple(results)


def grade_multi_head(gpt, *more):
    """`more` are arguments that other scripts have."""
    x, make = numbers(2, 5, 12), lambda dropout: randomize(gpt.MultiHead(12, 3, dropout, *more))
    layer = make(0.0).eval()
    got, n = layer(x), sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    require(n == 4 * 12 * 12, f"wrong width: q, k, v, projection: 4 C · C = 576 numbers, not {n}")
    diagnose(got, multi_heads(layer, x, 3) or got, {
        name: (multi_heads(layer, x, 3, mistake), why) for name, mistake, why in (
            ("heads in the wrong axis", "join", "first transpose(1, 2), then reshape(B, T, C)"),
            ("heads split in the wrong axis", "split", "view(B, T, H, hs), then transpose(1, 2)"),
            ("projection missing", "mix", "the results of the heads are not mixed"),
        )
    })
    past = layer(torch.cat([x[:, :-1], x[:, -1:] + 1], 1))[:, :-1]
    require(close(past, got[:, :-1]), "mask missing: positions see later ones")
    check_dropout(make, x)


def grade_feed_forward(gpt, activation=F.relu):
    x, make = numbers(2, 3, 6), lambda dropout: randomize(gpt.FeedForward(6, dropout))
    layer, f, name = make(0.0).eval(), activation, activation.__name__
    layers = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    layers = {(m.in_features, m.out_features): m for m in layers}
    require({*layers} == {(6, 24), (24, 6)}, f"wrong width: {[*layers]}. It is C to 4 C, and back")
    a, b = layers[6, 24], layers[24, 6]
    diagnose(layer(x), b(f(a(x))), {
        f"{name} missing": (b(a(x)), "two linear layers in a row are one linear layer"),
        f"{name} on the result": ((f(b(a(x))), f(b(f(a(x))))), "it belongs between the layers"),
    })
    check_dropout(make, x)


def grade_block(gpt, *more):
    """`more` are arguments that other scripts have."""
    x, make = numbers(2, 5, 12), lambda dropout: randomize(gpt.Block(12, 3, dropout, *more))
    block, kinds = make(0.0).eval(), (nn.LayerNorm, gpt.MultiHead, gpt.FeedForward)
    parts = [[m for m in block.modules() if isinstance(m, kind)] for kind in kinds]
    n = [*map(len, parts)]
    require(n == [2, 1, 1], f"parts: {n} of LayerNorm, MultiHead, FeedForward, not [2, 1, 1]")
    norms, (f,), (g,) = parts
    forms = lambda *ways: tuple(second(first(x, f, a), g, b) for first, second, (a, b) in
                                itertools.product(ways, ways, (norms, norms[::-1])))
    right, lost = (lambda x, f, ln: x + f(ln(x))), (lambda x, f, ln: f(ln(x)))
    after = (lambda x, f, ln: x + ln(f(x))), (lambda x, f, ln: ln(x + f(x)))
    diagnose(block(x), forms(right), {
        "LayerNorm after": (forms(right, *after), "it is x + f(ln(x)): f needs a steady input"),
        "LayerNorm missing": (forms(right, lambda x, f, ln: x + f(x)), "f's input has any size"),
        "residual left out": (forms(right, lost), "f(ln(x)) alone: x is lost, and its gradient"),
    })
    check_dropout(make, x)


def grade_lm_init(gpt):
    V, T, C = 65, 7, 32
    config = dict(vocab_size=V, block_size=T, n_embed=C, n_heads=4, n_layers=2, dropout=0.5)
    model, size = gpt.LM(**config), lambda m: sum(p.numel() for p in m.parameters())
    require(model.config == config, f"config: it is {model.config}, and should be {config}")
    n = len([m for m in model.modules() if isinstance(m, gpt.Block)])
    require(n == 2, f"blocks: {n} instead of 2. `[Block(...)] * n` is n times the same block")
    right = 2 * V * C + T * C + 2 * C + 2 * size(gpt.Block(C, 4, 0.5))
    require(size(model) == right, f"parameters: {size(model)}, not {right}. lm_head has no bias")
    require("p=0.0" not in f"{model}", "dropout missing: some layers got 0.0 instead of `dropout`")
    std, loss = model.lm_head.weight.std().item(), model.eval()(*torch.randint(V, (2, 64, T)))[1]
    require(0.018 < std < 0.022, f"initialisation: lm_head has the standard deviation {std:.3f}, "
            f"not 0.02. The loss starts at {loss:.2f}, not just above ln V = {math.log(V):.2f}")


def grade_lm_forward(gpt):
    B, T, V, C = 3, 4, 11, 8
    model = randomize(gpt.LM(V, 6, C, 2, 1, 0.0)).eval()
    idx, targets = torch.randint(V, (2, B, T))
    tokens, positions = model.token_embedding.weight[idx], model.position_embedding.weight[:T]
    end = lambda x: model.ln_f(model.blocks(x)) @ model.lm_head.weight.T
    (logits, _), (_, loss) = model(idx), model(idx, targets)
    wrong = end(tokens), "the first block sees 'abc' and 'bac' alike: add position_embedding"
    diagnose(logits, end(tokens + positions), {"position left out": wrong}, what="logits")
    mean = lambda p, y: -p.log().flatten(0, 1)[range(y.numel()), y.flatten()].mean()
    p, once = logits.softmax(-1), "cross_entropy contains the softmax. Twice, p is nearly uniform"
    diagnose(loss, mean(p, targets), {
        "softmax before cross_entropy": (mean(p.softmax(-1), targets), once),
        "logits and targets flattened in different orders": ((mean(p.transpose(0, 1), targets),
            mean(p, targets.T)), "row i of the logits meets the target of another token"),
        "targets shifted twice": (mean(p[:, :-1], targets[:, 1:]), "get_batch has shifted them"),
    }, what="loss")
    known, targets[:, 2:] = mean(p[:, :2], targets[:, :2]), -100
    wrong = {"padding counted": (known / 2, "-100 is neither in the sum nor in the count")}
    diagnose(model(idx, targets)[1], known, wrong, what="loss with targets of -100")
    check_dropout(lambda rate: randomize(gpt.LM(V, 6, C, 2, 0, rate)), idx)


# --- Training -------------------------------------------------------------------------------------
class Bigram(nn.Module):
    """A model of one table: logits[last token]. It notes what it sees, and how it is called."""

    def __init__(self, table, block_size=4):
        super().__init__()
        self.table, self.block_size = nn.Parameter(table.clone()), block_size
        self.config = {"block_size": block_size, "vocab_size": len(table)}
        self.seen, self.modes, self.gradients = [], [], []

    def forward(self, idx, targets=None):
        self.seen.append(idx)
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        logits = self.table[idx]
        return logits, None if targets is None else F.cross_entropy(logits.mT, targets)

    def check_evaluation(self):
        require(not any(self.modes), "dropout on in evaluation: call model.eval() first")
        require(not any(self.gradients), "gradients in evaluation: add @torch.no_grad()")


def grade_estimate_loss(gpt):
    start, tokens = numbers(402, 402), torch.arange(23)  # 22 targets: 5 windows of 4, one of 2
    model = Bigram(start).train()
    got = gpt.estimate_loss(model, tokens, 2)["loss"]
    model.check_evaluation()
    require(model.table.equal(start), "evaluation that trains: the parameters have changed")
    each, other = -start.log_softmax(-1)[range(22), range(1, 23)], -start.log_softmax(-1)[22, 0]
    means = torch.stack([part.mean() for part in each.split(8)])
    padded = each.sum() / 24, (each.sum() + 2 * other) / 24
    diagnose(got, each.mean().item(), {
        "padding counted": (padded, "2 of 24 places are empty: divide by the 22 tokens"),
        "mean of means": (means.mean(), "the last batch is smaller: weight it with its tokens"),
    }, what="loss")
    few = Bigram(start)
    gpt.estimate_loss(few, torch.arange(402), 2, 3)
    seen = torch.cat([idx[:, 0] for idx in few.seen])
    require(2 < len(seen) <= 6 and seen.max() > 300 > 100 > seen.min(), "not spread: with 402 "
            f"tokens and 3 batches of 2, windows start at {seen.tolist()}, and leave much out")


def grade_orthogonalize(gpt):
    def polar(matrix, rounds=5, norm=torch.linalg.norm):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / norm(s)
        for _ in range(rounds):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return (u * s) @ v

    for x in (numbers(4, 6), numbers(6, 4)):
        diagnose(gpt.orthogonalize(x), polar(x), {
            "not five rounds": (tuple(polar(x, n) for n in (1, 2, 3, 4, 6)), "range(5)"),
            "not normalized": (polar(x, norm=lambda s: 1), "factors above 1 explode: x / x.norm()"),
            "not transposed back": (polar(x).T, "a tall matrix must come back tall"),
        }, rtol=0.03, atol=0.03, what="orthogonalized matrix")


def grade_muon(gpt):
    start, gradients = numbers(2, 4, 6), numbers(3, 2, 4, 6)  # two matrices, three steps

    def steps(decay=0.5, momentum=0.95, turn=gpt.orthogonalize):
        p, average = start, 0
        for g in gradients:
            average = momentum * average + (1 - momentum) * g
            update = torch.stack([*map(turn, momentum * average + (1 - momentum) * g)])
            p = p * (1 - 0.1 * decay) - 0.1 * 0.2 * 6**0.5 * update
        return p

    matrices = [nn.Parameter(p.clone()) for p in start]
    optimizer = gpt.Muon(matrices, {"lr": 0.1, "weight_decay": 0.5})
    for pair in gradients.clone():
        matrices[0].grad, matrices[1].grad = pair
        optimizer.step()
    diagnose(torch.stack(matrices), steps(), {
        "weight decay missing": (steps(decay=0), "first multiply p by 1 - lr · weight_decay"),
        "average missing": (steps(momentum=0), "steps follow the last, noisy gradient alone"),
        "not orthogonalized": (steps(turn=lambda x: x), "the update is orthogonalize(...)"),
    }, what="matrices after 3 steps")


def grade_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, model = 0.25, gpt.LM(11, 6, 8, 2, 2, 0.0)
    owners = {p: (type(o).__name__, group["weight_decay"]) for o in gpt.make_optimizers(model)
              for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        require(p in owners, f"parameters left out: {name} never changes")
        right = "Muon" if p.dim() == 2 and name.startswith("blocks") else "AdamW"
        kind, decay = owners[p]
        require(kind == right, f"wrong optimizer: {name} is in {kind}, and should be in {right}")
        require(decay == 0.25 * (p.dim() == 2), f"weight decay: {name} has {decay}: only matrices")


def grade_get_lr(gpt):
    gpt.WARMUP_ITERS, gpt.FINAL_LR = 4, 0.1
    rates = lambda n: torch.tensor([float(gpt.get_lr(step, n, 2.0)) for step in range(n)])
    line, join = torch.linspace, lambda *parts: 2 * torch.cat(parts)
    up, down, fast = line(0.25, 1, 4), line(1, 0.1, 48)[1:-1], line(1, 0.1, 51)[:-1]
    diagnose(rates(50), join(up, down), {
        "off by one": (join(up - 0.25, down), "step 0 has the rate peak / warmup, not 0"),
        "never falls": (join(up, torch.ones(46)), "the parameters keep jumping around the minimum"),
        "no warm-up": ((join(fast), join(torch.ones(4), down)), "the first gradients are noisy"),
    }, what="rate by step")
    diagnose(rates(20), join(line(0.5, 1, 2), line(1, 0.1, 20)[1:-1]), what="rate of 20 steps")


def grade_train_step(gpt):
    x, y = torch.randint(7, (2, 3, 4))

    def descend(clips=(0.1, 0.1, 1e9), kept=0, rates=(0.5, 0.5, 0.5)):
        """Return the table after three steps of gradient descent. The options are the mistakes."""
        model, g = Bigram(numbers(7, 7)), 0
        for clip, rate in zip(clips, rates, strict=True):
            g = g * kept + torch.autograd.grad(model(x, y)[1], model.table)[0]
            g = g * min(1, clip / g.norm())
            model.table.data -= rate * g
        return model.table

    model, other = Bigram(numbers(7, 7)).eval(), nn.Parameter(numbers(3))  # it has no gradient
    optimizers, losses = [torch.optim.SGD([p], lr=9.0) for p in (model.table, other)], []
    for gpt.GRADIENT_CLIP in (0.1, 0.1, None):
        losses.append(float(gpt.train_step(model, optimizers, x, y, 0.5)))
    require(all(model.modes), "dropout off in training: call model.train() first")
    rates, late = [o.param_groups[0]["lr"] for o in optimizers], descend(rates=(9.0, 0.5, 0.5))
    require(rates == [0.5, 0.5] and not close(model.table, late), "learning rate not set: the step "
            'used 9.0, not lr = 0.5. Set group["lr"] in each optimizer, before its step')
    diagnose(model.table, descend(), {
        "step missing": (numbers(7, 7), "nothing changes. Is the gradient zeroed before the step?"),
        "clipping missing": (descend((1e9,) * 3), "cut the length of the gradient before the step"),
        "gradients not zeroed": (descend(kept=1), "the new gradient is added to the one before"),
    }, what="parameter after 3 steps")
    diagnose(losses[0], F.cross_entropy(numbers(7, 7)[x].mT, y), what="loss before the step")


def grade_train(gpt):
    best, splits = Bigram(torch.full((9, 9), 42.0)), dict(train=torch.arange(5), val=[0] * 6)
    gpt.EVAL_INTERVAL, gpt.BATCH_SIZE, gpt.get_lr = 2, 3, lambda *arguments: arguments
    gpt.make_optimizers, gpt.load_checkpoint = lambda *a: ["optimizer"], lambda *a: (best, "")

    def run(first, last):
        log, model = defaultdict(list), Bigram(numbers(9, 9))
        entry = lambda step: {name: {"loss": 9.0 - step} for name in ("val", "train")}
        note = lambda name, value, result=None: log[name].append(value) or result
        gpt.load_training_state = lambda *a: (first, {i: entry(i) for i in range(first + 1)})
        gpt.get_batch = lambda tokens, B, T, _: note("text", len(tokens)) or torch.rand(2, B, T)
        gpt.train_step = lambda model, optimizers, x, y, lr: note(
            "batch", x.tolist(), note("lr", lr[0], torch.tensor(1.0)))
        gpt.evaluate = lambda *a: note("eval", a[-1], torch.rand(1)) and entry(a[-1])
        gpt.save_run = lambda *a: note("save", max(*[x for x in a if isinstance(x, dict)]))
        flags = argparse.Namespace(max_iters=last, resume=first > 0, seed=7, prompt="a")
        result = gpt.train(model, "tokenizer", splits, flags, "text")
        require(model.table.equal(best.table), "best parameters: load those of NAME.pt at the end")
        diagnose(result["steps"], last, what="number of steps that is returned")
        return log

    log = run(0, 5)
    for name, right, mistake in (
        ("text", [5] * 5, "validation text: batches are of the training text. Their lengths"),
        ("lr", [0, 1, 2, 3, 4], "learning rate of another step: the steps that get_lr got"),
        ("eval", [0, 2, 4, 5], "evaluation: with EVAL_INTERVAL = 2, the steps"),
        ("save", [2, 4, 5], "saving: at step 0, it would replace an earlier run. The steps"),
    ):
        require(log[name] == right, f"{mistake} are {log[name]}, and should be {right}")
    require(run(3, 5)["batch"] == log["batch"][3:], "not resumed to the bit: a run that goes on "
            "from step 3 gets other batches. Seed each step with the seed and its number")


# --- Generation -----------------------------------------------------------------------------------
def grade_next_token_probabilities(gpt):
    p, share = torch.tensor([0.15, 0.5, 0.05, 0.3]), lambda kept: kept / kept.sum()
    keep = lambda *kept: p * torch.tensor([i in kept for i in range(4)])
    dropped = "first token over the threshold dropped"
    for options, right, mistake, wrong, why in (
        ({}, p, "", p, ""),
        ({"temperature": 0.5}, p**2, "temperature multiplied", p**0.5, "divide by it: below 1, "
            "likely tokens become likelier"),
        ({"temperature": 0}, keep(1), "temperature 0 ignored", p, "it keeps the likeliest token"),
        ({"top_k": 2}, keep(1, 3), "top-k keeps k + 1", keep(0, 1, 3), "2 tokens must remain"),
        ({"top_k": 9}, p, "", p, ""),
        ({"top_p": 0.6}, keep(1, 3), dropped, keep(1), "0.5 is below 0.6, so 0.3 is needed too"),
        ({"top_p": 0.4}, keep(1), dropped, keep(), "no token is left: keep 0.5, which reaches 0.4"),
    ):
        diagnose(gpt.next_token_probabilities(p.log() + 3, **options), share(right), {
            mistake: ((share(wrong), wrong), why),
            "sum is not 1": (right, "divide by the sum of those that are left"),
            "not back in place": (share(right).sort(descending=True)[0], "the result is sorted"),
        }, what=f"probabilities with {options}")


def grade_generate(gpt):
    V, T, ids = 30, 4, [3, 7, 8, 20, 21, 22]
    model, prompt = Bigram(50.0 * torch.eye(V).roll(1, 1), T).train(), list(ids)  # i, then i + 1
    got = [int(token) for token in gpt.generate(model, prompt, 3)]
    seen = [idx.flatten().tolist() for idx in model.seen]
    require(prompt == ids, f"caller's list changed: the prompt has become {prompt}. Work on a copy")
    for name, part in ("context not cropped", ids), ("prompt lost", seen[0]):
        right = seen[0] != part or part == ids[-T:]
        require(right, f"{name}: of {ids}, the model saw {part}. block_size is {T}: the last {T}")
    diagnose(got, [23, 24, 25], what="tokens")
    model.check_evaluation()
    flat = Bigram(torch.arange(8.0).expand(8, 8) / 8)
    draw = lambda **options: {int(token) for token in gpt.generate(flat, [0], 40, **options)}
    require(draw() != {7}, "always argmax: 40 tokens are all the likeliest one: torch.multinomial")
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        require(draw(**options) == {7}, f"options ignored: {options} gives unlikely tokens")


TASKS = table("""
Tokenizer | .__init__ .encode .decode | vocabulary, vocab_size, stoi; ids of a text, text of ids
split_text | ∅ | two parts of the text, in order
get_batch | ∅ | random windows, and the token after each
Head | .forward | softmax(q kᵀ / √hs) v, with a causal mask
MultiHead | .__init__ .forward | q, k, v in heads; Head; heads side by side; projection; dropout
FeedForward | .__init__ .forward | two layers with relu between them, and dropout
Block | .__init__ .forward | MultiHead, then FeedForward, each with LayerNorm and residual
LM | .__init__ | the layers that forward uses, config, block_size; lm_head with std 0.02
LM.forward | .forward | embeddings, blocks, ln_f, lm_head; the loss if there are targets
estimate_loss | ∅ | the mean loss of all tokens, or of eval_iters batches
orthogonalize | ∅ | divide by the norm, then five rounds
Muon | .step | average, orthogonalize, weight decay, step
make_optimizers | ∅ | Muon for the blocks' matrices, AdamW for the rest
get_lr | ∅ | a line up, then a line down
train_step | ∅ | loss, gradient, clipping, rate, step, zero
train | ∅ | steps, evaluations, saves, and the best model at the end
next_token_probabilities | ∅ | temperature, softmax, top_k, top_p
generate | ∅ | crop, predict, draw, append, yield
""")
GRADERS = [value for name, value in globals().items() if name.startswith("grade_")]  # in this order
PIECES = [
    Piece(name, " ".join(name.split(".")[0] + m for m in methods.split()) or name, grade, task)
    for (name, methods, task), grade in zip(TASKS, GRADERS, strict=True)
]

MISTAKES = table(r"""
Tokenizer | vocabulary not sorted | sorted(set(text))) | dict.fromkeys(text))
Tokenizer | unknown characters dropped | check(not unknown, | text = text.replace("é", ""); str(
split_text | split the wrong way round | "train": ids[:cut], "val" | "val": ids[:cut], "train"
split_text | validation overlaps training | ids[cut:]} | ids}
get_batch | targets not shifted | windows[:, 1:] | windows[:, :-1]
get_batch | targets shifted twice | (device)¶    return windows[:, :-1], windows[:, 1:] |
    (device)¶    return windows[:, :-1], windows[:, 1:] + 1
get_batch | windows left out | len(tokens) - block_size, | len(tokens) - block_size - 1,
Head | mask missing | scores + mask | scores
Head | mask transposed | .triu(1) | .tril(-1)
Head | mask after the softmax | scores + mask, dim=-1) | scores, dim=-1).tril()
Head | mask of 0 instead of -inf | scores + mask | scores.tril()
Head | scale missing | q / hs**0.5 | q
Head | scale by the wrong root | hs**0.5 | (q.shape[1] * hs) ** 0.5
Head | softmax over the wrong dimension | mask, dim=-1) | mask, dim=-2)
MultiHead | heads in the wrong axis | self.head(q, k, v).transpose(1, 2) | self.head(q, k, v)
MultiHead | heads split in the wrong axis | view(B, T, self.n_heads, -1).transpose(1, 2) |
    reshape(B, self.n_heads, T, -1)
MultiHead | dropout on in evaluation | self.dropout(self.projection(out)) |
    F.dropout(self.projection(out), self.dropout.p)
FeedForward | relu missing | F.relu(self.expand(x)) | self.expand(x)
FeedForward | dropout missing | self.dropout(self | (self
Block | residual left out | return x + | return
Block | LayerNorm after | self.feed_forward(self.ln2(x)) | self.ln2(self.feed_forward(x))
Block | LayerNorm missing | self.feed_forward(self.ln2(x)) | self.feed_forward(x)
LM | initialisation | std=0.02 | std=0.2
LM | blocks | (Block(n_embed, n_heads, dropout) for _ in range(n_layers)) |
    [Block(n_embed, n_heads, dropout)] * n_layers
LM.forward | position left out | + self.position_embedding.weight[: idx.shape[1]] | ∅
LM.forward | logits and targets flattened in different orders | (logits. | (logits.transpose(0, 1).
LM.forward | padding counted | targets.flatten()) | targets.flatten(), reduction="sum") / 12
LM.forward | dropout missing | self.dropout(x) | x
estimate_loss | dropout on in evaluation | model.eval() | model.train()
estimate_loss | gradients in evaluation | @torch.no_grad()¶ | ∅
estimate_loss | evaluation that trains | model.eval() | model.eval(); model.table.sub_(0.1)
estimate_loss | padding counted | total / (y != -100).sum().item() | total / y.numel()
orthogonalize | not five rounds | range(5) | range(4)
orthogonalize | not normalized | x / x.norm().clamp(min=1e-7) | x
Muon | average missing | p.grad.lerp(average, 0.95) | p.grad
Muon | weight decay missing | p.mul_(1 - group["lr"] * group["weight_decay"]) | pass
make_optimizers | parameters left out | [decay, no_decay] | [decay]
make_optimizers | wrong optimizer | model.blocks.parameters() | model.parameters()
get_lr | never falls | FINAL_LR + (1 - FINAL_LR) * left | 1
get_lr | no warm-up | min((step + 1) / warmup, FINAL_LR | min(1, FINAL_LR
train_step | gradients not zeroed | optimizer.zero_grad() | pass
train_step | learning rate not set | group["lr"] = lr | pass
train_step | clipping missing | GRADIENT_CLIP or math.inf | math.inf
train | validation text | splits["train"], BATCH | splits["val"], BATCH
train | not resumed to the bit | torch.manual_seed(flags.seed * 1_000_000 + step) | pass
next_token_probabilities | temperature multiplied | / max(temperature, 1e-9) | * temperature
next_token_probabilities | first token over the threshold dropped | kept[1:][kept.cumsum(0)[:-1] |
    kept[kept.cumsum(0)
next_token_probabilities | top-k keeps k + 1 | min(top_k or V, V) | min((top_k or V) + 1, V)
generate | prompt lost | ids[-model.block_size :] | ids[-1:]
generate | context not cropped | ids[-model.block_size :] | ids
generate | always argmax | torch.multinomial(probabilities, 1) | probabilities.argmax()
generate | caller's list changed | [int(i) for i in ids] | ids
generate | dropout on in evaluation | model.eval() | model.train()
""")

VARIANTS = table(r"""
Tokenizer | "".join(sorted(set(text))) | sorted({*text})
Tokenizer | self.vocabulary[i] for i in ids | map(self.vocabulary.__getitem__, ids)
Tokenizer | [self.stoi[character] for character in text] | list(map(self.stoi.get, text))
split_text | ids[:cut] | ids.split(cut)[0]
split_text | ids[cut:] | torch.stack([ids[i] for i in range(cut, len(ids))])
split_text | int(train_share * len(ids)) | round(len(text) * train_share)
get_batch | [starts + torch.arange(block_size + 1)] | .unfold(0, block_size + 1, 1)[starts[:, 0]]
get_batch | tokens[starts + torch.arange(block_size + 1)] |
    torch.stack([tokens[i : i + block_size + 1] for i in starts])
get_batch | torch.randint(len(tokens) - block_size, (batch_size, 1)) |
    (torch.rand(batch_size, 1) * (len(tokens) - block_size)).long()
Head | return weights @ v | return F.scaled_dot_product_attention(q, k, v, is_causal=True)
Head | weights @ v | torch.einsum("bhqk,bhkd->bhqd", weights, v)
Head | weights @ v | sum(weights[..., [t]] * v[:, :, [t]] for t in range(T))
MultiHead | self.head(q, k, v) | F.scaled_dot_product_attention(q, k, v, is_causal=True)
MultiHead | self.qkv(x).split(C, dim=-1) |
    torch.einsum("btc,rdc->rbtd", x, self.qkv.weight.view(3, C, C))
MultiHead | self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False) |
    self.three = nn.ModuleList([nn.Linear(n_embed, n_embed) for _ in range(3)])
    ¶        self.qkv = lambda x: torch.cat([layer(x) for layer in self.three], dim=-1)
FeedForward | F.relu(self.expand(x)) | self.expand(x).clamp(min=0)
FeedForward | F.relu(self.expand(x)) | torch.where((h := self.expand(x)) > 0, h, 0)
FeedForward | self.expand(x) | torch.einsum("btc,dc->btd", x, self.expand.weight) + self.expand.bias
Block | x + self.attention(self.ln1(x)) | self.attention(self.ln1(x)).add(x)
Block | self.ln2(x) | F.layer_norm(x, x.shape[-1:], self.ln2.weight, self.ln2.bias)
Block | x = x + self.attention(self.ln1(x))¶        return x + self.feed_forward(self.ln2(x)) | for
    f, ln in ((self.attention, self.ln1), (self.feed_forward, self.ln2)):¶            x = x +
    f(ln(x))¶        return x
LM | nn.init.normal_(self.lm_head.weight | nn.init.trunc_normal_(self.lm_head.weight
LM | nn.init.normal_(self.lm_head.weight, std=0.02) | self.lm_head.weight.data.normal_().div_(50)
LM | nn.init.normal_(self.lm_head.weight, std=0.02) |
    [nn.init.normal_(p, std=0.02) for p in self.parameters() if p.dim() == 2]
LM.forward | .weight[: idx.shape[1]] | (torch.arange(idx.shape[1]))
LM.forward | logits.flatten(0, 1), targets.flatten() | logits.mT, targets
LM.forward | self.lm_head(x).float() | torch.einsum("btc,vc->btv", x, self.lm_head.weight)
estimate_loss | @torch.no_grad() | @torch.inference_mode()
estimate_loss | (ys != -100).sum().item() | torch.einsum("bt->", (ys >= 0).float()).item()
estimate_loss | split(batch_size), y.split(batch_size) | split(1), y.split(1)
orthogonalize | square = x @ x.T | square = torch.einsum("ij,kj->ik", x, x)
orthogonalize | x.norm().clamp(min=1e-7) | (x.square().sum().sqrt() + 1e-7)
orthogonalize | + (-4.775 * square + 2.0315 * square @ square) @ x |
    - 4.775 * square @ x + 2.0315 * square @ (square @ x)
Muon | p.mul_(1 - | p.copy_(p - p *
Muon | average.lerp_(p.grad, 0.05) | average.mul_(0.95).add_(p.grad, alpha=0.05)
Muon | p.grad.lerp(average, 0.95) | torch.stack([p.grad * 0.05, average * 0.95]).sum(0)
make_optimizers | [p for p in model.blocks.parameters() if p.dim() == 2] |
    [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
make_optimizers | not any(p is matrix for matrix in matrices) | p not in {*matrices}
make_optimizers | betas=BETAS, fused=True | lr=LEARNING_RATE, betas=BETAS
get_lr | max(1, min(WARMUP_ITERS, max_iters // 10)) | min(WARMUP_ITERS, max_iters // 10) or 1
get_lr | (max_iters - step) / ( | 1 - (step + 1 - warmup) / (
get_lr | FINAL_LR + (1 - FINAL_LR) * left | left + FINAL_LR * (1 - left)
train_step | optimizer.zero_grad() | optimizer.zero_grad(set_to_none=False)
train_step | loss.backward() | model.zero_grad()¶    loss.backward()
train_step | return loss.detach() | return loss.item()
train | while True: | for step in range(step, flags.max_iters + 1):
train | flags.seed * 1_000_000 + step | hash((flags.seed, step)) % 2**40
train | f"{NAME}.pt", device)[0].state_dict() | f"{NAME}.pt", device)[0].cpu().state_dict()
next_token_probabilities | F.softmax((logits - logits.max()) / max(temperature, 1e-9), dim=-1) |
    ((logits.double() - logits.max()) / (temperature or 1e-9)).softmax(0).float()
next_token_probabilities | probabilities.topk(min(top_k or V, V)) |
    (part[:top_k] for part in probabilities.sort(descending=True))
next_token_probabilities | torch.zeros(V).scatter(0, ids, kept / kept.sum()) |
    torch.einsum("k,kv->v", kept / kept.sum(), F.one_hot(ids, V).float())
generate | multinomial(probabilities, 1) | distributions.Categorical(probabilities).sample()
generate | @torch.no_grad() | @torch.inference_mode()
generate | [int(i) for i in ids] | [*map(int, ids)]
""")
