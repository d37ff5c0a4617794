"""The chunked scans of `transformers` on PyTorch, asked line by line by `scan.py`.

Run by an interpreter of its own, which has torch and transformers: `python scan_rival.py INPUTS.npz
OUTPUTS.npz`. Writes what it computes for every case, then for each line "CASE forward|backward"
answers with seconds.
"""

import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers.models.mamba2.modeling_mamba2 import (  # pyright: ignore[reportMissingImports]
    mamba2_chunk_scan,
)
from transformers.models.qwen3_next.modeling_qwen3_next import (  # pyright: ignore[reportMissingImports]
    torch_chunk_gated_delta_rule,
)


CHUNK = 64


def gated_delta(query, key, value, log_decay, write):
    repeats = value.shape[2] // query.shape[2]
    query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
    return torch_chunk_gated_delta_rule(query, key, value, log_decay, write, chunk_size=CHUNK)[0]


def mamba2(query, key, value, log_decay, write):
    # It multiplies its steps with a rate a head itself.
    rate = (log_decay / write).mean(dim=(0, 1)).detach()
    return mamba2_chunk_scan(value, write, rate, key, query, CHUNK)


CASES = {"gated delta": gated_delta, "mamba2": mamba2}


def main() -> None:
    inputs = dict(np.load(sys.argv[1]))
    cases = {}
    for name, function in CASES.items():
        names = ("query", "key", "value", "log_decay", "write")
        tensors = [torch.from_numpy(inputs[f"{name} {n}"]) for n in names]
        cases[name] = function, tensors
    outputs = {name: function(*tensors).numpy() for name, (function, tensors) in cases.items()}
    np.savez(sys.argv[2], **outputs)
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        name, _, way = line.strip().rpartition(" ")
        function, tensors = cases[name]
        start = time.perf_counter()
        if way == "forward":
            with torch.no_grad():
                function(*tensors)
        else:
            leaves = [t.clone().requires_grad_() for t in tensors]
            function(*leaves).square().sum().backward()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
