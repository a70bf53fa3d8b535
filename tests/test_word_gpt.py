"""word_gpt.py: cleaning, vocabulary, archives, padding, metrics, beam search, attention, faults."""

import doctest
import gzip
import hashlib
import io
import itertools
import math
import random
import re
import tarfile
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_line_error, drawn, edited_copy, load_fresh, run_script
from torch import nn

CPU = torch.device("cpu")
ARCHIVE = ROOT.parent / "shared" / "data" / "aclImdb_v1.tar.gz"
NAMES = [
    f"aclImdb/{part}/{mood}/{i}_{stars}.txt"
    for part in ("train", "test")
    for mood, stars in (("neg", 2), ("pos", 9))
    for i in range(12_500)
]
TINY = {
    "DATA": "reviews.txt",
    "DATA_URL": None,
    "MIN_FREQ": 2,
    "N_EMBED": 32,
    "N_LAYERS": 2,
    "N_HEADS": 2,
    "BLOCK_SIZE": 16,
    "BATCH_SIZE": 4,
    "MAX_ITERS": 6,
    "EVAL_INTERVAL": 3,
    "EVAL_ITERS": 2,
    "SAMPLE_TOKENS": 12,
    "PICTURE_TOKENS": 8,
    "PROMPT": "The film was",
}
SETTINGS = {"cleaning": "spaced", "min_freq": 1, "train_share": 0.8, "val_share": 0.1, "seed": 1}


@pytest.fixture
def gpt():
    """The module, imported anew, without bfloat16, so that comparisons can be tight."""
    module = load_fresh("word_gpt")
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
def reviews():
    """Sixty reviews of 1 to 60 words, from a vocabulary of 30."""
    rng = random.Random(0)
    words = [a + b for a in "bcdfgh" for b in ("a", "e", "i", "o", "u")] + ["film", "was", "the"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(60)]


@pytest.fixture
def tokens(gpt, reviews):
    """The ids of these reviews, each with <eos> behind it."""
    corpus = gpt.make_corpus(reviews, **SETTINGS | {"min_freq": 45})
    assert (corpus["train"]["tokens"] == gpt.Tokenizer.unk).any()
    ids = corpus["train"]["tokens"]
    return torch.where(ids < 11, ids, 3 + ids % 8)  # `model` has 11 ids


def add(archive, name, content=b"", **more):
    """Add a member to an open tarfile, with further fields of TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in more.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def make_archive(path, names, **bad):
    """Write an archive where each review says its own name; `bad` is one more member, the last."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in names:
            add(archive, name, f"review {name}".encode())
        if bad:
            add(archive, **bad)
    return path


# --- cleaning, words, numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spaced", "reference"),
    [
        ("film.<br /><br />The", "film the", "filmthe"),
        ("a well-made film", "a well made film", "a wellmade film"),
        ("don’t, can't", "dont cant", "dont cant"),
        ("see http://a.b/c?d=e now", "see now", "see now"),
        ("see www.imdb.com/x!", "see", "see"),
        ("mail me@mail.example.org today", "mail today", "mail today"),
        ("10/10, in 1980 or the 90s", "in or the s", "in or the s"),
        ("Clichéd Tannhäuser", "cliched tannhauser", "clichd tannhuser"),
        ("good...bad", "good bad", "goodbad"),
        ("one\n two\t\u00a0three", "one two three", "one two three"),
        ("<i>very</i> <3 good", "very good", "very good"),
        ("映画 12 !?", "", ""),
        ("", "", ""),
    ],
)
def test_cleaning(gpt, text, spaced, reference):
    assert gpt.clean(text, "spaced") == spaced
    assert gpt.clean(text, "reference") == reference


@pytest.mark.parametrize("cleaning", ["spaced", "reference"])
def test_cleaning_twice_changes_nothing(gpt, cleaning):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("aBé'’<>br/ .@-\n1http:www.İ", k=40))
        once = gpt.clean(text, cleaning)
        assert set(once) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert " ".join(once.split()) == once
        if "http" not in once and "www" not in once:
            assert gpt.clean(once, cleaning) == once


def test_unknown_cleaning(gpt):
    with pytest.raises(gpt.UserError, match=r"CLEANING = 'none'.*spaced.*reference"):
        gpt.clean("a", "none")


def test_examples_in_docstrings(gpt):
    assert doctest.testmod(gpt).attempted > 8
    assert doctest.testmod(gpt).failed == 0


def test_tokenizer_round_trip(gpt, reviews):
    tokenizer = gpt.Tokenizer(gpt.build_vocabulary(reviews, "spaced", min_freq=1))
    for review in reviews:
        assert tokenizer.decode(tokenizer.encode(review)) == review
    assert tokenizer.vocab_size == len(set(" ".join(reviews).split())) + 3
    ids = list(range(3, tokenizer.vocab_size))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.encode("The FILM, zzz") == [*tokenizer.encode("the film"), 1]
    assert tokenizer.decode([0, 1, 2]) == "<pad> <unk> <eos>"
    assert tokenizer.encode("") == []


def test_words_are_sorted_by_count_then_spelling(gpt):
    texts = ["b a c", "c b d", "e c d"]
    for order in itertools.permutations(texts):
        vocabulary = gpt.build_vocabulary(order, "spaced", min_freq=1)
        assert vocabulary["words"] == ["c", "b", "d", "a", "e"]
    assert gpt.build_vocabulary(texts, "spaced", min_freq=2)["words"] == ["c", "b", "d"]


def test_corpus_deals_out_whole_reviews(gpt):
    reviews = [f"the {a}{b}" for a in "abcdefghij" for b in "abcdefghij"]
    corpus = gpt.make_corpus(reviews, **SETTINGS)
    words = corpus["vocabulary"]["words"]
    assert words[0] == "the"
    assert len(words) == 81  # of the 100 other words, those of the training reviews alone
    for part, share in (("train", 80), ("val", 10), ("test", 10)):
        tokens = corpus[part]["tokens"].tolist()
        assert tokens[0::3] == [3] * share  # the
        assert tokens[2::3] == [gpt.Tokenizer.eos] * share
        seen = set(tokens[1::3])
        assert seen == (set(range(4, 84)) if part == "train" else {gpt.Tokenizer.unk})
        assert corpus[part]["characters"] == share * len("the ab ")
    again = gpt.make_corpus(reviews, **SETTINGS)
    assert all(torch.equal(again[p]["tokens"], corpus[p]["tokens"]) for p in ("train", "val"))
    other = gpt.make_corpus(reviews, **SETTINGS | {"seed": 2})
    assert other["vocabulary"] != corpus["vocabulary"]  # other reviews are for training


@pytest.mark.parametrize(
    ("reviews", "change", "words"),
    [
        ([], {}, "0 documents"),
        (["a b"] * 2, {}, "2 documents"),
        (["...", "", "1999"] * 9, {}, "0 documents"),
        (["a b"] * 20, {"min_freq": 99}, "MIN_FREQ = 99"),
    ],
)
def test_too_little_text(gpt, reviews, change, words):
    with pytest.raises(gpt.UserError, match=words):
        gpt.make_corpus(reviews, **SETTINGS | change)


# --- archives, files, the cache -------------------------------------------------------------------


def test_archive_order_does_not_matter(gpt, tmp_path):
    shuffled = NAMES[:]
    random.Random(2).shuffle(shuffled)
    extra = {"name": "aclImdb/train/unsup/7_0.txt", "content": b"unlabelled"}
    reviews = gpt.load_reviews(make_archive(tmp_path / "a.tar.gz", shuffled, **extra))
    assert reviews == [f"review {name}" for name in sorted(NAMES)]
    missing_one = make_archive(tmp_path / "b.tar.gz", NAMES[:-1])
    with pytest.raises(gpt.UserError, match="24,999 test reviews"):
        gpt.load_reviews(missing_one)


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "aclImdb/train/pos/../../../1_9.txt", "content": b"x"},
        {"name": "../1_9.txt", "content": b"x"},
        {"name": "aclImdb/train/pos/1_9.txt", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"name": "aclImdb/train/pos/1_9.txt", "type": tarfile.LNKTYPE, "linkname": NAMES[0]},
        {"name": "aclImdb/train/pos/1_9.txt", "type": tarfile.FIFOTYPE},
    ],
)
def test_hostile_members_are_refused(gpt, tmp_path, bad):
    path = make_archive(tmp_path / "a.tar.gz", NAMES[:3], **bad)
    with pytest.raises(gpt.UserError, match=r"link, or points out"):
        gpt.load_reviews(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]  # nothing was extracted


@pytest.mark.parametrize("keep", [20, 0.3, 0.9, 0.999])
def test_archive_cut_off(gpt, tmp_path, keep):
    path = make_archive(tmp_path / "a.tar.gz", NAMES[:500])
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(gpt.UserError, match=r"is damaged|has \d+ train reviews"):
        gpt.load_reviews(path)


def test_archive_with_bad_contents(gpt, tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(b"no tar file at all" * 1000))
    with pytest.raises(gpt.UserError, match="is damaged"):
        gpt.load_reviews(path)
    path = make_archive(tmp_path / "b.tar.gz", [], name=NAMES[0], content=b"\xff\xfe")
    with pytest.raises(gpt.UserError, match="is damaged"):
        gpt.load_reviews(path)


def test_paragraphs_are_documents(gpt, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One\ntwo.\n\n \nThree.\n\n\n\nFour", encoding="utf-8")
    assert [gpt.clean(text, "spaced") for text in gpt.load_reviews(path)] == [
        "one two",
        "three",
        "four",
    ]


def test_cache(gpt, tmp_path, reviews, capsys):
    path = tmp_path / "reviews.txt"
    path.write_text("\n\n".join(reviews), encoding="utf-8")

    def load(**change):
        corpus = gpt.load_corpus(path, None, None, **SETTINGS | change)
        return corpus, "cleaned" in capsys.readouterr().out

    first, cleaned = load()
    assert cleaned
    second, cleaned = load()
    assert not cleaned
    assert second["vocabulary"] == first["vocabulary"]
    for part in ("train", "val", "test"):
        assert torch.equal(second[part]["tokens"], first[part]["tokens"])
    changes = [{"min_freq": 2}, {"seed": 9}, {"cleaning": "reference"}, {"val_share": 0.15}]
    for change in changes:
        assert load(**change)[1]
        assert not load(**change)[1]
    caches = list(tmp_path.glob("reviews.*.pt"))
    assert len(caches) == 5
    for cache in caches:
        cache.write_bytes(cache.read_bytes()[:100])
    third, cleaned = load()
    assert cleaned
    assert torch.equal(third["val"]["tokens"], first["val"]["tokens"])
    path.write_text("\n\n".join(reviews[:-1]), encoding="utf-8")
    assert load()[1]


def test_cache_of_a_read_only_folder(gpt, tmp_path, reviews, monkeypatch):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "reviews.txt").write_text("\n\n".join(reviews), encoding="utf-8")
    folder.chmod(0o555)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    gpt.load_corpus(folder / "reviews.txt", None, None, **SETTINGS)
    assert [file.name for file in folder.iterdir()] == ["reviews.txt"]
    assert len(list((tmp_path / "here" / "data").glob("reviews.*.pt"))) == 1
    folder.chmod(0o755)


@pytest.mark.parametrize("fault", [None, "cut", "wrong", "lie", 500])
def test_download(gpt, server, tmp_path, monkeypatch, reviews, fault):
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    content = "\n\n".join(reviews).encode()
    server.files["/reviews.txt"] = content
    server.faults = [fault, fault]
    corpus = gpt.load_corpus(
        "data/reviews.txt",
        f"{server.url}/reviews.txt",
        hashlib.sha256(content).hexdigest(),
        **SETTINGS,
    )
    assert (tmp_path / "data" / "reviews.txt").read_bytes() == content
    assert len(corpus["train"]["tokens"]) > 100
    assert not list(tmp_path.rglob("*.part"))
    seen = len(server.seen)
    gpt.load_corpus("data/reviews.txt", f"{server.url}/reviews.txt", "0" * 64, **SETTINGS)
    assert len(server.seen) == seen  # a copy that is there is used, whatever its checksum


@pytest.mark.parametrize("fault", ["wrong", 404, "cut"])
def test_download_that_never_works(gpt, server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(gpt.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    server.files["/a.tar.gz"] = b"content" * 1000
    server.faults = [fault] * 9
    digest = hashlib.sha256(server.files["/a.tar.gz"]).hexdigest()
    with pytest.raises(gpt.UserError, match=r"a\.tar\.gz.*put it at data/a\.tar\.gz"):
        gpt.load_corpus("data/a.tar.gz", f"{server.url}/a.tar.gz", digest, **SETTINGS)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


# --- batches, padding, metrics --------------------------------------------------------------------


def split_reviews(gpt, tokens):
    """The reviews that lie in a vector of ids, as lists, each with its <eos>."""
    reviews, review = [], []
    for token in tokens.tolist():
        review.append(token)
        if token == gpt.Tokenizer.eos:
            reviews.append(review)
            review = []
    assert not review
    return reviews


def test_windows_are_of_single_reviews(gpt, reviews):
    tokens = gpt.make_corpus(reviews, **SETTINGS)["train"]["tokens"]
    every_review = split_reviews(gpt, tokens)
    places = {
        tuple(review[i : i + 10]) for review in every_review for i in range(max(1, len(review) - 9))
    }
    seen = set()
    for _ in range(60):
        xs, ys = gpt.get_batch(tokens, 512, 9)
        assert xs.shape == ys.shape == (512, 9)
        assert xs.dtype == ys.dtype == torch.int64
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            assert x[1:] == y[:-1]
            window = [x[0], *y]
            real = [token for token in window if token != gpt.Tokenizer.pad]
            assert window == real + [gpt.Tokenizer.pad] * (10 - len(real))  # on the right alone
            assert len(real) == 10 or real in every_review  # short reviews come as a whole
            assert tuple(real) in places
            seen.add(tuple(real))
    assert seen == set(places)


def test_padding_changes_nothing(gpt, either_model):
    """Reviews of 2 to 8 tokens in one batch, against each of them alone, without padding."""
    model = either_model
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lengths = [2, 5, 8, 3]
    texts = [[*torch.randint(3, 11, (n - 1,)).tolist(), gpt.Tokenizer.eos] for n in lengths]
    padded = torch.tensor([text + [gpt.Tokenizer.pad] * (9 - len(text)) for text in texts])
    x, y = padded[:, :-1], padded[:, 1:]

    logits, loss = model(x)[0], model(x, y)[1]
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = [(torch.tensor([text[:-1]]), torch.tensor([text[1:]])) for text in texts]
    results = [(model(x)[0], model(x, y)[1]) for x, y in alone]
    n = sum(len(text) - 1 for text in texts)
    expected = sum(result[1] * pair[1].numel() for result, pair in zip(results, alone, strict=True))
    (expected / n).backward()
    for row, text, result in zip(logits, texts, results, strict=True):
        torch.testing.assert_close(row[: len(text) - 1], result[0][0])
    torch.testing.assert_close(loss, expected / n)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)

    other = torch.where(x == gpt.Tokenizer.pad, 7, x)  # what fills the gaps is of no interest
    torch.testing.assert_close(model(other, y)[1], loss)
    real = y != gpt.Tokenizer.pad
    torch.testing.assert_close(loss, F.cross_entropy(logits[real], y[real]))


def test_two_steps_to_a_word_against_torch(gpt):
    """Losses, hits, all probabilities and gradients as `nn.AdaptiveLogSoftmaxWithLoss` has them."""
    ours = gpt.LM(50, 8, 16, n_heads=2, n_layers=1, dropout=0.0, cutoffs=(20, 35, 99))
    nn.init.normal_(ours.lm_head.weight)
    nn.init.zeros_(ours.lm_head.bias)
    nn.init.constant_(ours.lm_head.bias[:2], 6.0)  # the groups, so that rare words come out likely
    torchs = nn.AdaptiveLogSoftmaxWithLoss(16, 50, [20, 35], div_value=1.0, head_bias=True)
    weights = ours.lm_head.weight.detach()
    with torch.no_grad():  # torch has the groups behind the words, and projects before a group
        torchs.head.weight.copy_(torch.cat([weights[2:22], weights[:2]]))
        torchs.head.bias.zero_()
        torchs.head.bias[-2:] = 6.0
        for (projection, words), begin in zip(torchs.tail, (22, 37), strict=True):
            projection.weight.copy_(torch.eye(16))
            words.weight.copy_(weights[begin : begin + 15])
    x, y = torch.randint(3, 50, (16, 8)), torch.randint(0, 50, (16, 8))
    y[0, :2], y[1, :3] = torch.tensor([35, 49]), torch.tensor([19, 20, 34])
    real = y != gpt.Tokenizer.pad
    everywhere = ours.hidden(x).detach().requires_grad_()
    ours.hidden = lambda idx: everywhere  # the gradients of the output alone
    losses, correct = ours.score(x, y)
    hidden = everywhere.detach()[real].requires_grad_()
    expected = torchs(hidden, y[real])
    torch.testing.assert_close(losses, -expected.output)
    loss = ours(x, y)[1]
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    gradients = ours.lm_head.weight.grad.split([2, 20, 15, 15])
    torch.testing.assert_close(torch.cat([gradients[1], gradients[0]]), torchs.head.weight.grad)
    for gradient, (_, words) in zip(gradients[2:], torchs.tail, strict=True):
        torch.testing.assert_close(gradient, words.weight.grad)
    torch.testing.assert_close(everywhere.grad[real], hidden.grad)
    logits = ours(x)[0][real]
    torch.testing.assert_close(logits, torchs.log_prob(hidden))
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(len(logits)))
    likeliest = torchs.predict(hidden)
    y[real] = torch.where((torch.rand(len(logits)) < 0.5) & (likeliest > 0), likeliest, y[real])
    _, correct = ours.score(x, y)
    assert torch.equal(correct, likeliest == y[real])
    assert (y[real][correct] >= 20).any()  # rare words were the likeliest, too
    assert not correct.all()


def test_groups_begin_with_equal_odds_for_all_words(gpt):
    logits, _ = gpt.LM(50, 8, 16, 2, 1, 0.0, (20, 35))(torch.randint(50, (4, 8)))
    assert logits.shape == (4, 8, 50)
    torch.testing.assert_close(logits, torch.full_like(logits, -math.log(50)), atol=0.4, rtol=0)
    assert gpt.LM(20, 8, 16, 2, 1, 0.0, (20, 35)).lm_head.out_features == 20  # no rare words
    for cutoffs in ((9, 5), (5, 5), (0, 5), 5):
        with pytest.raises(gpt.UserError, match=rf"CUTOFFS = {re.escape(str(cutoffs))}: must be"):
            gpt.LM(20, 8, 16, 2, 1, 0.0, cutoffs)


def test_words_begin_near_nothing(gpt):
    model = gpt.LM(1000, 64, 32, 2, 1, 0.0)
    for layer in (model.lm_head, model.position_embedding):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_one_matrix_reads_and_predicts(gpt):
    """The rows of `lm_head` are the embedding as well, without those of the groups."""
    model = gpt.LM(50, 8, 16, n_heads=2, n_layers=1, dropout=0.0, cutoffs=(20, 35))
    x, y = torch.randint(3, 50, (2, 4, 8))
    read, made = [], []

    def keep(module, inputs, output):
        inputs[0].retain_grad()
        read.append(inputs[0])

    model.dropout.register_forward_hook(keep)
    model.final_norm.register_forward_hook(lambda module, inputs, output: made.append(output))
    model(x, y)[1].backward()
    words, positions = model.lm_head.weight[2:], model.position_embedding.weight
    torch.testing.assert_close(read[0], words[x] + positions)
    both, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    model.hidden = lambda idx: made[0].detach()  # no way back to the words that were read
    model(x, y)[1].backward()
    reading = torch.zeros(52, 16).index_add(0, x.flatten() + 2, read[0].grad.flatten(0, 1))
    assert reading.abs().max() > 0
    torch.testing.assert_close(both, model.lm_head.weight.grad + reading)


def test_of_equal_odds_one_token_is_the_guess(gpt):
    """bfloat16 often makes two logits equal: not both of them can have been right."""
    for cutoffs, hits in (((), []), ((5, 8), [5])):
        model = gpt.LM(11, 8, 16, 2, 1, 0.0, cutoffs)
        nn.init.zeros_(model.lm_head.weight)
        nn.init.zeros_(model.lm_head.bias)
        model.lm_head.bias.data[: len(cutoffs)] = 3.0  # all rare words are likelier than the others
        targets = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
        _, correct = model.score(torch.full((1, 8), 3), targets)
        assert targets[correct[None]].tolist() == hits


@pytest.fixture(params=[(), (5, 8)], ids=["no groups", "groups"])
def either_model(gpt, request):
    """A small model that has left its initial symmetry, in eval mode; with and without groups."""
    model = gpt.LM(11, 8, 16, n_heads=4, n_layers=2, dropout=0.5, cutoffs=request.param)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_estimate_loss_counts_each_target_once(gpt, either_model, tokens):
    model = either_model
    total = known = right = n = n_known = 0
    for review in split_reviews(gpt, tokens):
        for i in range(1, len(review)):
            begin = (i - 1) // 8 * 8  # windows of 8 side by side
            with torch.no_grad():
                logits = model(torch.tensor([review[begin:i]]))[0][0, -1]
            loss = -F.log_softmax(logits, -1)[review[i]].item()
            total, n = total + loss, n + 1
            right += int(logits.argmax()) == review[i]
            if review[i] != gpt.Tokenizer.unk:
                known, n_known = known + loss, n_known + 1
    model.train()
    state = torch.random.get_rng_state()
    for batch_size in (1, 7, 1000):
        metrics = gpt.estimate_loss(model, tokens, batch_size)
        assert metrics["loss"] == pytest.approx(total / n, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right / n)
        assert metrics["known_loss"] == pytest.approx(known / n_known, rel=1e-5)
    assert 0 < n_known < n
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    some = gpt.estimate_loss(model, tokens, 2, eval_iters=3)
    assert some == gpt.estimate_loss(model, tokens, 2, eval_iters=3) != metrics


class Constant(nn.Module):
    """Stands for a model that gives the same odds everywhere."""

    def __init__(self, odds):
        super().__init__()
        self.block_size = 4
        self.lm_head = nn.Linear(1, 1)
        self.logits = torch.tensor(odds).log()

    def score(self, idx, targets):
        """Losses and hits of the targets that are not padding, as `LM` returns them."""
        targets = targets[targets != 0]
        return -self.logits[targets], targets == self.logits.argmax()


def test_metrics_by_hand(gpt):
    # Targets of "5 3 3 1 <eos>": 3 3 1 <eos>. Their odds: 1/2 1/2 1/8 1/4.
    tokens = torch.tensor([5, 3, 3, 1, 2])
    metrics = gpt.estimate_loss(Constant([1e-9, 1 / 8, 1 / 4, 1 / 2, 1 / 16, 1 / 16]), tokens, 2)
    assert metrics["loss"] == pytest.approx((1 + 1 + 3 + 2) / 4 * math.log(2))
    assert metrics["known_loss"] == pytest.approx((1 + 1 + 2) / 3 * math.log(2))
    assert metrics["accuracy"] == 2 / 4
    # Two targets, and two places of padding, which a model that says <pad> would get right.
    padded = gpt.estimate_loss(Constant([0.9, 0.01, 0.04, 0.05]), torch.tensor([3, 3, 2]), 2)
    assert padded["accuracy"] == 0
    assert padded["loss"] == pytest.approx(-(math.log(0.05) + math.log(0.04)) / 2)


def test_schedules(gpt):
    def rate(step, schedule):
        return gpt.learning_rate_at(step, 100, 2.0, 10, schedule)

    assert rate(0, "one-cycle") == pytest.approx(0.2)
    assert rate(50, "one-cycle") == pytest.approx(1.0)
    assert rate(99, "one-cycle") == pytest.approx(0.02)
    assert rate(0, "constant") == pytest.approx(0.2)
    assert rate(50, "constant") == rate(99, "constant") == 2.0
    with pytest.raises(gpt.UserError, match="SCHEDULE = 'cosine'"):
        rate(0, "cosine")


# --- generation, beams, attention -----------------------------------------------------------------


def favour(model, **odds):
    """Make the model give these logits, t3=1.0 meaning token 3, wherever it is asked."""
    nn.init.zeros_(model.lm_head.weight)
    nn.init.zeros_(model.lm_head.bias)
    for token, value in odds.items():
        model.lm_head.bias.data[len(model.cutoffs) + int(token[1:])] = value


def test_generation_never_draws_what_is_no_word(gpt, either_model):
    model = either_model
    favour(model, t0=9.0, t1=9.0, t2=-99.0, t4=8.0)
    drawn = list(gpt.generate(model, [3], 300))
    assert len(drawn) == 300
    assert {0, 1, 2}.isdisjoint(drawn)
    assert list(gpt.generate(model, [3], 5, temperature=0)) == [4] * 5


def test_generation_stops_at_eos(gpt, either_model):
    model = either_model
    favour(model, t2=99.0)
    assert list(gpt.generate(model, [3], 300)) == []
    favour(model, t2=2.0)
    lengths = [len(list(gpt.generate(model, [3], 300))) for _ in range(20)]
    assert 0 < max(lengths) < 300


def test_empty_prompt(gpt, model):
    with pytest.raises(gpt.UserError, match="prompt is empty"):
        list(gpt.generate(model, [], 5))
    with pytest.raises(gpt.UserError, match="prompt is empty"):
        gpt.beam_search(model, [], 5, 2)
    with pytest.raises(gpt.UserError, match="BEAMS = 0"):
        gpt.beam_search(model, [3], 5, 0)


def test_beam_search_of_width_one_is_greedy(gpt, either_model):
    model = either_model
    ended = 0
    for seed in range(12):
        torch.manual_seed(seed)
        nn.init.normal_(model.lm_head.weight, std=0.5)
        greedy = list(gpt.generate(model, [3, 4], 12, temperature=0))
        found, _ = gpt.beam_search(model, [3, 4], 12, beams=1)
        assert found[: len(greedy)] == greedy
        assert found[len(greedy) :] == ([] if len(greedy) == 12 else [gpt.Tokenizer.eos])
        ended += len(greedy) < 12
    assert 0 < ended < 12  # both kinds of ending came


def log_probability(gpt, model, ids, new):
    """What the model thinks of a continuation, among words and <eos> alone."""
    total = 0.0
    for i, token in enumerate(new):
        with torch.no_grad():
            logits = model(torch.tensor([(ids + new[:i])[-model.block_size :]]))[0][0, -1]
        logits[: gpt.Tokenizer.eos] = -math.inf
        total += F.log_softmax(logits, -1)[token].item()
    return total


def test_beam_search_of_full_width_finds_the_best(gpt):
    better_than_greedy = 0
    for seed in range(10):
        torch.manual_seed(seed)
        tiny = gpt.LM(vocab_size=6, block_size=4, n_embed=8, n_heads=2, n_layers=1, dropout=0.0)
        for parameter in tiny.parameters():
            nn.init.normal_(parameter, std=0.8)
        tiny.eval()
        every = [
            [*words, *end]
            for n in range(5)
            for words in itertools.product((3, 4, 5), repeat=n)
            for end in ([[]] if n == 4 else [[gpt.Tokenizer.eos]])
        ]
        every += [[*words, 2] for words in itertools.product((3, 4, 5), repeat=3)]
        best = max(every, key=lambda new: log_probability(gpt, tiny, [3, 5], new))
        found, score = gpt.beam_search(tiny, [3, 5], 4, beams=500)
        assert found == best
        assert score == pytest.approx(log_probability(gpt, tiny, [3, 5], best), rel=1e-4)
        greedy, _ = gpt.beam_search(tiny, [3, 5], 4, beams=1)
        better_than_greedy += greedy != best
    assert better_than_greedy > 0


def test_attention_weights_are_the_softmax_rows(gpt, model):
    ids = [3, 5, 8, 8, 4, 10]
    state = torch.random.get_rng_state()
    layers = gpt.attention_weights(model, ids)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(layers) == 2

    x = model.lm_head.weight[ids] + model.position_embedding.weight[: len(ids)]
    for block, found in zip(model.blocks, layers, strict=True):
        assert found.shape == (4, 6, 6)
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 6))
        assert found.triu(1).abs().max() == 0
        projected = block.norm1(x) @ block.attention.queries_keys_values.weight.T
        for head in range(4):
            queries = projected[:, 4 * head : 4 * head + 4]
            keys = projected[:, 16 + 4 * head : 16 + 4 * head + 4]
            for t in range(6):
                expected = F.softmax(queries[t] @ keys[: t + 1].T / 2, dim=-1)
                torch.testing.assert_close(found[head, t, : t + 1], expected)
        x = block(x[None])[0]
    assert not any(block.attention.head._forward_hooks for block in model.blocks)
    gpt.has_bfloat16 = lambda device: True
    for found in gpt.attention_weights(model, ids):
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 6))


def test_attention_picture_has_a_row_for_each_reader(gpt, model, tmp_path, monkeypatch):
    words = ["i", "think", "this", "film", "was", "<unk>"]
    layers = gpt.attention_weights(model, [3, 4, 5, 6, 7, 1])
    path = tmp_path / "a.png"
    panels = drawn(monkeypatch, lambda: gpt.draw_attention(path, words, layers))
    assert path.read_bytes()[:4] == b"\x89PNG"
    expected = [weights for layer in layers for weights in layer]
    assert len(panels) == len(expected) == 8
    for axes, weights in zip(panels, expected, strict=True):
        shown = torch.tensor(axes.images[0].get_array().tolist())
        torch.testing.assert_close(shown, weights)
        assert [label.get_text() for label in axes.get_yticklabels()] == words
    assert panels[5].get_title() == "layer 2, head 2"


def test_curves_are_named_for_what_they_show(gpt, tmp_path, monkeypatch):
    history = [
        {"step": step, **{s: {"loss": x / step, "accuracy": x * step} for s, x in both.items()}}
        for step, both in ((1, {"train": 2.0, "val": 3.0}), (2, {"train": 2.5, "val": 3.5}))
    ]
    panels = drawn(monkeypatch, lambda: gpt.draw_losses(tmp_path / "l.png", history))
    for axes, what in zip(panels, ("loss", "accuracy"), strict=True):
        for line, split in zip(axes.get_lines(), ("train", "val"), strict=True):
            assert line.get_label() == {"train": "training", "val": "validation"}[split]
            assert line.get_xydata().tolist() == [[e["step"], e[split][what]] for e in history]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, reviews):
    """A copy of word_gpt.py with small constants, in a folder with a small text."""
    path = edited_copy("word_gpt.py", tmp_path, **TINY)
    (tmp_path / "reviews.txt").write_text("\n\n".join(reviews), encoding="utf-8")
    return path


def test_run_resume_and_sample(script, tmp_path):
    run = run_script(script, "--beams", "2")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert any("in the vocabulary; unknown: " in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["0", "3", "6"]
    assert [line.split()[0] for line in lines if "bits per character" in line] == [
        "train",
        "val",
        "test",
    ]
    assert any(line.startswith("likeliest of 2 beams") for line in lines)
    assert any(line.startswith("the film was") for line in lines)
    for name in ("word_gpt.png", "word_gpt_attention.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    whole = torch.load(tmp_path / "word_gpt.resume.pt", weights_only=True)
    assert set(whole["history"][-1]["val"]) == {"loss", "accuracy", "known_loss"}

    # Six steps in one go, and three of six that are then resumed, end in the same weights.
    source = script.read_text(encoding="utf-8")
    assert source.count("stop = step >= max_iters or") == 1
    script.write_text(source.replace("stop = step >= max_iters", "stop = step >= 3"), "utf-8")
    assert run_script(script).returncode == 0
    assert torch.load(tmp_path / "word_gpt.resume.pt")["history"][-1]["step"] == 3
    script.write_text(source, encoding="utf-8")
    assert run_script(script, "--resume").returncode == 0
    resumed = torch.load(tmp_path / "word_gpt.resume.pt", weights_only=True)
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name

    sample = run_script(script, "--sample", "--prompt", "The FILM, xyzzy")
    assert sample.stdout.startswith("the film <unk>")
    (tmp_path / "reviews.txt").write_text("other words\n\n" * 20, encoding="utf-8")
    assert_one_line_error(run_script(script, "--resume"), "word_gpt.resume.pt", "to be the same")


def test_main_returns_results(gpt, tmp_path, monkeypatch, reviews, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.txt").write_text("\n\n".join(reviews), encoding="utf-8")
    for name, value in TINY.items():
        monkeypatch.setattr(gpt, name, value)
    results = gpt.main([])
    model, tokenizer = gpt.load_checkpoint("word_gpt.pt", CPU)
    corpus = gpt.load_corpus(
        "reviews.txt",
        None,
        None,
        **SETTINGS | {"min_freq": gpt.MIN_FREQ, "seed": gpt.SEED},
    )
    for part in ("val", "test"):
        metrics = gpt.estimate_loss(model, corpus[part]["tokens"], 4)
        assert results[part] | metrics == results[part]
        assert results[part]["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert results["val_loss"] == results["val"]["loss"]
    nats = results["val_loss"] * len(corpus["val"]["tokens"])
    assert results["bits_per_character"] == pytest.approx(
        nats / math.log(2) / corpus["val"]["characters"]
    )
    assert results["steps"] == 6
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["text"].startswith("the film was")
    assert tokenizer.vocabulary == corpus["vocabulary"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere.tar.gz"], ["nowhere.tar.gz", "--data"]),
        (["--data", "."], ["cannot read ."]),
        (["--data", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--data", "short.txt"], ["1 documents are too few"]),
        (["--data", "cut.tar.gz"], ["cut.tar.gz is damaged"]),
        (["--sample"], ["word_gpt.pt"]),
        (["--prompt", "1999!"], ["prompt is empty"]),
        (["--device", "toaster"], ["toaster"]),
    ],
)
def test_bad_input_gets_one_line(script, tmp_path, flags, words):
    (tmp_path / "latin.txt").write_bytes("Clich\u00e9".encode("latin-1"))
    (tmp_path / "short.txt").write_text("one film", encoding="utf-8")
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(b"x" * 10_000)[:30])
    assert_one_line_error(run_script(script, *flags), *words)


@pytest.mark.parametrize("flags", [["--beams", "-1"], ["--max-iters", "0"]])
def test_bad_flags(script, flags):
    assert_one_line_error(run_script(script, *flags), flags[1], status=2)


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"CLEANING": "none"}, ["CLEANING = 'none'"]),
        ({"SCHEDULE": "cosine"}, ["SCHEDULE = 'cosine'"]),
        ({"MIN_FREQ": 10_000}, ["MIN_FREQ = 10000"]),
    ],
)
def test_bad_constants(tmp_path, reviews, constants, words):
    path = edited_copy("word_gpt.py", tmp_path, **TINY | constants)
    (tmp_path / "reviews.txt").write_text("\n\n".join(reviews), encoding="utf-8")
    assert_one_line_error(run_script(path), *words)


def test_experiments(tmp_path):
    """The two names set what the header says that they set."""
    import importlib.util

    found = {}
    for name in ("small", "large"):
        path = edited_copy("word_gpt.py", tmp_path, EXPERIMENT=name)
        spec = importlib.util.spec_from_file_location("copy", path)
        module = types.ModuleType("copy")
        module.__file__ = str(path)
        spec.loader.exec_module(module)
        found[name] = (module.N_LAYERS, module.N_HEADS, module.N_EMBED, module.SCHEDULE)
    assert found == {"small": (2, 2, 256, "one-cycle"), "large": (4, 8, 512, "constant")}


# --- the real reviews -----------------------------------------------------------------------------


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the archive of reviews is not here")
def test_real_reviews(gpt):
    reviews = gpt.load_reviews(ARCHIVE)
    assert len(reviews) == 50_000
    assert reviews[0].startswith("Once again Mr. Costner has dragged out")  # test/neg/0_2.txt
    some = reviews[::25]
    for cleaning in ("spaced", "reference"):
        corpus = gpt.make_corpus(some, **SETTINGS | {"cleaning": cleaning, "min_freq": 5})
        tokenizer = gpt.Tokenizer(corpus["vocabulary"])
        assert set(tokenizer.words[3:6]) == {"the", "a", "and"}
        for review in some[:50]:
            ids = tokenizer.encode(review)
            known = [w for w in gpt.clean(review, cleaning).split() if w in tokenizer.id_of]
            assert [w for w in tokenizer.decode(ids).split() if w != "<unk>"] == known
    n_targets = sum(len(part["tokens"]) for key, part in corpus.items() if key != "vocabulary")
    assert n_targets == sum(len(gpt.clean(text, "reference").split()) + 1 for text in some)
