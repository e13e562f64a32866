"""The session settings of a bundle, and how the windows of one question are shared out."""

from __future__ import annotations

import pytest

from qadeploy.errors import InputError
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import narrow_windows


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
        ([], "session must be an object, not \\[\\]"),
        ({"disabled_optimizers": "GeluFusion"}, "disabled_optimizers .* a list of names"),
        ({"disabled_optimizers": [1]}, "a list of names"),
        ({"config": ["a"]}, "config .* an object"),
        ({"config": {"session.x": "1"}}, "set 'session.x' to '1', which qadeploy does not pass on"),
        ({"config": {"session.intra_op.allow_spinning": 1}}, "allow_spinning' to 1, which qadeploy does not pass on"),
        ({"config": {"session.collect_node_memory_stats_to_file": "/tmp/x"}}, "a bundle may only set session.intra_op"),
        ({"config": {"session.node_partition_config_file": ["x"]}}, "a bundle may only set session.intra_op"),
        ({"layout": "wide"}, "layout .* an object"),
        ({"layout": {"one": "wide", "threads": 0}}, "session.layout.threads must be a positive whole number, not 0"),
        ({"layout": {"one": "wide", "threads": True}}, "layout.threads .* a positive whole number"),
        ({"layout": {"one": "broad"}}, "session.layout.one must be wide or narrow, not 'broad'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
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
    assert [narrow_windows(settings, n, threads) for n in range(1, len(narrow) + 1)] == narrow


@pytest.mark.parametrize(("one", "narrow"), [("wide", [0, 0, 0]), ("narrow", [1, 2, 3])])
def test_a_stored_layout_overrules(one, narrow):
    assert [narrow_windows(SessionSettings(one=one), n, 2) for n in (1, 2, 3)] == narrow


def test_a_layout_holds_with_the_threads_that_it_was_measured_with():
    settings = SessionSettings.from_manifest({"layout": {"one": "narrow", "threads": 2}})
    assert narrow_windows(settings, 1, 2) == 1
    assert narrow_windows(settings, 1, 4) == narrow_windows(SessionSettings(), 1, 4) == 0
