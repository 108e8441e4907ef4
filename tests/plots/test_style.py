from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from fxprune.errors import OptionsError
from fxprune.plots.style import METHODS, figure, mark, save_figure, spread


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([5.0, 1.0], [5.0, 1.0]),
        ([1.0, 1.0, 5.0], [0.5, 1.5, 5.0]),
        ([0.0, 0.9, 1.8], [-0.1, 0.9, 1.9]),  # the middle one pushes both
        ([1.3, 1.1, 0.0], [1.8, 0.8, -0.2]),
    ],
)
def test_labels_are_moved_apart_as_little_as_need_be(places: list[float], found: list[float]) -> None:
    assert spread(places, 1.0) == pytest.approx(found)


def test_every_method_looks_different() -> None:
    names = [*METHODS, "mine", "yours"]
    marks = [mark(name, names) for name in names]
    assert len({m.color for m in marks}) == len({m.marker for m in marks}) == len(names)


def test_files_are_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    def draw() -> list[Path]:
        with figure(2.0) as picture:
            picture.add_subplot().plot([1, 2], [3, 4])
        return save_figure(picture, tmp_path / "a.b" / "pic.1", ("png", "svg"))

    files = draw()
    assert [file.name for file in files] == ["pic.1.png", "pic.1.svg"]
    assert Image.open(files[0]).size == (1120, 400)
    before = files[1].read_bytes()
    assert draw()[1].read_bytes() == before
    assert len(list((tmp_path / "a.b").iterdir())) == 2


def test_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with figure(2.0) as picture, pytest.raises(OptionsError, match="unknown picture format 'gif'"):
        save_figure(picture, tmp_path / "pic", ("gif",))
