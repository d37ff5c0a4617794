"""Permutes and kernels in the order of a schedule: hand-made, and from the TPU compiler."""

from pathlib import Path

import pytest

from memtrain.plan.overlap import Overlap, Permutes, permute_overlap


HEAD = "HloModule m, is_scheduled=true\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
NONE = Permutes()


def module(letters: str, name: str = "jit(f)/ring/ppermute") -> str:
    """S and D number themselves by their order; K is a kernel, P a synchronous permute."""
    made = {"S": 0, "D": 0, "K": 0, "P": 0}
    lines = []
    for letter in letters:
        n = made[letter]
        made[letter] += 1
        lines.append(
            {
                "S": f"  %cps.{n} = (f32[8]{{0:T(128)}}, f32[8]{{0:T(128)}}, u32[]{{:S(2)}}) "
                "collective-permute-start(f32[8]{0:T(128)S(1)} %x), source_target_pairs={{0,1}}",
                "D": f"  %cpd.{n} = f32[8]{{0}} collective-permute-done("
                f"(f32[8]{{0:T(128)}}, f32[8]{{0:T(128)}}) %cps.{n}), channel_id=1",
                "K": f"  %k.{n} = f32[8]{{0}} custom-call(%x), custom_call_target="
                '"tpu_custom_call"',
                "P": f"  %p.{n} = f32[8]{{0}} collective-permute(%x), channel_id=1",
            }[letter]
            + f', metadata={{op_name="{name}"}}'
        )
    return HEAD + "\n".join(lines) + "\n  ROOT %y = f32[8]{0} add(%x, %x)\n}\n"


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("SKDSKD", Permutes(0, 2, 2)),
        ("SDSDKK", Permutes(0, 2, 0)),
        ("SSKDD", Permutes(0, 2, 2)),
        ("SDSKKDK", Permutes(0, 2, 1)),
        ("PKPK", Permutes(2, 0, 0)),
        ("KK", NONE),
    ],
)
def test_schedules_by_hand(letters: str, expected: Permutes):
    found = permute_overlap(module(letters))
    assert found == Overlap(expected, NONE, letters.count("K"))
    assert found.forward.all_overlap == (letters in ("SKDSKD", "SSKDD", "KK"))
    backward = permute_overlap(module(letters, "jit(f)/transpose(jvp(ring))/ppermute"))
    assert backward == Overlap(NONE, expected, letters.count("K"))


def test_permutes_of_the_compilers_own_are_apart():
    assert permute_overlap(module("SKDP", "jit(f)/reshape")) == Overlap(NONE, NONE, 1, others=2)


def test_a_done_belongs_to_the_start_that_it_names():
    """Eleven starts: `%cps.1` must not be found in `%cps.10`."""
    text = module("S" * 11 + "D" * 11 + "K")
    assert permute_overlap(text).forward == Permutes(0, 11, 0)
    late = text.replace(" %cps.1)", " %cps.last)").replace("%cps.1 =", "%cps.last =")
    assert permute_overlap(late).forward == Permutes(0, 11, 0)


def test_a_branch_with_a_kernel_counts_and_a_foreign_call_does_not():
    branch = """%hop (p: f32[8]) -> f32[8] {
  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %r = f32[8]{0} add(%k, %k)
}

%skip (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} custom-call(%p), custom_call_target="Sharding"
}

"""
    call = "  %c = f32[8]{0} conditional(%x, %x), branch_computations={%skip, %hop}\n  %cpd.0"
    text = module("SD").replace("  %cpd.0", call)
    head, _, body = text.partition("ENTRY")
    assert permute_overlap(head + branch + "ENTRY" + body).forward == Permutes(0, 1, 1)
    without = branch.replace("tpu_custom_call", "Sharding")
    assert permute_overlap(head + without + "ENTRY" + body).forward == Permutes(0, 1, 0)


@pytest.mark.parametrize(
    ("name", "forward", "backward", "kernels"),
    [
        ("ring_v5e_4x4", Permutes(0, 2, 1), Permutes(0, 2, 1), 7),
        ("ring_v5e_4x8", Permutes(2, 0, 0), Permutes(2, 0, 0), 7),
    ],
)
def test_what_the_tpu_compiler_scheduled(
    name: str, forward: Permutes, backward: Permutes, kernels: int
):
    """Three hops of a ring around a matrix product, forward and backward, as libtpu schedules them.

    On 16 chips of v5e the first permute is done before a kernel starts (a kernel of 512 x 512 is
    too short), the second runs beside two; on 32 chips both are synchronous.
    """
    text = (Path(__file__).parent / "schedules" / f"{name}.txt").read_text(encoding="utf-8")
    assert permute_overlap(text) == Overlap(forward, backward, kernels)
