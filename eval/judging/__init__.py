"""Pairwise judging: who gave the better answer, by a rubric, a reward model, a language model or people."""
