"""Graders of what gpt2.py has anew or changed. See watch_char_gpt.py."""

from types import SimpleNamespace

import tiktoken
import torch
from torch import nn

from graders import watch_char_gpt as char
from graders.student import (
    Near,
    Wrong,
    entry,
    equal_numbers,
    fill,
    kind,
    numbers,
    numbers_by_size,
    outcome,
    random_parameters,
    tensor,
    two,
    watch_dropout,
)

END = "<|endoftext|>"
WORDS = [
    *(bytes([i]) for i in range(256)),
    b"th",
    b" a",
    b" th",
]  # id 256: th, 257: " a", 258: " th"


def small_encoding():
    """Return a vocabulary that needs no network: 256 bytes, 3 merges, and END, 259."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r" ?\w+| ?[^\s\w]+|\s+",
        mergeable_ranks={word: i for i, word in enumerate(WORDS)},
        special_tokens={END: len(WORDS)},
    )


def use_small_encoding(gpt):
    gpt.tiktoken = SimpleNamespace(
        get_encoding=lambda name: small_encoding(), Encoding=tiktoken.Encoding
    )


# --- Text -----------------------------------------------------------------------------------------
def watch_tokenizer(gpt):
    use_small_encoding(gpt)
    tokenizer = gpt.Tokenizer()
    yield "encode('the thin')", tokenizer.encode("the thin")
    yield "encode('é')", tokenizer.encode("é")
    yield f"encode('a{END}')", tokenizer.encode(f"a{END}")
    yield "encode('')", tokenizer.encode("")
    yield (
        "decode([256, 101, 195, 169, 259])",
        tokenizer.decode([256, 101, 195, 169, 259]),
    )
    yield "decode of a generator", tokenizer.decode(i for i in [256, 101])
    yield "vocabulary", tokenizer.vocabulary


def watch_split_text(gpt):
    gpt.TRAIN_SHARE, gpt.MAX_VAL_TOKENS, gpt.WINDOW = 0.5, 4, 8
    tokens = (torch.arange(100) * 37) % 101
    parts = gpt.split_text(tokens.int(), 0.8, 7, 10)
    for name in ("train", "val"):
        part = entry(parts, "split_text", name)
        yield f"{name} part", tensor(part, f"split_text(...)[{name!r}]")
    yield (
        "val part with room for all",
        gpt.split_text(tokens, 0.8, 70, 10)["val"],
    )


def watch_get_batch(gpt):
    yield from char.watch_get_batch(gpt, char.TOKENS.to(torch.int32))


def watch_stream(gpt):
    tokenizer = SimpleNamespace(encoding=small_encoding())
    ids = [*"aé→🙂".encode(), 258, 0xE2, 0x86]
    pieces = list(gpt.stream(tokenizer, iter(ids)))
    yield (
        "all pieces together, the last character broken off",
        "".join(pieces),
    )
    yield (
        "pieces that are a broken character",
        sum("\ufffd" in piece for piece in pieces),
    )
    pieces = gpt.stream(tokenizer, iter([258, 1]))
    first = next(iter(pieces))
    yield "first piece of ' th'", first
    yield (
        "a byte that is no UTF-8",
        "".join(gpt.stream(tokenizer, [97, 0xFF, 98])),
    )


# --- Model ----------------------------------------------------------------------------------------
def watch_head(gpt):
    yield from char.watch_head(gpt)
    q, k, v = char.queries_keys_values()
    head = gpt.Head()
    yield (
        "result of the newest token, of 5",
        tensor(head(q[:, :, 4:], k, v), "Head"),
    )
    yield (
        "result of the 2 newest tokens, of 5",
        tensor(head(q[:, :, 3:], k, v), "Head"),
    )


def watch_cache(gpt):
    gpt.BLOCK_SIZE = 3
    k = numbers(2, 3, 6, 4)
    v = numbers(2, 3, 6, 4, seed=1)
    cache = gpt.Cache(8)
    yield "length at first", cache.length
    for start, end in ((0, 3), (3, 4), (4, 6)):
        keys, values = (part[:, :, start:end] for part in (k, v))
        kept = cache.append(keys.clone(), values.clone())
        keys, values = two(kept, "append", "two tensors k, v")
        yield f"keys of {end} tokens", tensor(keys, "append")
        yield f"values of {end} tokens", tensor(values, "append")
        yield f"length after {end} tokens", cache.length
    other = gpt.Cache(8)
    two_keys, two_values = k[:, :, :2], v[:, :, :2]
    keys, _ = other.append(two_keys, two_values)
    yield "keys of 2 tokens in a second cache", keys


def watch_multi_head(gpt):
    yield from char.watch_multi_head(gpt)
    layer = fill(gpt.MultiHead(12, 3, 0.0), equal_numbers).eval()
    x, cache = numbers(2, 5, 12), gpt.Cache(6)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        yield (
            f"with a cache, result of tokens {start} to {end - 1}",
            layer(x[:, start:end], cache),
        )
    layer, cache = (
        random_parameters(gpt.MultiHead(12, 3, 0.0)).eval(),
        gpt.Cache(6),
    )
    three, one = x[:, :4].split([3, 1], dim=1)
    parts = [layer(three, cache), layer(one, cache)]
    with_cache = torch.cat(parts, dim=1)
    yield (
        "what a cache changes in the result",
        Near(with_cache - layer(x[:, :4]), 1e-3),
    )
    vectors = [p for p in layer.parameters() if p.dim() == 1]
    biases = sum(p.numel() for p in vectors)
    yield "number of biases for C = 12", biases


def watch_feed_forward(gpt):
    yield from char.watch_feed_forward(gpt)
    layer = gpt.FeedForward(6, 0.0)
    names = sorted(name for name, _ in layer.named_parameters())
    yield "names of the parameters, for load_pretrained", names


class CountingAttention(char.PlainAttention):
    """In place of MultiHead: it adds the length of its cache."""

    def forward(self, x, cache=None):
        return super().forward(x) + (0 if cache is None else cache.length)


def watch_block(gpt):
    yield from char.watch_block(gpt)
    gpt.MultiHead = CountingAttention
    block, cache = gpt.Block(12, 3, 0.0).eval(), gpt.Cache(9)
    cache.length = 4
    yield "result with a cache", block(numbers(2, 1, 12), cache)
    names = sorted(name for name, _ in gpt.Block(12, 3, 0.0).named_children())
    yield "names of the parts, for load_pretrained", names


def watch_lm(gpt):
    char.set_other_sizes(gpt)
    V, T, C, n = 300, 64, 96, 8
    model = gpt.LM(V, T, C, 4, n, 0.25)
    yield "config", dict(model.config)
    yield "block_size", model.block_size
    yield (
        "lm_head and token_embedding have one matrix",
        model.lm_head.weight is model.token_embedding.weight,
    )
    size = sum(p.numel() for p in model.parameters())
    yield (
        "number of parameters for V = 300, T = 64, C = 96 and 8 blocks",
        size,
    )
    for name, p in model.named_parameters():
        if p.dim() == 2 and ("blocks" not in name or "blocks.3" in name):
            yield (
                f"standard deviation of {name} times 100",
                Near(100 * p.std(), 0.1),
            )
    named = dict(model.named_parameters())
    biases = [name for name in named if name.endswith("bias")]
    sizes = [named[name].abs().sum() for name in biases]
    yield "sum of all biases", sum(sizes)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    rates = sorted({dropout.p for dropout in dropouts})
    yield "rates of dropout", rates
    bare = gpt.LM(V, T, C, 4, 2, 0.0, False)
    yield (
        "biases of qkv without qkv_bias",
        [b.attention.qkv.bias is None for b in bare.blocks],
    )
    yield "config with qkv_bias = False", dict(bare.config)
    yield from watch_lm_forward(gpt)


class CachedBlock(char.PlainBlock):
    """In place of Block: it counts the tokens in its cache, and adds 3 for each one before."""

    def forward(self, x, cache=None):
        past = 0 if cache is None else cache.length
        if cache is not None:
            cache.length += x.shape[1]
        return super().forward(x) + 0.3 * past


def watch_lm_forward(gpt):
    char.set_other_sizes(gpt)
    gpt.Block = CachedBlock
    model = fill_gpt2(gpt.LM(11, 6, 8, 2, 2, 0.0))
    torch.manual_seed(1)
    idx, targets = torch.randint(11, (2, 3, 4))
    logits, loss = two(model(idx), "LM.forward", "logits, loss")
    yield "logits", tensor(logits, "LM.forward")
    yield "loss without targets", loss
    logits, loss = two(model(idx, targets), "LM.forward", "logits, loss")
    yield "loss", loss
    yield "logits, if there are targets,", tensor(logits, "LM.forward")
    padded = targets.clone()
    padded[:, 2:] = -100
    yield "loss if half of the targets are -100", model(idx, padded)[1]
    caches = [gpt.Cache(6), gpt.Cache(6)]
    for start, end in ((0, 3), (3, 4)):
        logits = model(idx[:, start:end], caches=caches)[0]
        yield (
            f"with caches, logits after tokens {start} to {end - 1}",
            tensor(logits, "LM.forward"),
        )
        yield "lengths of the caches", [cache.length for cache in caches]
    sizes = (11, 6, 8, 2, 1)
    yield from watch_dropout(lambda rate: gpt.LM(*sizes, rate), idx)


def fill_gpt2(model):
    """Fill the matrices of a model, by size; the tied ones are one parameter."""
    return fill(model, numbers_by_size).eval()


# --- OpenAI's weights -----------------------------------------------------------------------------
def watch_openai_name(gpt):
    names = [name for name, _ in original_names(gpt)]
    for name in names:
        yield f"openai_name({name!r})", gpt.openai_name(name)
    yield (
        "openai_name('blocks.11.ln2.bias')",
        gpt.openai_name("blocks.11.ln2.bias"),
    )


def original_names(gpt):
    """Return the parameters of an LM with one block."""
    return list(gpt.LM(8, 8, 8, 2, 1, 0.0).named_parameters())


def watch_load_pretrained(gpt):
    sizes = dict(
        vocab_size=8,
        block_size=8,
        n_embed=8,
        n_heads=2,
        n_layers=2,
        dropout=0.0,
    )
    theirs = random_parameters(gpt.LM(**sizes))
    turned = {}
    for ours, p in theirs.named_parameters():
        name, value = gpt.openai_name(ours), p.detach()
        is_turned = ".c_" in name and p.dim() == 2
        turned[name] = value.T.clone() if is_turned else value
    for prefix in ("", "transformer."):
        file = {prefix + name: p.clone() for name, p in turned.items()}
        file[prefix + "h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        file["lm_head.weight"] = turned["wte.weight"].clone()
        gpt.read_safetensors = lambda path, file=file: iter(file.items())
        model = gpt.load_pretrained("file", **sizes)
        if not isinstance(model, nn.Module):
            raise Wrong(f"load_pretrained returned {kind(model)}: return the model")
        where = "with the prefix 'transformer.'" if prefix else "without a prefix"
        for name, p in model.named_parameters():
            yield f"{name} {where}", p
        tied = model.lm_head.weight is model.token_embedding.weight
        yield "lm_head and token_embedding are one parameter", tied
    missing = {name: p for name, p in turned.items() if name != "ln_f.bias"}
    gpt.read_safetensors = lambda path: iter(missing.items())
    yield "a file that lacks ln_f.bias", outcome(load_only, gpt, sizes)
    larger = turned | {"h.7.ln_1.bias": torch.ones(8)}
    gpt.read_safetensors = lambda path: iter(larger.items())
    yield (
        "a file that has h.7.ln_1.bias as well",
        outcome(load_only, gpt, sizes),
    )


def load_only(gpt, sizes):
    gpt.load_pretrained("file", **sizes)
    return "accepted"


# --- Training -------------------------------------------------------------------------------------
def watch_estimate_loss(gpt):
    yield from char.watch_estimate_loss(gpt, torch.int32)


def watch_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, gpt.BETAS = 0.25, (0.75, 0.5)
    model = gpt.LM(11, 6, 8, 2, 2, 0.0)
    optimizers = gpt.make_optimizers(model)
    if not isinstance(optimizers, list | tuple):
        raise Wrong(f"make_optimizers returned {kind(optimizers)}: return a list of optimizers")
    yield "the optimizers", [type(o).__name__ for o in optimizers]
    for name, p in model.named_parameters():
        yield f"{name} is", char.owner_of(p, optimizers)
    yield "betas", [group["betas"] for group in optimizers[0].param_groups]


def watch_train_step(gpt):
    gpt.N_RANKS, gpt.BATCH_SIZE = 1, 2
    yield from char.watch_train_step(gpt, batch=5)
    model = char.Table(numbers(7, 7))
    gpt.GRADIENT_CLIP = None
    x = torch.zeros(5, 4, dtype=torch.int64)
    optimizer = torch.optim.SGD([model.table], lr=0.0)
    gpt.train_step(model, [optimizer], x, x, 0.0)
    yield (
        "windows at a time for BATCH_SIZE = 2 and 5 windows",
        max(map(len, model.seen)),
    )


def watch_train(gpt):
    gpt.EVAL_INTERVAL, gpt.TOKENS_PER_STEP, gpt.WINDOW, gpt.MAX_ITERS = (
        2,
        12,
        4,
        11,
    )
    gpt.BATCH_SIZE, gpt.COMPILE, gpt.N_RANKS, gpt.RANK = 2, False, 1, 0
    gpt.LEARNING_RATE, gpt.SCRATCH_LEARNING_RATE = 0.5, 0.25
    char.Rehearsal.init = "pretrained"
    yield from char.watch_rehearsals(gpt)
    scratch = char.Rehearsal(gpt, 0, 1)
    scratch.values["init"] = "scratch"
    scratch.run()
    yield "the peak for get_lr from scratch", scratch.log["peak"]


# --- Generation -----------------------------------------------------------------------------------
class CachedTable(char.Table):
    """A table as a model with caches. It notes what it sees, and how long the caches were."""

    def __init__(self, table, block_size):
        super().__init__(table, block_size)
        self.blocks, self.lengths = [1, 2], []

    def forward(self, idx, targets=None, caches=None):
        if not caches:
            raise Wrong("the model was called without caches: model(idx, caches=caches)")
        self.lengths.append(caches[0].length)
        for cache in caches:
            cache.length += idx.shape[1]
        logits, _ = super().forward(idx)
        return logits[:, -1:], None


def watch_generate(gpt):
    gpt.Tokenizer.vocab_size = 12
    gpt.BLOCK_SIZE, gpt.TEMPERATURE, gpt.TOP_K, gpt.TOP_P = 9, 5.0, 3, None
    follow = [
        7,
        3,
        9,
        5,
        1,
        0,
        4,
        8,
        2,
        6,
        11,
        11,
    ]  # 0 7 8 2 9 6 4 1 3 5 0 ...; 11 is the end
    table = torch.full((14, 14), -50.0)
    table[range(12), follow] = 0.0
    model = CachedTable(table, 6).train()
    prompt = [10, 5, 3, 0, 7, 8, 2, 9]
    yielded = gpt.generate(model, prompt, 9)
    if not hasattr(yielded, "__next__"):
        raise Wrong(f"generate returned {kind(yielded)}: yield each token as soon as it is drawn")
    yield "what was yielded", [int(token) for token in yielded]
    yield "what the model saw", [batch[0] for batch in model.seen]
    yield "lengths of the caches before each call", model.lengths
    yield "the caller's list", prompt
    yield from model.calls()
    model = CachedTable(table, 6)
    yield (
        "what was yielded up to <|endoftext|>",
        [int(token) for token in gpt.generate(model, [10], 5)],
    )
    table[:, 12:] = 50.0
    model = CachedTable(table, 6)
    yield (
        "what was yielded if ids from 12 on are most likely",
        list(map(int, gpt.generate(model, [0], 3))),
    )
    yield from char.watch_draws(gpt, CachedTable)


WATCH = char.WATCH | {
    "Tokenizer": watch_tokenizer,
    "split_text": watch_split_text,
    "get_batch": watch_get_batch,
    "stream": watch_stream,
    "Head": watch_head,
    "Cache": watch_cache,
    "MultiHead": watch_multi_head,
    "FeedForward": watch_feed_forward,
    "Block": watch_block,
    "LM": watch_lm,
    "LM.forward": watch_lm_forward,
    "openai_name": watch_openai_name,
    "load_pretrained": watch_load_pretrained,
    "estimate_loss": watch_estimate_loss,
    "make_optimizers": watch_make_optimizers,
    "train_step": watch_train_step,
    "train": watch_train,
    "generate": watch_generate,
}
