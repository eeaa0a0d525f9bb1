"""Figures of audits, against shares counted by hand."""

import numpy as np
import pandas as pd
import pytest

from divergence_lens import plots


def test_the_calibration_curve_counts_sets_below_each_level():
    even = (np.arange(200) + 0.5) / 200
    p = np.stack([even, even**0.5])
    table = pd.DataFrame({"auditors": np.repeat(["prompted", "both"], 200), "p": p.ravel()})
    figure = plots.calibration_curve(table, headline="False alarms", detail="200 sets")
    band, first, second = figure.data
    for trace, own in ((first, p[0]), (second, p[1])):
        for level, share in zip(trace.x, trace.y, strict=True):
            assert share == sum(value < level for value in own) / 200
    low, high = np.array(band.y[:101]), np.array(band.y[101:])[::-1]
    assert ((low <= first.x) & (np.array(first.x) <= high)).all()
    # Uniform p-values lie in the band, cautious ones below it.
    assert ((low <= first.y) & (np.array(first.y) <= high)).all()
    assert (np.array(second.y) < low).mean() > 0.7


def test_the_calibration_curve_needs_p_values():
    with pytest.raises(ValueError, match="p"):
        plots.calibration_curve(pd.DataFrame({"auditors": ["both"]}), headline="", detail="")
