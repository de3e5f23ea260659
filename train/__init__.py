"""Training stages: base, supervised fine-tuning, reward model, preferences, PPO, merging.

TRL reports every trainer it builds to a server; importing this package turns that off unless the environment
says otherwise.
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
