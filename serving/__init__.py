"""Export to Triton Inference Server, the embedded server, and the proof that the trained model is served."""
