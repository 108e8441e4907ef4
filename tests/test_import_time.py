"""What is imported when: a process that only asks for the version, or compiles, does not pay for what it never uses."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import fxprune

HEAVY = ("onnxruntime", "onnx", "onnxscript", "torchvision", "jinja2", "matplotlib", "rich", "typer", "sympy")
USED_LATER = f"import sys; print([name for name in {HEAVY} if name in sys.modules], 'torch' in sys.modules)"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    assert run(f"import fxprune; {USED_LATER}") == "[] False"


@pytest.mark.parametrize("use", ["fxprune.compile", "fxprune.passes.Polish", "fxprune.models.create"])
def test_the_compiler_needs_torch_alone(use: str) -> None:
    assert run(f"import fxprune; {use}; {USED_LATER}") == "[] True"


def test_options_are_there_before_torch_is() -> None:
    assert run(f"import fxprune; fxprune.Options(damping=0.1); {USED_LATER}") == "[] False"


def test_a_model_of_ours_is_built_without_torchvision() -> None:
    assert run(f"import fxprune; fxprune.models.create('resnet20'); {USED_LATER}") == "[] True"


def test_names_and_submodules_are_found_on_first_use() -> None:
    code = "import fxprune; from fxprune import Options, compile, models, passes; "
    code += "print(callable(fxprune.diff), fxprune.export.export_onnx is fxprune.export_onnx, fxprune.errors.__name__)"
    assert run(code) == "True True fxprune.errors"


def test_dir_lists_every_name() -> None:
    assert set(fxprune.__all__) <= set(dir(fxprune))
    assert run("import fxprune; print(set(fxprune.__all__) <= set(dir(fxprune)))") == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fxprune' has no attribute 'prun'"):
        fxprune.prun  # noqa: B018


def test_no_name_is_hidden_by_a_submodule() -> None:
    """Importing the submodule fxprune.x would put the module in the place of a function of this name."""
    submodules = {module.name for module in pkgutil.iter_modules(fxprune.__path__)}
    assert submodules & set(fxprune.__all__) == {"constraints", "models", "passes", "solvers"}
