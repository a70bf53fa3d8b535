# ruff: noqa
"""Correct solutions of what gpt2.py has anew, in styles of their own."""


# --- Tokenizer: bytes
class Tokenizer:
    vocab_size = 50_257

    def __init__(self, vocabulary="gpt2"):
        self.vocabulary = vocabulary
        self.encoding = tiktoken.get_encoding(vocabulary)

    def encode(self, text):
        return list(self.encoding.encode(text, allowed_special={"<|endoftext|>"}))

    def decode(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids]).decode("utf-8", errors="replace")


# --- split_text: lengths
def split_text(tokens, train_share, max_val_tokens, block_size):
    n = int(len(tokens) * train_share)
    m = min(len(tokens) - n, max_val_tokens)
    return {"train": tokens[:n], "val": tokens[n : n + m]}


# --- get_batch: as in nanoGPT
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size].to(torch.int64) for i in ix])
    y = torch.stack([tokens[i + 1 : i + 1 + block_size].to(torch.int64) for i in ix])
    return x.to(device), y.to(device)


# --- Head: written out
class Head(nn.Module):
    def forward(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        new = torch.arange(S - T, S)[:, None]
        scores = scores.masked_fill(torch.arange(S)[None] > new, -math.inf)
        return scores.softmax(-1) @ v


# --- Cache: torch.cat
class Cache:
    def __init__(self, block_size):
        self.block_size = block_size
        self.k = self.v = None

    @property
    def length(self):
        return 0 if self.k is None else self.k.size(2)

    def append(self, k, v):
        if self.k is None:
            self.k, self.v = k, v
        else:
            self.k = torch.cat([self.k, k], dim=2)
            self.v = torch.cat([self.v, v], dim=2)
        return self.k, self.v


# --- MultiHead: permute
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.h = n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed)
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.qkv(x).view(B, T, 3, self.h, C // self.h).permute(2, 0, 3, 1, 4)
        if cache:
            k, v = cache.append(k, v)
        y = Head()(q, k, v)
        y = torch.cat([y[:, i] for i in range(self.h)], dim=-1)
        return self.dropout(self.projection(y))


# --- FeedForward: the formula
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand, self.shrink = nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed)
        self.p = dropout

    def forward(self, x):
        h = self.expand(x)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return F.dropout(self.shrink(h), self.p, self.training)


# --- Block: two lines
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)
        self.attention, self.feed_forward = (
            MultiHead(n_embed, n_heads, dropout),
            FeedForward(n_embed, dropout),
        )

    def forward(self, x, cache=None):
        x = self.attention(self.ln1(x), cache).add(x)
        return self.feed_forward(self.ln2(x)).add(x)


# --- LM.forward: positions from arange
class LM(nn.Module):
    def forward(self, idx, targets=None, caches=None):
        B, T = idx.shape
        before = 0 if caches is None else caches[0].length
        pos = self.position_embedding(torch.arange(before, before + T, device=idx.device))
        x = self.dropout(self.token_embedding(idx) + pos)
        if caches is None:
            caches_ = [None] * len(self.blocks)
        else:
            caches_ = caches
        for block, cache in zip(self.blocks, caches_):
            x = block(x, cache)
        if caches is not None:
            x = x[:, [-1]]
        logits = F.linear(self.ln_f(x), self.token_embedding.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.transpose(1, 2), targets)


# --- openai_name: a loop over parts
def openai_name(name):
    whole = {"token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight"}
    if name in whole:
        return whole[name]
    parts = name.split(".")
    if parts[0] != "blocks":
        return name
    middle = {"ln1": "ln_1", "ln2": "ln_2", "attention": "attn", "feed_forward": "mlp"}
    last = {"qkv": "c_attn", "projection": "c_proj", "expand": "c_fc", "shrink": "c_proj"}
    return ".".join(["h", parts[1], middle[parts[2]], *[last.get(p, p) for p in parts[3:]]])


# --- load_pretrained: a state dict
def load_pretrained(path, **sizes):
    model = LM(**sizes)
    weights = {}
    for name, tensor in read_safetensors(path):
        if name.startswith("transformer."):
            name = name[len("transformer.") :]
        weights[name] = tensor
    for ours, p in model.named_parameters():
        theirs = openai_name(ours)
        check(theirs in weights, f"{theirs} is missing")
        value = weights.pop(theirs)
        if is_turned(theirs, value):
            value = value.t()
        check(value.shape == p.shape, f"{theirs} has another shape")
        with torch.no_grad():
            p.copy_(value)
    rest = [
        n for n in weights if not n.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))
    ]
    check(not rest, f"unknown: {rest}")
    return model


# --- make_optimizers: two lists
def make_optimizers(model):
    a, b = [], []
    for p in model.parameters():
        (a if p.dim() == 2 else b).append(p)
    groups = [{"params": a, "weight_decay": WEIGHT_DECAY}, {"params": b, "weight_decay": 0}]
    return [torch.optim.AdamW(groups, lr=1e-4, betas=BETAS)]


# --- train_step: by numbers
def train_step(model, optimizers, x, y, lr):
    model.train()
    n, total = len(x), 0.0
    for first in range(0, n, BATCH_SIZE):
        xb, yb = x[first : first + BATCH_SIZE], y[first : first + BATCH_SIZE]
        loss = model(xb, yb)[1] * len(xb) / n
        loss.backward()
        total += loss.item()
    if GRADIENT_CLIP:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return total


# --- train: without what the exercise does not need
def train(model, tokenizer, optimizers, splits, run):
    device = next(model.parameters()).device
    peak = SCRATCH_LEARNING_RATE
    if run["init"] == "pretrained":
        peak = LEARNING_RATE
    begin, clock = run["step"], time.perf_counter() - run["seconds"]
    try:
        for step in range(begin, run["max_iters"] + 1):
            last = step == run["max_iters"]
            if (last or step % EVAL_INTERVAL == 0) and step not in run["history"]:
                run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
                if step > begin:
                    save_step(run, step, model, optimizers, time.perf_counter() - clock)
            if not last:
                torch.manual_seed(run["seed"] * 1_000_000 + step)
                x, y = get_batch(splits["train"], TOKENS_PER_STEP // WINDOW, WINDOW, device)
                loss = train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))
                show_progress(run, step, loss, time.perf_counter() - clock)
    except KeyboardInterrupt:
        if run["path"] is None:
            raise


# --- generate: positions counted by hand
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    T = model.block_size
    text = [int(i) for i in ids][-T:]
    caches, waiting = None, text
    for _ in range(max_new_tokens):
        if caches is None:
            caches = [Cache(T) for _ in range(len(model.blocks))]
        row = model(torch.tensor([waiting]), caches=caches)[0].flatten().clone()
        row[Tokenizer.vocab_size :] = float("-inf")
        p = next_token_probabilities(row, temperature, top_k, top_p)
        token = int(torch.multinomial(p, 1))
        yield token
        if token == Tokenizer.vocab_size - 1:
            break
        text = text + [token]
        waiting = [token]
        if len(text) > T:
            text = text[-max(1, T // 2) :]
            waiting, caches = text, None


# --- stream: bytes collected by hand
def stream(tokenizer, tokens):
    kept = b""
    for token in tokens:
        kept += tokenizer.encoding.decode_single_token_bytes(token)
        try:
            yield kept.decode("utf-8")
            kept = b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                yield kept.decode("utf-8", errors="replace")
                kept = b""
    if kept:
        yield kept.decode("utf-8", errors="replace")
