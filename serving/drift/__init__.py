"""Drift: do the requests that are served still look like the data that the model was trained on?"""
