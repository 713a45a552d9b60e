"""Shared by all benchmarks: timing, memory, processes of their own, random adapters, llama.cpp, result files."""
