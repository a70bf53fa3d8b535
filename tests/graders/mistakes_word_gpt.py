# ruff: noqa
"""Known mistakes of what word_gpt.py has anew. See mistakes_char_gpt.py and tests/GRADING.md."""


def clean_with(
    lower=str.lower,
    markup=r"<[^<>]*>",
    links=r"http\S+|www\.\S+",
    addresses=r"(?<!\S)\S+@\S+\.\S+",
    gap=" ",
    form="NFC",
    each=lambda c: replacement(c),
    keep=lambda word: not word.isnumeric(),
    join=" ",
):
    """Return a function clean, in which one of these is wrong."""

    def clean(text, cleaning="spaced"):
        if cleaning == "reference":
            return clean_as_published(text)
        text = lower(text)
        for pattern in (markup, links, addresses):
            if pattern:
                text = re.sub(pattern, gap, text)
        text = unicodedata.normalize(form, text) if form else text
        text = "".join(map(each, text))
        return join.join(word for word in text.split() if keep(word))

    return clean


def vocabulary_with(
    special=("<pad>", "<unk>", "<eos>"),
    enough=lambda n, min_freq: n >= min_freq,
    key=lambda counts: lambda word: (-counts[word], word),
    count=lambda documents: Counter(" ".join(documents).split()),
):
    """Return a function build_vocabulary, in which one of these is wrong."""

    def build_vocabulary(documents, min_freq):
        counts = count(documents)
        words = [word for word in counts if enough(counts[word], min_freq)]
        return [*special, *sorted(words, key=key(counts))]

    return build_vocabulary


def words_with(
    encode=lambda self, text: self.encode_clean(clean(text, self.cleaning)),
    encode_clean=lambda self, text: [self.stoi.get(word, 1) for word in text.split()],
    decode=lambda self, ids: " ".join(self.vocabulary[i] for i in ids),
    size=len,
):
    """Return a class Tokenizer, in which one of these is wrong."""

    class Words:
        pad, unk, eos = 0, 1, 2

        def __init__(self, vocabulary, cleaning="spaced"):
            self.vocabulary, self.cleaning = vocabulary, cleaning
            self.vocab_size = size(vocabulary)
            self.stoi = {word: i for i, word in enumerate(vocabulary)}

    Words.encode, Words.encode_clean, Words.decode = (
        encode,
        encode_clean,
        decode,
    )
    return Words


def documents_with(
    shuffle=lambda d: [
        d[i] for i in torch.randperm(len(d), generator=torch.Generator().manual_seed(1))
    ],
    first=lambda n, a, b: round(a * n),
    second=lambda n, a, b: round((a + b) * n),
    parts=lambda d, i, j: (d[:i], d[i:j], d[j:]),
):
    """Return a function split_documents, in which one of these is wrong."""

    def split_documents(documents, train_share, val_share):
        n = len(documents)
        documents = shuffle(documents)
        i, j = (
            first(n, train_share, val_share),
            second(n, train_share, val_share),
        )
        return dict(zip(("train", "val", "test"), parts(documents, i, j)))

    return split_documents


def windows_with(
    y=lambda windows: windows[:, 1:],
    x=lambda windows: windows[:, :-1],
    hide_end=True,
    after_eos=-100,
    pad=0,
    padded_target=-100,
    T=lambda T: T,
):
    """Return a function cut_windows, in which one of these is wrong."""

    def cut_windows(tokens, starts, ends, block_size):
        places = starts + torch.arange(T(block_size) + 1)
        windows = tokens[places.clamp(max=len(tokens) - 1)].long()
        beyond = places >= ends
        if hide_end:
            windows = windows.masked_fill(beyond, pad)
        ids, targets = x(windows), y(windows)
        if after_eos is not None:
            targets = targets.masked_fill(ids == 2, after_eos)
        return ids, targets.masked_fill(beyond[:, 1:] & hide_end, padded_target)

    return cut_windows


def softmax_with(
    group=lambda ln_p, i: ln_p,
    inside=lambda logits: logits.log_softmax(-1),
    first=lambda logits: logits.log_softmax(-1),
    which=lambda i, n: i,
    offset=lambda n: n,
    last=lambda ln_p: ln_p,
    bias=lambda sizes: torch.tensor(sizes).log(),
    start=lambda cutoff: cutoff,
    best=lambda self, x: self(x).argmax(-1),
):
    """Return a class AdaptiveSoftmax, in which one of these is wrong."""

    class AdaptiveSoftmax(nn.Module):
        def __init__(self, vocab_size, n_embed, cutoffs):
            super().__init__()
            self.cutoffs = [cutoff for cutoff in cutoffs if cutoff < vocab_size]
            edges = [0, *self.cutoffs, vocab_size]
            sizes = [b - a for a, b in zip(edges, edges[1:])]
            self.rows = [sizes[0] + len(sizes) - 1, *sizes[1:]]
            self.weight = nn.Parameter(torch.zeros(sum(self.rows), n_embed))
            self.bias = nn.Parameter(torch.zeros(sum(self.rows)))
            self.bias.data[: len(sizes) - 1] = bias(sizes[1:])

        def embed(self, idx):
            return self.weight[idx + offset(len(self.cutoffs))]

        def forward(self, x):
            z, *others = (x @ self.weight.T + self.bias).split(self.rows, dim=-1)
            z, n = first(z), len(self.cutoffs)
            parts = [z[..., n:]]
            for i, other in enumerate(others):
                parts.append(group(z[..., [which(i, n)]], i) + inside(other))
            return last(torch.cat(parts, dim=-1))

        def losses(self, x, targets):
            return -self(x).gather(-1, targets[..., None])[..., 0]

        def hits(self, x, targets, losses):
            return best(self, x) == targets

    return AdaptiveSoftmax


def losses_with(loss):
    """Return a class AdaptiveSoftmax with other losses."""

    class AdaptiveSoftmax(softmax_with()):
        def losses(self, x, targets):
            return loss(self, x, targets)

    return AdaptiveSoftmax


def groups_of(layer, targets):
    return torch.bucketize(targets, torch.tensor(layer.cutoffs), right=True)


def word_lm_with(
    token=lambda self, idx: self.lm_head.embed(idx),
    position=lambda self, T: self.position_embedding.weight[:T],
    drop=lambda self, x: self.dropout(x),
    run=lambda self, x: self.blocks(x),
    norm=lambda self, x: self.ln_f(x),
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, dropout) for _ in range(n))),
    start=lambda p: nn.init.normal_(p, std=0.02),
    start_positions=lambda p: nn.init.normal_(p, std=0.02),
    groups=lambda cutoffs: cutoffs,
    config=lambda c: c,
    result=lambda self, x, y: (
        None,
        self.lm_head.losses(x[y != -100], y[y != -100]).mean(),
    ),
    logits=lambda self, x: self.lm_head(x),
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
            cutoffs=(),
        ):
            super().__init__()
            sizes = (
                vocab_size,
                block_size,
                n_embed,
                n_heads,
                n_layers,
                dropout,
                cutoffs,
            )
            names = "vocab_size block_size n_embed n_heads n_layers dropout cutoffs".split()
            self.config = config(dict(zip(names, sizes)))
            self.block_size = block_size
            self.position_embedding = nn.Embedding(block_size, n_embed)
            self.dropout = nn.Dropout(dropout)
            self.blocks = blocks(n_embed, n_heads, n_layers, dropout)
            self.ln_f = nn.LayerNorm(n_embed)
            self.lm_head = AdaptiveSoftmax(vocab_size, n_embed, groups(cutoffs))
            start(self.lm_head.weight)
            start_positions(self.position_embedding.weight)

        def hidden(self, idx):
            x = token(self, idx)
            if position:
                x = x + position(self, idx.shape[1])
            return norm(self, run(self, drop(self, x)))

        def forward(self, idx, targets=None):
            x = self.hidden(idx)
            return (logits(self, x), None) if targets is None else result(self, x, targets)

    return LM


def word_loss_with(
    prepare=lambda model: model.eval(),
    gradients=False,
    documents=lambda ends: list(pairwise([0, *ends])),
    starts=lambda begin, end, T: range(begin, end - 1, T),
    choose=lambda w, k, B: (
        w if k is None or len(w) <= k * B else [w[i * len(w) // (k * B)] for i in range(k * B)]
    ),
    mean=lambda parts: torch.cat(parts).mean().item(),
    known=lambda losses, targets: losses[targets != 1],
    hits=lambda hits, targets: hits.float(),
    size=lambda B: B,
):
    """Return a function estimate_loss, in which one of these is wrong."""

    def estimate_loss(model, tokens, batch_size, eval_iters=None):
        prepare(model)
        T = model.block_size
        ends = [i + 1 for i, token in enumerate(tokens.tolist()) if token == 2]
        windows = [(s, end) for begin, end in documents(ends) for s in starts(begin, end, T)]
        chosen = torch.tensor(choose(windows, eval_iters, batch_size))
        losses, knowns, found = [], [], []
        with torch.set_grad_enabled(gradients):
            for some in chosen.split(size(batch_size)):
                x, y = cut_windows(tokens, some[:, :1], some[:, 1:], T)
                hidden, targets = model.hidden(x)[y != -100], y[y != -100]
                losses.append(model.lm_head.losses(hidden, targets))
                knowns.append(known(losses[-1], targets))
                found.append(
                    hits(
                        model.lm_head.hits(hidden, targets, losses[-1]),
                        targets,
                    )
                )
        return {
            "loss": mean(losses),
            "known": mean(knowns),
            "accuracy": mean(found),
        }

    return estimate_loss


def beams_with(
    keep=lambda beams: beams,
    score=lambda old, ln_p: old + ln_p,
    words=lambda logits: logits.index_fill(0, torch.tensor([0, 1]), -math.inf),
    ln=lambda logits: logits.log_softmax(-1),
    ended=lambda new: new and new[-1] == 2,
    stop=True,
    order=lambda texts: sorted(texts, reverse=True),
    prepare=lambda model: model.eval(),
    crop=lambda ids, T: ids[-T:],
    result=lambda kept, ids: (kept[0][1], kept[0][0]),
    drop_ended=False,
):
    """Return a function beam_search, in which one of these is wrong."""

    @torch.no_grad()
    def beam_search(model, ids, max_new_tokens, beams):
        prepare(model)
        kept = [(0.0, [])]
        for _ in range(max_new_tokens):
            texts = []
            for old, new in kept:
                if ended(new):
                    if not drop_ended:
                        texts.append((old, new))
                    continue
                window = crop([*ids, *new], model.block_size)
                ln_p = ln(words(model(torch.tensor([window]))[0][0, -1]))
                for token, value in enumerate(ln_p.tolist()):
                    if value > -math.inf:
                        texts.append((score(old, value), [*new, token]))
            kept = order(texts)[: keep(beams)] or kept
            if stop and ended(kept[0][1]):
                break
        return result(kept, ids)

    return beam_search


def weights_with(
    value=lambda q, k, v: torch.eye(q.shape[2]),
    prepare=lambda m: m.eval(),
    after=True,
    part=lambda w: w[0],
):
    """Return a function attention_weights, in which one of these is wrong."""

    @torch.no_grad()
    def attention_weights(model, ids):
        found = []

        def look(head, inputs, output):
            q, k, v = inputs
            found.append(part(head.forward(q, k, value(q, k, v))))

        prepare(model)
        hooks = [block.attention.head.register_forward_hook(look) for block in model.blocks]
        model.hidden(torch.tensor([ids]))
        for hook in hooks:
            if after:
                hook.remove()
        return found

    return attention_weights


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


# --- clean: capitals are kept: "Film" and "film" would be two words.
clean = clean_with(lower=str)


# --- clean: markup is kept: <br /> would become the word br.
clean = clean_with(markup=None)


# --- clean: links are kept.
clean = clean_with(links=None)


# --- clean: addresses with @ are kept.
clean = clean_with(addresses=None)


# --- clean: each word with @ is removed: only addresses, with a dot behind it.
clean = clean_with(addresses=r"\S*@\S*")


# --- clean: words are glued together where something is removed: replace it by a space.
clean = clean_with(gap="")


# --- clean: apostrophes split words, "don t": replacement(c) removes them, dont.
clean = clean_with(each=lambda c: replacement(c) or " ")


# --- clean: marks are removed without a space, so words are glued together: use replacement(c).
clean = clean_with(
    each=lambda c: "" if replacement(c) == " " and not c.isspace() else replacement(c)
)


# --- clean: marks like , and ! are kept: use replacement(c) for each character.
clean = clean_with(each=lambda c: c)


# --- clean: letters with accents are lost: use replacement(c), which knows the letters of all languages.
clean = clean_with(each=lambda c: c if c.isascii() and c.isalnum() else " ")


# --- clean: the text is not normalized by NFC: é can be one character, or e and a mark; NFC makes it one.
clean = clean_with(form=None)


# --- clean: the text is not normalized by NFC: é can be one character, or e and a mark; NFC makes it one.
clean = clean_with(form="NFD")


# --- clean: numbers are kept: leave out words of digits only.
clean = clean_with(keep=lambda word: True)


# --- clean: words that contain a digit are left out, such as 80s: only those of digits alone.
clean = clean_with(keep=lambda word: not any(c.isdigit() for c in word))


# --- clean: all digits are removed, so that 80s becomes s: leave out words of digits alone.
clean = clean_with(each=lambda c: " " if c.isdigit() else replacement(c))


# --- clean: a list of words is returned: join them with one space.
def clean(text, cleaning="spaced"):
    return clean_with()(text).split()


# --- clean: several spaces remain: split, and join with one space.
def clean(text, cleaning="spaced"):
    text = re.sub(r"<[^<>]*>|http\S+|www\.\S+", " ", text.lower())
    return "".join(map(replacement, text))


# --- clean: the argument cleaning is ignored: "reference" calls clean_as_published.
def clean(text, cleaning="spaced"):
    return clean_with()(text)


# --- build_vocabulary: the special tokens are missing: <pad>, <unk> and <eos> have the ids 0, 1 and 2.
build_vocabulary = vocabulary_with(special=())


# --- build_vocabulary: the special tokens are in another order: <pad>, <unk>, <eos>.
build_vocabulary = vocabulary_with(special=("<unk>", "<pad>", "<eos>"))


# --- build_vocabulary: min_freq is off by one: a word that comes min_freq times belongs to it.
build_vocabulary = vocabulary_with(enough=lambda n, min_freq: n > min_freq)


# --- build_vocabulary: min_freq is off by one: a word that comes min_freq - 1 times is rare.
build_vocabulary = vocabulary_with(enough=lambda n, min_freq: n >= min_freq - 1)


# --- build_vocabulary: min_freq is ignored: rare words do not belong to it.
build_vocabulary = vocabulary_with(enough=lambda n, min_freq: True)


# --- build_vocabulary: the constant MIN_FREQ is used in place of the argument min_freq.
build_vocabulary = vocabulary_with(enough=lambda n, min_freq: n >= MIN_FREQ)


# --- build_vocabulary: the words are sorted by the alphabet: the most frequent first.
build_vocabulary = vocabulary_with(key=lambda counts: lambda word: word)


# --- build_vocabulary: the rarest words come first: the most frequent first.
build_vocabulary = vocabulary_with(key=lambda counts: lambda word: (counts[word], word))


# --- build_vocabulary: equally frequent words are not sorted by the alphabet.
build_vocabulary = vocabulary_with(key=lambda counts: lambda word: -counts[word])


# --- build_vocabulary: equally frequent words are sorted backwards.
def build_vocabulary(documents, min_freq):
    counts = Counter(" ".join(documents).split())
    words = sorted(
        ((n, word) for word, n in counts.items() if n >= min_freq),
        reverse=True,
    )
    return ["<pad>", "<unk>", "<eos>", *(word for _, word in words)]


# --- build_vocabulary: documents are counted, not words: a word can come several times in one.
build_vocabulary = vocabulary_with(
    count=lambda documents: Counter(w for d in documents for w in set(d.split()))
)


# --- build_vocabulary: characters are counted: split the documents into words.
build_vocabulary = vocabulary_with(count=lambda documents: Counter("".join(documents)))


# --- Tokenizer: unknown words are dropped: they become <unk>, 1, so that the model sees there was one.
Tokenizer = words_with(
    encode_clean=lambda self, text: [self.stoi[w] for w in text.split() if w in self.stoi]
)


# --- Tokenizer: an unknown word is an error: it becomes <unk>, 1.
Tokenizer = words_with(encode_clean=lambda self, text: [self.stoi[w] for w in text.split()])


# --- Tokenizer: unknown words become <pad>: they become <unk>, 1.
Tokenizer = words_with(encode_clean=lambda self, text: [self.stoi.get(w, 0) for w in text.split()])


# --- Tokenizer: encode does not clean the text: use clean(text, self.cleaning).
Tokenizer = words_with(encode=lambda self, text: self.encode_clean(text))


# --- Tokenizer: encode only lower-cases the text: use clean(text, self.cleaning).
Tokenizer = words_with(encode=lambda self, text: self.encode_clean(text.lower()))


# --- Tokenizer: the argument cleaning is ignored: clean(text, self.cleaning).
Tokenizer = words_with(encode=lambda self, text: self.encode_clean(clean(text)))


# --- Tokenizer: encode_clean cleans the text once more: that takes time, it is clean already.
Tokenizer = words_with(
    encode_clean=lambda self, text: [self.stoi.get(w, 1) for w in clean(text).split()]
)


# --- Tokenizer: encode works character by character: split the text into words.
Tokenizer = words_with(encode_clean=lambda self, text: [self.stoi.get(c, 1) for c in text])


# --- Tokenizer: encode adds <eos>: split_text does that.
Tokenizer = words_with(
    encode=lambda self, text: [
        *self.encode_clean(clean(text, self.cleaning)),
        2,
    ]
)


# --- Tokenizer: decode joins the words without spaces.
Tokenizer = words_with(decode=lambda self, ids: "".join(self.vocabulary[i] for i in ids))


# --- Tokenizer: decode leaves out <eos>, <pad> and <unk>: it returns all tokens.
Tokenizer = words_with(decode=lambda self, ids: " ".join(self.vocabulary[i] for i in ids if i > 2))


# --- Tokenizer: decode returns a list: join the words with spaces.
Tokenizer = words_with(decode=lambda self, ids: [self.vocabulary[i] for i in ids])


# --- Tokenizer: a tensor is returned: return a list of ints.
Tokenizer = words_with(
    encode_clean=lambda self, text: torch.tensor([self.stoi.get(w, 1) for w in text.split()])
)


# --- split_documents: not shuffled, or sorted: the archive is sorted, and its end is all praise.
split_documents = documents_with(shuffle=list)


# --- split_documents: not shuffled, or sorted: the archive is sorted, and its end is all praise.
split_documents = documents_with(shuffle=sorted)


# --- split_documents: another order each time: give the shuffle a seed of its own, so that a resumed run has the
# same parts.
split_documents = documents_with(shuffle=lambda d: [d[i] for i in torch.randperm(len(d))])


# --- split_documents: another order each time: give the shuffle a seed of its own, so that a resumed run has the
# same parts.
import random

split_documents = documents_with(shuffle=lambda d: random.sample(d, len(d)))


# --- split_documents: val_share is taken for the end of the validation part: it ends at train_share + val_share.
split_documents = documents_with(second=lambda n, a, b: round(b * n))


# --- split_documents: validation has all the rest: the test needs its own part.
split_documents = documents_with(parts=lambda d, i, j: (d[:i], d[i:], d[j:]))


# --- split_documents: training contains the validation documents.
split_documents = documents_with(parts=lambda d, i, j: (d[:j], d[i:j], d[j:]))


# --- split_documents: validation and test are exchanged.
split_documents = documents_with(parts=lambda d, i, j: (d[:i], d[j:], d[i:j]))


# --- split_documents: a document is lost between two parts.
split_documents = documents_with(parts=lambda d, i, j: (d[:i], d[i + 1 : j], d[j:]))


# --- split_documents: the constants TRAIN_SHARE and VAL_SHARE are used in place of the arguments.
split_documents = documents_with(
    first=lambda n, a, b: round(TRAIN_SHARE * n),
    second=lambda n, a, b: round((TRAIN_SHARE + VAL_SHARE) * n),
)


# --- split_text: <eos> is missing: each document ends with it.
def split_text(documents, tokenizer):
    return {
        name: torch.tensor(tokenizer.encode_clean(" ".join(texts)), dtype=torch.int32)
        for name, texts in documents.items()
    }


# --- split_text: <eos> comes only once, at the end: each document ends with it.
def split_text(documents, tokenizer):
    return {
        name: torch.tensor([*tokenizer.encode_clean(" ".join(texts)), 2], dtype=torch.int32)
        for name, texts in documents.items()
    }


# --- split_text: <eos> is at the beginning of each document: it belongs at its end.
def split_text(documents, tokenizer):
    return {
        name: torch.tensor(
            [i for t in texts for i in [2, *tokenizer.encode_clean(t)]],
            dtype=torch.int32,
        )
        for name, texts in documents.items()
    }


# --- split_text: <pad> ends the documents: it should be <eos>.
def split_text(documents, tokenizer):
    return {
        name: torch.tensor(
            [i for t in texts for i in [*tokenizer.encode_clean(t), 0]],
            dtype=torch.int32,
        )
        for name, texts in documents.items()
    }


# --- split_text: the ids are int64: int32 takes half the memory.
def split_text(documents, tokenizer):
    return {
        name: torch.tensor([i for t in texts for i in [*tokenizer.encode_clean(t), 2]])
        for name, texts in documents.items()
    }


# --- split_text: a list is returned where a tensor belongs.
def split_text(documents, tokenizer):
    return {
        name: [i for t in texts for i in [*tokenizer.encode_clean(t), 2]]
        for name, texts in documents.items()
    }


# --- cut_windows: padding is counted: where x has no word, the target is -100, not <pad>.
cut_windows = windows_with(padded_target=0)


# --- cut_windows: the target of <eos> is the next document's first word: it must be -100.
cut_windows = windows_with(after_eos=None)


# --- cut_windows: a window runs on beyond its end: from `ends` on, x has <pad>, and y -100.
cut_windows = windows_with(hide_end=False)


# --- cut_windows: the targets are not shifted: y is one token further.
cut_windows = windows_with(y=lambda windows: windows[:, :-1])


# --- cut_windows: the targets are shifted twice: y is one token further.
cut_windows = windows_with(y=lambda windows: F.pad(windows[:, 2:], (0, 1), value=-100))


# --- cut_windows: x is filled with -100: with <pad>, 0.
cut_windows = windows_with(pad=-100)


# --- cut_windows: x is filled with <eos>: with <pad>, 0.
cut_windows = windows_with(pad=2)


# --- cut_windows: the constant BLOCK_SIZE is used in place of the argument block_size.
cut_windows = windows_with(T=lambda T: BLOCK_SIZE)


# --- cut_windows: <eos> is never a target: it is, of the last word. Only the target behind it is -100.
def cut_windows(tokens, starts, ends, block_size):
    x, y = windows_with()(tokens, starts, ends, block_size)
    return x, y.masked_fill(y == 2, -100)


# --- cut_windows: x and y are exchanged.
def cut_windows(tokens, starts, ends, block_size):
    return windows_with()(tokens, starts, ends, block_size)[::-1]


# --- cut_windows: places beyond the end of the tokens are an error: clamp them, or fill the window.
def cut_windows(tokens, starts, ends, block_size):
    windows_with()(tokens, starts, ends, block_size)
    windows = tokens[starts + torch.arange(block_size + 1)]
    return windows_with()(tokens, starts, ends, block_size)


# --- get_batch: the last places are left out: a window may start at any token from 0 to N - 2.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: windows begin only at the beginning of documents: draw any place from 0 to N - 2.
def get_batch(tokens, batch_size, block_size, device):
    begins = torch.cat([torch.tensor([0]), (tokens == 2).nonzero().flatten() + 1])[:-1]
    starts = begins[torch.randint(len(begins), (batch_size, 1))]
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: a window can begin at the last token, which has no next one: draw from 0 to N - 2.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens), (batch_size, 1))
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: the first token is left out: draw from 0 to N - 2.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(1, len(tokens) - 1, (batch_size, 1))
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: the whole batch begins at one place: draw a start for each window.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - 1, (1, 1)).expand(batch_size, 1)
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: nothing is random.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.arange(batch_size)[:, None] % (len(tokens) - 1)
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), block_size)


# --- get_batch: the constant BATCH_SIZE or BLOCK_SIZE is used in place of the arguments.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - 1, (BATCH_SIZE, 1))
    return cut_windows(tokens, starts, torch.tensor(len(tokens)), BLOCK_SIZE)


# --- get_batch: windows end with their document: they run on into the next one.
def get_batch(tokens, batch_size, block_size, device):
    starts = torch.randint(len(tokens) - 1, (batch_size, 1))
    borders = (tokens == 2).nonzero().flatten() + 1
    ends = borders[torch.bucketize(starts, borders, right=True)]
    return cut_windows(tokens, starts, ends, block_size)


# --- AdaptiveSoftmax: the rows of the groups are not skipped in embed: token 0 gets the row of a group.
AdaptiveSoftmax = softmax_with(offset=lambda n: 0)


# --- AdaptiveSoftmax: embed skips one row only: there is one for each group.
AdaptiveSoftmax = softmax_with(offset=lambda n: 1)


# --- AdaptiveSoftmax: the biases of groups start at 0: ln of the number of words, as a group is as likely as
# all its words.
AdaptiveSoftmax = softmax_with(bias=lambda sizes: torch.zeros(len(sizes)))


# --- AdaptiveSoftmax: the biases of groups start at their number of words: at ln of it.
AdaptiveSoftmax = softmax_with(bias=lambda sizes: torch.tensor(sizes).float())


# --- AdaptiveSoftmax.forward: P(group) is left out: ln P(word) = ln P(group) + ln P(word in its group).
AdaptiveSoftmax = softmax_with(group=lambda ln_p, i: 0)


# --- AdaptiveSoftmax.forward: P(word in its group) is left out: each word has P(group).
AdaptiveSoftmax = softmax_with(inside=lambda logits: 0 * logits)


# --- AdaptiveSoftmax.forward: the groups are exchanged: words get the P of another group.
AdaptiveSoftmax = softmax_with(which=lambda i, n: n - 1 - i)


# --- AdaptiveSoftmax.forward: every group gets the P of the first one.
AdaptiveSoftmax = softmax_with(which=lambda i, n: 0)


# --- AdaptiveSoftmax.forward: logits inside of the groups: each group needs a softmax of its own.
AdaptiveSoftmax = softmax_with(inside=lambda logits: logits)


# --- AdaptiveSoftmax.forward: the first choice has no softmax.
AdaptiveSoftmax = softmax_with(first=lambda logits: logits)


# --- AdaptiveSoftmax.forward: probabilities are multiplied, and returned: return ln P.
AdaptiveSoftmax = softmax_with(last=lambda ln_p: ln_p.exp())


# --- AdaptiveSoftmax.forward: P in place of ln P: ln(a · b) = ln a + ln b needs ln of both.
AdaptiveSoftmax = softmax_with(
    first=lambda logits: logits.softmax(-1),
    inside=lambda logits: logits.softmax(-1),
)


# --- AdaptiveSoftmax.forward: one softmax over all: each group has its own.
class AdaptiveSoftmax(softmax_with()):
    def forward(self, x):
        return (x @ self.weight.T + self.bias).log_softmax(-1)[..., len(self.cutoffs) :]


# --- AdaptiveSoftmax.forward: the bias is missing in the logits.
class AdaptiveSoftmax(softmax_with()):
    def forward(self, x):
        bias, self.bias.data = self.bias.data, 0 * self.bias.data
        result = super().forward(x)
        self.bias.data = bias
        return result


# --- AdaptiveSoftmax.losses: P(word in its group) is left out: add the loss of the second choice.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    n, group = len(self.cutoffs), groups_of(self, targets)
    row = torch.where(group == 0, targets + n, group - 1)
    first = (x @ self.weight.T + self.bias)[:, : self.rows[0]]
    return F.cross_entropy(first, row, reduction="none")


# --- AdaptiveSoftmax.losses: P(group) is left out: add the losses of both choices.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    full = softmax_with(group=lambda ln_p, i: 0).forward(self, x)
    return -full.gather(-1, targets[:, None])[:, 0]


# --- AdaptiveSoftmax.losses: the sign is wrong: a loss is -ln P.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    return self(x).gather(-1, targets[:, None])[:, 0]


# --- AdaptiveSoftmax.losses: the mean is returned: return a loss for each target.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    return -self(x).gather(-1, targets[:, None])[:, 0].mean()


# --- AdaptiveSoftmax.losses: frequent words are in the wrong row: the rows of groups come first.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    group = groups_of(self, targets)
    row = torch.where(group == 0, targets, group - 1)
    first = (x @ self.weight.T + self.bias)[:, : self.rows[0]]
    losses = F.cross_entropy(first, row, reduction="none")
    return losses


# --- AdaptiveSoftmax.losses: the groups are exchanged.
@losses_with
def AdaptiveSoftmax(self, x, targets):
    full = softmax_with(which=lambda i, n: n - 1 - i).forward(self, x)
    return -full.gather(-1, targets[:, None])[:, 0]


# --- AdaptiveSoftmax.losses: a group begins one word too late: a cutoff is the first id of its group
# (bucketize with right=True).
@losses_with
def AdaptiveSoftmax(self, x, targets):
    cutoffs = [c + 1 for c in self.cutoffs]
    moved, self.cutoffs = self.cutoffs, cutoffs
    group = groups_of(self, targets)
    self.cutoffs = moved
    n = len(moved)
    row = torch.where(group == 0, targets + n, group - 1)
    first = (x @ self.weight.T + self.bias)[:, : self.rows[0]]
    return F.cross_entropy(first, row, reduction="none")


# --- AdaptiveSoftmax.hits: words of groups are never hits: a rare word can be the most likely one.
AdaptiveSoftmax = softmax_with(best=lambda self, x: self(x)[..., : self.cutoffs[0]].argmax(-1))


# --- AdaptiveSoftmax.hits: frequent words are compared inside of the first choice only: a word of a group can be
# likelier.
class AdaptiveSoftmax(softmax_with()):
    def hits(self, x, targets, losses):
        log_p = self(x)
        best = log_p[..., : self.cutoffs[0]].max(-1)
        return (best.indices == targets) | (-losses > best.values)


# --- AdaptiveSoftmax.hits: it is the likeliest of its group only: compare with all words.
class AdaptiveSoftmax(softmax_with()):
    def hits(self, x, targets, losses):
        log_p, group = self(x), groups_of(self, targets)
        other = groups_of(self, torch.arange(log_p.shape[-1])) != group[:, None]
        return log_p.masked_fill(other, -math.inf).argmax(-1) == targets


# --- AdaptiveSoftmax.hits: the likeliest words are returned: return bools, whether they are the targets.
class AdaptiveSoftmax(softmax_with()):
    def hits(self, x, targets, losses):
        return self(x).argmax(-1)


# --- LM: all blocks are the same one: `[Block(...)] * n` repeats it. Make n_layers different ones.
LM = word_lm_with(blocks=lambda C, H, n, dropout: nn.Sequential(*[Block(C, H, dropout)] * n))


# --- LM: dropout is not passed on to the blocks.
LM = word_lm_with(
    blocks=lambda C, H, n, dropout: nn.Sequential(*(Block(C, H, 0.0) for _ in range(n)))
)


# --- LM: the cutoffs are not passed on to AdaptiveSoftmax.
LM = word_lm_with(groups=lambda cutoffs: ())


# --- LM: the constant CUTOFFS is used in place of the argument cutoffs.
LM = word_lm_with(groups=lambda cutoffs: CUTOFFS * 2 if False else CUTOFFS)


# --- LM: config lacks cutoffs.
LM = word_lm_with(config=lambda c: {name: c[name] for name in c if name != "cutoffs"})


# --- LM: the positions start with PyTorch's standard deviation, 1: it should be 0.02.
LM = word_lm_with(start_positions=lambda p: None)


# --- LM: lm_head.weight starts with a standard deviation of 1: it should be 0.02.
LM = word_lm_with(start=lambda p: nn.init.normal_(p))


# --- LM: there is an embedding of the tokens of its own: lm_head embeds them (weight tying).
class LM(word_lm_with()):
    def __init__(
        self,
        vocab_size,
        block_size,
        n_embed,
        n_heads,
        n_layers,
        dropout,
        cutoffs=(),
    ):
        super().__init__(
            vocab_size,
            block_size,
            n_embed,
            n_heads,
            n_layers,
            dropout,
            cutoffs,
        )
        self.token_embedding = nn.Embedding(vocab_size, n_embed)


# --- LM.forward: the positions are missing.
LM = word_lm_with(position=None)


# --- LM.forward: rows of groups are taken for tokens: use lm_head.embed(idx).
LM = word_lm_with(token=lambda self, idx: self.lm_head.weight[idx])


# --- LM.forward: ln_f is missing: it comes after the blocks.
LM = word_lm_with(norm=lambda self, x: x)


# --- LM.forward: only one of the blocks counts: each works on the result of the one before, x = block(x).
LM = word_lm_with(run=lambda self, x: self.blocks[0](x))


# --- LM.forward: dropout is missing: it comes after the sum of token and position.
LM = word_lm_with(drop=lambda self, x: x)


# --- LM.forward: the loss is a sum: it is the mean over the targets.
LM = word_lm_with(
    result=lambda self, x, y: (
        None,
        self.lm_head.losses(x[y != -100], y[y != -100]).sum(),
    )
)


# --- LM.forward: targets of -100 are counted: leave them out, x[targets != -100], targets[targets != -100].
LM = word_lm_with(
    result=lambda self, x, y: (
        None,
        self.lm_head.losses(x.flatten(0, 1), y.flatten()).mean(),
    )
)


# --- LM.forward: one loss per target is returned: return their mean.
LM = word_lm_with(
    result=lambda self, x, y: (
        None,
        self.lm_head.losses(x[y != -100], y[y != -100]),
    )
)


# --- LM.forward: only the loss is returned: return None, loss.
LM = word_lm_with(result=lambda self, x, y: self.lm_head.losses(x[y != -100], y[y != -100]).mean())


# --- LM.forward: probabilities are returned: ln P, as lm_head gives it.
LM = word_lm_with(logits=lambda self, x: self.lm_head(x).softmax(-1))


# --- estimate_loss: the model is in training mode, so dropout is on: call model.eval() first.
estimate_loss = word_loss_with(prepare=lambda model: None)


# --- estimate_loss: gradients are recorded: put @torch.no_grad() above the function.
estimate_loss = word_loss_with(gradients=True)


# --- estimate_loss: it is the mean of the batches' means: weight each target equally.
estimate_loss = word_loss_with(
    mean=lambda parts: sum(part.mean().item() for part in parts) / len(parts)
)


# --- estimate_loss: it is a sum: divide by the number of targets.
estimate_loss = word_loss_with(mean=lambda parts: torch.cat(parts).sum().item())


# --- estimate_loss: <unk> is counted in "known": leave out the targets that are <unk>.
estimate_loss = word_loss_with(known=lambda losses, targets: losses)


# --- estimate_loss: "known" has only the losses of <unk>: those of all other targets.
estimate_loss = word_loss_with(known=lambda losses, targets: losses[targets == 1])


# --- estimate_loss: "known" leaves out <eos>, too: only <unk>.
estimate_loss = word_loss_with(
    known=lambda losses, targets: losses[(targets != 1) & (targets != 2)]
)


# --- estimate_loss: "known" divides by all targets: by those that are not <unk>.
estimate_loss = word_loss_with(known=lambda losses, targets: losses.masked_fill(targets == 1, 0))


# --- estimate_loss: windows run on into the next document: cut each document on its own.
estimate_loss = word_loss_with(documents=lambda ends: [(0, ends[-1])])


# --- estimate_loss: the accuracy is in percent: it is a share, 0 to 1.
estimate_loss = word_loss_with(hits=lambda hits, targets: 100 * hits.float())


# --- estimate_loss: the accuracy is the share of misses.
estimate_loss = word_loss_with(hits=lambda hits, targets: 1 - hits.float())


# --- estimate_loss: the accuracy leaves out <unk>: it is of all targets.
estimate_loss = word_loss_with(hits=lambda hits, targets: hits[targets != 1].float())


# --- estimate_loss: the last window of a document is dropped: it is shorter, but its targets count.
estimate_loss = word_loss_with(
    starts=lambda begin, end, T: [s for s in range(begin, end - 1, T) if s + T < end]
)


# --- estimate_loss: only the first window of each document is measured.
estimate_loss = word_loss_with(starts=lambda begin, end, T: [begin])


# --- estimate_loss: eval_iters is ignored: at most eval_iters · batch_size windows.
estimate_loss = word_loss_with(choose=lambda w, k, B: w)


# --- estimate_loss: eval_iters counts windows: it is a number of batches, of batch_size windows each.
estimate_loss = word_loss_with(choose=lambda w, k, B: w if k is None else w[:: len(w) // k][:k])


# --- estimate_loss: with eval_iters, only the beginning is measured: spread the windows evenly.
estimate_loss = word_loss_with(choose=lambda w, k, B: w if k is None else w[: k * B])


# --- generate: it goes on after <eos>: the text ends there.
generate = generate_with()


# --- generate: <eos> is yielded: the text ends before it.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for token in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        yield token
        if token == 2:
            return


# --- generate: <pad> and <unk> are drawn: their logits must become -inf.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for token in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        if token == 2:
            return
        yield token


# --- generate: <unk> is drawn: its logit must become -inf, too.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    row = lambda logits: logits[0, -1].index_fill(0, torch.tensor([0]), -math.inf)
    for token in generate_with(row=row)(model, ids, max_new_tokens, temperature, top_k, top_p):
        if token == 2:
            return
        yield token


# --- generate: <pad> is drawn: its logit must become -inf, too.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    row = lambda logits: logits[0, -1].index_fill(0, torch.tensor([1]), -math.inf)
    for token in generate_with(row=row)(model, ids, max_new_tokens, temperature, top_k, top_p):
        if token == 2:
            return
        yield token


# --- generate: <pad> and <unk> are drawn, and then left out, or they end the text: their logits must become -inf.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for token in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        if token <= 2:
            return
        yield token


# --- generate: <pad> and <unk> are drawn, and then left out, or they end the text: their logits must become -inf.
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    for token in generate_with()(model, ids, max_new_tokens, temperature, top_k, top_p):
        if token == 2:
            return
        if token > 2:
            yield token


# --- beam_search: only one text is kept: keep the `beams` likeliest.
beam_search = beams_with(keep=lambda beams: 1)


# --- beam_search: the scores are not added: ln P of a text is the sum over its tokens.
beam_search = beams_with(score=lambda old, ln_p: ln_p)


# --- beam_search: probabilities are added: multiply them, or add their ln.
beam_search = beams_with(ln=lambda logits: logits.softmax(-1))


# --- beam_search: logits are added: ln P needs log_softmax.
beam_search = beams_with(ln=lambda logits: logits)


# --- beam_search: <pad> and <unk> are chosen: their logits must be -inf.
beam_search = beams_with(words=lambda logits: logits)


# --- beam_search: <pad> and <unk> keep a share of the probability: set their logits to -inf before the softmax.
beam_search = beams_with(
    words=lambda logits: logits,
    ln=lambda logits: logits.log_softmax(-1).index_fill(0, torch.tensor([0, 1]), -math.inf),
)


# --- beam_search: texts go on after <eos>: they are kept as they are.
beam_search = beams_with(ended=lambda new: False)


# --- beam_search: texts that have ended are dropped: they are results, too.
beam_search = beams_with(drop_ended=True, stop=False)


# --- beam_search: the least likely texts are kept: the likeliest.
beam_search = beams_with(order=sorted)


# --- beam_search: ln P is divided by the length: it is the sum.
beam_search = beams_with(result=lambda kept, ids: (kept[0][1], kept[0][0] / len(kept[0][1])))


# --- beam_search: the probability is returned: its ln.
beam_search = beams_with(result=lambda kept, ids: (kept[0][1], math.exp(kept[0][0])))


# --- beam_search: the prompt is returned, too: only the new ids.
beam_search = beams_with(result=lambda kept, ids: ([*ids, *kept[0][1]], kept[0][0]))


# --- beam_search: the order is wrong: return new ids, ln P.
beam_search = beams_with(result=lambda kept, ids: kept[0])


# --- beam_search: the model is in training mode: call model.eval() first.
beam_search = beams_with(prepare=lambda model: None)


# --- beam_search: the text is not cropped: the model sees at most the last block_size tokens.
beam_search = beams_with(crop=lambda ids, T: ids)


# --- beam_search: the sign is wrong: ln P, not -ln P.
beam_search = beams_with(result=lambda kept, ids: (kept[0][1], -kept[0][0]))


# --- attention_weights: these are results, weights @ v: with the identity matrix as v, they are the weights.
attention_weights = weights_with(value=lambda q, k, v: v)


# --- attention_weights: v is 1 everywhere: this gives sums. With the identity matrix, it gives the weights.
attention_weights = weights_with(value=lambda q, k, v: torch.ones(q.shape[2], q.shape[2]))


# --- attention_weights: dropout is on: call model.eval() first.
attention_weights = weights_with(prepare=lambda m: m.train())


# --- attention_weights: the hooks are left behind: remove them.
attention_weights = weights_with(after=False)


# --- attention_weights: the batch is left in the shape: (H, T, T), not (1, H, T, T).
attention_weights = weights_with(part=lambda w: w)


# --- attention_weights: the heads are averaged: return (H, T, T).
attention_weights = weights_with(part=lambda w: w[0].mean(0))
