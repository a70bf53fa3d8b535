"""The lessons of gpt2.py: the pieces that char_gpt.py does not have, or has in another form."""
# Formulas, explanations, and planted code are easier to read as tables.
# fmt: off
# ruff: noqa: E731

import functools
import io
import itertools
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import lessons_char_gpt as char
import torch
import torch.nn.functional as F
from conftest import SMALL_BPE
from lessons import Piece, Wrong, diagnose, numbers, randomize, require

SIZES = dict(vocab_size=8, block_size=8, n_embed=8, n_heads=2, n_layers=2, dropout=0.0)
END = "<|endoftext|>"


# --- Data -----------------------------------------------------------------------------------------
def small_tokenizer(gpt):
    """Give the module a vocabulary without a network: bytes, 256 th, 258 space + th, 259 END."""
    exec(SMALL_BPE, vars(gpt))
    return gpt.Tokenizer()

def grade_tokenizer(gpt):
    tokenizer, text, ids = small_tokenizer(gpt), f"the é{END}", [256, 101, 32, 195, 169, 259]
    diagnose(tokenizer.encode(text), ids, {
        "special text split": (ids[:-1] + list(END.encode()), f"{END} must be one id, the last"),
        "no merges": (list(text.encode()), "each byte is one token, but th is the token 256"),
    }, what="encode")
    got = tokenizer.decode(ids)
    require("\ufffd" not in got, f"broken character: {got!r}: é is 2 tokens. Decode all together")
    require(got == text, f"decode: {got!r} instead of {text!r}")

def grade_read_pieces(gpt):
    text = "It is  time\n\nto go, now. " * 20
    pieces = [piece for piece in gpt.read_pieces(io.StringIO(text), 24) if piece]
    joined, share = "".join(pieces), f"of {len(text)} characters"
    require(joined in text, f"white space lost: {share}, {len(joined)} came back")
    require(joined == text, f"end lost: {share}, the first {len(joined)} came. Yield the rest")
    for a, b in itertools.pairwise(pieces):
        cut = f"{a[-9:]!r} + {b[:9]!r}"
        require(b[0].isspace(), f"word cut: {cut}. No merge can join the halves")
        require(not a[-1].isspace(), f"white space left behind: {cut}. It begins the next token")
    require(len(pieces) > 9, f"pieces too long: {share}, read 24 at a time, {len(pieces)} pieces")

def grade_load_tokens(gpt):
    tokenizer, old = small_tokenizer(gpt), []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder, "text.txt")
        for turn, text in enumerate((f"the thin é{END}" * 9, f"the this é{END}" * 9)):
            path.write_text("\ufeff" + text, encoding="utf-8")
            os.utime(path, (turn, turn))
            ids, got = tokenizer.encode(text), gpt.load_tokens(path, tokenizer).tolist()
            diagnose(got, ids, {
                "old file": (old, "the text has changed, but the ids are those of before"),
                "header as ids": (got[:32] + ids, "the first 64 bytes of the file are the key"),
                "mark kept": (tokenizer.encode("\ufeff" + text), "Windows' mark is no text"),
            }, what="ids")
            old = ids

def grade_split_text(gpt):
    splits = gpt.split_text(torch.arange(100), 0.8, 7, 10)
    both = lambda start, end: torch.tensor([*range(80), -1, *range(start, end)])
    diagnose(torch.cat([splits["train"], torch.tensor([-1]), splits["val"]]), both(80, 87), {
        "split overlaps": (both(79, 87), "the model has seen the first token of the validation"),
        "validation too long": (both(80, 100), "all 20 tokens that are left; 7 were asked for"),
    }, what="training part, -1, validation part")

def grade_get_batch(gpt):
    x, y = gpt.get_batch(torch.arange(60_000, 60_009).to(torch.uint16), 4, 3, "cpu")
    require(x.dtype == y.dtype == torch.int64, f"dtype: {x.dtype}; cross_entropy needs int64")
    char.grade_get_batch(gpt)


# --- Model ----------------------------------------------------------------------------------------
def grade_head(gpt):
    char.grade_head(gpt)
    q, k, v = numbers(3, 2, 3, 5, 4)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    diagnose(gpt.Head()(q[:, :, -1:], k, v), right, {
        "mask on a single query": (v[:, :, :1], "the newest token got the first row of the mask, "
            "so its result is value 0. It may see all"),
    }, what="result of one query with 5 keys")

def grade_cache(gpt):
    both, cache, cat = numbers(2, 2, 3, 6, 4), gpt.Cache(8), lambda *parts: torch.cat(parts, 3)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        old, new = both[..., :start, :], both[..., start:end, :]
        got = torch.stack(cache.append(*new))
        for n in (start, end):  # first those of earlier tokens: the last place may be empty
            right = both[..., :n, :]
            diagnose(got if n == end else got[..., :n, :], right, {
                "keys and values swapped": (right.flip(0), "return keys, values"),
                "earlier ones lost": (new, f"only the new ones came back; return all {end}"),
                "one position off": (cat(old[..., :-1, :], new), f"the new one is at {start - 1}, "
                    f"not at {start}: the token before it is lost"),
                "overwrites": (cat(new, old[..., 1:, :]), "the first one is lost, not appended to"),
            }, what=f"keys and values of {end} tokens")

def grade_attention(gpt):
    char.grade_multi_head(gpt, True)
    char.grade_block(gpt, True)
    for kind, bias in ((gpt.MultiHead, True), (gpt.MultiHead, False), (gpt.Block, True)):
        layer, x, cache = randomize(kind(12, 3, 0.0, bias)).eval(), numbers(2, 5, 12), gpt.Cache(5)
        for a, b in ((0, 3), (3, 4), (4, 5)):
            diagnose(layer(x[:, a:b], cache), layer(x)[:, a:b], {
                "cache not used": (layer(x[:, a:b]), "the new token sees none before it"),
            }, what=f"result from token {a} on, with a cache")
        found = getattr(layer, "attention", layer).qkv.bias is not None
        require(found == bias, f"biases: with qkv_bias = {bias}, qkv has biases: {found}")

def grade_feed_forward(gpt):
    x, make = numbers(2, 3, 6), lambda rate: randomize(gpt.FeedForward(6, rate))
    layer = make(0.0).eval()
    a, b = layer.expand, layer.shrink
    form = lambda f: f(x @ a.weight.T + a.bias) @ b.weight.T + b.bias
    tanh = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    diagnose(layer(x), form(tanh), {
        "relu instead of gelu": (form(F.relu), "-1 becomes 0; gelu gives -0.16, as OpenAI trained"),
        "exact gelu": (form(F.gelu), "2 becomes 1.9545; with GPT-2's approximation, 1.9546"),
    })
    char.check_dropout(make, x)

def grade_lm_init(gpt):
    sizes = dict(vocab_size=300, block_size=64, n_embed=96, n_heads=4, n_layers=8, dropout=0.5)
    model = gpt.LM(**sizes)
    require(model.config == sizes | {"qkv_bias": True}, f"config: {model.config}, not {sizes}")
    tied = model.lm_head.weight is model.token_embedding.weight
    model.tie_weights()
    a, b = model.lm_head.weight, model.token_embedding.weight
    require(a is b or not a.equal(b), "copied instead of shared: training moves the copies apart")
    require(a is b and tied, "not tied: lm_head has a matrix of its own, not token_embedding's")
    for name, p in model.named_parameters():
        last, ln = name.endswith(("projection.weight", "shrink.weight")), name.endswith("weight")
        right = 0.02 / 16 ** (0.5 * last) if p.dim() == 2 else float(ln)
        diagnose(p.std() if p.dim() == 2 else p.mean(), right, {
            "residual projections not scaled": (0.02 * last, f"{name} starts with 0.02. The 16 "
                "results of 8 blocks are added, so it is 0.02 / √16"),
            "scaled by the wrong n": (0.02 / 8**0.5, "n is 2 · 8: each block adds two results"),
            "scaled everywhere": (0.005, f"{name} adds no result: 0.02, not 0.02 / √16"),
        }, rtol=0.05, what=f"deviation, or mean of a vector, {name}")

@torch.no_grad()
def grade_lm_forward(gpt):
    torch.enable_grad()(char.grade_lm_forward)(gpt)
    model, idx, caches = randomize(gpt.LM(**SIZES)).eval(), torch.randint(8, (2, 9)), [
        gpt.Cache(8) for _ in range(2)]
    def right(*places):
        x = model.token_embedding(idx[:, : len(places)]) + model.position_embedding.weight[[*places]]
        return model.ln_f(model.blocks(x))[:, -1:] @ model.token_embedding.weight.T
    for start, end, *off in ((0, 3, [1, 2, 3]), (3, 4, [0, 1, 2, 4], [0, 1, 2, 2])):
        whole = model(idx[:, start:end])[0]
        diagnose(model(idx[:, start:end], caches=caches)[0], right(*range(end)), {
            "one position off": (tuple(right(*places) for places in off), "the last token's "
                f"position is {end - 1}. Yours got the one before or after it"),
            "positions restart": (right(0, 1, 2, 0), "the token after 3 got position 0, not 3"),
            "all positions" if end == 3 else "cache not passed": (whole, "with caches, the last "
                "position alone gets logits, and it sees all earlier tokens"),
        }, what=f"logits after {end} tokens with a cache")


# --- OpenAI's weights -----------------------------------------------------------------------------
@functools.cache
def openai_model():
    """Return transformers' GPT-2, with random weights, as small as SIZES: V = T = C is a trap."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import transformers
    sizes = dict(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return randomize(transformers.GPT2LMHeadModel(config)).eval()

@torch.no_grad()
def grade_load_pretrained(gpt):
    from safetensors.torch import save_file
    theirs, idx, extra = openai_model(), torch.arange(8)[None], {"h.0.attn.bias": torch.ones(8, 8)}
    pairs = zip(dict(gpt.LM(**SIZES).named_parameters()), theirs.transformer.state_dict(), strict=True)
    for ours, right in pairs:
        got = gpt.openai_name(ours)
        require(got == right, f"name: {ours} became {got}; in OpenAI's file it is {right}")
    def logits(*turned):  # with the matrices of these names transposed
        change = {n: p.T for n, p in theirs.named_parameters() if n.endswith(turned)}
        return torch.func.functional_call(theirs, change, (idx,)).logits
    for prefix, more, refused in (("", {}, "not loaded"), ("", extra, "masks not skipped"),
                                  ("transformer.", {}, "prefix not removed")):
        weights = theirs.transformer.state_dict() | more
        with tempfile.TemporaryDirectory() as folder:
            save_file({prefix + n: p for n, p in weights.items()}, path := f"{folder}/weights")
            try:
                model = gpt.load_pretrained(path, **SIZES)
            except gpt.UserError as error:
                text = repr(error.__cause__ or error)
                require("match" not in text, "not transposed: in the file, c_attn is (C, 3C), for "
                        "x @ W. nn.Linear holds (3C, C), for x @ Wᵀ")
                raise Wrong(f"{refused}: a correct file was refused: {text:.200}") from error
        diagnose(model.eval()(idx)[0], logits(), {
            "square matrices not transposed": (logits("attn.c_proj.weight"), "attn.c_proj is "
                "(C, C): its shape does not show that it must be transposed, too"),
            "everything transposed": (logits("wte.weight", "wpe.weight"), "the embeddings are "
                "tables: only the matrices of the blocks, c_..., are transposed"),
        }, what="logits")
    tied = model.lm_head.weight is model.token_embedding.weight
    require(tied, "lm_head not tied: load_state_dict(assign=True) made two parameters of one")


# --- Training -------------------------------------------------------------------------------------
def grade_estimate_loss(gpt):
    char.grade_estimate_loss(gpt)
    tokens = torch.arange(23).to(torch.uint16)
    a, b = (gpt.estimate_loss(char.Bigram(numbers(23, 23)), t, 2) for t in (tokens.long(), tokens))
    require(a == b, f"uint16: the loss is {b} with ids as load_tokens returns them, not {a}")

def grade_make_optimizers(gpt):
    gpt.WEIGHT_DECAY, gpt.BETAS, model = 0.25, (0.8, 0.9), gpt.LM(**SIZES)
    (optimizer,) = gpt.make_optimizers(model)
    names, kind = {p: n for n, p in model.named_parameters()}, type(optimizer).__name__
    require(kind == "AdamW", f"wrong optimizer: {kind} instead of AdamW")
    for p, group in ((p, group) for group in optimizer.param_groups for p in group["params"]):
        name, decay, right = names.pop(p), group["weight_decay"], 0.25 * (p.dim() == 2)
        require(decay == right, f"weight decay: {name} has {decay}, not {right}: matrices only")
        require(group["betas"] == gpt.BETAS, f"betas: {group['betas']} instead of {gpt.BETAS}")
    require(not names, f"parameters left out: {len(names)} never change: {[*names.values()][:2]}")

def grade_train_step(gpt):
    gpt.BATCH_SIZE = 4
    char.grade_train_step(gpt)
    gpt.BATCH_SIZE, gpt.GRADIENT_CLIP, share = 2, None, torch.tensor([0.4, 0.4, 0.2])
    x, y = torch.randint(7, (2, 5, 4))  # batches of 2, 2 and 1 windows
    model, twin = char.Bigram(numbers(7, 7)), char.Bigram(numbers(7, 7))
    losses = [twin(*part)[1] for part in zip(x.split(2), y.split(2), strict=True)]
    parts = torch.stack([torch.autograd.grad(loss, twin.table)[0] for loss in losses])
    mean, last = (lambda share: torch.tensordot(share, parts, 1)), torch.tensor([0.0, 0.0, 1.0])
    got = gpt.train_step(model, [torch.optim.SGD([model.table], 0.0)], x, y, 1.0)
    require(len(model.seen) > 1, "one large batch: all windows at once do not fit in memory")
    diagnose(twin.table - model.table, mean(share), {
        "not divided": (mean(share**0), "3 means were added, so the gradient is "
            f"{mean(share**0).norm() / mean(share).norm():.1f} times too long. Multiply by shares"),
        "divided twice": (mean(share**2), "each share was multiplied twice: too short a gradient"),
        "gradients zeroed in each batch": ((mean(last), mean(last * share)), "only the last batch "
            "is left. Zero once for all batches, after the step"),
        "all batches count the same": (mean(share**0 / 3), "the last has 1 of 5 windows: 1/5"),
    }, what="gradient")
    diagnose(got, share @ torch.stack(losses), what="loss")

def grade_train(gpt):
    gpt.COMPILE = False
    char.Bigram.init = "pretrained"
    char.grade_train(gpt)


# --- Generation -----------------------------------------------------------------------------------
@torch.no_grad()
def grade_generate(gpt):
    model, sent, seen = randomize(gpt.LM(**SIZES | {"dropout": 0.5})), [], []
    def watch(block, inputs):
        n, held = inputs[0].shape[1], getattr(inputs[1], "length", 0)
        require(not torch.is_grad_enabled(), "gradients in evaluation: put @torch.no_grad() above")
        require(not held or n == 1, f"sent again: {held} tokens are in the cache, only 1 is new")
        sent.append(n)
    def choose(row, *options):  # instead of next_token_probabilities: all tokens are likely
        require(options == (0.5, 2, 0.9), f"options ignored: it gets {options}, not (0.5, 2, 0.9)")
        seen.append(row.clone())
        return torch.ones(6) / 6
    def logits(first=slice(-8, None), cut=slice(-4, None), window=slice(None), V=6):
        rows, ids = [], prompt[first]
        for token in tokens:
            rows.append(model(torch.tensor([ids[window]]))[0][0, -1].index_fill(
                0, torch.arange(V, 8), -torch.inf))
            ids = [*ids, token][cut if len(ids) == 8 else slice(None)]
        return torch.stack(rows)
    gpt.Tokenizer.vocab_size, gpt.next_token_probabilities = 6, choose
    for prompt in ([3, 1, 4], [3, 1, 4, 1, 5, 0, 2, 2, 5]):
        hook, before = model.train().blocks[0].register_forward_pre_hook(watch), [*prompt]
        with torch.enable_grad():
            tokens = [int(token) for token in gpt.generate(model, prompt, 9, 0.5, 2, 0.9)]
        hook.remove()
        require(not model.training, "dropout on in evaluation: call model.eval() first")
        require(prompt == before, f"caller's list changed: {before} became {prompt}")
        require(len({*tokens}) > 1, "always argmax: draw a token, with torch.multinomial")
        diagnose(torch.stack(seen), logits(), {
            "prompt cut at the wrong end": (logits(first=slice(8)), "the last 8 tokens count"),
            "only the last token, without a cache": (logits(window=slice(-1, None)), "the model "
                "has forgotten all the others"),
            "newer half dropped": (logits(cut=slice(4)), "the text goes on after the newest"),
            "one token dropped at a time": (logits(cut=slice(-8, None)), "all 8 computed each time"),
            "ids beyond the vocabulary": (logits(V=8), "tokens 6 and 7 do not exist: -inf"),
        }, what="logits after each token")
        require(sum(sent) < 24, f"no cache: {sent} tokens went through; mostly only 1 is new")
        seen.clear(), sent.clear()

def grade_stream(gpt):
    ids, right, taken = [*"aé→🙂".encode(), 258, 0xE2, 0x86], "aé→🙂 th\ufffd", []
    tokenizer = small_tokenizer(gpt)
    got = "".join(gpt.stream(tokenizer, ids))
    require(got.count("\ufffd") < 2, f"broken character: {got!r}. One can have several tokens: wait")
    require(got != right[:-1], "end lost: the text ends inside a character; show \ufffd for it")
    require(got == right, f"result: {got!r} instead of {right!r}")
    next(piece for piece in gpt.stream(tokenizer, (taken.append(i) or i for i in ids)) if piece)
    require(len(taken) == 1, f"waits: the first text came after {len(taken)} tokens, not after 1")


# --- Pieces, mistakes, other solutions ------------------------------------------------------------
PIECES = [Piece(name, " ".join(f"{name}.{method}" for method in methods.split()) or name, grade, task)
          for name, methods, grade, task in (
    ("Tokenizer", "__init__ encode decode", grade_tokenizer, "ids of any text, the text of ids"),
    ("read_pieces", "", grade_read_pieces, "yield pieces that end before white space"),
    ("load_tokens", "", grade_load_tokens, "encode once into a file, then map it"),
    ("split_text", "", grade_split_text, "training part, and validation part after it"),
    ("get_batch", "", grade_get_batch, "random windows, and the token after each, int64"),
    ("Head", "forward", grade_head, "attention in one function; one query sees all"),
    ("Cache", "__init__ append", grade_cache, "store the new ones, return all"),
    ("MultiHead", "__init__ forward", grade_attention, "as before; qkv has biases; use the cache"),
    ("FeedForward", "__init__ forward", grade_feed_forward, "two layers, GPT-2's gelu between them"),
    ("Block", "__init__ forward", grade_attention, "as before; the cache is for attention"),
    ("LM", "__init__ tie_weights", grade_lm_init, "layers, tied; GPT-2's start"),
    ("LM.forward", "", grade_lm_forward, "as before; with caches, what comes after them"),
    ("openai_name", "", grade_load_pretrained, "replace the parts of the name"),
    ("load_pretrained", "", grade_load_pretrained, "read, rename, transpose, fill an LM, tie"),
    ("estimate_loss", "", grade_estimate_loss, "the mean loss of tokens from a file"),
    ("make_optimizers", "", grade_make_optimizers, "AdamW; weight decay for matrices only"),
    ("get_lr", "", char.grade_get_lr, "a line up, then a line down"),
    ("train_step", "", grade_train_step, "add the gradients of batches, then one step"),
    ("train", "", grade_train, "steps, evaluations, saves, and the best model at the end"),
    ("next_token_probabilities", "", char.grade_next_token_probabilities, "temperature, top_k, top_p"),
    ("generate", "", grade_generate, "predict with caches, draw, yield; drop the older half"),
    ("stream", "", grade_stream, "the text of tokens, each character whole"))]
UNGRADED = {"parallelize", "for_generation", "write_sample"}  # engineering; test_gpt2.py has tests
MISTAKES = [  # (piece, name, old text, new text)
    ("Tokenizer", "special text split", 'encode(text, allowed_special="all")', "encode_ordinary(text)"),
    ("Tokenizer", "broken character", "self.encoding.decode(list(ids))", '"".join(self.encoding.decode([i]) for i in ids)'),
    ("read_pieces", "word cut", "place.end() if place else len(rest)", "len(rest)"),
    ("read_pieces", "white space left behind", r"\S(?=[ \n])", r"\S\s"),
    ("load_tokens", "header as ids", "[32:]", ""),
    ("load_tokens", "old file", "if found != key:", "if not found:"),
    ("split_text", "split overlaps", "tokens[cut : cut +", "tokens[cut - 1 : cut +"),
    ("get_batch", "dtype", "device, torch.int64", "device"),
    ("Head", "mask on a single query", "q.shape[-2] > 1", "True"),
    ("Cache", "one position off", "= self.length,", "= max(0, self.length - 1),"),
    ("Cache", "keys and values swapped", "return self.k[", "return self.v["),
    ("Cache", "earlier ones lost", "return self.k[:, :, : self.length], self.v[:, :, : self.length]", "return k, v"),
    ("MultiHead", "cache not used", "k, v = cache.append(k, v)", "cache.append(k, v)"),
    ("MultiHead", "biases", "bias=qkv_bias", "bias=False"),
    ("FeedForward", "exact gelu", ', approximate="tanh"', ""),
    ("FeedForward", "relu instead of gelu", 'gelu(self.expand(x), approximate="tanh")', "relu(self.expand(x))"),
    ("Block", "cache not used", "(self.ln1(x), cache)", "(self.ln1(x))"),
    ("LM", "not tied", "self.tie_weights()", "pass"),
    ("LM", "copied instead of shared", "= self.token_embedding.weight", ".data = self.token_embedding.weight.clone()"),
    ("LM", "residual projections not scaled", "0.02 / (2 * n_layers) ** 0.5", "0.02"),
    ("LM.forward", "positions restart", "caches[0].length if caches else 0", "0"),
    ("LM.forward", "one position off", "caches[0].length if", "caches[0].length + 1 if"),
    ("LM.forward", "cache not passed", "block(x, cache)", "block(x)"),
    ("LM.forward", "all positions", "x[:, -1:] if caches else x", "x"),
    ("openai_name", "name", '("ln2", "ln_2")', '("ln2", "ln_1")'),
    ("load_pretrained", "not transposed", "part.t().contiguous() if is_turned else part", "part"),
    ("load_pretrained", "square matrices not transposed", '".c_" in name and', "len({*part.shape}) > 1 and"),
    ("load_pretrained", "lm_head not tied", "model.tie_weights()", "pass"),
    ("estimate_loss", "mean of means", "n = (targets != -100).sum().item()", "n = targets.numel()"),
    ("make_optimizers", "weight decay", '"weight_decay": 0.0', '"weight_decay": WEIGHT_DECAY'),
    ("train_step", "not divided", "* (len(xs) / len(x))", ""),
    ("train_step", "gradients zeroed in each batch", "loss.backward()", "model.zero_grad(); loss.backward()"),
    ("train", "validation text", 'splits["train"], TOKENS', 'splits["val"], TOKENS'),
    ("generate", "sent again", "new = ids[-1:]", "new = ids"),
    ("generate", "newer half dropped", "[-max(1, model.block_size // 2) :]", "[: model.block_size // 2]"),
    ("generate", "prompt cut at the wrong end", "[-model.block_size :]", "[: model.block_size]"),
    ("generate", "no cache", "new = ids[-1:]", "new, caches = ids, [Cache(model.block_size) for _ in model.blocks]"),
    ("stream", "broken character", "yield decoder.decode(tok", "yield decoder.decode(final=True, input=tok"),
]
VARIANTS = [  # (piece, old text, new text): correct, too
    ("Tokenizer", 'encode(text, allowed_special="all")', 'encode_batch([text], allowed_special="all")[0]'),
    ("Tokenizer", "encoding.decode(list(ids))", 'encoding.decode_bytes([*ids]).decode(errors="replace")'),
    ("read_pieces", r".*\S(?=[ \n])", r"[\s\S]*[^\s](?=\s)"),
    ("load_tokens", 'array("H", ids)', 'b"".join(i.to_bytes(2, "little") for i in ids)'),
    ("split_text", "tokens[cut : cut + max_val_tokens]", "tokens[cut:][:max_val_tokens]"),
    ("get_batch", ".to(device, torch.int64)", ".long().to(device)"),
    ("Head", "q.shape[-2] > 1)", "q.shape[2] == k.shape[2])"),
    ("Head", "F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)", "(q @ k.mT / "
     "q.shape[-1] ** 0.5 + torch.full((k.shape[2],) * 2, -math.inf).triu(1)[-q.shape[2] :]).softmax(-1) @ v"),
    ("Head", "F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)", "torch.stack([torch.einsum("
     "'bhd,bhsd->bhs', q[:, :, -t], k[:, :, : k.shape[2] + 1 - t]).div(math.sqrt(q.shape[3])).softmax(-1).unsqueeze(2)"
     ".matmul(v[:, :, : k.shape[2] + 1 - t])[:, :, 0] for t in range(q.shape[2], 0, -1)], 2)"),
    ("Cache", "self.v[:, :, start : self.length] = v", "self.v.narrow(2, start, v.shape[2]).copy_(v)"),
    ("Cache", "(k.new_empty(B, H, self.block_size, hs) for _ in \"kv\")", "torch.zeros(2, B, H, self.block_size, hs)"),
    ("MultiHead", "self.qkv(x).split(C, dim=-1)", "self.qkv(x).chunk(3, dim=-1)"),
    ("MultiHead", ".transpose(1, 2).reshape(B, T, C)", ".permute(0, 2, 1, 3).flatten(2)"),
    ("MultiHead", ".view(B, T, self.n_heads, -1).transpose", ".unflatten(2, (self.n_heads, -1)).transpose"),
    ("FeedForward", 'F.gelu(self.expand(x), approximate="tanh")', 'nn.GELU("tanh")(self.expand(x))'),
    ("FeedForward", 'F.gelu(self.expand(x), approximate="tanh")', "(h := self.expand(x)) * (1.5957691 * (h + 0.044715 * h**3)).sigmoid()"),
    ("FeedForward", "self.shrink(F", "F.linear(bias=self.shrink.bias, weight=self.shrink.weight, input=F"),
    ("Block", "x + self.attention(self.ln1(x), cache)", "self.attention(self.ln1(x), cache=cache).add(x)"),
    ("LM", "lm_head.weight = self.token_embedding.weight", "token_embedding.weight = self.lm_head.weight"),
    ("LM", "0.02 / (2 * n_layers) ** 0.5", "0.02 * math.sqrt(0.5 / n_layers)"),
    ("LM", "nn.init.zeros_(p)", "p.data.fill_(0.0)"),
    ("LM.forward", "position_embedding.weight[past:end]", "position_embedding(torch.arange(past, end))"),
    ("LM.forward", "self.lm_head(x).float()", 'torch.einsum("btc,vc->btv", x, self.token_embedding.weight)'),
    ("LM.forward", "F.cross_entropy(logits.", "F.nll_loss(logits.log_softmax(-1)."),
    ("load_pretrained", "part.t().contiguous() if is_turned", 'torch.einsum("ij->ji", part) if is_turned'),
    ("estimate_loss", "(targets != -100).sum().item()", "int((targets >= 0).sum())"),
    ("make_optimizers", "betas=BETAS, fused=True", "betas=BETAS"),
    ("train_step", "* (len(xs) / len(x))", "/ len(x) * len(xs)"),
    ("train_step", "loss.backward()", "torch.autograd.backward(loss)"),
    ("generate", "torch.tensor([new], device", "torch.as_tensor(new).view(1, -1).to(device"),
    ("generate", "[-max(1, model.block_size // 2) :]", "[len(ids) - model.block_size // 2 :]"),
    ("stream", 'getincrementaldecoder("utf-8")("replace")', 'lookup("utf8").incrementaldecoder(errors="replace")'),
]
