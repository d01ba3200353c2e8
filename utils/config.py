"""The options of a run: five frozen groups, built once from YAML files and the command line.

Every option is a field with its help text; ``--name=value`` on the command line and ``name: value`` in a YAML file
set it, later YAML files override earlier ones and the command line overrides all. A boolean ``name`` is set by
``--name`` and cleared by ``--no_name`` (in YAML ``name: true`` or ``no_name: true``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The numbers that an option takes: from ``least`` or ``above`` something to ``most`` or ``below`` something."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def fault(self, value: float) -> str | None:
        """What a value must be that is not so; None where it is."""
        if value < self.least:
            return f"must be at least {self.least:g}"
        if value <= self.above:
            return f"must be above {self.above:g}"
        if value > self.most:
            return f"must be at most {self.most:g}"
        return f"must be below {self.below:g}" if value >= self.below else None


def option(default: Any, text: str, choices: tuple[str, ...] = (), **limits: float) -> Any:
    """A dataclass field that carries its help text and its valid values: ``choices``, or the ``Limits`` of a number."""
    return field(default=default, metadata={"help": text, "choices": choices, "limits": Limits(**limits)})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: stores or features, labels, splits, bags."""

    dataset_root: str | None = option(
        None,
        "patch store (LMDB file or folder of shards) of the high magnification; features: folder with pt_files/ or "
        "h5_files/",
    )
    dataset_sub_root: str | None = option(
        None, "store or feature folder of the low magnification, for multi-scale bags"
    )
    dataset_test_root: str | None = option(
        None,
        "separate high-magnification store for validation and test; default: dataset_root, resized on the device",
    )
    stage_to: str | None = option(
        None,
        "folder on a local disk to which the stores or features are copied before training, once per machine; a copy "
        "that is there is used again, and stays",
    )
    csv_path: str | None = option(None, "label csv, or folder of fold_<k>.csv")
    datasets: str = option("panda", "task key: panda, brca, nsclc, call, bio*, surv_*, or any name of your own")
    task: str = option(
        "auto",
        "kind of label; auto: survival for surv_*, else classification. regression: numbers in the label column; "
        "multilabel: one 0/1 column per name in classes",
        ("auto", "classification", "survival", "regression", "multilabel"),
    )
    classes: str | None = option(None, "class names in order, comma separated, for a data set of your own")
    missing: str = option("error", "what to do when a labelled slide is not in the store", ("error", "drop"))
    val_ratio: float | None = option(
        None,
        "share of the training part taken as validation (csv without a split column: share taken as test); "
        "0: validation is the test set; default: the csv's val rows, else the test set",
    )
    bag_level: str = option(
        "auto",
        "one bag per slide or per patient; auto: slide, or case for survival",
        ("auto", "slide", "case"),
    )
    surv_bins: str = option(
        "train",
        "survival bins: cut on the training rows of each fold, or the published way (a Label column as it is, else "
        "quartiles of the whole table)",
        ("train", "published"),
    )
    fold_start: int = option(0, "first fold to run", least=0)
    cv_fold: int = option(5, "folds; 1 for a single run on the csv's own split", least=1)
    val2test: bool = option(False, "append validation rows to test; validation then equals test")
    random_fold: bool = option(False, "run cv_fold times on one csv with seed + 100 x fold")
    random_seed: bool = option(False, "seed + 100 x fold in each fold")
    image_input: bool = option(False, "patches go in (end to end); implied by a model name e2e_<encoder>_<mil>")
    img_size: int | None = option(
        None, "size in px that the training stores must hold; default: what they hold", least=1
    )
    crop_size: int = option(224, "size in px that the encoder sees", least=1)
    channel_order: str = option("rgb", "bgr for weights trained with the published code", ("rgb", "bgr"))
    mul_scale_input: bool = option(False, "training bags from two magnifications")
    mul_scale_ratio: float = option(2.0, "low-magnification share of a bag is 1 / ratio", least=1)
    same_psize: int = option(0, "patches (or features) per training bag; 0: all", least=0)
    max_patch_train: int | None = option(
        None, "upper limit of the patches per training bag, besides same_psize", least=1
    )
    sel_type: str = option(
        "random",
        "how a training bag's patches are chosen; ema: the EMA model looks at all of them and each attention head "
        "votes for its favourites",
        ("random", "ema"),
    )
    num_group_1d: int | None = option(
        None, "take at least one patch from each of n equal intervals of the bag, then random ones", least=1
    )
    num_group_2d: int | None = option(
        None, "the same with the cells of an n x n grid over the slide (needs coordinates)", least=1
    )
    same_psize_pad_type: str = option(
        "zero",
        "features: what becomes of bags shorter than same_psize; random: random duplicates fill them up; zero, none: "
        "they stay short, and what fills up a batch is masked",
        ("zero", "random", "none"),
    )
    patch_shuffle: bool = option(
        False, "features: another random order of the instances every epoch also where all are taken"
    )
    persistence: bool = option(
        False,
        "features: keep all of them in RAM (page-locked with pin_memory) and hand them on without reading processes; "
        "default: memory-mapped files",
    )
    h5_path: str | None = option(
        None,
        "folder of <slide>.h5 with the coords of the patches, for heads that use positions; default: those in the "
        "store, in the feature files or in h5_files/ and patches/ beside them",
    )
    h5_sub_path: str | None = option(None, "the same for the low magnification")
    pad_enc_bs: bool = option(False, "extend short training bags to same_psize with random duplicates")
    all_patch_train: bool = option(False, "the duplicates of pad_enc_bs take part in the MIL head too")
    img_transform: str = option("none", "training augmentation", ("none", "weak", "weak_strong", "strong", "strong_v2"))
    crop_scale: float = option(0.08, "lower bound of the random resized crop's area, as a share", above=0, most=1)
    img_trans_chunk: int = option(
        0,
        "0: every patch draws its own crop; n: n groups per batch share one crop and shift, as the published code did",
        least=0,
    )
    num_workers: int = option(
        6, "reading processes for training; features in mapped .pt files: reading threads", least=0
    )
    num_workers_test: int | None = option(None, "the same for evaluation; default: num_workers", least=0)
    prefetch_factor: int = option(2, "batches that each reading process or thread keeps ready", least=1)
    jpeg_decoder: str = option(
        "auto",
        "who decodes patches; auto: the GPU (nvJPEG) where few processes or cores could, else the reading processes",
        ("auto", "cpu", "gpu"),
    )
    pin_memory: bool = option(
        True, "page-locked host memory, from which a GPU copies beside its work; --no_pin_memory: pageable memory"
    )

    @property
    def test_workers(self) -> int:
        """Reading processes or threads for evaluation."""
        return self.num_workers if self.num_workers_test is None else self.num_workers_test


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: encoder, MIL head, and their options."""

    model: str = option("e2e_r18_abmilx", "e2e_<encoder>_<mil> for pixels, <mil> for features; --list prints the names")
    n_classes: int | None = option(None, "outputs; default: the number of classes, or 4 survival bins", least=1)
    input_dim: int | None = option(None, "width of a feature; default: the encoder's or the feature files'", least=1)
    inner_dim: int = option(512, "hidden width of the MIL head", least=1)
    act: str = option("relu", "activation after the input projection", ("relu", "gelu", "none"))
    dropout: float = option(0.25, "dropout after the input projection", least=0, most=1)
    mil_norm: str = option("none", "normalisation at the MIL input", ("bn", "ln", "none"))
    mil_bias: bool = option(True, "biases in the linear layers of the MIL head")
    n_heads: int = option(8, "attention heads", least=1)
    n_layers: int = option(2, "transformer layers", least=1)
    pool: str = option("cls_token", "transformer pooling", ("cls_token", "mean", "attn"))
    pos: str = option("none", "position code of transformer heads", ("ppeg", "sincos", "none"))
    attn_dropout: float = option(0.0, "dropout on attention weights", least=0, most=1)
    ffn: bool = option(False, "feed-forward block (after the aggregation in ABMILX)")
    ffn_ratio: float = option(4.0, "hidden width of the feed-forward block in units of its input", above=0)
    ffn_dp: float = option(0.0, "dropout in the feed-forward block", least=0, most=1)
    sdpa_type: str = option(
        "torch",
        "attention kernel; torch picks the best available",
        ("torch", "flash", "math", "memo_effi", "torch_math"),
    )
    abx_attn_plus: bool = option(True, "ABMILX: attention plus (A+); --no_abx_attn_plus leaves multi-head ABMIL")
    abx_D: float | None = option(
        None, "ABMILX: hidden width of the score MLP; above 10 absolute, else a divisor", above=0
    )
    abx_attn_bias: bool = option(False, "ABMILX: biases in the score MLP")
    abx_attn_plus_embed_new: bool = option(False, "ABMILX: full-width score MLP with one score per head")
    abx_alpha_init: str = option("1.0", "ABMILX: start of alpha, a number, or 'normal' for the published N(0, 1)")
    epeg_k: int = option(15, "RRTMIL: kernel of the position encoding", least=1)
    crmsa_k: int = option(3, "RRTMIL: representatives per region", least=1)
    region_num: int = option(8, "RRTMIL: regions per side", least=1)
    rrt_n_heads: int = option(8, "RRTMIL: attention heads", least=1)
    rrt_n_layers: int = option(2, "RRTMIL: layers", least=1)
    enc_init: str | None = option(
        None, "encoder weights (.pt, .safetensors); a folder means <folder>/fold_<k>_model_best.pt"
    )
    enc_pt: bool = option(True, "ImageNet weights for the encoder; --no_enc_pt starts from random weights")
    freeze_enc: bool = option(False, "keep the encoder fixed, in eval mode")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    num_epoch: int = option(200, "epochs, and the length of the cosine schedule", least=1)
    max_epoch: int = option(
        130, "early stopping happens after epoch max_epoch + 2 at the earliest, as published", least=0
    )
    patient: int = option(20, "epochs without improvement before training stops early", least=0)
    early_stopping: bool = option(True, "stop early; --no_early_stopping trains all epochs")
    batch_size: int = option(1, "bags per process and step", least=1)
    accumulation_steps: int = option(1, "batches whose gradients make one update", least=1)
    p_batch_size: int = option(512, "patches per encoder call in training", least=1)
    loss: str | None = option(
        None,
        "default: ce, or nll_surv for survival (or cox), bce for multilabel, mse for regression",
        ("ce", "nll_surv", "cox", "bce", "mse"),
    )
    class_weights: str | None = option(
        None,
        "factor of each class in the loss: none, balanced (training counts), or numbers, comma separated; multilabel: "
        "of the positives of each label",
    )
    balanced_sampling: bool = option(
        False, "draw the training bags of an epoch with replacement, every class equally often"
    )
    main_alpha: float | None = option(None, "weight of the bag loss; default: the MIL head's own, else 1", least=0)
    aux_alpha: float | None = option(
        None, "weight of the head's auxiliary loss; default: the MIL head's own, else 0", least=0
    )
    opt: str = option("adam", "optimiser", ("adam", "adamw"))
    lr: float = option(2e-4, "learning rate", above=0)
    encoder_lr: float | None = option(None, "learning rate of the encoder; default: lr", above=0)
    weight_decay: float = option(1e-5, "weight decay of every parameter, norms and biases included", least=0)
    decay_all: bool = option(True, "--no_decay_all spares norms and biases the weight decay")
    lr_sche: str = option("cosine", "schedule per epoch; step: x 0.2 at half time", ("cosine", "step", "const"))
    warmup_epochs: int = option(0, "linear warm-up inside the schedule", least=0)
    warmup_lr: float = option(1e-6, "learning rate of the first warm-up epoch", least=0)
    clip_grad: float | None = option(None, "largest gradient norm; default: no clipping", above=0)
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("auto", "auto: bf16 where the device has it, else fp16", ("auto", "bf16", "fp16"))
    mm: float = option(0.9997, "decay of the exponential moving average (EMA) of the weights", least=0, below=1)
    sync_bn: bool = option(False, "batch statistics over all processes")
    channels_last: bool = option(False, "channels-last memory format of the encoder")
    fused_stem: bool = option(
        True,
        "run the first layers of a ResNet as one operator where that can be done: CUDA, amp, channels_last",
    )
    torchcompile: bool = option(False, "compile the encoder")
    torchcompile_mode: str = option(
        "default", "what torch.compile optimises for", ("default", "reduce-overhead", "max-autotune")
    )
    grad_checkpointing: bool = option(
        False,
        "keep the activations of one encoder call of p_batch_size patches and compute the others again in the backward "
        "pass: less memory, more time, the same result",
    )
    full_bag: bool = option(
        False,
        "train on all patches of every bag with the exact gradient, in memory for the activations of one encoder call: "
        "the encoder runs without a graph first and again with one after the head",
    )
    full_bag_keep: int = option(
        16384,
        "full_bag: patches of a step that stay on the device (uint8; 3.2 GB of 256 px) and need not be read again for "
        "the second pass",
        least=0,
    )
    drop_last: bool = option(True, "drop the last incomplete training batch")
    seed: int = option(2021, "base seed", least=0)
    determ: bool = option(True, "deterministic cuDNN kernels; --no_determ lets cuDNN choose the fastest")
    deter_algo: bool = option(False, "deterministic algorithms in all of torch (slower)")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How it is validated and tested."""

    test_type: str = option("main", "weights that are evaluated", ("main", "ema", "both", "both_ema"))
    p_batch_size_v: int = option(
        2048, "evaluation begins a new encoder call after so many patches; no call exceeds p_batch_size", least=1
    )
    keep_epoch: str = option(
        "best",
        "best: the epoch that the validation metric chooses; last: the final one, without any choice",
        ("best", "last"),
    )
    best_metric: str | None = option(
        None,
        "metric that chooses the epoch; default: auc for two classes and multilabel, accuracy_macro for more classes "
        "(grades: kappa_quadratic or accuracy_within_one), c_index for survival, r2 for regression",
    )
    best_metric_index: int = option(
        -1, "the published way to choose it: -1 default, 0 auc or c_index, 1 accuracy_macro, ...", least=-1
    )
    num_bootstrap: int = option(1000, "bootstrap resamples of the test predictions", least=0)
    save_attention: bool = option(
        False,
        "with the test or the predictions, write the attention of every patch to attention/fold_<k>/<slide>.csv, for "
        "CLAM/heatmap.py",
    )
    always_test: bool = option(False, "also evaluate the test set every epoch (never used for selection)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where it runs and what it leaves behind."""

    output_path: str = option("results", "results go to output_path/project/title")
    project: str = option("default", "folder inside output_path")
    title: str = option("default", "folder inside project")
    script_mode: str = option(
        "all",
        "train and test, or one of them; predict: what the model of checkpoint says of slides without labels",
        ("all", "test", "no_test", "predict"),
    )
    checkpoint: str | None = option(
        None,
        "script_mode=test, predict: folder of the run (or one .pt file) whose best weights are used, also on a csv "
        "that holds test rows only; default for test: the run's own folder",
    )
    resume: str = option(
        "auto",
        "auto: go on where a run with the same options in the same folder stopped; never: start anew and replace its "
        "files",
        ("auto", "never"),
    )
    save_every_min: float = option(
        15.0,
        "minutes between two saves of the state inside an epoch, from which a killed run goes on; 0: only epochs",
        least=0,
    )
    dry_run: bool = option(
        False, "try the largest bags, report memory, speed, hours and disk of the whole run, and stop"
    )
    debug: bool = option(False, "autograd anomaly mode: names the operation behind a NaN gradient (slow)")
    profile: bool = option(False, "write a trace of a few training steps to trace_rank<r>.json")
    log_iter: int = option(100, "steps between two lines of the log", least=1)
    save_iter: int = option(-1, "keep a checkpoint every n epochs; -1: only best and last", least=-1)
    wandb: bool = option(False, "also log to Weights & Biases; WANDB_MODE=offline works without a network")
    tensorboard: bool = option(False, "also write event files for TensorBoard, in the run's folder")
    device: str = option("auto", "auto: CUDA when there is one", ("auto", "cpu", "cuda"))

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.script_mode in ("all", "no_test")

    @property
    def predicts(self) -> bool:
        """Whether the slides have no labels."""
        return self.script_mode == "predict"


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "run": RunConfig,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run. Built once by ``utils.options.parse``; nobody assigns to it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Config:
        """Builds the groups from one flat mapping of option names to typed values."""
        groups = {}
        for group, kind in GROUPS.items():
            names = {f.name for f in dataclasses.fields(kind)}
            groups[group] = kind(**{k: v for k, v in values.items() if k in names})
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """One flat mapping of option names to values, as a YAML file would hold it."""
        return {k: v for group in GROUPS for k, v in dataclasses.asdict(getattr(self, group)).items()}
