"""Graders of what word_gpt.py has anew or changed. See watch_char_gpt.py."""

import math
from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from graders import watch_char_gpt as char
from graders.student import (
    Near,
    Sample,
    Varies,
    Wrong,
    entry,
    fill,
    kind,
    numbers,
    numbers_by_size,
    tensor,
    two,
    watch_dropout,
)

PAD, UNK, EOS, NO = 0, 1, 2, -100
WORDS = ["<pad>", "<unk>", "<eos>", "the", "film", "end", "plot"]
# Five documents, each with <eos> at the end. All other ids differ, and are in no order.
FIRST = [15, 6, 27, EOS]
SECOND = [8, 19, 10, 21, 12, 3, 14, 25, 16, 7, EOS]
LAST = [20, UNK, 22, 13, 24, 5, 26, EOS, 17, EOS]
TOKENS = torch.tensor([*FIRST, *SECOND, 18, 9, EOS, *LAST])


# --- Text -----------------------------------------------------------------------------------------
def watch_clean(gpt):
    for text in (
        "A Good FILM",
        "good<br />film",
        "don't, it’s",
        "well-made: yes!  (really)",
        "10/10 in the 80s, 1999",
        "see http://a.com/b?c=1 or www.example.com now",
        "write to me@example.com or @home",
        "Cliche\u0301s",
        "zero\u200bwidth",
        "",
    ):
        yield f"clean({text!r})", gpt.clean(text)
    yield (
        "clean('Well-made', 'reference')",
        gpt.clean("A well-made <b>Café</b>", "reference"),
    )


def watch_build_vocabulary(gpt):
    gpt.MIN_FREQ = 3
    documents = [
        "film the film the film the",
        "film the end so so so plot plot",
        "rare a a",
    ]
    yield (
        "the vocabulary for min_freq = 2",
        gpt.build_vocabulary(documents, 2),
    )
    yield (
        "the vocabulary for min_freq = 4",
        gpt.build_vocabulary(documents, 4),
    )


def watch_tokenizer(gpt):
    tokenizer = gpt.Tokenizer(list(WORDS))
    yield "vocabulary", list(tokenizer.vocabulary)
    yield "vocab_size", tokenizer.vocab_size
    yield "pad, unk and eos", [tokenizer.pad, tokenizer.unk, tokenizer.eos]
    yield (
        "encode('The film, the PLOTS!')",
        tokenizer.encode("The film, the PLOTS!"),
    )
    yield "encode('')", tokenizer.encode("")
    yield (
        "encode_clean('the end film')",
        tokenizer.encode_clean("the end film"),
    )
    yield "encode_clean('The film,')", tokenizer.encode_clean("The film,")
    yield "decode([3, 4, 2])", tokenizer.decode([3, 4, EOS])
    reference = gpt.Tokenizer([*WORDS, "wellmade"], "reference")
    yield (
        "with cleaning = 'reference', encode('well-made')",
        reference.encode("well-made"),
    )


def watch_split_documents(gpt):
    gpt.TRAIN_SHARE, gpt.VAL_SHARE = 0.9, 0.05
    documents = [f"review {i:02}" for i in range(40)]
    torch.manual_seed(1)
    once = gpt.split_documents(list(documents), 0.5, 0.125)
    torch.manual_seed(2)
    again = gpt.split_documents(list(documents), 0.5, 0.125)
    parts = [list(entry(once, "split_documents", name)) for name in ("train", "val", "test")]
    yield (
        "sizes for the shares 0.5 and 0.125 of 40 documents",
        [len(part) for part in parts],
    )
    counts = Counter(text for part in parts for text in part)
    yield "documents that are lost or torn", len(set(documents) - set(counts))
    yield (
        "documents that are in two parts",
        sum(n > 1 for n in counts.values()),
    )
    yield (
        "order of the training part, and that of the archive",
        Varies([parts[0], documents[:20]]),
    )
    yield (
        "all documents by their place",
        Varies([parts[0] + parts[1] + parts[2], documents]),
    )
    yield "two calls", Varies([once["train"], again["train"]])
    late = sum(int(text.split()[1]) >= 20 for text in parts[0])
    yield (
        "of the training documents, how many come from the second half (a random share)",
        5 < late < 15,
    )


def watch_split_text(gpt):
    tokenizer = gpt.Tokenizer(list(WORDS))
    parts = gpt.split_text(
        {"train": ["the film", "film"], "val": ["film rare", "end"]},
        tokenizer,
    )
    for name in ("train", "val"):
        part = entry(parts, "split_text", name)
        yield f"{name} part", tensor(part, f"split_text(...)[{name!r}]")
    yield "type of the ids", str(parts["train"].dtype)


def watch_cut_windows(gpt):
    gpt.BLOCK_SIZE = 3

    def cut(starts, ends):
        starts, ends = (
            torch.tensor(starts)[:, None],
            torch.tensor(ends)[:, None],
        )
        return two(
            gpt.cut_windows(TOKENS, starts, ends, 4),
            "cut_windows",
            "two tensors x, y",
        )

    x, y = cut([4, 6], [15, 15])
    yield "x inside of a document", tensor(x, "cut_windows")
    yield "y inside of a document", tensor(y, "cut_windows")
    x, y = cut([12, 0, 26], [15, 4, 28])
    yield "x at the end of documents", x
    yield "y at the end of documents", y
    x, y = cut([12, 1], [28, 28])
    yield "x across an <eos>, into the next document", x
    yield "y across an <eos>, into the next document", y
    x, y = cut([25], [28])
    yield "x beyond the end of the tokens", x
    yield "y beyond the end of the tokens", y
    yield "types of x and y", [str(x.dtype), str(y.dtype)]


def watch_get_batch(gpt):
    gpt.BATCH_SIZE, gpt.BLOCK_SIZE = 7, 3
    original = gpt.cut_windows
    text = TOKENS[4:17].to(torch.int32)  # two documents; but <eos>, each token comes once
    x, y = two(gpt.get_batch(text, 512, 4, "cpu"), "get_batch", "two tensors x, y")
    yield (
        "shapes of x and y",
        [list(tensor(part, "get_batch").shape) for part in (x, y)],
    )
    place = {token: i for i, token in enumerate(text.tolist())}
    starts = char.places_of(x[:, 0].tolist(), place)
    yield (
        "number of different places where 512 windows begin",
        len(set(starts)),
    )
    yield (
        "places where 512 windows of 13 tokens begin (the last token has no next one)",
        sorted(set(starts)),
    )
    ends = torch.full((len(starts), 1), len(text))
    first = torch.tensor(starts).clamp(min=0)
    right = original(text, first[:, None], ends, 4)
    yield (
        "x minus what cut_windows gives for these starts",
        (x - right[0]).abs().max(),
    )
    yield (
        "y minus what cut_windows gives for these starts",
        (y - right[1]).abs().max(),
    )
    calls = [gpt.get_batch(text, 4, 4, "cpu") for _ in "123"]
    yield "three batches", Varies([x.tolist() for x, _ in calls])
    x, y = gpt.get_batch(text, 5, 6, "cpu")
    yield "shapes of x and y for other sizes", [list(x.shape), list(y.shape)]
    yield "types of x and y", [str(x.dtype), str(y.dtype)]


# --- Model ----------------------------------------------------------------------------------------
def filled_softmax(gpt, V, C, cutoffs):
    """Return an AdaptiveSoftmax with random parameters."""
    layer = gpt.AdaptiveSoftmax(V, C, cutoffs).float()
    layer.weight.data = numbers(*layer.weight.shape, seed=1)
    layer.bias.data = numbers(*layer.bias.shape, seed=2)
    return layer


def watch_adaptive_softmax(gpt):
    layer = gpt.AdaptiveSoftmax(12, 4, (2, 5, 50))
    yield (
        "shape of weight for V = 12, C = 4 and the cutoffs 2, 5, 50",
        list(layer.weight.shape),
    )
    yield "bias of a new layer", layer.bias
    layer = filled_softmax(gpt, 12, 4, (2, 5))
    idx = torch.tensor([[0, 2, 11]])
    yield "embed([[0, 2, 11]])", tensor(layer.embed(idx), "embed")
    yield from watch_adaptive_forward(gpt)
    yield from watch_adaptive_losses(gpt)
    yield from watch_adaptive_hits(gpt)


def watch_adaptive_forward(gpt):
    layer = filled_softmax(gpt, 12, 4, (2, 5))
    x = numbers(3, 7, 4)
    log_p = tensor(layer(x), "forward")
    yield "ln P of all words", log_p
    yield "sum of all P", log_p.exp().sum(-1)
    yield "ln P without groups", filled_softmax(gpt, 12, 4, ())(x)


def watch_adaptive_losses(gpt):
    layer, x = filled_softmax(gpt, 12, 4, (2, 5)), numbers(24, 4)
    frequent, first, second = (
        torch.tensor([0, 1] * 12),
        2 + torch.arange(24) % 3,
        5 + torch.arange(24) % 7,
    )
    yield (
        "losses of frequent words",
        tensor(layer.losses(x, frequent), "losses"),
    )
    yield "losses of words of the first group", layer.losses(x, first)
    yield "losses of words of the second group", layer.losses(x, second)
    mixed = torch.arange(24) % 12
    yield "losses of all words", layer.losses(x, mixed)
    yield (
        "losses without groups",
        filled_softmax(gpt, 12, 4, ()).losses(x, mixed),
    )


def watch_adaptive_hits(gpt):
    layer = filled_softmax(gpt, 12, 4, (2, 5))
    x = 2 * numbers(300, 4)
    best = layer(x).argmax(-1)
    other = (best + torch.arange(300)) % 12
    for what, targets in (
        ("of the likeliest words", best),
        ("of any words", other),
    ):
        hits = layer.hits(x, targets, layer.losses(x, targets))
        yield f"hits {what}", tensor(hits, "hits").long()


def watch_lm(gpt):
    gpt.Block, char.PlainBlock.calls = char.PlainBlock, ()
    char.set_other_sizes(gpt)
    gpt.CUTOFFS = (3,)
    sizes = dict(
        vocab_size=400,
        block_size=9,
        n_embed=32,
        n_heads=4,
        n_layers=2,
        dropout=0.25,
    )
    config = sizes | {"cutoffs": (50,)}
    model = gpt.LM(**config)
    yield "arguments with which each Block was made", char.PlainBlock.calls
    yield (
        "config",
        {name: value for name, value in dict(model.config).items()},
    )
    yield "block_size", model.block_size
    size = sum(p.numel() for p in model.parameters())
    yield (
        "number of parameters for V = 400, T = 9, C = 32, one group, and 2 Blocks of 1",
        size,
    )
    matrices = [p for p in model.parameters() if p.dim() == 2]
    deviations = sorted(p.std().item() for p in matrices)
    yield (
        "standard deviations of the matrices",
        [Near(value, 0.15) for value in deviations],
    )
    torch.manual_seed(0)
    idx, targets = torch.randint(400, (2, 16, 9))
    with torch.no_grad():
        loss = two(model.eval()(idx, targets), "LM.forward", "None, loss")[1]
    yield (
        "loss of a new model minus ln V",
        Near(float(loss) - math.log(400), 0.05),
    )
    yield from watch_lm_forward(gpt)


def watch_lm_forward(gpt):
    gpt.Block = char.PlainBlock
    char.set_other_sizes(gpt)
    model = gpt.LM(12, 6, 8, 2, 2, 0.0, (2, 5))
    fill(model, numbers_by_size).eval()
    model.lm_head.bias.data = numbers(14)
    ids = [3, 11, 0, 3, 7, 2, 2, 5]
    idx = torch.tensor(ids).view(2, 4)
    targets = torch.tensor([[11, 0, 3, NO]] * 2)
    logits, nothing = two(model(idx), "LM.forward", "logits, None")
    yield "logits", tensor(logits, "LM.forward")
    yield "loss without targets", nothing
    yield "hidden", tensor(model.hidden(idx), "hidden")
    _, loss = two(model(idx, targets), "LM.forward", "None, loss")
    yield "loss", loss
    yield (
        "backward can go back from the loss",
        getattr(loss, "requires_grad", False),
    )
    yield (
        "loss if half of the targets are -100",
        model(idx, targets.masked_fill(idx > 4, NO))[1],
    )
    sizes = (12, 6, 8, 2, 1)
    yield from watch_dropout(lambda rate: gpt.LM(*sizes, rate), idx)


# --- Training -------------------------------------------------------------------------------------
class WordTable(nn.Module):
    """A model of one table, logits[last token], which notes what it sees, and how."""

    def __init__(self, table, block_size=4):
        super().__init__()
        self.table, self.block_size = nn.Parameter(table.clone()), block_size
        self.config = {"block_size": block_size, "vocab_size": len(table)}
        self.seen, self.modes, self.gradients = [], set(), set()
        self.lm_head = self.Head(self)

    def note(self, idx):
        if not isinstance(idx, torch.Tensor) or idx.dim() != 2:
            raise Wrong(f"the model was called with {kind(idx)}: it needs ids of shape (B, T)")
        self.seen.append(idx.tolist())
        self.modes.add(self.training)
        self.gradients.add(torch.is_grad_enabled())

    def hidden(self, idx):
        self.note(idx)
        return self.table[idx]

    def forward(self, idx, targets=None):
        hidden = self.hidden(idx)
        if targets is None:
            return hidden, None
        real = targets != NO
        return None, self.lm_head.losses(hidden[real], targets[real]).mean()

    class Head:
        def __init__(self, model):
            self.weight = model.table

        def losses(self, hidden, targets):
            return F.cross_entropy(hidden, targets, reduction="none")

        def hits(self, hidden, targets, losses):
            return hidden.argmax(-1) == targets

    calls = char.Table.calls


def watch_estimate_loss(gpt):
    table, tokens = numbers(28, 28), TOKENS.to(torch.int32)
    table[TOKENS[:-1:3], TOKENS[1::3]] += 3.0  # every third target is likely
    gpt.BATCH_SIZE, gpt.BLOCK_SIZE, gpt.EVAL_ITERS = 5, 5, 1
    model = WordTable(table).train()
    state = torch.get_rng_state()
    losses = gpt.estimate_loss(model, tokens, 3)
    for name in ("loss", "known", "accuracy"):
        yield name, entry(losses, "estimate_loss", name)
    firsts = sorted(window[0] for batch in model.seen for window in batch)
    yield "first tokens of all windows", firsts
    yield (
        "loss in batches of 4 windows",
        gpt.estimate_loss(model, tokens, 4)["loss"],
    )
    yield from model.calls()
    yield (
        "change of the model's parameters",
        (model.table - table).abs().sum(),
    )
    yield "random numbers used", int((torch.get_rng_state() != state).sum())
    yield (
        "largest batch for batch_size 3",
        max(3, *(len(batch) for batch in model.seen[:1])),
    )
    yield from watch_eval_iters(gpt)


def watch_eval_iters(gpt):
    """With eval_iters, count the windows, and see how far they reach."""
    ids = torch.arange(3, 103)
    ids[9::10] = EOS  # ten documents of ten tokens
    model = WordTable(numbers(110, 110))
    gpt.estimate_loss(model, ids, 2, 3)
    starts = [window[0] for batch in model.seen for window in batch]
    yield "windows for eval_iters = 3 and batch_size = 2", len(starts)
    yield "they come from the beginning", min(starts) < 33
    yield "they come from the end", max(starts) > 70


# --- Generation -----------------------------------------------------------------------------------
def watch_generate(gpt):
    V, T = 12, 4
    gpt.BLOCK_SIZE, gpt.TEMPERATURE, gpt.TOP_K, gpt.TOP_P = 3, 5.0, 3, None
    order = [3, 7, 5, 9, 4, EOS, 3]
    follow = dict(pairwise(order))
    table = torch.full((V, V), -50.0)
    for token, next_token in follow.items():
        table[token, next_token] = 0.0
    model = char.Table(table, T).train()
    ids = [8, 8, 9, 4, 3]
    prompt = list(ids)
    yielded = gpt.generate(model, prompt, 3)
    if not hasattr(yielded, "__next__"):
        raise Wrong(f"generate returned {kind(yielded)}: yield each token as soon as it is drawn")
    yield "what was yielded", [int(token) for token in yielded]
    yield "what the model saw", model.seen
    yield "the caller's list", prompt
    yield from model.calls()
    model = char.Table(table, T)
    tokens = list(map(int, gpt.generate(model, [3], 9)))
    yield "what was yielded before <eos>, with room for 9 tokens,", tokens
    table[:, [PAD, UNK]] = 50.0
    model = char.Table(table, T)
    tokens = list(map(int, gpt.generate(model, [3], 3)))
    yield "what was yielded if <pad> and <unk> are most likely", tokens
    yield from watch_draws(gpt)


def watch_draws(gpt):
    """Draw from a model that gives 3, 4, 5, 6 the probabilities 0.08, 0.12, 0.2, 0.6 everywhere."""
    p = torch.tensor([1e-9, 1e-9, 1e-9, 0.08, 0.12, 0.2, 0.6])
    model = char.Table(p.log().expand(7, 7))
    torch.manual_seed(5)
    options = [
        {},
        {"temperature": 0.25},
        {"top_k": 2},
        {"top_p": 0.7},
        {"temperature": 0},
    ]
    for option in options:
        tokens = list(map(int, gpt.generate(model, [3], 250, **option)))
        words = ", ".join(f"{name} = {value}" for name, value in option.items())
        yield f"250 tokens drawn with {words or 'no options'}", Sample(tokens)


def watch_beam_search(gpt):
    p = torch.full((6, 6), 1e-9)
    p[:, [PAD, UNK]] = torch.tensor([8.0, 9.0])  # they are no words, however likely
    p[3, [3, 4]] = torch.tensor([0.55, 0.45])
    p[4, [3, 4]] = torch.tensor([0.9, 0.1])
    p[5, [3, 4]] = torch.tensor([0.6, 0.4])
    model = WordTable(p.log(), 3).train()
    ids = [3, 4, 3, 5]
    for beams in (2, 1):
        new, score = two(
            gpt.beam_search(model, ids, 2, beams),
            "beam_search",
            "new ids, ln P",
        )
        yield (
            f"new ids with {beams} beams, for 5: 3 0.6, 4 0.4; 3: 3 0.55; 4: 3 0.9",
            list(map(int, new)),
        )
        yield f"their ln P, with {beams} beams", score
    yield "the caller's list", ids
    yield from model.calls()
    yield (
        "most tokens that the model saw",
        max(len(row) for batch in model.seen for row in batch),
    )
    p[5, [EOS, 4]] = torch.tensor([1.4, 1e-9])
    p[EOS, 3] = 1.0
    model = WordTable(p.log(), 3)
    new, score = gpt.beam_search(model, [5], 4, 2)
    yield "new ids if <eos> has the probability 0.7", list(map(int, new))
    yield "their ln P", score


@torch.no_grad()
def watch_attention_weights(gpt):
    torch.manual_seed(3)
    model = gpt.LM(9, 6, 8, 2, 2, 0.5)
    for i, p in enumerate(model.parameters()):
        p.copy_(0.5 * numbers(*p.shape, seed=i))
    model.train()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    heads = [block.attention.head for block in model.blocks]
    weights = gpt.attention_weights(model, [3, 8, 4])
    for i, part in enumerate(weights):
        yield f"weights of block {i}", tensor(part, "attention_weights")
    yield "number of results", len(weights)
    yield (
        "hooks that are left",
        sum(len(m._forward_hooks) for m in model.modules()),
    )
    yield (
        "heads as before",
        heads == [block.attention.head for block in model.blocks],
    )
    now = model.state_dict()
    moved = [now[name] - state[name] for name in now]
    changes = [change.abs().sum() for change in moved]
    yield "change of the parameters", sum(changes)


WATCH = char.WATCH | {
    "clean": watch_clean,
    "build_vocabulary": watch_build_vocabulary,
    "Tokenizer": watch_tokenizer,
    "split_documents": watch_split_documents,
    "split_text": watch_split_text,
    "cut_windows": watch_cut_windows,
    "get_batch": watch_get_batch,
    "AdaptiveSoftmax": watch_adaptive_softmax,
    "AdaptiveSoftmax.forward": watch_adaptive_forward,
    "AdaptiveSoftmax.losses": watch_adaptive_losses,
    "AdaptiveSoftmax.hits": watch_adaptive_hits,
    "LM": watch_lm,
    "LM.forward": watch_lm_forward,
    "estimate_loss": watch_estimate_loss,
    "generate": watch_generate,
    "beam_search": watch_beam_search,
    "attention_weights": watch_attention_weights,
}
