"""Two evaluations side by side: what changed, whether it is real, and where it got worse."""
