"""Measuring: a reference in float32, its distance from stored weights, and the choice of mixed precision."""
