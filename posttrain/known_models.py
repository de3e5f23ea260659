"""The models whose architecture is known without the Hub: their published config.json ships with posttrain.

What is in `architectures/` are published facts: sizes, positions, rope, special token ids. A test builds each
on the meta device and compares its parameters with the published number.
"""

from __future__ import annotations

from pathlib import Path

ARCHITECTURES = Path(__file__).parent / "architectures"


def known_config(ref: str) -> Path | None:
    """The config.json of a known model, for `AutoConfig.from_pretrained`; None for any other model.

    ref: a Hub id, "org/name" or "org/name@revision", or a path that ends in one, which is where
    `hf download org/name --local-dir models/org/name` puts it.
    """
    parts = Path(ref.partition("@")[0]).parts[-2:]
    if len(parts) < 2:
        return None
    path = ARCHITECTURES / f"{'--'.join(parts)}.json"
    return path if path.is_file() else None


def known_models() -> list[str]:
    """The Hub ids of the known models, sorted."""
    return sorted(path.stem.replace("--", "/") for path in ARCHITECTURES.glob("*.json"))
