"""gpt2.py against transformers, a hub that misbehaves, crafted files, faults and several processes.

The models are small, with random weights. The byte-pair encoding is GPT-2's where a cache has it,
and otherwise one of 256 bytes and three merges, made here.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import requests
import tiktoken
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_line_error, edited_copy, load_fresh, run_script
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers

CPU = torch.device("cpu")
SHARED_BPE = ROOT.parent / "shared" / "data" / "tiktoken"
# GPT-2's rule for what may be merged (the pattern of its encoder.py), with the bytes and 3 merges.
MAKE_SMALL = r"""
import tiktoken
def small(name="gpt2"):
    words = [bytes([i]) for i in range(256)] + [b"th", b" a", b" th"]
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={word: i for i, word in enumerate(words)},
        special_tokens={"<|endoftext|>": len(words)},
    )
"""
exec(MAKE_SMALL)
TINY = {
    "DATA": "excerpt.txt",
    "VOCAB_SIZE": 260,
    "N_EMBED": 32,
    "N_LAYERS": 2,
    "N_HEADS": 4,
    "BLOCK_SIZE": 32,
    "WINDOW": 16,
    "BATCH_SIZE": 2,
    "TOKENS_PER_STEP": 64,
    "EVAL_ITERS": 2,
    "SAMPLE_TOKENS": 12,
    "MAX_ITERS": 4,
    "EVAL_INTERVAL": 2,
}
SIZES = {
    "vocab_size": 260,
    "block_size": 32,
    "n_embed": 32,
    "n_layers": 2,
    "n_heads": 4,
    "dropout": 0.0,
    "qkv_bias": True,
}


@pytest.fixture
def gpt():
    """The module, imported anew, without bfloat16, so that comparisons can be tight."""
    module = load_fresh("gpt2")
    module.has_bfloat16 = lambda device: False
    torch.manual_seed(0)
    return module


@pytest.fixture
def small_bpe(monkeypatch):
    """tiktoken gives the small encoding, whatever it is asked for."""
    monkeypatch.setattr(tiktoken, "get_encoding", small)  # noqa: F821


@pytest.fixture(scope="module")
def real_bpe():
    """tiktoken's GPT-2, from a cache; skip the test where there is none and no network either."""
    if SHARED_BPE.exists():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_BPE))
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        pytest.skip(f"no GPT-2 vocabulary here: {error}")


@pytest.fixture
def model(gpt):
    """A small model that has left its initial symmetry, in eval mode."""
    model = gpt.LM(**SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(model.position_embedding.weight, std=2.0)  # or it would repeat one token
    return model.eval()


@pytest.fixture
def reference():
    """transformers' model of the same sizes, with random weights that have left their symmetry."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=260, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    return theirs


@pytest.fixture
def weights_file(reference, tmp_path):
    """What transformers' save_pretrained writes of it."""
    reference.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved" / "model.safetensors"


@pytest.fixture
def workplace(gpt, small_bpe, monkeypatch, tmp_path):
    """The module with the constants of a small run, in a folder of its own with a text."""
    for name, value in TINY.items():
        assert hasattr(gpt, name)
        monkeypatch.setattr(gpt, name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
    (tmp_path / "excerpt.txt").write_text(text, encoding="utf-8")
    return gpt


def named(parameters):
    """Return {name: value} as one vector each, for comparisons."""
    return {name: value.detach().clone() for name, value in parameters}


# --- the model against transformers ---------------------------------------------------------------


def test_it_has_the_parameters_of_gpt2(gpt):
    with torch.device("meta"):
        model = gpt.LM(
            gpt.VOCAB_SIZE, gpt.BLOCK_SIZE, gpt.N_EMBED, gpt.N_HEADS, gpt.N_LAYERS, gpt.DROPOUT,
            gpt.QKV_BIAS,
        )  # fmt: skip
    assert gpt.count_parameters(model) == 124_439_808


def test_logits_loss_and_gradients_are_those_of_transformers(gpt, reference, weights_file):
    ours = gpt.load_pretrained(weights_file, **SIZES)
    idx, targets = torch.randint(260, (2, 3, 32))
    logits, nothing = ours(idx)
    their_logits = reference(idx).logits
    assert nothing is None
    assert (logits - their_logits).abs().max() < 1e-4
    _, loss = ours(idx, targets)
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-6)
    loss.backward()
    their_loss.backward()
    gradients = gpt.hub_weights({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in reference.named_parameters():
        difference = gradients.pop(name.removeprefix("transformer.")) - parameter.grad
        assert difference.norm() < 1e-4 * parameter.grad.norm(), name
    assert not gradients


def test_greedy_continuation_is_that_of_transformers(gpt, reference, weights_file):
    ours = gpt.load_pretrained(weights_file, **SIZES)
    ids = [1, 2, 3]
    theirs = reference.generate(
        torch.tensor([ids]), max_new_tokens=29, min_new_tokens=29, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found = list(gpt.generate(ours, ids, 29, temperature=0, half_weights=False))
    assert found == theirs[0, 3:].tolist()
    assert len(set(found)) > 5  # a continuation that repeats one token would prove little


def test_a_checkpoint_goes_back_into_transformers(workplace, monkeypatch):
    workplace.main(["--init", "scratch", "--max-iters", "2"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import .*?)```", readme, flags=re.S)
    small = "GPT2Config(vocab_size=260, n_positions=32, n_embd=32, n_layer=2, n_head=4)"
    assert "GPT2Config()" in code
    assert "assert " in code
    monkeypatch.setitem(sys.modules, "gpt2", workplace)
    exec(code.replace("GPT2Config()", small), {})


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_the_loss_in_slices_is_the_loss(gpt, rows):
    head = nn.Linear(16, 260, bias=False)
    x = torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(260, (64,))
    whole = F.cross_entropy(head(x), targets)
    expected = torch.autograd.grad(whole, [x, head.weight])
    sliced = gpt.sliced_loss(head, x, targets, rows)
    found = torch.autograd.grad(sliced, [x, head.weight])
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(found, expected)


# --- initialisation and tied weights --------------------------------------------------------------


def test_residual_projections_begin_smaller(gpt):
    model = gpt.LM(300, 64, 192, 4, 8, 0.1, True)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            residual = name.endswith(("projection.weight", "shrink.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert (parameter == 1).all()


def test_tied_weights_are_one_tensor_also_after_loading(gpt, small_bpe, weights_file, tmp_path):
    fresh = gpt.LM(**SIZES)
    gpt.save_checkpoint(tmp_path / "kept.pt", fresh, gpt.Tokenizer())
    kept, _ = gpt.load_checkpoint(tmp_path / "kept.pt", "cpu")
    for model in (fresh, kept, gpt.load_pretrained(weights_file, **SIZES)):
        assert model.lm_head.weight is model.token_embedding.weight
        assert gpt.count_parameters(model) == gpt.count_parameters(fresh)
    assert torch.equal(kept.lm_head.weight, fresh.lm_head.weight)


def test_without_biases_on_queries_keys_and_values(workplace, monkeypatch):
    monkeypatch.setattr(workplace, "QKV_BIAS", False)
    results = workplace.main(["--init", "scratch"])
    model, _ = workplace.load_checkpoint("gpt2.pt", "cpu")
    assert model.blocks[0].attention.queries_keys_values.bias is None
    assert math.isfinite(results["val_loss"])


# --- causality, the cache, generation -------------------------------------------------------------


def test_no_position_sees_what_comes_after_it(model):
    idx = torch.randint(260, (1, 32))
    other = idx.clone()
    other[0, 20:] = torch.randint(260, (12,))
    assert torch.equal(model(idx)[0][:, :20], model(other)[0][:, :20])
    assert not torch.equal(model(idx)[0][:, 20:], model(other)[0][:, 20:])


def test_the_cache_changes_nothing(gpt, model):
    idx = torch.randint(260, (2, 32))
    logits, _ = model(idx)
    caches = [gpt.Cache(32) for _ in model.blocks]
    found = [model(idx[:, :10], caches=caches)[0]]
    found += [model(idx[:, t : t + 1], caches=caches)[0] for t in range(10, 32)]
    torch.testing.assert_close(torch.cat(found, 1), logits[:, 9:], rtol=1e-4, atol=1e-4)


def greedy_without_cache(model, ids, n):
    """Continue greedily; when the context is full, its later half stays, as in `generate`."""
    context = ids[-model.block_size :]
    found = []
    for _ in range(n):
        with torch.no_grad():
            found.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context = [*context, found[-1]]
        if len(context) > model.block_size:
            context = context[-(model.block_size // 2) :]
    return found


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_generating_with_a_cache_is_generating_without(gpt, model, length):
    ids = torch.randint(260, (length,)).tolist()
    before = list(ids)
    found = list(gpt.generate(model, ids, 200, temperature=0, half_weights=False))
    assert found == greedy_without_cache(model, ids, 200)
    assert len(set(found)) > 5
    assert ids == before  # the caller's list is as it was


@pytest.mark.parametrize("half_weights", [True, False])
def test_generating_leaves_the_model_as_it_was(gpt, model, half_weights):
    model.train()
    weights = named(model.named_parameters())
    tokens = gpt.generate(model, [1, 2], 5, half_weights=half_weights)
    next(tokens)
    assert torch.is_grad_enabled()  # also while the generator waits
    assert len(list(tokens)) == 4
    assert model.training and all(module.training for module in model.modules())
    assert isinstance(model.lm_head, nn.Linear)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, weights[name])


def test_half_weights_are_close(gpt, model):
    idx = torch.randint(260, (1, 32))
    exact = model(idx)[0]
    with torch.inference_mode():
        rounded = gpt.for_generation(model, half_weights=True)(idx)[0]
        single = gpt.for_generation(model, half_weights=False)(idx)[0]
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (rounded - exact).abs().max() < 1e-2 * exact.abs().max()


def test_a_prepared_model_is_not_prepared_again(gpt, model):
    quick = gpt.for_generation(model, half_weights=False)
    assert gpt.for_generation(quick, half_weights=False) is quick


def test_tokens_are_drawn_with_their_probabilities(gpt, model):
    n = 3000
    quick = gpt.for_generation(model, half_weights=False)
    first = [next(gpt.generate(quick, [7], 1, top_k=4)) for _ in range(n)]
    expected = gpt.next_token_probabilities(model(torch.tensor([[7]]))[0][:, -1], top_k=4)[0]
    counts = torch.bincount(torch.tensor(first), minlength=260)
    assert (expected > 0).sum() == 4 and not counts[expected == 0].any()
    error = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 4 * error).all()


def test_top_k_and_top_p(gpt):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    cases = [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 100}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
    ]
    for options, expected in cases:
        found = gpt.next_token_probabilities(logits, **options)[0]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0}]
)
def test_sampling_options_out_of_range(gpt, model, options):
    with pytest.raises(gpt.UserError, match=str(next(iter(options.values())))):
        next(gpt.generate(model, [1], 1, **options))
    with pytest.raises(gpt.UserError, match="empty"):
        next(gpt.generate(model, [], 1))


# --- tokenizer ------------------------------------------------------------------------------------


def test_ids_of_known_texts(gpt, real_bpe):
    tokenizer = gpt.Tokenizer()
    assert tokenizer.vocab_size == gpt.VOCAB_SIZE
    assert tokenizer.encode("Hello, it is time") == [15496, 11, 340, 318, 640]
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) == 338_025
    assert tokenizer.decode(ids) == text


def test_the_end_of_text_is_text_unless_asked_for(gpt, small_bpe):
    text = "one<|endoftext|>two"
    plain, asked = gpt.Tokenizer(), gpt.Tokenizer(documents=True)
    assert 259 not in plain.encode(text) and plain.decode(plain.encode(text)) == text
    assert asked.encode(text).count(259) == 1 and asked.decode(asked.encode(text)) == text


def test_a_streamed_sample_breaks_no_character(gpt, model, small_bpe, monkeypatch, capsys):
    tokenizer = gpt.Tokenizer()
    ids = [*"aé→🙂".encode(), 0xE2, 0x86]  # the last character never becomes whole
    monkeypatch.setattr(gpt, "generate", lambda *args, **options: iter(ids))
    written = []
    monkeypatch.setattr("builtins.print", lambda *what, **how: written.append(what))
    text = gpt.stream(model, tokenizer, "x", len(ids), temperature=0)
    assert text == "xaé→🙂\N{REPLACEMENT CHARACTER}"
    pieces = [what[0] for what in written if what]
    assert "é" in pieces and "→" in pieces and "🙂" in pieces
    assert "".join(pieces) == text


def test_what_to_do_without_the_vocabulary(gpt, monkeypatch):
    def fail(name):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(gpt.UserError) as caught:
        gpt.Tokenizer()
    for word in (
        "no route to host",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "TIKTOKEN_CACHE_DIR",
    ):
        assert word in str(caught.value)


# --- text larger than memory ----------------------------------------------------------------------


def hard_text(seed, n=20_000):
    """Return a text of everything that a cut could spoil: runs of white space, marks, digits."""
    pick = random.Random(seed)
    words = ["the", "'s", "'ll", "a", " ", "  ", "\n", "\n\n", " \n", "\t", "12", "...", "é", "→",
             "\x1c", "\x85", "\u3000", "<|endoftext|>", "\u2028", "x" * 30]  # fmt: skip
    return "".join(pick.choice(words) for _ in range(n))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_encode_as_the_whole_text(gpt, small_bpe, tmp_path, seed, documents):
    path = tmp_path / "hard.txt"
    path.write_text(hard_text(seed), encoding="utf-8", newline="")
    text = path.read_text(encoding="utf-8")
    tokenizer = gpt.Tokenizer(documents=documents)
    pieces = list(gpt.read_pieces(path, n_characters=1000))
    assert "".join(pieces) == text and len(pieces) > 10
    ids = list(itertools.chain(*tokenizer.encode_batch(pieces)))
    assert ids == tokenizer.encode(text)


def test_the_real_encoding_in_pieces(gpt, real_bpe, tmp_path):
    tokenizer = gpt.Tokenizer()
    path = ROOT / "input.txt"
    pieces = list(gpt.read_pieces(path, n_characters=1000))
    ids = list(itertools.chain(*tokenizer.encode_batch(pieces)))
    assert ids == tokenizer.encode(path.read_text(encoding="utf-8"))


def test_a_text_without_spaces_is_cut_all_the_same(gpt, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 1000)
    pieces = list(gpt.read_pieces(tmp_path / "long.txt", n_characters=100))
    assert "".join(pieces) == "x" * 1000 and max(map(len, pieces)) <= 100


def test_tokens_are_kept_and_made_again_when_the_text_changed(
    gpt, small_bpe, tmp_path, monkeypatch
):
    path = tmp_path / "text.txt"
    path.write_text("the theatre\n" * 100, encoding="utf-8")
    tokenizer = gpt.Tokenizer()
    tokens = gpt.load_tokens(path, None, None, tokenizer)
    assert tokens.dtype == torch.uint16
    assert tokens.tolist() == tokenizer.encode(path.read_text())
    kept = tmp_path / "text.txt.gpt2.bin"
    before = kept.stat().st_mtime_ns
    gpt.load_tokens(path, None, None, tokenizer)
    assert kept.stat().st_mtime_ns == before
    path.write_text("the heather\n" * 100, encoding="utf-8")  # the same length
    tokens = gpt.load_tokens(path, None, None, tokenizer)
    assert tokens.tolist() == tokenizer.encode(path.read_text())
    asked = gpt.Tokenizer(documents=True)
    path.write_text("a<|endoftext|>b", encoding="utf-8")
    assert 259 not in gpt.load_tokens(path, None, None, tokenizer)
    assert 259 in gpt.load_tokens(path, None, None, asked).tolist()
    kept_bytes = kept.read_bytes()
    path.write_bytes(b"\xff\xfe not UTF-8")
    with pytest.raises(gpt.UserError, match="not UTF-8"):
        gpt.load_tokens(path, None, None, asked)
    assert kept.read_bytes() == kept_bytes
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_windows_and_characters(gpt, small_bpe, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("thé → 🙂\n" * 50, encoding="utf-8")
    tokenizer = gpt.Tokenizer()
    tokens = gpt.load_tokens(path, None, None, tokenizer)
    assert gpt.count_characters(tokens, tokenizer) == len(path.read_text(encoding="utf-8"))
    x, y = gpt.get_batch(tokens, 5, 8)
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_estimate_loss_is_exact(gpt, model):
    tokens = torch.randint(260, (32 * 5 + 8,)).to(torch.uint16)
    ids = tokens.long()
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        x, y = ids[start:][:32], ids[start + 1 :][:32]
        total += F.cross_entropy(model(x[None, : len(y)])[0][0], y, reduction="sum").item()
    for batch_size in (1, 2, 100):
        found = gpt.estimate_loss(model, tokens, batch_size)
        assert found == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert gpt.estimate_loss(model, tokens, 1, 2) == gpt.estimate_loss(model, tokens, 1, 2)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_text(real_bpe, tmp_path):
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    with open(tmp_path / "long.txt", "w", encoding="utf-8") as file:
        for _ in range(100):
            file.write(text)
    program = (
        "import re, gpt2; t = gpt2.Tokenizer(); t.encode('warm');"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        "start = peak(); gpt2.load_tokens('long.txt', None, None, t); print(peak() - start)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(finished.stdout) < 60_000  # KiB, for 111 MB of text


# --- OpenAI's weights: the file -------------------------------------------------------------------


def crafted(path, header, data=b"", length=None):
    """Write a safetensors file; `length` is what it says of its header's length."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def edited_header(weights_file, edit):
    """Return the file with its header changed by `edit`, the data as they were."""
    content = weights_file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    edit(header)
    return crafted(weights_file, header, content[8 + n :])


def set_entry(name, **values):
    """Return an edit of the header that changes one entry."""
    return lambda header: header[f"transformer.{name}"].update(values)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda h: h.pop("transformer.ln_f.bias"), "where"),  # a hole
        (lambda h: h.update(surplus={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
         "surplus"),
        (lambda h: h.update({"x": h.pop("transformer.ln_f.bias")}), "it has x"),
        (set_entry("ln_f.weight", dtype="F16"), "F16"),
        (set_entry("wpe.weight", shape=[64, 16]), "(64, 16)"),
        (set_entry("wpe.weight", shape=[-32, -32]), "(-32, -32)"),
        (set_entry("ln_f.weight", shape=[33]), "(33,)"),
        (set_entry("ln_f.weight", shape=["32"]), "ln_f.weight"),
        (set_entry("ln_f.weight", data_offsets=[-128, 0]), "to follow"),
        (set_entry("ln_f.weight", data_offsets=[0, 128]), "to follow"),
        (set_entry("ln_f.weight", data_offsets=[0, 10**12]), "to follow"),
        (set_entry("ln_f.weight", data_offsets="no"), "no"),
        (lambda h: h.update(x=3), "not this GPT-2"),
    ],
)  # fmt: skip
def test_crafted_headers_are_refused(gpt, weights_file, edit, words):
    path = edited_header(weights_file, edit)
    with pytest.raises(gpt.UserError, match=r"not this GPT-2") as caught:
        gpt.load_pretrained(path, **SIZES)
    assert words.replace("where", "follow") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header, length",
    [
        ({}, 10**15),
        ({}, 3),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff\xff", None),
        (b"[" * 100_000, None),
        ({}, None),
    ],
)
def test_crafted_files_are_refused(gpt, tmp_path, header, length):
    path = crafted(tmp_path / "bad.safetensors", header, length=length)
    with pytest.raises(gpt.UserError, match="not this GPT-2"):
        gpt.load_pretrained(path, **SIZES)


def test_truncated_and_empty_files_are_refused(gpt, weights_file):
    content = weights_file.read_bytes()
    for n in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        weights_file.write_bytes(content[:n])
        with pytest.raises(gpt.UserError, match="not this GPT-2"):
            gpt.load_pretrained(weights_file, **SIZES)


def test_other_sizes_are_refused_by_name(gpt, weights_file):
    with pytest.raises(gpt.UserError, match=r"wpe\.weight .* this model has \(16, 32\)"):
        gpt.load_pretrained(weights_file, **SIZES | {"block_size": 16})
    with pytest.raises(gpt.UserError, match=r"lacks h\.2"):
        gpt.load_pretrained(weights_file, **SIZES | {"n_layers": 3})
    with pytest.raises(gpt.UserError, match=r"it has h\.1"):
        gpt.load_pretrained(weights_file, **SIZES | {"n_layers": 1})
    with pytest.raises(gpt.UserError, match=r"it has h\.0\.attn\.c_attn\.bias"):
        gpt.load_pretrained(weights_file, **SIZES | {"qkv_bias": False})


def test_stored_masks_and_short_names_are_fine(gpt, reference, tmp_path):
    from safetensors.torch import save_file

    tensors = {
        name.removeprefix("transformer."): value.contiguous()
        for name, value in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    for layer in range(2):  # as in the file on the hub
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = gpt.load_pretrained(tmp_path / "model.safetensors", **SIZES)
    idx = torch.randint(260, (1, 32))
    assert (model(idx)[0] - reference(idx).logits).abs().max() < 1e-4


# --- OpenAI's weights: the hub --------------------------------------------------------------------


@pytest.fixture
def hub(server, gpt, monkeypatch, tmp_path):
    """A server with one file of 1 MB, no pauses; returns (server, url, content, path)."""
    content = random.Random(0).randbytes(1 << 20)
    server.files["/file"] = content
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    return server, f"{server.url}/file", content, tmp_path / "file"


def test_download_whole(gpt, hub):
    server, url, content, path = hub
    gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    assert len(server.seen) == 1 and not path.with_name("file.part").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_download_cut_off_and_resumed(gpt, hub, ranges):
    server, url, content, path = hub
    server.faults, server.ranges = ["cut", "cut"], ranges
    gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    asked = [headers.get("Range") for _, headers in server.seen]
    assert asked[:2] == [None, "bytes=524288-"]
    assert asked[2] == ("bytes=786432-" if ranges else "bytes=524288-")


def test_download_goes_on_in_a_later_run(gpt, hub):
    server, url, content, path = hub
    server.faults = ["cut", 503, 503, 503]
    with pytest.raises(gpt.UserError, match="503"):
        gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert not path.exists()
    gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    assert server.seen[-1][1]["Range"] == "bytes=524288-"


@pytest.mark.parametrize("extra", [b"", b"more than there is"])
def test_download_when_all_is_there_already(gpt, hub, extra):
    _, url, content, path = hub
    path.with_name("file.part").write_bytes(content + extra)
    gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_download_with_a_wrong_checksum(gpt, hub):
    server, url, content, path = hub
    server.faults = ["wrong"] * 4
    with pytest.raises(gpt.UserError, match="sha256"):
        gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert not path.exists() and not path.with_name("file.part").exists()
    assert len(server.seen) == 4
    server.faults = ["wrong"]
    gpt.download(url, path, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_download_of_what_is_not_there(gpt, hub):
    server, url, _, path = hub
    with pytest.raises(gpt.UserError, match=r"404.*get it by hand, and put it at") as caught:
        gpt.download(url + "/nowhere", path, "0" * 64)
    assert len(server.seen) == 1 and str(path) in str(caught.value)


def test_the_default_run_from_the_hub_to_the_sample(
    workplace, server, weights_file, monkeypatch, capsys, reference
):
    content = weights_file.read_bytes()
    url = f"/openai-community/gpt2/resolve/{workplace.GPT2_REVISION}/model.safetensors"
    server.files[url] = content
    server.faults = ["cut"]
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr(workplace, "GPT2_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(workplace.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(workplace, "LEARNING_RATE", 1e-2)
    results = workplace.main([])
    printed = capsys.readouterr().out
    assert "before training, gpt2 goes on like this" in printed
    assert "step     0  train" in printed and results["steps"] == 4
    assert set(results) == {
        "val_loss", "bits_per_character", "seconds", "tokens_per_second", "steps", "parameters",
        "text",
    }  # fmt: skip
    assert all(value is not None for value in results.values())
    assert results["text"].startswith("ROMEO:")
    for name in ("gpt2.pt", "gpt2.resume.pt", "gpt2.png", "gpt2.safetensors"):
        assert os.path.getsize(name) > 1000

    seen = len(server.seen)
    again = workplace.main(["--sample"])
    assert again["text"] == results["text"] and again["val_loss"] is None
    original = workplace.main(["--sample", "--init", "gpt2"])
    assert original["text"] != again["text"]
    assert len(server.seen) == seen  # the file that is there is taken


def test_bits_per_character(workplace, small_bpe):
    results = workplace.main(["--init", "scratch"])
    text = Path("excerpt.txt").read_text(encoding="utf-8")
    ids = workplace.Tokenizer().encode(text)
    val = ids[int(0.9 * len(ids)) :]
    characters = len(workplace.Tokenizer().decode(val[1:]))
    expected = results["val_loss"] * (len(val) - 1) / characters / math.log(2)
    assert results["bits_per_character"] == pytest.approx(expected)


def test_larger_sizes_take_the_hubs_own_checksum(gpt, server, monkeypatch, tmp_path):
    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()
    url = "/openai-community/gpt2-medium/resolve/main/model.safetensors"
    server.files[url] = content
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(gpt.UserError, match="checksum"):  # this server sends no X-Linked-ETag
        gpt.fetch_pretrained("gpt2-medium", "main", None, gpt.HUB)
    answer = types.SimpleNamespace(
        headers={"X-Linked-ETag": f'"{digest}"'}, raise_for_status=lambda: None
    )
    monkeypatch.setattr(requests, "head", lambda url, timeout: answer)
    path = gpt.fetch_pretrained("gpt2-medium", "main", None, gpt.HUB)
    assert path.read_bytes() == content
    assert set(gpt.LARGER) == {"gpt2-medium", "gpt2-large", "gpt2-xl"}


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_larger_sizes(gpt, name, parameters):
    with torch.device("meta"):
        model = gpt.LM(vocab_size=50257, block_size=1024, dropout=0.1, qkv_bias=True,
                       **gpt.LARGER[name])  # fmt: skip
    assert gpt.count_parameters(model) == parameters


# --- training -------------------------------------------------------------------------------------


def trained(gpt, **changes):
    """Train a small model without dropout for 3 steps; return its weights."""
    torch.manual_seed(0)
    model = gpt.LM(**SIZES)
    optimizers = gpt.make_optimizers(model, 1e-2, (0.9, 0.95), 0.1)
    tokens = torch.randint(260, (2000,), generator=torch.Generator().manual_seed(0))
    options = {
        "first_step": 0, "max_iters": 3, "window": 16, "batch_size": 8, "tokens_per_step": 128,
        "learning_rate": 1e-2, "warmup_iters": 2, "gradient_clip": 1.0, "eval_interval": 10,
        "eval_iters": 1, "seed": 1,
    }  # fmt: skip
    gpt.train(
        model, optimizers, tokens[:1800].to(torch.uint16), tokens[1800:].to(torch.uint16),
        lambda step, losses: None, **options | changes,
    )  # fmt: skip
    return named(model.named_parameters())


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(gpt, batch_size):
    whole, parts = trained(gpt), trained(gpt, batch_size=batch_size)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)


def test_how_often_one_evaluates_changes_nothing(gpt):
    often, seldom = trained(gpt, eval_interval=1), trained(gpt, eval_interval=100)
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_steps_that_cannot_be_divided(gpt):
    for changes in ({"tokens_per_step": 100}, {"window": 64}, {"n_ranks": 3}):
        with pytest.raises(gpt.UserError, match="TOKENS_PER_STEP"):
            trained(gpt, **changes)


def test_the_learning_rate(gpt):
    rates = [gpt.learning_rate_at(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=0.01)
    assert max(rates) == rates[9] and all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert gpt.learning_rate_at(100, 100, 2.0, 10) == pytest.approx(0.2)
    assert gpt.learning_rate_at(50, 100, 2.0, 10) == pytest.approx(1.1)


def test_a_resumed_run_ends_as_an_unbroken_one(workplace, monkeypatch, tmp_path):
    unbroken = workplace.main(["--init", "scratch"])
    weights = torch.load("gpt2.resume.pt", weights_only=True)
    (tmp_path / "gpt2.resume.pt").unlink()
    get_batch, steps = workplace.get_batch, iter(range(100))

    def interrupted(*args):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return get_batch(*args)

    monkeypatch.setattr(workplace, "get_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workplace.main(["--init", "scratch"])
    monkeypatch.setattr(workplace, "get_batch", get_batch)
    resumed = workplace.main(["--init", "scratch", "--resume"])
    again = torch.load("gpt2.resume.pt", weights_only=True)
    for name, value in weights["weights"].items():
        assert torch.equal(again["weights"][name], value), name
    assert again["history"] == weights["history"]
    assert [entry["tokens"] for entry in again["history"]] == [0, 128, 256]
    assert resumed["val_loss"] == unbroken["val_loss"] and resumed["text"] == unbroken["text"]


def test_a_small_model_learns(workplace, monkeypatch):
    monkeypatch.setattr(workplace, "SCRATCH_LEARNING_RATE", 1e-2)
    monkeypatch.setattr(workplace, "EVAL_INTERVAL", 50)
    results = workplace.main(["--init", "scratch", "--max-iters", "150"])
    assert results["val_loss"] < 3.5 < math.log(260)


# --- as strangers run it --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with a small copy of the script, its text, and the small encoding; (path, env)."""
    path = edited_copy("gpt2.py", tmp_path, **TINY | {"DROPOUT": 0.0})
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
    (tmp_path / "excerpt.txt").write_text(text, encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        MAKE_SMALL
        + "tiktoken.get_encoding = small\n"
        + "import torch\ntorch.cpu.get_capabilities = dict\n"  # no bfloat16: tight comparisons
    )
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "HF_ENDPOINT")}
    return path, env | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one(folder, tmp_path):
    path, env = folder
    alone = run_script(path, "--init", "scratch", env=env)
    assert alone.returncode == 0, alone.stderr
    one = torch.load(tmp_path / "gpt2.resume.pt", weights_only=True)
    for name in ("gpt2.pt", "gpt2.resume.pt", "excerpt.txt.gpt2.bin"):
        (tmp_path / name).unlink()
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(path), "--init", "scratch"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    two = torch.load(tmp_path / "gpt2.resume.pt", weights_only=True)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert finished.stdout.count("step     0  train") == 1  # one process speaks
    assert "2 processes" in finished.stdout
    losses = [re.search(r"best model: loss (\S+)", run.stdout)[1] for run in (alone, finished)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-4)


def test_bad_input_gets_one_line(folder, tmp_path):
    path, env = folder
    assert_one_line_error(run_script(path, "--sample", env=env), "gpt2.pt", "python gpt2.py")
    bad = run_script(path, "--init", "scratch", "--prompt", "", env=env)
    assert_one_line_error(bad, "empty")
    assert_one_line_error(run_script(path, "--data", "none.txt", env=env), "none.txt", "--data")
    (tmp_path / "short.txt").write_text("too short")
    bad = run_script(path, "--data", "short.txt", env=env)
    assert_one_line_error(bad, "tokens are too few", "WINDOW")
    assert_one_line_error(run_script(path, "--init", "gpt3", env=env), "gpt3", status=2)
    (tmp_path / "gpt2.safetensors").write_bytes(b"\0" * 100)
    assert_one_line_error(run_script(path, env=env), "gpt2.safetensors", "move it away")
    (tmp_path / "gpt2.pt").write_bytes(b"nonsense")
    assert_one_line_error(run_script(path, "--sample", env=env), "gpt2.pt", "move it away")


def test_a_hostile_checkpoint_runs_nothing(gpt, small_bpe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"name": "gpt2", "weights": Hostile()}, "gpt2.pt")
    with pytest.raises(gpt.UserError, match="cannot be read"):
        gpt.load_checkpoint("gpt2.pt", "cpu")
    assert not (tmp_path / "owned").exists()
    model = gpt.LM(**SIZES)
    gpt.save_checkpoint("gpt2.pt", model, gpt.Tokenizer())
    state = torch.load("gpt2.pt", weights_only=True)
    for change in (
        {"vocabulary": "cl100k_base"}, {"vocabulary": 3}, {"sizes": {}},
        {"sizes": SIZES | {"n_layers": 10**9}}, {"sizes": SIZES | {"n_embed": 64}},
        {"weights": {}}, {"documents": "x" * 9, "weights": None},
    ):  # fmt: skip
        torch.save(state | change, "gpt2.pt")
        with pytest.raises(gpt.UserError, match="does not fit"):
            gpt.load_checkpoint("gpt2.pt", "cpu")


def test_importing_has_no_effect(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", "import gpt2"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert not finished.stdout and not finished.stderr and not list(tmp_path.iterdir())
