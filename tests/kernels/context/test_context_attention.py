"""Sequences over devices: every strategy and layout gives what one device would, to the oracle."""

import pytest
from sharded_calls import SPECS, check

from memtrain_kernels.context import ring


LAYOUTS = ("contiguous", "zigzag", "striped")
STRATEGIES = ("ring", "ulysses", "usp", "all_gather")

# Every mask, every strategy and every layout in few programs.
COVERING = [
    ("causal", "ring", "zigzag"),
    ("window", "ring", "contiguous"),
    ("sinks", "ring", "zigzag"),
    ("sinks", "usp", "contiguous"),
    ("prefix", "ring", "striped"),
    ("both ways", "ring", "contiguous"),
    ("mask_fn", "usp", "zigzag"),
    ("everything", "ulysses", "striped"),
    ("window", "all_gather", "zigzag"),
]


@pytest.mark.parametrize(("mask", "strategy", "layout"), COVERING)
def test_packed_documents(mask, strategy, layout):
    usp = {"ulysses": 2} if strategy == "usp" else {}
    check(SPECS[mask], 4, strategy=strategy, layout=layout, **usp)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", SPECS)
def test_every_mask_in_every_strategy_and_layout(mask, strategy, layout):
    usp = {"ulysses": 2} if strategy == "usp" else {}
    extras = mask in ("sinks", "causal")
    check(SPECS[mask], 4, strategy=strategy, layout=layout, extras=extras, seed=1, **usp)
    default = {"default_positions": True, "seed": 2}
    check(SPECS[mask], 4, strategy=strategy, layout=layout, **default, **usp)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mask", "layout"), [("sinks", "contiguous"), ("window", "zigzag"), ("window", "striped")]
)
def test_default_positions_with_prior_and_sink_logits(mask, layout):
    check(SPECS[mask], 4, layout=layout, extras=True, default_positions=True, seed=3)


@pytest.mark.full
@pytest.mark.parametrize(("mask", "layout"), [("causal", "zigzag"), ("prefix", "contiguous")])
def test_hops_written_out_as_on_accelerators(monkeypatch, mask, layout):
    monkeypatch.setattr(ring, "_max_unrolled", lambda: 16)
    check(SPECS[mask], 4, layout=layout, seed=4)


def test_a_forced_backend_that_gives_no_partial_gradients_is_refused():
    with pytest.raises(ValueError, match="cudnn"):
        check(SPECS["causal"], 2, backend="cudnn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "ulysses", "heads": (8, 2)}, "cannot divide 8 query and 2 key heads"),
        ({"strategy": "usp", "ulysses": 3}, "degrees that fit are 1, 2, 4"),
        ({"strategy": "ring", "ulysses": 2}, "is for strategy 'usp'"),
        ({"strategy": "rings"}, "there are ring, ulysses, usp, all_gather"),
        ({"length": 44, "layout": "zigzag"}, "takes multiples of 8; nearest 40 or 48"),
    ],
)
def test_what_cannot_be_split_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        check(SPECS["causal"], 4, **options)
