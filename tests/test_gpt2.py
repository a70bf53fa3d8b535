"""What is gpt2.py's own: pieces, mapped text, OpenAI's weights, the cache, 16 bits, processes."""

import doctest
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from hashlib import sha256
from pathlib import Path

import pytest
import requests
import tiktoken
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL_BPE, edited_copy, load_fresh, run_child
from torch import nn

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
import transformers
from safetensors.torch import save_file

CPU = torch.device("cpu")
SHARED_BPE = ROOT.parent / "shared" / "data" / "tiktoken"
SIZES = {
    "vocab_size": 260, "block_size": 32, "n_embed": 32, "n_layers": 2, "n_heads": 4,
    "dropout": 0.0, "qkv_bias": True,
}  # fmt: skip
TINY = {name.upper(): value for name, value in SIZES.items()} | {
    "DEVICE": "cpu", "DATA": "tiny.txt", "WINDOW": 16, "BATCH_SIZE": 2, "TOKENS_PER_STEP": 64,
    "EVAL_ITERS": 2, "SAMPLE_TOKENS": 12, "MAX_ITERS": 4, "EVAL_INTERVAL": 2,
}  # fmt: skip


@pytest.fixture
def gpt():
    """The module, imported anew, with a small vocabulary, and no bfloat16: tight comparisons."""
    module = load_fresh("gpt2")
    exec(SMALL_BPE, vars(module))
    module.has_bfloat16 = lambda device: False
    torch.manual_seed(0)
    return module


@pytest.fixture
def run(gpt, monkeypatch, tmp_path):
    """The module with tiny constants, in a folder with a text. `run(*flags)` calls main."""
    for name, value in TINY.items():
        monkeypatch.setattr(gpt, name, value)
    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:6000])
    return lambda *flags: gpt.main(list(flags))


@pytest.fixture(scope="module")
def real_bpe():
    """tiktoken's GPT-2, if it is on this machine or can be had."""
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


def peer(**sizes):
    """Return transformers' model with these sizes, and random weights."""
    torch.manual_seed(1)
    config = {"vocab_size": 260, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4} | sizes
    config = transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(theirs.transformer.wpe.weight, std=2.0)
    return theirs


@pytest.fixture
def weights_file(tmp_path):
    """What transformers' save_pretrained writes of it."""
    peer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved" / "model.safetensors"


# --- the model, and OpenAI's weights --------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_it_has_the_parameters_of_gpt2(tmp_path, name):
    path = edited_copy("gpt2.py", tmp_path, MODEL=name)  # one constant chooses the sizes
    gpt = types.ModuleType("gpt2")
    exec(path.read_text(encoding="utf-8"), vars(gpt))
    with torch.device("meta"):
        model = gpt.LM(gpt.VOCAB_SIZE, gpt.BLOCK_SIZE, gpt.N_EMBED, gpt.N_HEADS, gpt.N_LAYERS, 0.1)
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    assert sum(p.numel() for p in model.parameters()) == sizes.get(name, 1_557_611_200)


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_inner": 192}])
def test_logits_loss_gradients_and_greedy_text_of_transformers(gpt, tmp_path, sizes):
    theirs = peer(**sizes)
    theirs.save_pretrained(tmp_path)
    names = {"n_embed": "n_embd", "n_layers": "n_layer", "n_heads": "n_head"}
    ours = SIZES | {k: sizes[v] for k, v in names.items() if v in sizes}
    ours = gpt.load_pretrained(tmp_path / "model.safetensors", **ours)
    idx, targets = torch.randint(260, (2, 3, 32))
    (logits, loss), their_logits = ours(idx, targets), theirs(idx).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    assert (logits - their_logits).abs().max() < 1e-4
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-6)
    loss.backward()
    their_loss.backward()
    gradients = {gpt.openai_name(name): p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        gradient = gradients.pop(name.removeprefix("transformer."))
        gradient = gradient.T if ".c_" in name and gradient.dim() == 2 else gradient
        assert (gradient - parameter.grad).norm() < 1e-4 * parameter.grad.norm(), name
    assert not gradients
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=29, **options)[0, 3:].tolist()
    assert list(gpt.generate(ours, [1, 2, 3], 29, temperature=0)) == text
    assert len(set(text)) > 5  # a continuation that repeats one token would prove little


def test_tied_weights_are_one_tensor(gpt, weights_file, tmp_path):
    fresh = gpt.LM(**SIZES)
    path = tmp_path / "kept.pt"
    gpt.save_checkpoint(path, fresh, gpt.Tokenizer())
    loaded = gpt.load_pretrained(weights_file, **SIZES)
    for model in (fresh, gpt.load_checkpoint(path, CPU)[0], loaded):
        assert model.lm_head.weight is model.token_embedding.weight
        groups = gpt.make_optimizers(model)[0].param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(fresh.parameters()))
    assert path.stat().st_size < 1.3 * 4 * sum(p.numel() for p in fresh.parameters())


def rewritten(path, edit=lambda header: None, pad=True):
    """Return the path of a safetensors file with a changed header, the numbers as they were."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else (1 - len(text)) % 4)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])
    return path


def test_a_file_like_the_one_on_the_hub(gpt, tmp_path):
    """Names without "transformer.", masks, and numbers at places that 4 does not divide."""
    reference = peer()
    names = [name for name in reference.state_dict() if name != "lm_head.weight"]
    values = {n.removeprefix("transformer."): reference.state_dict()[n].clone() for n in names}
    for layer in range(2):
        values[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = rewritten(tmp_path / "model.safetensors", pad=False)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 4 == 1
    idx = torch.randint(260, (1, 32))
    logits, _ = gpt.load_pretrained(path, **SIZES)(idx)
    assert (logits - reference(idx).logits).abs().max() < 1e-4


def entry(name, **values):
    """Return an edit of the header that changes one entry."""
    return lambda header: header[f"transformer.{name}"].update(values)


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.pop("transformer.ln_f.bias"),
        lambda h: h.pop("transformer.wte.weight"),
        lambda h: h.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        lambda h: h.update({"x": h.pop("transformer.ln_f.bias")}),
        lambda h: h.update(x=3),
        lambda h: h.update({f"x{n}": h["transformer.wte.weight"] for n in range(9)}),
        entry("ln_f.weight", dtype="F16"), entry("wpe.weight", shape=[64, 16]),
        entry("wpe.weight", shape=[-32, -32]), entry("ln_f.weight", shape=[33]),
        entry("ln_f.weight", shape=["32"]), entry("ln_f.weight", data_offsets=[-128, 0]),
        entry("ln_f.weight", data_offsets=[0, 10**12]), entry("ln_f.weight", data_offsets="no"),
        entry("ln_f.weight", data_offsets=[10**12, 10**12 + 128]),
    ],
)  # fmt: skip
def test_crafted_headers_are_refused(gpt, weights_file, edit):
    with pytest.raises(gpt.UserError, match="does not fit"):
        gpt.load_pretrained(rewritten(weights_file, edit), **SIZES)


def test_crafted_files_and_other_sizes_are_refused(gpt, weights_file):
    content = weights_file.read_bytes()
    files = [content[:n] for n in (0, 4, 8, 100, len(content) // 2, len(content) - 1)]
    for text in (b"{", b"[]", b"null", b"\xff\xff", b"[" * 100_000, b"{}"):
        files.append(len(text).to_bytes(8, "little") + text)
    files += [(10**n).to_bytes(8, "little") + b"{}" for n in (3, 12, 18)]
    for n, bad in enumerate(files):
        weights_file.write_bytes(bad)
        with pytest.raises(gpt.UserError, match="does not fit"):
            gpt.load_pretrained(weights_file, **SIZES)
            pytest.fail(f"file {n}")
    weights_file.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")  # a NaN
    with pytest.raises(gpt.UserError, match="not finite"):
        gpt.load_pretrained(weights_file, **SIZES)
    weights_file.write_bytes(content)
    for more in ({"block_size": 16}, {"n_layers": 3}, {"n_layers": 1}, {"qkv_bias": False},
                 {"vocab_size": 320}):  # fmt: skip
        with pytest.raises(gpt.UserError, match="does not fit"):
            gpt.load_pretrained(weights_file, **SIZES | more)


# --- the cache, 16 bits, streaming ----------------------------------------------------------------


def greedy_without_cache(model, ids, n):
    """Continue greedily; when the context is full, its older half is dropped."""
    context, found = ids[-model.block_size :], []
    for _ in range(n):
        found.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context = [*context, found[-1]]
        if len(context) > model.block_size:
            context = context[-(model.block_size // 2) :]
    return found


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_generating_with_a_cache_is_generating_without(gpt, model, length):
    ids, positions = torch.randint(260, (length,)).tolist(), []
    model.register_forward_hook(lambda module, args, out: positions.append(args[0].shape[1]))
    found = list(gpt.generate(model, ids, 200, temperature=0))
    assert positions.count(1) > 180  # nearly always, one position is computed
    assert found == greedy_without_cache(model, ids, 200)
    assert len(set(found)) > 5 and len(ids) == length


def test_weights_of_16_bits_are_close_and_leave_the_model_alone(gpt, model):
    idx = torch.randint(260, (1, 32))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    quick = gpt.for_generation(model)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert not any(isinstance(m, nn.Linear) for m in quick.modules())
    exact, rounded = model(idx)[0], quick(idx)[0]
    assert 0 < (rounded - exact).abs().max() < 1e-2 * exact.abs().max()
    assert quick.token_embedding.weight is model.token_embedding.weight
    list(gpt.generate(quick, [1, 2], 5))
    assert isinstance(model.lm_head, nn.Linear)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    gpt.HALF_WEIGHTS = False
    assert gpt.for_generation(model) is model


def test_a_vocabulary_that_is_padded(gpt, run, monkeypatch):
    monkeypatch.setattr(gpt, "VOCAB_SIZE", 320)
    assert math.isfinite(run("--init", "scratch")["val_loss"])
    model, _ = gpt.load_checkpoint("gpt2.pt", CPU)
    assert model.lm_head.weight.shape[0] == 320
    with torch.no_grad():
        model.lm_head.weight[260:] += 5 * model.lm_head.weight[:60]
        model.ln_f.bias += model.lm_head.weight[300]  # now these would be the likeliest ids
    assert model(torch.tensor([[1]]))[0].argmax() >= 260
    for temperature in (0, 1, 5):
        assert max(gpt.generate(model, [1], 100, temperature)) < 260
    monkeypatch.setattr(gpt, "VOCAB_SIZE", 259)
    with pytest.raises(gpt.UserError, match="VOCAB_SIZE"):
        run("--init", "scratch")


# --- tokens, and a text larger than memory --------------------------------------------------------


def test_examples(gpt):
    result = doctest.testmod(gpt)
    assert result.attempted >= 12 and result.failed == 0


def test_the_ids_of_known_texts(real_bpe, tmp_path):
    gpt = load_fresh("gpt2")
    tokenizer, text = gpt.Tokenizer(), (ROOT / "input.txt").read_text(encoding="utf-8")
    assert real_bpe.n_vocab == gpt.Tokenizer.vocab_size == gpt.VOCAB_SIZE
    assert tokenizer.encode("Hello, it is time") == [15496, 11, 340, 318, 640]
    assert tokenizer.encode("<|endoftext|>") == [50256]
    parts = [tokenizer.decode([i]) for i in tokenizer.encode("It is 12.")]
    assert parts == ["It", " is", " 12", "."]
    ids = tokenizer.encode(text)
    assert len(ids) == 338_025 and tokenizer.decode(ids) == text
    pieces = gpt.read_pieces(io.StringIO(text), 1000)
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == ids


def test_without_the_vocabulary(monkeypatch):
    def fail(name):
        raise requests.ConnectionError("no route to host")

    gpt = load_fresh("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(gpt.UserError, match=r"TIKTOKEN_CACHE_DIR.*no route to host"):
        gpt.Tokenizer()


def test_the_token_file_knows_its_text(gpt, tmp_path, monkeypatch, capsys):
    path, kept, tokenizer = tmp_path / "a.txt", tmp_path / "a.txt.gpt2.bin", gpt.Tokenizer()
    monkeypatch.chdir(tmp_path)
    for n, text in enumerate(("the theatre\n" * 100, "the heather\n" * 100)):  # of one length
        path.write_text(text, encoding="utf-8")
        os.utime(path, (n, n))
        for _ in range(2):
            tokens = gpt.load_tokens(path, tokenizer)
            assert tokens.dtype == torch.uint16 and tokens.tolist() == tokenizer.encode(text)
    assert capsys.readouterr().out.count("encoding") == 2
    before = kept.read_bytes()
    path.write_bytes(b"\xff\xfe not UTF-8")
    with pytest.raises(gpt.UserError, match="not UTF-8"):
        gpt.load_tokens(path, tokenizer)
    assert kept.read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_the_token_file_goes_where_it_can_be_written(gpt, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    path = tmp_path / "data" / "a.txt"
    path.write_text("the theatre " * 100)
    monkeypatch.chdir(tmp_path / "here")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != path.parent and allowed(p, mode))
    tokens = gpt.load_tokens(path, gpt.Tokenizer())
    assert tokens.tolist() == gpt.Tokenizer().encode("the theatre " * 100)
    assert Path("a.txt.gpt2.bin").exists() and len(list(path.parent.iterdir())) == 1
    Path("a.txt.gpt2.bin").rename(f"{path}.gpt2.bin")  # a file beside the text is used
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "write_file", None)
        assert torch.equal(gpt.load_tokens(path, gpt.Tokenizer()), tokens)
    path.write_text("the heather \ufffd" * 100, encoding="utf-8")  # now that file is old
    tokens = gpt.load_tokens(path, gpt.Tokenizer())
    assert tokens.tolist() == gpt.Tokenizer().encode("the heather \ufffd" * 100)
    assert [p.name for p in Path().iterdir()] == ["a.txt.gpt2.bin"]


def test_two_runs_that_encode_at_once(gpt, tmp_path, monkeypatch):
    path, write_file = tmp_path / "a.txt", gpt.write_file
    path.write_text("the theatre " * 100)

    def write_slowly(own, write):
        """While this run writes, another one does it all."""
        gpt.write_file = write_file
        monkeypatch.setattr(os, "getpid", lambda: 1)
        other.append(gpt.load_tokens(path, gpt.Tokenizer()))
        write_file(own, write)

    gpt.write_file, other = write_slowly, []
    tokens = gpt.load_tokens(path, gpt.Tokenizer())
    assert tokens.tolist() == other[0].tolist() == gpt.Tokenizer().encode("the theatre " * 100)
    assert len(list(tmp_path.iterdir())) == 2


# --- training -------------------------------------------------------------------------------------


def test_from_scratch_every_position_is_trained(gpt, run, monkeypatch):
    run("--init", "scratch")
    assert gpt.load_checkpoint("gpt2.pt", CPU)[0].block_size == gpt.WINDOW < gpt.BLOCK_SIZE
    for name, value in (("QKV_BIAS", False), ("VOCAB_SIZE", 320)):
        with monkeypatch.context() as patch, pytest.raises(gpt.UserError, match="weights need"):
            patch.setattr(gpt, name, value)
            run("--init", "pretrained")
    with pytest.raises(gpt.UserError, match="MAX_VAL_TOKENS"):
        monkeypatch.setattr(gpt, "MAX_VAL_TOKENS", 1)
        run("--init", "scratch")


def test_bits_per_character_and_no_biases_on_q_k_and_v(gpt, run, monkeypatch):
    monkeypatch.setattr(gpt, "QKV_BIAS", False)
    monkeypatch.setattr(gpt, "MAX_VAL_TOKENS", 50)
    results = run("--init", "scratch")
    assert gpt.load_checkpoint("gpt2.pt", CPU)[0].blocks[0].attention.qkv.bias is None
    ids = gpt.Tokenizer().encode(Path("tiny.txt").read_text())
    val = ids[int(0.9 * len(ids)) :][:50]
    nats, n = results["val_loss"] * (len(val) - 1), len(gpt.Tokenizer().decode(val[1:]))
    assert results["bits_per_character"] == pytest.approx(nats / n / math.log(2))


def test_a_validation_loss_that_rises_is_said_and_the_best_is_kept(gpt, run, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "get_lr", lambda step, *more: 1e-2 if step < 2 else 3.0)
    run("--init", "scratch")
    assert "the validation loss rises: gpt2.pt keeps step 2" in capsys.readouterr().out
    monkeypatch.setattr(gpt, "get_lr", lambda *args: 3.0)
    run("--init", "scratch")  # now the first evaluation, which is the baseline, is the lowest
    assert "it was lower before training" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [True, False])
def test_compiling_or_going_on_without(gpt, run, monkeypatch, capsys, broken):
    graphs = []

    def fail(model):
        raise RuntimeError("no triton")

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(gpt, "COMPILE", True)
    eager = functools.partial(torch.compile, backend=count)  # traces, but needs no C++ compiler
    monkeypatch.setattr(torch, "compile", fail if broken else eager)
    assert run("--init", "scratch")["steps"] == 4
    assert ("COMPILE = True does not work here" in capsys.readouterr().out) == broken
    assert len(graphs) == (not broken)  # the batches of training fit what was compiled first
    for path in ("gpt2.pt", "gpt2.resume.pt"):
        assert not [name for name in torch.load(path)["weights"] if "_orig_mod" in name]


# --- the modes ------------------------------------------------------------------------------------


def test_from_the_download_to_resume(gpt, run, server, weights_file, monkeypatch, capsys):
    content = weights_file.read_bytes()
    server.files[f"/gpt2/{gpt.REVISION}"], server.faults = content, ["cut"]
    monkeypatch.setattr(gpt, "WEIGHTS_URL", server.url + "/{}/{}")
    monkeypatch.setattr(gpt, "WEIGHTS_SHA256", sha256(content).hexdigest())
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    rates = []
    get_lr = gpt.get_lr
    monkeypatch.setattr(gpt, "get_lr", lambda *args: rates.append(args[-1]) or get_lr(*args))
    run()
    assert set(rates) == {gpt.LEARNING_RATE}
    seen = len(server.seen)
    Path("gpt2.safetensors").rename("away")
    rates.clear()
    monkeypatch.setattr(gpt, "LEARNING_RATE", 3e-3)  # an edited constant applies
    monkeypatch.setattr(gpt, "INIT", "scratch")  # but not this one
    run("--resume", "--max-iters", "6")
    assert set(rates) == {3e-3} and len(server.seen) == seen  # nothing was fetched
    Path("away").rename("gpt2.safetensors")
    capsys.readouterr()
    trained = run("--sample", "--seed", "1")["text"]
    assert "weights: gpt2.pt" in capsys.readouterr().out
    original = run("--sample", "--seed", "1", "--init", "pretrained")["text"]
    assert "weights: gpt2.safetensors" in capsys.readouterr().out and original != trained
    os.remove("gpt2.pt")
    monkeypatch.setattr(gpt, "INIT", "pretrained")
    assert run("--sample", "--seed", "1")["text"] == original and len(server.seen) == seen
    with pytest.raises(gpt.UserError, match="random weights"):
        run("--sample", "--init", "scratch")
    rates.clear()
    run("--init", "scratch")
    run("--resume", "--max-iters", "6")
    assert set(rates) == {gpt.SCRATCH_LEARNING_RATE}
    with pytest.raises(gpt.UserError, match="--init"):
        run("--resume", "--init", "scratch", "--max-iters", "8")


def test_a_checkpoint_goes_back_into_other_tools(gpt, run, monkeypatch):
    """The block of the README, at a small size."""
    run("--init", "scratch")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch, transformers.*?)```", readme, flags=re.S)
    small = "GPT2Config(vocab_size=260, n_positions=16, n_embd=32, n_layer=2, n_head=4)"
    assert "GPT2Config()" in code and "assert " in code
    monkeypatch.setitem(sys.modules, "gpt2", gpt)
    exec(code.replace("GPT2Config()", small), {})


def test_larger_models_are_checked_too(gpt, run, server, monkeypatch):
    content = b"weights" * 1000
    server.files["/gpt2-medium/main"] = content
    monkeypatch.setattr(gpt, "WEIGHTS_URL", server.url + "/{}/{}")
    monkeypatch.setattr(gpt, "MODEL", "gpt2-medium")
    with pytest.raises(gpt.UserError, match=r"gpt2-medium\.safetensors by hand"):
        gpt.find_weights()  # this server tells no checksum
    tag = f'"{sha256(content).hexdigest()}"'
    answer = types.SimpleNamespace(headers={"X-Linked-ETag": tag})
    monkeypatch.setattr(requests, "head", lambda url, timeout: answer)
    assert gpt.find_weights().read_bytes() == content
    monkeypatch.setattr(gpt, "MODEL", "gpt3")
    with pytest.raises(gpt.UserError, match="MODEL = 'gpt3'"):
        run()


# --- several processes ----------------------------------------------------------------------------


def torchrun(path, *flags):
    """Run a script as two processes on CPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(path), "--data", "tiny.txt", *flags]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=120)


def test_two_processes_train_as_one(run, tmp_path):
    inserts = SMALL_BPE + "has_bfloat16 = lambda device: False\n"
    path = edited_copy("gpt2.py", tmp_path, inserts, **TINY | {"INIT": "scratch"})
    alone = run_child(path)
    assert alone.returncode == 0, alone.stderr
    one = torch.load("gpt2.resume.pt")
    for kept in (*tmp_path.glob("*.pt"), tmp_path / "tiny.txt.gpt2.bin"):
        kept.unlink()
    first = torchrun(path, "--max-iters", "4")
    assert first.returncode == 0, first.stderr
    two = torch.load("gpt2.resume.pt")
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
    for step, entry in one["history"].items():
        for split, losses in entry.items():
            assert losses["loss"] == pytest.approx(two["history"][step][split]["loss"], abs=1e-4)
    for word in ("step     0", "step     4", "encoding", "best", "ROMEO:"):
        assert first.stdout.count(word) == 1, word  # one process speaks
    # A rank that is killed takes the others with it. What was saved goes on.
    inserts += (
        "original = train_step\n"
        "def train_step(model, optimizers, x, *more):\n"
        "    assert len(x) == 2  # each process has its half of the windows\n"
        "    if RANK == 1 and os.path.exists('now'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(model, optimizers, x, *more)\n"
    )
    killing = edited_copy("gpt2.py", tmp_path, inserts, **TINY | {"INIT": "scratch"})
    Path("now").touch()
    assert torchrun(killing, "--resume", "--max-iters", "8").returncode != 0
    os.remove("now")
    resumed = torchrun(killing, "--resume", "--max-iters", "8")
    assert resumed.returncode == 0, resumed.stderr
    assert list(torch.load("gpt2.resume.pt")["history"]) == [0, 2, 4, 6, 8]
