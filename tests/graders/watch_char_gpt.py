"""Graders of char_gpt.py: each calls a piece, and yields (what, value).

Nothing is compared here. The values of a solution are compared with those of the original, and with
those of known mistakes (mistakes_char_gpt.py). See tests/GRADING.md."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from graders.student import (
    Near,
    Note,
    Sample,
    Varies,
    Wrong,
    entry,
    equal_numbers,
    fill,
    kind,
    numbers,
    numbers_by_size,
    outcome,
    random_parameters,
    size_of_matrices,
    tensor,
    two,
    watch_dropout,
)

# 40 different ids in no order: neither "the next id" nor "the place" is the next token.
TOKENS = torch.tensor([(i * 37 + 5) % 101 for i in range(40)])


# --- Data -----------------------------------------------------------------------------------------
def watch_tokenizer(gpt):
    text = "To be, or not to be?"
    tokenizer = gpt.Tokenizer(text)
    yield "vocabulary", "".join(tokenizer.vocabulary)
    yield "vocab_size", tokenizer.vocab_size
    yield "encode('bet')", tokenizer.encode("bet")
    yield "encode('')", tokenizer.encode("")
    yield "decode([4, 9, 4])", tokenizer.decode([4, 9, 4])
    yield (
        f"decode(encode({text!r}))",
        tokenizer.decode(tokenizer.encode(text)),
    )
    yield (
        "encode('bét'), with a character that the text lacks,",
        outcome(tokenizer.encode, "bét"),
    )


def watch_split_text(gpt):
    text = "".join(chr(40 + i * 7 % 61) for i in range(60))
    tokenizer = gpt.Tokenizer(text)
    gpt.TRAIN_SHARE, gpt.BLOCK_SIZE = 0.5, 8
    parts = gpt.split_text(text, tokenizer, 0.75, 4)
    for name in ("train", "val"):
        yield (
            f"{name} part",
            tensor(entry(parts, "split_text", name), f"split_text(...)[{name!r}]"),
        )
    yield "type of the ids", str(parts["train"].dtype)


def places_of(tokens, place):
    """Return the places of tokens in the text, -99 for what is none of it."""
    return [place.get(token, -99) for token in tokens]


def watch_get_batch(gpt, tokens=TOKENS):
    gpt.BATCH_SIZE, gpt.BLOCK_SIZE = 7, 3
    N, T = 12, 4
    text = tokens[:N]
    x, y = batch = two(gpt.get_batch(text, 256, T, "cpu"), "get_batch", "two tensors x, y")
    yield (
        "shapes of x and y",
        [list(tensor(part, "get_batch").shape) for part in batch],
    )
    yield "types of x and y", [str(x.dtype), str(y.dtype)]
    place = {token: i for i, token in enumerate(text.tolist())}
    rows = [places_of(row, place) for row in x.tolist()]
    first = sorted({row[0] for row in rows})
    yield (
        "x for the first of 256 windows of T = 4 is found in the text",
        min(first) >= 0,
    )
    steps = {tuple(token - row[0] for token in row) for row in rows}
    yield (
        "places of a row of x, counted from its first token",
        sorted(map(list, steps)),
    )
    targets = set()
    for row, target in zip(rows, y.tolist(), strict=True):
        targets.add(tuple(i - row[0] for i in places_of(target, place)))
    yield (
        "places of a row of y, counted from the first token of x",
        sorted(map(list, targets)),
    )
    yield "number of different places where 256 windows begin", len(first)
    yield "places where 256 windows of a text of 12 tokens begin", first
    calls = [gpt.get_batch(text, 4, T, "cpu") for _ in "123"]
    yield "three batches", Varies([x.tolist() for x, _ in calls])
    x, y = gpt.get_batch(tokens, 5, 6, "cpu")
    yield "shapes of x and y for other sizes", [list(x.shape), list(y.shape)]


# --- Model ----------------------------------------------------------------------------------------
def queries_keys_values():
    """Return q, k and v, of shape (2, 3, 5, 6)."""
    return [numbers(2, 3, 5, 6, seed=i) for i in range(3)]


def watch_head(gpt):
    inputs = queries_keys_values()
    q, k, v = inputs
    gpt.N_EMBED, gpt.N_HEADS, gpt.BLOCK_SIZE = 18, 3, 7
    before = [part.clone() for part in inputs]
    head = gpt.Head()
    yield "result", tensor(head(q, k, v), "Head")
    yield "q, k and v after the call (they must not change)", inputs
    q, k, v = before
    yield (
        "result for one token",
        tensor(head(*(part[:, :, :1] for part in before)), "Head"),
    )
    yield "result for large scores", tensor(head(20 * q, 20 * k, v), "Head")
    yield (
        "result for another shape",
        tensor(
            head(*(part[:1, :1, :3, :2] for part in before)),
            "Head",
        ),
    )


def watch_multi_head(gpt, *more):
    """`more` are arguments that other scripts have."""
    C, H = 12, 3
    gpt.N_EMBED, gpt.N_HEADS, gpt.DROPOUT = 24, 2, 0.25
    x = numbers(2, 5, C)
    layer = fill(gpt.MultiHead(C, H, 0.0, *more), equal_numbers).eval()
    yield (
        "result, with all numbers of the matrices 0.3 and no biases,",
        tensor(layer(x), "MultiHead"),
    )
    yield (
        "how many numbers the matrices have for C = 12",
        size_of_matrices(layer),
    )
    layer = random_parameters(gpt.MultiHead(C, H, 0.0, *more)).eval()
    before = layer(x)
    later = x.clone()
    later[:, 4:] += 1
    yield (
        "change of earlier results with the last token",
        (layer(later) - before)[:, :4],
    )
    turned = x[:, [2, 0, 1, 3, 4]]
    change = (layer(turned) - before)[:, -1]
    yield (
        "change of the last result if earlier tokens change places",
        Near(change, 1e-3),
    )
    other = torch.cat([x[:1], x[1:] + 1])
    yield (
        "change of the first text's result with the second text",
        (layer(other) - before)[:1],
    )
    single = F.pad(torch.eye(C), (0, 0, 1, 0)).unsqueeze(
        1
    )  # texts of one token: 0, and unit vectors
    results = layer(single)
    matrix = (results[1:] - results[:1])[:, 0]  # what a single token is multiplied by
    rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-4))
    yield "rank of the matrix for a single token (10 or more)", min(10, rank)
    yield from watch_dropout(lambda rate: gpt.MultiHead(C, H, rate, *more), x)


def watch_feed_forward(gpt):
    x = numbers(2, 3, 6)
    gpt.N_EMBED, gpt.DROPOUT = 12, 0.25
    layer = fill(gpt.FeedForward(6, 0.0), numbers_by_size).eval()
    yield (
        "how many numbers the matrices have for C = 6",
        size_of_matrices(layer),
    )
    yield "result", tensor(layer(x), "FeedForward")
    yield from watch_dropout(lambda rate: gpt.FeedForward(6, rate), x)


class PlainAttention(nn.Module):
    """In place of MultiHead: each position gets the sum of itself and those before, made small."""

    calls = ()

    def __init__(self, n_embed, n_heads, dropout, *more):
        super().__init__()
        PlainAttention.calls += ([n_embed, n_heads, dropout, *more],)

    def forward(self, x, *cache):
        return torch.tanh(x.cumsum(1) + 0.3)


class PlainFeedForward(nn.Module):
    """In place of FeedForward: each number becomes its square."""

    calls = ()

    def __init__(self, n_embed, dropout):
        super().__init__()
        PlainFeedForward.calls += ([n_embed, dropout],)

    def forward(self, x):
        return x * x


def watch_block(gpt, *more):
    """`more` are arguments that other scripts have."""
    gpt.MultiHead, gpt.FeedForward = PlainAttention, PlainFeedForward
    gpt.N_EMBED, gpt.N_HEADS, gpt.DROPOUT = 24, 2, 0.125
    PlainAttention.calls = PlainFeedForward.calls = ()
    block = gpt.Block(12, 3, 0.25, *more).eval()
    yield "arguments with which MultiHead was made", PlainAttention.calls
    yield "arguments with which FeedForward was made", PlainFeedForward.calls
    x = 3 * numbers(2, 5, 12) + 1
    before = x.clone()
    yield "result", tensor(block(x), "Block")
    yield "x after the call (it must not change)", [x - before]
    size = sum(p.numel() for p in block.parameters())
    yield "how many parameters its two LayerNorms have for C = 12", size


class PlainBlock(nn.Module):
    """In place of Block: each position gets half of itself, and the mean of those before."""

    calls = ()

    def __init__(self, n_embed, n_heads, dropout, *more):
        super().__init__()
        PlainBlock.calls += ([n_embed, n_heads, dropout, *more],)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x, *cache):
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return 0.5 * x + x.cumsum(1) / count + 0.1 * self.one


def watch_lm(gpt):
    gpt.Block, PlainBlock.calls = PlainBlock, ()
    set_other_sizes(gpt)
    V, T, C = 65, 7, 32
    config = dict(
        vocab_size=V,
        block_size=T,
        n_embed=C,
        n_heads=4,
        n_layers=2,
        dropout=0.25,
    )
    model = gpt.LM(**config)
    yield "arguments with which each Block was made", PlainBlock.calls
    yield "config", dict(model.config)
    yield "block_size", model.block_size
    sizes = [p.numel() for p in model.parameters()]
    yield (
        "number of parameters for V = 65, T = 7, C = 32 and 2 Blocks of 1",
        sum(sizes),
    )
    torch.manual_seed(0)
    idx, targets = torch.randint(V, (2, 64, T))
    with torch.no_grad():
        loss = two(model.eval()(idx, targets), "LM.forward", "logits, loss")[1]
    yield (
        "loss of a new model minus ln V",
        Near(float(loss) - math.log(V), 0.05),
    )
    yield from watch_lm_forward(gpt)


def set_other_sizes(gpt):
    """Give the script's constants values that no grader uses: a piece must use its arguments."""
    gpt.VOCAB_SIZE, gpt.BLOCK_SIZE, gpt.N_EMBED = 97, 9, 20
    gpt.N_LAYERS, gpt.N_HEADS, gpt.DROPOUT = 5, 6, 0.125


def watch_lm_forward(gpt):
    gpt.Block = PlainBlock
    set_other_sizes(gpt)
    B, T, V, C = 3, 4, 11, 8
    model = gpt.LM(V, 6, C, 2, 2, 0.0)
    fill(model, numbers_by_size).eval()
    torch.manual_seed(1)
    idx, targets = torch.randint(V, (2, B, T))
    logits, loss = two(model(idx), "LM.forward", "logits, loss")
    yield "logits", tensor(logits, "LM.forward")
    yield "loss without targets", loss
    logits, loss = two(model(idx, targets), "LM.forward", "logits, loss")
    yield "loss", loss
    yield (
        "backward can go back from the loss",
        getattr(loss, "requires_grad", False),
    )
    yield "logits, if there are targets,", tensor(logits, "LM.forward")
    padded = targets.clone()
    padded[:, 2:] = -100
    yield "loss if half of the targets are -100", model(idx, padded)[1]
    yield "logits of all 6 positions", model(torch.randint(V, (1, 6)))[0]
    sizes = (V, 6, C, 2, 1)
    yield from watch_dropout(lambda rate: gpt.LM(*sizes, rate), idx)


# --- Training -------------------------------------------------------------------------------------
class Table(nn.Module):
    """A model of one table, logits[last token], and a bias. It notes what it sees, and how."""

    def __init__(self, table, block_size=4, scale=1.0):
        super().__init__()
        self.table, self.block_size = nn.Parameter(table.clone()), block_size
        self.scale = scale
        self.bias = nn.Parameter(torch.zeros(len(table)))
        self.config = {"block_size": block_size, "vocab_size": len(table)}
        self.seen, self.modes, self.gradients, self.longest = (
            [],
            set(),
            set(),
            0,
        )

    def forward(self, idx, targets=None):
        if not isinstance(idx, torch.Tensor) or idx.dim() != 2:
            raise Wrong(f"the model was called with {kind(idx)}: it needs ids of shape (B, T)")
        self.seen.append(idx.tolist())
        self.modes.add(self.training)
        self.gradients.add(torch.is_grad_enabled())
        logits = self.scale * self.table[idx] + self.bias
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.mT, targets)

    def calls(self):
        """Return how it was called: in which mode, with gradients or without."""
        yield (
            "modes in which the model was called (True: training)",
            sorted(self.modes),
        )
        yield "calls with gradients recorded", sorted(self.gradients)


def watch_estimate_loss(gpt, dtype=torch.int64):
    table = 2 * numbers(101, 101)
    tokens = TOKENS[:23].to(dtype)  # 22 targets: 5 windows of 4, one of 2
    gpt.BATCH_SIZE, gpt.BLOCK_SIZE, gpt.EVAL_ITERS = 3, 5, 1
    model = Table(table).train()
    state = torch.get_rng_state()
    losses = gpt.estimate_loss(model, tokens, 2)
    again = gpt.estimate_loss(Table(table), tokens, 2)
    yield (
        "losses of two calls",
        Varies([float(entry(x, "estimate_loss", "loss")) for x in (losses, again)]),
    )
    yield "loss of 22 targets", entry(losses, "estimate_loss", "loss")
    yield (
        "loss in batches of 4 windows",
        gpt.estimate_loss(model, tokens, 4)["loss"],
    )
    yield (
        "loss of 20 targets",
        gpt.estimate_loss(model, tokens[:21], 2)["loss"],
    )
    yield from model.calls()
    yield (
        "change of the model's parameters",
        (model.table - table).abs().sum(),
    )
    yield "largest batch for batch_size 2", largest_batch(gpt, tokens)
    yield "random numbers used", int((torch.get_rng_state() != state).sum())
    yield from watch_eval_iters(gpt, dtype)


def largest_batch(gpt, tokens):
    """Return how many windows at a time the model saw."""
    model = Table(numbers(101, 101))
    gpt.estimate_loss(model, tokens, 2)
    return max(2, *(len(batch) for batch in model.seen))


def watch_eval_iters(gpt, dtype):
    """With eval_iters, count the windows, and see how far they reach."""
    model, ids = Table(numbers(101, 101)), torch.arange(101).to(dtype)
    first = gpt.estimate_loss(model, ids, 2, 3)["loss"]
    starts = [window[0] for batch in model.seen for window in batch]
    yield "windows for eval_iters = 3 and batch_size = 2", len(starts)
    yield "they come from the beginning", min(starts) < 30
    yield "they come from the end", max(starts) > 65
    again = gpt.estimate_loss(model, ids, 2, 3)["loss"]
    yield "change of the loss in a second call", float(again) - float(first)
    few = Table(numbers(101, 101))
    gpt.estimate_loss(few, ids, 2, 100)
    yield (
        "windows for eval_iters = 100",
        sum(len(batch) for batch in few.seen),
    )


def watch_orthogonalize(gpt):
    shapes = {(4, 6): 0.1, (6, 4): 1.0, (3, 3): 100.0}
    for (rows, columns), size in shapes.items():
        matrix = size * numbers(rows, columns)
        before = matrix.clone()
        result = tensor(gpt.orthogonalize(matrix), "orthogonalize", *matrix.shape)
        size = f"{matrix.shape[0]} × {matrix.shape[1]}"
        yield f"result for a {size} matrix", Near(result, 0.04)
        yield f"change of the {size} argument", matrix - before


def watch_muon(gpt):
    shapes = [(4, 6), (6, 3)]
    starts = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices = [nn.Parameter(start.clone()) for start in starts]
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = gpt.Muon([*matrices, unused], 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for step in range(4):
        gradients = [numbers(*shape, seed=10 * step) for shape in shapes]
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        if step in (0, 3):
            yield (
                f"matrices after {step + 1} steps",
                [Near(p, 1e-3) for p in matrices],
            )
            changes = [p.grad - g for p, g in zip(matrices, gradients, strict=True)]
            yield "change of the gradients", changes
    yield "a matrix without a gradient", unused


def watch_make_optimizers(gpt, sizes=(11, 6, 8, 2, 2, 0.0)):
    gpt.WEIGHT_DECAY, gpt.BETAS = 0.25, (0.75, 0.5)
    model = gpt.LM(*sizes)
    for gpt.MUON in (True, False):
        optimizers = gpt.make_optimizers(model)
        if not isinstance(optimizers, list | tuple):
            raise Wrong(f"make_optimizers returned {kind(optimizers)}: return a list of optimizers")
        yield (
            f"the optimizers with MUON = {gpt.MUON}",
            [type(o).__name__ for o in optimizers],
        )
        for name, p in model.named_parameters():
            yield (
                f"with MUON = {gpt.MUON}, {name} is",
                owner_of(p, optimizers),
            )
        (adamw,) = [o for o in optimizers if isinstance(o, torch.optim.AdamW)]
        yield "betas of AdamW", adamw.param_groups[0]["betas"]


def owner_of(p, optimizers):
    """Return which optimizer a parameter belongs to, with which weight decay."""
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is other for other in group["params"]):
                name = type(optimizer).__name__
                decay = float(group["weight_decay"])
                found.append(f"in {name}, weight_decay {decay:g}")
    return " and ".join(found) or "in no group"


def watch_get_lr(gpt):
    gpt.WARMUP_ITERS, gpt.FINAL_LR, gpt.MAX_ITERS, gpt.LEARNING_RATE = (
        4,
        0.1,
        70,
        5.0,
    )
    for n, steps in (
        (50, "0 to 49 of 50"),
        (20, "0 to 19 of 20"),
        (5, "0 to 4 of 5"),
    ):
        rates = [gpt.get_lr(step, n, 2.0) for step in range(n)]
        yield (
            f"rates of steps {steps}, with peak 2, FINAL_LR 0.1 and WARMUP_ITERS 4",
            rates,
        )


class NotedSGD(torch.optim.SGD):
    """Plain gradient descent that notes what it does, and with how long a gradient."""

    events = None  # a list

    def norm(self):
        params = self.param_groups[0]["params"]
        gradients = [p.grad for p in params if p.grad is not None]
        return f"{sum(gradient.norm().item() for gradient in gradients):.3f}"

    def step(self, closure=None):
        self.events.append(f"step {self.norm()}")
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.events.append(f"zero {self.norm()}")
        super().zero_grad(set_to_none)


def watch_train_step(gpt, batch=3):
    torch.manual_seed(2)
    x, y = torch.randint(7, (2, batch, 4))
    model = Table(0.3 * numbers(7, 7), scale=10.0).eval()
    other = nn.Parameter(numbers(3))  # it has no gradient
    optimizers = [NotedSGD([model.table], lr=9.0)]
    optimizers.append(torch.optim.SGD([other], lr=9.0))
    optimizers.append(torch.optim.SGD([model.bias], lr=9.0))
    NotedSGD.events = events = []
    model.table.register_hook(lambda gradient: events.append("backward"))
    for step, clip in enumerate((None, None, 0.1, 0.1, 100.0)):
        gpt.GRADIENT_CLIP = clip
        loss = gpt.train_step(model, optimizers, x, y, 0.01)
        if step == 0:
            yield "events", Note(list(events))
            yield "loss", loss
            yield "training mode", sorted(model.modes)
            yield (
                "rates of the optimizers",
                [o.param_groups[0]["lr"] for o in optimizers],
            )
        parameters = [
            model.table.detach().clone(),
            model.bias.detach().clone(),
        ]
        yield (
            f"parameters after {step + 1} steps, this one with GRADIENT_CLIP {clip},",
            parameters,
        )
    yield "all events", Note(events)
    yield "loss of the last step", loss


def watch_train(gpt):
    gpt.EVAL_INTERVAL, gpt.BATCH_SIZE, gpt.MAX_ITERS, gpt.SEED = 2, 3, 11, 99
    gpt.LEARNING_RATE, gpt.ADAMW_LEARNING_RATE = 0.5, 0.25
    gpt.MUON = True
    yield from watch_rehearsals(gpt)
    gpt.MUON = False
    adamw = Rehearsal(gpt, 0, 1)
    adamw.run()
    yield "the peak for get_lr with MUON = False", adamw.log["peak"]


def watch_rehearsals(gpt):
    """Train from step 0 to 5, from 3 to 5, and with another seed."""
    whole = Rehearsal(gpt, 0, 5)
    whole.run()
    yield "steps that were trained", whole.log["train_step"]
    yield "steps for which get_lr was asked", whole.log["get_lr"]
    yield "the peak for get_lr", whole.log["peak"]
    yield (
        "tokens, B and T with which get_batch was called",
        whole.log["get_batch"],
    )
    yield "steps that were evaluated", whole.log["evaluate"]
    yield "steps that were saved", whole.log["save_step"]
    yield "steps in run['history']", sorted(whole.values["history"])
    yield "all in order", whole.order
    yield "arguments of evaluate", whole.log["evaluate arguments"]
    yield "arguments of save_step", whole.log["save_step arguments"]
    again = Rehearsal(gpt, 3, 5)
    again.run()
    yield (
        "resumed at step 3: steps that were trained",
        again.log["train_step"],
    )
    yield (
        "resumed at step 3: steps that were evaluated",
        again.log["evaluate"],
    )
    yield "resumed at step 3: steps that were saved", again.log["save_step"]
    draws = [whole.draws[3:], again.draws]
    yield (
        "random numbers of step 3, in a whole and in a resumed run,",
        Varies(draws),
    )
    yield "random numbers of two steps", Varies(whole.draws[:2])
    yield (
        "seconds in save_step contain those of earlier parts",
        min(again.log["seconds"]) >= 1000,
    )
    yield "and no more", max(again.log["seconds"]) < 2000
    other = Rehearsal(gpt, 0, 5, seed=8)
    other.run()
    yield "random numbers of two seeds", Varies([whole.draws, other.draws])


class Rehearsal:
    """A run of `train` in which all that it calls only notes the call."""

    init = None  # for gpt2.py: where the weights began

    def __init__(self, gpt, first, last, seed=7):
        self.gpt, self.order, self.draws = gpt, [], []
        self.log = {
            "train_step": [],
            "get_lr": [],
            "get_batch": [],
            "evaluate": [],
            "peak": [],
        }
        self.log |= {"save_step": [], "seconds": []}
        self.log |= {"evaluate arguments": [], "save_step arguments": []}
        self.model, self.optimizers = Table(numbers(9, 9)), ["optimizer"]
        self.splits = {"train": torch.arange(5), "val": torch.arange(6)}
        done = range(first + 1) if first else ()
        history = {step: self.losses(step) for step in done}
        self.values = {
            "step": first,
            "max_iters": last,
            "seed": seed,
            "history": history,
        }
        self.values |= {
            "prompt": "a",
            "seconds": 1000.0 if first else 0.0,
            "path": None,
        }
        self.values |= {
            "config": {"block_size": 4},
            "best_step": None,
            "text": "text",
        }
        self.values["init"] = self.init
        for name in (
            "evaluate",
            "save_step",
            "get_batch",
            "train_step",
            "get_lr",
        ):
            setattr(gpt, name, getattr(self, name))
        gpt.show_progress = lambda *arguments: None

    def run(self):
        gpt = self.gpt
        gpt.train(self.model, "tokenizer", self.optimizers, self.splits, self.values)

    def losses(self, step):
        return {"train": {"loss": 9.0 - step}, "val": {"loss": 9.0 - step}}

    def note(self, name, value):
        self.log[name].append(value)
        self.order.append(name)

    def evaluate(self, model, tokenizer, splits, prompt, step):
        self.note("evaluate", step)
        torch.rand(1)  # an evaluation may use random numbers, too
        right = (
            model is self.model,
            splits is self.splits,
            tokenizer,
            prompt,
        )
        self.log["evaluate arguments"].append(right)
        return self.losses(step)

    def save_step(self, run, step, model, optimizers, seconds):
        self.note("save_step", step)
        self.log["seconds"].append(seconds)
        right = (
            run is self.values,
            model is self.model,
            optimizers is self.optimizers,
        )
        self.log["save_step arguments"].append((*right, step in run["history"]))
        run |= {"step": step, "seconds": seconds, "path": "file"}

    def get_lr(self, step, max_iters, peak):
        self.log["get_lr"].append([step, max_iters])
        self.log["peak"] = peak
        return step

    def get_batch(self, tokens, batch_size, block_size, device):
        self.note("get_batch", [len(tokens), batch_size, block_size])
        if self.log["get_batch"][1:]:
            self.log["get_batch"].pop()  # the first is enough, unless they differ
        self.draws.append(torch.rand(3).tolist())
        return torch.zeros(2, batch_size, block_size, dtype=torch.int64)

    def train_step(self, model, optimizers, x, y, lr):
        self.note("train_step", lr)
        return torch.tensor(1.0)


# --- Generation -----------------------------------------------------------------------------------
def watch_next_token_probabilities(gpt):
    gpt.TEMPERATURE, gpt.TOP_K, gpt.TOP_P = 3.0, 1, 0.1
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log() + 3
    before = logits.clone()
    for options in (
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_k": 1},
        {"top_k": 9},
        {"top_p": 0.6},
        {"top_p": 0.4},
        {"top_p": 0.85},
        {"top_k": 3, "top_p": 0.6},
        {"temperature": 0.5, "top_k": 2},
        {"temperature": 0},
    ):
        words = ", ".join(f"{name} = {value}" for name, value in options.items())
        p = gpt.next_token_probabilities(logits, **options)
        yield (
            f"probabilities with {words or 'no options'}",
            tensor(p, "next_token_probabilities"),
        )
    yield "change of the logits", logits - before
    p = gpt.next_token_probabilities(torch.tensor([1000.0, 999.0]))
    yield "probabilities of the logits 1000, 999", p


def watch_generate(gpt):
    V, T = 30, 4
    gpt.BLOCK_SIZE, gpt.TEMPERATURE, gpt.TOP_K, gpt.TOP_P = 9, 5.0, 3, None
    ids = [3, 7, 8, 20, 21, 22]
    prompt = list(ids)
    follow = torch.roll(torch.arange(V), 11)  # the next token of i is follow[i]
    model = Table(50.0 * F.one_hot(follow, V).float(), T).train()
    yielded = gpt.generate(model, prompt, 5)
    if not hasattr(yielded, "__next__"):
        raise Wrong(f"generate returned {kind(yielded)}: yield each token as soon as it is drawn")
    tokens = list(yielded)
    yield "what was yielded", [int(token) for token in tokens]
    yield "what the model saw", model.seen
    yield "the caller's list", prompt
    yield from model.calls()
    short = Table(50.0 * F.one_hot(follow, V).float(), T)
    list(gpt.generate(short, [5], 2))
    yield "what the model saw after a prompt of one token", short.seen
    yield (
        "tokens for max_new_tokens = 0",
        len(list(gpt.generate(short, [5], 0))),
    )
    yield from watch_draws(gpt)


def watch_draws(gpt, model_class=Table):
    """Draw from a model that gives 0, 1, 2, 3 the probabilities 0.08, 0.12, 0.2, 0.6 everywhere."""
    p = torch.tensor([0.08, 0.12, 0.2, 0.6])
    model = model_class(p.log().expand(4, 4), 4)
    torch.manual_seed(5)
    options = [
        {},
        {"temperature": 0.25},
        {"top_k": 2},
        {"top_p": 0.7},
        {"temperature": 0},
    ]
    for option in options:
        tokens = list(map(int, gpt.generate(model, [0], 250, **option)))
        words = ", ".join(f"{name} = {value}" for name, value in option.items())
        yield f"250 tokens drawn with {words or 'no options'}", Sample(tokens)


WATCH = {
    "Tokenizer": watch_tokenizer,
    "split_text": watch_split_text,
    "get_batch": watch_get_batch,
    "Head": watch_head,
    "MultiHead": watch_multi_head,
    "FeedForward": watch_feed_forward,
    "Block": watch_block,
    "LM": watch_lm,
    "LM.forward": watch_lm_forward,
    "estimate_loss": watch_estimate_loss,
    "orthogonalize": watch_orthogonalize,
    "Muon": watch_muon,
    "make_optimizers": watch_make_optimizers,
    "get_lr": watch_get_lr,
    "train_step": watch_train_step,
    "train": watch_train,
    "next_token_probabilities": watch_next_token_probabilities,
    "generate": watch_generate,
}
