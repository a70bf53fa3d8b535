"""char_gpt.py against independent code, hand-worked numbers, bad input, faults and kills."""

import hashlib
import io
import itertools
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, assert_one_line_error, edited_copy, load_fresh, run_script
from torch import nn

CPU = torch.device("cpu")
TINY = {
    "DATA": "excerpt.txt",
    "N_EMBED": 32,
    "N_LAYERS": 2,
    "N_HEADS": 2,
    "BLOCK_SIZE": 16,
    "BATCH_SIZE": 4,
    "EVAL_ITERS": 2,
    "SAMPLE_TOKENS": 20,
    "PROMPT": "ROMEO:",
}


@pytest.fixture
def gpt():
    """The module, imported anew, without bfloat16, so that comparisons can be tight."""
    module = load_fresh("char_gpt")
    module.has_bfloat16 = lambda device: False
    torch.manual_seed(0)
    return module


@pytest.fixture
def model(gpt):
    """A small model that has left its initial symmetry, in eval mode."""
    model = gpt.LM(vocab_size=11, block_size=8, n_embed=16, n_heads=4, n_layers=2, dropout=0.5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def no_gradients(model):
    """The small model, which fails where gradients are recorded."""
    hook = model.register_forward_pre_hook(lambda *inputs: assert_no_gradients())
    yield model
    hook.remove()


def assert_no_gradients():
    """Recording gradients is off."""
    assert not torch.is_grad_enabled()


@pytest.fixture
def text():
    """Tiny Shakespeare."""
    return (ROOT / "input.txt").read_text(encoding="utf-8")


def edited(monkeypatch, module, **constants):
    """Set constants of a module, which must exist."""
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)


# --- the model against somebody else's ------------------------------------------------------------


def test_head_equals_torch_attention(gpt):
    q, k, v = (torch.randn(3, 4, 9, 8, requires_grad=True) for _ in range(3))
    ours = gpt.Head()(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_multi_head_equals_torch(gpt):
    ours = gpt.MultiHead(32, 4, dropout=0.0)
    theirs = nn.MultiheadAttention(32, 4, bias=True, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.queries_keys_values.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.projection.weight)
        theirs.out_proj.bias.copy_(ours.projection.bias)
    x = torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_block_equals_torch_forward_and_gradients(gpt):
    ours = gpt.Block(32, 4, dropout=0.0)
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="relu", batch_first=True, norm_first=True
    )
    pairs = [
        (theirs.self_attn.in_proj_weight, ours.attention.queries_keys_values.weight),
        (theirs.self_attn.out_proj.weight, ours.attention.projection.weight),
        (theirs.self_attn.out_proj.bias, ours.attention.projection.bias),
        (theirs.linear1.weight, ours.feed_forward.expand.weight),
        (theirs.linear1.bias, ours.feed_forward.expand.bias),
        (theirs.linear2.weight, ours.feed_forward.shrink.weight),
        (theirs.linear2.bias, ours.feed_forward.shrink.bias),
        (theirs.norm1.weight, ours.norm1.weight),
        (theirs.norm1.bias, ours.norm1.bias),
        (theirs.norm2.weight, ours.norm2.weight),
        (theirs.norm2.bias, ours.norm2.bias),
    ]
    with torch.no_grad():
        for their, our in pairs:
            our.normal_(std=0.3)
            their.copy_(our)
        theirs.self_attn.in_proj_bias.zero_()
    x = torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    a, b = ours(x), theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for their, our in pairs:
        torch.testing.assert_close(our.grad, their.grad, atol=1e-4, rtol=1e-5)


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
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("attention.queries_keys_values", "attn.c_attn"),
        ("attention.projection", "attn.c_proj"), ("feed_forward.expand", "mlp.c_fc"),
        ("feed_forward.shrink", "mlp.c_proj"), ("final_norm", "ln_f"),
    ]  # fmt: skip
    parameters = dict(theirs.named_parameters())
    pairs = []
    for name, our in ours.named_parameters():
        nn.init.normal_(our, std=0.3)
        if name == "lm_head.bias":  # GPT-2 has none
            nn.init.zeros_(our)
            continue
        for a, b in names:
            name = name.replace(a, b)
        their = parameters.get(f"transformer.{name}", parameters.get(name))
        assert their is not None, name
        turned = ".c_" in name and their.dim() == 2
        with torch.no_grad():
            their.copy_(our.t() if turned else our)
        pairs.append((our, their, turned))
    with torch.no_grad():  # theirs has a bias on queries, keys and values
        for block in theirs.transformer.h:
            block.attn.c_attn.bias.zero_()
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    logits, loss = ours(idx, targets)
    their_logits = theirs(idx).logits
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=1e-5)
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-6)
    loss.backward()
    their_loss.backward()
    assert len(pairs) == 27
    for our, their, turned in pairs:
        gradient = their.grad.t() if turned else their.grad
        torch.testing.assert_close(our.grad, gradient, atol=1e-5, rtol=1e-4)


def test_loss_before_training_is_that_of_knowing_nothing(gpt, text):
    for seed in range(3):
        torch.manual_seed(seed)
        model = gpt.LM(65, gpt.BLOCK_SIZE, gpt.N_EMBED, gpt.N_HEADS, gpt.N_LAYERS, 0.0)
        tokens = torch.tensor(gpt.Tokenizer(text).encode(text[:20_000]))
        assert abs(gpt.estimate_loss(model, tokens, 8) - math.log(65)) < 0.1


def test_loss_is_the_mean_cross_entropy_of_the_logits(model):
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 8, 11)
    assert logits.dtype == torch.float32
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert model(idx)[1] is None


def test_no_token_sees_the_future(model):
    idx = torch.randint(11, (1, 8))
    logits, _ = model(idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        other, _ = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


def test_dropout_in_training_only(model):
    idx = torch.randint(11, (2, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_width_must_divide_by_heads(gpt):
    with pytest.raises(gpt.UserError, match="N_EMBED = 30 is not divisible by N_HEADS = 4"):
        gpt.MultiHead(30, 4, 0.0)


def test_bfloat16_where_the_hardware_says_so():
    gpt = load_fresh("char_gpt")
    flags = torch.cpu.get_capabilities()
    assert gpt.has_bfloat16(CPU) == bool(
        flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16")
    )
    with gpt.mixed_precision(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if gpt.has_bfloat16(CPU) else torch.float32)


# --- data -----------------------------------------------------------------------------------------


def test_tokenizer(gpt, text):
    tokenizer = gpt.Tokenizer("hello")
    assert (tokenizer.encode("hole"), tokenizer.decode([1, 3, 2, 0])) == ([1, 3, 2, 0], "hole")
    tokenizer = gpt.Tokenizer(text)
    assert tokenizer.vocab_size == 65
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(gpt.UserError, match="'é', '→'"):
        tokenizer.encode("a→é")


def test_input_txt_is_tiny_shakespeare(gpt):
    content = (ROOT / "input.txt").read_bytes()
    assert len(content) == 1_115_394
    assert hashlib.sha256(content).hexdigest() == gpt.DATA_SHA256


def test_split_is_in_time_and_refuses_short_texts(gpt, text):
    train, val = gpt.split_text(text, gpt.Tokenizer(text), 0.9, 256)
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert gpt.Tokenizer(text).decode(torch.cat([train, val]).tolist()) == text
    for short in ("", "abc" * 5):
        with pytest.raises(gpt.UserError, match="too few"):
            gpt.split_text(short, gpt.Tokenizer(short), 0.9, 16)


def test_get_batch_of_one_possible_window(gpt):
    tokens = torch.arange(9)
    x, y = gpt.get_batch(tokens, 5, 8)
    assert x.tolist() == [list(range(8))] * 5
    assert y.tolist() == [list(range(1, 9))] * 5


def test_get_batch_reaches_every_window_and_the_last_token(gpt):
    tokens = torch.arange(20)
    x, y = gpt.get_batch(tokens, 500, 4)
    assert torch.equal(y[:, :-1], x[:, 1:])
    assert set(x[:, 0].tolist()) == set(range(16))
    assert y.max() == 19


# --- the estimate of the loss ---------------------------------------------------------------------


def slow_loss(model, tokens):
    """The definition, in two loops: every token but the first is a target once."""
    total = 0.0
    for start in range(0, len(tokens) - 1, model.block_size):
        window = tokens[start : start + model.block_size + 1]
        logits, _ = model(window[None, :-1])
        for position, target in enumerate(window[1:]):
            total -= logits[0, position].log_softmax(-1)[target].item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 25, 77])
def test_estimate_loss_equals_a_slow_double_loop(gpt, model, length):
    tokens = torch.randint(11, (length,))
    assert gpt.estimate_loss(model, tokens, 3) == pytest.approx(slow_loss(model, tokens), abs=1e-5)


def test_estimate_loss_spreads_its_windows_evenly(gpt, model):
    tokens = torch.randint(11, (8 * 100 + 1,))
    chosen = torch.linspace(0, 99, 6).long().tolist()
    assert (chosen[0], chosen[-1]) == (0, 99)
    expected = sum(slow_loss(model, tokens[8 * i : 8 * i + 9]) for i in chosen) / 6
    assert gpt.estimate_loss(model, tokens, 3, 2) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_estimate_loss_changes_nothing(gpt, no_gradients, training):
    model = no_gradients
    model.train(training)
    state = torch.get_rng_state()
    tokens = torch.randint(11, (50,), generator=torch.Generator().manual_seed(1))
    first = gpt.estimate_loss(model, tokens, 3)
    assert first == gpt.estimate_loss(model, tokens, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training is training


# --- sampling -------------------------------------------------------------------------------------


def test_probabilities_worked_out_by_hand(gpt):
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    expect = {
        (1.0, None, None): [0.1, 0.4, 0.2, 0.3],
        (0.5, None, None): [1 / 30, 16 / 30, 4 / 30, 9 / 30],  # squares, normalised
        (2.0, 1, None): [0, 1, 0, 0],
        (1.0, 2, None): [0, 4 / 7, 0, 3 / 7],
        (1.0, 99, 1.0): [0.1, 0.4, 0.2, 0.3],
        (1.0, None, 0.39): [0, 1, 0, 0],
        (1.0, None, 0.41): [0, 4 / 7, 0, 3 / 7],
        (1.0, None, 0.71): [0, 4 / 9, 2 / 9, 3 / 9],
        (1.0, 3, 0.5): [0, 4 / 7, 0, 3 / 7],  # after top-k: 4/9 alone is too little, 7/9 enough
        (0, None, None): [0, 1, 0, 0],
        (1e-30, None, None): [0, 1, 0, 0],
    }
    for options, probabilities in expect.items():
        got = gpt.next_token_probabilities(logits, *options)
        torch.testing.assert_close(got, torch.tensor([probabilities], dtype=torch.float32))


def test_top_k_keeps_exactly_k_among_equals(gpt):
    assert (gpt.next_token_probabilities(torch.zeros(2, 9), top_k=4) > 0).sum() == 8


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
    ],
)
def test_options_out_of_range(gpt, model, options):
    name, value = next(iter(options.items()))
    with pytest.raises(gpt.UserError, match=f"{name.upper()} = {value}"):
        next(gpt.generate(model, [1], 1, **options))


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_no_trace(gpt, no_gradients, training):
    model = no_gradients
    model.train(training)
    continuation = gpt.generate(model, [1, 2], 5)
    for _ in range(3):  # and then it is abandoned
        token = next(continuation)
        assert isinstance(token, int)
        assert 0 <= token < 11
        assert model.training is training
        assert torch.is_grad_enabled()


def test_greedy_generation_ignores_dropout_and_the_mode(gpt, model):
    expected = list(gpt.generate(model, [3], 20, temperature=0))
    model.train()
    assert list(gpt.generate(model, [3], 20, temperature=0)) == expected
    ids = [3]
    for token in expected:  # by hand
        assert token == model.eval()(torch.tensor([ids[-8:]]))[0][0, -1].argmax()
        ids.append(token)


def test_a_long_prompt_keeps_its_end(gpt, model):
    prompt = list(range(11))
    fed = []
    model.register_forward_pre_hook(lambda model, inputs: fed.append(inputs[0].tolist()[0]))
    new = list(gpt.generate(model, prompt, 3))
    assert fed == [(prompt + new[:i])[-8:] for i in range(3)]
    assert prompt == list(range(11))  # the caller's list is not touched


def test_generation_draws_from_the_probabilities(gpt, model):
    probabilities = gpt.next_token_probabilities(model(torch.tensor([[4]]))[0][:, -1], 2.0)
    torch.manual_seed(0)
    counts = torch.zeros(11)
    for _ in range(2000):
        counts[next(gpt.generate(model, [4], 1, temperature=2.0))] += 1
    assert (counts / 2000 - probabilities[0]).abs().max() < 0.05


def test_empty_prompt(gpt, model):
    with pytest.raises(gpt.UserError, match="prompt is empty"):
        next(gpt.generate(model, [], 1))


# --- training -------------------------------------------------------------------------------------


def test_learning_rate_schedule(gpt):
    rates = [gpt.learning_rate_at(step, 1000, 0.01, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 100)
    assert rates[99] == pytest.approx(0.01 * (1 - 99 / 1000))
    assert rates[-1] == pytest.approx(0.01 / 1000)
    assert all(rate > 0 for rate in rates)
    assert gpt.learning_rate_at(0, 1, 0.01, 100) > 0
    assert gpt.learning_rate_at(9, 100, 0.01, 100) == pytest.approx(0.01 * 0.91)  # a short run


@pytest.mark.parametrize("bfloat16", [False, True])
def test_only_matrices_decay(gpt, model, monkeypatch, bfloat16):
    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: bfloat16)
    optimizers = gpt.make_optimizers(model, 1e-3, (0.9, 0.99), 0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_muon = [p for group in optimizers[-1].param_groups for p in group["params"]]
    if bfloat16:
        assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "Muon"]
        assert {id(p) for p in by_muon} == {
            id(p) for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2
        }
    else:
        assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW"]


def test_muon_moves_about_as_far_as_adamw(gpt, monkeypatch):
    """At one learning rate: Liu et al. 2025 (arXiv 2502.16982) aim at 0.2 of it (RMS)."""
    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: True)
    model = gpt.LM(65, 8, 128, n_heads=4, n_layers=1, dropout=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, loss = model(*torch.randint(65, (2, 32, 8)))
    loss.backward()
    for optimizer in gpt.make_optimizers(model, 1e-3, (0.9, 0.99), 0.0):
        optimizer.step()
    for name, parameter in model.blocks.named_parameters(prefix="blocks"):
        if parameter.dim() == 2:
            moved = (parameter - before[name]).square().mean().sqrt().item()
            assert 0.12e-3 < moved < 0.28e-3, name


def write_excerpt(folder):
    """Write the first 20,000 characters of Tiny Shakespeare: exact losses take less time."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "excerpt.txt").write_text(text, encoding="utf-8")
    return text


def run_main(gpt, monkeypatch, folder, *flags, **constants):
    """Run main in `folder` with small constants; returns its results and the weights kept."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    write_excerpt(folder)
    edited(monkeypatch, gpt, **(TINY | {"MAX_ITERS": 40, "EVAL_INTERVAL": 20} | constants))
    results = gpt.main(list(flags))
    state = torch.load(folder / "char_gpt.resume.pt", weights_only=True)
    return results, state["weights"]


def assert_same(a, b):
    """Two sets of weights are equal to the bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_main_returns_what_it_promises(gpt, monkeypatch, tmp_path, capsys):
    results, _ = run_main(gpt, monkeypatch, tmp_path, MAX_ITERS=45)
    assert results.keys() >= {"val_loss", "bits_per_character", "parameters", "steps", "seconds"}
    assert results["bits_per_character"] == pytest.approx(results["val_loss"] / math.log(2))
    assert results["steps"] == 45
    history = torch.load("char_gpt.resume.pt", weights_only=True)["history"]
    assert [entry["step"] for entry in history] == [0, 20, 40, 45]  # before, and after the last
    assert results["tokens_per_second"] > 0
    assert results["text"].startswith("ROMEO:")
    assert len(results["text"]) == len("ROMEO:") + 20
    printed = capsys.readouterr().out
    characters = len(set(write_excerpt(tmp_path)))
    assert f"ln {characters} = {math.log(characters):.4f}" in printed
    assert results["text"] in printed
    assert (tmp_path / "char_gpt.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "char_gpt.png",
        "char_gpt.pt",
        "char_gpt.resume.pt",
        "excerpt.txt",
    ]
    # the loss that it returns is that of the checkpoint, over the whole split
    model, tokenizer = gpt.load_checkpoint("char_gpt.pt", CPU)
    text = write_excerpt(tmp_path)
    val = torch.tensor(tokenizer.encode(text))[int(0.9 * len(text)) :]
    assert gpt.estimate_loss(model, val, 64) == pytest.approx(results["val_loss"], abs=1e-5)
    # and sampling again gives the sample again
    assert gpt.main(["--sample"])["text"] == results["text"]


def test_same_seed_same_weights(gpt, monkeypatch, tmp_path):
    first = run_main(gpt, monkeypatch, tmp_path / "a")
    second = run_main(gpt, monkeypatch, tmp_path / "b")
    assert_same(first[1], second[1])
    assert first[0]["text"] == second[0]["text"]
    other = run_main(gpt, monkeypatch, tmp_path / "c", SEED=1)
    assert not torch.equal(other[1]["lm_head.weight"], first[1]["lm_head.weight"])


def test_the_seed_chooses_the_batches(gpt, monkeypatch, tmp_path):
    firsts = []
    get_batch = gpt.get_batch

    def watched(*arguments):
        firsts.append(get_batch(*arguments))
        return firsts[-1]

    monkeypatch.setattr(gpt, "get_batch", watched)
    for seed in (1, 2):
        run_main(gpt, monkeypatch, tmp_path, MAX_ITERS=2, SEED=seed)
    (x1, _), (x2, _), (x3, _), (x4, _) = firsts
    assert not torch.equal(x1, x2)  # each step draws anew
    assert not torch.equal(x1, x3)  # and each seed
    assert not torch.equal(x2, x3)
    assert not torch.equal(x2, x4)


def test_evaluating_more_often_changes_no_weight(gpt, monkeypatch, tmp_path):
    _, seldom = run_main(gpt, monkeypatch, tmp_path / "a", DROPOUT=0.2)
    _, often = run_main(gpt, monkeypatch, tmp_path / "b", DROPOUT=0.2, EVAL_INTERVAL=7)
    assert_same(seldom, often)


def test_the_best_weights_are_kept_not_the_last(gpt, monkeypatch, tmp_path):
    (tmp_path / "t.txt").write_text("".join(random.Random(0).choices("abcd", k=400)))
    results, _ = run_main(
        gpt, monkeypatch, tmp_path, "--data", "t.txt", "--prompt", "a",
        "--max-iters", "200", LEARNING_RATE=1e-2, DROPOUT=0.0,
    )  # fmt: skip
    resume = torch.load("char_gpt.resume.pt", weights_only=True)
    best = min(resume["history"][1:], key=lambda entry: entry["val"])
    kept = torch.load("char_gpt.pt", weights_only=True)
    assert best["step"] == kept["step"] < 200  # noise cannot be learned, only overfitted
    assert results["val_loss"] == pytest.approx(best["val"], abs=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_resumed_run_equals_unbroken_run(gpt, monkeypatch, tmp_path, bfloat16):
    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: bfloat16)
    _, unbroken = run_main(gpt, monkeypatch, tmp_path / "a", DROPOUT=0.2)
    steps = itertools.count()
    get_batch = gpt.get_batch

    def interrupted(*arguments):
        if next(steps) == 29:  # nine steps past the evaluation at 20
            raise KeyboardInterrupt
        return get_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "get_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_main(gpt, monkeypatch, tmp_path / "b", DROPOUT=0.2)
    with monkeypatch.context() as patch, pytest.raises(gpt.UserError, match=r"this run has.*AdamW"):
        patch.setattr(gpt, "has_bfloat16", lambda device: not bfloat16)
        run_main(gpt, monkeypatch, tmp_path / "b", "--resume", DROPOUT=0.2)
    _, resumed = run_main(gpt, monkeypatch, tmp_path / "b", "--resume", DROPOUT=0.2)
    assert_same(unbroken, resumed)
    a, b = (
        torch.load(tmp_path / folder / "char_gpt.resume.pt", weights_only=True)["history"]
        for folder in "ab"
    )
    assert a == b


@pytest.mark.parametrize(
    "edit",
    [
        {"GRADIENT_CLIP": 1e-9},
        {"LEARNING_RATE": 1e-4},
        {"WARMUP_ITERS": 1},
        {"BETAS": (0.8, 0.99)},
        {"WEIGHT_DECAY": 10.0},
        {"DROPOUT": 0.3},
        {"BATCH_SIZE": 3},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_every_constant_of_training_reaches_it(gpt, monkeypatch, tmp_path, edit):
    constants = {"MAX_ITERS": 20, "DROPOUT": 0.0}
    _, before = run_main(gpt, monkeypatch, tmp_path / "a", **constants)
    _, after = run_main(gpt, monkeypatch, tmp_path / "b", **(constants | edit))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_learning_rate_of_each_step_is_that_of_the_schedule(gpt, monkeypatch, tmp_path):
    used = []
    make_optimizers = gpt.make_optimizers

    def watched(*arguments):
        optimizers = make_optimizers(*arguments)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: used.extend(group["lr"] for group in optimizer.param_groups)
            )
        return optimizers

    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(gpt, "make_optimizers", watched)
    run_main(gpt, monkeypatch, tmp_path, MAX_ITERS=30, LEARNING_RATE=0.01, WARMUP_ITERS=2)
    # AdamW has two groups, Muon one.
    assert used == [gpt.learning_rate_at(step, 30, 0.01, 2) for step in range(30) for _ in range(3)]


def test_a_run_can_be_resumed_for_longer(gpt, monkeypatch, tmp_path):
    run_main(gpt, monkeypatch, tmp_path)
    results, _ = run_main(gpt, monkeypatch, tmp_path, "--resume", "--max-iters", "60")
    assert results["steps"] == 60


def test_it_memorises_a_short_text(gpt):
    text = "to be, or not to be, that is the question: whether 'tis nobler in the mind"
    tokenizer = gpt.Tokenizer(text)
    tokens = torch.tensor(tokenizer.encode(text))
    torch.manual_seed(0)
    model = gpt.LM(tokenizer.vocab_size, 16, 32, 2, 2, 0.0)
    optimizers = gpt.make_optimizers(model, 1e-2, (0.9, 0.99), 0.0)
    gpt.train(
        model, optimizers, tokens, tokens, lambda step, losses: None, first_step=0, max_iters=200,
        batch_size=16, learning_rate=1e-2, warmup_iters=10, gradient_clip=1.0, eval_interval=200,
        eval_iters=9, seed=0,
    )  # fmt: skip
    # What cannot be known is only where a window begins: far less than 1 nat of ln 20 = 3 is left.
    assert gpt.estimate_loss(model, tokens, 4) < 0.5


def test_200_steps_beat_the_best_bigram_table(gpt, monkeypatch, tmp_path, text):
    ids = torch.tensor(gpt.Tokenizer(text).encode(text))
    cut = int(0.9 * len(ids))
    counts = torch.bincount(ids[: cut - 1] * 65 + ids[1:cut], minlength=65 * 65).view(65, 65) + 0.1
    table = (counts / counts.sum(1, keepdim=True)).log()
    bigram = -table[ids[cut:-1], ids[cut + 1 :]].mean().item()
    assert 2.4 < bigram < 2.6
    results, _ = run_main(
        gpt, monkeypatch, tmp_path, DATA="input.txt", MAX_ITERS=200, EVAL_INTERVAL=200,
        N_EMBED=64, N_HEADS=4, BLOCK_SIZE=64, BATCH_SIZE=32, DROPOUT=0.0, LEARNING_RATE=1e-2,
        WARMUP_ITERS=20,
    )  # fmt: skip
    assert results["val_loss"] < bigram - 0.1


def test_importing_has_no_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import char_gpt"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def kept(gpt, model, tmp_path):
    """A checkpoint of the small model, and its path."""
    path = tmp_path / "char_gpt.pt"
    gpt.save_checkpoint(path, model, gpt.Tokenizer("abcdefghijk"))
    return path


def test_checkpoint_round_trip(gpt, model, kept):
    loaded, tokenizer = gpt.load_checkpoint(kept, CPU)
    assert_same(loaded.state_dict(), model.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.sizes, tokenizer.vocabulary) == (model.sizes, "abcdefghijk")
    assert not loaded.training
    idx = torch.randint(11, (1, 8))
    assert torch.equal(loaded(idx)[0], model(idx)[0])


class Hostile:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_checkpoints_that_are_refused(gpt, model, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(kept, weights_only=True)
    whole = kept.read_bytes()
    pickled = io.BytesIO()
    torch.save(good | {"more": Hostile()}, pickled)
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "hostile": pickled.getvalue(),
        "other script": good | {"name": "word_gpt"},
        "no sizes": {key: good[key] for key in good if key != "sizes"},
        "no name": {key: good[key] for key in good if key != "name"},
        "wider": good | {"sizes": good["sizes"] | {"n_embed": 32}},
        "huge": good | {"sizes": good["sizes"] | {"n_embed": 4 * 10**9}},
        "endless": good | {"sizes": good["sizes"] | {"n_layers": 10**12}},
        "wrong type": good | {"sizes": good["sizes"] | {"n_heads": "4"}},
        "vocabulary": good | {"vocabulary": "abc"},
        "weight missing": good
        | {"weights": {k: v for k, v in good["weights"].items() if k != "lm_head.bias"}},
        "a list": [1, 2],
        "negative heads": good | {"sizes": good["sizes"] | {"n_heads": -4}},
        "heads of another type": good | {"sizes": good["sizes"] | {"n_heads": 2.0}},
        "not finite": good | {"weights": {k: v * math.nan for k, v in good["weights"].items()}},
    }
    for name, content in cases.items():
        path = tmp_path / "bad.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(gpt.UserError, match=r"bad\.pt"):
            gpt.load_checkpoint(path, CPU)
            pytest.fail(name)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(gpt.UserError, match=r"run `python char_gpt\.py` first"):
        gpt.load_checkpoint("missing.pt", CPU)


def test_a_failed_write_leaves_the_old_file(gpt, model, kept, monkeypatch):
    before = kept.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(gpt.UserError, match=r"char_gpt\.pt"):
        gpt.save_checkpoint(kept, model, gpt.Tokenizer("abcdefghijk"))
    assert kept.read_bytes() == before
    assert [path.name for path in kept.parent.iterdir()] == ["char_gpt.pt"]


# --- as strangers run it --------------------------------------------------------------------------


def tiny_copy(folder, **constants):
    """A copy of the script with small constants, beside the text."""
    path = edited_copy("char_gpt.py", folder, **(TINY | {"MAX_ITERS": 6} | constants))
    write_excerpt(folder)
    return path


def test_bad_input_is_one_line_and_status_1(tmp_path):
    script = tiny_copy(tmp_path)
    good = run_script(script)
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    before = {path: path.read_bytes() for path in tmp_path.glob("char_gpt.*")}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("ROMEO: to be")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    for flags, words in [
        (["--prompt", "café → ROMEO"], ["'é', '→'"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--sample", "--prompt", "é"], ["'é'"]),
        (["--sample", "--prompt", ""], ["prompt is empty"]),
        (["--data", "empty.txt"], ["0 tokens are too few"]),
        (["--data", "short.txt"], ["too few", "BLOCK_SIZE = 16"]),
        (["--data", "latin1.txt"], ["latin1.txt", "not UTF-8"]),
        (["--data", "missing.txt"], ["missing.txt", "--data"]),
        (["--data", "."], ["cannot read"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--device", "toaster"], ["toaster"]),
        (["--device", "meta"], ["meta"]),
        (["--data", "x" * 300], ["cannot read"]),
    ]:
        assert_one_line_error(run_script(script, *flags), *words)
    for flags in (
        ["--max-iters", "0"],
        ["--max-iters", "x"],
        ["--nonsense"],
        ["--sample", "--resume"],
    ):
        assert_one_line_error(
            run_script(script, *flags), flags[-1].strip("0x") or flags[0], status=2
        )
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"N_HEADS": 5}, ["N_EMBED = 32", "N_HEADS = 5"]),
        ({"TEMPERATURE": -1.0}, ["TEMPERATURE = -1.0"]),
        ({"TOP_K": 0}, ["TOP_K = 0"]),
        ({"TOP_P": 1.5}, ["TOP_P = 1.5"]),
        ({"BLOCK_SIZE": 2_000_000}, ["BLOCK_SIZE = 2000000"]),
        ({"LEARNING_RATE": 1e30, "GRADIENT_CLIP": 1e30, "MAX_ITERS": 60}, ["LEARNING_RATE"]),
    ],
)
def test_bad_constants_are_found_before_anything_is_lost(tmp_path, constants, words):
    for name in ("char_gpt.pt", "char_gpt.resume.pt", "char_gpt.png"):
        (tmp_path / name).write_bytes(b"of an earlier run")
    assert_one_line_error(run_script(tiny_copy(tmp_path, **constants)), *words)
    for name in ("char_gpt.pt", "char_gpt.resume.pt", "char_gpt.png"):
        assert (tmp_path / name).read_bytes() == b"of an earlier run"


def test_sampling_without_or_with_bad_checkpoints(tmp_path):
    script = tiny_copy(tmp_path)
    assert_one_line_error(run_script(script, "--sample"), "there is no char_gpt.pt")
    assert_one_line_error(run_script(script, "--resume"), "there is no char_gpt.resume.pt")
    assert run_script(script).returncode == 0
    whole = (tmp_path / "char_gpt.pt").read_bytes()
    (tmp_path / "char_gpt.pt").write_bytes(whole[:-500])
    assert_one_line_error(run_script(script, "--sample"), "char_gpt.pt", "move it away")
    # constants of another size: --sample takes the sizes of the file, --resume says what differs
    (tmp_path / "char_gpt.pt").write_bytes(whole)
    script = tiny_copy(tmp_path, N_EMBED=64)
    assert run_script(script, "--sample").returncode == 0
    resumed = run_script(script, "--resume")
    assert_one_line_error(resumed, "'n_embed': 32", "'n_embed': 64")


def test_a_terminal_that_cannot_print_a_character(tmp_path):
    script = tiny_copy(tmp_path, MAX_ITERS=2)
    (tmp_path / "greek.txt").write_text("αβγδ→é\n" * 200, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, str(script), "--data", "greek.txt", "--prompt", "αé"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"?\xe9" in done.stdout


def test_a_reader_that_has_seen_enough(tmp_path):
    script = tiny_copy(tmp_path, SAMPLE_TOKENS=200)
    assert run_script(script).returncode == 0
    process = subprocess.Popen(
        [sys.executable, str(script), "--sample"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_disk_that_is_full(tmp_path):
    script = tiny_copy(tmp_path)
    assert run_script(script).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("char_gpt.*")}
    small = run_script(
        script,
        "--max-iters",
        "4",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert_one_line_error(small, "char_gpt.pt", "left it as it was")
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.part"))


def test_out_of_memory_says_what_to_halve(tmp_path):
    script = tiny_copy(tmp_path)
    code = (
        "import runpy, sys, torch\n"
        "def backward(self): raise torch.OutOfMemoryError('CUDA out of memory. Tried to ...')\n"
        "torch.Tensor.backward = backward\n"
        f"sys.argv = [{str(script)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert_one_line_error(done, "out of memory", "halve BATCH_SIZE")


def test_ctrl_c_keeps_the_checkpoint_and_prints_the_sample(tmp_path):
    script = tiny_copy(tmp_path, MAX_ITERS=100_000, EVAL_INTERVAL=100_000)
    process = subprocess.Popen(
        [sys.executable, "-u", str(script)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("step     0"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "ROMEO:" in out
    assert "best model" in out
    step = torch.load(tmp_path / "char_gpt.resume.pt", weights_only=True)["history"][-1]["step"]
    assert 0 < step < 100_000


def test_kill_at_any_moment_leaves_checkpoints_that_load(gpt, tmp_path):
    # Every second step is evaluated and kept, so that most of the time goes to writing.
    script = tiny_copy(tmp_path, MAX_ITERS=100_000, EVAL_INTERVAL=2, EVAL_ITERS=1, N_EMBED=256)
    dice = random.Random(0)
    in_writing = 0
    for attempt in range(20):
        for left in tmp_path.glob("*.part"):
            left.unlink()
        flags = ["--resume"] if (tmp_path / "char_gpt.resume.pt").exists() else []
        process = subprocess.Popen(
            [sys.executable, str(script), *flags], cwd=tmp_path, stdout=subprocess.PIPE
        )
        for line in process.stdout:
            if line.startswith(b"step"):
                break
        time.sleep(dice.uniform(0.3, 1.5))
        patience = time.monotonic() + 20
        while attempt % 2 and time.monotonic() < patience and not list(tmp_path.glob("*.part")):
            pass  # every second kill comes as soon as half a file is there
        process.kill()
        process.communicate()
        in_writing += bool(list(tmp_path.glob("*.part")))
        for name in ("char_gpt.pt", "char_gpt.resume.pt"):
            if (tmp_path / name).exists():
                gpt.load_checkpoint(tmp_path / name, CPU)
    assert (tmp_path / "char_gpt.resume.pt").exists()
    assert in_writing > 0, "no kill hit a write: the test has lost its point"


# --- the download ---------------------------------------------------------------------------------


def lone_copy(folder, server, content, **constants):
    """A copy of the script in an empty folder, whose text comes from the server."""
    server.files["/input.txt"] = content
    return edited_copy(
        "char_gpt.py",
        folder,
        **TINY
        | {"MAX_ITERS": 2, "DATA": "input.txt", "DATA_URL": f"{server.url}/input.txt"}
        | constants,
    )


def test_alone_in_an_empty_folder_it_fetches_its_text(tmp_path, server):
    content = (ROOT / "input.txt").read_bytes()
    script = lone_copy(tmp_path, server, content)
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "input.txt").read_bytes() == content
    assert run_script(script).returncode == 0
    assert len(server.seen) == 1  # kept, and not fetched again
    (tmp_path / "input.txt").write_text("ROMEO: my own text, put here by hand.\n" * 50)
    assert run_script(script).returncode == 0
    assert len(server.seen) == 1


def test_a_text_that_is_not_there(tmp_path, server):
    script = lone_copy(tmp_path, server, b"")
    server.faults = [404]
    done = run_script(script)
    assert_one_line_error(done, f"{server.url}/input.txt", "404", "put it at input.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["char_gpt.py"]
    assert len(server.seen) == 1  # a 404 is final


@pytest.mark.parametrize("fault", ["stall", "cut", "wrong", "lie", 500])
def test_faults_are_retried_and_leave_nothing_half(gpt, tmp_path, server, fault, monkeypatch):
    pauses = []
    monkeypatch.setattr(gpt, "time", types.SimpleNamespace(sleep=pauses.append))
    content = os.urandom(200_000)
    server.files["/x"] = content
    target = tmp_path / "x"
    arguments = (f"{server.url}/x", target, hashlib.sha256(content).hexdigest())
    server.faults = [fault, fault]
    gpt.download(*arguments, tries=3, timeout=0.5)
    assert target.read_bytes() == content
    assert len(server.seen) == 3
    assert pauses == sorted(set(pauses))  # growing
    target.unlink()
    server.faults = [fault] * 3
    with pytest.raises(gpt.UserError, match=f"{server.url}/x"):
        gpt.download(*arguments, tries=3, timeout=0.5)
    assert list(tmp_path.iterdir()) == []


def test_no_network(gpt, tmp_path):
    with pytest.raises(gpt.UserError, match="put it at"):
        gpt.download("http://127.0.0.1:9/x", tmp_path / "x", "0" * 64, tries=1)
    assert list(tmp_path.iterdir()) == []
