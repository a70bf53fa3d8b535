"""What is word_gpt.py's own: words, archives, downloads, padding, its softmax, beams, attention."""

import doctest
import gzip
import io
import itertools
import math
import random
import tarfile
import unicodedata
from hashlib import sha256

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_line_error, drawn, edited_copy, load_fresh, run_child
from torch import nn

CPU = torch.device("cpu")
ARCHIVE = ROOT.parent / "shared" / "data" / "aclImdb_v1.tar.gz"
TINY = {
    "DEVICE": "cpu", "DATA": "words.txt", "MIN_FREQ": 2, "N_EMBED": 16, "N_LAYERS": 2, "N_HEADS": 2,
    "BLOCK_SIZE": 16, "BATCH_SIZE": 4, "MAX_ITERS": 6, "EVAL_INTERVAL": 3, "EVAL_ITERS": 2,
    "SAMPLE_TOKENS": 12, "CUTOFFS": (8, 20), "PROMPT": "The film was",
}  # fmt: skip


@pytest.fixture
def gpt(monkeypatch):
    """The module, imported anew, without bfloat16, so that comparisons can be tight."""
    module = load_fresh("word_gpt")
    monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    torch.manual_seed(0)
    return module


@pytest.fixture
def reviews():
    """Sixty documents of 1 to 60 words, from a vocabulary of 33."""
    rng = random.Random(0)
    words = [a + b for a in "bcdfgh" for b in "aeiou"] + ["film", "was", "the"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(60)]


@pytest.fixture
def split(gpt, reviews):
    """These documents as (tokens, edges), with some <unk>; `model` has 11 ids."""
    vocabulary = ["<pad>", "<unk>", "<eos>", *sorted(set(" ".join(reviews).split()))[:8]]
    return gpt.split_text({"train": reviews}, gpt.Tokenizer(vocabulary))["train"]


@pytest.fixture(params=[(), (5, 8)], ids=["no groups", "groups"])
def model(gpt, request):
    """A small model that has left its initial symmetry."""
    model = gpt.LM(11, 8, 16, n_heads=4, n_layers=2, dropout=0.0, cutoffs=request.param)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


# --- cleaning, words, documents -------------------------------------------------------------------
CLEANED = """film.<br /><br />The = film the = filmthe
don’t, can't = dont cant = dont cant
see HTTP://a.b/c?d=e now = see now = see now
mail me@mail.example.org today = mail today = mail today
10/10, in 1980 or the 90s, MP3 = in or the 90s mp3 = in or the s mp
Clichéd Tannhäuser = clichéd tannhäuser = clichd tannhuser
good...bad_one = good bad one = goodbadone
I <3 it.<br />ok > 2 x = i it ok x = i itok x
❤️ love = love = love
½ 12 !? =  = """
SCRIPTS = """Die Straße, größer als GROẞ = die straße größer als groß
Фильм — ещё лучше! = фильм ещё лучше
Ο ΚΟΣΜΟΣ είναι = ο κοσμος είναι
فِيلْمٌ، جَمِيلٌ = فِيلْمٌ جَمِيلٌ
यह हिन्दी है। = यह हिन्दी है
می‌خواهم = میخواهم
co\u00adoperate x\ufeffy = cooperate xy"""


@pytest.mark.parametrize("line", CLEANED.split("\n"))
def test_cleaning(gpt, line):
    text, *expected = line.split(" = ")
    for cleaning, words in zip(("spaced", "reference"), expected, strict=True):
        assert gpt.clean(text, cleaning) == gpt.clean(words, cleaning) == words


@pytest.mark.parametrize("line", SCRIPTS.split("\n"))
def test_words_of_other_scripts(gpt, tmp_path, capsys, line):
    text, words = unicodedata.normalize("NFC", line).split(" = ")
    assert gpt.clean(text, "spaced") == gpt.clean(unicodedata.normalize("NFD", text), "spaced")
    (tmp_path / "a.txt").write_text(f"{text}\n \n" * 99, encoding="utf-8")
    assert gpt.read_documents(tmp_path / "a.txt") == [words] * 99
    assert capsys.readouterr().out == ""


def test_what_cleaning_would_lose(gpt, tmp_path, capsys):
    path = tmp_path / "a.txt"
    for text in ("这部电影很好看。", "この映画は良かった。", "หนังเรื่องนี้ดีมาก", "ok 电影很好"):
        path.write_text(f"{text}\n\n" * 40, encoding="utf-8")
        with pytest.raises(gpt.UserError, match=r"no spaces.*char_gpt\.py or gpt2\.py"):
            gpt.read_documents(path)
    path.write_text("Фильм good film. Ещё\n\n" * 40, encoding="utf-8")
    gpt.CLEANING = "reference"
    assert gpt.read_documents(path) == ["good film"] * 40
    assert "drops 50% of the letters" in capsys.readouterr().out


def test_documents_vocabulary_tokenizer(gpt, reviews):
    documents = [f"the {a}{b}" for a in "abcdefghij" for b in "abcdefghij"]
    parts = gpt.split_documents(documents, 0.8, 0.1)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [80, 10, 10]
    assert sorted(itertools.chain(*parts.values())) == documents != list(itertools.chain(*parts))
    torch.manual_seed(5)
    assert gpt.split_documents(documents, 0.8, 0.1) == parts
    for shares in ((0.8, 0.2), (0.8, 0.0), (1.0, 0.0), (0.0, 0.1)):
        with pytest.raises(gpt.UserError, match="VAL_SHARE"):
            gpt.split_documents(documents, *shares)
    assert len(gpt.split_documents(documents[:10], 0.7, 0.1)["val"]) == 1  # 0.7 + 0.1 < 0.8
    vocabulary = gpt.build_vocabulary(parts["train"], 1)  # of the training documents alone
    assert vocabulary == ["<pad>", "<unk>", "<eos>", "the", *sorted(x[4:] for x in parts["train"])]
    splits = gpt.split_text(parts, gpt.Tokenizer(vocabulary))
    for part, (tokens, edges) in splits.items():
        n = len(parts[part])
        assert edges.tolist() == list(range(0, 3 * n + 1, 3))
        assert tokens[0::3].tolist() == [3] * n and tokens[2::3].tolist() == [2] * n
        assert (tokens == gpt.Tokenizer.unk).sum() == (0 if part == "train" else n)
    for order in itertools.permutations(["b a c", "c b d", "e c d"]):
        assert gpt.build_vocabulary(order, 1)[3:] == ["c", "b", "d", "a", "e"]
        assert gpt.build_vocabulary(order, 2)[3:] == ["c", "b", "d"]
    tokenizer = gpt.Tokenizer(gpt.build_vocabulary(reviews, 1))
    assert all(tokenizer.decode(tokenizer.encode(review)) == review for review in reviews)
    assert tokenizer.encode("The FILM, zzz") == [*tokenizer.encode("the film"), 1]
    for odd in (list(range(9)), ["a", "b"], ["<pad>", "<unk>", "<eos>"], {1: 2}, "<pad>"):
        with pytest.raises((gpt.UserError, TypeError)):  # load_checkpoint catches both
            gpt.Tokenizer(odd)
    assert doctest.testmod(gpt).attempted > 15 and doctest.testmod(gpt).failed == 0


# --- files and downloads --------------------------------------------------------------------------
def make_archive(path, names, mode="w:gz"):
    """Write an archive where each file says its own name."""
    with tarfile.open(path, mode) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


PLACES = itertools.product(("train", "test"), ("neg", "pos"), range(12_500))
NAMES = [f"aclImdb/{part}/{mood}/{i}_7.txt" for part, mood, i in PLACES]


def test_archives(gpt, tmp_path):
    shuffled = [*NAMES, "aclImdb/train/unsup/7_0.txt", "aclImdb/README", "../1_9.txt"]
    random.Random(2).shuffle(shuffled)
    path = make_archive(tmp_path / "a.tar", shuffled, "w")
    assert gpt.read_archive(path, "r:") == sorted(NAMES)  # gunzipped, and in another order
    for names, found in ((NAMES[:-1], "49,999"), (["a.txt"], "0")):
        with pytest.raises(gpt.UserError, match=f"has {found} of 50,000 reviews"):
            gpt.read_documents(make_archive(tmp_path / "b.tar", names, "w"))
    assert {file.name for file in tmp_path.iterdir()} == {"a.tar", "b.tar"}  # nothing is extracted


def test_wrong_files_get_the_right_reason(tmp_path):
    script = edited_copy("word_gpt.py", tmp_path, **TINY)
    whole = make_archive(tmp_path / "whole", NAMES[:999]).read_bytes()
    packed, half = gzip.compress(b"no tar file at all " * 99), whole[: len(whole) // 2]
    for name, content, reason in (
        ("page.tar.gz", b"<!DOCTYPE html>Not found", "is no archive, it starts with b'<!DOC"),
        ("text.txt.gz", packed, "is no whole archive"), ("cut.tar.gz", whole[:20], "no whole"),
        ("half.tar.gz", half, "no whole"), ("few.tar.gz", whole, "has 999 of 50,000 reviews"),
        ("latin.txt", b"Clich\xe9 " * 99, "not UTF-8"), ("empty.txt", b"", "is empty"),
        ("one.txt", b"a film " * 99, "at least 10 paragraphs"),
        ("rare.txt", b"\n\n".join(b"w%dx" % i for i in range(99)), "MIN_FREQ = 2"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert_one_line_error(
            run_child(script, "--data", name), name * (name != "rare.txt"), reason
        )
    assert_one_line_error(run_child(script, "--data", "."), "no file .")


@pytest.mark.parametrize("ranges", [True, False])
def test_download(gpt, server, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    content = random.Random(0).randbytes(200_000)
    digest, url = sha256(content).hexdigest(), f"{server.url}/a.bin"
    server.files["/a.bin"], server.ranges = content, ranges
    for fault in (None, "cut", "wrong", "lie", 500):
        server.faults, server.seen[:] = [fault, fault], []
        gpt.download(url, "a.bin", digest)
        if fault == "cut" and ranges:  # it goes on near where it broke off
            assert int(server.seen[1][1]["Range"][6:-1]) > 90_000
        assert (tmp_path / "a.bin").read_bytes() == content
        assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    server.seen.clear()
    (tmp_path / "a.bin.part").write_bytes(content[:150_000])  # of an earlier process
    gpt.download(url, "a.bin", digest)
    assert server.seen[0][1]["Range"] == "bytes=150000-" and len(server.seen) == 1
    (tmp_path / "a.bin.part").write_bytes(content)  # whole, but not yet renamed
    gpt.download(url, "a.bin", digest)
    assert (tmp_path / "a.bin").read_bytes() == content
    gpt.DATA, gpt.DATA_URL = "a.bin", url
    (tmp_path / "a.bin").write_bytes(b"put here by hand")
    assert gpt.find_data(None).read_bytes() == b"put here by hand"


def test_download_that_never_works(gpt, server, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    server.files["/a"] = b"content" * 1000
    for fault, tries in (("wrong", 5), (404, 1), (503, 5), (429, 5), (416, 5)):
        server.seen.clear()
        server.faults = [fault] * 9
        with pytest.raises(gpt.UserError, match=r"put http.* at a\.tar\.gz by hand"):
            gpt.download(f"{server.url}/a", "a.tar.gz", "0" * 64)
        assert len(server.seen) == tries and list(tmp_path.iterdir()) == []


# --- windows and padding --------------------------------------------------------------------------
def test_padding_changes_nothing(gpt, model):
    """Documents of 2 to 9 tokens in one batch, against each of them alone, without padding."""
    texts = [[*torch.randint(3, 11, (n - 1,)).tolist(), 2] for n in (2, 5, 9, 3)]
    edges = torch.tensor([0, 2, 7, 16, 19])
    x, y = gpt.cut_windows((torch.tensor([*itertools.chain(*texts)]), edges), edges[:-1, None], 8)
    logits, loss = model(x)[0], model(x, y)[1]
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = 0.0
    for row, text in zip(logits, texts, strict=True):
        alone, targets = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
        torch.testing.assert_close(row[: len(text) - 1], model(alone)[0][0])
        total += model(alone, targets)[1] * len(targets[0]) / 15
    torch.testing.assert_close(loss, total)
    total.backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_each_target_counts_once(gpt, model, split):
    total = known = right = n = n_known = 0
    model.eval()
    for document in [split[0][a:b].tolist() for a, b in itertools.pairwise(split[1].tolist())]:
        for i in range(1, len(document)):
            begin = (i - 1) // 8 * 8  # windows of 8 side by side
            logits = model(torch.tensor([document[begin:i]]))[0][0, -1].detach()
            loss = -F.log_softmax(logits, -1)[document[i]].item()
            total, n, right = total + loss, n + 1, right + (int(logits.argmax()) == document[i])
            if document[i] != gpt.Tokenizer.unk:
                known, n_known = known + loss, n_known + 1
    for batch_size in (1, 7, 1000):
        metrics = gpt.estimate_loss(model, split, batch_size)
        assert metrics["loss"] == pytest.approx(total / n, rel=1e-5)
        assert metrics["known"] == pytest.approx(known / n_known, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right / n)
    assert 0 < n_known < n
    assert gpt.estimate_loss(model, split, 2, eval_iters=3) != metrics


# --- the large softmax ----------------------------------------------------------------------------
def full_softmax(layer, x, V, cutoffs):
    """ln P of all V words, row by row: P(word), or P(group) P(word in its group)."""
    scores = x @ layer.weight.T + layer.bias
    G, edges, columns = len(cutoffs), [0, *cutoffs, V], []
    first = scores[:, : G + edges[1]].softmax(-1)
    for word in range(V):
        group = sum(word >= cutoff for cutoff in cutoffs)
        inside = scores[:, G + edges[group] : G + edges[group + 1]].softmax(-1)
        inside = first[:, group - 1] * inside[:, word - edges[group]] if group else None
        columns.append(inside if group else first[:, G + word])
    return torch.stack(columns, -1).log()


def test_large_products_have_few_shapes(gpt, split, monkeypatch):
    """Each new number of rows would cost preparation, which PyTorch keeps: 2.5 GB in 150 steps."""
    linear, rows = F.linear, set()
    model = gpt.LM(11, 8, 16, n_heads=2, n_layers=1, dropout=0.0, cutoffs=(5, 8))
    weights = {weight.data_ptr() for weight, _ in model.lm_head.softmaxes()}

    def record(x, weight, bias=None):
        if weight.data_ptr() in weights:
            rows.add(x.shape[-2])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", record)
    for batch_size in range(1, 30):
        model(*gpt.get_batch(split, batch_size, 8, CPU), each=True)
        model(torch.ones(1, min(batch_size, 8), dtype=torch.int64))
    assert len(rows) > 2 and all(n % 64 == 0 for n in rows)


def test_start_and_shared_weights(gpt):
    model = gpt.LM(50, 8, 16, n_heads=2, n_layers=1, dropout=0.0, cutoffs=(20, 35, 99))
    logits, _ = model(torch.randint(50, (4, 8)))
    torch.testing.assert_close(logits, torch.full_like(logits, -math.log(50)), atol=0.4, rtol=0)
    # One tensor reads and predicts, and one optimizer moves it, once.
    assert [p.shape for p in model.parameters() if len(p) in (50, 52)] == [(52, 16), (52,)]
    groups = [group for optimizer in gpt.make_optimizers(model) for group in optimizer.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert torch.equal(model.lm_head.embed(torch.tensor([0, 49])), model.lm_head.weight[[2, 51]])
    for cutoffs in ((9, 5), (5, 5), (0, 5), 5, (5.0,), (1, "a"), None):
        with pytest.raises(gpt.UserError, match="CUTOFFS = "):
            gpt.AdaptiveSoftmax(20, 8, cutoffs)


# --- generation, beams, attention -----------------------------------------------------------------
def favour(model, **logits):
    """Make the model give these logits, t3=1.0 meaning token 3, wherever it is asked."""
    nn.init.zeros_(model.lm_head.weight)
    nn.init.zeros_(model.lm_head.bias)
    for token, value in logits.items():
        model.lm_head.bias.data[len(model.lm_head.cutoffs) + int(token[1:])] = value


def test_generation_draws_words_until_eos(gpt, model):
    favour(model, t0=9.0, t1=9.0, t2=-99.0, t4=8.0)
    drawn = list(gpt.generate(model, [3], 300))
    assert len(drawn) == 300 and {0, 1, 2}.isdisjoint(drawn)
    assert list(gpt.generate(model, [3], 5, temperature=0)) == [4] * 5
    favour(model, t2=2.0)
    lengths = [len(list(gpt.generate(model, [3], 300))) for _ in range(20)]
    assert 0 < max(lengths) < 300
    with pytest.raises(gpt.UserError, match="no token"):
        gpt.beam_search(model, [], 5, 2)


def log_probability(model, ids, new):
    """What the model thinks of a continuation, among words and <eos> alone."""
    total = 0.0
    for i, token in enumerate(new):
        logits = model(torch.tensor([(ids + new[:i])[-model.block_size :]]))[0][0, -1].detach()
        total += F.log_softmax(logits[2:], -1)[token - 2].item()
    return total


def test_beam_search_against_brute_force(gpt):
    better_than_greedy = ended = 0
    for seed in range(10):
        torch.manual_seed(seed)
        tiny = gpt.LM(vocab_size=6, block_size=4, n_embed=8, n_heads=2, n_layers=1, dropout=0.5)
        tiny.eval()
        for parameter in tiny.parameters():
            nn.init.normal_(parameter, std=0.8)
        every = [[*new, 2] for n in range(4) for new in itertools.product((3, 4, 5), repeat=n)]
        every += map(list, itertools.product((3, 4, 5), repeat=4))
        best = max(every, key=lambda new: log_probability(tiny, [3, 5], new))
        found, score = gpt.beam_search(tiny.train(), [3, 5], 4, beams=500)
        assert found == best and score == pytest.approx(
            log_probability(tiny, [3, 5], best), rel=1e-4
        )
        greedy, _ = gpt.beam_search(tiny, [3, 5], 4, beams=1)
        drawn = list(gpt.generate(tiny, [3, 5], 4, temperature=0))
        assert greedy == drawn + [2] * (len(drawn) < 4)
        better_than_greedy += greedy != best
        ended += found[-1] == 2
    assert better_than_greedy > 0 and ended > 0


@pytest.mark.parametrize("bfloat16", [False, True])
def test_attention_weights_are_those_that_the_model_used(gpt, model, bfloat16):
    gpt.has_bfloat16 = lambda device: bfloat16
    used, softmax, ids = [], F.softmax, [3, 5, 8, 8, 4, 10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim: used.append(softmax(x, dim=dim)) or used[-1])
        model(torch.tensor([ids]))
    layers = gpt.attention_weights(model, ids)
    assert len(layers) == len(used) == 2
    for weights, expected in zip(layers, used, strict=True):
        assert weights.shape == (4, 6, 6) and weights.triu(1).abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 6))
        near = 0.02 if bfloat16 else 1e-5
        torch.testing.assert_close(weights, expected[0].float(), atol=near, rtol=near)
    assert not any(block.attention.head._forward_hooks for block in model.blocks)


# --- whole runs -----------------------------------------------------------------------------------
def test_a_whole_run(gpt, tmp_path, monkeypatch, reviews, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [f"{review} x{i}y" for i, review in enumerate(reviews)]  # each has an unknown word
    (tmp_path / "words.txt").write_text("\n\n".join(texts), encoding="utf-8")
    for name, value in TINY.items():
        monkeypatch.setattr(gpt, name, value)
    results = gpt.main(["--beams", "2"])
    model, tokenizer = gpt.load_checkpoint("word_gpt.pt", CPU)
    parts = gpt.split_documents(gpt.read_documents(tmp_path / "words.txt"), 0.8, 0.1)
    assert tokenizer.vocabulary == gpt.build_vocabulary(parts["train"], 2)
    assert tokenizer.vocabulary != gpt.build_vocabulary(parts["train"] + parts["val"], 2)
    splits = gpt.split_text(parts, tokenizer)
    for part in ("val", "test"):
        metrics = gpt.estimate_loss(model, splits[part], 4)
        assert results[part] | metrics == results[part]
        assert results[part]["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        nats, characters = metrics["loss"] * len(splits[part][0]), len(" ".join(parts[part])) + 1
        assert results[part]["bits_per_character"] == pytest.approx(nats / math.log(2) / characters)
    assert results["val_loss"] == results["val"]["loss"]
    assert "2 beams: " in capsys.readouterr().out
    history = torch.load("word_gpt.resume.pt", weights_only=True)["history"]
    _, axes = drawn(monkeypatch, lambda: gpt.save_run(model, tokenizer, [], history, "", 0.0))
    for line, split in zip(axes.get_lines(), ("train", "val"), strict=True):
        assert list(line.get_ydata()) == [entry[split]["accuracy"] for entry in history.values()]
    picture = (tmp_path / f"{gpt.NAME}_attention.png").read_bytes()
    gpt.main(["--seed", "2"])
    assert (tmp_path / f"previous.{gpt.NAME}_attention.png").read_bytes() == picture > b"\x89PNG"
    gpt.main(["--sample", "--prompt", "The FILM, xyzzy"])
    assert "\nthe film <unk>" in capsys.readouterr().out
    monkeypatch.setattr(gpt, "PROMPT", "Una película")
    assert gpt.main(["--sample"])["text"].split()[0] == tokenizer.vocabulary[3]
    with pytest.raises(gpt.UserError, match="CLEANING = 'none'"):
        gpt.clean("", "none")


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the archive of reviews is not here")
def test_the_reviews(gpt):
    parts = gpt.split_documents(gpt.read_documents(ARCHIVE), gpt.TRAIN_SHARE, gpt.VAL_SHARE)
    assert [len(texts) for texts in parts.values()] == [40_000, 5_000, 5_000]
    vocabulary = gpt.build_vocabulary(parts["train"], gpt.MIN_FREQ)
    assert len(vocabulary) == pytest.approx(36_832, rel=0.01) and vocabulary[3] == "the"
