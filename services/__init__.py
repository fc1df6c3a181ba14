"""The same teachers over HTTP, for people who may have the answers but not the weights.

A request's way: `app` (identity of the request, policy, problems) → `routes` → `wire` or `images` (bytes to
views) → `batching` (the model in its own thread) → `answers` (temperature and k) → `wire` or JSON. `client` and
`async_client` are the other side, for people and programs. A precompute job whose teacher is elsewhere goes
`http_teacher` → `paid_questions` → `journal` (found, or counted) → `replicas` → `transport`, and back into the journal.
"""
