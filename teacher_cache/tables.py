"""Tables beside the manifest: Parquet files under names made of their digests, checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.addition import TableRef
from teacher_cache.encodings import Shared
from teacher_cache.encodings.constants import from_columns
from teacher_cache.errors import CorruptionError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.storage.parquet_tables import Columns, columns_of, lists_of, table_bytes
from teacher_cache.storage.root import Root

OTHER = "Its digest is right, so it was written as it is: restore the manifest and its tables from one copy."


def write_table(root: Root, stem: str, columns: Mapping[str, Any]) -> TableRef:
    """Writes a table under a name made of its digest, so that an older manifest keeps its own."""
    reference, data = named_table(stem, columns)
    root.write(reference.path, data)
    return reference


def named_table(stem: str, columns: Mapping[str, Any]) -> tuple[TableRef, bytes]:
    """A table's bytes, and the name and digest under which a manifest will have it."""
    data = table_bytes(columns)
    digest = bytes_digest(data)
    return TableRef(path=f"{stem}-{digest[:12]}.parquet", digest=digest), data


def read_checked(root: Root, table: TableRef) -> bytes:
    """The bytes of a table of the manifest, checked against its digest."""
    hint = "Restore it from a copy, or build the cache again."
    try:
        data = root.read(table.path)
    except OSError as error:
        raise CorruptionError(table.path, "must be there: the manifest names it", error, hint) from error
    if bytes_digest(data) != table.digest:
        raise CorruptionError(table.path, f"must have digest {table.digest}", bytes_digest(data), hint)
    return data


def read_arrays(root: Root, table: TableRef, wanted: Mapping[str, str], rows: int | None = None) -> Columns:
    """A table of the manifest as arrays: its digest, columns and their types are checked.

    Args:
        root: the cache.
        table: its name and digest.
        wanted: each column's type as NumPy names it, or `string`; with `?` behind it where every row may be null.
        rows: how many it must have.

    Raises:
        CorruptionError: it is not the table that the manifest names, or no table of this kind.
    """
    data = read_checked(root, table)
    try:
        columns = columns_of(data, wanted)
    except (ValueError, OSError, LookupError, NotImplementedError) as error:
        raise CorruptionError(table.path, f"must be a table of {dict(wanted)}", error, OTHER) from error
    found = next(len(column) for column in columns.values() if column is not None)
    if rows is not None and found != rows:
        raise CorruptionError(table.path, f"must have the manifest's {rows} rows", found, OTHER)
    return columns


def read_columns(root: Root, table: TableRef, wanted: Mapping[str, type | tuple[type, ...]]) -> dict[str, list[Any]]:
    """A small table of the manifest as lists: its digest, columns and their types are checked.

    Raises:
        CorruptionError: it is not the table that the manifest names, or no table of this kind.
    """
    data = read_checked(root, table)
    try:
        columns = lists_of(data)
    except (ValueError, OSError, LookupError, NotImplementedError) as error:
        raise CorruptionError(table.path, "must be a Parquet table", error, OTHER) from error
    if set(columns) != set(wanted):
        raise CorruptionError(table.path, f"must have the columns {sorted(wanted)}", sorted(columns), OTHER)
    for name, kinds in wanted.items():
        wrong = next((value for value in columns[name] if not isinstance(value, kinds)), columns)
        if wrong is not columns:
            raise CorruptionError(table.path, f"must hold {kinds} in its column `{name}`", repr(wrong), OTHER)
    return columns


def read_constants(root: Root, table: TableRef | None) -> dict[str, Shared]:
    """What the rows of each field share, by field; nothing where no encoding needs it."""
    if table is None:
        return {}
    columns = read_columns(root, table, dict.fromkeys(("field", "name", "dtype", "shape"), str) | {"data": bytes})
    try:
        return from_columns(columns, table.digest)
    except (ValueError, TypeError) as error:
        raise CorruptionError(table.path, "must hold arrays by field and name", error, OTHER) from error
