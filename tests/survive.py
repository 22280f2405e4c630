"""The long form of the promise that a stopped run ends with the bits it would have had. Not part of the fast suite.

    python tests/survive.py kill [--trials 20]     kill -9 at random moments of f_seg, GAN, augmentation, self-ensembling
    python tests/survive.py leak [--steps 2000]    memory and open files of a long run
    python tests/survive.py full [--trials 20]     a disk (tmpfs, needs root) that fills up at random moments of each stage

`kill`: each trial starts the stage's own command in a copy of the prepared run folder, kills it once, in every second
trial while a file is being written (its temporary file is there), runs the command again to its end, and compares all
checkpoints' contents, augmented files, sheets, manifests and logs with those of a run that nobody disturbed. One line a
trial, a table at the end, exit status 1 unless all are equal.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ENV, REPO, digests, make_camvid, make_carla

SIZE = [32, 48]
CONFIG = {
    "name": "run", "device": "cpu", "precision": "float32", "log_every": 1, "sheet_every": 20, "save_every": 3,
    "source": {"dataset": "carla", "size": SIZE, "images": 60}, "target": {"dataset": "camvid", "size": SIZE, "images": 30},
    "fseg": {"width": 0.03, "steps": 60, "batch": 2, "crop": None},
    "gan": {"steps": 60, "warmup_steps": 10, "batch": 2, "width": 4, "style_dim": 4, "mlp_dim": 8, "res_blocks": 1,
            "d_width": 4, "d_layers": 2, "crop": None},
    "augment": {"batch": 3, "styles_per_image": 4}, "eval": {"batch": 3},
    "selfens": {"width": 0.03, "steps": 60, "batch": 2, "aspp_rates": [1, 2], "delta_con": 10.0, "ramp_up": 0.4},
}  # fmt: skip
# stage -> (its script, its folder, overrides, what must be there before)
STAGES = {
    "f_seg": ("train_gan.py", "gan/fseg", ["gan.steps=0"], []),
    "gan": ("train_gan.py", "gan", [], ["gan/fseg"]),
    "augment": ("augment.py", "augmented", [], ["gan"]),
    "selfens": ("train_selfens.py", "selfens/tgcf_da_se", [], ["augmented"]),
}


def prepare(root: Path, **changes) -> Path:
    """Data sets and config in `root`; returns the config's path."""
    make_carla(root / "carla", drives=14, frames=6)
    make_camvid(root / "camvid", train=30)
    tree = CONFIG | {"output": str(root / "out")} | changes
    for role, folder in (("source", "carla"), ("target", "camvid")):
        tree[role] = {**tree[role], "root": str(root / folder)}
    (root / "cfg.yaml").write_text(yaml.safe_dump(tree))
    return root / "cfg.yaml"


def command(script: str, config: Path, *items, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(REPO / script), str(config), *map(str, items)], cwd=REPO, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


def finish(script: str, config: Path, *items) -> None:
    process = command(script, config, *items)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{script} ended with status {process.returncode}:\n{errors}")


def plain(x):
    """A checkpoint's content with tensors as bytes, to be compared with ==."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def outcome(folder: Path) -> dict:
    """Everything in a stage's folder that a disturbed run must leave as it is: {file: content or digest}.

    Left out is what says when and how it ran (events, run-STEP.json, config.yaml with the run's name, the lock) and the
    checkpoint before the last, whose step depends on where the run was stopped.
    """
    files = digests(folder, "events", "run-", "config.yaml", "previous.pt", ".")
    return {name: plain(torch.load(folder / name, weights_only=True)) if name.endswith(".pt") else digest
            for name, digest in files.items()}


def writing(folder: Path) -> bool:
    """Whether a temporary file is there: somebody writes, or was killed while writing."""
    return any(name.endswith(".tmp") for _, _, names in os.walk(folder) for name in names)


def kill_trial(config: Path, stage: str, ready: Path, duration: float, in_write: bool, dice: random.Random):
    """One trial. Returns (its outcome, whether a write was cut off, after what part of the stage)."""
    script, part, items, before = STAGES[stage]
    with tempfile.TemporaryDirectory() as output:
        folder = Path(output, "run", part)
        for needed in before:
            shutil.copytree(ready / needed, Path(output, "run", needed))
        process = command(script, config, f"output={output}", *items)
        while not (folder / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.001)
        moment = dice.uniform(0, 0.95) * duration
        time.sleep(moment)
        if in_write:
            deadline = time.monotonic() + duration
            while not writing(folder) and process.poll() is None and time.monotonic() < deadline:
                pass
            time.sleep(dice.uniform(0, 0.0005))
        alive = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not alive:
            return None
        cut = writing(folder)
        finish(script, config, f"output={output}", *items)
        assert not writing(folder), f"{stage}: temporary files are left over"
        return outcome(folder), cut, moment / duration


def kill(args) -> bool:
    """Kill -9, `args.trials` times in each stage."""
    dice, rows = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as root:
        config = prepare(Path(root))
        ready = Path(root, "out", "run")
        for stage, (script, part, _, _) in STAGES.items():
            if stage != "f_seg":
                finish(script, config)
            # An undisturbed run of the stage alone: its outcome, and how long it is at work once it has begun.
            lines = (ready / part / "log.jsonl").stat() if (ready / part / "log.jsonl").exists() else None
            with tempfile.TemporaryDirectory() as output:
                for needed in STAGES[stage][3]:
                    shutil.copytree(ready / needed, Path(output, "run", needed))
                process = command(script, config, f"output={output}", *STAGES[stage][2])
                log = Path(output, "run", part, "log.jsonl")
                while not log.exists() and process.poll() is None:
                    time.sleep(0.001)
                begun = time.monotonic()
                _, errors = process.communicate()
                assert process.returncode == 0, errors
                duration, undisturbed = time.monotonic() - begun, outcome(log.parent)
            assert undisturbed and (lines is None or outcome(ready / part) == undisturbed), f"{stage}: does not repeat itself"
            rows[stage] = {"trials": 0, "equal": 0, "cut_writes": 0, "too_late": 0, "seconds": duration}
            row = rows[stage]
            while row["trials"] < args.trials:
                trial = kill_trial(config, stage, ready, duration, row["trials"] % 2 == 1, dice)
                if trial is None:
                    row["too_late"] += 1
                    continue
                result, cut, moment = trial
                wrong = sorted(n for n in {*undisturbed, *result} if undisturbed.get(n) != result.get(n))
                row["trials"] += 1
                row["equal"] += not wrong
                row["cut_writes"] += cut
                print(f"{stage:<8} trial {row['trials']:>2}: killed at {moment:4.0%}{', in a write' if cut else '':<12} "
                      f"{'equal' if not wrong else 'DIFFERS: ' + ', '.join(wrong[:5])}", flush=True)
    print(f"\n{'stage':<10}{'trials':>8}{'equal':>8}{'in a write':>12}")
    for stage, row in rows.items():
        print(f"{stage:<10}{row['trials']:>8}{row['equal']:>8}{row['cut_writes']:>12}")
    total = {key: sum(row[key] for row in rows.values()) for key in ("trials", "equal", "cut_writes")}
    print(f"{'all':<10}{total['trials']:>8}{total['equal']:>8}{total['cut_writes']:>12}")
    if args.out:
        Path(args.out).write_text(json.dumps(rows | {"all": total}, indent=1) + "\n")
    return total["equal"] == total["trials"]


def leak(args) -> bool:
    """Resident memory and open files over a long run of GAN and self-ensembling: the second half not above the first by 1 %."""
    flat = True
    with tempfile.TemporaryDirectory() as root:
        steps = args.steps
        config = prepare(Path(root), log_every=max(1, steps // 100), sheet_every=steps // 10, save_every=steps // 20)
        for script, items in (("train_gan.py", [f"gan.steps={steps}"]), ("augment.py", [f"gan.steps={steps}"]),
                              ("train_selfens.py", [f"selfens.steps={steps}", f"gan.steps={steps}"])):  # fmt: skip
            if script == "augment.py":
                finish(script, config, *items)
                continue
            process = command(script, config, *items)
            log = Path(root, "out/run", "gan" if script == "train_gan.py" else "selfens/tgcf_da_se", "log.jsonl")
            samples = []
            while process.poll() is None:
                time.sleep(0.05)
                with contextlib.suppress(OSError, IndexError, ValueError):
                    step = json.loads(log.read_text().splitlines()[-1])["step"]
                    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                    samples.append((step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{process.pid}/fd"))))
            assert process.returncode == 0, process.communicate()[1]
            # Without those after the last step, when the interpreter takes itself apart.
            tenths = [[s for s in samples if k * steps < 10 * s[0] <= (k + 1) * steps and s[0] < steps] for k in range(10)]
            memory, files = ([max(s[k] for s in tenth) for tenth in tenths] for k in (1, 2))
            print(f"{script}, {len(samples)} samples, the highest of each tenth of the steps:\n  memory, MB "
                  + "".join(f"{m / 1e6:8.1f}" for m in memory) + "\n  open files " + "".join(f"{f:8}" for f in files))
            flat &= max(memory[5:]) <= 1.01 * max(memory[:5]) and max(files[5:]) <= max(files[:5])
    return flat


def fill(disk: Path, spare: int) -> None:
    """Fills a file system but for `spare` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    os.truncate(disk / "filler", max(0, (disk / "filler").stat().st_size - spare))


def full(args) -> bool:
    """A tmpfs that fills up at random moments: a stage stops with one line; given space, it ends with the same bits."""
    dice, trials, equal, named = random.Random(args.seed), 0, 0, {}
    with tempfile.TemporaryDirectory() as root:
        config = prepare(Path(root))
        disk, ready = Path(root, "disk"), Path(root, "out", "run")
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
        try:
            for script in ("train_gan.py", "augment.py", "train_selfens.py"):
                finish(script, config)
            for stage, (script, part, items, before) in STAGES.items():
                done = 0
                while done < args.trials:
                    shutil.rmtree(disk / "run", ignore_errors=True)
                    for needed in before:
                        shutil.copytree(ready / needed, disk / "run" / needed)
                    process = command(script, config, f"output={disk}", *items)
                    while not (disk / "run" / part / "log.jsonl").exists() and process.poll() is None:
                        time.sleep(0.001)
                    time.sleep(dice.uniform(0, 1.5))
                    fill(disk, dice.choice([0, 0, 4096, 8192, 40960]))
                    _, errors = process.communicate()
                    (disk / "filler").unlink()
                    if process.returncode == 0:
                        continue  # it had finished before
                    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
                    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in errors, errors
                    assert "No space left" in lines[0], lines[0]
                    finish(script, config, f"output={disk}", *items)
                    same = outcome(disk / "run" / part) == outcome(ready / part)
                    file = Path(lines[0].removeprefix("error: ").split(": ")[0])
                    kind = f"{part}/*{file.suffix}" if file.suffix else f"{part} (events)"
                    named[kind] = named.get(kind, 0) + 1
                    done, trials, equal = done + 1, trials + 1, equal + same
                    print(f"{stage:<8} trial {done:>2}: {'equal' if same else 'DIFFERS'} after {lines[0]}", flush=True)
        finally:
            subprocess.run(["umount", disk], check=True)
    print(f"{equal} of {trials} equal; what could not be written: " + ", ".join(f"{k} {n}" for k, n in sorted(named.items())))
    return equal == trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "leak", "full"))
    parser.add_argument("--trials", type=int, default=20, help="of each of the four stages")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a JSON file for kill's table")
    args = parser.parse_args()
    sys.exit(0 if {"kill": kill, "leak": leak, "full": full}[args.what](args) else 1)


if __name__ == "__main__":
    main()
