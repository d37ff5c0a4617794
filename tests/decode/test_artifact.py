"""What an artifact holds, and that it is refused when one byte of it is not as it was written."""

import json
import os
import resource
import shutil
import signal

import jax
import numpy as np
import pytest

import memtrain.decode.artifact as artifacts
from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.artifact import Artifact, write_artifact
from memtrain.decode.golden import Golden
from memtrain.errors import ArtifactError, BadInput, StorageFailed
from memtrain.memory.protocol import spec_bytes
from memtrain.model.unstacked import to_tensors, unstack_model

from .conftest import CONFIG, VOCAB


@pytest.fixture
def copy(artifact_path, tmp_path):
    """An artifact that a test may damage."""
    return shutil.copytree(artifact_path, tmp_path / "copy.mtx")


def names(path):
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


def test_what_lies_in_it(artifact_path):
    assert names(artifact_path) == [
        "cache_spec.json",
        "config.json",
        "golden/golden.json",
        "golden/golden.safetensors",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "program/decode.py",
        "program/init.jaxexport",
        "program/prefill.jaxexport",
        "program/program.json",
        "program/step.jaxexport",
        "tokenizer/kind.json",
    ]
    manifest = json.loads((artifact_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["created_from"] == {"run": "random", "step": 7}
    assert manifest["memories"]["product_key"] == ["1.ffn", "3.ffn"]
    assert manifest["files"]["model-00001-of-00001.safetensors"]["role"] == "weights"
    assert manifest["model"]["dtypes"]["params"] == "float32"
    exact = manifest["checked"]["float32"]
    assert {"one_shot", "chunked", "token_by_token"} < set(exact)
    assert all(exact[cut]["max_difference"] <= 1e-4 for cut in ("one_shot", "chunked"))
    assert os.listdir(artifact_path.parent) == ["model.mtx"]


def test_the_model_comes_back(artifact_path, model):
    artifact = Artifact.load(artifact_path)
    assert artifact.experiment == Experiment(name="random", model=CONFIG)
    assert artifact.tokenizer and artifact.tokenizer.fingerprint() == "bytes"
    saved, wanted = artifact.tensors(), to_tensors(unstack_model(model))
    assert saved.keys() == wanted.keys()
    assert all((saved[name] == wanted[name]).all() for name in wanted)
    assert {"layers.3.mixer.query.weight", "tables.memory", "embedding"} < saved.keys()
    # Layer 3 is the second repeat of the pattern's second block.
    mixer = model.blocks[1].mixer
    assert mixer is not None
    stacked = mixer.layer.query.weight[...]
    assert (saved["layers.3.mixer.query.weight"] == np.asarray(stacked)[1]).all()
    again = artifact.stacked_model()
    assert jax.tree.structure(again) == jax.tree.structure(model)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again, model)
    assert all(jax.tree.leaves(same))


def test_the_cache_spec_counts_the_bytes_of_the_live_state(artifact_path, model):
    spec = Artifact.load(artifact_path).cache_spec()
    assert [(p["layer"], p["place"], p["memory"]) for p in spec["places"]][:3] == [
        (0, "mixer", "window"),
        (1, "mixer", "attention"),
        (1, "ffn", "product_key"),
    ]
    key = {p["layer"]: p for p in spec["places"] if p["place"] == "mixer"}
    assert key[1]["leaves"]["key"]["shape"] == ["batch", "capacity", 2, 16]
    assert key[0]["leaves"]["key"]["shape"] == ["batch", "min(capacity, 8)", 1, 16]
    assert key[0]["leaves"]["sink_key"]["shape"] == ["batch", 2, 1, 16]
    for batch, capacity in ((1, 64), (3, 1000)):
        counted = batch * (spec["bytes_per_sequence"] + capacity * spec["bytes_per_token"])
        assert counted == spec_bytes(model.state_spec(batch, capacity))


def test_one_changed_byte_in_any_file_is_refused(artifact_path, copy):
    rng = np.random.default_rng(0)
    for name in names(artifact_path):
        content = (artifact_path / name).read_bytes()
        last = len(content) - 1
        for at in {0, last, *rng.integers(0, len(content), 14).tolist()}:
            changed = bytearray(content)
            changed[at] ^= int(rng.integers(1, 256))
            (copy / name).write_bytes(changed)
            with pytest.raises(ArtifactError) as error:
                Artifact.load(copy)
            assert name in str(error.value) and "\n" not in str(error.value), (name, at)
        (copy / name).write_bytes(content)
    Artifact.load(copy)  # and whole again it is read


def test_a_file_cut_short_or_grown_is_refused(copy):
    file = copy / "model-00001-of-00001.safetensors"
    content = file.read_bytes()
    for other in (content[:-1], content + b"\0", b""):
        file.write_bytes(other)
        with pytest.raises(ArtifactError, match=f"{len(other)} bytes, {len(content)} were written"):
            Artifact.load(copy)


def test_missing_and_unknown_files_are_refused(artifact_path, copy):
    for name in names(artifact_path):
        (copy / name).rename(copy.parent / "away")
        with pytest.raises(ArtifactError, match=name.split("/")[-1]):
            Artifact.load(copy)
        (copy.parent / "away").rename(copy / name)
    for extra in ("extra.bin", "golden/more", ".hidden"):
        (copy / extra).write_bytes(b"")
        with pytest.raises(ArtifactError, match="is no part of the artifact"):
            Artifact.load(copy)
        (copy / extra).unlink()
    config = copy / "config.json"
    config.rename(copy.parent / "config.json")
    config.symlink_to(copy.parent / "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json is not a regular file"):
        Artifact.load(copy)


def rewritten(path, **changes):
    """The manifest with other content and a digest that fits it."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | changes
    (path / "manifest.json").write_bytes(artifacts._rendered(manifest))


def test_other_formats_and_unfinished_exports_are_refused(copy, tmp_path):
    rewritten(copy, format_version=2)
    with pytest.raises(ArtifactError, match="of format 2, this memtrain reads 1: upgrade"):
        Artifact.load(copy)
    rewritten(copy, format_version=1, checked=None)
    with pytest.raises(ArtifactError, match="never finished"):
        Artifact.load(copy)
    for path in (tmp_path, tmp_path / "nothing", copy / "config.json"):
        with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
            Artifact.load(path)


def test_a_cache_of_another_shape_is_refused(copy):
    """As if this version of memtrain kept its state otherwise than the one that wrote."""
    spec = json.loads((copy / "cache_spec.json").read_text())
    spec["places"][0]["leaves"]["key"]["shape"][2] = 3
    artifacts._write_json(copy / "cache_spec.json", spec)
    rewritten(copy, files=artifacts._digests(copy))
    with pytest.raises(ArtifactError, match="is not the cache that this memtrain decodes with"):
        Artifact.load(copy).weights()


def test_weights_of_another_model_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["dim"] = 64
    artifacts._write_json(copy / "config.json", config)
    rewritten(copy, files=artifacts._digests(copy))
    with pytest.raises(ArtifactError, match=r"tensor embedding is float32\[257, 32\], the model's"):
        Artifact.load(copy).weights()


# Writing


def write(out, check=lambda artifact: {"float32": "looked at"}, **more):
    tensors = to_tensors(unstack_model(more.pop("model")))
    golden = Golden(
        tokens=np.zeros((1, 4), np.int32),
        starts=np.zeros((1, 4), bool),
        at=np.arange(4, dtype=np.int32),
        logits=np.zeros((1, 4, VOCAB), np.float32),
    )
    return write_artifact(
        out,
        experiment=Experiment(name="written", model=CONFIG),
        vocab_size=VOCAB,
        tensors=tensors,
        tokenizer=load_tokenizer("bytes"),
        golden=golden,
        created_from={"run": "written", "step": 0},
        check=check,
    )


def test_shards_and_their_index(model, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "MAX_SHARD_BYTES", 40_000)
    artifact = write(tmp_path / "m.mtx", model=model)
    shards = sorted(tmp_path.glob("m.mtx/*.safetensors"))
    assert len(shards) == 4 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 50_000 for shard in shards)
    found, wanted = Artifact.load(artifact.path).tensors(), to_tensors(unstack_model(model))
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_a_failed_check_leaves_nothing_behind(model, tmp_path):
    def refuse(artifact):
        assert len(artifact.tensors()) == len(to_tensors(unstack_model(model)))
        raise ArtifactError("logits differ")

    with pytest.raises(ArtifactError, match="logits differ"):
        write(tmp_path / "m.mtx", refuse, model=model)
    assert os.listdir(tmp_path) == []
    before = write(tmp_path / "m.mtx", model=model)
    with pytest.raises(ArtifactError):
        write(tmp_path / "m.mtx", refuse, model=model)
    assert os.listdir(tmp_path) == ["m.mtx"]
    assert Artifact.load(tmp_path / "m.mtx").manifest == before.manifest


def test_only_artifacts_are_replaced(model, tmp_path):
    out = tmp_path / "m.mtx"
    out.mkdir()
    write(out, model=model)  # an empty folder is no loss
    write(out, model=model)
    assert os.listdir(tmp_path) == ["m.mtx"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("one")
    with pytest.raises(BadInput, match="is no artifact: it is not overwritten"):
        write(other, model=model)
    with pytest.raises(BadInput, match="is no artifact"):
        write(other / "chapter", model=model)
    with pytest.raises(BadInput, match="there is no folder"):
        write(tmp_path / "a" / "b", model=model)
    assert (other / "chapter").read_text() == "one"


def test_a_disk_that_refuses_leaves_nothing_behind(model, tmp_path):
    """Files may not grow past 60 kB: the weights do not fit, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match="could not be written") as error:
            write(tmp_path / "m.mtx", model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.exit_code == 74 and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
