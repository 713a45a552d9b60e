"""The result of `speed.py` for people."""

from __future__ import annotations

from typing import Any


def print_table(result: dict[str, Any]) -> None:
    """All numbers, one a line."""
    _print_compose(result["compose_ms"])
    _print_decode(result["decode_tokens_per_s"])
    for length, rates in result["prefill_tokens_per_s"].items():
        _print_rates(f"read {length}", rates)
    for length, elapsed in result["first_token_ms"].items():
        print(f"prompt of {length:>4} tokens to first chunk, composed anew {elapsed:7.1f} ms")
    for name, seconds in result["cold_start_s"].items():
        print(f"cold start, {name:37} {seconds:8.2f} s")
    _print_memory(result["peak_memory_mb"], result["resident_mb_after_requests"])
    for clients, load in result["server"].items():
        print(
            f"server, {clients} clients: p50 {1e3 * load['p50_s']:.0f} ms, p99 {1e3 * load['p99_s']:.0f} ms, "
            f"{load['calls_per_s']:.1f} calls/s, {load['tokens_per_s']:.0f} tokens/s"
        )


def _print_compose(compose: dict[str, float]) -> None:
    print(f"compose, {compose['prompt_tokens']}-token prompt to three bound adapters {compose['new']:6.1f} ms")
    for stage in ("retrieve", "merge", "bind"):
        print(f"  of which {stage:41}{compose[stage]:8.2f} ms")
    print(f"compose, the same prompt again                    {compose['cached']:8.2f} ms")


def _print_decode(decode: dict[str, Any]) -> None:
    _print_rates(f"decode ({decode['processes']} processes)", decode)
    for name, (low, high) in decode.get("ratio_same_work_range", {}).items():
        print(f"decode, {name:22} {low:.2f} to {high:.2f} x llama.cpp at the same work")
    for name, share in decode["slower_than_base_alone"].items():
        print(f"decode, {name:22} rank {decode['rank'][name]:3}: {100 * share:5.1f} % slower than the base alone")


def _print_rates(label: str, rates: dict[str, Any]) -> None:
    same, alone = rates.get("ratio_same_work", {}), rates.get("ratio_to_llama_cpp_alone", {})
    for name, rate in rates["median"].items():
        ratio = ""
        if name in same:
            ratio = f"   {same[name]:.2f} x llama.cpp at the same work, {alone[name]:.2f} x it alone"
        print(f"{f'{label}, {name}':46} {rate:8.1f} tokens/s{ratio}")
    if not same:
        print(f"{label}, llama.cpp: not measured (pip install llama-cpp-python, and give --gguf)")


def _print_memory(peaks: dict[str, Any], resident: dict[str, float]) -> None:
    print(f"graphs of the bundle {peaks['graphs']:.0f} MB; peak memory of `retrieve` {peaks['retrieve']:.0f} MB")
    for name in ("retrieved", "three_adapters", "llama_cpp"):
        for length, peak in peaks[name].items():
            print(f"peak memory, {name:15} {length:>4} tokens {peak:6.0f} MB (limit {peaks['allowed']:.0f})")
    sizes = ", ".join(f"{requests}: {mb:.0f} MB" for requests, mb in resident.items())
    print(f"resident memory after requests: {sizes}")
