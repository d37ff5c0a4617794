"""Sequences over devices: every strategy and layout gives what one device would, to the oracle."""

import pytest
from sharded_calls import SPECS, check


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


@pytest.mark.parametrize(
    ("mask", "layout"), [("sinks", "contiguous"), ("window", "zigzag"), ("window", "striped")]
)
def test_default_positions_with_prior_and_sink_logits(mask, layout):
    check(SPECS[mask], 4, layout=layout, extras=True, default_positions=True, seed=3)
