"""XLA's flags for the tests and the processes that they start."""

import os


def with_devices(count: int) -> str:
    """The flags of this run with `count` simulated CPU devices."""
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={count}"])
