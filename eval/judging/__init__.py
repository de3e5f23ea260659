"""Pairwise judging: who gave the better answer, according to a rubric, a reward model, a language model, people."""
