"""Inside the three folders, siblings are imported relatively or by their package's name, never by the folder's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BY_FOLDER = re.compile(r"^\s*(import|from) (mesh|transport|discovery)\b", re.MULTILINE)


@pytest.mark.parametrize("folder", ["mesh", "transport", "discovery"])
def test_nobody_imports_by_the_folders_name(folder: str) -> None:
    found = [path for path in (ROOT / folder).rglob("*.py") if BY_FOLDER.search(path.read_text())]
    assert found == []
