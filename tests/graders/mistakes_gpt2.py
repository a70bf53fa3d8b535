# ruff: noqa
"""Known mistakes of what gpt2.py has anew. See mistakes_char_gpt.py and tests/GRADING.md."""

import codecs


def ids_with(encode, decode=lambda self, ids: self.encoding.decode(list(ids))):
    """Return a class Tokenizer with another encode or decode."""

    class Ids:
        vocab_size = 50_257

        def __init__(self, vocabulary="gpt2"):
            self.vocabulary = vocabulary
            self.encoding = tiktoken.get_encoding(vocabulary)

    Ids.encode, Ids.decode = encode, decode
    return Ids


def right_ids(self, text):
    return self.encoding.encode(text, allowed_special="all")


def head_with(attend, mask=lambda T, S: torch.ones(T, S).tril(S - T).bool()):
    """Return a class Head with another attention, or another mask (True: visible)."""

    class Head(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, mask(q.shape[-2], k.shape[-2]))

    return Head


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cache_with(
    start=lambda length: length,
    result=lambda k, v, n: (k[:, :, :n], v[:, :, :n]),
    more=lambda n: n,
):
    """Return a class Cache, in which one of these is wrong."""

    class Cache:
        def __init__(self, block_size):
            self.block_size, self.length = block_size, 0

        def append(self, k, v):
            if self.length == 0:
                B, H, _, hs = k.shape
                self.k = torch.zeros(B, H, self.block_size, hs)
                self.v = torch.zeros(B, H, self.block_size, hs)
            a = start(self.length)
            b = a + k.shape[2]
            self.k[:, :, a:b], self.v[:, :, a:b] = k, v
            self.length += more(k.shape[2])
            return result(self.k, self.v, a + k.shape[2])

    return Cache


def cached_heads_with(use=lambda cache, k, v: cache.append(k, v), bias=True):
    """Return a class MultiHead, in which the cache is used wrongly."""

    class MultiHead(nn.Module):
        def __init__(self, n_embed, n_heads, dropout):
            super().__init__()
            self.n_heads = n_heads
            self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=bias)
            self.projection = nn.Linear(n_embed, n_embed)
            self.head, self.dropout = Head(), nn.Dropout(dropout)

        def forward(self, x, cache=None):
            B, T, C = x.shape
            parts = self.qkv(x).split(C, dim=-1)
            q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in parts)
            if cache is not None:
                k, v = use(cache, k, v)
            out = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)
            return self.dropout(self.projection(out))

    return MultiHead


def gelu_with(
    middle=lambda x: F.gelu(x, approximate="tanh"),
    drop=lambda self, x: self.dropout(x),
    wide=4,
    last=lambda x: x,
):
    """Return a class FeedForward, in which one of these is wrong."""

    class FeedForward(nn.Module):
        def __init__(self, n_embed, dropout):
            super().__init__()
            self.expand = nn.Linear(n_embed, wide * n_embed)
            self.shrink = nn.Linear(wide * n_embed, n_embed)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            return drop(self, last(self.shrink(middle(self.expand(x)))))

    return FeedForward


def gpt2_with(
    tie=True,
    std=lambda name, n: (
        0.02 / (2 * n) ** 0.5 if name.endswith(("projection.weight", "shrink.weight")) else 0.02
    ),
    zero=True,
    config=lambda c: c,
    no_bias=True,
    past=lambda caches: caches[0].length if caches else 0,
    give=lambda caches, i: caches[i] if caches else None,
    last=lambda x, caches: x[:, -1:] if caches else x,
    rate=lambda rate: rate,
):
    """Return a class LM, in which one of these is wrong."""

    class LM(nn.Module):
        def __init__(
            self,
            vocab_size,
            block_size,
            n_embed,
            n_heads,
            n_layers,
            dropout,
            qkv_bias=True,
        ):
            super().__init__()
            sizes = (
                vocab_size,
                block_size,
                n_embed,
                n_heads,
                n_layers,
                dropout,
                qkv_bias,
            )
            names = "vocab_size block_size n_embed n_heads n_layers dropout qkv_bias".split()
            self.config = config(dict(zip(names, sizes)))
            self.block_size = block_size
            self.token_embedding = nn.Embedding(vocab_size, n_embed)
            self.position_embedding = nn.Embedding(block_size, n_embed)
            self.dropout = nn.Dropout(rate(dropout))
            self.blocks = nn.Sequential(
                *(Block(n_embed, n_heads, dropout) for _ in range(n_layers))
            )
            self.ln_f = nn.LayerNorm(n_embed)
            self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)
            for name, p in self.named_parameters():
                if p.dim() == 2 and std:
                    nn.init.normal_(p, std=std(name, n_layers))
                elif name.endswith("bias") and zero:
                    nn.init.zeros_(p)
            if tie:
                self.lm_head.weight = self.token_embedding.weight
            if not qkv_bias and no_bias:
                for block in self.blocks:
                    block.attention.qkv.bias = None

        def forward(self, idx, targets=None, caches=None):
            begin = past(caches)
            places = torch.arange(begin, begin + idx.shape[1])
            x = self.dropout(self.token_embedding(idx) + self.position_embedding.weight[places])
            for i, block in enumerate(self.blocks):
                x = block(x, give(caches, i))
            logits = self.lm_head(self.ln_f(last(x, caches)))
            if targets is None:
                return logits, None
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return LM


def load_with(
    turn=lambda name, t: t.T if is_turned(name, t) else t,
    put=lambda model, p, t: p.data.copy_(t),
    prefix="transformer.",
    is_mask=lambda name: name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")),
    check_name=True,
    check_all=True,
    result=lambda model: model,
):
    """Return a function load_pretrained, in which one of these is wrong."""

    def load_pretrained(path, **sizes):
        model = LM(**sizes)
        missing = {openai_name(name): p for name, p in model.named_parameters()}
        for name, t in read_safetensors(path):
            name = name.removeprefix(prefix)
            if is_mask(name):
                continue
            if name not in missing and not check_name:
                continue
            check(name in missing, name)
            put(model, missing.pop(name), turn(name, t))
        check(not missing or not check_all, "missing")
        return result(model)

    return load_pretrained


def writer_with(
    crop=lambda ids, T: ids[-T:],
    half=lambda T: max(1, T // 2),
    fresh=True,
    hide=lambda logits: logits[..., Tokenizer.vocab_size :].fill_(-math.inf),
    end=lambda token: token == Tokenizer.vocab_size - 1,
    yield_end=True,
    draw=lambda p: torch.multinomial(p, 1).item(),
    prepare=lambda model: model.eval(),
    start=lambda ids: [int(i) for i in ids],
    options=lambda t, k, p: (t, k, p),
    full=lambda n, T: n > T,
    gradients=False,
    whole=False,
):
    """Return a function generate, in which one of these is wrong."""

    def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        prepare(model)
        ids = start(ids)
        ids = crop(ids, model.block_size)
        new, caches = ids, [Cache(model.block_size) for _ in model.blocks]
        for _ in range(max_new_tokens):
            with torch.set_grad_enabled(gradients):
                logits, _ = model(torch.tensor([new]), caches=caches)
            logits = logits.detach().clone()
            hide(logits)
            token = draw(
                next_token_probabilities(logits[0, -1], *options(temperature, top_k, top_p))
            )
            if end(token) and not yield_end:
                return
            ids.append(token)
            yield token
            if end(token):
                return
            new = [token]
            if whole:
                new, caches = (
                    ids[-model.block_size :],
                    [Cache(model.block_size) for _ in model.blocks],
                )
            elif full(len(ids), model.block_size):
                ids = ids[-half(model.block_size) :]
                new = ids
                if fresh:
                    caches = [Cache(model.block_size) for _ in model.blocks]

    return generate


def accumulate_with(
    share=lambda xs, x: len(xs) / len(x),
    between=lambda model: None,
    total=lambda parts, x: sum(parts),
):
    """Return a function train_step, in which one of these is wrong."""

    def train_step(model, optimizers, x, y, lr):
        model.train()
        parts = []
        for xs, ys in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE)):
            between(model)
            part = model(xs, ys)[1] * share(xs, x)
            part.backward()
            parts.append(part.detach())
        if GRADIENT_CLIP is not None:
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        for o in optimizers:
            for g in o.param_groups:
                g["lr"] = lr
            o.step()
            o.zero_grad()
        return total(parts, x)

    return train_step


def right_peak(run):
    if "SCRATCH_LEARNING_RATE" in globals():  # gpt2.py
        return LEARNING_RATE if run["init"] == "pretrained" else SCRATCH_LEARNING_RATE
    return LEARNING_RATE if MUON else ADAMW_LEARNING_RATE


def right_sizes(model):
    if "WINDOW" in globals():  # gpt2.py
        return TOKENS_PER_STEP // WINDOW, WINDOW
    return BATCH_SIZE, model.block_size


def train_with(
    first=lambda run: run["step"],
    last=lambda run: run["max_iters"],
    is_due=lambda step, run: step % EVAL_INTERVAL == 0 or step == run["max_iters"],
    again=lambda step, run: step not in run["history"],
    may_save=lambda step, begin: step > begin,
    seed=lambda run, step: torch.manual_seed(run["seed"] * 1_000_000 + step),
    part="train",
    peak=lambda run: right_peak(run),
    rate=lambda step, run, peak: get_lr(step, run["max_iters"], peak),
    sizes=lambda model: right_sizes(model),
    evaluate_first=True,
    keep=True,
    earlier=lambda run: run["seconds"],
):
    """Return a function train, in which one of these is wrong."""

    def train(model, tokenizer, optimizers, splits, run):
        device = next(model.parameters()).device
        start = time.perf_counter() - earlier(run)
        begin = run["step"]

        def look(step):
            if is_due(step, run) and again(step, run):
                losses = evaluate(model, tokenizer, splits, run["prompt"], step)
                if keep:
                    run["history"][step] = losses
                if may_save(step, begin):
                    save_step(
                        run,
                        step,
                        model,
                        optimizers,
                        time.perf_counter() - start,
                    )

        for step in range(first(run), last(run) + 1):
            if evaluate_first:
                look(step)
            if step == last(run):
                break
            seed(run, step)
            x, y = get_batch(splits[part], *sizes(model), device)
            train_step(model, optimizers, x, y, rate(step, run, peak(run)))
            if not evaluate_first:
                look(step)

    return train


# --- Tokenizer: <|endoftext|> in a text is split into letters: it must be one id, so allowed_special="all".
Tokenizer = ids_with(lambda self, text: self.encoding.encode_ordinary(text))


# --- Tokenizer: <|endoftext|> in a text is an error: allowed_special="all".
Tokenizer = ids_with(lambda self, text: self.encoding.encode(text))


# --- Tokenizer: encode returns bytes: use the encoding, which merges them to tokens.
Tokenizer = ids_with(lambda self, text: list(text.encode()))


# --- Tokenizer: encode returns a tensor: return a list of ints.
Tokenizer = ids_with(lambda self, text: torch.tensor(right_ids(self, text)))


# --- Tokenizer: encode adds <|endoftext|> at the end.
Tokenizer = ids_with(lambda self, text: [*right_ids(self, text), self.encoding.eot_token])


# --- Tokenizer: each id is decoded on its own: a character can have several tokens. Decode all together.
Tokenizer = ids_with(
    right_ids,
    lambda self, ids: "".join(self.encoding.decode([i]) for i in ids),
)


# --- Tokenizer: decode returns bytes: return a string.
Tokenizer = ids_with(right_ids, lambda self, ids: self.encoding.decode_bytes(list(ids)))


# --- Tokenizer: decode needs a list, and fails for a generator: list(ids).
Tokenizer = ids_with(right_ids, lambda self, ids: self.encoding.decode(ids))


# --- split_text: the validation part has all the rest: at most max_val_tokens.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {"train": tokens[:cut], "val": tokens[cut:]}


# --- split_text: the validation part is the end of the text: it comes right after the training part.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {"train": tokens[:cut], "val": tokens[cut:][-max_val_tokens:]}


# --- split_text: the parts overlap by one token.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {
        "train": tokens[:cut],
        "val": tokens[cut - 1 : cut - 1 + max_val_tokens],
    }


# --- split_text: the validation part is one token too long: max_val_tokens.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {
        "train": tokens[:cut],
        "val": tokens[cut : cut + max_val_tokens + 1],
    }


# --- split_text: the validation part is cut at max_val_tokens of the whole text: tokens[cut : cut + max_val_tokens].
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {"train": tokens[:cut], "val": tokens[cut:max_val_tokens]}


# --- split_text: the parts are exchanged.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(train_share * len(tokens))
    return {"val": tokens[:cut], "train": tokens[cut : cut + max_val_tokens]}


# --- split_text: the constants TRAIN_SHARE or MAX_VAL_TOKENS are used in place of the arguments.
def split_text(tokens, train_share, max_val_tokens, block_size):
    cut = int(TRAIN_SHARE * len(tokens))
    return {"train": tokens[:cut], "val": tokens[cut : cut + max_val_tokens]}


# --- get_batch: the ids stay int32: x and y must be int64, for cross_entropy.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))
    windows = tokens[starts + torch.arange(block_size + 1)]
    return windows[:, :-1], windows[:, 1:]


# --- Head: a single new token gets a mask: it is the newest, and sees all keys.
Head = head_with(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True))


# --- Head: several new tokens see only the first keys: new token t has S - T earlier ones in front of it. Use
# tril(S - T).
Head = head_with(
    attend,
    lambda T, S: torch.ones(T, S).tril().bool() if T > 1 else torch.ones(1, S).bool(),
)


# --- Head: several new tokens see those that come after them: mask with tril(S - T).
Head = head_with(
    attend,
    lambda T, S: torch.ones(T, S).tril().bool() if T == S else torch.ones(T, S).bool(),
)


# --- Head: the mask has the shape (T, T), but there are S keys: it is (T, S).
Head = head_with(attend, lambda T, S: torch.ones(T, T).tril().bool())


# --- Head: one position too few: the newest token does not see itself. Use tril(S - T).
Head = head_with(
    attend,
    lambda T, S: torch.ones(T, S).tril(S - T - 1 if S > T else 0).bool(),
)


# --- Cache: the length is not kept: self.length must grow with each append.
Cache = cache_with(more=lambda n: 0)


# --- Cache: the length grows by 1 only: by the number of new tokens, k.shape[2].
Cache = cache_with(more=lambda n: 1)


# --- Cache: only the new ones come back, or they replace those of before: return those of all tokens.
class Cache(cache_with()):
    def append(self, k, v):
        super().append(k, v)
        return k, v


# --- Cache: one place off: the last one of before is overwritten.
Cache = cache_with(start=lambda length: max(0, length - 1))


# --- Cache: everything is returned, also places that are not filled yet: only the first `length`.
Cache = cache_with(result=lambda k, v, n: (k, v))


# --- Cache: only the new ones come back, or they replace those of before: return those of all tokens.
Cache = cache_with(start=lambda length: 0)


# --- Cache: keys and values are exchanged: return k, v.
Cache = cache_with(result=lambda k, v, n: (v[:, :, :n], k[:, :, :n]))


# --- Cache: the new ones are put in front of those of before: behind them.
class Cache:
    def __init__(self, block_size):
        self.length, self.k, self.v = 0, None, None

    def append(self, k, v):
        if self.k is not None:
            k, v = torch.cat([k, self.k], 2), torch.cat([v, self.v], 2)
        self.k, self.v, self.length = k, v, k.shape[2]
        return k, v


# --- Cache: they are joined in the wrong dimension: the tokens are in dimension 2, (B, H, T, hs).
class Cache:
    def __init__(self, block_size):
        self.length, self.k, self.v = 0, None, None

    def append(self, k, v):
        if self.k is not None:
            k, v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.k, self.v, self.length = k, v, k.shape[2]
        return k, v


# --- Cache: all caches share their keys: keep them in self, not in the class.
class Cache:
    keys, values = [], []

    def __init__(self, block_size):
        self.length = 0

    def append(self, k, v):
        self.keys.append(k)
        self.values.append(v)
        self.length += k.shape[2]
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


# --- Cache: self.length does not exist.
class Cache:
    def __init__(self, block_size):
        self.k = None


# --- MultiHead: the cache is not used (k, v = cache.append(k, v)): a new token sees only itself, none before it.
MultiHead = cached_heads_with(use=lambda cache, k, v: (k, v))


# --- MultiHead: the cache is not used (k, v = cache.append(k, v)): a new token sees only itself, none before it.
MultiHead = cached_heads_with(use=lambda cache, k, v: (cache.append(k, v), (k, v))[1])


# --- MultiHead: k and v are exchanged for the cache.
MultiHead = cached_heads_with(use=lambda cache, k, v: cache.append(v, k))


# --- MultiHead: q, k and v have no biases: OpenAI's weights have them.
MultiHead = cached_heads_with(bias=False)


# --- FeedForward: relu in place of gelu: -1 becomes 0. OpenAI trained with gelu, -0.16.
FeedForward = gelu_with(F.relu)


# --- FeedForward: the exact gelu: GPT-2 computes it approximately, approximate="tanh".
FeedForward = gelu_with(F.gelu)


# --- FeedForward: x · sigmoid(1.702 x) is another approximation: GPT-2 has approximate="tanh".
FeedForward = gelu_with(lambda x: x * torch.sigmoid(1.702 * x))


# --- FeedForward: silu in place of gelu.
FeedForward = gelu_with(F.silu)


# --- FeedForward: tanh in place of gelu.
FeedForward = gelu_with(torch.tanh)


# --- FeedForward: gelu is missing: two layers in a row are one layer.
FeedForward = gelu_with(lambda x: x)


# --- FeedForward: gelu is on the result: it belongs between the layers.
FeedForward = gelu_with(lambda x: x, last=lambda x: F.gelu(x, approximate="tanh"))


# --- FeedForward: the middle has C or 2 C numbers: it should have 4 C.
FeedForward = gelu_with(wide=2)


# --- FeedForward: the middle has C or 2 C numbers: it should have 4 C.
FeedForward = gelu_with(wide=1)


# --- FeedForward: dropout is missing.
FeedForward = gelu_with(drop=lambda self, x: x)


# --- FeedForward: dropout works in evaluation, too: use nn.Dropout.
FeedForward = gelu_with(drop=lambda self, x: F.dropout(x, self.dropout.p))


# --- Block: the cache is not passed on to attention.
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)
        self.attention = MultiHead(n_embed, n_heads, dropout)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x, cache=None):
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x))


# --- LM: lm_head has a matrix of its own, or a copy, which moves away in training: it must be the same parameter
# as token_embedding.weight.
LM = gpt2_with(tie=False)


# --- LM: lm_head has a matrix of its own, or a copy, which moves away in training: it must be the same parameter
# as token_embedding.weight.
class LM(gpt2_with(tie=False)):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lm_head.weight.data = self.token_embedding.weight.data.clone()


# --- LM: the last matrices of attention and feed-forward start with 0.02: with 0.02 / √(2 · n_layers).
LM = gpt2_with(std=lambda name, n: 0.02)


# --- LM: the start divides by √n_layers: each block adds two results, √(2 · n_layers).
LM = gpt2_with(
    std=lambda name, n: (
        0.02 / n**0.5 if name.endswith(("projection.weight", "shrink.weight")) else 0.02
    )
)


# --- LM: the start divides by 2 · n_layers: by its root.
LM = gpt2_with(
    std=lambda name, n: (
        0.02 / (2 * n) if name.endswith(("projection.weight", "shrink.weight")) else 0.02
    )
)


# --- LM: all matrices start smaller: only the last ones of attention and feed-forward.
LM = gpt2_with(std=lambda name, n: 0.02 / (2 * n) ** 0.5)


# --- LM: matrices start with PyTorch's own numbers: with a standard deviation of 0.02.
LM = gpt2_with(std=None)


# --- LM: biases start with random numbers: with 0.
LM = gpt2_with(zero=False)


# --- LM: qkv_bias = False is ignored: then block.attention.qkv.bias is None.
LM = gpt2_with(no_bias=False)


# --- LM: config lacks qkv_bias: the biases are not passed on.
LM = gpt2_with(config=lambda c: {name: c[name] for name in c if name != "qkv_bias"})


# --- LM: dropout has another rate.
LM = gpt2_with(rate=lambda rate: 0.1)


# --- LM.forward: forward takes no caches: forward(self, idx, targets=None, caches=None).
class LM(gpt2_with()):
    def forward(self, idx, targets=None):
        return super().forward(idx, targets)


# --- LM.forward: positions restart with each call: they count on after the tokens in the caches.
LM = gpt2_with(past=lambda caches: 0)


# --- LM.forward: positions are one too high after the caches: the next one is caches[0].length.
LM = gpt2_with(past=lambda caches: caches[0].length + 1 if caches else 0)


# --- LM.forward: positions are one too low after the caches: the next one is caches[0].length.
LM = gpt2_with(past=lambda caches: max(0, caches[0].length - 1) if caches else 0)


# --- LM.forward: the caches are not passed on to the blocks.
LM = gpt2_with(give=lambda caches, i: None)


# --- LM.forward: all blocks get the same cache: block i gets caches[i].
LM = gpt2_with(give=lambda caches, i: caches[0] if caches else None)


# --- LM.forward: with caches, all positions get logits: only the last one, (B, 1, V).
LM = gpt2_with(last=lambda x, caches: x)


# --- LM.forward: with caches, the first position gets logits: the last one.
LM = gpt2_with(last=lambda x, caches: x[:, :1] if caches else x)


# --- openai_name: ln_1 and ln_2 are exchanged.
def openai_name(name):
    for a, b in (("token_embedding", "wte"), ("position_embedding", "wpe"), ("blocks", "h"), ("ln1", "ln_2"), ("ln2", "ln_1"), ("attention.qkv", "attn.c_attn"), ("attention.projection", "attn.c_proj"), ("feed_forward.expand", "mlp.c_fc"), ("feed_forward.shrink", "mlp.c_proj")):  # fmt: skip
        name = name.replace(a, b)
    return name


# --- openai_name: wte and wpe are exchanged: t is for tokens, p for positions.
def openai_name(name):
    for a, b in (("token_embedding", "wpe"), ("position_embedding", "wte")):
        name = name.replace(a, b)
    return name


# --- openai_name: c_fc and c_proj of the mlp are exchanged: c_fc expands, c_proj shrinks.
def openai_name(name):
    for a, b in (("token_embedding", "wte"), ("position_embedding", "wpe"), ("blocks", "h"), ("ln1", "ln_1"), ("ln2", "ln_2"), ("attention.qkv", "attn.c_attn"), ("attention.projection", "attn.c_proj"), ("feed_forward.expand", "mlp.c_proj"), ("feed_forward.shrink", "mlp.c_fc")):  # fmt: skip
        name = name.replace(a, b)
    return name


# --- openai_name: the prefix "transformer." is not part of the name: load_pretrained removes it.
def openai_name(name):
    return "transformer." + name.replace("token_embedding", "wte").replace(
        "position_embedding", "wpe"
    )


# --- load_pretrained: nothing is transposed: where is_turned, use tensor.T. Square matrices fit by chance.
load_pretrained = load_with(turn=lambda name, t: t)


# --- load_pretrained: square matrices are not transposed: their shape does not show it. Ask is_turned.
load_pretrained = load_with(
    turn=lambda name, t: t.T if is_turned(name, t) and t.shape[0] != t.shape[1] else t
)


# --- load_pretrained: every matrix is transposed, embeddings too: only those where is_turned says so.
load_pretrained = load_with(turn=lambda name, t: t.T if t.dim() == 2 else t)


# --- load_pretrained: square matrices are not transposed: their shape does not show it. Ask is_turned.
load_pretrained = load_with(
    turn=lambda name, t: t.T if is_turned(name, t) and "attn.c_proj" not in name else t
)


# --- load_pretrained: lm_head is a copy: it must stay one parameter with token_embedding.
def untied(model):
    model.lm_head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())
    return model


load_pretrained = load_with(result=untied)


# --- load_pretrained: names with the prefix "transformer." are refused: remove it.
load_pretrained = load_with(prefix="no prefix")


# --- load_pretrained: the mask ".attn.bias" is taken for a parameter: leave it out.
load_pretrained = load_with(is_mask=lambda name: name == "lm_head.weight")


# --- load_pretrained: lm_head.weight of the file is refused: it is the embedding once more, leave it out.
load_pretrained = load_with(is_mask=lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))


# --- load_pretrained: nothing is filled: p.data.copy_(tensor).
load_pretrained = load_with(put=lambda model, p, t: None)


# --- load_pretrained: a missing parameter is accepted in silence: it would stay random. check(...) it.
load_pretrained = load_with(check_all=False)


# --- load_pretrained: a name that LM has not is accepted in silence: the file is of another model. check(...) it.
load_pretrained = load_with(check_name=False)


# --- load_pretrained: nothing is returned: return the model.
load_pretrained = load_with(result=lambda model: None)


# --- train_step: all windows go through the model at once: BATCH_SIZE at a time, since memory is limited.
def train_step(model, optimizers, x, y, lr):
    model.train()
    loss = model(x, y)[1]
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = lr
        o.step()
        o.zero_grad()
    return loss.detach()


# --- train_step: the losses of the batches are added: multiply each by its share of the windows.
train_step = accumulate_with(share=lambda xs, x: 1)


# --- train_step: each batch counts equally, the smaller last one, too: its share is len(xs) / len(x).
train_step = accumulate_with(share=lambda xs, x: 1 / math.ceil(len(x) / BATCH_SIZE))


# --- train_step: the gradient is set to zero in each batch: only the last one's is left.
train_step = accumulate_with(between=lambda model: model.zero_grad())


# --- train_step: the loss of the last batch is returned: return that of all windows.
train_step = accumulate_with(total=lambda parts, x: parts[-1])


# --- train: the peak is LEARNING_RATE from scratch, too: then it is SCRATCH_LEARNING_RATE.
train = train_with(peak=lambda run: LEARNING_RATE)


# --- train: the peak is SCRATCH_LEARNING_RATE from OpenAI's weights, too: then it is LEARNING_RATE.
train = train_with(peak=lambda run: SCRATCH_LEARNING_RATE)


# --- train: get_batch gets BATCH_SIZE windows: a step has TOKENS_PER_STEP // WINDOW.
train = train_with(sizes=lambda model: (BATCH_SIZE, WINDOW))


# --- generate: all tokens go through the model again for each new one: keep the caches, and drop the older
# half of the tokens, not one at a time.
generate = writer_with(whole=True)


# --- generate: the prompt is cut at the wrong end: the last block_size tokens.
generate = writer_with(crop=lambda ids, T: ids[:T])


# --- generate: the prompt is not cropped: at most the last block_size tokens.
generate = writer_with(crop=lambda ids, T: ids)


# --- generate: the newer half is dropped: keep the newest tokens.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = ids[-model.block_size :]
    new, caches = ids, [Cache(model.block_size) for _ in model.blocks]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits, _ = model(torch.tensor([new]), caches=caches)
        token = torch.multinomial(
            next_token_probabilities(logits[0, -1], temperature, top_k, top_p),
            1,
        ).item()
        ids = [*ids, token]
        yield token
        new = [token]
        if len(ids) > model.block_size:
            ids = new = ids[: model.block_size // 2]
            caches = [Cache(model.block_size) for _ in model.blocks]


# --- generate: the caches are not renewed when the older half is dropped: their keys are of other positions.
generate = writer_with(fresh=False)


# --- generate: all tokens go through the model again for each new one: keep the caches, and drop the older
# half of the tokens, not one at a time.
generate = writer_with(half=lambda T: T, crop=lambda ids, T: ids[-T:])


# --- generate: the older half is dropped one token too early: when there are more than block_size tokens.
generate = writer_with(full=lambda n, T: n >= T)


# --- generate: ids from Tokenizer.vocab_size on are drawn: they are no tokens, their logits must become -inf.
generate = writer_with(hide=lambda logits: None)


# --- generate: it goes on after <|endoftext|>: that is the last token.
generate = writer_with(end=lambda token: False)


# --- generate: <|endoftext|> is not yielded: it is the last token.
generate = writer_with(yield_end=False)


# --- generate: always the most likely token: draw at random with these probabilities (torch.multinomial).
generate = writer_with(draw=lambda p: p.argmax().item())


# --- generate: the model is in training mode, so dropout is on: call model.eval() first.
generate = writer_with(prepare=lambda model: None)


# --- generate: gradients are recorded: put @torch.no_grad() above the function.
generate = writer_with(gradients=True)


# --- generate: the caller's list is changed: work on a copy.
generate = writer_with(
    start=lambda ids: ids,
    crop=lambda ids, T: ids if ids.__delitem__(slice(0, -T)) is None else ids,
)


# --- generate: the temperature is not passed on.
generate = writer_with(options=lambda t, k, p: (1.0, k, p))


# --- generate: top_k is not passed on.
generate = writer_with(options=lambda t, k, p: (t, None, p))


# --- generate: top_p is not passed on.
generate = writer_with(options=lambda t, k, p: (t, k, None))


# --- stream: broken characters: a token can end inside a character. Use an incremental decoder.
def stream(tokenizer, tokens):
    for token in tokens:
        yield tokenizer.encoding.decode([token])


# --- stream: the end is lost: show what the decoder has kept, with final=True.
def stream(tokenizer, tokens):
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))


# --- stream: everything comes at the end: yield characters as soon as they are complete.
def stream(tokenizer, tokens):
    yield tokenizer.encoding.decode(list(tokens))


# --- stream: bytes that are no UTF-8 are an error: decode with "replace".
def stream(tokenizer, tokens):
    decoder = codecs.getincrementaldecoder("utf-8")()
    for token in tokens:
        yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


# --- stream: bytes that are no UTF-8 are left out: decode with "replace".
def stream(tokenizer, tokens):
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    for token in tokens:
        yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)
