"""The synthesize stage: a policy's own answers, scored and selected, as a data set of pairs or
demonstrations.

`config` is its YAML block (torch-free), `sampling` writes and scores the answers, `judge` asks a language
model for scores, `selection` chooses among them, `best_of_n` is the arithmetic, `summary` the figures,
`dataset` writes the directory, `stage` puts it together.
"""
