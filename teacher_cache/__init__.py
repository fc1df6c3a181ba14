"""Run frozen teachers once over seeded views, keep their soft targets, read them at memory speed.

The ten steps, from `source` to `train`, are the packages' names; the first seven are here:

1. `sources`      a data set with stable keys and a fingerprint
2. `views`        (sample, view number) to the exact augmented input
3. `teachers`     a frozen model: inputs to named fields
4. `encodings`    what is kept of a field, with a measured error
5. `storage`      one (view, range of samples) written whole, checksummed, made visible
6. `manifest`     the only authority on what exists
7. `reader`       opens a cache, refuses what does not fit, gathers rows, decodes

`shard_job` is steps 1 to 5 for one shard; `build` runs it over all shards, in a loop or on Ray (`precompute`).
"""

from teacher_cache.abandon import AbandonReport, abandon
from teacher_cache.build import BuildReport, build
from teacher_cache.encodings import DenseTarget, SparseTarget, Target
from teacher_cache.errors import CacheError, TeacherCacheError
from teacher_cache.reader import Cache
from teacher_cache.reader import open_cache as open
from teacher_cache.repair import RepairReport, repair
from teacher_cache.spec import BuildSpec, load_spec
from teacher_cache.verify import VerifyReport, verify

__all__ = [
    "AbandonReport",
    "BuildReport",
    "BuildSpec",
    "Cache",
    "CacheError",
    "DenseTarget",
    "RepairReport",
    "SparseTarget",
    "Target",
    "TeacherCacheError",
    "VerifyReport",
    "abandon",
    "build",
    "load_spec",
    "open",
    "repair",
    "verify",
]
