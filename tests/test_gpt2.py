"""What is gpt2.py's own: pieces, mapped text, OpenAI's weights, the cache, 16 bits, processes."""

import doctest
import functools
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types
from collections import Counter
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
    "DATA": "tiny.txt", "WINDOW": 16, "BATCH_SIZE": 2, "TOKENS_PER_STEP": 64,
    "EVAL_ITERS": 2, "SAMPLE_TOKENS": 12, "MAX_ITERS": 4, "EVAL_INTERVAL": 2,
}  # fmt: skip
END = 259  # <|endoftext|> of the small vocabulary


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
    for name, value in (TINY | {"DEVICE": "cpu"}).items():
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
    nn.init.zeros_(model.token_embedding.weight[END])  # hardly ever the most likely one
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
    nn.init.zeros_(theirs.transformer.wte.weight[END])
    return theirs


@pytest.fixture
def weights_file(tmp_path):
    """What transformers' save_pretrained writes of it."""
    peer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved" / "model.safetensors"


def newest(gpt):
    """Return what the newest run's file holds."""
    return gpt.read_run(gpt.saved_runs()[-1])


# --- the model, and OpenAI's weights --------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_model_that_is_chosen_after_the_import_has_its_sizes(gpt, monkeypatch, name):
    monkeypatch.setattr(gpt, "MODEL", name)
    monkeypatch.setattr(gpt.Tokenizer, "vocab_size", 50_257)
    with torch.device("meta"):
        model = gpt.LM(**gpt.model_sizes("pretrained"))
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    assert sum(p.numel() for p in model.parameters()) == sizes.get(name, 1_557_611_200)


def test_the_table_of_the_124_million():
    """Each figure in the comment at the top of the model's part is what the model has."""
    gpt = load_fresh("gpt2")
    with torch.device("meta"):
        model = gpt.LM(**gpt.model_sizes("pretrained"))
        fresh = gpt.LM(**gpt.model_sizes("scratch") | {"block_size": 256})
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    block = model.blocks[0]
    figures = [count(part) for part in (model.token_embedding, model.position_embedding, block)]
    figures += [count(model.blocks), count(block.attention), count(block.feed_forward)]
    figures += [count(block.ln1) + count(block.ln2), count(model.ln_f), count(model), count(fresh)]
    source = (ROOT / "gpt2.py").read_text(encoding="utf-8")
    table = source.partition("# The whole model")[2].partition("class Head")[0]
    assert [n for n in figures if f"{n:,}" not in table] == []


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


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_a_run_goes_into_transformers_by_the_lines_in_the_file(
    gpt, run, monkeypatch, weights_file, init
):
    weights_file.rename("gpt2.safetensors")
    run("--init", init)
    source = Path(gpt.__file__).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^#     (\S.*)", source.partition("into Hugging Face's")[2], re.M))
    monkeypatch.setitem(sys.modules, "gpt2", gpt)
    names = {"gpt2": gpt, "transformers": transformers}
    exec(code, names)
    model = names["model"].eval()
    assert model.block_size == (16 if init == "scratch" else 32)
    idx = torch.randint(260, (1, 16))
    assert (names["theirs"](idx).logits - model(idx)[0]).abs().max() < 1e-4


def test_tied_weights_are_one_tensor(gpt, run, weights_file):
    run("--init", "scratch")
    fresh = gpt.LM(**SIZES)
    n_parameters = sum(p.numel() for p in fresh.parameters())
    loaded = gpt.load_pretrained(weights_file, **SIZES)
    for model in (fresh, gpt.load_run("gpt2-1.pt", CPU)[1], loaded):
        assert model.lm_head.weight is model.token_embedding.weight
        groups = gpt.make_optimizers(model)[0].param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(fresh.parameters()))
    # Best and last weights, and AdamW's two averages: four numbers for each parameter.
    assert Path("gpt2-1.pt").stat().st_size < 1.2 * 4 * 4 * n_parameters


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_like_the_one_on_the_hub(gpt, tmp_path, dtype):
    """Names without "transformer.", masks, 16 bits, and places that 4 does not divide."""
    reference = peer().to(dtype).float()
    names = [name for name in reference.state_dict() if name != "lm_head.weight"]
    values = {n.removeprefix("transformer."): reference.state_dict()[n].to(dtype) for n in names}
    for layer in range(2):
        values[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().to(dtype)
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = rewritten(tmp_path / "model.safetensors", pad=False)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 4 == 1
    idx = torch.randint(260, (1, 32))
    logits, _ = gpt.load_pretrained(path, **SIZES)(idx)
    assert logits.dtype == torch.float32
    assert (logits - reference(idx).logits).abs().max() < 1e-4


def without_the_last_layer(path):
    """Return the content of the first of two parts, as large models are stored."""
    tensors = {n: p.clone() for n, p in peer().state_dict().items() if ".h.1." not in n}
    tensors.pop("lm_head.weight")
    save_file(tensors, path)
    return path.read_bytes()


WRONG_FILES = {
    "a pointer of Git LFS": lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:",
    "a web page": lambda path: b"<!doctype html>\n<html>Too many requests</html>",
    "a file of torch.save": lambda path: (torch.save({"x": 1}, path), path.read_bytes())[1],
    "in several files": without_the_last_layer,
    "cut off": lambda path: path.read_bytes()[:-100],
    "cut off, or no safetensors": lambda path: path.read_bytes()[:100],
    "cut off, or no safetensors file": lambda path: b"",
    "damaged": lambda path: (50).to_bytes(8, "little") + b"x" * 100,
}


@pytest.mark.parametrize("words", WRONG_FILES)
def test_other_files_are_refused_with_the_cause_in_words(gpt, weights_file, words):
    weights_file.write_bytes(WRONG_FILES[words](weights_file))
    with pytest.raises(gpt.UserError, match=f"model.safetensors.*{words}"):
        gpt.load_pretrained(weights_file, **SIZES)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"block_size": 16}, "wpe.weight does not fit"), ({"n_layers": 3}, "lacks h.2"),
        ({"n_layers": 1}, "has h.1"), ({"qkv_bias": False}, "has h.0.attn.c_attn.bias.*QKV_BIAS"),
        ({"vocab_size": 320}, "wte.weight does not fit: .*VOCAB_SIZE"),
        ({"n_embed": 16}, "does not fit: MODEL"),
    ],
)  # fmt: skip
def test_weights_of_another_size_are_refused(gpt, weights_file, more, words):
    with pytest.raises(gpt.UserError, match=words):
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
    ids, positions = torch.randint(END, (length,)).tolist(), []
    model.register_forward_hook(lambda module, args, out: positions.append(args[0].shape[1]))
    found = list(gpt.generate(model, ids, 200, temperature=0))
    assert positions.count(1) > 180  # nearly always, one position is computed
    assert found == greedy_without_cache(model, ids, 200)
    assert len(set(found)) > 5 and len(ids) == length


@pytest.mark.parametrize("parts", [[8, 4], [1, 2, 3, 4], [5, 1, 6], [31, 1]])
def test_several_tokens_go_into_a_cache_that_has_some(gpt, model, parts):
    """A mask that starts at the wrong corner shifts the logits by hundredths, silently."""
    idx = torch.randint(END, (2, sum(parts)))
    exact, _ = model(idx)
    caches = [gpt.Cache(model.block_size) for _ in model.blocks]
    end = 0
    for part in idx.split(parts, dim=1):
        end += part.shape[1]
        logits, _ = model(part, caches=caches)
        assert caches[0].length == end
        torch.testing.assert_close(logits[:, 0], exact[:, end - 1], atol=1e-4, rtol=1e-4)


def test_what_a_cache_costs(gpt):
    """The bytes of a token in the docstring of Cache."""
    sizes = gpt.SIZES["gpt2"]
    one = 2 * sizes[0] * sizes[1] * 4  # keys and values, C, blocks, 4 bytes
    assert f"{one:,}" in gpt.Cache.__doc__ and f"{one * 1024 / 1e6:.1f} MB" in gpt.Cache.__doc__


def test_the_bytes_that_backward_needs(gpt, monkeypatch):
    """40 for each number of a block's input, as the head of the file says."""
    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: True)
    block = gpt.Block(96, 3, dropout=0.1)
    matrices = {p.shape for p in block.parameters()} | {p.shape[::-1] for p in block.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.shape not in matrices:  # no parameter, and no copy of one in bfloat16
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, 1024, 96, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        result = block(x)
    assert result.shape == x.shape
    assert sum(kept.values()) / x.numel() == pytest.approx(40, abs=1)
    assert "40 bytes" in gpt.__doc__ and 14 * 2 + 2 * 4 + 2 * 2 == 40


def test_the_running_sums_of_attention(gpt):
    """The table in Head.forward, computed as fused attention does."""
    source = (ROOT / "gpt2.py").read_text(encoding="utf-8")
    table = source.partition("result, their quotient")[2].partition("T, S =")[0]
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in table.splitlines() if line]
    rows = [row for row in rows if len(row) == 5]
    weighted, total = 0.0, 0.0
    for (score, value), row in zip([(4, 10), (0, 20), (2, 30)], rows, strict=True):
        weighted += math.exp(score) * value
        total += math.exp(score)
        expected = [score, math.exp(score), weighted, total, weighted / total]
        assert [round(x, 1) for x in expected] == row


def test_generation_stops_at_the_end_of_a_document(gpt, model):
    with torch.no_grad():
        model.lm_head.weight[END] = 20 * model.ln_f.bias  # now it is the likeliest
        model.ln_f.bias *= 20
    assert list(gpt.generate(model, [1, 2], 50, temperature=0)) == [END]
    assert "".join(gpt.stream(gpt.Tokenizer(), [104, 105, END])) == "hi<|endoftext|>"


def test_weights_of_16_bits_are_close_and_leave_the_model_alone(gpt, model):
    weights = {name: p.clone() for name, p in model.named_parameters()}
    quick = gpt.for_generation(model)
    caches = [gpt.Cache(32) for _ in model.blocks]
    idx = torch.randint(END, (1, 32))
    exact = model(idx)[0]
    assert torch.equal(quick(idx)[0], exact)  # many tokens at once have float32
    for i in range(32):
        rounded = quick(idx[:, i : i + 1], caches=caches)[0]
        assert 0 < (rounded[0, 0] - exact[0, i]).abs().max() < 1e-2 * exact.abs().max()
    list(gpt.generate(quick, [1, 2], 5))
    assert isinstance(model.lm_head, nn.Linear)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    ours, copied = ({p.data_ptr() for p in m.parameters()} for m in (model, quick))
    assert copied == ours  # no parameter is in memory twice
    gpt.HALF_WEIGHTS = False
    assert gpt.for_generation(model) is model


def test_a_vocabulary_that_is_padded(gpt, run, monkeypatch):
    monkeypatch.setattr(gpt, "VOCAB_SIZE", 320)
    assert math.isfinite(run("--init", "scratch")["val_loss"])
    _, model, _ = gpt.load_run("gpt2-1.pt", CPU)
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


def test_the_merges_of_the_example_are_those_that_counting_gives():
    words = [[*"the"], [*" thin"], [*" the"], [*" then"]]
    counts = []
    for _ in range(3):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(pairs, key=pairs.get)
        counts.append(("+".join(best), pairs[best]))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
    assert counts == [("t+h", 4), ("th+e", 3), (" +the", 2)]
    doc = load_fresh("gpt2").Tokenizer.__doc__
    assert "t+h 4 times" in doc and "th+e 3" in doc and "␣+the 2" in doc


def test_the_ids_of_known_texts(real_bpe, tmp_path):
    gpt = load_fresh("gpt2")
    tokenizer, text = gpt.Tokenizer(), (ROOT / "input.txt").read_text(encoding="utf-8")
    assert real_bpe.n_vocab == gpt.Tokenizer.vocab_size == gpt.VOCAB_SIZE
    assert tokenizer.encode("Hello, it is time") == [15496, 11, 340, 318, 640]
    assert tokenizer.encode("<|endoftext|>") == [50256]
    sentence = "To be, or not to be: unquestionably Hamlet's."
    pieces, ids = re.search(r"\n +(To .*)\n +(2514 .*)\n", gpt.Tokenizer.__doc__).groups()
    assert tokenizer.encode(sentence) == [int(i) for i in ids.split()]
    assert [tokenizer.decode([int(i)]).replace(" ", "␣") for i in ids.split()] == pieces.split()
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
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path, tokenizer = tmp_path / "data" / "a.txt", gpt.Tokenizer()
    for n, text in enumerate(("the theatre\n" * 100, "the heather \ufffd\n" * 100)):
        path.write_text(text, encoding="utf-8")
        os.utime(path, (n, n))
        for _ in range(2):
            tokens = gpt.load_tokens(path, tokenizer)
            assert tokens.dtype == torch.int32 and tokens.tolist() == tokenizer.encode(text)
    assert capsys.readouterr().out.count("encoding") == 2
    assert [p.name for p in Path().iterdir()] == ["a.txt.gpt2.bin"]
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a" * 70_000 + b"\xff the", "not UTF-8 at byte 70,000"),
        (b"\xef\xbb\xbfabc\xe2\x82", "not UTF-8 at byte 6"),
        ("the".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_a_text_that_is_not_utf_8(gpt, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the theatre")
    gpt.load_tokens(Path("a.txt"), gpt.Tokenizer())
    before = Path("a.txt.gpt2.bin").read_bytes()
    Path("a.txt").write_bytes(content)
    with pytest.raises(gpt.UserError, match=words):
        gpt.load_tokens(Path("a.txt"), gpt.Tokenizer())
    assert Path("a.txt.gpt2.bin").read_bytes() == before and len(list(Path().iterdir())) == 2


def test_what_a_killed_encoding_has_left_goes_at_the_next_start(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive = (Path(f"tiny.txt.gpt2.bin.{n}.part") for n in (gone.pid, os.getppid()))
    dead.touch()
    alive.touch()
    run("--init", "scratch")
    assert not dead.exists() and alive.exists()


# --- training -------------------------------------------------------------------------------------


def test_from_scratch_every_position_is_trained(gpt, run, monkeypatch):
    run("--init", "scratch")
    assert newest(gpt)["config"]["block_size"] == gpt.WINDOW < gpt.BLOCK_SIZE
    with pytest.raises(gpt.UserError, match="TOKENS_PER_STEP"):
        monkeypatch.setattr(gpt, "TOKENS_PER_STEP", 60)
        run("--init", "scratch")


def test_batches_that_are_added_up_give_the_step_of_all_windows(gpt, monkeypatch):
    """With plain gradient descent, which shows how long the gradient is; AdamW would hide it."""
    monkeypatch.setattr(gpt, "GRADIENT_CLIP", None)
    x, y = torch.randint(260, (2, 7, 16))
    steps = []
    for batch_size in (7, 3, 1):  # 3: the last batch is smaller
        monkeypatch.setattr(gpt, "BATCH_SIZE", batch_size)
        torch.manual_seed(0)
        model = gpt.LM(**SIZES)
        loss = gpt.train_step(model, [torch.optim.SGD(model.parameters())], x, y, 0.5)
        steps.append((loss, model.state_dict()))
    for loss, weights in steps[1:]:
        assert loss.item() == pytest.approx(steps[0][0].item(), abs=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, steps[0][1][name], atol=1e-5, rtol=1e-4)


def test_a_default_run_accumulates(gpt):
    module = load_fresh("gpt2")
    assert module.TOKENS_PER_STEP > module.BATCH_SIZE * module.WINDOW
    if not module.FAST_GPU:
        assert "1024 / (2 · 256) = 2" in module.train_step.__doc__
        assert (module.TOKENS_PER_STEP, module.BATCH_SIZE, module.WINDOW) == (1024, 2, 256)


def test_bits_per_character_and_no_biases_on_q_k_and_v(gpt, run, monkeypatch):
    monkeypatch.setattr(gpt, "QKV_BIAS", False)
    monkeypatch.setattr(gpt, "MAX_VAL_TOKENS", 50)
    results = run("--init", "scratch")
    assert gpt.load_run("gpt2-1.pt", CPU)[1].blocks[0].attention.qkv.bias is None
    ids = gpt.Tokenizer().encode(Path("tiny.txt").read_text())
    val = ids[int(0.9 * len(ids)) :][:50]
    nats, n = results["val_loss"] * (len(val) - 1), len(gpt.Tokenizer().decode(val[1:]))
    assert results["bits_per_character"] == pytest.approx(nats / n / math.log(2))


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
    assert not [name for name in newest(gpt)["last"] if "_orig_mod" in name]


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
    original = run("--sample", "--seed", "1")["text"]
    assert "OpenAI's weights: gpt2.safetensors" in capsys.readouterr().out
    run()
    assert set(rates) == {gpt.LEARNING_RATE}
    seen = len(server.seen)
    Path("gpt2.safetensors").rename("away")
    rates.clear()
    monkeypatch.setattr(gpt, "LEARNING_RATE", 3e-3)  # an edited constant applies
    monkeypatch.setattr(gpt, "INIT", "scratch")  # but not this one
    run("--resume", "--max-iters", "6")
    out = capsys.readouterr().out
    assert "INIT (the run's values are kept); LEARNING_RATE (the script's are used" in out
    assert set(rates) == {3e-3} and len(server.seen) == seen  # nothing was fetched
    Path("away").rename("gpt2.safetensors")
    trained = run("--sample", "--seed", "1")["text"]
    assert "OpenAI" not in capsys.readouterr().out and original != trained
    assert run("--sample", "--seed", "1", "--init", "pretrained")["text"] == original
    assert run("--sample", "--seed", "1", "--init", "scratch")["text"] not in (original, trained)
    assert len(server.seen) == seen
    rates.clear()
    run("--init", "scratch")
    run("--resume", "--max-iters", "6")
    assert set(rates) == {gpt.SCRATCH_LEARNING_RATE}
    with pytest.raises(gpt.UserError, match="--init"):
        run("--resume", "--init", "scratch", "--max-iters", "8")
    capsys.readouterr()
    run("--runs")
    listed = capsys.readouterr().out.splitlines()
    assert "INIT = scratch" in listed[1] and "INIT" not in listed[0]


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


INSERTS = SMALL_BPE + "has_bfloat16 = lambda device: False\n"


def test_two_processes_train_as_one(run, tmp_path):
    path = edited_copy("gpt2.py", tmp_path, INSERTS, **TINY | {"INIT": "scratch"})
    alone = run_child(path)
    assert alone.returncode == 0, alone.stderr
    one = torch.load("gpt2-1.pt")
    for kept in (*tmp_path.glob("*.pt"), tmp_path / "tiny.txt.gpt2.bin"):
        kept.unlink()
    first = torchrun(path, "--max-iters", "4")
    assert first.returncode == 0, first.stderr
    two = torch.load("gpt2-1.pt")
    for name, value in one["last"].items():
        torch.testing.assert_close(two["last"][name], value, rtol=1e-3, atol=1e-5)
    for step, entry in one["history"].items():
        for split, losses in entry.items():
            assert losses["loss"] == pytest.approx(two["history"][step][split]["loss"], abs=1e-4)
    for word in ("step     0", "step     4", "encoding", "the best of", "ROMEO:"):
        assert first.stdout.count(word) == 1, word  # one process speaks
    # A rank that is killed takes the others with it. What was saved goes on.
    inserts = INSERTS + (
        "import signal\n"
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
    assert list(torch.load("gpt2-1.pt")["history"]) == [0, 2, 4, 6, 8]


def test_two_processes_with_dropout(run, tmp_path):
    """Their masks differ, their weights stay equal, and the loss that is shown is the mean."""
    inserts = INSERTS + (
        "original = train_step\n"
        "def train_step(model, optimizers, x, y, lr):\n"
        "    state = torch.get_rng_state()\n"
        "    mask = F.dropout(torch.ones(64))\n"
        "    torch.set_rng_state(state)\n"
        "    with torch.no_grad():\n"
        "        share = sum(model.train()(*xy)[1].item() for xy in zip(x.split(2), y.split(2)))\n"
        "    torch.set_rng_state(state)\n"
        "    loss = original(model, optimizers, x, y, lr).item()\n"
        "    weights = [p.sum().item() for p in model.parameters()]\n"
        "    with open(f'rank{RANK}', 'a') as file:\n"
        "        print(json.dumps([mask.tolist(), weights, share, loss]), file=file)\n"
        "    return torch.tensor(loss)\n"
    )
    constants = TINY | {"INIT": "scratch", "DROPOUT": 0.3}
    done = torchrun(edited_copy("gpt2.py", tmp_path, inserts, **constants))
    assert done.returncode == 0, done.stderr
    ranks = [[json.loads(line) for line in open(f"rank{n}")] for n in (0, 1)]  # noqa: SIM115
    masks = []
    for (mask, weights, share, loss), (mask2, weights2, share2, loss2) in zip(*ranks, strict=True):
        masks += [mask, mask2]
        assert weights == weights2 and loss == loss2
        assert loss == pytest.approx((share + share2) / 2, abs=1e-5) and share != share2
    assert len(masks) == 8 and len({str(mask) for mask in masks}) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-iters", "many"], "invalid int value"),
        (["--device", "gpu"], "device gpu"),
        (["--resume"], "no run here"),
        (["--sample"], "one process"),
        (["--seed", "-1"], "SEED = -1"),
    ],
)
def test_a_mistake_is_said_once_by_several_processes(run, tmp_path, flags, words):
    path = edited_copy("gpt2.py", tmp_path, INSERTS, **TINY | {"INIT": "scratch"})
    failed = torchrun(path, *flags)
    assert failed.returncode != 0
    assert (failed.stdout + failed.stderr).count(words) == 1
