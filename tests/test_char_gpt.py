"""char_gpt.py against independent code, slow loops, and numbers worked out by hand."""

import doctest
import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, assert_one_line_error, edited_copy, load_fresh, run_child
from matplotlib.figure import Figure
from torch import nn

CPU = torch.device("cpu")
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TINY = {
    "DEVICE": "cpu", "N_EMBED": 32, "N_LAYERS": 2, "N_HEADS": 2, "BLOCK_SIZE": 16, "BATCH_SIZE": 4,
    "EVAL_ITERS": 2, "SAMPLE_TOKENS": 20, "MAX_ITERS": 20, "EVAL_INTERVAL": 20, "DROPOUT": 0.0,
    "WARMUP_ITERS": 2,
}  # fmt: skip


@pytest.fixture
def gpt(monkeypatch, tmp_path):
    """The module, imported anew, without bfloat16, so that comparisons can be tight."""
    module = load_fresh("char_gpt")
    module.has_bfloat16 = lambda device: False
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return module


@pytest.fixture
def model(gpt):
    """A small model that has left its initial symmetry, in eval mode."""
    model = gpt.LM(vocab_size=11, block_size=8, n_embed=16, n_heads=4, n_layers=2, dropout=0.5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def train_tiny(gpt, text=TEXT[:20_000], flags=(), **constants):
    """Train on a short text; returns (results, weights of the last step)."""
    for name, value in (TINY | constants).items():
        assert hasattr(gpt, name), name
        setattr(gpt, name, value)
    with open("t.txt", "w", encoding="utf-8") as file:
        file.write(text)
    results = gpt.main(["--data", "t.txt", *flags])
    return results, newest(gpt)["last"]


def newest(gpt):
    """Return what the newest run's file holds."""
    return gpt.read_run(gpt.saved_runs()[-1])


# --- the model against somebody else's ------------------------------------------------------------


def test_model_equals_transformers(gpt):
    """The whole model: embeddings, blocks, LayerNorm, output layer, loss, and all gradients."""
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="relu", tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    ours = gpt.LM(vocab_size=11, block_size=8, n_embed=16, n_heads=4, n_layers=2, dropout=0.0)
    names = [
        ("token_embedding", "wte"), ("position_embedding", "wpe"), ("blocks.", "h."),
        ("ln1", "ln_1"), ("ln2", "ln_2"), ("attention.qkv", "attn.c_attn"),
        ("attention.projection", "attn.c_proj"), ("feed_forward.expand", "mlp.c_fc"),
        ("feed_forward.shrink", "mlp.c_proj"),
    ]  # fmt: skip
    parameters = dict(theirs.named_parameters())
    pairs = []
    for name, our in ours.named_parameters():
        for a, b in names:
            name = name.replace(a, b)
        their = parameters[name if name in parameters else f"transformer.{name}"]
        turned = ".c_" in name and their.dim() == 2
        with torch.no_grad():
            nn.init.normal_(our, std=0.3)
            their.copy_(our.t() if turned else our)
        pairs.append((our, their, turned))
    with torch.no_grad():  # theirs has a bias on queries, keys and values
        for block in theirs.transformer.h:
            block.attn.c_attn.bias.zero_()
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    logits, loss = ours(idx, targets)
    their_logits = theirs(idx).logits
    close(logits, their_logits)
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    assert len(pairs) == 27
    for our, their, turned in pairs:
        close(our.grad, their.grad.t() if turned else their.grad, 3e-5)


def test_loss_by_hand(model):
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    targets[0, :5] = -100
    logits, loss = model(idx, targets)
    assert (logits.shape, logits.dtype) == ((3, 8, 11), torch.float32)
    p = (logits.exp() / logits.exp().sum(-1, keepdim=True)).detach()
    terms = [
        -math.log(p[b, t, targets[b, t]]) for b in range(3) for t in range(8) if b > 0 or t >= 5
    ]
    assert loss.item() == pytest.approx(sum(terms) / 19, abs=1e-5)
    assert model(idx)[1] is None and torch.equal(model(idx)[0], logits)


def test_dropout_in_training_only(gpt, model):
    idx = torch.randint(11, (2, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    x = torch.randn(1, 8, 16)
    for part in (model.blocks[0].attention, model.blocks[0].feed_forward):
        assert (part(x) == 0).float().mean() > 0.3  # p = 0.5
    embedded = []
    model.blocks.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    model(idx)
    assert (embedded[0] == 0).float().mean() > 0.3
    with pytest.raises(gpt.UserError, match="block_size = 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(gpt.UserError, match=r"N_HEADS = 4.*N_EMBED = 30"):
        gpt.MultiHead(30, 4, 0.0)


def test_bfloat16_where_the_hardware_computes_in_it(gpt, model):
    flags = torch.cpu.get_capabilities()
    expected = any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert load_fresh("char_gpt").has_bfloat16(CPU) == expected
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for answer in (True, False):
        gpt.has_bfloat16 = lambda device, answer=answer: answer
        assert model(torch.zeros(1, 3, dtype=torch.int64))[0].dtype == torch.float32
    assert dtypes == [torch.bfloat16, torch.float32]


def test_a_token_changes_nothing_before_it(model):
    idx = torch.randint(11, (1, 8))
    before, _ = model(idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        after, _ = model(changed)
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.equal(after[0, t:], before[0, t:])


def test_the_estimate_is_the_mean_over_every_target(gpt, model):
    """Whole or in part, it equals a slow loop; so it does for lengths that T does not divide."""
    for length in (2, 8, 9, 10, 50):
        tokens = torch.randint(11, (length,))
        losses = []
        for start in range(0, length - 1, 8):
            window = tokens[start : start + 9]
            logits, _ = model(window[None, :-1])
            losses.append(F.cross_entropy(logits[0], window[1:], reduction="none"))
        whole = torch.cat(losses).mean().item()
        for batch_size in (1, 2, 99):
            assert gpt.estimate_loss(model, tokens, batch_size)["loss"] == pytest.approx(whole)
    some = torch.cat([losses[0], losses[3]]).mean().item()  # 2 of 7 windows: 0 and 7 // 2
    assert gpt.estimate_loss(model, tokens, 1, eval_iters=2)["loss"] == pytest.approx(some)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_generate(gpt, model, temperature):
    """It draws from these probabilities, in eval mode, and feeds the last T tokens."""
    prompt, fed = list(range(11)), []

    def look(module, inputs):
        assert not torch.is_grad_enabled() and not module.training
        fed.append(inputs[0].tolist()[0])

    hook = model.register_forward_pre_hook(look)
    torch.manual_seed(5)
    new = list(gpt.generate(model.train(), prompt, 20, temperature))
    hook.remove()
    assert prompt == list(range(11)) and len(new) == 20  # the caller's list is not touched
    assert fed == [(prompt + new[:i])[-8:] for i in range(20)]
    torch.manual_seed(5)
    for window, token in zip(fed, new, strict=True):
        logits = model(torch.tensor([window]))[0][0, -1]
        greedy = logits.argmax().item()
        p = (logits / (temperature or 1)).softmax(-1)
        assert token == (torch.multinomial(p, 1).item() if temperature else greedy)
    with pytest.raises(gpt.UserError, match="no token"):
        next(gpt.generate(model, [], 1))


# --- training -------------------------------------------------------------------------------------


def slow_muon(p, gradients, lr, decay):
    """Muon in float32, written out from its papers, with the coefficients as they are published."""
    momentum = torch.zeros_like(p)
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / x.square().sum().sqrt()
        for _ in range(5):
            x = 3.4445 * x - 4.775 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        p = p * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(p.shape)) * x
    return p


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_equals_torch_and_a_slow_one(gpt, shape):
    start, gradients = torch.randn(shape), [torch.randn(shape) * 10.0**-i for i in range(5)]

    def after(optimizer_of):
        p = nn.Parameter(start.clone())
        optimizer = optimizer_of([p])
        optimizer.param_groups[0]["lr"] = 0.02
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        assert all(torch.equal(p.grad, g) for g in gradients[-1:])
        return p.detach() - start

    theirs = after(lambda ps: torch.optim.Muon(
        ps, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    ))  # fmt: skip
    ours = {}
    for gpt.has_bfloat16 in (lambda device: True, lambda device: False):
        ours[gpt.has_bfloat16(CPU)] = after(lambda ps: gpt.Muon(ps, 0.1))
    assert (ours[True] - theirs).norm() < 0.03 * theirs.norm()
    assert (ours[False] - theirs).norm() < 0.05 * theirs.norm()
    close(ours[False], slow_muon(start, gradients, 0.02, 0.1) - start)


def test_every_constant_of_training_reaches_it(gpt):
    _, before = train_tiny(gpt)
    _, again = train_tiny(gpt)
    assert all(torch.equal(before[name], again[name]) for name in before)
    for edit in (
        {"GRADIENT_CLIP": 1e-9}, {"LEARNING_RATE": 1e-4}, {"WARMUP_ITERS": 0}, {"DROPOUT": 0.3},
        {"BETAS": (0.8, 0.99)}, {"BETAS": (0.9, 0.9)}, {"WEIGHT_DECAY": 9.0}, {"BATCH_SIZE": 3},
        {"FINAL_LR": 0.5}, {"TRAIN_SHARE": 0.5}, {"MAX_ITERS": 19},
    ):  # fmt: skip
        unedited = {name: getattr(gpt, name) for name in edit}
        _, after = train_tiny(gpt, **edit)
        vars(gpt).update(unedited)
        assert any(not torch.equal(before[name], after[name]) for name in before), edit


# --- what the file says ---------------------------------------------------------------------------


def test_doctests(gpt):
    result = doctest.testmod(gpt)
    assert result.failed == 0 and result.attempted >= 8


def test_numbers_in_comments(gpt):
    source = " ".join((ROOT / "char_gpt.py").read_text(encoding="utf-8").split())
    shares = [math.exp(x) / sum(map(math.exp, (2, 1, 0))) for x in (2, 1, 0)]
    assert ", ".join(f"{share:.2f}" for share in shares) in source
    assert f"{-math.log(1 / 2):.2f} for p = 1/2" in source
    assert f"ln 65 = {math.log(65):.2f}" in source
    # One step downhill from w = 2 at the rate 0.1: the loss is w², its gradient 2w.
    w = torch.tensor(2.0, requires_grad=True)
    (loss := w.square()).backward()
    after = w.item() - 0.1 * w.grad.item()
    assert f"2 - 0.1 · {w.grad:.0f} = {after:.1f}" in source
    assert f"from {loss.item():.0f} to {after**2:.2f}" in source
    # The table in Head, row by row: query, scores with those keys, weights, result.
    rows = re.findall(r"^ +q=(\d) +(.*)$", gpt.Head.__doc__, flags=re.M)
    assert len(rows) == 3
    for t, (q, row) in enumerate(rows):
        scores = [int(q) * k if i <= t else -math.inf for i, k in enumerate((2, 0, 1))]
        weights = torch.tensor(scores, dtype=torch.float32).softmax(-1)
        result = (weights * torch.tensor([10.0, 20, 30])).sum().item()
        shown = re.findall(r"-inf|[\d.]+", row)[:7]
        for text, number in zip(shown, [*scores, *weights.tolist(), result], strict=True):
            assert float(text) == round(number, len(text.partition(".")[2])), row


def attention_weights(block, x):
    """Return what the heads of a block multiply v with, (B, H, T, T), written down once more."""
    q, k, _ = block.attention.qkv(x).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (q, k))  # 2 heads of 2 numbers
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(2)
    future = torch.ones(4, 4).triu(1).bool()
    return scores.masked_fill(future, -math.inf).softmax(-1)


def test_the_numbers_of_the_bricks(gpt):
    """Those of section 3: a layer, a gradient, LayerNorm, "if both are there"."""
    layer = torch.nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).T
    layer.bias.data = torch.tensor([10.0, 20.0])
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [15, 22]
    w, x = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ((w * x) ** 2).backward()
    assert (w.grad, x.grad) == (24, 36)
    for numbers in ([1.0, 3, 1, 3], [10.0, 30, 10, 30]):
        normed = torch.nn.LayerNorm(4)(torch.tensor(numbers))
        assert normed.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert F.relu(torch.tensor(a + b - 1)) == (a and b)
    a = torch.tensor([1.0, 1.0], requires_grad=True)  # a and b of Muon's 5 a² + b² / 2
    (5 * a[0] ** 2 + a[1] ** 2 / 2).backward()
    for rate, after in ((0.1, [0, 0.9]), (1, [-9, 0])):
        assert (a.detach() - rate * a.grad).tolist() == pytest.approx(after, abs=1e-6)


def test_the_example_that_goes_through_the_model(gpt):
    """The numbers of the map in section 3: a small LM that has learned one line."""
    gpt.MUON, gpt.WEIGHT_DECAY, gpt.GRADIENT_CLIP, gpt.BETAS = False, 0.5, 1.0, (0.9, 0.99)
    line = "to be or not to be"
    torch.manual_seed(1)
    tokenizer = gpt.Tokenizer(line)
    ids = torch.tensor(tokenizer.encode(line))
    model = gpt.LM(tokenizer.vocab_size, 4, n_embed=4, n_heads=2, n_layers=1, dropout=0.0)
    optimizers = gpt.make_optimizers(model)
    for _ in range(200):
        x, y = gpt.get_batch(ids, 8, 4, CPU)
        gpt.train_step(model, optimizers, x, y, 0.01)
    idx = torch.tensor([tokenizer.encode("to b")])
    block, position = model.blocks[0], model.position_embedding.weight
    with torch.no_grad():
        token = model.token_embedding(idx)
        x = token + position
        attention = block.attention(block.ln1(x))
        weights = attention_weights(block, block.ln1(x))[0, :, -1]
        _, _, v = block.attention.qkv(block.ln1(x)).chunk(3, dim=-1)
        averages = (weights[:, None] @ v.view(4, 2, 2).transpose(0, 1)).flatten()
        feed_forward = block.feed_forward(block.ln2(x + attention))
        end = x + attention + feed_forward
        logits = model(idx)[0][0, -1]
    rows = [idx[0], token[0, -1], position[-1], x[0, -1], *weights, averages]
    rows += [attention[0, -1], feed_forward[0, -1]]
    normed = F.layer_norm(end[0, -1], (4,))
    rows += [end[0, -1], normed, model.ln_f(end)[0, -1], logits, logits.softmax(-1)]
    source = (ROOT / "char_gpt.py").read_text(encoding="utf-8")
    _, _, example = source.partition("#   LM      the ids of")
    shown = []
    for comment in example.partition("class Head")[0].splitlines():
        row = re.search(r"((?: +-?\d+(?:\.\d\d)?(?= |$)){4,7})$", comment)
        if row:
            shown.append([float(number) for number in row[1].split()])
    assert [len(row) for row in shown] == [4] * 12 + [7] * 2
    for numbers, row in zip(shown, rows, strict=True):
        assert numbers == pytest.approx(row.tolist(), abs=0.02), numbers
    assert f"-ln {shown[-1][2]:.2f} = {-logits.log_softmax(-1)[2]:.2f}" in example
    assert tokenizer.vocabulary == " benort"
    q, k, _ = block.attention.qkv(block.ln1(x)).detach().chunk(3, dim=-1)
    gain, shift = model.ln_f.weight[0].item(), model.ln_f.bias[0].item()
    assert f"{gain:.2f} · {normed[0]:.2f} + {shift:.2f}" in example
    words = re.search(r"In head 1, the query.*?best", source.replace("\n#", ""), re.S)[0]
    told = [float(number) for number in re.findall(r"-?\d+\.\d\d", words)]
    query, keys = q[0, -1, :2], k[0, :, :2]  # of head 1
    scores = keys @ query / math.sqrt(2)
    product = [query[0], keys[1, 0], -query[1], keys[1, 1], scores[1]]
    numbers = [*query, *keys.flatten(), *product, *scores]
    assert told == pytest.approx([float(number) for number in numbers], abs=0.02)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model, block)]
    assert f"{sizes[0]} parameters" in example and sizes[1] == 68 + 148 + 2 * 8
    large = gpt.LM(65, 128, 128, 4, 4, 0.0)
    for part in (
        large,
        large.token_embedding,
        large.position_embedding,
        large.blocks[0],
        large.ln_f,
    ):
        assert f"{sum(p.numel() for p in part.parameters()):,}".replace(",", ",") in example


def test_the_example_of_muon(gpt):
    """Section 6: factors, what three optimizers make of them, and the rounds of Newton-Schulz."""
    gradient = torch.tensor([[5.5, 4.5], [4.5, 5.5]])
    assert (torch.tensor([1.0, 1]) @ gradient).tolist() == [10, 10]
    assert (torch.tensor([1.0, -1]) @ gradient).tolist() == [1, -1]
    assert torch.linalg.svdvals(gradient).tolist() == pytest.approx([10, 1])
    assert gradient.square().sum().item() == pytest.approx(101)
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = gradient
    torch.optim.AdamW([p], lr=1.0, weight_decay=0.0).step()
    close(-p.detach(), torch.ones(2, 2))
    close(gpt.orthogonalize(gradient), torch.tensor([[0.7, 0.0], [0.0, 0.7]]), 0.02)
    rows = re.findall(r"^ +s = ([\d.]+) +([\d. ]+)$", gpt.orthogonalize.__doc__, flags=re.M)
    assert len(rows) == 2
    for start, shown in rows:
        s, rounds = float(start), []
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            rounds.append(f"{s:.2f}")
        assert rounds == shown.split()


def test_the_sizes_of_q_and_k_at_the_start(gpt):
    """What Head's comment says of the scale: the scores have one size, whatever hs is."""
    for hs in (16, 256):
        x = torch.randn(1, 500, 256)
        attention = gpt.MultiHead(256, 256 // hs, 0.0)
        q, k, _ = attention.qkv(x).split(256, dim=-1)
        scores = q[..., :hs] @ k[..., :hs].transpose(-2, -1)
        assert (scores / hs**0.5).std().item() == pytest.approx(1 / 3, rel=0.1)


def test_the_plot(gpt, monkeypatch):
    """It shows the history, ln V, and at the end the exact loss that the screen shows as well."""
    figures, save = [], Figure.savefig
    both = lambda self, *a, **k: (figures.append(self), save(self, *a, **k))  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", both)
    results, _ = train_tiny(gpt, EVAL_INTERVAL=10)
    history = newest(gpt)["history"]
    (axes,) = figures[-1].axes
    train, val, uniform = axes.get_lines()
    for line, split in ((train, "train"), (val, "val")):
        assert line.get_label().startswith(split)
        assert line.get_xydata().tolist() == [[s, e[split]["loss"]] for s, e in history.items()]
    assert uniform.get_ydata() == pytest.approx([math.log(len(set(TEXT[:20_000])))] * 2)
    assert f"{results['val_loss']:.4f}" in axes.get_title()
    assert re.search(r"~\d", figures[0].axes[0].get_title())  # an estimate
    assert not re.search(r"~\d", axes.get_title())


def test_prompts_with_other_characters(gpt, tmp_path, capsys):
    greek = "αβγ δε\n" * 300
    results, _ = train_tiny(gpt, greek)
    assert results["text"].startswith("αβγ δε") and "--prompt" in capsys.readouterr().out
    assert gpt.main(["--sample"])["text"].startswith("αβγ δε")
    for flags in ([], ["--sample"]):
        with pytest.raises(gpt.UserError, match="'!', 'R'"):
            gpt.main([*flags, "--data", "t.txt", "--prompt", "αR!"])
    path = edited_copy("char_gpt.py", tmp_path, **TINY)
    assert_one_line_error(run_child(path, "--data", "t.txt", "--prompt", "é→"), "'é', '→'")
