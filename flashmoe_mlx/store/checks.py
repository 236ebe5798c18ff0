"""Compare every expert with its checksum after its read, before anything uses it."""

import shlex
import zlib
from collections.abc import Sequence

from ..errors import FlashMoEError
from ..format.layout import (
    EXPERT_DIR,
    MANIFEST,
    ExpertLayout,
    LayerLayout,
    read_manifest,
    record_checksums,
)
from .backend import Backend


class RecordChecks:
    """The CRC-32 of every expert, from a converted directory's manifest."""

    def __init__(self, layout: ExpertLayout, backend: Backend) -> None:
        """Read the manifest.

        Raises:
            FlashMoEError: an expert has no checksum, or experts go into GPU memory, which the host
                cannot read.
        """
        if not backend.visible:
            raise FlashMoEError(
                "verify = true: experts in an NVIDIA GPU's memory cannot be compared with their "
                f"checksums. Run `flashmoe-convert verify {shlex.quote(str(layout.directory))}` "
                "and leave verify out."
            )
        if layout.kind != "packed":
            raise FlashMoEError(
                f"verify = true: {layout.directory} is not a converted model, so its experts have "
                "no checksums. Convert it with flashmoe-convert, or leave verify out."
            )
        path = layout.directory / EXPERT_DIR / MANIFEST
        whole = record_checksums(read_manifest(path))
        self._expected = [_of_part(whole[x.layer : x.layer + 1], x) for x in layout.layers]
        self._layout = layout
        found, experts = list(map(len, self._expected)), [x.num_experts for x in layout.layers]
        if found != experts:
            raise FlashMoEError(
                f"{path}: has {sum(found)} checksums for {sum(experts)} experts. Run "
                "flashmoe-convert again."
            )

    def compare(self, layer: int, expert: int, rows: Sequence[memoryview]) -> FlashMoEError | None:
        """Compare an expert's nine tensors, given in file order; return the error, or None."""
        found, expected = 0, self._expected[layer][expert]
        for row in rows:
            found = zlib.crc32(row, found)
        if found == expected:
            return None
        part = self._layout.layers[layer]
        number = part.numbers[expert] if part.numbers else expert
        return FlashMoEError(
            f"{part.fields[0].file}: layer {part.layer} expert {number} is not as "
            f"it was written (checksum {found:08x}, expected {expected:08x}); nothing was computed "
            f"from it. Run `flashmoe-convert verify {shlex.quote(str(self._layout.directory))} "
            "--repair --hf-path SOURCE`."
        )


def _of_part(checksums: list[list[int]], layer: LayerLayout) -> list[int]:
    """Return the checksums of a layer's part, from a list of those of all its experts, or none."""
    found = checksums[0] if checksums else []
    if layer.numbers is None or len(found) == layer.num_experts:
        return found
    return [found[number] for number in layer.numbers if number < len(found)]
