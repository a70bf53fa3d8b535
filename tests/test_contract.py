"""What every script promises: the same bits, nothing lost, one line for an error. See SCRIPTS."""

import builtins
import io
import itertools
import math
import os
import random
import re
import shlex
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import (
    ROOT,
    SMALL_BPE,
    assert_one_line_error,
    edited_copy,
    load_fresh,
    run_child,
    run_script,
)
from matplotlib.figure import Figure

CPU = torch.device("cpu")
WORDS = ["the", "cat", "and", "a", "dog", "sat", "on", "mats", "by", "an", "old", "house", "."]
TEXT, OTHER = (" ".join(random.Random(seed).choices(WORDS, k=700)) for seed in (0, 1))


def write_text(folder, text):
    """Write a text for a script that reads plain text; returns the flags that name it."""
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    return ["--data", str(folder / "tiny.txt")]


def write_documents(folder, text):
    """The same for a script that reads paragraphs: 20 words each."""
    words = text.split()
    parts = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    return write_text(folder, "\n\n".join(parts))


TINY = {
    "DEVICE": "cpu", "N_EMBED": 16, "N_LAYERS": 1, "N_HEADS": 2, "BLOCK_SIZE": 16, "BATCH_SIZE": 4,
    "EVAL_ITERS": 2, "SAMPLE_TOKENS": 20, "PROMPT": "the ", "MAX_ITERS": 9, "EVAL_INTERVAL": 3,
    "DROPOUT": 0.2,
}  # fmt: skip
WORDS_TINY = {"DATA": "words.txt", "MIN_FREQ": 2, "CUTOFFS": (8,)}
GPT2_TINY = {"INIT": "scratch", "VOCAB_SIZE": 260, "WINDOW": 8, "TOKENS_PER_STEP": 64}
SCRIPTS = [  # name, constants, how to write data, code to put into the script
    ("char_gpt", TINY, write_text, ""),
    ("word_gpt", TINY | WORDS_TINY, write_documents, ""),
    ("gpt2", TINY | GPT2_TINY, write_text, SMALL_BPE),
]

# Send what Ctrl-C sends, in front of the calls of a function that have these numbers.
INTERRUPT = """
def interrupt(name, numbers):
    original, calls = globals()[name], []
    def wrapper(*args, **more):
        calls.append(name)
        for _ in range(numbers.count(len(calls))):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **more)
    globals()[name] = wrapper
"""


class Script:
    """One script, imported anew, with tiny constants, data, and a folder to run in."""

    def __init__(self, entry, folder, patch):
        self.name, self.tiny, self.write_data, self.insert = entry
        self.gpt, self.folder, self.patch = load_fresh(self.name), folder / "run", patch
        exec(self.insert, vars(self.gpt))
        self.flags = self.write_data(folder, TEXT)
        self.set(**self.tiny)
        self.go_to("run")

    def go_to(self, name):
        """Work in another folder from now on."""
        self.folder = self.folder.parent / name
        self.folder.mkdir(exist_ok=True)
        self.patch.chdir(self.folder)

    def set(self, **values):
        """Replace names of the module, which must exist."""
        for name, value in values.items():
            self.patch.setattr(self.gpt, name, value)

    def main(self, *flags, **constants):
        """Call main with some constants changed; they stay changed."""
        self.set(**constants)
        return self.gpt.main([*self.flags, *flags])

    def copy(self, insert="", **constants):
        """Write a copy of the script with these constants; returns its path."""
        insert = self.insert + insert
        return edited_copy(f"{self.name}.py", self.folder, insert, **self.tiny | constants)

    def child(self, *flags, insert="", **constants):
        """Run such a copy as a process of its own."""
        return run_child(self.copy(insert, **constants), *self.flags, *flags)

    def files(self):
        """Return {name: content} of what runs have written so far."""
        found = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        return {name: found[name] for name in found if name.endswith((".pt", ".png", ".part"))}

    def state(self, end=".resume.pt"):
        """Return what a checkpoint holds."""
        return torch.load(self.folder / f"{self.name}{end}", weights_only=True)


@pytest.fixture(params=SCRIPTS, ids=lambda entry: entry[0])
def script(request, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(b"plot"))
    return Script(request.param, tmp_path, monkeypatch)


def assert_same(a, b):
    """Two checkpoints have the same weights to the bit."""
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def fails_at(number, function):
    """Return a function that does the same, but for its call of this number."""
    calls = itertools.count(1)
    return lambda *args: 1 / (next(calls) != number) and function(*args)


# --- the same bits --------------------------------------------------------------------------------


def test_same_seed_same_bits_and_evaluating_changes_nothing(script):
    results, first = script.main(), script.state()
    again = script.main()  # in the same process
    assert again["text"] == results["text"] and again["val_loss"] == results["val_loss"]
    assert_same(first, script.state())
    script.main(EVAL_INTERVAL=2, EVAL_ITERS=1)
    assert_same(first, script.state())
    assert first["history"][0] != script.state()["history"][0]  # of other windows
    script.main("--seed", "7")
    flag = script.state()
    assert not torch.equal(first["weights"]["lm_head.weight"], flag["weights"]["lm_head.weight"])
    script.main(SEED=7)
    assert_same(flag, script.state())


@pytest.mark.parametrize("bfloat16", [True, False])
def test_killed_and_resumed_equals_unbroken(script, bfloat16):
    script.set(has_bfloat16=lambda device: bfloat16)
    results = script.main(MAX_ITERS=14, EVAL_INTERVAL=4)
    unbroken, best = script.state(), script.state(".pt")
    for step in (5, 7, 13):
        script.go_to(f"killed at {step}")
        with script.patch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(script.gpt, "train_step", fails_at(step, script.gpt.train_step))
            script.main()
        resumed = script.main("--resume")
        assert_same(unbroken, script.state())
        assert_same(best, script.state(".pt"))
        assert unbroken["history"] == script.state()["history"]
        assert resumed["val_loss"] == results["val_loss"] and resumed["text"] == results["text"]
        assert resumed["steps"] == results["steps"] == 14


def test_main_returns_what_it_promises(script, capsys):
    splits = {}
    split_text = script.gpt.split_text
    script.set(split_text=lambda *args: splits.update(split_text(*args)) or splits)
    # At a rate of 3 the last steps destroy what was learned: the best weights are not the last.
    script.set(get_lr=lambda step, *more: 1e-2 if step < 6 else 3.0)
    results = script.main(DROPOUT=0.0)
    losses = {step: entry["val"]["loss"] for step, entry in script.state()["history"].items()}
    assert list(losses) == [0, 3, 6, 9] and losses[9] > losses[6] < losses[3] < losses[0]
    model, _ = script.gpt.load_checkpoint(f"{script.name}.pt", CPU)
    whole = script.gpt.estimate_loss(model, splits["val"], 64)["loss"]
    assert results["val_loss"] == pytest.approx(whole, abs=1e-3) and whole < losses[9] - 0.1
    assert results["bits_per_character"] > 0 and results["tokens_per_second"] > 0
    assert results["steps"] == 9 and results["seconds"] > 0
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["text"].startswith("the ") and results["text"] in capsys.readouterr().out
    kept = {script.name + end for end in (".pt", ".resume.pt", ".png")}
    assert set(script.files()) == kept | {getattr(script.gpt, "PICTURE", f"{script.name}.png")}
    assert script.main("--sample", "--seed", str(script.gpt.SEED))["text"] == results["text"]


def test_main_in_a_thread(script):
    results = []
    thread = threading.Thread(target=lambda: results.append(script.main()))
    thread.start()
    thread.join()
    assert results[0]["text"] == script.main()["text"]


# --- nothing is lost ------------------------------------------------------------------------------


def test_a_kill_at_any_moment_of_a_save_loses_nothing(script):
    """What lies on the disk before and after each create, write, rename and remove."""
    script.main()
    pt, resume = f"{script.name}.pt", f"{script.name}.resume.pt"
    finished = script.files()
    states = {}

    def look():
        states[tuple(sorted(script.files().items()))] = None

    class Unbuffered(io.FileIO):
        def write(self, data):
            look()
            half = super().write(data[: len(data) // 2])
            look()
            return half + super().write(data[half:])

    real_open = open
    with script.patch.context() as patch:
        patch.setattr(builtins, "open", lambda path, mode="r", *args, **more: (
            Unbuffered(path, "w") if "w" in mode and str(path).startswith(script.name)
            else real_open(path, mode, *args, **more)))  # fmt: skip
        for name in ("replace", "rename", "unlink", "remove"):
            original = getattr(os, name)
            patch.setattr(os, name, lambda *args, f=original: (look(), f(*args), look()))
        script.main("--seed", "3")
    unbroken, best = script.state(), script.state(".pt")
    states = [dict(state) for state in states]
    assert len(states) > 100 and any(f"{pt}.part" in state for state in states)
    loaded, resumed = set(), set()
    for state in states:
        assert finished[pt] in (state.get(pt), state.get(f"previous.{pt}"))
        for path in script.folder.iterdir():
            path.unlink()
        for name, content in state.items():
            Path(name).write_bytes(content)
            if name.endswith(".pt") and content not in loaded:
                script.gpt.load_checkpoint(name, CPU)
                loaded.add(content)
        key = state.get(pt), state.get(resume)
        if key not in resumed and key[1] not in (None, finished[resume]):
            resumed.add(key)
            if max(script.state()["history"]) < 9:
                script.main("--resume", "--seed", "3")
            assert_same(unbroken, script.state())
            assert_same(best, script.state(".pt"))
    assert len(resumed) >= 3


@pytest.mark.parametrize("number", [2, 4, 6])
def test_a_process_that_dies_in_a_rename(script, number):
    script.main()
    before = script.files()[f"{script.name}.pt"]
    died = script.child(
        insert="import itertools; n, replace = itertools.count(1), os.replace\n"
        f"os.replace = lambda *a: os._exit(9) if next(n) == {number} else replace(*a)"
    )
    assert died.returncode == 9
    assert before in script.files().values()
    for path in script.folder.glob("*.pt"):
        script.gpt.load_checkpoint(path, CPU)


def test_starting_again_keeps_the_finished_model(script, capsys):
    script.main()
    finished = script.files()
    stopped = script.child("--seed", "2", insert=INTERRUPT + 'interrupt("train_step", [2])')
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert "was written" in stopped.stdout
    assert "the " in stopped.stdout.partition("was written")[2]  # the sample
    assert script.files() == finished
    script.main("--seed", "2")
    after, printed = script.files(), capsys.readouterr().out
    for name, content in finished.items():
        assert after[f"previous.{name}"] == content and f"previous.{name}" in printed
    assert after[f"{script.name}.pt"] != finished[f"{script.name}.pt"]
    second = script.files()[f"{script.name}.pt"]
    script.main("--seed", "3")  # one generation is kept
    assert script.files()[f"previous.{script.name}.pt"] == second


def test_a_run_that_is_stopped_before_its_first_save_writes_nothing(script):
    stopped = script.child(insert=INTERRUPT + 'interrupt("train_step", [2])')
    assert (stopped.returncode, stopped.stderr, script.files()) == (0, "", {})
    assert "was written" in stopped.stdout
    assert "the " in stopped.stdout.partition("was written")[2]
    assert script.child("--max-iters", "2").returncode == 0  # its planned last step is saved
    assert set(script.state()["history"]) == {0, 2}


def test_resume_on_another_text(script, tmp_path, capsys):
    script.main()
    old, state = script.files(), script.state()
    history = state["history"] | {
        9: {k: dict.fromkeys(v, 1e-3) for k, v in state["history"][9].items()}
    }
    torch.save(state | {"history": history}, f"{script.name}.resume.pt")  # nothing can beat that
    flags = script.write_data(tmp_path, OTHER)
    capsys.readouterr()
    script.main("--resume", "--max-iters", "15", *flags)
    new = script.state()
    assert min(new["history"]) == 9 and max(new["history"]) == 15
    assert new["vocabulary"] == state["vocabulary"]
    assert script.files()[f"previous.{script.name}.pt"] == old[f"{script.name}.pt"]
    assert script.files()[f"{script.name}.pt"] != old[f"{script.name}.pt"]
    assert f"previous.{script.name}.pt" in capsys.readouterr().out
    script.main("--resume", "--max-iters", "18", *flags)  # and goes on there like any other
    assert set(script.state()["history"]) == {9, 12, 15, 18}
    assert script.files()[f"previous.{script.name}.pt"] == old[f"{script.name}.pt"]


def test_resume_that_cannot_be(script):
    assert_one_line_error(script.child("--resume"), f"no {script.name}.resume.pt")
    assert_one_line_error(script.child("--sample"), f"no {script.name}.pt")
    script.main()
    before = script.files()
    assert_one_line_error(script.child("--resume"), "9 steps", "--max-iters")
    assert script.files() == before
    Path(f"{script.name}.resume.pt").write_bytes(before[f"{script.name}.pt"])
    assert_one_line_error(script.child("--resume"), f"{script.name}.resume.pt")
    state = torch.load(io.BytesIO(before[f"{script.name}.resume.pt"]), weights_only=True)
    for damage in ({"optimizers": []}, {"optimizers": 5}, {"history": {}}, {"history": 5}):
        torch.save(state | damage, f"{script.name}.resume.pt")
        with pytest.raises(script.gpt.UserError, match=r"resume\.pt"):
            script.main("--resume", "--max-iters", "12")


@pytest.mark.parametrize(
    ("name", "calls", "end", "status"),
    [
        ("train_step", [5], 5, 0),
        ("estimate_loss", [4], 4, 0),  # of the evaluation at step 3
        ("save_checkpoint", [2], 4, 0),
        ("generate", [5], 9, 1),  # after training
        ("estimate_loss", [9], 9, 1),
        ("train_step", [5, 5], 3, 1),  # twice
        ("write_file", [5, 5], 3, 1),  # twice, in the save of step 6
    ],
)
def test_ctrl_c(script, name, calls, end, status):
    script.main()
    unbroken = script.state()
    script.go_to("stopped")
    stopped = script.child(insert=INTERRUPT + f"interrupt({name!r}, {calls})")
    if status:
        assert_one_line_error(stopped, "interrupted")
    else:
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert "the " in stopped.stdout.partition("best")[2]
    assert max(script.state()["history"]) == end
    script.gpt.load_checkpoint(f"{script.name}.pt", CPU)
    if end < 9:
        assert script.child("--resume").returncode == 0
    assert_same(unbroken, script.state())
    assert not list(script.folder.glob("*.part"))


@pytest.mark.parametrize("flags", [["--seed", "2"], ["--resume", "--max-iters", "12"]])
@pytest.mark.parametrize("end", [".pt", ".resume.pt"])
def test_a_full_disk(script, flags, end):
    script.main()
    before = script.files()
    limit = len(before[f"{script.name}{end}"]) - 1000  # so much fits into one file
    insert = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    full = script.child(*flags, insert=insert)
    assert_one_line_error(full, f"{script.name}{end}")
    after = script.files()
    for name in (f"{script.name}.pt", f"{script.name}.resume.pt"):
        if name == f"{script.name}{end}" or "--resume" not in flags:
            assert before[name] in (after.get(name), after.get(f"previous.{name}"))
    assert not [name for name in after if name.endswith(".part")]


# --- checkpoints of strangers ---------------------------------------------------------------------


class Hostile:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_untrusted_checkpoints(script):
    script.main()
    path, good = Path(f"{script.name}.pt"), script.state(".pt")
    whole, weights, config = path.read_bytes(), good["weights"], good["config"]
    first = next(iter(weights))
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "hostile": good | {"more": Hostile()},
        "other script": good | {"name": "other"},
        "a list": [1, 2],
        "vocabulary": good | {"vocabulary": good["vocabulary"][:-1]},
        "not finite": good | {"weights": {k: v * math.nan for k, v in weights.items()}},
        "complex": good | {"weights": {k: v.to(torch.complex64) for k, v in weights.items()}},
        "weight missing": good | {"weights": {k: weights[k] for k in weights if k != first}},
        "weight too much": good | {"weights": weights | {"more": weights[first]}},
    }
    cases |= {f"no {k}": {key: good[key] for key in good if key != k} for k in good}
    for name, value in (
        ("n_embed", 32), ("n_embed", 4 * 10**9), ("n_layers", 10**12), ("n_layers", 2),
        ("n_heads", "2"), ("n_heads", -2), ("n_heads", 2.0), ("n_heads", 0), ("dropout", 2.0),
        ("block_size", 15), ("block_size", 16.0),
    ):  # fmt: skip
        cases[f"{name} {value!r}"] = good | {"config": config | {name: value}}
    accepted = []
    for name, content in cases.items():
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        try:
            script.main("--sample")
            accepted.append(name)
        except script.gpt.UserError as error:
            assert path.name in str(error), name
        except Exception as error:
            accepted.append(f"{name}: {error!r:.60}")
        if name in ("hostile", "truncated", "n_layers 1000000000000"):
            assert_one_line_error(script.child("--sample"), path.name)
    assert not accepted
    assert not Path("owned").exists()


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_line(script):
    script.main()
    before = script.files()
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("the cat")
    Path("latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    Path("utf16.txt").write_text(TEXT, encoding="utf-16")
    for flags, words in (
        (["--prompt", ""], ["prompt is empty"]),
        (["--sample", "--prompt", ""], ["prompt is empty"]),
        (["--data", "empty.txt"], ["empty.txt is empty"]),
        (["--data", "short.txt"], ["few"]),
        (["--data", "latin1.txt"], ["latin1.txt", "not UTF-8"]),
        (["--data", "utf16.txt"], ["utf16.txt", "not UTF-8"]),
        (["--data", "missing.txt"], ["missing.txt", "--data"]),
        (["--data", "."], ["no file .", "--data"]),
        (["--data", "x" * 300], ["xxx", "--data"]),
        (["--device", "cuda:77"], ["cuda:77", "cpu"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--max-iters", "0"], ["--max-iters"]),
    ):
        assert_one_line_error(script.child(*flags), *words)
    for flags in (["--max-iters", "x"], ["--nonsense"], ["--sample", "--resume"]):
        assert_one_line_error(script.child(*flags), flags[-1], status=2)
    assert script.files() == before


SIZES = "BLOCK_SIZE N_EMBED N_LAYERS N_HEADS BATCH_SIZE MAX_ITERS EVAL_INTERVAL EVAL_ITERS"
NO_SENSE = {
    SIZES: (0, -1, 1.5, None, "1", math.nan),
    "TOP_K": (0, -1, 1.5, "1", math.nan),
    "WARMUP_ITERS SAMPLE_TOKENS SEED": (-1, 1.5, None, "1", math.nan),
    "DROPOUT FINAL_LR TRAIN_SHARE": (-1, 1.5, None, "1", math.nan),
    "TOP_P": (-1, 1.5, "1", math.nan),
    "LEARNING_RATE WEIGHT_DECAY TEMPERATURE": (-1, None, "1", math.nan, math.inf),
    "GRADIENT_CLIP": (-1, "1", math.nan),
    "BETAS": (0.9, None, (0.9,), (2, 3), (0.9, 1.0), ("a", "b"), (0.9, math.nan)),
}


@pytest.mark.parametrize("name", " ".join(NO_SENSE).split())
def test_constants_that_make_no_sense(script, name):
    (values,) = (values for names, values in NO_SENSE.items() if name in names.split())
    for value in values:
        with script.patch.context() as patch, pytest.raises(script.gpt.UserError, match=name):
            patch.setattr(script.gpt, name, value)
            script.main()
            pytest.fail(f"{name} = {value!r}")
    assert script.files() == {}


def test_a_loss_that_is_not_finite(script):
    script.main()
    before = script.files()
    rates = [name for name in vars(script.gpt) if name.endswith("LEARNING_RATE")]
    done = script.child(**dict.fromkeys(rates, 1e9), GRADIENT_CLIP=None, WARMUP_ITERS=0)
    assert_one_line_error(done, "LEARNING_RATE")
    assert script.files() == before


@pytest.mark.parametrize(
    "error", ["torch.OutOfMemoryError('CUDA out of memory.')", "MemoryError()"]
)
def test_out_of_memory(script, error):
    done = script.child(insert=f"def train_step(*args): raise {error}")
    assert_one_line_error(done, "out of memory", "BATCH_SIZE")


def test_a_real_bug_keeps_its_traceback(script):
    done = script.child(insert="def train_step(*args): raise RuntimeError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


# --- streams --------------------------------------------------------------------------------------


def test_streams_that_fail(script):
    path = script.copy(MAX_ITERS=3)
    command = shlex.join([sys.executable, str(path), *script.flags])

    def run(end):
        return subprocess.run(
            command + end, shell=True, cwd=script.folder, capture_output=True, text=True
        )

    closed = run(" >&-")  # a whole run, and the plot is real
    assert (closed.returncode, closed.stderr) == (0, "")
    assert Path(f"{script.name}.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line_error(run(" --sample >/dev/full"), "No space left")
    seen_enough = run(" --sample | head -c 10")
    assert (len(seen_enough.stdout), seen_enough.stderr) == (10, "")


def test_a_text_and_a_terminal_of_two_languages(script, tmp_path):
    greek = "\ufeff" + TEXT.replace("a", "α").replace("e", "ж")  # Windows marks UTF-8 at the start
    flags = script.write_data(tmp_path, greek)
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    path = script.copy(MAX_ITERS=2)
    done = run_script(path, *flags, "--prompt", "thж cαt", env=environment, encoding="cp1252")
    assert (done.returncode, done.stderr) == (0, "")
    assert "th? c?t" in done.stdout
    assert "\ufeff" not in "".join(script.state()["vocabulary"])


def test_sampling(script, capsys):
    script.main()
    capsys.readouterr()
    first = script.main("--sample")["text"]
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    assert script.main("--sample")["text"] != first
    assert script.main("--sample", "--seed", seed)["text"] == first
    results = script.main("--sample", "--prompt", "the cat " * 20)  # longer than the context
    assert results["text"].startswith("the cat " * 20) and len(results["text"]) > 160
    script.go_to("nothing kept yet")
    assert script.main("--prompt", "a", WEIGHT_DECAY=0.1)["text"].startswith("a")
    for edit in ({"TEMPERATURE": 0}, {"TOP_K": 1}, {"TOP_P": 1e-6}):  # greedy: no seed matters
        with script.patch.context() as patch:
            patch.setattr(script.gpt, *next(iter(edit.items())))
            texts = {script.main("--sample", "--seed", seed)["text"] for seed in "12345"}
        assert len(texts) == 1, edit
    script.main("--resume", "--max-iters", "12", WEIGHT_DECAY=0.7)  # an edited constant counts
    groups = [group for saved in script.state()["optimizers"] for group in saved["param_groups"]]
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.7}


# --- presets of the README ------------------------------------------------------------------------
PRESETS = re.findall(
    r"```python\n# preset ([\w-]+): (\w+)\.py\n(.*?)```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    flags=re.S,
)
NAMES = {
    "char_gpt": "quick a100 best classic",
    "word_gpt": "experiment-1 experiment-2 reference",
    "gpt2": "finetune scratch-small 124M-gpu",
}


def test_presets(script, monkeypatch):
    """Each one pasted over the constants gives a model that trains; sizes are made small."""
    presets = {name: source for name, owner, source in PRESETS if owner == script.name}
    assert presets.keys() == set(NAMES[script.name].split())
    original = load_fresh(script.name)
    for name, source in presets.items():
        pasted = {}
        exec(source, {"ON_GPU": False}, pasted)
        assert pasted and all(hasattr(original, constant) for constant in pasted), name
        n_heads = pasted.get("N_HEADS", original.N_HEADS)
        assert pasted.get("N_EMBED", original.N_EMBED) % n_heads == 0, name
        small = {"N_EMBED": 8 * n_heads, "N_HEADS": n_heads, "N_LAYERS": 1, "BLOCK_SIZE": 16}
        small |= {"BATCH_SIZE": 2}
        small |= {"MAX_ITERS": 2, "EVAL_ITERS": 2}
        if script.name == "gpt2":
            assert pasted["TOKENS_PER_STEP"] % (pasted["WINDOW"] * pasted["BATCH_SIZE"]) == 0, name
            small |= {"INIT": "scratch", "WINDOW": 8, "TOKENS_PER_STEP": 32, "COMPILE": False}
            small |= {"VOCAB_SIZE": 260 + pasted.get("VOCAB_SIZE", 50_257) - 50_257}
        script.go_to(name)
        results = script.main(**pasted | small)
        start = script.state()["history"][0]["val"]["loss"]
        assert results["steps"] == 2 and results["val_loss"] < start, name


# --- notebooks, and other ways to run it ----------------------------------------------------------


def test_importing_has_no_effect(script):
    Path("probe.py").write_text(f"import sys; sys.path[0] = {str(ROOT)!r}; import {script.name}")
    done = run_child(script.folder / "probe.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in script.folder.iterdir()] == ["probe.py"]


def test_in_a_notebook(script):
    path = script.copy(MAX_ITERS=4)
    name, flags = script.name, script.flags
    os.rename(script.write_data(script.folder, TEXT)[1], script.gpt.DATA)
    cells = [  # and a word that each must print
        (f"import {name}, os, signal; assert {name}.main([])['steps'] == 4", "best"),
        (f"assert {name}.main()['steps'] == 4  # sys.argv is the kernel's", "best"),
        (f"%run {name}.py --max-iters 2", "step     2"),
        (f"exec(open('{name}.py').read())", "step     4"),
        (path.read_text(encoding="utf-8"), "step     4"),
        # Stop is Ctrl-C:
        (f"step = {name}.train_step\n"
         f"{name}.train_step = lambda *a: (os.kill(os.getpid(), signal.SIGINT), step(*a))[1]\n"
         f"assert {name}.main({flags})['steps'] == 1", "was written"),
    ]  # fmt: skip
    cell = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(cells=[cell(source) for source, _ in cells])
    resources = {"metadata": {"path": str(script.folder)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    for cell, (_, word) in zip(notebook.cells, cells, strict=True):
        assert word in "".join(output.get("text", "") for output in cell.outputs)
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]


# --- finding the text, and its download -----------------------------------------------------------


def test_where_the_text_is_found(script, tmp_path):
    path, data = script.copy(), script.gpt.DATA
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / path.name
    link.symlink_to(path)
    script.write_data(script.folder, TEXT)
    os.rename("tiny.txt", data)
    beside = run_child(link)  # here is no text: the one beside the script's real file is taken
    assert beside.returncode == 0 and str(path.with_name(data)) in beside.stdout
    os.rename(script.write_data(tmp_path / "here", OTHER)[1], tmp_path / "here" / data)
    for done in (run_child(link), run_child(link, "--data", data)):
        assert f"\n{data}: " in done.stdout
    assert_one_line_error(run_child(link, "--data", f"none/{data}"), f"none/{data}")


def test_the_download_of_the_text(script, tmp_path, server):
    content = Path(script.write_data(tmp_path, TEXT)[1]).read_bytes()
    server.files["/input.txt"] = content
    digest, url = sha256(content).hexdigest(), f"{server.url}/input.txt"
    hurry = "time.sleep = lambda seconds: None"
    edits = {"DATA": "input.txt", "DATA_URL": url, "DATA_SHA256": digest, "MAX_ITERS": 2}
    path = script.copy(hurry, **edits)
    for fault in (404, 500, "wrong", "cut", "lie"):
        server.faults = [fault] * 9
        assert_one_line_error(run_child(path), url, "input.txt")
        assert {p.name for p in script.folder.iterdir()} <= {path.name, "input.txt.part"}
        assert not Path("input.txt.part").exists() or hasattr(script.gpt, "download")
    server.faults = []
    assert run_child(path).returncode == 0
    assert Path("input.txt").read_bytes() == content and not Path("input.txt.part").exists()
    seen = len(server.seen)
    other = Path(script.write_data(tmp_path, OTHER)[1]).rename("input.txt")  # put there by hand
    by_hand = other.read_bytes()
    assert run_child(path).returncode == 0
    assert len(server.seen) == seen and Path("input.txt").read_bytes() == by_hand
    os.remove("input.txt")
    refused = script.copy(hurry, DATA="input.txt", DATA_URL="http://127.0.0.1:9/input.txt")
    assert_one_line_error(run_child(refused), "http://127.0.0.1:9/input.txt", " input.txt")
