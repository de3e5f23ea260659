"""Evaluation: statistics, generation, perplexity, reward-model quality, and the pipeline report."""
