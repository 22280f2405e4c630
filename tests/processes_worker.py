"""What test_processes.py runs under torchrun: some steps of each training stage in float64, every process on its part.

    torchrun --nproc_per_node N processes_worker.py OUT.pt [accumulate] [batch_norm: 0 or 1]

Process 0 writes the weights, the gradients of the last step and the mean losses.
"""

import contextlib
import copy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from losses import IGNORE, consistency
from models import DeepLabVGG16, FCN8s, Generator, MultiScaleDiscriminator, synchronised
from runtime import all_sum, bare, join_processes, nested, parallel, rank, seed_torch, world
from train_gan import fseg_step, gan_step, warm_up_step
from train_selfens import DomainPasses, MovingAverage, selfens_step

BATCH, CLASSES, SIZE, STEPS = 4, 5, (32, 48), 4


def batch(step: int) -> dict:
    """This process's part of a batch of four, in which the images have very unequal numbers of labelled pixels."""
    g = torch.Generator().manual_seed(step)
    images = {name: torch.rand(BATCH, 3, *SIZE, generator=g, dtype=torch.float64) * 2 - 1 for name in ("x_s", "x_g", "x_t")}
    y_s = torch.randint(0, CLASSES, (BATCH, *SIZE), generator=g)
    for i in range(BATCH):
        y_s[i, : i * SIZE[0] // BATCH] = IGNORE
    part = slice(rank() * BATCH // world(), (rank() + 1) * BATCH // world())
    return {name: x[part] for name, x in (images | {"y_s": y_s}).items()}


def main() -> None:
    out, accumulate, batch_norm = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))
    join_processes(nested({"device": "cpu"}))
    cpu, cast = torch.device("cpu"), contextlib.nullcontext()
    torch.manual_seed(0)
    nets = {
        "f_seg": FCN8s(CLASSES, 0.03, batch_norm, 0.5), "G": Generator(4, 4, 8, 2, 1), "D": MultiScaleDiscriminator(4, 2, 2),
        "student": DeepLabVGG16(CLASSES, 0.03, batch_norm, 0.5, (1, 2)),
    }  # fmt: skip
    nets = {name: synchronised(net.double(), cpu) for name, net in nets.items()}
    nets["judge"] = copy.deepcopy(nets["f_seg"]).eval().requires_grad_(False)
    nets["teacher"] = copy.deepcopy(nets["student"]).requires_grad_(False)
    average = MovingAverage(nets["teacher"], nets["student"])
    G, D, f_seg = (parallel(nets[name], cpu) for name in ("G", "D", "f_seg"))
    passes = parallel(DomainPasses(nets["student"]), cpu)
    opt = {"G": G, "D": D, "f_seg": f_seg, "S": passes}
    opt = {name: torch.optim.Adam(net.parameters(), 1e-3) for name, net in opt.items()}

    losses = {}

    def check(terms):
        for name, value in terms.items():
            losses.setdefault(name, []).append(value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value))

    for step in range(STEPS):
        b = batch(step)
        seed_torch(0, "test", step)
        fseg_step(f_seg, opt["f_seg"], b["x_s"], b["y_s"], cast, check, accumulate)
        warm_up_step(G, opt["G"], b["x_s"], b["x_t"], cast, check, accumulate)
        gan_step(G, D, nets["judge"], opt["G"], opt["D"], b["x_s"], b["x_t"], b["y_s"], 3.0, cast, check, accumulate,
                 0.5, 2.0)
        con = partial(consistency, balance=0.5 * (accumulate == 1))  # its shares are those of a part
        selfens_step(passes, nets["teacher"], average, opt["S"], {k: b[k] for k in ("x_s", "x_g", "x_t")}, b["y_s"], 0.1, 10.0,
                     0.9, cast, check, accumulate, con, torch.linspace(0.5, 1.5, CLASSES))  # fmt: skip

    losses = {name: all_sum(torch.stack(values).double()) / world() for name, values in losses.items()}
    if rank() == 0:
        torch.save({
            "weights": {name: bare(net).state_dict() for name, net in nets.items()},
            "gradients": {f"{name}.{k}": p.grad for name in ("f_seg", "G", "D", "student")
                          for k, p in nets[name].named_parameters()},
            "losses": losses,
        }, out)  # fmt: skip


if __name__ == "__main__":
    main()
    if dist.is_initialized():  # after the networks, whose wrappers may wait for it for ever (torch 2.11)
        dist.destroy_process_group()
