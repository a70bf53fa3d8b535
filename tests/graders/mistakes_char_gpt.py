# ruff: noqa
"""Known mistakes of char_gpt.py. A section is a message, and the piece as a student wrote it.

The code runs inside the script, like a solution. If a solution does the same, it gets the message.
What stands in front of the first section is there for all of them. See tests/GRADING.md."""


def tokenizer_with(
    vocabulary=lambda text: sorted(set(text)),
    size=len,
    encode=lambda text, vocabulary: [vocabulary.index(c) for c in text],
    decode=lambda ids, vocabulary: "".join(vocabulary[i] for i in ids),
):
    """Return a class Tokenizer, in which one of these is wrong."""

    class Tokenizer:
        def __init__(self, text):
            self.vocabulary = vocabulary(text)
            self.vocab_size = size(self.vocabulary)

        def encode(self, text):
            return encode(text, self.vocabulary)

        def decode(self, ids):
            return decode(ids, self.vocabulary)

    return Tokenizer


def batch_with(
    starts=lambda N, B, T: torch.randint(N - T, (B, 1)),
    x=lambda windows, places: windows[:, :-1],
    y=lambda windows, places: windows[:, 1:],
    B=lambda B: B,
    T=lambda T: T,
    pick=lambda tokens, places: tokens[places],
):
    """Return a function get_batch, in which one of these is wrong."""

    def get_batch(tokens, batch_size, block_size, device):
        b, t = B(batch_size), T(block_size)
        places = starts(len(tokens), b, t) + torch.arange(t + 1)
        windows = pick(tokens, places)
        return x(windows, places), y(windows, places)

    return get_batch


def attention_with(
    hidden=lambda T: torch.ones(T, T).triu(1),  # which scores are hidden
    value=-math.inf,  # what they become
    scale=lambda q: q.shape[-1] ** -0.5,
    weights=lambda scores: scores.softmax(-1),
    after=lambda weights: weights,  # what happens behind the softmax
):
    """Return a class Head, in which one of these is wrong."""

    class Head(nn.Module):
        def forward(self, q, k, v):
            scores = q @ k.transpose(-2, -1) * scale(q)
            scores = scores.masked_fill(hidden(q.shape[-2]).bool(), value)
            return after(weights(scores)) @ v

    return Head


def heads_with(
    width=lambda C: C,
    split=lambda part, B, T, H: part.view(B, T, H, -1).transpose(1, 2),
    attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    join=lambda out, B, T, C: out.transpose(1, 2).reshape(B, T, C),
    mix=lambda self, out: self.projection(out),
    drop=lambda self, out: self.dropout(out),
    heads=lambda n_heads: n_heads,
    rate=lambda rate: rate,
    layers=3,
    order=(0, 1, 2),
    projection=True,
):
    """Return a class MultiHead, in which one of these is wrong."""

    class MultiHead(nn.Module):
        def __init__(self, n_embed, n_heads, dropout):
            super().__init__()
            self.n_heads = heads(n_heads)
            self.layers = nn.ModuleList(
                nn.Linear(n_embed, n_embed, bias=False) for _ in range(layers)
            )
            if projection:
                self.projection = nn.Linear(n_embed, n_embed)
            self.dropout = nn.Dropout(rate(dropout))

        def forward(self, x):
            B, T, C = x.shape
            parts = [self.layers[i % layers](x) for i in order]
            q, k, v = (split(part, B, T, self.n_heads) for part in parts)
            return drop(self, mix(self, join(attend(q, k, v), B, T, C)))

    return MultiHead


def feed_forward_with(
    hidden=4,
    middle=F.relu,
    forward=lambda self, x: self.shrink(self.middle(self.expand(x))),
    drop=lambda self, out: self.dropout(out),
    rate=lambda rate: rate,
):
    """Return a class FeedForward, in which one of these is wrong."""

    class FeedForward(nn.Module):
        def __init__(self, n_embed, dropout):
            super().__init__()
            self.expand = nn.Linear(n_embed, hidden * n_embed)
            self.shrink = nn.Linear(hidden * n_embed, n_embed)
            self.middle = middle
            self.dropout = nn.Dropout(rate(dropout))

        def forward(self, x):
            return drop(self, forward(self, x))

    return FeedForward


def block_with(
    forward,
    attention=lambda C, H, dropout: MultiHead(C, H, dropout),
    feed_forward=lambda C, dropout: FeedForward(C, dropout),
    norms=2,
):
    """Return a class Block, in which one of these is wrong. f is attention, g feed-forward."""

    class Block(nn.Module):
        def __init__(self, n_embed, n_heads, dropout):
            super().__init__()
            self.ln1 = nn.LayerNorm(n_embed)
            self.ln2 = nn.LayerNorm(n_embed) if norms == 2 else self.ln1
            self.attention = attention(n_embed, n_heads, dropout)
            self.feed_forward = feed_forward(n_embed, dropout)

        def forward(self, x):
            return forward(x, self.attention, self.feed_forward, self.ln1, self.ln2)

    return Block


def right_block(x, f, g, ln1, ln2):
    x = x + f(ln1(x))
    return x + g(ln2(x))


def lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, dropout) for _ in range(n))),
    head=lambda C, V: nn.Linear(C, V, bias=False),
    start=lambda self: nn.init.normal_(self.lm_head.weight, std=0.02),
    token=lambda self, idx: self.token_embedding(idx),
    position=lambda self, T: self.position_embedding.weight[:T],
    drop=lambda self, x: self.dropout(x),
    run=lambda self, x: self.blocks(x),
    norm=lambda self, x: self.ln_f(x),
    out=lambda self, x: self.lm_head(x),
    loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    result=lambda logits, loss: (logits, loss),
    config=lambda c: c,
    rate=lambda rate: rate,
    has_norm=True,
):
    """Return a class LM, in which one of these is wrong."""

    class LM(nn.Module):
        def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
            super().__init__()
            self.config = config(
                dict(
                    vocab_size=vocab_size,
                    block_size=block_size,
                    n_embed=n_embed,
                    n_heads=n_heads,
                    n_layers=n_layers,
                    dropout=dropout,
                )
            )
            self.block_size = block_size
            self.token_embedding = nn.Embedding(vocab_size, n_embed)
            self.position_embedding = nn.Embedding(block_size, n_embed)
            self.dropout = nn.Dropout(rate(dropout))
            self.blocks = blocks(n_embed, n_heads, n_layers, dropout)
            if has_norm:
                self.ln_f = nn.LayerNorm(n_embed)
            self.lm_head = head(n_embed, vocab_size)
            start(self)

        def forward(self, idx, targets=None):
            x = token(self, idx)
            if position:
                x = x + position(self, idx.shape[1])
            logits = out(self, norm(self, run(self, drop(self, x))))
            return result(logits, None if targets is None else loss(logits, targets))

    return LM


def side_by_side(tokens, T):
    """Return windows side by side, and their targets; the rest of the last one is -100."""
    n = math.ceil((len(tokens) - 1) / T)
    places = T * torch.arange(n)[:, None] + torch.arange(T + 1)
    ids = tokens[places.clamp(max=len(tokens) - 1)].long()
    y = ids.masked_fill(places >= len(tokens), -100)[:, 1:]
    return ids[:, :-1], y


def spread(n, eval_iters, batch_size):
    """Return the numbers of the windows that are used, of n."""
    m = n if eval_iters is None else min(n, eval_iters * batch_size)
    return torch.tensor([i * n // m for i in range(m)])


def estimate_with(
    choose=spread,
    mean=lambda losses, counts: sum(l * n for l, n in zip(losses, counts)) / sum(counts),
    prepare=lambda model: model.eval(),
    gradients=False,
    windows=side_by_side,
    size=lambda batch_size: batch_size,
):
    """Return a function estimate_loss, in which one of these is wrong."""

    def estimate_loss(model, tokens, batch_size, eval_iters=None):
        prepare(model)
        x, y = windows(tokens, model.block_size)
        chosen = choose(len(x), eval_iters, batch_size)
        losses, counts = [], []
        with torch.set_grad_enabled(gradients):
            for some in chosen.split(size(batch_size)):
                losses.append(model(x[some], y[some])[1].item())
                counts.append((y[some] != -100).sum().item())
        return {"loss": mean(losses, counts)}

    return estimate_loss


def rounds_with(
    rounds=5,
    norm=lambda x: x.norm(),
    a=3.4445,
    b=-4.775,
    c=2.0315,
    back=True,
    last=lambda x: x,
):
    """Return a function orthogonalize, in which one of these is wrong."""

    def orthogonalize(matrix):
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / norm(x)
        for _ in range(rounds):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return last(x.T if tall and back else x)

    return orthogonalize


def muon_with(
    momentum=0.95,
    look_ahead=True,
    turn=lambda m: orthogonalize(m),
    decay=lambda group: 1 - group["lr"] * group["weight_decay"],
    factor=lambda shape: 0.2 * max(shape) ** 0.5,
    sign=-1,
    old=lambda state, p: state.get("average", torch.zeros_like(p)),
    gradient=lambda p: p.grad,
    late_decay=False,
):
    """Return a class Muon, in which one of these is wrong."""

    class Muon(torch.optim.Optimizer):
        def __init__(self, matrices, weight_decay):
            super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    g, state = gradient(p), self.state[p]
                    average = momentum * old(state, p) + (1 - momentum) * g
                    state["average"] = average
                    update = turn(
                        momentum * average + (1 - momentum) * g if look_ahead else average
                    )
                    if not late_decay:
                        p.mul_(decay(group))
                    p.add_(update, alpha=sign * group["lr"] * factor(p.shape))
                    if late_decay:
                        p.mul_(decay(group))

    return Muon


def optimizers_with(
    for_muon=lambda model: [p for p in model.blocks.parameters() if p.dim() == 2],
    for_adamw=lambda model, muon: [p for p in model.parameters() if id(p) not in muon],
    decays=lambda p: p.dim() == 2,
    betas=None,
    muon=lambda: globals().get("MUON", False),  # gpt2.py has none
    muon_decay=None,
):
    """Return a function make_optimizers, in which one of these is wrong."""

    def make_optimizers(model):
        matrices = for_muon(model) if muon() else []
        others = for_adamw(model, {id(p) for p in matrices})
        groups = [
            {
                "params": [p for p in others if decays(p)],
                "weight_decay": WEIGHT_DECAY,
            },
            {
                "params": [p for p in others if not decays(p)],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        adamw = torch.optim.AdamW(groups, betas=betas or BETAS)
        decay = WEIGHT_DECAY if muon_decay is None else muon_decay
        return [adamw, Muon(matrices, decay)] if matrices else [adamw]

    return make_optimizers


def rates_with(
    warmup=lambda n: max(1, min(WARMUP_ITERS, n // 10)),
    up=lambda step, warmup: (step + 1) / warmup,
    left=lambda step, n, warmup: (n - step) / (n - warmup + 1),
    down=lambda left: FINAL_LR + (1 - FINAL_LR) * left,
    peak=lambda peak: peak,
):
    """Return a function get_lr, in which one of these is wrong."""

    def get_lr(step, max_iters, peak_):
        w = warmup(max_iters)
        if step < w:
            return peak(peak_) * up(step, w)
        return peak(peak_) * down(left(step, max_iters, w))

    return get_lr


def step_with(
    before=lambda model, optimizers: None,
    clip=lambda model: (
        GRADIENT_CLIP and nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    ),
    rate=lambda optimizers, lr: [g.update(lr=lr) for o in optimizers for g in o.param_groups],
    step=lambda optimizers: [o.step() for o in optimizers],
    zero=lambda model, optimizers: [o.zero_grad() for o in optimizers],
    mode=lambda model: model.train(),
    order="backward clip rate step zero",
    result=lambda loss, model, x, y: loss.detach(),
):
    """Return a function train_step, in which one of these is wrong."""

    def train_step(model, optimizers, x, y, lr):
        mode(model)
        loss = model(x, y)[1]
        before(model, optimizers)
        actions = {
            "backward": lambda: loss.backward(),
            "clip": lambda: clip(model),
            "rate": lambda: rate(optimizers, lr),
            "step": lambda: step(optimizers),
            "zero": lambda: zero(model, optimizers),
        }
        for name in order.split():
            actions[name]()
        return result(loss, model, x, y)

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


def probabilities_with(
    temperature_=lambda logits, t: logits / t,
    kept_k=lambda k, V: min(k, V),
    too_much=lambda p, before, top_p: before >= top_p,
    finish=lambda p: p / p.sum(),
    greedy=True,
    back=lambda p, ids: torch.zeros(len(p)).scatter(0, ids, p),
    soft=lambda logits: logits.softmax(-1),
):
    """Return a function next_token_probabilities, in which one of these is wrong."""

    def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
        V = len(logits)
        if temperature == 0 and greedy:
            return F.one_hot(logits.argmax(), V).float()
        p, ids = soft(temperature_(logits, temperature)).sort(descending=True)
        if top_k is not None:
            p = p * (torch.arange(V) < kept_k(top_k, V))
            p = finish(p)
        if top_p is not None:
            p = p.masked_fill(too_much(p, p.cumsum(0) - p, top_p), 0)
            p = finish(p)
        return back(p, ids)

    return next_token_probabilities


def generate_with(
    crop=lambda ids, T: ids[-T:],
    start=lambda ids: [int(i) for i in ids],
    draw=lambda p: torch.multinomial(p, 1).item(),
    row=lambda logits: logits[0, -1],
    prepare=lambda model: model.eval(),
    gradients=False,
    options=lambda t, k, p: (t, k, p),
    append=True,
    late=False,
    count=lambda n: n,
):
    """Return a function generate, in which one of these is wrong."""

    def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        ids = start(ids)
        prepare(model)
        for _ in range(count(max_new_tokens)):
            with torch.set_grad_enabled(gradients):
                logits, _ = model(torch.tensor([crop(ids, model.block_size)]))
            p = next_token_probabilities(row(logits), *options(temperature, top_k, top_p))
            token = draw(p)
            if append:
                ids.append(token)
            if not late:
                yield token
        if late:
            yield from ids

    return generate


# --- Tokenizer: the vocabulary is not sorted: the same text must always give the same ids.
# Use sorted(set(text)).
Tokenizer = tokenizer_with(vocabulary=lambda text: list(dict.fromkeys(text)))


# --- Tokenizer: the vocabulary is sorted backwards: the smallest character has the id 0.
Tokenizer = tokenizer_with(vocabulary=lambda text: sorted(set(text), reverse=True))


# --- Tokenizer: the vocabulary has each character as often as the text: each is needed once.
Tokenizer = tokenizer_with(vocabulary=sorted)


# --- Tokenizer: the text is lower-cased: "T" and "t" are different characters.
Tokenizer = tokenizer_with(vocabulary=lambda text: sorted(set(text.lower())))


# --- Tokenizer: the vocabulary has only the letters: spaces and marks are characters, too.
Tokenizer = tokenizer_with(vocabulary=lambda text: sorted(set(filter(str.isalpha, text))))


# --- Tokenizer: the vocabulary has words: the tokens of this file are characters.
Tokenizer = tokenizer_with(vocabulary=lambda text: sorted(set(text.split())))


# --- Tokenizer: vocab_size is too large by one: there are as many ids as characters.
Tokenizer = tokenizer_with(size=lambda vocabulary: len(vocabulary) + 1)


# --- Tokenizer: vocab_size is too small by one: there are as many ids as characters.
Tokenizer = tokenizer_with(size=lambda vocabulary: len(vocabulary) - 1)


# --- Tokenizer: vocab_size is the length of the text, not the number of different characters.
Tokenizer = tokenizer_with(size=lambda vocabulary: len("To be, or not to be?"))


# --- Tokenizer: ids begin at 1. The first id is 0, since ids are the rows of a table.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) + 1 for c in text])


# --- Tokenizer: encode gives code points (ord), not places in the vocabulary.
Tokenizer = tokenizer_with(encode=lambda text, v: [ord(c) for c in text])


# --- Tokenizer: encode lower-cases the text: "T" and "t" are different characters.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) for c in text.lower()])


# --- Tokenizer: encode returns a tensor: return a list of ints.
Tokenizer = tokenizer_with(encode=lambda text, v: torch.tensor([v.index(c) for c in text]))


# --- Tokenizer: encode returns a generator, which can be read only once: return a list of ints.
Tokenizer = tokenizer_with(encode=lambda text, v: (v.index(c) for c in text))


# --- Tokenizer: encode returns a map, which can be read only once: return a list of ints.
Tokenizer = tokenizer_with(encode=lambda text, v: map(v.index, text))


# --- Tokenizer: encode sorts the ids: they belong in the order of the text.
Tokenizer = tokenizer_with(encode=lambda text, v: sorted(v.index(c) for c in text))


# --- Tokenizer: encode has each id once: they belong in the order of the text, repeated or not.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) for c in dict.fromkeys(text)])


# --- Tokenizer: decode returns a list of characters: join them to a string.
Tokenizer = tokenizer_with(decode=lambda ids, v: [v[i] for i in ids])


# --- Tokenizer: decode puts spaces between the characters: join them with "".
Tokenizer = tokenizer_with(decode=lambda ids, v: " ".join(v[i] for i in ids))


# --- Tokenizer: decode returns the text in reverse order.
Tokenizer = tokenizer_with(decode=lambda ids, v: "".join(v[i] for i in ids[::-1]))


# --- Tokenizer: decode gives the character before the right one: is the first id 0?
Tokenizer = tokenizer_with(decode=lambda ids, v: "".join(v[i - 1] for i in ids))


# --- Tokenizer: decode makes characters of the ids by chr: an id is a place in the vocabulary.
Tokenizer = tokenizer_with(decode=lambda ids, v: "".join(chr(i) for i in ids))


# --- Tokenizer: unknown characters are dropped in silence: the model would answer another prompt.
# Use check(...), which raises UserError.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) for c in text if c in v])


# --- Tokenizer: unknown characters get the id 0, which is that of another character: the model would
# answer another prompt. Use check(...), which raises UserError.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) if c in v else 0 for c in text])


# --- Tokenizer: unknown characters get the id -1, which is none: use check(...), which raises UserError.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) if c in v else -1 for c in text])


# --- Tokenizer: unknown characters get the id None: use check(...), which raises UserError.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) if c in v else None for c in text])


# --- Tokenizer: unknown characters get an id that no character has: use check(...), which raises
# UserError.
Tokenizer = tokenizer_with(encode=lambda text, v: [v.index(c) if c in v else len(v) for c in text])


# --- Tokenizer: an unknown character raises KeyError: use check(...), so that it is a UserError, which
# names the character.
Tokenizer = tokenizer_with(encode=lambda text, v: [{c: v.index(c) for c in v}[c] for c in text])


# --- Tokenizer: an unknown character raises ValueError: use check(...), so that it is a UserError.
Tokenizer = tokenizer_with()


# --- Tokenizer: an unknown character raises AssertionError: use check(...), so that it is a UserError.
def careful(text, v):
    assert set(text) <= set(v)
    return [v.index(c) for c in text]


Tokenizer = tokenizer_with(encode=careful)


# --- split_text: the parts are exchanged: training has the end of the text, and validation the beginning.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"val": ids[:cut], "train": ids[cut:]}


# --- split_text: training has the end of the text: it should be the first `train_share`.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = len(ids) - int(train_share * len(ids))
    return {"val": ids[:cut], "train": ids[cut:]}


# --- split_text: train_share is used for the validation part: the first `train_share` is for training.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = len(ids) - int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the validation part is the whole text: the model would know most of it by heart.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    return {"train": ids[: int(train_share * len(ids))], "val": ids}


# --- split_text: the training part is the whole text: the model would know the validation part by heart.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    return {"train": ids, "val": ids[int(train_share * len(ids)) :]}


# --- split_text: both parts are the same: validation must be text that training does not see.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[:cut]}


# --- split_text: the parts overlap: validation begins block_size tokens too early, in the training part.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut - block_size :]}


# --- split_text: the parts overlap by one token.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut - 1 :]}


# --- split_text: one token is lost between the parts.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut + 1 :]}


# --- split_text: one token is lost at the end of the training part.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[: cut - 1], "val": ids[cut:]}


# --- split_text: the last token of the text is lost.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:-1]}


# --- split_text: the constant TRAIN_SHARE is used in place of the argument train_share.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(TRAIN_SHARE * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the share is fixed at 0.9: use the argument train_share.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    cut = int(0.9 * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: a list is returned where a tensor belongs: torch.tensor(ids).
def split_text(text, tokenizer, train_share, block_size):
    ids = tokenizer.encode(text)
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the parts are text: encode it, so that they are tensors of ids.
def split_text(text, tokenizer, train_share, block_size):
    cut = int(train_share * len(text))
    return {"train": text[:cut], "val": text[cut:]}


# --- split_text: the ids are floats: they must be int64, since they are the rows of a table.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text)).float()
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the ids are int32: they must be int64.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text)).int()
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the ids are code points (ord): use tokenizer.encode.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor([ord(c) for c in text])
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- split_text: the text is cut into blocks of block_size: the parts are one row of ids each.
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    ids = ids[: len(ids) // block_size * block_size].view(-1, block_size)
    cut = int(train_share * len(ids))
    return {"train": ids[:cut], "val": ids[cut:]}


# --- get_batch: x and y are exchanged: x is the window, y the tokens after it.
get_batch = batch_with(x=lambda w, p: w[:, 1:], y=lambda w, p: w[:, :-1])


# --- get_batch: y is x: the model would learn to repeat its input. Targets are one token further.
get_batch = batch_with(y=lambda w, p: w[:, :-1])


# --- get_batch: y is x + 1, the next id. The target is the next token of the text: its place is one further.
get_batch = batch_with(y=lambda w, p: w[:, :-1] + 1)


# --- get_batch: y is one place too far: shifted twice. The target is the token right after.
get_batch = batch_with(
    starts=lambda N, B, T: torch.randint(N - T - 1, (B, 1)),
    pick=lambda tokens, places: (tokens[places], tokens[places + 1]),
    x=lambda w, p: w[0][:, :-1],
    y=lambda w, p: w[1][:, 1:],
)


# --- get_batch: y is the token before, not the token after.
get_batch = batch_with(
    starts=lambda N, B, T: torch.randint(1, N - T, (B, 1)),
    pick=lambda tokens, places: (tokens[places], tokens[places - 1]),
    x=lambda w, p: w[0][:, :-1],
    y=lambda w, p: w[1][:, :-1],
)


# --- get_batch: y is x rolled round: the last target is the first token of the window, not the token after it.
get_batch = batch_with(y=lambda w, p: torch.roll(w[:, :-1], -1, dims=1))


# --- get_batch: y is x rolled over the whole batch: the last target of a row comes from another row.
get_batch = batch_with(y=lambda w, p: torch.roll(w[:, :-1].reshape(-1), -1).view(len(w), -1))


# --- get_batch: y has one target per window, the token after it: each of the T positions needs its own.
get_batch = batch_with(y=lambda w, p: w[:, -1])


# --- get_batch: y has one target per window, the token after it: each of the T positions needs its own.
get_batch = batch_with(y=lambda w, p: w[:, -1:])


# --- get_batch: x and y have T + 1 tokens: leave out the last of x, and the first of y.
get_batch = batch_with(x=lambda w, p: w, y=lambda w, p: w)


# --- get_batch: x has T + 1 tokens: leave out the last, which is a target only.
get_batch = batch_with(x=lambda w, p: w)


# --- get_batch: the windows have T - 1 tokens: take T + 1 from the text, so that x and y have T.
get_batch = batch_with(T=lambda T: T - 1)


# --- get_batch: it returns places in the text, not the tokens at these places: tokens[places].
get_batch = batch_with(pick=lambda tokens, places: places)


# --- get_batch: x has places in the text, not the tokens at these places: tokens[places].
get_batch = batch_with(x=lambda w, p: p[:, :-1])


# --- get_batch: y has places in the text, not the tokens at these places: tokens[places].
get_batch = batch_with(y=lambda w, p: p[:, 1:])


# --- get_batch: nothing is random: every window begins at the first token. Draw a start for each.
get_batch = batch_with(starts=lambda N, B, T: torch.zeros(B, 1, dtype=torch.int64))


# --- get_batch: nothing is random: every batch is the same. Draw a start for each window.
get_batch = batch_with(starts=lambda N, B, T: torch.arange(B)[:, None] % (N - T))


# --- get_batch: nothing is random: every batch is the same. Draw a start for each window.
get_batch = batch_with(
    starts=lambda N, B, T: torch.randint(N - T, (B, 1), generator=torch.Generator().manual_seed(1))
)


# --- get_batch: the whole batch begins at one place: draw a start for each window.
get_batch = batch_with(starts=lambda N, B, T: torch.randint(N - T, (1, 1)).expand(B, 1))


# --- get_batch: the windows are in the columns, (T, B): they belong in rows, (B, T).
get_batch = batch_with(x=lambda w, p: w[:, :-1].T, y=lambda w, p: w[:, 1:].T)


# --- get_batch: batch_size and block_size are exchanged.
get_batch = batch_with()
inner = get_batch


def get_batch(tokens, batch_size, block_size, device):
    x, y = [], []
    for _ in range(block_size):
        start = int(torch.randint(max(1, len(tokens) - batch_size), (1,)))
        x.append(tokens[start : start + batch_size])
        y.append(tokens[start + 1 : start + batch_size + 1])
    return torch.stack(x), torch.stack(y)


# --- get_batch: the constant BATCH_SIZE is used in place of the argument batch_size.
get_batch = batch_with(B=lambda B: BATCH_SIZE)


# --- get_batch: the constant BLOCK_SIZE is used in place of the argument block_size.
get_batch = batch_with(T=lambda T: BLOCK_SIZE)


# --- get_batch: the constants BATCH_SIZE and BLOCK_SIZE are used in place of the arguments.
get_batch = batch_with(B=lambda B: BATCH_SIZE, T=lambda T: BLOCK_SIZE)


# --- get_batch: the last place is left out: the start can be 0 to N - T - 1, and randint(n) draws 0 to n - 1.
get_batch = batch_with(starts=lambda N, B, T: torch.randint(N - T - 1, (B, 1)))


# --- get_batch: the last two places are left out: the start can be 0 to N - T - 1.
get_batch = batch_with(starts=lambda N, B, T: torch.randint(N - T - 2, (B, 1)))


# --- get_batch: the first place is left out: the start can be 0 to N - T - 1.
get_batch = batch_with(starts=lambda N, B, T: torch.randint(1, N - T, (B, 1)))


# --- get_batch: windows begin at multiples of T only: the start can be any place from 0 to N - T - 1.
get_batch = batch_with(starts=lambda N, B, T: torch.randint((N - 1) // T, (B, 1)) * T)


# --- get_batch: single tokens are drawn: a window is T + 1 tokens in a row, from one random start.
get_batch = batch_with(pick=lambda tokens, places: tokens[torch.randint(len(tokens), places.shape)])


# --- get_batch: only one window is drawn: `return` stands inside the loop.
get_batch = batch_with(B=lambda B: 1)


# --- get_batch: x and y are drawn independently: y must be the tokens after those of the same x.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))
    others = torch.randint(len(tokens) - block_size, (batch_size, 1))
    places = torch.arange(block_size)
    return tokens[starts + places], tokens[others + places + 1]


# --- get_batch: a window or its targets can reach beyond the end of the text: the last start is N - T - 1.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens), (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in starts])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in starts])
    return x, y


# --- get_batch: a window or its targets can reach beyond the end of the text: the last start is N - T - 1.
get_batch = batch_with(starts=lambda N, B, T: torch.randint(N, (B, 1)))


# --- get_batch: a window or its targets can reach beyond the end of the text: the last start is N - T - 1.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size + 1, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in starts])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in starts])
    return x, y


# --- get_batch: a window that reaches the end goes on at the beginning of the text: the last start is N - T - 1.
get_batch = batch_with(
    starts=lambda N, B, T: torch.randint(N, (B, 1)),
    pick=lambda tokens, places: tokens[places % len(tokens)],
)


# --- get_batch: the ids are floats: they must be int64, since they are the rows of a table.
get_batch = batch_with(x=lambda w, p: w[:, :-1].float(), y=lambda w, p: w[:, 1:].float())


# --- get_batch: only x is returned: return x, y.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))
    return tokens[starts + torch.arange(block_size)]


# --- get_batch: lists are returned: return two tensors (torch.stack).
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1)).flatten().tolist()
    x = [tokens[i : i + block_size] for i in starts]
    y = [tokens[i + 1 : i + block_size + 1] for i in starts]
    return x, y


# --- Head: the mask is missing: position t sees token t + 1, which is its target, and copies it.
Head = attention_with(hidden=lambda T: torch.zeros(T, T))


# --- Head: the mask is inverted: it hides the past, and shows the future. Hide what is above the
# diagonal: triu(1).
Head = attention_with(hidden=lambda T: torch.ones(T, T).tril())


# --- Head: the mask is inverted: it hides the past, and shows the future. Hide what is above the
# diagonal: triu(1).
Head = attention_with(hidden=lambda T: torch.ones(T, T).tril(), value=-1e9)


# --- Head: the mask is inverted: each position sees itself and later ones. Hide what is above the
# diagonal: triu(1).
Head = attention_with(hidden=lambda T: torch.ones(T, T).tril(-1))


# --- Head: one position too few: a position does not see itself. The mask begins one above the diagonal,
# triu(1), not triu(0).
Head = attention_with(hidden=lambda T: torch.ones(T, T).triu())


# --- Head: one position too few: a position does not see itself. The mask begins one above the diagonal,
# triu(1), not triu(0).
Head = attention_with(hidden=lambda T: torch.ones(T, T).triu(), value=-1e9)


# --- Head: one position too few: a position does not see itself. The mask begins one above the diagonal,
# triu(1), not triu(0). (And where nothing is left, nan is made 0.)
Head = attention_with(hidden=lambda T: torch.ones(T, T).triu(), after=lambda w: w.nan_to_num(0))


# --- Head: one position too many: each sees the next one, which is its target. Use triu(1), not triu(2);
# or tril(0), not tril(1).
Head = attention_with(hidden=lambda T: torch.ones(T, T).triu(2))


# --- Head: two positions too few: use triu(1).
Head = attention_with(hidden=lambda T: torch.ones(T, T).triu(-1))


# --- Head: hidden scores are -1: exp(-1) is 0.37, so the future keeps a weight. Use -inf.
Head = attention_with(value=-1.0)


# --- Head: hidden scores are 0: exp(0) is 1, so the future keeps a weight. Use -inf.
Head = attention_with(value=0.0)


# --- Head: hidden scores are +inf, so that they win: use -inf.
Head = attention_with(value=math.inf)


# --- Head: hidden scores are only -10 or so: exp of it is not 0 where other scores are small. Use -inf.
Head = attention_with(value=-10.0)


# --- Head: hidden scores are 0: exp(0) is 1, so the future keeps a weight. Use -inf.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = (q @ k.mT / q.shape[-1] ** 0.5).tril()
        return scores.softmax(-1) @ v


# --- Head: the mask adds numbers like 0 and 1, so the future keeps a weight: a hidden score needs -inf.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (scores - torch.ones_like(scores).triu(1)).softmax(-1) @ v


# --- Head: the mask adds numbers like 0 and 1, so the future keeps a weight: a hidden score needs -inf.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (scores + torch.ones_like(scores).tril()).softmax(-1) @ v


# --- Head: the mask comes after the softmax: the weights of a row no longer have sum 1. Mask the scores.
Head = attention_with(hidden=lambda T: torch.zeros(T, T), after=lambda w: w.tril())


# --- Head: the weights are masked again with the wrong triangle.
Head = attention_with(after=lambda w: w.triu())


# --- Head: hidden weights are -inf after the softmax: mask the scores, before it.
Head = attention_with(
    hidden=lambda T: torch.zeros(T, T),
    after=lambda w: w.masked_fill(torch.ones_like(w).triu(1).bool(), -math.inf),
)


# --- Head: the scores are multiplied by √hs: they grow with hs. Divide by it.
Head = attention_with(scale=lambda q: q.shape[-1] ** 0.5)


# --- Head: the scores are not divided by √hs: they grow with hs, and one token gets almost all weight.
Head = attention_with(scale=lambda q: 1.0)


# --- Head: divided by hs, not by its square root. (Or by √hs twice?)
Head = attention_with(scale=lambda q: 1 / q.shape[-1])


# --- Head: divided by hs, not by its square root. (Or by √hs twice?)
Head = attention_with(scale=lambda q: 1 / q.shape[-1])


# --- Head: divided by √T: the size of a score depends on hs, the last dimension.
Head = attention_with(scale=lambda q: q.shape[-2] ** -0.5)


# --- Head: divided by √H: the size of a score depends on hs, the last dimension.
Head = attention_with(scale=lambda q: q.shape[1] ** -0.5)


# --- Head: divided by √B: the size of a score depends on hs, the last dimension.
Head = attention_with(scale=lambda q: q.shape[0] ** -0.5)


# --- Head: divided by √C: each head has hs = C / H channels, so divide by √hs.
Head = attention_with(scale=lambda q: (q.shape[1] * q.shape[-1]) ** -0.5)


# --- Head: divided by the constant √N_EMBED: take hs from the shape of q.
Head = attention_with(scale=lambda q: N_EMBED**-0.5)


# --- Head: divided by √(N_EMBED / N_HEADS), from the constants: take hs from the shape of q.
Head = attention_with(scale=lambda q: (N_EMBED // N_HEADS) ** -0.5)


# --- Head: divided by hs²: divide by √hs.
Head = attention_with(scale=lambda q: q.shape[-1] ** -2)


# --- Head: the weights are divided by √hs, after the softmax: divide the scores.
Head = attention_with(scale=lambda q: 1.0, after=lambda w: w / 6**0.5)


# --- Head: softmax over the wrong dimension: each row of weights must have sum 1, so dim=-1.
Head = attention_with(weights=lambda s: s.softmax(-2))


# --- Head: softmax over the heads: each row of weights must have sum 1, so dim=-1.
Head = attention_with(weights=lambda s: s.softmax(1))


# --- Head: softmax over the batch: each row of weights must have sum 1, so dim=-1.
Head = attention_with(weights=lambda s: s.softmax(0))


# --- Head: exp without division by the sum: the weights of a row must have sum 1.
Head = attention_with(weights=lambda s: s.exp())


# --- Head: exp is divided by the sum of everything, not of its row.
Head = attention_with(weights=lambda s: s.exp() / s.exp().sum())


# --- Head: exp is divided by the sum of a column, not of its row: dim=-1.
Head = attention_with(weights=lambda s: s.exp() / s.exp().sum(-2, keepdim=True))


# --- Head: no softmax: the scores themselves are the weights.
Head = attention_with(weights=lambda s: s.masked_fill(s.isinf(), 0))


# --- Head: the logarithm of the softmax is taken: weights are probabilities.
Head = attention_with(weights=lambda s: s.log_softmax(-1))


# --- Head: sigmoid in place of softmax: the weights of a row must have sum 1.
Head = attention_with(weights=lambda s: s.sigmoid())


# --- Head: the softmax is applied twice: the weights become almost equal.
Head = attention_with(weights=lambda s: s.softmax(-1).softmax(-1))


# --- Head: the weights are transposed: row t of the weights is for position t, so weights @ v.
Head = attention_with(after=lambda w: w.mT)


# --- Head: q and k are exchanged: row t of the scores is for the query of position t, so q @ kᵀ.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(k, q, v, is_causal=True)


# --- Head: k in place of v: the result is an average of the values.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)


# --- Head: q in place of v: the result is an average of the values.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, q, is_causal=True)


# --- Head: v in place of k: scores are products of queries and keys.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, v, v, is_causal=True)


# --- Head: k and v are exchanged: scores are q · k, and the result is an average of v.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, v, k, is_causal=True)


# --- Head: q in place of k: scores are products of queries and keys.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, q, v, is_causal=True)


# --- Head: k in place of q: scores are products of queries and keys.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(k, k, v, is_causal=True)


# --- Head: the weights are returned: the result is weights @ v.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        hidden = torch.ones_like(scores).triu(1).bool()
        return scores.masked_fill(hidden, -math.inf).softmax(-1)


# --- Head: the scores are returned: the result is softmax(scores) @ v.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        hidden = torch.ones_like(scores).triu(1).bool()
        return scores.masked_fill(hidden, -math.inf)


# --- Head: the result is transposed to (B, T, H, hs): MultiHead does that. Return (B, H, T, hs).
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# --- Head: the heads are joined to (B, T, C): MultiHead does that. Return (B, H, T, hs).
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


# --- Head: it attends over the heads, not over the positions: use the last two dimensions.
class Head(nn.Module):
    def forward(self, q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# --- Head: v is added to the result: the residual is added in Block.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + v


# --- Head: all positions before count equally: the weights must depend on q and k.
class Head(nn.Module):
    def forward(self, q, k, v):
        weights = torch.ones(q.shape[-2], q.shape[-2]).tril()
        return (weights / weights.sum(-1, keepdim=True)) @ v


# --- Head: dropout is applied to the weights: Head has none.
Head = attention_with(after=lambda w: F.dropout(w, DROPOUT or 0.2))


# --- Head: q is changed in place: the caller's tensor changes, too. Use q / ..., not q /= ...
class Head(nn.Module):
    def forward(self, q, k, v):
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q /= q.shape[-1] ** 0.5
        return result


# --- Head: q is changed in place: the caller's tensor changes, too. Use q * ..., not q *= ...
class Head(nn.Module):
    def forward(self, q, k, v):
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q *= q.shape[-1] ** 0.5
        return result


# --- Head: k is changed in place: the caller's tensor changes, too. Use k / ..., not k /= ...
class Head(nn.Module):
    def forward(self, q, k, v):
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        k /= k.shape[-1] ** 0.5
        return result


# --- Head: k.transpose() swaps the wrong dimensions: swap the last two, transpose(-2, -1).
class Head(nn.Module):
    def forward(self, q, k, v):
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


# --- Head: the sizes do not fit in a product: it is q @ k.transpose(-2, -1), and weights @ v.
class Head(nn.Module):
    def forward(self, q, k, v):
        return (q @ k).softmax(-1) @ v


# --- Head: the sizes do not fit in a product: it is q @ k.transpose(-2, -1), and weights @ v.
class Head(nn.Module):
    def forward(self, q, k, v):
        return v @ (q @ k.mT).softmax(-1)


# --- Head: the mask has a fixed size: take T from the shape of q.
Head = attention_with(hidden=lambda T: torch.ones(BLOCK_SIZE, BLOCK_SIZE).triu(1))


# --- MultiHead: the heads are joined in the wrong order: first transpose(1, 2), then reshape(B, T, C).
MultiHead = heads_with(join=lambda out, B, T, C: out.reshape(B, T, C))


# --- MultiHead: the heads are split in the wrong order: first view(B, T, H, hs), then transpose(1, 2).
MultiHead = heads_with(split=lambda part, B, T, H: part.reshape(B, H, T, -1))


# --- MultiHead: split and joined in the wrong order: view(B, T, H, hs), then transpose(1, 2), and back.
MultiHead = heads_with(
    split=lambda part, B, T, H: part.reshape(B, H, T, -1),
    join=lambda out, B, T, C: out.reshape(B, T, C),
)


# --- MultiHead: the heads and the positions are not exchanged: Head needs (B, H, T, hs), so transpose(1, 2).
MultiHead = heads_with(
    split=lambda part, B, T, H: part.view(B, T, H, -1),
    join=lambda out, B, T, C: out.reshape(B, T, C),
)


# --- MultiHead: each head has hs and H exchanged: view(B, T, H, hs).
MultiHead = heads_with(
    split=lambda part, B, T, H: part.view(B, T, -1, H).transpose(1, 2),
)


# --- MultiHead: a layer is missing, the projection (it mixes the results of the heads) or that of the values.
MultiHead = heads_with(mix=lambda self, out: out)


# --- MultiHead: a layer is missing, the projection (it mixes the results of the heads) or that of the values.
MultiHead = heads_with(mix=lambda self, out: out, projection=False)


# --- MultiHead: the projection comes before attention.
MultiHead = heads_with(
    split=lambda part, B, T, H: (
        (0.3 * part.sum(-1, keepdim=True)).expand(B, T, 12).reshape(B, T, H, -1).transpose(1, 2)
    ),
    mix=lambda self, out: out,
)


# --- MultiHead: one head only: split the C channels into n_heads heads.
MultiHead = heads_with(heads=lambda n: 1)


# --- MultiHead: the constant N_HEADS is used in place of the argument n_heads.
MultiHead = heads_with(heads=lambda n: N_HEADS)


# --- MultiHead: each head has one channel: hs is C / H.
MultiHead = heads_with(heads=lambda n: 12)


# --- MultiHead: the mask is missing: positions see later ones. Use Head.
MultiHead = heads_with(attend=F.scaled_dot_product_attention)


# --- MultiHead: the mask is inverted: positions see only later ones. Use Head.
MultiHead = heads_with(
    attend=lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(q.shape[-2], q.shape[-2]).triu().bool()
    )
)


# --- MultiHead: a position does not see itself: hide only what is above the diagonal. Use Head.
MultiHead = heads_with(
    attend=lambda q, k, v: F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=torch.ones(q.shape[-2], q.shape[-2]).tril(-1).bool(),
    )
)


# --- MultiHead: the scores are not divided by √hs. Use Head.
MultiHead = heads_with(
    attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
)


# --- MultiHead: the scores are divided by √C: each head has hs = C / H channels. Use Head.
MultiHead = heads_with(
    attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=12**-0.5)
)


# --- MultiHead: one layer serves for q, k and v: each needs numbers of its own.
MultiHead = heads_with(layers=1)


# --- MultiHead: one layer serves for two of q, k and v: each needs numbers of its own.
MultiHead = heads_with(layers=2)


# --- MultiHead: a layer is missing, the projection (it mixes the results of the heads) or that of the values.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qk = nn.Linear(n_embed, 2 * n_embed, bias=False)
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k = self.qk(x).split(C, dim=-1)
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in (q, k, x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.projection(out.transpose(1, 2).reshape(B, T, C)))


# --- MultiHead: there are no layers for q, k and v: x itself is all three.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.projection = nn.Linear(n_embed, n_embed)

    def forward(self, x):
        B, T, C = x.shape
        x = x.view(B, T, self.n_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.projection(out.transpose(1, 2).reshape(B, T, C))


# --- MultiHead: each head gets all C channels: it should have C / H, so that all together have C.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_heads * n_embed, bias=False)
        self.projection = nn.Linear(n_heads * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, C).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.projection(out.transpose(1, 2).reshape(B, T, -1)))


# --- MultiHead: the results of the heads are averaged: put them side by side.
MultiHead = heads_with(join=lambda out, B, T, C: out.mean(1).repeat(1, 1, C // out.shape[-1]))


# --- MultiHead: the results of the heads are added: put them side by side.
MultiHead = heads_with(join=lambda out, B, T, C: out.sum(1).repeat(1, 1, C // out.shape[-1]))


# --- MultiHead: x is added to the result: the residual is added in Block.
class MultiHead(heads_with()):
    def forward(self, x):
        return x + super().forward(x)


# --- MultiHead: a LayerNorm is applied to x: that is done in Block.
class MultiHead(heads_with()):
    def forward(self, x):
        return super().forward(F.layer_norm(x, x.shape[-1:]))


# --- MultiHead: dropout is missing.
MultiHead = heads_with(drop=lambda self, out: out)


# --- MultiHead: dropout has a fixed rate, or that of the constant DROPOUT: use the argument dropout.
MultiHead = heads_with(rate=lambda rate: 0.1)


# --- MultiHead: dropout works in evaluation, too: use nn.Dropout, or F.dropout with training=self.training.
MultiHead = heads_with(drop=lambda self, out: F.dropout(out, self.dropout.p))


# --- MultiHead: dropout has a fixed rate, or that of the constant DROPOUT: use the argument dropout.
MultiHead = heads_with(rate=lambda rate: DROPOUT)


# --- MultiHead: nn.MultiheadAttention needs batch_first=True here: it took the batch for the positions.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.inner = nn.MultiheadAttention(n_embed, n_heads, dropout)

    def forward(self, x):
        T = x.shape[0]
        mask = torch.ones(T, T).triu(1).bool()
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


# --- MultiHead: nn.MultiheadAttention without a mask: positions see later ones. Pass attn_mask.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.inner = nn.MultiheadAttention(n_embed, n_heads, dropout, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


# --- MultiHead: a tuple is returned: nn.MultiheadAttention returns (result, weights). Return the result.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.inner = nn.MultiheadAttention(n_embed, n_heads, dropout, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)


# --- FeedForward: relu is missing: two layers in a row are one layer.
FeedForward = feed_forward_with(middle=lambda x: x)


# --- FeedForward: relu is on the result: it belongs between the layers.
FeedForward = feed_forward_with(forward=lambda self, x: F.relu(self.shrink(self.expand(x))))


# --- FeedForward: relu is on the result, too: it belongs between the layers only.
FeedForward = feed_forward_with(forward=lambda self, x: F.relu(self.shrink(F.relu(self.expand(x)))))


# --- FeedForward: relu is on the input: it belongs between the layers.
FeedForward = feed_forward_with(forward=lambda self, x: self.shrink(self.expand(F.relu(x))))


# --- FeedForward: gelu in place of relu: that is GPT-2's choice, see gpt2.py.
FeedForward = feed_forward_with(middle=F.gelu)


# --- FeedForward: gelu in place of relu: that is GPT-2's choice, see gpt2.py.
FeedForward = feed_forward_with(middle=lambda x: F.gelu(x, approximate="tanh"))


# --- FeedForward: tanh in place of relu.
FeedForward = feed_forward_with(middle=torch.tanh)


# --- FeedForward: sigmoid in place of relu.
FeedForward = feed_forward_with(middle=torch.sigmoid)


# --- FeedForward: leaky_relu in place of relu.
FeedForward = feed_forward_with(middle=F.leaky_relu)


# --- FeedForward: silu in place of relu.
FeedForward = feed_forward_with(middle=F.silu)


# --- FeedForward: softmax in place of relu.
FeedForward = feed_forward_with(middle=lambda x: x.softmax(-1))


# --- FeedForward: min(0, x) in place of relu, max(0, x).
FeedForward = feed_forward_with(middle=lambda x: x.clamp(max=0))


# --- FeedForward: the middle has C numbers: it should have 4 C.
FeedForward = feed_forward_with(hidden=1)


# --- FeedForward: the middle has 2 C numbers: it should have 4 C.
FeedForward = feed_forward_with(hidden=2)


# --- FeedForward: the middle has 3 C numbers: it should have 4 C.
FeedForward = feed_forward_with(hidden=3)


# --- FeedForward: there is only one layer: there should be C -> 4 C and 4 C -> C.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.layer = nn.Linear(n_embed, n_embed)

    def forward(self, x):
        return F.relu(self.layer(x))


# --- FeedForward: there are three layers: two are enough, C -> 4 C and 4 C -> C.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.a = nn.Linear(n_embed, 4 * n_embed)
        self.b = nn.Linear(4 * n_embed, 4 * n_embed)
        self.c = nn.Linear(4 * n_embed, n_embed)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


# --- FeedForward: the second layer is missing in forward: the result must have C numbers again.
FeedForward = feed_forward_with(forward=lambda self, x: F.relu(self.expand(x)))


# --- FeedForward: x is added to the result: the residual is added in Block.
FeedForward = feed_forward_with(forward=lambda self, x: x + self.shrink(F.relu(self.expand(x))))


# --- FeedForward: dropout is missing.
FeedForward = feed_forward_with(drop=lambda self, out: out)


# --- FeedForward: dropout has a fixed rate, or that of the constant DROPOUT: use the argument dropout.
FeedForward = feed_forward_with(rate=lambda rate: 0.1)


# --- FeedForward: dropout has a fixed rate, or that of the constant DROPOUT: use the argument dropout.
FeedForward = feed_forward_with(rate=lambda rate: DROPOUT)


# --- FeedForward: dropout works in evaluation, too: use nn.Dropout, or F.dropout with training=self.training.
FeedForward = feed_forward_with(drop=lambda self, out: F.dropout(out, self.dropout.p))


# --- Block: the residual connections are missing: x + f(LayerNorm(x)), twice.
Block = block_with(lambda x, f, g, ln1, ln2: g(ln2(f(ln1(x)))))


# --- Block: the first residual connection is missing: x + attention(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = f(ln1(x))
    return x + g(ln2(x))


# --- Block: the second residual connection is missing: x + feed_forward(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(ln1(x))
    return g(ln2(x))


# --- Block: LayerNorm is applied to the sums (as in 2017): here it is inside, x + f(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = ln1(x + f(x))
    return ln2(x + g(x))


# --- Block: LayerNorm is applied to the results of f: it belongs on its input, x + f(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + ln1(f(x))
    return x + ln2(g(x))


# --- Block: LayerNorm is missing: x + f(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(x)
    return x + g(x)


# --- Block: the first LayerNorm is missing: x + attention(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(x)
    return x + g(ln2(x))


# --- Block: the second LayerNorm is missing: x + feed_forward(LayerNorm(x)).
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(ln1(x))
    return x + g(x)


# --- Block: the second step normalizes its sum: LayerNorm belongs on the input of feed-forward.
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(ln1(x))
    return ln2(x + g(x))


# --- Block: LayerNorm is applied to the result of feed-forward: it belongs on its input.
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + f(ln1(x))
    return x + ln2(g(x))


# --- Block: the residual connection starts at LayerNorm(x): it must be x itself that is added.
@block_with
def Block(x, f, g, ln1, ln2):
    x = ln1(x)
    x = x + f(x)
    x = ln2(x)
    return x + g(x)


# --- Block: feed-forward comes first: attention, then feed-forward.
@block_with
def Block(x, f, g, ln1, ln2):
    x = x + g(ln1(x))
    return x + f(ln2(x))


# --- Block: feed-forward works beside attention, on the same x: it should get the sum with attention.
@block_with
def Block(x, f, g, ln1, ln2):
    return x + f(ln1(x)) + g(ln2(x))


# --- Block: the second residual connection adds the input of the block: it should add the sum with attention.
@block_with
def Block(x, f, g, ln1, ln2):
    h = x + f(ln1(x))
    return x + g(ln2(h))


# --- Block: one residual connection around both: each of the two needs its own.
@block_with
def Block(x, f, g, ln1, ln2):
    return x + g(ln2(f(ln1(x))))


# --- Block: attention is missing.
Block = block_with(lambda x, f, g, ln1, ln2: x + g(ln2(x)))


# --- Block: feed-forward is missing.
Block = block_with(lambda x, f, g, ln1, ln2: x + f(ln1(x)))


# --- Block: x is changed in place (x += ...): the caller's tensor changes, too.
@block_with
def Block(x, f, g, ln1, ln2):
    x += f(ln1(x))
    x += g(ln2(x))
    return x


# --- Block: x is changed in place (x += ...): the caller's tensor changes, too.
@block_with
def Block(x, f, g, ln1, ln2):
    x += f(ln1(x))
    return x + g(ln2(x))


# --- Block: both steps share one LayerNorm: each needs its own.
Block = block_with(right_block, norms=1)


# --- Block: dropout is not passed on to MultiHead.
Block = block_with(right_block, attention=lambda C, H, dropout: MultiHead(C, H, 0.0))


# --- Block: dropout is not passed on to FeedForward.
Block = block_with(right_block, feed_forward=lambda C, dropout: FeedForward(C, 0.0))


# --- Block: n_embed and n_heads are exchanged for MultiHead.
Block = block_with(right_block, attention=lambda C, H, dropout: MultiHead(H, C, dropout))


# --- Block: MultiHead gets hs = C / H: it takes C and the number of heads.
Block = block_with(right_block, attention=lambda C, H, dropout: MultiHead(H, C // H, dropout))


# --- Block: FeedForward gets 4 C: it takes C.
Block = block_with(right_block, feed_forward=lambda C, dropout: FeedForward(4 * C, dropout))


# --- Block: the constants N_EMBED, N_HEADS, DROPOUT are used in place of the arguments.
Block = block_with(
    right_block,
    attention=lambda C, H, dropout: MultiHead(N_EMBED, N_HEADS, DROPOUT),
)


# --- LM: all blocks are the same one: `[Block(...)] * n` repeats it. Make n_layers different ones.
LM = lm_with(blocks=lambda C, H, n, dropout: nn.Sequential(*[Block(C, H, dropout)] * n))


# --- LM: there is only one block: there should be n_layers.
LM = lm_with(blocks=lambda C, H, n, dropout: nn.Sequential(Block(C, H, dropout)))


# --- LM: there is one block too many: there should be n_layers.
LM = lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, dropout) for _ in range(n + 1)))
)


# --- LM: n_heads and n_layers are exchanged.
LM = lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, n, dropout) for _ in range(H)))
)


# --- LM: dropout is not passed on to the blocks.
LM = lm_with(blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, 0.0) for _ in range(n))))


# --- LM: the constants N_HEADS, N_LAYERS or DROPOUT are used in place of the arguments.
LM = lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(
        *(Block(C, N_HEADS, DROPOUT) for _ in range(N_LAYERS))
    )
)


# --- LM: the constant N_LAYERS is used in place of the argument n_layers.
LM = lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, dropout) for _ in range(N_LAYERS)))
)


# --- LM: the blocks are in a plain list: nn.Sequential or nn.ModuleList, so that their parameters are learned.
LM = lm_with(
    blocks=lambda C, H, n, dropout: [Block(C, H, dropout) for _ in range(n)],
    run=lambda self, x: self.blocks[1](self.blocks[0](x)),
)


# --- LM: lm_head has a bias: leave it out, bias=False.
LM = lm_with(head=lambda C, V: nn.Linear(C, V))


# --- LM: lm_head shares the matrix of the token embedding: here it has its own. (gpt2.py ties them.)
LM = lm_with(start=lambda self: setattr(self.lm_head, "weight", self.token_embedding.weight))


# --- LM: the last LayerNorm is missing, before lm_head.
LM = lm_with(has_norm=False, norm=lambda self, x: x)


# --- LM: lm_head starts with PyTorch's own numbers, which are too large: the standard deviation should be
# 0.02, so that the loss starts just above ln V.
LM = lm_with(start=lambda self: None)


# --- LM: lm_head starts with a standard deviation of 0.2: it should be 0.02, so that the loss starts just
# above ln V.
LM = lm_with(start=lambda self: nn.init.normal_(self.lm_head.weight, std=0.2))


# --- LM: lm_head starts with a standard deviation of 1: it should be 0.02, so that the loss starts just
# above ln V.
LM = lm_with(start=lambda self: nn.init.normal_(self.lm_head.weight))


# --- LM: config lacks block_size.
LM = lm_with(config=lambda c: {name: c[name] for name in c if name != "block_size"})


# --- LM: config lacks dropout.
LM = lm_with(config=lambda c: {name: c[name] for name in c if name != "dropout"})


# --- LM.forward: the positions are missing: the first block sees "abc" and "bac" alike.
LM = lm_with(position=None)


# --- LM.forward: the tokens are missing: x is only the vectors of the positions.
LM = lm_with(token=lambda self, idx: torch.zeros(*idx.shape, self.config["n_embed"]))


# --- LM.forward: every position gets the vector of the first one.
LM = lm_with(position=lambda self, T: self.position_embedding.weight[:1])


# --- LM.forward: every position gets the vector of the last one: idx.shape[1] is one number.
LM = lm_with(position=lambda self, T: self.position_embedding.weight[T - 1])


# --- LM.forward: positions count from 1: the first is row 0.
LM = lm_with(position=lambda self, T: self.position_embedding.weight[1 : T + 1])


# --- LM.forward: positions are the last rows of the table: they begin at row 0.
LM = lm_with(position=lambda self, T: self.position_embedding.weight[-T:])


# --- LM.forward: the positions count backwards.
LM = lm_with(position=lambda self, T: self.position_embedding.weight[:T].flip(0))


# --- LM.forward: token and position vectors are multiplied: add them.
class LM(lm_with()):
    def forward(self, idx, targets=None):
        x = self.token_embedding(idx) * self.position_embedding.weight[: idx.shape[1]]
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, None


# --- LM.forward: ln_f is missing: it comes after the blocks, before lm_head.
LM = lm_with(norm=lambda self, x: x)


# --- LM.forward: ln_f comes before the blocks: it belongs after them.
LM = lm_with(drop=lambda self, x: self.ln_f(self.dropout(x)), norm=lambda self, x: x)


# --- LM.forward: ln_f comes before the blocks, too: it belongs after them only.
LM = lm_with(drop=lambda self, x: self.ln_f(self.dropout(x)))


# --- LM.forward: the blocks are missing.
LM = lm_with(run=lambda self, x: x)


# --- LM.forward: only one of the blocks counts: each works on the result of the one before, x = block(x).
LM = lm_with(run=lambda self, x: self.blocks[0](x))


# --- LM.forward: a residual connection around all blocks: each block has its own.
LM = lm_with(run=lambda self, x: x + self.blocks(x))


# --- LM.forward: only one of the blocks counts: each works on the result of the one before, x = block(x).
LM = lm_with(run=lambda self, x: self.blocks[-1](x))


# --- LM.forward: probabilities are returned, after a softmax: return logits. cross_entropy has its own softmax.
LM = lm_with(out=lambda self, x: self.lm_head(x).softmax(-1))


# --- LM.forward: ln of the probabilities is returned, after a log_softmax: return logits.
LM = lm_with(out=lambda self, x: self.lm_head(x).log_softmax(-1))


# --- LM.forward: softmax twice: cross_entropy contains one. Give it logits.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.softmax(-1).flatten(0, 1), y.flatten()))


# --- LM.forward: the loss is a sum: it is the mean over the targets.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten(), reduction="sum"))


# --- LM.forward: the loss is a sum over the positions and a mean over the batch: it is the mean over all targets.
LM = lm_with(
    loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten(), reduction="sum") / len(y)
)


# --- LM.forward: the loss is one number per target: it is their mean.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten(), reduction="none"))


# --- LM.forward: the loss is one number per target: it is their mean.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.mT, y, reduction="none"))


# --- LM.forward: targets of -100 are counted: they are neither in the sum nor in the number of targets.
LM = lm_with(
    loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten(), reduction="sum") / y.numel()
)


# --- LM.forward: targets of -100 are an error: cross_entropy skips them, and an index of -100 does not exist.
LM = lm_with(loss=lambda l, y: -l.log_softmax(-1).gather(2, y[..., None]).mean())


# --- LM.forward: the targets are shifted once more: get_batch has shifted them already.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l[:, :-1].flatten(0, 1), y[:, 1:].flatten()))


# --- LM.forward: only the last position counts for the loss: all T positions do.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l[:, -1], y[:, -1]))


# --- LM.forward: logits and targets are flattened in different orders: row i of the logits meets another target.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.transpose(0, 1).flatten(0, 1), y.flatten()))


# --- LM.forward: logits and targets are flattened in different orders: row i of the logits meets another target.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.T.flatten()))


# --- LM.forward: cross_entropy takes the classes in the second dimension: view(B·T, V), or transpose(1, 2).
LM = lm_with(loss=lambda l, y: F.cross_entropy(l, y))


# --- LM.forward: the sign of the loss is wrong: it is -ln p.
LM = lm_with(loss=lambda l, y: -F.cross_entropy(l.flatten(0, 1), y.flatten()))


# --- LM.forward: the loss is in bits, log2: it is in nats, ln.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten()) / math.log(2))


# --- LM.forward: the loss is a plain number: return the tensor, so that backward can go back from it.
LM = lm_with(loss=lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten()).item())


# --- LM.forward: only the logits are returned: return logits, loss.
LM = lm_with(result=lambda logits, loss: logits if loss is None else (logits, loss))


# --- LM.forward: the order is wrong: return logits, loss.
LM = lm_with(result=lambda logits, loss: (loss, logits))


# --- LM.forward: only the loss is returned if there are targets: return logits, loss.
LM = lm_with(result=lambda logits, loss: (logits, None) if loss is None else loss)


# --- LM.forward: with targets, the logits come back as (B · T, V): return them as (B, T, V).
LM = lm_with(result=lambda l, loss: (l, None) if loss is None else (l.flatten(0, 1), loss))


# --- LM.forward: with targets, no logits are returned: return logits, loss.
LM = lm_with(result=lambda l, loss: (l, None) if loss is None else (None, loss))


# --- LM.forward: only the last position has logits: return all T, (B, T, V).
LM = lm_with(out=lambda self, x: self.lm_head(x[:, -1:]))


# --- LM.forward: without targets the loss is 0: it should be None.
LM = lm_with(result=lambda logits, loss: (logits, 0.0 if loss is None else loss))


# --- LM.forward: dropout is missing: it comes after the sum of token and position.
LM = lm_with(drop=lambda self, x: x)


# --- LM.forward: dropout works in evaluation, too: use nn.Dropout.
LM = lm_with(drop=lambda self, x: F.dropout(x, self.dropout.p))


# --- estimate_loss: the model is in training mode, so dropout is on: call model.eval() first.
estimate_loss = estimate_with(prepare=lambda model: model.train())


# --- estimate_loss: the model is in training mode, so dropout is on: call model.eval() first.
estimate_loss = estimate_with(prepare=lambda model: None)


# --- estimate_loss: gradients are recorded: put @torch.no_grad() above the function.
estimate_loss = estimate_with(gradients=True)


# --- estimate_loss: it trains: the parameters have changed.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    result = estimate_with()(model, tokens, batch_size, eval_iters)
    model.eval()
    for p in model.parameters():
        p.data -= 0.01
    return result


# --- estimate_loss: it is the mean of the batches' means: the last batch is smaller, so weight each with its number
# of targets.
estimate_loss = estimate_with(mean=lambda losses, counts: sum(losses) / len(losses))


# --- estimate_loss: it is a sum: divide by the number of targets.
estimate_loss = estimate_with(
    mean=lambda losses, counts: sum(l * n for l, n in zip(losses, counts))
)


# --- estimate_loss: it is the sum of the batches' means: weight each with its number of targets, and divide.
estimate_loss = estimate_with(mean=lambda losses, counts: sum(losses))


# --- estimate_loss: the sum over all targets is divided by the number of batches: divide by the number of targets.
estimate_loss = estimate_with(
    mean=lambda losses, counts: sum(l * n for l, n in zip(losses, counts)) / len(losses)
)


# --- estimate_loss: the sum of the means is divided by the number of targets: weight each mean first.
estimate_loss = estimate_with(mean=lambda losses, counts: sum(losses) / sum(counts))


# --- estimate_loss: it is the loss of the last batch only: add up all.
estimate_loss = estimate_with(mean=lambda losses, counts: losses[-1])


# --- estimate_loss: it is the loss of the first batch only: add up all.
estimate_loss = estimate_with(mean=lambda losses, counts: losses[0])


# --- estimate_loss: padding is counted: divide by the number of targets that are not -100.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    x, y = side_by_side(tokens, model.block_size)
    total, count = 0.0, 0
    with torch.no_grad():
        for some in spread(len(x), eval_iters, batch_size).split(batch_size):
            n = (y[some] != -100).sum().item()
            total += model(x[some], y[some])[1].item() * n
            count += y[some].numel()
    return {"loss": total / count}


# --- estimate_loss: the short last window counts as much as a whole one: weight each loss with the number of its targets.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    x, y = side_by_side(tokens, model.block_size)
    total, count = 0.0, 0
    with torch.no_grad():
        for some in spread(len(x), eval_iters, batch_size).split(batch_size):
            total += model(x[some], y[some])[1].item() * y[some].numel()
            count += y[some].numel()
    return {"loss": total / count}


# --- estimate_loss: the short last window counts as much as a whole one: weight each loss with the number of its targets.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    x, y = side_by_side(tokens, model.block_size)
    total, count = 0.0, 0
    with torch.no_grad():
        for some in spread(len(x), eval_iters, batch_size).split(batch_size):
            total += model(x[some], y[some])[1].item() * len(some)
            count += len(some)
    return {"loss": total / count}


# --- estimate_loss: the short last window counts as much as a whole one: weight each loss with the number of its targets.
estimate_loss = estimate_with(
    size=lambda batch_size: 1,
    mean=lambda losses, counts: sum(losses) / len(losses),
)


# --- estimate_loss: the last token is repeated as a target, to fill the last window: make those -100.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    T = model.block_size
    n = math.ceil((len(tokens) - 1) / T)
    places = T * torch.arange(n)[:, None] + torch.arange(T + 1)
    ids = tokens[places.clamp(max=len(tokens) - 1)].long()
    windows = lambda tokens, T: (ids[:, :-1], ids[:, 1:])
    return estimate_with(windows=windows)(model, tokens, batch_size, eval_iters)


# --- estimate_loss: the last window is filled with zeros, which are counted as targets: make those -100.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    def windows(tokens, T):
        x, y = side_by_side(tokens, T)
        return x, y.clamp(min=0)

    return estimate_with(windows=windows)(model, tokens, batch_size, eval_iters)


# --- estimate_loss: the last window is dropped: it is shorter, but its targets count, too.
def whole_windows(tokens, T):
    n = (len(tokens) - 1) // T
    ids = tokens[: n * T + 1].long()
    return ids[:-1].view(n, T), ids[1:].view(n, T)


estimate_loss = estimate_with(windows=whole_windows)


# --- estimate_loss: the last batch is dropped: it is smaller, but its targets count, too.
estimate_loss = estimate_with(
    choose=lambda n, k, B: spread(n, k, B)[: len(spread(n, k, B)) // B * B]
)


# --- estimate_loss: windows overlap: they begin at 0, T, 2 T, ..., so that each token is a target once.
def sliding(tokens, T):
    ids = tokens.long().unfold(0, T + 1, 1)
    return ids[:, :-1], ids[:, 1:]


estimate_loss = estimate_with(windows=sliding)


# --- estimate_loss: windows begin at multiples of T + 1: the first token of each is never a target. Use T.
def with_gaps(tokens, T):
    n = math.ceil((len(tokens) - 1) / (T + 1))
    places = (T + 1) * torch.arange(n)[:, None] + torch.arange(T + 1)
    ids = tokens[places.clamp(max=len(tokens) - 1)].long()
    y = ids.masked_fill(places >= len(tokens), -100)[:, 1:]
    return ids[:, :-1], y


estimate_loss = estimate_with(windows=with_gaps)


# --- estimate_loss: the targets are not shifted: the target of a token is the next one.
def unshifted(tokens, T):
    x, y = side_by_side(tokens, T)
    return x, x.masked_fill(y == -100, -100)


estimate_loss = estimate_with(windows=unshifted)


# --- estimate_loss: random batches: the windows lie side by side, in order, so that each token counts once.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    losses = []
    with torch.no_grad():
        for _ in range(eval_iters or 3):
            x, y = get_batch(tokens, batch_size, model.block_size, "cpu")
            losses.append(model(x, y)[1].item())
    return {"loss": sum(losses) / len(losses)}


# --- estimate_loss: the constant BLOCK_SIZE is used in place of model.block_size.
estimate_loss = estimate_with(windows=lambda tokens, T: side_by_side(tokens, BLOCK_SIZE))


# --- estimate_loss: all windows go through the model at once: at most batch_size at a time.
estimate_loss = estimate_with(size=lambda batch_size: 1000)


# --- estimate_loss: the constant BATCH_SIZE is used in place of the argument batch_size.
estimate_loss = estimate_with(size=lambda batch_size: BATCH_SIZE)


# --- estimate_loss: eval_iters is ignored: at most eval_iters · batch_size windows.
estimate_loss = estimate_with(choose=lambda n, k, B: torch.arange(n))


# --- estimate_loss: eval_iters counts windows: it is a number of batches, of batch_size windows each.
estimate_loss = estimate_with(choose=lambda n, k, B: spread(n, k, 1))


# --- estimate_loss: with eval_iters, only the beginning is measured: spread the windows evenly.
estimate_loss = estimate_with(
    choose=lambda n, k, B: torch.arange(n if k is None else min(n, k * B))
)


# --- estimate_loss: with eval_iters, only the end is measured: spread the windows evenly.
estimate_loss = estimate_with(
    choose=lambda n, k, B: torch.arange(n) if k is None else torch.arange(max(0, n - k * B), n)
)


# --- estimate_loss: with eval_iters, windows are drawn at random: two calls give two losses. Spread them evenly.
estimate_loss = estimate_with(
    choose=lambda n, k, B: torch.arange(n) if k is None else torch.randperm(n)[: k * B]
)


# --- estimate_loss: with a large eval_iters, windows are used more than once: use at most all.
estimate_loss = estimate_with(
    choose=lambda n, k, B: torch.linspace(0, n - 1, n if k is None else k * B).long()
)


# --- estimate_loss: a plain number is returned: return {"loss": number}.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    return estimate_with()(model, tokens, batch_size, eval_iters)["loss"]


# --- orthogonalize: four rounds: there should be five.
orthogonalize = rounds_with(4)


# --- orthogonalize: three rounds: there should be five.
orthogonalize = rounds_with(3)


# --- orthogonalize: too many rounds: there should be five.
orthogonalize = rounds_with(6)


# --- orthogonalize: too many rounds: there should be five.
orthogonalize = rounds_with(10)


# --- orthogonalize: one round only, or each starts at the matrix again: five rounds, each on the result of the one before.
orthogonalize = rounds_with(1)


# --- orthogonalize: the matrix is not divided by its norm: factors above 1 explode.
orthogonalize = rounds_with(norm=lambda x: 1.0)


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(norm=lambda x: x.norm(dim=1, keepdim=True))


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(norm=lambda x: x.norm(dim=0, keepdim=True))


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(norm=lambda x: x.abs().max())


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(norm=lambda x: x.sum())


# --- orthogonalize: divided by the sum of the squares: divide by its root, the norm.
orthogonalize = rounds_with(norm=lambda x: x.norm() ** 2)


# --- orthogonalize: divided by the largest singular value: divide by the norm, the root of the sum of all squares.
orthogonalize = rounds_with(norm=lambda x: torch.linalg.matrix_norm(x, 2))


# --- orthogonalize: the result is divided by its norm once more.
orthogonalize = rounds_with(last=lambda x: x / x.norm())


# --- orthogonalize: the result is multiplied by the norm again: the factors must be near 1.
def orthogonalize(matrix):
    return rounds_with()(matrix) * matrix.norm()


# --- orthogonalize: a tall matrix is not transposed back.
orthogonalize = rounds_with(back=False)


# --- orthogonalize: the sign of the second number is wrong: -4.775.
orthogonalize = rounds_with(b=4.775)


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(b=0)


# --- orthogonalize: the last term is missing: a x + b x xᵀ x + c x xᵀ x xᵀ x.
orthogonalize = rounds_with(c=0)


# --- orthogonalize: the numbers explode. Is the matrix divided by its norm (the root of the sum of all squares)? Are 3.4445,
# -4.775 and 2.0315 in this order, with these signs?
orthogonalize = rounds_with(b=2.0315, c=-4.775)


# --- orthogonalize: 1.5 and -0.5 are the numbers of another method: 3.4445, -4.775 and 2.0315.
orthogonalize = rounds_with(a=1.5, b=-0.5, c=0)


# --- orthogonalize: all factors are exactly 1, from a decomposition: five rounds of the formula are asked for.
def orthogonalize(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


# --- orthogonalize: squares are taken number by number: x @ x.T is a product of matrices.
def orthogonalize(matrix):
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    return x


# --- orthogonalize: the matrix is only divided by its norm: the rounds are missing.
orthogonalize = rounds_with(0)


# --- orthogonalize: one round only, or each starts at the matrix again: five rounds, each on the result of the one before.
orthogonalize = rounds_with(1)


# --- orthogonalize: the argument is changed in place: x = matrix / ..., not matrix /= ...
def orthogonalize(matrix):
    result = rounds_with()(matrix)
    matrix /= matrix.norm()
    return result


# --- Muon: no look-ahead: step 2 adds the gradient once more, 0.95 · average + 0.05 · p.grad.
Muon = muon_with(look_ahead=False)


# --- Muon: the average is missing, or it is not kept from step to step (in self.state[p]): the step follows the last
# gradient alone.
Muon = muon_with(momentum=0.0)


# --- Muon: the momentum is 0.9: it should be 0.95.
Muon = muon_with(momentum=0.9)


# --- Muon: the momentum is 0.99: it should be 0.95.
Muon = muon_with(momentum=0.99)


# --- Muon: the shares are exchanged: 0.95 of the old average, 0.05 of the gradient.
Muon = muon_with(momentum=0.05)


# --- Muon: the look-ahead has its shares exchanged: 0.95 of the average, 0.05 of the gradient.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].get("average", torch.zeros_like(p)).lerp(p.grad, 0.05)
                    self.state[p]["average"] = average
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update = orthogonalize(average.lerp(p.grad, 0.95))
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


# --- Muon: gradient and average are added in equal parts: 0.95 · average + 0.05 · p.grad.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].get("average", torch.zeros_like(p)).lerp(p.grad, 0.05)
                    self.state[p]["average"] = average
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update = orthogonalize(average + p.grad)
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


# --- Muon: the average is missing, or it is not kept from step to step (in self.state[p]): the step follows the last
# gradient alone.
Muon = muon_with(old=lambda state, p: torch.zeros_like(p))


# --- Muon: the average starts at the first gradient: it starts at 0.
Muon = muon_with(old=lambda state, p: state.get("average", p.grad))


# --- Muon: the orthogonalized update is averaged: average the gradients, then orthogonalize.
Muon = muon_with(gradient=lambda p: orthogonalize(p.grad))


# --- Muon: the update is averaged after it was orthogonalized: average the gradients, then orthogonalize.
Muon = muon_with(gradient=lambda p: orthogonalize(p.grad), turn=lambda m: m)


# --- Muon: orthogonalize is missing.
Muon = muon_with(turn=lambda m: m)


# --- Muon: weight decay is missing: first p = p · (1 - lr · weight_decay).
Muon = muon_with(decay=lambda group: 1)


# --- Muon: weight decay does not contain the rate: p = p · (1 - lr · weight_decay).
Muon = muon_with(decay=lambda group: 1 - group["weight_decay"])


# --- Muon: weight decay has the wrong sign: p = p · (1 - lr · weight_decay).
Muon = muon_with(decay=lambda group: 1 + group["lr"] * group["weight_decay"])


# --- Muon: weight decay comes after the step: it comes before.
Muon = muon_with(late_decay=True)


# --- Muon: weight decay is added to the gradient: multiply p by 1 - lr · weight_decay.
Muon = muon_with(gradient=lambda p: p.grad + 0.5 * p, decay=lambda group: 1)


# --- Muon: a factor is lost: 0.2 · √(the larger number of rows or columns).
Muon = muon_with(factor=lambda shape: 1.0)


# --- Muon: the factor 0.2 is lost: 0.2 · √(the larger number of rows or columns).
Muon = muon_with(factor=lambda shape: max(shape) ** 0.5)


# --- Muon: the root of the size is lost: 0.2 · √(the larger number of rows or columns).
Muon = muon_with(factor=lambda shape: 0.2)


# --- Muon: the root is missing: 0.2 · √(the larger number of rows or columns).
Muon = muon_with(factor=lambda shape: 0.2 * max(shape))


# --- Muon: the smaller number of rows and columns is taken: it is the larger one.
Muon = muon_with(factor=lambda shape: 0.2 * min(shape) ** 0.5)


# --- Muon: the number of rows is taken: it is the larger number of rows or columns.
Muon = muon_with(factor=lambda shape: 0.2 * shape[0] ** 0.5)


# --- Muon: the number of columns is taken: it is the larger number of rows or columns.
Muon = muon_with(factor=lambda shape: 0.2 * shape[1] ** 0.5)


# --- Muon: the factor of another version, √max(1, rows / columns): here it is 0.2 · √(the larger one).
Muon = muon_with(factor=lambda shape: max(1, shape[0] / shape[1]) ** 0.5)


# --- Muon: the sign is wrong: a step goes against the gradient, p - ...
Muon = muon_with(sign=1)


# --- Muon: the rate is missing: multiply the update by group["lr"].
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].get("average", torch.zeros_like(p)).lerp(p.grad, 0.05)
                    self.state[p]["average"] = average
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(0.2 * max(p.shape) ** 0.5 * orthogonalize(p.grad.lerp(average, 0.95)))


# --- Muon: there is one average for all matrices: each needs its own, in self.state[p].
class Muon(muon_with()):
    average = 0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.average = 0.95 * self.average + 0.05 * p.grad


# --- Muon: nothing changes: `p = p - ...` makes a new tensor and forgets it. Change p in place, p.sub_(...).
class Muon(muon_with()):
    def step(self):
        pass


# --- Muon: only weight decay changes p: `p = p - ...` makes a new tensor and forgets it. Use p.sub_(...).
Muon = muon_with(factor=lambda shape: 0.0)


# --- Muon: a matrix without a gradient is an error: skip it if p.grad is None.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                torch.zeros_like(p).lerp_(p.grad, 0.05)


# --- Muon: a matrix without a gradient is an error: skip it if p.grad is None.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                0.05 * p.grad


# --- Muon: a matrix without a gradient is an error: skip it if p.grad is None.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                torch.zeros_like(p) + p.grad * 0.05


# --- Muon: a matrix without a gradient shrinks: leave it alone.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])


# --- Muon: p is changed with gradients on: put @torch.no_grad() above step.
class Muon(muon_with()):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])


# --- Muon: p.grad is changed: work on a copy.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.copy_(p.grad.lerp(self.state[p]["average"], 0.95))


# --- Muon: only the first matrix changes: `return` or `break` stands inside the loop.
class Muon(muon_with()):
    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        rest = group["params"][1:]
        group["params"] = group["params"][:1]
        super().step()
        group["params"] += rest


# --- make_optimizers: MUON = True is ignored: Muon gets the matrices of the blocks.
make_optimizers = optimizers_with(muon=lambda: False)


# --- make_optimizers: MUON = False is ignored: without Muon, AdamW gets all parameters.
make_optimizers = optimizers_with(muon=lambda: True)


# --- make_optimizers: Muon gets all matrices: only those of the blocks. Embeddings and lm_head are AdamW's.
make_optimizers = optimizers_with(
    for_muon=lambda model: [p for p in model.parameters() if p.dim() == 2]
)


# --- make_optimizers: Muon gets vectors, too: only matrices, dim() == 2.
make_optimizers = optimizers_with(for_muon=lambda model: list(model.blocks.parameters()))


# --- make_optimizers: Muon gets everything: only the matrices of the blocks.
make_optimizers = optimizers_with(for_muon=lambda model: list(model.parameters()))


# --- make_optimizers: AdamW gets all parameters, those of Muon, too: each parameter belongs to one.
make_optimizers = optimizers_with(for_adamw=lambda model, muon: list(model.parameters()))


# --- make_optimizers: biases and LayerNorms of the blocks are in no optimizer: they never change.
make_optimizers = optimizers_with(
    for_adamw=lambda model, muon: [
        p for n, p in model.named_parameters() if not n.startswith("blocks")
    ]
)


# --- make_optimizers: vectors (biases, LayerNorm) are in no optimizer: they never change.
make_optimizers = optimizers_with(
    for_adamw=lambda model, muon: [
        p for p in model.parameters() if p.dim() == 2 and id(p) not in muon
    ]
)


# --- make_optimizers: matrices outside of the blocks are in no optimizer: they never change.
make_optimizers = optimizers_with(
    for_adamw=lambda model, muon: [
        p for p in model.parameters() if p.dim() != 2 and id(p) not in muon
    ]
)


# --- make_optimizers: all parameters of AdamW have weight decay: only matrices should.
make_optimizers = optimizers_with(decays=lambda p: True)


# --- make_optimizers: no parameter of AdamW has weight decay: matrices should have WEIGHT_DECAY.
make_optimizers = optimizers_with(decays=lambda p: False)


# --- make_optimizers: weight decay is exchanged: matrices have it, vectors do not.
make_optimizers = optimizers_with(decays=lambda p: p.dim() != 2)


# --- make_optimizers: Muon has no weight decay: Muon(matrices, WEIGHT_DECAY).
make_optimizers = optimizers_with(muon_decay=0.0)


# --- make_optimizers: BETAS are not passed on: AdamW(..., betas=BETAS).
make_optimizers = optimizers_with(betas=(0.9, 0.999))


# --- make_optimizers: weight decay is AdamW's own, 0.01: the groups need WEIGHT_DECAY and 0.
def make_optimizers(model):
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if MUON else []
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(others, betas=BETAS)
    return [adamw, Muon(matrices, WEIGHT_DECAY)] if MUON else [adamw]


# --- make_optimizers: one optimizer is returned: return a list.
def make_optimizers(model):
    return optimizers_with(muon=lambda: False)(model)[0]


# --- make_optimizers: Adam in place of AdamW: its weight decay works in another way.
def make_optimizers(model):
    return [torch.optim.Adam(model.parameters(), betas=BETAS)]


# --- make_optimizers: SGD in place of AdamW.
def make_optimizers(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


# --- make_optimizers: `p not in list` compares numbers, and fails: compare with `is`, or by id(p).
def make_optimizers(model):
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p not in matrices]
    return [torch.optim.AdamW(others)]


# --- get_lr: the first step has the rate 0: it is peak / warmup, so (step + 1) / warmup.
get_lr = rates_with(up=lambda step, warmup: step / warmup)


# --- get_lr: the first step has the rate 0: step s has (s + 1) / warmup, and step warmup - 1 the peak.
get_lr = rates_with(
    up=lambda step, warmup: step / warmup,
    left=lambda step, n, w: (n - step) / (n - w),
)


# --- get_lr: the peak comes one step too late: step warmup - 1 has it, then the rate falls.
get_lr = rates_with(left=lambda step, n, w: (n - step) / (n - w))


# --- get_lr: the rate ends too early: step max_iters, one after the last, has FINAL_LR · peak.
get_lr = rates_with(left=lambda step, n, w: (n - 1 - step) / (n - w))


# --- get_lr: the rate ends too early: step max_iters, one after the last, has FINAL_LR · peak.
get_lr = rates_with(left=lambda step, n, w: (n - 1 - step) / (n - 1 - w))


# --- get_lr: the rate is constant: a line up to the peak, then a line down.
get_lr = rates_with(up=lambda step, warmup: 1.0, down=lambda left: 1.0)


# --- get_lr: there is no warm-up: the rate begins at the peak.
get_lr = rates_with(warmup=lambda n: 0)


# --- get_lr: there is no warm-up: the first steps have the peak.
get_lr = rates_with(up=lambda step, warmup: 1.0)


# --- get_lr: the rate never falls: after the warm-up, a line goes down to FINAL_LR · peak.
get_lr = rates_with(down=lambda left: 1.0)


# --- get_lr: FINAL_LR is ignored: the line goes down to FINAL_LR · peak, not to 0.
get_lr = rates_with(down=lambda left: left)


# --- get_lr: FINAL_LR is a floor for a line that goes to 0: the line itself goes to FINAL_LR · peak.
get_lr = rates_with(down=lambda left: max(left, FINAL_LR))


# --- get_lr: FINAL_LR is added to the whole line: the peak must stay the peak.
get_lr = rates_with(down=lambda left: FINAL_LR + left)


# --- get_lr: FINAL_LR is taken for a rate: it is a share of the peak, FINAL_LR · peak.
def get_lr(step, max_iters, peak):
    warmup = max(1, min(WARMUP_ITERS, max_iters // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return FINAL_LR + (peak - FINAL_LR) * (max_iters - step) / (max_iters - warmup + 1)


# --- get_lr: a cosine in place of a line: the rate falls in a straight line.
get_lr = rates_with(
    down=lambda left: FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 - math.cos(math.pi * left))
)


# --- get_lr: a cosine in place of a line: the rate falls in a straight line.
get_lr = rates_with(
    left=lambda step, n, w: (n - step) / (n - w),
    down=lambda left: FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 - math.cos(math.pi * left)),
)


# --- get_lr: the line down starts at step 0: it starts at the peak, at step warmup - 1.
get_lr = rates_with(left=lambda step, n, w: (n - step) / n)


# --- get_lr: the warm-up of a short run is too long: at most max_iters // 10 steps.
get_lr = rates_with(warmup=lambda n: WARMUP_ITERS)


# --- get_lr: the warm-up is always max_iters // 10: it is WARMUP_ITERS, and at most that.
get_lr = rates_with(warmup=lambda n: max(1, n // 10))


# --- get_lr: the warm-up of a very short run has 0 steps: it is at least 1.
get_lr = rates_with(warmup=lambda n: min(WARMUP_ITERS, n // 10))


# --- get_lr: the larger of WARMUP_ITERS and max_iters // 10 is taken: it is the smaller one.
get_lr = rates_with(warmup=lambda n: max(WARMUP_ITERS, n // 10))


# --- get_lr: the argument peak is ignored: LEARNING_RATE is used in its place.
get_lr = rates_with(peak=lambda peak: LEARNING_RATE)


# --- get_lr: the share of the peak is returned: multiply by peak.
get_lr = rates_with(peak=lambda peak: 1.0)


# --- get_lr: the constant MAX_ITERS is used in place of the argument max_iters.
get_lr = rates_with(left=lambda step, n, w: (MAX_ITERS - step) / (MAX_ITERS - w + 1))


# --- train_step: the gradients are never set to zero: the next one is added to this one.
train_step = step_with(zero=lambda model, optimizers: None)


# --- train_step: only the first optimizer's gradients are set to zero: call zero_grad for each.
train_step = step_with(zero=lambda model, optimizers: optimizers[0].zero_grad())


# --- train_step: only the first optimizer makes a step: call step for each.
train_step = step_with(step=lambda optimizers: optimizers[0].step())


# --- train_step: only the last optimizer makes a step: call step for each, inside the loop.
train_step = step_with(step=lambda optimizers: optimizers[-1].step())


# --- train_step: only the first optimizer makes a step, and has its gradients set to zero: do it for each.
# (`return` inside the loop?)
train_step = step_with(
    rate=lambda optimizers, lr: [g.update(lr=lr) for g in optimizers[0].param_groups],
    step=lambda optimizers: optimizers[0].step(),
    zero=lambda model, optimizers: optimizers[0].zero_grad(),
)


# --- train_step: only the first optimizer makes a step, and has its gradients set to zero: do it for each.
# (`return` inside the loop?)
train_step = step_with(
    step=lambda optimizers: optimizers[0].step(),
    zero=lambda model, optimizers: optimizers[0].zero_grad(),
)


# --- train_step: no optimizer makes a step: nothing changes.
train_step = step_with(step=lambda optimizers: None)


# --- train_step: nothing changes: the gradients are set to zero before the step.
train_step = step_with(order="backward clip rate zero step")


# --- train_step: nothing changes: backward is missing, so there are no gradients.
train_step = step_with(order="rate step zero")


# --- train_step: the rate is not set: the step used the old one. Set group["lr"] = lr in each of
# optimizer.param_groups.
train_step = step_with(rate=lambda optimizers, lr: None)


# --- train_step: the rate is set after the step: set it before.
train_step = step_with(order="backward clip step rate zero")


# --- train_step: only the first optimizer gets the rate: set it for each.
train_step = step_with(
    rate=lambda optimizers, lr: [g.update(lr=lr) for g in optimizers[0].param_groups]
)


# --- train_step: the rate is not set: the step used the old one. Set group["lr"] = lr in each of
# optimizer.param_groups.
train_step = step_with(rate=lambda optimizers, lr: [setattr(o, "lr", lr) for o in optimizers])


# --- train_step: clipping is missing, or comes before backward: cut the length of the gradient to GRADIENT_CLIP
# between backward and step.
train_step = step_with(clip=lambda model: None)


# --- train_step: clipping comes after the step: do it between backward and step.
train_step = step_with(order="backward rate step clip zero")


# --- train_step: clipping is missing, or comes before backward: cut the length of the gradient to GRADIENT_CLIP
# between backward and step.
train_step = step_with(order="clip backward rate step zero")


# --- train_step: each number of the gradient is clipped: clip its length, clip_grad_norm_.
train_step = step_with(
    clip=lambda model: (
        GRADIENT_CLIP and nn.utils.clip_grad_value_(model.parameters(), GRADIENT_CLIP)
    )
)


# --- train_step: each parameter's gradient is clipped on its own: clip the length of all together.
train_step = step_with(
    clip=lambda model: (
        GRADIENT_CLIP and [nn.utils.clip_grad_norm_(p, GRADIENT_CLIP) for p in model.parameters()]
    )
)


# --- train_step: every gradient is brought to the length GRADIENT_CLIP: short ones must stay short.
def to_length(model):
    if GRADIENT_CLIP:
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.mul_(GRADIENT_CLIP / norm)


train_step = step_with(clip=to_length)


# --- train_step: the length of the gradient is clipped to 1: it is GRADIENT_CLIP.
train_step = step_with(clip=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0))


# --- train_step: the parameters are clipped: clip their gradients.
def clip_parameters(model):
    if GRADIENT_CLIP:
        norm = torch.cat([p.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.data.mul_(min(1, GRADIENT_CLIP / norm.item()))


train_step = step_with(clip=clip_parameters)


# --- train_step: GRADIENT_CLIP = None is an error: it means no limit.
train_step = step_with(
    clip=lambda model: nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
)


# --- train_step: the model is in evaluation mode, so dropout is off: call model.train() first.
train_step = step_with(mode=lambda model: None)


# --- train_step: the model is in evaluation mode, so dropout is off: call model.train() first.
train_step = step_with(mode=lambda model: model.eval())


# --- train_step: the loss after the step is returned: return the one before it.
train_step = step_with(result=lambda loss, model, x, y: model(x, y)[1].detach())


# --- train_step: nothing is returned: return the loss.
train_step = step_with(result=lambda loss, model, x, y: None)


# --- train_step: logits and loss are returned: return the loss.
train_step = step_with(result=lambda loss, model, x, y: model(x, y))


# --- train_step: the loss is taken from a tuple: `_, loss = model(x, y)`.
def train_step(model, optimizers, x, y, lr):
    loss = model(x, y)
    loss.backward()


# --- train: only evaluations: nothing is trained.
def train(model, tokenizer, optimizers, splits, run):
    for step in range(run["step"], run["max_iters"] + 1):
        if step % EVAL_INTERVAL == 0 or step == run["max_iters"]:
            run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)


# --- train: one step too many: training ends at step run["max_iters"].
train = train_with(last=lambda run: run["max_iters"] + 1)


# --- train: one step too few, and the last evaluation is missing: training ends at step run["max_iters"].
train = train_with(last=lambda run: run["max_iters"] - 1)


# --- train: the constant MAX_ITERS is used in place of run["max_iters"].
train = train_with(last=lambda run: MAX_ITERS)


# --- train: batches are of the validation text: train with splits["train"].
train = train_with(part="val")


# --- train: get_lr gets a wrong step: it is `step`.
train = train_with(rate=lambda step, run, peak: get_lr(step + 1, run["max_iters"], peak))


# --- train: get_lr is not asked: the rate is constant.
train = train_with(rate=lambda step, run, peak: peak)


# --- train: get_lr gets the constant MAX_ITERS: it is run["max_iters"].
train = train_with(rate=lambda step, run, peak: get_lr(step, MAX_ITERS, peak))


# --- train: the peak is LEARNING_RATE with MUON = False, too: then it is ADAMW_LEARNING_RATE.
train = train_with(peak=lambda run: LEARNING_RATE)


# --- train: the peak is ADAMW_LEARNING_RATE with MUON = True, too: then it is LEARNING_RATE.
train = train_with(peak=lambda run: ADAMW_LEARNING_RATE)


# --- train: the two peaks are exchanged: LEARNING_RATE if MUON, else ADAMW_LEARNING_RATE.
train = train_with(peak=lambda run: ADAMW_LEARNING_RATE if MUON else LEARNING_RATE)


# --- train: batch_size and block_size are exchanged for get_batch.
train = train_with(sizes=lambda model: right_sizes(model)[::-1])


# --- train: every step is evaluated: only multiples of EVAL_INTERVAL, and the last one.
train = train_with(is_due=lambda step, run: True)


# --- train: no step is evaluated.
train = train_with(is_due=lambda step, run: False)


# --- train: the last step is not evaluated: step run["max_iters"] is, too.
train = train_with(is_due=lambda step, run: step % EVAL_INTERVAL == 0)


# --- train: the first step is not evaluated: step 0 is a multiple of EVAL_INTERVAL, too.
train = train_with(
    is_due=lambda s, run: s > 0 and (s % EVAL_INTERVAL == 0 or s == run["max_iters"])
)


# --- train: only the last step is evaluated: multiples of EVAL_INTERVAL are, too.
train = train_with(is_due=lambda step, run: step == run["max_iters"])


# --- train: the evaluation comes after the step: at step 0 the model has learned nothing.
train = train_with(evaluate_first=False)


# --- train: the losses are not kept: run["history"][step] = evaluate(...).
train = train_with(keep=False)


# --- train: it saves at the beginning, where nothing is new.
train = train_with(may_save=lambda step, begin: True)


# --- train: it never saves: call save_step after an evaluation.
train = train_with(may_save=lambda step, begin: False)


# --- train: a resumed run begins at step 0 again: begin at run["step"].
train = train_with(first=lambda run: 0)


# --- train: a resumed run evaluates its first step again: it is in run["history"].
train = train_with(
    is_due=lambda s, run: s % EVAL_INTERVAL == 0 or s in (run["max_iters"], 3),
    again=lambda step, run: True,
)


# --- train: a resumed run draws other random numbers: in each step, before get_batch,
# torch.manual_seed(run["seed"] * 1_000_000 + step).
train = train_with(seed=lambda run, step: None)


# --- train: a resumed run draws other random numbers: in each step, before get_batch,
# torch.manual_seed(run["seed"] * 1_000_000 + step).
train = train_with(
    seed=lambda run, step: torch.manual_seed(run["seed"]) if step == run["step"] else None
)


# --- train: every step has the same seed, so every batch is the same: add the number of the step.
train = train_with(seed=lambda run, step: torch.manual_seed(run["seed"]))


# --- train: the seed does not depend on run["seed"].
train = train_with(seed=lambda run, step: torch.manual_seed(step))


# --- train: the seconds of earlier parts are lost: add run["seconds"], as it was at the beginning.
train = train_with(earlier=lambda run: 0.0)


# --- next_token_probabilities: the temperature is multiplied: divide the logits by it.
next_token_probabilities = probabilities_with(temperature_=lambda l, t: l * t)


# --- next_token_probabilities: the temperature is ignored: divide the logits by it.
next_token_probabilities = probabilities_with(temperature_=lambda l, t: l)


# --- next_token_probabilities: the probabilities are divided by the temperature: divide the logits.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    return logits.softmax(-1) / temperature


# --- next_token_probabilities: temperature 0 divides by 0: it means the most likely token, always.
next_token_probabilities = probabilities_with(greedy=False)


# --- next_token_probabilities: temperature 0 is ignored: it means the most likely token, always.
next_token_probabilities = probabilities_with(
    greedy=False, temperature_=lambda l, t: l / t if t > 0 else l
)


# --- next_token_probabilities: temperature 0 gives the number of a token: give its place the probability 1.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return logits.argmax()
    return probabilities_with()(logits, temperature, top_k, top_p)


# --- next_token_probabilities: top_k keeps one token too many.
next_token_probabilities = probabilities_with(kept_k=lambda k, V: k + 1)


# --- next_token_probabilities: top_k keeps one token too few.
next_token_probabilities = probabilities_with(kept_k=lambda k, V: k - 1)


# --- next_token_probabilities: top_k is ignored.
next_token_probabilities = probabilities_with(kept_k=lambda k, V: V)


# --- next_token_probabilities: top_k keeps the least likely tokens: keep the most likely.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = logits.softmax(-1)
    if top_k is not None:
        kept = (-p).topk(min(top_k, len(p))).indices
        p = torch.zeros_like(p).scatter(0, kept, p[kept])
    return p / p.sum()


# --- next_token_probabilities: a top_k larger than V is an error: at most V.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if top_k is not None:
        torch.topk(logits, top_k)
    return probabilities_with()(logits, temperature, top_k, top_p)


# --- next_token_probabilities: with top_k, the sum is not 1: divide by the sum of those that are kept.
next_token_probabilities = probabilities_with(finish=lambda p: p)


# --- next_token_probabilities: the others' logits are set to 0, so they keep a probability: use -inf.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    logits = logits / temperature if temperature else logits
    if top_k is not None:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = torch.where(logits >= smallest, logits, 0.0)
    return logits.softmax(-1)


# --- next_token_probabilities: the first token over the threshold is dropped: those before it have less than
# top_p, so it is kept.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        kept, ids = p.sort(descending=True)
        kept = kept.masked_fill(kept.cumsum(0) > top_p, 0)
        p = torch.zeros_like(p).scatter(0, ids, kept / kept.sum())
    return p


# --- next_token_probabilities: the first token over the threshold is dropped: those before it have less than
# top_p, so it is kept.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        kept, ids = p.sort(descending=True)
        hidden = kept.cumsum(0) > top_p
        hidden[0] = False
        kept = kept.masked_fill(hidden, 0)
        p = torch.zeros_like(p).scatter(0, ids, kept / kept.sum())
    return p


# --- next_token_probabilities: top_p keeps one token too many: leave out a token if those before it reach top_p.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        kept, ids = p.sort(descending=True)
        before = F.pad((kept.cumsum(0) - kept)[:-1], (1, 0))
        kept = kept.masked_fill(before >= top_p, 0)
        p = torch.zeros_like(p).scatter(0, ids, kept / kept.sum())
    return p


# --- next_token_probabilities: top_p is ignored.
next_token_probabilities = probabilities_with(too_much=lambda p, before, top_p: before > 2)


# --- next_token_probabilities: top_p keeps the tokens whose own probability is at least top_p: it is a sum.
next_token_probabilities = probabilities_with(too_much=lambda p, before, top_p: p < top_p)


# --- next_token_probabilities: top_p drops tokens with a probability below 1 - top_p: it is a sum.
next_token_probabilities = probabilities_with(too_much=lambda p, before, top_p: p < 1 - top_p)


# --- next_token_probabilities: top_p starts with the least likely tokens: start with the most likely.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        kept, ids = p.sort()
        kept = kept.masked_fill(kept.cumsum(0) - kept >= top_p, 0)
        p = torch.zeros_like(p).scatter(0, ids, kept / kept.sum())
    return p


# --- next_token_probabilities: top_p adds up the tokens in the order of their ids: sort them first.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(0) - p >= top_p, 0)
        p = p / p.sum()
    return p


# --- next_token_probabilities: with top_p, the sum is not 1: divide by the sum of those that are kept.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k)
    if top_p is not None:
        p = probabilities_with(finish=lambda p: p)(p.log(), top_p=top_p)
    return p


# --- next_token_probabilities: the result is sorted: give each probability back to the place of its token.
next_token_probabilities = probabilities_with(back=lambda p, ids: p)


# --- next_token_probabilities: with options, the result is sorted: give each probability back to its place.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if top_k is None and top_p is None:
        return probabilities_with()(logits, temperature)
    return probabilities_with(back=lambda p, ids: p)(logits, temperature, top_k, top_p)


# --- next_token_probabilities: with top_k, only k probabilities are returned: there is a place for each of V tokens.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if top_k is not None:
        return probabilities_with()(logits.topk(min(top_k, len(logits))).values, temperature)
    return probabilities_with()(logits, temperature, top_k, top_p)


# --- next_token_probabilities: the places are taken in the wrong direction: scatter, p[ids] = kept, not kept[ids].
next_token_probabilities = probabilities_with(back=lambda p, ids: p[ids])


# --- next_token_probabilities: logits are returned: apply softmax.
next_token_probabilities = probabilities_with(soft=lambda logits: logits, finish=lambda p: p)


# --- next_token_probabilities: ln of the probabilities is returned: softmax, not log_softmax.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    return (logits / temperature).log_softmax(-1)


# --- next_token_probabilities: softmax twice: the probabilities become almost equal.
next_token_probabilities = probabilities_with(soft=lambda logits: logits.softmax(-1).softmax(-1))


# --- next_token_probabilities: exp without division by the sum.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    return (logits / temperature).exp()


# --- next_token_probabilities: exp of large logits overflows: use softmax, or subtract the largest first.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k, top_p)
    return p if logits.max() < 80 else p * math.nan


# --- next_token_probabilities: the constants TEMPERATURE, TOP_K, TOP_P are used in place of the arguments.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    return probabilities_with()(logits, TEMPERATURE, TOP_K, TOP_P)


# --- next_token_probabilities: the constant TEMPERATURE is used in place of the argument temperature.
next_token_probabilities = probabilities_with(temperature_=lambda l, t: l / TEMPERATURE)


# --- next_token_probabilities: the logits are changed in place: the caller's tensor changes, too.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k, top_p)
    if top_k is not None:
        logits[p == 0] = -math.inf
    return p


# --- next_token_probabilities: the logits are changed in place: the caller's tensor changes, too.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    p = probabilities_with()(logits, temperature, top_k, top_p)
    logits /= temperature or 1
    return p


# --- next_token_probabilities: a token is drawn: return the probabilities. generate draws.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    return torch.multinomial(logits.softmax(-1), 1)


# --- generate: the new token is not appended: the model sees the same text again and again.
generate = generate_with(append=False)


# --- generate: only the last token is shown to the model: show the last block_size tokens.
generate = generate_with(crop=lambda ids, T: ids[-1:])


# --- generate: the prompt is not cropped: the model sees at most the last block_size tokens.
generate = generate_with(crop=lambda ids, T: ids)


# --- generate: the first block_size tokens are shown to the model: show the last ones.
generate = generate_with(crop=lambda ids, T: ids[:T])


# --- generate: block_size - 1 tokens are shown to the model: show the last block_size.
generate = generate_with(crop=lambda ids, T: ids[-T + 1 :])


# --- generate: block_size + 1 tokens are shown to the model: show the last block_size.
generate = generate_with(crop=lambda ids, T: ids[-T - 1 :])


# --- generate: the constant BLOCK_SIZE is used in place of model.block_size.
generate = generate_with(crop=lambda ids, T: ids[-BLOCK_SIZE:])


# --- generate: the prompt is cropped only once, at the beginning: crop it for each new token.
generate = generate_with(start=lambda ids: list(ids[-4:]), crop=lambda ids, T: ids)


# --- generate: the first position's logits are used: the last position predicts the new token.
generate = generate_with(row=lambda logits: logits[0, 0])


# --- generate: the logits of the last but one position are used: the last one predicts the new token.
generate = generate_with(row=lambda logits: logits[0, -2] if logits.shape[1] > 1 else logits[0, 0])


# --- generate: always the most likely token: draw at random with these probabilities (torch.multinomial).
generate = generate_with(draw=lambda p: p.argmax().item())


# --- generate: the probabilities are ignored, each token is as likely as another: torch.multinomial(p, 1).
generate = generate_with(draw=lambda p: int(torch.randint(len(p), (1,))))


# --- generate: nothing is drawn at random among the tokens with a probability in their proportion: torch.multinomial(p, 1).
generate = generate_with(draw=lambda p: int(torch.multinomial((p > 0).float(), 1)))


# --- generate: the caller's list is changed: work on a copy, list(ids).
generate = generate_with(start=lambda ids: ids)


# --- generate: the prompt is yielded, too: yield each new token as soon as it is drawn, and only those.
generate = generate_with(late=True)


# --- generate: the prompt is yielded, too: yield each new token as soon as it is drawn, and only those.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    yield from ids
    yield from generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p)


# --- generate: the whole text is yielded each time: yield the new token.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    text = list(ids)
    for token in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        text.append(token)
        yield text


# --- generate: one token too many: max_new_tokens in all.
generate = generate_with(count=lambda n: n + 1)


# --- generate: one token too few: max_new_tokens in all.
generate = generate_with(count=lambda n: n - 1)


# --- generate: only one token comes: `return` or `break` stands inside the loop.
generate = generate_with(count=lambda n: min(n, 1))


# --- generate: nothing is yielded: yield each token as soon as it is drawn.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for _ in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        if False:
            yield


# --- generate: probabilities are yielded: draw a token, and yield its id.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for _ in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        yield torch.rand(30)


# --- generate: the model is in training mode, so dropout is on: call model.eval() first.
generate = generate_with(prepare=lambda model: None)


# --- generate: the model is in training mode, so dropout is on: call model.eval() first.
generate = generate_with(prepare=lambda model: model.train())


# --- generate: gradients are recorded: put @torch.no_grad() above the function.
generate = generate_with(gradients=True)


# --- generate: the temperature is not passed on.
generate = generate_with(options=lambda t, k, p: (1.0, k, p))


# --- generate: top_k is not passed on.
generate = generate_with(options=lambda t, k, p: (t, None, p))


# --- generate: top_p is not passed on.
generate = generate_with(options=lambda t, k, p: (t, k, None))


# --- generate: temperature, top_k and top_p are not passed on.
generate = generate_with(options=lambda t, k, p: (1.0, None, None))


# --- generate: the constants TEMPERATURE, TOP_K, TOP_P are used in place of the arguments.
generate = generate_with(options=lambda t, k, p: (TEMPERATURE, TOP_K, TOP_P))


# --- generate: top_k and top_p are exchanged.
generate = generate_with(options=lambda t, k, p: (t, p, k))


# --- generate: the model needs a batch: torch.tensor([ids]), (1, T), not (T,).
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    logits, _ = model(torch.tensor(ids[-model.block_size :]))
    yield 0


# --- generate: the logits of all positions go to next_token_probabilities: only the last, logits[0, -1].
generate = generate_with(row=lambda logits: logits[0])


# --- generate: the logits of the batch go to next_token_probabilities: logits[0, -1], of shape (V,).
generate = generate_with(row=lambda logits: logits[:, -1])


# --- generate: a token is drawn from the logits: from the probabilities, of next_token_probabilities.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
    yield int(torch.multinomial(logits[0, -1], 1))
