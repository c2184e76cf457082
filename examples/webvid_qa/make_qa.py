"""Questions and answers from captions, by a language model: what a WebVid-QA is made of."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sta_adapter.errors import DataError

Ask = Callable[[list[str]], list[str]]
FORM = "Write each question in a line that begins with 'Question:' and its answer in the next, after 'Answer:'."
ONE = f"Here is the description of a video. Ask one question about the video that it answers, and answer it. {FORM}"
SEVERAL = (
    "Here is the description of a video. Write a conversation of several questions about the video, which it answers, "
    f"and their answers. {FORM}"
)
PAIR = re.compile(r"question:\s*(\S[^\n]*)\n+\s*answer:\s*(\S[^\n]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Caption:
    """A clip's id and its description."""

    id: str
    text: str


def read_captions(folder: Path, most: int) -> list[Caption]:
    """The longest descriptions in the CSV files of a folder (columns `videoid` and `name`), as published."""
    captions = {}
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if "videoid" not in row or "name" not in row:
                    raise DataError(f"{file} has the columns {', '.join(row)}; expected videoid and name.")
                captions[row["videoid"]] = Caption(row["videoid"], row["name"])
    if not captions:
        raise DataError(f"{folder}: no CSV file with captions in it.")
    return sorted(captions.values(), key=lambda caption: len(caption.text), reverse=True)[:most]


def make_conversations(
    captions: Sequence[Caption], ask: Ask, *, seed: int, batch_size: int = 64
) -> Iterator[tuple[Caption, list[tuple[str, str]]]]:
    """Ask for one question about a third of the captions and for several about the rest, as published.

    Args:
        captions: of the clips.
        ask: from prompts to a language model's answers.
        seed: of which captions get one question.
        batch_size: prompts at a time.

    Yields:
        A caption and its questions with answers; none where the model kept to no form.
    """
    shuffled = list(captions)
    random.Random(seed).shuffle(shuffled)
    border = len(shuffled) // 3
    for task, part in ((ONE, shuffled[:border]), (SEVERAL, shuffled[border:])):
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            replies = ask([f"{task}\n\n{caption.text}" for caption in batch])
            for caption, reply in zip(batch, replies, strict=True):
                pairs = [(question.strip(), answer.strip()) for question, answer in PAIR.findall(reply)]
                yield caption, pairs[:1] if task == ONE else pairs


def language_model(name: str, max_new_tokens: int = 512) -> Ask:
    """A chat model of transformers as what is asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def ask(prompts: list[str]) -> list[str]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask
