"""The page of results: sections between marks, chosen figures, everything else untouched."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results_page

PAGE = "# Results\n\nBy hand.\n\n<!-- begin toy -->\nold\n<!-- end toy -->\n\nMore by hand.\n"
RESULTS = """## Comparison on `toy.yaml`

Sentences.

![Accuracy](figures/accuracy.png)

*Accuracy.* Blue: mean.

![Loss (Fig. 25)](figures/loss.png)

*Loss (Fig. 25).* Mean.
"""


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "comparison"
    (folder / "figures").mkdir(parents=True)
    (folder / "results.md").write_text(RESULTS)
    gradient = np.linspace(0, 255, 300 * 200 * 3).reshape(200, 300, 3).astype(np.uint8)
    for name in ("accuracy", "loss"):
        Image.fromarray(gradient).save(folder / "figures" / f"{name}.png")
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "docs" / "results.md"
    file.parent.mkdir()
    file.write_text(PAGE)
    return file


def run(page: Path, comparison: Path, *more: str) -> int:
    return results_page.main(
        ["--page", str(page), "--comparison", str(comparison), "--section", "toy", *more]
    )


def test_section_is_replaced_and_the_rest_stays(page: Path, comparison: Path) -> None:
    assert run(page, comparison) == 0
    text = page.read_text()
    assert text.startswith(
        "# Results\n\nBy hand.\n\n<!-- begin toy -->\n## Comparison on `toy.yaml`"
    )
    assert text.endswith("<!-- end toy -->\n\nMore by hand.\n") and "old" not in text
    assert "![Loss (Fig. 25)](images/results/toy/loss.png)\n\n*Loss (Fig. 25).* Mean." in text
    again = text
    assert run(page, comparison) == 0 and page.read_text() == again


def test_chosen_figures_alone_are_kept(page: Path, comparison: Path) -> None:
    assert run(page, comparison) == 0
    assert run(page, comparison, "--figures", "accuracy") == 0
    folder = page.parent / "images" / "results" / "toy"
    assert [file.name for file in folder.iterdir()] == ["accuracy.png"]
    assert "Loss" not in page.read_text() and "*Accuracy.* Blue: mean." in page.read_text()
    with (
        Image.open(folder / "accuracy.png") as small,
        Image.open(comparison / "figures" / "accuracy.png") as large,
    ):
        assert small.size == large.size
        assert small.mode == "P"


def test_a_missing_figure_changes_nothing(
    page: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(page, comparison) == 0
    before = page.read_text()
    (comparison / "figures" / "loss.png").unlink()
    assert run(page, comparison) == 2
    assert capsys.readouterr().err.startswith("--comparison: a figure cannot be read")
    assert page.read_text() == before
    assert (page.parent / "images" / "results" / "toy" / "accuracy.png").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--figures", "acuracy"],
            "--figures: there is no figure 'acuracy'; expected some of accuracy, loss",
        ),
        (["--section", "other"], "--section: the page has no lines '<!-- begin other -->'"),
        (["--comparison", "nowhere"], "--comparison: nowhere holds no results.md"),
        (["--page", "nowhere.md"], "--page: there is no file nowhere.md"),
    ],
)
def test_mistakes_are_one_sentence(
    page: Path, comparison: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(page, comparison, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1
    assert page.read_text() == PAGE and not (page.parent / "images").exists()
