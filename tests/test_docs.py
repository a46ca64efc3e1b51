"""What the documentation names is there: settings, modules and what they hold, files of the
repository, and what its links lead to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from zppo.config.load import load, setting_names
from zppo.errors import UserError

ROOT = Path(__file__).parents[1]
OTHERWISE = ("CHANGELOG", "log", "from_trl", "from_verl")
"""They tell of what was, or of other tools' settings beside ours."""
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md")
    for page in sorted(ROOT.glob(pattern))
    if page.stem not in OTHERWISE
]
PACKAGES = {
    "zppo": ROOT / "zppo",
    "zppo_actors": ROOT / "actors/zppo_actors",
    "zppo_protocol": ROOT / "protocol/zppo_protocol",
    "zppo_kernels": ROOT / "kernels/zppo_kernels",
}
ENTRY_POINTS = ("zppo.sources", "zppo.sinks")
"""Groups of entry points, which look like modules."""
FOLDERS = "zppo|actors|protocol|kernels|tests|tools|benches|examples|docs"
SETTINGS = set(setting_names())
MAPPINGS = tuple(f"{n}." for n in SETTINGS if not any(m.startswith(f"{n}.") for m in SETTINGS))
"""Behind a setting that is no section may stand what the user names, `engine_args.max_length`."""
SECTIONS = "|".join(sorted({name.partition(".")[0] for name in SETTINGS}))


def wrong(code: str) -> bool:
    """Whether a piece of code in a page names something that is not there."""
    if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]+(?:\.(?:py|md|tsv|yaml|j2)|/)", code):
        return not (ROOT / code).exists()
    if code in ENTRY_POINTS:
        return False
    if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", code):
        return not is_there(*code.split("."))
    if setting := re.fullmatch(rf"((?:{SECTIONS})(?:\.[a-z_]+)+)(?:[:=].*)?", code):
        name = setting[1]
        known = name in SETTINGS or name.startswith(MAPPINGS)
        return not known and not name.endswith((".py", ".json", ".jsonl", ".yaml"))
    return False


def is_there(package: str, *parts: str) -> bool:
    """A module, or a word in the module that the first parts lead to."""
    place = PACKAGES[package]
    for part in parts:
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            place /= f"{part}.py"
        else:
            source = place if place.is_file() else place / "__init__.py"
            return re.search(rf"\b{part}\b", source.read_text(encoding="utf-8")) is not None
    return True


def mistakes(page: Path) -> Iterator[str]:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        for code in re.findall(r"`([^`]+)`", line):
            if wrong(code):
                yield f"{page.name}:{number}: {code}"


def test_the_documentation_names_what_is_there() -> None:
    assert [mistake for page in PAGES for mistake in mistakes(page)] == []


@pytest.mark.parametrize(
    "code",
    [
        "run.stepz: 3",
        "method.group",
        "zppo.config.lode",
        "zppo_protocol.messages.ResponseStart",
        "tests/zppo/answer_pairs_blind.tsv",
        "zppo/methods/",
    ],
)
def test_what_is_not_there_is_found(code: str) -> None:
    assert wrong(code)


# ---- topologies ----------------------------------------------------------------------------------


def topologies(page: Path) -> Iterator[tuple[int, str]]:
    """The YAML blocks of a page that are of sections of a topology, with their lines."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if set(re.findall(r"^(\w+):", block[1], re.MULTILINE)) <= set(SECTIONS.split("|")):
            yield text[: block.start()].count("\n") + 1, block[1]


def test_topologies_can_be_read(tmp_path: Path) -> None:
    """With what every topology must have, where a page shows a part of one."""
    file, read = tmp_path / "topology.yaml", 0
    for page in sorted(ROOT.glob("docs/*.md")):
        for line, text in topologies(page):
            read += 1
            file.write_text(text, encoding="utf-8")
            needed = ["data.train=a.jsonl", "student.model=a"]
            try:
                load(file, [*needed, *(["teacher.model=a"] if "teacher:" in text else [])])
            except UserError as error:
                raise AssertionError(f"{page.name}:{line}: {error}") from None
    assert read > 10


# ---- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a link to this page may name behind `#`, as GitHub makes it of headings."""
    text = page.read_text(encoding="utf-8")
    headings = (re.sub(r"[`*]", "", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    made = {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def lost_links(page: Path, text: str) -> Iterator[str]:
    """The links of a page's text that lead nowhere in this repository."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{page.name}: {link}"


def test_links_lead_somewhere() -> None:
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    found = [link for page in pages for link in lost_links(page, page.read_text(encoding="utf-8"))]
    assert found == []


def test_links_that_lead_nowhere_are_found() -> None:
    page = ROOT / "README.md"
    assert list(
        lost_links(page, "[a](docs/none.md) [b](docs/design.md#none) [c](docs/design.md)")
    ) == [
        "README.md: docs/none.md",
        "README.md: docs/design.md#none",
    ]
