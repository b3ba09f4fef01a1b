"""What a memory snapshot shows: who took the GPU's memory, what for, and when. Needs no torch.

`python -m src.explain FILE [FILE2]` reads snapshots of any PyTorch program. See `src/explain/__main__.py`.
"""
