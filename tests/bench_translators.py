"""What the translators of augment.py cost: seconds per image, parameters, memory. Not part of the fast suite.

    python tests/bench_translators.py [CFG key=value ...]

Each method runs in a process of its own, on random images of source.size in batches of augment.batch, after one batch to
warm up; the methods take turns for five rounds and the medians stand in the table. Files are neither read nor written: that
is the same for all. Memory is the process's peak above what it had before the first image, with G's weights. `x fda` is the
time over that of fda, in the same run. G has to be trained beforehand (runs/minutes.tsv says how long that took).
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from augment import fda, reinhard  # noqa: E402
from models import build_generator  # noqa: E402
from runtime import autocast, command_line, get_device, get_precision, run_main  # noqa: E402

ROUNDS = 5


def peak(device) -> float:
    """Megabytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def measure(cfg, method: str) -> dict:
    """{seconds per image, parameters, memory in MB} of one method, in this process."""
    device = get_device(cfg)
    precision, n = get_precision(cfg, device), cfg.augment.batch
    x_s, x_t = (torch.rand(n, 3, *size, device=device) * 2 - 1 for size in (cfg.source.size, cfg.target.size))
    before, parameters = peak(device), 0
    if method == "gan":
        translate = build_generator(cfg).to(device, memory_format=torch.channels_last).eval()
        parameters = sum(p.numel() for p in translate.parameters())
    else:
        translate = {"reinhard": reinhard, "fda": lambda s, t: fda(s, t, cfg.augment.fda_beta)}[method]

    def once():
        with autocast(device, precision):
            x_g = translate(x_s, x_t)
        return float(x_g.mean())  # waits for a GPU

    once()
    start = time.perf_counter()
    for _ in range(4):
        once()
    return {"seconds": (time.perf_counter() - start) / (4 * n), "parameters": parameters, "memory": peak(device) - before}


def main() -> None:
    def arguments(parser):
        parser.add_argument("--method", help="measure this one alone, in this process, and print it as JSON")

    cfg, args = command_line(__doc__, ("", "source", "target", "gan", "augment"), arguments)
    if args.method:
        return print(json.dumps(measure(cfg, args.method)))
    found = {method: [] for method in ("gan", "reinhard", "fda")}
    for _ in range(ROUNDS):
        for method, results in found.items():
            words = [sys.executable, str(Path(__file__).resolve()), *args.items, "--method", method]
            results.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    one = {m: {k: float(np.median([r[k] for r in results])) for k in results[0]} for m, results in found.items()}
    print(f"{cfg.source.size[1]}x{cfg.source.size[0]}, batches of {cfg.augment.batch}, {get_device(cfg)}, "
          f"{torch.get_num_threads()} threads, {get_precision(cfg, get_device(cfg))} (reinhard and fda: float64)\n")
    print(f"{'method':<10}{'x fda':>8}{'ms per image':>14}{'parameters':>12}{'memory, MB':>12}")
    for method, r in one.items():
        print(f"{method:<10}{r['seconds'] / one['fda']['seconds']:>8.2f}{1000 * r['seconds']:>14.1f}{r['parameters']:>12,.0f}"
              f"{r['memory']:>12.0f}")


if __name__ == "__main__":
    run_main(main)
