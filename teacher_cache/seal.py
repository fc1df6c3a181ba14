"""Sealing: the receipts of a complete cache become one table, and the manifest its root."""

from __future__ import annotations

import contextlib
from pathlib import Path

from teacher_cache import samples as sample_table
from teacher_cache.encodings import fidelity
from teacher_cache.errors import BuildError
from teacher_cache.lease import sweep
from teacher_cache.manifest import Manifest, write_manifest
from teacher_cache.receipts import Receipt, add_up, read_receipts
from teacher_cache.spec import BuildSpec


def require_fidelity(spec: BuildSpec, manifest: Manifest, root: Path) -> None:
    """Raises where the measured error of the logits is beyond what the configuration allows."""
    bound = spec.fidelity.max_kl
    if bound is None or "logits" not in manifest.fields:
        return
    found = add_up(manifest, read_receipts(root, manifest)).fidelity["logits"]
    worst = max(fidelity.TEMPERATURES, key=lambda temperature: found.get(f"kl_t{temperature}", 0.0))
    value = found.get(f"kl_t{worst}", 0.0)
    if value > bound:
        rule = f"mean KL(teacher ‖ decoded) at T = {worst} must be at most {bound:g}"
        kept = manifest.encodings["logits"].name
        hint = f"Keep more than {kept} does, in a new cache; or raise the bound: the same command then seals this one."
        raise BuildError("fidelity.max_kl", f"logits: {rule}", f"{value:.3g} over {found['rows']:.0f} rows", hint)


def _require_complete(manifest: Manifest, receipts: list[Receipt]) -> None:
    """Whatever leads here: a cache with a hole is not sealed."""
    committed = {(receipt.view, receipt.shard) for receipt in receipts}
    places = [(view, shard) for view in range(manifest.views) for shard in range(manifest.grid.shards)]
    missing = [place for place in places if place not in committed]
    if missing:
        view, shard = missing[0]
        rule = f"must be committed before the cache is sealed, and {len(missing)} shards are not"
        raise BuildError(f"view {view}, shard {shard}", rule, "no receipt", "Run the same command again: it goes on.")


def seal(root: Path, manifest: Manifest) -> Manifest:
    """Turns the receipts of a complete cache into one table, and the manifest into its root.

    The order makes a kill harmless: tables under new names, then the manifest, then the receipts go.
    """
    receipts = read_receipts(root, manifest)
    _require_complete(manifest, receipts)
    beginning = sample_table.read_samples(root, manifest.samples)
    final = sample_table.with_receipts(beginning, manifest, receipts)
    records = [(receipt, record) for receipt in receipts for record in receipt.files]
    columns = {
        "view": [receipt.view for receipt, _ in records],
        "shard": [receipt.shard for receipt, _ in records],
        "path": [record.path for _, record in records],
        "size": [record.size for _, record in records],
        "digest": [record.digest for _, record in records],
    }
    table = sample_table.write_table(root, "receipts", columns)
    samples = sample_table.write_samples(root, final)
    sealed = manifest.model_copy(
        update={
            "state": "sealed",
            "samples": samples,
            "receipts": table,
            "totals": add_up(manifest, receipts),
        }
    )
    write_manifest(root, sealed)
    clear_superseded(root, sealed)
    return sealed


def clear_superseded(root: Path, manifest: Manifest) -> None:
    """Removes what a sealed manifest has taken the place of, and what builders that are gone have left.

    A kill in the middle is made good by the next call, and two may do it at the same time.
    """
    kept = {manifest.samples.path, manifest.receipts.path if manifest.receipts else ""}
    for path in [*root.glob("samples-*.parquet"), *root.glob("receipts-*.parquet")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
    folder = root / "receipts"
    if folder.is_dir():
        for path in folder.glob("*.json"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
    sweep(root)
