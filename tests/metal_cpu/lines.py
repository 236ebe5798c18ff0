"""Map an address in a compiled kernel to its line (ELF64, DWARF 4)."""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = b"kernel.metal"
Row = tuple[int, int, int, bool]  # address, file, line, end of a sequence


def _section(elf: bytes, wanted: bytes) -> bytes:
    start, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if elf[strings + name :].split(b"\0", 1)[0] == wanted:
            return elf[offset : offset + length]
    return b""


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return int(value)

    def leb(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.number("B")
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << shift) if signed and byte & 64 else value

    def string(self) -> bytes:
        end = self.data.index(b"\0", self.at)
        text, self.at = self.data[self.at : end], end + 1
        return text


def _files(reader: _Reader) -> list[bytes]:
    names = [b""]
    while reader.string():
        pass  # directories
    while name := reader.string():
        names.append(name)
        for _ in range(3):
            reader.leb()
    return names


def _rows(reader: _Reader, end: int, header: tuple[int, int, int, int, list[int]]) -> Iterator[Row]:
    """Run a line number program; header: minimum length, line base, line range, opcode base."""
    unit, base, span, first, lengths = header
    address, file, line = 0, 1, 1
    while reader.at < end:
        opcode = reader.number("B")
        if opcode >= first:
            address += (opcode - first) // span * unit
            line += base + (opcode - first) % span
            yield address, file, line, False
        elif opcode == 0:
            size = reader.leb()
            after, extended = reader.at + size, reader.number("B")
            if extended == 1:
                yield address, file, line, True
                address, file, line = 0, 1, 1
            elif extended == 2:
                address = reader.number("Q")
            reader.at = after
        elif opcode == 1:
            yield address, file, line, False
        elif opcode == 2:
            address += reader.leb() * unit
        elif opcode == 3:
            line += reader.leb(signed=True)
        elif opcode == 4:
            file = reader.leb()
        elif opcode == 8:
            address += (255 - first) // span * unit
        elif opcode == 9:
            address += reader.number("H")
        else:
            for _ in range(lengths[opcode - 1]):
                reader.leb()


@cache
def _table(library: Path) -> tuple[tuple[int, bool, int, bool], ...]:
    """Return (address, is in the kernel's text, line, end) of every row of the library."""
    data = _section(library.read_bytes(), b".debug_line")
    table, at = [], 0
    while at < len(data):
        reader = _Reader(data, at)
        at = reader.at + 4 + reader.number("I")
        if reader.number("H") != 4:
            continue
        program = 4 + reader.at + struct.unpack_from("<I", data, reader.at)[0]
        reader.at += 4
        unit, _, _, base, span, first = (reader.number(form) for form in "BBBbBB")
        lengths = [reader.number("B") for _ in range(first - 1)]
        names = _files(reader)
        reader.at = program
        for address, file, line, last in _rows(reader, at, (unit, base, span, first, lengths)):
            table.append((address, names[file] == SOURCE, line, last))
    return tuple(sorted(table, key=lambda row: row[0]))


def line_of(library: Path, offset: int) -> int:
    """Return the kernel line at an offset in the library, 0 if none.

    For an address in an inlined helper, returns the nearest kernel line before it in the function.
    """
    line = 0
    for address, ours, number, last in _table(library):
        if address > offset:
            break
        line = 0 if last else number if ours and number else line
    return line
