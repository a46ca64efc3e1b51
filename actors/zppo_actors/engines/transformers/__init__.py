"""The engine `transformers`: batched sampling with continuous admission, in this process."""
