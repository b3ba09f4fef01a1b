"""Ours beside DeepSpeed: overlapped Adam, the floor, host memory, the supervisor and the ranks of a job."""
