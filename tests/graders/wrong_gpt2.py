# ruff: noqa
"""Mistakes as students make them. A section is a piece, and words of the right message."""


# --- Tokenizer: <|endoftext|> in a text is split into letters: it must be one id, so
class Tokenizer:
    vocab_size = 50_257

    def __init__(self, vocabulary="gpt2"):
        self.vocabulary = vocabulary
        self.encoding = tiktoken.get_encoding(vocabulary)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(list(ids))


# --- split_text: the validation part is cut at max_val_tokens of the whole text: tokens[cut :
def split_text(tokens, train_share, max_val_tokens, block_size):
    n = int(train_share * len(tokens))
    return {"train": tokens[:n], "val": tokens[n:max_val_tokens]}


# --- split_text: the validation part is the end of the text: it comes right after the training
def split_text(tokens, train_share, max_val_tokens, block_size):
    n = int(train_share * len(tokens))
    return {"train": tokens[:n], "val": tokens[-max_val_tokens:]}


# --- get_batch: the ids stay int32: x and y must be int64, for cross_entropy.
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + 1 + block_size] for i in ix])
    return x.to(device), y.to(device)


# --- Head: a single new token gets a mask: it is the newest, and sees all keys.
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- Head: several new tokens see those that come after them: mask with tril(S - T).
class Head(nn.Module):
    def forward(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.mT / q.shape[3] ** 0.5
        if T == S:
            scores = scores.masked_fill(torch.ones(T, S).triu(1).bool(), -math.inf)
        return scores.softmax(-1) @ v


# --- Head: the scores are not divided by √hs: they grow with hs, and one token gets
class Head(nn.Module):
    def forward(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.mT
        scores = scores.masked_fill(torch.ones(T, S).triu(S - T + 1).bool(), -math.inf)
        return scores.softmax(-1) @ v


# --- Cache: the length is not kept: self.length must grow with each append.
class Cache:
    def __init__(self, block_size):
        self.block_size, self.length = block_size, 0
        self.keys, self.values = [], []

    def append(self, k, v):
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


# --- Cache: only the new ones come back, or they replace those of before: return those of
class Cache:
    def __init__(self, block_size):
        self.length, self.k, self.v = 0, None, None

    def append(self, k, v):
        self.k, self.v = k, v
        self.length += k.shape[2]
        return self.k, self.v


# --- Cache: the new ones are put in front of those of before: behind them.
class Cache:
    def __init__(self, block_size):
        self.length, self.k, self.v = 0, None, None

    def append(self, k, v):
        if self.k is None:
            self.k, self.v = k, v
        else:
            self.k, self.v = torch.cat((k, self.k), -2), torch.cat((v, self.v), -2)
        self.length = self.k.shape[-2]
        return self.k, self.v


# --- MultiHead: the cache is not used (k, v = cache.append(k, v)): a new token sees only
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed)
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, -1))
        if cache is not None:
            cache.append(k, v)
        y = Head()(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.projection(y))


# --- MultiHead: q, k and v have no biases: OpenAI's weights have them.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.projection = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, -1))
        if cache is not None:
            k, v = cache.append(k, v)
        y = Head()(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.projection(y))


# --- FeedForward: the exact gelu: GPT-2 computes it approximately, approximate="tanh".
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand, self.shrink = nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.shrink(nn.GELU()(self.expand(x))))


# --- FeedForward: relu in place of gelu: -1 becomes 0. OpenAI trained with gelu, -0.16.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.expand, self.shrink = nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.shrink(torch.relu(self.expand(x))))


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


# --- LM.forward: positions restart with each call: they count on after the tokens in the
class LM(nn.Module):
    def forward(self, idx, targets=None, caches=None):
        T = idx.shape[1]
        x = self.dropout(self.token_embedding(idx) + self.position_embedding.weight[:T])
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        x = self.ln_f(x if caches is None else x[:, -1:])
        logits = self.lm_head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# --- LM.forward: with caches, all positions get logits: only the last one, (B, 1, V).
class LM(nn.Module):
    def forward(self, idx, targets=None, caches=None):
        past = caches[0].length if caches else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past : past + idx.shape[1]]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# --- LM: lm_head has a matrix of its own, or a copy, which moves away in training: it
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, qkv_bias=True):
        super().__init__()
        self.config = dict(
            vocab_size=vocab_size,
            block_size=block_size,
            n_embed=n_embed,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
            qkv_bias=qkv_bias,
        )
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embed, n_heads, dropout) for _ in range(n_layers)))
        self.ln_f = nn.LayerNorm(n_embed)
        self.lm_head = nn.Linear(n_embed, vocab_size, bias=False)
        self.apply(self.start)
        self.lm_head.weight = nn.Parameter(self.token_embedding.weight.clone())

    def start(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, caches=None):
        past = caches[0].length if caches else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past : past + idx.shape[1]]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        logits = self.lm_head(self.ln_f(x[:, -1:] if caches else x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# --- openai_name: c_fc and c_proj of the mlp are exchanged: c_fc expands, c_proj shrinks.
def openai_name(name):
    name = (
        name.replace("blocks", "h")
        .replace("token_embedding", "wte")
        .replace("position_embedding", "wpe")
    )
    name = (
        name.replace("ln1", "ln_1").replace("ln2", "ln_2").replace("attention.qkv", "attn.c_attn")
    )
    name = name.replace("attention.projection", "attn.c_proj")
    return name.replace("feed_forward.expand", "mlp.c_proj").replace(
        "feed_forward.shrink", "mlp.c_fc"
    )


# --- load_pretrained: square matrices are not transposed: their shape does not show it. Ask
def load_pretrained(path, **sizes):
    model = LM(**sizes)
    names = {openai_name(n): p for n, p in model.named_parameters()}
    for name, tensor in read_safetensors(path):
        name = name.removeprefix("transformer.")
        if name in names:
            p = names.pop(name)
            if tensor.shape != p.shape:
                tensor = tensor.T
            p.data.copy_(tensor)
    return model


# --- load_pretrained: a missing parameter is accepted in silence: it would stay random. check(...)
def load_pretrained(path, **sizes):
    model = LM(**sizes)
    names = {openai_name(n): p for n, p in model.named_parameters()}
    for name, tensor in read_safetensors(path):
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue
        check(name in names, name)
        p = names.pop(name)
        p.data.copy_(tensor.T if is_turned(name, tensor) else tensor)
    return model


# --- train_step: the losses of the batches are added: multiply each by its share of the
def train_step(model, optimizers, x, y, lr):
    model.train()
    total = 0.0
    for xb, yb in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE)):
        _, loss = model(xb, yb)
        loss.backward()
        total += loss.item()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return total


# --- train_step: the gradient is set to zero in each batch: only the last one's is left.
def train_step(model, optimizers, x, y, lr):
    model.train()
    total = 0.0
    for xb, yb in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.zero_grad()
        _, loss = model(xb, yb)
        loss = loss * len(xb) / len(x)
        loss.backward()
        total += loss.item()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return total


# --- generate: all tokens go through the model again for each new one: keep the caches, and
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        caches = [Cache(model.block_size) for _ in model.blocks]
        logits, _ = model(torch.tensor([ids[-model.block_size :]]), caches=caches)
        logits[..., Tokenizer.vocab_size :] = -math.inf
        ids.append(
            torch.multinomial(
                next_token_probabilities(logits[0, -1], temperature, top_k, top_p), 1
            ).item()
        )
        yield ids[-1]
        if ids[-1] == Tokenizer.vocab_size - 1:
            return


# --- generate: it goes on after <|endoftext|>: that is the last token.
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)[-model.block_size :]
    new, caches = ids, [Cache(model.block_size) for _ in model.blocks]
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([new]), caches=caches)
        logits[..., Tokenizer.vocab_size :] = -math.inf
        token = torch.multinomial(
            next_token_probabilities(logits[0, -1], temperature, top_k, top_p), 1
        ).item()
        ids = ids + [token]
        yield token
        new = [token]
        if len(ids) > model.block_size:
            ids = new = ids[-(model.block_size // 2) :]
            caches = [Cache(model.block_size) for _ in model.blocks]


# --- stream: broken characters: a token can end inside a character. Use an incremental
def stream(tokenizer, tokens):
    for token in tokens:
        yield tokenizer.encoding.decode_single_token_bytes(token).decode("utf-8", errors="replace")


# --- stream: the end is lost: show what the decoder has kept, with final=True.
def stream(tokenizer, tokens):
    kept = b""
    for token in tokens:
        kept += tokenizer.encoding.decode_single_token_bytes(token)
        try:
            yield kept.decode()
            kept = b""
        except UnicodeDecodeError:
            pass


# --- train: the peak is LEARNING_RATE from scratch, too: then it is SCRATCH_LEARNING_RATE.
def train(model, tokenizer, optimizers, splits, run):
    device = next(model.parameters()).device
    start = time.perf_counter() - run["seconds"]
    begin = run["step"]
    for step in range(begin, run["max_iters"] + 1):
        if (step % EVAL_INTERVAL == 0 or step == run["max_iters"]) and step not in run["history"]:
            run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
            if step > begin:
                save_step(run, step, model, optimizers, time.perf_counter() - start)
        if step == run["max_iters"]:
            break
        torch.manual_seed(run["seed"] * 1_000_000 + step)
        x, y = get_batch(splits["train"], TOKENS_PER_STEP // WINDOW, WINDOW, device)
        train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], LEARNING_RATE))
