"""The engine `vllm`: sampling, weights in flight, scores and pictures through vLLM."""
