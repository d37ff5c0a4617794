"""A plan as text for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from memtrain.console import as_text
from memtrain.plan.command import gib


def as_lines(result: dict[str, Any], *, shardings: bool = False) -> str:
    """The tables, and what is wrong at the end."""
    if "sweep" in result:
        return _sweep(result)
    shown: dict[str, Any] = {"plan": result["name"]}
    devices = result["num_devices"]
    if result["target"]:
        shown["target"] = f"{result['target']}: {devices} x {result['device']}"
    shown["mesh"] = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    shown["batch"] = f"{result['batch_size']} rows of {result['seq_len']:,} tokens"
    if context := result["context"]:
        counts = Counter(context["hops"].values())
        hops = ", ".join(f"{hops} in {layers} layers" for hops, layers in counts.items())
        shown["context"] = (
            f"{context['layout']} layout, {context['strategy']}; permutes of one repeat, forward: "
            f"{hops or 'none'}" + (f"; {context['why']}" if context["why"] else "")
        )
    shown["parameters"] = f"{result['num_parameters']:,}"
    flops = result["flops_per_token"]
    shown["FLOPs per token"] = (
        f"{flops['training']:.4g} in training: 3 x (matmul {flops['matmul']:.4g}, "
        f"attention {flops['attention']:.4g}, memory {flops['memory']:.4g})"
    )
    _memory(result, shown)
    _step(result, shown)
    _compiled(result, shown)
    shown["layers"] = [
        {
            "kind": row["kind"],
            "layers": row["layers"] or "",
            "parameters": f"{row['parameters']:,}",
            "FLOPs/token": f"{row['flops_per_token']:.3g}",
            "state/token": _or_blank(row["state_bytes_per_token"]),
            "state/sequence": _or_blank(row["state_bytes_per_sequence"]),
            f"at {result['seq_len']:,}": _or_blank(row["state_bytes_at_seq_len"]),
        }
        for row in result["layers"]
    ]
    shown["memory of the train step"] = [
        {
            "part": part.replace("_", " "),
            "all devices": gib(row["all_devices"]),
            "one device": gib(row["device"]),
            "at the peak": _or_blank(row["at_peak"]),
        }
        for part, row in result["memory"]["parts"].items()
    ]
    if shardings:
        shown["shardings"] = [
            {
                "parameter": row["name"],
                "shape": "x".join(map(str, row["shape"])),
                "dtype": row["dtype"],
                "mesh axes": row["sharding"],
                "one device": gib(row["bytes_per_device"]),
            }
            for row in result["shardings"]
        ]
    text = as_text(shown)
    return text + (f"\n\n{result['error']}" if "error" in result else "")


def _or_blank(size: int) -> str:
    return gib(size) if size else ""


def _memory(result: dict[str, Any], shown: dict[str, Any]) -> None:
    memory = result["memory"]
    needs, has = memory["bytes_per_device"], memory["device_bytes"]
    share = f" of {gib(has)} ({needs / has:.0%})" if has else ""
    shown["memory per device"] = f"{gib(needs)}{share}, most in the {memory['peak_moment']}"
    if hosted := memory["host_bytes_per_device"]:
        shown["host memory"] = f"{gib(hosted)} of memory tables and moments, per device"
    if "longest_seq_len" in result:
        shown["longest context"] = f"{result['longest_seq_len']:,} tokens fit, all else alike"


def _step(result: dict[str, Any], shown: dict[str, Any]) -> None:
    step = result["step"]
    if step is None:
        return
    arithmetic = step["matmul"] + step["attention"] + step["memory"]
    shown["step"] = (
        f"{_time(step['seconds'])}, {step['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {step['mfu']:.1%}, bound by {step['bound']}"
    )
    shown["of it"] = (
        f"arithmetic {_time(arithmetic)} (matmul {_time(step['matmul'])}, attention "
        f"{_time(step['attention'])}, memory {_time(step['memory'])}), main memory "
        f"{_time(step['main_memory'])}, links {_time(sum(step['links'].values()))} of which "
        f"{_time(step['exposed'])} cannot hide"
    )
    if step["links"]:
        shown["links"] = ", ".join(f"{name} {_time(t)}" for name, t in step["links"].items())
    shares = step["assumed_shares_of_peak"].items()
    shown["assumed"] = "of the data sheet: " + ", ".join(f"{n} {share:.0%}" for n, share in shares)


def _compiled(result: dict[str, Any], shown: dict[str, Any]) -> None:
    found = result.get("compiled")
    if not found:
        return
    shown["compiler"] = (
        f"{gib(found['bytes_per_device'])}: arguments {gib(found['arguments'])}, the rest "
        f"{gib(found['bytes_per_device'] - found['arguments'])}; "
        f"the estimate is {found['estimate_over_compiler']:.0%} of it; "
        f"compiled in {found['seconds']:.0f} s"
    )
    if found["host"]:
        shown["compiler, host"] = f"{gib(found['host'])} of the host's memory, per device"
    permutes = found["permutes"]
    counts = [permutes[way] for way in ("forward", "backward")]
    if any(c["synchronous"] + c["asynchronous"] for c in counts):
        shown["permutes"] = "; ".join(
            f"{way}: {c['overlapping']} of {c['synchronous'] + c['asynchronous']} overlap kernels"
            + (f", {c['synchronous']} are synchronous" if c["synchronous"] else "")
            for way, c in zip(("forward", "backward"), counts, strict=True)
        )


def _sweep(result: dict[str, Any]) -> str:
    rows = []
    for row in result["sweep"]:
        key = next(iter(row))
        cells = {
            key: row[key],
            "devices": row["num_devices"],
            "one device": gib(row["bytes_per_device"]),
        }
        if "compiled_bytes_per_device" in row:
            cells["compiler"] = gib(row["compiled_bytes_per_device"])
        if row["fits"] is not None:
            cells["fits"] = row["fits"]
        if "seconds" in row:
            cells |= {
                "step": _time(row["seconds"]),
                "tokens/s": f"{row['tokens_per_second']:,.0f}",
                "bound by": row["bound"],
            }
        rows.append(cells)
    shown = {"plan": result["name"]}
    if result["target"]:
        shown["target"] = f"{result['target']}, {gib(result['device_bytes'])} a device"
    if "plot" in result:
        shown["plot"] = result["plot"]
    return as_text(shown | {"sweep": rows})


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    if seconds >= 0.1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"
