"""The result of `speed.py` for people."""

from __future__ import annotations

from typing import Any

from benchmarks.generation.rates import RIVALS


def print_table(result: dict[str, Any]) -> None:
    """All numbers of the parts that were measured, one a line."""
    if "decode_tokens_per_s" in result:
        _print_decode(result["decode_tokens_per_s"])
    if "compose_ms" in result:
        _print_compose(result["compose_ms"])
    for length, rates in result.get("prefill_tokens_per_s", {}).items():
        _print_rates(f"read {length}", rates)
    for length, elapsed in result.get("first_token_ms", {}).items():
        print(f"prompt of {length:>4} tokens to first chunk, composed anew {elapsed:7.1f} ms")
    for name, seconds in result.get("cold_start_s", {}).items():
        print(f"cold start, {name:37} {seconds:8.2f} s")
    if "peak_memory_mb" in result:
        _print_memory(result["peak_memory_mb"], result["resident_mb_after_requests"])
    print_server(result.get("server", {}))


def print_server(loads: dict[str, Any]) -> None:
    """The response times of each number of clients."""
    for clients, load in loads.items():
        print(
            f"server, {clients} clients: p50 {load['p50_of_one_client']:.2f} x, p99 {load['p99_of_one_client']:.2f} x "
            f"one client's: {1e3 * load['p50_s']:.0f} and {1e3 * load['p99_s']:.0f} ms, "
            f"{load['calls_per_s']:.1f} calls/s, {load['tokens_per_s']:.0f} tokens/s"
        )


def _print_compose(compose: dict[str, float]) -> None:
    print(f"compose, {compose['prompt_tokens']}-token prompt to three bound adapters {compose['new']:6.1f} ms")
    for stage in ("retrieve", "merge", "bind"):
        print(f"  of which {stage:41}{compose[stage]:8.2f} ms")
    print(f"compose, the same prompt again                    {compose['cached']:8.2f} ms")


def _print_decode(decode: dict[str, Any]) -> None:
    _print_rates(f"decode ({decode['processes']} processes)", decode)
    for rival in RIVALS:
        for name, (low, high) in decode.get(f"ratio_{rival}_same_work_range", {}).items():
            print(f"decode, {name:22} {low:.2f} to {high:.2f} x {rival} at the same work")
    for name, share in decode["slower_than_base_alone"].items():
        print(f"decode, {name:22} rank {decode['rank'][name]:3}: {100 * share:5.1f} % slower than the base alone")
    for name, texts in decode.get("openvino_answers", {}).items():
        print(f"decode, {name:28} {texts['equal_tokens']} of {len(texts['ours'])} first tokens are ours")
    if "openvino_left_out" in decode:
        print(f"decode, openvino: left out: {decode['openvino_left_out']}")


def _print_rates(label: str, rates: dict[str, Any]) -> None:
    for name, rate in rates["median"].items():
        ratios = []
        for rival in RIVALS:
            same, alone = (rates.get(f"ratio_{rival}_{work}", {}) for work in ("same_work", "alone"))
            ratios += [f"{same[name]:.2f} x {rival} ({alone[name]:.2f} x it alone)"] if name in same else []
        print(f"{f'{label}, {name}':50} {rate:8.1f} tokens/s   {', '.join(ratios)}")
    if not any(f"ratio_{rival}_alone" in rates for rival in RIVALS):
        print(f"{label}, others: not measured (pip install llama-cpp-python openvino-genai, and give --gguf)")


def _print_memory(peaks: dict[str, Any], resident: dict[str, float]) -> None:
    print(f"graphs of the bundle {peaks['graphs']:.0f} MB; peak memory of `retrieve` {peaks['retrieve']:.0f} MB")
    for name in ("retrieved", "three_adapters", "llama_cpp"):
        for length, peak in peaks[name].items():
            print(f"peak memory, {name:15} {length:>4} tokens {peak:6.0f} MB (limit {peaks['allowed']:.0f})")
    sizes = ", ".join(f"{requests}: {mb:.0f} MB" for requests, mb in resident.items())
    print(f"resident memory after requests: {sizes}")
