"""Ours beside DeepSpeed: overlapped Adam, the floor, host memory, several ranks."""
