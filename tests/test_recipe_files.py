"""Recipe files: found, loaded, and what is wrong with them told in one line."""

import json
import sys
from pathlib import Path

import pytest

from memtrain.config import Experiment, to_dict
from memtrain.errors import BadInput
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, Window
from memtrain.recipe import experiment_of_run, load_module, load_recipe, with_layers


_HEAD = """
from memtrain.config import Experiment
from memtrain.layers import ModelConfig, Window
from memtrain.train.config import TrainConfig

"""
_GOOD = "return Experiment(name='good', model=ModelConfig(dim=32, pattern=(Window(8),)))"


def recipe_file(folder: Path, body: str, name: str = "my_recipe.py") -> Path:
    path = folder / name
    path.write_text(_HEAD + body, encoding="utf-8")
    return path


def test_a_recipe_is_found_in_its_file(tmp_path: Path):
    path = recipe_file(tmp_path, f"def recipe():\n    {_GOOD}\ndef other():\n    return 1\n")
    assert load_recipe(str(path)).name == "good"
    assert load_recipe(f"{path}:recipe").model.pattern == (Window(8),)

    path = recipe_file(
        tmp_path, f"def helper(x):\n    return x\ndef a() -> Experiment:\n    {_GOOD}\n"
    )
    assert load_recipe(str(path)).name == "good"

    # Only one function, without annotation; private ones and imported ones do not count.
    path = recipe_file(
        tmp_path, f"from math import sqrt\ndef _h():\n    pass\ndef a():\n    {_GOOD}\n"
    )
    assert load_recipe(str(path)).name == "good"


def test_a_recipe_imports_its_neighbours_and_leaves_the_path_alone(tmp_path: Path):
    (tmp_path / "my_neighbour_7.py").write_text("NAME = 'neighbour'\n", encoding="utf-8")
    neighbours = _GOOD.replace("'good'", "my_neighbour_7.NAME")
    body = f"def recipe():\n    import my_neighbour_7\n    {neighbours}\n"
    before = list(sys.path)
    assert load_recipe(str(recipe_file(tmp_path, body))).name == "neighbour"
    assert sys.path == before


def test_a_recipe_is_another_one_with_layers_exchanged():
    table = ProductKeyMemory(num_slots=64, top_k=2)
    pattern = (Window(8), Block(mixer=Attention(), ffn=table), Block(ffn=table), Block(mixer=table))
    base = Experiment(name="base", model=ModelConfig(dim=32, pattern=pattern, repeats=2))

    def change(layer):
        if isinstance(layer, Attention):
            return Window(16) if layer.window is None else layer
        return None

    changed = with_layers(base, change, name="other")
    assert changed.model.pattern == (Window(8), Block(mixer=Window(16)))
    assert changed.name == "other" and changed.model.repeats == 2 and changed.data == base.data
    same = with_layers(base, lambda layer: layer, name="base")
    assert same == base


def test_a_run_s_configuration_is_a_recipe_too(tmp_path: Path):
    path = tmp_path / "config.json"
    pattern = (Window(8), Block(mixer=Attention(num_heads=2), ffn=ProductKeyMemory()))
    experiment = Experiment(name="car", model=ModelConfig(dim=64, pattern=pattern))
    path.write_text(json.dumps(to_dict(experiment)), encoding="utf-8")
    assert load_recipe(str(path)) == experiment


@pytest.mark.parametrize(
    ("body", "spec", "said"),
    [
        ("x = 1 / 0\n", "", r"my_recipe\.py:6: ZeroDivisionError: division by zero$"),
        ("def recipe(:\n", "", r"my_recipe\.py:6: SyntaxError: "),
        ("import no_such_module_x\n", "", r"my_recipe\.py:6: ModuleNotFoundError: .*no_such"),
        (
            "def deep():\n    raise ValueError('two\\nlines')\ndef recipe():\n    return deep()\n",
            "",
            r"my_recipe\.py:7: ValueError: two lines$",
        ),
        ("def recipe():\n    raise SystemExit(3)\n", "", r"my_recipe\.py:7: SystemExit: 3$"),
        (
            "def recipe():\n    return 3\n",
            "",
            r"my_recipe\.py:6: recipe returned int, and a recipe",
        ),
        (
            "def recipe(a, b=1):\n    return 3\n",
            "",
            r"my_recipe\.py:6: recipe needs arguments \(a\)",
        ),
        ("", "", r"my_recipe\.py has no public function"),
        (
            "def a():\n    pass\ndef b():\n    pass\n",
            "",
            r"several functions \(a, b\): choose one, as in .*my_recipe\.py:a$",
        ),
        ("def small():\n    pass\n", ":smal", r"no function 'smal': did you mean 'small'\?"),
        ("def small():\n    pass\n", ":big", r"no function 'big': it has small$"),
        ("def small():\n    pass\n", ":a-b", r"'a-b' is not the name of a function"),
        (
            "def recipe():\n    return Experiment(name='x', model=ModelConfig(), "
            "train=TrainConfig(num_steps='9'))\n",
            "",
            r"my_recipe\.py:6: train\.num_steps: expected a whole number, got '9' \(text\)$",
        ),
        (
            "def recipe():\n    return Experiment(name='x', model=ModelConfig(), "
            "train=TrainConfig(batch_size='9'))\n",
            "",
            r"my_recipe\.py:7: train\.batch_size='9' must be a whole number",
        ),
        (
            "def recipe():\n    return Experiment(name='x', modle=3)\n",
            "",
            r"my_recipe\.py:7: TypeError: .*unexpected keyword argument 'modle'",
        ),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_in_one_line(
    tmp_path: Path, body: str, spec: str, said: str
):
    path = recipe_file(tmp_path, body)
    with pytest.raises(BadInput, match=said) as caught:
        load_recipe(f"{path}{spec}")
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_leaves_no_module_behind(tmp_path: Path):
    path = recipe_file(tmp_path, "x = 1 / 0\n", name="failing_recipe.py")
    with pytest.raises(BadInput):
        load_recipe(str(path))
    assert not any("failing_recipe" in name for name in sys.modules)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path: Path):
    path = recipe_file(tmp_path, f"def recipe():\n    {_GOOD}\n")
    for wrong in (tmp_path / "my_recipes.py", tmp_path / "my_recipe"):
        with pytest.raises(BadInput, match=r"did you mean .*my_recipe\.py\?$"):
            load_recipe(str(wrong))
    with pytest.raises(BadInput, match="is a folder"):
        load_recipe(str(tmp_path))
    with pytest.raises(BadInput, match=r"there is no recipe nowhere/at_all\.py"):
        load_recipe("nowhere/at_all.py")
    assert load_recipe(str(path)).name == "good"


def test_a_layer_described_in_the_recipe_is_found_again_from_the_run(tmp_path: Path):
    body = """
from dataclasses import dataclass
from memtrain.description import LayerDescription

@dataclass(frozen=True, kw_only=True)
class MyOwnMemory(LayerDescription):
    slots: int = 3

def recipe():
    return Experiment(name="own", model=ModelConfig(dim=32, pattern=(MyOwnMemory(slots=5),)))
"""
    path = recipe_file(tmp_path, body)
    run = tmp_path / "run"
    run.mkdir()
    written = to_dict(load_recipe(str(path)))
    assert written["model"]["pattern"] == [{"type": "MyOwnMemory", "slots": 5}]
    (run / "config.json").write_text(json.dumps(written).replace("MyOwnMemory", "MyLater"))
    with pytest.raises(BadInput, match="unknown type 'MyLater'"):
        experiment_of_run(run)
    path.write_text(path.read_text().replace("MyOwnMemory", "MyLater"))
    (run / "run.json").write_text(json.dumps({"recipe": f"{path}:recipe"}))
    found = experiment_of_run(run).model.pattern[0]
    assert type(found).__name__ == "MyLater"
    # Loading the file once more defines its classes anew: the newest is the one that is meant.
    again = load_module(path)
    assert type(experiment_of_run(run).model.pattern[0]) is again.MyLater
