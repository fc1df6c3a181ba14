"""A Ray build killed with SIGKILL half-way and resumed, against an undisturbed serial build of the same spec.

    python tests/benchmarks/kill_and_resume.py CONFIG [--set KEY=VALUE …]

Prints how many shards were committed at the kill, how many the second run computed, whether a shard that was
committed was touched again, and whether the two caches are the same files with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import teacher_cache as tc
from teacher_cache.spec import load_spec

BUILD = [str(Path(sys.executable).parent / "teacher-cache"), "build"]


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder, with the digest of its bytes."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def receipts(root: Path) -> dict[str, int]:
    """The receipts that are there, with the times of their making."""
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in root.glob("receipts/*/*.json")}


def main() -> None:
    """Builds, kills, resumes, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        spec = load_spec(arguments.config, [*arguments.overrides, f"cache={whole}"])
        undisturbed = tc.build(spec, "serial")
        sets = [word for item in [*arguments.overrides, f"cache={killed}"] for word in ("--set", item)]
        process = subprocess.Popen([*BUILD, arguments.config, *sets], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(receipts(killed)) < undisturbed.shards_total // 2:
            time.sleep(0.1)
        process.kill()
        process.wait()
        # Actors outlive their driver by a moment: what they commit in it is committed all the same.
        time.sleep(5)
        before, parts = receipts(killed), {path: path.stat().st_mtime_ns for path in killed.rglob("data/**/c/**/*")}
        resumed = subprocess.run(
            [*BUILD, arguments.config, *sets, "--json"], capture_output=True, text=True, check=True
        )
        again = [path for path, made in parts.items() if path.is_file() and path.stat().st_mtime_ns != made]
        print(f"shards in all                          {undisturbed.shards_total}")
        print(f"committed when killed with SIGKILL     {len(before)}")
        print(f"computed by the second run             {json.loads(resumed.stdout)['shards_built']}")
        print(f"committed files written again          {len(again)}")
        print(f"temporary files left                   {len(list(killed.rglob('*.tmp')))}")
        print(f"same files, same bytes as undisturbed  {tree(whole) == tree(killed)} ({len(tree(killed))} files)")
        print(f"verify, 256 rows recomputed            {tc.verify(killed, recompute=256, views=256).ok}")


if __name__ == "__main__":
    main()
