"""A stopped run ends with the bits it would have had: kill -9 at random moments. A script, not a test.

    python tests/survive.py [--trials 20] [--seed 0]

The trials take f_seg, GAN, augmentation, self-ensembling in turn. Each starts the stage's command in a copy
of the folders before it, kills its processes, once or twice, runs the command to its end, and compares
tensors, images, logs, manifest with an undisturbed run's. Half of the kills wait until a file is written.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from conftest import ENV, REPO, digests, make_camvid, make_carla, write_config

STEPS = {"save_every": 3, "workers": 1, "inference_batch": 3,
         "gan__warmup_steps": 10, "augment__styles_per_image": 4, "fseg__steps": 40, "gan__steps": 40,
         "selfens__steps": 40}  # fmt: skip
# stage: script, folder, overrides, the folder that must be there before
STAGES = {
    "f_seg": ("train_gan.py", "gan/fseg", ["gan.steps=0"], None),
    "gan": ("train_gan.py", "gan", [], "gan/fseg"),
    "augment": ("augment.py", "augmented", [], "gan"),
    "selfens": ("train_selfens.py", "selfens/tgcf_da_se", [], "augmented"),
}


def start(stage: str, config: Path, output: Path) -> subprocess.Popen:
    script, _, items, _ = STAGES[stage]
    words = [sys.executable, REPO / script, config, f"output={output}", *items]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=REPO, env=ENV, start_new_session=True, **pipes)


def finish(stage: str, config: Path, output: Path) -> None:
    errors = (process := start(stage, config, output)).communicate()[1]
    assert process.returncode == 0, f"{stage}: status {process.returncode}\n{errors}"


def outcome(folder: Path) -> dict:
    """{file: digest, or a checkpoint's content} of all that does not say when and where it was written."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), tuple(x.shape), x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items() if k not in ("config", "output")}
        return [*map(plain, x)] if isinstance(x, list | tuple) else x

    files = digests(folder, "events", "run-", "config.yaml", "identity.json", "previous.pt", ".")
    return {name: plain(torch.load(folder / name, weights_only=True)) if name.endswith(".pt") else digest
            for name, digest in files.items()}


def writing(folder: Path) -> bool:
    return any(name.endswith(".tmp") for *_, names in os.walk(folder) for name in names)


def prepared(stage: str, ready: Path, output: Path) -> Path:
    """Copies what the stage needs from an undisturbed run; returns the stage's folder to be."""
    *_, before = STAGES[stage]
    for part in [before] if before == "gan/fseg" else ["gan", before] if before else []:
        shutil.copytree(ready / part, output / "run" / part, dirs_exist_ok=True)
    return output / "run" / STAGES[stage][1]


def trial(stage: str, config: Path, ready: Path, seconds: float, dice: random.Random) -> tuple[str, list]:
    """(what was done, files that differ from the undisturbed run's)."""
    with tempfile.TemporaryDirectory() as output:
        folder, moments = prepared(stage, ready, Path(output)), []
        for _ in range(dice.choice((1, 2))):
            process, begun = start(stage, config, Path(output)), time.monotonic()
            end, in_write = begun + dice.uniform(0.2, 1) * seconds, dice.random() < 0.5
            while process.poll() is None and (time.monotonic() < end or in_write and not writing(folder)):
                time.sleep(0.0002 if in_write else 0.01)
            killed = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            cut = " in a write" * writing(folder)
            moments.append(f"{time.monotonic() - begun:.1f} s{cut}" if killed else "after its end")
        finish(stage, config, Path(output))
        ours, theirs = outcome(folder), outcome(ready / STAGES[stage][1])
        wrong = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        return f"killed at {' and '.join(moments)}{', temporary file left' * writing(folder)}", wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, equal, seconds = random.Random(args.seed), 0, {}
    with tempfile.TemporaryDirectory() as root:
        carla, camvid = make_carla(Path(root, "carla")), make_camvid(Path(root, "camvid"))
        config = write_config(Path(root), source__root=str(carla), target__root=str(camvid), **STEPS)
        for stage in STAGES:
            seconds[stage] = -time.monotonic()
            finish(stage, config, Path(root, "out"))
            seconds[stage] += time.monotonic()
        for k in range(args.trials):
            stage = [*STAGES][k % len(STAGES)]
            done, wrong = trial(stage, config, Path(root, "out/run"), seconds[stage], dice)
            equal += not wrong
            print(f"{k + 1:>3} {stage:<8} {done}: {f'{wrong} DIFFER' if wrong else 'equal'}", flush=True)
    print(f"{equal} of {args.trials} equal")
    sys.exit(equal < args.trials)


if __name__ == "__main__":
    main()
