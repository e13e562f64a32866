"""The session settings of a bundle, and how the windows of one question are shared out."""

from __future__ import annotations

import pytest

from qadeploy.errors import BundleError
from qadeploy.inference.layout import SessionSettings


@pytest.mark.parametrize("values", [None, {}, {"layout": {}}, {"layout": {"one": None}, "another": 1}])
def test_nothing_stored_is_the_default(values):
    assert SessionSettings.from_manifest(values) == SessionSettings((), {}, None)


def test_what_is_stored_is_read():
    config = {"session.intra_op.allow_spinning": "0"}
    stored = {"disabled_optimizers": ["GeluFusion"], "config": config, "layout": {"one": "narrow"}}
    assert SessionSettings.from_manifest(stored) == SessionSettings(("GeluFusion",), config, "narrow")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "session of the session settings is \\[\\], an object"),
        ({"disabled_optimizers": "GeluFusion"}, "disabled_optimizers .* a list of names"),
        ({"disabled_optimizers": [1]}, "a list of names"),
        ({"config": ["a"]}, "config .* an object"),
        ({"config": {"session.x": 1}}, "texts by name"),
        ({"layout": "wide"}, "layout .* an object"),
        ({"layout": {"one": "wide", "threads": 0}}, "layout.threads .* 0, a positive whole number"),
        ({"layout": {"one": "wide", "threads": True}}, "layout.threads .* a positive whole number"),
        ({"layout": {"one": "broad"}}, "layout.one .* 'broad', wide or narrow"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(BundleError, match=message):
        SessionSettings.from_manifest(values)


@pytest.mark.parametrize(
    ("threads", "narrow"),
    [
        (2, [0, 2, 2, 4, 4, 6]),  # an odd one is left over, and runs wide
        (4, [0, 0, 3, 4, 4, 4, 7, 8]),  # s = 2.5: two are sooner wide, three narrow
    ],
)
def test_full_rounds_run_narrow_and_few_left_over_wide(threads, narrow):
    settings = SessionSettings()
    assert [settings.narrow_windows(n, threads) for n in range(1, len(narrow) + 1)] == narrow


@pytest.mark.parametrize(("one", "narrow"), [("wide", [0, 0, 0]), ("narrow", [1, 2, 3])])
def test_a_stored_layout_overrules(one, narrow):
    assert [SessionSettings(one=one).narrow_windows(n, 2) for n in (1, 2, 3)] == narrow


def test_a_layout_holds_with_the_threads_that_it_was_measured_with():
    settings = SessionSettings.from_manifest({"layout": {"one": "narrow", "threads": 2}})
    assert settings.narrow_windows(1, 2) == 1
    assert settings.narrow_windows(1, 4) == SessionSettings().narrow_windows(1, 4) == 0
