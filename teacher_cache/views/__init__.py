"""Step 2, view: (sample, view number) to the exact augmented input, a pure function of identity and seed."""

from teacher_cache.views.engine import Recipe, Views, normalize, open_recipe, render_views

__all__ = ["Recipe", "Views", "normalize", "open_recipe", "render_views"]
