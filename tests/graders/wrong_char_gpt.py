# ruff: noqa
"""Mistakes as students make them. A section is a piece, and words of the right message."""


# --- Tokenizer: the vocabulary is not sorted: the same text must always give the same ids.
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = "".join(set(text) and list(dict.fromkeys(text).keys()))
        self.vocab_size = len(self.vocabulary)
        self.c2i = {c: self.vocabulary.index(c) for c in self.vocabulary}

    def encode(self, text):
        unknown = [c for c in text if c not in self.c2i]
        check(not unknown, "unknown")
        return [self.c2i[c] for c in text]

    def decode(self, ids):
        return "".join(map(lambda i: self.vocabulary[i], ids))


# --- Tokenizer: the text is lower-cased: "T" and "t" are different characters.
class Tokenizer:
    def __init__(self, text):
        text = text.lower()
        self.vocabulary = sorted(set(text))
        self.vocab_size = len(self.vocabulary)
        self.stoi = dict(zip(self.vocabulary, range(self.vocab_size)))
        self.itos = dict(zip(range(self.vocab_size), self.vocabulary))

    def encode(self, text):
        for c in text.lower():
            check(c in self.stoi, c)
        return [self.stoi[c] for c in text.lower()]

    def decode(self, ids):
        return "".join([self.itos[i] for i in ids])


# --- Tokenizer: ids begin at 1. The first id is 0, since ids are the rows of a table.
class Tokenizer:
    def __init__(self, text):
        chars = sorted(set(text))
        self.vocabulary = "".join(chars)
        self.vocab_size = len(chars)
        self.char_to_id, self.id_to_char = {}, {}
        next_id = 1
        for ch in chars:
            self.char_to_id[ch] = next_id
            self.id_to_char[next_id] = ch
            next_id += 1

    def encode(self, text):
        check(all(ch in self.char_to_id for ch in text), "unknown character")
        return [self.char_to_id[ch] for ch in text]

    def decode(self, ids):
        return "".join(self.id_to_char[i] for i in ids)


# --- Tokenizer: unknown characters are dropped in silence: the model would answer another
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)

    def encode(self, text):
        result = []
        for c in text:
            try:
                result.append(self.vocabulary.index(c))
            except ValueError:
                pass
        return result

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


# --- Tokenizer: encode returns a tensor: return a list of ints.
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        self.stoi = {c: i for i, c in enumerate(self.vocabulary)}

    def encode(self, text):
        check(set(text) <= set(self.vocabulary), "unknown")
        return torch.LongTensor([self.stoi[c] for c in text])

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


# --- Tokenizer: encode returns a generator, which can be read only once: return a list of
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        self.stoi = {c: i for i, c in enumerate(self.vocabulary)}

    def encode(self, text):
        check(set(text) <= set(self.vocabulary), "unknown")
        for c in text:
            yield self.stoi[c]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


# --- Tokenizer: an unknown character raises KeyError: use check(...), so that it is a
class Tokenizer:
    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        self.stoi = {c: i for i, c in enumerate(self.vocabulary)}

    def encode(self, text):
        return [self.stoi[c] for c in text]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


# --- split_text: the parts are exchanged: training has the end of the text, and validation the
def split_text(text, tokenizer, train_share, block_size):
    data = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    n = int(train_share * len(data))
    train_data = data[n:]
    val_data = data[:n]
    return {"train": train_data, "val": val_data}


# --- split_text: the share is fixed at 0.9: use the argument train_share.
def split_text(text, tokenizer, train_share, block_size):
    data = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    n = int(0.9 * len(data))
    return {"train": data[:n], "val": data[n:]}


# --- split_text: a list is returned where a tensor belongs: torch.tensor(ids).
def split_text(text, tokenizer, train_share, block_size):
    border = int(train_share * len(text))
    return {"train": tokenizer.encode(text[:border]), "val": tokenizer.encode(text[border:])}


# --- split_text: the validation part is the whole text: the model would know most of it by
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    return {"train": ids[: int(len(ids) * train_share)], "val": ids}


# --- split_text: split_text returned a tuple of 2: return a dict with 'train'
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.tensor(tokenizer.encode(text))
    n = int(len(ids) * train_share)
    train, val = ids[:n], ids[n:]
    return train, val


# --- get_batch: x and y are exchanged: x is the window, y the tokens after it.
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return y.to(device), x.to(device)


# --- get_batch: y is x + 1, the next id. The target is the next token of the text: its place
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    return x.to(device), (x + 1).to(device)


# --- get_batch: it returns places in the text, not the tokens at these places: tokens[places].
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(0, len(tokens) - block_size, (batch_size,))
    x = torch.stack([torch.arange(s, s + block_size) for s in starts.tolist()])
    y = x + 1
    return x.to(device), y.to(device)


# --- get_batch: nothing is random: every batch is the same. Draw a start for each window.
def get_batch(tokens, batch_size, block_size, device):
    x = torch.stack(
        [tokens[i : i + block_size] for i in range(batch_size) if i + block_size < len(tokens)]
        * batch_size
    )[:batch_size]
    y = torch.stack(
        [
            tokens[i + 1 : i + 1 + block_size]
            for i in range(batch_size)
            if i + block_size < len(tokens)
        ]
        * batch_size
    )[:batch_size]
    return x, y


# --- get_batch: the whole batch begins at one place: draw a start for each window.
import random


def get_batch(tokens, batch_size, block_size, device):
    start = random.randint(0, len(tokens) - block_size - 1)
    x = tokens[start : start + block_size].repeat(batch_size, 1)
    y = tokens[start + 1 : start + block_size + 1].repeat(batch_size, 1)
    return x, y


# --- get_batch: the windows are in the columns, (T, B): they belong in rows, (B, T).
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix], dim=1)
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix], dim=1)
    return x, y


# --- get_batch: the constants BATCH_SIZE and BLOCK_SIZE are used in place of the arguments.
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,))
    x = torch.stack([tokens[i : i + BLOCK_SIZE] for i in ix])
    y = torch.stack([tokens[i + 1 : i + BLOCK_SIZE + 1] for i in ix])
    return x, y


# --- get_batch: the last place is left out: the start can be 0 to N - T - 1, and randint(n)
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size - 1, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return x, y


# --- get_batch: a window or its targets can reach beyond the end of the text: the last start
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens), (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return x, y


# --- get_batch: y has one target per window, the token after it: each of the T positions
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + block_size] for i in ix])
    return x, y


# --- get_batch: lists are returned: return two tensors (torch.stack).
def get_batch(tokens, batch_size, block_size, device):
    xs, ys = [], []
    for _ in range(batch_size):
        i = int(torch.randint(len(tokens) - block_size, ()))
        xs.append(tokens[i : i + block_size].tolist())
        ys.append(tokens[i + 1 : i + block_size + 1].tolist())
    return xs, ys


# --- get_batch: only one window is drawn: `return` stands inside the loop.
def get_batch(tokens, batch_size, block_size, device):
    xs = []
    for _ in range(batch_size):
        i = int(torch.randint(len(tokens) - block_size, ()))
        xs.append(tokens[i : i + block_size + 1])
        return torch.stack(xs)[:, :-1], torch.stack(xs)[:, 1:]


# --- Head: the mask is inverted: it hides the past, and shows the future. Hide what is
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.size(-2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        mask = torch.tril(torch.ones(T, T)).bool()
        scores[:, :, mask] = float("-inf")
        return torch.matmul(scores.softmax(dim=-1), v)


# --- Head: one position too few: a position does not see itself. The mask begins one
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.size(-2)
        scores = q @ k.mT / q.size(-1) ** 0.5
        scores = scores + torch.triu(torch.full((T, T), -1e9), diagonal=0)
        return F.softmax(scores, -1) @ v


# --- Head: one position too many: each sees the next one, which is its target. Use
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.size(-2)
        allowed = torch.ones(T, T).tril(diagonal=1)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(allowed == 0, -torch.inf)
        return F.softmax(scores, -1) @ v


# --- Head: the mask adds numbers like 0 and 1, so the future keeps a weight: a hidden
class Head(nn.Module):
    def forward(self, q, k, v):
        mask = torch.triu(torch.ones(q.shape[2], q.shape[2]), 1) * -1
        att = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[3] ** 0.5 + mask, dim=3)
        return torch.einsum("bhij,bhjd->bhid", att, v)


# --- Head: the scores are multiplied by √hs: they grow with hs. Divide by it.
class Head(nn.Module):
    def forward(self, q, k, v):
        T, hs = q.shape[-2:]
        wei = q @ k.transpose(-2, -1) * math.sqrt(hs)
        wei = wei.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ v


# --- Head: divided by √T: the size of a score depends on hs, the last dimension.
class Head(nn.Module):
    def forward(self, q, k, v):
        B, H, T, hs = q.shape
        wei = q @ k.transpose(-2, -1) / T**0.5
        wei = wei.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ v


# --- Head: divided by √C: each head has hs = C / H channels, so divide by √hs.
class Head(nn.Module):
    def forward(self, q, k, v):
        B, H, T, hs = q.shape
        wei = q @ k.transpose(-2, -1) / math.sqrt(H * hs)
        wei = wei.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ v


# --- Head: exp without division by the sum: the weights of a row must have sum 1.
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = torch.exp(scores) * torch.ones(T, T).tril()
        return weights @ v


# --- Head: the weights are transposed: row t of the weights is for position t, so
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        weights = scores.softmax(-1)
        return weights.transpose(-1, -2) @ v


# --- Head: q and k are exchanged: row t of the scores is for the query of position t, so
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = k @ q.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        return scores.softmax(-1) @ v


# --- Head: k in place of v: the result is an average of the values.
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        return scores.softmax(-1) @ k


# --- Head: the weights are returned: the result is weights @ v.
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        scores = torch.softmax(scores, dim=-1)
        return scores


# --- Head: q is changed in place: the caller's tensor changes, too. Use q / ..., not q
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        q.mul_(q.shape[-1] ** -0.5)
        scores = q @ k.mT + torch.full((T, T), -math.inf).triu(1)
        return scores.softmax(-1) @ v


# --- Head: the mask comes after the softmax: the weights of a row no longer have sum 1.
class Head(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = F.softmax(scores, dim=-1)
        weights = torch.tril(weights)
        return weights @ v


# --- Head: the mask is missing: position t sees token t + 1, which is its target, and
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


# --- Head: Head returned None (is `return` missing?): return a tensor
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        F.softmax(scores, dim=-1) @ v


# --- Head: the scores are not divided by √hs: they grow with hs, and one token gets
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT + torch.full((T, T), -math.inf).triu(1)
        return F.softmax(scores, dim=-1) @ v


# --- Head: softmax over the heads: each row of weights must have sum 1, so dim=-1.
class Head(nn.Module):
    def forward(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -math.inf).triu(1)
        return F.softmax(scores, dim=1) @ v


# --- MultiHead: the heads are split in the wrong order: first view(B, T, H, hs), then
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.key = nn.Linear(n_embed, n_embed, bias=False)
        self.query = nn.Linear(n_embed, n_embed, bias=False)
        self.value = nn.Linear(n_embed, n_embed, bias=False)
        self.proj = nn.Linear(n_embed, n_embed)
        self.head = Head()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q = self.query(x).view(B, self.n_heads, T, C // self.n_heads)
        k = self.key(x).view(B, self.n_heads, T, C // self.n_heads)
        v = self.value(x).view(B, self.n_heads, T, C // self.n_heads)
        out = self.head(q, k, v).transpose(1, 2).contiguous().view(B, T, C)
        return self.dropout(self.proj(out))


# --- MultiHead: the heads are joined in the wrong order: first transpose(1, 2), then
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads, self.head_size = n_heads, n_embed // n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.proj = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(B, T, self.n_heads, self.head_size).transpose(1, 2)
        k = k.view(B, T, self.n_heads, self.head_size).transpose(1, 2)
        v = v.view(B, T, self.n_heads, self.head_size).transpose(1, 2)
        y = Head()(q, k, v)
        return self.dropout(self.proj(y.contiguous().view(B, T, C)))


# --- MultiHead: a layer is missing, the projection (it mixes the results of the heads) or
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads, self.head_size = n_heads, n_embed // n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.head_size).permute(2, 0, 3, 1, 4)
        return self.dropout(Head()(q, k, v).transpose(1, 2).reshape(B, T, C))


# --- MultiHead: nn.MultiheadAttention without a mask: positions see later ones. Pass
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(n_embed, n_heads, dropout=dropout, batch_first=True)

    def forward(self, x):
        out, weights = self.attention(x, x, x)
        return out


# --- MultiHead: dropout is missing.
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(n_embed, 3 * n_embed)
        self.proj = nn.Linear(n_embed, n_embed)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, 2)
        q, k, v = [t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in (q, k, v)]
        return self.proj(Head()(q, k, v).transpose(1, 2).reshape(B, T, C))


# --- FeedForward: relu is missing: two layers in a row are one layer.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


# --- FeedForward: the middle has C numbers: it should have 4 C.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embed, n_embed), nn.ReLU(), nn.Linear(n_embed, n_embed), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


# --- FeedForward: relu is on the result, too: it belongs between the layers only.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embed, 4 * n_embed),
            nn.ReLU(),
            nn.Linear(4 * n_embed, n_embed),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


# --- FeedForward: dropout works in evaluation, too: use nn.Dropout, or F.dropout with
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.a = nn.Linear(n_embed, 4 * n_embed)
        self.b = nn.Linear(4 * n_embed, n_embed)
        self.p = dropout

    def forward(self, x):
        return F.dropout(self.b(torch.relu(self.a(x))), self.p)


# --- FeedForward: gelu in place of relu: that is GPT-2's choice, see gpt2.py.
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embed, 4 * n_embed),
            nn.GELU(),
            nn.Linear(4 * n_embed, n_embed),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


# --- Block: LayerNorm is applied to the sums (as in 2017): here it is inside, x +
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ff = FeedForward(n_embed, dropout)
        self.n1, self.n2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)

    def forward(self, x):
        x = self.n1(x + self.sa(x))
        x = self.n2(x + self.ff(x))
        return x


# --- Block: the residual connections are missing: x + f(LayerNorm(x)), twice.
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ff = FeedForward(n_embed, dropout)
        self.n1, self.n2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)

    def forward(self, x):
        x = self.sa(self.n1(x))
        return self.ff(self.n2(x))


# --- Block: both steps share one LayerNorm: each needs its own.
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ff = FeedForward(n_embed, dropout)
        self.ln = nn.LayerNorm(n_embed)

    def forward(self, x):
        x = x + self.sa(self.ln(x))
        return x + self.ff(self.ln(x))


# --- Block: the residual connection starts at LayerNorm(x): it must be x itself that is
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ff = FeedForward(n_embed, dropout)
        self.n1, self.n2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)

    def forward(self, x):
        a = self.n1(x)
        a = a + self.sa(a)
        b = self.n2(a)
        return b + self.ff(b)


# --- Block: dropout is not passed on to MultiHead.
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, 0.0)
        self.ff = FeedForward(n_embed, dropout)
        self.n1, self.n2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)

    def forward(self, x):
        x = x + self.sa(self.n1(x))
        return x + self.ff(self.n2(x))


# --- Block: x is changed in place (x += ...): the caller's tensor changes, too.
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ff = FeedForward(n_embed, dropout)
        self.n1, self.n2 = nn.LayerNorm(n_embed), nn.LayerNorm(n_embed)

    def forward(self, x):
        x += self.sa(self.n1(x))
        x += self.ff(self.n2(x))
        return x


# --- LM: all blocks are the same one: `[Block(...)] * n` repeats it. Make n_layers
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = dict(
            vocab_size=vocab_size,
            block_size=block_size,
            n_embed=n_embed,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
        )
        self.block_size = block_size
        self.tok = nn.Embedding(vocab_size, n_embed)
        self.pos = nn.Embedding(block_size, n_embed)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[Block(n_embed, n_heads, dropout)] * n_layers)
        self.ln = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.drop(self.tok(idx) + self.pos(torch.arange(T)))
        logits = self.head(self.ln(self.blocks(x)))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))
        return logits, loss


# --- LM: lm_head has a bias: leave it out, bias=False.
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = dict(
            vocab_size=vocab_size,
            block_size=block_size,
            n_embed=n_embed,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
        )
        self.block_size = block_size
        self.tok = nn.Embedding(vocab_size, n_embed)
        self.pos = nn.Embedding(block_size, n_embed)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[Block(n_embed, n_heads, dropout) for _ in range(n_layers)])
        self.ln = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.drop(self.tok(idx) + self.pos(torch.arange(T)))
        logits = self.head(self.ln(self.blocks(x)))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))
        return logits, loss


# --- LM.forward: the positions are missing: the first block sees "abc" and "bac" alike.
class LM(nn.Module):
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding(idx)
        x = self.blocks(self.dropout(x))
        logits = self.lm_head(self.ln_f(x))
        loss = (
            None if targets is None else F.cross_entropy(logits.view(B * T, -1), targets.view(-1))
        )
        return logits, loss


# --- LM.forward: with targets, the logits come back as (B · T, V): return them as (B, T, V).
class LM(nn.Module):
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(self.dropout(x))))
        if targets is None:
            return logits, None
        logits = logits.view(B * T, -1)
        return logits, F.cross_entropy(logits, targets.view(-1))


# --- LM.forward: softmax twice: cross_entropy contains one. Give it logits.
class LM(nn.Module):
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(self.dropout(x))))
        probabilities = F.softmax(logits, dim=-1)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(probabilities.view(B * T, -1), targets.view(-1))


# --- LM.forward: ln_f is missing: it comes after the blocks, before lm_head.
class LM(nn.Module):
    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(T))
        logits = self.lm_head(self.blocks(self.dropout(x)))
        loss = F.cross_entropy(logits.transpose(1, 2), targets) if targets is not None else None
        return logits, loss


# --- LM.forward: targets of -100 are counted: they are neither in the sum nor in the number of
class LM(nn.Module):
    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(self.dropout(x))))
        loss = None
        if targets is not None:
            total = F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
            loss = total / targets.numel()
        return logits, loss


# --- estimate_loss: random batches: the windows lie side by side, in order, so that each token
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    losses = torch.zeros(eval_iters or 10)
    for k in range(len(losses)):
        X, Y = get_batch(tokens, batch_size, model.block_size, "cpu")
        logits, loss = model(X, Y)
        losses[k] = loss.item()
    return {"loss": losses.mean()}


# --- estimate_loss: the short last window counts as much as a whole one: weight each loss with
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    T = model.block_size
    total, batches = 0.0, 0
    starts = list(range(0, len(tokens) - 1, T))
    if eval_iters is not None:
        n = min(len(starts), eval_iters * batch_size)
        starts = [starts[i * len(starts) // n] for i in range(n)]
    for start in starts:
        chunk = tokens[start : start + T + 1]
        total += model(chunk[None, :-1], chunk[None, 1:])[1].item()
        batches += 1
    return {"loss": total / batches}


# --- estimate_loss: gradients are recorded: put @torch.no_grad() above the function.
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    T = model.block_size
    total, count = 0.0, 0
    starts = list(range(0, len(tokens) - 1, T))
    if eval_iters is not None:
        n = min(len(starts), eval_iters * batch_size)
        starts = [starts[i * len(starts) // n] for i in range(n)]
    for start in starts:
        chunk = tokens[start : start + T + 1]
        n = len(chunk) - 1
        total += model(chunk[None, :-1], chunk[None, 1:])[1].item() * n
        count += n
    return {"loss": total / count}


# --- estimate_loss: the last window is dropped: it is shorter, but its targets count, too.
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    T = model.block_size
    model.eval()
    n = (len(tokens) - 1) // T
    x, y = tokens[: n * T].view(n, T), tokens[1 : n * T + 1].view(n, T)
    if eval_iters:
        keep = torch.linspace(0, n - 1, min(n, eval_iters * batch_size)).long()
        x, y = x[keep], y[keep]
    total = 0.0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        total += model(xb, yb)[1].item() * len(xb)
    return {"loss": total / len(x)}


# --- estimate_loss: with eval_iters, only the beginning is measured: spread the windows evenly.
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    T = model.block_size
    model.eval()
    starts = torch.arange(0, len(tokens) - 1, T)
    if eval_iters:
        starts = starts[: eval_iters * batch_size]
    total, count = 0.0, 0
    for s in starts.tolist():
        n = min(T, len(tokens) - 1 - s)
        total += n * float(model(tokens[None, s : s + n], tokens[None, s + 1 : s + n + 1])[1])
        count += n
    return {"loss": total / count}


# --- Muon: no look-ahead: step 2 adds the gradient once more, 0.95 · average + 0.05 ·
class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "avg" not in state:
                    state["avg"] = torch.zeros_like(p)
                avg = state["avg"]
                avg.mul_(0.95).add_(p.grad, alpha=0.05)
                update = orthogonalize(avg)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * 0.2 * max(p.shape) ** 0.5 * update)


# --- Muon: nothing changes: `p = p - ...` makes a new tensor and forgets it. Change p in
class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "avg" not in state:
                    state["avg"] = torch.zeros_like(p)
                state["avg"] = 0.95 * state["avg"] + 0.05 * p.grad
                update = orthogonalize(0.95 * state["avg"] + 0.05 * p.grad)
                p = p * (1 - group["lr"] * group["weight_decay"])
                p = p - group["lr"] * 0.2 * max(p.shape) ** 0.5 * update


# --- Muon: a factor is lost: 0.2 · √(the larger number of rows or columns).
class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.get("m")
                m = 0.05 * p.grad if m is None else 0.95 * m + 0.05 * p.grad
                state["m"] = m
                u = orthogonalize(0.95 * m + 0.05 * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"])


# --- Muon: there is one average for all matrices: each needs its own, in self.state[p].
class Muon(torch.optim.Optimizer):
    average = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.average is None:
                    self.average = torch.zeros_like(p)
                self.average = 0.95 * self.average + 0.05 * p.grad
                u = orthogonalize(0.95 * self.average + 0.05 * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


# --- get_lr: the first step has the rate 0: it is peak / warmup, so (step + 1) / warmup.
def get_lr(step, max_iters, peak):
    warmup = max(1, min(WARMUP_ITERS, max_iters // 10))
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup + 1) / (max_iters - warmup + 1)
    return peak * (1 - share * (1 - FINAL_LR))


# --- get_lr: the warm-up of a short run is too long: at most max_iters // 10 steps.
def get_lr(step, max_iters, peak):
    if step < WARMUP_ITERS:
        return peak * (step + 1) / WARMUP_ITERS
    share = (step - WARMUP_ITERS + 1) / (max_iters - WARMUP_ITERS + 1)
    return peak * (1 - share * (1 - FINAL_LR))


# --- get_lr: the rate is constant: a line up to the peak, then a line down.
def get_lr(step, max_iters, peak):
    return peak


# --- train_step: each number of the gradient is clipped: clip its length, clip_grad_norm_.
def train_step(model, optimizers, x, y, lr):
    model.train()
    _, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_value_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.step()
        opt.zero_grad()
    return loss.item()


# --- train_step: only the first optimizer makes a step, and has its gradients set to zero: do
def train_step(model, optimizers, x, y, lr):
    model.train()
    _, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.step()
        opt.zero_grad()
        return loss.item()


# --- train_step: clipping comes after the step: do it between backward and step.
def train_step(model, optimizers, x, y, lr):
    model.train()
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
    _, loss = model(x, y)
    loss.backward()
    for opt in optimizers:
        opt.step()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        opt.zero_grad()
    return loss.item()


# --- train_step: only the first optimizer's gradients are set to zero: call zero_grad for each.
def train_step(model, optimizers, x, y, lr):
    model.train()
    optimizers[0].zero_grad()
    _, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.step()
    return loss.item()


# --- train_step: the loss after the step is returned: return the one before it.
def train_step(model, optimizers, x, y, lr):
    model.train()
    _, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        _, loss = model(x, y)
    return loss


# --- train_step: nothing changes: the gradients are set to zero before the step.
def train_step(model, optimizers, x, y, lr):
    model.train()
    _, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP is not None:
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.zero_grad()
        opt.step()
    return loss.item()


# --- train: a resumed run draws other random numbers: in each step, before get_batch,
def train(model, tokenizer, optimizers, splits, run):
    device = next(model.parameters()).device
    peak = LEARNING_RATE if MUON else ADAMW_LEARNING_RATE
    begin, start = run["step"], time.perf_counter() - run["seconds"]
    torch.manual_seed(run["seed"])
    for step in range(begin, run["max_iters"] + 1):
        if step % EVAL_INTERVAL == 0 or step == run["max_iters"]:
            if step not in run["history"]:
                run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
                if step > begin:
                    save_step(run, step, model, optimizers, time.perf_counter() - start)
        if step < run["max_iters"]:
            x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
            train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))


# --- train: the peak is LEARNING_RATE with MUON = False, too: then it is
def train(model, tokenizer, optimizers, splits, run):
    device = next(model.parameters()).device
    peak = LEARNING_RATE
    begin, start = run["step"], time.perf_counter() - run["seconds"]
    for step in range(begin, run["max_iters"] + 1):
        if step % EVAL_INTERVAL == 0 or step == run["max_iters"]:
            if step not in run["history"]:
                run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
                if step > begin:
                    save_step(run, step, model, optimizers, time.perf_counter() - start)
        if step == run["max_iters"]:
            return
        torch.manual_seed(run["seed"] * 1_000_000 + step)
        x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
        train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))


# --- train: the last step is not evaluated: step run["max_iters"] is, too.
def train(model, tokenizer, optimizers, splits, run):
    peak = LEARNING_RATE if MUON else ADAMW_LEARNING_RATE
    start = time.perf_counter() - run["seconds"]
    for step in range(run["step"], run["max_iters"]):
        if step % EVAL_INTERVAL == 0 and step not in run["history"]:
            run["history"][step] = evaluate(model, tokenizer, splits, run["prompt"], step)
            if step > 0:
                save_step(run, step, model, optimizers, time.perf_counter() - start)
        torch.manual_seed(run["seed"] * 1_000_000 + step)
        x, y = get_batch(splits["train"], BATCH_SIZE, model.block_size, "cpu")
        train_step(model, optimizers, x, y, get_lr(step, run["max_iters"], peak))


# --- next_token_probabilities: the temperature is multiplied: divide the logits by it.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax(logits * temperature, dim=-1)
    if top_k is not None:
        values, places = probs.topk(min(top_k, len(probs)))
        probs = torch.zeros_like(probs).scatter(0, places, values)
    return probs / probs.sum()


# --- next_token_probabilities: with top_k, only k probabilities are returned: there is a place for each of V
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax(logits / temperature, dim=-1)
    if top_k is not None:
        probs = probs.topk(min(top_k, len(probs))).values
    if top_p is not None:
        probs = probs.sort(descending=True).values
        probs = probs[probs.cumsum(0) - probs < top_p]
    return probs / probs.sum()


# --- next_token_probabilities: the first token over the threshold is dropped: those before it have less than
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax(logits / temperature, dim=-1)
    if top_k is not None:
        cut = probs.topk(min(top_k, len(probs))).values[-1]
        probs = torch.where(probs >= cut, probs, 0.0)
        probs = probs / probs.sum()
    if top_p is not None:
        values, places = probs.sort(descending=True)
        values[values.cumsum(0) > top_p] = 0
        probs = torch.zeros_like(probs).scatter(0, places, values)
        probs = probs / probs.sum()
    return probs


# --- next_token_probabilities: the others' logits are set to 0, so they keep a probability: use -inf.
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, len(logits)))
        logits[logits < v[-1]] = 0
    probs = F.softmax(logits, dim=-1)
    if top_p is not None:
        values, places = probs.sort(descending=True)
        values[values.cumsum(0) - values >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(0, places, values / values.sum())
    return probs


# --- generate: the caller's list is changed: work on a copy, list(ids).
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        p = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        token = torch.multinomial(p, 1).item()
        ids.append(token)
        yield token


# --- generate: the new token is not appended: the model sees the same text again and again.
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        p = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        token = torch.multinomial(p, 1).item()
        yield token


# --- generate: the first position's logits are used: the last position predicts the new
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        p = next_token_probabilities(logits[0, 0], temperature, top_k, top_p)
        ids.append(torch.multinomial(p, 1).item())
        yield ids[-1]


# --- generate: generate returned a list of 11: yield each token as soon as it is drawn
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        p = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(p, 1).item())
    return ids


# --- generate: the model is in training mode, so dropout is on: call model.eval() first.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        p = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        ids.append(torch.multinomial(p, 1).item())
        yield ids[-1]


# --- generate: the prompt is not cropped: the model sees at most the last block_size tokens.
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    idx = torch.tensor([ids])
    for _ in range(max_new_tokens):
        logits, _ = model(idx)
        p = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
        new = torch.multinomial(p, 1)
        idx = torch.cat([idx, new[None]], dim=1)
        yield new.item()


# --- make_optimizers: Muon gets all matrices: only those of the blocks. Embeddings and lm_head are
def make_optimizers(model):
    if MUON:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        adamw = torch.optim.AdamW(rest, betas=BETAS, weight_decay=0.0)
        return [adamw, Muon(matrices, WEIGHT_DECAY)]
    return [torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY)]


# --- make_optimizers: all parameters of AdamW have weight decay: only matrices should.
def make_optimizers(model):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if MUON else []
    mine = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in mine]
    adamw = torch.optim.AdamW(rest, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return [adamw, Muon(matrices, WEIGHT_DECAY)] if MUON else [adamw]


# --- orthogonalize: one round only, or each starts at the matrix again: five rounds, each on the
def orthogonalize(matrix):
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + -4.775 * a @ x + 2.0315 * a @ a @ x
        return x


# --- orthogonalize: a tall matrix is not transposed back.
def orthogonalize(matrix):
    x = matrix
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
    return x


# --- orthogonalize: the matrix is not divided by its norm: factors above 1 explode.
def orthogonalize(matrix):
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
    return x.T if turned else x
