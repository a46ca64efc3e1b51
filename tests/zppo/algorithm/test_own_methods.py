"""A method of the user's own is checked as far as it can be; every mistake is one sentence."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from zppo.algorithm.methods import Method, get_method
from zppo.errors import UserError

EXAMPLE = Path(__file__).parents[3] / "examples/own/method.py"
HEAD = "from zppo.algorithm.methods import Method\n"
NAMES = 'name="n", title="t", summary="s"'
REFORMULATION = """
class Again:
    kind = "again"
    preparation = "none"
    def admits(self, visit): return True
    def draw(self, visit, rng): return []
    def prompt(self, visit, candidates, prompts): return visit.plain.prompt
"""


def test_the_example_is_a_method() -> None:
    method = get_method(f"{EXAMPLE}:METHOD")
    assert isinstance(method, Method)
    assert [one.kind for one in method.reformulations] == ["second_look"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "METHOD = {'name': 'mine'}",
            "'F:METHOD' is of type dict; expected a Method (zppo.algorithm.methods)",
        ),
        (
            f"METHOD = Method({NAMES}, replays=True)",
            "'F' cannot be imported: TypeError: Unexpected keyword argument 'replays'",
        ),
        (f"METHOD = Method({NAMES}, replay=1)", "'F:METHOD': replay is 1; expected True or False"),
        ('METHOD = Method(name=3, title="t", summary="s")', "'F:METHOD': name is 3; expected text"),
        (
            'METHOD = Method(name="", title="t", summary="s")',
            "'F:METHOD': name is ''; expected text",
        ),
        (
            f"METHOD = Method({NAMES}, updates_per_step=True)",
            "'F:METHOD': updates_per_step is True; expected a whole number of at least 1, or None",
        ),
        (
            f"METHOD = Method({NAMES}, teacher_draws='some')",
            "'F:METHOD': teacher_draws is 'some' (did you mean 'none'?)",
        ),
        (
            f"METHOD = Method({NAMES}, updates_per_step=0)",
            "'F:METHOD': updates_per_step is 0; expected a whole number of at least 1, or None",
        ),
        (
            f"METHOD = Method({NAMES}, composer=lambda visit: [])",
            "'F:METHOD: composer' takes (visit); expected a function of (visit, rng): too many "
            "positional arguments",
        ),
        (
            f"{REFORMULATION}\nMETHOD = Method({NAMES}, reformulations=[Again()])",
            None,
        ),
        (
            f"{REFORMULATION.replace('again', 'teacher')}\nMETHOD = Method({NAMES}, reformulations=(Again(),))",
            "F:METHOD: Again.kind is 'teacher'; expected a name of its own, of at most 32 letters",
        ),
        (
            f"{REFORMULATION.replace('none', 'shorten')}\nMETHOD = Method({NAMES}, reformulations=(Again(),))",
            "'F:METHOD: Again': preparation is 'shorten' (valid: compress, none, write_hint)",
        ),
        (
            f"{REFORMULATION.replace('admits', 'admit')}\nMETHOD = Method({NAMES}, reformulations=(Again(),))",
            "'F:METHOD: Again.admits' is of type NoneType; expected a function of (visit)",
        ),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, body: str, said: str | None) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}{body}\n")
    with pytest.raises(UserError) as caught:
        get_method(f"{file}:METHOD")
    found = str(caught.value).replace(str(file), "F")
    if said is None:
        assert found.startswith("method.name: 'F:METHOD': reformulations is [<")
        assert found.endswith("expected a tuple of reformulations")
    else:
        assert found == f"method.name: {said}"


def test_mistakes_in_a_run_are_sentences_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"""{HEAD}{REFORMULATION}
def broken(visit, rng):
    raise KeyError("no such thing")

METHOD = Method({NAMES}, composer=broken, reformulations=(Again(),))
NOTHING = Method({NAMES}, composer=lambda visit, rng: None)
"""
    )
    line = file.read_text().splitlines().index('    raise KeyError("no such thing")') + 1
    visit: Any = None
    for name, said in (
        ("METHOD", f"raised KeyError: 'no such thing' (line {line} of {file})"),
        ("NOTHING", "returned None; expected a list of Composition"),
    ):
        with pytest.raises(UserError) as caught:
            get_method(f"{file}:{name}").composer(visit, random.Random(0))
        assert str(caught.value) == f"method.name: '{file}:{name}': composer {said}"
    [again] = get_method(f"{file}:METHOD").reformulations
    assert again.admits(visit) and again.draw(visit, random.Random(0)) == []
    file.write_text(file.read_text().replace("return visit.plain.prompt", "pass"))
    [again] = get_method(f"{file}:METHOD").reformulations
    with pytest.raises(UserError) as caught:
        again.prompt(visit, [], visit)
    assert str(caught.value) == (
        f"method.name: '{file}:METHOD': Again.prompt returned None; expected a Prompt"
    )
