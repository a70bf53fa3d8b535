# ruff: noqa
"""Correct solutions of what word_gpt.py has anew, in styles of their own."""


# --- clean: character by character
def clean(text, cleaning="spaced"):
    if cleaning == "reference":
        return clean_as_published(text)
    text = text.lower()
    text = re.sub("<[^<>]*>", " ", text)
    words = []
    for word in text.split():
        word = re.sub(r"http\S+|www\.\S+", " ", word)
        if re.fullmatch(r"\S+@\S+\.\S+", word):
            continue
        words.append(word)
    text = unicodedata.normalize("NFC", " ".join(words))
    text = "".join(replacement(c) for c in text)
    return " ".join(word for word in text.split() if not word.isnumeric())


# --- build_vocabulary: a dict of counts
def build_vocabulary(documents, min_freq):
    counts = {}
    for document in documents:
        for word in document.split():
            counts[word] = counts.get(word, 0) + 1
    kept = sorted(word for word in counts if counts[word] >= min_freq)
    kept.sort(key=counts.get, reverse=True)
    return ["<pad>", "<unk>", "<eos>"] + kept


# --- Tokenizer: other attributes
class Tokenizer:
    pad, unk, eos = range(3)

    def __init__(self, vocabulary, cleaning="spaced"):
        self.vocabulary, self.cleaning = vocabulary, cleaning
        self.ids = {}
        for word in vocabulary:
            self.ids[word] = len(self.ids)
        self.vocab_size = len(self.ids)

    def encode(self, text):
        return self.encode_clean(clean(text, self.cleaning))

    def encode_clean(self, text):
        result = []
        for word in text.split():
            result.append(self.ids[word] if word in self.ids else Tokenizer.unk)
        return result

    def decode(self, ids):
        return " ".join([self.vocabulary[int(i)] for i in ids])


# --- split_documents: random.Random
import random


def split_documents(documents, train_share, val_share):
    shuffled = list(documents)
    random.Random(42).shuffle(shuffled)
    n = len(shuffled)
    a, b = round(n * train_share), round(n * (train_share + val_share))
    return {"train": shuffled[:a], "val": shuffled[a:b], "test": shuffled[b:]}


# --- split_text: tensors joined
def split_text(documents, tokenizer):
    def part(texts):
        rows = [
            torch.tensor(tokenizer.encode_clean(t) + [tokenizer.eos], dtype=torch.int32)
            for t in texts
        ]
        return torch.cat(rows)

    return {name: part(documents[name]) for name in documents}


# --- cut_windows: loops
def cut_windows(tokens, starts, ends, block_size):
    ends = ends.expand(starts.shape) if ends.dim() else ends.repeat(len(starts))
    B = len(starts)
    x = torch.zeros(B, block_size, dtype=torch.int64)
    y = torch.full((B, block_size), -100)
    for b, (start, end) in enumerate(zip(starts.flatten().tolist(), ends.flatten().tolist())):
        for t in range(block_size):
            if start + t < end:
                x[b, t] = int(tokens[start + t])
            if start + t + 1 < end and x[b, t] != Tokenizer.eos:
                y[b, t] = int(tokens[start + t + 1])
    return x, y


# --- get_batch: a list of starts
def get_batch(tokens, batch_size, block_size, device):
    starts = [random_place(len(tokens) - 1) for _ in range(batch_size)]
    ends = torch.full((batch_size, 1), len(tokens))
    x, y = cut_windows(tokens, torch.tensor(starts).unsqueeze(1), ends, block_size)
    return x.to(device), y.to(device)


def random_place(n):
    return int(torch.rand(()) * n)


# --- AdaptiveSoftmax: own methods
class AdaptiveSoftmax(nn.Module):
    def __init__(self, vocab_size, n_embed, cutoffs):
        super().__init__()
        self.edges = [0] + [c for c in cutoffs if c < vocab_size] + [vocab_size]
        self.n = len(self.edges) - 2
        self.weight = nn.Parameter(torch.randn(vocab_size + self.n, n_embed) * 0.02)
        bias = torch.zeros(vocab_size + self.n)
        for g in range(self.n):
            bias[g] = math.log(self.edges[g + 2] - self.edges[g + 1])
        self.bias = nn.Parameter(bias)

    def embed(self, idx):
        return self.weight[idx + self.n]

    def forward(self, x):
        z = x @ self.weight.T + self.bias
        head = self.n + self.edges[1]
        first = z[..., :head].log_softmax(-1)
        columns = [first[..., self.n :]]
        for g in range(self.n):
            tail = z[..., self.n + self.edges[g + 1] : self.n + self.edges[g + 2]]
            columns.append(first[..., g : g + 1] + tail.log_softmax(-1))
        return torch.cat(columns, -1)

    def losses(self, x, targets):
        return F.nll_loss(self(x), targets, reduction="none")

    def hits(self, x, targets, losses):
        return self(x).argmax(-1).eq(targets)


# --- LM: own names
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout, cutoffs=()):
        super().__init__()
        self.config = {
            "vocab_size": vocab_size, "block_size": block_size, "n_embed": n_embed,
            "n_heads": n_heads, "n_layers": n_layers, "dropout": dropout, "cutoffs": cutoffs,
        }  # fmt: skip
        self.block_size = block_size
        self.places = nn.Parameter(0.02 * torch.randn(block_size, n_embed))
        self.layers = nn.ModuleList(Block(n_embed, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(n_embed)
        self.drop = nn.Dropout(dropout)
        self.lm_head = AdaptiveSoftmax(vocab_size, n_embed, cutoffs)
        self.lm_head.weight.data.normal_(0.0, 0.02)

    def hidden(self, idx):
        x = self.drop(self.lm_head.embed(idx) + self.places[: idx.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, idx, targets=None):
        h = self.hidden(idx)
        if targets is None:
            return self.lm_head(h), None
        keep = targets.flatten() >= 0
        losses = self.lm_head.losses(h.flatten(0, 1)[keep], targets.flatten()[keep])
        return None, losses.sum() / keep.sum()


# --- estimate_loss: window by window
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    windows, begin = [], 0
    for end in [i + 1 for i, t in enumerate(tokens.tolist()) if t == Tokenizer.eos]:
        for start in range(begin, end - 1, model.block_size):
            windows.append((start, end))
        begin = end
    if eval_iters is not None and len(windows) > eval_iters * batch_size:
        n = eval_iters * batch_size
        windows = [windows[i * len(windows) // n] for i in range(n)]
    loss = known = right = 0.0
    n = n_known = 0
    for start, end in windows:
        x, y = cut_windows(tokens, torch.tensor([[start]]), torch.tensor([[end]]), model.block_size)
        h, t = model.hidden(x)[y >= 0], y[y >= 0]
        losses = model.lm_head.losses(h, t)
        loss += losses.sum().item()
        known += losses[t != Tokenizer.unk].sum().item()
        right += model.lm_head.hits(h, t, losses).sum().item()
        n, n_known = n + len(t), n_known + int((t != Tokenizer.unk).sum())
    return {"loss": loss / n, "known": known / n_known, "accuracy": right / n}


# --- generate: a mask
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    text = [*ids]
    while max_new_tokens > 0:
        max_new_tokens -= 1
        row = model(torch.tensor(text[-model.block_size :])[None])[0][0, -1].clone()
        row[:2] = -torch.inf
        token = int(torch.multinomial(next_token_probabilities(row, temperature, top_k, top_p), 1))
        if token == Tokenizer.eos:
            break
        text.append(token)
        yield token


# --- beam_search: all continuations
@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams):
    model.eval()
    texts = [([], 0.0)]
    for _ in range(max_new_tokens):
        if texts[0][0] and texts[0][0][-1] == Tokenizer.eos:
            break
        results = []
        for new, total in texts:
            if new and new[-1] == Tokenizer.eos:
                results.append((new, total))
            else:
                idx = torch.tensor([(list(ids) + new)[-model.block_size :]])
                row = model(idx)[0][0, -1].clone()
                row[[Tokenizer.pad, Tokenizer.unk]] = -math.inf
                ln_p = row.log_softmax(0)
                results += [(new + [i], total + ln_p[i].item()) for i in range(2, len(ln_p))]
        texts = sorted(results, key=lambda text: -text[1])[:beams]
    return texts[0]


# --- attention_weights: Head replaced for a moment
def attention_weights(model, ids):
    found = []

    class Watcher(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, q, k, v):
            found.append(self.head(q, k, torch.eye(q.shape[-2]))[0])
            return self.head(q, k, v)

    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.head = Watcher(block.attention.head)
        model.hidden(torch.tensor([ids]))
        for block in model.blocks:
            block.attention.head = block.attention.head.head
    return found
