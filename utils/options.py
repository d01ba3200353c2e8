"""From YAML files and a command line to one frozen Config; every fault reported at once."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils.config import GROUPS, Config, Limits
from utils.errors import Faults, UserError, did_you_mean

ALWAYS_DONE = {
    "lmdb": "patches always come from an LMDB store",
    "abx_pad_v": "V is padded wherever a kernel needs it, and the values are the same",
    "load_gpu_later": "evaluation always moves patches to the device chunk by chunk",
    "prefetch": "batches are always prepared ahead",
    "prefetch_test": "batches are always prepared ahead",
    "ddp_broad_buf": "buffers are averaged by SyncBN or kept per process; nothing is broadcast",
    "reduce_bn": "BatchNorm statistics are averaged over the processes after every epoch",
    "log": "checkpoints are always written and the best one is always tested",
    "amp_unscale": "the gradient scaler is used with fp16 only",
    "local_rank": "the environment that torchrun sets says which process this is",
}
"""Published options that ask for what this program does anyway: accepted, with a note in the log."""

REFUSED = {
    "epoch_start": "a run continues from its own checkpoint; remove the option",
    "lr_supi": "the schedule advances per epoch; remove the option",
    "da_act": "the published program never read it; remove it",
    "rrt_pool": "the published program never read it; remove it",
    "model_path": "the published program never read it; give --enc_init for encoder weights",
    "da_gated": "the published program never read it; choose --model=gabmil or e2e_<encoder>_gabmil",
    "model_ema": "it never worked; give --test_type=ema, both or both_ema, and the decay with --mm",
    "bin_metric": "two-class metrics use the softmax probability of class 1; remove the option",
    "load_gpu_later_train": "training bags move to the device as uint8; lower --p_batch_size to save memory",
    "same_psize_ratio": "it never took effect; remove it",
    "bootstrap_mode": "the test predictions are resampled; --num_bootstrap=0 turns it off",
    "wandb_watch": "gradient histograms are not logged; remove the option",
    "attn_type": "there is one kind of self-attention; remove it",
}
"""Published options that are dead, broken or not there: refused with what to use instead."""

HARMLESS_VALUES = {
    "epoch_start": ("0",),
    "same_psize_ratio": ("0", "0.0"),
    "bootstrap_mode": ("test",),
    "attn_type": ("sa",),
    "lr_supi": ("false",),
    "da_gated": ("false",),
    "model_ema": ("false",),
    "bin_metric": ("false",),
    "load_gpu_later_train": ("false",),
    "wandb_watch": ("false",),
}
"""Published defaults of refused options, which ask for what happens here: accepted, with a note in the log."""

REFUSED_VALUES = {
    ("loss", "asl"): "the published program never had it; give --loss=bce with --task=multilabel",
}
"""Published values of options that never worked: refused with what to use instead."""

PUBLISHED_VALUES = {
    ("script_mode", "no_train"): ("script_mode", "test"),
    ("script_mode", "only_train"): ("script_mode", "no_test"),
    ("bootstrap_mode", "none"): ("num_bootstrap", 0),
}
"""Published values with another name here: (option, value) -> ours."""

ALIASES = {
    "learning_rate": "lr",
    "scheduler": "lr_sche",
    "lr_scheduler": "lr_sche",
    "optimizer": "opt",
    "wd": "weight_decay",
    "epochs": "num_epoch",
    "num_epochs": "num_epoch",
    "patience": "patient",
    "batch": "batch_size",
    "workers": "num_workers",
    "mixed_precision": "amp",
    "fp16": "amp",
    "folds": "cv_fold",
    "num_classes": "n_classes",
    "class_names": "classes",
    "pretrained": "enc_pt",
    "output": "output_path",
    "output_dir": "output_path",
    "out_dir": "output_path",
    "data": "dataset_root",
    "data_path": "dataset_root",
    "data_dir": "dataset_root",
    "data_root": "dataset_root",
    "store": "dataset_root",
    "features": "dataset_root",
    "csv": "csv_path",
    "csv_file": "csv_path",
    "label_csv": "csv_path",
    "labels": "csv_path",
}
"""What other programs call an option -> its name here. They are not accepted: the error names ours."""

GPU_WORDS = ("gpu", "gpus", "gpu_id", "gpu_ids", "num_gpus", "n_gpus")

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One option: its group, type, default, help and valid values, read off the dataclass."""

    name: str
    group: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    limits: Limits


def _fields() -> dict[str, Field]:
    table = {}
    for group, cls in GROUPS.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint = hints[f.name]
            optional = isinstance(hint, types.UnionType)
            kind = next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint
            table[f.name] = Field(f.name, group, kind, optional, f.default, **f.metadata)
    return table


FIELDS = _fields()


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Reads the options of a run.

    Args:
        argv: the command line without the program's name, for example ``["-c", "a.yaml,b.yaml", "--lr=1e-4"]``.

    Returns:
        The configuration and notes that belong into the log.

    Raises:
        UserError: naming every unknown option, wrong value and missing file at once.
    """
    namespace, unknown = build_parser().parse_known_args(list(argv))
    faults = Faults("options")
    notes: list[str] = []
    values: dict[str, Any] = {}
    for path in (namespace.config or "").split(","):
        if path:
            layer = _read_yaml(Path(path), faults)
            values.update(_typed(layer, path, faults, notes))
    for word in unknown:
        _explain_unknown(word, faults)
    given = {k: v for k, v in vars(namespace).items() if k != "config"}
    values.update(_typed(given, "command line", faults, notes))
    faults.raise_if_any()
    return Config.from_flat(values), notes


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line without listing all options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}. 'main.py --help' has the options.")


def build_parser() -> argparse.ArgumentParser:
    """The parser behind ``--help``; values stay text here and are converted in one place."""
    parser = _Parser(
        prog="main.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Trains and tests a slide-level model. 'main.py check' (--processes=N) reads and checks what the "
        "same run would read, 'main.py bench' (--seconds=S) measures what limits it, 'main.py --list' has the models.",
    )
    parser.add_argument("-c", "--config", default=None, help="YAML files, comma separated; later ones override")
    for group, cls in GROUPS.items():
        section = parser.add_argument_group(group, (cls.__doc__ or "").strip())
        for f in (f for f in FIELDS.values() if f.group == group):
            text = f"{f.help} (default: {f.default})".replace("%", "%%")
            if f.kind is bool:
                section.add_argument(f"--{f.name}", nargs="?", const="true", metavar="BOOL", help=text)
                section.add_argument(f"--no_{f.name}", nargs="?", const="true", help=argparse.SUPPRESS)
            else:
                metavar = "|".join(f.choices) if f.choices else f.kind.__name__.upper()
                section.add_argument(f"--{f.name}", metavar=metavar, help=text)
    for name in (*ALWAYS_DONE, *REFUSED):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, nargs="?", const="true", help=argparse.SUPPRESS)
        parser.add_argument(f"--no_{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    return parser


def _read_yaml(path: Path, faults: Faults) -> dict[str, Any]:
    if not path.is_file():
        faults.add(f"-c {path}: there is no such file")
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        faults.add(f"-c {path}: cannot be read as YAML in UTF-8: {error}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        faults.add(f"-c {path}: expected 'name: value' lines, found a {type(content).__name__}")
        return {}
    return content


def _typed(layer: dict[str, Any], source: str, faults: Faults, notes: list[str]) -> dict[str, Any]:
    """Converts one layer of options; records unknown names and wrong values in ``faults``."""
    values: dict[str, Any] = {}
    for key, raw in ((str(name), value) for name, value in layer.items()):
        key, raw = PUBLISHED_VALUES.get((key, str(raw)), (key, raw))
        bare = key[3:] if key.startswith("no_") and key not in FIELDS else key
        if bare in ALWAYS_DONE or (bare == key and str(raw).lower() in HARMLESS_VALUES.get(bare, ())):
            why = ALWAYS_DONE.get(bare, f"{raw} is what happens here")
            notes.append(f"{source}: {key} is accepted and changes nothing: {why}.")
        elif bare in REFUSED:
            faults.add(f"{source}: {key}: {REFUSED[bare]}.")
        elif bare not in FIELDS or (bare != key and FIELDS[bare].kind is not bool):
            faults.add(f"{source}: there is no option {key!r}.{_option_hint(key)}")
        else:
            values.update(_convert(FIELDS[bare], raw, f"{source}: {key}", bare != key, faults))
    return values


def _convert(f: Field, raw: Any, where: str, negated: bool, faults: Faults) -> dict[str, Any]:
    if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null") and "none" not in f.choices):
        if f.optional:
            return {f.name: None}
        faults.add(f"{where}: a value is needed ({f.help})")
        return {}
    try:
        value = _cast(f.kind, raw)
    except ValueError:
        faults.add(f"{where}: {raw!r} is not {_expected(f.kind)} ({f.help})")
        return {}
    if (f.name, value) in REFUSED_VALUES:
        faults.add(f"{where}: {value!r}: {REFUSED_VALUES[f.name, value]}.")
        return {}
    if f.choices and value not in f.choices:
        faults.add(f"{where}: {value!r} is not one of {', '.join(f.choices)}.{did_you_mean(value, f.choices)}")
        return {}
    limit = f.limits.fault(value) if f.kind in (int, float) else None
    if limit is not None:
        faults.add(f"{where} is {value}, but {limit} ({f.help})")
        return {}
    return {f.name: not value if negated else value}


def _cast(kind: type, raw: Any) -> Any:
    """``raw`` as ``kind``; raises ValueError rather than lose information (2.5 is no int, 'x' no bool)."""
    if kind is bool:
        word = str(raw).lower()
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        raise ValueError
    if isinstance(raw, (dict, list)):
        raise ValueError
    if kind is str:
        return str(raw)
    if kind is int and str(raw).lstrip("+-").isdecimal():  # exact, however long
        return int(raw)
    number = float(raw)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(number)


def _expected(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _explain_unknown(word: str, faults: Faults) -> None:
    name = word.split("=")[0].lstrip("-")
    if word.startswith("-"):
        faults.add(f"command line: there is no option {word.split('=')[0]!r}.{_option_hint(name)}")
    else:
        faults.add(f"command line: {word!r} is no option; options start with --.")


def _option_hint(name: str) -> str:
    plain = name.lower().replace("-", "_")
    if plain in GPU_WORDS:
        return " `bash train_dist.sh 2 ...` trains on two GPUs, and CUDA_VISIBLE_DEVICES chooses which."
    return did_you_mean(plain, _known(), ALIASES)


def _known() -> list[str]:
    return [*FIELDS, *(f"no_{f.name}" for f in FIELDS.values() if f.kind is bool)]
