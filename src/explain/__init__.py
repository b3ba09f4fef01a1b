"""What a memory snapshot shows: who took the GPU's memory, what for, and when.

`python -m src.explain FILE [FILE2]` reads snapshots of any PyTorch program. Only recording.py needs torch.
"""
