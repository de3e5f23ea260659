"""OpenAI-compatible HTTP in front of Triton: `posttrain gateway`. docs/gateway.md is the how-to."""
