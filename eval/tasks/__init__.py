"""Evaluation tasks whose verdict a program gives."""
