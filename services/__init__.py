"""The same teachers over HTTP, for people who may have the answers but not the weights.

A request's way: `app` (identity of the request, policy, problems) → `routes` → `wire` or `images` (bytes to
views) → `batching` (the model in its own thread) → `answers` (temperature and k) → `wire` or JSON. `client` is
the other side: for people, and for a precompute job whose teacher is elsewhere.
"""
