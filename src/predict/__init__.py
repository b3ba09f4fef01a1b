"""Predicting, without a GPU: a model of PyTorch's allocator, a GPU that is not there, the dry run, its step's time."""
