"""What every script promises: see SCRIPTS in conftest.py. Faults are in test_faults.py."""

import math
import os
import re
from hashlib import sha256
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import (
    OTHER,
    ROOT,
    TEXT,
    assert_one_line_error,
    assert_same,
    edited_copy,
    is_same,
    load_fresh,
    run_child,
)

CPU = torch.device("cpu")


def lines_with(word, text):
    """Return the lines of a text that have a word in them."""
    return [line for line in text.splitlines() if word in line]


# --- the same bits --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(script):
    results = script.main()
    again = script.main()  # in the same process
    assert again["text"] == results["text"] and again["val_loss"] == results["val_loss"]
    assert_same(script.run(1), script.run(2))
    script.main("--seed", "7")
    script.main(SEED=7)
    assert_same(script.run(3), script.run(4))
    assert not is_same(script.run(1)["last"], script.run(3)["last"])


def test_each_step_draws_a_batch_of_its_own(script):
    batches, get_batch = [], script.gpt.get_batch

    def listen(*args):
        batches.append(get_batch(*args))
        return batches[-1]

    script.main(get_batch=listen)
    assert len(batches) >= 9
    assert len({str(x) for x, _ in batches}) == len(batches)


def test_evaluating_changes_nothing(script):
    script.main()
    script.main(EVAL_INTERVAL=2, EVAL_ITERS=1)
    assert is_same(script.run(1)["last"], script.run(2)["last"])
    assert [*script.run(2)["history"]] == [0, 2, 4, 6, 8, 9]


def test_the_estimate_does_not_depend_on_the_batch_size(script):
    """Losses of two runs compare: the same windows are measured, whatever BATCH_SIZE is."""
    script.main(BATCH_SIZE=2)
    script.main(BATCH_SIZE=8)
    first, second = (script.run(number)["history"][0]["val"]["loss"] for number in (1, 2))
    assert first == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_killed_and_resumed_run_ends_like_one_that_was_not(script, bfloat16):
    """By its own seed and number of steps, which --resume need not repeat."""
    script.set(has_bfloat16=lambda device: bfloat16)
    # A high rate in the middle destroys what was learned: the best weights are not the last.
    script.set(get_lr=lambda step, *more: 1.0 if 4 <= step < 8 else 1e-2)
    flags = ["--seed", "7", "--max-iters", "14"]
    results = script.main(*flags, EVAL_INTERVAL=4)
    unbroken = script.run()
    for step in (5, 10, 13):
        script.go_to(f"killed at {step}")
        script.main_killed_at(step, *flags)
        assert script.run()["step"] == (step - 1) // 4 * 4
        assert step != 10 or script.run()["best_step"] == 4
        resumed = script.main("--resume")
        assert_same(unbroken, script.run())
        assert script.run()["constants"] | {"code": ""} == unbroken["constants"] | {"code": ""}
        for name in ("val_loss", "text", "steps"):
            assert resumed[name] == results[name]
        assert resumed["steps"] == 14
        assert [path.name for path in Path().glob("*.pt")] == [script.path(1)]


def test_the_saved_step_is_not_evaluated_again(script):
    script.main_killed_at(5)
    steps, evaluate = [], script.gpt.evaluate

    def listen(model, tokenizer, splits, prompt, step):
        steps.append(step)
        return evaluate(model, tokenizer, splits, prompt, step)

    script.main("--resume", evaluate=listen)
    assert steps == [6, 9]


def test_the_best_weights_are_the_first_of_equals(script):
    script.main(get_lr=lambda step, *more: 0.0)
    assert script.run()["best_step"] == 3


def test_a_resumed_run_adds_its_seconds_and_forgets_its_exact_loss(script):
    script.main()
    torch.save(script.run() | {"seconds": 5000.0}, script.path(1))
    script.main_killed_at(5, "--resume", "--max-iters", "18")
    run = script.run()
    assert run["step"] == 12 and run["val_loss"] is None and 5000 < run["seconds"] < 5100
    results = script.main("--resume")
    assert results["seconds"] > run["seconds"] and results["steps"] == 18


# --- what a run gives -----------------------------------------------------------------------------


def test_main_returns_what_it_promises(script, capsys):
    splits = {}
    split_text = script.gpt.split_text
    script.set(split_text=lambda *args: splits.update(split_text(*args)) or splits)
    # At a rate of 3 the last steps destroy what was learned: the best weights are not the last.
    script.set(get_lr=lambda step, *more: 1e-2 if step < 6 else 3.0)
    results = script.main(DROPOUT=0.0)
    printed = capsys.readouterr().out
    run = script.run()
    losses = {step: entry["val"]["loss"] for step, entry in run["history"].items()}
    assert list(losses) == [0, 3, 6, 9] and losses[9] > losses[6] < losses[3] < losses[0]
    assert run["best_step"] == 6 and run["step"] == 9
    _, model, _ = script.gpt.load_run(script.path(1), CPU)
    whole = script.gpt.estimate_loss(model, splits["val"], 64)["loss"]
    assert results["val_loss"] == pytest.approx(whole, abs=1e-3) and whole < losses[9] - 0.1
    assert results["val_loss"] == run["val_loss"] and f"{run['val_loss']:.4f}" in printed
    assert results["bits_per_character"] > 0 and results["tokens_per_second"] > 0
    assert results["steps"] == 9 and results["seconds"] > 0
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    printable = getattr(script.gpt, "printable", str)  # words have no control characters
    assert results["text"].startswith("the ") and printable(results["text"]) in printed
    assert script.path(1) in printed
    assert set(script.files()) >= {script.path(1), f"{script.name}-1.png"}
    assert script.main("--sample", "--seed", str(script.gpt.SEED))["text"] == results["text"]


def test_sampling(script, capsys):
    script.main()
    before = script.files()
    capsys.readouterr()
    first = script.main("--sample")["text"]
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    assert len({script.main("--sample")["text"] for _ in range(5)}) > 1
    assert script.main("--sample", "--seed", seed)["text"] == first
    text = script.main("--sample", "--prompt", "the cat " * 20)["text"]  # longer than the context
    assert text.startswith("the cat " * 19 + "the cat")
    for greedy in ({"TEMPERATURE": 0}, {"TOP_K": 1}, {"TOP_P": 1e-6}):  # no seed matters
        with script.patch.context() as patch:
            patch.setattr(script.gpt, *next(iter(greedy.items())))
            texts = {script.main("--sample", "--seed", seed)["text"] for seed in "12345"}
        assert len(texts) == 1, greedy
    assert script.files() == before


def test_greedy_sampling_takes_one_of_two_equal_tokens(script):
    probabilities = script.gpt.next_token_probabilities(torch.tensor([2.0, 2.0, 1.0]), 0)
    assert probabilities.tolist() == [1, 0, 0]


# --- a run is a file ------------------------------------------------------------------------------


def test_each_run_has_a_number_and_the_newest_is_taken(script):
    script.main()
    first = script.files()
    script.main("--seed", "2")
    os.rename(script.path(2), script.path(10))
    os.utime(script.path(10), (0, 0))  # the newest is the one with the highest number
    script.main("--resume", "--max-iters", "12")
    assert script.run(10)["step"] == 12
    script.main("--seed", "3")
    assert script.run(11)["seed"] == 3
    os.remove(script.path(10))
    script.main("--seed", "4")
    assert script.run(12)["seed"] == 4
    os.remove(script.path(12))
    script.main("--sample")
    loaded, load_run = [], script.gpt.load_run

    def look(path, *more, **options):
        loaded.append(str(path))
        return load_run(path, *more, **options)

    script.set(load_run=look)
    for flags, path in ((["--run", script.path(1)], script.path(1)), ([], script.path(11))):
        script.main("--sample", *flags)
        assert loaded == [path]
        loaded.clear()
    assert {name: script.files()[name] for name in first} == first


def test_a_run_may_be_renamed(script):
    script.main()
    script.main("--seed", "2")
    os.rename(script.path(2), "my best.pt")
    first = script.files()[script.path(1)]
    text = script.main("--sample", "--seed", "1", "--run", "my best.pt")["text"]
    assert text != script.main("--sample", "--seed", "1")["text"]  # the newest is number 1
    script.main("--resume", "--run", "my best.pt", "--max-iters", "12")
    assert script.gpt.read_run("my best.pt")["step"] == 12
    assert script.files()[script.path(1)] == first
    assert {path.name for path in Path().glob("*.pt")} == {script.path(1), "my best.pt"}


def test_a_run_that_is_stopped_before_its_first_save_leaves_nothing(script):
    script.main_killed_at(3)
    assert script.files() == {}
    script.main("--max-iters", "2")  # a short run saves at its last step
    assert script.run(1)["step"] == 2 and set(script.run(1)["history"]) == {0, 2}


def test_an_empty_file_is_no_run(script):
    """It is what a kill leaves in the instant when the number is taken."""
    script.main()
    Path(script.path(2)).touch()
    script.main("--sample")
    script.main("--resume", "--max-iters", "12")
    assert script.run(1)["step"] == 12
    script.main()
    assert script.run(3)["step"] == 9
    os.remove(script.path(1))
    os.remove(script.path(3))
    with pytest.raises(script.gpt.UserError, match="no run here"):
        script.main("--resume")


def test_a_run_whose_steps_are_done_says_so(script):
    script.main()
    torch.save(script.run() | {"step": 1600, "max_iters": 1600}, script.path(1))
    before = script.files()
    for flags in ([], ["--max-iters", "1600"]):
        with pytest.raises(script.gpt.UserError, match=r"1,600 of 1,600 .*--max-iters N"):
            script.main("--resume", *flags)
    with pytest.raises(script.gpt.UserError, match=r"1,600 of 1,000 .*--max-iters N"):
        script.main("--resume", "--max-iters", "1000")
    assert script.files() == before


def test_edited_constants_are_named_with_what_becomes_of_them(script, capsys):
    rates, decays, step = [], set(), script.gpt.train_step

    def listen(model, optimizers, x, y, lr):
        rates.append(lr)
        decays.update(g["weight_decay"] for o in optimizers for g in o.param_groups)
        return step(model, optimizers, x, y, lr)

    rate = "LEARNING_RATE" if script.name != "gpt2" else "SCRATCH_LEARNING_RATE"
    script.main(train_step=listen)
    before = max(rates)
    capsys.readouterr()
    rates.clear()
    decays.clear()
    edits = {"N_LAYERS": 2, "DROPOUT": 0.5, rate: before / 10, "WEIGHT_DECAY": 0.7}
    edits["PROMPT"] = "a "
    script.main("--resume", "--max-iters", "12", **edits)
    (line,) = lines_with("N_LAYERS", capsys.readouterr().out)
    kept, _, used = line.partition(" kept")
    assert set(re.findall("[A-Z_]{4,}", kept)) == {"N_LAYERS", "DROPOUT"}
    assert set(re.findall("[A-Z_]{4,}", used)) == {rate, "WEIGHT_DECAY", "PROMPT"}
    run = script.run(1)
    assert (run["config"]["n_layers"], run["config"]["dropout"]) == (1, 0.2)
    assert (run["constants"]["N_LAYERS"], run["constants"]["WEIGHT_DECAY"]) == ("1", "0.7")
    assert max(rates) <= before / 10 and decays == {0.0, 0.7}  # they are really used
    script.main("--resume", "--max-iters", "15", N_LAYERS=1, DROPOUT=0.2)
    assert not lines_with("WEIGHT_DECAY", capsys.readouterr().out)  # said once


def test_a_run_goes_on_without_a_word_where_nothing_was_edited(script, capsys):
    script.main_killed_at(5, "--seed", "7", "--max-iters", "8")
    capsys.readouterr()
    script.main("--resume")
    assert not lines_with("edited", capsys.readouterr().out)


def test_the_averages_of_another_optimizer_start_anew(script, capsys):
    script.main()
    edit = {"make_optimizers": lambda model: [torch.optim.SGD(model.parameters(), momentum=0.9)]}
    if hasattr(script.gpt, "MUON"):
        edit = {"MUON": False}
    for steps, times in (("12", 1), ("15", 0)):
        capsys.readouterr()
        script.main("--resume", "--max-iters", steps, **edit)
        assert len(lines_with("anew", capsys.readouterr().out)) == times
    assert script.run()["step"] == 15 and set(script.files()) >= {script.path(1)}


@pytest.mark.parametrize("edit", ["another text", "another border"])
def test_another_text_gets_a_new_number(script, tmp_path, capsys, edit):
    """Or another part of it for training. Else the run would be tested on what it has learned."""
    script.main()
    old = script.files()[script.path(1)]
    if edit == "another text":
        script.write_data(tmp_path, OTHER)
    else:
        script.set(TRAIN_SHARE=0.7)
    capsys.readouterr()
    script.main("--resume", "--max-iters", "15")
    assert lines_with("new number", capsys.readouterr().out)
    run = script.run(2)
    assert set(run["history"]) == {9, 12, 15} and run["step"] == 15  # its history begins anew
    assert run["best_step"] in (12, 15)
    assert run["vocabulary"] == script.run(1)["vocabulary"]
    script.main("--resume", "--max-iters", "18")  # and goes on there like any other
    assert set(script.run(2)["history"]) == {9, 12, 15, 18}
    assert script.files()[script.path(1)] == old and script.path(3) not in script.files()


def test_runs_are_listed_with_what_differs(script, capsys):
    first = script.main()["val_loss"]
    script.main("--seed", "7")
    script.main("--max-iters", "6", N_LAYERS=2, DROPOUT=0.1)
    script.set(N_LAYERS=1, DROPOUT=0.2)
    script.main_killed_at(8)  # it has no exact loss
    edited = edited_copy(f"{script.name}.py", script.folder, "# an edit", EVAL_ITERS=3)
    script.main(__file__=str(edited), EVAL_ITERS=3)
    Path(script.path(6)).write_bytes(b"damaged")
    Path(script.path(7)).touch()
    os.rename(script.path(2), script.path(12))
    before = script.files()
    capsys.readouterr()
    assert script.gpt.main(["--runs"]) == {}
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    lines = dict(lines)
    assert [*lines] == [script.path(number) for number in (1, 3, 4, 5, 6, 12)]
    estimate = min(entry["val"]["loss"] for entry in script.run(4)["history"].values())
    assert "tiny.txt" in lines[script.path(1)] and "9 steps" in lines[script.path(1)]
    assert f" {first:.4f} " in lines[script.path(1)]
    assert f" ~{estimate:.4f} " in lines[script.path(4)]
    assert "6 steps" in lines[script.path(3)] and "6 steps" in lines[script.path(4)]
    size = f" {os.path.getsize(script.path(1)) / 1e6:.0f} MB"
    assert all(size in line for path, line in lines.items() if path != script.path(6))
    differences = {
        path: set(re.findall(r"[A-Z_]{4,} = [^,;]+|code edited", line))
        for path, line in lines.items()
    }
    assert differences == {
        script.path(1): set(),
        script.path(3): {"N_LAYERS = 2", "DROPOUT = 0.1", "MAX_ITERS = 6"},
        script.path(4): set(),
        script.path(5): {"EVAL_ITERS = 3", "code edited"},
        script.path(6): set(),
        script.path(12): {"SEED = 7"},
    }
    assert script.files() == before


def test_a_constant_that_was_edited_is_no_edit_of_the_code(script, capsys):
    for layers in (2, 3):
        path = edited_copy(f"{script.name}.py", script.folder, N_LAYERS=layers)
        script.main(__file__=str(path), N_LAYERS=layers)
    capsys.readouterr()
    script.gpt.main(["--runs"])
    printed = capsys.readouterr().out
    assert "N_LAYERS = 3" in printed and "edited" not in printed


def test_numbers_of_numpy_are_taken_as_constants(script):
    script.set(N_EMBED=np.int64(16), N_LAYERS=np.int32(1), BLOCK_SIZE=np.int64(16))
    script.set(DROPOUT=np.float64(0.1), WEIGHT_DECAY=np.float32(0.1), SEED=np.int64(5))
    script.set(MAX_ITERS=np.int64(6), TEMPERATURE=np.float32(0.5), EVAL_INTERVAL=np.int64(3))
    script.set(BATCH_SIZE=np.int64(4), EVAL_ITERS=np.int64(2), SAMPLE_TOKENS=np.int64(5))
    script.main()
    script.main("--resume", "--max-iters", "9")
    script.main("--sample")
    run = script.run(1)  # read with weights_only=True
    assert run["step"] == 9 and run["seed"] == 5
    assert math.isclose(run["config"]["dropout"], 0.1)
    script.main("--max-iters", "9", N_EMBED=16, SEED=5)  # the same as with Python's
    assert run["seed"] == script.run(2)["seed"]
    assert is_same(script.run(2)["history"][0], run["history"][0])


# --- presets --------------------------------------------------------------------------------------
def find_presets():
    """Return [(name, script, source)] of the README's presets, and of those in RESULTS.md."""
    found = []
    for path in (ROOT / "README.md", ROOT / "tests" / "RESULTS.md"):
        if path.exists():
            block = r"```python\n# preset ([\w-]+): (\w+)\.py\n(.*?)```"
            found += re.findall(block, path.read_text(encoding="utf-8"), flags=re.S)
    return found


def test_presets(script):
    """Each one pasted over the constants gives a model that trains; sizes are made small."""
    presets = {name: source for name, owner, source in find_presets() if owner == script.name}
    assert len(presets) >= 2
    original = load_fresh(script.name)
    for name, source in presets.items():
        pasted = {}
        exec(source, {"FAST_GPU": False}, pasted)
        assert pasted and all(hasattr(original, constant) for constant in pasted), name
        n_heads = pasted.get("N_HEADS", original.N_HEADS) or 12  # None: those of OpenAI's smallest
        assert (pasted.get("N_EMBED", original.N_EMBED) or 768) % n_heads == 0, name
        small = {"N_EMBED": 8 * n_heads, "N_HEADS": n_heads, "N_LAYERS": 1, "BLOCK_SIZE": 16}
        small |= {"BATCH_SIZE": 2, "MAX_ITERS": 2, "EVAL_ITERS": 2}
        if script.name == "gpt2":
            assert pasted["TOKENS_PER_STEP"] % (pasted["WINDOW"] * pasted["BATCH_SIZE"]) == 0, name
            small |= {"INIT": "scratch", "WINDOW": 8, "TOKENS_PER_STEP": 32, "COMPILE": False}
            small |= {"VOCAB_SIZE": 260 + pasted.get("VOCAB_SIZE", 50_257) - 50_257}
        script.go_to(name)
        results = script.main(**pasted | small)
        start = script.run()["history"][0]["val"]["loss"]
        assert results["steps"] == 2 and results["val_loss"] < start, name


# --- notebooks, and other ways to run it ----------------------------------------------------------


def test_importing_has_no_effect(script):
    Path("probe.py").write_text(f"import sys; sys.path[0] = {str(ROOT)!r}; import {script.name}")
    done = run_child(script.folder / "probe.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in script.folder.iterdir()] == ["probe.py"]


STOP = """
def stopped(call, main, step={name}.train_step):
    # The notebook's Stop sends SIGINT: here, in front of the training step of this number.
    calls = itertools.count(1)
    {name}.train_step = lambda *a: (next(calls) == call and os.kill(os.getpid(), 2), step(*a))[1]
    try:
        print("came to", main()["steps"])
    except KeyboardInterrupt:
        print("KeyboardInterrupt")
"""
STOPS_ITSELF = "def train_step(*args): os.kill(os.getpid(), 2)"


def test_in_a_notebook(script):
    path = script.copy(MAX_ITERS=4)
    name, flags = script.name, script.flags
    os.rename(script.write_data(script.folder, TEXT)[1], script.gpt.DATA)
    Path("stops.py").write_text(script.copy(STOPS_ITSELF).read_text())
    script.copy(MAX_ITERS=4)
    cells = [  # and a word that each must print
        (f"import {name}, itertools, os; assert {name}.main([])['steps'] == 4", "best"),
        (f"assert {name}.main()['steps'] == 4  # sys.argv is the kernel's", "best"),
        ("print(os.environ['MPLBACKEND'])  # the kernel's own plots", "inline"),
        (f"%run {name}.py --max-iters 2", "step     2"),
        (f"exec(open('{name}.py').read())", "step     4"),
        (path.read_text(encoding="utf-8"), "step     4"),
        ("try: exec(open('stops.py').read())\nexcept KeyboardInterrupt: print('Ctrl-C')", "Ctrl-C"),
        (STOP.format(name=name), ""),
        (f"stopped(2, lambda: {name}.main({flags}))", "KeyboardInterrupt"),  # before the first save
        (f"stopped(4, lambda: {name}.main({flags}))", "came to 3"),
    ]
    cell = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(cells=[cell(source) for source, _ in cells])
    resources = {"metadata": {"path": str(script.folder)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    for cell, (source, word) in zip(notebook.cells, cells, strict=True):
        assert word in "".join(output.get("text", "") for output in cell.outputs), source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], source
    assert len([*script.folder.glob("*.pt")]) == 6  # each of the runs that saved has a file


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
        assert f"\n{data}: " in f"\n{done.stdout}"
    assert_one_line_error(run_child(link, "--data", f"none/{data}"), f"none/{data}")


def test_the_download_of_the_text(script, tmp_path, server):
    content = Path(script.write_data(tmp_path, TEXT)[1]).read_bytes()
    server.files["/input.txt"] = content
    digest, url = sha256(content).hexdigest(), f"{server.url}/input.txt"
    has_download = hasattr(script.gpt, "download")  # it tries again, and uses what it has got
    hurry = "time.sleep = lambda seconds: None"
    edits = {"DATA": "input.txt", "DATA_URL": url, "DATA_SHA256": digest, "MAX_ITERS": 2}
    path = script.copy(hurry, **edits)
    bad = ["file:///etc/passwd", "http://[::bad", f"{url}:", 404, 500, "wrong", "cut", "lie"]
    for fault in bad:
        server.faults = [fault] * 9
        assert_one_line_error(run_child(path), url, "input.txt")
        assert {p.name for p in script.folder.iterdir()} <= {path.name, "input.txt.part"}
        assert has_download or not Path("input.txt.part").exists()
    server.faults = []
    assert run_child(path).returncode == 0
    assert Path("input.txt").read_bytes() == content and not [*Path().glob("*.part")]
    seen = len(server.seen)
    by_hand = Path(script.write_data(tmp_path, OTHER)[1]).rename("input.txt").read_bytes()
    assert run_child(path).returncode == 0  # a file that was put there is taken
    assert len(server.seen) == seen and Path("input.txt").read_bytes() == by_hand
    os.remove("input.txt")
    refused = script.copy(hurry, DATA="input.txt", DATA_URL="http://127.0.0.1:9/input.txt")
    assert_one_line_error(run_child(refused), "http://127.0.0.1:9/input.txt", "input.txt")


def test_certificates_that_are_not_there(script):
    """Nothing is tried again: the line names the missing file, and where to put the text."""
    insert = """
os.environ["REQUESTS_CA_BUNDLE"] = "/none/certificates.pem"
def sleep(seconds): raise RuntimeError("it tries again")
time.sleep = sleep
"""
    path = script.copy(insert, DATA="input.txt", DATA_URL="https://127.0.0.1:9/input.txt")
    words = "/none/certificates.pem", "https://127.0.0.1:9/input.txt", str(Path("input.txt"))
    assert_one_line_error(run_child(path), *words)
