"""The report: a page that needs nothing but itself, and its numbers."""

import base64
import html.parser
import itertools
import json
import re
import sys

import numpy as np
import pytest

from memtrain.errors import BadInput
from memtrain.evaluate import figures
from memtrain.evaluate import page as pages
from memtrain.evaluate.baselines import MarkovModels, xz_bits_per_byte
from memtrain.evaluate.measure import Budget
from memtrain.evaluate.plots import spread
from memtrain.evaluate.report import _experts, experts_of, report
from memtrain.evaluate.run import evaluate
from memtrain.evaluate.subject import Subject

from .conftest import SEQ_LEN, STEPS


SMALL = Budget(
    bits=1 << 20, reread=512, recall=512, recall_beyond=1024, slots=1024, mqar=320, sample=12
)
_VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and that its tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "data", "srcset", "action"):
                scheme, _, data = (value or "").partition(",")
                assert (tag, name, scheme) == ("img", "src", "data:image/png;base64")
                self.images.append(data)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(run):
    return report(run, budget=SMALL, say=lambda line: None)


def test_the_page_is_complete_and_needs_nothing_else(run, made):
    content = (run / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert not page.open and not {"script", "link", "iframe"} & page.tags
    assert "http" not in content and "url(" not in content and "@import" not in content
    names = ["remembering", "learning", "positions", "slots", "throughput"]
    assert list(made["figures"]) == names and made["report"] == str(run / "report.html")
    files = [(run / "figures" / f"{name}.png").read_bytes() for name in names]
    assert [base64.b64decode(image) for image in page.images] == files
    assert all(file.startswith(b"\x89PNG\r\n") for file in files)
    text = "".join(page.text)
    sections = [
        "The picture of remembering",
        "Learning",
        "What context is worth",
        "The key-value table",
        "Speed",
        "Against simple models",
        "A sample",
        "How it was made",
    ]
    places = [text.index(section) for section in sections]
    assert places == sorted(places)
    assert made["sample"].replace("\r", "\n")[:3].strip("\ufffd") in text
    assert not list((run / "figures").glob("*.tmp"))


def test_the_numbers_are_those_of_evaluate(run, made, subject):
    json.dumps(made, allow_nan=False)
    whole = evaluate(run, task="bpb")
    assert made["step"] == STEPS and made["notes"] == []
    assert made["bits_per_byte"]["all"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)
    without = evaluate(run, task="bpb", without=("attention",))["bits_per_byte"]
    assert made["bits_per_byte"]["without_attention"] == pytest.approx(without, rel=1e-5)
    settings = {"all", "without_attention", "without_product_key"}
    for key in ("bits_per_byte", "bits_per_byte_by_position", "reread"):
        assert set(made[key]) == settings
    assert set(made["recall"]["by_distance"]) == settings
    rows = made["recall"]["by_distance"]["all"]
    assert rows[-1]["to"] == 2 * SEQ_LEN and rows[-1]["from"] == SEQ_LEN
    assert all(set(answer) >= settings for answer in made["answers"])
    assert 0 < made["slots_used"]["memory"] <= 1


def test_baselines_read_what_the_model_read(run, made, subject, corpus):
    """As many rows of text as the trainer is given rows; plain ones stand in for recall's."""
    read = []
    for index in range(STEPS * 8):
        row = subject.pipeline._text_rows.row(index)
        tokens = row.tokens[row.valid].astype(np.uint8)
        begins = [*np.flatnonzero(row.starts[row.valid]).tolist(), len(tokens)]
        read += [tokens[a:b] for a, b in itertools.pairwise(begins)]
    files = [(corpus / name).read_bytes() for name in subject.held_out().names]
    pieces = [(np.frombuffer(f[:1], np.uint8), np.frombuffer(f[1:], np.uint8)) for f in files]
    wanted = MarkovModels(read).bits_per_byte(pieces)
    found = made["baselines"]
    assert [found[f"Markov order {order}"] for order in range(4)] == pytest.approx(wanted)
    assert found["xz -9e, file by file"] == pytest.approx(xz_bits_per_byte(files))
    assert found["this model"] == made["bits_per_byte"]["all"]
    assert made["beats"] == {
        name: found["this model"] < value for name, value in found.items() if name != "this model"
    }


def test_the_same_run_gives_the_same_page(run, made):
    before = (run / "report.html").read_bytes()
    again = report(run, budget=SMALL, say=lambda line: None)
    assert {**again, "seconds": 0} == {**made, "seconds": 0}
    assert (run / "report.html").read_bytes() == before


def test_report_of_mqar(mqar_run):
    found = report(mqar_run, budget=SMALL, say=lambda line: None)
    assert set(found["recall"]["by_distance"]) == {"all", "without_attention"}
    assert found["recall"]["chance"] == pytest.approx(2 / 64)
    page = Page((mqar_run / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == len(found["figures"]) == 1


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("mqar", {}, "was not trained on data.mqar: take --task recall"),
        ("bpb", {"without": ["bank"]}, "without 'bank': this model has no such memory"),
        ("bpb", {"data": ["/no/such/file"]}, "no such file or folder"),
        ("guess", {}, "there are associative, bpb, copy, facts, mqar, recall and reread"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(run, task, more, message):
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        evaluate(run, task=task, **more)
    assert "\n" not in str(caught.value)


def test_mqar_is_no_text(mqar_run, tmp_path):
    for task in ("bpb", "recall"):
        with pytest.raises(BadInput, match="take --task mqar"):
            evaluate(mqar_run, task=task)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="reads no --data"):
        evaluate(mqar_run, task="mqar", data=[tmp_path])


def test_no_run_and_no_text(run, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(BadInput):
        evaluate(run, task="bpb", data=[tmp_path / "empty.txt"])
    with pytest.raises(BadInput, match="neither a run nor an exported model"):
        evaluate(tmp_path, task="bpb")
    with pytest.raises(BadInput, match="holds no run"):
        report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match="memtrain\\[report\\]"):
        report(run)


def test_a_checkpoint_of_before(run):
    from memtrain.train.load import load_model

    new, old = load_model(run), load_model(run, STEPS // 2)
    assert (new.step, old.step, new.vocab_size) == (STEPS, STEPS // 2, 256)
    tables = [np.asarray(loaded.model.tables["memory"][...]) for loaded in (new, old)]
    assert np.abs(tables[0] - tables[1]).max() > 1e-4
    with pytest.raises(BadInput, match="has no step 3"):
        load_model(run, 3)


def test_settings_of_a_subject(subject, mqar_run):
    assert subject.memories == ("attention", "product_key")
    assert Subject.open(mqar_run).memories == ("attention",)


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_spread(seed):
    wanted = np.sort(np.random.default_rng(seed).random(6)).tolist()
    places = spread(wanted, 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(places))
    assert min(places) >= -1e-9 and max(places) <= 1 + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.5, 0.9])


def test_experts_are_drawn_and_told():
    """From the lines of a run: layers in order of depth, the newest of each number."""
    metrics = ("load_max", "experts_used", "balance", "router_entropy")
    lines = [{"step": 0, "train/loss": 3.0}]
    for step in (1, 2, 3):
        at = {"step": step, "tokens": 10 * step}
        for layer in (10, 2):
            at |= {f"memory/{layer}.ffn.{m}": layer + step + i / 8 for i, m in enumerate(metrics)}
        lines += [at, {f"validation/{n}": v for n, v in at.items() if n.startswith("memory/")}]
    lines.append({"step": 4, "tokens": 40, "memory/2.ffn.balance": None})  # a skipped step
    found = experts_of(lines)
    assert list(found) == ["2.ffn", "10.ffn"]
    assert found["10.ffn"] == {m: 13 + i / 8 for i, m in enumerate(metrics)}
    figure = figures.expert_use(lines)
    assert figure is not None
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]  # type: ignore[union-attr]
    assert [row[0] for row in drawn[0]] == [10, 20, 30] and len(drawn) == 3
    page = pages.Page("Experts")
    _experts(page, {"experts": b""}, lines)
    assert "2.ffn" in page.render() and "13.250" in page.render()
    assert figures.expert_use(lines[:1]) is None and experts_of(lines[:1]) == {}
