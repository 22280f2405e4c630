"""What the stages share: config, command line, device, seeds, processes, files, run folder.

What a user can mend ends in a `UserError`: one line that names the key or file and the mend, exit status 2.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import yaml

HERE = Path(__file__).resolve().parent
SCHEMA = HERE / "cfg.yaml"
if {"-h", "--help"} & {*sys.argv[1:]} and Path(sys.argv[0]).resolve().parent in (HERE, HERE / "baselines"):
    with contextlib.suppress(BrokenPipeError):  # `| head`
        print(sys.modules["__main__"].__doc__, SCHEMA.read_text(encoding="utf-8"), sep="\n", flush=True)
    raise SystemExit(0)  # before torch is imported, which takes seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402


class UserError(Exception):
    """Something the user can mend; its text is the one line that is shown."""


class Loader(yaml.SafeLoader):  # PyYAML's, but a key that is there twice is an error
    def construct_mapping(self, node, deep=False):
        for i, (key, _) in enumerate(node.value):
            if key.value in [k.value for k, _ in node.value[:i]]:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there for the second time")
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------------------------------------- configuration
def read_yaml(path) -> dict:
    """A YAML file of plain values. Raises UserError that names the file, and the line where it is wrong."""
    try:
        return dict(yaml.load(Path(path).read_text(encoding="utf-8"), Loader) or {})
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML keys: {' '.join(str(error).split())}") from None


@cache
def schema() -> tuple[dict, dict]:
    """cfg.yaml, whose head explains it: ({dotted key: default}, {dotted key: what is valid})."""
    defaults, rules, section = {}, {}, ""
    pattern = re.compile(r"^( *)(\w+):([^#\n]*).*?(?:\(([^()]*)\))?$", re.M)
    for indent, key, value, rule in pattern.findall(SCHEMA.read_text(encoding="utf-8")):
        if not value.strip():
            section = key
            continue
        key = f"{section}.{key}" if indent else key
        defaults[key], rules[key] = yaml.safe_load(value), rule
    return defaults, rules


def fits(value, default, rule: str) -> bool:
    """Whether a value has its default's type and keeps its key's rule; heights and widths are 8 or more."""
    if " | " in rule:
        return value in rule.split(" | ")
    if type(value) is not type(default):
        return False
    if rule.startswith("height, width"):
        empty = not value and rule.endswith("[]")
        return empty or (len(value) == 2 and all(type(v) is int and v >= 8 for v in value))
    if type(value) in (int, float):
        low, _, high = rule.removesuffix(" or more").partition(" to ")
        return float(low or 0) <= value <= float(high or sys.float_info.max)
    return True


def parse(key: str, value, where):
    """`value` for a key. Raises UserError, naming `where` and the key, for what does not fit."""
    defaults, rules = schema()
    if key not in defaults:
        near = [k for k in defaults if k.endswith(f".{key}")] or difflib.get_close_matches(key, defaults, 1)
        hint = f"did you mean '{near[0]}'?" if near else "--help lists the keys"
        raise UserError(f"{where}: unknown key '{key}'; {hint}")
    default, rule = defaults[key], rules[key]
    if isinstance(default, float) and type(value) in (int, str):
        with contextlib.suppress(ValueError):  # YAML reads 1e-4, without a dot, as text
            value = float(value)
    if not fits(value, default, rule):
        rule = rule or "0 or more" * (type(default) in (int, float))
        kind = type(default).__name__ + f" ({rule})" * bool(rule)
        near = [f"; did you mean {n}?" for n in difflib.get_close_matches(str(value), rule.split(" | "), 1)]
        raise UserError(f"{where}: '{key}' must be of type {kind}, not {value!r}{''.join(near)}")
    return os.path.expanduser(value) if isinstance(value, str) else value


def load_config(path, overrides=()) -> SimpleNamespace:
    """cfg.yaml's defaults, then the YAML file, then `key=value` overrides; see `nested`."""
    defaults, _ = schema()
    flat = dict(defaults)
    for key, value in read_yaml(path).items():
        section = isinstance(value, dict) and key not in defaults
        part = {f"{key}.{k}": v for k, v in value.items()} if section else {str(key): value}
        flat |= {k: parse(k, v, path) for k, v in part.items()}
    for item in overrides:
        key, _, text = item.partition("=")
        with contextlib.suppress(yaml.YAMLError):  # `parse` refuses the text
            text = text if isinstance(defaults.get(key), str) else yaml.safe_load(text)
        flat[key] = parse(key, text, "command line")
    if not re.fullmatch(r"[\w-][\w.-]*", flat["name"]):
        raise UserError(f"'name' is made of letters, digits, '.', '_' and '-', not {flat['name']!r}")
    crops = [(k, s) for k in ("gan.crop", "selfens.crop") for s in ("source.size", "target.size")]
    for key, size in [("fseg.crop", "source.size"), *crops]:
        if any(c > s for c, s in zip(flat[key], flat[size], strict=False)):
            raise UserError(f"'{key}' {flat[key]} is larger than '{size}' {flat[size]}; lower it")
    return nested(flat)


def nested(flat: dict) -> SimpleNamespace:
    """{dotted key: value} as namespaces, `cfg.gan.steps`, with the dictionary itself in `cfg.flat`."""
    cfg = SimpleNamespace(flat=flat)
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        part = vars(cfg).setdefault(section, SimpleNamespace()) if section else cfg
        setattr(part, name, value)
    return cfg


def command_line(*flags) -> tuple[SimpleNamespace, SimpleNamespace]:
    """(cfg, args) of `STAGE.py [CFG] [key=value ...]` and flags, (name, argparse's settings) each."""
    def error(message):
        raise UserError(f"command line: {message}; --help explains the arguments")

    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = error
    parser.add_argument("items", nargs="*")
    for name, settings in flags:
        parser.add_argument(name, **settings)
    args = parser.parse_intermixed_args()
    files = [item for item in args.items if "=" not in item or os.path.isfile(item)] or [SCHEMA]
    if len(files) > 1:
        error(f"one config file, not {' and '.join(files)}; overrides are key=value")
    path = files[0] if os.path.exists(files[0]) else HERE / files[0]  # called from another folder
    cfg = load_config(path, [item for item in args.items if item not in files])
    args.items = shlex.join(args.items)  # for the command of the next stage
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # meet torchrun's other processes
        gpu = get_device(cfg).type == "cuda"
        if gpu:
            torch.cuda.set_device(get_device(cfg))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")
    return cfg, args


def run_main(main) -> None:
    """Runs a stage: what a user can mend becomes one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for a terminal that knows ASCII alone
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as error:  # one from a loader's process has that one's traceback before its line
        line = str(error).rpartition("UserError: ")[2].strip()
    except (torch.OutOfMemoryError, MemoryError) as error:
        line = f"out of memory ({str(error).partition('. ')[0] or 'CPU'}); lower batch, crop or size"
    except BrokenPipeError:  # who read our output has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder without permission
        line = f"{error.filename or 'output'}: {error.strerror or error}; mend that and run it again"
    print("error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------- device, seeds and processes
def get_device(cfg) -> torch.device:
    """The device that `device` names, for this process. Raises UserError where there is none."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun, each its own
    known = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    name = {"auto": own if len(known) > 1 else "cpu", "cuda": own}.get(cfg.device, cfg.device)
    if name not in known:
        raise UserError(f"device={name}: there are {', '.join(known)}; use device=auto")
    return torch.device(name)


def get_precision(cfg, device: torch.device) -> str:
    """`precision`; auto is bfloat16 on a GPU that has it. On CPUs small networks gain nothing by it."""
    auto = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return auto if cfg.precision == "auto" else cfg.precision


def autocast(device: torch.device, precision: str):
    """Context in which the networks' matrix products run in `precision`; losses stand outside."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def key_seed(*key) -> int:
    """A 63-bit seed that is a function of its arguments alone, such as (seed, stage, step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def random_generator(*key) -> np.random.Generator:
    """numpy generator for one draw or sample: nothing to store for a resumed run, the same in any worker."""
    return np.random.default_rng(key_seed(*key))


def seed_torch(*key) -> None:
    """Makes the draws that follow a function of the key, and but for first weights of the process."""
    torch.manual_seed(key_seed(*key) + rank() * (key[-1] != "init"))


def world() -> int:
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 ... world() - 1. Process 0 alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum, or what `op` says, of x over the processes, in place. No gradient."""
    if world() > 1:
        dist.all_reduce(x, op)
    return x


def average_gradients(net: torch.nn.Module) -> None:
    """Averages the gradients over the processes; to be called between backward pass and update."""
    if world() > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = all_reduce(torch.cat([g.flatten() for g in grads])) / world()
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


# ------------------------------------------------------------------------------------------------------ files
def atomic_write(path: Path, write, keep: Path | None = None) -> None:
    """All or nothing: write(file) fills a temporary file, which then replaces `path`, kept as `keep`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps an OSError in a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); mend that and run it again") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj) -> None:
    atomic_write(path, lambda file: file.write((json.dumps(obj, indent=1) + "\n").encode()))


def read_json(path, keys: dict, mend: str) -> dict:
    """A JSON object that has these {key: type}. Raises UserError with `mend` for any other file."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        obj = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(obj, dict) and all(isinstance(obj.get(key), kind) for key, kind in keys.items()):
            return obj
    raise UserError(f"{path}: missing, or not what belongs there; {mend}")


def load_checkpoint(path, mend: str, parts: tuple = ()) -> dict:
    """A checkpoint with these state dicts, on the CPU; runs no code in it. Raises UserError with `mend`."""
    kinds = {"step": int, "config": dict, "classes": list} | dict.fromkeys(parts, dict)
    try:
        with zipfile.ZipFile(path) as archive:  # a compressed one could grow without bound
            assert not any(record.compress_type for record in archive.infolist()), "compressed"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in kinds.items():
            assert isinstance(state.get(key), kind), f"it has no {key}"
    except Exception as error:  # torch raises half a dozen types for what it refuses
        raise UserError(f"{path}: missing, or not a readable checkpoint ({error!s:.80}); {mend}") from None
    return state


def load_weights(module, state: dict, where) -> None:
    """load_state_dict of a network or optimiser. Raises UserError that names the file and one difference."""
    optimiser = isinstance(module, torch.optim.Optimizer)
    try:
        if optimiser:  # a fused one crashes the process where shapes differ
            parameters = [p for group in module.param_groups for p in group["params"]]
            for i, moments in state["state"].items():
                shapes = {moments[name].shape for name in ("exp_avg", "exp_avg_sq")}
                assert shapes == {parameters[i].shape}, f"shape of parameter {i}"
        module.load_state_dict(state)
    except Exception as error:  # whatever a foreign file makes torch trip over
        what, reason = "optimiser" * optimiser or "network", str(error).rpartition("\n")[2].strip()
        raise UserError(f"{where}: {what} of another architecture ({reason}); use its own config") from None


def weights_digest(state: dict) -> str:
    """Short SHA-256 of a state dict's names and values, whatever file they were stored in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def environment(device: torch.device, precision: str) -> dict:
    """What a result depends on beside the config: commit, versions, device, arithmetic."""
    git = ["sh", "-c", 'git -C "$0" describe --always --dirty --abbrev=10', HERE]  # where there is git
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads"
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "device": name,
            "commit": commit, "precision": precision, "python": sys.version.split()[0],
            "torch": str(torch.__version__), "numpy": np.__version__}  # fmt: skip


# ------------------------------------------------------------------------------------------------- run folder
FREE_KEYS = ("name", "output", "device", "precision", "workers", "inference_batch", "log_every", "save_every",
             "source.root", "target.root")  # fmt: skip
HANDLERS = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}  # before a run


def stage_config(cfg, sections: tuple) -> dict:
    """{key: value} of these sections ("" is the top level) but FREE_KEYS, which do not change a result."""
    free = FREE_KEYS if "selfens" in sections else (*FREE_KEYS, "target.labelled")  # stage 3 alone reads it
    return {k: v for k, v in cfg.flat.items() if k.rpartition(".")[0] in sections and k not in free}


def refuse_changes(then: dict, now: dict, where) -> None:
    """Raises UserError with what of `now` (config, digests) differs from what `where` was made with."""
    changed = [f"{k} ({then.get(k)!r} then, {v!r} now)" for k, v in sorted(now.items())
               if repr(then.get(k)) != repr(v)]  # not ==: the order of classes counts
    if changed:
        raise UserError(f"{where}: made with another config or other data: {', '.join(changed)}; put that "
                        "back, choose another 'name', or use --restart where it was made")


def lock_folder(folder: Path) -> None:
    """Keeps other processes, but a loader's, out of `folder` until this one ends. Raises UserError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_WRONLY | os.O_CREAT, 0o666)  # never closed
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: in use by another process; wait, or choose another 'name'") from None


class Run:
    """One stage's folder OUTPUT/NAME/STAGE: lock, config, log, TensorBoard events, sheets, checkpoints.

    sections: of the config, on which the result depends; data: {name: digest} of what it reads. Raises
    UserError for a folder in use, or with a run of another config or other data. `begin` is first to write.
    A run's state is its checkpoint alone: draws are a function of (seed, stage, step), learning rates of
    (step, steps), the log is cut back. So a run that continues ends with the same bits.
    """

    def __init__(self, cfg, stage: str, sections: tuple, data: dict, steps: int, restart: bool = False):
        self.cfg, self.stage, self.steps, self.signal, self.logged = cfg, stage, steps, 0, []
        self.folder, self.device = Path(cfg.output, cfg.name, stage), get_device(cfg)
        self.precision = get_precision(cfg, self.device)
        self.config, self.data = cfg.flat | {"precision": self.precision}, data | {"processes": world()}
        if rank() == 0:
            lock_folder(self.folder)
            if restart and self.folder.exists():
                aside = self.folder.rename(f"{self.folder}.{time.time_ns()}")
                print(f"--restart: the old {self.folder} is now {aside}")
        all_reduce(torch.zeros(1))  # the others look when process 0 has moved it
        self.path, self.previous, self.state = self.folder / "last.pt", self.folder / "previous.pt", None
        if self.path.exists() or self.previous.exists():  # a kill may have come between two renames
            path, mend = self.path if self.path.exists() else self.previous, "use previous.pt, or --restart"
            self.state = load_checkpoint(path, mend)
            watched = stage_config(cfg, sections) | {"precision": self.precision} | self.data
            refuse_changes(self.state["config"] | self.state.get("data", {}), watched, self.path)
        self.start = self.state["step"] if self.state else 0

    def finished(self) -> bool:
        """Whether the checkpoint is the last step's; says so."""
        if finished := self.state is not None and self.start >= self.steps:
            print(f"{self.stage}: {self.folder} is finished, at step {self.start}; nothing to do")
        return finished

    def begin(self) -> None:
        """Opens log and progress bar. From now on a signal to stop is kept until the step is done."""
        for number, handler in HANDLERS.items():
            if handler != signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self._keep_signal)
        self.bar = tqdm(total=self.steps, initial=self.start, desc=self.stage, disable=rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        if rank():
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        for left in self.folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        info, log = environment(self.device, self.precision), self.folder / "log.jsonl"
        atomic_write(self.folder / "config.yaml", lambda f: yaml.safe_dump(self.config, f, encoding="utf-8"))
        write_json(self.folder / f"run-{self.start:07d}.json", info)
        lines = log.read_text(errors="replace").splitlines(True) if log.exists() else []  # to be cut back
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.start]
        atomic_write(log, lambda file: file.write("".join(kept).encode()))
        self.log_file = open(log, "a")
        self.events = SummaryWriter(self.folder, purge_step=self.start + 1 if self.state else None)
        print(f"{self.folder}: from step {self.start} · {world()} x {info['device']} · {self.precision} · "
              f"torch {info['torch']} · commit {info['commit']}")

    def _keep_signal(self, number, _frame) -> None:
        if self.signal:  # a second one ends at once
            raise SystemExit(128 + number)
        self.signal = number
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def due(self, what: str, step: int) -> bool:
        """Whether "log", "sheet" or "save" is: each WHAT_every steps, at last, and to save by a signal."""
        if what == "save" and world() > 1:  # what one process has heard, all act upon after the same step
            self.signal = int(all_reduce(torch.tensor(self.signal), dist.ReduceOp.MAX))
        every = self.cfg.log_every if what == "log" else self.cfg.save_every
        return step == self.steps or step % every == 0 or (what == "save" and self.signal > 0)

    def log(self, step: int, terms: dict) -> None:
        """Writes terms, means over the processes, where due. Raises UserError for one that is not finite."""
        self.bar.update()
        due = self.due("log", step) or self.due("sheet", step)  # which measures more terms
        if not due and self.device.type == "cuda":  # a look at a term waits for the GPU
            return
        values = torch.tensor([float(v) for v in terms.values()], dtype=torch.float64)
        values = dict(zip(terms, (all_reduce(values) / world() if due else values).tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"{self.stage}: {name} is {value} at step {step}; lower the learning rate, "
                                "or use precision=float32. If last.pt has it, too, previous.pt may not")
        self.logged += [values] * due
        if due and rank() == 0:
            for name, value in values.items():
                self.events.add_scalar(f"{self.stage}/{name}", value, step)
            print(json.dumps({"step": step, **values}), file=self.log_file, flush=True)
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def warn(self, step: int, texts: list[str]) -> None:
        """Says what goes wrong, in the second half of the steps: before that, much is not yet learned."""
        for text in texts if rank() == 0 and 2 * step > self.steps else ():
            self.bar.write(f"warning: {self.stage}, step {step}: {text}", file=sys.stderr)

    def sheet(self, step: int, name: str, image: Image.Image) -> None:
        """Writes an image sheet to sheets/NAME-STEP.png and to TensorBoard."""
        if rank() == 0:
            atomic_write(self.folder / f"sheets/{name}-{step:07d}.png", lambda file: image.save(file, "PNG"))
            self.events.add_image(f"{self.stage}/{name}", np.asarray(image), step, dataformats="HWC")

    def load(self, parts: dict) -> None:
        """The parts, {name: network or optimiser}, get what the checkpoint, if any, has of them."""
        for name, part in parts.items() if self.state else ():
            load_weights(part, self.state.get(name), self.path)

    def save(self, step: int, parts: dict, **more) -> None:
        """Where due, writes last.pt, all or nothing, and keeps the one before. After a signal, ends."""
        if not self.due("save", step):
            return
        if rank() == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | more
            state |= {"step": step, "config": self.config, "data": self.data}
            atomic_write(self.path, lambda file: torch.save(state, file), self.previous)
        all_reduce(torch.zeros(1))  # the others go on, and may read it, when it is there
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Ends the process, with the conventional status, if a signal has come."""
        if self.signal:
            self.close()
            print(f"{self.stage}: stopped; the same command continues, without --restart", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Closes bar, log and events; signals do again what they did before."""
        self.bar.close()
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)
        if rank() == 0:
            self.log_file.close()
            self.events.close()
