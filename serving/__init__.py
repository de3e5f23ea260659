"""Export to Triton Inference Server, the embedded server, and the proof that what is served is what was trained."""
