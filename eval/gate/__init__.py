"""Gates: bounds that the figures of a run have to keep before it is released."""
