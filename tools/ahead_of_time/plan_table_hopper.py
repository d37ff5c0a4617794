"""The rows of `tools/aot plan-table` that are for GPUs: see `plan_table`."""

from __future__ import annotations

import sys

import plan_table


if __name__ == "__main__":
    plan_table.__doc__ = plan_table.__doc__ or __doc__
    sys.exit(plan_table.main(tpu=False))
