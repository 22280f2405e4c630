"""What a second process gains: the same steps by one process and by two, each process on one CPU thread.

    python tests/bench_processes.py [CFG key=value ...] [--steps 40]

Prints for GAN and self-ensembling how many times as fast two processes take a step with the same batch, median over the
steps, start excluded. The runs go to a temporary folder; `variant=self_ensembling`, so that no stage needs another's images.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ENV, REPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def seconds_per_step(script: str, folder: str, scalar: str, processes: int, items: list, steps: int) -> float:
    with tempfile.TemporaryDirectory() as output:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script,
                        *items, f"output={output}", "name=bench", "log_every=1"], cwd=REPO, env=ENV, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        events = EventAccumulator(str(Path(output, "bench", folder)), {"scalars": 0}).Reload().Scalars(scalar)
    times = [event.wall_time for event in events][-steps:]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="CFG key=value")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    small = ["source.images=60", "target.images=60", "fseg.steps=0", "save_every=100000", "sheet_every=100000"]
    for script, folder, scalar, items in (
        ("train_gan.py", "gan", "gan/L_D", [f"gan.steps={args.steps + 5}", "gan.warmup_steps=0"]),
        ("train_selfens.py", "selfens/self_ensembling", "selfens/L",
         [f"selfens.steps={args.steps + 5}", "selfens.variant=self_ensembling"]),
    ):  # fmt: skip
        rounds = [[seconds_per_step(script, folder, scalar, n, [*args.items, *small, *items], args.steps) for n in (1, 2)]
                  for _ in range(3)]
        ratios = sorted(one / two for one, two in rounds)
        print(f"{script}: two processes take a step {ratios[1]:.2f} times as fast as one (of three rounds: "
              f"{', '.join(f'{r:.2f}' for r in ratios)}); one: {1e3 * statistics.median(r[0] for r in rounds):.0f} ms")


if __name__ == "__main__":
    main()
