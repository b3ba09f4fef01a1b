"""Grids of runs, what they showed side by side: figures and tables."""
