"""A killed process: what was paid for is there when the story runs again."""

from __future__ import annotations

import pytest

from tests.killed import SCENES, VARIATIONS, kill_and_run_again
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server


@pytest.mark.all
@pytest.mark.slow
def test_after_a_kill_the_same_run_goes_on_where_it_was(tmp_path):
    kills = 6
    with start_llm_server() as llm, start_image_server(seconds=0.2) as images:
        found = kill_and_run_again(tmp_path, llm, images, kills)
    assert found["images"] == SCENES * VARIATIONS
    assert found["killed"] == found["finished"] == found["alike"] == kills
    assert found["repaid"] == 0 and found["left"] == [] and all(found["references"])
    assert len({chats for chats, _ in found["known"]}) > kills // 2
