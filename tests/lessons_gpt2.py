"""The lessons of gpt2.py: the pieces that char_gpt.py does not have, or has in another form."""

import functools
import io
import itertools
import os
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import lessons_char_gpt as char
import torch
import torch.nn.functional as F
from conftest import SMALL_BPE
from lessons import Piece, Wrong, close, diagnose, numbers, randomize, read_original, require
from torch import nn

SIZES = dict(vocab_size=8, block_size=8, n_embed=8, n_heads=2, n_layers=2, dropout=0.0)
END = "<|endoftext|>"


def small_tokenizer(gpt):
    """Give the module a vocabulary without a network: bytes, 256 th, 258 space + th, 259 END."""
    exec(SMALL_BPE, vars(gpt))
    return gpt.Tokenizer()


def refuses(gpt, message, call, *args, **options):
    """Require that the call raises UserError."""
    with suppress(gpt.UserError):
        call(*args, **options)
        raise Wrong(f"no UserError: {message}")


def check_names(layer, names):
    """Require that the parameters are in parts with these names, no others."""
    found = {name.partition(".")[0] for name, _ in layer.named_parameters()}
    require(found == set(names.split()), f"names: the parameters are in {sorted(found)}, but "
            f"load_pretrained fills {names}")  # fmt: skip


# --- Data -----------------------------------------------------------------------------------------
def grade_tokenizer(gpt):
    tokenizer, text = small_tokenizer(gpt), f"the thin é{END}"
    ids = [256, 101, 258, 105, 110, 32, 195, 169, 259]  # th e, " th" i n, space, é is two bytes
    diagnose(tokenizer.encode(text), ids, {
        "special text split": (ids[:-1] + list(END.encode()), f"{END} must be one id, the last"),
        "no merges": (list(text.encode()), "each byte is one token. th came often, and has an id"),
    }, what="encode")  # fmt: skip
    got, half = tokenizer.decode(ids), tokenizer.decode([97, 195])
    require("\ufffd" not in got, f"broken character: {got!r}: é is 2 tokens. Decode all together")
    require(got == text, f"decode: {got!r} instead of {text!r}")
    require(half == "a\ufffd", f"decode: half a character gives {half!r} instead of 'a\ufffd'")
    refuses(gpt, "a file with a vocabulary of words is accepted", gpt.Tokenizer, "words")
    with mock.patch.object(gpt.tiktoken, "get_encoding", side_effect=OSError("no network")):
        refuses(gpt, "without a network, say what the user can do", gpt.Tokenizer)


def grade_read_pieces(gpt):
    text = "It is  time\n\nto go, now. " * 20
    pieces = [piece for piece in gpt.read_pieces(io.StringIO(text), 24) if piece]
    joined = "".join(pieces)
    require(joined in text, f"white space lost: of {len(text)} characters, {len(joined)} came back")
    require(joined == text, f"end lost: {len(joined)} of {len(text)} characters. Yield the rest")
    for a, b in itertools.pairwise(pieces):
        require(not a[-1].isspace(), f"white space left behind: {a[-9:]!r} + {b[:9]!r}. A space is "
                "part of the token of the word after it, so it begins the next piece")  # fmt: skip
        require(b[0].isspace(), f"word cut: {a[-9:]!r} + {b[:9]!r}. No merge can join the halves")
    n, solid = max(map(len, pieces)), gpt.read_pieces(io.StringIO("x" * 1000), 100)
    require(n <= 72, f"pieces too long: {n} characters, from 24 at a time. It must fit in memory")
    require(max(map(len, solid)) <= 300, "waits for a space: 1000 letters without one are a piece")


def grade_load_tokens(gpt):
    tokenizer, old = small_tokenizer(gpt), []
    encode = functools.partial(tokenizer.encoding.encode, disallowed_special=())
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        path = Path(name, "text.txt")
        for turn, text in enumerate((f"the thin\né{END}" * 9, f"the this\né{END}" * 9)):
            path.write_text(text, encoding="utf-8-sig")
            os.utime(path, (turn, turn))
            got, ids = gpt.load_tokens(path, tokenizer), encode(text, allowed_special={END})
            head = len(got) == len(ids) + 32 and got[32:].tolist() == ids
            require(not head, "header as ids: 32 ids come first; they are the 64 bytes of the key")
            marked = encode("\ufeff" + text, allowed_special={END})
            diagnose(got.long(), torch.tensor(ids), {
                "old file": (old, "the text has changed, but the ids are those of the one before"),
                "mark kept": (marked, "Windows' mark at the beginning is no text: utf-8-sig"),
                "special text split": (encode(text), f"{END} must be one id"),
                "four bytes": ([i for j in ids for i in (j, 0)], "a 0 follows each id: use type H"),
            }, what="ids")  # fmt: skip
            require(got.dtype == torch.uint16, f"dtype: {got.dtype}; uint16 has 2 bytes per id")
            old, times = ids, [{p: p.stat().st_mtime_ns for p in path.parent.iterdir()}]
            require(gpt.load_tokens(path, tokenizer).tolist() == ids, "second call: other ids")
            times.append({p: p.stat().st_mtime_ns for p in path.parent.iterdir()})
            require(times[0] == times[1], "encoded again: the text is the same, so keep the file")
        for content, what in ((b"\xff\xfe", "this text is not UTF-8"), (b"", "the file is empty")):
            path.write_bytes(content)
            refuses(gpt, what, gpt.load_tokens, path, tokenizer)


def grade_split_text(gpt):
    splits = gpt.split_text(torch.arange(100).to(torch.uint16), 0.8, 7, 10)
    train, val = (torch.as_tensor(splits[name]).tolist() for name in ("train", "val"))
    both = len(set(train) & set(val))
    require(not both, f"split overlaps: {both} tokens are in both parts; the model has seen them")
    require(len(val) < 8, f"validation too long: {len(val)} tokens; at most 7 were asked for")
    diagnose(train, list(range(80)), what="training part")
    diagnose(val, list(range(80, 87)), what="validation part")
    refuses(gpt, "too few for one window", gpt.split_text, torch.arange(12), 0.8, 7, 10)


def grade_get_batch(gpt):
    x, y = gpt.get_batch(torch.arange(60_000, 60_009).to(torch.uint16), 4, 3, "cpu")
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}; cross_entropy needs int64")
    require(x.min() > 0, f"ids wrong: {x.min()} is none. 16 bits with a sign end at 32,767")
    char.grade_get_batch(gpt)


# --- Model ----------------------------------------------------------------------------------------
def grade_head(gpt):
    char.grade_head(gpt)
    q, k, v = numbers(3, 2, 3, 5, 4)
    diagnose(gpt.Head()(q[:, :, -1:], k, v), char.attention(q, k, v)[:, :, -1:], {
        "mask on a single query": (v[:, :, :1], "the newest token alone got row 0 of the mask, so "
            "it sees key 0 only, and its result is value 0. It may see all"),
    }, what="result of one query with 5 keys")  # fmt: skip


def grade_cache(gpt):
    both, cache = numbers(2, 2, 3, 6, 4), gpt.Cache(8)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        got = cache.append(*both[..., start:end, :])
        parts = zip(got, both[..., :end, :], both.flip(0)[..., :end, :], strict=True)
        for found, right, other in parts:
            n = found.shape[2]
            require(n != 8, f"whole room: {end} tokens, but 8 places come back, some of them empty")
            at = [i for i in range(n) if start < n and close(found[:, :, i], right[:, :, start])]
            require(not start or 0 not in at, f"overwrites: after {end} tokens, the new one is at "
                    "place 0, where the first one was. It belongs at `length`")  # fmt: skip
            require(start - 1 not in at, f"one position off: the new one is at place {start - 1}, "
                    f"not {start}: the one before it is lost")  # fmt: skip
            diagnose(found, right, {
                "keys and values swapped": (other, "return keys, values: q is compared with keys"),
                "earlier ones lost": (right[:, :, start:], f"only the new ones; return all {end}"),
            }, what=f"keys or values of {end} tokens")  # fmt: skip
        require(cache.length == end, f"length: {cache.length} after {end}. Positions depend on it")


@torch.no_grad()
def check_cache(gpt, layer, x, **wrong):
    """Require that a layer gives, token by token with a cache, what it gives for all together."""
    cache, whole = gpt.Cache(5), layer(x)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        wrong = {name: (results[:, start:end], why) for name, (results, why) in wrong.items()}
        alone = "the new token sees only itself, and none of those before it"
        wrong["cache not used"] = layer(x[:, start:end]), alone
        what = f"result from token {start} on, with a cache"
        diagnose(layer(x[:, start:end], cache), whole[:, start:end], wrong, what=what)


def grade_multi_head(gpt):
    char.grade_multi_head(gpt, True)
    check_names(gpt.MultiHead(12, 3, 0.0, True), "qkv projection")
    for bias in (True, False):
        names = dict(gpt.MultiHead(12, 3, 0.0, bias).named_parameters())
        fits = ("qkv.bias" in names) == bias
        require(fits, f"biases: with qkv_bias = {bias}, the parameters are {', '.join(names)}")
    layer, x = randomize(gpt.MultiHead(12, 3, 0.0, True)).eval(), numbers(2, 5, 12)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    swapped = layer.projection(char.attention(q, v, k).transpose(1, 2).flatten(2))
    why = "it compares queries with values, and averages keys"
    check_cache(gpt, layer, x, **{"keys and values swapped": (swapped, why)})


def gelu(x):
    """GPT-2's, by its formula."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def grade_feed_forward(gpt):
    others = {
        "relu instead of gelu": (F.relu, "-1 becomes 0; gelu gives -0.16, and the weights need it"),
        "exact gelu": (F.gelu, "2 becomes 1.9545; with GPT-2's approximation by tanh, 1.9546"),
    }  # fmt: skip
    try:
        char.grade_feed_forward(gpt, gelu)
    except Wrong as wrong:
        found = [wrong]
        for name, (activation, why) in others.items():
            with suppress(Wrong):
                char.grade_feed_forward(gpt, activation)
                found.append(Wrong(f"{name}: {why}"))
        raise found[-1] from None
    check_names(gpt.FeedForward(6, 0.0), "expand shrink")


def grade_block(gpt):
    char.grade_block(gpt, True)
    check_names(gpt.Block(12, 3, 0.0, True), "ln1 attention ln2 feed_forward")
    check_cache(gpt, randomize(gpt.Block(12, 3, 0.0, True)).eval(), numbers(2, 5, 12))


def grade_lm_init(gpt):
    sizes = dict(vocab_size=300, block_size=64, n_embed=96, n_heads=4, n_layers=8, dropout=0.5)
    model = gpt.LM(**sizes, qkv_bias=True)
    require(model.config == sizes | {"qkv_bias": True}, f"config: {model.config}, not {sizes}")
    require(getattr(model, "init", 0) == "scratch", "init: `train` chooses the rate by model.init")
    tied = model.lm_head.weight is model.token_embedding.weight
    model.token_embedding.weight = nn.Parameter(numbers(300, 96) * 0.02)
    model.tie_weights()
    a, b = model.lm_head.weight, model.token_embedding.weight
    require(a is b or not torch.equal(a, b), "copied instead of shared: equal numbers, but two "
            "parameters. Training moves them apart, and 38.6 million are stored twice")  # fmt: skip
    require(a is b and tied, "not tied: lm_head has a matrix of its own, not token_embedding's")
    for name, p in model.named_parameters():
        last, std = name.endswith(("projection.weight", "shrink.weight")), p.std()
        diagnose(std if p.dim() == 2 else 0.0, 0.0 if p.dim() == 1 else 0.005 if last else 0.02, {
            "residual projections not scaled": (0.02 * last, f"{name} starts with 0.02. A sum of "
                "16 results is √16 times as large as one, so with 8 blocks it is 0.02 / √16"),
            "scaled by the wrong n": ((0.02 / 8**0.5 * last, 0.02 / 16 * last), f"{name} starts "
                f"with {std:.4f}, not 0.02 / √16: n = 2 · 8, as a block adds two results"),
            "scaled everywhere": (0.005, f"{name} adds no result: 0.02, not 0.02 / √16"),
        }, rtol=0.05, what=f"standard deviation of {name}")  # fmt: skip
        fits = p.dim() == 2 or bool((p == name.endswith("weight")).all())
        require(fits, f"biases not zero: {name} starts with deviation {std:.3f}")


def causal(x, block):
    """Return what PyTorch's own layer gives with the weights of a Block."""
    C, H, weights = x.shape[-1], block.attention.n_heads, block.state_dict()
    twin = nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, gelu, batch_first=True, norm_first=True)
    order = "attention.qkv attention.projection feed_forward.expand feed_forward.shrink ln1 ln2"
    ours = [weights[f"{name}.{kind}"] for name in order.split() for kind in ("weight", "bias")]
    twin.load_state_dict(dict(zip(twin.state_dict(), ours, strict=True)))
    return twin(x, torch.ones(x.shape[1], x.shape[1]).triu(1).bool())


def grade_lm_forward(gpt):
    char.grade_lm_forward(gpt)
    model, idx = randomize(gpt.LM(**SIZES)).eval(), torch.randint(8, (2, 9))
    caches, step = [gpt.Cache(8) for _ in range(2)], torch.no_grad()(model)

    def right(*places):
        """The last logits of the first tokens, at these places."""
        x = model.token_embedding(idx[:, : len(places)])
        x = x + model.position_embedding.weight[list(places)]
        x = functools.reduce(causal, model.blocks, x)
        return model.ln_f(x)[:, -1:] @ model.token_embedding.weight.T

    diagnose(step(idx[:, :3], caches=caches)[0], right(0, 1, 2), {
        "all positions": (model(idx[:, :3])[0], "with caches, only the last one gets logits"),
        "one position off": (right(1, 2, 3), "the first token got the position 1, not 0"),
    }, what="logits of a prompt")  # fmt: skip
    held = [cache.length for cache in caches]
    require(any(held), "cache not passed: after a prompt of 3 tokens, the caches are empty")
    diagnose(step(idx[:, 3:4], caches=caches)[0], right(0, 1, 2, 3), {
        "positions restart": (right(0, 1, 2, 0), "the token after 3 got the position 0, not 3"),
        "one position off": ((right(0, 1, 2, 4), right(0, 1, 2, 2)), "the token after 3 got the "
            "position 4 or 2. They count from 0, so it is 3"),
    }, what="logits of token 3 with a cache")  # fmt: skip
    for i in range(4, 8):
        step(idx[:, i : i + 1], caches=caches)
    refuses(gpt, "9 tokens, and 8 positions", model, idx)
    refuses(gpt, "one token after 8, and 8 positions", step, idx[:, 8:], caches=caches)


# --- OpenAI's weights -----------------------------------------------------------------------------
def grade_openai_name(gpt):
    for ours, theirs in (
        ("token_embedding", "wte"), ("position_embedding", "wpe"), ("ln_f", "ln_f"),
        ("blocks.3.ln1", "h.3.ln_1"), ("blocks.3.attention.qkv", "h.3.attn.c_attn"),
        ("blocks.11.attention.projection", "h.11.attn.c_proj"), ("blocks.3.ln2", "h.3.ln_2"),
        ("blocks.3.feed_forward.expand", "h.3.mlp.c_fc"),
        ("blocks.3.feed_forward.shrink", "h.3.mlp.c_proj"),
    ):  # fmt: skip
        got, right = gpt.openai_name(f"{ours}.weight"), f"{theirs}.weight"
        require(got != f"transformer.{right}", f"prefix: {got}: OpenAI's file has no prefix")
        require(got == right, f"name: {ours}.weight became {got} instead of {right}")


@functools.cache
def openai_model():
    """Return transformers' GPT-2, with random weights, as small as SIZES: V = T = C is a trap."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import transformers

    config = dict(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    config = transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


@torch.no_grad()
def grade_load_pretrained(gpt):
    from safetensors.torch import save_file

    theirs, idx = openai_model(), torch.arange(8)[None]
    weights = theirs.transformer.state_dict()

    def logits(*turned):
        """Its logits, with the matrices of these names transposed."""
        change = {n: p.T for n, p in theirs.named_parameters() if n.endswith(turned)}
        return torch.func.functional_call(theirs, change, (idx,)).logits

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        for prefix, more, name, why in (
            ("", {}, "not loaded", "a file as it must be is refused"),
            ("transformer.", {}, "prefix not removed", "names may begin with transformer."),
            ("", {"h.0.attn.bias": torch.ones(8, 8)}, "masks not skipped", "they are not weights"),
        ):
            save_file({prefix + name: p for name, p in (weights | more).items()}, path)
            try:
                model = gpt.load_pretrained(path, **SIZES)
            except Exception as error:
                text = repr(error.__cause__ or error)
                turned = not any(words in text for words in ("size mismatch", "match the size"))
                require(turned, "not transposed: in the file, c_attn is (C, "
                        "3C) (Conv1D, x @ W), and (3C, C) in nn.Linear, x @ Wᵀ")  # fmt: skip
                raise Wrong(f"{name}: {why}: {text:.200}") from error
            diagnose(model.eval()(idx)[0], logits(), {
                "square matrices not transposed": (logits("attn.c_proj.weight"), "attn.c_proj is "
                    "(C, C): its shape does not show that it must be transposed, too"),
                "everything transposed": (logits("wte.weight", "wpe.weight"), "the embeddings are "
                    "tables. Only the matrices of the blocks, c_..., are transposed"),
            }, what="logits")  # fmt: skip
        refuses(gpt, "other sizes", gpt.load_pretrained, path, **SIZES | {"n_layers": 3})
        bad = Path(folder, "bad")
        bad.write_bytes(path.read_bytes()[:-4])
        refuses(gpt, "4 bytes of the file are missing", gpt.load_pretrained, bad, **SIZES)
    require(model.lm_head.weight is model.token_embedding.weight, "lm_head not tied: it is another "
            "parameter with the same numbers. load_state_dict(assign=True) makes two")  # fmt: skip
    require(model.init == "pretrained", f"init: {model.init!r}, so training takes its rate")


# --- Training -------------------------------------------------------------------------------------
def grade_estimate_loss(gpt):
    char.grade_estimate_loss(gpt)
    tokens = torch.arange(23).to(torch.uint16)
    a, b = (gpt.estimate_loss(char.Bigram(numbers(23, 23)), t, 2) for t in (tokens.long(), tokens))
    require(a == b, f"uint16: the loss is {b} with ids as load_tokens returns them, not {a}")


def grade_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, gpt.BETAS, model = 0.25, (0.8, 0.9), gpt.LM(**SIZES)
    names, optimizers = {p: n for n, p in model.named_parameters()}, gpt.make_optimizers(model)
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    require(kinds == ["AdamW"], f"wrong optimizer: {kinds} instead of [AdamW]")
    for group in optimizers[0].param_groups:
        require(group["betas"] == gpt.BETAS, f"betas: {group['betas']} instead of {gpt.BETAS}")
        for p in group["params"]:
            name, decay = names.pop(p), group["weight_decay"]
            right = 0.25 * (p.dim() == 2)
            require(decay == right, f"weight decay: {name} has {decay}, not {right}: matrices only")
    require(not names, f"parameters left out: {len(names)} never change: {[*names.values()][:2]}")


def grade_train_step(gpt):
    gpt.BATCH_SIZE = 4
    char.grade_train_step(gpt)
    gpt.BATCH_SIZE, gpt.GRADIENT_CLIP = 2, None
    for shares in ((0.5, 0.5), (0.4, 0.4, 0.2)):
        x, y = torch.randint(7, (2, {2: 4, 3: 5}[len(shares)], 4))
        model, twin = char.Bigram(numbers(7, 7)), char.Bigram(numbers(7, 7))
        losses = [twin(*part)[1] for part in zip(x.split(2), y.split(2), strict=True)]
        parts = [torch.autograd.grad(loss, twin.table)[0] for loss in losses]
        right, twice = (sum(g * s**n for g, s in zip(parts, shares, strict=True)) for n in (1, 2))
        got = gpt.train_step(model, [torch.optim.SGD([model.table], 0.0)], x, y, 1.0)
        most, last = max(map(len, model.seen)), (1, shares[-1])
        require(most <= 2, f"one large batch: {most} windows at once; memory is for BATCH_SIZE = 2")
        diagnose(twin.table - model.table, right, {
            "not divided": (sum(parts), f"{len(parts)} means were added, so the gradient is "
                f"{sum(parts).norm() / right.norm():.1f} times too long. Multiply by shares"),
            "divided twice": (twice, "the gradient is too short: each share was multiplied twice"),
            "gradients zeroed in each batch": (tuple(parts[-1] * s for s in last), "only the last "
                "batch is left. Zero once for all batches, after the step"),
            "all batches count the same": (sum(parts) / len(parts), "5 windows are 2 + 2 + 1: the "
                "last batch's share is 1/5, not 1/3"),
        }, what="gradient")  # fmt: skip
        right = sum(loss.item() * s for loss, s in zip(losses, shares, strict=True))
        wrong = tuple(losses[-1] * s for s in last)
        wrong = {"loss of the last batch": (wrong, "return the mean of all windows")}
        diagnose(got, right, wrong, what="loss")


def grade_parallelize(gpt):
    model, calls = char.Bigram(numbers(7, 7)), []
    model.lm_head, gpt.BATCH_SIZE, gpt.WINDOW, gpt.TOKENS_PER_STEP = nn.Linear(7, 7), 2, 4, 16
    compilers = (lambda model: nn.Identity()), (lambda model: calls.append(model) or model)
    for gpt.COMPILE, compiler in zip((False, True, True), compilers[:1] + compilers, strict=True):
        with mock.patch("torch.compile", compiler), redirect_stdout(io.StringIO()):
            same = gpt.parallelize(model) is model  # nn.Identity fails when it is called
            require(same, f"no way on: COMPILE = {gpt.COMPILE} fails. Return the model itself")
    require(calls == [model], "not compiled: COMPILE is True")
    require(model.seen, "compiled late: it happens at the first call. Make one, within `try`")
    left = model.table.grad is not None and model.table.grad.any()
    require(not left, "gradients left: those of the trial are added to the first step's")
    gpt.COMPILE, gpt.N_RANKS = False, 2
    with mock.patch("torch.nn.parallel.DistributedDataParallel", lambda model: [model]):
        require(gpt.parallelize(model) == [model], "not joined: each process trains alone")


def grade_train(gpt):
    gpt.COMPILE = False
    with mock.patch.object(char.Bigram, "init", "pretrained", create=True):
        char.grade_train(gpt)


# --- Generation -----------------------------------------------------------------------------------
class Chain(nn.Module):
    """A model whose next id depends on all that it sees. It notes that, and has room for 8."""

    def __init__(self):
        super().__init__()
        self.block_size, self.blocks = 8, nn.ModuleList([nn.Identity(), nn.Identity()])
        self.seen, self.weight = [], nn.Parameter(numbers(1))

    @staticmethod
    def following(ids):
        """Return the likeliest next id, but for those beyond the vocabulary."""
        return (7 * ids[-1] + sum(ids) + len(ids)) % 10

    def forward(self, idx, targets=None, caches=()):
        require(not self.training, "dropout on in evaluation: call model.eval() first")
        require(not torch.is_grad_enabled(), "gradients in evaluation: put @torch.no_grad() above")
        one = len(caches) == 2 and caches[0] is caches[1]
        require(not one, "one cache for all blocks: their keys and values differ")
        held, self.new = caches[0].length if caches else 0, idx.shape[1]
        require(held + self.new <= 8, f"no room: {self.new} tokens after {held}, but only 8 places")
        for cache in caches:
            ids, _ = cache.append(idx[:, None, :, None], idx[:, None, :, None])
        self.seen.append((ids if caches else idx).flatten().tolist())
        logits = F.one_hot(torch.tensor([[self.following(self.seen[-1])]]), 12).float()
        logits[..., 10:] = 2.0
        return logits, None


def grade_generate(gpt):
    gpt.Tokenizer.vocab_size = 10
    for ids in ([3, 1, 4], [3, 1, 4, 1, 5, 9, 2, 6, 5]):
        model, prompt, context, fresh = Chain().train(), list(ids), ids[-8:], True
        tokens, wrong, window = gpt.generate(model, prompt, 9, temperature=0), False, []
        for call in range(9):
            token, got = int(next(tokens)), model.seen[-1]
            for name, mistake in (
                ("prompt cut at the wrong end", ids[:8] if len(ids) > 8 else None),
                ("only the last token, without a cache", context[-1:]),
                ("sent again", (context[:-1] + context)[-len(got) :]),
                ("newer half dropped", model.seen[call - 1][:4]),
                ("one token dropped at a time", window),
                ("context", got),
            ):
                right = got == context or got != mistake
                require(right, f"{name}: the model saw {got} instead of {context}")
            require(fresh or model.new == 1, f"no cache: for one new token, {model.new} go through")
            require(token < 10, f"ids beyond the vocabulary: {token}; vocab_size is 10")
            right = model.following(context)
            fresh, wrong, context = len(context) == 8, wrong or token != right, [*context, right]
            window, context = context[1:], context[-4:] if fresh else context
        require(not wrong, "wrong tokens: at temperature 0, they are not the likeliest ones")
        require(prompt == ids, f"caller's list changed: the prompt is now {prompt}")
    same = [list(gpt.generate(Chain(), [3], 8, *how)) for how in ((0,), (1, 1), (1, None, 1e-6))]
    require(same[0] == same[1] == same[2], "options ignored: temperature, top_k or top_p")
    drawn = list(gpt.generate(Chain(), [3], 8, temperature=9.0))
    require(drawn != same[0], "always argmax: also at temperature 9. Draw: torch.multinomial")


@torch.no_grad()
def grade_for_generation(gpt):
    model, idx = randomize(gpt.LM(**SIZES)).eval(), torch.arange(6)[None]
    before, weights = model(idx)[0], [p.clone() for p in model.parameters()]
    got = gpt.for_generation(model)(idx)[0].float()
    kept = all(map(torch.equal, model.parameters(), weights)) and torch.equal(model(idx)[0], before)
    require(kept, "the model itself is changed: training would go on with 16 bits. Copy it first")
    error = ((got - before).abs().max() / before.abs().max()).item()
    require(error < 3e-3, f"too coarse: logits differ by {error:.1%}; with float16 about 0.1%")
    able = "fbgemm" in torch.backends.quantized.supported_engines
    require(error or not able, "not 16 bits: the logits have not changed at all")
    gpt.HALF_WEIGHTS = False
    require(gpt.for_generation(model) is model, "HALF_WEIGHTS ignored: it is False")


def grade_stream(gpt):
    ids, right, taken = [*"aé→🙂".encode(), 258, 0xE2, 0x86], "aé→🙂 th\ufffd", []
    tokenizer = small_tokenizer(gpt)
    got = "".join(gpt.stream(tokenizer, ids))
    require(got.count("\ufffd") < 2, f"broken character: {got!r} instead of {right!r}. A character "
            "can have several tokens: wait for the last one")  # fmt: skip
    require(got != right[:-1], "end lost: the text ends inside a character; show \ufffd for it")
    require(got == right, f"result: {got!r} instead of {right!r}")
    next(piece for piece in gpt.stream(tokenizer, (taken.append(i) or i for i in ids)) if piece)
    require(len(taken) == 1, f"waits: the first text came after {len(taken)} tokens, not after 1")


def grade_write_sample(gpt):
    tokenizer, gpt.for_generation = small_tokenizer(gpt), lambda model: model
    gpt.generate = lambda model, ids, *options: iter([258, 195, 169])
    with redirect_stdout(io.StringIO()) as out:
        got = gpt.write_sample(gpt.LM(**SIZES), tokenizer, "It is")
    require(got != " thé", "prompt lost: it belongs to the text that is returned")
    require(got == "It is thé", f"result: {got!r} instead of 'It is thé'")
    require(out.getvalue()[:9] == got, f"not printed: {out.getvalue()[:9]!r} instead of {got!r}")


PIECES = [
    Piece(name, definitions or name, grade, task)
    for name, definitions, grade, task in (
        ("Tokenizer", "Tokenizer.__init__ Tokenizer.encode Tokenizer.decode", grade_tokenizer,
         "tiktoken's encoding; ids of any text, and the text of ids"),
        ("read_pieces", "", grade_read_pieces, "yield pieces that end before white space"),
        ("load_tokens", "", grade_load_tokens, "encode once into a file, then map it"),
        ("split_text", "", grade_split_text, "training part, and validation part after it"),
        ("get_batch", "", grade_get_batch, "random windows, and the token after each, int64"),
        ("Head", "Head.forward", grade_head, "attention in one function; one query sees all"),
        ("Cache", "Cache.__init__ Cache.append", grade_cache, "store the new ones, return all"),
        ("MultiHead", "MultiHead.__init__ MultiHead.forward", grade_multi_head,
         "as before, with biases on q, k and v, and keys and values from the cache"),
        ("FeedForward", "FeedForward.__init__ FeedForward.forward", grade_feed_forward,
         "two layers with GPT-2's gelu between them, and dropout"),
        ("Block", "Block.__init__ Block.forward", grade_block, "the cache is for attention"),
        ("LM", "LM.__init__ LM.tie_weights", grade_lm_init, "layers, tied; GPT-2's start"),
        ("LM.forward", "", grade_lm_forward, "as before; with caches, what comes after them"),
        ("openai_name", "", grade_openai_name, "replace the parts of the name"),
        ("load_pretrained", "", grade_load_pretrained, "read, rename, transpose, fill an LM, tie"),
        ("estimate_loss", "", grade_estimate_loss, "the mean loss of tokens from a file"),
        ("make_optimizers", "", grade_make_optimizers, "AdamW; weight decay for matrices only"),
        ("get_lr", "", char.grade_get_lr, "a line up, then a line down"),
        ("train_step", "", grade_train_step, "add the gradients of batches, then one step"),
        ("parallelize", "", grade_parallelize, "compile, or go on without; join processes"),
        ("train", "", grade_train, "steps, evaluations, saves, and the best model at the end"),
        ("next_token_probabilities", "", char.grade_next_token_probabilities,
         "temperature, softmax, top_k, top_p"),
        ("generate", "", grade_generate, "predict with caches, draw, yield; drop the older half"),
        ("for_generation", "", grade_for_generation, "a copy with weights of 16 bits"),
        ("stream", "", grade_stream, "the text of tokens, each character whole"),
        ("write_sample", "", grade_write_sample, "print while tokens come; return the text"),
    )
]  # fmt: skip


def table(text):
    """Return the rows of a table; ∅ means nothing, ¶ a new line."""
    rows = [row.split(" | ") for row in text.strip().replace("\n    ", " ").splitlines()]
    return [[cell.replace("¶", "\n").replace("∅", "") for cell in row] for row in rows]


MISTAKES = table(r"""
Tokenizer | special text split | encode(text, allowed_special="all") | encode_ordinary(text)
Tokenizer | broken character | self.encoding.decode(list(ids)) |
    "".join(self.encoding.decode([i]) for i in ids)
Tokenizer | no merges | self.encoding.encode(text, allowed_special="all") | list(text.encode())
read_pieces | word cut | place.end() if place else len(rest) | len(rest)
read_pieces | white space lost | rest = rest[cut:] | rest = rest[cut:].lstrip()
read_pieces | white space left behind | \S(?=[ \n]) | \S\s
read_pieces | end lost | while more := file.read(n_characters): |
    while len(more := file.read(n_characters)) == n_characters:
read_pieces | pieces too long | (n_characters) | ()
read_pieces | waits for a space | else len(rest) | else 0
load_tokens | header as ids | [32:] | ∅
load_tokens | old file | if found != key: | if not found:
load_tokens | encoded again | if found != key: | if True:
load_tokens | four bytes | array("H" | array("I"
load_tokens | mark kept | utf-8-sig | utf-8
split_text | split overlaps | tokens[cut : cut + | tokens[cut - 1 : cut +
split_text | validation too long | cut : cut + max_val_tokens | cut:
get_batch | dtype | device, torch.int64 | device
Head | mask on a single query | q.shape[-2] > 1 | True
Head | mask missing | q.shape[-2] > 1 | False
Cache | overwrites | start, self.length = self.length, | start, self.length = 0,
Cache | one position off | = self.length, | = max(0, self.length - 1),
Cache | keys and values swapped | return self.k[ | return self.v[
Cache | earlier ones lost | return self.k[:, :, : self.length] | return k
Cache | whole room | return self.k[:, :, : self.length] | return self.k
MultiHead | keys and values swapped | k, v = cache.append | v, k = cache.append
MultiHead | cache not used | k, v = cache.append(k, v) | cache.append(k, v)
MultiHead | biases | bias=qkv_bias | bias=False
FeedForward | names | nn.Dropout(dropout) | nn.Dropout(dropout); self.more = nn.LayerNorm(8)
FeedForward | exact gelu | , approximate="tanh" | ∅
FeedForward | relu instead of gelu | gelu(self.expand(x), approximate="tanh") |
    relu(self.expand(x))
Block | cache not used | (self.ln1(x), cache) | (self.ln1(x))
LM | not tied | self.tie_weights() | pass
LM | copied instead of shared | = self.token_embedding.weight |
    .data = self.token_embedding.weight.clone()
LM | residual projections not scaled | 0.02 / (2 * n_layers) ** 0.5 | 0.02
LM | scaled by the wrong n | (2 * n_layers) | n_layers
LM | scaled everywhere | if is_last else 0.02) | )
LM | biases not zero | nn.init.zeros_(p) | pass
LM.forward | positions restart | caches[0].length if caches else 0 | 0
LM.forward | one position off | caches[0].length if | caches[0].length + 1 if
LM.forward | cache not passed | block(x, cache) | block(x)
LM.forward | all positions | x[:, -1:] if caches else x | x
LM.forward | targets shifted twice | logits.flatten(0, 1), targets |
    logits[:, :-1].flatten(0, 1), targets[:, 1:]
openai_name | name | ("ln2", "ln_2") | ("ln2", "ln_1")
openai_name | prefix | return name | return "transformer." + name
load_pretrained | prefix not removed | .removeprefix("transformer.") | ∅
load_pretrained | not transposed | part.t().contiguous() if is_turned else part | part
load_pretrained | everything transposed | ".c_" in name and part.dim() == 2 | part.dim() == 2
load_pretrained | square matrices not transposed | ".c_" in name and | len({*part.shape}) > 1 and
load_pretrained | lm_head not tied | model.tie_weights() | pass
load_pretrained | masks not skipped | (".attn.bias", ".attn.masked_bias") | ".attn.masked_bias"
estimate_loss | mean of means | n = (targets != -100).sum().item() | n = targets.numel()
make_optimizers | weight decay | "weight_decay": 0.0 | "weight_decay": WEIGHT_DECAY
make_optimizers | parameters left out | [decay, no_decay] | [decay]
make_optimizers | betas | betas=BETAS | betas=(0.9, 0.999)
make_optimizers | wrong optimizer | optim.AdamW | optim.Adam
train_step | not divided | * (len(xs) / len(x)) | ∅
train_step | divided twice | (len(xs) / len(x)) | (len(xs) / len(x)) ** 2
train_step | gradients zeroed in each batch | loss.backward() | model.zero_grad(); loss.backward()
train_step | all batches count the same | len(xs) / len(x) | 1 / len(batches)
train_step | one large batch | x.split(BATCH_SIZE), y.split(BATCH_SIZE) | [x], [y]
train_step | loss of the last batch | total += loss.detach() | total = loss.detach()
train_step | gradients not zeroed | optimizer.zero_grad() | pass
parallelize | gradients left | model.zero_grad() | pass
parallelize | not joined | if N_RANKS > 1 else parallel | if False else parallel
parallelize | no way on | }")¶            parallel = model | }")
train | validation text | splits["train"], TOKENS | splits["val"], TOKENS
generate | sent again | new = ids[-1:] | new = ids
generate | only the last token, without a cache | caches=caches | caches=()
generate | newer half dropped | [-max(1, model.block_size // 2) :] | [: model.block_size // 2]
generate | one token dropped at a time | [-max(1, model.block_size // 2) :] | [1:]
generate | gradients in evaluation | @torch.no_grad()¶ | ∅
generate | always argmax | torch.multinomial(probabilities, 1) | probabilities.argmax()
generate | caller's list changed | [int(i) for i in ids][-model.block_size :] | ids
generate | options ignored | temperature, top_k, top_p) | temperature)
generate | no room | ¶            caches = [Cache(model.block_size) for _ in model.blocks] | ∅
generate | ids beyond the vocabulary | logits[..., Tokenizer.vocab_size :] = -math.inf | pass
generate | prompt cut at the wrong end | [-model.block_size :] | [: model.block_size]
generate | one cache for all blocks | ids, [Cache(model.block_size) for _ in model.blocks] |
    ids, [Cache(model.block_size)] * len(model.blocks)
generate | no cache | new = ids[-1:] |
    new, caches = ids, [Cache(model.block_size) for _ in model.blocks]
for_generation | the model itself is changed | quick = copy.deepcopy(model, | quick, _ = model, (
for_generation | HALF_WEIGHTS ignored | not HALF_WEIGHTS or | False or
for_generation | not 16 bits | list(pool.map(halve, places)) | pass
for_generation | too coarse | linear.bias) | None)
stream | broken character | yield decoder.decode(tok | yield decoder.decode(final=True, input=tok
stream | end lost | yield decoder.decode(b"", final=True) | pass
write_sample | prompt lost | prompt, [] | "", []
""")


def edited(old, new):
    """Return the original's source with a correct change in one place."""
    source = read_original("gpt2")
    assert source.count(old) == 1, old
    return source.replace(old, new)


VARIANTS = [
    (name, edited(old, new))
    for name, old, new in table(r"""
Tokenizer | encode(text, allowed_special="all") | encode_batch([text], allowed_special="all")[0]
Tokenizer | encoding.decode(list(ids)) | encoding.decode_bytes([*ids]).decode(errors="replace")
read_pieces | .*\S(?=[ \n]) | [\s\S]*[^\s](?=\s)
load_tokens | array("H", ids) | b"".join(i.to_bytes(2, "little") for i in ids)
load_tokens | encode(some, num_threads=cores, allowed_special="all") | map(tokenizer.encode, some)
split_text | tokens[cut : cut + max_val_tokens] | tokens[cut:][:max_val_tokens]
split_text | int(train_share * len(tokens)) | math.floor(len(tokens) * train_share)
get_batch | .to(device, torch.int64)¶    return windows | .long().to(device)¶    return windows
Cache | self.v[:, :, start : self.length] = v | self.v.narrow(2, start, v.shape[2]).copy_(v)
MultiHead | self.qkv(x).split(C, dim=-1) | self.qkv(x).chunk(3, dim=-1)
MultiHead | .transpose(1, 2).reshape(B, T, C) | .permute(0, 2, 1, 3).flatten(2)
MultiHead | .view(B, T, self.n_heads, -1).transpose | .unflatten(2, (self.n_heads, -1)).transpose
FeedForward | F.gelu(self.expand(x), approximate="tanh") | nn.GELU("tanh")(self.expand(x))
Block | x + self.attention(self.ln1(x), cache) | self.attention(self.ln1(x), cache=cache).add(x)
Block | x + self.feed_forward(self.ln2(x)) | torch.add(x, self.feed_forward(self.ln2(x)))
LM | lm_head.weight = self.token_embedding.weight | token_embedding.weight = self.lm_head.weight
LM | 0.02 / (2 * n_layers) ** 0.5 | 0.02 * math.sqrt(0.5 / n_layers)
LM | nn.init.zeros_(p) | p.data.fill_(0.0)
LM.forward | position_embedding.weight[past:end] | position_embedding(torch.arange(past, end))
LM.forward | self.lm_head(x).float() | torch.einsum("btc,vc->btv", x, self.token_embedding.weight)
LM.forward | F.cross_entropy(logits. | F.nll_loss(logits.log_softmax(-1).
load_pretrained | part.t().contiguous() if is_turned | torch.einsum("ij->ji", part) if is_turned
estimate_loss | (targets != -100).sum().item() | int((targets >= 0).sum())
make_optimizers | betas=BETAS, fused=True | betas=BETAS
train_step | * (len(xs) / len(x)) | / len(x) * len(xs)
train_step | loss.backward() | torch.autograd.backward(loss)
generate | torch.tensor([new], device | torch.as_tensor(new).view(1, -1).to(device
generate | [-max(1, model.block_size // 2) :] | [len(ids) - model.block_size // 2 :]
for_generation | linear.weight.detach() | linear.weight.data.clone()
""")
]
SOLUTIONS = r"""
def read_pieces(file, n_characters):
    rest = ""
    for text in iter(lambda: file.read(n_characters), ""):
        *pieces, rest = re.split(r"(?<=\S)(?=\s)", rest + text)
        yield from pieces or [rest]
        rest = rest if pieces else ""
    yield rest

class Head:
    def forward(self, q, k, v):
        earlier, results = k.shape[2] - q.shape[2], []
        for t in range(q.shape[2]):
            scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : earlier + t + 1])
            weights = F.softmax(scores / math.sqrt(q.shape[3]), dim=-1)
            results.append(torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : earlier + t + 1]))
        return torch.stack(results, dim=2)

class Cache:
    def __init__(self, block_size):
        self.keys, self.values = [], []
    @property
    def length(self):
        return sum(k.shape[2] for k in self.keys)
    def append(self, k, v):
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)

def openai_name(name):
    names = dict(token_embedding="wte", position_embedding="wpe", blocks="h", ln1="ln_1")
    names |= dict(attention="attn", qkv="c_attn", projection="c_proj", feed_forward="mlp")
    names |= dict(expand="c_fc", shrink="c_proj", ln2="ln_2")
    return ".".join(names.get(part, part) for part in name.split("."))

def load_pretrained(path, **sizes):
    from safetensors.torch import load_file
    try:
        model, theirs = LM(**sizes), load_file(path)
        theirs = {name.removeprefix("transformer."): p for name, p in theirs.items()}
        for name, p in model.named_parameters():
            matrix = theirs[openai_name(name)]
            p.data.copy_(matrix.T if name.startswith("blocks") and p.dim() == 2 else matrix)
    except Exception as error:
        raise UserError(str(error))
    model.init = "pretrained"
    return model

def make_optimizers(model):
    decay = lambda p: WEIGHT_DECAY if p.dim() > 1 else 0.0
    groups = [{"params": [p], "weight_decay": decay(p)} for p in model.parameters()]
    return [torch.optim.AdamW(groups, betas=BETAS)]

def stream(tokenizer, tokens):
    rest = b""
    for token in tokens:
        rest += tokenizer.encoding.decode_single_token_bytes(token)
        with contextlib.suppress(UnicodeDecodeError):
            yield rest.decode()
            rest = b""
    yield rest.decode(errors="replace")
"""
VARIANTS += [
    (piece.name, SOLUTIONS)
    for piece in PIECES
    if f"\ndef {piece.name}(" in SOLUTIONS or f"\nclass {piece.name}:" in SOLUTIONS
]
