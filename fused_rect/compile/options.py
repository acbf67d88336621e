"""The options of `torch.compile`: which are the rewrite's, and what the others mean for it."""

from __future__ import annotations

from typing import Any

from .rewrite import How

SITES = "fused_rect.sites"


def asked(mode: str | None, options: dict[str, Any] | None) -> tuple[How, dict[str, Any]]:
    """What is asked of the rewrite, and what of Inductor."""
    from torch._inductor import config, list_mode_options

    options = dict(options or {})
    sites = options.pop(SITES, "auto")
    if sites not in ("auto", "all"):
        raise ValueError(f"option {SITES!r} must be 'auto' or 'all', got {sites!r}")
    patches: dict[str, Any] = {**(list_mode_options(mode) if mode else {}), **options}

    def is_on(name: str) -> bool:
        return bool(patches.get(name, getattr(config, name)))

    templates = is_on("max_autotune") or is_on("max_autotune_gemm")
    return How(sites == "all", templates, is_on("fallback_random")), patches
