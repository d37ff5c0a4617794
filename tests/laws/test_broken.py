"""Each law fails the memories that break it, and names itself, the case and the leaf."""

import broken as b
import pytest

from memtrain.testing import LawBroken, check_laws


FAST = [
    (b.RopeOffByOne, b.FULL, "split", "output"),
    (b.StaleWindowSlot, b.WINDOW, "split", "['key']"),
    (b.UntiedTable, b.KEYS, "gradient", "['tables']['memory']"),
    (b.DocumentLeak, b.FULL, "reset", "output"),
    (b.PaddingCounts, b.FULL, "padding", "['length']"),
    (b.SpecLies, b.FULL, "bytes", "['value']"),
    (b.DeafTransition, b.RECURRENCE, "context_parallel", "['hidden']"),
]
FULL = [
    (b.DoesNothing, b.FULL, "moves", "output"),
    (b.RingOneShort, b.WINDOW, "split", "output"),
    (b.StoppedCarry, b.FULL, "gradient", "['input']"),
    (b.WrongOnAMesh, b.FULL, "sharding", "output"),
    (b.CarryForgottenOnAMesh, b.RECURRENCE, "sharding", "output"),
    (b.CarryForgottenOnAMesh, b.RECURRENCE, "context_parallel", "output"),
    (b.HalosForgotten, b.RECURRENCE, "context_parallel", "output"),
    (b.StretchesAsTheyLie, b.RECURRENCE, "context_parallel", "output"),
    (b.ComposesBackwards, b.RECURRENCE, "context_parallel", "['conv']"),
    (b.HiddenState, b.FULL, "save_restore", "output"),
    (b.ForkForgets, b.FULL, "fork_rollback", "['length']"),
    (b.RollbackKeepsDocument, b.FULL, "fork_rollback", "['current_document']"),
    (b.OverflowClamps, b.FULL, "long_runs", "['value']"),
    (b.OverflowSilent, b.FULL, "long_runs", "['overflow']"),
    (b.GrowsMoreThanSaid, b.FULL, "long_runs", "['document']"),
    (b.Explodes, b.FULL, "long_runs", "['output']"),
    (b.RunningMean, None, "long_runs", "output"),
]
CASES = [pytest.param(*case, id=f"{case[0].__name__}-{case[2]}") for case in FAST]
CASES += [
    pytest.param(*case, id=f"{case[0].__name__}-{case[2]}", marks=pytest.mark.full) for case in FULL
]


@pytest.mark.parametrize(("cls", "config", "law", "leaf"), CASES)
def test_is_caught_by_its_law(cls, config, law, leaf):
    with pytest.raises(LawBroken) as caught:
        check_laws(b.maker(cls, config), laws=[law])
    assert caught.value.law == law
    assert caught.value.leaf.startswith(leaf)
    assert caught.value.case in str(caught.value)
    print(caught.value)


@pytest.mark.full
def test_a_faithful_copy_of_what_is_broken_passes():
    """The faults are caught, not the configurations they are planted in."""
    check_laws(
        b.maker(b.RunningMean, None), laws=["split", "gradient", "reset", "padding", "bytes"]
    )


@pytest.mark.full
def test_what_is_not_offered_is_said():
    report = check_laws(b.maker(b.RunningMean, None), laws=["context_parallel"])
    assert report["context_parallel"].status == "not offered"
    assert "natural order only" in str(report)


def test_an_unknown_law_is_named():
    with pytest.raises(ValueError, match=r"'splitt'.*no such law"):
        check_laws(b.maker(b.DoesNothing, b.FULL), laws=["splitt"])
