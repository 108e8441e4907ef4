from __future__ import annotations

from pathlib import Path

import pytest

from fxprune.errors import OptionsError
from fxprune.experiments.yaml_files import check_keys, read_yaml, to_yaml


def read(tmp_path: Path, text: str) -> dict[str, object]:
    (tmp_path / "a.yaml").write_text(text)
    return read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("1:59", "1:59"),
        ("0.9", 0.9),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-7", -7),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("'2'", "2"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("[2:4, 0.9, 1]", ["2:4", 0.9, 1]),
        ("2001-01-01", "2001-01-01"),
        ("1.2.3", "1.2.3"),
        (".inf", float("inf")),
    ],
)
def test_values_are_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    assert read(tmp_path, f"a-key: {text}\n") == {"a_key": value}
    again = read(tmp_path, to_yaml({"a_key": value}))
    assert again == {"a_key": value}


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "'a' stands twice"),
        ("m:\n  b: 1\n  b: 1", "'b' stands twice"),
        ("- 1", "a mapping"),
        ("1: 2", "a mapping"),
        ("a: [", "no valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "no valid YAML"),
    ],
)
def test_wrong_files_are_errors(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        read(tmp_path, text)


def test_absent_and_binary_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "b.yaml"):
        with pytest.raises(OptionsError, match=f"cannot read .*{name}"):
            read_yaml(tmp_path / name)


def test_unknown_keys_name_close_ones() -> None:
    check_keys(["a"], ["a", "b"], "x.yaml")
    with pytest.raises(OptionsError, match=r"x\.yaml: unknown key 'epoch'; did you mean epochs\?"):
        check_keys(["epoch"], ["epochs", "model"], "x.yaml")
    with pytest.raises(OptionsError, match="known: epochs, model"):
        check_keys(["zzz"], ["model", "epochs"], "x.yaml")
