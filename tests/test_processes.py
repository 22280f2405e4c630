"""Two processes under torchrun do what one would with the batch of both, and they end together."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ENV, REPO, make_camvid, make_carla, write_config

from runtime import load_checkpoint, weights_digest

WORKER = """
import os, sys, time, torch
import augment, runtime, train_gan, train_selfens
from pathlib import Path

here, build, kept = Path(sys.argv.pop(1)), train_selfens.build_nets, []
train_selfens.build_nets = lambda *args: kept.append(build(*args)) or kept[-1]
write, digest = runtime.atomic_write, runtime.weights_digest

def tell_fseg(cfg, f_seg, held_out, run):
    (here / f"fseg{runtime.rank()}").write_text(digest(f_seg.state_dict()))

def main():
    runtime.atomic_write = lambda path, *rest: (time.sleep(0.3 * (path.suffix == ".pt")), write(path, *rest))
    train_gan.report_fseg = tell_fseg
    train_gan.main()
    runtime.atomic_write = write
    augment.main()
    train_selfens.main()
    weights = {name: getattr(kept[-1], name).state_dict() for name in ("student", "teacher")}
    torch.save(weights, here / f"rank{runtime.rank()}.pt")
    (here / f"pid{runtime.rank()}").write_text(str(os.getpid()))
    sys.argv += ["name=endless", "selfens.steps=1000000"]
    train_selfens.main()

runtime.run_main(main)
"""


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """(folder, arguments, torchrun's process): stages 1 and 3 under "run", then stage 3 without an end."""
    root = tmp_path_factory.mktemp("processes")
    (root / "worker.py").write_text(WORKER)
    make_carla(root / "carla")
    make_camvid(root / "camvid", bad_train_labels=True)
    config = write_config(root, source__root=str(root / "carla"), target__root=str(root / "camvid"))
    args = [str(config), "selfens.variant=self_ensembling", "selfens.noise_std=0.0", "selfens.dropout=0.0"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(root / "printed.txt", "w") as printed:
        process = subprocess.Popen([*words, root / "worker.py", root, *args], cwd=REPO, stdout=printed,
                                   stderr=subprocess.STDOUT, env=ENV | {"PYTHONPATH": str(REPO)})  # fmt: skip
    yield root, args, process
    process.terminate()  # to kill torchrun would leave its processes running
    process.wait()


def wait_for(condition, process, seconds=120):
    """Until condition() or the process's end; an end before it, or none at all, fails the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_agree_and_do_what_one_does(torchrun, stage):
    """Equal weights in both, f_seg's too on a slow disk; one log; the losses of one with twice the batch."""
    root, args, process = torchrun
    wait_for(lambda: (root / "pid0").exists() and (root / "pid1").exists(), process)
    saved = load_checkpoint(root / "out/run/gan/fseg/last.pt", "")["f_seg"]
    assert [(root / f"fseg{k}").read_text() for k in range(2)] == [weights_digest(saved)] * 2
    one, two = (torch.load(root / f"rank{k}.pt") for k in range(2))
    folder = root / "out/run/selfens/self_ensembling"
    saved = load_checkpoint(folder / "last.pt", "")
    for name, weights in one.items():
        for key, x in weights.items():
            assert torch.equal(x, two[name][key]) and torch.equal(x, saved[name][key])
    stage("train_selfens", *args, "name=one", "selfens.batch=4")
    single = root / "out/one/selfens/self_ensembling"
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (folder, single)]
    logs = [[json.loads(line) for line in lines] for lines in logs]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]  # process 0 alone writes
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    theirs = load_checkpoint(single / "last.pt", "")["student"]
    apart = [(one["student"][k] - x).abs().max().item() for k, x in theirs.items()]
    assert np.median(apart) < 1e-4  # Adam's first steps blow up rounding where a gradient is all but 0


def test_when_one_process_is_killed_the_other_ends_too(torchrun):
    """A job that hangs on one of two GPUs would cost a night: both end, soon, with an error status."""
    root, _, process = torchrun
    log = root / "out/endless/selfens/self_ensembling/log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, process)
    pids = [int((root / f"pid{k}").read_text()) for k in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert load_checkpoint(log.with_name("last.pt"), "")["step"] >= 2
