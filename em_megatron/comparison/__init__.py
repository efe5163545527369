"""Grids of runs that differ in memory kind, memory size, model size, corpus or seed: planned, run, and put side by side."""
