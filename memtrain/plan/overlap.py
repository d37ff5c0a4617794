"""Whether a ring's permutes run while kernels do, read from a compiled program's schedule.

In scheduled HLO an asynchronous permute is a `collective-permute-start` and a `-done`; what stands
between the two runs meanwhile. A plain `collective-permute` runs alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator


KERNELS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton")
"""Custom calls that are kernels of ours: Mosaic on TPU, Mosaic and Triton on GPU."""


@dataclasses.dataclass(frozen=True)
class Permutes:
    """Counts in one direction. asynchronous = overlapping + idle."""

    synchronous: int = 0
    asynchronous: int = 0
    overlapping: int = 0
    """Asynchronous ones with at least one kernel between start and done."""

    @property
    def total(self) -> int:
        return self.synchronous + self.asynchronous

    @property
    def all_overlap(self) -> bool:
        """Every permute has a kernel to hide behind; true where there is none."""
        return self.overlapping == self.total


@dataclasses.dataclass(frozen=True)
class Overlap:
    forward: Permutes
    backward: Permutes
    """Of operations whose name says that they are a transpose of the forward."""
    kernels: int
    """Custom calls of kernels in the whole program."""
    others: int = 0
    """Permutes that nobody wrote: the compiler's own, where it lays arrays out anew."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    operands: str
    rest: str

    @property
    def op_name(self) -> str:
        return self.rest.partition('op_name="')[2].partition('"')[0]

    @property
    def is_permute(self) -> bool:
        return self.opcode in ("collective-permute", "collective-permute-start")


_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


def permute_overlap(hlo: str, kernels: tuple[str, ...] = KERNELS) -> Overlap:
    """Of a scheduled module's text, every computation by itself.

    A loop or a branch that holds a kernel counts as one: it stands between start and done as whole.
    """
    computations = dict(_computations(hlo))
    busy = _with_kernels(computations, kernels)
    counts = {False: [0, 0, 0], True: [0, 0, 0]}
    num_kernels = others = 0
    for instructions in computations.values():
        is_kernel = [_is_kernel(i, kernels) for i in instructions]
        num_kernels += sum(is_kernel)
        works = [
            k or bool(busy & set(_called(i))) for k, i in zip(is_kernel, instructions, strict=True)
        ]
        for place, instruction in enumerate(instructions):
            if not instruction.is_permute:
                continue
            if "ppermute" not in instruction.op_name:
                others += 1
                continue
            count = counts["transpose(" in instruction.op_name]
            if instruction.opcode == "collective-permute":
                count[0] += 1
            else:
                count[1] += 1
                done = _done(instruction.name, instructions, place)
                count[2] += any(works[place + 1 : done])
    forward, backward = Permutes(*counts[False]), Permutes(*counts[True])
    return Overlap(forward, backward, num_kernels, others)


def _computations(hlo: str) -> Iterator[tuple[str, list[_Instruction]]]:
    name, instructions = None, []
    for line in hlo.splitlines():
        if line.startswith("}"):
            if name is not None:
                yield name, instructions
            name = None
        elif (head := _HEAD.match(line)) and not line.startswith("HloModule"):
            name, instructions = head[1], []
        elif name is not None and (found := _LINE.match(line)):
            instructions.append(_instruction(found[1], found[2]))


def _instruction(name: str, text: str) -> _Instruction:
    """`(bf16[2]{0:T(256)}, u32[]) opcode(operands), attributes`."""
    # The type may be a tuple with blanks in it, and layouts have brackets of their own.
    begin = next(_ends(text, " "), len(text))
    opcode, _, rest = text[begin + 1 :].partition("(")
    end = next(_ends(rest, ")"), len(rest))
    return _Instruction(name, opcode.strip(), rest[:end], rest[end + 1 :])


def _ends(text: str, letter: str) -> Iterator[int]:
    """Where the letter stands outside all brackets."""
    depth = 0
    for place, found in enumerate(text):
        if found == letter and depth == 0:
            yield place
        depth += (found in "({[") - (found in ")}]")


def _is_kernel(instruction: _Instruction, kernels: tuple[str, ...]) -> bool:
    target = instruction.rest.partition('custom_call_target="')[2].partition('"')[0]
    return instruction.opcode == "custom-call" and target in kernels


def _called(instruction: _Instruction) -> list[str]:
    found = _CALLED.findall(instruction.rest)
    return [
        name.strip().lstrip("%") for one, many in found for name in [one, *many.split(",")] if name
    ]


def _with_kernels(
    computations: dict[str, list[_Instruction]], kernels: tuple[str, ...]
) -> set[str]:
    """Names of the computations that hold a kernel, themselves or in what they call."""
    busy = {n for n, c in computations.items() if any(_is_kernel(i, kernels) for i in c)}
    while True:
        more = {n for n, c in computations.items() if any(busy & set(_called(i)) for i in c)}
        if more <= busy:
            return busy
        busy |= more


def _done(start: str, instructions: list[_Instruction], place: int) -> int:
    """Index of the instruction that waits for the permute."""
    wanted = re.compile(rf"(?:^|[\s%,(]){re.escape(start)}(?![\w.\-])")
    for index in range(place + 1, len(instructions)):
        later = instructions[index]
        if later.opcode == "collective-permute-done" and wanted.search(later.operands):
            return index
    return place + 1
