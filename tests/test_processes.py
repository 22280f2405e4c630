"""Several processes under torchrun do what one would: the same steps, files, counts; and they live and die together."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENV, REPO, make_cfg
from survive import command, outcome, prepare
from test_survive import FEW

import augment
import datasets
import evaluate
import train_gan
import train_selfens
from datasets import Batches, Scenes
from runtime import UserError, load_checkpoint


def torchrun(processes: int, *words, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                             *map(str, words)], cwd=REPO, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)  # fmt: skip


def finish(processes: int, *words):
    process = torchrun(processes, *words)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return out, errors


def close(a, b, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            close(a[name], b[name], tolerance)
        elif isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """steps(processes, accumulate, batch_norm): weights, gradients and losses after some steps of every stage."""
    folder, results = tmp_path_factory.mktemp("steps"), {}

    def run(processes, accumulate, batch_norm):
        key = processes, accumulate, batch_norm
        if key not in results:
            out = folder / "-".join(map(str, key))
            words = [REPO / "tests/processes_worker.py", out, accumulate, batch_norm]
            if processes > 1:
                finish(processes, *words)
            else:
                subprocess.run([sys.executable, *map(str, words)], check=True, env=ENV)
            results[key] = torch.load(out, weights_only=True)
        return results[key]

    return run


@pytest.mark.parametrize("batch_norm", [1, 0])
def test_two_processes_are_one_with_the_whole_batch(steps, batch_norm):
    """Losses, gradients and weights of f_seg, G, D, student and teacher, with batch norm, noise, dropout and ignored pixels.

    In float64, so that nothing but the mathematics can differ: labelled pixels, batch statistics, noise and dropout all
    have to be those of the whole batch. Plain averages over processes would not be.
    """
    one, two = steps(1, 1, batch_norm), steps(2, 1, batch_norm)
    close(one, two, 1e-9)


def test_accumulated_parts_are_the_whole_batch(steps):
    """Without batch norm and its statistics of parts, the parts one after the other are the batch. (Dropout draws anew.)"""
    whole, parts = steps(1, 1, 0), steps(2, 2, 0)
    for name in ("L_rec", "L_D", "L_GAN", "L_sem"):  # G and D have neither batch norm nor dropout
        torch.testing.assert_close(whole["losses"][name], parts["losses"][name], atol=1e-9, rtol=1e-9)
    close({k: whole["weights"][k] for k in ("G", "D")}, {k: parts["weights"][k] for k in ("G", "D")}, 1e-9)
    first = [r["losses"]["L_sup"][0] for r in (whole, parts)]
    torch.testing.assert_close(*first, atol=0.2, rtol=0.1)  # other dropout, the same sum over the same pixels


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_processes_parts_are_the_batch_of_one(monkeypatch, processes):
    """Whatever their number, and so whatever it was before a run was resumed, step k draws the same six images."""
    cfg = make_cfg(source__images=9, target__images=7, selfens__batch=6)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    whole, parts = Batches(cfg, "selfens", 6, [32, 48], source, target=target), []
    monkeypatch.setattr(datasets, "world", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(datasets, "rank", lambda rank=rank: rank)
        parts.append(Batches(cfg, "selfens", 6, [32, 48], source, target=target))
    for step in (0, 3):
        for name, x in whole[step].items():
            assert torch.equal(torch.cat([part[step][name] for part in parts]), x)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    """One process with fewer images than the others would weigh its own more: the key and the mend are named."""
    monkeypatch.setattr(datasets, "world", lambda: 2)
    with pytest.raises(UserError, match=r"selfens\.batch=6: 2 processes with selfens\.accumulate=2 .* multiple of 4"):
        Batches(make_cfg(selfens__accumulate=2), "selfens", 6, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(config, run folder of one process, run folder of two): all stages, and what two processes printed."""
    root = tmp_path_factory.mktemp("processes")
    config = prepare(root, **FEW)
    printed = {}
    for module in (train_gan, augment, train_selfens, evaluate):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [module.__name__, str(config)])
            module.main()
    for name in ("train_gan", "train_selfens"):
        if name == "train_selfens":  # with the images of one process: G's last bits are not the same
            (root / "out/two").mkdir(exist_ok=True)
            os.symlink(root / "out/run/augmented", root / "out/two/augmented")
        printed[name] = finish(2, f"{name}.py", config, "name=two")
    return config, root / "out/run", root / "out/two", printed


def test_stages_of_two_processes_end_where_one_ends(runs):
    """The commands themselves, with loaders, checkpoints and logs: the same draws, so the same losses but for rounding."""
    _, one, two, printed = runs
    for part in ("gan/fseg", "gan", "selfens/tgcf_da_se"):
        logs = [[json.loads(line) for line in (folder / part / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == list(range(1, 9))
        for a, b in zip(*logs, strict=True):
            # A GAN's first steps divide rounding by itself (Adam), and style_corr is a quotient of small numbers.
            assert a.pop("style_corr", 0) == pytest.approx(b.pop("style_corr", 0), abs=0.05)
            assert a == pytest.approx(b, rel=0.02, abs=0.005)
        a, b = (load_checkpoint(folder / part / "last.pt", "") for folder in (one, two))
        assert a["step"] == b["step"] == 8 and a["config"] == b["config"] and a.keys() == b.keys()
    assert printed["train_gan"][0].count("2 processes") == 2  # process 0 alone prints


def test_augmented_images_do_not_depend_on_the_number_of_processes(runs, tmp_path):
    """60 images in batches of 5 for two processes: the same bits, one log and one manifest, both in order."""
    config, one, _, _ = runs
    (tmp_path / "run").mkdir()
    os.symlink(one / "gan", tmp_path / "run/gan")
    finish(2, "augment.py", config, f"output={tmp_path}")
    assert outcome(tmp_path / "run/augmented") == outcome(one / "augmented")


def test_the_sharded_confusion_matrix_is_exact(runs, tmp_path):
    """Five images in batches of three for three processes, one of which has nothing to do: every one counted once."""
    config, one, _, _ = runs
    (tmp_path / "run").mkdir()
    os.symlink(one / "selfens", tmp_path / "run/selfens")
    finish(3, "evaluate.py", config, f"output={tmp_path}", "--export", tmp_path / "png")
    a, b = (json.loads((folder / "eval/tgcf_da_se_teacher_val.json").read_text()) for folder in (one, tmp_path / "run"))
    assert a["images"] == 5 and a["confusion"] == b["confusion"] and a["miou"] == b["miou"]
    assert len(list((tmp_path / "png").rglob("*.png"))) == a["images"]


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    """SIGTERM to torchrun stops both processes after one and the same step; one process then finishes the run."""
    config, one, _, _ = runs
    words = ["train_selfens.py", config, f"output={tmp_path}", "selfens.variant=self_ensembling", "selfens.steps=2000"]
    process = torchrun(2, *words, "save_every=1000")
    log = tmp_path / "run/selfens/self_ensembling/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    state = load_checkpoint(log.with_name("last.pt"), "")
    done = state["step"]
    assert 3 <= done < 2000
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, done + 1))
    last = command(*words)
    while log.read_text().count("\n") < done + 3:
        assert last.poll() is None, last.communicate()[1]
        time.sleep(0.01)
    last.kill()
    last.communicate()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
    assert steps[: done + 3] == list(range(1, done + 4))


def test_a_process_that_dies_takes_the_others_along(runs, tmp_path):
    """Within a minute, with its error shown: a job that hangs on three of four GPUs costs a night."""
    config, _, _, _ = runs
    process = torchrun(2, "train_selfens.py", config, f"output={tmp_path}", "selfens.variant=source_only",
                       "selfens.steps=100000", "save_every=2")  # fmt: skip
    log = tmp_path / "run/selfens/source_only/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    start = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 60 and process.returncode
    assert "SIGKILL" in errors and "error: process" in errors
    assert load_checkpoint(log.with_name("last.pt"), "")["step"] >= 2


def test_an_error_is_told_though_torchruns_sigterm_comes_meanwhile():
    """torchrun stops the others as soon as one has died; that must not swallow the line that says why they ended."""
    program = """
import os, signal
from runtime import UserError, run_main

class Late(UserError):
    def __str__(self):  # run_main asks for the text while it handles the error
        os.kill(os.getpid(), signal.SIGTERM)
        return "cfg.yaml: mend it"

def main():
    raise Late

run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=ENV, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: cfg.yaml: mend it\n")
