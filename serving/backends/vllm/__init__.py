"""Stand-in for Triton's vLLM backend; runs inside tritonserver, in an environment without posttrain."""
