"""Measurements of speed and memory, each against what a user would pick instead, in one run (`launch/benchmark.py`).

options → candidates of a subcommand → interleaved rounds → rows with their floors → figures and targets → report
"""
