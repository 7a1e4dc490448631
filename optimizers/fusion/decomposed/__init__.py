"""Attention that a graph spells out in plain operators: its heads, its mask, how long its cache is."""
