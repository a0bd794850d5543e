"""A user finds every recipe explained, with a command to start from."""

from pathlib import Path

import pytest

from fewbit.recipe import RECIPES

PAGES = sorted((Path(__file__).parents[2] / "docs" / "methods").glob("*.md"))


@pytest.mark.parametrize("name", [recipe.__name__.replace("_", "-") for recipe in RECIPES])
def test_a_page_shows_a_command_with_the_recipe(name):
    words = [page.read_text(encoding="utf-8").split() for page in PAGES]
    assert any(["-r", name] == page[i : i + 2] for page in words for i in range(len(page))), (
        f"no page of docs/methods has a command with -r {name}"
    )
