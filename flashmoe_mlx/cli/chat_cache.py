"""The prompt cache of a chat: after each turn, only new tokens are processed.

A chat template may rewrite earlier turns (Qwen's drops their thinking), and GatedDeltaNet's state
cannot be trimmed. So a snapshot is kept of the state before the last answer.
"""

import copy
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class ChatCache:
    """The model's state after `tokens`, and a snapshot at one of its prefixes.

    Attributes:
        tokens: ids that the state stands for.
        entries: mlx-lm's caches, one per layer.
    """

    def __init__(self, model: Any) -> None:
        """Start with no tokens."""
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tokens: list[int] = []
        self.entries: list[Any] = self._model.make_cache()
        self._saved: tuple[list[int], list[Any]] | None = None

    def reuse(self, prompt: list[int]) -> int:
        """Return to the longest known prefix of a prompt; return its length.

        At least one token of the prompt is left to process.
        """
        if not _begins(prompt, self.tokens):
            if self._saved and _begins(prompt, self._saved[0]):
                self._restore()
            else:
                self.clear()
        return len(self.tokens)

    def processed(self, tokens: list[int]) -> None:
        """Note which tokens the model was given in all, of which it may have processed fewer."""
        (length,) = {entry.offset for entry in self.entries if isinstance(entry, KVCache)}
        self.tokens = tokens[:length]

    def save(self) -> None:
        """Take a snapshot. Attention's cache needs none: it is trimmed."""
        mx.eval([entry.state for entry in self.entries])
        self._saved = list(self.tokens), [_snapshot(entry) for entry in self.entries]

    def _restore(self) -> None:
        assert self._saved
        tokens, states = self._saved
        for index, state in enumerate(states):
            if isinstance(entry := self.entries[index], KVCache):
                entry.trim(entry.offset - len(tokens))
            else:
                self.entries[index] = copy.deepcopy(state)
        self.tokens = list(tokens)


def _begins(prompt: list[int], tokens: list[int]) -> bool:
    return len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens


def _snapshot(entry: Any) -> Any:
    return None if isinstance(entry, KVCache) else copy.deepcopy(entry)
