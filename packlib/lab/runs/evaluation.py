"""Validation loss in one place: Σ loss / Σ tokens on unpacked examples, never a mean of batch means.

Every example lies on a line of its own, so no two can see each other whatever the attention is; batches hold examples
of like length.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from packlib.collators import IGNORE_INDEX, PaddingCollator

if TYPE_CHECKING:
    from packlib.lab.data.corpora import Corpus


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, corpus: Corpus, *, max_slots: int = 4096, by_position: bool = False
) -> dict[str, Any]:
    """Loss of `model` on the examples of `corpus`, each alone on its line.

    Returns `eval_loss_per_token` (Σ loss / Σ loss tokens, nats), `eval_loss_per_example` (mean over examples of their
    mean loss, nats), `eval_tokens` and `eval_examples` (those with at least one loss token). by_position: also
    `eval_loss_by_position`, a list of [first position, loss per token there, tokens] for positions from 1, 2, 4, … to
    the double of it, and `eval_loss_longest`, per token of the examples as long as the longest. Batches of at most
    `max_slots` slots, or one example. The model is put back into the mode it was in. Raises `ValueError` for a corpus
    without a loss token.
    """
    if not corpus.loss_tokens.any():
        raise ValueError(
            f"{corpus.name} ({corpus.split}) has no loss token in {len(corpus.lengths)} examples to evaluate"
        )
    training = model.training
    model.eval()
    sums, counts = [], []
    places = np.zeros((2, int(corpus.lengths.max()).bit_length()))  # loss and tokens of positions of so many bits
    for rows in _batches(corpus.lengths, max_slots):
        batch = PaddingCollator(corpus.pad_token_id)([corpus.dataset[int(i)] for i in rows])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch | {"use_cache": False}).logits[:, :-1]
        scored = labels != IGNORE_INDEX
        loss = torch.zeros(labels.shape, device=logits.device)
        loss[scored] = cross_entropy(logits[scored].float(), labels[scored], reduction="none")
        sums.append(loss.double().sum(1).cpu())
        counts.append(scored.sum(1).cpu())
        at = torch.stack([loss.double().sum(0), scored.sum(0)]).cpu().numpy()  # of positions from 1
        bits = np.frexp(np.arange(1, at.shape[1] + 1))[1] - 1
        for values, seen in zip(places, at):
            np.add.at(values, bits, seen)
    model.train(training)
    total, tokens = torch.cat(sums), torch.cat(counts)
    predicted = tokens > 0
    order = np.concatenate(_batches(corpus.lengths, max_slots))
    longest = torch.from_numpy(corpus.lengths[order] == corpus.lengths.max())
    further = {
        "eval_loss_by_position": [
            [2**i, loss / seen, int(seen)] for i, (loss, seen) in enumerate(places.T.tolist()) if seen
        ],
        "eval_loss_longest": float(total[longest].sum() / tokens[longest].sum()) if tokens[longest].sum() else None,
    }
    return (further if by_position else {}) | {
        "eval_loss_per_token": float(total.sum() / tokens.sum()),
        "eval_loss_per_example": float((total[predicted] / tokens[predicted]).mean()),
        "eval_tokens": int(tokens.sum()),
        "eval_examples": int(predicted.sum()),
    }


def _batches(lengths: np.ndarray, max_slots: int) -> list[np.ndarray]:
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        last = first + max(1, max_slots // int(lengths[order[first]]))
        batches.append(order[first:last])
        first = last
    return batches


@torch.no_grad()
def exact_match(
    model: Any, corpus: Corpus, tokenizer: Any, *, max_new_tokens: int = 256, batch_size: int = 64
) -> dict[str, float]:
    """Share of examples whose generated answer ends in the same number as the reference.

    Greedy decoding of at most `max_new_tokens`, prompts padded on the left, `batch_size` at a time, through sdpa, which
    has a cache; the varlen kernels are for training. `corpus` must be tokenized with `loss="response"`: the prompt is
    what has no loss. Returns `exact_match` in [0, 1] and `generated_examples`. Raises `ValueError` for an example
    without a prompt.
    """
    training, use_cache, attention = model.training, model.config.use_cache, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    prompts, answers = [], []
    for i, example in enumerate(corpus.dataset):
        trained = np.asarray(example["labels"]) != IGNORE_INDEX
        cut = int(np.argmax(trained))
        if not cut:
            expected = 'expected a corpus tokenized with loss="response"'
            found = "has loss from its first token on" if trained.any() else "has no response"
            raise ValueError(f"example {i} of {corpus.name} {found}; {expected}")
        prompts.append(example["input_ids"][:cut])
        answers.append(tokenizer.decode(example["input_ids"][cut:], skip_special_tokens=True))
    right = 0
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        width = max(map(len, chunk))
        ids = torch.tensor([[corpus.pad_token_id] * (width - len(p)) + p for p in chunk], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=corpus.eos_token_id,
            pad_token_id=corpus.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        right += sum(
            final_number(t) is not None and final_number(t) == final_number(a) for t, a in zip(texts, answers[first:])
        )
    model.train(training)
    model.config.use_cache = use_cache
    model.set_attn_implementation(attention)
    return {"exact_match": right / len(prompts), "generated_examples": len(prompts)}


def final_number(text: str) -> float | None:
    """The last number in a text, commas in thousands removed; None where there is none.

    >>> final_number("so 3 + 4 = 1,007. #### 1,007"), final_number("none")
    (1007.0, None)
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
