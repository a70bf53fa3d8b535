"""The three scripts stay one: the same skeleton, the same words wherever nothing differs."""

import ast
import re

import pytest
from conftest import ROOT, drawn, load_fresh

SCRIPTS = ["char_gpt", "word_gpt", "gpt2"]
PAIRS = [("char_gpt", "word_gpt"), ("char_gpt", "gpt2"), ("word_gpt", "gpt2")]

# What differs on purpose: {(first script, second script): {definition: the reason}}. A definition
# that is not named here is the same in both, to the letter, comments included.
WORDS = {
    "Tokenizer": "words, with places for what is no known word",
    "Tokenizer.__init__": "made from a vocabulary that was counted elsewhere",
    "Tokenizer.encode": "unknown words have an id, so that nothing is an error",
    "Tokenizer.decode": "spaces between words",
    "LM": "rare words are chosen in two steps; one matrix reads and predicts",
    "LM.__init__": "rare words are chosen in two steps; one matrix reads and predicts",
    "LM.forward": "rare words are chosen in two steps; padding is left out of the loss",
    "get_batch": "a window belongs to one review",
    "estimate_loss": "accuracy, and the loss without <unk>, beside the loss",
    "generate": "stops at <eos>, and never draws <unk> or <pad>",
    "stream": "spaces between words; shows what the model reads of the prompt",
    "learning_rate_at": "SCHEDULE may keep the rate constant",
    "train": "passes the schedule on; losses are dicts",
    "Keeper.__init__": "history entries are dicts of metrics",
    "Keeper.__call__": "prints the further metrics",
    "Keeper.keep": "the loss is one metric of several",
    "draw_losses": "a second panel, for accuracy",
    "parse_flags": "--beams, and archives as data",
    "main": "corpus in place of text, test split, metrics, attention, beams",
}
SIZE = {
    "Tokenizer": "GPT-2's byte pairs, by tiktoken",
    "Tokenizer.__init__": "rules from tiktoken in place of characters of the text",
    "Tokenizer.encode": "any text can be encoded, on all cores",
    "Tokenizer.decode": "byte pairs in place of characters",
    "Head": "fused attention, and where the dropout of weights went",
    "Head.forward": "fused attention; queries of the last positions only, with a cache",
    "MultiHead": "biases on queries, keys and values",
    "MultiHead.__init__": "biases on queries, keys and values",
    "MultiHead.forward": "keys and values from the cache",
    "FeedForward.forward": "GELU in place of ReLU",
    "Block": "hands on what is new in MultiHead",
    "Block.__init__": "hands on what is new in MultiHead",
    "Block.forward": "hands on the cache",
    "LM": "tied weights and GPT-2's initialisation",
    "LM.__init__": "tied weights and GPT-2's initialisation",
    "LM.forward": "positions after the cache; the loss in slices, without all logits",
    "get_batch": "text on the disk, in 16 bits",
    "estimate_loss": "text on the disk, in 16 bits",
    "generate": "a cache of keys and values; weights packed for one token at a time",
    "stream": "a token can end within a character",
    "make_optimizers": "AdamW alone, which the published settings are meant for",
    "learning_rate_at": "down along a cosine, to a tenth of the peak",
    "train": "gradients accumulated over batches and processes; torch.compile on CUDA",
    "Keeper": "one process of several keeps",
    "Keeper.__init__": "tokens per step, the x-axis of the plot; the process that keeps",
    "Keeper.__call__": "one process of several keeps",
    "save_checkpoint": "tied weights are one tensor",
    "load_checkpoint": "tied weights are one tensor",
    "draw_losses": "over tokens in place of steps",
    "download": "half a gigabyte goes on where it broke off",
    "parse_flags": "the flag --init",
    "print_setup": "tokens per step, processes",
    "main": "weights to begin with, several processes, a look before and after",
}
INTENDED = {
    ("char_gpt", "word_gpt"): WORDS,
    ("char_gpt", "gpt2"): SIZE
    | {"split_text": "text on the disk; at most so much of it to validate"},
    ("word_gpt", "gpt2"): SIZE | {"Keeper.keep": "one loss in place of several metrics"},
}

CONSTANTS = [
    "NAME", "ON_GPU", "DEVICE", "SEED", "DATA", "BLOCK_SIZE", "N_EMBED", "N_LAYERS", "N_HEADS",
    "DROPOUT", "BATCH_SIZE", "MAX_ITERS", "LEARNING_RATE", "WARMUP_ITERS", "BETAS", "WEIGHT_DECAY",
    "GRADIENT_CLIP", "EVAL_INTERVAL", "EVAL_ITERS", "PROMPT", "SAMPLE_TOKENS", "TEMPERATURE",
    "TOP_K", "TOP_P",
]  # fmt: skip
BANNERS = [
    "1. Hyperparameters",
    "2. Data and tokenizer",
    "3. Model",
    "4. Batches and loss",
    "5. Generation",
    "6. Training",
    "7. Keeping results",
    "8. main",
]
PUBLIC = [
    "Tokenizer", "Head", "MultiHead", "FeedForward", "Block", "LM", "get_batch", "estimate_loss",
    "generate", "train", "save_checkpoint", "load_checkpoint", "main",
]  # fmt: skip
DIMENSIONS = ["B", "T", "C", "H", "hs", "V"]


def source_of(script):
    """Return the text of a script."""
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def definitions(script):
    """Return {name: source} of every function and class of a script; methods as Class.method.

    The source of a class is what it has outside its methods: its docstring and attributes. Comments
    belong to what they stand in.
    """
    source = source_of(script)
    lines = source.splitlines()

    def text(node):
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return "\n".join(lines[start - 1 : node.end_lineno])

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.ClassDef):
            whole = text(node)
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = text(method)
                    whole = whole.replace(text(method), "")
            found[node.name] = whole
    return found


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_shared_definitions_are_the_same_to_the_letter(pair):
    first, second = map(definitions, pair)
    shared = first.keys() & second.keys()
    differing = {name for name in shared if first[name] != second[name]}
    intended = INTENDED[pair]
    assert differing - intended.keys() == set(), "copies that drifted apart"
    assert intended.keys() - differing == set(), "listed as different, but they are the same"
    assert all(len(reason) > 10 for reason in intended.values())
    assert len(shared - differing) >= 10, "hardly anything is shared"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_skeleton(script):
    source = source_of(script)
    banners = re.findall(r"^# -{20,}\n# (\d\. .*)\n# -{20,}$", source, flags=re.M)
    assert len(banners) == len(BANNERS)
    for banner, expected in zip(banners, BANNERS, strict=True):
        assert banner.startswith(expected)
    names = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert [name for name in names if name in PUBLIC] == PUBLIC
    assert len(names) == len(set(names))
    constants = [
        node.targets[0].id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    assert [name for name in constants if name in CONSTANTS] == CONSTANTS
    for number, line in enumerate(source.splitlines(), 1):
        assert len(line) <= 100, (number, line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_says_what_it_is(script):
    for line in source_of(script).partition("# 2. Data")[0].splitlines():
        if re.match(r"[A-Z][A-Z_0-9]* = ", line) and not line.startswith(("DATA_", "HUB_")):
            assert "  # " in line, line


# Constants whose comment differs, for the constant itself does.
OWN_COMMENTS = {
    "NAME": "word_gpt.py draws a second picture",
    "DATA": "an archive of reviews",
    "TRAIN_SHARE": "another share",
    "BATCH_SIZE": "gpt2.py has several batches per step",
    "LEARNING_RATE": "gpt2.py has a second one, from scratch",
    "BETAS": "another memory",
    "SAMPLE_TOKENS": "a review can end before",
}


def test_constants_that_scripts_share_have_the_same_comment():
    comments = {}
    for script in SCRIPTS:
        top = source_of(script).partition("# 2. Data")[0]
        for name, comment in re.findall(r"^([A-Z][A-Z_0-9]*) = .*?  # (.*)$", top, flags=re.M):
            comments.setdefault(name, set()).add(comment)
    differing = {name for name, texts in comments.items() if len(texts) > 1}
    assert differing == OWN_COMMENTS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_end_of_the_file_is_the_same(script):
    def ending(name):
        return source_of(name).partition('if __name__ == "__main__":')[2].partition("\n# ---")[0]

    assert ending(script) == ending("char_gpt") != ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_definition_has_a_docstring_and_only_main_reads_constants(script):
    tree = ast.parse(source_of(script))
    constants = {
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    } - {"NAME"}
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in [*public]:
        if isinstance(node, ast.ClassDef):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
            public += [m for m in methods if not m.name.startswith("__") or m.name == "__call__"]
    for node in public:
        assert ast.get_docstring(node), node.name
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if node.name in ("main", "parse_flags"):
            continue
        read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & constants
        assert not read, f"{script}.{node.name} reads {read}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_keeps_its_promises(script):
    header = ast.get_docstring(ast.parse(source_of(script)))
    for letter in DIMENSIONS:
        assert re.search(rf"^ *{letter}\s+\S", header, flags=re.M), f"no {letter} in the key"
    assert f"python {script}.py" in header
    assert "torch 2.13.0" in header
    assert "arXiv" in header or "arxiv" in header
    ending = source_of(script)[-3500:]
    assert "Try this" in ending


@pytest.mark.parametrize(("script", "differing"), [("word_gpt", WORDS), ("gpt2", SIZE)])
def test_the_header_names_what_differs(script, differing):
    header = ast.get_docstring(ast.parse(source_of(script))).partition("What differs")[2]
    for name in differing:
        assert re.search(rf"\b{name.partition('.')[0]}\b", header), name


def test_only_what_belongs_there_lies_at_the_top():
    import subprocess

    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"README.md", "requirements.txt", "input.txt", "LICENSE", "tests"}
    allowed |= {f"{script}.py" for script in SCRIPTS}
    assert {name for name in top if not name.startswith(".")} == allowed


def test_the_messages_that_the_readme_explains_are_those_of_the_scripts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r'^- \*\*"(.*?)"', readme, flags=re.M)
    assert len(quoted) >= 2
    for message in quoted:
        assert message.replace("char_gpt.pt", "{path}") in source_of("char_gpt"), message


def test_nothing_is_left_to_be_filled_in():
    for path in (ROOT / "README.md", *(ROOT / f"{script}.py" for script in SCRIPTS)):
        text = path.read_text(encoding="utf-8")
        for word in ("TODO", "FIXME", "@" * 2):
            assert word not in text, (path.name, word)


@pytest.mark.parametrize(("script", "x"), [("char_gpt", "step"), ("gpt2", "tokens")])
def test_curves_are_named_for_what_they_show(script, x, tmp_path, monkeypatch):
    draw_losses = load_fresh(script).draw_losses
    history = [{x: 0, "train": 4.0, "val": 5.0}, {x: 10, "train": 2.0, "val": 3.0}]
    (axes,) = drawn(monkeypatch, lambda: draw_losses(tmp_path / "l.png", history))
    train, val = axes.get_lines()
    assert (train.get_label(), val.get_label()) == ("training", "validation")
    assert train.get_xydata().tolist() == [[0, 4.0], [10, 2.0]]
    assert val.get_xydata().tolist() == [[0, 5.0], [10, 3.0]]
