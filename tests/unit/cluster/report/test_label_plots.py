"""Plots of labels: whatever labels are called, however many there are, and whatever was answered."""

from xml.etree import ElementTree

import pytest

from cluster.report.label_plots import confusion_plot, reliability_plot
from cluster.report.page import _label_plots

HOSTILE = ["--><script>alert(1)</script>", "$x^2$", "a\nb"]


@pytest.mark.parametrize(
    ("labels", "counts", "named"),
    [
        (["calm", "urgent"], [[3, 1], [0, 0]], ["calm", "urgent", "3", "1", "0"]),
        (HOSTILE, [[1, 0, 0], [0, 0, 5], [2, 2, 2]], ["$x^2$", "a\\nb", "5"]),
        ([f"intent {number}" for number in range(40)], [[number] * 40 for number in range(40)], []),
    ],
)
def test_a_confusion_matrix_has_its_labels_and_counts_where_there_is_room(labels, counts, named):
    plot = confusion_plot(labels, counts)
    assert plot == confusion_plot(labels, counts)
    assert ElementTree.fromstring(plot).tag.endswith("svg")
    assert all(f"<!-- {text} -->" in plot for text in named)
    assert ("intent 1" in plot) == (len(labels) < 30 and "intent 1" in labels)
    assert "--><script>" not in plot


def test_a_reliability_diagram_has_a_point_for_each_bin():
    tree = ElementTree.fromstring(reliability_plot([[0.1, 0.0, 4], [0.55, 0.6, 2], [0.97, 1.0, 9]]))
    (points,) = (group for group in tree.iter() if group.get("id") == "PathCollection_1")
    assert len([one for one in points.iter() if one.tag.endswith("path")]) == 3


def test_the_page_has_the_plots_of_what_there_is():
    full = {"labels": ["a", "b"], "confusion": [[1, 0], [0, 1]], "reliability": [[0.9, 1.0, 2]]}
    assert _label_plots({"silos": {"dp": full}, "public": {}}).count("<svg") == 2
    assert _label_plots({"silos": {}, "public": {"dp": full}}).count("<svg") == 2
    assert _label_plots({"silos": {"dp": {"reliability": [[0.9, 1.0, 2]]}}, "public": {}}).count("<svg") == 1
    assert _label_plots({"silos": {"dp": {"reliability": []}}, "public": {}}) == ""
    assert _label_plots({"silos": {}, "public": {}}) == ""
