"""What the four stages share: configuration, command line, device, seeding, run folder, checkpoint, log, sheets.

Nothing in this file knows the method. Whatever a user can get wrong ends in a `UserError`: one line that names the
key or the file and the mend, exit status 2, no traceback.
"""

import argparse
import difflib
import errno
import fcntl
import gc
import hashlib
import json
import os
import platform
import re
import reprlib
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend; its text is the one line that is shown."""


def one_line(text: str, limit: int = 2000) -> str:
    """A text as one printable line: what is not printable is escaped, and the middle of what is too long left out."""
    if len(text) > limit:  # the start names the key or the file, the end is the mend
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 20, 80, 80, 80


def shown(value) -> str:
    """repr(value) for an error message, cut short however long, deep or recursive the value is."""
    try:
        return one_line(_repr.repr(value), 400)
    except ValueError:  # Python does not write whole numbers of more than 4300 digits
        return f"a {type(value).__name__} of enormous numbers"


# ---------------------------------------------------------------------------------------------- configuration keys

# Bytes of a text and of a config file, characters of a name, values in one key: far beyond use, and harmless.
MAX_TEXT, MAX_FILE, MAX_NAME, MAX_LIST, MAX_INTS = 1024, 1_000_000, 200, 100_000, 64


def _check_text(value) -> None:
    """Raises ValueError for what is no text, or could be no file's path."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    raw = value.encode()  # half of a surrogate pair is no character: UnicodeEncodeError, which is a ValueError
    if len(raw) > MAX_TEXT or max(map(len, raw.split(b"/"))) > 255:
        raise ValueError(f"longer than {MAX_TEXT} bytes, or than 255 between two '/'")


def _check_plain(value, depth: int) -> int:
    """How many texts and whole numbers a value holds: one, or a list of them, or lists within `depth` lists.

    These are what JSON and YAML write alike. Raises ValueError for anything else. A list that stands in many places
    (YAML's anchors) is counted in each, because going through the value costs as much.
    """
    if isinstance(value, list) and depth:
        total = 0
        for v in value:
            total += _check_plain(v, depth - 1)
            if total > MAX_LIST:
                raise ValueError(f"more than {MAX_LIST} values")
        return max(1, total)
    if type(value) is not int or abs(value) >= 1 << 32:
        _check_text(value)
    return 1


@dataclass(frozen=True)
class Key:
    """One configuration key: default, kind, range and meaning. `null` says that `null` is a valid value."""

    default: object
    kind: str  # int | float | bool | str | name | choice | size | ints | texts | map
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    null: bool = False

    def range(self) -> str:
        """The valid values in words, as they stand in `cfg.yaml` and in error messages."""
        if self.kind == "choice":
            words = " | ".join(self.choices)
        elif self.kind == "bool":
            words = "true | false"
        elif self.kind in ("int", "float"):
            noun = {"int": "whole number", "float": "number"}[self.kind]
            high = {None: " or more", STEPS: " to 10^9"}.get(self.high, f" to {self.high or 0:.10g}")
            words = f"{noun}, {self.low:.10g}{high}"
        else:
            words = {
                "str": "text",
                "name": "letters, digits, '.', '_', '-'",
                "size": f"[height, width], each {self.low} to {self.high}",
                "ints": f"list of whole numbers, {self.low} to {self.high}",
                "texts": "list of texts, numbers in quotes",
                "map": "mapping of names to whole numbers, texts or lists",
            }[self.kind]
        return words + (" or null" if self.null else "")

    def parse(self, value):
        """Returns `value` in the key's own type; raises ValueError where it does not fit."""
        if value is None:
            if self.null:
                return None
            raise ValueError
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            raise ValueError
        if self.kind in ("int", "float"):
            # YAML 1.1 reads 1e-4 (no dot) as text; people write it all the same.
            number = value
            if self.kind == "float" and isinstance(value, str):
                with suppress(ValueError):
                    number = float(value)
            if isinstance(number, bool) or not isinstance(number, int if self.kind == "int" else (int, float)):
                raise ValueError
            if not self.low <= number <= (1e38 if self.high is None else self.high):  # 1e38: what float32 can hold
                raise ValueError
            return number if self.kind == "int" else float(number)
        if self.kind in ("size", "ints"):
            if not isinstance(value, (list, tuple)) or not value or (self.kind == "size" and len(value) != 2):
                raise ValueError
            if len(value) > MAX_INTS:
                raise ValueError(f"more than {MAX_INTS}")
            if any(type(v) is not int or not self.low <= v <= self.high for v in value):
                raise ValueError
            return list(value)
        if self.kind == "texts":
            if not isinstance(value, (list, tuple)):
                raise ValueError
            for v in value:
                _check_text(v)
            return list(value)
        if self.kind == "map":
            if not isinstance(value, dict) or not value:
                raise ValueError
            for name in value:
                _check_text(name)
            _check_plain([*value.values()], 3)
            return value
        _check_text(value)
        if self.kind == "choice" and value not in self.choices:
            raise ValueError
        if self.kind == "name" and not re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}", value):
            raise ValueError
        return value


SCHEDULES = ("poly", "linear", "constant")
SCHEDULE = "poly: (1 - step/steps)^0.9, linear: from half of the steps to 0, constant: steps may be raised later"
RARE = "draws source images by class, a class by exp((1 - its share) / rare): small is strong, 0 is off"
STEPS, SIDE = 10**9, 1 << 14  # highest number of steps, and of pixels along a side
METHODS = ("gan", "reinhard", "fda", "folder")
VARIANTS = ("source_only", "self_ensembling", "tgcf_da", "tgcf_da_se", "target_only")

# The default is the built-in job: streets, small enough for 2 CPU cores. Where the paper's own value is not known the
# choice is ours; configs/ holds other settings. cfg.yaml is this table written out (a test compares the two).
KEYS = {
    "name": Key("streets", "name", "run name; all results go to OUTPUT/NAME"),
    "seed": Key(0, "int", "seed of every random draw; equal seeds give equal runs", 0, 2**31 - 1),
    "output": Key("runs", "str", "folder that holds the run folders"),
    "device": Key("auto", "str", "auto (CUDA if there is one), cpu, cuda or cuda:N"),
    "precision": Key("auto", "choice", "arithmetic of the networks; auto is bfloat16 where the device has it",
                     choices=("auto", "float32", "bfloat16")),
    "compile": Key(False, "bool", "torch.compile of the networks: slower start, faster steps on a GPU"),
    "workers": Key(0, "int", "processes that read images ahead; 0 reads ahead in a thread of the training process", 0, 256),
    "cache": Key(None, "str", "folder that keeps resized images and labels between runs; null keeps them in memory only",
                 null=True),
    "log_every": Key(20, "int", "steps between two lines of the log", 1, STEPS),
    "sheet_every": Key(500, "int", "steps between two image sheets", 1, STEPS),
    "save_every": Key(500, "int", "steps between two checkpoints", 1, STEPS),
    "flip": Key(True, "bool", "mirror half of the training images left to right, labels with them"),
    "classes": Key("auto", "str", "class list; auto takes the one that source and target share"),
    "class_colours": Key(None, "map", "a class list of your own, {class: [R, G, B]}, in the order of the train ids", null=True),

    "source.dataset": Key("streets", "str", "labelled data set, a table in datasets.py, or folder"),
    "source.root": Key(None, "str", "its folder; streets needs none", null=True),
    "source.follow_links": Key(False, "bool", "also read files outside root to which links in it lead"),
    "source.size": Key([96, 160], "size", "images are resized to this, pixels", 8, SIDE),
    "source.images": Key(500, "int", "use the first N training images; for streets, how many there are", 1, 10**6, null=True),
    "source.exclude": Key(None, "texts", "names of samples to leave out, as python datasets.py CFG prints them", null=True),
    "source.files": Key(None, "map", "folder: {split: [images, labels]}, patterns below root, labels optional", null=True),
    "source.read": Key(None, "choice", "folder: what is a label's id: index (one channel), red, red16 (16 bit), rgb (colour)",
                       choices=("index", "red", "red16", "rgb"), null=True),
    "source.ids": Key(None, "map", "{class: ids, or [R, G, B]s} onto the class list; class 'ignore': of none", null=True),
    "target.dataset": Key("streets", "str", "unlabelled data set, a table in datasets.py, or folder"),
    "target.root": Key(None, "str", "its folder; streets needs none", null=True),
    "target.follow_links": Key(False, "bool", "also read files outside root to which links in it lead"),
    "target.size": Key([96, 160], "size", "images are resized to this, pixels", 8, SIDE),
    "target.images": Key(500, "int", "use the first N training images; for streets, how many there are", 1, 10**6, null=True),
    "target.exclude": Key(None, "texts", "names of samples to leave out, as python datasets.py CFG prints them", null=True),
    "target.files": Key(None, "map", "folder: {split: [images, labels]}, patterns below root, labels optional", null=True),
    "target.read": Key(None, "choice", "folder: what is a label's id: index (one channel), red, red16 (16 bit), rgb (colour)",
                       choices=("index", "red", "red16", "rgb"), null=True),
    "target.ids": Key(None, "map", "{class: ids, or [R, G, B]s} onto the class list; class 'ignore': of none", null=True),

    "fseg.checkpoint": Key(None, "str", "ready f_seg checkpoint (last.pt of a gan/fseg folder); null trains one", null=True),
    "fseg.pretrained": Key("none", "str", "VGG-16 trunk: none, imagenet or a file of torchvision's weights"),
    "fseg.width": Key(0.25, "float", "channels of FCN-8s relative to the published ones", 0.01, 4),
    "fseg.batch_norm": Key(True, "bool", "VGG-16 with batch norm (the published one has none)"),
    "fseg.dropout": Key(0.5, "float", "dropout probability after fc6 and fc7", 0, 0.99),
    "fseg.steps": Key(800, "int", "training steps of f_seg", 0, STEPS),
    "fseg.batch": Key(16, "int", "source images per step, over all processes", 1, 4096),
    "fseg.accumulate": Key(1, "int", "parts of a process's batch that pass one after the other, to save memory", 1, 4096),
    "fseg.lr": Key(1e-3, "float", "Adam learning rate", 0),
    "fseg.schedule": Key("poly", "choice", "of the learning rate; " + SCHEDULE, choices=SCHEDULES),
    "fseg.crop": Key([64, 96], "size", "random crop, pixels; null takes the whole image", 8, SIDE, null=True),
    "fseg.jitter": Key(1.0, "float", "strength of the photometric jitter; 0 is off", 0, 2),
    "fseg.sup_balance": Key(0.0, "float", "its loss weighs pixels by (share of their class)^-this; 0 is off", 0, 1),
    "fseg.rare": Key(0.0, "float", RARE, 0, 10),

    "gan.steps": Key(2200, "int", "training steps of G and D", 0, STEPS),
    "gan.warmup_steps": Key(300, "int", "of these, first steps that train G as an auto-encoder; 0 is the paper's method", 0,
                            STEPS),
    "gan.batch": Key(4, "int", "source and target images per step, over all processes", 1, 4096),
    "gan.accumulate": Key(1, "int", "parts of a process's batch that pass one after the other, to save memory", 1, 4096),
    "gan.crop": Key([64, 96], "size", "random crop, pixels; null takes the whole image", 8, SIDE, null=True),
    "gan.rare": Key(0.0, "float", "draws source images by class, as in fseg.rare; 0 is the paper's", 0, 10),
    "gan.content": Key(0.0, "float", "draws source images like the target in content, as in selfens.content; 0: paper's", 0, 1),
    "gan.lambda_sem": Key(3.0, "float", "weight of L_sem, a mean over pixels, beside L_GAN", 0),
    "gan.lambda_rec": Key(0.0, "float", "weight of L_rec, target images as their own guides unchanged; 0 is the paper's", 0),
    "gan.lambda_style": Key(0.0, "float", "weight of L_style, which ties an image to its guide's colours; 0 is the paper's", 0),
    "gan.lr_g": Key(2e-4, "float", "Adam learning rate of G", 0),
    "gan.warmup_lr": Key(None, "float", "Adam learning rate of G in the warm-up steps; null is lr_g", 0, null=True),
    "gan.lr_d": Key(1e-3, "float", "Adam learning rate of D", 0),
    "gan.schedule": Key("linear", "choice", "of both learning rates, as in fseg.schedule", choices=SCHEDULES),
    "gan.weight_decay": Key(1e-4, "float", "L2 weight decay of both optimisers", 0),
    "gan.width": Key(16, "int", "channels of G's first layer (MUNIT: 64)", 1, 4096),
    "gan.style_dim": Key(8, "int", "length of the style vector", 1, 4096),
    "gan.mlp_dim": Key(64, "int", "hidden units of the MLP from style to AdaIN parameters (MUNIT: 256)", 1, 16384),
    "gan.downsamples": Key(2, "int", "strided convolutions of the source encoder", 0, 6),
    "gan.res_blocks": Key(3, "int", "residual blocks in the encoder, and in the decoder (MUNIT: 4)", 1, 64),
    "gan.d_width": Key(32, "int", "channels of D's first layer (MUNIT: 64)", 1, 4096),
    "gan.d_layers": Key(3, "int", "strided convolutions per scale of D (MUNIT: 4)", 1, 8),
    "gan.d_scales": Key(3, "int", "image scales D looks at (MUNIT: 3)", 1, 6),
    "gan.spectral_norm": Key(True, "bool", "spectral normalisation of D's convolutions"),

    "augment.method": Key("gan", "choice", "translator: G, colour statistics, Fourier amplitudes, or ready images",
                          choices=METHODS),
    "augment.fda_beta": Key(0.01, "float", "fda: half side of the block of low frequencies, part of the shorter side", 0, 0.5),
    "augment.folder": Key(None, "str", "folder: holds NAME.png (or styleK/NAME.png, if several) of any other tool", null=True),
    "augment.styles_per_image": Key(3, "int", "generated images per source image, each with its own guide", 1, 1000),
    "augment.batch": Key(8, "int", "images generated at a time", 1, 4096),

    "selfens.variant": Key("tgcf_da_se", "choice", "row of the paper's table", choices=VARIANTS),
    "selfens.pretrained": Key("none", "str", "VGG-16 trunk: none, imagenet, file of torchvision's, or fseg: this run's f_seg"),
    "selfens.width": Key(0.25, "float", "channels of the DeepLab VGG-16 relative to the published ones", 0.01, 4),
    "selfens.batch_norm": Key(True, "bool", "VGG-16 with batch norm (the published one has none)"),
    "selfens.statistics": Key("seen", "choice", "batch norm's: of target images if the variant sees any, else labelled ones; "
                              "all it sees; target ones; or labelled ones, for target images, too",
                              choices=("seen", "all", "target", "labelled")),
    "selfens.aspp_rates": Key([1, 2, 4, 6], "ints", "dilation rates of ASPP, cells of 8 pixels (DeepLab: 6 12 18 24)", 1, 1024),
    "selfens.dropout": Key(0.3, "float", "dropout probability in ASPP, student and teacher", 0, 0.99),
    "selfens.steps": Key(600, "int", "student updates", 0, STEPS),
    "selfens.batch": Key(4, "int", "images per domain and step, over all processes", 1, 4096),
    "selfens.accumulate": Key(1, "int", "parts of a process's batch that pass one after the other, to save memory", 1, 4096),
    "selfens.crop": Key(None, "size", "random crop, pixels; null takes the whole image", 8, SIDE, null=True),
    "selfens.lr": Key(1e-3, "float", "Adam learning rate", 0),
    "selfens.schedule": Key("poly", "choice", "of the learning rate, as in fseg.schedule", choices=SCHEDULES),
    "selfens.weight_decay": Key(1e-4, "float", "L2 weight decay", 0),
    "selfens.ema_decay": Key(0.99, "float", "alpha of the teacher's moving average", 0, 1),
    "selfens.delta_con": Key(3.0, "float", "final weight of L_con, a mean over batch, classes and cells", 0),
    "selfens.ramp_up": Key(0.8, "float", "part of the steps in which delta_con rises from exp(-5) to all of its value", 0, 1),
    "selfens.con_confidence": Key(0.0, "float", "L_con leaves out cells where the teacher's probability is less than this; 0: "
                              "the paper's", 0, 1),
    "selfens.con_balance": Key(0.0, "float", "L_con weighs cells by (share of their class)^-this; 0: the paper's", 0, 1),
    "selfens.jitter": Key(0.0, "float", "photometric jitter on supervised images, as in fseg.jitter; 0 is the paper's", 0, 2),
    "selfens.sup_balance": Key(0.0, "float", "L_sup weighs pixels by (share of their class)^-this; 0: the paper's", 0, 1),
    "selfens.rare": Key(0.0, "float", "draws source images by class, as in fseg.rare; 0 is the paper's", 0, 10),
    "selfens.content": Key(0.0, "float", "draws source images like the target in content, as f_seg reads it, and no fewer "
                           "in effect than this part of all; 0: the paper's", 0, 1),
    "selfens.repaint": Key(False, "bool", "repaints in each step with a newly drawn guide in place of augment.py's images"),
    "selfens.noise_std": Key(0.05, "float", "Gaussian noise on target images, whose values span -1 to 1", 0, 2),
    "selfens.snapshot_every": Key(0, "int", "steps between teachers that are kept for evaluate.py --curve; 0: none", 0, STEPS),

    "eval.batch": Key(8, "int", "images predicted at a time", 1, 4096),
}
# Keys that cannot change what a run computes; a resumed run may change them. (Of the roots, the checkpoint keeps a digest
# of what lies there: data may move to a faster disk.)
FREE_KEYS = ("name", "output", "device", "workers", "cache", "log_every", "sheet_every", "save_every", "eval.batch",
             "source.root", "target.root", "source.follow_links", "target.follow_links", "selfens.snapshot_every")  # fmt: skip
# Keys that a resumed run may raise, where the steps so far did not depend on them. Every other key is refused.
GROWING_KEYS = {
    "fseg.steps": lambda c: c["fseg.schedule"] == "constant",
    "gan.steps": lambda c: c["gan.schedule"] == "constant",
    "selfens.steps": lambda c: c["selfens.schedule"] == "constant"
    and (c["selfens.ramp_up"] == 0 or c["selfens.variant"] not in ("self_ensembling", "tgcf_da_se")),
}


def describe(flat: dict) -> str:
    """The configuration as YAML, each key with its meaning and range on its own line."""
    lines, section = [], None
    for key, spec in KEYS.items():
        head, _, leaf = key.rpartition(".")
        if head != section and head:
            lines += ["", f"{head}:"]
        section = head
        value = flat[key]
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z./_][\w./_-]*", value) or yaml.safe_load(value) != value:
            # Quoted where YAML would read it as something else. JSON writes two halves where YAML knows one character.
            value = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))
        lines.append(f"{'  ' if head else ''}{leaf}: {value}".ljust(32) + f"  # {spec.help} ({spec.range()})")
    return "\n".join(lines) + "\n"


TYPED = ("null", "bool", "int", "float")  # YAML's scalars that are no text


def _value(loader: yaml.SafeLoader, node: yaml.Node, path: str, built: dict):
    """A YAML node as None, bool, int, float, str, list or dict. Raises UserError, with the key, for anything else.

    Nothing else is ever built, whatever its tag says. path: the dotted key; built: {id(node): value}, so that anchors of
    anchors of anchors cost no more than their text, and one that holds itself is noticed.
    """
    if id(node) in built:
        if built[id(node)] is node:
            raise UserError(f"'{path}' holds itself; remove the anchor")
        return built[id(node)]
    built[id(node)] = node
    here = f"'{path}'" if path else "the top level"
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and tag == "map":
        value = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{here} has a key that is a list or a mapping; keys are texts")
            key = _value(loader, key_node, path, built)
            dotted = f"{path}.{key}" if path else f"{key}"
            if key in value:
                raise UserError(f"key '{dotted}' stands twice")
            value[key] = _value(loader, value_node, dotted, built)
    elif isinstance(node, yaml.SequenceNode) and tag == "seq":
        value = [_value(loader, item, path, built) for item in node.value]
    elif not isinstance(node, yaml.ScalarNode) or tag not in (*TYPED, "str", "timestamp", "value", "merge"):
        raise UserError(f"{here} has the tag {node.tag}; write plain values without tags")
    elif tag in ("int", "float") and len(node.value) > 400:
        value = float("inf")  # every key refuses it by its name; taking so many digits as a number would take long
    elif tag in TYPED:
        try:
            value = getattr(loader, f"construct_yaml_{tag}")(node)
        except (ValueError, OverflowError, KeyError):
            raise UserError(f"{here} cannot be read as {tag}: {shown(node.value)}") from None
    else:
        value = node.value  # a date, '=' and '<<' are texts like any other here
    built[id(node)] = value
    return value


def _yaml(text: str, where: str, path: str = ""):
    """YAML text as plain values. Raises UserError that names `where` and the key, below `path`, or the line."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, path, {})
    except UserError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: brackets or sections too deep within each other") from None
    except Exception as error:  # beside YAMLError whatever a wrong escape or number makes Python itself raise
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _leaves(tree: dict, where: str, prefix: str = ""):
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if any(known.startswith(f"{dotted}.") for known in KEYS):
            if not isinstance(value, dict):
                raise UserError(f"{where}: '{dotted}' is a section: write its keys indented below it")
            yield from _leaves(value, where, f"{dotted}.")
        else:
            yield dotted, value


def _put(flat: dict, key: str, value, where: str):
    if key not in KEYS:
        near = difflib.get_close_matches(key[:80], KEYS, 1, 0.4)
        leaf = [known for known in KEYS if known.rpartition(".")[2] == key]
        hint = f"; did you mean '{(leaf or near)[0]}'?" if leaf or near else "; --help lists the keys"
        raise UserError(f"{where}: unknown key {shown(key)}{hint}")
    try:
        flat[key] = KEYS[key].parse(value)
    except ValueError as error:
        reason = f" ({error})" if error.args else ""
        raise UserError(f"{where}: '{key}' must be {KEYS[key].range()}, not {shown(value)}{reason}") from None


def load_config(path: str | None, overrides: list[str] = ()) -> SimpleNamespace:
    """Default values, then the YAML file, then `key=value` overrides.

    Returns nested namespaces (`cfg.gan.steps`); `cfg.flat` is the same as {dotted key: value}.
    Raises UserError, naming the file and the key, for whatever is not a known key with a value of its type and range.
    """
    flat = {key: spec.default for key, spec in KEYS.items()}
    if path is not None:
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_FILE + 1)
            text = raw.decode()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a config ({getattr(error, 'strerror', 0) or error})") from None
        if len(raw) > MAX_FILE:
            raise UserError(f"{path}: longer than {MAX_FILE} bytes, which no config is; give the YAML file")
        tree = _yaml(text, path)
        if not isinstance(tree, dict | None):
            raise UserError(f"{path}: a config is a list of 'key: value' lines, not {type(tree).__name__}")
        seen = set()
        for key, value in _leaves(tree or {}, path):
            _put(flat, key, value, path)
            if key in seen:  # once as 'gan.steps', and once as 'steps' below 'gan'
                raise UserError(f"{path}: key '{key}' stands twice")
            seen.add(key)
    for item in overrides:
        key, _, text = item.partition("=")
        _put(flat, key, _yaml(text, f"command line, {key}", key), "command line")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", flat["device"]):  # torch's own limit is 127
        raise UserError(f"{path or 'command line'}: 'device' must be auto, cpu, cuda or cuda:N, not {shown(flat['device'])}")
    return nested(flat)


def nested(flat: dict) -> SimpleNamespace:
    """{dotted key: value} as namespaces, with the dictionary itself in `.flat`."""
    cfg = SimpleNamespace(flat=flat)
    for key, value in flat.items():
        head, _, leaf = key.rpartition(".")
        if head and not hasattr(cfg, head):
            setattr(cfg, head, SimpleNamespace())
        setattr(getattr(cfg, head) if head else cfg, leaf, value)
    return cfg


# ------------------------------------------------------------------------------------------------ command line


def command_line(doc: str, sections: tuple, add_arguments=None, argv=None):
    """Parses `STAGE.py [CFG] [key=value ...]`.

    doc: the stage's manual; sections: the config sections it uses, whose keys `--help` explains ("" is the top level).
    Returns (cfg, args). Exits with status 0 for --help and raises UserError for anything wrong.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"command line: {message}; --help explains the arguments")

    manual = ["keys (in the file as nested YAML, on the command line as key=value):"]
    for key, spec in KEYS.items():
        if key.rpartition(".")[0] in sections:
            manual.append(f"  {key}  [{json.dumps(spec.default)}]\n      {spec.help} ({spec.range()})")
    parser = Parser(description=doc, epilog="\n".join(manual), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="CFG key=value", help="config file (default cfg.yaml), overrides")
    if add_arguments:
        add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    files = [item for item in args.items if "=" not in item or os.path.isfile(item)]
    if len(files) > 1:
        raise UserError(f"command line: one config file, not {len(files)} ({', '.join(files)}); overrides are key=value")
    path = files[0] if files else "cfg.yaml"
    cfg = load_config(path, [item for item in args.items if item not in files])
    join_processes(cfg)
    return cfg, args


def run_main(main) -> None:
    """Runs a stage: a UserError becomes one line on standard error and exit status 2; see Run on SIGTERM and SIGINT."""
    SIGNALS.install()
    # TensorBoard writes in a thread of its own; what stops it there is raised again, and told, here.
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else threading.__excepthook__(args)
    try:
        try:
            main()
        except Exception:
            SIGNALS.failing = True
            raise
    except UserError as error:
        line = str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        line = f"out of memory ({str(error).splitlines()[0] if str(error) else 'CPU'}); lower the stage's batch, crop or size"
    except RuntimeError as error:  # torch raises these in the midst of whatever the step is doing
        if world() > 1 and (isinstance(error, dist.DistError) or re.search("(?i)gloo|nccl|closed by peer", str(error))):
            line = "another process of this run has ended; what stopped it is told in its own lines"
        elif "DataLoader worker" not in str(error):
            raise
        else:
            line = f"a process that reads images died, out of memory perhaps ({str(error).splitlines()[0]}); lower 'workers'"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        line = f"{error.filename or 'a file'}: {error.strerror}; mend that and run the same command again"
    else:
        if dist.is_initialized():
            gc.collect()  # the networks' wrappers first: what is left of them may wait for the group for ever (torch 2.11)
            dist.destroy_process_group()
        return
    print(f"error: {one_line(line)}" if world() == 1 else f"error: process {rank()}: {one_line(line)}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------- device and randomness


def get_device(cfg) -> torch.device:
    """The device that `device` names, for this process. Raises UserError where it does not exist."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun, each process its own
    elif world() > 1 and name != "cpu":
        raise UserError(f"device={name}: under torchrun each process takes a GPU of its own; use device=cuda or auto")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: {torch.cuda.device_count()} CUDA devices are visible; use device=cpu or auto")
    return device


def get_precision(cfg, device: torch.device) -> str:
    """`precision`, with auto resolved to what the device computes fast: float32 or bfloat16."""
    if cfg.precision != "auto":
        return cfg.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def autocast(device: torch.device, precision: str):
    """Context in which the networks' matrix products run in `precision`; losses leave it by `.float()`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def key_seed(*key) -> int:
    """A 63-bit seed that is a function of its arguments alone, such as (seed, "gan", step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def random_generator(*key) -> np.random.Generator:
    """numpy generator for one draw or one sample: nothing to store for a resumed run, the same for any worker."""
    return np.random.default_rng(key_seed(*key))


def seed_torch(*key) -> None:
    """Seeds torch on all devices for one step: its dropout and noise are then a function of (seed, stage, step)."""
    torch.manual_seed(key_seed(*key))


def set_lr(optimiser, lr: float, schedule: str, step: int, steps: int) -> None:
    """Sets the learning rate of step 1 ... steps.

    poly: lr * (1 - (step - 1)/steps)^0.9 (DeepLab); linear: constant for the first half, then linearly to 0
    (pix2pixHD); constant: lr.
    """
    left = 1 - (step - 1) / steps
    factor = {"poly": left**0.9, "linear": min(1, 2 * left), "constant": 1.0}[schedule]
    for group in optimiser.param_groups:
        group["lr"] = lr * factor


# ----------------------------------------------------------------------------------------------- several processes
#
# Under torchrun each process takes its part of every batch; gradients, counts and statistics are summed over all of them,
# so that N processes do what one would. Without torchrun there is one, and none of this does anything.


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 ... world() - 1. Process 0 alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes(cfg) -> None:
    """Meets torchrun's other processes, if there are any: gloo for tensors on the CPU, nccl for those on GPUs."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    device = get_device(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over the processes, in place. No gradient."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def agree(*values: int) -> list[int]:
    """The largest of each value over the processes: what one has met, all act upon after the same step."""
    if world() == 1:
        return [*values]
    largest = torch.tensor([int(v) for v in values])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather(thing) -> list:
    """Every process's `thing` (whatever can be pickled), in their order; all wait for the slowest."""
    if world() == 1:
        return [thing]
    things = [None] * world()
    dist.all_gather_object(things, thing)
    return things


def parallel(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`net` in DistributedDataParallel: a backward pass averages its gradients over the processes. One process: `net`."""
    if world() == 1:
        return net
    with warnings.catch_warnings():  # newer versions have another name for the argument, older ones do not know it
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers (spectral norm's vectors, batch norm's synchronised statistics) are the same everywhere by themselves.
        return torch.nn.parallel.DistributedDataParallel(net, [device] if device.type == "cuda" else None,
                                                         broadcast_buffers=False, gradient_as_bucket_view=True)


def bare(net: torch.nn.Module) -> torch.nn.Module:
    """The network inside of `parallel`'s wrapper, if it has one."""
    return net.module if isinstance(net, torch.nn.parallel.DistributedDataParallel) else net


def whole_batch(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor like x (N, ...) for the batch of all processes, (world() N, ...), to draw random numbers in."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(world() * len(x), *x.shape[1:], dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def own_part(whole: torch.Tensor) -> torch.Tensor:
    """This process's images of the whole batch."""
    n = len(whole) // world()
    return whole[rank() * n : (rank() + 1) * n]


def silent(net: torch.nn.Module, yes: bool):
    """Context in which a backward pass keeps its gradients to itself, to be averaged with those of a later one."""
    return net.no_sync() if yes and net is not bare(net) else nullcontext()


# ------------------------------------------------------------------------------------------------------ run folder


def weights_digest(state: dict) -> str:
    """Short SHA-256 of a state dict's names and values, whatever file they were stored in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


@contextmanager
def writing(path):
    """Whatever stops a file from being written (a full disk, most often) becomes a UserError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save wraps an OSError in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the file system took only a part of it"
        raise UserError(f"{path}: cannot be written ({reason}); mend that and run the same command again") from None


def atomic_write(path: Path, write, keep: Path | None = None) -> None:
    """Calls write(file) on a temporary file beside `path`, flushes it to disk and renames it: all or nothing.

    keep: the name that the file which is there now gets; by default it is replaced.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, survives a power cut
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, obj) -> None:
    """Writes an object as indented JSON, all or nothing."""
    atomic_write(path, lambda file: file.write((json.dumps(obj, indent=1) + "\n").encode()))


def make_folder(path: Path) -> Path:
    """Makes a folder and its parents. Raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); set 'output' to a folder you may write") from None
    return path


class TornFile(UserError):
    """A checkpoint that is incomplete or whose checksums do not hold."""


def load_checkpoint(path, mend: str, parts: tuple = ()) -> dict:
    """Loads a checkpoint onto the CPU, tensors and plain values only (no code in it is run).

    mend: what to do where it cannot be used, for the error message; parts: the state dicts that it must hold.
    Raises UserError for a missing or foreign file, TornFile for a damaged one.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; {mend}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    try:
        # torch writes a zip archive with a CRC-32 of every record and reads it without looking at them. Nothing in it is
        # compressed: a small file cannot become a large one.
        with file, zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None and not any(record.compress_type for record in archive.infolist())
    except Exception:  # a parser of bytes that may be anything
        whole = False
    if not whole:
        raise TornFile(f"{path}: torn or damaged (a checksum does not hold, or it is no checkpoint at all); {mend}")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on a foreign file: the error is one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what it refuses
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); {mend}") from None
    if (not isinstance(state, dict) or type(state.get("step")) is not int or not 0 <= state["step"] <= STEPS
            or not isinstance(state.get("config"), dict) or not all(isinstance(key, str) for key in state["config"])):
        raise UserError(f"{path}: not a checkpoint of this project; {mend}")
    for part in parts:
        if not isinstance(state.get(part), dict):
            raise UserError(f"{path}: no '{part}' in it; {mend}")
    return state


def load_weights(module: torch.nn.Module, state, where) -> None:
    """load_state_dict that names the file and the first difference instead of printing all of them."""
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{where}: holds no such network's weights; use the file that the stage before wrote")
    own = module.state_dict()
    for key in sorted({*own} | {*state}):
        if key not in state or key not in own:
            raise UserError(f"{where}: made for another architecture: '{key}' is only in the "
                            f"{'model' if key in own else 'file'}; use the config it was trained with")
        if own[key].shape != state[key].shape:
            raise UserError(f"{where}: made for another architecture: '{key}' is {list(state[key].shape)} in the file, "
                            f"{list(own[key].shape)} in the model; use the config it was trained with")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # sparse tensors, or tensors without numbers
        raise UserError(f"{where}: not a network's weights ({' '.join(str(error).split())})") from None


def load_optimiser(optimiser: torch.optim.Optimizer, state, where) -> None:
    """load_state_dict that names the file where the state is not this optimiser's."""
    try:
        optimiser.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: made for another architecture: its optimiser has other parameters; use the config it was "
                        "trained with") from None


def versions() -> dict:
    """The libraries that a result's last bits depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": torchvision.__version__,
            "numpy": np.__version__, "pillow": PIL.__version__}


def environment(cfg, device, precision) -> dict:
    """What a result depends on beside the config: commit, versions, device, arithmetic."""

    def git(*words):
        try:
            return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        **versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": precision,
    }


def set_aside(folder: Path) -> None:
    """Renames a folder, if it exists, so that its stage can begin anew and nothing is lost."""
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"--restart: the old {folder} is now {aside}")


def stage_config(cfg, sections: tuple) -> dict:
    """{key: value} of the keys that can change what a stage with these config sections computes.

    All but `precision`, which stands for something only once `auto` is resolved, and `compile`: both may be another from
    stage to stage.
    """
    but = (*FREE_KEYS, "precision", "compile")
    return {k: v for k, v in cfg.flat.items() if k.rpartition(".")[0] in sections and k not in but}


def refuse_changes(then: dict, now: dict, where, stage: str | None = None) -> None:
    """Raises UserError with the keys of `now` whose values differ from `then`, the config that `where` was made with.

    stage: the stage that continues; it may raise the keys in GROWING_KEYS that are its own.
    """
    def grows(key, old, new):
        return (key.startswith(f"{stage}.") and key in GROWING_KEYS and GROWING_KEYS[key](now)
                and type(old) is type(new) is int and new > old)

    # A key that did not exist then is new since, and new keys' defaults leave things as they were.
    before = {k: then.get(k, KEYS[k].default if k in KEYS else None) for k in now}
    changed = [f"{k} ({shown(before[k])} then, {shown(v)} now)" for k, v in sorted(now.items())
               if before[k] != v and not grows(k, before[k], v)]
    if changed:
        raise UserError(f"{where}: made with another config: {', '.join(changed)}; put the values back, choose another "
                        "'name', or use --restart where it was made")


def refuse_data(then, now: dict, where) -> None:
    """Raises UserError where the data lists' digests (see datasets.Scenes) differ from those that `where` was made with."""
    for name, digest in now.items():
        if not isinstance(then, dict) or then.get(name) != digest:
            old = then.get(name) if isinstance(then, dict) else None
            raise UserError(f"{where}: made with other data: {name} was {one_line(str(old), 100)}, is {digest} now; put the "
                            "files back, choose another 'name', or use --restart where it was made")


def lock_folder(folder: Path) -> None:
    """Keeps other processes out of `folder` until this one ends, in whatever way. Raises UserError if one is in it.

    A POSIX lock, which dies with its process and which data-loader workers do not inherit (flock's they would, and
    would hold it after a crash of their parent). The lock file stands beside the folder, so that --restart may move it.
    """
    path = make_folder(folder.parent) / f".{folder.name}.lock"
    with writing(path):
        file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(100).strip()
        file.close()
        raise UserError(f"{folder}: in use by another process ({holder or 'unknown'}); wait for it, or choose another 'name'") \
            from None
    except OSError as error:
        raise UserError(f"{path}: cannot be locked ({error.strerror}); set 'output' to a file system that can") from None
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    _locks[path] = file  # an open file is what holds the lock


_locks = {}


class _Signals:
    """What SIGTERM and SIGINT do: in a training loop they are kept until the step is done, elsewhere they end the process.

    A process that is about to end with an error tells it first: torchrun sends SIGTERM to all as soon as one has died.
    """

    looping, failing, received = False, False, None

    def install(self) -> None:
        """Takes the two signals; a second one ends the process at once, with the conventional status."""
        self.looping, self.failing, self.received = False, False, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, _frame) -> None:
        if self.received or not (self.looping or self.failing):
            raise SystemExit(128 + number)
        self.received = number
        if not self.failing:
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())  # print is not re-entrant


SIGNALS = _Signals()


def _number(value) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


class Run:
    """One stage's folder: effective config, environment, JSON Lines log, TensorBoard events, sheets, checkpoints.

    cfg: the config; stage: name for seeds and messages; folder: OUTPUT/NAME/...; sections: config sections on which
    this stage's result depends ("" is the top level); data: {name: digest} of what it reads. A folder that holds a run
    of another config or other data is refused, and so is one that another process works in. Nothing but the lock is
    written before `progress`.

    The state of a run is its checkpoint alone: random draws are a function of (seed, stage, step), learning rates of
    (step, steps), and the log is cut back to the checkpoint. So a run that continues ends with the same bits.
    """

    def __init__(self, cfg, stage: str, folder: Path, sections: tuple, data: dict | None = None, restart: bool = False):
        self.cfg, self.stage, self.folder = cfg, stage, folder
        self.device = get_device(cfg)
        self.precision = get_precision(cfg, self.device)
        self.config, self.data = stage_config(cfg, sections) | {"precision": self.precision}, data or {}
        if stage != "augment":  # which does not compile
            self.config["compile"] = cfg.compile
        if rank() == 0:
            lock_folder(folder)
            if restart:
                set_aside(folder)
        else:
            dist.barrier()  # process 0 has looked at the folder, and left it as the others shall find it
        self.checkpoint, self.torn = folder / "last.pt", None
        self.state = self._load()
        if self.state:
            refuse_changes(self.state["config"], self.config, self.checkpoint, stage)
            refuse_data(self.state.get("data"), self.data, self.checkpoint)
            then, now = self.state.get("versions"), versions()
            changed = [f"{k} {one_line(str(then.get(k)), 50)} then, {v} now" for k, v in now.items() if then.get(k) != v] \
                if isinstance(then, dict) else []
            if changed:
                print(f"warning: {self.checkpoint}: made with other libraries ({', '.join(changed)}); the last bits may "
                      "differ from those of a run that never stopped", file=sys.stderr)
        self.start = self.saved = self.state["step"] if self.state else 0
        self._log = self.events = None
        if rank() == 0 and world() > 1:
            dist.barrier()

    def _load(self) -> dict | None:
        """The last checkpoint, or the one before it where the last is torn."""
        mend, before = f"use --restart to train {self.stage} anew", self.folder / "previous.pt"
        if not self.checkpoint.exists() and not before.exists():
            return None
        try:
            return load_checkpoint(self.checkpoint, mend)
        except UserError as error:
            if not before.exists() or not (isinstance(error, TornFile) or not self.checkpoint.exists()):
                raise
            state = load_checkpoint(before, mend)
            self.torn = self.checkpoint if self.checkpoint.exists() else None
            print(f"warning: {self.checkpoint}: {'torn or damaged' if self.torn else 'missing'}; continues from {before}, "
                  f"step {state['step']}", file=sys.stderr)
            return state

    def finished(self, steps: int) -> bool:
        """Whether the checkpoint is the last step's; says so."""
        if self.state is None or self.start < steps:
            return False
        print(f"{self.stage}: {self.folder} is finished, at step {self.start}; nothing to do")
        return True

    def _begin(self, redo: set | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and `--help` should not wait for it

        make_folder(self.folder)
        for left in self.folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        if self.torn:
            self.torn.replace(self.torn.with_suffix(".torn"))
        atomic_write(self.folder / "config.yaml", lambda file: file.write(describe(self.cfg.flat).encode()))
        here = environment(self.cfg, self.device, self.precision)
        write_json(self.folder / f"run-{self.start:07d}.json", here)
        self._log_path, kept = self.folder / "log.jsonl", {}
        # Lines after the checkpoint will be computed, and written, again.
        lines = self._log_path.read_text(encoding="utf-8", errors="replace") if self._log_path.exists() else ""
        for line in lines.splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # a line that was torn is one of those
                step = json.loads(line)["step"]
                if step <= self.start if redo is None else step not in redo:
                    kept[step] = line
        atomic_write(self._log_path, lambda file: file.write("".join(line + "\n" for line in kept.values()).encode()))
        with writing(self._log_path):
            self._log = open(self._log_path, "a", encoding="utf-8")
            self.events = SummaryWriter(self.folder, purge_step=self.start + 1 if self.state else None)
        processes = f"{world()} processes, each on " if world() > 1 else ""
        print(f"{self.stage}: {self.folder} · {processes}{here['device']} · {self.precision} · torch {here['torch']} · "
              f"commit {(here['commit'] or 'none')[:10]}{' + changes' if here['dirty'] else ''}"
              + (f" · continues at step {self.start}" if self.start else ""))

    def progress(self, batches, total: int, title: str, state=None, redo: set | None = None):
        """Iterates over (step, batch), step counted from 1, with a progress bar that estimates the time left.

        state: a function that returns what a checkpoint holds, by name; then one is saved every `save_every` steps, at
        the last, when SIGTERM or SIGINT arrives (the process then ends with status 128 + the signal's number), and when
        a batch cannot be read. redo: steps that will be computed again, whose lines leave the log; by default those
        after the checkpoint.
        """
        if rank() == 0:
            self._begin(redo)
        step, batches = self.start, iter(batches)
        # Without a terminal (a log file), one line per half minute is enough.
        self.bar = tqdm(total=total, desc=title, initial=step, mininterval=0.5 if sys.stderr.isatty() else 30,
                        dynamic_ncols=True, file=sys.stderr, disable=rank() > 0)

        def save():
            if state and step > self.saved:
                self.save(step, **state())

        SIGNALS.looping = True
        try:
            if state and total == 0 and self.state is None:
                self.save(0, **state())
            while True:
                batch = error = None
                try:
                    batch = next(batches, None)
                except UserError as unreadable:
                    error = unreadable
                number, failed = agree(SIGNALS.received or 0, error is not None)
                if number or failed:
                    save()
                if failed:
                    raise error or UserError("another process could not read its images; it tells which")
                if number:
                    self.close()
                    if rank() == 0:
                        print(f"{self.stage}: stopped after step {step}; the same command continues", file=sys.stderr)
                    raise SystemExit(128 + number)
                if batch is None:
                    break
                step += 1
                yield step, batch
                self.bar.update()
                if self.due("save", step, total):
                    save()
        except Exception:
            SIGNALS.failing = True  # before it is no longer looping: run_main has not seen the error yet
            raise
        finally:
            SIGNALS.looping = False
            self.bar.close()

    def due(self, what: str, step: int, last: int) -> bool:
        """Whether "log", "sheet" or "save" is due: every `cfg.WHAT_every` steps, and at the last one."""
        return step == last or step % getattr(self.cfg, f"{what}_every") == 0

    def check(self, step: int, last: int, terms: dict, state, batch: dict) -> None:
        """Raises UserError, before anything is updated, where a loss term (a scalar tensor) is not finite.

        What led to it is kept for inspection in non-finite.pt: state() and the batch. On a GPU only the steps that are
        logged are looked at, because looking makes the device wait.
        """
        if self.device.type != "cpu" and not self.due("log", step, last):
            return
        bad = {name: number for name, value in terms.items() if not np.isfinite(number := _number(value))}
        culprit = agree(rank() + 1 if bad else 0)[0] - 1
        if culprit < 0:
            return
        content, path = state(), self.folder / "non-finite.pt"
        if culprit != rank():
            raise UserError(f"{self.stage}: a loss of process {culprit} is not finite at step {step}")
        name = next(iter(bad))
        content |= {"step": step - 1, "config": self.config, "batch": batch, "term": name}
        atomic_write(path, lambda file: torch.save(content, file))
        late = "" if self.device.type == "cpu" else f", or up to {self.cfg.log_every} steps before (log_every=1 tells)"
        raise UserError(f"{self.stage}: {name} is {bad[name]} at step {step}{late}; the state before it and the batch are in "
                        f"{path}, the last checkpoint is of step {self.saved}: lower the learning rate, or use "
                        "precision=float32")

    def log(self, step: int, **scalars) -> None:
        """Writes scalars to log.jsonl, TensorBoard and the progress bar: numbers, and of tensors the mean over the processes.

        Raises UserError for one that is not finite.
        """
        values = {name: _number(value) for name, value in scalars.items()}
        tensors = [name for name, value in scalars.items() if isinstance(value, torch.Tensor)]
        means = all_sum(torch.tensor([values[name] for name in tensors], dtype=torch.float64)) / world()
        values |= dict(zip(tensors, means.tolist(), strict=True))
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(f"{self.stage}: {name} is {value} at step {step}; the last checkpoint is of step {self.saved}")
        if rank():
            return
        with writing(self._log_path):
            print(json.dumps({"step": step, **values}), file=self._log, flush=True)
        with writing(self.folder):
            for name, value in values.items():
                self.events.add_scalar(f"{self.stage}/{name}", value, step)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def sheet(self, step: int, name: str, image: Image.Image) -> None:
        """Writes an image sheet to sheets/NAME-STEP.png and to TensorBoard."""
        if rank():
            return
        path = make_folder(self.folder / "sheets") / f"{name}-{step:07d}.png"
        atomic_write(path, lambda file: image.save(file, "PNG"))
        with writing(self.folder):
            self.events.add_image(f"{self.stage}/{name}", np.asarray(image), step, dataformats="HWC")

    def snapshot(self, step: int, name: str, **state) -> None:
        """Writes `state` with the step and config to NAME-STEP.pt, which nothing here reads again."""
        if rank() == 0:
            state |= {"step": step, "config": self.config}
            atomic_write(self.folder / f"{name}-{step:07d}.pt", lambda file: torch.save(state, file))

    def save(self, step: int, **state) -> None:
        """Writes last.pt, all or nothing: `state` with the step, config, data and versions. The last one is previous.pt now.

        Raises UserError, and keeps both, where a network's state is not finite.
        """
        self.saved = step
        if rank():
            return
        for part, tensors in state.items():
            for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
                if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                    raise UserError(f"{self.stage}: {name} of {part} is not finite after step {step}; the last checkpoint "
                                    f"is from before it: lower the learning rate, or use precision=float32")
        state |= {"step": step, "config": self.config, "data": self.data, "versions": versions()}
        atomic_write(self.checkpoint, lambda file: torch.save(state, file), self.folder / "previous.pt")

    def close(self) -> None:
        """Flushes the log and the events."""
        if rank() == 0:
            with writing(self.folder):
                self._log.close()
                self.events.close()


# -------------------------------------------------------------------------------------------------------- overlap

THREADS = min(8, os.cpu_count() or 1)  # that read or write images: decoding, resizing and compressing leave Python's lock


def prefetch(items, function, ahead: int, threads: int = 1, start=None):
    """Yields function(item) for each of the items, in order, while threads compute up to `ahead` of the next ones.

    start: called first in every thread. An error that function raises comes at its item's own turn, after all before it.
    """
    queue, pool = deque(), ThreadPoolExecutor(threads, initializer=start)
    try:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def behind(limit: int):
    """Gives submit(function, *arguments), which returns at once while a thread computes; then it waits for the oldest call.

    At most `limit` calls are unfinished at a time, and none on leaving. What one of them raises is raised by a later
    submit, or on leaving.
    """
    queue, pool = deque(), ThreadPoolExecutor(THREADS)

    def submit(function, *arguments):
        while queue and (len(queue) >= limit or queue[0].done()):
            queue.popleft().result()
        queue.append(pool.submit(function, *arguments))

    try:
        yield submit
        while queue:
            queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------- sheets


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """x: (3, H, W) float in [-1, 1] -> (H, W, 3) uint8, rounded."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def heat(x: torch.Tensor) -> np.ndarray:
    """x: (H, W) float, 0 is black and 1 white by way of red and yellow -> (H, W, 3) uint8."""
    x = x.float().clamp(0, 1).cpu().numpy()[..., None]
    return (np.clip(np.concatenate([3 * x, 3 * x - 1, 3 * x - 2], -1), 0, 1) * 255).astype(np.uint8)


def make_sheet(columns: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """Rows of (h, w, 3) uint8 pictures of any sizes under column captions, each picture fitted to one cell size."""
    height, width = max(p.shape[0] for row in rows for p in row), max(p.shape[1] for row in rows for p in row)
    width, height = max(width, 120), round(height * max(width, 120) / width)
    sheet = Image.new("RGB", ((width + 4) * len(columns), (height + 4) * len(rows) + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for c, caption in enumerate(columns):
        draw.text((c * (width + 4) + 2, 2), caption, "black")
        for r, row in enumerate(rows):
            picture = Image.fromarray(row[c])
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.NEAREST)
            sheet.paste(picture, (c * (width + 4), r * (height + 4) + 16))
    return sheet
