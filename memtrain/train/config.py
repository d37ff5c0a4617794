"""How a run is optimised, checkpointed and watched. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal

from memtrain.description import above_zero, at_least


Schedule = Literal["cosine", "linear", "wsd", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with parameter groups (Loshchilov and Hutter 2019; table group after Berges et al.
    2024).
    """

    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    """"wsd" is warm-up, stable, decay (Hu et al. 2024); "linear" falls to the end."""
    warmup_steps: int = 50
    decay_fraction: float = 0.2
    """Share of the steps over which "wsd" decays."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    horizon_steps: int | None = None
    """Length of the schedule; `train.num_steps` when the run began, unless set."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases or memory tables."""
    clip_norm: float | None = 1.0
    """Global norm of all parameters but the memory tables."""
    table_learning_rate: float = 1e-2
    """Peak rate of memory tables, which have no weight decay."""
    table_schedule: Schedule | None = None
    """Schedule of the tables' rate; `schedule` unless given. "linear" falls to the final fraction
    (Huang et al. 2024, arXiv 2411.12364, let a value rate of 10 times the others' fall to theirs).
    """
    table_final_fraction: float | None = None
    """`final_fraction` unless given."""
    table_clip_norm: float | None = 1.0
    """Global norm of all memory tables."""
    table_update: Literal["lazy", "dense"] = "lazy"
    """"lazy": a row without a gradient, and its moments, stand still. "dense": Adam, which goes on
    moving it by its old momentum."""
    table_gradient: Literal["auto", "rows", "dense"] = "auto"
    """Of lazy updates: a gradient of the rows that were read, or of the whole table; the first
    where a step reads fewer rows than a device has of the table, unless given."""
    table_rounding: Literal["nearest", "stochastic", "master"] = "nearest"
    """How lazy updates write a bfloat16 table: to the nearest number, up or down by chance, or the
    nearest to a float32 copy that is kept as optimizer state."""

    def __post_init__(self):
        least = {"warmup_steps": 0, "horizon_steps": 1, "learning_rate": 0}
        at_least(self, "optimizer", least | {"table_learning_rate": 0, "weight_decay": 0})
        for name in ("epsilon", "clip_norm", "table_clip_norm"):
            above_zero(self, "optimizer", name)
        if self.table_update == "dense":
            for name, default in (("table_gradient", "auto"), ("table_rounding", "nearest")):
                if (value := getattr(self, name)) not in (default, "dense"):
                    raise ValueError(
                        f'optimizer.{name}={value}: it is of lazy updates; set table_update="lazy"'
                    )


@dataclass(frozen=True, kw_only=True)
class RowEdit:
    """Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): of each memory table only a few
    rows are written, those that the new data reads and what was learned before does not; all else
    is frozen (see `memtrain.train.row_edit`).
    """

    rows: int = 1_000
    """That may be written, of each table."""
    batches: int = 64
    """Of the new data, counted at most."""
    background_batches: int = 256
    """Of the data that `init_from` was trained on, counted at most."""

    def __post_init__(self):
        at_least(self, "train.edit", {"rows": 1, "batches": 1, "background_batches": 1})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000
    seed: int = 0
    batch_size: int = 16
    """Rows of the whole batch, over all devices and accumulation steps."""
    seq_len: int = 512
    """Tokens of a row."""
    accumulation_steps: int = 1
    """The batch is read in this many equal parts, one after the other, under one update."""
    carry: Literal["none", "stop", "tbptt"] = "none"
    """Memory state between steps: dropped, or kept with gradients stopped (needs
    data.order="document"). "tbptt" does as "stop" does, and reads a step's rows in
    `tbptt_segments`, one after the other, with gradients through the state between them.
    """
    tbptt_segments: int = 1
    """Equal parts of a row under carry="tbptt" (truncated backpropagation through time): only one
    part's activations are held at once, and states between."""
    checkpoint_every_steps: int = 200
    """Most steps that a run killed without a warning repeats, plus `checkpoint_lag_steps`."""
    checkpoint_lag_steps: int = 0
    """Steps that may be done beyond the one being saved before that save is on disk; the next one
    is always begun meanwhile. Raise it where a save takes longer than a step.
    """
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this are kept for ever."""
    log_every_steps: int = 10
    evaluate_every_steps: int = 200
    evaluate_batches: int = 8
    """Held-out batches read at each evaluation."""
    max_skipped_steps: int = 100
    """Steps with a non-finite loss or gradient are skipped and counted; more than this in a row
    ends the run.
    """
    init_from: str | None = None
    """A run or artifact whose matching parameters are the starting point."""
    init_rename: tuple[str, ...] = ()
    """Of `init_from`: "NEW=OLD" takes parameters whose name begins with NEW from those that begin
    with OLD there, as in "blocks.3.=blocks.2." after a block was put in before it."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of parameter names that are not trained, e.g. "embed*" or "blocks.0.*"; read in
    order, and "!blocks.3.*" takes out again: "*" and "!blocks.3.*" trains that block alone."""
    edit: RowEdit | None = None
    """Write only a few chosen rows of the memory tables (needs `init_from`)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profiler trace, written to RUN/profile."""
    tensorboard: bool = False
    """Write TensorBoard event files too (needs the `tracking` extra)."""

    def __post_init__(self):
        least = {
            "num_steps": 1,
            "batch_size": 1,
            "seq_len": 1,
            "accumulation_steps": 1,
            "tbptt_segments": 1,
            "checkpoint_every_steps": 1,
            "checkpoint_lag_steps": 0,
            "keep_checkpoints": 1,
            "keep_every_steps": 1,
            "log_every_steps": 1,
            "evaluate_every_steps": 1,
            "evaluate_batches": 0,
            "max_skipped_steps": 0,
        }
        at_least(self, "train", least)
        self._check_segments()
        for name in ("edit", "init_rename"):
            if getattr(self, name) and self.init_from is None:
                raise ValueError(f"train.{name} needs train.init_from, a run or artifact")
        for entry in self.init_rename:
            if entry.count("=") != 1 or not all(entry.split("=")):
                raise ValueError(
                    f'train.init_rename={entry!r}: expected "NEW=OLD", the beginnings of names'
                )
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 <= first <= last or first >= self.num_steps:
                raise ValueError(
                    f"train.profile_steps={first},{last}: it takes the first and the last step of "
                    f"the trace, 0 to {self.num_steps - 1}"
                )

    def _check_segments(self) -> None:
        k = self.tbptt_segments
        if not isinstance(k, int) or not isinstance(self.seq_len, int):
            return  # `memtrain.config.validated` names wrong types
        if (self.carry == "tbptt") != (k > 1):
            raise ValueError(
                f'train.tbptt_segments={k}, train.carry="{self.carry}": carry="tbptt" takes 2 '
                "segments or more, and nothing else takes any"
            )
        if self.seq_len % k:
            near = self.seq_len // k * k or k
            raise ValueError(
                f"train.seq_len={self.seq_len} cannot be cut into train.tbptt_segments={k} equal "
                f"parts: take {near} or {near + k}"
            )
