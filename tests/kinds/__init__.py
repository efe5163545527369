"""Tests of what the memory kinds say of themselves."""
