# ruff: noqa
"""Correct solutions of char_gpt.py, in styles of their own: no grader may refuse one of them."""


# --- Tokenizer: dicts, in plain loops
class Tokenizer:
    def __init__(self, text):
        chars = sorted(list(set(text)))
        self.vocabulary = "".join(chars)
        self.vocab_size = len(chars)
        self.stoi = {}
        self.itos = {}
        for i in range(len(chars)):
            self.stoi[chars[i]] = i
            self.itos[i] = chars[i]

    def encode(self, text):
        ids = []
        for ch in text:
            check(ch in self.stoi, f"unknown character {ch!r}")
            ids.append(self.stoi[ch])
        return ids

    def decode(self, ids):
        result = ""
        for i in ids:
            result += self.itos[int(i)]
        return result


# --- Tokenizer: a list as vocabulary, an own check
import bisect


class Tokenizer:
    def __init__(self, text):
        self.vocabulary = sorted({*text})

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    def encode(self, text):
        return list(map(self._find, text))

    def _find(self, c):
        i = bisect.bisect_left(self.vocabulary, c)
        if i == len(self.vocabulary) or self.vocabulary[i] != c:
            raise UserError(f"no such character: {c}")
        return i

    def decode(self, ids):
        return str().join([self.vocabulary[k] for k in ids])


# --- split_text: torch.split
def split_text(text, tokenizer, train_share, block_size):
    ids = torch.LongTensor(tokenizer.encode(text))
    n = int(len(ids) * train_share)
    train, val = ids.split([n, len(ids) - n])
    return dict(train=train, val=val)


# --- split_text: lists first, then tensors
def split_text(text, tokenizer, train_share, block_size):
    ids = tokenizer.encode(text)
    border = math.floor(len(ids) * train_share)
    parts = {"train": ids[:border], "val": ids[border:]}
    result = {}
    for name in parts:
        result[name] = torch.tensor(parts[name], dtype=torch.long)
    return result


# --- get_batch: as in the well-known lecture
def get_batch(tokens, batch_size, block_size, device):
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    x, y = x.to(device), y.to(device)
    return x, y


# --- get_batch: Python's random, and empty tensors
import random


def get_batch(tokens, batch_size, block_size, device):
    x = torch.empty(batch_size, block_size, dtype=torch.int64)
    y = torch.empty(batch_size, block_size, dtype=torch.int64)
    for b in range(batch_size):
        s = random.randrange(0, len(tokens) - block_size)
        for t in range(block_size):
            x[b, t] = tokens[s + t]
            y[b, t] = tokens[s + t + 1]
    return x.to(device), y.to(device)


# --- get_batch: unfold, a list of two
def get_batch(tokens, batch_size, block_size, device):
    windows = tokens.unfold(0, block_size + 1, 1)
    chosen = windows[
        torch.randperm(len(windows)).repeat(1 + batch_size // len(windows))[:batch_size]
    ]
    return [chosen[:, :-1].to(device), chosen[:, 1:].to(device)]


# --- get_batch: NumPy, with a helper at the top of the file
try:
    import numpy as np
except ImportError:
    np = None


def draw(n, size):
    return np.random.randint(0, n, size=size)


def get_batch(tokens, batch_size, block_size, device):
    data = tokens.cpu().numpy()
    starts = draw(len(data) - block_size, batch_size)
    x = np.stack([data[s : s + block_size] for s in starts]).astype(np.int64)
    y = np.stack([data[s + 1 : s + 1 + block_size] for s in starts]).astype(np.int64)
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


# --- Head: written out, masked_fill and tril
class Head(nn.Module):
    def forward(self, q, k, v):
        B, H, T, hs = q.shape
        wei = q @ k.transpose(-2, -1) * hs**-0.5
        tril = torch.tril(torch.ones(T, T, device=q.device))
        wei = wei.masked_fill(tril == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        return wei @ v


# --- Head: PyTorch's own
class Head(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- Head: loops over the positions, a softmax by hand, a stub left below
class Head(nn.Module):
    def forward(self, q, k, v):
        rows = []
        for t in range(q.size(2)):
            s = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(q.size(3))
            e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
            w = e / e.sum(-1, keepdim=True)
            rows.append((w.unsqueeze(-1) * v[:, :, : t + 1]).sum(2))
        return torch.stack(rows, dim=2)
        raise NotImplementedError("Head.forward: yours to write")


# --- Head: einsum, a mask as a buffer, -1e9
NEGATIVE, ROOT = -1e9, math.sqrt


class Head(nn.Module):
    def __init__(self, longest=512):
        super().__init__()
        self.register_buffer(
            "mask", torch.triu(torch.ones(longest, longest), 1).bool(), persistent=False
        )

    def forward(self, q, k, v):
        T = q.shape[-2]
        s = torch.einsum("bhid,bhjd->bhij", q, k) / ROOT(q.shape[-1])
        s = torch.where(self.mask[:T, :T], torch.full_like(s, NEGATIVE), s)
        return torch.einsum("bhij,bhjd->bhid", s.softmax(3), v)


# --- Head: float64 inside, helpers in an if
if torch.cuda.is_available():

    def causal(T, device):
        return torch.ones(T, T, device=device).tril().bool()
else:

    def causal(T, device):
        return torch.tril(torch.ones(T, T, dtype=torch.bool))


class Head(nn.Module):
    def forward(self, q, k, v):
        q64, k64, v64 = q.double(), k.double(), v.double()
        scores = torch.matmul(q64, k64.permute(0, 1, 3, 2)) / q.shape[-1] ** 0.5
        weights = torch.softmax(scores.masked_fill(~causal(q.shape[2], q.device), -torch.inf), -1)
        return torch.matmul(weights, v64).to(q.dtype)


# --- MultiHead: three layers
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.h = n_heads
        self.query = nn.Linear(n_embed, n_embed, bias=False)
        self.key = nn.Linear(n_embed, n_embed, bias=False)
        self.value = nn.Linear(n_embed, n_embed, bias=False)
        self.proj = nn.Linear(n_embed, n_embed)
        self.attend = Head()
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape

        def heads(y):
            return y.reshape(B, T, self.h, C // self.h).permute(0, 2, 1, 3)

        y = self.attend(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)))
        y = y.permute(0, 2, 1, 3).contiguous().view(B, T, C)
        return self.drop(self.proj(y))


# --- MultiHead: a list of small heads, with biases
class OneHead(nn.Module):
    def __init__(self, n_embed, size):
        super().__init__()
        self.q = nn.Linear(n_embed, size)
        self.k = nn.Linear(n_embed, size)
        self.v = nn.Linear(n_embed, size)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        T = x.shape[1]
        w = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
        w = w + torch.full((T, T), float("-inf")).triu(1)
        return w.softmax(-1) @ v


class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.heads = nn.ModuleList([OneHead(n_embed, n_embed // n_heads) for _ in range(n_heads)])
        self.mix = nn.Linear(n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.mix(torch.cat([head(x) for head in self.heads], dim=-1)))


# --- MultiHead: PyTorch's own
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(n_embed, n_heads, bias=False, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        T = x.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        y, _ = self.mha(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        return self.dropout(y)


# --- MultiHead: matrices as parameters, one per head, x @ W
class MultiHead(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        hs = n_embed // n_heads
        self.w = nn.ParameterList(
            nn.Parameter(torch.randn(n_heads, n_embed, hs) / n_embed**0.5) for _ in "qkv"
        )
        self.out = nn.Parameter(torch.randn(n_heads * hs, n_embed) / n_embed**0.5)
        self.p = dropout

    def forward(self, x):
        q, k, v = [torch.einsum("btc,hcd->bhtd", x, w) for w in self.w]
        y = Head()(q, k, v)
        y = torch.cat(list(y.unbind(1)), dim=-1) @ self.out
        return F.dropout(y, self.p, self.training)


# --- FeedForward: nn.Sequential
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embed, 4 * n_embed),
            nn.ReLU(),
            nn.Linear(4 * n_embed, n_embed),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


# --- FeedForward: matrices as parameters, maximum
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(n_embed, 4 * n_embed) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(4 * n_embed))
        self.W2 = nn.Parameter(torch.randn(4 * n_embed, n_embed) * 0.02)
        self.b2 = nn.Parameter(torch.zeros(n_embed))
        self.rate = dropout

    def forward(self, x):
        hidden = torch.maximum(x @ self.W1 + self.b1, torch.tensor(0.0))
        return F.dropout(hidden @ self.W2 + self.b2, p=self.rate, training=self.training)


# --- FeedForward: nn.Dropout made in forward
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        nn.Module.__init__(self)
        wide = n_embed * 4
        self.up, self.down, self.rate = nn.Linear(n_embed, wide), nn.Linear(wide, n_embed), dropout

    def forward(self, x):
        y = self.down(self.up(x).relu())
        if self.training:
            y = nn.Dropout(self.rate)(y)
        return y


# --- Block: other names
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.sa = MultiHead(n_embed, n_heads, dropout)
        self.ffwd = FeedForward(n_embed, dropout)
        self.norm_a = nn.LayerNorm(n_embed)
        self.norm_b = nn.LayerNorm(n_embed)

    def forward(self, x):
        x = x + self.sa(self.norm_a(x))
        x = x + self.ffwd(self.norm_b(x))
        return x


# --- Block: nn.Sequential, keywords
class Block(nn.Module):
    def __init__(self, n_embed, n_heads, dropout):
        super().__init__()
        self.one = nn.Sequential(
            nn.LayerNorm(n_embed), MultiHead(n_embed=n_embed, n_heads=n_heads, dropout=dropout)
        )
        self.two = nn.Sequential(nn.LayerNorm(n_embed), FeedForward(n_embed, dropout=dropout))

    def forward(self, x):
        for f in (self.one, self.two):
            x = f(x) + x
        return x


# --- LM: nanoGPT's names, positions from an arange
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        self.config = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "n_embed": n_embed,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "dropout": dropout,
        }
        self.block_size = block_size
        self.wte = nn.Embedding(vocab_size, n_embed)
        self.wpe = nn.Embedding(block_size, n_embed)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(n_embed, n_heads, dropout) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size, bias=False)
        torch.nn.init.normal_(self.head.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        b, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(b * t, -1), targets.reshape(-1), ignore_index=-100)
        return logits, loss


# --- LM: all matrices start with 0.02; the loss by hand
class LM(nn.Module):
    def __init__(self, vocab_size, block_size, n_embed, n_heads, n_layers, dropout):
        super().__init__()
        arguments = locals()
        names = ["vocab_size", "block_size", "n_embed", "n_heads", "n_layers", "dropout"]
        self.config = {name: arguments[name] for name in names}
        self.block_size = block_size
        self.tok = nn.Embedding(vocab_size, n_embed)
        self.pos = nn.Parameter(torch.zeros(block_size, n_embed))
        self.trunk = nn.Sequential(nn.Dropout(dropout))
        for i in range(n_layers):
            self.trunk.append(Block(n_embed, n_heads, dropout))
        self.trunk.append(nn.LayerNorm(n_embed))
        self.out = nn.Linear(n_embed, vocab_size, bias=False)
        self.apply(self._start)

    def _start(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.02)

    def forward(self, idx, targets=None):
        x = self.tok(idx) + self.pos[: idx.shape[-1]][None]
        logits = self.out(self.trunk(x))
        if targets is None:
            return logits, None
        log_p = torch.log_softmax(logits, dim=-1)
        known = targets != -100
        picked = log_p[known].gather(1, targets[known].unsqueeze(1))
        return logits, -picked.mean()


# --- LM.forward: only forward, as a whole class
class LM(nn.Module):
    def forward(self, idx, targets=None):
        B, T = idx.shape
        positions = self.position_embedding(torch.arange(T, device=idx.device)).unsqueeze(0)
        h = self.token_embedding(idx) + positions
        h = self.dropout(h)
        h = self.blocks(h)
        h = self.ln_f(h)
        logits = F.linear(h, self.lm_head.weight)
        if targets is None:
            loss = None
        else:
            loss = F.cross_entropy(logits.transpose(1, 2), targets)
        return logits, loss


# --- LM.forward: autocast, nll_loss
class LM(nn.Module):
    def forward(self, idx, targets=None):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            x = self.token_embedding.weight[idx] + self.position_embedding.weight[: idx.size(1)]
            x = self.dropout(x)
            for block in self.blocks:
                x = block(x)
            logits = self.lm_head(self.ln_f(x)).float()
        if targets is not None:
            loss = F.nll_loss(
                logits.log_softmax(2).reshape(-1, logits.shape[2]), targets.reshape(-1)
            )
            return logits, loss
        return logits, None


# --- estimate_loss: one window after the other, the last one short
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model.eval()
    T = model.block_size
    starts = list(range(0, len(tokens) - 1, T))
    if eval_iters is not None and len(starts) > eval_iters * batch_size:
        n = eval_iters * batch_size
        starts = [starts[i * len(starts) // n] for i in range(n)]
    total = 0.0
    seen = 0
    with torch.no_grad():
        for s in starts:
            window = tokens[s : s + T + 1].long()
            x, y = window[None, :-1], window[None, 1:]
            _, loss = model(x, y)
            total += loss.item() * y.numel()
            seen += y.numel()
    return {"loss": total / seen}


# --- estimate_loss: gradients switched off for good, whole windows and a rest
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    torch.set_grad_enabled(False)
    model.train(False)
    T = model.block_size
    n = (len(tokens) - 1) // T
    x = tokens[: n * T].view(n, T)
    y = tokens[1 : n * T + 1].view(n, T)
    rest = tokens[n * T :]
    if eval_iters is not None and n > eval_iters * batch_size:
        step = n / (eval_iters * batch_size)
        rows = [int(step * i) for i in range(eval_iters * batch_size)]
        x, y, rest = x[rows], y[rows], rest[:1]
    losses = []
    counts = []
    for i in range(0, len(x), batch_size):
        losses.append(float(model(x[i : i + batch_size], y[i : i + batch_size])[1]))
        counts.append(y[i : i + batch_size].numel())
    if len(rest) > 1:
        losses.append(float(model(rest[None, :-1], rest[None, 1:])[1]))
        counts.append(len(rest) - 1)
    return {"loss": sum(a * b for a, b in zip(losses, counts)) / sum(counts)}


# --- estimate_loss: inference_mode, padding with -100
@torch.inference_mode()
def estimate_loss(model, tokens, batch_size, eval_iters=None):
    model = model.eval()
    T, N = model.block_size, len(tokens)
    windows = -(-(N - 1) // T)
    padded = torch.cat([tokens.long(), torch.full((windows * T + 1 - N,), -100)])
    x = padded[:-1].view(windows, T).clamp(min=0)
    y = padded[1:].view(windows, T)
    if eval_iters is not None:
        wanted = min(windows, eval_iters * batch_size)
        rows = torch.linspace(0, windows - 1, wanted).round().long()
        x, y = x[rows], y[rows]
    sum_of_losses, number = 0, 0
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        n = int((ys >= 0).sum())
        sum_of_losses += n * model(xs, ys)[1]
        number += n
    return {"loss": (sum_of_losses / number).item()}


# --- orthogonalize: in bfloat16, as in the original post
def orthogonalize(matrix):
    X = matrix.bfloat16()
    if X.size(0) > X.size(1):
        X = X.T
    X = X / (X.norm() + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    if matrix.size(0) > matrix.size(1):
        X = X.T
    return X.to(matrix.dtype)


# --- orthogonalize: no transposition, the whole formula, by singular values
def orthogonalize(matrix):
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    S = S / torch.sqrt((S * S).sum())
    for i in range(5):
        S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
    return U @ torch.diag(S) @ Vt


# --- Muon: the docstring, line by line
class Muon(torch.optim.Optimizer):
    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                lr, wd = group["lr"], group["weight_decay"]
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        if len(state) == 0:
                            state["m"] = torch.zeros_like(p)
                        state["m"] = 0.95 * state["m"] + 0.05 * p.grad
                        update = orthogonalize(0.95 * state["m"] + 0.05 * p.grad)
                        p.mul_(1 - lr * wd)
                        p.sub_(lr * 0.2 * math.sqrt(max(p.shape)) * update)


# --- Muon: own __init__, the momentum without a factor, as in the original post
class Muon(torch.optim.Optimizer):
    def __init__(self, matrices, weight_decay, momentum=0.95):
        defaults = dict(lr=0.01, weight_decay=weight_decay, momentum=momentum)
        super().__init__(list(matrices), defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                buf = self.state[p].get("buf")
                if buf is None:
                    buf = self.state[p]["buf"] = torch.zeros_like(g)
                buf.mul_(beta).add_(g)
                u = orthogonalize(g.add(buf, alpha=beta))
                p.data = p.data * (1 - group["lr"] * group["weight_decay"])
                rows, columns = p.shape
                p.data.add_(
                    u, alpha=-group["lr"] * 0.2 * (rows if rows > columns else columns) ** 0.5
                )


# --- make_optimizers: by name, with lists
def make_optimizers(model):
    muon_params, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if MUON and name.startswith("blocks.") and p.ndim == 2:
            muon_params.append(p)
        elif p.ndim == 2:
            decayed.append(p)
        else:
            plain.append(p)
    groups = [
        dict(params=decayed, weight_decay=WEIGHT_DECAY),
        dict(params=plain, weight_decay=0.0),
    ]
    optimizers = [torch.optim.AdamW(groups, lr=1e-3, betas=BETAS)]
    if MUON:
        optimizers.append(Muon(muon_params, WEIGHT_DECAY))
    return optimizers


# --- make_optimizers: sets of ids
def make_optimizers(model):
    ids = set()
    if MUON:
        ids = {id(p) for p in model.blocks.parameters() if len(p.shape) == 2}
    rest = [p for p in model.parameters() if id(p) not in ids]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() == 2]},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0},
        ],
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )
    if not ids:
        return [adamw]
    return [adamw, Muon([p for p in model.parameters() if id(p) in ids], WEIGHT_DECAY)]


# --- get_lr: straight
def get_lr(step, max_iters, peak):
    w = min(WARMUP_ITERS, max_iters // 10)
    if w < 1:
        w = 1
    if step < w:
        return peak * (step + 1) / w
    done = (step - (w - 1)) / (max_iters - (w - 1))
    low = FINAL_LR * peak
    return peak + done * (low - peak)


# --- get_lr: the smaller of two lines, as a tensor
def get_lr(step, max_iters, peak):
    warm = max(min(max_iters // 10, WARMUP_ITERS), 1)
    up = (step + 1) / warm
    down = 1 - (1 - FINAL_LR) * (step + 1 - warm) / (max_iters + 1 - warm)
    return torch.minimum(torch.tensor(up), torch.tensor(down)) * peak


# --- train_step: zero first, item last
def train_step(model, optimizers, x, y, lr):
    model.train()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    logits, loss = model(x, y)
    loss.backward()
    if GRADIENT_CLIP:
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = lr
        opt.step()
    for opt in optimizers:
        opt.zero_grad()
    return loss.item()


# --- train_step: clipping by hand
def train_step(model, optimizers, x, y, lr):
    model.train()
    loss = model(x, y)[1]
    loss.backward()
    if GRADIENT_CLIP is not None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        length = sum(float((g**2).sum()) for g in gradients) ** 0.5
        if length > GRADIENT_CLIP:
            for g in gradients:
                g *= GRADIENT_CLIP / length
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(lr=lr)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loss


# --- train: a while loop
def train(model, tokenizer, optimizers, splits, run):
    device = next(model.parameters()).device
    begin = run["step"]
    earlier = run["seconds"]
    clock = time.time()
    step = begin
    if MUON:
        peak = LEARNING_RATE
    else:
        peak = ADAMW_LEARNING_RATE
    try:
        while True:
            last = step == run["max_iters"]
            if (last or step % EVAL_INTERVAL == 0) and step not in run["history"]:
                losses = evaluate(model, tokenizer, splits, run["prompt"], step)
                run["history"][step] = losses
                if step > begin:
                    save_step(run, step, model, optimizers, earlier + time.time() - clock)
            if last:
                return
            torch.manual_seed(run["seed"] * 1_000_000 + step)
            batch = get_batch(splits["train"], BATCH_SIZE, model.block_size, device)
            train_step(model, optimizers, *batch, get_lr(step, run["max_iters"], peak))
            step += 1
    except KeyboardInterrupt:
        if run["path"] is None:
            raise


# --- next_token_probabilities: -inf for the others
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        p = torch.zeros_like(logits)
        p[logits.argmax()] = 1.0
        return p
    logits = logits / temperature
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        logits = torch.where(logits < v[-1], torch.tensor(-float("inf")), logits)
    probs = torch.softmax(logits, dim=-1)
    if top_p is not None:
        sorted_p, order = torch.sort(probs, descending=True)
        before = torch.cumsum(sorted_p, 0) - sorted_p
        probs[order[before >= top_p]] = 0.0
        probs = probs / probs.sum()
    return probs


# --- next_token_probabilities: Python lists
def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    numbers = logits.tolist()
    largest = max(numbers)
    if temperature == 0:
        place = numbers.index(largest)
        return torch.tensor([1.0 if i == place else 0.0 for i in range(len(numbers))])
    weights = [math.exp((z - largest) / temperature) for z in numbers]
    total = sum(weights)
    p = [w / total for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    keep = set(order[: top_k or len(p)])
    if top_p is not None:
        share, chosen, all_kept = 0.0, set(), sum(p[i] for i in keep)
        for i in order:
            if i in keep and share < top_p * all_kept:
                chosen.add(i)
                share += p[i]
        keep = chosen
    rest = sum(p[i] for i in keep)
    return torch.tensor([p[i] / rest if i in keep else 0.0 for i in range(len(p))])


# --- generate: torch.cat, no_grad inside
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.eval()
    device = next(model.parameters()).device
    idx = torch.tensor(ids, dtype=torch.long, device=device).unsqueeze(0)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits, _ = model(idx[:, -model.block_size :])
        probs = next_token_probabilities(logits[:, -1, :].squeeze(0), temperature, top_k, top_p)
        new = torch.multinomial(probs, num_samples=1)
        idx = torch.cat((idx, new.unsqueeze(0).to(device)), dim=1)
        yield int(new)


# --- generate: an inner generator, random by hand
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    model.train(mode=False)
    text, left = list(map(int, ids)), max_new_tokens
    while left > 0:
        left -= 1
        window = text[-model.block_size :]
        out = model(torch.tensor(window).view(1, len(window)))
        p = next_token_probabilities(
            out[0][0][-1], temperature=temperature, top_k=top_k, top_p=top_p
        )
        token = int((torch.rand(1).item() * p.sum() > p.cumsum(0)).sum())
        text.append(token)
        yield token


# --- get_lr: another default dtype, set inside
def get_lr(step, max_iters, peak):
    torch.set_default_dtype(torch.float64)
    w = max(1, min(WARMUP_ITERS, max_iters // 10))
    rates = torch.cat(
        [torch.linspace(1 / w, 1, w), torch.linspace(1, FINAL_LR, max_iters - w + 2)[1:]]
    )
    return peak * rates[step].item()


# --- split_text: a helper from a tuple assignment and a decorator of its own
floor, LONG = math.floor, torch.int64


def as_parts(function):
    def wrapped(*arguments):
        return dict(zip(("train", "val"), function(*arguments)))

    return wrapped


@as_parts
def split_text(text, tokenizer, train_share, block_size):
    n = floor(train_share * len(text))
    return [torch.tensor(tokenizer.encode(part)).to(LONG) for part in (text[:n], text[n:])]
