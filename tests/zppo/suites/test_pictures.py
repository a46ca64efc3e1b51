"""The bounds for pictures that a server of ours is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from suite_helpers import table

from zppo.suites.order import Served, SuiteOrder
from zppo.suites.pictures import server_options
from zppo.suites.plan import settings_of

GIVEN = {"mm-processor-kwargs": '{"images_kwargs":{"min_pixels":262144,"max_pixels":1310720}}'}


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast"}, GIVEN),
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}},
            GIVEN,
        ),
        ("preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}, {}),
        ("preprocessor_config.json", [], {}),
        ("config.json", {}, {}),
    ],
)
def test_bounds_go_to_those_who_know_them(
    tmp_path: Path, name: str, config: object, options: dict[str, str]
) -> None:
    (tmp_path / name).write_text(json.dumps(config))
    model = Served(label="m", model="m", folder=str(tmp_path))
    order = SuiteOrder(
        suite=table(tmp_path, "A"), models=[model], judge=None, harness_pythons={}, out="out",
        limit=None, concurrent=1, seed=0, timeout_seconds=1, retry_seconds=1, startup_seconds=1,
        server_args={}, templates=None, baseline=None,
    )  # fmt: skip
    assert server_options(model, order) == options
    assert settings_of(order.suite.rows[0], model, order, "")["server_args"] == options
    own = replace(order, server_args={"mm-processor-kwargs": "{}", "max-model-len": "9"})
    assert server_options(model, own) == own.server_args
    assert server_options(replace(model, folder=None), own) == {}, "a server of the user's"
