"""Predicting, without a GPU: a model of PyTorch's allocator, a GPU that is not there, the dry run, the largest fit."""
