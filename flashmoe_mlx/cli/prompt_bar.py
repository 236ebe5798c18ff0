"""A bar while the model reads a prompt: by layers within each chunk, where the store sees them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..progress import bar


class PromptProgress:
    """Adds a prompt's tokens to a bar, from mlx-lm's callback and from the store's requests."""

    def __init__(self, add: Callable[[int], None], chunk: int, layers: int) -> None:
        """Start at zero; mlx-lm reads `chunk` tokens at a time."""
        self._add, self._chunk, self._layers = add, chunk, layers
        self._shown = self._done = self._size = 0

    def chunk_done(self, done: int, total: int) -> None:
        """Receive mlx-lm's `prompt_progress_callback`."""
        self._done, self._size = done, min(self._chunk, max(0, total - done))
        self._show(done)

    def asked(self, layer: int, experts: Sequence[int]) -> None:
        """Receive a request of the store: the chunk has reached this layer."""
        self._show(self._done + self._size * layer // self._layers)

    def loading(self, layer: int, ids: mx.array, slots: mx.array) -> None:
        """Ignore loads by the device, which may not have happened yet."""

    def _show(self, reached: int) -> None:
        if reached > self._shown:
            self._add(reached - self._shown)
            self._shown = reached


@contextmanager
def reading_prompt(model: Any, tokens: int, chunk: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block reads a prompt; yields the callback for mlx-lm."""
    store = model._store
    with bar(tokens, " tokens", "reading the prompt") as shown:
        progress = PromptProgress(shown.update, chunk, len(model.layers))
        watched = store is not None and store.observer is None  # --stats observes it itself
        if watched:
            store.observer = progress
        try:
            yield progress.chunk_done
        finally:
            if watched:
                store.observer = None
