"""The core that every stage shares: command line, configuration, run directories, pipeline, errors.

Importing this package, or any module in it, never imports torch.
"""

__version__ = "0.1.0"
