"""What every script promises: see SCRIPTS in conftest.py. Faults are in test_faults.py."""

import itertools
import os
import re
from hashlib import sha256
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import OTHER, ROOT, TEXT, assert_one_line_error, assert_same, load_fresh, run_child

CPU = torch.device("cpu")


def fails_at(number, function):
    """Return a function that does the same, but for its call of this number."""
    calls = itertools.count(1)
    return lambda *args: 1 / (next(calls) != number) and function(*args)


# --- the same bits --------------------------------------------------------------------------------


def test_same_seed_same_bits_and_evaluating_changes_nothing(script):
    seen, draw = [], script.gpt.get_batch
    script.set(get_batch=lambda *args: seen.append(draw(*args)) or seen[-1])
    results, first = script.main(), script.state()
    assert len({str(x) for x, _ in seen}) == len(seen) == 9  # each step has a batch of its own
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
    assert set(script.files()) - {"word_gpt_attention.png"} == kept
    assert script.main("--sample", "--seed", str(script.gpt.SEED))["text"] == results["text"]


# --- nothing is lost ------------------------------------------------------------------------------


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


def test_sampling(script, capsys):
    script.main()
    capsys.readouterr()
    first = script.main("--sample")["text"]
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    assert len({script.main("--sample")["text"] for _ in range(5)}) > 1
    assert script.main("--sample", "--seed", seed)["text"] == first
    text = script.main("--sample", "--prompt", "the cat " * 20)["text"]  # longer than the context
    assert text.startswith("the cat " * 19 + "the cat")
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
    hurry = (
        "time.sleep = lambda seconds: None\nislice, cut = lambda x, n: cut(x, min(n, 9)), islice"
    )
    hurry = hurry if hasattr(script.gpt, "download") else ""
    edits = {"DATA": "input.txt", "DATA_URL": url, "DATA_SHA256": digest, "MAX_ITERS": 2}
    path = script.copy(hurry, **edits)
    bad = ["file:///etc/passwd", "http://[::bad", f"{url}:", 404, 500, "wrong", "cut", "lie"]
    for fault in bad + ["endless"] * bool(hurry):
        server.faults = [fault] * 9
        assert_one_line_error(run_child(path), url, "input.txt")
        assert {p.name for p in script.folder.iterdir()} <= {path.name, "input.txt.part"}
        assert not Path("input.txt.part").exists() or hasattr(script.gpt, "download")
    server.faults = []
    assert run_child(path).returncode == 0 and server.sent < 10**8
    assert Path("input.txt").read_bytes() == content and not Path("input.txt.part").exists()
    seen = len(server.seen)
    other = Path(script.write_data(tmp_path, OTHER)[1]).rename("input.txt")  # put there by hand
    by_hand = other.read_bytes()
    assert run_child(path).returncode == 0
    assert len(server.seen) == seen and Path("input.txt").read_bytes() == by_hand
    os.remove("input.txt")
    refused = script.copy(hurry, DATA="input.txt", DATA_URL="http://127.0.0.1:9/input.txt")
    assert_one_line_error(run_child(refused), "http://127.0.0.1:9/input.txt", " input.txt")
