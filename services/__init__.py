"""The same teachers over HTTP, for people who may have the answers but not the weights.

A request's way: `app` (its id, whose key it brings, problems) → `predicting` → `body` → `wire` or `images` (bytes to
views) or `naming` (keys and views) → `admission` (policy and budgets) → `planning` or `planning_named` (what the cache
answers: `library`, `held`, `pixel_index`, `rendered`) → `answering` (`kept_answers`, then `batching` and `engine`; the
model itself is in a thread of the process of `device_process`) → `answers` (temperature, k, rounding) → `responding` →
`app` (what it cost is paid, and the audit has its line). `routes` are the other paths. `adopting` is a build that takes
over what was kept. `client` and `async_client` are the other side, for people and programs. A precompute job whose
teacher is elsewhere goes `http_teacher` → `paid_questions` → `journal` (found, or counted) → `replicas` → `transport`,
and back into the journal.

Who asks: `keys` (the file) and `identity` (the door), `policy` (what a key may ask), `usage` and `usage_file` (what it
has spent), `audit*` (what became of it), all of them opened by `books` in one `state_folder`, and each written by a
`scribe`, so that the event loop never waits for a disk. What is known of a request is its `visit`, from which `metrics`
and `request_log` are made. `commands` is for whoever runs the server, `server` its process, `admin` the port beside.
"""
