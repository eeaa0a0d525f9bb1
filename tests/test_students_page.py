"""The page on students: its code runs, from top to bottom, and does what the text says."""

import re
from pathlib import Path

import pytest

from divergence_lens import evaluate

QUESTIONS = ("Name your favorite animal.", "Which animal do you like best? One word.")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "students.md"


def test_the_code_on_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) >= 7
    # A few lists and questions show as well that the code runs.
    text = "\n".join(code).replace("240", "12").replace("160", "8").replace("200", "10")
    monkeypatch.setattr(evaluate, "preference_questions", lambda _category: QUESTIONS)
    names: dict = {}
    exec(compile(text, str(PAGE), "exec"), names)  # noqa: S102 - the page's own code
    assert {"full", 2, 8} == {row["rank"] for row in names["rows"]}
    assert names["followed"].history()["owl"].notna().any()
    assert names["both"].norms()[0] == pytest.approx((names["student"] + names["small"]).norms()[0])
    summary = names["sweep"].summary()
    assert {"nothing", "all blocks", "all blocks on control data"} <= set(summary["trained"])
    assert {"valid_lists", "held_out_loss"} <= set(summary)
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert "Trainable:" in capsys.readouterr().out
