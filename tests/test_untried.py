"""A torch that is newer than any that was tried: one warning at import, with what was tried and the remedy."""

import subprocess
import sys
import warnings

import pytest
import versions

from fused_rect import untried, version

AFTER = f"{version.NEWEST_TORCH[0]}.{version.NEWEST_TORCH[1] + 1}"
AT = f"{version.NEWEST_TORCH[0]}.{version.NEWEST_TORCH[1]}"


def test_the_newest_that_was_tried_is_the_newest_of_the_tests():
    assert max(tuple(map(int, each.torch.split(".")[:2])) for each in versions.VERSIONS) == version.NEWEST_TORCH


@pytest.mark.parametrize(
    "found", [f"{AFTER}.0", f"{AFTER}.0+cu130", f"{AFTER}.0a0+git1f2e3d4", f"{AFTER}.0.dev20270101", "3.0.0"]
)
def test_a_later_minor_release_is_warned_of(found):
    with pytest.warns(UserWarning) as seen:
        untried.warn(found)
    assert len(seen) == 1 and all(part in str(seen[0].message) for part in (f"torch {found}", AT, "install"))


@pytest.mark.parametrize(
    "found",
    ["2.9.1", "2.13.0+cpu", "2.13.0a0+git1f2e3d4", f"{AT}.0.dev20261001+cpu", f"{AT}.1", f"{AT}.7+rocm7", "own-build"],
)
def test_what_was_tried_its_patches_and_what_is_no_number_are_not(found):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untried.warn(found)


SOON = f"""
import warnings, torch
torch.__version__ = type(torch.__version__)("{AFTER}.0+cpu")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fused_rect as fr
    import fused_rect.compile, fused_rect.perf
    layer = fr.nn.ConvReLU2d(3, 4, 3)
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
print([(w.filename, str(w.message)) for w in seen if "fused_rect" in str(w.message)])
assert layer[0].weight.grad.any()
"""


def test_it_is_said_once_where_fused_rect_is_imported_and_everything_works():
    done = subprocess.run([sys.executable, "-c", SOON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"torch {AFTER}.0+cpu is newer than {AT}") == 1 and done.stdout.startswith("[('<string>'")
