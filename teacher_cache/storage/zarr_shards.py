"""Zarr v3: sharded, uncompressed, every chunk under its crc32c; written and mapped by us, readable by any Zarr.

One array for each part, along rows. Ragged parts are flat arrays along elements, with one shard for each of ours,
and in place of `count` an array `offsets` says where each row ends in its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.base import OFFSETS, Grid, Group
from teacher_cache.storage.files import FileRecord
from teacher_cache.storage.ragged import flatten, lengths_of, offsets_of, require_room
from teacher_cache.storage.root import Root
from teacher_cache.storage.zarr_files import layout_of
from teacher_cache.storage.zarr_groups import ZarrGroup, arrays_of, shard_path


@dataclass(frozen=True)
class ZarrStore:
    """One array for each part of each group, one file for each shard."""

    grid: Grid

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """Every `zarr.json`, made by zarr itself."""
        files: dict[str, Buffer] = {}
        memory = MemoryStore(files)
        folders = {
            "/".join(group.path.split("/")[:depth]) for group in groups for depth in range(group.path.count("/") + 2)
        }
        for folder in sorted(folders):
            zarr.create_group(memory, path=folder)
        for group in groups:
            require_room(group, self.grid)
            for part in arrays_of(group):
                self._create(memory, f"{group.path}/{part.name}", part)
        return {f"data/{key}": value.to_bytes() for key, value in sorted(files.items())}

    def _create(self, memory: MemoryStore, name: str, part: Part) -> None:
        layout = layout_of(part, self.grid)
        inner: list[ArrayBytesCodec | BytesBytesCodec] = [BytesCodec(endian="little"), Crc32cCodec()]
        sharding = ShardingCodec(
            chunk_shape=layout.chunk_shape,
            codecs=inner,
            index_codecs=inner,
            index_location="end",
        )
        length = self.grid.shards * layout.shard_shape[0] if part.ragged else self.grid.rows
        zarr.create(
            store=memory,
            path=name,
            shape=(length, *layout.shard_shape[1:]),
            chunks=layout.shard_shape,
            dtype=part.dtype,
            codecs=[sharding],
            fill_value=part.fill,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )

    def paths(self, group: Group, shard: int) -> list[str]:
        """One file for each part."""
        return [shard_path(group, part, shard) for part in arrays_of(group)]

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """One file for each part; a ragged last shard is padded with the fill value, as Zarr asks."""
        require_room(group, self.grid)
        stored = dict(columns)
        if group.ragged:
            lengths = lengths_of(group, columns)
            stored[OFFSETS] = offsets_of(lengths)
            stored |= {part.name: flatten(columns[part.name], lengths) for part in group.ragged}
        return [
            layout_of(part, self.grid).pack(shard_path(group, part, shard), stored[part.name])
            for part in arrays_of(group)
        ]

    def damage(
        self, root: Root, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """Every chunk of every part; where all are sound, whether ragged parts agree with their offsets."""
        yield from self.open_group(root, group, lambda _: records).damage(shard)

    def open_group(self, root: Root, group: Group, records_of: Callable[[int], Mapping[str, FileRecord]]) -> ZarrGroup:
        """Maps files when their rows are first asked for."""
        return ZarrGroup(root, group, self.grid, records_of)
