"""Thousands of generated and mutated configs: each is accepted, or refused in one line that names the key. Never a traceback.

Valid configs, configs with exactly one fault, and junk go through the real command line and through what every stage
does with its config before it trains. All draws are fixed, so a failure is the same on every machine.
"""

import contextlib
import io
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import REPO, make_cfg, save_image
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import datasets
from datasets import TABLES, Batches, class_list, get_table, has_labels, list_samples, train_id_table
from runtime import KEYS, UserError, command_line, describe, get_device, load_config, run_main, shown
from train_gan import check_depth

FUZZ = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
SECTIONS = {key.rpartition(".")[0] for key in KEYS} - {""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config file to be, and a tiny `folder` data set for either domain."""
    root = tmp_path_factory.mktemp("fuzz")
    for i in range(4):
        save_image(root / f"data/images/{i}.png", np.zeros((8, 8, 3)))
        save_image(root / f"data/labels/{i}_ids.png", np.full((8, 8), i % 3))
    return root


def own(root) -> dict:
    """The keys of both domains for that data set."""
    part = {"dataset": "folder", "root": str(root / "data"), "files": {"train": ["images/*.png", "labels/*_ids.png"]},
            "read": "index", "ids": {"road": 1, "car": [2], "ignore": 0}, "size": [8, 8]}  # fmt: skip
    flat = {f"{role}.{leaf}": value for role in ("source", "target") for leaf, value in part.items()}
    return flat | {"class_colours": {"road": [1, 2, 3], "car": [4, 5, 6]}, "fseg.crop": None, "gan.crop": None}


def prepare(cfg) -> None:
    """What the stages do before they train: device, class list, tables, samples, the batches' own checks."""
    get_device(cfg)
    name, _ = class_list(cfg)
    for role in ("source", "target"):
        table = get_table(cfg, role)
        if table.read:
            train_id_table(table, name)
        for split in ("train", "val"):
            list_samples(cfg, role, split, role == "source" or has_labels(cfg, role, split))
    source, target = (SimpleNamespace(role=role, size=tuple(getattr(cfg, role).size)) for role in ("source", "target"))
    source.pixels = np.array([[9 * source.size[0] * source.size[1] // 10, 1]])
    for stage in ("fseg", "gan", "selfens"):
        part = getattr(cfg, stage)
        Batches(cfg, stage, part.batch, part.crop, source=source, target=None if stage == "fseg" else target)


def outcome(path, content, *items) -> tuple[str | None, object]:
    """(the error line or None, the config or None where the command line refused it) of a config file and overrides."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    seen, err = [], io.StringIO()

    def main():
        seen.append(command_line("manual", ("", "gan"), None, [str(path), *items])[0])
        prepare(seen[0])

    with contextlib.redirect_stderr(err):
        try:
            run_main(main)
        except SystemExit as status:
            line = err.getvalue()
            assert status.code == 2
            assert line.startswith("error: ") and line.endswith("\n") and len(line.splitlines()) == 1, line
            assert line[:-1].isprintable() and len(line) < 2500, line
            return line, seen[0] if seen else None
    assert not err.getvalue()
    return None, seen[0]


# -------------------------------------------------------------------------------------------------------- strategies

ODD = st.text(st.characters(exclude_categories=()), max_size=8)  # control characters and lone surrogates, too
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-9, 9), st.floats(), ODD, st.sampled_from([
    10**400, -(10**4000) // 7, 2**63, 1e308, "x" * 5000, "\0", "~", "null", "on", "1e3", "0x1f", "1:30", "2020-01-01",
    "=", "<<", "!!int 3", "&a", "*a", "%", "@", "`", "- a", "? b", "a: b", "#", "", " ", "\n", "\u2028", "\U0001f600", "auto",
]))  # fmt: skip
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    ODD | st.integers() | st.sampled_from(sorted(SECTIONS)) | st.none(), inner, max_size=3), max_leaves=8)  # fmt: skip
NAMES = st.text("abcXYZ019._-", min_size=1, max_size=9).filter(lambda text: not text.startswith("."))
# Without NEL: PyYAML's dumper writes it as it is between quotes, where its loader reads a line's end, that is, a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x85"), min_size=1, max_size=30)
COLOUR = st.lists(st.integers(0, 255), min_size=3, max_size=3)
MAPS = {
    "files": st.dictionaries(st.sampled_from(["train", "val", "test"]),
                             st.sampled_from(["*.png", ["*.png", "l/*.png"]]), min_size=1),
    "ids": st.dictionaries(st.sampled_from(["road", "car", "sky", "ignore"]), st.one_of(
        st.integers(0, 300), st.lists(st.integers(0, 255), max_size=4), st.lists(COLOUR, max_size=2)), min_size=1),
    "class_colours": st.dictionaries(st.sampled_from(["road", "car", "sky"]), COLOUR, min_size=1),
}  # fmt: skip
WORDS = {"dataset": [*TABLES, "folder"], "device": ["auto", "cpu", "cuda", "cuda:3"], "pretrained": ["none", "imagenet"],
         "classes": ["auto", "streets", "cityscapes16"]}  # fmt: skip


def valid(key) -> st.SearchStrategy:
    """Values that the key's documented range holds."""
    spec, leaf = KEYS[key], key.rpartition(".")[2]
    high = spec.high if spec.high is None or spec.low is None else min(spec.high, 5000)
    values = {
        "int": lambda: st.integers(spec.low, high) if leaf == "images" else st.integers(spec.low, spec.high),
        "float": lambda: st.floats(spec.low, spec.high or 1e38), "bool": st.booleans,
        "str": lambda: st.sampled_from(WORDS[leaf]) if leaf in WORDS else TEXTS,
        "name": lambda: NAMES, "choice": lambda: st.sampled_from(spec.choices),
        "size": lambda: st.lists(st.integers(spec.low, 200) | st.just(spec.high), min_size=2, max_size=2),
        "ints": lambda: st.lists(st.integers(spec.low, spec.high), min_size=1, max_size=8),
        "texts": lambda: st.lists(TEXTS, max_size=4), "map": lambda: MAPS[leaf],
    }[spec.kind]()  # fmt: skip
    return values | st.none() if spec.null else values


def wrong(key) -> st.SearchStrategy:
    """Values that are none of the key's."""
    spec = KEYS[key]
    numbers, lists, maps = st.integers() | st.floats(), st.lists(st.none() | st.floats(), min_size=1), st.just({"a": 1})
    unwritable = st.sampled_from(["", "\0", "a\0b", "\ud800", "x" * 256, "x/" * 600])
    beyond = st.one_of(st.nothing() if spec.low is None else st.integers(max_value=int(spec.low) - 1),
                       st.nothing() if spec.high is None else st.integers(min_value=int(spec.high) + 1))  # fmt: skip
    texts_of_no_number = ODD.filter(lambda text: not re.search(r"\d", text))
    nan_and_co = st.sampled_from([float("nan"), float("inf"), 10**400, 1e39, "nan", "inf", "1e999", "0,1"])
    values = {
        "int": lambda: st.one_of(beyond, st.floats(), ODD, st.booleans(), lists, maps, st.just(10**4000)),
        "float": lambda: st.one_of(beyond, nan_and_co, st.booleans(), lists, maps, texts_of_no_number),
        "bool": lambda: st.one_of(numbers, ODD, lists, maps, st.sampled_from(["yes", "true", "null"])),
        "choice": lambda: st.one_of(numbers, ODD.filter(lambda text: text not in spec.choices), st.booleans(), lists, maps),
        "str": lambda: st.one_of(numbers, st.booleans(), lists, maps, unwritable),
        "name": lambda: st.one_of(numbers, lists, unwritable, st.sampled_from([
            ".", "..", ".a", "a/b", "a b", "é", "a\n", "x" * 201])),
        "size": lambda: st.one_of(numbers, ODD, lists, maps, st.lists(beyond, min_size=2, max_size=2), st.sampled_from([
            [], [64], [64] * 3, [64, True], [64, 64.0], ["64", 64], [[64, 64]]])),
        "ints": lambda: st.one_of(numbers, ODD, lists, maps, st.lists(beyond, min_size=1), st.just([]), st.just([1] * 65)),
        "texts": lambda: st.one_of(numbers, ODD, lists, maps, st.lists(numbers, min_size=1), st.lists(unwritable, min_size=1)),
        "map": lambda: st.one_of(numbers, ODD, lists, st.sampled_from([
            {}, {1: 2}, {None: 1}, {"a": None}, {"a": 1.5}, {"a": True}, {"a": {"b": 1}}, {"a": [[[1]]]}, {"a": "\ud800"},
            {"": 1}, {"\udfff": 1}, {"a": 2**40}, {"a": 10**4000}, {"a": [1, None]}, {"x" * 300: 1}, {True: [1, 2, 3]}])),
    }[spec.kind]()  # fmt: skip
    return values if spec.null else values | st.none()


BAD_PATTERNS = ["../*.png", "/*.png", "a/../*", "[a]*", "**", "***/*.png", "a**/*.png", "**a/*.png", "**/**", "images",
                "0.png", "*" * 40, "**/" * 40 + "*", "*/", "./*", "a//*"]  # fmt: skip
SEMANTIC = {  # values of the right kind that fit nothing; `own` is the config around them
    "source.dataset": TEXTS.filter(lambda text: text not in TABLES and text != "folder"),
    "target.root": st.sampled_from(["nowhere", "/etc/passwd", "~", "a\nb", "x" * 255]) | st.none(),
    "source.files": st.one_of(
        st.dictionaries(TEXTS.filter(lambda text: text not in ("train", "val", "test")), st.just("*.png"), min_size=1),
        st.fixed_dictionaries({"train": st.sampled_from([
            3, [], [1, 2], ["*", "*", "*"], ["*", "?"], ["a/*/b*", "*"], ["**/*", "*/*"], [["*"]], ["*.png", "*"] * 9, "*.png",
            *([p, p] for p in BAD_PATTERNS)])})),
    "target.ids": st.sampled_from([
        {"road": 256}, {"road": -1}, {"road": "1"}, {"road": [1, 2], "car": 2}, {"way": 1}, {"road": [[1, 2, 3]]},
        {"ignore": 3}, {"road": []}, {"x\n\x1b": 1}, {"road": [1] * 9_000 + [-1]}]),
    "class_colours": st.sampled_from([
        {"road": 1}, {"road": [1, 2]}, {"road": [1, 2, 256]}, {"road": [-1, 2, 3]}, {"ignore": [1, 2, 3]}, {"a": "b"},
        {"a": [[1, 2, 3]]}, {f"c{i}": [1, 2, 3] for i in range(256)}]),
    "target.exclude": st.lists(TEXTS.filter(lambda text: text not in "0123"), min_size=1),
    "classes": TEXTS.filter(lambda text: text not in ("auto", "own")),
    "fseg.crop": st.lists(st.integers(9, 1 << 14), min_size=2, max_size=2), "gan.crop": st.just([8, 9]),
    "device": st.sampled_from(["gpu", "cuda:", "cuda:-1", "cuda:01", "cuda:100", "cuda:\u0663", "cuda:9\n", "CPU", "mps"]),
}  # fmt: skip


def write(flat: dict, nest, flow=None) -> str:
    """{dotted key: value} as YAML; nest(section) decides between a section and dotted keys."""
    tree = {}
    for key, value in flat.items():
        head, _, leaf = key.rpartition(".")
        if head and nest(head):
            tree.setdefault(head, {})[leaf] = value
        else:
            tree[key] = value
    return yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=bool(flow))


@st.composite
def good(draw, root):
    """A flat config of valid values: a few keys on top of streets or of the tiny data set."""
    flat = own(root) if draw(st.booleans()) else {}
    for key in draw(st.lists(st.sampled_from(list(KEYS)), max_size=9, unique=True)):
        flat[key] = draw(valid(key))
    return flat


def draw_yaml(data, flat) -> str:
    dotted = data.draw(st.sets(st.sampled_from(sorted(SECTIONS)), max_size=2))
    return write(flat, lambda head: head not in dotted, data.draw(st.sampled_from([None, False, True])))


# ------------------------------------------------------------------------------------------------------------- tests


def test_valid_configs_are_accepted(place):
    """600: every key within its documented range loads; what does not fit together is told in one line. All keys occur."""
    seen, whole = set(), [0]

    @settings(max_examples=600, **FUZZ)
    @given(st.data())
    def check(data):
        flat = data.draw(good(place))
        line, cfg = outcome(place / "c.yaml", draw_yaml(data, flat))
        assert cfg is not None, line
        seen.update(flat)
        whole[0] += line is None
        assert all(cfg.flat[key] == value for key, value in flat.items())

    check()
    assert seen == set(KEYS) and whole[0] > 150


def test_one_fault_is_named(place):
    """15 for each key, 1,100 in all: one wrong value among valid ones, in the file or on the command line, is named."""
    @settings(max_examples=15, **FUZZ)
    @given(st.data())
    def check(key, data):
        flat = data.draw(good(place))
        flat.pop(key, None)
        fault, name = data.draw(wrong(key)), str(place / "c.yaml")
        if data.draw(st.booleans()):
            line, cfg = outcome(place / "c.yaml", draw_yaml(data, flat | {key: fault}))
        else:
            text = yaml.safe_dump(fault, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
            line, cfg = outcome(place / "c.yaml", draw_yaml(data, flat), f"{key}={text}")
            name = "command line"
        assert line and cfg is None, f"{key}={fault!r} was accepted"
        assert f"'{key}" in line and name in line, line

    for key in KEYS:
        check(key)
    assert 15 * len(KEYS) > 1000


@pytest.mark.parametrize("key", SEMANTIC)
def test_values_that_fit_nothing_are_named(place, key):
    """300 in all: the right kind of value with the wrong content is found before training, under its key."""
    @settings(max_examples=40, **FUZZ)
    @given(SEMANTIC[key])
    def check(value):
        line, _ = outcome(place / "c.yaml", write(own(place) | {key: value}, lambda head: True))
        assert line and key in line, (value, line)

    check()


def test_unknown_and_missing_keys_are_named(place):
    """300: a key that does not exist, among valid ones, at the top, in a section, or for a section."""
    @settings(max_examples=300, **FUZZ)
    @given(st.data())
    def check(data):
        flat = data.draw(good(place))
        name = data.draw(ODD.filter(bool) | st.sampled_from(["stepz", "steps", "Gan", "gan.", ".gan", "flat", "<<"]))
        head = data.draw(st.sampled_from(["", *sorted(SECTIONS)]))
        key = f"{head}.{name}" if head else name
        if key in KEYS:
            return
        flat[key] = data.draw(JUNK) if name not in SECTIONS else 3
        line, cfg = outcome(place / "c.yaml", write(flat, lambda at: True))
        assert line and cfg is None
        first = shown(name.partition(".")[0])[1:-1]  # where the name itself has a dot, the file has a section
        assert shown(key)[1:-1] in line or (key.rpartition(".")[0] not in SECTIONS and first in line), line

    check()


def test_junk_is_refused_in_one_line(place):
    """700: anything at all under known and unknown keys, or in place of the whole config."""
    keys = st.sampled_from([*KEYS, *SECTIONS]) | ODD | st.integers() | st.none() | st.booleans()
    refused = [0]

    @settings(max_examples=700, **FUZZ)
    @given(st.dictionaries(keys, JUNK, min_size=1, max_size=5) | JUNK)
    def check(tree):
        line, cfg = outcome(place / "c.yaml", yaml.safe_dump(tree))
        if cfg is None:
            refused[0] += 1
            names = [str(key) for key in tree] if isinstance(tree, dict) else []
            nested = [str(key) for value in tree.values() if isinstance(value, dict) for key in value] if names else []
            parts = [shown(name)[1:-1][:30] for name in (*names, *nested)]
            assert "c.yaml" in line and (not names or any(part in line for part in parts)), line

    check()
    assert refused[0] > 500


def test_mutated_files_are_refused_in_one_line(place):
    """500: bytes, characters and lines of the shipped configs changed, dropped, doubled or moved."""
    texts = [path.read_text() for path in (REPO / "cfg.yaml", *sorted((REPO / "configs").glob("*.yaml")))]
    texts += [re.sub(r" +#.*", "", text) for text in texts]  # or most of what changes is a comment
    pieces = [*":{}[]|>%@`'\"\t\n -.~\0\x85\u2028\ud800é", "&a ", "*a", "- ", "? ", ", ", "---\n", "...\n", "<<: ", "9" * 30,
              "1e", "0x", "!!python/object/apply:os.system [x]"]  # fmt: skip
    counts = {"refused": 0, "accepted": 0, "key": 0}
    for seed in range(500):
        rng = random.Random(seed)
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            lines, how = text.split("\n"), rng.randrange(8)
            i, at = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
            if how == 0:
                del lines[i]
            elif how == 1:
                lines.insert(rng.randrange(len(lines)), lines[i])
            elif how == 2:
                lines[i] = " " * rng.randrange(5) + lines[i].strip()
            elif how == 3:  # another line's value
                lines[i] = lines[i].partition(":")[0] + ":" + rng.choice(lines).partition(":")[2]
            elif how == 4:
                lines[i] = lines[i].partition(":")[0] + ": " + "".join(rng.choices(pieces, k=rng.randint(0, 3)))
            text = "\n".join(lines)
            if how == 5:
                text = text[:at] + rng.choice(pieces) + text[at:]
            elif how == 6:
                text = text[:at] + text[at + rng.randint(1, 3) :]
            elif how == 7 and rng.random() < 0.3:
                text = text[:at]
        content = text.encode(errors="surrogatepass")
        if rng.random() < 0.1:
            at = rng.randrange(len(content))
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        line, cfg = outcome(place / "m.yaml", content)
        counts["accepted" if cfg else "refused"] += 1
        if line and cfg is None:
            assert "m.yaml" in line, (seed, line)
            syntax = re.search(r"line \d+, column|position|be read as a config|too deep|config is a list|top level", line)
            assert syntax or "unknown key" in line or any(key in line for key in (*KEYS, *SECTIONS)), (seed, line)
            counts["key"] += not syntax
    assert counts["refused"] > 200 and counts["accepted"] > 50 and counts["key"] > 80, counts


def test_depth_is_checked_for_any_sizes(place):
    """12: whatever layers and sizes G and D are given, the networks fit the image or the keys are named."""
    keys = ("gan.downsamples", "gan.d_layers", "gan.d_scales")
    sizes = st.lists(st.integers(8, 40), min_size=2, max_size=2)

    @settings(max_examples=12, **FUZZ)
    @given(st.tuples(*(st.integers(KEYS[key].low, KEYS[key].high) for key in keys)), sizes, sizes, st.none() | sizes)
    @example((3, 1, 1), [8, 8], [8, 8], None)  # one pixel is left, which instance norm does not take
    def check(values, source, target, crop):
        few = {"gan.width": 1, "gan.res_blocks": 1, "gan.d_width": 1, "gan.mlp_dim": 1, "gan.style_dim": 1}
        flat = few | dict(zip(keys, values, strict=True)) | {"source.size": source, "target.size": target, "gan.crop": crop}
        try:
            check_depth(make_cfg(**{key.replace(".", "__"): value for key, value in flat.items()}))
        except UserError as error:
            assert "gan." in str(error) and "\n" not in str(error)

    check()


def test_the_written_config_loads_back(place):
    """100: config.yaml in a run folder is the config that was given, whatever texts are in it."""
    @settings(max_examples=100, **FUZZ)
    @given(good(place))
    def check(flat):
        cfg = {key: spec.default for key, spec in KEYS.items()} | flat
        (place / "w.yaml").write_text(describe(cfg), encoding="utf-8")
        assert load_config(str(place / "w.yaml")).flat == {key: KEYS[key].parse(value) for key, value in cfg.items()}

    check()


def test_the_tiny_data_set_itself_is_read(place):
    """Or every config above would be refused for another reason than its fault."""
    cfg = make_cfg(**{key.replace(".", "__"): value for key, value in own(place).items()})
    assert len(datasets.Scenes(cfg, "source", "train", labels=True)) == 3
    prepare(cfg)
    assert all(spec.high is not None for spec in KEYS.values() if spec.kind in ("int", "size", "ints"))
