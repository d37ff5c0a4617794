"""The commands: what each takes, checks before JAX is imported, and calls.

A command's fields are its options (tyro reads their names, types and docstrings). `run` imports
what it needs and returns the result as a dict; what it prints goes to stdout, or to stderr with
--json.
"""

from __future__ import annotations

import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from memtrain.console import as_cell, as_text
from memtrain.errors import BadInput


# tyro would say "(default: None)" of what is simply optional.
_optional = arg(help_behavior_hint="")
_required = arg(help_behavior_hint="(required)")

Json = Annotated[bool, _optional]
Without = Annotated[
    UseAppendAction[tuple[str, ...]], arg(metavar="MEMORY", help_behavior_hint="(repeatable)")
]
Layers = Annotated[Path | None, arg(metavar="FILE.PY", help_behavior_hint="")]
Target = Annotated[Positional[Path], arg(metavar="RUN|ARTIFACT", help_behavior_hint="")]
Run = Annotated[Positional[Path], arg(metavar="RUN", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe, or go on where the run in its directory stopped: the same command resumes."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")]
    """path/to/file.py[:function] that returns an Experiment, or the config.json of a run."""
    run_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where the run lives: runs/NAME of the experiment unless given."""
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUE", help_behavior_hint="(repeatable)"),
    ] = ()
    """Fields of the experiment to change, as in --set train.num_steps=100 data.path=a.txt,b.txt."""
    seeds: Annotated[str | None, arg(metavar="N|A,B,..", help_behavior_hint="")] = None
    """Train several seeds, one after the other: N from train.seed on, or the ones listed."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        from memtrain import runtime
        from memtrain.config import override
        from memtrain.recipe import load_recipe

        experiment = override(load_recipe(self.recipe), self.set)
        seeds = None if self.seeds is None else parse_seeds(self.seeds, experiment.train.seed)
        # Absolute, for what the run writes and starts may live in other folders.
        run_dir = (self.run_dir or Path("runs") / experiment.name).absolute()
        if run_dir.exists() and not run_dir.is_dir():
            raise BadInput(f"--run-dir {run_dir} is a file: give a folder, or one to be made")
        runtime.prepare(experiment.num_devices)
        from memtrain.terminal import progress
        from memtrain.train.run import train

        with progress() as (say, on_step):
            return train(
                experiment,
                run_dir,
                recipe=self.recipe,
                seeds=seeds,
                progress=say,
                on_step=on_step,
            )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as an artifact that decodes by itself, once it reproduces training."""

    run_: Annotated[Run, arg(name="run")]
    """The run directory."""
    out: Annotated[Path | None, arg(metavar="MODEL.MTX", help_behavior_hint="")] = None
    """The artifact to write, a folder."""
    huggingface: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """In place of an artifact: a folder that transformers loads, where it has such a model."""
    step: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """The checkpoint to export: the newest valid one unless given."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        arg(metavar="float32|bfloat16", help_behavior_hint=""),
    ] = None
    """Of the stored parameters and matrix products: as the run has them unless given."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        if (self.out is None) == (self.huggingface is None):
            what = "missing" if self.out is None else "only one of"
            raise BadInput(f"{what} --out MODEL.MTX or --huggingface FOLDER")
        if self.huggingface is not None and self.dtype is not None:
            raise BadInput("--dtype: --huggingface writes parameters in the dtype of the run")
        run = existing(self.run_, "run")
        at_least("--step", self.step, 0)
        prepare()
        if self.huggingface is not None:
            from memtrain.interop.command import export_run

            return export_run(run, self.huggingface.absolute(), step=self.step)
        from memtrain.decode.export import export

        assert self.out is not None
        return export(run, self.out.absolute(), step=self.step, dtype=self.dtype)

    def show(self, result: dict[str, Any]) -> str:
        return with_checks(result) if "checked" in result else as_text(result)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make an artifact of a Hugging Face model: docs/huggingface.md says of which."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help_behavior_hint="")]
    """A folder with config.json, safetensors and, for text, tokenizer.json."""
    out: Annotated[Path, arg(metavar="MODEL.MTX", help_behavior_hint="(required)")]
    """The artifact to write, a folder."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        arg(metavar="float32|bfloat16", help_behavior_hint=""),
    ] = None
    """Of the stored parameters and matrix products: float32 unless given."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        folder = existing(self.folder, "folder")
        prepare()
        from memtrain.interop.command import import_model

        return import_model(folder, self.out.absolute(), dtype=self.dtype)

    def show(self, result: dict[str, Any]) -> str:
        return with_checks(result)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with an exported model, as it goes."""

    artifact: Annotated[Positional[Path], arg(metavar="ARTIFACT", help_behavior_hint="")]
    """The exported model, a .mtx folder."""
    prompt: Annotated[str, arg(metavar="TEXT", help_behavior_hint="(required)")]
    """The text to go on from."""
    max_tokens: Annotated[int, arg(metavar="N")] = 256
    """New tokens at most."""
    temperature: Annotated[float, arg(metavar="X")] = 0.8
    """0 takes the likeliest token always."""
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="")] = None
    """Sample among the K likeliest tokens only."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="")] = None
    """Sample among the likeliest tokens that together have probability P."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """The same seed, prompt and artifact give the same text."""
    without: Without = ()
    """A memory to switch off."""
    recipe: Layers = None
    """A recipe or module that describes layers of your own, which the artifact's model has."""
    json: Json = False
    """Print the result as one JSON object on stdout, and the text as it comes on stderr."""

    def run(self) -> dict[str, Any]:
        artifact = existing(self.artifact, "artifact")
        define_layers(self.recipe)
        at_least("--max-tokens", self.max_tokens, 1)
        at_least("--temperature", self.temperature, 0)
        at_least("--top-k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"--top-p {self.top_p}: expected more than 0 and at most 1")
        prepare()
        from memtrain.decode.generate import generate

        return generate(
            artifact,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            without=list(self.without),
            stream=lambda text: print(printable(text), end="", flush=True),
        )

    def show(self, result: dict[str, Any]) -> str:
        """Nothing more: the text itself was the output."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run or an exported model through its decode path."""

    target: Target
    """A run directory or an exported model."""
    task: Annotated[
        Literal["associative", "bpb", "copy", "facts", "mqar", "recall", "reread"], _required
    ]
    """bpb: bits per byte by position in the context. associative, copy, mqar, recall: accuracy by
    distance. facts: share of a table's facts that is recalled. reread: bits per byte of a text's
    first and second reading."""
    data: Annotated[
        UseAppendAction[tuple[Path, ...]], arg(metavar="PATH", help_behavior_hint="(repeatable)")
    ] = ()
    """Text to measure on: the held-out part of the run's own data unless given."""
    context: Annotated[int | None, arg(metavar="TOKENS", help_behavior_hint="")] = None
    """Tokens that are read from an empty memory, however many a row of training has; one row of
    training, or eight where memory is carried from row to row, unless given. Not of recall."""
    without: Without = ()
    """A memory to switch off."""
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="data.TASK.KEY=VALUE", help_behavior_hint="(repeatable)"),
    ] = ()
    """Other data of the task than the model was trained on, as in --set data.mqar.num_pairs=8."""
    recipe: Layers = None
    """A recipe or module that describes layers of your own, which the model has."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        target = existing(self.target, "run or artifact")
        if self.context is not None:
            at_least("--context", self.context, 1)
        define_layers(self.recipe)
        prepare()
        from memtrain.evaluate.run import evaluate

        return evaluate(
            target,
            task=self.task,
            data=list(self.data),
            context=self.context,
            without=list(self.without),
            settings=list(self.set),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write RUN/report.html: what the model remembers, and how its training went."""

    run_: Annotated[Run, arg(name="run")]
    """The run directory."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        run = existing(self.run_, "run")
        prepare()
        from memtrain.evaluate.report import report

        return report(run)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a run will take, before it is launched: bytes, FLOPs, time, and whether it fits."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")]
    """path/to/file.py[:function] that returns an Experiment, or the config.json of a run."""
    target: Annotated[str | None, arg(metavar="T", help_behavior_hint="")] = None
    """The devices: v5e:4x4, v5p:4x4x4, v6e:16x16 (TPU slices by topology), h100xN, h200xN, cpuxN.
    The real train step is compiled for them, which none of them need be here for."""
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUE", help_behavior_hint="(repeatable)"),
    ] = ()
    """Fields of the experiment to change, as in --set train.seq_len=32768 mesh.context=4."""
    sweep: Annotated[str | None, arg(metavar="KEY=A,B,..", help_behavior_hint="")] = None
    """Estimate at several values of one field, as in train.seq_len=8192,32768 (compiled too with
    --compile)."""
    plot: Annotated[Path | None, arg(metavar="FILE.PNG|SVG", help_behavior_hint="")] = None
    """With --sweep: draw memory and step time."""
    compile: Annotated[bool, _optional] = False
    """Compile the points of a sweep too."""
    no_compile: Annotated[bool, _optional] = False
    """Leave the compiler out: estimates alone, in seconds."""
    shardings: Annotated[bool, _optional] = False
    """List where every parameter lives."""
    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        from memtrain import runtime
        from memtrain.config import override
        from memtrain.plan.target import parse_target
        from memtrain.recipe import load_recipe

        target = None if self.target is None else parse_target(self.target)
        if self.plot is not None and self.sweep is None:
            raise BadInput("--plot draws a sweep: give --sweep KEY=V1,V2,... too")
        if self.compile and (target is None or self.no_compile):
            why = "--no-compile contradicts it" if self.no_compile else "give --target too"
            raise BadInput(f"--compile: {why}")
        experiment = override(load_recipe(self.recipe), self.set)
        compiles = target is not None and not self.no_compile
        if self.sweep is not None:
            compiles = self.compile
        on_cpu = target is not None and target.device.platform == "cpu"
        if target is not None:
            from memtrain.plan.compile import prepare_compiler

            prepare_compiler(target)
        # Nothing runs: a plan takes no accelerator from whoever trains on it.
        os.environ["JAX_PLATFORMS"] = "cpu"
        runtime.prepare(target.num_devices if target is not None and on_cpu and compiles else 1)
        from memtrain.plan.command import plan
        from memtrain.plan.plot import check_plot
        from memtrain.plan.sweep import parse_sweep

        if self.plot is not None:
            check_plot(self.plot)
        sweep = None if self.sweep is None else parse_sweep(experiment, self.sweep)
        return plan(experiment, target=target, compiles=compiles, sweep=sweep, plot=self.plot)

    def show(self, result: dict[str, Any]) -> str:
        from memtrain.plan.show import as_lines

        return as_lines(result, shardings=self.shardings)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say whether this machine is ready, and what to do where it is not."""

    json: Json = False
    """Print the result as one JSON object on stdout, and progress on stderr."""

    def run(self) -> dict[str, Any]:
        from memtrain.doctor import examine

        return examine()

    def show(self, result: dict[str, Any]) -> str:
        from memtrain.doctor import as_lines

        return as_lines(result)


COMMANDS: dict[str, type] = {
    "train": Train,
    "export": Export,
    "import": Import,
    "generate": Generate,
    "evaluate": Evaluate,
    "report": Report,
    "plan": Plan,
    "doctor": Doctor,
}


def parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for. Raises tyro's `SystemExit`: 0 help, 2 error."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="memtrain",
        description="memtrain trains language models that remember.",
        args=spread_set(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def options(command: type) -> dict[str, Any]:
    """The options of a command, as typed, and their types without "may be left out"."""
    found = {}
    for name, annotation in typing.get_type_hints(command).items():
        required = [a for a in typing.get_args(annotation) if a is not type(None)]
        is_union = isinstance(annotation, types.UnionType)
        found["--" + name.strip("_").replace("_", "-")] = required[0] if is_union else annotation
    return found


def spread_set(arguments: list[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`: a RECIPE after it is not taken for a value."""
    spread, values_follow = [], False
    for argument in arguments:
        if values_follow and "=" in argument and not argument.startswith("-"):
            if spread[-1] != "--set":
                spread.append("--set")
        else:
            values_follow = argument == "--set"
        spread.append(argument)
    return spread


def parse_seeds(text: str, first: int) -> list[int]:
    """The seeds of "3" (three from `first` on) or "0,7,9"."""
    parts = [part.strip() for part in text.split(",")]
    several = len(parts) > 1
    if several and not parts[-1]:  # "7," lists one.
        parts.pop()
    if not all(part.isdecimal() for part in parts) or (not several and int(parts[0]) < 1):
        raise BadInput(f"--seeds {text!r}: expected how many, as in 3, or a list, as in 0,7,9")
    seeds = [int(part) for part in parts] if several else list(range(first, first + int(parts[0])))
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {text!r}: each seed once")
    return seeds


def existing(path: Path, what: str) -> Path:
    """The folder's absolute path (Orbax wants it), if it is there: before JAX takes its seconds."""
    if not path.exists():
        raise BadInput(f"there is no {what} {path}")
    if not path.is_dir():
        raise BadInput(f"{path} is a file: expected the folder of a {what}")
    return path.absolute()


def with_checks(result: dict[str, Any]) -> str:
    """An artifact's checks, a line each: they are what an export is worth."""
    lines = []
    for dtype, found in result["checked"].items():
        for name, numbers in found.items():
            if isinstance(numbers, dict):
                lines.append(f"  {dtype}, {name.replace('_', ' ')}: {as_cell(numbers)}")
            elif isinstance(numbers, float):
                lines.append(f"  {dtype}, {name.replace('_', ' ')}: {numbers:.3g}")
    rest = as_text({k: v for k, v in result.items() if k != "checked"})
    return "\n".join([rest, "checked against the training path", *lines])


def at_least(option: str, value: float | None, least: int) -> None:
    if value is not None and not (least <= value < math.inf):
        raise BadInput(f"{option} {value}: expected at least {least}")


def define_layers(recipe: Path | None) -> None:
    """Runs a recipe file, so that the layers described in it are known by name."""
    if recipe is not None:
        from memtrain.recipe import load_module

        load_module(Path(str(recipe).partition(":")[0]))


def prepare() -> None:
    from memtrain import runtime

    runtime.prepare()


def printable(text: str) -> str:
    """The text without control characters: a model's bytes must not command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
