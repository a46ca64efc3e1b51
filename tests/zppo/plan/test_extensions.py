"""Code of the user's that a run names: identified without being run, and refused once it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import topology

from zppo.errors import UserError
from zppo.plan.extensions import changed, identities


def test_what_a_run_is_made_of_must_stay_as_it_was(tmp_path: Path) -> None:
    marker, file = tmp_path / "imported", tmp_path / "mine.py"
    file.write_text(f"open({str(marker)!r}, 'w')\n")
    use, last = f"{file}:reward", f"{file}:last"
    config = topology(
        data={
            "train": "t",
            "reward": [{"use": use}, {"use": "exact", "args": {"extractor": last}}],
        },
        method={"name": f"{file}:METHOD"},
    )
    before = identities(config)
    assert sorted(before) == sorted([use, last, f"{file}:METHOD"])
    assert changed(config, before, "the run began") == []
    assert changed(config, {}, "the run began") == [], "an earlier version kept none"
    file.write_text(f"open({str(marker)!r}, 'w')  # edited\n")
    with pytest.raises(UserError) as caught:
        changed(config, before, "the checkpoint of step 3 was written")
    was, now = before[use][: len("sha256:") + 12], identities(config)[use][: len("sha256:") + 12]
    assert str(caught.value) == (
        f"data.reward[0].use: the code of {use!r} has changed since the checkpoint of step 3 was "
        f"written (it was {was} and is {now}); put the old code back, or begin a new run"
    )
    assert not marker.exists(), "identifying code must not run it"
