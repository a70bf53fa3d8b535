# ruff: noqa
"""Mistakes as students make them. A section is a piece, and words of the right message."""


# --- clean: capitals are kept: "Film" and "film" would be two words.
def clean(text, cleaning="spaced"):
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", " ", text)
    text = re.sub(r"(?<!\S)\S+@\S+\.\S+", " ", text)
    text = unicodedata.normalize("NFC", text)
    words = "".join(replacement(c) for c in text).split()
    return " ".join(w for w in words if not w.isnumeric())


# --- clean: words are glued together where something is removed: replace it by a space.
def clean(text, cleaning="spaced"):
    if cleaning == "reference":
        return clean_as_published(text)
    text = text.lower().replace("<br />", "")
    text = re.sub(r"http\S+|www\.\S+|(?<!\S)\S+@\S+\.\S+", "", text)
    text = unicodedata.normalize("NFC", text)
    words = "".join(replacement(c) for c in text).split()
    return " ".join(w for w in words if not w.isnumeric())


# --- clean: numbers are kept: leave out words of digits only.
def clean(text, cleaning="spaced"):
    if cleaning == "reference":
        return clean_as_published(text)
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", " ", text.lower())
    text = re.sub(r"(?<!\S)\S+@\S+\.\S+", " ", text)
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(replacement(c) for c in text).split())


# --- clean: letters with accents are lost: use replacement(c), which knows the letters of
def clean(text, cleaning="spaced"):
    if cleaning == "reference":
        return clean_as_published(text)
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", " ", text.lower())
    text = re.sub(r"(?<!\S)\S+@\S+\.\S+", " ", text)
    text = re.sub(r"[^a-z0-9\s]", " ", unicodedata.normalize("NFC", text))
    return " ".join(w for w in text.split() if not w.isnumeric())


# --- build_vocabulary: equally frequent words are not sorted by the alphabet.
def build_vocabulary(documents, min_freq):
    counts = Counter(word for text in documents for word in text.split())
    return ["<pad>", "<unk>", "<eos>"] + [w for w, n in counts.most_common() if n >= min_freq]


# --- build_vocabulary: min_freq is off by one: a word that comes min_freq times belongs to it.
def build_vocabulary(documents, min_freq):
    counts = Counter(word for text in documents for word in text.split())
    words = sorted(w for w in counts if counts[w] > min_freq)
    words.sort(key=lambda w: -counts[w])
    return ["<pad>", "<unk>", "<eos>", *words]


# --- build_vocabulary: the words are sorted by the alphabet: the most frequent first.
def build_vocabulary(documents, min_freq):
    counts = Counter(word for text in documents for word in text.split())
    return ["<pad>", "<unk>", "<eos>"] + sorted(w for w in counts if counts[w] >= min_freq)


# --- Tokenizer: encode only lower-cases the text: use clean(text, self.cleaning).
class Tokenizer:
    pad, unk, eos = 0, 1, 2

    def __init__(self, vocabulary, cleaning="spaced"):
        self.vocabulary, self.cleaning, self.vocab_size = vocabulary, cleaning, len(vocabulary)
        self.stoi = {w: i for i, w in enumerate(vocabulary)}

    def encode(self, text):
        return self.encode_clean(text.lower())

    def encode_clean(self, text):
        return [self.stoi.get(w, self.unk) for w in text.split()]

    def decode(self, ids):
        return " ".join(self.vocabulary[i] for i in ids)


# --- Tokenizer: unknown words are dropped: they become <unk>, 1, so that the model sees there
class Tokenizer:
    pad, unk, eos = 0, 1, 2

    def __init__(self, vocabulary, cleaning="spaced"):
        self.vocabulary, self.cleaning, self.vocab_size = vocabulary, cleaning, len(vocabulary)
        self.stoi = {w: i for i, w in enumerate(vocabulary)}

    def encode(self, text):
        return self.encode_clean(clean(text, self.cleaning))

    def encode_clean(self, text):
        ids = []
        for w in text.split():
            if w in self.stoi:
                ids.append(self.stoi[w])
        return ids

    def decode(self, ids):
        return " ".join(self.vocabulary[i] for i in ids)


# --- split_documents: not shuffled, or sorted: the archive is sorted, and its end is all praise.
def split_documents(documents, train_share, val_share):
    n = len(documents)
    a, b = round(n * train_share), round(n * (train_share + val_share))
    return {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}


# --- split_documents: another order each time: give the shuffle a seed of its own, so that a
import random


def split_documents(documents, train_share, val_share):
    documents = documents[:]
    random.shuffle(documents)
    n = len(documents)
    a, b = round(n * train_share), round(n * (train_share + val_share))
    return {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}


# --- split_documents: val_share is taken for the end of the validation part: it ends at train_share
def split_documents(documents, train_share, val_share):
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(7)).tolist()
    shuffled = [documents[i] for i in order]
    n = len(shuffled)
    a, b = round(n * train_share), round(n * val_share)
    return {"train": shuffled[:a], "val": shuffled[a:b], "test": shuffled[b:]}


# --- split_text: <eos> is missing: each document ends with it.
def split_text(documents, tokenizer):
    result = {}
    for name, texts in documents.items():
        ids = []
        for text in texts:
            ids += tokenizer.encode_clean(text)
        result[name] = torch.tensor(ids, dtype=torch.int32)
    return result


# --- split_text: the ids are int64: int32 takes half the memory.
def split_text(documents, tokenizer):
    result = {}
    for name, texts in documents.items():
        ids = []
        for text in texts:
            ids += tokenizer.encode_clean(text) + [tokenizer.eos]
        result[name] = torch.tensor(ids)
    return result


# --- cut_windows: padding is counted: where x has no word, the target is -100, not <pad>.
def cut_windows(tokens, starts, ends, block_size):
    places = starts + torch.arange(block_size + 1)
    w = tokens[places.clamp(max=len(tokens) - 1)].long()
    w[places >= ends.expand(places.shape)] = 0
    return w[:, :-1], w[:, 1:].clone()


# --- cut_windows: the target of <eos> is the next document's first word: it must be -100.
def cut_windows(tokens, starts, ends, block_size):
    places = starts + torch.arange(block_size + 1)
    w = tokens[places.clamp(max=len(tokens) - 1)].long().masked_fill(places >= ends, 0)
    x, y = w[:, :-1], w[:, 1:]
    return x, torch.where(y == 0, -100, y)


# --- cut_windows: places beyond the end of the tokens are an error: clamp them, or fill the
def cut_windows(tokens, starts, ends, block_size):
    places = starts + torch.arange(block_size + 1)
    w = tokens[places].long().masked_fill(places >= ends, 0)
    x, y = w[:, :-1], w[:, 1:]
    return x, y.masked_fill((y == 0) | (x == 2), -100)


# --- get_batch: the last places are left out: a window may start at any token from 0 to N - 2.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(0, len(tokens) - block_size, (batch_size, 1))
    x, y = cut_windows(tokens, starts, torch.full_like(starts, len(tokens)), block_size)
    return x.to(device), y.to(device)


# --- get_batch: the whole batch begins at one place: draw a start for each window.
def get_batch(tokens, batch_size, block_size, device):
    start = int(torch.randint(0, len(tokens) - 1, ()))
    starts = torch.full((batch_size, 1), start)
    x, y = cut_windows(tokens, starts, torch.full_like(starts, len(tokens)), block_size)
    return x.to(device), y.to(device)


# --- AdaptiveSoftmax.forward: P(group) is left out: ln P(word) = ln P(group) + ln P(word in its group).
class AdaptiveSoftmax(nn.Module):
    def forward(self, x):
        groups, frequent = self.first_choice(x)
        parts = [frequent]
        for i in range(len(self.cutoffs)):
            parts.append(F.log_softmax(self.logits(x, i + 1), dim=-1))
        return torch.cat(parts, dim=-1)


# --- AdaptiveSoftmax.forward: logits inside of the groups: each group needs a softmax of its own.
class AdaptiveSoftmax(nn.Module):
    def forward(self, x):
        groups, frequent = self.first_choice(x)
        parts = [frequent]
        for i in range(len(self.cutoffs)):
            parts.append(groups[..., i : i + 1] + self.logits(x, i + 1))
        return torch.cat(parts, dim=-1)


# --- AdaptiveSoftmax.losses: the mean is returned: return a loss for each target.
class AdaptiveSoftmax(nn.Module):
    def losses(self, x, targets):
        return F.cross_entropy(self(x), targets)


# --- AdaptiveSoftmax.hits: words of groups are never hits: a rare word can be the most likely one.
class AdaptiveSoftmax(nn.Module):
    def hits(self, x, targets, losses):
        _, frequent = self.first_choice(x)
        return frequent.argmax(-1) == targets


# --- AdaptiveSoftmax: the biases of groups start at 0: ln of the number of words, as a group is as
class AdaptiveSoftmax(nn.Module):
    def __init__(self, vocab_size, n_embed, cutoffs):
        super().__init__()
        self.cutoffs = [c for c in cutoffs if c < vocab_size]
        self.rows = [(self.cutoffs + [vocab_size])[0] + len(self.cutoffs)]
        self.rows += [b - a for a, b in pairwise(self.cutoffs + [vocab_size])]
        self.weight = nn.Parameter(torch.randn(sum(self.rows), n_embed))
        self.bias = nn.Parameter(torch.zeros(sum(self.rows)))

    def embed(self, idx):
        return self.weight[idx + len(self.cutoffs)]

    def forward(self, x):
        first, *rest = (x @ self.weight.T + self.bias).split(self.rows, -1)
        first = first.log_softmax(-1)
        n = len(self.cutoffs)
        return torch.cat(
            [first[..., n:]]
            + [first[..., i : i + 1] + r.log_softmax(-1) for i, r in enumerate(rest)],
            -1,
        )

    def losses(self, x, targets):
        return -self(x)[torch.arange(len(targets)), targets]

    def hits(self, x, targets, losses):
        return self(x).argmax(-1) == targets


# --- LM.forward: the positions are missing.
class LM(nn.Module):
    def hidden(self, idx):
        x = self.lm_head.embed(idx)
        return self.ln_f(self.blocks(self.dropout(x)))

    def forward(self, idx, targets=None):
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        real = targets != -100
        return None, self.lm_head.losses(x[real], targets[real]).mean()


# --- LM.forward: the loss is a sum: it is the mean over the targets.
class LM(nn.Module):
    def hidden(self, idx):
        x = self.lm_head.embed(idx) + self.position_embedding.weight[: idx.shape[1]]
        return self.ln_f(self.blocks(self.dropout(x)))

    def forward(self, idx, targets=None):
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        real = targets != -100
        return None, self.lm_head.losses(x[real], targets[real]).sum()


# --- estimate_loss: <unk> is counted in "known": leave out the targets that are <unk>.
@torch.no_grad()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    windows, begin = [], 0
    for end in ((tokens == 2).nonzero().flatten() + 1).tolist():
        windows += [(s, end) for s in range(begin, end - 1, model.block_size)]
        begin = end
    if eval_iters is not None:
        n = min(len(windows), eval_iters * batch_size)
        windows = [windows[i * len(windows) // n] for i in range(n)]
    all_losses, all_hits, all_targets = [], [], []
    for some in torch.tensor(windows).split(batch_size):
        x, y = cut_windows(tokens, some[:, :1], some[:, 1:], model.block_size)
        h, t = model.hidden(x)[y != -100], y[y != -100]
        losses = model.lm_head.losses(h, t)
        all_losses.append(losses)
        all_hits.append(model.lm_head.hits(h, t, losses))
        all_targets.append(t)
    losses = torch.cat(all_losses)
    loss = losses.mean().item()
    return {"loss": loss, "known": loss, "accuracy": torch.cat(all_hits).float().mean().item()}


# --- generate: <eos> is yielded: the text ends before it.
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        logits[..., [0, 1]] = -math.inf
        token = torch.multinomial(
            next_token_probabilities(logits[0, -1], temperature, top_k, top_p), 1
        ).item()
        ids.append(token)
        yield token
        if token == Tokenizer.eos:
            return


# --- generate: <pad> and <unk> are drawn: their logits must become -inf.
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    ids = list(ids)
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([ids[-model.block_size :]]))
        token = torch.multinomial(
            next_token_probabilities(logits[0, -1], temperature, top_k, top_p), 1
        ).item()
        if token == Tokenizer.eos:
            return
        ids.append(token)
        yield token


# --- beam_search: only one text is kept: keep the `beams` likeliest.
@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams):
    model.eval()
    new, total = [], 0.0
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([[*ids, *new][-model.block_size :]]))
        logits[..., [0, 1]] = -math.inf
        best = logits[0, -1].log_softmax(-1).max(-1)
        new.append(best.indices.item())
        total += best.values.item()
        if new[-1] == 2:
            break
    return new, total


# --- beam_search: the scores are not added: ln P of a text is the sum over its tokens.
@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beams):
    model.eval()
    kept = [(0.0, [])]
    for _ in range(max_new_tokens):
        candidates = []
        for score, new in kept:
            if new and new[-1] == 2:
                candidates.append((score, new))
                continue
            logits, _ = model(torch.tensor([[*ids, *new][-model.block_size :]]))
            logits[..., [0, 1]] = -math.inf
            ln_p = logits[0, -1].log_softmax(-1)
            for i in range(2, len(ln_p)):
                candidates.append((ln_p[i].item(), [*new, i]))
        kept = sorted(candidates, reverse=True)[:beams]
        if kept[0][1][-1] == 2:
            break
    return kept[0][1], kept[0][0]


# --- attention_weights: these are results, weights @ v: with the identity matrix as v, they are the
@torch.no_grad()
def attention_weights(model, ids):
    found = []
    model.eval()
    hooks = [
        b.attention.head.register_forward_hook(lambda m, i, o: found.append(o[0]))
        for b in model.blocks
    ]
    model.hidden(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found
