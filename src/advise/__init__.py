"""What to turn on for a model, a GPU and a batch, found by dry runs: nothing here needs a GPU."""
