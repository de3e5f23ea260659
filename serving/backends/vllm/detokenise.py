"""Text of an answer as its tokens arrive: no half character, no beginning of a stop string.

Only a window of the last tokens is decoded again for each new one, so a token costs the same at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 6
WINDOW_TOKENS = 16
MAX_WINDOW_TOKENS = 40
HALF_CHARACTER = "\ufffd"


class AnswerText:
    """The text of one answer."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        """`prompt_ids`: the answer is decoded behind the last of them, so that a leading space survives."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._held_back = max(map(len, stop), default=1) - 1
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._read = len(self._decode(self._window))
        self._boundary = len(self._window)
        self._unsent = ""

    def add(self, token: int, last: bool) -> tuple[str, bool]:
        """Text that may be sent after one more token, and whether a stop string ended the answer.

        last: nothing follows, so nothing is held back but what a stop string cuts off.
        """
        self._unsent += self._new_text(token, last)
        cut = min((at for at in map(self._unsent.find, self._stop) if at >= 0), default=-1)
        if cut >= 0:
            return self._unsent[:cut], True
        safe = len(self._unsent) if last else max(len(self._unsent) - self._held_back, 0)
        text, self._unsent = self._unsent[:safe], self._unsent[safe:]
        return text, False

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _new_text(self, token: int, last: bool) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        length = len(self._window)
        whole = not text.endswith(HALF_CHARACTER)
        # No character is as long as the window: only the last replacement character can still become one.
        garbage = length >= MAX_WINDOW_TOKENS and not whole
        if whole or last:
            end = len(text)
        elif garbage:
            end = len(text) - 1
        else:
            end = len(text.rstrip(HALF_CHARACTER))
        new = text[self._read : end]
        self._read = max(self._read, end)
        if garbage:
            self._move_window(length - WINDOW_TOKENS, held=1)
        elif whole and length >= WINDOW_TOKENS:
            self._move_window(self._boundary, held=0)
        elif whole and length <= WINDOW_TOKENS // 2:
            self._boundary = length
        return new

    def _move_window(self, start: int, held: int) -> None:
        self._window = self._window[start:]
        self._boundary = len(self._window)
        self._read = len(self._decode(self._window)) - held
