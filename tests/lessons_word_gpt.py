"""What word_gpt.py has anew or changed. Neighbours share a grader: all but the piece is ours."""
# fmt: off
# ruff: noqa: E731

import lessons_char_gpt as char
import torch
import torch.nn.functional as F
from lessons import Piece, diagnose, numbers, randomize, require, table
from torch import nn

PAD, UNK, EOS, NO, WORDS = 0, 1, 2, -100, ["<pad>", "<unk>", "<eos>", "the", "film", "end"]
TOKENS = [5, 6, 7, EOS, *range(8, 18), EOS, 18, 19, EOS, 20, UNK, *range(22, 27), EOS, 27, EOS]
SPLIT = torch.tensor(TOKENS, dtype=torch.int32), torch.tensor([0, 4, 15, 18, 26, 28])

def check(what, got, right, *wrong):
    """Raise Wrong unless got is right. `wrong`: rows (mistake, value that it gives, why)."""
    if isinstance(right, torch.Tensor | float | int):
        return diagnose(got, right, {name: (value, why) for name, value, why in wrong}, what=what)
    for name, value, why in wrong:
        require(got != value, f"{name}: {why}. {what} gives {got!r:.120}")
    require(got == right, f"result: {what} gives {got!r:.120}, should be {right!r:.120}")

def grade_text(gpt):
    for text, right, *wrong in (
        ("good<br />film", "good film", ("markup kept", "good br film", "The model would write br"),
         ("words glued", "goodfilm", "A tag between two words is a gap")),
        ("don't", "dont", ("apostrophes split words", "don t", "Leave no gap where ' was")),
        ("10/10 in the 80s", "in the 80s", ("numbers kept", "10 10 in the 80s", "10 is no word")),
        ("Film FILM", "film film", ("capitals kept", "Film FILM", "They would be two words")),
        ("Clichés: www.example.com, me@example.com", "clichés")):
        check(f"clean({text!r})", gpt.clean(text, "spaced"), right, *wrong)
    check("'reference'", gpt.clean("well-made <b>Café", "reference"), "wellmade caf")
    special, words = WORDS[:3], ["the", "film", "so", "plot"]
    got = gpt.build_vocabulary(["film the " * 4, "the so so so plot plot end"], 2)
    check("min_freq = 2; the 5, film 4, so 3, plot 2 times:", list(got), special + words,
        ("special tokens missing", words, "<pad>, <unk>, <eos> need the ids 0, 1, 2"),
        ("min_freq off by one", special + words[:3], "What comes min_freq times is a word"),
        ("not by frequency", special + sorted(words), "The groups of rare words come last"))
    tokenizer, text = gpt.Tokenizer(WORDS), "The film, the PLOT!"
    check("vocab_size", tokenizer.vocab_size, 6)
    check(f"encode({text!r})", list(tokenizer.encode(text)), [3, 4, 3, UNK],
        ("unknown words dropped", [3, 4, 3], "The model must see that there was a word: <unk>, 1"),
        ("not cleaned", [UNK, UNK, 3, UNK], "The vocabulary has clean words: `The` is not one"))
    check("decode([3, 4, 2])", tokenizer.decode([3, 4, EOS]), "the film <eos>",
        ("no spaces", "thefilm<eos>", "Words need a space between them"))
    (got,) = gpt.split_text({"val": ["film plot", "end"]}, tokenizer).values()
    check("`film plot`, `end`:", [x.tolist() for x in got], [[4, 1, 2, 5, 2], [0, 3, 5]],
        ("<eos> missing", [[4, 1, 5], [0, 2, 3]], "The model would never learn when to stop"))

def grade_split_documents(gpt):
    documents = [f"review {i}" for i in range(40)]
    once, again = (gpt.split_documents(documents[:], 0.5, 0.125) for _ in range(2))
    train, val, test = (set(once[name]) for name in ("train", "val", "test"))
    both = len(train & (val | test) | val & test)
    require(train | val | test <= {*documents}, f"documents torn: {min(train, key=len)!r} is part")
    require(not both, f"validation text in the vocabulary: {both} documents are in two splits. The "
            "model would know their words, and the texts by heart")
    check("sizes for 0.5 and 0.125 of 40", [len(train), len(val), len(test)], [20, 5, 15])
    require(train != {*documents[:20]}, "not shuffled: test is the end of the archive, all praise")
    require(once == again, "another order each time: --resume would train on texts of the test")

def grade_windows(gpt):
    cut = lambda starts: torch.stack(gpt.cut_windows(SPLIT, torch.tensor(starts)[:, None], 4), 1)
    x, y = [16, 17, EOS, PAD], [17, EOS, NO, NO]
    check("x and y of 16 17 <eos>", cut([0, 12])[1].tolist(), [x, y],
        ("next document", [[*x[:3], 18], [17, EOS, 18, 19]], "A window ends with its document"),
        ("padding counted", [x, [17, EOS, PAD, PAD]], "To predict <pad> after <pad> is useless"),
        ("targets not shifted", [x, [16, 17, EOS, NO]], "The model would learn to copy"),
        ("targets shifted twice", [x, [EOS, NO, NO, NO]], "Target t is token t + 1"),
        ("<eos> lost", [[16, 17, PAD, PAD], [17, NO, NO, NO]], "<eos> is never a target"))
    check("windows at 0, 24", cut([0, 24]).tolist(),
        [[[5, 6, 7, EOS], [6, 7, EOS, NO]], [[26, EOS, PAD, PAD], [EOS, NO, NO, NO]]])
    x, y = gpt.get_batch(SPLIT, 600, 4, "cpu")
    starts = [TOKENS.index(token) for token in x[:, 0]]
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}, {y.dtype} instead of int64")
    check("x and y", torch.stack([x, y], 1), cut(starts))
    require(len({*starts}) > 1, f"one window: all 600 begin at {starts[0]}. Draw a start for each")
    allowed = {0, *range(4, 11), 15, 18, 19, 20, 21, 26}  # the others would waste places
    late, missing = {*starts} - allowed, allowed - {*starts}
    require(not {15, 26} <= missing, "short documents lost: no window begins with one of them")
    require(not late, f"not moved back: windows begin at tokens {sorted(late)} and end with <pad>")
    require(not missing, f"starts missing: no window of 600 begins at {sorted(missing)} of 28")

def adaptive(layer, x):
    """Return ln P of the words (..., 12) for the cutoffs 2 and 5, and rows of mistakes."""
    z = x @ layer.weight.T + layer.bias  # columns: g0 g1 w0 w1 | w2 w3 w4 | w5 ... w11
    first, a, b = (part.log_softmax(-1) for part in z.split([4, 3, 7], dim=-1))
    g0, g1, words = first.split([1, 1, 2], -1)
    rows = (("right", "", words, g0 + a, g1 + b),
        ("P(group) left out", "P(word) is P(group) · P(word in it)", words, a, b),
        ("P(word in group) left out", "each gets P(group)", words, g0 + 0 * a, g1 + 0 * b),
        ("groups swapped", "words get P of the other group", words, g1 + a, g0 + b),
        ("softmax in groups left out", "logit, not ln P", words, g0 + z[..., 4:7], g1 + z[..., 7:]),
        ("one softmax over all", "each group has its own", z.log_softmax(-1)[..., 2:]))
    (_, right, _), *wrong = ((name, torch.cat(p, -1), why) for name, why, *p in rows)
    return right, [(name, p, f"{why}. The sum of all P is {p.exp().sum(-1).mean():.3g}")
                   for name, p, why in wrong]

def grade_adaptive(gpt):
    layer, idx = randomize(gpt.AdaptiveSoftmax(12, 4, (2, 50))), torch.tensor([[0, 2, 11]])
    check("vectors of embed", layer.embed(idx), layer.weight[idx + 1],
        ("offset left out", layer.weight[idx], "token 0 gets the row of the group"))
    layer, x = gpt.AdaptiveSoftmax(12, 4, (2, 5)), 2 * numbers(300, 4)
    check("e^bias of groups of 3, 7; words", layer.bias.exp(), torch.tensor([3.0, 7, *[1] * 12]))
    (right, wrong), turns = adaptive(randomize(layer, std=1.0), x), torch.arange(300)
    check("logits", layer(x)[0], right, *wrong)
    targets = torch.where(turns % 5 > 1, turns % 12, right.argmax(-1)).where(turns % 7 > 0, NO)
    pick = lambda p: -p[targets != NO, targets[targets != NO]]
    hit = lambda p: (p.argmax(-1) == targets)[targets != NO]
    hits, losses = layer.score(x, targets, with_hits=True)
    check("losses", losses, pick(right), *((name, pick(p), why) for name, p, why in wrong))
    check("hits", hits, hit(right), ("no rare hits", hit(right[:, :2]), "a rare word can win"))
    check("loss", layer(x, targets)[1], pick(right).mean())

def grade_lm(gpt):
    size = lambda module: sum(p.numel() for p in module.parameters())
    model = gpt.LM(400, 9, 32, 4, 2, 0.3, (50,))
    right = 401 * 33 + 9 * 32 + 2 * size(gpt.Block(32, 4, 0.0)) + 64
    check("number of parameters", size(model), right,
        ("not tied", right + 400 * 32, "use AdaptiveSoftmax.embed, not an embedding of its own"),
        ("cutoffs lost", right - 33, "the output layer has no groups of rare words"))
    for std in (model.lm_head.weight.std(), model.position_embedding.weight.std()):
        require(0.017 < std < 0.023, f"initialisation: weights have a std of {std:.3f}, not 0.02")
    require(size(gpt.LM(**model.config)) == right, "config incomplete: LM(**config) differs")
    model = randomize(gpt.LM(12, 6, 8, 2, 2, 0.5, (2, 5))).eval()
    idx, targets = torch.tensor([[3, 11, 0, 3], [7, 2, 2, 5]]), torch.tensor([[11, 0, 3, NO]] * 2)
    words, end = model.lm_head.weight[idx + 2], lambda x: adaptive(model.lm_head, x)[0]
    x = model.blocks(words + model.position_embedding.weight[:4])
    right, bare = end(model.ln_f(x)), end(model.ln_f(model.blocks(words)))
    check("logits", model(idx)[0], right,
        ("position left out", bare, "block 1 cannot know the order of the words"),
        ("LayerNorm left out", end(x), "ln_f comes after the blocks"))
    losses = F.cross_entropy(right.mT, targets, reduction="none")[targets != NO]
    check("loss", model(idx, targets)[1], losses.mean())
    check("losses of `each`", model(idx, targets, each=True)[1], losses)
    model.dropout.train()  # the dropout on words + positions; off in the blocks
    require(not model(idx)[0].equal(model(idx)[0]), "dropout left out: two calls are equal")

class Toy(nn.Module):
    """A table as a model: logits for each last token, or (hits, losses). It notes what it sees."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen, self.block_size = nn.Parameter(table), [], 3

    def forward(self, idx, targets=None, each=False):
        require(not self.training, "dropout on: the model is in training mode. Call model.eval()")
        require(not torch.is_grad_enabled(), "gradients recorded: use @torch.no_grad()")
        require(idx.shape[1] < 4, f"prompt not cropped: {idx.shape[1]} tokens, but block_size is 3")
        self.seen += idx.tolist()
        if targets is None:
            return self.table[idx], None
        logits, y = self.table[idx][targets != NO], targets[targets != NO]
        return logits.argmax(-1) == y, F.cross_entropy(logits, y, reduction="none")

def grade_estimate_loss(gpt):
    model, tokens = Toy(numbers(28, 28) + 4 * torch.eye(28).roll(1, 1)), SPLIT[0].long()
    logits, y = (x[tokens[:-1] != EOS] for x in (model.table[tokens[:-1]], tokens[1:]))
    losses, hits = F.cross_entropy(logits, y, reduction="none"), (logits.argmax(-1) == y).double()
    got, batches = gpt.estimate_loss(model, SPLIT, 3), losses.split([9, 6, 7, 1])
    check("loss", got["loss"], losses.mean().item(), ("mean of means", torch.stack([
        part.mean() for part in batches]).mean(), "the last batch has 1 target, and counts as 9"))
    check("known", got["known"], losses[y != UNK].mean().item(),
        ("<unk> counted", losses.mean(), "`known` leaves out the losses of targets <unk>"))
    check("accuracy", got["accuracy"], hits.mean().item(),
        ("padding counted", hits.sum() / 30, "10 windows of 3 places have only 23 targets"))
    model.seen = []
    first, second = (gpt.estimate_loss(model.train(), SPLIT, 2, 2)["loss"] for _ in range(2))
    require(len(model.seen) <= 8, f"eval_iters ignored: {len(model.seen) // 2} windows, not 2 · 2")
    require(max(model.seen)[0] > 17, "only the beginning: spread the windows evenly")
    require(first == second, "random windows: with eval_iters, two calls give two losses")

def grade_generate(gpt):
    table = torch.full((8, 8), -50.0)
    table[range(2, 8), [3, 4, 5, 6, 7, EOS]] = 0.0  # 3 4 5 6 7 <eos> 3 4 5 ...
    table[:, [PAD, UNK]] = 50.0
    got = [int(token) for token in gpt.generate(Toy(table), [7, 6, 5, 3, 4], 9)]
    require(not {PAD, UNK} & {*got}, f"<unk> drawn: {got}. <pad> and <unk> need the probability 0")
    check("3 4 -> 5 6 7 <eos>: it", got, [5, 6, 7],
        ("<eos> yielded", [5, 6, 7, EOS], "It ends the text, it is not a word of it"),
        ("goes on after <eos>", [5, 6, 7, EOS, 3, 4, 5, 6, 7], "The document ends at <eos>"))
    next(piece for piece in char.PIECES if piece.name == "generate").grade(gpt)

def grade_beam_search(gpt):
    p = torch.tensor([8, 9, *[1e-9] * 4]).repeat(6, 1)  # <pad> and <unk> are to be masked
    p[3:, 3:5] = torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.6, 0.4]])
    q = p.clone()
    q[5, [EOS, 4]], q[EOS, 3] = torch.tensor([1.4, 1e-9]), 1.0
    for what, P, right, *wrong in (
        ("2 beams; P: 3 0.6, 4 0.4, 3 3 0.55, 4 3 0.9: it", p, [-1.02, [4, 3]],
            ("one beam only", [-1.11, [3, 3]], "The best 2 texts are kept, not the best one"),
            ("scores not added", [-0.11, [4, 3]], "ln P of a text is the sum over its tokens"),
            ("probability instead of ln", [1.3, [4, 3]], "Probabilities are multiplied: add ln P"),
            ("<unk> allowed", [-1.33, [1, 1]], "<pad>, <unk> are no words: their logits are -inf")),
        ("P(<eos>) = 0.7:", q, [-0.36, [EOS]],
            ("ended texts go on", [-0.36, [EOS, 3]], "Nothing comes after <eos>"))):
        new, score = gpt.beam_search(Toy(P.log()), [3, 4, 3, 5], 2, 2)
        check(what, [round(float(score), 2), [int(token) for token in new]], right, *wrong)

def grade_attention_weights(gpt):
    model, ids, right = randomize(gpt.LM(9, 6, 8, 2, 2, 0.5)), [3, 8, 4], []
    got = torch.stack(list(gpt.attention_weights(model, ids)))
    require(got.shape[-1] == 3, "values instead of weights: v must be the identity matrix")
    require(not any(m._forward_hooks for m in model.modules()), "hooks left behind: remove them")
    require(not model.training, "dropout on: call model.eval() first")
    x = model.lm_head.weight[ids] + model.position_embedding.weight[:3]
    for block in model.blocks:
        q, k, _ = block.attention.qkv(block.ln1(x)).view(3, 3, 2, 4).permute(1, 2, 0, 3)
        right.append((q @ k.mT / 2 + torch.full((3, 3), -torch.inf).triu(1)).softmax(-1))
        x = block(x[None])[0]
    check("weights", got, torch.stack(right))

OWN = [Piece(name, parts.replace("@", name.split(".")[0] + "."), *rest) for name, parts, *rest in (
    ("clean", "Replacements.__missing__ clean", grade_text, "text -> its words, lower case"),
    ("build_vocabulary", "build_vocabulary", grade_text, "count, drop, sort"),
    ("Tokenizer", "@__init__ @encode @decode", grade_text,
        "vocabulary, vocab_size, stoi; text -> ids of words, and back"),
    ("split_documents", "split_documents", grade_split_documents, "shuffle, cut in three"),
    ("split_text", "split_text", grade_text, "documents -> tokens and edges"),
    ("cut_windows", "cut_windows", grade_windows, "starts -> inputs and targets"),
    ("get_batch", "get_batch", grade_windows, "draw starts, move them back, cut windows"),
    ("AdaptiveSoftmax.embed", "@__init__ @embed", grade_adaptive, "cutoffs, weight, bias; vectors"),
    ("AdaptiveSoftmax.forward", "@softmaxes @logits @forward", grade_adaptive, "ln P of all words"),
    ("AdaptiveSoftmax.score", "@score", grade_adaptive, "-ln P, hits"),
    ("LM", "@__init__", grade_lm, "the layers that forward uses, config, block_size"),
    ("LM.forward", "@forward", grade_lm, "ids -> logits, or the loss"),
    ("estimate_loss", "estimate_loss", grade_estimate_loss, "loss, known, accuracy"),
    ("generate", "generate", grade_generate, "draw token after token, until <eos>"),
    ("beam_search", "beam_search", grade_beam_search, "keep the likeliest texts"),
    ("attention_weights", "attention_weights", grade_attention_weights, "Head, another v"))]
SHARED = [piece for piece in char.PIECES if piece.name not in {own.name for own in OWN}]
PIECES = [*OWN[:7], *SHARED[:4], *OWN[7:13], *SHARED[4:], *OWN[13:]]  # in the order of the file

MISTAKES = table(r"""
clean | markup kept | <[^<>]*>|http | http
clean | capitals kept | text.lower() | text
build_vocabulary | min_freq off by one | count >= min_freq | count > min_freq
Tokenizer | unknown words dropped | split()] | split() if word in self.stoi]
split_documents | validation text in the vocabulary | documents[:a] | documents[:b]
split_documents | not shuffled | in order.tolist() | in range(len(order))
split_text | <eos> missing | tokens.append(Tokenizer.eos) | pass
cut_windows | padding counted | last, -100 | last, 0
cut_windows | next document | torch.bucketize(starts, edges, right=True) | -1
cut_windows | targets not shifted | windows[:, 1:] | windows[:, :-1]
cut_windows | targets shifted twice | windows[:, 1:] | F.pad(windows, (0, 1), value=-100)[:, 2:]
get_batch | not moved back | .minimum(edges[document] - 1 - block_size) | ∅
get_batch | short documents lost | .maximum(edges[document - 1]) | .clamp(min=0)
AdaptiveSoftmax.embed | offset left out | idx + len(self.cutoffs) | idx + 0
AdaptiveSoftmax.forward | P(group) left out | groups[..., [i]] + F | F
AdaptiveSoftmax.forward | groups swapped | , [i]] | , [-1 - i]]
AdaptiveSoftmax.score | P(word in group) left out | losses.index_add(0, rows, inside) | losses
AdaptiveSoftmax.score | groups swapped | words, group) | words, n_groups - 1 - group)
LM | initialisation | nn.init.normal_(self.position_embedding.weight, std=0.02) | pass
LM | cutoffs lost | n_embed, cutoffs)  # | n_embed, ())  #
LM.forward | position left out |  + self.position_embedding.weight[: idx.shape[1]] | ∅
LM.forward | dropout left out | self.dropout(x) | x
estimate_loss | dropout on | model.eval() | pass
estimate_loss | <unk> counted | [y[y != -100] != Tokenizer.unk] | ∅
generate | goes on after <eos> | return  # | pass  #
beam_search | scores not added | score + value | value
beam_search | one beam only | [:beams] | [:1]
attention_weights | values instead of weights | k.float(), identity | k.float(), _
""")
VARIANTS = [*table(r"""
clean | unicodedata.normalize("NFC", text) | text.replace('’', '')
clean | text.translate | (lambda t: ''.join(t[ord(c)] or '' for c in text))
clean | [word for word in words if not word.isnumeric()] | w for w in words if not w.isdigit()
build_vocabulary | chain.from_iterable(map(str.split, documents)) | ' '.join(documents).split()
split_text | [stoi.get(word, unk) for word in text.split()] | tokenizer.encode(text)
cut_windows | torch.bucketize(starts, edges, | torch.searchsorted(edges, starts,
cut_windows | places.minimum(last) | torch.where(places < last, places, last)
get_batch | torch.randint(len(tokens), (batch_size, 1)) | torch.randint(edges[-1], (batch_size, 1))
get_batch | torch.bucketize(starts, edges, right=True) | (edges <= starts).sum(-1, keepdim=True)
get_batch | .maximum(edges[document - 1]) | .max(edges[document - 1])
AdaptiveSoftmax.forward | [..., [i]] | [..., i].unsqueeze(-1)
AdaptiveSoftmax.forward | F.pad(x, (0, 0, 0, -N % 64)) | x
AdaptiveSoftmax.score | group += targets >= cutoff | group[targets >= cutoff] += 1
AdaptiveSoftmax.score | F.nll_loss(first, chosen, reduction="none") | -first[range(len(x)), chosen]
AdaptiveSoftmax.score | hits & (guess == targets) | self.forward(x)[0].argmax(-1) == targets
LM.forward | .weight[: idx.shape[1]] | (torch.arange(idx.shape[1]))
LM.forward | self.blocks(self.dropout(x)) | [x := f(x) for f in (self.dropout, *self.blocks)][-1]
LM.forward | self.lm_head.embed(idx) | self.lm_head.weight[idx + len(self.lm_head.cutoffs)]
estimate_loss | [y[y != -100] != Tokenizer.unk] | [y[y >= 0].eq(1).logical_not()]
estimate_loss | hits.mean() | hits.sum() / len(losses)
estimate_loss | zip(x.split(batch_size), y.split(batch_size), | zip(x.split(1), y.split(1),
generate | torch.multinomial(probabilities, 1) | (probabilities.cumsum(0) < torch.rand(1)).sum()
generate | return  # | break  #
generate | logits[..., [Tokenizer.pad, Tokenizer.unk]] = -math.inf | logits[..., :2] = -math.inf
beam_search | F.log_softmax(logits[0, -1], dim=-1) | (logits[0, -1] - logits[0, -1].logsumexp(0))
beam_search | topk(min(beams, logits.shape[-1] - 2)) | topk(len(logits[0, -1]) - 2)
beam_search | sorted(candidates, reverse=True) | sorted(candidates, key=lambda text: -text[0])
"""), ("cut_windows", """
def cut_windows(split, starts, T):
    x, y = torch.zeros(len(starts), T).long(), torch.full((len(starts), T), -100)
    for row, start in enumerate(starts.flatten().tolist()):
        document = split[0][start : next(edge for edge in split[1].tolist() if edge > start)]
        x[row, : len(document)] = document[:T]
        y[row, : len(document) - 1] = document[1 : T + 1]
    return x, y
""")]
