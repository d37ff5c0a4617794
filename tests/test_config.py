"""Configuration: JSON and back, overrides, what may change on resume."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.config import (
    Experiment,
    check_resume,
    diff,
    from_dict,
    is_operational,
    override,
    register,
    resolve_horizon,
    to_dict,
    validated,
)
from memtrain.data.config import DataConfig, RecallTask
from memtrain.errors import BadInput
from memtrain.layers import Attention, BankMemory, Block, ModelConfig, ProductKeyMemory, Window
from memtrain.overrides import leaf_keys
from memtrain.parallel.config import MeshConfig
from memtrain.schema import nearest
from memtrain.train.config import OptimizerConfig, TrainConfig


class Part:
    """A base without fields, as a user may have one."""


@dataclass(frozen=True)
class Wheel(Part):
    spokes: int = 3
    name: str = "front"


@register(name="TheMotor")
@dataclass(frozen=True, kw_only=True)
class Motor(Part):
    power: float = 1.5
    kind: Literal["steam", "electric"] = "steam"


@dataclass(frozen=True, kw_only=True)
class Radio:
    volume: int = 5
    station: str | None = None


@dataclass(frozen=True, kw_only=True)
class Car:
    """Has a field of every kind that configurations use."""

    parts: tuple[Part, ...] = (Wheel(), Motor())
    radio: Radio | None = None
    doors: int = 4
    fast: bool = False
    weight: float = 1.0
    limit: float | None = None
    label: str = "x"
    colours: tuple[str, ...] = ("red",)
    size: tuple[int, float] = (1, 2.0)
    either: int | str = 0
    anything: Any = None
    notes: dict[str, int] = field(default_factory=dict)
    place: Path = Path("garage")

    def __post_init__(self):
        if self.doors > 4 and not self.fast:
            raise ValueError(f"{self.doors} doors need a fast car")


GOLDEN = {
    "parts": [
        {"type": "Wheel", "spokes": 3, "name": "front"},
        {"type": "TheMotor", "power": 1.5, "kind": "electric"},
    ],
    "radio": {"volume": 5, "station": None},
    "doors": 4,
    "fast": False,
    "weight": 1.0,
    "limit": "inf",
    "label": "x",
    "colours": ["red"],
    "size": [1, 2.0],
    "either": "seven",
    "anything": [1, [2]],
    "notes": {"a": 1},
    "place": "garage",
}
GOLDEN_CAR = Car(
    parts=(Wheel(), Motor(kind="electric")),
    radio=Radio(),
    limit=float("inf"),
    either="seven",
    anything=(1, (2,)),
    notes={"a": 1},
)


def experiment(**changes: Any) -> Experiment:
    memory = ProductKeyMemory()
    pattern = (Window(16), Block(mixer=Attention(num_heads=2), ffn=memory))
    base = Experiment(name="small", model=ModelConfig(dim=32, pattern=pattern))
    return dataclasses.replace(base, **changes)


# JSON and back


def test_written_as_the_golden_json():
    assert to_dict(GOLDEN_CAR) == GOLDEN
    assert from_dict(Car, json.loads(json.dumps(GOLDEN, allow_nan=False))) == GOLDEN_CAR


def test_the_experiment_comes_back_from_json():
    before = experiment(data=DataConfig(recall=RecallTask(share=0.2)))
    text = json.dumps(to_dict(before), allow_nan=False)
    assert from_dict(Experiment, json.loads(text)) == before
    pattern = json.loads(text)["model"]["pattern"]
    assert [p["type"] for p in pattern] == ["Attention", "Block"]
    assert pattern[1]["ffn"]["type"] == "ProductKeyMemory"


def test_fields_that_an_older_version_did_not_write_take_their_default():
    assert from_dict(Car, {"doors": 2}) == Car(doors=2)
    assert from_dict(Experiment, {"name": "x", "model": {}}).train == TrainConfig()


def test_lists_and_ints_of_a_recipe_become_what_the_annotation_says():
    loose = Car(parts=[Wheel()], weight=2)  # pyright: ignore[reportArgumentType]
    strict = from_dict(Car, to_dict(loose))
    assert strict == Car(parts=(Wheel(),), weight=2.0)
    assert type(strict.weight) is float


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"door": 2}, "unknown key 'door': did you mean 'doors'?"),
        ({"radio": {"volum": 2}}, "unknown key 'radio.volum': did you mean 'radio.volume'?"),
        (
            {"parts": [{"type": "Wheel", "spoke": 2}]},
            "unknown key 'parts.0.spoke': did you mean 'parts.0.spokes'?",
        ),
        ({"radio": {"zzz": 2}}, "unknown key 'radio.zzz': in 'radio' there are volume, station"),
        ({"doors": "2"}, "doors: expected a whole number, got '2' (text)"),
        ({"doors": True}, "doors: expected a whole number, got True"),
        ({"doors": 2.0}, "doors: expected a whole number, got 2.0"),
        ({"fast": 1}, "fast: expected true or false, got 1"),
        ({"weight": "heavy"}, "weight: expected a number, got 'heavy' (text)"),
        ({"limit": "much"}, "limit: expected a number or null, got 'much' (text)"),
        ({"label": None}, "label: expected text, got null"),
        ({"colours": "red"}, "colours: expected a list, each item text, got 'red' (text)"),
        ({"colours": ["red", 3]}, "colours.1: expected text, got 3"),
        ({"size": [1]}, "size: expected a list of 2 (a whole number, a number), got [1] (a list)"),
        ({"notes": {"a": "b"}}, "notes.a: expected a whole number, got 'b' (text)"),
        ({"radio": 3}, "radio: expected Radio or null, got 3"),
        ({"parts": [{"spokes": 3}]}, 'parts.0: expected Part, with a "type"'),
        (
            {"parts": [{"type": "TheMotor", "kind": "steem"}]},
            "parts.0.kind: expected one of steam, electric, got 'steem' (text): "
            "did you mean 'steam'?",
        ),
        ({"parts": [{"type": "Weel"}]}, "parts.0.type: unknown type 'Weel'. Did you mean 'Wheel'?"),
        ({"parts": [{"type": "Attention"}]}, "parts.0: expected Part, got Attention"),
        ({"doors": 5}, "5 doors need a fast car"),
    ],
)
def test_what_does_not_fit_is_refused_by_place(data: dict[str, Any], said: str):
    with pytest.raises(BadInput) as caught:
        from_dict(Car, data)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_an_unknown_type_asks_for_its_module():
    with pytest.raises(
        BadInput, match=r"'Sail'.* Import the module that defines it, or name its file"
    ):
        from_dict(Car, {"parts": [{"type": "Sail"}]})


def test_the_source_comes_first_and_required_fields_are_named():
    with pytest.raises(BadInput, match=r"^a/config\.json: configuration: missing name, model$"):
        from_dict(Experiment, {}, source="a/config.json")


def test_what_json_cannot_hold_is_refused_by_place():
    with pytest.raises(BadInput, match=r"anything: expected .* function"):
        to_dict(Car(anything=print))


def test_names_are_not_given_twice():
    with pytest.raises(ValueError, match="two descriptions are called 'TheMotor'"):
        register(Wheel, "TheMotor")

    @dataclass(frozen=True)
    class Attention(Part):  # A user's own, called like one of ours.
        pass

    with pytest.raises(BadInput, match="no name of its own"):
        to_dict(Car(parts=(Attention(),)))
    del Attention

    @dataclass(frozen=True)
    class Tagged:
        type: int = 0

    with pytest.raises(TypeError, match="may not be called 'type'"):
        register(Tagged)


# Overrides


@pytest.mark.parametrize(
    ("assignment", "changes"),
    [
        ("doors=2", {"doors": 2}),
        ("doors=1e0", {"doors": 1}),
        ("doors=-1_000", {"doors": -1000}),
        ("fast=true", {"fast": True}),
        ("fast=No", {"fast": False}),
        ("weight=3", {"weight": 3.0}),
        ("weight=1e-3", {"weight": 0.001}),
        ("limit=null", {"limit": None}),
        ("limit=0.5", {"limit": 0.5}),
        ("label=a=b, c ", {"label": "a=b, c "}),
        ("label=", {"label": ""}),
        ("label=null", {"label": "null"}),
        ("colours=a.txt,b", {"colours": ("a.txt", "b")}),
        ("colours=a", {"colours": ("a",)}),
        ("colours=", {"colours": ()}),
        ('colours=["a,b"]', {"colours": ("a,b",)}),
        ("size=3,4", {"size": (3, 4.0)}),
        ("size=[3, 4]", {"size": (3, 4.0)}),
        ("size.1=4", {"size": (1, 4.0)}),
        ("either=3", {"either": 3}),
        ("either=three", {"either": "three"}),
        ("anything=[1, 2]", {"anything": (1, 2)}),
        ("anything=word", {"anything": "word"}),
        ("notes.b=3", {"notes": {"b": 3}}),
        ("place=here/there", {"place": Path("here/there")}),
        ("radio.volume=7", {"radio": Radio(volume=7)}),
        ('radio={"station": "news"}', {"radio": Radio(station="news")}),
        ("radio=Radio", {"radio": Radio()}),
        ("parts.0.spokes=9", {"parts": (Wheel(9), Motor())}),
        ("parts.1.kind=electric", {"parts": (Wheel(), Motor(kind="electric"))}),
        ("parts.1=Wheel", {"parts": (Wheel(), Wheel())}),
        ('parts=[{"type": "TheMotor"}]', {"parts": (Motor(),)}),
    ],
)
def test_text_is_read_as_the_annotation_says(assignment: str, changes: dict[str, Any]):
    assert override(Car(), [assignment]) == dataclasses.replace(Car(), **changes)


def test_assignments_are_applied_in_order_and_at_once():
    # Neither alone would pass the check: five doors need a fast car.
    assert override(Car(), ["doors=5", "fast=true"]) == Car(doors=5, fast=True)
    assert override(Car(), ["doors=2", "doors=3"]).doors == 3
    assert override(Car(), ["radio.volume=1", "radio=null"]).radio is None
    assert override(Car(), ["radio=null", "radio.volume=1"]).radio == Radio(volume=1)
    assert override(Car(radio=Radio(volume=2)), ["radio={}", "radio.station=a"]).radio == Radio(
        station="a"
    )


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("doors", "override 'doors': expected key=value, as in train.num_steps=100"),
        ("=3", "override '=3': expected key=value, as in train.num_steps=100"),
        ("door=3", "unknown key 'door': did you mean 'doors'?"),
        ("spokes=3", "unknown key 'spokes': did you mean 'parts.0.spokes'?"),
        ("radio.volum=3", "unknown key 'radio.volum': did you mean 'radio.volume'?"),
        ("parts.2.spokes=3", "unknown key 'parts.2': 'parts' is a list of 2, counted from 0"),
        ("parts.x=3", "unknown key 'parts.x': 'parts' is a list of 2, counted from 0"),
        ("doors.x=3", "unknown key 'doors.x': 'doors' is a whole number and has no parts"),
        ("limit.x=3", "unknown key 'limit.x': 'limit' has no parts"),
        ("doors=2.5", "doors: expected a whole number, got '2.5'"),
        ("doors=null", "doors: expected a whole number, got 'null'"),
        ("fast=maybe", "fast: expected true or false, got 'maybe'"),
        ("weight=heavy", "weight: expected a number, got 'heavy'"),
        ("size=3", "size: expected a list of 2 (a whole number, a number), got '3'"),
        ("size=a,b", "size: expected a whole number, got 'a'"),
        ("colours=[1", "colours: '[1' is not JSON: "),
        ("parts.1.kind=sail", "parts.1.kind: expected one of steam, electric, got 'sail' (text)"),
        ("parts.1=Sail", "parts.1.type: unknown type 'Sail'. "),
        ("doors=5", "5 doors need a fast car"),
    ],
)
def test_wrong_assignments_are_refused_in_one_line(assignment: str, said: str):
    with pytest.raises(BadInput) as caught:
        override(Car(), [assignment])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_key_without_its_section_is_found():
    with pytest.raises(BadInput, match=r"'num_steps': did you mean 'train\.num_steps'\?"):
        override(experiment(), ["num_steps=3"])
    with pytest.raises(BadInput, match=r"'model\.num_steps': did you mean 'train\.num_steps'\?"):
        override(experiment(), ["model.num_steps=3"])


_words = st.text("abcxyz.*/_-", min_size=1, max_size=8)
_cars = st.builds(
    Car,
    parts=st.lists(
        st.one_of(
            st.builds(Wheel, spokes=st.integers(), name=_words),
            st.builds(Motor, power=st.floats(allow_nan=False)),
        ),
        max_size=3,
    ).map(tuple),
    radio=st.none() | st.builds(Radio, volume=st.integers(), station=_words),
    doors=st.integers(max_value=4),
    fast=st.booleans(),
    weight=st.floats(allow_nan=False),
    limit=st.none() | st.floats(allow_nan=False),
    label=st.text(),
    colours=st.lists(_words, max_size=3).map(tuple),
    size=st.tuples(st.integers(), st.floats(allow_nan=False)),
)


def _as_typed(value: Any) -> str:
    """What somebody would type, written independently of the reader."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(_as_typed(v) for v in value)
    return str(value)


@given(_cars)
def test_any_car_can_be_typed(car: Car):
    names = {Wheel: "Wheel", Motor: "TheMotor"}
    typed = ["parts=" + json.dumps([{"type": names[type(part)]} for part in car.parts])]
    for index, part in enumerate(car.parts):
        if isinstance(part, Wheel):
            typed += [f"parts.{index}.spokes={part.spokes}", f"parts.{index}.name={part.name}"]
        elif isinstance(part, Motor):
            typed += [f"parts.{index}.power={part.power}"]
    typed.append("radio=null" if car.radio is None else f"radio.volume={car.radio.volume}")
    if car.radio is not None:
        typed.append(f"radio.station={car.radio.station}")
    for name in ("doors", "fast", "weight", "limit", "label", "colours", "size"):
        typed.append(f"{name}={_as_typed(getattr(car, name))}")
    assert override(Car(), typed) == car


@given(_cars)
def test_any_car_comes_back_from_json(car: Car):
    assert from_dict(Car, json.loads(json.dumps(to_dict(car), allow_nan=False))) == car


# Resuming


def test_differences_are_listed_leaf_by_leaf():
    old = experiment()
    new = override(
        old, ["train.seed=3", "model.pattern.0.window=8", "data.recall.share=0.5", "data.path=a,b"]
    )
    assert diff(old, new) == [
        ("model.pattern.0.window", 16, 8),
        ("data.path", ["stdlib"], ["a", "b"]),
        ("data.recall", None, dataclasses.asdict(RecallTask(share=0.5))),
        ("train.seed", 0, 3),
    ]
    assert diff(old, old) == []
    swapped = override(old, ["model.pattern.1.ffn=SwiGLU"])
    assert [key for key, _, _ in diff(old, swapped)] == ["model.pattern.1.ffn"]


def test_operational_fields_are_these():
    operational = {key for key in leaf_keys(experiment()) if is_operational(key)}
    assert operational == {
        "data.prefetch",
        "mesh.context",
        "mesh.context_layout",
        "mesh.context_strategy",
        "mesh.context_ulysses",
        "mesh.data",
        "mesh.fsdp",
        "mesh.table_memory",
        "mesh.tensor",
        "model.loss_chunk_tokens",
        "model.remat",
        "model.scan_unroll",
        "optimizer.horizon_steps",
        "train.checkpoint_every_steps",
        "train.checkpoint_lag_steps",
        "train.evaluate_batches",
        "train.evaluate_every_steps",
        "train.keep_checkpoints",
        "train.keep_every_steps",
        "train.log_every_steps",
        "train.max_skipped_steps",
        "train.num_steps",
        "train.profile_steps",
        "train.tensorboard",
    }


def test_operational_changes_pass_and_are_told():
    stored = experiment()
    current = override(stored, ["train.num_steps=2000", "mesh.data=2"])
    told = [("train.num_steps", 1000, 2000), ("mesh.data", 1, 2)]
    assert check_resume(stored, current) == told
    assert check_resume(to_dict(stored), current) == told


def test_a_bank_is_not_restored_into_another():
    """Heads, capacity, how keys are kept and what encodes them: each is named, and nothing read."""
    stored = experiment(model=ModelConfig(dim=32, pattern=(BankMemory(num_heads=4, bank_size=64),)))
    for setting in (
        "num_heads=2",
        "num_kv_heads=2",
        "bank_size=128",
        "bank_dtype=int8",
        "key_conv=2",
    ):
        field = f"model.pattern.0.{setting}"
        key, value = field.split("=")
        with pytest.raises(BadInput, match=rf"{re.escape(key)} was .*{value}"):
            check_resume(to_dict(stored), override(stored, [field]))


def test_another_identity_is_refused_by_name_with_both_values():
    current = override(experiment(), ["train.seq_len=256", "model.dim=64", "mesh.data=2"])
    with pytest.raises(BadInput) as caught:
        check_resume(to_dict(experiment()), current)
    said = str(caught.value)
    assert "train.seq_len was 512 and is 256" in said
    assert "model.dim was 32 and is 64" in said
    assert "mesh" not in said
    assert "--run-dir" in said


def test_an_int_for_a_float_is_not_another_identity():
    stored = experiment(optimizer=OptimizerConfig(clip_norm=1.0))
    assert check_resume(to_dict(stored), experiment(optimizer=OptimizerConfig(clip_norm=1))) == []


def test_the_schedule_keeps_its_length():
    begun = resolve_horizon(None, experiment(train=TrainConfig(num_steps=300)))
    assert begun.optimizer.horizon_steps == 300
    longer = experiment(train=TrainConfig(num_steps=900))
    assert resolve_horizon(begun, longer).optimizer.horizon_steps == 300
    assert resolve_horizon(to_dict(begun), longer).optimizer.horizon_steps == 300
    set_too = dataclasses.replace(longer, optimizer=OptimizerConfig(horizon_steps=900))
    assert resolve_horizon(begun, set_too).optimizer.horizon_steps == 900
    assert check_resume(begun, resolve_horizon(begun, set_too))  # Allowed, and told.


# The experiment


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["train.batch_size=10", "mesh.data=2", "mesh.fsdp=2"],
            "train.batch_size=10 cannot be divided into 4 equal parts (mesh.data=2 * mesh.fsdp=2 * "
            "train.accumulation_steps=1): take 8 or 12",
        ),
        (["train.batch_size=2", "mesh.data=4"], "train.batch_size=2 cannot be divided into 4"),
        (["train.accumulation_steps=3"], "train.batch_size=16 cannot be divided into 3"),
        (["mesh.data=0"], "mesh.data=0 must be a whole number of at least 1"),
        (["train.seq_len=0"], "train.seq_len=0: it takes 1 or more"),
        (["train.carry=stop"], 'train.carry="stop" carries the memory'),
        (["name=a/b"], "name='a/b' must be usable as the name of a folder"),
        (["model.repeats=0"], "model.repeats=0: it takes 1 or more"),
    ],
)
def test_sections_that_do_not_fit_are_refused(sets: list[str], said: str):
    with pytest.raises(BadInput) as caught:
        override(experiment(), sets)
    assert str(caught.value).startswith(said)


def test_the_mesh_counts_its_devices():
    assert experiment(mesh=MeshConfig(data=2, fsdp=4)).num_devices == 8


def test_validated_names_the_field():
    wrong = experiment(train=TrainConfig(freeze="embed"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match=r"^here: train\.freeze: expected a list, each item text"):
        validated(wrong, source="here")


def test_nearest_is_only_what_is_near():
    assert nearest("NUM_STEPS", ["num_steps", "seed"]) == "num_steps"
    assert nearest("qqq", ["num_steps", "seed"]) is None


def test_the_documented_configuration_is_as_told():
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    base = names["recipe"]()
    assignments = re.findall(r"`([a-z][\w.]*=[^`]*)`", text)
    assert len(assignments) > 10
    for assignment in assignments:
        assert isinstance(override(base, [assignment]), Experiment)
