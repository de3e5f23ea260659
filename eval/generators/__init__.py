"""Where answers come from: a local model, an OpenAI-compatible endpoint, or a file of answers that exist."""
