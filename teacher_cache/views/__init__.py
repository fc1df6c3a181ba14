"""Step 2, view: (sample, view number) to the exact augmented input, a pure function of identity and seed."""

from teacher_cache.views.engine import Recipe, Views, normalize, open_recipe, render_again, render_views
from teacher_cache.views.partners import Pool
from teacher_cache.views.rendering import How, Mixed

__all__ = [
    "How",
    "Mixed",
    "Pool",
    "Recipe",
    "Views",
    "normalize",
    "open_recipe",
    "render_again",
    "render_views",
]
