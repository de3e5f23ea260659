"""What training will need, before any of it runs: `posttrain plan` (docs/plan.md)."""
