"""The page of what models say: strangers' words are text, and a page of another model is no page of this one."""

import json

from cluster.report.showcase import render, showcase_of

LINE = f"epsilon 7.5 at delta 1e-05 for one record, on top of what an earlier run spent; certificate {'ab' * 32}"
PRIVACY = {"line": LINE, "certificate": "ab" * 32, "model": "federated/model"}
HOSTILE = "<script>alert(1)</script>"


def document(**changes):
    piece = {"text": HOSTILE, "gradients": 1.0, "attention": 1.0}
    explained = {"answer": HOSTILE, "nats": 1.0, "without": 0.5, "unexplained": 0.0, "pieces": [piece]}
    return {
        "model": "m",
        "name": HOSTILE,
        "prompts": ["first", HOSTILE],
        "answers": {"base": ["one", HOSTILE], "dp": ["", "two"]},
        "privacy": PRIVACY,
        "explanations": [explained],
        "missing": "",
        **changes,
    }


def test_words_are_text_and_all_answers_are_there():
    page = render(document())
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    for shown in ("first", "one", "two", "(nothing)", "base model", "with DP", LINE, "--model federated/model"):
        assert shown in page
    assert "without DP" not in page


def test_a_model_without_a_certificate_is_not_said_to_have_one():
    page = render(document(privacy={"line": "nothing is claimed", "certificate": None, "model": "federated/adapter"}))
    assert "nothing is claimed" in page
    assert "ledger verify" not in page


def test_why_there_are_no_explanations_is_said():
    page = render(document(explanations=[], missing="captum is not installed"))
    assert "Not there: captum is not installed" in page


def test_a_report_leads_to_the_page_of_its_own_model_alone(tmp_path):
    said, page = tmp_path / "showcase.json", tmp_path / "showcase.html"
    assert showcase_of(said, page, "m") == ""
    said.write_text(json.dumps(document()))
    assert showcase_of(said, page, "m") == ""
    page.write_text("")
    assert showcase_of(said, page, "m") == "showcase.html"
    assert showcase_of(said, page, "another") == ""
