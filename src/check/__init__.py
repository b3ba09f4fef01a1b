"""Does a technique compute what Hugging Face's code computes? In Triton's interpreter, on a CPU."""
