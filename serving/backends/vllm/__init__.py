"""Stand-in for Triton's vLLM backend on transformers. Runs inside tritonserver, in an environment without posttrain."""
