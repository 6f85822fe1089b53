"""A qcow2 layer, written from front to back: what differs from the layer below, as data or as zeroes.

::

    header │ L1 table │ data clusters and, after those that it tells of, each L2 table │ refcount blocks │ refcount table

Source: the qcow2 specification in QEMU's ``docs/interop/qcow2.txt``.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from ovms import fsutil
from ovms.disk import qcow2
from ovms.errors import Unsupported
from ovms.spec import limits

_COPIED: Final = 1 << 63
_ZERO: Final = 1
_PIECE: Final = 1 << 20


class DiffWriter:
    """Writes such a layer into the empty file *fd*. What is neither data nor zero is that of the layer below.

    Parts come in ascending order, and begin and end at clusters, or at the disk's end.
    """

    def __init__(self, fd: int, virtual_size: int, cluster_bits: int) -> None:
        """Raises Unsupported where clusters are too small for such a large disk."""
        self._fd = fd
        self._size = virtual_size
        self._bits = cluster_bits
        self._cluster = 1 << cluster_bits
        self._entries = self._cluster // 8
        entries = max(1, -(-virtual_size // (self._cluster * self._entries)))
        if entries * 8 > limits.QCOW2_L1_MAX:
            raise Unsupported(
                f"clusters of {self._cluster} bytes are too small for a disk of {virtual_size} bytes in one layer",
                hint="'ovm export --format qcow2' makes one image of all layers",
            )
        self._l1 = [0] * entries
        #: Clusters that are in use.
        self._used = 1 + self._clusters(len(self._l1) * 8)
        self._l2: list[int] = []
        self._l2_of = -1

    @property
    def empty(self) -> bool:
        """Whether nothing was written."""
        return self._l2_of < 0

    def zero(self, start: int, length: int) -> None:
        """Bytes of the disk that are zero, whatever is below."""
        for number in self._numbers(start, length):
            self._table(number)[number % self._entries] = _ZERO

    def data(self, start: int, length: int, source: int) -> None:
        """Bytes of the disk that stand at the same place in the file *source*."""
        for number in self._numbers(start, length):
            table = self._table(number)  # may write the one before, and so take a cluster
            table[number % self._entries] = self._used << self._bits | _COPIED
            at, end = number << self._bits, min((number + 1) << self._bits, start + length)
            to = self._used << self._bits
            while at < end:
                piece = os.pread(source, min(_PIECE, end - at), at)
                if not piece:
                    break  # zeroes, up to the end of the file
                fsutil.pwrite_all(self._fd, piece, to)
                at, to = at + len(piece), to + len(piece)
            self._used += 1

    def finish(self) -> None:
        """Writes what is left: the image is whole then."""
        self._flush()
        first = self._used
        per_block = self._cluster // 2
        blocks = table = 0
        while True:
            total = first + blocks + table
            needed = -(-total // per_block)
            if needed == blocks and self._clusters(blocks * 8) == table:
                break
            blocks, table = needed, self._clusters(needed * 8)
        for number in range(blocks):
            count = min(per_block, total - number * per_block)
            fsutil.pwrite_all(self._fd, struct.pack(">H", 1) * count, (first + number) << self._bits)
        numbers = [(first + number) << self._bits for number in range(blocks)]
        table_at = (first + blocks) << self._bits
        fsutil.pwrite_all(self._fd, struct.pack(f">{blocks}Q", *numbers), table_at)
        fsutil.pwrite_all(self._fd, struct.pack(f">{len(self._l1)}Q", *self._l1), self._cluster)
        head = qcow2.plain_header(self._bits, self._size, len(self._l1), self._cluster, table_at, table)
        fsutil.pwrite_all(self._fd, head, 0)
        os.ftruncate(self._fd, total << self._bits)

    def _clusters(self, size: int) -> int:
        return -(-size // self._cluster)

    def _numbers(self, start: int, length: int) -> range:
        end = start + length
        assert start % self._cluster == 0
        assert end % self._cluster == 0 or end == self._size
        return range(start >> self._bits, -(-end // self._cluster))

    def _table(self, number: int) -> list[int]:
        # the L2 table that a cluster of the disk is told of in
        table = number // self._entries
        if table != self._l2_of:
            assert table > self._l2_of
            self._flush()
            self._l2_of, self._l2 = table, [0] * self._entries
        return self._l2

    def _flush(self) -> None:
        if self._l2_of < 0:
            return
        self._l1[self._l2_of] = self._used << self._bits | _COPIED
        fsutil.pwrite_all(self._fd, struct.pack(f">{self._entries}Q", *self._l2), self._used << self._bits)
        self._used += 1
