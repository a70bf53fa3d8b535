"""The pieces that gpt2.py has anew or changed: graders, mistakes to name, other solutions."""
# Neighbours share a grader: all but the piece itself is our original, which passes.
# Values, explanations, and planted code are easier to read as tables.
# fmt: off
# ruff: noqa: E731

import io
import tempfile
from pathlib import Path

import lessons_char_gpt as char
import torch
import torch.nn.functional as F
from conftest import SMALL_BPE
from lessons import Piece, Wrong, diagnose, numbers, randomize, require, table

SIZES = dict(vocab_size=8, block_size=8, n_embed=8, n_heads=2, n_layers=2, dropout=0.0)
END, MARK, HALF = "<|endoftext|>", "\ufeff", "\ufffd"  # HALF: shown for a part of a character
char.Bigram.init = "pretrained"  # `train` asks where the weights began


# --- Text and tokens ------------------------------------------------------------------------------
def grade_text(gpt):
    exec(SMALL_BPE, vars(gpt))  # a vocabulary without a network: bytes, 256 th, 258 " th", 259 END
    tokenizer, text, ids = gpt.Tokenizer(), f"the é{END}", [256, 101, 32, 195, 169, 259]
    diagnose(tokenizer.encode(text), ids, what="encode", wrong={
        "special text split": (ids[:-1] + list(END.encode()), f"{END} must be one id, the last")})
    got = tokenizer.decode(ids)
    require(got == text, f"decode: {got!r} instead of {text!r}. Decode all the tokens together")
    text = "It is  time\n\nto go, now. " * 9
    pieces = [piece for piece in gpt.read_pieces(io.StringIO(text), 24) if piece]
    joined, cut = "".join(pieces), f"the pieces are {pieces[:4]}..."
    require(joined == text, f"end lost: of {len(text)} characters, {len(joined)} came: yield all")
    ends, starts = ([piece[i].isspace() for piece in pieces] for i in (-1, 0))
    require(any(starts[1:]), f"white space left behind: {cut} It begins the next token")
    require(all(starts[1:]) and not any(ends[:-1]), f"word cut: {cut} No merge joins its halves")
    old, ids, right = [], [*"aé→🙂".encode(), 258, 0xE2, 0x86], f"aé→🙂 th{HALF}"
    got = "".join(gpt.stream(tokenizer, ids))
    require(got.count(HALF) < 2, f"broken character: {got!r}. A character can have several tokens")
    require(got == right, f"end lost: {got!r} instead of {right!r}: show what is left")
    gpt.print = lambda *words, **how: None
    with tempfile.TemporaryDirectory() as folder:
        for text in (f"the thin é{END}" * 9, f"the this é{END}" * 8):
            (path := Path(folder, "text.txt")).write_text(MARK + text, encoding="utf-8")
            ids, got = tokenizer.encode(text), gpt.load_tokens(path, tokenizer).tolist()
            diagnose(got, ids, what="ids of a file", wrong={
                "old file": (old, "the text has changed, but the ids are those of before"),
                "header as ids": (got[:32] + ids, "32 too many: the first 64 bytes are the key")})
            old = ids

def grade_tokens(gpt):
    splits, rest = gpt.split_text(torch.arange(100), 0.8, 7, 10), torch.arange(79, 100)
    diagnose(splits["train"], torch.arange(80), what="training part")
    diagnose(splits["val"], rest[1:8], what="validation part", wrong={
        "split overlaps": (rest[:8], "token 79 is in the training part, too: the model knows it")})
    x, y = gpt.get_batch(torch.arange(60_000, 60_009).to(torch.uint16), 4, 3, "cpu")
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}; cross_entropy needs int64")
    char.grade_get_batch(gpt)
    gpt.estimate_loss(char.Bigram(numbers(23, 23)), torch.arange(23).to(torch.uint16), 2)
    char.grade_estimate_loss(gpt)


# --- Model, training, generation ------------------------------------------------------------------
@torch.no_grad()
def grade_attention(gpt):
    char.grade_head(gpt)
    char.grade_multi_head(gpt, True)
    char.grade_block(gpt, True)
    q, k, v = numbers(3, 2, 3, 5, 4)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    diagnose(gpt.Head()(q[:, :, -1:], k, v), right, what="result of one query, 5 keys", wrong={
        "mask on a single query": (v[:, :, :1], "the newest token sees key 0 only, not all 5")})
    both, cache = numbers(2, 2, 3, 6, 4), gpt.Cache(8)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        old, new, right = both[..., :start, :], both[..., start:end, :], both[..., :end, :]
        got, late = torch.stack(cache.append(*new)), torch.cat([old[..., :-1, :], new], 3)
        if got.shape == right.shape:  # first the earlier tokens: the last place may be empty
            diagnose(got[..., :start, :], old, what=f"first {start} keys and values", wrong={
                "one position off": (late, f"the new one is at {start - 1}; the old one is lost")})
        diagnose(got, right, what=f"keys and values of {end} tokens", wrong={
            "earlier ones lost": (new, f"only the new one came back; return all {end}")})
    for kind, bias in ((gpt.MultiHead, True), (gpt.MultiHead, False), (gpt.Block, True)):
        layer, x, cache = randomize(kind(12, 3, 0.0, bias)).eval(), numbers(2, 5, 12), gpt.Cache(5)
        found = getattr(layer, "attention", layer).qkv.bias is not None
        require(found == bias, f"biases: with qkv_bias = {bias}, qkv has biases: {found}")
        for a, b in ((0, 3), (3, 4), (4, 5)):
            right, alone = layer(x)[:, a:b], layer(x[:, a:b])
            diagnose(layer(x[:, a:b], cache), right, what=f"token {a} with a cache", wrong={
                "cache not used": (alone, "the new token sees only itself, none before it")})

def grade_feed_forward(gpt):
    x, make = numbers(2, 3, 6), lambda rate: randomize(gpt.FeedForward(6, rate))
    layer = make(0.0).eval()
    a, b = layer.expand, layer.shrink  # load_pretrained fills these
    form = lambda f: f(x @ a.weight.T + a.bias) @ b.weight.T + b.bias
    tanh = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    diagnose(layer(x), form(tanh), wrong={
        "relu instead of gelu": (form(F.relu), "-1 becomes 0. OpenAI trained with gelu: -0.16"),
        "exact gelu": (form(F.gelu), "2 becomes 1.9545; with GPT-2's approximation, 1.9546")})
    char.check_dropout(make, x)

def grade_lm(gpt):
    model = gpt.LM(300, 64, 96, 4, 8, 0.5)
    tied = model.lm_head.weight is model.token_embedding.weight
    require(tied, "not tied: lm_head has a matrix of its own. A copy moves away in training")
    for name, p in model.named_parameters():
        last, ln = name.endswith(("projection.weight", "shrink.weight")), name.endswith("weight")
        got, right = (p.std(), 0.02 / 4**last) if p.dim() == 2 else (p.mean(), float(ln))
        diagnose(got, right, rtol=0.05, what=f"deviation (of a vector: mean) of {name}", wrong={
            "residual projections not scaled": (0.02 * last, f"{name} starts with 0.02. The 8 "
                "blocks add 16 results, so it is 0.02 / √16")})
    char.grade_lm_forward(gpt)
    model, caches = randomize(gpt.LM(**SIZES)).eval(), [gpt.Cache(8), gpt.Cache(8)]
    idx, V = torch.tensor([[3, 1, 5, 2]]), model.token_embedding.weight
    def right(*places):
        x = F.embedding(idx[:, : len(places)], V) + model.position_embedding.weight[[*places]]
        return model.ln_f(model.blocks(x))[:, -1:] @ V.T
    for start, end, *off in ((0, 3, [1, 2, 3]), (3, 4, [0, 1, 2, 4], [0, 1, 2, 2])):
        with torch.no_grad():
            got, alone = (model(idx[:, start:end], caches=used)[0] for used in (caches, None))
        diagnose(got, right(*range(end)), what=f"logits of token {end - 1} with a cache", wrong={
            "one position off": (tuple(right(*p) for p in off), f"token {end - 1} got the "
                "position before or after its own. Positions count from 0"),
            "positions restart": (right(0, 1, 2, 0), "the token after 3 got position 0, not 3"),
            "cache not passed": (alone[:, -1:], "token 3 sees none before it")})

@torch.no_grad()
def grade_load_pretrained(gpt):
    import transformers
    from safetensors.torch import save_file
    sizes = dict(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2)  # V = T = C: a trap
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    theirs, idx = randomize(transformers.GPT2LMHeadModel(config)).eval(), torch.arange(8)[None]
    weights = theirs.transformer.state_dict() | {"h.0.attn.bias": torch.ones(8, 8)}
    for ours, name in zip(dict(gpt.LM(**SIZES).named_parameters()), weights, strict=False):
        got = gpt.openai_name(ours)
        require(got == name, f"name: {ours} became {got}; in OpenAI's file it is {name}")
    def logits(*turned):  # with the matrices of these names transposed
        change = {n: p.T for n, p in theirs.named_parameters() if n.endswith(turned)}
        return torch.func.functional_call(theirs, change, (idx,)).logits
    for prefix in ("", "transformer."):
        with tempfile.TemporaryDirectory() as folder:
            save_file({prefix + n: p for n, p in weights.items()}, f"{folder}/file")
            try:
                model = gpt.load_pretrained(f"{folder}/file", **SIZES)
            except gpt.UserError as error:
                require("match" not in f"{error.__cause__}", "not transposed: OpenAI's c_attn is "
                        "(C, 3C), for x @ W; nn.Linear holds (3C, C)")
                raise Wrong(f"file refused: masks and {prefix!r} may be there: {error}") from error
        diagnose(model.eval()(idx)[0], logits(), what="logits", wrong={
            "square matrices not transposed": (logits("attn.c_proj.weight"), "attn.c_proj is "
                "(C, C): its shape does not show that it must be transposed, too")})
    tied = model.lm_head.weight is model.token_embedding.weight
    require(tied, "lm_head not tied: load_state_dict(assign=True) made two parameters of one")

def grade_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, model = 0.25, gpt.LM(**SIZES)
    optimizers = gpt.make_optimizers(model)
    decays = {p: g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        got, right = decays.get(p), 0.25 * (p.dim() == 2)
        require(p in decays, f"parameters left out: {name} is in no group, so it never changes")
        require(got == right, f"weight decay: {name} has {got}, not {right}: for matrices only")
    kinds = [(type(optimizer).__name__, optimizer.defaults["betas"]) for optimizer in optimizers]
    require(kinds == [("AdamW", gpt.BETAS)], f"wrong optimizer: {kinds}, not AdamW with BETAS")

def grade_train_step(gpt):
    gpt.BATCH_SIZE = 4
    char.grade_train_step(gpt)
    gpt.BATCH_SIZE, gpt.GRADIENT_CLIP, share = 2, None, torch.tensor([0.4, 0.4, 0.2])
    x, y = torch.randint(7, (2, 5, 4))  # batches of 2, 2 and 1 windows
    model, twin, last = *(char.Bigram(numbers(7, 7)) for _ in "ab"), torch.tensor([0, 0, 0.2])
    losses = [twin(*part)[1] for part in zip(x.split(2), y.split(2), strict=True)]
    parts = torch.stack([torch.autograd.grad(loss, twin.table)[0] for loss in losses])
    mean = lambda share: torch.tensordot(share, parts, 1)
    got = gpt.train_step(model, [torch.optim.SGD([model.table], 0.0)], x, y, 1.0)
    require(len(model.seen) > 1, "one large batch: all windows at once do not fit in memory")
    diagnose(twin.table - model.table, mean(share), what="gradient", wrong={
        "not divided": (mean(share**0), "3 means are added: multiply each by its share of windows"),
        "gradients zeroed in each batch": (mean(last), "the last batch's alone is left")})
    diagnose(got, share @ torch.stack(losses), what="loss")

def grade_generate(gpt):
    model, prompt, seen = randomize(gpt.LM(8, 8, 8, 2, 2, 0.5)), [3, 1, 4, 1, 5, 0, 2, 2, 5], []
    def choose(row, *options):  # instead of next_token_probabilities: 0 to 5 are equally likely
        require(options == (0.5, 2, 0.9), f"options ignored: {options} instead of (0.5, 2, 0.9)")
        require(not torch.is_grad_enabled(), "gradients in evaluation: put @torch.no_grad() above")
        seen.append(row.clone())
        return torch.ones(6)
    def logits(first=slice(-8, None), cut=slice(-4, None), V=6):
        rows, ids = [], prompt[first]
        for token in tokens:
            row = model(torch.tensor([ids]))[0][0, -1, :V]
            rows.append(F.pad(row, (0, 8 - V), value=-torch.inf))
            ids = [*ids, token][cut if len(ids) == 8 else slice(None)]
        return torch.stack(rows)
    gpt.Tokenizer.vocab_size, gpt.next_token_probabilities, sent = 6, choose, []
    model.blocks[0].register_forward_hook(lambda *call: sent.append(call[2].shape[1]))
    tokens = [int(token) for token in gpt.generate(model.train(), prompt, 9, 0.5, 2, 0.9)]
    require(sum(sent) < 24, f"no cache: {sum(sent)} tokens went through; 23 are enough")
    require(not model.training, "dropout on in evaluation: call model.eval() first")
    require(len(prompt) == 9, f"caller's list changed: the prompt is now {prompt}")
    require(len({*tokens}) > 1, "always argmax: draw a token, with torch.multinomial")
    diagnose(torch.stack(seen), logits(), what="logits after each token", wrong={
        "prompt cut at the wrong end": (logits(first=slice(8)), "the first 8, not the last 8"),
        "newer half dropped": (logits(cut=slice(4)), "the text continues the newest tokens"),
        "ids beyond the vocabulary": (logits(V=8), "6 and 7 are no tokens: their logits are -inf")})


# --- Pieces, mistakes, other solutions ------------------------------------------------------------
PIECES = [Piece(n, " ".join(f"{n}.{p}" for p in parts.split()) or n, *more) for n, parts, *more in (
    ("Tokenizer", "__init__ encode decode", grade_text, "ids of any text, the text of ids"),
    ("read_pieces", "", grade_text, "yield pieces that end before white space"),
    ("load_tokens", "", grade_text, "encode once into a file, then map it"),
    ("split_text", "", grade_tokens, "training part, and validation part after it"),
    ("get_batch", "", grade_tokens, "random windows, and the token after each, int64"),
    ("Head", "forward", grade_attention, "attention in one function; one query sees all"),
    ("Cache", "__init__ append", grade_attention, "store the new ones, return all"),
    ("MultiHead", "__init__ forward", grade_attention, "as before; qkv has biases; use the cache"),
    ("FeedForward", "__init__ forward", grade_feed_forward, "GPT-2's gelu between two layers"),
    ("Block", "__init__ forward", grade_attention, "as before; the cache is for attention"),
    ("LM", "__init__ tie_weights", grade_lm, "layers, tied; GPT-2's start"),
    ("LM.forward", "", grade_lm, "as before; with caches, what comes after them"),
    ("openai_name", "", grade_load_pretrained, "replace the parts of the name"),
    ("load_pretrained", "", grade_load_pretrained, "read, rename, transpose, fill an LM, tie"),
    ("estimate_loss", "", grade_tokens, "the mean loss of tokens from a file"),
    ("make_optimizers", "", grade_make_optimizers, "AdamW; weight decay for matrices only"),
    ("get_lr", "", char.grade_get_lr, "a line up, then a line down"),
    ("train_step", "", grade_train_step, "add the gradients of batches, then one step"),
    ("train", "", char.grade_train, "steps, evaluations, saves, and the best model at the end"),
    ("next_token_probabilities", "", char.grade_next_token_probabilities, "which to draw"),
    ("generate", "", grade_generate, "predict with caches, draw, yield; drop the older half"),
    ("stream", "", grade_text, "the text of tokens, each character whole"))]
UNGRADED = {"parallelize", "for_generation", "write_sample"}  # engineering, in test_gpt2.py
MISTAKES = table(r"""
Tokenizer | special text split | encode(text, allowed_special="all") | encode_ordinary(text)
read_pieces | word cut | place.end() if place else len(rest) | len(rest)
read_pieces | white space left behind | \S(?=[ \n]) | \S\s
load_tokens | header as ids | [32:] | [0:]
load_tokens | old file | if found != key: | if not found:
split_text | split overlaps | tokens[cut : cut + | tokens[cut - 1 : cut +
get_batch | dtype | device, torch.int64 | device
Head | mask on a single query | q.shape[-2] > 1 | True
Cache | one position off | = self.length, | = max(0, self.length - 1),
Cache | earlier ones lost | return self.k[:, :, : self.length] | return k, v; self.k
MultiHead | cache not used | k, v = cache.append(k, v) | cache.append(k, v)
MultiHead | biases | bias=qkv_bias | bias=False
FeedForward | exact gelu | approximate="tanh" | approximate="none"
FeedForward | relu instead of gelu | gelu(self.expand(x), approximate="tanh") | relu(self.expand(x))
Block | cache not used | (self.ln1(x), cache) | (self.ln1(x))
LM | not tied | self.tie_weights() | pass
LM | residual projections not scaled | 0.02 / (2 * n_layers) ** 0.5 | 0.02
LM.forward | positions restart | caches[0].length if caches else 0 | 0
LM.forward | one position off | caches[0].length if | caches[0].length + 1 if
openai_name | name | ("ln2", "ln_2") | ("ln2", "ln_1")
load_pretrained | not transposed | part.t().contiguous() if is_turned else part | part
load_pretrained | square matrices not transposed | ".c_" in name and | len({*part.shape}) > 1 and
load_pretrained | lm_head not tied | model.tie_weights() | pass
make_optimizers | weight decay | "weight_decay": 0.0 | "weight_decay": WEIGHT_DECAY
train_step | not divided | * (len(xs) / len(x)) | * 1
train_step | gradients zeroed in each batch | loss.backward() | model.zero_grad(); loss.backward()
generate | newer half dropped | [-max(1, model.block_size // 2) :] | [: model.block_size // 2]
generate | no cache | new = ids[-1:] | new, caches = ids, [Cache(8), Cache(8)]
generate | prompt cut at the wrong end | [-model.block_size :] | [: model.block_size]
stream | broken character | yield decoder.decode(tok | yield decoder.decode(final=True, input=tok
""")
VARIANTS = table(r"""
Tokenizer | encode(text, allowed_special="all") | encode_batch([text], allowed_special="all")[0]
Tokenizer | decode(list(ids)) | decode_bytes([*ids]).decode(errors="replace")
read_pieces | .*\S(?=[ \n]) | [\s\S]*[^\s](?=\s)
load_tokens | array("H", ids) | b"".join(i.to_bytes(2, "little") for i in ids)
split_text | tokens[cut : cut + max_val_tokens] | tokens[cut:][:max_val_tokens]
Head | q.shape[-2] > 1) | q.shape[2] == k.shape[2])
Head | is_causal=q.shape[-2] > 1 | torch.ones(k.shape[2], k.shape[2]).tril().bool()[-q.shape[2] :]
Head | F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1) |
    (q @ k.mT / q.shape[-1] ** 0.5 + torch.full((k.shape[2],) * 2, -math.inf).triu(1)[-q.shape[2] :]
    ).softmax(-1) @ v
Cache | self.v[:, :, start : self.length] = v | self.v.narrow(2, start, v.shape[2]).copy_(v)
Cache | (k.new_empty(B, H, self.block_size, hs) for _ in "kv") | k.new_zeros(2, B, H, 8, hs)
Cache | return self.k[:, :, : self.length] | return self.k.narrow(2, 0, self.length)
MultiHead | self.qkv(x).split(C, dim=-1) | self.qkv(x).chunk(3, dim=-1)
MultiHead | .transpose(1, 2).reshape(B, T, C) | .permute(0, 2, 1, 3).flatten(2)
MultiHead | .view(B, T, self.n_heads, -1).transpose | .unflatten(2, (self.n_heads, -1)).transpose
FeedForward | F.gelu(self.expand(x), approximate="tanh") | nn.GELU("tanh")(self.expand(x))
FeedForward | self.shrink(F | F.linear(weight=self.shrink.weight, bias=self.shrink.bias, input=F
Block | x + self.attention(self.ln1(x), cache) | self.attention(self.ln1(x), cache=cache).add(x)
LM | lm_head.weight = self.token_embedding.weight | token_embedding.weight = self.lm_head.weight
LM | 0.02 / (2 * n_layers) ** 0.5 | 0.02 * math.sqrt(0.5 / n_layers)
LM | nn.init.zeros_(p) | p.data.fill_(0.0)
LM.forward | position_embedding.weight[past:end] | position_embedding(torch.arange(past, end))
LM.forward | self.lm_head(x).float() | torch.einsum("btc,vc->btv", x, self.lm_head.weight)
LM.forward | F.cross_entropy(logits. | F.nll_loss(logits.log_softmax(-1).
load_pretrained | part.t().contiguous() if is_turned | torch.einsum("ij->ji", part) if is_turned
estimate_loss | (targets != -100).sum().item() | int((targets >= 0).sum())
make_optimizers | betas=BETAS, fused=True | betas=BETAS
train_step | * (len(xs) / len(x)) | / len(x) * len(xs)
generate | torch.tensor([new], device | torch.as_tensor(new).view(1, -1).to(device
generate | [-max(1, model.block_size // 2) :] | [len(ids) - model.block_size // 2 :]
stream | ("utf-8")("replace") | ("utf8")(errors="replace")
""")
