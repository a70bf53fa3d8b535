"""Every command of README.md and RESULTS.md runs as it stands, with tiny constants."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, TEXT, edited_copy, load_fresh, run_child

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
SHARED_BPE = ROOT.parent / "shared" / "data" / "tiktoken"
# .ci/run runs the two commands that install packages, in a fresh virtual environment. One of them
# runs these tests.
INSTALL = r"pip install -r [\w/.]+ && "
# Of these, each run takes minutes to hours: here it is only seen that there is such a choice.
BENCHMARK = r"tests/(benchmark\w*)\.py"


def find_commands(text):
    """Return the commands of a page: lines that are indented, and code within sentences."""
    lines = re.findall(r"^    (?:\$ )?((?:pip|python|torchrun|uv) .*)", text, flags=re.M)
    prose = re.sub(r"^    .*", "", text, flags=re.M)
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.M | re.S)
    return lines + re.findall(r"`((?:python|torchrun|uv|diff)\s[^`]*)`", prose)


COMMANDS = [command for text in (README, RESULTS) for command in find_commands(text)]
COMMANDS = [" ".join(command.split()) for command in COMMANDS if "pytest" not in command]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder as a stranger has it, with small constants, a small text, and a run of each."""
    folder = tmp_path_factory.mktemp("clone")
    words = TEXT.split()
    text = "\n\n".join(" ".join(words[i : i + 20]) for i in range(0, len(words), 20))
    for name in ("input.txt", "small.txt", "large.txt", "my.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    for name, tiny, _, insert in SCRIPTS:
        tiny = tiny | {"DATA": "input.txt", "EVAL_INTERVAL": 400, "MAX_ITERS": 3, "PROMPT": "a"}
        edited_copy(f"{name}.py", folder, insert, **tiny)
        run(folder, f"python {name}.py")
    for name in ("tests", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    block = re.search(r"(?s:in `sums\.py`.*?)\n\n((?:    .*\n)+)", README)[1]
    source = re.sub("^    ", "", block, flags=re.M).replace("60_000", "200")
    (folder / "sums.py").write_text(source, encoding="utf-8")
    (folder / "folder").mkdir()  # of solutions to mark
    shutil.copy(folder / "char_gpt.py", folder / "folder")
    return folder


def run(folder, command):
    """Run a command of a page with few steps; returns what it printed."""
    command = re.sub(INSTALL, "", command)
    command = re.sub(r"--max-iters \d+", lambda match: f"--max-iters {few(match[0])}", command)
    script, *flags = shlex.split(command.removeprefix("python ").removeprefix("uv run "))
    if script in [f"{name}.py" for name, *_ in SCRIPTS] and ">" not in command:
        done = run_child(folder / script, *flags)  # fast
    else:
        command = re.sub(r"\bpython\b", shlex.quote(sys.executable), command)
        done = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, encoding="utf-8", check=False,
            timeout=300,
        )  # fmt: skip
    differs = command.startswith("diff ") or "not written yet" in done.stdout  # no errors
    assert done.returncode == (1 if differs else 0), (command, done.stdout, done.stderr)
    return done.stdout


def few(words):
    """Return a small number of steps that grows with the one on the page."""
    return 2 + int(words.split()[1]) // 300


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_pages_works(clone, command):
    if benchmark := re.search(BENCHMARK, command):
        source = (ROOT / "tests" / f"{benchmark[1]}.py").read_text(encoding="utf-8")
        help_text = source.partition('"""\n\nimport')[0]
        for word in command.split()[2:]:
            pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
            assert re.search(pattern, help_text), f"{benchmark[1]}.py has no {word}"
        return
    out = run(clone, command)
    assert out.strip()


def test_what_the_pages_show_is_there():
    assert len(COMMANDS) > 20
    for text, folder in ((README, ROOT), (RESULTS, ROOT / "tests")):
        for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (folder / path).exists(), path
    for name in ("char_gpt", "word_gpt", "gpt2"):
        assert f"{name}.py" in README


def test_the_table_of_tokenizers():
    """Its numbers, computed anew."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    char, word = load_fresh("char_gpt"), load_fresh("word_gpt")
    n = len(char.Tokenizer(text).encode(text))
    rows = [(char.Tokenizer(text).vocab_size, n, len(text) / n)]
    documents = [word.clean(part) for part in text.split("\n\n")]
    for min_freq in (1, 5):
        tokenizer = word.Tokenizer(word.build_vocabulary(documents, min_freq))
        ids = tokenizer.encode(text)
        rows.append((tokenizer.vocab_size, len(ids), len(text) / len(ids)))
    for row in rows:
        assert "| {:,} | {:,} | {:.1f} |".format(*row) in RESULTS
    assert f"{ids.count(tokenizer.unk) / len(ids):.1%} are `<unk>`" in RESULTS


@pytest.mark.skipif(not SHARED_BPE.exists(), reason=f"no {SHARED_BPE}: GPT-2's vocabulary")
def test_the_row_of_gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_BPE))
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = load_fresh("gpt2").Tokenizer().encode(text)
    assert f"| 50,257 | {len(ids):,} | {len(text) / len(ids):.1f} |" in RESULTS
    assert f"Only {len(set(ids)):,} of GPT-2's" in RESULTS
