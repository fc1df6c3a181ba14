"""Parquet with `image` {bytes, path} and `label`: the layout that Hugging Face data sets use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import BrokenSample, Channels, Item, decode_image


class ParquetImages:
    """One or several files, in the order given. A key is the row's image path, or `<file stem>/<row>`."""

    def __init__(self, paths: tuple[str, ...], class_names: tuple[str, ...] | None, channels: Channels = None) -> None:
        self.channels = channels
        tables = [_read(path) for path in paths]
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowInvalid as error:
            hint = "Give files of one data set."
            raise SourceError("source.path", f"must have one schema: {error}", paths, hint) from error
        # 32-bit offsets end at 2 GB of images; combined, they need 64 bits.
        self._bytes = compute.struct_field(table["image"], "bytes").cast(pa.large_binary()).combine_chunks()
        given = compute.struct_field(table["image"], "path").to_pylist()
        stems = [(Path(path).stem, len(part)) for path, part in zip(paths, tables, strict=True)]
        names = [f"{stem}/{row}" for stem, rows in stems for row in range(rows)]
        self.keys = [path or name for path, name in zip(given, names, strict=True)]
        self.labels: NDArray[np.int64] | None = None
        if "label" in table.column_names:
            column = table["label"]
            if not pa.types.is_integer(column.type) or column.null_count:
                found = f"{column.type} with {column.null_count} missing"
                raise SourceError("source.label", "must be integers, none missing", found, "Write class numbers.")
            self.labels = column.to_numpy().astype(np.int64)
        self.class_names = class_names or _huggingface_names(tables[0].schema)
        lengths = compute.fill_null(compute.binary_length(self._bytes), 0)
        self.sizes: NDArray[np.int64] = lengths.to_numpy(zero_copy_only=False).astype(np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, index: int) -> Item:
        """Decodes one row's image bytes."""
        data = self._bytes[index].as_py()
        if data is None:
            raise BrokenSample("the row has no image bytes")
        return decode_image(data, self.channels)


def _read(path: str) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in ("image", "label") if name in names])
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError("source.path", "must be a readable Parquet file", path, f"Check it: {error}") from error
    kind = table.schema.field("image").type if "image" in table.column_names else None
    if kind is None or not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        hint = "Write images as {bytes: binary, path: string}."
        raise SourceError("source.path", "needs a column `image` of {bytes, path}", names, hint)
    return table


def _huggingface_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Class names from the `huggingface` key of the schema's metadata, where a data set wrote one."""
    raw = (schema.metadata or {}).get(b"huggingface")
    label = json.loads(raw).get("info", {}).get("features", {}).get("label", {}) if raw else {}
    return tuple(label["names"]) if "names" in label else None
